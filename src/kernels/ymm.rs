//! The inner loop that the int8 kernels share on vectors of 256 bit: unsigned steps in rows times signed weights in packed columns.
//!
//! Two instruction sets, one code: AVX-VNNI takes four bytes a sum and instruction, AVX2 alone two 16-bit numbers, exactly (its product of bytes
//! saturates), so rows and weights are twice as wide there.

use super::linear8::step;
use super::simd::x86::first_lanes;
use std::arch::x86_64::*;

/// Sums in a vector.
pub(super) const LANES: usize = 8;

/// How an instruction set sums products of steps and weights.
pub(super) trait Dot {
    /// Neighbouring inputs that one instruction sums.
    const DEPTH: usize;
    /// Bytes of a step and of a weight.
    const BYTES: usize;

    /// `sum` plus, lane by lane, the products of four bytes of `x` (steps) and of `w` (weights).
    ///
    /// # Safety
    /// The instruction set must be there (inlined into a caller that enables it).
    unsafe fn add(sum: __m256i, x: __m256i, w: __m256i) -> __m256i;

    /// `sum` plus, lane by lane, the products of two 16-bit numbers of `x` and of `w`.
    ///
    /// # Safety
    /// As [`Dot::add`].
    unsafe fn add_pairs(sum: __m256i, x: __m256i, w: __m256i) -> __m256i;
}

/// AVX2 with the VEX form of VNNI.
pub(super) enum Vnni {}

impl Dot for Vnni {
    const DEPTH: usize = 4;
    const BYTES: usize = 1;

    #[inline(always)]
    unsafe fn add(sum: __m256i, x: __m256i, w: __m256i) -> __m256i {
        // SAFETY: this function's contract.
        unsafe { _mm256_dpbusd_avx_epi32(sum, x, w) }
    }

    #[inline(always)]
    unsafe fn add_pairs(sum: __m256i, x: __m256i, w: __m256i) -> __m256i {
        // SAFETY: this function's contract.
        unsafe { add_pairs_vnni(sum, x, w) }
    }
}

