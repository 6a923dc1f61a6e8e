//! Weights as the step reads them: every linear packed for the matrix product forward and backward, position embeddings and learned queries already
//! projected, once a step for all samples.
//!
//! Two identities save work. A projection of `x + position` is the projection of `x` plus that of the positions, which is the same for every sample: it
//! becomes a table of biases, one row a token. And the first attention of a decoder layer has a learned query, so its projected query is such a table
//! and nothing else. Their gradients are summed over the samples first and multiplied once a step.

use super::attention::{Shape, additive_mask};
use crate::uniad::{Kind, UniadConfig, neighbour_mask};
use cull::kernels::aligned::Aligned;
use cull::kernels::gemm::{Left, Right, Start, gemm, pack, pack_transposed, packed_len};
use cull::kernels::isa::Isa;
use std::collections::BTreeMap;

/// Values behind the last row of every buffer: whole vectors are read.
pub const SLACK: usize = 64;
/// Values in a cache line.
const CACHE_LINE: usize = 16;

/// From row to row of a buffer of `columns` columns: an odd number of cache lines, so that the rows of a column do not fall onto the same few places of
/// the first-level cache.
pub fn stride_of(columns: usize) -> usize {
    (columns.div_ceil(CACHE_LINE) | 1) * CACHE_LINE
}

/// Rows with room around them.
#[derive(Clone, Debug, Default)]
pub struct Buffer {
    /// Elements.
    pub data: Aligned<f32>,
    /// From row to row.
    pub stride: usize,
}

impl Buffer {
    /// Zeros.
    pub fn new(rows: usize, columns: usize) -> Self {
        let stride = stride_of(columns);
        Self { data: Aligned::zeroed(rows * stride + SLACK), stride }
    }
}

/// A weight with what training keeps beside it. Vectors of moments and averages are empty where there are none.
#[derive(Clone, Debug)]
pub struct Parameter {
    /// Shape and meaning.
    pub kind: Kind,
    /// Values, row-major, of [`Kind::shape`].
    pub value: Vec<f32>,
    /// Gradient of the step, summed over all samples.
    pub gradient: Vec<f32>,
    /// First moments.
    pub moment_1: Vec<f32>,
    /// Second moments.
    pub moment_2: Vec<f32>,
    /// Moving average.
    pub average: Vec<f32>,
    /// Sum of the squares of `gradient`.
    pub square: f64,
}

/// What a table of biases is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The bias: one row.
    Bias,
    /// The projected positions, for the parts that see them: a row a token.
    Position,
    /// A learned query and the positions, projected: a row a token, and the whole projection.
    Query(usize),
}

/// One linear of a [`Projection`].
#[derive(Clone, Copy, Debug)]
pub struct Part {
    /// Parameter: `[inputs, outputs]`.
    pub weight: usize,
    /// Parameter.
    pub bias: usize,
    /// Its input has the positions added.
    pub position: bool,
}

/// Linears of one input side by side.
#[derive(Clone, Debug)]
pub struct Projection {
    /// Side by side, all with `outputs` columns.
    pub parts: Vec<Part>,
    /// Columns of the input.
    pub inputs: usize,
    /// Columns of each part.
    pub outputs: usize,
    /// What the table holds.
    pub source: Source,
    /// Rows of the table.
    pub period: usize,
    /// Biases, `[period, columns]`.
    pub table: Buffer,
    forward: Aligned<f32>,
    backward: Aligned<f32>,
    /// Learned query and positions, `[tokens, inputs]`.
    query: Buffer,
}

impl Projection {
    /// Columns of all parts.
    pub fn columns(&self) -> usize {
        self.parts.len() * self.outputs
    }

