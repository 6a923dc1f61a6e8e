//! What is in a frame: header, data, CRC. See `PROTOCOL.md` for the bytes.
//!
//! ```text
//! body = version u8 | kind u8 | source u8 | destination u8 | number u16 | data … | CRC u32        (little-endian)
//! ```
//! The CRC is CRC-32/ISCSI (Castagnoli) over `key u32 | header | data`. The key is not sent: it is [`Key::OPEN`] for the handshake and
//! afterwards [`Key::session`], made of version, codename, both nonces and all agreed parameters. So a frame from another line, from an earlier
//! session or from a side with other parameters fails its CRC.

use crate::parameters::{Field, Parameters};
use crc::{CRC_32_ISCSI, Crc, Table};

/// Versions of the protocol that this crate speaks, lowest and highest.
pub const VERSIONS: (u8, u8) = (1, 1);
/// Version byte of handshake frames; it stays 1 for ever, so that any two versions can negotiate.
pub const HANDSHAKE_VERSION: u8 = 1;
/// Address of the inspector.
pub const HOST: u8 = 1;
/// Address of the reject board.
pub const BOARD: u8 = 2;

/// Bytes before the data.
pub const HEADER: usize = 6;
/// Longest data: a heartbeat with counters.
pub const MAX_DATA: usize = 44;
/// Longest body: header, data, CRC.
pub const MAX_BODY: usize = HEADER.saturating_add(MAX_DATA).saturating_add(4);
/// Shortest body: header and CRC.
pub const MIN_BODY: usize = HEADER.saturating_add(4);

/// Hamming distance 6 up to 655 bytes: any five flipped bits in a frame are found, and any burst up to 32 bits.
static CRC: Crc<u32, Table<1>> = Crc::<u32, Table<1>>::new(&CRC_32_ISCSI);

/// What the CRC covers besides the frame itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key(pub u32);

impl Key {
    /// Before anything is agreed.
    pub const OPEN: Self = Self(0);

    /// Of a session: CRC over version, codename, host nonce, board nonce and the parameter block.
    pub fn session(version: u8, codename: u32, host_nonce: u32, board_nonce: u32, parameters: &Parameters) -> Self {
        let mut block = [0; Parameters::LEN.saturating_add(13)];
        let mut w = Writer::new(&mut block);
        w.u8(version);
        w.u32(codename);
        w.u32(host_nonce);
        w.u32(board_nonce);
        parameters.write(&mut w);
        Self(CRC.checksum(&block))
    }

    fn crc(self, header_and_data: &[u8]) -> u32 {
        let mut digest = CRC.digest();
        digest.update(&self.0.to_le_bytes());
        digest.update(header_and_data);
        digest.finalize()
    }
}

/// First bytes of every frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Protocol version of this frame.
    pub version: u8,
    /// Kind of message, see [`Message::kind`].
    pub kind: u8,
    /// Address of the sender.
    pub source: u8,
    /// Address of the receiver.
    pub destination: u8,
    /// Consecutive number of the sender in this session, from 1, wrapping. 0 in the handshake.
    pub number: u16,
}

/// The verdict on a part. The four values differ in at least four bits from each other and from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Decision {
    /// Let the part through. The only value that does.
    Accept = 0xA5,
    /// Reject it.
    Reject = 0x5A,
    /// No judgement was possible: reject.
    Unknown = 0x3C,
    /// The inspector failed on this part: reject.
    Fault = 0xC3,
}

impl Decision {
    fn from_wire(value: u8) -> Option<Self> {
        match value {
            0xA5 => Some(Self::Accept),
            0x5A => Some(Self::Reject),
            0x3C => Some(Self::Unknown),
            0xC3 => Some(Self::Fault),
            _ => None,
        }
    }
}

/// What became of something that was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// Taken.
    Taken = 0,
    /// The part was decided without it: the deadline or the point of no return had passed. It is rejected.
    TooLate = 1,
    /// No such part in this session, or it is past the gate.
    UnknownPart = 2,
    /// Not now: for example outputs are not exercised while the line runs.
    Refused = 3,
}

