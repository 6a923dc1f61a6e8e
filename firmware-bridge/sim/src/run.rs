//! The process: pseudo-terminal, clock, stdin, stdout around board, conveyor and injectors.
//!
//! Time goes on event by event (part at the sensor, part at the gate, the board's wake time) up to the real clock, so that a busy machine that
//! wakes the process late does not make the board's firmware late: only bytes come late then, as over a slow line.

use crate::config::SimConfig;
use crate::conveyor::Conveyor;
use crate::faults::Injector;
use crate::{SimError, conveyor::OnBelt};
use firmware_bridge::board::{Board, BoardEvent, Outputs};
use firmware_bridge::schedule::{AtGate, Fate, MAX_PARTS};
use firmware_bridge::wire::{BoardState, Command, Decision};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fd::{AsFd, OwnedFd};
use rustix::pty::OpenptFlags;
use serde_json::json;
use std::collections::{HashMap, HashSet};
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// Longest sleep: a signal that falls between the check and the sleep is noticed after it.
const MAX_SLEEP_US: u64 = 100_000;
/// `flat` leaves this many of the board's places free, so that it never runs into the board's table limit.
const SPARE_PLACES: usize = 4;
/// Longest line on stdin.
const MAX_ORDER: usize = 256;

/// An order on stdin.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Order {
    /// `pace HZ`: a part each 1/HZ s.
    Pace(f64),
    /// `flat K`: the next part when fewer than K have no verdict.
    Flat(usize),
    /// `stop`: no more parts.
    Stop,
    /// `quit`: print the counters and end.
    Quit,
    /// `clear`: the clear switch at the board.
    Clear,
    /// `start`, `halt`, `pause`, `recipe N`, `golden`: what a PLC would command.
    Command(Command),
}

impl Order {
    /// Read one line.
    ///
    /// # Errors
    /// Says what is accepted.
    pub fn parse(line: &str) -> Result<Self, String> {
        let mut words = line.split_whitespace();
        let (verb, argument) = (words.next().unwrap_or(""), words.next());
        let wrong =
            || format!("order {line:?} not understood: pace HZ | flat K | stop | quit | clear | start | halt | pause | recipe N | golden");
        if words.next().is_some() {
            return Err(wrong());
        }
        match (verb, argument) {
            ("pace", Some(hz)) => match hz.parse::<f64>() {
                Ok(hz) if hz > 0.0 && hz <= 10_000.0 => Ok(Self::Pace(hz)),
                _ => Err(format!("pace {hz}: allowed is above 0 to 10000 parts per second")),
            },
            ("flat", Some(k)) => match k.parse::<usize>() {
                Ok(k) if (1..=MAX_PARTS).contains(&k) => Ok(Self::Flat(k)),
                _ => Err(format!("flat {k}: allowed is 1 to {MAX_PARTS} parts")),
            },
            ("stop", None) => Ok(Self::Stop),
            ("quit", None) => Ok(Self::Quit),
            ("clear", None) => Ok(Self::Clear),
            ("start", None) => Ok(Self::Command(Command::Start)),
            ("halt", None) => Ok(Self::Command(Command::Stop)),
            ("pause", None) => Ok(Self::Command(Command::Pause)),
            ("golden", None) => Ok(Self::Command(Command::GoldenCheck)),
            ("recipe", Some(n)) => n.parse().map(|n| Self::Command(Command::Recipe(n))).map_err(|_| wrong()),
            _ => Err(wrong()),
        }
    }
}

/// When parts come.
#[derive(Clone, Copy, Debug)]
enum Feed {
    None,
    Pace { period_us: f64, next_us: f64 },
    Flat { k: usize, next_us: u64 },
}

/// What is known of a part until it is printed.
#[derive(Default)]
struct Passage {
    /// The conveyor's witness: the part and whether the actuator was on.
    witness: Option<(OnBelt, bool, u64)>,
    /// The board's account.
    account: Option<AtGate>,
}

/// Board, belt and bookkeeping; knows simulated time only.
struct Line {
    board: Board,
    belt: Conveyor,
    outputs: Outputs,
    feed: Feed,
    /// Parts whose fate is open, for `flat`.
    undecided: HashSet<u32>,
    /// In `flat` mode parts are at least this far apart, so that the reject of one never takes its neighbour with it.
    spacing_us: u64,
    passages: HashMap<u32, Passage>,
    /// Parts that physically passed with the actuator off and no accept verdict.
    leaks: u64,
    lines: Vec<String>,
    host_died: bool,
    /// How far time has come: it never goes back, though `flat` may find a place free that it has waited for since.
    passed_us: u64,
}

