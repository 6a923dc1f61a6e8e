//! One module a command, and what they share.

pub mod ablate;
pub mod detect;
pub mod distill;
pub mod fast;
pub mod import;
pub mod train;

use anyhow::{Context, bail};
use cull::preprocess::PreprocessSpec;
use cull_trainer::data::{DataError, MIN_IMAGES, TrainingSet};
use cull_trainer::features::{Extracted, Extractor, stage_shapes};
use cull_trainer::onnx::{Backbone, Cells, Graph, PixelScale, feature_file};
use cull_trainer::train::FeatureSet;
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
    /// Backbone: ONNX with stage outputs [default: our own, built in]
    #[arg(long, value_name = "FILE")]
    pub backbone: Option<PathBuf>,
    /// Stage outputs used, comma-separated [default: f2,f4,f8,f16 where the file has them, else all]
    #[arg(long, value_delimiter = ',')]
    pub stages: Vec<String>,
    /// Pixel mean that the backbone was trained with, in 8-bit units (one or three values) [default: as the backbone file says, else 127]
    #[arg(long, value_delimiter = ',')]
    pub pixel_mean: Vec<f32>,
    /// Pixel scale that the backbone was trained with: input = (pixel - mean) / std [default: as the backbone file says, else 128]
    #[arg(long, value_delimiter = ',')]
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
    /// How stages become cells; the preset decides
    #[arg(skip)]
    pub cells: Cells,
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

/// Pixel scaling of a backbone whose file does not say (the EfficientNet-Lite networks').
const DEFAULT_PIXELS: PixelScale = PixelScale { mean: [127.0; 3], std: [128.0; 3] };

/// One number for all channels or three; `default` when none is given.
pub fn three(list: &[f32], default: [f32; 3], name: &str) -> anyhow::Result<[f32; 3]> {
    match list {
        [] => Ok(default),
        [one] => Ok([*one; 3]),
        [r, g, b] => Ok([*r, *g, *b]),
        _ => bail!("--{name} takes one value or three, not {}", list.len()),
    }
}

/// Folder, backbone and extractor, before any feature is computed.
struct Prepared {
    set: TrainingSet,
    spec: PreprocessSpec,
    grid: [usize; 2],
    graph: Graph,
    joined: String,
    extractor: Extractor,
}

fn prepare(args: &InputArgs) -> anyhow::Result<Prepared> {
    let set = TrainingSet::scan(&args.data)?;
    set.check_not_mixed_up()?;
    for (product, count) in &set.thin {
        eprintln!("note      {product} has only {count} normal pictures: good parts of it may be rejected; collect more");
    }
    let backbone = match &args.backbone {
        Some(path) => Backbone::load(path)?,
        None => Backbone::built_in()?,
    };
    let pixels = backbone.pixels.unwrap_or(DEFAULT_PIXELS);
    let spec = PreprocessSpec {
        width_px: args.input_px,
        height_px: args.input_px,
        mean: three(&args.pixel_mean, pixels.mean, "pixel-mean")?,
        std: three(&args.pixel_std, pixels.std, "pixel-std")?,
    };
    spec.check()?;
    let stages = if args.stages.is_empty() { default_stages(&backbone.outputs) } else { args.stages.clone() };
    let grid = [usize::from(args.grid); 2];
    let (graph, joined) = cells(args, &backbone, &stages, grid)?;
    // The channel count is only known to the runtime: the extractor reports it.
    let file = feature_file(graph.clone(), &joined, grid);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let extractor = Extractor::new(&file, &spec, grid, &args.cache, threads)?;
    Ok(Prepared { set, spec, grid, graph, joined, extractor })
}

