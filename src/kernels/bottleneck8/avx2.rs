//! x86-64 without AVX-512: AVX2 with VNNI, plain AVX2. Ring and depthwise weights lie as for AVX-512, a vector of which is two here.

use super::super::ymm::{self, Dot, LANES};
use super::{BLOCK, Bottleneck8, BottleneckScratch8, PAIR, Product, RING_TOP, TOP, asymmetric, ring};
use std::arch::x86_64::*;

/// Pixels whose sums stay in registers: 6 x 2 vectors, 2 weights, 1 input, and a product where there is no VNNI.
const PIXELS: usize = 6;

macro_rules! entry {
    ($fill:ident, $line:ident, $dot:ty, $features:literal) => {
        /// One row of the input, expanded, into the ring; without one, zeros. Whether all of it was finite.
        ///
        /// # Safety
        /// The instruction set must be there; `row` is a row of the layer's input, `slot` one of the ring's, `scratch` fits the layer.
        #[target_feature(enable = $features)]
        pub(super) unsafe fn $fill(layer: &Bottleneck8, row: Option<&[f32]>, slot: usize, scratch: &mut BottleneckScratch8) -> bool {
            // SAFETY: this function's contract.
            unsafe {
                if slot % PAIR == 0 {
                    fill::<$dot, false>(layer, row, slot, scratch)
                } else {
                    fill::<$dot, true>(layer, row, slot, scratch)
                }
            }
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
                // Inlined with the sizes as constants.
                match (layer.window.kernel[1], ring(&layer.window) / PAIR) {
                    (3, 2) => depthwise::<$dot>(layer, start, 3, 2, scratch),
                    (5, 3) => depthwise::<$dot>(layer, start, 5, 3, scratch),
                    (wide, groups) => depthwise::<$dot>(layer, start, wide, groups, scratch),
                }
                project::<$dot>(layer, residual, line, scratch);
            }
        }
    };
}

entry!(fill_vnni, line_vnni, ymm::Vnni, "avx2,fma,avxvnni");
entry!(fill_plain, line_plain, ymm::Plain, "avx2,fma");

/// Eight channels of a pixel into one of the two rows (`ODD`: the second) that share the vector `to`: floats that are steps after rounding and
/// clamping.
///
/// # Safety
/// AVX2 must be there; `to` is a vector of the ring.
#[inline(always)]
unsafe fn store<const ODD: bool>(to: *mut i16, values: __m256) {
    // SAFETY: this function's contract.
    unsafe {
        // What does not fit 32 bit would become the lowest number.
        let steps = _mm256_cvtps_epi32(_mm256_min_ps(values, _mm256_set1_ps(RING_TOP)));
        let steps = _mm256_max_epi32(steps, _mm256_setzero_si256());
        let other = _mm256_loadu_si256(to.cast());
        let both = if ODD {
            _mm256_blend_epi16::<0b1010_1010>(other, _mm256_slli_epi32::<16>(steps))
        } else {
            _mm256_blend_epi16::<0b0101_0101>(other, steps)
        };
        _mm256_storeu_si256(to.cast(), both);
    }
}

/// # Safety
/// `D`'s instruction set must be there (inlined into a caller that enables it), `slot` is odd if `ODD`; otherwise as `fill_plain`.
#[inline(always)]
unsafe fn fill<D: Dot, const ODD: bool>(layer: &Bottleneck8, row: Option<&[f32]>, slot: usize, scratch: &mut BottleneckScratch8) -> bool {
    let (w, inputs) = (layer.window, layer.inputs());
    let (blocks, groups) = (w.channels.div_ceil(BLOCK), ring(&w) / PAIR);
    let (block, column) = (groups * BLOCK * PAIR, blocks * groups * BLOCK * PAIR);
    // SAFETY: this function's contract; the picture's columns begin `pad` columns into the ring.
    unsafe {
        let to = scratch.ring.as_mut_ptr().add(w.pad[1] * column + slot / PAIR * BLOCK * PAIR);
        let Some(row) = row else {
            for pixel in 0..w.input[1] {
                for half in 0..2 * blocks {
                    store::<ODD>(to.add(pixel * column + half / 2 * block + half % 2 * LANES * PAIR), _mm256_setzero_ps());
                }
            }
            return true;
        };
        let Some(expand) = &layer.expand else {
            let mut bad = _mm256_setzero_ps();
            for pixel in 0..w.input[1] {
                for half in 0..2 * blocks {
                    // Beyond the pixel, whose inputs are a multiple of four, nothing is loaded: zeros.
                    let left = inputs.saturating_sub(half * LANES);
                    let from = row.as_ptr().add(pixel * inputs + (half * LANES).min(inputs));
                    let x = ymm::load(from, left);
                    bad = _mm256_add_ps(bad, _mm256_sub_ps(x, x));
                    let x = _mm256_mul_ps(x, _mm256_loadu_ps(layer.factor.as_ptr().add(half * LANES)));
                    store::<ODD>(to.add(pixel * column + half / 2 * block + half % 2 * LANES * PAIR), x);
                }
            }
            return ymm::all_numbers(bad);
        };
        let (finite, size, zero) = ymm::quantize::<D>(row, scratch.input.as_mut_ptr(), row.len(), asymmetric);
        for at in 0..blocks {
            let to = to.add(at * block);
            let mut pixel = 0;
            while pixel + PIXELS <= w.input[1] {
                expand_tile::<D, PIXELS, ODD>(expand, scratch.input.as_ptr(), pixel, at, size, zero, to, column);
                pixel += PIXELS;
            }
            while pixel < w.input[1] {
                expand_tile::<D, 1, ODD>(expand, scratch.input.as_ptr(), pixel, at, size, zero, to, column);
                pixel += 1;
            }
        }
        finite
    }
}

