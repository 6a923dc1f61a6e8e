//! Fused neighbour-masked attention (paper, section 3.2): softmax(q k^T + mask) v per head, without ever holding the score matrix or the mask.
//!
//! A head's keys (transposed) and values are packed once and stay in L1/L2 (50 KB at 196 tokens of width 32); scores exist for a dozen queries at
//! a time. The mask is arithmetic: token i may not attend to token j when |row_i - row_j| and |col_i - col_j| are both at most `window / 2`.

use super::aligned::Aligned;
use super::isa::Isa;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use super::simd::F32s;
#[cfg(target_arch = "aarch64")]
use super::simd::arm::Neon;
#[cfg(target_arch = "x86_64")]
use super::simd::x86::{Avx2, Avx512};
use std::sync::Arc;

/// Score of a forbidden pair: its exponential is zero beside any real score.
const FORBIDDEN: f32 = -1e30;
/// Most values of a mask that is added from memory: half a megabyte, a part of L2.
const MASK_IN_CACHE: usize = 1 << 17;

/// Shape of an attention and the scratch memory it reuses.
#[derive(Clone, Debug)]
pub struct Attention {
    grid: [usize; 2],
    heads: usize,
    head_width: usize,
    window: usize,
    isa: Isa,
    /// What is added to a query's scores, by query and padded token: 0 or [`FORBIDDEN`]. One row for all where there is no window; none at all
    /// where it would not stay in the cache.
    mask: Arc<[f32]>,
    keys: Aligned<f32>,
    values: Aligned<f32>,
    scores: Aligned<f32>,
}

