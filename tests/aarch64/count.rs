//! Runs a bundle through kernels, graph and plan alone, without tract: `count BUNDLE FRAMES [THREADS]`. For `run.sh`, which counts its instructions.
#![allow(dead_code)]

#[path = "../../src/kernels/mod.rs"]
pub mod kernels;

#[path = "model.rs"]
mod model;

fn main() -> std::process::ExitCode {
    match model::run() {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("count: {error}");
            std::process::ExitCode::FAILURE
        }
    }
}
