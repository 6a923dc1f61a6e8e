//! The training loop: features in memory, a schedule, checkpoints, early stopping, validation. Knows no files but its own checkpoint and no images.

use crate::checkpoint::{self, CheckpointError};
use crate::device::{Chosen, Kind};
use crate::engine::Engine;
use crate::optimiser::{Optimiser, OptimiserConfig, Schedule};
use crate::uniad::{Uniad, UniadConfig, Weights, host, mse};
use burn::tensor::{Device, Tensor, TensorData};
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

/// A loss this many times the first epoch's mean, or not a number, is divergence: the run stops and the last good checkpoint stands.
const DIVERGED_FACTOR: f32 = 10.0;

/// What is minimised.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Loss {
    /// Mean squared error over all elements (the paper).
    Mse,
    /// 1 - cosine similarity per token; tokens easier than a growing share of the batch get a tenth of their gradient.
    HardCosine {
        /// Share of the tokens that count as easy at the end of training, 0 to 1.
        easy: f64,
    },
}

/// Everything that decides a run. Two runs with the same plan, features and device give the same weights.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// Model.
    pub model: UniadConfig,
    /// Loss.
    pub loss: Loss,
    /// Optimiser.
    pub optimiser: OptimiserConfig,
    /// Learning rate.
    pub schedule: Schedule,
    /// Samples a step.
    pub batch: usize,
    /// Steps in all.
    pub steps: usize,
    /// Seed of weights, order, dropout and jitter.
    pub seed: u64,
    /// Exponential moving average of the weights, used for validation and the bundle; 0 for none.
    pub ema: f64,
}

/// Features of a set of images, whitened or not, row-major `[images, tokens, channels]`.
#[derive(Clone, Debug, Default)]
pub struct FeatureSet {
    /// Tokens a sample.
    pub tokens: usize,
    /// Channels a token.
    pub channels: usize,
    /// All values.
    pub values: Vec<f32>,
}

impl FeatureSet {
    /// Samples.
    pub fn len(&self) -> usize {
        self.values.len() / (self.tokens * self.channels).max(1)
    }

    /// No samples.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// One sample, `[tokens, channels]`.
    pub fn sample(&self, index: usize) -> &[f32] {
        let size = self.tokens * self.channels;
        self.values.get(index * size..(index + 1) * size).unwrap_or(&[])
    }

    /// Several samples as one tensor.
    pub fn batch(&self, indices: &[usize], device: &Device) -> Tensor<3> {
        let mut data = Vec::with_capacity(indices.len() * self.tokens * self.channels);
        for i in indices {
            data.extend_from_slice(self.sample(*i));
        }
        Tensor::from_data(TensorData::new(data, [indices.len(), self.tokens, self.channels]), device)
    }
}

/// Per-channel mean and scale of a feature set: `(feature - mean) * scale` has mean 0 and standard deviation 1 over all samples and tokens.
pub fn whitening(set: &FeatureSet) -> (Vec<f32>, Vec<f32>) {
    let mut sum = vec![0f64; set.channels];
    let mut square = vec![0f64; set.channels];
    for token in set.values.chunks_exact(set.channels.max(1)) {
        for ((s, q), v) in sum.iter_mut().zip(&mut square).zip(token) {
            *s += f64::from(*v);
            *q += f64::from(*v) * f64::from(*v);
        }
    }
    let n = (set.values.len() / set.channels.max(1)).max(1) as f64;
    let mean: Vec<f32> = sum.iter().map(|s| (s / n) as f32).collect();
    let scale = square
        .iter()
        .zip(&sum)
        .map(|(q, s)| {
            let deviation = (q / n - (s / n).powi(2)).max(0.0).sqrt();
            // A dead channel carries nothing: scale 0 keeps it out instead of blowing its noise up.
            if deviation < 1e-6 { 0.0 } else { (1.0 / deviation) as f32 }
        })
        .collect();
    (mean, scale)
}

/// Apply [`whitening`] in place.
pub fn whiten(set: &mut FeatureSet, mean: &[f32], scale: &[f32]) {
    for token in set.values.chunks_exact_mut(set.channels.max(1)) {
        for ((v, m), s) in token.iter_mut().zip(mean).zip(scale) {
            *v = (*v - m) * s;
        }
    }
}

