//! The board's end of the link and the safe state, around the [`schedule`](crate::schedule).
//!
//! A firmware main is a loop that calls [`Board::on_trigger`] at a sensor edge, [`Board::on_bytes`] with what the port brought, and
//! [`Board::poll`] at least when the time it returned has come; sets its pins from the [`Outputs`]; and writes [`Board::output`].
//!
//! ```text
//!            handshake agreed                 fault: host dead, table full, polled too late, encoder dead
//! NotReady ------------------> Running ------------------------------------------------------------> Safe
//!     ^  <------ goodbye -------'                                                                      |
//!     '<------------------ clear (only with an agreed host; then Running) -----------------------------'
//! ```
//! In `NotReady` and `Safe` everything is rejected ([`SafeState::RejectAll`]) or the line is stopped ([`SafeState::StopLine`]).

use crate::Micros;
use crate::cobs::{Cut, Deframer};
use crate::parameters::{Field, Mismatch, OutOfRange, Parameters, SafeState, Unit};
use crate::schedule::{AtGate, Edge, Outcome, Schedule, Step};
use crate::session::{Channel, HANDSHAKE_TIMEOUT_US, Nonces, Outbox, Refusal, age_of, common_version, since};
use crate::wire::{
    self, BOARD, BoardState, Command, Counters, Decision, FaultCode, HOST, Heartbeat, Hello, HostState, Key, Message, Output, Request,
    Status, VERSIONS, WireError, kind,
};

/// Outgoing bytes kept: a heartbeat with counters and twenty triggers.
const OUTBOX: usize = 768;
/// Commands that may wait for the host.
pub const MAX_COMMANDS: usize = 4;
/// How often counters go with the heartbeat.
const COUNTERS_US: Micros = 1_000_000;
/// Half a period of the LED while waiting for a host.
const LED_SLOW_US: Micros = 500_000;
/// Half a period of the LED in the safe state.
const LED_FAST_US: Micros = 100_000;

/// Configuration of a board.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BoardConfig {
    /// Codename of the connection; the host must have the same.
    pub codename: u32,
    /// Everything that is agreed.
    pub parameters: Parameters,
    /// Firmware version: `major << 16 | minor << 8 | patch`.
    pub build: u32,
    /// Versions of the protocol spoken; [`VERSIONS`] but in tests.
    pub versions: (u8, u8),
    /// Number of the first part.
    pub first_part: u32,
}

impl Default for BoardConfig {
    fn default() -> Self {
        Self { codename: 0x6375_6c6c, parameters: Parameters::default(), build: 0x0000_0100, versions: VERSIONS, first_part: 1 }
    }
}

/// What the pins must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outputs {
    /// Reject actuator.
    pub reject: bool,
    /// Line stop.
    pub line_stop: bool,
    /// Status LED: on when running, slow blink without host, fast blink in the safe state.
    pub led: bool,
    /// Poll again by then.
    pub wake_us: Micros,
}

/// What the board has to say to its own surroundings: displays, logs, the simulation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum BoardEvent {
    /// The state changed.
    State(BoardState),
    /// The safe state was entered for this.
    Fault {
        /// Why.
        code: FaultCode,
        /// See [`FaultCode`].
        detail: u32,
    },
    /// A part got no verdict in time.
    Missed {
        /// The part.
        part: u32,
    },
    /// A verdict came.
    Verdict {
        /// The part.
        part: u32,
        /// What to do.
        decision: Decision,
        /// What became of it.
        status: Status,
    },
    /// A part passed the gate.
    AtGate(AtGate),
    /// One side refuses the session.
    Refused(Mismatch),
    /// The inspector's state changed.
    Host(HostState),
}

#[derive(Clone, Copy, Debug)]
struct Candidate {
    host_nonce: u32,
    board_nonce: u32,
    version: u8,
    since: Micros,
}

#[derive(Clone, Copy, Debug)]
struct Session {
    channel: Channel,
    host_nonce: u32,
    host_time: u32,
    host_state: HostState,
    /// Newest request and its answer, for repeats.
    answered: Option<(u32, Status)>,
}

#[derive(Clone, Copy, Debug)]
struct Waiting {
    id: u32,
    command: Command,
    next: Micros,
}

