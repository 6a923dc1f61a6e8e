//! x86-64: AVX-512 with VNNI, AVX2 with VNNI, plain AVX2.
//!
//! Plain AVX2 works in 16 bit (VPMADDWD): its byte instruction VPMADDUBSW saturates at 255 x 127 + 255 x 127, and a sum that depends on the
//! instruction set is worth less than its speed.

use super::super::vnni::{add_pairs, lanes, quantize};
use super::super::ymm;
use super::{Activation, BLOCK, Linear8, Scratch8, padded, quantizer};
use std::arch::x86_64::*;

/// Rows whose sums stay in registers: 12 rows x 2 vectors, 2 weights, 1 input.
const ROWS_512: usize = 12;

/// At most `BLOCK` rows.
///
/// # Safety
/// AVX-512 F, BW and VNNI must be there; lengths as `Linear8::run` checks them.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(super) unsafe fn avx512(layer: &Linear8, a: &[f32], residual: Option<&[f32]>, out: &mut [f32], scratch: &mut Scratch8) {
    let depth = padded(layer.inputs);
    let rows = a.len() / layer.inputs;
    debug_assert!(rows <= BLOCK);
    for (r, row) in a.chunks_exact(layer.inputs).enumerate() {
        // SAFETY: this function's contract; the scratch holds `BLOCK` rows of `depth` bytes and 16 more.
        unsafe {
            let (_, scale, zero) = quantize(row, scratch.bytes.as_mut_ptr().add(r * depth), quantizer);
            (scratch.scale[r], scratch.zero[r]) = (scale, negated_pair(zero));
        }
    }
    let residual = residual.map_or(std::ptr::null(), <[f32]>::as_ptr);
    for panel in 0..layer.bias.len() / 32 {
        let mut row = 0;
        // SAFETY: row groups end at or before `rows`, panels are the layer's.
        unsafe {
            while row + ROWS_512 <= rows {
                tile_512::<ROWS_512>(layer, scratch, row, panel, residual, out.as_mut_ptr());
                row += ROWS_512;
            }
            while row + 4 <= rows {
                tile_512::<4>(layer, scratch, row, panel, residual, out.as_mut_ptr());
                row += 4;
            }
            while row < rows {
                tile_512::<1>(layer, scratch, row, panel, residual, out.as_mut_ptr());
                row += 1;
            }
        }
    }
}

/// `-zero` and `-zero * 128`, two 16-bit numbers for [`tile_512`]: times the low seven bits of a sum of weights and the rest of it, one
/// instruction that adds where a 32-bit product is two slow ones.
fn negated_pair(zero: i32) -> i32 {
    // 0 to 255, see `quantizer`.
    (-zero & 0xffff) | (-zero * 128) << 16
}

/// `N` rows times one panel.
///
/// # Safety
/// AVX-512 F, BW and VNNI must be there; rows `row..row + N` are quantized in `scratch` and lie within `out` and `residual` (null for none);
/// `panel` is one of the layer's.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn tile_512<const N: usize>(layer: &Linear8, scratch: &Scratch8, row: usize, panel: usize, residual: *const f32, out: *mut f32) {
    let (depth, stride) = (layer.inputs.next_multiple_of(4), padded(layer.inputs));
    let at = panel * 32;
    // SAFETY: this function's contract; stores and loads past a row's end are masked off.
    unsafe {
        let mut w = layer.packed.as_ptr().add(at * depth);
        let bytes = scratch.bytes.as_ptr().add(row * stride);
        let mut acc = [[_mm512_setzero_si512(); 2]; N];
        let mut k = 0;
        while k < depth {
            let w0 = _mm512_loadu_si512(w.cast());
            let w1 = _mm512_loadu_si512(w.add(64).cast());
            for (r, sums) in acc.iter_mut().enumerate() {
                let x = _mm512_set1_epi32(bytes.add(r * stride + k).cast::<i32>().read_unaligned());
                sums[0] = _mm512_dpbusd_epi32(sums[0], x, w0);
                sums[1] = _mm512_dpbusd_epi32(sums[1], x, w1);
            }
            w = w.add(128);
            k += 4;
        }
        for half in 0..2 {
            let column = at + half * 16;
            let n = layer.outputs.saturating_sub(column);
            let mask = lanes(n);
            let scale = _mm512_loadu_ps(layer.scale.as_ptr().add(column));
            let bias = _mm512_loadu_ps(layer.bias.as_ptr().add(column));
            let sums = _mm512_loadu_si512(layer.sums.as_ptr().add(column).cast());
            let pairs =
                _mm512_or_si512(_mm512_and_si512(sums, _mm512_set1_epi32(127)), _mm512_slli_epi32::<16>(_mm512_srai_epi32::<7>(sums)));
            for (r, acc) in acc.iter().enumerate() {
                let sum = _mm512_cvtepi32_ps(add_pairs(acc[half], _mm512_set1_epi32(scratch.zero[row + r]), pairs));
                let mut y = _mm512_fmadd_ps(sum, _mm512_mul_ps(_mm512_set1_ps(scratch.scale[row + r]), scale), bias);
                // The constant first: NaN stays, see `linear`.
                match layer.activation {
                    Activation::None => {}
                    Activation::Relu => y = _mm512_max_ps(_mm512_setzero_ps(), y),
                    Activation::Relu6 => y = _mm512_min_ps(_mm512_set1_ps(6.0), _mm512_max_ps(_mm512_setzero_ps(), y)),
                }
                let place = (row + r) * layer.outputs + column;
                if n > 0 {
                    if !residual.is_null() {
                        y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(mask, residual.add(place)));
                    }
                    _mm512_mask_storeu_ps(out.add(place), mask, y);
                }
            }
        }
    }
}

