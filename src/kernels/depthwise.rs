//! Depthwise convolution on channels-last pictures, with bias and activation fused: `[height, width, channels]` in and out.
//!
//! Vectors run along the channels, so stride, padding and kernel size cost nothing but addressing; no im2col, no border copy.
//! Output pixels of a row share each weight load and, for kernels 3 or 5 wide, the loads of what they see together.

use super::aligned::Aligned;
use super::isa::Isa;
use super::linear::Activation;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use super::simd::F32s;
#[cfg(target_arch = "aarch64")]
use super::simd::arm::Neon;
#[cfg(target_arch = "x86_64")]
use super::simd::x86::{Avx2, Avx512};

/// Output pixels that share a weight load.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
const PIXELS: usize = 4;

/// The input: all rows, or a ring of the last ones.
#[derive(Clone, Copy)]
struct Picture<'a> {
    values: &'a [f32],
    /// Row `y` lies at `y & mask`.
    mask: usize,
}

/// Sizes of a depthwise convolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Channels, in and out.
    pub channels: usize,
    /// Input height and width.
    pub input: [usize; 2],
    /// Output height and width.
    pub output: [usize; 2],
    /// Kernel height and width.
    pub kernel: [usize; 2],
    /// Strides, vertical and horizontal.
    pub stride: [usize; 2],
    /// Zero padding above and to the left; below and to the right follow from the output size.
    pub pad: [usize; 2],
}

/// A depthwise convolution ready to run.
#[derive(Clone, Debug)]
pub struct Depthwise {
    window: Window,
    /// `[kernel height][kernel width][channels]`.
    weight: Aligned<f32>,
    bias: Vec<f32>,
    activation: Activation,
    isa: Isa,
}

impl Depthwise {
    /// `weight` is `[channels, kernel height, kernel width]` as ONNX has it, `bias` `[channels]`. Pictures of fewer channels than a vector has lanes
    /// use a smaller instruction set.
    ///
    /// # Panics
    /// When the lengths do not fit, the stride is 0, or the instruction set is not there: the caller has checked the model's shapes.
    pub fn new(weight: &[f32], bias: &[f32], window: Window, activation: Activation, isa: Isa) -> Self {
        let taps = window.kernel[0] * window.kernel[1];
        assert_eq!(weight.len(), window.channels * taps, "weight of a depthwise convolution");
        assert_eq!(bias.len(), window.channels, "bias of a depthwise convolution");
        assert!(window.stride.iter().all(|&s| s > 0), "stride of a depthwise convolution");
        assert!(isa.available(), "{} is not available here", isa.name());
        let mut packed = Aligned::zeroed(weight.len());
        for (channel, from) in weight.chunks_exact(taps.max(1)).enumerate() {
            for (tap, &w) in from.iter().enumerate() {
                packed[tap * window.channels + channel] = w;
            }
        }
        let isa = match isa.float() {
            Isa::Avx512 if window.channels < 16 => Isa::Avx2,
            other => other,
        };
        let isa = match isa.float() {
            Isa::Avx2 if window.channels < 8 || !Isa::Avx2.available() => Isa::Generic,
            Isa::Neon if window.channels < 4 => Isa::Generic,
            other => other,
        };
        Self { window, weight: packed, bias: bias.to_vec(), activation, isa }
    }

    /// Sizes.
    pub fn window(&self) -> Window {
        self.window
    }

    /// `input` is `[height, width, channels]`, `out` likewise at the output size. Allocates nothing.
    ///
    /// # Panics
    /// When the lengths do not fit.
    pub fn run(&self, input: &[f32], out: &mut [f32]) {
        let w = self.window;
        assert_eq!(out.len(), w.output[0] * w.output[1] * w.channels, "output of a depthwise convolution");
        self.run_rows(input, 0, out);
    }

