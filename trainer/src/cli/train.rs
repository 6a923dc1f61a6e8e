//! `cull-trainer train`: one command from a folder of good images to a bundle.

use super::{Input, InputArgs, bar, load, load_sample, stop_flag};
use anyhow::{Context, bail};
use cull::anomaly::ScoreRule;
use cull::config::Config;
use cull_trainer::bundle::{self, BundleParts};
use cull_trainer::data::TestImage;
use cull_trainer::device::{self, Choice, Chosen};
use cull_trainer::evaluate::{self, Aurocs, aurocs, scores};
use cull_trainer::modes::ModesConfig;
use cull_trainer::onnx::{Cells, Normalisation};
use cull_trainer::presets::{Preset, Recipe, recipe};
use cull_trainer::train::{Ended, FeatureSet, Progress, RunOptions, State, anomaly_maps, residual_scale, train, whiten, whitening};
use cull_trainer::uniad::{NeighbourMask, Weights};
use cull_trainer::{checkpoint, report};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

/// Steps timed by `--dry-run`; the first is left out, since it also allocates and tunes.
const DRY_STEPS: usize = 4;
/// Validations in a run when test folders exist.
const VALIDATIONS: usize = 10;
/// Training pictures that a validation measures the residual's scale on; in the end it is measured on all of them.
const VALIDATION_PICTURES: usize = 256;

/// Arguments of `cull-trainer train`.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub input: InputArgs,
    /// Bundle to write
    #[arg(long, value_name = "BUNDLE")]
    pub out: PathBuf,
    /// fast: ours, minutes on a CPU; paper: UniAD with the paper's schedule; uniad: a short UniAD for ablations
    #[arg(long, value_enum, default_value = "fast")]
    preset: Preset,
    /// Where to compute
    #[arg(long, value_enum, default_value = "auto")]
    device: Choice,
    /// Threads where it computes on the CPU [default: all]; another number changes the order of sums, and with it the last digits
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=64))]
    threads: Option<u16>,
    /// Optimiser steps, instead of the preset's
    #[arg(long)]
    steps: Option<usize>,
    /// Samples a step, instead of the preset's
    #[arg(long)]
    batch: Option<usize>,
    /// Highest learning rate, instead of the preset's
    #[arg(long)]
    learning_rate: Option<f64>,
    /// Groups of similar pictures that --preset fast makes, instead of a number that follows from the pictures (it divides them further by itself)
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=256))]
    modes: Option<u16>,
    /// Seed of weights, order, dropout and jitter
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    #[command(flatten)]
    components: Components,
    /// Checkpoint file [default: BUNDLE.checkpoint]
    #[arg(long)]
    checkpoint: Option<PathBuf>,
    /// Go on from the checkpoint, with the same arguments (another --learning-rate is allowed: after a divergence, say)
    #[arg(long)]
    pub resume: bool,
    /// Steps between checkpoints
    #[arg(long, default_value_t = 200)]
    checkpoint_every: usize,
    /// Stop when this many validations in a row bring no better AUROC (0: never)
    #[arg(long, default_value_t = 0)]
    patience: usize,
    /// Say how long training will take, and stop
    #[arg(long)]
    pub dry_run: bool,
    /// Figures as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// HTML report with curves [default: BUNDLE.html]
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
}

impl Args {
    /// Settings of `--preset fast`.
    ///
    /// # Errors
    /// When an argument was given that only gradient training has.
    pub fn modes_config(&self) -> anyhow::Result<ModesConfig> {
        let plain = Components { top_share: self.components.top_share, ..Components::default() };
        if self.resume {
            bail!("--preset fast has nothing to resume: features are cached, and the fit takes seconds; leave out --resume");
        }
        if self.components != plain || self.steps.is_some() || self.batch.is_some() || self.learning_rate.is_some() || self.patience > 0 {
            bail!(
                "--preset fast takes no gradient steps and has no transformer: leave out what sets its size, steps or rate, or give --preset uniad"
            );
        }
        let mut config = ModesConfig { seed: self.seed, ..ModesConfig::default() };
        if let Some(modes) = self.modes.map(usize::from) {
            (config.few_groups, config.most) = (modes, modes);
            (config.images_per_group, config.images_per_further_group) = (1, 1);
        }
        if let Some(share) = self.components.top_share {
            config.score = ScoreRule::TopMean { share };
        }
        Ok(config)
    }
}

