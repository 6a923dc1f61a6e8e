//! Pseudo-defects on pictures of good parts: generic damage at every size and strength, so that a detector can be trained without a single defective part.
//!
//! The idea is that of DRAEM (Zavrtanik et al. 2021), CutPaste (Li et al. 2021) and NSA (Schlüter et al. 2022): show what good parts look like when
//! something, anything, is locally wrong. A defect is a *shape* (line, blot, box, strip) filled with a *content* (another colour, a stain, shading, a
//! smear, the surroundings, a patch from elsewhere, the same content moved). Nothing here knows how the simulated line draws its defects.
//!
//! How strong a defect is drawn is decided by how well it would be seen there: its change times the square root of its area over the texture beneath
//! (Piper's law). So most training goes into what is hardest, on every surface, and what nobody could see is not called a defect.

use crate::distill::student::RGB;
use crate::distill::synth::normal;
use rand::{Rng, SeedableRng};
use rand_pcg::Pcg64;
use std::f32::consts::{PI, TAU};

/// Share of the pictures that stay good.
const GOOD: f32 = 0.25;
/// Most defects in one picture.
const MOST: usize = 8;
/// Width of the pictures that sizes below are meant for, px; others are scaled.
const NOMINAL_WIDTH: f32 = 320.0;
/// Sizes are not scaled down further than this: a cell of the map must be able to show them.
const LEAST_SCALE: f32 = 0.6;
/// Change of a pixel that counts as visible, in grey levels.
const VISIBLE: f32 = 4.0;
/// A smaller change leaves a pixel good; between the two it is not judged.
const UNCHANGED: f32 = 1.5;
/// A defect of less visibility (see [`visibility`]) is not judged: a person hardly finds it.
const MIN_VISIBILITY: f32 = 3.5;
/// Strengths are drawn for visibilities up to this; opaque ones may have more.
const TOP_VISIBILITY: f32 = 60.0;
/// What a smooth surface counts as texture, in grey levels: sensor noise and the eye's own threshold.
const PLAIN: f32 = 6.0;
/// Pixels over which texture is measured.
const TEXTURE_PX: usize = 2;
/// Noise of content that has none of its own, in grey levels: the input is a mean of several sensor pixels.
const GRAIN: f32 = 0.9;
/// Cells of a field of smooth noise, along each side.
const CELLS: usize = 9;

/// What became of a pixel, or of the pixels of a cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Label {
    /// As on a good part.
    Good,
    /// Changed, but hardly: not judged.
    Unclear,
    /// Defective.
    Defective,
}

/// A picture, `[height, width, 3]`, in grey levels.
#[derive(Clone, Debug)]
pub struct Picture {
    /// Height, px.
    pub height: usize,
    /// Width, px.
    pub width: usize,
    /// Red, green, blue a pixel, 0 to 255.
    pub pixels: Vec<f32>,
}

impl Picture {
    fn at(&self, x: f32, y: f32) -> [f32; RGB] {
        let clamp = |v: f32, n: usize| v.clamp(0.0, n as f32 - 1.001);
        let (x, y) = (clamp(x, self.width), clamp(y, self.height));
        let (x0, y0) = (x as usize, y as usize);
        let (fx, fy) = (x - x0 as f32, y - y0 as f32);
        let get = |x: usize, y: usize| self.pixel(x.min(self.width - 1), y.min(self.height - 1));
        let (a, b, c, d) = (get(x0, y0), get(x0 + 1, y0), get(x0, y0 + 1), get(x0 + 1, y0 + 1));
        std::array::from_fn(|i| (a[i] * (1.0 - fx) + b[i] * fx) * (1.0 - fy) + (c[i] * (1.0 - fx) + d[i] * fx) * fy)
    }

    fn pixel(&self, x: usize, y: usize) -> [f32; RGB] {
        self.pixels.get((y * self.width + x) * RGB..).and_then(|p| p.first_chunk::<RGB>()).copied().unwrap_or([0.0; RGB])
    }
}

/// A damaged picture.
pub struct Damaged {
    /// With its defects.
    pub picture: Picture,
    /// One label a pixel.
    pub labels: Vec<Label>,
}

/// Labels of cells of `stride` x `stride` px, `[rows, columns]`: defective with at least three visible pixels, good without any change.
pub fn cells(damaged: &Damaged, stride: usize) -> Vec<Label> {
    /// Visible pixels that make a cell defective.
    const CELL_PX: usize = 3;
    let (rows, columns) = (damaged.picture.height / stride, damaged.picture.width / stride);
    let mut counts = vec![[0usize; 2]; rows * columns];
    for (i, label) in damaged.labels.iter().enumerate().filter(|(_, l)| **l != Label::Good) {
        let (y, x) = (i / damaged.picture.width / stride, i % damaged.picture.width / stride);
        if let Some(count) = counts.get_mut(y * columns + x) {
            count[usize::from(*label == Label::Defective)] += 1;
        }
    }
    counts
        .into_iter()
        .map(|[unclear, visible]| match (visible, unclear) {
            (CELL_PX.., _) => Label::Defective,
            (0, 0) => Label::Good,
            _ => Label::Unclear,
        })
        .collect()
}

