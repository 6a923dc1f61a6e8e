//! The inverse DCT of JPEG, 8x8, as libjpeg's "islow" computes it (13-bit constants, two passes, columns first), four blocks at a time.
//!
//! The generic version states the arithmetic as the vector versions do it: sums of two inputs in 16 bits, products and their sums in 32 bits,
//! 16 bits with saturation between the passes. For coefficients that an encoder can produce this equals jidctint.c to the bit; for a damaged
//! stream every version gives the same (meaningless) pixels.

use super::isa::Isa;

/// Blocks transformed together, side by side.
pub const GROUP: usize = 4;
/// Coefficients of a group, row by row: `[row 0..8][block 0..GROUP][column 0..8]`, dequantized.
pub const GROUP_LEN: usize = 64 * GROUP;
/// Pixels in a row of a group.
pub const GROUP_WIDTH: usize = 8 * GROUP;

/// Fraction bits of the constants.
const CONST_BITS: u32 = 13;
/// Fraction bits kept between the passes.
const PASS1_BITS: u32 = 2;

// Names and values as in jidctint.c: FIX(0.298631336) and so on, combined into the pairs that a multiply-add of two 16-bit products takes.
const F_0_298: i16 = 2446;
const F_0_390: i16 = 3196;
const F_0_541: i16 = 4433;
const F_0_765: i16 = 6270;
const F_0_899: i16 = 7373;
const F_1_175: i16 = 9633;
const F_1_501: i16 = 12_299;
const F_1_847: i16 = 15_137;
const F_1_961: i16 = 16_069;
const F_2_053: i16 = 16_819;
const F_2_562: i16 = 20_995;
const F_3_072: i16 = 25_172;

/// `(first, second)` factors of each multiply-add, for the inputs that `one_dimension` names.
const TMP3: (i16, i16) = (F_0_541 + F_0_765, F_0_541);
const TMP2: (i16, i16) = (F_0_541, F_0_541 - F_1_847);
const Z3: (i16, i16) = (F_1_175 - F_1_961, F_1_175);
const Z4: (i16, i16) = (F_1_175, F_1_175 - F_0_390);
const ODD0: (i16, i16) = (F_0_298 - F_0_899, -F_0_899);
const ODD3: (i16, i16) = (-F_0_899, F_1_501 - F_0_899);
const ODD1: (i16, i16) = (F_2_053 - F_2_562, -F_2_562);
const ODD2: (i16, i16) = (-F_2_562, F_3_072 - F_2_562);

/// Transform a group: `out` gets 8 rows of [`GROUP_WIDTH`] pixels, `stride` bytes apart.
///
/// # Panics
/// When `out` is shorter than 7 strides and a row, `stride` shorter than a row, or the instruction set is not there.
pub fn idct(isa: Isa, coefficients: &[i16; GROUP_LEN], out: &mut [u8], stride: usize) {
    assert!(stride >= GROUP_WIDTH && out.len() >= 7 * stride + GROUP_WIDTH, "room for 8 rows of a group");
    assert!(isa.available(), "{} is not available here", isa.name());
    match isa.float() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: instruction set and room are checked above.
        Isa::Avx512 => unsafe { avx512::group(coefficients, out, stride) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx2 => unsafe { avx2::group(coefficients, out, stride) },
        #[cfg(target_arch = "aarch64")]
        // SAFETY: as above.
        Isa::Neon => unsafe { arm::group(coefficients, out, stride) },
        _ => generic(coefficients, out, stride),
    }
}

/// Fill a group whose blocks have no coefficient but the first: what [`idct`] makes of them, for less.
///
/// # Panics
/// As [`idct`].
pub fn idct_flat(first: [i16; GROUP], out: &mut [u8], stride: usize) {
    assert!(stride >= GROUP_WIDTH && out.len() >= 7 * stride + GROUP_WIDTH, "room for 8 rows of a group");
    let mut row = [0u8; GROUP_WIDTH];
    for (pixels, dc) in row.chunks_exact_mut(8).zip(first) {
        // One pass scales by 4, both together divide by 32, rounding once; between them 16 bits, as in the full transform.
        let between = (i32::from(dc) << PASS1_BITS).clamp(i16::MIN.into(), i16::MAX.into());
        pixels.fill((((between + 16) >> 5) + 128).clamp(0, 255) as u8);
    }
    for line in out.chunks_mut(stride).take(8) {
        line[..GROUP_WIDTH].copy_from_slice(&row);
    }
}

