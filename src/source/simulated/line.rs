//! Which part comes when, what is wrong with it, and its picture and mask.

use super::canvas::{Area, HEIGHT, Px, WIDTH};
use super::defect::{DefectKind, DefectRange, Draw};
use super::math::Rng;
use super::optics::{self, LEVEL, Optics, Sensor, Shot};
use super::product::Product;
use super::{blister, board, cap, fabric, label, metal};
use std::sync::{Arc, OnceLock};

/// Width of every picture, in pixels.
pub const WIDTH_PX: u32 = optics::WIDTH as u32;
/// Height of every picture, in pixels.
pub const HEIGHT_PX: u32 = optics::HEIGHT as u32;

/// A pixel belongs to the mask when the defect changes one of its channels by at least this many grey levels before sensor noise:
/// some three standard deviations of that noise, about where an eye sees a change of a few pixels.
const VISIBLE_LEVELS: u16 = 5;
/// A defect with fewer visible pixels than this is drawn again, stronger and elsewhere: the truth must not name what nobody can see.
const MIN_VISIBLE_PX: u32 = 16;
/// The same for a defect of less [`DefectTruth::visibility`]: at 8 a person who looks closely finds it, at 4 hardly ever.
const MIN_VISIBILITY: f32 = 8.0;
/// What a smooth surface counts as texture, in levels: sensor noise and the eye's own threshold.
const PLAIN_LEVELS: f32 = 6.0;
/// Distance over which texture is measured: beyond the blur of lens and motion.
const TEXTURE_PX: usize = 3;
/// How often a defect is drawn before it is taken as it is; each time 1.3 times stronger, so that 0.15 becomes 1 in half of them.
const MAX_DRAWS: u32 = 16;

/// What each stream of random numbers decides.
mod purpose {
    pub(super) const PLAN: u32 = 1;
    pub(super) const ASSEMBLY: u32 = 2;
    pub(super) const SHOT: u32 = 3;
    pub(super) const NOISE: u32 = 4;
    /// Plus the number of the draw.
    pub(super) const DEFECT: u32 = 100;
}

/// What is true of a rendered part.
pub struct PartTruth<'a> {
    /// The product's name.
    pub product: Arc<str>,
    /// What is wrong with it; `None` for a good part.
    pub defect: Option<DefectTruth>,
    /// [`WIDTH_PX`] x [`HEIGHT_PX`], row-major: 255 where the defect changes the picture visibly, else 0. All 0 for a good part.
    pub mask: &'a [u8],
}

/// What is true of a defect.
#[derive(Clone, Debug, PartialEq)]
pub struct DefectTruth {
    /// Folder name of the kind.
    pub name: Arc<str>,
    /// The kind.
    pub kind: DefectKind,
    /// The size as drawn, in px: length of a scratch or crack, width of a spot, extent of a missing component, distance moved.
    pub size_px: f32,
    /// Longer side of the mask's bounding box, in px: the size as seen, blur included.
    pub extent_px: u32,
    /// Strength it was drawn with, in (0, 1]; 1 for what is missing or misplaced.
    pub contrast: f32,
    /// Visible pixels.
    pub area_px: u32,
    /// Mean change of the strongest channel over the mask, in grey levels of 255.
    pub delta_levels: f32,
    /// Change times the square root of the area, over the contrast of the texture beneath (what a person sees follows this product:
    /// Piper's law). At least 8; large defects of full contrast reach hundreds.
    pub visibility: f32,
}

/// The simulated line: a frame source, and a renderer of labelled parts.
pub struct SimulatedLine {
    seed: u64,
    defect_share: f32,
    range: DefectRange,
    products: &'static [Named],
    kinds: Vec<(DefectKind, Arc<str>)>,
    frames: u64,
    /// The part as assembled, and as it would be without its defect.
    texture: Vec<Px>,
    sound: Vec<Px>,
    optics: Optics,
    sensor: Sensor,
    /// Noiseless rows of the sound part, beside those of the defective one.
    reference: Vec<optics::LitRow>,
    mask: Vec<u8>,
    /// Rows of the mask that are not all 0.
    masked_rows: std::ops::Range<usize>,
}

/// A product with its name as records share it.
type Named = (Arc<str>, Box<dyn Product>);

