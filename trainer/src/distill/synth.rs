//! Pictures to distil on: natural images and parts of the simulated line, procedural surfaces, shapes and damage on both, light, focus and sensor
//! noise. A picture is a function of (seed, number, side) and the pools.
//!
//! The teacher is a function; the student must agree with it on whatever a line may show, so variety matters more than realism.

use rand::{Rng, SeedableRng};
use rand_pcg::Pcg64;
use std::f32::consts::{PI, TAU};

/// Colours of a picture.
const RGB: usize = 3;
/// Share of the pictures that start from a procedural surface instead of a photograph.
const PROCEDURAL: f32 = 0.25;
/// Of the photographs, the share taken from the second pool (the simulated line), where there is one.
const SECOND_POOL: f32 = 0.15;

/// A picture to cut crops from, `[height, width, 3]`.
#[derive(Clone, Debug)]
pub struct Picture {
    /// Width, px.
    pub width: usize,
    /// Height, px.
    pub height: usize,
    /// Red, green, blue a pixel.
    pub pixels: Vec<u8>,
}

/// One sample of a standard normal distribution, nearly (sum of eight uniforms: no tails beyond 4.9).
pub fn normal(rng: &mut impl Rng) -> f32 {
    let mut sum = 0u32;
    for _ in 0..2 {
        let bits: u64 = rng.random();
        sum += (bits & 0xffff) as u32 + (bits >> 16 & 0xffff) as u32 + (bits >> 32 & 0xffff) as u32 + (bits >> 48) as u32;
    }
    // Eight uniforms on 0..65535: mean 4 * 65535, variance 8 / 12 * 65536^2.
    (sum as f32 - 4.0 * 65_535.0) / (65_536.0 * 0.816_496_6)
}

/// Makes pictures of one side, `[side, side, 3]` in 0..=255.
pub struct Synth<'a> {
    natural: &'a [Picture],
    simulated: &'a [Picture],
    seed: u64,
}

impl<'a> Synth<'a> {
    /// `natural` and `simulated` are the pools; an empty one is not drawn from.
    pub fn new(natural: &'a [Picture], simulated: &'a [Picture], seed: u64) -> Self {
        Self { natural, simulated, seed }
    }

    /// Picture number `number`, values rounded to whole grey levels.
    pub fn picture(&self, number: u64, side: usize) -> Vec<f32> {
        let rng = Pcg64::seed_from_u64(self.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ number.wrapping_mul(0xbf58_476d_1ce4_e5b9));
        let mut s = Sketch { rng, side };
        let mut x = s.start(self);
        for _ in 0..s.below(3) {
            if s.chance(0.35) {
                s.shape(&mut x, self);
            }
        }
        for _ in 0..s.below(4) {
            if s.chance(0.5) {
                s.streak(&mut x);
            }
        }
        if s.chance(0.2) {
            s.stain(&mut x);
        }
        s.light(&mut x);
        if s.chance(0.35) {
            s.blur(&mut x);
        }
        if s.chance(0.3) {
            let level = s.between(0.0, 8.0);
            for v in &mut x {
                *v += normal(&mut s.rng) * level;
            }
        }
        for v in &mut x {
            *v = v.clamp(0.0, 255.0).round();
        }
        x
    }
}

struct Sketch {
    rng: Pcg64,
    side: usize,
}

impl Sketch {
    fn between(&mut self, low: f32, high: f32) -> f32 {
        low + self.rng.random::<f32>() * (high - low)
    }

    /// 2 to a power drawn evenly.
    fn power(&mut self, low: f32, high: f32) -> f32 {
        self.between(low, high).exp2()
    }

    fn chance(&mut self, share: f32) -> bool {
        self.rng.random::<f32>() < share
    }

    fn below(&mut self, n: usize) -> usize {
        self.rng.random_range(0..n)
    }

    fn start(&mut self, from: &Synth<'_>) -> Vec<f32> {
        if self.chance(PROCEDURAL) || (from.natural.is_empty() && from.simulated.is_empty()) {
            return self.surface();
        }
        self.photograph(from)
    }

