//! What the fuzz targets share: the kernels and the JPEG decoder, compiled in by path, and how bytes become shapes and values.
#![allow(missing_docs, dead_code)]

#[path = "../src/kernels/mod.rs"]
pub mod kernels;

#[path = "../src/preprocess"]
pub mod preprocess {
    mod mjpg;

    use crate::kernels::isa::Isa;
    use mjpg::MjpgDecoder;

    /// All pixels of a camera JPEG, planar by row; `Err` says why not.
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

/// The fuzzer's bytes, read as sizes and numbers. Past their end they go on, so that a few bytes can describe a large case.
pub struct Bytes<'a> {
    data: &'a [u8],
    at: usize,
    state: u64,
}

impl<'a> Bytes<'a> {
    pub fn new(data: &'a [u8]) -> Self {
        let state = data.iter().fold(1, |state, &byte| next(state) ^ u64::from(byte));
        Self { data, at: 0, state }
    }

    pub fn byte(&mut self) -> u8 {
        let byte = self.data.get(self.at).copied();
        self.at += 1;
        byte.unwrap_or_else(|| {
            self.state = next(self.state);
            // Made-up values are tame: what is not finite is the fuzzer's to choose.
            (self.state >> 33) as u8 % TAME
        })
    }

    /// From 0 to `end - 1`.
    pub fn below(&mut self, end: usize) -> usize {
        usize::from(self.byte()) % end
    }

    /// From -4 to 4, or something rare: NaN, infinities, nearly zero.
    pub fn float(&mut self) -> f32 {
        match self.byte() {
            byte @ 0..TAME => (f32::from(byte) - 120.0) / 30.0,
            241 => f32::NAN,
            242 => f32::INFINITY,
            243 => f32::NEG_INFINITY,
            244 => -0.0,
            245 => f32::MIN_POSITIVE / 2.0,
            _ => 0.0,
        }
    }

    pub fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.float()).collect()
    }

    /// Finite ones.
    pub fn weights(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| (f32::from(self.byte()) - 128.0) / 64.0).collect()
    }

    /// All of them, -128 included.
    pub fn signed(&mut self, n: usize) -> Vec<i8> {
        (0..n).map(|_| self.byte() as i8).collect()
    }
}

/// Bytes below this are plain values.
const TAME: u8 = 241;

fn next(state: u64) -> u64 {
    state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407)
}

/// The same bits, or both not a number.
pub fn assert_same(got: &[f32], wanted: &[f32], what: &str) {
    assert_eq!(got.len(), wanted.len());
    for (i, (x, y)) in got.iter().zip(wanted).enumerate() {
        assert!(x == y || x.is_nan() && y.is_nan(), "{what} at {i}: {x} {y}");
    }
}

/// At most `slack` apart, or both not finite: which of the two depends on the order of a sum.
pub fn assert_near(got: &[f32], wanted: &[f32], slack: f32, what: &str) {
    assert_eq!(got.len(), wanted.len());
    for (i, (x, y)) in got.iter().zip(wanted).enumerate() {
        assert!((x - y).abs() <= slack || x == y || !x.is_finite() && !y.is_finite(), "{what} at {i}: {x} {y}, slack {slack}");
    }
}
