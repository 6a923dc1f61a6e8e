//! Inverted bottleneck in integers: 1x1 expansion, depthwise convolution, 1x1 projection (and residual), one picture row at a time.
//!
//! Input and output are narrow and in float; what lies between is six times as wide and never leaves the cache: as many expanded rows as the
//! kernel is high wait in a ring, and each row of the depthwise convolution goes straight into the projection. The two inner activations
//! have fixed scales (`0..=top`, for ReLU6 `top` = 6), so the clamp of the activation is that of the conversion. After the depthwise
//! convolution a value takes 8 bit, before it 15: its kernels take differences of neighbours, and on an even surface those drown in the
//! rounding of 8 bit (measured: benches/README.md); the input is quantized when it is used, by picture row, with its own scale and zero point. Sums are exact integers and float
//! arithmetic is the same sequence of operations everywhere: all instruction sets give the same result, to the bit.

#[cfg(target_arch = "aarch64")]
mod arm;
#[cfg(target_arch = "x86_64")]
mod avx2;

use super::aligned::Aligned;
use super::depthwise::Window;
use super::isa::Isa;
use super::linear8::{Layout, step};
use super::source::Source;

/// Largest byte.
const TOP: f32 = 255.0;
/// Largest step of the ring.
const RING_TOP: f32 = 32767.0;
/// Inputs that one dot-product instruction takes per sum.
const DEPTH: usize = 4;
/// Rows of the ring that one dot-product instruction takes per sum.
const PAIR: usize = 2;
/// Channels that are handled together; rows of bytes are padded to it.
const BLOCK: usize = 16;
/// Largest kernel side: sums of 64 taps stay below 2^31.
const MAX_KERNEL: usize = 8;
/// Largest number of inputs for which the 32-bit sums cannot overflow: 2^31 / (255 * 128).
const MAX_INPUTS: usize = 65_793;

/// Signed 8-bit weights with one scale per output.
#[derive(Clone, Copy, Debug)]
pub struct Weights8<'a> {
    /// `[inputs, outputs]` row-major; for the depthwise convolution `[channels, kernel height, kernel width]`.
    pub weight: &'a [i8],
    /// By output.
    pub scale: &'a [f32],
    /// By output, in float.
    pub bias: &'a [f32],
}

/// An inverted bottleneck ready to run.
#[derive(Clone, Debug)]
pub struct Bottleneck8 {
    window: Window,
    /// Absent: the depthwise convolution reads the input itself, which is never negative then.
    expand: Option<Product>,
    /// Without expansion: factor from a value to its step in the ring, by channel.
    factor: Vec<f32>,
    /// Generic and aarch64: `[kernel height][kernel width][channels]`, padded to blocks. x86: for each row of the ring that may be the window's
    /// first `[channels / 16][kernel width][ring / 2][16][2]`.
    depthwise: Aligned<i16>,
    /// From a sum to a byte, by channel, padded to blocks.
    scale: Vec<f32>,
    bias: Vec<f32>,
    project: Product,
    /// For AVX-512: size of an input's step up to which no expanded value can reach 2^31 steps of the ring; 0 without expansion.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    largest_size: f32,
    /// Likewise: whether no sum of the depthwise convolution can reach 2^31 steps of a byte.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    within: bool,
    isa: Isa,
}

/// Steps that every conversion to 32 bit takes, with a margin for rounding on the way.
const CONVERTIBLE: f64 = 2_147_483_648.0 * 0.99;

/// A 1x1 convolution: weights and what makes a float of a sum.
#[derive(Clone, Debug)]
struct Product {
    inputs: usize,
    outputs: usize,
    /// See [`Layout::pack`].
    packed: Aligned<i8>,
    /// By output, padded to panels, as all below.
    scale: Vec<f32>,
    bias: Vec<f32>,
    /// Sum of an output's weights.
    sums: Vec<i32>,
}

/// What a run works in: large enough for the largest of several bottlenecks.
#[derive(Clone, Debug, Default)]
pub struct BottleneckScratch8 {
    input: Aligned<u8>,
    ring: Aligned<i16>,
    row: Aligned<u8>,
}

impl BottleneckScratch8 {
    /// Grow so that `layer` can run in it.
    pub fn fit(&mut self, layer: &Bottleneck8) {
        self.input.grow(layer.input_bytes());
        self.row.grow(layer.row_bytes());
        self.ring.grow(layer.ring_len());
    }

    /// Bytes it takes.
    pub fn bytes(&self) -> usize {
        self.input.len() + 2 * self.ring.len() + self.row.len()
    }
}

impl Product {
    fn new(w: Weights8<'_>, inputs: usize, factor: impl Fn(usize) -> f32, bias_factor: impl Fn(usize) -> f32, isa: Isa) -> Self {
        let outputs = w.bias.len();
        assert_eq!(w.weight.len(), inputs * outputs, "weight of an int8 product {inputs} -> {outputs}");
        assert_eq!(w.scale.len(), outputs, "scale of an int8 product {inputs} -> {outputs}");
        assert!(inputs <= MAX_INPUTS, "an int8 product of {inputs} inputs could overflow");
        let padded = outputs.next_multiple_of(2 * BLOCK);
        let mut scale: Vec<f32> = w.scale.iter().enumerate().map(|(n, scale)| scale * factor(n)).collect();
        let mut bias: Vec<f32> = w.bias.iter().enumerate().map(|(n, bias)| bias * bias_factor(n)).collect();
        let mut sums = vec![0; padded];
        for row in w.weight.chunks_exact(outputs.max(1)) {
            sums.iter_mut().zip(row).for_each(|(sum, &w)| *sum += i32::from(w));
        }
        scale.resize(padded, 0.0);
        bias.resize(padded, 0.0);
        Self { inputs, outputs, packed: Layout::of(isa).pack(w.weight, inputs, outputs), scale, bias, sums }
    }

    /// Size of an input's step up to which no output's magnitude reaches 2^31; 0 for none.
    fn largest_size(&self) -> f32 {
        let worst = f64::from(u8::MAX) * 128.0 * self.inputs.max(1) as f64;
        let of = |n: usize| (CONVERTIBLE - f64::from(self.bias[n]).abs()) / (worst * f64::from(self.scale[n]).abs());
        let smallest = (0..self.outputs).map(of).fold(f64::INFINITY, f64::min);
        if smallest > 0.0 { smallest.min(f64::from(f32::MAX)) as f32 } else { 0.0 }
    }

