//! `cull plc`: watch and exercise the PLC link.

use anyhow::bail;
use std::process::ExitCode;

/// Arguments of `cull plc`.
#[derive(clap::Args)]
pub struct Args {}

/// Run the command.
pub fn run(_args: Args) -> anyhow::Result<ExitCode> {
    bail!("not built yet")
}