/// Scan, check and extract.
pub fn load(args: &InputArgs, stop: &AtomicBool) -> anyhow::Result<Input> {
    let Prepared { set, spec, grid, graph, joined, extractor } = prepare(args)?;
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
    let found = train.kept.len() + held_out.kept.len();
    if found < MIN_IMAGES {
        let path = format!("{}, without the skipped files,", args.data.display());
        return Err(DataError::TooFew { path, found }.into());
    }
    for (part, paths) in [(&train, &set.train), (&held_out, &set.held_out)] {
        let is_defect = |index: usize| set.test.get(index).is_some_and(|t| t.defect.is_some());
        if let Some((image, test)) = part.same_picture(&test, is_defect) {
            let name = |path: Option<&PathBuf>| path.map(|p| p.display().to_string()).unwrap_or_default();
            return Err(DataError::MixedUp { image: name(paths.get(image)), test: name(test_paths.get(test)) }.into());
        }
    }
    Ok(Input { set, spec, grid, graph, joined, train, held_out, test })
}

/// A few pictures' features, for a dry run, and how long the others will take.
pub struct Sample {
    /// With the features of a few training pictures only.
    pub input: Input,
    /// Pictures whose features are not cached yet, and pictures in all.
    pub to_compute: [usize; 2],
    /// Time for one picture with all threads at work, in seconds.
    pub seconds: f64,
}

/// Scan, check, and extract a few pictures only.
pub fn load_sample(args: &InputArgs, stop: &AtomicBool) -> anyhow::Result<Sample> {
    /// Pictures timed, a thread; the first of each thread also loads the backbone and is left out.
    const TIMED: usize = 6;
    let Prepared { set, spec, grid, graph, joined, extractor } = prepare(args)?;
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let all: Vec<PathBuf> = set.train.iter().chain(&set.held_out).chain(set.test.iter().map(|t| &t.path)).cloned().collect();
    let missing: Vec<PathBuf> = all.iter().filter(|path| !extractor.is_cached(path)).cloned().collect();
    let from = if missing.is_empty() { &set.train } else { &missing };
    let chosen = from.get(..(TIMED * threads).min(from.len())).unwrap_or(from);
    let times = std::sync::Mutex::new(Vec::new());
    let train = extractor.extract(chosen, args.strict, stop, &|| {
        // A poisoned lock holds times all the same.
        times.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(std::time::Instant::now());
    })?;
    if train.kept.is_empty() {
        bail!("none of the first {} pictures of {} can be read", chosen.len(), args.data.display());
    }
    let mut times = times.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    times.sort_unstable();
    let warm = times.get(threads.min(times.len() - 1)..).unwrap_or(&[]);
    let seconds = match (warm.first(), warm.last()) {
        (Some(first), Some(last)) if warm.len() > 1 => last.duration_since(*first).as_secs_f64() / (warm.len() - 1) as f64,
        _ => 0.0,
    };
    let none = || Extracted { set: FeatureSet::default(), kept: Vec::new(), skipped: Vec::new(), from_cache: 0 };
    let to_compute = [missing.len(), all.len()];
    let input = Input { set, spec, grid, graph, joined, train, held_out: none(), test: none() };
    Ok(Sample { input, to_compute, seconds })
}

/// The feature graph as the preset wants its cells.
fn cells(args: &InputArgs, backbone: &Backbone, stages: &[String], grid: [usize; 2]) -> anyhow::Result<(Graph, String)> {
    let input_px = [args.input_px as usize; 2];
    Ok(match args.cells {
        Cells::Bilinear => backbone.features(stages, grid, input_px)?,
        Cells::MeanMax => {
            let shapes = stage_shapes(&backbone.stages(stages, input_px)?, input_px, &args.cache)?;
            backbone.cell_features(stages, &shapes, grid, input_px)?
        }
    })
}

fn default_stages(outputs: &[String]) -> Vec<String> {
    let wanted = ["f2", "f4", "f8", "f16"];
    if wanted.iter().all(|w| outputs.iter().any(|o| o == w)) { wanted.map(str::to_owned).to_vec() } else { outputs.to_vec() }
}
