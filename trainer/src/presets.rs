//! The presets: the paper's schedule, ours, and a short UniAD for ablations.

use crate::optimiser::{OptimiserConfig, Schedule};
use crate::train::{Loss, Plan};
use crate::uniad::UniadConfig;
use cull::anomaly::ScoreRule;

/// Preset names as the command line knows them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Preset {
    /// The paper: 1000 epochs, AdamW 1e-4, x0.1 at 800, MSE on the features as they are, 16x16 pooled maximum.
    Paper,
    /// Ours: modes of normality on mean and maximum of every grid cell, fitted in one pass (see [`crate::modes`] and EXPERIMENTS.md).
    Fast,
    /// UniAD in few steps: whitened features, warm-up and cosine, StableAdamW, narrower. For ablations of the paper's components.
    Uniad,
}

/// What a preset decides besides the [`Plan`].
#[derive(Clone, Debug)]
pub struct Recipe {
    /// The run.
    pub plan: Plan,
    /// Whiten the features per channel first.
    pub whiten: bool,
    /// Divide the residual by its standard deviation over normal images, per location and channel.
    pub normalise_residual: bool,
    /// Image score.
    pub score: ScoreRule,
}

/// Epochs of the paper's schedule.
pub const PAPER_EPOCHS: usize = 1000;
/// Steps of the short UniAD schedule.
pub const UNIAD_STEPS: usize = 3000;
/// Batch of the paper (8 per GPU on 8 GPUs).
const PAPER_BATCH: usize = 64;
/// Batch of the short UniAD schedule.
const UNIAD_BATCH: usize = 16;

/// The recipe of gradient training, none for [`Preset::Fast`], which takes no gradient steps; for `images` training images with `channels` feature channels; `steps` replaces the preset's own length.
pub fn recipe(preset: Preset, channels: usize, images: usize, steps: Option<usize>, seed: u64) -> Option<Recipe> {
    Some(match preset {
        Preset::Fast => return None,
        Preset::Paper => {
            let batch = PAPER_BATCH.min(images.max(1));
            let steps = steps.unwrap_or(PAPER_EPOCHS * images.div_ceil(batch));
            Recipe {
                plan: Plan {
                    model: UniadConfig::paper(channels),
                    loss: Loss::Mse,
                    optimiser: OptimiserConfig::default(),
                    schedule: Schedule::Step { rate: 1e-4, every: (steps * 4 / 5).max(1), factor: 0.1 },
                    batch,
                    steps,
                    seed,
                    ema: 0.0,
                },
                whiten: false,
                normalise_residual: false,
                score: ScoreRule::PooledMax { window_px: 16 },
            }
        }
        Preset::Uniad => {
            let steps = steps.unwrap_or(UNIAD_STEPS);
            let mut model = UniadConfig::paper(channels);
            model.dim = 128;
            model.hidden = 512;
            Recipe {
                plan: Plan {
                    model,
                    loss: Loss::Mse,
                    optimiser: OptimiserConfig { stable: true, clip_norm: 1.0, ..OptimiserConfig::default() },
                    schedule: Schedule::WarmCosine { rate: 2e-3, last: 1e-5, warmup: (steps / 20).max(1), steps },
                    batch: UNIAD_BATCH.min(images.max(1)),
                    steps,
                    seed,
                    ema: 0.999,
                },
                whiten: true,
                normalise_residual: true,
                score: ScoreRule::PooledMax { window_px: 16 },
            }
        }
    })
}
