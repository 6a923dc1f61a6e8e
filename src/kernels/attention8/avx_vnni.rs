//! AVX2 with the VEX form of VNNI.
//!
//! There is no look-up of 256 bytes here. A weight is `255 * 2^(-(32 octave + part) / 32)`, rounded: 32 mantissas of nine bits, each right for all
//! octaves (a test compares every step with the table), divided by a power of two in the one instruction that multiplies 16-bit numbers and rounds.

use super::super::ymm::{LANES, Vnni, all_numbers, dot, load, store, values as lanes};
use super::{Attention8, AttentionScratch8, FORBIDDEN, QUERIES, Rows, SHIFT, SIGNED, TOP, steps_a_score, symmetric};
use std::arch::x86_64::*;

/// Tokens whose scores, and columns whose sums, one tile holds: two vectors.
const PANEL: usize = 2 * LANES;
/// Queries of a tile: 6 x 2 vectors of sums, 2 of keys, 1 of queries.
const ROWS: usize = 6;
/// Tokens whose weights are made together.
const TOGETHER: usize = 4 * LANES;

const _: () = assert!(ROWS <= QUERIES && super::LOOKED_UP.is_multiple_of(TOGETHER) && super::PANEL.is_multiple_of(PANEL));

/// What turns steps into weights.
struct Weigher {
    /// By the lower half of a step's place in its octave: mantissa less 256, places 0 to 15 and 16 to 31.
    mantissas: [__m256i; 2],
    /// By octave: `2^(7 + octave)`, low and high byte; octave 7 is the largest weights'.
    shifts: [__m256i; 2],
}

