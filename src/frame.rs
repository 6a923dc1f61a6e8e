//! [`Frame`]: pixels, capture time, sequence number, part id. The bottom of the house: it knows no other module but [`crate::pool`].

use crate::pool::Pooled;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

/// Identifies one physical part on the line, as numbered by the reject board or PLC (wraps at 2^32).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PartId(pub u32);

impl std::fmt::Display for PartId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// How the bytes of a [`Frame`] are to be read. All layouts are row-major without padding between rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PixelFormat {
    /// 3 bytes a pixel: red, green, blue.
    Rgb8,
    /// 1 byte a pixel.
    Gray8,
    /// YUV 4:2:2 packed, 2 bytes a pixel (Y0 U Y1 V), BT.601 limited range as V4L2 cameras send it.
    Yuyv,
    /// One JPEG picture (V4L2 MJPG); the length varies by frame.
    Mjpg,
}

/// One picture with everything the line needs to know of it.
pub struct Frame {
    /// Encoded or raw bytes, laid out as `format` says.
    pub pixels: Pooled<Vec<u8>>,
    /// Layout of `pixels`.
    pub format: PixelFormat,
    /// Width in pixels.
    pub width_px: u32,
    /// Height in pixels.
    pub height_px: u32,
    /// When the exposure ended as nearly as the source knows, on the clock of [`now_ns`].
    pub captured_ns: u64,
    /// Counts every frame the source made, dropped ones included, so that gaps show.
    pub seq: u64,
    /// The part in the picture, when a trigger announced one.
    pub part: Option<PartId>,
    /// Where the picture comes from, for records and for the demo's bookkeeping. The verdict never reads it.
    pub origin: Origin,
}

/// Where a picture comes from. Cheap to clone: nothing is copied but reference counts.
#[derive(Clone, Debug, Default)]
pub struct Origin {
    /// The file a folder source read.
    pub path: Option<Arc<Path>>,
    /// Product (category) name where the source knows it.
    pub product: Option<Arc<str>>,
    /// What a simulated line or a labelled folder knows to be true of the part.
    pub truth: Option<Truth>,
}

/// Ground truth of a labelled picture.
#[derive(Clone, Debug, PartialEq)]
pub struct Truth {
    /// `None` for a good part, else the defect's name (MVTec-AD folder name).
    pub defect: Option<Arc<str>>,
}

/// Monotonic nanoseconds since the first call in this process. All times inside one process are on this clock.
pub fn now_ns() -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    let elapsed = START.get_or_init(Instant::now).elapsed();
    u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX)
}
