//! Our own executor: a whole model as a list of kernel calls over buffers that were allocated once.
//!
//! [`Plan::build`] lowers an ONNX graph (through [`super::graph`]) or says what it does not know; then tract runs the model instead. Pictures
//! are channels-last inside, so that a 1x1 convolution is a matrix product, a concatenation for the transformer is its token matrix,
//! and Reshape and Transpose are views that cost nothing. A small convolution that one step alone reads is made row by row inside that step, and
//! never written as a picture. Buffers are shared by values whose lives do not overlap. A run allocates nothing.
//!
//! With more than one thread a frame the rows of each large step are shared among a [`Team`]; small steps stay with the caller. Which thread
//! computes a row never changes its value.

use super::graph::{self, Binary, Coordinates, Graph, Id, Op, Reduction, Supported, Unary, row_major, unsupported};
use crate::kernels::aligned::Aligned;
use crate::kernels::attention::{Attention, Rows};
use crate::kernels::attention8::{Attention8, AttentionScratch8};
use crate::kernels::bottleneck::Bottleneck;
use crate::kernels::bottleneck8::{Bottleneck8, BottleneckScratch8, Weights8};
use crate::kernels::depthwise::{Depthwise, Window};
use crate::kernels::gemm::{self, Left, Right, Start};
use crate::kernels::isa::Isa;
use crate::kernels::linear::{Activation, Linear};
use crate::kernels::linear8::{Linear8, Scratch8};
use crate::kernels::loops::{self, Between, Pool};
use crate::kernels::norm::LayerNorm;
use crate::kernels::source::Source as RowSource;
use crate::kernels::team::Team;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tract_onnx::pb;

/// Upper end of a ReLU6.
const RELU6_TOP: f32 = 6.0;
/// Steps of less work (multiply-adds, and [`VALUE_WORK`] for each value read or written) are not shared: at most a few microseconds for one
/// thread, about what it takes to call the others.
const SHARED_WORK: usize = 150_000;
/// Multiply-adds that take about as long as moving a value.
const VALUE_WORK: usize = 8;
/// Parts that a thread's share of a step is cut into, so that one that is done early can help.
const PARTS: usize = 4;
/// Rows of a matrix that stay together: whole tiles of every instruction set.
const TILE_ROWS: usize = 24;
/// Outputs of a single row from which on it is summed row by row: for few, the sums would be written and read again for every input.
const MIN_WEIGHED: usize = 256;
/// Largest weights, in values, of a product that is made row by row: they are read again for each row and have to stay in the first-level cache.
const MAX_MADE_WEIGHTS: usize = 4096;
/// Values that stay together where rows do not matter.
const RUN: usize = 64;

/// A lowered model, shared by all sessions.
#[derive(Debug)]
pub(super) struct Plan {
    steps: Vec<Step>,
    constants: Vec<Arc<[f32]>>,
    /// Length of each buffer.
    buffers: Vec<usize>,
    /// One a shape, as all scratch memory: steps run one after the other.
    attentions: Vec<Attention>,
    attentions8: Vec<AttentionScratch8>,
    bottlenecks8: BottleneckScratch8,
    scratch: usize,
    /// Values of rows that are made when they are wanted.
    made: usize,
    /// Inputs of the widest int8 linear.
    widest8: usize,
    input_len: usize,
    output: Operand,
    /// Multiply-adds of the graph as exported.
    pub multiply_adds: u64,
    /// Instruction set of the kernels.
    pub isa: Isa,
}

/// What one session needs besides the plan.
#[derive(Debug)]
pub(super) struct State {
    buffers: Vec<Aligned<f32>>,
    /// By step: values of the output that are one part of it, for the team.
    chunks: Vec<usize>,
    /// By thread.
    scratches: Vec<Scratch>,
    team: Team,
}

/// What one thread works in.
#[derive(Clone, Debug)]
struct Scratch {
    attentions: Vec<Attention>,
    attentions8: Vec<AttentionScratch8>,
    bottlenecks8: BottleneckScratch8,
    floats: Aligned<f32>,
    made: Aligned<f32>,
    linear8: Scratch8,
}

#[derive(Debug)]
struct Step {
    name: String,
    kind: Kind,
    inputs: Vec<Operand>,
    /// Buffer and length written.
    out: (usize, usize),
}

/// A step for people.
#[derive(Clone, Debug)]
pub(super) struct Description {
    /// Of the value in the ONNX graph.
    pub name: String,
    /// The operator.
    pub kind: &'static str,
    /// What it was made for, elements read and written.
    pub sizes: String,
    /// Products that it sums up; 0 where it does something else.
    pub multiply_adds: u64,
}

#[derive(Clone, Copy, Debug)]
struct Operand {
    source: Source,
    offset: usize,
    len: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Input,
    Buffer(usize),
    Constant(usize),
}

#[derive(Debug)]
enum Kind {
    /// Inputs: x, perhaps a residual.
    Linear(Linear),
    /// Likewise.
    Linear8(Linear8),
    Gather(GatherConv),
    /// One row by a table, `[inputs, outputs]` row-major: rows of weight 0 are skipped.
    Weighed {
        table: Arc<[f32]>,
        bias: Arc<[f32]>,
    },
    /// Likewise, in steps of 8 bit with one scale per output: where there is no integer dot product, one row still reads a quarter.
    Weighed8 {
        table: Arc<[i8]>,
        scale: Arc<[f32]>,
        bias: Arc<[f32]>,
    },
    /// Of two computed matrices: rows of `depth`, and `[depth, columns]`.
    Product {
        depth: usize,
        columns: usize,
    },
    Depthwise(Depthwise),
    /// Inputs: q, k, v.
    Attention {
        index: usize,
        strides: [usize; 3],
        scale: f32,
    },
    /// Likewise; `scratch` is an index.
    Attention8 {
        layer: Attention8,
        scratch: usize,
        strides: [usize; 3],
        scale: f32,
    },
    /// Inputs: x, perhaps a residual. With `made`, x is what that reads: its rows are made when the reader wants them.
    Reader {
        reader: Reader,
        made: Option<Box<Made>>,
    },
    Norm(LayerNorm),
    /// Two inputs of one layout.
    Binary(Binary),
    /// The constant on the right or, when `true`, on the left.
    Scalar(Binary, f32, bool),
    Unary(Unary),
    Resize(Resize),
    /// Over rows of that width.
    Reduce(Reduction, usize),
    /// Of a picture of so many channels.
    GlobalMean(usize),
    /// Inputs: a picture, a value for each of its channels; `true` where those are on the left.
    ByChannel(Binary, bool),
    /// Strided copy into part of the output buffer.
    Copy {
        dims: Vec<CopyDim>,
        to: usize,
    },
}

#[derive(Clone, Copy, Debug)]
struct CopyDim {
    len: usize,
    from: usize,
    to: usize,
}

/// Rows that are made for a [`Reader`].
#[derive(Debug)]
struct Made {
    maker: Maker,
    /// Values of a row.
    line: usize,
    /// Of all rows.
    len: usize,
}

/// A dense convolution of a picture, row by row.
#[derive(Debug)]
enum Maker {
    Gather(GatherConv),
    /// Of 1x1.
    Linear(Linear),
}

/// What reads a picture row by row.
#[derive(Debug)]
enum Reader {
    MaxPool(Pool),
    Bottleneck(Box<Bottleneck>),
    Bottleneck8(Box<Bottleneck8>),
}

impl Reader {
    /// Values of a row of the output.
    fn row(&self) -> usize {
        match self {
            Self::MaxPool(pool) => pool.out_width * pool.channels,
            Self::Bottleneck(layer) => layer.window().output[1] * layer.outputs(),
            Self::Bottleneck8(layer) => layer.window().output[1] * layer.outputs(),
        }
    }

    fn sizes(&self) -> String {
        let bottleneck = |w: Window, inputs, outputs| format!("{inputs}-{}-{outputs} {:?}/{:?} ", w.channels, w.kernel, w.stride);
        match self {
            Self::MaxPool(pool) => format!("{:?}/{:?} ", pool.kernel, pool.stride),
            Self::Bottleneck(layer) => bottleneck(layer.window(), layer.inputs(), layer.outputs()),
            Self::Bottleneck8(layer) => bottleneck(layer.window(), layer.inputs(), layer.outputs()),
        }
    }

    fn describe(&self, made: Option<&Made>) -> (&'static str, String) {
        let name = match (made.map(|made| &made.maker), self) {
            (None, Self::MaxPool(_)) => "MaxPool",
            (None, Self::Bottleneck(_)) => "Bottleneck",
            (None, Self::Bottleneck8(_)) => "Bottleneck int8",
            (Some(Maker::Gather(_)), Self::MaxPool(_)) => "Conv, MaxPool",
            (Some(Maker::Gather(_)), Self::Bottleneck(_)) => "Conv, Bottleneck",
            (Some(Maker::Gather(_)), Self::Bottleneck8(_)) => "Conv, Bottleneck int8",
            (Some(Maker::Linear(_)), Self::MaxPool(_)) => "Linear, MaxPool",
            (Some(Maker::Linear(_)), Self::Bottleneck(_)) => "Linear, Bottleneck",
            (Some(Maker::Linear(_)), Self::Bottleneck8(_)) => "Linear, Bottleneck int8",
        };
        let first = made.map_or(String::new(), |made| format!("{}, ", made.maker.sizes().trim_end()));
        (name, first + &self.sizes())
    }

    /// The two together, where the maker takes the maximum itself while its sums are in registers ([`Linear::run_pooled`]): no row is made.
    fn pooled_linear<'a>(&self, maker: &'a Maker) -> Option<(&'a Linear, Pool)> {
        match (self, maker) {
            (Self::MaxPool(pool), Maker::Linear(linear)) if (pool.kernel, pool.stride) == ([2; 2], [2; 2]) => Some((linear, *pool)),
            _ => None,
        }
    }

    fn multiply_adds(&self) -> usize {
        match self {
            Self::MaxPool(_) => 0,
            Self::Bottleneck(layer) => layer.multiply_adds(),
            Self::Bottleneck8(layer) => layer.multiply_adds(),
        }
    }
}

impl Maker {
    /// The rows of `line` values from `first` on that `out` has room for, each whole.
    fn rows(&self, input: &[f32], line: usize, first: usize, out: &mut [f32], floats: &mut [f32]) {
        match self {
            Self::Gather(conv) => conv.run(input, first, floats, out),
            Self::Linear(linear) => {
                let values = |rows: usize| rows * (line / linear.outputs().max(1)) * linear.inputs();
                linear.run(&input[values(first)..][..values(out.len() / line.max(1))], None, out);
            }
        }
    }

    /// Values that a run gathers.
    fn gathered(&self) -> usize {
        match self {
            Self::Gather(conv) => conv.gathered(),
            Self::Linear(_) => 0,
        }
    }

    fn sizes(&self) -> String {
        match self {
            Self::Gather(conv) => conv.sizes(),
            Self::Linear(linear) => linear_sizes(linear),
        }
    }

    fn inputs(&self) -> usize {
        match self {
            Self::Gather(conv) => conv.linear.inputs(),
            Self::Linear(linear) => linear.inputs(),
        }
    }
}

/// A dense convolution: windows inside the picture are read in place, those on its border are gathered (with zeros) first.
#[derive(Debug)]
struct GatherConv {
    linear: Linear,
    channels: usize,
    input: [usize; 2],
    output: [usize; 2],
    kernel: [usize; 2],
    stride: [usize; 2],
    pad: [usize; 2],
    /// Strides of the input by channel, row, column.
    strides: [usize; 3],
    /// Offset of each weight row's input from the window's first.
    taps: Vec<usize>,
}

/// Bilinear resize of a channels-last picture.
#[derive(Debug)]
struct Resize {
    channels: usize,
    input_width: usize,
    rows: Vec<Between>,
    columns: Vec<Between>,
}

/// Where a value lies while a plan is built.
#[derive(Clone, Debug)]
struct View {
    source: Source,
    offset: usize,
    shape: Vec<usize>,
    strides: Vec<usize>,
}

