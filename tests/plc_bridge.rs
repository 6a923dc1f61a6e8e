//! The link against the simulated board as a process of its own: the real wire protocol through the real serial port layer on a pseudo-terminal.
//! What must come out is checked at the board's gate, not on the host. No timing is asserted but generous limits.

use cull::config::{BridgeConfig, PlcConfig};
use cull::frame::{PartId, now_ns};
use cull::plc::{BoardRequest, BoardState, BoardStatus, HostState, LinkHandle, LinkState, PlcEvent, RequestStatus, ToPlc};
use cull::verdict::{Decision, Policy, Reason, Verdict, decide, without_score};
use serde_json::Value;
use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(60);

struct Board {
    child: Child,
    orders: ChildStdin,
    lines: Receiver<Value>,
    port: String,
    gate: HashMap<u32, String>,
}

impl Board {
    fn start(arguments: &[&str]) -> Self {
        Self::start_with_watchdog("2000", arguments)
    }

    fn start_with_watchdog(watchdog_ms: &str, arguments: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_cull"))
            .args(["sim-board", "--deadline-ms", "3000", "--watchdog-ms", watchdog_ms, "--gate-ms", "3200"])
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        let (tx, lines) = channel();
        std::thread::spawn(move || {
            for line in out.lines().map_while(Result::ok) {
                if tx.send(serde_json::from_str(&line).unwrap_or_else(|e| panic!("{line}: {e}"))).is_err() {
                    break;
                }
            }
        });
        let first: Value = lines.recv_timeout(PATIENCE).unwrap();
        let port = first["port"].as_str().unwrap().to_owned();
        let orders = child.stdin.take().unwrap();
        Self { child, orders, lines, port, gate: HashMap::new() }
    }

    fn order(&mut self, order: &str) {
        writeln!(self.orders, "{order}").unwrap();
    }

    fn link(&self) -> LinkHandle {
        let config =
            BridgeConfig { port: self.port.clone().into(), baud: 115_200, codename: 0x6375_6c6c, deadline_ms: 3000, watchdog_ms: 2000 };
        cull::plc::spawn(&PlcConfig::Bridge(config)).unwrap().unwrap()
    }

    fn read_gate(&mut self) {
        while let Ok(line) = self.lines.try_recv() {
            if let (Some(part), Some(gate)) = (line["part"].as_u64(), line["gate"].as_str()) {
                let before = self.gate.insert(part as u32, gate.to_owned());
                assert_eq!(before, None, "part {part} passed twice");
            }
        }
    }
}

impl Drop for Board {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn wait_for<T>(link: &LinkHandle, what: &str, mut wanted: impl FnMut(&PlcEvent) -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        assert!(start.elapsed() < PATIENCE, "timed out: {what}");
        if let Ok(event) = link.events.recv_timeout(Duration::from_millis(100))
            && let Some(found) = wanted(&event)
        {
            return found;
        }
    }
}

fn wait_board(link: &LinkHandle, state: BoardState) {
    wait_for(link, &format!("{state:?}"), |event| {
        matches!(event, PlcEvent::Board(BoardStatus { state: s, .. }) if *s == state).then_some(())
    });
}

/// Every third part is bad, every seventh gets no verdict at all.
fn verdict_on(part: PartId) -> Option<Verdict> {
    match part.0 {
        n if n % 7 == 0 => None,
        n if n % 3 == 0 => Some(without_score(Reason::ModelError)),
        _ => Some(decide(&Policy { false_reject_rate: 0.005 }, 1.0, 0.9)),
    }
}

/// Judge parts until `parts` are past the gate.
fn judge(board: &mut Board, link: &LinkHandle, parts: usize) {
    let start = Instant::now();
    while board.gate.len() < parts {
        assert!(start.elapsed() < PATIENCE, "{} of {parts} parts at the gate: {:?}", board.gate.len(), link.stats.summary());
        if let Ok(PlcEvent::Trigger(trigger)) = link.events.recv_timeout(Duration::from_millis(20)) {
            assert!(trigger.deadline_ns > now_ns().saturating_sub(3_000_000_000));
            if let Some(verdict) = verdict_on(trigger.part) {
                link.to_plc.try_send(ToPlc::Verdict { part: trigger.part, verdict, decided_ns: now_ns() }).unwrap();
            }
        }
        board.read_gate();
    }
}

