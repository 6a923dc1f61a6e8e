//! `cull demo`: a simulated line, the real pipeline, a simulated reject board; verdicts, summary and snapshots.

use anyhow::bail;
use std::process::ExitCode;

/// Arguments of `cull demo`.
#[derive(clap::Args)]
pub struct Args {}

/// Run the command.
pub fn run(_args: Args) -> anyhow::Result<ExitCode> {
    bail!("not built yet")
}
