//! AUROC, average precision, F1-max, AUPRO, and what one calibrated threshold does. Pure: scores and labels in, figures out.
//!
//! Definitions are scikit-learn's (`roc_auc_score`, `average_precision_score`, `precision_recall_curve`) and, for AUPRO, MVTec-AD's (mean
//! per-region overlap against false-positive rate, 8-connected regions, integrated up to a limit, normalised by it). Figures are fractions
//! from 0 to 1 and exact up to rounding: every distinct score is a threshold, nothing is binned; a part is called defective when its score
//! is at or above the threshold. A figure that is undefined (one class is missing) is `None`, never a number.
//!
//! A NaN score counts as the highest of all, since that is what the line does with it: [`crate::verdict::decide`] rejects the part.

use crate::eval::regions;

/// AUPRO's integration limit on the false-positive rate (Bergmann et al., "The MVTec Anomaly Detection Dataset", IJCV 2021).
pub const AUPRO_LIMIT: f64 = 0.3;

/// One picture's score and truth.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scored {
    /// Image score; higher is more anomalous.
    pub score: f32,
    /// Truth.
    pub defective: bool,
}

/// Best F1 over all thresholds.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct F1Max {
    /// The F1 score, 0 to 1.
    pub f1: f64,
    /// The lowest score that is called defective.
    pub threshold: f32,
    /// Share of what is called defective that is.
    pub precision: f64,
    /// Share of the defective that is called so.
    pub recall: f64,
}

/// A point of a ROC curve.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RocPoint {
    /// Share of the good called defective.
    pub false_positive_rate: f64,
    /// Share of the defective called defective.
    pub true_positive_rate: f64,
}

/// What a set of pictures comes to, over all thresholds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ImageMetrics {
    /// Area under the ROC curve, ties counted half.
    pub auroc: Option<f64>,
    /// Average precision (area under the precision-recall steps).
    pub average_precision: Option<f64>,
    /// Best F1; `None` without a defective picture.
    pub f1_max: Option<F1Max>,
}

/// What the pixels of a set of pictures come to, over all thresholds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PixelMetrics {
    /// Area under the ROC curve over all pixels, ties counted half.
    pub auroc: Option<f64>,
    /// Average precision over all pixels.
    pub average_precision: Option<f64>,
    /// Best F1 over all pixels.
    pub f1_max: Option<F1Max>,
    /// Area under the per-region overlap up to [`AUPRO_LIMIT`], normalised by it.
    pub aupro: Option<f64>,
}

/// What one given threshold does: the line's own decision.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Confusion {
    /// Defective parts rejected.
    pub true_rejects: u64,
    /// Good parts rejected.
    pub false_rejects: u64,
    /// Good parts accepted.
    pub true_accepts: u64,
    /// Defective parts accepted.
    pub false_accepts: u64,
}

impl Confusion {
    /// Count one part.
    pub fn add(&mut self, defective: bool, rejected: bool) {
        let count = match (defective, rejected) {
            (true, true) => &mut self.true_rejects,
            (false, true) => &mut self.false_rejects,
            (false, false) => &mut self.true_accepts,
            (true, false) => &mut self.false_accepts,
        };
        *count += 1;
    }

    /// Share of the good parts that is rejected; `None` without good parts.
    pub fn false_reject_rate(&self) -> Option<f64> {
        ratio(self.false_rejects, self.false_rejects + self.true_accepts)
    }

    /// Share of the defective parts that is rejected; `None` without defective parts.
    pub fn recall(&self) -> Option<f64> {
        ratio(self.true_rejects, self.true_rejects + self.false_accepts)
    }
}

fn ratio(part: u64, whole: u64) -> Option<f64> {
    (whole > 0).then(|| part as f64 / whole as f64)
}

