//! Float matrix product of strided matrices, `out (+)= left x right`: what training needs beyond [`super::linear`].
//!
//! Nothing is packed here. The left matrix is read element by element in any layout (rows, or transposed for a weight gradient); the right one in
//! rows of whole vectors, either as it lies or from the panels of [`pack`] and [`pack_transposed`]. Rows are taken up to fourteen at a time: with two
//! vectors of columns that fills the register file of AVX-512, and the paper's 196 tokens are fourteen times fourteen.

use super::isa::Isa;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use super::simd::F32s;
#[cfg(target_arch = "aarch64")]
use super::simd::arm::Neon;
#[cfg(target_arch = "x86_64")]
use super::simd::x86::{Avx2, Avx512};

/// Vectors in a panel.
const VECTORS: usize = 2;
/// Width of a panel without vectors.
const GENERIC_WIDTH: usize = 8;
/// Depth that is summed in registers at a time: a panel of it stays in the first-level cache while the rows pass.
const DEPTH_AT_ONCE: usize = 256;

/// The left matrix: element (row, k) is `data[row * row_stride + k * depth_stride]`. One of the strides is 1.
#[derive(Clone, Copy, Debug)]
pub struct Left<'a> {
    /// Elements.
    pub data: &'a [f32],
    /// From row to row.
    pub row_stride: usize,
    /// From one summand to the next.
    pub depth_stride: usize,
}

impl<'a> Left<'a> {
    /// A row-major matrix whose rows are `stride` apart.
    pub fn rows(data: &'a [f32], stride: usize) -> Self {
        Self { data, row_stride: stride, depth_stride: 1 }
    }

    /// The transpose of a row-major matrix whose rows are `stride` apart.
    pub fn transposed(data: &'a [f32], stride: usize) -> Self {
        Self { data, row_stride: 1, depth_stride: stride }
    }
}

/// The right matrix: element (k, column) is `data[column / width * panel_stride + k * depth_stride + column % width]` with the instruction set's
/// [`panel_width`]. Whole vectors are read: what lies behind the last column (zeros, neighbouring columns) must exist, its values do not matter.
#[derive(Clone, Copy, Debug)]
pub struct Right<'a> {
    data: &'a [f32],
    panel_stride: usize,
    depth_stride: usize,
}

impl<'a> Right<'a> {
    /// A row-major matrix as it lies, rows `stride` apart.
    pub fn rows(data: &'a [f32], stride: usize, isa: Isa) -> Self {
        Self { data, panel_stride: panel_width(isa), depth_stride: stride }
    }

    /// What [`pack`] or [`pack_transposed`] made of a matrix of `depth` rows.
    pub fn packed(data: &'a [f32], depth: usize, isa: Isa) -> Self {
        Self { data, panel_stride: depth * panel_width(isa), depth_stride: panel_width(isa) }
    }

    /// The matrix without its first `depth` rows.
    pub fn from_depth(self, depth: usize) -> Self {
        Self { data: self.data.get(depth * self.depth_stride..).unwrap_or(&[]), ..self }
    }
}

/// What the sums start from.
#[derive(Clone, Copy, Debug)]
pub enum Start<'a> {
    /// Zero.
    Zero,
    /// What `out` holds.
    Out,
    /// Row `r` of the product starts from row `(first + r) % period` of `table`; a table of one row is a bias. Whole vectors are read, as of [`Right`].
    Table {
        /// Rows of at least the product's columns.
        table: &'a [f32],
        /// From row to row.
        stride: usize,
        /// Row for the product's first.
        first: usize,
        /// Rows of the table.
        period: usize,
    },
}

/// Columns in a panel.
pub fn panel_width(isa: Isa) -> usize {
    match isa.float() {
        Isa::Avx2 => VECTORS * 8,
        Isa::Avx512 => VECTORS * 16,
        Isa::Neon => VECTORS * 4,
        _ => GENERIC_WIDTH,
    }
}

