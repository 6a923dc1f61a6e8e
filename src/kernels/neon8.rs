//! The inner loop that the int8 kernels share on aarch64: signed bytes in rows times signed bytes in packed panels of eight columns.
//!
//! Plain NEON (SMULL, SMLAL, SADALP), the dot-product extension (SDOT) and the int8 matrix extension (SMMLA). The last two are written as assembly
//! because their intrinsics are not stable yet; each is one instruction on registers the compiler chooses.

use std::arch::aarch64::*;
use std::arch::asm;

/// Columns of a panel.
pub(super) const WIDTH: usize = 8;

/// One way of multiplying rows with a panel. Rows lie one after the other or, where two are multiplied at once, in interleaved pairs; a panel is
/// `[groups][WIDTH][DEPTH]`.
///
/// # Safety
/// Callers must have detected the instruction set.
pub(super) unsafe trait Product {
    /// Rows of the largest tile: what fits the 32 registers.
    const ROWS: usize;
    /// Bytes from eight inputs of a row to the next eight: 8, or 16 where two rows lie interleaved.
    const STEP: usize;
    /// Neighbouring inputs that lie together for each column.
    const DEPTH: usize;

    /// Where row `r` of rows of `stride` bytes starts; its next eight inputs follow [`Product::STEP`] bytes later.
    #[inline(always)]
    fn row(r: usize, stride: usize) -> usize {
        if Self::STEP == 8 { r * stride } else { (r & !1) * stride + (r & 1) * 8 }
    }

    /// Sums of `ROWS` rows (2, 4 or 8) times the eight columns of a panel.
    ///
    /// # Safety
    /// `weights` is a panel of `groups` groups in this product's layout, `rows` the first (even) of the rows, each `stride` bytes long.
    unsafe fn tile<const ROWS: usize>(weights: *const i8, rows: *const i8, stride: usize, groups: usize) -> [[int32x4_t; 2]; ROWS];
}

/// `values` by eights, zeros after the last: the number of the first of them, and where they are.
#[inline(always)]
pub(super) fn eights(values: &[f32], mut each: impl FnMut(usize, *const f32)) {
    let groups = values.chunks_exact(8);
    let rest = groups.remainder();
    for (g, group) in groups.enumerate() {
        each(8 * g, group.as_ptr());
    }
    if !rest.is_empty() {
        let mut last = [0.0f32; 8];
        last[..rest.len()].copy_from_slice(rest);
        each(values.len() - rest.len(), last.as_ptr());
    }
}

/// The smallest and the largest of `values`, zero included. Not-a-number is both of them where there is one.
#[inline(always)]
pub(super) fn extremes(values: &[f32]) -> (f32, f32) {
    // SAFETY: `eights` points at eight values; every aarch64 has NEON.
    unsafe {
        let (mut low, mut high) = ([vdupq_n_f32(0.0); 2], [vdupq_n_f32(0.0); 2]);
        eights(values, |_, from| {
            for half in 0..2 {
                let x = vld1q_f32(from.add(4 * half));
                low[half] = vminq_f32(low[half], x);
                high[half] = vmaxq_f32(high[half], x);
            }
        });
        (vminvq_f32(vminq_f32(low[0], low[1])), vmaxvq_f32(vmaxq_f32(high[0], high[1])))
    }
}

/// Eight values times `inverse`, rounded; what does not fit saturates.
///
/// # Safety
/// `from` is valid for eight values.
#[inline(always)]
pub(super) unsafe fn rounded(from: *const f32, inverse: f32) -> int16x8_t {
    // SAFETY: this function's contract.
    unsafe {
        let near = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(from), inverse));
        let far = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(from.add(4)), inverse));
        vqmovn_high_s32(vqmovn_s32(near), far)
    }
}

/// A row to signed bytes at `to`, eight by eight `step` bytes apart, with the zero point `zero` (signed, too).
///
/// # Safety
/// There is room for the row, rounded up to eights.
#[inline(always)]
pub(super) unsafe fn quantize(row: &[f32], inverse: f32, zero: i32, to: *mut i8, step: usize) {
    // SAFETY: this function's contract; `eights` points at eight values.
    unsafe {
        // The zero point is at most 255 - 128, and the narrowings saturate as clamping would.
        let zeros = vdupq_n_s16(zero as i16);
        eights(row, |i, from| vst1_s8(to.add(i / 8 * step), vqmovn_s16(vqaddq_s16(rounded(from, inverse), zeros))));
    }
}

