//! Forward and backward pass of the detector on the CPU, on the inspector's own kernels; one picture at a time, so that a layer's values stay in the
//! cache. [`super::reference`] computes the same with burn's autodiff: it is the oracle of the tests.

use super::network::{Network, Node, Op};
use crate::conv::{
    Filter, PIXELS_AT_ONCE, add, add_columns, channels_first, depthwise_input_gradient, depthwise_weight_gradient, mask_relu6, outer,
    transposed,
};
use crate::distill::student::{RGB, STEM_KERNEL, STEM_STRIDE};
use cull::kernels::depthwise::{Depthwise, Window};
use cull::kernels::isa::Isa;
use cull::kernels::linear::{Activation, Linear};

/// A network's layers with one set of weights, made ready for the kernels; shared by all threads of a step.
pub struct Prepared {
    layers: Vec<Layer>,
    isa: Isa,
}

enum Layer {
    /// Computed without weights, or with the parameters as they are.
    Plain,
    Linear {
        forward: Linear,
        back: Option<Linear>,
    },
    Depthwise {
        forward: Depthwise,
        back: Option<Depthwise>,
        filter: Filter,
    },
}

impl Prepared {
    /// Layers of `network` with `parameters`; gradients can then be asked for from layer `first` on (the length of the list: for none).
    pub fn new(network: &Network, parameters: &[f32], first: usize) -> Self {
        let isa = Isa::best();
        let layers = network
            .nodes
            .iter()
            .enumerate()
            .map(|(i, node)| {
                let (weight, bias) = (&parameters[node.weight.clone()], &parameters[node.bias.clone()]);
                let from = node.inputs.first().and_then(|n| network.nodes.get(*n));
                let [height, width, channels] = from.map_or([0; 3], |n| n.shape);
                let outputs = node.shape[2];
                let activation = |relu6: bool| if relu6 { Activation::Relu6 } else { Activation::None };
                match node.op {
                    Op::Stem => Layer::Linear {
                        forward: Linear::new(weight, bias, STEM_KERNEL * STEM_KERNEL * RGB, outputs, Activation::Relu6, isa),
                        back: None,
                    },
                    Op::Pointwise { relu6 } => Layer::Linear {
                        forward: Linear::new(weight, bias, channels, outputs, activation(relu6), isa),
                        back: (i >= first).then(|| {
                            Linear::new(
                                &transposed(weight, channels, outputs),
                                &vec![0.0; channels],
                                outputs,
                                channels,
                                Activation::None,
                                isa,
                            )
                        }),
                    },
                    Op::Depthwise { kernel, stride, pad } => {
                        let filter = Filter { channels, kernel, stride, pad };
                        let window = Window {
                            channels,
                            input: [height, width],
                            output: [height / stride, width / stride],
                            kernel: [kernel; 2],
                            stride: [stride; 2],
                            pad: [pad; 2],
                        };
                        let own = channels_first(weight, channels);
                        // With stride 1 the input gradient is the convolution with the kernel turned around.
                        let back = (i >= first && stride == 1).then(|| {
                            let turned: Vec<f32> = own.chunks_exact(kernel * kernel).flat_map(|k| k.iter().rev().copied()).collect();
                            let window = Window { pad: [kernel - 1 - pad; 2], ..window };
                            Depthwise::new(&turned, &vec![0.0; channels], window, Activation::None, isa)
                        });
                        Layer::Depthwise { forward: Depthwise::new(&own, bias, window, Activation::Relu6, isa), back, filter }
                    }
                    // One row times a matrix that is used once a picture: reading it in its own order is as fast as packing it.
                    Op::Dense { .. } | Op::Image | Op::MaxPool | Op::Up | Op::Add => Layer::Plain,
                }
            })
            .collect();
        Self { layers, isa }
    }
}

/// The buffers of one thread.
pub struct Engine<'a> {
    network: &'a Network,
    outputs: Vec<Vec<f32>>,
    gradients: Vec<Vec<f32>>,
    padded: Vec<f32>,
    sums: Vec<f32>,
    spare: Vec<f32>,
}

impl<'a> Engine<'a> {
    /// Buffers for `network`.
    pub fn new(network: &'a Network) -> Self {
        Self {
            outputs: network.nodes.iter().map(|n| vec![0.0; n.len()]).collect(),
            gradients: vec![Vec::new(); network.nodes.len()],
            network,
            padded: Vec::new(),
            sums: Vec::new(),
            spare: Vec::new(),
        }
    }