    /// As [`Depthwise::run`] for some rows of the output: `out` takes those from `first` on, as many as it has room for, so that threads can share
    /// one picture.
    ///
    /// # Panics
    /// When the lengths do not fit or there are not that many rows.
    pub fn run_rows(&self, input: &[f32], first: usize, out: &mut [f32]) {
        let w = self.window;
        assert_eq!(input.len(), w.input[0] * w.input[1] * w.channels, "input of a depthwise convolution");
        self.lines(input, usize::MAX, first, out);
    }

    /// Row `oy` of the output, from the last `rows` (a power of two) rows of the input: row `y` lies at place `y % rows` in `ring`. Those that the
    /// kernel sees must be there.
    ///
    /// # Panics
    /// When the lengths do not fit, the ring holds fewer rows than the kernel is high, or there is no such row.
    pub fn run_ring(&self, ring: &[f32], rows: usize, oy: usize, out: &mut [f32]) {
        let w = self.window;
        assert!(rows.is_power_of_two() && rows >= w.kernel[0], "rows of a depthwise convolution's ring");
        assert_eq!(ring.len(), rows * w.input[1] * w.channels, "ring of a depthwise convolution");
        assert_eq!(out.len(), w.output[1] * w.channels, "output row of a depthwise convolution");
        self.lines(ring, rows - 1, oy, out);
    }

    /// Rows of the output from `first` on. Row `y` of the input is the one at `y & mask` in `input`; the caller has checked that it is there.
    fn lines(&self, input: &[f32], mask: usize, first: usize, out: &mut [f32]) {
        let w = self.window;
        let width = w.output[1] * w.channels;
        let rows = out.len().checked_div(width).unwrap_or(0);
        assert!(out.len() == rows * width && first + rows <= w.output[0], "output of a depthwise convolution");
        let input = Picture { values: input, mask };
        match self.isa.float() {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `new` checked the instruction set and that there are channels for a vector, the asserts above and the callers' the lengths.
            Isa::Avx512 => unsafe { avx512(self, input, first, out) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Isa::Avx2 => unsafe { avx2(self, input, first, out) },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: every aarch64 has NEON; lengths as above.
            Isa::Neon => unsafe { neon(self, input, first, out) },
            _ => self.run_generic(input, first, out),
        }
    }

    fn run_generic(&self, input: Picture<'_>, first: usize, out: &mut [f32]) {
        let w = self.window;
        for (i, pixel) in out.chunks_exact_mut(w.channels.max(1)).enumerate() {
            let (oy, ox) = (first + i / w.output[1], i % w.output[1]);
            pixel.copy_from_slice(&self.bias);
            for ky in taps(oy, w.stride[0], w.pad[0], w.kernel[0], w.input[0]) {
                for kx in taps(ox, w.stride[1], w.pad[1], w.kernel[1], w.input[1]) {
                    let (y, x) = (oy * w.stride[0] + ky - w.pad[0], ox * w.stride[1] + kx - w.pad[1]);
                    let from = &input.values[((y & input.mask) * w.input[1] + x) * w.channels..][..w.channels];
                    let weight = &self.weight[(ky * w.kernel[1] + kx) * w.channels..][..w.channels];
                    for ((sum, value), weight) in pixel.iter_mut().zip(from).zip(weight) {
                        *sum += value * weight;
                    }
                }
            }
            for value in pixel {
                *value = self.activation.apply(*value);
            }
        }
    }
}

/// Kernel positions whose input position lies inside the picture, for output position `o` along one axis.
#[inline(always)]
fn taps(o: usize, stride: usize, pad: usize, kernel: usize, input: usize) -> std::ops::Range<usize> {
    let at = o * stride;
    let first = pad.saturating_sub(at);
    let end = kernel.min((input + pad).saturating_sub(at));
    first..end.max(first)
}

/// # Safety
/// AVX-512F must be there; lengths as `Depthwise::lines` and its callers check them; at least 16 channels.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn avx512(layer: &Depthwise, input: Picture<'_>, first: usize, out: &mut [f32]) {
    // SAFETY: this function's contract.
    unsafe { all::<Avx512, 8, 1>(layer, input, first, out) }
}

