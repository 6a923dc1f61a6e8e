//! `cull-trainer ablate`: the identical shortcut made visible. Each row trains the same small model with one or more of the paper's components
//! switched off; with all of them off the loss is lowest and the AUROC falls.

use super::train::fit;
use super::{InputArgs, bar, load, stop_flag};
use anyhow::bail;
use cull_trainer::device::{self, Choice};
use cull_trainer::presets::{Preset, recipe};
use cull_trainer::train::Ended;
use cull_trainer::uniad::NeighbourMask;
use std::path::PathBuf;
use std::process::ExitCode;

/// Steps at whose end the loss is averaged, so that one batch does not decide a row.
const LOSS_WINDOW: usize = 50;

/// Arguments of `cull-trainer ablate`.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    input: InputArgs,
    /// Preset to start from
    #[arg(long, value_enum, default_value = "fast")]
    preset: Preset,
    /// Where to compute
    #[arg(long, value_enum, default_value = "auto")]
    device: Choice,
    /// Steps a row
    #[arg(long, default_value_t = 600)]
    steps: usize,
    /// Width of the transformer
    #[arg(long, default_value_t = 64)]
    dim: usize,
    /// Encoder and decoder layers
    #[arg(long, default_value_t = 2)]
    layers: usize,
    /// Seed
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Rows as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(serde::Serialize)]
struct Row {
    mask: bool,
    layerwise_query: bool,
    jitter: bool,
    loss: f32,
    image_auroc: f64,
    pooled_auroc: f64,
    seconds: f64,
}

/// Run the command.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let stop = stop_flag()?;
    let chosen = device::choose(args.device)?;
    eprintln!("device    {}", chosen.describe);
    let rows = [(true, true, true), (false, true, true), (true, false, true), (true, true, false), (false, false, false)];
    println!("mask  query  jitter     loss  image AUROC  pooled    time");
    let mut table = Vec::new();
    for (mask, query, jitter) in rows {
        // Whitening changes the features in place: every row starts from the cache.
        let mut input = load(&args.input, &stop)?;
        if input.test.set.is_empty() {
            bail!("{} has no test images: the table needs good and defective ones", args.input.data.display());
        }
        let mut recipe = recipe(args.preset, input.train.set.channels, input.train.set.len(), Some(args.steps), args.seed);
        let model = &mut recipe.plan.model;
        model.grid = input.grid;
        (model.dim, model.hidden) = (args.dim, args.dim * 4);
        (model.encoder_layers, model.decoder_layers) = (args.layers, args.layers);
        if !mask {
            model.mask = NeighbourMask::all(0);
        }
        model.layerwise_query = query;
        if !jitter {
            model.jitter_scale = 0.0;
        }
        recipe.plan.model.check().map_err(|why| anyhow::anyhow!("{why}"))?;
        chosen.check(&recipe.plan.model, recipe.plan.batch)?;
        let progress = bar(args.steps as u64, "training");
        let trained = fit(&mut input, &recipe, &chosen, None, 0, false, 0, 0, &stop, &mut |p| progress.set_position(p.step as u64))?;
        progress.finish_and_clear();
        if trained.ended == Ended::Interrupted {
            bail!("stopped");
        }
        let losses = &trained.state.losses;
        let tail = losses.get(losses.len().saturating_sub(LOSS_WINDOW)..).unwrap_or(losses);
        let loss = tail.iter().sum::<f32>() / tail.len().max(1) as f32;
        let Some(test) = trained.test else { bail!("the test images have no defects, or no good parts") };
        let sign = |on: bool| if on { "on" } else { "-" };
        println!(
            "{:<4}  {:<5}  {:<6}  {:>7.4}  {:>11.1}  {:>6.1}  {:>5.0} s",
            sign(mask),
            sign(query),
            sign(jitter),
            loss,
            test.mean * 100.0,
            test.pooled * 100.0,
            trained.seconds
        );
        table.push(Row {
            mask,
            layerwise_query: query,
            jitter,
            loss,
            image_auroc: test.mean,
            pooled_auroc: test.pooled,
            seconds: trained.seconds,
        });
    }
    if let Some(path) = &args.json {
        std::fs::write(path, serde_json::to_string_pretty(&table)?)?;
    }
    Ok(ExitCode::SUCCESS)
}
