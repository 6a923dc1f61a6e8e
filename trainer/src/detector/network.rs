//! The detector as a list of layers: the distilled trunk, and a head that says for each cell of 8 x 8 input pixels whether it is defective.
//!
//! The head brings the trunk's four stages together at stride 8. Beside them it is given what it should expect to see: a few latent numbers of the
//! whole picture (which product, and how it lies) are decoded to a map of the same grid, a learned query embedding (UniAD, section 3.2) that moves
//! with the part. Inverted residuals with 5x5 filters compare the two. Everything is ReLU6 and linear: the int8 kernels of the inspector run it.

use crate::distill::student::{Architecture, RGB, STEM_KERNEL, STEM_STRIDE};
use crate::distill::synth::normal;
use crate::distill::teacher::chain;
use crate::onnx::OnnxError;
use prost::Message;
use rand::SeedableRng;
use std::ops::Range;
use tract_onnx::pb;

/// Input pixels along a side of one cell of the map.
pub const STRIDE: usize = 8;
/// The input's sides are multiples of this: the trunk's last stage.
pub const INPUT_MULTIPLE: usize = 16;
/// Channels of the head at stride 8.
const WIDTH: usize = 64;
/// Hidden channels of its inverted residuals.
const HIDDEN: usize = 128;
/// Inverted residuals at stride 8.
const BLOCKS: usize = 3;
/// Channels of the head at stride 4.
const FINE: usize = 32;
/// Hidden channels of the head's filters at stride 4 and on the way to 8.
const FINE_HIDDEN: usize = 96;
/// Hidden channels of the head's filter at stride 2.
const SHARP_HIDDEN: usize = 32;
/// Channels of the last stage that the latent numbers are read from.
const SUMMARY: usize = 16;
/// Latent numbers of a picture.
const LATENTS: usize = 48;
/// Channels of the expected map: so many of what is seen are compared with what is expected there, the others are left as they are.
const EXPECTED: usize = 32;
/// Latent numbers start at this mean, in deviations, over good parts: nearly all of them lie between the ends of ReLU6.
const LATENT_MEAN: f32 = 2.0;
/// The latents and what they are read from move this much slower than the rest of the head: thousands of inputs that change together move a latent by
/// thousands of steps, and one that has left the range of ReLU6 never comes back (with the full rate all of them did within a few hundred steps).
const LATENT_RATE: f64 = 0.01;
/// See [`LATENT_RATE`].
const SUMMARY_RATE: f64 = 0.05;
/// The map expected is a sum over all latents, and right from the start: what little each picture says of it must not be drowned in Adam's equal steps.
const EXPECTED_RATE: f64 = 0.1;
/// Rounds of subspace iteration for the latents' principal components.
const ROUNDS: usize = 40;
/// Log odds of a defect in a cell that the untrained head gives.
const PRIOR: f32 = -4.0;
/// Spread of weights that the learning rate is meant for, as in distillation.
const TYPICAL_WEIGHT: f64 = 0.1;
/// The trunk is good already: it moves this much slower than the head.
const TRUNK_RATE: f64 = 0.4;

/// Blocks of the trunk that are never trained: up to stride 4, where a picture costs most and edges are edges.
const FROZEN_BLOCKS: usize = 3;

/// What a layer computes. Pictures are channels-last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// The input, `[height, width, 3]`.
    Image,
    /// 3x3 convolution of stride 2, padded below and to the right, ReLU6. Weight `[3, 3, 3, outputs]`.
    Stem,
    /// 1x1 convolution; a second input is added to its output. Weight `[inputs, outputs]`.
    Pointwise {
        /// Whether ReLU6 follows (never with a second input).
        relu6: bool,
    },
    /// Depthwise convolution, ReLU6. Weight `[kernel, kernel, channels]`.
    Depthwise {
        /// Side of the kernel.
        kernel: usize,
        /// Stride.
        stride: usize,
        /// Zero padding above and to the left.
        pad: usize,
    },
    /// Maximum over 2x2, stride 2.
    MaxPool,
    /// Twice the size, bilinear (half-pixel centres).
    Up,
    /// Sum of two maps.
    Add,
    /// Linear layer over the whole map. Weight `[inputs, outputs]`.
    Dense {
        /// Whether ReLU6 follows.
        relu6: bool,
    },
}

