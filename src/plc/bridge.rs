//! The native protocol of `firmware-bridge` on a serial port: [`firmware_bridge::host::HostSession`] driven by the link's thread.
//!
//! Everything that decides (handshake, numbers, repeats, watchdog, deadlines) is in the session, which is pure and shared with the board. This
//! module translates between it and the pipeline's words, and says in the log what somebody on the line must know.

use crate::config::{BridgeConfig, Parity};
use crate::frame::PartId;
use crate::plc::driver::{Io, Machine, Tap};
use crate::plc::port::{OpenPort, PortSettings, SerialOpener};
use crate::plc::stats::{LinkStats, add};
use crate::plc::{
    BoardCounters, BoardRequest, BoardState, BoardStatus, HostState, LinkHandle, LinkState, PlcCommand, PlcError, PlcEvent, RequestStatus,
    driver,
};
use crate::source::Trigger;
use crate::verdict::{Decision, Reason, Verdict};
use firmware_bridge::host::{HostConfig, HostEvent, HostSession, Link};
use firmware_bridge::parameters::Expected;
use firmware_bridge::wire::{self, FaultCode};
use std::hash::{BuildHasher, Hasher};
use std::sync::atomic::Ordering;

/// A port that is open without an answer for this long is worth a line in the log: thirty hellos, and longer than any board takes to boot.
const SILENCE_NS: u64 = 3_000_000_000;
/// Verdicts whose acknowledgement is awaited; the board keeps no more parts under way.
const IN_FLIGHT: usize = 64;

/// Start the link. A port that is not there yet is no error: it is tried again with back-off.
///
/// # Errors
/// When the configuration cannot work, or the system has no thread or file descriptor left.
pub fn spawn(config: &BridgeConfig) -> Result<LinkHandle, PlcError> {
    spawn_with(config, Box::new(SerialOpener::new(port_settings(config))), None)
}

/// [`spawn`] on a port made by `opener`, with everything that crosses it shown to `tap`.
///
/// # Errors
/// As [`spawn`].
pub fn spawn_with(config: &BridgeConfig, opener: Box<dyn OpenPort>, tap: Option<Tap>) -> Result<LinkHandle, PlcError> {
    let port = config.port.display().to_string();
    let bad = |why: String| PlcError::Config { port: port.clone(), why };
    if !(10..=60_000).contains(&config.deadline_ms) {
        return Err(bad(format!("deadline_ms is {}, must be 10 to 60000", config.deadline_ms)));
    }
    if !(20..=10_000).contains(&config.watchdog_ms) {
        return Err(bad(format!("watchdog_ms is {}, must be 20 to 10000", config.watchdog_ms)));
    }
    if config.baud == 0 {
        return Err(bad("baud is 0; boards use 115200".into()));
    }
    driver::spawn(opener, Box::new(Bridge::new(config, crate::frame::now_ns())), tap)
        .map_err(|error| bad(format!("cannot start its thread: {error}")))
}

/// How the port of a bridge is set up: raw 8N1.
pub fn port_settings(config: &BridgeConfig) -> PortSettings {
    PortSettings { device: config.port.clone(), baud: config.baud, parity: Parity::None, stop_bits: 1 }
}

/// The session and what the pipeline needs beside it.
struct Bridge {
    session: HostSession,
    book: Book,
}

/// What the session's events are written into.
struct Book {
    port: String,
    /// Part and moment of the verdict, by part number modulo [`IN_FLIGHT`], for the latency to the acknowledgement.
    decided: [Option<(u32, u64)>; IN_FLIGHT],
    /// When the port was opened, until somebody answers or the silence was logged.
    silent_since_ns: Option<u64>,
}

fn micros(now_ns: u64) -> u64 {
    now_ns / 1000
}

impl Bridge {
    fn new(config: &BridgeConfig, now_ns: u64) -> Self {
        let host = HostConfig {
            codename: config.codename,
            // The board's word is taken on its mechanics (safe state, gate); what the host's own timing rests on must agree.
            expected: Expected { deadline_ms: config.deadline_ms, watchdog_ms: config.watchdog_ms, safe_state: None, gate: None },
            build: build_number(env!("CARGO_PKG_VERSION")),
            versions: wire::VERSIONS,
        };
        // The standard library seeds each `RandomState` from the system's randomness: a nonce that no earlier run had.
        let nonce_seed = std::collections::hash_map::RandomState::new().build_hasher().finish();
        let book = Book { port: config.port.display().to_string(), decided: [None; IN_FLIGHT], silent_since_ns: None };
        Self { session: HostSession::new(host, nonce_seed, micros(now_ns)), book }
    }

