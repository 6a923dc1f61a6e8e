//! `cull run`: inspect a line as configured until SIGTERM or the source ends.

use anyhow::bail;
use std::process::ExitCode;

/// Arguments of `cull run`.
#[derive(clap::Args)]
pub struct Args {}

/// Run the command.
pub fn run(_args: Args) -> anyhow::Result<ExitCode> {
    bail!("not built yet")
}
