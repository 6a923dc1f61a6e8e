//! aarch64: plain NEON (SMULL, SMLAL, SADALP), the dot-product extension (SDOT) and the int8 matrix extension (SMMLA).
//!
//! Inputs are taken as signed bytes, 128 below their unsigned step, and so is the zero point: the sums come out as the same integers. SDOT and
//! SMMLA are written as assembly because their intrinsics are not stable yet; each is one instruction on registers the compiler chooses.

use super::{Activation, BLOCK, Layout, Linear8, Scratch8, padded, quantizer};
use std::arch::aarch64::*;
use std::arch::asm;

/// Outputs of a panel, the same in all three layouts.
const WIDTH: usize = 8;

/// At most `BLOCK` rows with plain NEON.
///
/// # Safety
/// Lengths as `Linear8::run` checks them.
#[target_feature(enable = "neon")]
pub(super) unsafe fn neon(layer: &Linear8, a: &[f32], residual: Option<&[f32]>, out: &mut [f32], scratch: &mut Scratch8) {
    // SAFETY: this function's contract.
    unsafe {
        if layer.has_lowest {
            block::<Plain<true>>(layer, a, residual, out, scratch)
        } else {
            block::<Plain<false>>(layer, a, residual, out, scratch)
        }
    }
}

/// At most `BLOCK` rows with SDOT.
///
/// # Safety
/// The dot-product extension must be there; lengths as `Linear8::run` checks them.
#[target_feature(enable = "neon,dotprod")]
pub(super) unsafe fn dot(layer: &Linear8, a: &[f32], residual: Option<&[f32]>, out: &mut [f32], scratch: &mut Scratch8) {
    // SAFETY: this function's contract.
    unsafe { block::<Dot>(layer, a, residual, out, scratch) }
}

/// At most `BLOCK` rows with SMMLA.
///
/// # Safety
/// The int8 matrix extension must be there; lengths as `Linear8::run` checks them.
#[target_feature(enable = "neon,i8mm")]
pub(super) unsafe fn i8mm(layer: &Linear8, a: &[f32], residual: Option<&[f32]>, out: &mut [f32], scratch: &mut Scratch8) {
    // SAFETY: this function's contract.
    unsafe { block::<I8mm>(layer, a, residual, out, scratch) }
}

/// One way of multiplying quantized rows with a panel of weights.
///
/// # Safety
/// Callers must have detected the instruction set.
unsafe trait Product {
    /// Rows of the largest tile: what fits the 32 registers.
    const ROWS: usize;
    /// Bytes from eight inputs of a row to the next eight: 8, or 16 where two rows lie interleaved.
    const STEP: usize;

    /// Sums of `ROWS` rows (2, 4 or 8) times the eight outputs of a panel.
    ///
    /// # Safety
    /// `weights` is a panel of `groups` groups in this product's layout, `rows` the first (even) of the quantized rows, each `stride` bytes long.
    unsafe fn tile<const ROWS: usize>(weights: *const i8, rows: *const i8, stride: usize, groups: usize) -> [[int32x4_t; 2]; ROWS];
}

/// At most `BLOCK` rows.
///
/// # Safety
/// `P`'s instruction set must be there; lengths as `Linear8::run` checks them.
#[inline(always)]
unsafe fn block<P: Product>(layer: &Linear8, a: &[f32], residual: Option<&[f32]>, out: &mut [f32], scratch: &mut Scratch8) {
    let stride = padded(layer.inputs);
    let rows = a.len() / layer.inputs;
    debug_assert!(rows <= BLOCK);
    for (r, row) in a.chunks_exact(layer.inputs).enumerate() {
        // Interleaved rows: the second of a pair starts eight bytes after the first.
        let at = if P::STEP == 8 { r * stride } else { (r & !1) * stride + (r & 1) * 8 };
        // SAFETY: the scratch holds `BLOCK` (an even number) rows of `stride` bytes.
        unsafe { (scratch.scale[r], scratch.zero[r]) = quantize::<P>(row, scratch.bytes.as_mut_ptr().add(at).cast()) }
    }
    let residual = residual.map_or(std::ptr::null(), <[f32]>::as_ptr);
    let out = out.as_mut_ptr();
    for panel in 0..layer.bias.len() / WIDTH {
        let mut row = 0;
        // SAFETY: `row` is even and below `rows`; a tile may reach over the last row into the scratch (never beyond `BLOCK`), not into `out`.
        unsafe {
            while P::ROWS == 8 && row + 8 <= rows {
                tile::<P, 8>(layer, scratch, row, rows, panel, residual, out);
                row += 8;
            }
            while row + 4 <= rows {
                tile::<P, 4>(layer, scratch, row, rows, panel, residual, out);
                row += 4;
            }
            while row < rows {
                tile::<P, 2>(layer, scratch, row, rows, panel, residual, out);
                row += 2;
            }
        }
    }
}

