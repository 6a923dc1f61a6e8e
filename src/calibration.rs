//! Image score -> calibrated p-value, so that one threshold serves all products and survives export. Pure: no I/O, no clock, no threads.
//!
//! The p-value of a score is the share of normal images expected to score at least as high. Inside the range of the recorded normal scores it is the
//! empirical one, `(k + 1) / (n + 1)` with `k` recorded scores at or above. Beyond the highest recorded score a generalised Pareto tail
//! (Pickands 1975; fitted by probability-weighted moments, Hosking and Wallis 1987) continues from `1 / (n + 1)`, so that a false-reject
//! rate below one in `n` has a threshold, too.

use serde::{Deserialize, Serialize};

/// Calibration carried by every bundle: the scores of normal held-out images.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Calibration {
    /// Scores of normal images, ascending; at most [`Calibration::MAX_SCORES`] (longer sets are thinned to quantiles).
    pub normal_scores: Vec<f32>,
}

/// Why scores cannot calibrate anything.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum CalibrationError {
    /// Too few images.
    #[error(
        "calibration needs the scores of at least {} normal images, got {actual}: add held-out pictures of good parts",
        Calibration::MIN_SCORES
    )]
    TooFew {
        /// Scores given.
        actual: usize,
    },
    /// More scores than a bundle may carry.
    #[error("calibration holds {actual} scores, at most {} are allowed: build it with `Calibration::from_scores`", Calibration::MAX_SCORES)]
    TooMany {
        /// Scores given.
        actual: usize,
    },
    /// NaN or infinity among the scores.
    #[error("calibration score {index} is {value}: the model does not work on that image")]
    NotFinite {
        /// Position in the input.
        index: usize,
        /// The value.
        value: f32,
    },
    /// Stored scores are not ascending.
    #[error("calibration scores are not ascending at {index}: the metadata was edited, make the bundle again")]
    NotAscending {
        /// Position of the first score smaller than its predecessor.
        index: usize,
    },
}

/// Generalised Pareto tail beyond the highest recorded score.
struct Tail {
    /// Highest recorded score.
    start: f64,
    /// Scale at `start`, above zero.
    scale: f64,
    /// Shape, in [0, `MAX_SHAPE`]; 0 is the exponential tail.
    shape: f64,
}

/// Share of the scores, from the top, that the tail is fitted to.
const TAIL_SHARE: f64 = 0.1;
/// At least that many scores are used for the tail's scale (all of them in smaller sets): a mean of fewer is noise.
const MIN_TAIL: usize = 10;
/// From that many tail scores on the shape is fitted, too; below, an exponential tail is assumed (the shape's standard error would exceed 0.2).
const MIN_TAIL_FOR_SHAPE: usize = 30;
/// Heavier tails than that would let gross defects pass on the word of a few outliers. Lighter than exponential (a bounded tail, shape below
/// 0) is not used either: it gives a p-value of zero just above the normal scores.
const MAX_SHAPE: f64 = 0.3;
/// When all normal scores are (nearly) equal: tail scale as a share of the score itself, so that equal-but-for-rounding scores stay normal.
const MIN_RELATIVE_SCALE: f64 = 1e-4;

impl Calibration {
    /// Enough to resolve a false-reject rate of 0.1 % and small enough for any bundle.
    pub const MAX_SCORES: usize = 4096;
    /// With fewer normal scores not even the order of magnitude of a threshold is known.
    pub const MIN_SCORES: usize = 5;

    /// Calibrate from the scores of normal held-out images, in any order. More than [`Calibration::MAX_SCORES`] are thinned to evenly
    /// spaced order statistics, lowest and highest included (the tail then starts at 1 / (MAX_SCORES + 1): slightly too cautious).
    ///
    /// # Errors
    /// Fewer than [`Calibration::MIN_SCORES`], or a score that is not finite.
    pub fn from_scores(scores: &[f32]) -> Result<Self, CalibrationError> {
        if scores.len() < Self::MIN_SCORES {
            return Err(CalibrationError::TooFew { actual: scores.len() });
        }
        if let Some((index, &value)) = scores.iter().enumerate().find(|(_, score)| !score.is_finite()) {
            return Err(CalibrationError::NotFinite { index, value });
        }
        let mut sorted = scores.to_vec();
        sorted.sort_unstable_by(f32::total_cmp);
        if sorted.len() > Self::MAX_SCORES {
            let last = (sorted.len() - 1) as f64;
            sorted = (0..Self::MAX_SCORES).map(|i| sorted[(i as f64 * last / (Self::MAX_SCORES - 1) as f64).round() as usize]).collect();
        }
        Ok(Self { normal_scores: sorted })
    }

