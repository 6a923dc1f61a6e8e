//! `cull-trainer detect`: arguments, printing.

use super::{bar, stop_flag};
use anyhow::{Context, bail};
use cull::frame::Frame;
use cull::model::bundle::Bundle;
use cull::pool::Pooled;
use cull::preprocess::{PreprocessSpec, Preprocessor};
use cull::source::simulated::SimulatedLine;
use cull_trainer::bundle::{self, GraphParts};
use cull_trainer::data::TrainingSet;
use cull_trainer::detector::network::{INPUT_MULTIPLE, Network, trunk};
use cull_trainer::detector::parts::Parts;
use cull_trainer::detector::{self, Measured, Plan, RunOptions, SCORE, State, Tested, Training, export};
use cull_trainer::distill::{MEAN, STD};
use cull_trainer::onnx::built_in_backbone;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

/// Steps between printed lines.
const PRINT_EVERY: usize = 50;
/// Weight of the newest step in the printed loss.
const NEWEST: f64 = 0.03;
/// Seeds of the simulated line: parts to train on, labelled parts to measure on while training, good parts to calibrate with. (105 is for the test.)
const TRAINING_SEED: u64 = 101;
/// See [`TRAINING_SEED`].
const MEASURED_SEED: u64 = 103;
/// See [`TRAINING_SEED`].
const CALIBRATION_SEED: u64 = 104;
/// Labelled simulated parts to measure on, half of them defective.
const MEASURED: u32 = 400;
/// Good simulated parts to calibrate with: the score of one in 200 is then known from ten.
const CALIBRATION: u32 = 2000;

/// Arguments.
#[derive(clap::Args)]
#[command(group(clap::ArgGroup::new("parts").required(true).args(["data", "simulate"])))]
pub struct Args {
    /// Folder of good parts: MVTec-AD layout, one folder of good images per product, or one mixed folder
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Train on the simulated line instead: fresh good parts without end
    #[arg(long)]
    simulate: bool,
    /// Bundle to write
    #[arg(long, value_name = "FILE", default_value = "detector.onnx")]
    out: PathBuf,
    /// Trunk to start from: a backbone that `cull-trainer distill` made [default: our own, built in]
    #[arg(long, value_name = "FILE")]
    backbone: Option<PathBuf>,
    /// Go on from the weights of a detector of the same parts that was made before: more good parts, more steps
    #[arg(long, value_name = "BUNDLE")]
    from: Option<PathBuf>,
    /// Width and height of the model's input, multiples of 16
    #[arg(long, value_name = "WxH", default_value = "320x240", value_parser = size)]
    input: [usize; 2],
    /// Go on from the checkpoint beside --out
    #[arg(long)]
    resume: bool,
    /// Training steps
    #[arg(long, default_value_t = 6000)]
    steps: usize,
    /// Pictures a step
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=512))]
    batch: u16,
    /// Highest learning rate
    #[arg(long, default_value_t = 8e-4)]
    learning_rate: f64,
    /// Seed of weights, parts and pseudo-defects
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Threads that train, and as many that make pictures [default: half of the cores]
    #[arg(long)]
    threads: Option<usize>,
    /// Steps between checkpoints and measurements
    #[arg(long, default_value_t = 250)]
    checkpoint_every: usize,
}

/// `WxH` as height and width.
fn size(text: &str) -> Result<[usize; 2], String> {
    let wrong = || format!("give WIDTHxHEIGHT, both multiples of {INPUT_MULTIPLE} from 64 to 1024, for example 320x240");
    let (w, h) = text.split_once('x').ok_or_else(wrong)?;
    let one = |t: &str| t.trim().parse::<usize>().ok().filter(|v| v % INPUT_MULTIPLE == 0 && (64..=1024).contains(v)).ok_or_else(wrong);
    Ok([one(h)?, one(w)?])
}