/// The reject board. See the module's documentation for how to drive it.
#[derive(Clone, Debug)]
pub struct Board {
    deframer: Deframer,
    core: Core,
}

#[derive(Clone, Debug)]
struct Core {
    config: BoardConfig,
    nonces: Nonces,
    candidate: Option<Candidate>,
    session: Option<Session>,
    /// Number of the session, from 1.
    epoch: u32,
    /// A moment of our own clock that the host has proved to have heard of; `None` while no host is owed to us (start, goodbye).
    proof: Option<Micros>,
    faults: u16,
    told: BoardState,
    schedule: Schedule,
    next_part: u32,
    /// When heartbeat and counters are due.
    next_heartbeat: Micros,
    next_counters: Micros,
    commands: [Option<Waiting>; MAX_COMMANDS],
    next_command: u32,
    exercise: Option<(Output, Micros)>,
    /// The line-stop output as last set by the state.
    line_stopped: bool,
    counters: Counters,
    outbox: Outbox<OUTBOX>,
}

impl Board {
    /// A board that waits for its host. `nonce_seed` must differ from start to start: a hardware random number, or at least a chip id mixed with
    /// a noisy reading.
    ///
    /// # Errors
    /// When a parameter is out of its range.
    #[inline(never)] // its temporaries must not grow the caller's stack frame on a small board
    pub fn new(config: BoardConfig, nonce_seed: u64, now: Micros) -> Result<Self, OutOfRange> {
        config.parameters.check()?;
        Ok(Self {
            deframer: Deframer::new(),
            core: Core {
                config,
                nonces: Nonces::new(nonce_seed),
                candidate: None,
                session: None,
                epoch: 0,
                proof: None,
                faults: 0,
                told: BoardState::NotReady,
                schedule: Schedule::new(&config.parameters, now),
                next_part: config.first_part,
                next_heartbeat: now,
                next_counters: now,
                commands: [None; MAX_COMMANDS],
                next_command: 1,
                exercise: None,
                line_stopped: false,
                counters: Counters::default(),
                outbox: Outbox::new(),
            },
        })
    }

    /// A part is at the sensor; returns its number. Call [`Board::poll`] afterwards.
    pub fn on_trigger(&mut self, now: Micros, encoder: u32) -> u32 {
        self.core.on_trigger(now, encoder)
    }

    /// A part may have passed the sensor unseen (the firmware's own queue of edges ran over): it counts as one too many. Call [`Board::poll`]
    /// afterwards.
    pub fn untracked_part(&mut self) {
        self.core.schedule.hold_for_untracked();
        self.core.latch(FaultCode::TooManyParts, self.core.next_part, &mut |_| {});
    }

    /// Take bytes from the port, in any portions.
    pub fn on_bytes(&mut self, now: Micros, bytes: &[u8], sink: &mut impl FnMut(BoardEvent)) {
        for &byte in bytes {
            match self.deframer.push(byte) {
                Cut::More => {}
                Cut::Body(body) => self.core.on_body(now, body, sink),
                Cut::Garbage => self.core.bad_frame(),
            }
        }
    }

    /// Do what is due. `encoder` is read as near to `now` as may be (any value in [`Unit::Time`]).
    pub fn poll(&mut self, now: Micros, encoder: u32, sink: &mut impl FnMut(BoardEvent)) -> Outputs {
        self.core.poll(now, encoder, sink)
    }

    /// Bytes for the port.
    pub fn output(&self) -> &[u8] {
        self.core.outbox.bytes()
    }

    /// The port took the first `n` bytes of [`Board::output`].
    pub fn consume(&mut self, n: usize) {
        self.core.outbox.consume(n);
    }

    /// The PLC (or a switch) commands something; repeated to the host until it acknowledges. `false` when [`MAX_COMMANDS`] wait already: the
    /// caller must show that, since the command is lost.
    pub fn command(&mut self, now: Micros, command: Command) -> bool {
        let core = &mut self.core;
        let Some(slot) = core.commands.iter_mut().find(|slot| slot.is_none()) else { return false };
        *slot = Some(Waiting { id: core.next_command, command, next: now });
        core.next_command = core.next_command.wrapping_add(1);
        true
    }

