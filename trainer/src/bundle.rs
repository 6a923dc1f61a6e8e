//! From trained weights to the file that `cull` runs: graph, calibration through the line's own path, metadata, digest.

use crate::checkpoint::write_whole;
use crate::modes::Modes;
use crate::onnx::{Graph, Normalisation, OnnxError, append_modes, append_uniad};
use crate::uniad::{UniadConfig, Weights};
use cull::anomaly::{AnomalyMap, ScoreRule, Scorer};
use cull::calibration::Calibration;
use cull::frame::Frame;
use cull::model::bundle::{Bundle, BundleMeta, FORMAT};
use cull::model::runtime::FeatureModel;
use cull::preprocess::{PreprocessSpec, Preprocessor};
use cull::snapshot::utc;
use std::path::{Path, PathBuf};

/// Why a bundle cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// Graph.
    #[error(transparent)]
    Onnx(#[from] OnnxError),
    /// The finished graph does not run.
    #[error("the finished model does not run: {0}")]
    Run(String),
    /// Calibration.
    #[error("calibration: {0}")]
    Calibration(String),
    /// File.
    #[error("bundle {path}: {why}")]
    File {
        /// File.
        path: String,
        /// Cause, and what to do.
        why: String,
    },
}

/// What goes into a bundle besides weights.
pub struct BundleParts<'a> {
    /// Name in the metadata.
    pub name: String,
    /// Preprocessing.
    pub spec: &'a PreprocessSpec,
    /// Feature graph and its last tensor.
    pub features: (Graph, &'a str),
    /// Whitening and residual scale.
    pub normalisation: &'a Normalisation,
    /// Image score.
    pub score: ScoreRule,
    /// Products seen in training.
    pub trained_on: Vec<String>,
    /// Free text: settings, seed, figures.
    pub notes: String,
}

/// Write the bundle. The calibration scores are those of `held_out`, computed by preprocess, tract and score as on the line. Returns the scores.
///
/// # Errors
/// When the graph cannot be built or run, too few held-out images remain, or the file cannot be written; an old file stays as it was.
pub fn write(
    path: &Path,
    parts: BundleParts<'_>,
    config: &UniadConfig,
    weights: &Weights,
    held_out: &[PathBuf],
    on_image: &mut dyn FnMut(),
) -> Result<Vec<f32>, WriteError> {
    let (graph, joined) = parts.features;
    let onnx = append_uniad(graph, joined, config, &weights.to_published(), parts.normalisation)?;
    let parts = GraphParts {
        name: parts.name,
        spec: parts.spec,
        grid: config.grid,
        score: parts.score,
        trained_on: parts.trained_on,
        notes: parts.notes,
    };
    // Images that cannot be read were named during feature extraction.
    let mut frames = held_out.iter().inspect(|_| on_image()).filter_map(|path| cull::dataset::load_frame(path).ok());
    write_graph(path, &onnx, parts, &mut frames)
}

/// What goes into a bundle besides its finished graph.
pub struct GraphParts<'a> {
    /// Name in the metadata.
    pub name: String,
    /// Preprocessing.
    pub spec: &'a PreprocessSpec,
    /// Rows and columns of the map.
    pub grid: [usize; 2],
    /// Image score.
    pub score: ScoreRule,
    /// Products seen in training.
    pub trained_on: Vec<String>,
    /// Free text: settings, seed, figures.
    pub notes: String,
}

/// Write a bundle from a finished graph (`input` -> `anomaly_map`). The calibration scores are those of `frames`, good parts never trained on, computed by
/// preprocess, tract and score as on the line. Returns the scores.
///
/// # Errors
/// When the graph does not run, too few frames can be scored, or the file cannot be written; an old file stays as it was.
pub fn write_graph(
    path: &Path,
    onnx: &[u8],
    parts: GraphParts<'_>,
    frames: &mut dyn Iterator<Item = Frame>,
) -> Result<Vec<f32>, WriteError> {
    let file = |why: String| WriteError::File { path: path.display().to_string(), why };
    let mut raw = path.as_os_str().to_owned();
    raw.push(".graph.part");
    let raw = PathBuf::from(raw);
    write_whole(&raw, onnx).map_err(|e| file(format!("cannot be written ({e})")))?;
    let scores = scores_on_the_line(&raw, parts.spec, parts.grid, parts.score, frames);
    // The raw graph was only needed to compute the scores.
    let _ = std::fs::remove_file(&raw);
    let scores = scores?;
    let calibration = Calibration::from_scores(&scores).map_err(|e| WriteError::Calibration(e.to_string()))?;
    pack(path, onnx, parts, calibration)?;
    Ok(scores)
}