/// Run the command.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let stop = stop_flag()?;
    let (architecture, weights) = match &args.backbone {
        Some(path) => {
            let bytes = std::fs::read(path).with_context(|| format!("cannot read the backbone {}", path.display()))?;
            trunk(&bytes, &path.display().to_string())?
        }
        None => trunk(built_in_backbone(), "built into cull-trainer")?,
    };
    let size = args.input;
    let spec = PreprocessSpec { width_px: size[1] as u32, height_px: size[0] as u32, mean: [MEAN; 3], std: [STD; 3] };
    let input = read_parts(&args, &spec)?;
    let plan =
        Plan { trunk: architecture, size, steps: args.steps, batch: usize::from(args.batch), seed: args.seed, rate: args.learning_rate };
    let network = Network::new(&plan.trunk, size);
    let [rows, columns] = network.grid();
    eprintln!(
        "model     {:.1} M multiply-adds a picture of {}x{}, {:.2} M parameters, map of {columns}x{rows} cells",
        network.multiply_adds() as f64 / 1e6,
        size[1],
        size[0],
        network.parameters as f64 / 1e6
    );
    let checkpoint = beside(&args.out, ".checkpoint");
    let training = Training { plan: plan.clone(), parts: &input.parts };
    let mut state = match &args.from {
        _ if args.resume => State::load(&checkpoint, &plan)?,
        Some(path) => go_on_from(path, &training, &weights, &input.products)?,
        None => training.start(&weights),
    };
    let threads = args.threads.unwrap_or_else(|| (std::thread::available_parallelism().map_or(1, usize::from) / 2).max(1));
    let progress = bar(plan.steps as u64, "train");
    let (begun, from) = (Instant::now(), state.step);
    let mut smooth: Option<[f64; 2]> = None;
    let mut on_step = |p: detector::Progress| {
        let now = [p.loss.cells, p.loss.whole];
        let s = smooth.get_or_insert(now);
        s.iter_mut().zip(now).for_each(|(s, n)| *s += (n - *s) * NEWEST);
        let [cells, whole] = *s;
        progress.set_position(p.step as u64);
        if p.step.is_multiple_of(PRINT_EVERY) {
            let each = begun.elapsed().as_secs_f64() / (p.step - from) as f64;
            progress.suspend(|| {
                eprintln!("step {:>6}  loss: cells {cells:.3}, whole {whole:.3}  rate {:.1e}  {each:.2} s a step", p.step, p.rate);
            });
        }
    };
    let mut on_measured = |m: &Measured| progress.suspend(|| eprintln!("measured  {}", described(m)));
    let finished = training.run(
        &mut state,
        RunOptions {
            threads,
            checkpoint: &checkpoint,
            checkpoint_every: args.checkpoint_every,
            tested: &input.tested,
            stop: &stop,
            on_step: &mut on_step,
            on_measured: &mut on_measured,
        },
    )?;
    progress.finish_and_clear();
    if !finished {
        eprintln!(
            "stopped   at step {} of {}; go on with the same command and --resume ({})",
            state.step,
            plan.steps,
            checkpoint.display()
        );
        return Ok(ExitCode::from(130));
    }
    let graph = export::graph(&network, &state.parameters).into_bytes("cull-trainer detect");
    let notes = format!(
        "Detector by cull-trainer {}: pseudo-defects on good parts, {} steps of {}, learning rate {}, seed {}{}",
        env!("CARGO_PKG_VERSION"),
        state.step,
        plan.batch,
        plan.rate,
        plan.seed,
        if args.simulate { ", simulated line" } else { "" }
    );
    let calibrating = bar(input.calibration.len() as u64, "calibrate");
    let scores = bundle::write_graph(
        &args.out,
        &graph,
        GraphParts {
            name: args.out.file_stem().map_or_else(|| "detector".into(), |n| n.to_string_lossy().into_owned()),
            spec: &spec,
            grid: network.grid(),
            score: SCORE,
            trained_on: input.products,
            notes,
        },
        &mut input.calibration.frames().inspect(|_| calibrating.inc(1)),
    )?;
    calibrating.finish_and_clear();
    super::train::print_calibration(scores.len(), 0);
    if let Some(m) = state.measured.last() {
        println!("measured  {}", described(m));
    }
    println!("bundle    {}", args.out.display());
    match &args.data {
        Some(data) => println!("next      cull eval --model {} --data {}", args.out.display(), data.display()),
        None => println!("next      cull demo --model {}", args.out.display()),
    }
    Ok(ExitCode::SUCCESS)
}

/// The start of a run that goes on from the detector `path`.
fn go_on_from(path: &Path, training: &Training<'_>, trunk: &[f32], products: &[String]) -> anyhow::Result<State> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read the detector {}", path.display()))?;
    let known = Bundle::from_bytes(&bytes, path)?.meta.trained_on;
    if let Some(new) = products.iter().find(|p| !known.contains(p)) {
        bail!(
            "{} does not know {new}: what it expects to see fits its own parts only; leave --from out and train from the start",
            path.display()
        );
    }
    let (state, fresh) = training.start_from(trunk, &bytes, &path.display().to_string())?;
    eprintln!("from      {}{}", path.display(), if fresh.is_empty() { String::new() } else { format!("; new: {}", fresh.join(", ")) });
    Ok(state)
}

