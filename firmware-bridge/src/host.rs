//! The inspector's end of the link: a pure state machine between a serial port and the pipeline.
//!
//! The owner of the port does, in one thread:
//! 1. [`HostSession::on_bytes`] with whatever was read, 2. [`HostSession::poll`] at least when the time it returned has come,
//! 3. [`HostSession::verdict`] and the like as the pipeline asks, 4. write [`HostSession::output`] and [`HostSession::consume`] what was taken.
//!
//! After re-opening the port: [`HostSession::restart`]. Nothing here blocks, allocates or panics.

use crate::Micros;
use crate::cobs::{Cut, Deframer};
use crate::parameters::{Expected, Field, Mismatch, Parameters};
use crate::session::{Channel, HANDSHAKE_TIMEOUT_US, Nonces, Outbox, Refusal, age_of, common_version, since};
use crate::wire::{
    self, BOARD, BoardState, Command, Counters, Decision, FaultCode, HOST, Heartbeat, Hello, HostState, Key, Message, Request, Status,
    VERSIONS, WireError, kind,
};

/// Verdicts that may wait for their acknowledgement: as many as the board has parts under way.
pub const MAX_WAITING: usize = crate::schedule::MAX_PARTS;
/// Outgoing bytes kept: every waiting verdict (23 bytes) once, with room for the rest.
const OUTBOX: usize = 2048;
/// Pause between two hellos: a round trip with its 110 bytes fits at 19200 baud.
const HELLO_REPEAT_US: Micros = 100_000;
/// Pause before a refused host asks again: somebody must first change a configuration.
const REFUSED_REPEAT_US: Micros = 1_000_000;
/// The estimate of the clock offset gives way by one part in this many, so that it follows crystals that differ by up to 500 ppm.
const CLOCK_LEAK: Micros = 2_000;

/// Configuration of the host's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostConfig {
    /// Codename of the connection; the board must have the same.
    pub codename: u32,
    /// What the board's parameters must be.
    pub expected: Expected,
    /// Software version for the board's displays: `major << 16 | minor << 8 | patch`.
    pub build: u32,
    /// Versions of the protocol spoken; [`VERSIONS`] but in tests.
    pub versions: (u8, u8),
}

impl Default for HostConfig {
    fn default() -> Self {
        Self { codename: 0x6375_6c6c, expected: Expected::default(), build: 0x0000_0100, versions: VERSIONS }
    }
}

/// State of the link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    /// The handshake goes on; nobody answers yet, or it is under way.
    Connecting,
    /// Parameters agreed, board alive.
    Up(Parameters),
    /// Was up, and the board gave no fresh sign of life for the watchdog time. Connecting again.
    Lost,
    /// One side refuses the other's parameters. Tried again once a second, since somebody may mend it.
    Refused(Mismatch),
}

/// A part passed the sensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trigger {
    /// The board's number for the part.
    pub part: u32,
    /// Encoder count at the sensor (wraps).
    pub encoder: u32,
    /// The board's clock at the edge, low 32 bits of microseconds.
    pub board_time_us: u32,
    /// How long ago the edge was when the message arrived, beyond the shortest delay seen of late (clock offset by a leaking minimum).
    pub age_us: u32,
    /// On the clock handed to this session: a verdict given to [`HostSession::verdict`] by then is in time, if the way back is as fast as the
    /// fastest seen. Past it the board has rejected the part.
    pub deadline_us: Micros,
}

