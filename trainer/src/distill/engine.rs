//! Forward and backward pass of the student on the CPU, written out by hand on the inspector's own kernels (AVX-512, AVX2, NEON).
//!
//! burn's CPU backend has no backward pass for depthwise convolutions worth the name, and a distillation is nothing but convolutions. So the step is
//! formulated in what `cull::kernels` is fast at: every 1x1 convolution, its input gradient and its weight gradient are matrix products; depthwise
//! convolutions run along the channels. Pictures are channels-last, `[height, width, channels]`, one at a time, so that a block's tensors stay in
//! the cache. [`super::reference`] computes the same with burn's autodiff on any device: it is the oracle of the tests and what a GPU runs.

use super::student::{Architecture, Block, Layout, RGB, STEM_KERNEL, STEM_STRIDE};
use crate::conv::{
    Filter, PIXELS_AT_ONCE, add, add_columns, channels_first, depthwise_input_gradient, depthwise_weight_gradient, mask_relu6, outer,
    transposed,
};
use cull::kernels::depthwise::{Depthwise, Window};
use cull::kernels::isa::Isa;
use cull::kernels::linear::{Activation, Linear};

/// One picture with what the teacher makes of it.
#[derive(Clone, Debug)]
pub struct Sample {
    /// Side of the picture, px; a multiple of 16.
    pub side: usize,
    /// `[side, side, 3]`, normalised as the backbone's input.
    pub image: Vec<f32>,
    /// The teacher's narrow tensors, normalised, one a block: `[side / stride, side / stride, outputs]`.
    pub targets: Vec<Vec<f32>>,
}

/// What a step trains.
#[derive(Clone, Debug, PartialEq)]
pub enum Mode {
    /// Each block on the teacher's own input to it; the share of the batch (0 to 1) that each block sees. No gradient crosses a boundary.
    Blockwise(Vec<f32>),
    /// The trunk as it will run: each block on what the one before made.
    EndToEnd,
}

/// How the errors at the boundaries are weighed.
#[derive(Clone, Debug)]
pub struct Weighing {
    /// Weight of each boundary in the loss.
    pub boundary: Vec<f32>,
    /// One over the variance of each channel of each normalised target (1 at the end of a residual chain).
    pub channel: Vec<Vec<f32>>,
}

/// Result of a step.
#[derive(Clone, Debug, Default)]
pub struct StepLoss {
    /// Mean squared error of each boundary as a share of its channels' variance.
    pub boundary: Vec<f64>,
    /// Their weighted sum: what the gradients are of.
    pub total: f64,
}

/// A block's layers, prepared for one set of weights and one picture size.
struct Prepared {
    expand: Option<Linear>,
    expand_back: Option<Linear>,
    depthwise: Depthwise,
    /// Stride 1 only: the input gradient is the convolution with the kernel turned around.
    depthwise_back: Option<Depthwise>,
    project: Linear,
    project_back: Linear,
}

/// Activations that the backward pass needs; buffers are used again.
#[derive(Default)]
struct Activations {
    input: Vec<f32>,
    expanded: Vec<f32>,
    filtered: Vec<f32>,
    output: Vec<f32>,
}

/// The student on the CPU.
pub struct Engine {
    architecture: Architecture,
    layout: Layout,
    isa: Isa,
    stem_input: Vec<f32>,
    stem_output: Vec<f32>,
    blocks: Vec<Activations>,
    gradient: Vec<f32>,
    next_gradient: Vec<f32>,
    hidden_gradient: Vec<f32>,
    expanded_gradient: Vec<f32>,
    sums: Vec<f32>,
}

impl Engine {
    /// An engine for this architecture with the best kernels of this CPU.
    pub fn new(architecture: &Architecture) -> Self {
        Self {
            layout: architecture.layout(),
            blocks: architecture.blocks.iter().map(|_| Activations::default()).collect(),
            architecture: architecture.clone(),
            isa: Isa::best(),
            stem_input: Vec::new(),
            stem_output: Vec::new(),
            gradient: Vec::new(),
            next_gradient: Vec::new(),
            hidden_gradient: Vec::new(),
            expanded_gradient: Vec::new(),
            sums: Vec::new(),
        }
    }