impl Status {
    fn from_wire(value: u8) -> Option<Self> {
        match value {
            0 => Some(Self::Taken),
            1 => Some(Self::TooLate),
            2 => Some(Self::UnknownPart),
            3 => Some(Self::Refused),
            _ => None,
        }
    }
}

/// State of the inspector, in its heartbeats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum HostState {
    /// Starting, not inspecting yet.
    Starting = 0,
    /// Inspecting.
    Running = 1,
    /// Stopped or paused by command.
    Stopped = 2,
    /// The camera stalls, fails or is gone.
    CameraFault = 3,
    /// The model or another stage failed.
    InternalFault = 4,
}

impl HostState {
    /// The state with this number.
    pub fn from_wire(value: u8) -> Option<Self> {
        match value {
            0 => Some(Self::Starting),
            1 => Some(Self::Running),
            2 => Some(Self::Stopped),
            3 => Some(Self::CameraFault),
            4 => Some(Self::InternalFault),
            _ => None,
        }
    }
}

/// State of the board, in its heartbeats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum BoardState {
    /// No agreed host yet (or it said goodbye). Outputs as in [`BoardState::Safe`]; ends by itself with the handshake.
    NotReady = 0,
    /// Parts are judged by their verdicts.
    Running = 1,
    /// Latched until it is cleared: host dead, part table full, polled too late or encoder dead.
    Safe = 2,
}

impl BoardState {
    /// The state with this number.
    pub fn from_wire(value: u8) -> Option<Self> {
        match value {
            0 => Some(Self::NotReady),
            1 => Some(Self::Running),
            2 => Some(Self::Safe),
            _ => None,
        }
    }
}

/// Why a board is in [`BoardState::Safe`]. The bit of a code in [`Heartbeat::faults`] is `1 << (code - 1)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum FaultCode {
    /// No proof of life from the host for the watchdog time. Detail: milliseconds since the last one.
    HostDead = 1,
    /// More parts between sensor and gate than the board can track. Detail: the part that found no room.
    TooManyParts = 2,
    /// A part to be rejected passed the gate before the actuator was switched on, since the firmware was late. Detail: the part.
    PolledTooLate = 3,
    /// Parts pass the sensor and the encoder does not move. Detail: the encoder count.
    EncoderDead = 4,
}

impl FaultCode {
    /// All codes.
    pub const ALL: [Self; 4] = [Self::HostDead, Self::TooManyParts, Self::PolledTooLate, Self::EncoderDead];

    fn from_wire(value: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|&code| code as u8 == value)
    }

    /// The bit in [`Heartbeat::faults`].
    pub fn bit(self) -> u16 {
        1u16.wrapping_shl((self as u32).wrapping_sub(1))
    }
}

/// Commands from the PLC or from switches at the board, for the inspector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Start or resume inspecting.
    Start,
    /// Stop inspecting.
    Stop,
    /// Pause inspecting.
    Pause,
    /// Recipe or product hint.
    Recipe(u16),
    /// A golden sample comes next: check and report.
    GoldenCheck,
}

impl Command {
    fn to_wire(self) -> (u8, u16) {
        match self {
            Self::Start => (1, 0),
            Self::Stop => (2, 0),
            Self::Pause => (3, 0),
            Self::Recipe(recipe) => (4, recipe),
            Self::GoldenCheck => (5, 0),
        }
    }

    fn from_wire(code: u8, argument: u16) -> Option<Self> {
        match (code, argument) {
            (1, 0) => Some(Self::Start),
            (2, 0) => Some(Self::Stop),
            (3, 0) => Some(Self::Pause),
            (4, recipe) => Some(Self::Recipe(recipe)),
            (5, 0) => Some(Self::GoldenCheck),
            _ => None,
        }
    }
}

/// Outputs of the board.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Output {
    /// The reject actuator.
    Reject = 1,
    /// The line-stop output.
    LineStop = 2,
    /// The status LED.
    Led = 3,
}

