//! `cull-trainer train --preset fast`: modes of normality from a folder of good images to a bundle, in one pass and without gradient steps.

use super::train::{Args, human, print_aurocs, print_calibration, with_suffix};
use super::{Input, bar, load, load_sample, stop_flag};
use anyhow::Context;
use burn::tensor::Device;
use cull_trainer::bundle::{self, ModesParts};
use cull_trainer::data::TestImage;
use cull_trainer::evaluate::{Aurocs, aurocs};
use cull_trainer::modes::{Fitted, ModesConfig, fit, seconds_a_picture};
use cull_trainer::report;
use cull_trainer::train::FeatureSet;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

/// Pictures whose maps are compared between the fit and the finished bundle.
const CHECKED_PICTURES: usize = 8;

/// Run the command.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let stop = stop_flag()?;
    let config = args.modes_config()?;
    // Small dense products in a few large batches: the CPU backend is right, whatever device trains.
    let device = Device::flex();
    if args.dry_run {
        return dry_run(args, &device, &stop);
    }
    let start = Instant::now();
    let mut input = load(&args.input, &stop)?;
    let features_seconds = start.elapsed().as_secs_f64();
    let (set, paths) = all_normal(&mut input);
    eprintln!(
        "images    {} to fit and calibrate on, {} to test; {} products in the folder; features {} x {}",
        set.len(),
        input.test.set.len(),
        input.set.products.len(),
        set.tokens,
        set.channels,
    );
    let input_px = [input.spec.height_px as usize, input.spec.width_px as usize];
    let progress = bar(1, "fitting");
    let start = Instant::now();
    let Fitted { modes, mode_of, scores } = fit(&set, &config, input_px, &device, &mut |done, all| {
        progress.set_length(all as u64);
        progress.set_position(done as u64);
    })?;
    progress.finish_and_clear();
    let seconds = start.elapsed().as_secs_f64();
    let mut sizes = vec![0usize; modes.count];
    for &mode in &mode_of {
        if let Some(size) = sizes.get_mut(mode) {
            *size += 1;
        }
    }
    sizes.sort_unstable_by(|a, b| b.cmp(a));
    let list: Vec<String> = sizes.iter().map(ToString::to_string).collect();
    eprintln!(
        "fitted    {} in {}, of {} pictures, in {seconds:.0} s (features: {features_seconds:.0} s)",
        counted(modes.count, "mode"),
        counted(modes.groups(), "group"),
        list.join(", ")
    );

    let notes = format!(
        "Modes of normality by cull-trainer {}: preset fast, {} in {}, ridge {}, {} folds, seed {}; no transformer (trainer/EXPERIMENTS.md says why)",
        env!("CARGO_PKG_VERSION"),
        counted(modes.count, "mode"),
        counted(modes.groups(), "group"),
        config.ridge,
        config.folds,
        config.seed
    );
    let checked: Vec<(PathBuf, usize)> = (0..CHECKED_PICTURES)
        .map(|i| i * set.len().saturating_sub(1) / (CHECKED_PICTURES - 1))
        .filter_map(|i| Some((paths.get(i)?.clone(), i)))
        .collect();
    let few = FeatureSet {
        tokens: set.tokens,
        channels: set.channels,
        values: checked.iter().flat_map(|(_, i)| set.sample(*i)).copied().collect(),
    };
    let worst = bundle::write_modes(
        &args.out,
        ModesParts {
            name: args.out.file_stem().map_or_else(|| "model".into(), |n| n.to_string_lossy().into_owned()),
            spec: &input.spec,
            grid: input.grid,
            features: (input.graph.clone(), &input.joined),
            modes: &modes,
            score: config.score,
            scores: &scores,
            trained_on: input.set.products.clone(),
            notes,
        },
        &checked.iter().map(|(path, _)| path.clone()).collect::<Vec<_>>(),
        &modes.maps(&few, &device),
    )?;
    eprintln!(
        "checked   the finished model's maps of {} pictures: off by at most {:.2} % of the way from a usual part to the threshold",
        checked.len(),
        worst * 100.0
    );
    let test = test_aurocs(&input, &modes.maps(&input.test.set, &device), &config, input_px);
    let lowest = bundle::lowest_measured_rate(scores.len());
    print_calibration(scores.len(), 0);
    if let Some(test) = &test {
        print_aurocs(test);
    }
    let summary = report::ModesSummary {
        title: args.out.display().to_string(),
        config,
        mode_sizes: sizes,
        groups: modes.groups(),
        features_seconds,
        seconds,
        test,
        calibration_scores: scores,
        lowest_measured_rate: lowest,
        images: [set.len(), input.test.set.len()],
        skipped: input.train.skipped.len() + input.held_out.skipped.len() + input.test.skipped.len(),
    };
    let page = args.report.clone().unwrap_or_else(|| with_suffix(&args.out, ".html"));
    std::fs::write(&page, report::modes_html(&summary)).with_context(|| format!("cannot write the report {}", page.display()))?;
    if let Some(path) = &args.json {
        let text = serde_json::to_string_pretty(&summary)?;
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    println!("bundle    {}", args.out.display());
    println!("report    {}", page.display());
    println!("next      cull eval --model {} --data {}", args.out.display(), args.input.data.display());
    Ok(ExitCode::SUCCESS)
}