/// The first `n` of eight columns to `out`, plus those of `residual` (null for none).
///
/// # Safety
/// `n` values at `place` in both.
#[inline(always)]
pub(super) unsafe fn store_columns(y: [float32x4_t; 2], n: usize, residual: *const f32, out: *mut f32, place: usize) {
    // SAFETY: this function's contract; what is not a whole panel goes through a local buffer so that nothing passes the row's end.
    unsafe {
        if n == WIDTH {
            for (half, y) in y.into_iter().enumerate() {
                let place = place + 4 * half;
                let y = if residual.is_null() { y } else { vaddq_f32(y, vld1q_f32(residual.add(place))) };
                vst1q_f32(out.add(place), y);
            }
        } else {
            let mut buffer = [0.0f32; WIDTH];
            vst1q_f32(buffer.as_mut_ptr(), y[0]);
            vst1q_f32(buffer.as_mut_ptr().add(4), y[1]);
            for (i, y) in buffer.iter().take(n).enumerate() {
                let add = if residual.is_null() { 0.0 } else { *residual.add(place + i) };
                *out.add(place + i) = y + add;
            }
        }
    }
}

/// Products in 16 bit, two of them summed before they are widened; with `LOWEST` each is widened, since two of -128 x -128 overflow.
pub(super) struct Plain<const LOWEST: bool>;

// SAFETY: every aarch64 has NEON.
unsafe impl<const LOWEST: bool> Product for Plain<LOWEST> {
    const ROWS: usize = 4;
    const STEP: usize = 8;
    const DEPTH: usize = 4;

    #[inline(always)]
    unsafe fn tile<const ROWS: usize>(weights: *const i8, rows: *const i8, stride: usize, groups: usize) -> [[int32x4_t; 2]; ROWS] {
        // SAFETY: the trait's contract: groups of 4 inputs by 8 outputs, rows of whole groups.
        unsafe {
            // Each output's sum in two lanes: `[row][outputs 0 1, 2 3, 4 5, 6 7]`.
            let mut acc = [[vdupq_n_s32(0); 4]; ROWS];
            let mut g = 0;
            while g + 2 <= groups {
                let w = weights.add(g * 4 * WIDTH);
                let (w0, w1, w2, w3) = (vld1q_s8(w), vld1q_s8(w.add(16)), vld1q_s8(w.add(32)), vld1q_s8(w.add(48)));
                for (r, acc) in acc.iter_mut().enumerate() {
                    let (x0, x1) = (four(rows.add(r * stride + g * 4)), four(rows.add(r * stride + g * 4 + 4)));
                    let (low0, low1) = (vget_low_s8(x0), vget_low_s8(x1));
                    if LOWEST {
                        acc[0] = vpadalq_s16(vpadalq_s16(acc[0], vmull_s8(vget_low_s8(w0), low0)), vmull_s8(vget_low_s8(w2), low1));
                        acc[1] = vpadalq_s16(vpadalq_s16(acc[1], vmull_high_s8(w0, x0)), vmull_high_s8(w2, x1));
                        acc[2] = vpadalq_s16(vpadalq_s16(acc[2], vmull_s8(vget_low_s8(w1), low0)), vmull_s8(vget_low_s8(w3), low1));
                        acc[3] = vpadalq_s16(vpadalq_s16(acc[3], vmull_high_s8(w1, x0)), vmull_high_s8(w3, x1));
                    } else {
                        acc[0] = vpadalq_s16(acc[0], vmlal_s8(vmull_s8(vget_low_s8(w0), low0), vget_low_s8(w2), low1));
                        acc[1] = vpadalq_s16(acc[1], vmlal_high_s8(vmull_high_s8(w0, x0), w2, x1));
                        acc[2] = vpadalq_s16(acc[2], vmlal_s8(vmull_s8(vget_low_s8(w1), low0), vget_low_s8(w3), low1));
                        acc[3] = vpadalq_s16(acc[3], vmlal_high_s8(vmull_high_s8(w1, x0), w3, x1));
                    }
                }
                g += 2;
            }
            if g < groups {
                let w = weights.add(g * 4 * WIDTH);
                let (w0, w1) = (vld1q_s8(w), vld1q_s8(w.add(16)));
                for (r, acc) in acc.iter_mut().enumerate() {
                    let x = four(rows.add(r * stride + g * 4));
                    acc[0] = vpadalq_s16(acc[0], vmull_s8(vget_low_s8(w0), vget_low_s8(x)));
                    acc[1] = vpadalq_s16(acc[1], vmull_high_s8(w0, x));
                    acc[2] = vpadalq_s16(acc[2], vmull_s8(vget_low_s8(w1), vget_low_s8(x)));
                    acc[3] = vpadalq_s16(acc[3], vmull_high_s8(w1, x));
                }
            }
            acc.map(|acc| [vpaddq_s32(acc[0], acc[1]), vpaddq_s32(acc[2], acc[3])])
        }
    }
}

/// Four bytes, four times.
///
/// # Safety
/// `from` is valid for four bytes.
#[inline(always)]
unsafe fn four(from: *const i8) -> int8x16_t {
    // SAFETY: this function's contract.
    unsafe { vreinterpretq_s8_s32(vdupq_n_s32(from.cast::<i32>().read_unaligned())) }
}