/// Damage `clean`, or leave it good; `other` is another good part of any product. The same `seed` does the same.
pub fn damage(clean: &Picture, other: &Picture, seed: u64) -> Damaged {
    let mut out = Damaged { picture: clean.clone(), labels: vec![Label::Good; clean.height * clean.width] };
    let mut brush = Brush { rng: Pcg64::seed_from_u64(seed), unit: (clean.width as f32 / NOMINAL_WIDTH).max(LEAST_SCALE) };
    if brush.chance(GOOD) {
        return out;
    }
    for _ in 0..1 + brush.below(MOST) {
        brush.defect(&mut out, other);
    }
    for v in &mut out.picture.pixels {
        *v = v.clamp(0.0, 255.0);
    }
    out
}

/// Part of a picture and how much of a defect each of its pixels gets, 0 to 1.
struct Shape {
    x0: usize,
    y0: usize,
    width: usize,
    height: usize,
    cover: Vec<f32>,
    /// Centre, px.
    centre: [f32; 2],
    /// Half extents along and across `angle`, px.
    half: [f32; 2],
    angle: f32,
}

impl Shape {
    fn places(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        (0..self.height).flat_map(move |y| (0..self.width).map(move |x| (self.x0 + x, self.y0 + y)))
    }
}

/// Smooth noise of about unit size, read at any place.
struct Field([f32; CELLS * CELLS]);

impl Field {
    /// `u` and `v` in cells; the field repeats.
    fn at(&self, u: f32, v: f32) -> f32 {
        let (iu, iv) = (u.floor(), v.floor());
        let (fu, fv) = (u - iu, v - iv);
        let wrap = |i: f32| (i as i64).rem_euclid(CELLS as i64) as usize;
        let get = |du: f32, dv: f32| self.0.get(wrap(iv + dv) * CELLS + wrap(iu + du)).copied().unwrap_or(0.0);
        let ease = |t: f32| t * t * (3.0 - 2.0 * t);
        let (fu, fv) = (ease(fu), ease(fv));
        (get(0.0, 0.0) * (1.0 - fu) + get(1.0, 0.0) * fu) * (1.0 - fv) + (get(0.0, 1.0) * (1.0 - fu) + get(1.0, 1.0) * fu) * fv
    }
}

struct Brush {
    rng: Pcg64,
    /// Pixels of this picture to one of the nominal one.
    unit: f32,
}

impl Brush {
    fn between(&mut self, low: f32, high: f32) -> f32 {
        low + self.rng.random::<f32>() * (high - low)
    }

    /// Evenly on a logarithmic scale.
    fn log(&mut self, low: f32, high: f32) -> f32 {
        low * (high / low).powf(self.rng.random::<f32>())
    }

    fn chance(&mut self, share: f32) -> bool {
        self.rng.random::<f32>() < share
    }

    fn below(&mut self, n: usize) -> usize {
        self.rng.random_range(0..n.max(1))
    }

    fn sign(&mut self) -> f32 {
        if self.chance(0.5) { 1.0 } else { -1.0 }
    }

    fn field(&mut self) -> Field {
        Field(std::array::from_fn(|_| normal(&mut self.rng)))
    }

    /// A length in px.
    fn length(&mut self, low: f32, high: f32) -> f32 {
        // Half of them evenly, half with as many small ones as large.
        let nominal = if self.chance(0.5) { self.between(low, high) } else { self.log(low, high) };
        nominal * self.unit
    }

    fn anywhere(&mut self, picture: &Picture) -> [f32; 2] {
        [self.between(0.0, picture.width as f32), self.between(0.0, picture.height as f32)]
    }

    /// A place; as often as `picky` says the one of a few with the most structure: components and print are where parts go wrong in ways of their own.
    fn place(&mut self, picture: &Picture, picky: f32) -> [f32; 2] {
        const TRIES: usize = 3;
        let first = self.anywhere(picture);
        if !self.chance(picky) {
            return first;
        }
        let structure = |[x, y]: [f32; 2]| -> f32 {
            let step = |i: usize| (i as f32 - 2.0) * 2.0;
            let at = |i: usize, j: usize| picture.at(x + step(i), y + step(j))[1];
            (0..5)
                .flat_map(|j| (0..4).map(move |i| (i, j)))
                .map(|(i, j)| (at(i + 1, j) - at(i, j)).abs() + (at(j, i + 1) - at(j, i)).abs())
                .sum()
        };
        let mut best = (structure(first), first);
        for _ in 1..TRIES {
            let other = self.anywhere(picture);
            let found = structure(other);
            if found > best.0 {
                best = (found, other);
            }
        }
        best.1
    }

    fn defect(&mut self, out: &mut Damaged, other: &Picture) {
        match self.below(22) {
            0..=3 => self.line(out),
            4..=5 => self.blot(out),
            6..=7 => self.stain(out),
            8..=9 => self.dent(out),
            10..=11 => self.smear(out),
            12..=14 => self.erased(out),
            15..=16 => self.patch(out, other),
            17..=18 => self.moved(out),
            19..=20 => self.warped(out),
            _ => self.strip(out, other),
        }
    }