/// Join graph and metadata and put the bundle in its place.
fn pack(path: &Path, onnx: &[u8], parts: GraphParts<'_>, calibration: Calibration) -> Result<(), WriteError> {
    let meta = BundleMeta {
        format: FORMAT,
        name: parts.name,
        created: now(),
        preprocess: parts.spec.clone(),
        grid: parts.grid,
        score: parts.score,
        calibration,
        trained_on: parts.trained_on,
        notes: parts.notes,
        // The digest is set by `pack`.
        sha256: String::new(),
    };
    let bytes = Bundle::pack(onnx, meta).map_err(|e| WriteError::Run(e.to_string()))?;
    write_whole(path, &bytes).map_err(|e| WriteError::File {
        path: path.display().to_string(),
        why: format!("cannot be written ({e}); free some space or choose another --out"),
    })
}

/// What goes into a bundle of modes.
pub struct ModesParts<'a> {
    /// Name in the metadata.
    pub name: String,
    /// Preprocessing.
    pub spec: &'a PreprocessSpec,
    /// Feature grid, `[rows, columns]`.
    pub grid: [usize; 2],
    /// Feature graph and its last tensor.
    pub features: (Graph, &'a str),
    /// The fit.
    pub modes: &'a Modes,
    /// Image score.
    pub score: ScoreRule,
    /// Cross-fitted scores of the normal pictures: the calibration.
    pub scores: &'a [f32],
    /// Products seen in training.
    pub trained_on: Vec<String>,
    /// Free text: settings, seed, figures.
    pub notes: String,
}

/// A value of the finished bundle's map may differ from the fit's own by this share of the way from a usual part's score to the threshold: a verdict
/// near the threshold may move by it, and no other. The fit sees features rounded to f16, and whitening amplifies what hardly varies: below 0.05 % with
/// real pictures (25 and 80 of them), 8 % with 36 smooth made-up ones; with a pixel mean of 110 instead of 127 it is 82 %, with another backbone far beyond.
pub const MAP_TOLERANCE: f32 = 0.25;
/// The threshold that way leads to: that of this false-reject rate, or of the lowest one that the scores measure.
const TOLERANCE_RATE: f32 = 0.005;

/// Write a bundle of modes. `pictures` are run through preprocess and the finished graph as on the line; their maps must be `maps`, so that the calibration,
/// which comes from the fit, holds for the line. Returns how far the maps differ at most, as a share of the way from a usual score to the threshold.
///
/// # Errors
/// When the graph cannot be built or run, gives other maps, or the file cannot be written; an old file stays as it was.
pub fn write_modes(path: &Path, parts: ModesParts<'_>, pictures: &[PathBuf], maps: &[Vec<f32>]) -> Result<f32, WriteError> {
    let (graph, joined) = parts.features;
    let calibration = Calibration::from_scores(parts.scores).map_err(|e| WriteError::Calibration(e.to_string()))?;
    let onnx = append_modes(graph, joined, parts.modes, parts.grid)?;
    let file = |why: String| WriteError::File { path: path.display().to_string(), why };
    let mut raw = path.as_os_str().to_owned();
    raw.push(".graph.part");
    let raw = PathBuf::from(raw);
    write_whole(&raw, &onnx).map_err(|e| file(format!("cannot be written ({e})")))?;
    let lowest = lowest_measured_rate(parts.scores.len()) as f32;
    let way = calibration.score_at(TOLERANCE_RATE.max(lowest)) - calibration.score_at(0.5);
    let checked = same_maps(&raw, parts.spec, pictures, maps, way);
    // The raw graph was only needed for the check.
    let _ = std::fs::remove_file(&raw);
    let worst = checked?;
    let parts = GraphParts {
        name: parts.name,
        spec: parts.spec,
        grid: parts.grid,
        score: parts.score,
        trained_on: parts.trained_on,
        notes: parts.notes,
    };
    pack(path, &onnx, parts, calibration)?;
    Ok(worst)
}

