//! The trained student as a plain ONNX backbone: normalisation folded into the weights, so that its outputs are in the teacher's own scale.

use super::student::{Architecture, RGB, STEM_KERNEL, STEM_STRIDE};
use crate::onnx::{PIXEL_MEAN_KEY, PIXEL_STD_KEY};
use prost::Message;
use tract_onnx::pb;

/// Opset of the file, as the teachers have it.
const OPSET: i64 = 13;
/// ONNX's number for float32.
const FLOAT: i32 = 1;

/// Constants that bring the teacher's narrow tensors to mean 0 and deviation 1: `normalised = (teacher - mean) / deviation`, one pair a channel and
/// block; blocks of one residual chain share theirs.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Scaling {
    /// `[blocks][outputs]`.
    pub mean: Vec<Vec<f32>>,
    /// `[blocks][outputs]`.
    pub deviation: Vec<Vec<f32>>,
}

/// The backbone: input `input` `[N, 3, H, W]` (normalised as the teacher's), one output a stage.
///
/// # Panics
/// When lengths do not fit the architecture: the caller made them from it.
pub fn backbone(architecture: &Architecture, parameters: &[f32], scaling: &Scaling) -> Vec<u8> {
    let layout = architecture.layout();
    let mut w = Writer::default();
    let same = STEM_KERNEL - STEM_STRIDE;
    let stem: Vec<f32> = crate::conv::transposed(&parameters[layout.stem.clone()], STEM_KERNEL * STEM_KERNEL * RGB, architecture.stem);
    // [out][ky kx c] -> [out][c][ky kx]
    let stem: Vec<f32> = stem
        .chunks_exact(STEM_KERNEL * STEM_KERNEL * RGB)
        .flat_map(|k| crate::conv::transposed(k, STEM_KERNEL * STEM_KERNEL, RGB))
        .collect();
    w.floats("zero", &[], &[0.0]);
    w.floats("six", &[], &[6.0]);
    let x = w.convolution(
        "stem",
        "input",
        (&[architecture.stem, RGB, STEM_KERNEL, STEM_KERNEL], &stem),
        &parameters[layout.stem_bias.clone()],
        [STEM_STRIDE, same / 2, same - same / 2, 1],
    );
    let mut x = w.relu6(&x);
    for (b, (block, l)) in architecture.blocks.iter().zip(&layout.blocks).enumerate() {
        let name = |part: &str| format!("block{b}.{part}");
        let (hidden, inputs, outputs, kernel) = (block.hidden, block.inputs, block.outputs, block.kernel);
        let mut y = x.clone();
        if block.expand {
            // x' = (x - m) / d in front of W: W x' + c = (W / d) x + (c - W (m / d)).
            let (mean, deviation) = (&scaling.mean[b - 1], &scaling.deviation[b - 1]);
            let weight = crate::conv::transposed(&parameters[l.expand.clone()], inputs, hidden);
            let mut bias = parameters[l.expand_bias.clone()].to_vec();
            let mut folded = Vec::with_capacity(weight.len());
            for (row, c) in weight.chunks_exact(inputs).zip(&mut bias) {
                for ((v, m), d) in row.iter().zip(mean).zip(deviation) {
                    folded.push(v / d);
                    *c -= v * m / d;
                }
            }
            y = w.convolution(&name("expand"), &y, (&[hidden, inputs, 1, 1], &folded), &bias, [1, 0, 0, 1]);
            y = w.relu6(&y);
        }
        let depthwise = crate::conv::transposed(&parameters[l.depthwise.clone()], kernel * kernel, hidden);
        let pads = [block.stride, block.pad, kernel - block.stride - block.pad, hidden];
        y = w.convolution(&name("depthwise"), &y, (&[hidden, 1, kernel, kernel], &depthwise), &parameters[l.depthwise_bias.clone()], pads);
        y = w.relu6(&y);
        // The output is brought back to the teacher's scale; a residual already carries the chain's mean.
        let (mean, deviation) = (&scaling.mean[b], &scaling.deviation[b]);
        let weight: Vec<f32> =
            parameters[l.project.clone()].chunks_exact(hidden).zip(deviation).flat_map(|(row, d)| row.iter().map(move |v| v * d)).collect();
        let bias: Vec<f32> = parameters[l.project_bias.clone()]
            .iter()
            .zip(mean)
            .zip(deviation)
            .map(|((v, m), d)| v * d + if block.residual { 0.0 } else { *m })
            .collect();
        y = w.convolution(&name("project"), &y, (&[outputs, hidden, 1, 1], &weight), &bias, [1, 0, 0, 1]);
        if block.residual {
            y = w.node("Add", &[&x, &y], Vec::new());
        }
        if let Some((stage, _)) = architecture.taps.iter().find(|t| t.1 == b) {
            y = w.renamed(stage);
            w.graph.output.push(picture(stage, outputs as i64));
        }
        x = y;
    }
    w.graph.name = "cull_backbone".into();
    w.graph.input = vec![picture("input", RGB as i64)];
    pb::ModelProto {
        ir_version: 8,
        opset_import: vec![pb::OperatorSetIdProto { domain: String::new(), version: OPSET }],
        producer_name: "cull-trainer distill".into(),
        producer_version: env!("CARGO_PKG_VERSION").into(),
        graph: Some(w.graph),
        // What `cull-trainer train` reads instead of `--pixel-mean` and `--pixel-std`.
        metadata_props: [(PIXEL_MEAN_KEY, super::MEAN), (PIXEL_STD_KEY, super::STD)]
            .map(|(key, v)| pb::StringStringEntryProto { key: key.into(), value: format!("{v},{v},{v}") })
            .to_vec(),
        ..Default::default()
    }
    .encode_to_vec()
}

