//! Triggered parts: every one gets a verdict before its deadline, in part order, whatever the source and the model do.

mod common;

use common::{FakeModel, FakeSource, Rig, SourceScript, options, pixel};
use cull::config::TriggerMode;
use cull::pipeline::Pipeline;
use cull::plc::{HostState, LinkState, PlcCommand, PlcEvent, ToPlc};
use cull::verdict::{Decision, Reason};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

const LONG: Duration = Duration::from_secs(50);

fn rig(workers: usize, work: Duration, value_of: impl Fn(u32) -> u8 + Send + 'static) -> (Rig, Arc<SourceScript>, Arc<common::Gate>) {
    let script = Arc::new(SourceScript::default());
    let model = FakeModel::new(work);
    let gate = Arc::clone(&model.gate);
    let rig = Rig::start(options(TriggerMode::Board, workers), model, FakeSource::new(&script, value_of));
    rig.wait_for_state(HostState::Running);
    (rig, script, gate)
}

#[test]
fn every_part_gets_its_own_verdict_in_part_order() {
    let (mut rig, _, _) = rig(3, Duration::from_millis(1), |part| if part % 5 == 0 { pixel::DEFECT } else { pixel::GOOD });
    for part in 1..=60 {
        rig.trigger(part, LONG);
    }
    for part in 1..=60 {
        let (got, verdict) = rig.verdict();
        assert_eq!(got, part);
        assert_eq!(verdict.decision, if part % 5 == 0 { Decision::Reject } else { Decision::Accept }, "part {part}: {verdict:?}");
    }
    let stats = rig.end();
    assert_eq!((stats.counts.parts, stats.counts.accepted, stats.counts.rejected), (60, 48, 12));
    assert_eq!(stats.latency_ms.total.count, 60);
    assert_eq!(stats.latency_ms.response.count, 60);
}

#[test]
fn a_stuck_part_is_unknown_at_its_deadline_and_holds_up_nobody_beyond_theirs() {
    let (mut rig, _, gate) = rig(2, Duration::ZERO, |part| if part == 1 { pixel::HANG } else { pixel::GOOD });
    rig.trigger(1, Duration::from_secs(2));
    rig.trigger(2, LONG);
    rig.trigger(3, LONG);
    let (part, verdict) = rig.verdict();
    assert_eq!((part, verdict.decision, verdict.reason), (1, Decision::Unknown, Reason::DeadlineMissed));
    assert_eq!(rig.verdict().0, 2);
    assert_eq!(rig.verdict().0, 3);
    gate.open();
    let stats = rig.end();
    assert_eq!(stats.counts.missed_deadline, 1);
    assert_eq!(stats.counts.late_results, 1, "the stuck part's result came after its deadline");
    assert_eq!(stats.counts.accepted, 2);
    assert_eq!(stats.fault, None);
}

#[test]
fn a_panic_and_an_error_are_faults_and_the_line_goes_on() {
    let (rig, _, _) = rig(1, Duration::ZERO, |part| match part {
        2 => pixel::PANIC,
        3 => pixel::ERROR,
        4 => pixel::NOT_FINITE,
        _ => pixel::GOOD,
    });
    for part in 1..=5 {
        rig.trigger(part, LONG);
    }
    let got: Vec<_> = (0..5).map(|_| rig.verdict()).map(|(part, v)| (part, v.decision, v.reason)).collect();
    assert_eq!(
        got,
        [
            (1, Decision::Accept, Reason::Normal),
            (2, Decision::Fault, Reason::ModelError),
            (3, Decision::Fault, Reason::ModelError),
            (4, Decision::Fault, Reason::NotFinite),
            (5, Decision::Accept, Reason::Normal),
        ]
    );
    assert_eq!(rig.running().stats().counts.panics, 1);
}

#[test]
fn repeated_failure_is_an_internal_fault_and_stops_the_line() {
    let (mut rig, _, _) = rig(2, Duration::ZERO, |_| pixel::PANIC);
    for part in 1..=20 {
        rig.trigger(part, LONG);
    }
    rig.wait_for_state(HostState::InternalFault);
    let stats = rig.running.take().unwrap().wait().stats;
    assert!(stats.fault.is_some(), "{stats:?}");
    assert_eq!(stats.counts.accepted, 0);
    assert_eq!(stats.host_state, HostState::InternalFault);
}

