//! Measures the native bridge over a pseudo-terminal: verdict to last byte handed to the kernel, and verdict to acknowledgement, on an idle
//! machine and with every core loaded; and computes what 115200 baud adds. The board is the simulated one, in a process of its own.
//!
//! `cargo run --release --example plc_latency -- [PARTS]`

use cull::config::{BridgeConfig, PlcConfig};
use cull::frame::now_ns;
use cull::plc::{BoardState, BoardStatus, HostState, LatencySummary, LinkSummary, PlcEvent, ToPlc};
use cull::verdict::{Policy, decide};
use firmware_bridge::cobs;
use firmware_bridge::wire::{self, Header, Key, Message};
use firmware_bridge_sim::SimConfig;
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Deadline and watchdog are wide, so that a stalled machine shows as latency and not as a lost link.
const DEADLINE_MS: u32 = 2_000;
const WATCHDOG_MS: u32 = 2_000;
/// Parts per second: the verdicts come one at a time, as on a line.
const PACE: u32 = 100;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let argument = std::env::args().nth(1);
    if argument.as_deref() == Some("board") {
        let config =
            SimConfig { deadline_ms: DEADLINE_MS, watchdog_ms: WATCHDOG_MS, gate_ms: 550, lead_ms: 2, pulse_ms: 4, ..SimConfig::default() };
        return Ok(firmware_bridge_sim::run(config)?);
    }
    let parts: u64 = argument.map_or(Ok(2_000), |n| n.parse())?;
    let cores = std::thread::available_parallelism()?.get();
    println!("{parts} parts at {PACE} per second, {cores} cores, load average {}", load_average());
    println!("{:<24} {:>8} {:>9} {:>9} {:>9} {:>9}", "us", "n", "p50", "p99", "p99.9", "max");
    for busy in [0, cores * 2] {
        let name = if busy == 0 { "idle".into() } else { format!("{busy} busy threads") };
        let summary = measure(parts, busy)?;
        row(&format!("to kernel, {name}"), &summary.verdict_to_kernel_us);
        row(&format!("to ack, {name}"), &summary.verdict_to_ack_us);
        println!("  late {}, repeats {}, bad frames {}", summary.late, summary.repeats, summary.bad_frames);
    }
    let verdict = wire_bytes(&Message::Verdict { part: u32::MAX, decision: wire::Decision::Accept, reason: 0, score: 1.0 });
    let ack = wire_bytes(&Message::Acknowledge { of: wire::kind::VERDICT, reference: u32::MAX, status: wire::Status::Taken });
    let us = |bytes: usize| bytes as f64 * 10.0 / 115_200.0 * 1e6;
    println!(
        "at 115200 baud, 10 bits a byte: verdict {verdict} bytes {:.0} us, acknowledgement {ack} bytes {:.0} us more",
        us(verdict),
        us(ack)
    );
    Ok(())
}

fn measure(parts: u64, busy: usize) -> Result<LinkSummary, Box<dyn std::error::Error>> {
    let mut board = Command::new(std::env::current_exe()?).arg("board").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let mut lines = BufReader::new(board.stdout.take().ok_or("no stdout")?).lines();
    let first: serde_json::Value = serde_json::from_str(&lines.next().ok_or("the board said nothing")??)?;
    let port = first["port"].as_str().ok_or("no port")?.to_owned();
    std::thread::spawn(move || lines.for_each(drop));
    let mut orders = board.stdin.take().ok_or("no stdin")?;
    let config = BridgeConfig {
        port: port.into(),
        baud: 115_200,
        codename: SimConfig::default().codename,
        deadline_ms: DEADLINE_MS,
        watchdog_ms: WATCHDOG_MS,
    };
    let link = cull::plc::spawn(&PlcConfig::Bridge(config))?.ok_or("no link")?;
    link.to_plc.try_send(ToPlc::HostState(HostState::Running))?;
    while !matches!(link.events.recv_timeout(Duration::from_secs(10))?, PlcEvent::Board(BoardStatus { state: BoardState::Running, .. })) {}
    let over = Arc::new(AtomicBool::new(false));
    let load: Vec<_> = (0..busy)
        .map(|_| {
            let over = over.clone();
            std::thread::spawn(move || {
                let mut n = 1u64;
                while !over.load(Ordering::Relaxed) {
                    n = std::hint::black_box(n.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1));
                }
            })
        })
        .collect();
    // The link's thread gets its real-time priority from a process of its own, which takes a moment on a loaded machine.
    std::thread::sleep(Duration::from_secs(2));
    writeln!(orders, "pace {PACE}")?;
    let verdict = decide(&Policy { false_reject_rate: 0.005 }, 1.0, 0.5);
    let mut seen = 0;
    while seen < parts {
        if let PlcEvent::Trigger(trigger) = link.events.recv_timeout(Duration::from_secs(10))? {
            seen += 1;
            link.to_plc.try_send(ToPlc::Verdict { part: trigger.part, verdict, decided_ns: now_ns() })?;
        }
    }
    writeln!(orders, "stop")?;
    std::thread::sleep(Duration::from_millis(300));
    let summary = link.stats.summary();
    over.store(true, Ordering::Relaxed);
    for thread in load {
        let _ = thread.join();
    }
    drop(link);
    drop(orders);
    board.wait()?;
    Ok(summary)
}

fn row(name: &str, l: &LatencySummary) {
    println!("{name:<24} {:>8} {:>9.1} {:>9.1} {:>9.1} {:>9.1}", l.count, l.p50, l.p99, l.p999, l.max);
}

/// Bytes of a message on the wire: body, COBS and delimiters.
fn wire_bytes(message: &Message) -> usize {
    let header = Header { version: 1, kind: message.kind(), source: wire::HOST, destination: wire::BOARD, number: 1 };
    let mut body = [0; wire::MAX_BODY];
    let len = wire::seal(header, message, Key::OPEN, &mut body);
    let mut out = [0; wire::MAX_BODY * 2];
    cobs::encode(&body[..len], &mut out).unwrap_or(0)
}

fn load_average() -> String {
    std::fs::read_to_string("/proc/loadavg").unwrap_or_default().split(' ').take(1).collect()
}
