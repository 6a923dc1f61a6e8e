//! What happens to rows between the matrix products: plain loops, compiled for the machine by [`cull::kernels::vectorise`].

use super::random::{Key, exponential};

/// Sums are kept in this many parts, so that they need not wait for each other.
const LANES: usize = 32;
/// Lanes in a row of attention: its rows are padded to whole ones.
pub const LINE: usize = 16;
/// Epsilon of every layer normalisation (PyTorch's default, which the paper uses).
const NORM_EPSILON: f32 = 1e-5;

/// Dropout of one step.
#[derive(Clone, Copy, Debug)]
pub struct Dropout {
    seed: u64,
    /// Elements whose random number is below it are dropped.
    threshold: u32,
    /// What the others are multiplied with.
    scale: f32,
}

impl Dropout {
    /// Dropping a share `p` of the elements; `None` where that is none.
    pub fn new(p: f64, seed: u64) -> Option<Self> {
        (p > 0.0).then(|| Self { seed, threshold: (p * f64::from(u32::MAX)) as u32, scale: (1.0 / (1.0 - p)) as f32 })
    }

    /// Random numbers of a place in the model for one sample.
    pub fn key(&self, site: u32, sample: usize) -> Key {
        Key::new(self.seed, site, sample)
    }

    #[inline(always)]
    fn keeps(self, key: Key, counter: usize) -> bool {
        key.bits(counter as u32) >= self.threshold
    }
}

/// Where in the batch rows lie: `tokens` of them a sample, the first row belonging to sample `sample`.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Sample of the first row.
    pub sample: usize,
    /// Rows a sample.
    pub tokens: usize,
}

/// Rows `stride` apart that come around after `period`.
#[derive(Clone, Copy, Debug)]
pub struct Cyclic<'a> {
    /// Elements.
    pub data: &'a [f32],
    /// From row to row.
    pub stride: usize,
    /// Rows after which the first comes again.
    pub period: usize,
}

impl<'a> Cyclic<'a> {
    #[inline(always)]
    fn row(&self, row: usize, width: usize) -> &'a [f32] {
        &self.data[row % self.period * self.stride..][..width]
    }
}

/// Sum of `value(x, y)` over two rows of one length.
#[inline(always)]
fn sum(xs: &[f32], ys: &[f32], value: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let ((xs, x_rest), (ys, y_rest)) = (xs.as_chunks::<LANES>(), ys.as_chunks::<LANES>());
    for (xs, ys) in xs.iter().zip(ys) {
        for ((lane, x), y) in lanes.iter_mut().zip(xs).zip(ys) {
            *lane += value(*x, *y);
        }
    }
    let rest: f32 = x_rest.iter().zip(y_rest).map(|(x, y)| value(*x, *y)).sum();
    lanes.iter().sum::<f32>() + rest
}

/// Mean and deviation of layer normalisation.
pub struct NormOut<'a> {
    /// Normalised rows before scale and bias.
    pub normalised: &'a mut [f32],
    /// Rows after them.
    pub out: &'a mut [f32],
    /// One over the deviation, a row.
    pub inverse: &'a mut [f32],
    /// From row to row of both.
    pub stride: usize,
}

/// `out = norm(residual + dropout(branch))` for rows `first..first + n` of a micro-batch; `branch` holds just those rows.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
pub fn add_norm(
    branch: &[f32],
    branch_stride: usize,
    residual: Cyclic<'_>,
    (first, n, width): (usize, usize, usize),
    (scale, bias): (&[f32], &[f32]),
    dropout: Option<(Dropout, u32)>,
    place: Place,
    to: NormOut<'_>,
) {
    let (scale, bias) = (&scale[..width], &bias[..width]);
    for r in 0..n {
        let row = first + r;
        let a = &branch[r * branch_stride..][..width];
        let x = residual.row(row, width);
        let h = &mut to.normalised[row * to.stride..][..width];
        match dropout {
            Some((dropout, site)) => {
                let key = dropout.key(site, place.sample + row / place.tokens);
                let from = row % place.tokens * width;
                for (c, ((h, a), x)) in h.iter_mut().zip(a).zip(x).enumerate() {
                    *h = x + if dropout.keeps(key, from + c) { a * dropout.scale } else { 0.0 };
                }
            }
            None => {
                for ((h, a), x) in h.iter_mut().zip(a).zip(x) {
                    *h = x + a;
                }
            }
        }
        normalise(h, scale, bias, &mut to.out[row * to.stride..][..width], &mut to.inverse[row]);
    }
}