    /// What layer `node` made of the last picture.
    pub fn output(&self, node: usize) -> &[f32] {
        self.outputs.get(node).map_or(&[], Vec::as_slice)
    }

    /// Log odds of a defect in each cell of `image` (`[height, width, 3]`, normalised as the trunk wants it), `[rows, columns]`.
    ///
    /// # Panics
    /// When lengths do not fit the network: the caller made them from it.
    pub fn forward(&mut self, parameters: &[f32], prepared: &Prepared, image: &[f32]) -> &[f32] {
        for (i, (node, layer)) in self.network.nodes.iter().zip(&prepared.layers).enumerate() {
            let mut out = std::mem::take(&mut self.outputs[i]);
            let input = |k: usize| node.inputs.get(k).map(|n| self.outputs[*n].as_slice());
            let from = input(0).unwrap_or_default();
            match (node.op, layer) {
                (Op::Image, _) => out.copy_from_slice(image),
                (Op::Stem, Layer::Linear { forward, .. }) => stem(forward, node, from, &mut self.padded, &mut out),
                (_, Layer::Linear { forward, .. }) => forward.run(from, input(1), &mut out),
                (_, Layer::Depthwise { forward, .. }) => forward.run(from, &mut out),
                (Op::MaxPool, _) => max_pool(node, from, &mut out),
                (Op::Up, _) => up(node, from, &mut out),
                (Op::Add, _) => {
                    out.copy_from_slice(from);
                    add(&mut out, input(1).unwrap_or_default());
                }
                (Op::Dense { relu6 }, _) => dense(&parameters[node.weight.clone()], &parameters[node.bias.clone()], relu6, from, &mut out),
                (Op::Stem | Op::Pointwise { .. } | Op::Depthwise { .. }, Layer::Plain) => unreachable!("a layer without its kernel"),
            }
            self.outputs[i] = out;
        }
        self.outputs.last().map_or(&[], Vec::as_slice)
    }

    /// From the loss gradient at the log odds of the picture that [`Engine::forward`] saw last: the gradients of the parameters of layers `first` and
    /// later, added to `into`.
    ///
    /// # Panics
    /// When lengths do not fit, or `prepared` was made for a later `first`.
    pub fn backward(&mut self, parameters: &[f32], prepared: &Prepared, gradient: &[f32], first: usize, into: &mut [f32]) {
        let nodes = &self.network.nodes;
        for g in &mut self.gradients {
            g.clear();
        }
        if let Some(last) = self.gradients.last_mut() {
            last.extend_from_slice(gradient);
        }
        for i in (first..nodes.len()).rev() {
            let (Some(node), Some(layer)) = (nodes.get(i), prepared.layers.get(i)) else { continue };
            let mut g = std::mem::take(&mut self.gradients[i]);
            if g.is_empty() {
                continue;
            }
            if matches!(node.op, Op::Stem | Op::Depthwise { .. } | Op::Pointwise { relu6: true } | Op::Dense { relu6: true }) {
                mask_relu6(&mut g, &self.outputs[i]);
            }
            let Some(&source) = node.inputs.first() else { continue };
            let from = self.outputs[source].as_slice();
            let [height, width, channels] = nodes[source].shape;
            let further = source >= first;
            if !node.bias.is_empty() {
                add_columns(&g, node.bias.len(), &mut into[node.bias.clone()]);
            }
            let weight_gradient = &mut into[node.weight.clone()];
            let mut back = std::mem::take(&mut self.spare);
            back.resize(from.len(), 0.0);
            match (node.op, layer) {
                (Op::Stem, _) => stem_weight_gradient(node, &self.padded, &g, prepared.isa, &mut self.sums, weight_gradient),
                (Op::Pointwise { .. }, Layer::Linear { back: turned, .. }) => {
                    outer(from, channels, &g, node.shape[2], prepared.isa, &mut self.sums, weight_gradient);
                    if let (true, Some(turned)) = (further, turned) {
                        turned.run(&g, None, &mut back);
                    }
                    if let Some(&second) = node.inputs.get(1).filter(|n| **n >= first) {
                        accumulate(&mut self.gradients[second], &g);
                    }
                }
                (_, Layer::Depthwise { back: turned, filter, .. }) => {
                    depthwise_weight_gradient(*filter, [height, width], from, &g, weight_gradient);
                    match turned {
                        Some(turned) if further => turned.run(&g, &mut back),
                        _ if further => depthwise_input_gradient(*filter, [height, width], &parameters[node.weight.clone()], &g, &mut back),
                        _ => {}
                    }
                }
                (Op::MaxPool, _) => max_pool_back(node, from, &self.outputs[i], &g, &mut back),
                (Op::Up, _) => up_back(node, &g, &mut back),
                (Op::Add, _) => {
                    back.copy_from_slice(&g);
                    if let Some(&second) = node.inputs.get(1).filter(|n| **n >= first) {
                        accumulate(&mut self.gradients[second], &g);
                    }
                }
                (Op::Dense { .. }, _) => dense_back(&parameters[node.weight.clone()], from, &g, weight_gradient, &mut back),
                (Op::Image | Op::Pointwise { .. } | Op::Depthwise { .. }, _) => unreachable!("a layer without its kernel"),
            }
            if further {
                accumulate(&mut self.gradients[source], &back);
            }
            self.spare = back;
            g.clear();
            self.gradients[i] = g;
        }
    }
}