impl Output {
    fn from_wire(value: u8) -> Option<Self> {
        match value {
            1 => Some(Self::Reject),
            2 => Some(Self::LineStop),
            3 => Some(Self::Led),
            _ => None,
        }
    }
}

/// What the host asks of the board; acknowledged with a [`Status`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Leave the safe state. The operator's explicit act, never sent by itself.
    Clear,
    /// Switch an output on for a while, for commissioning. Refused while the host's state is running or parts are under way.
    Exercise {
        /// Which output.
        output: Output,
        /// For how long.
        duration_ms: u16,
    },
}

/// What the board counted since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Parts triggered.
    pub parts: u32,
    /// Parts let through on their own accept verdict.
    pub accepted: u32,
    /// Parts rejected at the gate, for any reason. `parts - accepted - rejected - leaked` are under way.
    pub rejected: u32,
    /// Parts without a verdict by the deadline (all rejected).
    pub missed: u32,
    /// Parts that passed the gate though they were to be rejected: the firmware was late. Each latches the safe state.
    pub leaked: u32,
    /// Frames that failed: bad framing, length, CRC, codename, address or number.
    pub bad_frames: u32,
    /// Frames that never came, by the gaps in the consecutive numbers.
    pub lost_frames: u32,
    /// Times the safe state was entered.
    pub safe_entries: u32,
}

/// Proof of life of either side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heartbeat {
    /// The sender's clock when it sent this, low 32 bits of microseconds.
    pub time_us: u32,
    /// The newest `time_us` that the sender had of the other side, sent back. It proves how old the news is: only this feeds the watchdog, so
    /// heartbeats that a buffer held back do not keep a dead host alive.
    pub echo_us: u32,
    /// [`HostState`] or [`BoardState`].
    pub state: u8,
    /// [`FaultCode::bit`]s of the board; 0 from the host.
    pub faults: u16,
    /// Parts under way (board), or verdicts not yet acknowledged (host).
    pub in_flight: u8,
    /// Board only, about once a second.
    pub counters: Option<Counters>,
}

/// First message of either side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Of the sender, new for each attempt.
    pub nonce: u32,
    /// The nonce this answers; 0 from the host.
    pub answers: u32,
    /// Lowest version spoken.
    pub version_min: u8,
    /// Highest version spoken.
    pub version_max: u8,
    /// Codename of the connection, the same on both sides.
    pub codename: u32,
    /// The sender's software version: `major << 16 | minor << 8 | patch`.
    pub build: u32,
}

/// Every message.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Message {
    /// Either way: opens the handshake (host), answers (board).
    Hello(Hello),
    /// Board to host: its parameters.
    Parameters {
        /// The host's nonce.
        host_nonce: u32,
        /// The board's nonce.
        board_nonce: u32,
        /// The board's parameters.
        parameters: Parameters,
    },
    /// Either way: no session, since this field differs.
    Refuse {
        /// The nonce of the hello or parameters refused.
        answers: u32,
        /// What differs.
        field: Field,
        /// The sender's value.
        ours: u32,
        /// The receiver's value, as the sender read it.
        theirs: u32,
    },
    /// Host to board, first frame under the session key: the parameters are agreed.
    Agree,
    /// Host to board: the host ends in good order; the board goes to [`BoardState::NotReady`] without a latch.
    Goodbye,
    /// Board to host: a part passed the sensor.
    Trigger {
        /// Its number.
        part: u32,
        /// Encoder count at the sensor.
        encoder: u32,
        /// The board's clock at the edge.
        time_us: u32,
    },
    /// Host to board: what to do with a part.
    Verdict {
        /// Its number.
        part: u32,
        /// What to do.
        decision: Decision,
        /// Why, for displays; see `PROTOCOL.md`.
        reason: u8,
        /// Image score; NaN where there is none.
        score: f32,
    },
    /// Either way: a trigger, verdict, command or request arrived.
    Acknowledge {
        /// Kind of the message acknowledged.
        of: u8,
        /// Its part number or id.
        reference: u32,
        /// What became of it.
        status: Status,
    },
    /// Either way: proof of life.
    Heartbeat(Heartbeat),
    /// Board to host: the safe state was entered. Sent once; the heartbeat's bits stay.
    Fault {
        /// Why.
        code: FaultCode,
        /// See [`FaultCode`].
        detail: u32,
    },
    /// Board to host: the PLC wants something.
    Command {
        /// Number of the command, for the acknowledgement.
        id: u32,
        /// What.
        command: Command,
    },
    /// Host to board: the operator wants something.
    Request {
        /// Number of the request, for the acknowledgement.
        id: u32,
        /// What.
        request: Request,
    },
}

