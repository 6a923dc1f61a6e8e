//! Load, verify and describe a bundle: one standard ONNX file with everything `cull` needs in its metadata.
//!
//! A bundle runs in any ONNX runtime: input `input` (float32 `[1, 3, height, width]`, normalised), output `anomaly_map` (float32
//! `[1, 1, grid_rows, grid_cols]`). The entry `cull` of `metadata_props` holds a [`BundleMeta`] as JSON. This module knows files, protobuf
//! and limits, nothing of how a model is run. Whatever is wrong with a file ends in one [`BundleError`] before a runtime sees it.

use crate::anomaly::ScoreRule;
use crate::calibration::{Calibration, CalibrationError};
use crate::preprocess::{PreprocessError, PreprocessSpec};
use prost::Message;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::{HashMap, HashSet};
use std::io::Read;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use tract_onnx::pb::{self, tensor_proto::DataType};

/// Largest bundle in bytes. The paper's model (EfficientNet-B4 trunk and 7.7 M parameters) has 43 MB in float32.
pub const MAX_BUNDLE_BYTES: u64 = 256 << 20;
/// Most protobuf elements (nodes, attributes, names, tensors). The paper's model has about 15 000; an empty element takes 2 bytes in a file
/// but up to 1 kB in memory, so without a limit a small file could take all of it.
const MAX_ELEMENTS: usize = 200_000;
/// Most bytes of integers stored one varint each (a byte in the file becomes up to 8 in memory). Weights belong in `raw_data`.
const MAX_VARINT_BYTES: usize = 32 << 20;
/// Deepest nesting of subgraphs while counting; bundles have none, this only bounds the recursion.
const MAX_DEPTH: usize = 8;
/// Largest metadata entry in bytes: 4096 calibration scores take about 50 kB.
const MAX_META_BYTES: usize = 1 << 20;
/// Largest grid side; 14 in the paper.
pub const MAX_GRID_SIDE: usize = 512;
/// Largest window, stride, dilation or padding of an operator.
const MAX_WINDOW: i64 = 4096;
/// Most elements of one tensor, given or computed (256 MB in float32).
pub(crate) const MAX_TENSOR_ELEMENTS: u64 = 1 << 26;
/// Version of [`BundleMeta`] this program reads and writes.
pub const FORMAT: u32 = 1;
/// Key in `metadata_props`.
pub const META_KEY: &str = "cull";
/// Name of the graph's input.
pub const INPUT: &str = "input";
/// Name of the graph's output.
pub const OUTPUT: &str = "anomaly_map";
/// ONNX operator sets that bundles may use: those that tract and current ONNX runtimes both know.
pub const OPSETS: RangeInclusive<i64> = 13..=21;
/// Stands for the digest while the digest is computed.
const ZERO_DIGEST: &str = "0000000000000000000000000000000000000000000000000000000000000000";

/// Everything about a model besides the graph; stored as JSON in the ONNX file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BundleMeta {
    /// Version of this structure, [`FORMAT`].
    pub format: u32,
    /// Short name for logs and screens.
    pub name: String,
    /// When it was made, RFC 3339.
    pub created: String,
    /// How frames become inputs.
    pub preprocess: PreprocessSpec,
    /// Anomaly map size, `[rows, columns]`.
    pub grid: [usize; 2],
    /// How a map becomes a score.
    pub score: ScoreRule,
    /// Scores of normal held-out images.
    pub calibration: Calibration,
    /// Labels of origin: the data sets or products it was trained on.
    pub trained_on: Vec<String>,
    /// Free text: recipe, licence, limits.
    #[serde(default)]
    pub notes: String,
    /// SHA-256 of the whole file with these 64 hexadecimal digits read as '0'. Set by [`Bundle::pack`].
    #[serde(default)]
    pub sha256: String,
}

impl BundleMeta {
    /// Check every value against its range.
    fn check(&self) -> Result<(), Problem> {
        if self.format != FORMAT {
            return Err(Problem::Format { found: self.format });
        }
        self.preprocess.check()?;
        self.calibration.check()?;
        if self.grid.iter().any(|side| !(1..=MAX_GRID_SIDE).contains(side)) {
            return Err(Problem::Meta(format!("`grid` is {:?}, sides must be 1 to {MAX_GRID_SIDE}", self.grid)));
        }
        match self.score {
            ScoreRule::PooledMax { window_px } => {
                let limit = self.preprocess.width_px.min(self.preprocess.height_px) as usize;
                if !(1..=limit).contains(&window_px) {
                    return Err(Problem::Meta(format!("`window_px` is {window_px}, must be 1 to {limit} (the input's shorter side)")));
                }
            }
            ScoreRule::TopMean { share } => {
                if !(share > 0.0 && share <= 1.0) {
                    return Err(Problem::Meta(format!("`share` is {share}, must be above 0 and at most 1")));
                }
            }
        }
        Ok(())
    }
}

/// What is wrong with a bundle, and where.
#[derive(Debug, thiserror::Error)]
#[error("model {}: {problem}", path.display())]
pub struct BundleError {
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it.
    pub problem: Problem,
}

