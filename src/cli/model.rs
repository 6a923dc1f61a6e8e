//! `cull model`: describe, verify and pack model bundles.

use anyhow::bail;
use std::process::ExitCode;

/// Arguments of `cull model`.
#[derive(clap::Args)]
pub struct Args {}

/// Run the command.
pub fn run(_args: Args) -> anyhow::Result<ExitCode> {
    bail!("not built yet")
}
