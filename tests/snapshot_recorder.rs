//! The recorder end to end: records in, complete sets on disk, readable again.

use cull::anomaly::{AnomalyMap, ScoreRule};
use cull::config::{Keep, SnapshotConfig};
use cull::frame::{Frame, Origin, PartId, PixelFormat, Truth, now_ns};
use cull::pipeline::{Inspection, StageTimes};
use cull::pool::{Pool, Pooled};
use cull::snapshot::overlay::{self, Legend, Scale, View};
use cull::snapshot::{self, Context, QUEUE_RECORDS, Record};
use cull::verdict::{Decision, Reason, Verdict, without_score};
use image::{Rgb, RgbImage};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

fn context() -> Context {
    Context {
        line: "test line".into(),
        model: "test model".into(),
        model_sha256: "00".into(),
        rule: ScoreRule::PooledMax { window_px: 16 },
        grid: [14, 14],
        input_px: [224, 224],
        scale: Scale::new(1.0, 2.0),
    }
}

/// A map at `base`, with a bump of height `peak` around the cell `(row, column)`.
fn map(base: f32, peak: f32, row: f32, column: f32, spread: f32) -> AnomalyMap {
    let values = (0..14 * 14)
        .map(|cell| {
            let (dy, dx) = ((cell / 14) as f32 - row, (cell % 14) as f32 - column);
            base + peak * (-(dx * dx + dy * dy) / (2.0 * spread * spread)).exp()
        })
        .collect();
    AnomalyMap { grid_rows: 14, grid_cols: 14, values }
}

fn frame(format: PixelFormat, pixels: Vec<u8>, seq: u64) -> Frame {
    Frame {
        pixels: Pooled::detached(pixels),
        format,
        width_px: 64,
        height_px: 48,
        captured_ns: now_ns(),
        seq,
        part: Some(PartId(seq as u32)),
        origin: Origin::default(),
    }
}

fn inspection(seq: u64, verdict: Verdict) -> Inspection {
    Inspection {
        part: Some(PartId(seq as u32)),
        seq,
        verdict,
        captured_ns: now_ns(),
        decided_ns: now_ns(),
        stages: StageTimes { queue_us: 1, preprocess_us: 2, inference_us: 3, verdict_us: 4 },
        origin: Origin { path: None, product: Some("metal".into()), truth: Some(Truth { defect: Some("scratch".into()) }) },
    }
}

const REJECT: Verdict = Verdict { decision: Decision::Reject, reason: Reason::Anomalous, score: 4.5, p_value: 0.0004 };
const ACCEPT: Verdict = Verdict { decision: Decision::Accept, reason: Reason::Normal, score: 1.1, p_value: 0.4 };

fn record(format: PixelFormat, pixels: Vec<u8>, seq: u64, verdict: Verdict) -> Record {
    let map = Pooled::detached(map(0.5, 4.0, 4.0, 9.0, 1.5));
    Record { frame: frame(format, pixels, seq), map, inspection: inspection(seq, verdict), roi: None }
}

fn config(folder: &Path, keep: Keep) -> SnapshotConfig {
    SnapshotConfig { folder: Some(folder.to_owned()), keep, max_mb: 100, min_free_mb: 0 }
}