impl Attention {
    /// `grid` rows and columns of tokens, `window` the odd side of the neighbour mask or 0 for none. All scratch memory is allocated here.
    /// Each token needs one that it may attend to: otherwise what it sees is not defined.
    ///
    /// # Panics
    /// When `window` is even and not 0, or the instruction set is not there.
    pub fn new(grid: [usize; 2], heads: usize, head_width: usize, window: usize, isa: Isa) -> Self {
        assert!(window == 0 || window % 2 == 1, "the neighbour mask is square and odd");
        assert!(isa.available(), "{} is not available here", isa.name());
        let tokens = grid[0] * grid[1];
        let (lanes, rows) = tile(isa);
        let padded = tokens.next_multiple_of(2 * lanes);
        let width = head_width.next_multiple_of(lanes);
        let mut new = Self {
            grid,
            heads,
            head_width,
            window,
            isa,
            mask: Arc::new([]),
            keys: Aligned::zeroed(head_width * padded),
            values: Aligned::zeroed(tokens * width),
            scores: Aligned::zeroed(rows * padded),
        };
        let masked = if window > 0 { tokens } else { 1 };
        if masked * padded <= MASK_IN_CACHE {
            let hidden = |at: usize| at % padded >= tokens || new.forbidden(at / padded, at % padded);
            new.mask = (0..masked * padded).map(|at| if hidden(at) { FORBIDDEN } else { 0.0 }).collect();
        }
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

    /// Whether another attention differs in nothing but its inputs.
    pub fn same_shape(&self, other: &Self) -> bool {
        (self.grid, self.heads, self.head_width, self.window, self.isa)
            == (other.grid, other.heads, other.head_width, other.window, other.isa)
    }

    /// `q`, `k`, `v`, `out` are `[tokens, heads * head_width]` row-major with the given row strides (so that q, k, v may be columns of one wider
    /// matrix); `scale` multiplies the scores. Allocates nothing.
    ///
    /// # Panics
    /// When a slice is too short for its stride.
    pub fn run(&mut self, q: Rows<'_>, k: Rows<'_>, v: Rows<'_>, scale: f32, out: &mut [f32]) {
        assert_eq!(out.len(), self.tokens() * self.width(), "output of an attention");
        self.run_queries(q, k, v, scale, 0, out);
    }

    /// As [`Attention::run`] for some queries: `out` takes the rows of those from `first` on, as many as it has room for, so that threads can share
    /// one attention, each with a clone of this value; keys and values are packed by each of them.
    ///
    /// # Panics
    /// When a slice is too short for its stride, or `out` is no whole rows or more than are left.
    pub fn run_queries(&mut self, q: Rows<'_>, k: Rows<'_>, v: Rows<'_>, scale: f32, first: usize, out: &mut [f32]) {
        let (tokens, width) = (self.tokens(), self.width());
        let count = out.len().checked_div(width).unwrap_or(0);
        assert!(out.len() == count * width && first + count <= tokens, "output of an attention");
        for rows in [&q, &k, &v] {
            assert!(
                rows.stride >= width && (tokens == 0 || rows.values.len() >= (tokens - 1) * rows.stride + width),
                "input of an attention"
            );
        }
        match self.isa.float() {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `new` checked the instruction set, the asserts above the lengths.
            Isa::Avx512 => unsafe { avx512(self, q, k, v, scale, first, out) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Isa::Avx2 => unsafe { avx2(self, q, k, v, scale, first, out) },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: every aarch64 has NEON; lengths as above.
            Isa::Neon => unsafe { neon(self, q, k, v, scale, first, out) },
            _ => self.run_generic(q, k, v, scale, first, out),
        }
    }

    /// May token `i` not attend to token `j`?
    pub fn forbidden(&self, i: usize, j: usize) -> bool {
        let cols = self.grid[1];
        let reach = self.window / 2;
        self.window > 0 && (i / cols).abs_diff(j / cols) <= reach && (i % cols).abs_diff(j % cols) <= reach
    }

    fn run_generic(&mut self, q: Rows<'_>, k: Rows<'_>, v: Rows<'_>, scale: f32, first: usize, out: &mut [f32]) {
        let (tokens, width, hw) = (self.tokens(), self.width(), self.head_width);
        let mut scores = std::mem::take(&mut self.scores);
        scores.grow(tokens);
        for head in 0..self.heads {
            let at = head * hw;
            for (i, line) in out.chunks_exact_mut(width.max(1)).enumerate() {
                let i = first + i;
                let query = &q.values[i * q.stride + at..][..hw];
                let mut largest = f32::NEG_INFINITY;
                for (j, s) in scores.iter_mut().take(tokens).enumerate() {
                    let key = &k.values[j * k.stride + at..][..hw];
                    *s = if self.forbidden(i, j) { FORBIDDEN } else { scale * query.iter().zip(key).map(|(a, b)| a * b).sum::<f32>() };
                    largest = if s.is_nan() { f32::NAN } else { largest.max(*s) };
                }
                let mut sum = 0.0;
                for s in scores.iter_mut().take(tokens) {
                    *s = (*s - largest).exp();
                    sum += *s;
                }
                let line = &mut line[at..][..hw];
                line.fill(0.0);
                for (j, s) in scores.iter().take(tokens).enumerate() {
                    for (y, x) in line.iter_mut().zip(&v.values[j * v.stride + at..][..hw]) {
                        *y += s / sum * x;
                    }
                }
            }
        }
        self.scores = scores;
    }
}

/// A matrix with a row stride.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    /// From the first value wanted.
    pub values: &'a [f32],
    /// Values from one row to the next.
    pub stride: usize,
}

/// Lanes and queries of a tile.
fn tile(isa: Isa) -> (usize, usize) {
    match isa.float() {
        Isa::Avx2 => (8, 6),
        Isa::Avx512 => (16, 12),
        Isa::Neon => (4, 8),
        _ => (1, 1),
    }
}

/// # Safety
/// AVX-512F must be there; lengths as `Attention::run_queries` checks them.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn avx512(a: &mut Attention, q: Rows<'_>, k: Rows<'_>, v: Rows<'_>, scale: f32, first: usize, out: &mut [f32]) {
    // SAFETY: this function's contract.
    unsafe { all::<Avx512, 12>(a, q, k, v, scale, first, out) }
}

/// # Safety
/// AVX2 and FMA must be there; lengths as `Attention::run_queries` checks them.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2(a: &mut Attention, q: Rows<'_>, k: Rows<'_>, v: Rows<'_>, scale: f32, first: usize, out: &mut [f32]) {
    // SAFETY: this function's contract.
    unsafe { all::<Avx2, 6>(a, q, k, v, scale, first, out) }
}

/// # Safety
/// Lengths as `Attention::run_queries` checks them.
#[cfg(target_arch = "aarch64")]
#[target_feature(enable = "neon")]
unsafe fn neon(a: &mut Attention, q: Rows<'_>, k: Rows<'_>, v: Rows<'_>, scale: f32, first: usize, out: &mut [f32]) {
    // SAFETY: this function's contract.
    unsafe { all::<Neon, 8>(a, q, k, v, scale, first, out) }
}