impl Line {
    fn new(config: &SimConfig, now: u64, nonce_seed: u64) -> Result<Self, SimError> {
        let board_config = config.board()?;
        let way_us = u64::from(config.gate_ms + config.pulse_ms) * 1000;
        // The board holds its actuator until what may lie on the belt at its start is past the gate. This belt is empty: start earlier.
        let born = now.saturating_sub(way_us);
        let mut belt = Conveyor::new(born, u64::from(config.gate_ms) * 1000, config.encoder_hz);
        let mut board = Board::new(board_config, nonce_seed, born).map_err(|error| SimError::Config(error.to_string()))?;
        board.poll(born, belt.encoder(), &mut |_| {});
        belt.advance(now);
        let outputs = board.poll(now, belt.encoder(), &mut |_| {});
        belt.set_moving(!outputs.line_stop);
        let feed = if config.pace_hz > 0.0 { Feed::Pace { period_us: 1e6 / config.pace_hz, next_us: now as f64 } } else { Feed::None };
        let spacing_us = u64::from(config.pulse_ms + config.merge_gap_ms) * 1000 + 500;
        Ok(Self {
            spacing_us,
            board,
            belt,
            outputs,
            feed,
            undecided: HashSet::new(),
            passages: HashMap::new(),
            leaks: 0,
            lines: Vec::new(),
            host_died: false,
            passed_us: now,
        })
    }

    /// The next moment at which something happens by itself.
    fn next_event(&self) -> u64 {
        let feed = match self.feed {
            _ if !self.belt.moving() => u64::MAX,
            Feed::None => u64::MAX,
            Feed::Pace { next_us, .. } => next_us as u64,
            Feed::Flat { k, next_us } if self.undecided.len() < k && self.board.in_flight() + SPARE_PLACES < MAX_PARTS => next_us,
            Feed::Flat { .. } => u64::MAX,
        };
        feed.min(self.outputs.wake_us).min(self.belt.next_crossing().unwrap_or(u64::MAX))
    }

    /// Let time pass up to `now`.
    fn advance(&mut self, now: u64) {
        let mut last = self.passed_us;
        loop {
            let at = self.next_event();
            if at > now {
                break;
            }
            // The board may ask to be polled at once; time still goes on.
            let at = at.max(last + 1).min(now);
            self.step(at);
            if last >= now {
                break;
            }
            last = at;
        }
        self.step(now);
        self.passed_us = self.passed_us.max(now);
    }

    /// Everything that happens at one moment.
    fn step(&mut self, at: u64) {
        self.belt.advance(at);
        while let Some(on_belt) = self.belt.cross() {
            self.passages.entry(on_belt.part).or_default().witness = Some((on_belt, self.outputs.reject, at));
            self.report(on_belt.part);
        }
        if let (false, Feed::Pace { next_us, period_us }) = (self.belt.moving(), &mut self.feed) {
            // Nothing comes to a standing belt, nothing is made up for, and two parts are never at the same place.
            *next_us = next_us.max(at as f64 + *period_us);
        }
        let due = self.belt.moving()
            && match &mut self.feed {
                Feed::None => false,
                Feed::Pace { period_us, next_us } => {
                    let due = at as f64 >= *next_us;
                    if due {
                        *next_us += *period_us;
                    }
                    due
                }
                Feed::Flat { k, next_us } => {
                    let due = at >= *next_us && self.undecided.len() < *k && self.board.in_flight() + SPARE_PLACES < MAX_PARTS;
                    if due {
                        *next_us = at + self.spacing_us;
                    }
                    due
                }
            };
        if due {
            let part = self.board.on_trigger(at, self.belt.encoder());
            self.belt.place(part);
            self.undecided.insert(part);
        }
        self.poll(at);
    }

    fn poll(&mut self, at: u64) {
        let mut events = Vec::new();
        self.outputs = self.board.poll(at, self.belt.encoder(), &mut |event| events.push(event));
        self.belt.set_moving(!self.outputs.line_stop);
        events.into_iter().for_each(|event| self.note(event));
    }

    /// Bytes from the host.
    fn on_bytes(&mut self, now: u64, bytes: &[u8]) {
        let mut events = Vec::new();
        self.board.on_bytes(now, bytes, &mut |event| events.push(event));
        events.into_iter().for_each(|event| self.note(event));
        self.poll(now);
    }