#[test]
fn every_format_becomes_a_complete_set_that_can_be_read_again() {
    let folder = tempfile::tempdir().expect("temp folder");
    let recorder = snapshot::spawn(&config(folder.path(), Keep::Rejects), context()).expect("spawn");
    let picture = RgbImage::from_fn(64, 48, |x, y| Rgb([x as u8 * 4, y as u8 * 5, 128]));
    let mut jpeg = Vec::new();
    image::codecs::jpeg::JpegEncoder::new(&mut jpeg).encode_image(&picture).expect("jpeg");
    let formats = [
        (PixelFormat::Rgb8, picture.as_raw().clone()),
        (PixelFormat::Gray8, vec![90; 64 * 48]),
        (PixelFormat::Yuyv, [81, 90, 81, 240].repeat(64 * 48 / 2)),
        (PixelFormat::Mjpg, jpeg.clone()),
    ];
    for (seq, (format, pixels)) in (1u64..).zip(formats) {
        assert!(recorder.try_record(record(format, pixels, seq, REJECT)));
    }
    assert!(
        recorder.try_record(record(PixelFormat::Rgb8, picture.as_raw().clone(), 9, ACCEPT)),
        "accepted parts are not kept, and not an error"
    );
    let counters = recorder.finish();
    assert_eq!((counters.written, counters.failed, counters.queue_full), (4, 0, 0));

    let (records, unreadable) = snapshot::list(folder.path()).expect("list");
    assert!(unreadable.is_empty(), "{unreadable:?}");
    assert_eq!(records.iter().map(|record| record.part).collect::<Vec<_>>(), [Some(1), Some(2), Some(3), Some(4)]);
    for record in &records {
        assert_eq!((record.decision, record.reason), (Decision::Reject, Reason::Anomalous));
        assert_eq!((record.score, record.p_value, record.threshold), (Some(4.5), Some(0.0004), 2.0));
        assert_eq!((record.product.as_deref(), record.truth.as_deref()), (Some("metal"), Some("scratch")));
        assert_eq!(record.stages_us.inference, 3);
        // The bump's centre, on the grid at (4, 9) of 0..13, is in the region, in pixels of the picture.
        let region = record.regions.first().expect("one region");
        let (x, y) = (9 * 64 / 14, 4 * 48 / 14);
        assert!(
            (region.x_px..region.x_px + region.width_px).contains(&x) && (region.y_px..region.y_px + region.height_px).contains(&y),
            "{region:?}"
        );
        let shown = image::open(folder.path().join(&record.picture)).expect("picture").into_rgb8();
        assert_eq!(shown.dimensions(), (64, 48));
        let heat = image::open(folder.path().join(record.heat.as_ref().expect("overlay"))).expect("overlay").into_rgb8();
        assert_eq!(heat.width(), 64);
        assert!(heat.height() > 48, "with a caption");
    }
    let first = image::open(folder.path().join(&records[0].picture)).expect("picture").into_rgb8();
    assert_eq!(first, picture, "PNG is lossless");
    let red = image::open(folder.path().join(&records[2].picture)).expect("picture").into_rgb8();
    assert!(
        red.get_pixel(3, 3).0.iter().zip([255, 0, 0]).all(|(got, want)| got.abs_diff(want) <= 2),
        "YUYV red is red: {:?}",
        red.get_pixel(3, 3)
    );
    assert_eq!(std::fs::read(folder.path().join(&records[3].picture)).expect("jpeg"), jpeg, "the camera's own bytes");
}

#[test]
fn a_part_without_score_or_map_has_a_record_without_them() {
    let folder = tempfile::tempdir().expect("temp folder");
    let recorder = snapshot::spawn(&config(folder.path(), Keep::Rejects), context()).expect("spawn");
    let mut fault = record(PixelFormat::Gray8, vec![1; 64 * 48], 5, without_score(Reason::ModelError));
    fault.map = Pooled::detached(AnomalyMap::default());
    assert!(recorder.try_record(fault));
    assert_eq!(recorder.finish().written, 1);
    let (records, _) = snapshot::list(folder.path()).expect("list");
    assert_eq!((records[0].score, records[0].p_value, records[0].heat.as_deref()), (None, None, None));
    assert_eq!(records[0].decision, Decision::Fault);
}

#[test]
fn damaged_pictures_are_kept_or_counted_and_never_end_the_recorder() {
    let folder = tempfile::tempdir().expect("temp folder");
    let recorder = snapshot::spawn(&config(folder.path(), Keep::Rejects), context()).expect("spawn");
    recorder.try_record(record(PixelFormat::Mjpg, vec![0xff, 0xd8, 0xff, 0xd9], 1, without_score(Reason::BadFrame)));
    recorder.try_record(record(PixelFormat::Rgb8, vec![0; 5], 2, without_score(Reason::BadFrame)));
    recorder.try_record(record(PixelFormat::Gray8, vec![1; 64 * 48], 3, REJECT));
    let counters = recorder.finish();
    assert_eq!((counters.written, counters.failed), (2, 1), "the JPEG's bytes are evidence, five bytes of RGB are not");
}

