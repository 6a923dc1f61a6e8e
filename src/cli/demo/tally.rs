//! The demo's bookkeeping: what the inspector decided, what the gate did, what was true of the part. Pure.

use super::board::{AtGate, Gate};
use cull::frame::PartId;
use cull::pipeline::Inspection;
use cull::verdict::{Decision, Reason};
use std::collections::HashMap;

/// What happened to the parts so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Parts that passed the gate.
    pub parts: u64,
    /// Let through.
    pub accepted: u64,
    /// Rejected, for whatever reason.
    pub rejected: u64,
    /// Rejected because no judgement came in time: by the inspector's own `Unknown`, or by the board at its deadline.
    pub missed_deadline: u64,
    /// Good parts rejected.
    pub false_rejects: u64,
    /// Defective parts let through.
    pub false_accepts: u64,
    /// Defective parts that passed the gate, either way.
    pub defective: u64,
    /// Missed parts that were let through nevertheless: must be zero.
    pub missed_but_accepted: u64,
}

/// Pairs each part's inspection with its passage through the gate.
#[derive(Default)]
pub struct Ledger {
    inspected: HashMap<u32, Inspection>,
    pub tally: Tally,
}

/// A part whose story is complete.
pub struct Story {
    pub at_gate: AtGate,
    /// `None` when the inspector never told of the part.
    pub inspection: Option<Inspection>,
    /// The defect's name, or `None` for a good part.
    pub defect: Option<String>,
    pub missed: bool,
}

impl Story {
    /// Good but rejected.
    pub fn is_false_reject(&self) -> bool {
        self.at_gate.gate == Gate::Reject && self.defect.is_none()
    }

    /// Defective but let through.
    pub fn is_false_accept(&self) -> bool {
        self.at_gate.gate == Gate::Accept && self.defect.is_some()
    }
}

impl Ledger {
    /// The inspector decided on a part. The gate comes later, so this is always first.
    pub fn inspected(&mut self, inspection: Inspection) {
        if let Some(PartId(part)) = inspection.part {
            self.inspected.insert(part, inspection);
        }
    }

    /// A part passed the gate. `truth` says what a part is whose picture never came.
    pub fn at_gate(&mut self, at_gate: AtGate, truth: impl FnOnce(u32) -> Option<String>) -> Story {
        let inspection = self.inspected.remove(&at_gate.part);
        let defect = match inspection.as_ref().and_then(|i| i.origin.truth.as_ref()) {
            Some(known) => known.defect.as_deref().map(str::to_string),
            None => truth(at_gate.part),
        };
        let judged = inspection.as_ref().is_some_and(|i| {
            matches!(i.verdict.decision, Decision::Accept | Decision::Reject | Decision::Fault)
                && i.verdict.reason != Reason::DeadlineMissed
        });
        let missed = at_gate.reason == "deadline" || !judged;
        let story = Story { at_gate, inspection, defect, missed };
        let t = &mut self.tally;
        t.parts += 1;
        match story.at_gate.gate {
            Gate::Accept => t.accepted += 1,
            Gate::Reject => t.rejected += 1,
        }
        t.missed_deadline += u64::from(story.missed);
        t.missed_but_accepted += u64::from(story.missed && story.at_gate.gate == Gate::Accept);
        t.defective += u64::from(story.defect.is_some());
        t.false_rejects += u64::from(story.is_false_reject());
        t.false_accepts += u64::from(story.is_false_accept());
        story
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cull::frame::{Origin, Truth};
    use cull::pipeline::StageTimes;
    use cull::verdict::{Policy, decide, without_score};

    fn inspection(part: u32, p_value: Option<f32>, defect: Option<&str>) -> Inspection {
        Inspection {
            part: Some(PartId(part)),
            seq: 1,
            verdict: match p_value {
                Some(p) => decide(&Policy { false_reject_rate: 0.01 }, 1.0, p),
                None => without_score(Reason::DeadlineMissed),
            },
            captured_ns: 0,
            decided_ns: 1,
            stages: StageTimes::default(),
            origin: Origin { truth: Some(Truth { defect: defect.map(Into::into) }), ..Origin::default() },
        }
    }

    fn gate(part: u32, gate: Gate, reason: &str) -> AtGate {
        AtGate { part, gate, reason: reason.into() }
    }

    #[test]
    fn every_outcome_is_counted_once() {
        let mut ledger = Ledger::default();
        ledger.inspected(inspection(1, Some(0.5), None));
        ledger.inspected(inspection(2, Some(0.001), Some("scratch")));
        ledger.inspected(inspection(3, Some(0.5), Some("dent")));
        ledger.inspected(inspection(4, Some(0.001), None));
        ledger.inspected(inspection(5, None, None));
        ledger.at_gate(gate(1, Gate::Accept, "verdict"), |_| panic!("the truth is known"));
        ledger.at_gate(gate(2, Gate::Reject, "verdict"), |_| panic!("the truth is known"));
        ledger.at_gate(gate(3, Gate::Accept, "verdict"), |_| panic!("the truth is known"));
        ledger.at_gate(gate(4, Gate::Reject, "verdict"), |_| panic!("the truth is known"));
        ledger.at_gate(gate(5, Gate::Reject, "verdict"), |_| panic!("the truth is known"));
        ledger.at_gate(gate(6, Gate::Reject, "deadline"), |part| (part == 6).then(|| "crack".to_string()));
        assert_eq!(
            ledger.tally,
            Tally {
                parts: 6,
                accepted: 2,
                rejected: 4,
                missed_deadline: 2,
                false_rejects: 2,
                false_accepts: 1,
                defective: 3,
                missed_but_accepted: 0,
            }
        );
    }

    #[test]
    fn a_missed_part_that_got_through_is_seen() {
        let mut ledger = Ledger::default();
        ledger.at_gate(gate(1, Gate::Accept, "leak"), |_| None);
        assert_eq!((ledger.tally.missed_but_accepted, ledger.tally.missed_deadline), (1, 1));
    }
}
