//! UniAD's training step on the CPU, written out by hand: forward, backward and optimiser without a tensor library.
//!
//! burn's CPU backend spends most of a step between the matrix products: copies of heads, masks and dropout as tensors of their own, an allocation a
//! node. Here a step is a list of matrix products ([`cull::kernels::gemm`]) with loops over rows between them that the cache still holds, in buffers that
//! are made once. [`crate::uniad`] on burn is the oracle of the tests, and what a GPU runs.
//!
//! The batch is cut into one share a thread, always the same one. Random numbers depend on the sample's place in the batch and not on the thread. So the
//! same number of threads gives the same bits, and another number differs in the order in which gradients are summed: rounding.

mod attention;
mod model;
mod optimiser;
mod random;
mod rows;
mod worker;

use crate::optimiser::OptimiserConfig;
use crate::train::State;
use crate::uniad::{UniadConfig, Weights, host};
use burn::tensor::{Tensor, TensorData};
use cull::kernels::isa::Isa;
use cull::kernels::team::Team;
use cull::kernels::vectorise::vectorise;
use model::{Buffer, Model, Parameter};
use rows::Dropout;
use worker::{Randomness, Worker};

/// Rows that a worker takes at a time: enough to pay for reading the weights, few enough for the cache.
const ROWS_AT_ONCE: usize = 392;

/// What a step found, before the weights move.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Outcome {
    /// Mean squared error over all elements of the batch.
    pub loss: f32,
    /// Global norm of the gradient.
    pub gradient_norm: f32,
}

/// A model in training on the CPU.
pub struct Engine {
    isa: Isa,
    team: Team,
    model: Model,
    parameters: Vec<Parameter>,
    workers: Vec<Worker>,
    /// Threads need nothing of their own beside the workers.
    seats: Vec<()>,
    position_gradient: Buffer,
    trains: bool,
    /// The weights as they stand have been packed for the forward pass.
    packed: bool,
}

/// Threads that the machine offers.
pub fn all_threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

impl Engine {
    /// An engine with these weights. Without `trains` it only reconstructs and takes less memory.
    pub fn new(config: &UniadConfig, weights: &Weights, threads: usize, trains: bool) -> Self {
        Self::on(Isa::best(), config, weights, threads, trains)
    }

    /// As [`Engine::new`], on another instruction set than the best one.
    pub fn on(isa: Isa, config: &UniadConfig, weights: &Weights, threads: usize, trains: bool) -> Self {
        let model = Model::new(config, isa);
        let parameters: Vec<Parameter> = weights
            .layout
            .iter()
            .zip(&weights.values)
            .map(|((_, kind), value)| {
                let value = host(value.clone());
                let zeros = || vec![0.0; if trains { value.len() } else { 0 }];
                let (gradient, moment_1, moment_2) = (zeros(), zeros(), zeros());
                Parameter { kind: *kind, value, gradient, moment_1, moment_2, average: Vec::new(), square: 0.0 }
            })
            .collect();
        let team = Team::new(threads);
        let at_once = (ROWS_AT_ONCE / config.tokens()).max(1);
        // As many shares as were asked for, also where the system gives fewer threads: the result is the same.
        let workers = (0..threads.max(1)).map(|_| Worker::new(&model, &parameters, at_once, trains)).collect();
        let seats = vec![(); team.threads()];
        let position_gradient = Buffer::new(config.tokens(), config.dim);
        Self { isa, team, model, parameters, workers, seats, position_gradient, trains, packed: false }
    }

    /// Gradient of the mean squared error of a batch, summed over its samples (each `[tokens, channels]`), and its norm. Nothing moves yet.
    pub fn learn(&mut self, samples: &[&[f32]], seed: u64) -> Outcome {
        debug_assert!(self.trains, "made for reconstruction only");
        let Self { isa, team, model, parameters, workers, seats, position_gradient, .. } = self;
        let isa = *isa;
        model.prepare(isa, parameters, true, |all, each| team.split(all, 1, seats, |_, part, ()| part.iter_mut().for_each(each)));
        let random = Randomness { seed, dropout: Dropout::new(model.config.dropout, random::mix(seed)) };
        let shares = workers.len();
        {
            let (model, parameters) = (&*model, &*parameters);
            team.split(workers, 1, seats, |index, worker, ()| {
                let (first, end) = (index * samples.len() / shares, (index + 1) * samples.len() / shares);
                for worker in worker {
                    worker.learn(isa, model, parameters, &samples[first..end], (first, samples.len()), random);
                }
            });
        }
        // Sums in the order of the shares, whoever computed them.
        let Some((first, others)) = workers.split_first_mut() else { return Outcome { loss: f32::NAN, gradient_norm: f32::NAN } };
        {
            let (first, others) = (&first.gradients, &*others);
            team.split(parameters, 1, seats, |index, parameter, ()| {
                for parameter in parameter {
                    let from = &first.parameters[index];
                    parameter.gradient.copy_from_slice(from);
                    for other in others {
                        vectorise(
                            isa,
                            #[inline(always)]
                            || rows::add(&mut parameter.gradient, &other.gradients.parameters[index]),
                        );
                    }
                }
            });
        }
        position_gradient.data.fill(0.0);
        for (index, projection) in model.projections.iter().enumerate() {
            let sum = &mut first.gradients.tables[index];
            for other in &*others {
                rows::add(&mut sum.data, &other.gradients.tables[index].data);
            }
            projection.finish(isa, sum, parameters, &model.position, position_gradient);
        }
        model.finish_position(position_gradient, parameters);
        team.split(parameters, 1, seats, |_, parameter, ()| {
            for parameter in parameter {
                parameter.square = optimiser::square(isa, &parameter.gradient);
            }
        });
        let elements = (samples.len() * model.config.tokens() * model.config.channels).max(1) as f64;
        let squares: f64 = workers.iter().map(|w| w.squares).sum();
        let norm: f64 = parameters.iter().map(|p| p.square).sum();
        Outcome { loss: (squares / elements) as f32, gradient_norm: norm.sqrt() as f32 }
    }