/// What the loop tells its caller after every step.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    /// Steps done.
    pub step: usize,
    /// Loss of this step.
    pub loss: f32,
    /// Global gradient norm before clipping.
    pub grad_norm: f32,
    /// Learning rate of this step.
    pub rate: f64,
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// All steps done.
    Finished,
    /// Stopped by request; a checkpoint is on disk if a path was given.
    Interrupted,
    /// The validation figure has not risen for the patience allowed.
    EarlyStop,
}

/// Why a run failed.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// Nothing to train on.
    #[error("there is nothing to train on: {0}")]
    Empty(String),
    /// The plan cannot work.
    #[error("the training plan cannot work: {0}")]
    Plan(String),
    /// Loss blew up.
    #[error(
        "training diverged at step {step}: the {what} became {value}; the last good checkpoint is {checkpoint}; try a lower --learning-rate"
    )]
    Diverged {
        /// `loss` or `gradient norm`.
        what: &'static str,
        /// Its value.
        value: f32,
        /// Steps done before it, all of them good.
        step: usize,
        /// Where the last good state is.
        checkpoint: String,
    },
    /// Checkpoint trouble.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
}

/// The state of a run: everything a checkpoint holds.
pub struct State {
    /// Weights, plain tensors.
    pub weights: Weights,
    /// Optimiser with moments.
    pub optimiser: Optimiser,
    /// Moving average, if any.
    pub ema: Option<Vec<Tensor<2>>>,
    /// Steps done.
    pub step: usize,
    /// Loss of every step so far.
    pub losses: Vec<f32>,
    /// Validation figures so far, as (step, value).
    pub validations: Vec<(usize, f64)>,
    /// The weights that validated best, kept in runs with patience only: what such a run ships.
    pub best: Option<Vec<Tensor<2>>>,
}

impl State {
    /// The start of a run.
    pub fn start(plan: &Plan, device: &Device) -> Self {
        let weights = Weights::init(&plan.model, plan.seed, device);
        let ema = (plan.ema > 0.0).then(|| weights.values.clone());
        Self {
            weights,
            optimiser: Optimiser::new(plan.optimiser.clone()),
            ema,
            step: 0,
            losses: Vec::new(),
            validations: Vec::new(),
            best: None,
        }
    }

    /// The weights as they stand: the moving average where there is one.
    pub fn averaged_weights(&self) -> Weights {
        match &self.ema {
            Some(ema) => Weights::new(self.weights.layout.clone(), ema.clone()),
            None => self.weights.clone(),
        }
    }

    /// The weights that are shipped: those that validated best where they are kept, else [`State::averaged_weights`].
    pub fn best_weights(&self) -> Weights {
        match &self.best {
            Some(best) => Weights::new(self.weights.layout.clone(), best.clone()),
            None => self.averaged_weights(),
        }
    }

    /// Highest validation figure so far, and how many validations have passed since.
    fn standing(&self) -> (f64, usize) {
        let mut standing = (f64::NEG_INFINITY, 0);
        for (_, figure) in &self.validations {
            standing = if *figure > standing.0 { (*figure, 0) } else { (standing.0, standing.1 + 1) };
        }
        standing
    }
}

/// Options of a run that do not change its result.
pub struct RunOptions<'a> {
    /// Checkpoint file, written every `checkpoint_every` steps, on a stop request and at the end.
    pub checkpoint: Option<PathBuf>,
    /// Steps between checkpoints.
    pub checkpoint_every: usize,
    /// Set from outside (Ctrl-C) to stop after the current step.
    pub stop: &'a AtomicBool,
    /// Called after every step.
    pub on_step: &'a mut dyn FnMut(Progress),
    /// Steps between validations; 0 for none.
    pub validate_every: usize,
    /// Gives a figure to be maximised (mean image AUROC).
    pub validate: Option<&'a mut dyn FnMut(&Weights) -> f64>,
    /// Stop when this many validations in a row brought no new best; 0 for never.
    pub patience: usize,
}

