//! Settings of the simulated board and its conveyor.

use crate::SimError;
use firmware_bridge::board::BoardConfig;
use firmware_bridge::parameters::{Gate, Parameters, SafeState, Unit};
use serde::Deserialize;

/// Settings of the simulated board. Lengths along the belt are given as travel time at full speed, in ms.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct SimConfig {
    /// Codename of the connection; the host must have the same.
    pub codename: u32,
    /// Time from trigger to the board's own decision, in ms, 10 to 60000.
    pub deadline_ms: u32,
    /// The host counts as dead after this long, in ms, 20 to 10000.
    pub watchdog_ms: u32,
    /// What a dead host leads to.
    pub safe_state: SafeStateConfig,
    /// From the sensor to the gate, in ms. The board tracks 64 parts, so `64 / gate_ms` parts per ms is the fastest line.
    pub gate_ms: u32,
    /// The actuator is switched on this much before the part is there, in ms.
    pub lead_ms: u32,
    /// For how long, in ms; above `lead_ms`.
    pub pulse_ms: u32,
    /// Rejects nearer than this keep the actuator on between them, in ms.
    pub merge_gap_ms: u32,
    /// Encoder ticks per second at full speed; 0 for a line without encoder.
    pub encoder_hz: u32,
    /// Number of the first part.
    pub first_part: u32,
    /// The board's clock starts here, in us (for tests of wrapping stamps).
    pub clock_start_us: u64,
    /// Parts per second from the start; 0 waits for an order on stdin.
    pub pace_hz: f64,
    /// Faults on the line.
    pub faults: FaultConfig,
}

/// What a dead host leads to.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum SafeStateConfig {
    /// The actuator is held on.
    #[default]
    RejectAll,
    /// The belt stops.
    StopLine,
}

/// Faults on the line, both directions. Order is kept, as on a real line.
#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct FaultConfig {
    /// Share of bytes lost, 0 to 1.
    pub drop: f64,
    /// Share of bytes that come twice, 0 to 1.
    pub duplicate: f64,
    /// Share of bytes changed, 0 to 1.
    pub corrupt: f64,
    /// Share of writes held back, 0 to 1.
    pub delay: f64,
    /// For how long at most, in ms.
    pub delay_max_ms: u32,
    /// Same seed, same faults.
    pub seed: u64,
}

impl Default for SimConfig {
    fn default() -> Self {
        Self {
            codename: BoardConfig::default().codename,
            deadline_ms: 500,
            watchdog_ms: 500,
            safe_state: SafeStateConfig::RejectAll,
            gate_ms: 600,
            // A fast air valve; `flat` keeps parts a pulse apart, so 8 ms allow 117 parts per second.
            lead_ms: 4,
            pulse_ms: 8,
            merge_gap_ms: 0,
            encoder_hz: 0,
            first_part: 1,
            clock_start_us: 0,
            pace_hz: 0.0,
            faults: FaultConfig::default(),
        }
    }
}

impl SimConfig {
    /// The board's own configuration.
    ///
    /// # Errors
    /// When a value is out of range.
    pub fn board(&self) -> Result<BoardConfig, SimError> {
        let length = |ms: u32| -> Result<u32, SimError> {
            let units = match self.encoder_hz {
                0 => u64::from(ms) * 1000,
                hz => u64::from(ms) * u64::from(hz) / 1000,
            };
            u32::try_from(units).map_err(|_| SimError::Config(format!("{ms} ms is too long a way on this belt")))
        };
        let f = &self.faults;
        for (name, share) in [("drop", f.drop), ("duplicate", f.duplicate), ("corrupt", f.corrupt), ("delay", f.delay)] {
            if !(0.0..=1.0).contains(&share) {
                return Err(SimError::Config(format!("faults.{name} is {share}; allowed is 0 to 1")));
            }
        }
        if !(0.0..=10_000.0).contains(&self.pace_hz) {
            return Err(SimError::Config(format!("pace_hz is {}; allowed is 0 to 10000", self.pace_hz)));
        }
        let parameters = Parameters {
            deadline_ms: self.deadline_ms,
            watchdog_ms: self.watchdog_ms,
            safe_state: match self.safe_state {
                SafeStateConfig::RejectAll => SafeState::RejectAll,
                SafeStateConfig::StopLine => SafeState::StopLine,
            },
            gate: Gate {
                unit: if self.encoder_hz == 0 { Unit::Time } else { Unit::Ticks },
                distance: length(self.gate_ms)?,
                lead: length(self.lead_ms)?,
                duration: length(self.pulse_ms)?,
                merge_gap: length(self.merge_gap_ms)?,
            },
        };
        parameters.check().map_err(|error| SimError::Config(error.to_string()))?;
        Ok(BoardConfig { codename: self.codename, parameters, first_part: self.first_part, ..BoardConfig::default() })
    }
}