    /// Fill in the cover of a shape by a function of the place along and across its axis.
    fn shape(&self, picture: &Picture, centre: [f32; 2], half: [f32; 2], angle: f32, reach: f32, cover: impl Fn(f32, f32) -> f32) -> Shape {
        let (sin, cos) = angle.sin_cos();
        let low = |c: f32, n: usize| (c - reach).floor().clamp(0.0, n as f32) as usize;
        let high = |c: f32, n: usize| (c + reach).ceil().clamp(0.0, n as f32) as usize;
        let (x0, x1) = (low(centre[0], picture.width), high(centre[0], picture.width));
        let (y0, y1) = (low(centre[1], picture.height), high(centre[1], picture.height));
        let mut shape =
            Shape { x0, y0, width: x1.saturating_sub(x0), height: y1.saturating_sub(y0), cover: Vec::new(), centre, half, angle };
        shape.cover = shape
            .places()
            .map(|(x, y)| {
                let (dx, dy) = (x as f32 + 0.5 - centre[0], y as f32 + 0.5 - centre[1]);
                cover(cos * dx + sin * dy, cos * dy - sin * dx)
            })
            .collect();
        shape
    }

    /// A ragged ellipse or a box with soft edges.
    fn area(&mut self, picture: &Picture, half: [f32; 2], boxed: bool) -> Shape {
        let centre = self.place(picture, 0.6);
        let angle = if boxed && self.chance(0.7) { self.between(-0.05, 0.05) } else { self.between(0.0, PI) };
        let soft = self.log(0.3, 2.0).min(half[0].min(half[1])).max(0.2);
        let ragged = if self.chance(0.6) { self.between(0.0, 0.35) } else { 0.0 };
        let (field, scale) = (self.field(), self.between(1.0, 2.5));
        let reach = half[0].max(half[1]) * (1.5 + 2.0 * ragged) + 3.0;
        self.shape(picture, centre, half, angle, reach, |p, q| {
            let (u, v) = (p / half[0], q / half[1]);
            let r = if boxed { u.abs().max(v.abs()) } else { (u * u + v * v).sqrt() } + ragged * field.at(u * scale + 4.0, v * scale + 4.0);
            smooth((1.0 - r) * half[0].min(half[1]) / soft + 0.5)
        })
    }

    fn ellipse(&mut self, picture: &Picture, low: f32, high: f32) -> Shape {
        let a = self.length(low, high) / 2.0;
        let b = a * self.between(0.4, 1.0);
        let boxed = self.chance(0.2);
        self.area(picture, [a, b], boxed)
    }

    /// A colour that is not that of the surface: dark, bright, tinted, or from somewhere else in the picture.
    fn colour(&mut self, picture: &Picture, under: [f32; RGB]) -> [f32; RGB] {
        match self.below(5) {
            0 => {
                let dark = self.between(0.0, 0.45);
                under.map(|v| v * dark)
            }
            1 => {
                let bright = self.between(0.4, 1.0);
                under.map(|v| v + (250.0 - v) * bright)
            }
            2 => {
                let grey = self.between(10.0, 240.0);
                std::array::from_fn(|_| grey + self.between(-12.0, 12.0))
            }
            3 => std::array::from_fn(|_| self.between(5.0, 245.0)),
            _ => {
                let [x, y] = self.anywhere(picture);
                picture.at(x, y)
            }
        }
    }

    /// Scratch, crack, hair: a thin line, bent or jagged, perhaps with branches or a rim.
    fn line(&mut self, out: &mut Damaged) {
        let centre = self.place(&out.picture, 0.35);
        let angle = self.between(0.0, TAU);
        let under = out.picture.at(centre[0], centre[1]);
        let colour = self.colour(&out.picture, under);
        let half = self.length(3.0, 34.0) / 2.0;
        let width = self.log(0.35, 1.3) * self.unit * (0.8 + half / self.unit / 60.0);
        let jag = if self.chance(0.5) { self.between(0.3, 1.8) * self.unit } else { 0.2 };
        let bend = if self.chance(0.6) { self.between(-0.25, 0.25) * half } else { 0.0 };
        let (field, pitch) = (self.field(), self.between(1.5, 5.0) * self.unit);
        let taper = self.chance(0.5);
        let mut shape = self.shape(&out.picture, centre, [half, width], angle, half + 4.0 + jag, |p, q| {
            let s = p / half;
            let d = q - bend * (1.0 - s * s) - jag * field.at(p / pitch, 0.5);
            let w = if taper { width * (1.15 - s.abs()).max(0.2) } else { width };
            smooth((w - d.abs()) / 0.9 + 0.5) * smooth((1.0 - s.abs()) * 4.0)
        });
        for _ in 0..if self.chance(0.3) { 1 + self.below(2) } else { 0 } {
            let (start, turn) = (self.between(-0.6, 0.6) * half, self.sign() * self.between(0.4, 1.2));
            let (sin, cos) = (angle.sin(), angle.cos());
            let long = half * self.between(0.2, 0.6);
            let at = [centre[0] + cos * start, centre[1] + sin * start];
            let thin = width * 0.7;
            let branch = self.shape(&out.picture, centre, [half, width], angle, half + 4.0 + jag, |_, _| 0.0);
            let (bs, bc) = (angle + turn).sin_cos();
            for ((x, y), cover) in branch.places().zip(&mut shape.cover) {
                let (dx, dy) = (x as f32 + 0.5 - at[0], y as f32 + 0.5 - at[1]);
                let (p, q) = (bc * dx + bs * dy, bc * dy - bs * dx);
                let d = q - 0.6 * jag * field.at(p / pitch, 3.5);
                *cover = cover.max(smooth((thin - d.abs()) / 0.9 + 0.5) * smooth(p + 0.5) * smooth((long - p) / 2.0));
            }
        }
        let content: Vec<[f32; RGB]> = shape.places().map(|_| colour).collect();
        self.lay(out, &shape, &content, Strength::ByEye, false, 0.0);
    }

