//! `cull eval`: detection metrics over a folder in MVTec-AD layout.

use super::table;
use anyhow::{Context as _, ensure};
use cull::dataset::{Dataset, Split};
use cull::eval::inspector::ModelInspector;
use cull::eval::report::{self, Heading};
use cull::eval::runner::{Sample, Settings, evaluate, thin};
use cull::eval::summary::{Context, Evaluation, Figures};
use cull::model::runtime::Model;
use cull::verdict::Policy;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Arguments of `cull eval`.
#[derive(clap::Args)]
pub struct Args {
    /// The model bundle
    #[arg(long, value_name = "M")]
    model: PathBuf,
    /// Data set in MVTec-AD layout: one product, or a folder of products (<product>/test/good, <product>/test/<defect>,
    /// <product>/ground_truth/<defect>/…_mask.png)
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// Write all figures, and score and p-value of every picture, as JSON; "-" for stdout instead of the table
    #[arg(long, value_name = "F")]
    json: Option<PathBuf>,
    /// Write a self-contained HTML page: curves, score distributions, worst misses and false rejects with heat maps
    #[arg(long, value_name = "F.html")]
    report: Option<PathBuf>,
    /// At most this many pictures of each product, spread evenly over its list
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    limit: Option<u32>,
    /// Share of good parts that may be rejected: the line's `false_reject_rate`, above 0 and up to 0.5
    #[arg(long, value_name = "RATE", default_value_t = 0.005)]
    false_reject_rate: f32,
    /// Threads, each with a model session of its own [default: all cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    threads: Option<u16>,
}

/// Run the command.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    ensure!(
        args.false_reject_rate > 0.0 && args.false_reject_rate <= 0.5,
        "--false-reject-rate is {}; accepted: above 0 and up to 0.5",
        args.false_reject_rate
    );
    // Output folders are checked before the work, not after it.
    for file in [&args.json, &args.report].into_iter().flatten().filter(|file| file.as_os_str() != "-") {
        let folder = file.parent().filter(|f| !f.as_os_str().is_empty()).unwrap_or(Path::new("."));
        ensure!(folder.is_dir(), "cannot write {}: there is no folder {}", file.display(), folder.display());
    }
    let dataset = Dataset::scan(&args.data)?;
    let mut samples: Vec<Sample> = dataset
        .items
        .into_iter()
        .filter(|item| item.split == Split::Test)
        .map(|item| Sample { category: item.category, path: item.path, defect: item.defect, mask: item.mask })
        .collect();
    if let Some(limit) = args.limit {
        samples = thin(samples, limit as usize);
    }
    let model = Model::load(&args.model, 1)?;
    let meta = model.meta();
    let threads = args.threads.map_or_else(|| std::thread::available_parallelism().map_or(1, usize::from), usize::from);
    let settings = Settings {
        threads: threads.min(samples.len().max(1)),
        input_px: [meta.preprocess.height_px as usize, meta.preprocess.width_px as usize],
        calibration: meta.calibration.clone(),
        policy: Policy { false_reject_rate: args.false_reject_rate },
    };
    // Draws to stderr, and nothing where that is no terminal.
    let style = indicatif::ProgressStyle::with_template("{bar:40} {pos}/{len} pictures, {elapsed} elapsed, {eta} to go")?;
    let bar = indicatif::ProgressBar::new(samples.len() as u64).with_style(style);
    let evaluation = evaluate(&samples, &settings, || ModelInspector::new(&model), |done| bar.set_position(done as u64));
    bar.finish_and_clear();
    let evaluation = evaluation?;
    let context = Context {
        model: meta.name.clone(),
        model_sha256: meta.sha256.clone(),
        data: args.data.display().to_string(),
        pixel_resolution: settings.input_px,
        false_reject_rate: args.false_reject_rate,
        threshold: meta.calibration.score_at(args.false_reject_rate),
    };

    for skipped in &evaluation.skipped {
        eprintln!("skipped {}: {}", skipped.path, skipped.why);
    }
    if let Some(file) = &args.json {
        let json = serde_json::to_string(&evaluation.to_json(&context)?)?;
        match file.as_os_str() == "-" {
            true => println!("{json}"),
            false => std::fs::write(file, json + "\n").with_context(|| format!("cannot write {}", file.display()))?,
        }
    }
    if let Some(file) = &args.report {
        let date = super::model::now();
        let page = report::html(&evaluation, &Heading { context: &context, calibration: &meta.calibration, date });
        std::fs::write(file, page).with_context(|| format!("cannot write {}", file.display()))?;
    }
    if args.json.as_ref().is_none_or(|file| file.as_os_str() != "-") {
        print!("{}", text(&evaluation, &context));
    }
    Ok(ExitCode::SUCCESS)
}

