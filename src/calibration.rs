//! Image score -> calibrated p-value, so that one threshold serves all products and survives export. Pure: no I/O, no clock, no threads.

use serde::{Deserialize, Serialize};

/// Calibration carried by every bundle: the scores of normal held-out images.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Calibration {
    /// Scores of normal images, ascending; at most [`Calibration::MAX_SCORES`] (longer sets are thinned to quantiles).
    pub normal_scores: Vec<f32>,
}

impl Calibration {
    /// Enough to resolve a false-reject rate of 0.1 % and small enough for any bundle.
    pub const MAX_SCORES: usize = 4096;
}