/// Train from `state` to the end of the plan. `device` is the plain device; autodiff is added here.
///
/// # Errors
/// On an empty set, a plan that cannot work, divergence, or a checkpoint that cannot be written.
pub fn train(plan: &Plan, features: &FeatureSet, state: &mut State, chosen: &Chosen, options: RunOptions<'_>) -> Result<Ended, TrainError> {
    plan.model.check().map_err(TrainError::Plan)?;
    if features.is_empty() {
        return Err(TrainError::Empty("no normal images were read".into()));
    }
    if features.channels != plan.model.channels || features.tokens != plan.model.tokens() {
        return Err(TrainError::Plan(format!(
            "features are {} x {}, the model wants {} x {}",
            features.tokens,
            features.channels,
            plan.model.tokens(),
            plan.model.channels
        )));
    }
    let mut machine = Machine::new(plan, state, chosen);
    let batch = plan.batch.clamp(1, features.len());
    let per_epoch = features.len().div_ceil(batch);
    let RunOptions { checkpoint, checkpoint_every, stop, on_step, validate_every, mut validate, patience } = options;
    let save = |machine: &Machine, state: &mut State| -> Result<(), CheckpointError> {
        machine.store(state);
        checkpoint.as_deref().map_or(Ok(()), |path| checkpoint::save(path, plan, state))
    };
    // A run that had stopped early and is resumed.
    if patience > 0 && state.standing().1 >= patience {
        return Ok(Ended::EarlyStop);
    }
    let mut order: (usize, Vec<usize>) = (usize::MAX, Vec::new());
    while state.step < plan.steps {
        let epoch = state.step / per_epoch;
        if order.0 != epoch {
            // The order depends on seed and epoch alone, so a resumed run sees the same batches.
            let mut rng = rand_pcg::Pcg64::seed_from_u64(plan.seed ^ (epoch as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
            let mut list: Vec<usize> = (0..features.len()).collect();
            list.shuffle(&mut rng);
            order = (epoch, list);
        }
        let at = (state.step % per_epoch) * batch;
        let batch_of = order.1.get(at..(at + batch).min(features.len())).unwrap_or(&[]);
        // Dropout and jitter are seeded per step, for the same reason.
        let mut rng = rand_pcg::Pcg64::seed_from_u64(plan.seed.wrapping_add(0x5eed).wrapping_mul(31).wrapping_add(state.step as u64));
        let (value, gathered) = machine.learn(plan, state, features, batch_of, rng.random());
        let early: f32 = state.losses.iter().take(per_epoch).sum::<f32>() / state.losses.len().clamp(1, per_epoch) as f32;
        let diverged = |what: &'static str, value: f32, step: usize| {
            let checkpoint = checkpoint.as_deref().filter(|p| p.exists()).map_or("none yet".into(), |p: &Path| p.display().to_string());
            TrainError::Diverged { what, value, step, checkpoint }
        };
        if !value.is_finite() || (state.losses.len() >= per_epoch && value > DIVERGED_FACTOR * early) {
            return Err(diverged("loss", value, state.step));
        }
        let rate = plan.schedule.rate(state.step);
        let norm = machine.update(plan, state, gathered, rate);
        if !norm.is_finite() {
            // The weights may be spoilt already: nothing may save them.
            return Err(diverged("gradient norm", norm, state.step));
        }
        state.step += 1;
        state.losses.push(value);
        on_step(Progress { step: state.step, loss: value, grad_norm: norm, rate });
        if validate_every > 0
            && state.step.is_multiple_of(validate_every)
            && let Some(validate) = validate.as_mut()
        {
            machine.store(state);
            let figure = validate(&state.averaged_weights());
            state.validations.push((state.step, figure));
            // Read from the record, so that a resumed run stops where an uninterrupted one does.
            let (_, since_best) = state.standing();
            if patience > 0 && since_best == 0 {
                state.best = Some(state.averaged_weights().values);
            }
            if patience > 0 && since_best >= patience {
                save(&machine, state)?;
                return Ok(Ended::EarlyStop);
            }
        }
        // After the validation of this step: a resumed run starts with the next step and would never catch it up.
        if stop.load(Ordering::Relaxed) && state.step < plan.steps {
            save(&machine, state)?;
            return Ok(Ended::Interrupted);
        }
        if checkpoint_every > 0 && state.step.is_multiple_of(checkpoint_every) {
            save(&machine, state)?;
        }
    }
    save(&machine, state)?;
    Ok(Ended::Finished)
}

/// What computes the steps: our own engine on the CPU, burn elsewhere and for what the engine lacks.
// A run has one: its size does not matter.
#[allow(clippy::large_enum_variant)]
enum Machine {
    Engine(Box<Engine>),
    Burn { device: Device, model: Uniad },
}

/// What a step found, before the weights move: gradients where burn computes, the norm where the engine does and keeps its gradients itself.
enum Gathered {
    Engine(f32),
    Burn(Vec<Tensor<2>>),
}

impl Machine {
    fn new(plan: &Plan, state: &State, chosen: &Chosen) -> Self {
        if chosen.kind == Kind::Cpu && plan.loss == Loss::Mse {
            return Self::Engine(Box::new(Engine::resume(&plan.model, state, chosen.threads)));
        }
        let device = chosen.device.clone().autodiff();
        let model = Uniad::new(plan.model.clone(), &device);
        Self::Burn { device, model }
    }

    /// Loss and gradients of a batch.
    fn learn(&mut self, plan: &Plan, state: &State, features: &FeatureSet, batch: &[usize], seed: u64) -> (f32, Gathered) {
        match self {
            Self::Engine(engine) => {
                let samples: Vec<&[f32]> = batch.iter().map(|i| features.sample(*i)).collect();
                let outcome = engine.learn(&samples, seed);
                (outcome.loss, Gathered::Engine(outcome.gradient_norm))
            }
            Self::Burn { device, model } => {
                device.seed(seed);
                let clean = features.batch(batch, device);
                let leaves = state.weights.as_leaves();
                let rebuilt = model.forward(&leaves, model.jitter(clean.clone()), true);
                let loss = loss_of(plan, rebuilt, clean, state.step);
                let value = host(loss.clone().inner()).first().copied().unwrap_or(f32::NAN);
                let mut grads = loss.backward();
                let take = |w: &Tensor<2>| w.grad_remove(&mut grads).unwrap_or_else(|| w.clone().inner().zeros_like());
                (value, Gathered::Burn(leaves.values.iter().map(take).collect()))
            }
        }
    }

    /// Moves the weights. Returns the gradient norm before clipping; where that is no number the weights may be spoilt.
    fn update(&mut self, plan: &Plan, state: &mut State, gathered: Gathered, rate: f64) -> f32 {
        // The usual ramp: early averages forget faster.
        let keep = plan.ema.min((1.0 + state.step as f64) / (10.0 + state.step as f64));
        match (self, gathered) {
            (Self::Engine(engine), Gathered::Engine(norm)) => {
                if norm.is_finite() {
                    state.optimiser.steps += 1;
                    engine.update(&plan.optimiser, state.optimiser.steps, rate, norm, keep);
                }
                norm
            }
            (_, Gathered::Burn(gathered)) => {
                let norm = host(state.optimiser.step(&mut state.weights.values, gathered, rate)).first().copied().unwrap_or(f32::NAN);
                if let Some(ema) = &mut state.ema {
                    for (e, w) in ema.iter_mut().zip(&state.weights.values) {
                        *e = e.clone().mul_scalar(keep) + w.clone().mul_scalar(1.0 - keep);
                    }
                }
                norm
            }
            (Self::Burn { .. }, Gathered::Engine(_)) => f32::NAN,
        }
    }

    /// Brings `state` up to date: the engine keeps weights and moments in memory of its own.
    fn store(&self, state: &mut State) {
        if let Self::Engine(engine) = self {
            engine.store(state);
        }
    }
}

fn loss_of(plan: &Plan, rebuilt: Tensor<3>, clean: Tensor<3>, step: usize) -> Tensor<1> {
    match plan.loss {
        Loss::Mse => mse(rebuilt, clean),
        Loss::HardCosine { easy } => {
            let [batch, tokens, _] = clean.dims();
            let dot = (rebuilt.clone() * clean.clone()).sum_dim(2);
            let sizes = (rebuilt.powi_scalar(2).sum_dim(2) * clean.powi_scalar(2).sum_dim(2)).add_scalar(1e-12).sqrt();
            let distance: Tensor<2> = (dot / sizes).mul_scalar(-1.0).add_scalar(1.0).reshape([batch, tokens]);
            let share = easy * (step as f64 / (plan.steps.max(1) as f64 * 0.1)).min(1.0);
            let mut sorted = host(distance.clone().detach().inner());
            sorted.sort_by(f32::total_cmp);
            let at = ((sorted.len() as f64 * share) as usize).min(sorted.len().saturating_sub(1));
            let limit = sorted.get(at).copied().unwrap_or(0.0);
            let hard = distance.clone().detach().greater_elem(limit).float();
            let weight = hard.mul_scalar(0.9).add_scalar(0.1);
            (distance * weight).mean()
        }
    }
}

/// Reconstructs samples, on the CPU with the engine.
// There is one at a time: its size does not matter.
#[allow(clippy::large_enum_variant)]
enum Rebuilder<'a> {
    Engine(Box<Engine>),
    Burn { device: &'a Device, weights: &'a Weights, model: Uniad },
}