/// What is wrong with a bundle and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    /// The operating system's word.
    #[error("cannot be read ({0}): check the path and its permissions")]
    Read(#[from] std::io::Error),
    /// Over [`MAX_BUNDLE_BYTES`].
    #[error("is over the limit of {} MB: this is no inspection model, or export it in int8 or float16", MAX_BUNDLE_BYTES >> 20)]
    TooLarge,
    /// Not a protobuf of an ONNX model.
    #[error("is no ONNX file or is damaged ({0}): copy or export it again")]
    NotOnnx(String),
    /// More elements than any inspection model has.
    #[error("holds more {0} than any inspection model needs: refused, export it again")]
    TooMany(&'static str),
    /// Standard ONNX, but no bundle.
    #[error("is plain ONNX without `{META_KEY}` metadata: make a bundle with `cull model pack` or `cull-trainer`")]
    NoMetadata,
    /// Metadata that cannot be used.
    #[error("has bad metadata ({0}): make the bundle again")]
    Meta(String),
    /// Unknown metadata version.
    #[error("has metadata of format {found}, this version of cull reads format {FORMAT}: {}", if *found > FORMAT { "update cull" } else { "make the bundle again" })]
    Format {
        /// Version found.
        found: u32,
    },
    /// Preprocessing out of range.
    #[error("has bad metadata: {0}")]
    Preprocess(#[from] PreprocessError),
    /// Calibration out of range.
    #[error("has bad metadata: {0}")]
    Calibration(#[from] CalibrationError),
    /// The file is not the one that was made.
    #[error("is not the file that was made (SHA-256 is {actual}, its metadata says {expected}): copy it again from where it was made")]
    Digest {
        /// Digest in the metadata.
        expected: String,
        /// Digest of the file.
        actual: String,
    },
    /// No usable digest in the metadata.
    #[error("carries no valid SHA-256 in its metadata: make the bundle again with `cull model pack`")]
    NoDigest,
    /// Operator set out of range.
    #[error("uses ONNX opset {found}, supported are {} to {}: export it again with opset 17", OPSETS.start(), OPSETS.end())]
    Opset {
        /// Version found; 0 when none is declared.
        found: i64,
    },
    /// Something a bundle must not contain.
    #[error("{0}: export a plain inference graph of standard operators")]
    Graph(String),
    /// Input or output is not what the interface says.
    #[error("has {what} {found}, expected {expected}: export it again to fit its metadata")]
    Interface {
        /// Which part of the interface.
        what: &'static str,
        /// What the interface and the metadata demand.
        expected: String,
        /// What the graph has.
        found: String,
    },
}

/// A verified bundle, ready for a runtime.
#[derive(Clone)]
pub struct Bundle {
    /// Its metadata, checked.
    pub meta: BundleMeta,
    /// Where it came from.
    pub path: PathBuf,
    /// File size in bytes.
    pub file_bytes: u64,
    /// Learned parameters: elements of all constant tensors that are not indices, shapes or the scales of 8-bit weights.
    pub parameters: u64,
    /// ONNX operator set.
    pub opset: i64,
    pub(crate) proto: pb::ModelProto,
}

impl std::fmt::Debug for Bundle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bundle").field("path", &self.path).field("meta", &self.meta).finish_non_exhaustive()
    }
}

impl Bundle {
    /// Read and verify a bundle: size, structure, metadata, digest, operator set, interface.
    ///
    /// # Errors
    /// [`BundleError`] names the file, the first thing wrong with it and what to do.
    pub fn load(path: &Path) -> Result<Self, BundleError> {
        read_limited(path).and_then(|bytes| Self::verify(&bytes, path)).map_err(|problem| BundleError { path: path.into(), problem })
    }

    /// Verify a bundle that is in memory; `path` is only its name in errors.
    ///
    /// # Errors
    /// As [`Bundle::load`].
    pub fn from_bytes(bytes: &[u8], path: &Path) -> Result<Self, BundleError> {
        Self::verify(bytes, path).map_err(|problem| BundleError { path: path.into(), problem })
    }

    fn verify(bytes: &[u8], path: &Path) -> Result<Self, Problem> {
        let proto = decode(bytes)?;
        let mut entries = proto.metadata_props.iter().filter(|entry| entry.key == META_KEY);
        let entry = entries.next().ok_or(Problem::NoMetadata)?;
        if entries.next().is_some() {
            return Err(Problem::Meta(format!("`{META_KEY}` appears more than once")));
        }
        if entry.value.len() > MAX_META_BYTES {
            return Err(Problem::Meta(format!("`{META_KEY}` is {} bytes long, at most {MAX_META_BYTES} are allowed", entry.value.len())));
        }
        // The version decides how the rest is read, so it comes first.
        #[derive(Deserialize)]
        struct Version {
            format: u32,
        }
        let version: Version = serde_json::from_str(&entry.value).map_err(|error| Problem::Meta(error.to_string()))?;
        if version.format != FORMAT {
            return Err(Problem::Format { found: version.format });
        }
        let meta: BundleMeta = serde_json::from_str(&entry.value).map_err(|error| Problem::Meta(error.to_string()))?;
        check_digest(bytes, &meta.sha256)?;
        meta.check()?;
        let opset = check_graph(&proto, &meta)?;
        let parameters = count_parameters(&proto);
        Ok(Self { meta, path: path.into(), file_bytes: bytes.len() as u64, parameters, opset, proto })
    }

    /// Make a bundle: check `meta` against the graph in `onnx` (any metadata of an earlier bundle in it is replaced), set the digest and
    /// return the file's bytes.
    ///
    /// # Errors
    /// As [`Bundle::load`], so that nothing can be packed that cannot be loaded.
    pub fn pack(onnx: &[u8], meta: BundleMeta) -> Result<Vec<u8>, BundleError> {
        Self::pack_inner(onnx, meta).map_err(|problem| BundleError { path: "(being packed)".into(), problem })
    }

    /// This bundle with 8-bit weights, packed again under the same metadata (see [`super::quantize`]). Its scores move a little: calibrate it anew
    /// before it decides on parts.
    ///
    /// # Errors
    /// [`BundleError`] when nothing is there to quantize.
    pub fn quantized(&self) -> Result<(Vec<u8>, super::quantize::Quantized), BundleError> {
        let mut proto = self.proto.clone();
        let done = super::quantize::quantize(&mut proto).map_err(|problem| BundleError { path: self.path.clone(), problem })?;
        Ok((Self::pack(&proto.encode_to_vec(), self.meta.clone())?, done))
    }

    /// This bundle under another calibration, packed again; `created` is the time of day for the metadata (RFC 3339).
    ///
    /// # Errors
    /// [`BundleError`] when the calibration is not one that a bundle may carry.
    pub fn recalibrated(&self, calibration: Calibration, created: String) -> Result<Vec<u8>, BundleError> {
        Self::pack(&self.proto.encode_to_vec(), BundleMeta { calibration, created, ..self.meta.clone() })
    }

    fn pack_inner(onnx: &[u8], mut meta: BundleMeta) -> Result<Vec<u8>, Problem> {
        let mut proto = decode(onnx)?;
        meta.sha256 = ZERO_DIGEST.into();
        meta.check()?;
        let value = serde_json::to_string(&meta).map_err(|error| Problem::Meta(error.to_string()))?;
        proto.metadata_props.retain(|entry| entry.key != META_KEY);
        proto.metadata_props.push(pb::StringStringEntryProto { key: META_KEY.into(), value });
        let mut bytes = proto.encode_to_vec();
        if bytes.len() as u64 > MAX_BUNDLE_BYTES {
            return Err(Problem::TooLarge);
        }
        let placeholder = format!("\"sha256\":\"{ZERO_DIGEST}\"");
        let at = find_once(&bytes, placeholder.as_bytes()).ok_or(Problem::NoDigest)? + placeholder.len() - 1 - ZERO_DIGEST.len();
        let digest = hex(&Sha256::digest(&bytes));
        bytes[at..at + digest.len()].copy_from_slice(digest.as_bytes());
        // What was written is what will be read: the same checks, on the real bytes.
        Self::verify(&bytes, Path::new(""))?;
        Ok(bytes)
    }
}

/// A file's bytes, up to the limit.
pub(crate) fn read_limited(path: &Path) -> Result<Vec<u8>, Problem> {
    let mut file = std::fs::File::open(path)?;
    let metadata = file.metadata()?;
    if metadata.is_dir() {
        return Err(Problem::Read(std::io::Error::from(std::io::ErrorKind::IsADirectory)));
    }
    if metadata.len() > MAX_BUNDLE_BYTES {
        return Err(Problem::TooLarge);
    }
    let mut bytes = Vec::with_capacity(metadata.len() as usize);
    // `take`: a pipe or a growing file has no length to trust.
    file.by_ref().take(MAX_BUNDLE_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_BUNDLE_BYTES { Err(Problem::TooLarge) } else { Ok(bytes) }
}

/// Count first, then decode.
pub(crate) fn decode(bytes: &[u8]) -> Result<pb::ModelProto, Problem> {
    if bytes.is_empty() {
        return Err(Problem::NotOnnx("it is empty".into()));
    }
    if bytes.len() as u64 > MAX_BUNDLE_BYTES {
        return Err(Problem::TooLarge);
    }
    let mut budget = wire::Budget { elements: MAX_ELEMENTS, varint_bytes: MAX_VARINT_BYTES };
    wire::count(bytes, wire::Kind::Model, MAX_DEPTH, &mut budget).map_err(|refusal| match refusal {
        wire::Refusal::Malformed => Problem::NotOnnx("its protobuf structure is broken, perhaps it was truncated".into()),
        wire::Refusal::TooMany(what) => Problem::TooMany(what),
    })?;
    let proto = pb::ModelProto::decode(bytes).map_err(|error| Problem::NotOnnx(error.to_string()))?;
    if proto.graph.is_none() {
        return Err(Problem::NotOnnx("it has no graph".into()));
    }
    Ok(proto)
}

fn check_digest(bytes: &[u8], expected: &str) -> Result<(), Problem> {
    if expected.len() != ZERO_DIGEST.len() || !expected.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
        return Err(Problem::NoDigest);
    }
    // Exactly one place may hold the digest, or it would be open which bytes read as zeros.
    let at = find_once(bytes, expected.as_bytes()).ok_or(Problem::NoDigest)?;
    let mut hasher = Sha256::new();
    hasher.update(&bytes[..at]);
    hasher.update(ZERO_DIGEST);
    hasher.update(&bytes[at + expected.len()..]);
    let actual = hex(&hasher.finalize());
    if actual == expected { Ok(()) } else { Err(Problem::Digest { expected: expected.into(), actual }) }
}

fn hex(digest: &[u8]) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Where `needle` stands in `haystack`, if exactly once.
fn find_once(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    let (&first, rest) = needle.split_first()?;
    let mut found = None;
    let mut from = 0;
    while let Some(offset) = haystack.get(from..)?.iter().position(|&byte| byte == first) {
        let at = from + offset;
        if haystack[at + 1..].starts_with(rest) {
            if found.is_some() {
                return None;
            }
            found = Some(at);
        }
        from = at + 1;
    }
    found
}

/// Everything about the graph that can be said without running shape inference. Returns the operator set.
fn check_graph(proto: &pb::ModelProto, meta: &BundleMeta) -> Result<i64, Problem> {
    let graph = proto.graph.as_ref().ok_or_else(|| Problem::NotOnnx("it has no graph".into()))?;
    let opset = check_operators(proto, graph)?;
    let PreprocessSpec { width_px, height_px, .. } = meta.preprocess;
    let initialised: HashSet<&str> = graph.initializer.iter().map(|tensor| tensor.name.as_str()).collect();
    let inputs: Vec<_> = graph.input.iter().filter(|input| !initialised.contains(input.name.as_str())).collect();
    let expected = format!("one, `{INPUT}` of float32 [1, 3, {height_px}, {width_px}]");
    check_value("input", &inputs, INPUT, &[1, 3, i64::from(height_px), i64::from(width_px)], &expected)?;
    let outputs: Vec<_> = graph.output.iter().collect();
    let expected = format!("one, `{OUTPUT}` of float32 [1, 1, {}, {}]", meta.grid[0], meta.grid[1]);
    check_value("output", &outputs, OUTPUT, &[1, 1, meta.grid[0] as i64, meta.grid[1] as i64], &expected)?;
    Ok(opset)
}

/// Operator set, operators and constants: what holds for any ONNX file that is run here, bundle or backbone.
pub(crate) fn check_operators(proto: &pb::ModelProto, graph: &pb::GraphProto) -> Result<i64, Problem> {
    let is_standard = |domain: &str| matches!(domain, "" | "ai.onnx");
    let opset = proto.opset_import.iter().filter(|import| is_standard(&import.domain)).map(|import| import.version).max().unwrap_or(0);
    if !OPSETS.contains(&opset) {
        return Err(Problem::Opset { found: opset });
    }
    if !graph.sparse_initializer.is_empty() {
        return Err(Problem::Graph("has sparse constants".into()));
    }
    let mut integers: HashMap<&str, Vec<i64>> = HashMap::new();
    for tensor in &graph.initializer {
        check_tensor(tensor)?;
        if let Some(values) = small_integers(tensor) {
            integers.insert(&tensor.name, values);
        }
    }
    let mut defined: HashSet<&str> = graph.input.iter().map(|value| value.name.as_str()).collect();
    defined.extend(graph.initializer.iter().map(|tensor| tensor.name.as_str()));
    for node in &graph.node {
        let name = || format!("operator {} (`{}`)", node.op_type, node.output.first().map_or("", String::as_str));
        if !is_standard(&node.domain) {
            return Err(Problem::Graph(format!("uses {} of the non-standard domain `{}`", name(), node.domain)));
        }
        if node.op_type.starts_with("Random") || matches!(node.op_type.as_str(), "Multinomial" | "Bernoulli") {
            return Err(Problem::Graph(format!("uses {}, which is random", name())));
        }
        for attribute in &node.attribute {
            if attribute.g.is_some() || !attribute.graphs.is_empty() {
                return Err(Problem::Graph(format!("uses {}, which holds a subgraph", name())));
            }
            for tensor in attribute.t.iter().chain(&attribute.tensors) {
                check_tensor(tensor)?;
            }
            let limited =
                matches!(attribute.name.as_str(), "kernel_shape" | "pads" | "strides" | "dilations" | "output_padding" | "output_shape");
            if limited && attribute.ints.iter().any(|value| !(0..=MAX_WINDOW).contains(value)) {
                return Err(Problem::Graph(format!(
                    "{} has `{}` {:?}, limits are 0 and {MAX_WINDOW}",
                    name(),
                    attribute.name,
                    attribute.ints
                )));
            }
            if node.op_type == "Constant"
                && let (Some(tensor), Some(output)) = (&attribute.t, node.output.first())
                && let Some(values) = small_integers(tensor)
            {
                integers.insert(output, values);
            }
        }
        // Operators whose output size is given by values: a few bytes could ask for all memory.
        let size_inputs: &[usize] = match node.op_type.as_str() {
            "ConstantOfShape" => &[0],
            "Expand" | "Tile" | "Pad" | "Range" => &[1],
            "Resize" | "Upsample" => &[2, 3],
            "OneHot" => &[1],
            _ => &[],
        };
        for values in size_inputs.iter().filter_map(|&index| node.input.get(index)).filter_map(|input| integers.get(input.as_str())) {
            let elements = values.iter().try_fold(1u64, |product, value| product.checked_mul(value.unsigned_abs().max(1)));
            if elements.is_none_or(|elements| elements > MAX_TENSOR_ELEMENTS) {
                return Err(Problem::Graph(format!("{} asks for a tensor of size {values:?}", name())));
            }
        }
        if let Some(missing) = node.input.iter().find(|input| !input.is_empty() && !defined.contains(input.as_str())) {
            return Err(Problem::Graph(format!("{} reads `{missing}`, which nothing before it writes", name())));
        }
        for output in node.output.iter().filter(|output| !output.is_empty()) {
            if !defined.insert(output) {
                return Err(Problem::Graph(format!("`{output}` is written twice")));
            }
        }
    }
    match graph.output.iter().find(|output| !defined.contains(output.name.as_str())) {
        Some(output) => Err(Problem::Graph(format!("declares the output `{}`, which no operator writes", output.name))),
        None => Ok(opset),
    }
}

/// One value of the interface: its name, element type and, as far as declared, shape. (Symbolic dimensions are decided by the runtime.)
fn check_value(what: &'static str, values: &[&pb::ValueInfoProto], name: &str, shape: &[i64], expected: &str) -> Result<(), Problem> {
    use pb::tensor_shape_proto::dimension::Value as Dim;
    let describe = |value: &pb::ValueInfoProto| match value.r#type.as_ref().and_then(|t| t.value.as_ref()) {
        Some(pb::type_proto::Value::TensorType(tensor)) => {
            let dims = tensor.shape.as_ref().map(|shape| {
                shape
                    .dim
                    .iter()
                    .map(|dim| match &dim.value {
                        Some(Dim::DimValue(n)) => n.to_string(),
                        Some(Dim::DimParam(symbol)) => symbol.clone(),
                        None => "?".into(),
                    })
                    .collect::<Vec<_>>()
                    .join(", ")
            });
            let element = DataType::try_from(tensor.elem_type).map_or("an unknown type", |t| t.as_str_name()).to_lowercase();
            format!("`{}` of {element} [{}]", value.name, dims.unwrap_or_else(|| "?".into()))
        }
        None => format!("`{}` without a type", value.name),
    };
    let fits = |value: &pb::ValueInfoProto| {
        let Some(pb::type_proto::Value::TensorType(tensor)) = value.r#type.as_ref().and_then(|t| t.value.as_ref()) else { return false };
        let shape_fits = tensor.shape.as_ref().is_none_or(|declared| {
            declared.dim.len() == shape.len()
                && declared.dim.iter().zip(shape).all(|(dim, &n)| match dim.value {
                    Some(Dim::DimValue(declared)) => declared == n,
                    _ => true,
                })
        });
        value.name == name && tensor.elem_type == DataType::Float as i32 && shape_fits
    };
    match values {
        [value] if fits(value) => Ok(()),
        [] => Err(Problem::Interface { what, expected: expected.into(), found: "none".into() }),
        _ => {
            let found = values.iter().take(4).map(|value| describe(value)).collect::<Vec<_>>().join(", ");
            Err(Problem::Interface { what, expected: expected.into(), found })
        }
    }
}

