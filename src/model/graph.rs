//! A small graph of what inspection models are made of, read from ONNX, folded and fused: the front half of [`super::plan`].
//!
//! It knows shapes and constants, nothing of memory layout or kernels. Whatever it does not know is an [`Unsupported`], and the model runs
//! through tract instead. All shapes are static and the batch is one.

use crate::kernels::activation::Smooth;
use crate::kernels::linear::Activation;
use std::collections::HashMap;
use std::sync::Arc;
use tract_onnx::pb::{self, tensor_proto::DataType};

/// Index of a node in [`Graph::nodes`].
pub(super) type Id = usize;

/// Why a graph has no plan: the operator or form that is not known.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Unsupported(pub String);

pub(super) type Supported<T> = Result<T, Unsupported>;

pub(super) fn unsupported<T>(what: impl Into<String>) -> Supported<T> {
    Err(Unsupported(what.into()))
}

/// One value and how it comes about.
#[derive(Clone, Debug)]
pub(super) struct Node {
    pub op: Op,
    pub inputs: Vec<Id>,
    pub shape: Vec<usize>,
    /// ONNX name of the value, for people.
    pub name: String,
}

#[derive(Clone, Debug)]
pub(super) enum Op {
    /// The model's input.
    Input,
    /// Row-major values.
    Const(Arc<[f32]>),
    Conv(Conv),
    /// Last two axes; never with a constant on the right after fusion.
    MatMul,
    Binary(Binary),
    Unary(Unary),
    /// Over the last axis.
    Softmax,
    /// Over the last axis.
    LayerNorm {
        gamma: Arc<[f32]>,
        beta: Arc<[f32]>,
        epsilon: f32,
    },
    Reshape,
    Transpose(Vec<usize>),
    /// Bilinear, on `[1, channels, height, width]`.
    Resize(Coordinates),
    Concat(usize),
    MaxPool {
        kernel: [usize; 2],
        stride: [usize; 2],
    },
    /// Over one axis.
    Reduce {
        kind: Reduction,
        axis: usize,
    },
    /// Mean of each channel of `[1, channels, height, width]`.
    GlobalMean,
    /// `act(x * weight + bias)`, over the last axis; a second input is added to the result.
    Linear(Linear),
    /// Inputs q, k, v `[tokens, heads * head_width]`, output likewise.
    Attention(Attention),
    /// Pointwise, depthwise and pointwise convolution; a second input is added to the result.
    Bottleneck(Box<Bottleneck>),
    /// Columns from `.0` on of a matrix, as many as the shape says.
    Columns(usize),
}

/// Weights as the file has them: 8 bit, one scale per output, zero at zero.
#[derive(Clone, Debug)]
pub(super) struct Int8 {
    /// Laid out as the float weights beside it.
    pub weight: Arc<[i8]>,
    /// By output.
    pub scale: Vec<f32>,
}

#[derive(Clone, Debug)]
pub(super) struct Conv {
    /// `[outputs, inputs / groups, height, width]`.
    pub weight: Arc<[f32]>,
    /// The same, quantized, where the file has it so.
    pub int8: Option<Int8>,
    pub bias: Vec<f32>,
    pub kernel: [usize; 2],
    pub stride: [usize; 2],
    /// Above and to the left.
    pub pad: [usize; 2],
    pub depthwise: bool,
    pub activation: Activation,
}

impl Conv {
    pub fn is_pointwise(&self) -> bool {
        !self.depthwise && self.kernel == [1, 1] && self.stride == [1, 1] && self.pad == [0, 0]
    }
}

/// See [`Op::Bottleneck`].
#[derive(Clone, Debug)]
pub(super) struct Bottleneck {
    /// Absent where the input goes into the depthwise convolution.
    pub expand: Option<Conv>,
    pub depthwise: Conv,
    pub project: Conv,
    /// Whether all weights are of 8 bit and the values between the convolutions lie within 0 to 6, those of an input without expansion included.
    pub int8: bool,
}

/// Whether an [`Op::Bottleneck`] is wanted, given the shape of its input and that of its output.
pub(super) type Wanted<'a> = dyn Fn(&Bottleneck, &[usize], &[usize]) -> bool + 'a;