    /// Pack the weights and make the table anew.
    fn prepare(&mut self, isa: Isa, parameters: &[Parameter], position: &Buffer, both: bool) {
        let columns = self.columns();
        for (i, part) in self.parts.iter().enumerate() {
            let weight = &parameters[part.weight].value;
            pack(&mut self.forward, self.inputs, i * self.outputs, weight, self.outputs, isa);
            if both {
                pack_transposed(&mut self.backward, columns, i * self.outputs, weight, self.outputs, isa);
            }
        }
        let stride = self.table.stride;
        for row in self.table.data.chunks_exact_mut(stride).take(self.period) {
            for (to, part) in row.chunks_exact_mut(self.outputs).zip(&self.parts) {
                to.copy_from_slice(&parameters[part.bias].value);
            }
        }
        let right = Right::packed(&self.forward, self.inputs, isa);
        let input = match self.source {
            Source::Bias => return,
            Source::Position => position,
            Source::Query(query) => {
                let stride = self.query.stride;
                let rows = self.query.data.chunks_exact_mut(stride).zip(position.data.chunks_exact(position.stride));
                for ((to, p), q) in rows.zip(parameters[query].value.chunks_exact(self.inputs)) {
                    for ((to, p), q) in to.iter_mut().zip(p).zip(q) {
                        *to = p + q;
                    }
                }
                &self.query
            }
        };
        let size = [self.period, columns, self.inputs];
        gemm(isa, size, Left::rows(&input.data, input.stride), right, Start::Out, &mut self.table.data, stride);
        for row in self.table.data.chunks_exact_mut(stride).take(self.period) {
            for (to, part) in row.chunks_exact_mut(self.outputs).zip(&self.parts) {
                if self.source == Source::Position && !part.position {
                    to.copy_from_slice(&parameters[part.bias].value);
                }
            }
        }
    }

    /// `out = input x weights + table`, rows `first..first + n` of a micro-batch; `input` and `out` start at the first of them.
    pub fn run(&self, isa: Isa, input: &[f32], input_stride: usize, (first, n): (usize, usize), out: &mut [f32], out_stride: usize) {
        let start = Start::Table { table: &self.table.data, stride: self.table.stride, first: first % self.period, period: self.period };
        let right = Right::packed(&self.forward, self.inputs, isa);
        gemm(isa, [n, self.columns(), self.inputs], Left::rows(input, input_stride), right, start, out, out_stride);
    }

    /// `input gradient (+)= gradient x weights^T`.
    #[allow(clippy::too_many_arguments)]
    pub fn run_back(&self, isa: Isa, gradient: &[f32], stride: usize, rows: usize, start: Start<'_>, out: &mut [f32], out_stride: usize) {
        let right = Right::packed(&self.backward, self.columns(), isa);
        gemm(isa, [rows, self.inputs, self.columns()], Left::rows(gradient, stride), right, start, out, out_stride);
    }

    /// From the gradient of the table, summed over all samples, to those of biases, weights, positions and query.
    pub fn finish(&self, isa: Isa, gradient: &Buffer, parameters: &mut [Parameter], position: &Buffer, position_gradient: &mut Buffer) {
        let (stride, outputs) = (gradient.stride, self.outputs);
        for (i, part) in self.parts.iter().enumerate() {
            let bias = &mut parameters[part.bias].gradient;
            for row in gradient.data.chunks_exact(stride).take(self.period) {
                for (to, g) in bias.iter_mut().zip(&row[i * outputs..(i + 1) * outputs]) {
                    *to += g;
                }
            }
            let source = match self.source {
                Source::Position if part.position => position,
                Source::Query(_) => &self.query,
                _ => continue,
            };
            let columns = &gradient.data[i * outputs..];
            let left = Left::transposed(&source.data, source.stride);
            let weight = &mut parameters[part.weight].gradient;
            gemm(isa, [self.inputs, outputs, self.period], left, Right::rows(columns, stride, isa), Start::Out, weight, outputs);
            let left = Left::rows(columns, stride);
            let right = Right::packed(&self.backward, self.columns(), isa).from_depth(i * outputs);
            let to = position_gradient.stride;
            if let Source::Query(query) = self.source {
                let to = &mut parameters[query].gradient;
                gemm(isa, [self.period, self.inputs, outputs], left, right, Start::Out, to, self.inputs);
            }
            gemm(isa, [self.period, self.inputs, outputs], left, right, Start::Out, &mut position_gradient.data, to);
        }
    }
}

/// Parameters of a layer normalisation.
#[derive(Clone, Copy, Debug)]
pub struct Norm {
    /// Parameter.
    pub scale: usize,
    /// Parameter.
    pub bias: usize,
}

/// Where an attention's queries come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Query {
    /// The rows that keys and values come from: one projection makes all three.
    Same,
    /// Other rows, through this projection.
    Rows(usize),
    /// The table of this projection, the same for every sample; the residual is this parameter.
    Learned {
        /// Projection.
        projection: usize,
        /// Parameter.
        parameter: usize,
    },
}

