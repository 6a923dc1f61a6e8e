//! Defects: what kinds there are, how large and how strong they are drawn, and the brushes that put them on a surface.
//!
//! A brush changes the assembled texture and returns the area it touched. It knows nothing of light and camera: the optics treat a
//! defect like any other surface, and the mask is measured afterwards from the two pictures, with and without.

use super::canvas::{Area, CENTRE, HEIGHT, Px, WIDTH, mix};
use super::math::{Rng, cos_turns, length, noise, segment, sin_turns, smoothstep};

/// What can be wrong with a part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DefectKind {
    /// A fine line scored into the surface.
    Scratch,
    /// A hollow pressed into the surface.
    Dent,
    /// Grease, dirt or chips on the surface.
    Contamination,
    /// Something that should be there is not.
    MissingComponent,
    /// Print that is smeared, blotted out or doubled.
    Misprint,
    /// A jagged fracture.
    Crack,
    /// A stain that changes the colour but not the structure.
    Discolouration,
    /// Something in the wrong place or askew.
    WrongPosition,
    /// A hole torn into cloth.
    Hole,
    /// A yarn that is missing over some length.
    BrokenYarn,
}

impl DefectKind {
    /// Every kind.
    pub const ALL: [Self; 10] = [
        Self::Scratch,
        Self::Dent,
        Self::Contamination,
        Self::MissingComponent,
        Self::Misprint,
        Self::Crack,
        Self::Discolouration,
        Self::WrongPosition,
        Self::Hole,
        Self::BrokenYarn,
    ];

    /// The name used in folder names and records.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Scratch => "scratch",
            Self::Dent => "dent",
            Self::Contamination => "contamination",
            Self::MissingComponent => "missing_component",
            Self::Misprint => "misprint",
            Self::Crack => "crack",
            Self::Discolouration => "discolouration",
            Self::WrongPosition => "wrong_position",
            Self::Hole => "hole",
            Self::BrokenYarn => "broken_yarn",
        }
    }
}

/// The range that sizes and strengths are drawn from, evenly.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DefectRange {
    /// Longest extent, in picture pixels: smallest and largest.
    pub size_px: [f32; 2],
    /// Strength as a share of the defect at its fullest (a black crack, a bare pad): smallest and largest, in (0, 1].
    pub contrast: [f32; 2],
}

impl Default for DefectRange {
    /// 8 to 60 px, contrast 0.15 to 1.
    fn default() -> Self {
        Self { size_px: [8.0, 60.0], contrast: [0.15, 1.0] }
    }
}

/// One defect to be drawn.
#[derive(Clone, Copy)]
pub(super) struct Draw {
    pub(super) kind: DefectKind,
    pub(super) size_px: f32,
    pub(super) contrast: f32,
    pub(super) rng: Rng,
}

/// How a product's surface takes damage.
#[derive(Clone, Copy)]
pub(super) struct Surface {
    /// The colour of a fresh scratch.
    pub(super) scratch: Px,
    /// The colours of dirt, one is drawn.
    pub(super) dirt: [Px; 3],
    /// The colours of stains, one is drawn.
    pub(super) stain: [Px; 3],
    /// The bottom of a crack.
    pub(super) crack: Px,
    /// Shading of a dent's walls at full contrast, in levels.
    pub(super) dent_levels: f32,
}

impl Draw {
    /// Put a surface defect at (x, y) from the texture's centre. Kinds that depend on the product's build are the product's own and
    /// draw nothing here.
    pub(super) fn on_surface(&mut self, texture: &mut [Px], surface: &Surface, x: f32, y: f32) -> Area {
        match self.kind {
            DefectKind::Scratch => self.scratch(texture, surface.scratch, x, y),
            DefectKind::Dent => self.dent(texture, surface.dent_levels, x, y),
            DefectKind::Contamination => {
                let colour = surface.dirt[self.rng.below(3) as usize];
                self.dirt(texture, colour, x, y)
            }
            DefectKind::Discolouration => {
                let colour = surface.stain[self.rng.below(3) as usize];
                self.stain(texture, colour, x, y)
            }
            DefectKind::Crack => self.crack(texture, surface.crack, x, y),
            _ => Area::EMPTY,
        }
    }