    /// Generic: one row of bytes, one output.
    fn sum(&self, row: &[u8], output: usize) -> i32 {
        let layout = Layout::of(Isa::Generic);
        let weight = |k: usize| i32::from(self.packed[layout.place(k, output, self.inputs)]);
        row.iter().enumerate().map(|(k, &x)| i32::from(x) * weight(k)).sum()
    }
}

impl Bottleneck8 {
    /// Whether it is faster than its parts on this instruction set: on x86 by measured times, on ARM by counted instructions. AVX-VNNI by those of
    /// plain AVX2, of whose instructions it takes fewer.
    pub fn pays(isa: Isa) -> bool {
        matches!(isa, Isa::Avx2 | Isa::AvxVnni | Isa::Avx512Vnni | Isa::NeonDot | Isa::NeonI8mm)
    }

    /// Whether these sizes can be run: kernels of up to 8x8, a multiple of four inputs.
    pub fn fits(kernel: [usize; 2], stride: [usize; 2], inputs: usize) -> bool {
        kernel.iter().all(|side| (1..=MAX_KERNEL).contains(side)) && stride.iter().all(|&stride| stride > 0) && inputs.is_multiple_of(DEPTH)
    }

    /// `window` is the depthwise convolution's. `tops` are the upper ends of the two inner activations, which are clamped to `0..=top`: by
    /// channel before, as a whole after the depthwise convolution. Without `expand` the input must not be negative; it is clamped likewise.
    ///
    /// # Panics
    /// When the lengths do not fit, [`Bottleneck8::fits`] says no, a top is not positive, or the instruction set is not there.
    pub fn new(
        expand: Option<Weights8<'_>>,
        depthwise: Weights8<'_>,
        project: Weights8<'_>,
        window: Window,
        tops: (&[f32], f32),
        isa: Isa,
    ) -> Self {
        let (channels, [high, wide]) = (window.channels, window.kernel);
        let inputs = expand.map_or(channels, |expand| expand.weight.len() / channels.max(1));
        assert!(Self::fits(window.kernel, window.stride, inputs), "sizes of an inverted bottleneck: {window:?}, {inputs} inputs");
        assert!(isa.available(), "{} is not available here", isa.name());
        assert!(depthwise.weight.len() == channels * high * wide && depthwise.scale.len() == channels && depthwise.bias.len() == channels);
        let (top, last_top) = tops;
        assert!(top.len() == channels && top.iter().chain([&last_top]).all(|&top| top > 0.0), "tops of an inverted bottleneck");
        let blocks = channels.div_ceil(BLOCK);
        let mut scale: Vec<f32> = (0..channels).map(|c| depthwise.scale[c] * (top[c] / RING_TOP) * (TOP / last_top)).collect();
        let mut bias: Vec<f32> = depthwise.bias.iter().map(|bias| bias * (TOP / last_top)).collect();
        scale.resize(blocks * BLOCK, 0.0);
        bias.resize(blocks * BLOCK, 0.0);
        let mut factor: Vec<f32> = top.iter().map(|top| RING_TOP / top).collect();
        factor.resize(blocks * BLOCK, 0.0);
        let ring = ring(&window);
        let packed = if matches!(isa, Isa::Avx2 | Isa::AvxVnni | Isa::Avx512Vnni) {
            let turn = blocks * wide * ring * BLOCK;
            let mut packed = Aligned::zeroed(ring * turn);
            for (i, &w) in depthwise.weight.iter().enumerate() {
                let (c, ky, kx) = (i / (high * wide), i / wide % high, i % wide);
                for first in 0..ring {
                    let slot = (first + ky) % ring;
                    let vector = (c / BLOCK * wide + kx) * (ring / PAIR) + slot / PAIR;
                    packed[first * turn + (vector * BLOCK + c % BLOCK) * PAIR + slot % PAIR] = i16::from(w);
                }
            }
            packed
        } else {
            let stride = channels.next_multiple_of(BLOCK);
            let mut packed = Aligned::zeroed(stride * high * wide);
            depthwise.weight.iter().enumerate().for_each(|(i, &w)| packed[i % (high * wide) * stride + i / (high * wide)] = i16::from(w));
            packed
        };
        let expand = expand.map(|expand| Product::new(expand, inputs, |n| RING_TOP / top[n], |n| RING_TOP / top[n], isa));
        let taps = high * wide;
        let within = (0..channels).all(|c| {
            let magnitude: f64 = depthwise.weight[c * taps..][..taps].iter().map(|w| f64::from(w.unsigned_abs())).sum();
            magnitude * f64::from(RING_TOP) * f64::from(scale[c]).abs() + f64::from(bias[c]).abs() < CONVERTIBLE
        });
        Self {
            window,
            largest_size: expand.as_ref().map_or(0.0, Product::largest_size),
            within,
            expand,
            factor,
            depthwise: packed,
            scale,
            bias,
            project: Product::new(project, channels, |_| last_top / TOP, |_| 1.0, isa),
            isa,
        }
    }

    /// Sizes of the depthwise convolution.
    pub fn window(&self) -> Window {
        self.window
    }

    /// Channels of the input.
    pub fn inputs(&self) -> usize {
        self.expand.as_ref().map_or(self.window.channels, |expand| expand.inputs)
    }

    /// Channels of the output.
    pub fn outputs(&self) -> usize {
        self.project.outputs
    }

    /// Multiply-adds of one run.
    pub fn multiply_adds(&self) -> usize {
        let (w, area) = (self.window, |[height, width]: [usize; 2]| height * width);
        let expand = if self.expand.is_some() { area(w.input) * self.inputs() } else { 0 };
        w.channels * (expand + area(w.output) * (area(w.kernel) + self.outputs()))
    }

    /// Columns of the ring: the picture's, and zeros on both sides.
    fn columns(&self) -> usize {
        let w = &self.window;
        (w.input[1] + w.pad[1]).max(w.output[1].saturating_sub(1) * w.stride[1] + w.kernel[1])
    }

    fn input_bytes(&self) -> usize {
        // Quantizing stores whole vectors; aarch64 takes pixels in pairs.
        (self.window.input[1].next_multiple_of(2) * self.inputs().next_multiple_of(8) + BLOCK) * Layout::of(self.isa).bytes
    }

