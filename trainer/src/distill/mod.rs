//! Distillation of a backbone of our own: a slim student learns to reproduce the narrow tensors of a teacher on many varied pictures.
//!
//! Two phases. *Blockwise*: each block is trained on the teacher's own input to it, so that all blocks learn at once and none waits for the one before
//! (cf. Li et al. 2020, "Blockwisely Supervised Neural Architecture Search with Knowledge Distillation"). *End to end*: the trunk as it will run, with the
//! error at every boundary in the loss, at last on larger pictures. Each block's target is normalised per channel; the loss of a boundary is the share of
//! the variance that stays unexplained.
//!
//! A run is a function of its [`Plan`], the pictures and the teacher: stopped and resumed, it sees the same batches.

pub mod engine;
pub mod export;
pub mod reference;
pub mod student;
pub mod synth;
pub mod teacher;

use crate::checkpoint::{CheckpointError, Lists, save_lists};
use burn::tensor::Device;
use cull::frame::PixelFormat;
use cull::preprocess::{PreprocessSpec, Preprocessor, Roi};
use engine::{Engine, Mode, Sample, StepLoss, Weighing};
use export::Scaling;
use rand::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use student::{Architecture, RGB};
use synth::{Picture, Synth};
use teacher::{Runner, Teacher, TeacherError};

/// The teacher's input is `(pixel - MEAN) / STD`, as `cull-trainer train` takes it by default.
pub const MEAN: f32 = 127.0;
/// See [`MEAN`].
pub const STD: f32 = 128.0;
/// Side of the squares that photographs are kept as, px: large enough for crops of a classifier's usual scale.
const PHOTO_SIDE: u32 = 288;
/// One photograph in this many is kept out of training, to measure on.
const HELD_OUT_ONE_IN: usize = 25;
/// Fewer photographs than this teach nothing about the world.
const MIN_PHOTOS: usize = 50;
/// Good parts of the simulated line in the second pool, and their seed (no other use of the line has it).
const SIMULATED_PARTS: u32 = 300;
/// See [`SIMULATED_PARTS`].
const SIMULATED_SEED: u64 = 106;
/// Pictures made and shown to the teacher together.
const CHUNK: usize = 32;
/// How often each picture is used: making it and asking the teacher costs as much as half a step.
const REPLAY: usize = 3;
/// Chunks that batches are drawn from.
const WINDOW: usize = 4;
/// Chunks waiting in front of the training loop, a producer.
const WAITING: usize = 2;
/// Pictures over which channel means and variances are taken.
const STATISTICS: usize = 128;
/// Pictures of each kind to measure on, and their side.
const MEASURED: usize = 32;
/// See [`MEASURED`]: UniAD's input.
const MEASURED_SIDE: usize = 224;
/// Numbers from here on are pictures for statistics and measuring, never for training.
const APART: u64 = 1 << 40;
/// A GPU step may differ from the CPU's by this much (relative norm); see `device`.
const PARITY_TOLERANCE: f64 = 1e-3;
/// Version of the checkpoint's layout.
const FORMAT: u32 = 1;
/// The checkpoint's key.
const KIND: &str = "cull-distill";
/// Adam's moment decays: a short run wants a second moment that forgets sooner than the usual 0.999.
const BETAS: [f32; 2] = [0.9, 0.99];
/// Largest global gradient norm: first steps and odd pictures only.
const CLIP_NORM: f32 = 5.0;
/// Weight, in the end-to-end loss, of boundaries that are no stage output.
const INNER_WEIGHT: f32 = 0.3;
/// Weights of the stage outputs, shallow to deep: the deep map is the hardest to reproduce and carries most of what UniAD sees.
const STAGE_WEIGHT: [f32; 4] = [0.5, 0.7, 1.0, 2.0];

/// Why a distillation cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum DistillError {
    /// Teacher.
    #[error(transparent)]
    Teacher(#[from] TeacherError),
    /// Pictures.
    #[error("{0}")]
    Pictures(String),
    /// Checkpoint.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The GPU computes something else than the CPU.
    #[error(
        "the GPU does not compute what the CPU computes: {what} differs by {error:.1e} (allowed {PARITY_TOLERANCE:.0e}); use --device cpu"
    )]
    Parity {
        /// What differs.
        what: &'static str,
        /// Relative error.
        error: f64,
    },
    /// The loss is not a number.
    #[error("the loss became {loss} at step {step}: training diverged; resume from the last checkpoint with a lower --learning-rate")]
    Diverged {
        /// Loss.
        loss: f64,
        /// Step.
        step: usize,
    },
}

