//! The JSON record of one kept part: what a person, a script or a later training run needs to know of the pictures beside it.

use super::utc;
use crate::anomaly::Region;
use crate::pipeline::{Inspection, StageTimes};
use crate::preprocess::Roi;
use crate::verdict::{Decision, Reason};
use serde::{Deserialize, Serialize};

/// One kept part. Numbers that do not exist (no score, no p-value) are null. Written as JSON beside the pictures; fields are only ever added.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PartRecord {
    /// Version of this format, 1.
    pub format: u32,
    /// When the verdict was taken, RFC 3339, UTC.
    pub time: String,
    /// Same, in milliseconds since 1970.
    pub time_unix_ms: i64,
    /// Name of the line.
    pub line: String,
    /// Part number, when a board announced it.
    pub part: Option<u32>,
    /// The frame's sequence number.
    pub seq: u64,
    /// What was decided.
    pub decision: Decision,
    /// Why.
    pub reason: Reason,
    /// Image score.
    pub score: Option<f32>,
    /// Probability that a normal part scores at least as high.
    pub p_value: Option<f32>,
    /// Score at which a part is rejected (the middle colour of the heat map).
    pub threshold: f32,
    /// Regions at or above the threshold, in pixels of the picture.
    pub regions: Vec<Region>,
    /// The inspected part of the picture.
    pub roi: Option<Roi>,
    /// Product, where the source knows it.
    pub product: Option<String>,
    /// Source file, for a folder source.
    pub path: Option<String>,
    /// Known truth, for a simulated or labelled source: `"good"` or the defect's name.
    pub truth: Option<String>,
    /// Time from capture to verdict, in microseconds.
    pub latency_us: u64,
    /// Time spent in each stage, in microseconds.
    pub stages_us: Stages,
    /// Model name.
    pub model: String,
    /// SHA-256 of the model bundle.
    pub model_sha256: String,
    /// File name of the picture, in the same folder.
    pub picture: String,
    /// File name of the overlay, in the same folder; null when no inference happened.
    pub heat: Option<String>,
}

/// [`StageTimes`] as they are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stages {
    /// Capture to the start of preprocessing.
    pub queue: u32,
    /// Decode, ROI, resize, normalise.
    pub preprocess: u32,
    /// The model.
    pub inference: u32,
    /// Score, calibration, verdict, re-ordering.
    pub verdict: u32,
}

impl From<StageTimes> for Stages {
    fn from(times: StageTimes) -> Self {
        Self { queue: times.queue_us, preprocess: times.preprocess_us, inference: times.inference_us, verdict: times.verdict_us }
    }
}

impl PartRecord {
    /// A record of `inspection`, without regions and file names yet.
    pub(crate) fn new(inspection: &Inspection, unix_ms: i64, context: &super::Context, roi: Option<Roi>) -> Self {
        let finite = |value: f32| value.is_finite().then_some(value);
        let origin = &inspection.origin;
        Self {
            format: 1,
            time: utc::extended(unix_ms),
            time_unix_ms: unix_ms,
            line: context.line.clone(),
            part: inspection.part.map(|part| part.0),
            seq: inspection.seq,
            decision: inspection.verdict.decision,
            reason: inspection.verdict.reason,
            score: finite(inspection.verdict.score),
            p_value: finite(inspection.verdict.p_value),
            threshold: context.scale.threshold(),
            regions: Vec::new(),
            roi,
            product: origin.product.as_deref().map(str::to_owned),
            path: origin.path.as_deref().map(|path| path.display().to_string()),
            truth: origin.truth.as_ref().map(|truth| truth.defect.as_deref().unwrap_or("good").to_owned()),
            latency_us: inspection.decided_ns.saturating_sub(inspection.captured_ns) / 1_000,
            stages_us: inspection.stages.into(),
            model: context.model.clone(),
            model_sha256: context.model_sha256.clone(),
            picture: String::new(),
            heat: None,
        }
    }
}

/// A decision as it stands in file names.
pub(crate) fn decision_name(decision: Decision) -> &'static str {
    match decision {
        Decision::Accept => "accept",
        Decision::Reject => "reject",
        Decision::Unknown => "unknown",
        Decision::Fault => "fault",
    }
}
