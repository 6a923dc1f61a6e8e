//! What the backward passes on the CPU share: gradients of 1x1 and depthwise convolutions on channels-last pictures, `[height, width, channels]`.
//!
//! A weight gradient of a 1x1 convolution is a matrix product on the inspector's kernels; the depthwise ones are plain loops. Knows
//! numbers only: neither networks nor training.

use cull::kernels::isa::Isa;
use cull::kernels::linear::{Activation, Linear};

/// Upper end of ReLU6.
pub(crate) const SIX: f32 = 6.0;
/// Pixels of a weight gradient summed at a time: their packed values stay in the second-level cache.
pub(crate) const PIXELS_AT_ONCE: usize = 512;
/// Channels whose sums are held in registers in a depthwise weight gradient: a kernel row of five times one vector of AVX2 or two of 128 bit.
const LANES: usize = 8;

/// A depthwise convolution with "SAME" output sizes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Filter {
    /// Channels, in and out; whole vectors of [`LANES`].
    pub channels: usize,
    /// Side of the kernel: 3 or 5.
    pub kernel: usize,
    /// 1 or 2.
    pub stride: usize,
    /// Zero padding above and to the left, px.
    pub pad: usize,
}

/// `[taps, channels]` -> `[channels, taps]`.
pub(crate) fn channels_first(weight: &[f32], channels: usize) -> Vec<f32> {
    transposed(weight, weight.len() / channels.max(1), channels)
}

/// `[rows, columns]` -> `[columns, rows]`.
pub(crate) fn transposed(from: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(rows * columns);
    for column in 0..columns {
        out.extend(from.iter().skip(column).step_by(columns).take(rows));
    }
    out
}

pub(crate) fn add(into: &mut [f32], from: &[f32]) {
    for (a, b) in into.iter_mut().zip(from) {
        *a += b;
    }
}

/// Sums over all rows of `[rows, columns]`, added to `into`.
pub(crate) fn add_columns(from: &[f32], columns: usize, into: &mut [f32]) {
    for row in from.chunks_exact(columns) {
        add(into, row);
    }
}

/// The gradient through ReLU6: none where the output lies on one of its ends.
pub(crate) fn mask_relu6(gradient: &mut [f32], output: &[f32]) {
    for (g, y) in gradient.iter_mut().zip(output) {
        *g = if *y > 0.0 && *y < SIX { *g } else { 0.0 };
    }
}

/// `narrow^T x wide`, added to `into` (`[narrow columns, wide columns]`): a weight gradient as a matrix product whose "weights" are the wide side.
pub(crate) fn outer(
    narrow: &[f32],
    narrow_columns: usize,
    wide: &[f32],
    wide_columns: usize,
    isa: Isa,
    sums: &mut Vec<f32>,
    into: &mut [f32],
) {
    let zero = vec![0.0; wide_columns];
    sums.clear();
    sums.resize(narrow_columns * wide_columns, 0.0);
    let places: Vec<usize> = (0..PIXELS_AT_ONCE).map(|p| p * narrow_columns).collect();
    for (narrow, wide) in narrow.chunks(PIXELS_AT_ONCE * narrow_columns).zip(wide.chunks(PIXELS_AT_ONCE * wide_columns)) {
        let pixels = wide.len() / wide_columns;
        // Row c of the product reads channel c of pixel p at `p * narrow_columns + c`: the transposed matrix without transposing it.
        Linear::new(wide, &zero, pixels, wide_columns, Activation::None, isa).run_scattered(narrow, &places[..pixels], 1, sums);
        add(into, sums);
    }
}

/// Kernel positions whose input position lies inside the picture, of output position `o` along an axis of `size` px.
fn taps(o: usize, filter: Filter, size: usize) -> std::ops::Range<usize> {
    let at = o * filter.stride;
    filter.pad.saturating_sub(at)..filter.kernel.min((size + filter.pad).saturating_sub(at))
}