impl<'a> Rebuilder<'a> {
    fn new(config: &UniadConfig, weights: &'a Weights, chosen: &'a Chosen) -> Self {
        if chosen.kind == Kind::Cpu {
            return Self::Engine(Box::new(Engine::new(config, weights, chosen.threads, false)));
        }
        Self::Burn { device: &chosen.device, weights, model: Uniad::new(config.clone(), &chosen.device) }
    }

    /// Reconstruction minus features of some samples, one after the other.
    fn residuals(&mut self, features: &FeatureSet, samples: &[usize]) -> Vec<f32> {
        let mut rebuilt = match self {
            Self::Engine(engine) => {
                let samples: Vec<&[f32]> = samples.iter().map(|i| features.sample(*i)).collect();
                engine.reconstruct(&samples)
            }
            Self::Burn { device, weights, model } => host(model.forward(weights, features.batch(samples, device), false)),
        };
        for (r, clean) in rebuilt.iter_mut().zip(samples.iter().flat_map(|i| features.sample(*i))) {
            *r -= clean;
        }
        rebuilt
    }
}

/// Anomaly maps on the grid, one row of `tokens` values a sample, in batches of `batch`. `residual_scale` is `[tokens * channels]`, empty for none.
pub fn anomaly_maps(
    config: &UniadConfig,
    weights: &Weights,
    features: &FeatureSet,
    residual_scale: &[f32],
    batch: usize,
    chosen: &Chosen,
) -> Vec<Vec<f32>> {
    let (tokens, channels) = (features.tokens, features.channels);
    let mut rebuilder = Rebuilder::new(config, weights, chosen);
    let all: Vec<usize> = (0..features.len()).collect();
    let mut maps = Vec::with_capacity(all.len());
    for samples in all.chunks(batch.max(1)) {
        let mut residuals = rebuilder.residuals(features, samples);
        for sample in residuals.chunks_exact_mut((tokens * channels).max(1)) {
            for (r, scale) in sample.iter_mut().zip(residual_scale) {
                *r *= scale;
            }
            maps.push(sample.chunks_exact(channels).map(|token| token.iter().map(|r| r * r).sum::<f32>().sqrt()).collect());
        }
    }
    maps
}

