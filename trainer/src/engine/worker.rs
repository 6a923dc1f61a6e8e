//! Forward and backward pass over a few samples at a time, by one thread, in memory of its own.

use super::attention::{self, Rows, Scratch, sample_rows};
use super::model::{self, Buffer, FeedForward, Layer, Model, Parameter, Query, stride_of};
use super::random::Key;
use super::rows::{self, Cyclic, Dropout, NormOut, Place};
use crate::uniad::UniadConfig;
use cull::kernels::aligned::Aligned;
use cull::kernels::gemm::{Left, Right, Start, gemm};
use cull::kernels::isa::Isa;
use cull::kernels::vectorise::vectorise;

/// Rows that a matrix product makes before what follows it reads them: they are still in the cache then. Seven tiles of fourteen.
const BLOCK: usize = 98;
/// Places of the random numbers that no dropout has: the jitter's noise, and which samples are jittered.
const JITTER_SITES: [u32; 2] = [0, 1];

/// What a layer normalisation leaves behind.
struct NormActs {
    normalised: Buffer,
    out: Buffer,
    inverse: Vec<f32>,
}

/// What an attention leaves behind.
struct AttentionActs {
    /// Projected queries, keys and values side by side; a learned query's columns are unused.
    projected: Buffer,
    /// Probabilities, a sample after the other.
    kept: Aligned<f32>,
    mixed: Buffer,
    norm: NormActs,
}

/// What a layer leaves behind.
struct LayerActs {
    attentions: Vec<AttentionActs>,
    hidden: Buffer,
    norm: NormActs,
}

impl LayerActs {
    fn out(&self) -> &Buffer {
        &self.norm.out
    }
}

/// Gradients of one worker.
pub struct Gradients {
    /// Of every parameter but the biases of linears, whose gradients are in `tables`.
    pub parameters: Vec<Vec<f32>>,
    /// Of every projection's table.
    pub tables: Vec<Buffer>,
}

impl Gradients {
    fn clear(&mut self) {
        self.parameters.iter_mut().for_each(|g| g.fill(0.0));
        self.tables.iter_mut().for_each(|g| g.data.fill(0.0));
    }
}

/// What is random in a step.
#[derive(Clone, Copy, Debug)]
pub struct Randomness {
    /// Of the step.
    pub seed: u64,
    /// Dropout, if any.
    pub dropout: Option<Dropout>,
}

/// A thread's share of the work: samples `first..` of a batch.
pub struct Worker {
    /// Sum over the worker's samples.
    pub gradients: Gradients,
    /// Sum of squared errors over the worker's samples.
    pub squares: f64,
    acts: Acts,
    scratch: Scratch,
    back: Back,
    /// Samples at a time.
    at_once: usize,
}

struct Acts {
    input: Buffer,
    tokens: Buffer,
    encoder: Vec<LayerActs>,
    decoder: Vec<LayerActs>,
    norm: NormActs,
    /// Reconstruction, then its gradient.
    rebuilt: Buffer,
    /// A block of rows on its way to a normalisation.
    branch: Buffer,
}

/// Memory of the backward pass.
struct Back {
    /// Of the current layer's output.
    gradient: Buffer,
    /// Of the previous layer's.
    previous: Buffer,
    /// Of the encoder's output.
    memory: Buffer,
    /// Of a branch before its dropout.
    branch: Buffer,
    /// Of mixed values.
    mixed: Buffer,
    /// Of projected queries, keys and values.
    projected: Buffer,
    hidden: Buffer,
}

/// What does not change between the samples of a step.
struct Step<'a> {
    isa: Isa,
    model: &'a Model,
    parameters: &'a [Parameter],
    dropout: Option<Dropout>,
    place: Place,
    /// Rows of the micro-batch.
    rows: usize,
}