    fn ring_len(&self) -> usize {
        self.columns() * ring(&self.window) * self.window.channels.next_multiple_of(BLOCK)
    }

    fn row_bytes(&self) -> usize {
        self.window.output[1].next_multiple_of(2) * self.window.channels.next_multiple_of(BLOCK) * Layout::of(self.isa).bytes
    }

    /// `input` gives rows of `[width, inputs]` in float and is asked for each at most once, in order; `residual` and `out` are output rows from
    /// `first` on, `[rows, width, outputs]`: as many as `out` has room for, so that threads can share a picture. Allocates nothing. A value that is
    /// not finite gives NaN in all of `out`.
    ///
    /// # Panics
    /// When the lengths do not fit, or `scratch` was not made to fit this layer.
    pub fn run(&self, mut input: Source<'_>, residual: Option<&[f32]>, first: usize, out: &mut [f32], scratch: &mut BottleneckScratch8) {
        let w = self.window;
        let line = w.output[1] * self.outputs();
        assert!(input.fits(w.input[0], w.input[1] * self.inputs()), "input of an inverted bottleneck");
        assert!(
            out.len().is_multiple_of(line.max(1)) && first + out.len() / line.max(1) <= w.output[0],
            "output of an inverted bottleneck"
        );
        assert!(residual.is_none_or(|residual| residual.len() == out.len()), "residual of an inverted bottleneck");
        assert!(
            scratch.input.len() >= self.input_bytes() && scratch.ring.len() >= self.ring_len() && scratch.row.len() >= self.row_bytes(),
            "scratch of an inverted bottleneck"
        );
        if out.is_empty() {
            return;
        }
        scratch.ring[..self.ring_len()].fill(0);
        // In the ring every row has its place by number; those above the picture have zeros there already.
        let above = ring(&w);
        let mut next = (first * w.stride[0] + above).saturating_sub(w.pad[0]).max(above);
        let mut finite = true;
        for (oy, line) in (first..).zip(out.chunks_exact_mut(line)) {
            let start = oy * w.stride[0] + above - w.pad[0];
            next = next.max(start);
            while next < start + w.kernel[0] {
                let row = (next - above < w.input[0]).then(|| input.row(next - above, w.input[1] * self.inputs()));
                match self.isa {
                    #[cfg(target_arch = "x86_64")]
                    // SAFETY: `new` checked the instruction set, the asserts above and in `new` the lengths.
                    Isa::Avx512Vnni => unsafe { finite &= x86::fill(self, row, next % above, scratch) },
                    #[cfg(target_arch = "x86_64")]
                    // SAFETY: as above.
                    Isa::AvxVnni => unsafe { finite &= avx2::fill_vnni(self, row, next % above, scratch) },
                    #[cfg(target_arch = "x86_64")]
                    // SAFETY: as above.
                    Isa::Avx2 => unsafe { finite &= avx2::fill_plain(self, row, next % above, scratch) },
                    #[cfg(target_arch = "aarch64")]
                    // SAFETY: as above.
                    Isa::Neon => unsafe { finite &= arm::fill_neon(self, row, next % above, scratch) },
                    #[cfg(target_arch = "aarch64")]
                    // SAFETY: as above.
                    Isa::NeonDot => unsafe { finite &= arm::fill_dot(self, row, next % above, scratch) },
                    #[cfg(target_arch = "aarch64")]
                    // SAFETY: as above.
                    Isa::NeonI8mm => unsafe { finite &= arm::fill_i8mm(self, row, next % above, scratch) },
                    _ => finite &= self.fill_generic(row, next % above, scratch),
                }
                next += 1;
            }
            let residual = residual.map(|residual| &residual[(oy - first) * line.len()..][..line.len()]);
            match self.isa {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: as above.
                Isa::Avx512Vnni => unsafe { x86::line(self, start % above, residual, line, scratch) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: as above.
                Isa::AvxVnni => unsafe { avx2::line_vnni(self, start % above, residual, line, scratch) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: as above.
                Isa::Avx2 => unsafe { avx2::line_plain(self, start % above, residual, line, scratch) },
                #[cfg(target_arch = "aarch64")]
                // SAFETY: as above.
                Isa::Neon => unsafe { arm::line_neon(self, start % above, residual, line, scratch) },
                #[cfg(target_arch = "aarch64")]
                // SAFETY: as above.
                Isa::NeonDot => unsafe { arm::line_dot(self, start % above, residual, line, scratch) },
                #[cfg(target_arch = "aarch64")]
                // SAFETY: as above.
                Isa::NeonI8mm => unsafe { arm::line_i8mm(self, start % above, residual, line, scratch) },
                _ => self.line_generic(start % above, residual, line, scratch),
            }
        }
        if !finite {
            out.fill(f32::NAN);
        }
    }

    /// One row of the input, expanded, into the ring; without one, zeros. Whether all of it was finite.
    fn fill_generic(&self, row: Option<&[f32]>, slot: usize, scratch: &mut BottleneckScratch8) -> bool {
        let (w, inputs) = (self.window, self.inputs());
        let stride = w.channels.next_multiple_of(BLOCK);
        let columns = &mut scratch.ring[slot * self.columns() * stride..][w.pad[1] * stride..][..w.input[1] * stride];
        let Some(row) = row else {
            columns.fill(0);
            return true;
        };
        let finite = row.iter().all(|x| x.is_finite());
        let Some(expand) = &self.expand else {
            for (pixel, bytes) in row.chunks_exact(inputs).zip(columns.chunks_exact_mut(stride)) {
                for ((x, factor), byte) in pixel.iter().zip(&self.factor).zip(bytes) {
                    *byte = to_step(x * factor);
                }
            }
            return finite;
        };
        let (low, high) = row.iter().fold((0.0f32, 0.0f32), |(low, high), &x| (low.min(x), high.max(x)));
        let (inverse, size, zero) = asymmetric(low, high, finite);
        for (byte, x) in scratch.input.iter_mut().zip(row) {
            *byte = step(*x, inverse, zero);
        }
        for (pixel, bytes) in scratch.input.chunks_exact(inputs).zip(columns.chunks_exact_mut(stride)) {
            for (n, byte) in bytes.iter_mut().take(w.channels).enumerate() {
                let sum = expand.sum(pixel, n) - zero * expand.sums[n];
                *byte = to_step((sum as f32).mul_add(size * expand.scale[n], expand.bias[n]));
            }
        }
        finite
    }

    /// One row of the output from the ring, whose row `start` is the window's first.
    fn line_generic(&self, start: usize, residual: Option<&[f32]>, line: &mut [f32], scratch: &mut BottleneckScratch8) {
        let (w, ring) = (self.window, ring(&self.window));
        let stride = w.channels.next_multiple_of(BLOCK);
        let rows = self.columns() * stride;
        for (ox, out) in line.chunks_exact_mut(self.outputs()).enumerate() {
            for c in 0..w.channels {
                let mut sum = 0;
                for ky in 0..w.kernel[0] {
                    for kx in 0..w.kernel[1] {
                        let x = scratch.ring[(start + ky) % ring * rows + (ox * w.stride[1] + kx) * stride + c];
                        sum += i32::from(x) * i32::from(self.depthwise[(ky * w.kernel[1] + kx) * stride + c]);
                    }
                }
                scratch.row[c] = to_byte((sum as f32).mul_add(self.scale[c], self.bias[c]));
            }
            for (n, y) in out.iter_mut().enumerate() {
                let sum = self.project.sum(&scratch.row[..w.channels], n) as f32;
                let add = residual.map_or(0.0, |residual| residual[ox * self.project.outputs + n]);
                *y = sum.mul_add(self.project.scale[n], self.project.bias[n]) + add;
            }
        }
    }
}

/// Rows of the ring: what a kernel needs, in whole dot products.
fn ring(window: &Window) -> usize {
    window.kernel[0].next_multiple_of(PAIR)
}

fn to_step(x: f32) -> i16 {
    (x.round_ties_even() as i32).clamp(0, i32::from(i16::MAX)) as i16
}

fn to_byte(x: f32) -> u8 {
    (x.round_ties_even() as i32).clamp(0, 255) as u8
}

/// For values in `low..=high` (zero included): the factor to steps, the size of a step, the step that is zero. Values that are not finite or
/// all nearly zero become zero.
fn asymmetric(low: f32, high: f32, finite: bool) -> (f32, f32, i32) {
    let range = high - low;
    // The range of finite values may overflow, or be so small that its inverse does.
    if !finite || !range.is_finite() || range < f32::MIN_POSITIVE * 256.0 {
        return (0.0, 0.0, 0);
    }
    let inverse = TOP / range;
    (inverse, range / TOP, (-low * inverse).round_ties_even() as i32)
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::super::vnni::{add_pairs, dot, lanes, quantize};
    use super::{BLOCK, Bottleneck8, BottleneckScratch8, DEPTH, PAIR, Product, RING_TOP, TOP, asymmetric, ring};
    use std::arch::x86_64::*;

    /// Pixels whose sums stay in registers: 12 x 2 vectors, 2 weights, 1 input.
    const PIXELS: usize = 12;
    /// Channels of a panel.
    const PANEL: usize = 2 * BLOCK;

    /// Where a row's values go in the ring: beside those of another row, so that two of them are one dot product.
    struct Place {
        /// Of the picture's first column.
        ring: *mut i16,
        /// Values from one column to the next.
        column: usize,
        /// Values from one block of channels to the next.
        block: usize,
        /// Of each pair of values the one that is this row's.
        mask: __mmask32,
    }

    impl Place {
        /// `V` (1 or 2) blocks of a pixel, as floats that are steps of the ring after rounding and clamping. Without `FAR` none reaches 2^31.
        ///
        /// # Safety
        /// AVX-512 F and BW must be there; pixel and blocks lie in the ring.
        #[inline(always)]
        unsafe fn store<const V: usize, const FAR: bool>(&self, pixel: usize, block: usize, values: [__m512; V]) {
            // SAFETY: this function's contract.
            unsafe {
                // What does not fit 32 bit would become the lowest number.
                let near = |value: __m512| if FAR { _mm512_min_ps(value, _mm512_set1_ps(RING_TOP)) } else { value };
                let step = |value: __m512| _mm512_cvtps_epi32(near(value));
                // Packing works on quarters of a vector, and so does what unpacks: the order is kept, each value comes out twice, and the mask
                // takes one of the two.
                let steps = _mm512_packs_epi32(step(values[0]), step(values[V - 1]));
                let steps = _mm512_max_epi16(steps, _mm512_setzero_si512());
                let to = self.ring.add(pixel * self.column + block * self.block);
                _mm512_mask_storeu_epi16(to, self.mask, _mm512_unpacklo_epi16(steps, steps));
                if V > 1 {
                    _mm512_mask_storeu_epi16(to.add(self.block), self.mask, _mm512_unpackhi_epi16(steps, steps));
                }
            }
        }
    }

    /// One row of the input, expanded, into the ring; without one, zeros. Whether all of it was finite.
    ///
    /// # Safety
    /// AVX-512 F, BW and VNNI must be there; `row` is a row of the layer's input, `slot` one of the ring's, `scratch` fits the layer.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    pub(super) unsafe fn fill(layer: &Bottleneck8, row: Option<&[f32]>, slot: usize, scratch: &mut BottleneckScratch8) -> bool {
        let (w, inputs) = (layer.window, layer.inputs());
        let (blocks, groups) = (w.channels.div_ceil(BLOCK), ring(&w) / PAIR);
        let column = blocks * groups * BLOCK * PAIR;
        // SAFETY: this function's contract; the picture's columns begin `pad` columns into the ring.
        unsafe {
            let place = Place {
                ring: scratch.ring.as_mut_ptr().add(w.pad[1] * column + slot / PAIR * BLOCK * PAIR),
                column,
                block: groups * BLOCK * PAIR,
                mask: 0x5555_5555 << (slot % PAIR),
            };
            let Some(row) = row else {
                for pixel in 0..w.input[1] {
                    (0..blocks).for_each(|block| place.store::<1, false>(pixel, block, [_mm512_setzero_ps()]));
                }
                return true;
            };
            let Some(expand) = &layer.expand else {
                let mut bad = _mm512_setzero_ps();
                let mut value = |pixel: usize, block: usize| {
                    let c = block * BLOCK;
                    let x = _mm512_maskz_loadu_ps(lanes(inputs - c), row.as_ptr().add(pixel * inputs + c));
                    bad = _mm512_fmadd_ps(x, _mm512_setzero_ps(), bad);
                    _mm512_mul_ps(x, _mm512_loadu_ps(layer.factor.as_ptr().add(c)))
                };
                for pixel in 0..w.input[1] {
                    for block in (0..blocks / 2 * 2).step_by(2) {
                        place.store::<2, true>(pixel, block, [value(pixel, block), value(pixel, block + 1)]);
                    }
                    if blocks % 2 == 1 {
                        place.store::<1, true>(pixel, blocks - 1, [value(pixel, blocks - 1)]);
                    }
                }
                return _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(bad, bad) == 0;
            };
            let (finite, size, zero) = quantize(row, scratch.input.as_mut_ptr(), asymmetric);
            let (bytes, pixels) = (scratch.input.as_ptr(), w.input[1]);
            let mut at = 0;
            while at < w.channels {
                match (at + BLOCK < w.channels, size > layer.largest_size) {
                    (true, false) => panel::<2, false>(expand, pixels, bytes, at, size, zero, &place),
                    (true, true) => panel::<2, true>(expand, pixels, bytes, at, size, zero, &place),
                    (false, false) => panel::<1, false>(expand, pixels, bytes, at, size, zero, &place),
                    (false, true) => panel::<1, true>(expand, pixels, bytes, at, size, zero, &place),
                }
                at += PANEL;
            }
            finite
        }
    }

    /// `V * 16` channels from `at` on of a whole row; `FAR`: see [`Place::store`].
    ///
    /// # Safety
    /// As [`fill`]; `bytes` holds the row's pixels, `at` is the start of a panel.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn panel<const V: usize, const FAR: bool>(
        expand: &Product,
        pixels: usize,
        bytes: *const u8,
        at: usize,
        size: f32,
        zero: i32,
        place: &Place,
    ) {
        // SAFETY: this function's contract.
        unsafe {
            let zero = _mm512_set1_epi32(zero.wrapping_neg());
            let start: [__m512i; V] =
                std::array::from_fn(|v| _mm512_mullo_epi32(zero, _mm512_loadu_si512(expand.sums.as_ptr().add(at + v * BLOCK).cast())));
            let scale: [__m512; V] =
                std::array::from_fn(|v| _mm512_mul_ps(_mm512_set1_ps(size), _mm512_loadu_ps(expand.scale.as_ptr().add(at + v * BLOCK))));
            let bias: [__m512; V] = std::array::from_fn(|v| _mm512_loadu_ps(expand.bias.as_ptr().add(at + v * BLOCK)));
            let mut pixel = 0;
            while pixel + PIXELS <= pixels {
                tile::<PIXELS, V, FAR>(expand, bytes, pixel, at, start, scale, bias, place);
                pixel += PIXELS;
            }
            while pixel + 4 <= pixels {
                tile::<4, V, FAR>(expand, bytes, pixel, at, start, scale, bias, place);
                pixel += 4;
            }
            while pixel < pixels {
                tile::<1, V, FAR>(expand, bytes, pixel, at, start, scale, bias, place);
                pixel += 1;
            }
        }
    }

