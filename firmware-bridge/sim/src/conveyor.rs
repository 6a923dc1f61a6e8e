//! The belt: parts move at constant speed, stop with the line-stop output, and pass the gate. It is the witness of what the actuator really did.

use std::collections::VecDeque;

/// A part on the belt.
#[derive(Clone, Copy, Debug)]
pub struct OnBelt {
    /// The board's number.
    pub part: u32,
    /// Clock at the sensor, us.
    pub trigger_us: u64,
    /// Way at which it is at the gate, us of travel.
    gate_at: u64,
}

/// A belt whose position is its travel time in us.
pub struct Conveyor {
    travelled: u64,
    at: u64,
    moving: bool,
    distance: u64,
    ticks_per_s: u64,
    parts: VecDeque<OnBelt>,
}

impl Conveyor {
    /// An empty belt at clock `now`.
    pub fn new(now: u64, distance_us: u64, ticks_per_s: u32) -> Self {
        Self { travelled: 0, at: now, moving: true, distance: distance_us, ticks_per_s: ticks_per_s.into(), parts: VecDeque::new() }
    }

    /// Move on to `now`.
    pub fn advance(&mut self, now: u64) {
        if self.moving {
            self.travelled += now.saturating_sub(self.at);
        }
        self.at = self.at.max(now);
    }

    /// Start or stop the belt at the present moment.
    pub fn set_moving(&mut self, moving: bool) {
        self.moving = moving;
    }

    /// Whether it moves.
    pub fn moving(&self) -> bool {
        self.moving
    }

    /// The encoder's count; wraps.
    pub fn encoder(&self) -> u32 {
        // Rounded up, so that a part is never at the gate before its tick has come.
        (u128::from(self.travelled) * u128::from(self.ticks_per_s)).div_ceil(1_000_000) as u32
    }

    /// A part is at the sensor now.
    pub fn place(&mut self, part: u32) {
        self.parts.push_back(OnBelt { part, trigger_us: self.at, gate_at: self.travelled + self.distance });
    }

    /// When the next part will be at the gate, if the belt goes on as it does.
    pub fn next_crossing(&self) -> Option<u64> {
        let first = self.parts.front().filter(|_| self.moving)?;
        Some(self.at + first.gate_at.saturating_sub(self.travelled))
    }

    /// A part that is at the gate now.
    pub fn cross(&mut self) -> Option<OnBelt> {
        if self.parts.front()?.gate_at <= self.travelled { self.parts.pop_front() } else { None }
    }
}
