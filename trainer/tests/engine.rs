//! The hand-written training step against burn's autodiff on random small models, and what is random in it.

use burn::tensor::{Device, Tensor, TensorData};
use cull_trainer::checkpoint;
use cull_trainer::device::{Chosen, Kind};
use cull_trainer::engine::Engine;
use cull_trainer::optimiser::{OptimiserConfig, Schedule};
use cull_trainer::train::{FeatureSet, Loss, Plan, RunOptions, State, anomaly_maps, residual_scale, train};
use cull_trainer::uniad::{NeighbourMask, Uniad, UniadConfig, Weights, host, mse};
use proptest::prelude::*;
use rand::{Rng, SeedableRng};
use std::sync::atomic::AtomicBool;

fn small() -> UniadConfig {
    UniadConfig {
        grid: [4, 5],
        dim: 16,
        heads: 2,
        hidden: 24,
        encoder_layers: 2,
        decoder_layers: 2,
        mask: NeighbourMask::all(3),
        dropout: 0.0,
        jitter_scale: 0.0,
        ..UniadConfig::paper(12)
    }
}

fn features(config: &UniadConfig, samples: usize, seed: u64) -> FeatureSet {
    let mut rng = rand_pcg::Pcg64::seed_from_u64(seed);
    let n = samples * config.tokens() * config.channels;
    FeatureSet { tokens: config.tokens(), channels: config.channels, values: (0..n).map(|_| rng.random_range(-2.0..2.0)).collect() }
}

/// Weights of which none is what it starts from: biases and scales too.
fn weights(config: &UniadConfig, seed: u64) -> Weights {
    let start = Weights::init(config, seed, &Device::flex());
    let mut rng = rand_pcg::Pcg64::seed_from_u64(seed);
    let values = start.values.iter().map(|tensor| {
        let data: Vec<f32> = host(tensor.clone()).iter().map(|x| x + rng.random_range(-0.2..0.2)).collect();
        Tensor::from_data(TensorData::new(data, tensor.dims()), &tensor.device())
    });
    Weights::new(start.layout.clone(), values.collect())
}

/// ||a - b|| / max(||b||, floor).
fn relative(a: &[f32], b: &[f32], floor: f64) -> f64 {
    assert_eq!(a.len(), b.len());
    let difference: f64 = a.iter().zip(b).map(|(x, y)| f64::from(x - y).powi(2)).sum::<f64>().sqrt();
    difference / b.iter().map(|y| f64::from(*y).powi(2)).sum::<f64>().sqrt().max(floor)
}

