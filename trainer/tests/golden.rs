//! The model, its gradients and its optimiser steps against the reference vectors of `shared/golden` (an independent implementation).
//! Skips loudly where the folder is absent (`CULL_SHARED` names another place).

use burn::tensor::{Device, DeviceKind, Tensor, TensorData};
use cull::kernels::isa::Isa;
use cull_trainer::engine::Engine;
use cull_trainer::optimiser::{Optimiser, OptimiserConfig, Schedule};
use cull_trainer::uniad::{NeighbourMask, Uniad, UniadConfig, Weights, host, mse, neighbour_mask, residual_norm};
use safetensors::SafeTensors;
use std::path::PathBuf;
use std::sync::OnceLock;

fn shared() -> PathBuf {
    std::env::var_os("CULL_SHARED").map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../shared"), PathBuf::from)
}

struct Golden {
    bytes: Vec<u8>,
    config: UniadConfig,
    rate: f64,
}

impl Golden {
    fn load(name: &str) -> Option<Self> {
        let base = shared().join("golden");
        let Ok(bytes) = std::fs::read(base.join(format!("{name}.safetensors"))) else {
            eprintln!("SKIPPED: {} is not there; set CULL_SHARED to the folder that holds golden/", base.display());
            return None;
        };
        let json: serde_json::Value = serde_json::from_slice(&std::fs::read(base.join(format!("{name}.json"))).unwrap()).unwrap();
        let n = |key: &str| json[key].as_u64().unwrap() as usize;
        let config = UniadConfig {
            channels: n("channels"),
            grid: [json["grid"][0].as_u64().unwrap() as usize, json["grid"][1].as_u64().unwrap() as usize],
            dim: n("dim"),
            heads: n("heads"),
            hidden: n("hidden"),
            encoder_layers: n("enc"),
            decoder_layers: n("dec"),
            mask: NeighbourMask::all(n("neighbour")),
            layerwise_query: true,
            dropout: 0.0,
            jitter_scale: 0.0,
            jitter_probability: 0.0,
        };
        Some(Self { bytes, config, rate: json["train"]["lr"].as_f64().unwrap() })
    }

    fn get(&self, name: &str) -> Option<(Vec<usize>, Vec<f32>)> {
        let file = SafeTensors::deserialize(&self.bytes).unwrap();
        let view = file.tensor(name).ok()?;
        let data = view.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        Some((view.shape().to_vec(), data))
    }

    fn need(&self, name: &str) -> Vec<f32> {
        self.get(name).unwrap_or_else(|| panic!("{name}")).1
    }

    fn tensor<const D: usize>(&self, name: &str, device: &Device) -> Tensor<D> {
        let (shape, data) = self.get(name).unwrap();
        Tensor::from_data(TensorData::new(data, shape), device)
    }
}

/// ||a - b|| / ||b||.
fn relative(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let difference: f64 = a.iter().zip(b).map(|(x, y)| f64::from(x - y).powi(2)).sum();
    let size: f64 = b.iter().map(|y| f64::from(*y).powi(2)).sum();
    (difference / size.max(1e-24)).sqrt()
}

/// Anomaly maps on the grid, sample by sample, against the recorded maps and scores.
fn check_maps(golden: &Golden, map: &[f32]) {
    let config = &golden.config;
    // The recorded map is upsampled to the input size: compare through the inspector's own scorer, grid by grid.
    let (shape, wanted) = golden.get("anomaly_map").unwrap();
    let scores = golden.need("image_score");
    let tokens = config.tokens();
    for (sample, score) in scores.iter().enumerate() {
        let map = cull::anomaly::AnomalyMap {
            grid_rows: config.grid[0],
            grid_cols: config.grid[1],
            values: map[sample * tokens..(sample + 1) * tokens].to_vec(),
        };
        let pixels = shape[1] * shape[2];
        let mut up = vec![0.0; pixels];
        cull::anomaly::upsample(&map, shape[1], shape[2], &mut up);
        let error = relative(&up, &wanted[sample * pixels..(sample + 1) * pixels]);
        assert!(error < 1e-4, "anomaly map {error}");
        let rule = cull::anomaly::ScoreRule::PooledMax { window_px: 16 };
        let ours = cull::anomaly::Scorer::new(rule, config.grid, [shape[1], shape[2]]).score(&map);
        assert!((ours - score).abs() / score < 1e-4, "image score {ours} {score}");
    }
}

