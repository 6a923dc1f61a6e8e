//! From a backbone file to a bundle of modes: the finished graph, in tract and in the inspector's own executor, gives the maps of the fit.

use burn::tensor::Device;
use cull::anomaly::ScoreRule;
use cull::model::runtime::{FeatureModel, Model};
use cull::preprocess::{PreprocessSpec, Preprocessor};
use cull_trainer::bundle::{ModesParts, write_modes};
use cull_trainer::features::{Extractor, stage_shapes};
use cull_trainer::modes::{Fitted, ModesConfig, fit};
use cull_trainer::onnx::{Backbone, feature_file};
use prost::Message;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use tract_onnx::pb;

const SIDE: usize = 32;
const GRID: [usize; 2] = [4, 4];

fn info(name: &str, dims: &[i64]) -> pb::ValueInfoProto {
    use pb::tensor_shape_proto::{Dimension, dimension::Value};
    let dim = dims.iter().map(|d| Dimension { denotation: String::new(), value: (*d > 0).then_some(Value::DimValue(*d)) }).collect();
    let tensor = pb::type_proto::Tensor { elem_type: 1, shape: Some(pb::TensorShapeProto { dim }) };
    pb::ValueInfoProto {
        name: name.into(),
        r#type: Some(pb::TypeProto { denotation: String::new(), value: Some(pb::type_proto::Value::TensorType(tensor)) }),
        ..Default::default()
    }
}

