//! What the int8 kernels share on AVX-512 with VNNI: quantizing a row, and the inner loop, unsigned bytes in rows times signed bytes in packed columns.

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

/// `sum` plus, lane by lane, the products of two 16-bit numbers of `x` and of `w`.
///
/// Written out, because from `_mm512_dpwssd_epi32` LLVM makes a multiplication and an addition where that shortens a chain of sums: twice the
/// instructions for the two ports that a depthwise convolution waits for.
///
/// # Safety
/// AVX-512 F and VNNI must be there.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
pub(super) unsafe fn add_pairs(mut sum: __m512i, x: __m512i, w: __m512i) -> __m512i {
    // SAFETY: this function's contract; the instruction reads and writes registers only.
    unsafe {
        std::arch::asm!(
            "vpdpwssd {sum}, {x}, {w}",
            sum = inout(zmm_reg) sum,
            x = in(zmm_reg) x,
            w = in(zmm_reg) w,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sum
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

/// One row to bytes. `quantizer` takes the smallest value, the largest (zero included in both) and whether all are finite, and gives the factor to steps,
/// the size of a step and the step that is zero, 0 to 255. The last two are returned, after whether all values are finite.
///
/// # Safety
/// AVX-512 F and BW must be there (inlined into a caller that enables them); room for the row, rounded up to 16, at `to`. Zeros follow the row's last byte
/// there.
#[inline(always)]
pub(super) unsafe fn quantize(row: &[f32], to: *mut u8, quantizer: impl Fn(f32, f32, bool) -> (f32, f32, i32)) -> (bool, f32, i32) {
    /// Vectors at a time: as many chains, since an extreme has to wait four cycles for the one before.
    const AT_ONCE: usize = 4;
    let (from, whole) = (row.as_ptr(), row.len() - row.len() % LANES);
    // SAFETY: vectors end at `whole`; what follows is loaded under a mask.
    unsafe {
        let end = lanes(row.len() - whole);
        let rest = _mm512_maskz_loadu_ps(end, from.add(whole));
        let zero = _mm512_setzero_ps();
        let (mut low, mut high) = ([zero; AT_ONCE], [zero; AT_ONCE]);
        // Zero times a number is 0, times infinity or NaN it is NaN, which stays in the sum.
        let mut bad = [zero; AT_ONCE];
        (low[0], high[0], bad[0]) = (_mm512_min_ps(rest, zero), _mm512_max_ps(rest, zero), _mm512_mul_ps(rest, zero));
        let mut i = 0;
        while i < whole {
            for n in 0..AT_ONCE {
                let at = i + n * LANES;
                if at < whole {
                    let x = _mm512_loadu_ps(from.add(at));
                    low[n] = _mm512_min_ps(low[n], x);
                    high[n] = _mm512_max_ps(high[n], x);
                    bad[n] = _mm512_fmadd_ps(x, zero, bad[n]);
                }
            }
            i += AT_ONCE * LANES;
        }
        let low = _mm512_min_ps(_mm512_min_ps(low[0], low[1]), _mm512_min_ps(low[2], low[3]));
        let high = _mm512_max_ps(_mm512_max_ps(high[0], high[1]), _mm512_max_ps(high[2], high[3]));
        let bad = _mm512_add_ps(_mm512_add_ps(bad[0], bad[1]), _mm512_add_ps(bad[2], bad[3]));
        let (low, high) = extremes(low, high);
        let finite = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(bad, bad) == 0;
        let (inverse, size, zero) = quantizer(low, high, finite);
        let (factors, zeros) = (_mm512_set1_ps(inverse), _mm512_set1_epi32(zero));
        let steps = |x: __m512| _mm512_add_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(x, factors)), zeros);
        // What the packs leave in the order 0 4 8 12, 1 5 9 13, ...
        let order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
        i = 0;
        while i + 4 * LANES <= whole {
            let part = |n: usize| steps(_mm512_loadu_ps(from.add(i + n * LANES)));
            // Packing saturates to 0..=255 on the way.
            let packed = _mm512_packus_epi16(_mm512_packs_epi32(part(0), part(1)), _mm512_packs_epi32(part(2), part(3)));
            _mm512_storeu_si512(to.add(i).cast(), _mm512_permutexvar_epi32(order, packed));
            i += 4 * LANES;
        }
        let store = |at: usize, steps: __m512i| {
            _mm_storeu_si128(to.add(at).cast(), _mm512_cvtusepi32_epi8(_mm512_max_epi32(steps, _mm512_setzero_si512())));
        };
        while i < whole {
            store(i, steps(_mm512_loadu_ps(from.add(i))));
            i += LANES;
        }
        if whole < row.len() {
            store(whole, _mm512_maskz_mov_epi32(end, steps(rest)));
        }
        (finite, size, zero)
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
