//! The hot path allocates nothing per part after warm-up: counted by the global allocator, over the source, preprocess, inference and
//! verdict threads, with a scripted model that allocates nothing itself. (One test only: the counter is global.)

mod common;

use common::{FakeModel, FakeSource, Rig, SourceScript, options, pixel};
use cull::config::TriggerMode;
use cull::kernels::alloc::{CountingAllocator, counts};
use cull::plc::{HostState, PlcEvent, ToPlc};
use std::sync::Arc;
use std::time::Duration;

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

/// Enough for every pool item, channel and thread-local to have been used once.
const WARM_UP: u32 = 200;
const COUNTED: u32 = 2000;
/// Parts in flight at the same time.
const IN_FLIGHT: u32 = 8;

#[test]
fn the_hot_path_allocates_nothing_per_part() {
    let script = Arc::new(SourceScript::default());
    let value_of = |part| if part % 5 == 0 { pixel::DEFECT } else { pixel::GOOD };
    let rig = Rig::start(options(TriggerMode::Board, 2), FakeModel::new(Duration::ZERO), FakeSource::new(&script, value_of));
    rig.wait_for_state(HostState::Running);
    let closed_loop = |parts: std::ops::Range<u32>| {
        let (mut next, mut in_flight) = (parts.start, 0);
        while next < parts.end || in_flight > 0 {
            while next < parts.end && in_flight < IN_FLIGHT {
                rig.trigger(next, Duration::from_secs(50));
                next += 1;
                in_flight += 1;
            }
            if let ToPlc::Verdict { part, decided_ns, .. } = rig.from_line.recv_timeout(common::PATIENCE).unwrap() {
                in_flight -= 1;
                rig.to_line.send(PlcEvent::Acknowledged { part, received_ns: decided_ns + 1000 }).unwrap();
            }
        }
    };
    closed_loop(0..WARM_UP);
    let before = counts();
    assert!(before.pipeline > 0, "the counter must see the warm-up, or it sees nothing");
    closed_loop(WARM_UP..WARM_UP + COUNTED);
    let after = counts();
    assert_eq!(after.pipeline - before.pipeline, 0, "allocations over {COUNTED} parts");
    assert_eq!(after.model - before.model, 0, "the scripted model allocates nothing");
    assert_eq!(rig.running().stats().counts.parts, u64::from(WARM_UP + COUNTED));
}
