//! A populated circuit board: solder mask over traces, pads, silkscreen, and components placed with the tolerance of a placer.

use super::canvas::{Area, Canvas, Detail, Px, Sprite, TILE, blend, lighten};
use super::defect::{DefectKind, Draw, Surface};
use super::math::{Rng, cos_turns, cover, fbm, hash_unit, length, lerp, noise, pow2n, rounded_box, segment, sin_turns, smoothstep};
use super::optics::Setup;
use super::product::Product;

const HALF: [f32; 2] = [292.0, 206.0];
const SOLDER: [f32; 4] = [186.0, 188.0, 184.0, 150.0];
const SILK: [f32; 4] = [222.0, 226.0, 220.0, 20.0];
const PAD_GOLD: [f32; 4] = [196.0, 164.0, 92.0, 120.0];

/// The kinds of component; the number picks the sprite.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Qfp,
    Soic,
    Resistor,
    ResistorUp,
    Capacitor,
    CapacitorUp,
    Can,
    Crystal,
    Header,
    Inductor,
    Led,
}

const KINDS: [Kind; 11] = [
    Kind::Qfp,
    Kind::Soic,
    Kind::Resistor,
    Kind::ResistorUp,
    Kind::Capacitor,
    Kind::CapacitorUp,
    Kind::Can,
    Kind::Crystal,
    Kind::Header,
    Kind::Inductor,
    Kind::Led,
];

struct Placed {
    kind: Kind,
    at: [i32; 2],
    name: &'static str,
}

const fn placed(kind: Kind, x: i32, y: i32, name: &'static str) -> Placed {
    Placed { kind, at: [x, y], name }
}

const PLACED: [Placed; 29] = [
    placed(Kind::Qfp, -46, -26, "U1"),
    placed(Kind::Soic, 136, -126, "U2"),
    placed(Kind::Soic, 136, -36, "U3"),
    placed(Kind::Can, -226, -112, "C1"),
    placed(Kind::Can, -226, -28, "C2"),
    placed(Kind::Crystal, -46, -140, "Y1"),
    placed(Kind::Header, 252, -10, "J1"),
    placed(Kind::Inductor, -220, 74, "L1"),
    placed(Kind::Resistor, 66, 66, "R1"),
    placed(Kind::Resistor, 66, 98, "R2"),
    placed(Kind::Resistor, 66, 130, "R3"),
    placed(Kind::Resistor, 130, 66, "R4"),
    placed(Kind::Resistor, 130, 98, "R5"),
    placed(Kind::Resistor, 130, 130, "R6"),
    placed(Kind::Capacitor, -138, 98, "C3"),
    placed(Kind::Capacitor, -138, 130, "C4"),
    placed(Kind::Capacitor, -78, 98, "C5"),
    placed(Kind::Capacitor, -78, 130, "C6"),
    placed(Kind::CapacitorUp, -148, -132, "C7"),
    placed(Kind::CapacitorUp, -120, -132, "C8"),
    placed(Kind::CapacitorUp, -152, -26, "C9"),
    placed(Kind::ResistorUp, 40, -136, "R7"),
    placed(Kind::ResistorUp, 68, -136, "R8"),
    placed(Kind::ResistorUp, 48, -26, "R9"),
    placed(Kind::CapacitorUp, 206, -126, "C10"),
    placed(Kind::CapacitorUp, 206, -36, "C11"),
    placed(Kind::Led, -10, 110, "D1"),
    placed(Kind::Led, 186, 100, "D2"),
    placed(Kind::Resistor, 190, 138, "R10"),
];

/// Half extents of the component with its leads, for shadows, courtyards and silkscreen.
fn half(kind: Kind) -> [f32; 2] {
    match kind {
        Kind::Qfp => [62.0, 62.0],
        Kind::Soic => [34.0, 34.0],
        Kind::Resistor | Kind::Capacitor => [20.0, 10.0],
        Kind::ResistorUp | Kind::CapacitorUp => [10.0, 20.0],
        Kind::Can => [36.0, 36.0],
        Kind::Crystal => [38.0, 15.0],
        Kind::Header => [20.0, 96.0],
        Kind::Inductor => [30.0, 30.0],
        Kind::Led => [18.0, 11.0],
    }
}

