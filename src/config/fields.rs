//! Every field of the configuration with what it accepts: one table for range checks and for messages.

use super::{CameraDevice, Config, PlcConfig, SourceConfig};
use std::fmt;

/// One field.
pub(super) struct Field {
    /// Dotted path without variant names: `plc.port` is the port of either link.
    pub path: &'static str,
    pub accepts: Accepts,
}

/// What a field accepts.
pub(super) enum Accepts {
    /// In words; checked by the type, or in [`Config::problems`].
    Words(&'static str),
    /// A number, checked here.
    Number { range: Range, value: fn(&Config) -> Option<f64> },
}

/// A range of numbers.
#[derive(Clone, Copy)]
pub(super) struct Range {
    min: f64,
    max: f64,
    /// Whether `min` itself is excluded.
    above: bool,
    whole: bool,
    unit: &'static str,
}

impl Range {
    pub fn contains(&self, value: f64) -> bool {
        // NaN is in no range.
        value <= self.max && if self.above { value > self.min } else { value >= self.min }
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.whole { "a whole number" } else { "a number" };
        match self.above {
            true => write!(f, "{kind} above {} and up to {}", self.min, self.max)?,
            false => write!(f, "{kind} from {} to {}", self.min, self.max)?,
        }
        if self.unit.is_empty() { Ok(()) } else { write!(f, " ({})", self.unit) }
    }
}

const fn whole(min: f64, max: f64, unit: &'static str) -> Range {
    Range { min, max, above: false, whole: true, unit }
}

/// What the field at `path` accepts; list indices in the path are ignored.
pub(super) fn accepted(path: &str) -> Option<String> {
    let plain: String = {
        let mut depth = 0usize;
        path.chars()
            .filter(|c| {
                match c {
                    '[' | '{' => depth += 1,
                    ']' | '}' => {
                        depth = depth.saturating_sub(1);
                        return false;
                    }
                    _ => {}
                }
                depth == 0
            })
            .collect()
    };
    FIELDS.iter().find(|f| f.path == plain).map(|f| match &f.accepts {
        Accepts::Words(words) => (*words).to_owned(),
        Accepts::Number { range, .. } => range.to_string(),
    })
}

const fn words(path: &'static str, words: &'static str) -> Field {
    Field { path, accepts: Accepts::Words(words) }
}

const fn number(path: &'static str, range: Range, value: fn(&Config) -> Option<f64>) -> Field {
    Field { path, accepts: Accepts::Number { range, value } }
}

fn camera(config: &Config) -> Option<&super::CameraConfig> {
    if let SourceConfig::Camera(camera) = &config.source { Some(camera) } else { None }
}

fn plc(config: &Config, bridge: fn(&super::BridgeConfig) -> u32, modbus: fn(&super::ModbusConfig) -> u32) -> Option<f64> {
    match &config.plc {
        PlcConfig::None => None,
        PlcConfig::Bridge(c) => Some(f64::from(bridge(c))),
        PlcConfig::Modbus(c) => Some(f64::from(modbus(c))),
    }
}

/// Largest size in MB and row count that is taken for a number somebody meant.
const HUGE: f64 = 1e9;

pub(super) static FIELDS: &[Field] = &[
    words("line", "a name of 1 to 64 printable characters, in quotes"),
    words("model", "path of a model bundle (.onnx), in quotes"),
    words("source", "Camera(…), Folder(…) or Simulated(…)"),
    words("source.device", "Index(0), Path(\"/dev/v4l/by-id/…\") or Serial(\"…\")"),
    number("source.width_px", whole(16.0, 16_384.0, "pixels"), |c| camera(c).map(|c| f64::from(c.width_px))),
    number("source.height_px", whole(16.0, 16_384.0, "pixels"), |c| camera(c).map(|c| f64::from(c.height_px))),
    number(
        "source.rate_hz",
        Range { min: 0.0, max: 1000.0, above: true, whole: false, unit: "pictures per second; whole for a camera" },
        |c| match &c.source {
            SourceConfig::Camera(camera) => Some(f64::from(camera.rate_hz)),
            SourceConfig::Folder { rate_hz, .. } => rate_hz.map(f64::from),
            SourceConfig::Simulated { .. } => None,
        },
    ),
    words("source.format", "Mjpg or Yuyv"),
    words("source.controls", "a list of (\"V4L2 control name\", whole number); `v4l2-ctl --list-ctrls` and `cull doctor` name them"),
    words("source.path", "path of a folder of pictures, in quotes"),
    words("source.repeat", "true or false"),
    words("source.seed", "a whole number from 0 to 18446744073709551615"),
    number("source.defect_share", Range { min: 0.0, max: 1.0, above: false, whole: false, unit: "share of parts" }, |c| match &c.source {
        SourceConfig::Simulated { defect_share, .. } => Some(f64::from(*defect_share)),
        _ => None,
    }),
    words("roi", "None or (x_px: …, y_px: …, width_px: …, height_px: …), in frame pixels"),
    number("roi.x_px", whole(0.0, 16_383.0, "frame pixels"), |c| c.roi.map(|r| f64::from(r.x_px))),
    number("roi.y_px", whole(0.0, 16_383.0, "frame pixels"), |c| c.roi.map(|r| f64::from(r.y_px))),
    number("roi.width_px", whole(1.0, 16_384.0, "frame pixels"), |c| c.roi.map(|r| f64::from(r.width_px))),
    number("roi.height_px", whole(1.0, 16_384.0, "frame pixels"), |c| c.roi.map(|r| f64::from(r.height_px))),
    words("trigger", "FreeRunning or Board"),
    number("false_reject_rate", Range { min: 0.0, max: 0.5, above: true, whole: false, unit: "share of good parts rejected" }, |c| {
        Some(f64::from(c.false_reject_rate))
    }),
    words("inference", "(workers: …, threads_per_frame: …)"),
    number("inference.workers", whole(1.0, 64.0, "threads"), |c| Some(c.inference.workers as f64)),
    number("inference.threads_per_frame", whole(1.0, 64.0, "threads"), |c| Some(c.inference.threads_per_frame as f64)),
    words("plc", "None, Bridge(…) or Modbus(…)"),
    words("plc.port", "absolute path of a serial device, in quotes, best one under /dev/serial/by-id/"),
    number("plc.baud", whole(1200.0, 4_000_000.0, "bits per second"), |c| plc(c, |b| b.baud, |m| m.baud)),
    words("plc.codename", "a whole number from 0 to 4294967295 (hexadecimal as 0x6375_6c6c), the same as on the board"),
    number("plc.deadline_ms", whole(10.0, 60_000.0, "ms"), |c| plc(c, |b| b.deadline_ms, |m| m.deadline_ms)),
    number("plc.watchdog_ms", whole(20.0, 10_000.0, "ms"), |c| {
        if let PlcConfig::Bridge(b) = &c.plc { Some(f64::from(b.watchdog_ms)) } else { None }
    }),
    words("plc.role", "Master or Slave"),
    number(
        "plc.unit",
        whole(1.0, 247.0, "unit address"),
        |c| if let PlcConfig::Modbus(m) = &c.plc { Some(f64::from(m.unit)) } else { None },
    ),
    words("plc.parity", "Even, Odd or None"),
    number("plc.stop_bits", whole(1.0, 2.0, "stop bits"), |c| {
        if let PlcConfig::Modbus(m) = &c.plc { Some(f64::from(m.stop_bits)) } else { None }
    }),
    words("snapshots", "(folder: …, keep: …, max_mb: …, min_free_mb: …)"),
    words("snapshots.folder", "None or the path of a folder, in quotes"),
    words("snapshots.keep", "Rejects or All"),
    number("snapshots.max_mb", whole(10.0, HUGE, "MB"), |c| Some(c.snapshots.max_mb as f64)),
    number("snapshots.min_free_mb", whole(0.0, HUGE, "MB"), |c| Some(c.snapshots.min_free_mb as f64)),
    words("journal", "(path: …, max_rows: …)"),
    words("journal.path", "None or the path of a file, in quotes"),
    number("journal.max_rows", whole(1000.0, HUGE, "rows"), |c| Some(c.journal.max_rows as f64)),
    words("supervise", "(stall_ms: …, backoff_min_ms: …, backoff_max_ms: …)"),
    number("supervise.stall_ms", whole(100.0, 600_000.0, "ms"), |c| Some(f64::from(c.supervise.stall_ms))),
    number("supervise.backoff_min_ms", whole(10.0, 600_000.0, "ms"), |c| Some(f64::from(c.supervise.backoff_min_ms))),
    number("supervise.backoff_max_ms", whole(10.0, 600_000.0, "ms"), |c| Some(f64::from(c.supervise.backoff_max_ms))),
    words("web", "None or (bind: …)"),
    words("web.bind", "an IP address and port, in quotes: \"127.0.0.1:8080\" for this machine only"),
];

/// Something wrong with a configuration that parsed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The field, dotted. Where two fields contradict each other, the one to change first.
    pub path: String,
    /// What was found and what is accepted.
    pub message: String,
}