/// A constant is inside the file and has as many bytes as its shape says.
fn check_tensor(tensor: &pb::TensorProto) -> Result<(), Problem> {
    let name = &tensor.name;
    if tensor.data_location == Some(pb::tensor_proto::DataLocation::External as i32) || !tensor.external_data.is_empty() {
        return Err(Problem::Graph(format!("keeps the constant `{name}` in another file")));
    }
    let elements =
        element_count(tensor).ok_or_else(|| Problem::Graph(format!("constant `{name}` has the impossible shape {:?}", tensor.dims)))?;
    let size = match DataType::try_from(tensor.data_type) {
        Ok(DataType::Bool | DataType::Uint8 | DataType::Int8) => 1,
        Ok(DataType::Uint16 | DataType::Int16 | DataType::Float16 | DataType::Bfloat16) => 2,
        Ok(DataType::Uint32 | DataType::Int32 | DataType::Float) => 4,
        Ok(DataType::Uint64 | DataType::Int64 | DataType::Double) => 8,
        _ => return Err(Problem::Graph(format!("constant `{name}` has the unsupported element type {}", tensor.data_type))),
    };
    let stored =
        tensor.float_data.len() + tensor.int32_data.len() + tensor.int64_data.len() + tensor.double_data.len() + tensor.uint64_data.len();
    let fits =
        if tensor.raw_data.is_empty() { stored as u64 == elements } else { stored == 0 && tensor.raw_data.len() as u64 == elements * size };
    if fits {
        Ok(())
    } else {
        let found = if tensor.raw_data.is_empty() { format!("{stored} values") } else { format!("{} bytes", tensor.raw_data.len()) };
        Err(Problem::Graph(format!("constant `{name}` of shape {:?} holds {found}", tensor.dims)))
    }
}