/// One dimension, on the same column (or row) of many blocks: `x[k]` is input `k`, the result output `k`, before rounding.
#[inline(always)]
fn one_dimension(x: [i16; 8]) -> [i32; 8] {
    let pair = |a: i16, b: i16, (fa, fb): (i16, i16)| (i32::from(a) * i32::from(fa)).wrapping_add(i32::from(b) * i32::from(fb));
    let tmp3 = pair(x[2], x[6], TMP3);
    let tmp2 = pair(x[2], x[6], TMP2);
    let tmp0 = i32::from(x[0].wrapping_add(x[4])) << CONST_BITS;
    let tmp1 = i32::from(x[0].wrapping_sub(x[4])) << CONST_BITS;
    let even = [tmp0.wrapping_add(tmp3), tmp1.wrapping_add(tmp2), tmp1.wrapping_sub(tmp2), tmp0.wrapping_sub(tmp3)];
    let (s3, s4) = (x[7].wrapping_add(x[3]), x[5].wrapping_add(x[1]));
    let (z3, z4) = (pair(s3, s4, Z3), pair(s3, s4, Z4));
    let odd = [
        pair(x[7], x[1], ODD3).wrapping_add(z4),
        pair(x[5], x[3], ODD2).wrapping_add(z3),
        pair(x[5], x[3], ODD1).wrapping_add(z4),
        pair(x[7], x[1], ODD0).wrapping_add(z3),
    ];
    std::array::from_fn(|k| if k < 4 { even[k].wrapping_add(odd[k]) } else { even[7 - k].wrapping_sub(odd[7 - k]) })
}

fn generic(coefficients: &[i16; GROUP_LEN], out: &mut [u8], stride: usize) {
    let mut between = [0i16; GROUP_LEN];
    for column in 0..GROUP_WIDTH {
        let outputs = one_dimension(std::array::from_fn(|row| coefficients[row * GROUP_WIDTH + column]));
        for (row, x) in outputs.into_iter().enumerate() {
            const SHIFT: u32 = CONST_BITS - PASS1_BITS;
            between[row * GROUP_WIDTH + column] =
                (x.wrapping_add(1 << (SHIFT - 1)) >> SHIFT).clamp(i16::MIN.into(), i16::MAX.into()) as i16;
        }
    }
    for (row, line) in out.chunks_mut(stride).take(8).enumerate() {
        for (block, pixels) in line[..GROUP_WIDTH].chunks_exact_mut(8).enumerate() {
            let outputs = one_dimension(std::array::from_fn(|column| between[row * GROUP_WIDTH + block * 8 + column]));
            for (pixel, x) in pixels.iter_mut().zip(outputs) {
                const SHIFT: u32 = CONST_BITS + PASS1_BITS + 3;
                *pixel = ((x.wrapping_add(1 << (SHIFT - 1)) >> SHIFT).clamp(-128, 127) + 128) as u8;
            }
        }
    }
}