/// One layer.
#[derive(Clone, Debug)]
pub struct Node {
    /// What it is for: `trunk.3.expand`, `head.latents`. Files name its weights by it.
    pub name: String,
    /// What it computes.
    pub op: Op,
    /// Layers it reads; all of them before it in the list.
    pub inputs: Vec<usize>,
    /// Height, width, channels of what it makes.
    pub shape: [usize; 3],
    /// Its weight in the flat list of parameters.
    pub weight: Range<usize>,
    /// Its bias.
    pub bias: Range<usize>,
}

impl Node {
    /// Values it makes.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it ends a residual branch.
    fn is_branch_end(&self) -> bool {
        self.inputs.len() == 2 && self.name.ends_with(".project")
    }

    /// Never: every layer makes something.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Sums over good parts: what is seen, beside the latents.
#[derive(Clone, Debug, Default)]
pub struct SeenWithLatents {
    parts: usize,
    /// Each latent.
    latents: Vec<f64>,
    /// Its square.
    squares: Vec<f64>,
    /// The channels of what is seen that are compared, `[rows, columns, channels]`.
    map: Vec<f64>,
    /// Their products with each latent, `[latents, rows, columns, channels]`.
    products: Vec<f64>,
}

impl SeenWithLatents {
    /// One more part: its latents, and what is seen of it (`[rows, columns, channels]`, all channels of the head).
    pub fn add(&mut self, latents: &[f32], seen: &[f32]) {
        let compared: Vec<f64> = seen.chunks_exact(WIDTH).flat_map(|row| row.iter().take(EXPECTED)).map(|v| f64::from(*v)).collect();
        self.parts += 1;
        for list in [&mut self.latents, &mut self.squares] {
            list.resize(latents.len(), 0.0);
        }
        self.map.resize(compared.len(), 0.0);
        self.products.resize(latents.len() * compared.len(), 0.0);
        self.map.iter_mut().zip(&compared).for_each(|(s, v)| *s += v);
        let sums = self.latents.iter_mut().zip(&mut self.squares).zip(self.products.chunks_exact_mut(compared.len().max(1)));
        for (latent, ((sum, square), products)) in latents.iter().map(|l| f64::from(*l)).zip(sums) {
            *sum += latent;
            *square += latent * latent;
            products.iter_mut().zip(&compared).for_each(|(p, v)| *p += latent * v);
        }
    }
}

/// The whole detector.
#[derive(Clone, Debug)]
pub struct Network {
    /// Layers in order; the last one makes the log odds, `[rows, columns, 1]`.
    pub nodes: Vec<Node>,
    /// Layers from here on are trained.
    pub thawed: usize,
    /// Layers from here on are the head.
    pub head: usize,
    /// Parameters in all.
    pub parameters: usize,
    /// Stage outputs of the trunk, shallow to deep, and the head's layers that read them.
    pub taps: Vec<(usize, Vec<usize>)>,
    /// The layers that know what to expect.
    pub expectation: Expectation,
}

/// The layers that know what to expect, as places in the list.
#[derive(Clone, Copy, Debug)]
pub struct Expectation {
    /// What the latents are read from.
    pub summary: usize,
    /// The latent numbers of the picture.
    pub latents: usize,
    /// The map expected.
    pub expected: usize,
    /// What is seen.
    pub seen: usize,
    /// The two brought together.
    pub compared: usize,
}

struct Builder {
    nodes: Vec<Node>,
    parameters: usize,
    /// Where in the network the next layers are.
    place: String,
}

impl Builder {
    fn push(&mut self, name: &str, op: Op, inputs: &[usize], shape: [usize; 3], weight: usize, bias: usize) -> usize {
        let at = self.parameters;
        self.parameters += weight + bias;
        let name = format!("{}.{name}", self.place);
        self.nodes.push(Node { name, op, inputs: inputs.to_vec(), shape, weight: at..at + weight, bias: at + weight..at + weight + bias });
        self.nodes.len() - 1
    }

    fn pointwise(&mut self, name: &str, from: usize, outputs: usize, relu6: bool, plus: Option<usize>) -> usize {
        let [h, w, c] = self.nodes[from].shape;
        let inputs: Vec<usize> = std::iter::once(from).chain(plus).collect();
        self.push(name, Op::Pointwise { relu6 }, &inputs, [h, w, outputs], c * outputs, outputs)
    }

