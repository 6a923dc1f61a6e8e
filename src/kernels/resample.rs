//! Resizing in integers: weighted sums of rows, then weighted sums within the row. 8-bit pixels become 16-bit sums with
//! [`FRACTION_BITS`] fraction bits and at last float32, the model's input. Every instruction set gives the same bits.

use super::isa::Isa;

/// Fraction bits of a weight: the weights of one output sum to `1 << WEIGHT_BITS`.
pub const WEIGHT_BITS: u32 = 14;
/// Fraction bits of the sums between the two passes: 255 fills 15 bits.
pub const FRACTION_BITS: u32 = 7;
/// The horizontal pass reads so many values at a time: weights are padded with zeros to a multiple of it ([`padded_taps`]), rows by as much.
const STEP: usize = 16;
/// But outputs of no more than these, which is what a reduction to a quarter takes, have vectors with room for several of them.
const FEW: usize = 8;

/// Weights that an output of `needed` is padded to: 8, or a multiple of 16.
pub fn padded_taps(needed: usize) -> usize {
    if needed <= FEW { FEW } else { needed.next_multiple_of(STEP) }
}

/// Rows of bytes of which [`vertical`] takes a few after each other: row `i` starts at `(i % rows) * stride`.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    /// The bytes.
    pub bytes: &'a [u8],
    /// From one row to the next, in bytes.
    pub stride: usize,
    /// Rows in `bytes`, for a ring of rows; `usize::MAX` where there is no ring.
    pub rows: usize,
}

impl<'a> Rows<'a> {
    /// Where rows `first`, `first + 1`, … begin.
    ///
    /// # Panics
    /// When one does not hold `width` bytes.
    #[inline(always)]
    fn starts(self, first: usize, width: usize) -> impl Iterator<Item = usize> + use<'a> {
        let mut slot = first % self.rows;
        std::iter::repeat_with(move || {
            let start = slot * self.stride;
            slot = if slot + 1 == self.rows { 0 } else { slot + 1 };
            assert!(start + width <= self.bytes.len(), "rows of a picture");
            start
        })
    }
}

/// `out[x]` is the weighted sum of rows `first`, `first + 1`, … at `x`, with [`FRACTION_BITS`] fraction bits, rounded half up.
/// The weights are not negative and sum to `1 << WEIGHT_BITS`.
///
/// # Panics
/// When a row does not hold `out.len()` bytes or the instruction set is not there.
pub fn vertical(isa: Isa, rows: Rows<'_>, first: usize, weights: &[i16], out: &mut [i16]) {
    assert!(isa.available(), "{} is not available here", isa.name());
    match isa.float() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the instruction set is checked above; the rows are where their starts are taken.
        Isa::Avx512 => unsafe { x86::vertical_avx512(rows, first, weights, out) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx2 => unsafe { x86::vertical_avx2(rows, first, weights, out) },
        #[cfg(target_arch = "aarch64")]
        // SAFETY: as above.
        Isa::Neon => unsafe { arm::vertical_neon(rows, first, weights, out) },
        _ => vertical_generic(rows, first, weights, out, 0),
    }
}

/// Columns from `from` on.
#[inline(always)]
fn vertical_generic(rows: Rows<'_>, first: usize, weights: &[i16], out: &mut [i16], from: usize) {
    // So many columns at a time, for the compiler to keep in registers.
    const CHUNK: usize = 32;
    let width = out.len();
    let mut at = from;
    while at < width {
        let n = CHUNK.min(width - at);
        let mut sums = [1i32 << (WEIGHT_BITS - FRACTION_BITS - 1); CHUNK];
        for (&weight, start) in weights.iter().zip(rows.starts(first, width)) {
            for (sum, &pixel) in sums.iter_mut().zip(&rows.bytes[start + at..start + at + n]) {
                *sum += i32::from(weight) * i32::from(pixel);
            }
        }
        for (out, sum) in out[at..at + n].iter_mut().zip(sums) {
            *out = (sum >> (WEIGHT_BITS - FRACTION_BITS)) as i16;
        }
        at += n;
    }
}

/// Where the horizontal pass reads, and with what weights.
#[derive(Clone, Debug, Default)]
pub struct Columns {
    start: Vec<usize>,
    weights: Vec<i16>,
    taps: usize,
    /// A row must be so long.
    reach: usize,
}

