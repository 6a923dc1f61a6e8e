//! The trainer as its user meets it: the real binary, real picture files, a real Ctrl-C. Pictures and weights are made up here.

use cull_trainer::import::efficientnet::{self, Arch, Source};
use safetensors::tensor::{Dtype, TensorView};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// Give up waiting for something that takes a second on an idle machine.
const PATIENCE: Duration = Duration::from_secs(300);

fn trainer() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cull-trainer"));
    command.stdin(Stdio::null());
    command
}

fn run(command: &mut Command) -> (bool, String) {
    let Output { status, stdout, stderr } = command.output().unwrap();
    (status.success(), format!("{}{}", String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr)))
}

/// Numbers that differ from each other and are the same every time.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 40) as f32 / (1u64 << 24) as f32
    }
}

/// EfficientNet-B0 weights drawn at random, as a safetensors file with torchvision's names.
fn weights(path: &Path) {
    let mut noise = Noise(1);
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = efficientnet::tensors(Source::Torchvision, Arch::B0)
        .into_iter()
        .map(|(name, shape)| {
            let fan_in = shape.iter().skip(1).product::<usize>().max(1) as f32;
            let values = (0..shape.iter().product()).map(|_| match name.rsplit('.').next() {
                Some("running_var") => 0.5 + noise.next(),
                _ if shape.len() == 4 => (noise.next() - 0.5) * 3.4 / fan_in.sqrt(),
                Some("weight") => 0.8 + 0.4 * noise.next(),
                _ => 0.2 * (noise.next() - 0.5),
            });
            let bytes = values.flat_map(f32::to_le_bytes).collect();
            (name, shape, bytes)
        })
        .collect();
    let views = tensors.iter().map(|(name, shape, bytes)| (name, TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap()));
    std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

/// The imported backbone, made once by the command itself.
fn backbone() -> &'static Path {
    static FILE: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    &FILE
        .get_or_init(|| {
            let dir = tempfile::tempdir().unwrap();
            weights(&dir.path().join("w.safetensors"));
            let out = dir.path().join("b0.onnx");
            let (ok, text) = run(trainer()
                .args(["import-backbone", "--input-px", "64", "--weights"])
                .arg(dir.path().join("w.safetensors"))
                .arg("--out")
                .arg(&out));
            assert!(ok, "{text}");
            assert!(text.contains("efficientnet-b0 from Torchvision") && text.contains("192 channels"), "{text}");
            (dir, out)
        })
        .1
}

/// Made-up parts: a soft spot on a noisy ground; a defect is a bright bar.
fn pictures(folder: &Path, count: usize, seed: u64, is_defective: bool) {
    std::fs::create_dir_all(folder).unwrap();
    for i in 0..count {
        let mut noise = Noise(seed * 1000 + i as u64);
        let picture = image::RgbImage::from_fn(64, 64, |x, y| {
            let (dx, dy) = (x as f32 - 32.0, y as f32 - 32.0);
            let mut value = 60.0 + 120.0 * (-(dx * dx + dy * dy) / 300.0).exp() + 20.0 * noise.next();
            if is_defective && (20..44).contains(&x) && (40..46).contains(&y) {
                value = 250.0;
            }
            image::Rgb([value as u8; 3])
        });
        picture.save(folder.join(format!("{i:03}.png"))).unwrap();
    }
}

/// A category in MVTec-AD layout.
fn category(root: &Path) {
    pictures(&root.join("part/train/good"), 36, 1, false);
    pictures(&root.join("part/test/good"), 6, 2, false);
    pictures(&root.join("part/test/bar"), 6, 3, true);
}

/// A training command small enough for a test; `out` names bundle, checkpoint and report.
fn train(dir: &Path, data: &Path, out: &str, more: &[&str]) -> Command {
    let mut command = trainer();
    command.current_dir(dir).args([
        "train",
        "--device",
        "cpu",
        "--input-px",
        "64",
        "--grid",
        "4",
        "--mask-encoder",
        "3",
        "--mask-memory",
        "3",
    ]);
    command.args([
        "--mask-previous",
        "3",
        "--dim",
        "16",
        "--hidden",
        "32",
        "--encoder-layers",
        "1",
        "--decoder-layers",
        "1",
        "--batch",
        "8",
    ]);
    // These sizes are a transformer's; `fast` has none.
    if !more.contains(&"--preset") {
        command.args(["--preset", "uniad"]);
    }
    command.arg("--data").arg(data).arg("--backbone").arg(backbone()).arg("--out").arg(out).args(more);
    command
}