    /// An engine that goes on where `state` stands.
    pub fn resume(config: &UniadConfig, state: &State, threads: usize) -> Self {
        let mut engine = Self::new(config, &state.weights, threads, true);
        for (at, parameter) in engine.parameters.iter_mut().enumerate() {
            let values = |list: &[Tensor<2>]| list.get(at).map(|tensor| host(tensor.clone()));
            if let (Some(moment_1), Some(moment_2)) = (values(&state.optimiser.moment_1), values(&state.optimiser.moment_2)) {
                (parameter.moment_1, parameter.moment_2) = (moment_1, moment_2);
            }
            parameter.average = state.ema.as_deref().and_then(values).unwrap_or_default();
        }
        engine
    }

    /// Puts weights, moments and averages into `state`; the steps taken are the caller's to count.
    pub fn store(&self, state: &mut State) {
        let Some(device) = state.weights.values.first().map(Tensor::device) else { return };
        let list = |of: &dyn Fn(&Parameter) -> &[f32]| -> Vec<Tensor<2>> {
            self.parameters.iter().map(|p| Tensor::from_data(TensorData::new(of(p).to_vec(), p.kind.shape()), &device)).collect()
        };
        state.weights.values = list(&|p| &p.value);
        if state.optimiser.steps > 0 {
            state.optimiser.moment_1 = list(&|p| &p.moment_1);
            state.optimiser.moment_2 = list(&|p| &p.moment_2);
        }
        if state.ema.is_some() {
            state.ema = Some(list(&|p| &p.average));
        }
    }

    /// Moves the weights by the gradient of the last [`Engine::learn`]: step number `steps` (from 1) of [`crate::optimiser`]'s step. `keep` is the share of
    /// the moving average that stays, where there is one.
    pub fn update(&mut self, config: &OptimiserConfig, steps: usize, rate: f64, gradient_norm: f32, keep: f64) {
        let rates = optimiser::Rates::new(config, steps, rate, gradient_norm, keep);
        let Self { isa, team, parameters, seats, packed, .. } = self;
        let isa = *isa;
        *packed = false;
        team.split(parameters, 1, seats, |_, parameters, ()| {
            for parameter in parameters {
                optimiser::update(isa, parameter, rates);
            }
        });
    }

    /// Gradients of the last [`Engine::learn`], in layout order.
    pub fn gradients(&self) -> impl Iterator<Item = &[f32]> {
        self.parameters.iter().map(|p| p.gradient.as_slice())
    }

    /// Weights as they stand, in layout order.
    pub fn weights(&self) -> impl Iterator<Item = &[f32]> {
        self.parameters.iter().map(|p| p.value.as_slice())
    }

    /// Reconstructions of `samples` (each `[tokens, channels]`), one after the other.
    pub fn reconstruct(&mut self, samples: &[&[f32]]) -> Vec<f32> {
        let Self { isa, team, model, parameters, workers, seats, packed, .. } = self;
        let isa = *isa;
        if !*packed {
            model.prepare(isa, parameters, false, |all, each| team.split(all, 1, seats, |_, part, ()| part.iter_mut().for_each(each)));
            *packed = true;
        }
        let size = model.config.tokens() * model.config.channels;
        let mut out = vec![0.0; samples.len() * size];
        let (model, parameters) = (&*model, &*parameters);
        // Few at a time, so that threads share evenly.
        let at_once = (ROWS_AT_ONCE / model.config.tokens()).max(1);
        team.split(&mut out, at_once * size, workers, |index, out, worker| {
            let samples = &samples[index * at_once..(index * at_once + out.len() / size)];
            worker.reconstruct(isa, model, parameters, samples, out);
        });
        out
    }
}
