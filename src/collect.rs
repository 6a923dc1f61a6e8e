//! Collecting pictures: from a live source for training, or the simulated line written out as a labelled data set.
//!
//! Files appear whole or not at all (written beside, then renamed) and none is replaced unless asked. Knows sources and picture files,
//! nothing of models or verdicts. Not for the hot path.

use crate::dataset;
use crate::frame::{Frame, now_ns};
use crate::pool::Pool;
use crate::preprocess::{Roi, decode_rgb};
use crate::source::simulated::{DefectRange, DefectTruth, HEIGHT_PX, SimulatedLine, WIDTH_PX};
use crate::source::{Grab, Source};
use image::ImageEncoder;
use image::codecs::png::{CompressionType, FilterType, PngEncoder};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// File beside the pictures of an exported simulated line that says what is true of each defective part.
pub const TRUTH_FILE: &str = "truth.json";
/// Part numbers and picture numbers have this many digits, so that plain name order is number order up to a million.
const DIGITS: usize = 6;
/// Longest wait in one call to the source; short, so that a stall is noticed soon after its limit.
const GRAB_WAIT: Duration = Duration::from_millis(200);
/// Failures in a row after which a source is given up: a folder may hold some bad files, a camera may need a few attempts to come back.
const MAX_FAILURES: u32 = 10;
/// Pause after a failure before the source is opened again.
const FAILURE_PAUSE: Duration = Duration::from_millis(200);
/// Pictures per worker below which another worker is not worth making its textures.
const PARTS_PER_WORKER: u32 = 40;

/// Why collecting stopped.
#[derive(Debug, thiserror::Error)]
pub enum CollectError {
    /// A file or folder cannot be written.
    #[error("cannot write {path}: {source}; check space and permissions")]
    Write {
        /// File or folder.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// The folder is in use.
    #[error("{path} already exists: choose another folder for --out, or give --force to replace files of the same name")]
    Exists {
        /// The file in the way.
        path: PathBuf,
    },
    /// A picture cannot be encoded.
    #[error("cannot encode {path} as PNG: {why}")]
    Encode {
        /// File.
        path: PathBuf,
        /// Cause.
        why: String,
    },
    /// The source brought nothing for too long.
    #[error("{what} brought no picture for {seconds:.1} s: check the device with `cull doctor`")]
    Stalled {
        /// The source.
        what: String,
        /// How long.
        seconds: f32,
    },
    /// The source failed too often in a row.
    #[error("gave up after {MAX_FAILURES} failures in a row, the last: {last}")]
    Failing {
        /// The last error.
        last: String,
    },
}

/// What of the simulated line is written out.
#[derive(Clone, Debug)]
pub struct Export {
    /// Folder; made when missing.
    pub out: PathBuf,
    /// Seed of the line.
    pub seed: u64,
    /// Parts 0 to `parts` - 1.
    pub parts: u32,
    /// Share of defective parts, 0 to 1.
    pub defect_share: f32,
    /// Sizes and strengths of the defects.
    pub range: DefectRange,
    /// Replace files of the same name.
    pub force: bool,
    /// Worker threads, at least 1.
    pub threads: usize,
}

/// The content of [`TRUTH_FILE`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TruthFile {
    /// Version of this layout.
    pub format: u32,
    /// Seed of the line.
    pub seed: u64,
    /// Number of parts exported.
    pub parts: u32,
    /// Share of defective parts asked for.
    pub defect_share: f32,
    /// Range of drawn sizes in px.
    pub size_px: [f32; 2],
    /// Range of drawn strengths.
    pub contrast: [f32; 2],
    /// Every defective part, by number.
    pub defects: Vec<TruthEntry>,
}

/// What is true of one defective part of an exported line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TruthEntry {
    /// The picture, relative to the folder, with `/` between names.
    pub path: String,
    /// Part number: the same seed and number render the same picture.
    pub part: u32,
    /// Product.
    pub product: String,
    /// Kind of defect (folder name).
    pub defect: String,
    /// Size as drawn, in px.
    pub size_px: f32,
    /// Longer side of the mask's bounding box, in px.
    pub extent_px: u32,
    /// Strength as drawn, in (0, 1].
    pub contrast: f32,
    /// Pixels of the mask.
    pub area_px: u32,
    /// Mean change over the mask, in grey levels.
    pub delta_levels: f32,
    /// How well a person sees it, 8 and more ([`DefectTruth::visibility`]).
    pub visibility: f32,
}