/// What the session has to say.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum HostEvent {
    /// A part passed the sensor. Each part comes once in a session.
    Trigger(Trigger),
    /// The board has the verdict (or says why not).
    Acknowledged {
        /// The part.
        part: u32,
        /// [`Status::Taken`]: it counts. [`Status::TooLate`], [`Status::UnknownPart`]: the board rejected the part by itself.
        status: Status,
        /// From [`HostSession::verdict`] to the acknowledgement.
        round_trip_us: Micros,
    },
    /// A verdict was repeated until the deadline and never acknowledged, or the link was lost: the board decides by itself (reject).
    Unacknowledged {
        /// The part.
        part: u32,
    },
    /// The link changed.
    Link(Link),
    /// The board's state or fault bits changed.
    Board {
        /// State.
        state: BoardState,
        /// [`FaultCode::bit`]s.
        faults: u16,
    },
    /// The board entered its safe state.
    Fault {
        /// Why.
        code: FaultCode,
        /// See [`FaultCode`].
        detail: u32,
    },
    /// The board's counters, about once a second.
    Counters(Counters),
    /// The PLC commands something. Each command comes once in a session.
    Command(Command),
    /// The board answered [`HostSession::request`].
    Answer {
        /// What was asked.
        request: Request,
        /// The answer.
        status: Status,
    },
}

/// Why a call did nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostError {
    /// The link is not up.
    LinkDown,
    /// The board never announced this part in this session, or more than 64 parts ago.
    UnknownPart,
    /// The previous request is not answered yet.
    Busy,
}

impl core::fmt::Display for HostError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            Self::LinkDown => "the link to the board is not up",
            Self::UnknownPart => "the board did not announce this part in the running session",
            Self::Busy => "the board has not answered the previous request yet",
        })
    }
}

#[cfg(feature = "std")]
impl std::error::Error for HostError {}

/// What the session counted since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostCounters {
    /// Frames that failed: bad framing, length, CRC or content.
    pub bad_frames: u32,
    /// Frames that came again or late, by their number.
    pub stale_frames: u32,
    /// Frames that never came, by the gaps in the numbers.
    pub lost_frames: u32,
    /// Verdicts sent again.
    pub repeats: u32,
    /// Sessions agreed.
    pub sessions: u32,
    /// Verdicts that had to make room for newer ones before their acknowledgement came.
    pub displaced: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Hello goes out until board hello and parameters have come.
    Greeting,
    /// Agree goes out until the board speaks under the session key.
    Agreeing,
    Up,
    Refused,
}

#[derive(Clone, Copy, Debug)]
struct Waiting {
    part: u32,
    decision: Decision,
    reason: u8,
    score: f32,
    since: Micros,
    next: Micros,
    repeated: bool,
}

#[derive(Clone, Copy, Debug)]
struct Asked {
    id: u32,
    request: Request,
    next: Micros,
}

/// The host's end of the link. See the module's documentation for how to drive it.
#[derive(Clone, Debug)]
pub struct HostSession {
    deframer: Deframer,
    core: Core,
}

#[derive(Clone, Debug)]
struct Core {
    config: HostConfig,
    nonces: Nonces,
    nonce: u32,
    phase: Phase,
    /// When the handshake's attempt began.
    began: Micros,
    /// When hello, agree or heartbeat is due.
    next: Micros,
    /// Board nonce and version, once its hello came.
    greeted: Option<(u32, u8)>,
    channel: Channel,
    parameters: Parameters,
    /// A moment of our own clock that the board has proved to have heard of.
    proof: Micros,
    /// Newest clock of the board.
    board_time: u32,
    board: Option<(BoardState, u16)>,
    /// Newest part announced, and a bit for it and each of the 63 before it.
    seen: Option<(u32, u64)>,
    last_command: Option<u32>,
    state: HostState,
    waiting: [Option<Waiting>; MAX_WAITING],
    asked: Option<Asked>,
    next_request: u32,
    /// Smallest `our clock - board clock` (low 32 bits) and when it was last let go a little.
    offset: Option<(u32, Micros)>,
    shortest_round_trip: Option<Micros>,
    outbox: Outbox<OUTBOX>,
    refused: Option<Mismatch>,
    counters: HostCounters,
}