/// Layer normalisation of `from`, rows as far apart as the results.
#[inline(always)]
pub fn norm(from: &[f32], rows: usize, width: usize, (scale, bias): (&[f32], &[f32]), to: NormOut<'_>) {
    for row in 0..rows {
        let h = &mut to.normalised[row * to.stride..][..width];
        h.copy_from_slice(&from[row * to.stride..][..width]);
        normalise(h, &scale[..width], &bias[..width], &mut to.out[row * to.stride..][..width], &mut to.inverse[row]);
    }
}

#[inline(always)]
fn normalise(h: &mut [f32], scale: &[f32], bias: &[f32], out: &mut [f32], inverse: &mut f32) {
    let width = h.len();
    let mean = sum(h, h, |x, _| x) / width as f32;
    for h in h.iter_mut() {
        *h -= mean;
    }
    let variance = sum(h, h, |x, _| x * x) / width as f32;
    let by = 1.0 / (variance + NORM_EPSILON).sqrt();
    *inverse = by;
    for (((h, y), s), b) in h.iter_mut().zip(out).zip(scale).zip(bias) {
        *h *= by;
        *y = *h * s + b;
    }
}

/// Where the gradient of a branch goes, and the dropout that it passed.
pub type Branch<'a> = (&'a mut [f32], Option<(Dropout, u32)>);

/// Backward through a layer normalisation: `gradient` of its output becomes that of its input; the gradients of scale and bias are added up. With
/// `branch`, also the gradient of the branch before its dropout.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
pub fn norm_backward(
    gradient: &mut [f32],
    stride: usize,
    (rows, width): (usize, usize),
    normalised: &[f32],
    inverse: &[f32],
    scale: &[f32],
    (scale_gradient, bias_gradient): (&mut [f32], &mut [f32]),
    branch: Option<Branch<'_>>,
    place: Place,
) {
    let scale = &scale[..width];
    let (scale_gradient, bias_gradient) = (&mut scale_gradient[..width], &mut bias_gradient[..width]);
    let mut branch = branch;
    for row in 0..rows {
        let g = &mut gradient[row * stride..][..width];
        let h = &normalised[row * stride..][..width];
        for ((((g, h), s), ds), db) in g.iter_mut().zip(h).zip(scale).zip(scale_gradient.iter_mut()).zip(bias_gradient.iter_mut()) {
            *ds += *g * h;
            *db += *g;
            *g *= s;
        }
        let mean = sum(g, g, |x, _| x) / width as f32;
        let along = sum(g, h, |x, y| x * y) / width as f32;
        let by = inverse[row];
        for (g, h) in g.iter_mut().zip(h) {
            *g = by * (*g - mean - h * along);
        }
        match &mut branch {
            None => {}
            Some((to, None)) => to[row * stride..][..width].copy_from_slice(g),
            Some((to, Some((dropout, site)))) => {
                let key = dropout.key(*site, place.sample + row / place.tokens);
                let from = row % place.tokens * width;
                for (c, (to, g)) in to[row * stride..][..width].iter_mut().zip(g).enumerate() {
                    *to = if dropout.keeps(key, from + c) { *g * dropout.scale } else { 0.0 };
                }
            }
        }
    }
}

