//! aarch64: products by plain NEON, SDOT or SMMLA, the depthwise convolution by SMLAL: 16 bit times 16 bit, summed in 32.
//!
//! Bytes are signed here, 128 below their unsigned step, as in [`super::super::linear8`]. The ring is the generic one: row by row, channels last.

use super::super::neon8::{Dot, I8mm, Plain, Product, WIDTH, extremes, quantize, store_columns};
use super::{BLOCK, Bottleneck8, BottleneckScratch8, asymmetric, ring};
use std::arch::aarch64::*;

macro_rules! entry {
    ($fill:ident, $line:ident, $product:ty, $features:literal) => {
        /// One row of the input, expanded, into the ring; without one, zeros. Whether all of it was finite.
        ///
        /// # Safety
        /// The instruction set must be there; `row` is a row of the layer's input, `slot` one of the ring's, `scratch` fits the layer.
        #[target_feature(enable = $features)]
        pub(super) unsafe fn $fill(layer: &Bottleneck8, row: Option<&[f32]>, slot: usize, scratch: &mut BottleneckScratch8) -> bool {
            // SAFETY: this function's contract.
            unsafe { fill::<$product>(layer, row, slot, scratch) }
        }

        /// One row of the output from the ring, whose row `start` is the window's first.
        ///
        /// # Safety
        /// The instruction set must be there; `line` and `residual` are a row of the layer's output, `scratch` fits the layer.
        #[target_feature(enable = $features)]
        pub(super) unsafe fn $line(
            layer: &Bottleneck8,
            start: usize,
            residual: Option<&[f32]>,
            line: &mut [f32],
            scratch: &mut BottleneckScratch8,
        ) {
            // SAFETY: this function's contract.
            unsafe {
                match (layer.window.kernel[1], layer.window.stride[1]) {
                    (3, 1) => depthwise::<$product, 8, 3, 1>(layer, start, scratch),
                    (5, 1) => depthwise::<$product, 8, 5, 1>(layer, start, scratch),
                    (3, 2) => depthwise::<$product, 4, 3, 2>(layer, start, scratch),
                    (5, 2) => depthwise::<$product, 4, 5, 2>(layer, start, scratch),
                    _ => depthwise::<$product, 1, 0, 0>(layer, start, scratch),
                }
                project::<$product>(layer, residual, line, scratch);
            }
        }
    };
}

// A weight of -128 needs the careful form of plain NEON; where `pays` says no to plain NEON anyway, one form is enough.
entry!(fill_neon, line_neon, Plain<true>, "neon");
entry!(fill_dot, line_dot, Dot, "neon,dotprod");
entry!(fill_i8mm, line_i8mm, I8mm, "neon,i8mm");

/// # Safety
/// `P`'s instruction set must be there; otherwise as `fill_neon`.
#[inline(always)]
unsafe fn fill<P: Product>(layer: &Bottleneck8, row: Option<&[f32]>, slot: usize, scratch: &mut BottleneckScratch8) -> bool {
    let (w, inputs) = (layer.window, layer.inputs());
    let (stride, pixels) = (w.channels.next_multiple_of(BLOCK), w.input[1]);
    let columns = &mut scratch.ring[(slot * layer.columns() + w.pad[1]) * stride..][..pixels * stride];
    let Some(row) = row else {
        columns.fill(0);
        return true;
    };
    // SAFETY: this function's contract: `scratch.input` has room for an even number of pixels of `depth` bytes; the ring's pixels have whole
    // blocks of channels, as have scale, bias and sums.
    unsafe {
        let Some(expand) = &layer.expand else {
            return clamp(row, inputs, &layer.factor, columns, stride);
        };
        let depth = inputs.next_multiple_of(8);
        let bytes: *mut i8 = scratch.input.as_mut_ptr().cast();
        // Not-a-number stays in the extremes and shows here.
        let (low, high) = extremes(row);
        let finite = low.is_finite() && high.is_finite();
        let (inverse, size, zero) = asymmetric(low, high, finite);
        let zero = zero - 128;
        for (p, pixel) in row.chunks_exact(inputs).enumerate() {
            quantize(pixel, inverse, zero, bytes.add(P::row(p, depth)), P::STEP);
        }
        let groups = inputs.div_ceil(P::DEPTH);
        let to = columns.as_mut_ptr();
        for at in (0..w.channels).step_by(WIDTH) {
            let weights = expand.packed.as_ptr().add(at * groups * P::DEPTH);
            let less = pair(|half| vmulq_n_s32(vld1q_s32(expand.sums.as_ptr().add(at + 4 * half)), zero));
            let scale = pair(|half| vmulq_n_f32(vld1q_f32(expand.scale.as_ptr().add(at + 4 * half)), size));
            let bias = pair(|half| vld1q_f32(expand.bias.as_ptr().add(at + 4 * half)));
            macro_rules! tile {
                ($rows:literal, $pixel:expr) => {
                    let acc = P::tile::<$rows>(weights, bytes.add($pixel * depth), depth, groups);
                    for (n, acc) in acc.iter().enumerate().take(pixels - $pixel) {
                        let [low, high] = pair(|half| {
                            vcvtnq_s32_f32(vfmaq_f32(bias[half], vcvtq_f32_s32(vsubq_s32(acc[half], less[half])), scale[half]))
                        });
                        // Narrowing saturates at the top of the ring.
                        let step = vmaxq_s16(vqmovn_high_s32(vqmovn_s32(low), high), vdupq_n_s16(0));
                        vst1q_s16(to.add(($pixel + n) * stride + at), step);
                    }
                };
            }
            let mut pixel = 0;
            while P::ROWS == 8 && pixel + 8 <= pixels {
                tile!(8, pixel);
                pixel += 8;
            }
            while pixel + 4 <= pixels {
                tile!(4, pixel);
                pixel += 4;
            }
            while pixel < pixels {
                tile!(2, pixel);
                pixel += 2;
            }
        }
        finite
    }
}

