//! Drawing surfaces: [`Canvas`] (float, used once at construction) and the packed texture that parts are assembled on.
//!
//! A part is assembled on a texture somewhat larger than the picture ([`WIDTH`] x [`HEIGHT`]); the optics then look at it through a
//! pose, a light, a lens and a sensor. A pixel is [red, green, blue, gloss]: gloss is how much of the lamp's reflection it returns.

use super::font;
use super::math::{cover, hash_unit, length, lerp};

/// Texture width in pixels: the picture's 640 and a margin of 48 for shifts, rotation and scale.
pub(super) const WIDTH: usize = 736;
/// Texture height in pixels: the picture's 480 and the same margin.
pub(super) const HEIGHT: usize = 576;
/// The picture's centre on the texture.
pub(super) const CENTRE: [f32; 2] = [WIDTH as f32 / 2.0, HEIGHT as f32 / 2.0];
/// Side of a detail tile, a power of two.
pub(super) const TILE: usize = 512;

/// Red, green, blue, gloss.
pub(super) type Px = [u8; 4];

/// A rectangle on the texture, ends exclusive. Empty when an end is not beyond its start.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Area {
    pub(super) x0: i32,
    pub(super) y0: i32,
    pub(super) x1: i32,
    pub(super) y1: i32,
}

impl Area {
    pub(super) const EMPTY: Self = Self { x0: i32::MAX, y0: i32::MAX, x1: i32::MIN, y1: i32::MIN };

    /// Around a point, in coordinates from the texture's centre, clipped to the texture.
    pub(super) fn around(x: f32, y: f32, half_w: f32, half_h: f32) -> Self {
        let (cx, cy) = (x + CENTRE[0], y + CENTRE[1]);
        Self {
            x0: ((cx - half_w).floor() as i32).clamp(0, WIDTH as i32),
            y0: ((cy - half_h).floor() as i32).clamp(0, HEIGHT as i32),
            x1: ((cx + half_w).floor() as i32 + 1).clamp(0, WIDTH as i32),
            y1: ((cy + half_h).floor() as i32 + 1).clamp(0, HEIGHT as i32),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.x1 <= self.x0 || self.y1 <= self.y0
    }

    pub(super) fn join(self, other: Self) -> Self {
        Self { x0: self.x0.min(other.x0), y0: self.y0.min(other.y0), x1: self.x1.max(other.x1), y1: self.y1.max(other.y1) }
    }
}

/// A float drawing surface with its own origin; pixel values in grey levels.
pub(super) struct Canvas {
    width: usize,
    origin: [f32; 2],
    px: Vec<[f32; 4]>,
    /// Opacity, for sprites.
    alpha: Vec<f32>,
}

impl Canvas {
    /// A surface of texture size with its origin in the middle.
    pub(super) fn texture() -> Self {
        Self::new(WIDTH, HEIGHT)
    }

    /// A surface with its origin in the middle.
    pub(super) fn new(width: usize, height: usize) -> Self {
        Self {
            width,
            origin: [width as f32 / 2.0, height as f32 / 2.0],
            px: vec![[0.0; 4]; width * height],
            alpha: vec![0.0; width * height],
        }
    }

    /// Call `draw(x, y, pixel)` for every pixel, coordinates of the pixel's centre from the origin.
    pub(super) fn paint(&mut self, mut draw: impl FnMut(f32, f32, &mut [f32; 4])) {
        let (width, origin) = (self.width, self.origin);
        for (y, row) in self.px.chunks_exact_mut(width).enumerate() {
            for (x, px) in row.iter_mut().enumerate() {
                draw(x as f32 + 0.5 - origin[0], y as f32 + 0.5 - origin[1], px);
            }
        }
    }