impl Columns {
    /// `start` is the first value of each output; `weights` are `[start.len(), taps]` with `taps` as [`padded_taps`] gives it, not negative, and those of
    /// each output sum to `1 << WEIGHT_BITS`.
    ///
    /// # Panics
    /// When the lengths do not fit.
    pub fn new(start: Vec<usize>, weights: Vec<i16>) -> Self {
        let taps = weights.len().checked_div(start.len()).unwrap_or(FEW);
        assert!(weights.len() == start.len() * taps && taps == padded_taps(taps), "weights of a row");
        let reach = start.iter().max().map_or(0, |start| start + taps);
        Self { start, weights, taps, reach }
    }

    /// Weights an output.
    pub fn taps(&self) -> usize {
        self.taps
    }
}

/// `out[x]` is the weighted sum of `row` from the output's start on, as a pixel value, times `scale` plus `bias`.
///
/// # Panics
/// When `out` is not as long as there are outputs, one reads beyond `row`, or the instruction set is not there.
pub fn horizontal(isa: Isa, row: &[i16], columns: &Columns, scale: f32, bias: f32, out: &mut [f32]) {
    assert!(isa.available(), "{} is not available here", isa.name());
    assert!(out.len() == columns.start.len() && columns.reach <= row.len(), "an output reads beyond its row");
    // From fixed point to pixel value.
    let scale = scale / (1u32 << (WEIGHT_BITS + FRACTION_BITS)) as f32;
    match isa.float() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: instruction set and lengths are checked above.
        Isa::Avx512 if columns.taps == FEW => unsafe { x86::horizontal_few_avx512(row, columns, scale, bias, out) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx512 => unsafe { x86::horizontal_avx512(row, columns, scale, bias, out) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx2 if columns.taps == FEW => unsafe { x86::horizontal_few_avx2(row, columns, scale, bias, out) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx2 => unsafe { x86::horizontal_avx2(row, columns, scale, bias, out) },
        #[cfg(target_arch = "aarch64")]
        // SAFETY: as above.
        Isa::Neon => unsafe { arm::horizontal_neon(row, columns, scale, bias, out) },
        _ => horizontal_generic(row, columns, scale, bias, out, 0),
    }
}

/// Outputs from `from` on.
#[inline(always)]
fn horizontal_generic(row: &[i16], columns: &Columns, scale: f32, bias: f32, out: &mut [f32], from: usize) {
    for ((out, &start), weights) in out.iter_mut().zip(&columns.start).zip(columns.weights.chunks_exact(columns.taps)).skip(from) {
        let sum: i32 = row[start..start + columns.taps].iter().zip(weights).map(|(&x, &w)| i32::from(x) * i32::from(w)).sum();
        // Not fused: the same on every machine.
        *out = sum as f32 * scale + bias;
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::*;
    use std::arch::x86_64::*;

    /// Most pairs of rows that a vector version takes: a reduction to 1/32. Beyond that the compiler's own vector code does.
    const MAX_PAIRS: usize = 32;

    /// Rows two by two: where they begin, and their weights in one 32-bit lane. Found once for a row of output, not for every few columns.
    struct Pairs {
        all: [(usize, usize, i32); MAX_PAIRS],
        count: usize,
    }

    impl Pairs {
        fn new(rows: Rows<'_>, first: usize, weights: &[i16], width: usize) -> Option<Self> {
            let count = weights.len().div_ceil(2);
            let mut all = [(0, 0, 0); MAX_PAIRS];
            let mut starts = rows.starts(first, width);
            for (pair, weights) in all.get_mut(..count)?.iter_mut().zip(weights.chunks(2)) {
                let a = starts.next()?;
                // A missing last row weighs nothing.
                let (b, weight) = if let [_, second] = weights { (starts.next()?, *second) } else { (a, 0) };
                *pair = (a, b, (i32::from(weight) << 16) | i32::from(weights[0] as u16));
            }
            Some(Self { all, count })
        }

        fn list(&self) -> &[(usize, usize, i32)] {
            &self.all[..self.count]
        }
    }

    /// # Safety
    /// AVX-512 F and BW must be there.
    #[target_feature(enable = "avx512f,avx512bw")]
    pub(super) fn vertical_avx512(rows: Rows<'_>, first: usize, weights: &[i16], out: &mut [i16]) {
        const COLUMNS: usize = 64;
        let width = out.len();
        let mut at = 0;
        if let Some(pairs) = Pairs::new(rows, first, weights, width) {
            let from = rows.bytes.as_ptr();
            while at + COLUMNS <= width {
                let mut sums = [_mm512_set1_epi32(1 << (WEIGHT_BITS - FRACTION_BITS - 1)); 4];
                for &(a, b, weights) in pairs.list() {
                    // SAFETY: `a` and `b` are starts of rows that hold `width` bytes, and `at + COLUMNS <= width`.
                    let (a, b) = unsafe { (_mm512_loadu_si512(from.add(a + at).cast()), _mm512_loadu_si512(from.add(b + at).cast())) };
                    let (weights, zero) = (_mm512_set1_epi32(weights), _mm512_setzero_si512());
                    let (low, high) = (_mm512_unpacklo_epi8(a, b), _mm512_unpackhi_epi8(a, b));
                    sums[0] = _mm512_add_epi32(sums[0], _mm512_madd_epi16(_mm512_unpacklo_epi8(low, zero), weights));
                    sums[1] = _mm512_add_epi32(sums[1], _mm512_madd_epi16(_mm512_unpackhi_epi8(low, zero), weights));
                    sums[2] = _mm512_add_epi32(sums[2], _mm512_madd_epi16(_mm512_unpacklo_epi8(high, zero), weights));
                    sums[3] = _mm512_add_epi32(sums[3], _mm512_madd_epi16(_mm512_unpackhi_epi8(high, zero), weights));
                }
                let sums = sums.map(|sum| _mm512_srai_epi32::<{ WEIGHT_BITS - FRACTION_BITS }>(sum));
                // Each 128-bit lane has 16 columns, 8 in each register.
                let (low, high) = (_mm512_packs_epi32(sums[0], sums[1]), _mm512_packs_epi32(sums[2], sums[3]));
                let front = _mm512_permutex2var_epi64(low, _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), high);
                let back = _mm512_permutex2var_epi64(low, _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), high);
                // SAFETY: `at + COLUMNS <= width == out.len()`.
                unsafe {
                    _mm512_storeu_si512(out.as_mut_ptr().add(at).cast(), front);
                    _mm512_storeu_si512(out.as_mut_ptr().add(at + 32).cast(), back);
                }
                at += COLUMNS;
            }
        }
        vertical_generic(rows, first, weights, out, at);
    }

    /// # Safety
    /// AVX2 must be there.
    #[target_feature(enable = "avx2")]
    pub(super) fn vertical_avx2(rows: Rows<'_>, first: usize, weights: &[i16], out: &mut [i16]) {
        const COLUMNS: usize = 32;
        let width = out.len();
        let mut at = 0;
        if let Some(pairs) = Pairs::new(rows, first, weights, width) {
            let from = rows.bytes.as_ptr();
            while at + COLUMNS <= width {
                let mut sums = [_mm256_set1_epi32(1 << (WEIGHT_BITS - FRACTION_BITS - 1)); 4];
                for &(a, b, weights) in pairs.list() {
                    // SAFETY: `a` and `b` are starts of rows that hold `width` bytes, and `at + COLUMNS <= width`.
                    let (a, b) = unsafe { (_mm256_loadu_si256(from.add(a + at).cast()), _mm256_loadu_si256(from.add(b + at).cast())) };
                    let (weights, zero) = (_mm256_set1_epi32(weights), _mm256_setzero_si256());
                    let (low, high) = (_mm256_unpacklo_epi8(a, b), _mm256_unpackhi_epi8(a, b));
                    sums[0] = _mm256_add_epi32(sums[0], _mm256_madd_epi16(_mm256_unpacklo_epi8(low, zero), weights));
                    sums[1] = _mm256_add_epi32(sums[1], _mm256_madd_epi16(_mm256_unpackhi_epi8(low, zero), weights));
                    sums[2] = _mm256_add_epi32(sums[2], _mm256_madd_epi16(_mm256_unpacklo_epi8(high, zero), weights));
                    sums[3] = _mm256_add_epi32(sums[3], _mm256_madd_epi16(_mm256_unpackhi_epi8(high, zero), weights));
                }
                let sums = sums.map(|sum| _mm256_srai_epi32::<{ (WEIGHT_BITS - FRACTION_BITS) as i32 }>(sum));
                // Each 128-bit lane has 16 columns, 8 in each register.
                let (low, high) = (_mm256_packs_epi32(sums[0], sums[1]), _mm256_packs_epi32(sums[2], sums[3]));
                // SAFETY: `at + COLUMNS <= width == out.len()`.
                unsafe {
                    _mm256_storeu_si256(out.as_mut_ptr().add(at).cast(), _mm256_permute2x128_si256::<0x20>(low, high));
                    _mm256_storeu_si256(out.as_mut_ptr().add(at + 16).cast(), _mm256_permute2x128_si256::<0x31>(low, high));
                }
                at += COLUMNS;
            }
        }
        vertical_generic(rows, first, weights, out, at);
    }

    /// # Safety
    /// AVX-512 F and BW must be there; lengths as `horizontal` checks them.
    #[target_feature(enable = "avx512f,avx512bw")]
    pub(super) unsafe fn horizontal_avx512(row: &[i16], columns: &Columns, scale: f32, bias: f32, out: &mut [f32]) {
        const OUTPUTS: usize = 8;
        let (start, weights, taps) = (&columns.start, &columns.weights, columns.taps);
        let mut x = 0;
        while x + OUTPUTS <= out.len() {
            // Two outputs in each register, one in each half.
            let mut sums = [_mm512_setzero_si512(); OUTPUTS / 2];
            for (k, sum) in sums.iter_mut().enumerate() {
                for at in (0..taps).step_by(STEP) {
                    // SAFETY: `start + taps <= row.len()` and `(x + 2 k + 2) * taps <= weights.len()`, and `taps` is a multiple of STEP.
                    let (values, weights) = unsafe {
                        let values = |i: usize| _mm256_loadu_si256(row.as_ptr().add(*start.get_unchecked(x + i) + at).cast());
                        let weights = |i: usize| _mm256_loadu_si256(weights.as_ptr().add((x + i) * taps + at).cast());
                        (
                            _mm512_inserti64x4::<1>(_mm512_castsi256_si512(values(2 * k)), values(2 * k + 1)),
                            _mm512_inserti64x4::<1>(_mm512_castsi256_si512(weights(2 * k)), weights(2 * k + 1)),
                        )
                    };
                    *sum = _mm512_add_epi32(*sum, _mm512_madd_epi16(values, weights));
                }
            }
            // Sums over the lanes of a half: first within 128 bits (outputs 0 2 4 6, then 1 3 5 7), then over both.
            let fold = |a, b| _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
            let (s01, s23) = (fold(sums[0], sums[1]), fold(sums[2], sums[3]));
            let folded = _mm512_add_epi32(_mm512_unpacklo_epi64(s01, s23), _mm512_unpackhi_epi64(s01, s23));
            let total = _mm512_add_epi32(folded, _mm512_shuffle_i64x2::<0b10_11_00_01>(folded, folded));
            let order = _mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 0, 0, 0, 0, 0, 0, 0, 0);
            let total = _mm512_castsi512_si256(_mm512_permutexvar_epi32(order, total));
            let value = _mm256_add_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(total), _mm256_set1_ps(scale)), _mm256_set1_ps(bias));
            // SAFETY: `x + OUTPUTS <= out.len()`.
            unsafe { _mm256_storeu_ps(out.as_mut_ptr().add(x), value) };
            x += OUTPUTS;
        }
        horizontal_generic(row, columns, scale, bias, out, x);
    }

    /// As [`horizontal_avx512`] for [`FEW`] weights an output: four outputs in each register, one in each quarter.
    ///
    /// # Safety
    /// AVX-512 F and BW must be there; lengths as `horizontal` checks them.
    #[target_feature(enable = "avx512f,avx512bw")]
    pub(super) unsafe fn horizontal_few_avx512(row: &[i16], columns: &Columns, scale: f32, bias: f32, out: &mut [f32]) {
        const OUTPUTS: usize = 16;
        let (start, weights) = (&columns.start, &columns.weights);
        let mut x = 0;
        while x + OUTPUTS <= out.len() {
            let mut sums = [_mm512_setzero_si512(); OUTPUTS / 4];
            for (k, sum) in sums.iter_mut().enumerate() {
                // SAFETY: `start + FEW <= row.len()` and `(x + OUTPUTS) * FEW <= weights.len()`.
                let (values, weights) = unsafe {
                    let values = |i: usize| _mm_loadu_si128(row.as_ptr().add(*start.get_unchecked(x + 4 * k + i)).cast());
                    let four = _mm512_inserti32x4::<1>(_mm512_castsi128_si512(values(0)), values(1));
                    let four = _mm512_inserti32x4::<3>(_mm512_inserti32x4::<2>(four, values(2)), values(3));
                    (four, _mm512_loadu_si512(weights.as_ptr().add((x + 4 * k) * FEW).cast()))
                };
                *sum = _mm512_madd_epi16(values, weights);
            }
            // Sums over the lanes of a quarter: outputs 0 4 8 12, then 1 5 9 13, ...
            let fold = |a, b| _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
            let (near, far) = (fold(sums[0], sums[1]), fold(sums[2], sums[3]));
            let total = _mm512_add_epi32(_mm512_unpacklo_epi64(near, far), _mm512_unpackhi_epi64(near, far));
            let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
            let total = _mm512_cvtepi32_ps(_mm512_permutexvar_epi32(order, total));
            // Not fused: the same on every machine.
            let value = _mm512_add_ps(_mm512_mul_ps(total, _mm512_set1_ps(scale)), _mm512_set1_ps(bias));
            // SAFETY: `x + OUTPUTS <= out.len()`.
            unsafe { _mm512_storeu_ps(out.as_mut_ptr().add(x), value) };
            x += OUTPUTS;
        }
        horizontal_generic(row, columns, scale, bias, out, x);
    }

    /// As [`horizontal_avx2`] for [`FEW`] weights an output: two outputs in each register, one in each half.
    ///
    /// # Safety
    /// AVX2 must be there; lengths as `horizontal` checks them.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn horizontal_few_avx2(row: &[i16], columns: &Columns, scale: f32, bias: f32, out: &mut [f32]) {
        const OUTPUTS: usize = 8;
        let (start, weights) = (&columns.start, &columns.weights);
        let mut x = 0;
        while x + OUTPUTS <= out.len() {
            let mut sums = [_mm256_setzero_si256(); OUTPUTS / 2];
            for (k, sum) in sums.iter_mut().enumerate() {
                // SAFETY: `start + FEW <= row.len()` and `(x + OUTPUTS) * FEW <= weights.len()`.
                let (values, weights) = unsafe {
                    let values = |i: usize| _mm_loadu_si128(row.as_ptr().add(*start.get_unchecked(x + 2 * k + i)).cast());
                    let two = _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(values(0)), values(1));
                    (two, _mm256_loadu_si256(weights.as_ptr().add((x + 2 * k) * FEW).cast()))
                };
                *sum = _mm256_madd_epi16(values, weights);
            }
            // Sums over the lanes of a half: outputs 0 2 4 6, then 1 3 5 7.
            let total = _mm256_hadd_epi32(_mm256_hadd_epi32(sums[0], sums[1]), _mm256_hadd_epi32(sums[2], sums[3]));
            let total = _mm256_cvtepi32_ps(_mm256_permutevar8x32_epi32(total, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
            // Not fused: the same on every machine.
            let value = _mm256_add_ps(_mm256_mul_ps(total, _mm256_set1_ps(scale)), _mm256_set1_ps(bias));
            // SAFETY: `x + OUTPUTS <= out.len()`.
            unsafe { _mm256_storeu_ps(out.as_mut_ptr().add(x), value) };
            x += OUTPUTS;
        }
        horizontal_generic(row, columns, scale, bias, out, x);
    }

    /// # Safety
    /// AVX2 must be there; lengths as `horizontal` checks them.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn horizontal_avx2(row: &[i16], columns: &Columns, scale: f32, bias: f32, out: &mut [f32]) {
        const OUTPUTS: usize = 8;
        let (start, weights, taps) = (&columns.start, &columns.weights, columns.taps);
        let mut x = 0;
        while x + OUTPUTS <= out.len() {
            let mut sums = [_mm256_setzero_si256(); OUTPUTS];
            for (k, sum) in sums.iter_mut().enumerate() {
                for at in (0..taps).step_by(STEP) {
                    // SAFETY: `start + taps <= row.len()` and `(x + k + 1) * taps <= weights.len()`, and `taps` is a multiple of STEP.
                    let (values, weights) = unsafe {
                        (
                            _mm256_loadu_si256(row.as_ptr().add(*start.get_unchecked(x + k) + at).cast()),
                            _mm256_loadu_si256(weights.as_ptr().add((x + k) * taps + at).cast()),
                        )
                    };
                    *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(values, weights));
                }
            }
            // Sums of the lanes of eight registers, as one register.
            let s01 = _mm256_hadd_epi32(sums[0], sums[1]);
            let s23 = _mm256_hadd_epi32(sums[2], sums[3]);
            let s45 = _mm256_hadd_epi32(sums[4], sums[5]);
            let s67 = _mm256_hadd_epi32(sums[6], sums[7]);
            let (low, high) = (_mm256_hadd_epi32(s01, s23), _mm256_hadd_epi32(s45, s67));
            let total = _mm256_add_epi32(_mm256_permute2x128_si256::<0x20>(low, high), _mm256_permute2x128_si256::<0x31>(low, high));
            let value = _mm256_add_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(total), _mm256_set1_ps(scale)), _mm256_set1_ps(bias));
            // SAFETY: `x + OUTPUTS <= out.len()`.
            unsafe { _mm256_storeu_ps(out.as_mut_ptr().add(x), value) };
            x += OUTPUTS;
        }
        horizontal_generic(row, columns, scale, bias, out, x);
    }
}