    /// The operator's clear, by a switch at the board. `false` without an agreed host: the safe state stays.
    pub fn clear(&mut self, now: Micros) -> bool {
        self.core.clear(now) == Status::Taken
    }

    /// State of the board.
    pub fn state(&self) -> BoardState {
        self.core.state()
    }

    /// [`FaultCode::bit`]s that are latched.
    pub fn faults(&self) -> u16 {
        self.core.faults
    }

    /// What was counted since the start.
    pub fn counters(&self) -> &Counters {
        &self.core.counters
    }

    /// Parts between sensor and gate.
    pub fn in_flight(&self) -> usize {
        self.core.schedule.in_flight()
    }
}

fn count(counter: &mut u32) {
    *counter = counter.wrapping_add(1);
}

impl Core {
    fn state(&self) -> BoardState {
        if self.faults != 0 {
            BoardState::Safe
        } else if self.session.is_some() {
            BoardState::Running
        } else {
            BoardState::NotReady
        }
    }

    fn bad_frame(&mut self) {
        count(&mut self.counters.bad_frames);
    }

    /// Send in the session; `false` without one or without room.
    fn send(&mut self, message: &Message) -> bool {
        match &mut self.session {
            Some(session) => session.channel.send(&mut self.outbox, BOARD, HOST, message),
            None => false,
        }
    }

    fn latch(&mut self, code: FaultCode, detail: u32, sink: &mut impl FnMut(BoardEvent)) {
        if self.faults & code.bit() != 0 {
            return;
        }
        if self.faults == 0 {
            count(&mut self.counters.safe_entries);
        }
        self.faults |= code.bit();
        self.send(&Message::Fault { code, detail });
        sink(BoardEvent::Fault { code, detail });
    }

    fn clear(&mut self, now: Micros) -> Status {
        if self.session.is_none() {
            return Status::Refused;
        }
        if self.faults & FaultCode::EncoderDead.bit() != 0 {
            // Parts may have moved unseen while the fault stood.
            self.schedule.distrust_positions();
        }
        self.faults = 0;
        self.next_heartbeat = now;
        Status::Taken
    }

    fn on_trigger(&mut self, now: Micros, encoder: u32) -> u32 {
        let part = self.next_part;
        self.next_part = part.wrapping_add(1);
        count(&mut self.counters.parts);
        self.exercise = None;
        let epoch = if self.session.is_some() { self.epoch } else { 0 };
        let fault = match self.schedule.edge(now, encoder, part, epoch) {
            Edge::Tracked => None,
            Edge::NoRoom => {
                // Held at the gate until it is past: rejected, though nobody sees it go by.
                count(&mut self.counters.rejected);
                count(&mut self.counters.missed);
                Some((FaultCode::TooManyParts, part))
            }
            Edge::EncoderDead => {
                self.schedule.distrust_positions();
                Some((FaultCode::EncoderDead, encoder))
            }
        };
        if let Some((code, detail)) = fault {
            self.latch(code, detail, &mut |_| {});
        }
        self.announce(now);
        part
    }

    /// Send the triggers that are due.
    fn announce(&mut self, now: Micros) {
        let repeat_at = now.saturating_add(self.config.parameters.heartbeat_us());
        let Some(session) = &mut self.session else { return };
        for slot in self.schedule.slots_mut() {
            if slot.announce.is_some_and(|due| now >= due) {
                let message = Message::Trigger { part: slot.part, encoder: slot.encoder, time_us: slot.time as u32 };
                if !session.channel.send(&mut self.outbox, BOARD, HOST, &message) {
                    break;
                }
                slot.announce = Some(repeat_at);
            }
        }
    }

    fn on_body(&mut self, now: Micros, body: &[u8], sink: &mut impl FnMut(BoardEvent)) {
        let Some(header) = wire::peek(body).filter(|header| header.source == HOST && header.destination == BOARD) else {
            self.bad_frame();
            return;
        };
        let received = if Message::is_handshake(header.kind) {
            wire::open(body, Key::OPEN, wire::HANDSHAKE_VERSION).map(|(_, message)| (message, 0)).map_err(Refusal::Wire)
        } else if header.kind == kind::AGREE && self.agreed(now, body, sink) {
            return;
        } else {
            match &mut self.session {
                Some(session) => session.channel.receive(body),
                None => Err(Refusal::Wire(WireError::Crc)),
            }
        };
        match received {
            Ok((message, lost)) => {
                self.counters.lost_frames = self.counters.lost_frames.wrapping_add(lost);
                self.on_message(now, message, sink);
            }
            Err(_) => self.bad_frame(),
        }
    }

