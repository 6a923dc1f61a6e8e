//! The student's three computations agree: the engine, burn's autodiff, and the exported file in the inspector's runtime. And a run is a function of its plan.

use burn::tensor::Device;
use cull::model::runtime::FeatureModel;
use cull_trainer::distill::engine::{Engine, Mode, Sample, Weighing};
use cull_trainer::distill::export::{self, Scaling, backbone};
use cull_trainer::distill::reference::step;
use cull_trainer::distill::student::{Architecture, Block, RGB};
use cull_trainer::distill::synth::Picture;
use cull_trainer::distill::teacher::Teacher;
use cull_trainer::distill::{Distillation, Plan, Pools, RunOptions, State};
use rand::{Rng, SeedableRng};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

/// `[rows, columns]` -> `[columns, rows]`.
fn transposed(from: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    (0..rows * columns).map(|i| from[(i % rows) * columns + i / rows]).collect()
}

/// A small chain with everything in it: no expansion, strides, both kernels, a residual.
fn tiny() -> Architecture {
    let block = Block::inverted;
    Architecture {
        stem: 16,
        blocks: vec![
            block(16, 16, 8, 3, 1, false),
            block(8, 32, 12, 3, 2, true),
            block(12, 32, 12, 3, 1, true),
            block(12, 48, 20, 5, 2, true),
            block(20, 48, 20, 5, 1, true),
        ],
        taps: vec![("f2".into(), 0), ("f4".into(), 2), ("f8".into(), 4)],
    }
}

fn samples(a: &Architecture, side: usize, count: usize, seed: u64) -> Vec<Sample> {
    let mut rng = rand_pcg::Pcg64::seed_from_u64(seed);
    let mut fill = |n: usize| -> Vec<f32> { (0..n).map(|_| rng.random_range(-1.5..1.5)).collect() };
    (0..count)
        .map(|_| Sample {
            side,
            image: fill(side * side * RGB),
            targets: (0..a.blocks.len()).map(|b| fill((side / a.stride_after(b)).pow(2) * a.blocks[b].outputs)).collect(),
        })
        .collect()
}

fn weighing(a: &Architecture) -> Weighing {
    Weighing {
        boundary: (0..a.blocks.len()).map(|b| 0.5 + b as f32 * 0.25).collect(),
        channel: a.boundaries().iter().map(|c| (0..*c).map(|i| 0.5 + i as f32 * 0.1).collect()).collect(),
    }
}

/// The hand-written step against burn's autodiff: every loss, every gradient, both modes, sizes that leave remainders everywhere.
#[test]
fn the_engine_computes_what_autodiff_computes() {
    let a = tiny();
    let parameters: Vec<f32> = a.init(4);
    let weighing = weighing(&a);
    for (side, count, mode) in [(16, 3, Mode::EndToEnd), (32, 2, Mode::EndToEnd), (32, 2, Mode::Blockwise(vec![1.0; 5]))] {
        let list = samples(&a, side, count, side as u64);
        let batch: Vec<&Sample> = list.iter().collect();
        let (mut ours, mut theirs) = (vec![0.0; parameters.len()], vec![0.0; parameters.len()]);
        let l = Engine::new(&a).step(&parameters, &batch, &mode, &weighing, &mut ours);
        let r = step(&a, &parameters, &batch, &mode, &weighing, &mut theirs, &Device::flex());
        for (b, (x, y)) in l.boundary.iter().zip(&r.boundary).enumerate() {
            assert!((x - y).abs() < 1e-4 * y, "{mode:?} side {side}: loss {b} is {x}, burn says {y}");
        }
        let layout = a.layout();
        let mut parts = vec![("stem", layout.stem), ("stem bias", layout.stem_bias)];
        for b in layout.blocks {
            parts.extend([
                ("expand", b.expand),
                ("expand bias", b.expand_bias),
                ("depthwise", b.depthwise),
                ("depthwise bias", b.depthwise_bias),
                ("project", b.project),
                ("project bias", b.project_bias),
            ]);
        }
        for (at, (name, range)) in parts.into_iter().enumerate() {
            let (x, y) = (&ours[range.clone()], &theirs[range]);
            let size: f32 = y.iter().map(|v| v * v).sum::<f32>().sqrt();
            let difference: f32 = x.iter().zip(y).map(|(a, b)| (a - b).powi(2)).sum::<f32>().sqrt();
            assert!(y.is_empty() || size > 0.0, "{name} ({at}) has no gradient: the test shows nothing");
            assert!(difference <= 1e-4 * size, "{mode:?} side {side}: gradient of {name} ({at}) differs by {difference:e} of {size:e}");
        }
    }
}

