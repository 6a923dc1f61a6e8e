//! The command line of the trainer: arguments, progress bars, nothing else.

mod cli;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Train one UniAD model for all products and write the bundle that `cull` runs.
#[derive(Parser)]
#[command(version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Train on a folder of normal images and write a bundle
    Train(Box<cli::train::Args>),
    /// Turn published EfficientNet weights (.pth, .safetensors) into an ONNX backbone
    ImportBackbone(cli::import::Args),
    /// Show the identical shortcut: the paper's components switched off one by one on a small set
    Ablate(cli::ablate::Args),
    /// Make a backbone of your own: a slim student that reproduces a teacher's features
    Distill(cli::distill::Args),
    /// Train a detector of small defects: good parts with made-up defects drawn on them, no defective part needed
    Detect(Box<cli::detect::Args>),
}

fn main() -> ExitCode {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn")).init();
    let result = match Cli::parse().command {
        Command::Train(args) => cli::train::run(*args),
        Command::ImportBackbone(args) => cli::import::run(args),
        Command::Ablate(args) => cli::ablate::run(args),
        Command::Distill(args) => cli::distill::run(args),
        Command::Detect(args) => cli::detect::run(*args),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("cull-trainer: {error:#}");
            ExitCode::FAILURE
        }
    }
}
