//! One private vector trait, so that each float kernel is written once and instantiated per instruction set inside a `#[target_feature]`
//! function. Nothing here is public to the crate's other modules.
//!
//! Every method is `#[inline(always)]`: it must be inlined into a caller that has the target feature enabled, or the compiler would call an
//! intrinsic through a function. That is also the safety contract: an implementation may only be used where its instruction set was detected.

/// Where [`F32s::exp2`] ends: nothing beside a softmax's largest weight, and yet so large that its product with a value is no denormal number, for
/// which a CPU takes a hundred cycles.
const LEAST_EXPONENT: f32 = -100.0;

/// Lanes of `f32`.
///
/// # Safety
/// Implementors' methods execute the instruction set they are named after: callers must have detected it. Pointers must be valid for
/// [`F32s::LANES`] values (unaligned is fine).
pub(super) unsafe trait F32s: Copy {
    /// Lanes in a vector.
    const LANES: usize;
    /// Four neighbouring values that are multiplied with vectors one by one: see [`F32s::fma_of`].
    type Four: Copy;
    /// Whether taking one of four from a register saves its load: then loops go by fours.
    const BY_FOUR: bool;
    /// Asks for the cache line at `from` to be brought near; reads nothing, so any address is fine.
    ///
    /// # Safety
    /// See the trait.
    #[inline(always)]
    unsafe fn prefetch(_from: *const f32) {}
    /// All lanes `x`.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn splat(x: f32) -> Self;
    /// Unaligned load.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn load(from: *const f32) -> Self;
    /// Unaligned store.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn store(self, to: *mut f32);
    /// The first `n` values at `from` (more than none, at most all lanes), zeros behind them; nothing else is read.
    ///
    /// # Safety
    /// See the trait; `from` must be valid for `n` values only.
    unsafe fn load_first(from: *const f32, n: usize) -> Self;
    /// Store the first `n` lanes (more than none, at most all) and nothing else.
    ///
    /// # Safety
    /// See the trait; `to` must be valid for `n` values only.
    unsafe fn store_first(self, to: *mut f32, n: usize);
    /// `self + b`.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn add(self, b: Self) -> Self;
    /// `self - b`.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn sub(self, b: Self) -> Self;
    /// `self * b`.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn mul(self, b: Self) -> Self;
    /// `self / b`.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn div(self, b: Self) -> Self;
    /// `a * b + self`.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn fma(self, a: Self, b: Self) -> Self;
    /// The four values at `from`.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn four(from: *const f32) -> Self::Four;
    /// `four[I] * b + self`.
    ///
    /// # Safety
    /// See the trait; the values behind `four` are still there.
    unsafe fn fma_of<const I: i32>(self, four: Self::Four, b: Self) -> Self;
    /// Lane-wise larger.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn max(self, b: Self) -> Self;
    /// Lane-wise smaller.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn min(self, b: Self) -> Self;
    /// Nearest integer.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn round(self) -> Self;
    /// `2^self` for integer lanes from -126 to 127.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn exp2_of_integer(self) -> Self;
    /// `self` with its bits 23 places to the left: what [`F32s::exp2`] makes a power of two of.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn low_bits_to_exponent(self) -> Self;
    /// Sum of the lanes.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn sum(self) -> f32;
    /// Largest lane.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn largest(self) -> f32;

