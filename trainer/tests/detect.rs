//! The detector's three computations agree: the engine, burn's autodiff, and the exported file in the inspector's runtime. A run is a function of its
//! plan, and the command makes a bundle from a folder.

use burn::tensor::Device;
use cull::model::bundle::Bundle;
use cull::model::runtime::FeatureModel;
use cull_trainer::detector::engine::{Engine, Prepared};
use cull_trainer::detector::network::{Network, Op, SeenWithLatents, adopt, trunk};
use cull_trainer::detector::parts::Parts;
use cull_trainer::detector::{Plan, RunOptions, State, Tested, Training, export, reference};
use cull_trainer::distill::export::{Scaling, backbone};
use cull_trainer::distill::student::{Architecture, Block, RGB};
use prost::Message;
use rand::{Rng, SeedableRng};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use tract_onnx::pb;

/// A small trunk with everything in it: no expansion, strides, both kernels, a residual.
fn tiny() -> (Architecture, Vec<f32>) {
    let block = Block::inverted;
    let stages = ["f2", "f4", "f8", "f16"];
    let architecture = Architecture {
        stem: 16,
        blocks: vec![
            block(16, 16, 8, 3, 1, false),
            block(8, 32, 12, 3, 2, true),
            block(12, 32, 12, 3, 1, true),
            block(12, 32, 16, 5, 2, true),
            block(16, 48, 20, 3, 2, true),
            block(20, 48, 20, 5, 1, true),
        ],
        taps: stages.iter().zip([0, 2, 3, 5]).map(|(n, b)| ((*n).to_owned(), b)).collect(),
    };
    let ones = |v: f32| architecture.boundaries().iter().map(|c| vec![v; *c]).collect();
    let file = backbone(&architecture, &architecture.init(5), &Scaling { mean: ones(0.0), deviation: ones(1.0) });
    let (read, weights) = trunk(&file, "tiny").expect("what was written is a trunk");
    assert_eq!(read, architecture);
    (architecture, weights)
}

fn noise(n: usize, seed: u64) -> Vec<f32> {
    let mut rng = rand_pcg::Pcg64::seed_from_u64(seed);
    (0..n).map(|_| rng.random_range(-1.2..1.2)).collect()
}

/// A network on the tiny trunk whose parameters are all of them in use.
fn network() -> (Network, Vec<f32>) {
    let (architecture, weights) = tiny();
    let network = Network::new(&architecture, [48, 64]);
    let mut parameters = network.init(&weights, 3);
    // Latents within the range of ReLU6.
    let latents = &network.nodes[network.expectation.latents];
    let summaries: Vec<Vec<f32>> = (0..6).map(|i| noise(latents.weight.len() / latents.len(), 20 + i)).collect();
    network.set_latents(&mut parameters, &summaries);
    let mut seen = SeenWithLatents::default();
    let shapes = [network.expectation.latents, network.expectation.seen].map(|i| network.nodes[i].len());
    for part in 0..6 {
        let [latents, mut map] = [0, 1].map(|i| noise(shapes[i], 40 + 2 * part + i as u64));
        map.iter_mut().for_each(|v| *v *= 0.1);
        seen.add(&latents, &map);
    }
    network.set_expected(&mut parameters, &seen);
    // Nothing may be zero, or symmetric, by initialisation.
    for (p, n) in parameters.iter_mut().zip(noise(network.parameters, 8)) {
        *p += 0.01 * n;
    }
    (network, parameters)
}

