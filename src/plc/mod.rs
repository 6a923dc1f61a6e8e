//! The PLC link: native bridge protocol, Modbus RTU; one handle, reconnecting.
//!
//! One thread per link owns the port and the protocol, with a helper that only reads. The pipeline sees two bounded channels and a state; it
//! never waits for the port.
//! The link knows nothing of frames, models or files.

pub mod bridge;
pub mod control;
mod driver;
mod lock;
pub mod modbus;
pub mod monitor;
pub mod port;
mod stats;

pub use driver::{Direction, Tap};
pub use lock::{HeldBy, PortLock};
pub use stats::{LatencySummary, LinkStats, LinkSummary};

use crate::config::PlcConfig;
use crate::frame::PartId;
use crate::source::Trigger;
use crate::verdict::Verdict;
use crate::wake::Waker;
use crossbeam_channel::{Receiver, Sender, TrySendError};
use std::sync::Arc;

/// Pipeline -> link.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ToPlc {
    /// The verdict on a part, to be with the board before its deadline.
    Verdict {
        /// The part.
        part: PartId,
        /// What to do with it.
        verdict: Verdict,
        /// When the verdict was taken, on the clock of [`crate::frame::now_ns`]; for the link's latency histogram.
        decided_ns: u64,
    },
    /// The inspector's own state, carried in every heartbeat.
    HostState(HostState),
    /// Something an operator wants of the board; answered with [`PlcEvent::Answer`]. Native bridge only.
    Request(BoardRequest),
}

/// What an operator may ask of a board.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BoardRequest {
    /// Leave the safe state. Never sent by itself: somebody has looked at the line.
    Clear,
    /// Switch the reject actuator on for this long; refused while the line runs. For commissioning, like the next two.
    Reject {
        /// How long, in ms.
        duration_ms: u16,
    },
    /// Switch the line-stop output on.
    LineStop {
        /// How long, in ms.
        duration_ms: u16,
    },
    /// Switch the status LED on.
    Led {
        /// How long, in ms.
        duration_ms: u16,
    },
}

/// What became of a [`BoardRequest`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestStatus {
    /// Done.
    Done,
    /// The board refuses: the line runs, or parts are under way.
    Refused,
    /// The link is not up, another request still waits, or the link's protocol has no such request.
    NotSent,
}

/// State of the reject board itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BoardState {
    /// No agreed host yet; the outputs are in their safe position.
    NotReady,
    /// Parts are judged by their verdicts.
    Running,
    /// Latched until cleared ([`BoardRequest::Clear`]): everything is rejected, or the line is stopped, whatever the verdicts say.
    Safe,
}

/// The board's state and fault bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BoardStatus {
    /// State.
    pub state: BoardState,
    /// One bit a fault; [`bridge::fault_names`] has the words.
    pub faults: u16,
}

/// What the inspector tells the PLC of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostState {
    /// Starting, not inspecting yet.
    Starting,
    /// Inspecting.
    Running,
    /// Stopped or paused by command; parts are not inspected.
    Stopped,
    /// The camera stalls, fails or is gone; parts cannot be inspected.
    CameraFault,
    /// The model or another stage failed.
    InternalFault,
}

/// Link -> pipeline.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum PlcEvent {
    /// A part passed the sensor.
    Trigger(Trigger),
    /// The board has the verdict.
    Acknowledged {
        /// The part.
        part: PartId,
        /// Host time of arrival.
        received_ns: u64,
    },
    /// The link came up or went down.
    Link(LinkState),
    /// The board reports its counters (each about once a second).
    Counters(BoardCounters),
    /// The PLC commands something.
    Command(PlcCommand),
    /// The board's own state changed.
    Board(BoardStatus),
    /// What became of a [`ToPlc::Request`].
    Answer {
        /// What was asked.
        request: BoardRequest,
        /// What became of it.
        status: RequestStatus,
    },
}

/// State of the link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkState {
    /// Port closed or the other side silent.
    Down,
    /// Port open, parameters not agreed yet.
    Connecting,
    /// Running.
    Up,
    /// The board refused our parameters (or we theirs): will not run until the configuration is mended.
    Refused,
}

/// What the board counted since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct BoardCounters {
    /// Parts triggered.
    pub parts: u32,
    /// Parts let through on an accept verdict.
    pub accepted: u32,
    /// Parts rejected, for any reason.
    pub rejected: u32,
    /// Of the rejected, those without a verdict by the deadline.
    pub missed: u32,
    /// Frames with a bad CRC, length, number or codename.
    pub bad_frames: u32,
    /// Parts that passed the gate though they were to be rejected, since the firmware was late; each latches the safe state.
    pub leaked: u32,
}

/// Commands from the PLC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PlcCommand {
    /// Start or resume inspecting.
    Start,
    /// Stop inspecting.
    Stop,
    /// Pause inspecting; parts are rejected by the board meanwhile.
    Pause,
    /// Recipe or product hint.
    Recipe(u16),
    /// A golden sample comes next: check and report.
    GoldenCheck,
}

