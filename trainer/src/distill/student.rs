//! The student backbone: a chain of inverted residuals with ReLU6 and linear bottlenecks, and its parameters as one flat list.
//!
//! It has the teacher's chain of narrow tensors ([`Architecture::boundaries`]) and fewer hidden channels between them. So every block of the student
//! has an input and a target of its own, the teacher's, and can be trained before the blocks in front of it are any good.
//! No batch norm: inputs and targets are normalised with constants, which the export folds into the weights ([`super::export`]).

use rand::SeedableRng;
use std::ops::Range;

/// Channels of an image.
pub const RGB: usize = 3;
/// Side of the stem's kernel, px.
pub const STEM_KERNEL: usize = 3;
/// Stride of the stem.
pub const STEM_STRIDE: usize = 2;
/// Hidden channels are rounded up to this many: whole vectors for every kernel of the inspector.
pub const HIDDEN_MULTIPLE: usize = 16;
/// Spread of the weights that the learning rate is meant for, see [`Architecture::rate_factors`].
const TYPICAL_WEIGHT: f64 = 0.1;

/// One inverted residual: 1x1 expansion (ReLU6), depthwise convolution (ReLU6), linear 1x1 projection, input added where shapes allow.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Block {
    /// Channels of the input.
    pub inputs: usize,
    /// Channels of the depthwise convolution; equal to `inputs` where there is no expansion.
    pub hidden: usize,
    /// Channels of the output.
    pub outputs: usize,
    /// Side of the depthwise kernel.
    pub kernel: usize,
    /// Stride of the depthwise convolution, 1 or 2.
    pub stride: usize,
    /// Zero padding above and to the left, px; below and to the right follow from "SAME" output sizes.
    pub pad: usize,
    /// Whether there is an expansion.
    pub expand: bool,
    /// Whether the input is added to the output.
    pub residual: bool,
}

impl Block {
    /// An inverted residual with the padding that halves an even picture at stride 2 and keeps it at stride 1; its input is added where that fits.
    /// Without `expand` the depthwise convolution works on the input itself, and `hidden` equals `inputs`.
    pub fn inverted(inputs: usize, hidden: usize, outputs: usize, kernel: usize, stride: usize, expand: bool) -> Self {
        let residual = stride == 1 && inputs == outputs && expand;
        Self { inputs, hidden, outputs, kernel, stride, pad: (kernel - stride) / 2, expand, residual }
    }
}

/// The whole trunk.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Architecture {
    /// Channels of the stem, a 3x3 convolution of stride 2 with ReLU6, padded below and to the right.
    pub stem: usize,
    /// Inverted residuals in order; the first has no expansion.
    pub blocks: Vec<Block>,
    /// Stage outputs: name and index of the block that makes it.
    pub taps: Vec<(String, usize)>,
}

/// Where a block's parameters lie in the flat list.
#[derive(Clone, Debug)]
pub struct BlockLayout {
    /// `[inputs, hidden]`; empty without expansion.
    pub expand: Range<usize>,
    /// `[hidden]`.
    pub expand_bias: Range<usize>,
    /// `[kernel, kernel, hidden]`.
    pub depthwise: Range<usize>,
    /// `[hidden]`.
    pub depthwise_bias: Range<usize>,
    /// `[outputs, hidden]`.
    pub project: Range<usize>,
    /// `[outputs]`.
    pub project_bias: Range<usize>,
}

/// Where parameters lie in the flat list.
#[derive(Clone, Debug)]
pub struct Layout {
    /// `[3, 3, 3 (red, green, blue), stem]`: kernel row, kernel column.
    pub stem: Range<usize>,
    /// `[stem]`.
    pub stem_bias: Range<usize>,
    /// One a block.
    pub blocks: Vec<BlockLayout>,
    /// Parameters in all.
    pub len: usize,
}

impl Architecture {
    /// The same chain with `share` of the hidden channels, each rounded up to [`HIDDEN_MULTIPLE`] and never more than there were. Blocks without
    /// expansion, and the stem, stay as they are.
    pub fn slimmed(&self, share: f64) -> Self {
        let mut slim = self.clone();
        for block in slim.blocks.iter_mut().filter(|b| b.expand) {
            let wanted = (block.hidden as f64 * share / HIDDEN_MULTIPLE as f64).ceil() as usize * HIDDEN_MULTIPLE;
            block.hidden = wanted.clamp(HIDDEN_MULTIPLE.min(block.hidden), block.hidden);
        }
        slim
    }

    /// Downscaling from the image to the output of block `index`.
    pub fn stride_after(&self, index: usize) -> usize {
        STEM_STRIDE * self.blocks.iter().take(index + 1).map(|b| b.stride).product::<usize>()
    }

    /// Multiply-adds for an image of `side` x `side` px.
    pub fn multiply_adds(&self, side: usize) -> u64 {
        let mut pixels = (side / STEM_STRIDE).pow(2);
        let mut total = pixels * STEM_KERNEL * STEM_KERNEL * RGB * self.stem;
        for b in &self.blocks {
            if b.expand {
                total += pixels * b.inputs * b.hidden;
            }
            pixels /= b.stride * b.stride;
            total += pixels * b.hidden * (b.kernel * b.kernel + b.outputs);
        }
        total as u64
    }

    /// Channels at the end of each block: the narrow tensors that student and teacher share.
    pub fn boundaries(&self) -> Vec<usize> {
        self.blocks.iter().map(|b| b.outputs).collect()
    }