    /// Move what the session has to say to the port's queue.
    fn pump(&mut self, io: &mut Io<'_>) {
        let n = io.tx.push(self.session.output());
        self.session.consume(n);
        let counters = self.session.counters();
        io.stats.counts().bad_frames.store(u64::from(counters.bad_frames), Ordering::Relaxed);
        io.stats.counts().repeats.store(u64::from(counters.repeats), Ordering::Relaxed);
    }
}

impl Machine for Bridge {
    fn opened(&mut self, now_ns: u64, io: &mut Io<'_>) {
        self.session.restart(micros(now_ns));
        self.book.decided = [None; IN_FLIGHT];
        self.book.silent_since_ns = Some(now_ns);
        let Self { session, book } = self;
        session.poll(micros(now_ns), &mut |event| book.note(event, now_ns, io));
        self.pump(io);
    }

    fn closed(&mut self) {
        self.book.silent_since_ns = None;
    }

    fn verdict(&mut self, part: PartId, verdict: &Verdict, decided_ns: u64, now_ns: u64, io: &mut Io<'_>) -> bool {
        self.pump(io);
        let before = self.session.output().len();
        let (decision, reason) = (decision_to_wire(verdict.decision), reason_code(verdict.reason));
        if self.session.verdict(micros(now_ns), part.0, decision, reason, verdict.score).is_err() {
            return false; // link down or a part of an earlier session: the board rejects it
        }
        if let Some(slot) = self.book.decided.get_mut(part.0 as usize % IN_FLIGHT) {
            *slot = Some((part.0, decided_ns));
        }
        let queued = self.session.output().len() > before;
        self.pump(io);
        if queued {
            io.tx.mark_verdict(decided_ns);
        }
        true
    }

    fn request(&mut self, request: BoardRequest, now_ns: u64, io: &mut Io<'_>) {
        if self.session.request(micros(now_ns), request_to_wire(request)).is_err() {
            io.events.put(PlcEvent::Answer { request, status: RequestStatus::NotSent }, io.stats);
        }
        self.pump(io);
    }

    fn host_state(&mut self, state: HostState, now_ns: u64) {
        self.session.set_state(micros(now_ns), host_state_to_wire(state));
    }

    fn received(&mut self, bytes: &[u8], now_ns: u64, io: &mut Io<'_>) {
        let Self { session, book } = self;
        session.on_bytes(micros(now_ns), bytes, &mut |event| book.note(event, now_ns, io));
        self.pump(io);
    }

    fn tick(&mut self, now_ns: u64, io: &mut Io<'_>) -> u64 {
        let Self { session, book } = self;
        let next_us = session.poll(micros(now_ns), &mut |event| book.note(event, now_ns, io));
        book.note_silence(now_ns);
        self.pump(io);
        next_us.saturating_mul(1000)
    }

    fn closing(&mut self, now_ns: u64, io: &mut Io<'_>) {
        self.session.goodbye(micros(now_ns));
        self.pump(io);
    }
}