/// Block `at` of the channels for pixels `pixel..pixel + N`; `to` is that block's first vector of the row, pixels are `column` values apart.
///
/// # Safety
/// As [`fill`]; `steps` holds the row's pixels.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn expand_tile<D: Dot, const N: usize, const ODD: bool>(
    expand: &Product,
    steps: *const u8,
    pixel: usize,
    at: usize,
    size: f32,
    zero: i32,
    to: *mut i16,
    column: usize,
) {
    let (stride, groups) = (expand.inputs * D::BYTES, expand.inputs / D::DEPTH);
    // SAFETY: this function's contract.
    unsafe {
        let start: [__m256i; 2] = std::array::from_fn(|half| {
            let sums = _mm256_loadu_si256(expand.sums.as_ptr().add(at * BLOCK + half * LANES).cast());
            _mm256_mullo_epi32(_mm256_set1_epi32(zero.wrapping_neg()), sums)
        });
        let mut sums = [start; N];
        ymm::dot::<D, N>(&mut sums, steps.add(pixel * stride), stride, expand.packed.as_ptr().add(at * groups * 64), groups);
        for half in 0..2 {
            let from = at * BLOCK + half * LANES;
            let scale = _mm256_mul_ps(_mm256_set1_ps(size), _mm256_loadu_ps(expand.scale.as_ptr().add(from)));
            let bias = _mm256_loadu_ps(expand.bias.as_ptr().add(from));
            for (n, sums) in sums.iter().enumerate() {
                let value = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[half]), scale, bias);
                store::<ODD>(to.add((pixel + n) * column + half * LANES * PAIR), value);
            }
        }
    }
}

/// From sums of the depthwise convolution to eight steps of a byte at `to`.
///
/// # Safety
/// AVX2 must be there; room for eight steps of `D` at `to`.
#[inline(always)]
unsafe fn store_steps<D: Dot>(sum: __m256i, scale: __m256, bias: __m256, to: *mut u8) {
    // SAFETY: this function's contract.
    unsafe {
        // What does not fit 32 bit would become the lowest number.
        let value = _mm256_min_ps(_mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), scale, bias), _mm256_set1_ps(TOP));
        let step = _mm256_max_epi32(_mm256_cvtps_epi32(value), _mm256_setzero_si256());
        let words = _mm_packs_epi32(_mm256_castsi256_si128(step), _mm256_extracti128_si256::<1>(step));
        match D::BYTES {
            1 => _mm_storel_epi64(to.cast(), _mm_packus_epi16(words, words)),
            _ => _mm_storeu_si128(to.cast(), words),
        }
    }
}

/// The depthwise convolution of one output row, with a kernel `wide` wide and `groups` pairs of rows high, eight channels of four pixels at a time.
///
/// # Safety
/// As [`fill`].
#[inline(always)]
unsafe fn depthwise<D: Dot>(layer: &Bottleneck8, start: usize, wide: usize, groups: usize, scratch: &mut BottleneckScratch8) {
    let w = layer.window;
    let blocks = w.channels.div_ceil(BLOCK);
    // SAFETY: this function's contract; tiles end at or before the row's end.
    unsafe {
        for block in 0..blocks {
            let mut pixel = 0;
            while pixel + 4 <= w.output[1] {
                depthwise_tile::<D, 4>(layer, start, [wide, groups], block, pixel, scratch);
                pixel += 4;
            }
            while pixel < w.output[1] {
                depthwise_tile::<D, 1>(layer, start, [wide, groups], block, pixel, scratch);
                pixel += 1;
            }
        }
    }
}

