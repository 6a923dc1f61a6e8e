//! The anomaly map drawn over the picture, for people: snapshots, evaluation report and live page all use [`render`].
//!
//! Colours mean the same in every picture of a bundle: the middle of the colour map (crimson) is the calibrated reject threshold. What a normal
//! part typically shows is left clear. So two overlays can be laid side by side, and "how much redder" is "how much more anomalous".
//! Knows pictures, maps and numbers; nothing of threads, disks or the pipeline.

use super::text::{self, Face};
use crate::anomaly::{self, AnomalyMap, Region};
use crate::calibration::Calibration;
use crate::frame::PartId;
use crate::preprocess::Roi;
use crate::verdict::{Decision, Verdict};
use image::{Rgb, RgbImage};
use std::sync::OnceLock;

/// Opacity where the map is at its highest: the part must still be seen through it.
const ALPHA_MAX: f32 = 0.62;
/// Opacity at the reject threshold.
const ALPHA_THRESHOLD: f32 = 0.42;
/// How far above the threshold (in units of threshold - normal) the colour is half way from the threshold's to the top of the colour map.
const HALF_WAY: f32 = 1.5;
/// Colour of the line along which the map crosses the threshold: orange, which stands out from the heat on both sides of it.
const CONTOUR_POSITION: f32 = 0.8;
/// Pictures narrower than this are captioned in the small face.
const SMALL_BELOW_PX: u32 = 400;
/// Captions and lines grow by one step every this many pixels of width.
const SCALE_STEP_PX: u32 = 1_000;

const CAPTION_BACKGROUND: Rgb<u8> = Rgb([22, 22, 27]);
const CAPTION_TEXT: Rgb<u8> = Rgb([226, 226, 226]);
const CAPTION_QUIET: Rgb<u8> = Rgb([150, 150, 158]);
const BOX_LIGHT: Rgb<u8> = Rgb([255, 255, 255]);
const BOX_DARK: Rgb<u8> = Rgb([0, 0, 0]);

/// Ties map values to colours, the same for every picture of one bundle and policy.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scale {
    normal: f32,
    threshold: f32,
}

impl Scale {
    /// `normal` is the median score of normal images (`Calibration::score_at(0.5)`), drawn clear; `threshold` the score at which a part is rejected
    /// (`Calibration::score_at(false_reject_rate)`), drawn in the middle colour. Values that are not finite, or a threshold not above normal, are
    /// repaired to something drawable: a heat map is never worth a failure.
    pub fn new(normal: f32, threshold: f32) -> Self {
        let threshold = if threshold.is_finite() && threshold > 0.0 { threshold } else { 1.0 };
        let normal = if normal.is_finite() && normal >= 0.0 && normal < threshold { normal } else { 0.5 * threshold };
        Self { normal, threshold }
    }

    /// The scale of a bundle under a policy: typical normal scores are clear, the score of the false-reject rate has the middle colour.
    pub fn from_calibration(calibration: &Calibration, false_reject_rate: f32) -> Self {
        Self::new(calibration.score_at(0.5), calibration.score_at(false_reject_rate))
    }

    /// Score at which a part is rejected.
    pub fn threshold(&self) -> f32 {
        self.threshold
    }

    /// Position on the colour map, 0 to 1, with 0.5 at the threshold; increasing everywhere and never quite 1, so no defect saturates.
    pub fn position(&self, value: f32) -> f32 {
        let above = (value - self.normal) / (self.threshold - self.normal);
        if above.is_nan() || above <= 0.0 {
            0.0
        } else if above <= 1.0 {
            0.5 * above
        } else {
            let beyond = above - 1.0;
            if beyond.is_finite() { 0.5 + 0.5 * beyond / (beyond + HALF_WAY) } else { 1.0 }
        }
    }

    /// Opacity of the heat map, 0 (clear) to [`ALPHA_MAX`], at a position of [`Scale::position`].
    fn alpha(position: f32) -> f32 {
        if position <= 0.5 {
            // Quadratic: what is just above normal must not tint the whole part.
            let share = position / 0.5;
            ALPHA_THRESHOLD * share * share
        } else {
            ALPHA_THRESHOLD + (ALPHA_MAX - ALPHA_THRESHOLD) * (position - 0.5) / 0.5
        }
    }
}

