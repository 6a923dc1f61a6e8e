//! A detector trained on good parts and pseudo-defects: the distilled trunk with a head that gives each cell of the picture the log odds of a defect.
//!
//! UniAD learns to reproduce what is normal and never sees an abnormal picture; that takes features in which a defect is large beside the normal
//! variation. Where defects are a few pixels on printed or textured parts, it pays to show the network what "locally wrong" looks like ([`pseudo`]),
//! on top of the same good parts. The loss is plain cross entropy on cells (so the map is a calibrated log odds, and its maximum is comparable among
//! products) and on the picture as a whole (so the rare worst cells of good parts count, as they will on the line).
//!
//! A run is a function of its [`Plan`], the parts and the trunk: stopped and resumed, it sees the same batches.

pub mod engine;
pub mod export;
pub mod network;
pub mod parts;
pub mod pseudo;
pub mod reference;

use crate::checkpoint::{CheckpointError, Lists, save_lists};
use crate::distill::student::Architecture;
use crate::distill::{MEAN, STD};
use crate::onnx::OnnxError;
use cull::anomaly::{AnomalyMap, ScoreRule, Scorer};
use cull::eval::metrics::{Scored, image_metrics};
use engine::{Engine, Prepared};
use network::{Network, STRIDE, SeenWithLatents, adopt};
use parts::Parts;
use pseudo::{Label, Picture};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_pcg::Pcg64;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};

/// Good parts rendered or read together: each also gives patches to the others.
const CHUNK: usize = 16;
/// How often each of them is used, every time with other defects.
const REPLAY: usize = 2;
/// Chunks waiting in front of the training loop, a producer.
const WAITING: usize = 2;
/// Good parts over which the stages' means and deviations are taken.
const STATISTICS: u64 = 240;
/// Good parts that the latents are the principal components of, and that say what to expect.
const EXPECTED_FROM: u64 = 1200;
/// Parts for them come from far behind those that a run reaches.
const APART: u64 = 1 << 30;
/// Version of the checkpoint's layout. 3: filters at strides 2 and 4 in the head.
const FORMAT: u32 = 3;
/// The checkpoint's key.
const KIND: &str = "cull-detect";
/// Adam's moment decays: a short run wants a second moment that forgets sooner than the usual 0.999.
const BETAS: [f32; 2] = [0.9, 0.99];
/// Largest global gradient norm: first steps and odd pictures only.
const CLIP_NORM: f32 = 3.0;
/// Cells whose cross entropies add up to a loss of their mean: about as many as defects touch, not all of the map.
const CELLS: f32 = 100.0;
/// Weight of the cross entropy of the whole picture.
const WHOLE: f32 = 0.3;
/// Share of the steps, the first ones, that train the head alone: the trunk learns nothing from an untrained head.
const HEAD_ALONE: f64 = 0.04;

/// The score: nearly the maximum of the map; defects are small.
pub const SCORE: ScoreRule = ScoreRule::PooledMax { window_px: 4 };

/// Why a detector cannot be trained.
#[derive(Debug, thiserror::Error)]
pub enum DetectorError {
    /// Checkpoint.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The detector to go on from.
    #[error(transparent)]
    Onnx(#[from] OnnxError),
    /// The loss is not a number.
    #[error("the loss became {loss} at step {step}: training diverged; resume from the last checkpoint with a lower --learning-rate")]
    Diverged {
        /// Loss.
        loss: f64,
        /// Step.
        step: usize,
    },
    /// A thread died.
    #[error("the thread that makes pictures has died; please report it")]
    Producer,
}

/// Everything that decides a run, besides parts and trunk.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// Shape of the trunk.
    pub trunk: Architecture,
    /// Height and width of the input, px.
    pub size: [usize; 2],
    /// Steps in all.
    pub steps: usize,
    /// Pictures a step.
    pub batch: usize,
    /// Seed of weights, parts and defects.
    pub seed: u64,
    /// Highest learning rate.
    pub rate: f64,
}

