//! From the assembled part to the camera's picture: pose, light, lens, motion, sensor. Good and defective parts take the same way.
//!
//! Works a row at a time in fixed point, on planes of `u16`, so that a picture's working set stays in the first-level cache and the
//! loops vectorise. A lit value has 6 fraction bits: one grey level is 64.

use super::canvas::{Area, CENTRE, HEIGHT as TEXTURE_H, Px, WIDTH as TEXTURE_W};
use super::math::{Rng, cos_turns, sin_turns};

/// Picture width in pixels.
pub(super) const WIDTH: usize = 640;
/// Picture height in pixels.
pub(super) const HEIGHT: usize = 480;
/// One grey level of a lit value.
pub(super) const LEVEL: u16 = 64;

/// Columns on either side that motion blur reaches into.
const MARGIN: usize = 4;
const ROW: usize = WIDTH + 2 * MARGIN;
/// Taps of motion blur: 2 * REACH + 1.
const REACH: usize = 3;
/// Sensor noise repeats after this many samples; each row and channel starts at a random place.
const NOISE_LEN: usize = 1 << 15;
/// A sample of one standard deviation.
const NOISE_ONE: f32 = 4096.0;

/// How far pose and light of a product vary; each product has its own.
#[derive(Clone, Copy)]
pub(super) struct Setup {
    /// Largest shift, in px.
    pub(super) shift_px: f32,
    /// Largest rotation either way, in degrees.
    pub(super) turn_deg: f32,
    /// Largest change of scale either way, as a share.
    pub(super) scale: f32,
    /// Strength of the lamp's reflection on a surface of full gloss.
    pub(super) shine: f32,
    /// Width and height of the reflection as shares of the picture; a very tall one is a light bar's.
    pub(super) spot: [f32; 2],
}

/// Everything about one exposure.
pub(super) struct Shot {
    /// Texture column from picture position, 16 fraction bits: u = a x + b y + c.
    column_from_picture: [i32; 3],
    /// Texture row from texture column and picture row, 16 fraction bits: v = s u + g y + h.
    row_from_column: [i32; 3],
    /// The same the other way, for rectangles.
    picture_from_texture: [f32; 6],
    level: f32,
    gradient: [f32; 2],
    vignette: f32,
    /// Centre and inverse half-widths of the reflection.
    spot: [f32; 4],
    shine: f32,
    /// Motion taps by channel, 16 fraction bits; colour temperature is in their sum.
    taps: [[u16; 2 * REACH + 1]; 3],
    /// Weight of the rows above and below, 16 fraction bits.
    defocus: u16,
    noise_floor: f32,
    noise_slope: f32,
}