    /// A crop, zoomed, turned and mirrored; mirrored again at the edges of the photograph.
    fn photograph(&mut self, from: &Synth<'_>) -> Vec<f32> {
        let second = !from.simulated.is_empty() && (from.natural.is_empty() || self.chance(SECOND_POOL));
        let pool = if second { from.simulated } else { from.natural };
        let Some(p) = pool.get(self.rng.random_range(0..pool.len().max(1))) else { return self.surface() };
        // Source pixels a pixel; the pools hold pictures of about 300 px, which a classifier sees at 224.
        let zoom = self.power(-1.3, 0.35) * 1.28;
        let angle = if self.chance(0.5) { self.between(-PI, PI) } else { self.between(-0.1, 0.1) };
        let (mirror, aspect) = (if self.chance(0.5) { -1.0 } else { 1.0 }, self.power(-0.3, 0.3));
        let reach = self.side as f32 * zoom / 2.0;
        let centre = |s: &mut Self, size: usize| {
            let spare = (size as f32 / 2.0 - reach).max(0.0);
            size as f32 / 2.0 + s.between(-spare, spare)
        };
        let (cx, cy) = (centre(self, p.width), centre(self, p.height));
        let (cos, sin) = (angle.cos() * zoom, angle.sin() * zoom);
        let half = self.side as f32 / 2.0 - 0.5;
        let mut out = Vec::with_capacity(self.side * self.side * RGB);
        for y in 0..self.side {
            for x in 0..self.side {
                let (u, v) = ((x as f32 - half) * mirror * aspect, y as f32 - half);
                let (sx, sy) = (cx + cos * u - sin * v - 0.5, cy + sin * u + cos * v - 0.5);
                let (fx, fy) = (sx - sx.floor(), sy - sy.floor());
                let (x0, x1) = (reflect(sx.floor() as i64, p.width), reflect(sx.floor() as i64 + 1, p.width));
                let (y0, y1) = (reflect(sy.floor() as i64, p.height), reflect(sy.floor() as i64 + 1, p.height));
                let at =
                    |x: usize, y: usize| p.pixels.get((y * p.width + x) * RGB..).and_then(|s| s.first_chunk::<RGB>()).unwrap_or(&[0; RGB]);
                let (a, b, c, d) = (at(x0, y0), at(x1, y0), at(x0, y1), at(x1, y1));
                for i in 0..RGB {
                    let top = f32::from(a[i]) * (1.0 - fx) + f32::from(b[i]) * fx;
                    let bottom = f32::from(c[i]) * (1.0 - fx) + f32::from(d[i]) * fx;
                    out.push(top * (1.0 - fy) + bottom * fy);
                }
            }
        }
        out
    }

    /// Flat colour, smooth noise at a few scales, perhaps a weave, brushed lines or a grating.
    fn surface(&mut self) -> Vec<f32> {
        let side = self.side;
        let colour: [f32; RGB] = std::array::from_fn(|_| self.between(10.0, 245.0));
        let mut x: Vec<f32> = (0..side * side).flat_map(|_| colour).collect();
        for _ in 0..1 + self.below(3) {
            let grey = self.chance(0.6);
            let level = self.between(0.0, 30.0);
            let (h, w) = self.noise_cells();
            let common = self.noise(h, w);
            for c in 0..RGB {
                let own = if grey || c == 0 { None } else { Some(self.noise(h, w)) };
                let field = own.as_ref().unwrap_or(&common);
                for (pixel, n) in x.chunks_exact_mut(RGB).zip(field) {
                    pixel[c] += n * level;
                }
            }
        }
        if self.chance(0.4) {
            for _ in 0..1 + self.below(2) {
                let (angle, frequency) = (self.between(0.0, PI), TAU / self.power(1.2, 6.0));
                let (phase, level) = (self.between(0.0, TAU), self.between(3.0, 50.0));
                let (fx, fy) = (angle.cos() * frequency, angle.sin() * frequency);
                for (i, pixel) in x.chunks_exact_mut(RGB).enumerate() {
                    let wave = ((i % side) as f32 * fx + (i / side) as f32 * fy + phase).sin() * level;
                    pixel.iter_mut().for_each(|v| *v += wave);
                }
            }
        }
        x
    }

    /// Cells of a noise field: a random scale, round more often than stretched.
    fn noise_cells(&mut self) -> (usize, usize) {
        let mut one = || ((self.side as f32 * self.power(-6.0, -0.5)) as usize).max(2);
        let (h, w) = (one(), one());
        if self.chance(0.6) { (h, h) } else { (h, w) }
    }

    /// Smooth noise of about unit amplitude, `[side, side]`: normal values on a grid, cubic (Catmull-Rom) between them.
    fn noise(&mut self, h: usize, w: usize) -> Vec<f32> {
        let side = self.side;
        let grid: Vec<f32> = (0..h * w).map(|_| normal(&mut self.rng)).collect();
        let columns: Vec<([usize; 4], [f32; 4])> = (0..side).map(|x| cubic_taps(x, side, w)).collect();
        let mut row = vec![0.0; w];
        let mut out = Vec::with_capacity(side * side);
        for y in 0..side {
            let (at, weight) = cubic_taps(y, side, h);
            row.fill(0.0);
            for (a, k) in at.iter().zip(weight) {
                for (r, g) in row.iter_mut().zip(grid.iter().skip(a * w)) {
                    *r += g * k;
                }
            }
            out.extend(
                columns.iter().map(|(at, weight)| at.iter().zip(weight).map(|(a, k)| row.get(*a).copied().unwrap_or(0.0) * k).sum::<f32>()),
            );
        }
        out
    }