#[test]
fn a_full_queue_never_blocks_and_gives_the_frames_back() {
    let folder = tempfile::tempdir().expect("temp folder");
    let recorder = snapshot::spawn(&config(folder.path(), Keep::All), context()).expect("spawn");
    let many = 20 * QUEUE_RECORDS;
    let frames = Pool::new(many, || vec![7u8; 64 * 48]);
    let mut taken = 0;
    for seq in 0..many as u64 {
        let mut record = record(PixelFormat::Gray8, Vec::new(), seq, ACCEPT);
        record.frame.pixels = frames.take().expect("one each");
        taken += u64::from(recorder.try_record(record));
    }
    let counters = recorder.finish();
    assert_eq!(counters.written, taken);
    assert_eq!(counters.written + counters.queue_full, many as u64);
    assert!(counters.queue_full > 0, "encoding and fsync take longer than handing over");
    assert_eq!(frames.idle(), many);
}

#[test]
fn without_a_folder_nothing_is_kept() {
    let recorder = snapshot::spawn(&SnapshotConfig::default(), context()).expect("spawn");
    assert!(!recorder.keeps(Decision::Reject));
    assert!(recorder.try_record(record(PixelFormat::Gray8, vec![1; 64 * 48], 1, REJECT)));
    assert_eq!(recorder.finish().written, 0);
}

/// Not a test of its own: the process that `kill_minus_nine_leaves_only_whole_sets` kills.
#[test]
fn child_that_records_until_killed() {
    let Some(folder) = std::env::var_os("CULL_TEST_RECORDER_CHILD") else { return };
    let recorder = snapshot::spawn(&config(Path::new(&folder), Keep::All), context()).expect("spawn");
    for seq in 0.. {
        while !recorder.try_record(record(PixelFormat::Gray8, vec![seq as u8; 64 * 48], seq, REJECT)) {
            std::thread::sleep(Duration::from_millis(1));
        }
        println!("written {}", recorder.counters().written);
    }
}