/// Block `block` of the channels of pixels `pixel..pixel + P`. Weights are loaded once for all of them: those of a 5x5 kernel alone would fill
/// the registers. Eight sums grow in turns, since each has to wait for its last instruction.
///
/// # Safety
/// As [`depthwise`].
#[inline(always)]
unsafe fn depthwise_tile<D: Dot, const P: usize>(
    layer: &Bottleneck8,
    start: usize,
    [wide, groups]: [usize; 2],
    block: usize,
    pixel: usize,
    scratch: &mut BottleneckScratch8,
) {
    let w = layer.window;
    let blocks = w.channels.div_ceil(BLOCK);
    let vector = BLOCK * PAIR;
    let column = blocks * groups * vector;
    let half = LANES * PAIR;
    // SAFETY: this function's contract; the ring has `columns()` columns, which is where the last window ends at most.
    unsafe {
        let weights = layer.depthwise.as_ptr().add((start * blocks + block) * wide * groups * vector);
        let from = scratch.ring.as_ptr().add(pixel * w.stride[1] * column + block * groups * vector);
        let mut sums = [[_mm256_setzero_si256(); 2]; P];
        for x in 0..wide {
            for g in 0..groups {
                let weights = weights.add((x * groups + g) * vector);
                let weights = [_mm256_loadu_si256(weights.cast()), _mm256_loadu_si256(weights.add(half).cast())];
                for (p, sums) in sums.iter_mut().enumerate() {
                    let values = from.add((p * w.stride[1] + x) * column + g * vector);
                    sums[0] = D::add_pairs(sums[0], _mm256_loadu_si256(values.cast()), weights[0]);
                    sums[1] = D::add_pairs(sums[1], _mm256_loadu_si256(values.add(half).cast()), weights[1]);
                }
            }
        }
        for (i, near) in [0, LANES].into_iter().enumerate() {
            let channel = block * BLOCK + near;
            let scale = _mm256_loadu_ps(layer.scale.as_ptr().add(channel));
            let bias = _mm256_loadu_ps(layer.bias.as_ptr().add(channel));
            for (p, sums) in sums.iter().enumerate() {
                let to = ((pixel + p) * blocks * BLOCK + channel) * D::BYTES;
                store_steps::<D>(sums[i], scale, bias, scratch.row.as_mut_ptr().add(to));
            }
        }
    }
}

/// One row of the output from the depthwise convolution's.
///
/// # Safety
/// As [`fill`]; `line` and `residual` are a row of the layer's output.
#[inline(always)]
unsafe fn project<D: Dot>(layer: &Bottleneck8, residual: Option<&[f32]>, line: &mut [f32], scratch: &BottleneckScratch8) {
    let residual = residual.map_or(std::ptr::null(), <[f32]>::as_ptr);
    let (pixels, row, out) = (layer.window.output[1], scratch.row.as_ptr(), line.as_mut_ptr());
    for at in 0..layer.outputs().div_ceil(BLOCK) {
        let mut pixel = 0;
        // SAFETY: tiles end at or before `pixels`.
        unsafe {
            while pixel + PIXELS <= pixels {
                project_tile::<D, PIXELS>(&layer.project, row, pixel, at, residual, out);
                pixel += PIXELS;
            }
            while pixel < pixels {
                project_tile::<D, 1>(&layer.project, row, pixel, at, residual, out);
                pixel += 1;
            }
        }
    }
}

/// Block `at` of the outputs for pixels `pixel..pixel + N`.
///
/// # Safety
/// As [`project`]; `residual` may be null.
#[inline(always)]
unsafe fn project_tile<D: Dot, const N: usize>(p: &Product, row: *const u8, pixel: usize, at: usize, residual: *const f32, out: *mut f32) {
    // Steps beyond the channels are zero times zero; weights are padded to whole groups only, which is where the sums end.
    let (stride, groups) = (p.inputs.next_multiple_of(BLOCK) * D::BYTES, p.inputs.div_ceil(D::DEPTH));
    // SAFETY: this function's contract; loads and stores past a pixel's end are masked off.
    unsafe {
        let mut sums = [[_mm256_setzero_si256(); 2]; N];
        ymm::dot::<D, N>(&mut sums, row.add(pixel * stride), stride, p.packed.as_ptr().add(at * groups * 64), groups);
        for half in 0..2 {
            let column = at * BLOCK + half * LANES;
            let left = p.outputs.saturating_sub(column);
            if left == 0 {
                continue;
            }
            let scale = _mm256_loadu_ps(p.scale.as_ptr().add(column));
            let bias = _mm256_loadu_ps(p.bias.as_ptr().add(column));
            for (n, sums) in sums.iter().enumerate() {
                let place = (pixel + n) * p.outputs + column;
                let mut y = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[half]), scale, bias);
                if !residual.is_null() {
                    y = _mm256_add_ps(y, ymm::load(residual.add(place), left));
                }
                ymm::store(out.add(place), left, y);
            }
        }
    }
}
