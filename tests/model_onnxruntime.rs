//! What `cull model quantize` writes stays plain ONNX: onnxruntime loads it and gives the map that we give, for the float file and for the 8-bit one.
//!
//! Needs a Python with onnxruntime and numpy: `CULL_PYTHON`, else `python3`. Without one the test says so and checks nothing.

use cull::anomaly::AnomalyMap;
use cull::model::bundle::Bundle;
use cull::model::runtime::Model;
use cull::model::testing::tiny_bundle;
use std::path::Path;
use std::process::Command;

/// Runs the model on the input beside it, both raw little-endian float32.
const SCRIPT: &str = r#"
import sys
import numpy, onnxruntime
model, source, sink = sys.argv[1:]
session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
x = session.get_inputs()[0]
session.run(None, {x.name: numpy.fromfile(source, "<f4").reshape(x.shape)})[0].astype("<f4").tofile(sink)
"#;

fn python() -> Option<String> {
    let python = std::env::var("CULL_PYTHON").unwrap_or_else(|_| "python3".into());
    let found = Command::new(&python).args(["-c", "import numpy, onnxruntime"]).output().is_ok_and(|output| output.status.success());
    found.then_some(python)
}

#[test]
fn onnxruntime_gives_our_map_for_the_float_and_the_eight_bit_file() {
    let Some(python) = python() else {
        eprintln!("SKIPPED: no Python with onnxruntime and numpy; set CULL_PYTHON to one");
        return;
    };
    let folder = tempfile::tempdir().expect("a temporary folder");
    let float = folder.path().join("float.onnx");
    std::fs::write(&float, tiny_bundle().expect("packs")).expect("written");
    let (bytes, quantized) = Bundle::load(&float).expect("a float model").quantized().expect("can be quantized");
    assert!(quantized.tensors > 0, "{quantized:?}");
    let small = folder.path().join("small.onnx");
    std::fs::write(&small, &bytes).expect("written");
    // In float only the order of sums differs; in 8 bit we round the activations, too, and onnxruntime does not.
    let mut cases = vec![(float, 1e-4), (small, 0.04)];
    // The default model is of 8 bit as it ships.
    let default = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/default.onnx");
    match default.exists() {
        true => cases.push((default, 0.04)),
        false => eprintln!("SKIPPED: no {}", default.display()),
    }
    for (file, tolerance) in &cases {
        let (tolerance, bundle) = (*tolerance, Bundle::load(file).expect("a bundle"));
        let model = Model::from_bundle(bundle, 1).expect("runs here");
        // Smooth, as a picture is, with a step in it.
        let width = model.meta().preprocess.width_px as usize;
        let input: Vec<f32> = (0..model.meta().preprocess.input_len())
            .map(|i| {
                let (x, y) = ((i % width) as f32, (i / width) as f32);
                (x / 17.0).sin() * (y / 23.0).cos() * 0.6 + if i % width > width / 2 { 0.3 } else { -0.1 }
            })
            .collect();
        let mut ours = AnomalyMap::default();
        model.session().infer(&input, &mut ours).expect("a map");
        let (source, sink) = (folder.path().join("input"), folder.path().join("output"));
        std::fs::write(&source, input.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>()).expect("written");
        let output = Command::new(&python).arg("-c").arg(SCRIPT).args([file.as_path(), &source, &sink]).output().expect("Python runs");
        assert!(output.status.success(), "onnxruntime on {}: {}", file.display(), String::from_utf8_lossy(&output.stderr));
        let raw = std::fs::read(&sink).expect("onnxruntime's map");
        let theirs: Vec<f32> = raw.chunks_exact(4).filter_map(|bytes| bytes.try_into().ok().map(f32::from_le_bytes)).collect();
        assert_eq!(ours.values.len(), theirs.len());
        let largest = theirs.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
        let worst = ours.values.iter().zip(&theirs).fold(0.0f32, |worst, (a, b)| worst.max((a - b).abs()));
        eprintln!("{} ({}): off by at most {:.2e} of the largest value", file.display(), model.facts().engine, worst / largest);
        assert!(largest > 0.0 && worst <= tolerance * largest, "{}: {worst} of {largest}", file.display());
    }
}