#[test]
fn kill_minus_nine_leaves_only_whole_sets() {
    let folder = tempfile::tempdir().expect("temp folder");
    let mut before = 0;
    for round in 0..3 {
        let mut child = Command::new(std::env::current_exe().expect("this test"))
            .args(["--exact", "child_that_records_until_killed", "--nocapture"])
            .env("CULL_TEST_RECORDER_CHILD", folder.path())
            .stdout(Stdio::piped())
            .spawn()
            .expect("child");
        let mut written = 0;
        for line in BufReader::new(child.stdout.take().expect("stdout")).lines() {
            if let Some(number) = line.expect("line").strip_prefix("written ") {
                written = number.parse().expect("number");
            }
            if written >= 20 {
                break;
            }
        }
        child.kill().expect("SIGKILL");
        child.wait().expect("gone");
        assert!(written >= 20, "the child wrote nothing in round {round}");

        // The next start cleans up, and every record's pictures are whole.
        snapshot::spawn(&config(folder.path(), Keep::All), context()).expect("re-open").finish();
        let (records, unreadable) = snapshot::list(folder.path()).expect("list");
        assert!(unreadable.is_empty(), "{unreadable:?}");
        assert!(records.len() >= before + written, "round {round}: {} records, {written} were written", records.len() - before);
        before = records.len();
        for record in &records {
            for name in [Some(&record.picture), record.heat.as_ref()].into_iter().flatten() {
                image::open(folder.path().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
            }
        }
        let left: Vec<_> = std::fs::read_dir(folder.path()).expect("folder").map(|entry| entry.expect("entry").file_name()).collect();
        assert!(left.iter().all(|name| !name.to_string_lossy().ends_with(".tmp")), "{left:?}");
    }
}

fn look_folder() -> Option<PathBuf> {
    let out = std::env::var_os("CULL_LOOK").map(PathBuf::from);
    match &out {
        Some(out) => std::fs::create_dir_all(out).expect("folder"),
        None => eprintln!("SKIPPED: set CULL_LOOK to a folder to see overlays"),
    }
    out
}

/// `CULL_LOOK=DIR cargo test --test snapshot_recorder look`: overlays over real pictures, for eyes. The maps are made up.
#[test]
fn look_at_overlays() {
    let Some(out) = look_folder() else { return };
    let shared = std::env::var_os("CULL_SHARED").map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared"), PathBuf::from);
    if !shared.is_dir() {
        eprintln!("SKIPPED: no pictures at {}", shared.display());
        return;
    }
    let scenes = [
        ("casting", "defect", map(0.7, 3.0, 4.0, 9.0, 1.2)),
        ("cookie", "broken", map(0.9, 6.0, 7.0, 3.0, 2.0)),
        ("fabric_a", "broken_end", map(0.8, 1.5, 10.0, 5.0, 1.0)),
        ("pcb", "short", map(0.9, 12.0, 3.0, 3.0, 0.8)),
        ("screw", "good", map(0.9, 0.6, 7.0, 7.0, 3.0)),
        ("magnetic_tile", "crack", map(0.9, 3.0, 6.0, 6.0, 2.0)),
    ];
    for (category, defect, map) in scenes {
        let folder = shared.join("data/industrial").join(category).join("test").join(defect);
        let file = std::fs::read_dir(&folder).expect("folder").map(|entry| entry.expect("entry").path()).min().expect("a picture");
        let picture = image::open(&file).expect("picture").into_rgb8();
        let context = context();
        let mut scorer = cull::anomaly::Scorer::new(context.rule, context.grid, context.input_px);
        let mut regions = Vec::new();
        scorer.regions(&map, context.scale.threshold(), &mut regions);
        let score = scorer.score(&map);
        let verdict = if score > context.scale.threshold() { Verdict { score, ..REJECT } } else { Verdict { score, ..ACCEPT } };
        let legend = Legend { verdict, part: Some(PartId(4711)), product: Some(category.into()) };
        let view = View { roi: None, input_px: context.input_px, scale: context.scale, regions: &regions, legend: Some(&legend) };
        overlay::render(&picture, &map, &view).save(out.join(format!("{category}.png"))).expect("saved");
    }
}

/// Likewise with the default model on the simulated line: what the demo's snapshots look like.
#[test]
fn look_at_the_simulated_line() {
    let Some(out) = look_folder() else { return };
    let model = cull::model::runtime::Model::load(&Path::new(env!("CARGO_MANIFEST_DIR")).join("models/default.onnx"), 1).expect("model");
    let meta = model.meta();
    let context = Context::new("demo", meta, 0.005);
    let recorder = snapshot::spawn(&config(&out.join("line"), Keep::All), context.clone()).expect("spawn");
    let mut session = model.session();
    let mut preprocessor = cull::preprocess::Preprocessor::new(&meta.preprocess, None);
    let mut scorer = cull::anomaly::Scorer::new(context.rule, context.grid, context.input_px);
    let mut line = cull::source::simulated::SimulatedLine::new(7, 0.7);
    let mut input = vec![0.0; meta.preprocess.input_len()];
    let mut recording = Duration::ZERO;
    for part in 0..12 {
        let mut pixels = Vec::new();
        let truth = line.render(part, &mut pixels);
        let mut inspection = inspection(u64::from(part), ACCEPT);
        inspection.origin.product = Some(truth.product.clone());
        inspection.origin.truth = None;
        let frame = Frame { width_px: 640, height_px: 480, ..frame(PixelFormat::Rgb8, pixels, u64::from(part)) };
        preprocessor.run(&frame, &mut input).expect("input");
        let mut map = AnomalyMap::zeros(meta.grid);
        session.infer(&input, &mut map).expect("inference");
        let score = scorer.score(&map);
        inspection.verdict =
            cull::verdict::decide(&cull::verdict::Policy { false_reject_rate: 0.005 }, score, meta.calibration.p_value(score));
        let mut record = Record { frame, map: Pooled::detached(map), inspection, roi: None };
        record.frame.part = Some(PartId(part));
        let start = Instant::now();
        assert!(recorder.try_record(record));
        while recorder.counters().written + recorder.counters().failed <= u64::from(part) {
            std::thread::sleep(Duration::from_millis(1));
        }
        recording += start.elapsed();
    }
    eprintln!("one 640x480 set with overlay, encoded and on the disk: {:.1} ms on average", recording.as_secs_f64() * 1e3 / 12.0);
    assert_eq!(recorder.finish().written, 12);
}
