//! When the reject actuator is on: parts between sensor and gate, their decisions, their windows.
//!
//! Everything is measured in one coordinate, the *position*: microseconds or encoder ticks ([`Unit`]). A part seen by the sensor at position `s`
//! is at the gate at `s + distance`; its reject window is `[s + distance - lead, s + distance - lead + duration)`. At the window's start, or at
//! the deadline if that is earlier, a part without verdict is decided: reject, counted as missed.
//!
//! May know: parts, positions, decisions. May not know: frames, sessions (but for the epoch number), pins.

use crate::Micros;
use crate::parameters::{Gate, Parameters, Unit};
use crate::session::since;
use crate::wire::{Decision, Status};

/// Parts tracked between sensor and gate. One more latches a fault and holds the actuator until the untracked part is past the gate.
pub const MAX_PARTS: usize = 64;

/// Two sensor edges this far apart in time with no encoder tick between them: the encoder is dead (or somebody holds a hand before the sensor of a
/// standing line, which looks the same and is cleared the same). Nearer edges are the bounce of one.
pub const ENCODER_DEAD_US: Micros = 20_000;

/// What has been decided on a part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Nothing yet.
    Open,
    /// Its accept verdict came in time.
    Accept,
    /// Another verdict came in time.
    Reject(Decision),
    /// No verdict came in time.
    Missed,
}

/// A part between sensor and gate.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slot {
    pub(crate) part: u32,
    /// Position at the sensor.
    at: i64,
    pub(crate) time: Micros,
    pub(crate) encoder: u32,
    /// Session in which it was announced; 0 for none.
    epoch: u32,
    fate: Fate,
    /// Past the gate; only its window is left.
    gated: bool,
    /// When the trigger message is due again; `None` once acknowledged, or where there is no session to tell.
    pub(crate) announce: Option<Micros>,
}

/// How a part left the line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The actuator was off and the part had its accept verdict.
    Accepted,
    /// The actuator was on.
    Rejected,
    /// The actuator was off though the part was to be rejected: the firmware polled too late. Latches a fault.
    Leaked,
}

/// A part passed the gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AtGate {
    /// The part.
    pub part: u32,
    /// What happened.
    pub outcome: Outcome,
    /// What had been decided.
    pub fate: Fate,
    /// The actuator was held on (safe state, not ready, or an untracked part under way).
    pub held: bool,
}

/// What the scheduler found in one step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// A part got its fate without a verdict.
    Missed {
        /// The part.
        part: u32,
    },
    /// A part passed the gate.
    AtGate(AtGate),
}

/// A sensor edge that needs attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Edge {
    /// Tracked.
    Tracked,
    /// No room: the actuator is held until this part is past the gate.
    NoRoom,
    /// The encoder did not move since the edge before.
    EncoderDead,
}

/// The scheduler.
#[derive(Clone, Debug)]
pub struct Schedule {
    gate: Gate,
    deadline_us: Micros,
    slots: [Option<Slot>; MAX_PARTS],
    /// Position now.
    position: i64,
    encoder: Option<u32>,
    /// Time and encoder of the last edge.
    last_edge: Option<(Micros, u32)>,
    /// Untracked parts may pass the gate until here; `None` once past. At the start: whatever lay on the belt before.
    untracked_until: Option<i64>,
    /// Begin such a hold at the next step, when the position is known.
    untracked_now: bool,
    /// End of the newest window entered, for merging.
    window_end: i64,
    on: bool,
    held: bool,
}

impl Schedule {
    /// An empty line as far as anybody knows; the actuator is held until what may lie between sensor and gate has passed.
    pub fn new(parameters: &Parameters, now: Micros) -> Self {
        let mut schedule = Self {
            gate: parameters.gate,
            deadline_us: parameters.deadline_us(),
            slots: [None; MAX_PARTS],
            position: 0,
            encoder: None,
            last_edge: None,
            untracked_until: None,
            untracked_now: true,
            window_end: i64::MIN,
            on: true,
            held: true,
        };
        if schedule.gate.unit == Unit::Time {
            schedule.position = now as i64;
        }
        schedule
    }