/// All that a run reads.
struct Input {
    parts: Parts,
    tested: Vec<Tested>,
    calibration: Calibration,
    products: Vec<String>,
}

/// Good parts that are never trained on.
enum Calibration {
    Simulated,
    Files(Vec<PathBuf>),
}

impl Calibration {
    fn len(&self) -> usize {
        match self {
            Self::Simulated => CALIBRATION as usize,
            Self::Files(files) => files.len(),
        }
    }

    fn frames(&self) -> Box<dyn Iterator<Item = Frame> + '_> {
        match self {
            Self::Simulated => {
                let mut line = SimulatedLine::new(CALIBRATION_SEED, 0.0);
                Box::new((0..CALIBRATION).map(move |part| line.frame(part, Pooled::detached(Vec::new()))))
            }
            // Files that cannot be read were named when the folder was read.
            Self::Files(files) => Box::new(files.iter().filter_map(|path| cull::dataset::load_frame(path).ok())),
        }
    }
}

fn read_parts(args: &Args, spec: &PreprocessSpec) -> anyhow::Result<Input> {
    let mut preprocessor = Preprocessor::new(spec, None);
    let mut planar = vec![0.0; spec.input_len()];
    let mut tested = Vec::new();
    let Some(dir) = &args.data else {
        let mut line = SimulatedLine::new(MEASURED_SEED, 0.5);
        let products = line.products().map(|p| p.to_string()).collect();
        for part in 0..MEASURED {
            let frame = line.frame(part, Pooled::detached(Vec::new()));
            preprocessor.run(&frame, &mut planar)?;
            let category = frame.origin.product.as_deref().unwrap_or_default().to_owned();
            let defective = frame.origin.truth.as_ref().is_some_and(|t| t.defect.is_some());
            tested.push(Tested::new(&planar, category, defective));
        }
        eprintln!(
            "parts     good ones of the simulated line (seed {TRAINING_SEED}); {MEASURED} to measure on (seed {MEASURED_SEED}), {CALIBRATION} to calibrate with (seed {CALIBRATION_SEED})"
        );
        return Ok(Input { parts: Parts::Simulated(TRAINING_SEED), tested, calibration: Calibration::Simulated, products });
    };
    let set = TrainingSet::scan(dir)?;
    set.check_not_mixed_up()?;
    for (product, count) in &set.thin {
        eprintln!("warning   {product} has only {count} good images: its good parts will be rejected; collect more");
    }
    let reading = bar((set.train.len() + set.test.len()) as u64, "read");
    let (parts, mut skipped) = Parts::folder(&set.train, args.input, &mut || reading.inc(1));
    let labelled = set.test.iter().any(|t| t.defect.is_some()) && set.test.iter().any(|t| t.defect.is_none());
    for t in set.test.iter().filter(|_| labelled) {
        reading.inc(1);
        match cull::dataset::load_frame(&t.path)
            .map_err(|e| e.to_string())
            .and_then(|f| preprocessor.run(&f, &mut planar).map_err(|e| e.to_string()))
        {
            Ok(()) => tested.push(Tested::new(&planar, t.category.clone(), t.defect.is_some())),
            Err(why) => skipped.push((t.path.clone(), why)),
        }
    }
    reading.finish_and_clear();
    for (path, why) in &skipped {
        eprintln!("skipped   {}: {why}", path.display());
    }
    if parts.count() == Some(0) {
        bail!("none of the {} good pictures of {} can be read", set.train.len(), dir.display());
    }
    eprintln!(
        "parts     {} good ones to train on, {} to calibrate with; {} labelled to measure on; {} products in the folder",
        parts.count().unwrap_or(0),
        set.held_out.len(),
        tested.len(),
        set.products.len()
    );
    Ok(Input { parts, tested, calibration: Calibration::Files(set.held_out), products: set.products })
}

fn described(m: &Measured) -> String {
    let each: Vec<String> = m.categories.iter().map(|(name, v)| format!("{name} {:.1}", v * 100.0)).collect();
    format!(
        "step {}: image AUROC {:.1}, caught {:.1} % at 0.5 % false rejects; {}",
        m.step,
        m.auroc * 100.0,
        m.caught * 100.0,
        each.join(", ")
    )
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}