    /// Like [`Self::paint`] within a box around (x, y), with the opacity as well.
    pub(super) fn paint_box(&mut self, centre: [f32; 2], half: [f32; 2], mut draw: impl FnMut(f32, f32, &mut [f32; 4], &mut f32)) {
        let height = self.px.len() / self.width;
        let span = |c: f32, half: f32, n: usize| {
            let low = ((c - half).floor().max(0.0)) as usize;
            let high = ((c + half).floor().max(0.0) as usize + 1).min(n);
            low.min(high)..high
        };
        let columns = span(centre[0] + self.origin[0], half[0], self.width);
        for y in span(centre[1] + self.origin[1], half[1], height) {
            let at = y * self.width;
            let pixels = self.px[at + columns.start..at + columns.end].iter_mut();
            let alphas = self.alpha[at + columns.start..at + columns.end].iter_mut();
            for (x, (px, alpha)) in columns.clone().zip(pixels.zip(alphas)) {
                draw(x as f32 + 0.5 - self.origin[0], y as f32 + 0.5 - self.origin[1], px, alpha);
            }
        }
    }

    /// Fill a shape given by its signed distance, within a box around `centre`.
    pub(super) fn shape(&mut self, centre: [f32; 2], half: [f32; 2], colour: [f32; 4], mut distance: impl FnMut(f32, f32) -> f32) {
        self.paint_box(centre, half, |x, y, px, alpha| {
            let share = cover(distance(x - centre[0], y - centre[1]));
            blend(px, colour, share);
            *alpha = alpha.max(share);
        });
    }

    /// Fill a disc.
    pub(super) fn disc(&mut self, centre: [f32; 2], radius: f32, colour: [f32; 4]) {
        self.shape(centre, [radius + 1.0; 2], colour, |x, y| length(x, y) - radius);
    }

    /// Fill an upright rectangle.
    pub(super) fn rect(&mut self, centre: [f32; 2], half: [f32; 2], colour: [f32; 4]) {
        self.shape(centre, [half[0] + 1.0, half[1] + 1.0], colour, |x, y| (x.abs() - half[0]).max(y.abs() - half[1]));
    }

    /// Write text, centred on `centre`, `dot` pixels a dot; along +y (quarter turn) when `upright` is false.
    pub(super) fn text(&mut self, centre: [f32; 2], dot: f32, text: &str, colour: [f32; 4], upright: bool) {
        let bytes = text.as_bytes();
        let (w, h) = (bytes.len() as f32 * font::ADVANCE * dot, 7.0 * dot);
        let half = if upright { [w / 2.0 + 1.0, h / 2.0 + 1.0] } else { [h / 2.0 + 1.0, w / 2.0 + 1.0] };
        self.paint_box(centre, half, |x, y, px, _| {
            let (x, y) = (x - centre[0], y - centre[1]);
            let (u, v) = if upright { (x + w / 2.0, y + h / 2.0) } else { (y + w / 2.0, h / 2.0 - x) };
            let share = font::ink(bytes, u / dot, v / dot, 1.0 / dot);
            if share > 0.0 {
                let gloss = px[3];
                blend(px, colour, share);
                px[3] = lerp(gloss, colour[3], share);
            }
        });
    }

    /// The packed texture. Rounding carries a fixed dither, so that gentle shades do not band.
    pub(super) fn pack(&self) -> Vec<Px> {
        let width = self.width;
        self.px
            .iter()
            .enumerate()
            .map(|(i, px)| {
                let dither = hash_unit((i % width) as i32, (i / width) as i32, 77);
                px.map(|value| (value + dither).clamp(0.0, 255.0) as u8)
            })
            .collect()
    }

    /// The packed surface with its opacity.
    pub(super) fn sprite(&self) -> Sprite {
        Sprite { width: self.width, px: self.pack(), alpha: self.alpha.iter().map(|a| (a * 255.0 + 0.5).clamp(0.0, 255.0) as u8).collect() }
    }
}

/// Mix `colour` into a pixel.
pub(super) fn blend(px: &mut [f32; 4], colour: [f32; 4], share: f32) {
    for (value, target) in px.iter_mut().zip(colour) {
        *value = lerp(*value, target, share);
    }
}

/// Make a pixel lighter or darker by `levels`, gloss untouched.
pub(super) fn lighten(px: &mut [f32; 4], levels: f32) {
    for value in px.iter_mut().take(3) {
        *value += levels;
    }
}

/// A small picture with opacity that is stamped on the texture.
pub(super) struct Sprite {
    width: usize,
    px: Vec<Px>,
    alpha: Vec<u8>,
}

impl Sprite {
    /// Width and height in pixels.
    pub(super) fn size(&self) -> [f32; 2] {
        [self.width as f32, (self.px.len() / self.width) as f32]
    }

