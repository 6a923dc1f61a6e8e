//! The scheduler against a naive model: parts as a list, positions as plain numbers, the actuator judged at every single position.

use firmware_bridge::parameters::{Gate, Parameters, SafeState, Unit};
use firmware_bridge::schedule::{Edge, Fate, Schedule, Step};
use firmware_bridge::wire::{Decision, Status};
use proptest::prelude::*;

#[derive(Clone, Debug)]
struct Case {
    distance: u32,
    lead: u32,
    duration: u32,
    merge_gap: u32,
    deadline_ms: u32,
    /// Spacing to the part before, verdict delay, accept?, and whether a verdict comes at all.
    parts: Vec<(u32, u32, bool, bool)>,
    /// Where the encoder starts.
    start: u32,
    unit: Unit,
}

fn case() -> impl Strategy<Value = Case> {
    (1u32..20, 1u32..100, 1u32..60, 0u32..40, 10u32..200, any::<u32>(), any::<bool>()).prop_flat_map(
        |(lead, beyond, more, merge_gap, deadline_ms, start, ticks)| {
            // In ticks the deadline never comes first here: a tick is 100 us.
            let (distance, duration) = (lead + beyond, lead + more);
            prop::collection::vec((1u32..80, 0u32..150, any::<bool>(), prop::bool::weighted(0.8)), 1..40).prop_map(move |parts| Case {
                distance,
                lead,
                duration,
                merge_gap,
                deadline_ms,
                parts,
                start,
                unit: if ticks { Unit::Ticks } else { Unit::Time },
            })
        },
    )
}

struct Naive {
    at: i64,
    /// Position of the verdict in time, and whether it accepts.
    verdict: Option<(i64, bool)>,
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]
    #[test]
    fn the_actuator_is_on_exactly_when_a_list_says_so(case in case()) {
        // One position is one step of 1 ms in time, and one tick of 100 us in ticks.
        let (scale, step_us) = if case.unit == Unit::Time { (1_000u32, 1_000u64) } else { (1, 100) };
        let gate = Gate {
            unit: case.unit,
            distance: case.distance * scale,
            lead: case.lead * scale,
            duration: case.duration * scale,
            merge_gap: case.merge_gap * scale,
        };
        let parameters = Parameters { deadline_ms: case.deadline_ms, watchdog_ms: 500, safe_state: SafeState::RejectAll, gate };
        prop_assert_eq!(parameters.check(), Ok(()));
        let now_of = |position: i64| 1_000_000 + position as u64 * step_us;
        let encoder_of = |position: i64| case.start.wrapping_add(position as u32);
        let deadline_steps = i64::try_from(u64::from(case.deadline_ms) * 1000 / step_us).unwrap();
        let mut schedule = Schedule::new(&parameters, now_of(0));
        schedule.step(now_of(0), encoder_of(0), false, &mut |_| {});
        let (distance, lead, duration) = (i64::from(case.distance), i64::from(case.lead), i64::from(case.duration));
        // Past the hold of the start.
        let mut position = distance + duration;
        schedule.step(now_of(position), encoder_of(position), false, &mut |_| {});
        prop_assert!(!schedule.is_on());

        let mut naive: Vec<Naive> = Vec::new();
        let mut arrivals = Vec::new();
        let mut at = position + 1;
        for (spacing, ..) in &case.parts {
            at += i64::from(*spacing);
            arrivals.push(at);
        }
        let mut fates = vec![None; case.parts.len()];
        let end = at + distance + duration + i64::from(case.merge_gap) + 2;
        let mut was_on = false;
        while position < end {
            position += 1;
            if let Some(part) = arrivals.iter().position(|at| *at == position) {
                if naive.len() - fates.iter().filter(|f| f.is_some()).count() < 60 {
                    prop_assert_eq!(schedule.edge(now_of(position), encoder_of(position), part as u32, 1), Edge::Tracked);
                }
                naive.push(Naive { at: position, verdict: None });
            }
            schedule.step(now_of(position), encoder_of(position), false, &mut |step| match step {
                Step::AtGate(gate) => fates[gate.part as usize] = Some(gate.fate),
                Step::Missed { .. } => {}
            });
            for (part, (_, delay, accept, comes)) in case.parts.iter().enumerate() {
                if *comes && arrivals[part] + i64::from(*delay) == position {
                    let decision = if *accept { Decision::Accept } else { Decision::Reject };
                    let status = schedule.verdict(now_of(position), part as u32, decision, 1);
                    let open = arrivals[part] + distance - lead;
                    let in_time = position < open && position - arrivals[part] < deadline_steps;
                    if in_time {
                        prop_assert_eq!(status, Status::Taken);
                        naive[part].verdict = Some((position, *accept));
                    } else {
                        prop_assert!(status == Status::TooLate || status == Status::UnknownPart);
                    }
                    // A verdict of another session, or on a part that is none, changes nothing.
                    prop_assert_eq!(schedule.verdict(now_of(position), part as u32, Decision::Accept, 2), Status::UnknownPart);
                    prop_assert_eq!(schedule.verdict(now_of(position), 1_000, Decision::Accept, 1), Status::UnknownPart);
                }
            }
            let window = |part: &Naive| {
                let open = part.at + distance - lead;
                (open, open + duration)
            };
            let rejected = |part: &&Naive| !part.verdict.is_some_and(|(_, accept)| accept);
            let inside = naive.iter().filter(rejected).any(|part| { let (open, close) = window(part); open <= position && position < close });
            // In a gap, on is allowed only between two rejects that are near, and only if it was on.
            let gap = naive.iter().filter(rejected).any(|before| {
                let (_, close) = window(before);
                close <= position && naive.iter().filter(rejected).any(|after| {
                    let (open, _) = window(after);
                    open > position && open - close <= i64::from(case.merge_gap)
                })
            });
            if inside {
                prop_assert!(schedule.is_on(), "off inside a window at {}", position);
            } else if !(gap && was_on) {
                prop_assert!(!schedule.is_on(), "on outside every window at {}", position);
            }
            was_on = schedule.is_on();
        }
        for (part, naive) in naive.iter().enumerate() {
            let wanted = match naive.verdict {
                Some((_, true)) => Fate::Accept,
                Some((_, false)) => Fate::Reject(Decision::Reject),
                None => Fate::Missed,
            };
            prop_assert_eq!(fates[part], Some(wanted), "part {}", part);
        }
        prop_assert!(schedule.is_empty());
    }
}