impl Plan {
    /// Learning rate: linear warm-up, then a half cosine to a hundredth.
    fn rate_at(&self, step: usize) -> f64 {
        let warm = 100.min(self.steps / 10).max(1);
        if step < warm {
            return self.rate * (step + 1) as f64 / warm as f64;
        }
        let done = (step - warm) as f64 / (self.steps.saturating_sub(warm)).max(1) as f64;
        self.rate * (0.01 + 0.99 * 0.5 * (1.0 + (std::f64::consts::PI * done.min(1.0)).cos()))
    }

    /// First layer that `step` trains.
    fn first_layer(&self, network: &Network, step: usize) -> usize {
        if (step as f64) < self.steps as f64 * HEAD_ALONE { network.head } else { network.thawed }
    }
}

/// One training picture.
struct Sample {
    image: Vec<f32>,
    cells: Vec<Label>,
}

/// A labelled picture to measure on, and its category.
pub struct Tested {
    /// Normalised, `[height, width, 3]`.
    pub image: Vec<f32>,
    /// Product.
    pub category: String,
    /// Truth.
    pub defective: bool,
}

impl Tested {
    /// A picture as preprocessing gives it, `[3, height, width]`.
    pub fn new(planar: &[f32], category: String, defective: bool) -> Self {
        Self { image: parts::interleaved(planar).collect(), category, defective }
    }
}

/// How well the detector does on labelled parts.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// Step.
    pub step: usize,
    /// Image AUROC of all parts together, a fraction.
    pub auroc: f64,
    /// Share of the defective parts above all but 0.5 % of the good ones.
    pub caught: f64,
    /// Image AUROC by category.
    pub categories: BTreeMap<String, f64>,
}

/// A checkpoint's contents.
#[derive(Clone, Debug)]
pub struct State {
    /// Steps done.
    pub step: usize,
    /// Weights.
    pub parameters: Vec<f32>,
    moment_1: Vec<f32>,
    moment_2: Vec<f32>,
    factors: Vec<f32>,
    /// Measurements so far.
    pub measured: Vec<Measured>,
}

#[derive(Serialize, Deserialize)]
struct Header {
    format: u32,
    plan: Plan,
    step: usize,
    measured: Vec<Measured>,
}

impl State {
    /// Write a checkpoint; an old one is replaced only when the new one is complete.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save(&self, path: &Path, plan: &Plan) -> Result<(), DetectorError> {
        let header = Header { format: FORMAT, plan: plan.clone(), step: self.step, measured: self.measured.clone() };
        Ok(save_lists(path, KIND, &header, &self.lists())?)
    }

    fn of(network: &Network, parameters: Vec<f32>) -> Self {
        let zero = vec![0.0; parameters.len()];
        let factors = network.rate_factors(&parameters);
        Self { step: 0, parameters, moment_1: zero.clone(), moment_2: zero, factors, measured: Vec::new() }
    }

    fn lists(&self) -> [(&'static str, &[f32]); 4] {
        [("parameters", &self.parameters), ("moment_1", &self.moment_1), ("moment_2", &self.moment_2), ("factors", &self.factors)]
    }

    /// Read a checkpoint of a run with the same trunk, input size, batch and seed. The schedule (steps, learning rate) may differ: it is then that of the
    /// new plan from here on.
    ///
    /// # Errors
    /// When the file cannot be read, is damaged or belongs to another plan.
    pub fn load(path: &Path, plan: &Plan) -> Result<Self, DetectorError> {
        let file = Lists::<Header>::read(path, KIND)?;
        let was = &file.header.plan;
        if file.header.format != FORMAT || (&was.trunk, was.size, was.batch, was.seed) != (&plan.trunk, plan.size, plan.batch, plan.seed) {
            return Err(file.of_another_run("backbone, input size, batch or seed").into());
        }
        let len = Network::new(&plan.trunk, plan.size).parameters;
        let list = |name: &str| file.list(name, len);
        Ok(Self {
            step: file.header.step,
            parameters: list("parameters")?,
            moment_1: list("moment_1")?,
            moment_2: list("moment_2")?,
            factors: list("factors")?,
            measured: file.header.measured.clone(),
        })
    }
}