impl HostSession {
    /// A session that begins to greet at once. `nonce_seed` must differ from run to run (random, or the wall clock).
    #[inline(never)] // its temporaries must not grow the caller's stack frame on a small board
    pub fn new(config: HostConfig, nonce_seed: u64, now: Micros) -> Self {
        let mut nonces = Nonces::new(nonce_seed);
        let nonce = nonces.next();
        // Made in place: a small board has no room for a copy.
        let mut session = Self {
            deframer: Deframer::new(),
            core: Core {
                config,
                nonces,
                nonce,
                phase: Phase::Greeting,
                began: now,
                next: now,
                greeted: None,
                channel: Channel::new(Key::OPEN, 0),
                parameters: Parameters::default(),
                proof: now,
                board_time: 0,
                board: None,
                seen: None,
                last_command: None,
                state: HostState::Starting,
                waiting: [None; MAX_WAITING],
                asked: None,
                next_request: 1,
                offset: None,
                shortest_round_trip: None,
                outbox: Outbox::new(),
                refused: None,
                counters: HostCounters::default(),
            },
        };
        session.core.due(now);
        session
    }

    /// Forget the session and everything unsent, and greet again: after the port was opened anew. Verdicts still waiting are dropped (the board
    /// rejects those parts).
    pub fn restart(&mut self, now: Micros) {
        self.deframer = Deframer::new();
        self.core.greet(now);
    }

    /// Take bytes from the port, in any portions.
    pub fn on_bytes(&mut self, now: Micros, bytes: &[u8], sink: &mut impl FnMut(HostEvent)) {
        for &byte in bytes {
            match self.deframer.push(byte) {
                Cut::More => {}
                Cut::Body(body) => self.core.on_body(now, body, sink),
                Cut::Garbage => self.core.counters.bad_frames = self.core.counters.bad_frames.wrapping_add(1),
            }
        }
    }

    /// Do what is due; returns when to call again at the latest.
    pub fn poll(&mut self, now: Micros, sink: &mut impl FnMut(HostEvent)) -> Micros {
        self.core.poll(now, sink)
    }

    /// Bytes for the port.
    pub fn output(&self) -> &[u8] {
        self.core.outbox.bytes()
    }

    /// The port took the first `n` bytes of [`HostSession::output`].
    pub fn consume(&mut self, n: usize) {
        self.core.outbox.consume(n);
    }

    /// Send a verdict; it is in [`HostSession::output`] at once (when there is room) and repeated until acknowledged or past the deadline.
    /// `reason`: a number for displays, see `PROTOCOL.md`. A second verdict on a part replaces the first if that is not acknowledged yet; the
    /// board never turns a reject into an accept.
    ///
    /// # Errors
    /// [`HostError::LinkDown`] or [`HostError::UnknownPart`]: nothing is sent, the board rejects the part by itself.
    pub fn verdict(&mut self, now: Micros, part: u32, decision: Decision, reason: u8, score: f32) -> Result<(), HostError> {
        self.core.verdict(now, part, decision, reason, score)
    }

    /// The inspector's own state, told at once and in every heartbeat.
    pub fn set_state(&mut self, now: Micros, state: HostState) {
        if self.core.state != state {
            self.core.state = state;
            if self.core.phase == Phase::Up {
                self.core.next = now;
            }
        }
    }

    /// Ask the board for something; repeated until [`HostEvent::Answer`] comes or the link goes down.
    ///
    /// # Errors
    /// [`HostError::LinkDown`], or [`HostError::Busy`] while another request waits.
    pub fn request(&mut self, now: Micros, request: Request) -> Result<(), HostError> {
        self.core.request(now, request)
    }

    /// End in good order: the board goes to its not-ready state at once, with no fault latched. The session then stays silent until
    /// [`HostSession::restart`].
    pub fn goodbye(&mut self, _now: Micros) {
        let core = &mut self.core;
        if core.phase == Phase::Up {
            core.send(&Message::Goodbye);
        }
        core.phase = Phase::Refused;
        core.next = Micros::MAX;
    }

    /// What was agreed, while the link is up.
    pub fn agreed(&self) -> Option<&Parameters> {
        (self.core.phase == Phase::Up).then_some(&self.core.parameters)
    }

    /// The session's counters.
    pub fn counters(&self) -> HostCounters {
        self.core.counters
    }

    /// Verdicts not acknowledged yet.
    pub fn waiting(&self) -> usize {
        self.core.waiting.iter().flatten().count()
    }
}