/// The same algorithm for a register of several 128-bit lanes, one block in each: every instruction works within its lane.
#[cfg(target_arch = "x86_64")]
macro_rules! vector_version {
    ($module:ident, $feature:literal, $register:ty, $blocks:literal, $load:ident, $store_rows:ident,
     $add16:ident, $sub16:ident, $add32:ident, $sub32:ident, $madd:ident, $splat32:ident, $splat8:ident, $zero:ident,
     $sra:ident, $packs32:ident, $packs16:ident, $add8:ident,
     $low8:ident, $high8:ident, $low16:ident, $high16:ident, $low32:ident, $high32:ident, $low64:ident, $high64:ident) => {
        mod $module {
            use super::*;
            use std::arch::x86_64::*;

            type Register = $register;

            /// The factors of a multiply-add in every pair of lanes.
            #[target_feature(enable = $feature)]
            #[inline]
            fn factors((a, b): (i16, i16)) -> Register {
                $splat32((i32::from(b) << 16) | i32::from(a as u16))
            }

            /// Multiply-add of two registers of inputs: low and high half of the columns.
            #[target_feature(enable = $feature)]
            #[inline]
            fn multiply_add(low: Register, high: Register, by: (i16, i16)) -> [Register; 2] {
                [$madd(low, factors(by)), $madd(high, factors(by))]
            }

            /// `x * 2^13` in 32 bits: the input in the upper half of each lane, shifted down.
            #[target_feature(enable = $feature)]
            #[inline]
            fn widen(x: Register) -> [Register; 2] {
                [$sra::<{ 16 - CONST_BITS }>($low16($zero(), x)), $sra::<{ 16 - CONST_BITS }>($high16($zero(), x))]
            }

            /// `one_dimension` of the generic version, rounded by `SHIFT` bits and saturated to 16.
            #[target_feature(enable = $feature)]
            #[inline]
            fn pass<const SHIFT: u32>(x: [Register; 8]) -> [Register; 8] {
                let add = |a: [Register; 2], b: [Register; 2]| [$add32(a[0], b[0]), $add32(a[1], b[1])];
                let sub = |a: [Register; 2], b: [Register; 2]| [$sub32(a[0], b[0]), $sub32(a[1], b[1])];
                let (low, high) = ($low16(x[2], x[6]), $high16(x[2], x[6]));
                let (tmp3, tmp2) = (multiply_add(low, high, TMP3), multiply_add(low, high, TMP2));
                let (tmp0, tmp1) = (widen($add16(x[0], x[4])), widen($sub16(x[0], x[4])));
                let even = [add(tmp0, tmp3), add(tmp1, tmp2), sub(tmp1, tmp2), sub(tmp0, tmp3)];
                let (s3, s4) = ($add16(x[7], x[3]), $add16(x[5], x[1]));
                let (low, high) = ($low16(s3, s4), $high16(s3, s4));
                let (z3, z4) = (multiply_add(low, high, Z3), multiply_add(low, high, Z4));
                let (low, high) = ($low16(x[7], x[1]), $high16(x[7], x[1]));
                let (odd3, odd0) = (add(multiply_add(low, high, ODD3), z4), add(multiply_add(low, high, ODD0), z3));
                let (low, high) = ($low16(x[5], x[3]), $high16(x[5], x[3]));
                let (odd2, odd1) = (add(multiply_add(low, high, ODD2), z3), add(multiply_add(low, high, ODD1), z4));
                let odd = [odd3, odd2, odd1, odd0];
                let half = $splat32(1 << (SHIFT - 1));
                let mut out = [x[0]; 8];
                for k in 0..4 {
                    let even = [$add32(even[k][0], half), $add32(even[k][1], half)];
                    let (sum, difference) = (add(even, odd[k]), sub(even, odd[k]));
                    out[k] = $packs32($sra::<SHIFT>(sum[0]), $sra::<SHIFT>(sum[1]));
                    out[7 - k] = $packs32($sra::<SHIFT>(difference[0]), $sra::<SHIFT>(difference[1]));
                }
                out
            }

            /// 8x8 transposition in each lane.
            #[target_feature(enable = $feature)]
            #[inline]
            fn transpose(x: [Register; 8]) -> [Register; 8] {
                let pairs: [Register; 8] = [
                    $low16(x[0], x[1]),
                    $high16(x[0], x[1]),
                    $low16(x[2], x[3]),
                    $high16(x[2], x[3]),
                    $low16(x[4], x[5]),
                    $high16(x[4], x[5]),
                    $low16(x[6], x[7]),
                    $high16(x[6], x[7]),
                ];
                let quads: [Register; 8] = [
                    $low32(pairs[0], pairs[2]),
                    $high32(pairs[0], pairs[2]),
                    $low32(pairs[1], pairs[3]),
                    $high32(pairs[1], pairs[3]),
                    $low32(pairs[4], pairs[6]),
                    $high32(pairs[4], pairs[6]),
                    $low32(pairs[5], pairs[7]),
                    $high32(pairs[5], pairs[7]),
                ];
                [
                    $low64(quads[0], quads[4]),
                    $high64(quads[0], quads[4]),
                    $low64(quads[1], quads[5]),
                    $high64(quads[1], quads[5]),
                    $low64(quads[2], quads[6]),
                    $high64(quads[2], quads[6]),
                    $low64(quads[3], quads[7]),
                    $high64(quads[3], quads[7]),
                ]
            }

            /// # Safety
            /// The instruction set must be there, and `out` must have room for 8 rows of [`GROUP_WIDTH`] bytes, `stride` apart.
            #[target_feature(enable = $feature)]
            pub(super) unsafe fn group(coefficients: &[i16; GROUP_LEN], out: &mut [u8], stride: usize) {
                for part in 0..GROUP / $blocks {
                    let mut x = [$zero(); 8];
                    for (row, x) in x.iter_mut().enumerate() {
                        // SAFETY: a row of a group has 8 * GROUP coefficients, of which this reads 8 * $blocks from a multiple of that on.
                        *x = unsafe { $load(coefficients.as_ptr().add(row * GROUP_WIDTH + part * 8 * $blocks).cast()) };
                    }
                    let x = transpose(pass::<{ CONST_BITS - PASS1_BITS }>(x));
                    let x = pass::<{ CONST_BITS + PASS1_BITS + 3 }>(x);
                    // x[k] holds output column k, one row an element: to bytes, then transposed to rows.
                    let level = $splat8(-128);
                    let bytes: [Register; 4] = [
                        $add8($packs16(x[0], x[1]), level),
                        $add8($packs16(x[2], x[3]), level),
                        $add8($packs16(x[4], x[5]), level),
                        $add8($packs16(x[6], x[7]), level),
                    ];
                    // Each has two columns of 8 rows, one after the other.
                    let even: [Register; 2] = [$low8(bytes[0], bytes[1]), $high8(bytes[0], bytes[1])]; // columns 0 2, 1 3
                    let odd: [Register; 2] = [$low8(bytes[2], bytes[3]), $high8(bytes[2], bytes[3])]; // columns 4 6, 5 7
                    let first: [Register; 2] = [$low8(even[0], even[1]), $high8(even[0], even[1])]; // columns 0 1 2 3 of rows 0 to 3, 4 to 7
                    let second: [Register; 2] = [$low8(odd[0], odd[1]), $high8(odd[0], odd[1])]; // columns 4 5 6 7
                    let rows: [Register; 4] = [
                        $low32(first[0], second[0]),
                        $high32(first[0], second[0]),
                        $low32(first[1], second[1]),
                        $high32(first[1], second[1]),
                    ];
                    for (k, rows) in rows.into_iter().enumerate() {
                        // SAFETY: rows 2 k and 2 k + 1 are within the room that this function's contract asks for.
                        unsafe { $store_rows(rows, out.as_mut_ptr().add(2 * k * stride + part * 8 * $blocks), stride) };
                    }
                }
            }
        }
    };
}

