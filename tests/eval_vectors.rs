//! Metrics equal scikit-learn's on the same scores, and AUPRO an independent implementation, to 1e-6 (`tests/vectors/make_vectors.py`).

use cull::eval::metrics::{PixelScores, Scored, image_metrics};
use serde::Deserialize;

const TOLERANCE: f64 = 1e-6;

#[derive(Deserialize)]
struct File<C> {
    cases: Vec<C>,
}

#[derive(Deserialize)]
struct Figures {
    auroc: f64,
    average_precision: f64,
    f1_max: f64,
    f1_threshold: f32,
}

#[derive(Deserialize)]
struct ImageCase {
    name: String,
    scores: Vec<f32>,
    defective: Vec<bool>,
    #[serde(flatten)]
    expected: Figures,
}

#[derive(Deserialize)]
struct PixelCase {
    name: String,
    height: usize,
    width: usize,
    maps: Vec<Vec<f32>>,
    masks: Vec<String>,
    regions: usize,
    aupro: f64,
    #[serde(flatten)]
    expected: Figures,
}

fn assert_close(what: &str, case: &str, ours: Option<f64>, reference: f64) {
    let ours = ours.unwrap_or_else(|| panic!("{case}: {what} is undefined, the reference says {reference}"));
    assert!((ours - reference).abs() <= TOLERANCE, "{case}: {what} is {ours}, the reference says {reference}");
}

#[test]
fn image_metrics_equal_scikit_learn() {
    let file: File<ImageCase> = serde_json::from_str(include_str!("vectors/image_metrics.json")).expect("vectors are JSON");
    assert!(file.cases.len() >= 8);
    for case in file.cases {
        let images: Vec<Scored> = case.scores.iter().zip(&case.defective).map(|(&score, &defective)| Scored { score, defective }).collect();
        let ours = image_metrics(&images);
        let best = ours.f1_max.expect("every case has a defect");
        assert_close("AUROC", &case.name, ours.auroc, case.expected.auroc);
        assert_close("average precision", &case.name, ours.average_precision, case.expected.average_precision);
        assert_close("F1-max", &case.name, Some(best.f1), case.expected.f1_max);
        assert_eq!(best.threshold, case.expected.f1_threshold, "{}: threshold of F1-max", case.name);
    }
}

#[test]
fn pixel_metrics_equal_scikit_learn_and_the_plain_aupro() {
    let file: File<PixelCase> = serde_json::from_str(include_str!("vectors/pixel_metrics.json")).expect("vectors are JSON");
    assert!(file.cases.len() >= 5);
    for case in file.cases {
        let mut pixels = PixelScores::new();
        for (map, mask) in case.maps.iter().zip(&case.masks) {
            let mask: Vec<u8> = mask.bytes().map(|b| if b == b'#' { 255 } else { 0 }).collect();
            // A picture without defects comes without a mask, as a data set has it.
            let mask = mask.contains(&255).then_some(mask);
            pixels.push(map, mask.as_deref(), case.width, case.height).expect("sizes fit");
        }
        assert_eq!(pixels.regions(), case.regions, "{}: regions", case.name);
        let ours = pixels.metrics();
        assert_close("AUROC", &case.name, ours.auroc, case.expected.auroc);
        assert_close("average precision", &case.name, ours.average_precision, case.expected.average_precision);
        assert_close("F1-max", &case.name, ours.f1_max.map(|f| f.f1), case.expected.f1_max);
        assert_close("AUPRO", &case.name, ours.aupro, case.aupro);
    }
}
