//! `cull bench`: time the model.

use anyhow::bail;
use std::process::ExitCode;

/// Arguments of `cull bench`.
#[derive(clap::Args)]
pub struct Args {}

/// Run the command.
pub fn run(_args: Args) -> anyhow::Result<ExitCode> {
    bail!("not built yet")
}