    /// Dirt, a chip, a hole: a patch of another colour with a hard edge, sometimes with spatter beside it.
    fn blot(&mut self, out: &mut Damaged) {
        let mut shape = self.ellipse(&out.picture, 3.0, 30.0);
        let under = out.picture.at(shape.centre[0], shape.centre[1]);
        let colour = self.colour(&out.picture, under);
        let (field, level) = (self.field(), self.between(0.0, 18.0));
        let dense = if self.chance(0.4) { self.between(0.0, 0.4) } else { 0.0 };
        let scale = self.between(2.0, 6.0) * self.unit;
        let holes: Vec<f32> = shape.places().map(|(x, y)| 1.0 - dense * smooth(field.at(x as f32 / scale, y as f32 / scale))).collect();
        shape.cover.iter_mut().zip(holes).for_each(|(c, h)| *c *= h);
        let content: Vec<[f32; RGB]> =
            shape.places().map(|(x, y)| colour.map(|v| v + level * field.at(x as f32 / 2.5 + 3.0, y as f32 / 2.5))).collect();
        self.lay(out, &shape, &content, Strength::ByEye, false, 0.0);
    }

    /// A stain or discolouration: light of some colours is lost or added, the structure stays.
    fn stain(&mut self, out: &mut Damaged) {
        let a = self.length(5.0, 34.0) / 2.0;
        let b = a * self.between(0.6, 1.0);
        let (centre, angle) = (self.place(&out.picture, 0.35), self.between(0.0, PI));
        let (field, ragged, edge) = (self.field(), self.between(0.0, 0.3), self.between(0.1, 0.9));
        let shape = self.shape(&out.picture, centre, [a, b], angle, a * 1.5 + 2.0, |p, q| {
            let (u, v) = (p / a, q / b);
            let r = (u * u + v * v).sqrt() + ragged * field.at(u * 1.5 + 4.0, v * 1.5 + 4.0);
            smooth((1.0 - r) / edge + 0.3)
        });
        let filter: [f32; RGB] = if self.chance(0.4) {
            let grey = self.between(0.3, 0.9);
            [grey; RGB]
        } else {
            std::array::from_fn(|_| self.between(0.3, 1.0))
        };
        let brighter = self.chance(0.25);
        let content: Vec<[f32; RGB]> = shape
            .places()
            .map(|(x, y)| {
                let v = out.picture.pixel(x, y);
                std::array::from_fn(|i| if brighter { v[i] + (255.0 - v[i]) * (1.0 - filter[i]) * 0.7 } else { v[i] * filter[i] })
            })
            .collect();
        self.lay(out, &shape, &content, Strength::ByEye, false, 0.0);
    }

    /// A dent or bump: dark on one side, bright on the other.
    fn dent(&mut self, out: &mut Damaged) {
        let a = self.length(4.0, 32.0) / 2.0;
        let b = a * self.between(0.55, 1.0);
        let (centre, angle, light) = (self.anywhere(&out.picture), self.between(0.0, PI), self.between(0.0, TAU));
        let shape =
            self.shape(&out.picture, centre, [a, b], angle, a * 1.1 + 1.0, |p, q| if (p / a).hypot(q / b) < 1.1 { 1.0 } else { 0.0 });
        let (level, dull, hard) = (self.between(60.0, 140.0), self.between(-0.4, 0.4), self.between(0.6, 1.6));
        let (sin, cos) = light.sin_cos();
        let content: Vec<[f32; RGB]> = shape
            .places()
            .map(|(x, y)| {
                let (dx, dy) = (x as f32 + 0.5 - centre[0], y as f32 + 0.5 - centre[1]);
                let (s, c) = angle.sin_cos();
                let r = ((c * dx + s * dy) / a).hypot((c * dy - s * dx) / b).min(1.0);
                let wall = (r * (1.0 - r * r) * 2.6).powf(hard);
                let towards = (dx * cos + dy * sin) / dx.hypot(dy).max(0.01);
                let change = level * (wall * towards + dull * (1.0 - r) * (1.0 - r));
                out.picture.pixel(x, y).map(|v| v + change)
            })
            .collect();
        self.lay(out, &shape, &content, Strength::ByEye, false, 0.0);
    }

