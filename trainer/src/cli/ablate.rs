//! `cull-trainer ablate`: the identical shortcut made visible. Each row trains the same small model with one or more of the paper's components
//! switched off; with all of them off the loss is by far the lowest, and while it goes on falling the AUROC falls, too.

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
    #[arg(long, value_enum, default_value = "uniad")]
    preset: Preset,
    /// Where to compute
    #[arg(long, value_enum, default_value = "auto")]
    device: Choice,
    /// Threads where it computes on the CPU [default: all]
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=64))]
    threads: Option<u16>,
    /// Steps a row; so many take a quarter of an hour and more on one CPU core
    #[arg(long, default_value_t = 1200)]
    steps: usize,
    /// Width of the transformer; one much narrower than the features (64, say) is a bottleneck that keeps it from copying them, and shows no shortcut
    #[arg(long, default_value_t = 256)]
    dim: usize,
    /// Encoder and decoder layers
    #[arg(long, default_value_t = 2)]
    layers: usize,
    /// Seed
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Samples a step, instead of the preset's
    #[arg(long)]
    batch: Option<usize>,
    /// Highest learning rate, instead of the preset's
    #[arg(long)]
    learning_rate: Option<f64>,
    /// Side of the neighbour mask where it is on: odd [default: half the grid, as the paper's 7 on 14]
    #[arg(long)]
    mask: Option<usize>,
    /// Measurements of the AUROC on the way
    #[arg(long, default_value_t = 12)]
    validations: usize,
    /// First and last row only: everything on, everything off
    #[arg(long)]
    quick: bool,
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
    /// At the end, as a fraction.
    image_auroc: f64,
    /// On the way: (steps, mean image AUROC as a fraction).
    curve: Vec<(usize, f64)>,
    pooled_auroc: f64,
    seconds: f64,
}

/// Run the command.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let stop = stop_flag()?;
    let chosen = device::choose(args.device)?.with_threads(args.threads.map(usize::from));
    eprintln!("device    {}", chosen.describe);
    println!(
        "Each row trains the same model with some of UniAD's components off. `best` and `end`: mean image AUROC (%) at its highest (after so many steps) and at the end."
    );
    let rows = [(true, true, true), (false, true, true), (true, false, true), (true, true, false), (false, false, false)];
    println!("mask  query  jitter     loss    best (step)    end  pooled    time");
    let mut table = Vec::new();
    for (mask, query, jitter) in rows.into_iter().filter(|(mask, query, jitter)| !args.quick || (mask == query && query == jitter)) {
        // Whitening changes the features in place: every row starts from the cache.
        let mut input = load(&args.input, &stop)?;
        if input.test.set.is_empty() {
            bail!("{} has no test images: the table needs good and defective ones", args.input.data.display());
        }
        let Some(mut recipe) = recipe(args.preset, input.train.set.channels, input.train.set.len(), Some(args.steps), args.seed) else {
            bail!("--preset fast has no such components: give --preset uniad or paper");
        };
        let model = &mut recipe.plan.model;
        model.grid = input.grid;
        (model.dim, model.hidden) = (args.dim, args.dim * 4);
        (model.encoder_layers, model.decoder_layers) = (args.layers, args.layers);
        // The largest odd side that is no more than half the grid.
        let side = args.mask.unwrap_or((input.grid[0] / 2).saturating_sub(1) | 1);
        model.mask = NeighbourMask::all(if mask { side } else { 0 });
        model.layerwise_query = query;
        if !jitter {
            model.jitter_scale = 0.0;
        }
        // Scaled by what the model cannot rebuild, a copied defect would count as much as one that was not copied: the table would hide what it is for.
        recipe.normalise_residual = false;
        if let Some(batch) = args.batch {
            recipe.plan.batch = batch;
        }
        if let Some(rate) = args.learning_rate {
            recipe.plan.schedule.set_rate(rate);
        }
        recipe.plan.model.check().map_err(|why| anyhow::anyhow!("{why}"))?;
        chosen.check(&recipe.plan.model, recipe.plan.batch)?;
        let progress = bar(args.steps as u64, "training");
        let trained =
            fit(&mut input, &recipe, &chosen, None, 0, false, 0, args.validations, &stop, &mut |p| progress.set_position(p.step as u64))?;
        progress.finish_and_clear();
        if trained.ended == Ended::Interrupted {
            bail!("stopped");
        }
        let losses = &trained.state.losses;
        let tail = losses.get(losses.len().saturating_sub(LOSS_WINDOW)..).unwrap_or(losses);
        let loss = tail.iter().sum::<f32>() / tail.len().max(1) as f32;
        let Some(test) = trained.test else { bail!("the test images have no defects, or no good parts") };
        let sign = |on: bool| if on { "on" } else { "-" };
        let curve = &trained.state.validations;
        let (best_step, best) = curve.iter().copied().fold((trained.state.step, test.mean), |best, v| if v.1 > best.1 { v } else { best });
        println!(
            "{:<4}  {:<5}  {:<6}  {:>7.4}  {:>5.1} {:>8}  {:>5.1}  {:>6.1}  {:>5.0} s",
            sign(mask),
            sign(query),
            sign(jitter),
            loss,
            best * 100.0,
            format!("({best_step})"),
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
            curve: curve.clone(),
            pooled_auroc: test.pooled,
            seconds: trained.seconds,
        });
    }
    if let Some(path) = &args.json {
        std::fs::write(path, serde_json::to_string_pretty(&table)?)?;
    }
    Ok(ExitCode::SUCCESS)
}
