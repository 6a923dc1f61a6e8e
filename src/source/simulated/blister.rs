//! A blister pack: embossed foil under clear film, ten pockets, a scored tablet in each.

use super::canvas::{Area, Canvas, Detail, Px, Sprite, TILE, blend, lighten};
use super::defect::{DefectKind, Draw, Surface};
use super::math::{Rng, cos_turns, cover, fbm, length, lerp, noise, pow2n, rounded_box, sin_turns, smoothstep};
use super::optics::Setup;
use super::product::Product;

const HALF: [f32; 2] = [280.0, 186.0];
const CORNER: f32 = 26.0;
const POCKET: f32 = 46.0;
const TABLET: f32 = 33.0;
/// Orientations of the score line that are kept ready.
const TURNS: u32 = 16;

fn pocket(i: usize) -> [f32; 2] {
    [(i % 5) as f32 * 106.0 - 212.0, if i < 5 { -84.0 } else { 66.0 }]
}

/// Offset from the nearest pocket's centre.
fn from_pocket(x: f32, y: f32) -> [f32; 2] {
    let column = ((x + 212.0) / 106.0 + 0.5).floor().clamp(0.0, 4.0);
    [x - (column * 106.0 - 212.0), y - if y < -9.0 { -84.0 } else { 66.0 }]
}

pub(super) struct Blister {
    base: Vec<Px>,
    detail: Detail,
    tablets: Vec<Sprite>,
    gleam: Sprite,
}

impl Blister {
    pub(super) fn new() -> Self {
        let mut canvas = Canvas::texture();
        canvas.paint(|x, y, px| {
            let grain = 3.0 * noise(x / 2.0, y / 2.0, [0, 0], 81) + 4.0 * fbm(x / 70.0, y / 70.0, 82);
            *px = [52.0 + grain, 74.0 + grain, 98.0 + grain, 8.0];
            let pack = rounded_box(x, y, HALF, CORNER);
            lighten(px, -34.0 * smoothstep(12.0, -6.0, rounded_box(x - 5.0, y - 7.0, HALF, CORNER)));
            if pack < 1.0 {
                let mut foil = foil(x, y);
                pocket_wall(&mut foil, x, y);
                // The cut edge of film and foil.
                lighten(&mut foil, 30.0 * smoothstep(1.8, 0.0, (pack + 2.0).abs()) - 26.0 * smoothstep(1.8, 0.0, (pack + 4.5).abs()));
                blend(px, foil, cover(pack));
            }
        });
        for (shift, colour) in [(1.2, [214.0, 218.0, 222.0, 150.0]), (0.0, [104.0, 108.0, 114.0, 60.0])] {
            canvas.text([0.0 + shift, 152.0 + shift], 2.3, "LOT A4471   EXP 05.2029", colour, true);
            canvas.text([0.0 + shift, -158.0 + shift], 2.0, "ACETYLCULLIN 500 MG", colour, true);
        }
        let tablets = (0..TURNS).map(|i| tablet(i as f32 / (2.0 * TURNS as f32))).collect();
        let n = TILE as i32;
        // Foil is never flat: soft creases, in colour faintly and in gloss strongly.
        let detail = Detail::new(
            |x, y| {
                let crease = noise(x / 32.0, y / 32.0, [n / 32, n / 32], 83) + 0.5 * noise(x / 16.0, y / 16.0, [n / 16, n / 16], 84);
                let grain = 3.0 * noise(x / 2.0, y / 2.0, [n / 2, n / 2], 85);
                [crease * 7.0 + grain, crease * 7.0 + grain, crease * 7.0 + grain, crease * 16.0]
            },
            |x, y| {
                let [dx, dy] = from_pocket(x, y);
                lerp(0.5, 1.0, cover(rounded_box(x, y, HALF, CORNER))) * lerp(1.0, 0.4, cover(length(dx, dy) - POCKET))
            },
        );
        Self { base: canvas.pack(), detail, tablets, gleam: gleam() }
    }
}

