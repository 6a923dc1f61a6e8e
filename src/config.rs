//! RON file -> checked [`Config`], every error with file:line:column and the accepted values.
//!
//! Every field is documented in `deploy/cull.ron`; unknown fields are errors. This module does no I/O but reading the file it is given:
//! whether cameras, ports and files exist is for `cull check` and for the parts that open them.

mod error;
mod fields;
mod locate;

pub use error::ConfigError;
pub use fields::Problem;

use crate::preprocess::Roi;
use serde::Deserialize;
use std::path::{Path, PathBuf};

/// Largest configuration file read, in bytes: a hundred times the commented template. More is a mistake (a model, a picture).
const MAX_FILE_BYTES: u64 = 1 << 20;

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
    /// The live page; `None` serves nothing.
    pub web: Option<WebConfig>,
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
fn default_stop_bits() -> u8 {
    1
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
    /// Parity bit; even is the Modbus default.
    #[serde(default)]
    pub parity: Parity,
    /// Stop bits, 1 or 2; Modbus asks for 2 where there is no parity bit, many devices use 1.
    #[serde(default = "default_stop_bits")]
    pub stop_bits: u8,
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

/// Parity of a serial line.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
pub enum Parity {
    /// An even number of ones (8E1, the Modbus default).
    #[default]
    Even,
    /// An odd number of ones.
    Odd,
    /// No parity bit.
    None,
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

/// The live page and metrics.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct WebConfig {
    /// Address and port. The page has no passwords: beyond loopback, everybody who reaches the port reads it.
    pub bind: std::net::SocketAddr,
}

impl Config {
    /// Read and check a configuration file. Relative paths in it are relative to the file's own folder, wherever `cull` was started.
    ///
    /// # Errors
    /// When the file cannot be read, or with the position and the accepted values of the first thing wrong in it.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let read = |source| ConfigError::Read { path: path.to_owned(), source };
        if std::fs::metadata(path).map_err(read)?.len() > MAX_FILE_BYTES {
            return Err(ConfigError::TooLarge { path: path.to_owned() });
        }
        let bytes = std::fs::read(path).map_err(read)?;
        match std::str::from_utf8(&bytes) {
            Ok(text) => Self::parse(text, path),
            Err(error) => {
                let good = bytes.get(..error.valid_up_to()).unwrap_or_default();
                let text = String::from_utf8_lossy(good);
                Err(ConfigError::at(path, &text, text.len(), "the file is not UTF-8 text here; save it as UTF-8".into()))
            }
        }
    }

    /// Check a configuration given as text. `file_name` is for messages, and its folder is where relative paths start; nothing is read.
    ///
    /// # Errors
    /// With the position and the accepted values of the first thing wrong.
    pub fn parse(text: &str, file_name: &Path) -> Result<Self, ConfigError> {
        // A byte-order mark is left by some editors and means nothing; columns of the first line shift by it otherwise.
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        use ron::extensions::Extensions;
        let ron = ron::Options::default().with_default_extension(Extensions::IMPLICIT_SOME | Extensions::UNWRAP_VARIANT_NEWTYPES);
        let mut config: Self = ron.from_str(text).map_err(|e| ConfigError::from_ron(file_name, text, &e))?;
        let entries = locate::entries(text);
        // A field left out has its default; a contradiction that involves one is shown at what was written: its section, or the start.
        let written = |path: &str| entries.iter().find(|e| e.path == path);
        let position = |path: &str| {
            let section = path.rsplit_once('.').map_or("", |(section, _)| section);
            written(path).or_else(|| written(section)).map_or(0, |e| e.value_at)
        };
        let first = config.problems().into_iter().min_by_key(|p| position(&p.path));
        if let Some(Problem { path, message }) = first {
            return Err(ConfigError::at(file_name, text, position(&path), format!("`{path}`: {message}")));
        }
        config.resolve_paths(file_name.parent().unwrap_or(Path::new("")));
        Ok(config)
    }

    /// Values out of range and settings that contradict each other. Empty for a usable configuration.
    pub fn problems(&self) -> Vec<Problem> {
        fields::problems(self)
    }

    /// Make relative paths start at `folder`.
    fn resolve_paths(&mut self, folder: &Path) {
        let resolve = |path: &mut PathBuf| *path = folder.join(&path);
        resolve(&mut self.model);
        match &mut self.source {
            SourceConfig::Folder { path, .. } => resolve(path),
            SourceConfig::Camera(CameraConfig { device: CameraDevice::Path(path), .. }) => resolve(path),
            SourceConfig::Camera(_) | SourceConfig::Simulated { .. } => {}
        }
        self.snapshots.folder.iter_mut().for_each(resolve);
        self.journal.path.iter_mut().for_each(resolve);
    }
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
            web: None,
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

#[cfg(test)]
mod tests {
    use super::*;

    const TEMPLATE: &str = include_str!("../deploy/cull.ron");

    /// The field names that serde knows of a struct, from its own "unknown field" error.
    fn fields_of(context: &str) -> Vec<&'static str> {
        use ron::extensions::Extensions;
        let text = context.replace('@', "no_such_field: 1");
        let ron = ron::Options::default().with_default_extension(Extensions::IMPLICIT_SOME | Extensions::UNWRAP_VARIANT_NEWTYPES);
        match ron.from_str::<Config>(&text) {
            Err(ron::error::SpannedError { code: ron::error::Error::NoSuchStructField { expected, .. }, .. }) => expected.to_vec(),
            other => panic!("{context}: expected an unknown-field error, got {other:?}"),
        }
    }

    /// Every struct and variant of the configuration, with the section of the field table that describes it.
    const SECTIONS: [(&str, &str); 12] = [
        ("", "(@)"),
        ("source", "(source: Camera(@))"),
        ("source", "(source: Folder(@))"),
        ("source", "(source: Simulated(@))"),
        ("roi", "(roi: (@))"),
        ("inference", "(inference: (@))"),
        ("plc", "(plc: Bridge(@))"),
        ("plc", "(plc: Modbus(@))"),
        ("snapshots", "(snapshots: (@))"),
        ("journal", "(journal: (@))"),
        ("supervise", "(supervise: (@))"),
        ("web", "(web: (@))"),
    ];

    /// Alternatives of the template: blocks of `//=` lines.
    fn alternatives() -> Vec<String> {
        let mut blocks: Vec<String> = Vec::new();
        let mut inside = false;
        for line in TEMPLATE.lines() {
            match line.trim_start().strip_prefix("//=") {
                Some(code) => {
                    if !inside {
                        blocks.push(String::new());
                    }
                    if let Some(block) = blocks.last_mut() {
                        *block += code;
                        *block += "\n";
                    }
                    inside = true;
                }
                None => inside = false,
            }
        }
        blocks
    }

    #[test]
    fn every_field_is_documented_in_the_template_and_in_the_table() {
        for (section, context) in SECTIONS {
            for field in fields_of(context) {
                let path = if section.is_empty() { field.to_owned() } else { format!("{section}.{field}") };
                assert!(fields::accepted(&path).is_some(), "`{path}` is not in the table of fields");
                let variant = context.split('(').nth(1).and_then(|s| s.rsplit(' ').next()).unwrap_or_default();
                let texts: Vec<String> =
                    std::iter::once(TEMPLATE.to_owned()).chain(alternatives().iter().map(|a| format!("({a})"))).collect();
                let shown = texts.iter().any(|text| {
                    locate::entries(text)
                        .iter()
                        .any(|e| e.path == path && (section.is_empty() || variant.is_empty() || text.contains(&format!("{variant}("))))
                });
                assert!(shown, "`{path}` of {context} is not in deploy/cull.ron");
            }
        }
    }

    #[test]
    fn the_table_has_no_field_that_does_not_exist() {
        let known: Vec<String> = SECTIONS
            .iter()
            .flat_map(|(section, context)| {
                fields_of(context).into_iter().map(move |f| if section.is_empty() { f.to_owned() } else { format!("{section}.{f}") })
            })
            .collect();
        for field in fields::FIELDS {
            assert!(known.iter().any(|k| k == field.path), "`{}` is in the table but not in the configuration", field.path);
        }
    }

    #[test]
    fn the_template_is_valid_and_so_is_each_alternative() {
        let config = Config::parse(TEMPLATE, Path::new("deploy/cull.ron")).expect("the template is valid");
        assert_eq!(config.model, Path::new("deploy/../models/default.onnx"));
        let alternatives = alternatives();
        assert_eq!(alternatives.len(), 6, "Camera, Folder, roi, Bridge, Modbus, web");
        for text in alternatives {
            let text = format!("({text})");
            Config::parse(&text, Path::new("alternative.ron")).unwrap_or_else(|e| panic!("{e}\n{text}"));
        }
    }

    #[test]
    fn the_template_shows_the_defaults() {
        let defaults = Config::default();
        let shown = Config::parse(TEMPLATE, Path::new("cull.ron")).expect("the template is valid");
        let expected = Config {
            // A template without pictures and journal would show nothing of them.
            model: "../models/default.onnx".into(),
            snapshots: SnapshotConfig { folder: Some("snapshots".into()), ..defaults.snapshots },
            journal: JournalConfig { path: Some("cull.db".into()), ..defaults.journal },
            ..defaults
        };
        assert_eq!(shown, expected);
    }

    #[test]
    fn the_defaults_have_no_problems() {
        assert_eq!(Config::default().problems(), []);
        assert_eq!(Config::parse("()", Path::new("empty.ron")).expect("all fields have defaults"), Config::default());
    }
}
