//! Inspects the pictures of a data set on several threads; results come out in data-set order.

use crate::anomaly::{AnomalyMap, upsample};
use crate::calibration::Calibration;
use crate::eval::summary::{Evaluation, Summariser};
use crate::verdict::{self, Decision, Policy};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// One labelled picture.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// Product.
    pub category: String,
    /// The picture.
    pub path: PathBuf,
    /// Name of the defect; `None` for a good part.
    pub defect: Option<String>,
    /// Mask of the defect, if there is one.
    pub mask: Option<PathBuf>,
}

/// Scores pictures; one per thread.
pub trait Inspector {
    /// The anomaly map of the picture into `map`; returns the image score.
    ///
    /// # Errors
    /// See [`InspectError`].
    fn inspect(&mut self, picture: &Path, map: &mut AnomalyMap) -> Result<f32, InspectError>;
}

/// Why a picture got no score.
#[derive(Debug, thiserror::Error)]
pub enum InspectError {
    /// The picture cannot be used; the evaluation goes on without it and says so.
    #[error("{0}")]
    Picture(String),
    /// The model failed; the evaluation ends.
    #[error("{0}")]
    Model(String),
}

/// Why an evaluation ended without figures.
#[derive(Debug, thiserror::Error)]
pub enum EvalError {
    /// The model failed on a picture.
    #[error("the model failed on {}: {why}", path.display())]
    Model {
        /// The picture.
        path: PathBuf,
        /// The model's own words.
        why: String,
    },
    /// No picture could be used.
    #[error("none of the {count} pictures can be used; the first: {first}")]
    NoPictures {
        /// Pictures tried.
        count: usize,
        /// What was wrong with the first.
        first: String,
    },
    /// The data set has no test pictures.
    #[error("no test pictures: expected MVTec-AD layout, `<category>/test/good` and `<category>/test/<defect>`")]
    Empty,
    /// A thread ended early.
    #[error("an inspection thread ended early (a defect in cull): {0}")]
    Thread(String),
}

/// What is the same for all pictures.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Threads, each with its own inspector.
    pub threads: usize,
    /// Height and width of the model's input, in pixels: the resolution of pixel figures.
    pub input_px: [usize; 2],
    /// The bundle's calibration.
    pub calibration: Calibration,
    /// The line's threshold.
    pub policy: Policy,
}

/// A picture with its score.
#[derive(Clone, Debug)]
pub struct Judged {
    /// Image score.
    pub score: f32,
    /// Calibrated.
    pub p_value: f32,
    /// What the line would do: anything but accept is a reject.
    pub rejected: bool,
    /// The map on the model's grid.
    pub map: AnomalyMap,
}

/// Results on their way from a thread to the collector.
struct Done {
    judged: Judged,
    /// Map and mask at the model's input resolution, where the category has masks.
    pixels: Option<Pixels>,
    /// A defective picture without a mask in a category that has masks.
    lacks_mask: bool,
}

/// Map and mask of one picture, both `[height, width]` at the model's input resolution.
pub(super) struct Pixels {
    pub map: Vec<f32>,
    pub mask: Option<Vec<u8>>,
}

/// Results that may wait for the collector. Enough that no thread waits for another's slow picture; each holds at most a map.
const QUEUE_PICTURES: usize = 64;