/// Loss of a step.
#[derive(Clone, Copy, Debug, Default)]
pub struct StepLoss {
    /// Cross entropy of the cells judged, over `CELLS` cells a picture.
    pub cells: f64,
    /// Cross entropy of "anything wrong?" a picture.
    pub whole: f64,
}

impl StepLoss {
    /// What the gradients are of.
    pub fn total(self) -> f64 {
        self.cells + f64::from(WHOLE) * self.whole
    }
}

/// What the loop tells its caller.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    /// Steps done.
    pub step: usize,
    /// Learning rate.
    pub rate: f64,
    /// Loss of this step's batch.
    pub loss: StepLoss,
}

/// Options of a run that do not change its result, and callbacks.
pub struct RunOptions<'a> {
    /// Threads of the step, and as many that make pictures.
    pub threads: usize,
    /// Checkpoint file, written every `checkpoint_every` steps, on a stop request and at the end.
    pub checkpoint: &'a Path,
    /// Steps between checkpoints and measurements.
    pub checkpoint_every: usize,
    /// Labelled parts to measure on; may be empty.
    pub tested: &'a [Tested],
    /// Set from outside (Ctrl-C) to stop after the current step.
    pub stop: &'a AtomicBool,
    /// Called after every step.
    pub on_step: &'a mut dyn FnMut(Progress),
    /// Called after every measurement.
    pub on_measured: &'a mut dyn FnMut(&Measured),
}

/// A plan with the parts it is for.
pub struct Training<'a> {
    /// Plan.
    pub plan: Plan,
    /// Good parts.
    pub parts: &'a Parts,
}