    fn note(&mut self, event: BoardEvent) {
        match event {
            BoardEvent::Missed { part } => _ = self.undecided.remove(&part),
            BoardEvent::Verdict { part, decision, status } => {
                log::trace!("verdict {decision:?} on part {part}: {status:?}");
                self.undecided.remove(&part);
            }
            BoardEvent::AtGate(account) => {
                self.undecided.remove(&account.part);
                self.passages.entry(account.part).or_default().account = Some(account);
                self.report(account.part);
            }
            BoardEvent::State(state) => log::info!("board: {state:?}"),
            BoardEvent::Fault { code, detail } => {
                log::warn!("board: fault {code:?}, detail {detail}");
                self.host_died |= code == firmware_bridge::wire::FaultCode::HostDead;
            }
            BoardEvent::Refused(mismatch) => log::warn!("board: session refused: {mismatch}"),
            BoardEvent::Host(state) => log::info!("board: the inspector is {state:?}"),
        }
    }

    /// Print a part once both the conveyor and the board have spoken.
    fn report(&mut self, part: u32) {
        let Some(Passage { witness: Some((on_belt, on, at)), account: Some(account) }) = self.passages.get(&part) else { return };
        let accepted = account.fate == Fate::Accept;
        if !on && !accepted {
            self.leaks += 1;
        }
        let reason = match (on, account.fate) {
            (false, Fate::Accept) | (true, Fate::Reject(_)) => "verdict",
            (false, _) => "leak",
            (true, _) if account.held => match self.board.state() {
                BoardState::NotReady => "no_host",
                _ => "safe_state",
            },
            (true, Fate::Open | Fate::Missed) => "deadline",
            (true, Fate::Accept) => "neighbour",
        };
        let verdict = match account.fate {
            Fate::Accept => Some("accept"),
            Fate::Reject(Decision::Reject) => Some("reject"),
            Fate::Reject(Decision::Fault) => Some("fault"),
            Fate::Reject(_) => Some("unknown"),
            Fate::Open | Fate::Missed => None,
        };
        let line = json!({
            "part": part,
            "gate": if *on { "reject" } else { "accept" },
            "reason": reason,
            "verdict": verdict,
            "trigger_us": on_belt.trigger_us,
            "time_us": at,
        });
        self.lines.push(line.to_string());
        self.passages.remove(&part);
    }

    fn order(&mut self, now: u64, order: Order) {
        match order {
            Order::Pace(hz) => self.feed = Feed::Pace { period_us: 1e6 / hz, next_us: now as f64 },
            Order::Flat(k) => self.feed = Feed::Flat { k, next_us: now },
            Order::Stop | Order::Quit => self.feed = Feed::None,
            Order::Clear => {
                if !self.board.clear(now) {
                    log::warn!("board: clear refused, no agreed host");
                }
            }
            Order::Command(command) => {
                if !self.board.command(now, command) {
                    log::warn!("board: {command:?} lost, too many commands wait for the host");
                }
            }
        }
    }
}

