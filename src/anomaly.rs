//! Anomaly map -> image score and regions (paper, section 3.1 and supplement). Pure: no I/O, no clock, no threads.

use serde::{Deserialize, Serialize};

/// The model's anomaly map on its feature grid, row-major `[grid_rows, grid_cols]`: per location the L2 norm over channels of
/// (reconstruction - features), after the bundle's residual normalisation if it has one.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AnomalyMap {
    /// Rows of the grid (14 in the paper).
    pub grid_rows: usize,
    /// Columns of the grid (14 in the paper).
    pub grid_cols: usize,
    /// `grid_rows * grid_cols` values, row-major.
    pub values: Vec<f32>,
}

/// How an anomaly map becomes one image score.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScoreRule {
    /// The paper's: upsample to the input size (bilinear, align corners), average-pool with stride 1, take the maximum.
    PooledMax {
        /// Side of the pooling window in input pixels (16 in the paper).
        window_px: usize,
    },
    /// Mean of the highest share of the grid's values.
    TopMean {
        /// Share of the grid's locations, 0 < share <= 1.
        share: f32,
    },
}

/// A connected region of high anomaly, in input pixels of the model (before mapping back through the ROI).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Region {
    /// Left edge.
    pub x_px: u32,
    /// Top edge.
    pub y_px: u32,
    /// Width.
    pub width_px: u32,
    /// Height.
    pub height_px: u32,
    /// Highest map value inside.
    pub peak: f32,
}