/// `dropout(max(x, 0))` in place, rows `first..first + n` of a micro-batch; `rows` holds just those.
#[inline(always)]
pub fn rectify(rows: &mut [f32], stride: usize, (first, n, width): (usize, usize, usize), dropout: Option<(Dropout, u32)>, place: Place) {
    for r in 0..n {
        let row = first + r;
        let line = &mut rows[r * stride..][..width];
        match dropout {
            Some((dropout, site)) => {
                let key = dropout.key(site, place.sample + row / place.tokens);
                let from = row % place.tokens * width;
                for (c, x) in line.iter_mut().enumerate() {
                    // NaN stays NaN: a broken model must be noticed, not smoothed over.
                    let y = if *x < 0.0 { 0.0 } else { *x * dropout.scale };
                    *x = if dropout.keeps(key, from + c) { y } else { 0.0 };
                }
            }
            None => {
                for x in line {
                    *x = if *x < 0.0 { 0.0 } else { *x };
                }
            }
        }
    }
}

/// Backward of [`rectify`]: what was cut or dropped is zero in `hidden`, and nothing else is.
#[inline(always)]
pub fn rectify_backward(gradient: &mut [f32], hidden: &[f32], stride: usize, (n, width): (usize, usize), dropout: Option<Dropout>) {
    let scale = dropout.map_or(1.0, |d| d.scale);
    for r in 0..n {
        let line = &mut gradient[r * stride..][..width];
        for (g, h) in line.iter_mut().zip(&hidden[r * stride..][..width]) {
            *g = if *h > 0.0 { *g * scale } else { 0.0 };
        }
    }
}

/// Adds rows to a table of `period` rows: row `r` to row `r % period`.
#[inline(always)]
pub fn add_cyclic(table: &mut [f32], table_stride: usize, period: usize, rows: &[f32], stride: usize, (n, width): (usize, usize)) {
    for r in 0..n {
        let to = &mut table[r % period * table_stride..][..width];
        for (to, x) in to.iter_mut().zip(&rows[r * stride..][..width]) {
            *to += x;
        }
    }
}

/// `into += from`.
#[inline(always)]
pub fn add(into: &mut [f32], from: &[f32]) {
    for (a, b) in into.iter_mut().zip(from) {
        *a += b;
    }
}

/// `rows` become the gradient of the mean squared error to `target` (rows `width` apart), a mean over `1 / share` elements. Returns the sum of squares.
#[inline(always)]
pub fn squared_error(rows: &mut [f32], stride: usize, target: &[f32], (n, width): (usize, usize), share: f32) -> f64 {
    let mut total = 0.0;
    for (r, t) in target.chunks_exact(width).take(n).enumerate() {
        let line = &mut rows[r * stride..][..width];
        for (y, t) in line.iter_mut().zip(t) {
            *y -= t;
        }
        total += f64::from(sum(line, line, |x, _| x * x));
        for y in line {
            *y *= 2.0 * share;
        }
    }
    total
}

/// Feature jittering (paper, section 3.4) of one sample's rows: `x + N(0, 1) * ||x||_2 * factor`.
#[inline(always)]
pub fn jitter(from: &[f32], to: &mut [f32], stride: usize, width: usize, factor: f32, key: Key) {
    for (row, x) in from.chunks_exact(width).enumerate() {
        let size = sum(x, x, |x, _| x * x).sqrt() * factor;
        for (c, (y, x)) in to[row * stride..][..width].iter_mut().zip(x).enumerate() {
            *y = x + key.normal((row * width + c) as u32) * size;
        }
    }
}