/// Everything that decides a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// The student.
    pub student: Architecture,
    /// Steps in all.
    pub steps: usize,
    /// Pictures a step.
    pub batch: usize,
    /// Seed of weights and pictures.
    pub seed: u64,
    /// Highest learning rate.
    pub rate: f64,
    /// Share of the steps that train blocks on the teacher's inputs.
    pub blockwise: f64,
    /// Share of the steps, the last ones, on pictures of `large_side`.
    pub large: f64,
    /// Side of the pictures before, px.
    pub side: usize,
    /// Side of the pictures in the last steps, px.
    pub large_side: usize,
}

impl Plan {
    /// Steps that one chunk of pictures serves.
    fn steps_per_chunk(&self) -> usize {
        (CHUNK * REPLAY / self.batch.max(1)).max(1)
    }

    /// First chunk of the large pictures.
    fn first_large_chunk(&self) -> usize {
        ((self.steps as f64 * (1.0 - self.large)) as usize).div_ceil(self.steps_per_chunk())
    }

    fn side_of(&self, chunk: usize) -> usize {
        if chunk < self.first_large_chunk() { self.side } else { self.large_side }
    }

    /// Chunks that the batch of `step` is drawn from.
    fn window(&self, step: usize) -> std::ops::RangeInclusive<usize> {
        let last = step / self.steps_per_chunk();
        let large = self.first_large_chunk();
        let first = if last < large { 0 } else { large };
        (last + 1).saturating_sub(WINDOW).max(first)..=last
    }

    /// Whether `step` belongs to the blockwise phase.
    pub fn is_blockwise(&self, step: usize) -> bool {
        (step as f64) < self.steps as f64 * self.blockwise
    }

    /// Learning rate: linear warm-up, then a half cosine to a hundredth.
    fn rate_at(&self, step: usize) -> f64 {
        let warm = 100.min(self.steps / 10).max(1);
        if step < warm {
            return self.rate * (step + 1) as f64 / warm as f64;
        }
        let done = (step - warm) as f64 / (self.steps.saturating_sub(warm)).max(1) as f64;
        self.rate * (0.01 + 0.99 * 0.5 * (1.0 + (std::f64::consts::PI * done.min(1.0)).cos()))
    }

    /// In the blockwise phase a block at a fine stride sees more pixels a picture than one at a coarse stride: fewer pictures do.
    fn mode(&self, step: usize) -> Mode {
        if !self.is_blockwise(step) {
            return Mode::EndToEnd;
        }
        let share = |b: usize| match self.student.stride_after(b) {
            ..=4 => 0.25,
            5..=8 => 0.5,
            _ => 1.0,
        };
        Mode::Blockwise((0..self.student.blocks.len()).map(share).collect())
    }

    fn boundary_weights(&self, step: usize) -> Vec<f32> {
        let blocks = self.student.blocks.len();
        if self.is_blockwise(step) {
            return vec![1.0; blocks];
        }
        let mut weights = vec![INNER_WEIGHT; blocks];
        for ((_, b), w) in self.student.taps.iter().zip(STAGE_WEIGHT) {
            if let Some(to) = weights.get_mut(*b) {
                *to = w;
            }
        }
        weights
    }
}

/// The pictures of a run.
pub struct Pools {
    /// Photographs to train on.
    pub natural: Vec<Picture>,
    /// Photographs to measure on.
    pub held_out: Vec<Picture>,
    /// Good parts of the simulated line, half size.
    pub simulated: Vec<Picture>,
    /// Files that could not be read, and why.
    pub skipped: Vec<(PathBuf, String)>,
}

