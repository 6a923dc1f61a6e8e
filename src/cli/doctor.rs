//! `cull doctor`: cameras, serial ports, CPU and model: OK, warning, what to do.

use cull::anomaly::AnomalyMap;
use cull::config::{CameraDevice, Config, PlcConfig, SourceConfig};
use cull::doctor::{machine, serial};
use cull::eval::inspector::ModelInspector;
use cull::frame::{Frame, Origin, PixelFormat, now_ns};
use cull::model::runtime::Model;
use cull::pool::Pooled;
use cull::source::camera;
use cull::source::simulated::{DefectRange, HEIGHT_PX, SimulatedLine, WIDTH_PX};
use cull::verdict::{Decision, Policy, decide};
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

/// Arguments of `cull doctor`.
#[derive(clap::Args)]
pub struct Args {
    /// Also check that what this configuration names is there
    #[arg(long, value_name = "F")]
    config: Option<PathBuf>,
    /// The model bundle [default: the configuration's, or models/default.onnx]
    #[arg(long, value_name = "M")]
    model: Option<PathBuf>,
    /// One JSON object on stdout
    #[arg(long)]
    json: bool,
}

/// How a finding bears on a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Level {
    Ok,
    Warning,
    /// A line cannot run like this.
    Failure,
}

#[derive(Serialize)]
struct Finding {
    section: &'static str,
    level: Level,
    what: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    advice: Option<String>,
}

#[derive(Default)]
struct Report {
    findings: Vec<Finding>,
}

impl Report {
    fn ok(&mut self, section: &'static str, what: impl Into<String>) {
        self.findings.push(Finding { section, level: Level::Ok, what: what.into(), advice: None });
    }
    fn warn(&mut self, section: &'static str, what: impl Into<String>, advice: impl Into<String>) {
        self.findings.push(Finding { section, level: Level::Warning, what: what.into(), advice: Some(advice.into()) });
    }
    fn fail(&mut self, section: &'static str, what: impl Into<String>, advice: impl Into<String>) {
        self.findings.push(Finding { section, level: Level::Failure, what: what.into(), advice: Some(advice.into()) });
    }
}

