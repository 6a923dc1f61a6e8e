//! Made-up numbers and rows for the kernels' tests.

use super::source::Source;

/// `n` numbers between -1 and 1, the same for the same seed.
pub(super) fn values(n: usize, seed: u64) -> Vec<f32> {
    let mut s = seed | 1;
    (0..n)
        .map(|_| {
            s = s.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((s >> 40) as f32 / (1u32 << 24) as f32) * 2.0 - 1.0
        })
        .collect()
}

/// Likewise between -2 and 2.
pub(super) fn wide_values(n: usize, seed: u64) -> Vec<f32> {
    values(n, seed).into_iter().map(|v| 2.0 * v).collect()
}

/// Runs `work` on the rows of `picture`, of `line` values each, that are made when they are asked for: each at most once, in order.
pub(super) fn made(picture: &[f32], line: usize, work: impl FnOnce(Source<'_>)) {
    let (mut asked, mut room) = (Vec::new(), vec![f32::NAN; line]);
    let mut make = |y: usize, row: &mut [f32]| {
        asked.push(y);
        row.copy_from_slice(&picture[y * line..][..line]);
    };
    work(Source::Made { make: &mut make, room: &mut room });
    assert!(asked.windows(2).all(|pair| pair[0] < pair[1]), "each row at most once, in order: {asked:?}");
}