    fn depthwise(&mut self, name: &str, from: usize, kernel: usize, stride: usize, pad: usize) -> usize {
        let [h, w, c] = self.nodes[from].shape;
        self.push(name, Op::Depthwise { kernel, stride, pad }, &[from], [h / stride, w / stride, c], kernel * kernel * c, c)
    }

    fn dense(&mut self, name: &str, from: usize, shape: [usize; 3], relu6: bool) -> usize {
        let (inputs, outputs) = (self.nodes[from].len(), shape.iter().product::<usize>());
        self.push(name, Op::Dense { relu6 }, &[from], shape, inputs * outputs, outputs)
    }

    fn inverted_residual(&mut self, name: &str, from: usize, hidden: usize, outputs: usize, stride: usize) -> usize {
        let expanded = self.pointwise(&format!("{name}.expand"), from, hidden, true, None);
        let filtered = self.depthwise(&format!("{name}.filter"), expanded, 5, stride, (5 - stride) / 2);
        let same = stride == 1 && self.nodes[from].shape[2] == outputs;
        self.pointwise(&format!("{name}.project"), filtered, outputs, false, same.then_some(from))
    }
}

impl Network {
    /// The detector on this trunk for pictures of `size` (height, width; multiples of [`INPUT_MULTIPLE`]).
    ///
    /// # Panics
    /// When the trunk has no stages at strides 2, 4, 8 and 16: [`trunk`] has looked.
    pub fn new(trunk: &Architecture, size: [usize; 2]) -> Self {
        let mut b = Builder { nodes: Vec::new(), parameters: 0, place: "trunk".into() };
        let image = b.push("image", Op::Image, &[], [size[0], size[1], RGB], 0, 0);
        let halved = [size[0] / STEM_STRIDE, size[1] / STEM_STRIDE, trunk.stem];
        let mut x = b.push("stem", Op::Stem, &[image], halved, STEM_KERNEL * STEM_KERNEL * RGB * trunk.stem, trunk.stem);
        let mut stages = Vec::new();
        let mut thawed = 1;
        for (i, block) in trunk.blocks.iter().enumerate() {
            if i <= FROZEN_BLOCKS {
                thawed = b.nodes.len();
            }
            b.place = format!("trunk.{i}");
            let expanded = if block.expand { b.pointwise("expand", x, block.hidden, true, None) } else { x };
            let filtered = b.depthwise("filter", expanded, block.kernel, block.stride, block.pad);
            x = b.pointwise("project", filtered, block.outputs, false, block.residual.then_some(x));
            if trunk.taps.iter().any(|t| t.1 == i) {
                stages.push(x);
            }
        }
        let head = b.nodes.len();
        b.place = "head".into();
        let [f2, f4, f8, f16] = stages[..] else { unreachable!("a trunk with {} stages", stages.len()) };
        // A 3 px scratch must not be sampled away on the way from stride 2: filtered there (the trunk looks at it with 3x3 only), then its maximum.
        let sharp = b.inverted_residual("sharp", f2, SHARP_HIDDEN, b.nodes[f2].shape[2], 1);
        let finest = b.pointwise("finest", sharp, FINE, true, None);
        let [h, w, c] = b.nodes[finest].shape;
        let pooled = b.push("pooled", Op::MaxPool, &[finest], [h / 2, w / 2, c], 0, 0);
        let fine = b.pointwise("fine", f4, FINE, false, Some(pooled));
        let filtered = b.inverted_residual("filtered", fine, FINE_HIDDEN, FINE, 1);
        let from_fine = b.inverted_residual("from_fine", filtered, FINE_HIDDEN, WIDTH, 2);
        let near = b.pointwise("near", f8, WIDTH, false, Some(from_fine));
        let far = b.pointwise("far", f16, WIDTH, false, None);
        let up = b.push("up", Op::Up, &[far], b.nodes[near].shape, 0, 0);
        let seen = b.push("seen", Op::Add, &[near, up], b.nodes[near].shape, 0, 0);
        let summary = b.pointwise("summary", f16, SUMMARY, true, None);
        let latent = b.dense("latents", summary, [1, 1, LATENTS], true);
        let [rows, columns, _] = b.nodes[near].shape;
        let expected = b.dense("expected", latent, [rows, columns, EXPECTED], false);
        let compared = b.pointwise("compared", expected, WIDTH, false, Some(seen));
        let mut y = compared;
        for i in 0..BLOCKS {
            y = b.inverted_residual(&format!("block.{i}"), y, HIDDEN, WIDTH, 1);
        }
        b.pointwise("odds", y, 1, false, None);
        let taps = vec![(f2, vec![sharp - 2, finest]), (f4, vec![fine]), (f8, vec![near]), (f16, vec![far, summary])];
        let expectation = Expectation { summary, latents: latent, expected, seen, compared };
        Self { nodes: b.nodes, thawed, head, parameters: b.parameters, taps, expectation }
    }