/// The line of text under the picture.
#[derive(Clone, Debug)]
pub struct Legend {
    /// What was decided, and on which evidence.
    pub verdict: Verdict,
    /// The part, when a board announced it.
    pub part: Option<PartId>,
    /// Product name where known.
    pub product: Option<String>,
}

/// How a map lies on a picture, and what is drawn beside it.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    /// The part of the picture that the map covers; `None` for all of it.
    pub roi: Option<Roi>,
    /// Model input `[height, width]` in pixels: the coordinates of `regions`.
    pub input_px: [usize; 2],
    /// Map values to colours.
    pub scale: Scale,
    /// Boxes to draw, in model input pixels.
    pub regions: &'a [Region],
    /// Text and colour bar under the picture; `None` for the bare picture.
    pub legend: Option<&'a Legend>,
}

/// Inferno's colour at `position` in [0, 1]: perceptually uniform, readable in grey and to colour-blind eyes.
/// (Polynomial fit by Matt Zucker, public domain, of matplotlib's map by Smith and van der Walt, CC0.)
pub fn colour(position: f32) -> Rgb<u8> {
    static TABLE: OnceLock<[Rgb<u8>; 256]> = OnceLock::new();
    let table = TABLE.get_or_init(|| std::array::from_fn(|index| inferno(index as f32 / 255.0)));
    let index = (position.clamp(0.0, 1.0) * 255.0).round() as usize;
    table.get(index).copied().unwrap_or(BOX_DARK)
}

fn inferno(t: f32) -> Rgb<u8> {
    const COEFFICIENTS: [[f32; 3]; 7] = [
        [0.000_218_94, 0.001_651, -0.019_480_9],
        [0.106_513_4, 0.563_956_4, 3.932_712_4],
        [11.602_493, -3.972_854, -15.942_394],
        [-41.703_996, 17.436_4, 44.354_145],
        [77.162_94, -33.402_36, -81.807_31],
        [-71.319_43, 32.626_064, 73.209_52],
        [25.131_126, -12.242_669, -23.070_325],
    ];
    let mut rgb = [0.0f32; 3];
    for row in COEFFICIENTS.iter().rev() {
        for (value, coefficient) in rgb.iter_mut().zip(row) {
            *value = *value * t + coefficient;
        }
    }
    Rgb(rgb.map(|value| (value.clamp(0.0, 1.0) * 255.0).round() as u8))
}

/// Blend `map` over `picture`, draw region boxes and, with a legend, a caption below (the result is then higher than the picture; its width is
/// the same). An empty map (no inference happened) leaves the picture as it is. A region of interest outside the picture is cut off.
pub fn render(picture: &RgbImage, map: &AnomalyMap, view: &View<'_>) -> RgbImage {
    let (width_px, height_px) = picture.dimensions();
    let line = 1 + width_px.max(height_px) / SCALE_STEP_PX;
    let caption = view.legend.map(|legend| Caption::layout(width_px, legend, &view.scale));
    let caption_px = caption.as_ref().map_or(0, |caption| caption.height_px);
    let mut out = RgbImage::from_pixel(width_px, height_px + caption_px, CAPTION_BACKGROUND);
    image::imageops::replace(&mut out, picture, 0, 0);

    let area = Area::new(view.roi, width_px, height_px);
    if let Some(area) = &area {
        blend(&mut out, map, &view.scale, area);
        for region in view.regions {
            outline(&mut out, area, region, view.input_px, line, height_px);
        }
    }
    if let Some(caption) = caption {
        caption.draw(&mut out, height_px);
    }
    out
}

/// The inspected part of the picture, inside it.
struct Area {
    x: u32,
    y: u32,
    width_px: u32,
    height_px: u32,
}

impl Area {
    fn new(roi: Option<Roi>, width_px: u32, height_px: u32) -> Option<Self> {
        let area = match roi {
            None => Self { x: 0, y: 0, width_px, height_px },
            Some(roi) => {
                let x = roi.x_px.min(width_px);
                let y = roi.y_px.min(height_px);
                Self { x, y, width_px: roi.width_px.min(width_px - x), height_px: roi.height_px.min(height_px - y) }
            }
        };
        (area.width_px > 0 && area.height_px > 0).then_some(area)
    }
}