    /// Losses of a batch, and their gradients added to `gradients` (`[parameters]`). All samples have the same side.
    ///
    /// # Panics
    /// When lengths do not fit the architecture: the caller made them from it.
    pub fn step(&mut self, parameters: &[f32], batch: &[&Sample], mode: &Mode, weighing: &Weighing, gradients: &mut [f32]) -> StepLoss {
        assert_eq!(parameters.len(), self.layout.len, "parameters of the student");
        assert_eq!(gradients.len(), self.layout.len, "gradients of the student");
        let count = self.architecture.blocks.len();
        let mut loss = StepLoss { boundary: vec![0.0; count], total: 0.0 };
        let Some(side) = batch.first().map(|s| s.side) else { return loss };
        let prepared = self.prepare(parameters, side);
        let stem = self.stem_layer(parameters);
        let seen: Vec<usize> = (0..count)
            .map(|b| match mode {
                Mode::EndToEnd => batch.len(),
                Mode::Blockwise(share) => ((batch.len() as f32 * share[b]).ceil() as usize).clamp(1, batch.len()),
            })
            .collect();
        for (index, sample) in batch.iter().enumerate() {
            assert_eq!(sample.side, side, "all pictures of a batch have the same side");
            match mode {
                Mode::EndToEnd => {
                    self.forward_stem(&stem, sample);
                    for (b, layers) in prepared.iter().enumerate() {
                        self.take_input(b, None, side);
                        self.forward_block(b, layers);
                    }
                    self.gradient.clear();
                    for (b, layers) in prepared.iter().enumerate().rev() {
                        loss.boundary[b] += self.add_loss(b, &sample.targets[b], weighing, batch.len());
                        self.backward_block(b, layers, parameters, gradients, true);
                        std::mem::swap(&mut self.gradient, &mut self.next_gradient);
                    }
                    self.backward_stem(side, gradients);
                }
                Mode::Blockwise(_) => {
                    for (b, layers) in prepared.iter().enumerate().filter(|(b, _)| index < seen[*b]) {
                        if b == 0 {
                            self.forward_stem(&stem, sample);
                            self.take_input(0, None, side);
                        } else {
                            self.take_input(b, Some(&sample.targets[b - 1]), side);
                        }
                        self.forward_block(b, layers);
                        self.gradient.clear();
                        loss.boundary[b] += self.add_loss(b, &sample.targets[b], weighing, seen[b]);
                        self.backward_block(b, layers, parameters, gradients, b == 0);
                        if b == 0 {
                            std::mem::swap(&mut self.gradient, &mut self.next_gradient);
                            self.backward_stem(side, gradients);
                        }
                    }
                }
            }
        }
        loss.total = loss.boundary.iter().zip(&weighing.boundary).map(|(l, w)| l * f64::from(*w)).sum();
        loss
    }

    /// The student's own boundaries for one picture, end to end, in the layout of [`Sample::targets`].
    pub fn boundaries(&mut self, parameters: &[f32], image: &[f32], side: usize) -> Vec<Vec<f32>> {
        let prepared = self.prepare(parameters, side);
        let stem = self.stem_layer(parameters);
        self.forward_stem(&stem, &Sample { side, image: image.to_vec(), targets: Vec::new() });
        for (b, layers) in prepared.iter().enumerate() {
            self.take_input(b, None, side);
            self.forward_block(b, layers);
        }
        self.blocks.iter().map(|a| a.output.clone()).collect()
    }

    fn stem_layer(&self, parameters: &[f32]) -> Linear {
        let l = &self.layout;
        let taps = STEM_KERNEL * STEM_KERNEL * RGB;
        Linear::new(
            &parameters[l.stem.clone()],
            &parameters[l.stem_bias.clone()],
            taps,
            self.architecture.stem,
            Activation::Relu6,
            self.isa,
        )
    }

