//! The simulated board as a process, a host session at the other end of the pseudo-terminal. No timing is asserted but the generous limits.

use firmware_bridge::host::{HostConfig, HostEvent, HostSession, Link};
use firmware_bridge::parameters::Expected;
use firmware_bridge::wire::{BoardState, Command as PlcCommand, Decision, HostState, Request, Status};
use serde_json::Value;
use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// Longest any test waits for something.
const PATIENCE: Duration = Duration::from_secs(60);

struct Sim {
    child: Child,
    orders: Option<ChildStdin>,
    lines: Receiver<Value>,
    port: std::fs::File,
    host: HostSession,
    started: Instant,
    events: Vec<HostEvent>,
    gate: HashMap<u64, Value>,
    counters: Option<Value>,
}

impl Sim {
    fn start(config: &str) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_firmware-bridge-sim"))
            .arg(config)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the simulated board starts");
        let out = BufReader::new(child.stdout.take().expect("stdout"));
        let (tx, lines) = channel();
        std::thread::spawn(move || {
            for line in out.lines().map_while(Result::ok) {
                let value = serde_json::from_str(&line).unwrap_or_else(|e| panic!("{line}: {e}"));
                if tx.send(value).is_err() {
                    break;
                }
            }
        });
        let first: Value = lines.recv_timeout(PATIENCE).expect("the port's line");
        let path = first["port"].as_str().expect("port").to_owned();
        let port = std::fs::OpenOptions::new().read(true).write(true).open(&path).expect("the port opens");
        let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NONBLOCK;
        rustix::fs::fcntl_setfl(&port, flags).expect("non-blocking");
        let expected = Expected { deadline_ms: 2000, watchdog_ms: 2000, ..Expected::default() };
        let host = HostSession::new(HostConfig { expected, ..HostConfig::default() }, 7, 0);
        let orders = child.stdin.take();
        Self { child, orders, lines, port, host, started: Instant::now(), events: Vec::new(), gate: HashMap::new(), counters: None }
    }

    fn now(&self) -> u64 {
        self.started.elapsed().as_micros() as u64
    }

    fn order(&mut self, order: &str) {
        writeln!(self.orders.as_mut().expect("orders"), "{order}").expect("order taken");
    }

    /// One turn of the host's loop.
    fn turn(&mut self) {
        let now = self.now();
        let mut events = Vec::new();
        let mut buffer = [0; 1024];
        if let Ok(n) = self.port.read(&mut buffer) {
            self.host.on_bytes(now, &buffer[..n], &mut |e| events.push(e));
        }
        self.host.poll(now, &mut |e| events.push(e));
        self.events.append(&mut events);
        if let Ok(n) = self.port.write(self.host.output()) {
            self.host.consume(n);
        }
        while let Ok(line) = self.lines.try_recv() {
            if let Some(part) = line["part"].as_u64() {
                assert!(self.gate.insert(part, line).is_none(), "part {part} passed the gate twice");
            } else {
                self.counters = Some(line["counters"].clone());
            }
        }
        std::thread::sleep(Duration::from_micros(500));
    }

    fn until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let end = Instant::now() + PATIENCE;
        while !done(self) {
            assert!(Instant::now() < end, "waited in vain for {what}; gate {:?}, events {:?}", self.gate, self.events);
            self.turn();
        }
    }

    fn saw(&self, wanted: impl Fn(&HostEvent) -> bool) -> bool {
        self.events.iter().any(wanted)
    }

    /// Verdicts for the triggers that came: even parts accept, odd parts reject.
    fn judge(&mut self) {
        for event in std::mem::take(&mut self.events) {
            if let HostEvent::Trigger(t) = event {
                let decision = if t.part % 2 == 0 { Decision::Accept } else { Decision::Reject };
                self.host.verdict(self.now(), t.part, decision, 0, 0.5).expect("verdict taken");
            }
        }
    }

    fn connect(&mut self) {
        self.until("link", |s| s.saw(|e| matches!(e, HostEvent::Link(Link::Up(_)))));
        self.host.set_state(self.now(), HostState::Running);
    }
}

