//! `cull sim-board`: the simulated reject board on a pseudo-terminal (what the demo starts as its own process).

use anyhow::bail;
use std::process::ExitCode;

/// Arguments of `cull sim-board`.
#[derive(clap::Args)]
pub struct Args {}

/// Run the command.
pub fn run(_args: Args) -> anyhow::Result<ExitCode> {
    bail!("not built yet")
}