impl View {
    fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// From the first to the last value, both included.
    fn operand(&self) -> Operand {
        let reach: usize = self.shape.iter().zip(&self.strides).map(|(&dim, &stride)| dim.saturating_sub(1) * stride).sum();
        Operand { source: self.source, offset: self.offset, len: if self.len() == 0 { 0 } else { reach + 1 } }
    }

    /// Whether the values fill their span exactly once, in the order of `strides` (axes of one element do not matter).
    fn has_layout(&self, strides: &[usize]) -> bool {
        self.shape.iter().zip(&self.strides).zip(strides).all(|((&dim, own), wanted)| dim == 1 || own == wanted)
    }

    /// Strides of a dense tensor whose axes lie in memory in the order this view's do.
    fn dense_strides(&self) -> Vec<usize> {
        let mut axes: Vec<usize> = (0..self.shape.len()).collect();
        axes.sort_by_key(|&axis| (std::cmp::Reverse(self.strides[axis]), axis));
        let mut strides = vec![1; axes.len()];
        let mut next = 1;
        for &axis in axes.iter().rev() {
            strides[axis] = next;
            next *= self.shape[axis];
        }
        strides
    }

    /// The same values under another shape, if strides can say it.
    fn reshaped(&self, shape: &[usize]) -> Option<Self> {
        // Pairs of (dimension, stride) without ones, neighbours merged where one runs on into the next.
        let mut merged: Vec<(usize, usize)> = Vec::new();
        for (&dim, &stride) in self.shape.iter().zip(&self.strides).filter(|(dim, _)| **dim != 1) {
            match merged.last_mut() {
                Some((length, last)) if *last == dim * stride => (*length, *last) = (*length * dim, stride),
                _ => merged.push((dim, stride)),
            }
        }
        let mut strides = vec![0; shape.len()];
        let mut runs = merged.iter().rev();
        let mut current: Option<(usize, usize)> = None;
        for axis in (0..shape.len()).rev() {
            if shape[axis] == 1 {
                strides[axis] = 1;
                continue;
            }
            let (left, stride) = match current {
                Some((left, stride)) if left > 1 => (left, stride),
                _ => *runs.next()?,
            };
            if !left.is_multiple_of(shape[axis]) {
                return None;
            }
            strides[axis] = stride;
            current = Some((left / shape[axis], stride * shape[axis]));
        }
        (current.is_none_or(|(left, _)| left == 1) && runs.next().is_none()).then(|| Self {
            source: self.source,
            offset: self.offset,
            shape: shape.to_vec(),
            strides,
        })
    }
}

/// Channels-last strides of `[1, channels, height, width]`.
fn channels_last(shape: &[usize]) -> Option<Vec<usize>> {
    match *shape {
        [1, channels, height, width] => Some(vec![height * width * channels, 1, width * channels, channels]),
        _ => None,
    }
}

/// Weights from ONNX's order, output, channel, position, to the order rows are gathered in: position, channel, output.
fn turned<T: Copy + Default>(weight: &[T], channels: usize, taps: usize, outputs: usize) -> Vec<T> {
    let mut out = vec![T::default(); weight.len()];
    for (i, &value) in weight.iter().enumerate() {
        let (output, channel, tap) = (i / (channels * taps), i / taps % channels, i % taps);
        out[(tap * channels + channel) * outputs + output] = value;
    }
    out
}

struct Builder {
    isa: Isa,
    steps: Vec<Step>,
    constants: Vec<Arc<[f32]>>,
    /// Lengths of the virtual buffers, one a value.
    lengths: Vec<usize>,
    attentions: Vec<Attention>,
    /// With the scratch memory of each shape.
    attentions8: Vec<(Attention8, AttentionScratch8)>,
    bottlenecks8: BottleneckScratch8,
    scratch: usize,
    made: usize,
    widest8: usize,
    views: HashMap<Id, View>,
    /// Convolutions that become part of the step which alone reads them, with their inputs.
    makers: HashMap<Id, (Maker, Operand)>,
}

impl Plan {
    /// Lower the model in `proto` for an input of `shape` and an anomaly map of `grid`.
    ///
    /// # Errors
    /// What in the graph is not known: run it through tract.
    pub fn build(proto: &pb::ModelProto, shape: &[usize; 4], grid: [usize; 2], isa: Isa) -> Supported<Self> {
        let mut graph = Graph::read(proto, shape)?;
        let multiply_adds = graph.multiply_adds();
        graph.optimise(grid, &|bottleneck, input, output| Fusion::of(bottleneck, input, output, isa).is_some());
        let expected = [1, 1, grid[0], grid[1]];
        if graph.nodes[graph.output].shape != expected {
            return unsupported(format!("the output has shape {:?} instead of {expected:?}", graph.nodes[graph.output].shape));
        }
        let mut builder = Builder {
            isa,
            steps: Vec::new(),
            constants: Vec::new(),
            lengths: Vec::new(),
            attentions: Vec::new(),
            attentions8: Vec::new(),
            bottlenecks8: BottleneckScratch8::default(),
            scratch: 0,
            made: 0,
            widest8: 0,
            views: HashMap::new(),
            makers: HashMap::new(),
        };
        let readers = graph.readers();
        for id in graph.order() {
            if let Some(conv) = builder.made(&graph, id, &readers[id]) {
                let maker = builder.maker(&graph, id, conv)?;
                builder.makers.insert(id, maker);
                continue;
            }
            let view = builder.lower(&graph, id)?;
            builder.views.insert(id, view);
        }
        let output = builder.dense(graph.output, &row_major(&expected))?.operand();
        Ok(builder.finish(output, shape.iter().product(), multiply_adds))
    }

    /// Buffers for one session and its team of `threads` threads.
    pub fn state(&self, threads: usize) -> State {
        let team = Team::new(threads);
        let scratch = Scratch {
            attentions: self.attentions.clone(),
            attentions8: self.attentions8.clone(),
            bottlenecks8: self.bottlenecks8.clone(),
            floats: Aligned::zeroed(self.scratch),
            made: Aligned::zeroed(self.made),
            linear8: Scratch8::new(self.widest8),
        };
        State {
            buffers: self.buffers.iter().map(|&len| Aligned::zeroed(len)).collect(),
            chunks: self.steps.iter().map(|step| self.chunk(step, team.threads())).collect(),
            scratches: vec![scratch; team.threads()],
            team,
        }
    }

