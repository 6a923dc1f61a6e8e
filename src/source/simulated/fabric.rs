//! Twill cloth: indigo warp over pale weft, every yarn with its own thickness, twist and slubs.

use super::canvas::{Area, CENTRE, HEIGHT, Px, WIDTH};
use super::defect::{DefectKind, Draw, Surface, brush, tint};
use super::math::{Rng, cos_turns, hash_unit, length, noise, sin_turns, smoothstep};
use super::optics::Setup;
use super::product::Product;

/// Yarn pitch, in px.
const PITCH: f32 = 12.0;
/// Yarns either way in the repeating cloth; a multiple of the weave's four.
const YARNS: i32 = 88;
/// Side of the repeating cloth, in px.
const SIDE: usize = YARNS as usize * PITCH as usize;

pub(super) struct Fabric {
    /// [`SIDE`] x [`SIDE`], repeating.
    cloth: Vec<Px>,
}

/// Whether the warp (vertical) yarn `i` lies over the weft yarn `j`: a 2/2 twill.
fn warp_on_top(i: i32, j: i32) -> bool {
    (i + j).rem_euclid(4) < 2
}

impl Fabric {
    pub(super) fn new() -> Self {
        let cloth = (0..SIDE * SIDE).map(|at| {
            let (x, y) = ((at % SIDE) as f32 + 0.5, (at / SIDE) as f32 + 0.5);
            cloth(x, y).map(|value| value.clamp(0.0, 255.0) as u8)
        });
        Self { cloth: cloth.collect() }
    }
}

/// The cloth's colour at a point.
fn cloth(x: f32, y: f32) -> [f32; 4] {
    let (i, j) = ((x / PITCH).floor() as i32, (y / PITCH).floor() as i32);
    let warp = warp_on_top(i, j);
    // Along and across the yarn on top, in pitches; `yarn` is its number.
    let (across, along, yarn) = if warp { (x / PITCH, y / PITCH, i) } else { (y / PITCH, x / PITCH, j) };
    let seed = if warp { 41 } else { 42 };
    let wander = 0.07 * noise(along / 3.0, yarn as f32 * 7.0, [0, 0], seed);
    let thick = 1.02 + 0.10 * noise(along / 2.2, yarn as f32 * 5.0 + 0.5, [0, 0], seed + 10) + 0.10 * (hash_unit(yarn, 0, seed) - 0.5);
    let t = (across - yarn as f32 - 0.5 + wander) * 2.0 / thick;
    if t.abs() >= 1.0 {
        return [22.0, 24.0, 36.0, 0.0];
    }
    // Place within the float over two yarns, 0 to 2, and the arch of the float.
    let k = (i + j).rem_euclid(4);
    let step = if warp { k } else { k - 2 };
    let fraction = along - along.floor();
    let place = step as f32 + fraction;
    let arch = sin_turns(place / 4.0);
    let slope = cos_turns(place / 4.0);
    let round = (1.0 - t * t).sqrt();
    // Fibres twisted around the yarn.
    let twist = noise(along * 3.0 + t * 1.6, yarn as f32 * 3.0 + t * 1.3, [0, 0], seed + 20);
    let fine = noise(along * 9.0 + t * 6.0, yarn as f32 * 3.0 + t * 4.0, [0, 0], seed + 30);
    let (nx, ny) = if warp { (t, -0.55 * slope) } else { (-0.55 * slope, t) };
    let lamp = 0.62 * round.min(1.0) + 0.20 * (-0.6 * nx - 0.8 * ny) + 0.30 * arch;
    let shade = (0.34 + 0.74 * lamp) * (1.0 + 0.10 * twist + 0.09 * fine);
    let tone = 1.0 + 0.07 * (hash_unit(yarn, 1, seed) - 0.5) * 2.0;
    let colour = if warp { [74.0, 96.0, 142.0] } else { [176.0, 180.0, 186.0] };
    let [r, g, b] = colour.map(|c: f32| c * shade * tone);
    [r, g, b, 0.0]
}

