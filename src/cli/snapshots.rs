//! `cull snapshots`: list and export defect pictures.

use anyhow::bail;
use std::process::ExitCode;

/// Arguments of `cull snapshots`.
#[derive(clap::Args)]
pub struct Args {}

/// Run the command.
pub fn run(_args: Args) -> anyhow::Result<ExitCode> {
    bail!("not built yet")
}
