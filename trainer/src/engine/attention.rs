//! One attention of one sample, head by head: the scores of a head live in the second-level cache, heads are columns of the projected rows and are
//! never copied.

use super::model::{Buffer, SLACK, stride_of};
use super::rows::{self, Dropout};
use cull::kernels::aligned::Aligned;
use cull::kernels::gemm::{Left, Right, Start, gemm};
use cull::kernels::isa::Isa;
use cull::kernels::vectorise::vectorise;

/// Rows of scores computed, normalised and used before the next.
const ROWS_AT_ONCE: usize = 28;

/// Shape of every attention of a model.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Tokens of queries, keys and values.
    pub tokens: usize,
    /// Heads.
    pub heads: usize,
    /// Channels of a head.
    pub width: usize,
}

impl Shape {
    /// From row to row of the scores: whole lines, so that loops have no rest.
    pub fn stride(&self) -> usize {
        stride_of(self.tokens)
    }

    /// Probabilities of all heads of a sample.
    pub fn probabilities(&self) -> usize {
        self.heads * self.tokens * self.stride()
    }
}

/// Additive mask, `[tokens, stride]`: 0, or minus infinity where the pair is forbidden and behind the last token.
pub fn additive_mask(shape: Shape, forbidden: &[f32]) -> Vec<f32> {
    let mut mask = vec![f32::NEG_INFINITY; shape.tokens * shape.stride()];
    for (line, row) in mask.chunks_exact_mut(shape.stride()).zip(forbidden.chunks_exact(shape.tokens)) {
        for (cell, forbidden) in line.iter_mut().zip(row) {
            if *forbidden == 0.0 {
                *cell = 0.0;
            }
        }
    }
    mask
}

/// Rows of a sample's queries, keys or values of all heads.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    /// From the sample's first row, first head on.
    pub data: &'a [f32],
    /// From row to row.
    pub stride: usize,
}

/// Memory for one head.
pub struct Scratch {
    /// Keys or values of a head, transposed, `[width, stride]`.
    turned: Aligned<f32>,
    /// `[tokens, stride]`.
    scores: Aligned<f32>,
    /// `[tokens, stride]`.
    dropped: Aligned<f32>,
}

impl Scratch {
    /// For attentions of this shape.
    pub fn new(shape: Shape) -> Self {
        let square = shape.tokens * shape.stride() + SLACK;
        Self {
            turned: Aligned::zeroed(shape.width * shape.stride() + SLACK),
            scores: Aligned::zeroed(square),
            dropped: Aligned::zeroed(square),
        }
    }
}

fn turn(isa: Isa, from: Rows<'_>, head: usize, shape: Shape, to: &mut [f32]) {
    let (first, stride) = (head * shape.width, shape.stride());
    vectorise(
        isa,
        #[inline(always)]
        || {
            for (j, row) in from.data.chunks(from.stride).take(shape.tokens).enumerate() {
                for (line, x) in to.chunks_exact_mut(stride).zip(&row[first..first + shape.width]) {
                    line[j] = *x;
                }
            }
        },
    );
}

/// `softmax(q k^T / sqrt(width) + mask)`, dropped, times `v`, into the columns of `out`. `kept` is [`Shape::probabilities`] long. `dropout` comes with
/// the sample's random numbers.
#[allow(clippy::too_many_arguments)]
pub fn forward(
    isa: Isa,
    shape: Shape,
    [q, k, v]: [Rows<'_>; 3],
    mask: &[f32],
    dropout: Option<(Dropout, super::random::Key)>,
    kept: &mut [f32],
    out: &mut [f32],
    out_stride: usize,
    scratch: &mut Scratch,
) {
    let Shape { tokens, width, .. } = shape;
    let stride = shape.stride();
    let scale = 1.0 / (width as f32).sqrt();
    for (head, kept) in kept.chunks_exact_mut(tokens * stride).enumerate() {
        let at = head * width;
        turn(isa, k, head, shape, &mut scratch.turned);
        let keys = Right::rows(&scratch.turned, stride, isa);
        for first in (0..tokens).step_by(ROWS_AT_ONCE) {
            let n = ROWS_AT_ONCE.min(tokens - first);
            let queries = Left::rows(&q.data[first * q.stride + at..], q.stride);
            gemm(isa, [n, tokens, width], queries, keys, Start::Zero, &mut scratch.scores, stride);
            let (scores, lines) = (&mut scratch.scores[..n * stride], first * stride..(first + n) * stride);
            vectorise(
                isa,
                #[inline(always)]
                || rows::attend(scores, &mut kept[lines.clone()], &mask[lines], stride, scale, dropout, head * tokens + first),
            );
            let weights = Left::rows(&scratch.scores, stride);
            let values = Right::rows(&v.data[at..], v.stride, isa);
            gemm(isa, [n, width, tokens], weights, values, Start::Zero, &mut out[first * out_stride + at..], out_stride);
        }
    }
}

/// Gradients of `[q, k, v]` from that of the mixed values, written to the columns of `gradients` at the places of `to`, rows `stride` apart.
#[allow(clippy::too_many_arguments)]
pub fn backward(
    isa: Isa,
    shape: Shape,
    [q, k, v]: [Rows<'_>; 3],
    dropout: Option<Dropout>,
    kept: &[f32],
    mixed: Rows<'_>,
    gradients: &mut [f32],
    to: [usize; 3],
    gradients_stride: usize,
    scratch: &mut Scratch,
) {
    let Shape { tokens, width, .. } = shape;
    let stride = shape.stride();
    let scale = 1.0 / (width as f32).sqrt();
    for (head, kept) in kept.chunks_exact(tokens * stride).enumerate() {
        let at = head * width;
        turn(isa, v, head, shape, &mut scratch.turned);
        for first in (0..tokens).step_by(ROWS_AT_ONCE) {
            let n = ROWS_AT_ONCE.min(tokens - first);
            let out = Left::rows(&mixed.data[first * mixed.stride + at..], mixed.stride);
            let values = Right::rows(&scratch.turned, stride, isa);
            let lines = first * stride..(first + n) * stride;
            gemm(isa, [n, tokens, width], out, values, Start::Zero, &mut scratch.scores[lines.clone()], stride);
            let (scores, dropped) = (&mut scratch.scores[lines.clone()], &mut scratch.dropped[lines.clone()]);
            vectorise(
                isa,
                #[inline(always)]
                || rows::attend_backward(scores, dropped, &kept[lines], stride, scale, dropout),
            );
        }
        let [to_q, to_k, to_v] = to.map(|first| first + at);
        let keys = Right::rows(&k.data[at..], k.stride, isa);
        gemm(
            isa,
            [tokens, width, tokens],
            Left::rows(&scratch.scores, stride),
            keys,
            Start::Zero,
            &mut gradients[to_q..],
            gradients_stride,
        );
        let queries = Right::rows(&q.data[at..], q.stride, isa);
        let turned = Left::transposed(&scratch.scores, stride);
        gemm(isa, [tokens, width, tokens], turned, queries, Start::Zero, &mut gradients[to_k..], gradients_stride);
        let out = Right::rows(&mixed.data[at..], mixed.stride, isa);
        let turned = Left::transposed(&scratch.dropped, stride);
        gemm(isa, [tokens, width, tokens], turned, out, Start::Zero, &mut gradients[to_v..], gradients_stride);
    }
}

/// Rows of one sample in a buffer of several, from column `column` on.
pub fn sample_rows(buffer: &Buffer, sample: usize, tokens: usize, column: usize) -> Rows<'_> {
    Rows { data: &buffer.data[sample * tokens * buffer.stride + column..], stride: buffer.stride }
}