/// # Safety
/// AVX2 and FMA must be there; lengths as `Depthwise::lines` and its callers check them; at least 8 channels.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2(layer: &Depthwise, input: Picture<'_>, first: usize, out: &mut [f32]) {
    // SAFETY: this function's contract.
    unsafe { all::<Avx2, 4, 1>(layer, input, first, out) }
}

/// # Safety
/// Lengths as `Depthwise::lines` and its callers check them; at least 4 channels.
#[cfg(target_arch = "aarch64")]
#[target_feature(enable = "neon")]
unsafe fn neon(layer: &Depthwise, input: Picture<'_>, first: usize, out: &mut [f32]) {
    // SAFETY: this function's contract.
    unsafe { all::<Neon, 4, 2>(layer, input, first, out) }
}

/// # Safety
/// `V`'s instruction set must be there; lengths as `Depthwise::lines` and its callers check them; at least `V::LANES` channels.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[inline(always)]
unsafe fn all<V: F32s, const WIDE: usize, const VECTORS: usize>(layer: &Depthwise, input: Picture<'_>, first: usize, out: &mut [f32]) {
    // SAFETY: this function's contract; the third and fourth number are the window's.
    unsafe {
        match (layer.window.kernel[1], layer.window.stride[1]) {
            (3, 1) => lines::<V, WIDE, 3, 1, VECTORS>(layer, input, first, out),
            (5, 1) => lines::<V, WIDE, 5, 1, VECTORS>(layer, input, first, out),
            (3, 2) => lines::<V, PIXELS, 3, 2, VECTORS>(layer, input, first, out),
            (5, 2) => lines::<V, PIXELS, 5, 2, 1>(layer, input, first, out),
            _ => lines::<V, PIXELS, 0, 0, 1>(layer, input, first, out),
        }
    }
}

/// Rows of the output from `first` on; where the kernel is `K` wide and goes by `S` columns, in strips of `N` pixels ([`strip`]), for other kernels
/// (`K` is 0) pixel by pixel in fours.
///
/// # Safety
/// As [`all`]; `K` and `S` are the window's or 0.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[inline(always)]
unsafe fn lines<V: F32s, const N: usize, const K: usize, const S: usize, const VECTORS: usize>(
    layer: &Depthwise,
    input: Picture<'_>,
    first: usize,
    out: &mut [f32],
) {
    let w = layer.window;
    let (kernel, stride, pad) = (w.kernel, w.stride, w.pad);
    // Output columns whose whole kernel lies inside the picture.
    let inner_first = pad[1].div_ceil(stride[1]).min(w.output[1]);
    let inner_end = if w.input[1] + pad[1] >= kernel[1] { ((w.input[1] + pad[1] - kernel[1]) / stride[1] + 1).min(w.output[1]) } else { 0 };
    let lines = out.chunks_exact_mut((w.output[1] * w.channels).max(1));
    for (oy, line) in lines.enumerate().map(|(row, line)| (first + row, line)) {
        let rows = taps(oy, stride[0], pad[0], kernel[0], w.input[0]);
        let mut ox = 0;
        while ox < w.output[1] {
            // SAFETY: a block is taken only where each pixel's whole kernel is inside; a single pixel gets its own valid columns.
            unsafe {
                if K > 0 && ox >= inner_first && ox + N <= inner_end {
                    let mut c = 0;
                    while c + VECTORS * V::LANES <= w.channels {
                        strip::<V, N, K, S, VECTORS>(layer, input, line, oy, ox, rows.clone(), c);
                        c += VECTORS * V::LANES;
                    }
                    while c < w.channels {
                        // The last vector overlaps the one before: same values, no masked store.
                        strip::<V, N, K, S, 1>(layer, input, line, oy, ox, rows.clone(), c.min(w.channels - V::LANES));
                        c += V::LANES;
                    }
                    ox += N;
                } else if ox >= inner_first && ox + PIXELS <= inner_end {
                    pixels::<V, PIXELS, 1>(layer, input, line, [oy, ox], rows.clone(), 0..kernel[1]);
                    ox += PIXELS;
                } else {
                    let columns = taps(ox, stride[1], pad[1], kernel[1], w.input[1]);
                    pixels::<V, 1, 4>(layer, input, line, [oy, ox], rows.clone(), columns);
                    ox += 1;
                }
            }
        }
    }
}