/// Gradients in layout order against the recorded ones. Returns the worst.
fn check_gradients(golden: &Golden, gathered: &Weights) -> (f64, String) {
    let mut worst = (0.0, String::new());
    // A key's bias shifts all scores of a query alike: its true gradient is zero, what is recorded is rounding. Compare those against the
    // scale of all gradients.
    let all: f64 = golden.need("train.grad_norm")[0].into();
    for (tensor, _, grad) in gathered.to_published() {
        let wanted = golden.need(&format!("grad.{tensor}"));
        let size: f64 = wanted.iter().map(|y| f64::from(*y).powi(2)).sum::<f64>().sqrt();
        let difference: f64 = grad.iter().zip(&wanted).map(|(x, y)| f64::from(x - y).powi(2)).sum::<f64>().sqrt();
        let error = difference / if size > 1e-5 * all { size } else { all };
        if error > worst.0 {
            worst = (error, tensor);
        }
    }
    assert!(worst.0 < 1e-3, "gradient of {} {}", worst.1, worst.0);
    worst
}

fn check(name: &str, device: Device) {
    let Some(golden) = Golden::load(name) else { return };
    let config = golden.config.clone();
    if let Some((_, mask)) = golden.get("mask") {
        assert_eq!(neighbour_mask(config.grid, config.mask.encoder), mask, "neighbour mask");
    }
    let device = device.autodiff();
    let model = Uniad::new(config.clone(), &device);
    let mut weights = Weights::from_published(&config, |n| golden.get(&format!("weight.{n}")), &device).unwrap().as_leaves();
    let input: Tensor<3> = golden.tensor("input", &device);

    let rebuilt = model.forward(&weights, input.clone(), false);
    let error = relative(&host(rebuilt.clone().inner()), &golden.need("reconstruction"));
    println!("{name}: reconstruction {error:.1e}");
    assert!(error < 1e-4, "reconstruction {error}");

    check_maps(&golden, &host(residual_norm(rebuilt.clone().inner(), input.clone().inner())));

    let loss = mse(rebuilt, input.clone());
    let value = host(loss.clone().inner());
    assert!(relative(&value, &golden.need("loss")) < 1e-4, "loss {value:?}");
    let grads = loss.backward();
    let gathered = weights.values.iter().map(|w| w.grad(&grads).expect("every weight has a gradient")).collect();
    let worst = check_gradients(&golden, &Weights::new(weights.layout.clone(), gathered));
    println!("{name}: worst gradient {:.1e} ({})", worst.0, worst.1);

    let losses = golden.need("train.loss");
    let norms = golden.need("train.grad_norm");
    let mut optimiser = Optimiser::new(OptimiserConfig::default());
    let schedule = Schedule::Step { rate: golden.rate, every: 3, factor: 0.1 };
    for step in 0..losses.len() {
        let loss = mse(model.forward(&weights, input.clone(), true), input.clone());
        let value = host(loss.clone().inner())[0];
        assert!(((value - losses[step]) / losses[step]).abs() < 1e-3, "loss of step {step}: {value} {}", losses[step]);
        let grads = loss.backward();
        let gathered = weights.values.iter().map(|w| w.grad(&grads).unwrap()).collect();
        let mut plain: Vec<_> = weights.values.iter().map(|w| w.clone().inner()).collect();
        let norm = host(optimiser.step(&mut plain, gathered, schedule.rate(step)))[0];
        assert!(((norm - norms[step]) / norms[step]).abs() < 1e-3, "norm of step {step}: {norm} {}", norms[step]);
        weights = Weights::new(weights.layout.clone(), plain).as_leaves();
    }
    check_weights(&golden, name, &weights);
}

/// Weights after the recorded steps.
fn check_weights(golden: &Golden, name: &str, weights: &Weights) {
    let mut worst = (0.0, String::new());
    for (tensor, _, value) in weights.to_published() {
        let error = relative(&value, &golden.need(&format!("after.{tensor}")));
        if error > worst.0 {
            worst = (error, tensor);
        }
    }
    println!("{name}: weights after {} steps {:.1e} ({})", golden.need("train.loss").len(), worst.0, worst.1);
    assert!(worst.0 < 1e-3, "{} after the steps {}", worst.1, worst.0);
}

#[test]
fn cpu_equals_the_reference_tiny() {
    check("uniad_tiny", Device::flex());
}

#[test]
fn cpu_equals_the_reference_without_mask() {
    check("uniad_no_mask", Device::flex());
}

