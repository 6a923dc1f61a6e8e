//! Recorder and journal on a disk that is really full: a small tmpfs, where this process may mount one.

use cull::anomaly::{AnomalyMap, ScoreRule};
use cull::config::{JournalConfig, Keep, SnapshotConfig};
use cull::frame::{Frame, Origin, PixelFormat, now_ns};
use cull::journal::{self, Entry};
use cull::pipeline::{Inspection, StageTimes};
use cull::pool::Pooled;
use cull::snapshot::overlay::Scale;
use cull::snapshot::{self, Context, Record};
use cull::verdict::{Decision, Reason, Verdict};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

const LONG: Duration = Duration::from_secs(60);

/// A mounted tmpfs of a few MB, unmounted when dropped.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount(mb: u32) -> Option<Self> {
        let folder = tempfile::tempdir().expect("temp folder");
        let size = format!("size={mb}m");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(folder.path()).output();
        if mounted.is_ok_and(|output| output.status.success()) {
            Some(Self(folder))
        } else {
            eprintln!("SKIPPED: no right to mount a small tmpfs");
            None
        }
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

fn inspection(seq: u64) -> Inspection {
    Inspection {
        part: None,
        seq,
        verdict: Verdict { decision: Decision::Reject, reason: Reason::Anomalous, score: 3.0, p_value: 0.001 },
        captured_ns: now_ns(),
        decided_ns: now_ns(),
        stages: StageTimes::default(),
        origin: Origin::default(),
    }
}

/// About 200 kB as PNG: noise does not compress.
fn record(seq: u64) -> Record {
    let mut state = seq.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let noise = (0..256 * 256 * 3)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        })
        .collect();
    let frame = Frame {
        pixels: Pooled::detached(noise),
        format: PixelFormat::Rgb8,
        width_px: 256,
        height_px: 256,
        captured_ns: now_ns(),
        seq,
        part: None,
        origin: Origin::default(),
    };
    Record { frame, map: Pooled::detached(AnomalyMap::default()), inspection: inspection(seq), roi: None }
}

#[test]
fn a_full_disk_stops_pictures_and_nothing_else() {
    let Some(disk) = SmallDisk::mount(4) else { return };
    let context = Context {
        line: "line".into(),
        model: "model".into(),
        model_sha256: String::new(),
        rule: ScoreRule::PooledMax { window_px: 16 },
        grid: [14, 14],
        input_px: [224, 224],
        scale: Scale::new(1.0, 2.0),
    };
    // The limit for all pictures is above what the disk holds, and no free space is kept: the disk itself says no.
    let folder = disk.path().join("snapshots");
    let config = SnapshotConfig { folder: Some(folder.clone()), keep: Keep::All, max_mb: 100, min_free_mb: 0 };
    let recorder = snapshot::spawn(&config, context.clone()).expect("spawn");
    let put = |seq| {
        let end = Instant::now() + LONG;
        while !recorder.try_record(record(seq)) {
            assert!(Instant::now() < end, "the recorder is stuck");
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    let settled = |parts| {
        let end = Instant::now() + LONG;
        loop {
            let counters = recorder.counters();
            if counters.written + counters.failed + counters.low_disk == parts {
                return counters;
            }
            assert!(Instant::now() < end, "{counters:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    (0..40).for_each(put);
    let full = settled(40);
    assert!(full.written >= 10 && full.failed + full.low_disk >= 10, "{full:?}");
    let (kept, unreadable) = snapshot::list(&folder).expect("list");
    assert!(unreadable.is_empty(), "{unreadable:?}");
    assert_eq!(kept.len() as u64, full.written, "every set that was written is whole");
    for record in &kept {
        image::open(folder.join(&record.picture)).expect("a whole picture");
    }
    // Room again: it goes on by itself.
    for record in &kept[..5] {
        std::fs::remove_file(folder.join(&record.picture)).expect("removed");
    }
    put(40);
    assert_eq!(settled(41).written, full.written + 1);
}

#[test]
fn a_full_disk_delays_verdicts_and_loses_none() {
    let Some(disk) = SmallDisk::mount(2) else { return };
    let path = disk.path().join("journal.db");
    let journal = journal::spawn(&JournalConfig { path: Some(path.clone()), max_rows: 1_000_000 }, "line").expect("spawn");
    let ballast = disk.path().join("ballast");
    // Fill the disk to the last byte.
    let mut bytes = 4 << 20;
    while bytes >= 4096 {
        if std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&ballast)
            .and_then(|mut file| std::io::Write::write_all(&mut file, &vec![1; bytes]))
            .is_err()
        {
            bytes /= 2;
        }
    }
    for seq in 0..2_000 {
        assert!(journal.try_write(Entry::from(inspection(seq))));
    }
    let end = Instant::now() + LONG;
    while journal.counters().retries == 0 {
        assert!(Instant::now() < end, "the disk never was full: {:?}", journal.counters());
        std::thread::sleep(Duration::from_millis(20));
    }
    std::fs::remove_file(&ballast).expect("removed");
    let end = Instant::now() + LONG;
    while journal.counters().written < 2_000 {
        assert!(Instant::now() < end, "{:?}", journal.counters());
        std::thread::sleep(Duration::from_millis(20));
    }
    let counters = journal.finish();
    assert_eq!((counters.lost, counters.replaced), (0, 0));
}
