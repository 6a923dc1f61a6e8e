//! `cull-trainer distill`: arguments, printing.

use super::{bar, stop_flag};
use anyhow::{Context, bail};
use cull_trainer::device::{self, Choice};
use cull_trainer::distill::export::backbone;
use cull_trainer::distill::student::Architecture;
use cull_trainer::distill::teacher::Teacher;
use cull_trainer::distill::{Distillation, Plan, Pools, RunOptions, State, Unexplained};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

/// Steps between printed lines.
const PRINT_EVERY: usize = 100;
/// Weight of the newest step in the printed loss.
const NEWEST: f64 = 0.02;

/// Arguments.
#[derive(clap::Args)]
pub struct Args {
    /// Teacher: ONNX with outputs f2, f4, f8, f16 along one chain of inverted residuals (EfficientNet-Lite, MobileNetV2)
    #[arg(long, value_name = "FILE")]
    teacher: PathBuf,
    /// Folder of photographs, searched through; may be given more than once
    #[arg(long, value_name = "DIR", required = true)]
    images: Vec<PathBuf>,
    /// Student to write
    #[arg(long, value_name = "FILE", default_value = "backbone.onnx")]
    out: PathBuf,
    /// Where to train
    #[arg(long, value_enum, default_value = "auto")]
    device: Choice,
    /// Go on from the checkpoint beside --out
    #[arg(long)]
    resume: bool,
    /// Training steps
    #[arg(long, default_value_t = 12_000)]
    steps: usize,
    /// Pictures a step
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=512))]
    batch: u16,
    /// Highest learning rate
    #[arg(long, default_value_t = 2e-3)]
    learning_rate: f64,
    /// Share of the teacher's hidden channels that the student has
    #[arg(long, default_value_t = 0.5)]
    hidden: f64,
    /// Seed of weights and pictures
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Threads that train, and as many that make pictures [default: half of the cores]
    #[arg(long)]
    threads: Option<usize>,
    /// Steps between checkpoints; the student so far is written with each
    #[arg(long, default_value_t = 500)]
    checkpoint_every: usize,
}

/// Run the command.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let stop = stop_flag()?;
    let chosen = device::choose(args.device)?;
    eprintln!("device    {}", chosen.describe);
    if !(0.05..=1.0).contains(&args.hidden) {
        bail!("--hidden is {}, it must be between 0.05 and 1", args.hidden);
    }
    let teacher = Teacher::load(&args.teacher)?;
    let student = teacher.architecture.slimmed(args.hidden);
    eprintln!("teacher   {}", facts(&teacher.architecture));
    eprintln!(
        "student   {}: {:.0} % of the teacher's multiply-adds",
        facts(&student),
        student.multiply_adds(224) as f64 / teacher.architecture.multiply_adds(224) as f64 * 100.0
    );
    let loading = bar(0, "pictures");
    let pools = Pools::load(&args.images, &mut |at, of| {
        loading.set_length(of as u64);
        loading.set_position(at as u64);
    })?;
    loading.finish_and_clear();
    for (path, why) in &pools.skipped {
        eprintln!("skipped   {}: {why}", path.display());
    }
    eprintln!(
        "pictures  {} photographs to train on, {} held out; {} parts of the simulated line",
        pools.natural.len(),
        pools.held_out.len(),
        pools.simulated.len()
    );
    let plan = Plan {
        student,
        steps: args.steps,
        batch: usize::from(args.batch),
        seed: args.seed,
        rate: args.learning_rate,
        blockwise: 0.4,
        large: 0.4,
        side: 128,
        large_side: 192,
    };
    let checkpoint = beside(&args.out, ".checkpoint");
    let distillation = Distillation { plan: plan.clone(), teacher: &teacher, pools: &pools, work: beside(&args.out, ".teacher") };
    let mut state = if args.resume { State::load(&checkpoint, &plan)? } else { distillation.start()? };
    let gpu = chosen.kind != device::Kind::Cpu;
    if gpu {
        distillation.check_device(&state, &chosen.device)?;
    }
    let threads = args.threads.unwrap_or_else(|| (std::thread::available_parallelism().map_or(1, usize::from) / 2).max(1));
    let taps: Vec<(String, usize)> = plan.student.taps.clone();
    let progress = bar(plan.steps as u64, "distil");
    let (begun, from) = (Instant::now(), state.step);
    let mut smooth: Vec<f64> = Vec::new();
    let mut on_step = |p: cull_trainer::distill::Progress<'_>| {
        if smooth.is_empty() || p.step == from + 1 {
            smooth.clone_from(&p.loss.boundary);
        }
        smooth.iter_mut().zip(&p.loss.boundary).for_each(|(s, l)| *s += (l - *s) * NEWEST);
        progress.set_position(p.step as u64);
        if p.step.is_multiple_of(PRINT_EVERY) {
            let stages =
                taps.iter().map(|(n, b)| format!("{n} {:.3}", smooth.get(*b).copied().unwrap_or(f64::NAN))).collect::<Vec<_>>().join("  ");
            let phase = if plan.is_blockwise(p.step - 1) { "blockwise " } else { "end to end" };
            let each = begun.elapsed().as_secs_f64() / (p.step - from) as f64;
            progress.suspend(|| eprintln!("step {:>6}  {phase}  unexplained {stages}  rate {:.1e}  {:.2} s a step", p.step, p.rate, each));
        }
    };
    let names: Vec<&str> = taps.iter().map(|t| t.0.as_str()).collect();
    let mut on_measured = |step: usize, u: &Unexplained| {
        progress.suspend(|| {
            eprintln!("held out  step {step}: photographs {}; varied {}", percents(&names, &u.photographs), percents(&names, &u.varied));
        });
    };
    let finished = distillation.run(
        &mut state,
        RunOptions {
            device: &chosen.device,
            gpu,
            threads,
            checkpoint: &checkpoint,
            checkpoint_every: args.checkpoint_every,
            measure_every: args.checkpoint_every,
            stop: &stop,
            on_step: &mut on_step,
            on_measured: &mut on_measured,
        },
    )?;
    progress.finish_and_clear();
    let file = backbone(&plan.student, &state.parameters, &state.scaling);
    cull_trainer::checkpoint::write_whole(&args.out, &file).with_context(|| format!("cannot write {}", args.out.display()))?;
    println!("backbone  {} ({:.2} MB, step {})", args.out.display(), file.len() as f64 / 1e6, state.step);
    if !finished {
        eprintln!(
            "stopped   at step {} of {}; go on with the same command and --resume ({})",
            state.step,
            plan.steps,
            checkpoint.display()
        );
        return Ok(ExitCode::from(130));
    }
    if let Some((_, u)) = state.measured.last() {
        println!("left unexplained of the teacher's variance, held-out pictures at 224 px:");
        println!("  photographs  {}", percents(&names, &u.photographs));
        println!("  varied       {}", percents(&names, &u.varied));
    }
    println!("next      cull-trainer train --data DIR --backbone {}", args.out.display());
    Ok(ExitCode::SUCCESS)
}

fn facts(a: &Architecture) -> String {
    format!("{:.1} M multiply-adds at 224 px, {:.2} M parameters", a.multiply_adds(224) as f64 / 1e6, a.layout().len as f64 / 1e6)
}

fn percents(names: &[&str], values: &[f64]) -> String {
    names.iter().zip(values).map(|(n, v)| format!("{n} {:.1} %", v * 100.0)).collect::<Vec<_>>().join(", ")
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}
