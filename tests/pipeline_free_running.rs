//! Free-running frames: a live source's newest frame wins and drops are counted; a source that can wait loses nothing.

mod common;

use common::{FakeModel, FakeSource, Rig, SourceScript, options, pixel};
use crossbeam_channel::bounded;
use cull::config::TriggerMode;
use cull::pipeline::{Inspection, Options, Pipeline, Sinks, Stats};
use cull::verdict::Decision;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Run a source of `frames` frames to its end.
fn run(options: Options, model: FakeModel, frames: u32, every_us: u32, value_of: fn(u32) -> u8) -> (Stats, Vec<Inspection>) {
    let script = Arc::new(SourceScript::default());
    script.end_after.store(frames, Ordering::SeqCst);
    script.every_us.store(every_us, Ordering::SeqCst);
    let (tap, inspections) = bounded(1024);
    let options = Options { tap: Some(tap), ..options };
    let running = Pipeline::start(options, Arc::new(model), FakeSource::new(&script, value_of), None, Sinks::default()).unwrap();
    let stats = running.wait().stats;
    (stats, inspections.try_iter().collect())
}

#[test]
fn a_source_that_can_wait_loses_nothing_and_stays_in_order() {
    let value_of = |seq| if seq % 7 == 0 { pixel::DEFECT } else { pixel::GOOD };
    let (stats, inspections) = run(options(TriggerMode::FreeRunning, 3), FakeModel::new(Duration::from_millis(1)), 50, 0, value_of);
    let seqs: Vec<u64> = inspections.iter().map(|i| i.seq).collect();
    assert_eq!(seqs, (1..=50).collect::<Vec<_>>());
    for i in &inspections {
        assert_eq!(i.verdict.decision, if i.seq % 7 == 0 { Decision::Reject } else { Decision::Accept }, "{i:?}");
    }
    assert_eq!((stats.counts.parts, stats.counts.dropped_frames, stats.fault), (50, 0, None));
}

#[test]
fn a_live_source_has_its_old_frames_replaced_and_counted() {
    let options = Options { lossless: false, live: true, ..options(TriggerMode::FreeRunning, 1) };
    let (stats, inspections) = run(options, FakeModel::new(Duration::from_millis(20)), 200, 500, |_| pixel::GOOD);
    assert_eq!(stats.counts.frames, 200);
    assert_eq!(stats.counts.parts + stats.counts.dropped_frames, 200, "{stats:?}");
    assert!(stats.counts.dropped_frames > 0, "{stats:?}");
    assert!(inspections.windows(2).all(|w| w[0].seq < w[1].seq));
    assert_eq!(inspections.last().map(|i| i.seq), Some(200), "the newest frame wins");
}

#[test]
fn a_full_tap_holds_no_live_source_up() {
    let script = Arc::new(SourceScript::default());
    script.end_after.store(20, Ordering::SeqCst);
    let (tap, _unread) = bounded(1);
    let options = Options { tap: Some(tap), lossless: false, live: true, ..options(TriggerMode::FreeRunning, 1) };
    let model = Arc::new(FakeModel::new(Duration::ZERO));
    let running = Pipeline::start(options, model, FakeSource::new(&script, |_| pixel::GOOD), None, Sinks::default()).unwrap();
    let counts = running.wait().stats.counts;
    assert_eq!((counts.parts + counts.dropped_frames, counts.parts - counts.tap_skipped), (20, 1));
}

#[test]
fn a_folder_waits_for_a_slow_printer_and_loses_nothing() {
    let script = Arc::new(SourceScript::default());
    script.end_after.store(20, Ordering::SeqCst);
    let (tap, inspections) = bounded(1);
    let options = Options { tap: Some(tap), ..options(TriggerMode::FreeRunning, 1) };
    let model = Arc::new(FakeModel::new(Duration::ZERO));
    let running = Pipeline::start(options, model, FakeSource::new(&script, |_| pixel::GOOD), None, Sinks::default()).unwrap();
    let slow = std::thread::spawn(move || inspections.iter().inspect(|_| std::thread::sleep(Duration::from_millis(3))).count());
    let counts = running.wait().stats.counts;
    assert_eq!((counts.parts, counts.tap_skipped), (20, 0));
    assert_eq!(slow.join().unwrap(), 20);
}

#[test]
fn a_stop_does_not_wait_for_a_printer_that_takes_nothing() {
    let script = Arc::new(SourceScript::default());
    let (tap, _unread) = bounded(1);
    let options = Options { tap: Some(tap), ..options(TriggerMode::FreeRunning, 1) };
    let model = Arc::new(FakeModel::new(Duration::ZERO));
    let running = Pipeline::start(options, model, FakeSource::new(&script, |_| pixel::GOOD), None, Sinks::default()).unwrap();
    while running.stats().counts.parts < 2 {
        std::thread::sleep(Duration::from_millis(1));
    }
    running.stop();
    assert!(running.wait().stats.counts.tap_skipped > 0);
}

#[test]
fn faults_leave_no_gap_in_the_order() {
    let value_of = |seq| if seq == 3 { pixel::PANIC } else { pixel::GOOD };
    let (stats, inspections) = run(options(TriggerMode::FreeRunning, 2), FakeModel::new(Duration::ZERO), 6, 0, value_of);
    assert_eq!(inspections.iter().map(|i| i.seq).collect::<Vec<_>>(), [1, 2, 3, 4, 5, 6]);
    assert_eq!((stats.counts.faults, stats.counts.accepted), (1, 5));
}

#[test]
fn a_source_that_cannot_be_opened_and_is_no_camera_ends_the_run_with_a_fault() {
    let script = Arc::new(SourceScript::default());
    script.broken.store(true, Ordering::SeqCst);
    let model = Arc::new(FakeModel::new(Duration::ZERO));
    let source = FakeSource::new(&script, |_| pixel::GOOD);
    let stats = Pipeline::start(options(TriggerMode::FreeRunning, 1), model, source, None, Sinks::default()).unwrap().wait().stats;
    assert!(stats.fault.is_some_and(|f| f.contains("scripted source")));
}

#[test]
fn frames_get_part_numbers_towards_a_plc_that_reads_the_last_result() {
    let script = Arc::new(SourceScript::default());
    script.end_after.store(5, Ordering::SeqCst);
    script.silent.store(true, Ordering::SeqCst);
    let options = Options { number_free_frames: true, ..options(TriggerMode::FreeRunning, 1) };
    let mut rig = Rig::start(options, FakeModel::new(Duration::ZERO), FakeSource::new(&script, |_| pixel::GOOD));
    while rig.running().stats().link != Some(cull::plc::LinkState::Up) {
        std::thread::sleep(Duration::from_millis(1));
    }
    script.silent.store(false, Ordering::SeqCst);
    for part in 1..=5 {
        assert_eq!(rig.verdict().0, part);
    }
    assert_eq!(rig.running.take().unwrap().wait().stats.counts.undelivered, 0);
}
