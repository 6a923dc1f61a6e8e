//! A folder of snapshot sets on disk: durable (temporary name, fsync, rename), bounded in size, never the cause of a full disk.
//!
//! A *set* is the files of one part: `<stem>.png` or `<stem>.jpg`, `<stem>.heat.png`, and last of all `<stem>.json`, so that a record on disk
//! means its pictures are complete. Stems sort by time. Files that do not look like ours are never touched.

use super::SnapshotError;
use rustix::fs::FlockOperation;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Files are counted in whole blocks, as file systems store them.
const BLOCK_BYTES: u64 = 4096;
/// Start and end of the name of a file that is still being written.
const TEMP_PREFIX: &str = ".cull-";
const TEMP_SUFFIX: &str = ".tmp";
/// Held while a recorder runs: two of them on one folder would delete each other's pictures.
const LOCK_NAME: &str = ".cull.lock";
/// What our files end in; the longest first.
const SUFFIXES: [&str; 4] = [".heat.png", ".json", ".png", ".jpg"];
const BYTES_PER_MB: u64 = 1_000_000;

/// What the store needs of a disk; a trait so that tests can fill it.
pub(crate) trait Disk: Send {
    /// Bytes that an ordinary user may still write where `folder` lies.
    fn free_bytes(&self, folder: &Path) -> io::Result<u64>;
    /// Write a new file and force it to the disk.
    fn write(&self, path: &Path, bytes: &[u8]) -> io::Result<()>;
}

/// The real thing.
pub(crate) struct RealDisk;

impl Disk for RealDisk {
    fn free_bytes(&self, folder: &Path) -> io::Result<u64> {
        let stats = rustix::fs::statvfs(folder)?;
        Ok(stats.f_bavail.saturating_mul(stats.f_frsize))
    }

    fn write(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let mut file = File::create(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    }
}

/// What became of a set.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Put {
    /// On disk, after removing this many older sets to make room.
    Written {
        /// Older sets removed.
        evicted: u64,
    },
    /// Not written: free disk is below the limit.
    LowDisk {
        /// Free bytes found.
        free_bytes: u64,
    },
}

/// The open folder.
pub(crate) struct Store<D> {
    folder: PathBuf,
    max_bytes: u64,
    min_free_bytes: u64,
    /// Bytes of each set on disk, by stem, oldest first.
    sets: BTreeMap<String, u64>,
    total_bytes: u64,
    disk: D,
    /// Unlocked when the store goes.
    _lock: File,
}