/// Pads of a kind: centre and half size.
fn each_pad(kind: Kind, mut pad: impl FnMut([f32; 2], [f32; 2])) {
    match kind {
        Kind::Qfp => {
            for i in 0..12 {
                let along = (i as f32 - 5.5) * 7.6;
                for side in [-56.0, 56.0] {
                    pad([side, along], [9.0, 2.4]);
                    pad([along, side], [2.4, 9.0]);
                }
            }
        }
        Kind::Soic => {
            for i in 0..4 {
                let along = (i as f32 - 1.5) * 14.0;
                pad([along, -30.0], [4.0, 7.5]);
                pad([along, 30.0], [4.0, 7.5]);
            }
        }
        Kind::Resistor | Kind::Capacitor | Kind::Led => [-14.0, 14.0].into_iter().for_each(|x| pad([x, 0.0], [7.5, 9.5])),
        Kind::ResistorUp | Kind::CapacitorUp => [-14.0, 14.0].into_iter().for_each(|y| pad([0.0, y], [9.5, 7.5])),
        Kind::Can => [-26.0, 26.0].into_iter().for_each(|x| pad([x, 0.0], [14.0, 6.0])),
        Kind::Crystal => [-28.0, 28.0].into_iter().for_each(|x| pad([x, 0.0], [11.0, 9.0])),
        Kind::Header => {
            for i in 0..8 {
                for x in [-9.0, 9.0] {
                    pad([x, (i as f32 - 3.5) * 22.0], [6.0, 6.0]);
                }
            }
        }
        Kind::Inductor => [-24.0, 24.0].into_iter().for_each(|x| pad([x, 0.0], [8.0, 20.0])),
    }
}

pub(super) struct Board {
    base: Vec<Px>,
    detail: Detail,
    sprites: Vec<Sprite>,
}

impl Board {
    pub(super) fn new() -> Self {
        let mut canvas = Canvas::texture();
        let copper = traces();
        let mut at = 0;
        canvas.paint(|x, y, px| {
            // A matt grey carrier, then the board: mask over bare laminate, over copper, and the edges of the copper between.
            let grain = 4.0 * noise(x / 2.0, y / 2.0, [0, 0], 51) + 3.0 * fbm(x / 50.0, y / 50.0, 52);
            *px = [74.0 + grain, 76.0 + grain, 80.0 + grain, 8.0];
            let board = rounded_box(x, y, HALF, 9.0);
            lighten(px, -40.0 * smoothstep(9.0, -5.0, rounded_box(x - 4.0, y - 5.0, HALF, 9.0)));
            let d = copper[at];
            at += 1;
            if board < 1.0 {
                let on = cover(d);
                let pour = cover(7.5 - d);
                let mut mask = [14.0, 74.0, 44.0, 46.0];
                blend(&mut mask, [22.0, 98.0, 56.0, 60.0], on.max(pour * 0.72));
                lighten(&mut mask, 10.0 * (smoothstep(1.6, 0.0, (d + 1.0).abs()) - smoothstep(1.6, 0.0, (d - 1.2).abs())));
                lighten(&mut mask, 2.0 * fbm(x / 70.0, y / 70.0, 53));
                blend(&mut mask, [150.0, 150.0, 104.0, 10.0], 0.6 * smoothstep(-2.6, -1.0, board));
                blend(px, mask, cover(board));
            }
        });
        vias(&mut canvas);
        for hole in [[-272.0, -186.0], [272.0, -186.0], [-272.0, 186.0], [272.0, 186.0]] {
            canvas.disc(hole, 14.0, PAD_GOLD);
            canvas.disc(hole, 9.0, [30.0, 30.0, 32.0, 0.0]);
        }
        for part in &PLACED {
            let at = part.at.map(|v| v as f32);
            each_pad(part.kind, |offset, size| {
                let centre = [at[0] + offset[0], at[1] + offset[1]];
                canvas.shape(centre, [size[0] + 2.0, size[1] + 2.0], [8.0, 52.0, 32.0, 20.0], |x, y| {
                    rounded_box(x, y, [size[0] + 1.5, size[1] + 1.5], 2.5)
                });
                canvas.paint_box(centre, size, |x, y, px, _| {
                    let (x, y) = (x - centre[0], y - centre[1]);
                    let mut solder = SOLDER;
                    // Solder domes: bright towards the lamp, dull away from it.
                    let tilt = (x / size[0]) * -0.6 + (y / size[1]) * -0.8;
                    lighten(&mut solder, 34.0 * tilt + 8.0 * noise(x / 2.0 + at[0], y / 2.0 + at[1], [0, 0], 54));
                    blend(px, solder, cover(rounded_box(x, y, size, 2.0)));
                });
            });
            silkscreen(&mut canvas, part, at);
        }
        canvas.text([-30.0, 178.0], 2.0, "CULL-IO  REV 2.1", SILK, true);
        canvas.text([150.0, 180.0], 1.5, "94V-0  E214471", SILK, true);
        let n = TILE as i32;
        let detail = Detail::new(
            |x, y| {
                let weave = 2.5 * noise(x / 4.0, y / 4.0, [n / 4, n / 4], 55);
                let cloud = 5.0 * noise(x / 64.0, y / 64.0, [n / 64, n / 64], 56);
                [weave + cloud * 0.4, weave + cloud, weave + cloud * 0.6, 18.0 * noise(x / 32.0, y / 32.0, [n / 32, n / 32], 57)]
            },
            |x, y| lerp(0.8, 1.0, cover(rounded_box(x, y, HALF, 9.0))),
        );
        Self { base: canvas.pack(), detail, sprites: KINDS.iter().map(|&kind| sprite(kind)).collect() }
    }

