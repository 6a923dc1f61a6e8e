//! The command line: one thin module a command, nothing else.
mod cli;

use clap::Parser;
use std::process::ExitCode;

/// Counts what the hot path allocates; other threads pay one thread-local read per allocation.
#[global_allocator]
static ALLOCATOR: cull::kernels::alloc::CountingAllocator = cull::kernels::alloc::CountingAllocator;

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    cli::log::init();
    let result = cli.run();
    cli::log::flush();
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("cull: {error:#}");
            ExitCode::FAILURE
        }
    }
}