impl Core {
    fn send(&mut self, message: &Message) -> bool {
        self.channel.send(&mut self.outbox, HOST, BOARD, message)
    }

    fn greet(&mut self, now: Micros) {
        self.outbox.clear();
        self.waiting = [None; MAX_WAITING];
        self.asked = None;
        self.renew(now);
    }

    /// Begin a new attempt at the handshake.
    fn renew(&mut self, now: Micros) {
        self.nonce = self.nonces.next();
        self.greeted = None;
        self.phase = Phase::Greeting;
        (self.began, self.next) = (now, now);
    }

    fn on_body(&mut self, now: Micros, body: &[u8], sink: &mut impl FnMut(HostEvent)) {
        let Some(header) = wire::peek(body) else {
            self.counters.bad_frames = self.counters.bad_frames.wrapping_add(1);
            return;
        };
        if header.source != BOARD || header.destination != HOST {
            self.counters.bad_frames = self.counters.bad_frames.wrapping_add(1);
            return;
        }
        let received = if Message::is_handshake(header.kind) {
            wire::open(body, Key::OPEN, wire::HANDSHAKE_VERSION).map(|(_, message)| (message, 0)).map_err(Refusal::Wire)
        } else if matches!(self.phase, Phase::Agreeing | Phase::Up) {
            self.channel.receive(body)
        } else {
            Err(Refusal::Wire(WireError::Crc)) // an earlier session's
        };
        match received {
            Ok((message, lost)) => {
                self.counters.lost_frames = self.counters.lost_frames.wrapping_add(lost);
                self.on_message(now, message, sink);
            }
            Err(Refusal::Number) => self.counters.stale_frames = self.counters.stale_frames.wrapping_add(1),
            Err(Refusal::Wire(_)) => self.counters.bad_frames = self.counters.bad_frames.wrapping_add(1),
        }
    }

    fn on_message(&mut self, now: Micros, message: Message, sink: &mut impl FnMut(HostEvent)) {
        match message {
            Message::Hello(hello) => self.on_hello(now, hello, sink),
            Message::Parameters { host_nonce, board_nonce, parameters } => {
                self.on_parameters(now, host_nonce, board_nonce, parameters, sink)
            }
            Message::Refuse { answers, field, ours, theirs } => {
                if answers == self.nonce && self.phase != Phase::Up {
                    self.refused_by(now, Mismatch { field, ours: theirs, theirs: ours }, sink);
                }
            }
            // Ours to send, never to receive.
            Message::Agree | Message::Goodbye | Message::Verdict { .. } | Message::Request { .. } => {
                self.counters.bad_frames = self.counters.bad_frames.wrapping_add(1);
            }
            Message::Heartbeat(heartbeat) => self.on_heartbeat(now, heartbeat, sink),
            _ if self.phase != Phase::Up => {} // the board speaks before its first heartbeat came; it repeats what matters
            Message::Trigger { part, encoder, time_us } => self.on_trigger(now, part, encoder, time_us, sink),
            Message::Acknowledge { of, reference, status } => self.on_acknowledge(now, of, reference, status, sink),
            Message::Fault { code, detail } => sink(HostEvent::Fault { code, detail }),
            Message::Command { id, command } => {
                self.send(&Message::Acknowledge { of: kind::COMMAND, reference: id, status: Status::Taken });
                // Commands are numbered upwards and sent one at a time until acknowledged.
                if self.last_command.is_none_or(|last| id.wrapping_sub(last).wrapping_sub(1) < u32::MAX / 2) {
                    self.last_command = Some(id);
                    sink(HostEvent::Command(command));
                }
            }
        }
    }