    /// A disc, ring or rectangle filled with a surface or another photograph: parts, components, prints, holes.
    fn shape(&mut self, x: &mut [f32], from: &Synth<'_>) {
        let side = self.side as f32;
        let (cx, cy, angle) = (self.between(0.0, side), self.between(0.0, side), self.between(0.0, PI));
        let (w, h) = (self.power(1.0, 6.5) * side / 224.0, self.power(1.0, 6.5) * side / 224.0);
        let (kind, soft) = (self.between(0.0, 1.0), self.between(0.3, 1.5));
        let filling = if self.chance(0.6) { self.surface() } else { self.start(from) };
        let (cos, sin) = (angle.cos(), angle.sin());
        for (i, (pixel, other)) in x.chunks_exact_mut(RGB).zip(filling.chunks_exact(RGB)).enumerate() {
            let (dx, dy) = ((i % self.side) as f32 - cx, (i / self.side) as f32 - cy);
            let (p, q) = (cos * dx + sin * dy, cos * dy - sin * dx);
            let distance = if kind < 0.5 {
                (p.abs() - w).max(q.abs() - h)
            } else {
                let disc = (((p / w).powi(2) + (q / h).powi(2)).sqrt() - 1.0) * w.min(h);
                if kind < 0.8 { disc } else { disc.abs() - w.min(h) * 0.2 }
            };
            let cover = sigmoid(-distance / soft);
            for (v, o) in pixel.iter_mut().zip(other) {
                *v += (o - *v) * cover;
            }
        }
    }

    /// A scratch, hair, spot or smear: a bent line of any width and contrast.
    fn streak(&mut self, x: &mut [f32]) {
        let side = self.side as f32;
        let (ax, ay, angle) = (self.between(0.0, side), self.between(0.0, side), self.between(0.0, TAU));
        let (length, bend) = (self.power(1.0, 7.0) * side / 224.0, self.between(-0.01, 0.01));
        let (width, soft) = (self.power(-1.0, 3.0), self.between(0.3, 1.5));
        let grey = self.between(-130.0, 130.0);
        let tinted = self.chance(0.3);
        let colour: [f32; RGB] = std::array::from_fn(|_| grey + if tinted { self.between(-80.0, 80.0) } else { 0.0 });
        let (ux, uy) = (angle.cos(), angle.sin());
        for (i, pixel) in x.chunks_exact_mut(RGB).enumerate() {
            let (dx, dy) = ((i % self.side) as f32 - ax, (i / self.side) as f32 - ay);
            let t = (dx * ux + dy * uy).clamp(0.0, length);
            let (ex, ey) = (dx - t * ux + bend * t * t * uy, dy - t * uy - bend * t * t * ux);
            let cover = sigmoid((width - (ex * ex + ey * ey).sqrt()) / soft);
            if cover > 1e-3 {
                pixel.iter_mut().zip(colour).for_each(|(v, c)| *v += c * cover);
            }
        }
    }

    /// Blotches of another colour.
    fn stain(&mut self, x: &mut [f32]) {
        let limit = self.between(0.5, 1.5);
        let colour: [f32; RGB] = std::array::from_fn(|_| self.between(-50.0, 50.0));
        let (h, w) = self.noise_cells();
        let field = self.noise(h, w);
        for (pixel, n) in x.chunks_exact_mut(RGB).zip(field) {
            let cover = sigmoid((n - limit) * 8.0);
            pixel.iter_mut().zip(colour).for_each(|(v, c)| *v += c * cover);
        }
    }

    /// Saturation, contrast, brightness, colour cast, uneven lighting.
    fn light(&mut self, x: &mut [f32]) {
        let saturation = if self.chance(0.25) { 0.0 } else { self.between(0.4, 1.5) };
        let (contrast, bright) = (self.power(-1.2, 0.5), self.between(-45.0, 45.0));
        let cast: [f32; RGB] = std::array::from_fn(|_| self.between(-12.0, 12.0) + bright + 128.0);
        let uneven = self.chance(0.15).then(|| {
            let (h, w) = self.noise_cells();
            self.noise(h, w)
        });
        for (i, pixel) in x.chunks_exact_mut(RGB).enumerate() {
            let grey = pixel.iter().sum::<f32>() / RGB as f32;
            let gain = uneven.as_ref().and_then(|f| f.get(i)).map_or(1.0, |n| 1.0 + 0.15 * n.clamp(-2.0, 2.0));
            for (v, c) in pixel.iter_mut().zip(cast) {
                *v = ((grey + (*v - grey) * saturation - 128.0) * contrast + c) * gain;
            }
        }
    }