#[cfg(target_arch = "aarch64")]
mod arm {
    use super::*;
    use std::arch::aarch64::*;

    /// # Safety
    /// None beyond what every aarch64 has.
    #[target_feature(enable = "neon")]
    pub(super) unsafe fn vertical_neon(rows: Rows<'_>, first: usize, weights: &[i16], out: &mut [i16]) {
        const COLUMNS: usize = 32;
        let width = out.len();
        let mut at = 0;
        while at + COLUMNS <= width {
            let mut sums = [vdupq_n_s32(1 << (WEIGHT_BITS - FRACTION_BITS - 1)); COLUMNS / 4];
            for (&weight, start) in weights.iter().zip(rows.starts(first, width)) {
                for (half, sums) in sums.chunks_exact_mut(4).enumerate() {
                    // SAFETY: the row at `start` holds `width` bytes, and `at + COLUMNS <= width`.
                    let pixels = unsafe { vld1q_u8(rows.bytes.as_ptr().add(start + at + 16 * half)) };
                    let low = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(pixels)));
                    let high = vreinterpretq_s16_u16(vmovl_high_u8(pixels));
                    sums[0] = vmlal_n_s16(sums[0], vget_low_s16(low), weight);
                    sums[1] = vmlal_high_n_s16(sums[1], low, weight);
                    sums[2] = vmlal_n_s16(sums[2], vget_low_s16(high), weight);
                    sums[3] = vmlal_high_n_s16(sums[3], high, weight);
                }
            }
            const SHIFT: i32 = (WEIGHT_BITS - FRACTION_BITS) as i32;
            for (i, pair) in sums.chunks_exact(2).enumerate() {
                let both = vshrn_high_n_s32::<SHIFT>(vshrn_n_s32::<SHIFT>(pair[0]), pair[1]);
                // SAFETY: `at + COLUMNS <= width == out.len()`.
                unsafe { vst1q_s16(out.as_mut_ptr().add(at + 8 * i), both) };
            }
            at += COLUMNS;
        }
        vertical_generic(rows, first, weights, out, at);
    }

    /// # Safety
    /// Lengths as `horizontal` checks them.
    #[target_feature(enable = "neon")]
    pub(super) unsafe fn horizontal_neon(row: &[i16], columns: &Columns, scale: f32, bias: f32, out: &mut [f32]) {
        const OUTPUTS: usize = 4;
        let (start, weights, taps) = (&columns.start, &columns.weights, columns.taps);
        let mut x = 0;
        while x + OUTPUTS <= out.len() {
            let mut sums = [vdupq_n_s32(0); OUTPUTS];
            for (k, sum) in sums.iter_mut().enumerate() {
                let mut other = vdupq_n_s32(0);
                for at in (0..taps).step_by(FEW) {
                    // SAFETY: `start + taps <= row.len()` and `(x + k + 1) * taps <= weights.len()`, and `taps` is a multiple of FEW.
                    let (values, weights) = unsafe {
                        (
                            vld1q_s16(row.as_ptr().add(*start.get_unchecked(x + k) + at)),
                            vld1q_s16(weights.as_ptr().add((x + k) * taps + at)),
                        )
                    };
                    *sum = vmlal_s16(*sum, vget_low_s16(values), vget_low_s16(weights));
                    other = vmlal_high_s16(other, values, weights);
                }
                *sum = vaddq_s32(*sum, other);
            }
            let total = vpaddq_s32(vpaddq_s32(sums[0], sums[1]), vpaddq_s32(sums[2], sums[3]));
            // Not fused: the same on every machine.
            let value = vaddq_f32(vmulq_n_f32(vcvtq_f32_s32(total), scale), vdupq_n_f32(bias));
            // SAFETY: `x + OUTPUTS <= out.len()`.
            unsafe { vst1q_f32(out.as_mut_ptr().add(x), value) };
            x += OUTPUTS;
        }
        horizontal_generic(row, columns, scale, bias, out, x);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    /// Weights from anything: not negative, with the right sum.
    fn normalised(raw: &[u8]) -> Vec<i16> {
        let total: u32 = raw.iter().map(|&x| u32::from(x)).sum::<u32>().max(1);
        let mut weights: Vec<i16> = raw.iter().map(|&x| ((u32::from(x) << WEIGHT_BITS) / total) as i16).collect();
        let sum: i16 = weights.iter().sum();
        weights[0] += (1 << WEIGHT_BITS) - sum;
        weights
    }

    proptest! {
        #[test]
        fn vertical_sums_are_the_definition(
            bytes in vec(any::<u8>(), 12 * 170), raw in vec(any::<u8>(), 1..12), width in 0usize..170, first in 0usize..40,
        ) {
            let weights = normalised(&raw);
            let rows = Rows { bytes: &bytes, stride: 170, rows: 12 };
            let wanted: Vec<i16> = (0..width).map(|x| {
                let sum: i32 = weights.iter().enumerate().map(|(i, &w)| i32::from(w) * i32::from(bytes[(first + i) % 12 * 170 + x])).sum();
                (f64::from(sum) / 128.0 + 0.5).floor() as i16
            }).collect();
            for isa in Isa::all_available() {
                let mut out = vec![-1; width];
                vertical(isa, rows, first, &weights, &mut out);
                prop_assert_eq!(&out, &wanted, "{}", isa.name());
            }
        }

        #[test]
        fn horizontal_sums_are_the_definition(
            row in vec(0i16..=32_640, 64..300), raw in vec(any::<u8>(), 1..60), starts in vec(any::<prop::sample::Index>(), 0..40),
            scale in 0.001f32..1.0, bias in -3f32..3.0,
        ) {
            let taps = padded_taps(raw.len());
            let mut one = normalised(&raw);
            one.resize(taps, 0);
            let weights = one.repeat(starts.len());
            let start: Vec<usize> = starts.iter().map(|i| i.index(row.len() - taps + 1)).collect();
            let columns = Columns::new(start.clone(), weights);
            let wanted: Vec<f32> = start.iter().map(|&start| {
                let sum: i64 = one.iter().zip(&row[start..]).map(|(&w, &x)| i64::from(w) * i64::from(x)).sum();
                sum as f32 * (scale / 2_097_152.0) + bias
            }).collect();
            for isa in Isa::all_available() {
                let mut out = vec![f32::NAN; start.len()];
                horizontal(isa, &row, &columns, scale, bias, &mut out);
                prop_assert_eq!(&out, &wanted, "{}", isa.name());
            }
        }
    }

    #[test]
    fn white_stays_within_sixteen_bits() {
        let bytes = vec![255u8; 200 * 3];
        for isa in Isa::all_available() {
            let mut out = vec![0; 200];
            vertical(isa, Rows { bytes: &bytes, stride: 200, rows: 3 }, 0, &[5000, 5000, 6384], &mut out);
            assert!(out.iter().all(|&x| x == 255 << FRACTION_BITS), "{}", isa.name());
        }
    }
}
