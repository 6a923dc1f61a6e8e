//! A small bundle made in memory, so that tests need no file, no Python and no trained model. Not a detector of anything.

use super::bundle::{Bundle, BundleError, BundleMeta, FORMAT, INPUT, OUTPUT};
use crate::anomaly::ScoreRule;
use crate::calibration::Calibration;
use crate::preprocess::PreprocessSpec;
use prost::Message;
use tract_onnx::pb::{
    AttributeProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorProto, TensorShapeProto, TypeProto, ValueInfoProto,
    attribute_proto::AttributeType, tensor_proto::DataType, tensor_shape_proto, type_proto,
};

/// Grid of the test model.
pub const GRID: [usize; 2] = [4, 6];
/// Input of the test model, `[height, width]`: `CELL` pixels a grid cell.
pub const INPUT_PX: [usize; 2] = [GRID[0] * CELL, GRID[1] * CELL];
const CELL: usize = 8;
const CHANNELS: usize = 4;

/// A valid bundle of about 5 kB: one convolution with a stride of a grid cell, then the L2 norm over its channels.
///
/// # Errors
/// None in practice; [`Bundle::pack`]'s.
pub fn tiny_bundle() -> Result<Vec<u8>, BundleError> {
    Bundle::pack(&tiny_graph().encode_to_vec(), tiny_meta())
}

/// Metadata that fits [`tiny_graph`].
pub fn tiny_meta() -> BundleMeta {
    BundleMeta {
        format: FORMAT,
        name: "tiny".into(),
        created: "2026-01-01T00:00:00Z".into(),
        preprocess: PreprocessSpec { width_px: INPUT_PX[1] as u32, height_px: INPUT_PX[0] as u32, mean: [127.5; 3], std: [127.5; 3] },
        grid: GRID,
        score: ScoreRule::PooledMax { window_px: 8 },
        calibration: Calibration { normal_scores: (0..50u8).map(|i| f32::from(i) / 10.0).collect() },
        trained_on: vec!["nothing".into()],
        notes: String::new(),
        sha256: String::new(),
    }
}

/// The graph of [`tiny_bundle`].
pub fn tiny_graph() -> ModelProto {
    let weights: Vec<f32> = (0..CHANNELS * 3 * CELL * CELL).map(|i| ((i * 37 % 101) as f32 / 50.0 - 1.0) / 8.0).collect();
    let convolution = NodeProto {
        op_type: "Conv".into(),
        input: vec![INPUT.into(), "weight".into()],
        output: vec!["features".into()],
        attribute: vec![ints("kernel_shape", &[CELL as i64; 2]), ints("strides", &[CELL as i64; 2])],
        ..NodeProto::default()
    };
    let keepdims = AttributeProto { name: "keepdims".into(), r#type: AttributeType::Int as i32, i: 1, ..AttributeProto::default() };
    let norm = NodeProto {
        op_type: "ReduceL2".into(),
        input: vec!["features".into()],
        output: vec![OUTPUT.into()],
        attribute: vec![ints("axes", &[1]), keepdims],
        ..NodeProto::default()
    };
    ModelProto {
        ir_version: 8,
        opset_import: vec![OperatorSetIdProto { domain: String::new(), version: 17 }],
        producer_name: "cull test".into(),
        graph: Some(GraphProto {
            name: "tiny".into(),
            node: vec![convolution, norm],
            initializer: vec![TensorProto {
                name: "weight".into(),
                dims: vec![CHANNELS as i64, 3, CELL as i64, CELL as i64],
                data_type: DataType::Float as i32,
                raw_data: weights.iter().flat_map(|w| w.to_le_bytes()).collect(),
                ..TensorProto::default()
            }],
            input: vec![value(INPUT, &[1, 3, INPUT_PX[0] as i64, INPUT_PX[1] as i64])],
            output: vec![value(OUTPUT, &[1, 1, GRID[0] as i64, GRID[1] as i64])],
            ..GraphProto::default()
        }),
        ..ModelProto::default()
    }
}

/// A float32 graph input or output.
pub fn value(name: &str, shape: &[i64]) -> ValueInfoProto {
    let dim = shape
        .iter()
        .map(|&n| tensor_shape_proto::Dimension {
            value: Some(tensor_shape_proto::dimension::Value::DimValue(n)),
            ..tensor_shape_proto::Dimension::default()
        })
        .collect();
    let tensor = type_proto::Tensor { elem_type: DataType::Float as i32, shape: Some(TensorShapeProto { dim }) };
    ValueInfoProto {
        name: name.into(),
        r#type: Some(TypeProto { value: Some(type_proto::Value::TensorType(tensor)), ..TypeProto::default() }),
        ..ValueInfoProto::default()
    }
}

/// An attribute holding a list of integers.
pub fn ints(name: &str, values: &[i64]) -> AttributeProto {
    AttributeProto { name: name.into(), r#type: AttributeType::Ints as i32, ints: values.to_vec(), ..AttributeProto::default() }
}
