//! The body of `count`, at the place in the module tree where graph and plan expect each other.

#[path = "../../src/model/graph.rs"]
mod graph;
#[path = "../../src/model/plan.rs"]
mod plan;

use crate::kernels::isa::Isa;
use prost::Message;

/// The whole number after `"key":` (and perhaps `[`) in a bundle's metadata, the one at `index` of a list.
fn number(metadata: &str, key: &str, index: usize) -> Option<usize> {
    let rest = metadata.split_once(&format!("\"{key}\":"))?.1.trim_start_matches('[');
    rest.split(',').nth(index)?.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

pub fn run() -> Result<(), String> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().ok_or("usage: count BUNDLE FRAMES [THREADS]")?;
    let mut whole = || arguments.next().and_then(|text| text.parse::<usize>().ok());
    let (frames, threads) = (whole().unwrap_or(1), whole().unwrap_or(1));
    let bytes = std::fs::read(&path).map_err(|error| format!("{path}: {error}"))?;
    let proto = tract_onnx::pb::ModelProto::decode(&bytes[..]).map_err(|error| format!("{path}: {error}"))?;
    let metadata = proto.metadata_props.iter().find(|entry| entry.key == "cull").ok_or("no bundle: its metadata is missing")?;
    let find = |key, index| number(&metadata.value, key, index).ok_or_else(|| format!("its metadata has no {key}"));
    let (height, width, grid) = (find("height_px", 0)?, find("width_px", 0)?, [find("grid", 0)?, find("grid", 1)?]);
    let plan = plan::Plan::build(&proto, &[1, 3, height, width], grid, Isa::best()).map_err(|error| error.to_string())?;
    let mut seed = 1u64;
    let input: Vec<f32> = (0..3 * height * width)
        .map(|_| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 40) as f32 / (1u64 << 22) as f32 - 2.0
        })
        .collect();
    let mut state = plan.state(threads);
    let mut times = Vec::new();
    let mut digest = 0;
    for _ in 0..frames {
        let started = std::time::Instant::now();
        let map = plan.run(&mut state, &input);
        times.push(started.elapsed().as_secs_f64() * 1e3);
        digest = map.iter().fold(0u64, |digest, value| digest.wrapping_mul(31) ^ u64::from(value.to_bits()));
    }
    times.sort_by(f64::total_cmp);
    let at = |share: usize| times.get(times.len() * share / 100).copied().unwrap_or(f64::NAN);
    println!(
        "{}, {threads} threads, {} int8 steps, map {digest:016x}: min {:.3} ms, p10 {:.3}, p50 {:.3}",
        plan.isa.name(),
        plan.integer_steps(),
        at(0),
        at(10),
        at(50)
    );
    Ok(())
}