/// Numbers of the kinds.
pub mod kind {
    /// [`Message::Hello`](super::Message::Hello).
    pub const HELLO: u8 = 0x01;
    /// [`Message::Parameters`](super::Message::Parameters).
    pub const PARAMETERS: u8 = 0x02;
    /// [`Message::Refuse`](super::Message::Refuse).
    pub const REFUSE: u8 = 0x03;
    /// [`Message::Agree`](super::Message::Agree).
    pub const AGREE: u8 = 0x04;
    /// [`Message::Goodbye`](super::Message::Goodbye).
    pub const GOODBYE: u8 = 0x05;
    /// [`Message::Trigger`](super::Message::Trigger).
    pub const TRIGGER: u8 = 0x10;
    /// [`Message::Verdict`](super::Message::Verdict).
    pub const VERDICT: u8 = 0x11;
    /// [`Message::Acknowledge`](super::Message::Acknowledge).
    pub const ACKNOWLEDGE: u8 = 0x12;
    /// [`Message::Heartbeat`](super::Message::Heartbeat).
    pub const HEARTBEAT: u8 = 0x13;
    /// [`Message::Fault`](super::Message::Fault).
    pub const FAULT: u8 = 0x14;
    /// [`Message::Command`](super::Message::Command).
    pub const COMMAND: u8 = 0x15;
    /// [`Message::Request`](super::Message::Request).
    pub const REQUEST: u8 = 0x16;
}

/// Why a body is no frame for us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WireError {
    /// Shorter than header and CRC.
    TooShort,
    /// The CRC does not fit: damage, another codename, another session or other parameters.
    Crc,
    /// The CRC fits, but the version is not the session's.
    Version,
    /// The CRC fits, but the kind is unknown, the length is not the kind's, or a value is not one of its list.
    Content,
}

impl Message {
    /// Number of the kind, as in the header.
    pub fn kind(&self) -> u8 {
        match self {
            Self::Hello(_) => kind::HELLO,
            Self::Parameters { .. } => kind::PARAMETERS,
            Self::Refuse { .. } => kind::REFUSE,
            Self::Agree => kind::AGREE,
            Self::Goodbye => kind::GOODBYE,
            Self::Trigger { .. } => kind::TRIGGER,
            Self::Verdict { .. } => kind::VERDICT,
            Self::Acknowledge { .. } => kind::ACKNOWLEDGE,
            Self::Heartbeat(_) => kind::HEARTBEAT,
            Self::Fault { .. } => kind::FAULT,
            Self::Command { .. } => kind::COMMAND,
            Self::Request { .. } => kind::REQUEST,
        }
    }

    /// Whether frames of this kind carry [`Key::OPEN`], number 0 and [`HANDSHAKE_VERSION`].
    pub fn is_handshake(kind: u8) -> bool {
        matches!(kind, kind::HELLO | kind::PARAMETERS | kind::REFUSE)
    }