/// One row to signed bytes, in groups of eight inputs: the step's size and the zero point of the signed bytes.
///
/// # Safety
/// `to` must have room for the row, rounded up to whole groups.
#[inline(always)]
unsafe fn quantize<P: Product>(row: &[f32], to: *mut i8) -> (f32, i32) {
    let groups = row.chunks_exact(8);
    let rest = groups.remainder();
    let mut last = [0.0f32; 8];
    last[..rest.len()].copy_from_slice(rest);
    // SAFETY: all loads are of eight values of a group or of `last`; stores by this function's contract.
    unsafe {
        let zero = vdupq_n_f32(0.0);
        let (mut low, mut high) = ([zero; 2], [zero; 2]);
        for group in groups.clone().map(<[f32]>::as_ptr).chain(std::iter::once(last.as_ptr())) {
            // Not-a-number stays in both and shows below.
            for half in 0..2 {
                let x = vld1q_f32(group.add(4 * half));
                low[half] = vminq_f32(low[half], x);
                high[half] = vmaxq_f32(high[half], x);
            }
        }
        let (low, high) = (vminvq_f32(vminq_f32(low[0], low[1])), vmaxvq_f32(vmaxq_f32(high[0], high[1])));
        let (inverse, scale, zero) = quantizer(low, high, low.is_finite() && high.is_finite());
        let zero = zero - 128;
        // The zero point is at most 255 - 128, and the narrowings saturate as `step` clamps.
        let zeros = vdupq_n_s16(zero as i16);
        for (g, group) in groups.map(<[f32]>::as_ptr).chain((!rest.is_empty()).then_some(last.as_ptr())).enumerate() {
            let near = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(group), inverse));
            let far = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(group.add(4)), inverse));
            let steps = vqaddq_s16(vqmovn_high_s32(vqmovn_s32(near), far), zeros);
            vst1_s8(to.add(g * P::STEP), vqmovn_s16(steps));
        }
        (scale, zero)
    }
}

/// `ROWS` rows times one panel, from the sums to the output; rows from `rows` on are not stored.
///
/// # Safety
/// `P`'s instruction set must be there; rows `row..row + ROWS` lie in `scratch`, those below `rows` are quantized and lie within `out` and
/// `residual` (null for none); `panel` is one of the layer's.
#[inline(always)]
unsafe fn tile<P: Product, const ROWS: usize>(
    layer: &Linear8,
    scratch: &Scratch8,
    row: usize,
    rows: usize,
    panel: usize,
    residual: *const f32,
    out: *mut f32,
) {
    let (at, stride) = (panel * WIDTH, padded(layer.inputs));
    let groups = layer.inputs.div_ceil(Layout::of(layer.isa).depth);
    let n = (layer.outputs - at).min(WIDTH);
    // SAFETY: this function's contract; a short last panel goes through a local buffer so that nothing passes the row's end.
    unsafe {
        let weights = layer.packed.as_ptr().add(at * groups * Layout::of(layer.isa).depth);
        let acc = P::tile::<ROWS>(weights, scratch.bytes.as_ptr().add(row * stride).cast(), stride, groups);
        let pair = |values: &[f32]| [vld1q_f32(values.as_ptr().add(at)), vld1q_f32(values.as_ptr().add(at + 4))];
        let (scales, biases) = (pair(&layer.scale), pair(&layer.bias));
        let sums = [vld1q_s32(layer.sums.as_ptr().add(at)), vld1q_s32(layer.sums.as_ptr().add(at + 4))];
        for (r, acc) in acc.iter().enumerate().take(rows - row) {
            let place = (row + r) * layer.outputs + at;
            let (scale, zero) = (scratch.scale[row + r], scratch.zero[row + r]);
            let mut y = [vdupq_n_f32(0.0); 2];
            for half in 0..2 {
                let sum = vcvtq_f32_s32(vmlsq_n_s32(acc[half], sums[half], zero));
                let value = vfmaq_f32(biases[half], sum, vmulq_n_f32(scales[half], scale));
                // NEON's min and max keep NaN.
                y[half] = match layer.activation {
                    Activation::None => value,
                    Activation::Relu => vmaxq_f32(vdupq_n_f32(0.0), value),
                    Activation::Relu6 => vminq_f32(vdupq_n_f32(6.0), vmaxq_f32(vdupq_n_f32(0.0), value)),
                };
            }
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
}

/// Products in 16 bit, two of them summed before they are widened; with `LOWEST` each is widened, since two of -128 x -128 overflow.
struct Plain<const LOWEST: bool>;

// SAFETY: every aarch64 has NEON.
unsafe impl<const LOWEST: bool> Product for Plain<LOWEST> {
    const ROWS: usize = 4;
    const STEP: usize = 8;

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
struct Dot;

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
struct I8mm;

// SAFETY: `smmla` is the int8 matrix extension, which the caller detected (trait contract).
unsafe impl Product for I8mm {
    const ROWS: usize = 8;
    const STEP: usize = 16;

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
