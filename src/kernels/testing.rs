//! Made-up numbers for the kernels' tests.

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