/// `make` for both halves of eight columns.
#[inline(always)]
fn pair<T>(make: impl Fn(usize) -> T) -> [T; 2] {
    [make(0), make(1)]
}

/// Without an expansion: one row of the input to steps of the ring.
///
/// # Safety
/// `row` is whole pixels of `inputs` values, `factor` has as many, rounded up to whole blocks, and so has each pixel of `columns`.
#[inline(always)]
unsafe fn clamp(row: &[f32], inputs: usize, factor: &[f32], columns: &mut [i16], stride: usize) -> bool {
    // SAFETY: whole vectors are loaded below `inputs` only; the rest goes through local buffers.
    unsafe {
        let mut bad = vdupq_n_f32(0.0);
        for (pixel, to) in row.chunks_exact(inputs).zip(columns.chunks_exact_mut(stride)) {
            for c in (0..inputs).step_by(4) {
                let mut last = [0.0f32; 4];
                let x = match pixel.get(c..c + 4) {
                    Some(four) => vld1q_f32(four.as_ptr()),
                    None => {
                        last[..inputs - c].copy_from_slice(&pixel[c..]);
                        vld1q_f32(last.as_ptr())
                    }
                };
                // 0 for a number, NaN for infinity and NaN, which stays in the sum.
                bad = vaddq_f32(bad, vsubq_f32(x, x));
                let step = vqmovn_s32(vcvtnq_s32_f32(vmulq_f32(x, vld1q_f32(factor.as_ptr().add(c)))));
                vst1_s16(to.as_mut_ptr().add(c), vmax_s16(step, vdup_n_s16(0)));
            }
        }
        vaddvq_f32(bad) == 0.0
    }
}

/// The depthwise convolution of one output row, to signed bytes in `P`'s layout. Where the kernel is `K` wide and goes by `S` columns, `N` pixels
/// share each value of the ring; for other kernels `K` is 0.
///
/// # Safety
/// As `line_neon`; `K` and `S` are the window's or 0.
#[inline(always)]
unsafe fn depthwise<P: Product, const N: usize, const K: usize, const S: usize>(
    layer: &Bottleneck8,
    start: usize,
    scratch: &mut BottleneckScratch8,
) {
    let w = layer.window;
    let pixels = w.output[1];
    // SAFETY: this function's contract; strips end at or before `pixels`.
    unsafe {
        let mut ox = 0;
        while K > 0 && ox + N <= pixels {
            strip::<P, N, K, S>(layer, start, ox, scratch);
            ox += N;
        }
        while ox < pixels {
            strip::<P, 1, K, S>(layer, start, ox, scratch);
            ox += 1;
        }
    }
}

/// Columns of the ring that the widest strip sees: 8 pixels by a kernel of 5.
const COLUMNS: usize = 12;