impl Shot {
    /// Draw an exposure within `setup`.
    pub(super) fn draw(setup: &Setup, mut rng: Rng) -> Self {
        let turn = rng.range(-1.0, 1.0) * setup.turn_deg / 360.0;
        let scale = 1.0 + rng.range(-1.0, 1.0) * setup.scale;
        let shift = [rng.range(-1.0, 1.0) * setup.shift_px, rng.range(-1.0, 1.0) * setup.shift_px];
        let (cos, sin) = (cos_turns(turn), sin_turns(turn));
        // Picture point p shows texture point R(-turn) (p - middle - shift) / scale + CENTRE.
        let middle = [WIDTH as f32 / 2.0 + shift[0], HEIGHT as f32 / 2.0 + shift[1]];
        let (a, b) = (cos / scale, sin / scale);
        let (d, e) = (-sin / scale, cos / scale);
        let c = CENTRE[0] - a * middle[0] - b * middle[1];
        let f = CENTRE[1] - d * middle[0] - e * middle[1];
        let fixed = |value: f32| (value * 65_536.0).floor() as i32;
        let (cos, sin) = (cos * scale, sin * scale);
        let back = [cos, -sin, middle[0] - cos * CENTRE[0] + sin * CENTRE[1], sin, cos, middle[1] - sin * CENTRE[0] - cos * CENTRE[1]];

        let level = rng.range(0.9, 1.1);
        let gradient = [rng.range(-1.0, 1.0) * 0.10 / 320.0, rng.range(-1.0, 1.0) * 0.08 / 240.0];
        let vignette = rng.range(0.04, 0.12);
        let spot_at = [WIDTH as f32 * rng.range(0.25, 0.75), HEIGHT as f32 * rng.range(0.2, 0.6)];
        let spread = rng.range(0.85, 1.2);
        let spot = [spot_at[0], spot_at[1], 1.0 / (setup.spot[0] * spread * WIDTH as f32), 1.0 / (setup.spot[1] * spread * HEIGHT as f32)];
        let shine = setup.shine * rng.range(0.75, 1.2);

        // Colour temperature: warm takes from blue, cold from red.
        let warmth = rng.range(-1.0, 1.0) * 0.05;
        let gains = [1.0 + warmth.min(0.0), 1.0 - warmth.abs() * 0.2, 1.0 - warmth.max(0.0)];
        let smear_px = rng.range(0.4, 2.6);
        let shape = motion_taps(smear_px);
        let taps = gains.map(|gain| shape.map(|tap| (tap * gain * 65_535.0) as u16));
        let defocus = (rng.range(0.02, 0.16) * 65_535.0) as u16;
        let noise_floor = rng.range(0.7, 1.3);
        let noise_slope = rng.range(0.9, 1.7) / 255.0;
        Self {
            column_from_picture: [a, b, c].map(fixed),
            // v = d x + e y + f with x = (u - b y - c) / a.
            row_from_column: [d / a, e - d / a * b, f - d / a * c].map(fixed),
            picture_from_texture: back,
            level,
            gradient,
            vignette,
            spot,
            shine,
            taps,
            defocus,
            noise_floor,
            noise_slope,
        }
    }

    /// The picture rows that a texture area can touch, blur included.
    pub(super) fn rows_of(&self, area: Area) -> std::ops::Range<usize> {
        if area.is_empty() {
            return 0..0;
        }
        let m = &self.picture_from_texture;
        let corner = |x: i32, y: i32| m[3] * x as f32 + m[4] * y as f32 + m[5];
        let corners = [corner(area.x0, area.y0), corner(area.x1, area.y0), corner(area.x0, area.y1), corner(area.x1, area.y1)];
        let low = corners.iter().fold(f32::MAX, |a, &b| a.min(b)).floor() as i32 - 4;
        let high = corners.iter().fold(f32::MIN, |a, &b| a.max(b)).floor() as i32 + 5;
        low.clamp(0, HEIGHT as i32) as usize..high.clamp(0, HEIGHT as i32) as usize
    }
}

/// Share of each of the taps for a box of `width` pixels around the middle.
fn motion_taps(width: f32) -> [f32; 2 * REACH + 1] {
    let half = width.max(1.0) / 2.0;
    let mut taps = [0.0; 2 * REACH + 1];
    for (i, tap) in taps.iter_mut().enumerate() {
        let at = i as f32 - REACH as f32;
        *tap = ((at + 0.5).min(half) - (at - 0.5).max(-half)).max(0.0) / (2.0 * half);
    }
    taps
}

type Planes = [[u16; ROW]; 3];
/// Lit and blurred values of one row: red, green, blue, 6 fraction bits.
pub(super) type LitRow = [[u16; WIDTH]; 3];

/// Scratch rows and tables; made once.
pub(super) struct Optics {
    /// Three lit rows: above, at and below the row being made.
    ring: Box<[Planes; 3]>,
    texels: Box<[[u16; ROW]; 4]>,
    /// The texture along a picture row, at whole columns, and the weights it is made with, each weight four times.
    slice: Vec<[u16; 4]>,
    weights: Vec<[u16; 4]>,
    light: Box<[u16; ROW]>,
    gleam: Box<[u16; ROW]>,
    /// Parts of light and reflection that depend on the column alone, 14 fraction bits.
    column_light: Box<[i16; ROW]>,
    column_gleam: Box<[i16; ROW]>,
    blurred: Box<Planes>,
    lit: Box<LitRow>,
}