impl<D: Disk> Store<D> {
    /// Create the folder where needed, take its lock, remove files that an earlier process left half written, and measure what is there.
    pub(crate) fn open(folder: &Path, max_mb: u64, min_free_mb: u64, disk: D) -> Result<Self, SnapshotError> {
        let at = |source| SnapshotError::Folder { folder: folder.to_owned(), source };
        std::fs::create_dir_all(folder).map_err(at)?;
        let lock = File::options().create(true).truncate(false).write(true).open(folder.join(LOCK_NAME)).map_err(at)?;
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(SnapshotError::InUse { folder: folder.to_owned() }),
            // A file system without locks (some network shares): the pictures matter more than the guard.
            Err(error) => log::warn!("snapshots: cannot lock {}: {error}; make sure that only one cull writes there", folder.display()),
        }
        let mut store = Self {
            folder: folder.to_owned(),
            max_bytes: max_mb.saturating_mul(BYTES_PER_MB),
            min_free_bytes: min_free_mb.saturating_mul(BYTES_PER_MB),
            sets: BTreeMap::new(),
            total_bytes: 0,
            disk,
            _lock: lock,
        };
        for entry in std::fs::read_dir(folder).map_err(at)? {
            let entry = entry.map_err(at)?;
            let name = entry.file_name();
            let Some(name) = name.to_str() else { continue };
            if name.starts_with(TEMP_PREFIX) && name.ends_with(TEMP_SUFFIX) {
                log::info!("snapshots: removing {name}, left half written by an earlier run");
                remove(&entry.path()).map_err(at)?;
            } else if let Some(stem) = stem_of(name) {
                let bytes = blocks(entry.metadata().map_err(at)?.len());
                *store.sets.entry(stem.to_owned()).or_default() += bytes;
                store.total_bytes += bytes;
            }
        }
        store.make_room(0).map_err(at)?;
        Ok(store)
    }

    /// Write the files of one part, `(suffix, bytes)` each, the record last. Makes room first by removing the oldest sets.
    ///
    /// On an error nothing of this set stays behind, and nothing else was harmed.
    pub(crate) fn put(&mut self, stem: &str, files: &[(&str, &[u8])]) -> io::Result<Put> {
        let bytes: u64 = files.iter().map(|(_, content)| blocks(content.len() as u64)).sum();
        if bytes > self.max_bytes {
            return Err(io::Error::other(format!(
                "one picture takes {bytes} bytes, more than max_mb allows for all of them; raise max_mb"
            )));
        }
        let evicted = self.make_room(bytes)?;
        let free_bytes = self.disk.free_bytes(&self.folder)?;
        if free_bytes < self.min_free_bytes.saturating_add(bytes) {
            return Ok(Put::LowDisk { free_bytes });
        }
        if let Err(error) = self.write_all(stem, files) {
            for (suffix, _) in files {
                // Best effort: the error that matters is reported; a left-over temporary file goes at the next start.
                let _ = std::fs::remove_file(self.temp_path(stem, suffix));
                let _ = std::fs::remove_file(self.folder.join(format!("{stem}{suffix}")));
            }
            return Err(error);
        }
        *self.sets.entry(stem.to_owned()).or_default() += bytes;
        self.total_bytes += bytes;
        Ok(Put::Written { evicted })
    }

    /// Whether a set of this name is there already.
    pub(crate) fn contains(&self, stem: &str) -> bool {
        self.sets.contains_key(stem)
    }

    fn temp_path(&self, stem: &str, suffix: &str) -> PathBuf {
        self.folder.join(format!("{TEMP_PREFIX}{stem}{suffix}{TEMP_SUFFIX}"))
    }

    fn write_all(&self, stem: &str, files: &[(&str, &[u8])]) -> io::Result<()> {
        for (suffix, content) in files {
            self.disk.write(&self.temp_path(stem, suffix), content)?;
        }
        for (suffix, _) in files {
            std::fs::rename(self.temp_path(stem, suffix), self.folder.join(format!("{stem}{suffix}")))?;
        }
        // The names are on the disk only once the folder is.
        File::open(&self.folder)?.sync_all()
    }

    /// Remove the oldest sets until `bytes` more fit.
    fn make_room(&mut self, bytes: u64) -> io::Result<u64> {
        let mut evicted = 0;
        while self.total_bytes.saturating_add(bytes) > self.max_bytes {
            let Some((stem, freed)) = self.sets.pop_first() else { break };
            self.total_bytes = self.total_bytes.saturating_sub(freed);
            // The record first: it promises the pictures.
            for suffix in [".json", ".heat.png", ".png", ".jpg"] {
                remove(&self.folder.join(format!("{stem}{suffix}")))?;
            }
            evicted += 1;
        }
        Ok(evicted)
    }
}

fn blocks(bytes: u64) -> u64 {
    bytes.div_ceil(BLOCK_BYTES) * BLOCK_BYTES
}

