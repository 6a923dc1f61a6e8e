//! A machined steel plate: brushed face, turned ring around a bore, countersunk holes, slots, an engraved number.

use super::canvas::{Area, Canvas, Detail, Px, TILE, blend, lighten};
use super::defect::{DefectKind, Draw, Surface};
use super::math::{Rng, cos_turns, cover, fbm, length, lerp, noise, pow2n, rounded_box, segment, smoothstep, turns_of};
use super::optics::Setup;
use super::product::Product;

const HALF: [f32; 2] = [262.0, 178.0];
const CORNER: f32 = 30.0;
const HOLES: [[f32; 2]; 4] = [[-208.0, -124.0], [208.0, -124.0], [-208.0, 124.0], [208.0, 124.0]];
const HOLE: f32 = 16.0;
const SINK: f32 = 29.0;
const BORE: f32 = 50.0;
const RING: f32 = 98.0;
const SLOT: f32 = 13.0;
/// Direction towards the lamp, in the plane.
const LAMP: [f32; 2] = [-0.6, -0.8];

pub(super) struct Metal {
    base: Vec<Px>,
    detail: Detail,
}

fn slot(x: f32, y: f32) -> f32 {
    segment(x.abs(), y, [164.0, -46.0], [164.0, 46.0]) - SLOT
}

fn nearest_hole(x: f32, y: f32) -> (f32, f32, f32) {
    let (dx, dy) = (x.abs() - HOLES[1][0], y.abs() - HOLES[3][1]);
    let (sx, sy) = (if x < 0.0 { -1.0 } else { 1.0 }, if y < 0.0 { -1.0 } else { 1.0 });
    (dx * sx, dy * sy, length(dx, dy))
}

/// Distance to the nearest edge of solid, flat metal; negative on it.
fn off_face(x: f32, y: f32) -> f32 {
    let plate = rounded_box(x, y, [HALF[0] - 8.0, HALF[1] - 8.0], CORNER);
    plate.max(SINK - nearest_hole(x, y).2).max(BORE - length(x, y)).max(-slot(x, y))
}

impl Metal {
    pub(super) fn new() -> Self {
        let mut canvas = Canvas::texture();
        canvas.paint(|x, y, px| {
            // Rubber belt with a fine cross grain.
            let grain = 5.0 * noise(x / 1.6, y / 1.6, [0, 0], 11) + 4.0 * fbm(x / 40.0, y / 40.0, 12);
            let rib = 2.5 * cos_turns((x + y) / 7.0) + 2.5 * cos_turns((x - y) / 7.0);
            *px = [40.0 + grain + rib, 42.0 + grain + rib, 46.0 + grain + rib, 14.0];
            let plate = rounded_box(x, y, HALF, CORNER);
            let shadow = smoothstep(16.0, -6.0, rounded_box(x - 7.0, y - 9.0, HALF, CORNER));
            lighten(px, -26.0 * shadow);
            if plate < 1.0 {
                let mut face = [148.0, 151.0, 156.0, 105.0];
                lighten(&mut face, 5.0 * fbm(x / 90.0, y / 60.0, 13));
                ring(&mut face, x, y);
                holes(&mut face, x, y);
                slots(&mut face, x, y);
                edge(&mut face, x, y, plate);
                blend(px, face, cover(plate));
            }
        });
        for (offset, colour) in [([1.0, 1.0], [196.0, 199.0, 204.0, 150.0]), ([0.0, 0.0], [76.0, 78.0, 82.0, 30.0])] {
            canvas.text([offset[0], 138.0 + offset[1]], 2.4, "CULL 316L-07", colour, true);
        }
        let n = TILE as i32;
        // Brushing: streaks that run along x, some long, some short.
        let detail = Detail::new(
            |x, y| {
                let long = noise(x / 64.0, y, [n / 64, n], 21) * 7.0 + noise(x / 128.0, y / 2.0, [n / 128, n / 2], 22) * 8.0;
                let short = noise(x / 16.0, y, [n / 16, n], 23) * 5.0;
                let streak = long + short;
                [streak, streak, streak, streak * 2.4]
            },
            |x, y| {
                let on = cover(rounded_box(x, y, HALF, CORNER));
                let ringed = smoothstep(RING + 1.0, RING - 1.0, length(x, y));
                let hollow = cover(length(x, y) - BORE).max(cover(nearest_hole(x, y).2 - SINK)).max(cover(slot(x, y)));
                lerp(0.25, 1.0, on) * (1.0 - 0.7 * ringed) * (1.0 - hollow)
            },
        );
        Self { base: canvas.pack(), detail }
    }
}