    /// Index of the last block of the residual chain that block `index` belongs to: the blocks of a chain add to one tensor and so share one
    /// normalisation.
    pub fn chain_end(&self, index: usize) -> usize {
        let more = self.blocks.iter().skip(index + 1).take_while(|b| b.residual).count();
        index + more
    }

    /// Places of all parameters.
    pub fn layout(&self) -> Layout {
        let mut at = 0;
        let mut take = |n: usize| {
            at += n;
            at - n..at
        };
        let stem = take(STEM_KERNEL * STEM_KERNEL * RGB * self.stem);
        let stem_bias = take(self.stem);
        let blocks = self
            .blocks
            .iter()
            .map(|b| BlockLayout {
                expand: take(if b.expand { b.inputs * b.hidden } else { 0 }),
                expand_bias: take(if b.expand { b.hidden } else { 0 }),
                depthwise: take(b.kernel * b.kernel * b.hidden),
                depthwise_bias: take(b.hidden),
                project: take(b.outputs * b.hidden),
                project_bias: take(b.outputs),
            })
            .collect();
        Layout { stem, stem_bias, blocks, len: at }
    }

    /// Standard deviation of each weight's initial values (He's initialisation for unit-variance inputs, small residual branches), and its places.
    /// Biases are not in the list.
    fn spreads(&self) -> Vec<(Range<usize>, f64)> {
        let layout = self.layout();
        // Pixels are (p - 127) / 128 with a deviation of about a half, and neighbours agree: a stem of twice He's size answers to edges.
        let mut list = vec![(layout.stem, 2.0 * (2.0 / (STEM_KERNEL * STEM_KERNEL * RGB) as f64).sqrt())];
        for (b, l) in self.blocks.iter().zip(layout.blocks) {
            let gain = if b.residual { 0.2 } else { 0.7 };
            list.push((l.expand, (2.0 / b.inputs.max(1) as f64).sqrt()));
            list.push((l.depthwise, 1.0 / b.kernel as f64));
            list.push((l.project, gain / (b.hidden.max(1) as f64).sqrt()));
        }
        list
    }

    /// Fresh parameters: normal weights, zero biases (0.5 in front of a ReLU6, so that few units start dead).
    pub fn init(&self, seed: u64) -> Vec<f32> {
        let layout = self.layout();
        let mut values = vec![0.0; layout.len];
        let mut rng = rand_pcg::Pcg64::seed_from_u64(seed);
        for (range, deviation) in self.spreads() {
            for v in values.get_mut(range).unwrap_or_default() {
                *v = (f64::from(super::synth::normal(&mut rng)) * deviation) as f32;
            }
        }
        let hidden = layout.blocks.into_iter().flat_map(|l| [l.expand_bias, l.depthwise_bias]);
        for range in std::iter::once(layout.stem_bias).chain(hidden) {
            values.get_mut(range).unwrap_or_default().fill(0.5);
        }
        values
    }

    /// Factor on the learning rate of each parameter. Adam moves every weight by about the same amount a step; a stem whose weights are ten times as
    /// large as a late layer's would learn ten times as slowly.
    pub fn rate_factors(&self) -> Vec<f32> {
        let mut factors = vec![1.0; self.layout().len];
        for (range, deviation) in self.spreads() {
            factors.get_mut(range).unwrap_or_default().fill((deviation / TYPICAL_WEIGHT).max(1.0) as f32);
        }
        factors
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A small chain with everything in it: no expansion, strides, both kernels, a residual.
    pub fn tiny() -> Architecture {
        let block = Block::inverted;
        Architecture {
            stem: 16,
            blocks: vec![
                block(16, 16, 8, 3, 1, false),
                block(8, 32, 12, 3, 2, true),
                block(12, 32, 12, 3, 1, true),
                block(12, 48, 20, 5, 2, true),
                block(20, 48, 20, 5, 1, true),
            ],
            taps: vec![("f2".into(), 0), ("f4".into(), 2), ("f8".into(), 4)],
        }
    }

    #[test]
    fn the_layout_covers_every_parameter_once_and_chains_end_where_the_residuals_do() {
        let a = tiny();
        let l = a.layout();
        let mut ranges = vec![l.stem.clone(), l.stem_bias.clone()];
        for b in &l.blocks {
            ranges.extend([&b.expand, &b.expand_bias, &b.depthwise, &b.depthwise_bias, &b.project, &b.project_bias].map(Clone::clone));
        }
        let mut at = 0;
        for r in ranges {
            assert_eq!(r.start, at);
            at = r.end;
        }
        assert_eq!(at, l.len);
        assert_eq!((0..5).map(|i| a.chain_end(i)).collect::<Vec<_>>(), [0, 2, 2, 4, 4]);
        assert_eq!((a.stride_after(0), a.stride_after(4)), (2, 8));
    }

    #[test]
    fn slimming_halves_hidden_channels_only() {
        let a = tiny();
        let slim = a.slimmed(0.5);
        assert_eq!(slim.blocks.iter().map(|b| b.hidden).collect::<Vec<_>>(), [16, 16, 16, 32, 32]);
        assert_eq!(slim.boundaries(), a.boundaries());
        assert!(slim.multiply_adds(64) < a.multiply_adds(64));
        // 3x3x3 stem of 16 at 32x32, then a depthwise 3x3 and 16 -> 8.
        let first = Architecture { blocks: a.blocks[..1].to_vec(), ..a };
        assert_eq!(first.multiply_adds(64), 32 * 32 * (27 * 16 + 16 * 9 + 16 * 8));
    }
}