    /// Smeared or blurred: each pixel becomes the mean of some beside it.
    fn smear(&mut self, out: &mut Damaged) {
        let mut half = [self.length(4.0, 32.0) / 2.0, 0.0];
        half[1] = half[0] * self.between(0.4, 1.0);
        let boxed = self.chance(0.6);
        let shape = self.area(&out.picture, half, boxed);
        let angle = if self.chance(0.6) { PI / 2.0 * self.below(4) as f32 } else { self.between(0.0, TAU) };
        let run = self.log(2.0, 8.0) * self.unit;
        let (dx, dy) = (angle.cos(), angle.sin());
        let round = self.chance(0.3);
        const READ: usize = 7;
        let content: Vec<[f32; RGB]> = shape
            .places()
            .map(|(x, y)| {
                let mut sum = [0.0; RGB];
                for i in 0..READ {
                    let t = run * i as f32 / (READ - 1) as f32;
                    let (sx, sy) = if round {
                        let turn = TAU * i as f32 / READ as f32;
                        (turn.cos() * run * 0.5, turn.sin() * run * 0.5)
                    } else {
                        (dx * t, dy * t)
                    };
                    let v = out.picture.at(x as f32 + sx, y as f32 + sy);
                    sum.iter_mut().zip(v).for_each(|(s, v)| *s += v / READ as f32);
                }
                sum
            })
            .collect();
        let strength = if self.chance(0.5) { Strength::Full } else { Strength::ByEye };
        self.lay(out, &shape, &content, strength, false, GRAIN);
    }

    /// Something is not there: the place looks like its surroundings, or like bare ground.
    fn erased(&mut self, out: &mut Damaged) {
        let mut half = [self.length(4.0, 40.0) / 2.0, 0.0];
        half[1] = half[0] * self.log(0.3, 1.0);
        if self.chance(0.5) {
            half.swap(0, 1);
        }
        let boxed = self.chance(0.75);
        let shape = self.area(&out.picture, half, boxed);
        let content = self.surroundings(&out.picture, &shape);
        let strength = if self.chance(0.7) { Strength::Full } else { Strength::ByEye };
        self.lay(out, &shape, &content, strength, false, GRAIN);
    }

    /// What lies around a shape, drawn across it; or one of its colours.
    fn surroundings(&mut self, picture: &Picture, shape: &Shape) -> Vec<[f32; RGB]> {
        if self.chance(0.35) {
            return self.ground(picture, shape);
        }
        let (x0, y0) = (shape.x0 as f32 - 0.5, shape.y0 as f32 - 0.5);
        let (w, h) = (shape.width.max(1) as f32, shape.height.max(1) as f32);
        if self.chance(0.5) {
            // The colour at a place on the rim, more often than not the ground.
            let turn = self.between(0.0, TAU);
            let reach = 1.0 + 2.0 / shape.half[0].max(1.0);
            let (c, s) = (turn.cos() * shape.half[0] * reach, turn.sin() * shape.half[1] * reach);
            let (sin, cos) = shape.angle.sin_cos();
            let colour = picture.at(shape.centre[0] + cos * c - sin * s, shape.centre[1] + sin * c + cos * s);
            return shape.places().map(|_| colour).collect();
        }
        let across = self.chance(0.5);
        let both = self.chance(0.5);
        shape
            .places()
            .map(|(x, y)| {
                let (fx, fy) = ((x as f32 - x0) / w, (y as f32 - y0) / h);
                let (l, r) = (picture.at(x0, y as f32), picture.at(x0 + w, y as f32));
                let (t, b) = (picture.at(x as f32, y0), picture.at(x as f32, y0 + h));
                let wide: [f32; RGB] = std::array::from_fn(|i| l[i] * (1.0 - fx) + r[i] * fx);
                let tall: [f32; RGB] = std::array::from_fn(|i| t[i] * (1.0 - fy) + b[i] * fy);
                match (both, across) {
                    (true, _) => std::array::from_fn(|i| (wide[i] + tall[i]) / 2.0),
                    (_, true) => wide,
                    _ => tall,
                }
            })
            .collect()
    }