    fn sprite(&self, kind: Kind) -> Option<&Sprite> {
        KINDS.iter().position(|&k| k == kind).and_then(|i| self.sprites.get(i))
    }
}

/// Distance to the nearest copper for every texture pixel: traces of straight and 45 degree pieces on a grid.
fn traces() -> Vec<f32> {
    use super::canvas::{CENTRE, HEIGHT, WIDTH};
    let mut field = vec![60.0f32; WIDTH * HEIGHT];
    let mut line = |a: [f32; 2], b: [f32; 2], width: f32| {
        const REACH: f32 = 16.0;
        let area =
            Area::around((a[0] + b[0]) / 2.0, (a[1] + b[1]) / 2.0, (a[0] - b[0]).abs() / 2.0 + REACH, (a[1] - b[1]).abs() / 2.0 + REACH);
        for y in area.y0..area.y1 {
            for x in area.x0..area.x1 {
                let (px, py) = (x as f32 + 0.5 - CENTRE[0], y as f32 + 0.5 - CENTRE[1]);
                let d = segment(px, py, a, b) - width;
                let cell = &mut field[y as usize * WIDTH + x as usize];
                *cell = cell.min(d);
            }
        }
    };
    let mut rng = Rng::new(5, 5, 5);
    for part in &PLACED {
        let mut pads: [[f32; 2]; 48] = [[0.0; 2]; 48];
        let mut count = 0;
        each_pad(part.kind, |offset, _| {
            if let Some(slot) = pads.get_mut(count) {
                *slot = [part.at[0] as f32 + offset[0], part.at[1] as f32 + offset[1]];
                count += 1;
            }
        });
        for pad in pads.iter().take(count) {
            // Away from the part, then a 45 degree jog, then on along an axis.
            let (ox, oy) = (pad[0] - part.at[0] as f32, pad[1] - part.at[1] as f32);
            let out = if ox.abs() > oy.abs() { [if ox < 0.0 { -1.0 } else { 1.0 }, 0.0] } else { [0.0, if oy < 0.0 { -1.0 } else { 1.0 }] };
            let first = 12.0 + 6.0 * rng.below(3) as f32;
            let jog = 6.0 * rng.below(4) as f32 * if rng.below(2) == 0 { -1.0 } else { 1.0 };
            let last = 10.0 + 12.0 * rng.below(4) as f32;
            let limit = |p: [f32; 2]| [p[0].clamp(-280.0, 280.0), p[1].clamp(-194.0, 194.0)];
            let a = limit([pad[0] + out[0] * first, pad[1] + out[1] * first]);
            let b = limit([a[0] + out[0] * jog.abs() + out[1] * jog, a[1] + out[1] * jog.abs() + out[0] * jog]);
            let c = limit([b[0] + out[0] * last, b[1] + out[1] * last]);
            let width = if rng.below(5) == 0 { 2.6 } else { 1.4 };
            for (from, to) in [(*pad, a), (a, b), (b, c)] {
                line(from, to, width);
            }
        }
    }
    // A bus between the big chip and the connector.
    for i in 0..7 {
        let y = 20.0 + i as f32 * 7.0;
        let knee = 108.0 + i as f32 * 7.0;
        line([12.0, y - 30.0], [50.0 + i as f32 * 4.0, y - 30.0 + 38.0], 1.4);
        line([50.0 + i as f32 * 4.0, y + 8.0], [knee, y + 8.0], 1.4);
        line([knee, y + 8.0], [knee + 60.0, y + 8.0 - 60.0 + 52.0], 1.4);
        line([knee + 60.0, y], [232.0, y], 1.4);
    }
    field
}