impl Worker {
    /// A worker for `at_once` samples at a time. Without `backward` it only reconstructs.
    pub fn new(model: &Model, parameters: &[Parameter], at_once: usize, backward: bool) -> Self {
        let c = &model.config;
        let rows = at_once * c.tokens();
        let dim = || Buffer::new(rows, c.dim);
        let norm = || NormActs { normalised: dim(), out: dim(), inverse: vec![0.0; rows] };
        let layer = |layer: &Layer| LayerActs {
            attentions: layer
                .attentions
                .iter()
                .map(|_| AttentionActs {
                    projected: Buffer::new(rows, 3 * c.dim),
                    kept: Aligned::zeroed(at_once * model.shape.probabilities()),
                    mixed: dim(),
                    norm: norm(),
                })
                .collect(),
            hidden: Buffer::new(rows, c.hidden),
            norm: norm(),
        };
        let acts = Acts {
            input: Buffer::new(rows, c.channels),
            tokens: dim(),
            encoder: model.encoder.iter().map(layer).collect(),
            decoder: model.decoder.iter().map(layer).collect(),
            norm: norm(),
            rebuilt: Buffer::new(rows, c.channels),
            branch: Buffer::new(BLOCK, c.dim),
        };
        let gradients = Gradients {
            parameters: parameters.iter().map(|p| vec![0.0; if backward { p.value.len() } else { 0 }]).collect(),
            tables: model.projections.iter().map(|p| if backward { p.table.clone() } else { Buffer::default() }).collect(),
        };
        let back = |columns: usize| if backward { Buffer::new(rows, columns) } else { Buffer::default() };
        Self {
            gradients,
            squares: 0.0,
            acts,
            scratch: Scratch::new(model.shape),
            back: Back {
                gradient: back(c.dim),
                previous: back(c.dim),
                memory: back(c.dim),
                branch: back(c.dim),
                mixed: back(c.dim),
                projected: back(3 * c.dim),
                hidden: back(c.hidden),
            },
            at_once,
        }
    }

    /// Gradients and squared error of `samples` (each `[tokens, channels]`), which are `first..` of a batch of `batch`.
    pub fn learn(
        &mut self,
        isa: Isa,
        model: &Model,
        parameters: &[Parameter],
        samples: &[&[f32]],
        (first, batch): (usize, usize),
        random: Randomness,
    ) {
        self.gradients.clear();
        self.squares = 0.0;
        let c = &model.config;
        let share = 1.0 / (batch * c.tokens() * c.channels) as f32;
        for (chunk, samples) in samples.chunks(self.at_once).enumerate() {
            let place = Place { sample: first + chunk * self.at_once, tokens: c.tokens() };
            let step = Step { isa, model, parameters, dropout: random.dropout, place, rows: samples.len() * c.tokens() };
            for (i, sample) in samples.iter().enumerate() {
                self.acts.put(&step, i, sample, Some(random.seed));
            }
            self.acts.forward(&step, &mut self.scratch);
            let stride = self.acts.rebuilt.stride;
            for (lines, sample) in self.acts.rebuilt.data.chunks_mut(c.tokens() * stride).zip(samples) {
                self.squares += vectorise(
                    isa,
                    #[inline(always)]
                    || rows::squared_error(lines, stride, sample, (c.tokens(), c.channels), share),
                );
            }
            backward(&step, &self.acts, &mut self.back, &mut self.gradients, &mut self.scratch);
        }
    }

    /// Reconstructions of `samples`, one after the other into `out`: no dropout, no jitter.
    pub fn reconstruct(&mut self, isa: Isa, model: &Model, parameters: &[Parameter], samples: &[&[f32]], out: &mut [f32]) {
        let c = &model.config;
        let size = c.tokens() * c.channels;
        for (samples, out) in samples.chunks(self.at_once).zip(out.chunks_mut((self.at_once * size).max(1))) {
            let step = Step {
                isa,
                model,
                parameters,
                dropout: None,
                place: Place { sample: 0, tokens: c.tokens() },
                rows: samples.len() * c.tokens(),
            };
            for (i, sample) in samples.iter().enumerate() {
                self.acts.put(&step, i, sample, None);
            }
            self.acts.forward(&step, &mut self.scratch);
            for (to, from) in out.chunks_exact_mut(c.channels).zip(self.acts.rebuilt.data.chunks_exact(self.acts.rebuilt.stride)) {
                to.copy_from_slice(&from[..c.channels]);
            }
        }
    }
}

