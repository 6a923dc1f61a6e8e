//! RON file -> checked [`Config`], every error with file:line:column and the accepted values.
//!
//! Every field is documented in `deploy/cull.ron`; unknown fields are errors. This module does no I/O but reading the file it is given.

use crate::preprocess::Roi;
use serde::Deserialize;
use std::path::PathBuf;

/// The whole configuration of one line.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Name of the line, for logs, records and the live page.
    pub line: String,
    /// The model bundle (ONNX with metadata).
    pub model: PathBuf,
    /// Where frames come from.
    pub source: SourceConfig,
    /// The part of the picture that is inspected; `None` for all of it.
    pub roi: Option<Roi>,
    /// How frames and parts meet.
    pub trigger: TriggerMode,
    /// Accepted share of good parts rejected, in (0, 0.5].
    pub false_reject_rate: f32,
    /// Inference threads and how they are used.
    pub inference: InferenceConfig,
    /// The link to the board or PLC.
    pub plc: PlcConfig,
    /// Defect pictures.
    pub snapshots: SnapshotConfig,
    /// The verdict database.
    pub journal: JournalConfig,
    /// Stall and restart limits.
    pub supervise: SuperviseConfig,
}

/// Where frames come from.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub enum SourceConfig {
    /// A V4L2 camera through nokhwa.
    Camera(CameraConfig),
    /// Pictures from a folder, in name order.
    Folder {
        /// A folder of pictures, searched recursively; sub-folder names give the truth where the layout is MVTec-AD's.
        path: PathBuf,
        /// Start again at the end.
        #[serde(default)]
        repeat: bool,
        /// Pictures per second; `None` for as fast as they are inspected.
        #[serde(default)]
        rate_hz: Option<f32>,
    },
    /// The simulated line.
    Simulated {
        /// Same seed, same parts.
        seed: u64,
        /// Share of defective parts, 0 to 1.
        #[serde(default = "default_defect_share")]
        defect_share: f32,
    },
}

fn default_defect_share() -> f32 {
    0.2
}

/// Which device, and how it is set up.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct CameraConfig {
    /// How the device is found.
    pub device: CameraDevice,
    /// Width in pixels.
    pub width_px: u32,
    /// Height in pixels.
    pub height_px: u32,
    /// Frames per second.
    pub rate_hz: u32,
    /// Pixel format on the wire.
    pub format: CameraFormat,
    /// Controls by V4L2 name (for example "exposure_time_absolute"); set at every open, in the order given.
    #[serde(default)]
    pub controls: Vec<(String, i64)>,
}

/// How a camera is found.
#[derive(Clone, Debug, Deserialize, PartialEq)]
pub enum CameraDevice {
    /// `/dev/videoN`.
    Index(u32),
    /// A stable path such as `/dev/v4l/by-id/…`.
    Path(PathBuf),
    /// USB serial number, looked up in sysfs.
    Serial(String),
}

/// Pixel formats a camera may send.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
pub enum CameraFormat {
    /// Motion JPEG.
    Mjpg,
    /// YUV 4:2:2.
    Yuyv,
}

/// How frames and parts meet.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
pub enum TriggerMode {
    /// Every frame is a part of its own; when inspection is slower than the source, the newest frame wins and drops are counted.
    FreeRunning,
    /// The board announces each part. Never dropped: each gets a verdict before its deadline or a counted fail-safe reject.
    Board,
}

/// Inference threads.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct InferenceConfig {
    /// Worker threads, each with one frame at a time, 1 to 64.
    pub workers: usize,
    /// Threads used inside one inference, 1 to 64; `workers * threads_per_frame` should not exceed the cores.
    pub threads_per_frame: usize,
}

/// The link to the reject board or PLC.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub enum PlcConfig {
    /// No link: verdicts go to the journal only.
    None,
    /// The native protocol of `firmware-bridge`.
    Bridge(BridgeConfig),
    /// Modbus RTU.
    Modbus(ModbusConfig),
}

