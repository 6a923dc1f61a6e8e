//! Fused float linear: `out = act(a x weight + bias) (+ residual)`, row-major, weights packed once.
//!
//! Also every 1x1 convolution on channels-last pictures (a row is a pixel). Weights are packed into panels of two vectors' width, so that the
//! inner loop reads them in order; rows are taken up to twelve at a time, which fills the register file of AVX-512 with accumulators.

use super::aligned::Aligned;
use super::isa::Isa;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use super::simd::F32s;
#[cfg(target_arch = "aarch64")]
use super::simd::arm::Neon;
#[cfg(target_arch = "x86_64")]
use super::simd::x86::{Avx2, Avx512};

/// Vectors in a panel.
const VECTORS: usize = 2;
/// Below this size the packed weights stay in the cache while rows stream by; above it rows stay and panels stream.
const WEIGHTS_IN_CACHE_BYTES: usize = 128 << 10;
/// Values in a cache line.
const LINE: usize = 16;

/// What follows the sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Activation {
    /// Nothing.
    None,
    /// max(0, x).
    Relu,
    /// min(6, max(0, x)).
    Relu6,
}

impl Activation {
    /// On one value. NaN stays NaN: a broken sum must reach the verdict as a fault, not as a zero.
    pub fn apply(self, x: f32) -> f32 {
        match self {
            Self::None => x,
            Self::Relu => {
                if x < 0.0 {
                    0.0
                } else {
                    x
                }
            }
            Self::Relu6 => x.clamp(0.0, 6.0),
        }
    }
}

/// A linear layer ready to run.
#[derive(Clone, Debug)]
pub struct Linear {
    inputs: usize,
    outputs: usize,
    /// Generic: `[inputs, outputs]`. Else `[panels][inputs][panel width]`, zero-padded to whole vectors; the last panel may be one vector wide.
    packed: Aligned<f32>,
    /// Padded to whole vectors.
    bias: Vec<f32>,
    activation: Activation,
    isa: Isa,
}

impl Linear {
    /// `weight` is `[inputs, outputs]` row-major, `bias` `[outputs]`.
    ///
    /// # Panics
    /// When the lengths do not fit: the caller has checked the model's shapes.
    pub fn new(weight: &[f32], bias: &[f32], inputs: usize, outputs: usize, activation: Activation, isa: Isa) -> Self {
        assert_eq!(weight.len(), inputs * outputs, "weight of a linear {inputs} -> {outputs}");
        assert_eq!(bias.len(), outputs, "bias of a linear {inputs} -> {outputs}");
        assert!(isa.available(), "{} is not available here", isa.name());
        let lanes = lanes(isa);
        if lanes == 0 {
            return Self { inputs, outputs, packed: weight.into(), bias: bias.to_vec(), activation, isa };
        }
        // Whole vectors; where their number is odd, the last panel has half the width.
        let columns = outputs.next_multiple_of(lanes);
        let mut packed = Aligned::zeroed(columns * inputs);
        for (p, panel) in packed.chunks_mut((inputs * VECTORS * lanes).max(1)).enumerate() {
            let from = p * VECTORS * lanes;
            let width = (VECTORS * lanes).min(columns - from);
            let n = width.min(outputs - from);
            for (row, line) in panel.chunks_exact_mut(width).enumerate() {
                line[..n].copy_from_slice(&weight[row * outputs + from..row * outputs + from + n]);
            }
        }
        let mut padded = bias.to_vec();
        padded.resize(columns, 0.0);
        Self { inputs, outputs, packed, bias: padded, activation, isa }
    }

