//! `cull eval`: detection metrics over a folder in MVTec-AD layout.

use anyhow::bail;
use std::process::ExitCode;

/// Arguments of `cull eval`.
#[derive(clap::Args)]
pub struct Args {}

/// Run the command.
pub fn run(_args: Args) -> anyhow::Result<ExitCode> {
    bail!("not built yet")
}
