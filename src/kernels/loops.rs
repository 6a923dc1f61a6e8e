//! Loops so plain that the compiler vectorises them by itself: each is written once and compiled for every instruction set. What the crate is
//! built for (on x86-64 SSE2) reaches a quarter of the speed. Nothing is reordered, so the results are the same everywhere, to the bit.

use super::isa::{Isa, per_isa};

/// An operation on one value.
pub trait Map: Fn(f32) -> f32 {}
impl<F: Fn(f32) -> f32> Map for F {}

/// An operation on two values.
pub trait Zip: Fn(f32, f32) -> f32 {}
impl<F: Fn(f32, f32) -> f32> Zip for F {}

per_isa! {
    /// `out = op(a)`, value by value, as far as the shorter one goes.
    pub fn map<F: Map>(a: &[f32], out: &mut [f32], op: F) => map_generic
}

#[inline(always)]
fn map_generic<F: Map>(a: &[f32], out: &mut [f32], op: F) {
    for (out, &a) in out.iter_mut().zip(a) {
        *out = op(a);
    }
}

per_isa! {
    /// `out = op(a, b)`, value by value, as far as the shortest one goes.
    pub fn zip<F: Zip>(a: &[f32], b: &[f32], out: &mut [f32], op: F) => zip_generic
}

#[inline(always)]
fn zip_generic<F: Zip>(a: &[f32], b: &[f32], out: &mut [f32], op: F) {
    for ((out, &a), &b) in out.iter_mut().zip(a).zip(b) {
        *out = op(a, b);
    }
}

per_isa! {
    /// `out` is one value for each row of `width` values: the sum of `op` over it, in eight partial sums, which round better than one.
    ///
    /// # Panics
    /// When `width` is 0 or there are fewer rows than `out` is long.
    pub fn sum_rows<F: Map>(rows: &[f32], width: usize, out: &mut [f32], op: F) => sum_rows_generic
}

#[inline(always)]
fn sum_rows_generic<F: Map>(rows: &[f32], width: usize, out: &mut [f32], op: F) {
    assert!(width > 0 && rows.len() / width >= out.len(), "rows of a sum");
    for (row, out) in rows.chunks_exact(width).zip(out) {
        let mut sums = [0.0f32; 8];
        let chunks = row.chunks_exact(8);
        let rest: f32 = chunks.remainder().iter().map(|&x| op(x)).sum();
        for chunk in chunks {
            for (sum, &x) in sums.iter_mut().zip(chunk) {
                *sum += op(x);
            }
        }
        *out = sums.iter().sum::<f32>() + rest;
    }
}

/// A number of a table: in float, or in steps of 8 bit.
pub trait Number: Copy + Into<f32> {}
impl Number for f32 {}
impl Number for i8 {}

/// Columns of a table that are summed up together: their sums stay in the first-level cache while all rows pass by.
const COLUMNS: usize = 2048;

per_isa! {
    /// Adds to `out` the sum of the table's rows, each times its weight: the columns from `from` on, as many as `out` holds. Rows of weight 0 are not read,
    /// so that a table of which one row is chosen costs one row. `table` is `[weights, columns]` and finite (a row of weight 0 counts as zeros).
    ///
    /// # Panics
    /// When the table has no such columns.
    pub fn add_weighed_rows<T: Number>(weights: &[f32], table: &[T], columns: usize, from: usize, out: &mut [f32]) => add_weighed_rows_generic
}

#[inline(always)]
fn add_weighed_rows_generic<T: Number>(weights: &[f32], table: &[T], columns: usize, from: usize, out: &mut [f32]) {
    assert!(table.len() == weights.len() * columns && from + out.len() <= columns, "columns of a table");
    for (block, out) in out.chunks_mut(COLUMNS).enumerate() {
        for (&weight, row) in weights.iter().zip(table.chunks_exact(columns.max(1))) {
            // Not a number is no zero: it goes on.
            if weight != 0.0 {
                for (out, &value) in out.iter_mut().zip(&row[from + block * COLUMNS..]) {
                    *out += weight * value.into();
                }
            }
        }
    }
}

/// Sizes of a max pooling without padding, on a channels-last picture.
#[derive(Clone, Copy, Debug)]
pub struct Pool {
    /// Columns of the input.
    pub width: usize,
    /// Columns of the output.
    pub out_width: usize,
    /// Channels of both.
    pub channels: usize,
    /// Kernel height and width.
    pub kernel: [usize; 2],
    /// Strides, vertical and horizontal.
    pub stride: [usize; 2],
}

per_isa! {
    /// `out` is the pixels from number `first` on. A value that is not finite gives NaN: it must reach the score.
    ///
    /// # Panics
    /// When a window lies outside the input.
    pub fn max_pool(input: &[f32], pool: Pool, first: usize, out: &mut [f32]) => max_pool_generic
}