/// SDOT: four outputs, four inputs each, an instruction.
pub(super) struct Dot;

/// `acc + w . x[lane]`: each lane of `acc` gets the product of four bytes of `w` with the four bytes of that lane of `x`.
macro_rules! sdot {
    ($acc:expr, $w:expr, $x:expr, $lane:literal) => {
        asm!(
            concat!("sdot {0:v}.4s, {1:v}.16b, {2:v}.4b[", $lane, "]"),
            inout(vreg) $acc, in(vreg) $w, in(vreg) $x,
            options(pure, nomem, nostack, preserves_flags)
        )
    };
}

// SAFETY: `sdot` is the dot-product extension, which the caller detected (trait contract).
unsafe impl Product for Dot {
    const ROWS: usize = 8;
    const STEP: usize = 8;
    const DEPTH: usize = 4;

    #[inline(always)]
    unsafe fn tile<const ROWS: usize>(weights: *const i8, rows: *const i8, stride: usize, groups: usize) -> [[int32x4_t; 2]; ROWS] {
        // SAFETY: the trait's contract: groups of 4 inputs by 8 outputs, rows of whole groups.
        unsafe {
            let mut acc = [[vdupq_n_s32(0); 2]; ROWS];
            let mut w = weights;
            let mut g = 0;
            while g + 4 <= groups {
                let mut x = [vdupq_n_s8(0); ROWS];
                for (r, x) in x.iter_mut().enumerate() {
                    *x = vld1q_s8(rows.add(r * stride + g * 4));
                }
                macro_rules! lane {
                    ($lane:literal) => {
                        let (w0, w1) = (vld1q_s8(w.add(32 * $lane)), vld1q_s8(w.add(32 * $lane + 16)));
                        for (acc, x) in acc.iter_mut().zip(x) {
                            sdot!(acc[0], w0, x, $lane);
                            sdot!(acc[1], w1, x, $lane);
                        }
                    };
                }
                lane!(0);
                lane!(1);
                lane!(2);
                lane!(3);
                w = w.add(4 * 4 * WIDTH);
                g += 4;
            }
            while g < groups {
                let (w0, w1) = (vld1q_s8(w), vld1q_s8(w.add(16)));
                for (r, acc) in acc.iter_mut().enumerate() {
                    let x = four(rows.add(r * stride + g * 4));
                    sdot!(acc[0], w0, x, 0);
                    sdot!(acc[1], w1, x, 0);
                }
                w = w.add(4 * WIDTH);
                g += 1;
            }
            acc
        }
    }
}

/// SMMLA: two rows by two outputs, eight inputs each, an instruction.
pub(super) struct I8mm;

// SAFETY: `smmla` is the int8 matrix extension, which the caller detected (trait contract).
unsafe impl Product for I8mm {
    const ROWS: usize = 8;
    const STEP: usize = 16;
    const DEPTH: usize = 8;

    #[inline(always)]
    unsafe fn tile<const ROWS: usize>(weights: *const i8, rows: *const i8, stride: usize, groups: usize) -> [[int32x4_t; 2]; ROWS] {
        // SAFETY: the trait's contract: groups of 8 inputs by 8 outputs, pairs of rows interleaved by 8 inputs.
        unsafe {
            // `[row][outputs]` as `[pair of rows][pair of outputs]`; only the first half of the rows is used.
            let mut acc = [[vdupq_n_s32(0); 4]; ROWS];
            for g in 0..groups {
                let w = weights.add(g * 8 * WIDTH);
                let w = [vld1q_s8(w), vld1q_s8(w.add(16)), vld1q_s8(w.add(32)), vld1q_s8(w.add(48))];
                for (pair, acc) in acc.iter_mut().take(ROWS / 2).enumerate() {
                    let x = vld1q_s8(rows.add(2 * pair * stride + g * 16));
                    for (acc, w) in acc.iter_mut().zip(w) {
                        asm!(
                            "smmla {0:v}.4s, {1:v}.16b, {2:v}.16b",
                            inout(vreg) *acc, in(vreg) x, in(vreg) w,
                            options(pure, nomem, nostack, preserves_flags)
                        );
                    }
                }
            }
            let mut sums = [[vdupq_n_s32(0); 2]; ROWS];
            for (r, sums) in sums.iter_mut().enumerate() {
                let [a, b, c, d] = acc[r / 2].map(|sums| vreinterpretq_s64_s32(sums));
                let (low, high) = if r % 2 == 0 { (vuzp1q_s64(a, b), vuzp1q_s64(c, d)) } else { (vuzp2q_s64(a, b), vuzp2q_s64(c, d)) };
                *sums = [vreinterpretq_s32_s64(low), vreinterpretq_s32_s64(high)];
            }
            sums
        }
    }
}
