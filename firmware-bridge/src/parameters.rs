//! What host and board must agree on before a part may be accepted.
//!
//! The board owns the parameters, since it sits at the actuator; it sends them in the handshake. The host compares those it has an opinion on
//! and refuses to run on any difference. Afterwards they are part of every frame's CRC, so neither side can go on with others.

use crate::Micros;
use crate::wire::{Reader, Writer};

/// What the board does when the host is dead, and before there is a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum SafeState {
    /// The reject actuator is held on: everything that passes the gate is rejected, whether it was tracked or not.
    RejectAll = 1,
    /// The line-stop output is on; parts that still coast to the gate are rejected one by one unless they have their accept verdict.
    StopLine = 2,
}

impl SafeState {
    fn from_wire(value: u8) -> Option<Self> {
        match value {
            1 => Some(Self::RejectAll),
            2 => Some(Self::StopLine),
            _ => None,
        }
    }
}

/// What the gate's position is measured in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Unit {
    /// Microseconds since the trigger: for a line of constant speed without encoder.
    Time = 1,
    /// Encoder ticks since the trigger: follows the conveyor through every change of speed and every stop.
    Ticks = 2,
}

impl Unit {
    fn from_wire(value: u8) -> Option<Self> {
        match value {
            1 => Some(Self::Time),
            2 => Some(Self::Ticks),
            _ => None,
        }
    }
}

/// Where the gate is and how the actuator works it. All four lengths are in [`unit`](Gate::unit), so that one rule schedules both kinds of line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gate {
    /// Microseconds or ticks.
    pub unit: Unit,
    /// From the trigger sensor to the gate. Above `lead`, at most [`MAX_LENGTH`].
    pub distance: u32,
    /// The actuator is switched on this much before the part is at the gate: its response time, and at least the distance between two polls.
    /// Also the point of no return: a part without verdict there is rejected, even before its deadline. At least 1.
    pub lead: u32,
    /// How long the actuator stays on for one part. Above `lead`, so that it is still on when the part is there.
    pub duration: u32,
    /// Two rejects nearer than this keep the actuator on between them, to spare it; a good part in the gap is rejected with them. 0 for never.
    pub merge_gap: u32,
}

/// Upper limit of every length in [`Gate`]: a quarter of the encoder's 32 bits, so that differences never become ambiguous.
pub const MAX_LENGTH: u32 = 1 << 30;

/// Everything that is agreed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parameters {
    /// The board decides by itself (reject, counted as missed) this long after the trigger. 10 to 60000 ms.
    pub deadline_ms: u32,
    /// The other side counts as dead after this long without a proof of life. 20 to 10000 ms.
    pub watchdog_ms: u32,
    /// What then happens.
    pub safe_state: SafeState,
    /// The gate.
    pub gate: Gate,
}

/// Shortest heartbeat interval: below it heartbeats alone would fill most of a 115200-baud line (25 bytes take 2.2 ms).
const MIN_HEARTBEAT_US: Micros = 5_000;
/// Heartbeats per watchdog time: a proof of life is up to two intervals old when the next one is due, so five may be lost in a row.
const HEARTBEATS_PER_WATCHDOG: Micros = 8;

/// A parameter that differs or is out of range, by its number on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Field {
    /// Protocol version ranges have nothing in common. The values are the highest version of each side.
    Version = 1,
    /// Codename of the connection.
    Codename = 2,
    /// [`Parameters::deadline_ms`].
    DeadlineMs = 3,
    /// [`Parameters::watchdog_ms`].
    WatchdogMs = 4,
    /// [`Parameters::safe_state`].
    SafeState = 5,
    /// [`Gate::unit`].
    GateUnit = 6,
    /// [`Gate::distance`].
    GateDistance = 7,
    /// [`Gate::lead`].
    GateLead = 8,
    /// [`Gate::duration`].
    GateDuration = 9,
    /// [`Gate::merge_gap`].
    GateMergeGap = 10,
}