fn accumulate(into: &mut Vec<f32>, from: &[f32]) {
    if into.is_empty() {
        into.extend_from_slice(from);
    } else {
        add(into, from);
    }
}

/// Zeros below and to the right, so that every window lies inside.
fn stem(layer: &Linear, node: &Node, image: &[f32], padded: &mut Vec<f32>, out: &mut [f32]) {
    let [rows, columns, channels] = node.shape;
    let extra = STEM_KERNEL - STEM_STRIDE;
    let (wide, row) = (columns * STEM_STRIDE * RGB, (columns * STEM_STRIDE + extra) * RGB);
    padded.clear();
    padded.resize((rows * STEM_STRIDE + extra) * row, 0.0);
    for (to, from) in padded.chunks_exact_mut(row).zip(image.chunks_exact(wide)) {
        to[..wide].copy_from_slice(from);
    }
    let taps: Vec<usize> = (0..STEM_KERNEL).flat_map(|y| (0..STEM_KERNEL * RGB).map(move |x| y * row + x)).collect();
    for (y, out) in out.chunks_exact_mut(columns * channels).enumerate() {
        layer.run_scattered(&padded[y * STEM_STRIDE * row..], &taps, STEM_STRIDE * RGB, out);
    }
}

fn stem_weight_gradient(node: &Node, padded: &[f32], gradient: &[f32], isa: Isa, sums: &mut Vec<f32>, into: &mut [f32]) {
    let [_, columns, channels] = node.shape;
    let row = (columns * STEM_STRIDE + STEM_KERNEL - STEM_STRIDE) * RGB;
    let wide = STEM_KERNEL * RGB;
    let zero = vec![0.0; channels];
    sums.resize(wide * channels, 0.0);
    let rows_at_once = (PIXELS_AT_ONCE / columns.max(1)).max(1);
    for (block, gradient) in gradient.chunks(rows_at_once * columns * channels).enumerate() {
        let pixels = gradient.len() / channels;
        let packed = Linear::new(gradient, &zero, pixels, channels, Activation::None, isa);
        for ky in 0..STEM_KERNEL {
            let places: Vec<usize> = (0..pixels)
                .map(|p| ((block * rows_at_once + p / columns) * STEM_STRIDE + ky) * row + (p % columns) * STEM_STRIDE * RGB)
                .collect();
            packed.run_scattered(padded, &places, 1, &mut sums[..wide * channels]);
            add(&mut into[ky * wide * channels..(ky + 1) * wide * channels], &sums[..wide * channels]);
        }
    }
}

fn dense(weight: &[f32], bias: &[f32], relu6: bool, from: &[f32], out: &mut [f32]) {
    out.copy_from_slice(bias);
    for (x, row) in from.iter().zip(weight.chunks_exact(bias.len().max(1))) {
        if *x != 0.0 {
            for (o, w) in out.iter_mut().zip(row) {
                *o += x * w;
            }
        }
    }
    if relu6 {
        out.iter_mut().for_each(|o| *o = Activation::Relu6.apply(*o));
    }
}