    fn prepare(&self, parameters: &[f32], side: usize) -> Vec<Prepared> {
        let mut at = side / STEM_STRIDE;
        self.architecture
            .blocks
            .iter()
            .zip(&self.layout.blocks)
            .map(|(b, l)| {
                let to = at / b.stride;
                let window = Window {
                    channels: b.hidden,
                    input: [at; 2],
                    output: [to; 2],
                    kernel: [b.kernel; 2],
                    stride: [b.stride; 2],
                    pad: [b.pad; 2],
                };
                at = to;
                let (expand, project) = (&parameters[l.expand.clone()], &parameters[l.project.clone()]);
                let zero = |n: usize| vec![0.0; n];
                let depthwise = channels_first(&parameters[l.depthwise.clone()], b.hidden);
                let turned: Vec<f32> = depthwise.chunks_exact(b.kernel * b.kernel).flat_map(|k| k.iter().rev().copied()).collect();
                let back = Window { pad: [b.kernel - 1 - b.pad; 2], ..window };
                Prepared {
                    expand: b
                        .expand
                        .then(|| Linear::new(expand, &parameters[l.expand_bias.clone()], b.inputs, b.hidden, Activation::Relu6, self.isa)),
                    expand_back: b.expand.then(|| {
                        let turned = transposed(expand, b.inputs, b.hidden);
                        Linear::new(&turned, &zero(b.inputs), b.hidden, b.inputs, Activation::None, self.isa)
                    }),
                    depthwise: Depthwise::new(&depthwise, &parameters[l.depthwise_bias.clone()], window, Activation::Relu6, self.isa),
                    depthwise_back: (b.stride == 1).then(|| Depthwise::new(&turned, &zero(b.hidden), back, Activation::None, self.isa)),
                    project: Linear::new(
                        &transposed(project, b.outputs, b.hidden),
                        &parameters[l.project_bias.clone()],
                        b.hidden,
                        b.outputs,
                        Activation::None,
                        self.isa,
                    ),
                    project_back: Linear::new(project, &zero(b.hidden), b.outputs, b.hidden, Activation::None, self.isa),
                }
            })
            .collect()
    }

    /// Input of block `b`: the teacher's, or what stem or block before made.
    fn take_input(&mut self, b: usize, teacher: Option<&[f32]>, side: usize) {
        let mut input = std::mem::take(&mut self.blocks[b].input);
        input.clear();
        match (teacher, b) {
            (Some(teacher), _) => input.extend_from_slice(teacher),
            (None, 0) => input.extend_from_slice(&self.stem_output),
            (None, _) => input.extend_from_slice(&self.blocks[b - 1].output),
        }
        let stride = self.architecture.stride_after(b) / self.architecture.blocks[b].stride;
        assert_eq!(input.len(), (side / stride).pow(2) * self.architecture.blocks[b].inputs, "input of block {b}");
        self.blocks[b].input = input;
    }

    fn forward_stem(&mut self, stem: &Linear, sample: &Sample) {
        let side = sample.side;
        let padded = side + STEM_KERNEL - STEM_STRIDE;
        let (row, channels, to) = (padded * RGB, self.architecture.stem, side / STEM_STRIDE);
        self.stem_input.clear();
        self.stem_input.resize(padded * row, 0.0);
        for (to, from) in self.stem_input.chunks_exact_mut(row).zip(sample.image.chunks_exact(side * RGB)) {
            to[..side * RGB].copy_from_slice(from);
        }
        self.stem_output.resize(to * to * channels, 0.0);
        let taps: Vec<usize> = (0..STEM_KERNEL).flat_map(|y| (0..STEM_KERNEL * RGB).map(move |x| y * row + x)).collect();
        for (y, out) in self.stem_output.chunks_exact_mut(to * channels).enumerate() {
            stem.run_scattered(&self.stem_input[y * STEM_STRIDE * row..], &taps, STEM_STRIDE * RGB, out);
        }
    }

    /// From `gradient` at the stem's output.
    fn backward_stem(&mut self, side: usize, gradients: &mut [f32]) {
        let (row, channels, to) = ((side + STEM_KERNEL - STEM_STRIDE) * RGB, self.architecture.stem, side / STEM_STRIDE);
        mask_relu6(&mut self.gradient, &self.stem_output);
        add_columns(&self.gradient, channels, &mut gradients[self.layout.stem_bias.clone()]);
        let into = &mut gradients[self.layout.stem.clone()];
        let zero = vec![0.0; channels];
        let wide = STEM_KERNEL * RGB;
        self.sums.resize(wide * channels, 0.0);
        let rows_at_once = (PIXELS_AT_ONCE / to).max(1);
        for (block, gradient) in self.gradient.chunks(rows_at_once * to * channels).enumerate() {
            let pixels = gradient.len() / channels;
            let packed = Linear::new(gradient, &zero, pixels, channels, Activation::None, self.isa);
            for ky in 0..STEM_KERNEL {
                let places: Vec<usize> = (0..pixels)
                    .map(|p| ((block * rows_at_once + p / to) * STEM_STRIDE + ky) * row + (p % to) * STEM_STRIDE * RGB)
                    .collect();
                packed.run_scattered(&self.stem_input, &places, 1, &mut self.sums);
                add(&mut into[ky * wide * channels..(ky + 1) * wide * channels], &self.sums);
            }
        }
    }

