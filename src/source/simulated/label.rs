//! A printed label on a cardboard box: brand band, text, table, bar code, and a lot code that differs on every part.

use super::canvas::{Area, Canvas, Detail, Px, Sprite, TILE, blend, lighten};
use super::defect::{DefectKind, Draw, Surface};
use super::math::{Rng, cos_turns, cover, fbm, hash, length, lerp, noise, rounded_box, sin_turns, smoothstep};
use super::optics::Setup;
use super::product::Product;

const HALF: [f32; 2] = [284.0, 200.0];
const PAPER: [f32; 4] = [236.0, 235.0, 229.0, 34.0];
const INK: [f32; 4] = [30.0, 30.0, 34.0, 30.0];
const BLUE: [f32; 4] = [24.0, 70.0, 138.0, 60.0];
const ORANGE: [f32; 4] = [226.0, 122.0, 28.0, 60.0];
const GREEN: [f32; 4] = [72.0, 130.0, 62.0, 50.0];
/// Middle of the field for the lot code, and the size of a printed character.
const LOT_AT: [i32; 2] = [176, 160];
const LOT_STEP: i32 = 15;
/// Characters that a lot code is made of.
const LOT_SET: &[u8] = b"0123456789L:. ";

pub(super) struct Label {
    base: Vec<Px>,
    detail: Detail,
    characters: Vec<Sprite>,
}

impl Label {
    pub(super) fn new() -> Self {
        let mut canvas = Canvas::texture();
        canvas.paint(|x, y, px| {
            // Kraft board: fibres, and the flutes showing through.
            let fibre = 6.0 * noise(x / 9.0, y / 1.6, [0, 0], 91) + 5.0 * fbm(x / 30.0, y / 30.0, 92) + 3.0 * noise(x, y, [0, 0], 93);
            let flute = 3.0 * cos_turns(x / 15.0);
            *px = [166.0 + fibre + flute, 130.0 + fibre + flute, 92.0 + fibre * 0.8 + flute, 4.0];
            lighten(px, -30.0 * smoothstep(4.0, -3.0, rounded_box(x - 2.0, y - 2.5, HALF, 12.0)));
            blend(px, PAPER, cover(rounded_box(x, y, HALF, 12.0)));
        });
        artwork(&mut canvas);
        let n = TILE as i32;
        let detail = Detail::new(
            |x, y| {
                let grain = 3.0 * noise(x / 2.0, y / 2.0, [n / 2, n / 2], 94) + 2.0 * noise(x / 4.0, y / 8.0, [n / 4, n / 8], 95);
                let wave = 3.0 * noise(x / 128.0, y / 128.0, [n / 128, n / 128], 96);
                let all = grain + wave;
                [all, all, all * 0.9, 14.0 * noise(x / 64.0, y / 64.0, [n / 64, n / 64], 97)]
            },
            |x, y| lerp(2.0, 1.0, cover(rounded_box(x, y, HALF, 12.0))),
        );
        let characters = LOT_SET.iter().map(|&character| ink_jet(character)).collect();
        Self { base: canvas.pack(), detail, characters }
    }

    /// Print a line of the lot code centred on (x, y).
    fn print(&self, texture: &mut [Px], code: &[u8], x: i32, y: i32) -> Area {
        let mut area = Area::EMPTY;
        let left = x - (code.len() as i32 - 1) * LOT_STEP / 2;
        for (i, character) in code.iter().enumerate() {
            if let Some(sprite) = LOT_SET.iter().position(|c| c == character).and_then(|n| self.characters.get(n)) {
                area = area.join(sprite.stamp(texture, left + i as i32 * LOT_STEP, y));
            }
        }
        area
    }
}

/// A character as an ink-jet coder prints it: round, separate dots.
fn ink_jet(character: u8) -> Sprite {
    let mut canvas = Canvas::new(16, 22);
    canvas.paint(|_, _, px| *px = [34.0, 32.0, 40.0, 20.0]);
    canvas.paint_box([0.0, 0.0], [8.0, 11.0], |x, y, _, alpha| {
        const DOT: f32 = 2.5;
        let (u, v) = (x / DOT + 2.5, y / DOT + 3.5);
        let (column, row) = (u.floor(), v.floor());
        let inked = super::font::ink(&[character], column + 0.5, row + 0.5, 0.3);
        let d = length(u - column - 0.5, v - row - 0.5) * DOT - 1.25;
        *alpha = 0.9 * inked * cover(d);
    });
    canvas.sprite()
}