    /// A gently bent line: a core in the scratch colour, its rim darker, fading at the ends.
    fn scratch(&mut self, texture: &mut [Px], colour: Px, x: f32, y: f32) -> Area {
        let half = self.size_px / 2.0;
        let turn = self.rng.unit();
        let bend = self.rng.range(-0.15, 0.15) * self.size_px;
        let width = (0.8 + self.size_px / 40.0) * self.rng.range(0.8, 1.25);
        let (cos, sin) = (cos_turns(turn), sin_turns(turn));
        let seed = self.rng.next_u32();
        let contrast = self.contrast;
        brush(texture, [x, y], half + 4.0, |dx, dy, px| {
            let (along, across) = (dx * cos + dy * sin, dy * cos - dx * sin);
            let s = along / half;
            let across = across - bend * (1.0 - s * s) + noise(along / 5.0, 0.0, [0, 0], seed) * 0.5;
            let fade = smoothstep(1.0, 0.75, s.abs()) * (0.85 + 0.15 * noise(along / 3.0, 9.0, [0, 0], seed));
            let core = smoothstep(width * 0.5 + 0.6, width * 0.5 - 0.6, across.abs());
            let rim = smoothstep(1.5, 0.0, (across - width * 0.5 - 0.8).abs());
            tint(px, [0, 0, 0, 0], 0.35 * rim * fade * contrast);
            tint(px, colour, core * fade * contrast);
        })
    }

    /// A hollow: the wall towards the light is dark, the far one bright, the bottom a little dull.
    fn dent(&mut self, texture: &mut [Px], levels: f32, x: f32, y: f32) -> Area {
        let radius = self.size_px / 2.0;
        let turn = self.rng.unit();
        let flat = self.rng.range(0.65, 1.0);
        let (cos, sin) = (cos_turns(turn), sin_turns(turn));
        let strength = levels * self.contrast;
        brush(texture, [x, y], radius + 3.0, |dx, dy, px| {
            let (a, b) = (dx * cos + dy * sin, (dy * cos - dx * sin) / flat);
            let r = length(a, b) / radius;
            if r < 1.0 {
                // Slope of the bowl (1 - r^2)^2, towards the light at the upper left.
                let slope = 2.6 * r * (1.0 - r * r);
                let towards = (dx * 0.6 + dy * 0.8) / length(dx, dy).max(1e-3);
                let change = strength * (slope * towards - 0.12 * (1.0 - r));
                for value in px.iter_mut().take(3) {
                    *value = (f32::from(*value) + change + 0.5).clamp(0.0, 255.0) as u8;
                }
                px[3] = (f32::from(px[3]) * (1.0 - 0.4 * slope * self.contrast)).clamp(0.0, 255.0) as u8;
            }
        })
    }

    /// A ragged blot with a dense middle, sometimes with spatter beside it.
    fn dirt(&mut self, texture: &mut [Px], colour: Px, x: f32, y: f32) -> Area {
        let spots = 1 + self.rng.below(3);
        let mut area = Area::EMPTY;
        for spot in 0..spots {
            let (radius, away) = if spot == 0 {
                (self.size_px * if spots == 1 { 0.5 } else { 0.38 }, 0.0)
            } else {
                (self.size_px * self.rng.range(0.06, 0.12), self.size_px * self.rng.range(0.36, 0.42))
            };
            let turn = self.rng.unit();
            let (sx, sy) = (x + away * cos_turns(turn), y + away * sin_turns(turn));
            let seed = self.rng.next_u32();
            let contrast = self.contrast;
            let joined = brush(texture, [sx, sy], radius + 3.0, |dx, dy, px| {
                let r = length(dx, dy).max(1e-3);
                // The outline wanders with the direction; the noise is read on a circle so that it closes.
                let ragged = 0.78 + 0.22 * noise(dx / r * 1.6 + 5.0, dy / r * 1.6 + 5.0, [0, 0], seed);
                let edge = radius * ragged;
                let soft = (radius * 0.12).clamp(0.7, 2.5);
                let dense = 0.82 + 0.18 * noise(dx / 3.5, dy / 3.5, [0, 0], seed ^ 1);
                tint(px, colour, smoothstep(edge + soft, edge - soft, r) * dense * contrast);
            });
            area = area.join(joined);
        }
        area
    }