/// Whether the graph gives these maps of these pictures; the largest difference as a share of `way`.
fn same_maps(raw: &Path, spec: &PreprocessSpec, pictures: &[PathBuf], maps: &[Vec<f32>], way: f32) -> Result<f32, WriteError> {
    let shape = [3, spec.height_px as usize, spec.width_px as usize];
    let mut model = FeatureModel::load(raw, shape).map_err(|e| WriteError::Run(e.to_string()))?;
    let mut preprocessor = Preprocessor::new(spec, None);
    let mut input = vec![0.0; shape.iter().product()];
    let mut worst_of_all = 0.0f32;
    for (path, expected) in pictures.iter().zip(maps) {
        let run = |e: &dyn std::fmt::Display| WriteError::Run(format!("{}: {e}", path.display()));
        let frame = cull::dataset::load_frame(path).map_err(|e| run(&e))?;
        preprocessor.run(&frame, &mut input).map_err(|e| run(&e))?;
        let outputs = model.run(&input).map_err(|e| run(&e))?;
        let found = outputs.first().map(|o| o.values.as_slice()).unwrap_or_default();
        let worst = found.iter().zip(expected).fold(0.0f32, |m, (a, b)| m.max((a - b).abs())) / way.max(f32::MIN_POSITIVE);
        // A NaN is not close to anything.
        let close = worst <= MAP_TOLERANCE;
        if found.len() != expected.len() || !found.iter().all(|v| v.is_finite()) || !close {
            return Err(run(&format!(
                "its map differs from the fitted one by {:.0} % of the way from a usual part to the threshold ({:.0} % allowed): the features are not those of \
                 this backbone and preprocessing; delete the feature cache and train again",
                worst * 100.0,
                MAP_TOLERANCE * 100.0
            )));
        }
        worst_of_all = worst_of_all.max(worst);
    }
    Ok(worst_of_all)
}

/// The lowest false-reject rate that `held_out` scores measure: the highest of them is exceeded by one normal part in `held_out + 1` (a fraction, 0 to 1).
/// What lies below is the extrapolation of [`Calibration`].
pub fn lowest_measured_rate(held_out: usize) -> f64 {
    1.0 / (held_out + 1) as f64
}

fn scores_on_the_line(
    raw: &Path,
    spec: &PreprocessSpec,
    grid: [usize; 2],
    rule: ScoreRule,
    frames: &mut dyn Iterator<Item = Frame>,
) -> Result<Vec<f32>, WriteError> {
    let shape = [3, spec.height_px as usize, spec.width_px as usize];
    let mut model = FeatureModel::load(raw, shape).map_err(|e| WriteError::Run(e.to_string()))?;
    let mut preprocessor = Preprocessor::new(spec, None);
    let mut scorer = Scorer::new(rule, grid, [shape[1], shape[2]]);
    let mut input = vec![0.0; shape.iter().product()];
    let mut scores = Vec::new();
    for frame in frames {
        if preprocessor.run(&frame, &mut input).is_err() {
            continue;
        }
        let outputs = model.run(&input).map_err(|e| WriteError::Run(e.to_string()))?;
        let values = outputs.into_iter().next().map(|o| o.values).unwrap_or_default();
        if values.len() != grid[0] * grid[1] {
            return Err(WriteError::Run(format!("the map has {} values, expected {}", values.len(), grid[0] * grid[1])));
        }
        scores.push(scorer.score(&AnomalyMap { grid_rows: grid[0], grid_cols: grid[1], values }));
    }
    Ok(scores)
}

/// The time as it stands in bundles.
fn now() -> String {
    utc::extended(utc::unix_ms_of(cull::frame::now_ns()))
}