    fn on_hello(&mut self, now: Micros, hello: Hello, sink: &mut impl FnMut(HostEvent)) {
        if hello.answers != self.nonce || !matches!(self.phase, Phase::Greeting | Phase::Agreeing) {
            return;
        }
        if hello.codename != self.config.codename {
            self.refuse(now, hello.nonce, Mismatch { field: Field::Codename, ours: self.config.codename, theirs: hello.codename }, sink);
            return;
        }
        match common_version(self.config.versions, (hello.version_min, hello.version_max)) {
            Some(version) => self.greeted = Some((hello.nonce, version)),
            None => {
                let mismatch = Mismatch { field: Field::Version, ours: self.config.versions.1.into(), theirs: hello.version_max.into() };
                self.refuse(now, hello.nonce, mismatch, sink);
            }
        }
    }

    fn on_parameters(&mut self, now: Micros, host_nonce: u32, board_nonce: u32, parameters: Parameters, sink: &mut impl FnMut(HostEvent)) {
        let Some((greeted, version)) = self.greeted else { return };
        if self.phase != Phase::Greeting || host_nonce != self.nonce || board_nonce != greeted {
            return;
        }
        if let Some(mismatch) = self.config.expected.compare(&parameters) {
            self.refuse(now, board_nonce, mismatch, sink);
            return;
        }
        self.parameters = parameters;
        self.channel = Channel::new(Key::session(version, self.config.codename, host_nonce, board_nonce, &parameters), version);
        self.phase = Phase::Agreeing;
        (self.began, self.next) = (now, now);
        self.due(now);
    }

    /// Tell the board that there will be no session.
    fn refuse(&mut self, now: Micros, answers: u32, mismatch: Mismatch, sink: &mut impl FnMut(HostEvent)) {
        let Mismatch { field, ours, theirs } = mismatch;
        self.outbox.send_open(HOST, BOARD, &Message::Refuse { answers, field, ours, theirs });
        self.refused_by(now, mismatch, sink);
    }

    /// Say why once, ask again later.
    fn refused_by(&mut self, now: Micros, mismatch: Mismatch, sink: &mut impl FnMut(HostEvent)) {
        self.phase = Phase::Refused;
        self.next = now.saturating_add(REFUSED_REPEAT_US);
        if self.refused != Some(mismatch) {
            self.refused = Some(mismatch);
            sink(HostEvent::Link(Link::Refused(mismatch)));
        }
    }

    fn on_heartbeat(&mut self, now: Micros, heartbeat: Heartbeat, sink: &mut impl FnMut(HostEvent)) {
        let Some(state) = BoardState::from_wire(heartbeat.state) else {
            self.counters.bad_frames = self.counters.bad_frames.wrapping_add(1);
            return;
        };
        if self.phase == Phase::Agreeing {
            // The board can only know the key from our agree.
            self.phase = Phase::Up;
            self.proof = self.began;
            self.next = now;
            self.seen = None;
            self.last_command = None;
            self.board = None;
            self.offset = None;
            self.shortest_round_trip = None;
            self.refused = None;
            self.counters.sessions = self.counters.sessions.wrapping_add(1);
            sink(HostEvent::Link(Link::Up(self.parameters)));
        } else {
            let age = age_of(now, heartbeat.echo_us);
            if age <= self.parameters.watchdog_us() {
                self.proof = self.proof.max(now.saturating_sub(age));
            }
        }
        self.board_time = heartbeat.time_us;
        self.note_offset(now, heartbeat.time_us);
        if self.board != Some((state, heartbeat.faults)) {
            self.board = Some((state, heartbeat.faults));
            sink(HostEvent::Board { state, faults: heartbeat.faults });
        }
        if let Some(counters) = heartbeat.counters {
            sink(HostEvent::Counters(counters));
        }
        self.due(now);
    }

    /// Update the least clock difference; returns how much older than the fastest message this one is.
    fn note_offset(&mut self, now: Micros, board_time: u32) -> u32 {
        let difference = (now as u32).wrapping_sub(board_time);
        let Some((least, at)) = self.offset else {
            self.offset = Some((difference, now));
            return 0;
        };
        let leaked = least.wrapping_add((since(now, at) / CLOCK_LEAK) as u32);
        let excess = difference.wrapping_sub(leaked);
        if excess > u32::MAX / 2 {
            self.offset = Some((difference, now)); // faster than any before
            return 0;
        }
        // Keep the remainder of the division: move the time only when something leaked.
        if leaked != least {
            self.offset = Some((leaked, now));
        }
        excess
    }