/// The products, made at the first call, side by side; some 30 MB. They are the same for every line of the process, as for every seed.
fn products() -> &'static [Named] {
    static PRODUCTS: OnceLock<Vec<Named>> = OnceLock::new();
    const MAKERS: [fn() -> Box<dyn Product>; 6] = [
        || Box::new(metal::Metal::new()),
        || Box::new(fabric::Fabric::new()),
        || Box::new(board::Board::new()),
        || Box::new(cap::Cap::new()),
        || Box::new(blister::Blister::new()),
        || Box::new(label::Label::new()),
    ];
    PRODUCTS.get_or_init(|| {
        std::thread::scope(|scope| {
            let threads = MAKERS.map(|make| scope.spawn(make));
            let made = threads.map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
            made.into_iter().map(|product| (Arc::from(product.name()), product)).collect()
        })
    })
}

/// What is decided about a part before it is rendered.
struct Plan {
    product: usize,
    defect: Option<(DefectKind, f32, f32)>,
}

impl SimulatedLine {
    /// A line whose parts follow from `seed`, `defect_share` (clamped to 0..=1) of them defective. The first line of a process makes
    /// the textures of all products: some 0.4 s of one core.
    pub fn new(seed: u64, defect_share: f32) -> Self {
        Self::with_defects(seed, defect_share, DefectRange::default())
    }

    /// The same with sizes and strengths of the defects drawn from `range`.
    pub fn with_defects(seed: u64, defect_share: f32, range: DefectRange) -> Self {
        Self {
            seed,
            defect_share: if defect_share.is_nan() { 0.0 } else { defect_share.clamp(0.0, 1.0) },
            range,
            products: products(),
            kinds: DefectKind::ALL.iter().map(|&kind| (kind, Arc::from(kind.name()))).collect(),
            frames: 0,
            texture: vec![[0; 4]; WIDTH * HEIGHT],
            sound: vec![[0; 4]; WIDTH * HEIGHT],
            optics: Optics::new(),
            sensor: Sensor::new(),
            reference: vec![[[0; optics::WIDTH]; 3]; optics::HEIGHT],
            mask: vec![0; optics::WIDTH * optics::HEIGHT],
            masked_rows: 0..0,
        }
    }

    /// The seed that all parts follow from.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Share of defective parts, 0 to 1.
    pub fn defect_share(&self) -> f32 {
        self.defect_share
    }

    /// The products' names, in a fixed order.
    pub fn products(&self) -> impl Iterator<Item = &Arc<str>> {
        self.products.iter().map(|(name, _)| name)
    }

    /// The number of the next frame of a free-running line.
    pub(super) fn count_frame(&mut self) -> u64 {
        let seq = self.frames;
        self.frames += 1;
        seq
    }

    /// Decide what part number `part` is.
    fn plan(&self, part: u32) -> Plan {
        let mut rng = Rng::new(self.seed, part, purpose::PLAN);
        let product = rng.below(self.products.len() as u32) as usize;
        let bad = rng.unit() < self.defect_share;
        let kinds = self.products.get(product).map_or(&[][..], |(_, product)| product.defects());
        let kind = kinds.get(rng.below(kinds.len() as u32) as usize).copied();
        let size = rng.range(self.range.size_px[0], self.range.size_px[1]).clamp(2.0, 200.0);
        let contrast = rng.range(self.range.contrast[0], self.range.contrast[1]).clamp(0.01, 1.0);
        Plan { product, defect: kind.filter(|_| bad).map(|kind| (kind, size, contrast)) }
    }

    /// Render part number `part` into `out`: [`WIDTH_PX`] x [`HEIGHT_PX`] pixels of red, green, blue, row-major. Allocates nothing when
    /// `out` has the capacity. The same (seed, part, defect share, range) give the same bytes and truth always and everywhere.
    pub fn render(&mut self, part: u32, out: &mut Vec<u8>) -> PartTruth<'_> {
        out.resize(3 * optics::WIDTH * optics::HEIGHT, 0);
        let plan = self.plan(part);
        // `below` keeps the index in range; the list is never empty.
        let (name, product) = &self.products[plan.product];
        let name = name.clone();
        let assembly = Rng::new(self.seed, part, purpose::ASSEMBLY);
        let shot = Shot::draw(&product.setup(), Rng::new(self.seed, part, purpose::SHOT));

        let clear = self.masked_rows.start * optics::WIDTH..self.masked_rows.end * optics::WIDTH;
        self.mask[clear].fill(0);
        self.masked_rows = 0..0;