#[test]
fn stop_finishes_what_is_in_flight_then_says_stopped() {
    let (mut rig, _, _) = rig(2, Duration::from_millis(5), |_| pixel::GOOD);
    for part in 1..=30 {
        rig.trigger(part, LONG);
    }
    assert_eq!(rig.verdict().0, 1);
    let stats = rig.end();
    let rest: Vec<ToPlc> = rig.from_line.iter().collect(); // ends: the line has closed its end
    assert_eq!(rest.last(), Some(&ToPlc::HostState(HostState::Stopped)));
    let parts: Vec<u32> = rest.iter().filter_map(|m| if let ToPlc::Verdict { part, .. } = m { Some(part.0) } else { None }).collect();
    assert!(parts.windows(2).all(|w| w[0] < w[1]), "{parts:?}");
    // Every part that the line took in has a verdict; triggers still in the link's queue at the end are the board's to reject.
    assert_eq!(stats.counts.parts, 1 + parts.len() as u64);
    assert_eq!(stats.counts.accepted + stats.counts.while_stopped, stats.counts.parts);
    assert_eq!(stats.fault, None);
}

#[test]
fn without_a_frame_the_part_is_unknown_before_its_deadline() {
    let (rig, script, _) = rig(1, Duration::ZERO, |_| pixel::GOOD);
    script.silent.store(true, Ordering::SeqCst);
    rig.trigger(1, Duration::from_secs(1));
    let (part, verdict) = rig.verdict();
    assert_eq!((part, verdict.decision), (1, Decision::Unknown));
    script.silent.store(false, Ordering::SeqCst);
    rig.trigger(2, LONG);
    let (part, verdict) = rig.verdict();
    assert_eq!((part, verdict.decision), (2, Decision::Accept));
}

#[test]
fn a_stalled_camera_is_told_reopened_and_taken_back() {
    let script = Arc::new(SourceScript::default());
    let options = cull::pipeline::Options { live: true, ..options(TriggerMode::Board, 1) };
    let rig = Rig::start(options, FakeModel::new(Duration::ZERO), FakeSource::new(&script, |_| pixel::GOOD));
    rig.wait_for_state(HostState::Running);
    script.silent.store(true, Ordering::SeqCst);
    rig.wait_for_state(HostState::CameraFault);
    rig.trigger(1, LONG);
    let (part, verdict) = rig.verdict();
    assert_eq!((part, verdict.decision, verdict.reason), (1, Decision::Unknown, Reason::NoFrame));
    script.broken.store(true, Ordering::SeqCst);
    let opens = script.opens.load(Ordering::SeqCst);
    while script.opens.load(Ordering::SeqCst) < opens + 3 {
        std::thread::sleep(Duration::from_millis(5));
    }
    script.broken.store(false, Ordering::SeqCst);
    script.silent.store(false, Ordering::SeqCst);
    rig.wait_for_state(HostState::Running);
    rig.trigger(2, LONG);
    assert_eq!(rig.verdict().1.decision, Decision::Accept);
    assert!(rig.running().stats().counts.source_restarts >= 3);
}

#[test]
fn a_broken_link_takes_its_parts_with_it() {
    let (mut rig, _, gate) = rig(2, Duration::ZERO, |part| if part == 1 { pixel::HANG } else { pixel::GOOD });
    rig.trigger(1, LONG);
    rig.trigger(2, LONG);
    rig.to_line.try_send(PlcEvent::Link(LinkState::Down)).unwrap();
    while rig.running().stats().counts.link_lost == 0 {
        std::thread::sleep(Duration::from_millis(1));
    }
    gate.open();
    // The board came back and numbers its parts afresh: the old part 1's verdict must not reach the new part 1.
    rig.to_line.try_send(PlcEvent::Link(LinkState::Up)).unwrap();
    rig.trigger(3, LONG);
    assert_eq!(rig.verdict().0, 3);
    let counts = rig.end().counts;
    assert!(counts.undelivered >= 1, "{counts:?}");
    assert_eq!(counts.parts, 3);
}

#[test]
fn the_plc_pauses_and_starts_the_line() {
    let (rig, _, _) = rig(1, Duration::ZERO, |_| pixel::GOOD);
    rig.to_line.try_send(PlcEvent::Command(PlcCommand::Pause)).unwrap();
    rig.wait_for_state(HostState::Stopped);
    rig.trigger(1, LONG);
    let (_, verdict) = rig.verdict();
    assert_eq!((verdict.decision, verdict.reason), (Decision::Unknown, Reason::Stopped));
    rig.to_line.try_send(PlcEvent::Command(PlcCommand::Start)).unwrap();
    rig.wait_for_state(HostState::Running);
    rig.trigger(2, LONG);
    assert_eq!(rig.verdict().1.decision, Decision::Accept);
}