#[derive(Clone, Debug)]
pub(super) struct Linear {
    /// `[inputs, outputs]`.
    pub weight: Arc<[f32]>,
    /// The same, quantized, where the file has it so.
    pub int8: Option<Int8>,
    pub bias: Vec<f32>,
    pub activation: Activation,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Attention {
    pub grid: [usize; 2],
    pub heads: usize,
    pub head_width: usize,
    /// Odd side of the neighbour mask; 0 for none.
    pub window: usize,
    pub scale: f32,
    /// Queries, keys and values come from linears with weights of 8 bit (or are constant): the model was made for int8.
    pub int8: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Binary {
    Add,
    Sub,
    Mul,
    Div,
}

impl Binary {
    pub fn apply(self, a: f32, b: f32) -> f32 {
        match self {
            Self::Add => a + b,
            Self::Sub => a - b,
            Self::Mul => a * b,
            Self::Div => a / b,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Unary {
    Relu,
    Clip(f32, f32),
    Sqrt,
    Smooth(Smooth),
    Softplus,
    Exp,
    Log,
    Neg,
    Abs,
    Tanh,
}

impl Unary {
    /// On one value; NaN stays NaN.
    pub fn apply(self, x: f32) -> f32 {
        match self {
            Self::Relu => Activation::Relu.apply(x),
            Self::Clip(low, high) => x.clamp(low, high),
            Self::Sqrt => x.sqrt(),
            Self::Smooth(kind) => kind.apply(x),
            // ln(1 + e^x) without overflow; `max` alone would hide a NaN.
            Self::Softplus => {
                if x.is_nan() {
                    x
                } else {
                    x.max(0.0) + (-x.abs()).exp().ln_1p()
                }
            }
            Self::Exp => x.exp(),
            Self::Log => x.ln(),
            Self::Neg => -x,
            Self::Abs => x.abs(),
            Self::Tanh => x.tanh(),
        }
    }

    fn activation(self) -> Option<Activation> {
        match self {
            Self::Relu => Some(Activation::Relu),
            Self::Clip(low, high) if low == 0.0 && high == 6.0 => Some(Activation::Relu6),
            _ => None,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Coordinates {
    AlignCorners,
    HalfPixel,
    Asymmetric,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reduction {
    Sum,
    Mean,
    /// Square root of the sum of squares.
    Norm,
}

/// See the module.
#[derive(Clone, Debug)]
pub(super) struct Graph {
    pub nodes: Vec<Node>,
    pub output: Id,
    /// What is known of constants that come from DequantizeLinear: their bytes, scales, and the axis the scales belong to.
    int8: HashMap<Id, (Int8, usize)>,
}

impl Graph {
    /// Read the first output of an ONNX graph with one float input of `shape`.
    pub fn read(proto: &pb::ModelProto, shape: &[usize]) -> Supported<Self> {
        let Some(graph) = &proto.graph else { return unsupported("no graph") };
        let opset = proto.opset_import.iter().filter(|import| import.domain.is_empty()).map(|import| import.version).max().unwrap_or(0);
        let mut reader = Reader {
            nodes: Vec::new(),
            values: HashMap::new(),
            integers: HashMap::new(),
            bytes: HashMap::new(),
            int8: HashMap::new(),
            opset,
        };
        for tensor in &graph.initializer {
            reader.constant(&tensor.name, tensor)?;
        }
        let is_free = |value: &&pb::ValueInfoProto| !graph.initializer.iter().any(|tensor| tensor.name == value.name);
        let [input] = graph.input.iter().filter(is_free).collect::<Vec<_>>()[..] else { return unsupported("more than one input") };
        let id = reader.push(Op::Input, vec![], shape.to_vec(), &input.name);
        reader.values.insert(input.name.clone(), id);
        for node in &graph.node {
            reader.node(node)?;
        }
        let [output] = &graph.output[..] else { return unsupported("more than one output") };
        let output = reader.value(&output.name)?;
        Ok(Self { nodes: reader.nodes, output, int8: reader.int8 })
    }

    /// Multiply-adds of matrix products and convolutions that the output depends on, as the graph stands.
    pub fn multiply_adds(&self) -> u64 {
        let needed = self.needed();
        let count = |node: &Node| {
            let outputs: usize = node.shape.iter().product();
            let each = match &node.op {
                Op::Conv(conv) => conv.weight.len() / node.shape.get(1).copied().unwrap_or(1).max(1),
                Op::MatMul => node.inputs.first().and_then(|&a| self.nodes[a].shape.last()).copied().unwrap_or(0),
                _ => 0,
            };
            outputs as u64 * each as u64
        };
        self.nodes.iter().zip(needed).filter(|(_, needed)| *needed).map(|(node, _)| count(node)).sum()
    }

    /// Which nodes the output depends on.
    pub fn needed(&self) -> Vec<bool> {
        let mut needed = vec![false; self.nodes.len()];
        let mut stack = vec![self.output];
        while let Some(id) = stack.pop() {
            if !std::mem::replace(&mut needed[id], true) {
                stack.extend(&self.nodes[id].inputs);
            }
        }
        needed
    }

    /// Needed nodes, each after its inputs.
    pub fn order(&self) -> Vec<Id> {
        let mut order = Vec::new();
        let mut seen = vec![false; self.nodes.len()];
        // (node, inputs visited already)
        let mut stack = vec![(self.output, false)];
        while let Some((id, ready)) = stack.pop() {
            if ready {
                order.push(id);
            } else if !std::mem::replace(&mut seen[id], true) {
                stack.push((id, true));
                stack.extend(self.nodes[id].inputs.iter().rev().map(|&input| (input, false)));
            }
        }
        order
    }

    /// Who reads each node, among the needed ones; the output counts as read once more (by itself).
    pub fn readers(&self) -> Vec<Vec<Id>> {
        let mut readers = vec![Vec::new(); self.nodes.len()];
        for (id, _) in self.needed().iter().enumerate().filter(|(_, needed)| **needed) {
            for &input in &self.nodes[id].inputs {
                readers[input].push(id);
            }
        }
        readers[self.output].push(self.output);
        readers
    }

    fn constant(&self, id: Id) -> Option<&Arc<[f32]>> {
        match &self.nodes[id].op {
            Op::Const(values) => Some(values),
            _ => None,
        }
    }

    fn scalar(&self, id: Id) -> Option<f32> {
        self.constant(id).filter(|values| values.len() == 1).and_then(|values| values.first().copied())
    }

    /// Fold constants and fuse what the kernels do in one go. `grid` is the model's anomaly grid, the likely grid of its tokens; `bottlenecks`
    /// says where an [`Op::Bottleneck`] is wanted.
    pub fn optimise(&mut self, grid: [usize; 2], bottlenecks: &Wanted<'_>) {
        self.fold();
        self.matmul_to_linear();
        self.fold_positions();
        self.fold();
        self.fuse_silu();
        self.fuse_activations();
        self.fuse_residuals();
        self.fuse_bottlenecks(bottlenecks);
        self.fuse_attention(grid);
        self.merge_linears();
    }

    /// Evaluate nodes whose inputs are all constant.
    fn fold(&mut self) {
        for id in self.order() {
            let node = &self.nodes[id];
            if node.inputs.is_empty() {
                continue;
            }
            let Some(inputs) = node.inputs.iter().map(|&input| self.constant(input).cloned()).collect::<Option<Vec<_>>>() else { continue };
            let shapes: Vec<&[usize]> = node.inputs.iter().map(|&input| self.nodes[input].shape.as_slice()).collect();
            if let Some(values) = evaluate(node, &inputs, &shapes) {
                self.nodes[id].op = Op::Const(values.into());
                self.nodes[id].inputs.clear();
            }
        }
    }

    /// `x * constant matrix (+ constant row)`.
    fn matmul_to_linear(&mut self) {
        for id in self.order() {
            let node = &self.nodes[id];
            if let (Op::MatMul, &[a, b]) = (&node.op, &node.inputs[..])
                && let (Some(weight), &[_, outputs]) = (self.constant(b), &self.nodes[b].shape[..])
                && self.constant(a).is_none()
            {
                let int8 = self.int8.get(&b).filter(|(int8, axis)| *axis == 1 && int8.scale.len() == outputs).map(|(int8, _)| int8.clone());
                let linear = Linear { weight: weight.clone(), int8, bias: vec![0.0; outputs], activation: Activation::None };
                self.nodes[id].op = Op::Linear(linear);
                self.nodes[id].inputs = vec![a];
            }
        }
        let readers = self.readers();
        for id in self.order() {
            let node = &self.nodes[id];
            let (Op::Binary(Binary::Add), &[a, b]) = (&node.op, &node.inputs[..]) else { continue };
            for (sum, row) in [(a, b), (b, a)] {
                // A row, not a column: [outputs] or [1, outputs].
                let Some(row) = self.constant(row).filter(|values| self.nodes[row].shape.last() == Some(&values.len())).cloned() else {
                    continue;
                };
                let Op::Linear(linear) = &self.nodes[sum].op else { continue };
                if readers[sum].len() == 1 && linear.bias.len() == row.len() && self.nodes[id].shape == self.nodes[sum].shape {
                    let mut linear = linear.clone();
                    linear.bias.iter_mut().zip(row.iter()).for_each(|(bias, add)| *bias += add);
                    self.nodes[id].inputs = self.nodes[sum].inputs.clone();
                    self.nodes[id].op = Op::Linear(linear);
                    break;
                }
            }
        }
    }

    /// `(x + constant) * W = x * W + constant * W`: position embeddings become a constant that is added for nothing.
    fn fold_positions(&mut self) {
        for id in self.order() {
            let (Op::Linear(linear), &[x]) = (&self.nodes[id].op, &self.nodes[id].inputs[..]) else { continue };
            let (Op::Binary(Binary::Add), &[a, b]) = (&self.nodes[x].op, &self.nodes[x].inputs[..]) else { continue };
            let (value, position) = if self.constant(b).is_some() { (a, b) } else { (b, a) };
            let shape = &self.nodes[x].shape;
            if self.constant(value).is_some() || self.nodes[position].shape != *shape || self.nodes[value].shape != *shape {
                continue;
            }
            let Some(position) = self.constant(position) else { continue };
            let (inputs, outputs) = (shape.last().copied().unwrap_or(1), linear.bias.len());
            let moved = Node {
                op: Op::Const(multiply(position, &linear.weight, inputs, outputs).into()),
                inputs: vec![],
                shape: self.nodes[id].shape.clone(),
                name: format!("{} (position)", self.nodes[id].name),
            };
            self.nodes.push(moved);
            self.nodes[id].inputs = vec![value, self.nodes.len() - 1];
        }
    }

    /// `x * sigmoid(x)` in one go. The sigmoid may have other readers: it is then computed for them.
    fn fuse_silu(&mut self) {
        for id in self.order() {
            let (Op::Binary(Binary::Mul), &[a, b]) = (&self.nodes[id].op, &self.nodes[id].inputs[..]) else { continue };
            for (x, gate) in [(a, b), (b, a)] {
                if matches!(self.nodes[gate].op, Op::Unary(Unary::Smooth(Smooth::Sigmoid))) && self.nodes[gate].inputs == [x] {
                    self.nodes[id].op = Op::Unary(Unary::Smooth(Smooth::Silu));
                    self.nodes[id].inputs = vec![x];
                    break;
                }
            }
        }
    }

    /// ReLU and ReLU6 into the convolution or linear before them.
    fn fuse_activations(&mut self) {
        let readers = self.readers();
        for id in self.order() {
            let (Op::Unary(unary), &[x]) = (&self.nodes[id].op, &self.nodes[id].inputs[..]) else { continue };
            let Some(activation) = unary.activation() else { continue };
            let fits = match &self.nodes[x].op {
                Op::Conv(conv) => conv.activation == Activation::None,
                // A second input is added after the activation.
                Op::Linear(linear) => linear.activation == Activation::None && self.nodes[x].inputs.len() == 1,
                _ => false,
            };
            if fits && readers[x].len() == 1 {
                let mut op = self.nodes[x].op.clone();
                match &mut op {
                    Op::Conv(conv) => conv.activation = activation,
                    Op::Linear(linear) => linear.activation = activation,
                    _ => {}
                }
                self.nodes[id].op = op;
                self.nodes[id].inputs = self.nodes[x].inputs.clone();
            }
        }
    }

    /// `a + linear(x)` and `a + pointwise(x)`: the kernel adds while it stores.
    fn fuse_residuals(&mut self) {
        let readers = self.readers();
        for id in self.order() {
            let (Op::Binary(Binary::Add), &[a, b]) = (&self.nodes[id].op, &self.nodes[id].inputs[..]) else { continue };
            for (other, sum) in [(a, b), (b, a)] {
                let takes = match &self.nodes[sum].op {
                    Op::Linear(_) => true,
                    Op::Conv(conv) => conv.is_pointwise(),
                    _ => false,
                };
                let same = self.nodes[other].shape == self.nodes[sum].shape && self.nodes[id].shape == self.nodes[sum].shape;
                if takes && same && other != sum && readers[sum].len() == 1 && self.nodes[sum].inputs.len() == 1 {
                    let x = self.nodes[sum].inputs[0];
                    self.nodes[id].op = self.nodes[sum].op.clone();
                    self.nodes[id].inputs = vec![x, other];
                    break;
                }
            }
        }
    }

    /// Pointwise, depthwise, pointwise: where it is wanted and nothing else reads what lies between.
    fn fuse_bottlenecks(&mut self, wanted: &Wanted<'_>) {
        let readers = self.readers();
        for id in self.order() {
            let Op::Conv(project) = &self.nodes[id].op else { continue };
            let middle = self.nodes[id].inputs[0];
            let Op::Conv(depthwise) = &self.nodes[middle].op else { continue };
            if !project.is_pointwise() || !depthwise.depthwise || readers[middle].len() != 1 {
                continue;
            }
            let first = self.nodes[middle].inputs[0];
            let plain = project.activation == Activation::None && project.int8.is_some();
            let clamped = depthwise.activation == Activation::Relu6 && depthwise.int8.is_some();
            let before = match &self.nodes[first].op {
                Op::Conv(before) => Some(before),
                _ => None,
            };
            // A residual comes after an activation: what it is added to may leave the activation's range.
            let alone = self.nodes[first].inputs.len() == 1;
            let before_clamped = alone && before.is_some_and(|before| before.activation == Activation::Relu6);
            let expands = alone && readers[first].len() == 1 && before.is_some_and(Conv::is_pointwise);
            // Without weights of 8 bit it may still be the first half of one without expansion, in integers.
            let expands = expands && (before.is_some_and(|before| before.int8.is_some()) || !(plain && clamped));
            let (expand, input) = if expands { (before.cloned(), self.nodes[first].inputs[0]) } else { (None, first) };
            let int8 = plain && clamped && before_clamped;
            let bottleneck = Bottleneck { expand, depthwise: depthwise.clone(), project: project.clone(), int8 };
            if wanted(&bottleneck, &self.nodes[input].shape, &self.nodes[id].shape) {
                self.nodes[id].op = Op::Bottleneck(Box::new(bottleneck));
                self.nodes[id].inputs[0] = input;
            }
        }
    }

    /// Reshape(Transpose(MatMul(Softmax(MatMul(q, k) + mask), v))) with heads split by Reshape and Transpose.
    fn fuse_attention(&mut self, grid: [usize; 2]) {
        for id in self.order() {
            if let Some((attention, inputs)) = self.match_attention(id, grid) {
                self.nodes[id].op = Op::Attention(attention);
                self.nodes[id].inputs = inputs.to_vec();
            }
        }
    }

    fn match_attention(&self, id: Id, grid: [usize; 2]) -> Option<(Attention, [Id; 3])> {
        let input = |id: Id, index: usize| self.nodes[id].inputs.get(index).copied();
        let is = |id: Id, wanted: fn(&Op) -> bool| wanted(&self.nodes[id].op).then_some(id);
        is(id, |op| matches!(op, Op::Reshape))?;
        let joined = is(input(id, 0)?, |op| matches!(op, Op::Transpose(_)))?;
        let Op::Transpose(perm) = &self.nodes[joined].op else { return None };
        if !matches!(perm[..], [1, 0, 2] | [0, 2, 1, 3]) {
            return None;
        }
        let mixed = is(input(joined, 0)?, |op| matches!(op, Op::MatMul))?;
        let weights = is(input(mixed, 0)?, |op| matches!(op, Op::Softmax))?;
        let mut scores = input(weights, 0)?;
        let (mut scale, mut mask) = (1.0, None);
        while let Op::Binary(binary) = &self.nodes[scores].op {
            let (a, b) = (input(scores, 0)?, input(scores, 1)?);
            let (rest, constant) = if self.constant(b).is_some() { (a, b) } else { (b, a) };
            match binary {
                Binary::Mul => scale *= self.scalar(constant)?,
                Binary::Div if rest == a => scale /= self.scalar(constant)?,
                // A factor outside of the mask would scale the mask, too.
                Binary::Add if mask.is_none() && scale == 1.0 => mask = Some(constant),
                _ => return None,
            }
            scores = rest;
        }
        is(scores, |op| matches!(op, Op::MatMul))?;
        let (q, q_scale, q_heads) = self.split_heads(input(scores, 0)?, [1, 0, 2])?;
        let (k, k_scale, k_heads) = self.split_heads(input(scores, 1)?, [1, 2, 0])?;
        let (v, v_scale, v_heads) = self.split_heads(input(mixed, 1)?, [1, 0, 2])?;
        let [tokens, heads, head_width] = q_heads;
        if k_heads != q_heads || v_heads != q_heads || v_scale != 1.0 || trimmed(&self.nodes[id].shape) != [tokens, heads * head_width] {
            return None;
        }
        let (grid, window) = match mask {
            Some(mask) => neighbour_window(self.constant(mask)?, &self.nodes[mask].shape, tokens, heads, grid)?,
            None => ([1, tokens], 0),
        };
        let int8 = [q, k, v].iter().all(|&id| match &self.nodes[id].op {
            Op::Linear(linear) => linear.int8.is_some(),
            op => matches!(op, Op::Const(_)),
        });
        Some((Attention { grid, heads, head_width, window, scale: scale * q_scale * k_scale, int8 }, [q, k, v]))
    }

    /// Undo Reshape `[tokens, heads, width]`, Transpose to `wanted` and multiplications by constants, in any order: the `[tokens, heads * width]`
    /// matrix behind, the product of the constants, and the sizes.
    fn split_heads(&self, mut id: Id, wanted: [usize; 3]) -> Option<(Id, f32, [usize; 3])> {
        let rank = self.nodes[id].shape.len();
        let mut axes: Vec<usize> = (0..rank).collect();
        let mut scale = 1.0;
        loop {
            let node = &self.nodes[id];
            match (&node.op, &node.inputs[..]) {
                (Op::Transpose(perm), &[x]) => {
                    axes.iter_mut().for_each(|axis| *axis = perm[*axis]);
                    id = x;
                }
                (Op::Binary(Binary::Mul), &[a, b]) => {
                    (id, scale) = match (self.scalar(a), self.scalar(b)) {
                        (_, Some(factor)) => (a, scale * factor),
                        (Some(factor), _) => (b, scale * factor),
                        _ => return None,
                    };
                }
                (Op::Binary(Binary::Div), &[a, b]) => (id, scale) = (a, scale / self.scalar(b)?),
                (Op::Reshape, &[x]) => {
                    let leading = rank.checked_sub(3)?;
                    if leading > 1 || axes[..leading].iter().any(|&axis| axis != 0) {
                        return None;
                    }
                    let [tokens, heads, width] = node.shape[leading..].try_into().ok()?;
                    let turned = axes[leading..].iter().zip(wanted).all(|(&axis, wanted)| axis == wanted + leading);
                    return (turned && trimmed(&self.nodes[x].shape) == [tokens, heads * width]).then_some((
                        x,
                        scale,
                        [tokens, heads, width],
                    ));
                }
                _ => return None,
            }
        }
    }

    /// Linears of one input that only attentions read become one wide linear: q, k, v of a layer, keys and values of the memory for all layers.
    fn merge_linears(&mut self) {
        let readers = self.readers();
        let mut groups: Vec<(Id, Vec<Id>)> = Vec::new();
        for id in self.order() {
            let node = &self.nodes[id];
            let Op::Linear(linear) = &node.op else { continue };
            let plain_residual = node.inputs.get(1).is_none_or(|&residual| self.constant(residual).is_some());
            let read_by_attention = readers[id].iter().all(|&reader| matches!(self.nodes[reader].op, Op::Attention(_)));
            if linear.activation != Activation::None || !plain_residual || !read_by_attention || id == self.output {
                continue;
            }
            match groups.iter_mut().find(|(x, _)| *x == node.inputs[0]) {
                Some((_, members)) => members.push(id),
                None => groups.push((node.inputs[0], vec![id])),
            }
        }
        for (x, members) in groups.into_iter().filter(|(_, members)| members.len() > 1) {
            let widths: Vec<usize> = members.iter().map(|&id| self.nodes[id].shape.last().copied().unwrap_or(0)).collect();
            let total: usize = widths.iter().sum();
            let inputs = self.nodes[x].shape.last().copied().unwrap_or(0);
            let mut shape = self.nodes[members[0]].shape.clone();
            let rows: usize = shape[..shape.len() - 1].iter().product();
            if let Some(last) = shape.last_mut() {
                *last = total;
            }
            let (mut weight, mut bias, mut residual) = (vec![0.0; inputs * total], vec![0.0; total], vec![0.0; rows * total]);
            let mut any_residual = false;
            let mut int8 = Some((vec![0; inputs * total], vec![0.0; total]));
            let mut start = 0;
            for (&id, &width) in members.iter().zip(&widths) {
                let node = &self.nodes[id];
                let Op::Linear(linear) = &node.op else { continue };
                scatter(&linear.weight, width, &mut weight, total, start);
                scatter(&linear.bias, width, &mut bias, total, start);
                int8 = int8.zip(linear.int8.as_ref()).map(|((mut bytes, mut scale), own)| {
                    scatter(&own.weight, width, &mut bytes, total, start);
                    scatter(&own.scale, width, &mut scale, total, start);
                    (bytes, scale)
                });
                if let Some(values) = node.inputs.get(1).and_then(|&residual| self.constant(residual)) {
                    any_residual = true;
                    scatter(values, width, &mut residual, total, start);
                }
                start += width;
            }
            let name = format!("{} and {} more", self.nodes[members[0]].name, members.len() - 1);
            let mut wide_inputs = vec![x];
            if any_residual {
                self.nodes.push(Node {
                    op: Op::Const(residual.into()),
                    inputs: vec![],
                    shape: shape.clone(),
                    name: format!("{name} (position)"),
                });
                wide_inputs.push(self.nodes.len() - 1);
            }
            let int8 = int8.map(|(bytes, scale)| Int8 { weight: bytes.into(), scale });
            let linear = Linear { weight: weight.into(), int8, bias, activation: Activation::None };
            self.nodes.push(Node { op: Op::Linear(linear), inputs: wide_inputs, shape, name });
            let wide = self.nodes.len() - 1;
            start = 0;
            for (&id, &width) in members.iter().zip(&widths) {
                self.nodes[id].op = Op::Columns(start);
                self.nodes[id].inputs = vec![wide];
                start += width;
            }
        }
    }
}

/// Rows of `width` into columns from `start` on of a matrix `total` wide.
fn scatter<T: Copy>(from: &[T], width: usize, to: &mut [T], total: usize, start: usize) {
    for (source, target) in from.chunks_exact(width.max(1)).zip(to.chunks_exact_mut(total.max(1))) {
        target[start..start + width].copy_from_slice(source);
    }
}

/// A shape without leading ones.
fn trimmed(shape: &[usize]) -> &[usize] {
    let ones = shape.iter().take_while(|&&dim| dim == 1).count();
    &shape[ones.min(shape.len().saturating_sub(2))..]
}

/// Row-major matrix product of `[rows, inputs]` and `[inputs, outputs]`.
fn multiply(a: &[f32], b: &[f32], inputs: usize, outputs: usize) -> Vec<f32> {
    let mut out = vec![0.0; a.len() / inputs.max(1) * outputs];
    for (row, line) in a.chunks_exact(inputs.max(1)).zip(out.chunks_exact_mut(outputs.max(1))) {
        for (&x, weights) in row.iter().zip(b.chunks_exact(outputs.max(1))) {
            line.iter_mut().zip(weights).for_each(|(y, w)| *y += x * w);
        }
    }
    out
}

/// The grid and odd window whose neighbour mask `mask` is (0 where allowed, hugely negative where not), if any.
fn neighbour_window(mask: &[f32], shape: &[usize], tokens: usize, heads: usize, grid: [usize; 2]) -> Option<([usize; 2], usize)> {
    /// Added to a score, it makes the weight zero in float32 whatever the score.
    const FORBIDDEN_AT_MOST: f32 = -1e4;
    let trimmed = trimmed(shape);
    let planes = match *trimmed {
        [a, b] if a == tokens && b == tokens => 1,
        [h, a, b] if h == heads && a == tokens && b == tokens => heads,
        _ => return None,
    };
    if mask.len() != planes * tokens * tokens || !mask.iter().all(|&value| value == 0.0 || value <= FORBIDDEN_AT_MOST) {
        return None;
    }
    let plane = mask.get(..tokens * tokens)?;
    if mask.chunks_exact(tokens * tokens).any(|other| other != plane) {
        return None;
    }
    // What a token sees that may attend to none is nowhere defined; our kernels do not agree with each other on it either.
    if tokens == 0 || plane.chunks_exact(tokens).any(|row| row.iter().all(|&value| value != 0.0)) {
        return None;
    }
    let divisors = (1..=tokens).filter(|rows| tokens.is_multiple_of(*rows)).map(|rows| [rows, tokens / rows]);
    for grid in std::iter::once(grid).filter(|grid| grid[0] * grid[1] == tokens).chain(divisors) {
        // The first row of the mask gives the reach, the whole mask must confirm it.
        let longest = grid[0].max(grid[1]);
        for reach in (0..longest).rev() {
            let forbids = |i: usize, j: usize| (i / grid[1]).abs_diff(j / grid[1]) <= reach && (i % grid[1]).abs_diff(j % grid[1]) <= reach;
            let row_fits = |i: usize| (0..tokens).all(|j| (plane[i * tokens + j] != 0.0) == forbids(i, j));
            if row_fits(0) && (1..tokens).all(row_fits) {
                return Some((grid, 2 * reach + 1));
            }
        }
    }
    plane.iter().all(|&value| value == 0.0).then_some((grid, 0)).filter(|(grid, _)| grid[0] * grid[1] == tokens)
}

/// A node's value from constant inputs; `None` where folding does not pay or is not known.
fn evaluate(node: &Node, inputs: &[Arc<[f32]>], shapes: &[&[usize]]) -> Option<Vec<f32>> {
    match (&node.op, inputs) {
        // A constant query is split into heads as any other: there the pattern must stay.
        (Op::Reshape | Op::Transpose(_), _) if node.shape.len() > 2 => None,
        (Op::Reshape, [x]) => Some(x.to_vec()),
        (Op::Unary(unary), [x]) => Some(x.iter().map(|&x| unary.apply(x)).collect()),
        (Op::Binary(binary), [a, b]) => {
            let (a, b) = (broadcast(a, shapes[0], &node.shape)?, broadcast(b, shapes[1], &node.shape)?);
            Some(a.iter().zip(&b).map(|(&a, &b)| binary.apply(a, b)).collect())
        }
        (Op::Transpose(perm), [x]) => {
            let strides = row_major(shapes[0]);
            let turned: Vec<usize> = perm.iter().map(|&axis| strides[axis]).collect();
            Some(gather(x, &node.shape, &turned))
        }
        (Op::MatMul, [a, b]) if shapes[1].len() == 2 => Some(multiply(a, b, *shapes[0].last()?, shapes[1][1])),
        (Op::Linear(linear), [x]) => {
            let mut out = multiply(x, &linear.weight, *shapes[0].last()?, linear.bias.len());
            for row in out.chunks_exact_mut(linear.bias.len().max(1)) {
                row.iter_mut().zip(&linear.bias).for_each(|(y, bias)| *y = linear.activation.apply(*y + bias));
            }
            Some(out)
        }
        _ => None,
    }
}

/// Strides of a row-major tensor.
pub(super) fn row_major(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1; shape.len()];
    for axis in (0..shape.len().saturating_sub(1)).rev() {
        strides[axis] = strides[axis + 1] * shape[axis + 1];
    }
    strides
}

/// Row-major values of a strided tensor.
pub(super) fn gather(values: &[f32], shape: &[usize], strides: &[usize]) -> Vec<f32> {
    let total: usize = shape.iter().product();
    let places = row_major(shape);
    (0..total)
        .map(|i| values[places.iter().zip(shape).zip(strides).map(|((place, dim), stride)| i / place % dim * stride).sum::<usize>()])
        .collect()
}

/// Values repeated to a larger shape by the rules of ONNX.
pub(super) fn broadcast(values: &[f32], from: &[usize], to: &[usize]) -> Option<Vec<f32>> {
    let missing = to.len().checked_sub(from.len())?;
    let strides = row_major(from);
    let spread: Option<Vec<usize>> = (0..to.len())
        .map(|axis| match axis.checked_sub(missing) {
            None => Some(0),
            Some(own) if from[own] == to[axis] => Some(strides[own]),
            Some(own) if from[own] == 1 => Some(0),
            Some(_) => None,
        })
        .collect();
    Some(gather(values, to, &spread?))
}

struct Reader {
    nodes: Vec<Node>,
    values: HashMap<String, Id>,
    /// Integer constants: shapes, sizes, axes.
    integers: HashMap<String, Vec<i64>>,
    /// 8-bit constants with their shapes: quantized weights and zero points.
    bytes: HashMap<String, (Vec<usize>, Arc<[i8]>)>,
    /// See [`Graph::int8`].
    int8: HashMap<Id, (Int8, usize)>,
    opset: i64,
}

impl Reader {
    fn push(&mut self, op: Op, inputs: Vec<Id>, shape: Vec<usize>, name: &str) -> Id {
        self.nodes.push(Node { op, inputs, shape, name: name.into() });
        self.nodes.len() - 1
    }

    fn value(&self, name: &str) -> Supported<Id> {
        self.values.get(name).copied().ok_or_else(|| Unsupported(format!("`{name}` is no float value")))
    }

    fn constant(&mut self, name: &str, tensor: &pb::TensorProto) -> Supported<()> {
        let shape: Vec<usize> = tensor.dims.iter().map(|&dim| usize::try_from(dim).unwrap_or(0)).collect();
        match DataType::try_from(tensor.data_type) {
            Ok(DataType::Float) => {
                let values: Vec<f32> = if tensor.raw_data.is_empty() {
                    tensor.float_data.clone()
                } else {
                    tensor.raw_data.chunks_exact(4).filter_map(|bytes| bytes.try_into().ok().map(f32::from_le_bytes)).collect()
                };
                if values.len() != shape.iter().product::<usize>() {
                    return unsupported(format!("constant `{name}` does not fit its shape"));
                }
                let id = self.push(Op::Const(values.into()), vec![], shape, name);
                self.values.insert(name.into(), id);
            }
            Ok(DataType::Int64) => {
                let values = if tensor.raw_data.is_empty() {
                    tensor.int64_data.clone()
                } else {
                    tensor.raw_data.chunks_exact(8).filter_map(|bytes| bytes.try_into().ok().map(i64::from_le_bytes)).collect()
                };
                self.integers.insert(name.into(), values);
            }
            Ok(DataType::Int8) => {
                let values: Vec<i8> = if tensor.raw_data.is_empty() {
                    tensor.int32_data.iter().filter_map(|&value| i8::try_from(value).ok()).collect()
                } else {
                    tensor.raw_data.iter().map(|&byte| byte as i8).collect()
                };
                if values.len() != shape.iter().product::<usize>() {
                    return unsupported(format!("constant `{name}` does not fit its shape"));
                }
                self.bytes.insert(name.into(), (shape, values.into()));
            }
            // Perhaps nobody needs it; who does will say so.
            _ => {}
        }
        Ok(())
    }

    fn node(&mut self, node: &pb::NodeProto) -> Supported<()> {
        let attribute = |name: &str| node.attribute.iter().find(|attribute| attribute.name == name);
        let int = |name: &str, default: i64| attribute(name).map_or(default, |attribute| attribute.i);
        let ints = |name: &str| attribute(name).map(|attribute| attribute.ints.as_slice());
        let text = |name: &str| attribute(name).map_or("", |attribute| std::str::from_utf8(&attribute.s).unwrap_or("?"));
        let fail = |what: &str| unsupported(format!("{} `{}`: {what}", node.op_type, node.output.first().map_or("", String::as_str)));
        let [output] = &node.output[..] else { return fail("not exactly one output") };
        let has = |index: usize| node.input.get(index).filter(|name| !name.is_empty());
        let input = |reader: &Self, index: usize| match has(index) {
            Some(name) => reader.value(name),
            None => unsupported(format!("{} `{output}` lacks input {index}", node.op_type)),
        };
        // Integer arithmetic on shapes happens here and leaves no node.
        match node.op_type.as_str() {
            "Constant" => {
                return match attribute("value").and_then(|attribute| attribute.t.as_ref()) {
                    Some(tensor) => self.constant(output, tensor),
                    None => fail("not a tensor"),
                };
            }
            "Shape" => {
                let shape = self.nodes[input(self, 0)?].shape.clone();
                let rank = shape.len() as i64;
                let at = |position: i64| if position < 0 { position + rank } else { position }.clamp(0, rank) as usize;
                let (start, end) = (at(int("start", 0)), at(int("end", rank)));
                let Some(part) = shape.get(start..end.max(start)) else { return fail("range") };
                self.integers.insert(output.clone(), part.iter().map(|&dim| dim as i64).collect());
                return Ok(());
            }
            "Concat" if node.input.iter().all(|name| self.integers.contains_key(name)) => {
                let joined = node.input.iter().flat_map(|name| self.integers[name].clone()).collect();
                self.integers.insert(output.clone(), joined);
                return Ok(());
            }
            "DequantizeLinear" => {
                let Some((shape, bytes)) = node.input.first().and_then(|name| self.bytes.get(name)).cloned() else {
                    return fail("not of a constant of 8 bit");
                };
                if node.input.get(2).is_some_and(|name| !self.bytes.get(name).is_some_and(|(_, zero)| zero.iter().all(|&z| z == 0))) {
                    return fail("zero point");
                }
                let Op::Const(scale) = &self.nodes[input(self, 1)?].op else { return fail("scale") };
                let scale = scale.clone();
                let rank = shape.len() as i64;
                let axis = int("axis", 1);
                let axis = usize::try_from(if axis < 0 { axis + rank } else { axis }).unwrap_or(usize::MAX);
                let Some(&channels) = shape.get(axis).filter(|&&channels| scale.len() == channels || scale.len() == 1) else {
                    return fail("axis");
                };
                let inner: usize = shape[axis + 1..].iter().product();
                let of = |i: usize| if scale.len() == 1 { scale[0] } else { scale[i / inner.max(1) % channels] };
                let values = bytes.iter().enumerate().map(|(i, &byte)| f32::from(byte) * of(i)).collect::<Vec<_>>();
                let id = self.push(Op::Const(values.into()), vec![], shape.clone(), output);
                let scale = if scale.len() == 1 { vec![scale[0]; channels] } else { scale.to_vec() };
                self.int8.insert(id, (Int8 { weight: bytes, scale }, axis));
                self.values.insert(output.clone(), id);
                return Ok(());
            }
            "Identity" => {
                let id = input(self, 0)?;
                self.values.insert(output.clone(), id);
                return Ok(());
            }
            _ => {}
        }
        let x = input(self, 0)?;
        let shape = self.nodes[x].shape.clone();
        let constant = |reader: &Self, id: Id| match &reader.nodes[id].op {
            Op::Const(values) => Ok(values.clone()),
            _ => unsupported(format!("{} `{output}`: not constant", node.op_type)),
        };
        let axis = |axis: i64| -> Supported<usize> {
            let positive = if axis < 0 { axis + shape.len() as i64 } else { axis };
            usize::try_from(positive).ok().filter(|&axis| axis < shape.len()).ok_or_else(|| Unsupported(format!("axis {axis}")))
        };
        let pair = |name: &str, default: usize| -> Supported<[usize; 2]> {
            match ints(name) {
                None => Ok([default; 2]),
                Some(&[a, b]) if a >= 0 && b >= 0 => Ok([a as usize, b as usize]),
                Some(_) => unsupported(format!("`{name}` of `{output}`")),
            }
        };
        let pads = match ints("pads") {
            None => [0; 4],
            Some(&[top, left, bottom, right]) if [top, left, bottom, right].iter().all(|&pad| pad >= 0) => {
                [top as usize, left as usize, bottom as usize, right as usize]
            }
            Some(_) if node.op_type == "Pad" => [0; 4],
            Some(_) => return fail("pads"),
        };
        let unary = match node.op_type.as_str() {
            "Relu" => Some(Unary::Relu),
            "Sqrt" => Some(Unary::Sqrt),
            "Sigmoid" => Some(Unary::Smooth(Smooth::Sigmoid)),
            "Softplus" => Some(Unary::Softplus),
            "Exp" => Some(Unary::Exp),
            "Log" => Some(Unary::Log),
            "Neg" => Some(Unary::Neg),
            "Abs" => Some(Unary::Abs),
            "Tanh" => Some(Unary::Tanh),
            "Clip" => {
                let limit = |index: usize, default: f32| match has(index) {
                    None => Ok(default),
                    Some(name) => constant(self, self.value(name)?).map(|values| values.first().copied().unwrap_or(default)),
                };
                let (low, high) = (limit(1, f32::NEG_INFINITY)?, limit(2, f32::INFINITY)?);
                if low.is_nan() || high.is_nan() || low > high {
                    return fail("its limits are not in order");
                }
                Some(Unary::Clip(low, high))
            }
            _ => None,
        };
        let binary = match node.op_type.as_str() {
            "Add" => Some(Binary::Add),
            "Sub" => Some(Binary::Sub),
            "Mul" => Some(Binary::Mul),
            "Div" => Some(Binary::Div),
            _ => None,
        };
        let (op, inputs, out_shape) = if let Some(unary) = unary {
            (Op::Unary(unary), vec![x], shape)
        } else if let Some(binary) = binary {
            let b = input(self, 1)?;
            let Some(joint) = broadcast_shape(&shape, &self.nodes[b].shape) else { return fail("shapes do not broadcast") };
            (Op::Binary(binary), vec![x, b], joint)
        } else {
            match node.op_type.as_str() {
                "Conv" => {
                    let weight_id = input(self, 1)?;
                    let weight = constant(self, weight_id)?;
                    let (&[1, channels, height, width], &[outputs, per_group, kh, kw]) = (&shape[..], &self.nodes[weight_id].shape[..])
                    else {
                        return fail("not two-dimensional");
                    };
                    let group = usize::try_from(int("group", 1)).unwrap_or(0);
                    let depthwise = group == channels && outputs == channels && per_group == 1 && group > 1;
                    if !(depthwise || group == 1 && per_group == channels) {
                        return fail("groups");
                    }
                    if !matches!(text("auto_pad"), "" | "NOTSET") || ints("dilations").is_some_and(|all| all.iter().any(|&d| d != 1)) {
                        return fail("auto_pad or dilations");
                    }
                    let stride = pair("strides", 1)?;
                    let bias = match has(2) {
                        Some(name) => constant(self, self.value(name)?)?.to_vec(),
                        None => vec![0.0; outputs],
                    };
                    let (tall, wide) = (height + pads[0] + pads[2], width + pads[1] + pads[3]);
                    if bias.len() != outputs || stride.contains(&0) || kh == 0 || kw == 0 || tall < kh || wide < kw {
                        return fail("sizes");
                    }
                    let out = vec![1, outputs, (tall - kh) / stride[0] + 1, (wide - kw) / stride[1] + 1];
                    let pad = [pads[0], pads[1]];
                    let int8 = self.int8.get(&weight_id).filter(|(_, axis)| *axis == 0).map(|(int8, _)| int8.clone());
                    let conv = Conv { weight, int8, bias, kernel: [kh, kw], stride, pad, depthwise, activation: Activation::None };
                    (Op::Conv(conv), vec![x], out)
                }
                "MatMul" => {
                    let b = input(self, 1)?;
                    let right = &self.nodes[b].shape;
                    let (&[.., rows, inner], &[.., inner_too, columns]) = (&shape[..], &right[..]) else { return fail("vectors") };
                    let Some(mut out) = broadcast_shape(&shape[..shape.len() - 2], &right[..right.len() - 2]) else {
                        return fail("batches");
                    };
                    if inner != inner_too {
                        return fail("sizes");
                    }
                    out.extend([rows, columns]);
                    (Op::MatMul, vec![x, b], out)
                }
                "Softmax" => {
                    if axis(int("axis", -1))? + 1 != shape.len() {
                        return fail("axis");
                    }
                    (Op::Softmax, vec![x], shape)
                }
                "LayerNormalization" => {
                    if axis(int("axis", -1))? + 1 != shape.len() {
                        return fail("axis");
                    }
                    let gamma = constant(self, input(self, 1)?)?;
                    let beta = match has(2) {
                        Some(name) => constant(self, self.value(name)?)?,
                        None => vec![0.0; gamma.len()].into(),
                    };
                    if Some(&gamma.len()) != shape.last() || gamma.len() != beta.len() {
                        return fail("sizes");
                    }
                    let epsilon = attribute("epsilon").map_or(1e-5, |attribute| attribute.f);
                    (Op::LayerNorm { gamma, beta, epsilon }, vec![x], shape)
                }
                "Reshape" => {
                    let Some(wanted) = has(1).and_then(|name| self.integers.get(name)) else { return fail("the shape is not constant") };
                    let Some(out) = reshaped(&shape, wanted, int("allowzero", 0) != 0) else { return fail("sizes") };
                    (Op::Reshape, vec![x], out)
                }
                "Flatten" | "Squeeze" | "Unsqueeze" => return fail("not known"),
                "Transpose" => {
                    let reversed: Vec<i64> = (0..shape.len() as i64).rev().collect();
                    let perm = ints("perm").unwrap_or(&reversed).iter().map(|&a| axis(a)).collect::<Supported<Vec<_>>>()?;
                    if perm.len() != shape.len() || (0..shape.len()).any(|axis| !perm.contains(&axis)) {
                        return fail("perm");
                    }
                    let out = perm.iter().map(|&axis| shape[axis]).collect();
                    (Op::Transpose(perm), vec![x], out)
                }
                "Resize" => {
                    let coordinates = match text("coordinate_transformation_mode") {
                        "align_corners" => Coordinates::AlignCorners,
                        "" | "half_pixel" => Coordinates::HalfPixel,
                        "asymmetric" => Coordinates::Asymmetric,
                        _ => return fail("coordinates"),
                    };
                    let &[1, channels, _, _] = &shape[..] else { return fail("rank") };
                    let Some(&[1, same, height, width]) = has(3).and_then(|name| self.integers.get(name)).map(Vec::as_slice) else {
                        return fail("sizes are not given");
                    };
                    if text("mode") != "linear" || int("antialias", 0) != 0 || int("exclude_outside", 0) != 0 || same != channels as i64 {
                        return fail("mode");
                    }
                    if height < 1 || width < 1 || ints("axes").is_some() {
                        return fail("sizes");
                    }
                    (Op::Resize(coordinates), vec![x], vec![1, channels, height as usize, width as usize])
                }
                "Concat" => {
                    let axis = axis(int("axis", 0))?;
                    let inputs = (0..node.input.len()).map(|index| input(self, index)).collect::<Supported<Vec<_>>>()?;
                    let mut out = shape;
                    for &other in &inputs[1..] {
                        let other = &self.nodes[other].shape;
                        if other.len() != out.len() || other.iter().zip(&out).enumerate().any(|(a, (x, y))| a != axis && x != y) {
                            return fail("shapes");
                        }
                        out[axis] += other[axis];
                    }
                    (Op::Concat(axis), inputs, out)
                }
                "MaxPool" => {
                    let &[1, channels, height, width] = &shape[..] else { return fail("rank") };
                    let (kernel, stride) = (pair("kernel_shape", 1)?, pair("strides", 1)?);
                    let plain = pads == [0; 4] && int("ceil_mode", 0) == 0 && matches!(text("auto_pad"), "" | "NOTSET" | "VALID");
                    let dilated = ints("dilations").is_some_and(|all| all.iter().any(|&d| d != 1));
                    if !plain || dilated || stride.contains(&0) || kernel.contains(&0) || kernel[0] > height || kernel[1] > width {
                        return fail("form");
                    }
                    let out = vec![1, channels, (height - kernel[0]) / stride[0] + 1, (width - kernel[1]) / stride[1] + 1];
                    (Op::MaxPool { kernel, stride }, vec![x], out)
                }
                "GlobalAveragePool" => {
                    let &[1, channels, _, _] = &shape[..] else { return fail("rank") };
                    (Op::GlobalMean, vec![x], vec![1, channels, 1, 1])
                }
                "ReduceSum" | "ReduceMean" | "ReduceL2" => {
                    let kind = match node.op_type.as_str() {
                        "ReduceSum" => Reduction::Sum,
                        "ReduceMean" => Reduction::Mean,
                        _ => Reduction::Norm,
                    };
                    // Axes moved from attribute to input: ReduceSum with opset 13, the others with 18.
                    let as_input = self.opset >= if kind == Reduction::Sum { 13 } else { 18 };
                    let axes = if as_input { has(1).and_then(|name| self.integers.get(name)).map(Vec::as_slice) } else { ints("axes") };
                    if let (Reduction::Mean, Some(&[a, b]), &[1, channels, ..]) = (kind, axes, &shape[..])
                        && shape.len() == 4
                        && matches!([axis(a)?, axis(b)?], [2, 3] | [3, 2])
                    {
                        let out = if int("keepdims", 1) != 0 { vec![1, channels, 1, 1] } else { vec![1, channels] };
                        let id = self.push(Op::GlobalMean, vec![x], out, output);
                        self.values.insert(output.clone(), id);
                        return Ok(());
                    }
                    let Some(&[reduced]) = axes else { return fail("not over one axis") };
                    let axis = axis(reduced)?;
                    let mut out = shape;
                    if int("keepdims", 1) != 0 {
                        out[axis] = 1;
                    } else {
                        out.remove(axis);
                    }
                    (Op::Reduce { kind, axis }, vec![x], out)
                }
                _ => return fail("not known"),
            }
        };
        let id = self.push(op, inputs, out_shape, output);
        self.values.insert(output.clone(), id);
        Ok(())
    }
}

fn broadcast_shape(a: &[usize], b: &[usize]) -> Option<Vec<usize>> {
    let rank = a.len().max(b.len());
    let dim = |shape: &[usize], axis: usize| (axis + shape.len()).checked_sub(rank).map_or(1, |own| shape[own]);
    (0..rank)
        .map(|axis| match (dim(a, axis), dim(b, axis)) {
            (x, y) if x == y => Some(x),
            (1, y) => Some(y),
            (x, 1) => Some(x),
            _ => None,
        })
        .collect()
}

/// ONNX Reshape: 0 copies a dimension (unless `allow_zero`), -1 is what is left.
fn reshaped(shape: &[usize], wanted: &[i64], allow_zero: bool) -> Option<Vec<usize>> {
    let total: usize = shape.iter().product();
    let mut out = Vec::new();
    let mut open = None;
    for (axis, &dim) in wanted.iter().enumerate() {
        out.push(match dim {
            -1 if open.is_none() => {
                open = Some(axis);
                1
            }
            0 if !allow_zero => *shape.get(axis)?,
            dim => usize::try_from(dim).ok()?,
        });
    }
    let known = out.iter().try_fold(1usize, |product, &dim| product.checked_mul(dim))?;
    if let Some(axis) = open {
        out[axis] = total.checked_div(known)?;
    }
    (out.iter().try_fold(1usize, |product, &dim| product.checked_mul(dim)) == Some(total)).then_some(out)
}