impl Training<'_> {
    /// The start of a run: `trunk`'s weights, and a fresh head on the scale of its stages.
    pub fn start(&self, trunk: &[f32]) -> State {
        let network = Network::new(&self.plan.trunk, self.plan.size);
        let mut parameters = network.init(trunk, self.plan.seed);
        let mut reader = self.parts.reader(self.plan.size);
        let good: Vec<Vec<f32>> = (0..STATISTICS).map(|number| normalised(&reader.part(APART + number, self.plan.seed))).collect();
        let mut engine = Engine::new(&network);
        let mut sums: Vec<Vec<[f64; 2]>> = network.taps.iter().map(|t| vec![[0.0; 2]; network.nodes[t.0].shape[2]]).collect();
        let mut counts = vec![0.0f64; sums.len()];
        let prepared = Prepared::new(&network, &parameters, network.nodes.len());
        for image in &good {
            engine.forward(&parameters, &prepared, image);
            for (((tap, _), sums), count) in network.taps.iter().zip(&mut sums).zip(&mut counts) {
                for row in engine.output(*tap).chunks_exact(sums.len()) {
                    *count += 1.0;
                    for (s, v) in sums.iter_mut().zip(row) {
                        *s = [s[0] + f64::from(*v), s[1] + f64::from(*v).powi(2)];
                    }
                }
            }
        }
        let moments: Vec<Vec<(f32, f32)>> = sums
            .iter()
            .zip(&counts)
            .map(|(sums, n)| {
                let each: Vec<(f64, f64)> = sums.iter().map(|[s, q]| (s / n, (q / n - (s / n).powi(2)).max(0.0).sqrt())).collect();
                // A channel that hardly moves on good parts must not be amplified without end.
                let floor = each.iter().map(|m| m.1).sum::<f64>() / each.len().max(1) as f64 * 0.2 + 1e-3;
                each.into_iter().map(|(m, d)| (m as f32, d.max(floor) as f32)).collect()
            })
            .collect();
        network.normalise_taps(&mut parameters, &moments);
        // The latents read a layer that has just been given its scale.
        let prepared = Prepared::new(&network, &parameters, network.nodes.len());
        let ex = network.expectation;
        let mut summaries = Vec::new();
        let each = |reader: &mut parts::Reader<'_>, on_part: &mut dyn FnMut(&[f32])| {
            for number in 0..EXPECTED_FROM {
                on_part(&normalised(&reader.part(2 * APART + number, self.plan.seed)));
            }
        };
        each(&mut reader, &mut |image| {
            engine.forward(&parameters, &prepared, image);
            summaries.push(engine.output(ex.summary).to_vec());
        });
        network.set_latents(&mut parameters, &summaries);
        let prepared = Prepared::new(&network, &parameters, network.nodes.len());
        let mut seen = SeenWithLatents::default();
        each(&mut reader, &mut |image| {
            engine.forward(&parameters, &prepared, image);
            seen.add(engine.output(ex.latents), engine.output(ex.seen));
        });
        network.set_expected(&mut parameters, &seen);
        State::of(&network, parameters)
    }

    /// The start of a run that goes on from a detector of the same parts, exported before: its weights, a fresh optimiser. Also the names of the layers
    /// that it lacks.
    ///
    /// # Errors
    /// When `bytes` (of the file `name`) is no detector of this shape.
    pub fn start_from(&self, trunk: &[f32], bytes: &[u8], name: &str) -> Result<(State, Vec<String>), DetectorError> {
        let network = Network::new(&self.plan.trunk, self.plan.size);
        let mut parameters = network.init(trunk, self.plan.seed);
        let fresh = adopt(&network, &mut parameters, bytes, name)?;
        Ok((State::of(&network, parameters), fresh))
    }

    /// Train from `state` to the end of the plan. Returns whether it got there (else: a stop request).
    ///
    /// # Errors
    /// When the loss diverges or a checkpoint cannot be written.
    pub fn run(&self, state: &mut State, options: RunOptions<'_>) -> Result<bool, DetectorError> {
        let RunOptions { threads, checkpoint, checkpoint_every, tested, stop, on_step, on_measured } = options;
        let plan = &self.plan;
        let network = Network::new(&plan.trunk, plan.size);
        let threads = threads.clamp(1, plan.batch.max(1));
        let over = AtomicBool::new(false);
        let first = state.step * plan.batch / (CHUNK * REPLAY);
        std::thread::scope(|scope| {
            let mut chunks: Vec<Receiver<Vec<Sample>>> = Vec::new();
            for producer in 0..threads {
                let (send, receive) = sync_channel(WAITING);
                let over = &over;
                scope.spawn(move || {
                    let mut reader = self.parts.reader(plan.size);
                    let mut chunk = first + producer;
                    // A closed channel means that the loop has ended.
                    while !over.load(Ordering::Relaxed) && send.send(self.chunk(chunk, &mut reader)).is_ok() {
                        chunk += threads;
                    }
                });
                chunks.push(receive);
            }
            let mut engines: Vec<Engine<'_>> = (0..threads).map(|_| Engine::new(&network)).collect();
            let mut waiting: Vec<Sample> = Vec::new();
            let mut next = first;
            // Samples of the first chunk that an interrupted run has used already.
            let mut used = state.step * plan.batch % (CHUNK * REPLAY);
            let mut gradients = vec![0.0; state.parameters.len()];
            let result = (|| {
                while state.step < plan.steps {
                    while waiting.len() < plan.batch {
                        let from = chunks.get((next - first) % chunks.len().max(1)).and_then(|c| c.recv().ok());
                        let mut chunk = from.ok_or(DetectorError::Producer)?;
                        chunk.drain(..std::mem::take(&mut used).min(chunk.len()));
                        waiting.append(&mut chunk);
                        next += 1;
                    }
                    let batch: Vec<Sample> = waiting.drain(..plan.batch).collect();
                    gradients.fill(0.0);
                    let from = plan.first_layer(&network, state.step);
                    let loss = parallel_step(&network, &mut engines, &state.parameters, &batch, from, &mut gradients);
                    if !loss.total().is_finite() {
                        return Err(DetectorError::Diverged { loss: loss.total(), step: state.step });
                    }
                    let rate = plan.rate_at(state.step);
                    adam(state, &mut gradients, rate as f32);
                    state.step += 1;
                    on_step(Progress { step: state.step, rate, loss });
                    let (ended, stopped) = (state.step >= plan.steps, stop.load(Ordering::Relaxed));
                    let due = checkpoint_every > 0 && state.step.is_multiple_of(checkpoint_every);
                    if (due || ended) && !tested.is_empty() {
                        let measured = measure(&network, &mut engines, state, tested);
                        on_measured(&measured);
                        state.measured.push(measured);
                    }
                    if due || ended || stopped {
                        state.save(checkpoint, plan)?;
                    }
                    if stopped {
                        // A stop request during the last step stops nothing.
                        return Ok(ended);
                    }
                }
                Ok(true)
            })();
            over.store(true, Ordering::Relaxed);
            // Producers that wait to hand over a chunk wake when their channel closes.
            drop(chunks);
            result
        })
    }

    /// Chunk number `chunk` of training pictures, in an order of its own.
    fn chunk(&self, chunk: usize, reader: &mut parts::Reader<'_>) -> Vec<Sample> {
        let seed = self.plan.seed;
        let good: Vec<Picture> = (0..CHUNK).map(|i| reader.part((chunk * CHUNK + i) as u64, seed)).collect();
        let mut samples = Vec::with_capacity(CHUNK * REPLAY);
        for use_ in 0..REPLAY {
            for (i, clean) in good.iter().enumerate() {
                let number = ((chunk * REPLAY + use_) * CHUNK + i) as u64;
                let other = good.get((i + 1 + use_ * 5) % CHUNK).unwrap_or(clean);
                let damaged =
                    pseudo::damage(clean, other, seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ number.wrapping_mul(0xbf58_476d_1ce4_e5b9));
                samples.push(Sample { cells: pseudo::cells(&damaged, STRIDE), image: normalised(&damaged.picture) });
            }
        }
        samples.shuffle(&mut Pcg64::seed_from_u64(seed ^ chunk as u64));
        samples
    }
}