impl Book {
    fn note(&mut self, event: HostEvent, now_ns: u64, io: &mut Io<'_>) {
        match event {
            HostEvent::Trigger(t) => {
                let deadline_ns = t.deadline_us.saturating_mul(1000);
                let trigger = Trigger { part: PartId(t.part), received_ns: now_ns, deadline_ns, encoder_ticks: t.encoder };
                io.events.put(PlcEvent::Trigger(trigger), io.stats);
            }
            HostEvent::Acknowledged { part, status, .. } => {
                let decided = self.take_decided(part);
                if status == wire::Status::Taken {
                    if let Some(decided_ns) = decided {
                        io.stats.verdict_to_ack(now_ns.saturating_sub(decided_ns));
                    }
                    io.events.put(PlcEvent::Acknowledged { part: PartId(part), received_ns: now_ns }, io.stats);
                } else {
                    add(&io.stats.counts().late, 1);
                }
            }
            HostEvent::Unacknowledged { part } => {
                self.take_decided(part);
                add(&io.stats.counts().late, 1);
            }
            HostEvent::Link(link) => self.note_link(link, now_ns, io),
            HostEvent::Board { state, faults } => {
                let status = BoardStatus { state: board_state_from_wire(state), faults };
                if status.state == BoardState::Safe {
                    log::error!(
                        "PLC link {}: the board is in its safe state ({}); it rejects or stops until somebody clears it",
                        self.port,
                        fault_names(faults)
                    );
                }
                io.stats.note_board(status);
                io.events.put(PlcEvent::Board(status), io.stats);
            }
            HostEvent::Fault { code, detail } => {
                log::error!("PLC link {}: board fault: {} (detail {detail})", self.port, fault_name(code));
            }
            HostEvent::Counters(c) => {
                let counters = BoardCounters {
                    parts: c.parts,
                    accepted: c.accepted,
                    rejected: c.rejected,
                    missed: c.missed,
                    bad_frames: c.bad_frames,
                    leaked: c.leaked,
                };
                io.events.put(PlcEvent::Counters(counters), io.stats);
            }
            HostEvent::Command(command) => io.events.put(PlcEvent::Command(command_from_wire(command)), io.stats),
            HostEvent::Answer { request, status } => {
                let status = match status {
                    wire::Status::Taken => RequestStatus::Done,
                    wire::Status::TooLate | wire::Status::UnknownPart | wire::Status::Refused => RequestStatus::Refused,
                };
                io.events.put(PlcEvent::Answer { request: request_from_wire(request), status }, io.stats);
            }
        }
    }

    fn note_link(&mut self, link: Link, now_ns: u64, io: &mut Io<'_>) {
        match link {
            Link::Connecting => io.events.link(LinkState::Connecting),
            Link::Up(p) => {
                self.silent_since_ns = None;
                log::info!(
                    "PLC link {}: up; deadline {} ms, watchdog {} ms, safe state {:?}, gate {:?}",
                    self.port,
                    p.deadline_ms,
                    p.watchdog_ms,
                    p.safe_state,
                    p.gate
                );
                io.events.link(LinkState::Up);
            }
            Link::Lost => {
                log::warn!("PLC link {}: the board has gone silent; greeting it again", self.port);
                self.silent_since_ns = Some(now_ns);
                self.decided = [None; IN_FLIGHT];
                io.events.link(LinkState::Down);
            }
            Link::Refused(mismatch) => {
                self.silent_since_ns = None;
                log::error!("PLC link {}: refused, parameters do not agree: {mismatch}", self.port);
                io.events.link(LinkState::Refused);
            }
        }
    }

    /// One line when the port is open and nobody answers.
    fn note_silence(&mut self, now_ns: u64) {
        if self.silent_since_ns.is_some_and(|since| now_ns.saturating_sub(since) > SILENCE_NS) {
            self.silent_since_ns = None;
            log::warn!("PLC link {}: the port is open but no board answers; check its power, the cable and the baud rate", self.port);
        }
    }

    fn take_decided(&mut self, part: u32) -> Option<u64> {
        let slot = self.decided.get_mut(part as usize % IN_FLIGHT)?;
        let (_, decided_ns) = slot.take_if(|(of, _)| *of == part)?;
        Some(decided_ns)
    }
}

/// `1.2.3` -> `major << 16 | minor << 8 | patch`, as the protocol has it.
fn build_number(version: &str) -> u32 {
    version.split('.').map(|n| n.parse::<u32>().unwrap_or(0) & 0xff).take(3).fold(0, |all, n| all << 8 | n)
}

fn decision_to_wire(decision: Decision) -> wire::Decision {
    match decision {
        Decision::Accept => wire::Decision::Accept,
        Decision::Reject => wire::Decision::Reject,
        Decision::Unknown => wire::Decision::Unknown,
        Decision::Fault => wire::Decision::Fault,
    }
}

/// The number that displays at the board show for a reason (PROTOCOL.md, "Reasons").
pub(crate) fn reason_code(reason: Reason) -> u8 {
    match reason {
        Reason::Normal => 0,
        Reason::Anomalous => 1,
        Reason::NotFinite => 2,
        Reason::DeadlineMissed => 3,
        Reason::NoFrame => 4,
        Reason::BadFrame => 5,
        Reason::ModelError => 6,
        Reason::Stopped => 7,
        Reason::LinkDown => 8,
    }
}