    /// Columns of the input.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Columns of the output.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Rows are `a.len() / inputs`; `out` and `residual` are `[rows, outputs]`. Allocates nothing.
    ///
    /// # Panics
    /// When the lengths do not fit.
    pub fn run(&self, a: &[f32], residual: Option<&[f32]>, out: &mut [f32]) {
        let rows = a.len().checked_div(self.inputs).unwrap_or(0);
        assert_eq!(a.len(), rows * self.inputs, "input of a linear {} -> {}", self.inputs, self.outputs);
        assert_eq!(out.len(), rows * self.outputs, "output of a linear {} -> {}", self.inputs, self.outputs);
        if let Some(residual) = residual {
            assert_eq!(residual.len(), out.len(), "residual of a linear");
        }
        match self.isa.float() {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `new` checked that the instruction set is there, the asserts above the lengths.
            Isa::Avx512 => unsafe { avx512(self, a, rows, residual, out) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Isa::Avx2 => unsafe { avx2(self, a, rows, residual, out) },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: every aarch64 has NEON; lengths as above.
            Isa::Neon => unsafe { neon(self, a, rows, residual, out) },
            _ => self.run_generic(a, residual, out),
        }
    }

    /// As [`Linear::run`] without a residual, for rows that are scattered: input `k` of row `r` is `a[taps[k] + r * row_stride]`. This is a
    /// convolution along one output row of a picture, without copying its windows together first. `out` gives the number of rows.
    ///
    /// # Panics
    /// When the lengths do not fit or a tap lies outside `a`.
    pub fn run_scattered(&self, a: &[f32], taps: &[usize], row_stride: usize, out: &mut [f32]) {
        let rows = out.len().checked_div(self.outputs).unwrap_or(0);
        assert_eq!(out.len(), rows * self.outputs, "output of a linear {} -> {}", self.inputs, self.outputs);
        assert_eq!(taps.len(), self.inputs, "taps of a linear {} -> {}", self.inputs, self.outputs);
        let farthest = taps.iter().max().map_or(0, |tap| tap + rows.saturating_sub(1) * row_stride);
        assert!(rows == 0 || taps.is_empty() || farthest < a.len(), "taps of a linear reach outside its input");
        let places = Places { taps, row_stride };
        match self.isa.float() {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `new` checked that the instruction set is there, the asserts above the lengths and the reach of the taps.
            Isa::Avx512 => unsafe { avx512_scattered(self, a, places, rows, out) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Isa::Avx2 => unsafe { avx2_scattered(self, a, places, rows, out) },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: every aarch64 has NEON; lengths as above.
            Isa::Neon => unsafe { neon_scattered(self, a, places, rows, out) },
            _ => {
                for (row, line) in out.chunks_exact_mut(self.outputs.max(1)).enumerate() {
                    line.copy_from_slice(&self.bias);
                    for (k, tap) in taps.iter().enumerate() {
                        let x = a[tap + row * row_stride];
                        for (y, w) in line.iter_mut().zip(&self.packed[k * self.outputs..(k + 1) * self.outputs]) {
                            *y += x * w;
                        }
                    }
                    line.iter_mut().for_each(|y| *y = self.activation.apply(*y));
                }
            }
        }
    }

    /// The linear layer of each pixel of two picture rows, and of what comes out the maximum over windows of 2x2, two apart: `rows` is
    /// `[2, width, inputs]`, `out` `[width / 2, outputs]`. To the bit what [`Linear::run`] and a pooling after it give, but a window with a sum that is
    /// not finite gives NaN.
    ///
    /// # Panics
    /// When the lengths do not fit.
    pub fn run_pooled(&self, rows: &[f32], width: usize, out: &mut [f32]) {
        assert_eq!(rows.len(), 2 * width * self.inputs, "input of a pooled linear {} -> {}", self.inputs, self.outputs);
        assert_eq!(out.len(), width / 2 * self.outputs, "output of a pooled linear {} -> {}", self.inputs, self.outputs);
        let places = Places { taps: &[], row_stride: width * self.inputs };
        match self.isa.float() {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `new` checked that the instruction set is there, the asserts above the lengths.
            Isa::Avx512 => unsafe { avx512_pooled(self, rows, places, width / 2, out) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Isa::Avx2 => unsafe { avx2_pooled(self, rows, places, width / 2, out) },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: every aarch64 has NEON; lengths as above.
            Isa::Neon => unsafe { neon_pooled(self, rows, places, width / 2, out) },
            _ => {
                for (at, y) in out.iter_mut().enumerate() {
                    let (x, n) = (at / self.outputs * 2, at % self.outputs);
                    let sums = [x, x + 1, width + x, width + x + 1].map(|pixel| {
                        let products = rows[pixel * self.inputs..].iter().zip(self.packed.iter().skip(n).step_by(self.outputs));
                        products.take(self.inputs).fold(self.bias[n], |sum, (x, w)| sum + x * w)
                    });
                    let largest = sums.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
                    *y = self.activation.apply(largest + sums.iter().sum::<f32>() * 0.0);
                }
            }
        }
    }

    fn run_generic(&self, a: &[f32], residual: Option<&[f32]>, out: &mut [f32]) {
        for (row, line) in out.chunks_exact_mut(self.outputs.max(1)).enumerate() {
            line.copy_from_slice(&self.bias);
            for (k, x) in a[row * self.inputs..(row + 1) * self.inputs].iter().enumerate() {
                for (y, w) in line.iter_mut().zip(&self.packed[k * self.outputs..(k + 1) * self.outputs]) {
                    *y += x * w;
                }
            }
            for (n, y) in line.iter_mut().enumerate() {
                *y = self.activation.apply(*y) + residual.map_or(0.0, |r| r[row * self.outputs + n]);
            }
        }
    }
}

/// Where the inputs of scattered rows lie.
#[derive(Clone, Copy)]
struct Places<'a> {
    taps: &'a [usize],
    /// For [`POOLED`]: from one picture row to the next.
    row_stride: usize,
}

/// What of the rows' places the compiler may know.
const GATHERED: usize = 0;
/// Rows are scattered ([`Places`]), any number of values apart.
const SCATTERED: usize = 1;
/// Rows are scattered, two values apart: the first convolution of most backbones, on planes. Then no register is needed for the distance.
const SCATTERED_BY_2: usize = 2;
/// Rows are the pixels of two picture rows, and of four of them that are a window of 2x2 the maximum is wanted.
const POOLED: usize = 3;
/// Pixels of a window.
const WINDOW: usize = 4;

/// Lanes of a vector; 0 where nothing is packed.
fn lanes(isa: Isa) -> usize {
    match isa.float() {
        Isa::Avx2 => 8,
        Isa::Avx512 => 16,
        Isa::Neon => 4,
        _ => 0,
    }
}

macro_rules! entry {
    ($(#[$attribute:meta])* $name:ident, $scattered:ident, $pooled:ident, $vector:ty, $rows:literal) => {
        /// # Safety
        /// The instruction set must be there; lengths as `Linear::run` checks them.
        $(#[$attribute])*
        unsafe fn $name(layer: &Linear, a: &[f32], rows: usize, residual: Option<&[f32]>, out: &mut [f32]) {
            // SAFETY: this function's contract.
            unsafe { all::<$vector, $rows, GATHERED>(layer, a, Places { taps: &[], row_stride: layer.inputs }, rows, residual, out) }
        }

        /// # Safety
        /// The instruction set must be there; lengths and taps as `Linear::run_scattered` checks them.
        $(#[$attribute])*
        unsafe fn $scattered(layer: &Linear, a: &[f32], places: Places<'_>, rows: usize, out: &mut [f32]) {
            // SAFETY: this function's contract.
            unsafe {
                match places.row_stride {
                    2 => all::<$vector, $rows, SCATTERED_BY_2>(layer, a, places, rows, None, out),
                    _ => all::<$vector, $rows, SCATTERED>(layer, a, places, rows, None, out),
                }
            }
        }

        /// # Safety
        /// The instruction set must be there; lengths as `Linear::run_pooled` checks them.
        $(#[$attribute])*
        unsafe fn $pooled(layer: &Linear, a: &[f32], places: Places<'_>, windows: usize, out: &mut [f32]) {
            // SAFETY: this function's contract.
            unsafe { all::<$vector, { $rows / WINDOW * WINDOW }, POOLED>(layer, a, places, windows, None, out) }
        }
    };
}

#[cfg(target_arch = "x86_64")]
entry!(
    #[target_feature(enable = "avx512f,avx512bw")]
    avx512,
    avx512_scattered,
    avx512_pooled,
    Avx512,
    12
);
#[cfg(target_arch = "x86_64")]
entry!(
    #[target_feature(enable = "avx2,fma")]
    avx2,
    avx2_scattered,
    avx2_pooled,
    Avx2,
    6
);
#[cfg(target_arch = "aarch64")]
entry!(
    #[target_feature(enable = "neon")]
    neon,
    neon_scattered,
    neon_pooled,
    Neon,
    8
);

/// # Safety
/// `V`'s instruction set must be there; lengths as `Linear::run` checks them; `places` is used unless `KIND` is [`GATHERED`], and says 2 where
/// `KIND` does.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[inline(always)]
unsafe fn all<V: F32s, const ROWS: usize, const KIND: usize>(
    layer: &Linear,
    a: &[f32],
    places: Places<'_>,
    rows: usize,
    residual: Option<&[f32]>,
    out: &mut [f32],
) {
    let width = VECTORS * V::LANES;
    let panels = layer.bias.len().div_ceil(width);
    let residual = residual.map_or(std::ptr::null(), <[f32]>::as_ptr);
    let (a, out) = (a.as_ptr(), out.as_mut_ptr());
    // Rows of the output that a tile makes, and those that what is left is taken by.
    let (tile, few) = if KIND == POOLED { (ROWS / WINDOW, 1) } else { (ROWS, 4) };
    let groups = rows / tile;
    let rows_stay = layer.packed.len() * 4 > WEIGHTS_IN_CACHE_BYTES;
    let (outer, inner) = if rows_stay { (panels, groups.max(1)) } else { (groups.max(1), panels) };
    let panel_len = layer.inputs * width;
    // Of the next panel what each group asks for.
    let share = panel_len.div_ceil(groups.max(1)).next_multiple_of(LINE);
    // One call for both orders: a second copy of the inner loop is one in which the compiler may run out of registers.
    // SAFETY: rows and panels stay within the lengths that the caller checked; instruction set by this function's contract.
    unsafe {
        for at in 0..outer * inner {
            let (group, panel) = if rows_stay { (at % inner, at / inner) } else { (at / inner, at % inner) };
            if rows_stay {
                // Evenly over the groups, while they compute: in one piece it would wait for memory, which is slower than the products.
                let next = (panel + 1) * panel_len;
                let (from, to) = (next + group * share, next + ((group + 1) * share).min(panel_len));
                for line in (from..to.min(layer.packed.len())).step_by(LINE) {
                    V::prefetch(layer.packed.as_ptr().add(line));
                }
            }
            if groups > 0 {
                panel_of::<V, ROWS, KIND>(layer, a, places, group * tile, panel, residual, out);
            }
            if group + 1 < groups {
                continue;
            }
            // What is left of the rows, while the panel is near.
            let mut row = groups * tile;
            while row + few <= rows {
                panel_of::<V, 4, KIND>(layer, a, places, row, panel, residual, out);
                row += few;
            }
            if KIND == POOLED {
                continue;
            }
            if row < rows && rows >= 4 {
                // Rows that were done already come out the same again; one by one, a row takes as long as four.
                panel_of::<V, 4, KIND>(layer, a, places, rows - 4, panel, residual, out);
                row = rows;
            }
            while row < rows {
                panel_of::<V, 1, KIND>(layer, a, places, row, panel, residual, out);
                row += 1;
            }
        }
    }
}

/// [`block`] with as many vectors as the panel has: the last one may have one only.
///
/// # Safety
/// As [`block`].
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[inline(always)]
unsafe fn panel_of<V: F32s, const ROWS: usize, const KIND: usize>(
    layer: &Linear,
    a: *const f32,
    places: Places<'_>,
    row: usize,
    panel: usize,
    residual: *const f32,
    out: *mut f32,
) {
    // SAFETY: this function's contract.
    unsafe {
        if (panel + 1) * VECTORS * V::LANES <= layer.bias.len() {
            block::<V, ROWS, VECTORS, KIND>(layer, a, places, row, panel, residual, out);
        } else {
            block::<V, ROWS, 1, KIND>(layer, a, places, row, panel, residual, out);
        }
    }
}

/// `ROWS` rows times one panel of `N` vectors. For [`POOLED`] `row` counts windows, of which these rows make `ROWS / WINDOW`.
///
/// # Safety
/// `V`'s instruction set must be there; rows `row..row + ROWS` and `panel` must lie within `a` (through `places` unless `KIND` is [`GATHERED`]),
/// `out`, `residual` (null for none) and the packed weights.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[inline(always)]
unsafe fn block<V: F32s, const ROWS: usize, const N: usize, const KIND: usize>(
    layer: &Linear,
    a: *const f32,
    places: Places<'_>,
    row: usize,
    panel: usize,
    residual: *const f32,
    out: *mut f32,
) {
    let (inputs, outputs) = (layer.inputs, layer.outputs);
    let (width, at) = (N * V::LANES, panel * VECTORS * V::LANES);
    // SAFETY: this function's contract; a last vector that is not full is loaded and stored as far as the row goes.
    unsafe {
        let mut w = layer.packed.as_ptr().add(at * inputs);
        let stride = match KIND {
            GATHERED | POOLED => inputs,
            SCATTERED_BY_2 => 2,
            _ => places.row_stride,
        };
        let a = a.add(if KIND == POOLED { 2 * row } else { row } * stride);
        // Of a row of the tile, its inputs: windows have half of their pixels in each picture row.
        let from = |r: usize| if KIND == POOLED { r % (ROWS / 2) * stride + r / (ROWS / 2) * places.row_stride } else { r * stride };
        // Two vectors a row whatever `N` is, each named, here and below: what is indexed in a loop over `N` the compiler keeps in memory, which
        // costs half the speed. What `N` leaves out it drops.
        let pair = |from: *const f32| [V::load(from), if N > 1 { V::load(from.add(V::LANES)) } else { V::splat(0.0) }];
        let mut acc = [pair(layer.bias.as_ptr().add(at)); ROWS];
        if KIND == GATHERED || KIND == POOLED {
            sum_up::<V, ROWS, N>(&mut acc, a, from, w, width, inputs);
        } else {
            for k in 0..inputs {
                let [w0, w1] = pair(w);
                let tap = *places.taps.as_ptr().add(k);
                for (r, sums) in acc.iter_mut().enumerate() {
                    let x = V::splat(*a.add(from(r) + tap));
                    sums[0] = sums[0].fma(x, w0);
                    if N > 1 {
                        sums[1] = sums[1].fma(x, w1);
                    }
                }
                w = w.add(width);
            }
        }
        let live = if KIND == POOLED { ROWS / WINDOW } else { ROWS };
        if KIND == POOLED {
            for window in 0..live {
                let [a, b] = [acc[2 * window], acc[2 * window + 1]];
                let [c, d] = [acc[ROWS / 2 + 2 * window], acc[ROWS / 2 + 2 * window + 1]];
                // Zero times the sum of all is 0, or NaN where one is not a number.
                let largest = |v: usize| {
                    let sum = a[v].add(b[v]).add(c[v].add(d[v]));
                    a[v].max(b[v]).max(c[v].max(d[v])).fma(sum, V::splat(0.0))
                };
                acc[window] = [largest(0), if N > 1 { largest(1) } else { V::splat(0.0) }];
            }
        }
        // The constant comes first: x86 min and max return their second operand when one is NaN, so NaN stays.
        match layer.activation {
            Activation::None => {}
            Activation::Relu => acc.iter_mut().take(live).for_each(|y| *y = [V::splat(0.0).max(y[0]), V::splat(0.0).max(y[1])]),
            Activation::Relu6 => {
                acc.iter_mut()
                    .take(live)
                    .for_each(|y| *y = [V::splat(6.0).min(V::splat(0.0).max(y[0])), V::splat(6.0).min(V::splat(0.0).max(y[1]))]);
            }
        }
        let (place, left) = (row * outputs + at, outputs - at);
        // A panel with a last vector that is not full takes the careful way.
        if left >= width {
            let out = out.add(place);
            if !residual.is_null() {
                let residual = residual.add(place);
                for (r, y) in acc.iter_mut().enumerate() {
                    y[0] = y[0].add(V::load(residual.add(r * outputs)));
                    if N > 1 {
                        y[1] = y[1].add(V::load(residual.add(r * outputs + V::LANES)));
                    }
                }
            }
            for (r, y) in acc.iter().enumerate().take(live) {
                y[0].store(out.add(r * outputs));
                if N > 1 {
                    y[1].store(out.add(r * outputs + V::LANES));
                }
            }
        } else {
            let out = out.add(place);
            let last = left - (N - 1) * V::LANES;
            if !residual.is_null() {
                let residual = residual.add(place);
                for (r, y) in acc.iter_mut().enumerate() {
                    if N > 1 {
                        y[0] = y[0].add(V::load(residual.add(r * outputs)));
                        y[1] = y[1].add(V::load_first(residual.add(r * outputs + V::LANES), last));
                    } else {
                        y[0] = y[0].add(V::load_first(residual.add(r * outputs), last));
                    }
                }
            }
            for (r, y) in acc.iter().enumerate().take(live) {
                if N > 1 {
                    y[0].store(out.add(r * outputs));
                    y[1].store_first(out.add(r * outputs + V::LANES), last);
                } else {
                    y[0].store_first(out.add(r * outputs), last);
                }
            }
        }
    }
}

/// Adds products to `ROWS` rows of two vectors: value `l` of row `r` of the left side, `left[place(r) + l]`, times the `N` vectors at
/// `right[l * right_stride]`, for each `l` below `depth`.
///
/// # Safety
/// `V`'s instruction set must be there; both sides reach as far as that.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[inline(always)]
pub(super) unsafe fn sum_up<V: F32s, const ROWS: usize, const N: usize>(
    acc: &mut [[V; 2]; ROWS],
    left: *const f32,
    place: impl Fn(usize) -> usize,
    mut right: *const f32,
    right_stride: usize,
    depth: usize,
) {
    // SAFETY: this function's contract.
    unsafe {
        // Two vectors a row whatever `N` is, each named: see `block`.
        let pair = |from: *const f32| [V::load(from), if N > 1 { V::load(from.add(V::LANES)) } else { V::splat(0.0) }];
        let mut l = 0;
        while V::BY_FOUR && l + 4 <= depth {
            let mut x = [V::four(left.add(l)); ROWS];
            for (r, x) in x.iter_mut().enumerate().skip(1) {
                *x = V::four(left.add(place(r) + l));
            }
            macro_rules! lane {
                ($i:literal) => {
                    let [y0, y1] = pair(right.add($i * right_stride));
                    for (sums, x) in acc.iter_mut().zip(x) {
                        sums[0] = sums[0].fma_of::<$i>(x, y0);
                        if N > 1 {
                            sums[1] = sums[1].fma_of::<$i>(x, y1);
                        }
                    }
                };
            }
            lane!(0);
            lane!(1);
            lane!(2);
            lane!(3);
            right = right.add(4 * right_stride);
            l += 4;
        }
        for l in l..depth {
            let [y0, y1] = pair(right);
            for (r, sums) in acc.iter_mut().enumerate() {
                let x = V::splat(*left.add(place(r) + l));
                sums[0] = sums[0].fma(x, y0);
                if N > 1 {
                    sums[1] = sums[1].fma(x, y1);
                }
            }
            right = right.wrapping_add(right_stride);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::values;
    use super::*;
    use proptest::prelude::*;

    fn check(rows: usize, inputs: usize, outputs: usize, activation: Activation, with_residual: bool, seed: u64) {
        let a = values(rows * inputs, seed);
        let w = values(inputs * outputs, seed + 1);
        let b = values(outputs, seed + 2);
        let residual = values(rows * outputs, seed + 3);
        let residual = with_residual.then_some(residual.as_slice());
        let mut wanted = vec![0.0; rows * outputs];
        Linear::new(&w, &b, inputs, outputs, activation, Isa::Generic).run(&a, residual, &mut wanted);
        for isa in Isa::all_available() {
            let mut got = vec![f32::NAN; rows * outputs];
            Linear::new(&w, &b, inputs, outputs, activation, isa).run(&a, residual, &mut got);
            for (i, (x, y)) in got.iter().zip(&wanted).enumerate() {
                assert!(
                    (x - y).abs() <= 1e-5 * (inputs as f32).sqrt().max(1.0),
                    "{} {rows}x{inputs}x{outputs} at {i}: {x} {y}",
                    isa.name()
                );
            }
        }
    }

    #[test]
    fn the_sizes_of_the_model_agree_with_the_oracle() {
        for (rows, inputs, outputs) in [(196, 272, 256), (196, 256, 272), (196, 128, 512), (49, 3, 5), (1, 1, 1), (13, 24, 96), (0, 4, 4)] {
            check(rows, inputs, outputs, Activation::Relu, true, 7);
        }
    }

    #[test]
    fn scattered_rows_give_what_gathered_rows_give() {
        for isa in Isa::all_available() {
            for (rows, inputs, outputs, row_stride) in [(1, 1, 1, 1), (111, 27, 16, 2), (30, 9, 40, 3), (0, 4, 4, 1), (5, 0, 3, 1)] {
                let taps: Vec<usize> = (0..inputs).map(|k| k * 13 % 41).collect();
                let a = values(41 + rows * row_stride, 9);
                let layer = Linear::new(&values(inputs * outputs, 1), &values(outputs, 2), inputs, outputs, Activation::Relu6, isa);
                let gathered: Vec<f32> = (0..rows).flat_map(|r| taps.iter().map(move |tap| tap + r * row_stride)).map(|at| a[at]).collect();
                let (mut got, mut wanted) = (vec![f32::NAN; rows * outputs], vec![0.0; rows * outputs]);
                layer.run_scattered(&a, &taps, row_stride, &mut got);
                if inputs > 0 {
                    layer.run(&gathered, None, &mut wanted);
                    assert_eq!(got, wanted, "{} {rows}x{inputs}x{outputs}", isa.name());
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "outside")]
    fn taps_outside_the_input_are_refused() {
        Linear::new(&[1.0; 2], &[0.0], 2, 1, Activation::None, Isa::best()).run_scattered(&[0.0; 8], &[0, 5], 2, &mut [0.0; 3]);
    }

    #[test]
    fn not_a_number_is_never_hidden_by_an_activation() {
        for isa in Isa::all_available() {
            for activation in [Activation::None, Activation::Relu, Activation::Relu6] {
                let layer = Linear::new(&[1.0; 40], &[0.0; 40], 1, 40, activation, isa);
                let mut out = [0.0; 40];
                layer.run(&[f32::NAN], None, &mut out);
                assert!(out.iter().all(|x| x.is_nan()), "{} {activation:?}", isa.name());
            }
        }
    }

    #[test]
    fn pooled_is_what_a_pooling_after_it_gives() {
        for (width, inputs, outputs) in [(160, 16, 32), (14, 5, 33), (7, 3, 20), (2, 1, 1), (1, 4, 4), (26, 40, 7)] {
            for activation in [Activation::None, Activation::Relu, Activation::Relu6] {
                let (w, b) = (values(inputs * outputs, 1), values(outputs, 2));
                let rows = values(2 * width * inputs, 3);
                for isa in Isa::all_available() {
                    let layer = Linear::new(&w, &b, inputs, outputs, activation, isa);
                    let mut every = vec![0.0; 2 * width * outputs];
                    layer.run(&rows, None, &mut every);
                    let mut got = vec![f32::NAN; width / 2 * outputs];
                    layer.run_pooled(&rows, width, &mut got);
                    for (at, y) in got.iter().enumerate() {
                        let (x, n) = (at / outputs * 2, at % outputs);
                        let window = [x, x + 1, width + x, width + x + 1].map(|pixel| every[pixel * outputs + n]);
                        let wanted = window.into_iter().fold(f32::NEG_INFINITY, f32::max);
                        assert_eq!(*y, wanted, "{} {width}x{inputs}x{outputs} at {at}, to the bit", isa.name());
                    }
                }
            }
        }
    }

    #[test]
    fn not_a_number_in_a_window_is_never_hidden() {
        for isa in Isa::all_available() {
            for bad in 0..4 {
                let layer = Linear::new(&values(24, 1), &[0.0; 6], 4, 6, Activation::Relu6, isa);
                let mut rows = values(2 * 10 * 4, 2);
                rows[(bad / 2 * 10 + 4 + bad % 2) * 4 + 1] = f32::NAN;
                let mut out = vec![0.0; 5 * 6];
                layer.run_pooled(&rows, 10, &mut out);
                assert!(out[12..18].iter().all(|y| y.is_nan()), "{} pixel {bad}", isa.name());
                assert!(out[..12].iter().chain(&out[18..]).all(|y| y.is_finite()), "{} pixel {bad}", isa.name());
            }
        }
    }

    proptest! {
        #[test]
        fn any_size_agrees_with_the_oracle(rows in 0usize..40, inputs in 1usize..70, outputs in 1usize..100, kind in 0u8..3, residual: bool, seed: u64) {
            let activation = [Activation::None, Activation::Relu, Activation::Relu6][usize::from(kind)];
            check(rows, inputs, outputs, activation, residual, seed >> 8);
        }
    }
}