    fn write(&self, w: &mut Writer<'_>) {
        match *self {
            Self::Hello(h) => {
                w.u32(h.nonce);
                w.u32(h.answers);
                w.u8(h.version_min);
                w.u8(h.version_max);
                w.u32(h.codename);
                w.u32(h.build);
            }
            Self::Parameters { host_nonce, board_nonce, parameters } => {
                w.u32(host_nonce);
                w.u32(board_nonce);
                parameters.write(w);
            }
            Self::Refuse { answers, field, ours, theirs } => {
                w.u32(answers);
                w.u8(field as u8);
                w.u32(ours);
                w.u32(theirs);
            }
            Self::Agree | Self::Goodbye => {}
            Self::Trigger { part, encoder, time_us } => {
                w.u32(part);
                w.u32(encoder);
                w.u32(time_us);
            }
            Self::Verdict { part, decision, reason, score } => {
                w.u32(part);
                w.u8(decision as u8);
                w.u8(reason);
                w.u32(score.to_bits());
            }
            Self::Acknowledge { of, reference, status } => {
                w.u8(of);
                w.u32(reference);
                w.u8(status as u8);
            }
            Self::Heartbeat(h) => {
                w.u32(h.time_us);
                w.u32(h.echo_us);
                w.u8(h.state);
                w.u16(h.faults);
                w.u8(h.in_flight);
                if let Some(c) = h.counters {
                    for value in [c.parts, c.accepted, c.rejected, c.missed, c.leaked, c.bad_frames, c.lost_frames, c.safe_entries] {
                        w.u32(value);
                    }
                }
            }
            Self::Fault { code, detail } => {
                w.u8(code as u8);
                w.u32(detail);
            }
            Self::Command { id, command } => {
                let (code, argument) = command.to_wire();
                w.u32(id);
                w.u8(code);
                w.u16(argument);
            }
            Self::Request { id, request } => {
                let (code, output, duration_ms) = match request {
                    Request::Clear => (1, 0, 0),
                    Request::Exercise { output, duration_ms } => (2, output as u8, duration_ms),
                };
                w.u32(id);
                w.u8(code);
                w.u8(output);
                w.u16(duration_ms);
            }
        }
    }

    /// Read the data of a frame of `kind`; `None` when it is not exactly that.
    fn read(kind: u8, data: &[u8]) -> Option<Self> {
        let mut r = Reader(data);
        let message = match kind {
            kind::HELLO => Self::Hello(Hello {
                nonce: r.u32()?,
                answers: r.u32()?,
                version_min: r.u8()?,
                version_max: r.u8()?,
                codename: r.u32()?,
                build: r.u32()?,
            }),
            kind::PARAMETERS => Self::Parameters { host_nonce: r.u32()?, board_nonce: r.u32()?, parameters: Parameters::read(&mut r)? },
            kind::REFUSE => Self::Refuse { answers: r.u32()?, field: Field::from_wire(r.u8()?)?, ours: r.u32()?, theirs: r.u32()? },
            kind::AGREE => Self::Agree,
            kind::GOODBYE => Self::Goodbye,
            kind::TRIGGER => Self::Trigger { part: r.u32()?, encoder: r.u32()?, time_us: r.u32()? },
            kind::VERDICT => {
                Self::Verdict { part: r.u32()?, decision: Decision::from_wire(r.u8()?)?, reason: r.u8()?, score: f32::from_bits(r.u32()?) }
            }
            kind::ACKNOWLEDGE => Self::Acknowledge { of: r.u8()?, reference: r.u32()?, status: Status::from_wire(r.u8()?)? },
            kind::HEARTBEAT => {
                let (time_us, echo_us, state, faults, in_flight) = (r.u32()?, r.u32()?, r.u8()?, r.u16()?, r.u8()?);
                let counters = if r.0.is_empty() {
                    None
                } else {
                    Some(Counters {
                        parts: r.u32()?,
                        accepted: r.u32()?,
                        rejected: r.u32()?,
                        missed: r.u32()?,
                        leaked: r.u32()?,
                        bad_frames: r.u32()?,
                        lost_frames: r.u32()?,
                        safe_entries: r.u32()?,
                    })
                };
                Self::Heartbeat(Heartbeat { time_us, echo_us, state, faults, in_flight, counters })
            }
            kind::FAULT => Self::Fault { code: FaultCode::from_wire(r.u8()?)?, detail: r.u32()? },
            kind::COMMAND => {
                let id = r.u32()?;
                Self::Command { id, command: Command::from_wire(r.u8()?, r.u16()?)? }
            }
            kind::REQUEST => {
                let id = r.u32()?;
                let request = match (r.u8()?, r.u8()?, r.u16()?) {
                    (1, 0, 0) => Request::Clear,
                    (2, output, duration_ms) => Request::Exercise { output: Output::from_wire(output)?, duration_ms },
                    _ => return None,
                };
                Self::Request { id, request }
            }
            _ => return None,
        };
        r.0.is_empty().then_some(message)
    }
}