    fn on_trigger(&mut self, now: Micros, part: u32, encoder: u32, board_time_us: u32, sink: &mut impl FnMut(HostEvent)) {
        // Acknowledge repeats too: the first acknowledgement may be lost.
        self.send(&Message::Acknowledge { of: kind::TRIGGER, reference: part, status: Status::Taken });
        let new = match self.seen {
            None => {
                self.seen = Some((part, 1));
                true
            }
            Some((newest, bits)) => {
                let ahead = part.wrapping_sub(newest);
                if ahead == 0 {
                    false
                } else if ahead <= u32::MAX / 2 {
                    self.seen = Some((part, bits.checked_shl(ahead).unwrap_or(0) | 1));
                    true
                } else {
                    let bit = 1u64.checked_shl(newest.wrapping_sub(part)).unwrap_or(0);
                    self.seen = Some((newest, bits | bit));
                    bit != 0 && bits & bit == 0
                }
            }
        };
        if !new {
            return;
        }
        let age_us = self.note_offset(now, board_time_us);
        let back = self.shortest_round_trip.unwrap_or(0);
        let deadline_us = now.saturating_add(self.parameters.deadline_us()).saturating_sub(Micros::from(age_us)).saturating_sub(back);
        sink(HostEvent::Trigger(Trigger { part, encoder, board_time_us, age_us, deadline_us }));
    }

    fn on_acknowledge(&mut self, now: Micros, of: u8, reference: u32, status: Status, sink: &mut impl FnMut(HostEvent)) {
        match of {
            kind::VERDICT => {
                let Some(slot) = self.waiting.iter_mut().find(|slot| slot.is_some_and(|w| w.part == reference)) else { return };
                let Some(waiting) = slot.take() else { return };
                let round_trip_us = since(now, waiting.since);
                if !waiting.repeated {
                    self.shortest_round_trip = Some(self.shortest_round_trip.map_or(round_trip_us, |least| least.min(round_trip_us)));
                }
                sink(HostEvent::Acknowledged { part: reference, status, round_trip_us });
            }
            kind::REQUEST => {
                if let Some(asked) = self.asked.filter(|asked| asked.id == reference) {
                    self.asked = None;
                    sink(HostEvent::Answer { request: asked.request, status });
                }
            }
            _ => {}
        }
    }

    fn verdict(&mut self, now: Micros, part: u32, decision: Decision, reason: u8, score: f32) -> Result<(), HostError> {
        if self.phase != Phase::Up {
            return Err(HostError::LinkDown);
        }
        let known = self.seen.is_some_and(|(newest, bits)| bits & 1u64.checked_shl(newest.wrapping_sub(part)).unwrap_or(0) != 0);
        if !known {
            return Err(HostError::UnknownPart);
        }
        let mut waiting = Waiting { part, decision, reason, score, since: now, next: now, repeated: false };
        if self.send(&Message::Verdict { part, decision, reason, score }) {
            waiting.next = now.saturating_add(self.parameters.heartbeat_us());
        }
        // The slot of the same part, else a free one, else the oldest: its part has long been decided by the board.
        let slot = self.waiting.iter_mut().min_by_key(|slot| match slot {
            Some(w) if w.part == part => (0, 0),
            None => (1, 0),
            Some(w) => (2, w.since),
        });
        if let Some(slot) = slot {
            if slot.is_some_and(|w| w.part != part) {
                self.counters.displaced = self.counters.displaced.wrapping_add(1);
            }
            *slot = Some(waiting);
        }
        Ok(())
    }

    fn request(&mut self, now: Micros, request: Request) -> Result<(), HostError> {
        if self.phase != Phase::Up {
            return Err(HostError::LinkDown);
        }
        if self.asked.is_some() {
            return Err(HostError::Busy);
        }
        self.asked = Some(Asked { id: self.next_request, request, next: now });
        self.next_request = self.next_request.wrapping_add(1);
        self.due(now);
        Ok(())
    }