/// Elements by shape; `None` when negative or over the limit.
fn element_count(tensor: &pb::TensorProto) -> Option<u64> {
    let count = tensor.dims.iter().try_fold(1u64, |product, &dim| product.checked_mul(u64::try_from(dim).ok()?))?;
    (count <= MAX_TENSOR_ELEMENTS).then_some(count)
}

/// The values of a short integer tensor (a shape, a size).
fn small_integers(tensor: &pb::TensorProto) -> Option<Vec<i64>> {
    const MAX_RANK: usize = 64;
    if !matches!(DataType::try_from(tensor.data_type), Ok(DataType::Int64)) {
        return None;
    }
    let values: Vec<i64> = if tensor.raw_data.is_empty() {
        tensor.int64_data.iter().copied().take(MAX_RANK).collect()
    } else {
        tensor.raw_data.chunks_exact(8).take(MAX_RANK).filter_map(|bytes| bytes.try_into().ok().map(i64::from_le_bytes)).collect()
    };
    Some(values)
}

fn count_parameters(proto: &pb::ModelProto) -> u64 {
    let Some(graph) = &proto.graph else { return 0 };
    let constants = graph.node.iter().flat_map(|node| &node.attribute).filter_map(|attribute| attribute.t.as_ref());
    // 64-bit integers are indices and shapes; scalars are scales and limits, not learned.
    // Scales and zero points of 8-bit weights say how the weights are written: the same network has as many parameters in float.
    let written_with: HashSet<&str> = graph
        .node
        .iter()
        .filter(|node| matches!(&node.op_type[..], "DequantizeLinear" | "QuantizeLinear"))
        .flat_map(|node| node.input.iter().skip(1).map(String::as_str))
        .collect();
    let learned = |tensor: &&pb::TensorProto| tensor.data_type != DataType::Int64 as i32 && !written_with.contains(&tensor.name[..]);
    graph.initializer.iter().chain(constants).filter(learned).filter_map(element_count).filter(|&count| count > 1).sum()
}