/// # Safety
/// `V`'s instruction set must be there and `a` made for it; lengths as `Attention::run_queries` checks them.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[inline(always)]
unsafe fn all<V: F32s, const ROWS: usize>(
    a: &mut Attention,
    q: Rows<'_>,
    k: Rows<'_>,
    v: Rows<'_>,
    scale: f32,
    first: usize,
    out: &mut [f32],
) {
    let (tokens, hw, width) = (a.tokens(), a.head_width, a.width());
    let padded = tokens.next_multiple_of(2 * V::LANES);
    let vw = hw.next_multiple_of(V::LANES);
    let end = first + out.len() / width.max(1);
    for head in 0..a.heads {
        let at = head * hw;
        for (j, row) in k.values.chunks(k.stride).take(tokens).enumerate() {
            for (d, x) in row[at..at + hw].iter().enumerate() {
                a.keys[d * padded + j] = *x;
            }
        }
        for (row, to) in v.values.chunks(v.stride).take(tokens).zip(a.values.chunks_exact_mut(vw)) {
            to[..hw].copy_from_slice(&row[at..at + hw]);
        }
        let mut i = first;
        // SAFETY: query blocks end at or before `end`, which lies within the grid; instruction set by this function's contract.
        unsafe {
            while i + ROWS <= end {
                queries::<V, ROWS>(a, q, scale, at, i, &mut out[(i - first) * width..]);
                i += ROWS;
            }
            while i + 4 <= end {
                queries::<V, 4>(a, q, scale, at, i, &mut out[(i - first) * width..]);
                i += 4;
            }
            while i < end {
                queries::<V, 1>(a, q, scale, at, i, &mut out[(i - first) * width..]);
                i += 1;
            }
        }
    }
}

/// Queries `first..first + ROWS` of the head that starts at column `at`, to the first rows of `out`.
///
/// # Safety
/// `V`'s instruction set must be there; `a`'s packed keys and values belong to this head; the queries lie within the grid; lengths as
/// `Attention::run_queries` checks them.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[inline(always)]
unsafe fn queries<V: F32s, const ROWS: usize>(a: &mut Attention, q: Rows<'_>, scale: f32, at: usize, first: usize, out: &mut [f32]) {
    let (tokens, hw) = (a.tokens(), a.head_width);
    let padded = tokens.next_multiple_of(2 * V::LANES);
    let vw = hw.next_multiple_of(V::LANES);
    let [grid_rows, grid_cols] = a.grid;
    let reach = a.window / 2;
    let scores = a.scores.as_mut_ptr();
    // SAFETY: `scores` holds ROWS x padded, `keys` head_width x padded, `values` tokens x vw (all from `new`); query rows checked by the caller.
    unsafe {
        let query = q.values.as_ptr().add(first * q.stride + at);
        let factor = V::splat(scale);
        let mask_stride = if a.window > 0 { padded } else { 0 };
        // Not read where there is none.
        let mask = a.mask.as_ptr().wrapping_add(first * mask_stride);
        let mut c = 0;
        while c < padded {
            let mut acc = [[V::splat(0.0); 2]; ROWS];
            let mut key = a.keys.as_ptr().add(c);
            let mut d = 0;
            while V::BY_FOUR && d + 4 <= hw {
                let mut x = [V::four(query.add(d)); ROWS];
                for (r, x) in x.iter_mut().enumerate().skip(1) {
                    *x = V::four(query.add(r * q.stride + d));
                }
                macro_rules! lane {
                    ($i:literal) => {
                        let (k0, k1) = (V::load(key.add($i * padded)), V::load(key.add($i * padded + V::LANES)));
                        for (sums, x) in acc.iter_mut().zip(x) {
                            *sums = [sums[0].fma_of::<$i>(x, k0), sums[1].fma_of::<$i>(x, k1)];
                        }
                    };
                }
                lane!(0);
                lane!(1);
                lane!(2);
                lane!(3);
                key = key.add(4 * padded);
                d += 4;
            }
            for d in d..hw {
                let k0 = V::load(key);
                let k1 = V::load(key.add(V::LANES));
                for (r, sums) in acc.iter_mut().enumerate() {
                    let x = V::splat(*query.add(r * q.stride + d));
                    sums[0] = sums[0].fma(x, k0);
                    sums[1] = sums[1].fma(x, k1);
                }
                key = key.add(padded);
            }
            if a.mask.is_empty() {
                for (r, sums) in acc.iter().enumerate() {
                    sums[0].mul(factor).store(scores.add(r * padded + c));
                    sums[1].mul(factor).store(scores.add(r * padded + c + V::LANES));
                }
            } else {
                // A score plus FORBIDDEN is FORBIDDEN, as near as makes no difference; a score plus 0 is itself.
                for (r, sums) in acc.iter().enumerate() {
                    let mask = mask.add(r * mask_stride + c);
                    sums[0].mul(factor).add(V::load(mask)).store(scores.add(r * padded + c));
                    sums[1].mul(factor).add(V::load(mask.add(V::LANES))).store(scores.add(r * padded + c + V::LANES));
                }
            }
            c += 2 * V::LANES;
        }
        let mut sums = [0.0f32; ROWS];
        for (r, sum) in sums.iter_mut().enumerate() {
            let line = scores.add(r * padded);
            if a.mask.is_empty() {
                for j in tokens..padded {
                    *line.add(j) = FORBIDDEN;
                }
            }
            if a.mask.is_empty() && a.window > 0 {
                let (row, col) = ((first + r) / grid_cols, (first + r) % grid_cols);
                let (c0, c1) = (col.saturating_sub(reach), (col + reach).min(grid_cols - 1));
                for hidden in row.saturating_sub(reach)..=(row + reach).min(grid_rows - 1) {
                    for j in c0..=c1 {
                        *line.add(hidden * grid_cols + j) = FORBIDDEN;
                    }
                }
            }
            let mut largest = V::load(line);
            let mut j = V::LANES;
            while j < padded {
                largest = largest.max(V::load(line.add(j)));
                j += V::LANES;
            }
            let largest = V::splat(largest.largest());
            let mut total = V::splat(0.0);
            j = 0;
            while j < padded {
                let x = V::load(line.add(j)).sub(largest);
                // `exp` clamps, which would hide a NaN: x - x is 0 for a number and NaN for NaN or infinity.
                let e = x.exp().add(x.sub(x));
                e.store(line.add(j));
                total = total.add(e);
                j += V::LANES;
            }
            *sum = total.sum();
        }
        let mut d = 0;
        while d < vw {
            if d + V::LANES < vw {
                mix::<V, ROWS, 2>(a, sums, at, d, out);
                d += 2 * V::LANES;
            } else {
                mix::<V, ROWS, 1>(a, sums, at, d, out);
                d += V::LANES;
            }
        }
    }
}