impl Args {
    /// The preset with what was asked for on the command line, for `images` training images; the device is checked for its shapes.
    fn recipe(&self, input: &Input, images: usize, chosen: &Chosen) -> anyhow::Result<Recipe> {
        let Some(mut recipe) = recipe(self.preset, input.train.set.channels, images, self.steps, self.seed) else {
            bail!("--preset fast takes no gradient steps");
        };
        self.components.apply(&mut recipe);
        recipe.plan.model.grid = input.grid;
        set(&mut recipe.plan.batch, self.batch);
        if let Some(rate) = self.learning_rate {
            recipe.plan.schedule.set_rate(rate);
        }
        recipe.plan.model.check().map_err(|why| anyhow::anyhow!("{why}"))?;
        chosen.check(&recipe.plan.model, recipe.plan.batch)?;
        Ok(recipe)
    }
}

/// The paper's components, for ablations.
#[derive(clap::Args, Clone, Default, PartialEq)]
pub struct Components {
    /// Neighbour mask of the encoder attention: odd side, 0 for none
    #[arg(long)]
    mask_encoder: Option<usize>,
    /// Neighbour mask of the decoder's attention to the encoder's output
    #[arg(long)]
    mask_memory: Option<usize>,
    /// Neighbour mask of the decoder's attention to its previous layer
    #[arg(long)]
    mask_previous: Option<usize>,
    /// Layer-wise query embedding
    #[arg(long)]
    layerwise_query: Option<bool>,
    /// Feature jittering: scale of the noise, 0 for none
    #[arg(long)]
    jitter_scale: Option<f64>,
    /// Feature jittering: share of the samples
    #[arg(long)]
    jitter_probability: Option<f64>,
    /// Width of the transformer
    #[arg(long)]
    dim: Option<usize>,
    /// Width of the feed-forward layers
    #[arg(long)]
    hidden: Option<usize>,
    /// Encoder layers
    #[arg(long)]
    encoder_layers: Option<usize>,
    /// Decoder layers
    #[arg(long)]
    decoder_layers: Option<usize>,
    /// Whiten the features per channel first
    #[arg(long)]
    whiten: Option<bool>,
    /// Normalise the residual per location and channel
    #[arg(long)]
    normalise_residual: Option<bool>,
    /// Score an image by the mean of this share of its highest map values, instead of the pooled maximum
    #[arg(long)]
    top_share: Option<f32>,
}

impl Components {
    /// Replace what was given.
    pub fn apply(&self, recipe: &mut Recipe) {
        let model = &mut recipe.plan.model;
        let NeighbourMask { encoder, decoder_memory, decoder_previous } = &mut model.mask;
        set(encoder, self.mask_encoder);
        set(decoder_memory, self.mask_memory);
        set(decoder_previous, self.mask_previous);
        set(&mut model.layerwise_query, self.layerwise_query);
        set(&mut model.jitter_scale, self.jitter_scale);
        set(&mut model.jitter_probability, self.jitter_probability);
        set(&mut model.dim, self.dim);
        set(&mut model.hidden, self.hidden);
        set(&mut model.encoder_layers, self.encoder_layers);
        set(&mut model.decoder_layers, self.decoder_layers);
        set(&mut recipe.whiten, self.whiten);
        set(&mut recipe.normalise_residual, self.normalise_residual);
        set(&mut recipe.score, self.top_share.map(|share| ScoreRule::TopMean { share }));
    }
}

fn set<T>(field: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *field = value;
    }
}

/// A trained model with what belongs to it.
pub struct Trained {
    pub state: State,
    pub ended: Ended,
    pub normalisation: Normalisation,
    pub seconds: f64,
    pub test: Option<Aurocs>,
}

