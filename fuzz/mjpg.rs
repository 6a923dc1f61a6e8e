//! Any bytes as a camera JPEG: nothing panics, every instruction set gives the same pixels or the same error.
#![no_main]

use cull_fuzz::kernels::isa::Isa;
use cull_fuzz::preprocess::decode;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let best = decode(Isa::best(), data);
    assert_eq!(best, decode(Isa::Generic, data));
});