fn blend(out: &mut RgbImage, map: &AnomalyMap, scale: &Scale, area: &Area) {
    let width = area.width_px as usize;
    // A map without values comes back as NaN, which every position and opacity turns into "clear".
    let mut values = vec![0.0; width * area.height_px as usize];
    anomaly::upsample(map, area.height_px as usize, width, &mut values);
    let mut above = vec![false; width];
    for (y, row) in (0u32..).zip(values.chunks_exact(width)) {
        let mut left_above = None;
        for ((x, &value), up_above) in (0u32..).zip(row).zip(above.iter_mut()) {
            let position = scale.position(value);
            let pixel = out.get_pixel_mut(area.x + x, area.y + y);
            // The line where the map crosses the threshold is drawn solid: it says exactly what counts as defective.
            let here = position > 0.5;
            let crossing = (y > 0 && here != *up_above) || left_above.is_some_and(|left| left != here);
            (left_above, *up_above) = (Some(here), here);
            if crossing {
                *pixel = colour(CONTOUR_POSITION);
                continue;
            }
            let alpha = Scale::alpha(position);
            if alpha > 0.0 {
                for (channel, heat) in pixel.0.iter_mut().zip(colour(position).0) {
                    let (below, heat) = (f32::from(*channel), f32::from(heat));
                    *channel = (below + (heat - below) * alpha).round() as u8;
                }
            }
        }
    }
}

/// A box around a region: light inside dark, so that it shows on any part.
fn outline(out: &mut RgbImage, area: &Area, region: &Region, input_px: [usize; 2], line: u32, height_px: u32) {
    let [input_height, input_width] = input_px;
    if input_height == 0 || input_width == 0 {
        return;
    }
    let scale_x = area.width_px as f32 / input_width as f32;
    let scale_y = area.height_px as f32 / input_height as f32;
    let left = area.x + (region.x_px as f32 * scale_x) as u32;
    let top = area.y + (region.y_px as f32 * scale_y) as u32;
    let right = area.x + ((region.x_px + region.width_px) as f32 * scale_x).ceil() as u32;
    let bottom = area.y + ((region.y_px + region.height_px) as f32 * scale_y).ceil() as u32;
    let (right, bottom) = (right.min(out.width()), bottom.min(height_px));
    for (grow, colour) in [(line, BOX_DARK), (0, BOX_LIGHT)] {
        let (left, top) = (left.saturating_sub(grow), top.saturating_sub(grow));
        let (right, bottom) = ((right + grow).min(out.width()), (bottom + grow).min(height_px));
        let (width, height) = (right.saturating_sub(left), bottom.saturating_sub(top));
        let thick = line + grow;
        text::fill(out, left, top, width, thick.min(height), colour);
        text::fill(out, left, bottom.saturating_sub(thick.min(height)), width, thick.min(height), colour);
        text::fill(out, left, top, thick.min(width), height, colour);
        text::fill(out, right.saturating_sub(thick.min(width)), top, thick.min(width), height, colour);
    }
}

/// Text and colour bar under the picture, laid out before the picture is allocated.
struct Caption {
    face: Face,
    scale: u32,
    height_px: u32,
    /// Position inside the caption, text, and whether it is the decision (drawn as a coloured tag).
    words: Vec<(u32, u32, String, Style)>,
    bar: Option<Bar>,
}

#[derive(Clone, Copy)]
enum Style {
    Tag(Rgb<u8>),
    Plain,
    Quiet,
}

struct Bar {
    x: u32,
    y: u32,
    width_px: u32,
    height_px: u32,
}