/// The turned ring around the bore, with its bow-tie reflection, and the bore itself.
fn ring(px: &mut [f32; 4], x: f32, y: f32) {
    let r = length(x, y);
    if r > RING + 4.0 {
        return;
    }
    let angle = turns_of(x, y);
    if r < RING {
        let bow = pow2n(cos_turns(angle - 0.13).abs(), 3) + 0.45 * pow2n(cos_turns(angle - 0.36).abs(), 3);
        let grooves = 9.0 * noise(r * 0.8, 0.5, [0, 0], 31) + 5.0 * noise(r * 2.1, angle * 6.0, [0, 0], 32);
        *px = [126.0, 129.0, 134.0, 60.0];
        lighten(px, grooves + 62.0 * bow);
        px[3] += 90.0 * bow;
    }
    // The step down from the face, lit on the far side.
    let towards = (x * LAMP[0] + y * LAMP[1]) / r.max(1.0);
    lighten(px, -70.0 * towards * smoothstep(3.5, 0.0, (r - RING).abs()));
    // Chamfer of the bore, then the dark inside with the wall catching light at the lower right.
    if r < BORE + 5.0 {
        lighten(px, -75.0 * towards * smoothstep(5.0, 1.0, (r - BORE - 2.0).abs()));
    }
    let wall = smoothstep(BORE - 14.0, BORE, r) * (0.5 - 0.5 * towards);
    let mut inside = [17.0, 18.0, 20.0, 5.0];
    lighten(&mut inside, 70.0 * wall * wall + 5.0 * cos_turns(r / 3.2) * wall);
    blend(px, inside, cover(r - BORE));
}

fn holes(px: &mut [f32; 4], x: f32, y: f32) {
    let (dx, dy, r) = nearest_hole(x, y);
    if r > SINK + 2.0 {
        return;
    }
    let towards = (dx * LAMP[0] + dy * LAMP[1]) / r.max(1.0);
    let mut cone = [112.0, 114.0, 118.0, 40.0];
    lighten(&mut cone, -62.0 * towards + 6.0 * noise(r * 1.2, 0.5, [0, 0], 33) + 46.0 * pow2n((-towards).max(0.0), 3));
    blend(px, cone, cover(r - SINK));
    lighten(px, -36.0 * smoothstep(1.8, 0.0, (r - SINK).abs()));
    let mut inside = [14.0, 14.0, 16.0, 0.0];
    lighten(&mut inside, 34.0 * smoothstep(HOLE - 7.0, HOLE, r) * (0.5 - 0.5 * towards));
    blend(px, inside, cover(r - HOLE));
}

fn slots(px: &mut [f32; 4], x: f32, y: f32) {
    let d = slot(x, y);
    if d > 4.0 {
        return;
    }
    // The slot's wall direction, from its middle line.
    let cx = if x < 0.0 { -164.0 } else { 164.0 };
    let (dx, dy) = (x - cx, y - y.clamp(-46.0, 46.0));
    let towards = (dx * LAMP[0] + dy * LAMP[1]) / length(dx, dy).max(1.0);
    lighten(px, -64.0 * towards * smoothstep(3.0, 0.0, (d - 1.0).abs()));
    let mut inside = [20.0, 21.0, 23.0, 0.0];
    lighten(&mut inside, 62.0 * smoothstep(-8.0, 0.0, d) * (0.5 - 0.5 * towards));
    blend(px, inside, cover(d));
}

/// The plate's outer chamfer.
fn edge(px: &mut [f32; 4], x: f32, y: f32, plate: f32) {
    const WIDE: f32 = 6.0;
    if plate < -WIDE - 1.0 {
        return;
    }
    // Outward direction of the rounded box.
    let (qx, qy) = ((x.abs() - HALF[0] + CORNER).max(0.0), (y.abs() - HALF[1] + CORNER).max(0.0));
    let (nx, ny) = if qx > 0.0 && qy > 0.0 {
        (qx / length(qx, qy), qy / length(qx, qy))
    } else if x.abs() - HALF[0] > y.abs() - HALF[1] {
        (1.0, 0.0)
    } else {
        (0.0, 1.0)
    };
    let (nx, ny) = (if x < 0.0 { -nx } else { nx }, if y < 0.0 { -ny } else { ny });
    let towards = nx * LAMP[0] + ny * LAMP[1];
    lighten(px, (58.0 * towards) * cover(-plate - WIDE));
}

impl Product for Metal {
    fn name(&self) -> &'static str {
        "metal_plate"
    }

    fn setup(&self) -> Setup {
        Setup { shift_px: 8.0, turn_deg: 2.0, scale: 0.012, shine: 0.62, spot: [0.34, 1.6] }
    }

    fn defects(&self) -> &'static [DefectKind] {
        &[DefectKind::Scratch, DefectKind::Dent, DefectKind::Contamination, DefectKind::Crack, DefectKind::Discolouration]
    }

    fn assemble(&self, mut rng: Rng, defect: Option<&mut Draw>, texture: &mut [Px]) -> Area {
        let shift = [rng.below(TILE as u32) as usize, rng.below(TILE as u32) as usize];
        self.detail.lay(&self.base, texture, shift);
        let Some(defect) = defect else { return Area::EMPTY };
        const SURFACE: Surface = Surface {
            scratch: [232, 234, 238, 160],
            dirt: [[34, 28, 22, 30], [70, 48, 26, 20], [24, 26, 30, 120]],
            stain: [[150, 96, 60, 0], [96, 110, 170, 0], [168, 130, 70, 0]],
            crack: [16, 15, 15, 0],
            dent_levels: 95.0,
        };
        let [x, y] = defect.place([HALF[0] - 14.0, HALF[1] - 14.0], |x, y| off_face(x, y) < -4.0);
        defect.on_surface(texture, &SURFACE, x, y)
    }
}