fn ints(name: &str, values: &[i64]) -> pb::AttributeProto {
    let r#type = pb::attribute_proto::AttributeType::Ints as i32;
    pb::AttributeProto { name: name.into(), ints: values.to_vec(), r#type, ..Default::default() }
}

/// Three stages: 16x16 (4 cells a grid side), 10x10 (no multiple of the grid), 2x2 (coarser than the grid).
fn backbone(path: &Path) {
    backbone_of(path, 1);
}

/// The same shapes with weights from a seed.
fn backbone_of(path: &Path, mut seed: u64) {
    let mut graph = pb::GraphProto { name: "b".into(), ..Default::default() };
    graph.input.push(info("image", &[1, 3, SIDE as i64, SIDE as i64]));
    let mut previous = ("image".to_owned(), 3usize);
    for (name, outputs, kernel, stride) in [("f2", 5usize, 2usize, 2i64), ("f3", 6, 7, 1), ("f16", 7, 5, 5)] {
        let count = outputs * previous.1 * kernel * kernel;
        let values: Vec<f32> = (0..count)
            .map(|_| {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                ((seed >> 40) as f32 / (1u32 << 23) as f32 - 1.0) / ((previous.1 * kernel * kernel) as f32).sqrt()
            })
            .collect();
        graph.initializer.push(pb::TensorProto {
            name: format!("{name}_w"),
            data_type: 1,
            dims: [outputs, previous.1, kernel, kernel].map(|d| d as i64).to_vec(),
            raw_data: values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            ..Default::default()
        });
        graph.node.push(pb::NodeProto {
            op_type: "Conv".into(),
            name: name.into(),
            input: vec![previous.0.clone(), format!("{name}_w")],
            output: vec![format!("{name}_conv")],
            attribute: vec![ints("kernel_shape", &[kernel as i64; 2]), ints("strides", &[stride; 2])],
            ..Default::default()
        });
        graph.node.push(pb::NodeProto {
            op_type: "Relu".into(),
            name: format!("{name}_relu"),
            input: vec![format!("{name}_conv")],
            output: vec![name.into()],
            ..Default::default()
        });
        graph.output.push(info(name, &[1, outputs as i64, 0, 0]));
        previous = (name.into(), outputs);
    }
    let model = pb::ModelProto {
        ir_version: 8,
        opset_import: vec![pb::OperatorSetIdProto { domain: String::new(), version: 13 }],
        graph: Some(graph),
        ..Default::default()
    };
    std::fs::write(path, model.encode_to_vec()).unwrap();
}

/// Two products, told apart by their colour, with noise.
fn pictures(dir: &Path) -> Vec<PathBuf> {
    let mut seed = 9u64;
    (0..48)
        .map(|i| {
            let pixels: Vec<u8> = (0..SIDE * SIDE * 3)
                .map(|at| {
                    seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    let noise = (seed >> 59) as u8;
                    let (x, channel) = (at / 3 % SIDE, at % 3);
                    let base = if i % 2 == 0 { [180, 60, 60][channel] } else { [40, 90, 170][channel] };
                    base + noise + if x > 12 && x < 20 { 30 } else { 0 }
                })
                .collect();
            let path = dir.join(format!("{i:02}.png"));
            image::save_buffer(&path, &pixels, SIDE as u32, SIDE as u32, image::ExtendedColorType::Rgb8).unwrap();
            path
        })
        .collect()
}

#[test]
fn the_bundle_gives_the_maps_of_the_fit_in_both_engines() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("backbone.onnx");
    backbone(&file);
    let backbone = Backbone::load(&file).unwrap();
    let stages = ["f2", "f3", "f16"].map(str::to_owned);
    let shapes = stage_shapes(&backbone.stages(&stages, [SIDE; 2]).unwrap(), [SIDE; 2], dir.path()).unwrap();
    assert_eq!(shapes, [[5, 16, 16], [6, 10, 10], [7, 2, 2]]);
    let (graph, joined) = backbone.cell_features(&stages, &shapes, GRID, [SIDE; 2]).unwrap();
    let spec = PreprocessSpec { width_px: SIDE as u32, height_px: SIDE as u32, mean: [127.0; 3], std: [128.0; 3] };
    let extractor = Extractor::new(&feature_file(graph.clone(), &joined, GRID), &spec, GRID, dir.path(), 1).unwrap();
    let paths = pictures(dir.path());
    let found = extractor.extract(&paths, true, &AtomicBool::new(false), &|| {}).unwrap();
    // Mean and maximum of the two stages finer than the grid; the coarse one as it is.
    assert_eq!((found.set.len(), found.set.channels), (48, 2 * 5 + 2 * 6 + 7));

    let config = ModesConfig { images_per_group: 24, ridge: 0.05, score: ScoreRule::PooledMax { window_px: 4 }, ..ModesConfig::default() };
    let device = Device::flex();
    let Fitted { modes, mode_of, scores } = fit(&found.set, &config, [SIDE; 2], &device, &mut |_, _| {}).unwrap();
    assert_eq!(modes.count, 2);
    assert!((0..48).all(|i| mode_of[i] == mode_of[i % 2]), "products are modes");
    let maps = modes.maps(&found.set, &device);
    let out = dir.path().join("out.onnx");
    let parts = |modes| ModesParts {
        name: "out".into(),
        spec: &spec,
        grid: GRID,
        features: (graph.clone(), joined.as_str()),
        modes,
        score: config.score,
        scores: &scores,
        trained_on: vec!["a".into()],
        notes: String::new(),
    };
    let worst = write_modes(&out, parts(&modes), &paths, &maps).unwrap();
    println!("maps of the right features: {worst:.5} of the way to the threshold");
    assert!(worst < cull_trainer::bundle::MAP_TOLERANCE / 2.0, "{worst}");

    let model = Model::load(&out, 1).unwrap();
    assert!(model.facts().engine.starts_with("plan"), "{}: an operator of the graph is not lowered", model.facts().engine);
    let mut session = model.session();
    let mut tract = FeatureModel::load(&out, [3, SIDE, SIDE]).unwrap();
    let mut preprocessor = Preprocessor::new(&spec, None);
    let mut input = vec![0.0; spec.input_len()];
    for (path, expected) in paths.iter().zip(&maps) {
        let frame = cull::dataset::load_frame(path).unwrap();
        preprocessor.run(&frame, &mut input).unwrap();
        let mut map = cull::anomaly::AnomalyMap::zeros(GRID);
        session.infer(&input, &mut map).unwrap();
        let other = &tract.run(&input).unwrap()[0].values;
        let largest = expected.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        for ((a, b), c) in map.values.iter().zip(other).zip(expected) {
            assert!((a - b).abs() <= 1e-3 * largest && (a - c).abs() <= 0.02 * largest, "{a} {b} {c} of {largest}");
        }
    }

    // Features of another preprocessing or backbone are far off: the bundle refuses, by a wide margin.
    let off_by = |graph: &cull_trainer::onnx::Graph, spec: &PreprocessSpec| -> f32 {
        let mut wrong = parts(&modes);
        (wrong.features.0, wrong.spec) = (graph.clone(), spec);
        match write_modes(&dir.path().join("wrong.onnx"), wrong, &paths, &maps) {
            Ok(figure) => figure,
            Err(error) => {
                let text = error.to_string();
                let (_, figure) = text.split_once("differs from the fitted one by ").expect("says by how much");
                figure.split_once(' ').and_then(|(figure, _)| figure.parse::<f32>().ok()).expect("a figure") / 100.0
            }
        }
    };
    let other_backbone = dir.path().join("other.onnx");
    backbone_of(&other_backbone, 2);
    let (other_graph, _) = Backbone::load(&other_backbone).unwrap().cell_features(&stages, &shapes, GRID, [SIDE; 2]).unwrap();
    for (what, figure) in [
        ("another backbone", off_by(&other_graph, &spec)),
        ("another pixel mean", off_by(&graph, &PreprocessSpec { mean: [110.0; 3], ..spec.clone() })),
        ("pixels from 0 to 1", off_by(&graph, &PreprocessSpec { mean: [0.0; 3], std: [255.0; 3], ..spec.clone() })),
    ] {
        println!("maps of {what}: {figure:.3} of the way to the threshold");
        assert!(figure > 2.0 * cull_trainer::bundle::MAP_TOLERANCE, "{what}: {figure}");
    }

    // A fit that is not the graph's is not shipped, and the bundle there stays.
    let before = std::fs::read(&out).unwrap();
    let mut other = maps.clone();
    other[0][3] += 100.0;
    assert!(write_modes(&out, parts(&modes), &paths, &other).unwrap_err().to_string().contains("differs from the fitted one"));
    assert_eq!(std::fs::read(&out).unwrap(), before);
}