impl Optics {
    pub(super) fn new() -> Self {
        Self {
            ring: Box::new([[[0; ROW]; 3]; 3]),
            texels: Box::new([[0; ROW]; 4]),
            slice: vec![[0; 4]; TEXTURE_W],
            weights: vec![[0; 4]; TEXTURE_W],
            light: Box::new([0; ROW]),
            gleam: Box::new([0; ROW]),
            column_light: Box::new([0; ROW]),
            column_gleam: Box::new([0; ROW]),
            blurred: Box::new([[0; ROW]; 3]),
            lit: Box::new([[0; WIDTH]; 3]),
        }
    }

    /// Call `each(y, lit row)` for `rows` of the noiseless picture.
    pub(super) fn expose(&mut self, texture: &[Px], shot: &Shot, rows: std::ops::Range<usize>, mut each: impl FnMut(usize, &LitRow)) {
        for (i, (light, gleam)) in self.column_light.iter_mut().zip(self.column_gleam.iter_mut()).enumerate() {
            let x = i as f32 - MARGIN as f32;
            let from_middle = (x - WIDTH as f32 / 2.0) / (WIDTH as f32 / 2.0);
            *light = q14(shot.level + shot.gradient[0] * (x - WIDTH as f32 / 2.0) - shot.vignette * from_middle * from_middle);
            let from_spot = (x - shot.spot[0]) * shot.spot[2];
            *gleam = q14(1.0 - from_spot * from_spot);
        }
        if rows.is_empty() {
            return;
        }
        // The row above the first one and the first one; then each turn makes the row below.
        for y in [rows.start as i32 - 1, rows.start as i32] {
            self.light_row(texture, shot, y);
        }
        for y in rows {
            self.light_row(texture, shot, y as i32 + 1);
            self.blur_row(shot, y);
            each(y, &self.lit);
        }
    }

    /// Sample the texture along picture row `y` and light it.
    fn light_row(&mut self, texture: &[Px], shot: &Shot, y: i32) {
        slice(texture, &shot.row_from_column, y, &mut self.weights, &mut self.slice);
        sample(&self.slice, &shot.column_from_picture, y, &mut self.texels);

        let from_middle = (y as f32 - HEIGHT as f32 / 2.0) / (HEIGHT as f32 / 2.0);
        let row_light = q14(shot.gradient[1] * (y as f32 - HEIGHT as f32 / 2.0) - shot.vignette * 0.6 * from_middle * from_middle);
        let from_spot = (y as f32 - shot.spot[1]) * shot.spot[3];
        let row_gleam = q14(from_spot * from_spot);
        for (light, &column) in self.light.iter_mut().zip(self.column_light.iter()) {
            *light = column.saturating_add(row_light).max(0) as u16;
        }
        // Nearness has 14 fraction bits, its square 12, so the strength has 18 to end with 14 again.
        let strength = (shot.shine * 16_384.0 * 4.0).clamp(0.0, 65_535.0) as u16;
        for (gleam, &column) in self.gleam.iter_mut().zip(self.column_gleam.iter()) {
            let near = column.saturating_sub(row_gleam).max(0) as u16;
            *gleam = high_product(near << 1, near << 1);
            *gleam = high_product(*gleam, strength);
        }
        let [red, green, blue, gloss] = &mut *self.texels;
        for (gloss, &gleam) in gloss.iter_mut().zip(self.gleam.iter()) {
            *gloss = high_product(*gloss, gleam);
        }
        let slot = &mut self.ring[(y + 3) as usize % 3];
        for (texels, out) in [red, green, blue].into_iter().zip(slot.iter_mut()) {
            let inputs = texels.iter().zip(self.light.iter()).zip(gloss.iter());
            for (out, ((&value, &light), &gleam)) in out.iter_mut().zip(inputs) {
                *out = high_product(value, light).saturating_add(gleam).min(255 * LEVEL);
            }
        }
    }