    /// Check a calibration that came from a file.
    ///
    /// # Errors
    /// As [`Calibration::from_scores`], and when the scores are not ascending or too many.
    pub fn check(&self) -> Result<(), CalibrationError> {
        let scores = &self.normal_scores;
        if scores.len() < Self::MIN_SCORES {
            return Err(CalibrationError::TooFew { actual: scores.len() });
        }
        if scores.len() > Self::MAX_SCORES {
            return Err(CalibrationError::TooMany { actual: scores.len() });
        }
        if let Some((index, &value)) = scores.iter().enumerate().find(|(_, score)| !score.is_finite()) {
            return Err(CalibrationError::NotFinite { index, value });
        }
        match scores.windows(2).position(|pair| pair[0] > pair[1]) {
            Some(index) => Err(CalibrationError::NotAscending { index: index + 1 }),
            None => Ok(()),
        }
    }

    /// The share of normal images expected to score at least `score`: in (0, 1], never rising with the score. NaN for a NaN score and for
    /// an empty calibration, which ends in a fault verdict.
    pub fn p_value(&self, score: f32) -> f32 {
        let count = self.normal_scores.len();
        let (Some(&highest), false) = (self.normal_scores.last(), score.is_nan()) else { return f32::NAN };
        if score <= highest {
            let at_or_above = count - self.normal_scores.partition_point(|&normal| normal < score);
            return ((at_or_above + 1) as f64 / (count + 1) as f64) as f32;
        }
        let tail = self.tail();
        let survival = tail.survival(f64::from(score));
        // Never zero: nothing is impossible, and logarithms of p-values must stay finite.
        ((survival / (count + 1) as f64) as f32).max(f32::MIN_POSITIVE)
    }

    /// The lowest score whose p-value is at most `p`: the decision threshold for a false-reject rate of `p`. `p` at or above 1 gives the lowest recorded
    /// score, `p` at or below 0 infinity, NaN (or an empty calibration) NaN.
    pub fn score_at(&self, p: f32) -> f32 {
        let count = self.normal_scores.len();
        let (Some(&lowest), Some(&highest), false) = (self.normal_scores.first(), self.normal_scores.last(), p.is_nan()) else {
            return f32::NAN;
        };
        if p >= 1.0 {
            return lowest;
        }
        if p <= 0.0 {
            return f32::INFINITY;
        }
        let target = f64::from(p) * (count + 1) as f64;
        let mut score = if target >= 1.0 {
            // At most `allowed` recorded scores may be at or above.
            let allowed = (target - 1.0).floor() as usize;
            match count.checked_sub(allowed + 1).and_then(|index| self.normal_scores.get(index)) {
                Some(score) => score.next_up(),
                None => lowest,
            }
        } else {
            (self.tail().quantile(target) as f32).max(highest.next_up())
        };
        // Rounding to f32 may have landed a step too low or, where `target` was rounded, one recorded score too low.
        for _ in 0..ROUNDING_STEPS {
            if self.p_value(score) <= p {
                break;
            }
            score = score.next_up();
        }
        score
    }

