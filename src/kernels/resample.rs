//! Resizing in integers: weighted sums of rows, then weighted sums within the row. 8-bit pixels become 16-bit sums with
//! [`FRACTION_BITS`] fraction bits and at last float32, the model's input. Every instruction set gives the same bits.

use super::isa::Isa;

/// Fraction bits of a weight: the weights of one output sum to `1 << WEIGHT_BITS`.
pub const WEIGHT_BITS: u32 = 14;
/// Fraction bits of the sums between the two passes: 255 fills 15 bits.
pub const FRACTION_BITS: u32 = 7;
/// The horizontal pass reads so many values at a time: weights are padded with zeros to a multiple of it, rows by as much.
pub const STEP: usize = 16;

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
    /// The first `width` bytes of row `i`.
    fn row(&self, i: usize, width: usize) -> &'a [u8] {
        let start = i % self.rows * self.stride;
        &self.bytes[start..start + width]
    }
}

/// `out[x]` is the weighted sum of rows `first`, `first + 1`, … at `x`, with [`FRACTION_BITS`] fraction bits, rounded half up.
/// The weights are not negative and sum to `1 << WEIGHT_BITS`.
///
/// # Panics
/// When a row does not hold `out.len()` bytes or the instruction set is not there.
pub fn vertical(isa: Isa, rows: Rows<'_>, first: usize, weights: &[i16], out: &mut [i16]) {
    assert!(isa.available(), "{} is not available here", isa.name());
    // The rows that a vector version reads, checked once.
    for i in 0..weights.len() {
        let _ = rows.row(first + i, out.len());
    }
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: instruction set and rows are checked above.
        Isa::Avx512 | Isa::Avx512Vnni => unsafe { x86::vertical_avx512(rows, first, weights, out) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx2 => unsafe { x86::vertical_avx2(rows, first, weights, out) },
        _ => vertical_generic(rows, first, weights, out, 0),
    }
}