/// Written out for the reason that [`super::vnni::add_pairs`] has.
///
/// # Safety
/// AVX-VNNI must be there.
#[inline]
#[target_feature(enable = "avx2,avxvnni")]
unsafe fn add_pairs_vnni(mut sum: __m256i, x: __m256i, w: __m256i) -> __m256i {
    // SAFETY: this function's contract; the instruction reads and writes registers only.
    unsafe {
        std::arch::asm!(
            "{{vex}} vpdpwssd {sum}, {x}, {w}",
            sum = inout(ymm_reg) sum,
            x = in(ymm_reg) x,
            w = in(ymm_reg) w,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sum
}

/// AVX2 alone.
pub(super) enum Plain {}

impl Dot for Plain {
    const DEPTH: usize = 2;
    const BYTES: usize = 2;

    #[inline(always)]
    unsafe fn add(sum: __m256i, x: __m256i, w: __m256i) -> __m256i {
        // SAFETY: this function's contract.
        unsafe { _mm256_add_epi32(sum, _mm256_madd_epi16(x, w)) }
    }

    #[inline(always)]
    unsafe fn add_pairs(sum: __m256i, x: __m256i, w: __m256i) -> __m256i {
        // SAFETY: this function's contract.
        unsafe { Self::add(sum, x, w) }
    }
}

/// The first `n` lanes, at most all of them, from where a row ends after `n` values; zeros in the others.
///
/// # Safety
/// AVX2 must be there (inlined into a caller that enables it); `n` values, at most [`LANES`], readable.
#[inline(always)]
pub(super) unsafe fn load(from: *const f32, n: usize) -> __m256 {
    // SAFETY: this function's contract; what lies beyond is masked off.
    unsafe { if n >= LANES { _mm256_loadu_ps(from) } else { _mm256_maskload_ps(from, first_lanes(n)) } }
}

/// The first `n` lanes, at most all of them. Whole vectors go without a mask: 6 % of a wide linear on a Zen 3.
///
/// # Safety
/// AVX2 must be there (inlined into a caller that enables it); `n` values, at most [`LANES`], writable.
#[inline(always)]
pub(super) unsafe fn store(to: *mut f32, n: usize, values: __m256) {
    // SAFETY: this function's contract; what lies beyond is masked off.
    unsafe { if n >= LANES { _mm256_storeu_ps(to, values) } else { _mm256_maskstore_ps(to, first_lanes(n), values) } }
}

/// Add to `sums`: `R` rows of steps, `row_stride` bytes apart, times two vectors of columns. `groups` times: four bytes of a row against 64 at
/// `columns`.
///
/// # Safety
/// `D`'s instruction set must be there (inlined into a caller that enables it); `groups * 4` bytes of each row and `groups * 64` of `columns`
/// readable.
#[inline(always)]
pub(super) unsafe fn dot<D: Dot, const R: usize>(
    sums: &mut [[__m256i; 2]; R],
    rows: *const u8,
    row_stride: usize,
    mut columns: *const i8,
    groups: usize,
) {
    // A copy: through the reference the compiler may keep the sums in memory.
    let mut own = *sums;
    // SAFETY: this function's contract.
    unsafe {
        for group in 0..groups {
            let (near, far) = (_mm256_loadu_si256(columns.cast()), _mm256_loadu_si256(columns.add(32).cast()));
            for (r, sums) in own.iter_mut().enumerate() {
                let x = _mm256_set1_epi32(rows.add(r * row_stride + group * 4).cast::<i32>().read_unaligned());
                sums[0] = D::add(sums[0], x, near);
                sums[1] = D::add(sums[1], x, far);
            }
            columns = columns.add(64);
        }
    }
    *sums = own;
}

/// The lanes in order.
///
/// # Safety
/// AVX2 must be there (inlined into a caller that enables it).
#[inline(always)]
pub(super) unsafe fn values(x: __m256) -> [f32; LANES] {
    let mut all = [0.0f32; LANES];
    // SAFETY: this function's contract; the array is a vector long.
    unsafe { _mm256_storeu_ps(all.as_mut_ptr(), x) }
    all
}

/// Whether no lane is NaN.
///
/// # Safety
/// As [`values`].
#[inline(always)]
pub(super) unsafe fn all_numbers(x: __m256) -> bool {
    // SAFETY: this function's contract.
    unsafe { _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_UNORD_Q>(x, x)) == 0 }
}

/// One row to steps of `D::BYTES` bytes each, zeros after it up to `padded` steps. `quantizer` takes the smallest value, the largest (zero included
/// in both) and whether all are finite, and gives the factor to steps, the size of a step and the step that is zero, 0 to 255. The last two are
/// returned, after whether all values are finite.
///
/// # Safety
/// AVX2 must be there (inlined into a caller that enables it); `to` has room for `padded` steps, which are no fewer than the row's.
#[inline(always)]
pub(super) unsafe fn quantize<D: Dot>(
    row: &[f32],
    to: *mut u8,
    padded: usize,
    quantizer: impl Fn(f32, f32, bool) -> (f32, f32, i32),
) -> (bool, f32, i32) {
    /// Vectors at a time: as many chains, since an extreme has to wait four cycles for the one before.
    const AT_ONCE: usize = 4;
    let whole = row.len() - row.len() % 16;
    // SAFETY: vectors end at `whole`, the rest is read by index; stores by this function's contract.
    unsafe {
        let none = _mm256_setzero_ps();
        let (mut low, mut high, mut bad) = ([none; AT_ONCE], [none; AT_ONCE], [none; AT_ONCE]);
        let mut i = 0;
        while i < whole {
            for n in 0..AT_ONCE {
                let at = i + n * LANES;
                if at < whole {
                    let x = _mm256_loadu_ps(row.as_ptr().add(at));
                    low[n] = _mm256_min_ps(low[n], x);
                    high[n] = _mm256_max_ps(high[n], x);
                    // 0 for a number, NaN for infinity and NaN, which stays in the sum.
                    bad[n] = _mm256_add_ps(bad[n], _mm256_sub_ps(x, x));
                }
            }
            i += AT_ONCE * LANES;
        }
        let low = _mm256_min_ps(_mm256_min_ps(low[0], low[1]), _mm256_min_ps(low[2], low[3]));
        let high = _mm256_max_ps(_mm256_max_ps(high[0], high[1]), _mm256_max_ps(high[2], high[3]));
        let bad = _mm256_add_ps(_mm256_add_ps(bad[0], bad[1]), _mm256_add_ps(bad[2], bad[3]));
        let mut least = values(low).into_iter().fold(0.0f32, f32::min);
        let mut most = values(high).into_iter().fold(0.0f32, f32::max);
        let mut finite = all_numbers(bad);
        for &x in &row[whole..] {
            least = least.min(x);
            most = most.max(x);
            finite &= x.is_finite();
        }
        let (inverse, size, zero) = quantizer(least, most, finite);
        let (factors, zeros) = (_mm256_set1_ps(inverse), _mm256_set1_epi16(zero as i16));
        i = 0;
        while i < whole {
            let near = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(row.as_ptr().add(i)), factors));
            let far = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(row.as_ptr().add(i + 8)), factors));
            // Packing works on halves of a vector: put the quarters back in order.
            let steps = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(near, far));
            let steps = _mm256_adds_epi16(steps, zeros);
            let bytes = _mm_packus_epi16(_mm256_castsi256_si128(steps), _mm256_extracti128_si256::<1>(steps));
            match D::BYTES {
                1 => _mm_storeu_si128(to.add(i).cast(), bytes),
                _ => _mm256_storeu_si256(to.add(2 * i).cast(), _mm256_cvtepu8_epi16(bytes)),
            }
            i += 16;
        }
        // Weights past the end are zero, but never multiply what an earlier layer left.
        for i in whole..padded {
            let x = row.get(i).map_or(0, |&x| step(x, inverse, zero));
            match D::BYTES {
                1 => *to.add(i) = x,
                _ => to.add(2 * i).cast::<u16>().write_unaligned(u16::from(x)),
            }
        }
        (finite, size, zero)
    }
}
