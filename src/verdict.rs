//! Calibrated score and policy -> [`Verdict`]. Pure: no I/O, no clock, no threads.

use serde::{Deserialize, Serialize};

/// What happens to the part. Everything but `Accept` ends in a reject or a stop at the board; there is no silent accept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decision {
    /// The part is normal.
    Accept,
    /// The part is anomalous.
    Reject,
    /// No judgement was possible in time (deadline missed, no frame, stopped, link down); treated as a reject.
    Unknown,
    /// The inspector itself failed on this part (model error, bad frame); treated as a reject.
    Fault,
}

/// Why the decision was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// p-value above the policy's false-reject rate.
    Normal,
    /// p-value at or below the policy's false-reject rate.
    Anomalous,
    /// Score or map was not a finite number.
    NotFinite,
    /// The deadline passed before a verdict was ready.
    DeadlineMissed,
    /// No frame came for the trigger.
    NoFrame,
    /// The frame could not be decoded.
    BadFrame,
    /// The model failed.
    ModelError,
    /// The part came while inspection was stopped or paused, or during shutdown.
    Stopped,
    /// The link to the board broke while the part was under inspection; the board has rejected it by itself.
    LinkDown,
}

/// A decision with its reason and evidence.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// What happens to the part.
    pub decision: Decision,
    /// Why.
    pub reason: Reason,
    /// Image score (score rule of the bundle); NaN where there is none.
    pub score: f32,
    /// Probability that a normal part scores at least as high; NaN where there is none.
    pub p_value: f32,
}

/// When to reject.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Policy {
    /// Accepted share of good parts rejected, 0 < rate < 1: reject when the p-value is at or below it. One threshold for all products.
    pub false_reject_rate: f32,
}

/// Decide on a scored part. A score or p-value that is not finite is a fault, never an accept.
pub fn decide(policy: &Policy, score: f32, p_value: f32) -> Verdict {
    let (decision, reason) = if !score.is_finite() || !p_value.is_finite() {
        (Decision::Fault, Reason::NotFinite)
    } else if p_value <= policy.false_reject_rate {
        (Decision::Reject, Reason::Anomalous)
    } else {
        (Decision::Accept, Reason::Normal)
    };
    Verdict { decision, reason, score, p_value }
}

/// A verdict for a part that could not be judged: `Unknown` for what never arrived, `Fault` for what failed.
pub fn without_score(reason: Reason) -> Verdict {
    let decision = match reason {
        Reason::DeadlineMissed | Reason::NoFrame | Reason::Stopped | Reason::LinkDown => Decision::Unknown,
        Reason::Normal | Reason::Anomalous | Reason::NotFinite | Reason::BadFrame | Reason::ModelError => Decision::Fault,
    };
    Verdict { decision, reason, score: f32::NAN, p_value: f32::NAN }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLICY: Policy = Policy { false_reject_rate: 0.005 };

    #[test]
    fn nothing_but_a_finite_normal_score_is_accepted() {
        assert_eq!(decide(&POLICY, 1.0, 0.5).decision, Decision::Accept);
        assert_eq!(decide(&POLICY, 1.0, 0.005).decision, Decision::Reject);
        for (score, p_value) in [(f32::NAN, 0.5), (f32::INFINITY, 0.5), (1.0, f32::NAN)] {
            assert_eq!(decide(&POLICY, score, p_value).decision, Decision::Fault);
        }
    }

    #[test]
    fn a_part_without_a_score_is_never_accepted() {
        use Reason::*;
        for reason in [Normal, Anomalous, NotFinite, DeadlineMissed, NoFrame, BadFrame, ModelError, Stopped, LinkDown] {
            assert_ne!(without_score(reason).decision, Decision::Accept);
        }
    }
}