    /// Rows and columns of the map.
    pub fn grid(&self) -> [usize; 2] {
        self.nodes.last().map_or([0; 2], |n| [n.shape[0], n.shape[1]])
    }

    /// Height and width of the input.
    pub fn size(&self) -> [usize; 2] {
        self.nodes.first().map_or([0; 2], |n| [n.shape[0], n.shape[1]])
    }

    /// Multiply-adds a picture.
    pub fn multiply_adds(&self) -> u64 {
        let one = |n: &Node| {
            let outputs = n.len();
            let channels = |i: usize| n.inputs.get(i).and_then(|i| self.nodes.get(*i)).map_or(0, |m| m.shape[2]);
            match n.op {
                Op::Stem => outputs * STEM_KERNEL * STEM_KERNEL * RGB,
                Op::Pointwise { .. } => outputs * channels(0),
                Op::Depthwise { kernel, .. } => outputs * kernel * kernel,
                Op::Dense { .. } => n.weight.len(),
                Op::Image | Op::MaxPool | Op::Up | Op::Add => 0,
            }
        };
        self.nodes.iter().map(one).sum::<usize>() as u64
    }

    /// Fresh parameters: the trunk's as given, the head's drawn (He et al. 2015; residual branches end in zeros).
    ///
    /// # Panics
    /// When `trunk` is another trunk's: the caller read both from one file.
    pub fn init(&self, trunk: &[f32], seed: u64) -> Vec<f32> {
        let mut values = vec![0.0; self.parameters];
        values[..trunk.len()].copy_from_slice(trunk);
        assert_eq!(trunk.len(), self.nodes[..self.head].last().map_or(0, |n| n.bias.end), "parameters of the trunk");
        let mut rng = rand_pcg::Pcg64::seed_from_u64(seed);
        for (i, node) in self.nodes.iter().enumerate().skip(self.head) {
            let inputs = node.inputs.first().map_or(0, |n| self.nodes[*n].shape[2]).max(1) as f64;
            let last = i + 1 == self.nodes.len();
            let (deviation, bias) = match node.op {
                Op::Pointwise { relu6: true } => ((2.0 / inputs).sqrt(), 0.3),
                Op::Pointwise { .. } if last => (0.05, PRIOR),
                // What is added to a stage starts at nothing.
                Op::Pointwise { .. } if node.is_branch_end() => (0.0, 0.0),
                Op::Pointwise { .. } => (0.5 / inputs.sqrt(), 0.0),
                Op::Depthwise { kernel, .. } => (1.0 / kernel as f64, 0.3),
                // `set_latents` and `set_expected` make them.
                Op::Dense { .. } | Op::Image | Op::Stem | Op::MaxPool | Op::Up | Op::Add => continue,
            };
            for v in &mut values[node.weight.clone()] {
                *v = (f64::from(normal(&mut rng)) * deviation) as f32;
            }
            values[node.bias.clone()].fill(bias);
        }
        values
    }

    /// Fold each stage's mean and deviation over good parts (one a channel, in the order of `taps`) into the head's layers that read it, so that they
    /// start from inputs of mean 0 and deviation 1.
    pub fn normalise_taps(&self, parameters: &mut [f32], moments: &[Vec<(f32, f32)>]) {
        for ((_, readers), moments) in self.taps.iter().zip(moments) {
            for &reader in readers {
                let Some(node) = self.nodes.get(reader) else { continue };
                let outputs = node.shape[2];
                let mut shift = vec![0.0f32; outputs];
                for (row, (mean, deviation)) in parameters[node.weight.clone()].chunks_exact_mut(outputs).zip(moments) {
                    for (w, s) in row.iter_mut().zip(&mut shift) {
                        *w /= deviation;
                        *s += *w * mean;
                    }
                }
                for (b, s) in parameters[node.bias.clone()].iter_mut().zip(shift) {
                    *b -= s;
                }
            }
        }
    }

