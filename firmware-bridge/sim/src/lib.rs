//! The reject board as a process on a pseudo-terminal: the real [`Board`](firmware_bridge::board::Board), a conveyor model, and a fault injector
//! for the bytes on the line.
//!
//! [`run`] prints one JSON object a line on stdout: first `{"port":"/dev/pts/N"}`, then one per part at the gate, at the end the counters.
//! It reads commands from stdin, one a line (see [`Order`]). What a part did is judged by the conveyor (was the actuator on when the
//! part was at the gate?), not by what the board says of itself; `leaks` in the counters are parts that got through without an accept verdict.
//!
//! May know: the board crate, the terminal, the clock. May not know: the inspector.
#![forbid(unsafe_code)]

mod config;
mod conveyor;
mod faults;
mod run;

pub use config::{FaultConfig, SafeStateConfig, SimConfig};
pub use run::{Order, run};

/// Why the simulated board cannot run.
#[derive(Debug, thiserror::Error)]
pub enum SimError {
    /// A value is impossible.
    #[error("simulated board: {0}")]
    Config(String),
    /// The pseudo-terminal could not be made.
    #[error("simulated board: cannot open a pseudo-terminal ({step}): {source}; is /dev/pts mounted?")]
    Pty {
        /// What failed.
        step: &'static str,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The pseudo-terminal failed while running.
    #[error("simulated board: {what} failed: {source}")]
    Io {
        /// What was done.
        what: &'static str,
        /// The system's answer.
        source: std::io::Error,
    },
}