    /// `e^self`, relative error below 3e-7 from -87 to 88; below that it flushes to a value that is zero for a softmax.
    ///
    /// # Safety
    /// See the trait.
    #[inline(always)]
    unsafe fn exp(self) -> Self {
        // SAFETY: same contract as this method's.
        unsafe {
            let x = self.max(Self::splat(-87.0)).min(Self::splat(88.0));
            // x = n ln2 + r with |r| <= ln2 / 2; ln2 in two parts so that r keeps all its bits.
            let n = x.mul(Self::splat(std::f32::consts::LOG2_E)).round();
            let r = x.fma(n, Self::splat(-0.693_359_4)).fma(n, Self::splat(2.121_944_4e-4));
            // Minimax polynomial of (e^r - 1 - r) / r^2 (Cephes expf).
            let mut p = Self::splat(1.987_569_1e-4);
            for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
                p = Self::splat(c).fma(p, r);
            }
            let value = Self::splat(1.0).add(r).fma(p, r.mul(r));
            value.mul(n.exp2_of_integer())
        }
    }

    /// `2^self`, relative error below 3e-7 from [`LEAST_EXPONENT`] to 127, below that 2 to that power. NaN stays NaN.
    ///
    /// # Safety
    /// See the trait.
    #[inline(always)]
    unsafe fn exp2(self) -> Self {
        // Added to a number it leaves the nearest integer plus 127, the bias of an exponent, in the lowest bits of the sum.
        const ROUNDS: f32 = 12_582_912.0 + 127.0;
        // SAFETY: same contract as this method's.
        unsafe {
            // The constant comes first: x86 max returns its second operand when one is NaN.
            let x = Self::splat(LEAST_EXPONENT).max(self);
            let rounded = x.add(Self::splat(ROUNDS));
            let rest = x.sub(rounded.sub(Self::splat(ROUNDS)));
            rest.exp2_of_fraction().mul(rounded.low_bits_to_exponent())
        }
    }

    /// `2^self` from -1/2 to 1/2: minimax polynomial (Remez), relative error 7.5e-8 and the roundings of its sum.
    ///
    /// # Safety
    /// See the trait.
    #[inline(always)]
    unsafe fn exp2_of_fraction(self) -> Self {
        // SAFETY: same contract as this method's.
        unsafe {
            let mut p = Self::splat(1.327_647_2e-3);
            for c in [9.675_541e-3, 5.550_713_3e-2, 2.402_212e-1, 6.931_469_7e-1, 1.0] {
                p = Self::splat(c).fma(p, self);
            }
            p
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) mod x86 {
    use super::{F32s, LEAST_EXPONENT};
    use std::arch::x86_64::*;

    /// 16 lanes of AVX-512.
    #[derive(Clone, Copy)]
    pub(in super::super) struct Avx512(__m512);

    // SAFETY: each method is one or a few AVX-512F instructions; the caller detected them (trait contract).
    unsafe impl F32s for Avx512 {
        const LANES: usize = 16;
        type Four = *const f32;
        const BY_FOUR: bool = false;
        #[inline(always)]
        unsafe fn prefetch(from: *const f32) {
            // SAFETY: trait contract.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(from.cast()) }
        }
        #[inline(always)]
        unsafe fn splat(x: f32) -> Self {
            // SAFETY: trait contract.
            unsafe { Self(_mm512_set1_ps(x)) }
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            // SAFETY: trait contract.
            unsafe { Self(_mm512_loadu_ps(from)) }
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            // SAFETY: trait contract.
            unsafe { _mm512_storeu_ps(to, self.0) }
        }
        #[inline(always)]
        unsafe fn load_first(from: *const f32, n: usize) -> Self {
            // SAFETY: trait contract; lanes beyond `n` are masked off.
            unsafe { Self(_mm512_maskz_loadu_ps(((1u32 << n) - 1) as __mmask16, from)) }
        }
        #[inline(always)]
        unsafe fn store_first(self, to: *mut f32, n: usize) {
            // SAFETY: trait contract; lanes beyond `n` are masked off.
            unsafe { _mm512_mask_storeu_ps(to, ((1u32 << n) - 1) as __mmask16, self.0) }
        }
        #[inline(always)]
        unsafe fn add(self, b: Self) -> Self {
            // SAFETY: trait contract.
            unsafe { Self(_mm512_add_ps(self.0, b.0)) }
        }
        #[inline(always)]
        unsafe fn sub(self, b: Self) -> Self {
            // SAFETY: trait contract.
            unsafe { Self(_mm512_sub_ps(self.0, b.0)) }
        }
        #[inline(always)]
        unsafe fn mul(self, b: Self) -> Self {
            // SAFETY: trait contract.
            unsafe { Self(_mm512_mul_ps(self.0, b.0)) }
        }
        #[inline(always)]
        unsafe fn div(self, b: Self) -> Self {
            // SAFETY: trait contract.
            unsafe { Self(_mm512_div_ps(self.0, b.0)) }
        }
        #[inline(always)]
        unsafe fn fma(self, a: Self, b: Self) -> Self {
            // SAFETY: trait contract.
            unsafe { Self(_mm512_fmadd_ps(a.0, b.0, self.0)) }
        }
        #[inline(always)]
        unsafe fn four(from: *const f32) -> *const f32 {
            from
        }
        #[inline(always)]
        unsafe fn fma_of<const I: i32>(self, four: *const f32, b: Self) -> Self {
            // SAFETY: trait contract.
            unsafe { self.fma(Self::splat(*four.add(I as usize)), b) }
        }
        #[inline(always)]
        unsafe fn max(self, b: Self) -> Self {
            // SAFETY: trait contract.
            unsafe { Self(_mm512_max_ps(self.0, b.0)) }
        }
        #[inline(always)]
        unsafe fn min(self, b: Self) -> Self {
            // SAFETY: trait contract.
            unsafe { Self(_mm512_min_ps(self.0, b.0)) }
        }
        #[inline(always)]
        unsafe fn round(self) -> Self {
            // SAFETY: trait contract.
            unsafe { Self(_mm512_roundscale_ps::<8>(self.0)) }
        }
        #[inline(always)]
        unsafe fn exp2_of_integer(self) -> Self {
            // SAFETY: trait contract.
            unsafe {
                let n = _mm512_add_epi32(_mm512_cvtps_epi32(self.0), _mm512_set1_epi32(127));
                Self(_mm512_castsi512_ps(_mm512_slli_epi32::<23>(n)))
            }
        }
        #[inline(always)]
        unsafe fn low_bits_to_exponent(self) -> Self {
            // SAFETY: trait contract.
            unsafe { Self(_mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_castps_si512(self.0)))) }
        }
        #[inline(always)]
        unsafe fn exp2(self) -> Self {
            // SAFETY: trait contract.
            unsafe {
                let x = Self::splat(LEAST_EXPONENT).max(self);
                let n = x.round();
                Self(_mm512_scalef_ps(x.sub(n).exp2_of_fraction().0, n.0))
            }
        }
        #[inline(always)]
        unsafe fn sum(self) -> f32 {
            // SAFETY: trait contract.
            unsafe { _mm512_reduce_add_ps(self.0) }
        }
        #[inline(always)]
        unsafe fn largest(self) -> f32 {
            // SAFETY: trait contract.
            unsafe { _mm512_reduce_max_ps(self.0) }
        }
    }

    /// 8 lanes of AVX2 with FMA.
    #[derive(Clone, Copy)]
    pub(in super::super) struct Avx2(__m256);

    /// The first `n` lanes, as AVX2's masked loads and stores want it.
    ///
    /// # Safety
    /// AVX2 must be there.
    #[inline(always)]
    pub(in super::super) unsafe fn first_lanes(n: usize) -> __m256i {
        // SAFETY: this function's contract.
        unsafe { _mm256_cmpgt_epi32(_mm256_set1_epi32(n as i32), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)) }
    }

    // SAFETY: each method is one or a few AVX2 or FMA instructions; the caller detected them (trait contract).
    unsafe impl F32s for Avx2 {
        const LANES: usize = 8;
        type Four = *const f32;
        const BY_FOUR: bool = false;
        #[inline(always)]
        unsafe fn prefetch(from: *const f32) {
            // SAFETY: trait contract.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(from.cast()) }
        }
        #[inline(always)]
        unsafe fn splat(x: f32) -> Self {
            // SAFETY: trait contract.
            unsafe { Self(_mm256_set1_ps(x)) }
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            // SAFETY: trait contract.
            unsafe { Self(_mm256_loadu_ps(from)) }
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            // SAFETY: trait contract.
            unsafe { _mm256_storeu_ps(to, self.0) }
        }
        #[inline(always)]
        unsafe fn load_first(from: *const f32, n: usize) -> Self {
            // SAFETY: trait contract; lanes beyond `n` are masked off.
            unsafe { Self(_mm256_maskload_ps(from, first_lanes(n))) }
        }
        #[inline(always)]
        unsafe fn store_first(self, to: *mut f32, n: usize) {
            // SAFETY: trait contract; lanes beyond `n` are masked off.
            unsafe { _mm256_maskstore_ps(to, first_lanes(n), self.0) }
        }
        #[inline(always)]
        unsafe fn add(self, b: Self) -> Self {
            // SAFETY: trait contract.
            unsafe { Self(_mm256_add_ps(self.0, b.0)) }
        }
        #[inline(always)]
        unsafe fn sub(self, b: Self) -> Self {
            // SAFETY: trait contract.
            unsafe { Self(_mm256_sub_ps(self.0, b.0)) }
        }
        #[inline(always)]
        unsafe fn mul(self, b: Self) -> Self {
            // SAFETY: trait contract.
            unsafe { Self(_mm256_mul_ps(self.0, b.0)) }
        }
        #[inline(always)]
        unsafe fn div(self, b: Self) -> Self {
            // SAFETY: trait contract.
            unsafe { Self(_mm256_div_ps(self.0, b.0)) }
        }
        #[inline(always)]
        unsafe fn fma(self, a: Self, b: Self) -> Self {
            // SAFETY: trait contract.
            unsafe { Self(_mm256_fmadd_ps(a.0, b.0, self.0)) }
        }
        #[inline(always)]
        unsafe fn four(from: *const f32) -> *const f32 {
            from
        }
        #[inline(always)]
        unsafe fn fma_of<const I: i32>(self, four: *const f32, b: Self) -> Self {
            // SAFETY: trait contract.
            unsafe { self.fma(Self::splat(*four.add(I as usize)), b) }
        }
        #[inline(always)]
        unsafe fn max(self, b: Self) -> Self {
            // SAFETY: trait contract.
            unsafe { Self(_mm256_max_ps(self.0, b.0)) }
        }
        #[inline(always)]
        unsafe fn min(self, b: Self) -> Self {
            // SAFETY: trait contract.
            unsafe { Self(_mm256_min_ps(self.0, b.0)) }
        }
        #[inline(always)]
        unsafe fn round(self) -> Self {
            // SAFETY: trait contract.
            unsafe { Self(_mm256_round_ps::<8>(self.0)) }
        }
        #[inline(always)]
        unsafe fn exp2_of_integer(self) -> Self {
            // SAFETY: trait contract.
            unsafe {
                let n = _mm256_add_epi32(_mm256_cvtps_epi32(self.0), _mm256_set1_epi32(127));
                Self(_mm256_castsi256_ps(_mm256_slli_epi32::<23>(n)))
            }
        }
        #[inline(always)]
        unsafe fn low_bits_to_exponent(self) -> Self {
            // SAFETY: trait contract.
            unsafe { Self(_mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_castps_si256(self.0)))) }
        }
        #[inline(always)]
        unsafe fn sum(self) -> f32 {
            // SAFETY: trait contract.
            unsafe {
                let half = _mm_add_ps(_mm256_castps256_ps128(self.0), _mm256_extractf128_ps::<1>(self.0));
                let pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
                _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)))
            }
        }
        #[inline(always)]
        unsafe fn largest(self) -> f32 {
            // SAFETY: trait contract.
            unsafe {
                let half = _mm_max_ps(_mm256_castps256_ps128(self.0), _mm256_extractf128_ps::<1>(self.0));
                let pair = _mm_max_ps(half, _mm_movehl_ps(half, half));
                _mm_cvtss_f32(_mm_max_ss(pair, _mm_movehdup_ps(pair)))
            }
        }
    }
}

