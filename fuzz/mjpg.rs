//! Any bytes as a camera JPEG: nothing panics, every instruction set gives the same pixels or the same error.
#![no_main]
#![allow(missing_docs, dead_code)]

#[path = "../src/kernels"]
mod kernels {
    pub mod idct;
    pub mod isa;
    pub mod pixels;
}

#[path = "../src/preprocess"]
mod preprocess {
    pub mod mjpg;

    use crate::kernels::isa::Isa;
    use mjpg::MjpgDecoder;

    /// All pixels, planar by row; `Err` says why not.
    pub fn decode(isa: Isa, data: &[u8]) -> Result<Vec<u8>, String> {
        let mut decoder = MjpgDecoder::new(isa);
        let why = |error| format!("{error:?}");
        let fits = |width: u32, height: u32| width <= 128 && height <= 128;
        let (width, height) = decoder.begin(data, fits).map_err(why)?;
        if !fits(width, height) {
            return Ok(Vec::new());
        }
        let width = width as usize;
        let mut pixels = vec![0; 3 * width * height as usize];
        for (y, row) in pixels.chunks_exact_mut(3 * width).enumerate() {
            let (red, others) = row.split_at_mut(width);
            let (green, blue) = others.split_at_mut(width);
            decoder.row(y, red, green, blue).map_err(why)?;
        }
        decoder.finish().map_err(why)?;
        Ok(pixels)
    }
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    use kernels::isa::Isa;
    let best = preprocess::decode(Isa::best(), data);
    assert_eq!(best, preprocess::decode(Isa::Generic, data));
});
