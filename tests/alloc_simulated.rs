//! The hot path with the real simulated line and the shipped model: the stages allocate nothing per part after warm-up; what the model
//! runtime allocates inside one inference is counted apart and printed. (One test only: the counter is global.)

mod common;

use cull::config::{Config, SourceConfig, TriggerMode};
use cull::frame::{PartId, now_ns};
use cull::kernels::alloc::{CountingAllocator, counts};
use cull::model::runtime::Model;
use cull::pipeline::{Options, Pipeline, Sinks};
use cull::plc::{HostState, LinkHandle, LinkState, PlcEvent, ToPlc};
use cull::source::Trigger;
use cull::source::simulated::SimulatedLine;
use std::path::Path;
use std::sync::Arc;

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/models/default.onnx");
/// All products and most defects of the line have come by then.
const WARM_UP: u32 = 60;
const COUNTED: u32 = 40;
/// One of so many windows must be without an allocation.
const MAX_WINDOWS: usize = 5;

#[test]
fn the_simulated_line_and_the_stages_allocate_nothing_per_part() {
    if !Path::new(MODEL).is_file() {
        eprintln!("SKIPPED: {MODEL} is not there yet");
        return;
    }
    let config =
        Config { source: SourceConfig::Simulated { seed: 1, defect_share: 0.3 }, trigger: TriggerMode::Board, ..Config::default() };
    let model = Model::load(Path::new(MODEL), 1).unwrap();
    let (link, from_line, to_line) = LinkHandle::detached();
    let source = Box::new(SimulatedLine::new(1, 0.3));
    let running = Pipeline::start(Options::from_config(&config), Arc::new(model), source, Some(link), Sinks::default()).unwrap();
    to_line.try_send(PlcEvent::Link(LinkState::Up)).unwrap();
    while running.stats().host_state != HostState::Running {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    let inspect = |parts: std::ops::Range<u32>| {
        for part in parts {
            let received_ns = now_ns();
            let trigger = Trigger { part: PartId(part), received_ns, deadline_ns: received_ns + 50_000_000_000, encoder_ticks: 0 };
            to_line.try_send(PlcEvent::Trigger(trigger)).unwrap();
            while !matches!(from_line.recv_timeout(common::PATIENCE).unwrap(), ToPlc::Verdict { .. }) {}
        }
    };
    inspect(0..WARM_UP);
    // The same parts again: what differs from part to part (a larger defect, a longer label) has been seen. More than once, since a channel's list of
    // waiting threads grows once, at the first time that a thread waits there.
    let mut seen = Vec::new();
    while seen.last() != Some(&0) {
        assert!(seen.len() < MAX_WINDOWS, "allocations per {COUNTED} parts: {seen:?}");
        let before = counts();
        inspect(WARM_UP - COUNTED..WARM_UP);
        let after = counts();
        eprintln!("model runtime: {:.1} allocations per inference", (after.model - before.model) as f64 / f64::from(COUNTED));
        seen.push(after.pipeline - before.pipeline);
    }
}