    /// One inference: the anomaly map, row-major. Allocates nothing.
    pub fn run<'a>(&'a self, state: &'a mut State, input: &'a [f32]) -> &'a [f32] {
        assert_eq!(input.len(), self.input_len, "input of the plan");
        for index in 0..self.steps.len() {
            self.step(index, state, input);
        }
        self.slice(&state.buffers, input, self.output)
    }

    /// As [`Plan::run`], adding each step's time.
    pub fn run_timed(&self, state: &mut State, input: &[f32], times: &mut [Duration]) {
        assert_eq!(input.len(), self.input_len, "input of the plan");
        for (index, time) in times.iter_mut().enumerate().take(self.steps.len()) {
            let started = Instant::now();
            self.step(index, state, input);
            *time += started.elapsed();
        }
    }

    /// Steps in order.
    pub fn describe(&self) -> Vec<Description> {
        self.steps
            .iter()
            .map(|step| {
                let lengths = step.inputs.iter().map(|input| input.len.to_string()).collect::<Vec<_>>().join(" ");
                let (kind, sizes) = step.kind.describe();
                Description {
                    name: step.name.clone(),
                    kind,
                    sizes: format!("{sizes}{lengths} -> {}", step.out.1),
                    multiply_adds: step.kind.multiply_adds(step.inputs.first().map_or(0, |input| input.len), step.out.1) as u64,
                }
            })
            .collect()
    }

    /// How many of the steps compute in integers.
    pub fn integer_steps(&self) -> usize {
        self.steps.iter().filter(|step| step.kind.in_integers()).count()
    }

    /// Bytes of one session's buffers with `threads` threads a frame.
    pub fn session_bytes(&self, threads: usize) -> usize {
        let scratch = 4 * (self.scratch + self.made)
            + Scratch8::new(self.widest8).bytes()
            + self.attentions8.iter().map(AttentionScratch8::bytes).sum::<usize>()
            + self.bottlenecks8.bytes();
        4 * self.buffers.iter().sum::<usize>() + threads.max(1) * scratch
    }

    fn slice<'a>(&'a self, buffers: &'a [Aligned<f32>], input: &'a [f32], operand: Operand) -> &'a [f32] {
        let values = match operand.source {
            Source::Input => input,
            Source::Buffer(index) => &buffers[index],
            Source::Constant(index) => &self.constants[index],
        };
        &values[operand.offset..operand.offset + operand.len]
    }

    fn step(&self, index: usize, state: &mut State, input: &[f32]) {
        let step = &self.steps[index];
        let (buffer, len) = step.out;
        let State { buffers, chunks, scratches, team } = state;
        // Taken out so that inputs can be borrowed beside it; a vector moves by pointer, nothing is copied.
        let mut written = std::mem::take(&mut buffers[buffer]);
        let (out, chunk, buffers) = (&mut written[..len], chunks[index], &*buffers);
        if chunk >= len {
            self.part(step, buffers, input, 0, out, &mut scratches[0]);
        } else {
            team.split(out, chunk, scratches, |part, out, scratch| self.part(step, buffers, input, part * chunk, out, scratch));
        }
        state.buffers[buffer] = written;
    }

    /// Values of the output that one part of a step computes: whole rows, all of them where sharing does not pay.
    fn chunk(&self, step: &Step, threads: usize) -> usize {
        let len = step.out.1;
        let read: usize = step.inputs.iter().map(|input| input.len).sum();
        let work = step.kind.multiply_adds(step.inputs.first().map_or(0, |input| input.len), len) + VALUE_WORK * (read + len);
        let Some(row) = self.row(step).filter(|&row| row > 0 && threads > 1 && work >= SHARED_WORK) else { return len.max(1) };
        let rows = len.div_ceil(row);
        let share = rows.div_ceil(threads);
        let rows = match &step.kind {
            // Each part packs keys and values, or expands the rows around it, again.
            Kind::Attention { .. }
            | Kind::Attention8 { .. }
            | Kind::Reader { reader: Reader::Bottleneck(_) | Reader::Bottleneck8(_), .. } => share,
            Kind::Linear(_) | Kind::Linear8(_) => (share / PARTS).next_multiple_of(TILE_ROWS),
            // Each part packs the right matrix again.
            Kind::Product { .. } => share.next_multiple_of(TILE_ROWS),
            _ => share / PARTS,
        };
        row * rows.max(1)
    }

    /// Values of a row: what a step computes independently of the other rows. None: the step is one piece.
    fn row(&self, step: &Step) -> Option<usize> {
        Some(match &step.kind {
            Kind::Linear(linear) => linear.outputs(),
            Kind::Linear8(linear) => linear.outputs(),
            Kind::Product { columns, .. } => *columns,
            Kind::Weighed { .. } | Kind::Weighed8 { .. } => RUN,
            Kind::Gather(conv) => conv.output[1] * conv.linear.outputs(),
            Kind::Depthwise(depthwise) => depthwise.window().output[1] * depthwise.window().channels,
            Kind::Attention { index, .. } => self.attentions[*index].width(),
            Kind::Attention8 { layer, .. } => layer.width(),
            Kind::Reader { reader, .. } => reader.row(),
            Kind::Norm(norm) => norm.width(),
            Kind::Binary(_) | Kind::Scalar(..) | Kind::Unary(_) | Kind::Reduce(..) => RUN,
            Kind::Resize(resize) => resize.channels * resize.columns.len(),
            Kind::ByChannel(..) => step.inputs[1].len,
            Kind::GlobalMean(_) | Kind::Copy { .. } => return None,
        })
    }

    /// The values from `at` on of a step's output, as many as `out` holds: whole rows ([`Plan::row`]).
    fn part(&self, step: &Step, buffers: &[Aligned<f32>], input: &[f32], at: usize, out: &mut [f32], scratch: &mut Scratch) {
        let arg = |index: usize| self.slice(buffers, input, step.inputs[index]);
        // Of an operand that lies like the output.
        let same = |index: usize| &arg(index)[at..at + out.len()];
        let residual = || (step.inputs.len() > 1).then(|| same(1));
        match &step.kind {
            Kind::Linear(linear) => {
                let rows = |values: usize| values / linear.outputs().max(1) * linear.inputs();
                linear.run(&arg(0)[rows(at)..rows(at + out.len())], residual(), out);
            }
            Kind::Linear8(linear) => {
                let rows = |values: usize| values / linear.outputs().max(1) * linear.inputs();
                linear.run(&arg(0)[rows(at)..rows(at + out.len())], residual(), out, &mut scratch.linear8);
            }
            Kind::Weighed { table, bias } => {
                out.copy_from_slice(&bias[at..at + out.len()]);
                loops::add_weighed_rows(self.isa, arg(0), table, bias.len(), at, out);
            }
            Kind::Weighed8 { table, scale, bias } => {
                out.fill(0.0);
                loops::add_weighed_rows(self.isa, arg(0), table, bias.len(), at, out);
                for ((out, scale), bias) in out.iter_mut().zip(&scale[at..]).zip(&bias[at..]) {
                    *out = *out * scale + bias;
                }
            }
            &Kind::Product { depth, columns } => {
                let (first, rows) = (at / columns.max(1), out.len() / columns.max(1));
                let packed = &mut scratch.floats[..gemm::packed_len(depth, columns, self.isa)];
                gemm::pack(packed, depth, 0, arg(1), columns, self.isa);
                let left = Left::rows(&arg(0)[first * depth..(first + rows) * depth], depth);
                gemm::gemm(self.isa, [rows, columns, depth], left, Right::packed(packed, depth, self.isa), Start::Zero, out, columns);
            }
            Kind::Gather(conv) => conv.run(arg(0), at / (conv.output[1] * conv.linear.outputs()).max(1), &mut scratch.floats, out),
            Kind::Depthwise(depthwise) => {
                let window = depthwise.window();
                depthwise.run_rows(arg(0), at / (window.output[1] * window.channels).max(1), out);
            }
            Kind::Attention { index, strides, scale } => {
                let rows = |operand: usize| Rows { values: arg(operand), stride: strides[operand] };
                let attention = &mut scratch.attentions[*index];
                attention.run_queries(rows(0), rows(1), rows(2), *scale, at / attention.width().max(1), out);
            }
            Kind::Attention8 { layer, scratch: own, strides, scale } => {
                let rows = |operand: usize| Rows { values: arg(operand), stride: strides[operand] };
                layer.run(rows(0), rows(1), rows(2), *scale, at / layer.width().max(1), out, &mut scratch.attentions8[*own]);
            }
            Kind::Norm(norm) => norm.run(same(0), out),
            Kind::Binary(binary) => {
                let (a, b) = (same(0), same(1));
                // One loop an operator, so that each vectorises.
                match binary {
                    Binary::Add => loops::zip(self.isa, a, b, out, |a, b| a + b),
                    Binary::Sub => loops::zip(self.isa, a, b, out, |a, b| a - b),
                    Binary::Mul => loops::zip(self.isa, a, b, out, |a, b| a * b),
                    Binary::Div => loops::zip(self.isa, a, b, out, |a, b| a / b),
                }
            }
            &Kind::Scalar(binary, scalar, left) => {
                let a = same(0);
                match (binary, left) {
                    (Binary::Add, _) => loops::map(self.isa, a, out, |a| a + scalar),
                    (Binary::Mul, _) => loops::map(self.isa, a, out, |a| a * scalar),
                    (other, true) => loops::map(self.isa, a, out, |a| other.apply(scalar, a)),
                    (other, false) => loops::map(self.isa, a, out, |a| other.apply(a, scalar)),
                }
            }
            Kind::Unary(unary) => {
                let a = same(0);
                match unary {
                    Unary::Smooth(kind) => kind.run(a, out, self.isa),
                    Unary::Sqrt => loops::map(self.isa, a, out, f32::sqrt),
                    Unary::Relu => loops::map(self.isa, a, out, |x| if x < 0.0 { 0.0 } else { x }),
                    &Unary::Clip(low, high) => loops::map(self.isa, a, out, |x| x.clamp(low, high)),
                    other => loops::map(self.isa, a, out, |x| other.apply(x)),
                }
            }
            Kind::Resize(resize) => {
                let rows = &resize.rows[at / (resize.channels * resize.columns.len()).max(1)..];
                loops::resize(self.isa, arg(0), resize.input_width * resize.channels, resize.channels, rows, &resize.columns, out);
            }
            &Kind::Reduce(kind, width) => {
                let rows = &arg(0)[at * width..];
                match kind {
                    Reduction::Sum | Reduction::Mean => loops::sum_rows(self.isa, rows, width, out, |x| x),
                    Reduction::Norm => loops::sum_rows(self.isa, rows, width, out, |x| x * x),
                }
                match kind {
                    Reduction::Sum => {}
                    Reduction::Mean => out.iter_mut().for_each(|sum| *sum /= width as f32),
                    Reduction::Norm => out.iter_mut().for_each(|sum| *sum = sum.sqrt()),
                }
            }
            &Kind::GlobalMean(channels) => {
                let picture = arg(0);
                out.fill(0.0);
                for pixel in picture.chunks_exact(channels) {
                    out.iter_mut().zip(pixel).for_each(|(sum, x)| *sum += x);
                }
                let count = (picture.len() / channels) as f32;
                out.iter_mut().for_each(|sum| *sum /= count);
            }
            &Kind::ByChannel(binary, left) => {
                let (picture, channels) = (same(0), arg(1));
                for (out, pixel) in out.chunks_exact_mut(channels.len()).zip(picture.chunks_exact(channels.len())) {
                    match (binary, left) {
                        (Binary::Mul, _) => loops::zip(self.isa, pixel, channels, out, |a, b| a * b),
                        (Binary::Add, _) => loops::zip(self.isa, pixel, channels, out, |a, b| a + b),
                        (other, false) => loops::zip(self.isa, pixel, channels, out, |a, b| other.apply(a, b)),
                        (other, true) => loops::zip(self.isa, pixel, channels, out, |a, b| other.apply(b, a)),
                    }
                }
            }
            Kind::Reader { reader, made } => {
                let Scratch { floats, bottlenecks8, made: room, .. } = scratch;
                let (row, input) = (reader.row().max(1), arg(0));
                if let Some((linear, pool)) = made.as_ref().and_then(|made| reader.pooled_linear(&made.maker)) {
                    let from = pool.width * linear.inputs();
                    for (oy, out) in (at / row..).zip(out.chunks_exact_mut(row)) {
                        linear.run_pooled(&input[2 * oy * from..][..2 * from], pool.width, out);
                    }
                    return;
                }
                let (gathered, floats) = floats.split_at_mut(made.as_ref().map_or(0, |made| made.maker.gathered()));
                let mut make;
                let rows = match made {
                    None => RowSource::Picture(input),
                    Some(made) => {
                        make = |y: usize, out: &mut [f32]| made.maker.rows(input, made.line, y, out, gathered);
                        RowSource::Made { make: &mut make, room }
                    }
                };
                match (reader, rows) {
                    (Reader::MaxPool(pool), RowSource::Picture(input)) => {
                        loops::max_pool(self.isa, input, *pool, at / pool.channels.max(1), out);
                    }
                    (Reader::MaxPool(pool), RowSource::Made { make, room }) => {
                        let room = &mut room[..pool.kernel[0] * pool.width * pool.channels];
                        for (oy, out) in (at / row..).zip(out.chunks_exact_mut(row)) {
                            make(oy * pool.stride[0], room);
                            loops::max_pool(self.isa, room, *pool, 0, out);
                        }
                    }
                    (Reader::Bottleneck(layer), rows) => layer.run(rows, residual(), at / row, out, floats),
                    (Reader::Bottleneck8(layer), rows) => layer.run(rows, residual(), at / row, out, bottlenecks8),
                }
            }
            Kind::Copy { dims, to } => copy(arg(0), &mut out[*to..], dims, self.isa),
        }
    }
}

fn copy(from: &[f32], to: &mut [f32], dims: &[CopyDim], isa: Isa) {
    match dims {
        [] => to[0] = from[0],
        &[CopyDim { len, from: 1, to: 1 }] => to[..len].copy_from_slice(&from[..len]),
        &[dim] => {
            for i in 0..dim.len {
                to[i * dim.to] = from[i * dim.from];
            }
        }
        &[outer, CopyDim { len, from: 1, to: 1 }] => loops::copy_runs(isa, from, to, len, outer.len, [outer.from, outer.to]),
        [first, rest @ ..] => {
            for i in 0..first.len {
                copy(&from[i * first.from..], &mut to[i * first.to..], rest, isa);
            }
        }
    }
}

/// For each output position: lower and higher input position and the weight of the higher.
fn interpolation(input: usize, output: usize, coordinates: Coordinates) -> Vec<Between> {
    let ratio = input as f64 / output as f64;
    (0..output)
        .map(|i| {
            let position = match coordinates {
                Coordinates::AlignCorners if output == 1 => 0.0,
                Coordinates::AlignCorners => i as f64 * (input - 1) as f64 / (output - 1) as f64,
                Coordinates::HalfPixel => (i as f64 + 0.5) * ratio - 0.5,
                Coordinates::Asymmetric => i as f64 * ratio,
            };
            let position = position.clamp(0.0, (input - 1) as f64);
            let low = position as usize;
            (low, (low + 1).min(input - 1), (position - low as f64) as f32)
        })
        .collect()
}

impl GatherConv {
    /// Values that a run gathers.
    fn gathered(&self) -> usize {
        self.output[1] * self.linear.inputs()
    }

    fn sizes(&self) -> String {
        format!("{:?}/{:?} {}x{} ", self.kernel, self.stride, self.channels, self.linear.outputs())
    }

    /// `out` is the rows from `first` on.
    fn run(&self, input: &[f32], first: usize, scratch: &mut [f32], out: &mut [f32]) {
        let (width, outputs) = (self.output[1], self.linear.outputs());
        // Output columns whose window lies inside the picture.
        let inside = |axis: usize| {
            let (kernel, stride, pad) = (self.kernel[axis], self.stride[axis], self.pad[axis]);
            let end = (self.input[axis] + pad).checked_sub(kernel).map_or(0, |room| room / stride + 1).min(self.output[axis]);
            pad.div_ceil(stride).min(end)..end
        };
        let (inner_rows, inner_columns) = (inside(0), inside(1));
        for (oy, line) in (first..).zip(out.chunks_exact_mut(width * outputs)) {
            if !inner_rows.contains(&oy) || inner_columns.is_empty() {
                self.gather(input, scratch, oy, 0..width, line);
                continue;
            }
            let y = oy * self.stride[0] - self.pad[0];
            let x = inner_columns.start * self.stride[1] - self.pad[1];
            let first = y * self.strides[1] + x * self.strides[2];
            let inner = &mut line[inner_columns.start * outputs..inner_columns.end * outputs];
            self.linear.run_scattered(&input[first..], &self.taps, self.stride[1] * self.strides[2], inner);
            for border in [0..inner_columns.start, inner_columns.end..width] {
                let part = &mut line[border.start * outputs..border.end * outputs];
                self.gather(input, scratch, oy, border, part);
            }
        }
    }

    /// Output columns `columns` of row `oy`, through windows copied together.
    fn gather(&self, input: &[f32], scratch: &mut [f32], oy: usize, columns: std::ops::Range<usize>, out: &mut [f32]) {
        let taps = self.linear.inputs();
        let [by_channel, by_row, by_column] = self.strides;
        let rows = &mut scratch[..columns.len() * taps];
        for (ox, window) in columns.zip(rows.chunks_exact_mut(taps.max(1))) {
            let mut values = window.iter_mut();
            for ky in 0..self.kernel[0] {
                let y = (oy * self.stride[0] + ky).checked_sub(self.pad[0]).filter(|&y| y < self.input[0]);
                for kx in 0..self.kernel[1] {
                    let x = (ox * self.stride[1] + kx).checked_sub(self.pad[1]).filter(|&x| x < self.input[1]);
                    let place = y.zip(x).map(|(y, x)| y * by_row + x * by_column);
                    for (c, value) in values.by_ref().take(self.channels).enumerate() {
                        *value = place.map_or(0.0, |place| input[place + c * by_channel]);
                    }
                }
            }
        }
        self.linear.run(rows, None, out);
    }
}

