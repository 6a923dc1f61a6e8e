//! `cull doctor`: cameras, serial ports, CPU and model: OK, warning, what to do.

use anyhow::bail;
use std::process::ExitCode;

/// Arguments of `cull doctor`.
#[derive(clap::Args)]
pub struct Args {}

/// Run the command.
pub fn run(_args: Args) -> anyhow::Result<ExitCode> {
    bail!("not built yet")
}