fn vias(canvas: &mut Canvas) {
    for i in 0..70 {
        let at = [-276.0 + 12.0 * (hash_unit(i, 0, 58) * 46.0).floor(), -190.0 + 12.0 * (hash_unit(i, 1, 58) * 32.0).floor()];
        let clear = PLACED.iter().all(|part| {
            let h = half(part.kind);
            (at[0] - part.at[0] as f32).abs() > h[0] + 6.0 || (at[1] - part.at[1] as f32).abs() > h[1] + 6.0
        });
        if clear && at[0].abs() < 284.0 && at[1].abs() < 168.0 {
            canvas.disc(at, 4.2, PAD_GOLD);
            canvas.disc(at, 1.9, [28.0, 30.0, 24.0, 0.0]);
        }
    }
}

fn silkscreen(canvas: &mut Canvas, part: &Placed, at: [f32; 2]) {
    let h = half(part.kind);
    match part.kind {
        Kind::Can => {
            canvas.shape(at, [42.0, 42.0], SILK, |x, y| (length(x, y) - 38.0).abs() - 0.8);
            canvas.text([at[0] + 42.0, at[1] - 34.0], 1.4, part.name, SILK, true);
        }
        Kind::Header => {
            canvas.shape(at, [h[0] + 6.0, h[1] + 6.0], SILK, |x, y| rounded_box(x, y, [h[0] + 3.0, h[1] + 3.0], 1.0).abs() - 0.8);
            canvas.text([at[0] - 2.0, at[1] + h[1] + 13.0], 1.4, part.name, SILK, true);
        }
        Kind::Qfp | Kind::Soic | Kind::Inductor | Kind::Crystal => {
            // Corner marks only, so that leads stay clear.
            canvas.shape(at, [h[0] + 8.0, h[1] + 8.0], SILK, |x, y| {
                let frame = rounded_box(x, y, [h[0] + 5.0, h[1] + 5.0], 1.0).abs() - 0.8;
                frame.max(h[0] - 6.0 - x.abs()).max(h[1] - 6.0 - y.abs())
            });
            canvas.disc([at[0] - h[0] - 3.0, at[1] - h[1] - 8.0], 2.4, SILK);
            canvas.text([at[0] + h[0] + 12.0, at[1] - h[1] + 12.0], 1.4, part.name, SILK, true);
        }
        Kind::ResistorUp | Kind::CapacitorUp => canvas.text([at[0] + 1.0, at[1] + 31.0], 1.2, part.name, SILK, true),
        _ => canvas.text([at[0] + 1.0, at[1] - 17.0], 1.2, part.name, SILK, true),
    }
}

/// A box body with bevelled edges lit from the upper left.
fn body(canvas: &mut Canvas, half: [f32; 2], radius: f32, bevel: f32, colour: [f32; 4], relief: f32) {
    canvas.paint_box([0.0, 0.0], [half[0] + 1.0, half[1] + 1.0], |x, y, px, alpha| {
        let d = rounded_box(x, y, half, radius);
        let share = cover(d);
        if share > 0.0 {
            let mut face = colour;
            lighten(&mut face, 2.5 * noise(x / 1.5, y / 1.5, [0, 0], 61));
            if d > -bevel {
                // Which edge is nearest decides which way the bevel looks.
                let across = if x.abs() - half[0] > y.abs() - half[1] { x * 0.75 } else { y };
                lighten(&mut face, if across < 0.0 { relief } else { -relief * 0.8 });
            }
            blend(px, face, share);
            *alpha = alpha.max(share);
        }
    });
}

