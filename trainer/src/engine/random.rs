//! Random numbers by counter: a function of seed, place and index, so that the backward pass finds the forward pass's dropout again, and threads and
//! resumed runs see the same numbers without handing a generator around.

use std::f32::consts::PI;

/// Constants of the 32-bit mixer "lowbias32" (Wellons 2018).
const MIX: [u32; 2] = [0x7feb_352d, 0x846c_a68b];

/// One stream of random numbers.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    add: u32,
    flip: u32,
}

/// SplitMix64's finaliser.
pub fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

impl Key {
    /// The stream of a place in the model (`site`) and a sample of the batch under `seed`.
    pub fn new(seed: u64, site: u32, sample: usize) -> Self {
        let place = (u64::from(site) << 40) ^ sample as u64;
        let mixed = mix(mix(seed.wrapping_add(0x9e37_79b9_7f4a_7c15)) ^ mix(place.wrapping_add(1)));
        Self { add: mixed as u32, flip: (mixed >> 32) as u32 }
    }

    /// Number `counter` of the stream, uniform over 32 bits; the low bits are weaker than the high ones.
    #[inline(always)]
    pub fn bits(self, counter: u32) -> u32 {
        let mut x = counter.wrapping_add(self.add);
        x = (x ^ (x >> 16)).wrapping_mul(MIX[0]);
        x = (x ^ (x >> 15) ^ self.flip).wrapping_mul(MIX[1]);
        x ^ (x >> 16)
    }

    /// Number `counter` of the stream, standard normal (Box-Muller, one of its two).
    #[inline(always)]
    pub fn normal(self, counter: u32) -> f32 {
        const UNIT: f32 = 1.0 / (1 << 24) as f32;
        let (a, b) = (self.bits(counter.wrapping_mul(2)), self.bits(counter.wrapping_mul(2) | 1));
        // (0, 1]
        let radius = ((a >> 8) as i32 + 1) as f32 * UNIT;
        // [-1/2, 1/2)
        let turn = (b >> 8) as i32 as f32 * UNIT - 0.5;
        let s = sine(PI * turn);
        (-2.0 * logarithm(radius)).sqrt() * (1.0 - 2.0 * s * s)
    }
}

/// Natural logarithm on (0, 1], Cephes `logf`.
#[inline(always)]
fn logarithm(x: f32) -> f32 {
    let bits = x.to_bits();
    let exponent = (bits >> 23) as i32 - 126;
    let mantissa = f32::from_bits((bits & 0x007f_ffff) | 0x3f00_0000);
    let small = mantissa < std::f32::consts::FRAC_1_SQRT_2;
    let e = if small { exponent - 1 } else { exponent } as f32;
    let m = if small { mantissa + mantissa - 1.0 } else { mantissa - 1.0 };
    let mut p = 7.037_683_6e-2;
    for c in
        [-1.151_461e-1, 1.167_699_9e-1, -1.242_014_1e-1, 1.424_932_3e-1, -1.666_805_8e-1, 2.000_071_5e-1, -2.499_999_4e-1, 3.333_333e-1]
    {
        p = p * m + c;
    }
    let z = m * m;
    m + (p * m * z - e * 2.121_944_4e-4 - 0.5 * z) + e * 0.693_359_4
}

/// Sine on [-pi/2, pi/2], Taylor to the eleventh power: error below 6e-8.
#[inline(always)]
fn sine(x: f32) -> f32 {
    let z = x * x;
    let mut p = -2.505_210_8e-8;
    for c in [2.755_731_9e-6, -1.984_127e-4, 8.333_333e-3, -1.666_666_7e-1] {
        p = p * z + c;
    }
    x + x * z * p
}

/// e^x for x <= 0, relative error below 2e-7; exactly zero below -60, which no float sum of a softmax would notice, so that no denormal numbers arise.
#[inline(always)]
pub fn exponential(x: f32) -> f32 {
    const LOWEST: f32 = -60.0;
    /// 1.5 * 2^23: added, it leaves the nearest integer in the low bits.
    const MAGIC: f32 = 12_582_912.0;
    let inside = x > LOWEST;
    let c = if inside { x } else { LOWEST };
    let t = c * std::f32::consts::LOG2_E + MAGIC;
    let n = t - MAGIC;
    let r = c - n * 0.693_359_4 + n * 2.121_944_4e-4;
    // Minimax polynomial of (e^r - 1 - r) / r^2 (Cephes expf).
    let mut p = 1.987_569_1e-4;
    for k in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p * r + k;
    }
    let value = p * r * r + r + 1.0;
    let power = f32::from_bits((t.to_bits() << 23).wrapping_add(0x3f80_0000));
    if inside { value * power } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exponential_is_one() {
        for i in 0..6000 {
            let x = -i as f32 * 0.01;
            let error = f64::from(exponential(x)) / f64::from(x).exp() - 1.0;
            assert!(error.abs() < 2e-7 || x <= -60.0, "e^{x}: {error}");
        }
        assert_eq!(exponential(f32::NEG_INFINITY), 0.0);
        assert_eq!(exponential(-61.0), 0.0);
        assert_eq!(exponential(0.0), 1.0);
    }

    #[test]
    fn bits_are_uniform_and_streams_differ() {
        const N: u32 = 1 << 18;
        for (site, sample) in [(0, 0), (0, 1), (7, 0), (900, 63)] {
            let key = Key::new(5, site, sample);
            // Share under a threshold, for each of 64 thresholds: within five standard deviations.
            for part in 1..64u32 {
                let under = (0..N).filter(|c| key.bits(*c) < part << 26).count() as f64;
                let p = f64::from(part) / 64.0;
                let deviation = (f64::from(N) * p * (1.0 - p)).sqrt();
                assert!((under - f64::from(N) * p).abs() < 5.0 * deviation, "{site} {sample}: {under} under {p}");
            }
            // Neighbours and the same place of another stream do not agree more often than chance.
            let other = Key::new(5, site, sample + 1);
            let low = |x: u32| x < 1 << 31;
            let alike = (0..N).filter(|c| low(key.bits(*c)) == low(other.bits(*c))).count() as f64;
            let next = (0..N).filter(|c| low(key.bits(*c)) == low(key.bits(*c + 1))).count() as f64;
            for count in [alike, next] {
                assert!((count - f64::from(N) / 2.0).abs() < 5.0 * (f64::from(N) / 4.0).sqrt(), "{count}");
            }
        }
    }

    #[test]
    fn normals_are_normal() {
        const N: u32 = 1 << 18;
        let key = Key::new(9, 1, 2);
        let all: Vec<f64> = (0..N).map(|c| f64::from(key.normal(c))).collect();
        let n = f64::from(N);
        let moment = |power: i32| all.iter().map(|x| x.powi(power)).sum::<f64>() / n;
        // Standard errors of the first four moments: 1, sqrt 2, sqrt 15, sqrt 96 over sqrt n.
        for (power, wanted, spread) in [(1, 0.0, 1.0), (2, 1.0, 2f64.sqrt()), (3, 0.0, 15f64.sqrt()), (4, 3.0, 96f64.sqrt())] {
            let error = (moment(power) - wanted) / (spread / n.sqrt());
            assert!(error.abs() < 5.0, "moment {power}: {} standard errors off", error);
        }
        for (at, below) in [(-2.0, 0.022_750), (-1.0, 0.158_655), (0.0, 0.5), (0.5, 0.691_462), (3.0, 0.998_650)] {
            let share = all.iter().filter(|x| **x < at).count() as f64 / n;
            assert!((share - below).abs() < 5.0 * (below * (1.0 - below) / n).sqrt(), "{share} below {at}");
        }
    }
}
