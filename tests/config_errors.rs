//! What a user sees for each kind of mistake in a configuration: file:line:column, what was found, what is accepted.

use cull::config::{CameraDevice, Config, ConfigError, PlcConfig, SourceConfig};
use std::path::Path;

fn error_of(text: &str) -> String {
    match Config::parse(text, Path::new("line.ron")) {
        Ok(config) => panic!("accepted {text}\n{config:?}"),
        Err(error) => error.to_string(),
    }
}

/// The message starts with the position and contains every one of `parts`.
#[track_caller]
fn assert_error(text: &str, position: &str, parts: &[&str]) {
    let error = error_of(text);
    assert!(error.starts_with(&format!("line.ron:{position}: ")), "expected position {position}: {error}");
    assert!(!error.contains('\n'), "one line: {error}");
    for part in parts {
        assert!(error.contains(part), "expected {part:?} in: {error}");
    }
}

const CAMERA: &str = "device: Index(0), width_px: 640, height_px: 480, rate_hz: 30, format: Mjpg";

#[test]
fn unknown_fields_name_the_near_miss_and_all_accepted() {
    assert_error("(\n  lin: \"x\",\n)", "2:3", &["unknown field `lin`", "did you mean `line`?", "accepted: line, model, source"]);
    assert_error("(\n  inference: (wokers: 3),\n)", "2:15", &["unknown field `wokers` in `inference`", "did you mean `workers`?"]);
    assert_error("(falseRejectRate: 0.1)", "1:2", &["did you mean `false_reject_rate`?"]);
    assert!(!error_of("(zzz: 1)").contains("did you mean"), "nothing is near zzz");
}

#[test]
fn unknown_variants_name_the_near_miss_and_all_accepted() {
    assert_error("(\n trigger: board,\n)", "2:11", &["`trigger`", "`board`", "did you mean `Board`?", "accepted: FreeRunning, Board"]);
    assert_error("(source: Kamera(device: Index(0)))", "1:10", &["`source`", "did you mean `Camera`?", "Folder, Simulated"]);
    assert_error(&format!("(source: Camera({}))", CAMERA.replace("Mjpg", "MJPEG")), "1:87", &["`source.format`", "`MJPEG`", "Mjpg, Yuyv"]);
}

#[test]
fn values_of_the_wrong_kind_say_what_is_accepted() {
    assert_error("(\n  line: 3,\n)", "2:9", &["`line`", "found `3`", "a name of 1 to 64"]);
    assert_error("(\n  false_reject_rate: \"abc\",\n)", "2:22", &["`false_reject_rate`", "found `\"abc\"`", "above 0 and up to 0.5"]);
    assert_error("(inference: (workers: -3))", "1:23", &["`inference.workers`", "found `-3`", "a whole number from 1 to 64 (threads)"]);
    assert_error("(inference: (workers: 1.5))", "1:23", &["found `1.5`", "a whole number from 1 to 64"]);
    assert_error("(false_reject_rate: 0.1x)", "1:21", &["found `0.1x`"]);
    assert_error("(plc: Modbus(port: \"/dev/x\", role: Master, unit: 300))", "1:50", &["`plc.unit`", "found `300`", "from 1 to 247"]);
    assert_error("(trigger: \"Board\")", "1:11", &["`trigger`", "found `\"Board\"`", "FreeRunning or Board"]);
    assert_error("(journal: 3)", "1:11", &["`journal`", "found `3`", "(path: …"]);
    assert_error("(source: Simulated)", "1:10", &["`source`", "found `Simulated`", "Simulated(…)"]);
    assert_error("(source: Folder(path: pictures))", "1:23", &["`source.path`", "found `pictures`", "in quotes"]);
    let controls = format!("(source: Camera({CAMERA}, controls: [(\"gain\", \"high\")]))");
    assert_error(&controls, "1:113", &["`source.controls[0][1]`", "found `\"high\"`", "whole number"]);
}