    /// Make the latents the principal components of `summaries` (what the layer in front of them made of good parts), each of deviation 1: which product
    /// it is, and how it lies. Of few parts there are fewer components; the latents left over say nothing.
    pub fn set_latents(&self, parameters: &mut [f32], summaries: &[Vec<f32>]) {
        let Some(node) = self.nodes.get(self.expectation.latents) else { return };
        let (count, inputs) = (summaries.len(), node.weight.len() / LATENTS);
        let mut mean = vec![0.0f64; inputs];
        for s in summaries {
            mean.iter_mut().zip(s).for_each(|(m, v)| *m += f64::from(*v) / count.max(1) as f64);
        }
        let centred: Vec<Vec<f64>> = summaries.iter().map(|s| s.iter().zip(&mean).map(|(v, m)| f64::from(*v) - m).collect()).collect();
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let mut gram = vec![vec![0.0; count]; count];
        for i in 0..count {
            for j in 0..=i {
                gram[i][j] = dot(&centred[i], &centred[j]);
                gram[j][i] = gram[i][j];
            }
        }
        // Subspace iteration on the matrix of scalar products, which is small.
        let mut rng = rand_pcg::Pcg64::seed_from_u64(0);
        let mut vectors: Vec<Vec<f64>> = (0..LATENTS).map(|_| (0..count).map(|_| f64::from(normal(&mut rng))).collect()).collect();
        let mut values = vec![0.0f64; LATENTS];
        for _ in 0..ROUNDS {
            for k in 0..LATENTS {
                let mut next: Vec<f64> = gram.iter().map(|row| dot(row, &vectors[k])).collect();
                for before in &vectors[..k] {
                    let share = dot(&next, before);
                    next.iter_mut().zip(before).for_each(|(n, b)| *n -= share * b);
                }
                values[k] = dot(&next, &next).sqrt();
                let size = values[k].max(1e-300);
                vectors[k] = next.into_iter().map(|v| v / size).collect();
            }
        }
        let (weight, bias) = (node.weight.clone(), node.bias.clone());
        let least = values.first().copied().unwrap_or(0.0) * 1e-6;
        for (k, (vector, value)) in vectors.iter().zip(&values).enumerate() {
            let mut at_mean = 0.0;
            // A component's deviation over the parts is sqrt(value / count).
            let scale = if *value > least { (count as f64).sqrt() / value } else { 0.0 };
            for i in 0..inputs {
                let w = scale * centred.iter().zip(vector).map(|(c, v)| c[i] * v).sum::<f64>();
                parameters[weight.start + i * LATENTS + k] = w as f32;
                at_mean += w * mean[i];
            }
            parameters[bias.start + k] = LATENT_MEAN - at_mean as f32;
        }
    }

    /// Expect what good parts with the same latents looked like on average, and compare: the first channels of what is seen become differences from
    /// it. The latents are nearly uncorrelated (principal components), so each one's coefficient is its own covariance with what is seen.
    pub fn set_expected(&self, parameters: &mut [f32], seen: &SeenWithLatents) {
        let (Some(expected), Some(compared)) = (self.nodes.get(self.expectation.expected), self.nodes.get(self.expectation.compared))
        else {
            return;
        };
        let count = seen.parts.max(1) as f64;
        let mean_of = |sums: &[f64]| -> Vec<f64> { sums.iter().map(|s| s / count).collect() };
        let (map, latents) = (mean_of(&seen.map), mean_of(&seen.latents));
        let outputs = expected.len();
        let mut bias = map.clone();
        for (k, latent) in latents.iter().enumerate() {
            let variance = seen.squares.get(k).map_or(0.0, |s| s / count) - latent * latent;
            // A latent that says nothing moves nothing.
            let scale = if variance > 1e-3 { 1.0 / variance } else { 0.0 };
            let row = &mut parameters[expected.weight.start + k * outputs..expected.weight.start + (k + 1) * outputs];
            for (((w, product), mean), b) in row.iter_mut().zip(&seen.products[k * outputs..]).zip(&map).zip(&mut bias) {
                let slope = (product / count - latent * mean) * scale;
                *w = slope as f32;
                *b -= slope * latent;
            }
        }
        parameters[expected.bias.clone()].iter_mut().zip(bias).for_each(|(p, b)| *p = b as f32);
        parameters[compared.weight.clone()].fill(0.0);
        for c in 0..EXPECTED {
            parameters[compared.weight.start + c * WIDTH + c] = -1.0;
        }
    }

