//! A screw cap seen from above: knurled skirt, rounded shoulder, printed face.

use super::canvas::{Area, Canvas, Detail, Px, Sprite, TILE, blend, lighten};
use super::defect::{DefectKind, Draw, Surface};
use super::font;
use super::math::{Rng, cos_turns, cover, fbm, length, lerp, noise, pow2n, sin_turns, smoothstep, turns_of};
use super::optics::Setup;
use super::product::Product;

/// Radii in px: skirt, shoulder, flat face.
const SKIRT: f32 = 205.0;
const SHOULDER: f32 = 186.0;
const FACE: f32 = 164.0;
const RIBS: f32 = 96.0;
const RED: [f32; 4] = [176.0, 30.0, 38.0, 72.0];
const WHITE: [f32; 4] = [236.0, 234.0, 228.0, 60.0];

pub(super) struct Cap {
    base: Vec<Px>,
    detail: Detail,
    print: Sprite,
    /// Print coverage, for finding a place to spoil it.
    inked: fn(f32, f32) -> f32,
}

/// Ink on the face at a point: lettering on a circle, a drop, and the brand across the middle.
fn ink(x: f32, y: f32) -> f32 {
    let r = length(x, y);
    let rings = cover((r - 152.0).abs() - 1.6).max(cover((r - 102.0).abs() - 1.2));
    // Upper lettering runs clockwise, lower one counter-clockwise so that it reads from left to right.
    let angle = turns_of(x, y);
    const DOT: f32 = 3.6;
    let around = |text: &[u8], centre: f32, sign: f32| {
        let from_middle = angle - centre;
        let from_middle = from_middle - (from_middle + 0.5).floor();
        let s = sign * from_middle * std::f32::consts::TAU * 127.0 / DOT + text.len() as f32 * font::ADVANCE / 2.0;
        let t = (127.0 - r) * sign / DOT + 3.5;
        font::ink(text, s, t, 1.0 / DOT)
    };
    let lettering = around(b"NORDIC SPRING", -0.25, 1.0).max(around(b"STILL WATER", 0.25, -1.0));
    let stars = [0.0, 0.5].iter().fold(0.0f32, |best, &at| {
        let (sx, sy) = (127.0 * cos_turns(at), 127.0 * sin_turns(at));
        best.max(cover((x - sx).abs() + (y - sy).abs() - 7.0))
    });
    // A drop: a disc with a tip that narrows upwards.
    let (dx, dy) = (x, y + 36.0);
    let drop = if dy > 0.0 { length(dx, dy) - 25.0 } else { dx.abs() - 25.0 * (1.0 + dy / 48.0) * (1.0 + dy / 200.0) };
    let drop = if dy < -48.0 { 10.0 } else { drop };
    let gleam = (length(dx + 8.0, dy - 4.0) - 15.0).abs().max(-(dx + 6.0)).max(dy - 12.0) - 2.5;
    let brand = font::ink(b"AQUA", (x + 66.0) / 5.6, (y - 20.0) / 5.6, 1.0 / 5.6);
    let line = font::ink(b"0.5 L", (x + 36.0) / 2.6, (y - 66.0) / 2.6, 1.0 / 2.6);
    let drop = cover(drop) * (1.0 - cover(gleam.max(length(dx, dy) - 19.0)));
    rings.max(lettering).max(stars).max(drop).max(brand).max(line)
}

