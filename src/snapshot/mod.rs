//! Defect pictures: image, heat map, record; durable, bounded, and never in the way of the line.
//!
//! [`spawn`] starts a thread of its own. The verdict path hands over a [`Record`] with [`RecorderHandle::try_record`], which never blocks: a full
//! queue, a full disk or a dead thread cost pictures (counted), never parts. Per kept part three files appear, the record last:
//!
//! ```text
//! 20261124T203015.123Z-0007_part42_reject.png        the picture (.jpg where the camera sends JPEG: its own bytes)
//! 20261124T203015.123Z-0007_part42_reject.heat.png   the anomaly map over it, see [`overlay`]
//! 20261124T203015.123Z-0007_part42_reject.json       [`PartRecord`]
//! ```
//!
//! May know frames, maps, verdicts and the disk; nothing of the pipeline's threads, the link or the model runtime.

pub mod overlay;
pub mod picture;
mod record;
mod store;
mod text;
pub mod utc;

pub(crate) use record::decision_name;
pub use record::{PartRecord, Stages};

use crate::anomaly::{AnomalyMap, Region, ScoreRule, Scorer};
use crate::config::{Keep, SnapshotConfig};
use crate::frame::{Frame, PixelFormat};
use crate::model::bundle::BundleMeta;
use crate::pipeline::Inspection;
use crate::pool::Pooled;
use crate::preprocess::Roi;
use crate::verdict::Decision;
use crate::wake::{SPARE, has_room};
use crossbeam_channel::{Receiver, Sender, bounded};
use image::codecs::png::{CompressionType, FilterType, PngEncoder};
use image::{ImageEncoder, RgbImage};
use overlay::{Legend, Scale, View};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use store::{Disk, Put, RealDisk, Store};

/// Records that wait at most; each holds one frame and one map of the pipeline's pools, which must be that much larger. A run of rejects
/// longer than this, faster than the disk takes them, loses pictures (counted), never parts.
pub const QUEUE_RECORDS: usize = 8;
/// The recorder's niceness: encoding pictures must not take the CPU from inference.
const NICENESS: i32 = 10;

/// Why the recorder cannot start.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The folder cannot be used.
    #[error("cannot use the snapshot folder {}: {source}; create it, or make it writable for the user that runs cull", folder.display())]
    Folder {
        /// The folder.
        folder: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// Another recorder runs there.
    #[error("the snapshot folder {} is in use by another cull; give each line a folder of its own", folder.display())]
    InUse {
        /// The folder.
        folder: PathBuf,
    },
    /// The system gave no thread.
    #[error("cannot start the recorder thread: {0}")]
    Thread(io::Error),
}

/// What all records of a run share.
#[derive(Clone, Debug)]
pub struct Context {
    /// Name of the line.
    pub line: String,
    /// Model name.
    pub model: String,
    /// SHA-256 of the model bundle, hex.
    pub model_sha256: String,
    /// Score rule, for finding regions.
    pub rule: ScoreRule,
    /// The model's grid, `[rows, columns]`.
    pub grid: [usize; 2],
    /// The model's input, `[height, width]` in pixels.
    pub input_px: [usize; 2],
    /// Map values to colours; its threshold also bounds the regions.
    pub scale: Scale,
}

impl Context {
    /// What a bundle and the policy say, for the line of this name.
    pub fn new(line: &str, bundle: &BundleMeta, false_reject_rate: f32) -> Self {
        Self {
            line: line.to_owned(),
            model: bundle.name.clone(),
            model_sha256: bundle.sha256.clone(),
            rule: bundle.score,
            grid: bundle.grid,
            input_px: [bundle.preprocess.height_px as usize, bundle.preprocess.width_px as usize],
            scale: Scale::from_calibration(&bundle.calibration, false_reject_rate),
        }
    }
}

/// One part to keep.
pub struct Record {
    /// The picture as it was inspected.
    pub frame: Frame,
    /// Its anomaly map; empty when no inference happened.
    pub map: Pooled<AnomalyMap>,
    /// What was decided.
    pub inspection: Inspection,
    /// The inspected part of the picture.
    pub roi: Option<Roi>,
}