impl Weigher {
    /// # Safety
    /// AVX2 must be there (inlined into a caller that enables it).
    #[inline(always)]
    unsafe fn new() -> Self {
        // About 2 * 255 * 2^(-(31 - place) / 32): the only nine bits that round as the table does in all octaves.
        const MANTISSAS: [[u8; 16]; 2] = {
            let whole: [u16; 32] = [
                260, 266, 272, 278, 284, 290, 296, 303, 309, 316, 323, 330, 337, 345, 352, 360, 368, 376, 384, 393, 401, 410, 419, 428,
                438, 447, 457, 467, 477, 488, 499, 510,
            ];
            let mut halves = [[0; 16]; 2];
            let mut place = 0;
            while place < 32 {
                halves[place / 16][place % 16] = (whole[place] - 256) as u8;
                place += 1;
            }
            halves
        };
        const LOW: [u8; 16] = [128, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        const HIGH: [u8; 16] = [0, 1, 2, 4, 8, 16, 32, 64, 0, 0, 0, 0, 0, 0, 0, 0];
        // SAFETY: the tables are 16 bytes long.
        unsafe {
            let table = |bytes: &[u8; 16]| _mm256_broadcastsi128_si256(_mm_loadu_si128(bytes.as_ptr().cast()));
            Self { mantissas: [table(&MANTISSAS[0]), table(&MANTISSAS[1])], shifts: [table(&LOW), table(&HIGH)] }
        }
    }

    /// The weights of 32 steps.
    ///
    /// # Safety
    /// AVX2 must be there (inlined into a caller that enables it).
    #[inline(always)]
    unsafe fn weights(&self, steps: __m256i) -> __m256i {
        // SAFETY: this function's contract.
        unsafe {
            // Bit 7 of an index makes zero: set for the upper half, and for the lower half once it is turned around.
            let place = _mm256_add_epi8(_mm256_and_si256(steps, _mm256_set1_epi8(31)), _mm256_set1_epi8(0x70));
            let turned = _mm256_xor_si256(place, _mm256_set1_epi8(0xf0u8 as i8));
            let mantissa = _mm256_or_si256(_mm256_shuffle_epi8(self.mantissas[0], place), _mm256_shuffle_epi8(self.mantissas[1], turned));
            let octave = _mm256_and_si256(_mm256_srli_epi16::<5>(steps), _mm256_set1_epi8(7));
            let (low, high) = (_mm256_shuffle_epi8(self.shifts[0], octave), _mm256_shuffle_epi8(self.shifts[1], octave));
            let one = _mm256_set1_epi8(1);
            let near = _mm256_mulhrs_epi16(_mm256_unpacklo_epi8(mantissa, one), _mm256_unpacklo_epi8(low, high));
            let far = _mm256_mulhrs_epi16(_mm256_unpackhi_epi8(mantissa, one), _mm256_unpackhi_epi8(low, high));
            // Step 0 is all that is smaller, and weighs nothing.
            _mm256_andnot_si256(_mm256_cmpeq_epi8(steps, _mm256_setzero_si256()), _mm256_packus_epi16(near, far))
        }
    }
}

/// The magnitude of each lane.
///
/// # Safety
/// AVX2 must be there (inlined into a caller that enables it).
#[inline(always)]
unsafe fn magnitude(x: __m256) -> __m256 {
    // SAFETY: this function's contract.
    unsafe { _mm256_andnot_ps(_mm256_set1_ps(-0.0), x) }
}

/// The head that starts at column `at`: keys and values packed, then queries `first..` as many as `out` has rows.
///
/// # Safety
/// AVX2, FMA and AVX-VNNI must be there; lengths as `Attention8::run` checks them.
#[target_feature(enable = "avx2,fma,avxvnni")]
pub(super) unsafe fn head(
    a: &Attention8,
    [q, k, v]: [Rows<'_>; 3],
    scale: f32,
    at: usize,
    first: usize,
    out: &mut [f32],
    scratch: &mut AttentionScratch8,
) {
    let count = out.len() / a.width().max(1);
    // SAFETY: this function's contract; query blocks end at or before `count`.
    unsafe {
        let mut poison = keys(a, k, scale, at, scratch);
        poison += values(a, v, at, scratch);
        let mut i = 0;
        while i + ROWS <= count {
            queries::<ROWS>(a, q, at, first, i, poison, out.as_mut_ptr(), scratch);
            i += ROWS;
        }
        while i + 2 <= count {
            queries::<2>(a, q, at, first, i, poison, out.as_mut_ptr(), scratch);
            i += 2;
        }
        while i < count {
            queries::<1>(a, q, at, first, i, poison, out.as_mut_ptr(), scratch);
            i += 1;
        }
    }
}

/// One row of `len` values to signed bytes plus `shift` (modulo 256) at `to`, written eight at a time: size of a step, poison.
///
/// # Safety
/// AVX2 must be there (inlined into a caller that enables it); `len` values at `row`, room for `len` rounded up to 8 at `to`.
#[inline(always)]
unsafe fn quantize(row: *const f32, len: usize, shift: i32, to: *mut u8) -> (f32, f32) {
    // SAFETY: this function's contract; loads past the row's end are masked off.
    unsafe {
        let (mut most, mut bad) = (_mm256_setzero_ps(), _mm256_setzero_ps());
        for d in (0..len).step_by(LANES) {
            let x = load(row.add(d), len - d);
            most = _mm256_max_ps(most, magnitude(x));
            // 0 for a number, NaN for infinity and NaN, which stays in the sum.
            bad = _mm256_add_ps(bad, _mm256_sub_ps(x, x));
        }
        let finite = all_numbers(bad);
        let (inverse, size, poison) = symmetric(lanes(most).into_iter().fold(0.0, f32::max), finite);
        let (inverse, shift) = (_mm256_set1_ps(inverse), _mm_set1_epi8(shift as i8));
        for d in (0..len).step_by(LANES) {
            // A value that is not finite times an inverse of 0 is NaN and becomes some byte: the poison tells.
            let step = _mm256_cvtps_epi32(_mm256_mul_ps(load(row.add(d), len - d), inverse));
            let words = _mm_packs_epi32(_mm256_castsi256_si128(step), _mm256_extracti128_si256::<1>(step));
            _mm_storel_epi64(to.add(d).cast(), _mm_add_epi8(_mm_packs_epi16(words, words), shift));
        }
        (size, poison)
    }
}

/// Keys to panels `[tokens / 16][depth / 4][16][4]`, their scales, and what the queries' shift adds to the sums, negated.
///
/// # Safety
/// As [`head`].
#[target_feature(enable = "avx2,fma,avxvnni")]
unsafe fn keys(a: &Attention8, k: Rows<'_>, scale: f32, at: usize, s: &mut AttentionScratch8) -> f32 {
    let (tokens, hw) = (a.tokens(), a.head_width);
    let steps = hw.div_ceil(4);
    let factor = steps_a_score(scale);
    let mut poison = 0.0;
    // SAFETY: the row lies within `k`; dwords end within the panel of the token, `keys` holds whole panels.
    unsafe {
        let packed = s.keys.as_mut_ptr();
        let bytes = s.queries.as_mut_ptr();
        for j in 0..tokens {
            let (size, bad) = quantize(k.values.as_ptr().add(j * k.stride + at), hw, 0, bytes);
            poison += bad;
            *s.key_scale.as_mut_ptr().add(j) = size * factor;
            let to = packed.add((j / PANEL * steps * PANEL + j % PANEL) * 4).cast::<i32>();
            for step in 0..steps {
                // Past the head's width the quantizer wrote zeros (masked loads, no shift).
                to.add(step * PANEL).write_unaligned(bytes.add(step * 4).cast::<i32>().read_unaligned());
            }
        }
        let shift = _mm256_set1_epi8(SHIFT as i8);
        for group in 0..tokens.div_ceil(LANES) {
            let mut sum = _mm256_setzero_si256();
            let mut from = packed.add((group / 2 * steps * PANEL + group % 2 * LANES) * 4);
            for _ in 0..steps {
                sum = _mm256_dpbusd_avx_epi32(sum, shift, _mm256_loadu_si256(from.cast()));
                from = from.add(PANEL * 4);
            }
            _mm256_storeu_si256(s.offsets.as_mut_ptr().add(group * LANES).cast(), _mm256_sub_epi32(_mm256_setzero_si256(), sum));
        }
    }
    poison
}

/// Values to `[width / 16][tokens / 4][16][4]` and the scale of each column.
///
/// # Safety
/// As [`head`].
#[target_feature(enable = "avx2,fma,avxvnni")]
unsafe fn values(a: &Attention8, v: Rows<'_>, at: usize, s: &mut AttentionScratch8) -> f32 {
    let (tokens, hw) = (a.tokens(), a.head_width);
    let quads = tokens.div_ceil(4);
    let low = _mm256_set1_epi32(0xff);
    let mut finite = true;
    for d in (0..hw).step_by(LANES) {
        // SAFETY: loads past a row's end are masked off; `values` holds whole quads of whole panels.
        unsafe {
            let column = v.values.as_ptr().add(at + d);
            let value = |j: usize| if j < tokens { load(column.add(j * v.stride), hw - d) } else { _mm256_setzero_ps() };
            let (mut most, mut bad) = (_mm256_setzero_ps(), _mm256_setzero_ps());
            for j in 0..tokens {
                let x = value(j);
                most = _mm256_max_ps(most, magnitude(x));
                bad = _mm256_add_ps(bad, _mm256_sub_ps(x, x));
            }
            finite &= all_numbers(bad);
            // As `symmetric`, lane by lane; columns that are not finite may become anything.
            let enough = _mm256_cmp_ps::<_CMP_NLT_UQ>(most, _mm256_set1_ps(f32::MIN_POSITIVE * 256.0));
            let signed = _mm256_set1_ps(SIGNED);
            let inverse = _mm256_and_ps(enough, _mm256_div_ps(signed, most));
            _mm256_storeu_ps(s.value_scale.as_mut_ptr().add(d), _mm256_and_ps(enough, _mm256_div_ps(most, signed)));
            let panel = s.values.as_mut_ptr().add((d / PANEL * quads * PANEL + d % PANEL) * 4);
            for quad in 0..quads {
                let byte = |j: usize| _mm256_and_si256(_mm256_cvtps_epi32(_mm256_mul_ps(value(quad * 4 + j), inverse)), low);
                let pair = |j: usize| _mm256_or_si256(byte(j), _mm256_slli_epi32::<8>(byte(j + 1)));
                let all = _mm256_or_si256(pair(0), _mm256_slli_epi32::<16>(pair(2)));
                _mm256_storeu_si256(panel.add(quad * PANEL * 4).cast(), all);
            }
        }
    }
    if finite { 0.0 } else { f32::NAN }
}

/// Queries `first + i..first + i + R`, to rows `i..i + R` of `out`.
///
/// # Safety
/// As [`head`]; the keys and values of the head are packed in `s`, the queries lie on the grid and their rows within `out`.
#[target_feature(enable = "avx2,fma,avxvnni")]
#[allow(clippy::too_many_arguments)]
unsafe fn queries<const R: usize>(
    a: &Attention8,
    q: Rows<'_>,
    at: usize,
    first: usize,
    i: usize,
    poison: f32,
    out: *mut f32,
    s: &mut AttentionScratch8,
) {
    let (tokens, hw, width) = (a.tokens(), a.head_width, a.width());
    let (steps, depth) = (hw.div_ceil(4), hw.next_multiple_of(4));
    let (groups, padded) = (tokens.next_multiple_of(super::PANEL) / PANEL, tokens.next_multiple_of(super::LOOKED_UP));
    // SAFETY: this function's contract; scratch memory is the shape's (checked by `run`): QUERIES rows of `padded`, whole panels and quads.
    unsafe {
        let (mut size, mut bad) = ([0.0f32; R], [0.0f32; R]);
        for r in 0..R {
            let row = q.values.as_ptr().add((first + i + r) * q.stride + at);
            // In order: what a row writes past its end the next one overwrites. Keys are zero there.
            (size[r], bad[r]) = quantize(row, hw, SHIFT, s.queries.as_mut_ptr().add(r * depth));
        }
        let scores = s.scores.as_mut_ptr();
        let forbidden = _mm256_set1_ps(FORBIDDEN);
        let mut most = [forbidden; R];
        let bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
        for group in 0..groups {
            let offsets = s.offsets.as_ptr().add(group * PANEL);
            let start = [_mm256_loadu_si256(offsets.cast()), _mm256_loadu_si256(offsets.add(LANES).cast())];
            let mut sums = [start; R];
            dot::<Vnni, R>(&mut sums, s.queries.as_ptr(), depth, s.keys.as_ptr().add(group * PANEL * depth), steps);
            let scale = s.key_scale.as_ptr().add(group * PANEL);
            let scale = [_mm256_loadu_ps(scale), _mm256_loadu_ps(scale.add(LANES))];
            for r in 0..R {
                let allowed = i32::from(*a.allowed.as_ptr().add((first + i + r) * groups + group));
                let own = _mm256_set1_ps(size[r]);
                for half in 0..2 {
                    let set = _mm256_and_si256(_mm256_set1_epi32(allowed >> (half * LANES)), bits);
                    let score = _mm256_mul_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(sums[r][half]), scale[half]), own);
                    let score = _mm256_blendv_ps(forbidden, score, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, bits)));
                    most[r] = _mm256_max_ps(most[r], score);
                    _mm256_storeu_ps(scores.add(r * padded + group * PANEL + half * LANES), score);
                }
            }
        }
        let weigher = Weigher::new();
        let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        let top = _mm256_set1_ps(TOP);
        let mut share = [0.0f32; R];
        for (r, share) in share.iter_mut().enumerate() {
            let largest = _mm256_set1_ps(lanes(most[r]).into_iter().fold(FORBIDDEN, f32::max));
            let mut total = _mm256_setzero_si256();
            for c in (0..padded).step_by(TOGETHER) {
                let step = |part: usize| {
                    let score = _mm256_loadu_ps(scores.add(r * padded + c + part * LANES));
                    _mm256_cvtps_epi32(_mm256_add_ps(_mm256_sub_ps(score, largest), top))
                };
                // Packing saturates to 0..=255 on the way; it works on halves of a vector, which are put back in order.
                let step = _mm256_packus_epi16(_mm256_packs_epi32(step(0), step(1)), _mm256_packs_epi32(step(2), step(3)));
                let weight = weigher.weights(_mm256_permutevar8x32_epi32(step, order));
                total = _mm256_dpbusd_avx_epi32(total, weight, _mm256_set1_epi8(1));
                _mm256_storeu_si256(s.weights.as_mut_ptr().add(r * padded + c).cast(), weight);
            }
            let mut sums = [0i32; LANES];
            _mm256_storeu_si256(sums.as_mut_ptr().cast(), total);
            *share = 1.0 / sums.iter().sum::<i32>() as f32;
        }
        let quads = tokens.div_ceil(4);
        for d in (0..hw).step_by(PANEL) {
            let mut sums = [[_mm256_setzero_si256(); 2]; R];
            dot::<Vnni, R>(&mut sums, s.weights.as_ptr(), padded, s.values.as_ptr().add(d * quads * 4), quads);
            for half in 0..2 {
                let column = d + half * LANES;
                if column >= hw {
                    continue;
                }
                let scale = _mm256_loadu_ps(s.value_scale.as_ptr().add(column));
                for (r, row) in sums.iter().enumerate() {
                    let y = _mm256_mul_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(row[half]), scale), _mm256_set1_ps(share[r]));
                    let y = _mm256_add_ps(y, _mm256_set1_ps(poison + bad[r]));
                    store(out.add((i + r) * width + at + column), hw - column, y);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::WEIGHTS;
    use super::*;

    #[target_feature(enable = "avx2")]
    unsafe fn weights_of(steps: &[u8; TOGETHER]) -> [u8; TOGETHER] {
        let mut out = [0; TOGETHER];
        // SAFETY: both arrays are a vector long.
        unsafe {
            let weights = Weigher::new().weights(_mm256_loadu_si256(steps.as_ptr().cast()));
            _mm256_storeu_si256(out.as_mut_ptr().cast(), weights);
        }
        out
    }

    #[test]
    fn every_step_has_the_weight_of_the_table() {
        if !is_x86_feature_detected!("avx2") {
            return;
        }
        for first in 0..=255u8 {
            let steps: [u8; TOGETHER] = std::array::from_fn(|i| first.wrapping_add(7 * i as u8));
            // SAFETY: AVX2 is there.
            let weights = unsafe { weights_of(&steps) };
            assert_eq!(weights, steps.map(|step| WEIGHTS[usize::from(step)]), "steps {steps:?}");
        }
    }
}
