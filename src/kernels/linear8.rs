//! Fused int8 linear: `out = act(a x weight + bias) (+ residual)` with int8 weights, input and output in float.
//!
//! Weights are signed 8 bit with one scale per output. Each input row is quantized when it is used, to unsigned 8 bit with its own scale and
//! zero point, so there is nothing to calibrate and an outlier costs one row its resolution only. Products are summed in 32-bit integers:
//! exact, so every instruction set gives the same result. Where there is no integer dot product, [`super::linear::Linear`] on the
//! dequantized weights is faster; [`Linear8::pays`] says so.

use super::isa::Isa;
use super::linear::Activation;

/// Outputs a panel covers: two vectors of 16 sums.
const WIDTH: usize = 32;
/// Inputs that one dot-product instruction takes per output.
const DEPTH: usize = 4;
/// Rows quantized together: their bytes stay in L1/L2 while all panels pass by.
const BLOCK: usize = 48;
/// Largest number of inputs for which the 32-bit sums cannot overflow: 2^31 / (255 * 128).
const MAX_INPUTS: usize = 65_793;

/// An int8 linear layer ready to run.
#[derive(Clone, Debug)]
pub struct Linear8 {
    inputs: usize,
    outputs: usize,
    /// `[panels][inputs / DEPTH, rounded up][WIDTH][DEPTH]`, zero-padded.
    packed: Vec<i8>,
    /// By output, padded to the panels, as all below.
    scale: Vec<f32>,
    bias: Vec<f32>,
    /// Sum of an output's weights: what the zero point of a row is multiplied with.
    sums: Vec<i32>,
    activation: Activation,
    isa: Isa,
}

/// Quantized rows; one per session, made for the widest layer.
#[derive(Clone, Debug)]
pub struct Scratch8 {
    bytes: Vec<u8>,
    scale: [f32; BLOCK],
    zero: [i32; BLOCK],
}

impl Scratch8 {
    /// For layers of up to `inputs` inputs.
    pub fn new(inputs: usize) -> Self {
        Self { bytes: vec![0; BLOCK * inputs.next_multiple_of(DEPTH)], scale: [0.0; BLOCK], zero: [0; BLOCK] }
    }

    /// Bytes it takes.
    pub fn bytes(&self) -> usize {
        self.bytes.len() + BLOCK * 8
    }
}

impl Linear8 {
    /// Whether int8 is faster than float on this instruction set.
    pub fn pays(isa: Isa) -> bool {
        isa == Isa::Avx512Vnni
    }

    /// `weight` is `[inputs, outputs]` row-major; output `n` is `sum(a * weight[.., n]) * scale[n] + bias[n]`.
    ///
    /// # Panics
    /// When the lengths do not fit, there are more than 65 793 inputs (the sums could overflow), or the instruction set is not there.
    pub fn new(weight: &[i8], scale: &[f32], bias: &[f32], inputs: usize, activation: Activation, isa: Isa) -> Self {
        let outputs = bias.len();
        assert_eq!(weight.len(), inputs * outputs, "weight of an int8 linear {inputs} -> {outputs}");
        assert_eq!(scale.len(), outputs, "scale of an int8 linear {inputs} -> {outputs}");
        assert!(inputs <= MAX_INPUTS, "an int8 linear of {inputs} inputs could overflow");
        assert!(isa.available(), "{} is not available here", isa.name());
        let (panels, groups) = (outputs.div_ceil(WIDTH), inputs.div_ceil(DEPTH));
        let mut packed = vec![0; panels * groups * WIDTH * DEPTH];
        let mut sums = vec![0; panels * WIDTH];
        for (i, &w) in weight.iter().enumerate() {
            let (k, n) = (i / outputs, i % outputs);
            packed[((n / WIDTH * groups + k / DEPTH) * WIDTH + n % WIDTH) * DEPTH + k % DEPTH] = w;
            sums[n] += i32::from(w);
        }
        let padded = |values: &[f32]| {
            let mut values = values.to_vec();
            values.resize(panels * WIDTH, 0.0);
            values
        };
        Self { inputs, outputs, packed, scale: padded(scale), bias: padded(bias), sums, activation, isa }
    }