/// # Safety
/// As [`depthwise`], for pixels `ox..ox + N`.
#[inline(always)]
unsafe fn strip<P: Product, const N: usize, const K: usize, const S: usize>(
    layer: &Bottleneck8,
    start: usize,
    ox: usize,
    scratch: &mut BottleneckScratch8,
) {
    let w = layer.window;
    let (stride, rows) = (w.channels.next_multiple_of(BLOCK), ring(&w));
    let [high, wide] = w.kernel;
    let line = layer.columns() * stride;
    let to: *mut i8 = scratch.row.as_mut_ptr().cast();
    // SAFETY: this function's contract; the ring has `columns()` columns, which is where the last window ends at most.
    unsafe {
        for c in (0..w.channels).step_by(WIDTH) {
            let mut acc = [[vdupq_n_s32(0); 2]; N];
            for ky in 0..high {
                let slot = if start + ky < rows { start + ky } else { start + ky - rows };
                let from = scratch.ring.as_ptr().add(slot * line + ox * w.stride[1] * stride + c);
                let weights = layer.depthwise.as_ptr().add(ky * wide * stride + c);
                if K > 0 {
                    let mut columns = [vdupq_n_s16(0); COLUMNS];
                    for (i, column) in columns.iter_mut().enumerate().take(S * (N - 1) + K) {
                        *column = vld1q_s16(from.add(i * stride));
                    }
                    for kx in 0..K {
                        let weight = vld1q_s16(weights.add(kx * stride));
                        for (n, acc) in acc.iter_mut().enumerate() {
                            let x = columns[n * S + kx];
                            acc[0] = vmlal_s16(acc[0], vget_low_s16(x), vget_low_s16(weight));
                            acc[1] = vmlal_high_s16(acc[1], x, weight);
                        }
                    }
                } else {
                    for kx in 0..wide {
                        let weight = vld1q_s16(weights.add(kx * stride));
                        for (n, acc) in acc.iter_mut().enumerate() {
                            let x = vld1q_s16(from.add((n * w.stride[1] + kx) * stride));
                            acc[0] = vmlal_s16(acc[0], vget_low_s16(x), vget_low_s16(weight));
                            acc[1] = vmlal_high_s16(acc[1], x, weight);
                        }
                    }
                }
            }
            let scale = pair(|half| vld1q_f32(layer.scale.as_ptr().add(c + 4 * half)));
            let bias = pair(|half| vld1q_f32(layer.bias.as_ptr().add(c + 4 * half)));
            for (n, acc) in acc.iter().enumerate() {
                let [low, high] = pair(|half| vcvtnq_s32_f32(vfmaq_f32(bias[half], vcvtq_f32_s32(acc[half]), scale[half])));
                let byte = vqmovun_s16(vqmovn_high_s32(vqmovn_s32(low), high));
                let signed = vreinterpret_s8_u8(veor_u8(byte, vdup_n_u8(0x80)));
                vst1_s8(to.add(P::row(ox + n, stride) + c / 8 * P::STEP), signed);
            }
        }
    }
}

/// The projection of one output row.
///
/// # Safety
/// As `line_neon`; `scratch.row` holds the depthwise convolution's bytes.
#[inline(always)]
unsafe fn project<P: Product>(layer: &Bottleneck8, residual: Option<&[f32]>, line: &mut [f32], scratch: &mut BottleneckScratch8) {
    let p = &layer.project;
    let (pixels, stride) = (layer.window.output[1], p.inputs.next_multiple_of(BLOCK));
    let groups = p.inputs.div_ceil(P::DEPTH);
    let residual = residual.map_or(std::ptr::null(), <[f32]>::as_ptr);
    let (bytes, out): (*const i8, _) = (scratch.row.as_ptr().cast(), line.as_mut_ptr());
    // SAFETY: this function's contract; a tile may reach over the last pixel into the scratch, which has an even number of them, not into `out`.
    unsafe {
        for at in (0..p.outputs).step_by(WIDTH) {
            let n = (p.outputs - at).min(WIDTH);
            let weights = p.packed.as_ptr().add(at * groups * P::DEPTH);
            // Back from signed bytes: 128 for each weight.
            let more = pair(|half| vshlq_n_s32::<7>(vld1q_s32(p.sums.as_ptr().add(at + 4 * half))));
            let scale = pair(|half| vld1q_f32(p.scale.as_ptr().add(at + 4 * half)));
            let bias = pair(|half| vld1q_f32(p.bias.as_ptr().add(at + 4 * half)));
            macro_rules! tile {
                ($rows:literal, $pixel:expr) => {
                    let acc = P::tile::<$rows>(weights, bytes.add($pixel * stride), stride, groups);
                    for (i, acc) in acc.iter().enumerate().take(pixels - $pixel) {
                        let y = pair(|half| vfmaq_f32(bias[half], vcvtq_f32_s32(vaddq_s32(acc[half], more[half])), scale[half]));
                        store_columns(y, n, residual, out, ($pixel + i) * p.outputs + at);
                    }
                };
            }
            let mut pixel = 0;
            while P::ROWS == 8 && pixel + 8 <= pixels {
                tile!(8, pixel);
                pixel += 8;
            }
            while pixel + 4 <= pixels {
                tile!(4, pixel);
                pixel += 4;
            }
            while pixel < pixels {
                tile!(2, pixel);
                pixel += 2;
            }
        }
    }
}
