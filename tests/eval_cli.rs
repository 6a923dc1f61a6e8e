//! `cull eval` and `cull doctor` with the shipped model: the figures for scripts, the table and the report.

use cull::source::simulated::{DefectRange, HEIGHT_PX, SimulatedLine, WIDTH_PX};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn cull(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_cull")).args(args).env("CULL_LOG", "off").output().expect("the binary runs")
}

/// The shipped model, or `None` (said loudly) where it has not been made yet.
fn shipped_model() -> Option<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/default.onnx");
    if !path.is_file() {
        eprintln!("SKIPPED: there is no {}", path.display());
        return None;
    }
    Some(path.display().to_string())
}

/// `parts` parts of the simulated line in MVTec-AD layout; the product "cap" comes without masks.
fn data_set(folder: &Path, parts: u32) -> usize {
    let mut line = SimulatedLine::with_defects(77, 0.5, DefectRange { size_px: [30.0, 60.0], contrast: [0.7, 1.0] });
    let mut pixels = Vec::new();
    for part in 0..parts {
        let truth = line.render(part, &mut pixels);
        let defect = truth.defect.as_ref().map_or("good".to_owned(), |d| d.name.to_string());
        let category = folder.join(truth.product.as_ref());
        let save = |path: PathBuf, bytes: Vec<u8>, color| {
            std::fs::create_dir_all(path.parent().expect("a folder")).expect("writable");
            image::save_buffer(&path, &bytes, WIDTH_PX, HEIGHT_PX, color).expect("writable");
        };
        if truth.defect.is_some() && !truth.product.contains("cap") {
            save(category.join(format!("ground_truth/{defect}/{part:03}_mask.png")), truth.mask.to_vec(), image::ExtendedColorType::L8);
        }
        save(category.join(format!("test/{defect}/{part:03}.png")), pixels.clone(), image::ExtendedColorType::Rgb8);
        // A scan wants training pictures to be there, if only one.
        save(category.join("train/good/000.png"), pixels.clone(), image::ExtendedColorType::Rgb8);
    }
    parts as usize
}

#[test]
fn evaluation_prints_a_table_and_writes_figures_and_report() {
    let Some(model) = shipped_model() else { return };
    let folder = tempfile::tempdir().expect("a temporary folder");
    let data = folder.path().join("data");
    let count = data_set(&data, 48);
    let (json_file, report_file) = (folder.path().join("out.json"), folder.path().join("out.html"));
    let path = |p: &Path| p.display().to_string();
    let args = ["eval", "--model", &model, "--data", &path(&data), "--json", &path(&json_file), "--report", &path(&report_file)];
    let output = cull(&args);
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for part in ["image AUROC", "pixel AUROC", "AUPRO", "F1-max", "mean", "pooled"] {
        assert!(stdout.contains(part), "expected {part:?} in\n{stdout}");
    }
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(&json_file).expect("written")).expect("JSON");
    assert_eq!(json["images"].as_array().map(Vec::len), Some(count));
    let auroc = json["pooled"]["image_auroc"].as_f64().expect("both kinds are there");
    assert!(auroc > 0.7, "clear defects are told apart, pooled image AUROC is {auroc}");
    let without_masks: Vec<&serde_json::Value> =
        json["categories"].as_object().expect("by name").iter().filter(|(name, _)| name.contains("cap")).map(|(_, v)| v).collect();
    assert!(!without_masks.is_empty() && without_masks.iter().all(|c| c["pixel_auroc"].is_null() && c["aupro"].is_null()));
    let page = std::fs::read_to_string(&report_file).expect("written");
    assert!(page.contains("<svg") && page.ends_with("</html>\n"));

    // The same figures whatever the threads; a limit keeps the asked number of each product.
    let full = json;
    let limited = |threads: &str| {
        cull(&["eval", "--model", &model, "--data", &path(&data), "--limit", "3", "--threads", threads, "--json", "-"]).stdout
    };
    let (one, many) = (limited("1"), limited("5"));
    assert_eq!(one, many);
    let json: serde_json::Value = serde_json::from_slice(&one).expect("JSON alone on stdout");
    let of_product = |json: &serde_json::Value, name: &str| {
        json["images"].as_array().map_or(0, |all| all.iter().filter(|i| i["category"] == name).count())
    };
    for name in json["categories"].as_object().expect("by name").keys() {
        assert_eq!(of_product(&json, name), of_product(&full, name).min(3), "{name}");
    }
}