#[inline(always)]
fn max_pool_generic(input: &[f32], pool: Pool, first: usize, out: &mut [f32]) {
    let Pool { width, out_width, channels, kernel, stride } = pool;
    for (i, pixel) in out.chunks_exact_mut(channels.max(1)).enumerate() {
        let i = first + i;
        let (y, x) = (i / out_width * stride[0], i % out_width * stride[1]);
        let at = |ky: usize, kx: usize| &input[((y + ky) * width + x + kx) * channels..][..channels];
        pixel.copy_from_slice(at(0, 0));
        for ky in 0..kernel[0] {
            for kx in 0..kernel[1] {
                for (highest, &value) in pixel.iter_mut().zip(at(ky, kx)) {
                    let higher = if value > *highest { value } else { *highest };
                    // Zero, or NaN where `value` is not finite: a branch would not vectorise.
                    *highest = higher + value * 0.0;
                }
            }
        }
    }
}

/// Where an output position of a bilinear resize lies: lower and higher input position, and the weight of the higher.
pub type Between = (usize, usize, f32);

per_isa! {
    /// Bilinear resize of a channels-last picture whose rows hold `stride` values: `out` is the rows of `rows`.
    ///
    /// # Panics
    /// When a position lies outside the input.
    pub fn resize(input: &[f32], stride: usize, channels: usize, rows: &[Between], columns: &[Between], out: &mut [f32]) => resize_generic
}

#[inline(always)]
fn resize_generic(input: &[f32], stride: usize, channels: usize, rows: &[Between], columns: &[Between], out: &mut [f32]) {
    for (line, &(top, bottom, down)) in out.chunks_exact_mut((channels * columns.len()).max(1)).zip(rows) {
        for (pixel, &(left, right, across)) in line.chunks_exact_mut(channels).zip(columns) {
            let at = |row: usize, column: usize| &input[row * stride + column * channels..][..channels];
            let corners = at(top, left).iter().zip(at(top, right)).zip(at(bottom, left)).zip(at(bottom, right));
            for (value, (((&a, &b), &c), &d)) in pixel.iter_mut().zip(corners) {
                let (upper, lower) = (a + across * (b - a), c + across * (d - c));
                *value = upper + down * (lower - upper);
            }
        }
    }
}

per_isa! {
    /// `count` runs of `len` neighbours, from every `strides[0]` values to every `strides[1]`.
    ///
    /// # Panics
    /// When a run lies outside `from` or `to`.
    pub fn copy_runs(from: &[f32], to: &mut [f32], len: usize, count: usize, strides: [usize; 2]) => copy_runs_generic
}