/// What ranges and combinations are wrong, in the order of the table.
pub(super) fn problems(config: &Config) -> Vec<Problem> {
    let mut found: Vec<Problem> = Vec::new();
    let mut add = |path: &str, message: String| found.push(Problem { path: path.to_owned(), message });
    for field in FIELDS {
        if let Accepts::Number { range, value } = &field.accepts
            && let Some(value) = value(config).filter(|value| !range.contains(*value))
        {
            // Fractions come from f32: shown as such, 0.7 stays 0.7.
            let shown = if range.whole { value.to_string() } else { (value as f32).to_string() };
            add(field.path, format!("{shown} is out of range; accepted: {range}"));
        }
    }
    let line_chars = config.line.chars().count();
    if !(1..=64).contains(&line_chars) || config.line.chars().any(char::is_control) {
        add("line", format!("a name of {line_chars} characters; accepted: {}", accepted("line").unwrap_or_default()));
    }
    let mut path_given = |path: &str, value: &std::path::Path| {
        if value.as_os_str().is_empty() {
            add(path, format!("the path is empty; accepted: {}", accepted(path).unwrap_or_default()));
        }
    };
    path_given("model", &config.model);
    config.snapshots.folder.iter().for_each(|p| path_given("snapshots.folder", p));
    config.journal.path.iter().for_each(|p| path_given("journal.path", p));
    match &config.source {
        SourceConfig::Folder { path, .. } => path_given("source.path", path),
        SourceConfig::Camera(camera) => match &camera.device {
            CameraDevice::Path(path) => path_given("source.device", path),
            CameraDevice::Serial(serial) if serial.is_empty() => {
                add("source.device", "the serial number is empty; `cull doctor` lists cameras with theirs".into())
            }
            CameraDevice::Index(_) | CameraDevice::Serial(_) => {}
        },
        SourceConfig::Simulated { .. } => {}
    }
    if let SourceConfig::Camera(camera) = &config.source {
        for (index, (name, _)) in camera.controls.iter().enumerate() {
            if name.is_empty() {
                add(
                    "source.controls",
                    "a control has an empty name; accepted: V4L2 control names such as \"exposure_time_absolute\"".into(),
                );
            } else if camera.controls.iter().take(index).any(|(earlier, _)| earlier == name) {
                add("source.controls", format!("control \"{name}\" is given twice; keep one of them"));
            }
        }
        if let Some(roi) = config.roi {
            let beyond = |from: u32, size: u32, frame: u32| u64::from(from) + u64::from(size) > u64::from(frame);
            if beyond(roi.x_px, roi.width_px, camera.width_px) || beyond(roi.y_px, roi.height_px, camera.height_px) {
                let (right, bottom) = (u64::from(roi.x_px) + u64::from(roi.width_px), u64::from(roi.y_px) + u64::from(roi.height_px));
                add(
                    "roi",
                    format!(
                        "ends at {right}x{bottom}, outside the camera's {}x{} pixels; accepted: a region inside the frame",
                        camera.width_px, camera.height_px
                    ),
                );
            }
        }
    }
    let port = match &config.plc {
        PlcConfig::None => None,
        PlcConfig::Bridge(c) => Some(&c.port),
        PlcConfig::Modbus(c) => Some(&c.port),
    };
    if let Some(port) = port.filter(|port| !port.is_absolute()) {
        let hint = if port.components().count() == 1 { format!("; did you mean \"/dev/{}\"?", port.display()) } else { String::new() };
        add(
            "plc.port",
            format!("`{}` is not an absolute path{hint}; accepted: {}", port.display(), accepted("plc.port").unwrap_or_default()),
        );
    }
    if config.trigger == super::TriggerMode::Board && config.plc == PlcConfig::None {
        add("trigger", "Board needs a board that announces parts, but `plc` is None; configure `plc` or use FreeRunning".into());
    }
    if config.supervise.backoff_min_ms > config.supervise.backoff_max_ms {
        let (min, max) = (config.supervise.backoff_min_ms, config.supervise.backoff_max_ms);
        add("supervise.backoff_min_ms", format!("{min} is above backoff_max_ms ({max}); accepted: at most backoff_max_ms"));
    }
    found
}