fn artwork(canvas: &mut Canvas) {
    // The band with the brand.
    // Its upper corners are the label's own; below, it is cut off straight.
    canvas.shape([0.0, -148.0], [285.0, 54.0], BLUE, |x, y| rounded_box(x, y - 20.0, [284.0, 72.0], 12.0).max(y - 54.0));
    canvas.rect([0.0, -92.0], [284.0, 3.0], ORANGE);
    canvas.text([-66.0, -150.0], 6.4, "OATLAND", [246.0, 246.0, 242.0, 40.0], true);
    canvas.disc([212.0, -146.0], 42.0, ORANGE);
    canvas.shape([212.0, -146.0], [40.0, 40.0], [250.0, 240.0, 220.0, 50.0], |x, y| (length(x, y) - 37.0).abs() - 1.0);
    canvas.text([213.0, -152.0], 3.6, "500", [252.0, 248.0, 240.0, 50.0], true);
    canvas.text([213.0, -128.0], 1.8, "GRAM", [252.0, 248.0, 240.0, 50.0], true);

    canvas.text([-84.0, -64.0], 3.2, "WHOLE GRAIN OATS", INK, true);
    for (i, line) in
        ["INGREDIENTS: ROLLED OATS (98%), OAT BRAN.", "MAY CONTAIN TRACES OF WHEAT AND NUTS.", "STORE COOL AND DRY. BEST BEFORE: SEE CODE."]
            .iter()
            .enumerate()
    {
        canvas.text([-92.0, -32.0 + 16.0 * i as f32], 1.45, line, [62.0, 62.0, 66.0, 30.0], true);
    }
    // An ear of oats.
    for i in 0..6 {
        let y = 2.0 - i as f32 * 13.0;
        for side in [-1.0, 1.0] {
            canvas.shape([128.0 + side * 9.0, y], [14.0, 14.0], GREEN, |x, y| {
                let (a, b) = (x * 0.707 * side + y * -0.707, x * 0.707 * side + y * 0.707);
                length(a / 2.1, b) - 4.2
            });
        }
    }
    canvas.rect([128.0, -12.0], [1.2, 44.0], GREEN);

    // The table.
    canvas.shape([216.0, -18.0], [60.0, 62.0], INK, |x, y| rounded_box(x, y, [56.0, 58.0], 2.0).abs() - 1.0);
    for (i, row) in ["PER 100G", "FAT  7.0G", "CARB  59G", "FIBR  10G", "PROT  13G", "SALT 0.0G"].iter().enumerate() {
        let y = -64.0 + 18.6 * i as f32;
        canvas.text([217.0, y], 1.6, row, INK, true);
        if i > 0 {
            canvas.rect([216.0, y - 9.3], [56.0, 0.5], [110.0, 110.0, 112.0, 30.0]);
        }
    }

    // The bar code: bars of one to three modules, digits below.
    let (left, top, bottom) = (-258.0, 44.0, 138.0);
    let mut x = left;
    let mut i = 0;
    while x < -18.0 {
        let bar = 2.4 * (1 + hash(i, 0, 98) % 3) as f32;
        let gap = 2.4 * (1 + hash(i, 1, 98) % 3) as f32;
        canvas.rect([x + bar / 2.0, (top + bottom) / 2.0], [bar / 2.0, (bottom - top) / 2.0], INK);
        x += bar + gap;
        i += 1;
    }
    canvas.text([-138.0, 154.0], 2.3, "7 310130 004711", INK, true);
    canvas.text([-140.0, 182.0], 1.5, "OATLAND MILLS, HARBOUR ROAD 12", [62.0, 62.0, 66.0, 30.0], true);

    // The field of the lot code, and recycling marks.
    canvas.shape([176.0, 150.0], [106.0, 42.0], [120.0, 122.0, 126.0, 30.0], |x, y| rounded_box(x, y, [100.0, 37.0], 5.0).abs() - 0.9);
    canvas.text([164.0, 103.0], 1.5, "LOT / BEST BEFORE", [62.0, 62.0, 66.0, 30.0], true);
    canvas.shape([30.0, 92.0], [26.0, 26.0], GREEN, |x, y| (length(x, y) - 19.0).abs() - 3.0);
    canvas.text([31.0, 93.0], 2.0, "PAP", GREEN, true);
    canvas.shape([30.0, 154.0], [26.0, 26.0], INK, |x, y| rounded_box(x, y, [19.0, 19.0], 2.0).abs() - 1.2);
    canvas.text([31.0, 155.0], 2.6, "CE", INK, true);
}

