//! The live page over real sockets.

mod common;

use common::{FakeModel, FakeSource, PATIENCE, SourceScript, options, pixel};
use crossbeam_channel::bounded;
use cull::config::{TriggerMode, WebConfig};
use cull::pipeline::{Options, Pipeline, Sinks};
use cull::web;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::Ordering;

fn get(address: SocketAddr, path: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: box\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let text = String::from_utf8_lossy(&answer).into_owned();
    let status = text.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or(0);
    (status, text.split_once("\r\n\r\n").map(|(_, body)| body.to_string()).unwrap_or_default())
}

#[test]
fn the_page_shows_figures_verdicts_and_the_newest_heat_map() {
    let script = Arc::new(SourceScript::default());
    script.end_after.store(10, Ordering::SeqCst);
    let (tap, inspections) = bounded(64);
    let options = Options { tap: Some(tap), ..options(TriggerMode::FreeRunning, 1) };
    let source = FakeSource::new(&script, |seq| if seq == 4 { pixel::DEFECT } else { pixel::GOOD });
    let running = Pipeline::start(options, Arc::new(FakeModel::new(std::time::Duration::ZERO)), source, None, Sinks::default()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let about = web::About {
        line: "line \"7\"".into(),
        model: "scripted".into(),
        model_sha256: "0".repeat(64),
        snapshots: Some(folder.path().to_path_buf()),
    };
    let page = web::spawn(&WebConfig { bind: "127.0.0.1:0".parse().unwrap() }, about, running.control()).unwrap();
    let feed = page.feed();
    running.wait();
    inspections.iter().for_each(|i| feed.show(i));

    let (status, html) = get(page.address(), "/");
    assert!(status == 200 && html.contains("<title>cull</title>"));
    let (status, state) = get(page.address(), "/api/state");
    let state: serde_json::Value = serde_json::from_str(&state).unwrap();
    assert_eq!(status, 200);
    assert_eq!(state["stats"]["counts"]["parts"], 10);
    assert_eq!(state["stats"]["counts"]["rejected"], 1);
    assert_eq!(state["last"].as_array().unwrap().len(), 10);
    assert_eq!(state["last"][0]["seq"], 10, "newest first");
    let (_, metrics) = get(page.address(), "/metrics");
    assert!(metrics.contains("cull_parts_total{line=\"line \\\"7\\\"\",decision=\"accept\"} 9"), "{metrics}");
    assert!(metrics.lines().all(|l| l.starts_with('#') || l.split(' ').next_back().is_some_and(|v| v.parse::<f64>().is_ok())), "{metrics}");
    assert_eq!(get(page.address(), "/health"), (200, "Stopped\n".into()), "the line has ended in order");
    assert_eq!(get(page.address(), "/overlay.png").0, 404);
    assert_eq!(get(page.address(), "/nothing").0, 404);

    std::fs::write(folder.path().join("20260101T000000.000Z-1_part1_reject.heat.png"), b"picture").unwrap();
    let until = std::time::Instant::now() + PATIENCE;
    while get(page.address(), "/overlay.png") != (200, "picture".into()) {
        assert!(std::time::Instant::now() < until, "the heat map never appeared");
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
}