    /// # Safety
    /// As [`panel`], for pixels `pixel..pixel + N`.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    unsafe fn tile<const N: usize, const V: usize, const FAR: bool>(
        expand: &Product,
        bytes: *const u8,
        pixel: usize,
        at: usize,
        start: [__m512i; V],
        scale: [__m512; V],
        bias: [__m512; V],
        place: &Place,
    ) {
        // SAFETY: this function's contract.
        unsafe {
            let mut sums = [start; N];
            let steps = expand.inputs / DEPTH;
            dot(
                &mut sums,
                bytes.add(pixel * expand.inputs),
                expand.inputs,
                expand.packed.as_ptr().add(at * expand.inputs),
                PANEL * DEPTH,
                steps,
            );
            for (n, sums) in sums.iter().enumerate() {
                let value = |v: usize| _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[v]), scale[v], bias[v]);
                place.store::<V, FAR>(pixel + n, at / BLOCK, std::array::from_fn(value));
            }
        }
    }

    /// One row of the output from the ring, whose row `start` is the window's first.
    ///
    /// # Safety
    /// As [`fill`]; `line` and `residual` are a row of the layer's output.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    pub(super) unsafe fn line(
        layer: &Bottleneck8,
        start: usize,
        residual: Option<&[f32]>,
        line: &mut [f32],
        scratch: &mut BottleneckScratch8,
    ) {
        let w = layer.window;
        let groups = ring(&w) / PAIR;
        // SAFETY: this function's contract.
        unsafe {
            match (w.kernel[1], groups) {
                _ if !layer.within => depthwise_any(layer, start, scratch),
                (3, 2) => depthwise::<3, 2, 2>(layer, start, scratch),
                (5, 3) => depthwise::<5, 3, 1>(layer, start, scratch),
                _ => depthwise_any(layer, start, scratch),
            }
            let residual = residual.map_or(std::ptr::null(), <[f32]>::as_ptr);
            let outputs = layer.outputs();
            let mut at = 0;
            while at < outputs {
                if at + BLOCK < outputs {
                    project::<2>(layer, scratch.row.as_ptr(), at, residual, line.as_mut_ptr());
                } else {
                    project::<1>(layer, scratch.row.as_ptr(), at, residual, line.as_mut_ptr());
                }
                at += PANEL;
            }
        }
    }

    /// Steps to 16 bytes.
    ///
    /// # Safety
    /// AVX-512 F must be there; room for 16 bytes at `to`.
    #[inline(always)]
    unsafe fn store_bytes(step: __m512i, to: *mut u8) {
        // SAFETY: this function's contract.
        unsafe { _mm_storeu_si128(to.cast(), _mm512_cvtusepi32_epi8(_mm512_max_epi32(step, _mm512_setzero_si512()))) }
    }

    /// `N` windows, each of one block, to the steps of bytes. Their sums grow in turns, so that none waits for its own last instruction.
    ///
    /// # Safety
    /// AVX-512 F, BW and VNNI must be there; `from` are the windows' first vectors in the ring.
    #[inline(always)]
    #[allow(clippy::needless_range_loop)] // Several arrays in step.
    unsafe fn window_steps<const W: usize, const G: usize, const N: usize>(
        from: [*const i16; N],
        column: usize,
        weights: [&[[__m512i; G]; W]; N],
        scale: [__m512; N],
        bias: [__m512; N],
    ) -> [__m512i; N] {
        // SAFETY: this function's contract.
        unsafe {
            let mut sums = [[_mm512_setzero_si512(); G]; N];
            for x in 0..W {
                for g in 0..G {
                    for n in 0..N {
                        let values = _mm512_loadu_si512(from[n].add(x * column + g * BLOCK * PAIR).cast());
                        sums[n][g] = add_pairs(sums[n][g], values, weights[n][x][g]);
                    }
                }
            }
            let mut steps = [_mm512_setzero_si512(); N];
            for n in 0..N {
                let sum = sums[n][1..].iter().fold(sums[n][0], |a, &b| _mm512_add_epi32(a, b));
                steps[n] = byte_step::<false>(sum, scale[n], bias[n]);
            }
            steps
        }
    }

    /// From a sum of the depthwise convolution to the step of a byte, not yet clamped; `FAR` where it might reach 2^31.
    ///
    /// # Safety
    /// AVX-512 F must be there.
    #[inline(always)]
    unsafe fn byte_step<const FAR: bool>(sum: __m512i, scale: __m512, bias: __m512) -> __m512i {
        // SAFETY: this function's contract.
        unsafe {
            // What does not fit 32 bit would become the lowest number.
            let value = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, bias);
            _mm512_cvtps_epi32(if FAR { _mm512_min_ps(value, _mm512_set1_ps(TOP)) } else { value })
        }
    }

    /// The depthwise convolution of one output row, with a kernel `W` wide and `G` dot products high, `B` blocks at a time: their weights stay in
    /// registers.
    ///
    /// # Safety
    /// As [`line`].
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn depthwise<const W: usize, const G: usize, const B: usize>(
        layer: &Bottleneck8,
        start: usize,
        scratch: &mut BottleneckScratch8,
    ) {
        let blocks = layer.window.channels.div_ceil(BLOCK);
        // SAFETY: this function's contract.
        unsafe {
            let mut block = 0;
            while block + B <= blocks {
                depthwise_blocks::<W, G, B>(layer, start, block, scratch);
                block += B;
            }
            while block < blocks {
                depthwise_blocks::<W, G, 1>(layer, start, block, scratch);
                block += 1;
            }
        }
    }

    /// # Safety
    /// As [`depthwise`], for blocks `block..block + B`; `B` is 1 or 2.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn depthwise_blocks<const W: usize, const G: usize, const B: usize>(
        layer: &Bottleneck8,
        start: usize,
        block: usize,
        scratch: &mut BottleneckScratch8,
    ) {
        let w = layer.window;
        let blocks = w.channels.div_ceil(BLOCK);
        let vector = BLOCK * PAIR;
        let column = blocks * G * vector;
        // SAFETY: this function's contract; the ring has `columns()` columns, which is where the last window ends at most.
        unsafe {
            let weights = layer.depthwise.as_ptr().add((start * blocks + block) * W * G * vector);
            let weights: [[[__m512i; G]; W]; B] = std::array::from_fn(|b| {
                std::array::from_fn(|x| std::array::from_fn(|g| _mm512_loadu_si512(weights.add(((b * W + x) * G + g) * vector).cast())))
            });
            let scale: [__m512; B] = std::array::from_fn(|b| _mm512_loadu_ps(layer.scale.as_ptr().add((block + b) * BLOCK)));
            let bias: [__m512; B] = std::array::from_fn(|b| _mm512_loadu_ps(layer.bias.as_ptr().add((block + b) * BLOCK)));
            let mut from = scratch.ring.as_ptr().add(block * G * vector);
            let mut to = scratch.row.as_mut_ptr().add(block * BLOCK);
            let (from_step, to_step) = (w.stride[1] * column, blocks * BLOCK);
            // Two windows at a time, two blocks of one pixel or one block of two pixels: packing saturates, and it takes less than to narrow each.
            let bytes_of = |near: __m512i, far: __m512i| {
                // Packing works on quarters of a vector, which are put back in order.
                let order = _mm512_castsi256_si512(_mm256_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13));
                let both = _mm512_packs_epi32(near, far);
                _mm512_castsi512_si256(_mm512_permutexvar_epi32(order, _mm512_packus_epi16(both, both)))
            };
            let mut left = w.output[1];
            if B > 1 {
                let (weights, scale, bias) = ([&weights[0], &weights[B - 1]], [scale[0], scale[B - 1]], [bias[0], bias[B - 1]]);
                while left > 0 {
                    let [near, far] = window_steps([from, from.add(G * vector)], column, weights, scale, bias);
                    _mm256_storeu_si256(to.cast(), bytes_of(near, far));
                    (from, to, left) = (from.add(from_step), to.add(to_step), left - 1);
                }
            } else {
                let (weights, scale, bias) = ([&weights[0]; 2], [scale[0]; 2], [bias[0]; 2]);
                while left > 1 {
                    let [near, far] = window_steps([from, from.add(from_step)], column, weights, scale, bias);
                    let bytes = bytes_of(near, far);
                    _mm_storeu_si128(to.cast(), _mm256_castsi256_si128(bytes));
                    _mm_storeu_si128(to.add(to_step).cast(), _mm256_extracti128_si256::<1>(bytes));
                    (from, to, left) = (from.add(2 * from_step), to.add(2 * to_step), left - 2);
                }
                if left > 0 {
                    let [step] = window_steps([from], column, [weights[0]], [scale[0]], [bias[0]]);
                    store_bytes(step, to);
                }
            }
        }
    }

    /// As [`depthwise`], for any kernel.
    ///
    /// # Safety
    /// As [`line`].
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn depthwise_any(layer: &Bottleneck8, start: usize, scratch: &mut BottleneckScratch8) {
        let w = layer.window;
        let (blocks, groups) = (w.channels.div_ceil(BLOCK), ring(&w) / PAIR);
        let vector = BLOCK * PAIR;
        let column = blocks * groups * vector;
        // SAFETY: as in `depthwise`.
        unsafe {
            for block in 0..blocks {
                let weights = layer.depthwise.as_ptr().add((start * blocks + block) * w.kernel[1] * groups * vector);
                let scale = _mm512_loadu_ps(layer.scale.as_ptr().add(block * BLOCK));
                let bias = _mm512_loadu_ps(layer.bias.as_ptr().add(block * BLOCK));
                for ox in 0..w.output[1] {
                    let from = scratch.ring.as_ptr().add(ox * w.stride[1] * column + block * groups * vector);
                    let mut sum = _mm512_setzero_si512();
                    for x in 0..w.kernel[1] {
                        for g in 0..groups {
                            let values = _mm512_loadu_si512(from.add(x * column + g * vector).cast());
                            sum = add_pairs(sum, values, _mm512_loadu_si512(weights.add((x * groups + g) * vector).cast()));
                        }
                    }
                    store_bytes(byte_step::<true>(sum, scale, bias), scratch.row.as_mut_ptr().add((ox * blocks + block) * BLOCK));
                }
            }
        }
    }

    /// `V * 16` outputs from `at` on of a whole row.
    ///
    /// # Safety
    /// As [`line`]; `row` holds the depthwise convolution's bytes; `residual` may be null.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn project<const V: usize>(layer: &Bottleneck8, row: *const u8, at: usize, residual: *const f32, out: *mut f32) {
        let pixels = layer.window.output[1];
        let mut pixel = 0;
        // SAFETY: tiles end at or before `pixels`.
        unsafe {
            while pixel + PIXELS <= pixels {
                project_tile::<PIXELS, V>(layer, row, pixel, at, residual, out);
                pixel += PIXELS;
            }
            while pixel + 4 <= pixels {
                project_tile::<4, V>(layer, row, pixel, at, residual, out);
                pixel += 4;
            }
            while pixel < pixels {
                project_tile::<1, V>(layer, row, pixel, at, residual, out);
                pixel += 1;
            }
        }
    }

    /// # Safety
    /// As [`project`], for pixels `pixel..pixel + N`.
    #[inline(always)]
    unsafe fn project_tile<const N: usize, const V: usize>(
        layer: &Bottleneck8,
        row: *const u8,
        pixel: usize,
        at: usize,
        residual: *const f32,
        out: *mut f32,
    ) {
        let p = &layer.project;
        // Bytes beyond the channels are zero times zero; weights are padded to a multiple of four only, which is where the steps end.
        let (stride, steps) = (p.inputs.next_multiple_of(BLOCK), p.inputs.div_ceil(DEPTH));
        // SAFETY: this function's contract; loads and stores past a pixel's end are masked off.
        unsafe {
            let mut sums = [[_mm512_setzero_si512(); V]; N];
            dot(&mut sums, row.add(pixel * stride), stride, p.packed.as_ptr().add(at * steps * DEPTH), PANEL * DEPTH, steps);
            for v in 0..V {
                let column = at + v * BLOCK;
                let mask = lanes(p.outputs - column);
                let scale = _mm512_loadu_ps(p.scale.as_ptr().add(column));
                let bias = _mm512_loadu_ps(p.bias.as_ptr().add(column));
                for (n, sums) in sums.iter().enumerate() {
                    let place = (pixel + n) * p.outputs + column;
                    let mut y = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[v]), scale, bias);
                    if !residual.is_null() {
                        y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(mask, residual.add(place)));
                    }
                    _mm512_mask_storeu_ps(out.add(place), mask, y);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::depthwise::Depthwise;
    use super::super::linear::{Activation, Linear};
    use super::super::testing::{made, values};
    use super::*;
    use proptest::prelude::*;

    /// Random weights of a product: bytes, scale by output, bias.
    struct Random {
        weight: Vec<i8>,
        scale: Vec<f32>,
        bias: Vec<f32>,
    }

    impl Random {
        fn new(inputs: usize, outputs: usize, seed: u64) -> Self {
            // Sums of about 3: inside and outside of ReLU6.
            let size = 3.0 / (inputs as f32).sqrt() / 127.0;
            Self {
                weight: values(inputs * outputs, seed).iter().map(|w| (w * 127.0) as i8).collect(),
                scale: values(outputs, seed + 1).iter().map(|s| size * (1.0 + s / 2.0)).collect(),
                bias: values(outputs, seed + 2),
            }
        }

        fn view(&self) -> Weights8<'_> {
            Weights8 { weight: &self.weight, scale: &self.scale, bias: &self.bias }
        }
    }

    struct Case {
        inputs: Option<usize>,
        outputs: usize,
        window: Window,
        seed: u64,
    }

    fn check(case: Case) {
        let Case { inputs, outputs, window: w, seed } = case;
        let (channels, taps) = (w.channels, w.kernel[0] * w.kernel[1]);
        let expand = inputs.map(|inputs| Random::new(inputs, channels, seed));
        let (depthwise, project) = (Random::new(taps, channels, seed + 10), Random::new(channels, outputs, seed + 20));
        let width = inputs.unwrap_or(channels);
        let mut input = values(w.input[0] * w.input[1] * width, seed + 30);
        if inputs.is_none() {
            input.iter_mut().for_each(|x| *x = x.abs() * 6.0);
        }
        let len = w.output[0] * w.output[1] * outputs;
        let residual = values(len, seed + 40);
        let tops: Vec<f32> = values(channels, seed + 50).iter().map(|x| 5.0 + x).collect();
        let layer = |isa| Bottleneck8::new(expand.as_ref().map(Random::view), depthwise.view(), project.view(), w, (&tops, 6.0), isa);
        let run = |isa, split: usize| {
            let layer = layer(isa);
            let mut scratch = BottleneckScratch8::default();
            scratch.fit(&layer);
            // What an earlier layer left must not matter.
            scratch.input.fill(0xa5);
            scratch.row.fill(0xa5);
            scratch.ring.fill(0x5a5a);
            let mut out = vec![f32::NAN; len];
            let at = split * w.output[1] * outputs;
            let (first, second) = out.split_at_mut(at);
            layer.run(Source::Picture(&input), Some(&residual[..at]), 0, first, &mut scratch);
            // The second part from rows that are made.
            made(&input, w.input[1] * width, |rows| layer.run(rows, Some(&residual[at..]), split, second, &mut scratch));
            out
        };
        let wanted = run(Isa::Generic, w.output[0]);
        for isa in Isa::all_available() {
            for split in [w.output[0], w.output[0] / 2] {
                assert_eq!(run(isa, split), wanted, "{} {w:?} {inputs:?} -> {outputs}, split {split}", isa.name());
            }
        }
        // Against the parts in float, on the dequantized weights: half a step of each rounding, weighted, bounds the difference; sums of
        // random signs stay well below.
        let dequantized = |r: &Random, by: fn(usize, usize) -> usize, n: usize| -> Vec<f32> {
            r.weight.iter().enumerate().map(|(i, &w)| f32::from(w) * r.scale[by(i, n)]).collect()
        };
        let clamp = |values: &mut [f32]| {
            values.chunks_exact_mut(channels).for_each(|p| p.iter_mut().zip(&tops).for_each(|(x, &top)| *x = x.clamp(0.0, top)))
        };
        let mut wide = vec![0.0; w.input[0] * w.input[1] * channels];
        match &expand {
            Some(e) => Linear::new(&dequantized(e, |i, n| i % n, channels), &e.bias, width, channels, Activation::None, Isa::Generic)
                .run(&input, None, &mut wide),
            None => wide.copy_from_slice(&input),
        }
        clamp(&mut wide);
        let mut mid = vec![0.0; w.output[0] * w.output[1] * channels];
        Depthwise::new(&dequantized(&depthwise, |i, n| i / n, taps), &depthwise.bias, w, Activation::Relu6, Isa::Generic)
            .run(&wide, &mut mid);
        let mut float = vec![0.0; len];
        Linear::new(&dequantized(&project, |i, n| i % n, outputs), &project.bias, channels, outputs, Activation::None, Isa::Generic).run(
            &mid,
            Some(&residual),
            &mut float,
        );
        let worst = wanted.iter().zip(&float).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst < 0.35, "{w:?} {inputs:?} -> {outputs}: {worst} from float");
    }

    fn window(channels: usize, input: [usize; 2], kernel: usize, stride: usize, pad: usize) -> Window {
        let out = |side: usize| (side + 2 * pad - kernel) / stride + 1;
        Window { channels, input, output: [out(input[0]), out(input[1])], kernel: [kernel; 2], stride: [stride; 2], pad: [pad; 2] }
    }

    #[test]
    fn the_sizes_of_the_model_agree_to_the_bit() {
        check(Case { inputs: Some(16), outputs: 24, window: window(96, [14, 28], 3, 2, 1), seed: 1 });
        check(Case { inputs: Some(24), outputs: 24, window: window(144, [9, 14], 3, 1, 1), seed: 2 });
        check(Case { inputs: Some(40), outputs: 112, window: window(240, [7, 14], 5, 1, 2), seed: 3 });
        check(Case { inputs: None, outputs: 16, window: window(32, [9, 30], 3, 1, 1), seed: 4 });
        // Padded below and to the right only, as TensorFlow pads with stride 2.
        let uneven = Window { output: [7, 7], pad: [0, 0], ..window(72, [14, 14], 3, 2, 1) };
        check(Case { inputs: Some(24), outputs: 40, window: uneven, seed: 5 });
    }

    #[test]
    fn what_is_far_beyond_the_top_is_the_top_everywhere() {
        let w = window(20, [6, 7], 3, 1, 1);
        let (expand, depthwise, project) = (Random::new(8, 20, 1), Random::new(9, 20, 2), Random::new(20, 5, 3));
        for inputs in [Some(8), None] {
            // Steps beyond 2^31, before and, by a top next to nothing, after the depthwise convolution.
            for (size, last_top) in [(1e4, 6.0), (1e6, 6.0), (1e9, 6.0), (1.0, 1e-9)] {
                let input: Vec<f32> = values(42 * inputs.unwrap_or(20), 4).iter().map(|x| x.abs() * size).collect();
                let run = |isa| {
                    let tops = (&[6.0; 20][..], last_top);
                    let layer = Bottleneck8::new(inputs.map(|_| expand.view()), depthwise.view(), project.view(), w, tops, isa);
                    let mut scratch = BottleneckScratch8::default();
                    scratch.fit(&layer);
                    let mut out = vec![0.0; 42 * 5];
                    layer.run(Source::Picture(&input), None, 0, &mut out, &mut scratch);
                    out
                };
                for isa in Isa::all_available() {
                    assert_eq!(run(isa), run(Isa::Generic), "{} {inputs:?} {size} {last_top}", isa.name());
                }
            }
        }
    }

    #[test]
    fn not_a_number_reaches_the_output_and_leaves_with_the_next_run() {
        for isa in Isa::all_available() {
            for inputs in [Some(8), None] {
                let w = window(20, [6, 7], 3, 1, 1);
                let (expand, depthwise, project) = (Random::new(8, 20, 1), Random::new(9, 20, 2), Random::new(20, 5, 3));
                let layer = Bottleneck8::new(inputs.map(|_| expand.view()), depthwise.view(), project.view(), w, (&[6.0; 20], 6.0), isa);
                let mut scratch = BottleneckScratch8::default();
                scratch.fit(&layer);
                let good = vec![0.5; 42 * inputs.unwrap_or(20)];
                for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                    let mut input = good.clone();
                    input[100] = bad;
                    let mut out = vec![0.0; 42 * 5];
                    layer.run(Source::Picture(&input), None, 0, &mut out, &mut scratch);
                    assert!(out.iter().all(|x| x.is_nan()), "{} {inputs:?} {bad}", isa.name());
                    layer.run(Source::Picture(&good), None, 0, &mut out, &mut scratch);
                    assert!(out.iter().all(|x| x.is_finite()));
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]
        #[test]
        fn any_shape_agrees_to_the_bit(
            inputs in 0usize..8, channels in 1usize..50, outputs in 1usize..60, height in 1usize..10, width in 1usize..20, kernel in 1usize..8,
            stride in 1usize..4, pad in 0usize..4, seed: u64,
        ) {
            prop_assume!(pad < kernel && height + 2 * pad >= kernel && width + 2 * pad >= kernel);
            let (inputs, channels) = if inputs == 0 { (None, channels.next_multiple_of(4)) } else { (Some(inputs * 4), channels) };
            check(Case { inputs, outputs, window: window(channels, [height, width], kernel, stride, pad), seed: seed >> 8 });
        }
    }
}