/// Whiten, train, measure; shared with `ablate`.
#[allow(clippy::too_many_arguments)]
pub fn fit(
    input: &mut Input,
    recipe: &Recipe,
    chosen: &Chosen,
    checkpoint: Option<PathBuf>,
    checkpoint_every: usize,
    resume: bool,
    patience: usize,
    validations: usize,
    stop: &AtomicBool,
    on_step: &mut dyn FnMut(Progress),
) -> anyhow::Result<Trained> {
    let plan = &recipe.plan;
    let mut normalisation = Normalisation::default();
    if recipe.whiten {
        (normalisation.mean, normalisation.scale) = whitening(&input.train.set);
        for set in [&mut input.train.set, &mut input.held_out.set, &mut input.test.set] {
            whiten(set, &normalisation.mean, &normalisation.scale);
        }
    }
    let input_px = [input.spec.height_px as usize, input.spec.width_px as usize];
    let tested: Vec<&TestImage> = input.test.kept.iter().filter_map(|i| input.set.test.get(*i)).collect();
    let labelled = tested.iter().any(|t| t.defect.is_some()) && tested.iter().any(|t| t.defect.is_none());
    let mut state = match (&checkpoint, resume) {
        (Some(path), true) => checkpoint::load(path, plan, &chosen.device)?,
        _ => State::start(plan, &chosen.device),
    };
    let measure = |weights: &Weights, scale: &[f32]| -> Aurocs {
        aurocs(&tested, &scores(&plan.model, weights, &input.test.set, scale, recipe.score, input_px, chosen))
    };
    let scale_of = |weights: &Weights, most: usize| -> Vec<f32> {
        if recipe.normalise_residual { residual_scale(&plan.model, weights, &input.train.set, most, chosen) } else { Vec::new() }
    };
    let mut validate = |weights: &Weights| measure(weights, &scale_of(weights, VALIDATION_PICTURES)).mean;
    let start = Instant::now();
    let ended = train(
        plan,
        &input.train.set,
        &mut state,
        chosen,
        RunOptions {
            checkpoint,
            checkpoint_every,
            stop,
            on_step,
            validate_every: if labelled && validations > 0 { (plan.steps / validations).max(1) } else { 0 },
            validate: labelled.then_some(&mut validate),
            patience,
        },
    )?;
    let seconds = start.elapsed().as_secs_f64();
    if ended == Ended::Interrupted {
        // Whoever pressed Ctrl-C wants the prompt back, and nothing is shipped.
        return Ok(Trained { state, ended, normalisation, seconds, test: None });
    }
    let weights = state.best_weights();
    normalisation.residual_scale = scale_of(&weights, usize::MAX);
    let test = labelled.then(|| measure(&weights, &normalisation.residual_scale));
    Ok(Trained { state, ended, normalisation, seconds, test })
}