    /// Out of focus: a Gaussian of up to 1.6 px.
    fn blur(&mut self, x: &mut [f32]) {
        const REACH: i64 = 4;
        let deviation = self.between(0.4, 1.6);
        let mut kernel: Vec<f32> = (-REACH..=REACH).map(|i| (-(i * i) as f32 / (2.0 * deviation * deviation)).exp()).collect();
        let sum: f32 = kernel.iter().sum();
        kernel.iter_mut().for_each(|k| *k /= sum);
        let side = self.side;
        let mut between = vec![0.0; x.len()];
        for y in 0..side {
            for (i, k) in (-REACH..=REACH).zip(&kernel) {
                let from = reflect(y as i64 + i, side) * side * RGB;
                let (Some(from), Some(to)) = (x.get(from..from + side * RGB), between.get_mut(y * side * RGB..(y + 1) * side * RGB)) else {
                    continue;
                };
                to.iter_mut().zip(from).for_each(|(t, f)| *t += f * k);
            }
        }
        x.fill(0.0);
        for (to, from) in x.chunks_exact_mut(side * RGB).zip(between.chunks_exact(side * RGB)) {
            for column in 0..side {
                for (i, k) in (-REACH..=REACH).zip(&kernel) {
                    let at = reflect(column as i64 + i, side) * RGB;
                    if let (Some(t), Some(f)) = (to.get_mut(column * RGB..column * RGB + RGB), from.get(at..at + RGB)) {
                        t.iter_mut().zip(f).for_each(|(t, f)| *t += f * k);
                    }
                }
            }
        }
    }
}

/// Index `i` mirrored into `0..n`, edge pixels not repeated.
fn reflect(i: i64, n: usize) -> usize {
    if n < 2 {
        return 0;
    }
    let period = 2 * (n as i64 - 1);
    let i = i.rem_euclid(period);
    (if i >= n as i64 { period - i } else { i }) as usize
}

/// Grid places and Catmull-Rom weights of position `x` of `size` on a grid of `cells`, clamped at the ends.
fn cubic_taps(x: usize, size: usize, cells: usize) -> ([usize; 4], [f32; 4]) {
    let at = ((x as f32 + 0.5) * cells as f32 / size as f32 - 0.5).max(0.0);
    let (i, t) = (at.floor() as i64, at - at.floor());
    let place = |k: i64| (i + k).clamp(0, cells as i64 - 1) as usize;
    let weight =
        [((-0.5 * t + 1.0) * t - 0.5) * t, (1.5 * t - 2.5) * t * t + 1.0, ((-1.5 * t + 2.0) * t + 0.5) * t, (0.5 * t - 0.5) * t * t];
    ([place(-1), place(0), place(1), place(2)], weight)
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_depend_on_seed_and_number_alone_and_are_grey_levels() {
        let pool = [Picture { width: 40, height: 30, pixels: (0..40 * 30 * 3).map(|i| (i * 7 % 251) as u8).collect() }];
        let synth = Synth::new(&pool, &[], 3);
        let again = Synth::new(&pool, &[], 3);
        for number in 0..40 {
            let a = synth.picture(number, 32);
            assert_eq!(a.len(), 32 * 32 * 3);
            assert!(a.iter().all(|v| (0.0..=255.0).contains(v) && v.fract() == 0.0), "picture {number}");
            assert_eq!(a, again.picture(number, 32));
        }
        assert_ne!(synth.picture(0, 32), synth.picture(1, 32));
        assert_ne!(synth.picture(0, 32), Synth::new(&pool, &[], 4).picture(0, 32));
    }

    #[test]
    fn mirrored_indices_and_cubic_weights() {
        assert_eq!((-3..7).map(|i| reflect(i, 4)).collect::<Vec<_>>(), [3, 2, 1, 0, 1, 2, 3, 2, 1, 0]);
        for x in 0..50 {
            let (places, weights) = cubic_taps(x, 50, 7);
            assert!((weights.iter().sum::<f32>() - 1.0).abs() < 1e-5);
            assert!(places.iter().all(|p| *p < 7));
        }
        let mut rng = Pcg64::seed_from_u64(1);
        let many: Vec<f32> = (0..20_000).map(|_| normal(&mut rng)).collect();
        let mean = many.iter().sum::<f32>() / many.len() as f32;
        let deviation = (many.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / many.len() as f32).sqrt();
        assert!(mean.abs() < 0.03 && (deviation - 1.0).abs() < 0.03, "{mean} {deviation}");
    }
}