/// Values that a packed matrix takes.
pub fn packed_len(depth: usize, columns: usize, isa: Isa) -> usize {
    columns.div_ceil(panel_width(isa)) * panel_width(isa) * depth
}

/// Puts columns `at..at + columns` of a packed matrix of `depth` rows in place, from a row-major `[depth, columns]` matrix.
///
/// # Panics
/// When the lengths do not fit.
pub fn pack(packed: &mut [f32], depth: usize, at: usize, matrix: &[f32], columns: usize, isa: Isa) {
    assert_eq!(matrix.len(), depth * columns, "matrix to pack");
    assert!(packed.len() >= packed_len(depth, at + columns, isa), "room for the packed matrix");
    let width = panel_width(isa);
    let mut column = 0;
    while column < columns {
        let (panel, inside) = ((at + column) / width, (at + column) % width);
        let n = (width - inside).min(columns - column);
        let lines = packed[panel * depth * width..(panel + 1) * depth * width].chunks_exact_mut(width);
        for (line, row) in lines.zip(matrix.chunks_exact(columns)) {
            line[inside..inside + n].copy_from_slice(&row[column..column + n]);
        }
        column += n;
    }
}

/// Puts rows `at..at + columns` (of `depth` in all) of a packed matrix in place: the transpose of a row-major `[rows, columns]` matrix.
///
/// # Panics
/// When the lengths do not fit.
pub fn pack_transposed(packed: &mut [f32], depth: usize, at: usize, matrix: &[f32], columns: usize, isa: Isa) {
    let rows = matrix.len().checked_div(columns).unwrap_or(0);
    assert_eq!(matrix.len(), rows * columns, "matrix to pack");
    assert!(at + columns <= depth && packed.len() >= packed_len(depth, rows, isa), "room for the packed matrix");
    let width = panel_width(isa);
    for (panel, lines) in packed.chunks_exact_mut((depth * width).max(1)).enumerate() {
        let first = panel * width;
        if first >= rows {
            break;
        }
        for (r, row) in matrix[first * columns..].chunks_exact(columns.max(1)).take(width).enumerate() {
            for (line, x) in lines[at * width..].chunks_exact_mut(width).zip(row) {
                line[r] = *x;
            }
        }
    }
}

/// `out = start + left x right` for a product of `rows x columns` summed over `depth`; row `r` of `out` lies at `r * out_stride`, and nothing but the
/// product's columns is written.
///
/// # Panics
/// When a matrix is too short for that, or neither stride of `left` is 1.
pub fn gemm(
    isa: Isa,
    [rows, columns, depth]: [usize; 3],
    left: Left<'_>,
    right: Right<'_>,
    start: Start<'_>,
    out: &mut [f32],
    out_stride: usize,
) {
    if rows == 0 || columns == 0 {
        return;
    }
    assert!(isa.available(), "{} is not available here", isa.name());
    let width = panel_width(isa);
    let vector = width / VECTORS;
    // Columns that are read: whole vectors.
    let wide = columns.next_multiple_of(vector);
    assert!(out_stride >= columns || rows == 1, "rows of the product overlap");
    assert!(out.len() >= (rows - 1) * out_stride + columns, "room for the product");
    if let Start::Table { table, stride, period, .. } = start {
        assert!(period > 0 && table.len() >= (period - 1) * stride + wide, "table to start from");
    }
    if depth > 0 {
        assert!(left.row_stride == 1 || left.depth_stride == 1, "layout of the left matrix");
        assert!(left.data.len() > (rows - 1) * left.row_stride + (depth - 1) * left.depth_stride, "left matrix");
        let last = (wide - 1) / width * right.panel_stride + (wide - 1) % width;
        assert!(right.data.len() > (depth - 1) * right.depth_stride + last, "right matrix");
        // The first panels too, should panels not lie in order.
        assert!(right.data.len() > (depth - 1) * right.depth_stride + (wide.min(width) - 1), "right matrix");
    }
    let mut done = 0;
    let mut start = start;
    loop {
        let now = (depth - done).min(DEPTH_AT_ONCE);
        let part = Part {
            rows,
            columns,
            depth: now,
            left: &left.data[(done * left.depth_stride).min(left.data.len())..],
            row_stride: left.row_stride,
            left_depth_stride: left.depth_stride,
            right: &right.data[(done * right.depth_stride).min(right.data.len())..],
            panel_stride: right.panel_stride,
            right_depth_stride: right.depth_stride,
            start,
            out_stride,
        };
        match isa.float() {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the instruction set and all reaches were checked above.
            Isa::Avx512 => unsafe { avx512(&part, out) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Isa::Avx2 => unsafe { avx2(&part, out) },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: as above.
            Isa::Neon => unsafe { neon(&part, out) },
            _ => generic(&part, out),
        }
        done += now;
        start = Start::Out;
        if done >= depth {
            return;
        }
    }
}

/// One pass over a part of the depth. Reaches were checked by [`gemm`].
struct Part<'a> {
    rows: usize,
    columns: usize,
    depth: usize,
    left: &'a [f32],
    row_stride: usize,
    left_depth_stride: usize,
    right: &'a [f32],
    panel_stride: usize,
    right_depth_stride: usize,
    start: Start<'a>,
    out_stride: usize,
}

