//! Attentions of any size over any values, in float and in integers: every instruction set gives what the plain version gives.
#![no_main]

use cull_fuzz::kernels::attention::{Attention, Rows};
use cull_fuzz::kernels::attention8::Attention8;
use cull_fuzz::kernels::isa::Isa;
use cull_fuzz::{Bytes, assert_near, assert_same};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let mut bytes = Bytes::new(data);
    let grid = [1 + bytes.below(8), 1 + bytes.below(9)];
    let (heads, head_width) = (1 + bytes.below(2), 1 + bytes.below(24));
    let window = [0, 1, 3, 7][bytes.below(4)];
    let tokens = grid[0] * grid[1];
    if window > 0 && grid.iter().all(|side| side / 2 <= window / 2) {
        // The token in the middle may attend to none: what it sees is not defined.
        return;
    }
    let width = heads * head_width;
    let strides = [0; 3].map(|_| width + bytes.below(5));
    let values = strides.map(|stride| bytes.floats(tokens * stride));
    let rows = |at: usize| Rows { values: &values[at], stride: strides[at] };
    let first = bytes.below(tokens);
    let scale = 1.0 / (head_width as f32).sqrt();

    let float = |isa| {
        let mut out = vec![7.0; (tokens - first) * width];
        Attention::new(grid, heads, head_width, window, isa).run_queries(rows(0), rows(1), rows(2), scale, first, &mut out);
        out
    };
    let integers = |isa| {
        let layer = Attention8::new(grid, heads, head_width, window, isa);
        let mut out = vec![7.0; (tokens - first) * width];
        layer.run(rows(0), rows(1), rows(2), scale, first, &mut out, &mut layer.scratch());
        out
    };
    let wanted = [float(Isa::Generic), integers(Isa::Generic)];
    let finite = values.iter().flatten().all(|x| x.is_finite());
    for isa in Isa::all_available() {
        let got = float(isa);
        if finite {
            assert_near(&got, &wanted[0], 1e-3, isa.name());
        }
        assert_same(&integers(isa), &wanted[1], isa.name());
    }
});