/// What the recorder has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RecorderCounters {
    /// Parts on disk.
    pub written: u64,
    /// Parts lost because the queue was full.
    pub queue_full: u64,
    /// Parts not written because free disk was below the limit.
    pub low_disk: u64,
    /// Parts not written because of an error.
    pub failed: u64,
    /// Oldest sets removed to make room.
    pub evicted: u64,
}

#[derive(Default)]
struct Counters {
    written: AtomicU64,
    queue_full: AtomicU64,
    low_disk: AtomicU64,
    failed: AtomicU64,
    evicted: AtomicU64,
}

/// The way to the recorder thread. Dropping it writes what is queued and waits for the thread.
pub struct RecorderHandle {
    /// `None` when no folder is configured.
    queue: Option<Sender<Record>>,
    keep: Keep,
    folder: Option<PathBuf>,
    counters: Arc<Counters>,
    thread: Option<JoinHandle<()>>,
}

impl RecorderHandle {
    /// Hand over a part. Never blocks. `true` when it was taken or is not to be kept; `false` when the queue is full or the recorder is gone (counted).
    pub fn try_record(&self, record: Record) -> bool {
        let Some(queue) = &self.queue else { return true };
        if self.keep == Keep::Rejects && record.inspection.verdict.decision == Decision::Accept {
            return true;
        }
        let taken = has_room(queue, QUEUE_RECORDS) && queue.try_send(record).is_ok();
        if !taken {
            self.counters.queue_full.fetch_add(1, Ordering::Relaxed);
        }
        taken
    }

    /// Whether a part with this decision would be kept, so that the caller need not build a [`Record`] for nothing.
    pub fn keeps(&self, decision: Decision) -> bool {
        self.queue.is_some() && (self.keep == Keep::All || decision != Decision::Accept)
    }

    /// Whether the next [`RecorderHandle::try_record`] from this thread finds room. For sources that can wait (a folder).
    pub fn has_room(&self) -> bool {
        self.queue.as_ref().is_none_or(|queue| has_room(queue, QUEUE_RECORDS))
    }

    /// The folder pictures go to; `None` when none is configured.
    pub fn folder(&self) -> Option<&Path> {
        self.folder.as_deref()
    }

    /// What has been done so far.
    pub fn counters(&self) -> RecorderCounters {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        RecorderCounters {
            written: get(&self.counters.written),
            queue_full: get(&self.counters.queue_full),
            low_disk: get(&self.counters.low_disk),
            failed: get(&self.counters.failed),
            evicted: get(&self.counters.evicted),
        }
    }

    /// Write what is queued, end the thread, and say what was done.
    pub fn finish(mut self) -> RecorderCounters {
        self.join();
        self.counters()
    }

    fn join(&mut self) {
        self.queue = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("snapshots: the recorder thread panicked; please report this with the log");
        }
    }
}

impl Drop for RecorderHandle {
    fn drop(&mut self) {
        self.join();
    }
}

/// Open the folder and start the recorder. Without a folder in `config`, the handle takes records and keeps none.
///
/// # Errors
/// When the folder cannot be created, read, written or locked, or no thread can be started.
pub fn spawn(config: &SnapshotConfig, context: Context) -> Result<RecorderHandle, SnapshotError> {
    let counters = Arc::new(Counters::default());
    let mut handle = RecorderHandle { queue: None, keep: config.keep, folder: None, counters: counters.clone(), thread: None };
    let Some(folder) = &config.folder else { return Ok(handle) };
    let store = Store::open(folder, config.max_mb, config.min_free_mb, RealDisk)?;
    let (queue, records) = bounded(QUEUE_RECORDS + SPARE);
    let recorder = Recorder {
        scorer: Scorer::new(context.rule, context.grid, context.input_px),
        context,
        store,
        counters,
        serial: 0,
        last_ms: 0,
        trouble: Trouble::None,
        regions: Vec::new(),
    };
    let thread =
        std::thread::Builder::new().name("recorder".into()).spawn(move || recorder.run(&records)).map_err(SnapshotError::Thread)?;
    handle.queue = Some(queue);
    handle.folder = Some(folder.clone());
    handle.thread = Some(thread);
    Ok(handle)
}

