//! The PLC link: native bridge protocol, Modbus RTU; one handle, reconnecting.
//!
//! One thread per link reads and writes the port. The pipeline sees two bounded channels and a state; it never waits for the port.
//! The link knows nothing of frames, models or files.

use crate::config::PlcConfig;
use crate::frame::PartId;
use crate::source::Trigger;
use crate::verdict::Verdict;
use crossbeam_channel::{Receiver, Sender};

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

/// A running link. Dropping it stops the thread after what is queued has been written.
pub struct LinkHandle {
    /// To the link. Bounded to [`QUEUE_PARTS`]; use `try_send` on the hot path. Full means the port is stuck: the board's deadline then rejects.
    pub to_plc: Sender<ToPlc>,
    /// From the link. Bounded to [`QUEUE_PARTS`]; when full, events other than triggers are dropped and counted.
    pub events: Receiver<PlcEvent>,
    /// The thread; ends soon after `to_plc` is dropped.
    pub thread: Option<std::thread::JoinHandle<()>>,
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
        PlcConfig::Bridge(c) => Err(PlcError::Config { port: c.port.display().to_string(), why: "not built yet".into() }),
        PlcConfig::Modbus(c) => Err(PlcError::Config { port: c.port.display().to_string(), why: "not built yet".into() }),
    }
}
