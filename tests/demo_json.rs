//! The demo as a user starts it: the built binary, the shipped model, the board in its own process on a pseudo-terminal.

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/models/default.onnx");

fn number(json: &Value, path: &str) -> f64 {
    path.split('.').fold(json, |v, key| &v[key]).as_f64().unwrap_or_else(|| panic!("`{path}` is no number in {json:#}"))
}

#[test]
fn the_json_contract_holds_and_no_missed_part_is_accepted() {
    if !Path::new(MODEL).is_file() {
        eprintln!("SKIPPED: {MODEL} is not there yet");
        return;
    }
    let out = tempfile::tempdir().unwrap();
    let run = Command::new(env!("CARGO_BIN_EXE_cull"))
        .args(["demo", "--seconds", "3", "--seed", "5", "--json", "--model", MODEL, "--out"])
        .arg(out.path())
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&run.stderr);
    assert!(run.status.success(), "{:?}\n{stderr}", run.status);
    let json: Value = serde_json::from_slice(&run.stdout).unwrap_or_else(|e| panic!("one JSON object on stdout: {e}\n{stderr}"));

    // The names that scripts rely on.
    for path in [
        "parts",
        "accepted",
        "rejected",
        "missed_deadline",
        "false_rejects",
        "false_accepts",
        "dropped_frames",
        "throughput_fps",
        "bare_model_fps",
        "allocations_per_frame",
        "rss_mb",
        "snapshots.count",
        "missed_but_accepted",
    ] {
        assert!(number(&json, path) >= 0.0, "{path}");
    }
    for stage in ["queue", "preprocess", "inference", "verdict", "link", "total"] {
        let (p50, p99) = (number(&json, &format!("latency_ms.{stage}.p50")), number(&json, &format!("latency_ms.{stage}.p99")));
        assert!(p50 <= p99, "{stage}: {p50} {p99}");
    }

    // What must be true whatever the machine is busy with.
    assert!(number(&json, "parts") > 0.0, "{json:#}");
    assert_eq!(number(&json, "parts"), number(&json, "accepted") + number(&json, "rejected"), "{json:#}");
    assert_eq!(number(&json, "board.parts"), number(&json, "parts"), "the board counted other parts: {json:#}");
    assert_eq!(number(&json, "missed_but_accepted"), 0.0, "{json:#}");
    assert_eq!(number(&json, "board.leaks"), 0.0, "{json:#}");
    assert_eq!(number(&json, "dropped_frames"), 0.0, "triggered parts are never dropped: {json:#}");
    assert!(json["failure"].is_null() && json["board_safe_state"] == false, "{json:#}");

    let folder = Path::new(json["snapshots"]["folder"].as_str().unwrap());
    let heat_maps =
        std::fs::read_dir(folder).unwrap().filter(|e| e.as_ref().unwrap().file_name().to_string_lossy().ends_with(".heat.png")).count();
    assert!(heat_maps > 0, "no heat maps in {}: {json:#}", folder.display());
    assert!(number(&json, "snapshots.count") >= heat_maps as f64, "{json:#}");
}

/// The inspector is frozen until the board takes it for dead: the board's safe state fails the demo, however well the rest went.
#[test]
fn a_board_in_its_safe_state_fails_the_demo() {
    /// More than the demo's watchdog of 3 s.
    const FROZEN: Duration = Duration::from_secs(6);
    /// Generous: other work runs beside the tests.
    const PATIENCE: Duration = Duration::from_secs(120);
    if !Path::new(MODEL).is_file() {
        eprintln!("SKIPPED: {MODEL} is not there yet");
        return;
    }
    let out = tempfile::tempdir().unwrap();
    let child = Command::new(env!("CARGO_BIN_EXE_cull"))
        .args(["demo", "--seconds", "20", "--defect-share", "1", "--json", "--model", MODEL, "--out"])
        .arg(out.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // Its first picture on the disk says that the line runs.
    let snapshots = out.path().join("snapshots");
    let is_heat_map =
        |entry: std::io::Result<std::fs::DirEntry>| entry.is_ok_and(|e| e.file_name().to_string_lossy().ends_with(".heat.png"));
    let running = || std::fs::read_dir(&snapshots).is_ok_and(|mut entries| entries.any(is_heat_map));
    let began = Instant::now();
    while !running() {
        assert!(began.elapsed() < PATIENCE, "the line never started");
        std::thread::sleep(Duration::from_millis(20));
    }
    kill_process(Pid::from_child(&child), Signal::STOP).unwrap();
    std::thread::sleep(FROZEN);
    kill_process(Pid::from_child(&child), Signal::CONT).unwrap();
    let run = child.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&run.stderr);
    assert!(!run.status.success(), "{stderr}");
    assert!(stderr.contains("safe state"), "{stderr}");
    let json: Value = serde_json::from_slice(&run.stdout).unwrap_or_else(|e| panic!("one JSON object on stdout: {e}\n{stderr}"));
    assert_eq!(json["board_safe_state"], true, "{json:#}");
    assert!(json["failure"].as_str().unwrap().contains("safe state"), "{json:#}");
    assert_eq!(number(&json, "missed_but_accepted"), 0.0, "{json:#}");
}