/// Put header (its `kind` is taken from the message), data and CRC into `out`; returns the length, 0 if `out` is too small
/// ([`MAX_BODY`] never is).
pub fn seal(header: Header, message: &Message, key: Key, out: &mut [u8]) -> usize {
    let mut w = Writer::new(out);
    w.u8(header.version);
    w.u8(message.kind());
    w.u8(header.source);
    w.u8(header.destination);
    w.u16(header.number);
    message.write(&mut w);
    let crc = key.crc(w.written());
    w.u32(crc);
    if w.overflow { 0 } else { w.len }
}

/// The header of a body, nothing checked. For choosing the key, and for monitors.
pub fn peek(body: &[u8]) -> Option<Header> {
    let mut r = Reader(body);
    Some(Header { version: r.u8()?, kind: r.u8()?, source: r.u8()?, destination: r.u8()?, number: r.u16()? })
}

/// Check the CRC of a body under `key`, then read it. Address and number are the session's business.
///
/// # Errors
/// Says which check failed.
pub fn open(body: &[u8], key: Key, version: u8) -> Result<(Header, Message), WireError> {
    if body.len() < MIN_BODY {
        return Err(WireError::TooShort);
    }
    let (covered, crc) = body.split_at_checked(body.len().wrapping_sub(4)).ok_or(WireError::TooShort)?;
    if Reader(crc).u32() != Some(key.crc(covered)) {
        return Err(WireError::Crc);
    }
    read_unchecked(body)
        .and_then(|(header, message)| if header.version == version { Ok((header, message)) } else { Err(WireError::Version) })
}

/// Read a body without checking its CRC: for monitors that joined a running session and cannot know its key. Never for control.
///
/// # Errors
/// [`WireError::TooShort`] or [`WireError::Content`].
pub fn read_unchecked(body: &[u8]) -> Result<(Header, Message), WireError> {
    let header = peek(body).ok_or(WireError::TooShort)?;
    let data = body.get(HEADER..body.len().saturating_sub(4)).ok_or(WireError::TooShort)?;
    Message::read(header.kind, data).map(|message| (header, message)).ok_or(WireError::Content)
}

/// Little-endian writer that notes an overflow instead of panicking.
pub(crate) struct Writer<'a> {
    buffer: &'a mut [u8],
    len: usize,
    overflow: bool,
}

impl<'a> Writer<'a> {
    pub(crate) fn new(buffer: &'a mut [u8]) -> Self {
        Self { buffer, len: 0, overflow: false }
    }

    fn written(&self) -> &[u8] {
        self.buffer.get(..self.len).unwrap_or(&[])
    }

    pub(crate) fn u8(&mut self, value: u8) {
        match self.buffer.get_mut(self.len) {
            Some(slot) => {
                *slot = value;
                self.len = self.len.wrapping_add(1);
            }
            None => self.overflow = true,
        }
    }

    pub(crate) fn u16(&mut self, value: u16) {
        value.to_le_bytes().into_iter().for_each(|byte| self.u8(byte));
    }

    pub(crate) fn u32(&mut self, value: u32) {
        value.to_le_bytes().into_iter().for_each(|byte| self.u8(byte));
    }
}

/// Little-endian reader; `None` at the end.
pub(crate) struct Reader<'a>(pub(crate) &'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (bytes, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*bytes)
    }

    pub(crate) fn u8(&mut self) -> Option<u8> {
        self.take().map(u8::from_le_bytes)
    }

    pub(crate) fn u16(&mut self) -> Option<u16> {
        self.take().map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }
}