impl Product for Label {
    fn name(&self) -> &'static str {
        "printed_label"
    }

    fn setup(&self) -> Setup {
        Setup { shift_px: 8.0, turn_deg: 2.0, scale: 0.012, shine: 0.22, spot: [0.5, 0.6] }
    }

    fn defects(&self) -> &'static [DefectKind] {
        &[DefectKind::Misprint, DefectKind::WrongPosition, DefectKind::Contamination, DefectKind::Scratch, DefectKind::Discolouration]
    }

    fn assemble(&self, mut rng: Rng, mut defect: Option<&mut Draw>, texture: &mut [Px]) -> Area {
        let shift = [rng.below(TILE as u32) as usize, rng.below(TILE as u32) as usize];
        self.detail.lay(&self.base, texture, shift);
        // Lot number, date and time of this part; the printer's aim wanders a little.
        let mut pair = |low: u32, count: u32| {
            let n = low + rng.below(count);
            [b'0' + (n / 10) as u8, b'0' + (n % 10) as u8]
        };
        let ([a, b], [c, d], [hour, hour2], [minute, minute2]) = (pair(0, 100), pair(0, 100), pair(0, 24), pair(0, 60));
        let lot = [b'L', a, b, c, d, b' ', hour, hour2, b':', minute, minute2];
        let ([day, day2], [month, month2], [year, year2]) = (pair(1, 28), pair(1, 12), pair(27, 2));
        let date = [day, day2, b'.', month, month2, b'.', year, year2];
        let mut at = [LOT_AT[0] + rng.jitter(3), LOT_AT[1] - 10 + rng.jitter(2)];
        let mut area = Area::EMPTY;
        if let Some(draw) = defect.as_deref_mut().filter(|draw| draw.kind == DefectKind::WrongPosition) {
            let distance = draw.size_px.clamp(14.0, 60.0);
            (draw.size_px, draw.contrast) = (distance, 1.0);
            let turn = draw.rng.range(0.4, 0.85);
            area = Area::around(at[0] as f32, at[1] as f32, 96.0, 30.0);
            at[0] += (distance * cos_turns(turn) + 0.5).floor() as i32;
            at[1] += (distance * sin_turns(turn) + 0.5).floor() as i32;
        }
        let printed = self.print(texture, &lot, at[0], at[1] - 12).join(self.print(texture, &date, at[0], at[1] + 12));
        let Some(draw) = defect else { return Area::EMPTY };
        match draw.kind {
            DefectKind::WrongPosition => area.join(printed),
            DefectKind::Misprint => {
                let [x, y] = draw.place([HALF[0] - 20.0, HALF[1] - 20.0], |x, y| self.is_printed(x, y));
                draw.misprint(texture, [236, 235, 229, 34], x, y)
            }
            _ => {
                let [x, y] = draw.place([HALF[0] - 14.0, HALF[1] - 14.0], |_, _| true);
                draw.on_surface(texture, &ON_PAPER, x, y)
            }
        }
    }
}

impl Label {
    /// Whether there is print at a point of the artwork.
    fn is_printed(&self, x: f32, y: f32) -> bool {
        use super::canvas::{CENTRE, WIDTH};
        let at = (y + CENTRE[1]) as usize * WIDTH + (x + CENTRE[0]) as usize;
        self.base.get(at).is_some_and(|px| px[0].min(px[2]) < 120)
    }
}

const ON_PAPER: Surface = Surface {
    scratch: [150, 116, 80, 0],
    dirt: [[36, 30, 26, 10], [96, 66, 38, 10], [60, 62, 66, 20]],
    stain: [[190, 150, 84, 0], [206, 178, 120, 0], [150, 170, 200, 0]],
    crack: [0; 4],
    dent_levels: 0.0,
};
