//! The command line: one thin module a command, nothing else.
mod cli;

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    cli::init_log();
    match cli.run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("cull: {error:#}");
            ExitCode::FAILURE
        }
    }
}