/// A running link. Dropping it (the last [`LinkSender`]) stops the thread after what is queued has been written.
pub struct LinkHandle {
    /// To the link. Bounded to [`QUEUE_PARTS`]; `try_send` never blocks. Full means the port is stuck: the board's deadline then rejects.
    pub to_plc: LinkSender,
    /// From the link. Bounded to [`QUEUE_PARTS`]; when full, events other than triggers and commands are dropped and counted.
    pub events: Receiver<PlcEvent>,
    /// Called after each event, for a receiver that sleeps in `park` and not on `events`: see [`crate::wake`].
    pub events_waker: Waker,
    /// Latencies and counters, for summaries and metrics.
    pub stats: Arc<LinkStats>,
    /// The thread; ends soon after the last clone of `to_plc` is dropped. Join it to be sure that queued verdicts are written.
    pub thread: Option<std::thread::JoinHandle<()>>,
}

impl LinkHandle {
    /// A link with nothing behind it, for tests of what sits in front of one: the receiver gets what the pipeline sends, and what the
    /// sender is given arrives as the link's events.
    pub fn detached() -> (Self, Receiver<ToPlc>, EventSender) {
        let (to_plc, queue) = crossbeam_channel::bounded(QUEUE_PARTS);
        let (queue_in, events) = crossbeam_channel::bounded(QUEUE_PARTS);
        let events_waker = Waker::default();
        let events_in = EventSender { queue: queue_in, waker: events_waker.clone() };
        let to_plc = LinkSender::new(to_plc, Waker::default());
        (Self { to_plc, events, events_waker, stats: Arc::new(LinkStats::default()), thread: None }, queue, events_in)
    }
}

/// The link's end of the queue of events.
#[derive(Clone, Debug)]
pub struct EventSender {
    queue: Sender<PlcEvent>,
    waker: Waker,
}

impl EventSender {
    /// Queue an event and wake whoever waits for it. Never blocks and never allocates.
    ///
    /// # Errors
    /// `Full` while nobody reads, `Disconnected` when nobody ever will.
    pub fn try_send(&self, event: PlcEvent) -> Result<(), TrySendError<PlcEvent>> {
        self.queue.try_send(event)?;
        self.waker.wake();
        Ok(())
    }
}

/// The pipeline's end of the queue to the link. A message wakes the link's thread at once: no verdict waits for a poll interval. Clones share
/// the queue.
#[derive(Clone, Debug)]
pub struct LinkSender {
    queue: Sender<ToPlc>,
    waker: Waker,
}

impl LinkSender {
    pub(crate) fn new(queue: Sender<ToPlc>, waker: Waker) -> Self {
        Self { queue, waker }
    }

    /// Queue a message and wake the link. Never blocks and never allocates.
    ///
    /// # Errors
    /// `Full` when the port is stuck and [`QUEUE_PARTS`] messages wait, `Disconnected` when the link's thread is gone. Either way the board
    /// rejects the part at its deadline; the caller counts it.
    pub fn try_send(&self, message: ToPlc) -> Result<(), TrySendError<ToPlc>> {
        self.queue.try_send(message)?;
        self.waker.wake();
        Ok(())
    }
}

/// Queue length either way: four times the 64 parts that the board keeps in flight.
pub const QUEUE_PARTS: usize = 256;

/// Why a link cannot run.
#[derive(Debug, thiserror::Error)]
pub enum PlcError {
    /// The configuration names something impossible.
    #[error("PLC link {port}: {why}")]
    Config {
        /// Serial device.
        port: String,
        /// Cause, and what to do.
        why: String,
    },
}

/// Start the configured link; `None` for [`PlcConfig::None`]. A port that cannot be opened yet is not an error: the link keeps trying with
/// back-off and reports [`LinkState::Down`].
///
/// # Errors
/// When the configuration cannot work at all.
pub fn spawn(config: &PlcConfig) -> Result<Option<LinkHandle>, PlcError> {
    match config {
        PlcConfig::None => Ok(None),
        PlcConfig::Bridge(c) => bridge::spawn(c).map(Some),
        PlcConfig::Modbus(c) => modbus::spawn(c).map(Some),
    }
}

/// [`spawn`] with everything that crosses the port shown to `tap`: for a line that may be watched.
///
/// # Errors
/// As [`spawn`].
pub fn spawn_tapped(config: &PlcConfig, tap: Tap) -> Result<Option<LinkHandle>, PlcError> {
    match port_settings(config) {
        Some(settings) => spawn_with(config, Box::new(port::SerialOpener::new(settings)), Some(tap)),
        None => Ok(None),
    }
}

/// [`spawn`] on a port made by `opener`, with everything that crosses it shown to `tap`: for monitors and commissioning.
///
/// # Errors
/// As [`spawn`].
pub fn spawn_with(config: &PlcConfig, opener: Box<dyn port::OpenPort>, tap: Option<Tap>) -> Result<Option<LinkHandle>, PlcError> {
    match config {
        PlcConfig::None => Ok(None),
        PlcConfig::Bridge(c) => bridge::spawn_with(c, opener, tap).map(Some),
        PlcConfig::Modbus(c) => modbus::spawn_with(c, opener, tap).map(Some),
    }
}

/// How the port of a link is set up; `None` for [`PlcConfig::None`].
pub fn port_settings(config: &PlcConfig) -> Option<port::PortSettings> {
    match config {
        PlcConfig::None => None,
        PlcConfig::Bridge(c) => Some(bridge::port_settings(c)),
        PlcConfig::Modbus(c) => Some(modbus::port_settings(c)),
    }
}