fn generic(p: &Part<'_>, out: &mut [f32]) {
    for (r, line) in out.chunks_mut(p.out_stride.max(1)).take(p.rows).enumerate() {
        for (c, y) in line.iter_mut().take(p.columns).enumerate() {
            let mut sum = match p.start {
                Start::Zero => 0.0,
                Start::Out => *y,
                Start::Table { table, stride, first, period } => table[(first + r) % period * stride + c],
            };
            let column = c / GENERIC_WIDTH * p.panel_stride + c % GENERIC_WIDTH;
            for k in 0..p.depth {
                sum += p.left[r * p.row_stride + k * p.left_depth_stride] * p.right[column + k * p.right_depth_stride];
            }
            *y = sum;
        }
    }
}

/// # Safety
/// AVX-512F must be there; reaches as [`gemm`] checks them.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn avx512(part: &Part<'_>, out: &mut [f32]) {
    // SAFETY: this function's contract.
    unsafe {
        if part.left_depth_stride == 1 {
            all::<Avx512, 14, false>(part, out);
        } else {
            all::<Avx512, 14, true>(part, out);
        }
    }
}

/// # Safety
/// AVX2 and FMA must be there; reaches as [`gemm`] checks them.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2(part: &Part<'_>, out: &mut [f32]) {
    // SAFETY: this function's contract.
    unsafe {
        if part.left_depth_stride == 1 {
            all::<Avx2, 6, false>(part, out);
        } else {
            all::<Avx2, 6, true>(part, out);
        }
    }
}

/// # Safety
/// Reaches as [`gemm`] checks them.
#[cfg(target_arch = "aarch64")]
#[target_feature(enable = "neon")]
unsafe fn neon(part: &Part<'_>, out: &mut [f32]) {
    // SAFETY: this function's contract.
    unsafe {
        if part.left_depth_stride == 1 {
            all::<Neon, 8, false>(part, out);
        } else {
            all::<Neon, 8, true>(part, out);
        }
    }
}