impl Pools {
    /// Read every picture below `folders` (sorted by name) and render the simulated parts.
    ///
    /// # Errors
    /// When a folder cannot be read or too few pictures are found.
    pub fn load(folders: &[PathBuf], on_picture: &mut dyn FnMut(usize, usize)) -> Result<Self, DistillError> {
        let mut files = Vec::new();
        for folder in folders {
            gather(folder, &mut files)?;
        }
        files.sort();
        let spec = PreprocessSpec { width_px: PHOTO_SIDE, height_px: PHOTO_SIDE, mean: [0.0; 3], std: [1.0; 3] };
        let mut pools = Self { natural: Vec::new(), held_out: Vec::new(), simulated: Vec::new(), skipped: Vec::new() };
        for (i, file) in files.iter().enumerate() {
            on_picture(i, files.len());
            match square(file, &spec) {
                Ok(picture) if i % HELD_OUT_ONE_IN == HELD_OUT_ONE_IN - 1 => pools.held_out.push(picture),
                Ok(picture) => pools.natural.push(picture),
                Err(why) => pools.skipped.push((file.clone(), why)),
            }
        }
        if pools.natural.len() < MIN_PHOTOS {
            return Err(DistillError::Pictures(format!(
                "{} readable pictures below {}: at least {MIN_PHOTOS} varied photographs are needed (a thousand is better)",
                pools.natural.len(),
                folders.iter().map(|f| f.display().to_string()).collect::<Vec<_>>().join(", ")
            )));
        }
        let mut line = cull::source::simulated::SimulatedLine::new(SIMULATED_SEED, 0.0);
        let mut pixels = Vec::new();
        for part in 0..SIMULATED_PARTS {
            line.render(part, &mut pixels);
            pools.simulated.push(halved(&pixels, cull::source::simulated::WIDTH_PX as usize));
        }
        Ok(pools)
    }
}

fn gather(folder: &Path, files: &mut Vec<PathBuf>) -> Result<(), DistillError> {
    let fail =
        |e: std::io::Error| DistillError::Pictures(format!("{} cannot be read ({e}): give a folder of photographs", folder.display()));
    for entry in std::fs::read_dir(folder).map_err(fail)? {
        let path = entry.map_err(fail)?.path();
        let extension = path.extension().map(|e| e.to_string_lossy().to_lowercase()).unwrap_or_default();
        if path.is_dir() {
            gather(&path, files)?;
        } else if matches!(extension.as_str(), "jpg" | "jpeg" | "png") {
            files.push(path);
        }
    }
    Ok(())
}

/// The middle of a photograph.
fn square(file: &Path, spec: &PreprocessSpec) -> Result<Picture, String> {
    let frame = cull::dataset::load_frame(file).map_err(|e| e.to_string())?;
    if frame.format != PixelFormat::Rgb8 && frame.format != PixelFormat::Gray8 {
        return Err(format!("has pixels of kind {:?}", frame.format));
    }
    let side = frame.width_px.min(frame.height_px);
    let roi = Roi { x_px: (frame.width_px - side) / 2, y_px: (frame.height_px - side) / 2, width_px: side, height_px: side };
    let mut planar = vec![0.0; spec.input_len()];
    Preprocessor::new(spec, Some(roi)).run(&frame, &mut planar).map_err(|e| e.to_string())?;
    let (width, height) = (spec.width_px as usize, spec.height_px as usize);
    let pixels = crate::conv::transposed(&planar, RGB, width * height).into_iter().map(|v| v.round() as u8).collect();
    Ok(Picture { width, height, pixels })
}

/// Half the size in each direction, the mean of each four pixels.
fn halved(pixels: &[u8], width: usize) -> Picture {
    let (w, h) = (width / 2, pixels.len() / RGB / width / 2);
    let at = |x: usize, y: usize, c: usize| pixels.get((y * width + x) * RGB + c).copied().map_or(0, u32::from);
    let mut out = Vec::with_capacity(w * h * RGB);
    for y in 0..h {
        for x in 0..w {
            for c in 0..RGB {
                let sum = at(2 * x, 2 * y, c) + at(2 * x + 1, 2 * y, c) + at(2 * x, 2 * y + 1, c) + at(2 * x + 1, 2 * y + 1, c);
                out.push(((sum + 2) / 4) as u8);
            }
        }
    }
    Picture { width: w, height: h, pixels: out }
}

/// Share of the held-out variance that the student leaves unexplained, one value a stage.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Unexplained {
    /// Held-out photographs, the middle 224 x 224 px, unaltered.
    pub photographs: Vec<f64>,
    /// Augmented pictures as in training, from held-out photographs and another seed.
    pub varied: Vec<f64>,
}

