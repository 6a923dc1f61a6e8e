//! `cull collect` on the command line: the simulated line as a data set, pictures from a configured source, and what is refused.

use std::path::Path;
use std::process::{Command, Output};

fn collect(args: &[&str], out: &Path) -> Output {
    let command = Command::new(env!("CARGO_BIN_EXE_cull")).arg("collect").args(args).arg("--out").arg(out).output();
    command.expect("the binary runs")
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_simulated_set_and_then_pictures_from_it_as_a_source() {
    let dir = tempfile::tempdir().expect("a folder");
    let set = dir.path().join("set");
    let made = collect(&["--simulate", "--seed", "5", "--parts", "12", "--defect-share", "0.5", "--defect-size-px", "20..40"], &set);
    assert!(made.status.success(), "{}", stderr(&made));
    let truth: serde_json::Value = serde_json::from_slice(&std::fs::read(set.join("truth.json")).expect("truth.json")).expect("JSON");
    let defects = truth["defects"].as_array().expect("a list");
    assert!(!defects.is_empty() && defects.iter().all(|d| set.join(d["path"].as_str().unwrap_or("?")).is_file()));

    let again = collect(&["--simulate", "--parts", "12"], &set);
    assert!(!again.status.success() && stderr(&again).contains("--force"), "{}", stderr(&again));

    // A folder source over the set: all of its pictures, cropped to the roi, numbered on at the second run.
    let config = dir.path().join("line.ron");
    let text = format!("(source: Folder(path: {:?}), roi: Some(x_px: 10, y_px: 20, width_px: 300, height_px: 200))", set);
    std::fs::write(&config, text).expect("writable");
    let out = dir.path().join("parts");
    for run in 1..=2 {
        let taken = collect(&["--config", &config.display().to_string(), "--parts", "7"], &out);
        assert!(taken.status.success(), "{}", stderr(&taken));
        let pictures = cull::dataset::Dataset::scan(&out).expect("a data set").items;
        assert_eq!(pictures.len(), 7 * run);
        let frame = cull::dataset::load_frame(&pictures[0].path).expect("a picture");
        assert_eq!((frame.width_px, frame.height_px), (300, 200));
    }
}

#[test]
fn wrong_arguments_say_what_is_accepted() {
    let dir = tempfile::tempdir().expect("a folder");
    for (args, hint) in [
        (&["--simulate", "--defect-share", "2"][..], "0 to 1"),
        (&["--simulate", "--defect-size-px", "60..8"][..], "MIN..MAX"),
        (&["--simulate", "--parts", "0"][..], "1..="),
        (&[][..], "--simulate"),
        (&["--config", "nowhere.ron"][..], "nowhere.ron"),
        (&["--config", "nowhere.ron", "--seed", "3"][..], "cannot be used"),
    ] {
        let out = collect(args, &dir.path().join("out"));
        assert!(!out.status.success() && stderr(&out).contains(hint), "{args:?}: {}", stderr(&out));
        assert!(!dir.path().join("out").exists(), "{args:?} wrote something");
    }
}