fn host_state_to_wire(state: HostState) -> wire::HostState {
    match state {
        HostState::Starting => wire::HostState::Starting,
        HostState::Running => wire::HostState::Running,
        HostState::Stopped => wire::HostState::Stopped,
        HostState::CameraFault => wire::HostState::CameraFault,
        HostState::InternalFault => wire::HostState::InternalFault,
    }
}

fn board_state_from_wire(state: wire::BoardState) -> BoardState {
    match state {
        wire::BoardState::NotReady => BoardState::NotReady,
        wire::BoardState::Running => BoardState::Running,
        wire::BoardState::Safe => BoardState::Safe,
    }
}

fn command_from_wire(command: wire::Command) -> PlcCommand {
    match command {
        wire::Command::Start => PlcCommand::Start,
        wire::Command::Stop => PlcCommand::Stop,
        wire::Command::Pause => PlcCommand::Pause,
        wire::Command::Recipe(recipe) => PlcCommand::Recipe(recipe),
        wire::Command::GoldenCheck => PlcCommand::GoldenCheck,
    }
}

fn request_to_wire(request: BoardRequest) -> wire::Request {
    match request {
        BoardRequest::Clear => wire::Request::Clear,
        BoardRequest::Reject { duration_ms } => wire::Request::Exercise { output: wire::Output::Reject, duration_ms },
        BoardRequest::LineStop { duration_ms } => wire::Request::Exercise { output: wire::Output::LineStop, duration_ms },
        BoardRequest::Led { duration_ms } => wire::Request::Exercise { output: wire::Output::Led, duration_ms },
    }
}

fn request_from_wire(request: wire::Request) -> BoardRequest {
    match request {
        wire::Request::Clear => BoardRequest::Clear,
        wire::Request::Exercise { output: wire::Output::Reject, duration_ms } => BoardRequest::Reject { duration_ms },
        wire::Request::Exercise { output: wire::Output::LineStop, duration_ms } => BoardRequest::LineStop { duration_ms },
        wire::Request::Exercise { output: wire::Output::Led, duration_ms } => BoardRequest::Led { duration_ms },
    }
}

fn fault_name(code: FaultCode) -> &'static str {
    match code {
        FaultCode::HostDead => "no sign of life from the inspector",
        FaultCode::TooManyParts => "more parts between sensor and gate than the board can track",
        FaultCode::PolledTooLate => "a part to be rejected passed the gate: the firmware was late",
        FaultCode::EncoderDead => "parts pass and the encoder does not move",
    }
}

/// The fault bits of a board in words.
pub fn fault_names(faults: u16) -> String {
    let names: Vec<_> = FaultCode::ALL.into_iter().filter(|code| faults & code.bit() != 0).map(fault_name).collect();
    if names.is_empty() { "no fault".into() } else { names.join("; ") }
}