/// The file, run by the inspector's runtime, gives what the engine gives, brought to the teacher's scale.
#[test]
fn the_file_computes_what_was_trained() {
    let a = tiny();
    let parameters = a.init(9);
    let side = 32;
    let list = |c: usize, from: f32, step: f32| -> Vec<f32> { (0..c).map(|i| from + step * i as f32).collect() };
    let ends = (0..a.blocks.len()).map(|b| a.blocks[a.chain_end(b)].outputs);
    let scaling =
        Scaling { mean: ends.clone().map(|c| list(c, -0.4, 0.07)).collect(), deviation: ends.map(|c| list(c, 0.5, 0.11)).collect() };
    let image: Vec<f32> = (0..side * side * RGB).map(|i| ((i * 29 % 97) as f32 - 48.0) / 48.0).collect();
    let ours = Engine::new(&a).boundaries(&parameters, &image, side);
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("student.onnx");
    std::fs::write(&path, backbone(&a, &parameters, &scaling)).expect("a file");
    let mut model = FeatureModel::load(&path, [RGB, side, side]).expect("a model");
    let planar = transposed(&image, side * side, RGB);
    let outputs = model.run(&planar).expect("outputs");
    assert_eq!(outputs.len(), a.taps.len());
    for (output, (name, b)) in outputs.iter().zip(&a.taps) {
        assert_eq!(&output.name, name);
        let channels = a.blocks[*b].outputs;
        let theirs = transposed(&output.values, channels, output.values.len() / channels);
        for (i, (t, o)) in theirs.iter().zip(&ours[*b]).enumerate() {
            let o = o * scaling.deviation[*b][i % channels] + scaling.mean[*b][i % channels];
            assert!((t - o).abs() < 1e-3 * o.abs().max(1.0), "{name} value {i}: {t}, trained {o}");
        }
    }
}

/// A teacher made up on the spot, written and read as a user's would be, and pictures for it.
fn small(folder: &Path) -> (Teacher, Pools) {
    let block = Block::inverted;
    let stages = ["f2", "f4", "f8", "f16"];
    let architecture = Architecture {
        stem: 16,
        blocks: vec![
            block(16, 16, 6, 3, 1, false),
            block(6, 32, 8, 3, 2, true),
            block(8, 32, 8, 3, 1, true),
            block(8, 32, 12, 5, 2, true),
            block(12, 48, 16, 3, 2, true),
        ],
        taps: stages.iter().zip([0, 2, 3, 4]).map(|(n, b)| ((*n).to_owned(), b)).collect(),
    };
    let ones = |v: f32| architecture.boundaries().iter().map(|c| vec![v; *c]).collect();
    let scaling = Scaling { mean: ones(0.0), deviation: ones(1.0) };
    let file = folder.join("teacher.onnx");
    std::fs::write(&file, export::backbone(&architecture, &architecture.init(5), &scaling)).expect("a teacher file");
    let teacher = Teacher::load(&file).expect("what was written is a teacher");
    assert_eq!(teacher.architecture, architecture);
    let picture = |seed: usize| {
        let pixels = (0..240 * 240 * RGB).map(|i| ((i / 3 % 240 + i / 720) * seed % 256) as u8).collect();
        Picture { width: 240, height: 240, pixels }
    };
    let pools =
        Pools { natural: (1..6).map(picture).collect(), held_out: vec![picture(7)], simulated: vec![picture(9)], skipped: Vec::new() };
    (teacher, pools)
}

