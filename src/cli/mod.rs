//! Command-line definitions. Each command is a module with `Args` and `run`; the library does the work.

mod bench;
mod calibrate;
mod check;
mod collect;
mod demo;
mod doctor;
mod eval;
pub mod log;
mod model;
mod plc;
mod run;
mod sim_board;
mod snapshots;
mod summary;
mod table;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Headless visual inspector: finds defects in parts of any product with one model and tells the PLC in time.
#[derive(Parser)]
#[command(version, arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Simulated line and reject board through the real pipeline; needs no camera, PLC or configuration
    Demo(demo::Args),
    /// Inspect a line as configured, until SIGTERM or the source ends
    Run(run::Args),
    /// Check a configuration without running
    Check(check::Args),
    /// Look at cameras, serial ports, CPU and model; say what to do
    Doctor(doctor::Args),
    /// Detection metrics over a folder in MVTec-AD layout
    Eval(eval::Args),
    /// Set a model's threshold anew from good parts that it was not trained on
    Calibrate(calibrate::Args),
    /// Collect pictures of normal parts, or write the simulated line out as a labelled data set
    Collect(collect::Args),
    /// Time the model on this machine
    Bench(bench::Args),
    /// Describe, verify and pack model bundles
    Model(model::Args),
    /// Watch and exercise the PLC link
    Plc(plc::Args),
    /// List defect pictures
    Snapshots(snapshots::Args),
    /// The simulated reject board (started by `demo` as its own process)
    #[command(hide = true)]
    SimBoard(sim_board::Args),
}

impl Cli {
    /// Run the chosen command.
    ///
    /// # Errors
    /// Whatever the command reports; `main` prints it once.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        match self.command {
            Command::Demo(args) => demo::run(args),
            Command::Run(args) => run::run(args),
            Command::Check(args) => check::run(args),
            Command::Doctor(args) => doctor::run(args),
            Command::Eval(args) => eval::run(args),
            Command::Calibrate(args) => calibrate::run(args),
            Command::Collect(args) => collect::run(args),
            Command::Bench(args) => bench::run(args),
            Command::Model(args) => model::run(args),
            Command::Plc(args) => plc::run(args),
            Command::Snapshots(args) => snapshots::run(args),
            Command::SimBoard(args) => sim_board::run(args),
        }
    }
}