#[test]
fn the_engine_computes_what_autodiff_computes() {
    let (network, parameters) = network();
    let image = noise(48 * 64 * RGB, 1);
    let [rows, columns] = network.grid();
    let at_odds = noise(rows * columns, 2);
    let (odds, theirs) = reference::gradients(&network, &parameters, &image, &at_odds, &Device::flex());
    for first in [1, network.thawed, network.head] {
        let prepared = Prepared::new(&network, &parameters, first);
        let mut engine = Engine::new(&network);
        let own = engine.forward(&parameters, &prepared, &image).to_vec();
        for (i, (a, b)) in own.iter().zip(&odds).enumerate() {
            assert!((a - b).abs() < 1e-4 * b.abs().max(1.0), "log odds {i}: {a}, burn says {b}");
        }
        let mut ours = vec![0.0; network.parameters];
        engine.backward(&parameters, &prepared, &at_odds, first, &mut ours);
        for (i, node) in network.nodes.iter().enumerate() {
            for (what, range) in [("weight", node.weight.clone()), ("bias", node.bias.clone())] {
                let (x, y) = (&ours[range.clone()], &theirs[range]);
                if i < first {
                    assert!(x.iter().all(|v| *v == 0.0), "layer {i} is not trained");
                    continue;
                }
                let size: f32 = y.iter().map(|v| v * v).sum::<f32>().sqrt();
                let difference: f32 = x.iter().zip(y).map(|(a, b)| (a - b).powi(2)).sum::<f32>().sqrt();
                assert!(y.is_empty() || size > 0.0, "{what} of layer {i} ({:?}) has no gradient: the test shows nothing", node.op);
                assert!(difference <= 2e-4 * size, "{what} of layer {i} ({:?}) differs by {difference:e} of {size:e}", node.op);
            }
        }
    }
}

/// What is expected of good parts is a linear function of their latents: where they are one, it is found, and the compared channels become 0.
#[test]
fn what_is_seen_of_good_parts_is_what_is_expected() {
    let (network, mut parameters) = network();
    let [latents, seen, expected, compared] =
        [network.expectation.latents, network.expectation.seen, network.expectation.expected, network.expectation.compared]
            .map(|i| &network.nodes[i]);
    let channels = seen.shape[2];
    let (table, offset) = (noise(latents.len() * seen.len(), 70), noise(seen.len(), 71));
    // Uncorrelated, as principal components are: each part moves one latent, up and down alike.
    let parts: Vec<(Vec<f32>, Vec<f32>)> = (0..2 * latents.len())
        .map(|part| {
            let mut own = vec![2.0; latents.len()];
            own[part / 2] += if part % 2 == 0 { 1.0 } else { -1.0 };
            let map =
                offset.iter().enumerate().map(|(i, o)| o + own.iter().enumerate().map(|(k, l)| l * table[k * seen.len() + i]).sum::<f32>());
            (own.clone(), map.collect())
        })
        .collect();
    let mut sums = SeenWithLatents::default();
    for (latents, map) in &parts {
        sums.add(latents, map);
    }
    network.set_expected(&mut parameters, &sums);
    let (weight, bias) = (&parameters[expected.weight.clone()], &parameters[expected.bias.clone()]);
    for (latents, map) in &parts {
        let found: Vec<f32> = (0..bias.len())
            .map(|i| bias[i] + latents.iter().enumerate().map(|(k, l)| l * weight[k * bias.len() + i]).sum::<f32>())
            .collect();
        let per_cell = expected.shape[2];
        for (cell, (found, map)) in found.chunks_exact(per_cell).zip(map.chunks_exact(channels)).enumerate() {
            for (c, (found, map)) in found.iter().zip(map).enumerate() {
                assert!((found - map).abs() < 1e-3, "cell {cell}, channel {c}: {found} expected, {map} seen");
            }
        }
    }
    // Minus what is expected, in the first channels, and nothing in the others.
    let outputs = compared.shape[2];
    for (k, row) in parameters[compared.weight.clone()].chunks_exact(outputs).enumerate() {
        assert!(row.iter().enumerate().all(|(c, w)| *w == if c == k { -1.0 } else { 0.0 }));
    }
}

