//! aarch64: plain NEON, SDOT and SMMLA.
//!
//! Inputs are taken as signed bytes, 128 below their unsigned step, and so is the zero point: the sums come out as the same integers.

use super::super::neon8::{Dot, I8mm, Plain, Product, WIDTH};
use super::{Activation, BLOCK, Linear8, Scratch8, padded, quantizer};
use std::arch::aarch64::*;

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
        // SAFETY: the scratch holds `BLOCK` (an even number) rows of `stride` bytes.
        unsafe { (scratch.scale[r], scratch.zero[r]) = quantize::<P>(row, scratch.bytes.as_mut_ptr().add(P::row(r, stride)).cast()) }
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
    let groups = layer.inputs.div_ceil(P::DEPTH);
    let n = (layer.outputs - at).min(WIDTH);
    // SAFETY: this function's contract; a short last panel goes through a local buffer so that nothing passes the row's end.
    unsafe {
        let weights = layer.packed.as_ptr().add(at * groups * P::DEPTH);
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