/// What keeps pictures from being written, so that it is logged once when it begins and once when it ends.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Trouble {
    None,
    LowDisk,
    Failing,
}

struct Recorder<D> {
    context: Context,
    store: Store<D>,
    scorer: Scorer,
    counters: Arc<Counters>,
    /// Tells sets of the same millisecond apart.
    serial: u64,
    /// Time of the record before.
    last_ms: i64,
    trouble: Trouble,
    regions: Vec<Region>,
}

impl<D: Disk> Recorder<D> {
    fn run(mut self, records: &Receiver<Record>) {
        if let Err(error) = rustix::process::setpriority_process(None, NICENESS) {
            log::debug!("snapshots: cannot lower the recorder's priority: {error}");
        }
        for record in records {
            // A decoder that panics on a hostile picture must not end the recorder.
            let outcome = catch_unwind(AssertUnwindSafe(|| self.keep(record)));
            let outcome = outcome.unwrap_or_else(|_| Err(io::Error::other("a picture could not be encoded (panic)")));
            self.account(outcome);
        }
    }

    fn keep(&mut self, record: Record) -> io::Result<Put> {
        let Record { frame, map, inspection, roi } = record;
        let unix_ms = self.in_order(utc::unix_ms_of(inspection.decided_ns));
        let stem = self.stem(&inspection, unix_ms);
        let mut part = PartRecord::new(&inspection, unix_ms, &self.context, roi);

        let picture = picture::rgb_from_frame(&frame);
        let suffix = if frame.format == PixelFormat::Mjpg { ".jpg" } else { ".png" };
        let original = match (&picture, frame.format) {
            // The camera's own bytes, even when they are damaged: they are the evidence.
            (_, PixelFormat::Mjpg) => frame.pixels.to_vec(),
            (Ok(picture), _) => png(picture)?,
            (Err(error), _) => return Err(io::Error::other(error.to_string())),
        };
        // The frame and the map go back to the hot path's pools before anything waits for the disk.
        let size = (frame.width_px, frame.height_px);
        drop(frame);
        let heat = match picture {
            Ok(picture) if !map.values.is_empty() => Some(self.heat(&picture, &map, &inspection, roi, &mut part)?),
            Ok(_) => None,
            Err(error) => {
                log::warn!("snapshots: no overlay for {stem} ({}x{}): {error}", size.0, size.1);
                None
            }
        };
        drop(map);

        part.picture = format!("{stem}{suffix}");
        part.heat = heat.as_ref().map(|_| format!("{stem}.heat.png"));
        let mut json = serde_json::to_vec_pretty(&part)?;
        json.push(b'\n');
        let mut files: Vec<(&str, &[u8])> = vec![(suffix, &original)];
        if let Some(heat) = &heat {
            files.push((".heat.png", heat));
        }
        files.push((".json", &json));
        self.store.put(&stem, &files)
    }

    /// The overlay as PNG; fills in the record's regions.
    fn heat(
        &mut self,
        picture: &RgbImage,
        map: &AnomalyMap,
        inspection: &Inspection,
        roi: Option<Roi>,
        part: &mut PartRecord,
    ) -> io::Result<Vec<u8>> {
        self.scorer.regions(map, self.context.scale.threshold(), &mut self.regions);
        let area = roi.unwrap_or(Roi { x_px: 0, y_px: 0, width_px: picture.width(), height_px: picture.height() });
        part.regions = self.regions.iter().map(|region| in_picture(region, &area, self.context.input_px)).collect();
        let legend = Legend { verdict: inspection.verdict, part: inspection.part, product: part.product.clone() };
        let view = View { roi, input_px: self.context.input_px, scale: self.context.scale, regions: &self.regions, legend: Some(&legend) };
        png(&overlay::render(picture, map, &view))
    }

