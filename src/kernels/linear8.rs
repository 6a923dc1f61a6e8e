//! Fused int8 linear: `out = act(a x weight + bias) (+ residual)` with int8 weights, input and output in float.
//!
//! Weights are signed 8 bit with one scale per output. Each input row is quantized when it is used, to unsigned 8 bit with its own scale and
//! zero point, so there is nothing to calibrate and an outlier costs one row its resolution only. Products are summed in 32-bit integers:
//! exact, so every instruction set gives the same result to the bit. Where there is no integer dot product,
//! [`super::linear::Linear`] on the dequantized weights may be faster; [`Linear8::pays`] says so.
//!
//! Weights are packed for the instruction set that runs them (`Layout`); quantized rows wait in a scratch memory in the form it wants.

#[cfg(target_arch = "aarch64")]
mod arm;
#[cfg(target_arch = "x86_64")]
mod x86;

use super::aligned::Aligned;
use super::isa::Isa;
use super::linear::Activation;

/// Rows quantized together: their bytes stay in L1/L2 while all panels pass by. A multiple of every tile's rows.
const BLOCK: usize = 48;
/// Largest number of inputs. The 32-bit sums cannot overflow below 2^31 / (255 * 128) = 65 793; AVX-512 also splits sums of weights into 7 and
/// 16 bits.
const MAX_INPUTS: usize = 32_767;

/// How an instruction set wants weights and quantized rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    /// Outputs that a panel covers.
    width: usize,
    /// Neighbouring inputs that lie together for each output: what one instruction sums.
    depth: usize,
    /// Bytes of a weight and of a quantized input: 1, or 2 where the instructions take 16 bit.
    pub(super) bytes: usize,
}

impl Layout {
    pub(super) fn of(isa: Isa) -> Self {
        match isa {
            Isa::Avx2 => Self { width: 16, depth: 2, bytes: 2 },
            Isa::AvxVnni => Self { width: 16, depth: 4, bytes: 1 },
            Isa::Generic | Isa::Avx512 | Isa::Avx512Vnni => Self { width: 32, depth: 4, bytes: 1 },
            Isa::Neon | Isa::NeonDot => Self { width: 8, depth: 4, bytes: 1 },
            Isa::NeonI8mm => Self { width: 8, depth: 8, bytes: 1 },
        }
    }

    /// Where the weight of input `k` and output `n` lies among those of `inputs` inputs, in weights.
    pub(super) fn place(self, k: usize, n: usize, inputs: usize) -> usize {
        let groups = inputs.div_ceil(self.depth);
        ((n / self.width * groups + k / self.depth) * self.width + n % self.width) * self.depth + k % self.depth
    }

    /// `weight`, `[inputs, outputs]` row-major, in its places, zero-padded; as bytes, whatever a weight's size.
    pub(super) fn pack(self, weight: &[i8], inputs: usize, outputs: usize) -> Aligned<i8> {
        let (panels, groups) = (outputs.div_ceil(self.width), inputs.div_ceil(self.depth));
        let mut packed = Aligned::zeroed(panels * groups * self.width * self.depth * self.bytes);
        for (i, &w) in weight.iter().enumerate() {
            let place = self.place(i / outputs, i % outputs, inputs) * self.bytes;
            for (byte, value) in packed[place..place + self.bytes].iter_mut().zip(i16::from(w).to_le_bytes()) {
                *byte = value as i8;
            }
        }
        packed
    }
}

/// An int8 linear layer ready to run.
#[derive(Clone, Debug)]
pub struct Linear8 {
    inputs: usize,
    outputs: usize,
    /// Weights by [`Layout::place`], zero-padded; as bytes, whatever a weight's size.
    packed: Aligned<i8>,
    /// By output, padded to the panels, as all below.
    scale: Vec<f32>,
    bias: Vec<f32>,
    /// Sum of an output's weights: what the zero point of a row is multiplied with.
    sums: Vec<i32>,
    /// Whether a weight is -128, whose products are one too large for a shortcut of plain NEON.
    #[cfg_attr(not(target_arch = "aarch64"), allow(dead_code))]
    has_lowest: bool,
    activation: Activation,
    isa: Isa,
}

/// Quantized rows; one per session, made for the widest layer.
#[derive(Clone, Debug)]
pub struct Scratch8 {
    bytes: Aligned<u8>,
    scale: [f32; BLOCK],
    zero: [i32; BLOCK],
}

/// Inputs of a quantized row in the scratch memory: whole groups of the deepest layout.
fn padded(inputs: usize) -> usize {
    inputs.next_multiple_of(8)
}

impl Scratch8 {
    /// For layers of up to `inputs` inputs.
    pub fn new(inputs: usize) -> Self {
        Self { bytes: Aligned::zeroed(Self::len(inputs)), scale: [0.0; BLOCK], zero: [0; BLOCK] }
    }

    /// Bytes of quantized rows.
    fn len(inputs: usize) -> usize {
        // Two bytes an input are what the widest layout takes; 16 more let a vector be stored whose end is not used.
        BLOCK * padded(inputs) * 2 + 16
    }

    /// Bytes it takes.
    pub fn bytes(&self) -> usize {
        self.bytes.len() + BLOCK * 8
    }
}