impl Cap {
    pub(super) fn new() -> Self {
        let mut canvas = Canvas::texture();
        canvas.paint(|x, y, px| {
            // A pale belt with a fine weave.
            let grain = 4.0 * noise(x / 1.8, y / 1.8, [0, 0], 71) + 4.0 * fbm(x / 60.0, y / 60.0, 72);
            let weave = 2.0 * cos_turns(x / 6.0) * cos_turns(y / 6.0);
            *px = [134.0 + grain + weave, 140.0 + grain + weave, 142.0 + grain + weave, 6.0];
            lighten(px, -58.0 * smoothstep(30.0, -14.0, length(x - 12.0, y - 15.0) - SKIRT));
            let r = length(x, y);
            if r > SKIRT + 1.0 {
                return;
            }
            let angle = turns_of(x, y);
            let towards = (x * -0.6 + y * -0.8) / r.max(1.0);
            let mut cap = RED;
            // The face is a shallow dish.
            shade(&mut cap, 1.0 - 0.06 * towards * r / FACE);
            if r > FACE - 10.0 {
                let lip = smoothstep(4.0, 0.0, (r - FACE + 4.0).abs());
                shade(&mut cap, 1.0 - 0.26 * towards * lip);
            }
            if r > FACE {
                // The shoulder turns away from the viewer; a lamp's reflection runs around its upper left.
                let bend = ((r - FACE) / (SHOULDER - FACE)).clamp(0.0, 1.0);
                shade(&mut cap, 1.0 + 0.42 * towards * bend - 0.16 * bend * bend);
                let streak = smoothstep(0.30, 0.0, (bend - 0.42).abs()) * pow2n(towards.max(0.0), 2);
                blend(&mut cap, [255.0, 236.0, 232.0, 150.0], 0.62 * streak);
            }
            if r > SHOULDER {
                let rib = cos_turns(angle * RIBS);
                let side = sin_turns(angle * RIBS);
                // The walls of a rib look along the circumference.
                let across = (x * 0.8 - y * 0.6) / r;
                let depth = smoothstep(SHOULDER, SHOULDER + 4.0, r);
                shade(&mut cap, 1.0 + depth * (0.26 * rib + 0.30 * side * across + 0.22 * towards - 0.18));
                shade(&mut cap, 1.0 - 0.35 * smoothstep(SKIRT - 5.0, SKIRT, r));
            }
            blend(px, cap, cover(r - SKIRT + 2.0 * (0.5 - 0.5 * cos_turns(angle * RIBS))));
        });
        let mut print = Canvas::new(320, 320);
        print.paint(|x, y, px| {
            *px = WHITE;
            lighten(px, -5.0 + 3.0 * noise(x / 2.0, y / 2.0, [0, 0], 73));
        });
        print.paint_box([0.0, 0.0], [159.0, 159.0], |x, y, _, alpha| *alpha = 0.95 * ink(x, y));
        let n = TILE as i32;
        // Moulding flow and the fine matt grain of the tool.
        let detail = Detail::new(
            |x, y| {
                let grain = 3.0 * noise(x / 2.0, y / 2.0, [n / 2, n / 2], 74);
                let flow = 5.0 * noise(x / 64.0, y / 32.0, [n / 64, n / 32], 75);
                [grain + flow, grain + flow * 0.3, grain + flow * 0.3, 3.0 * grain + 2.0 * flow]
            },
            |x, y| lerp(1.0, 0.9, cover(length(x, y) - SKIRT)),
        );
        Self { base: canvas.pack(), detail, print: print.sprite(), inked: ink }
    }
}

/// Multiply a colour's brightness.
fn shade(px: &mut [f32; 4], by: f32) {
    for value in px.iter_mut().take(3) {
        *value *= by;
    }
}

impl Product for Cap {
    fn name(&self) -> &'static str {
        "bottle_cap"
    }

    fn setup(&self) -> Setup {
        Setup { shift_px: 10.0, turn_deg: 5.0, scale: 0.012, shine: 0.5, spot: [0.20, 0.26] }
    }

    fn defects(&self) -> &'static [DefectKind] {
        &[
            DefectKind::Scratch,
            DefectKind::Dent,
            DefectKind::Misprint,
            DefectKind::Contamination,
            DefectKind::WrongPosition,
            DefectKind::Crack,
            DefectKind::Discolouration,
        ]
    }

    fn assemble(&self, mut rng: Rng, defect: Option<&mut Draw>, texture: &mut [Px]) -> Area {
        let shift = [rng.below(TILE as u32) as usize, rng.below(TILE as u32) as usize];
        self.detail.lay(&self.base, texture, shift);
        let mut at = [rng.jitter(1), rng.jitter(1)];
        let Some(draw) = defect else {
            self.print.stamp(texture, at[0], at[1]);
            return Area::EMPTY;
        };
        if draw.kind == DefectKind::WrongPosition {
            let distance = (draw.size_px * 0.4).clamp(5.0, 22.0);
            let turn = draw.rng.unit();
            (draw.size_px, draw.contrast) = (distance, 1.0);
            let sound = at;
            at[0] += (distance * cos_turns(turn) + 0.5).floor() as i32;
            at[1] += (distance * sin_turns(turn) + 0.5).floor() as i32;
            let area = self.print.stamp(texture, at[0], at[1]);
            return area.join(Area::around(sound[0] as f32, sound[1] as f32, 162.0, 162.0));
        }
        self.print.stamp(texture, at[0], at[1]);
        const SURFACE: Surface = Surface {
            scratch: [240, 196, 192, 60],
            dirt: [[30, 24, 22, 30], [92, 74, 44, 20], [214, 208, 190, 40]],
            stain: [[120, 120, 150, 0], [150, 190, 90, 0], [110, 110, 110, 0]],
            crack: [48, 4, 8, 0],
            dent_levels: 84.0,
        };
        if draw.kind == DefectKind::Misprint {
            let [x, y] = draw.place([150.0, 150.0], |x, y| (self.inked)(x, y) > 0.9);
            return draw.misprint(texture, [176, 30, 38, 72], x, y);
        }
        let [x, y] = draw.place([SKIRT, SKIRT], |x, y| length(x, y) < SHOULDER - 8.0);
        draw.on_surface(texture, &SURFACE, x, y)
    }
}