/// Run the command: exit code 0 when a line can run, warnings or not, and 1 when something stops it.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let mut report = Report::default();
    let config = args.config.as_deref().and_then(|path| match Config::load(path) {
        Ok(config) => {
            report.ok("config", path.display().to_string());
            Some(config)
        }
        Err(error) => {
            report.fail("config", error.to_string(), "correct it; `cull check --config F` checks it again");
            None
        }
    });
    // Without a configuration the defaults stand in where a value is needed; nothing is then missing because it is configured.
    let settings = config.clone().unwrap_or_default();
    cpu(&mut report);
    memory_and_disk(&mut report, &settings);
    cameras(&mut report, config.as_ref());
    serial_ports(&mut report, config.as_ref());
    permissions(&mut report);
    let model = args.model.unwrap_or_else(|| settings.model.clone());
    let facts = self_test(&mut report, &model, settings.false_reject_rate);

    let worst = report.findings.iter().any(|f| f.level == Level::Failure);
    if args.json {
        let json = serde_json::json!({ "ok": !worst, "findings": report.findings, "model": facts, "serial_ports": serial::list() });
        println!("{json}");
    } else {
        print!("{}", text(&report));
    }
    Ok(if worst { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn text(report: &Report) -> String {
    let width = report.findings.iter().map(|f| f.section.len()).max().unwrap_or(0);
    let mut out = String::new();
    let mut last = "";
    for finding in &report.findings {
        let mark = match finding.level {
            Level::Ok => "OK  ",
            Level::Warning => "WARN",
            Level::Failure => "FAIL",
        };
        let section = if finding.section == last { "" } else { finding.section };
        last = finding.section;
        out += &format!("{mark}  {section:<width$}  {}\n", finding.what);
        if let Some(advice) = &finding.advice {
            out += &format!("{:width$}          -> {advice}\n", "");
        }
    }
    let count = |level| report.findings.iter().filter(|f| f.level == level).count();
    let (failures, warnings) = (count(Level::Failure), count(Level::Warning));
    out += &match (failures, warnings) {
        (0, 0) => "\nA line can run here.\n".to_owned(),
        (0, 1) => "\nA line can run here; 1 warning.\n".to_owned(),
        (0, _) => format!("\nA line can run here; {warnings} warnings.\n"),
        _ => format!("\nA line cannot run like this: {failures} to be mended (FAIL), {warnings} warnings.\n"),
    };
    out
}

fn cpu(report: &mut Report) {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    report.ok("cpu", format!("{}, {cores} cores usable", machine::cpu_name()));
    let features = machine::cpu_features();
    let names = |has: bool| features.iter().filter(|f| f.1 == has).map(|f| f.0).collect::<Vec<_>>().join(", ");
    let (present, missing) = (names(true), names(false));
    let missing = if missing.is_empty() { String::new() } else { format!(" (not here: {missing})") };
    match features.first() {
        Some((first, false)) => {
            report.warn(
                "cpu",
                format!("no {first}: inspection falls back to portable code"),
                "use a CPU with AVX2 (x86, from 2013) or NEON (64-bit ARM)",
            );
        }
        Some(_) => report.ok("cpu", format!("{present}{missing}")),
        None => report.warn("cpu", format!("architecture {} has no fast code here", std::env::consts::ARCH), "use x86-64 or 64-bit ARM"),
    }
}

/// Below this much available memory, in MB, a model, its buffers and the page cache crowd each other.
const LOW_MEMORY_MB: u64 = 500;

fn memory_and_disk(report: &mut Report, config: &Config) {
    match machine::memory() {
        Some(memory) => {
            let what = format!("{} MB, {} MB available", memory.total_mb, memory.available_mb);
            match memory.available_mb < LOW_MEMORY_MB {
                true => report.warn("memory", what, "stop other programs or add memory: below 500 MB a line may be killed by the kernel"),
                false => report.ok("memory", what),
            }
        }
        None => report.warn("memory", "unknown: /proc/meminfo cannot be read", "mount /proc"),
    }
    let folder = config.snapshots.folder.clone().unwrap_or_else(|| PathBuf::from("."));
    match machine::disk_free_mb(&folder) {
        Ok((free, asked)) => {
            let what = format!("{free} MB free at {}", asked.display());
            match free < config.snapshots.min_free_mb {
                true => report.warn(
                    "disk",
                    what,
                    format!(
                        "no defect pictures are written below {} MB: free some space or lower snapshots.min_free_mb",
                        config.snapshots.min_free_mb
                    ),
                ),
                false => report.ok("disk", what),
            }
        }
        Err(error) => {
            report.warn("disk", format!("free space at {} is unknown: {error}", folder.display()), "check that the disk is mounted")
        }
    }
}

fn cameras(report: &mut Report, config: Option<&Config>) {
    let cameras = camera::list();
    for camera in &cameras {
        let serial = camera.serial.as_ref().map(|s| format!(", serial {s}")).unwrap_or_default();
        let stable = camera.by_id.as_ref().map(|p| format!("\n{}", p.display())).unwrap_or_default();
        let what = format!("{} at {} ({}{serial}){stable}", camera.name, camera.path.display(), camera.driver);
        if let Some(problem) = &camera.problem {
            report.warn("camera", what, problem.clone());
            continue;
        }
        let formats: Vec<String> = camera.formats.iter().map(format_line).collect();
        report.ok("camera", std::iter::once(what).chain(formats).collect::<Vec<_>>().join("\n").replace('\n', "\n                "));
    }
    let wanted = config.and_then(|c| if let SourceConfig::Camera(camera) = &c.source { Some(&camera.device) } else { None });
    match wanted {
        Some(device) => {
            let found = match device {
                CameraDevice::Index(index) => cameras.iter().any(|c| c.index == *index),
                // A by-id link and a plain node both resolve.
                CameraDevice::Path(path) => path.exists(),
                CameraDevice::Serial(serial) => cameras.iter().any(|c| c.serial.as_ref() == Some(serial)),
            };
            if !found {
                report.fail(
                    "camera",
                    format!("the configured camera {device:?} is not there"),
                    "plug it in, check its power, or correct source.device",
                );
            }
        }
        None if cameras.is_empty() => {
            report.warn("camera", "none found", "plug a V4L2 camera in to inspect real parts; `cull demo` and folder sources need none")
        }
        None => {}
    }
}

/// One format of a camera with its largest sizes.
fn format_line(format: &camera::FormatInfo) -> String {
    /// Sizes named a format; the rest is counted.
    const SHOWN: usize = 6;
    let mut sizes: Vec<&camera::SizeInfo> = format.sizes.iter().collect();
    sizes.sort_by_key(|s| std::cmp::Reverse((u64::from(s.width_px) * u64::from(s.height_px), s.width_px)));
    let mut named: Vec<String> = sizes
        .iter()
        .take(SHOWN)
        .map(|s| {
            let rate = s.rates_hz.iter().copied().fold(0.0f32, f32::max);
            if rate > 0.0 { format!("{}x{} at {rate:.0} Hz", s.width_px, s.height_px) } else { format!("{}x{}", s.width_px, s.height_px) }
        })
        .collect();
    if sizes.len() > SHOWN {
        named.push(format!("{} smaller", sizes.len() - SHOWN));
    }
    let note = if format.supported { "" } else { " (not read by cull)" };
    format!("{}{note}: {}", format.fourcc, if named.is_empty() { "sizes unknown".to_owned() } else { named.join(", ") })
}

fn serial_ports(report: &mut Report, config: Option<&Config>) {
    let ports = serial::list();
    for port in &ports {
        let kind = match &port.usb {
            Some(usb) => {
                let names = [usb.manufacturer.as_deref(), usb.product.as_deref(), usb.serial.as_deref()];
                format!("USB {}:{} {}", usb.vid, usb.pid, names.into_iter().flatten().collect::<Vec<_>>().join(" "))
            }
            None => "on board".to_owned(),
        };
        let driver = port.driver.as_ref().map(|d| format!(", {d}")).unwrap_or_default();
        let stable = port.by_id.as_ref().map(|p| format!("\n                {}", p.display())).unwrap_or_default();
        let what = format!("{}: {kind}{driver}{stable}", port.path.display());
        if !machine::may_use(&port.path) {
            report.warn("serial", what, "this user may not open it: `sudo usermod -aG dialout $USER`, then log in again");
        } else if let Some(ms) = port.latency_ms.filter(|ms| *ms > 1) {
            report.warn(
                "serial",
                format!("{what}; latency timer {ms} ms"),
                "cull sets it to 1 ms when it opens the port; deploy/ has a udev rule that does so for good",
            );
        } else {
            report.ok("serial", what);
        }
    }
    let wanted = config.and_then(|c| match &c.plc {
        PlcConfig::None => None,
        PlcConfig::Bridge(c) => Some(&c.port),
        PlcConfig::Modbus(c) => Some(&c.port),
    });
    match wanted {
        Some(port) if !port.exists() => {
            report.fail("serial", format!("the configured port {} is not there", port.display()), "plug it in or correct plc.port")
        }
        Some(port) if !machine::may_use(port) => {
            report.fail(
                "serial",
                format!("this user may not open the configured port {}", port.display()),
                "`sudo usermod -aG dialout $USER`, then log in again",
            );
        }
        None if ports.is_empty() => report.warn(
            "serial",
            "no port found",
            "plug the reject board or a USB adapter in to reject real parts; `cull demo` brings its own",
        ),
        Some(_) | None => {}
    }
}

fn permissions(report: &mut Report) {
    if machine::is_root() {
        report.ok("rights", "root: every device may be opened (the installed service runs as a user of its own)");
        return;
    }
    for (group, what) in [("video", "cameras"), ("dialout", "serial ports")] {
        match machine::in_group(group) {
            Some(true) => report.ok("rights", format!("member of {group} ({what})")),
            Some(false) => report.warn(
                "rights",
                format!("not a member of {group} ({what})"),
                format!("`sudo usermod -aG {group} $USER`, then log in again"),
            ),
            None => report.ok("rights", format!("no group {group} on this machine; the device nodes' own rights decide")),
        }
    }
}

/// Simulated parts that the self-test looks at, each once sound and once with a defect: the same part, pose, light and noise.
const SELF_TEST_PARTS: usize = 12;
/// The self-test's line: any fixed seed, other than those that models are trained on.
const SELF_TEST_SEED: u64 = 0xD0C7;
/// So many of the twins with a defect score above their sound twins where model and machine work. By chance 10 of 12 happens once in 50.
const SELF_TEST_HIGHER: usize = 10;
/// Below this, the scores are as good as chance (6 of 12): something is broken, not merely weak.
const SELF_TEST_CHANCE: usize = 8;

/// Load the model, run it on simulated parts, say what it does and how fast.
fn self_test(report: &mut Report, path: &Path, false_reject_rate: f32) -> Option<serde_json::Value> {
    let model = match Model::load(path, 1) {
        Ok(model) => model,
        Err(error) => {
            report.fail("model", error.to_string(), "give a bundle with --model, or train one with cull-trainer");
            return None;
        }
    };
    let (facts, meta) = (model.facts(), model.meta());
    let [_, _, height, width] = facts.input;
    report.ok("model", format!("{}: {}", path.display(), facts.name));
    report.ok(
        "model",
        format!(
            "{width}x{height} pixels, {:.2} M parameters, {:.2} G multiply-adds, {:.1} MB, loaded in {} ms",
            facts.parameters as f64 / 1e6,
            facts.multiply_adds as f64 / 1e9,
            facts.file_bytes as f64 / 1e6,
            facts.load_ms
        ),
    );
    let test = match inspect_simulated_parts(&model) {
        Ok(test) => test,
        Err(why) => {
            report.fail("self-test", why, "report it with the model file; `cull bench --model M` shows where it fails");
            return serde_json::to_value(facts).ok();
        }
    };
    let policy = Policy { false_reject_rate };
    let rejected = |score: f32| decide(&policy, score, meta.calibration.p_value(score)).decision != Decision::Accept;
    let time = format!("{:.1} ms a part (median, one thread)", test.median_ms);
    if test.twins.iter().any(|twins| !twins.sound.is_finite() || !twins.defective.is_finite()) {
        report.fail("self-test", "the model gives scores that are not numbers", "export or train the model again");
    } else if let Some(other) = test.products.iter().find(|product| !meta.trained_on.contains(product)) {
        report.ok(
            "self-test",
            format!("{time}; runs, and was not trained on the simulated parts ({other}, for one), so these are not judged"),
        );
    } else {
        let count = |which: fn(&Twins) -> f32| test.twins.iter().filter(|twins| rejected(which(twins))).count();
        let higher = test.twins.iter().filter(|twins| twins.defective > twins.sound).count();
        let what = format!(
            "{time}; {SELF_TEST_PARTS} simulated parts: {} accepted, {} rejected once they have a defect, {higher} score higher with it",
            SELF_TEST_PARTS - count(|twins| twins.sound),
            count(|twins| twins.defective),
        );
        match higher {
            SELF_TEST_HIGHER.. => report.ok("self-test", what),
            SELF_TEST_CHANCE.. => {
                report.warn("self-test", what, "this model hardly sees plain defects: check it with `cull eval`, train it longer")
            }
            _ => report.fail(
                "self-test",
                what,
                "good and defective parts are not told apart: check the model with `cull eval`; if it is good elsewhere, report this CPU",
            ),
        }
    }
    serde_json::to_value(facts).ok()
}

/// Scores of one part without and with a defect.
struct Twins {
    sound: f32,
    defective: f32,
}

struct SelfTest {
    twins: Vec<Twins>,
    /// Names of the simulated products: a model that was trained on all of them is judged by them.
    products: Vec<String>,
    median_ms: f64,
}

fn inspect_simulated_parts(model: &Model) -> Result<SelfTest, String> {
    // Defects that nobody could miss: what is tested is the machine, not the model's finesse.
    let range = DefectRange { size_px: [35.0, 60.0], contrast: [0.8, 1.0] };
    let mut lines = [0.0, 1.0].map(|share| SimulatedLine::with_defects(SELF_TEST_SEED, share, range));
    let mut inspector = ModelInspector::new(model);
    let mut map = AnomalyMap::default();
    let mut times_ms = Vec::new();
    let mut twins = Vec::new();
    for part in 0..SELF_TEST_PARTS as u32 {
        let mut scores = [f32::NAN; 2];
        for (line, score) in lines.iter_mut().zip(&mut scores) {
            let mut pixels = Vec::new();
            line.render(part, &mut pixels);
            let frame = Frame {
                pixels: Pooled::detached(pixels),
                format: PixelFormat::Rgb8,
                width_px: WIDTH_PX,
                height_px: HEIGHT_PX,
                captured_ns: now_ns(),
                seq: u64::from(part),
                part: None,
                origin: Origin::default(),
            };
            let started = Instant::now();
            *score = inspector.inspect_frame(&frame, &mut map).map_err(|e| e.to_string())?;
            times_ms.push(started.elapsed().as_secs_f64() * 1e3);
        }
        let [sound, defective] = scores;
        twins.push(Twins { sound, defective });
    }
    times_ms.sort_by(f64::total_cmp);
    let median_ms = times_ms.get(times_ms.len() / 2).copied().unwrap_or(f64::NAN);
    let products = lines[0].products().map(ToString::to_string).collect();
    Ok(SelfTest { twins, products, median_ms })
}
