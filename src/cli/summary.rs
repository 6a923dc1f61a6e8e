//! What `run` and `demo` print alike: the table of latencies, the model's whereabouts, memory.

use anyhow::{Context, bail};
use cull::config::Config;
use cull::model::runtime::Model;
use cull::pipeline::{Latency, StageLatency};
use cull::snapshot;
use std::fmt::Write;
use std::path::{Path, PathBuf};

/// Where the shipped model may lie: in the working folder, in the repository that the binary was built in, where the Debian package puts it.
const MODEL: &str = "models/default.onnx";
const INSTALLED_MODEL: &str = "/usr/share/cull/models/default.onnx";

/// The shipped model.
pub fn find_default_model() -> anyhow::Result<PathBuf> {
    let mut places = vec![PathBuf::from(MODEL)];
    if let Ok(binary) = std::env::current_exe() {
        places.extend(binary.ancestors().skip(1).take(4).map(|folder| folder.join(MODEL)));
    }
    places.push(INSTALLED_MODEL.into());
    match places.iter().find(|place| place.is_file()) {
        Some(place) => Ok(place.clone()),
        None => bail!("no model: {MODEL} is neither here nor beside the binary nor at {INSTALLED_MODEL}; name one with --model"),
    }
}

/// Load the model of a configuration.
pub fn load_model(config: &Config) -> anyhow::Result<Model> {
    Model::load(&config.model, config.inference.threads_per_frame).context("the model cannot be used")
}

/// What the recorder has to know of model and line.
pub fn snapshot_context(config: &Config, model: &Model) -> snapshot::Context {
    snapshot::Context::new(&config.line, model.meta(), config.false_reject_rate)
}

/// The stages in the order in which a part meets them.
pub fn stages(latency: &StageLatency) -> [(&'static str, &Latency, &'static str); 7] {
    [
        ("queue", &latency.queue, "waiting for a free stage"),
        ("preprocess", &latency.preprocess, "decode, resize, normalise"),
        ("inference", &latency.inference, "the model"),
        ("verdict", &latency.verdict, "score, decision, part order"),
        ("link", &latency.link, "verdict to the board's acknowledgement"),
        ("total", &latency.total, "capture to verdict on the link"),
        ("response", &latency.response, "trigger to verdict on the link"),
    ]
}

/// Latencies as an aligned table, one line a stage that was measured.
pub fn latency_table(latency: &StageLatency) -> String {
    let mut table = format!("  {:<12}{:>9}{:>9}{:>9}\n", "stage", "p50 ms", "p99 ms", "max ms");
    for (name, l, what) in stages(latency) {
        if l.count > 0 {
            // Writing to a `String` cannot fail.
            let _ = writeln!(table, "  {name:<12}{:>9.2}{:>9.2}{:>9.2}  {what}", l.p50, l.p99, l.max);
        }
    }
    table
}

/// Resident memory of this process in MB (10^6 bytes), or `None` where /proc does not say.
pub fn rss_mb() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let kib: f64 = status.lines().find_map(|l| l.strip_prefix("VmRSS:"))?.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024.0 / 1e6)
}

/// A path for people: relative to the working folder where that is shorter.
pub fn shown(path: &Path) -> String {
    let here = std::env::current_dir().unwrap_or_default();
    path.strip_prefix(&here).unwrap_or(path).display().to_string()
}