/// Rows whose sums stay in registers: 6 rows x 2 vectors, 2 weights, 1 input, and a product where there is no VNNI.
const ROWS_256: usize = 6;

/// At most `BLOCK` rows with AVX2 and the VEX form of VNNI.
///
/// # Safety
/// AVX2, FMA and AVX-VNNI must be there; lengths as `Linear8::run` checks them.
#[target_feature(enable = "avx2,fma,avxvnni")]
pub(super) unsafe fn avx_vnni(layer: &Linear8, a: &[f32], residual: Option<&[f32]>, out: &mut [f32], scratch: &mut Scratch8) {
    // SAFETY: this function's contract.
    unsafe { rows_256::<ymm::Vnni>(layer, a, residual, out, scratch) }
}

/// At most `BLOCK` rows with AVX2 alone.
///
/// # Safety
/// AVX2 and FMA must be there; lengths as `Linear8::run` checks them.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn avx2(layer: &Linear8, a: &[f32], residual: Option<&[f32]>, out: &mut [f32], scratch: &mut Scratch8) {
    // SAFETY: this function's contract.
    unsafe { rows_256::<ymm::Plain>(layer, a, residual, out, scratch) }
}

/// # Safety
/// `D`'s instruction set must be there (inlined into a caller that enables it); otherwise as [`avx2`].
#[inline(always)]
unsafe fn rows_256<D: ymm::Dot>(layer: &Linear8, a: &[f32], residual: Option<&[f32]>, out: &mut [f32], scratch: &mut Scratch8) {
    let (stride, rows) = (D::BYTES * padded(layer.inputs), a.len() / layer.inputs);
    debug_assert!(rows <= BLOCK);
    for (r, row) in a.chunks_exact(layer.inputs).enumerate() {
        // SAFETY: this function's contract; the scratch holds `BLOCK` rows of `stride` bytes.
        let (_, scale, zero) =
            unsafe { ymm::quantize::<D>(row, scratch.bytes.as_mut_ptr().add(r * stride), padded(layer.inputs), quantizer) };
        (scratch.scale[r], scratch.zero[r]) = (scale, zero);
    }
    let residual = residual.map_or(std::ptr::null(), <[f32]>::as_ptr);
    for panel in 0..layer.bias.len() / 16 {
        let mut row = 0;
        // SAFETY: row groups end at or before `rows`, panels are the layer's.
        unsafe {
            while row + ROWS_256 <= rows {
                tile_256::<D, ROWS_256>(layer, scratch, row, panel, residual, out.as_mut_ptr());
                row += ROWS_256;
            }
            while row < rows {
                tile_256::<D, 1>(layer, scratch, row, panel, residual, out.as_mut_ptr());
                row += 1;
            }
        }
    }
}

/// `N` rows times one panel.
///
/// # Safety
/// `D`'s instruction set must be there (inlined into a caller that enables it); otherwise as [`tile_512`].
#[inline(always)]
unsafe fn tile_256<D: ymm::Dot, const N: usize>(
    layer: &Linear8,
    scratch: &Scratch8,
    row: usize,
    panel: usize,
    residual: *const f32,
    out: *mut f32,
) {
    let (groups, stride) = (layer.inputs.div_ceil(D::DEPTH), D::BYTES * padded(layer.inputs));
    // SAFETY: this function's contract.
    unsafe {
        let mut acc = [[_mm256_setzero_si256(); 2]; N];
        let columns = layer.packed.as_ptr().add(panel * 64 * groups);
        ymm::dot::<D, N>(&mut acc, scratch.bytes.as_ptr().add(row * stride), stride, columns, groups);
        finish::<N>(layer, scratch, row, panel, acc, residual, out);
    }
}

/// From the sums of `N` rows and a panel of 16 outputs to the output.
///
/// # Safety
/// AVX2 and FMA must be there; otherwise as [`tile_512`].
#[target_feature(enable = "avx2,fma")]
#[inline]
unsafe fn finish<const N: usize>(
    layer: &Linear8,
    scratch: &Scratch8,
    row: usize,
    panel: usize,
    acc: [[__m256i; 2]; N],
    residual: *const f32,
    out: *mut f32,
) {
    // SAFETY: this function's contract; stores and loads past a row's end are masked off.
    unsafe {
        for half in 0..2 {
            let column = panel * 16 + half * 8;
            let n = layer.outputs.saturating_sub(column);
            if n == 0 {
                continue;
            }
            let scale = _mm256_loadu_ps(layer.scale.as_ptr().add(column));
            let bias = _mm256_loadu_ps(layer.bias.as_ptr().add(column));
            let sums = _mm256_loadu_si256(layer.sums.as_ptr().add(column).cast());
            for (r, acc) in acc.iter().enumerate() {
                let zero = _mm256_mullo_epi32(_mm256_set1_epi32(scratch.zero[row + r]), sums);
                let sum = _mm256_cvtepi32_ps(_mm256_sub_epi32(acc[half], zero));
                let mut y = _mm256_fmadd_ps(sum, _mm256_mul_ps(_mm256_set1_ps(scratch.scale[row + r]), scale), bias);
                // The constant first: NaN stays, see `linear`.
                match layer.activation {
                    Activation::None => {}
                    Activation::Relu => y = _mm256_max_ps(_mm256_setzero_ps(), y),
                    Activation::Relu6 => y = _mm256_min_ps(_mm256_set1_ps(6.0), _mm256_max_ps(_mm256_setzero_ps(), y)),
                }
                let place = (row + r) * layer.outputs + column;
                if !residual.is_null() {
                    y = _mm256_add_ps(y, ymm::load(residual.add(place), n));
                }
                ymm::store(out.add(place), n, y);
            }
        }
    }
}
