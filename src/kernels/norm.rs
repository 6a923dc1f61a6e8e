//! Layer normalisation over rows: `(x - mean) / sqrt(variance + epsilon) * gamma + beta`, in two passes over a row that stays in L1.

use super::isa::Isa;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use super::simd::F32s;
#[cfg(target_arch = "aarch64")]
use super::simd::arm::Neon;
#[cfg(target_arch = "x86_64")]
use super::simd::x86::{Avx2, Avx512};

/// A layer normalisation ready to run.
#[derive(Clone, Debug)]
pub struct LayerNorm {
    gamma: Vec<f32>,
    beta: Vec<f32>,
    epsilon: f32,
    isa: Isa,
}

impl LayerNorm {
    /// `gamma` and `beta` are as long as a row.
    ///
    /// # Panics
    /// When they differ in length, are empty, or the instruction set is not there.
    pub fn new(gamma: &[f32], beta: &[f32], epsilon: f32, isa: Isa) -> Self {
        assert!(!gamma.is_empty() && gamma.len() == beta.len(), "gamma and beta of a layer norm");
        assert!(isa.available(), "{} is not available here", isa.name());
        Self { gamma: gamma.to_vec(), beta: beta.to_vec(), epsilon, isa }
    }

    /// Length of a row.
    pub fn width(&self) -> usize {
        self.gamma.len()
    }

    /// `input` and `out` are `[rows, width]`. Allocates nothing.
    ///
    /// # Panics
    /// When the lengths do not fit.
    pub fn run(&self, input: &[f32], out: &mut [f32]) {
        assert_eq!(input.len(), out.len(), "output of a layer norm");
        assert_eq!(input.len() % self.width(), 0, "input of a layer norm");
        match self.isa.float() {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `new` checked that the instruction set is there, the asserts above the lengths.
            Isa::Avx512 => unsafe { avx512(self, input, out) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Isa::Avx2 => unsafe { avx2(self, input, out) },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: every aarch64 has NEON; lengths as above.
            Isa::Neon => unsafe { neon(self, input, out) },
            _ => self.run_generic(input, out),
        }
    }

    fn run_generic(&self, input: &[f32], out: &mut [f32]) {
        let width = self.width();
        for (row, line) in input.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
            let mean = row.iter().sum::<f32>() / width as f32;
            let variance = row.iter().map(|x| (x - mean) * (x - mean)).sum::<f32>() / width as f32;
            let scale = 1.0 / (variance + self.epsilon).sqrt();
            for (i, (x, y)) in row.iter().zip(line).enumerate() {
                *y = (x - mean) * scale * self.gamma[i] + self.beta[i];
            }
        }
    }
}

/// # Safety
/// AVX-512F must be there; lengths as `LayerNorm::run` checks them.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn avx512(norm: &LayerNorm, input: &[f32], out: &mut [f32]) {
    // SAFETY: this function's contract.
    unsafe { all::<Avx512>(norm, input, out) }
}

/// # Safety
/// AVX2 and FMA must be there; lengths as `LayerNorm::run` checks them.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2(norm: &LayerNorm, input: &[f32], out: &mut [f32]) {
    // SAFETY: this function's contract.
    unsafe { all::<Avx2>(norm, input, out) }
}

/// # Safety
/// Lengths as `LayerNorm::run` checks them.
#[cfg(target_arch = "aarch64")]
#[target_feature(enable = "neon")]
unsafe fn neon(norm: &LayerNorm, input: &[f32], out: &mut [f32]) {
    // SAFETY: this function's contract.
    unsafe { all::<Neon>(norm, input, out) }
}

/// # Safety
/// `V`'s instruction set must be there; lengths as `LayerNorm::run` checks them.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[inline(always)]
unsafe fn all<V: F32s>(norm: &LayerNorm, input: &[f32], out: &mut [f32]) {
    let width = norm.width();
    let whole = width - width % V::LANES;
    for (row, line) in input.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
        // SAFETY: vectors end at `whole <= width`; instruction set by this function's contract.
        unsafe {
            let mut sums = V::splat(0.0);
            let mut i = 0;
            while i < whole {
                sums = sums.add(V::load(row.as_ptr().add(i)));
                i += V::LANES;
            }
            let mean = (sums.sum() + row[whole..].iter().sum::<f32>()) / width as f32;
            let means = V::splat(mean);
            let mut squares = V::splat(0.0);
            i = 0;
            while i < whole {
                let x = V::load(row.as_ptr().add(i)).sub(means);
                squares = squares.fma(x, x);
                i += V::LANES;
            }
            let rest = row[whole..].iter().map(|x| (x - mean) * (x - mean)).sum::<f32>();
            let scale = 1.0 / ((squares.sum() + rest) / width as f32 + norm.epsilon).sqrt();
            let scales = V::splat(scale);
            i = 0;
            while i < whole {
                let x = V::load(row.as_ptr().add(i)).sub(means).mul(scales);
                V::load(norm.beta.as_ptr().add(i)).fma(x, V::load(norm.gamma.as_ptr().add(i))).store(line.as_mut_ptr().add(i));
                i += V::LANES;
            }
            for i in whole..width {
                line[i] = (row[i] - mean) * scale * norm.gamma[i] + norm.beta[i];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_width_agrees_with_the_definition(rows in 0usize..5, width in 1usize..80, values in proptest::collection::vec(-3f32..3.0, 400), shift in -50f32..50.0) {
            let input: Vec<f32> = values[..rows * width].iter().map(|x| x + shift).collect();
            let (gamma, beta) = (&values[..width], &values[values.len() - width..]);
            for isa in Isa::all_available() {
                let mut got = vec![f32::NAN; input.len()];
                LayerNorm::new(gamma, beta, 1e-5, isa).run(&input, &mut got);
                for (row, line) in input.chunks_exact(width).zip(got.chunks_exact(width)) {
                    let mean = row.iter().map(|&x| f64::from(x)).sum::<f64>() / width as f64;
                    let variance = row.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / width as f64;
                    for i in 0..width {
                        let wanted = (f64::from(row[i]) - mean) / (variance + 1e-5).sqrt() * f64::from(gamma[i]) + f64::from(beta[i]);
                        // A row of nearly equal values far from zero loses digits in any float order of summing.
                        let tolerance = 1e-3 + 1e-5 * f64::from(shift.abs()) / (variance + 1e-5).sqrt();
                        prop_assert!((f64::from(line[i]) - wanted).abs() < tolerance, "{}: {} {wanted}", isa.name(), line[i]);
                    }
                }
            }
        }
    }

    #[test]
    fn not_a_number_reaches_the_whole_row() {
        for isa in Isa::all_available() {
            let mut row = [1.0; 40];
            row[38] = f32::NAN;
            let mut out = [0.0; 40];
            LayerNorm::new(&[1.0; 40], &[0.0; 40], 1e-5, isa).run(&row, &mut out);
            assert!(out.iter().all(|x| x.is_nan()), "{}", isa.name());
        }
    }
}