/// Noise of the jitter per unit of a token's norm, 0 for none.
fn jitter_factor(c: &UniadConfig, seed: u64, sample: usize) -> f32 {
    // A uniform number below the probability; the order of two doubles is that of their bits.
    let chosen = f64::from(Key::new(seed, JITTER_SITES[1], sample).bits(0)) < c.jitter_probability * f64::from(u32::MAX);
    if chosen || c.jitter_probability >= 1.0 { (c.jitter_scale / c.channels as f64) as f32 } else { 0.0 }
}

impl Acts {
    /// Sample number `index` of the micro-batch; jittered under a seed.
    fn put(&mut self, step: &Step<'_>, index: usize, sample: &[f32], seed: Option<u64>) {
        let c = &step.model.config;
        let (stride, width) = (self.input.stride, c.channels);
        let to = &mut self.input.data[index * c.tokens() * stride..];
        let number = step.place.sample + index;
        let factor = seed.map_or(0.0, |seed| jitter_factor(c, seed, number));
        if factor > 0.0 {
            let key = Key::new(seed.unwrap_or(0), JITTER_SITES[0], number);
            vectorise(
                step.isa,
                #[inline(always)]
                || rows::jitter(sample, to, stride, width, factor, key),
            );
        } else {
            for (to, from) in to.chunks_exact_mut(stride).zip(sample.chunks_exact(width)) {
                to[..width].copy_from_slice(from);
            }
        }
    }

    fn forward(&mut self, step: &Step<'_>, scratch: &mut Scratch) {
        let model = step.model;
        let input = &self.input;
        model.projections[model.input].run(step.isa, &input.data, input.stride, (0, step.rows), &mut self.tokens.data, self.tokens.stride);
        let mut x = &self.tokens;
        for (layer, acts) in model.encoder.iter().zip(&mut self.encoder) {
            let [attention] = &mut acts.attentions[..] else { unreachable!("an encoder layer has one attention") };
            let residual = Cyclic { data: &x.data, stride: x.stride, period: usize::MAX };
            attend(step, &layer.attentions[0], (x, x), residual, attention, &mut self.branch, scratch);
            feed_forward(step, &layer.feed_forward, &attention.norm.out, &mut acts.hidden, &mut acts.norm, &mut self.branch);
            x = acts.out();
        }
        let memory = x;
        for (layer, acts) in model.decoder.iter().zip(&mut self.decoder) {
            let [first, second] = &mut acts.attentions[..] else { unreachable!("a decoder layer has two attentions") };
            let residual = match layer.attentions[0].query {
                Query::Learned { parameter, .. } => {
                    Cyclic { data: &step.parameters[parameter].value, stride: model.config.dim, period: model.shape.tokens }
                }
                _ => Cyclic { data: &x.data, stride: x.stride, period: usize::MAX },
            };
            attend(step, &layer.attentions[0], (x, memory), residual, first, &mut self.branch, scratch);
            let y = &first.norm.out;
            let residual = Cyclic { data: &y.data, stride: y.stride, period: usize::MAX };
            attend(step, &layer.attentions[1], (y, x), residual, second, &mut self.branch, scratch);
            feed_forward(step, &layer.feed_forward, &second.norm.out, &mut acts.hidden, &mut acts.norm, &mut self.branch);
            x = acts.out();
        }
        let (scale, bias) = norm_values(step, model.norm);
        let to = &mut self.norm;
        let (rows, dim) = (step.rows, model.config.dim);
        vectorise(
            step.isa,
            #[inline(always)]
            || {
                let stride = to.out.stride;
                let to = NormOut { normalised: &mut to.normalised.data, out: &mut to.out.data, inverse: &mut to.inverse, stride };
                rows::norm(&x.data, rows, dim, (scale, bias), to);
            },
        );
        let from = &self.norm.out;
        model.projections[model.output].run(step.isa, &from.data, from.stride, (0, rows), &mut self.rebuilt.data, self.rebuilt.stride);
    }
}