    /// Bare ground from near by, brought to the colour around the shape (as NSA does): what a missing piece may leave, without a seam to see it by.
    fn ground(&mut self, picture: &Picture, shape: &Shape) -> Vec<[f32; RGB]> {
        const TRIES: usize = 6;
        let rim = |centre: [f32; 2]| -> ([f32; RGB], f32) {
            let (sin, cos) = shape.angle.sin_cos();
            let (mut sum, mut rough, mut before) = ([0.0; RGB], 0.0, None::<[f32; RGB]>);
            const POINTS: usize = 12;
            for i in 0..POINTS {
                let (t, u) = (TAU * i as f32 / POINTS as f32).sin_cos();
                let (a, b) = (u * (shape.half[0] + 1.5), t * (shape.half[1] + 1.5));
                let v = picture.at(centre[0] + cos * a - sin * b, centre[1] + sin * a + cos * b);
                sum.iter_mut().zip(v).for_each(|(s, v)| *s += v / POINTS as f32);
                rough += before.map_or(0.0, |p| (p[0] - v[0]).abs() + (p[1] - v[1]).abs() + (p[2] - v[2]).abs());
                before = Some(v);
            }
            (sum, rough)
        };
        let (own, _) = rim(shape.centre);
        let mut best = (f32::INFINITY, shape.centre, own);
        for _ in 0..TRIES {
            let (far, turn) = (self.length(6.0, 80.0) + shape.half[0], self.between(0.0, TAU));
            let at = [shape.centre[0] + far * turn.cos(), shape.centre[1] + far * turn.sin()];
            let (colour, rough) = rim(at);
            if rough < best.0 {
                best = (rough, at, colour);
            }
        }
        let (_, from, colour) = best;
        let share = if self.chance(0.7) { 1.0 } else { 0.0 };
        shape
            .places()
            .map(|(x, y)| {
                let v = picture.at(x as f32 - shape.centre[0] + from[0], y as f32 - shape.centre[1] + from[1]);
                std::array::from_fn(|i| v[i] + share * (own[i] - colour[i]))
            })
            .collect()
    }

    /// A patch from elsewhere on this part, or from another.
    fn patch(&mut self, out: &mut Damaged, other: &Picture) {
        let mut half = [self.length(4.0, 40.0) / 2.0, 0.0];
        half[1] = half[0] * self.log(0.3, 1.0);
        if self.chance(0.5) {
            half.swap(0, 1);
        }
        let boxed = self.chance(0.6);
        let shape = self.area(&out.picture, half, boxed);
        let foreign = self.chance(0.3);
        let source = if foreign { other } else { &out.picture };
        let from = if foreign || self.chance(0.4) {
            self.anywhere(source)
        } else {
            let (far, turn) = (self.length(4.0, 60.0), self.between(0.0, TAU));
            [shape.centre[0] + far * turn.cos(), shape.centre[1] + far * turn.sin()]
        };
        // Turned by quarters, mirrored, or as it was.
        let (a, b, c, d) = match self.below(6) {
            0 => (0.0, -1.0, 1.0, 0.0),
            1 => (-1.0, 0.0, 0.0, -1.0),
            2 => (-1.0, 0.0, 0.0, 1.0),
            _ => (1.0, 0.0, 0.0, 1.0),
        };
        let content: Vec<[f32; RGB]> = shape
            .places()
            .map(|(x, y)| {
                let (dx, dy) = (x as f32 - shape.centre[0], y as f32 - shape.centre[1]);
                source.at((from[0] + a * dx + b * dy).round(), (from[1] + c * dx + d * dy).round())
            })
            .collect();
        let strength = if self.chance(0.75) { Strength::Full } else { Strength::ByEye };
        self.lay(out, &shape, &content, strength, true, 0.0);
    }

    /// Content in the wrong place: a piece is moved, over what was there, and leaves bare ground, or a whole region is off by a few pixels.
    fn moved(&mut self, out: &mut Damaged) {
        let turn = self.between(0.0, TAU);
        let (far, lift) = (self.log(2.0, 14.0) * self.unit, self.chance(0.5));
        let offset = [(far * turn.cos()).round(), (far * turn.sin()).round()];
        let large = self.chance(0.35);
        let mut half = if large { [self.length(40.0, 190.0) / 2.0, 0.0] } else { [self.length(6.0, 44.0) / 2.0, 0.0] };
        half[1] = half[0] * self.log(0.25, 1.0);
        if self.chance(0.5) {
            half.swap(0, 1);
        }
        let boxed = self.chance(0.6);
        let shape = self.area(&out.picture, half, boxed);
        let before = out.picture.clone();
        if lift && !large {
            let content = self.surroundings(&out.picture, &shape);
            self.lay(out, &shape, &content, Strength::Full, true, GRAIN);
            let moved = Shape {
                x0: (shape.x0 as f32 + offset[0]).max(0.0) as usize,
                y0: (shape.y0 as f32 + offset[1]).max(0.0) as usize,
                centre: [shape.centre[0] + offset[0], shape.centre[1] + offset[1]],
                cover: shape.cover.clone(),
                ..shape
            };
            let inside = moved.x0 + moved.width <= before.width && moved.y0 + moved.height <= before.height;
            let whole = shape.x0 as f32 + offset[0] >= 0.0 && shape.y0 as f32 + offset[1] >= 0.0;
            if inside && whole {
                let content: Vec<[f32; RGB]> = shape.places().map(|(x, y)| before.pixel(x, y)).collect();
                self.lay(out, &moved, &content, Strength::Full, true, 0.0);
            }
            return;
        }
        let content: Vec<[f32; RGB]> = shape.places().map(|(x, y)| before.at(x as f32 - offset[0], y as f32 - offset[1])).collect();
        self.lay(out, &shape, &content, Strength::Full, true, 0.0);
    }