/// A checkpoint's contents.
#[derive(Clone, Debug)]
pub struct State {
    /// Steps done.
    pub step: usize,
    /// Student.
    pub parameters: Vec<f32>,
    moment_1: Vec<f32>,
    moment_2: Vec<f32>,
    /// Normalisation of the teacher's tensors.
    pub scaling: Scaling,
    channel: Vec<Vec<f32>>,
    /// Measurements so far: step and result.
    pub measured: Vec<(usize, Unexplained)>,
}

#[derive(Serialize, Deserialize)]
struct Header {
    format: u32,
    plan: Plan,
    step: usize,
    scaling: Scaling,
    channel: Vec<Vec<f32>>,
    measured: Vec<(usize, Unexplained)>,
}

impl State {
    /// Write a checkpoint; an old one is replaced only when the new one is complete.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save(&self, path: &Path, plan: &Plan) -> Result<(), DistillError> {
        let header = Header {
            format: FORMAT,
            plan: plan.clone(),
            step: self.step,
            scaling: self.scaling.clone(),
            channel: self.channel.clone(),
            measured: self.measured.clone(),
        };
        let lists = [("parameters", self.parameters.as_slice()), ("moment_1", &self.moment_1), ("moment_2", &self.moment_2)];
        Ok(save_lists(path, KIND, &header, &lists)?)
    }

    /// Read a checkpoint of a run with the same student, batch, seed and first picture size. The schedule (steps, learning rate, phases) may differ: it is
    /// then that of the new plan from here on.
    ///
    /// # Errors
    /// When the file cannot be read, is damaged or belongs to another plan.
    pub fn load(path: &Path, plan: &Plan) -> Result<Self, DistillError> {
        let file = Lists::<Header>::read(path, KIND)?;
        let was = &file.header.plan;
        if file.header.format != FORMAT
            || (&was.student, was.batch, was.seed, was.side) != (&plan.student, plan.batch, plan.seed, plan.side)
        {
            return Err(file.of_another_run("student, batch, seed or picture size").into());
        }
        let len = plan.student.layout().len;
        let list = |name: &str| file.list(name, len);
        Ok(Self {
            step: file.header.step,
            parameters: list("parameters")?,
            moment_1: list("moment_1")?,
            moment_2: list("moment_2")?,
            scaling: file.header.scaling,
            channel: file.header.channel,
            measured: file.header.measured,
        })
    }
}

/// What the loop tells its caller.
#[derive(Clone, Debug)]
pub struct Progress<'a> {
    /// Steps done.
    pub step: usize,
    /// Learning rate.
    pub rate: f64,
    /// Loss of each boundary of this step's batch: the share of the variance left unexplained.
    pub loss: &'a StepLoss,
}

/// Options of a run that do not change its result, and callbacks.
pub struct RunOptions<'a> {
    /// Device: burn on it where `gpu`, else the engine on the CPU.
    pub device: &'a Device,
    /// See `device`.
    pub gpu: bool,
    /// Threads of the student's step, and as many that make pictures.
    pub threads: usize,
    /// Checkpoint file, written every `checkpoint_every` steps, on a stop request and at the end.
    pub checkpoint: &'a Path,
    /// Steps between checkpoints.
    pub checkpoint_every: usize,
    /// Steps between measurements.
    pub measure_every: usize,
    /// Set from outside (Ctrl-C) to stop after the current step.
    pub stop: &'a AtomicBool,
    /// Called after every step.
    pub on_step: &'a mut dyn FnMut(Progress<'_>),
    /// Called after every measurement.
    pub on_measured: &'a mut dyn FnMut(usize, &Unexplained),
}

/// A teacher with a student-shaped view on it, pictures and a plan.
pub struct Distillation<'a> {
    /// Plan.
    pub plan: Plan,
    /// Teacher.
    pub teacher: &'a Teacher,
    /// Pictures.
    pub pools: &'a Pools,
    /// Where the teacher's graph may be written for the runtime to read.
    pub work: PathBuf,
}