/// How many pictures went where.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Collected {
    /// Pictures by folder, relative to the output folder.
    pub folders: BTreeMap<String, u32>,
    /// Pictures that could not be had (named in the log).
    pub skipped: u32,
}

impl Collected {
    /// Pictures written.
    pub fn total(&self) -> u32 {
        self.folders.values().sum()
    }
}

/// Write the simulated line out in MVTec-AD layout, one category per product; a picture is named after its part number. Of the good
/// parts some go to `test/good`, about as many as there are defective ones (at most half); the rest to `train/good`. `done` is called once
/// per part.
///
/// # Errors
/// When a file exists and `force` is not set, or cannot be written. What was written until then stays.
pub fn export(job: &Export, done: impl Fn() + Sync) -> Result<Collected, CollectError> {
    let truth_path = job.out.join(TRUTH_FILE);
    refuse_existing(&truth_path, job.force)?;
    if !job.force && dataset::list(&job.out).is_ok_and(|listing| !listing.is_empty()) {
        return Err(CollectError::Exists { path: job.out.clone() });
    }
    let next = AtomicU32::new(0);
    let stop = AtomicBool::new(false);
    let gathered = Mutex::new((Collected::default(), Vec::new()));
    let worker = || -> Result<(), CollectError> {
        let mut line = SimulatedLine::with_defects(job.seed, job.defect_share, job.range);
        let mut pixels = Vec::new();
        let mut png = Vec::new();
        while !stop.load(Ordering::Relaxed) {
            let part = next.fetch_add(1, Ordering::Relaxed);
            if part >= job.parts {
                break;
            }
            let truth = line.render(part, &mut pixels);
            let product = truth.product.to_string();
            let defect = truth.defect.clone();
            let stem = format!("{part:0DIGITS$}");
            let folder = match &defect {
                Some(defect) => {
                    let mask = job.out.join(&product).join("ground_truth").join(&*defect.name).join(format!("{stem}_mask.png"));
                    encode(&mask, truth.mask, WIDTH_PX, HEIGHT_PX, image::ExtendedColorType::L8, &mut png)?;
                    write_file(&mask, &png, job.force)?;
                    format!("{product}/test/{}", defect.name)
                }
                None => format!("{product}/{}/{}", if is_test_part(job, part) { "test" } else { "train" }, dataset::GOOD),
            };
            let path = job.out.join(&folder).join(format!("{stem}.png"));
            encode(&path, &pixels, WIDTH_PX, HEIGHT_PX, image::ExtendedColorType::Rgb8, &mut png)?;
            write_file(&path, &png, job.force)?;
            let entry = defect.map(|defect| entry(format!("{folder}/{stem}.png"), part, product, defect));
            let mut gathered = gathered.lock().unwrap_or_else(PoisonError::into_inner);
            *gathered.0.folders.entry(folder).or_insert(0) += 1;
            gathered.1.extend(entry);
            drop(gathered);
            done();
        }
        Ok(())
    };
    let workers = (job.threads as u32).clamp(1, job.parts / PARTS_PER_WORKER + 1);
    std::thread::scope(|scope| {
        let handles: Vec<_> = (0..workers)
            .map(|_| {
                scope.spawn(|| {
                    let result = worker();
                    if result.is_err() {
                        stop.store(true, Ordering::Relaxed);
                    }
                    result
                })
            })
            .collect();
        handles.into_iter().try_for_each(|handle| match handle.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        })
    })?;
    let (collected, mut defects) = gathered.into_inner().unwrap_or_else(PoisonError::into_inner);
    defects.sort_by_key(|entry| entry.part);
    let truth = TruthFile {
        format: 1,
        seed: job.seed,
        parts: job.parts,
        defect_share: job.defect_share,
        size_px: job.range.size_px,
        contrast: job.range.contrast,
        defects,
    };
    let json = serde_json::to_vec_pretty(&truth)
        .map_err(|error| CollectError::Write { path: truth_path.clone(), source: std::io::Error::other(error) })?;
    write_file(&truth_path, &json, job.force)?;
    Ok(collected)
}