/// Each 128-bit lane holds 8 bytes of a row and 8 bytes of the next: store both rows.
///
/// # Safety
/// AVX-512F must be there; 32 bytes must be writable at `to` and at `to + stride`.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
unsafe fn store_rows_512(rows: std::arch::x86_64::__m512i, to: *mut u8, stride: usize) {
    use std::arch::x86_64::*;
    let sorted = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), rows);
    // SAFETY: this function's contract.
    unsafe {
        _mm256_storeu_si256(to.cast(), _mm512_castsi512_si256(sorted));
        _mm256_storeu_si256(to.add(stride).cast(), _mm512_extracti64x4_epi64::<1>(sorted));
    }
}

/// As `store_rows_512`, for two lanes.
///
/// # Safety
/// AVX2 must be there; 16 bytes must be writable at `to` and at `to + stride`.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
#[inline]
unsafe fn store_rows_256(rows: std::arch::x86_64::__m256i, to: *mut u8, stride: usize) {
    use std::arch::x86_64::*;
    let sorted = _mm256_permute4x64_epi64::<0b11_01_10_00>(rows);
    // SAFETY: this function's contract.
    unsafe {
        _mm_storeu_si128(to.cast(), _mm256_castsi256_si128(sorted));
        _mm_storeu_si128(to.add(stride).cast(), _mm256_extracti128_si256::<1>(sorted));
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn sra_512<const SHIFT: u32>(x: std::arch::x86_64::__m512i) -> std::arch::x86_64::__m512i {
    std::arch::x86_64::_mm512_srai_epi32::<SHIFT>(x)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
#[inline]
fn sra_256<const SHIFT: u32>(x: std::arch::x86_64::__m256i) -> std::arch::x86_64::__m256i {
    // The shift as a vector: the immediate form wants an i32 constant, which cannot be made of a u32 one in stable Rust.
    std::arch::x86_64::_mm256_sra_epi32(x, std::arch::x86_64::_mm_cvtsi32_si128(SHIFT as i32))
}

#[cfg(target_arch = "x86_64")]
vector_version!(
    avx512,
    "avx512f,avx512bw",
    __m512i,
    4,
    _mm512_loadu_si512,
    store_rows_512,
    _mm512_add_epi16,
    _mm512_sub_epi16,
    _mm512_add_epi32,
    _mm512_sub_epi32,
    _mm512_madd_epi16,
    _mm512_set1_epi32,
    _mm512_set1_epi8,
    _mm512_setzero_si512,
    sra_512,
    _mm512_packs_epi32,
    _mm512_packs_epi16,
    _mm512_add_epi8,
    _mm512_unpacklo_epi8,
    _mm512_unpackhi_epi8,
    _mm512_unpacklo_epi16,
    _mm512_unpackhi_epi16,
    _mm512_unpacklo_epi32,
    _mm512_unpackhi_epi32,
    _mm512_unpacklo_epi64,
    _mm512_unpackhi_epi64
);
#[cfg(target_arch = "x86_64")]
vector_version!(
    avx2,
    "avx2",
    __m256i,
    2,
    _mm256_loadu_si256,
    store_rows_256,
    _mm256_add_epi16,
    _mm256_sub_epi16,
    _mm256_add_epi32,
    _mm256_sub_epi32,
    _mm256_madd_epi16,
    _mm256_set1_epi32,
    _mm256_set1_epi8,
    _mm256_setzero_si256,
    sra_256,
    _mm256_packs_epi32,
    _mm256_packs_epi16,
    _mm256_add_epi8,
    _mm256_unpacklo_epi8,
    _mm256_unpackhi_epi8,
    _mm256_unpacklo_epi16,
    _mm256_unpackhi_epi16,
    _mm256_unpacklo_epi32,
    _mm256_unpackhi_epi32,
    _mm256_unpacklo_epi64,
    _mm256_unpackhi_epi64
);

/// The same algorithm block by block: a register has a row (then a column) of one block.
#[cfg(target_arch = "aarch64")]
mod arm {
    use super::*;
    use std::arch::aarch64::*;

    /// Eight sums: of the first four positions, of the last four.
    type Sums = [int32x4_t; 2];

    #[target_feature(enable = "neon")]
    #[inline]
    fn pair(a: int16x8_t, b: int16x8_t, (fa, fb): (i16, i16)) -> Sums {
        [vmlal_n_s16(vmull_n_s16(vget_low_s16(a), fa), vget_low_s16(b), fb), vmlal_high_n_s16(vmull_high_n_s16(a, fa), b, fb)]
    }

    #[target_feature(enable = "neon")]
    #[inline]
    fn scaled(x: int16x8_t) -> Sums {
        const BITS: i32 = CONST_BITS as i32;
        [vshll_n_s16::<BITS>(vget_low_s16(x)), vshll_high_n_s16::<BITS>(x)]
    }

    #[target_feature(enable = "neon")]
    #[inline]
    fn add(a: Sums, b: Sums) -> Sums {
        [vaddq_s32(a[0], b[0]), vaddq_s32(a[1], b[1])]
    }

    #[target_feature(enable = "neon")]
    #[inline]
    fn sub(a: Sums, b: Sums) -> Sums {
        [vsubq_s32(a[0], b[0]), vsubq_s32(a[1], b[1])]
    }

    /// `one_dimension` on eight positions at a time.
    #[target_feature(enable = "neon")]
    #[inline]
    fn one_dimension(x: [int16x8_t; 8]) -> [Sums; 8] {
        let (tmp3, tmp2) = (pair(x[2], x[6], TMP3), pair(x[2], x[6], TMP2));
        let (tmp0, tmp1) = (scaled(vaddq_s16(x[0], x[4])), scaled(vsubq_s16(x[0], x[4])));
        let even = [add(tmp0, tmp3), add(tmp1, tmp2), sub(tmp1, tmp2), sub(tmp0, tmp3)];
        let (s3, s4) = (vaddq_s16(x[7], x[3]), vaddq_s16(x[5], x[1]));
        let (z3, z4) = (pair(s3, s4, Z3), pair(s3, s4, Z4));
        let odd = [
            add(pair(x[7], x[1], ODD3), z4),
            add(pair(x[5], x[3], ODD2), z3),
            add(pair(x[5], x[3], ODD1), z4),
            add(pair(x[7], x[1], ODD0), z3),
        ];
        [
            add(even[0], odd[0]),
            add(even[1], odd[1]),
            add(even[2], odd[2]),
            add(even[3], odd[3]),
            sub(even[3], odd[3]),
            sub(even[2], odd[2]),
            sub(even[1], odd[1]),
            sub(even[0], odd[0]),
        ]
    }

    /// 8x8 transposition.
    #[target_feature(enable = "neon")]
    #[inline]
    fn transpose(x: [int16x8_t; 8]) -> [int16x8_t; 8] {
        // Pairs of rows: every second column of both, then in twos, then in fours.
        let mut pairs = [vdupq_n_s32(0); 8];
        for (i, two) in x.chunks_exact(2).enumerate() {
            pairs[2 * i] = vreinterpretq_s32_s16(vtrn1q_s16(two[0], two[1]));
            pairs[2 * i + 1] = vreinterpretq_s32_s16(vtrn2q_s16(two[0], two[1]));
        }
        // Rows 0 to 3, then 4 to 7: columns 0 and 4, 2 and 6, 1 and 5, 3 and 7.
        let quad = |i: usize, second: bool, base: usize| {
            let (a, b) = (pairs[base + i], pairs[base + i + 2]);
            vreinterpretq_s64_s32(if second { vtrn2q_s32(a, b) } else { vtrn1q_s32(a, b) })
        };
        let mut columns = [vdupq_n_s16(0); 8];
        for (i, second, column) in [(0, false, 0), (0, true, 2), (1, false, 1), (1, true, 3)] {
            let (upper, lower) = (quad(i, second, 0), quad(i, second, 4));
            columns[column] = vreinterpretq_s16_s64(vtrn1q_s64(upper, lower));
            columns[column + 4] = vreinterpretq_s16_s64(vtrn2q_s64(upper, lower));
        }
        columns
    }

    /// # Safety
    /// `out` must have room for 8 rows of [`GROUP_WIDTH`] bytes, `stride` apart.
    #[target_feature(enable = "neon")]
    pub(super) unsafe fn group(coefficients: &[i16; GROUP_LEN], out: &mut [u8], stride: usize) {
        const FIRST: i32 = (CONST_BITS - PASS1_BITS) as i32;
        // The second shift is one by 16, which takes the upper half, and one by the rest.
        const REST: i32 = (CONST_BITS + PASS1_BITS + 3) as i32 - 16;
        let first_half = vdupq_n_s32(1 << (FIRST - 1));
        let second_half = vdupq_n_s32(1 << (REST + 15));
        for block in 0..GROUP {
            let mut x = [vdupq_n_s16(0); 8];
            for (row, x) in x.iter_mut().enumerate() {
                // SAFETY: a row of a group has 8 * GROUP coefficients, of which this reads 8 from a multiple of that on.
                *x = unsafe { vld1q_s16(coefficients.as_ptr().add(row * GROUP_WIDTH + block * 8)) };
            }
            let mut between = [vdupq_n_s16(0); 8];
            for (between, sums) in between.iter_mut().zip(one_dimension(x)) {
                // Wraps before it is shifted, as everywhere; saturates after it.
                let low = vqshrn_n_s32::<FIRST>(vaddq_s32(sums[0], first_half));
                *between = vqshrn_high_n_s32::<FIRST>(low, vaddq_s32(sums[1], first_half));
            }
            let mut columns = [vdupq_n_s16(0); 8];
            for (column, sums) in columns.iter_mut().zip(one_dimension(transpose(between))) {
                let upper = vaddhn_high_s32(vaddhn_s32(sums[0], second_half), sums[1], second_half);
                *column = vshrq_n_s16::<REST>(upper);
            }
            for (row, pixels) in transpose(columns).into_iter().enumerate() {
                let bytes = veor_u8(vreinterpret_u8_s8(vqmovn_s16(pixels)), vdup_n_u8(0x80));
                // SAFETY: this function's contract.
                unsafe { vst1_u8(out.as_mut_ptr().add(row * stride + block * 8), bytes) };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    fn run(isa: Isa, coefficients: &[i16]) -> Vec<u8> {
        let stride = GROUP_WIDTH + 5;
        let mut out = vec![0; 8 * stride];
        idct(isa, coefficients.try_into().unwrap(), &mut out, stride);
        out.chunks(stride).flat_map(|row| row[..GROUP_WIDTH].to_vec()).collect()
    }

    /// The definition of the inverse DCT, in floating point.
    fn exact(block: usize, coefficients: &[i16]) -> Vec<f64> {
        let c = |k: usize| if k == 0 { (0.5f64).sqrt() } else { 1.0 };
        let wave = |x: usize, k: usize| c(k) * ((2 * x + 1) as f64 * k as f64 * std::f64::consts::PI / 16.0).cos();
        (0..64)
            .map(|i| {
                let (y, x) = (i / 8, i % 8);
                let at = |v: usize, u: usize| f64::from(coefficients[v * GROUP_WIDTH + block * 8 + u]);
                (0..8).flat_map(|v| (0..8).map(move |u| (v, u))).map(|(v, u)| at(v, u) * wave(x, u) * wave(y, v)).sum::<f64>() / 4.0 + 128.0
            })
            .collect()
    }

    #[test]
    fn it_is_an_inverse_dct() {
        let mut state = 12345u32;
        for _ in 0..50 {
            let coefficients: Vec<i16> = (0..GROUP_LEN)
                .map(|_| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    ((state >> 16) % 61) as i16 - 30
                })
                .collect();
            for isa in Isa::all_available() {
                let pixels = run(isa, &coefficients);
                for block in 0..GROUP {
                    for (i, wanted) in exact(block, &coefficients).into_iter().enumerate() {
                        let got = f64::from(pixels[i / 8 * GROUP_WIDTH + block * 8 + i % 8]);
                        assert!((got - wanted.clamp(0.0, 255.0)).abs() < 0.6, "{}: {got} {wanted}", isa.name());
                    }
                }
            }
        }
    }

    proptest! {
        #[test]
        fn every_instruction_set_agrees(coefficients in vec(any::<i16>(), GROUP_LEN), shift in 0u32..14) {
            let coefficients: Vec<i16> = coefficients.iter().map(|x| x >> shift).collect();
            let wanted = run(Isa::Generic, &coefficients);
            for isa in Isa::all_available() {
                prop_assert_eq!(&run(isa, &coefficients), &wanted, "{}", isa.name());
            }
        }

        #[test]
        fn flat_blocks_are_the_full_transform(first in any::<[i16; GROUP]>()) {
            let mut coefficients = [0; GROUP_LEN];
            for (block, dc) in first.into_iter().enumerate() {
                coefficients[block * 8] = dc;
            }
            let mut out = vec![0; 8 * GROUP_WIDTH];
            idct_flat(first, &mut out, GROUP_WIDTH);
            prop_assert_eq!(out, run(Isa::Generic, &coefficients));
        }
    }
}