impl Caption {
    fn layout(width_px: u32, legend: &Legend, scale_of_map: &Scale) -> Self {
        let face = if width_px < SMALL_BELOW_PX { Face::Small } else { Face::Normal };
        let scale = 1 + width_px / SCALE_STEP_PX;
        let (cell_px, row_px) = (face.width_px() * scale, face.height_px() * scale);
        let pad = 4 * scale;
        let gap = 2 * cell_px;

        let (name, tag) = match legend.verdict.decision {
            Decision::Accept => ("ACCEPT", Rgb([30, 120, 60])),
            Decision::Reject => ("REJECT", Rgb([190, 32, 38])),
            Decision::Unknown => ("UNKNOWN", Rgb([180, 105, 0])),
            Decision::Fault => ("FAULT", Rgb([180, 105, 0])),
        };
        let mut words = vec![(format!(" {name} "), Style::Tag(tag))];
        words.push((format!("score {}", number(legend.verdict.score)), Style::Plain));
        words.push((format!("p {}", probability(legend.verdict.p_value)), Style::Plain));
        if let Some(part) = legend.part {
            words.push((format!("part {part}"), Style::Quiet));
        }
        if let Some(product) = &legend.product {
            words.push((product.clone(), Style::Quiet));
        }
        let limit = format!("limit {}", number(scale_of_map.threshold));

        // Words flow like text; the colour bar with its label comes last.
        let (mut x, mut y) = (pad, pad);
        let mut placed = Vec::with_capacity(words.len() + 1);
        for (word, style) in words {
            let wide = word.chars().count() as u32 * cell_px;
            if x > pad && x + wide + pad > width_px {
                (x, y) = (pad, y + row_px + pad);
            }
            placed.push((x, y, word, style));
            x += wide + gap;
        }
        let label = limit.chars().count() as u32 * cell_px;
        let bar_px = 12 * cell_px;
        let wide = bar_px + cell_px + label;
        let bar = (wide + 2 * pad <= width_px).then(|| {
            if x > pad && x + wide + pad > width_px {
                (x, y) = (pad, y + row_px + pad);
            } else {
                // At the right edge, so that bars line up from picture to picture.
                x = x.max(width_px - pad - wide);
            }
            placed.push((x + bar_px + cell_px, y, limit, Style::Quiet));
            Bar { x, y: y + row_px / 4, width_px: bar_px, height_px: row_px / 2 }
        });
        Self { face, scale, height_px: y + row_px + pad, words: placed, bar }
    }

    fn draw(&self, out: &mut RgbImage, top: u32) {
        for (x, y, word, style) in &self.words {
            let colour = match style {
                Style::Tag(background) => {
                    let wide = word.chars().count() as u32 * self.face.width_px() * self.scale;
                    text::fill(out, *x, top + y, wide, self.face.height_px() * self.scale, *background);
                    BOX_LIGHT
                }
                Style::Plain => CAPTION_TEXT,
                Style::Quiet => CAPTION_QUIET,
            };
            text::draw(out, self.face, self.scale, (*x, top + y), word, colour);
        }
        if let Some(bar) = &self.bar {
            for column in 0..bar.width_px {
                let position = column as f32 / (bar.width_px - 1).max(1) as f32;
                text::fill(out, bar.x + column, top + bar.y, 1, bar.height_px, colour(position));
            }
            // The tick of the threshold, in the middle by definition of the scale.
            let tick = bar.x + bar.width_px / 2;
            let over = 3 * self.scale;
            text::fill(out, tick, top + bar.y - over, self.scale, bar.height_px + 2 * over, BOX_LIGHT);
        }
    }
}

/// Three significant digits, and a dash for what is not a number.
fn number(value: f32) -> String {
    match value.abs() {
        _ if !value.is_finite() => "-".into(),
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 0.1 || size == 0.0 => format!("{value:.2}"),
        _ => format!("{value:.1e}"),
    }
}