    /// Columns of the input.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Columns of the output.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Rows are `a.len() / inputs`; `out` and `residual` are `[rows, outputs]`. Allocates nothing. A row with a value that is not finite gives a row
    /// of NaN.
    ///
    /// # Panics
    /// When the lengths do not fit or the scratch was made for fewer inputs.
    pub fn run(&self, a: &[f32], residual: Option<&[f32]>, out: &mut [f32], scratch: &mut Scratch8) {
        let rows = a.len().checked_div(self.inputs).unwrap_or(0);
        assert_eq!(a.len(), rows * self.inputs, "input of an int8 linear {} -> {}", self.inputs, self.outputs);
        assert_eq!(out.len(), rows * self.outputs, "output of an int8 linear {} -> {}", self.inputs, self.outputs);
        assert!(scratch.bytes.len() >= BLOCK * self.inputs.next_multiple_of(DEPTH), "scratch of an int8 linear");
        if let Some(residual) = residual {
            assert_eq!(residual.len(), out.len(), "residual of an int8 linear");
        }
        if rows == 0 {
            return;
        }
        let blocks = a.chunks(BLOCK * self.inputs).zip(out.chunks_mut((BLOCK * self.outputs).max(1))).enumerate();
        for (block, (a, out)) in blocks {
            let residual = residual.map(|values| &values[block * BLOCK * self.outputs..][..out.len()]);
            match self.isa {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: `new` checked that the instruction set is there, the asserts above the lengths.
                Isa::Avx512Vnni => unsafe { x86::block(self, a, residual, out, scratch) },
                _ => self.block_generic(a, residual, out, scratch),
            }
        }
    }

    /// At most `BLOCK` rows.
    fn block_generic(&self, a: &[f32], residual: Option<&[f32]>, out: &mut [f32], scratch: &mut Scratch8) {
        let depth = self.inputs.next_multiple_of(DEPTH);
        let groups = depth / DEPTH;
        for (r, (row, line)) in a.chunks_exact(self.inputs).zip(out.chunks_exact_mut(self.outputs)).enumerate() {
            let bytes = &mut scratch.bytes[r * depth..(r + 1) * depth];
            let (low, high) = row.iter().fold((0.0f32, 0.0f32), |(low, high), &x| (low.min(x), high.max(x)));
            let finite = row.iter().all(|x| x.is_finite());
            let (inverse, scale, zero) = quantizer(low, high, finite);
            bytes.fill(0);
            for (byte, &x) in bytes.iter_mut().zip(row) {
                *byte = ((x * inverse).round_ties_even() as i32).saturating_add(zero).clamp(0, 255) as u8;
            }
            for (n, y) in line.iter_mut().enumerate() {
                let mut sum = 0i32;
                for (g, bytes) in bytes.chunks_exact(DEPTH).enumerate() {
                    let weights = &self.packed[((n / WIDTH * groups + g) * WIDTH + n % WIDTH) * DEPTH..][..DEPTH];
                    sum += bytes.iter().zip(weights).map(|(&x, &w)| i32::from(x) * i32::from(w)).sum::<i32>();
                }
                let sum = (sum - zero * self.sums[n]) as f32;
                let value = self.activation.apply(sum.mul_add(scale * self.scale[n], self.bias[n]));
                *y = value + residual.map_or(0.0, |residual| residual[r * self.outputs + n]);
            }
        }
    }
}

