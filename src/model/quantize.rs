//! Float weights of a model to 8 bit, one scale per output, as standard ONNX (`DequantizeLinear` before the operator that uses them).
//!
//! Only what our kernels compute in integers is changed: the weights of `MatMul`, of 1x1 convolutions without groups and of depthwise
//! convolutions. Inputs are quantized when the model runs, row by row, so nothing needs calibrating here. The file gets nearly four times smaller and runs in any ONNX runtime.

use super::bundle::Problem;
use std::collections::HashMap;
use tract_onnx::pb::{self, AttributeProto, NodeProto, TensorProto, attribute_proto::AttributeType, tensor_proto::DataType};

/// Smaller weights are not worth a conversion: they neither take room nor time.
const MIN_ELEMENTS: usize = 64;

/// Weights whose names hold one of these stay in float: whitening amplifies what varies least among normal parts, and with it the rounding; the tables
/// that a picture's mode chooses from are no weights of a product at all.
const SENSITIVE: &[&str] = &["whiten", "modes_"];

/// What was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize)]
pub struct Quantized {
    /// Weight tensors changed.
    pub tensors: usize,
    /// Their elements.
    pub elements: usize,
    /// Largest rounding error of a weight, as a share of its output's largest weight (at most 1/254).
    pub worst_rounding: f32,
}

/// Quantize the weights of `proto` in place.
///
/// # Errors
/// [`Problem::Graph`] when nothing is there to quantize.
pub fn quantize(proto: &mut pb::ModelProto) -> Result<Quantized, Problem> {
    let mut done = Quantized::default();
    let Some(graph) = &mut proto.graph else { return Err(Problem::NotOnnx("it has no graph".into())) };
    // Axis of the outputs, for weights all of whose readers agree on it.
    let mut axes: HashMap<String, Option<i64>> = HashMap::new();
    for node in &graph.node {
        for (index, name) in node.input.iter().enumerate() {
            let axis = match (node.op_type.as_str(), index) {
                ("MatMul", 1) => Some(1),
                ("Conv", 1) => Some(0),
                _ => None,
            };
            axes.entry(name.clone()).and_modify(|known| *known = known.filter(|known| Some(*known) == axis)).or_insert(axis);
        }
    }
    let mut nodes = Vec::new();
    let mut added = Vec::new();
    for tensor in &mut graph.initializer {
        let Some(Some(axis)) = axes.get(&tensor.name) else { continue };
        let (outputs, inputs) = match (axis, &tensor.dims[..]) {
            (1, &[inputs, outputs]) => (outputs as usize, inputs as usize),
            // A group would have more than one input or output only where our kernels do not know it.
            (0, &[outputs, inputs, 1, 1]) => (outputs as usize, inputs as usize),
            (0, &[channels, 1, height, width]) => (channels as usize, (height * width) as usize),
            _ => continue,
        };
        let sensitive = SENSITIVE.iter().any(|name| tensor.name.contains(name));
        if tensor.data_type != DataType::Float as i32 || inputs * outputs < MIN_ELEMENTS || sensitive {
            continue;
        }
        let values: Vec<f32> = if tensor.raw_data.is_empty() {
            tensor.float_data.clone()
        } else {
            tensor.raw_data.chunks_exact(4).filter_map(|bytes| bytes.try_into().ok().map(f32::from_le_bytes)).collect()
        };
        let output_of = |i: usize| if *axis == 1 { i % outputs } else { i / inputs };
        let mut largest = vec![0.0f32; outputs];
        for (i, value) in values.iter().enumerate() {
            largest[output_of(i)] = largest[output_of(i)].max(value.abs());
        }
        // An output without weights keeps a scale that is a number.
        let scale: Vec<f32> = largest.iter().map(|&largest| if largest > 0.0 { largest / 127.0 } else { 1.0 }).collect();
        let bytes: Vec<u8> = values
            .iter()
            .enumerate()
            .map(|(i, value)| {
                let (scale, largest) = (scale[output_of(i)], largest[output_of(i)]);
                let step = (value / scale).round_ties_even().clamp(-127.0, 127.0);
                if largest > 0.0 {
                    done.worst_rounding = done.worst_rounding.max((step * scale - value).abs() / largest);
                }
                step as i8 as u8
            })
            .collect();
        done.tensors += 1;
        done.elements += values.len();
        let (quantized, scales) = (format!("{}.int8", tensor.name), format!("{}.scale", tensor.name));
        nodes.push(NodeProto {
            op_type: "DequantizeLinear".into(),
            name: format!("{}.dequantize", tensor.name),
            input: vec![quantized.clone(), scales.clone()],
            output: vec![tensor.name.clone()],
            attribute: vec![AttributeProto {
                name: "axis".into(),
                r#type: AttributeType::Int as i32,
                i: *axis,
                ..AttributeProto::default()
            }],
            ..NodeProto::default()
        });
        added.push(TensorProto {
            name: scales,
            dims: vec![outputs as i64],
            data_type: DataType::Float as i32,
            raw_data: scale.iter().flat_map(|scale| scale.to_le_bytes()).collect(),
            ..TensorProto::default()
        });
        *tensor = TensorProto {
            name: quantized,
            dims: tensor.dims.clone(),
            data_type: DataType::Int8 as i32,
            raw_data: bytes,
            ..TensorProto::default()
        };
    }
    if done.tensors == 0 {
        return Err(Problem::Graph("has no float weights to quantize".into()));
    }
    graph.initializer.extend(added);
    graph.node.splice(0..0, nodes);
    Ok(done)
}