/// Counts what a protobuf would become in memory, without building it.
mod wire {
    /// Messages whose insides matter; anything else is charged by its length.
    #[derive(Clone, Copy)]
    pub enum Kind {
        Model,
        Graph,
        Node,
        Attribute,
        Tensor,
    }

    pub struct Budget {
        pub elements: usize,
        pub varint_bytes: usize,
    }

    #[derive(Debug, PartialEq)]
    pub enum Refusal {
        Malformed,
        TooMany(&'static str),
    }

    /// What a length-delimited field is charged as.
    enum Charge {
        /// A message of a known kind.
        Message(Kind),
        /// One element, whatever its length (strings, bytes without structure).
        One,
        /// Packed varints.
        Varints,
        /// As large in memory as in the file.
        Nothing,
        /// A message nobody looks into: as if made of elements of 4 bytes.
        Opaque,
    }

    fn charge(kind: Kind, field: u64) -> Charge {
        match (kind, field) {
            (Kind::Model, 7) | (Kind::Attribute, 6 | 11) => Charge::Message(Kind::Graph),
            (Kind::Graph, 1) => Charge::Message(Kind::Node),
            (Kind::Graph, 5) | (Kind::Attribute, 5 | 10) => Charge::Message(Kind::Tensor),
            (Kind::Node, 5) => Charge::Message(Kind::Attribute),
            (Kind::Attribute, 8) | (Kind::Tensor, 1 | 5 | 7 | 11) => Charge::Varints,
            (Kind::Attribute, 7 | 4) | (Kind::Tensor, 4 | 9 | 10) => Charge::Nothing,
            (Kind::Attribute, 1 | 9 | 13 | 21) | (Kind::Tensor, 6 | 8 | 12) | (Kind::Node, 1..=4 | 6 | 7) => Charge::One,
            (Kind::Model, 2..=4 | 6) | (Kind::Graph, 2 | 10) => Charge::One,
            // A metadata entry: two strings.
            (Kind::Model, 14) => Charge::One,
            _ => Charge::Opaque,
        }
    }