    fn tail(&self) -> Tail {
        let scores = &self.normal_scores;
        let count = scores.len();
        let start = scores.last().map_or(0.0, |&score| f64::from(score));
        let tail_count = ((count as f64 * TAIL_SHARE).ceil() as usize).max(MIN_TAIL).min(count.saturating_sub(1));
        let floor = (start.abs() * MIN_RELATIVE_SCALE).max(f64::from(f32::MIN_POSITIVE));
        let Some(threshold) = count.checked_sub(tail_count + 1).and_then(|index| scores.get(index)).map(|&score| f64::from(score)) else {
            return Tail { start, scale: floor, shape: 0.0 };
        };
        let excesses = &scores[count - tail_count..];
        let n = tail_count.max(1) as f64;
        let mean = excesses.iter().map(|&score| f64::from(score) - threshold).sum::<f64>() / n;
        // Second probability-weighted moment, a1 = E[x (1 - F(x))], with plotting positions (i + 0.65) / n.
        let weighted =
            excesses.iter().enumerate().map(|(i, &score)| (f64::from(score) - threshold) * (1.0 - (i as f64 + 0.65) / n)).sum::<f64>() / n;
        let spread = mean - 2.0 * weighted;
        let (mut scale, mut shape) = (mean, 0.0);
        if tail_count >= MIN_TAIL_FOR_SHAPE && spread > f64::EPSILON * mean {
            // Hosking and Wallis: k = a0 / (a0 - 2 a1) - 2 with their k the negative of our shape.
            shape = (2.0 - mean / spread).clamp(0.0, MAX_SHAPE);
            // The scale that keeps the mean excess for the clamped shape: mean = scale / (1 - shape).
            scale = mean * (1.0 - shape);
        }
        // A generalised Pareto tail above a higher start has the same shape and a scale that grows by shape * (start - threshold).
        Tail { start, scale: (scale + shape * (start - threshold)).max(floor), shape }
    }
}

/// Steps to the next float that settle rounding in [`Calibration::score_at`]; one is enough in practice.
const ROUNDING_STEPS: usize = 8;

impl Tail {
    /// P(score > s | score > start), for s above `start`.
    fn survival(&self, score: f64) -> f64 {
        let excess = (score - self.start) / self.scale;
        if self.shape > 0.0 { (1.0 + self.shape * excess).powf(-1.0 / self.shape) } else { (-excess).exp() }
    }

