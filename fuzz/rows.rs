//! Rows of pixels and of values: colour conversion, resizing, inverse cosine transform, pooling, sums, layer norm, smooth activations. Every
//! instruction set gives what the plain version gives.
#![no_main]

use cull_fuzz::kernels::activation::Smooth;
use cull_fuzz::kernels::idct::{self, idct};
use cull_fuzz::kernels::isa::Isa;
use cull_fuzz::kernels::loops::{self, Pool};
use cull_fuzz::kernels::norm::LayerNorm;
use cull_fuzz::kernels::pixels;
use cull_fuzz::kernels::resample::{self, Columns, WEIGHT_BITS};
use cull_fuzz::{Bytes, assert_near, assert_same};

/// `taps` weights that are not negative and sum to one, as the resampling wants them.
fn weights(bytes: &mut Bytes<'_>, taps: usize) -> Vec<i16> {
    let mut left = 1i32 << WEIGHT_BITS;
    let mut weights: Vec<i16> = (0..taps)
        .map(|_| {
            let weight = (i32::from(bytes.byte()) * 64).min(left);
            left -= weight;
            weight as i16
        })
        .collect();
    if let Some(first) = weights.first_mut() {
        *first += left as i16;
    }
    weights
}

fn bytes_of(bytes: &mut Bytes<'_>, n: usize) -> Vec<u8> {
    (0..n).map(|_| bytes.byte()).collect()
}

/// The same bytes from every instruction set.
fn same<T: Clone + PartialEq + std::fmt::Debug>(fresh: T, run: impl Fn(Isa, &mut T)) {
    let mut wanted = fresh.clone();
    run(Isa::Generic, &mut wanted);
    for isa in Isa::all_available() {
        let mut got = fresh.clone();
        run(isa, &mut got);
        assert_eq!(got, wanted, "{}", isa.name());
    }
}

fn near(len: usize, slack: f32, run: impl Fn(Isa, &mut [f32])) {
    let mut wanted = vec![7.0; len];
    run(Isa::Generic, &mut wanted);
    for isa in Isa::all_available() {
        let mut got = vec![7.0; len];
        run(isa, &mut got);
        if slack > 0.0 { assert_near(&got, &wanted, slack, isa.name()) } else { assert_same(&got, &wanted, isa.name()) }
    }
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let mut bytes = Bytes::new(data);
    let n = bytes.below(200);
    match bytes.below(9) {
        0 => {
            let source = bytes_of(&mut bytes, 4 * n);
            same(vec![7u8; 6 * n], |isa, out| {
                let (red, rest) = out.split_at_mut(2 * n);
                let (green, blue) = rest.split_at_mut(2 * n);
                pixels::yuyv_to_planar(isa, &source, red, green, blue);
            });
        }
        1 => {
            let (luma, cb, cr) = (bytes_of(&mut bytes, n), bytes_of(&mut bytes, n), bytes_of(&mut bytes, n));
            same([vec![7u8; n], vec![7; n], vec![7; n], vec![7; 3 * n]], |isa, [red, green, blue, rgb]| {
                pixels::ycc_to_planar(isa, &luma, &cb, &cr, red, green, blue);
                pixels::planar_to_rgb(isa, red, green, blue, rgb);
            });
        }
        2 => {
            let (near, far) = (bytes_of(&mut bytes, n), bytes_of(&mut bytes, n));
            same(vec![7u8; 2 * n], |isa, out| pixels::upsample_h2v1(isa, &near, out));
            same(vec![7u8; 2 * n], |isa, out| pixels::upsample_h2v2(isa, &near, &far, out));
        }
        3 => {
            let (rows, taps) = (1 + bytes.below(8), 1 + bytes.below(8));
            let (weights, first) = (weights(&mut bytes, taps), bytes.below(20));
            let picture = bytes_of(&mut bytes, rows * (n + 3));
            let picture = resample::Rows { bytes: &picture, stride: n + 3, rows };
            same(vec![7i16; n], |isa, out| resample::vertical(isa, picture, first, &weights, out));
        }
        4 => {
            let taps = resample::padded_taps(1 + bytes.below(32));
            let row: Vec<i16> = (0..taps + 40).map(|_| i16::from(bytes.byte()) * 128).collect();
            let start: Vec<usize> = (0..n).map(|_| bytes.below(40)).collect();
            let weights = (0..n).flat_map(|_| weights(&mut bytes, taps)).collect();
            let columns = Columns::new(start, weights);
            near(n, 0.0, |isa, out| resample::horizontal(isa, &row, &columns, 0.01, -1.0, out));
        }
        5 => {
            let mut coefficients = [0i16; idct::GROUP_LEN];
            coefficients.iter_mut().for_each(|c| *c = i16::from_le_bytes([bytes.byte(), bytes.byte()]) >> bytes.below(16));
            let stride = idct::GROUP_WIDTH + n;
            same(vec![7u8; 7 * stride + idct::GROUP_WIDTH], |isa, out| idct(isa, &coefficients, out, stride));
        }
        6 => {
            let (channels, width, height) = (1 + bytes.below(40), 1 + bytes.below(9), 1 + bytes.below(9));
            let (kernel, stride) = ([1 + bytes.below(height), 1 + bytes.below(width)], [1 + bytes.below(3), 1 + bytes.below(3)]);
            let input = bytes.floats(channels * width * height);
            let out_width = (width - kernel[1]) / stride[1] + 1;
            let len = ((height - kernel[0]) / stride[0] + 1) * out_width * channels;
            near(len, 0.0, |isa, out| loops::max_pool(isa, &input, Pool { width, out_width, channels, kernel, stride }, 0, out));
            let columns: Vec<_> = (0..n).map(|_| (bytes.below(width), bytes.below(width), 0.25)).collect();
            let rows: Vec<_> = (0..3).map(|_| (bytes.below(height), bytes.below(height), 0.5)).collect();
            near(3 * n * channels, 0.0, |isa, out| loops::resize(isa, &input, width * channels, channels, &rows, &columns, out));
            near(width * height * (channels + 2), 0.0, |isa, out| {
                loops::copy_runs(isa, &input, out, channels, width * height, [channels, channels + 2]);
            });
        }
        7 => {
            let width = 1 + bytes.below(90);
            let (a, b) = (bytes.floats(n / 20 * width), bytes.floats(n / 20 * width));
            near(a.len(), 0.0, |isa, out| loops::zip(isa, &a, &b, out, |x, y| x * y + x));
            near(a.len(), 0.0, |isa, out| loops::map(isa, &a, out, |x| x.sqrt()));
            near(n / 20, 0.0, |isa, out| loops::sum_rows(isa, &a, width, out, |x| x * x));
        }
        _ => {
            let width = 1 + bytes.below(90);
            let a = bytes.weights(n / 20 * width);
            let (gamma, beta) = (bytes.weights(width), bytes.weights(width));
            near(a.len(), 1e-2, |isa, out| LayerNorm::new(&gamma, &beta, 1e-5, isa).run(&a, out));
            let a = bytes.floats(n);
            for smooth in [Smooth::Silu, Smooth::Sigmoid] {
                near(n, 1e-5, |isa, out| smooth.run(&a, out, isa));
            }
        }
    }
});