    /// Factor on the learning rate of each parameter: Adam moves every weight by about the same amount, and large weights want larger steps.
    pub fn rate_factors(&self, parameters: &[f32]) -> Vec<f32> {
        let mut factors = vec![1.0; self.parameters];
        for (i, node) in self.nodes.iter().enumerate() {
            let own = match node.op {
                Op::Dense { relu6: true } => LATENT_RATE,
                Op::Dense { relu6: false } => EXPECTED_RATE,
                _ if i == self.expectation.summary => SUMMARY_RATE,
                _ if i < self.head => TRUNK_RATE,
                _ => 1.0,
            };
            let weight = &parameters[node.weight.clone()];
            let power = weight.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / weight.len().max(1) as f64;
            // Of a branch that starts at zero the size says nothing.
            let by_size =
                if matches!(node.op, Op::Dense { .. }) || power == 0.0 { 1.0 } else { (power.sqrt() / TYPICAL_WEIGHT).clamp(0.3, 5.0) };
            factors[node.weight.clone()].fill((own * by_size) as f32);
            factors[node.bias.clone()].fill(own as f32);
        }
        factors
    }
}

/// A trunk's shape and parameters, in the layout of [`Network`], from an ONNX backbone such as `cull-trainer distill` writes.
///
/// # Errors
/// When it is no chain of inverted residuals with outputs at strides 2, 4, 8 and 16, or its weights are not in the file.
pub fn trunk(bytes: &[u8], name: &str) -> Result<(Architecture, Vec<f32>), OnnxError> {
    let fail = |why: String| OnnxError::Read { path: name.to_owned(), why };
    let model = pb::ModelProto::decode(bytes).map_err(|e| fail(format!("is no ONNX model ({e})")))?;
    let graph = model.graph.as_ref().ok_or_else(|| fail("holds no graph".into()))?;
    let (architecture, _) = chain(graph).map_err(|why| {
        fail(format!(
            "is no chain of inverted residuals with ReLU6 and outputs f2, f4, f8, f16 ({why}): use one that `cull-trainer distill` made"
        ))
    })?;
    let strides: Vec<usize> = architecture.taps.iter().map(|t| architecture.stride_after(t.1)).collect();
    if strides != [2, 4, 8, 16] {
        return Err(fail(format!("has stages at strides {strides:?}, needed are 2, 4, 8 and 16")));
    }
    let values = |name: &str| -> Result<Tensor, OnnxError> {
        match tensor(graph, name).map_err(|why| fail(format!("has {why}")))? {
            Some(found) => Ok(found),
            None => Err(fail(format!("lacks the weights {name}"))),
        }
    };
    let mut out = Vec::new();
    for node in graph.node.iter().filter(|n| n.op_type == "Conv") {
        let [_, weight, bias] = node.input.as_slice() else {
            return Err(fail(format!("has a convolution {} without bias", node.name)));
        };
        let (dims, data) = values(weight)?;
        let (_, bias) = values(bias)?;
        out.extend(in_our_order(&dims, &data).ok_or_else(|| fail(format!("has weights {weight} that are no convolution's")))?);
        out.extend(bias);
    }
    let network = Network::new(&architecture, [INPUT_MULTIPLE; 2]);
    if network.nodes[..network.head].last().is_none_or(|n| n.bias.end != out.len()) {
        return Err(fail("has other convolutions than those of its chain".into()));
    }
    Ok((architecture, out))
}

/// Sizes and values of a tensor.
type Tensor = (Vec<i64>, Vec<f32>);

/// The tensor `name` of a graph as float32, with its sizes: a constant, or what `cull model quantize` made of one. `None` when the graph has neither;
/// what is wrong with it as text.
fn tensor(graph: &pb::GraphProto, name: &str) -> Result<Option<Tensor>, String> {
    let find = |name: &str| graph.initializer.iter().find(|t| t.name == name);
    let fits = |dims: &[i64], len: usize| len as i64 == dims.iter().product::<i64>();
    let floats = |t: &pb::TensorProto| {
        let data = if t.raw_data.is_empty() {
            t.float_data.clone()
        } else {
            t.raw_data.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
        };
        if fits(&t.dims, data.len()) { Ok(data) } else { Err(format!("weights {} that are not float32", t.name)) }
    };
    if let Some(t) = find(name) {
        return Ok(Some((t.dims.clone(), floats(t)?)));
    }
    let (Some(steps), Some(scales)) = (find(&format!("{name}.int8")), find(&format!("{name}.scale"))) else { return Ok(None) };
    let scales = floats(scales)?;
    if !fits(&steps.dims, steps.raw_data.len()) || scales.is_empty() || steps.raw_data.len() % scales.len() != 0 {
        return Err(format!("8-bit weights {name} that do not fit their scales"));
    }
    // Outputs are the last axis of a matrix and the first of a convolution.
    let (last, each) = (steps.dims.len() == 2, steps.raw_data.len() / scales.len());
    let of = |i: usize| if last { i % scales.len() } else { i / each.max(1) };
    Ok(Some((steps.dims.clone(), steps.raw_data.iter().enumerate().map(|(i, v)| f32::from(*v as i8) * scales[of(i)]).collect())))
}

/// Weights of a convolution, `[outputs, inputs a group, height, width]`, as layers hold them: `[height, width, inputs, outputs]`; those of a matrix as
/// they are. `None` for anything else.
fn in_our_order(dims: &[i64], data: &[f32]) -> Option<Vec<f32>> {
    let &[outputs, inputs, height, width] = dims else { return (dims.len() == 2).then(|| data.to_vec()) };
    let (outputs, inputs, taps) = (outputs as usize, inputs as usize, (height * width) as usize);
    let mut out = Vec::with_capacity(data.len());
    for tap in 0..taps {
        for c in 0..inputs {
            out.extend((0..outputs).filter_map(|o| data.get((o * inputs + c) * taps + tap)));
        }
    }
    Some(out)
}

/// Give `parameters` the weights of an exported detector (float or 8 bit), layer by layer by name, and return the names of the layers that it lacks.
/// A branch that is new in this network starts at zero beside what it is added to: the detector computes what it did before.
///
/// # Errors
/// When the file is no detector of this shape.
pub fn adopt(network: &Network, parameters: &mut [f32], bytes: &[u8], name: &str) -> Result<Vec<String>, OnnxError> {
    let fail = |why: String| OnnxError::Detector { path: name.to_owned(), why };
    let model = pb::ModelProto::decode(bytes).map_err(|e| fail(format!("is no ONNX model ({e})")))?;
    let graph = model.graph.as_ref().ok_or_else(|| fail("holds no graph".into()))?;
    let mut fresh = Vec::new();
    let mut adopted = 0;
    for node in network.nodes.iter().filter(|n| !n.weight.is_empty()) {
        let read = |what: &str| tensor(graph, &format!("{}.{what}", node.name)).map_err(|why| fail(format!("has {why}")));
        let (Some((dims, weight)), Some((_, bias))) = (read("weight")?, read("bias")?) else {
            if node.is_branch_end() {
                parameters[node.weight.clone()].fill(0.0);
                parameters[node.bias.clone()].fill(0.0);
            }
            fresh.push(node.name.clone());
            continue;
        };
        let weight = in_our_order(&dims, &weight).filter(|w| w.len() == node.weight.len() && bias.len() == node.bias.len());
        let weight = weight.ok_or_else(|| fail(format!("has another size of {}: train with its --input and its backbone", node.name)))?;
        parameters[node.weight.clone()].copy_from_slice(&weight);
        parameters[node.bias.clone()].copy_from_slice(&bias);
        adopted += 1;
    }
    if adopted == 0 {
        return Err(fail("holds none of a detector's layers: give a bundle that `cull-trainer detect` made".into()));
    }
    Ok(fresh)
}