#[test]
fn ctrl_c_saves_and_resume_ends_in_the_same_bits() {
    let dir = tempfile::tempdir().unwrap();
    category(&dir.path().join("data"));
    let data = dir.path().join("data");
    let steps = ["--steps", "150"];
    let (ok, text) = run(&mut train(dir.path(), &data, "whole.onnx", &steps));
    assert!(ok, "{text}");

    let mut child = train(dir.path(), &data, "parts.onnx", &[&steps[..], &["--checkpoint-every", "1"]].concat())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let checkpoint = dir.path().join("parts.onnx.checkpoint");
    let start = Instant::now();
    while !checkpoint.exists() {
        assert!(start.elapsed() < PATIENCE, "no checkpoint was written");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(Command::new("kill").arg("-INT").arg(child.id().to_string()).status().unwrap().success());
    let status = child.wait().unwrap();
    assert_eq!(status.code(), Some(130), "the run ended before the signal came, or did not stop for it");
    assert!(!dir.path().join("parts.onnx").exists());

    // Other arguments are refused, and nothing is lost by it.
    let (ok, text) = run(&mut train(dir.path(), &data, "parts.onnx", &[&steps[..], &["--resume", "--seed", "2"]].concat()));
    assert!(!ok && text.contains("made with other settings"), "{text}");
    let (ok, text) = run(&mut train(dir.path(), &data, "parts.onnx", &[&steps[..], &["--resume"]].concat()));
    assert!(ok, "{text}");
    let read = |name: &str| std::fs::read(dir.path().join(name)).unwrap();
    assert!(read("whole.onnx.checkpoint") == read("parts.onnx.checkpoint"), "the resumed run went another way");
}

#[test]
fn a_run_from_pictures_to_a_bundle_with_a_report() {
    let dir = tempfile::tempdir().unwrap();
    category(&dir.path().join("data"));
    let data = dir.path().join("data");
    let json = ["--steps", "60", "--json", "run.json"];
    let (ok, text) = run(&mut train(dir.path(), &data, "line.onnx", &json));
    assert!(ok, "{text}");
    assert!(text.contains("next      cull eval --model line.onnx"), "{text}");
    // 36 pictures: 5 or 6 are held out, which is far from the 199 that 0.5 % takes.
    assert!(text.contains("good pictures tell false-reject rates from 1"), "{text}");
    let bundle = cull::model::bundle::Bundle::load(&dir.path().join("line.onnx")).unwrap();
    assert_eq!(bundle.meta.trained_on, ["part"]);
    let summary: serde_json::Value = serde_json::from_slice(&std::fs::read(dir.path().join("run.json")).unwrap()).unwrap();
    assert_eq!(summary["losses"].as_array().unwrap().len(), 60);
    assert_eq!(summary["validations"].as_array().unwrap().len(), 10);
    let page = std::fs::read_to_string(dir.path().join("line.onnx.html")).unwrap();
    assert_eq!(page.matches("<svg").count(), 2, "loss and AUROC curves");

    // The same again: every feature comes from the cache.
    let (ok, text) = run(&mut train(dir.path(), &data, "again.onnx", &json));
    assert!(ok && text.contains("(48 cached)"), "{text}");
    // And gives the same weights.
    let read = |name: &str| std::fs::read(dir.path().join(name)).unwrap();
    assert!(read("line.onnx.checkpoint") == read("again.onnx.checkpoint"));
    let (_, _) = run(&mut train(dir.path(), &data, "other.onnx", &["--steps", "60", "--seed", "2"]));
    assert!(read("line.onnx.checkpoint") != read("other.onnx.checkpoint"));
}

#[test]
fn patience_stops_early_and_a_resumed_run_stays_stopped() {
    let dir = tempfile::tempdir().unwrap();
    category(&dir.path().join("data"));
    let data = dir.path().join("data");
    // A learning rate that changes nothing: no validation is better than the first.
    let more = ["--steps", "100", "--patience", "2", "--learning-rate", "1e-12", "--json", "run.json"];
    let (ok, text) = run(&mut train(dir.path(), &data, "line.onnx", &more));
    assert!(ok && text.contains("stopped early") && text.contains("trained   30 steps"), "{text}");
    let (ok, text) = run(&mut train(dir.path(), &data, "line.onnx", &[&more[..], &["--resume"]].concat()));
    assert!(ok && text.contains("trained   30 steps"), "{text}");
}

#[test]
fn divergence_is_said_and_the_last_good_checkpoint_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    category(&dir.path().join("data"));
    let data = dir.path().join("data");
    let good = ["--steps", "40", "--checkpoint-every", "1", "--preset", "paper"];
    let (ok, text) = run(&mut train(dir.path(), &data, "line.onnx", &[&good[..], &["--learning-rate", "1e18"]].concat()));
    assert!(!ok && text.contains("training diverged at step") && text.contains("line.onnx.checkpoint"), "{text}");
    assert!(!dir.path().join("line.onnx").exists());
    // It holds numbers, and a lower rate may go on from it.
    let (ok, text) = run(&mut train(dir.path(), &data, "line.onnx", &[&good[..], &["--resume", "--learning-rate", "1e-4"]].concat()));
    assert!(ok || text.contains("training diverged"), "{text}");
}

