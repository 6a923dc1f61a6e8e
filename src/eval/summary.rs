//! Figures per category, their mean, and all categories pooled under one threshold.

use crate::eval::metrics::{Confusion, F1Max, ImageMetrics, PixelMetrics, PixelScores, Scored, image_metrics, mean};
use crate::eval::runner::{EvalError, Judged, Pixels, Sample, Settings};
use serde::Serialize;
use std::collections::BTreeMap;

/// Everything an evaluation found.
#[derive(Clone, Debug)]
pub struct Evaluation {
    /// By category, in name order.
    pub categories: BTreeMap<String, Category>,
    /// Mean over the categories that have the figure.
    pub mean: Figures,
    /// All pictures as one set: one threshold for all products.
    pub pooled: Figures,
    /// Best F1 of the pooled set, with the one threshold.
    pub pooled_f1: Option<F1Max>,
    /// What the calibrated threshold does over all pictures.
    pub pooled_confusion: Confusion,
    /// Every picture that got a score, by category and then in data-set order.
    pub images: Vec<(Sample, Judged)>,
    /// Pictures that could not be used.
    pub skipped: Vec<Skipped>,
    /// Defective pictures that took no part in pixel figures: no mask, though their category has masks, or a mask that is empty.
    pub without_mask: usize,
}

/// A picture that could not be used.
#[derive(Clone, Debug, Serialize)]
pub struct Skipped {
    /// Product.
    pub category: String,
    /// The picture.
    pub path: String,
    /// Why.
    pub why: String,
}

/// Figures of a set, fractions from 0 to 1; `None` (JSON null) where undefined.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Figures {
    /// Area under the ROC curve over pictures.
    pub image_auroc: Option<f64>,
    /// Area under the ROC curve over pixels.
    pub pixel_auroc: Option<f64>,
    /// Area under the per-region overlap, limit 0.3.
    pub aupro: Option<f64>,
    /// Best F1 over pictures.
    pub f1_max: Option<f64>,
    /// Average precision over pictures.
    pub image_ap: Option<f64>,
    /// Average precision over pixels.
    pub pixel_ap: Option<f64>,
    /// Best F1 over pixels.
    pub pixel_f1_max: Option<f64>,
    /// Share of good pictures rejected at the calibrated threshold.
    pub false_reject_rate: Option<f64>,
    /// Share of defective pictures rejected at the calibrated threshold.
    pub recall: Option<f64>,
}

impl Figures {
    fn new(images: &ImageMetrics, pixels: &PixelMetrics, confusion: &Confusion) -> Self {
        Self {
            image_auroc: images.auroc,
            pixel_auroc: pixels.auroc,
            aupro: pixels.aupro,
            f1_max: images.f1_max.map(|f| f.f1),
            image_ap: images.average_precision,
            pixel_ap: pixels.average_precision,
            pixel_f1_max: pixels.f1_max.map(|f| f.f1),
            false_reject_rate: confusion.false_reject_rate(),
            recall: confusion.recall(),
        }
    }

    fn mean<'a>(all: impl Iterator<Item = &'a Figures> + Clone) -> Self {
        let of = |field: fn(&Figures) -> Option<f64>| mean(all.clone().map(field));
        Self {
            image_auroc: of(|f| f.image_auroc),
            pixel_auroc: of(|f| f.pixel_auroc),
            aupro: of(|f| f.aupro),
            f1_max: of(|f| f.f1_max),
            image_ap: of(|f| f.image_ap),
            pixel_ap: of(|f| f.pixel_ap),
            pixel_f1_max: of(|f| f.pixel_f1_max),
            false_reject_rate: of(|f| f.false_reject_rate),
            recall: of(|f| f.recall),
        }
    }
}

/// One product.
#[derive(Clone, Debug, Serialize)]
pub struct Category {
    /// Its figures.
    #[serde(flatten)]
    pub figures: Figures,
    /// The score at which F1 is best; `null` without defective pictures.
    pub f1_threshold: Option<f32>,
    /// Good pictures.
    pub good: usize,
    /// Defective pictures.
    pub defective: usize,
    /// Connected defect regions in the masks.
    pub regions: usize,
    /// By kind of defect.
    pub defects: BTreeMap<String, Defect>,
}

/// One kind of defect of one product.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Defect {
    /// Pictures with it.
    pub images: usize,
    /// These against all good pictures of the product.
    pub image_auroc: Option<f64>,
    /// Share rejected at the calibrated threshold.
    pub recall: Option<f64>,
}

/// Takes results in order of category and builds an [`Evaluation`].
pub(super) struct Summariser {
    width: usize,
    height: usize,
    done: Evaluation,
    /// Pixels of the category that is being collected.
    current: PixelScores,
    current_name: Option<String>,
    pooled: PixelScores,
}

impl Summariser {
    pub fn new(settings: &Settings) -> Self {
        let [height, width] = settings.input_px;
        let done = Evaluation {
            categories: BTreeMap::new(),
            mean: Figures::default(),
            pooled: Figures::default(),
            pooled_f1: None,
            pooled_confusion: Confusion::default(),
            images: Vec::new(),
            skipped: Vec::new(),
            without_mask: 0,
        };
        Self { width, height, done, current: PixelScores::new(), current_name: None, pooled: PixelScores::new() }
    }

    pub fn add(&mut self, sample: &Sample, judged: Judged, pixels: Option<Pixels>, lacks_mask: bool) {
        self.done.without_mask += usize::from(lacks_mask);
        self.enter(&sample.category);
        if let Some(Pixels { map, mask }) = pixels {
            let empty = mask.as_ref().is_some_and(|mask| mask.iter().all(|&m| m == 0));
            self.done.without_mask += usize::from(empty);
            // Sizes fit by construction of `Pixels`; if they did not, the picture must not pass for counted.
            if !empty && let Err(why) = self.current.push(&map, mask.as_deref(), self.width, self.height) {
                self.skip(sample, why.to_string());
                return;
            }
        }
        self.done.images.push((sample.clone(), judged));
    }

