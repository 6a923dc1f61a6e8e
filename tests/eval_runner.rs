//! The evaluation over a small data set with a stand-in for the model: order, skipping, failure, JSON and report.

use cull::anomaly::AnomalyMap;
use cull::calibration::Calibration;
use cull::eval::report::{Heading, html};
use cull::eval::runner::{EvalError, InspectError, Inspector, Sample, Settings, evaluate};
use cull::eval::summary::{Context, Evaluation};
use cull::verdict::Policy;
use image::GrayImage;
use std::path::{Path, PathBuf};

/// Scores a picture by its brightest quarter: the map is the mean brightness of each quarter.
struct Brightness;

impl Inspector for Brightness {
    fn inspect(&mut self, picture: &Path, map: &mut AnomalyMap) -> Result<f32, InspectError> {
        if picture.ends_with("poison.png") {
            return Err(InspectError::Model("broken on purpose".into()));
        }
        let picture = image::open(picture).map_err(|e| InspectError::Picture(e.to_string()))?.into_luma8();
        *map = AnomalyMap { grid_rows: 2, grid_cols: 2, values: vec![0.0; 4] };
        for (x, y, pixel) in picture.enumerate_pixels() {
            let quarter = (y * 2 / picture.height() * 2 + x * 2 / picture.width()) as usize;
            map.values[quarter] += f32::from(pixel.0[0]) / 64.0;
        }
        // Threads finish out of order.
        std::thread::sleep(std::time::Duration::from_micros((map.values[0] * 1000.0) as u64 % 700));
        Ok(map.values.iter().copied().fold(0.0, f32::max))
    }
}

fn picture(path: &Path, background: u8, defect: u8) -> PathBuf {
    std::fs::create_dir_all(path.parent().expect("a folder")).expect("writable");
    let picture = GrayImage::from_fn(16, 16, |x, y| image::Luma([if x >= 8 && y >= 8 { defect } else { background }]));
    picture.save(path).expect("writable");
    path.to_owned()
}

/// Two products: "disc" with masks and two kinds of defect, one of them unmasked once; "plate" without masks. Defects are bright, except one.
fn data_set(folder: &Path) -> Vec<Sample> {
    let mut samples = Vec::new();
    for (index, category) in ["plate", "disc"].into_iter().enumerate() {
        for i in 0..12u8 {
            let path = picture(&folder.join(format!("{category}/test/good/{i:03}.png")), 40 + 2 * i + 20 * index as u8, 45 + i);
            samples.push(Sample { category: category.into(), path, defect: None, mask: None });
        }
        for i in 0..8u8 {
            let defect = if i < 6 { "spot" } else { "haze" };
            let path = picture(&folder.join(format!("{category}/test/{defect}/{i:03}.png")), 40, if i == 7 { 41 } else { 90 + 10 * i });
            let mask = (category == "disc" && i != 3)
                .then(|| picture(&folder.join(format!("{category}/ground_truth/{defect}/{i:03}_mask.png")), 0, 255));
            samples.push(Sample { category: category.into(), path, defect: Some(defect.into()), mask });
        }
    }
    samples
}

fn settings(threads: usize) -> Settings {
    let calibration = Calibration::from_scores(&(0..200).map(|i| 30.0 + 0.2 * i as f32).collect::<Vec<_>>()).expect("enough scores");
    Settings { threads, input_px: [32, 32], calibration, policy: Policy { false_reject_rate: 0.005 } }
}

fn run(samples: &[Sample], threads: usize) -> Result<Evaluation, EvalError> {
    evaluate(samples, &settings(threads), || Brightness, |_| {})
}

fn context() -> Context {
    Context {
        model: "stand-in <1>".into(),
        model_sha256: "0".repeat(64),
        data: "data".into(),
        pixel_resolution: [32, 32],
        false_reject_rate: 0.005,
        threshold: settings(1).calibration.score_at(0.005),
    }
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let samples = data_set(folder.path());
    let one = run(&samples, 1).expect("evaluates").to_json(&context()).expect("is JSON");
    for threads in [2, 7, 64] {
        let many = run(&samples, threads).expect("evaluates").to_json(&context()).expect("is JSON");
        assert_eq!(many, one, "{threads} threads");
    }
    let categories: Vec<&str> = one["images"].as_array().expect("a list").iter().filter_map(|i| i["category"].as_str()).collect();
    assert!(categories.is_sorted(), "category by category");
}