#[test]
fn each_part_gets_what_its_verdict_says_and_no_verdict_is_a_reject() {
    let mut board = Board::start(&[]);
    let link = board.link();
    link.to_plc.try_send(ToPlc::HostState(HostState::Running)).unwrap();
    wait_board(&link, BoardState::Running);
    board.order("pace 15");
    judge(&mut board, &link, 60);
    for (&part, gate) in &board.gate {
        let expected = verdict_on(PartId(part)).is_some_and(|v| v.decision == Decision::Accept);
        assert_eq!(gate == "accept", expected, "part {part}: {gate}");
    }
    let summary = link.stats.summary();
    assert_eq!(summary.late, 0, "{summary:?}");
    assert_eq!(summary.triggers_dropped + summary.events_dropped + summary.verdicts_undelivered, 0, "{summary:?}");
    assert!(summary.acknowledged >= 45, "{summary:?}");
    assert_eq!(summary.verdict_to_kernel_us.count, summary.verdicts_sent);
    assert_eq!(summary.bad_frames, 0, "{summary:?}");
}

#[test]
fn on_a_bad_line_nothing_is_accepted_without_its_accept() {
    let mut board = Board::start(&["--corrupt", "0.005", "--drop", "0.002", "--duplicate", "0.002", "--fault-seed", "5"]);
    let link = board.link();
    link.to_plc.try_send(ToPlc::HostState(HostState::Running)).unwrap();
    wait_board(&link, BoardState::Running);
    board.order("pace 15");
    judge(&mut board, &link, 60);
    let mut accepted = 0;
    for (&part, gate) in &board.gate {
        if gate == "accept" {
            accepted += 1;
            assert_eq!(verdict_on(PartId(part)).map(|v| v.decision), Some(Decision::Accept), "part {part}");
        }
    }
    assert!(accepted > 0, "repeats must get verdicts through: {:?}", link.stats.summary());
    assert!(link.stats.summary().bad_frames > 0, "the injector did nothing");
}

#[test]
fn a_board_with_other_parameters_is_refused() {
    let board = Board::start_with_watchdog("1500", &[]);
    let link = board.link();
    wait_for(&link, "refusal", |event| (*event == PlcEvent::Link(LinkState::Refused)).then_some(()));
}

#[test]
fn a_host_that_ends_in_order_latches_nothing_and_the_next_may_exercise_outputs() {
    let board = Board::start(&[]);
    let mut link = board.link();
    wait_for(&link, "up", |event| (*event == PlcEvent::Link(LinkState::Up)).then_some(()));
    wait_board(&link, BoardState::Running);
    let thread = link.thread.take().unwrap();
    drop(link);
    thread.join().unwrap();
    // The port is free again, and the board takes the next host without a clear.
    let link = board.link();
    wait_board(&link, BoardState::Running);
    link.to_plc.try_send(ToPlc::HostState(HostState::Stopped)).unwrap();
    // Outputs can be exercised while stopped; a refusal would come at once.
    let start = Instant::now();
    loop {
        link.to_plc.try_send(ToPlc::Request(BoardRequest::Led { duration_ms: 50 })).unwrap();
        let status = wait_for(&link, "answer", |event| if let PlcEvent::Answer { status, .. } = event { Some(*status) } else { None });
        if status == RequestStatus::Done {
            break;
        }
        assert!(start.elapsed() < PATIENCE);
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_dead_board_takes_the_link_down_and_the_port_is_tried_again() {
    let mut board = Board::start(&[]);
    let link = board.link();
    wait_for(&link, "up", |event| (*event == PlcEvent::Link(LinkState::Up)).then_some(()));
    board.child.kill().unwrap();
    wait_for(&link, "down", |event| (*event == PlcEvent::Link(LinkState::Down)).then_some(()));
    let start = Instant::now();
    while link.stats.summary().losses == 0 {
        assert!(start.elapsed() < PATIENCE);
        std::thread::sleep(Duration::from_millis(5));
    }
}
