//! `cull plc` as a person at the line uses it, against the simulated board.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(60);

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn cull(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cull"));
    command.args(arguments).env("CULL_LOG", "info");
    command
}

fn board() -> (Killed, String) {
    let mut child =
        cull(&["sim-board", "--watchdog-ms", "1000"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let first: serde_json::Value = serde_json::from_str(&line).unwrap();
    (Killed(child), first["port"].as_str().unwrap().to_owned())
}

fn send(port: &str, what: &[&str]) -> Output {
    cull(&["plc", "send", "--port", port, "--watchdog-ms", "1000"]).args(what).output().unwrap()
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[test]
fn outputs_are_exercised_a_monitor_holds_the_port_and_a_dead_host_must_be_cleared() {
    let (_board, port) = board();
    let done = send(&port, &["reject", "--ms", "50"]);
    assert!(done.status.success(), "{}", text(&done));
    assert!(text(&done).contains("done"), "{}", text(&done));

    let mut monitor = cull(&["plc", "monitor", "--port", &port, "--watchdog-ms", "1000", "--json"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let out = BufReader::new(monitor.stdout.take().unwrap());
    let monitor = Killed(monitor);
    let mut kinds = Vec::new();
    for line in out.lines().map_while(Result::ok) {
        let frame: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(frame["intact"], true, "{line}");
        kinds.push(format!("{}{}", frame["direction"].as_str().unwrap(), frame["kind"].as_str().unwrap()));
        if kinds.contains(&"inheartbeat".into()) && kinds.contains(&"outheartbeat".into()) {
            break;
        }
    }
    for kind in ["outhello", "inhello", "inparameters", "outagree"] {
        assert!(kinds.iter().any(|k| k == kind), "{kind} in {kinds:?}");
    }
    // While it runs, nobody else gets the port, and the refusal says who has it.
    let refused = send(&port, &["led"]);
    assert!(!refused.status.success());
    assert!(text(&refused).contains(&format!("in use by process {}", monitor.0.id())), "{}", text(&refused));

    drop(monitor); // killed: no goodbye
    let start = Instant::now();
    loop {
        // Until its watchdog has run out the board takes a new host as if nothing had been; then it is safe until cleared.
        let cleared = send(&port, &["clear"]);
        if cleared.status.success() {
            break;
        }
        assert!(start.elapsed() < PATIENCE, "{}", text(&cleared));
        std::thread::sleep(Duration::from_millis(200));
    }
}

#[test]
fn a_port_that_is_not_there_is_said_in_one_sentence() {
    let failed = send("/dev/serial/by-id/no-such-adapter", &["clear"]);
    assert!(!failed.status.success());
    let text = text(&failed);
    assert_eq!(text.trim().lines().filter(|line| line.starts_with("cull:")).count(), 1, "{text}");
    assert!(text.contains("/dev/serial/by-id/no-such-adapter is not there"), "{text}");
}

#[test]
fn a_monitor_ends_by_itself_and_prints_columns() {
    let (_board, port) = board();
    let output = cull(&["plc", "monitor", "--port", &port, "--watchdog-ms", "1000", "--seconds", "3"]).output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(printed.lines().any(|line| line.contains("<- heartbeat")), "{printed}");
    assert!(
        printed.lines().all(|line| line.len() > 15 && line.get(13..15).is_some_and(|arrow| arrow == "<-" || arrow == "->")),
        "{printed}"
    );
}