fn norm_values<'a>(step: &Step<'a>, norm: model::Norm) -> (&'a [f32], &'a [f32]) {
    (&step.parameters[norm.scale].value, &step.parameters[norm.bias].value)
}

/// The rows of queries, keys and values of one sample.
fn heads<'a>(step: &Step<'a>, ids: &model::Attention, projected: &'a Buffer, sample: usize) -> [Rows<'a>; 3] {
    let (tokens, dim) = (step.model.shape.tokens, step.model.config.dim);
    let query = match ids.query {
        Query::Learned { projection, .. } => {
            let table = &step.model.projections[projection].table;
            Rows { data: &table.data, stride: table.stride }
        }
        _ => sample_rows(projected, sample, tokens, 0),
    };
    [query, sample_rows(projected, sample, tokens, dim), sample_rows(projected, sample, tokens, 2 * dim)]
}

/// Attention, output projection, dropout, residual, normalisation. `from` are the rows of queries and those of keys and values.
fn attend(
    step: &Step<'_>,
    ids: &model::Attention,
    (queries, keys): (&Buffer, &Buffer),
    residual: Cyclic<'_>,
    acts: &mut AttentionActs,
    branch: &mut Buffer,
    scratch: &mut Scratch,
) {
    let (isa, model) = (step.isa, step.model);
    let dim = model.config.dim;
    let stride = acts.projected.stride;
    if let Query::Rows(projection) = ids.query {
        model.projections[projection].run(isa, &queries.data, queries.stride, (0, step.rows), &mut acts.projected.data, stride);
    }
    let at = if ids.query == Query::Same { 0 } else { dim };
    model.projections[ids.keys].run(isa, &keys.data, keys.stride, (0, step.rows), &mut acts.projected.data[at..], stride);
    let tokens = model.shape.tokens;
    for (sample, kept) in acts.kept.chunks_exact_mut(model.shape.probabilities()).take(step.rows / tokens).enumerate() {
        let dropout = step.dropout.map(|d| (d, d.key(ids.site, step.place.sample + sample)));
        let from = heads(step, ids, &acts.projected, sample);
        let to = acts.mixed.stride;
        let out = &mut acts.mixed.data[sample * tokens * to..];
        attention::forward(isa, model.shape, from, &model.masks[ids.mask], dropout, kept, out, to, scratch);
    }
    close(step, ids.out, &acts.mixed, residual, (ids.norm, ids.site + 1), &mut acts.norm, branch);
}

fn feed_forward(step: &Step<'_>, ids: &FeedForward, from: &Buffer, hidden: &mut Buffer, norm: &mut NormActs, branch: &mut Buffer) {
    let up = &step.model.projections[ids.up];
    let (stride, width) = (hidden.stride, step.model.config.hidden);
    let dropout = step.dropout.map(|d| (d, ids.site));
    for first in (0..step.rows).step_by(BLOCK) {
        let n = BLOCK.min(step.rows - first);
        let lines = &mut hidden.data[first * stride..];
        up.run(step.isa, &from.data[first * from.stride..], from.stride, (first, n), lines, stride);
        vectorise(
            step.isa,
            #[inline(always)]
            || rows::rectify(lines, stride, (first, n, width), dropout, step.place),
        );
    }
    let residual = Cyclic { data: &from.data, stride: from.stride, period: usize::MAX };
    close(step, ids.down, hidden, residual, (ids.norm, ids.site + 1), norm, branch);
}

