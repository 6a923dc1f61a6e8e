//! Decode, ROI, resize, normalise: the same code for training, evaluation and the live line, so they cannot drift apart.

use serde::{Deserialize, Serialize};

/// What the model wants to see; part of the bundle's metadata.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PreprocessSpec {
    /// Model input width in pixels.
    pub width_px: u32,
    /// Model input height in pixels.
    pub height_px: u32,
    /// Per channel (red, green, blue), in 8-bit pixel units: `input = (pixel - mean) / std`.
    pub mean: [f32; 3],
    /// Per channel, in 8-bit pixel units.
    pub std: [f32; 3],
}

/// Part of the picture that is inspected, in frame pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Roi {
    /// Left edge.
    pub x_px: u32,
    /// Top edge.
    pub y_px: u32,
    /// Width.
    pub width_px: u32,
    /// Height.
    pub height_px: u32,
}
