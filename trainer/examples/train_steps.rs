//! Times training steps on made-up features, for `tests/speed/compare.py`: prints one JSON object with wall and processor seconds a step.
//!
//! `train_steps --dim 256 --hidden 1024 --layers 4 --batch 8 --channels 272 --steps 5 [--device cpu|gpu]`

use clap::Parser;
use cull_trainer::device::{self, Choice};
use cull_trainer::presets::{Preset, recipe};
use cull_trainer::train::{FeatureSet, RunOptions, State, train};
use std::sync::atomic::AtomicBool;
use std::time::Instant;

#[derive(Parser)]
struct Args {
    #[arg(long, default_value_t = 256)]
    dim: usize,
    #[arg(long, default_value_t = 1024)]
    hidden: usize,
    #[arg(long, default_value_t = 4)]
    layers: usize,
    #[arg(long, default_value_t = 8)]
    batch: usize,
    #[arg(long, default_value_t = 272)]
    channels: usize,
    /// Steps timed, after one that is not
    #[arg(long, default_value_t = 5)]
    steps: usize,
    /// Threads on the CPU
    #[arg(long)]
    threads: Option<usize>,
    #[arg(long, value_enum, default_value = "cpu")]
    device: Choice,
}

/// Processor time of this process, all threads, in seconds: fields 14 and 15 of `/proc/self/stat`, in ticks of 10 ms.
fn processor_seconds() -> f64 {
    const TICKS_PER_SECOND: f64 = 100.0;
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // The name of the program, in parentheses, may hold spaces.
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    after_name.split_whitespace().skip(11).take(2).filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>() / TICKS_PER_SECOND
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let chosen = device::choose(args.device)?.with_threads(args.threads);
    let images = 2 * args.batch;
    let Some(recipe) = recipe(Preset::Paper, args.channels, images, Some(args.steps + 1), 1) else {
        anyhow::bail!("the paper's preset has no gradient steps");
    };
    let mut plan = recipe.plan;
    plan.batch = args.batch;
    (plan.model.dim, plan.model.hidden) = (args.dim, args.hidden);
    (plan.model.encoder_layers, plan.model.decoder_layers) = (args.layers, args.layers);
    let tokens = plan.model.tokens();
    let mut state_of_noise = 1u64;
    let values = (0..images * tokens * args.channels).map(|_| {
        state_of_noise = state_of_noise.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state_of_noise >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    });
    let features = FeatureSet { tokens, channels: args.channels, values: values.collect() };
    let mut state = State::start(&plan, &chosen.device);
    let mut marks = Vec::new();
    let stop = AtomicBool::new(false);
    let options = RunOptions {
        checkpoint: None,
        checkpoint_every: 0,
        stop: &stop,
        on_step: &mut |_| marks.push((Instant::now(), processor_seconds())),
        validate_every: 0,
        validate: None,
        patience: 0,
    };
    train(&plan, &features, &mut state, &chosen, options)?;
    let (Some(first), Some(last)) = (marks.first(), marks.last()) else { anyhow::bail!("no step was timed") };
    let steps = (marks.len() - 1).max(1) as f64;
    println!(
        "{}",
        serde_json::json!({
            "device": chosen.describe,
            "wall_s": last.0.duration_since(first.0).as_secs_f64() / steps,
            "processor_s": (last.1 - first.1) / steps,
            "loss": state.losses.last(),
        })
    );
    Ok(())
}