    /// Hold the actuator until a part that is at the sensor at the next step is past the gate.
    pub fn hold_for_untracked(&mut self) {
        self.untracked_now = true;
    }

    /// Position at which the window of a part seen at `at` opens.
    fn open(&self, at: i64) -> i64 {
        self.gate_position(at).wrapping_sub(self.gate.lead.into())
    }

    fn gate_position(&self, at: i64) -> i64 {
        at.wrapping_add(self.gate.distance.into())
    }

    fn close(&self, at: i64) -> i64 {
        self.open(at).wrapping_add(self.gate.duration.into())
    }

    fn advance(&mut self, now: Micros, encoder: u32) {
        match self.gate.unit {
            Unit::Time => self.position = self.position.max(now as i64),
            Unit::Ticks => {
                // The count wraps, and goes back when the belt does.
                let moved = encoder.wrapping_sub(self.encoder.unwrap_or(encoder)) as i32;
                self.position = self.position.wrapping_add(moved.into());
                self.encoder = Some(encoder);
            }
        }
    }

    /// A part is at the sensor. `epoch` is the session's number, 0 without a session.
    pub fn edge(&mut self, now: Micros, encoder: u32, part: u32, epoch: u32) -> Edge {
        self.advance(now, encoder);
        let dead = self.gate.unit == Unit::Ticks
            && self.last_edge.is_some_and(|(time, count)| count == encoder && since(now, time) >= ENCODER_DEAD_US);
        self.last_edge = Some((now, encoder));
        // An edge's time stamp may be a little older than the last step: where the part is counts, not where the step was.
        let at = if self.gate.unit == Unit::Time { now as i64 } else { self.position };
        let slot = Slot { part, at, time: now, encoder, epoch, fate: Fate::Open, gated: false, announce: (epoch != 0).then_some(now) };
        match self.slots.iter_mut().find(|slot| slot.is_none()) {
            Some(free) => *free = Some(slot),
            None => {
                self.hold_for_untracked();
                return Edge::NoRoom;
            }
        }
        if dead { Edge::EncoderDead } else { Edge::Tracked }
    }

    /// A verdict came in session `epoch`. Accept counts only for a part announced in that session, not yet decided and not yet at the point of
    /// no return; a later verdict may turn an accept into a reject, never the reverse.
    pub fn verdict(&mut self, now: Micros, part: u32, decision: Decision, epoch: u32) -> Status {
        let (position, deadline_us) = (if self.gate.unit == Unit::Time { now as i64 } else { self.position }, self.deadline_us);
        let (distance, lead) = (self.gate.distance, self.gate.lead);
        let Some(slot) = self.slots.iter_mut().flatten().find(|slot| slot.part == part && slot.epoch == epoch && epoch != 0) else {
            return Status::UnknownPart;
        };
        slot.announce = None; // whoever judges a part has heard of it
        let open = slot.at.wrapping_add(distance.into()).wrapping_sub(lead.into());
        let in_time = position < open && since(now, slot.time) < deadline_us;
        match (slot.fate, decision) {
            (Fate::Open, _) if !in_time => Status::TooLate,
            (Fate::Open, Decision::Accept) => {
                slot.fate = Fate::Accept;
                Status::Taken
            }
            (Fate::Open, _) => {
                slot.fate = Fate::Reject(decision);
                Status::Taken
            }
            (Fate::Accept, Decision::Accept) | (Fate::Reject(_), _) => Status::Taken,
            (Fate::Accept, _) if position < open => {
                slot.fate = Fate::Reject(decision);
                Status::Taken
            }
            (Fate::Accept, _) | (Fate::Missed, _) => Status::TooLate,
        }
    }

