//! Smooth activations over slices: sigmoid, and SiLU (`x * sigmoid(x)`), which EfficientNet and its squeeze-excite use.

use super::isa::Isa;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use super::simd::F32s;
#[cfg(target_arch = "aarch64")]
use super::simd::arm::Neon;
#[cfg(target_arch = "x86_64")]
use super::simd::x86::{Avx2, Avx512};

/// Which function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Smooth {
    /// `1 / (1 + e^-x)`.
    Sigmoid,
    /// `x / (1 + e^-x)`.
    Silu,
}

impl Smooth {
    /// On one value. NaN stays NaN.
    pub fn apply(self, x: f32) -> f32 {
        let numerator = match self {
            Self::Sigmoid => 1.0,
            Self::Silu => x,
        };
        numerator / (1.0 + (-x).exp())
    }

    /// On each value, relative error below 1e-6. NaN stays NaN, infinities become NaN: a broken value must reach the verdict as a fault.
    ///
    /// # Panics
    /// When the lengths differ or the instruction set is not there.
    pub fn run(self, input: &[f32], out: &mut [f32], isa: Isa) {
        assert_eq!(input.len(), out.len(), "output of an activation");
        assert!(isa.available(), "{} is not available here", isa.name());
        match isa.float() {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the asserts above.
            Isa::Avx512 => unsafe { avx512(self, input, out) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Isa::Avx2 => unsafe { avx2(self, input, out) },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: every aarch64 has NEON; lengths as above.
            Isa::Neon => unsafe { neon(self, input, out) },
            _ => self.rest(input, out),
        }
    }

    // `x - x` is zero for every number and NaN for infinities and NaN: what is not finite stays visible in the result.
    #[allow(clippy::eq_op)]
    fn rest(self, input: &[f32], out: &mut [f32]) {
        for (y, &x) in out.iter_mut().zip(input) {
            *y = self.apply(x) + (x - x);
        }
    }
}

/// # Safety
/// AVX-512F must be there; the slices are equally long.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn avx512(kind: Smooth, input: &[f32], out: &mut [f32]) {
    // SAFETY: this function's contract.
    unsafe { all::<Avx512>(kind, input, out) }
}

/// # Safety
/// AVX2 and FMA must be there; the slices are equally long.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2(kind: Smooth, input: &[f32], out: &mut [f32]) {
    // SAFETY: this function's contract.
    unsafe { all::<Avx2>(kind, input, out) }
}

/// # Safety
/// The slices are equally long.
#[cfg(target_arch = "aarch64")]
#[target_feature(enable = "neon")]
unsafe fn neon(kind: Smooth, input: &[f32], out: &mut [f32]) {
    // SAFETY: this function's contract.
    unsafe { all::<Neon>(kind, input, out) }
}

/// # Safety
/// `V`'s instruction set must be there; the slices are equally long.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[inline(always)]
unsafe fn all<V: F32s>(kind: Smooth, input: &[f32], out: &mut [f32]) {
    let whole = input.len() - input.len() % V::LANES;
    let mut i = 0;
    while i < whole {
        // SAFETY: vectors end at `whole`; instruction set by this function's contract.
        unsafe {
            let x = V::load(input.as_ptr().add(i));
            let below = V::splat(1.0).add(V::splat(0.0).sub(x).exp());
            let above = match kind {
                Smooth::Sigmoid => V::splat(1.0),
                Smooth::Silu => x,
            };
            // `exp` clamps, which would hide a NaN: x - x is 0 for a number and NaN for NaN or infinity.
            above.div(below).add(x.sub(x)).store(out.as_mut_ptr().add(i));
        }
        i += V::LANES;
    }
    kind.rest(&input[whole..], &mut out[whole..]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_values_agree_with_the_definition(values in proptest::collection::vec(-60f32..60.0, 0..70)) {
            for isa in Isa::all_available() {
                for kind in [Smooth::Sigmoid, Smooth::Silu] {
                    let mut out = vec![f32::NAN; values.len()];
                    kind.run(&values, &mut out, isa);
                    for (&x, &y) in values.iter().zip(&out) {
                        let x = f64::from(x);
                        let wanted = if kind == Smooth::Silu { x } else { 1.0 } / (1.0 + (-x).exp());
                        prop_assert!((f64::from(y) - wanted).abs() <= 1e-6 * wanted.abs() + 1e-30, "{} {kind:?} {x}: {y} {wanted}", isa.name());
                    }
                }
            }
        }
    }

    #[test]
    fn not_a_number_stays() {
        for isa in Isa::all_available() {
            for kind in [Smooth::Sigmoid, Smooth::Silu] {
                for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                    let mut out = [0.0; 40];
                    kind.run(&[bad; 40], &mut out, isa);
                    assert!(out.iter().all(|x| x.is_nan()), "{} {kind:?} {bad}", isa.name());
                }
            }
        }
    }
}