/// Grey levels as the trunk's input.
fn normalised(picture: &Picture) -> Vec<f32> {
    picture.pixels.iter().map(|v| (v.round() - MEAN) / STD).collect()
}

/// Losses of one picture, and the gradient of their sum (weighed as in [`StepLoss::total`]) at the log odds.
fn loss(odds: &[f32], labels: &[Label], gradient: &mut Vec<f32>) -> StepLoss {
    gradient.clear();
    let softplus = |x: f32| f64::from(x.max(0.0) + (-x.abs()).exp().ln_1p());
    let sigmoid = |x: f32| 1.0 / (1.0 + (-x).exp());
    let mut out = StepLoss::default();
    for (&x, label) in odds.iter().zip(labels) {
        gradient.push(match label {
            Label::Unclear => 0.0,
            Label::Good => {
                out.cells += softplus(x);
                sigmoid(x) / CELLS
            }
            Label::Defective => {
                out.cells += softplus(-x);
                (sigmoid(x) - 1.0) / CELLS
            }
        });
    }
    out.cells /= f64::from(CELLS);
    let defective = labels.contains(&Label::Defective);
    // A picture with nothing but unclear changes is neither good nor defective.
    if defective || !labels.contains(&Label::Unclear) {
        let top = odds.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f32 = odds.iter().map(|x| (x - top).exp()).sum();
        let any = top + sum.ln();
        out.whole = if defective { softplus(-any) } else { softplus(any) };
        let outer = WHOLE * (sigmoid(any) - if defective { 1.0 } else { 0.0 });
        for (g, x) in gradient.iter_mut().zip(odds) {
            *g += outer * (x - top).exp() / sum;
        }
    }
    out
}

