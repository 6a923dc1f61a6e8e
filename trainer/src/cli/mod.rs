//! One module a command, and what they share.

pub mod ablate;
pub mod train;

use anyhow::{Context, bail};
use cull::preprocess::PreprocessSpec;
use cull_trainer::data::TrainingSet;
use cull_trainer::features::{Extracted, Extractor};
use cull_trainer::onnx::{Backbone, Graph, feature_file};
use indicatif::{ProgressBar, ProgressStyle};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Where images and features come from.
#[derive(clap::Args, Clone)]
pub struct InputArgs {
    /// Folder in MVTec-AD layout, one folder of good images per product, or one mixed folder
    #[arg(long, value_name = "DIR")]
    pub data: PathBuf,
    /// Backbone: ONNX with stage outputs
    #[arg(long, value_name = "FILE")]
    pub backbone: PathBuf,
    /// Stage outputs used, comma-separated [default: f2,f4,f8,f16 where the file has them, else all]
    #[arg(long, value_delimiter = ',')]
    pub stages: Vec<String>,
    /// Pixel mean that the backbone was trained with, in 8-bit units (one or three values)
    #[arg(long, value_delimiter = ',', default_value = "127")]
    pub pixel_mean: Vec<f32>,
    /// Pixel scale that the backbone was trained with: input = (pixel - mean) / std
    #[arg(long, value_delimiter = ',', default_value = "128")]
    pub pixel_std: Vec<f32>,
    /// Side of the model's input
    #[arg(long, default_value_t = 224, value_parser = clap::value_parser!(u32).range(32..=1024))]
    pub input_px: u32,
    /// Side of the feature grid
    #[arg(long, default_value_t = 14, value_parser = clap::value_parser!(u16).range(4..=64))]
    pub grid: u16,
    /// Folder for cached features
    #[arg(long, default_value = ".cull-features")]
    pub cache: PathBuf,
    /// Stop at the first image that cannot be read, instead of naming and skipping it
    #[arg(long)]
    pub strict: bool,
}

/// Features of everything in a training folder.
pub struct Input {
    pub set: TrainingSet,
    pub spec: PreprocessSpec,
    pub grid: [usize; 2],
    pub graph: Graph,
    pub joined: String,
    pub train: Extracted,
    pub held_out: Extracted,
    pub test: Extracted,
}

/// A flag that Ctrl-C and SIGTERM set.
pub fn stop_flag() -> anyhow::Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, stop.clone()).context("cannot watch for Ctrl-C")?;
    }
    Ok(stop)
}

/// A progress bar on stderr; hidden where stderr is no terminal.
pub fn bar(len: u64, what: &str) -> ProgressBar {
    let bar = ProgressBar::new(len);
    if let Ok(style) = ProgressStyle::with_template("{prefix:<10} [{bar:30}] {pos}/{len}  {msg}  ETA {eta}") {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.set_prefix(what.to_owned());
    bar
}

fn three(list: &[f32], name: &str) -> anyhow::Result<[f32; 3]> {
    match list {
        [one] => Ok([*one; 3]),
        [r, g, b] => Ok([*r, *g, *b]),
        _ => bail!("--{name} takes one value or three, not {}", list.len()),
    }
}

/// Scan, check and extract.
pub fn load(args: &InputArgs, stop: &AtomicBool) -> anyhow::Result<Input> {
    let set = TrainingSet::scan(&args.data)?;
    set.check_not_mixed_up()?;
    let spec = PreprocessSpec {
        width_px: args.input_px,
        height_px: args.input_px,
        mean: three(&args.pixel_mean, "pixel-mean")?,
        std: three(&args.pixel_std, "pixel-std")?,
    };
    let backbone = Backbone::load(&args.backbone)?;
    let stages = if args.stages.is_empty() { default_stages(&backbone.outputs) } else { args.stages.clone() };
    let grid = [usize::from(args.grid); 2];
    let (graph, joined) = backbone.features(&stages, grid, [args.input_px as usize; 2])?;
    // The channel count is only known to the runtime: the extractor reports it.
    let file = feature_file(graph.clone(), &joined, grid);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let extractor = Extractor::new(&file, &spec, grid, &args.cache, threads)?;
    let extract = |paths: &[PathBuf], what: &str| -> anyhow::Result<Extracted> {
        let bar = bar(paths.len() as u64, what);
        let out = extractor.extract(paths, args.strict, stop, &|| bar.inc(1))?;
        bar.finish_and_clear();
        for (index, why) in &out.skipped {
            let path = paths.get(*index).map_or(Path::new("?"), PathBuf::as_path);
            eprintln!("skipped   {}: {why}", path.display());
        }
        Ok(out)
    };
    let test_paths: Vec<PathBuf> = set.test.iter().map(|t| t.path.clone()).collect();
    let train = extract(&set.train, "features")?;
    let held_out = extract(&set.held_out, "held out")?;
    let test = extract(&test_paths, "test")?;
    if stop.load(Ordering::Relaxed) {
        bail!("stopped; the features computed so far are cached in {}", args.cache.display());
    }
    Ok(Input { set, spec, grid, graph, joined, train, held_out, test })
}

fn default_stages(outputs: &[String]) -> Vec<String> {
    let wanted = ["f2", "f4", "f8", "f16"];
    if wanted.iter().all(|w| outputs.iter().any(|o| o == w)) { wanted.map(str::to_owned).to_vec() } else { outputs.to_vec() }
}