/// A score as an integer that sorts like it: -inf lowest, NaN (of any sign) above +inf, -0 equal to +0.
fn key_from_score(score: f32) -> u32 {
    if score.is_nan() {
        return u32::MAX;
    }
    // -0.0 + 0.0 is +0.0.
    let bits = (score + 0.0).to_bits();
    if bits >> 31 == 1 { !bits } else { bits | 1 << 31 }
}

/// The inverse of [`key_from_score`]; the highest key is NaN.
fn score_from_key(key: u32) -> f32 {
    if key == u32::MAX {
        return f32::NAN;
    }
    f32::from_bits(if key >> 31 == 1 { key & !(1 << 31) } else { !key })
}

/// All image-level figures. Order of `images` does not matter.
pub fn image_metrics(images: &[Scored]) -> ImageMetrics {
    let sweep = image_sweep(images);
    ImageMetrics { auroc: sweep.auroc(), average_precision: sweep.average_precision(), f1_max: sweep.f1_max() }
}

/// The ROC curve, from (0, 0) to (1, 1), a point for every distinct score; empty when a class is missing.
pub fn roc_curve(images: &[Scored]) -> Vec<RocPoint> {
    let sweep = image_sweep(images);
    if sweep.negatives == 0 || sweep.positives == 0 {
        return Vec::new();
    }
    let mut points = vec![RocPoint { false_positive_rate: 0.0, true_positive_rate: 0.0 }];
    points.extend(sweep.steps.iter().map(|step| RocPoint {
        false_positive_rate: step.false_positives as f64 / sweep.negatives as f64,
        true_positive_rate: step.true_positives as f64 / sweep.positives as f64,
    }));
    points
}

fn image_sweep(images: &[Scored]) -> StoredSweep {
    let keys = |defective| {
        let mut keys: Vec<u32> = images.iter().filter(|i| i.defective == defective).map(|i| key_from_score(i.score)).collect();
        keys.sort_unstable();
        keys
    };
    let (positives, negatives) = (keys(true), keys(false));
    let mut steps = Vec::new();
    descend(&positives, |key| *key, &negatives, |step, _| steps.push(step));
    StoredSweep { steps, positives: positives.len() as u64, negatives: negatives.len() as u64 }
}

/// The state after lowering the threshold to one more distinct score.
#[derive(Clone, Copy)]
struct Step {
    key: u32,
    true_positives: u64,
    false_positives: u64,
}

/// Lower the threshold through all distinct scores, highest first. Both slices ascend by key. `visit` gets the counts at each step and
/// the positives that it added.
fn descend<P>(positives: &[P], key_of: impl Fn(&P) -> u32, negatives: &[u32], mut visit: impl FnMut(Step, &[P])) {
    let (mut p, mut n) = (positives.len(), negatives.len());
    loop {
        let highest = |p: usize| p.checked_sub(1).and_then(|i| positives.get(i)).map(&key_of);
        let key = match (highest(p), n.checked_sub(1).and_then(|i| negatives.get(i))) {
            (Some(a), Some(&b)) => a.max(b),
            (Some(a), None) => a,
            (None, Some(&b)) => b,
            (None, None) => return,
        };
        let p_before = p;
        while highest(p) == Some(key) {
            p -= 1;
        }
        while n > 0 && negatives.get(n - 1) == Some(&key) {
            n -= 1;
        }
        let step = Step { key, true_positives: (positives.len() - p) as u64, false_positives: (negatives.len() - n) as u64 };
        visit(step, positives.get(p..p_before).unwrap_or_default());
    }
}

/// Running figures of a descent: constant memory, whatever the number of scores.
struct Figures {
    positives: u64,
    negatives: u64,
    last: Step,
    /// Twice the number of (positive, negative) pairs in the right order, ties counted once: integer, hence exact.
    twice_pairs: u128,
    average_precision: f64,
    best: Option<(f64, Step)>,
}

impl Figures {
    fn new(positives: u64, negatives: u64) -> Self {
        let last = Step { key: u32::MAX, true_positives: 0, false_positives: 0 };
        Self { positives, negatives, last, twice_pairs: 0, average_precision: 0.0, best: None }
    }