/// Reconstruction, loss, gradient norm and every gradient of the engine against burn's.
fn compare(config: &UniadConfig, samples: usize, threads: usize, seed: u64) {
    config.check().unwrap();
    let (set, start) = (features(config, samples, seed), weights(config, seed));
    let device = Device::flex().autodiff();
    let leaves = start.as_leaves();
    let all: Vec<usize> = (0..samples).collect();
    let clean = set.batch(&all, &device);
    let rebuilt = Uniad::new(config.clone(), &device).forward(&leaves, clean.clone(), true);
    let loss = mse(rebuilt.clone(), clean);
    let wanted_loss = host(loss.clone().inner())[0];
    let grads = loss.backward();
    let wanted: Vec<Vec<f32>> =
        leaves.values.iter().map(|w| w.grad(&grads).map_or_else(|| host(w.clone().inner().zeros_like()), host)).collect();

    let mut engine = Engine::new(config, &start, threads, true);
    let batch: Vec<&[f32]> = all.iter().map(|i| set.sample(*i)).collect();
    assert!(relative(&engine.reconstruct(&batch), &host(rebuilt.inner()), 0.0) < 1e-5);
    let found = engine.learn(&batch, 1);
    assert!((found.loss - wanted_loss).abs() < 1e-5 * wanted_loss, "loss {} {wanted_loss}", found.loss);
    let norm = wanted.iter().flatten().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
    assert!((f64::from(found.gradient_norm) / norm - 1.0).abs() < 1e-4, "norm {} {norm}", found.gradient_norm);
    for ((got, wanted), (name, _)) in engine.gradients().zip(&wanted).zip(&start.layout) {
        // A key's bias has a true gradient of zero: compared on the scale of all.
        let error = relative(got, wanted, 1e-4 * norm);
        assert!(error < 1e-3, "gradient of {name}: {error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn any_small_model_has_burns_gradients(
        rows in 2usize..6, cols in 2usize..7, channels in 1usize..40, heads in 1usize..4, width in 1usize..12, hidden in 1usize..50,
        layers in (0usize..3, 0usize..3), masked in any::<[bool; 3]>(), layerwise: bool, samples in 1usize..6, threads in 1usize..4, seed: u64,
    ) {
        let dim = heads * width * 2;
        // As `check` wants it: no mask that could hide the whole grid.
        let side = if rows.max(cols) >= 4 { 3 } else { 1 };
        let [encoder, decoder_memory, decoder_previous] = masked.map(|on| if on { side } else { 0 });
        let config = UniadConfig {
            grid: [rows, cols], dim, heads, hidden, encoder_layers: layers.0, decoder_layers: layers.1, layerwise_query: layerwise,
            mask: NeighbourMask { encoder, decoder_memory, decoder_previous }, channels, ..small()
        };
        compare(&config, samples, threads, seed >> 16);
    }
}

#[test]
fn switches_and_odd_sizes_have_burns_gradients() {
    compare(&small(), 3, 1, 1);
    compare(&UniadConfig { layerwise_query: false, decoder_layers: 3, ..small() }, 3, 2, 2);
    compare(&UniadConfig { encoder_layers: 0, decoder_layers: 0, ..small() }, 2, 1, 3);
    compare(&UniadConfig { decoder_layers: 0, ..small() }, 2, 1, 4);
    compare(&UniadConfig { encoder_layers: 0, ..small() }, 2, 1, 5);
    compare(&UniadConfig { grid: [14, 14], mask: NeighbourMask::all(7), dim: 32, ..small() }, 5, 2, 6);
}

/// Loss of the engine at `start + distance * direction`, same seed.
fn loss_at(config: &UniadConfig, start: &Weights, direction: &[Vec<f32>], distance: f32, batch: &[&[f32]], seed: u64) -> f64 {
    let values = start.values.iter().zip(direction).map(|(tensor, direction)| {
        let data: Vec<f32> = host(tensor.clone()).iter().zip(direction).map(|(x, d)| x + distance * d).collect();
        Tensor::from_data(TensorData::new(data, tensor.dims()), &tensor.device())
    });
    let moved = Weights::new(start.layout.clone(), values.collect());
    f64::from(Engine::new(config, &moved, 1, true).learn(batch, seed).loss)
}

/// The backward pass sees the dropout and the jitter of the forward pass: along the gradient, and along each kind of weight alone, the loss changes as the
/// gradient says.
#[test]
fn dropout_and_jitter_are_the_same_forward_and_backward() {
    for layerwise_query in [true, false] {
        let config = UniadConfig { dropout: 0.3, jitter_scale: 8.0, jitter_probability: 0.7, layerwise_query, ..small() };
        let (set, start) = (features(&config, 4, 11), weights(&config, 12));
        let batch: Vec<&[f32]> = (0..4).map(|i| set.sample(i)).collect();
        for seed in [21, 22, 23] {
            let mut engine = Engine::new(&config, &start, 1, true);
            engine.learn(&batch, seed);
            let gradient: Vec<Vec<f32>> = engine.gradients().map(<[f32]>::to_vec).collect();
            for part in ["", "attn", "attn1.v", "attn2.q", "attn2.k", "ffn.up", "ffn.down", "query", "norm", "inp", "row"] {
                let direction: Vec<Vec<f32>> = gradient
                    .iter()
                    .zip(&start.layout)
                    .map(|(g, (name, _))| if name.contains(part) { g.clone() } else { vec![0.0; g.len()] })
                    .collect();
                let size = direction.iter().flatten().map(|d| f64::from(*d).powi(2)).sum::<f64>().sqrt();
                assert!(size > 0.0, "{part} has no gradient");
                let unit: Vec<Vec<f32>> = direction.iter().map(|d| d.iter().map(|x| (f64::from(*x) / size) as f32).collect()).collect();
                // Large steps bend with the loss and cross ReLUs, small ones drown in its rounding; a mask that differs would be wrong at all of them.
                let error = [4e-3, 1e-3, 3e-4].map(|step| {
                    let ahead = loss_at(&config, &start, &unit, step, &batch, seed);
                    let behind = loss_at(&config, &start, &unit, -step, &batch, seed);
                    ((ahead - behind) / (2.0 * f64::from(step)) / size - 1.0).abs()
                });
                assert!(error.iter().any(|e| *e < 0.02), "{part}, seed {seed}: slopes off by {error:?}");
            }
            // Another seed drops others.
            assert_ne!(engine.learn(&batch, seed).loss, engine.learn(&batch, seed + 100).loss);
        }
    }
}

#[test]
fn the_same_threads_give_the_same_bits_and_others_the_same_step() {
    let config = UniadConfig { dropout: 0.2, jitter_scale: 5.0, jitter_probability: 0.5, ..small() };
    let (set, start) = (features(&config, 7, 3), weights(&config, 4));
    let batch: Vec<&[f32]> = (0..7).map(|i| set.sample(i)).collect();
    let run = |threads: usize| -> (f32, Vec<f32>) {
        let mut engine = Engine::new(&config, &start, threads, true);
        let loss = engine.learn(&batch, 5).loss;
        (loss, engine.gradients().flatten().copied().collect())
    };
    let one = run(1);
    for threads in [1, 2, 3, 7, 9] {
        let (loss, gradient) = run(threads);
        assert_eq!(run(threads), (loss, gradient.clone()), "{threads} threads");
        // Dropout and jitter belong to the sample, not to the thread.
        assert!((loss - one.0).abs() < 1e-6 * one.0);
        assert!(relative(&gradient, &one.1, 0.0) < 1e-5, "{threads} threads: {}", relative(&gradient, &one.1, 0.0));
    }
}

fn plan(model: UniadConfig, steps: usize) -> Plan {
    Plan {
        model,
        loss: Loss::Mse,
        optimiser: OptimiserConfig { stable: true, clip_norm: 1.0, ..OptimiserConfig::default() },
        schedule: Schedule::WarmCosine { rate: 1e-3, last: 1e-5, warmup: 2, steps },
        batch: 4,
        steps,
        seed: 8,
        ema: 0.9,
    }
}

/// The CPU as the engine sees it, and as burn does.
fn engine_and_burn() -> [Chosen; 2] {
    let engine = Chosen::cpu(2);
    let burn = Chosen { device: Device::flex(), describe: "burn's flex backend".into(), kind: Kind::Gpu, threads: 1 };
    [engine, burn]
}

fn go_on(plan: &Plan, set: &FeatureSet, state: &mut State, chosen: &Chosen, stop_after: usize) {
    let stop = AtomicBool::new(false);
    let mut on_step = |p: cull_trainer::train::Progress| stop.store(p.step >= stop_after, std::sync::atomic::Ordering::Relaxed);
    let options = RunOptions {
        checkpoint: None,
        checkpoint_every: 0,
        stop: &stop,
        on_step: &mut on_step,
        validate_every: 0,
        validate: None,
        patience: 0,
    };
    train(plan, set, state, chosen, options).unwrap();
}

fn flat(list: &[Tensor<2>]) -> Vec<f32> {
    list.iter().flat_map(|t| host(t.clone())).collect()
}

/// Whole runs agree: weights, both moments, moving average; for the paper's optimiser and for ours. And a checkpoint of one goes on in the other.
#[test]
fn a_run_of_the_engine_is_a_run_of_burn() {
    for stable in [true, false] {
        let mut plan = plan(small(), 8);
        plan.optimiser.stable = stable;
        let set = features(&plan.model, 10, 9);
        let run = |chosen: &Chosen| -> State {
            let mut state = State::start(&plan, &chosen.device);
            go_on(&plan, &set, &mut state, chosen, usize::MAX);
            state
        };
        let [engine, burn] = engine_and_burn();
        let (ours, wanted) = (run(&engine), run(&burn));
        let agree = |ours: &State, wanted: &State| {
            assert_eq!((ours.step, ours.optimiser.steps), (wanted.step, wanted.optimiser.steps));
            for (what, a, b, limit) in [
                ("weights", flat(&ours.weights.values), flat(&wanted.weights.values), 1e-3),
                ("first moments", flat(&ours.optimiser.moment_1), flat(&wanted.optimiser.moment_1), 1e-2),
                ("second moments", flat(&ours.optimiser.moment_2), flat(&wanted.optimiser.moment_2), 1e-2),
                ("average", flat(ours.ema.as_ref().unwrap()), flat(wanted.ema.as_ref().unwrap()), 1e-3),
            ] {
                let error = relative(&a, &b, 0.0);
                println!("stable {stable}: {what} differ by {error:.1e}");
                assert!(error < limit, "{what} differ by {error}");
            }
            for (a, b) in ours.losses.iter().zip(&wanted.losses) {
                assert!((a - b).abs() < 1e-4 * b, "losses {a} {b}");
            }
        };
        agree(&ours, &wanted);
        // Five steps here, the rest there.
        let dir = tempfile::tempdir().unwrap();
        for (from, to) in [(&engine, &burn), (&burn, &engine)] {
            let path = dir.path().join("half.checkpoint");
            let mut state = State::start(&plan, &from.device);
            go_on(&plan, &set, &mut state, from, 5);
            assert_eq!(state.step, 5);
            checkpoint::save(&path, &plan, &state).unwrap();
            let mut state = checkpoint::load(&path, &plan, &to.device).unwrap();
            go_on(&plan, &set, &mut state, to, usize::MAX);
            agree(&state, &wanted);
        }
    }
}

#[test]
fn maps_and_residual_scales_are_burns() {
    let config = UniadConfig { dropout: 0.1, jitter_scale: 20.0, ..small() };
    let (set, start) = (features(&config, 9, 31), weights(&config, 32));
    let [engine, burn] = engine_and_burn();
    let scale = residual_scale(&config, &start, &set, usize::MAX, &engine);
    assert!(relative(&scale, &residual_scale(&config, &start, &set, usize::MAX, &burn), 0.0) < 1e-4);
    for scale in [&[][..], &scale] {
        let ours = anomaly_maps(&config, &start, &set, scale, 4, &engine);
        let wanted = anomaly_maps(&config, &start, &set, scale, 4, &burn);
        assert_eq!(ours.len(), 9);
        assert!(relative(&ours.concat(), &wanted.concat(), 0.0) < 1e-5);
    }
}

#[test]
fn a_loss_that_is_no_number_is_said() {
    let config = small();
    let mut set = features(&config, 4, 1);
    let start = weights(&config, 2);
    set.values[17] = f32::NAN;
    let batch: Vec<&[f32]> = (0..4).map(|i| set.sample(i)).collect();
    let found = Engine::new(&config, &start, 2, true).learn(&batch, 1);
    assert!(found.loss.is_nan() && found.gradient_norm.is_nan(), "{found:?}");
}
