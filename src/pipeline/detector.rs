//! What the pipeline needs of a model, so that it can be tested with a model that is stuck, wrong or panics.

use crate::anomaly::{AnomalyMap, ScoreRule};
use crate::calibration::Calibration;
use crate::model::runtime::{Model, Session};
use crate::preprocess::PreprocessSpec;

/// Why one inference failed; logged, and the part gets a fault verdict.
pub type DetectorError = Box<dyn std::error::Error + Send + Sync>;

/// A loaded model: facts shared by all workers, and a session for each.
pub trait Detector: Send + Sync {
    /// What it wants to see.
    fn preprocess(&self) -> &PreprocessSpec;
    /// Rows and columns of its anomaly map.
    fn grid(&self) -> [usize; 2];
    /// How its map becomes a score.
    fn score_rule(&self) -> ScoreRule;
    /// How its score becomes a p-value.
    fn calibration(&self) -> &Calibration;
    /// A new session; also called to replace one that panicked.
    fn session(&self) -> Box<dyn DetectorSession>;
}

/// One worker's use of the model.
pub trait DetectorSession: Send {
    /// From a normalised input, `[3, height, width]` row-major, to the anomaly map. `map.values` keeps its capacity.
    ///
    /// # Errors
    /// When the model fails on this input; the session stays usable.
    fn infer(&mut self, input: &[f32], map: &mut AnomalyMap) -> Result<(), DetectorError>;
}

impl Detector for Model {
    fn preprocess(&self) -> &PreprocessSpec {
        &self.meta().preprocess
    }

    fn grid(&self) -> [usize; 2] {
        self.meta().grid
    }

    fn score_rule(&self) -> ScoreRule {
        self.meta().score
    }

    fn calibration(&self) -> &Calibration {
        &self.meta().calibration
    }

    fn session(&self) -> Box<dyn DetectorSession> {
        Box::new(Model::session(self))
    }
}

impl DetectorSession for Session {
    fn infer(&mut self, input: &[f32], map: &mut AnomalyMap) -> Result<(), DetectorError> {
        Ok(Session::infer(self, input, map)?)
    }
}