#[test]
fn a_golden_sample_that_is_not_accepted_is_reported() {
    let (mut rig, _, _) = rig(1, Duration::ZERO, |part| if part == 2 { pixel::DEFECT } else { pixel::GOOD });
    for part in 1..=2 {
        rig.to_line.try_send(PlcEvent::Command(PlcCommand::GoldenCheck)).unwrap();
        rig.to_line.try_send(PlcEvent::Command(PlcCommand::Recipe(7))).unwrap();
        rig.trigger(part, LONG);
        rig.verdict();
    }
    let stats = rig.end();
    assert_eq!((stats.counts.golden_checks, stats.counts.golden_failed, stats.recipe), (2, 1, Some(7)));
}

#[test]
fn a_part_announced_twice_is_inspected_once() {
    let (rig, _, gate) = rig(1, Duration::ZERO, |part| if part == 1 { pixel::HANG } else { pixel::GOOD });
    rig.trigger(1, LONG);
    rig.trigger(1, LONG);
    rig.trigger(2, LONG);
    gate.open();
    assert_eq!(rig.verdict().0, 1);
    assert_eq!(rig.verdict().0, 2);
    assert_eq!(rig.running().stats().counts.duplicate_triggers, 1);
}

#[test]
fn a_stuck_stage_is_told_to_the_plc() {
    let script = Arc::new(SourceScript::default());
    let model = FakeModel::new(Duration::ZERO);
    let gate = Arc::clone(&model.gate);
    let options = cull::pipeline::Options { stuck_after: Duration::from_millis(1500), ..options(TriggerMode::Board, 1) };
    let rig = Rig::start(options, model, FakeSource::new(&script, |_| pixel::HANG));
    rig.wait_for_state(HostState::Running);
    rig.trigger(1, LONG);
    rig.wait_for_state(HostState::InternalFault);
    gate.open();
    rig.wait_for_state(HostState::Running);
}

#[test]
fn more_parts_than_the_line_can_hold_are_rejected_at_once() {
    let (mut rig, _, gate) = rig(1, Duration::ZERO, |_| pixel::HANG);
    for part in 1..=400 {
        rig.trigger(part, LONG);
    }
    // The first ones hang, so only those that found no place can have a verdict now.
    let (part, verdict) = rig.verdict();
    assert!(part > 200, "part {part}");
    assert_eq!(verdict.decision, Decision::Unknown);
    gate.open();
    while rig.running().stats().counts.parts < 400 {
        std::thread::sleep(Duration::from_millis(5));
        while rig.from_line.try_recv().is_ok() {}
    }
    let counts = rig.end().counts;
    assert!(counts.overflow > 0, "{counts:?}");
    assert_eq!(counts.parts, 400, "{counts:?}");
}

#[test]
fn a_triggered_line_needs_a_board() {
    let script = Arc::new(SourceScript::default());
    let refused = Pipeline::start(
        options(TriggerMode::Board, 1),
        Arc::new(FakeModel::new(Duration::ZERO)),
        FakeSource::new(&script, |_| pixel::GOOD),
        None,
        cull::pipeline::Sinks::default(),
    );
    assert!(refused.is_err_and(|e| e.to_string().contains("trigger: Board")));
}

#[test]
fn a_link_that_takes_nothing_is_stuck_and_its_verdicts_are_counted() {
    let script = Arc::new(SourceScript::default());
    let options = cull::pipeline::Options { stuck_after: Duration::from_millis(1500), ..options(TriggerMode::Board, 1) };
    let rig = Rig::start(options, FakeModel::new(Duration::ZERO), FakeSource::new(&script, |_| pixel::GOOD));
    rig.wait_for_state(HostState::Running);
    // Nobody reads the link's queue from here on.
    let mut part = 0;
    while rig.running().stats().host_state != HostState::InternalFault {
        part += 1;
        rig.trigger(part, LONG);
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(rig.running().stats().counts.undelivered > 0);
    // It is read again: the line is itself again.
    while rig.running().stats().host_state != HostState::Running {
        while rig.from_line.try_recv().is_ok() {}
        std::thread::sleep(Duration::from_millis(2));
    }
}
