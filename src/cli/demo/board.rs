//! The simulated reject board as a child process: started, told what to do over its stdin, heard over its stdout.

use anyhow::{Context, bail};
use crossbeam_channel::{Receiver, RecvTimeoutError, bounded};
use serde::Deserialize;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

/// The board prints its port at once; more than this means that it cannot start.
const START_LIMIT: Duration = Duration::from_secs(10);
/// After `quit` the board prints its counters and ends.
const QUIT_LIMIT: Duration = Duration::from_secs(3);
/// Lines from the board that may wait to be read: 64 parts on the belt, many times over.
const LINES: usize = 4096;

/// One part at the gate, as the conveyor saw it.
#[derive(Clone, Debug, Deserialize, PartialEq)]
pub struct AtGate {
    pub part: u32,
    pub gate: Gate,
    /// Why: `verdict`, `deadline`, `safe_state`, `no_host`, `neighbour`, `leak`.
    pub reason: String,
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum Gate {
    Accept,
    Reject,
}

/// The board's own account at its end.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq)]
pub struct Counters {
    pub parts: u32,
    pub accepted: u32,
    pub rejected: u32,
    pub missed: u32,
    /// Parts that got through without an accept verdict: must be zero.
    #[serde(default)]
    pub leaks: u32,
}

/// One line from the board.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(untagged)]
pub enum Line {
    Port { port: PathBuf },
    Counters { counters: Counters },
    AtGate(AtGate),
}

/// The running board.
pub struct Board {
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Receiver<Line>,
    pub port: PathBuf,
}

impl Board {
    /// Start this binary as `cull sim-board` with `args`.
    pub fn start(args: &[String]) -> anyhow::Result<Self> {
        let binary = std::env::current_exe().context("the demo's own binary")?;
        let mut child = Command::new(binary)
            .arg("sim-board")
            .args(args)
            // A group of its own: Ctrl-C is for the inspector, which tells the board to stop in order.
            .process_group(0)
            // Only trouble: it shares the terminal with the verdicts.
            .env("CULL_LOG", "warn")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("the simulated board cannot be started")?;
        let stdin = child.stdin.take();
        let Some(stdout) = child.stdout.take() else { bail!("the simulated board has no output") };
        let (send, lines) = bounded(LINES);
        std::thread::Builder::new().name("board lines".into()).spawn(move || {
            for line in BufReader::new(stdout).lines() {
                let Ok(line) = line else { break };
                match serde_json::from_str(&line) {
                    Ok(line) => {
                        if send.send(line).is_err() {
                            break;
                        }
                    }
                    Err(error) => log::warn!("the simulated board said {line:?}: {error}"),
                }
            }
        })?;
        let mut board = Self { child, stdin, lines, port: PathBuf::new() };
        match board.lines.recv_timeout(START_LIMIT) {
            Ok(Line::Port { port }) => board.port = port,
            Ok(other) => bail!("the simulated board began with {other:?} and not with its port"),
            Err(_) => bail!("the simulated board did not start; try `cull sim-board` by hand"),
        }
        Ok(board)
    }

    /// Give an order, a line.
    pub fn order(&mut self, order: &str) -> anyhow::Result<()> {
        let Some(stdin) = &mut self.stdin else { bail!("the simulated board has been told to quit") };
        writeln!(stdin, "{order}")
            .and_then(|()| stdin.flush())
            .with_context(|| format!("the simulated board does not take the order {order:?}"))
    }

    /// What the board says.
    pub fn lines(&self) -> &Receiver<Line> {
        &self.lines
    }

    /// Tell the board to quit and hear it out: the parts not heard of yet, and its counters.
    pub fn quit(mut self) -> anyhow::Result<(Vec<AtGate>, Counters)> {
        self.order("quit")?;
        self.stdin = None;
        let until = Instant::now() + QUIT_LIMIT;
        let (mut parts, mut counters) = (Vec::new(), None);
        loop {
            match self.lines.recv_deadline(until) {
                Ok(Line::AtGate(part)) => parts.push(part),
                Ok(Line::Counters { counters: c }) => counters = Some(c),
                Ok(Line::Port { .. }) => {}
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => bail!("the simulated board did not end within {} s", QUIT_LIMIT.as_secs()),
            }
        }
        match counters {
            Some(counters) => Ok((parts, counters)),
            None => bail!("the simulated board ended without its counters"),
        }
    }
}

impl Drop for Board {
    fn drop(&mut self) {
        // The end of its input ends the board by itself; kill only what is left of a failure.
        self.stdin = None;
        let until = Instant::now() + QUIT_LIMIT;
        while Instant::now() < until {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        if let Err(error) = self.child.kill().and_then(|()| self.child.wait()) {
            log::warn!("the simulated board could not be ended: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_boards_lines_are_understood() {
        let line = |text| serde_json::from_str::<Line>(text).unwrap();
        assert_eq!(line(r#"{"port":"/dev/pts/3"}"#), Line::Port { port: "/dev/pts/3".into() });
        let at_gate = line(r#"{"part":4,"gate":"reject","reason":"deadline","verdict":null,"trigger_us":1,"time_us":2}"#);
        assert_eq!(at_gate, Line::AtGate(AtGate { part: 4, gate: Gate::Reject, reason: "deadline".into() }));
        let counters = line(r#"{"counters":{"parts":9,"accepted":7,"rejected":2,"missed":1,"leaks":0,"other":5}}"#);
        assert_eq!(counters, Line::Counters { counters: Counters { parts: 9, accepted: 7, rejected: 2, missed: 1, leaks: 0 } });
    }
}
