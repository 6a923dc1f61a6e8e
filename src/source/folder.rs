//! Pictures from a folder, in natural order of their names, as a frame source.
//!
//! Product and truth come from the folder names where the layout is MVTec-AD's. A file that cannot be read costs its own turn only.

use super::{Grab, Source, SourceError, Trigger};
use crate::dataset::{self, Picture};
use crate::frame::{Frame, Origin, now_ns};
use crate::pool::Pool;
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Folders below the root that are searched. Deeper trees are not picture folders; together with the set of folders seen it ends loops.
const MAX_DEPTH: usize = 16;
/// Folder of masks, which are no pictures of parts.
const MASKS: &str = "ground_truth";

/// Reads the pictures of a folder and of the folders in it.
pub struct FolderSource {
    root: PathBuf,
    repeat: bool,
    period: Option<Duration>,
    files: Vec<(Arc<Path>, Origin)>,
    next: usize,
    seq: u64,
    due: Option<Instant>,
}

impl FolderSource {
    /// Pictures of `root`, found when the source is opened; again from the start when `repeat`; `rate_hz` pictures a second (`None`, or
    /// what is not above zero: as fast as they are taken; parts with a trigger are never held up).
    pub fn new(root: &Path, repeat: bool, rate_hz: Option<f32>) -> Self {
        let period = rate_hz.filter(|&rate| rate > 0.0).and_then(|rate| Duration::try_from_secs_f32(1.0 / rate).ok());
        Self { root: root.to_path_buf(), repeat, period, files: Vec::new(), next: 0, seq: 0, due: None }
    }

    fn open_error(&self, why: String) -> SourceError {
        SourceError::Open { what: format!("folder {}", self.root.display()), why }
    }

    /// Find the pictures of `dir`.
    fn search(&mut self, dir: &Path, depth: usize, seen: &mut HashSet<PathBuf>) -> Result<(), SourceError> {
        let real = std::fs::canonicalize(dir).map_err(|error| self.open_error(format!("{error}; check `path` of the source")))?;
        // A link back up, or two links to one folder: its pictures count once.
        if depth > MAX_DEPTH || !seen.insert(real) {
            return Ok(());
        }
        for path in dataset::list(dir).map_err(|error| self.open_error(error.to_string()))? {
            if path.is_dir() {
                if path.file_name().is_some_and(|name| name != MASKS) {
                    self.search(&path, depth + 1, seen)?;
                }
            } else if dataset::is_picture(&path) {
                // Relative paths lack the folders above the root that name product and split.
                let full = std::path::absolute(&path).unwrap_or_else(|_| path.clone());
                let (product, truth) = dataset::labels_from_path(&full).unzip();
                let path: Arc<Path> = Arc::from(path);
                let origin = Origin { path: Some(path.clone()), product: product.map(Arc::from), truth };
                self.files.push((path, origin));
            }
        }
        Ok(())
    }
}

impl Source for FolderSource {
    fn describe(&self) -> String {
        let count = if self.files.is_empty() { String::new() } else { format!(", {} pictures", self.files.len()) };
        format!("folder {}{count}{}", self.root.display(), if self.repeat { ", repeated" } else { "" })
    }

    /// Finds the pictures the first time. Opened again, it goes on with the picture after the last one.
    fn open(&mut self) -> Result<(), SourceError> {
        if !self.files.is_empty() {
            return Ok(());
        }
        let root = self.root.clone();
        if let Err(error) = self.search(&root, 0, &mut HashSet::new()) {
            // Half a list would be read as the whole one.
            self.files.clear();
            return Err(error);
        }
        if self.files.is_empty() {
            return Err(self.open_error("it holds no pictures (png, jpg); check `path` of the source".into()));
        }
        Ok(())
    }