/// Independent of burn: a step along the gradient changes the sum by what the gradient says.
#[test]
fn gradients_are_finite_differences() {
    let (network, parameters) = network();
    let image = noise(48 * 64 * RGB, 5);
    let [rows, columns] = network.grid();
    let at_odds = noise(rows * columns, 6);
    let value = |p: &[f32]| -> f64 {
        let prepared = Prepared::new(&network, p, network.nodes.len());
        let mut engine = Engine::new(&network);
        engine.forward(p, &prepared, &image).iter().zip(&at_odds).map(|(o, w)| f64::from(o * w)).sum()
    };
    let mut gradient = vec![0.0; network.parameters];
    let prepared = Prepared::new(&network, &parameters, 1);
    let mut engine = Engine::new(&network);
    engine.forward(&parameters, &prepared, &image);
    engine.backward(&parameters, &prepared, &at_odds, 1, &mut gradient);
    for (i, node) in network.nodes.iter().enumerate().filter(|(_, n)| !n.weight.is_empty()) {
        let power: f64 = gradient[node.weight.clone()].iter().map(|g| f64::from(*g).powi(2)).sum();
        // Small enough that few units cross an end of their ReLU6, large enough for float32.
        let step = (0.004 / power.sqrt()).min(0.02 / power.sqrt().max(1e-3));
        let moved = |sign: f64| -> Vec<f32> {
            let mut p = parameters.clone();
            for at in node.weight.clone() {
                p[at] += (sign * step * f64::from(gradient[at])) as f32;
            }
            p
        };
        let measured = (value(&moved(1.0)) - value(&moved(-1.0))) / (2.0 * step);
        assert!((measured - power).abs() < 0.08 * power, "layer {i} ({:?}): {measured} measured, {power} by the gradient", node.op);
    }
}

#[test]
fn the_file_computes_what_was_trained() {
    let (network, parameters) = network();
    let [height, width] = network.size();
    let image = noise(height * width * RGB, 7);
    let prepared = Prepared::new(&network, &parameters, network.nodes.len());
    let odds = Engine::new(&network).forward(&parameters, &prepared, &image).to_vec();
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("detector.onnx");
    std::fs::write(&path, export::graph(&network, &parameters).into_bytes("test")).expect("a file");
    let planar: Vec<f32> = (0..image.len()).map(|i| image[i % (height * width) * RGB + i / (height * width)]).collect();
    let outputs = FeatureModel::load(&path, [RGB, height, width]).expect("a model").run(&planar).expect("outputs");
    assert_eq!(outputs[0].values.len(), odds.len());
    for (i, (t, o)) in outputs[0].values.iter().zip(&odds).enumerate() {
        let o = export::map_value(*o);
        assert!((t - o).abs() < 1e-3 * o.abs().max(1.0), "cell {i}: {t}, trained {o}");
    }
    assert!(network.nodes.iter().any(|n| n.op == Op::MaxPool), "the graph has everything in it");
}

/// Striped parts with a bright frame.
fn picture(seed: usize, [height, width]: [usize; 2]) -> Vec<u8> {
    (0..height * width)
        .flat_map(|i| {
            let (x, y) = (i % width, i / width);
            let stripe = if ((x + seed % 3) / 8).is_multiple_of(2) { 90 } else { 140 };
            let frame = if y < 6 || x < 6 { 80 } else { 0 };
            let noise = (i * 7919 + seed * 104_729) % 5;
            [stripe + frame + noise, stripe + noise, stripe].map(|v| v as u8)
        })
        .collect()
}

fn run(training: &Training<'_>, state: &mut State, checkpoint: &Path, tested: &[Tested], stop_at: Option<usize>) -> Vec<f64> {
    let stop = AtomicBool::new(false);
    let mut losses = Vec::new();
    let finished = training.run(
        state,
        RunOptions {
            threads: 2,
            checkpoint,
            checkpoint_every: 0,
            tested,
            stop: &stop,
            on_step: &mut |p| {
                losses.push(p.loss.total());
                stop.store(stop_at == Some(p.step), Ordering::Relaxed);
            },
            on_measured: &mut |_| {},
        },
    );
    assert_eq!(finished.expect("a run"), stop_at.is_none());
    losses
}

