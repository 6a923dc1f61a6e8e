//! The inner loop that the int8 kernels share on AVX-512 with VNNI: unsigned bytes in rows times signed bytes in packed columns.

use std::arch::x86_64::*;

/// Bytes of depth that one dot-product instruction takes.
pub(super) const DEPTH: usize = 4;
/// Sums in a vector.
pub(super) const LANES: usize = 16;

/// The first `n` lanes, at most all of them: what a row's last vector is loaded and stored with.
#[inline(always)]
pub(super) fn lanes(n: usize) -> __mmask16 {
    ((1u32 << n.min(LANES)) - 1) as __mmask16
}

/// The smallest lane of `low` and the largest of `high`: both at once, which takes half the shuffles.
///
/// # Safety
/// AVX-512F must be there (inlined into a caller that enables it).
#[inline(always)]
pub(super) unsafe fn extremes(low: __m512, high: __m512) -> (f32, f32) {
    // SAFETY: this function's contract.
    unsafe {
        // Lower half: the largest of -low, upper half: of high.
        let minus = _mm512_sub_ps(_mm512_setzero_ps(), low);
        let both = _mm512_max_ps(_mm512_shuffle_f32x4::<0b01_00_01_00>(minus, high), _mm512_shuffle_f32x4::<0b11_10_11_10>(minus, high));
        let both = _mm512_max_ps(both, _mm512_shuffle_f32x4::<0b10_11_00_01>(both, both));
        let both = _mm512_max_ps(both, _mm512_permute_ps::<0b01_00_11_10>(both));
        let both = _mm512_max_ps(both, _mm512_permute_ps::<0b10_11_00_01>(both));
        (0.0 - _mm512_cvtss_f32(both), _mm_cvtss_f32(_mm512_extractf32x4_ps::<2>(both)))
    }
}

/// Add to `sums`: `R` rows of unsigned bytes, `row_stride` apart, times `V` vectors of 16 columns. `steps` times: four bytes of a row against
/// `V * 64` bytes at `columns`, which then moves on by `column_stride` bytes.
///
/// # Safety
/// AVX-512 F and VNNI must be there (inlined into a caller that enables them); `steps * 4` bytes of each row and all column vectors readable.
#[inline(always)]
pub(super) unsafe fn dot<const R: usize, const V: usize>(
    sums: &mut [[__m512i; V]; R],
    rows: *const u8,
    row_stride: usize,
    mut columns: *const i8,
    column_stride: usize,
    steps: usize,
) {
    // A copy: through the reference the compiler may keep the sums in memory, which costs half the speed.
    let mut own = *sums;
    // SAFETY: this function's contract.
    unsafe {
        for step in 0..steps {
            let mut w = [_mm512_setzero_si512(); V];
            for (v, w) in w.iter_mut().enumerate() {
                *w = _mm512_loadu_si512(columns.add(v * LANES * DEPTH).cast());
            }
            for (r, sums) in own.iter_mut().enumerate() {
                let x = _mm512_set1_epi32(rows.add(r * row_stride + step * DEPTH).cast::<i32>().read_unaligned());
                for (sum, w) in sums.iter_mut().zip(w) {
                    *sum = _mm512_dpbusd_epi32(*sum, x, w);
                }
            }
            columns = columns.add(column_stride);
        }
    }
    *sums = own;
}