    /// Out of place without a seam: what lies in an ellipse is shifted or turned, and the shift runs out over a band around it. Print that sits askew, a
    /// part pressed in crookedly: nothing is wrong there but the distances.
    fn warped(&mut self, out: &mut Damaged) {
        let a = self.length(10.0, 110.0) / 2.0;
        let b = a * self.between(0.4, 1.0);
        let (centre, angle) = (self.place(&out.picture, 0.5), self.between(0.0, PI));
        let (far, turn) = (self.log(1.5, 9.0) * self.unit, self.between(0.0, TAU));
        let (dx, dy) = (far * turn.cos(), far * turn.sin());
        // Turned by as much as moves its ends by that distance.
        let twist = if self.chance(0.3) { self.sign() * far / a } else { 0.0 };
        // Steeper than the shift is long, the picture would fold.
        let band = self.between(1.6, 4.0) * far / a + 0.1;
        let reach = a * (1.0 + band) + 1.0;
        let (sin, cos) = angle.sin_cos();
        let shape =
            self.shape(&out.picture, centre, [a, b], angle, reach, |p, q| if (p / a).hypot(q / b) < 1.0 + band { 1.0 } else { 0.0 });
        let content: Vec<[f32; RGB]> = shape
            .places()
            .map(|(x, y)| {
                let (px, py) = (x as f32 + 0.5 - centre[0], y as f32 + 0.5 - centre[1]);
                let r = ((cos * px + sin * py) / a).hypot((cos * py - sin * px) / b);
                let share = smooth((1.0 + band - r) / band);
                let (mx, my) = if twist == 0.0 { (dx, dy) } else { (-twist * py, twist * px) };
                out.picture.at(x as f32 - share * mx, y as f32 - share * my)
            })
            .collect();
        self.lay(out, &shape, &content, Strength::Full, true, 0.5 * GRAIN);
    }

    /// A narrow strip along or across the picture, or at any angle, of other content: a missing thread, a print head that failed.
    fn strip(&mut self, out: &mut Damaged, other: &Picture) {
        let half = [self.length(4.0, 34.0) / 2.0, self.log(0.7, 2.5) * self.unit];
        let centre = self.anywhere(&out.picture);
        let angle = match self.below(4) {
            0 => self.between(0.0, PI),
            1 => self.between(-0.05, 0.05),
            _ => PI / 2.0 * self.below(2) as f32 + self.between(-0.05, 0.05),
        };
        let shape = self.shape(&out.picture, centre, half, angle, half[0] + 2.0, |p, q| {
            smooth(half[0] - p.abs() + 0.5) * smooth((half[1] - q.abs()) / 0.8 + 0.5)
        });
        let content = match self.below(3) {
            0 => {
                let under = out.picture.at(centre[0], centre[1]);
                let colour = self.colour(&out.picture, under);
                shape.places().map(|_| colour).collect()
            }
            1 => {
                let shift = [self.sign() * self.between(2.0, 6.0), self.sign() * self.between(2.0, 6.0)];
                shape.places().map(|(x, y)| out.picture.at(x as f32 + shift[0], y as f32 + shift[1])).collect()
            }
            _ if self.chance(0.3) => shape.places().map(|(x, y)| other.pixel(x, y)).collect(),
            _ => {
                // What is darkest within reach: the ground under the thread.
                let reach = 3;
                let near = |x: usize, y: usize| {
                    let places = (0..=2 * reach).map(|i| out.picture.at(x as f32 + i as f32 - reach as f32, y as f32));
                    places.fold([255.0f32; RGB], |low, v| if v.iter().sum::<f32>() < low.iter().sum() { v } else { low })
                };
                shape.places().map(|(x, y)| near(x, y)).collect::<Vec<_>>()
            }
        };
        self.lay(out, &shape, &content, Strength::ByEye, false, 0.5 * GRAIN);
    }

    /// Lay `content` on the picture where the shape covers it, and label what changed. `structure`: a change counts only if a patch of 5 x 5 px changes
    /// in the mean, since one place of a texture looks like another.
    fn lay(&mut self, out: &mut Damaged, shape: &Shape, content: &[[f32; RGB]], strength: Strength, structure: bool, grain: f32) {
        if shape.cover.is_empty() {
            return;
        }
        let (w, h) = (shape.width, shape.height);
        let mut changes: Vec<[f32; RGB]> = Vec::with_capacity(w * h);
        for (((x, y), cover), to) in shape.places().zip(&shape.cover).zip(content) {
            let from = out.picture.pixel(x, y);
            changes.push(std::array::from_fn(|i| cover * (to[i].clamp(0.0, 255.0) - from[i])));
        }
        let seen = if structure { averaged(&changes, w, h) } else { changes.clone() };
        let largest: Vec<f32> = seen.iter().map(|c| c.iter().fold(0.0f32, |m, v| m.max(v.abs()))).collect();
        let texture = texture(&out.picture, shape);
        let full = visibility(&largest, 1.0, texture);
        let opacity = match strength {
            Strength::Full => 1.0,
            Strength::ByEye => {
                let wanted = self.log(MIN_VISIBILITY * 0.8, TOP_VISIBILITY);
                (wanted / full.max(1e-3)).clamp(0.02, 1.0)
            }
        };
        let visible = visibility(&largest, opacity, texture) >= MIN_VISIBILITY;
        for ((((x, y), change), size), cover) in shape.places().zip(&changes).zip(&largest).zip(&shape.cover) {
            let at = y * out.picture.width + x;
            if let Some(pixel) = out.picture.pixels.get_mut(at * RGB..at * RGB + RGB) {
                let noisy = grain * cover * opacity;
                for (v, c) in pixel.iter_mut().zip(change) {
                    *v += c * opacity + if noisy > 0.0 { noisy * normal(&mut self.rng) } else { 0.0 };
                }
            }
            // What is structure to the eye is noise to a pixel: between the two nothing is judged.
            let own = change.iter().fold(0.0f32, |m, v| m.max(v.abs())) * opacity;
            let label = match size * opacity {
                VISIBLE.. if visible => Label::Defective,
                UNCHANGED.. => Label::Unclear,
                _ if structure && own >= VISIBLE => Label::Unclear,
                _ => Label::Good,
            };
            if let Some(to) = out.labels.get_mut(at) {
                *to = label.max(*to);
            }
        }
    }
}

