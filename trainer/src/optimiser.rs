//! AdamW and StableAdamW over the flat weight list, clipping by the global gradient norm, learning-rate schedules.
//!
//! burn's own optimisers clip per tensor, which is not what the paper (or anybody's `clip_grad_norm_`) does; so the step is written here, in
//! tensor operations that stay on the device.

use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

/// Numerical settings of a step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OptimiserConfig {
    /// First and second moment decay.
    pub betas: [f64; 2],
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Largest global gradient norm; 0 for no clipping.
    pub clip_norm: f64,
    /// StableAdamW (Wortsman et al. 2023): divide a tensor's step by max(1, RMS of g / sqrt(v)).
    pub stable: bool,
}

impl Default for OptimiserConfig {
    /// The paper's settings.
    fn default() -> Self {
        Self { betas: [0.9, 0.999], weight_decay: 1e-4, epsilon: 1e-8, clip_norm: 0.1, stable: false }
    }
}

/// Learning rate over the steps of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// `rate`, times `factor` after every `every` steps (PyTorch's StepLR; the paper: x0.1 at 80 % of the epochs).
    Step {
        /// First learning rate.
        rate: f64,
        /// Steps between drops.
        every: usize,
        /// Factor at each drop.
        factor: f64,
    },
    /// Linear warm-up to `rate`, then a half cosine down to `last`.
    WarmCosine {
        /// Highest learning rate.
        rate: f64,
        /// Learning rate at the end.
        last: f64,
        /// Steps of warm-up.
        warmup: usize,
        /// Steps in all.
        steps: usize,
    },
}

impl Schedule {
    /// Replace the highest learning rate.
    pub fn set_rate(&mut self, new: f64) {
        match self {
            Self::Step { rate, .. } | Self::WarmCosine { rate, .. } => *rate = new,
        }
    }

    /// The highest learning rate.
    pub fn top_rate(&self) -> f64 {
        match self {
            Self::Step { rate, .. } | Self::WarmCosine { rate, .. } => *rate,
        }
    }

    /// Learning rate of step `step`, counted from 0.
    pub fn rate(&self, step: usize) -> f64 {
        match *self {
            Self::Step { rate, every, factor } => rate * factor.powi((step / every.max(1)) as i32),
            Self::WarmCosine { rate, last, warmup, steps } => {
                if step < warmup {
                    return rate * (step + 1) as f64 / warmup as f64;
                }
                let done = (step - warmup) as f64 / (steps.saturating_sub(warmup)).max(1) as f64;
                last + (rate - last) * 0.5 * (1.0 + (std::f64::consts::PI * done.min(1.0)).cos())
            }
        }
    }
}

/// AdamW with its state.
#[derive(Clone)]
pub struct Optimiser {
    /// Settings.
    pub config: OptimiserConfig,
    /// Steps taken.
    pub steps: usize,
    /// First moments, in layout order; empty before the first step.
    pub moment_1: Vec<Tensor<2>>,
    /// Second moments, in layout order; empty before the first step.
    pub moment_2: Vec<Tensor<2>>,
}

impl Optimiser {
    /// A fresh optimiser.
    pub fn new(config: OptimiserConfig) -> Self {
        Self { config, steps: 0, moment_1: Vec::new(), moment_2: Vec::new() }
    }

    /// One step on plain (not autodiff) tensors; `grads` in the order of `weights`. Returns the global gradient norm before clipping, `[1]`, still on
    /// the device.
    pub fn step(&mut self, weights: &mut [Tensor<2>], mut grads: Vec<Tensor<2>>, rate: f64) -> Tensor<1> {
        let c = self.config.clone();
        let squares: Vec<Tensor<1>> = grads.iter().map(|g| g.clone().powi_scalar(2).sum()).collect();
        let norm = Tensor::cat(squares, 0).sum().sqrt();
        if c.clip_norm > 0.0 {
            // PyTorch's clip_grad_norm_: the factor is max_norm / (norm + 1e-6), at most 1.
            let factor: Tensor<2> = norm.clone().add_scalar(1e-6).recip().mul_scalar(c.clip_norm).clamp_max(1.0).reshape([1, 1]);
            for g in &mut grads {
                *g = g.clone() * factor.clone();
            }
        }
        self.steps += 1;
        if self.moment_1.is_empty() {
            self.moment_1 = grads.iter().map(Tensor::zeros_like).collect();
            self.moment_2 = grads.iter().map(Tensor::zeros_like).collect();
        }
        let [b1, b2] = c.betas;
        let correct_1 = 1.0 - b1.powi(self.steps as i32);
        let correct_2 = 1.0 - b2.powi(self.steps as i32);
        for (((w, g), m), v) in weights.iter_mut().zip(grads).zip(&mut self.moment_1).zip(&mut self.moment_2) {
            *m = m.clone().mul_scalar(b1) + g.clone().mul_scalar(1.0 - b1);
            *v = v.clone().mul_scalar(b2) + g.clone().powi_scalar(2).mul_scalar(1.0 - b2);
            let v_hat = v.clone().div_scalar(correct_2);
            let mut step = m.clone().div_scalar(correct_1) / v_hat.clone().sqrt().add_scalar(c.epsilon);
            if c.stable {
                let floor = c.epsilon * c.epsilon;
                let rms = (g.powi_scalar(2) / v_hat.clamp_min(floor)).mean().sqrt();
                step = step / rms.clamp_min(1.0).reshape([1, 1]);
            }
            *w = w.clone().mul_scalar(1.0 - rate * c.weight_decay) - step.mul_scalar(rate);
        }
        norm
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schedules_start_rise_and_fall_where_they_say() {
        let step = Schedule::Step { rate: 1.0, every: 8, factor: 0.1 };
        assert_eq!(step.rate(7), 1.0);
        assert!((step.rate(8) - 0.1).abs() < 1e-12);
        let warm = Schedule::WarmCosine { rate: 1.0, last: 0.01, warmup: 10, steps: 110 };
        assert!((warm.rate(0) - 0.1).abs() < 1e-12);
        assert!((warm.rate(9) - 1.0).abs() < 1e-12);
        assert!((warm.rate(110) - 0.01).abs() < 1e-9);
        assert!(warm.rate(60) < warm.rate(30));
    }
}