    /// Move on to now and set the actuator. `hold`: keep it on whatever the parts say.
    pub fn step(&mut self, now: Micros, encoder: u32, hold: bool, sink: &mut impl FnMut(Step)) {
        self.advance(now, encoder);
        let position = self.position;
        if core::mem::take(&mut self.untracked_now) {
            self.untracked_until = Some(self.close(position));
        }
        if self.untracked_until.is_some_and(|until| position >= until) {
            self.untracked_until = None;
        }
        let (was_on, was_held) = (self.on, self.held);
        let gate = self.gate;
        let (mut inside, mut next_near) = (false, false);
        let mut window_end = self.window_end;
        for entry in &mut self.slots {
            let Some(slot) = entry else { continue };
            let gate_at = slot.at.wrapping_add(gate.distance.into());
            let open = gate_at.wrapping_sub(gate.lead.into());
            let close = open.wrapping_add(gate.duration.into());
            if slot.fate == Fate::Open && (position >= open || since(now, slot.time) >= self.deadline_us) {
                slot.fate = Fate::Missed;
                slot.announce = None;
                sink(Step::Missed { part: slot.part });
            }
            if !slot.gated && position >= gate_at {
                slot.gated = true;
                // What counts is what the actuator did until now.
                let outcome = match (was_on, slot.fate) {
                    (true, _) => Outcome::Rejected,
                    (false, Fate::Accept) => Outcome::Accepted,
                    (false, _) => Outcome::Leaked,
                };
                sink(Step::AtGate(AtGate { part: slot.part, outcome, fate: slot.fate, held: was_held }));
            }
            let rejected = !matches!(slot.fate, Fate::Open | Fate::Accept);
            if rejected && position >= open && position < close {
                inside = true;
                window_end = window_end.max(close);
            }
            if rejected && open > position && open.wrapping_sub(self.window_end) <= gate.merge_gap.into() {
                next_near = true;
            }
            if slot.gated && (slot.fate == Fate::Accept || position >= close) {
                *entry = None;
            }
        }
        self.window_end = window_end;
        self.held = hold || self.untracked_until.is_some();
        // Between two near windows the actuator stays as it is.
        self.on = self.held || inside || (was_on && !was_held && next_near);
    }

    /// The actuator, as of the last step.
    pub fn is_on(&self) -> bool {
        self.on
    }

    /// Parts between sensor and gate.
    pub fn in_flight(&self) -> usize {
        self.slots.iter().flatten().filter(|slot| !slot.gated).count()
    }

    /// No part, and no window still open.
    pub fn is_empty(&self) -> bool {
        self.slots.iter().all(Option::is_none)
    }

    /// Every tracked position is worthless (the encoder failed): whatever is on the belt counts as untracked, and what was accepted no longer is.
    pub fn distrust_positions(&mut self) {
        for slot in self.slots.iter_mut().flatten().filter(|slot| !slot.gated) {
            slot.fate = Fate::Missed;
        }
        self.hold_for_untracked();
        // The hold begins here, so none of them counts as leaked.
        (self.on, self.held) = (true, true);
    }

    pub(crate) fn slots_mut(&mut self) -> impl Iterator<Item = &mut Slot> {
        self.slots.iter_mut().flatten()
    }

    /// When something changes next by time alone.
    pub fn wake(&self, now: Micros) -> Micros {
        let mut wake = Micros::MAX;
        for slot in self.slots.iter().flatten() {
            if slot.fate == Fate::Open {
                wake = wake.min(slot.time.saturating_add(self.deadline_us));
            }
            if self.gate.unit == Unit::Time {
                for position in [self.open(slot.at), self.gate_position(slot.at), self.close(slot.at)] {
                    if position > self.position {
                        wake = wake.min(position as Micros);
                    }
                }
            }
        }
        match (self.gate.unit, self.untracked_until) {
            (Unit::Time, Some(until)) => wake.min(until as Micros),
            // Ticks come when they come.
            (Unit::Ticks, _) if !self.is_empty() => wake.min(now.saturating_add(TICKS_POLL_US)),
            _ => wake,
        }
    }
}

/// With an encoder, poll this often while parts are under way; the lead must cover the way the belt goes in it.
pub const TICKS_POLL_US: Micros = 500;