/// Columns from `from` on.
fn vertical_generic(rows: Rows<'_>, first: usize, weights: &[i16], out: &mut [i16], from: usize) {
    // So many columns at a time, for the compiler to keep in registers.
    const CHUNK: usize = 32;
    let width = out.len();
    let mut at = from;
    while at < width {
        let n = CHUNK.min(width - at);
        let mut sums = [1i32 << (WEIGHT_BITS - FRACTION_BITS - 1); CHUNK];
        for (i, &weight) in weights.iter().enumerate() {
            let row = &rows.row(first + i, width)[at..at + n];
            for (sum, &pixel) in sums.iter_mut().zip(row) {
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
#[derive(Clone, Copy)]
pub struct Columns<'a> {
    /// First value of each output.
    pub start: &'a [usize],
    /// Weights of each output, `[start.len(), taps]`; not negative, the sum of each row is `1 << WEIGHT_BITS`.
    pub weights: &'a [i16],
    /// Weights an output, a multiple of [`STEP`].
    pub taps: usize,
}

/// `out[x]` is the weighted sum of `row` from `start[x]` on, as a pixel value, times `scale` plus `bias`.
///
/// # Panics
/// When the lengths do not fit, an output reads beyond `row`, or the instruction set is not there.
pub fn horizontal(isa: Isa, row: &[i16], columns: Columns<'_>, scale: f32, bias: f32, out: &mut [f32]) {
    let Columns { start, weights, taps } = columns;
    assert!(isa.available(), "{} is not available here", isa.name());
    assert!(start.len() == out.len() && weights.len() == out.len() * taps && taps.is_multiple_of(STEP), "weights of a row");
    assert!(start.iter().all(|start| start + taps <= row.len()), "an output reads beyond its row");
    // From fixed point to pixel value.
    let scale = scale / (1u32 << (WEIGHT_BITS + FRACTION_BITS)) as f32;
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: instruction set and lengths are checked above. (AVX-512 has AVX2; wider registers would hold more than the taps of an output.)
        Isa::Avx2 | Isa::Avx512 | Isa::Avx512Vnni => unsafe { x86::horizontal_avx2(row, columns, scale, bias, out) },
        _ => horizontal_generic(row, columns, scale, bias, out, 0),
    }
}

/// Outputs from `from` on.
fn horizontal_generic(row: &[i16], columns: Columns<'_>, scale: f32, bias: f32, out: &mut [f32], from: usize) {
    let Columns { start, weights, taps } = columns;
    for ((out, &start), weights) in out.iter_mut().zip(start).zip(weights.chunks_exact(taps)).skip(from) {
        let sum: i32 = row[start..start + taps].iter().zip(weights).map(|(&x, &w)| i32::from(x) * i32::from(w)).sum();
        // Not fused: the same on every machine.
        *out = sum as f32 * scale + bias;
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::*;
    use std::arch::x86_64::*;

    /// Weights of rows `2 pair` and `2 pair + 1` in one 32-bit lane; a missing last row weighs nothing.
    fn pair_of(weights: &[i16], i: usize) -> i32 {
        let second = weights.get(i + 1).copied().unwrap_or(0);
        (i32::from(second) << 16) | i32::from(weights[i] as u16)
    }

    /// # Safety
    /// AVX-512 F and BW must be there; rows `first` to `first + weights.len()` must hold `out.len()` bytes.
    #[target_feature(enable = "avx512f,avx512bw")]
    pub(super) unsafe fn vertical_avx512(rows: Rows<'_>, first: usize, weights: &[i16], out: &mut [i16]) {
        const COLUMNS: usize = 64;
        let width = out.len();
        let mut at = 0;
        while at + COLUMNS <= width {
            let mut sums = [_mm512_set1_epi32(1 << (WEIGHT_BITS - FRACTION_BITS - 1)); 4];
            for i in (0..weights.len()).step_by(2) {
                let second = if i + 1 < weights.len() { i + 1 } else { i };
                let (a, b) = (rows.row(first + i, width), rows.row(first + second, width));
                // SAFETY: both rows hold `width` bytes, and `at + COLUMNS <= width`.
                let (a, b) = unsafe { (_mm512_loadu_si512(a.as_ptr().add(at).cast()), _mm512_loadu_si512(b.as_ptr().add(at).cast())) };
                let weight = _mm512_set1_epi32(pair_of(weights, i));
                let zero = _mm512_setzero_si512();
                let (low, high) = (_mm512_unpacklo_epi8(a, b), _mm512_unpackhi_epi8(a, b));
                sums[0] = _mm512_add_epi32(sums[0], _mm512_madd_epi16(_mm512_unpacklo_epi8(low, zero), weight));
                sums[1] = _mm512_add_epi32(sums[1], _mm512_madd_epi16(_mm512_unpackhi_epi8(low, zero), weight));
                sums[2] = _mm512_add_epi32(sums[2], _mm512_madd_epi16(_mm512_unpacklo_epi8(high, zero), weight));
                sums[3] = _mm512_add_epi32(sums[3], _mm512_madd_epi16(_mm512_unpackhi_epi8(high, zero), weight));
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
        vertical_generic(rows, first, weights, out, at);
    }

    /// # Safety
    /// AVX2 must be there; rows `first` to `first + weights.len()` must hold `out.len()` bytes.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn vertical_avx2(rows: Rows<'_>, first: usize, weights: &[i16], out: &mut [i16]) {
        const COLUMNS: usize = 32;
        let width = out.len();
        let mut at = 0;
        while at + COLUMNS <= width {
            let mut sums = [_mm256_set1_epi32(1 << (WEIGHT_BITS - FRACTION_BITS - 1)); 4];
            for i in (0..weights.len()).step_by(2) {
                let second = if i + 1 < weights.len() { i + 1 } else { i };
                let (a, b) = (rows.row(first + i, width), rows.row(first + second, width));
                // SAFETY: both rows hold `width` bytes, and `at + COLUMNS <= width`.
                let (a, b) = unsafe { (_mm256_loadu_si256(a.as_ptr().add(at).cast()), _mm256_loadu_si256(b.as_ptr().add(at).cast())) };
                let weight = _mm256_set1_epi32(pair_of(weights, i));
                let zero = _mm256_setzero_si256();
                let (low, high) = (_mm256_unpacklo_epi8(a, b), _mm256_unpackhi_epi8(a, b));
                sums[0] = _mm256_add_epi32(sums[0], _mm256_madd_epi16(_mm256_unpacklo_epi8(low, zero), weight));
                sums[1] = _mm256_add_epi32(sums[1], _mm256_madd_epi16(_mm256_unpackhi_epi8(low, zero), weight));
                sums[2] = _mm256_add_epi32(sums[2], _mm256_madd_epi16(_mm256_unpacklo_epi8(high, zero), weight));
                sums[3] = _mm256_add_epi32(sums[3], _mm256_madd_epi16(_mm256_unpackhi_epi8(high, zero), weight));
            }
            let sums = sums.map(|sum| _mm256_srai_epi32::<{ (WEIGHT_BITS - FRACTION_BITS) as i32 }>(sum));
            let (low, high) = (_mm256_packs_epi32(sums[0], sums[1]), _mm256_packs_epi32(sums[2], sums[3]));
            // SAFETY: `at + COLUMNS <= width == out.len()`.
            unsafe {
                _mm256_storeu_si256(out.as_mut_ptr().add(at).cast(), _mm256_permute2x128_si256::<0x20>(low, high));
                _mm256_storeu_si256(out.as_mut_ptr().add(at + 16).cast(), _mm256_permute2x128_si256::<0x31>(low, high));
            }
            at += COLUMNS;
        }
        vertical_generic(rows, first, weights, out, at);
    }

    /// # Safety
    /// AVX2 must be there; lengths as `horizontal` checks them.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn horizontal_avx2(row: &[i16], columns: Columns<'_>, scale: f32, bias: f32, out: &mut [f32]) {
        const OUTPUTS: usize = 8;
        let Columns { start, weights, taps } = columns;
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
            let taps = raw.len().next_multiple_of(STEP);
            let mut one = normalised(&raw);
            one.resize(taps, 0);
            let weights = one.repeat(starts.len());
            let start: Vec<usize> = starts.iter().map(|i| i.index(row.len() - taps + 1)).collect();
            let columns = Columns { start: &start, weights: &weights, taps };
            let wanted: Vec<f32> = start.iter().map(|&start| {
                let sum: i64 = one.iter().zip(&row[start..]).map(|(&w, &x)| i64::from(w) * i64::from(x)).sum();
                sum as f32 * (scale / 2_097_152.0) + bias
            }).collect();
            for isa in Isa::all_available() {
                let mut out = vec![f32::NAN; start.len()];
                horizontal(isa, &row, columns, scale, bias, &mut out);
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