/// Softmax of rows of scores in place, then dropout. `first` is the rows' number in the head, counted on over the heads, for the random numbers.
/// `kept` remembers for the backward pass: the probability, negative where it was dropped.
#[inline(always)]
pub fn attend(
    scores: &mut [f32],
    kept: &mut [f32],
    mask: &[f32],
    stride: usize,
    scale: f32,
    dropout: Option<(Dropout, Key)>,
    first: usize,
) {
    let rows = scores.chunks_exact_mut(stride).zip(kept.chunks_exact_mut(stride)).zip(mask.chunks_exact(stride));
    for (r, ((s, kept), mask)) in rows.enumerate() {
        let mut most = [f32::NEG_INFINITY; LINE];
        let (lines, masks) = (s.as_chunks_mut::<LINE>().0, mask.as_chunks::<LINE>().0);
        for (s, m) in lines.iter_mut().zip(masks) {
            for ((s, m), most) in s.iter_mut().zip(m).zip(&mut most) {
                *s = *s * scale + m;
                *most = if *s > *most { *s } else { *most };
            }
        }
        let most = most.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut total = [0f32; LINE];
        for s in lines.iter_mut() {
            for (s, total) in s.iter_mut().zip(&mut total) {
                *s = exponential(*s - most);
                *total += *s;
            }
        }
        let by = 1.0 / total.iter().sum::<f32>();
        match dropout {
            Some((dropout, key)) => {
                let from = (first + r) * stride;
                for (c, (s, kept)) in s.iter_mut().zip(kept).enumerate() {
                    let p = *s * by;
                    let keep = dropout.keeps(key, from + c);
                    *kept = if keep { p } else { -p };
                    *s = if keep { p * dropout.scale } else { 0.0 };
                }
            }
            None => {
                for (s, kept) in s.iter_mut().zip(kept) {
                    *s *= by;
                    *kept = *s;
                }
            }
        }
    }
}