/// Residual scale `[tokens * channels]`: one over the standard deviation of the residual over normal images, per location and channel, floored at a
/// tenth of the mean deviation, so that a location that never varies does not outshout all others. Measured on at most `most` images, spread evenly.
pub fn residual_scale(config: &UniadConfig, weights: &Weights, normal: &FeatureSet, most: usize, chosen: &Chosen) -> Vec<f32> {
    const BATCH: usize = 16;
    const FLOOR: f32 = 0.1;
    let mut rebuilder = Rebuilder::new(config, weights, chosen);
    let size = normal.tokens * normal.channels;
    let mut square = vec![0f64; size];
    let count = normal.len().min(most.max(1));
    let measured: Vec<usize> = (0..count).map(|i| i * normal.len() / count).collect();
    for samples in measured.chunks(BATCH) {
        for sample in rebuilder.residuals(normal, samples).chunks_exact(size.max(1)) {
            for (q, r) in square.iter_mut().zip(sample) {
                *q += f64::from(*r) * f64::from(*r);
            }
        }
    }
    let deviation: Vec<f32> = square.iter().map(|q| (q / count.max(1) as f64).sqrt() as f32).collect();
    let mean = deviation.iter().sum::<f32>() / deviation.len().max(1) as f32;
    deviation.iter().map(|d| 1.0 / (d.max(FLOOR * mean) + f32::MIN_POSITIVE)).collect()
}
