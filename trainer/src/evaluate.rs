//! Image AUROC of a model on labelled features, as validation during training and for the ablation table. Final figures come from `cull eval`
//! on the finished bundle: the line's own path.

use crate::data::TestImage;
use crate::device::Chosen;
use crate::train::{FeatureSet, anomaly_maps};
use crate::uniad::{UniadConfig, Weights};
use cull::anomaly::{AnomalyMap, ScoreRule, Scorer};
use cull::eval::metrics::{Scored, image_metrics};
use std::collections::BTreeMap;

/// Batch for inference; only memory and speed depend on it.
pub const BATCH: usize = 16;

/// Scores of every sample of a set.
pub fn scores(
    config: &UniadConfig,
    weights: &Weights,
    set: &FeatureSet,
    residual_scale: &[f32],
    rule: ScoreRule,
    input_px: [usize; 2],
    chosen: &Chosen,
) -> Vec<f32> {
    let mut scorer = Scorer::new(rule, config.grid, input_px);
    anomaly_maps(config, weights, set, residual_scale, BATCH, chosen)
        .into_iter()
        .map(|values| scorer.score(&AnomalyMap { grid_rows: config.grid[0], grid_cols: config.grid[1], values }))
        .collect()
}

/// Image AUROC per category, mean over the categories, and pooled with one threshold for all; fractions.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Aurocs {
    /// Per category; only those with good and defective test images.
    pub categories: BTreeMap<String, f64>,
    /// Mean over `categories`.
    pub mean: f64,
    /// All images in one list.
    pub pooled: f64,
}

/// [`Aurocs`] of scored test images.
pub fn aurocs(test: &[&TestImage], scores: &[f32]) -> Aurocs {
    let mut by_category: BTreeMap<String, Vec<Scored>> = BTreeMap::new();
    let mut all = Vec::new();
    for (image, score) in test.iter().zip(scores) {
        let scored = Scored { score: *score, defective: image.defect.is_some() };
        by_category.entry(image.category.clone()).or_default().push(scored);
        all.push(scored);
    }
    let categories: BTreeMap<String, f64> =
        by_category.into_iter().filter_map(|(name, list)| Some((name, image_metrics(&list).auroc?))).collect();
    let mean = categories.values().sum::<f64>() / categories.len().max(1) as f64;
    Aurocs { mean, pooled: image_metrics(&all).auroc.unwrap_or(f64::NAN), categories }
}