    fn forward_block(&mut self, b: usize, layers: &Prepared) {
        let block = &self.architecture.blocks[b];
        let a = &mut self.blocks[b];
        let pixels = a.input.len() / block.inputs;
        if let Some(expand) = &layers.expand {
            a.expanded.resize(pixels * block.hidden, 0.0);
            expand.run(&a.input, None, &mut a.expanded);
        }
        let after = pixels / (block.stride * block.stride);
        a.filtered.resize(after * block.hidden, 0.0);
        layers.depthwise.run(if block.expand { &a.expanded } else { &a.input }, &mut a.filtered);
        a.output.resize(after * block.outputs, 0.0);
        layers.project.run(&a.filtered, block.residual.then_some(a.input.as_slice()), &mut a.output);
    }

    /// Adds this boundary's loss gradient to `gradient` (empty: starts it). Returns the squared error as a share of the variance, over `samples`.
    fn add_loss(&mut self, b: usize, target: &[f32], weighing: &Weighing, samples: usize) -> f64 {
        let output = &self.blocks[b].output;
        assert_eq!(output.len(), target.len(), "target of block {b}");
        self.gradient.resize(output.len(), 0.0);
        let per = 1.0 / (output.len() * samples) as f64;
        let factor = (2.0 * f64::from(weighing.boundary[b]) * per) as f32;
        let channels = &weighing.channel[b];
        let mut sum = 0.0;
        for ((g, o), t) in
            self.gradient.chunks_exact_mut(channels.len()).zip(output.chunks_exact(channels.len())).zip(target.chunks_exact(channels.len()))
        {
            let mut row = 0.0;
            for (((g, o), t), w) in g.iter_mut().zip(o).zip(t).zip(channels) {
                let d = o - t;
                row += d * d * w;
                *g += factor * d * w;
            }
            sum += f64::from(row);
        }
        sum * per
    }

    /// From `gradient` at the block's output: weight gradients, and `next_gradient` at its input where `further`.
    fn backward_block(&mut self, b: usize, layers: &Prepared, parameters: &[f32], gradients: &mut [f32], further: bool) {
        let block = self.architecture.blocks[b].clone();
        let l = self.layout.blocks[b].clone();
        let a = &self.blocks[b];
        let hidden = block.hidden;
        add_columns(&self.gradient, block.outputs, &mut gradients[l.project_bias.clone()]);
        outer(&self.gradient, block.outputs, &a.filtered, hidden, self.isa, &mut self.sums, &mut gradients[l.project.clone()]);
        self.hidden_gradient.resize(a.filtered.len(), 0.0);
        layers.project_back.run(&self.gradient, None, &mut self.hidden_gradient);
        mask_relu6(&mut self.hidden_gradient, &a.filtered);
        add_columns(&self.hidden_gradient, hidden, &mut gradients[l.depthwise_bias.clone()]);
        let from = if block.expand { &a.expanded } else { &a.input };
        let side = ((from.len() / hidden) as f64).sqrt() as usize;
        let filter = filter_of(&block);
        depthwise_weight_gradient(filter, [side; 2], from, &self.hidden_gradient, &mut gradients[l.depthwise.clone()]);
        if !block.expand && !further {
            return;
        }
        self.expanded_gradient.resize(from.len(), 0.0);
        match &layers.depthwise_back {
            Some(back) => back.run(&self.hidden_gradient, &mut self.expanded_gradient),
            None => depthwise_input_gradient(
                filter,
                [side; 2],
                &parameters[l.depthwise.clone()],
                &self.hidden_gradient,
                &mut self.expanded_gradient,
            ),
        }
        match &layers.expand_back {
            None => std::mem::swap(&mut self.next_gradient, &mut self.expanded_gradient),
            Some(back) => {
                mask_relu6(&mut self.expanded_gradient, &a.expanded);
                add_columns(&self.expanded_gradient, hidden, &mut gradients[l.expand_bias.clone()]);
                outer(&a.input, block.inputs, &self.expanded_gradient, hidden, self.isa, &mut self.sums, &mut gradients[l.expand.clone()]);
                if further {
                    self.next_gradient.resize(a.input.len(), 0.0);
                    back.run(&self.expanded_gradient, block.residual.then_some(self.gradient.as_slice()), &mut self.next_gradient);
                }
            }
        }
    }
}

fn filter_of(block: &Block) -> Filter {
    Filter { channels: block.hidden, kernel: block.kernel, stride: block.stride, pad: block.pad }
}
