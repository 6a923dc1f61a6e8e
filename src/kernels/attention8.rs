//! Fused neighbour-masked attention in integers: as [`super::attention`], with queries, keys, values and softmax weights in 8 bit.
//!
//! Everything is quantized on the fly, so there is nothing to calibrate: each query and each key has its own scale (symmetric, within a head),
//! each column of the values one over the tokens. Scores are exact integer sums; a softmax weight is a power of two in steps of 1/32 octave,
//! looked up in a table of 256 bytes, and the weights are divided by the sum of what was looked up, so they sum to one. Float arithmetic is the
//! same sequence of single operations everywhere: all instruction sets give the same result, to the bit.

#[cfg(target_arch = "aarch64")]
mod arm;
#[cfg(target_arch = "x86_64")]
mod avx_vnni;

use super::aligned::Aligned;
use super::attention::Rows;
use super::isa::Isa;

/// Score of a forbidden pair: far enough below any other that its weight is zero.
const FORBIDDEN: f32 = -1e30;
/// Steps of the table to a factor of two.
const STEPS_AN_OCTAVE: f32 = 32.0;
/// Step of the largest weight.
const TOP: f32 = 255.0;
/// Largest magnitude of a signed value.
const SIGNED: f32 = 127.0;
/// What is added to a query's signed bytes to make them unsigned, as the dot product of x86 wants its left side.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
const SHIFT: i32 = 128;
/// Tokens whose scores one tile holds.
const PANEL: usize = 32;
/// Tokens whose weights are looked up together.
const LOOKED_UP: usize = 64;
/// Queries of a tile.
const QUERIES: usize = 12;
/// Largest number of tokens for which a sum of weights times values cannot overflow: 2^31 / (255 * 127).
const MAX_TOKENS: usize = 66_000;

/// Weight of each step below the largest score.
static WEIGHTS: std::sync::LazyLock<[u8; 256]> = std::sync::LazyLock::new(|| {
    let mut table = [0; 256];
    // Step 0 is all that is smaller.
    for (step, weight) in table.iter_mut().enumerate().skip(1) {
        *weight = (f64::from(TOP) * ((step as f64 - f64::from(TOP)) / f64::from(STEPS_AN_OCTAVE)).exp2()).round() as u8;
    }
    table
});

/// Shape of an attention.
#[derive(Clone, Debug)]
pub struct Attention8 {
    grid: [usize; 2],
    heads: usize,
    head_width: usize,
    window: usize,
    isa: Isa,
    /// By query and group of 16 tokens: bit set where the query may attend. Tokens beyond the grid are never set.
    allowed: Vec<u16>,
}

/// What a run works in; made for one shape, reused from run to run.
#[derive(Clone, Debug)]
pub struct AttentionScratch8 {
    /// Packed for the instruction set, or `[tokens, head_width]`.
    keys: Aligned<i8>,
    /// By token: where its score's sum starts.
    offsets: Vec<i32>,
    /// By token.
    key_scale: Vec<f32>,
    values: Aligned<i8>,
    /// By column of the head.
    value_scale: Vec<f32>,
    /// By column of the head, of the values' bytes; for aarch64.
    value_sums: Vec<i32>,
    queries: Aligned<u8>,
    scores: Aligned<f32>,
    weights: Aligned<u8>,
}

impl AttentionScratch8 {
    /// Bytes it takes.
    pub fn bytes(&self) -> usize {
        self.keys.len()
            + self.values.len()
            + self.queries.len()
            + self.weights.len()
            + 4 * (self.offsets.len() + self.key_scale.len() + self.value_scale.len() + self.value_sums.len() + self.scores.len())
    }
}

impl Attention8 {
    /// Whether it is faster than [`super::attention::Attention`] on this instruction set and machine.
    pub fn pays(isa: Isa) -> bool {
        #[cfg(target_arch = "x86_64")]
        {
            // The table look-up of AVX-512 is VBMI's; CPUs with VNNI but without it (Cascade Lake) stay in float.
            isa == Isa::AvxVnni || isa == Isa::Avx512Vnni && is_x86_feature_detected!("avx512vbmi")
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            matches!(isa, Isa::NeonDot | Isa::NeonI8mm)
        }
    }