fn dense_back(weight: &[f32], from: &[f32], gradient: &[f32], into: &mut [f32], back: &mut [f32]) {
    let columns = gradient.len().max(1);
    for (((x, row), sum), b) in from.iter().zip(weight.chunks_exact(columns)).zip(into.chunks_exact_mut(columns)).zip(back) {
        if *x != 0.0 {
            for (s, g) in sum.iter_mut().zip(gradient) {
                *s += x * g;
            }
        }
        // Sixteen sums side by side: one after the other would wait for each addition.
        let mut sums = [0.0f32; 16];
        let (heads, tails) = (row.as_chunks::<16>(), gradient.as_chunks::<16>());
        for (w, g) in heads.0.iter().zip(tails.0) {
            for ((s, w), g) in sums.iter_mut().zip(w).zip(g) {
                *s += w * g;
            }
        }
        *b = sums.iter().sum::<f32>() + heads.1.iter().zip(tails.1).map(|(w, g)| w * g).sum::<f32>();
    }
}

/// The four inputs of output pixel (`y`, `x`), as places of their first channel.
fn window([_, columns, channels]: [usize; 3], y: usize, x: usize) -> [usize; 4] {
    let at = |dy: usize, dx: usize| ((2 * y + dy) * 2 * columns + 2 * x + dx) * channels;
    [at(0, 0), at(0, 1), at(1, 0), at(1, 1)]
}

fn max_pool(node: &Node, from: &[f32], out: &mut [f32]) {
    let [_, columns, channels] = node.shape;
    for (i, out) in out.chunks_exact_mut(channels).enumerate() {
        let [a, b, c, d] = window(node.shape, i / columns, i % columns).map(|at| &from[at..at + channels]);
        for ((((o, a), b), c), d) in out.iter_mut().zip(a).zip(b).zip(c).zip(d) {
            *o = a.max(*b).max(c.max(*d));
        }
    }
}

/// The first of equals takes the gradient.
fn max_pool_back(node: &Node, from: &[f32], made: &[f32], gradient: &[f32], back: &mut [f32]) {
    let [_, columns, channels] = node.shape;
    back.fill(0.0);
    for (i, (made, gradient)) in made.chunks_exact(channels).zip(gradient.chunks_exact(channels)).enumerate() {
        let places = window(node.shape, i / columns, i % columns);
        for (c, (made, g)) in made.iter().zip(gradient).enumerate() {
            if let Some(at) = places.iter().find(|at| from[**at + c] == *made) {
                back[at + c] += g;
            }
        }
    }
}

/// For each of `2 * size` outputs along an axis: the nearer input, the farther one, clamped at the ends. They count three quarters and one.
fn up_taps(size: usize) -> Vec<(usize, usize)> {
    (0..2 * size).map(|o| if o % 2 == 0 { (o / 2, (o / 2).saturating_sub(1)) } else { (o / 2, (o / 2 + 1).min(size - 1)) }).collect()
}

fn up(node: &Node, from: &[f32], out: &mut [f32]) {
    let [rows, columns, channels] = node.shape;
    let (ys, xs) = (up_taps(rows / 2), up_taps(columns / 2));
    let at = |y: usize, x: usize| &from[(y * (columns / 2) + x) * channels..][..channels];
    for (i, out) in out.chunks_exact_mut(channels).enumerate() {
        let ((y, y2), (x, x2)) = (ys[i / columns], xs[i % columns]);
        let (a, b, c, d) = (at(y, x), at(y, x2), at(y2, x), at(y2, x2));
        for ((((o, a), b), c), d) in out.iter_mut().zip(a).zip(b).zip(c).zip(d) {
            *o = 0.75 * (0.75 * a + 0.25 * b) + 0.25 * (0.75 * c + 0.25 * d);
        }
    }
}

fn up_back(node: &Node, gradient: &[f32], back: &mut [f32]) {
    let [rows, columns, channels] = node.shape;
    let (ys, xs) = (up_taps(rows / 2), up_taps(columns / 2));
    back.fill(0.0);
    for (i, g) in gradient.chunks_exact(channels).enumerate() {
        let ((y, y2), (x, x2)) = (ys[i / columns], xs[i % columns]);
        for (y, x, share) in [(y, x, 0.5625), (y, x2, 0.1875), (y2, x, 0.1875), (y2, x2, 0.0625)] {
            for (b, g) in back[(y * (columns / 2) + x) * channels..][..channels].iter_mut().zip(g) {
                *b += share * g;
            }
        }
    }
}