#[test]
fn values_out_of_range_are_shown_with_position_and_range() {
    assert_error(
        "(\n  line: \"a\",\n  // comment ) (\n  false_reject_rate: 0.7,\n)",
        "4:22",
        &["`false_reject_rate`", "0.7 is out of range", "above 0 and up to 0.5"],
    );
    assert_error("(false_reject_rate: 0.0)", "1:21", &["above 0"]);
    assert_error("(false_reject_rate: NaN)", "1:21", &["out of range"]);
    assert_error("(inference: (workers: 65))", "1:23", &["65 is out of range", "from 1 to 64"]);
    assert_error("(plc: Bridge(port: \"/dev/x\", deadline_ms: 9))", "1:43", &["`plc.deadline_ms`", "from 10 to 60000 (ms)"]);
    assert_error("(source: Simulated(seed: 1, defect_share: 1.01))", "1:43", &["1.01 is out of range", "from 0 to 1"]);
    assert_error("(journal: (max_rows: 999))", "1:22", &["from 1000"]);
    assert_error("(line: \"\")", "1:8", &["1 to 64"]);
    assert_error("(model: \"\")", "1:9", &["the path is empty"]);
}

#[test]
fn of_several_mistakes_the_first_in_the_file_is_shown() {
    assert_error("(\n supervise: (stall_ms: 1),\n false_reject_rate: 9.0)", "2:24", &["supervise.stall_ms"]);
}

#[test]
fn contradictions_name_both_sides() {
    assert_error("(trigger: Board)", "1:11", &["needs a board", "`plc` is None"]);
    assert_error("(supervise: (backoff_min_ms: 500, backoff_max_ms: 100))", "1:30", &["500 is above backoff_max_ms (100)"]);
    // Against a default: shown at what was written.
    assert_error("(supervise: (backoff_max_ms: 100))", "1:13", &["200 is above backoff_max_ms (100)"]);
    let roi = format!("(source: Camera({CAMERA}),\nroi: (x_px: 600, y_px: 0, width_px: 100, height_px: 10))");
    assert_error(&roi, "2:6", &["outside the camera's 640x480"]);
    let twice = format!("(source: Camera({CAMERA}, controls: [(\"gain\", 1), (\"gain\", 2)]))");
    assert_error(&twice, "1:103", &["\"gain\" is given twice"]);
}

#[test]
fn ports_must_be_absolute() {
    assert_error("(plc: Bridge(port: \"ttyUSB0\"))", "1:20", &["`plc.port`", "did you mean \"/dev/ttyUSB0\"?"]);
}

#[test]
fn broken_syntax_is_described_where_it_breaks() {
    assert_error("(\n line: \"a\"\n model: \"b\",\n)", "3:2", &["expected `,`", "model"]);
    assert_error("(line: \"a\", line: \"b\")", "1:13", &["`line` is given twice"]);
    assert_error("(line = \"a\")", "1:7", &["expected `:`"]);
    assert_error("(\n line: \"a", "2:8", &["no closing quote"]);
    assert_error("(line: \"a\"),", "1:12", &["after the configuration's closing `)`"]);
    assert_error("", "1:1", &["starts with `(`", "the end of the text"]);
    assert_error("{line: \"a\"}", "1:1", &["starts with `(`"]);
    assert_error(&format!("(source: Camera(({CAMERA})))"), "1:17", &["one pair of parentheses too many"]);
    assert_error("#![enable(no_such)]\n()", "1:11", &["unknown RON extension `no_such`"]);
    assert_error("(/* never closed", "1:2", &["no closing `*/`"]);
}

#[test]
fn missing_fields_are_named_with_what_they_accept() {
    let text = format!("(\n  source: Camera({}),\n)", CAMERA.replace(", format: Mjpg", ""));
    assert_error(&text, "2:11", &["`source.format` is missing", "Mjpg or Yuyv"]);
    assert_error("(roi: (x_px: 1, y_px: 2))", "1:7", &["`roi.width_px` is missing", "from 1 to 16384"]);
}