impl Linear8 {
    /// Whether int8 is faster than float on this instruction set, for a layer of `inputs` inputs and `outputs` outputs.
    ///
    /// x86: by measured times (in picoseconds for a row on AVX-512: what a float product takes against quantizing a row and finishing its sums).
    /// AVX2 alone multiplies 16-bit numbers, 8 more sums an instruction than float and one more instruction for them: on a Zen 3 that takes 0.5 to
    /// 0.75 of float's time from 256 inputs on (on an Intel CPU held down to AVX2 nothing was left after quantizing). AVX-VNNI lost where a row has fewer
    /// than 32 inputs. ARM: by counted instructions, those of quantizing a value and of finishing a sum against those saved in between
    /// (`tests/aarch64/run.sh`).
    pub fn pays(isa: Isa, inputs: usize, outputs: usize) -> bool {
        // What a product of one input and one output takes, in hundredths of an instruction; float takes 31.
        let product = match isa {
            Isa::Generic | Isa::Avx512 => return false,
            Isa::Avx2 => return inputs >= 64 && outputs >= 64,
            // 24 against 31, and float has its bottlenecks by rows: the default model takes 107.6 M instructions in float, 126.8 M with these.
            Isa::Neon => return false,
            Isa::AvxVnni => return inputs >= 32,
            Isa::Avx512Vnni => return 12 * inputs * outputs > 8000 + 160 * inputs + 280 * outputs,
            Isa::NeonDot => 8,
            Isa::NeonI8mm => 5,
        };
        outputs * (inputs * (31 - product)).saturating_sub(180) > 210 * inputs + 2500
    }

    /// `weight` is `[inputs, outputs]` row-major; output `n` is `sum(a * weight[.., n]) * scale[n] + bias[n]`.
    ///
    /// # Panics
    /// When the lengths do not fit, there are more than 32 767 inputs (sums could overflow), or the instruction set is not there.
    pub fn new(weight: &[i8], scale: &[f32], bias: &[f32], inputs: usize, activation: Activation, isa: Isa) -> Self {
        let outputs = bias.len();
        assert_eq!(weight.len(), inputs * outputs, "weight of an int8 linear {inputs} -> {outputs}");
        assert_eq!(scale.len(), outputs, "scale of an int8 linear {inputs} -> {outputs}");
        assert!(inputs <= MAX_INPUTS, "an int8 linear of {inputs} inputs could overflow");
        assert!(isa.available(), "{} is not available here", isa.name());
        let layout = Layout::of(isa);
        let columns = outputs.next_multiple_of(layout.width);
        let mut sums = vec![0; columns];
        weight.iter().enumerate().for_each(|(i, &w)| sums[i % outputs] += i32::from(w));
        let packed = layout.pack(weight, inputs, outputs);
        let padded = |values: &[f32]| {
            let mut values = values.to_vec();
            values.resize(columns, 0.0);
            values
        };
        let has_lowest = weight.contains(&i8::MIN);
        Self { inputs, outputs, packed, scale: padded(scale), bias: padded(bias), sums, has_lowest, activation, isa }
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
        assert!(scratch.bytes.len() >= Scratch8::len(self.inputs), "scratch of an int8 linear");
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
                Isa::Avx512Vnni => unsafe { x86::avx512(self, a, residual, out, scratch) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: as above.
                Isa::AvxVnni => unsafe { x86::avx_vnni(self, a, residual, out, scratch) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: as above.
                Isa::Avx2 => unsafe { x86::avx2(self, a, residual, out, scratch) },
                #[cfg(target_arch = "aarch64")]
                // SAFETY: as above.
                Isa::Neon => unsafe { arm::neon(self, a, residual, out, scratch) },
                #[cfg(target_arch = "aarch64")]
                // SAFETY: as above.
                Isa::NeonDot => unsafe { arm::dot(self, a, residual, out, scratch) },
                #[cfg(target_arch = "aarch64")]
                // SAFETY: as above.
                Isa::NeonI8mm => unsafe { arm::i8mm(self, a, residual, out, scratch) },
                _ => self.block_generic(a, residual, out, scratch),
            }
        }
    }

    /// At most `BLOCK` rows.
    fn block_generic(&self, a: &[f32], residual: Option<&[f32]>, out: &mut [f32], scratch: &mut Scratch8) {
        let layout = Layout::of(Isa::Generic);
        for (r, (row, line)) in a.chunks_exact(self.inputs).zip(out.chunks_exact_mut(self.outputs.max(1))).enumerate() {
            let bytes = &mut scratch.bytes[..self.inputs];
            let (low, high) = row.iter().fold((0.0f32, 0.0f32), |(low, high), &x| (low.min(x), high.max(x)));
            let finite = row.iter().all(|x| x.is_finite());
            let (inverse, scale, zero) = quantizer(low, high, finite);
            for (byte, &x) in bytes.iter_mut().zip(row) {
                *byte = step(x, inverse, zero);
            }
            for (n, y) in line.iter_mut().enumerate() {
                let weight = |k: usize| i32::from(self.packed[layout.place(k, n, self.inputs)]);
                let sum = bytes.iter().enumerate().map(|(k, &x)| i32::from(x) * weight(k)).sum::<i32>();
                let sum = (sum - zero * self.sums[n]) as f32;
                let value = self.activation.apply(sum.mul_add(scale * self.scale[n], self.bias[n]));
                *y = value + residual.map_or(0.0, |residual| residual[r * self.outputs + n]);
            }
        }
    }
}

/// A value to its step, 0 to 255.
pub(super) fn step(x: f32, inverse: f32, zero: i32) -> u8 {
    ((x * inverse).round_ties_even() as i32).saturating_add(zero).clamp(0, 255) as u8
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

#[cfg(test)]
mod tests {
    use super::super::testing::values;
    use super::*;
    use proptest::prelude::*;

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
