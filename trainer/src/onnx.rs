//! Writes standard ONNX: a backbone with its feature grid, and UniAD after it. onnxruntime and tract run the same file.
//!
//! Knows graphs and numbers only; what goes into the bundle's metadata is the caller's business.

use crate::modes::{CLOSED, MODE_LOGIT, Modes};
use crate::uniad::{NeighbourMask, UniadConfig, neighbour_mask};
use prost::Message;
use std::collections::{BTreeMap, HashSet};
use std::path::Path;
use tract_onnx::pb;

/// Opset of everything written here: the first with LayerNormalization.
const OPSET: i64 = 17;
/// Score added where a token may not attend; see `uniad`.
const FORBIDDEN: f32 = -1e9;
/// ONNX's number for float32.
const FLOAT: i32 = 1;
/// ONNX's number for int64.
const INT64: i32 = 7;
/// Largest backbone file read; EfficientNet-B4 is 75 MB.
const MAX_BACKBONE_BYTES: u64 = 512 << 20;
/// The backbone that ships with the trainer.
const BUILT_IN: &[u8] = include_bytes!("../../models/backbone.onnx");
/// The file of the backbone that ships with the trainer.
pub fn built_in_backbone() -> &'static [u8] {
    BUILT_IN
}

/// Metadata of a backbone file: pixel mean and scale that it was trained with, three comma-separated numbers each.
pub(crate) const PIXEL_MEAN_KEY: &str = "cull.pixel_mean";
/// See [`PIXEL_MEAN_KEY`].
pub(crate) const PIXEL_STD_KEY: &str = "cull.pixel_std";

/// How a backbone wants its pixels: `input = (pixel - mean) / std`, per channel (red, green, blue), in 8-bit units.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PixelScale {
    /// Mean.
    pub mean: [f32; 3],
    /// Scale.
    pub std: [f32; 3],
}

/// Why a graph cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum OnnxError {
    /// The file cannot be read or is no ONNX model.
    #[error("backbone {path}: {why}")]
    Read {
        /// File.
        path: String,
        /// Cause, and what to do.
        why: String,
    },
    /// A detector that is to be trained further cannot be read or is another network.
    #[error("detector {path}: {why}")]
    Detector {
        /// File.
        path: String,
        /// Cause, and what to do.
        why: String,
    },
    /// A weight or output that the graph needs is missing.
    #[error("cannot write the model: {0}")]
    Missing(String),
}

/// An ONNX graph under construction.
#[derive(Clone, Default)]
pub struct Graph {
    proto: pb::GraphProto,
    next: usize,
}