#[test]
fn a_stopped_and_resumed_run_ends_with_the_same_detector_and_the_detector_learns() {
    let folder = tempfile::tempdir().expect("a folder");
    let (architecture, weights) = tiny();
    let size = [64, 80];
    let parts = Parts::Folder((0..12).map(|i| picture(i, size)).collect());
    let plan = Plan { trunk: architecture, size, steps: 240, batch: 6, seed: 2, rate: 1e-3 };
    let training = Training { plan: plan.clone(), parts: &parts };
    let checkpoint = folder.path().join("checkpoint");
    let mut whole = training.start(&weights);
    // A blot and its absence: something to measure at the end.
    let tested: Vec<Tested> = (0..12)
        .map(|i| {
            let mut planar = vec![0.0; 64 * 80 * RGB];
            for (at, v) in picture(100 + i, size).into_iter().enumerate() {
                let (x, y) = (at / RGB % 80, at / RGB / 80);
                let spoilt = i % 2 == 1 && (30..42).contains(&x) && (20..32).contains(&y);
                planar[at % RGB * 64 * 80 + at / RGB] = (if spoilt { 20.0 } else { f32::from(v) } - 127.0) / 128.0;
            }
            Tested::new(&planar, "stripes".into(), i % 2 == 1)
        })
        .collect();
    let losses = run(&training, &mut whole, &checkpoint, &tested, None);
    assert_eq!((losses.len(), whole.step), (240, 240));
    let mean = |l: &[f64]| l.iter().sum::<f64>() / l.len() as f64;
    assert!(mean(&losses[160..]) < mean(&losses[..80]), "{losses:?}");
    let measured = whole.measured.last().expect("a measurement at the end");
    assert!(measured.auroc > 0.9, "a black blot on stripes: {measured:?}");

    let mut halves = training.start(&weights);
    run(&training, &mut halves, &checkpoint, &[], Some(23));
    let mut halves = State::load(&checkpoint, &plan).expect("the checkpoint");
    assert_eq!(halves.step, 23);
    let rest = run(&training, &mut halves, &checkpoint, &[], None);
    assert_eq!(rest, losses[23..]);
    assert_eq!(halves.parameters, whole.parameters);

    let other = Plan { seed: 3, ..plan.clone() };
    let refusal = State::load(&checkpoint, &other).expect_err("another seed").to_string();
    assert!(refusal.contains("input size, batch or seed"), "{refusal}");
    std::fs::write(&checkpoint, b"not a checkpoint").expect("a file");
    assert!(State::load(&checkpoint, &plan).expect_err("damage").to_string().contains("damaged"));
}

/// A detector read back is what was written; a quantized one nearly; and one without the newer branches computes what it did.
#[test]
fn a_detector_goes_on_from_an_exported_one() {
    let (network, parameters) = network();
    let file = export::graph(&network, &parameters).into_bytes("test");
    let mut read = vec![0.5; network.parameters];
    assert_eq!(adopt(&network, &mut read, &file, "written").expect("it is read back"), Vec::<String>::new());
    assert!(read == parameters);

    let mut model = pb::ModelProto::decode(&file[..]).expect("ONNX");
    cull::model::quantize::quantize(&mut model).expect("weights to quantize");
    let mut rounded = vec![0.5; network.parameters];
    adopt(&network, &mut rounded, &model.encode_to_vec(), "quantized").expect("it is read back");
    let largest = parameters.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    for (a, b) in rounded.iter().zip(&parameters) {
        assert!((a - b).abs() <= largest / 200.0, "{a} for {b}");
    }
    assert!(rounded != parameters, "something was quantized");

    let mut older = pb::ModelProto::decode(&file[..]).expect("ONNX");
    let graph = older.graph.as_mut().expect("a graph");
    graph.initializer.retain(|t| !t.name.starts_with("head.filtered"));
    let mut grown = noise(network.parameters, 77);
    let fresh = adopt(&network, &mut grown, &older.encode_to_vec(), "older").expect("it is read");
    assert_eq!(fresh, ["head.filtered.expand", "head.filtered.filter", "head.filtered.project"]);
    let branch_end = network.nodes.iter().find(|n| n.name == "head.filtered.project").expect("the branch");
    let mut without = parameters.clone();
    without[branch_end.weight.clone()].fill(0.0);
    without[branch_end.bias.clone()].fill(0.0);
    let odds = |p: &[f32]| {
        let prepared = Prepared::new(&network, p, network.nodes.len());
        Engine::new(&network).forward(p, &prepared, &noise(48 * 64 * RGB, 9)).to_vec()
    };
    assert_eq!(odds(&grown), odds(&without));

    let wider = Network::new(&tiny().0, [64, 64]);
    let why = adopt(&wider, &mut vec![0.0; wider.parameters], &file, "narrow").expect_err("another size").to_string();
    assert!(why.contains("narrow") && why.contains("--input"), "{why}");
}