fn entry(path: String, part: u32, product: String, defect: DefectTruth) -> TruthEntry {
    TruthEntry {
        path,
        part,
        product,
        defect: defect.name.to_string(),
        size_px: defect.size_px,
        extent_px: defect.extent_px,
        contrast: defect.contrast,
        area_px: defect.area_px,
        delta_levels: defect.delta_levels,
        visibility: defect.visibility,
    }
}

/// Whether a good part goes to the test half: as many as there are defective parts, at most half of the good ones. A hash of the number
/// alone, so that the halves stay the same when more parts are exported.
fn is_test_part(job: &Export, part: u32) -> bool {
    let good_share = 1.0 - job.defect_share;
    let share = if good_share > 0.0 { (job.defect_share / good_share).min(0.5) } else { 0.0 };
    let mixed = part.wrapping_mul(0x9e37_79b1) ^ (job.seed as u32);
    let mixed = (mixed ^ (mixed >> 15)).wrapping_mul(0x85eb_ca77);
    ((mixed ^ (mixed >> 13)) >> 8) as f32 * (1.0 / 16_777_216.0) < share
}

/// How pictures are taken from a source.
#[derive(Clone, Debug)]
pub struct Recording {
    /// Category folder; pictures go to `train/good` in it.
    pub out: PathBuf,
    /// How many pictures.
    pub parts: u32,
    /// Part of the picture that is kept: what the line will inspect. `None` for all of it.
    pub roi: Option<Roi>,
    /// At most one picture in this time.
    pub interval: Duration,
    /// Silence of the source that ends the recording.
    pub stall: Duration,
}

/// Take pictures of normal parts from `source` and write them as PNG files, numbered on from those already there. `done` is called once
/// per picture. Ends early, without error, when the source ends.
///
/// # Errors
/// When the source stalls, or fails `MAX_FAILURES` times in a row, or a file cannot be written.
pub fn record(source: &mut dyn Source, job: &Recording, mut done: impl FnMut()) -> Result<Collected, CollectError> {
    let relative = format!("train/{}", dataset::GOOD);
    let folder = job.out.join(&relative);
    let mut number = next_number(&folder);
    let mut collected = Collected::default();
    // One being written and one being filled.
    let pool: Pool<Vec<u8>> = Pool::new(2, Vec::new);
    let (mut rgb, mut png) = (Vec::new(), Vec::new());
    let mut failures = 0;
    let mut heard = Instant::now();
    let mut opened = false;
    while collected.total() < job.parts {
        let ready = if opened { Ok(()) } else { source.open().inspect(|()| heard = Instant::now()) };
        let grabbed = ready.and_then(|()| source.grab(None, GRAB_WAIT, &pool));
        opened = true;
        let problem = match grabbed {
            Ok(Grab::End) => break,
            Ok(Grab::Timeout) => {
                if heard.elapsed() > job.stall {
                    return Err(CollectError::Stalled { what: source.describe(), seconds: heard.elapsed().as_secs_f32() });
                }
                continue;
            }
            Ok(Grab::Frame(frame)) => match crop(&frame, job.roi, &mut rgb) {
                Ok((width, height)) => {
                    let path = folder.join(format!("{number:0DIGITS$}.png"));
                    encode(&path, &rgb, width, height, image::ExtendedColorType::Rgb8, &mut png)?;
                    write_file(&path, &png, false)?;
                    number += 1;
                    *collected.folders.entry(relative.clone()).or_insert(0) += 1;
                    failures = 0;
                    done();
                    std::thread::sleep(job.interval);
                    heard = Instant::now();
                    continue;
                }
                Err(problem) => problem,
            },
            Err(error) => {
                opened = false;
                error.to_string()
            }
        };
        collected.skipped += 1;
        failures += 1;
        if failures >= MAX_FAILURES {
            return Err(CollectError::Failing { last: problem });
        }
        log::warn!("{problem}");
        std::thread::sleep(FAILURE_PAUSE);
        heard = Instant::now();
    }
    Ok(collected)
}