    /// Whether `body` is the agree of the candidate; if so it becomes the session. Nothing less ends a running session, so that an old hello that
    /// comes late, or noise, cannot.
    fn agreed(&mut self, now: Micros, body: &[u8], sink: &mut impl FnMut(BoardEvent)) -> bool {
        let Some(candidate) = self.candidate.filter(|candidate| since(now, candidate.since) < HANDSHAKE_TIMEOUT_US) else { return false };
        let key =
            Key::session(candidate.version, self.config.codename, candidate.host_nonce, candidate.board_nonce, &self.config.parameters);
        let mut channel = Channel::new(key, candidate.version);
        if channel.receive(body).is_err() {
            return false;
        }
        self.candidate = None;
        self.session =
            Some(Session { channel, host_nonce: candidate.host_nonce, host_time: 0, host_state: HostState::Starting, answered: None });
        self.epoch = self.epoch.wrapping_add(1).max(1);
        self.proof = Some(candidate.since);
        // Parts of an earlier session are not announced again: this host has no picture of them.
        self.schedule.slots_mut().for_each(|slot| slot.announce = None);
        self.commands.iter_mut().flatten().for_each(|waiting| waiting.next = now);
        (self.next_heartbeat, self.next_counters) = (now, now);
        self.tell_state(sink);
        self.heartbeat(now);
        true
    }

    fn on_message(&mut self, now: Micros, message: Message, sink: &mut impl FnMut(BoardEvent)) {
        match message {
            Message::Hello(hello) => self.on_hello(now, hello, sink),
            Message::Refuse { answers, field, ours, theirs } => {
                if self.candidate.is_some_and(|candidate| candidate.board_nonce == answers) {
                    self.candidate = None;
                    sink(BoardEvent::Refused(Mismatch { field, ours: theirs, theirs: ours }));
                }
            }
            // A repeat: our heartbeat got lost.
            Message::Agree => self.next_heartbeat = now,
            Message::Goodbye => {
                self.session = None;
                self.proof = None;
            }
            Message::Verdict { part, decision, .. } => {
                let status = self.schedule.verdict(now, part, decision, self.epoch);
                self.send(&Message::Acknowledge { of: kind::VERDICT, reference: part, status });
                sink(BoardEvent::Verdict { part, decision, status });
            }
            Message::Acknowledge { of: kind::TRIGGER, reference, .. } => {
                if let Some(slot) = self.schedule.slots_mut().find(|slot| slot.part == reference) {
                    slot.announce = None;
                }
            }
            Message::Acknowledge { of: kind::COMMAND, reference, .. } => {
                if let Some(slot) = self.commands.iter_mut().find(|slot| slot.is_some_and(|waiting| waiting.id == reference)) {
                    *slot = None;
                }
            }
            Message::Heartbeat(heartbeat) => self.on_heartbeat(now, heartbeat, sink),
            Message::Request { id, request } => self.on_request(now, id, request),
            // Ours to send, never to receive.
            Message::Acknowledge { .. }
            | Message::Parameters { .. }
            | Message::Trigger { .. }
            | Message::Fault { .. }
            | Message::Command { .. } => self.bad_frame(),
        }
    }

