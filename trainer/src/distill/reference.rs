//! The student in burn, with autodiff, on any device: what a GPU runs, and the oracle of [`super::engine`]. Pictures are `[batch, channels, rows, columns]`.

use super::engine::{Mode, Sample, StepLoss, Weighing};
use super::student::{Architecture, Block, BlockLayout, RGB, STEM_KERNEL, STEM_STRIDE};
use crate::uniad::{Leaf, host};
use burn::tensor::module::conv2d;
use burn::tensor::ops::{ConvOptions, PadMode};
use burn::tensor::{Device, Tensor, TensorData};

/// Upper end of ReLU6.
const SIX: f64 = 6.0;

/// The same step as `Engine::step`, through burn: losses, and gradients added to `gradients`. The shares of [`Mode::Blockwise`] are ignored (a GPU
/// has no need to save there): every block sees the whole batch.
///
/// # Panics
/// When lengths do not fit the architecture: the caller made them from it.
pub fn step(
    architecture: &Architecture,
    parameters: &[f32],
    batch: &[&Sample],
    mode: &Mode,
    weighing: &Weighing,
    gradients: &mut [f32],
    device: &Device,
) -> StepLoss {
    let count = architecture.blocks.len();
    let mut loss = StepLoss { boundary: vec![0.0; count], total: 0.0 };
    let Some(side) = batch.first().map(|s| s.side) else { return loss };
    let layout = architecture.layout();
    let grad_device = device.clone().autodiff();
    let leaf: Tensor<1> = Tensor::<1>::from_data(TensorData::new(parameters.to_vec(), [layout.len]), device).autodiff_leaf();
    let part = |range: &std::ops::Range<usize>| leaf.clone().slice([range.clone()]);
    // [batch, rows, columns, channels] on the host -> [batch, channels, rows, columns].
    let picture = |values: Vec<&[f32]>, side: usize, channels: usize| -> Tensor<4> {
        let data: Vec<f32> = values.concat();
        Tensor::<4>::from_data(TensorData::new(data, [batch.len(), side, side, channels]), &grad_device).permute([0, 3, 1, 2])
    };
    let image = picture(batch.iter().map(|s| s.image.as_slice()).collect(), side, RGB);
    let kernel = part(&layout.stem).reshape([STEM_KERNEL, STEM_KERNEL, RGB, architecture.stem]).permute([3, 2, 0, 1]);
    let same = STEM_KERNEL - STEM_STRIDE;
    let mut x = convolution(image, kernel, part(&layout.stem_bias), STEM_STRIDE, [same / 2, same - same / 2], 1).clamp(0.0, SIX);
    let mut total: Option<Tensor<1>> = None;
    let mut shares = Vec::with_capacity(count);
    for (b, (block, places)) in architecture.blocks.iter().zip(&layout.blocks).enumerate() {
        let at = side / architecture.stride_after(b);
        if b > 0 && matches!(mode, Mode::Blockwise(_)) {
            x = picture(batch.iter().map(|s| s.targets[b - 1].as_slice()).collect(), at * block.stride, block.inputs);
        }
        x = inverted_residual(block, places, x, &part);
        let target = picture(batch.iter().map(|s| s.targets[b].as_slice()).collect(), at, block.outputs);
        let weight = Tensor::<1>::from_data(TensorData::new(weighing.channel[b].clone(), [block.outputs]), &grad_device);
        let error = ((x.clone() - target).powi_scalar(2) * weight.reshape([1, block.outputs, 1, 1])).mean();
        shares.push(error.clone());
        let weighed = error.mul_scalar(weighing.boundary[b]);
        total = Some(match total {
            Some(sum) => sum + weighed,
            None => weighed,
        });
    }
    let Some(total) = total else { return loss };
    loss.boundary = shares.into_iter().map(|s| host(s.inner()).first().copied().map_or(f64::NAN, f64::from)).collect();
    loss.total = loss.boundary.iter().zip(&weighing.boundary).map(|(l, w)| l * f64::from(*w)).sum();
    let grads = total.backward();
    if let Some(own) = leaf.grad(&grads) {
        for (sum, g) in gradients.iter_mut().zip(host(own)) {
            *sum += g;
        }
    }
    loss
}

fn inverted_residual(block: &Block, places: &BlockLayout, x: Tensor<4>, part: &dyn Fn(&std::ops::Range<usize>) -> Tensor<1>) -> Tensor<4> {
    let (inputs, hidden, outputs, kernel) = (block.inputs, block.hidden, block.outputs, block.kernel);
    let mut y = x.clone();
    if block.expand {
        let weight = part(&places.expand).reshape([inputs, hidden, 1, 1]).permute([1, 0, 2, 3]);
        y = convolution(y, weight, part(&places.expand_bias), 1, [0, 0], 1).clamp(0.0, SIX);
    }
    let weight = part(&places.depthwise).reshape([kernel, kernel, hidden, 1]).permute([2, 3, 0, 1]);
    let after = kernel - block.stride - block.pad;
    y = convolution(y, weight, part(&places.depthwise_bias), block.stride, [block.pad, after], hidden).clamp(0.0, SIX);
    let weight = part(&places.project).reshape([outputs, hidden, 1, 1]);
    y = convolution(y, weight, part(&places.project_bias), 1, [0, 0], 1);
    if block.residual { y + x } else { y }
}

/// Zero padding of `pads` (before, after) on both axes.
fn convolution(x: Tensor<4>, weight: Tensor<4>, bias: Tensor<1>, stride: usize, pads: [usize; 2], groups: usize) -> Tensor<4> {
    let [before, after] = pads;
    let x = if before + after > 0 { x.pad((before, after, before, after), PadMode::Constant(0.0)) } else { x };
    conv2d(x, weight, Some(bias), ConvOptions::new([stride; 2], [0, 0], [1, 1], groups))
}