/// One attention with what follows it.
#[derive(Clone, Copy, Debug)]
pub struct Attention {
    /// Queries.
    pub query: Query,
    /// Projection to keys and values, or to queries, keys and values.
    pub keys: usize,
    /// Projection of the mixed values.
    pub out: usize,
    /// Which mask.
    pub mask: usize,
    /// Residual and normalisation behind it.
    pub norm: Norm,
    /// Random numbers of its probabilities; those of its output follow.
    pub site: u32,
}

/// Feed-forward part with what follows it.
#[derive(Clone, Copy, Debug)]
pub struct FeedForward {
    /// Projection.
    pub up: usize,
    /// Projection.
    pub down: usize,
    /// Residual and normalisation behind it.
    pub norm: Norm,
    /// Random numbers of its hidden layer; those of its output follow.
    pub site: u32,
}

/// A layer: one attention (encoder) or two (decoder).
#[derive(Clone, Debug)]
pub struct Layer {
    /// In order.
    pub attentions: Vec<Attention>,
    /// Behind them.
    pub feed_forward: FeedForward,
}

/// All of a model that does not change within a step.
#[derive(Debug)]
pub struct Model {
    /// Sizes and components.
    pub config: UniadConfig,
    /// Of every attention.
    pub shape: Shape,
    /// Linears.
    pub projections: Vec<Projection>,
    /// Features to tokens.
    pub input: usize,
    /// Encoder.
    pub encoder: Vec<Layer>,
    /// Decoder.
    pub decoder: Vec<Layer>,
    /// Behind the last decoder layer.
    pub norm: Norm,
    /// Tokens to features.
    pub output: usize,
    /// Additive, per kind of attention: encoder, decoder to memory, decoder to the previous layer.
    pub masks: [Vec<f32>; 3],
    /// Position embedding, `[tokens, dim]`.
    pub position: Buffer,
    places: [usize; 2],
}