        let mut defect = None;
        match plan.defect {
            None => {
                product.assemble(assembly, None, &mut self.texture);
            }
            Some((kind, size_px, contrast)) => {
                product.assemble(assembly, None, &mut self.sound);
                let mut contrast = contrast;
                for attempt in 0..MAX_DRAWS {
                    let rng = Rng::new(self.seed, part, purpose::DEFECT + attempt);
                    let mut draw = Draw { kind, size_px, contrast, rng };
                    let area = product.assemble(assembly, Some(&mut draw), &mut self.texture);
                    let seen = measure(&mut self.optics, &shot, area, [&self.sound, &self.texture], &mut self.reference, &mut self.mask);
                    self.masked_rows = shot.rows_of(area);
                    let enough = seen.area_px >= MIN_VISIBLE_PX && seen.visibility >= MIN_VISIBILITY;
                    let kind_name = self.kinds.iter().find(|(k, _)| *k == kind).map(|(_, name)| name.clone());
                    defect = kind_name.map(|name| DefectTruth {
                        name,
                        kind,
                        size_px: draw.size_px,
                        extent_px: seen.extent_px,
                        contrast: draw.contrast,
                        area_px: seen.area_px,
                        delta_levels: seen.delta_levels,
                        visibility: seen.visibility,
                    });
                    if enough || attempt + 1 == MAX_DRAWS {
                        break;
                    }
                    let rows = self.masked_rows.clone();
                    self.mask[rows.start * optics::WIDTH..rows.end * optics::WIDTH].fill(0);
                    contrast = (contrast * 1.3).min(1.0);
                }
            }
        }

        let mut noise = Rng::new(self.seed, part, purpose::NOISE);
        let sensor = &self.sensor;
        let mut lines = out.chunks_exact_mut(3 * optics::WIDTH);
        self.optics.expose(&self.texture, &shot, 0..optics::HEIGHT, |_, lit| {
            if let Some(line) = lines.next() {
                sensor.develop(&shot, &mut noise, lit, line);
            }
        });
        PartTruth { product: name, defect, mask: &self.mask }
    }
}

/// What [`measure`] found.
struct Seen {
    area_px: u32,
    extent_px: u32,
    delta_levels: f32,
    visibility: f32,
}