#[test]
fn bad_pictures_are_named_and_skipped_or_refused() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    category(&data);
    std::fs::write(data.join("part/train/good/007.png"), "no picture").unwrap();
    let (ok, text) = run(&mut train(dir.path(), &data, "line.onnx", &["--steps", "3"]));
    assert!(ok && text.contains("skipped   ") && text.contains("007.png"), "{text}");
    let (ok, text) = run(&mut train(dir.path(), &data, "line.onnx", &["--steps", "3", "--strict"]));
    assert!(!ok && text.contains("007.png") && text.contains("--strict"), "{text}");
}

#[test]
fn sets_that_cannot_be_trained_on_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let few = dir.path().join("few");
    pictures(&few, 12, 1, false);
    let (ok, text) = run(&mut train(dir.path(), &few, "line.onnx", &[]));
    assert!(!ok && text.contains("12 normal images, at least 20"), "{text}");

    // A test defect stored in another format under another name among the training pictures.
    let mixed = dir.path().join("mixed");
    category(&mixed);
    let picture = image::open(mixed.join("part/test/bar/003.png")).unwrap();
    // Same pixels, other bytes: with an alpha channel that hides nothing.
    picture.to_rgba8().save(mixed.join("part/train/good/new.png")).unwrap();
    let (ok, text) = run(&mut train(dir.path(), &mixed, "line.onnx", &["--steps", "3"]));
    assert!(!ok && text.contains("train/good/new.png") && text.contains("test/bar/003.png"), "{text}");
    assert!(!dir.path().join("line.onnx").exists());
}

#[test]
fn all_layouts_train_and_a_dry_run_writes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let products = dir.path().join("products");
    pictures(&products.join("a"), 20, 1, false);
    pictures(&products.join("b"), 20, 4, false);
    let (ok, text) = run(&mut train(dir.path(), &products, "line.onnx", &["--dry-run"]));
    assert!(ok && text.contains("in all"), "{text}");
    assert!(!dir.path().join("line.onnx").exists() && !dir.path().join("line.onnx.checkpoint").exists());
    let (ok, text) = run(&mut train(dir.path(), &products, "products.onnx", &["--steps", "3"]));
    assert!(ok && text.contains("2 products;"), "{text}");
    let mixed = dir.path().join("mixed");
    pictures(&mixed, 30, 1, false);
    let (ok, text) = run(&mut train(dir.path(), &mixed, "mixed.onnx", &["--steps", "3"]));
    assert!(ok && text.contains("1 product;"), "{text}");
}

#[test]
fn weights_of_something_else_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("w.pth");
    let import =
        |file: &Path| run(trainer().args(["import-backbone", "--weights"]).arg(file).arg("--out").arg(dir.path().join("out.onnx")));
    std::fs::write(&file, "<html>404</html>").unwrap();
    let (ok, text) = import(&file);
    assert!(!ok && text.contains("neither a PyTorch file"), "{text}");
    let (ok, text) = import(&dir.path().join("nowhere.pth"));
    assert!(!ok && text.contains("nowhere.pth") && text.contains("check the path"), "{text}");
    let strange = dir.path().join("strange.safetensors");
    let bytes = [0u8; 16];
    std::fs::write(
        &strange,
        safetensors::serialize([("fc.weight", TensorView::new(Dtype::F32, vec![2, 2], &bytes).unwrap())], None).unwrap(),
    )
    .unwrap();
    let (ok, text) = import(&strange);
    assert!(!ok && text.contains("fc.weight"), "{text}");
    assert!(!dir.path().join("out.onnx").exists());
}

#[test]
fn fast_fits_calibrates_on_every_picture_and_says_what_it_does_not_do() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    category(&data);
    let fast = |out: &str, more: &[&str]| {
        let mut command = trainer();
        command.current_dir(dir.path()).args(["train", "--input-px", "64", "--grid", "4", "--out", out]);
        command.arg("--data").arg(&data).arg("--backbone").arg(backbone()).args(more);
        run(&mut command)
    };
    let (ok, text) = fast("dry.onnx", &["--dry-run"]);
    assert!(ok && text.contains("in all") && !dir.path().join("dry.onnx").exists(), "{text}");
    let (ok, text) = fast("line.onnx", &["--json", "run.json"]);
    assert!(ok, "{text}");
    assert!(text.contains("36 to fit and calibrate on") && text.contains("in 1 group, of"), "{text}");
    let summary: serde_json::Value = serde_json::from_slice(&std::fs::read(dir.path().join("run.json")).unwrap()).unwrap();
    assert_eq!(summary["calibration_scores"].as_array().unwrap().len(), 36);
    cull::model::bundle::Bundle::load(&dir.path().join("line.onnx")).unwrap();
    for (more, what) in [(["--resume"].as_slice(), "--resume"), (&["--dim", "32"], "--preset uniad"), (&["--steps", "5"], "--preset uniad")]
    {
        let (ok, text) = fast("none.onnx", more);
        assert!(!ok && text.contains(what) && !dir.path().join("none.onnx").exists(), "{text}");
    }
}