    fn step(&mut self, step: Step) {
        let new_false = step.false_positives - self.last.false_positives;
        let new_true = step.true_positives - self.last.true_positives;
        self.twice_pairs += u128::from(new_false) * u128::from(step.true_positives + self.last.true_positives);
        if self.positives > 0 {
            let called = step.true_positives + step.false_positives;
            self.average_precision += step.true_positives as f64 / called as f64 * (new_true as f64 / self.positives as f64);
            // 2PR / (P + R) without its 0/0: 2 TP / (2 TP + FP + FN), and FN + TP is all positives.
            let f1 = 2.0 * step.true_positives as f64 / (called + self.positives) as f64;
            // `>=`: of equal F1 the lowest threshold, as numpy's argmax over ascending thresholds has it.
            if self.best.is_none_or(|(best, _)| f1 >= best) {
                self.best = Some((f1, step));
            }
        }
        self.last = step;
    }

    fn auroc(&self) -> Option<f64> {
        let pairs = u128::from(self.positives) * u128::from(self.negatives);
        (pairs > 0).then(|| self.twice_pairs as f64 / (2.0 * pairs as f64))
    }

    fn average_precision(&self) -> Option<f64> {
        (self.positives > 0).then_some(self.average_precision)
    }

    fn f1_max(&self) -> Option<F1Max> {
        let (f1, step) = self.best?;
        Some(F1Max {
            f1,
            threshold: score_from_key(step.key),
            precision: ratio(step.true_positives, step.true_positives + step.false_positives)?,
            recall: ratio(step.true_positives, self.positives)?,
        })
    }
}

struct StoredSweep {
    steps: Vec<Step>,
    positives: u64,
    negatives: u64,
}

impl StoredSweep {
    fn figures(&self) -> Figures {
        let mut figures = Figures::new(self.positives, self.negatives);
        self.steps.iter().for_each(|step| figures.step(*step));
        figures
    }
    fn auroc(&self) -> Option<f64> {
        self.figures().auroc()
    }
    fn average_precision(&self) -> Option<f64> {
        self.figures().average_precision()
    }
    fn f1_max(&self) -> Option<F1Max> {
        self.figures().f1_max()
    }
}

/// A defect pixel: its score's key and its region.
#[derive(Clone, Copy)]
struct DefectPixel {
    key: u32,
    region: u32,
}

/// Pixel scores of a set of pictures. Holds 4 bytes for a good pixel and 8 for a defective one, and sorts in place: 600 maps of 256x256
/// are 160 MB.
#[derive(Default)]
pub struct PixelScores {
    good: Vec<u32>,
    defective: Vec<DefectPixel>,
    region_px: Vec<u32>,
    labels: Vec<u32>,
}

/// A map and its mask do not belong together.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("map of {map_px} values and mask of {mask_px} do not both cover {width}x{height} pixels")]
pub struct SizeMismatch {
    /// Values in the map.
    pub map_px: usize,
    /// Values in the mask.
    pub mask_px: usize,
    /// Width asked for.
    pub width: usize,
    /// Height asked for.
    pub height: usize,
}

impl PixelScores {
    /// Nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Add a picture: its map `[height, width]`, row-major, and its mask in the same layout (anything but 0 is defect); no mask for a
    /// good picture.
    ///
    /// # Errors
    /// When map or mask are not `width * height` long; nothing is added then.
    pub fn push(&mut self, map: &[f32], mask: Option<&[u8]>, width: usize, height: usize) -> Result<(), SizeMismatch> {
        let mask_px = mask.map_or(map.len(), <[u8]>::len);
        let area = width.checked_mul(height);
        if area != Some(map.len()) || area != Some(mask_px) {
            return Err(SizeMismatch { map_px: map.len(), mask_px, width, height });
        }
        let Some(mask) = mask else {
            self.good.extend(map.iter().map(|&score| key_from_score(score)));
            return Ok(());
        };
        let first = self.region_px.len() as u32;
        let count = regions::label(mask, width, height, &mut self.labels);
        self.region_px.resize(self.region_px.len() + count as usize, 0);
        for (&score, &label) in map.iter().zip(&self.labels) {
            let key = key_from_score(score);
            match label.checked_sub(1) {
                None => self.good.push(key),
                Some(index) => {
                    let region = first + index;
                    self.defective.push(DefectPixel { key, region });
                    if let Some(px) = self.region_px.get_mut(region as usize) {
                        *px += 1;
                    }
                }
            }
        }
        Ok(())
    }