#[test]
fn relative_paths_start_at_the_configuration() {
    let text = "(model: \"m.onnx\", source: Folder(path: \"../pictures\", rate_hz: 2.5), snapshots: (folder: \"/abs\"), journal: (path: \"j.db\"))";
    let config = Config::parse(text, Path::new("/etc/cull/line.ron")).expect("valid");
    assert_eq!(config.model, Path::new("/etc/cull/m.onnx"));
    assert_eq!(config.source, SourceConfig::Folder { path: "/etc/cull/../pictures".into(), repeat: false, rate_hz: Some(2.5) });
    assert_eq!(config.snapshots.folder.as_deref(), Some(Path::new("/abs")));
    assert_eq!(config.journal.path.as_deref(), Some(Path::new("/etc/cull/j.db")));
}

#[test]
fn variants_and_options_are_written_without_ceremony() {
    let text = format!(
        "(roi: (x_px: 0, y_px: 0, width_px: 64, height_px: 64), source: Camera({}), plc: Bridge(port: \"/dev/ttyACM0\", codename: 0xff))",
        CAMERA.replace("Index(0)", "Path(\"/dev/v4l/by-id/x\")")
    );
    let config = Config::parse(&text, Path::new("line.ron")).expect("valid");
    let SourceConfig::Camera(camera) = config.source else { panic!("a camera was configured") };
    assert_eq!(camera.device, CameraDevice::Path("/dev/v4l/by-id/x".into()));
    assert_eq!(config.roi.map(|r| r.width_px), Some(64));
    let PlcConfig::Bridge(bridge) = config.plc else { panic!("a bridge was configured") };
    assert_eq!((bridge.codename, bridge.baud, bridge.deadline_ms), (255, 115_200, 500));
    // With Some(…) too, as RON users may expect.
    Config::parse("(snapshots: (folder: Some(\"x\")))", Path::new("line.ron")).expect("valid");
}

#[test]
fn files_that_are_missing_binary_or_huge_end_in_one_clear_error() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let missing = Config::load(&folder.path().join("none.ron")).expect_err("there is no such file");
    assert!(matches!(missing, ConfigError::Read { .. }));
    assert!(missing.to_string().contains("none.ron") && missing.to_string().contains("deploy/cull.ron"), "{missing}");

    let binary = folder.path().join("binary.ron");
    std::fs::write(&binary, b"(line: \"a\",\n \xff\xfe)").expect("writable");
    let error = Config::load(&binary).expect_err("not UTF-8").to_string();
    assert!(error.contains("binary.ron:2:2: the file is not UTF-8"), "{error}");

    let huge = folder.path().join("huge.ron");
    std::fs::File::create(&huge).and_then(|f| f.set_len(3 << 20)).expect("writable");
    assert!(matches!(Config::load(&huge), Err(ConfigError::TooLarge { .. })));

    let bom = folder.path().join("bom.ron");
    std::fs::write(&bom, "\u{feff}(line: \"a\")").expect("writable");
    assert_eq!(Config::load(&bom).expect("a byte-order mark is harmless").line, "a");
}

#[test]
fn deep_nesting_is_an_error_not_a_crash() {
    let error = error_of(&format!("(roi: {}", "(".repeat(100_000)));
    assert!(error.starts_with("line.ron:1:"), "{error}");
}

mod hostile {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Cutting or damaging a good file anywhere gives a configuration or one line of error, never a panic.
        #[test]
        fn damaged_templates_are_survived(cut in 0usize..9000, insert in "[(){}\\[\\],:\"/*#=a-z0-9.-]{0,4}", remove in 0usize..30) {
            let template = include_str!("../deploy/cull.ron");
            let chars: Vec<char> = template.chars().collect();
            let cut = cut.min(chars.len());
            let text: String = chars[..cut].iter().copied().chain(insert.chars()).chain(chars[(cut + remove).min(chars.len())..].iter().copied()).collect();
            if let Err(error) = Config::parse(&text, Path::new("x.ron")) {
                let message = error.to_string();
                prop_assert!(message.starts_with("x.ron:") && !message.contains('\n'), "{}", message);
            }
        }
    }
}