    fn on_hello(&mut self, now: Micros, hello: Hello, sink: &mut impl FnMut(BoardEvent)) {
        if hello.nonce == 0 || hello.answers != 0 || self.session.is_some_and(|session| session.host_nonce == hello.nonce) {
            return; // no hello of a host, or the running session's own, come late
        }
        let (version_min, version_max) = self.config.versions;
        let mismatch = if hello.codename != self.config.codename {
            Some(Mismatch { field: Field::Codename, ours: self.config.codename, theirs: hello.codename })
        } else {
            match common_version(self.config.versions, (hello.version_min, hello.version_max)) {
                Some(_) => None,
                None => Some(Mismatch { field: Field::Version, ours: version_max.into(), theirs: hello.version_max.into() }),
            }
        };
        if let Some(mismatch) = mismatch {
            let Mismatch { field, ours, theirs } = mismatch;
            self.outbox.send_open(BOARD, HOST, &Message::Refuse { answers: hello.nonce, field, ours, theirs });
            sink(BoardEvent::Refused(mismatch));
            return;
        }
        let Some(version) = common_version(self.config.versions, (hello.version_min, hello.version_max)) else { return };
        let candidate = match self.candidate {
            // The same hello again: the same answer.
            Some(candidate) if candidate.host_nonce == hello.nonce && since(now, candidate.since) < HANDSHAKE_TIMEOUT_US => candidate,
            _ => Candidate { host_nonce: hello.nonce, board_nonce: self.nonces.next(), version, since: now },
        };
        self.candidate = Some(candidate);
        let answer = Hello {
            nonce: candidate.board_nonce,
            answers: hello.nonce,
            version_min,
            version_max,
            codename: self.config.codename,
            build: self.config.build,
        };
        self.outbox.send_open(BOARD, HOST, &Message::Hello(answer));
        let parameters = self.config.parameters;
        self.outbox.send_open(
            BOARD,
            HOST,
            &Message::Parameters { host_nonce: hello.nonce, board_nonce: candidate.board_nonce, parameters },
        );
    }

    fn on_heartbeat(&mut self, now: Micros, heartbeat: Heartbeat, sink: &mut impl FnMut(BoardEvent)) {
        let Some(state) = HostState::from_wire(heartbeat.state) else {
            self.bad_frame();
            return;
        };
        let Some(session) = &mut self.session else { return };
        session.host_time = heartbeat.time_us;
        if session.host_state != state {
            session.host_state = state;
            sink(BoardEvent::Host(state));
        }
        let age = age_of(now, heartbeat.echo_us);
        if age <= self.config.parameters.watchdog_us() {
            self.proof = self.proof.max(Some(now.saturating_sub(age)));
        }
    }

    fn on_request(&mut self, now: Micros, id: u32, request: Request) {
        let Some(session) = &self.session else { return };
        let status = match session.answered {
            Some((answered, status)) if answered == id => status,
            _ => match request {
                Request::Clear => self.clear(now),
                Request::Exercise { .. } if session.host_state == HostState::Running || !self.schedule.is_empty() => Status::Refused,
                Request::Exercise { output, duration_ms } => {
                    self.exercise = Some((output, now.saturating_add(Micros::from(duration_ms).saturating_mul(1000))));
                    Status::Taken
                }
            },
        };
        if let Some(session) = &mut self.session {
            session.answered = Some((id, status));
        }
        self.send(&Message::Acknowledge { of: kind::REQUEST, reference: id, status });
    }

    fn tell_state(&mut self, sink: &mut impl FnMut(BoardEvent)) {
        let state = self.state();
        if state != self.told {
            self.told = state;
            sink(BoardEvent::State(state));
        }
    }

    fn heartbeat(&mut self, now: Micros) {
        let Some(session) = &self.session else { return };
        let with_counters = now >= self.next_counters;
        let heartbeat = Heartbeat {
            time_us: now as u32,
            echo_us: session.host_time,
            state: self.state() as u8,
            faults: self.faults,
            in_flight: self.schedule.in_flight() as u8,
            counters: with_counters.then_some(self.counters),
        };
        if self.send(&Message::Heartbeat(heartbeat)) {
            self.next_heartbeat = now.saturating_add(self.config.parameters.heartbeat_us());
            if with_counters {
                self.next_counters = now.saturating_add(COUNTERS_US);
            }
        }
    }