/// Aluminium with a rolled diamond grain.
fn foil(x: f32, y: f32) -> [f32; 4] {
    const GRAIN: f32 = 9.0;
    let (a, b) = ((x + y) / GRAIN, (x - y) / GRAIN);
    // Slopes of the bumps, lit from the upper left.
    let slope = 0.8 * sin_turns(a) + 0.25 * sin_turns(b);
    let bump = 0.5 + 0.25 * (cos_turns(a) + cos_turns(b));
    let mut px = [158.0, 162.0, 168.0, 84.0];
    lighten(&mut px, 15.0 * slope + 4.0 * fbm(x / 80.0, y / 50.0, 86));
    px[3] += 64.0 * bump;
    px
}

/// The formed film around and over a tablet: a flange, a steep wall, a clear dome.
fn pocket_wall(px: &mut [f32; 4], x: f32, y: f32) {
    let [dx, dy] = from_pocket(x, y);
    let r = length(dx, dy);
    if r > POCKET + 8.0 {
        return;
    }
    let towards = (dx * -0.6 + dy * -0.8) / r.max(1.0);
    // Smooth foil under the dome, in the shade of the wall.
    let mut inside = [138.0, 142.0, 150.0, 70.0];
    lighten(&mut inside, -18.0 * towards * smoothstep(10.0, POCKET, r));
    blend(px, inside, cover(r - POCKET));
    lighten(px, 52.0 * towards * smoothstep(5.0, 0.0, (r - POCKET + 2.0).abs()));
    lighten(px, -30.0 * towards * smoothstep(4.0, 0.0, (r - POCKET - 3.0).abs()));
    px[3] += 60.0 * smoothstep(6.0, 0.0, (r - POCKET + 1.0).abs());
    px[3] = px[3].max(0.0);
}

/// A round, biconvex tablet with a score line.
fn tablet(turn: f32) -> Sprite {
    let mut canvas = Canvas::new(88, 88);
    canvas.paint(|_, _, px| *px = [40.0, 42.0, 46.0, 20.0]);
    let (cos, sin) = (cos_turns(turn), sin_turns(turn));
    canvas.paint_box([0.0, 0.0], [43.0, 43.0], |x, y, px, alpha| {
        *alpha = 0.5 * smoothstep(TABLET + 7.0, TABLET - 6.0, length(x - 3.0, y - 4.0));
        let r = length(x, y);
        let share = cover(r - TABLET);
        let towards = (x * -0.6 + y * -0.8) / TABLET;
        let mut pill = [222.0, 218.0, 204.0, 26.0];
        // Gently domed, with a bevel at the rim.
        lighten(&mut pill, 20.0 * towards + 24.0 * towards * smoothstep(TABLET - 6.0, TABLET - 2.0, r));
        lighten(&mut pill, -30.0 * smoothstep(TABLET - 3.0, TABLET, r));
        let across = x * sin - y * cos;
        let lit = (sin * -0.6 - cos * -0.8) * across;
        if r < TABLET - 2.0 {
            lighten(&mut pill, -46.0 * smoothstep(2.6, 0.4, across.abs()));
            lighten(&mut pill, 18.0 * smoothstep(2.2, 0.0, (across.abs() - 3.4).abs()) * if lit < 0.0 { 1.0 } else { -0.5 });
        }
        lighten(&mut pill, 3.0 * noise(x / 2.2, y / 2.2, [0, 0], 87));
        blend(px, pill, share);
        *alpha = alpha.max(share);
    });
    canvas.sprite()
}

/// Reflections on the dome: a bright window at the upper left, a faint arc opposite.
fn gleam() -> Sprite {
    let mut canvas = Canvas::new(88, 88);
    canvas.paint(|_, _, px| *px = [252.0, 253.0, 255.0, 140.0]);
    canvas.paint_box([0.0, 0.0], [43.0, 43.0], |x, y, _, alpha| {
        let r = length(x, y);
        let towards = (x * -0.6 + y * -0.8) / r.max(1.0);
        let window = smoothstep(5.0, 1.5, (r - 31.0).abs()) * smoothstep(0.80, 0.93, towards);
        let arc = smoothstep(3.5, 0.5, (r - 38.0).abs()) * pow2n((-towards).max(0.0), 2);
        *alpha = (0.8 * window).max(0.34 * arc);
    });
    canvas.sprite()
}

