//! `cull sim-board`: the simulated reject board on a pseudo-terminal (what the demo starts as its own process).

use clap::ValueEnum;
use firmware_bridge_sim::{FaultConfig, SafeStateConfig, SimConfig};
use std::process::ExitCode;

/// Arguments of `cull sim-board`. Defaults are those of [`SimConfig`] and fit the defaults of `plc: Bridge(…)` in the configuration.
#[derive(clap::Args)]
pub struct Args {
    /// Codename of the connection; the same number as in the inspector's configuration
    #[arg(long, default_value_t = SimConfig::default().codename)]
    codename: u32,
    /// Time from trigger to the board's own decision, in ms
    #[arg(long, default_value_t = SimConfig::default().deadline_ms)]
    deadline_ms: u32,
    /// The host counts as dead after this long, in ms
    #[arg(long, default_value_t = SimConfig::default().watchdog_ms)]
    watchdog_ms: u32,
    /// What a dead host leads to
    #[arg(long, value_enum, default_value_t = SafeState::RejectAll)]
    safe_state: SafeState,
    /// From the sensor to the gate, in ms of travel; 64 parts fit between them
    #[arg(long, default_value_t = SimConfig::default().gate_ms)]
    gate_ms: u32,
    /// The actuator is switched on this much before the part is at the gate, in ms
    #[arg(long, default_value_t = SimConfig::default().lead_ms)]
    lead_ms: u32,
    /// How long the actuator stays on for one part, in ms
    #[arg(long, default_value_t = SimConfig::default().pulse_ms)]
    pulse_ms: u32,
    /// Rejects nearer than this keep the actuator on between them, in ms
    #[arg(long, default_value_t = SimConfig::default().merge_gap_ms)]
    merge_gap_ms: u32,
    /// Encoder ticks per second; 0 for a line without encoder
    #[arg(long, default_value_t = SimConfig::default().encoder_hz)]
    encoder_hz: u32,
    /// Parts per second from the start; 0 waits for an order on stdin (pace HZ, flat K, stop, clear, quit, …)
    #[arg(long, default_value_t = SimConfig::default().pace_hz)]
    pace_hz: f64,
    /// Share of bytes lost on the line, 0 to 1
    #[arg(long, default_value_t = 0.0)]
    drop: f64,
    /// Share of bytes doubled on the line, 0 to 1
    #[arg(long, default_value_t = 0.0)]
    duplicate: f64,
    /// Share of bytes changed on the line, 0 to 1
    #[arg(long, default_value_t = 0.0)]
    corrupt: f64,
    /// Share of writes held back, 0 to 1
    #[arg(long, default_value_t = 0.0)]
    delay: f64,
    /// Longest time a write is held back, in ms
    #[arg(long, default_value_t = 0)]
    delay_max_ms: u32,
    /// Same seed, same faults
    #[arg(long, default_value_t = 0)]
    fault_seed: u64,
}

/// What a dead host leads to.
#[derive(Clone, Copy, ValueEnum)]
enum SafeState {
    /// The actuator is held on
    RejectAll,
    /// The belt stops
    StopLine,
}

/// Run the command.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    firmware_bridge_sim::run(SimConfig {
        codename: args.codename,
        deadline_ms: args.deadline_ms,
        watchdog_ms: args.watchdog_ms,
        safe_state: match args.safe_state {
            SafeState::RejectAll => SafeStateConfig::RejectAll,
            SafeState::StopLine => SafeStateConfig::StopLine,
        },
        gate_ms: args.gate_ms,
        lead_ms: args.lead_ms,
        pulse_ms: args.pulse_ms,
        merge_gap_ms: args.merge_gap_ms,
        encoder_hz: args.encoder_hz,
        pace_hz: args.pace_hz,
        faults: FaultConfig {
            drop: args.drop,
            duplicate: args.duplicate,
            corrupt: args.corrupt,
            delay: args.delay,
            delay_max_ms: args.delay_max_ms,
            seed: args.fault_seed,
        },
        ..SimConfig::default()
    })?;
    Ok(ExitCode::SUCCESS)
}
