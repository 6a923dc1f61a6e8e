//! aarch64: plain NEON, SDOT and SMMLA.
//!
//! Inputs are taken as signed bytes, 128 below their unsigned step, and so is the zero point: the sums come out as the same integers.

use super::super::neon8::{Dot, I8mm, Plain, Product, WIDTH, extremes, quantize, store_columns};
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
        // Not-a-number stays in the extremes and shows here.
        let (low, high) = extremes(row);
        let (inverse, scale, zero) = quantizer(low, high, low.is_finite() && high.is_finite());
        (scratch.scale[r], scratch.zero[r]) = (scale, zero - 128);
        // SAFETY: the scratch holds `BLOCK` (an even number) rows of `stride` bytes.
        unsafe { quantize(row, inverse, zero - 128, scratch.bytes.as_mut_ptr().add(P::row(r, stride)).cast(), P::STEP) }
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
    // SAFETY: this function's contract.
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
            store_columns(y, n, residual, out, place);
        }
    }
}