/// Projection, dropout, residual, normalisation.
fn close(
    step: &Step<'_>,
    projection: usize,
    from: &Buffer,
    residual: Cyclic<'_>,
    (norm, site): (model::Norm, u32),
    to: &mut NormActs,
    branch: &mut Buffer,
) {
    let values = norm_values(step, norm);
    let dim = step.model.config.dim;
    let dropout = step.dropout.map(|d| (d, site));
    let stride = branch.stride;
    for first in (0..step.rows).step_by(BLOCK) {
        let n = BLOCK.min(step.rows - first);
        let input = &from.data[first * from.stride..];
        step.model.projections[projection].run(step.isa, input, from.stride, (first, n), &mut branch.data, stride);
        let branch = &branch.data;
        let to = &mut *to;
        vectorise(
            step.isa,
            #[inline(always)]
            || {
                let out_stride = to.out.stride;
                let to =
                    NormOut { normalised: &mut to.normalised.data, out: &mut to.out.data, inverse: &mut to.inverse, stride: out_stride };
                rows::add_norm(branch, stride, residual, (first, n, dim), values, dropout, step.place, to);
            },
        );
    }
}

fn backward(step: &Step<'_>, acts: &Acts, back: &mut Back, gradients: &mut Gradients, scratch: &mut Scratch) {
    let model = step.model;
    let (rebuilt, rows) = (&acts.rebuilt, step.rows);
    weights_back(step, model.output, &acts.norm.out, (rebuilt, 0), gradients);
    let (stride, output) = (back.gradient.stride, &model.projections[model.output]);
    output.run_back(step.isa, &rebuilt.data, rebuilt.stride, rows, Start::Zero, &mut back.gradient.data, stride);
    norm_back(step, model.norm, &acts.norm, &mut back.gradient, None, gradients);
    let memory = acts.encoder.last().map_or(&acts.tokens, LayerActs::out);
    back.memory.data.fill(0.0);
    for (at, (layer, layer_acts)) in model.decoder.iter().zip(&acts.decoder).enumerate().rev() {
        let x = at.checked_sub(1).and_then(|before| acts.decoder.get(before)).map_or(memory, LayerActs::out);
        let [first, second] = &layer_acts.attentions[..] else { unreachable!("a decoder layer has two attentions") };
        let [first_ids, second_ids] = &layer.attentions[..] else { unreachable!("a decoder layer has two attentions") };
        feed_forward_back(step, &layer.feed_forward, &second.norm.out, &layer_acts.hidden, &layer_acts.norm, back, gradients);
        // Attention 2: queries from the first normalisation, keys and values from the previous layer.
        attention_back(step, second_ids, second, back, gradients, scratch);
        let Query::Rows(queries) = second_ids.query else { unreachable!("its queries are rows") };
        let dim = model.config.dim;
        project_back(step, queries, &first.norm.out, 0, Start::Out, Target::Gradient, back, gradients);
        project_back(step, second_ids.keys, x, dim, Start::Zero, Target::Previous, back, gradients);
        // Attention 1: queries learned or from the previous layer, keys and values from the encoder.
        attention_back(step, first_ids, first, back, gradients, scratch);
        project_back(step, first_ids.keys, memory, dim, Start::Out, Target::Memory, back, gradients);
        let width = (rows, dim);
        match first_ids.query {
            Query::Learned { projection, parameter } => {
                let (from, tokens) = (&*back, model.shape.tokens);
                let Gradients { parameters, tables } = gradients;
                let (query, table) = (&mut parameters[parameter], &mut tables[projection]);
                vectorise(
                    step.isa,
                    #[inline(always)]
                    || {
                        rows::add_cyclic(query, dim, tokens, &from.gradient.data, from.gradient.stride, width);
                        rows::add_cyclic(&mut table.data, table.stride, tokens, &from.projected.data, from.projected.stride, width);
                    },
                );
            }
            Query::Rows(projection) => {
                project_back(step, projection, x, 0, Start::Out, Target::Previous, back, gradients);
                add_rows(step, &mut back.previous, &back.gradient);
            }
            Query::Same => unreachable!("a decoder's queries are not its keys"),
        }
        std::mem::swap(&mut back.gradient, &mut back.previous);
    }
    // What reached the first decoder layer's "previous layer" belongs to the memory too.
    add_rows(step, &mut back.gradient, &back.memory);
    for (at, (layer, layer_acts)) in model.encoder.iter().zip(&acts.encoder).enumerate().rev() {
        let x = at.checked_sub(1).and_then(|before| acts.encoder.get(before)).map_or(&acts.tokens, LayerActs::out);
        let (Some(attention), Some(ids)) = (layer_acts.attentions.first(), layer.attentions.first()) else { continue };
        feed_forward_back(step, &layer.feed_forward, &attention.norm.out, &layer_acts.hidden, &layer_acts.norm, back, gradients);
        attention_back(step, ids, attention, back, gradients, scratch);
        project_back(step, ids.keys, x, 0, Start::Out, Target::Gradient, back, gradients);
    }
    // The features themselves need no gradient.
    weights_back(step, model.input, &acts.input, (&back.gradient, 0), gradients);
}