impl Model {
    /// The model of a configuration that [`UniadConfig::check`] accepts; `layout` as it gives it.
    pub fn new(config: &UniadConfig, isa: Isa) -> Self {
        let layout = config.layout();
        let at: BTreeMap<&str, usize> = layout.iter().enumerate().map(|(i, (name, _))| (name.as_str(), i)).collect();
        // Names come from the same layout: a miss is a bug in this file, not bad input.
        let find = |name: String| -> usize { at.get(name.as_str()).copied().unwrap_or_else(|| panic!("no weight named {name}")) };
        let tokens = config.tokens();
        let shape = Shape { tokens, heads: config.heads, width: config.dim / config.heads };
        let mut projections: Vec<Projection> = Vec::new();
        let mut project = |prefix: &str, names: &[(&str, bool)], source: Source| -> usize {
            let parts: Vec<Part> = names
                .iter()
                .map(|(name, position)| Part {
                    weight: find(format!("{prefix}{name}.weight")),
                    bias: find(format!("{prefix}{name}.bias")),
                    position: *position,
                })
                .collect();
            let [inputs, outputs] = parts.first().map_or([0, 0], |p| layout[p.weight].1.shape());
            let columns = parts.len() * outputs;
            let period = if source == Source::Bias { 1 } else { tokens };
            projections.push(Projection {
                inputs,
                outputs,
                source,
                period,
                table: Buffer::new(period, columns),
                forward: Aligned::zeroed(packed_len(inputs, columns, isa)),
                backward: Aligned::zeroed(packed_len(columns, inputs, isa)),
                query: if matches!(source, Source::Query(_)) { Buffer::new(tokens, inputs) } else { Buffer::default() },
                parts,
            });
            projections.len() - 1
        };
        let norm = |name: String| Norm { scale: find(format!("{name}.weight")), bias: find(format!("{name}.bias")) };
        let input = project("inp", &[("", false)], Source::Bias);
        let mut site = 0;
        // A place for the probabilities or the hidden layer, and one for the output.
        let mut next_site = || {
            site += 2;
            site
        };
        let mut encoder = Vec::new();
        for layer in 0..config.encoder_layers {
            let p = format!("encoder.{layer}");
            encoder.push(Layer {
                attentions: vec![Attention {
                    query: Query::Same,
                    keys: project(&format!("{p}.attn."), &[("q", true), ("k", true), ("v", false)], Source::Position),
                    out: project(&format!("{p}.attn."), &[("o", false)], Source::Bias),
                    mask: 0,
                    norm: norm(format!("{p}.norm1")),
                    site: next_site(),
                }],
                feed_forward: FeedForward {
                    up: project(&format!("{p}.ffn."), &[("up", false)], Source::Bias),
                    down: project(&format!("{p}.ffn."), &[("down", false)], Source::Bias),
                    norm: norm(format!("{p}.norm2")),
                    site: next_site(),
                },
            });
        }
        let mut decoder = Vec::new();
        for layer in 0..config.decoder_layers {
            let p = format!("decoder.{layer}");
            let first = format!("{p}.attn1.");
            let query = if layer == 0 || config.layerwise_query {
                let parameter = find(format!("{p}.query"));
                Query::Learned { projection: project(&first, &[("q", true)], Source::Query(parameter)), parameter }
            } else {
                Query::Rows(project(&first, &[("q", true)], Source::Position))
            };
            let second = format!("{p}.attn2.");
            let keys = [("k", true), ("v", false)];
            decoder.push(Layer {
                attentions: vec![
                    Attention {
                        query,
                        keys: project(&first, &keys, Source::Position),
                        out: project(&first, &[("o", false)], Source::Bias),
                        mask: 1,
                        norm: norm(format!("{p}.norm1")),
                        site: next_site(),
                    },
                    Attention {
                        query: Query::Rows(project(&second, &[("q", true)], Source::Position)),
                        keys: project(&second, &keys, Source::Position),
                        out: project(&second, &[("o", false)], Source::Bias),
                        mask: 2,
                        norm: norm(format!("{p}.norm2")),
                        site: next_site(),
                    },
                ],
                feed_forward: FeedForward {
                    up: project(&format!("{p}.ffn."), &[("up", false)], Source::Bias),
                    down: project(&format!("{p}.ffn."), &[("down", false)], Source::Bias),
                    norm: norm(format!("{p}.norm3")),
                    site: next_site(),
                },
            });
        }
        let output = project("out", &[("", false)], Source::Bias);
        let norm = norm("norm".into());
        let places = [find("col".into()), find("row".into())];
        let mask = |size: usize| additive_mask(shape, &neighbour_mask(config.grid, size));
        let masks = [mask(config.mask.encoder), mask(config.mask.decoder_memory), mask(config.mask.decoder_previous)];
        let position = Buffer::new(tokens, config.dim);
        Self { config: config.clone(), shape, projections, input, encoder, decoder, norm, output, masks, position, places }
    }

    /// Read the weights; `both` also for the backward pass. `split` runs a function over all projections, on several threads perhaps.
    pub fn prepare(
        &mut self,
        isa: Isa,
        parameters: &[Parameter],
        both: bool,
        split: impl FnOnce(&mut [Projection], &(dyn Fn(&mut Projection) + Sync)),
    ) {
        let [rows, cols] = self.config.grid;
        let half = self.config.dim / 2;
        let [col, row] = self.places.map(|at| &parameters[at].value);
        for (token, line) in self.position.data.chunks_exact_mut(self.position.stride).take(rows * cols).enumerate() {
            line[..half].copy_from_slice(&col[token % cols * half..][..half]);
            line[half..2 * half].copy_from_slice(&row[token / cols * half..][..half]);
        }
        let position = &self.position;
        split(&mut self.projections, &|projection: &mut Projection| projection.prepare(isa, parameters, position, both));
    }

    /// Spread the gradient of the position embedding over its two tables.
    pub fn finish_position(&self, gradient: &Buffer, parameters: &mut [Parameter]) {
        let [rows, cols] = self.config.grid;
        let half = self.config.dim / 2;
        for (token, line) in gradient.data.chunks_exact(gradient.stride).take(rows * cols).enumerate() {
            for (at, (index, part)) in self.places.iter().zip([(token % cols, &line[..half]), (token / cols, &line[half..2 * half])]) {
                for (to, g) in parameters[*at].gradient[index * half..][..half].iter_mut().zip(part) {
                    *to += g;
                }
            }
        }
    }
}