    /// `grid` rows and columns of tokens, `window` the odd side of the neighbour mask or 0 for none.
    /// Each token needs one that it may attend to: otherwise what it sees is not defined.
    ///
    /// # Panics
    /// When `window` is even and not 0, there are more than 66 000 tokens (the sums could overflow), or the instruction set is not there.
    pub fn new(grid: [usize; 2], heads: usize, head_width: usize, window: usize, isa: Isa) -> Self {
        assert!(window == 0 || window % 2 == 1, "the neighbour mask is square and odd");
        assert!(isa.available(), "{} is not available here", isa.name());
        let tokens = grid[0] * grid[1];
        assert!(tokens <= MAX_TOKENS, "an int8 attention of {tokens} tokens could overflow");
        let mut new = Self { grid, heads, head_width, window, isa, allowed: Vec::new() };
        let groups = tokens.next_multiple_of(PANEL) / 16;
        new.allowed = (0..tokens * groups)
            .map(|at| {
                let (i, first) = (at / groups, at % groups * 16);
                (0..16).filter(|bit| first + bit < tokens && !new.forbidden(i, first + bit)).fold(0, |bits, bit| bits | 1 << bit)
            })
            .collect();
        new
    }

    /// Tokens on the grid.
    pub fn tokens(&self) -> usize {
        self.grid[0] * self.grid[1]
    }

    /// Width of all heads together.
    pub fn width(&self) -> usize {
        self.heads * self.head_width
    }

    /// Whether another attention of these sizes can share scratch memory with this one.
    pub fn same_shape(&self, other: &Self) -> bool {
        (self.grid, self.heads, self.head_width, self.isa) == (other.grid, other.heads, other.head_width, other.isa)
    }

    /// May token `i` not attend to token `j`?
    pub fn forbidden(&self, i: usize, j: usize) -> bool {
        let cols = self.grid[1];
        let reach = self.window / 2;
        self.window > 0 && (i / cols).abs_diff(j / cols) <= reach && (i % cols).abs_diff(j % cols) <= reach
    }

    /// Scratch memory for this shape.
    pub fn scratch(&self) -> AttentionScratch8 {
        let (tokens, depth, wide) =
            (self.tokens().next_multiple_of(LOOKED_UP), self.head_width.next_multiple_of(8), self.head_width.next_multiple_of(16));
        // What lies beyond the last panel is never written and must not win.
        let mut scores = Aligned::zeroed(QUERIES * tokens);
        scores.fill(FORBIDDEN);
        AttentionScratch8 {
            keys: Aligned::zeroed(tokens * depth),
            offsets: vec![0; tokens],
            key_scale: vec![0.0; tokens],
            values: Aligned::zeroed(tokens * wide),
            value_scale: vec![0.0; wide],
            value_sums: vec![0; wide],
            // Quantizing stores whole vectors.
            queries: Aligned::zeroed(QUERIES * depth + 64),
            scores,
            weights: Aligned::zeroed(QUERIES * tokens),
        }
    }

