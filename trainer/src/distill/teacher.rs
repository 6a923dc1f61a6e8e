//! The teacher: an ONNX chain of inverted residuals, read for its shape and run, through the inspector's runtime, for its narrow tensors.
//!
//! No weight of the teacher reaches the student: it is a function that is asked what it makes of pictures.

use super::student::{Architecture, Block, HIDDEN_MULTIPLE, RGB, STEM_KERNEL, STEM_STRIDE};
use crate::checkpoint::write_whole;
use cull::model::runtime::FeatureModel;
use prost::Message;
use std::path::{Path, PathBuf};
use tract_onnx::pb;

/// Largest teacher file read; EfficientNet-B4 is 75 MB.
const MAX_BYTES: u64 = 512 << 20;
/// The stage outputs that UniAD uses.
const STAGES: [&str; 4] = ["f2", "f4", "f8", "f16"];

/// Why a teacher cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TeacherError {
    /// The file cannot be read or is not what is needed.
    #[error("teacher {path}: {why}")]
    File {
        /// File.
        path: String,
        /// Cause, and what to do.
        why: String,
    },
    /// It does not run.
    #[error("the teacher does not run: {0}")]
    Run(String),
}

/// A teacher read for its shape.
pub struct Teacher {
    /// Its chain.
    pub architecture: Architecture,
    /// Its tensor at the end of each block.
    boundaries: Vec<String>,
    model: pb::ModelProto,
}

impl Teacher {
    /// Read a teacher: outputs `f2`, `f4`, `f8`, `f16` along one chain of inverted residuals (EfficientNet-Lite, MobileNetV2).
    ///
    /// # Errors
    /// When the file cannot be read, or is no such chain; the sentence names the first node that does not fit.
    pub fn load(path: &Path) -> Result<Self, TeacherError> {
        let fail = |why: String| TeacherError::File { path: path.display().to_string(), why };
        let size = std::fs::metadata(path).map_err(|e| fail(format!("cannot be read ({e})")))?.len();
        if size > MAX_BYTES {
            return Err(fail(format!("is {} MB, more than the {} MB allowed", size >> 20, MAX_BYTES >> 20)));
        }
        let bytes = std::fs::read(path).map_err(|e| fail(format!("cannot be read ({e})")))?;
        let model = pb::ModelProto::decode(bytes.as_slice()).map_err(|e| fail(format!("is no ONNX model ({e})")))?;
        let graph = model.graph.as_ref().ok_or_else(|| fail("holds no graph".into()))?;
        let (architecture, boundaries) = chain(graph).map_err(|why| {
            fail(format!(
                "is no chain of inverted residuals with ReLU6 and outputs f2, f4, f8, f16 ({why}); EfficientNet-Lite and MobileNetV2 are"
            ))
        })?;
        Ok(Self { architecture, boundaries, model })
    }

    /// The teacher ready to run on pictures of `side` x `side` px. `work` is a file name that may be written to and is removed again.
    ///
    /// # Errors
    /// When the file cannot be written or the graph does not run.
    pub fn runner(&self, side: usize, work: &Path) -> Result<Runner, TeacherError> {
        let mut model = self.model.clone();
        if let Some(graph) = &mut model.graph {
            graph.output = self.boundaries.iter().map(|name| pb::ValueInfoProto { name: name.clone(), ..Default::default() }).collect();
        }
        let file: PathBuf = work.to_path_buf();
        write_whole(&file, &model.encode_to_vec()).map_err(|e| TeacherError::Run(format!("{} cannot be written ({e})", file.display())))?;
        let loaded = FeatureModel::load(&file, [RGB, side, side]).map_err(|e| TeacherError::Run(e.to_string()));
        // Only the runtime needed the file.
        let _ = std::fs::remove_file(&file);
        Ok(Runner { model: loaded?, side, channels: self.architecture.boundaries(), planar: vec![0.0; RGB * side * side] })
    }
}

/// A teacher for one picture size.
pub struct Runner {
    model: FeatureModel,
    side: usize,
    channels: Vec<usize>,
    planar: Vec<f32>,
}

impl Runner {
    /// The narrow tensors for `[side, side, 3]` (normalised), each `[rows, columns, channels]`.
    ///
    /// # Errors
    /// When the inference fails.
    pub fn run(&mut self, image: &[f32]) -> Result<Vec<Vec<f32>>, TeacherError> {
        let plane = self.side * self.side;
        for (i, pixel) in image.chunks_exact(RGB).enumerate() {
            for (c, v) in pixel.iter().enumerate() {
                if let Some(to) = self.planar.get_mut(c * plane + i) {
                    *to = *v;
                }
            }
        }
        let outputs = self.model.run(&self.planar).map_err(|e| TeacherError::Run(e.to_string()))?;
        if outputs.len() != self.channels.len() {
            return Err(TeacherError::Run(format!("it gave {} tensors, expected {}", outputs.len(), self.channels.len())));
        }
        Ok(outputs.iter().zip(&self.channels).map(|(o, c)| crate::conv::transposed(&o.values, *c, o.values.len() / c)).collect())
    }
}