    fn poll(&mut self, now: Micros, encoder: u32, sink: &mut impl FnMut(BoardEvent)) -> Outputs {
        if let Some(proof) = self.proof.filter(|proof| since(now, *proof) >= self.config.parameters.watchdog_us()) {
            self.latch(FaultCode::HostDead, (since(now, proof) / 1000) as u32, sink);
            self.session = None;
            self.proof = None;
        }
        let stop = self.stops_line();
        if self.line_stopped && !stop && self.config.parameters.gate.unit == Unit::Time {
            // The clock ran on while the belt stood: nobody knows where its parts are.
            self.schedule.distrust_positions();
        }
        self.line_stopped = stop;
        if let Some(part) = self.run_schedule(now, encoder, sink) {
            self.latch(FaultCode::PolledTooLate, part, sink);
            // Once more, so that the safe state is at the actuator now and not at the next poll.
            self.run_schedule(now, encoder, sink);
        }
        if self.state() != self.told {
            self.next_heartbeat = now;
            self.tell_state(sink);
        }
        self.announce(now);
        self.send_commands(now);
        if now >= self.next_heartbeat {
            self.heartbeat(now);
        }
        self.outputs(now)
    }

    /// Step the schedule and count; returns a part that leaked.
    fn run_schedule(&mut self, now: Micros, encoder: u32, sink: &mut impl FnMut(BoardEvent)) -> Option<u32> {
        let safe = self.state() != BoardState::Running;
        let hold = (safe && self.config.parameters.safe_state == SafeState::RejectAll) || self.faults & FaultCode::EncoderDead.bit() != 0;
        let mut leaked = None;
        let counters = &mut self.counters;
        self.schedule.step(now, encoder, hold, &mut |step| match step {
            Step::Missed { part } => {
                count(&mut counters.missed);
                sink(BoardEvent::Missed { part });
            }
            Step::AtGate(at_gate) => {
                match at_gate.outcome {
                    Outcome::Accepted => count(&mut counters.accepted),
                    Outcome::Rejected => count(&mut counters.rejected),
                    Outcome::Leaked => {
                        count(&mut counters.leaked);
                        leaked = Some(at_gate.part);
                    }
                }
                sink(BoardEvent::AtGate(at_gate));
            }
        });
        leaked
    }

    fn stops_line(&self) -> bool {
        self.state() != BoardState::Running && self.config.parameters.safe_state == SafeState::StopLine
    }

    fn send_commands(&mut self, now: Micros) {
        let repeat_at = now.saturating_add(self.config.parameters.heartbeat_us());
        // One at a time, in order: the oldest.
        let oldest = self.commands.iter_mut().flatten().min_by_key(|waiting| waiting.id.wrapping_sub(self.next_command));
        let (Some(waiting), Some(session)) = (oldest, &mut self.session) else { return };
        if now >= waiting.next {
            let message = Message::Command { id: waiting.id, command: waiting.command };
            if session.channel.send(&mut self.outbox, BOARD, HOST, &message) {
                waiting.next = repeat_at;
            }
        }
    }

    fn outputs(&mut self, now: Micros) -> Outputs {
        if self.exercise.is_some_and(|(_, until)| now >= until) {
            self.exercise = None;
        }
        let exercised = |output| self.exercise.is_some_and(|(exercised, _)| exercised == output);
        let state = self.state();
        let (half_periods, next_blink) = if state == BoardState::Safe {
            (now / LED_FAST_US, now.saturating_add(LED_FAST_US).saturating_sub(now % LED_FAST_US))
        } else {
            (now / LED_SLOW_US, now.saturating_add(LED_SLOW_US).saturating_sub(now % LED_SLOW_US))
        };
        let led = state == BoardState::Running || half_periods & 1 == 0;
        let line_stop = self.stops_line();
        Outputs {
            reject: self.schedule.is_on() || exercised(Output::Reject),
            line_stop: line_stop || exercised(Output::LineStop),
            led: led || exercised(Output::Led),
            wake_us: self.wake(now, next_blink),
        }
    }

    fn wake(&self, now: Micros, next_blink: Micros) -> Micros {
        let mut wake = self.schedule.wake(now).min(next_blink);
        if self.session.is_some() {
            // A heartbeat that found no room is tried again a little later: a stuck port must not spin the loop.
            wake = wake.min(self.next_heartbeat.max(now.saturating_add(1_000)));
        }
        if let Some(proof) = self.proof {
            wake = wake.min(proof.saturating_add(self.config.parameters.watchdog_us()));
        }
        if let Some((_, until)) = self.exercise {
            wake = wake.min(until);
        }
        wake.max(now)
    }
}
