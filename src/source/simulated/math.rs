//! Arithmetic that gives the same bits on every platform: integers, and floats with nothing but `+ - * /`, `sqrt` and `floor`,
//! which IEEE 754 rounds exactly. The C library's `sin`, `exp` and `atan2` differ in the last bit between machines, so none is used.

/// SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014): tiny, copyable, seedable by hash.
#[derive(Clone, Copy)]
pub(super) struct Rng(u64);

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Rng {
    /// The stream of random numbers that belongs to (seed, part, purpose); streams do not overlap in practice.
    pub(super) fn new(seed: u64, part: u32, purpose: u32) -> Self {
        let place = (u64::from(part) << 32) | u64::from(purpose);
        Self(mix(mix(seed ^ GOLDEN).wrapping_add(mix(place.wrapping_add(GOLDEN)))))
    }

    pub(super) fn next_u32(&mut self) -> u32 {
        self.0 = self.0.wrapping_add(GOLDEN);
        (mix(self.0) >> 32) as u32
    }

    /// Uniform in [0, 1), 24 bits.
    pub(super) fn unit(&mut self) -> f32 {
        (self.next_u32() >> 8) as f32 * (1.0 / 16_777_216.0)
    }

    /// Uniform in [low, high).
    pub(super) fn range(&mut self, low: f32, high: f32) -> f32 {
        low + (high - low) * self.unit()
    }

    /// Bell-shaped around 0, about unit deviation, never beyond ±3.46: the sum of four uniforms.
    pub(super) fn bell(&mut self) -> f32 {
        let sum = (self.unit() + self.unit()) + (self.unit() + self.unit());
        (sum - 2.0) * 1.732
    }

    /// Uniform integer in 0..n (0 for n = 0).
    pub(super) fn below(&mut self, n: u32) -> u32 {
        ((u64::from(self.next_u32()) * u64::from(n)) >> 32) as u32
    }

    /// Uniform integer in -n..=n.
    pub(super) fn jitter(&mut self, n: u32) -> i32 {
        self.below(2 * n + 1) as i32 - n as i32
    }
}

/// 32 well-mixed bits of a lattice point.
pub(super) fn hash(x: i32, y: i32, seed: u32) -> u32 {
    (mix(((u64::from(x as u32)) << 32 | u64::from(y as u32)) ^ (u64::from(seed).wrapping_mul(GOLDEN))) >> 32) as u32
}

/// Uniform in [0, 1) for a lattice point.
pub(super) fn hash_unit(x: i32, y: i32, seed: u32) -> f32 {
    (hash(x, y, seed) >> 8) as f32 * (1.0 / 16_777_216.0)
}

/// 0 below `a`, 1 above `b`, smooth between.
pub(super) fn smoothstep(a: f32, b: f32, x: f32) -> f32 {
    let t = ((x - a) / (b - a)).clamp(0.0, 1.0);
    t * t * (3.0 - 2.0 * t)
}

pub(super) fn lerp(a: f32, b: f32, t: f32) -> f32 {
    a + (b - a) * t
}

/// Value noise in [-1, 1]; `period` in lattice cells makes it tile (0 for no period).
pub(super) fn noise(x: f32, y: f32, period: [i32; 2], seed: u32) -> f32 {
    let (x0, y0) = (x.floor(), y.floor());
    let (tx, ty) = (x - x0, y - y0);
    let (tx, ty) = (tx * tx * (3.0 - 2.0 * tx), ty * ty * (3.0 - 2.0 * ty));
    let wrap = |i: i32, n: i32| if n > 0 { i.rem_euclid(n) } else { i };
    let at = |dx: i32, dy: i32| hash_unit(wrap(x0 as i32 + dx, period[0]), wrap(y0 as i32 + dy, period[1]), seed);
    let top = lerp(at(0, 0), at(1, 0), tx);
    let bottom = lerp(at(0, 1), at(1, 1), tx);
    lerp(top, bottom, ty) * 2.0 - 1.0
}

/// Three octaves of [`noise`], in about [-1, 1].
pub(super) fn fbm(x: f32, y: f32, seed: u32) -> f32 {
    let none = [0, 0];
    (noise(x, y, none, seed) * 4.0 + noise(x * 2.03, y * 2.03, none, seed + 1) * 2.0 + noise(x * 4.1, y * 4.1, none, seed + 2)) / 6.0
}