#[test]
fn cpu_equals_the_reference_on_the_full_grid() {
    check("uniad_14x14", Device::flex());
}

/// The hand-written engine of the CPU, on every instruction set and with one or more threads.
fn check_engine(name: &str) {
    let Some(golden) = Golden::load(name) else { return };
    let config = golden.config.clone();
    let device = Device::flex();
    let start = Weights::from_published(&config, |n| golden.get(&format!("weight.{n}")), &device).unwrap();
    let input = golden.need("input");
    let size = config.tokens() * config.channels;
    let samples: Vec<&[f32]> = input.chunks_exact(size).collect();
    for isa in Isa::all_available() {
        for threads in [1, 2, 3] {
            let label = format!("{name}, engine, {} x {threads}", isa.name());
            let mut engine = Engine::on(isa, &config, &start, threads, true);
            let rebuilt = engine.reconstruct(&samples);
            let error = relative(&rebuilt, &golden.need("reconstruction"));
            println!("{label}: reconstruction {error:.1e}");
            assert!(error < 1e-4, "{label}: reconstruction {error}");
            let residual: Vec<f32> = rebuilt.iter().zip(&input).map(|(r, x)| r - x).collect();
            let map: Vec<f32> = residual.chunks_exact(config.channels).map(|t| t.iter().map(|x| x * x).sum::<f32>().sqrt()).collect();
            check_maps(&golden, &map);

            let losses = golden.need("train.loss");
            let norms = golden.need("train.grad_norm");
            let optimiser = OptimiserConfig::default();
            let schedule = Schedule::Step { rate: golden.rate, every: 3, factor: 0.1 };
            let as_weights = |values: Vec<Vec<f32>>| {
                let tensors = start.layout.iter().zip(values).map(|((_, k), v)| Tensor::from_data(TensorData::new(v, k.shape()), &device));
                Weights::new(start.layout.clone(), tensors.collect())
            };
            for step in 0..losses.len() {
                let found = engine.learn(&samples, step as u64);
                if step == 0 {
                    assert!(relative(&[found.loss], &golden.need("loss")) < 1e-4, "{label}: loss {}", found.loss);
                    let worst = check_gradients(&golden, &as_weights(engine.gradients().map(<[f32]>::to_vec).collect()));
                    println!("{label}: worst gradient {:.1e} ({})", worst.0, worst.1);
                }
                assert!(((found.loss - losses[step]) / losses[step]).abs() < 1e-3, "{label}: loss of step {step}: {}", found.loss);
                let norm = found.gradient_norm;
                assert!(((norm - norms[step]) / norms[step]).abs() < 1e-3, "{label}: norm of step {step}: {norm} {}", norms[step]);
                engine.update(&optimiser, step + 1, schedule.rate(step), norm, 0.0);
            }
            check_weights(&golden, &label, &as_weights(engine.weights().map(<[f32]>::to_vec).collect()));
        }
    }
}

#[test]
fn the_engine_equals_the_reference_tiny() {
    check_engine("uniad_tiny");
}

#[test]
fn the_engine_equals_the_reference_without_mask() {
    check_engine("uniad_no_mask");
}

#[test]
fn the_engine_equals_the_reference_on_the_full_grid() {
    check_engine("uniad_14x14");
}

/// The software Vulkan driver (Mesa's lavapipe) through wgpu; a process may initialise it once only. `None`, said loudly, where there is none.
fn software_vulkan() -> Option<Device> {
    static DEVICE: OnceLock<Option<Device>> = OnceLock::new();
    let device = DEVICE.get_or_init(|| Device::wgpu_options().device_kind(DeviceKind::Cpu).init().ok());
    if device.is_none() {
        eprintln!("SKIPPED: no software Vulkan driver answers through wgpu; install mesa-vulkan-drivers (sh deploy/setup.sh --test)");
    }
    device.clone()
}

#[test]
fn wgpu_equals_the_reference_tiny() {
    let Some(device) = software_vulkan() else { return };
    check("uniad_tiny", device);
}

#[test]
#[ignore = "minutes on software Vulkan: run with --ignored"]
fn wgpu_equals_the_reference_without_mask() {
    let Some(device) = software_vulkan() else { return };
    check("uniad_no_mask", device);
}

#[test]
#[ignore = "minutes on software Vulkan: run with --ignored"]
fn wgpu_equals_the_reference_on_the_full_grid() {
    let Some(device) = software_vulkan() else { return };
    check("uniad_14x14", device);
}
