//! Linears of any size over any values, in float and in integers: every instruction set gives what the plain version gives.
#![no_main]

use cull_fuzz::kernels::isa::Isa;
use cull_fuzz::kernels::linear::{Activation, Linear};
use cull_fuzz::kernels::linear8::{Linear8, Scratch8};
use cull_fuzz::{Bytes, assert_near, assert_same};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let mut bytes = Bytes::new(data);
    // Small, and yet more than the largest tile in each direction: thousands of cases a second find more than one large one.
    let (rows, inputs, outputs) = (bytes.below(27), 1 + bytes.below(40), 1 + bytes.below(50));
    let activation = [Activation::None, Activation::Relu, Activation::Relu6][bytes.below(3)];
    let with_residual = bytes.below(2) == 1;
    let stride = 1 + bytes.below(4);
    let a = bytes.floats(rows * inputs);
    let (weight, int8) = (bytes.weights(inputs * outputs), bytes.signed(inputs * outputs));
    let (bias, scale) = (bytes.weights(outputs), bytes.weights(outputs));
    let residual = bytes.weights(rows * outputs);
    let residual = with_residual.then_some(&residual[..]);
    // Rounding: sums of products of up to 4 and 2.
    let slack = 1e-6 * 8.0 * inputs as f32 + 1e-5;

    let run = |isa| {
        let mut out = vec![7.0; rows * outputs];
        Linear::new(&weight, &bias, inputs, outputs, activation, isa).run(&a, residual, &mut out);
        out
    };
    let scattered = |isa| {
        // As many rows as the taps leave.
        let taps: Vec<usize> = (0..inputs).map(|k| k * 7 % a.len().max(1)).collect();
        let last = taps.iter().max().copied().unwrap_or(0);
        let rows = if a.is_empty() { 0 } else { (a.len() - 1 - last) / stride + 1 };
        let mut out = vec![7.0; rows * outputs];
        Linear::new(&weight, &bias, inputs, outputs, activation, isa).run_scattered(&a, &taps, stride, &mut out);
        out
    };
    let pooled = |isa| {
        let width = rows / 2;
        let mut out = vec![7.0; width / 2 * outputs];
        Linear::new(&weight, &bias, inputs, outputs, activation, isa).run_pooled(&a[..2 * width * inputs], width, &mut out);
        out
    };
    let integers = |isa| {
        let mut out = vec![7.0; rows * outputs];
        Linear8::new(&int8, &scale, &bias, inputs, activation, isa).run(&a, residual, &mut out, &mut Scratch8::new(inputs));
        out
    };
    let wanted = [run(Isa::Generic), scattered(Isa::Generic), pooled(Isa::Generic)];
    let wanted8 = integers(Isa::Generic);
    for isa in Isa::all_available() {
        assert_near(&run(isa), &wanted[0], slack, isa.name());
        assert_near(&scattered(isa), &wanted[1], slack, isa.name());
        assert_near(&pooled(isa), &wanted[2], slack, isa.name());
        assert_same(&integers(isa), &wanted8, isa.name());
    }
});