#[inline(always)]
fn copy_runs_generic(from: &[f32], to: &mut [f32], len: usize, count: usize, strides: [usize; 2]) {
    for i in 0..count {
        let (from, to) = (&from[i * strides[0]..][..len], &mut to[i * strides[1]..][..len]);
        // A loop, not `copy_from_slice`: a call for each short run takes longer than the run.
        let (mut read, mut write) = (from.chunks_exact(8), to.chunks_exact_mut(8));
        for (to, from) in write.by_ref().zip(read.by_ref()) {
            to.copy_from_slice(from);
        }
        write.into_remainder().iter_mut().zip(read.remainder()).for_each(|(to, from)| *to = *from);
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::values;
    use super::*;
    use proptest::prelude::*;

    /// The same bits on every instruction set.
    fn same(len: usize, run: impl Fn(Isa, &mut [f32])) -> Vec<f32> {
        let mut wanted = vec![f32::NAN; len];
        run(Isa::Generic, &mut wanted);
        for isa in Isa::all_available() {
            let mut got = vec![f32::NAN; len];
            run(isa, &mut got);
            let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&got), bits(&wanted), "{}", isa.name());
        }
        wanted
    }

    proptest! {
        #[test]
        fn weighed_rows_add_up_and_closed_ones_are_not_read(rows in 0usize..6, columns in 1usize..80, from in 0usize..80, seed: u64) {
            let from = from % columns;
            let mut table = values(rows * columns, seed);
            let mut weights = values(rows, seed >> 3);
            if let Some(closed) = weights.get_mut(seed as usize % 7) {
                *closed = 0.0;
                table[seed as usize % 7 * columns..][..columns].fill(f32::NAN);
            }
            let start = values(columns - from, seed >> 5);
            let out = same(start.len(), |isa, out| {
                out.copy_from_slice(&start);
                add_weighed_rows(isa, &weights, &table, columns, from, out);
            });
            for (i, (got, start)) in out.iter().zip(&start).enumerate() {
                let open = weights.iter().enumerate().filter(|(_, w)| **w != 0.0);
                let exact: f64 = open.map(|(r, w)| f64::from(*w) * f64::from(table[r * columns + from + i])).sum();
                prop_assert!((f64::from(*got) - exact - f64::from(*start)).abs() < 1e-5, "{got} at {i}");
            }
            if rows > 0 {
                weights[0] = f32::NAN;
                let out = same(start.len(), |isa, out| {
                    out.fill(0.0);
                    add_weighed_rows(isa, &weights, &table, columns, from, out);
                });
                prop_assert!(out.iter().all(|v| v.is_nan()), "not a number is no closed row");
            }
        }

        #[test]
        fn steps_add_up_as_their_numbers_do(rows in 0usize..4, columns in 2000usize..4200, from in 0usize..80, seed: u64) {
            let steps: Vec<i8> = values(rows * columns, seed).iter().map(|v| (v * 127.0) as i8).collect();
            let floats: Vec<f32> = steps.iter().map(|v| f32::from(*v)).collect();
            let weights = values(rows, seed >> 3);
            let in_steps = same(columns - from, |isa, out| {
                out.fill(0.0);
                add_weighed_rows(isa, &weights, &steps, columns, from, out);
            });
            let in_floats = same(columns - from, |isa, out| {
                out.fill(0.0);
                add_weighed_rows(isa, &weights, &floats, columns, from, out);
            });
            prop_assert_eq!(in_steps, in_floats);
        }

        #[test]
        fn maps_and_sums_are_what_they_say(len in 0usize..70, rows in 1usize..4, seed: u64) {
            let (a, b) = (values(len * rows, seed >> 8), values(len * rows, seed >> 9));
            let out = same(a.len(), |isa, out| map(isa, &a, out, |x| x * 3.0 + 1.0));
            prop_assert!(out.iter().zip(&a).all(|(y, x)| *y == x * 3.0 + 1.0));
            let out = same(a.len(), |isa, out| zip(isa, &a, &b, out, |x, y| x / y));
            prop_assert!(out.iter().zip(a.iter().zip(&b)).all(|(z, (x, y))| z.to_bits() == (x / y).to_bits()));
            if len > 0 {
                let out = same(rows, |isa, out| sum_rows(isa, &a, len, out, |x| x * x));
                for (y, row) in out.iter().zip(a.chunks_exact(len)) {
                    let exact: f64 = row.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
                    prop_assert!((f64::from(*y) - exact).abs() < 1e-4);
                }
            }
        }

        #[test]
        fn pools_resizes_and_copies_are_what_they_say(
            channels in 1usize..40, height in 1usize..9, width in 1usize..9, kernel in 1usize..4, stride in 1usize..4, seed: u64,
        ) {
            prop_assume!(kernel <= height && kernel <= width);
            let input = values(height * width * channels, seed >> 8);
            let (rows, out_width) = ((height - kernel) / stride + 1, (width - kernel) / stride + 1);
            let pool = Pool { width, out_width, channels, kernel: [kernel; 2], stride: [stride; 2] };
            let whole = same(rows * out_width * channels, |isa, out| max_pool(isa, &input, pool, 0, out));
            for (i, y) in whole.iter().enumerate() {
                let (oy, ox, c) = (i / channels / out_width, i / channels % out_width, i % channels);
                let window = (0..kernel * kernel).map(|k| input[((oy * stride + k / kernel) * width + ox * stride + k % kernel) * channels + c]);
                prop_assert_eq!(*y, window.fold(f32::NEG_INFINITY, f32::max));
            }
            let last = same(out_width * channels, |isa, out| max_pool(isa, &input, pool, (rows - 1) * out_width, out));
            prop_assert_eq!(&last[..], &whole[(rows - 1) * out_width * channels..]);

            let between: Vec<Between> = (0..width).map(|i| (i, (i + 1).min(width - 1), 0.25)).collect();
            let down: Vec<Between> = (0..height).map(|i| (i, (i + 1).min(height - 1), 0.5)).collect();
            let out = same(input.len(), |isa, out| resize(isa, &input, width * channels, channels, &down, &between, out));
            for (i, y) in out.iter().enumerate() {
                let (oy, ox, c) = (i / channels / width, i / channels % width, i % channels);
                let at = |y: usize, x: usize| f64::from(input[(y.min(height - 1) * width + x.min(width - 1)) * channels + c]);
                let row = |y| at(y, ox) * 0.75 + at(y, ox + 1) * 0.25;
                prop_assert!((f64::from(*y) - (row(oy) + row(oy + 1)) / 2.0).abs() < 1e-6);
            }

            let pixels = height * width;
            let out = same(pixels * (channels + 3), |isa, out| copy_runs(isa, &input, out, channels, pixels, [channels, channels + 3]));
            for (from, to) in input.chunks_exact(channels).zip(out.chunks_exact(channels + 3)) {
                prop_assert_eq!(from, &to[..channels]);
                prop_assert!(to[channels..].iter().all(|x| x.is_nan()));
            }
        }
    }

    #[test]
    fn not_a_number_reaches_the_pooled_value() {
        for isa in Isa::all_available() {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let pool = Pool { width: 2, out_width: 1, channels: 20, kernel: [2; 2], stride: [2; 2] };
                let mut input = [1.0; 80];
                input[45] = bad;
                let mut out = [0.0; 20];
                max_pool(isa, &input, pool, 0, &mut out);
                assert!(out[5].is_nan() && out.iter().filter(|x| x.is_nan()).count() == 1, "{} {bad}", isa.name());
            }
        }
    }
}