impl Drop for Sim {
    fn drop(&mut self) {
        drop(self.orders.take());
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

// Long deadline, short belt: parts pass quickly, and a busy machine does not make them miss.
const CONFIG: &str = r#"{"deadline_ms": 2000, "watchdog_ms": 2000, "gate_ms": 1500, "lead_ms": 20, "pulse_ms": 40}"#;

#[test]
fn parts_leave_by_their_verdicts() {
    let mut sim = Sim::start(CONFIG);
    sim.connect();
    sim.order("pace 10");
    sim.until("ten parts", |s| {
        s.judge();
        s.gate.len() >= 10
    });
    sim.order("stop");
    for (part, line) in &sim.gate {
        let wanted = if part % 2 == 0 { "accept" } else { "reject" };
        assert_eq!(line["gate"], wanted, "{line}");
        assert_eq!(line["reason"], "verdict", "{line}");
    }
    // The end of stdin ends the run with the counters.
    drop(sim.orders.take());
    sim.until("counters", |s| s.counters.is_some());
    let counters = sim.counters.clone().expect("counters");
    assert_eq!(counters["leaks"], 0);
    assert_eq!(counters["parts"].as_u64(), Some(sim.gate.len() as u64 + counters["in_flight"].as_u64().expect("in flight")));
    assert!(sim.child.wait().expect("ends").success());
}

#[test]
fn flat_is_a_closed_loop_and_noise_lets_nothing_through() {
    let config = r#"{"deadline_ms": 2000, "watchdog_ms": 2000, "gate_ms": 300, "lead_ms": 10, "pulse_ms": 12, "encoder_hz": 20000,
        "clock_start_us": 4294000000, "first_part": 4294967290,
        "faults": {"drop": 0.002, "duplicate": 0.002, "corrupt": 0.002, "delay": 0.05, "delay_max_ms": 20, "seed": 3}}"#;
    let mut sim = Sim::start(config);
    sim.connect();
    sim.order("flat 2");
    sim.until("a hundred parts", |s| {
        s.judge();
        s.gate.len() >= 100
    });
    drop(sim.orders.take());
    sim.until("counters", |s| s.counters.is_some());
    let accepted = sim.gate.values().filter(|line| line["gate"] == "accept").count();
    for (part, line) in &sim.gate {
        if line["gate"] == "accept" {
            assert!(part % 2 == 0 && line["verdict"] == "accept", "{line}");
        }
    }
    assert!(accepted > 0, "everything rejected: {:?}", sim.gate);
    let counters = sim.counters.clone().expect("counters");
    assert_eq!(counters["leaks"], 0);
    assert!(counters["faults"]["corrupted"].as_u64() > Some(0));
}

#[test]
fn a_dead_host_leads_to_the_safe_state_until_cleared() {
    let mut sim = Sim::start(r#"{"deadline_ms": 2000, "watchdog_ms": 2000, "gate_ms": 300, "lead_ms": 20, "pulse_ms": 40}"#);
    sim.connect();
    // Silent for longer than the watchdog time.
    std::thread::sleep(Duration::from_millis(2500));
    sim.events.clear();
    sim.until("a new session in the safe state", |s| s.saw(|e| matches!(e, HostEvent::Board { state: BoardState::Safe, faults: 1 })));
    sim.order("pace 10");
    // Its accept verdict arrives, and does not help it.
    sim.until("part 2", |s| {
        s.judge();
        s.gate.contains_key(&2)
    });
    let line = sim.gate[&2].clone();
    assert_eq!(line["verdict"], "accept");
    assert_eq!((&line["gate"], &line["reason"]), (&Value::from("reject"), &Value::from("safe_state")), "{line}");
    sim.events.clear();
    sim.host.request(sim.now(), Request::Clear).expect("asked");
    sim.until("the answer", |s| s.saw(|e| matches!(e, HostEvent::Answer { request: Request::Clear, status: Status::Taken })));
    sim.order("recipe 12");
    sim.until("the command", |s| s.saw(|e| *e == HostEvent::Command(PlcCommand::Recipe(12))));
    sim.gate.clear();
    sim.until("an accepted part", |s| {
        s.judge();
        s.gate.values().any(|line| line["gate"] == "accept")
    });
}

#[test]
fn a_stopped_line_stops_the_belt() {
    let mut sim = Sim::start(
        r#"{"deadline_ms": 2000, "watchdog_ms": 2000, "gate_ms": 300, "lead_ms": 20, "pulse_ms": 40, "safe_state": "stop_line", "encoder_hz": 5000, "pace_hz": 20}"#,
    );
    // No host yet: the belt stands.
    std::thread::sleep(Duration::from_millis(700));
    sim.turn();
    assert!(sim.gate.is_empty());
    sim.connect();
    sim.until("parts", |s| {
        s.judge();
        s.gate.values().any(|line| line["gate"] == "accept") && s.gate.values().any(|line| line["gate"] == "reject")
    });
}

#[test]
fn impossible_settings_are_one_clear_error() {
    for (config, needle) in [
        (r#"{"gate_ms": 3}"#, "gate.distance"),
        (r#"{"deadline_ms": 5}"#, "deadline_ms is 5; allowed is 10 to 60000"),
        (r#"{"faults": {"drop": 2}}"#, "faults.drop is 2"),
        (r#"{"nonsense": 1}"#, "unknown field"),
    ] {
        let out = Command::new(env!("CARGO_BIN_EXE_firmware-bridge-sim")).arg(config).stdin(Stdio::null()).output().expect("runs");
        let text = String::from_utf8_lossy(&out.stderr);
        assert!(!out.status.success() && text.contains(needle) && text.lines().count() == 1, "{config}: {text}");
    }
}