    /// Stamp with the sprite's middle at (x, y) from the texture's centre, whole pixels; returns what it covers.
    pub(super) fn stamp(&self, texture: &mut [Px], x: i32, y: i32) -> Area {
        let height = (self.px.len() / self.width) as i32;
        let left = x + (WIDTH as i32 - self.width as i32) / 2;
        let top = y + (HEIGHT as i32 - height) / 2;
        let (x0, x1) = (left.max(0), (left + self.width as i32).min(WIDTH as i32));
        let (y0, y1) = (top.max(0), (top + height).min(HEIGHT as i32));
        if x1 <= x0 {
            return Area::EMPTY;
        }
        for row in y0..y1 {
            let from = (row - top) as usize * self.width + (x0 - left) as usize;
            let to = row as usize * WIDTH + x0 as usize;
            let n = (x1 - x0) as usize;
            let source = self.px[from..from + n].iter().zip(&self.alpha[from..from + n]);
            for (px, (colour, &alpha)) in texture[to..to + n].iter_mut().zip(source) {
                mix(px, *colour, u32::from(alpha) + u32::from(alpha >> 7));
            }
        }
        Area { x0, y0, x1, y1 }
    }
}

/// Mix `colour` into a packed pixel, `share` of 256.
pub(super) fn mix(px: &mut Px, colour: Px, share: u32) {
    for (value, target) in px.iter_mut().zip(colour) {
        *value = ((u32::from(*value) * (256 - share) + u32::from(target) * share + 128) >> 8) as u8;
    }
}

/// Surface irregularities, different on every part: a tileable signed texture laid over the base at a random place.
pub(super) struct Detail {
    /// [`TILE`] x [`TILE`], change in red, green, blue, gloss.
    tile: Vec<[i8; 4]>,
    /// Texture-sized: how much of it shows, 128 = as it is.
    amount: Vec<Px>,
}

impl Detail {
    /// `tile(x, y)` gives the change in levels and must repeat every [`TILE`] pixels; `amount(x, y)` (from the centre) its share.
    pub(super) fn new(mut tile: impl FnMut(f32, f32) -> [f32; 4], mut amount: impl FnMut(f32, f32) -> f32) -> Self {
        let cells = (0..TILE * TILE).map(|i| tile((i % TILE) as f32, (i / TILE) as f32).map(|v| v.clamp(-127.0, 127.0) as i8));
        let amounts = (0..WIDTH * HEIGHT).map(|i| {
            let (x, y) = ((i % WIDTH) as f32 + 0.5 - CENTRE[0], (i / WIDTH) as f32 + 0.5 - CENTRE[1]);
            [(amount(x, y) * 128.0).clamp(0.0, 255.0) as u8; 4]
        });
        Self { tile: cells.collect(), amount: amounts.collect() }
    }

    /// `texture = base + detail * amount`, the tile starting at `shift`.
    pub(super) fn lay(&self, base: &[Px], texture: &mut [Px], shift: [usize; 2]) {
        let rows = texture.chunks_exact_mut(WIDTH).zip(base.chunks_exact(WIDTH)).zip(self.amount.chunks_exact(WIDTH));
        for (y, ((texture, base), amount)) in rows.enumerate() {
            let line = &self.tile[((y + shift[1]) % TILE) * TILE..][..TILE];
            let mut at = 0;
            let mut from = shift[0] % TILE;
            while at < WIDTH {
                let n = (TILE - from).min(WIDTH - at);
                add_detail(&mut texture[at..at + n], &base[at..at + n], &line[from..from + n], &amount[at..at + n]);
                at += n;
                from = 0;
            }
        }
    }
}

/// One run of [`Detail::lay`]; flat bytes, so that the compiler vectorises it.
fn add_detail(texture: &mut [Px], base: &[Px], tile: &[[i8; 4]], amount: &[Px]) {
    let inputs = base.as_flattened().iter().zip(tile.as_flattened()).zip(amount.as_flattened());
    for (out, ((&base, &tile), &amount)) in texture.as_flattened_mut().iter_mut().zip(inputs) {
        let change = (i16::from(tile) * i16::from(amount)) >> 7;
        *out = (i16::from(base) + change).clamp(0, 255) as u8;
    }
}