/// A number and what it counts: `1 group`, `16 groups`.
fn counted(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

/// Time a few pictures, and say what the run will take.
fn dry_run(args: &Args, device: &Device, stop: &AtomicBool) -> anyhow::Result<ExitCode> {
    let sample = load_sample(&args.input, stop)?;
    let set = &sample.input.set;
    let normal = set.train.len() + set.held_out.len();
    let [missing, all] = sample.to_compute;
    let a_picture = seconds_a_picture(&sample.input.train.set, device);
    let features = missing as f64 * sample.seconds;
    let fit = normal as f64 * a_picture;
    println!("features    {:>8}   {missing} of {all} pictures still to compute, {:.0} ms each", human(features), sample.seconds * 1e3);
    println!("fit         {:>8}   {normal} pictures, {:.1} ms each", human(fit), a_picture * 1e3);
    println!("in all      {:>8}   with the load this machine has now", human(features + fit));
    println!("next        the same command without --dry-run");
    Ok(ExitCode::SUCCESS)
}

/// Features and files of all normal pictures in their order in the folder: the cross-fit needs none held out, and its folds want neighbours side by side.
fn all_normal(input: &mut Input) -> (FeatureSet, Vec<PathBuf>) {
    let mut order: Vec<(PathBuf, bool, usize)> = Vec::new();
    for (held_out, part, paths) in [(false, &input.train, &input.set.train), (true, &input.held_out, &input.set.held_out)] {
        order.extend(part.kept.iter().enumerate().filter_map(|(row, &i)| Some((paths.get(i)?.clone(), held_out, row))));
    }
    order.sort();
    let mut all = FeatureSet { tokens: input.train.set.tokens, channels: input.train.set.channels, values: Vec::new() };
    all.values.reserve_exact(input.train.set.values.len() + input.held_out.set.values.len());
    for (_, held_out, row) in &order {
        let from = if *held_out { &input.held_out.set } else { &input.train.set };
        all.values.extend_from_slice(from.sample(*row));
    }
    input.train.set.values = Vec::new();
    input.held_out.set.values = Vec::new();
    (all, order.into_iter().map(|(path, ..)| path).collect())
}

fn test_aurocs(input: &Input, maps: &[Vec<f32>], config: &ModesConfig, input_px: [usize; 2]) -> Option<Aurocs> {
    let tested: Vec<&TestImage> = input.test.kept.iter().filter_map(|i| input.set.test.get(*i)).collect();
    let labelled = tested.iter().any(|t| t.defect.is_some()) && tested.iter().any(|t| t.defect.is_none());
    let mut scorer = cull::anomaly::Scorer::new(config.score, input.grid, input_px);
    let scores: Vec<f32> = maps
        .iter()
        .map(|values| {
            scorer.score(&cull::anomaly::AnomalyMap { grid_rows: input.grid[0], grid_cols: input.grid[1], values: values.clone() })
        })
        .collect();
    labelled.then(|| aurocs(&tested, &scores))
}