/// Runs to the end, or stops after `stop_at` steps; the losses of all steps.
fn run(d: &Distillation<'_>, state: &mut State, checkpoint: &Path, stop_at: Option<usize>) -> Vec<f64> {
    let stop = AtomicBool::new(false);
    let mut losses = Vec::new();
    let device = Device::flex();
    let finished = d.run(
        state,
        RunOptions {
            device: &device,
            gpu: false,
            threads: 2,
            checkpoint,
            checkpoint_every: 0,
            measure_every: 0,
            stop: &stop,
            on_step: &mut |p| {
                losses.push(p.loss.total);
                stop.store(stop_at == Some(p.step), Ordering::Relaxed);
            },
            on_measured: &mut |_, _| {},
        },
    );
    assert_eq!(finished.expect("a run"), stop_at.is_none());
    losses
}

#[test]
fn a_stopped_and_resumed_run_ends_with_the_same_student_and_the_student_learns() {
    let folder = tempfile::tempdir().expect("a folder");
    let (teacher, pools) = small(folder.path());
    let student = teacher.architecture.slimmed(0.5);
    let plan = Plan { student, steps: 60, batch: 8, seed: 2, rate: 2e-3, blockwise: 0.5, large: 0.2, side: 32, large_side: 48 };
    let d = Distillation { plan: plan.clone(), teacher: &teacher, pools: &pools, work: folder.path().join("work") };
    let checkpoint = folder.path().join("checkpoint");
    let mut whole = d.start().expect("a start");
    d.check_device(&whole, &Device::flex()).expect("burn on the CPU computes what the engine computes");
    let losses = run(&d, &mut whole, &checkpoint, None);
    assert_eq!((losses.len(), whole.step), (60, 60));
    let mean = |l: &[f64]| l.iter().sum::<f64>() / l.len() as f64;
    assert!(mean(&losses[20..30]) < 0.8 * mean(&losses[..5]), "blockwise: {losses:?}");
    assert!(mean(&losses[50..]) < mean(&losses[30..35]), "end to end: {losses:?}");
    let (_, unexplained) = whole.measured.last().expect("a measurement at the end");
    assert!(unexplained.photographs.iter().chain(&unexplained.varied).all(|u| *u > 0.0 && *u < 3.0), "{unexplained:?}");

    let mut halves = d.start().expect("a start");
    run(&d, &mut halves, &checkpoint, Some(23));
    let mut halves = State::load(&checkpoint, &plan).expect("the checkpoint");
    assert_eq!(halves.step, 23);
    let rest = run(&d, &mut halves, &checkpoint, None);
    assert_eq!(rest, losses[23..]);
    assert_eq!(halves.parameters, whole.parameters);

    let other = Plan { seed: 3, ..plan.clone() };
    let refusal = State::load(&checkpoint, &other).expect_err("another seed").to_string();
    assert!(refusal.contains("student, batch, seed or picture size differs"), "{refusal}");
    std::fs::write(&checkpoint, b"not a checkpoint").expect("a file");
    assert!(State::load(&checkpoint, &plan).expect_err("damage").to_string().contains("damaged"));
}

/// Lite0 where it is: an Ok(None) elsewhere, said loudly.
fn lite0() -> Option<Teacher> {
    let shared = std::env::var("CULL_SHARED").unwrap_or_else(|_| format!("{}/../../shared", env!("CARGO_MANIFEST_DIR")));
    let path = Path::new(&shared).join("backbones/efficientnet_lite0_features.onnx");
    if !path.exists() {
        eprintln!("SKIPPED: {} is not there", path.display());
        return None;
    }
    Some(Teacher::load(&path).expect("a known teacher"))
}

#[test]
fn efficientnet_lite0_is_read_as_eleven_blocks() {
    let Some(teacher) = lite0() else { return };
    let a = &teacher.architecture;
    assert_eq!(a.boundaries(), [16, 24, 24, 40, 40, 80, 80, 80, 112, 112, 112]);
    assert_eq!(a.taps.iter().map(|t| t.1).collect::<Vec<_>>(), [0, 2, 4, 10]);
    assert_eq!(a.blocks.iter().map(|b| b.hidden).collect::<Vec<_>>(), [32, 96, 144, 144, 240, 240, 480, 480, 480, 672, 672]);
    let slim = a.slimmed(0.5);
    assert!(slim.multiply_adds(224) * 10 <= a.multiply_adds(224) * 6, "{} of {}", slim.multiply_adds(224), a.multiply_adds(224));
}