/// Run the command.
pub fn run(mut args: Args) -> anyhow::Result<ExitCode> {
    if args.preset == Preset::Fast {
        args.input.cells = Cells::MeanMax;
        return super::fast::run(&args);
    }
    let stop = stop_flag()?;
    let chosen = device::choose(args.device)?.with_threads(args.threads.map(usize::from));
    eprintln!("device    {}", chosen.describe);
    if args.dry_run {
        return dry_run(&args, &chosen, &stop);
    }
    let mut input = load(&args.input, &stop)?;
    let FeatureSet { tokens, channels, .. } = input.train.set;
    eprintln!(
        "images    {} to train on, {} held out for calibration, {} to test; {} product{}; features {tokens} x {channels} ({} cached)",
        input.train.set.len(),
        input.held_out.set.len(),
        input.test.set.len(),
        input.set.products.len(),
        if input.set.products.len() == 1 { "" } else { "s" },
        input.train.from_cache + input.held_out.from_cache + input.test.from_cache,
    );
    let recipe = args.recipe(&input, input.train.set.len(), &chosen)?;
    let checkpoint_path = args.checkpoint.clone().unwrap_or_else(|| with_suffix(&args.out, ".checkpoint"));
    let progress = bar(recipe.plan.steps as u64, "training");
    let batch = recipe.plan.batch as f64;
    let start = Instant::now();
    let mut first = None;
    let mut on_step = |p: Progress| {
        let from = *first.get_or_insert(p.step);
        progress.set_position(p.step as u64);
        let rate = (p.step - from + 1) as f64 * batch / start.elapsed().as_secs_f64().max(1e-9);
        progress.set_message(format!("loss {:.4}  {rate:.0} samples/s", p.loss));
    };
    let trained = fit(
        &mut input,
        &recipe,
        &chosen,
        Some(checkpoint_path.clone()),
        args.checkpoint_every,
        args.resume,
        args.patience,
        VALIDATIONS,
        &stop,
        &mut on_step,
    )?;
    progress.finish_and_clear();
    if trained.ended == Ended::Interrupted {
        eprintln!(
            "stopped   at step {} of {}; go on with the same command and --resume ({})",
            trained.state.step,
            recipe.plan.steps,
            checkpoint_path.display()
        );
        return Ok(ExitCode::from(130));
    }
    let loss = trained.state.losses.last().copied().unwrap_or(f32::NAN);
    eprintln!("trained   {} steps in {:.0} s, loss {loss:.4}", trained.state.step, trained.seconds);
    if trained.ended == Ended::EarlyStop {
        eprintln!(
            "          stopped early: {} validations in a row were no better; the best weights go into the bundle (chosen by test pictures: the AUROC below flatters)",
            args.patience
        );
    }

    let held_out: Vec<PathBuf> = input.held_out.kept.iter().filter_map(|i| input.set.held_out.get(*i).cloned()).collect();
    let calibrating = bar(held_out.len() as u64, "calibrate");
    let notes = format!(
        "UniAD by cull-trainer {}: preset {:?}, {} steps, batch {}, seed {}, {}",
        env!("CARGO_PKG_VERSION"),
        args.preset,
        trained.state.step,
        recipe.plan.batch,
        args.seed,
        chosen.describe
    );
    let held_out_scores = bundle::write(
        &args.out,
        BundleParts {
            name: args.out.file_stem().map_or_else(|| "model".into(), |n| n.to_string_lossy().into_owned()),
            spec: &input.spec,
            features: (input.graph.clone(), &input.joined),
            normalisation: &trained.normalisation,
            score: recipe.score,
            trained_on: input.set.products.clone(),
            notes,
        },
        &recipe.plan.model,
        &trained.state.best_weights(),
        &held_out,
        &mut || calibrating.inc(1),
    )?;
    calibrating.finish_and_clear();
    print_calibration(held_out_scores.len(), input.train.set.len());
    if let Some(test) = &trained.test {
        print_aurocs(test);
    }
    let page = args.report.clone().unwrap_or_else(|| with_suffix(&args.out, ".html"));
    let summary = report::Summary {
        title: args.out.display().to_string(),
        device: chosen.describe.clone(),
        plan: recipe.plan.clone(),
        seconds: trained.seconds,
        losses: trained.state.losses.clone(),
        validations: trained.state.validations.clone(),
        test: trained.test.clone(),
        calibration_scores: held_out_scores,
        images: [input.train.set.len(), input.held_out.set.len(), input.test.set.len()],
        skipped: input.train.skipped.len() + input.held_out.skipped.len() + input.test.skipped.len(),
    };
    std::fs::write(&page, report::html(&summary)).with_context(|| format!("cannot write the report {}", page.display()))?;
    if let Some(path) = &args.json {
        let text = serde_json::to_string_pretty(&summary)?;
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    println!("bundle    {}", args.out.display());
    println!("report    {}", page.display());
    println!("next      cull eval --model {} --data {}", args.out.display(), args.input.data.display());
    Ok(ExitCode::SUCCESS)
}

/// Time a few pictures and a few steps, and say what the run will take.
fn dry_run(args: &Args, chosen: &Chosen, stop: &AtomicBool) -> anyhow::Result<ExitCode> {
    let mut sample = load_sample(&args.input, stop)?;
    let set = &sample.input.set;
    let (training, held_out, tested) = (set.train.len(), set.held_out.len(), set.test.len());
    let recipe = args.recipe(&sample.input, training, chosen)?;
    // The few pictures over and over: what a step costs does not depend on what is in them.
    let features = &mut sample.input.train.set;
    let wanted = recipe.plan.batch * features.tokens * features.channels;
    features.values = features.values.iter().copied().cycle().take(wanted).collect();
    let mut short = recipe.plan.clone();
    short.steps = DRY_STEPS;
    let mut state = State::start(&short, &chosen.device);
    let mut times = Vec::new();
    let options = RunOptions {
        checkpoint: None,
        checkpoint_every: 0,
        stop,
        on_step: &mut |_| times.push(Instant::now()),
        validate_every: 0,
        validate: None,
        patience: 0,
    };
    train(&short, &sample.input.train.set, &mut state, chosen, options)?;
    let (Some(first), Some(last)) = (times.first(), times.last()) else { bail!("no step was timed") };
    let step = last.duration_since(*first).as_secs_f64() / (times.len() - 1).max(1) as f64;
    let start = Instant::now();
    let maps = anomaly_maps(&recipe.plan.model, &state.weights, &sample.input.train.set, &[], evaluate::BATCH, chosen);
    let forward = start.elapsed().as_secs_f64() / maps.len().max(1) as f64;
    // The residual scale runs over some training pictures at every validation, and over all of them once at the end.
    let (some, scaled) = if recipe.normalise_residual { (training.min(VALIDATION_PICTURES), training) } else { (0, 0) };
    let validated = if tested > 0 { VALIDATIONS * (tested + some) + tested } else { 0 } + scaled;
    let [missing, all] = sample.to_compute;
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let parts = [
        (
            "features",
            missing as f64 * sample.seconds,
            format!("{missing} of {all} pictures still to compute, {:.0} ms each", sample.seconds * 1e3),
        ),
        (
            "training",
            step * recipe.plan.steps as f64,
            format!("{} steps of {} samples, {step:.2} s each", recipe.plan.steps, recipe.plan.batch),
        ),
        ("validation", validated as f64 * forward, format!("{validated} pictures in all, {:.0} ms each", forward * 1e3)),
        // One thread, backbone and transformer.
        (
            "calibrate",
            held_out as f64 * (sample.seconds * threads as f64 + forward),
            format!("{held_out} pictures through the line's own path"),
        ),
    ];
    for (name, seconds, what) in &parts {
        println!("{name:<11} {:>8}   {what}", human(*seconds));
    }
    let total: f64 = parts.iter().map(|p| p.1).sum();
    println!("in all      {:>8}   on {}, with the load it has now", human(total), chosen.describe);
    println!("next        the same command without --dry-run");
    Ok(ExitCode::SUCCESS)
}

/// Which false-reject rates the calibration's pictures can tell, and what a lower one would take; `trained_on` are those that only trained.
pub fn print_calibration(held_out: usize, trained_on: usize) {
    let lowest = bundle::lowest_measured_rate(held_out);
    let how = if trained_on > 0 { "held-out good pictures" } else { "good pictures, each scored by a fit without it," };
    eprintln!(
        "calibrate {held_out} {how} tell false-reject rates from {:.1} % up; a lower one is extrapolated and may reject more, or nothing",
        lowest * 100.0
    );
    let wanted = f64::from(Config::default().false_reject_rate);
    if lowest > wanted {
        let needed = (1.0 / wanted).ceil() as usize - 1;
        let share = (held_out + trained_on) as f64 / held_out.max(1) as f64;
        eprintln!(
            "          for the line's {:.1} % collect about {:.0} good pictures in all (now {}), or set false_reject_rate to {:.3} in the line's configuration",
            wanted * 100.0,
            needed as f64 * share,
            held_out + trained_on,
            lowest
        );
    }
}

/// Per category and mean, in percent.
pub fn print_aurocs(test: &Aurocs) {
    let width = test.categories.keys().map(String::len).max().unwrap_or(0).max(8);
    println!("{:<width$}  image AUROC", "category");
    for (name, value) in &test.categories {
        println!("{name:<width$}  {:>6.1}", value * 100.0);
    }
    println!("{:<width$}  {:>6.1}   (all in one list, one threshold: {:.1})", "mean", test.mean * 100.0, test.pooled * 100.0);
}

/// Seconds in the unit that a person would use.
pub fn human(seconds: f64) -> String {
    match seconds {
        s if s < 90.0 => format!("{s:.0} s"),
        s if s < 5400.0 => format!("{:.0} min", s / 60.0),
        s => format!("{:.1} h", s / 3600.0),
    }
}

pub fn with_suffix(path: &std::path::Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}
