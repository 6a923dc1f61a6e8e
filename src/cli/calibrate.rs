//! `cull calibrate`: a bundle's calibration from good parts.

use super::model::{now, write_bundle};
use super::table;
use anyhow::ensure;
use cull::calibration::Calibration;
use cull::dataset::{Dataset, load_frame};
use cull::eval::calibrate::{GoodScores, score_good_parts};
use cull::frame::Frame;
use cull::model::bundle::Bundle;
use cull::model::runtime::Model;
use cull::pool::Pooled;
use cull::source::simulated::SimulatedLine;
use std::path::PathBuf;
use std::process::ExitCode;

/// Arguments of `cull calibrate`.
#[derive(clap::Args)]
#[command(group(clap::ArgGroup::new("from").required(true).args(["data", "simulate"])))]
pub struct Args {
    /// The model bundle
    #[arg(long, value_name = "M")]
    model: PathBuf,
    /// Pictures of good parts that the model was not trained on, taken as the line takes them (`cull collect`): MVTec-AD layout, of which the
    /// good ones count, one folder per product, or one mixed folder
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Good parts of the simulated line instead
    #[arg(long)]
    simulate: bool,
    /// How many parts (--simulate)
    #[arg(long, value_name = "N", default_value_t = 2000, value_parser = clap::value_parser!(u32).range(5..=100_000), conflicts_with = "data")]
    parts: u32,
    /// Seed of the parts (--simulate); 101 to 103 were trained on and looked at, 105 is for the test
    #[arg(long, value_name = "S", default_value_t = 104, conflicts_with = "data")]
    seed: u64,
    /// Bundle to write: the same model with the new calibration. May be the model's own file (written completely or not at all)
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Threads, each with a model session of its own [default: all cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    threads: Option<u16>,
}

/// False-reject rates that are printed.
const RATES: [f32; 3] = [0.01, 0.005, 0.001];

/// Run the command.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let bundle = Bundle::load(&args.model)?;
    let model = Model::from_bundle(bundle.clone(), 1)?;
    let threads = args.threads.map_or_else(|| std::thread::available_parallelism().map_or(1, usize::from), usize::from);
    let files: Vec<PathBuf> = match &args.data {
        Some(dir) => Dataset::scan(dir)?.items.into_iter().filter(|item| item.defect.is_none()).map(|item| item.path).collect(),
        None => Vec::new(),
    };
    ensure!(
        args.simulate || !files.is_empty(),
        "there is no picture of a good part in the folder: they lie in `good`, or in no `test` folder"
    );
    let count = if args.simulate { args.parts as usize } else { files.len() };
    // Draws to stderr, and nothing where that is no terminal.
    let style = indicatif::ProgressStyle::with_template("{bar:40} {pos}/{len} pictures, {elapsed} elapsed, {eta} to go")?;
    let bar = indicatif::ProgressBar::new(count as u64).with_style(style);
    let GoodScores { scores, skipped } = match args.simulate {
        true => score_good_parts(&model, count, threads, || rendering(args.seed), || bar.inc(1)),
        false => {
            let read =
                || |part: usize| files.get(part).map_or_else(|| Err("no such part".into()), |f| load_frame(f).map_err(|e| e.to_string()));
            score_good_parts(&model, count, threads, read, || bar.inc(1))
        }
    }?;
    bar.finish_and_clear();
    for (part, why) in &skipped {
        let name = files.get(*part).map_or_else(|| format!("part {part}"), |f| f.display().to_string());
        eprintln!("skipped {name}: {why}");
    }
    let new = Calibration::from_scores(&scores)?;
    let old = &bundle.meta.calibration;
    write_bundle(&bundle.recalibrated(new.clone(), now())?, &args.out)?;
    println!();
    print!("{}", thresholds(old, &new, &scores));
    println!(
        "\n{} good parts; the lowest false-reject rate that they measure is {:.2} %, one below is extrapolated.",
        scores.len(),
        100.0 / (scores.len() + 1) as f64
    );
    println!("next: cull eval --model {} --data DIR", args.out.display());
    Ok(ExitCode::SUCCESS)
}

/// A thread's own line, from which it takes any part by its number.
fn rendering(seed: u64) -> impl FnMut(usize) -> Result<Frame, String> {
    let mut line = SimulatedLine::new(seed, 0.0);
    move |part| {
        let number = u32::try_from(part).map_err(|e| e.to_string())?;
        Ok(line.frame(number, Pooled::detached(Vec::new())))
    }
}

/// Old and new thresholds, and what the old ones would do to these parts.
fn thresholds(old: &Calibration, new: &Calibration, scores: &[f32]) -> String {
    let mut rows =
        vec![["false rejects asked", "threshold was", "is now", "of these rejected before", "and now"].map(str::to_owned).to_vec()];
    for rate in RATES {
        let rejected = |c: &Calibration| {
            let count = scores.iter().filter(|s| c.p_value(**s) <= rate).count();
            format!("{:.2} %", count as f64 * 100.0 / scores.len().max(1) as f64)
        };
        rows.push(vec![
            format!("{:.1} %", rate * 100.0),
            format!("{:.4}", old.score_at(rate)),
            format!("{:.4}", new.score_at(rate)),
            rejected(old),
            rejected(new),
        ]);
    }
    table::aligned(&rows)
}