    /// The moment itself, or that of the record before where the two clocks' rounding puts this one just ahead of it. A wall clock that was set back
    /// for good is followed.
    fn in_order(&mut self, unix_ms: i64) -> i64 {
        const ROUNDING_MS: i64 = 100;
        let behind = self.last_ms.saturating_sub(unix_ms);
        self.last_ms = if (0..ROUNDING_MS).contains(&behind) { self.last_ms } else { unix_ms };
        self.last_ms
    }

    /// A name that sorts by time and tells part and decision.
    fn stem(&mut self, inspection: &Inspection, unix_ms: i64) -> String {
        let part = inspection.part.map_or_else(|| format!("frame{}", inspection.seq), |part| format!("part{part}"));
        let decision = decision_name(inspection.verdict.decision);
        loop {
            self.serial = (self.serial + 1) % 10_000;
            let stem = format!("{}-{:04}_{part}_{decision}", utc::compact(unix_ms), self.serial);
            if !self.store.contains(&stem) {
                return stem;
            }
        }
    }

    /// Count, and log once when trouble begins or ends.
    fn account(&mut self, outcome: io::Result<Put>) {
        let (counter, trouble) = match &outcome {
            Ok(Put::Written { evicted }) => {
                self.counters.evicted.fetch_add(*evicted, Ordering::Relaxed);
                (&self.counters.written, Trouble::None)
            }
            Ok(Put::LowDisk { .. }) => (&self.counters.low_disk, Trouble::LowDisk),
            Err(_) => (&self.counters.failed, Trouble::Failing),
        };
        counter.fetch_add(1, Ordering::Relaxed);
        if trouble != self.trouble {
            match outcome {
                Ok(Put::Written { .. }) => log::info!("snapshots: pictures are written again"),
                Ok(Put::LowDisk { free_bytes }) => log::warn!(
                    "snapshots: only {} MB free on the disk, below min_free_mb: no pictures are kept until there is room; the line goes on",
                    free_bytes / 1_000_000
                ),
                Err(error) => {
                    log::error!("snapshots: cannot write a picture: {error}; check the disk; the line goes on and failures are counted")
                }
            }
            self.trouble = trouble;
        }
    }
}

/// A region in model input pixels -> in pixels of the picture.
fn in_picture(region: &Region, area: &Roi, input_px: [usize; 2]) -> Region {
    let [input_height, input_width] = input_px;
    let scale = |value: u32, from: usize, to: u32| (u64::from(value) * u64::from(to) / from.max(1) as u64) as u32;
    Region {
        x_px: area.x_px + scale(region.x_px, input_width, area.width_px),
        y_px: area.y_px + scale(region.y_px, input_height, area.height_px),
        width_px: scale(region.width_px, input_width, area.width_px).max(1),
        height_px: scale(region.height_px, input_height, area.height_px).max(1),
        peak: region.peak,
    }
}

/// Lossless, and quick rather than small: the recorder shares the CPU with inference.
fn png(picture: &RgbImage) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    PngEncoder::new_with_quality(&mut bytes, CompressionType::Fast, FilterType::Adaptive)
        .write_image(picture.as_raw(), picture.width(), picture.height(), image::ExtendedColorType::Rgb8)
        .map_err(io::Error::other)?;
    Ok(bytes)
}

/// Every complete record in a folder, oldest first, with what could not be read. Other files are passed over.
///
/// # Errors
/// When the folder cannot be read.
pub fn list(folder: &Path) -> Result<(Vec<PartRecord>, Vec<String>), SnapshotError> {
    let at = |source| SnapshotError::Folder { folder: folder.to_owned(), source };
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(at)? {
        if let Ok(name) = entry.map_err(at)?.file_name().into_string()
            && name.ends_with(".json")
            && store::stem_of(&name).is_some()
        {
            names.push(name);
        }
    }
    names.sort_unstable();
    let (mut records, mut unreadable) = (Vec::with_capacity(names.len()), Vec::new());
    for name in names {
        let read = std::fs::read(folder.join(&name)).map_err(|error| error.to_string());
        match read.and_then(|bytes| serde_json::from_slice(&bytes).map_err(|error| error.to_string())) {
            Ok(record) => records.push(record),
            Err(error) => unreadable.push(format!("{name}: {error}")),
        }
    }
    Ok((records, unreadable))
}