    fn enter(&mut self, category: &str) {
        if self.current_name.as_deref() != Some(category) {
            self.close_category();
            self.current_name = Some(category.to_owned());
        }
    }

    pub fn skip(&mut self, sample: &Sample, why: String) {
        self.done.skipped.push(Skipped { category: sample.category.clone(), path: sample.path.display().to_string(), why });
    }

    fn close_category(&mut self) {
        let Some(name) = self.current_name.take() else { return };
        let images: Vec<&(Sample, Judged)> = self.done.images.iter().filter(|(s, _)| s.category == name).collect();
        let (scored, confusion) = (scores(&images, |_| true), confusion(&images));
        let figures = image_metrics(&scored);
        let mut defects = BTreeMap::new();
        for (sample, _) in &images {
            let Some(defect) = &sample.defect else { continue };
            defects.entry(defect.clone()).or_insert_with(|| {
                let these: Vec<&(Sample, Judged)> = images.iter().copied().filter(|(s, _)| s.defect.as_ref() == Some(defect)).collect();
                Defect {
                    images: these.len(),
                    image_auroc: image_metrics(&scores(&images, |s| s.defect.is_none() || s.defect.as_ref() == Some(defect))).auroc,
                    recall: self::confusion(&these).recall(),
                }
            });
        }
        let category = Category {
            // Without a single mask there are only good pixels, and no figure is defined.
            figures: Figures::new(&figures, &self.current.metrics(), &confusion),
            f1_threshold: figures.f1_max.map(|f| f.threshold),
            good: scored.iter().filter(|s| !s.defective).count(),
            defective: scored.iter().filter(|s| s.defective).count(),
            regions: self.current.regions(),
            defects,
        };
        self.pooled.append(&mut self.current);
        self.done.categories.insert(name, category);
    }

    pub fn finish(mut self) -> Result<Evaluation, EvalError> {
        self.close_category();
        let mut done = self.done;
        if done.images.is_empty() {
            let first = done.skipped.first().map(|s| s.why.clone()).unwrap_or_default();
            return Err(EvalError::NoPictures { count: done.skipped.len(), first });
        }
        let all: Vec<&(Sample, Judged)> = done.images.iter().collect();
        let figures = image_metrics(&scores(&all, |_| true));
        done.pooled_confusion = confusion(&all);
        done.pooled = Figures::new(&figures, &self.pooled.metrics(), &done.pooled_confusion);
        done.pooled_f1 = figures.f1_max;
        done.mean = Figures::mean(done.categories.values().map(|c| &c.figures));
        Ok(done)
    }
}

/// Scores and labels of the pictures that `which` picks.
pub(super) fn scores(images: &[&(Sample, Judged)], which: impl Fn(&Sample) -> bool) -> Vec<Scored> {
    images.iter().filter(|(s, _)| which(s)).map(|(s, j)| Scored { score: j.score, defective: s.defect.is_some() }).collect()
}

fn confusion(images: &[&(Sample, Judged)]) -> Confusion {
    let mut confusion = Confusion::default();
    images.iter().for_each(|(s, j)| confusion.add(s.defect.is_some(), j.rejected));
    confusion
}

/// What the JSON of an evaluation says besides its figures.
#[derive(Clone, Debug, Serialize)]
pub struct Context {
    /// Name of the bundle.
    pub model: String,
    /// Its digest.
    pub model_sha256: String,
    /// The data set's folder, as given.
    pub data: String,
    /// Height and width at which pixel figures are taken.
    pub pixel_resolution: [usize; 2],
    /// The policy: share of good parts that may be rejected.
    pub false_reject_rate: f32,
    /// The score above which a part is rejected under that policy.
    pub threshold: f32,
}

impl Evaluation {
    /// The contract for scripts: `categories.<name>.{image_auroc, pixel_auroc, aupro, f1_max, …}`, `mean`, `pooled` (fractions from 0 to 1,
    /// null where undefined) and `images[]` with `category`, `path`, `defect`, `score`, `p_value`.
    ///
    /// # Errors
    /// Only when a number cannot be written as JSON, which serde_json does not know.
    pub fn to_json(&self, context: &Context) -> Result<serde_json::Value, serde_json::Error> {
        #[derive(Serialize)]
        struct Image<'a> {
            category: &'a str,
            path: String,
            defect: Option<&'a str>,
            score: f32,
            p_value: f32,
            rejected: bool,
        }
        #[derive(Serialize)]
        struct Pooled {
            #[serde(flatten)]
            figures: Figures,
            f1_threshold: Option<f32>,
        }
        let images: Vec<Image> = self
            .images
            .iter()
            .map(|(s, j)| Image {
                category: &s.category,
                path: s.path.display().to_string(),
                defect: s.defect.as_deref(),
                score: j.score,
                p_value: j.p_value,
                rejected: j.rejected,
            })
            .collect();
        let mut json = serde_json::to_value(context)?;
        let pooled = Pooled { figures: self.pooled, f1_threshold: self.pooled_f1.map(|f| f.threshold) };
        for (key, value) in [
            ("categories", serde_json::to_value(&self.categories)?),
            ("mean", serde_json::to_value(self.mean)?),
            ("pooled", serde_json::to_value(pooled)?),
            ("images", serde_json::to_value(images)?),
            ("skipped", serde_json::to_value(&self.skipped)?),
        ] {
            json[key] = value;
        }
        Ok(json)
    }
}