/// Attribute values that the writers use.
pub(crate) enum Attr<'a> {
    Int(i64),
    Float(f32),
    Ints(&'a [i64]),
    Text(&'a str),
}

impl Graph {
    /// Nodes so far.
    pub fn node_count(&self) -> usize {
        self.proto.node.len()
    }

    pub(crate) fn node(&mut self, op: &str, inputs: &[&str], attributes: &[(&str, Attr<'_>)]) -> String {
        self.next += 1;
        let out = format!("{}_{}", op.to_lowercase(), self.next);
        let attribute = attributes
            .iter()
            .map(|(name, value)| {
                use pb::attribute_proto::AttributeType as T;
                let mut a = pb::AttributeProto { name: (*name).into(), ..Default::default() };
                match value {
                    Attr::Int(i) => (a.i, a.r#type) = (*i, T::Int as i32),
                    Attr::Float(f) => (a.f, a.r#type) = (*f, T::Float as i32),
                    Attr::Ints(list) => (a.ints, a.r#type) = (list.to_vec(), T::Ints as i32),
                    Attr::Text(s) => (a.s, a.r#type) = (s.as_bytes().to_vec(), T::String as i32),
                }
                a
            })
            .collect();
        self.proto.node.push(pb::NodeProto {
            input: inputs.iter().map(|s| (*s).to_owned()).collect(),
            output: vec![out.clone()],
            name: out.clone(),
            op_type: op.into(),
            attribute,
            ..Default::default()
        });
        out
    }

    pub(crate) fn floats(&mut self, name: &str, dims: &[usize], data: &[f32]) -> String {
        let raw_data = data.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.initializer(name, FLOAT, dims, raw_data)
    }

    pub(crate) fn ints(&mut self, data: &[i64]) -> String {
        self.next += 1;
        let name = format!("shape_{}", self.next);
        self.initializer(&name, INT64, &[data.len()], data.iter().flat_map(|v| v.to_le_bytes()).collect())
    }

    fn initializer(&mut self, name: &str, data_type: i32, dims: &[usize], raw_data: Vec<u8>) -> String {
        self.proto.initializer.push(pb::TensorProto {
            name: name.into(),
            data_type,
            dims: dims.iter().map(|d| *d as i64).collect(),
            raw_data,
            ..Default::default()
        });
        name.into()
    }

    pub(crate) fn reshape(&mut self, x: &str, shape: &[i64]) -> String {
        let shape = self.ints(shape);
        self.node("Reshape", &[x, &shape], &[])
    }

    pub(crate) fn transpose(&mut self, x: &str, perm: &[i64]) -> String {
        self.node("Transpose", &[x], &[("perm", Attr::Ints(perm))])
    }

    pub(crate) fn output(&mut self, name: &str, from: &str, dims: &[Option<usize>]) {
        self.proto.output.clear();
        self.add_output(name, from, dims);
    }

    /// One more output.
    pub(crate) fn add_output(&mut self, name: &str, from: &str, dims: &[Option<usize>]) {
        self.proto.node.push(pb::NodeProto {
            input: vec![from.into()],
            output: vec![name.into()],
            name: format!("{name}_out"),
            op_type: "Identity".into(),
            ..Default::default()
        });
        self.proto.output.push(value_info(name, dims));
    }

    /// The only input.
    pub(crate) fn set_input(&mut self, name: &str, dims: &[Option<usize>]) {
        self.proto.input = vec![value_info(name, dims)];
    }

    /// The finished file.
    pub fn into_bytes(self, producer: &str) -> Vec<u8> {
        self.into_model(producer).encode_to_vec()
    }

    /// The finished file of a backbone: it says which pixels it wants, and [`Backbone::load`] reads that.
    pub(crate) fn into_backbone_bytes(mut self, producer: &str, pixels: &PixelScale) -> Vec<u8> {
        self.proto.name = "backbone".into();
        let mut model = self.into_model(producer);
        for (key, [r, g, b]) in [(PIXEL_MEAN_KEY, pixels.mean), (PIXEL_STD_KEY, pixels.std)] {
            model.metadata_props.push(pb::StringStringEntryProto { key: key.into(), value: format!("{r},{g},{b}") });
        }
        model.encode_to_vec()
    }

    fn into_model(self, producer: &str) -> pb::ModelProto {
        pb::ModelProto {
            ir_version: 8,
            opset_import: vec![pb::OperatorSetIdProto { domain: String::new(), version: OPSET }],
            producer_name: producer.into(),
            producer_version: env!("CARGO_PKG_VERSION").into(),
            graph: Some(self.proto),
            ..Default::default()
        }
    }
}

/// `None` is a dimension that only the graph knows.
fn value_info(name: &str, dims: &[Option<usize>]) -> pb::ValueInfoProto {
    use pb::tensor_shape_proto::dimension::Value;
    let dim = dims
        .iter()
        .map(|d| pb::tensor_shape_proto::Dimension { denotation: String::new(), value: d.map(|d| Value::DimValue(d as i64)) })
        .collect();
    let tensor = pb::type_proto::Tensor { elem_type: FLOAT, shape: Some(pb::TensorShapeProto { dim }) };
    pb::ValueInfoProto {
        name: name.into(),
        r#type: Some(pb::TypeProto { denotation: String::new(), value: Some(pb::type_proto::Value::TensorType(tensor)) }),
        ..Default::default()
    }
}

/// A backbone file: its graph and what its outputs are called.
#[derive(Clone)]
pub struct Backbone {
    graph: pb::GraphProto,
    /// Name of the image input.
    pub input: String,
    /// Outputs that the file offers.
    pub outputs: Vec<String>,
    /// Pixels that it wants, where its metadata says so (as `import-backbone` writes it).
    pub pixels: Option<PixelScale>,
}

impl Backbone {
    /// Read an ONNX backbone with one image input and stage outputs.
    ///
    /// # Errors
    /// When the file is too large, no ONNX, has no single input, or no outputs.
    pub fn load(path: &Path) -> Result<Self, OnnxError> {
        let fail = |why: String| OnnxError::Read { path: path.display().to_string(), why };
        let size = std::fs::metadata(path)
            .map_err(|e| fail(format!("cannot be read ({e}); give the ONNX file of a backbone with stage outputs")))?
            .len();
        if size > MAX_BACKBONE_BYTES {
            return Err(fail(format!("is {} MB, more than the {} MB allowed", size >> 20, MAX_BACKBONE_BYTES >> 20)));
        }
        let bytes = std::fs::read(path).map_err(|e| fail(format!("cannot be read ({e})")))?;
        Self::from_bytes(&bytes, &path.display().to_string())
    }

    /// The backbone that ships with the trainer: ours, made by `cull-trainer distill` (`models/MODEL_CARD.md`).
    ///
    /// # Errors
    /// Never, unless the trainer was built with a damaged `models/backbone.onnx`.
    pub fn built_in() -> Result<Self, OnnxError> {
        Self::from_bytes(BUILT_IN, "built into cull-trainer")
    }

    fn from_bytes(bytes: &[u8], name: &str) -> Result<Self, OnnxError> {
        let fail = |why: String| OnnxError::Read { path: name.to_owned(), why };
        let model = pb::ModelProto::decode(bytes).map_err(|e| fail(format!("is no ONNX model ({e})")))?;
        let graph = model.graph.clone().ok_or_else(|| fail("holds no graph".into()))?;
        let constants: HashSet<&str> = graph.initializer.iter().map(|t| t.name.as_str()).collect();
        let inputs: Vec<&str> = graph.input.iter().map(|i| i.name.as_str()).filter(|n| !constants.contains(n)).collect();
        let [input] = inputs.as_slice() else {
            return Err(fail(format!("has {} inputs, expected one image", inputs.len())));
        };
        let input = (*input).to_owned();
        let outputs: Vec<String> = graph.output.iter().map(|o| o.name.clone()).collect();
        if outputs.is_empty() {
            return Err(fail("has no outputs".into()));
        }
        let three = |key: &str| -> Result<Option<[f32; 3]>, OnnxError> {
            let Some(entry) = model.metadata_props.iter().find(|p| p.key == key) else { return Ok(None) };
            let numbers: Vec<f32> = entry.value.split(',').map_while(|n| n.trim().parse().ok()).collect();
            match numbers.as_slice() {
                [r, g, b] => Ok(Some([*r, *g, *b])),
                _ => Err(fail(format!("has metadata {key} = {:?}, expected three comma-separated numbers", entry.value))),
            }
        };
        let pixels = match (three(PIXEL_MEAN_KEY)?, three(PIXEL_STD_KEY)?) {
            (Some(mean), Some(std)) => Some(PixelScale { mean, std }),
            _ => None,
        };
        Ok(Self { graph, input, outputs, pixels })
    }

    /// The graph from image `[1, 3, height, width]` to the features `outputs`, each resized (bilinear, align corners) to `grid` and concatenated:
    /// `features`, `[1, channels, grid rows, grid columns]`. Everything after the last stage used is dropped.
    ///
    /// # Errors
    /// When an output is not in the file.
    pub fn features(&self, outputs: &[String], grid: [usize; 2], input_px: [usize; 2]) -> Result<(Graph, String), OnnxError> {
        let mut graph = self.start(outputs, input_px)?;
        let mut parts = Vec::new();
        for output in outputs {
            let shape = graph.ints(&[grid[0] as i64, grid[1] as i64]);
            // `sizes` wants all four dimensions in opset 17; the channel count comes from the tensor itself.
            let dims = graph.node("Shape", &[output], &[("start", Attr::Int(0)), ("end", Attr::Int(2))]);
            let sizes = graph.node("Concat", &[&dims, &shape], &[("axis", Attr::Int(0))]);
            parts.push(graph.node(
                "Resize",
                &[output, "", "", &sizes],
                &[("mode", Attr::Text("linear")), ("coordinate_transformation_mode", Attr::Text("align_corners"))],
            ));
        }
        let names: Vec<&str> = parts.iter().map(String::as_str).collect();
        let joined = graph.node("Concat", &names, &[("axis", Attr::Int(1))]);
        Ok((graph, joined))
    }
}

/// The part of a graph that `outputs` depend on.
fn pruned(graph: &pb::GraphProto, outputs: &[String]) -> pb::GraphProto {
    let producer: BTreeMap<&str, usize> =
        graph.node.iter().enumerate().flat_map(|(i, n)| n.output.iter().map(move |o| (o.as_str(), i))).collect();
    let mut wanted: Vec<&str> = outputs.iter().map(String::as_str).collect();
    let mut names: HashSet<&str> = HashSet::new();
    let mut nodes = vec![false; graph.node.len()];
    while let Some(name) = wanted.pop() {
        if !names.insert(name) {
            continue;
        }
        if let Some(node) = producer.get(name).and_then(|i| {
            if let Some(flag) = nodes.get_mut(*i) {
                *flag = true;
            }
            graph.node.get(*i)
        }) {
            wanted.extend(node.input.iter().map(String::as_str));
        }
    }
    pb::GraphProto {
        node: graph.node.iter().zip(&nodes).filter(|(_, keep)| **keep).map(|(n, _)| n.clone()).collect(),
        initializer: graph.initializer.iter().filter(|t| names.contains(t.name.as_str())).cloned().collect(),
        ..Default::default()
    }
}

/// How a stage's map becomes one vector per grid location.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cells {
    /// Bilinear resize, align corners (the paper). Of a stage with more locations than the grid most are never looked at.
    #[default]
    Bilinear,
    /// Mean and maximum over each grid cell: every location counts, and a small defect is not averaged away.
    MeanMax,
}

impl Backbone {
    /// The plain stages, for asking a runtime for their shapes.
    ///
    /// # Errors
    /// When an output is not in the file.
    pub fn stages(&self, outputs: &[String], input_px: [usize; 2]) -> Result<Vec<u8>, OnnxError> {
        let mut graph = self.start(outputs, input_px)?;
        graph.proto.output = outputs.iter().map(|name| value_info(name, &[Some(1), None, None, None])).collect();
        Ok(graph.into_bytes("cull-trainer"))
    }

    /// As [`Backbone::features`] with [`Cells::MeanMax`]: per stage the mean of each cell and, where a cell holds more than one location, its maximum.
    /// `shapes` are the stages' `[channels, height, width]`. A stage coarser than the grid is resized to it; one whose sides are no multiple of the
    /// grid's, to the next multiple.
    ///
    /// # Errors
    /// When an output is not in the file or a shape is missing.
    pub fn cell_features(
        &self,
        outputs: &[String],
        shapes: &[[usize; 3]],
        grid: [usize; 2],
        input_px: [usize; 2],
    ) -> Result<(Graph, String), OnnxError> {
        let mut graph = self.start(outputs, input_px)?;
        let mut parts = Vec::new();
        for (index, output) in outputs.iter().enumerate() {
            let Some(&[channels, height, width]) = shapes.get(index) else {
                return Err(OnnxError::Missing(format!("the shape of stage {output} is not known")));
            };
            let cell = [height.div_ceil(grid[0]), width.div_ceil(grid[1])];
            let sides = [cell[0] * grid[0], cell[1] * grid[1]];
            let mut map = output.clone();
            if sides != [height, width] {
                let sizes = graph.ints(&[1, channels as i64, sides[0] as i64, sides[1] as i64]);
                map = graph.node(
                    "Resize",
                    &[&map, "", "", &sizes],
                    &[("mode", Attr::Text("linear")), ("coordinate_transformation_mode", Attr::Text("align_corners"))],
                );
            }
            if cell == [1, 1] {
                parts.push(map);
                continue;
            }
            let kernel = [cell[0] as i64, cell[1] as i64];
            let taps = cell[0] * cell[1];
            // A depthwise convolution: AveragePool by the name that every runtime is fast at.
            let weight =
                graph.floats(&format!("cell_mean_{index}"), &[channels, 1, cell[0], cell[1]], &vec![1.0 / taps as f32; channels * taps]);
            parts.push(graph.node(
                "Conv",
                &[&map, &weight],
                &[("group", Attr::Int(channels as i64)), ("kernel_shape", Attr::Ints(&kernel)), ("strides", Attr::Ints(&kernel))],
            ));
            parts.push(graph.node("MaxPool", &[&map], &[("kernel_shape", Attr::Ints(&kernel)), ("strides", Attr::Ints(&kernel))]));
        }
        let names: Vec<&str> = parts.iter().map(String::as_str).collect();
        let joined = graph.node("Concat", &names, &[("axis", Attr::Int(1))]);
        Ok((graph, joined))
    }

    /// The part of the file that `outputs` depend on, with its input named and shaped as a bundle's.
    fn start(&self, outputs: &[String], input_px: [usize; 2]) -> Result<Graph, OnnxError> {
        for wanted in outputs {
            if !self.outputs.contains(wanted) {
                return Err(OnnxError::Missing(format!("the backbone has no output {wanted}; it offers {}", self.outputs.join(", "))));
            }
        }
        let proto = pruned(&self.graph, outputs);
        // Backbones that this writer wrote have names like ours: what is added counts on from theirs.
        let names = proto.node.iter().flat_map(|n| &n.output).chain(proto.initializer.iter().map(|t| &t.name));
        let next = names.filter_map(|name| name.rsplit_once('_')?.1.parse().ok()).filter(|n| *n < u32::MAX as usize).max().unwrap_or(0);
        let mut graph = Graph { proto, next };
        for node in &mut graph.proto.node {
            for name in node.input.iter_mut().filter(|n| **n == self.input) {
                *name = "input".into();
            }
        }
        graph.proto.name = "cull".into();
        graph.proto.input = vec![value_info("input", &[Some(1), Some(3), Some(input_px[0]), Some(input_px[1])])];
        graph.proto.value_info.clear();
        Ok(graph)
    }
}

/// Append modes of normality to a feature graph and finish it: output `anomaly_map`, `[1, 1, grid rows, grid columns]`.
///
/// Written in operators that every runtime has and that `cull`'s own executor lowers, which is why softmax and broadcasts of computed values appear as
/// products with constant matrices.
///
/// # Errors
/// When the grid is not the one that was fitted.
pub fn append_modes(mut graph: Graph, joined: &str, modes: &Modes, grid: [usize; 2]) -> Result<Vec<u8>, OnnxError> {
    let (t, c, k) = (modes.tokens, modes.channels, modes.count);
    if grid[0] * grid[1] != t {
        return Err(OnnxError::Missing(format!("modes were fitted on {t} locations, the grid is {} x {}", grid[0], grid[1])));
    }
    let g = &mut graph;
    let flat = g.reshape(joined, &[c as i64, t as i64]);
    let tokens = g.transpose(&flat, &[1, 0]);
    let mean = g.floats("feature_mean", &[1, c], &modes.mean);
    let centred = g.node("Sub", &[&tokens, &mean], &[]);

    // Which group: softmax of a linear function of the mean features.
    let descriptor = g.node("ReduceMean", &[&centred], &[("axes", Attr::Ints(&[0])), ("keepdims", Attr::Int(1))]);
    let groups = modes.groups();
    let linear = |g: &mut Graph, name: &str, weight: &[f32], bias: &[f32]| {
        let columns = bias.len();
        let scaled: Vec<f32> =
            weight.chunks_exact(columns.max(1)).zip(&modes.scale).flat_map(|(row, s)| row.iter().map(move |w| w * s)).collect();
        let weight = g.floats(&format!("modes_{name}_weight"), &[c, columns], &scaled);
        let bias = g.floats(&format!("modes_{name}_bias"), &[columns], bias);
        let product = g.node("MatMul", &[&descriptor, &weight], &[]);
        g.node("Add", &[&product, &bias], &[])
    };
    // What hardly counts does not count at all, so that an executor may pass it over.
    let open = |g: &mut Graph, weights: &str, closed: &str| {
        let above = g.node("Sub", &[weights, closed], &[]);
        g.node("Relu", &[&above], &[])
    };
    let logits = linear(g, "group", &modes.group_weight, &modes.group_bias);
    let row = g.reshape(&logits, &[1, 1, 1, groups as i64]);
    let highest = g.node("MaxPool", &[&row], &[("kernel_shape", Attr::Ints(&[1, groups as i64])), ("strides", Attr::Ints(&[1, 1]))]);
    let highest = g.reshape(&highest, &[1, 1]);
    let ones_row = g.floats("modes_ones_row", &[1, groups], &vec![1.0; groups]);
    let highest = g.node("MatMul", &[&highest, &ones_row], &[]);
    let shifted = g.node("Sub", &[&logits, &highest], &[]);
    let exponential = g.node("Exp", &[&shifted], &[]);
    let ones = g.floats("modes_ones", &[groups, groups], &vec![1.0; groups * groups]);
    let sum = g.node("MatMul", &[&exponential, &ones], &[]);
    let group_weights = g.node("Div", &[&exponential, &sum], &[]);
    let closed = g.floats("modes_closed", &[1, groups], &vec![CLOSED; groups]);
    let group_weights = open(g, &group_weights, &closed);
    // Where nothing is open (a runtime whose Relu makes 0 of what is no number), 0 / 0 takes that on to the map.
    let sum = g.node("MatMul", &[&group_weights, &ones], &[]);
    let group_weights = g.node("Div", &[&group_weights, &sum], &[]);

    // Which of its modes: a softmax within each group. The logits are clipped, by what every runtime has.
    let logits = linear(g, "mode", &modes.mode_weight, &modes.mode_bias);
    let limit = g.floats("modes_mode_logit", &[1, k], &vec![MODE_LOGIT; k]);
    let above = g.node("Add", &[&logits, &limit], &[]);
    let above = g.node("Relu", &[&above], &[]);
    let beyond = g.node("Sub", &[&logits, &limit], &[]);
    let beyond = g.node("Relu", &[&beyond], &[]);
    let clipped = g.node("Sub", &[&above, &beyond], &[]);
    let clipped = g.node("Sub", &[&clipped, &limit], &[]);
    let exponential = g.node("Exp", &[&clipped], &[]);
    let together = |a: usize, b: usize| f32::from(u8::from(modes.group_of[a] == modes.group_of[b]));
    let block: Vec<f32> = (0..k * k).map(|i| together(i / k, i % k)).collect();
    let block = g.floats("modes_same_group", &[k, k], &block);
    let sum = g.node("MatMul", &[&exponential, &block], &[]);
    let within = g.node("Div", &[&exponential, &sum], &[]);
    let closed = g.floats("modes_closed_modes", &[1, k], &vec![CLOSED; k]);
    let within = open(g, &within, &closed);
    let member: Vec<f32> = (0..groups * k).map(|i| f32::from(u8::from(modes.group_of[i % k] == i / k))).collect();
    let member = g.floats("modes_mode_of_group", &[groups, k], &member);
    let of_their_group = g.node("MatMul", &[&group_weights, &member], &[]);
    let mode_weights = g.node("Mul", &[&within, &of_their_group], &[]);

    // The picture's own whitening and expectation: those of its mode or, between modes, their mixture. So one product does for all groups.
    let scaled: Vec<f32> =
        modes.whiten.chunks_exact(c).zip(modes.scale.iter().cycle()).flat_map(|(row, scale)| row.iter().map(move |w| w * scale)).collect();
    let whiten = g.floats("modes_whiten", &[groups, c * c], &scaled);
    let whiten = g.node("MatMul", &[&group_weights, &whiten], &[]);
    let whiten = g.reshape(&whiten, &[c as i64, c as i64]);
    let coordinates = g.node("MatMul", &[&centred, &whiten], &[]);
    let mut mixed = |name: &str, values: &[f32], shape: &[i64]| {
        let table = g.floats(&format!("modes_{name}"), &[k, values.len() / k.max(1)], values);
        let row = g.node("MatMul", &[&mode_weights, &table], &[]);
        g.reshape(&row, shape)
    };
    let by_mode = |values: &[f32]| -> Vec<f32> { (0..k * t).filter_map(|i| values.get(i % t * k + i / t).copied()).collect() };
    let expected = mixed("expected", &modes.expected, &[t as i64, c as i64]);
    let offset = mixed("offset", &by_mode(&modes.offset), &[t as i64]);
    let gain = mixed("gain", &by_mode(&modes.gain), &[t as i64]);

    // Squared distance of every location to what is expected there.
    let off = g.node("Sub", &[&coordinates, &expected], &[]);
    let square = g.node("Mul", &[&off, &off], &[]);
    let axis = g.ints(&[1]);
    let distance = g.node("ReduceSum", &[&square, &axis], &[("keepdims", Attr::Int(0))]);
    let distance = g.node("Sub", &[&distance, &offset], &[]);
    let map = g.node("Mul", &[&distance, &gain], &[]);
    let map = g.reshape(&map, &[1, 1, grid[0] as i64, grid[1] as i64]);
    graph.output("anomaly_map", &map, &[Some(1), Some(1), Some(grid[0]), Some(grid[1])]);
    Ok(graph.into_bytes("cull-trainer"))
}

/// Finish a feature graph as the file that gives the tokens: output `features`, `[1, channels, grid rows, grid columns]`.
pub fn feature_file(mut graph: Graph, joined: &str, grid: [usize; 2]) -> Vec<u8> {
    graph.output("features", joined, &[Some(1), None, Some(grid[0]), Some(grid[1])]);
    graph.into_bytes("cull-trainer")
}

/// Constants around the transformer.
#[derive(Clone, Debug, Default)]
pub struct Normalisation {
    /// Features are whitened as `(feature - mean) * scale` before the transformer and the residual; one pair a channel.
    pub mean: Vec<f32>,
    /// See `mean`.
    pub scale: Vec<f32>,
    /// Residual scale, `[tokens, channels]` row-major; empty for none.
    pub residual_scale: Vec<f32>,
}

/// Append UniAD to a feature graph and finish it: output `anomaly_map`, `[1, 1, grid rows, grid columns]`. `weights` are in published layout.
///
/// # Errors
/// When a weight is missing or has the wrong length.
pub fn append_uniad(
    mut graph: Graph,
    joined: &str,
    config: &UniadConfig,
    weights: &[(String, Vec<usize>, Vec<f32>)],
    normalisation: &Normalisation,
) -> Result<Vec<u8>, OnnxError> {
    let mut writer = UniadWriter { graph: &mut graph, config, weights: weights.iter().map(|(n, s, d)| (n.as_str(), (s, d))).collect() };
    let map = writer.write(joined, normalisation)?;
    graph.output("anomaly_map", &map, &[Some(1), Some(1), Some(config.grid[0]), Some(config.grid[1])]);
    Ok(graph.into_bytes("cull-trainer"))
}

struct UniadWriter<'a> {
    graph: &'a mut Graph,
    config: &'a UniadConfig,
    weights: BTreeMap<&'a str, (&'a Vec<usize>, &'a Vec<f32>)>,
}

impl UniadWriter<'_> {
    fn write(&mut self, joined: &str, normalisation: &Normalisation) -> Result<String, OnnxError> {
        let c = self.config.clone();
        let (t, ch) = (c.tokens(), c.channels);
        let flat = self.graph.reshape(joined, &[ch as i64, t as i64]);
        let mut tokens = self.graph.transpose(&flat, &[1, 0]);
        if !normalisation.mean.is_empty() {
            let mean = self.graph.floats("feature_mean", &[1, ch], &normalisation.mean);
            let scale = self.graph.floats("feature_scale", &[1, ch], &normalisation.scale);
            let centred = self.graph.node("Sub", &[&tokens, &mean], &[]);
            tokens = self.graph.node("Mul", &[&centred, &scale], &[]);
        }
        let position = self.position()?;
        let NeighbourMask { encoder, decoder_memory, decoder_previous } = c.mask;
        let mut x = self.linear("inp", &tokens)?;
        for layer in 0..c.encoder_layers {
            let p = format!("encoder.{layer}");
            let placed = self.add(&x, &position);
            let a = self.attention(&format!("{p}.attn"), &placed, &placed, &x, encoder)?;
            x = self.add_norm(&format!("{p}.norm1"), &x, &a)?;
            let f = self.feed_forward(&p, &x)?;
            x = self.add_norm(&format!("{p}.norm2"), &x, &f)?;
        }
        let memory = x;
        let memory_placed = self.add(&memory, &position);
        let mut out = memory.clone();
        for layer in 0..c.decoder_layers {
            let p = format!("decoder.{layer}");
            let query_name = format!("{p}.query");
            let query = if self.weights.contains_key(query_name.as_str()) { self.constant(&query_name)? } else { out.clone() };
            let placed = self.add(&query, &position);
            let a = self.attention(&format!("{p}.attn1"), &placed, &memory_placed, &memory, decoder_memory)?;
            let y = self.add_norm(&format!("{p}.norm1"), &query, &a)?;
            let y_placed = self.add(&y, &position);
            let out_placed = self.add(&out, &position);
            let a = self.attention(&format!("{p}.attn2"), &y_placed, &out_placed, &out, decoder_previous)?;
            let y = self.add_norm(&format!("{p}.norm2"), &y, &a)?;
            let f = self.feed_forward(&p, &y)?;
            out = self.add_norm(&format!("{p}.norm3"), &y, &f)?;
        }
        let out = self.norm("norm", &out)?;
        let rebuilt = self.linear("out", &out)?;
        let mut residual = self.graph.node("Sub", &[&rebuilt, &tokens], &[]);
        if !normalisation.residual_scale.is_empty() {
            let scale = self.graph.floats("residual_scale", &[t, ch], &normalisation.residual_scale);
            residual = self.graph.node("Mul", &[&residual, &scale], &[]);
        }
        let norm = self.graph.node("ReduceL2", &[&residual], &[("axes", Attr::Ints(&[1])), ("keepdims", Attr::Int(1))]);
        Ok(self.graph.reshape(&norm, &[1, 1, c.grid[0] as i64, c.grid[1] as i64]))
    }

    fn value(&self, name: &str) -> Result<(Vec<usize>, Vec<f32>), OnnxError> {
        self.weights
            .get(name)
            .map(|(s, d)| ((*s).clone(), (*d).clone()))
            .ok_or_else(|| OnnxError::Missing(format!("weight {name} is not there")))
    }

    fn constant(&mut self, name: &str) -> Result<String, OnnxError> {
        let (shape, data) = self.value(name)?;
        Ok(self.graph.floats(name, &shape, &data))
    }

    fn position(&mut self) -> Result<String, OnnxError> {
        let [rows, cols] = self.config.grid;
        let half = self.config.dim / 2;
        let (_, col) = self.value("col")?;
        let (_, row) = self.value("row")?;
        let mut data = Vec::with_capacity(rows * cols * 2 * half);
        for r in row.chunks_exact(half) {
            for c in col.chunks_exact(half) {
                data.extend_from_slice(c);
                data.extend_from_slice(r);
            }
        }
        Ok(self.graph.floats("position", &[rows * cols, 2 * half], &data))
    }

    fn add(&mut self, a: &str, b: &str) -> String {
        self.graph.node("Add", &[a, b], &[])
    }

    fn linear(&mut self, name: &str, x: &str) -> Result<String, OnnxError> {
        let (shape, data) = self.value(&format!("{name}.weight"))?;
        let [outputs, inputs] = shape.as_slice() else {
            return Err(OnnxError::Missing(format!("weight {name} is no matrix")));
        };
        let mut turned = vec![0.0; data.len()];
        for (o, line) in data.chunks_exact(*inputs).enumerate() {
            for (i, v) in line.iter().enumerate() {
                turned[i * outputs + o] = *v;
            }
        }
        let weight = self.graph.floats(&format!("{name}.weight"), &[*inputs, *outputs], &turned);
        let bias = self.constant(&format!("{name}.bias"))?;
        let product = self.graph.node("MatMul", &[x, &weight], &[]);
        Ok(self.add(&product, &bias))
    }

    fn norm(&mut self, name: &str, x: &str) -> Result<String, OnnxError> {
        let scale = self.constant(&format!("{name}.weight"))?;
        let bias = self.constant(&format!("{name}.bias"))?;
        Ok(self.graph.node("LayerNormalization", &[x, &scale, &bias], &[("axis", Attr::Int(-1)), ("epsilon", Attr::Float(1e-5))]))
    }

    fn add_norm(&mut self, name: &str, residual: &str, x: &str) -> Result<String, OnnxError> {
        let sum = self.add(residual, x);
        self.norm(name, &sum)
    }

    fn attention(&mut self, name: &str, query: &str, key: &str, value: &str, mask: usize) -> Result<String, OnnxError> {
        let c = self.config.clone();
        let (t, heads, width) = (c.tokens() as i64, c.heads as i64, (c.dim / c.heads) as i64);
        let q = self.linear(&format!("{name}.q"), query)?;
        let k = self.linear(&format!("{name}.k"), key)?;
        let v = self.linear(&format!("{name}.v"), value)?;
        let shape = [t, heads, width];
        let q = self.graph.reshape(&q, &shape);
        let q = self.graph.transpose(&q, &[1, 0, 2]);
        let k = self.graph.reshape(&k, &shape);
        let k = self.graph.transpose(&k, &[1, 2, 0]);
        let v = self.graph.reshape(&v, &shape);
        let v = self.graph.transpose(&v, &[1, 0, 2]);
        let scale = self.graph.floats(&format!("{name}.scale"), &[1], &[1.0 / (width as f32).sqrt()]);
        let q = self.graph.node("Mul", &[&q, &scale], &[]);
        let mut scores = self.graph.node("MatMul", &[&q, &k], &[]);
        if mask > 0 {
            let mask_name = format!("neighbour_mask_{mask}");
            if !self.graph.proto.initializer.iter().any(|i| i.name == mask_name) {
                let data: Vec<f32> = neighbour_mask(c.grid, mask).into_iter().map(|m| m * FORBIDDEN).collect();
                self.graph.floats(&mask_name, &[1, t as usize, t as usize], &data);
            }
            scores = self.add(&scores, &mask_name);
        }
        let weights = self.graph.node("Softmax", &[&scores], &[("axis", Attr::Int(-1))]);
        let mixed = self.graph.node("MatMul", &[&weights, &v], &[]);
        let mixed = self.graph.transpose(&mixed, &[1, 0, 2]);
        let mixed = self.graph.reshape(&mixed, &[t, c.dim as i64]);
        self.linear(&format!("{name}.o"), &mixed)
    }

    fn feed_forward(&mut self, prefix: &str, x: &str) -> Result<String, OnnxError> {
        let up = self.linear(&format!("{prefix}.ffn.up"), x)?;
        let up = self.graph.node("Relu", &[&up], &[]);
        self.linear(&format!("{prefix}.ffn.down"), &up)
    }
}