#[test]
fn evaluation_says_what_is_wrong() {
    let Some(model) = shipped_model() else { return };
    let folder = tempfile::tempdir().expect("a temporary folder");
    let data = folder.path().display().to_string();
    let error = |args: &[&str]| {
        let output = cull(args);
        assert!(!output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let empty = error(&["eval", "--model", &model, "--data", &data]);
    assert!(empty.contains(&data), "the folder is named: {empty}");
    data_set(&folder.path().join("set"), 2);
    let set = folder.path().join("set").display().to_string();
    let model_missing = error(&["eval", "--model", "/nonexistent.onnx", "--data", &set]);
    assert!(model_missing.contains("/nonexistent.onnx"), "{model_missing}");
    let no_folder = error(&["eval", "--model", &model, "--data", &set, "--json", "/nonexistent/out.json"]);
    assert!(no_folder.contains("no folder /nonexistent"), "{no_folder}");
    let rate = error(&["eval", "--model", &model, "--data", &set, "--false-reject-rate", "0.6"]);
    assert!(rate.contains("above 0 and up to 0.5"), "{rate}");
}

#[test]
fn the_doctor_tells_simulated_parts_apart() {
    let Some(model) = shipped_model() else { return };
    let output = cull(&["doctor", "--model", &model, "--json"]);
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
    let findings = json["findings"].as_array().expect("a list");
    let test = findings.iter().find(|f| f["section"] == "self-test").unwrap_or_else(|| panic!("no self-test in {json}"));
    let what = test["what"].as_str().expect("a sentence");
    // The shipped bundle was trained on these parts, so it is judged by them.
    assert!(what.contains("ms a part") && what.contains("simulated parts: "), "{test}");
    assert_eq!(test["level"], "ok", "{test}");
    assert!(json["model"]["parameters"].as_u64().is_some_and(|p| p > 0));
}

/// Good pictures are rejected as often as asked by a bundle that was calibrated on them, and the model's own file may be replaced.
#[test]
fn calibration_sets_the_threshold_by_the_good_pictures_alone() {
    let Some(model) = shipped_model() else { return };
    let folder = tempfile::tempdir().expect("a temporary folder");
    let data = folder.path().join("data");
    data_set(&data, 40);
    let own = folder.path().join("own.onnx");
    std::fs::copy(&model, &own).expect("writable");
    std::fs::write(data.join("blister_pack/test/good/broken.png"), "no picture").expect("writable");
    let path = |p: &Path| p.display().to_string();
    let args = ["calibrate", "--model", &path(&own), "--data", &path(&data), "--out", &path(&own)];
    let output = cull(&args);
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout).into_owned(), String::from_utf8_lossy(&output.stderr).into_owned());
    assert!(output.status.success(), "{stderr}");
    assert!(stderr.contains("skipped") && stderr.contains("broken.png"), "{stderr}");
    assert!(stdout.contains("threshold was") && stdout.contains("next: cull eval"), "{stdout}");
    let scores = |args: &[&str]| -> serde_json::Value {
        let output = cull(args);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).expect("JSON")
    };
    let described = |file: &str| scores(&["model", "describe", file, "--json"]);
    let (before, after) = (described(&model), described(&path(&own)));
    let normal = |v: &serde_json::Value| v["meta"]["calibration"]["normal_scores"].as_array().cloned().unwrap_or_default();
    assert_ne!(normal(&before), normal(&after));
    assert_eq!(before["meta"]["preprocess"], after["meta"]["preprocess"]);
    // The scores are those of `cull eval` on the same good pictures, and those of the one training picture a product.
    let evaluated = scores(&["eval", "--model", &model, "--data", &path(&data), "--json", "-"]);
    let good: Vec<f64> = evaluated["images"]
        .as_array()
        .expect("a list")
        .iter()
        .filter(|i| i["defect"].is_null())
        .filter_map(|i| i["score"].as_f64())
        .collect();
    let kept: Vec<f64> = normal(&after).iter().filter_map(serde_json::Value::as_f64).collect();
    let products = evaluated["categories"].as_object().map_or(0, serde_json::Map::len);
    assert_eq!(kept.len(), good.len() + products);
    for score in good {
        assert!(kept.iter().any(|k| (k - score).abs() < 1e-5 * score.abs().max(1.0)), "{score} is missing in {kept:?}");
    }
}

#[test]
fn a_calibration_without_good_pictures_changes_nothing() {
    let Some(model) = shipped_model() else { return };
    let folder = tempfile::tempdir().expect("a temporary folder");
    let out = folder.path().join("out.onnx");
    let only_bad = folder.path().join("data/cap/test/scratch");
    std::fs::create_dir_all(&only_bad).expect("writable");
    std::fs::write(only_bad.join("0.png"), "x").expect("writable");
    let (data, out_text) = (folder.path().join("data").display().to_string(), out.display().to_string());
    let output = cull(&["calibrate", "--model", &model, "--data", &data, "--out", &out_text]);
    assert!(!output.status.success() && !out.exists());
    assert!(String::from_utf8_lossy(&output.stderr).contains("no picture of a good part"));
}