    /// A soft stain; structure shows through.
    fn stain(&mut self, texture: &mut [Px], colour: Px, x: f32, y: f32) -> Area {
        let radius = self.size_px / 2.0;
        let seed = self.rng.next_u32();
        let strength = 0.62 * self.contrast;
        brush(texture, [x, y], radius + 2.0, |dx, dy, px| {
            let r = length(dx, dy) / radius + 0.16 * noise(dx / radius * 1.5, dy / radius * 1.5, [0, 0], seed);
            let share = smoothstep(1.0, 0.45, r) * strength;
            // Multiply rather than cover: a stain filters the light that the surface returns.
            for (value, filter) in px.iter_mut().zip(colour).take(3) {
                let stained = f32::from(*value) * f32::from(filter) / 255.0;
                *value = (f32::from(*value) + (stained - f32::from(*value)) * share * 1.5 + 0.5).clamp(0.0, 255.0) as u8;
            }
        })
    }

    /// A jagged line that narrows towards its ends, with up to two branches.
    fn crack(&mut self, texture: &mut [Px], colour: Px, x: f32, y: f32) -> Area {
        let mut heading = self.rng.unit();
        let width = (0.7 + self.size_px / 40.0) * self.rng.range(0.85, 1.2);
        let (cos, sin) = (cos_turns(heading), sin_turns(heading));
        let start = [x - cos * self.size_px / 2.0, y - sin * self.size_px / 2.0];
        const STEPS: usize = 9;
        let step = self.size_px / STEPS as f32;
        let main = heading;
        let mut area = Area::EMPTY;
        let mut from = start;
        let fork = [3 + self.rng.below(2) as usize, 5 + self.rng.below(3) as usize];
        let forks = self.rng.below(3) as usize;
        for i in 0..STEPS {
            heading = main + self.rng.range(-0.12, 0.12);
            let to = [from[0] + step * cos_turns(heading), from[1] + step * sin_turns(heading)];
            let middle = 1.0 - ((i as f32 + 0.5) / STEPS as f32 * 2.0 - 1.0).abs();
            let here = width * (0.45 + 0.55 * middle);
            area = area.join(self.crack_piece(texture, colour, from, to, here));
            if fork.iter().take(forks).any(|&f| f == i) {
                let aside = heading + if self.rng.below(2) == 0 { 0.13 } else { -0.13 };
                let reach = step * self.rng.range(1.2, 2.2);
                let tip = [to[0] + reach * cos_turns(aside), to[1] + reach * sin_turns(aside)];
                area = area.join(self.crack_piece(texture, colour, to, tip, here * 0.6));
            }
            from = to;
        }
        area
    }

    fn crack_piece(&self, texture: &mut [Px], colour: Px, from: [f32; 2], to: [f32; 2], width: f32) -> Area {
        let middle = [(from[0] + to[0]) / 2.0, (from[1] + to[1]) / 2.0];
        let reach = length(to[0] - from[0], to[1] - from[1]) / 2.0 + width + 2.0;
        brush(texture, middle, reach, |dx, dy, px| {
            let d = segment(dx + middle[0], dy + middle[1], from, to);
            tint(px, colour, smoothstep(width * 0.5 + 0.6, width * 0.5 - 0.6, d) * self.contrast);
        })
    }