/// Run the simulated board until stdin ends, `quit`, SIGTERM or SIGINT.
///
/// # Errors
/// When the configuration is impossible, or the pseudo-terminal cannot be made or fails.
pub fn run(config: SimConfig) -> Result<(), SimError> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT] {
        signal_hook::flag::register(signal, Arc::clone(&stop)).map_err(|source| SimError::Io { what: "catching signals", source })?;
    }
    let (master, slave, port) = open_pty()?;
    let printer = Printer::new();
    printer.print(json!({ "port": port }).to_string());

    let started = Instant::now();
    // The board's clock starts after the belt has been seen empty.
    let offset = config.clock_start_us.max(u64::from(config.gate_ms + config.pulse_ms) * 1000);
    let clock = || offset + u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
    let nonce_seed = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64)
        ^ (u64::from(std::process::id()) << 40);
    let mut line = Line::new(&config, clock(), nonce_seed)?;
    let (mut to_board, mut to_host) = (Injector::new(&config.faults, 1), Injector::new(&config.faults, 2));
    let mut unsent: Vec<u8> = Vec::new();
    let mut orders = Orders::default();
    let mut quit = false;

    while !quit && !stop.load(Ordering::Relaxed) {
        line.advance(clock());
        read_port(&master, |bytes| to_board.push(clock(), bytes))?;
        // To the very moment at which the bytes are handed over: a machine that took the process off the CPU since the last line must not make
        // the firmware late at the gate.
        let now = clock();
        line.advance(now);
        while let Some(bytes) = to_board.pop(now) {
            line.on_bytes(now, &bytes);
        }
        if std::mem::take(&mut line.host_died) {
            // A host that was killed leaves the terminal locked (TIOCEXCL); pulling a real adapter's plug would free it.
            if let Err(error) = rustix::termios::ioctl_tiocnxcl(&slave) {
                log::debug!("cannot free the terminal: {error}");
            }
        }
        for order in orders.read(&mut quit)? {
            match order {
                Ok(Order::Quit) => quit = true,
                Ok(order) => line.order(now, order),
                Err(message) => log::warn!("{message}"),
            }
        }
        line.advance(clock());
        let now = clock();
        let said = line.board.output();
        if !said.is_empty() {
            to_host.push(now, said);
            line.board.consume(said.len());
        }
        while let Some(bytes) = to_host.pop(now) {
            unsent.extend_from_slice(&bytes);
        }
        write_port(&master, &mut unsent)?;
        line.lines.drain(..).for_each(|text| printer.print(text));
        if !quit {
            let next = [Some(line.next_event()), to_board.next_us(), to_host.next_us()].into_iter().flatten().min().unwrap_or(u64::MAX);
            let sleep_us = next.saturating_sub(clock()).min(MAX_SLEEP_US);
            wait(&master, !unsent.is_empty(), sleep_us)?;
        }
    }

    let c = *line.board.counters();
    let (a, b) = (to_board.injected, to_host.injected);
    printer.print(
        json!({ "counters": {
            "parts": c.parts, "accepted": c.accepted, "rejected": c.rejected, "missed": c.missed, "leaked": c.leaked,
            "bad_frames": c.bad_frames, "lost_frames": c.lost_frames, "safe_entries": c.safe_entries,
            "in_flight": line.board.in_flight(), "leaks": line.leaks,
            "faults": {
                "dropped": a.dropped + b.dropped, "duplicated": a.duplicated + b.duplicated,
                "corrupted": a.corrupted + b.corrupted, "delayed": a.delayed + b.delayed,
            },
        }})
        .to_string(),
    );
    printer.finish();
    Ok(())
}

/// Master, slave (kept open, so that the terminal outlives its host) and the slave's path.
fn open_pty() -> Result<(OwnedFd, OwnedFd, String), SimError> {
    fn step<T>(step: &'static str, result: rustix::io::Result<T>) -> Result<T, SimError> {
        result.map_err(|error| SimError::Pty { step, source: error.into() })
    }
    let master = step("openpt", rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC))?;
    step("grantpt", rustix::pty::grantpt(&master))?;
    step("unlockpt", rustix::pty::unlockpt(&master))?;
    let name = step("ptsname", rustix::pty::ptsname(&master, Vec::new()))?;
    let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY | rustix::fs::OFlags::CLOEXEC;
    let slave = step("open slave", rustix::fs::open(&name, flags, rustix::fs::Mode::empty()))?;
    let mut termios = step("tcgetattr", rustix::termios::tcgetattr(&slave))?;
    termios.make_raw();
    step("tcsetattr", rustix::termios::tcsetattr(&slave, rustix::termios::OptionalActions::Now, &termios))?;
    step("fcntl", rustix::fs::fcntl_setfl(&master, rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NONBLOCK))?;
    Ok((master, slave, name.to_string_lossy().into_owned()))
}

/// Read what there is.
fn read_port(master: &OwnedFd, mut take: impl FnMut(&[u8])) -> Result<(), SimError> {
    let mut buffer = [0u8; 4096];
    loop {
        match rustix::io::read(master, &mut buffer) {
            Ok(0) => return Ok(()),
            Ok(n) => take(&buffer[..n]),
            Err(rustix::io::Errno::AGAIN) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(SimError::Io { what: "reading the pseudo-terminal", source: error.into() }),
        }
    }
}

/// Longest backlog to a host that does not read; a real adapter drops beyond its buffer as well.
const MAX_BACKLOG: usize = 4096;