#[test]
fn the_command_makes_a_bundle_from_a_folder_of_good_parts() {
    let folder = tempfile::tempdir().expect("a folder");
    let data = folder.path().join("parts/stripes/train/good");
    std::fs::create_dir_all(&data).expect("a folder");
    for i in 0..40 {
        let pixels = picture(i, [96, 128]);
        image::save_buffer(data.join(format!("{i:03}.png")), &pixels, 128, 96, image::ColorType::Rgb8).expect("a picture");
    }
    let out = folder.path().join("stripes.onnx");
    let run = |out: &Path, more: &[&str]| {
        Command::new(env!("CARGO_BIN_EXE_cull-trainer"))
            .args(["detect", "--data"])
            .arg(folder.path().join("parts"))
            .arg("--out")
            .arg(out)
            .args(["--input", "80x64", "--batch", "4", "--threads", "1", "--seed", "5"])
            .args(more)
            .output()
            .expect("the trainer runs")
    };
    let command = |more: &[&str]| run(&out, more);
    let made = command(&["--steps", "6"]);
    let said = format!("{}{}", String::from_utf8_lossy(&made.stdout), String::from_utf8_lossy(&made.stderr));
    assert!(made.status.success(), "{said}");
    assert!(said.contains("next      cull eval --model"), "{said}");
    let bundle = Bundle::load(&out).expect("a bundle");
    assert_eq!((bundle.meta.grid, bundle.meta.preprocess.width_px), ([8, 10], 80));
    assert_eq!(bundle.meta.trained_on, ["stripes"]);
    assert!(bundle.meta.calibration.normal_scores.len() >= 5);

    // On from the bundle; not for parts that it does not know.
    let second = folder.path().join("second.onnx");
    let on = run(&second, &["--steps", "2", "--from", &out.to_string_lossy()]);
    assert!(on.status.success() && second.exists(), "{}", String::from_utf8_lossy(&on.stderr));
    let resumed = run(&second, &["--steps", "3", "--from", &out.to_string_lossy(), "--resume"]);
    assert!(resumed.status.success(), "what a stopped run asks for: {}", String::from_utf8_lossy(&resumed.stderr));
    let unknown =
        Command::new(env!("CARGO_BIN_EXE_cull-trainer")).args(["detect", "--simulate", "--input", "80x64", "--from"]).arg(&out).output();
    let why = String::from_utf8_lossy(&unknown.expect("the trainer runs").stderr).into_owned();
    assert!(why.contains("does not know"), "{why}");
    // Further steps from the checkpoint; another seed is refused with a reason.
    let more = command(&["--steps", "8", "--resume"]);
    assert!(more.status.success(), "{}", String::from_utf8_lossy(&more.stderr));
    let refused = command(&["--steps", "8", "--resume", "--batch", "3"]);
    let why = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success(), "{why}");
    let neither = Command::new(env!("CARGO_BIN_EXE_cull-trainer")).arg("detect").output().expect("the trainer runs");
    assert!(String::from_utf8_lossy(&neither.stderr).contains("--simulate"), "it says what to give");
}