    /// The next picture: a JPEG as the file has it, a PNG decoded. Unlike a camera this reads the disk, and decoding a PNG allocates.
    ///
    /// # Errors
    /// A file that cannot be read is named; the next call goes on with the one after it.
    fn grab(&mut self, trigger: Option<&Trigger>, timeout: Duration, pool: &Pool<Vec<u8>>) -> Result<Grab, SourceError> {
        let until = Instant::now() + timeout;
        self.open()?;
        if self.next >= self.files.len() {
            if !self.repeat {
                return Ok(Grab::End);
            }
            self.next = 0;
        }
        if let (Some(period), None) = (self.period, trigger) {
            let now = Instant::now();
            let due = self.due.unwrap_or(now);
            if due > until {
                std::thread::sleep(until.saturating_duration_since(now));
                return Ok(Grab::Timeout);
            }
            std::thread::sleep(due.saturating_duration_since(now));
            // Late pictures are not made up for in a burst.
            self.due = Some(due.max(now) + period);
        }
        let Some(mut pixels) = pool.take_timeout(until.saturating_duration_since(Instant::now())) else { return Ok(Grab::Timeout) };
        let Some((path, origin)) = self.files.get(self.next) else { return Ok(Grab::End) };
        self.next += 1;
        let seq = self.seq;
        self.seq += 1;
        let Picture { format, width_px, height_px } = dataset::read_picture(path, &mut pixels)
            .map_err(|error| SourceError::Failed { what: format!("folder {}", self.root.display()), why: error.to_string() })?;
        Ok(Grab::Frame(Frame {
            pixels,
            format,
            width_px,
            height_px,
            captured_ns: now_ns(),
            seq,
            part: trigger.map(|t| t.part),
            origin: origin.clone(),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::PartId;
    use crate::frame::PixelFormat;
    use image::{Rgb, RgbImage};

    const WAIT: Duration = Duration::from_secs(10);

    fn pool() -> Pool<Vec<u8>> {
        Pool::new(2, Vec::new)
    }

    fn save(path: &Path, value: u8) {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        RgbImage::from_pixel(8, 6, Rgb([value; 3])).save(path).unwrap();
    }

    fn frame(grab: Result<Grab, SourceError>) -> Frame {
        match grab {
            Ok(Grab::Frame(frame)) => frame,
            Ok(Grab::Timeout) => panic!("time-out"),
            Ok(Grab::End) => panic!("end"),
            Err(error) => panic!("{error}"),
        }
    }

    #[test]
    fn pictures_come_in_order_with_their_labels_and_then_it_ends() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("nut");
        save(&root.join("test/good/10.png"), 10);
        save(&root.join("test/good/9.png"), 9);
        save(&root.join("test/cut/1.jpg"), 1);
        save(&root.join("ground_truth/cut/1_mask.png"), 255);
        #[cfg(unix)]
        std::os::unix::fs::symlink(&root, root.join("test/loop")).unwrap();
        let (mut source, pool) = (FolderSource::new(&root.join("test"), false, None), pool());
        source.open().unwrap();
        let trigger = Trigger { part: PartId(7), received_ns: 0, deadline_ns: u64::MAX, encoder_ticks: 0 };
        let first = frame(source.grab(Some(&trigger), WAIT, &pool));
        assert_eq!((first.format, first.part, first.seq), (PixelFormat::Mjpg, Some(PartId(7)), 0));
        assert_eq!(first.origin.product.as_deref(), Some("nut"));
        assert_eq!(first.origin.truth.as_ref().and_then(|t| t.defect.as_deref()), Some("cut"));
        drop(first);
        for (seq, value) in [(1, 9), (2, 10)] {
            let next = frame(source.grab(None, WAIT, &pool));
            assert_eq!((next.seq, next.pixels.first(), next.part), (seq, Some(&value), None));
            assert_eq!(next.origin.truth.as_ref().map(|t| t.defect.is_none()), Some(true));
        }
        assert!(matches!(source.grab(None, WAIT, &pool), Ok(Grab::End)));
        assert!(matches!(source.grab(None, WAIT, &pool), Ok(Grab::End)));
    }

    #[test]
    fn a_bad_file_is_named_and_passed_over() {
        let dir = tempfile::tempdir().unwrap();
        save(&dir.path().join("1.png"), 1);
        std::fs::write(dir.path().join("2.png"), b"broken").unwrap();
        save(&dir.path().join("3.png"), 3);
        let (mut source, pool) = (FolderSource::new(dir.path(), true, None), pool());
        assert_eq!(frame(source.grab(None, WAIT, &pool)).pixels.first(), Some(&1));
        let text = source.grab(None, WAIT, &pool).map(|_| ()).unwrap_err().to_string();
        assert!(text.contains("2.png"), "{text}");
        source.open().unwrap();
        assert_eq!(frame(source.grab(None, WAIT, &pool)).pixels.first(), Some(&3));
        assert_eq!(frame(source.grab(None, WAIT, &pool)).pixels.first(), Some(&1), "repeats");
    }

    #[test]
    fn an_empty_pool_or_a_slow_rate_is_a_time_out_that_loses_nothing() {
        let dir = tempfile::tempdir().unwrap();
        save(&dir.path().join("1.png"), 1);
        save(&dir.path().join("2.png"), 2);
        let pool = pool();
        let held = [pool.take(), pool.take()];
        let mut source = FolderSource::new(dir.path(), false, Some(0.01));
        let short = Duration::from_millis(5);
        assert!(matches!(source.grab(None, short, &pool), Ok(Grab::Timeout)));
        drop(held);
        // The second picture is due in 100 s; a trigger takes it at once.
        source.due = None;
        assert_eq!(frame(source.grab(None, WAIT, &pool)).pixels.first(), Some(&1));
        assert!(matches!(source.grab(None, short, &pool), Ok(Grab::Timeout)));
        let trigger = Trigger { part: PartId(1), received_ns: 0, deadline_ns: u64::MAX, encoder_ticks: 0 };
        assert_eq!(frame(source.grab(Some(&trigger), WAIT, &pool)).pixels.first(), Some(&2));
    }

    #[test]
    fn a_missing_or_empty_folder_says_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        for path in [dir.path().join("missing"), dir.path().to_path_buf()] {
            let text = FolderSource::new(&path, false, None).open().unwrap_err().to_string();
            assert!(text.contains("`path`") && text.contains(&*path.to_string_lossy()), "{text}");
        }
    }
}