/// Values weighted with `ROWS` rows of scores that sum to `sums`: columns `d..d + VECTORS * LANES` of the head that starts at column `at`.
///
/// # Safety
/// As [`queries`]; the columns lie within the padded values.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[inline(always)]
unsafe fn mix<V: F32s, const ROWS: usize, const VECTORS: usize>(a: &Attention, sums: [f32; ROWS], at: usize, d: usize, out: &mut [f32]) {
    let (tokens, hw, width) = (a.tokens(), a.head_width, a.width());
    let padded = tokens.next_multiple_of(2 * V::LANES);
    let vw = hw.next_multiple_of(V::LANES);
    let scores = a.scores.as_ptr();
    // SAFETY: as in `queries`; what passes the head's end goes through a local buffer.
    unsafe {
        let mut acc = [[V::splat(0.0); VECTORS]; ROWS];
        let mut value = a.values.as_ptr().add(d);
        let mut j = 0;
        while V::BY_FOUR && j + 4 <= tokens {
            let mut x = [V::four(scores.add(j)); ROWS];
            for (r, x) in x.iter_mut().enumerate().skip(1) {
                *x = V::four(scores.add(r * padded + j));
            }
            macro_rules! lane {
                ($i:literal) => {
                    for v in 0..VECTORS {
                        let loaded = V::load(value.add($i * vw + v * V::LANES));
                        for (y, x) in acc.iter_mut().zip(x) {
                            y[v] = y[v].fma_of::<$i>(x, loaded);
                        }
                    }
                };
            }
            lane!(0);
            lane!(1);
            lane!(2);
            lane!(3);
            value = value.add(4 * vw);
            j += 4;
        }
        for j in j..tokens {
            let mut x = [V::load(value); VECTORS];
            for (v, x) in x.iter_mut().enumerate().skip(1) {
                *x = V::load(value.add(v * V::LANES));
            }
            for (r, y) in acc.iter_mut().enumerate() {
                let weight = V::splat(*scores.add(r * padded + j));
                for (y, x) in y.iter_mut().zip(x) {
                    *y = y.fma(weight, x);
                }
            }
            value = value.add(vw);
        }
        for (r, y) in acc.iter().enumerate() {
            let share = V::splat(1.0 / sums[r]);
            for (v, y) in y.iter().enumerate() {
                let (y, d) = (y.mul(share), d + v * V::LANES);
                let place = r * width + at + d;
                if d + V::LANES <= hw {
                    y.store(out.as_mut_ptr().add(place));
                } else {
                    let mut buffer = [0.0f32; 16];
                    y.store(buffer.as_mut_ptr());
                    out[place..place + hw - d].copy_from_slice(&buffer[..hw - d]);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::wide_values as values;
    use super::*;
    use proptest::prelude::*;

    fn check(grid: [usize; 2], heads: usize, head_width: usize, window: usize, seed: u64) {
        let tokens = grid[0] * grid[1];
        let width = heads * head_width;
        let stride = 3 * width + 1;
        let all = values(tokens * stride, seed);
        let part = |i: usize| Rows { values: &all[i * width..], stride };
        let mut wanted = vec![0.0; tokens * width];
        Attention::new(grid, heads, head_width, window, Isa::Generic).run(part(0), part(1), part(2), 0.3, &mut wanted);
        for isa in Isa::all_available() {
            let mut attention = Attention::new(grid, heads, head_width, window, isa);
            // Twice: the second run must not depend on what the first left in the scratch memory.
            for _ in 0..2 {
                let mut got = vec![f32::NAN; tokens * width];
                attention.run(part(0), part(1), part(2), 0.3, &mut got);
                let mut parts = vec![f32::NAN; tokens * width];
                let (upper, lower) = parts.split_at_mut(tokens / 3 * width);
                attention.run_queries(part(0), part(1), part(2), 0.3, tokens / 3, lower);
                attention.run_queries(part(0), part(1), part(2), 0.3, 0, upper);
                assert_eq!(got, parts, "{} in two parts, to the bit", isa.name());
                for (i, (x, y)) in got.iter().zip(&wanted).enumerate() {
                    assert!(
                        (x - y).abs() < 2e-5,
                        "{} grid {grid:?} heads {heads}x{head_width} window {window} at {i}: {x} {y}",
                        isa.name()
                    );
                }
            }
        }
    }

    #[test]
    fn the_sizes_of_the_model_agree_with_the_oracle() {
        check([14, 14], 8, 32, 7, 3);
        check([14, 14], 8, 16, 7, 4);
        check([14, 14], 4, 32, 0, 5);
    }

    #[test]
    fn a_query_never_sees_its_neighbours() {
        // Values mark their token: with one huge marker inside the window, the output must not move.
        for isa in Isa::all_available() {
            let mut attention = Attention::new([14, 14], 1, 8, 7, isa);
            let q = values(196 * 8, 1);
            let mut v = values(196 * 8, 2);
            let mut first = vec![0.0; 196 * 8];
            fn rows(values: &[f32]) -> Rows<'_> {
                Rows { values, stride: 8 }
            }
            attention.run(rows(&q), rows(&q), rows(&v), 1.0, &mut first);
            let (query, neighbour) = (7 * 14 + 7, 4 * 14 + 10);
            assert!(attention.forbidden(query, neighbour));
            v[neighbour * 8..neighbour * 8 + 8].fill(1e6);
            let mut second = vec![0.0; 196 * 8];
            attention.run(rows(&q), rows(&q), rows(&v), 1.0, &mut second);
            assert_eq!(first[query * 8..query * 8 + 8], second[query * 8..query * 8 + 8], "{}", isa.name());
        }
    }

    #[test]
    fn not_a_number_reaches_the_output() {
        for isa in Isa::all_available() {
            let mut attention = Attention::new([4, 4], 1, 4, 3, isa);
            let mut q = values(64, 1);
            q[5] = f32::NAN;
            let v = values(64, 2);
            let rows = |x| Rows { values: x, stride: 4 };
            let mut out = vec![0.0; 64];
            attention.run(rows(&q), rows(&v), rows(&v), 1.0, &mut out);
            assert!(out[4..8].iter().all(|x| x.is_nan()), "{}", isa.name());
        }
    }

    proptest! {
        #[test]
        fn any_shape_agrees_with_the_oracle(rows in 1usize..9, cols in 1usize..9, heads in 1usize..4, width in 1usize..40, window in 0usize..3, seed: u64) {
            // A window that hides every token from some query has no defined result: the model's configuration refuses it.
            let window = if window == 0 { 0 } else { 2 * window - 1 };
            prop_assume!(window == 0 || window / 2 < rows.max(cols) / 2);
            check([rows, cols], heads, width, window, seed >> 8);
        }
    }
}
