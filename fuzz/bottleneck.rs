//! Depthwise convolutions and inverted bottlenecks of any size over any values, in float and in integers, in one piece and in two, the second from
//! rows that are made: every instruction set gives what the plain version gives.
#![no_main]

use cull_fuzz::kernels::bottleneck::Bottleneck;
use cull_fuzz::kernels::bottleneck8::{Bottleneck8, BottleneckScratch8, Weights8};
use cull_fuzz::kernels::depthwise::{Depthwise, Window};
use cull_fuzz::kernels::isa::Isa;
use cull_fuzz::kernels::linear::{Activation, Linear};
use cull_fuzz::kernels::source::Source;
use cull_fuzz::{Bytes, assert_near, assert_same};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let mut bytes = Bytes::new(data);
    let (inputs, outputs) = (4 * bytes.below(6), 1 + bytes.below(36));
    let mut channels = 1 + bytes.below(36);
    let (kernel, stride) = ([1 + bytes.below(8), 1 + bytes.below(8)], [1 + bytes.below(3), 1 + bytes.below(3)]);
    let pad = kernel.map(|side| bytes.below(side));
    let input = [1 + bytes.below(6), 1 + bytes.below(18)];
    let room = |axis: usize| (input[axis] + 2 * pad[axis]).checked_sub(kernel[axis]).map(|room| room / stride[axis] + 1);
    let (Some(height), Some(width)) = (room(0), room(1)) else { return };
    if inputs == 0 {
        channels = channels.next_multiple_of(4);
    }
    let window = Window { channels, input, output: [height, width], kernel, stride, pad };
    let taps = kernel[0] * kernel[1];
    let wide = if inputs > 0 { inputs } else { channels };
    let mut a = bytes.floats(input[0] * input[1] * wide);
    if inputs == 0 {
        // Without an expansion the input is never negative; NaN stays.
        a.iter_mut().filter(|x| **x < 0.0).for_each(|x| *x = -*x);
    }
    let (len, line) = (height * width * outputs, input[1] * wide);
    let residual = bytes.weights(len);
    let split = bytes.below(height + 1);
    let at = split * width * outputs;

    let (own, expand, project) = (bytes.weights(channels * taps), bytes.weights(inputs * channels), bytes.weights(channels * outputs));
    let (bias, last_bias) = (bytes.weights(channels), bytes.weights(outputs));
    let float = |isa| {
        let first = (inputs > 0).then(|| Linear::new(&expand, &bias, inputs, channels, Activation::Relu6, isa));
        let last = Linear::new(&project, &last_bias, channels, outputs, Activation::None, isa);
        let layer = Bottleneck::new(first, Depthwise::new(&own, &bias, window, Activation::Relu6, isa), last);
        let (mut out, mut scratch) = (vec![7.0; len], vec![f32::NAN; layer.scratch_len_made()]);
        let (upper, lower) = out.split_at_mut(at);
        layer.run(Source::Picture(&a), Some(&residual[..at]), 0, upper, &mut scratch);
        let rows = Source::Made { make: &mut |y, row| row.copy_from_slice(&a[y * line..][..line]), room: &mut vec![f32::NAN; line] };
        layer.run(rows, Some(&residual[at..]), split, lower, &mut scratch);
        out
    };

    let (own8, expand8, project8) = (bytes.signed(channels * taps), bytes.signed(inputs * channels), bytes.signed(channels * outputs));
    let positive = |values: Vec<f32>| values.into_iter().map(|x| x.abs() / 100.0 + 1e-4).collect::<Vec<_>>();
    let (scale, last_scale) = (positive(bytes.weights(channels)), positive(bytes.weights(outputs)));
    let tops = positive(bytes.weights(channels));
    let integers = |isa| {
        let first = (inputs > 0).then_some(Weights8 { weight: &expand8, scale: &scale, bias: &bias });
        let middle = Weights8 { weight: &own8, scale: &scale, bias: &bias };
        let last = Weights8 { weight: &project8, scale: &last_scale, bias: &last_bias };
        let layer = Bottleneck8::new(first, middle, last, window, (&tops, 6.0), isa);
        let (mut out, mut scratch) = (vec![7.0; len], BottleneckScratch8::default());
        scratch.fit(&layer);
        let (upper, lower) = out.split_at_mut(at);
        layer.run(Source::Picture(&a), Some(&residual[..at]), 0, upper, &mut scratch);
        let rows = Source::Made { make: &mut |y, row| row.copy_from_slice(&a[y * line..][..line]), room: &mut vec![f32::NAN; line] };
        layer.run(rows, Some(&residual[at..]), split, lower, &mut scratch);
        out
    };
    let wanted = [float(Isa::Generic), integers(Isa::Generic)];
    for isa in Isa::all_available() {
        // Up to 6 times 2 in each of the sums, and what the middle one is off by once more in the last.
        let slack = 1e-6 * 12.0 * (channels * (taps + inputs)) as f32 + 1e-4;
        assert_near(&float(isa), &wanted[0], slack, isa.name());
        assert_same(&integers(isa), &wanted[1], isa.name());
    }
});