#[cfg(target_arch = "aarch64")]
pub(super) mod arm {
    use super::F32s;
    use std::arch::aarch64::*;

    /// 4 lanes of NEON.
    #[derive(Clone, Copy)]
    pub(in super::super) struct Neon(float32x4_t);

    // SAFETY: each method is one or a few NEON instructions, which every aarch64 has (trait contract).
    unsafe impl F32s for Neon {
        const LANES: usize = 4;
        type Four = float32x4_t;
        const BY_FOUR: bool = true;
        #[inline(always)]
        unsafe fn splat(x: f32) -> Self {
            // SAFETY: trait contract.
            unsafe { Self(vdupq_n_f32(x)) }
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            // SAFETY: trait contract.
            unsafe { Self(vld1q_f32(from)) }
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            // SAFETY: trait contract.
            unsafe { vst1q_f32(to, self.0) }
        }
        #[inline(always)]
        unsafe fn load_first(from: *const f32, n: usize) -> Self {
            let mut lanes = [0.0; 4];
            // SAFETY: trait contract; `n` is at most the number of lanes.
            unsafe {
                std::ptr::copy_nonoverlapping(from, lanes.as_mut_ptr(), n);
                Self::load(lanes.as_ptr())
            }
        }
        #[inline(always)]
        unsafe fn store_first(self, to: *mut f32, n: usize) {
            let mut lanes = [0.0; 4];
            // SAFETY: trait contract; `n` is at most the number of lanes.
            unsafe {
                self.store(lanes.as_mut_ptr());
                std::ptr::copy_nonoverlapping(lanes.as_ptr(), to, n);
            }
        }
        #[inline(always)]
        unsafe fn add(self, b: Self) -> Self {
            // SAFETY: trait contract.
            unsafe { Self(vaddq_f32(self.0, b.0)) }
        }
        #[inline(always)]
        unsafe fn sub(self, b: Self) -> Self {
            // SAFETY: trait contract.
            unsafe { Self(vsubq_f32(self.0, b.0)) }
        }
        #[inline(always)]
        unsafe fn mul(self, b: Self) -> Self {
            // SAFETY: trait contract.
            unsafe { Self(vmulq_f32(self.0, b.0)) }
        }
        #[inline(always)]
        unsafe fn div(self, b: Self) -> Self {
            // SAFETY: trait contract.
            unsafe { Self(vdivq_f32(self.0, b.0)) }
        }
        #[inline(always)]
        unsafe fn fma(self, a: Self, b: Self) -> Self {
            // SAFETY: trait contract.
            unsafe { Self(vfmaq_f32(self.0, a.0, b.0)) }
        }
        #[inline(always)]
        unsafe fn four(from: *const f32) -> float32x4_t {
            // SAFETY: trait contract.
            unsafe { vld1q_f32(from) }
        }
        #[inline(always)]
        unsafe fn fma_of<const I: i32>(self, four: float32x4_t, b: Self) -> Self {
            // SAFETY: trait contract.
            unsafe { Self(vfmaq_laneq_f32::<I>(self.0, b.0, four)) }
        }
        #[inline(always)]
        unsafe fn max(self, b: Self) -> Self {
            // SAFETY: trait contract.
            unsafe { Self(vmaxq_f32(self.0, b.0)) }
        }
        #[inline(always)]
        unsafe fn min(self, b: Self) -> Self {
            // SAFETY: trait contract.
            unsafe { Self(vminq_f32(self.0, b.0)) }
        }
        #[inline(always)]
        unsafe fn round(self) -> Self {
            // SAFETY: trait contract.
            unsafe { Self(vrndnq_f32(self.0)) }
        }
        #[inline(always)]
        unsafe fn exp2_of_integer(self) -> Self {
            // SAFETY: trait contract.
            unsafe {
                let n = vaddq_s32(vcvtnq_s32_f32(self.0), vdupq_n_s32(127));
                Self(vreinterpretq_f32_s32(vshlq_n_s32::<23>(n)))
            }
        }
        #[inline(always)]
        unsafe fn low_bits_to_exponent(self) -> Self {
            // SAFETY: trait contract.
            unsafe { Self(vreinterpretq_f32_s32(vshlq_n_s32::<23>(vreinterpretq_s32_f32(self.0)))) }
        }
        #[inline(always)]
        unsafe fn sum(self) -> f32 {
            // SAFETY: trait contract.
            unsafe { vaddvq_f32(self.0) }
        }
        #[inline(always)]
        unsafe fn largest(self) -> f32 {
            // SAFETY: trait contract.
            unsafe { vmaxvq_f32(self.0) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::isa::Isa;
    use super::F32s;

    /// # Safety
    /// `V`'s instruction set must be there.
    unsafe fn powers_of_two<V: F32s>() {
        let exp2 = |x: f32| {
            let mut lanes = [0.0; 16];
            // SAFETY: this function's contract; a vector has at most 16 lanes.
            unsafe { V::splat(x).exp2().store(lanes.as_mut_ptr()) };
            lanes[0]
        };
        for step in -100_000..=127_000 {
            let x = step as f32 / 1000.0;
            let wanted = f64::from(x).exp2();
            assert!((f64::from(exp2(x)) / wanted - 1.0).abs() < 3e-7, "2^{x} is {wanted}, not {}", exp2(x));
        }
        for x in [-100.5, -127.0, -1e30, f32::NEG_INFINITY] {
            assert!((0.0..=1e-30).contains(&exp2(x)), "2^{x} is nothing, not {}", exp2(x));
        }
        assert_eq!(exp2(0.0), 1.0);
        assert!(exp2(f32::NAN).is_nan());
    }

    #[test]
    fn powers_of_two_are_near() {
        for isa in Isa::all_available() {
            match isa.float() {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: the instruction set is there.
                Isa::Avx512 => unsafe { powers_of_two::<super::x86::Avx512>() },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: as above.
                Isa::Avx2 => unsafe { powers_of_two::<super::x86::Avx2>() },
                #[cfg(target_arch = "aarch64")]
                // SAFETY: every aarch64 has NEON.
                Isa::Neon => unsafe { powers_of_two::<super::arm::Neon>() },
                _ => {}
            }
        }
    }
}