    /// Defocus across rows and motion along the row.
    fn blur_row(&mut self, shot: &Shot, y: usize) {
        let [above, at, below] = [(y + 2) % 3, y % 3, (y + 1) % 3].map(|i| &self.ring[i]);
        let (side, middle) = (shot.defocus, 65_535 - 2 * shot.defocus);
        let planes = self.blurred.iter_mut().zip(self.lit.iter_mut()).zip(above.iter().zip(at).zip(below)).zip(&shot.taps);
        for (((blurred, out), ((above, at), below)), taps) in planes {
            for (out, ((&above, &at), &below)) in blurred.iter_mut().zip(above.iter().zip(at).zip(below)) {
                *out = high_product(at, middle) + high_product(above + below, side);
            }
            let window = |k: usize| blurred[MARGIN - REACH + k..][..WIDTH].iter();
            let taps_in = window(0).zip(window(1)).zip(window(2)).zip(window(3)).zip(window(4)).zip(window(5)).zip(window(6));
            for (out, ((((((&a, &b), &c), &d), &e), &f), &g)) in out.iter_mut().zip(taps_in) {
                *out = high_product(a, taps[0])
                    + high_product(b, taps[1])
                    + high_product(c, taps[2])
                    + high_product(d, taps[3])
                    + high_product(e, taps[4])
                    + high_product(f, taps[5])
                    + high_product(g, taps[6]);
            }
        }
    }
}

/// The image sensor: turns lit values into noisy bytes.
pub(super) struct Sensor {
    noise: Vec<i16>,
}

impl Sensor {
    pub(super) fn new() -> Self {
        let mut rng = Rng::new(0, 0, 0x0153);
        Self { noise: (0..NOISE_LEN + WIDTH).map(|_| (rng.bell() * NOISE_ONE) as i16).collect() }
    }

    /// Add sensor noise to a lit row and write it out as bytes.
    pub(super) fn develop(&self, shot: &Shot, noise: &mut Rng, lit: &LitRow, out: &mut [u8]) {
        let mut bytes = [[0u8; WIDTH]; 3];
        // A deviation of `floor + slope * value` levels, in sixty-fourths: (sample / 4096) * deviation * 64 = sample * gain >> 16.
        let floor = (shot.noise_floor * 64.0 * 16.0) as i16;
        let slope = (shot.noise_slope * 16.0 * 65_536.0) as u16;
        for (bytes, lit) in bytes.iter_mut().zip(lit) {
            let start = noise.below(NOISE_LEN as u32) as usize;
            for ((out, &value), &sample) in bytes.iter_mut().zip(lit.iter()).zip(&self.noise[start..]) {
                let gain = floor + high_product(value, slope) as i16;
                let grain = ((i32::from(sample) * i32::from(gain)) >> 16) as i16;
                *out = ((value as i16 + grain + LEVEL as i16 / 2) >> 6).clamp(0, 255) as u8;
            }
        }
        let [red, green, blue] = &bytes;
        for (out, ((&r, &g), &b)) in out.chunks_exact_mut(3).zip(red.iter().zip(green).zip(blue)) {
            out.copy_from_slice(&[r, g, b]);
        }
    }
}

/// The upper half of a 16-bit product: one machine instruction where loops vectorise.
fn high_product(a: u16, b: u16) -> u16 {
    ((u32::from(a) * u32::from(b)) >> 16) as u16
}

/// A value below 2 with 14 fraction bits.
fn q14(value: f32) -> i16 {
    // The cast saturates, which is right for the far ends of a reflection.
    (value * 16_384.0) as i16
}