impl Field {
    /// The field with this number.
    pub fn from_wire(value: u8) -> Option<Self> {
        Some(match value {
            1 => Self::Version,
            2 => Self::Codename,
            3 => Self::DeadlineMs,
            4 => Self::WatchdogMs,
            5 => Self::SafeState,
            6 => Self::GateUnit,
            7 => Self::GateDistance,
            8 => Self::GateLead,
            9 => Self::GateDuration,
            10 => Self::GateMergeGap,
            _ => return None,
        })
    }

    /// Name as in configurations.
    pub fn name(self) -> &'static str {
        match self {
            Self::Version => "version",
            Self::Codename => "codename",
            Self::DeadlineMs => "deadline_ms",
            Self::WatchdogMs => "watchdog_ms",
            Self::SafeState => "safe_state",
            Self::GateUnit => "gate.unit",
            Self::GateDistance => "gate.distance",
            Self::GateLead => "gate.lead",
            Self::GateDuration => "gate.duration",
            Self::GateMergeGap => "gate.merge_gap",
        }
    }
}

impl core::fmt::Display for Field {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(self.name())
    }
}

/// A parameter outside its range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfRange {
    /// Which.
    pub field: Field,
    /// Its value.
    pub value: u32,
    /// Least value allowed.
    pub min: u32,
    /// Largest value allowed.
    pub max: u32,
}

impl core::fmt::Display for OutOfRange {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "board parameter {} is {}; allowed is {} to {}", self.field, self.value, self.min, self.max)
    }
}

#[cfg(feature = "std")]
impl std::error::Error for OutOfRange {}

impl Default for Parameters {
    /// A conveyor at constant speed: gate 600 ms behind the sensor, deadline 500 ms.
    fn default() -> Self {
        Self {
            deadline_ms: 500,
            watchdog_ms: 500,
            safe_state: SafeState::RejectAll,
            gate: Gate { unit: Unit::Time, distance: 600_000, lead: 20_000, duration: 40_000, merge_gap: 10_000 },
        }
    }
}

impl Parameters {
    /// Bytes on the wire.
    pub const LEN: usize = 26;

    /// The first value outside its range, if any.
    ///
    /// # Errors
    /// Names the field and its range.
    pub fn check(&self) -> Result<(), OutOfRange> {
        let g = &self.gate;
        for (field, value, min, max) in [
            (Field::DeadlineMs, self.deadline_ms, 10, 60_000),
            (Field::WatchdogMs, self.watchdog_ms, 20, 10_000),
            (Field::GateLead, g.lead, 1, MAX_LENGTH.saturating_sub(1)),
            (Field::GateDistance, g.distance, g.lead.saturating_add(1), MAX_LENGTH),
            (Field::GateDuration, g.duration, g.lead.saturating_add(1), MAX_LENGTH),
            (Field::GateMergeGap, g.merge_gap, 0, MAX_LENGTH),
        ] {
            if value < min || value > max {
                return Err(OutOfRange { field, value, min, max });
            }
        }
        Ok(())
    }

    /// Interval of heartbeats, and of repeats of what was not acknowledged.
    pub fn heartbeat_us(&self) -> Micros {
        (Micros::from(self.watchdog_ms).wrapping_mul(1000) / HEARTBEATS_PER_WATCHDOG).max(MIN_HEARTBEAT_US)
    }

    /// [`Parameters::watchdog_ms`] in microseconds.
    pub fn watchdog_us(&self) -> Micros {
        Micros::from(self.watchdog_ms).wrapping_mul(1000)
    }

    /// [`Parameters::deadline_ms`] in microseconds.
    pub fn deadline_us(&self) -> Micros {
        Micros::from(self.deadline_ms).wrapping_mul(1000)
    }

    pub(crate) fn write(&self, w: &mut Writer<'_>) {
        w.u32(self.deadline_ms);
        w.u32(self.watchdog_ms);
        w.u8(self.safe_state as u8);
        w.u8(self.gate.unit as u8);
        w.u32(self.gate.distance);
        w.u32(self.gate.lead);
        w.u32(self.gate.duration);
        w.u32(self.gate.merge_gap);
    }