    /// Move everything out of `other` into this set: pooling, with one threshold for all.
    pub fn append(&mut self, other: &mut Self) {
        let first = self.region_px.len() as u32;
        self.good.append(&mut other.good);
        self.defective.extend(other.defective.drain(..).map(|pixel| DefectPixel { region: pixel.region + first, ..pixel }));
        self.region_px.append(&mut other.region_px);
    }

    /// Number of pixels, good and defective.
    pub fn len(&self) -> usize {
        self.good.len() + self.defective.len()
    }

    /// Whether there are no pixels at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of defect regions.
    pub fn regions(&self) -> usize {
        self.region_px.len()
    }

    /// All pixel-level figures. Sorts the pixels in place (their order carries no meaning).
    pub fn metrics(&mut self) -> PixelMetrics {
        self.good.sort_unstable();
        // By region too, so that sums are formed in one order whatever the sort does with equal keys.
        self.defective.sort_unstable_by_key(|pixel| (pixel.key, pixel.region));
        let mut figures = Figures::new(self.defective.len() as u64, self.good.len() as u64);
        let mut overlap = Overlap::new(&self.region_px, self.good.len() as u64);
        descend(
            &self.defective,
            |pixel| pixel.key,
            &self.good,
            |step, added| {
                figures.step(step);
                overlap.step(step, added);
            },
        );
        PixelMetrics {
            auroc: figures.auroc(),
            average_precision: figures.average_precision(),
            f1_max: figures.f1_max(),
            aupro: overlap.aupro(),
        }
    }
}

/// The curve of mean per-region overlap against false-positive rate, integrated on the way by trapezoids up to the limit.
struct Overlap<'a> {
    region_px: &'a [u32],
    negatives: u64,
    last_rate: f64,
    last_overlap: f64,
    area: f64,
}

impl<'a> Overlap<'a> {
    fn new(region_px: &'a [u32], negatives: u64) -> Self {
        Self { region_px, negatives, last_rate: 0.0, last_overlap: 0.0, area: 0.0 }
    }

    fn step(&mut self, step: Step, added: &[DefectPixel]) {
        if self.negatives == 0 || self.region_px.is_empty() {
            return;
        }
        let gain: f64 = added.iter().filter_map(|p| self.region_px.get(p.region as usize)).map(|&px| 1.0 / f64::from(px)).sum();
        let rate = step.false_positives as f64 / self.negatives as f64;
        let overlap = self.last_overlap + gain / self.region_px.len() as f64;
        let (from, to) = (self.last_rate, rate.min(AUPRO_LIMIT));
        if to > from {
            // Beyond the limit the curve is cut where it crosses it, by linear interpolation, as MVTec's own evaluation does.
            let at_end = self.last_overlap + (overlap - self.last_overlap) * (to - from) / (rate - from);
            self.area += (to - from) * (self.last_overlap + at_end) / 2.0;
        }
        self.last_rate = rate;
        self.last_overlap = overlap;
    }

    fn aupro(&self) -> Option<f64> {
        // Rounding of the running sum may end a hair above 1.
        (self.negatives > 0 && !self.region_px.is_empty()).then(|| (self.area / AUPRO_LIMIT).clamp(0.0, 1.0))
    }
}

