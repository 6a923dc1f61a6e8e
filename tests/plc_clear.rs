//! An operator watches a line that runs and clears its board's safe state: the built binary as line, as board and as the operator's tool. The line is frozen
//! (SIGSTOP) until its board has latched, goes on, and what leaves the board is looked at at the gate.

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/models/default.onnx");
/// Generous: other work runs beside the tests.
const PATIENCE: Duration = Duration::from_secs(120);
/// Long, so that a busy machine freezes nobody for this long; the test does.
const WATCHDOG_MS: &str = "4000";
const DEADLINE_MS: &str = "3000";
const GATE_MS: &str = "3200";
const PACE: &str = "pace 5";
/// Parts between sensor and gate at most: 5 a second for 3.2 s, and as many again for good measure.
const ON_THE_BELT: u64 = 32;

struct Process {
    child: Child,
    lines: Receiver<Value>,
}

impl Process {
    fn start(command: &mut Command) -> Self {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn().unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        let (tx, lines) = channel();
        std::thread::spawn(move || {
            for line in out.lines().map_while(Result::ok) {
                if tx.send(serde_json::from_str(&line).unwrap_or_else(|e| panic!("{line}: {e}"))).is_err() {
                    break;
                }
            }
        });
        Self { child, lines }
    }

    fn wait_for(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let end = Instant::now() + PATIENCE;
        loop {
            let line = self.lines.recv_timeout(end.saturating_duration_since(Instant::now())).unwrap_or_else(|e| panic!("{what}: {e}"));
            if wanted(&line) {
                return line;
            }
        }
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn cull() -> Command {
    Command::new(env!("CARGO_BIN_EXE_cull"))
}

fn send(runtime: &Path, config: &Path, what: &[&str]) -> Output {
    cull().args(["plc", "send", "--config"]).arg(config).args(what).env("RUNTIME_DIRECTORY", runtime).output().unwrap()
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[test]
fn a_board_that_latched_is_cleared_through_the_running_line_and_nothing_else_is() {
    if !Path::new(MODEL).is_file() {
        eprintln!("SKIPPED: {MODEL} is not there yet");
        return;
    }
    let mut board =
        Process::start(cull().args(["sim-board", "--deadline-ms", DEADLINE_MS, "--watchdog-ms", WATCHDOG_MS, "--gate-ms", GATE_MS]));
    let mut orders: ChildStdin = board.child.stdin.take().unwrap();
    let port = board.wait_for("the board's port", |line| line["port"].is_string())["port"].as_str().unwrap().to_owned();

    let folder = tempfile::tempdir().unwrap();
    let runtime = folder.path().join("run");
    let config = folder.path().join("line.ron");
    let plc = format!("plc: Bridge(port: {port:?}, deadline_ms: {DEADLINE_MS}, watchdog_ms: {WATCHDOG_MS})");
    std::fs::write(&config, format!("(model: {MODEL:?}, source: Simulated(seed: 1), trigger: Board, {plc})")).unwrap();

    // No line yet, and nobody to ask: the tool talks to the board itself.
    let direct = send(&runtime, &config, &["clear"]);
    assert!(direct.status.success() && !text(&direct).contains("line that runs"), "{}", text(&direct));

    let mut line = Process::start(cull().args(["run", "--json", "--config"]).arg(&config).env("RUNTIME_DIRECTORY", &runtime));
    writeln!(orders, "{PACE}").unwrap();
    board.wait_for("a part that is let through", |part| part["gate"] == "accept");

    // A monitor sees the line's own frames; it holds nothing up, and the port stays the line's.
    let mut monitor = cull();
    monitor.args(["plc", "monitor", "--json", "--seconds", "4", "--config"]).arg(&config).env("RUNTIME_DIRECTORY", &runtime);
    let monitored = monitor.output().unwrap();
    assert!(monitored.status.success(), "{}", text(&monitored));
    for kind in [("in", "trigger"), ("out", "verdict"), ("in", "acknowledge"), ("in", "heartbeat"), ("out", "heartbeat")] {
        let seen = monitored.stdout.lines().map_while(Result::ok).any(|frame| {
            let frame: Value = serde_json::from_str(&frame).unwrap();
            (frame["direction"].as_str(), frame["kind"].as_str()) == (Some(kind.0), Some(kind.1))
        });
        assert!(seen, "{kind:?} in {}", text(&monitored));
    }

    line.signal(Signal::STOP);
    let latched = board.wait_for("the safe state", |part| part["reason"] == "safe_state")["part"].as_u64().unwrap();
    line.signal(Signal::CONT);
    // The line is back: the board hears its verdicts again, on parts that were not on the belt when it was frozen, and rejects in spite of them.
    board.wait_for("a part rejected in spite of its accept", |part| {
        assert_eq!(part["gate"], "reject", "let through in the safe state: {part}");
        part["part"].as_u64().unwrap() > latched + ON_THE_BELT && part["verdict"] == "accept"
    });

    for what in [&["reject"][..], &["line-stop"], &["led"], &["verdict", "accept"]] {
        let refused = send(&runtime, &config, what);
        assert!(!refused.status.success(), "{what:?} while a line runs: {}", text(&refused));
        assert!(text(&refused).contains(&format!("in use by process {}", line.child.id())), "{}", text(&refused));
    }
    board.wait_for("still the safe state", |part| part["reason"] == "safe_state");

    let cleared = send(&runtime, &config, &["clear"]);
    assert!(cleared.status.success() && text(&cleared).contains("line that runs"), "{}", text(&cleared));
    board.wait_for("a part that is let through again", |part| part["gate"] == "accept");

    line.signal(Signal::TERM);
    assert!(line.child.wait().unwrap().success());
    assert_eq!(std::fs::read_dir(&runtime).unwrap().count(), 0, "the socket goes with its line");
    writeln!(orders, "quit").unwrap();
    let counters = board.wait_for("the counters", |line| line["counters"].is_object());
    assert_eq!((&counters["counters"]["safe_entries"], &counters["counters"]["leaks"]), (&1.into(), &0.into()), "{counters}");
}
