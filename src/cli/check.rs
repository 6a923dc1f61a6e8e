//! `cull check`: check a configuration without running.

use anyhow::bail;
use std::process::ExitCode;

/// Arguments of `cull check`.
#[derive(clap::Args)]
pub struct Args {}

/// Run the command.
pub fn run(_args: Args) -> anyhow::Result<ExitCode> {
    bail!("not built yet")
}