/// # Safety
/// `V`'s instruction set must be there; reaches as [`gemm`] checks them; `TRANSPOSED` says that the left matrix's row stride is 1, else its depth
/// stride is.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[inline(always)]
unsafe fn all<V: F32s, const ROWS: usize, const TRANSPOSED: bool>(p: &Part<'_>, out: &mut [f32]) {
    let out = out.as_mut_ptr();
    let mut column = 0;
    // SAFETY: tiles end at or before the last row and at or before the last column's vector.
    unsafe {
        while column < p.columns {
            let two = p.columns - column > V::LANES;
            let mut row = 0;
            macro_rules! down {
                ($rows:expr) => {
                    while p.rows - row >= $rows {
                        if two {
                            tile::<V, { $rows }, 2, TRANSPOSED>(p, row, column, out);
                        } else {
                            tile::<V, { $rows }, 1, TRANSPOSED>(p, row, column, out);
                        }
                        row += $rows;
                    }
                };
            }
            down!(ROWS);
            down!(4);
            down!(2);
            down!(1);
            column += VECTORS * V::LANES;
        }
    }
}

/// # Safety
/// As [`all`]; the tile lies within the product (its last vector may reach beyond the last column).
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[inline(always)]
unsafe fn tile<V: F32s, const ROWS: usize, const COLUMNS: usize, const TRANSPOSED: bool>(
    p: &Part<'_>,
    row: usize,
    column: usize,
    out: *mut f32,
) {
    // SAFETY: this function's contract; the last vector of a row goes through a local buffer where it is not whole.
    unsafe {
        let valid = (p.columns - column).min(COLUMNS * V::LANES);
        let whole = valid == COLUMNS * V::LANES;
        let mut acc = [[V::splat(0.0); COLUMNS]; ROWS];
        match p.start {
            Start::Zero => {}
            Start::Out if whole => {
                for (r, sums) in acc.iter_mut().enumerate() {
                    for (c, sum) in sums.iter_mut().enumerate() {
                        *sum = V::load(out.add((row + r) * p.out_stride + column + c * V::LANES));
                    }
                }
            }
            Start::Out => {
                for (r, sums) in acc.iter_mut().enumerate() {
                    let mut edge = [0f32; 64];
                    std::ptr::copy_nonoverlapping(out.add((row + r) * p.out_stride + column), edge.as_mut_ptr(), valid);
                    for (c, sum) in sums.iter_mut().enumerate() {
                        *sum = V::load(edge.as_ptr().add(c * V::LANES));
                    }
                }
            }
            Start::Table { table, stride, first, period } => {
                let mut at = (first + row) % period;
                for sums in &mut acc {
                    for (c, sum) in sums.iter_mut().enumerate() {
                        *sum = V::load(table.as_ptr().add(at * stride + column + c * V::LANES));
                    }
                    at = if at + 1 == period { 0 } else { at + 1 };
                }
            }
        }
        let mut b = p.right.as_ptr().add(column / (VECTORS * V::LANES) * p.panel_stride);
        let step = p.right_depth_stride;
        if TRANSPOSED {
            let mut a = p.left.as_ptr().add(row);
            for _ in 0..p.depth {
                sum_up::<V, ROWS, COLUMNS>(a, 1, b, &mut acc);
                a = a.wrapping_add(p.left_depth_stride);
                b = b.wrapping_add(step);
            }
        } else {
            let mut a = p.left.as_ptr().add(row * p.row_stride);
            for _ in 0..p.depth {
                sum_up::<V, ROWS, COLUMNS>(a, p.row_stride, b, &mut acc);
                a = a.wrapping_add(1);
                b = b.wrapping_add(step);
            }
        }
        for (r, sums) in acc.iter().enumerate() {
            let to = out.add((row + r) * p.out_stride + column);
            if whole {
                for (c, sum) in sums.iter().enumerate() {
                    sum.store(to.add(c * V::LANES));
                }
            } else {
                let mut edge = [0f32; 64];
                for (c, sum) in sums.iter().enumerate() {
                    sum.store(edge.as_mut_ptr().add(c * V::LANES));
                }
                std::ptr::copy_nonoverlapping(edge.as_ptr(), to, valid);
            }
        }
    }
}