    fn poll(&mut self, now: Micros, sink: &mut impl FnMut(HostEvent)) -> Micros {
        match self.phase {
            Phase::Up if since(now, self.proof) >= self.parameters.watchdog_us() => {
                for waiting in self.waiting.iter_mut().filter_map(Option::take) {
                    sink(HostEvent::Unacknowledged { part: waiting.part });
                }
                self.greet(now);
                sink(HostEvent::Link(Link::Lost));
            }
            Phase::Greeting | Phase::Agreeing if since(now, self.began) >= HANDSHAKE_TIMEOUT_US => self.renew(now),
            Phase::Refused if now >= self.next => self.renew(now),
            _ => {}
        }
        if self.phase == Phase::Up {
            let give_up = self.parameters.deadline_us();
            for slot in &mut self.waiting {
                if let Some(w) = slot.filter(|w| since(now, w.since) >= give_up) {
                    *slot = None;
                    sink(HostEvent::Unacknowledged { part: w.part });
                }
            }
        }
        self.due(now);
        self.wake(now)
    }

    /// Put into the outbox what is due.
    fn due(&mut self, now: Micros) {
        match self.phase {
            Phase::Greeting if now >= self.next => {
                let (version_min, version_max) = self.config.versions;
                let hello = Hello {
                    nonce: self.nonce,
                    answers: 0,
                    version_min,
                    version_max,
                    codename: self.config.codename,
                    build: self.config.build,
                };
                self.outbox.send_open(HOST, BOARD, &Message::Hello(hello));
                self.next = now.saturating_add(HELLO_REPEAT_US);
            }
            Phase::Agreeing if now >= self.next => {
                self.send(&Message::Agree);
                self.next = now.saturating_add(self.parameters.heartbeat_us());
            }
            Phase::Up => self.due_up(now),
            _ => {}
        }
    }

    fn due_up(&mut self, now: Micros) {
        let repeat_at = now.saturating_add(self.parameters.heartbeat_us());
        // Verdicts first: they have a deadline.
        let Self { waiting, channel, outbox, counters, .. } = self;
        for w in waiting.iter_mut().flatten().filter(|w| now >= w.next) {
            let message = Message::Verdict { part: w.part, decision: w.decision, reason: w.reason, score: w.score };
            if !channel.send(outbox, HOST, BOARD, &message) {
                break;
            }
            // `next` is still the first moment when the outbox had no room at first.
            if w.next != w.since {
                w.repeated = true;
                counters.repeats = counters.repeats.wrapping_add(1);
            }
            w.next = repeat_at;
        }
        if let Some(asked) = self.asked.filter(|asked| now >= asked.next)
            && self.send(&Message::Request { id: asked.id, request: asked.request })
        {
            self.asked = Some(Asked { next: repeat_at, ..asked });
        }
        if now >= self.next {
            let heartbeat = Heartbeat {
                time_us: now as u32,
                echo_us: self.board_time,
                state: self.state as u8,
                faults: 0,
                in_flight: self.waiting.iter().flatten().count() as u8,
                counters: None,
            };
            if self.send(&Message::Heartbeat(heartbeat)) {
                self.next = repeat_at;
            }
        }
    }

    /// When something is due next; never earlier than a millisecond from now, so that a stuck port does not spin its thread.
    fn wake(&self, now: Micros) -> Micros {
        let mut wake = self.next;
        match self.phase {
            Phase::Up => {
                wake = wake.min(self.proof.saturating_add(self.parameters.watchdog_us()));
                wake = self.waiting.iter().flatten().fold(wake, |wake, w| wake.min(w.next));
                wake = self.asked.iter().fold(wake, |wake, asked| wake.min(asked.next));
            }
            Phase::Greeting | Phase::Agreeing => wake = wake.min(self.began.saturating_add(HANDSHAKE_TIMEOUT_US)),
            Phase::Refused => {}
        }
        wake.max(now.saturating_add(1_000))
    }
}