fn add_rows(step: &Step<'_>, to: &mut Buffer, from: &Buffer) {
    let n = step.rows * from.stride;
    vectorise(
        step.isa,
        #[inline(always)]
        || rows::add(&mut to.data[..n], &from.data[..n]),
    );
}

/// Backward through a normalisation; with `site` also to the branch before it, into the branch buffer.
fn norm_back(
    step: &Step<'_>,
    norm: model::Norm,
    acts: &NormActs,
    gradient: &mut Buffer,
    branch: Option<(&mut Buffer, u32)>,
    gradients: &mut Gradients,
) {
    let (stride, size) = (gradient.stride, (step.rows, step.model.config.dim));
    let scale = &step.parameters[norm.scale].value;
    // Scale and bias stand side by side in the list.
    let (before, after) = gradients.parameters.split_at_mut(norm.scale.max(norm.bias));
    let (scale_gradient, bias_gradient) =
        if norm.scale < norm.bias { (&mut before[norm.scale], &mut after[0]) } else { (&mut after[0], &mut before[norm.bias]) };
    let branch = branch.map(|(buffer, site)| (&mut buffer.data[..], step.dropout.map(|d| (d, site))));
    vectorise(
        step.isa,
        #[inline(always)]
        || {
            let to = (&mut scale_gradient[..], &mut bias_gradient[..]);
            rows::norm_backward(&mut gradient.data, stride, size, &acts.normalised.data, &acts.inverse, scale, to, branch, step.place);
        },
    );
}

/// Gradients of a projection's weights and table.
fn weights_back(step: &Step<'_>, projection: usize, input: &Buffer, (gradient, at): (&Buffer, usize), gradients: &mut Gradients) {
    let p = &step.model.projections[projection];
    for (i, part) in p.parts.iter().enumerate() {
        let right = Right::rows(&gradient.data[at + i * p.outputs..], gradient.stride, step.isa);
        let left = Left::transposed(&input.data, input.stride);
        let to = &mut gradients.parameters[part.weight];
        gemm(step.isa, [p.inputs, p.outputs, step.rows], left, right, Start::Out, to, p.outputs);
    }
    let table = &mut gradients.tables[projection];
    let (stride, size) = (table.stride, (step.rows, p.columns()));
    vectorise(
        step.isa,
        #[inline(always)]
        || rows::add_cyclic(&mut table.data, stride, p.period, &gradient.data[at..], gradient.stride, size),
    );
}

/// Where a projection's input gradient goes.
#[derive(Clone, Copy)]
enum Target {
    Gradient,
    Previous,
    Memory,
}

/// Backward through a projection whose output gradient is in the projected columns from `at` on.
#[allow(clippy::too_many_arguments)]
fn project_back(
    step: &Step<'_>,
    projection: usize,
    input: &Buffer,
    at: usize,
    start: Start<'_>,
    target: Target,
    back: &mut Back,
    gradients: &mut Gradients,
) {
    weights_back(step, projection, input, (&back.projected, at), gradients);
    let Back { gradient, previous, memory, projected, .. } = back;
    let to = match target {
        Target::Gradient => gradient,
        Target::Previous => previous,
        Target::Memory => memory,
    };
    let stride = to.stride;
    step.model.projections[projection].run_back(step.isa, &projected.data[at..], projected.stride, step.rows, start, &mut to.data, stride);
}