fn shadow(canvas: &mut Canvas, half: [f32; 2], reach: f32, strength: f32) {
    canvas.paint(|_, _, px| *px = [6.0, 12.0, 9.0, 0.0]);
    canvas.paint_box([0.0, 0.0], [half[0] + 2.0 * reach, half[1] + 2.0 * reach], |x, y, _, alpha| {
        let d = rounded_box(x - reach * 0.6, y - reach * 0.8, half, 3.0);
        *alpha = strength * smoothstep(reach, -reach * 0.5, d);
    });
}

const BLACK: [f32; 4] = [38.0, 38.0, 40.0, 22.0];
const PRINT: [f32; 4] = [150.0, 152.0, 150.0, 10.0];

fn sprite(kind: Kind) -> Sprite {
    let h = half(kind);
    let mut canvas = Canvas::new((h[0] * 2.0) as usize + 24, (h[1] * 2.0) as usize + 24);
    match kind {
        Kind::Qfp => {
            shadow(&mut canvas, [48.0, 48.0], 7.0, 0.55);
            each_pad(kind, |at, size| lead(&mut canvas, at, [(size[0] - 0.6).min(8.0), (size[1] - 0.6).min(8.0)]));
            body(&mut canvas, [49.0, 49.0], 3.0, 3.0, BLACK, 22.0);
            canvas.shape([-37.0, -37.0], [7.0, 7.0], [22.0, 22.0, 24.0, 10.0], |x, y| length(x, y) - 5.0);
            canvas.text([0.0, -16.0], 2.0, "CULL32", PRINT, true);
            canvas.text([0.0, 6.0], 1.6, "F407VGT6", PRINT, true);
            canvas.text([0.0, 24.0], 1.4, "2619 KOR", PRINT, true);
        }
        Kind::Soic => {
            shadow(&mut canvas, [30.0, 22.0], 6.0, 0.55);
            each_pad(kind, |at, _| lead(&mut canvas, [at[0], at[1] * 0.9], [3.2, 7.0]));
            body(&mut canvas, [31.0, 21.0], 2.0, 2.5, BLACK, 20.0);
            canvas.disc([-23.0, 12.0], 3.0, [22.0, 22.0, 24.0, 8.0]);
            canvas.text([1.0, -7.0], 1.5, "LM358D", PRINT, true);
            canvas.text([3.0, 7.0], 1.2, "A71K", PRINT, true);
        }
        Kind::Resistor | Kind::ResistorUp | Kind::Capacitor | Kind::CapacitorUp => {
            let upright = matches!(kind, Kind::Resistor | Kind::Capacitor);
            let turn = |a: f32, b: f32| if upright { [a, b] } else { [b, a] };
            shadow(&mut canvas, turn(17.0, 8.0), 3.5, 0.5);
            body(&mut canvas, turn(17.0, 8.0), 1.5, 1.5, [196.0, 198.0, 196.0, 140.0], 26.0);
            let resistor = matches!(kind, Kind::Resistor | Kind::ResistorUp);
            let colour = if resistor { [30.0, 30.0, 34.0, 40.0] } else { [176.0, 140.0, 100.0, 46.0] };
            body(&mut canvas, turn(11.5, 8.0), 0.5, 1.2, colour, 16.0);
            if resistor {
                canvas.text([0.5, 0.5], 1.1, "472", [206.0, 206.0, 204.0, 20.0], upright);
            }
        }
        Kind::Can => {
            shadow(&mut canvas, [31.0, 31.0], 9.0, 0.6);
            body(&mut canvas, [34.0, 34.0], 10.0, 2.0, [34.0, 34.0, 36.0, 20.0], 16.0);
            canvas.paint_box([0.0, 0.0], [33.0, 33.0], |x, y, px, alpha| {
                let r = length(x, y);
                let share = cover(r - 31.0);
                let mut top = [168.0, 172.0, 176.0, 140.0];
                let towards = (x * -0.6 + y * -0.8) / r.max(1.0);
                lighten(&mut top, 44.0 * towards * smoothstep(22.0, 30.0, r));
                lighten(&mut top, 4.0 * noise(x / 14.0, y * 1.1, [0, 0], 62));
                // The negative stripe, and the vent's cross.
                if x < -15.0 && r < 27.0 {
                    blend(&mut top, [40.0, 42.0, 60.0, 60.0], cover(x + 15.0));
                }
                blend(px, top, share);
                *alpha = alpha.max(share);
            });
            canvas.text([4.0, -6.0], 1.5, "100", [50.0, 52.0, 60.0, 60.0], true);
            canvas.text([4.0, 8.0], 1.5, "25V", [50.0, 52.0, 60.0, 60.0], true);
        }
        Kind::Crystal => {
            shadow(&mut canvas, [34.0, 12.0], 6.0, 0.55);
            canvas.paint_box([0.0, 0.0], [37.0, 14.0], |x, y, px, alpha| {
                let d = rounded_box(x, y, [36.0, 13.0], 13.0);
                let share = cover(d);
                let mut can = [164.0, 166.0, 166.0, 130.0];
                lighten(&mut can, -40.0 * (y / 13.0) * smoothstep(-6.0, 0.0, d) + 16.0 * smoothstep(3.0, 0.0, (d + 5.0).abs()));
                blend(px, can, share);
                *alpha = alpha.max(share);
            });
            canvas.text([0.0, 0.0], 1.6, "8.000", [80.0, 82.0, 84.0, 60.0], true);
        }
        Kind::Header => {
            shadow(&mut canvas, [19.0, 95.0], 7.0, 0.55);
            body(&mut canvas, [20.0, 96.0], 1.5, 2.5, [30.0, 30.0, 32.0, 18.0], 18.0);
            each_pad(kind, |at, _| {
                canvas.rect(at, [6.6, 6.6], [12.0, 12.0, 13.0, 4.0]);
                canvas.rect(at, [3.6, 3.6], [204.0, 170.0, 92.0, 150.0]);
                canvas.rect([at[0] - 1.0, at[1] - 1.2], [1.6, 1.4], [250.0, 228.0, 160.0, 180.0]);
            });
        }
        Kind::Inductor => {
            shadow(&mut canvas, [29.0, 29.0], 8.0, 0.55);
            body(&mut canvas, [29.0, 29.0], 5.0, 3.0, [66.0, 66.0, 70.0, 26.0], 18.0);
            canvas.paint_box([0.0, 0.0], [24.0, 24.0], |x, y, px, _| {
                let r = length(x, y);
                let towards = (x * -0.6 + y * -0.8) / r.max(1.0);
                lighten(px, 26.0 * towards * smoothstep(3.0, 0.0, (r - 21.0).abs()));
            });
            canvas.text([0.0, 0.0], 2.2, "220", [190.0, 190.0, 190.0, 20.0], true);
        }
        Kind::Led => {
            shadow(&mut canvas, [15.0, 8.0], 4.0, 0.5);
            body(&mut canvas, [16.0, 9.0], 1.5, 1.5, [206.0, 204.0, 192.0, 90.0], 16.0);
            canvas.paint_box([0.0, 0.0], [10.0, 8.0], |x, y, px, _| {
                let d = length(x * 0.85, y) - 6.5;
                let mut lens = [214.0, 196.0, 96.0, 150.0];
                lighten(&mut lens, -14.0 * (x + y) / 8.0 + 50.0 * pow2n((1.0 - length(x + 2.5, y + 2.5) / 4.0).max(0.0), 1));
                blend(px, lens, cover(d));
            });
        }
    }
    canvas.sprite()
}

