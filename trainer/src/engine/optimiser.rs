//! [`crate::optimiser`]'s step on plain memory: one pass over each weight.

use super::model::Parameter;
use crate::optimiser::OptimiserConfig;
use cull::kernels::isa::Isa;
use cull::kernels::vectorise::vectorise;

/// Values whose squares are summed in single precision.
const RUN: usize = 4096;
/// Parts of such a sum.
const LANES: usize = 32;

/// Sum of squares.
pub fn square(isa: Isa, values: &[f32]) -> f64 {
    vectorise(
        isa,
        #[inline(always)]
        || values.chunks(RUN).map(|run| f64::from(run_square(run))).sum(),
    )
}

#[inline(always)]
fn run_square(run: &[f32]) -> f32 {
    let mut lanes = [0f32; LANES];
    let (whole, rest) = run.as_chunks::<LANES>();
    for values in whole {
        for (lane, x) in lanes.iter_mut().zip(values) {
            *lane += x * x;
        }
    }
    lanes.iter().sum::<f32>() + rest.iter().map(|x| x * x).sum::<f32>()
}

/// Numbers of one step, the same for all weights.
#[derive(Clone, Copy, Debug)]
pub struct Rates {
    /// What clipping leaves of the gradient.
    clip: f32,
    betas: [f32; 2],
    rest: [f32; 2],
    /// One minus the decays to the power of the steps.
    correct: [f32; 2],
    epsilon: f32,
    decay: f32,
    rate: f32,
    stable: bool,
    /// Share of the old average that stays, if there is one.
    keep: f32,
    forget: f32,
}

impl Rates {
    /// Numbers of step `steps` (the first is 1) at learning rate `rate` with gradient norm `norm`; `keep` is what stays of the moving average.
    pub fn new(c: &OptimiserConfig, steps: usize, rate: f64, norm: f32, keep: f64) -> Self {
        let [b1, b2] = c.betas;
        Self {
            clip: if c.clip_norm > 0.0 { (c.clip_norm as f32 / (norm + 1e-6)).min(1.0) } else { 1.0 },
            betas: [b1 as f32, b2 as f32],
            rest: [(1.0 - b1) as f32, (1.0 - b2) as f32],
            correct: [(1.0 - b1.powi(steps as i32)) as f32, (1.0 - b2.powi(steps as i32)) as f32],
            epsilon: c.epsilon as f32,
            decay: (1.0 - rate * c.weight_decay) as f32,
            rate: rate as f32,
            stable: c.stable,
            keep: keep as f32,
            forget: (1.0 - keep) as f32,
        }
    }
}

/// Moments, weight and average of one parameter move by its gradient.
pub fn update(isa: Isa, p: &mut Parameter, r: Rates) {
    vectorise(
        isa,
        #[inline(always)]
        || {
            // Stable: the step is divided by the root mean square of gradient over deviation, which takes a pass of its own.
            let rate = if r.stable { r.rate / divisor(p, r).max(1.0) } else { r.rate };
            let values = p.value.iter_mut().zip(&p.gradient).zip(&mut p.moment_1).zip(&mut p.moment_2);
            for (((w, g), m), v) in values {
                let g = g * r.clip;
                *m = *m * r.betas[0] + g * r.rest[0];
                *v = *v * r.betas[1] + g * g * r.rest[1];
                let step = *m / r.correct[0] / ((*v / r.correct[1]).sqrt() + r.epsilon);
                *w = *w * r.decay - step * rate;
            }
            for (e, w) in p.average.iter_mut().zip(&p.value) {
                *e = *e * r.keep + *w * r.forget;
            }
        },
    );
}

/// Root of the mean of g^2 / v as it will be.
#[inline(always)]
fn divisor(p: &Parameter, r: Rates) -> f32 {
    let floor = r.epsilon * r.epsilon;
    let mut total = 0f64;
    for (gs, vs) in p.gradient.chunks(RUN).zip(p.moment_2.chunks(RUN)) {
        let mut lanes = [0f32; LANES];
        let ((gs, g_rest), (vs, v_rest)) = (gs.as_chunks::<LANES>(), vs.as_chunks::<LANES>());
        let share = |g: f32, v: f32| {
            let square = g * r.clip * (g * r.clip);
            let hat = (v * r.betas[1] + square * r.rest[1]) / r.correct[1];
            square / if hat > floor { hat } else { floor }
        };
        for (gs, vs) in gs.iter().zip(vs) {
            for ((lane, g), v) in lanes.iter_mut().zip(gs).zip(vs) {
                *lane += share(*g, *v);
            }
        }
        let rest: f32 = g_rest.iter().zip(v_rest).map(|(g, v)| share(*g, *v)).sum();
        total += f64::from(lanes.iter().sum::<f32>() + rest);
    }
    (total / p.gradient.len().max(1) as f64).sqrt() as f32
}
