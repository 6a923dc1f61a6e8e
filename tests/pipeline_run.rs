//! `cull run` as a service manager starts it: the built binary with the shipped model.

use cull::source::simulated::{HEIGHT_PX, SimulatedLine, WIDTH_PX};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/models/default.onnx");

fn model_is_there() -> bool {
    let there = Path::new(MODEL).is_file();
    if !there {
        eprintln!("SKIPPED: {MODEL} is not there yet");
    }
    there
}

fn config(folder: &Path, text: &str) -> std::path::PathBuf {
    let path = folder.join("line.ron");
    std::fs::write(&path, format!("(model: {MODEL:?}, {text})")).unwrap();
    path
}

#[test]
fn a_folder_gets_a_verdict_per_picture_and_ends_the_run() {
    if !model_is_there() {
        return;
    }
    const GOOD: usize = 30;
    let folder = tempfile::tempdir().unwrap();
    let pictures = folder.path().join("test");
    let mut line = SimulatedLine::new(3, 0.5);
    let mut pixels = Vec::new();
    for part in 0..GOOD as u32 {
        let truth = line.render(part, &mut pixels);
        let name = truth.defect.map_or_else(|| "good".to_string(), |d| d.name.to_string());
        let into = pictures.join(name);
        std::fs::create_dir_all(&into).unwrap();
        image::save_buffer(into.join(format!("{part:03}.png")), &pixels, WIDTH_PX, HEIGHT_PX, image::ExtendedColorType::Rgb8).unwrap();
    }
    // A picture that is none must cost a fault verdict, not the run.
    std::fs::write(pictures.join("good/broken.png"), b"not a picture").unwrap();
    let config = config(folder.path(), r#"source: Folder(path: "test"), snapshots: (folder: "snapshots"), journal: (path: "verdicts.db")"#);
    let run = Command::new(env!("CARGO_BIN_EXE_cull")).args(["run", "--json", "--config"]).arg(config).output().unwrap();
    let stderr = String::from_utf8_lossy(&run.stderr);
    assert!(run.status.success(), "{:?}\n{stderr}", run.status);
    let lines: Vec<Value> = run.stdout.lines().map(|l| serde_json::from_str(&l.unwrap()).unwrap()).collect();
    let judged = lines.iter().filter(|l| l["score"].is_number()).count();
    assert_eq!(judged, GOOD, "{lines:#?}\n{stderr}");
    assert!(lines.iter().all(|l| l["decision"] != "accept" || l["p_value"].as_f64().unwrap() > 0.005), "{lines:#?}");
    assert!(folder.path().join("verdicts.db").is_file());
    let rejected = lines.iter().filter(|l| l["decision"] != "accept" && l["score"].is_number()).count();
    let heat_maps = std::fs::read_dir(folder.path().join("snapshots"))
        .unwrap()
        .filter(|e| e.as_ref().unwrap().file_name().to_string_lossy().ends_with(".heat.png"))
        .count();
    assert_eq!(heat_maps, rejected, "{stderr}");
}

#[test]
fn sigterm_ends_the_run_in_order() {
    if !model_is_there() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let config = config(folder.path(), "source: Simulated(seed: 1)");
    let mut child = Command::new(env!("CARGO_BIN_EXE_cull"))
        .args(["run", "--json", "--config"])
        .arg(config)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    for _ in 0..3 {
        lines.next().expect("a verdict").unwrap();
    }
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    // Verdicts of the parts in flight, each a whole line, then the end.
    for line in lines {
        serde_json::from_str::<Value>(&line.unwrap()).unwrap();
    }
    let mut stderr = String::new();
    child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
    let status = child.wait().unwrap();
    assert!(status.success(), "{status:?}\n{stderr}");
    assert!(stderr.contains("parts"), "the summary is printed: {stderr}");
}

/// The service manager's side: READY once the stages run, watchdog pings while they do, STOPPING at the end.
#[test]
fn systemd_is_kept_informed() {
    if !model_is_there() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let socket_path = folder.path().join("notify");
    let socket = UnixDatagram::bind(&socket_path).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let config = config(folder.path(), "source: Simulated(seed: 1)");
    let mut child = Command::new(env!("CARGO_BIN_EXE_cull"))
        .args(["run", "--config"])
        .arg(config)
        .env("NOTIFY_SOCKET", &socket_path)
        .env("WATCHDOG_USEC", "2000000")
        .env_remove("WATCHDOG_PID")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let hear = |wanted: &str| {
        let mut buffer = [0u8; 4096];
        loop {
            let n = socket.recv(&mut buffer).unwrap_or_else(|e| panic!("{wanted} never came: {e}"));
            if String::from_utf8_lossy(&buffer[..n]).lines().any(|l| l.starts_with(wanted)) {
                return;
            }
        }
    };
    hear("READY=1");
    hear("WATCHDOG=1");
    hear("STATUS=");
    hear("WATCHDOG=1");
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    hear("STOPPING=1");
    assert!(child.wait().unwrap().success());
}

#[test]
fn a_missing_folder_is_a_fault_with_its_own_exit_code() {
    if !model_is_there() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let config = config(folder.path(), r#"source: Folder(path: "nowhere")"#);
    let run = Command::new(env!("CARGO_BIN_EXE_cull")).args(["run", "--config"]).arg(config).output().unwrap();
    assert!(!run.status.success());
    assert!(String::from_utf8_lossy(&run.stderr).contains("nowhere"));
}