/// The table for people, figures in percent.
fn text(evaluation: &Evaluation, context: &Context) -> String {
    let percent = |figure: Option<f64>| figure.map_or_else(|| "-".to_owned(), |f| format!("{:.1}", f * 100.0));
    let row = |name: &str, good: usize, defective: usize, figures: &Figures| {
        let f = figures;
        let mut cells = vec![name.to_owned(), good.to_string(), defective.to_string()];
        cells.extend([f.image_auroc, f.pixel_auroc, f.aupro, f.f1_max, f.false_reject_rate, f.recall].map(percent));
        cells
    };
    let header = ["product", "good", "defective", "image AUROC", "pixel AUROC", "AUPRO", "F1-max", "false rejects", "caught"];
    let mut rows = vec![header.map(str::to_owned).to_vec()];
    rows.extend(evaluation.categories.iter().map(|(name, c)| row(name, c.good, c.defective, &c.figures)));
    let (good, defective) = evaluation.categories.values().fold((0, 0), |sum, c| (sum.0 + c.good, sum.1 + c.defective));
    rows.push(row("mean", good, defective, &evaluation.mean));
    rows.push(row("pooled", good, defective, &evaluation.pooled));
    let [height, width] = context.pixel_resolution;
    let mut text = table::aligned(&rows);
    text += &format!(
        "\nFigures in percent. Pooled: all products as one set under one threshold. AUPRO up to a false-positive rate of 0.3.\n\
         Pixel figures at the model's {width}x{height} pixels: maps upsampled bilinearly, masks resized by nearest neighbour; \"-\" where there are no masks.\n\
         False rejects and caught: at the calibrated threshold, score {:.4}, for a false-reject rate of {:.3} %.\n",
        context.threshold,
        context.false_reject_rate * 100.0
    );
    let confusion = &evaluation.pooled_confusion;
    if calibration_misfits(confusion.false_rejects, confusion.false_rejects + confusion.true_accepts, context.false_reject_rate) {
        text += "Good parts are rejected far more often than asked: this model was calibrated on other parts. Train it on these (cull-trainer), or calibrate it (cull calibrate).\n";
    }
    if evaluation.without_mask > 0 {
        text += &format!("{} defective pictures without a (non-empty) mask took no part in pixel figures.\n", evaluation.without_mask);
    }
    if !evaluation.skipped.is_empty() {
        text += &format!("{} pictures could not be used (named above).\n", evaluation.skipped.len());
    }
    text
}

/// Whether so many false rejects among `good` parts cannot be chance at the asked rate: twice the expected number and four standard
/// deviations above it.
fn calibration_misfits(false_rejects: u64, good: u64, rate: f32) -> bool {
    let (expected, found) = (good as f64 * f64::from(rate), false_rejects as f64);
    let deviation = (expected * (1.0 - f64::from(rate))).sqrt();
    found > (2.0 * expected).max(expected + 4.0 * deviation).max(2.0)
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_misfit_is_told_from_chance() {
        assert!(super::calibration_misfits(100, 130, 0.005));
        assert!(super::calibration_misfits(14, 1000, 0.005));
        for (found, good) in [(0, 0), (0, 130), (2, 130), (9, 1000), (12, 1000)] {
            assert!(!super::calibration_misfits(found, good, 0.005), "{found} of {good}");
        }
    }
}