/// Mean over what is defined; `None` when nothing is.
pub fn mean(values: impl IntoIterator<Item = Option<f64>>) -> Option<f64> {
    let (mut sum, mut count) = (0.0, 0u64);
    for value in values.into_iter().flatten() {
        sum += value;
        count += 1;
    }
    (count > 0).then(|| sum / count as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn scored(good: &[f32], defective: &[f32]) -> Vec<Scored> {
        let of = |scores: &[f32], defective| scores.iter().map(|&score| Scored { score, defective }).collect::<Vec<_>>();
        [of(good, false), of(defective, true)].concat()
    }

    #[test]
    fn keys_sort_like_scores_and_come_back() {
        let ascending = [f32::NEG_INFINITY, f32::MIN, -1.0, -f32::MIN_POSITIVE, 0.0, 1e-40, 1.0, f32::MAX, f32::INFINITY];
        assert!(ascending.windows(2).all(|pair| key_from_score(pair[0]) < key_from_score(pair[1])));
        assert!(ascending.iter().all(|&score| score_from_key(key_from_score(score)) == score));
        assert_eq!(key_from_score(-0.0), key_from_score(0.0));
        assert!(key_from_score(-f32::NAN) > key_from_score(f32::INFINITY));
        assert!(score_from_key(key_from_score(f32::NAN)).is_nan());
    }

    #[test]
    fn one_class_alone_has_no_auroc() {
        let good = image_metrics(&scored(&[1.0, 2.0], &[]));
        assert_eq!(good, ImageMetrics::default());
        let defective = image_metrics(&scored(&[], &[1.0]));
        assert_eq!(defective.auroc, None);
        assert_eq!(defective.f1_max.map(|f| f.f1), Some(1.0));
        assert_eq!(image_metrics(&[]), ImageMetrics::default());
        assert!(roc_curve(&scored(&[1.0], &[])).is_empty());
    }

    #[test]
    fn a_part_whose_score_is_nan_counts_as_rejected_first() {
        let metrics = image_metrics(&scored(&[1.0, f32::INFINITY], &[f32::NAN]));
        assert_eq!(metrics.auroc, Some(1.0));
        assert_eq!(image_metrics(&scored(&[f32::NAN], &[5.0])).auroc, Some(0.0));
    }

    #[test]
    fn ties_count_half() {
        assert_eq!(image_metrics(&scored(&[1.0, 1.0], &[1.0])).auroc, Some(0.5));
    }

    #[test]
    fn of_equal_f1_the_lowest_threshold_wins() {
        // At 3: TP 1 of 2, F1 2/3. At 2 and 1 also a good one: F1 2/4, then TP 2, FP 2: 4/6.
        let best = image_metrics(&scored(&[2.0, 1.5], &[3.0, 1.0])).f1_max.expect("there are defects");
        assert_eq!((best.f1, best.threshold, best.recall), (2.0 / 3.0, 1.0, 1.0));
    }

    #[test]
    fn pictures_without_masks_have_no_pixel_figures() {
        let mut pixels = PixelScores::new();
        pixels.push(&[0.1, 0.2], None, 2, 1).expect("sizes fit");
        assert_eq!(pixels.metrics(), PixelMetrics::default());
        assert_eq!(PixelScores::new().metrics(), PixelMetrics::default());
    }

    #[test]
    fn maps_and_masks_of_other_sizes_are_refused() {
        let mut pixels = PixelScores::new();
        assert!(pixels.push(&[0.0; 4], Some(&[0; 3]), 2, 2).is_err());
        assert!(pixels.push(&[0.0; 3], None, 2, 2).is_err());
        assert!(pixels.push(&[0.0; 3], None, usize::MAX, 2).is_err());
        assert!(pixels.is_empty());
    }

    #[test]
    fn aupro_weighs_small_and_large_regions_alike() {
        // The small region is found before any good pixel, the large one never before all of them: overlap stays at one half.
        let mut pixels = PixelScores::new();
        let map = [9.0, 5.0, 4.0, 3.0, 0.0, 0.0, 0.0, 0.0];
        let mask = [1, 0, 0, 0, 1, 1, 1, 1];
        pixels.push(&map, Some(&mask), 8, 1).expect("sizes fit");
        assert_eq!(pixels.regions(), 2);
        assert!((pixels.metrics().aupro.expect("regions exist") - 0.5).abs() < 1e-12);
    }

    #[test]
    fn a_perfect_map_has_an_aupro_of_one() {
        let mut pixels = PixelScores::new();
        pixels.push(&[1.0, 0.2, 0.1, 1.0], Some(&[1, 0, 0, 1]), 4, 1).expect("sizes fit");
        assert_eq!(pixels.metrics().aupro, Some(1.0));
        assert_eq!(pixels.metrics().auroc, Some(1.0));
    }

    #[test]
    fn means_skip_what_is_undefined() {
        assert_eq!(mean([Some(1.0), None, Some(0.0)]), Some(0.5));
        assert_eq!(mean([None]), None);
    }

    #[test]
    fn one_threshold_counts_both_errors() {
        let mut confusion = Confusion::default();
        for (defective, rejected) in [(true, true), (true, false), (false, true), (false, false), (false, false), (false, false)] {
            confusion.add(defective, rejected);
        }
        assert_eq!(confusion.false_reject_rate(), Some(0.25));
        assert_eq!(confusion.recall(), Some(0.5));
        assert_eq!(Confusion::default().recall(), None);
    }

    /// The definitions, word for word and quadratic.
    mod oracle {
        use super::*;

        pub fn auroc(images: &[Scored]) -> Option<f64> {
            let (mut wins, mut pairs) = (0.0, 0.0);
            for bad in images.iter().filter(|i| i.defective) {
                for good in images.iter().filter(|i| !i.defective) {
                    pairs += 1.0;
                    wins += if bad.score > good.score { 1.0 } else { f64::from(u8::from(bad.score == good.score)) / 2.0 };
                }
            }
            (pairs > 0.0).then_some(wins / pairs)
        }

        pub fn f1_max(images: &[Scored]) -> Option<f64> {
            let positives = images.iter().filter(|i| i.defective).count() as f64;
            let f1 = |threshold: f32| {
                let called = images.iter().filter(|i| i.score >= threshold).count() as f64;
                let hits = images.iter().filter(|i| i.score >= threshold && i.defective).count() as f64;
                2.0 * hits / (called + positives)
            };
            (positives > 0.0).then(|| images.iter().map(|i| f1(i.score)).fold(0.0, f64::max))
        }

        pub fn aupro(maps: &[Vec<f32>], masks: &[Vec<u8>], width: usize, height: usize) -> Option<f64> {
            let mut thresholds: Vec<f32> = maps.concat();
            thresholds.sort_by(|a, b| b.total_cmp(a));
            thresholds.dedup();
            let negatives = masks.iter().flatten().filter(|&&m| m == 0).count() as f64;
            let mut points = vec![(0.0, 0.0)];
            for &threshold in &thresholds {
                let (mut false_positives, mut overlaps, mut count) = (0.0, 0.0, 0.0);
                for (map, mask) in maps.iter().zip(masks) {
                    let mut labels = Vec::new();
                    let regions = regions::label(mask, width, height, &mut labels);
                    for region in 1..=regions {
                        let inside: Vec<f32> = map.iter().zip(&labels).filter(|(_, l)| **l == region).map(|(s, _)| *s).collect();
                        overlaps += inside.iter().filter(|s| **s >= threshold).count() as f64 / inside.len() as f64;
                        count += 1.0;
                    }
                    false_positives += map.iter().zip(mask).filter(|(s, m)| **m == 0 && **s >= threshold).count() as f64;
                }
                if negatives == 0.0 || count == 0.0 {
                    return None;
                }
                points.push((false_positives / negatives, overlaps / count));
            }
            let mut area = 0.0;
            for pair in points.windows(2) {
                let ((x0, y0), (x1, y1)) = (pair[0], pair[1]);
                if x0 < AUPRO_LIMIT && x1 > x0 {
                    let x = x1.min(AUPRO_LIMIT);
                    area += (x - x0) * (y0 + y0 + (y1 - y0) * (x - x0) / (x1 - x0)) / 2.0;
                }
            }
            Some(area / AUPRO_LIMIT)
        }
    }

    fn close(a: Option<f64>, b: Option<f64>) -> bool {
        match (a, b) {
            (Some(a), Some(b)) => (a - b).abs() < 1e-9,
            (None, None) => true,
            _ => false,
        }
    }

    proptest! {
        #[test]
        fn image_figures_equal_the_definitions(raw in prop::collection::vec((-4i8..12, any::<bool>()), 0..60)) {
            // Few distinct scores, so that ties are the rule.
            let images: Vec<Scored> = raw.iter().map(|&(s, defective)| Scored { score: f32::from(s) / 4.0, defective }).collect();
            let metrics = image_metrics(&images);
            prop_assert!(close(metrics.auroc, oracle::auroc(&images)));
            prop_assert!(close(metrics.f1_max.map(|f| f.f1), oracle::f1_max(&images)));
            if let Some(best) = metrics.f1_max {
                let called = images.iter().filter(|i| i.score >= best.threshold).count() as f64;
                let hits = images.iter().filter(|i| i.score >= best.threshold && i.defective).count() as f64;
                prop_assert!(close(Some(best.precision), Some(hits / called)));
            }
            let curve = roc_curve(&images);
            let area: f64 = curve.windows(2).map(|p| (p[1].false_positive_rate - p[0].false_positive_rate) * (p[0].true_positive_rate + p[1].true_positive_rate) / 2.0).sum();
            prop_assert!(metrics.auroc.is_none() || close(Some(area), metrics.auroc));
        }

        #[test]
        fn pixel_figures_equal_the_definitions(
            raw in prop::collection::vec(prop::collection::vec((0u8..20, 0u8..4), 30), 1..4),
        ) {
            let maps: Vec<Vec<f32>> = raw.iter().map(|m| m.iter().map(|p| f32::from(p.0) * 0.5).collect()).collect();
            let masks: Vec<Vec<u8>> = raw.iter().map(|m| m.iter().map(|p| u8::from(p.1 == 0) * 255).collect()).collect();
            let mut whole = PixelScores::new();
            let mut pooled = PixelScores::new();
            for (map, mask) in maps.iter().zip(&masks) {
                whole.push(map, Some(mask), 6, 5).expect("sizes fit");
                let mut one = PixelScores::new();
                one.push(map, Some(mask), 6, 5).expect("sizes fit");
                pooled.append(&mut one);
            }
            let flat: Vec<Scored> = maps.concat().iter().zip(masks.concat()).map(|(&score, m)| Scored { score, defective: m != 0 }).collect();
            let metrics = whole.metrics();
            prop_assert!(close(metrics.auroc, oracle::auroc(&flat)));
            prop_assert!(close(metrics.aupro, oracle::aupro(&maps, &masks, 6, 5)));
            prop_assert_eq!(pooled.metrics(), metrics);
        }

        #[test]
        fn figures_do_not_depend_on_order_or_scale(raw in prop::collection::vec((0u16..500, any::<bool>()), 1..50)) {
            let images: Vec<Scored> = raw.iter().map(|&(s, defective)| Scored { score: f32::from(s), defective }).collect();
            let turned: Vec<Scored> = images.iter().rev().map(|i| Scored { score: i.score * 4.0 - 100.0, ..*i }).collect();
            let (a, b) = (image_metrics(&images), image_metrics(&turned));
            prop_assert_eq!(a.auroc, b.auroc);
            prop_assert_eq!(a.f1_max.map(|f| f.f1), b.f1_max.map(|f| f.f1));
            prop_assert!(close(a.average_precision, b.average_precision));
        }
    }
}