/// Remove a file that may be gone already.
fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The stem of one of our file names; `None` for any other name.
pub(crate) fn stem_of(name: &str) -> Option<&str> {
    let stem = SUFFIXES.iter().find_map(|suffix| name.strip_suffix(suffix))?;
    // 20261124T203015.123Z-0007_…
    let (time, rest) = stem.split_at_checked(20)?;
    let shape = b"dddddddd.dddddd.ddd.";
    let right = |(have, want): (u8, &u8)| if *want == b'd' { have.is_ascii_digit() } else { matches!(have, b'T' | b'.' | b'Z') };
    (time.bytes().zip(shape).all(right) && rest.starts_with('-') && rest.contains('_')).then_some(stem)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    const SUFFIXES_WRITTEN: [&str; 3] = [".png", ".heat.png", ".json"];

    /// A disk that lies about its free space and can be full.
    struct FakeDisk {
        free_bytes: Cell<u64>,
        full_after: Cell<usize>,
    }

    impl Disk for FakeDisk {
        fn free_bytes(&self, _: &Path) -> io::Result<u64> {
            Ok(self.free_bytes.get())
        }

        fn write(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
            let left = self.full_after.get();
            if left == 0 {
                std::fs::write(path, &bytes[..bytes.len() / 2])?;
                return Err(io::Error::from(io::ErrorKind::StorageFull));
            }
            self.full_after.set(left - 1);
            RealDisk.write(path, bytes)
        }
    }

    fn fake(full_after: usize) -> FakeDisk {
        FakeDisk { free_bytes: Cell::new(u64::MAX), full_after: Cell::new(full_after) }
    }

    fn stem(second: u32) -> String {
        format!("20261124T2030{second:02}.000Z-0001_part{second}_reject")
    }

    fn files(folder: &Path) -> Vec<String> {
        let mut names: Vec<String> = std::fs::read_dir(folder)
            .expect("folder")
            .map(|entry| entry.expect("entry").file_name().into_string().expect("utf-8"))
            .collect();
        names.retain(|name| name != LOCK_NAME);
        names.sort();
        names
    }

    fn put<D: Disk>(store: &mut Store<D>, second: u32, bytes: usize) -> io::Result<Put> {
        let content = vec![7u8; bytes];
        store.put(&stem(second), &SUFFIXES_WRITTEN.map(|suffix| (suffix, content.as_slice())))
    }

    #[test]
    fn the_oldest_go_first_and_strangers_are_never_touched() {
        let folder = tempfile::tempdir().expect("temp folder");
        for name in ["notes.png", "20261124.json", "photo.heat.png"] {
            std::fs::write(folder.path().join(name), vec![0; 3_000_000]).expect("write");
        }
        let mut store = Store::open(folder.path(), 10, 0, RealDisk).expect("open");
        for second in 0..12 {
            put(&mut store, second, 1_000_000).expect("put");
        }
        let names = files(folder.path());
        assert!(names.contains(&"notes.png".to_owned()) && names.contains(&"20261124.json".to_owned()));
        // Three files of 1 MB (rounded up to blocks) a set: three sets fit into 10 MB.
        let kept: Vec<&String> = names.iter().filter(|name| name.contains("part")).collect();
        assert_eq!(kept.len(), 9, "{kept:?}");
        assert!(kept.iter().all(|name| ["part9", "part10", "part11"].iter().any(|part| name.contains(&format!("{part}_")))), "{kept:?}");

        // The same after a restart, with less room.
        drop(store);
        let _store = Store::open(folder.path(), 4, 0, RealDisk).expect("open again");
        assert_eq!(files(folder.path()).iter().filter(|name| name.contains("part11_")).count(), 3);
        assert_eq!(files(folder.path()).iter().filter(|name| name.contains("_reject")).count(), 3);
    }

    #[test]
    fn half_written_files_are_cleaned_at_start() {
        let folder = tempfile::tempdir().expect("temp folder");
        let temp = folder.path().join(format!("{TEMP_PREFIX}{}.png{TEMP_SUFFIX}", stem(1)));
        std::fs::write(&temp, b"half").expect("write");
        let _store = Store::open(folder.path(), 10, 0, RealDisk).expect("open");
        assert!(!temp.exists());
    }

    #[test]
    fn a_full_disk_leaves_nothing_behind_and_loses_nothing() {
        let folder = tempfile::tempdir().expect("temp folder");
        let mut store = Store::open(folder.path(), 10, 0, fake(5)).expect("open");
        put(&mut store, 1, 1000).expect("three files fit");
        let before = files(folder.path());
        let error = put(&mut store, 2, 1000).expect_err("the sixth file does not fit");
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        assert_eq!(files(folder.path()), before);
        store.disk.full_after.set(100);
        put(&mut store, 3, 1000).expect("room again");
        assert_eq!(files(folder.path()).len(), before.len() + 3);
    }

    #[test]
    fn nothing_is_written_when_the_disk_runs_low() {
        let folder = tempfile::tempdir().expect("temp folder");
        let mut store = Store::open(folder.path(), 10, 100, fake(100)).expect("open");
        store.disk.free_bytes.set(99_000_000);
        assert_eq!(put(&mut store, 1, 1000).expect("no error"), Put::LowDisk { free_bytes: 99_000_000 });
        assert!(files(folder.path()).is_empty());
        store.disk.free_bytes.set(200_000_000);
        assert_eq!(put(&mut store, 1, 1000).expect("written"), Put::Written { evicted: 0 });
    }

    #[test]
    fn two_recorders_never_share_a_folder() {
        let folder = tempfile::tempdir().expect("temp folder");
        let store = Store::open(folder.path(), 10, 0, RealDisk).expect("open");
        assert!(matches!(Store::open(folder.path(), 10, 0, RealDisk), Err(SnapshotError::InUse { .. })));
        drop(store);
        Store::open(folder.path(), 10, 0, RealDisk).expect("free again");
    }

    #[test]
    fn a_set_larger_than_all_room_is_refused_and_evicts_nothing() {
        let folder = tempfile::tempdir().expect("temp folder");
        let mut store = Store::open(folder.path(), 10, 0, RealDisk).expect("open");
        put(&mut store, 1, 1000).expect("put");
        assert!(put(&mut store, 2, 4_000_000).is_err());
        assert_eq!(files(folder.path()).len(), 3);
    }
}
