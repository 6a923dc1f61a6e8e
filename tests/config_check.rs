//! `cull check` and `cull doctor` as a user runs them.

use std::path::Path;
use std::process::{Command, Output};

fn cull(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_cull")).args(args).env("CULL_LOG", "off").output().expect("the binary runs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn write(folder: &Path, config: &str) -> String {
    let path = folder.join("line.ron");
    std::fs::write(&path, config).expect("writable");
    path.display().to_string()
}

#[test]
fn a_good_configuration_is_summed_up_and_what_is_missing_here_is_a_warning() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = write(
        folder.path(),
        "(line: \"cell 7\", model: \"none.onnx\", source: Folder(path: \"pictures\"), plc: Bridge(port: \"/dev/serial/by-id/none\"), trigger: Board)",
    );
    let output = cull(&["check", "--config", &file]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let stdout = text(&output.stdout);
    for part in [": OK", "cell 7", "the board announces each part", "pictures does not exist", "by-id/none does not exist", "none.onnx"] {
        assert!(stdout.contains(part), "expected {part:?} in\n{stdout}");
    }
    // Aligned: values start in one column.
    let column = |name: &str| stdout.lines().find(|l| l.starts_with(name)).map(|l| l.len() - l[name.len()..].trim_start().len());
    assert_eq!(column("line"), column("false-reject rate"));
    assert_eq!(cull(&["check", "--config", &file, "--strict"]).status.code(), Some(1));

    let json: serde_json::Value = serde_json::from_slice(&cull(&["check", "--config", &file, "--json"]).stdout).expect("one JSON object");
    assert_eq!(json["ok"], true);
    assert_eq!(json["summary"]["line"], "cell 7");
    assert_eq!(json["warnings"].as_array().map(Vec::len), Some(3), "model, pictures, port: {json}");
}

#[test]
fn a_bad_configuration_ends_in_one_line_with_its_place() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = write(folder.path(), "(\n  false_reject_rate: 0.9,\n)");
    let output = cull(&["check", "--config", &file]);
    assert_eq!(output.status.code(), Some(1));
    assert!(output.stdout.is_empty());
    let stderr = text(&output.stderr);
    assert!(stderr.starts_with(&format!("{file}:2:22: `false_reject_rate`: 0.9 is out of range")), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");

    let json: serde_json::Value = serde_json::from_slice(&cull(&["check", "--config", &file, "--json"]).stdout).expect("one JSON object");
    assert_eq!((&json["ok"], &json["line"], &json["column"]), (&false.into(), &2.into(), &22.into()));
    assert!(json["error"].as_str().is_some_and(|e| e.contains("above 0 and up to 0.5")));
}

#[test]
fn the_doctor_reports_every_section_and_fails_on_what_stops_a_line() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = write(folder.path(), "(model: \"none.onnx\", plc: Bridge(port: \"/dev/serial/by-id/none\"))");
    let output = cull(&["doctor", "--config", &file]);
    assert_eq!(output.status.code(), Some(1), "a missing model and port stop a line");
    let stdout = text(&output.stdout);
    for part in ["cpu", "memory", "disk", "serial", "rights", "FAIL  model", "by-id/none is not there", "A line cannot run like this"] {
        assert!(stdout.contains(part), "expected {part:?} in\n{stdout}");
    }
    // Every warning and failure says what to do.
    let lines: Vec<&str> = stdout.lines().collect();
    for (index, line) in lines.iter().enumerate().filter(|(_, l)| l.starts_with("WARN") || l.starts_with("FAIL")) {
        let advice = lines[index + 1..].iter().take_while(|l| l.starts_with(' ')).any(|l| l.contains("-> "));
        assert!(advice, "no advice after {line:?}");
    }
    let json: serde_json::Value = serde_json::from_slice(&cull(&["doctor", "--config", &file, "--json"]).stdout).expect("one JSON object");
    assert_eq!(json["ok"], false);
    let findings = json["findings"].as_array().expect("a list");
    assert!(findings.iter().any(|f| f["section"] == "model" && f["level"] == "failure" && f["advice"].is_string()), "{json}");
}