impl Distillation<'_> {
    /// The start of a run: the teacher's channel statistics and fresh weights.
    ///
    /// # Errors
    /// When the teacher does not run.
    pub fn start(&self) -> Result<State, DistillError> {
        let student = &self.plan.student;
        let mut runner = self.runner(self.plan.side, "statistics")?;
        let synth = Synth::new(&self.pools.natural, &self.pools.simulated, self.plan.seed);
        let mut sums: Vec<Vec<(f64, f64)>> = student.boundaries().iter().map(|c| vec![(0.0, 0.0); *c]).collect();
        let mut counts = vec![0usize; sums.len()];
        for number in 0..STATISTICS as u64 {
            let image = normalised(&synth.picture(APART + number, self.plan.side));
            for ((target, sum), count) in runner.run(&image)?.iter().zip(&mut sums).zip(&mut counts) {
                for row in target.chunks_exact(sum.len()) {
                    *count += 1;
                    for (s, v) in sum.iter_mut().zip(row) {
                        *s = (s.0 + f64::from(*v), s.1 + f64::from(*v) * f64::from(*v));
                    }
                }
            }
        }
        let moments: Vec<Vec<(f64, f64)>> = sums
            .iter()
            .zip(&counts)
            .map(|(sum, n)| {
                let n = (*n).max(1) as f64;
                // A channel that never moves has nothing to learn: a deviation of a thousandth keeps it finite.
                sum.iter().map(|(s, q)| (s / n, (q / n - (s / n).powi(2)).max(1e-6).sqrt())).collect()
            })
            .collect();
        let end = |b: usize| &moments[student.chain_end(b)];
        let blocks = 0..student.blocks.len();
        let scaling = Scaling {
            mean: blocks.clone().map(|b| end(b).iter().map(|m| m.0 as f32).collect()).collect(),
            deviation: blocks.clone().map(|b| end(b).iter().map(|m| m.1 as f32).collect()).collect(),
        };
        let channel = blocks.map(|b| moments[b].iter().zip(end(b)).map(|(own, end)| (end.1 / own.1).powi(2) as f32).collect()).collect();
        let parameters = student.init(self.plan.seed);
        let zero = vec![0.0; parameters.len()];
        Ok(State { step: 0, moment_1: zero.clone(), moment_2: zero, parameters, scaling, channel, measured: Vec::new() })
    }

    /// Check that `device` computes the step that the CPU's engine computes.
    ///
    /// # Errors
    /// When it does not, or the teacher does not run.
    pub fn check_device(&self, state: &State, device: &Device) -> Result<(), DistillError> {
        let side = self.plan.side;
        let mut runner = self.runner(side, "check")?;
        let synth = Synth::new(&self.pools.natural, &self.pools.simulated, self.plan.seed);
        let mut samples = Vec::new();
        for number in 0..2 {
            samples.push(self.sample(normalised(&synth.picture(APART + number, side)), side, &mut runner, &state.scaling)?);
        }
        let batch: Vec<&Sample> = samples.iter().collect();
        let weighing = Weighing { boundary: vec![1.0; self.plan.student.blocks.len()], channel: state.channel.clone() };
        let (mut ours, mut theirs) = (vec![0.0; state.parameters.len()], vec![0.0; state.parameters.len()]);
        let mode = Mode::EndToEnd;
        let cpu = Engine::new(&self.plan.student).step(&state.parameters, &batch, &mode, &weighing, &mut ours);
        let gpu = reference::step(&self.plan.student, &state.parameters, &batch, &mode, &weighing, &mut theirs, device);
        let size: f64 = ours.iter().map(|v| f64::from(*v).powi(2)).sum();
        let difference: f64 = ours.iter().zip(&theirs).map(|(a, b)| f64::from(a - b).powi(2)).sum();
        let loss = ((cpu.total - gpu.total) / cpu.total.max(1e-12)).abs();
        for (what, error) in [("the loss", loss), ("the gradient", (difference / size.max(1e-12)).sqrt())] {
            if error.is_nan() || error >= PARITY_TOLERANCE {
                return Err(DistillError::Parity { what, error });
            }
        }
        Ok(())
    }

    fn runner(&self, side: usize, what: &str) -> Result<Runner, TeacherError> {
        let mut name = self.work.as_os_str().to_owned();
        name.push(format!(".{what}.onnx"));
        self.teacher.runner(side, &PathBuf::from(name))
    }

    fn sample(&self, image: Vec<f32>, side: usize, runner: &mut Runner, scaling: &Scaling) -> Result<Sample, TeacherError> {
        let mut targets = runner.run(&image)?;
        for ((target, mean), deviation) in targets.iter_mut().zip(&scaling.mean).zip(&scaling.deviation) {
            for row in target.chunks_exact_mut(mean.len()) {
                for ((v, m), d) in row.iter_mut().zip(mean).zip(deviation) {
                    *v = (*v - m) / d;
                }
            }
        }
        Ok(Sample { side, image, targets })
    }

    /// Pictures to measure on: held-out photographs as they are, and varied ones.
    fn measuring_set(&self, scaling: &Scaling) -> Result<[Vec<Sample>; 2], DistillError> {
        let mut runner = self.runner(MEASURED_SIDE, "measure")?;
        let synth = Synth::new(&self.pools.held_out, &[], self.plan.seed ^ APART);
        let mut photographs = Vec::new();
        for picture in self.pools.held_out.iter().take(MEASURED) {
            photographs.push(self.sample(normalised(&middle(picture, MEASURED_SIDE)), MEASURED_SIDE, &mut runner, scaling)?);
        }
        let mut varied = Vec::new();
        for number in 0..MEASURED as u64 {
            varied.push(self.sample(normalised(&synth.picture(number, MEASURED_SIDE)), MEASURED_SIDE, &mut runner, scaling)?);
        }
        Ok([photographs, varied])
    }

    /// Train from `state` to the end of the plan. Returns whether it got there (else: a stop request).
    ///
    /// # Errors
    /// When the teacher fails, the loss diverges, or a checkpoint cannot be written.
    pub fn run(&self, state: &mut State, options: RunOptions<'_>) -> Result<bool, DistillError> {
        let RunOptions { device, gpu, threads, checkpoint, checkpoint_every, measure_every, stop, on_step, on_measured } = options;
        let plan = &self.plan;
        let measuring = self.measuring_set(&state.scaling)?;
        let first = *plan.window(state.step).start();
        let threads = threads.clamp(1, plan.batch.max(1));
        let over = AtomicBool::new(false);
        let scaling = state.scaling.clone();
        std::thread::scope(|scope| {
            let mut chunks: Vec<Receiver<Result<Vec<Sample>, TeacherError>>> = Vec::new();
            for producer in 0..threads {
                let (send, receive) = sync_channel(WAITING);
                let (over, scaling) = (&over, &scaling);
                scope.spawn(move || {
                    let mut runner: Option<(usize, Runner)> = None;
                    let mut chunk = first + producer;
                    while !over.load(Ordering::Relaxed) {
                        let made = self.chunk(chunk, producer, &mut runner, scaling);
                        let failed = made.is_err();
                        // A closed channel means that the loop has ended.
                        if send.send(made).is_err() || failed {
                            break;
                        }
                        chunk += threads;
                    }
                });
                chunks.push(receive);
            }
            let result = self.train(
                state,
                &chunks,
                first,
                threads,
                &mut |parameters, batch, step, weighing, gradients, engines: &mut [Engine]| {
                    let mode = plan.mode(step);
                    if gpu {
                        return reference::step(&plan.student, parameters, batch, &mode, weighing, gradients, device);
                    }
                    parallel_step(engines, parameters, batch, &mode, weighing, gradients)
                },
                &mut |state, loss, rate, engines| {
                    on_step(Progress { step: state.step, rate, loss });
                    let ended = state.step >= plan.steps;
                    let stopped = stop.load(Ordering::Relaxed);
                    if (measure_every > 0 && state.step % measure_every == 0) || ended {
                        let unexplained = self.measure(engines, &state.parameters, &measuring);
                        on_measured(state.step, &unexplained);
                        state.measured.push((state.step, unexplained));
                    }
                    if stopped || ended || (checkpoint_every > 0 && state.step % checkpoint_every == 0) {
                        state.save(checkpoint, plan)?;
                    }
                    Ok(stopped)
                },
            );
            over.store(true, Ordering::Relaxed);
            // Producers that wait to hand over a chunk wake when their channel closes.
            drop(chunks);
            result
        })
    }

    #[allow(clippy::type_complexity)]
    fn train(
        &self,
        state: &mut State,
        chunks: &[Receiver<Result<Vec<Sample>, TeacherError>>],
        first: usize,
        threads: usize,
        step: &mut dyn FnMut(&[f32], &[&Sample], usize, &Weighing, &mut [f32], &mut [Engine]) -> StepLoss,
        after: &mut dyn FnMut(&mut State, &StepLoss, f64, &mut [Engine]) -> Result<bool, DistillError>,
    ) -> Result<bool, DistillError> {
        let plan = &self.plan;
        let mut engines: Vec<Engine> = (0..threads).map(|_| Engine::new(&plan.student)).collect();
        let mut window: VecDeque<(usize, Vec<Sample>)> = VecDeque::new();
        let mut next = first;
        let mut gradients = vec![0.0; state.parameters.len()];
        let factors = plan.student.rate_factors();
        while state.step < plan.steps {
            let wanted = plan.window(state.step);
            while next <= *wanted.end() {
                let from = chunks.get((next - first) % chunks.len().max(1)).and_then(|c| c.recv().ok());
                let chunk =
                    from.unwrap_or_else(|| Err(TeacherError::Run("the thread that makes pictures has died; please report it".into())))?;
                window.push_back((next, chunk));
                next += 1;
            }
            while window.front().is_some_and(|c| !wanted.contains(&c.0)) {
                window.pop_front();
            }
            let pool: Vec<&Sample> = window.iter().flat_map(|c| &c.1).collect();
            let mut rng = rand_pcg::Pcg64::seed_from_u64(plan.seed.wrapping_mul(31).wrapping_add(state.step as u64));
            let batch: Vec<&Sample> = (0..plan.batch).filter_map(|_| pool.get(rng.random_range(0..pool.len().max(1))).copied()).collect();
            let weighing = Weighing { boundary: plan.boundary_weights(state.step), channel: state.channel.clone() };
            gradients.fill(0.0);
            let loss = step(&state.parameters, &batch, state.step, &weighing, &mut gradients, &mut engines);
            if !loss.total.is_finite() {
                return Err(DistillError::Diverged { loss: loss.total, step: state.step });
            }
            let rate = plan.rate_at(state.step);
            adam(state, &mut gradients, &factors, rate as f32);
            state.step += 1;
            if after(state, &loss, rate, &mut engines)? {
                // A stop request during the last step stops nothing.
                return Ok(state.step >= plan.steps);
            }
        }
        Ok(true)
    }

    /// Chunk number `chunk`: pictures and what the teacher makes of them.
    fn chunk(
        &self,
        chunk: usize,
        producer: usize,
        runner: &mut Option<(usize, Runner)>,
        scaling: &Scaling,
    ) -> Result<Vec<Sample>, TeacherError> {
        let side = self.plan.side_of(chunk);
        if runner.as_ref().is_none_or(|r| r.0 != side) {
            *runner = Some((side, self.runner(side, &format!("teacher{producer}"))?));
        }
        let Some((_, runner)) = runner else { return Err(TeacherError::Run("no runner".into())) };
        let synth = Synth::new(&self.pools.natural, &self.pools.simulated, self.plan.seed);
        (0..CHUNK).map(|i| self.sample(normalised(&synth.picture((chunk * CHUNK + i) as u64, side)), side, runner, scaling)).collect()
    }

    /// Share of the variance left unexplained at each stage.
    fn measure(&self, engines: &mut [Engine], parameters: &[f32], sets: &[Vec<Sample>; 2]) -> Unexplained {
        let mut one = |set: &[Sample]| -> Vec<f64> {
            let Some(engine) = engines.first_mut() else { return Vec::new() };
            let taps = &self.plan.student.taps;
            // Per tap and channel: squared error, sum and sum of squares of the target.
            let mut sums: Vec<Vec<[f64; 3]>> = taps.iter().map(|t| vec![[0.0; 3]; self.plan.student.blocks[t.1].outputs]).collect();
            let mut counts = vec![0.0f64; taps.len()];
            for sample in set {
                let ours = engine.boundaries(parameters, &sample.image, sample.side);
                for (((_, b), sum), count) in taps.iter().zip(&mut sums).zip(&mut counts) {
                    for (o, t) in ours[*b].chunks_exact(sum.len()).zip(sample.targets[*b].chunks_exact(sum.len())) {
                        *count += 1.0;
                        for ((s, o), t) in sum.iter_mut().zip(o).zip(t) {
                            let (o, t) = (f64::from(*o), f64::from(*t));
                            *s = [s[0] + (o - t).powi(2), s[1] + t, s[2] + t * t];
                        }
                    }
                }
            }
            sums.iter()
                .zip(&counts)
                .map(|(sum, n)| sum.iter().map(|[e, s, q]| e / (q - s * s / n).max(1e-9)).sum::<f64>() / sum.len().max(1) as f64)
                .collect()
        };
        Unexplained { photographs: one(&sets[0]), varied: one(&sets[1]) }
    }
}