    /// Charge `bytes`, a message of `kind`, to `budget`.
    pub fn count(mut bytes: &[u8], kind: Kind, depth: usize, budget: &mut Budget) -> Result<(), Refusal> {
        while !bytes.is_empty() {
            let tag = varint(&mut bytes)?;
            spend(&mut budget.elements, usize::from(!matches!(tag & 7, 1 | 2 | 5)), "values")?;
            match tag & 7 {
                0 => {
                    varint(&mut bytes)?;
                }
                1 => skip(&mut bytes, 8)?,
                5 => skip(&mut bytes, 4)?,
                2 => {
                    let length = usize::try_from(varint(&mut bytes)?).map_err(|_| Refusal::Malformed)?;
                    let (inside, rest) = bytes.split_at_checked(length).ok_or(Refusal::Malformed)?;
                    bytes = rest;
                    match charge(kind, tag >> 3) {
                        Charge::Message(kind) => {
                            spend(&mut budget.elements, 1, "nodes and tensors")?;
                            count(inside, kind, depth.checked_sub(1).ok_or(Refusal::TooMany("nested graphs"))?, budget)?;
                        }
                        Charge::One => spend(&mut budget.elements, 1, "names")?,
                        Charge::Varints => spend(&mut budget.varint_bytes, length, "integers outside `raw_data`")?,
                        Charge::Nothing => {}
                        Charge::Opaque => spend(&mut budget.elements, 1 + length / 4, "descriptions")?,
                    }
                }
                _ => return Err(Refusal::Malformed),
            }
        }
        Ok(())
    }

    fn spend(budget: &mut usize, amount: usize, what: &'static str) -> Result<(), Refusal> {
        *budget = budget.checked_sub(amount).ok_or(Refusal::TooMany(what))?;
        Ok(())
    }

    fn skip(bytes: &mut &[u8], length: usize) -> Result<(), Refusal> {
        *bytes = bytes.get(length..).ok_or(Refusal::Malformed)?;
        Ok(())
    }