/// Photograph the part without and with its defect, noiselessly, where `area` shows; mark what differs in the mask.
fn measure(
    optics: &mut Optics,
    shot: &Shot,
    area: Area,
    [sound, damaged]: [&[Px]; 2],
    reference: &mut [optics::LitRow],
    mask: &mut [u8],
) -> Seen {
    let rows = shot.rows_of(area);
    optics.expose(sound, shot, rows.clone(), |y, lit| {
        if let Some(row) = reference.get_mut(y) {
            *row = *lit;
        }
    });
    let first = rows.start;
    let (mut pixels, mut sum, mut texture) = (0u32, 0u64, 0u64);
    let (mut x0, mut x1, mut y0, mut y1) = (usize::MAX, 0, usize::MAX, 0);
    optics.expose(damaged, shot, rows, |y, lit| {
        let (Some(row), Some(marks)) = (reference.get(y), mask.chunks_exact_mut(optics::WIDTH).nth(y)) else { return };
        // Rows above the first one are another part's.
        let above = y.checked_sub(TEXTURE_PX).filter(|&y| y >= first).and_then(|y| reference.get(y));
        for (x, mark) in marks.iter_mut().enumerate() {
            let change = (0..3).map(|c| lit[c][x].abs_diff(row[c][x])).max().unwrap_or(0);
            if change >= VISIBLE_LEVELS * LEVEL {
                *mark = 255;
                pixels += 1;
                sum += u64::from(change);
                let left = x.saturating_sub(TEXTURE_PX);
                let across = (0..3).map(|c| row[c][x].abs_diff(row[c][left])).max().unwrap_or(0);
                let down = above.and_then(|above| (0..3).map(|c| row[c][x].abs_diff(above[c][x])).max()).unwrap_or(across);
                texture += (u64::from(across) + u64::from(down)) / 2;
                (x0, x1, y0, y1) = (x0.min(x), x1.max(x), y0.min(y), y1.max(y));
            }
        }
    });
    if pixels == 0 {
        return Seen { area_px: 0, extent_px: 0, delta_levels: 0.0, visibility: 0.0 };
    }
    let mean = |sum: u64| sum as f32 / pixels as f32 / f32::from(LEVEL);
    let (delta_levels, texture_levels) = (mean(sum), mean(texture));
    let visibility = delta_levels * (pixels as f32).sqrt() / (PLAIN_LEVELS + texture_levels);
    Seen { area_px: pixels, extent_px: (x1 - x0).max(y1 - y0) as u32 + 1, delta_levels, visibility }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sha2::{Digest, Sha256};
    use std::collections::BTreeMap;

    fn picture(line: &mut SimulatedLine, part: u32) -> (Vec<u8>, Vec<u8>, Option<DefectTruth>) {
        let mut out = Vec::new();
        let truth = line.render(part, &mut out);
        let (mask, defect) = (truth.mask.to_vec(), truth.defect.clone());
        (out, mask, defect)
    }

    /// Pinned: another machine, compiler or order of calls must give these bytes. A deliberate change of the line's looks changes them
    /// (print the new ones with `CULL_PRINT_PINS=1`) and makes models trained before it stale.
    #[test]
    fn pictures_are_the_same_everywhere() {
        let mut line = SimulatedLine::new(7, 0.5);
        let mut sums = Vec::new();
        for part in [0, 1, 2, 3, 4, 5, 11, 12, u32::MAX] {
            let (pixels, mask, _) = picture(&mut line, part);
            let digest = Sha256::new().chain_update(&pixels).chain_update(&mask).finalize();
            sums.push(digest.iter().take(6).map(|byte| format!("{byte:02x}")).collect::<String>());
        }
        if std::env::var_os("CULL_PRINT_PINS").is_some() {
            eprintln!("{sums:?}");
        }
        assert_eq!(sums, PINS);
    }

    const PINS: [&str; 9] = [
        "7cf20e89c744",
        "eb329d20c361",
        "1d3749756cd2",
        "1bc090eb9c48",
        "8523c80ec7ed",
        "c7a7ff1ba7d4",
        "0e6e3697ebac",
        "0d2ea70343ba",
        "f60587765270",
    ];

    #[test]
    fn a_part_does_not_depend_on_what_was_rendered_before() {
        let mut one = SimulatedLine::new(3, 0.6);
        let mut other = SimulatedLine::new(3, 0.6);
        let forward: Vec<_> = (0..12).map(|part| picture(&mut one, part)).collect();
        for part in (0..12).rev() {
            assert!(picture(&mut other, part) == forward[part as usize], "part {part}");
        }
    }

    #[test]
    fn good_and_defective_twins_differ_only_around_the_mask() {
        // The same parts on a line without defects: outside of the mask nothing may change by more than blur's invisible rim.
        let mut defective = SimulatedLine::new(11, 1.0);
        let mut sound = SimulatedLine::new(11, 0.0);
        for part in 0..60 {
            let (a, mask, truth) = picture(&mut defective, part);
            let (b, no_mask, none) = picture(&mut sound, part);
            assert!(none.is_none() && no_mask.iter().all(|&m| m == 0));
            let truth = truth.expect("every part of this line is defective");
            let levels = i32::from(VISIBLE_LEVELS) + 1;
            for (i, &marked) in mask.iter().enumerate() {
                let change = (0..3).map(|c| (i32::from(a[3 * i + c]) - i32::from(b[3 * i + c])).abs()).max().unwrap_or(0);
                // Noise has a deviation that follows brightness, so twins may differ by a level more than without it.
                assert!(marked != 0 || change <= levels + 2, "part {part} {}: {change} levels outside the mask", truth.name);
            }
        }
    }

    #[test]
    fn every_defect_can_be_seen_and_every_kind_and_product_occurs() {
        let mut line = SimulatedLine::new(5, 1.0);
        let mut kinds = BTreeMap::new();
        let mut products = BTreeMap::new();
        let mut out = Vec::new();
        for part in 0..400 {
            let truth = line.render(part, &mut out);
            *products.entry(truth.product.clone()).or_insert(0) += 1;
            let marked = truth.mask.iter().filter(|&&m| m == 255).count();
            assert!(truth.mask.iter().all(|&m| m == 0 || m == 255));
            let product = truth.product.clone();
            let defect = truth.defect.expect("every part of this line is defective");
            assert_eq!(marked, defect.area_px as usize);
            let (area, visibility) = (defect.area_px, defect.visibility);
            let seen = area >= MIN_VISIBLE_PX && visibility >= MIN_VISIBILITY;
            assert!(seen, "part {part} {product} {}: {area} px visible, visibility {visibility:.1}", defect.name);
            *kinds.entry(defect.name).or_insert(0) += 1;
        }
        assert_eq!(products.len(), 6, "{products:?}");
        assert_eq!(kinds.len(), DefectKind::ALL.len(), "{kinds:?}");
    }

    #[test]
    fn the_share_of_defects_is_what_was_asked_for() {
        let line = SimulatedLine::new(9, 0.2);
        let bad = (0..5000).filter(|&part| line.plan(part).defect.is_some()).count();
        assert!((900..1100).contains(&bad), "{bad} of 5000");
    }
}