/// Splits the batch over the engines; the mean of their losses and gradients.
fn parallel_step(
    engines: &mut [Engine],
    parameters: &[f32],
    batch: &[&Sample],
    mode: &Mode,
    weighing: &Weighing,
    gradients: &mut [f32],
) -> StepLoss {
    let each = batch.len().div_ceil(engines.len().max(1)).max(1);
    let parts: Vec<(StepLoss, Vec<f32>, f32)> = std::thread::scope(|scope| {
        let running: Vec<_> = engines
            .iter_mut()
            .zip(batch.chunks(each))
            .map(|(engine, part)| {
                scope.spawn(move || {
                    let mut own = vec![0.0; parameters.len()];
                    let loss = engine.step(parameters, part, mode, weighing, &mut own);
                    (loss, own, part.len() as f32 / batch.len() as f32)
                })
            })
            .collect();
        // A panic in the engine is a bug: it goes on up, with its message.
        running.into_iter().map(|r| r.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    });
    let mut loss = StepLoss { boundary: vec![0.0; weighing.boundary.len()], total: 0.0 };
    for (part, own, share) in parts {
        loss.total += part.total * f64::from(share);
        loss.boundary.iter_mut().zip(&part.boundary).for_each(|(a, b)| *a += b * f64::from(share));
        gradients.iter_mut().zip(&own).for_each(|(a, b)| *a += b * share);
    }
    loss
}

/// One step of Adam with the gradient clipped by its global norm. On the host: the student has fewer parameters than one picture has activations.
fn adam(state: &mut State, gradients: &mut [f32], factors: &[f32], rate: f32) {
    let norm = gradients.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt() as f32;
    let clip = (CLIP_NORM / (norm + 1e-6)).min(1.0);
    let [b1, b2] = BETAS;
    let steps = state.step as i32 + 1;
    let (c1, c2) = (1.0 - b1.powi(steps), 1.0 - b2.powi(steps));
    for ((((p, g), m), v), f) in state.parameters.iter_mut().zip(gradients).zip(&mut state.moment_1).zip(&mut state.moment_2).zip(factors) {
        let g = *g * clip;
        *m = *m * b1 + g * (1.0 - b1);
        *v = *v * b2 + g * g * (1.0 - b2);
        *p -= rate * f * (*m / c1) / ((*v / c2).sqrt() + 1e-8);
    }
}

/// Grey levels as the backbone's input.
fn normalised(image: &[f32]) -> Vec<f32> {
    image.iter().map(|v| (v - MEAN) / STD).collect()
}

/// The middle `side` x `side` px.
fn middle(picture: &Picture, side: usize) -> Vec<f32> {
    let (x, y) = ((picture.width - side.min(picture.width)) / 2, (picture.height - side.min(picture.height)) / 2);
    let mut out = Vec::with_capacity(side * side * RGB);
    for row in y..y + side {
        let from = (row * picture.width + x) * RGB;
        out.extend(picture.pixels.get(from..from + side * RGB).unwrap_or_default().iter().map(|v| f32::from(*v)));
    }
    out.resize(side * side * RGB, 0.0);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_step_has_its_pictures_at_one_size() {
        let plan = plan_of(1000);
        let mut seen_large = false;
        for step in 0..plan.steps {
            let window = plan.window(step);
            assert!(window.clone().count() <= WINDOW && !window.is_empty());
            let sides: Vec<usize> = window.map(|c| plan.side_of(c)).collect();
            assert!(sides.iter().all(|s| *s == sides[0]), "step {step} mixes {sides:?}");
            assert!(!seen_large || sides[0] == plan.large_side);
            seen_large = sides[0] == plan.large_side;
        }
        assert!(seen_large && plan.is_blockwise(399) && !plan.is_blockwise(400));
        assert!(plan.rate_at(0) < plan.rate && plan.rate_at(999) < 0.02 * plan.rate);
    }

    fn plan_of(steps: usize) -> Plan {
        let student = student::tests::tiny();
        Plan { student, steps, batch: 16, seed: 1, rate: 2e-3, blockwise: 0.4, large: 0.2, side: 128, large_side: 192 }
    }
}