/// `[N, channels, H, W]`.
fn picture(name: &str, channels: i64) -> pb::ValueInfoProto {
    use pb::tensor_shape_proto::{Dimension, dimension::Value};
    let free = |n: &str| Dimension { denotation: String::new(), value: Some(Value::DimParam(n.into())) };
    let fixed = |n: i64| Dimension { denotation: String::new(), value: Some(Value::DimValue(n)) };
    // Height and width of a stage are not those of the image: each output has names of its own.
    let dim = vec![free("N"), fixed(channels), free(&format!("{name}_rows")), free(&format!("{name}_columns"))];
    let tensor = pb::type_proto::Tensor { elem_type: FLOAT, shape: Some(pb::TensorShapeProto { dim }) };
    pb::ValueInfoProto {
        name: name.into(),
        r#type: Some(pb::TypeProto { denotation: String::new(), value: Some(pb::type_proto::Value::TensorType(tensor)) }),
        ..Default::default()
    }
}

#[derive(Default)]
struct Writer {
    graph: pb::GraphProto,
}

impl Writer {
    fn floats(&mut self, name: &str, dims: &[usize], data: &[f32]) -> String {
        self.graph.initializer.push(pb::TensorProto {
            name: name.into(),
            data_type: FLOAT,
            dims: dims.iter().map(|d| *d as i64).collect(),
            raw_data: data.iter().flat_map(|v| v.to_le_bytes()).collect(),
            ..Default::default()
        });
        name.into()
    }

    fn node(&mut self, op: &str, inputs: &[&str], attribute: Vec<pb::AttributeProto>) -> String {
        let output = format!("t{}", self.graph.node.len());
        self.graph.node.push(pb::NodeProto {
            op_type: op.into(),
            name: output.clone(),
            input: inputs.iter().map(|s| (*s).to_owned()).collect(),
            output: vec![output.clone()],
            attribute,
            ..Default::default()
        });
        output
    }

    /// Gives the output of the newest node a name of its own.
    fn renamed(&mut self, name: &str) -> String {
        if let Some(node) = self.graph.node.last_mut() {
            node.name = name.into();
            node.output = vec![name.into()];
        }
        name.into()
    }

    fn relu6(&mut self, x: &str) -> String {
        self.node("Clip", &[x, "zero", "six"], Vec::new())
    }

    /// `how`: stride, padding before, padding after, groups.
    fn convolution(&mut self, name: &str, x: &str, weight: (&[usize; 4], &[f32]), bias: &[f32], how: [usize; 4]) -> String {
        use pb::attribute_proto::AttributeType as T;
        let (dims, values) = weight;
        let ints = |name: &str, list: Vec<usize>| pb::AttributeProto {
            name: name.into(),
            r#type: T::Ints as i32,
            ints: list.into_iter().map(|v| v as i64).collect(),
            ..Default::default()
        };
        let [stride, before, after, groups] = how;
        let weight = self.floats(&format!("{name}.weight"), dims, values);
        let bias = self.floats(&format!("{name}.bias"), &[bias.len()], bias);
        let attributes = vec![
            ints("kernel_shape", vec![dims[2], dims[3]]),
            ints("strides", vec![stride; 2]),
            ints("pads", vec![before, before, after, after]),
            pb::AttributeProto { name: "group".into(), r#type: T::Int as i32, i: groups as i64, ..Default::default() },
        ];
        self.node("Conv", &[x, &weight, &bias], attributes)
    }
}
