//! aarch64: plain NEON, SDOT and SMMLA, and a table look-up of 256 bytes (four TBL).
//!
//! Softmax weights go into the product as signed bytes, 128 below their value, and 128 times the sum of a column's values is added back: the same
//! integers.

use super::super::neon8::{Dot, I8mm, Plain, Product, WIDTH, eights, quantize, rounded};
use super::{Attention8, AttentionScratch8, FORBIDDEN, LOOKED_UP, Rows, TOP, WEIGHTS, steps_a_score, symmetric};
use std::arch::aarch64::*;

/// What a weight's signed byte lies below it.
const SHIFT: i32 = 128;
/// Queries of the largest tile.
const QUERIES: usize = 8;
/// Tokens that share a word of [`Attention8::allowed`].
const WORD: usize = 16;

/// What a head works on.
struct Head<'a> {
    a: &'a Attention8,
    /// First column.
    at: usize,
    /// NaN where a key or value is not finite, else 0.
    poison: f32,
}

macro_rules! entry {
    ($name:ident, $product:ty, $features:literal) => {
        /// The head that starts at column `at`.
        ///
        /// # Safety
        /// The instruction set must be there; lengths as `Attention8::run` checks them.
        #[target_feature(enable = $features)]
        pub(super) unsafe fn $name(
            a: &Attention8,
            qkv: [Rows<'_>; 3],
            scale: f32,
            at: usize,
            first: usize,
            out: &mut [f32],
            s: &mut AttentionScratch8,
        ) {
            // SAFETY: this function's contract.
            unsafe { head::<$product>(a, qkv, scale, at, first, out, s) }
        }
    };
}

entry!(neon, Plain<false>, "neon");
entry!(dot, Dot, "neon,dotprod");
entry!(i8mm, I8mm, "neon,i8mm");

/// Keys and values packed, then queries `first..`, as many as `out` has rows.
///
/// # Safety
/// `P`'s instruction set must be there; lengths as `Attention8::run` checks them.
#[inline(always)]
unsafe fn head<P: Product>(
    a: &Attention8,
    [q, k, v]: [Rows<'_>; 3],
    scale: f32,
    at: usize,
    first: usize,
    out: &mut [f32],
    s: &mut AttentionScratch8,
) {
    let count = out.len() / a.width().max(1);
    // SAFETY: this function's contract; blocks of queries start below `count`, and only those below it are read and stored.
    unsafe {
        let poison = keys::<P>(a, k, steps_a_score(scale), at, s) + values::<P>(a, v, at, s);
        let head = Head { a, at, poison };
        let mut i = 0;
        while i + QUERIES <= count {
            queries::<P, QUERIES>(&head, q, first, i, count, out, s);
            i += QUERIES;
        }
        while i + 4 <= count {
            queries::<P, 4>(&head, q, first, i, count, out, s);
            i += 4;
        }
        while i < count {
            queries::<P, 2>(&head, q, first, i, count, out, s);
            i += 2;
        }
    }
}

/// Factor to steps, size of a step and poison of a row.
#[inline(always)]
fn scale_of(row: &[f32]) -> (f32, f32, f32) {
    let groups = row.chunks_exact(4);
    // Unlike `f32::max`, these keep what is not a number.
    let rest = groups.remainder().iter().fold(0.0f32, |most, x| if x.is_finite() { most.max(x.abs()) } else { f32::NAN });
    // SAFETY: loads of four values of a group.
    let most = unsafe {
        let mut most = vdupq_n_f32(0.0);
        for group in groups {
            most = vmaxq_f32(most, vabsq_f32(vld1q_f32(group.as_ptr())));
        }
        vmaxvq_f32(most)
    };
    let finite = most.is_finite() && rest.is_finite();
    symmetric(most.max(rest), finite)
}

/// Keys to bytes, `[panels of 8 tokens][head_width / DEPTH][8][DEPTH]`, and the scale of each: poison.
///
/// # Safety
/// As [`head`].
#[inline(always)]
unsafe fn keys<P: Product>(a: &Attention8, k: Rows<'_>, factor: f32, at: usize, s: &mut AttentionScratch8) -> f32 {
    let hw = a.head_width;
    let groups = hw.div_ceil(P::DEPTH);
    let mut poison = 0.0;
    for (j, row) in k.values.chunks(k.stride).take(a.tokens()).enumerate() {
        let row = &row[at..at + hw];
        let (inverse, size, bad) = scale_of(row);
        s.key_scale[j] = size * factor;
        poison += bad;
        // SAFETY: the scratch memory holds whole panels of whole groups (`Attention8::scratch`).
        unsafe {
            let panel = s.keys.as_mut_ptr().add((j / WIDTH * groups * WIDTH + j % WIDTH) * P::DEPTH);
            eights(row, |d, from| {
                // What is not finite becomes some byte; the output is NaN then.
                let bytes = vqmovn_s16(rounded(from, inverse));
                if P::DEPTH == 8 {
                    vst1_s8(panel.add(d / 8 * WIDTH * 8), bytes);
                } else {
                    let words = vreinterpret_s32_s8(bytes);
                    panel.add(d / 4 * WIDTH * 4).cast::<i32>().write_unaligned(vget_lane_s32::<0>(words));
                    if d / 4 + 1 < groups {
                        panel.add((d / 4 + 1) * WIDTH * 4).cast::<i32>().write_unaligned(vget_lane_s32::<1>(words));
                    }
                }
            });
        }
    }
    poison
}

/// Values to bytes, `[panels of 8 columns][tokens / DEPTH][8][DEPTH]`, the scale and the sum of each column: poison.
///
/// # Safety
/// As [`head`].
#[inline(always)]
unsafe fn values<P: Product>(a: &Attention8, v: Rows<'_>, at: usize, s: &mut AttentionScratch8) -> f32 {
    let (tokens, hw) = (a.tokens(), a.head_width);
    let groups = tokens.div_ceil(P::DEPTH);
    let place = |d: usize, j: usize| ((d / WIDTH * groups + j / P::DEPTH) * WIDTH + d % WIDTH) * P::DEPTH + j % P::DEPTH;
    let mut poison = 0.0;
    let whole = hw - hw % 4;
    for d in (0..whole).step_by(4) {
        // SAFETY: four columns of each token's row; bytes go to whole panels of whole groups (`Attention8::scratch`).
        unsafe {
            let column = v.values.as_ptr().add(at + d);
            let mut most = vdupq_n_f32(0.0);
            for j in 0..tokens {
                most = vmaxq_f32(most, vabsq_f32(vld1q_f32(column.add(j * v.stride))));
            }
            let mut largest = [0.0f32; 4];
            vst1q_f32(largest.as_mut_ptr(), most);
            let mut inverses = [0.0f32; 4];
            for (i, &largest) in largest.iter().enumerate() {
                let (inverse, size, bad) = symmetric(largest, largest.is_finite());
                inverses[i] = inverse;
                s.value_scale[d + i] = size;
                poison += bad;
            }
            let inverse = vld1q_f32(inverses.as_ptr());
            let mut sums = vdupq_n_s32(0);
            for j in (0..tokens).step_by(4) {
                let mut byte = [vdupq_n_s32(0); 4];
                for (i, byte) in byte.iter_mut().enumerate().take(tokens - j) {
                    *byte = vcvtnq_s32_f32(vmulq_f32(vld1q_f32(column.add((j + i) * v.stride)), inverse));
                    sums = vaddq_s32(sums, *byte);
                }
                // Each insertion keeps the lower bytes and overwrites what is above.
                let words = vsliq_n_s32::<24>(vsliq_n_s32::<16>(vsliq_n_s32::<8>(byte[0], byte[1]), byte[2]), byte[3]);
                let to = s.values.as_mut_ptr().add(place(d, j));
                if P::DEPTH == 4 {
                    vst1q_s32(to.cast(), words);
                } else {
                    to.cast::<i32>().write_unaligned(vgetq_lane_s32::<0>(words));
                    to.add(P::DEPTH).cast::<i32>().write_unaligned(vgetq_lane_s32::<1>(words));
                    to.add(2 * P::DEPTH).cast::<i32>().write_unaligned(vgetq_lane_s32::<2>(words));
                    to.add(3 * P::DEPTH).cast::<i32>().write_unaligned(vgetq_lane_s32::<3>(words));
                }
            }
            vst1q_s32(s.value_sums.as_mut_ptr().add(d), sums);
        }
    }
    for d in whole..hw {
        let column = || (0..tokens).map(|j| v.values[j * v.stride + at + d]);
        let (inverse, size, bad) = symmetric(column().fold(0.0, |most, x| x.abs().max(most)), column().all(f32::is_finite));
        s.value_scale[d] = size;
        poison += bad;
        let mut sum = 0;
        for (j, x) in column().enumerate() {
            let byte = (x * inverse).round_ties_even() as i8;
            s.values[place(d, j)] = byte;
            sum += i32::from(byte);
        }
        s.value_sums[d] = sum;
    }
    poison
}

/// Queries `first + i..first + i + R` to rows `i..i + R` of `out`; those from row `count` on do not exist.
///
/// # Safety
/// As [`head`]; keys and values of the head are packed in `s`.
#[inline(always)]
unsafe fn queries<P: Product, const R: usize>(
    head: &Head<'_>,
    q: Rows<'_>,
    first: usize,
    i: usize,
    count: usize,
    out: &mut [f32],
    s: &mut AttentionScratch8,
) {
    let (a, at) = (head.a, head.at);
    let (tokens, hw, width) = (a.tokens(), a.head_width, a.width());
    let (panels, padded) = (tokens.div_ceil(WIDTH), tokens.next_multiple_of(LOOKED_UP));
    let (depth, words) = (hw.next_multiple_of(8), tokens.next_multiple_of(super::PANEL) / WORD);
    let there = R.min(count - i);
    let (mut size, mut bad) = ([0.0f32; R], [0.0f32; R]);
    for r in 0..there {
        let row = &q.values[(first + i + r) * q.stride + at..][..hw];
        let inverse;
        (inverse, size[r], bad[r]) = scale_of(row);
        // SAFETY: the scratch memory holds rows of `depth` bytes (`Attention8::scratch`).
        unsafe {
            let to = s.queries.as_mut_ptr().add(P::row(r, depth)).cast::<i8>();
            quantize(row, inverse, 0, to, P::STEP);
        }
    }
    // SAFETY: this function's contract; scores, weights and the packed keys and values are whole panels and blocks (`Attention8::scratch`).
    unsafe {
        let scores = s.scores.as_mut_ptr();
        let forbidden = vdupq_n_f32(FORBIDDEN);
        let bits = [vld1q_u32([1u32, 2, 4, 8].as_ptr()), vld1q_u32([16u32, 32, 64, 128].as_ptr())];
        let mut most = [forbidden; R];
        let groups = hw.div_ceil(P::DEPTH);
        for panel in 0..panels {
            let keys = s.keys.as_ptr().add(panel * groups * WIDTH * P::DEPTH);
            let sums = P::tile::<R>(keys, s.queries.as_ptr().cast(), depth, groups);
            let scale = s.key_scale.as_ptr().add(panel * WIDTH);
            let scale = [vld1q_f32(scale), vld1q_f32(scale.add(4))];
            for r in 0..there {
                let word = *a.allowed.as_ptr().add((first + i + r) * words + panel * WIDTH / WORD);
                let allowed = vdupq_n_u32(u32::from(word >> (panel * WIDTH % WORD)));
                for half in 0..2 {
                    let score = vmulq_n_f32(vmulq_f32(vcvtq_f32_s32(sums[r][half]), scale[half]), size[r]);
                    let score = vbslq_f32(vtstq_u32(allowed, bits[half]), score, forbidden);
                    most[r] = vmaxnmq_f32(most[r], score);
                    vst1q_f32(scores.add(r * padded + panel * WIDTH + 4 * half), score);
                }
            }
        }
        let table = WEIGHTS.as_ptr();
        let table: [uint8x16x4_t; 4] = std::array::from_fn(|part| vld1q_u8_x4(table.add(part * 64)));
        let top = vdupq_n_f32(TOP);
        let mut share = [0.0f32; R];
        for (r, share) in share.iter_mut().enumerate().take(there) {
            let largest = vdupq_n_f32(vmaxnmvq_f32(most[r]));
            let mut total = vdupq_n_u32(0);
            let to = s.weights.as_mut_ptr().add(P::row(r, padded));
            for c in (0..tokens).step_by(16) {
                let line = scores.add(r * padded + c);
                let step = |part: usize| vcvtnq_s32_f32(vaddq_f32(vsubq_f32(vld1q_f32(line.add(part * 4)), largest), top));
                // Narrowing saturates to 0..=255 on the way.
                let low = vqmovn_high_s32(vqmovn_s32(step(0)), step(1));
                let high = vqmovn_high_s32(vqmovn_s32(step(2)), step(3));
                let step = vqmovun_high_s16(vqmovun_s16(low), high);
                // Out of a table's range gives 0 with TBL and leaves what is there with TBX.
                let mut weight = vqtbl4q_u8(table[0], step);
                weight = vqtbx4q_u8(weight, table[1], vsubq_u8(step, vdupq_n_u8(64)));
                weight = vqtbx4q_u8(weight, table[2], vsubq_u8(step, vdupq_n_u8(128)));
                weight = vqtbx4q_u8(weight, table[3], vsubq_u8(step, vdupq_n_u8(192)));
                total = vpadalq_u16(total, vpaddlq_u8(weight));
                let signed = veorq_u8(weight, vdupq_n_u8(0x80));
                if P::STEP == 8 {
                    vst1q_u8(to.add(c), signed);
                } else {
                    vst1_u8(to.add(c / 8 * P::STEP), vget_low_u8(signed));
                    vst1_u8(to.add((c / 8 + 1) * P::STEP), vget_high_u8(signed));
                }
            }
            *share = 1.0 / vaddvq_u32(total) as f32;
        }
        let groups = tokens.div_ceil(P::DEPTH);
        for d in (0..hw).step_by(WIDTH) {
            let values = s.values.as_ptr().add(d / WIDTH * groups * WIDTH * P::DEPTH);
            let sums = P::tile::<R>(values, s.weights.as_ptr().cast(), padded, groups);
            for half in 0..2 {
                let column = d + 4 * half;
                let scale = vld1q_f32(s.value_scale.as_ptr().add(column));
                let shift = vmulq_n_s32(vld1q_s32(s.value_sums.as_ptr().add(column)), SHIFT);
                for r in 0..there {
                    let sum = vcvtq_f32_s32(vaddq_s32(sums[r][half], shift));
                    let y = vmulq_n_f32(vmulq_f32(sum, scale), share[r]);
                    let y = vaddq_f32(y, vdupq_n_f32(head.poison + bad[r]));
                    let place = (i + r) * width + at + column;
                    if column + 4 <= hw {
                        vst1q_f32(out.as_mut_ptr().add(place), y);
                    } else if column < hw {
                        let mut last = [0.0f32; 4];
                        vst1q_f32(last.as_mut_ptr(), y);
                        out[place..place + hw - column].copy_from_slice(&last[..hw - column]);
                    }
                }
            }
        }
    }
}