/// Input columns of the widest strip: 8 pixels by a kernel of 5, or 4 in steps of 2.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
const COLUMNS: usize = 12;

/// Output pixels `ox..ox + N` of row `oy` (`line` is that row), `VECTORS` vectors of channels from `at` on: each input value of a kernel row is loaded
/// once for all pixels that see it.
///
/// # Safety
/// `V`'s instruction set must be there; kernel width and stride are `K` and `S`; the kernel rows given and all columns of the pixels lie inside
/// the input, the channels below their number.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[inline(always)]
unsafe fn strip<V: F32s, const N: usize, const K: usize, const S: usize, const VECTORS: usize>(
    layer: &Depthwise,
    input: Picture<'_>,
    line: &mut [f32],
    oy: usize,
    ox: usize,
    rows: std::ops::Range<usize>,
    at: usize,
) {
    let w = layer.window;
    let channels = w.channels;
    // SAFETY: this function's contract.
    unsafe {
        let mut acc = [[V::splat(0.0); VECTORS]; N];
        for v in 0..VECTORS {
            let bias = V::load(layer.bias.as_ptr().add(at + v * V::LANES));
            for sums in &mut acc {
                sums[v] = bias;
            }
        }
        for ky in rows {
            let y = oy * w.stride[0] + ky - w.pad[0];
            let from = input.values.as_ptr().add(((y & input.mask) * w.input[1] + ox * S - w.pad[1]) * channels + at);
            let mut columns = [[V::splat(0.0); VECTORS]; COLUMNS];
            for (i, column) in columns.iter_mut().enumerate().take(S * (N - 1) + K) {
                for (v, x) in column.iter_mut().enumerate() {
                    *x = V::load(from.add(i * channels + v * V::LANES));
                }
            }
            let weight = layer.weight.as_ptr().add(ky * K * channels + at);
            for kx in 0..K {
                for v in 0..VECTORS {
                    let weight = V::load(weight.add(kx * channels + v * V::LANES));
                    for (n, sums) in acc.iter_mut().enumerate() {
                        sums[v] = sums[v].fma(columns[n * S + kx][v], weight);
                    }
                }
            }
        }
        let to = line.as_mut_ptr().add(ox * channels + at);
        for (n, sums) in acc.iter().enumerate() {
            for (v, sum) in sums.iter().enumerate() {
                activated(*sum, layer.activation).store(to.add(n * channels + v * V::LANES));
            }
        }
    }
}

/// # Safety
/// `V`'s instruction set must be there.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[inline(always)]
unsafe fn activated<V: F32s>(sum: V, activation: Activation) -> V {
    // SAFETY: this function's contract.
    unsafe {
        // The constant first: NaN stays, see `linear`.
        match activation {
            Activation::None => sum,
            Activation::Relu => V::splat(0.0).max(sum),
            Activation::Relu6 => V::splat(6.0).min(V::splat(0.0).max(sum)),
        }
    }
}