/// Inspect all samples and sum up. `progress` is told the number of pictures done so far.
///
/// Pixel figures are taken at the model's input resolution: maps are upsampled to it (bilinear, align corners), masks resized to it (nearest
/// neighbour). Categories without masks get none.
///
/// # Errors
/// When there is nothing to evaluate, or the model fails on a picture.
pub fn evaluate<I: Inspector>(
    samples: &[Sample],
    settings: &Settings,
    make: impl Fn() -> I + Sync,
    mut progress: impl FnMut(usize),
) -> Result<Evaluation, EvalError> {
    if samples.is_empty() {
        return Err(EvalError::Empty);
    }
    let mut order: Vec<&Sample> = samples.iter().collect();
    // Category by category, so that pixel scores of one category at a time are in memory beside the pooled ones.
    order.sort_by(|a, b| a.category.cmp(&b.category));
    let mut masked_categories: Vec<&str> = order.iter().filter(|s| defect_mask(s).is_some()).map(|s| s.category.as_str()).collect();
    masked_categories.dedup();

    let next = AtomicUsize::new(0);
    let stop = AtomicBool::new(false);
    let (send, receive) = crossbeam_channel::bounded::<(usize, Result<Done, InspectError>)>(QUEUE_PICTURES);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..settings.threads.max(1))
            .map(|_| {
                let (send, order, masked, make, next, stop) = (send.clone(), &order, &masked_categories, &make, &next, &stop);
                scope.spawn(move || {
                    let mut inspector = make();
                    while !stop.load(Ordering::Relaxed) {
                        let index = next.fetch_add(1, Ordering::Relaxed);
                        let Some(sample) = order.get(index) else { return };
                        let done = judge(&mut inspector, sample, settings, masked.contains(&sample.category.as_str()));
                        if send.send((index, done)).is_err() {
                            return;
                        }
                    }
                })
            })
            .collect();
        drop(send);

        let mut summariser = Summariser::new(settings);
        let mut early: BTreeMap<usize, Result<Done, InspectError>> = BTreeMap::new();
        let mut wanted = 0;
        let mut failure = None;
        // Ends when every thread is done (or has ended early) and dropped its sender.
        'all: for (received, (index, done)) in receive.iter().enumerate() {
            progress(received + 1);
            early.insert(index, done);
            while let (Some(done), Some(sample)) = (early.remove(&wanted), order.get(wanted)) {
                wanted += 1;
                match done {
                    Ok(Done { judged, pixels, lacks_mask }) => summariser.add(sample, judged, pixels, lacks_mask),
                    Err(InspectError::Picture(why)) => summariser.skip(sample, why),
                    Err(InspectError::Model(why)) => {
                        failure = Some(EvalError::Model { path: sample.path.clone(), why });
                        break 'all;
                    }
                }
            }
        }
        stop.store(true, Ordering::Relaxed);
        // Threads that wait to send must not wait for ever.
        drop(receive);
        // Joined here, a thread's panic (already printed by the runtime) ends in an error instead of a second panic.
        let ended_early = threads.into_iter().filter_map(|thread| thread.join().err()).count();
        match failure {
            Some(failure) => Err(failure),
            None if ended_early > 0 || wanted < order.len() => {
                Err(EvalError::Thread(format!("{wanted} of {} pictures were inspected", order.len())))
            }
            None => summariser.finish(),
        }
    })
}

/// The mask that counts: a good picture's mask, if a data set has such, says nothing.
fn defect_mask(sample: &Sample) -> Option<&Path> {
    sample.mask.as_deref().filter(|_| sample.defect.is_some())
}

fn judge(inspector: &mut impl Inspector, sample: &Sample, settings: &Settings, with_pixels: bool) -> Result<Done, InspectError> {
    let mut map = AnomalyMap::default();
    let score = inspector.inspect(&sample.path, &mut map)?;
    let p_value = settings.calibration.p_value(score);
    let decision = verdict::decide(&settings.policy, score, p_value).decision;
    // A defective picture without a mask would count its defect as good pixels: it takes no part in pixel figures.
    let lacks_mask = with_pixels && sample.defect.is_some() && sample.mask.is_none();
    let pixels = if with_pixels && !lacks_mask {
        let [height, width] = settings.input_px;
        let mut large = vec![0.0; height * width];
        upsample(&map, height, width, &mut large);
        let mask = defect_mask(sample).map(|path| load_mask(path, width, height)).transpose()?;
        Some(Pixels { map: large, mask })
    } else {
        None
    };
    Ok(Done { judged: Judged { score, p_value, rejected: decision != Decision::Accept, map }, pixels, lacks_mask })
}

