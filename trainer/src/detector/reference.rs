//! The detector in burn, with autodiff: the oracle of [`super::engine`]. Pictures are `[1, channels, rows, columns]`.

use super::network::{Network, Op};
use crate::distill::student::{RGB, STEM_KERNEL, STEM_STRIDE};
use crate::uniad::{Leaf, host};
use burn::tensor::module::{conv2d, max_pool2d};
use burn::tensor::ops::{ConvOptions, MaxPoolOptions, PadMode};
use burn::tensor::{Device, Tensor, TensorData};
use std::ops::Range;

/// Upper end of ReLU6.
const SIX: f64 = 6.0;

/// Log odds of one picture (`[height, width, 3]`), and, for the loss `sum(odds * weights)`, the gradient of all parameters.
///
/// # Panics
/// When lengths do not fit the network: the caller made them from it.
pub fn gradients(network: &Network, parameters: &[f32], image: &[f32], weights: &[f32], device: &Device) -> (Vec<f32>, Vec<f32>) {
    let grad_device = device.clone().autodiff();
    let leaf: Tensor<1> = Tensor::<1>::from_data(TensorData::new(parameters.to_vec(), [network.parameters]), device).autodiff_leaf();
    let part = |range: &Range<usize>| leaf.clone().slice([range.clone()]);
    let picture = |values: &[f32], [h, w, c]: [usize; 3]| -> Tensor<4> {
        Tensor::<4>::from_data(TensorData::new(values.to_vec(), [1, h, w, c]), &grad_device).permute([0, 3, 1, 2])
    };
    let mut made: Vec<Tensor<4>> = Vec::new();
    for node in &network.nodes {
        let input = |k: usize| made[node.inputs[k]].clone();
        let channels = |k: usize| network.nodes[node.inputs[k]].shape[2];
        let [h, w, c] = node.shape;
        made.push(match node.op {
            Op::Image => picture(image, node.shape),
            Op::Stem => {
                let kernel = part(&node.weight).reshape([STEM_KERNEL, STEM_KERNEL, RGB, c]).permute([3, 2, 0, 1]);
                convolution(input(0), kernel, part(&node.bias), STEM_STRIDE, [0, STEM_KERNEL - STEM_STRIDE], 1).clamp(0.0, SIX)
            }
            Op::Pointwise { relu6 } => {
                let kernel = part(&node.weight).reshape([channels(0), c, 1, 1]).permute([1, 0, 2, 3]);
                let y = convolution(input(0), kernel, part(&node.bias), 1, [0, 0], 1);
                match (relu6, node.inputs.len()) {
                    (true, _) => y.clamp(0.0, SIX),
                    (false, 2) => y + input(1),
                    _ => y,
                }
            }
            Op::Depthwise { kernel, stride, pad } => {
                let weight = part(&node.weight).reshape([kernel, kernel, c, 1]).permute([2, 3, 0, 1]);
                convolution(input(0), weight, part(&node.bias), stride, [pad, kernel - stride - pad], c).clamp(0.0, SIX)
            }
            Op::MaxPool => max_pool2d(input(0), MaxPoolOptions::new([2, 2])),
            Op::Up => doubled(doubled(input(0), 2), 3),
            Op::Add => input(0) + input(1),
            Op::Dense { relu6 } => {
                let inputs = network.nodes[node.inputs[0]].len();
                let row = input(0).permute([0, 2, 3, 1]).reshape([1, inputs]);
                let y = row.matmul(part(&node.weight).reshape([inputs, h * w * c])).reshape([1, h, w, c]).permute([0, 3, 1, 2]);
                let y = y + part(&node.bias).reshape([1, h, w, c]).permute([0, 3, 1, 2]);
                if relu6 { y.clamp(0.0, SIX) } else { y }
            }
        });
    }
    let odds = made.pop().unwrap_or_else(|| unreachable!("a network has layers"));
    let [rows, columns] = network.grid();
    let loss = (odds.clone() * picture(weights, [rows, columns, 1])).sum();
    let grads = loss.backward();
    let gradient = leaf.grad(&grads).map(host).unwrap_or_default();
    (host(odds.inner().reshape([rows * columns])), gradient)
}

/// Twice as long along `axis`: each output is three quarters of the nearer and a quarter of the farther input.
fn doubled(x: Tensor<4>, axis: usize) -> Tensor<4> {
    let size = x.dims()[axis];
    let before = Tensor::cat(vec![x.clone().narrow(axis, 0, 1), x.clone().narrow(axis, 0, size - 1)], axis);
    let after = Tensor::cat(vec![x.clone().narrow(axis, 1, size - 1), x.clone().narrow(axis, size - 1, 1)], axis);
    let near = x * 0.75;
    let even = near.clone() + before * 0.25;
    let odd = near + after * 0.25;
    let mut shape = even.dims();
    shape[axis] = 2 * size;
    let pair: Tensor<5> = Tensor::stack(vec![even, odd], axis + 1);
    pair.reshape(shape)
}

/// Zero padding of `pads` (before, after) on both axes.
fn convolution(x: Tensor<4>, weight: Tensor<4>, bias: Tensor<1>, stride: usize, pads: [usize; 2], groups: usize) -> Tensor<4> {
    let [before, after] = pads;
    let x = if before + after > 0 { x.pad((before, after, before, after), PadMode::Constant(0.0)) } else { x };
    conv2d(x, weight, Some(bias), ConvOptions::new([stride; 2], [0, 0], [1, 1], groups))
}