    /// `q`, `k`, `v` are `[tokens, heads * head_width]` row-major with the given row strides; `scale` multiplies the scores. `out` takes the rows of
    /// the queries from `first` on, as many as it has room for, so that threads can share the queries of one attention. Allocates nothing. A
    /// query that is not finite gives a row of NaN, a key or value that is not gives NaN in the whole head.
    ///
    /// # Panics
    /// When a slice is too short for its stride, `out` is no whole rows or more than are left, or the scratch memory is another shape's.
    #[allow(clippy::too_many_arguments)]
    pub fn run(&self, q: Rows<'_>, k: Rows<'_>, v: Rows<'_>, scale: f32, first: usize, out: &mut [f32], scratch: &mut AttentionScratch8) {
        let (tokens, width) = (self.tokens(), self.width());
        let count = out.len().checked_div(width).unwrap_or(0);
        assert!(out.len() == count * width && first + count <= tokens, "output of an attention");
        for rows in [&q, &k, &v] {
            assert!(
                rows.stride >= width && (tokens == 0 || rows.values.len() >= (tokens - 1) * rows.stride + width),
                "input of an attention"
            );
        }
        let padded = tokens.next_multiple_of(LOOKED_UP);
        assert!(
            scratch.key_scale.len() == padded
                && scratch.keys.len() == padded * self.head_width.next_multiple_of(8)
                && scratch.values.len() == padded * self.head_width.next_multiple_of(16),
            "scratch of an attention"
        );
        for head in 0..self.heads {
            let at = head * self.head_width;
            match self.isa {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: `new` checked the instruction set, `pays` VBMI, the asserts above the lengths.
                Isa::Avx512Vnni if Self::pays(self.isa) => unsafe { x86::head(self, [q, k, v], scale, at, first, out, scratch) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: as above.
                Isa::AvxVnni => unsafe { avx_vnni::head(self, [q, k, v], scale, at, first, out, scratch) },
                #[cfg(target_arch = "aarch64")]
                // SAFETY: as above.
                Isa::Neon => unsafe { arm::neon(self, [q, k, v], scale, at, first, out, scratch) },
                #[cfg(target_arch = "aarch64")]
                // SAFETY: as above.
                Isa::NeonDot => unsafe { arm::dot(self, [q, k, v], scale, at, first, out, scratch) },
                #[cfg(target_arch = "aarch64")]
                // SAFETY: as above.
                Isa::NeonI8mm => unsafe { arm::i8mm(self, [q, k, v], scale, at, first, out, scratch) },
                _ => self.head_generic([q, k, v], scale, at, first, out, scratch),
            }
        }
    }

    fn head_generic(
        &self,
        [q, k, v]: [Rows<'_>; 3],
        scale: f32,
        at: usize,
        first: usize,
        out: &mut [f32],
        scratch: &mut AttentionScratch8,
    ) {
        let (tokens, width, hw) = (self.tokens(), self.width(), self.head_width);
        let s = scratch;
        let factor = steps_a_score(scale);
        let mut poison = 0.0f32;
        for j in 0..tokens {
            let row = &k.values[j * k.stride + at..][..hw];
            let (inverse, size, bad) = symmetric(row.iter().fold(0.0, |a, x| x.abs().max(a)), row.iter().all(|x| x.is_finite()));
            row.iter().zip(&mut s.keys[j * hw..]).for_each(|(x, byte)| *byte = (x * inverse).round_ties_even() as i8);
            s.key_scale[j] = size * factor;
            poison += bad;
        }
        for d in 0..hw {
            let column = || (0..tokens).map(|j| v.values[j * v.stride + at + d]);
            let (inverse, size, bad) = symmetric(column().fold(0.0, |a, x| x.abs().max(a)), column().all(f32::is_finite));
            column().enumerate().for_each(|(j, x)| s.values[j * hw + d] = (x * inverse).round_ties_even() as i8);
            s.value_scale[d] = size;
            poison += bad;
        }
        for (i, line) in out.chunks_exact_mut(width.max(1)).enumerate() {
            let i = first + i;
            let row = &q.values[i * q.stride + at..][..hw];
            let (inverse, size, bad) = symmetric(row.iter().fold(0.0, |a, x| x.abs().max(a)), row.iter().all(|x| x.is_finite()));
            let mut largest = FORBIDDEN;
            for j in 0..tokens {
                let key = &s.keys[j * hw..][..hw];
                let sum: i32 = row.iter().zip(key).map(|(x, &y)| (x * inverse).round_ties_even() as i32 * i32::from(y)).sum();
                s.scores[j] = if self.forbidden(i, j) { FORBIDDEN } else { sum as f32 * s.key_scale[j] * size };
                largest = largest.max(s.scores[j]);
            }
            let mut total = 0u32;
            for j in 0..tokens {
                let step = ((s.scores[j] - largest) + TOP).round_ties_even() as i32;
                s.weights[j] = WEIGHTS[step.clamp(0, 255) as usize];
                total += u32::from(s.weights[j]);
            }
            let share = 1.0 / total as f32;
            for (d, y) in line[at..at + hw].iter_mut().enumerate() {
                let sum: i32 = (0..tokens).map(|j| i32::from(s.weights[j]) * i32::from(s.values[j * hw + d])).sum();
                *y = sum as f32 * s.value_scale[d] * share + (poison + bad);
            }
        }
    }
}

/// What multiplies a product of a query and a key so that it becomes steps of the table.
fn steps_a_score(scale: f32) -> f32 {
    scale * std::f32::consts::LOG2_E * STEPS_AN_OCTAVE
}

/// For values up to `largest` in magnitude: the factor to steps, the size of a step, and what to add to results (NaN unless all are finite).
fn symmetric(largest: f32, finite: bool) -> (f32, f32, f32) {
    if !finite {
        (0.0, 0.0, f32::NAN)
    } else if largest < f32::MIN_POSITIVE * 256.0 {
        // The inverse of so little could overflow.
        (0.0, 0.0, 0.0)
    } else {
        (SIGNED / largest, largest / SIGNED, 0.0)
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::super::vnni::{dot, lanes};
    use super::{Attention8, AttentionScratch8, FORBIDDEN, LOOKED_UP, PANEL, QUERIES, Rows, SHIFT, TOP, WEIGHTS, steps_a_score, symmetric};
    use std::arch::x86_64::*;

    /// The head that starts at column `at`: keys and values packed, then queries `first..` as many as `out` has rows.
    ///
    /// # Safety
    /// AVX-512 F, BW, VNNI and VBMI must be there; lengths as `Attention8::run` checks them.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx512vbmi")]
    pub(super) unsafe fn head(
        a: &Attention8,
        [q, k, v]: [Rows<'_>; 3],
        scale: f32,
        at: usize,
        first: usize,
        out: &mut [f32],
        scratch: &mut AttentionScratch8,
    ) {
        let count = out.len() / a.width().max(1);
        // SAFETY: this function's contract; query blocks end at or before `count`.
        unsafe {
            let mut poison = keys(a, k, scale, at, scratch);
            poison += values(a, v, at, scratch);
            let mut i = 0;
            while i + QUERIES <= count {
                queries::<QUERIES>(a, q, at, first, i, poison, out.as_mut_ptr(), scratch);
                i += QUERIES;
            }
            while i + 4 <= count {
                queries::<4>(a, q, at, first, i, poison, out.as_mut_ptr(), scratch);
                i += 4;
            }
            while i < count {
                queries::<1>(a, q, at, first, i, poison, out.as_mut_ptr(), scratch);
                i += 1;
            }
        }
    }

    /// One row of `len` values to signed bytes plus `shift` at `to` (written in whole vectors of 16 bytes): size of a step, poison.
    ///
    /// # Safety
    /// AVX-512 F and BW must be there; `len` values at `row`, room for `len` rounded up to 16 at `to`.
    #[inline(always)]
    unsafe fn quantize(row: *const f32, len: usize, shift: i32, to: *mut u8) -> (f32, f32) {
        // SAFETY: this function's contract; loads past the row's end are masked off.
        unsafe {
            let (mut most, mut bad) = (_mm512_setzero_ps(), _mm512_setzero_ps());
            let mut d = 0;
            while d < len {
                let x = _mm512_maskz_loadu_ps(lanes(len.saturating_sub(d)), row.add(d));
                most = _mm512_max_ps(most, _mm512_abs_ps(x));
                // 0 for a number, NaN for infinity and NaN, which stays in the sum.
                bad = _mm512_add_ps(bad, _mm512_sub_ps(x, x));
                d += 16;
            }
            let finite = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(bad, bad) == 0;
            let (inverse, size, poison) = symmetric(_mm512_reduce_max_ps(most), finite);
            let (inverse, shift) = (_mm512_set1_ps(inverse), _mm512_set1_epi32(shift));
            d = 0;
            while d < len {
                let x = _mm512_maskz_loadu_ps(lanes(len.saturating_sub(d)), row.add(d));
                // A value that is not finite times an inverse of 0 is NaN and becomes some byte: the poison tells.
                let step = _mm512_add_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(x, inverse)), shift);
                _mm_storeu_si128(to.add(d).cast(), _mm512_cvtepi32_epi8(step));
                d += 16;
            }
            (size, poison)
        }
    }

    /// Keys to panels `[tokens / 32][depth / 4][32][4]`, their scales, and what the queries' shift adds to the sums, negated.
    ///
    /// # Safety
    /// As [`head`].
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx512vbmi")]
    unsafe fn keys(a: &Attention8, k: Rows<'_>, scale: f32, at: usize, s: &mut AttentionScratch8) -> f32 {
        let (tokens, hw) = (a.tokens(), a.head_width);
        let steps = hw.div_ceil(4);
        let factor = steps_a_score(scale);
        let mut poison = 0.0;
        // SAFETY: the row lies within `k`; dwords end within the panel of the token, `keys` holds whole panels.
        unsafe {
            let packed = s.keys.as_mut_ptr();
            let bytes = s.queries.as_mut_ptr();
            for j in 0..tokens {
                let (size, bad) = quantize(k.values.as_ptr().add(j * k.stride + at), hw, 0, bytes);
                poison += bad;
                *s.key_scale.as_mut_ptr().add(j) = size * factor;
                let to = packed.add((j / PANEL * steps * PANEL + j % PANEL) * 4).cast::<i32>();
                for step in 0..steps {
                    // Past the head's width the quantizer wrote zeros (masked loads, no shift).
                    to.add(step * PANEL).write_unaligned(bytes.add(step * 4).cast::<i32>().read_unaligned());
                }
            }
            let shift = _mm512_set1_epi8(SHIFT as i8);
            for group in 0..tokens.div_ceil(16) {
                let mut sum = _mm512_setzero_si512();
                let mut from = packed.add((group / 2 * steps * PANEL + group % 2 * 16) * 4);
                for _ in 0..steps {
                    sum = _mm512_dpbusd_epi32(sum, shift, _mm512_loadu_si512(from.cast()));
                    from = from.add(PANEL * 4);
                }
                _mm512_storeu_si512(s.offsets.as_mut_ptr().add(group * 16).cast(), _mm512_sub_epi32(_mm512_setzero_si512(), sum));
            }
        }
        poison
    }

    /// Values to `[tokens / 4][width rounded up to 16][4]` and the scale of each column.
    ///
    /// # Safety
    /// As [`head`].
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx512vbmi")]
    unsafe fn values(a: &Attention8, v: Rows<'_>, at: usize, s: &mut AttentionScratch8) -> f32 {
        let (tokens, hw) = (a.tokens(), a.head_width);
        let wide = hw.next_multiple_of(16);
        let low = _mm512_set1_epi32(0xff);
        let mut finite = true;
        let mut d = 0;
        while d < hw {
            let mask = lanes(hw.saturating_sub(d));
            // SAFETY: loads past a row's end are masked off; `values` holds whole quads of whole vectors.
            unsafe {
                let column = v.values.as_ptr().add(at + d);
                let load = |j: usize| if j < tokens { _mm512_maskz_loadu_ps(mask, column.add(j * v.stride)) } else { _mm512_setzero_ps() };
                let (mut most, mut bad) = (_mm512_setzero_ps(), _mm512_setzero_ps());
                for j in 0..tokens {
                    let x = load(j);
                    most = _mm512_max_ps(most, _mm512_abs_ps(x));
                    bad = _mm512_add_ps(bad, _mm512_sub_ps(x, x));
                }
                finite &= _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(bad, bad) == 0;
                // As `symmetric`, lane by lane; columns that are not finite may become anything.
                let enough = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(most, _mm512_set1_ps(f32::MIN_POSITIVE * 256.0));
                let signed = _mm512_set1_ps(super::SIGNED);
                let inverse = _mm512_maskz_div_ps(enough, signed, most);
                _mm512_storeu_ps(s.value_scale.as_mut_ptr().add(d), _mm512_maskz_div_ps(enough, most, signed));
                for quad in 0..tokens.div_ceil(4) {
                    let byte = |j: usize| _mm512_and_si512(_mm512_cvtps_epi32(_mm512_mul_ps(load(quad * 4 + j), inverse)), low);
                    let pair = |j: usize| _mm512_or_si512(byte(j), _mm512_slli_epi32::<8>(byte(j + 1)));
                    let all = _mm512_or_si512(pair(0), _mm512_slli_epi32::<16>(pair(2)));
                    _mm512_storeu_si512(s.values.as_mut_ptr().add((quad * wide + d) * 4).cast(), all);
                }
            }
            d += 16;
        }
        if finite { 0.0 } else { f32::NAN }
    }

    /// Queries `first + i..first + i + R`, to rows `i..i + R` of `out`.
    ///
    /// # Safety
    /// As [`head`]; the keys and values of the head are packed in `s`, the queries lie on the grid and their rows within `out`.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx512vbmi")]
    #[allow(clippy::too_many_arguments)]
    unsafe fn queries<const R: usize>(
        a: &Attention8,
        q: Rows<'_>,
        at: usize,
        first: usize,
        i: usize,
        poison: f32,
        out: *mut f32,
        s: &mut AttentionScratch8,
    ) {
        let (tokens, hw, width) = (a.tokens(), a.head_width, a.width());
        let (steps, depth, wide) = (hw.div_ceil(4), hw.next_multiple_of(4), hw.next_multiple_of(16));
        let (panels, padded) = (tokens.div_ceil(PANEL), tokens.next_multiple_of(LOOKED_UP));
        // SAFETY: this function's contract; scratch memory is the shape's (checked by `run`): QUERIES rows of `padded`, whole panels and quads.
        unsafe {
            let (mut size, mut bad) = ([0.0f32; R], [0.0f32; R]);
            for r in 0..R {
                let row = q.values.as_ptr().add((first + i + r) * q.stride + at);
                // In order: what a row writes past its end the next one overwrites. Keys are zero there.
                (size[r], bad[r]) = quantize(row, hw, SHIFT, s.queries.as_mut_ptr().add(r * depth));
            }
            let scores = s.scores.as_mut_ptr();
            let forbidden = _mm512_set1_ps(FORBIDDEN);
            let mut most = [forbidden; R];
            for panel in 0..panels {
                let offsets = s.offsets.as_ptr().add(panel * PANEL);
                let start = [_mm512_loadu_si512(offsets.cast()), _mm512_loadu_si512(offsets.add(16).cast())];
                let mut sums = [start; R];
                dot(&mut sums, s.queries.as_ptr(), depth, s.keys.as_ptr().add(panel * PANEL * depth), PANEL * 4, steps);
                let scale = s.key_scale.as_ptr().add(panel * PANEL);
                let scale = [_mm512_loadu_ps(scale), _mm512_loadu_ps(scale.add(16))];
                for r in 0..R {
                    let allowed = a.allowed.as_ptr().add((first + i + r) * panels * 2 + panel * 2);
                    let own = _mm512_set1_ps(size[r]);
                    for half in 0..2 {
                        let score = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[r][half]), scale[half]);
                        let score = _mm512_mask_mul_ps(forbidden, *allowed.add(half), score, own);
                        most[r] = _mm512_max_ps(most[r], score);
                        _mm512_storeu_ps(scores.add(r * padded + panel * PANEL + half * 16), score);
                    }
                }
            }
            let table = WEIGHTS.as_ptr();
            let table: [__m512i; 4] = std::array::from_fn(|part| _mm512_loadu_si512(table.add(part * 64).cast()));
            // What the packs leave in the order 0 4 8 12, 1 5 9 13, ...
            let order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
            let top = _mm512_set1_ps(TOP);
            let mut share = [0.0f32; R];
            for (r, share) in share.iter_mut().enumerate() {
                let largest = _mm512_set1_ps(_mm512_reduce_max_ps(most[r]));
                let mut total = _mm512_setzero_si512();
                let mut c = 0;
                while c < padded {
                    let step = |part: usize| {
                        let score = _mm512_loadu_ps(scores.add(r * padded + c + part * 16));
                        _mm512_cvtps_epi32(_mm512_add_ps(_mm512_sub_ps(score, largest), top))
                    };
                    // Packing saturates to 0..=255 on the way.
                    let step = _mm512_packus_epi16(_mm512_packs_epi32(step(0), step(1)), _mm512_packs_epi32(step(2), step(3)));
                    let step = _mm512_permutexvar_epi32(order, step);
                    let lower = _mm512_permutex2var_epi8(table[0], step, table[1]);
                    let upper = _mm512_permutex2var_epi8(table[2], step, table[3]);
                    let weight = _mm512_mask_mov_epi8(lower, _mm512_movepi8_mask(step), upper);
                    total = _mm512_dpbusd_epi32(total, weight, _mm512_set1_epi8(1));
                    _mm512_storeu_si512(s.weights.as_mut_ptr().add(r * padded + c).cast(), weight);
                    c += LOOKED_UP;
                }
                *share = 1.0 / _mm512_reduce_add_epi32(total) as f32;
            }
            let quads = tokens.div_ceil(4);
            let mut d = 0;
            while d < hw {
                let columns = s.values.as_ptr().add(d * 4);
                if d + 16 < hw {
                    let mut sums = [[_mm512_setzero_si512(); 2]; R];
                    dot(&mut sums, s.weights.as_ptr(), padded, columns, wide * 4, quads);
                    for half in 0..2 {
                        let column = d + half * 16;
                        let scale = _mm512_loadu_ps(s.value_scale.as_ptr().add(column));
                        for (r, row) in sums.iter().enumerate() {
                            let y = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(row[half]), scale), _mm512_set1_ps(share[r]));
                            let y = _mm512_add_ps(y, _mm512_set1_ps(poison + bad[r]));
                            _mm512_mask_storeu_ps(out.add((i + r) * width + at + column), lanes(hw.saturating_sub(column)), y);
                        }
                    }
                } else {
                    let mut sums = [[_mm512_setzero_si512(); 1]; R];
                    dot(&mut sums, s.weights.as_ptr(), padded, columns, wide * 4, quads);
                    let scale = _mm512_loadu_ps(s.value_scale.as_ptr().add(d));
                    for r in 0..R {
                        let y = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sums[r][0]), scale), _mm512_set1_ps(share[r]));
                        let y = _mm512_add_ps(y, _mm512_set1_ps(poison + bad[r]));
                        _mm512_mask_storeu_ps(out.add((i + r) * width + at + d), lanes(hw.saturating_sub(d)), y);
                    }
                }
                d += 32;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::attention::Attention;
    use super::super::testing::wide_values as values;
    use super::*;
    use proptest::prelude::*;

    fn check(grid: [usize; 2], heads: usize, head_width: usize, window: usize, seed: u64) {
        let (tokens, width) = (grid[0] * grid[1], heads * head_width);
        let stride = 3 * width + 1;
        let all = values(tokens * stride, seed);
        let part = |i: usize| Rows { values: &all[i * width..], stride };
        let oracle = Attention8::new(grid, heads, head_width, window, Isa::Generic);
        let mut wanted = vec![0.0; tokens * width];
        oracle.run(part(0), part(1), part(2), 0.3, 0, &mut wanted, &mut oracle.scratch());
        for isa in Isa::all_available() {
            let attention = Attention8::new(grid, heads, head_width, window, isa);
            let mut scratch = attention.scratch();
            // Whole, then in two parts, which also must not depend on what the first run left in the scratch memory.
            for split in [tokens, tokens / 3] {
                let mut got = vec![f32::NAN; tokens * width];
                let (first, second) = got.split_at_mut(split * width);
                attention.run(part(0), part(1), part(2), 0.3, 0, first, &mut scratch);
                attention.run(part(0), part(1), part(2), 0.3, split, second, &mut scratch);
                assert_eq!(got, wanted, "{} grid {grid:?} heads {heads}x{head_width} window {window}", isa.name());
            }
        }
        let mut float = vec![0.0; tokens * width];
        Attention::new(grid, heads, head_width, window, Isa::Generic).run(part(0), part(1), part(2), 0.3, &mut float);
        // Values reach 2, scores differ by up to 15: weights below 1/510 of the largest are dropped, some hundredths of a sum in all.
        let largest = wanted.iter().zip(&float).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(largest < 0.2, "against float: {largest}");
        let mean = wanted.iter().zip(&float).map(|(a, b)| (a - b).abs()).sum::<f32>() / wanted.len().max(1) as f32;
        assert!(mean < 0.015, "against float: mean {mean}");
    }

    #[test]
    fn the_sizes_of_the_model_agree_to_the_bit() {
        check([14, 14], 8, 32, 7, 3);
        check([14, 14], 8, 16, 7, 4);
        check([14, 14], 4, 32, 0, 5);
        check([5, 13], 1, 40, 3, 6);
    }

    #[test]
    fn a_query_never_sees_its_neighbours() {
        for isa in Isa::all_available() {
            let attention = Attention8::new([14, 14], 1, 8, 7, isa);
            let mut scratch = attention.scratch();
            let (q, mut k) = (values(196 * 8, 1), values(196 * 8, 2));
            fn rows(values: &[f32]) -> Rows<'_> {
                Rows { values, stride: 8 }
            }
            let mut first = vec![0.0; 196 * 8];
            attention.run(rows(&q), rows(&k), rows(&q), 1.0, 0, &mut first, &mut scratch);
            let (query, neighbour) = (7 * 14 + 7, 4 * 14 + 10);
            assert!(attention.forbidden(query, neighbour));
            // A key that would take all weight must not move the output.
            k[neighbour * 8..neighbour * 8 + 8].fill(1e6);
            let mut second = vec![0.0; 196 * 8];
            attention.run(rows(&q), rows(&k), rows(&q), 1.0, 0, &mut second, &mut scratch);
            assert_eq!(first[query * 8..query * 8 + 8], second[query * 8..query * 8 + 8], "{}", isa.name());
            assert_ne!(first, second);
        }
    }

    #[test]
    fn not_a_number_reaches_the_output_and_leaves_with_the_next_run() {
        for isa in Isa::all_available() {
            let attention = Attention8::new([4, 5], 2, 4, 3, isa);
            let mut scratch = attention.scratch();
            let good = values(160, 1);
            for (which, bad) in [(0, f32::NAN), (1, f32::INFINITY), (2, f32::NEG_INFINITY), (2, f32::NAN)] {
                let mut parts = [good.clone(), good.clone(), good.clone()];
                // Token 1, head 0.
                parts[which][8 + 2] = bad;
                let mut out = vec![0.0; 160];
                let rows = |i: usize| Rows { values: &parts[i], stride: 8 };
                attention.run(rows(0), rows(1), rows(2), 1.0, 0, &mut out, &mut scratch);
                for (i, row) in out.chunks_exact(8).enumerate() {
                    let expected = which > 0 || i == 1;
                    assert!(
                        row[..4].iter().all(|x| x.is_nan() == expected) && row[4..].iter().all(|x| x.is_finite()),
                        "{} {which}",
                        isa.name()
                    );
                }
            }
            let mut out = vec![0.0; 160];
            let rows = || Rows { values: &good, stride: 8 };
            attention.run(rows(), rows(), rows(), 1.0, 0, &mut out, &mut scratch);
            assert!(out.iter().all(|x| x.is_finite()));
        }
    }

    #[test]
    fn zeros_and_tiny_values_are_no_fault() {
        for isa in Isa::all_available() {
            let attention = Attention8::new([3, 3], 1, 5, 0, isa);
            for x in [0.0, f32::MIN_POSITIVE, 1e-44] {
                let same = [x; 45];
                let rows = || Rows { values: &same, stride: 5 };
                let mut out = vec![f32::NAN; 45];
                attention.run(rows(), rows(), rows(), 1.0, 0, &mut out, &mut attention.scratch());
                assert!(out.iter().all(|&y| y == 0.0), "{} {x}", isa.name());
            }
        }
    }

    proptest! {
        #[test]
        fn any_shape_agrees_to_the_bit(rows in 1usize..10, cols in 1usize..10, heads in 1usize..4, width in 1usize..70, window in 0usize..3, seed: u64) {
            // A window that hides every token from some query has no defined result: the model's configuration refuses it.
            let window = if window == 0 { 0 } else { 2 * window - 1 };
            prop_assume!(window == 0 || window / 2 < rows.max(cols) / 2);
            check([rows, cols], heads, width, window, seed >> 8);
        }
    }
}