/// From the gradient behind the attention's normalisation to that of its residual, in place, and of its projected queries, keys and values.
fn attention_back(
    step: &Step<'_>,
    ids: &model::Attention,
    acts: &AttentionActs,
    back: &mut Back,
    gradients: &mut Gradients,
    scratch: &mut Scratch,
) {
    let (isa, model) = (step.isa, step.model);
    norm_back(step, ids.norm, &acts.norm, &mut back.gradient, Some((&mut back.branch, ids.site + 1)), gradients);
    weights_back(step, ids.out, &acts.mixed, (&back.branch, 0), gradients);
    let mixed = &mut back.mixed;
    let stride = mixed.stride;
    model.projections[ids.out].run_back(isa, &back.branch.data, back.branch.stride, step.rows, Start::Zero, &mut mixed.data, stride);
    let (tokens, dim) = (model.shape.tokens, model.config.dim);
    for (sample, kept) in acts.kept.chunks_exact(model.shape.probabilities()).take(step.rows / tokens).enumerate() {
        let from = heads(step, ids, &acts.projected, sample);
        let stride = back.projected.stride;
        let to = &mut back.projected.data[sample * tokens * stride..];
        let mixed = sample_rows(&back.mixed, sample, tokens, 0);
        attention::backward(isa, model.shape, from, step.dropout, kept, mixed, to, [0, dim, 2 * dim], stride, scratch);
    }
}

/// From the gradient behind the feed-forward part's normalisation to that of its input, in place.
fn feed_forward_back(
    step: &Step<'_>,
    ids: &FeedForward,
    input: &Buffer,
    hidden: &Buffer,
    norm: &NormActs,
    back: &mut Back,
    gradients: &mut Gradients,
) {
    let (isa, model) = (step.isa, step.model);
    norm_back(step, ids.norm, norm, &mut back.gradient, Some((&mut back.branch, ids.site + 1)), gradients);
    weights_back(step, ids.down, hidden, (&back.branch, 0), gradients);
    let (stride, width) = (back.hidden.stride, model.config.hidden);
    debug_assert_eq!(stride, stride_of(width));
    for first in (0..step.rows).step_by(BLOCK) {
        let n = BLOCK.min(step.rows - first);
        let lines = &mut back.hidden.data[first * stride..];
        let from = &back.branch;
        model.projections[ids.down].run_back(isa, &from.data[first * from.stride..], from.stride, n, Start::Zero, lines, stride);
        let hidden = &hidden.data[first * stride..];
        vectorise(
            isa,
            #[inline(always)]
            || rows::rectify_backward(lines, hidden, stride, (n, width), step.dropout),
        );
    }
    weights_back(step, ids.up, input, (&back.hidden, 0), gradients);
    let to = &mut back.gradient;
    let to_stride = to.stride;
    model.projections[ids.up].run_back(isa, &back.hidden.data, stride, step.rows, Start::Out, &mut to.data, to_stride);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jitter_takes_its_share_of_the_samples() {
        for p in [0.0, 0.3, 1.0] {
            let config = UniadConfig { jitter_probability: p, jitter_scale: 20.0, ..UniadConfig::paper(272) };
            let n = 20_000;
            let jittered = (0..n).filter(|sample| jitter_factor(&config, 3, *sample) > 0.0).count() as f64;
            let (n, deviation) = (f64::from(n as u32), (f64::from(n as u32) * p * (1.0 - p)).sqrt());
            assert!((jittered - n * p).abs() <= 5.0 * deviation, "{jittered} of {n} for {p}");
        }
        let off = UniadConfig { jitter_scale: 0.0, ..UniadConfig::paper(272) };
        assert_eq!(jitter_factor(&off, 3, 1), 0.0);
    }
}