/// A mask at `width x height`, nearest neighbour: 255 where the file's value is above half of its highest (so 0/1 and 0/255 both work, and
/// compression noise does not count), else 0.
///
/// # Errors
/// [`InspectError::Picture`] when the file is not a readable picture.
pub fn load_mask(path: &Path, width: usize, height: usize) -> Result<Vec<u8>, InspectError> {
    let picture = image::open(path).map_err(|e| InspectError::Picture(format!("mask {}: {e}", path.display())))?.into_luma8();
    let (from_width, from_height) = (picture.width() as usize, picture.height() as usize);
    let limit = picture.as_raw().iter().max().map_or(0, |max| max / 2);
    let source = picture.as_raw();
    let nearest = |to: usize, size: usize, from_size: usize| ((2 * to + 1) * from_size / (2 * size)).min(from_size.saturating_sub(1));
    let columns: Vec<usize> = (0..width).map(|x| nearest(x, width, from_width)).collect();
    let mut mask = Vec::with_capacity(width * height);
    for y in 0..height {
        let row = nearest(y, height, from_height) * from_width;
        mask.extend(columns.iter().map(|x| if source.get(row + x).is_some_and(|&value| value > limit) { 255 } else { 0 }));
    }
    Ok(mask)
}

/// At most `limit` samples of each category, evenly spread over its list, so that every kind of defect stays in.
pub fn thin(samples: Vec<Sample>, limit: usize) -> Vec<Sample> {
    let mut by_category: BTreeMap<String, Vec<Sample>> = BTreeMap::new();
    for sample in samples {
        by_category.entry(sample.category.clone()).or_default().push(sample);
    }
    by_category
        .into_values()
        .flat_map(|samples| {
            let (count, keep) = (samples.len(), limit.min(samples.len()));
            // Sample i is kept when it is the first of its share.
            samples.into_iter().enumerate().filter(move |(i, _)| keep > 0 && (i * keep) % count < keep).map(|(_, sample)| sample)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(category: &str, name: &str) -> Sample {
        Sample { category: category.into(), path: name.into(), defect: None, mask: None }
    }

    #[test]
    fn thinning_keeps_the_asked_number_spread_over_each_category() {
        let samples: Vec<Sample> = (0..100).map(|i| sample(if i < 30 { "a" } else { "b" }, &i.to_string())).collect();
        for limit in [0, 1, 7, 30, 99] {
            let kept = thin(samples.clone(), limit);
            let count = |category: &str| kept.iter().filter(|s| s.category == category).count();
            assert_eq!((count("a"), count("b")), (limit.min(30), limit.min(70)));
        }
        let spread: Vec<PathBuf> = thin(samples, 3).into_iter().filter(|s| s.category == "a").map(|s| s.path).collect();
        assert_eq!(spread, ["0", "10", "20"].map(PathBuf::from));
    }

    #[test]
    fn masks_are_resized_by_nearest_neighbour_and_0_1_masks_count() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("mask.png");
        image::GrayImage::from_raw(4, 2, vec![0, 0, 1, 1, 0, 0, 1, 1]).expect("4x2").save(&path).expect("writable");
        assert_eq!(load_mask(&path, 2, 1).expect("readable"), [0, 255]);
        assert_eq!(load_mask(&path, 8, 1).expect("readable"), [0, 0, 0, 0, 255, 255, 255, 255]);
        image::GrayImage::from_raw(2, 1, vec![3, 255]).expect("2x1").save(&path).expect("writable");
        assert_eq!(load_mask(&path, 2, 1).expect("readable"), [0, 255]);
        image::GrayImage::from_raw(2, 1, vec![0, 0]).expect("2x1").save(&path).expect("writable");
        assert_eq!(load_mask(&path, 2, 1).expect("readable"), [0, 0]);
        std::fs::write(&path, "no picture").expect("writable");
        assert!(matches!(load_mask(&path, 2, 1), Err(InspectError::Picture(_))));
    }
}