fn probability(value: f32) -> String {
    match value {
        _ if !value.is_finite() => "-".into(),
        value if value >= 0.001 => format!("{value:.3}"),
        value => format!("{value:.0e}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::verdict::Reason;
    use proptest::prelude::*;

    fn legend() -> Legend {
        let verdict = Verdict { decision: Decision::Reject, reason: Reason::Anomalous, score: 4.2, p_value: 0.0004 };
        Legend { verdict, part: Some(PartId(42)), product: Some("metal".into()) }
    }

    #[test]
    fn colours_are_those_of_inferno() {
        // From matplotlib's table.
        for (position, want) in
            [(0.0, [0, 0, 4]), (0.25, [87, 16, 110]), (0.5, [188, 55, 84]), (0.75, [249, 142, 9]), (1.0, [252, 255, 164])]
        {
            for (got, want) in colour(position).0.iter().zip(want) {
                assert!(i32::from(*got).abs_diff(want) <= 8, "{position}: {:?} is not {want}", colour(position));
            }
        }
    }

    #[test]
    fn the_threshold_has_the_same_colour_in_every_picture() {
        for (normal, threshold) in [(0.5, 1.0), (2.0, 3.5), (0.0, 80.0)] {
            let scale = Scale::new(normal, threshold);
            assert_eq!(scale.position(threshold), 0.5);
            assert_eq!(scale.position(normal), 0.0);
            assert!(scale.position(threshold * 2.0) > 0.5);
        }
    }

    proptest! {
        #[test]
        fn hotter_is_never_drawn_cooler(normal in -1e3f32..1e3, threshold in -1e3f32..1e3, a in -1e4f32..1e4, b in -1e4f32..1e4) {
            let scale = Scale::new(normal, threshold);
            let (low, high) = if a <= b { (a, b) } else { (b, a) };
            prop_assert!(scale.position(low) <= scale.position(high));
            prop_assert!((0.0..=1.0).contains(&scale.position(high)));
            prop_assert!(Scale::alpha(scale.position(low)) <= Scale::alpha(scale.position(high)));
            prop_assert!(Scale::alpha(scale.position(high)) <= ALPHA_MAX);
        }
    }

    #[test]
    fn numbers_that_are_none_can_be_drawn() {
        for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -1.0] {
            let scale = Scale::new(odd, odd);
            assert!(scale.position(odd).is_finite() || odd.is_nan());
            let map = AnomalyMap { grid_rows: 2, grid_cols: 2, values: vec![odd; 4] };
            let view = View { roi: None, input_px: [8, 8], scale, regions: &[], legend: None };
            assert_eq!(render(&RgbImage::new(8, 8), &map, &view).dimensions(), (8, 8));
        }
    }

    #[test]
    fn a_normal_part_is_left_as_it_is() {
        let picture = RgbImage::from_fn(32, 32, |x, y| Rgb([x as u8 * 8, y as u8 * 8, 77]));
        let map = AnomalyMap { grid_rows: 4, grid_cols: 4, values: vec![0.4; 16] };
        let view = View { roi: None, input_px: [16, 16], scale: Scale::new(0.5, 1.0), regions: &[], legend: None };
        assert_eq!(render(&picture, &map, &view), picture);
    }

    #[test]
    fn heat_lies_where_the_map_has_it_and_inside_the_region_of_interest() {
        let picture = RgbImage::from_pixel(100, 60, Rgb([90, 90, 90]));
        let mut values = vec![0.0; 16];
        values[0] = 3.0;
        let map = AnomalyMap { grid_rows: 4, grid_cols: 4, values };
        let roi = Some(Roi { x_px: 50, y_px: 20, width_px: 40, height_px: 40 });
        let view = View { roi, input_px: [16, 16], scale: Scale::new(0.5, 1.0), regions: &[], legend: None };
        let out = render(&picture, &map, &view);
        assert_ne!(out.get_pixel(50, 20), picture.get_pixel(50, 20));
        for (x, y) in [(49, 20), (50, 19), (0, 0), (89, 59), (99, 59)] {
            assert_eq!(out.get_pixel(x, y), picture.get_pixel(x, y), "({x}, {y})");
        }
    }

    #[test]
    fn any_geometry_is_drawn_without_panic() {
        let regions = [
            Region { x_px: 0, y_px: 0, width_px: 400, height_px: 400, peak: 2.0 },
            Region { x_px: 15, y_px: 15, width_px: 1, height_px: 1, peak: 2.0 },
        ];
        let legend = legend();
        for (width, height) in [(1, 1), (3, 50), (64, 64), (300, 200), (640, 480), (2000, 30)] {
            for roi in [
                None,
                Some(Roi { x_px: 5, y_px: 5, width_px: 100_000, height_px: 1 }),
                Some(Roi { x_px: 9_000, y_px: 0, width_px: 1, height_px: 1 }),
            ] {
                for grid in [0, 1, 14] {
                    let map = AnomalyMap { grid_rows: grid, grid_cols: grid, values: vec![2.0; grid * grid] };
                    let view = View { roi, input_px: [16, 16], scale: Scale::new(0.5, 1.0), regions: &regions, legend: Some(&legend) };
                    let out = render(&RgbImage::new(width, height), &map, &view);
                    assert_eq!(out.width(), width);
                    assert!(out.height() > height);
                }
            }
        }
    }
}
