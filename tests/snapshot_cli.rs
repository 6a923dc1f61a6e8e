//! `cull snapshots` as a user and a script call it.

use cull::anomaly::{AnomalyMap, ScoreRule};
use cull::config::{Keep, SnapshotConfig};
use cull::frame::{Frame, Origin, PartId, PixelFormat, now_ns};
use cull::pipeline::{Inspection, StageTimes};
use cull::pool::Pooled;
use cull::snapshot::overlay::Scale;
use cull::snapshot::{self, Context, Record};
use cull::verdict::{Decision, Reason, Verdict};
use std::path::Path;
use std::process::{Command, Output};

fn cull(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_cull")).arg("snapshots").args(arguments).output().expect("cull runs")
}

fn fill(folder: &Path) {
    let context = Context {
        line: "line".into(),
        model: "model".into(),
        model_sha256: "ab".into(),
        rule: ScoreRule::PooledMax { window_px: 16 },
        grid: [2, 2],
        input_px: [32, 32],
        scale: Scale::new(1.0, 2.0),
    };
    let config = SnapshotConfig { folder: Some(folder.to_owned()), keep: Keep::All, max_mb: 10, min_free_mb: 0 };
    let recorder = snapshot::spawn(&config, context).expect("spawn");
    for (part, decision, product) in [(1, Decision::Reject, "bottle cap"), (2, Decision::Accept, "label"), (3, Decision::Reject, "label")] {
        let frame = Frame {
            pixels: Pooled::detached(vec![part as u8; 32 * 32]),
            format: PixelFormat::Gray8,
            width_px: 32,
            height_px: 32,
            captured_ns: now_ns(),
            seq: u64::from(part),
            part: Some(PartId(part)),
            origin: Origin::default(),
        };
        let reason = if decision == Decision::Accept { Reason::Normal } else { Reason::Anomalous };
        let inspection = Inspection {
            part: Some(PartId(part)),
            seq: u64::from(part),
            verdict: Verdict { decision, reason, score: 1.5, p_value: 0.01 },
            captured_ns: now_ns(),
            decided_ns: now_ns(),
            stages: StageTimes::default(),
            origin: Origin { product: Some(product.into()), ..Origin::default() },
        };
        let map = AnomalyMap { grid_rows: 2, grid_cols: 2, values: vec![1.0; 4] };
        assert!(recorder.try_record(Record { frame, map: Pooled::detached(map), inspection, roi: None }));
    }
    assert_eq!(recorder.finish().written, 3);
}

fn parts(output: &Output) -> Vec<u64> {
    assert!(output.status.success(), "{output:?}");
    let records: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    records.as_array().expect("an array").iter().map(|record| record["part"].as_u64().expect("a part")).collect()
}

#[test]
fn list_and_export() {
    let folder = tempfile::tempdir().expect("temp folder");
    let from = folder.path().join("snapshots");
    fill(&from);
    let at = from.to_str().expect("utf-8");

    assert_eq!(parts(&cull(&["list", at, "--json"])), [3, 2, 1], "newest first");
    assert_eq!(parts(&cull(&["list", at, "--json", "--decision", "reject"])), [3, 1]);
    assert_eq!(parts(&cull(&["list", at, "--json", "--product", "label", "--limit", "1"])), [3]);
    assert_eq!(parts(&cull(&["list", at, "--json", "--part", "2"])), [2]);
    assert_eq!(parts(&cull(&["list", at, "--json", "--since", "2000-01-01", "--until", "9000-01-01"])), [3, 2, 1]);
    assert!(parts(&cull(&["list", at, "--json", "--until", "2000-01-01"])).is_empty());
    let table = String::from_utf8(cull(&["list", at]).stdout).expect("utf-8");
    assert!(table.lines().count() == 4 && table.contains("bottle cap") && table.contains("reject"), "{table}");

    let out = folder.path().join("report");
    let exported = cull(&["export", at, "--out", out.to_str().expect("utf-8"), "--decision", "reject", "--json"]);
    let answer: serde_json::Value = serde_json::from_slice(&exported.stdout).expect("JSON");
    assert_eq!(answer["parts"], 2);
    assert_eq!(std::fs::read_dir(&out).expect("folder").count(), 6, "picture, overlay and record of two parts");
    assert_eq!(parts(&cull(&["list", out.to_str().expect("utf-8"), "--json"])), [3, 1], "an export is a snapshot folder again");

    let train = folder.path().join("train");
    assert!(cull(&["export", at, "--out", train.to_str().expect("utf-8"), "--as-good"]).status.success());
    assert_eq!(std::fs::read_dir(train.join("label/train/good")).expect("folder").count(), 2);
    assert_eq!(std::fs::read_dir(train.join("bottle_cap/train/good")).expect("folder").count(), 1);
}

#[test]
fn mistakes_are_one_clear_sentence() {
    let missing = cull(&["list", "/no/such/folder"]);
    let error = String::from_utf8(missing.stderr).expect("utf-8");
    assert!(!missing.status.success() && error.contains("/no/such/folder"), "{error}");
    let folder = tempfile::tempdir().expect("temp folder");
    let time = cull(&["list", folder.path().to_str().expect("utf-8"), "--since", "yesterday"]);
    let error = String::from_utf8(time.stderr).expect("utf-8");
    assert!(!time.status.success() && error.contains("2026-11-24"), "{error}");
}

#[test]
fn a_record_that_points_elsewhere_copies_nothing_from_there() {
    let folder = tempfile::tempdir().expect("temp folder");
    let from = folder.path().join("snapshots");
    fill(&from);
    let record = std::fs::read_dir(&from)
        .expect("folder")
        .map(|entry| entry.expect("entry").path())
        .find(|path| path.extension().is_some_and(|end| end == "json"))
        .expect("a record");
    let secret = folder.path().join("secret.png");
    std::fs::write(&secret, "secret").expect("write");
    let mut value: serde_json::Value = serde_json::from_slice(&std::fs::read(&record).expect("read")).expect("JSON");
    value["picture"] = "../secret.png".into();
    std::fs::write(&record, value.to_string()).expect("write");
    let out = folder.path().join("out");
    assert!(!cull(&["export", from.to_str().expect("utf-8"), "--out", out.to_str().expect("utf-8")]).status.success());
    assert!(!out.join("secret.png").exists());
}
