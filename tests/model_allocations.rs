//! The hot path's own work on one frame (preprocess, inference, score, regions) allocates nothing after the first frame.

use cull::anomaly::{AnomalyMap, MAX_REGIONS, Scorer};
use cull::frame::{Frame, Origin, PixelFormat};
use cull::kernels::alloc::{Class, CountingAllocator, counted_as, counts};
use cull::model::bundle::Bundle;
use cull::model::runtime::Model;
use cull::model::testing::tiny_bundle;
use cull::pool::Pooled;
use cull::preprocess::Preprocessor;
use std::path::Path;

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

fn frame(format: PixelFormat, bytes_per_pixel: usize, seed: usize) -> Frame {
    let (width_px, height_px) = (320, 240);
    let mut pixels: Vec<u8> =
        (0..width_px as usize * height_px as usize * bytes_per_pixel).map(|i| ((i + seed) * 7919 % 251) as u8).collect();
    if format == PixelFormat::Mjpg {
        let rgb = std::mem::take(&mut pixels);
        // Another quality for each: the frames of a camera differ in length.
        let encoder = image::codecs::jpeg::JpegEncoder::new_with_quality(&mut pixels, 60 + 10 * seed as u8);
        image::ImageEncoder::write_image(encoder, &rgb, width_px, height_px, image::ExtendedColorType::Rgb8).expect("encodes");
    }
    Frame { pixels: Pooled::detached(pixels), format, width_px, height_px, captured_ns: 0, seq: 0, part: None, origin: Origin::default() }
}

fn check(bundle: Bundle) {
    // Helpers count, too.
    for threads_per_frame in [1, 2] {
        check_with(bundle.clone(), threads_per_frame);
    }
}

fn check_with(bundle: Bundle, threads_per_frame: usize) {
    let model = Model::from_bundle(bundle, threads_per_frame).expect("the model loads");
    assert!(model.facts().engine.starts_with("plan"), "runs as {}", model.facts().engine);
    let meta = model.meta();
    let mut session = model.session();
    let mut map = AnomalyMap::zeros(meta.grid);
    let mut scorer = Scorer::new(meta.score, meta.grid, [meta.preprocess.height_px as usize, meta.preprocess.width_px as usize]);
    let mut regions = Vec::with_capacity(MAX_REGIONS);
    let mut input = vec![0.0; meta.preprocess.input_len()];
    for (format, bytes_per_pixel) in [(PixelFormat::Rgb8, 3), (PixelFormat::Gray8, 1), (PixelFormat::Yuyv, 2), (PixelFormat::Mjpg, 3)] {
        let mut preprocessor = Preprocessor::new(&meta.preprocess, None);
        let mut inspect = |seed| {
            let frame = frame(format, bytes_per_pixel, seed);
            counted_as(Class::Pipeline, || {
                preprocessor.run(&frame, &mut input).expect("a good frame");
                session.infer(&input, &mut map).expect("inference");
                let score = scorer.score(&map);
                let threshold = map.values.iter().copied().fold(0.0, f32::max) / 2.0;
                scorer.regions(&map, threshold, &mut regions);
                assert!(score.is_finite() && meta.calibration.p_value(score) > 0.0 && !regions.is_empty());
            });
        };
        inspect(0);
        let before = counts();
        (1..4).for_each(&mut inspect);
        assert_eq!(counts(), before, "{format:?}");
    }
}

// One test: the counters are the process's.
#[test]
fn a_frame_allocates_nothing_after_the_first() {
    let counted = counts();
    counted_as(Class::Pipeline, || drop(vec![1u8; 10]));
    assert_ne!(counts(), counted, "the counting allocator is installed");
    check(Bundle::from_bytes(&tiny_bundle().expect("packs"), Path::new("tiny")).expect("verifies"));
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/default.onnx");
    match path.exists() {
        true => check(Bundle::load(&path).expect("the default bundle verifies")),
        false => eprintln!("SKIPPED: no {}", path.display()),
    }
}
