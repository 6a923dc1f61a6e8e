//! Strided products of any size over any values: every instruction set gives what the plain version gives, and writes nothing between the rows.
#![no_main]

use cull_fuzz::kernels::gemm::{Left, Right, Start, gemm, pack, pack_transposed, packed_len};
use cull_fuzz::kernels::isa::Isa;
use cull_fuzz::{Bytes, assert_near};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let mut bytes = Bytes::new(data);
    let (rows, columns, depth) = (bytes.below(60), bytes.below(100), bytes.below(255) + bytes.below(80));
    let (transposed, form, begin, gap) = (bytes.below(2) == 1, bytes.below(3), bytes.below(3), bytes.below(20));
    let (a_stride, b_stride, out_stride) = (if transposed { rows } else { depth } + gap, columns + gap, columns + gap);
    let a = bytes.floats(if transposed { depth } else { rows } * a_stride);
    // Whole vectors are read.
    let b = bytes.weights(depth * b_stride + 64);
    let (period, first) = (1 + bytes.below(5), bytes.below(7));
    let table = bytes.weights(period * (columns + 32));
    let before = bytes.weights(rows * out_stride);
    let plain: Vec<f32> = (0..depth).flat_map(|k| b[k * b_stride..][..columns].to_vec()).collect();

    let run = |isa| {
        let mut packed = vec![0.0; packed_len(depth, columns, isa)];
        let right = match form {
            0 => Right::rows(&b, b_stride, isa),
            1 => {
                pack(&mut packed, depth, 0, &plain, columns, isa);
                Right::packed(&packed, depth, isa)
            }
            _ => {
                let turned: Vec<f32> =
                    (0..columns).flat_map(|c| (0..depth).map(move |k| (k, c))).map(|(k, c)| plain[k * columns + c]).collect();
                pack_transposed(&mut packed, depth, 0, &turned, depth, isa);
                Right::packed(&packed, depth, isa)
            }
        };
        let left = if transposed { Left::transposed(&a, a_stride) } else { Left::rows(&a, a_stride) };
        let start = match begin {
            0 => Start::Zero,
            1 => Start::Out,
            _ => Start::Table { table: &table, stride: columns + 32, first, period },
        };
        let mut out = before.clone();
        gemm(isa, [rows, columns, depth], left, right, start, &mut out, out_stride);
        out
    };
    let wanted = run(Isa::Generic);
    for isa in Isa::all_available() {
        assert_near(&run(isa), &wanted, 1e-6 * 8.0 * depth as f32 + 1e-5, isa.name());
    }
});