    /// Inverse of [`Tail::survival`]; `survival` in (0, 1].
    fn quantile(&self, survival: f64) -> f64 {
        let excess = if self.shape > 0.0 { (survival.powf(-self.shape) - 1.0) / self.shape } else { -survival.ln() };
        self.start + self.scale * excess
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn exponential(count: usize) -> Vec<f32> {
        // Quantiles of Exp(1): the true tail is known.
        (0..count).map(|i| -(1.0 - (i as f64 + 0.5) / count as f64).ln() as f32).collect()
    }

    #[test]
    fn inside_the_normal_range_it_is_k_plus_one_over_n_plus_one() {
        let calibration = Calibration::from_scores(&[3.0, 1.0, 2.0, 5.0, 4.0]).unwrap();
        assert_eq!(calibration.normal_scores, [1.0, 2.0, 3.0, 4.0, 5.0]);
        for (score, p) in [(0.5, 1.0), (1.0, 1.0), (1.5, 5.0 / 6.0), (4.0, 0.5), (5.0, 2.0 / 6.0)] {
            assert_eq!(calibration.p_value(score), p, "score {score}");
        }
        assert!(calibration.p_value(5.01) < 1.0 / 6.0);
    }

    #[test]
    fn the_tail_of_exponential_scores_is_extrapolated_within_a_third_of_a_decade() {
        let calibration = Calibration::from_scores(&exponential(1000)).unwrap();
        for true_p in [1e-4f64, 1e-5, 1e-6] {
            let p = f64::from(calibration.p_value(-true_p.ln() as f32));
            assert!((p / true_p).log10().abs() < 0.34, "true {true_p:e}, got {p:e}");
        }
    }

    #[test]
    fn equal_scores_still_separate_a_gross_defect() {
        let calibration = Calibration::from_scores(&[0.7; 50]).unwrap();
        assert_eq!(calibration.p_value(0.7), 1.0);
        assert!(calibration.p_value(0.8) < 1e-6);
        let zero = Calibration::from_scores(&[0.0; 50]).unwrap();
        assert!(zero.p_value(0.1) < 1e-6 && zero.p_value(0.1) > 0.0);
    }

    #[test]
    fn not_a_number_stays_not_a_number() {
        let calibration = Calibration::from_scores(&exponential(10)).unwrap();
        assert!(calibration.p_value(f32::NAN).is_nan());
        assert!(calibration.score_at(f32::NAN).is_nan());
        assert!(Calibration { normal_scores: vec![] }.p_value(1.0).is_nan());
        assert_eq!(calibration.p_value(f32::INFINITY), f32::MIN_POSITIVE);
        assert_eq!(calibration.score_at(0.0), f32::INFINITY);
    }

    #[test]
    fn bad_scores_are_refused() {
        assert_eq!(Calibration::from_scores(&[1.0; 4]), Err(CalibrationError::TooFew { actual: 4 }));
        assert!(matches!(Calibration::from_scores(&[1.0, 2.0, f32::NAN, 3.0, 4.0]), Err(CalibrationError::NotFinite { index: 2, .. })));
        let edited = Calibration { normal_scores: vec![1.0, 2.0, 1.5, 3.0, 4.0] };
        assert_eq!(edited.check(), Err(CalibrationError::NotAscending { index: 2 }));
        let long = Calibration { normal_scores: vec![1.0; Calibration::MAX_SCORES + 1] };
        assert!(matches!(long.check(), Err(CalibrationError::TooMany { .. })));
    }

    #[test]
    fn long_sets_are_thinned_and_keep_their_quantiles() {
        let scores = exponential(20_000);
        let calibration = Calibration::from_scores(&scores).unwrap();
        assert_eq!(calibration.normal_scores.len(), Calibration::MAX_SCORES);
        assert_eq!(calibration.check(), Ok(()));
        assert_eq!(calibration.normal_scores.last(), scores.last());
        assert!((calibration.p_value(1.0) - (-1.0f32).exp()).abs() < 1e-3);
    }

    fn scores() -> impl Strategy<Value = Vec<f32>> {
        prop_oneof![
            proptest::collection::vec(-1e3f32..1e3, 5..200),
            proptest::collection::vec((0u8..5).prop_map(f32::from), 5..200),
            proptest::collection::vec((0f32..20.0).prop_map(f32::exp), 5..500),
        ]
    }

    proptest! {
        #[test]
        fn p_values_are_in_range_and_never_rise(scores in scores(), mut probes in proptest::collection::vec(-2e3f32..1e9, 2..50)) {
            let calibration = Calibration::from_scores(&scores).unwrap();
            probes.extend(&scores);
            probes.extend(scores.iter().map(|score| score.next_up()));
            probes.sort_unstable_by(f32::total_cmp);
            let mut last = 1.0f32;
            for score in probes {
                let p = calibration.p_value(score);
                prop_assert!(p > 0.0 && p <= last, "p {p} at {score} after {last}");
                last = p;
            }
        }

        #[test]
        fn score_at_is_the_lowest_score_with_that_p_value(scores in scores(), p in prop_oneof![1e-6f32..1.0, 1e-3f32..0.2]) {
            let calibration = Calibration::from_scores(&scores).unwrap();
            let score = calibration.score_at(p);
            prop_assert!(calibration.p_value(score) <= p);
            // A little lower is not enough any more: within float rounding of the tail, at once inside the recorded range.
            let highest = *calibration.normal_scores.last().unwrap();
            let lower = if score > highest.next_up() { highest + (score - highest) * 0.999 - 1e-6 * score.abs() } else { score.next_down() };
            prop_assert!(calibration.p_value(lower) >= p * 0.999, "p {} at {lower} below {score}", calibration.p_value(lower));
        }

        #[test]
        fn serde_keeps_every_p_value(scores in scores(), score in -1e3f32..1e4) {
            let calibration = Calibration::from_scores(&scores).unwrap();
            let back: Calibration = serde_json::from_str(&serde_json::to_string(&calibration).unwrap()).unwrap();
            prop_assert_eq!(back.check(), Ok(()));
            prop_assert_eq!(back.p_value(score), calibration.p_value(score));
        }
    }
}