#[test]
fn json_has_the_names_that_scripts_rely_on() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let json = run(&data_set(folder.path()), 3).expect("evaluates").to_json(&context()).expect("is JSON");
    for set in [&json["categories"]["disc"], &json["mean"], &json["pooled"]] {
        for figure in ["image_auroc", "pixel_auroc", "aupro", "f1_max"] {
            let value = set[figure].as_f64().unwrap_or_else(|| panic!("{figure} is a number in {set}"));
            assert!((0.0..=1.0).contains(&value));
        }
    }
    let plate = &json["categories"]["plate"];
    for figure in ["pixel_auroc", "aupro"] {
        assert!(plate.get(figure).is_some_and(serde_json::Value::is_null), "{figure} of a product without masks is null: {plate}");
    }
    assert!(plate["image_auroc"].is_f64());
    // The mean of pixel figures is over the products that have them.
    assert_eq!(json["mean"]["pixel_auroc"], json["categories"]["disc"]["pixel_auroc"]);
    assert_eq!(json["pooled"]["pixel_auroc"], json["categories"]["disc"]["pixel_auroc"]);
    let images = json["images"].as_array().expect("a list");
    assert_eq!(images.len(), 40);
    for image in images {
        assert!(
            image["category"].is_string() && image["path"].is_string() && image["score"].is_f64() && image["p_value"].is_f64(),
            "{image}"
        );
        assert!(image["defect"].is_string() || image["defect"].is_null());
    }
    let haze = &json["categories"]["disc"]["defects"]["haze"];
    assert_eq!((haze["images"].as_u64(), haze["recall"].as_f64()), (Some(2), Some(0.5)), "one of the two is as dark as a good part");
}

#[test]
fn unreadable_pictures_are_skipped_by_name_and_unmasked_defects_counted() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let samples = data_set(folder.path());
    std::fs::write(&samples[5].path, "no picture").expect("writable");
    let evaluation = run(&samples, 2).expect("evaluates");
    assert_eq!(evaluation.images.len(), 39);
    assert_eq!(evaluation.skipped.len(), 1);
    assert_eq!(evaluation.skipped[0].path, samples[5].path.display().to_string());
    assert_eq!(evaluation.without_mask, 1);
    assert_eq!(evaluation.categories["plate"].good, 11);
}

#[test]
fn a_failing_model_ends_the_evaluation() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut samples = data_set(folder.path());
    samples[7].path = picture(&folder.path().join("poison.png"), 1, 1);
    for threads in [1, 8] {
        let error = run(&samples, threads).expect_err("the model fails").to_string();
        assert!(error.contains("poison.png") && error.contains("broken on purpose"), "{error}");
    }
}

#[test]
fn a_thread_that_ends_early_is_an_error_not_a_short_table() {
    struct Panics;
    impl Inspector for Panics {
        fn inspect(&mut self, _: &Path, _: &mut AnomalyMap) -> Result<f32, InspectError> {
            panic!("on purpose");
        }
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let result = evaluate(&data_set(folder.path()), &settings(2), || Panics, |_| {});
    assert!(matches!(result, Err(EvalError::Thread(_))), "{result:?}");
}

#[test]
fn nothing_to_evaluate_is_an_error() {
    assert!(matches!(run(&[], 2), Err(EvalError::Empty)));
    let gone = Sample { category: "a".into(), path: "/nonexistent/a.png".into(), defect: None, mask: None };
    let error = run(&[gone], 2).expect_err("no picture").to_string();
    assert!(error.contains("none of the 1 pictures"), "{error}");
}

#[test]
fn the_report_is_one_page_that_needs_nothing_else() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let evaluation = run(&data_set(folder.path()), 2).expect("evaluates");
    let (context, settings) = (context(), settings(1));
    let page = html(&evaluation, &Heading { context: &context, calibration: &settings.calibration, date: "today".into() });
    assert!(page.starts_with("<!doctype html>") && page.ends_with("</html>\n"));
    for part in [
        "stand-in &lt;1&gt;",
        "<h2>disc</h2>",
        "<h2>plate</h2>",
        "missed defects",
        "haze/007.png",
        "data:image/png;base64,",
        "data:image/jpeg;base64,",
        "<polyline",
        "pooled, one threshold",
    ] {
        assert!(page.contains(part), "expected {part:?}");
    }
    for part in ["<script", "http://", "https://", "src=\"/", "NaN"] {
        assert!(!page.contains(part), "unexpected {part:?}");
    }
    for (open, close) in [("<svg", "</svg>"), ("<table", "</table>"), ("<figure", "</figure>"), ("<div", "</div>")] {
        assert_eq!(page.matches(open).count(), page.matches(close).count(), "{open}");
    }
}