/// Added to `into`, `[kernel, kernel, channels]`; `size` is the input's height and width.
pub(crate) fn depthwise_weight_gradient(filter: Filter, size: [usize; 2], input: &[f32], gradient: &[f32], into: &mut [f32]) {
    match (filter.kernel, filter.stride) {
        (3, 1) => weight_gradient::<3, 1>(filter, size, input, gradient, into),
        (3, 2) => weight_gradient::<3, 2>(filter, size, input, gradient, into),
        (5, 1) => weight_gradient::<5, 1>(filter, size, input, gradient, into),
        (5, 2) => weight_gradient::<5, 2>(filter, size, input, gradient, into),
        // Networks come from `teacher::parse`, which refuses other kernels, and from `detector::network`, which makes none.
        other => unreachable!("depthwise kernel and stride {other:?}"),
    }
}

fn weight_gradient<const K: usize, const S: usize>(
    filter: Filter,
    [height, width]: [usize; 2],
    input: &[f32],
    gradient: &[f32],
    into: &mut [f32],
) {
    let (channels, pad) = (filter.channels, filter.pad);
    assert_eq!(channels % LANES, 0, "channels come in whole vectors");
    let (rows, columns) = (height / S, width / S);
    // Output columns whose whole kernel row lies inside the picture: no test per tap there.
    let inner = pad.div_ceil(S)..if width + pad >= K { ((width + pad - K) / S + 1).min(columns) } else { 0 };
    for oy in 0..rows {
        let line = &gradient[oy * columns * channels..(oy + 1) * columns * channels];
        for ky in taps(oy, filter, height) {
            let row = &input[(oy * S + ky - pad) * width * channels..][..width * channels];
            let weights = &mut into[ky * K * channels..(ky + 1) * K * channels];
            for c in (0..channels).step_by(LANES) {
                // The sums of one kernel row and a few channels stay in registers along the picture's row.
                let mut sums = [[0f32; LANES]; K];
                for ox in 0..columns {
                    let Some(g) = line[ox * channels + c..].first_chunk::<LANES>() else { continue };
                    if inner.contains(&ox) {
                        let from = &row[(ox * S - pad) * channels + c..];
                        for (kx, sum) in sums.iter_mut().enumerate() {
                            if let Some(v) = from[kx * channels..].first_chunk::<LANES>() {
                                multiply_add(sum, v, g);
                            }
                        }
                        continue;
                    }
                    for kx in taps(ox, filter, width) {
                        if let Some(v) = row[(ox * S + kx - pad) * channels + c..].first_chunk::<LANES>() {
                            multiply_add(&mut sums[kx], v, g);
                        }
                    }
                }
                for (kx, sum) in sums.iter().enumerate() {
                    for (w, s) in weights[kx * channels + c..kx * channels + c + LANES].iter_mut().zip(sum) {
                        *w += s;
                    }
                }
            }
        }
    }
}

#[inline(always)]
fn multiply_add(sum: &mut [f32; LANES], a: &[f32; LANES], b: &[f32; LANES]) {
    for ((s, a), b) in sum.iter_mut().zip(a).zip(b) {
        *s += a * b;
    }
}

/// Replaces `into`, `[height, width, channels]` of the input's size; any stride. `weight` is `[kernel, kernel, channels]`.
pub(crate) fn depthwise_input_gradient(filter: Filter, [height, width]: [usize; 2], weight: &[f32], gradient: &[f32], into: &mut [f32]) {
    let Filter { channels, kernel, stride, pad } = filter;
    let (rows, columns) = (height / stride, width / stride);
    into.fill(0.0);
    for oy in 0..rows {
        for ky in taps(oy, filter, height) {
            let row = &mut into[(oy * stride + ky - pad) * width * channels..][..width * channels];
            for ox in 0..columns {
                let g = &gradient[(oy * columns + ox) * channels..][..channels];
                for kx in taps(ox, filter, width) {
                    let out = &mut row[(ox * stride + kx - pad) * channels..][..channels];
                    let w = &weight[(ky * kernel + kx) * channels..][..channels];
                    for ((o, g), w) in out.iter_mut().zip(g).zip(w) {
                        *o += g * w;
                    }
                }
            }
        }
    }
}