/// Write what the terminal takes.
fn write_port(master: &OwnedFd, unsent: &mut Vec<u8>) -> Result<(), SimError> {
    while !unsent.is_empty() {
        match rustix::io::write(master, unsent) {
            Ok(n) => drop(unsent.drain(..n)),
            Err(rustix::io::Errno::AGAIN) => {
                if unsent.len() > MAX_BACKLOG {
                    unsent.drain(..unsent.len() - MAX_BACKLOG);
                }
                break;
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(SimError::Io { what: "writing the pseudo-terminal", source: error.into() }),
        }
    }
    Ok(())
}

/// Sleep until bytes, an order or the time.
fn wait(master: &OwnedFd, want_write: bool, sleep_us: u64) -> Result<(), SimError> {
    let flags = if want_write { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
    let stdin = rustix::stdio::stdin();
    let mut fds = [PollFd::from_borrowed_fd(master.as_fd(), flags), PollFd::from_borrowed_fd(stdin, PollFlags::IN)];
    let timeout = Timespec { tv_sec: (sleep_us / 1_000_000) as _, tv_nsec: (sleep_us % 1_000_000 * 1000) as _ };
    match rustix::event::poll(&mut fds, Some(&timeout)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(SimError::Io { what: "waiting", source: error.into() }),
    }
}

/// Lines from stdin, without blocking.
#[derive(Default)]
struct Orders {
    partial: Vec<u8>,
}

impl Orders {
    /// What came; sets `ended` at the end of the input.
    fn read(&mut self, ended: &mut bool) -> Result<Vec<Result<Order, String>>, SimError> {
        let stdin = rustix::stdio::stdin();
        let mut orders = Vec::new();
        loop {
            let mut fds = [PollFd::from_borrowed_fd(stdin, PollFlags::IN)];
            match rustix::event::poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) {
                Ok(0) => break,
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(SimError::Io { what: "waiting for orders", source: error.into() }),
            }
            let mut buffer = [0u8; 1024];
            match rustix::io::read(stdin, &mut buffer) {
                Ok(0) => {
                    *ended = true;
                    break;
                }
                Ok(n) => self.partial.extend_from_slice(&buffer[..n]),
                Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
                Err(error) => return Err(SimError::Io { what: "reading orders", source: error.into() }),
            }
            while let Some(end) = self.partial.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.partial.drain(..=end).collect();
                let line = String::from_utf8_lossy(&line);
                if !line.trim().is_empty() {
                    orders.push(Order::parse(line.trim()));
                }
            }
            if self.partial.len() > MAX_ORDER {
                self.partial.clear();
                orders.push(Err(format!("order longer than {MAX_ORDER} bytes dropped")));
            }
        }
        Ok(orders)
    }
}

/// Writes lines on a thread of its own, so that a reader that does not read never stops the board.
struct Printer {
    lines: std::sync::mpsc::Sender<String>,
    thread: std::thread::JoinHandle<()>,
}

impl Printer {
    fn new() -> Self {
        let (lines, queue) = std::sync::mpsc::channel::<String>();
        let thread = std::thread::spawn(move || {
            let mut out = std::io::stdout().lock();
            for line in queue {
                if let Err(error) = writeln!(out, "{line}").and_then(|()| out.flush()) {
                    log::warn!("nobody reads the simulated board any more: {error}");
                    break;
                }
            }
        });
        Self { lines, thread }
    }

    fn print(&self, line: String) {
        if self.lines.send(line).is_err() {
            log::trace!("stdout is closed");
        }
    }

    fn finish(self) {
        drop(self.lines);
        if self.thread.join().is_err() {
            log::warn!("the printing thread panicked");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `flat` once stamped a part with the time at which it could have come, long before the place for it was free: its deadline was half
    /// gone before the host heard of it.
    #[test]
    fn flat_never_dates_a_part_back() {
        let config = SimConfig { deadline_ms: 200, gate_ms: 300, ..SimConfig::default() };
        let mut now = 1_000_000;
        let mut line = Line::new(&config, now, 1).unwrap();
        line.order(now, Order::Flat(1));
        // Nobody judges the parts, so each is decided by its deadline or at the gate.
        while now < 4_000_000 {
            now += 1000;
            line.advance(now);
        }
        let triggers: Vec<u64> =
            line.lines.iter().filter_map(|l| serde_json::from_str::<serde_json::Value>(l).ok()?.get("trigger_us")?.as_u64()).collect();
        assert!(triggers.len() > 2, "{:?}", line.lines);
        assert!(triggers.windows(2).all(|w| w[1] >= w[0] + 200_000), "{triggers:?}");
    }

    #[test]
    fn orders_say_what_is_accepted() {
        assert_eq!(Order::parse("pace 12.5"), Ok(Order::Pace(12.5)));
        assert_eq!(Order::parse("flat 2"), Ok(Order::Flat(2)));
        assert_eq!(Order::parse("recipe 7"), Ok(Order::Command(Command::Recipe(7))));
        for bad in ["pace", "pace 0", "pace nan", "flat 65", "flat 0", "stop now", "hello", "recipe x", "pace 1 2"] {
            assert!(Order::parse(bad).is_err(), "{bad}");
        }
    }
}