/// Backward of [`attend`]: `gradient` of the dropped probabilities becomes that of the unscaled scores; `dropped` gets the probabilities as they were
/// multiplied with the values.
#[inline(always)]
pub fn attend_backward(gradient: &mut [f32], dropped: &mut [f32], kept: &[f32], stride: usize, scale: f32, dropout: Option<Dropout>) {
    let by = dropout.map_or(1.0, |d| d.scale);
    let rows = gradient.chunks_exact_mut(stride).zip(dropped.chunks_exact_mut(stride)).zip(kept.chunks_exact(stride));
    for ((g, dropped), kept) in rows {
        let mut along = [0f32; LINE];
        for ((g, d), p) in g.as_chunks_mut::<LINE>().0.iter_mut().zip(dropped.as_chunks_mut::<LINE>().0).zip(kept.as_chunks::<LINE>().0) {
            for (((g, d), p), along) in g.iter_mut().zip(d).zip(p).zip(&mut along) {
                let kept = if *p > 0.0 { *p * by } else { 0.0 };
                *d = kept;
                *g = if *p > 0.0 { *g * by } else { 0.0 };
                *along += *g * p.abs();
            }
        }
        let along: f32 = along.iter().sum();
        for (g, p) in g.iter_mut().zip(kept) {
            *g = p.abs() * (*g - along) * scale;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `count` of `n` is what a share `p` would give, within five standard deviations.
    fn is_share(count: usize, n: usize, p: f64) {
        let (count, n) = (count as f64, n as f64);
        assert!((count - n * p).abs() < 5.0 * (n * p * (1.0 - p)).sqrt(), "{count} of {n} for a share of {p}");
    }

    #[test]
    fn dropout_drops_its_share_and_scales_the_rest() {
        let (rows, width) = (6 * 49, 512);
        for (p, seed) in [(0.1, 1), (0.5, 2), (0.9, 3)] {
            let dropout = Dropout::new(p, seed).unwrap();
            let place = Place { sample: 3, tokens: 49 };
            let mut hidden = vec![1.0; rows * width];
            rectify(&mut hidden, width, (0, rows, width), Some((dropout, 6)), place);
            is_share(hidden.iter().filter(|x| **x == 0.0).count(), hidden.len(), p);
            let scale = (1.0 / (1.0 - p)) as f32;
            assert!(hidden.iter().all(|x| *x == 0.0 || *x == scale));
            // Neither two samples, nor two rows, nor two places drop the same elements.
            let [a, b] = [0, 49].map(|row| &hidden[row * width..(row + 49) * width]);
            is_share(a.iter().zip(b).filter(|(a, b)| (**a == 0.0) && (**b == 0.0)).count(), a.len(), p * p);
            is_share(a.iter().zip(&a[width..]).filter(|(a, b)| (**a == 0.0) && (**b == 0.0)).count(), a.len() - width, p * p);
            let mut other = vec![1.0; rows * width];
            rectify(&mut other, width, (0, rows, width), Some((dropout, 7)), place);
            is_share(hidden.iter().zip(&other).filter(|(a, b)| (**a == 0.0) && (**b == 0.0)).count(), hidden.len(), p * p);
            // Rows taken in parts are the same rows.
            let mut part = vec![1.0; 100 * width];
            rectify(&mut part, width, (77, 100, width), Some((dropout, 6)), place);
            assert_eq!(part, hidden[77 * width..177 * width]);
        }
        assert!(Dropout::new(0.0, 1).is_none());
    }

    #[test]
    fn attention_drops_probabilities_and_remembers_which() {
        let (tokens, stride, p) = (196, 208, 0.1);
        let dropout = Dropout::new(p, 4).unwrap();
        let mut mask = vec![f32::NEG_INFINITY; tokens * stride];
        for (i, row) in mask.chunks_exact_mut(stride).enumerate() {
            // A band is forbidden.
            for (j, cell) in row[..tokens].iter_mut().enumerate() {
                *cell = if i.abs_diff(j) < 5 { f32::NEG_INFINITY } else { 0.0 };
            }
        }
        let before: Vec<f32> = (0..tokens * stride).map(|i| (i as f32 * 0.7).sin() * 3.0).collect();
        let (mut scores, mut kept) = (before.clone(), vec![f32::NAN; tokens * stride]);
        let key = dropout.key(2, 5);
        attend(&mut scores, &mut kept, &mask, stride, 0.5, Some((dropout, key)), 0);
        let (mut all, mut dropped) = (0, 0);
        for (i, ((s, kept), before)) in scores.chunks(stride).zip(kept.chunks(stride)).zip(before.chunks(stride)).enumerate() {
            let weights: Vec<f64> = (0..tokens).map(|j| if i.abs_diff(j) < 5 { 0.0 } else { (f64::from(before[j]) * 0.5).exp() }).collect();
            let total: f64 = weights.iter().sum();
            for j in 0..tokens {
                let wanted = weights[j] / total;
                assert!((f64::from(kept[j].abs()) - wanted).abs() < 1e-6, "{i} {j}: {} {wanted}", kept[j]);
                let after = if kept[j] > 0.0 { kept[j] / 0.9 } else { 0.0 };
                assert!((s[j] - after).abs() < 1e-7);
                if wanted > 0.0 {
                    all += 1;
                    dropped += usize::from(kept[j] < 0.0);
                }
            }
            assert!(s[tokens..].iter().all(|x| *x == 0.0), "behind the last token");
        }
        is_share(dropped, all, p);
    }

    #[test]
    fn jitter_has_the_papers_size() {
        let (width, stride, tokens, factor) = (272, 272, 196, 20.0 / 272.0);
        let from: Vec<f32> = (0..tokens * width).map(|i| (i as f32 * 0.31).sin() * (1.0 + (i / width) as f32)).collect();
        let mut to = vec![0.0; tokens * stride];
        jitter(&from, &mut to, stride, width, factor, Key::new(1, 0, 0));
        let mut squares = 0.0;
        for (x, y) in from.chunks(width).zip(to.chunks(stride)) {
            let size = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt() * f64::from(factor);
            squares += x.iter().zip(y).map(|(x, y)| (f64::from(y - x) / size).powi(2)).sum::<f64>();
        }
        let n = (tokens * width) as f64;
        // The noise over its size is standard normal: its mean square is 1, with a standard error of sqrt(2 / n).
        assert!((squares / n - 1.0).abs() < 5.0 * (2.0 / n).sqrt(), "{}", squares / n);
    }
}
