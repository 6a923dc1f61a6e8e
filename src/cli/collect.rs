//! `cull collect`: collect pictures of normal parts from a source, or a labelled set from the simulated line.

use anyhow::bail;
use std::process::ExitCode;

/// Arguments of `cull collect`.
#[derive(clap::Args)]
pub struct Args {}

/// Run the command.
pub fn run(_args: Args) -> anyhow::Result<ExitCode> {
    bail!("not built yet")
}