/// How a defect's opacity is chosen.
#[derive(Clone, Copy)]
enum Strength {
    /// Opaque.
    Full,
    /// So that it is seen about as well as was drawn at random.
    ByEye,
}

/// From 0 below 0 to 1 above 1.
fn smooth(t: f32) -> f32 {
    let t = t.clamp(0.0, 1.0);
    t * t * (3.0 - 2.0 * t)
}

/// Mean change of the visible pixels times the square root of their number over the texture: what a person sees follows this product.
fn visibility(changes: &[f32], opacity: f32, texture: f32) -> f32 {
    let (mut count, mut sum) = (0.0f32, 0.0f32);
    for change in changes.iter().map(|c| c * opacity).filter(|c| *c >= VISIBLE) {
        count += 1.0;
        sum += change;
    }
    if count == 0.0 { 0.0 } else { sum / count.sqrt() / (PLAIN + texture) }
}

/// Mean difference of pixels [`TEXTURE_PX`] apart where the shape covers the picture, in grey levels.
fn texture(picture: &Picture, shape: &Shape) -> f32 {
    let (mut sum, mut count) = (0.0, 0.0f32);
    for ((x, y), _) in shape.places().zip(&shape.cover).filter(|(_, c)| **c > 0.3) {
        let (own, left, above) =
            (picture.pixel(x, y), picture.pixel(x.saturating_sub(TEXTURE_PX), y), picture.pixel(x, y.saturating_sub(TEXTURE_PX)));
        let difference = |a: [f32; RGB]| a.iter().zip(own).fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
        sum += (difference(left) + difference(above)) / 2.0;
        count += 1.0;
    }
    sum / count.max(1.0)
}

/// Means over 5 x 5 px, fewer at the rim.
fn averaged(changes: &[[f32; RGB]], width: usize, height: usize) -> Vec<[f32; RGB]> {
    const REACH: usize = 2;
    let line = |from: &[[f32; RGB]], count: usize, step: usize, other: usize, other_step: usize| {
        let mut out = vec![[0.0; RGB]; from.len()];
        for o in 0..other {
            for i in 0..count {
                let (low, high) = (i.saturating_sub(REACH), (i + REACH + 1).min(count));
                let mut sum = [0.0; RGB];
                for k in low..high {
                    if let Some(v) = from.get(o * other_step + k * step) {
                        sum.iter_mut().zip(v).for_each(|(s, v)| *s += v);
                    }
                }
                if let Some(to) = out.get_mut(o * other_step + i * step) {
                    *to = sum.map(|s| s / (high - low) as f32);
                }
            }
        }
        out
    };
    let rows = line(changes, width, 1, height, width);
    line(&rows, height, width, width, 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(level: f32) -> Picture {
        let mut rng = Pcg64::seed_from_u64(3);
        let pixels = (0..240 * 320 * RGB).map(|_| level + normal(&mut rng)).collect();
        Picture { height: 240, width: 320, pixels }
    }

    #[test]
    fn what_is_called_defective_has_changed_and_what_is_called_good_has_not() {
        let (clean, other) = (plain(120.0), plain(60.0));
        let (mut good, mut bad) = (0, 0);
        for seed in 0..60 {
            let damaged = damage(&clean, &other, seed);
            for (i, label) in damaged.labels.iter().enumerate() {
                let change = (0..RGB).map(|c| (damaged.picture.pixels[i * RGB + c] - clean.pixels[i * RGB + c]).abs()).fold(0.0, f32::max);
                if *label == Label::Good {
                    assert!(change < VISIBLE + 5.0 * GRAIN, "seed {seed}: a good pixel changed by {change}");
                }
            }
            let cells = cells(&damaged, 8);
            assert_eq!(cells.len(), 30 * 40);
            if cells.contains(&Label::Defective) {
                bad += 1
            } else {
                good += 1
            }
            let again = super::damage(&clean, &other, seed);
            assert!(again.picture.pixels == damaged.picture.pixels && again.labels == damaged.labels);
        }
        assert!(good > 5 && bad > 25, "{good} good, {bad} defective");
    }
}