    pub(crate) fn read(r: &mut Reader<'_>) -> Option<Self> {
        Some(Self {
            deadline_ms: r.u32()?,
            watchdog_ms: r.u32()?,
            safe_state: SafeState::from_wire(r.u8()?)?,
            gate: Gate { unit: Unit::from_wire(r.u8()?)?, distance: r.u32()?, lead: r.u32()?, duration: r.u32()?, merge_gap: r.u32()? },
        })
    }
}

/// What the host insists on; `None` takes the board's word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expected {
    /// [`Parameters::deadline_ms`].
    pub deadline_ms: u32,
    /// [`Parameters::watchdog_ms`].
    pub watchdog_ms: u32,
    /// [`Parameters::safe_state`].
    pub safe_state: Option<SafeState>,
    /// [`Parameters::gate`].
    pub gate: Option<Gate>,
}

impl Default for Expected {
    fn default() -> Self {
        let p = Parameters::default();
        Self { deadline_ms: p.deadline_ms, watchdog_ms: p.watchdog_ms, safe_state: None, gate: None }
    }
}

/// A difference between the two sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// Which parameter.
    pub field: Field,
    /// This side's value.
    pub ours: u32,
    /// The other side's value.
    pub theirs: u32,
}

impl core::fmt::Display for Mismatch {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{} differs: {} here, {} on the other side; set both to the same value", self.field, self.ours, self.theirs)
    }
}

impl Expected {
    /// The first difference from what the board has.
    pub fn compare(&self, board: &Parameters) -> Option<Mismatch> {
        let safe = self.safe_state.unwrap_or(board.safe_state);
        let gate = self.gate.unwrap_or(board.gate);
        [
            (Field::DeadlineMs, self.deadline_ms, board.deadline_ms),
            (Field::WatchdogMs, self.watchdog_ms, board.watchdog_ms),
            (Field::SafeState, safe as u32, board.safe_state as u32),
            (Field::GateUnit, gate.unit as u32, board.gate.unit as u32),
            (Field::GateDistance, gate.distance, board.gate.distance),
            (Field::GateLead, gate.lead, board.gate.lead),
            (Field::GateDuration, gate.duration, board.gate.duration),
            (Field::GateMergeGap, gate.merge_gap, board.gate.merge_gap),
        ]
        .into_iter()
        .find(|(_, ours, theirs)| ours != theirs)
        .map(|(field, ours, theirs)| Mismatch { field, ours, theirs })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_is_in_range_and_each_limit_is_held() {
        let good = Parameters::default();
        assert_eq!(good.check(), Ok(()));
        let bad = |change: fn(&mut Parameters)| {
            let mut p = Parameters::default();
            change(&mut p);
            p.check().map_err(|e| e.field)
        };
        assert_eq!(bad(|p| p.deadline_ms = 9), Err(Field::DeadlineMs));
        assert_eq!(bad(|p| p.watchdog_ms = 10_001), Err(Field::WatchdogMs));
        assert_eq!(bad(|p| p.gate.lead = 0), Err(Field::GateLead));
        assert_eq!(bad(|p| p.gate.distance = p.gate.lead), Err(Field::GateDistance));
        assert_eq!(bad(|p| p.gate.duration = p.gate.lead), Err(Field::GateDuration));
        assert_eq!(bad(|p| p.gate.merge_gap = u32::MAX), Err(Field::GateMergeGap));
    }

    #[test]
    fn a_difference_names_the_field() {
        let board = Parameters::default();
        let mut ours = Expected { gate: Some(board.gate), safe_state: Some(board.safe_state), ..Expected::default() };
        assert_eq!(ours.compare(&board), None);
        ours.deadline_ms = 400;
        let difference = ours.compare(&board).unwrap();
        assert_eq!(std::format!("{difference}"), "deadline_ms differs: 400 here, 500 on the other side; set both to the same value");
        ours.deadline_ms = 500;
        ours.gate = Some(Gate { lead: 1, ..board.gate });
        assert_eq!(ours.compare(&board).map(|m| m.field), Some(Field::GateLead));
    }
}