/// The chain and the names of its narrow tensors.
pub(crate) fn chain(graph: &pb::GraphProto) -> Result<(Architecture, Vec<String>), String> {
    let wanted: Vec<&str> = STAGES.into_iter().filter(|s| graph.output.iter().any(|o| o.name == *s)).collect();
    if wanted.len() != STAGES.len() {
        return Err(format!("its outputs are {}", graph.output.iter().map(|o| o.name.as_str()).collect::<Vec<_>>().join(", ")));
    }
    let shape =
        |name: &str| graph.initializer.iter().find(|t| t.name == name).map(|t| t.dims.iter().map(|d| *d as usize).collect::<Vec<_>>());
    let mut nodes = graph.node.iter().filter(|n| n.op_type != "Constant").peekable();
    let mut at = graph.input.first().map(|i| i.name.clone()).ok_or("it has no input")?;
    let mut stem = None;
    let (mut blocks, mut names, mut taps) = (Vec::<Block>::new(), Vec::<String>::new(), Vec::new());
    // Parts of the block being read: expanded channels, then (hidden, kernel, stride, pad).
    let (mut expanded, mut depthwise) = (None::<usize>, None::<(usize, usize, usize, usize)>);
    let mut channels = 0;
    while taps.len() < STAGES.len() {
        let node = nodes.next().ok_or("it ends before its last stage output")?;
        let output = node.output.first().cloned().unwrap_or_default();
        let no_fit = |what: &str| format!("node {output}: {what}");
        if node.input.first() != Some(&at) {
            return Err(no_fit("it does not follow the node before"));
        }
        if node.op_type != "Conv" {
            return Err(no_fit(&format!("{} where a convolution was expected", node.op_type)));
        }
        let weight = node.input.get(1).and_then(|n| shape(n)).ok_or_else(|| no_fit("its weight is not in the file"))?;
        let &[outputs, inputs, kernel, kernel_w] = weight.as_slice() else { return Err(no_fit("its weight has not four dimensions")) };
        let ints = |name: &str| node.attribute.iter().find(|a| a.name == name).map(|a| a.ints.clone()).unwrap_or_default();
        let group = node.attribute.iter().find(|a| a.name == "group").map_or(1, |a| a.i as usize);
        let stride = ints("strides").first().map_or(1, |s| *s as usize);
        let pads = ints("pads");
        let same = kernel.saturating_sub(stride);
        let expected = [same / 2, same / 2, same - same / 2, same - same / 2].map(|p| p as i64);
        if kernel != kernel_w || (pads.as_slice() != expected && !(pads.is_empty() && same == 0)) {
            return Err(no_fit("its kernel is not square or its padding not SAME"));
        }
        at = output.clone();
        let clipped = nodes.next_if(|n| n.op_type == "Clip" && n.input.first() == Some(&at));
        if let Some(clip) = clipped {
            at = clip.output.first().cloned().unwrap_or_default();
        }
        match (stem, group, clipped.is_some()) {
            (None, 1, true) if (inputs, kernel, stride) == (RGB, STEM_KERNEL, STEM_STRIDE) => {
                stem = Some(outputs);
                channels = outputs;
            }
            (None, ..) => return Err(no_fit("it is no 3x3 stem of stride 2")),
            (_, 1, true) if kernel == 1 && expanded.is_none() && depthwise.is_none() => expanded = Some(outputs),
            (_, _, true) if group == outputs && inputs == 1 && depthwise.is_none() => {
                if !matches!(kernel, 3 | 5) || !matches!(stride, 1 | 2) || outputs % HIDDEN_MULTIPLE != 0 {
                    return Err(no_fit("depthwise kernels of 3 or 5, strides of 1 or 2 and multiples of 16 channels are understood"));
                }
                depthwise = Some((outputs, kernel, stride, same / 2));
            }
            (_, 1, false) if kernel == 1 => {
                let (hidden, kernel, stride, pad) =
                    depthwise.take().ok_or_else(|| no_fit("a projection without a depthwise convolution"))?;
                let expand = expanded.take().is_some();
                let added = nodes.next_if(|n| n.op_type == "Add" && n.input.contains(&at));
                if let Some(add) = added {
                    if names.last().is_none_or(|before| !add.input.contains(before)) {
                        return Err(no_fit("what is added is not the block's input"));
                    }
                    at = add.output.first().cloned().unwrap_or_default();
                }
                blocks.push(Block { inputs: channels, hidden, outputs, kernel, stride, pad, expand, residual: added.is_some() });
                channels = outputs;
                names.push(at.clone());
                if let Some(stage) = wanted.iter().find(|w| **w == at) {
                    taps.push(((*stage).to_owned(), blocks.len() - 1));
                }
            }
            _ => return Err(no_fit("it is neither expansion, depthwise convolution nor projection")),
        }
    }
    let stem = stem.ok_or("it has no stem")?;
    Ok((Architecture { stem, blocks, taps }, names))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_chain_is_refused_with_the_node() {
        let graph = pb::GraphProto {
            output: STAGES.map(|s| pb::ValueInfoProto { name: s.into(), ..Default::default() }).to_vec(),
            input: vec![pb::ValueInfoProto { name: "x".into(), ..Default::default() }],
            node: vec![pb::NodeProto {
                op_type: "Sigmoid".into(),
                input: vec!["x".into()],
                output: vec!["y".into()],
                ..Default::default()
            }],
            ..Default::default()
        };
        let why = chain(&graph).expect_err("a sigmoid is no stem");
        assert!(why.contains('y') && why.contains("Sigmoid"), "{why}");
    }
}