fn linear_sizes(linear: &Linear) -> String {
    format!("{}x{} ", linear.inputs(), linear.outputs())
}

/// Whether a 1x1 convolution is one that runs in integers here.
fn in_integers(conv: &graph::Conv, isa: Isa) -> bool {
    let outputs = conv.bias.len();
    conv.int8.is_some() && Linear8::pays(isa, conv.weight.len() / outputs.max(1), outputs)
}

/// How a [`graph::Bottleneck`] runs as one step.
enum Fusion {
    Float(Window),
    Int8(Window),
}

impl Fusion {
    /// None where its parts are faster one after the other. `input` and `output` are shapes of pictures.
    fn of(bottleneck: &graph::Bottleneck, input: &[usize], output: &[usize], isa: Isa) -> Option<Self> {
        let (&[_, inputs, height, width], &[_, _, rows, columns]) = (input, output) else { return None };
        let graph::Bottleneck { expand, depthwise, project, int8 } = bottleneck;
        let channels = depthwise.bias.len();
        let window = Window {
            channels,
            input: [height, width],
            output: [rows, columns],
            kernel: depthwise.kernel,
            stride: depthwise.stride,
            pad: depthwise.pad,
        };
        if *int8 && Bottleneck8::pays(isa) && Bottleneck8::fits(depthwise.kernel, depthwise.stride, inputs) {
            return Some(Self::Int8(window));
        }
        // In float, unless that would take a product from the integers.
        let all = expand.iter().chain([project]).all(|conv| !in_integers(conv, isa));
        (all && Bottleneck::pays(window)).then_some(Self::Float(window))
    }
}

impl Kind {
    fn describe(&self) -> (&'static str, String) {
        match self {
            Self::Linear(linear) => ("Linear", linear_sizes(linear)),
            Self::Linear8(linear) => ("Linear int8", format!("{}x{} ", linear.inputs(), linear.outputs())),
            Self::Weighed { table, bias } => ("Weighed rows", format!("{}x{} ", table.len() / bias.len().max(1), bias.len())),
            Self::Weighed8 { table, bias, .. } => ("Weighed rows int8", format!("{}x{} ", table.len() / bias.len().max(1), bias.len())),
            Self::Product { depth, columns } => ("Product", format!("{depth}x{columns} ")),
            Self::Gather(conv) => ("Conv", conv.sizes()),
            Self::Depthwise(depthwise) => {
                let window = depthwise.window();
                ("Depthwise", format!("{:?}/{:?} {} channels ", window.kernel, window.stride, window.channels))
            }
            Self::Attention { .. } => ("Attention", String::new()),
            Self::Attention8 { layer, .. } => ("Attention int8", format!("{} tokens ", layer.tokens())),
            Self::Reader { reader, made } => reader.describe(made.as_deref()),
            Self::Norm(norm) => ("LayerNorm", format!("width {} ", norm.width())),
            Self::Binary(binary) => ("Binary", format!("{binary:?} ")),
            Self::Scalar(binary, scalar, _) => ("Scalar", format!("{binary:?} {scalar} ")),
            Self::Unary(unary) => ("Unary", format!("{unary:?} ")),
            Self::Resize(resize) => ("Resize", format!("to {}x{} ", resize.rows.len(), resize.columns.len())),
            Self::Reduce(kind, width) => ("Reduce", format!("{kind:?} over {width} ")),
            Self::GlobalMean(channels) => ("GlobalMean", format!("{channels} channels ")),
            Self::ByChannel(binary, _) => ("ByChannel", format!("{binary:?} ")),
            Self::Copy { .. } => ("Copy", String::new()),
        }
    }
}

impl Kind {
    fn in_integers(&self) -> bool {
        matches!(self, Self::Linear8(_) | Self::Attention8 { .. } | Self::Reader { reader: Reader::Bottleneck8(_), .. })
    }

    /// Of a step that reads `input` values (of its first operand) and writes `output`.
    fn multiply_adds(&self, input: usize, output: usize) -> usize {
        match self {
            Self::Linear(linear) => output * linear.inputs(),
            Self::Linear8(linear) => output * linear.inputs(),
            // As the file has it; rows that are skipped make it less.
            Self::Weighed { .. } | Self::Weighed8 { .. } => input * output,
            Self::Product { depth, .. } => output * depth,
            Self::Gather(conv) => output * conv.linear.inputs(),
            Self::Depthwise(depthwise) => output * depthwise.window().kernel.iter().product::<usize>(),
            Self::Reader { reader, made } => made.as_ref().map_or(0, |made| made.len * made.maker.inputs()) + reader.multiply_adds(),
            Self::Attention8 { layer, .. } => 2 * output * layer.tokens(),
            // All columns of the input's rows but the last one's are part of it.
            Self::Attention { strides, .. } => 2 * output * input.div_ceil(strides[0].max(1)),
            _ => 0,
        }
    }
}

impl Builder {
    fn view(&self, id: Id) -> Supported<View> {
        match self.views.get(&id) {
            Some(view) => Ok(view.clone()),
            None => unsupported("a value is read before it is written"),
        }
    }

    fn constant(&mut self, values: Arc<[f32]>) -> Source {
        self.constants.push(values);
        Source::Constant(self.constants.len() - 1)
    }

    /// A new buffer and the step that fills it.
    fn emit(&mut self, name: &str, kind: Kind, inputs: Vec<Operand>, shape: &[usize], strides: Vec<usize>) -> View {
        let len = shape.iter().product();
        self.lengths.push(len);
        let buffer = self.lengths.len() - 1;
        self.steps.push(Step { name: name.into(), kind, inputs, out: (buffer, len) });
        View { source: Source::Buffer(buffer), offset: 0, shape: shape.to_vec(), strides }
    }

    /// A copy of `view` into `buffer` from `to` on, with the given strides.
    fn copy_step(&mut self, name: &str, view: &View, strides: &[usize], buffer: usize, to: usize) {
        let mut dims: Vec<CopyDim> = view
            .shape
            .iter()
            .zip(&view.strides)
            .zip(strides)
            .filter(|((dim, _), _)| **dim != 1)
            .map(|((&len, &from), &to)| CopyDim { len, from, to })
            .collect();
        dims.sort_by_key(|dim| std::cmp::Reverse(dim.to));
        let mut merged: Vec<CopyDim> = Vec::new();
        for dim in dims {
            match merged.last_mut() {
                Some(last) if last.from == dim.len * dim.from && last.to == dim.len * dim.to => {
                    *last = CopyDim { len: last.len * dim.len, ..dim };
                }
                _ => merged.push(dim),
            }
        }
        let step = Step {
            name: name.into(),
            kind: Kind::Copy { dims: merged, to },
            inputs: vec![view.operand()],
            out: (buffer, self.lengths[buffer]),
        };
        self.steps.push(step);
    }

    /// The value of `id` with exactly these strides, copied if it is not so already.
    fn dense(&mut self, id: Id, strides: &[usize]) -> Supported<View> {
        let view = self.view(id)?;
        if view.has_layout(strides) {
            return Ok(view);
        }
        self.lengths.push(view.len());
        let buffer = self.lengths.len() - 1;
        self.copy_step("(layout)", &view, strides, buffer, 0);
        let copied = View { source: Source::Buffer(buffer), offset: 0, shape: view.shape, strides: strides.to_vec() };
        // Who else wants the value likely wants it the same way.
        self.views.insert(id, copied.clone());
        Ok(copied)
    }

    fn picture(&mut self, id: Id, shape: &[usize]) -> Supported<View> {
        match channels_last(shape) {
            Some(strides) => self.dense(id, &strides),
            None => unsupported(format!("a picture of shape {shape:?}")),
        }
    }

    fn lower(&mut self, graph: &Graph, id: Id) -> Supported<View> {
        let node = &graph.nodes[id];
        let shape = &node.shape;
        let input = |index: usize| node.inputs[index];
        let input_shape = |index: usize| graph.nodes[node.inputs[index]].shape.as_slice();
        Ok(match &node.op {
            Op::Input => View { source: Source::Input, offset: 0, shape: shape.clone(), strides: row_major(shape) },
            Op::Const(values) => View { source: self.constant(values.clone()), offset: 0, shape: shape.clone(), strides: row_major(shape) },
            Op::Reshape => {
                let view = self.view(input(0))?;
                match view.reshaped(shape) {
                    Some(view) => view,
                    None => {
                        let dense = self.dense(input(0), &row_major(input_shape(0)))?;
                        View { shape: shape.clone(), strides: row_major(shape), ..dense }
                    }
                }
            }
            Op::Transpose(perm) => {
                let view = self.view(input(0))?;
                View { shape: shape.clone(), strides: perm.iter().map(|&axis| view.strides[axis]).collect(), ..view }
            }
            Op::Columns(start) => {
                let view = self.view(input(0))?;
                View { offset: view.offset + start, shape: shape.clone(), ..view }
            }
            Op::Linear(linear) => {
                let x = self.dense(input(0), &row_major(input_shape(0)))?.operand();
                // A single row reads each weight once: packing them gains nothing, and what a gate has closed need not be read at all.
                let outputs = linear.bias.len();
                let plain = linear.activation == Activation::None && node.inputs.len() == 1;
                if plain && shape.iter().product::<usize>() == outputs && outputs >= MIN_WEIGHED {
                    let bias: Arc<[f32]> = linear.bias.clone().into();
                    let kind = match &linear.int8 {
                        None => Some(Kind::Weighed { table: linear.weight.clone(), bias }),
                        Some(_) if Linear8::pays(self.isa, linear.weight.len() / outputs, outputs) => None,
                        Some(int8) => Some(Kind::Weighed8 { table: int8.weight.clone(), scale: int8.scale.clone().into(), bias }),
                    };
                    if let Some(kind) = kind {
                        return Ok(self.emit(&node.name, kind, vec![x], shape, row_major(shape)));
                    }
                }
                let mut inputs = vec![x];
                if node.inputs.len() > 1 {
                    inputs.push(self.dense(input(1), &row_major(shape))?.operand());
                }
                let kind = self.linear(&linear.weight, linear.int8.as_ref(), &linear.bias, linear.activation);
                self.emit(&node.name, kind, inputs, shape, row_major(shape))
            }
            Op::Conv(conv) => self.conv(graph, id, conv)?,
            Op::Bottleneck(bottleneck) => self.bottleneck(graph, id, bottleneck)?,
            Op::Attention(attention) => {
                let width = attention.heads * attention.head_width;
                let mut operands = Vec::new();
                let mut strides = [0; 3];
                for (index, stride) in strides.iter_mut().enumerate() {
                    let mut view = self.view(input(index))?;
                    // Rows may be part of wider ones; within a row values must be neighbours.
                    let is_rows =
                        |view: &View| view.strides.last() == Some(&1) && view.shape.len() >= 2 && view.shape[view.shape.len() - 1] == width;
                    if !is_rows(&view) {
                        view = self.dense(input(index), &row_major(input_shape(index)))?;
                    }
                    *stride = view.strides[view.strides.len() - 2];
                    operands.push(view.operand());
                }
                let kind = self.attention(attention, strides);
                self.emit(&node.name, kind, operands, shape, row_major(shape))
            }
            Op::LayerNorm { gamma, beta, epsilon } => {
                let x = self.dense(input(0), &row_major(shape))?.operand();
                self.emit(&node.name, Kind::Norm(LayerNorm::new(gamma, beta, *epsilon, self.isa)), vec![x], shape, row_major(shape))
            }
            Op::Unary(unary) => {
                let view = self.view(input(0))?;
                let strides = view.dense_strides();
                let x = self.dense(input(0), &strides)?.operand();
                self.emit(&node.name, Kind::Unary(*unary), vec![x], shape, strides)
            }
            Op::Binary(binary) => self.binary(graph, id, *binary)?,
            Op::Resize(coordinates) => {
                let (&[_, channels, height, width], &[_, _, rows, columns]) = (input_shape(0), &shape[..]) else {
                    return unsupported("resize");
                };
                let x = self.picture(input(0), input_shape(0))?.operand();
                let resize = Resize {
                    channels,
                    input_width: width,
                    rows: interpolation(height, rows, *coordinates),
                    columns: interpolation(width, columns, *coordinates),
                };
                self.emit(&node.name, Kind::Resize(resize), vec![x], shape, channels_last(shape).unwrap_or_default())
            }
            Op::MaxPool { kernel, stride } => {
                let (&[_, channels, _, width], &[_, _, _, out_width]) = (input_shape(0), &shape[..]) else {
                    return unsupported("pool");
                };
                let pool = Pool { width, out_width, channels, kernel: *kernel, stride: *stride };
                let (kind, x) = self.reader(Reader::MaxPool(pool), input(0), input_shape(0))?;
                self.emit(&node.name, kind, vec![x], shape, channels_last(shape).unwrap_or_default())
            }
            Op::Concat(axis) => {
                let strides = channels_last(shape).unwrap_or_else(|| row_major(shape));
                self.lengths.push(shape.iter().product());
                let buffer = self.lengths.len() - 1;
                let mut start = 0;
                for &part in &node.inputs {
                    let view = self.view(part)?;
                    self.copy_step(&node.name, &view, &strides, buffer, start * strides[*axis]);
                    start += view.shape[*axis];
                }
                View { source: Source::Buffer(buffer), offset: 0, shape: shape.clone(), strides }
            }
            Op::Reduce { kind, axis } => {
                // The reduced axis innermost, the others in row-major order: the result is row-major whatever its shape.
                let outer = input_shape(0);
                let width = outer[*axis];
                let mut rest = outer.to_vec();
                rest[*axis] = 1;
                let mut strides: Vec<usize> = row_major(&rest).iter().map(|stride| stride * width).collect();
                strides[*axis] = 1;
                let x = self.dense(input(0), &strides)?.operand();
                self.emit(&node.name, Kind::Reduce(*kind, width.max(1)), vec![x], shape, row_major(shape))
            }
            Op::GlobalMean => {
                let x = self.picture(input(0), input_shape(0))?.operand();
                let channels = input_shape(0).get(1).copied().unwrap_or(1).max(1);
                self.emit(&node.name, Kind::GlobalMean(channels), vec![x], shape, row_major(shape))
            }
            Op::MatMul => {
                let (&[_, depth], &[_, columns]) = (input_shape(0), input_shape(1)) else {
                    return unsupported(format!("`{}` multiplies batches and is no attention that is known", node.name));
                };
                let a = self.dense(input(0), &row_major(input_shape(0)))?.operand();
                let b = self.dense(input(1), &row_major(input_shape(1)))?.operand();
                self.scratch = self.scratch.max(gemm::packed_len(depth, columns, self.isa));
                self.emit(&node.name, Kind::Product { depth, columns }, vec![a, b], shape, row_major(shape))
            }
            Op::Softmax => return unsupported(format!("`{}` is no attention that is known", node.name)),
        })
    }

