//! Frame sources: camera, folder, simulated line. One trait, each restartable; a source knows nothing of models, verdicts or the PLC.

pub mod camera;
pub mod folder;
pub mod simulated;

use crate::config::SourceConfig;
use crate::frame::{Frame, PartId};
use crate::pool::Pool;
use std::time::Duration;

/// Announces a part: the reject board (or PLC) saw it pass the sensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trigger {
    /// The board's number for the part.
    pub part: PartId,
    /// Host time at which the trigger arrived, on the clock of [`crate::frame::now_ns`].
    pub received_ns: u64,
    /// Host time by which the verdict must be with the board; past it the board rejects by itself.
    pub deadline_ns: u64,
    /// Encoder position at the sensor, in ticks (wraps).
    pub encoder_ticks: u32,
}

/// What a call to [`Source::grab`] brought.
pub enum Grab {
    /// A frame.
    Frame(Frame),
    /// No frame within the time allowed. The caller counts the silence and decides when it is a stall.
    Timeout,
    /// The source is exhausted (a folder read to its end). It stays exhausted.
    End,
}

/// A source of frames. Used by one thread; every call returns within its time-out (a blocking driver call lives on a thread of the
/// source's own that can be abandoned).
pub trait Source: Send {
    /// One line for logs and reports: kind, device, format.
    fn describe(&self) -> String;

    /// Open the device, or close and open it again after an error or a stall.
    ///
    /// # Errors
    /// When the device cannot be opened; the caller retries with back-off.
    fn open(&mut self) -> Result<(), SourceError>;

    /// The next frame: with `trigger`, the picture of that part (first exposure after the trigger; a folder's next file; the simulated
    /// line's rendering of it); without, the newest picture. Buffers come from `pool`; with an empty pool this waits up to `timeout`.
    ///
    /// # Errors
    /// When the device failed; the caller re-opens it.
    fn grab(&mut self, trigger: Option<&Trigger>, timeout: Duration, pool: &Pool<Vec<u8>>) -> Result<Grab, SourceError>;
}

/// Builds the configured source. No device is touched yet: that is [`Source::open`].
///
/// # Errors
/// None of the present sources can fail here; one that checks its settings first may.
pub fn open(config: &SourceConfig) -> Result<Box<dyn Source>, SourceError> {
    match config {
        SourceConfig::Camera(config) => Ok(Box::new(camera::CameraSource::new(config))),
        SourceConfig::Folder { path, repeat, rate_hz } => Ok(Box::new(folder::FolderSource::new(path, *repeat, *rate_hz))),
        SourceConfig::Simulated { seed, defect_share } => Ok(Box::new(simulated::SimulatedLine::new(*seed, *defect_share))),
    }
}

/// Why a source failed.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The device or folder cannot be opened.
    #[error("cannot open {what}: {why}")]
    Open {
        /// Device or folder.
        what: String,
        /// Cause, and what to do.
        why: String,
    },
    /// The device failed while running.
    #[error("{what} failed: {why}")]
    Failed {
        /// Device or file.
        what: String,
        /// Cause, and what to do.
        why: String,
    },
}