/// Decode a frame and keep the region of interest; width and height of what is kept.
fn crop(frame: &Frame, roi: Option<Roi>, rgb: &mut Vec<u8>) -> Result<(u32, u32), String> {
    decode_rgb(frame, rgb).map_err(|error| error.to_string())?;
    let Some(roi) = roi else { return Ok((frame.width_px, frame.height_px)) };
    if !roi.fits(frame.width_px, frame.height_px) {
        return Err(format!(
            "roi {}x{} at ({}, {}) does not lie inside the {}x{} picture: correct `roi` in the configuration",
            roi.width_px, roi.height_px, roi.x_px, roi.y_px, frame.width_px, frame.height_px
        ));
    }
    let row = 3 * frame.width_px as usize;
    let (left, length) = (3 * roi.x_px as usize, 3 * roi.width_px as usize);
    // Rows move towards the front, so none is overwritten before it was read.
    for y in 0..roi.height_px as usize {
        let from = (y + roi.y_px as usize) * row + left;
        rgb.copy_within(from..from + length, y * length);
    }
    rgb.truncate(roi.height_px as usize * length);
    Ok((roi.width_px, roi.height_px))
}

/// One more than the largest number that a picture in `folder` has for a name.
fn next_number(folder: &Path) -> u64 {
    let listing = dataset::list(folder).unwrap_or_default();
    let numbers = listing.iter().filter_map(|path| path.file_stem()?.to_str()?.parse::<u64>().ok());
    numbers.max().map_or(0, |largest| largest.saturating_add(1))
}

fn encode(
    path: &Path,
    pixels: &[u8],
    width_px: u32,
    height_px: u32,
    colour: image::ExtendedColorType,
    png: &mut Vec<u8>,
) -> Result<(), CollectError> {
    png.clear();
    // Sensor noise does not compress; a slower setting gains next to nothing.
    PngEncoder::new_with_quality(&mut *png, CompressionType::Fast, FilterType::Sub)
        .write_image(pixels, width_px, height_px, colour)
        .map_err(|error| CollectError::Encode { path: path.to_path_buf(), why: error.to_string() })
}

fn refuse_existing(path: &Path, force: bool) -> Result<(), CollectError> {
    if !force && path.symlink_metadata().is_ok() { Err(CollectError::Exists { path: path.to_path_buf() }) } else { Ok(()) }
}