impl Product for Blister {
    fn name(&self) -> &'static str {
        "blister_pack"
    }

    fn setup(&self) -> Setup {
        Setup { shift_px: 8.0, turn_deg: 1.8, scale: 0.01, shine: 0.42, spot: [0.5, 0.6] }
    }

    fn defects(&self) -> &'static [DefectKind] {
        &[
            DefectKind::MissingComponent,
            DefectKind::WrongPosition,
            DefectKind::Crack,
            DefectKind::Contamination,
            DefectKind::Discolouration,
            DefectKind::Dent,
            DefectKind::Scratch,
        ]
    }

    fn assemble(&self, mut rng: Rng, mut defect: Option<&mut Draw>, texture: &mut [Px]) -> Area {
        let shift = [rng.below(TILE as u32) as usize, rng.below(TILE as u32) as usize];
        self.detail.lay(&self.base, texture, shift);
        const COUNT: usize = 10;
        let which = defect.as_deref_mut().map(|draw| draw.rng.below(COUNT as u32) as usize);
        let mut area = Area::EMPTY;
        for i in 0..COUNT {
            let [px, py] = pocket(i).map(|v| v as i32);
            let (dx, dy) = (rng.jitter(4), rng.jitter(4));
            let turn = rng.below(TURNS) as usize;
            let Some(sprite) = self.tablets.get(turn) else { continue };
            let mut at = [px + dx, py + dy];
            let mut present = true;
            // The tablet lies under the film: its damage is done before the reflections go on.
            if let Some(draw) = defect.as_deref_mut().filter(|_| which == Some(i)) {
                match draw.kind {
                    DefectKind::MissingComponent => {
                        (draw.size_px, draw.contrast) = (2.0 * TABLET, 1.0);
                        area = Area::around(at[0] as f32, at[1] as f32, 45.0, 45.0);
                        present = false;
                    }
                    DefectKind::WrongPosition => {
                        let distance = (draw.size_px * 0.75).clamp(12.0, 40.0);
                        (draw.size_px, draw.contrast) = (distance, 1.0);
                        let turn = draw.rng.unit();
                        area = Area::around(at[0] as f32, at[1] as f32, 45.0, 45.0);
                        at[0] += (distance * cos_turns(turn) + 0.5).floor() as i32;
                        at[1] += (distance * sin_turns(turn) + 0.5).floor() as i32;
                        area = area.join(sprite.stamp(texture, at[0], at[1]));
                        present = false;
                    }
                    _ => {}
                }
            }
            if present {
                sprite.stamp(texture, at[0], at[1]);
            }
            let on_tablet = |draw: &&mut Draw| which == Some(i) && matches!(draw.kind, DefectKind::Crack | DefectKind::Discolouration);
            if let Some(draw) = defect.as_deref_mut().filter(on_tablet) {
                draw.size_px = draw.size_px.min(1.8 * TABLET);
                let room = (TABLET - draw.size_px / 2.0).max(1.0) * 0.7;
                let (ox, oy) = (draw.rng.range(-room, room), draw.rng.range(-room, room));
                area = draw.on_surface(texture, &ON_TABLET, at[0] as f32 + ox, at[1] as f32 + oy);
            }
            self.gleam.stamp(texture, px, py);
        }
        let Some(draw) = defect else { return area };
        if matches!(draw.kind, DefectKind::Contamination | DefectKind::Dent | DefectKind::Scratch) {
            let on_tablet = draw.kind == DefectKind::Contamination;
            let [x, y] = draw.place([HALF[0] - 16.0, HALF[1] - 16.0], |x, y| {
                let [dx, dy] = from_pocket(x, y);
                on_tablet || length(dx, dy) > POCKET + 4.0
            });
            area = draw.on_surface(texture, &ON_FOIL, x, y);
        }
        area
    }
}

const ON_TABLET: Surface = Surface {
    scratch: [0; 4],
    dirt: [[0; 4]; 3],
    stain: [[200, 150, 70, 0], [170, 130, 100, 0], [200, 120, 120, 0]],
    crack: [66, 58, 48, 0],
    dent_levels: 0.0,
};

const ON_FOIL: Surface = Surface {
    scratch: [72, 76, 82, 40],
    dirt: [[26, 24, 24, 20], [104, 66, 36, 20], [58, 70, 52, 20]],
    stain: [[0; 4]; 3],
    crack: [0; 4],
    dent_levels: 80.0,
};