fn lead(canvas: &mut Canvas, at: [f32; 2], half: [f32; 2]) {
    canvas.paint_box(at, [half[0] + 1.0, half[1] + 1.0], |x, y, px, alpha| {
        let (x, y) = (x - at[0], y - at[1]);
        let share = cover((x.abs() - half[0]).max(y.abs() - half[1]));
        let mut tin = [178.0, 180.0, 182.0, 150.0];
        // A gull wing: bright where it bends.
        let along = if half[0] > half[1] { x / half[0] } else { y / half[1] };
        lighten(&mut tin, 30.0 * cos_turns(along * 0.35) - 16.0);
        blend(px, tin, share);
        *alpha = alpha.max(share);
    });
}

impl Product for Board {
    fn name(&self) -> &'static str {
        "circuit_board"
    }

    fn setup(&self) -> Setup {
        Setup { shift_px: 6.0, turn_deg: 1.2, scale: 0.008, shine: 0.42, spot: [0.55, 0.6] }
    }

    fn defects(&self) -> &'static [DefectKind] {
        &[
            DefectKind::MissingComponent,
            DefectKind::WrongPosition,
            DefectKind::Contamination,
            DefectKind::Scratch,
            DefectKind::Misprint,
            DefectKind::Crack,
        ]
    }

    fn assemble(&self, mut rng: Rng, mut defect: Option<&mut Draw>, texture: &mut [Px]) -> Area {
        let shift = [rng.below(TILE as u32) as usize, rng.below(TILE as u32) as usize];
        self.detail.lay(&self.base, texture, shift);
        let chosen = defect.as_deref_mut().and_then(choose);
        let mut area = Area::EMPTY;
        for (i, part) in PLACED.iter().enumerate() {
            // Drawn for every component, so that the others stay where they are when one is missing.
            let at = [part.at[0] + rng.jitter(1), part.at[1] + rng.jitter(1)];
            let Some(sprite) = self.sprite(part.kind) else { continue };
            match chosen {
                Some((n, offset)) if n == i => {
                    let size = sprite.size();
                    area = area.join(Area::around(at[0] as f32, at[1] as f32, size[0] / 2.0 + 1.0, size[1] / 2.0 + 1.0));
                    if let Some([dx, dy]) = offset {
                        area = area.join(sprite.stamp(texture, at[0] + dx, at[1] + dy));
                    }
                }
                _ => {
                    sprite.stamp(texture, at[0], at[1]);
                }
            }
        }
        let Some(draw) = defect.filter(|_| chosen.is_none()) else { return area };
        const SURFACE: Surface = Surface {
            scratch: [206, 150, 96, 140],
            dirt: [[150, 128, 60, 110], [196, 198, 196, 170], [30, 26, 22, 20]],
            stain: [[150, 110, 60, 0]; 3],
            crack: [8, 14, 10, 0],
            dent_levels: 0.0,
        };
        if draw.kind == DefectKind::Misprint {
            // On a silkscreen text or a chip's marking.
            let [x, y] = PRINTS[draw.rng.below(PRINTS.len() as u32) as usize];
            let (x, y) = (x + draw.rng.range(-20.0, 20.0), y + draw.rng.range(-3.0, 3.0));
            return draw.misprint(texture, [17, 84, 48, 50], x, y);
        }
        let [x, y] = draw.place([HALF[0] - 16.0, HALF[1] - 16.0], |_, _| true);
        draw.on_surface(texture, &SURFACE, x, y)
    }
}