/// The texture along picture row `y` at whole texture columns: linear between two texture rows, 4 fraction bits. The picture is turned
/// by few degrees, so the two rows stay the same over long runs of columns, and a run is a plain loop.
fn slice(texture: &[Px], m: &[i32; 3], y: i32, weights: &mut [[u16; 4]], out: &mut [[u16; 4]]) {
    let mut v = m[1] * y + m[2];
    let mut start = 0;
    while start < TEXTURE_W {
        let row = v >> 16;
        let mut end = start;
        while end < TEXTURE_W && v >> 16 == row {
            if let Some(weight) = weights.get_mut(end) {
                *weight = [((v >> 12) & 15) as u16; 4];
            }
            v += m[0];
            end += 1;
        }
        let at = row.clamp(0, TEXTURE_H as i32 - 2) as usize * TEXTURE_W;
        let run = |from: usize| texture.get(from + start..from + end).unwrap_or_default().as_flattened();
        let (upper, lower) = (run(at), run(at + TEXTURE_W));
        let (Some(out), Some(weights)) = (out.get_mut(start..end), weights.get(start..end)) else { return };
        let inputs = upper.iter().zip(lower).zip(weights.as_flattened());
        for (out, ((&upper, &lower), &weight)) in out.as_flattened_mut().iter_mut().zip(inputs) {
            *out = u16::from(upper) * (16 - weight) + u16::from(lower) * weight;
        }
        start = end;
    }
}

/// Samples along a picture row: linear between two columns of its slice; four planes with 8 fraction bits.
fn sample(slice: &[[u16; 4]], m: &[i32; 3], y: i32, out: &mut [[u16; ROW]; 4]) {
    let mut u = m[1] * y + m[2] - m[0] * MARGIN as i32;
    let [red, green, blue, gloss] = out;
    let planes = red.iter_mut().zip(green.iter_mut()).zip(blue.iter_mut()).zip(gloss.iter_mut());
    for (((red, green), blue), gloss) in planes {
        let at = (u >> 16).clamp(0, TEXTURE_W as i32 - 2) as usize;
        let weight = ((u >> 12) & 15) as u64;
        // Clamped above, so the two are always there; `get` keeps the proof local.
        if let Some(&[left, right]) = slice.get(at..at + 2).and_then(<[_]>::first_chunk) {
            // Four channels in one word: 12 bits times 16 stays within a channel's 16 bits.
            let word = lanes(left) * (16 - weight) + lanes(right) * weight;
            *red = word as u16;
            *green = (word >> 16) as u16;
            *blue = (word >> 32) as u16;
            *gloss = (word >> 48) as u16;
        }
        u += m[0];
    }
}

/// Four 16-bit lanes as one word.
fn lanes([a, b, c, d]: [u16; 4]) -> u64 {
    u64::from(a) | u64::from(b) << 16 | u64::from(c) << 32 | u64::from(d) << 48
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn motion_taps_sum_to_one() {
        for width in [0.0, 0.7, 1.0, 1.5, 2.6, 5.0] {
            let sum: f32 = motion_taps(width).iter().sum();
            assert!((sum - 1.0).abs() < 1e-5, "{width}: {sum}");
        }
    }

    #[test]
    fn a_flat_grey_texture_gives_a_flat_picture_with_the_expected_noise() {
        let texture = vec![[128, 128, 128, 0]; TEXTURE_W * TEXTURE_H];
        let setup = Setup { shift_px: 0.0, turn_deg: 0.0, scale: 0.0, shine: 0.0, spot: [1.0, 1.0] };
        let mut shot = Shot::draw(&setup, Rng::new(1, 1, 1));
        (shot.level, shot.gradient, shot.vignette, shot.noise_floor, shot.noise_slope) = (1.0, [0.0; 2], 0.0, 2.0, 0.0);
        let mut optics = Optics::new();
        let mut rows = Vec::new();
        optics.expose(&texture, &shot, 10..20, |_, row| rows.push(*row));
        let (sensor, mut noise) = (Sensor::new(), Rng::new(2, 2, 2));
        let mut bytes = vec![0; 3 * WIDTH];
        let (mut sum, mut squares, mut n) = (0.0, 0.0, 0.0);
        for row in &rows {
            sensor.develop(&shot, &mut noise, row, &mut bytes);
            for px in bytes.chunks_exact(3) {
                let value = f64::from(px[1]);
                (sum, squares, n) = (sum + value, squares + value * value, n + 1.0);
            }
        }
        let mean = sum / n;
        let deviation = (squares / n - mean * mean).sqrt();
        assert!((mean - 127.0).abs() < 2.0, "mean {mean}");
        assert!((deviation - 2.0).abs() < 0.25, "deviation {deviation}");
    }
}