/// Sine of an angle given in turns (1 = a full circle), to about 1e-4.
pub(super) fn sin_turns(turns: f32) -> f32 {
    // Fold to [-1/4, 1/4] turn, where an odd polynomial is enough.
    let t = turns - (turns + 0.5).floor();
    let t = if t > 0.25 {
        0.5 - t
    } else if t < -0.25 {
        -0.5 - t
    } else {
        t
    };
    let x = t * std::f32::consts::TAU;
    let x2 = x * x;
    x * (1.0 - x2 * (1.0 / 6.0 - x2 * (1.0 / 120.0 - x2 / 5040.0)))
}

pub(super) fn cos_turns(turns: f32) -> f32 {
    sin_turns(turns + 0.25)
}

/// Angle of (x, y) in turns, in (-0.5, 0.5], to about 1e-4.
pub(super) fn turns_of(x: f32, y: f32) -> f32 {
    let (ax, ay) = (x.abs(), y.abs());
    let (small, large) = if ax < ay { (ax, ay) } else { (ay, ax) };
    if large == 0.0 {
        return 0.0;
    }
    let z = small / large;
    let z2 = z * z;
    // Minimax arctangent on [0, 1] (Abramowitz and Stegun 4.4.49), divided by a full turn.
    let atan = z * (0.999_866 + z2 * (-0.330_299_5 + z2 * (0.180_141 + z2 * (-0.085_133 + z2 * 0.020_835_1))));
    let mut turns = atan / std::f32::consts::TAU;
    if ax < ay {
        turns = 0.25 - turns;
    }
    if x < 0.0 {
        turns = 0.5 - turns;
    }
    if y < 0.0 { -turns } else { turns }
}

pub(super) fn length(x: f32, y: f32) -> f32 {
    (x * x + y * y).sqrt()
}

/// `x^(2^n)` for x >= 0, by squaring.
pub(super) fn pow2n(x: f32, n: u32) -> f32 {
    (0..n).fold(x, |value, _| value * value)
}

/// Signed distance to a box with rounded corners, centred on the origin: negative inside.
pub(super) fn rounded_box(x: f32, y: f32, half: [f32; 2], radius: f32) -> f32 {
    let (qx, qy) = (x.abs() - half[0] + radius, y.abs() - half[1] + radius);
    length(qx.max(0.0), qy.max(0.0)) + qx.max(qy).min(0.0) - radius
}

/// Distance to a line segment.
pub(super) fn segment(x: f32, y: f32, a: [f32; 2], b: [f32; 2]) -> f32 {
    let (px, py, bx, by) = (x - a[0], y - a[1], b[0] - a[0], b[1] - a[1]);
    let span = bx * bx + by * by;
    let t = if span > 0.0 { ((px * bx + py * by) / span).clamp(0.0, 1.0) } else { 0.0 };
    length(px - bx * t, py - by * t)
}

/// Share of a pixel covered by a shape at signed distance `d` from the pixel's centre.
pub(super) fn cover(d: f32) -> f32 {
    (0.5 - d).clamp(0.0, 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sine_and_angle_are_close_to_the_library() {
        for i in -200..200 {
            let turns = i as f32 / 90.0;
            assert!((sin_turns(turns) - (turns * std::f32::consts::TAU).sin()).abs() < 3e-4, "sine at {turns}");
            let (x, y) = (cos_turns(turns), sin_turns(turns));
            let want = y.atan2(x) / std::f32::consts::TAU;
            let error = (turns_of(x, y) - want).abs();
            assert!(error < 2e-4 || (error - 1.0).abs() < 2e-4, "angle at {turns}");
        }
    }

    #[test]
    fn streams_differ_by_part_and_purpose_and_repeat() {
        let draw = |seed, part, purpose| Rng::new(seed, part, purpose).next_u32();
        assert_eq!(draw(1, 2, 3), draw(1, 2, 3));
        assert_ne!(draw(1, 2, 3), draw(1, 3, 3));
        assert_ne!(draw(1, 2, 3), draw(1, 2, 4));
        assert_ne!(draw(1, 2, 3), draw(2, 2, 3));
        let mut rng = Rng::new(1, 1, 1);
        let mean = (0..4000).map(|_| rng.unit()).sum::<f32>() / 4000.0;
        assert!((mean - 0.5).abs() < 0.03, "mean {mean}");
    }
}