/// Where there is print to spoil.
const PRINTS: [[f32; 2]; 5] = [[-30.0, 178.0], [-80.0, 178.0], [150.0, 180.0], [190.0, 180.0], [20.0, 178.0]];

/// Which component is missing (no offset) or moved (offset in px).
fn choose(draw: &mut Draw) -> Option<(usize, Option<[i32; 2]>)> {
    match draw.kind {
        DefectKind::MissingComponent => {
            // Of three components drawn, the one nearest to the size asked for.
            let mut best = (f32::MAX, 0, 0.0);
            for _ in 0..3 {
                let i = draw.rng.below(PLACED.len() as u32) as usize;
                let extent = PLACED.get(i).map_or(0.0, |part| 2.0 * half(part.kind)[0].max(half(part.kind)[1]));
                let miss = (extent - draw.size_px).abs();
                if miss < best.0 {
                    best = (miss, i, extent);
                }
            }
            (draw.size_px, draw.contrast) = (best.2, 1.0);
            Some((best.1, None))
        }
        DefectKind::WrongPosition => {
            // Not the connector: it is soldered through holes.
            let mut i = draw.rng.below(PLACED.len() as u32) as usize;
            if PLACED.get(i).is_some_and(|part| part.kind == Kind::Header) {
                i = 0;
            }
            let distance = (draw.size_px * 0.4).clamp(5.0, 24.0);
            let turn = draw.rng.unit();
            (draw.size_px, draw.contrast) = (distance, 1.0);
            let offset = [distance * cos_turns(turn), distance * sin_turns(turn)].map(|v| (v + 0.5).floor() as i32);
            Some((i, Some(offset)))
        }
        _ => None,
    }
}