    /// Print that ran: within a box around (x, y) every pixel becomes the mean of those before it in the row, or the print is
    /// blotted out to the paper's colour. `paper` is the colour of unprinted stock.
    pub(super) fn misprint(&mut self, texture: &mut [Px], paper: Px, x: f32, y: f32) -> Area {
        let (w, h) = (self.size_px / 2.0, self.size_px * self.rng.range(0.3, 0.5));
        let seed = self.rng.next_u32();
        let contrast = self.contrast;
        let inside = move |dx: f32, dy: f32| {
            let wander = 0.15 * noise(dx / 6.0, dy / 6.0, [0, 0], seed);
            smoothstep(1.0, 0.8, (dx / w).abs().max((dy / h).abs()) + wander)
        };
        if self.rng.below(2) == 0 {
            return brush(texture, [x, y], w + 2.0, |dx, dy, px| tint(px, paper, inside(dx, dy) * contrast));
        }
        let run = self.rng.range(7.0, 13.0) as usize;
        let area = Area::around(x, y, w + 2.0, h + 2.0);
        for row in area.y0..area.y1 {
            // From right to left, so that what is read has not been smeared yet.
            for column in (area.x0..area.x1).rev() {
                let at = row as usize * WIDTH + column as usize;
                let from = at.saturating_sub(run);
                let mut sums = [0u32; 4];
                let window = texture.get(from..=at).unwrap_or_default();
                for px in window {
                    for (sum, &value) in sums.iter_mut().zip(px) {
                        *sum += u32::from(value);
                    }
                }
                let n = window.len().max(1) as u32;
                let smeared = sums.map(|sum| (sum / n) as u8);
                let (dx, dy) = (column as f32 + 0.5 - CENTRE[0] - x, row as f32 + 0.5 - CENTRE[1] - y);
                if let Some(px) = texture.get_mut(at) {
                    tint(px, smeared, inside(dx, dy) * contrast);
                }
            }
        }
        area
    }

    /// A place drawn evenly from `tries` points that satisfies `allowed`, else the last one tried.
    pub(super) fn place(&mut self, half: [f32; 2], allowed: impl Fn(f32, f32) -> bool) -> [f32; 2] {
        /// Enough that a product whose allowed surface is a tenth of the box misses it once in 800 000 parts.
        const TRIES: usize = 128;
        let mut at = [0.0, 0.0];
        for _ in 0..TRIES {
            at = [self.rng.range(-half[0], half[0]), self.rng.range(-half[1], half[1])];
            if allowed(at[0], at[1]) {
                break;
            }
        }
        at
    }
}

/// Mix `colour` into a packed pixel, `share` from 0 to 1.
pub(super) fn tint(px: &mut Px, colour: Px, share: f32) {
    mix(px, colour, (share.clamp(0.0, 1.0) * 256.0 + 0.5) as u32);
}

/// Call `draw(dx, dy, pixel)` for every pixel within `reach` of `centre`, offsets from the centre; returns the area.
pub(super) fn brush(texture: &mut [Px], centre: [f32; 2], reach: f32, mut draw: impl FnMut(f32, f32, &mut Px)) -> Area {
    let area = Area::around(centre[0], centre[1], reach, reach);
    if area.is_empty() {
        return Area::EMPTY;
    }
    for y in area.y0..area.y1 {
        let dy = y as f32 + 0.5 - CENTRE[1] - centre[1];
        let row = y as usize * WIDTH;
        for (x, px) in (area.x0..area.x1).zip(&mut texture[row + area.x0 as usize..row + area.x1 as usize]) {
            draw(x as f32 + 0.5 - CENTRE[0] - centre[0], dy, px);
        }
    }
    debug_assert!(area.y1 <= HEIGHT as i32);
    area
}
