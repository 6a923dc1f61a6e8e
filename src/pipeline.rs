//! Threads and bounded channels. Back-pressure policy lives here and nowhere else.

use crate::frame::{Origin, PartId};
use crate::verdict::Verdict;

/// What became of one part: the record that the recorder, the journal and the live page get. Cheap to clone (reference counts only).
#[derive(Clone, Debug)]
pub struct Inspection {
    /// The part, when a board announced it.
    pub part: Option<PartId>,
    /// The frame's sequence number.
    pub seq: u64,
    /// The verdict.
    pub verdict: Verdict,
    /// Capture time, on the clock of [`crate::frame::now_ns`].
    pub captured_ns: u64,
    /// When the verdict was taken, same clock.
    pub decided_ns: u64,
    /// Time spent in each stage.
    pub stages: StageTimes,
    /// Where the picture came from.
    pub origin: Origin,
}

/// Time spent in each stage, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StageTimes {
    /// Capture to the start of preprocessing (queueing).
    pub queue_us: u32,
    /// Decode, ROI, resize, normalise.
    pub preprocess_us: u32,
    /// The model.
    pub inference_us: u32,
    /// Score, calibration, verdict, re-ordering.
    pub verdict_us: u32,
}