impl LinkStats {
    fn note_board(&self, status: BoardStatus) {
        self.counts().board_safe.store(u64::from(status.state == BoardState::Safe), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::now_ns;
    use crate::plc::ToPlc;
    use crate::plc::port::fake::Fake;
    use crate::verdict;
    use firmware_bridge::board::{Board, BoardConfig, BoardEvent};
    use std::sync::atomic::AtomicBool;
    use std::sync::{Arc, Mutex};
    use std::time::{Duration, Instant};

    /// A board on the far end of the fake port, polled every millisecond on a thread of its own.
    struct FarBoard {
        board: Arc<Mutex<Board>>,
        seen: Arc<Mutex<Vec<BoardEvent>>>,
        mute: Arc<AtomicBool>,
        over: Arc<AtomicBool>,
        thread: Option<std::thread::JoinHandle<()>>,
    }

    impl FarBoard {
        fn start(fake: &Fake, config: BoardConfig) -> Self {
            let board = Arc::new(Mutex::new(Board::new(config, 99, micros(now_ns())).unwrap()));
            let (seen, mute, over) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
            let (b, s, m, o, fake) = (board.clone(), seen.clone(), mute.clone(), over.clone(), fake.clone());
            let thread = std::thread::spawn(move || {
                while !o.load(Ordering::Relaxed) {
                    let now = micros(now_ns());
                    let mut board = b.lock().unwrap();
                    let said = std::mem::take(&mut fake.line().outgoing);
                    if !m.load(Ordering::Relaxed) {
                        board.on_bytes(now, &said, &mut |event| s.lock().unwrap().push(event));
                    }
                    board.poll(now, 0, &mut |event| s.lock().unwrap().push(event));
                    let answer = board.output().to_vec();
                    board.consume(answer.len());
                    drop(board);
                    if !answer.is_empty() && !m.load(Ordering::Relaxed) {
                        fake.arrive(Ok(answer));
                    }
                    std::thread::sleep(Duration::from_millis(1));
                }
            });
            Self { board, seen, mute, over, thread: Some(thread) }
        }

        fn trigger(&self) -> PartId {
            PartId(self.board.lock().unwrap().on_trigger(micros(now_ns()), 0))
        }
    }

    impl Drop for FarBoard {
        fn drop(&mut self) {
            self.over.store(true, Ordering::Relaxed);
            if let Some(thread) = self.thread.take() {
                let _ = thread.join();
            }
        }
    }

    /// Generous, for a loaded machine: the tests check what happens, not how fast.
    const DEADLINE_MS: u32 = 20_000;
    const WATCHDOG_MS: u32 = 5_000;

    fn config() -> BridgeConfig {
        BridgeConfig { port: "fake".into(), baud: 115_200, codename: 7, deadline_ms: DEADLINE_MS, watchdog_ms: WATCHDOG_MS }
    }

    fn board_config() -> BoardConfig {
        let mut board = BoardConfig { codename: 7, ..BoardConfig::default() };
        board.parameters.deadline_ms = DEADLINE_MS;
        board.parameters.watchdog_ms = WATCHDOG_MS;
        // The gate is beyond the deadline, so that nothing is decided before.
        board.parameters.gate.distance = (DEADLINE_MS + 1_000) * 1_000;
        board
    }

    fn wait_for<T>(handle: &LinkHandle, what: &str, mut wanted: impl FnMut(&PlcEvent) -> Option<T>) -> T {
        let start = Instant::now();
        loop {
            assert!(start.elapsed() < Duration::from_secs(60), "timed out: {what}");
            if let Ok(event) = handle.events.recv_timeout(Duration::from_millis(100))
                && let Some(found) = wanted(&event)
            {
                return found;
            }
        }
    }

    fn wait_link(handle: &LinkHandle, state: LinkState) {
        wait_for(handle, &format!("{state:?}"), |event| (*event == PlcEvent::Link(state)).then_some(()));
    }

    #[test]
    fn trigger_verdict_acknowledgement() {
        let fake = Fake::default();
        let far = FarBoard::start(&fake, board_config());
        let handle = spawn_with(&config(), Box::new(fake), None).unwrap();
        handle.to_plc.try_send(ToPlc::HostState(HostState::Running)).unwrap();
        wait_link(&handle, LinkState::Up);
        wait_for(&handle, "board running", |event| {
            matches!(event, PlcEvent::Board(BoardStatus { state: BoardState::Running, .. })).then_some(())
        });
        let sent = far.trigger();
        let trigger = wait_for(&handle, "trigger", |event| if let PlcEvent::Trigger(t) = event { Some(*t) } else { None });
        assert_eq!(trigger.part, sent);
        assert!(trigger.deadline_ns > trigger.received_ns, "{trigger:?}");
        assert!(trigger.deadline_ns <= now_ns() + u64::from(DEADLINE_MS) * 1_000_000, "{trigger:?}");
        let verdict = verdict::without_score(verdict::Reason::BadFrame);
        handle.to_plc.try_send(ToPlc::Verdict { part: sent, verdict, decided_ns: now_ns() }).unwrap();
        let acknowledged =
            wait_for(&handle, "ack", |event| if let PlcEvent::Acknowledged { part, .. } = event { Some(*part) } else { None });
        assert_eq!(acknowledged, sent);
        let summary = handle.stats.summary();
        assert_eq!((summary.verdicts_sent, summary.acknowledged, summary.verdicts_undelivered, summary.late), (1, 1, 0, 0));
        assert_eq!(summary.verdict_to_ack_us.count, 1);
        // A part that the board never announced is refused on this side.
        handle.to_plc.try_send(ToPlc::Verdict { part: PartId(sent.0 + 1000), verdict, decided_ns: now_ns() }).unwrap();
        let start = Instant::now();
        while handle.stats.summary().verdicts_undelivered == 0 {
            assert!(start.elapsed() < Duration::from_secs(20));
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn commands_arrive_and_outputs_are_exercised_only_while_stopped() {
        let fake = Fake::default();
        let far = FarBoard::start(&fake, board_config());
        let handle = spawn_with(&config(), Box::new(fake), None).unwrap();
        handle.to_plc.try_send(ToPlc::HostState(HostState::Running)).unwrap();
        wait_link(&handle, LinkState::Up);
        for (wire, ours) in [
            (wire::Command::Start, PlcCommand::Start),
            (wire::Command::Pause, PlcCommand::Pause),
            (wire::Command::Stop, PlcCommand::Stop),
            (wire::Command::Recipe(513), PlcCommand::Recipe(513)),
            (wire::Command::GoldenCheck, PlcCommand::GoldenCheck),
        ] {
            let start = Instant::now();
            while !far.board.lock().unwrap().command(micros(now_ns()), wire) {
                assert!(start.elapsed() < Duration::from_secs(20), "the board takes no command");
                std::thread::sleep(Duration::from_millis(1));
            }
            let command = wait_for(&handle, "command", |event| if let PlcEvent::Command(c) = event { Some(*c) } else { None });
            assert_eq!(command, ours);
        }
        let request = BoardRequest::Reject { duration_ms: 100 };
        let answer = |handle: &LinkHandle| {
            wait_for(handle, "answer", |event| if let PlcEvent::Answer { status, .. } = event { Some(*status) } else { None })
        };
        handle.to_plc.try_send(ToPlc::Request(request)).unwrap();
        assert_eq!(answer(&handle), RequestStatus::Refused, "while running");
        handle.to_plc.try_send(ToPlc::HostState(HostState::Stopped)).unwrap();
        std::thread::sleep(Duration::from_millis(200)); // the heartbeat that says so goes out at once; the board polls each millisecond
        let start = Instant::now();
        loop {
            handle.to_plc.try_send(ToPlc::Request(request)).unwrap();
            if answer(&handle) == RequestStatus::Done {
                break;
            }
            assert!(start.elapsed() < Duration::from_secs(20), "still refused while stopped");
        }
    }

    #[test]
    fn other_parameters_are_refused_and_the_pipeline_knows() {
        for change in [|c: &mut BoardConfig| c.parameters.deadline_ms += 1, |c: &mut BoardConfig| c.codename += 1] {
            let fake = Fake::default();
            let mut board = board_config();
            change(&mut board);
            let _far = FarBoard::start(&fake, board);
            let handle = spawn_with(&config(), Box::new(fake), None).unwrap();
            wait_link(&handle, LinkState::Refused);
            handle.to_plc.try_send(ToPlc::Request(BoardRequest::Clear)).unwrap();
            let status =
                wait_for(&handle, "answer", |event| if let PlcEvent::Answer { status, .. } = event { Some(*status) } else { None });
            assert_eq!(status, RequestStatus::NotSent);
        }
    }

    #[test]
    fn a_silent_board_takes_the_link_down_and_must_be_cleared_after() {
        let fake = Fake::default();
        let mut board = board_config();
        board.parameters.watchdog_ms = 1_000;
        let far = FarBoard::start(&fake, board);
        let handle = spawn_with(&BridgeConfig { watchdog_ms: 1_000, ..config() }, Box::new(fake), None).unwrap();
        wait_link(&handle, LinkState::Up);
        far.mute.store(true, Ordering::Relaxed);
        wait_link(&handle, LinkState::Down);
        let start = Instant::now();
        while far.board.lock().unwrap().state() != wire::BoardState::Safe {
            assert!(start.elapsed() < Duration::from_secs(20));
            std::thread::sleep(Duration::from_millis(5));
        }
        far.mute.store(false, Ordering::Relaxed);
        wait_link(&handle, LinkState::Up);
        wait_for(&handle, "safe", |event| matches!(event, PlcEvent::Board(BoardStatus { state: BoardState::Safe, .. })).then_some(()));
        handle.to_plc.try_send(ToPlc::Request(BoardRequest::Clear)).unwrap();
        wait_for(&handle, "running", |event| {
            matches!(event, PlcEvent::Board(BoardStatus { state: BoardState::Running, .. })).then_some(())
        });
        assert!(!far.seen.lock().unwrap().is_empty());
    }

    #[test]
    fn versions_become_numbers() {
        assert_eq!(build_number("1.2.3"), 0x0001_0203);
        assert_eq!(build_number("0.1.0-beta"), 0x0000_0100);
        assert_eq!(build_number("junk"), 0);
    }
}