    /// In integers where the file has them and this machine is faster with them, else in float.
    fn linear(&mut self, weight: &[f32], int8: Option<&graph::Int8>, bias: &[f32], activation: Activation) -> Kind {
        let inputs = weight.len() / bias.len().max(1);
        match int8 {
            Some(int8) if Linear8::pays(self.isa, inputs, bias.len()) => {
                self.widest8 = self.widest8.max(inputs);
                Kind::Linear8(Linear8::new(&int8.weight, &int8.scale, bias, inputs, activation, self.isa))
            }
            _ => Kind::Linear(Linear::new(weight, bias, inputs, bias.len(), activation, self.isa)),
        }
    }

    /// Likewise. Attentions of one shape share their scratch memory.
    fn attention(&mut self, a: &graph::Attention, strides: [usize; 3]) -> Kind {
        let scale = a.scale;
        if a.int8 && Attention8::pays(self.isa) {
            let layer = Attention8::new(a.grid, a.heads, a.head_width, a.window, self.isa);
            let scratch = self.attentions8.iter().position(|(other, _)| other.same_shape(&layer)).unwrap_or_else(|| {
                self.attentions8.push((layer.clone(), layer.scratch()));
                self.attentions8.len() - 1
            });
            return Kind::Attention8 { layer, scratch, strides, scale };
        }
        let new = Attention::new(a.grid, a.heads, a.head_width, a.window, self.isa);
        let index = self.attentions.iter().position(|other| other.same_shape(&new)).unwrap_or_else(|| {
            self.attentions.push(new);
            self.attentions.len() - 1
        });
        Kind::Attention { index, strides, scale }
    }

    fn bottleneck(&mut self, graph: &Graph, id: Id, bottleneck: &graph::Bottleneck) -> Supported<View> {
        let node = &graph.nodes[id];
        let x = node.inputs[0];
        let input_shape = &graph.nodes[x].shape;
        let reader = match (Fusion::of(bottleneck, input_shape, &node.shape, self.isa), &input_shape[..]) {
            (Some(Fusion::Float(window)), &[_, inputs, ..]) => {
                let linear = |conv: &graph::Conv, inputs| {
                    let weight = turned(&conv.weight, inputs, 1, conv.bias.len());
                    Linear::new(&weight, &conv.bias, inputs, conv.bias.len(), conv.activation, self.isa)
                };
                let own = &bottleneck.depthwise;
                let depthwise = Depthwise::new(&own.weight, &own.bias, window, own.activation, self.isa);
                let expand = bottleneck.expand.as_ref().map(|expand| linear(expand, inputs));
                Reader::Bottleneck(Box::new(Bottleneck::new(expand, depthwise, linear(&bottleneck.project, window.channels))))
            }
            (Some(Fusion::Int8(window)), &[_, inputs, ..]) => Reader::Bottleneck8(Box::new(self.bottleneck8(bottleneck, window, inputs)?)),
            _ => return unsupported("an inverted bottleneck"),
        };
        let (kind, operand) = self.reader(reader, x, input_shape)?;
        let mut operands = vec![operand];
        if let Some(&residual) = node.inputs.get(1) {
            operands.push(self.picture(residual, &node.shape)?.operand());
        }
        let strides = channels_last(&node.shape).unwrap_or_default();
        Ok(self.emit(&node.name, kind, operands, &node.shape, strides))
    }

    fn bottleneck8(&mut self, bottleneck: &graph::Bottleneck, window: Window, inputs: usize) -> Supported<Bottleneck8> {
        // ONNX has outputs first; a product wants inputs first.
        let turn = |conv: &graph::Conv, inputs: usize| {
            conv.int8.as_ref().map(|int8| (turned(&int8.weight, inputs, 1, conv.bias.len()), int8.scale.clone()))
        };
        let depthwise = &bottleneck.depthwise;
        let expand = bottleneck.expand.as_ref().map(|conv| (turn(conv, inputs), conv));
        let (Some((project, project_scale)), Some(own)) = (turn(&bottleneck.project, window.channels), depthwise.int8.as_ref()) else {
            return unsupported("an inverted bottleneck in float");
        };
        let expand = match &expand {
            None => None,
            Some((Some((weight, scale)), conv)) => Some(Weights8 { weight, scale, bias: &conv.bias }),
            Some((None, _)) => return unsupported("an inverted bottleneck in float"),
        };
        let layer = Bottleneck8::new(
            expand,
            Weights8 { weight: &own.weight, scale: &own.scale, bias: &depthwise.bias },
            Weights8 { weight: &project, scale: &project_scale, bias: &bottleneck.project.bias },
            window,
            (&vec![RELU6_TOP; window.channels], RELU6_TOP),
            self.isa,
        );
        self.bottlenecks8.fit(&layer);
        Ok(layer)
    }

