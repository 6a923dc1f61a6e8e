//! Fused neighbour-masked attention (paper, section 3.2): softmax(q k^T + mask) v per head, without ever holding the score matrix or the mask.
//!
//! A head's keys (transposed) and values are packed once and stay in L1/L2 (50 KB at 196 tokens of width 32); scores exist for a dozen queries at
//! a time. The mask is arithmetic: token i may not attend to token j when |row_i - row_j| and |col_i - col_j| are both at most `window / 2`.

use super::aligned::Aligned;
use super::isa::Isa;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use super::linear::sum_up;
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
    /// `[head width, padded tokens]`.
    keys: Aligned<f32>,
    /// `[tokens, padded head width]`.
    values: Aligned<f32>,
    /// Of the queries of one block, in tiles of a vector each: `[padded head width / lanes, queries, lanes]`.
    queries: Aligned<f32>,
    /// Scores and then weights of one block, in tiles of two vectors each: `[tiles, queries, 2 * lanes]`.
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
        let padded = tokens.next_multiple_of(lanes);
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
            queries: Aligned::zeroed(rows * width),
            scores: Aligned::zeroed(rows * tokens.next_multiple_of(2 * lanes)),
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
        Isa::Avx512 => (16, 14),
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
    unsafe { all::<Avx512, 14>(a, q, k, v, scale, first, out) }
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
    let padded = tokens.next_multiple_of(V::LANES);
    let vw = hw.next_multiple_of(V::LANES);
    let end = first + out.len() / width.max(1);
    for head in 0..a.heads {
        let at = head * hw;
        transpose(k, at, [tokens, hw], &mut a.keys, padded);
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

/// Columns `at..at + columns` of the first `rows` rows, transposed, to rows of `stride`.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[inline(always)]
fn transpose(from: Rows<'_>, at: usize, [rows, columns]: [usize; 2], to: &mut [f32], stride: usize) {
    let four = |row: usize, column: usize| -> [f32; 4] { std::array::from_fn(|c| from.values[row * from.stride + at + column + c]) };
    for row in (0..rows).step_by(4) {
        for column in (0..columns).step_by(4) {
            if row + 4 <= rows && column + 4 <= columns {
                // The compiler makes shuffles of this; one by one, a tenth of an attention's time went here.
                let x = [four(row, column), four(row + 1, column), four(row + 2, column), four(row + 3, column)];
                for c in 0..4 {
                    to[(column + c) * stride + row..][..4].copy_from_slice(&[x[0][c], x[1][c], x[2][c], x[3][c]]);
                }
            } else {
                for (c, r) in (column..columns.min(column + 4)).flat_map(|c| (row..rows.min(row + 4)).map(move |r| (c, r))) {
                    to[c * stride + r] = from.values[r * from.stride + at + c];
                }
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
    let padded = tokens.next_multiple_of(V::LANES);
    let vw = hw.next_multiple_of(V::LANES);
    let (query, scores) = (a.queries.as_mut_ptr(), a.scores.as_mut_ptr());
    // SAFETY: `queries` holds ROWS x vw, `scores` ROWS x the tokens in whole tiles, `keys` head_width x padded, `values` tokens x vw, `mask` its rows
    // of padded (all from `new`); query rows checked by the caller.
    unsafe {
        // Scores are powers of two, so that no exponential needs to multiply.
        let factor = V::splat(scale * std::f32::consts::LOG2_E);
        for r in 0..ROWS {
            let row = q.values.as_ptr().add((first + r) * q.stride + at);
            let mut d = 0;
            while d < hw {
                let x = if d + V::LANES <= hw { V::load(row.add(d)) } else { V::load_first(row.add(d), hw - d) };
                x.mul(factor).store(query.add(d * ROWS + r * V::LANES));
                d += V::LANES;
            }
        }
        let mask_stride = if a.window > 0 { padded } else { 0 };
        let mut c = 0;
        while c < padded {
            let to = scores.add(c * ROWS);
            // Not read where there is none.
            let mask = a.mask.as_ptr().wrapping_add(first * mask_stride + c);
            if c + V::LANES < padded {
                score::<V, ROWS, 2>(a, c, mask, mask_stride, to);
            } else {
                score::<V, ROWS, 1>(a, c, mask, mask_stride, to);
            }
            c += 2 * V::LANES;
        }
        if a.mask.is_empty() {
            hide::<ROWS>(a, first, 2 * V::LANES, padded);
        }
        let mut shares = [0.0f32; ROWS];
        for (r, share) in shares.iter_mut().enumerate() {
            *share = 1.0 / softmax::<V, ROWS>(scores.add(r * 2 * V::LANES), padded);
        }
        let mut d = 0;
        while d < vw {
            if d + V::LANES < vw {
                mix::<V, ROWS, 2>(a, shares, at, d, out);
            } else {
                mix::<V, ROWS, 1>(a, shares, at, d, out);
            }
            d += 2 * V::LANES;
        }
    }
}

/// Scores of the packed queries against the `N` vectors of tokens from `c` on, to a tile at `to`; they start from `mask` where there is one.
///
/// # Safety
/// As [`queries`]; the tokens lie within the padded ones, `mask`'s rows (where there are any) and `to` have room for `N` vectors.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[inline(always)]
unsafe fn score<V: F32s, const ROWS: usize, const N: usize>(a: &Attention, c: usize, mask: *const f32, mask_stride: usize, to: *mut f32) {
    let hw = a.head_width;
    let padded = a.tokens().next_multiple_of(V::LANES);
    // SAFETY: this function's contract.
    unsafe {
        let mut acc = [[V::splat(0.0); 2]; ROWS];
        if !a.mask.is_empty() {
            // FORBIDDEN plus a score is FORBIDDEN, as near as makes no difference.
            for (r, sums) in acc.iter_mut().enumerate() {
                let mask = mask.add(r * mask_stride);
                *sums = [V::load(mask), if N > 1 { V::load(mask.add(V::LANES)) } else { V::splat(0.0) }];
            }
        }
        let mut d = 0;
        while d < hw {
            let depth = (hw - d).min(V::LANES);
            sum_up::<V, ROWS, N>(
                &mut acc,
                a.queries.as_ptr().add(d * ROWS),
                |r| r * V::LANES,
                a.keys.as_ptr().add(d * padded + c),
                padded,
                depth,
            );
            d += V::LANES;
        }
        for (r, sums) in acc.iter().enumerate() {
            let to = to.add(r * 2 * V::LANES);
            sums[0].store(to);
            if N > 1 {
                sums[1].store(to.add(V::LANES));
            }
        }
    }
}

/// Hides what queries `first..first + ROWS` may not attend to, in scores that no mask was added to.
///
/// # Safety
/// `a`'s scores are `ROWS` rows in tiles of `width` tokens, `padded` tokens in all.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[inline(always)]
unsafe fn hide<const ROWS: usize>(a: &mut Attention, first: usize, width: usize, padded: usize) {
    let [grid_rows, grid_cols] = a.grid;
    let reach = a.window / 2;
    for r in 0..ROWS {
        let mut set = |j: usize| a.scores[j / width * width * ROWS + r * width + j % width] = FORBIDDEN;
        (grid_rows * grid_cols..padded).for_each(&mut set);
        if a.window > 0 {
            let (row, col) = ((first + r) / grid_cols, (first + r) % grid_cols);
            let (c0, c1) = (col.saturating_sub(reach), (col + reach).min(grid_cols - 1));
            for hidden in row.saturating_sub(reach)..=(row + reach).min(grid_rows - 1) {
                (hidden * grid_cols + c0..=hidden * grid_cols + c1).for_each(&mut set);
            }
        }
    }
}

/// Turns one row of scores into weights that are not yet divided by their sum, which is returned. `line` is the row in the first tile.
///
/// # Safety
/// `V`'s instruction set must be there; `ROWS` rows lie in tiles of two vectors, `padded` tokens in all.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[inline(always)]
unsafe fn softmax<V: F32s, const ROWS: usize>(line: *mut f32, padded: usize) -> f32 {
    let tile = 2 * V::LANES;
    let vectors = padded / V::LANES;
    // SAFETY: this function's contract.
    unsafe {
        let (mut largest, mut other) = (V::load(line), V::load(line));
        for t in 0..vectors / 2 {
            let at = line.add(t * tile * ROWS);
            largest = largest.max(V::load(at));
            other = other.max(V::load(at.add(V::LANES)));
        }
        let odd = line.add(vectors / 2 * tile * ROWS);
        if vectors % 2 == 1 {
            other = other.max(V::load(odd));
        }
        let largest = V::splat(largest.max(other).largest());
        let mut total = [V::splat(0.0); 2];
        for t in 0..vectors / 2 {
            let at = line.add(t * tile * ROWS);
            // What is not a number, or infinite and the largest, ends as NaN here.
            let e = [V::load(at).sub(largest).exp2(), V::load(at.add(V::LANES)).sub(largest).exp2()];
            e[0].store(at);
            e[1].store(at.add(V::LANES));
            total = [total[0].add(e[0]), total[1].add(e[1])];
        }
        if vectors % 2 == 1 {
            let e = V::load(odd).sub(largest).exp2();
            e.store(odd);
            total[0] = total[0].add(e);
        }
        total[0].add(total[1]).sum()
    }
}

/// Values weighted with `ROWS` rows of weights and multiplied with `shares`: columns `d..d + N * LANES` of the head that starts at column `at`.
///
/// # Safety
/// As [`queries`]; the columns lie within the padded values.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[inline(always)]
unsafe fn mix<V: F32s, const ROWS: usize, const N: usize>(a: &Attention, shares: [f32; ROWS], at: usize, d: usize, out: &mut [f32]) {
    let (tokens, hw, width) = (a.tokens(), a.head_width, a.width());
    let vw = hw.next_multiple_of(V::LANES);
    let tile = 2 * V::LANES;
    // SAFETY: as in `queries`; what passes the head's end is not stored.
    unsafe {
        let mut acc = [[V::splat(0.0); 2]; ROWS];
        let mut j = 0;
        while j < tokens {
            let depth = (tokens - j).min(tile);
            sum_up::<V, ROWS, N>(&mut acc, a.scores.as_ptr().add(j * ROWS), |r| r * tile, a.values.as_ptr().add(j * vw + d), vw, depth);
            j += tile;
        }
        for (r, y) in acc.iter().enumerate() {
            let share = V::splat(shares[r]);
            let to = out.as_mut_ptr().add(r * width + at + d);
            for (v, y) in y.iter().enumerate().take(N) {
                let left = hw - d - v * V::LANES;
                if left >= V::LANES {
                    y.mul(share).store(to.add(v * V::LANES));
                } else {
                    y.mul(share).store_first(to.add(v * V::LANES), left);
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
        // Too many tokens for a mask in memory.
        check([20, 20], 2, 5, 5, 6);
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
