//! The trained detector as plain ONNX: what the inspector's executor, its int8 kernels and any ONNX runtime run.

use super::network::{Network, Op};
use crate::conv::transposed;
use crate::distill::student::{RGB, STEM_KERNEL, STEM_STRIDE};
use crate::onnx::{Attr, Graph};

/// Added to the log odds in front of the softplus that makes the map positive: the level of good cells stays small, but is not flattened to zero.
pub const SHIFT: f32 = 8.0;

/// The graph from `input`, `[1, 3, height, width]`, to `anomaly_map`, `[1, 1, rows, columns]`.
///
/// # Panics
/// When lengths do not fit the network: the caller made them from it.
pub fn graph(network: &Network, parameters: &[f32]) -> Graph {
    let mut g = Graph::default();
    let [height, width] = network.size();
    g.set_input("input", &[Some(1), Some(RGB), Some(height), Some(width)]);
    g.floats("zero", &[], &[0.0]);
    g.floats("six", &[], &[6.0]);
    let mut names: Vec<String> = Vec::new();
    for node in &network.nodes {
        let input = |k: usize| node.inputs.get(k).and_then(|n| names.get(*n)).map_or("", String::as_str);
        let from = node.inputs.first().and_then(|n| network.nodes.get(*n));
        let [rows, columns, channels] = node.shape;
        let weight = &parameters[node.weight.clone()];
        let bias = &parameters[node.bias.clone()];
        let convolution = |g: &mut Graph, dims: [usize; 4], values: &[f32], stride: usize, pads: [usize; 2], groups: usize| {
            let w = g.floats(&format!("{}.weight", node.name), &dims, values);
            let b = g.floats(&format!("{}.bias", node.name), &[bias.len()], bias);
            let [before, after] = pads.map(|p| p as i64);
            g.node(
                "Conv",
                &[input(0), &w, &b],
                &[
                    ("kernel_shape", Attr::Ints(&[dims[2] as i64, dims[3] as i64])),
                    ("strides", Attr::Ints(&[stride as i64; 2])),
                    ("pads", Attr::Ints(&[before, before, after, after])),
                    ("group", Attr::Int(groups as i64)),
                ],
            )
        };
        let relu6 = |g: &mut Graph, x: &str| g.node("Clip", &[x, "zero", "six"], &[]);
        let name = match node.op {
            Op::Image => "input".to_owned(),
            Op::Stem => {
                // [ky kx c][out] -> [out][c][ky kx]
                let taps = STEM_KERNEL * STEM_KERNEL;
                let values: Vec<f32> =
                    transposed(weight, taps * RGB, channels).chunks_exact(taps * RGB).flat_map(|k| transposed(k, taps, RGB)).collect();
                let y =
                    convolution(&mut g, [channels, RGB, STEM_KERNEL, STEM_KERNEL], &values, STEM_STRIDE, [0, STEM_KERNEL - STEM_STRIDE], 1);
                relu6(&mut g, &y)
            }
            Op::Pointwise { relu6: clipped } => {
                let inputs = from.map_or(0, |n| n.shape[2]);
                let y = convolution(&mut g, [channels, inputs, 1, 1], &transposed(weight, inputs, channels), 1, [0, 0], 1);
                match (clipped, node.inputs.len()) {
                    (true, _) => relu6(&mut g, &y),
                    (false, 2) => g.node("Add", &[&y, input(1)], &[]),
                    _ => y,
                }
            }
            Op::Depthwise { kernel, stride, pad } => {
                let values = transposed(weight, kernel * kernel, channels);
                let y = convolution(&mut g, [channels, 1, kernel, kernel], &values, stride, [pad, kernel - stride - pad], channels);
                relu6(&mut g, &y)
            }
            Op::MaxPool => g.node("MaxPool", &[input(0)], &[("kernel_shape", Attr::Ints(&[2, 2])), ("strides", Attr::Ints(&[2, 2]))]),
            Op::Up => {
                let sizes = g.ints(&[1, channels as i64, rows as i64, columns as i64]);
                g.node(
                    "Resize",
                    &[input(0), "", "", &sizes],
                    &[("mode", Attr::Text("linear")), ("coordinate_transformation_mode", Attr::Text("half_pixel"))],
                )
            }
            Op::Add => g.node("Add", &[input(0), input(1)], &[]),
            Op::Dense { relu6: clipped } => {
                let inputs = from.map_or(0, super::network::Node::len);
                // Channels last: in this order the inspector holds pictures, and nothing is moved.
                let last = g.transpose(input(0), &[0, 2, 3, 1]);
                let row = g.reshape(&last, &[1, inputs as i64]);
                let w = g.floats(&format!("{}.weight", node.name), &[inputs, bias.len()], weight);
                let b = g.floats(&format!("{}.bias", node.name), &[1, bias.len()], bias);
                let y = g.node("MatMul", &[&row, &w], &[]);
                let mut y = g.node("Add", &[&y, &b], &[]);
                if clipped {
                    y = relu6(&mut g, &y);
                }
                let picture = g.reshape(&y, &[1, rows as i64, columns as i64, channels as i64]);
                g.transpose(&picture, &[0, 3, 1, 2])
            }
        };
        names.push(name);
    }
    let shift = g.floats("shift", &[1], &[SHIFT]);
    let odds = names.pop().unwrap_or_default();
    let raised = g.node("Add", &[&odds, &shift], &[]);
    let map = g.node("Softplus", &[&raised], &[]);
    let [rows, columns] = network.grid();
    g.output("anomaly_map", &map, &[Some(1), Some(1), Some(rows), Some(columns)]);
    g
}

/// The map's value for these log odds, as the graph computes it.
pub fn map_value(odds: f32) -> f32 {
    let x = odds + SHIFT;
    // softplus, without overflow
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}