    /// The convolution at `id`, if its rows are best made when the one step that reads them wants them: what lies in between is then never written.
    fn made<'a>(&self, graph: &'a Graph, id: Id, readers: &[Id]) -> Option<&'a graph::Conv> {
        let (node, &[reader]) = (&graph.nodes[id], readers) else { return None };
        let (Op::Conv(conv), [_]) = (&node.op, &node.inputs[..]) else { return None };
        if conv.depthwise || (conv.is_pointwise() && in_integers(conv, self.isa)) || conv.weight.len() > MAX_MADE_WEIGHTS {
            return None;
        }
        let reads = match &graph.nodes[reader].op {
            Op::MaxPool { kernel, stride } => kernel[0] <= stride[0],
            Op::Bottleneck(bottleneck) => bottleneck.expand.is_none() && graph.nodes[reader].inputs[0] == id,
            _ => false,
        };
        reads.then_some(conv)
    }

    /// The step of `reader` on the picture `x` of `shape`, and what it reads: the picture, or what its maker reads.
    fn reader(&mut self, reader: Reader, x: Id, shape: &[usize]) -> Supported<(Kind, Operand)> {
        let Some((maker, operand)) = self.makers.remove(&x) else {
            if let Reader::Bottleneck(layer) = &reader {
                self.scratch = self.scratch.max(layer.scratch_len());
            }
            return Ok((Kind::Reader { reader, made: None }, self.picture(x, shape)?.operand()));
        };
        let &[_, channels, height, width] = shape else { return unsupported("rows of no picture") };
        let line = width * channels;
        let (at_once, own) = match &reader {
            _ if reader.pooled_linear(&maker).is_some() => (0, 0),
            Reader::MaxPool(pool) => (pool.kernel[0], 0),
            Reader::Bottleneck(layer) => (1, layer.scratch_len_made()),
            Reader::Bottleneck8(_) => (1, 0),
        };
        self.made = self.made.max(at_once * line);
        self.scratch = self.scratch.max(maker.gathered() + own);
        Ok((Kind::Reader { reader, made: Some(Box::new(Made { maker, line, len: height * line })) }, operand))
    }

    fn conv(&mut self, graph: &Graph, id: Id, conv: &graph::Conv) -> Supported<View> {
        let node = &graph.nodes[id];
        let x = node.inputs[0];
        let (&[_, channels, height, width], &[_, outputs, rows, columns]) = (&graph.nodes[x].shape[..], &node.shape[..]) else {
            return unsupported("convolution");
        };
        let strides = channels_last(&node.shape).unwrap_or_default();
        if conv.depthwise {
            let operand = self.picture(x, &graph.nodes[x].shape)?.operand();
            let window = Window {
                channels,
                input: [height, width],
                output: [rows, columns],
                kernel: conv.kernel,
                stride: conv.stride,
                pad: conv.pad,
            };
            let kernel = Depthwise::new(&conv.weight, &conv.bias, window, conv.activation, self.isa);
            return Ok(self.emit(&node.name, Kind::Depthwise(kernel), vec![operand], &node.shape, strides));
        }
        if conv.is_pointwise() && [rows, columns] == [height, width] {
            let mut inputs = vec![self.picture(x, &graph.nodes[x].shape)?.operand()];
            if let Some(&residual) = node.inputs.get(1) {
                inputs.push(self.picture(residual, &node.shape)?.operand());
            }
            let weight = turned(&conv.weight, channels, 1, outputs);
            let int8 = conv
                .int8
                .as_ref()
                .map(|int8| graph::Int8 { weight: turned(&int8.weight, channels, 1, outputs).into(), scale: int8.scale.clone() });
            let kind = self.linear(&weight, int8.as_ref(), &conv.bias, conv.activation);
            return Ok(self.emit(&node.name, kind, inputs, &node.shape, strides));
        }
        if node.inputs.len() > 1 {
            return unsupported("a padded 1x1 convolution with a residual");
        }
        let (gather, operand) = self.gather(graph, id, conv)?;
        self.scratch = self.scratch.max(gather.gathered());
        Ok(self.emit(&node.name, Kind::Gather(gather), vec![operand], &node.shape, strides))
    }

    /// The dense convolution at `id` in float, row by row, and what it reads.
    fn maker(&mut self, graph: &Graph, id: Id, conv: &graph::Conv) -> Supported<(Maker, Operand)> {
        let node = &graph.nodes[id];
        let x = node.inputs[0];
        let (from, outputs) = (&graph.nodes[x].shape, conv.bias.len());
        if conv.is_pointwise() && from.get(2..) == node.shape.get(2..) {
            let inputs = conv.weight.len() / outputs.max(1);
            let linear = Linear::new(&turned(&conv.weight, inputs, 1, outputs), &conv.bias, inputs, outputs, conv.activation, self.isa);
            return Ok((Maker::Linear(linear), self.picture(x, from)?.operand()));
        }
        let (gather, operand) = self.gather(graph, id, conv)?;
        Ok((Maker::Gather(gather), operand))
    }

    /// The dense convolution at `id` in float by windows, and what it reads.
    fn gather(&mut self, graph: &Graph, id: Id, conv: &graph::Conv) -> Supported<(GatherConv, Operand)> {
        let node = &graph.nodes[id];
        let x = node.inputs[0];
        let (&[_, channels, height, width], &[_, outputs, rows, columns]) = (&graph.nodes[x].shape[..], &node.shape[..]) else {
            return unsupported("convolution");
        };
        // ONNX has [outputs, channels, height, width]; rows are gathered by position, then channel.
        let taps = conv.kernel[0] * conv.kernel[1];
        let weight: Vec<f32> = turned(&conv.weight, channels, taps, outputs);
        let linear = Linear::new(&weight, &conv.bias, channels * taps, outputs, conv.activation, self.isa);
        let view = self.view(x)?;
        let gather = GatherConv {
            linear,
            channels,
            input: [height, width],
            output: [rows, columns],
            kernel: conv.kernel,
            stride: conv.stride,
            pad: conv.pad,
            strides: [view.strides[1], view.strides[2], view.strides[3]],
            taps: (0..taps * channels)
                .map(|at| {
                    let (tap, channel) = (at / channels, at % channels);
                    channel * view.strides[1] + tap / conv.kernel[1] * view.strides[2] + tap % conv.kernel[1] * view.strides[3]
                })
                .collect(),
        };
        Ok((gather, view.operand()))
    }

    fn binary(&mut self, graph: &Graph, id: Id, binary: Binary) -> Supported<View> {
        let node = &graph.nodes[id];
        let shape = &node.shape;
        let constant = |index: usize| match &graph.nodes[node.inputs[index]].op {
            Op::Const(values) => Some(values.clone()),
            _ => None,
        };
        // The operand that sets the layout: one that is computed and has the result's shape.
        let leads = |index: usize| constant(index).is_none() && graph.nodes[node.inputs[index]].shape == *shape;
        let (main, other) = if leads(0) {
            (0, 1)
        } else if leads(1) {
            (1, 0)
        } else {
            return unsupported(format!("`{}` broadcasts both sides", node.name));
        };
        let strides = self.view(node.inputs[main])?.dense_strides();
        let x = self.dense(node.inputs[main], &strides)?.operand();
        if let Some(values) = constant(other) {
            if let [scalar] = values[..] {
                return Ok(self.emit(&node.name, Kind::Scalar(binary, scalar, other == 0), vec![x], shape, strides));
            }
            // Spread once, in the memory order of the other side.
            let Some(spread) = graph::broadcast(&values, &graph.nodes[node.inputs[other]].shape, shape) else {
                return unsupported(format!("`{}` does not broadcast", node.name));
            };
            let mut turned = vec![0.0; spread.len()];
            let view = View { source: Source::Input, offset: 0, shape: shape.clone(), strides: row_major(shape) };
            let dims: Vec<CopyDim> =
                view.shape.iter().zip(&view.strides).zip(&strides).map(|((&len, &from), &to)| CopyDim { len, from, to }).collect();
            copy(&spread, &mut turned, &dims, self.isa);
            let source = self.constant(turned.into());
            let spread = Operand { source, offset: 0, len: shape.iter().product() };
            let inputs = if main == 0 { vec![x, spread] } else { vec![spread, x] };
            return Ok(self.emit(&node.name, Kind::Binary(binary), inputs, shape, strides));
        }
        let by_channel =
            matches!((&shape[..], &graph.nodes[node.inputs[other]].shape[..]), (&[1, c, _, _], &[1, same, 1, 1]) if c == same && c > 0);
        if by_channel && graph.nodes[node.inputs[other]].shape != *shape {
            let x = self.picture(node.inputs[main], shape)?.operand();
            let y = self.view(node.inputs[other])?;
            let y = self.dense(node.inputs[other], &row_major(&y.shape))?.operand();
            let strides = channels_last(shape).unwrap_or_default();
            return Ok(self.emit(&node.name, Kind::ByChannel(binary, main == 1), vec![x, y], shape, strides));
        }
        if graph.nodes[node.inputs[other]].shape != *shape {
            return unsupported(format!("`{}` broadcasts a computed value", node.name));
        }
        let y = self.dense(node.inputs[other], &strides)?.operand();
        let inputs = if main == 0 { vec![x, y] } else { vec![y, x] };
        Ok(self.emit(&node.name, Kind::Binary(binary), inputs, shape, strides))
    }

    /// Give values whose lives do not overlap the same buffer.
    fn finish(mut self, output: Operand, input_len: usize, multiply_adds: u64) -> Plan {
        let mut last_use = vec![0; self.lengths.len()];
        for (index, step) in self.steps.iter().enumerate() {
            for input in &step.inputs {
                if let Source::Buffer(buffer) = input.source {
                    last_use[buffer] = index;
                }
            }
            last_use[step.out.0] = last_use[step.out.0].max(index);
        }
        if let Source::Buffer(buffer) = output.source {
            last_use[buffer] = usize::MAX;
        }
        let mut real: Vec<Option<usize>> = vec![None; self.lengths.len()];
        let mut buffers: Vec<usize> = Vec::new();
        let mut free: Vec<usize> = Vec::new();
        for index in 0..self.steps.len() {
            let written = self.steps[index].out.0;
            if real[written].is_none() {
                let len = self.lengths[written];
                // The smallest that fits, else the largest, which then grows least.
                let chosen = free
                    .iter()
                    .enumerate()
                    .min_by_key(
                        |&(_, &buffer)| if buffers[buffer] >= len { (0, buffers[buffer]) } else { (1, usize::MAX - buffers[buffer]) },
                    )
                    .map(|(place, _)| place);
                let buffer = match chosen {
                    Some(place) => free.swap_remove(place),
                    None => {
                        buffers.push(0);
                        buffers.len() - 1
                    }
                };
                buffers[buffer] = buffers[buffer].max(len);
                real[written] = Some(buffer);
            }
            // Inputs are free only after the step: a step never writes what it reads.
            for (value, _) in last_use.iter().enumerate().filter(|(_, last)| **last == index) {
                free.extend(real[value]);
            }
        }
        let place = |source: Source| match source {
            Source::Buffer(buffer) => Source::Buffer(real[buffer].unwrap_or(0)),
            other => other,
        };
        for step in &mut self.steps {
            step.out.0 = real[step.out.0].unwrap_or(0);
            for input in &mut step.inputs {
                input.source = place(input.source);
            }
        }
        Plan {
            steps: self.steps,
            constants: self.constants,
            buffers,
            attentions: self.attentions,
            attentions8: self.attentions8.into_iter().map(|(_, scratch)| scratch).collect(),
            bottlenecks8: self.bottlenecks8,
            scratch: self.scratch,
            made: self.made,
            widest8: self.widest8,
            input_len,
            output: Operand { source: place(output.source), ..output },
            multiply_adds,
            isa: self.isa,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::anomaly::AnomalyMap;
    use crate::model::bundle::{Bundle, BundleMeta, INPUT, OUTPUT};
    use crate::model::runtime::{EngineChoice, Model};
    use crate::model::testing::{GRID, INPUT_PX, ints, tiny_bundle, tiny_graph, tiny_meta};
    use prost::Message;
    use std::path::Path;
    use tract_onnx::pb::attribute_proto::AttributeType;
    use tract_onnx::pb::tensor_proto::DataType;
    use tract_onnx::pb::{AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto};

    /// Writes small models node by node, with made-up weights.
    struct Writer {
        graph: GraphProto,
        seed: u64,
    }

    impl Writer {
        fn new() -> Self {
            Self { graph: GraphProto { node: vec![], initializer: vec![], ..tiny_graph().graph.unwrap() }, seed: 1 }
        }

        fn node(&mut self, op: &str, inputs: &[&str], attributes: Vec<AttributeProto>) -> String {
            let output = format!("v{}", self.graph.node.len());
            self.graph.node.push(NodeProto {
                op_type: op.into(),
                input: inputs.iter().map(|name| name.to_string()).collect(),
                output: vec![output.clone()],
                attribute: attributes,
                ..NodeProto::default()
            });
            output
        }

        fn floats(&mut self, shape: &[usize], values: Vec<f32>) -> String {
            assert_eq!(values.len(), shape.iter().product::<usize>());
            let name = format!("c{}", self.graph.initializer.len());
            self.graph.initializer.push(TensorProto {
                name: name.clone(),
                dims: shape.iter().map(|&dim| dim as i64).collect(),
                data_type: DataType::Float as i32,
                float_data: values,
                ..TensorProto::default()
            });
            name
        }

        fn random(&mut self, shape: &[usize], size: f32) -> String {
            let count = shape.iter().product();
            let mut next = || {
                self.seed = self.seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                ((self.seed >> 40) as f32 / (1u32 << 23) as f32 - 1.0) * size
            };
            let values = (0..count).map(|_| next()).collect();
            self.floats(shape, values)
        }

        fn integers(&mut self, values: &[i64]) -> String {
            let name = format!("c{}", self.graph.initializer.len());
            self.graph.initializer.push(TensorProto {
                name: name.clone(),
                dims: vec![values.len() as i64],
                data_type: DataType::Int64 as i32,
                int64_data: values.to_vec(),
                ..TensorProto::default()
            });
            name
        }

        fn conv(&mut self, x: &str, [inputs, outputs, kernel, stride]: [usize; 4], pads: [i64; 4], depthwise: bool) -> String {
            let per_group = if depthwise { 1 } else { inputs };
            let weight = self.random(&[outputs, per_group, kernel, kernel], 1.5 / (per_group as f32 * (kernel * kernel) as f32).sqrt());
            let bias = self.random(&[outputs], 0.5);
            let group = AttributeProto {
                name: "group".into(),
                r#type: AttributeType::Int as i32,
                i: if depthwise { inputs as i64 } else { 1 },
                ..AttributeProto::default()
            };
            self.node("Conv", &[x, &weight, &bias], vec![group, ints("pads", &pads), ints("strides", &[stride as i64; 2])])
        }

        fn relu6(&mut self, x: &str) -> String {
            let (zero, six) = (self.floats(&[], vec![0.0]), self.floats(&[], vec![6.0]));
            self.node("Clip", &[x, &zero, &six], vec![])
        }

        fn resize(&mut self, x: &str, channels: usize) -> String {
            let sizes = self.integers(&[1, channels as i64, GRID[0] as i64, GRID[1] as i64]);
            let text = |name: &str, value: &str| AttributeProto {
                name: name.into(),
                r#type: AttributeType::String as i32,
                s: value.into(),
                ..AttributeProto::default()
            };
            self.node("Resize", &[x, "", "", &sizes], vec![text("mode", "linear"), text("coordinate_transformation_mode", "align_corners")])
        }

        fn reshape(&mut self, x: &str, shape: &[i64]) -> String {
            let shape = self.integers(shape);
            self.node("Reshape", &[x, &shape], vec![])
        }

        fn linear(&mut self, x: &str, inputs: usize, outputs: usize) -> String {
            let weight = self.random(&[inputs, outputs], 1.0 / (inputs as f32).sqrt());
            let bias = self.random(&[outputs], 0.3);
            let product = self.node("MatMul", &[x, &weight], vec![]);
            self.node("Add", &[&product, &bias], vec![])
        }

        fn norm(&mut self, x: &str, width: usize) -> String {
            let (gamma, beta) = (self.random(&[width], 1.0), self.random(&[width], 0.2));
            self.node("LayerNormalization", &[x, &gamma, &beta], vec![])
        }

        fn attention(
            &mut self,
            [query, key, value]: [&str; 3],
            width: usize,
            heads: usize,
            mask: Option<&str>,
            scale_after: bool,
        ) -> String {
            let (tokens, each) = ((GRID[0] * GRID[1]) as i64, (width / heads) as i64);
            let shape = [tokens, heads as i64, each];
            let mut parts = Vec::new();
            for (x, perm) in [(query, [1, 0, 2]), (key, [1, 2, 0]), (value, [1, 0, 2])] {
                let projected = self.linear(x, width, width);
                let split = self.reshape(&projected, &shape);
                parts.push(self.node("Transpose", &[&split], vec![ints("perm", &perm)]));
            }
            let scale = self.floats(&[1], vec![1.0 / (each as f32).sqrt()]);
            if !scale_after {
                parts[0] = self.node("Mul", &[&parts[0], &scale], vec![]);
            }
            let mut scores = self.node("MatMul", &[&parts[0], &parts[1]], vec![]);
            if scale_after {
                scores = self.node("Mul", &[&scores, &scale], vec![]);
            }
            if let Some(mask) = mask {
                scores = self.node("Add", &[&scores, mask], vec![]);
            }
            let weights = self.node("Softmax", &[&scores], vec![]);
            let mixed = self.node("MatMul", &[&weights, &parts[2]], vec![]);
            let joined = self.node("Transpose", &[&mixed], vec![ints("perm", &[1, 0, 2])]);
            let joined = self.reshape(&joined, &[tokens, width as i64]);
            self.linear(&joined, width, width)
        }

        fn mask(&mut self, reach: usize) -> String {
            let tokens = GRID[0] * GRID[1];
            let near = |i: usize, j: usize| (i / GRID[1]).abs_diff(j / GRID[1]) <= reach && (i % GRID[1]).abs_diff(j % GRID[1]) <= reach;
            let values = (0..tokens * tokens).map(|at| if near(at / tokens, at % tokens) { -1e9 } else { 0.0 }).collect();
            self.floats(&[1, tokens, tokens], values)
        }

        fn finish(mut self, last: &str) -> ModelProto {
            for node in &mut self.graph.node {
                for output in node.output.iter_mut().filter(|name| *name == last) {
                    *output = OUTPUT.into();
                }
            }
            ModelProto { graph: Some(self.graph), ..tiny_graph() }
        }
    }

    /// A small UniAD behind a small mobile network: every operator and fusion of the real one.
    fn small_uniad() -> ModelProto {
        let mut w = Writer::new();
        let stem = w.conv(INPUT, [3, 8, 3, 2], [0, 0, 1, 1], false);
        let stem = w.relu6(&stem);
        let depthwise = w.conv(&stem, [8, 8, 3, 1], [1, 1, 1, 1], true);
        let depthwise = w.relu6(&depthwise);
        let project = w.conv(&depthwise, [8, 8, 1, 1], [0; 4], false);
        let f2 = w.node("Add", &[&stem, &project], vec![]);
        let expand = w.conv(&f2, [8, 24, 1, 1], [0; 4], false);
        let expand = w.relu6(&expand);
        let strided = w.conv(&expand, [24, 24, 5, 2], [1, 1, 2, 2], true);
        let strided = w.relu6(&strided);
        let f4 = w.conv(&strided, [24, 12, 1, 1], [0; 4], false);
        let pooled = w.node("MaxPool", &[&f4], vec![ints("kernel_shape", &[2, 2]), ints("strides", &[2, 2])]);
        let (r2, r4) = (w.resize(&f2, 8), w.resize(&f4, 12));
        let axis = AttributeProto { name: "axis".into(), r#type: AttributeType::Int as i32, i: 1, ..AttributeProto::default() };
        let joined = w.node("Concat", &[&r2, &r4, &pooled], vec![axis]);
        let (tokens, channels, width) = (GRID[0] * GRID[1], 32, 16);
        let flat = w.reshape(&joined, &[channels, -1]);
        let turned = w.node("Transpose", &[&flat], vec![ints("perm", &[1, 0])]);
        let (mean, scale) = (w.random(&[1, channels as usize], 1.0), w.random(&[1, channels as usize], 1.0));
        let centred = w.node("Sub", &[&turned, &mean], vec![]);
        let features = w.node("Mul", &[&centred, &scale], vec![]);
        let position = w.random(&[tokens, width], 0.5);
        let mask = w.mask(1);
        let mut x = w.linear(&features, channels as usize, width);
        for layer in 0..2 {
            let placed = w.node("Add", &[&x, &position], vec![]);
            let attended = w.attention([&placed, &placed, &x], width, 2, Some(&mask), layer == 1);
            let sum = w.node("Add", &[&x, &attended], vec![]);
            x = w.norm(&sum, width);
            let up = w.linear(&x, width, 48);
            let up = w.node("Relu", &[&up], vec![]);
            let down = w.linear(&up, 48, width);
            let sum = w.node("Add", &[&x, &down], vec![]);
            x = w.norm(&sum, width);
        }
        let memory_placed = w.node("Add", &[&x, &position], vec![]);
        let mut out = x.clone();
        for _ in 0..2 {
            let query = w.random(&[tokens, width], 1.0);
            let placed = w.node("Add", &[&query, &position], vec![]);
            let attended = w.attention([&placed, &memory_placed, &x], width, 2, Some(&mask), false);
            let sum = w.node("Add", &[&query, &attended], vec![]);
            let y = w.norm(&sum, width);
            let y_placed = w.node("Add", &[&y, &position], vec![]);
            let out_placed = w.node("Add", &[&out, &position], vec![]);
            let attended = w.attention([&y_placed, &out_placed, &out], width, 2, None, false);
            let sum = w.node("Add", &[&y, &attended], vec![]);
            out = w.norm(&sum, width);
        }
        let rebuilt = w.linear(&out, width, channels as usize);
        let residual = w.node("Sub", &[&rebuilt, &features], vec![]);
        let square = w.node("Mul", &[&residual, &residual], vec![]);
        let axis = w.integers(&[1]);
        let no_keep = AttributeProto { name: "keepdims".into(), r#type: AttributeType::Int as i32, i: 0, ..AttributeProto::default() };
        let sum = w.node("ReduceSum", &[&square, &axis], vec![no_keep]);
        let root = w.node("Sqrt", &[&sum], vec![]);
        let map = w.reshape(&root, &[1, 1, GRID[0] as i64, GRID[1] as i64]);
        w.finish(&map)
    }

    /// A small EfficientNet: SiLU, squeeze-excite in both forms that exporters write, a residual.
    fn small_efficientnet() -> ModelProto {
        fn silu(w: &mut Writer, x: &str) -> String {
            let gate = w.node("Sigmoid", &[x], vec![]);
            w.node("Mul", &[x, &gate], vec![])
        }
        let mut w = Writer::new();
        let stem = w.conv(INPUT, [3, 16, 3, 2], [1, 1, 1, 1], false);
        let mut x = silu(&mut w, &stem);
        for (block, (inputs, outputs, kernel, stride)) in [(16, 24, 3, 2), (24, 24, 5, 1), (24, 24, 3, 2)].into_iter().enumerate() {
            let wide = inputs * 4;
            let expand = w.conv(&x, [inputs, wide, 1, 1], [0; 4], false);
            let expand = silu(&mut w, &expand);
            let depthwise = w.conv(&expand, [wide, wide, kernel, stride], [kernel as i64 / 2; 4], true);
            let depthwise = silu(&mut w, &depthwise);
            let mean = if block == 1 {
                w.node("ReduceMean", &[&depthwise], vec![ints("axes", &[-2, -1])])
            } else {
                w.node("GlobalAveragePool", &[&depthwise], vec![])
            };
            let squeezed = w.conv(&mean, [wide, 4, 1, 1], [0; 4], false);
            let squeezed = silu(&mut w, &squeezed);
            let excited = w.conv(&squeezed, [4, wide, 1, 1], [0; 4], false);
            let gate = w.node("Sigmoid", &[&excited], vec![]);
            let gated = if block == 1 { w.node("Mul", &[&gate, &depthwise], vec![]) } else { w.node("Mul", &[&depthwise, &gate], vec![]) };
            let projected = w.conv(&gated, [wide, outputs, 1, 1], [0; 4], false);
            x = if block == 1 { w.node("Add", &[&projected, &x], vec![]) } else { projected };
        }
        let keep = AttributeProto { name: "keepdims".into(), r#type: AttributeType::Int as i32, i: 1, ..AttributeProto::default() };
        let map = w.node("ReduceL2", &[&x], vec![ints("axes", &[1]), keep]);
        w.finish(&map)
    }

    /// A matrix chosen by the picture itself and a product with it, as bundles of modes have it: 24 tokens of 8 channels.
    fn small_modes() -> ModelProto {
        let mut w = Writer::new();
        let stem = w.conv(INPUT, [3, 8, 3, 2], [0, 0, 1, 1], false);
        let joined = w.resize(&stem, 8);
        let tokens = (GRID[0] * GRID[1]) as i64;
        let flat = w.reshape(&joined, &[8, tokens]);
        let features = w.node("Transpose", &[&flat], vec![ints("perm", &[1, 0])]);
        let mean = w.node("ReduceMean", &[&features], vec![ints("axes", &[0])]);
        let gate = w.linear(&mean, 8, 3);
        let table = w.random(&[3, 8 * 5], 1.0);
        let chosen = w.node("MatMul", &[&gate, &table], vec![]);
        let matrix = w.reshape(&chosen, &[8, 5]);
        let product = w.node("MatMul", &[&features, &matrix], vec![]);
        let keep = AttributeProto { name: "keepdims".into(), r#type: AttributeType::Int as i32, i: 1, ..AttributeProto::default() };
        let norm = w.node("ReduceL2", &[&product], vec![ints("axes", &[1]), keep]);
        let map = w.reshape(&norm, &[1, 1, GRID[0] as i64, GRID[1] as i64]);
        w.finish(&map)
    }

    /// Convolutions that one step alone reads: before a bottleneck without expansion, and before pools (the first of `side` x `side`, two apart).
    fn small_chain(side: i64) -> ModelProto {
        let mut w = Writer::new();
        let pool =
            |w: &mut Writer, x: &str, side| w.node("MaxPool", &[x], vec![ints("kernel_shape", &[side, side]), ints("strides", &[2, 2])]);
        let stem = w.conv(INPUT, [3, 8, 3, 2], [0, 0, 1, 1], false);
        let stem = w.relu6(&stem);
        let depthwise = w.conv(&stem, [8, 8, 3, 1], [1, 1, 1, 1], true);
        let depthwise = w.relu6(&depthwise);
        let f2 = w.conv(&depthwise, [8, 16, 1, 1], [0; 4], false);
        let wide = w.conv(&f2, [16, 32, 1, 1], [0; 4], false);
        let wide = w.relu6(&wide);
        let f4 = pool(&mut w, &wide, side);
        let dense = w.conv(&f4, [32, 12, 3, 1], [1, 1, 1, 1], false);
        let f8 = pool(&mut w, &dense, 2);
        let keep = AttributeProto { name: "keepdims".into(), r#type: AttributeType::Int as i32, i: 1, ..AttributeProto::default() };
        let map = w.node("ReduceL2", &[&f8], vec![ints("axes", &[1]), keep]);
        w.finish(&map)
    }

    fn meta() -> BundleMeta {
        tiny_meta()
    }

    fn bundle(proto: &ModelProto) -> Bundle {
        Bundle::from_bytes(&Bundle::pack(&proto.encode_to_vec(), meta()).unwrap(), Path::new("test")).unwrap()
    }

    fn picture(seed: u64) -> Vec<f32> {
        let mut state = seed | 1;
        (0..3 * INPUT_PX[0] * INPUT_PX[1])
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 40) as f32 / (1u32 << 23) as f32 - 1.0
            })
            .collect()
    }

    fn assert_equal(ours: &[f32], theirs: &[f32], what: &str) {
        let largest = theirs.iter().fold(0.0f32, |a, b| a.max(b.abs()));
        assert_eq!(ours.len(), theirs.len());
        for (i, (a, b)) in ours.iter().zip(theirs).enumerate() {
            assert!((a - b).abs() <= 1e-4 * largest, "{what} at {i}: {a} against {b} (largest {largest})");
        }
    }

    fn plan(proto: &ModelProto, isa: Isa) -> Plan {
        Plan::build(proto, &[1, 3, INPUT_PX[0], INPUT_PX[1]], GRID, isa).unwrap()
    }

    #[test]
    fn every_instruction_set_gives_what_tract_gives() {
        for proto in [small_uniad(), small_efficientnet(), small_modes(), small_chain(2), small_chain(1), tiny_graph()] {
            let mut session = Model::with_engine(bundle(&proto), EngineChoice::Tract).unwrap().session();
            let mut theirs = AnomalyMap::default();
            for isa in Isa::all_available() {
                let plan = plan(&proto, isa);
                let mut state = plan.state(1);
                for seed in 1..4 {
                    session.infer(&picture(seed), &mut theirs).unwrap();
                    assert_equal(plan.run(&mut state, &picture(seed)), &theirs.values, isa.name());
                }
            }
        }
    }

    #[test]
    fn eight_bit_weights_stay_near_float_and_shrink_the_file() {
        let float = bundle(&small_uniad());
        let (bytes, done) = float.quantized().unwrap();
        assert!(done.tensors >= 20 && done.worst_rounding <= 0.5 / 127.0 + 1e-6, "{done:?}");
        assert!((bytes.len() as u64) < float.file_bytes * 7 / 10, "{} of {}", bytes.len(), float.file_bytes);
        let quantized = Bundle::from_bytes(&bytes, Path::new("int8")).unwrap();
        assert_eq!(quantized.parameters, float.parameters, "scales are not learned");
        let mut session = Model::with_engine(quantized.clone(), EngineChoice::Tract).unwrap().session();
        let mut exact = Model::with_engine(float, EngineChoice::Tract).unwrap().session();
        let (mut theirs, mut unquantized) = (AnomalyMap::default(), AnomalyMap::default());
        for isa in Isa::all_available() {
            let plan = plan(&quantized.proto, isa);
            let count = |kind: &str| plan.describe().iter().filter(|step| step.kind == kind).count();
            // The model's shapes; where all of them pay, all are in integers.
            let pays = [(16, 16), (16, 48), (48, 16), (32, 16)].map(|(inputs, outputs)| Linear8::pays(isa, inputs, outputs));
            assert_eq!(count("Linear int8") > 0, pays.contains(&true), "{}", isa.name());
            assert_eq!(count("Linear int8") > 10, !pays.contains(&false), "{}", isa.name());
            assert_eq!(count("Bottleneck int8"), if Bottleneck8::pays(isa) { 2 } else { 0 }, "{}", isa.name());
            assert_eq!(count("Attention int8"), if Attention8::pays(isa) { 6 } else { 0 }, "{}", isa.name());
            let mut state = plan.state(1);
            for seed in 1..4 {
                session.infer(&picture(seed), &mut theirs).unwrap();
                exact.infer(&picture(seed), &mut unquantized).unwrap();
                let ours = plan.run(&mut state, &picture(seed)).to_vec();
                let largest = unquantized.values.iter().fold(0.0f32, |a, b| a.max(b.abs()));
                // Rounded weights: tract on the same file. Rounded inputs, too, where integers pay.
                let tolerance = if plan.integer_steps() > 0 { 0.1 } else { 1e-4 };
                for ((a, b), c) in ours.iter().zip(&theirs.values).zip(&unquantized.values) {
                    assert!((a - b).abs() <= tolerance * largest, "{}: {a} against {b}", isa.name());
                    assert!((a - c).abs() <= 0.2 * largest, "{}: {a} against {c} in float", isa.name());
                }
            }
        }
    }

    #[test]
    fn what_one_step_alone_reads_is_made_inside_it() {
        let float = bundle(&small_chain(2));
        let quantized = Bundle::from_bytes(&float.quantized().unwrap().0, Path::new("int8")).unwrap();
        let mut session = Model::with_engine(quantized.clone(), EngineChoice::Tract).unwrap().session();
        let mut theirs = AnomalyMap::default();
        for isa in Isa::all_available() {
            let kinds = |proto| plan(proto, isa).describe().iter().map(|step| step.kind).collect::<Vec<_>>();
            // The picture is small: its bottleneck is one step in integers only.
            assert!(kinds(&float.proto).ends_with(&["Linear, MaxPool", "Conv, MaxPool", "Reduce"]), "{:?}", kinds(&float.proto));
            let first = if Bottleneck8::pays(isa) { "Conv, Bottleneck int8" } else { "Conv" };
            assert_eq!(kinds(&quantized.proto)[0], first, "{}", isa.name());
            let plan = plan(&quantized.proto, isa);
            let mut state = plan.state(1);
            for seed in 1..4 {
                session.infer(&picture(seed), &mut theirs).unwrap();
                let largest = theirs.values.iter().fold(0.0f32, |a, b| a.max(b.abs()));
                for (ours, theirs) in plan.run(&mut state, &picture(seed)).iter().zip(&theirs.values) {
                    assert!((ours - theirs).abs() <= 0.1 * largest, "{}: {ours} against {theirs}", isa.name());
                }
            }
        }
    }

    #[test]
    fn more_threads_give_the_same_map_to_the_bit() {
        let quantized = |proto: &ModelProto| Bundle::from_bytes(&bundle(proto).quantized().unwrap().0, Path::new("int8")).unwrap().proto;
        let (uniad, chain) = (small_uniad(), small_chain(2));
        for proto in [&uniad, &quantized(&uniad), &small_modes(), &chain, &quantized(&chain)] {
            let plan = plan(proto, Isa::best());
            let one = plan.run(&mut plan.state(1), &picture(3)).to_vec();
            for threads in 2..4 {
                let mut state = plan.state(threads);
                // The pictures are small: share what otherwise one thread does, to the last row.
                for (chunk, step) in state.chunks.iter_mut().zip(&plan.steps) {
                    *chunk = plan.row(step).unwrap_or(step.out.1).max(1);
                }
                for _ in 0..3 {
                    assert_eq!(plan.run(&mut state, &picture(3)), one, "{threads} threads");
                }
            }
        }
    }

    #[test]
    fn the_pattern_is_fused() {
        let steps = plan(&small_uniad(), Isa::best()).describe();
        let count = |wanted: &str| steps.iter().filter(|step| step.kind == wanted).count();
        assert_eq!(count("Attention"), 6);
        // q, k, v of a layer and the memory's keys and values of both decoder layers are one each: 1 in, 2 x (qkv, o, up, down), 1 memory,
        // 2 x (o, q, kv, o), 1 out; and the pointwise convolutions, 3.
        assert_eq!(count("Linear"), 1 + 2 * 4 + 1 + 2 * 4 + 1 + 3 - shared_memory_reads(&steps));
        // Scale and shift of the features, the residual, its square and root: nothing else is left element by element.
        assert_eq!(count("Binary") + count("Unary") + count("Scalar"), 5, "{steps:#?}");
    }

    /// The first decoder layer's second attention reads the memory, too: its keys and values join the memory's wide linear.
    fn shared_memory_reads(steps: &[Description]) -> usize {
        usize::from(steps.iter().any(|step| step.name.contains("and 5 more")))
    }

    #[test]
    fn unknown_operators_run_through_tract() {
        let mut proto = tiny_graph();
        let graph = proto.graph.as_mut().unwrap();
        graph.node[0].output[0] = "inner".into();
        graph.node.insert(
            1,
            NodeProto { op_type: "Softsign".into(), input: vec!["inner".into()], output: vec!["features".into()], ..NodeProto::default() },
        );
        let shape = [1, 3, INPUT_PX[0], INPUT_PX[1]];
        let reason = Plan::build(&proto, &shape, GRID, Isa::best()).unwrap_err().to_string();
        assert!(reason.contains("Softsign"), "{reason}");
        assert_eq!(Model::with_engine(bundle(&proto), EngineChoice::Auto).unwrap().facts().engine, "tract");
    }

    #[test]
    fn not_a_number_reaches_the_map() {
        let quantized = bundle(&small_uniad()).quantized().unwrap().0;
        let quantized = Bundle::from_bytes(&quantized, Path::new("int8")).unwrap();
        for proto in [&small_uniad(), &quantized.proto] {
            broken_frames_show(proto);
        }
    }

    fn broken_frames_show(proto: &ModelProto) {
        let plan = plan(proto, Isa::best());
        let mut state = plan.state(1);
        let mut input = picture(5);
        input[100] = f32::NAN;
        assert!(plan.run(&mut state, &input).iter().any(|value| value.is_nan()));
        let clean = plan.run(&mut state, &picture(5)).to_vec();
        assert!(clean.iter().all(|value| value.is_finite()), "nothing of a broken frame is left for the next one");
    }

    #[test]
    fn the_tiny_bundle_has_a_plan() {
        let bundle = Bundle::from_bytes(&tiny_bundle().unwrap(), Path::new("tiny")).unwrap();
        let facts = Model::with_engine(bundle, EngineChoice::Auto).unwrap().facts().clone();
        // CULL_PLAN=tract in the environment of the tests would show here.
        assert!(facts.engine.starts_with("plan ("), "{}", facts.engine);
    }

    #[test]
    fn the_default_model_gives_what_tract_gives() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/default.onnx");
        if !path.exists() {
            eprintln!("SKIPPED: no {}", path.display());
            return;
        }
        let bundle = Bundle::load(&path).unwrap();
        let reference = Model::with_engine(bundle.clone(), EngineChoice::Tract).unwrap();
        let model = Model::with_engine(bundle, EngineChoice::Auto).unwrap();
        let input: Vec<f32> = (0..model.meta().preprocess.input_len()).map(|i| ((i * 7919) % 997) as f32 / 500.0 - 1.0).collect();
        let (mut ours, mut theirs) = (AnomalyMap::default(), AnomalyMap::default());
        model.session().infer(&input, &mut ours).unwrap();
        reference.session().infer(&input, &mut theirs).unwrap();
        if model.facts().engine.contains("int8") {
            // tract computes 8-bit weights in float; ours also round what the weights are multiplied with, on noise as on any picture.
            let largest = theirs.values.iter().fold(0.0f32, |m, v| m.max(v.abs()));
            let worst = ours.values.iter().zip(&theirs.values).fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
            assert!(worst < 0.05 * largest, "{worst} of {largest}");
            return;
        }
        assert_equal(&ours.values, &theirs.values, &model.facts().engine);
    }

    #[test]
    fn views_reshape_where_strides_allow() {
        let view = |shape: &[usize], strides: &[usize]| View {
            source: Source::Input,
            offset: 0,
            shape: shape.to_vec(),
            strides: strides.to_vec(),
        };
        // Channels-last [1, 5, 2, 3] as [5, 6]: rows and columns run on into each other.
        let flat = view(&[1, 5, 2, 3], &[30, 1, 15, 5]).reshaped(&[5, 6]).unwrap();
        assert_eq!(flat.strides, [1, 5]);
        // As [30]: they do not.
        assert!(view(&[1, 5, 2, 3], &[30, 1, 15, 5]).reshaped(&[30]).is_none());
        let split = view(&[6], &[1]).reshaped(&[1, 1, 2, 3]).unwrap();
        assert_eq!(split.strides[2..], [3, 1]);
        assert_eq!(view(&[4, 6], &[6, 1]).reshaped(&[4, 2, 3]).unwrap().strides, [6, 3, 1]);
        assert!(view(&[4, 6], &[8, 1]).reshaped(&[24]).is_none());
    }
}
