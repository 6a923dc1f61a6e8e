//! `cull check`: check a configuration without running.

use super::table;
use cull::config::{CameraDevice, Config, ConfigError, Keep, PlcConfig, SourceConfig, TriggerMode};
use cull::model::runtime::Model;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Arguments of `cull check`.
#[derive(clap::Args)]
pub struct Args {
    /// The configuration (RON; deploy/cull.ron is a commented template)
    #[arg(long, value_name = "F")]
    config: PathBuf,
    /// One JSON object on stdout
    #[arg(long)]
    json: bool,
    /// Warnings fail, too: for the machine that will run the line
    #[arg(long)]
    strict: bool,
}

/// Run the command: exit code 0 when the configuration is good, 1 when it is not (or, with `--strict`, when something it names is missing
/// on this machine).
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let config = match Config::load(&args.config) {
        Ok(config) => config,
        Err(error) => {
            if args.json {
                let (line, column) = match &error {
                    ConfigError::Invalid { line, column, .. } => (Some(line), Some(column)),
                    ConfigError::Read { .. } | ConfigError::TooLarge { .. } => (None, None),
                };
                println!(
                    "{}",
                    serde_json::json!({ "ok": false, "error": error.to_string(), "line": line, "column": column, "warnings": [] })
                );
            } else {
                // As compilers print it, so that editors find the place.
                eprintln!("{error}");
            }
            return Ok(ExitCode::FAILURE);
        }
    };
    let mut warnings = Vec::new();
    let facts = summary(&config, &mut warnings);
    let ok = warnings.is_empty() || !args.strict;
    if args.json {
        let summary: serde_json::Map<String, serde_json::Value> =
            facts.into_iter().map(|(name, value)| (name.replace([' ', '-'], "_"), value.into())).collect();
        println!("{}", serde_json::json!({ "ok": ok, "error": null, "warnings": warnings, "summary": summary }));
    } else {
        println!("{}: OK\n", args.config.display());
        print!("{}", table::facts(&facts));
        if !warnings.is_empty() {
            println!("\non this machine:");
            warnings.iter().for_each(|warning| println!("  warning: {warning}"));
        }
    }
    Ok(if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What would run, a line each; what this machine lacks for it goes to `warnings`.
fn summary(config: &Config, warnings: &mut Vec<String>) -> Vec<(&'static str, String)> {
    let model = match Model::load(&config.model, 1) {
        Ok(model) => {
            let (facts, spec) = (model.facts(), &model.meta().preprocess);
            let threshold = model.meta().calibration.score_at(config.false_reject_rate);
            format!(
                "{}\n{}, {}x{} pixels, {:.2} M parameters; rejects at score {threshold:.4}",
                config.model.display(),
                facts.name,
                spec.width_px,
                spec.height_px,
                facts.parameters as f64 / 1e6
            )
        }
        Err(error) => {
            warnings.push(error.to_string());
            format!("{} (does not load)", config.model.display())
        }
    };
    let trigger = match config.trigger {
        TriggerMode::FreeRunning => "every picture is a part; the newest wins, drops are counted",
        TriggerMode::Board => "the board announces each part; none is dropped",
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let (workers, per_frame) = (config.inference.workers, config.inference.threads_per_frame);
    if workers * per_frame > cores {
        warnings.push(format!(
            "inference: {workers} workers x {per_frame} threads are more than the {cores} cores here: verdicts get slower, not faster"
        ));
    }
    let roi = config
        .roi
        .map_or_else(|| "the whole picture".to_owned(), |r| format!("{}x{} pixels at ({}, {})", r.width_px, r.height_px, r.x_px, r.y_px));
    let snapshots = config.snapshots.folder.as_ref().map_or_else(
        || "none".to_owned(),
        |folder| {
            let kept = match config.snapshots.keep {
                Keep::Rejects => "rejects",
                Keep::All => "every part",
            };
            format!(
                "{kept}, in {}, at most {} MB, stops below {} MB free",
                folder.display(),
                config.snapshots.max_mb,
                config.snapshots.min_free_mb
            )
        },
    );
    let journal = config
        .journal
        .path
        .as_ref()
        .map_or_else(|| "none".to_owned(), |path| format!("{}, at most {} verdicts", path.display(), config.journal.max_rows));
    let web = config.web.as_ref().map_or_else(
        || "none".to_owned(),
        |web| {
            let reach = if web.bind.ip().is_loopback() { "this machine only" } else { "whoever reaches the port, without a password" };
            format!("http://{} ({reach})", web.bind)
        },
    );
    let s = &config.supervise;
    vec![
        ("line", config.line.clone()),
        ("model", model),
        ("source", source(&config.source, warnings)),
        ("roi", roi),
        ("trigger", trigger.to_owned()),
        ("false-reject rate", format!("{:.3} % of good parts", f64::from(config.false_reject_rate) * 100.0)),
        ("inference", format!("{workers} workers x {per_frame} threads ({cores} cores here)")),
        ("plc", plc(&config.plc, warnings)),
        ("snapshots", snapshots),
        ("journal", journal),
        (
            "supervise",
            format!("re-open after {} ms without a picture, pauses of {} to {} ms", s.stall_ms, s.backoff_min_ms, s.backoff_max_ms),
        ),
        ("web", web),
    ]
}

fn source(config: &SourceConfig, warnings: &mut Vec<String>) -> String {
    let mut must_exist = |path: &Path, hint: &str| {
        if !path.exists() {
            warnings.push(format!("source: {} does not exist: {hint}", path.display()));
        }
    };
    match config {
        SourceConfig::Camera(camera) => {
            let hint = "plug the camera in; `cull doctor` lists the cameras it finds";
            let device = match &camera.device {
                CameraDevice::Index(index) => {
                    let path = PathBuf::from(format!("/dev/video{index}"));
                    must_exist(&path, hint);
                    path.display().to_string()
                }
                CameraDevice::Path(path) => {
                    must_exist(path, hint);
                    path.display().to_string()
                }
                CameraDevice::Serial(serial) => format!("with serial number {serial}"),
            };
            let controls = match camera.controls.len() {
                0 => "controls left as they are".to_owned(),
                1 => "1 control set".to_owned(),
                count => format!("{count} controls set"),
            };
            format!(
                "camera {device}\n{}x{} pixels at {} Hz, {:?}, {controls}",
                camera.width_px, camera.height_px, camera.rate_hz, camera.format
            )
        }
        SourceConfig::Folder { path, repeat, rate_hz } => {
            must_exist(path, "create it or correct `source.path`");
            let rate = rate_hz.map_or_else(|| "as fast as they are inspected".to_owned(), |rate| format!("{rate} pictures/s"));
            format!("pictures from {}, {rate}, {}", path.display(), if *repeat { "again and again" } else { "once" })
        }
        SourceConfig::Simulated { seed, defect_share } => format!("simulated line, seed {seed}, {:.1} % defective", defect_share * 100.0),
    }
}

fn plc(config: &PlcConfig, warnings: &mut Vec<String>) -> String {
    let mut must_exist = |port: &Path| {
        if !port.exists() {
            warnings.push(format!("plc: {} does not exist: plug it in; `cull doctor` lists the serial ports it finds", port.display()));
        }
    };
    match config {
        PlcConfig::None => "none: nothing rejects a part".to_owned(),
        PlcConfig::Bridge(c) => {
            must_exist(&c.port);
            format!(
                "reject board at {}, {} baud\ndeadline {} ms, watchdog {} ms, codename {:#010x}",
                c.port.display(),
                c.baud,
                c.deadline_ms,
                c.watchdog_ms,
                c.codename
            )
        }
        PlcConfig::Modbus(c) => {
            must_exist(&c.port);
            let parity = match c.parity {
                cull::config::Parity::Even => 'E',
                cull::config::Parity::Odd => 'O',
                cull::config::Parity::None => 'N',
            };
            format!(
                "Modbus RTU {:?}, unit {}, at {}, {} baud 8{parity}{}\ndeadline {} ms",
                c.role,
                c.unit,
                c.port.display(),
                c.baud,
                c.stop_bits,
                c.deadline_ms
            )
        }
    }
}