/// Output pixels `ox..ox + N` of row `oy` (`line` is that row), all channels, over the kernel rows and columns given.
///
/// # Safety
/// `V`'s instruction set must be there; for each pixel the kernel rows and columns given must lie inside the input; at least `V::LANES` channels.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[inline(always)]
unsafe fn pixels<V: F32s, const N: usize, const VECTORS: usize>(
    layer: &Depthwise,
    input: Picture<'_>,
    line: &mut [f32],
    [oy, ox]: [usize; 2],
    rows: std::ops::Range<usize>,
    columns: std::ops::Range<usize>,
) {
    let channels = layer.window.channels;
    let mut c = 0;
    // SAFETY: this function's contract; the vectors end at or before the last channel.
    unsafe {
        while c + VECTORS * V::LANES <= channels {
            taken::<V, N, VECTORS>(layer, input, line, [oy, ox, c], rows.clone(), columns.clone());
            c += VECTORS * V::LANES;
        }
        while c < channels {
            // The last vector overlaps the one before: same values, no masked store.
            taken::<V, N, 1>(layer, input, line, [oy, ox, c.min(channels - V::LANES)], rows.clone(), columns.clone());
            c += V::LANES;
        }
    }
}

/// As [`pixels`] for `VECTORS` vectors of channels from `at` on.
///
/// # Safety
/// As [`pixels`]; the vectors end at or before the last channel.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[inline(always)]
unsafe fn taken<V: F32s, const N: usize, const VECTORS: usize>(
    layer: &Depthwise,
    input: Picture<'_>,
    line: &mut [f32],
    [oy, ox, at]: [usize; 3],
    rows: std::ops::Range<usize>,
    columns: std::ops::Range<usize>,
) {
    let w = layer.window;
    let channels = w.channels;
    let step = w.stride[1] * channels;
    // SAFETY: this function's contract.
    unsafe {
        let mut acc = [[V::splat(0.0); VECTORS]; N];
        for v in 0..VECTORS {
            let bias = V::load(layer.bias.as_ptr().add(at + v * V::LANES));
            for sums in &mut acc {
                sums[v] = bias;
            }
        }
        for ky in rows {
            let y = oy * w.stride[0] + ky - w.pad[0];
            for kx in columns.clone() {
                let x = ox * w.stride[1] + kx - w.pad[1];
                let weight = layer.weight.as_ptr().add((ky * w.kernel[1] + kx) * channels + at);
                let from = input.values.as_ptr().add(((y & input.mask) * w.input[1] + x) * channels + at);
                for v in 0..VECTORS {
                    let weight = V::load(weight.add(v * V::LANES));
                    for (n, sums) in acc.iter_mut().enumerate() {
                        sums[v] = sums[v].fma(V::load(from.add(n * step + v * V::LANES)), weight);
                    }
                }
            }
        }
        let to = line.as_mut_ptr().add(ox * channels + at);
        for (n, sums) in acc.iter().enumerate() {
            for (v, sum) in sums.iter().enumerate() {
                activated(*sum, layer.activation).store(to.add(n * channels + v * V::LANES));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::values;
    use super::*;
    use proptest::prelude::*;

    /// Straight from the definition, in f64.
    fn oracle(w: Window, weight: &[f32], bias: &[f32], input: &[f32], activation: Activation) -> Vec<f32> {
        let mut out = Vec::new();
        for oy in 0..w.output[0] {
            for ox in 0..w.output[1] {
                for c in 0..w.channels {
                    let mut sum = f64::from(bias[c]);
                    for ky in 0..w.kernel[0] {
                        for kx in 0..w.kernel[1] {
                            let y = (oy * w.stride[0] + ky) as isize - w.pad[0] as isize;
                            let x = (ox * w.stride[1] + kx) as isize - w.pad[1] as isize;
                            if (0..w.input[0] as isize).contains(&y) && (0..w.input[1] as isize).contains(&x) {
                                let at = (y as usize * w.input[1] + x as usize) * w.channels + c;
                                sum += f64::from(weight[(c * w.kernel[0] + ky) * w.kernel[1] + kx]) * f64::from(input[at]);
                            }
                        }
                    }
                    out.push(activation.apply(sum as f32));
                }
            }
        }
        out
    }

    fn check(w: Window, activation: Activation, seed: u64) {
        let weight = values(w.channels * w.kernel[0] * w.kernel[1], seed);
        let bias = values(w.channels, seed + 1);
        let input = values(w.input[0] * w.input[1] * w.channels, seed + 2);
        let wanted = oracle(w, &weight, &bias, &input, activation);
        for isa in Isa::all_available() {
            let mut got = vec![f32::NAN; wanted.len()];
            let layer = Depthwise::new(&weight, &bias, w, activation, isa);
            layer.run(&input, &mut got);
            // In two parts, to the bit.
            let mut parts = vec![f32::NAN; wanted.len()];
            let (upper, lower) = parts.split_at_mut(w.output[0] / 3 * w.output[1] * w.channels);
            layer.run_rows(&input, 0, upper);
            layer.run_rows(&input, w.output[0] / 3, lower);
            assert_eq!(got, parts, "{} {w:?}", isa.name());
            // From a ring that holds what the kernel sees and, elsewhere, what must not matter.
            let (rows, line) = (w.kernel[0].next_power_of_two(), w.input[1] * w.channels);
            for (oy, wanted) in got.chunks_exact(w.output[1] * w.channels).enumerate() {
                let mut ring = vec![f32::NAN; rows * line];
                for y in (oy * w.stride[0]).saturating_sub(w.pad[0])..(oy * w.stride[0] + w.kernel[0] - w.pad[0]).min(w.input[0]) {
                    ring[y % rows * line..][..line].copy_from_slice(&input[y * line..][..line]);
                }
                let mut out = vec![f32::NAN; wanted.len()];
                layer.run_ring(&ring, rows, oy, &mut out);
                assert_eq!(out, wanted, "{} {w:?} row {oy}", isa.name());
            }
            for (i, (x, y)) in got.iter().zip(&wanted).enumerate() {
                assert!((x - y).abs() < 1e-5, "{} {w:?} at {i}: {x} {y}", isa.name());
            }
        }
    }

    #[test]
    fn the_sizes_of_the_model_agree_with_the_definition() {
        let window = |channels, input: usize, kernel: usize, stride: usize, pad: usize| Window {
            channels,
            input: [input; 2],
            output: [input / stride; 2],
            kernel: [kernel; 2],
            stride: [stride; 2],
            pad: [pad; 2],
        };
        for w in [window(16, 28, 3, 1, 1), window(24, 28, 3, 2, 0), window(96, 28, 5, 2, 1), window(40, 14, 5, 1, 2), window(3, 6, 3, 1, 1)]
        {
            check(w, Activation::Relu6, 5);
        }
    }

    #[test]
    fn not_a_number_is_never_hidden() {
        for isa in Isa::all_available() {
            let w = Window { channels: 16, input: [1; 2], output: [1; 2], kernel: [1; 2], stride: [1; 2], pad: [0; 2] };
            let mut out = [0.0; 16];
            Depthwise::new(&[1.0; 16], &[0.0; 16], w, Activation::Relu6, isa).run(&[f32::NAN; 16], &mut out);
            assert!(out.iter().all(|x| x.is_nan()), "{}", isa.name());
        }
    }

    proptest! {
        #[test]
        fn any_window_agrees_with_the_definition(
            channels in 1usize..40, height in 1usize..12, width in 1usize..14, kernel in 1usize..6, stride in 1usize..4, pad in 0usize..4, seed: u64,
        ) {
            prop_assume!(pad < kernel && height + 2 * pad >= kernel && width + 2 * pad >= kernel);
            let output = [(height + 2 * pad - kernel) / stride + 1, (width + 2 * pad - kernel) / stride + 1];
            check(Window { channels, input: [height, width], output, kernel: [kernel; 2], stride: [stride; 2], pad: [pad; 2] }, Activation::None, seed >> 8);
        }
    }
}