/// Splits the batch over the engines; the mean of losses and gradients over its pictures.
fn parallel_step(
    network: &Network,
    engines: &mut [Engine<'_>],
    parameters: &[f32],
    batch: &[Sample],
    first: usize,
    gradients: &mut [f32],
) -> StepLoss {
    let prepared = Prepared::new(network, parameters, first);
    let each = batch.len().div_ceil(engines.len().max(1)).max(1);
    let share = 1.0 / batch.len().max(1) as f32;
    let work = |engine: &mut Engine<'_>, part: &[Sample], into: &mut [f32]| {
        let (mut sum, mut at_odds) = (StepLoss::default(), Vec::new());
        for sample in part {
            let own = loss(engine.forward(parameters, &prepared, &sample.image), &sample.cells, &mut at_odds);
            sum.cells += own.cells * f64::from(share);
            sum.whole += own.whole * f64::from(share);
            at_odds.iter_mut().for_each(|g| *g *= share);
            engine.backward(parameters, &prepared, &at_odds, first, into);
        }
        sum
    };
    if let [engine] = engines {
        return work(engine, batch, gradients);
    }
    let parts: Vec<(StepLoss, Vec<f32>)> = std::thread::scope(|scope| {
        let running: Vec<_> = engines
            .iter_mut()
            .zip(batch.chunks(each))
            .map(|(engine, part)| {
                scope.spawn(|| {
                    let mut own = vec![0.0; parameters.len()];
                    (work(engine, part, &mut own), own)
                })
            })
            .collect();
        // A panic in the engine is a bug: it goes on up, with its message.
        running.into_iter().map(|r| r.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    });
    let mut sum = StepLoss::default();
    for (part, own) in parts {
        sum.cells += part.cells;
        sum.whole += part.whole;
        gradients.iter_mut().zip(&own).for_each(|(a, b)| *a += b);
    }
    sum
}

/// One step of Adam with the gradient clipped by its global norm.
fn adam(state: &mut State, gradients: &mut [f32], rate: f32) {
    let norm = gradients.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt() as f32;
    let clip = (CLIP_NORM / (norm + 1e-6)).min(1.0);
    let [b1, b2] = BETAS;
    let steps = state.step as i32 + 1;
    let (c1, c2) = (1.0 - b1.powi(steps), 1.0 - b2.powi(steps));
    let moments = state.moment_1.iter_mut().zip(&mut state.moment_2);
    for (((p, g), (m, v)), f) in state.parameters.iter_mut().zip(gradients).zip(moments).zip(&state.factors) {
        let g = *g * clip;
        *m = *m * b1 + g * (1.0 - b1);
        *v = *v * b2 + g * g * (1.0 - b2);
        *p -= rate * f * (*m / c1) / ((*v / c2).sqrt() + 1e-8);
    }
}

fn measure(network: &Network, engines: &mut [Engine<'_>], state: &State, tested: &[Tested]) -> Measured {
    let prepared = Prepared::new(network, &state.parameters, network.nodes.len());
    let each = tested.len().div_ceil(engines.len().max(1)).max(1);
    let scores: Vec<f32> = std::thread::scope(|scope| {
        let running: Vec<_> = engines
            .iter_mut()
            .zip(tested.chunks(each))
            .map(|(engine, part)| {
                let prepared = &prepared;
                scope.spawn(move || {
                    let [grid_rows, grid_cols] = network.grid();
                    let mut scorer = Scorer::new(SCORE, network.grid(), network.size());
                    part.iter()
                        .map(|t| {
                            let odds = engine.forward(&state.parameters, prepared, &t.image);
                            scorer.score(&AnomalyMap { grid_rows, grid_cols, values: odds.iter().map(|x| export::map_value(*x)).collect() })
                        })
                        .collect::<Vec<f32>>()
                })
            })
            .collect();
        running.into_iter().flat_map(|r| r.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    });
    let mut all = Vec::new();
    let mut by_category: BTreeMap<String, Vec<Scored>> = BTreeMap::new();
    for (t, score) in tested.iter().zip(scores) {
        let scored = Scored { score, defective: t.defective };
        all.push(scored);
        by_category.entry(t.category.clone()).or_default().push(scored);
    }
    let mut good: Vec<f32> = all.iter().filter(|s| !s.defective).map(|s| s.score).collect();
    good.sort_by(f32::total_cmp);
    // The score that at most 0.5 % of the good parts exceed.
    let limit = good.len().checked_sub(1 + good.len() / 200).and_then(|i| good.get(i)).copied().unwrap_or(f32::INFINITY);
    let bad = all.iter().filter(|s| s.defective);
    let (count, caught) = bad.fold((0, 0), |(n, c), s| (n + 1, c + usize::from(s.score > limit)));
    Measured {
        step: state.step,
        auroc: image_metrics(&all).auroc.unwrap_or(f64::NAN),
        caught: f64::from(caught as u32) / f64::from(count.max(1) as u32),
        categories: by_category.into_iter().filter_map(|(name, list)| Some((name, image_metrics(&list).auroc?))).collect(),
    }
}