/// For a row whose values lie in `low..=high` (zero included): the factor to steps, the size of a step, the step that is zero.
fn quantizer(low: f32, high: f32, finite: bool) -> (f32, f32, i32) {
    if !finite {
        return (0.0, f32::NAN, 0);
    }
    let range = high - low;
    // The range of finite values may still overflow, or be so small that its inverse does.
    if range < f32::MIN_POSITIVE * 256.0 {
        return (0.0, 0.0, 0);
    }
    if !range.is_finite() {
        return (0.0, f32::NAN, 0);
    }
    let inverse = 255.0 / range;
    (inverse, range / 255.0, (-low * inverse).round_ties_even() as i32)
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Activation, BLOCK, DEPTH, Linear8, Scratch8, WIDTH, quantizer};
    use std::arch::x86_64::*;

    /// Rows whose sums stay in registers: 12 rows x 2 vectors, 2 weights, 1 input.
    const ROWS: usize = 12;

    /// At most `BLOCK` rows.
    ///
    /// # Safety
    /// AVX-512 F, BW and VNNI must be there; lengths as `Linear8::run` checks them.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    pub(super) unsafe fn block(layer: &Linear8, a: &[f32], residual: Option<&[f32]>, out: &mut [f32], scratch: &mut Scratch8) {
        let depth = layer.inputs.next_multiple_of(DEPTH);
        let rows = a.len() / layer.inputs;
        debug_assert!(rows <= BLOCK);
        for (r, row) in a.chunks_exact(layer.inputs).enumerate() {
            // SAFETY: this function's contract; `bytes` is as long as the row, rounded up.
            unsafe {
                let bytes = &mut scratch.bytes[r * depth..(r + 1) * depth];
                (scratch.scale[r], scratch.zero[r]) = quantize(row, bytes);
            }
        }
        let residual = residual.map_or(std::ptr::null(), <[f32]>::as_ptr);
        for panel in 0..layer.bias.len() / WIDTH {
            let mut row = 0;
            // SAFETY: row groups end at or before `rows`, panels are the layer's.
            unsafe {
                while row + ROWS <= rows {
                    tile::<ROWS>(layer, scratch, row, panel, residual, out.as_mut_ptr());
                    row += ROWS;
                }
                while row + 4 <= rows {
                    tile::<4>(layer, scratch, row, panel, residual, out.as_mut_ptr());
                    row += 4;
                }
                while row < rows {
                    tile::<1>(layer, scratch, row, panel, residual, out.as_mut_ptr());
                    row += 1;
                }
            }
        }
    }

    /// One row to bytes: the step's size and the zero point.
    ///
    /// # Safety
    /// AVX-512F must be there; `bytes` at least as long as `row`.
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn quantize(row: &[f32], bytes: &mut [u8]) -> (f32, i32) {
        let whole = row.len() - row.len() % 16;
        // SAFETY: vectors end at `whole`, the rest is read and written by index.
        unsafe {
            let (mut low, mut high, mut bad) = (_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps());
            let mut i = 0;
            while i < whole {
                let x = _mm512_loadu_ps(row.as_ptr().add(i));
                low = _mm512_min_ps(low, x);
                high = _mm512_max_ps(high, x);
                // 0 for a number, NaN for infinity and NaN, which stays in the sum.
                bad = _mm512_add_ps(bad, _mm512_sub_ps(x, x));
                i += 16;
            }
            let (mut least, mut most) = (_mm512_reduce_min_ps(low), _mm512_reduce_max_ps(high));
            let mut finite = _mm512_reduce_add_ps(bad) == 0.0;
            for &x in &row[whole..] {
                least = least.min(x);
                most = most.max(x);
                finite &= x.is_finite();
            }
            let (inverse, scale, zero) = quantizer(least, most, finite);
            let (factors, zeros) = (_mm512_set1_ps(inverse), _mm512_set1_epi32(zero));
            i = 0;
            while i < whole {
                let x = _mm512_mul_ps(_mm512_loadu_ps(row.as_ptr().add(i)), factors);
                let steps = _mm512_max_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(x), zeros), _mm512_setzero_si512());
                _mm_storeu_si128(bytes.as_mut_ptr().add(i).cast(), _mm512_cvtusepi32_epi8(steps));
                i += 16;
            }
            for i in whole..row.len() {
                bytes[i] = ((row[i] * inverse).round_ties_even() as i32).saturating_add(zero).clamp(0, 255) as u8;
            }
            // Weights there are zero, but never multiply what an earlier layer left.
            bytes[row.len()..].fill(0);
            (scale, zero)
        }
    }

    /// `N` rows times one panel.
    ///
    /// # Safety
    /// AVX-512 F, BW and VNNI must be there; rows `row..row + N` are quantized in `scratch` and lie within `out` and `residual` (null for none);
    /// `panel` is one of the layer's.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn tile<const N: usize>(layer: &Linear8, scratch: &Scratch8, row: usize, panel: usize, residual: *const f32, out: *mut f32) {
        let depth = layer.inputs.next_multiple_of(DEPTH);
        let at = panel * WIDTH;
        // SAFETY: this function's contract; stores and loads past a row's end are masked off.
        unsafe {
            let mut w = layer.packed.as_ptr().add(at * depth);
            let bytes = scratch.bytes.as_ptr().add(row * depth);
            let mut acc = [[_mm512_setzero_si512(); 2]; N];
            let mut k = 0;
            while k < depth {
                let w0 = _mm512_loadu_si512(w.cast());
                let w1 = _mm512_loadu_si512(w.add(64).cast());
                for (r, sums) in acc.iter_mut().enumerate() {
                    let x = _mm512_set1_epi32(bytes.add(r * depth + k).cast::<i32>().read_unaligned());
                    sums[0] = _mm512_dpbusd_epi32(sums[0], x, w0);
                    sums[1] = _mm512_dpbusd_epi32(sums[1], x, w1);
                }
                w = w.add(WIDTH * DEPTH);
                k += DEPTH;
            }
            for half in 0..2 {
                let column = at + half * 16;
                let n = layer.outputs.saturating_sub(column).min(16);
                let mask = ((1u32 << n) - 1) as __mmask16;
                let scale = _mm512_loadu_ps(layer.scale.as_ptr().add(column));
                let bias = _mm512_loadu_ps(layer.bias.as_ptr().add(column));
                let sums = _mm512_loadu_si512(layer.sums.as_ptr().add(column).cast());
                for (r, acc) in acc.iter().enumerate() {
                    let zero = _mm512_mullo_epi32(_mm512_set1_epi32(scratch.zero[row + r]), sums);
                    let sum = _mm512_cvtepi32_ps(_mm512_sub_epi32(acc[half], zero));
                    let mut y = _mm512_fmadd_ps(sum, _mm512_mul_ps(_mm512_set1_ps(scratch.scale[row + r]), scale), bias);
                    // The constant first: NaN stays, see `linear`.
                    match layer.activation {
                        Activation::None => {}
                        Activation::Relu => y = _mm512_max_ps(_mm512_setzero_ps(), y),
                        Activation::Relu6 => y = _mm512_min_ps(_mm512_set1_ps(6.0), _mm512_max_ps(_mm512_setzero_ps(), y)),
                    }
                    let place = (row + r) * layer.outputs + column;
                    if n > 0 {
                        if !residual.is_null() {
                            y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(mask, residual.add(place)));
                        }
                        _mm512_mask_storeu_ps(out.add(place), mask, y);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn values(n: usize, seed: u64) -> Vec<f32> {
        let mut s = seed | 1;
        (0..n)
            .map(|_| {
                s = s.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                ((s >> 40) as f32 / (1u32 << 24) as f32) * 2.0 - 1.0
            })
            .collect()
    }

    fn layer(inputs: usize, outputs: usize, activation: Activation, isa: Isa, seed: u64) -> (Linear8, Vec<f32>, Vec<f32>) {
        let weight: Vec<i8> = values(inputs * outputs, seed).iter().map(|w| (w * 127.0) as i8).collect();
        let scale: Vec<f32> = values(outputs, seed + 1).iter().map(|s| 0.001 + s.abs() / 100.0).collect();
        let bias = values(outputs, seed + 2);
        let float = weight.iter().enumerate().map(|(i, &w)| f32::from(w) * scale[i % outputs.max(1)]).collect();
        (Linear8::new(&weight, &scale, &bias, inputs, activation, isa), float, bias)
    }

    fn check(rows: usize, inputs: usize, outputs: usize, activation: Activation, with_residual: bool, seed: u64) {
        let a = values(rows * inputs, seed + 3);
        let residual = values(rows * outputs, seed + 4);
        let residual = with_residual.then_some(residual.as_slice());
        let mut scratch = Scratch8::new(inputs);
        let (oracle, float, bias) = layer(inputs, outputs, activation, Isa::Generic, seed);
        let mut wanted = vec![0.0; rows * outputs];
        oracle.run(&a, residual, &mut wanted, &mut scratch);
        for isa in Isa::all_available() {
            let mut got = vec![f32::NAN; rows * outputs];
            layer(inputs, outputs, activation, isa, seed).0.run(&a, residual, &mut got, &mut scratch);
            assert_eq!(got, wanted, "{} {rows}x{inputs}x{outputs}: integers are exact", isa.name());
        }
        // Against float: each input is at most half a step of 2/255 off.
        for (i, y) in wanted.iter().enumerate() {
            let (r, n) = (i / outputs, i % outputs);
            let (mut sum, mut slack) = (f64::from(bias[n]), 1e-4);
            for k in 0..inputs {
                let w = f64::from(float[k * outputs + n]);
                sum += f64::from(a[r * inputs + k]) * w;
                slack += w.abs() * 1.01 / 255.0;
            }
            let exact = f64::from(activation.apply(sum as f32)) + residual.map_or(0.0, |residual| f64::from(residual[i]));
            assert!((f64::from(*y) - exact).abs() <= slack, "{rows}x{inputs}x{outputs} at {i}: {y} {exact} +- {slack}");
        }
    }

    #[test]
    fn the_sizes_of_the_model_agree() {
        for (rows, inputs, outputs) in [(196, 256, 96), (196, 192, 256), (50, 16, 64), (49, 3, 5), (1, 1, 1), (100, 27, 33), (0, 4, 4)] {
            check(rows, inputs, outputs, Activation::Relu6, true, 7);
        }
    }

    #[test]
    fn a_row_that_is_not_finite_gives_nan_and_harms_no_other() {
        for isa in Isa::all_available() {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                for at in [3, 36] {
                    let (layer, ..) = layer(37, 20, Activation::Relu6, isa, 1);
                    let mut a = values(3 * 37, 5);
                    a[37 + at] = bad;
                    let mut out = vec![0.0; 60];
                    layer.run(&a, None, &mut out, &mut Scratch8::new(37));
                    assert!(out[20..40].iter().all(|x| x.is_nan()), "{} {bad} at {at}", isa.name());
                    assert!(out[..20].iter().chain(&out[40..]).all(|x| x.is_finite()), "{}", isa.name());
                }
            }
        }
    }

    #[test]
    fn rows_of_zeros_and_tiny_values_give_the_bias() {
        for isa in Isa::all_available() {
            let (layer, _, bias) = layer(20, 10, Activation::None, isa, 3);
            for x in [0.0, f32::MIN_POSITIVE, -f32::MIN_POSITIVE] {
                let mut out = vec![f32::NAN; 10];
                layer.run(&[x; 20], None, &mut out, &mut Scratch8::new(20));
                assert_eq!(out, bias, "{} {x}", isa.name());
            }
        }
    }

    proptest! {
        #[test]
        fn any_size_agrees(rows in 0usize..60, inputs in 1usize..70, outputs in 1usize..80, kind in 0u8..3, residual: bool, seed: u64) {
            let activation = [Activation::None, Activation::Relu, Activation::Relu6][usize::from(kind)];
            check(rows, inputs, outputs, activation, residual, seed >> 8);
        }
    }
}