/// # Safety
/// `V`'s instruction set must be there; `a` is valid at multiples of `stride` below `ROWS`, `b` for `COLUMNS` vectors.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[inline(always)]
unsafe fn sum_up<V: F32s, const ROWS: usize, const COLUMNS: usize>(
    a: *const f32,
    stride: usize,
    b: *const f32,
    acc: &mut [[V; COLUMNS]; ROWS],
) {
    // SAFETY: this function's contract.
    unsafe {
        let mut w = [V::load(b); COLUMNS];
        for (c, w) in w.iter_mut().enumerate().skip(1) {
            *w = V::load(b.add(c * V::LANES));
        }
        for (r, sums) in acc.iter_mut().enumerate() {
            let x = V::splat(*a.add(r * stride));
            for (sum, w) in sums.iter_mut().zip(w) {
                *sum = sum.fma(x, w);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::values;
    use super::*;
    use proptest::prelude::*;

    /// Where the right matrix comes from.
    #[derive(Clone, Copy, Debug)]
    enum Form {
        Rows,
        Packed,
        Transposed,
    }

    /// One product on every instruction set against sums in double precision; what lies between the rows of `out` must stay.
    fn check([rows, columns, depth]: [usize; 3], transposed: bool, form: Form, start: u8, gap: usize, seed: u64) {
        for isa in Isa::all_available() {
            let (a_stride, b_stride, out_stride) = (if transposed { rows } else { depth } + gap, columns + gap, columns + gap);
            let a = values(if transposed { depth } else { rows } * a_stride + 1, seed);
            let b = values(depth * b_stride + 64, seed + 1);
            let left = if transposed { Left::transposed(&a, a_stride) } else { Left::rows(&a, a_stride) };
            let plain: Vec<f32> = (0..depth).flat_map(|k| b[k * b_stride..][..columns].to_vec()).collect();
            let mut packed = vec![0.0; packed_len(depth, columns, isa)];
            let right = match form {
                Form::Rows => Right::rows(&b, b_stride, isa),
                Form::Packed => {
                    // In two parts, side by side.
                    let part = columns / 3;
                    let cut = |from: usize, to: usize| -> Vec<f32> {
                        plain.chunks_exact(columns.max(1)).flat_map(|row| row[from..to].to_vec()).collect()
                    };
                    pack(&mut packed, depth, 0, &cut(0, part), part, isa);
                    pack(&mut packed, depth, part, &cut(part, columns), columns - part, isa);
                    Right::packed(&packed, depth, isa)
                }
                Form::Transposed => {
                    let turned: Vec<f32> =
                        (0..columns).flat_map(|c| (0..depth).map(move |k| (k, c))).map(|(k, c)| plain[k * columns + c]).collect();
                    let part = depth / 2;
                    let cut = |from: usize, to: usize| -> Vec<f32> {
                        turned.chunks_exact(depth.max(1)).flat_map(|row| row[from..to].to_vec()).collect()
                    };
                    pack_transposed(&mut packed, depth, 0, &cut(0, part), part, isa);
                    pack_transposed(&mut packed, depth, part, &cut(part, depth), depth - part, isa);
                    Right::packed(&packed, depth, isa)
                }
            };
            let (period, first) = (3, 2);
            let table = values(period * (columns + 32), seed + 2);
            let before = values((rows * out_stride).max(1), seed + 3);
            let mut out = before.clone();
            let begin = match start {
                0 => Start::Zero,
                1 => Start::Out,
                _ => Start::Table { table: &table, stride: columns + 32, first, period },
            };
            gemm(isa, [rows, columns, depth], left, right, begin, &mut out, out_stride);
            for r in 0..rows {
                for c in 0..out_stride.min(before.len() - r * out_stride) {
                    let got = out[r * out_stride + c];
                    if c >= columns {
                        assert_eq!(got, before[r * out_stride + c], "{} wrote between the rows", isa.name());
                        continue;
                    }
                    let from = match start {
                        0 => 0.0,
                        1 => before[r * out_stride + c],
                        _ => table[(first + r) % period * (columns + 32) + c],
                    };
                    let a_at = |k: usize| if transposed { a[k * a_stride + r] } else { a[r * a_stride + k] };
                    let sum: f64 = (0..depth).map(|k| f64::from(a_at(k)) * f64::from(plain[k * columns + c])).sum();
                    let wanted = f64::from(from) + sum;
                    let error = (f64::from(got) - wanted).abs();
                    assert!(
                        error < 2e-6 * (depth as f64 + 1.0).sqrt().max(1.0) * 4.0,
                        "{} {form:?} at {r}, {c}: {got} {wanted}",
                        isa.name()
                    );
                }
            }
        }
    }

    #[test]
    fn the_shapes_of_a_training_step_agree_with_double_precision() {
        for (size, transposed, form) in [
            ([98, 96, 272], false, Form::Packed),
            ([28, 196, 32], false, Form::Rows),
            ([28, 32, 196], false, Form::Rows),
            ([64, 64, 392], true, Form::Rows),
            ([28, 272, 600], false, Form::Transposed),
        ] {
            for start in 0..3 {
                check(size, transposed, form, start, 16, 3);
            }
        }
    }

    #[test]
    fn a_product_over_nothing_is_what_it_starts_from() {
        check([3, 5, 0], false, Form::Rows, 1, 2, 1);
        check([3, 5, 0], true, Form::Packed, 2, 0, 1);
        check([0, 5, 4], false, Form::Rows, 0, 0, 1);
        check([3, 0, 4], false, Form::Rows, 0, 0, 1);
    }

    #[test]
    fn the_lower_part_of_a_packed_matrix_is_a_matrix() {
        for isa in Isa::all_available() {
            let (a, b) = (values(4 * 5, 1), values(9 * 40, 2));
            let mut packed = vec![0.0; packed_len(9, 40, isa)];
            pack(&mut packed, 9, 0, &b, 40, isa);
            let (mut got, mut wanted) = (vec![0.0; 4 * 40], vec![0.0; 4 * 40]);
            gemm(isa, [4, 40, 5], Left::rows(&a, 5), Right::packed(&packed, 9, isa).from_depth(4), Start::Zero, &mut got, 40);
            let mut rest = b[4 * 40..].to_vec();
            rest.resize(rest.len() + 64, 0.0);
            gemm(isa, [4, 40, 5], Left::rows(&a, 5), Right::rows(&rest, 40, isa), Start::Zero, &mut wanted, 40);
            assert_eq!(got, wanted, "{}", isa.name());
        }
    }

    #[test]
    fn matrices_that_are_too_short_are_refused() {
        let isa = Isa::best();
        let (a, b) = (vec![1.0; 12], vec![1.0; 4 * 64]);
        type Attempt<'a> = (&'a str, Left<'a>, Right<'a>, usize);
        let attempts: [Attempt<'_>; 3] = [
            ("left", Left::rows(&a[..11], 4), Right::rows(&b, 64, isa), 3 * 8),
            ("right", Left::rows(&a, 4), Right::rows(&b[..3 * 64], 64, isa), 3 * 8),
            ("room", Left::rows(&a, 4), Right::rows(&b, 64, isa), 3 * 8 - 1),
        ];
        for (what, left, right, room) in attempts {
            let refused = std::panic::catch_unwind(|| {
                let mut out = vec![0.0; room];
                gemm(isa, [3, 8, 4], left, right, Start::Zero, &mut out, 8);
            });
            assert!(refused.is_err(), "{what}");
        }
    }

    proptest! {
        #[test]
        fn any_size_agrees_with_double_precision(
            rows in 0usize..40, columns in 0usize..80, depth in 0usize..300, transposed: bool, form in 0u8..3, start in 0u8..3, gap in 0usize..20, seed: u64,
        ) {
            let form = [Form::Rows, Form::Packed, Form::Transposed][usize::from(form)];
            check([rows, columns, depth], transposed, form, start, gap, seed >> 8);
        }
    }
}
