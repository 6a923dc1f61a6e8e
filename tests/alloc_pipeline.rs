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

/// Parts of one count.
const WINDOW: u32 = 500;
/// So many windows in a row must be without an allocation …
const CLEAN_WINDOWS: u32 = 3;
/// … within so many. A channel's list of waiting threads grows once, at the first time that a thread waits there, and on a busy machine that
/// first time may come late; what is allocated per part, or per hundred parts, comes in every window.
const MAX_WINDOWS: u32 = 40;
/// Parts in flight at the same time.
const IN_FLIGHT: u32 = 8;

#[test]
fn the_hot_path_allocates_nothing_per_part() {
    let script = Arc::new(SourceScript::default());
    let value_of = |part| if part % 5 == 0 { pixel::DEFECT } else { pixel::GOOD };
    let mut rig = Rig::start(options(TriggerMode::Board, 2), FakeModel::new(Duration::ZERO), FakeSource::new(&script, value_of));
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
                rig.to_line.try_send(PlcEvent::Acknowledged { part, received_ns: decided_ns + 1000 }).unwrap();
            }
        }
    };
    closed_loop(0..WINDOW);
    assert!(counts().pipeline > 0, "the counter must see the warm-up, or it sees nothing");
    let mut seen = Vec::new();
    while seen.iter().rev().take_while(|n| **n == 0).count() < CLEAN_WINDOWS as usize {
        let window = seen.len() as u32 + 1;
        assert!(window <= MAX_WINDOWS, "allocations per {WINDOW} parts: {seen:?}");
        let before = counts();
        closed_loop(window * WINDOW..(window + 1) * WINDOW);
        let after = counts();
        seen.push(after.pipeline - before.pipeline);
        assert_eq!(after.model - before.model, 0, "the scripted model allocates nothing");
    }
    assert_eq!(rig.end().counts.parts, u64::from(WINDOW) * (seen.len() as u64 + 1));
}