    fn varint(bytes: &mut &[u8]) -> Result<u64, Refusal> {
        let mut value = 0u64;
        for shift in (0..70).step_by(7) {
            let (&byte, rest) = bytes.split_first().ok_or(Refusal::Malformed)?;
            *bytes = rest;
            value |= u64::from(byte & 0x7F).checked_shl(shift).unwrap_or(0);
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(Refusal::Malformed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::testing::{ints, tiny_bundle, tiny_graph, tiny_meta, value};
    use proptest::prelude::*;

    fn load(bytes: &[u8]) -> Result<Bundle, Problem> {
        Bundle::from_bytes(bytes, Path::new("test.onnx")).map_err(|error| error.problem)
    }

    /// Pack a changed graph or metadata, or load what was packed by hand.
    fn pack(change: impl FnOnce(&mut pb::ModelProto, &mut BundleMeta)) -> Result<Vec<u8>, Problem> {
        let (mut graph, mut meta) = (tiny_graph(), tiny_meta());
        change(&mut graph, &mut meta);
        Bundle::pack(&graph.encode_to_vec(), meta).map_err(|error| error.problem)
    }

    /// The message for a changed graph or metadata.
    fn refusal(change: impl FnOnce(&mut pb::ModelProto, &mut BundleMeta)) -> String {
        let message = pack(change).expect_err("must be refused").to_string();
        assert!(!message.contains('\n'), "one sentence: {message}");
        message
    }

    #[test]
    fn a_good_bundle_comes_back_as_it_was_packed() {
        let bundle = load(&tiny_bundle().unwrap()).unwrap();
        assert_eq!(BundleMeta { sha256: String::new(), ..bundle.meta.clone() }, tiny_meta());
        assert_eq!(bundle.meta.sha256.len(), 64);
        assert_eq!((bundle.opset, bundle.parameters), (17, 4 * 3 * 8 * 8));
        // Packing a bundle again replaces its metadata and is reproducible.
        let again = Bundle::pack(&tiny_bundle().unwrap(), tiny_meta()).unwrap();
        assert_eq!(again, tiny_bundle().unwrap());
    }

    #[test]
    fn the_digest_is_the_one_that_sha256sum_gives() {
        let bytes = tiny_bundle().unwrap();
        let digest = load(&bytes).unwrap().meta.sha256;
        let text = bytes.windows(64).position(|window| window == digest.as_bytes()).unwrap();
        let mut zeroed = bytes;
        zeroed[text..text + 64].fill(b'0');
        assert_eq!(hex(&Sha256::digest(&zeroed)), digest);
        assert_eq!(hex(&Sha256::digest(b"abc")), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }

    #[test]
    fn any_flipped_byte_is_noticed() {
        let good = tiny_bundle().unwrap();
        for at in 0..good.len() {
            let mut bytes = good.clone();
            bytes[at] ^= 0x01;
            assert!(load(&bytes).is_err(), "byte {at} flipped");
        }
    }

    #[test]
    fn truncated_files_are_errors() {
        let good = tiny_bundle().unwrap();
        for length in 0..good.len() {
            assert!(load(&good[..length]).is_err(), "{length} bytes");
        }
        assert!(matches!(load(&[]), Err(Problem::NotOnnx(_))));
        assert!(matches!(load(b"\x89PNG\r\n\x1a\n not a model at all"), Err(Problem::NotOnnx(_))));
    }

    #[test]
    fn plain_onnx_is_told_how_to_become_a_bundle() {
        let message = load(&tiny_graph().encode_to_vec()).unwrap_err().to_string();
        assert!(message.contains("cull model pack"), "{message}");
    }

    #[test]
    fn wrong_digest_names_both() {
        let good = tiny_bundle().unwrap();
        let digest = load(&good).unwrap().meta.sha256;
        let at = good.windows(64).position(|window| window == digest.as_bytes()).unwrap();
        let mut bytes = good;
        bytes[at] = if bytes[at] == b'a' { b'b' } else { b'a' };
        assert!(matches!(load(&bytes), Err(Problem::Digest { actual, .. }) if actual == digest));
        bytes[at] = b'G';
        assert!(matches!(load(&bytes), Err(Problem::NoDigest)));
    }

    #[test]
    fn wrong_shapes_are_errors() {
        let graph = |proto: &mut pb::ModelProto, change: fn(&mut pb::GraphProto)| change(proto.graph.as_mut().unwrap());
        let wrong_input = refusal(|proto, _| graph(proto, |g| g.input = vec![value(INPUT, &[1, 3, 64, 64])]));
        assert!(wrong_input.contains("[1, 3, 64, 64]") && wrong_input.contains("[1, 3, 32, 48]"), "{wrong_input}");
        assert!(refusal(|proto, _| graph(proto, |g| g.output = vec![value(OUTPUT, &[1, 1, 7, 7])])).contains("[1, 1, 7, 7]"));
        assert!(refusal(|_, meta| meta.grid = [5, 6]).contains("[1, 1, 5, 6]"));
        assert!(refusal(|_, meta| meta.preprocess.width_px = 224).contains("[1, 3, 32, 224]"));
        assert!(refusal(|proto, _| graph(proto, |g| g.input.push(value("second", &[1])))).contains("second"));
        assert!(refusal(|proto, _| graph(proto, |g| g.output = vec![value("features", &[1, 4, 4, 6])])).contains("features"));
        assert!(refusal(|proto, _| graph(proto, |g| g.output.clear())).contains("none"));
    }

    #[test]
    fn wrong_opset_is_an_error() {
        for version in [0, 9, 12, 22, i64::MAX, -1] {
            assert!(refusal(|proto, _| proto.opset_import[0].version = version).contains("opset"), "{version}");
        }
        assert!(refusal(|proto, _| proto.opset_import.clear()).contains("opset 0"));
        for version in OPSETS {
            assert!(pack(|proto, _| proto.opset_import[0].version = version).is_ok(), "{version}");
        }
    }

    #[test]
    fn bad_metadata_is_an_error() {
        assert!(refusal(|_, meta| meta.format = 2).contains("update cull"));
        assert!(refusal(|_, meta| meta.grid = [0, 6]).contains("`grid`"));
        assert!(refusal(|_, meta| meta.score = ScoreRule::PooledMax { window_px: 33 }).contains("`window_px`"));
        assert!(refusal(|_, meta| meta.score = ScoreRule::TopMean { share: f32::NAN }).contains("`share`"));
        assert!(refusal(|_, meta| meta.preprocess.std[1] = -1.0).contains("`std`"));
        assert!(refusal(|_, meta| meta.calibration.normal_scores.truncate(2)).contains("at least 5"));
        assert!(refusal(|_, meta| meta.calibration.normal_scores.reverse()).contains("ascending"));
        let by_hand = |text: &str| {
            let mut proto = tiny_graph();
            proto.metadata_props.push(pb::StringStringEntryProto { key: META_KEY.into(), value: text.into() });
            load(&proto.encode_to_vec()).unwrap_err().to_string()
        };
        for text in ["", "{", "[]", "{\"format\": \"x\"}", "{\"format\": 1}", "{\"format\": -1}"] {
            assert!(by_hand(text).contains("bad metadata"), "{text}: {}", by_hand(text));
        }
        assert!(by_hand("{\"format\": 7}").contains("update cull"));
        assert!(by_hand(&"x".repeat(MAX_META_BYTES + 1)).contains("at most"));
    }

    #[test]
    fn hostile_graphs_are_refused_before_a_runtime_sees_them() {
        let node = |proto: &mut pb::ModelProto, change: fn(&mut pb::NodeProto)| change(&mut proto.graph.as_mut().unwrap().node[0]);
        let tensor =
            |proto: &mut pb::ModelProto, change: fn(&mut pb::TensorProto)| change(&mut proto.graph.as_mut().unwrap().initializer[0]);
        assert!(refusal(|proto, _| node(proto, |n| n.attribute.push(ints("pads", &[1 << 40; 4])))).contains("`pads`"));
        assert!(refusal(|proto, _| node(proto, |n| n.domain = "com.evil".into())).contains("com.evil"));
        assert!(refusal(|proto, _| node(proto, |n| n.op_type = "RandomNormal".into())).contains("random"));
        assert!(refusal(|proto, _| node(proto, |n| n.attribute[0].g = Some(pb::GraphProto::default()))).contains("subgraph"));
        assert!(refusal(|proto, _| node(proto, |n| n.input[0] = "nowhere".into())).contains("`nowhere`"));
        assert!(refusal(|proto, _| node(proto, |n| n.output[0] = OUTPUT.into())).contains("reads `features`"));
        assert!(refusal(|proto, _| tensor(proto, |t| t.dims = vec![i64::MAX, i64::MAX])).contains("impossible shape"));
        assert!(refusal(|proto, _| tensor(proto, |t| t.dims[0] = -4)).contains("impossible shape"));
        assert!(refusal(|proto, _| tensor(proto, |t| t.dims[0] += 1)).contains("bytes"));
        assert!(refusal(|proto, _| tensor(proto, |t| t.data_location = Some(1))).contains("another file"));
        assert!(refusal(|proto, _| tensor(proto, |t| t.data_type = 8)).contains("element type"));
        let huge = refusal(|proto, _| {
            let graph = proto.graph.as_mut().unwrap();
            let size = pb::TensorProto {
                name: "size".into(),
                dims: vec![2],
                data_type: DataType::Int64 as i32,
                int64_data: vec![1 << 20; 2],
                ..Default::default()
            };
            graph.initializer.push(size);
            let fill = pb::NodeProto {
                op_type: "ConstantOfShape".into(),
                input: vec!["size".into()],
                output: vec!["huge".into()],
                ..Default::default()
            };
            graph.node.push(fill);
        });
        assert!(huge.contains("asks for a tensor"), "{huge}");
    }

    #[test]
    fn floods_of_empty_elements_are_refused_before_they_are_decoded() {
        // graph { node {} node {} ... }: 2 bytes each in the file, 200 and more in memory.
        let nodes = [0x0A, 0x00].repeat(MAX_ELEMENTS + 1);
        let mut bytes = vec![0x3A];
        prost::encoding::encode_varint(nodes.len() as u64, &mut bytes);
        bytes.extend(&nodes);
        assert!(matches!(load(&bytes), Err(Problem::TooMany(_))));
        // Graphs in attributes in nodes in graphs ...: no stack overflow.
        let mut nested = Vec::new();
        for level in 0..3000 {
            let field = [0x0A, 0x2A, 0x32][level % 3];
            let mut outer = vec![field];
            prost::encoding::encode_varint(nested.len() as u64, &mut outer);
            outer.extend(&nested);
            nested = outer;
        }
        let mut bytes = vec![0x3A];
        prost::encoding::encode_varint(nested.len() as u64, &mut bytes);
        bytes.extend(&nested);
        assert!(load(&bytes).is_err());
    }

    #[test]
    fn oversized_and_missing_files_are_errors() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("big.onnx");
        // Sparse: takes no disk.
        std::fs::File::create(&path).unwrap().set_len(MAX_BUNDLE_BYTES + 1).unwrap();
        assert!(matches!(Bundle::load(&path).unwrap_err().problem, Problem::TooLarge));
        let missing = Bundle::load(&folder.path().join("none.onnx")).unwrap_err();
        assert!(missing.to_string().contains("none.onnx") && matches!(missing.problem, Problem::Read(_)), "{missing}");
        assert!(matches!(Bundle::load(folder.path()).unwrap_err().problem, Problem::Read(_)));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]
        #[test]
        fn random_damage_never_panics(edits in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..12), cut in proptest::option::of(any::<prop::sample::Index>())) {
            let mut bytes = tiny_bundle().unwrap();
            for (index, value) in edits {
                let at = index.index(bytes.len());
                bytes[at] = value;
            }
            if let Some(cut) = cut {
                bytes.truncate(cut.index(bytes.len()));
            }
            // The digest makes nearly everything an error; what counts is that decoding and checking come back at all.
            let _ = load(&bytes);
            let _ = Bundle::pack(&bytes, tiny_meta());
        }

        #[test]
        fn random_bytes_are_errors(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            prop_assert!(load(&bytes).is_err());
        }
    }
}