impl Product for Fabric {
    fn name(&self) -> &'static str {
        "fabric"
    }

    fn setup(&self) -> Setup {
        Setup { shift_px: 12.0, turn_deg: 2.5, scale: 0.03, shine: 0.0, spot: [1.0, 1.0] }
    }

    fn defects(&self) -> &'static [DefectKind] {
        &[DefectKind::Contamination, DefectKind::Discolouration, DefectKind::Hole, DefectKind::BrokenYarn]
    }

    fn assemble(&self, mut rng: Rng, defect: Option<&mut Draw>, texture: &mut [Px]) -> Area {
        let shift = [rng.below(SIDE as u32) as usize, rng.below(SIDE as u32) as usize];
        for (y, row) in texture.chunks_exact_mut(WIDTH).enumerate() {
            let line = &self.cloth[((y + shift[1]) % SIDE) * SIDE..][..SIDE];
            let first = (SIDE - shift[0]).min(WIDTH);
            row[..first].copy_from_slice(&line[shift[0]..shift[0] + first]);
            row[first..].copy_from_slice(&line[..WIDTH - first]);
        }
        let Some(defect) = defect else { return Area::EMPTY };
        let [x, y] = defect.place([270.0, 190.0], |_, _| true);
        const SURFACE: Surface = Surface {
            scratch: [0; 4],
            dirt: [[30, 24, 20, 0], [86, 60, 34, 0], [40, 44, 40, 0]],
            stain: [[196, 150, 90, 0], [220, 130, 120, 0], [120, 150, 130, 0]],
            crack: [0; 4],
            dent_levels: 0.0,
        };
        match defect.kind {
            DefectKind::Hole => hole(defect, texture, x, y),
            DefectKind::BrokenYarn => broken_yarn(defect, texture, shift, x, y),
            _ => defect.on_surface(texture, &SURFACE, x, y),
        }
    }
}

/// A tear: dark inside, frayed pale ends around.
fn hole(defect: &mut Draw, texture: &mut [Px], x: f32, y: f32) -> Area {
    let radius = defect.size_px / 2.0;
    let seed = defect.rng.next_u32();
    let contrast = defect.contrast;
    let flat = defect.rng.range(0.6, 1.0);
    brush(texture, [x, y], radius + 2.0, |dx, dy, px| {
        let r = length(dx, dy / flat);
        let fray = 0.8 + 0.2 * noise(dx / 2.4, dy / 2.4, [0, 0], seed);
        let edge = radius * 0.82 * fray;
        let rim = smoothstep(radius * 0.16 + 1.5, 0.0, (r - edge).abs());
        tint(px, [206, 206, 208, 0], 0.45 * rim * contrast);
        tint(px, [14, 14, 20, 0], smoothstep(edge + 0.8, edge - 0.8, r) * contrast);
    })
}

/// A yarn that is gone over `size_px`: its floats show the dark ground.
fn broken_yarn(defect: &mut Draw, texture: &mut [Px], shift: [usize; 2], x: f32, y: f32) -> Area {
    let warp = defect.rng.below(2) == 0;
    let half = defect.size_px / 2.0;
    // Cloth coordinates of a texture point, to find the yarn.
    let cloth_from_centre = [CENTRE[0] + shift[0] as f32, CENTRE[1] + shift[1] as f32];
    let across = if warp { x + cloth_from_centre[0] } else { y + cloth_from_centre[1] };
    let yarn = (across / PITCH).floor();
    let seed = defect.rng.next_u32();
    let contrast = defect.contrast;
    brush(texture, [x, y], half + 2.0, |dx, dy, px| {
        let (cx, cy) = (x + dx + cloth_from_centre[0], y + dy + cloth_from_centre[1]);
        let (i, j) = ((cx / PITCH).floor(), (cy / PITCH).floor());
        let here = if warp { i } else { j };
        let along = if warp { dy } else { dx };
        if here == yarn && warp_on_top(i as i32, j as i32) == warp {
            let frayed = along.abs() + 3.0 * noise(dx / 2.0, dy / 2.0, [0, 0], seed);
            tint(px, [20, 22, 32, 0], 0.92 * smoothstep(half, half - 3.0, frayed) * contrast);
        }
    })
}

const _: () = assert!(SIDE > WIDTH && SIDE > HEIGHT, "the cloth repeats at most once across the texture");