/// Write a file beside its place and move it there.
fn write_file(path: &Path, bytes: &[u8], force: bool) -> Result<(), CollectError> {
    let failed = |source| CollectError::Write { path: path.to_path_buf(), source };
    refuse_existing(path, force)?;
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(failed)?;
    }
    // Hidden, so that a scan passes over what a crash leaves behind; the time keeps two runs apart.
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let partial = path.with_file_name(format!(".{name}.{}-{}.partial", std::process::id(), now_ns()));
    std::fs::write(&partial, bytes).and_then(|()| std::fs::rename(&partial, path)).map_err(|error| {
        // The first error is the one to tell; a file that cannot be written may be impossible to remove as well.
        let _ = std::fs::remove_file(&partial);
        failed(error)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataset::{Dataset, Layout, Split};
    use crate::source::folder::FolderSource;
    use image::{Rgb, RgbImage};

    fn job(out: &Path, parts: u32, threads: usize) -> Export {
        Export { out: out.to_path_buf(), seed: 4, parts, defect_share: 0.4, range: DefectRange::default(), force: false, threads }
    }

    #[test]
    fn an_exported_line_is_a_complete_mvtec_set() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("set");
        let count = AtomicU32::new(0);
        let collected = export(&job(&out, 90, 2), || {
            count.fetch_add(1, Ordering::Relaxed);
        })
        .unwrap();
        assert_eq!((collected.total(), count.into_inner()), (90, 90));
        let set = Dataset::scan(&out).unwrap();
        assert_eq!((set.layout, set.items.len()), (Layout::Categories, 90));
        assert!(set.categories().len() >= 5, "{:?}", set.categories());
        for item in &set.items {
            assert_eq!(item.defect.is_some(), item.mask.is_some(), "{}", item.path.display());
            assert!(item.split == Split::Test || item.defect.is_none());
        }
        for split in [Split::Train, Split::Test] {
            assert!(set.items.iter().any(|item| item.split == split && item.defect.is_none()), "{split:?}");
        }
        let truth: TruthFile = serde_json::from_slice(&std::fs::read(out.join(TRUTH_FILE)).unwrap()).unwrap();
        assert_eq!(truth.defects.len(), set.items.iter().filter(|item| item.defect.is_some()).count());
        let first = truth.defects.first().unwrap();
        // The file holds what the line renders, and the mask what the truth says.
        let (mut line, mut pixels) = (SimulatedLine::new(4, 0.4), Vec::new());
        let rendered = line.render(first.part, &mut pixels);
        assert_eq!(rendered.defect.as_ref().map(|d| d.area_px), Some(first.area_px));
        assert_eq!(dataset::load_frame(&out.join(&first.path)).unwrap().pixels.as_slice(), pixels);
        let mask = out.join(first.path.replace("/test/", "/ground_truth/").replace(".png", "_mask.png"));
        let (mask, w, h) = dataset::load_mask(&mask).unwrap();
        assert_eq!((w, h), (WIDTH_PX, HEIGHT_PX));
        assert_eq!(mask.iter().filter(|&&m| m == 255).count(), first.area_px as usize);
    }

    #[test]
    fn nothing_is_replaced_without_force_and_threads_do_not_matter() {
        let dir = tempfile::tempdir().unwrap();
        let first = job(&dir.path().join("a"), 12, 1);
        export(&first, || {}).unwrap();
        let text = export(&first, || {}).unwrap_err().to_string();
        assert!(text.contains("--force"), "{text}");
        export(&Export { force: true, ..first.clone() }, || {}).unwrap();
        let second = job(&dir.path().join("b"), 50, 3);
        export(&second, || {}).unwrap();
        for item in Dataset::scan(&first.out).unwrap().items {
            let twin = second.out.join(item.path.strip_prefix(&first.out).unwrap());
            assert!(std::fs::read(&item.path).unwrap() == std::fs::read(&twin).unwrap(), "{}", twin.display());
        }
    }

    #[test]
    fn recording_numbers_on_crops_and_passes_over_bad_files() {
        let dir = tempfile::tempdir().unwrap();
        let (from, out) = (dir.path().join("from"), dir.path().join("nut"));
        std::fs::create_dir_all(&from).unwrap();
        for i in 0..3u8 {
            RgbImage::from_fn(10, 8, |x, y| Rgb([x as u8, y as u8, i])).save(from.join(format!("{i}.png"))).unwrap();
        }
        std::fs::write(from.join("1b.png"), b"broken").unwrap();
        let job = Recording {
            out: out.clone(),
            parts: 10,
            roi: Some(Roi { x_px: 2, y_px: 3, width_px: 4, height_px: 5 }),
            interval: Duration::ZERO,
            stall: Duration::from_secs(30),
        };
        for round in 0..2u32 {
            let collected = record(&mut FolderSource::new(&from, false, None), &job, || {}).unwrap();
            assert_eq!((collected.total(), collected.skipped), (3, 1));
            let set = Dataset::scan(&out).unwrap();
            assert_eq!(set.items.len() as u32, 3 * (round + 1));
        }
        let frame = dataset::load_frame(&out.join("train/good/000004.png")).unwrap();
        assert_eq!((frame.width_px, frame.height_px, frame.pixels.get(..3)), (4, 5, Some(&[2, 3, 1][..])));
        assert_eq!(frame.pixels.get(12..15), Some(&[2, 4, 1][..]));

        let all_bad = dir.path().join("bad");
        std::fs::create_dir_all(&all_bad).unwrap();
        std::fs::write(all_bad.join("x.png"), b"broken").unwrap();
        let text = record(&mut FolderSource::new(&all_bad, true, None), &job, || {}).unwrap_err().to_string();
        assert!(text.contains("x.png"), "{text}");
    }
}