/// Native protocol settings. What the board must share is agreed at start; a mismatch refuses to run.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct BridgeConfig {
    /// Serial device, best a stable path (`/dev/serial/by-id/…`).
    pub port: PathBuf,
    /// Baud rate.
    #[serde(default = "default_baud")]
    pub baud: u32,
    /// Codename of this connection: a frame from another line is refused. Same number on the board.
    #[serde(default = "default_codename")]
    pub codename: u32,
    /// Time from trigger to the board's own decision, in ms, 10 to 60000.
    #[serde(default = "default_deadline_ms")]
    pub deadline_ms: u32,
    /// The board goes to its safe state after this long without a valid frame, in ms, 20 to 10000.
    #[serde(default = "default_watchdog_ms")]
    pub watchdog_ms: u32,
}

fn default_baud() -> u32 {
    115_200
}
fn default_codename() -> u32 {
    0x6375_6c6c
}
fn default_deadline_ms() -> u32 {
    500
}
fn default_watchdog_ms() -> u32 {
    500
}

/// Modbus RTU settings.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct ModbusConfig {
    /// Serial device.
    pub port: PathBuf,
    /// Baud rate.
    #[serde(default = "default_baud")]
    pub baud: u32,
    /// Who asks.
    pub role: ModbusRole,
    /// Unit (slave) address, 1 to 247.
    pub unit: u8,
    /// Time from trigger to the PLC's own decision, in ms, 10 to 60000.
    #[serde(default = "default_deadline_ms")]
    pub deadline_ms: u32,
}

/// Who asks on the Modbus line.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
pub enum ModbusRole {
    /// We poll the PLC and write verdicts to it.
    Master,
    /// The PLC polls us.
    Slave,
}

/// Defect pictures on disk.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct SnapshotConfig {
    /// Folder; `None` writes no pictures.
    pub folder: Option<PathBuf>,
    /// Which parts are kept.
    pub keep: Keep,
    /// Oldest pictures are removed above this many MB, at least 10.
    pub max_mb: u64,
    /// Nothing is written below this much free disk, in MB.
    pub min_free_mb: u64,
}

/// Which parts get a picture.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
pub enum Keep {
    /// Everything that was not accepted.
    Rejects,
    /// Every part.
    All,
}

/// The verdict database.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct JournalConfig {
    /// SQLite file; `None` keeps no journal.
    pub path: Option<PathBuf>,
    /// Oldest verdicts are removed above this many rows, at least 1000.
    pub max_rows: u64,
}

/// Stall and restart limits.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct SuperviseConfig {
    /// A source that brings no frame for this long is closed and re-opened and the PLC is told, in ms, 100 to 600000.
    pub stall_ms: u32,
    /// First pause before re-opening, in ms; doubles at each failure.
    pub backoff_min_ms: u32,
    /// Longest pause before re-opening, in ms.
    pub backoff_max_ms: u32,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            line: "line 1".into(),
            model: "models/default.onnx".into(),
            source: SourceConfig::Simulated { seed: 1, defect_share: default_defect_share() },
            roi: None,
            trigger: TriggerMode::FreeRunning,
            false_reject_rate: 0.005,
            inference: InferenceConfig::default(),
            plc: PlcConfig::None,
            snapshots: SnapshotConfig::default(),
            journal: JournalConfig::default(),
            supervise: SuperviseConfig::default(),
        }
    }
}

impl Default for InferenceConfig {
    fn default() -> Self {
        Self { workers: 1, threads_per_frame: 1 }
    }
}

impl Default for SnapshotConfig {
    fn default() -> Self {
        Self { folder: None, keep: Keep::Rejects, max_mb: 2_000, min_free_mb: 500 }
    }
}

impl Default for JournalConfig {
    fn default() -> Self {
        Self { path: None, max_rows: 10_000_000 }
    }
}

impl Default for SuperviseConfig {
    fn default() -> Self {
        // 2 s is four frames of the slowest camera anybody triggers at; below it a long exposure would look like a stall.
        Self { stall_ms: 2_000, backoff_min_ms: 200, backoff_max_ms: 10_000 }
    }
}
