//! The line's own inspection of one picture: preprocess, model, score.

use crate::anomaly::{AnomalyMap, Scorer};
use crate::dataset::load_frame;
use crate::eval::runner::{InspectError, Inspector};
use crate::frame::Frame;
use crate::model::runtime::{Model, Session};
use crate::preprocess::Preprocessor;
use std::path::Path;

/// Scores pictures with a bundle. One per thread; it keeps its buffers.
pub struct ModelInspector {
    preprocessor: Preprocessor,
    session: Session,
    scorer: Scorer,
    input: Vec<f32>,
}

impl ModelInspector {
    /// An inspector of whole pictures (no ROI) with a session of its own.
    pub fn new(model: &Model) -> Self {
        let meta = model.meta();
        let input_px = [meta.preprocess.height_px as usize, meta.preprocess.width_px as usize];
        Self {
            preprocessor: Preprocessor::new(&meta.preprocess, None),
            session: model.session(),
            scorer: Scorer::new(meta.score, meta.grid, input_px),
            input: vec![0.0; meta.preprocess.input_len()],
        }
    }

    /// The anomaly map of `frame` into `map`; returns the image score.
    ///
    /// # Errors
    /// [`InspectError::Picture`] for a frame that cannot be preprocessed, [`InspectError::Model`] when the model fails.
    pub fn inspect_frame(&mut self, frame: &Frame, map: &mut AnomalyMap) -> Result<f32, InspectError> {
        self.preprocessor.run(frame, &mut self.input).map_err(|e| InspectError::Picture(e.to_string()))?;
        self.session.infer(&self.input, map).map_err(|e| InspectError::Model(e.to_string()))?;
        Ok(self.scorer.score(map))
    }
}

impl Inspector for ModelInspector {
    fn inspect(&mut self, picture: &Path, map: &mut AnomalyMap) -> Result<f32, InspectError> {
        let frame = load_frame(picture).map_err(|e| InspectError::Picture(e.to_string()))?;
        self.inspect_frame(&frame, map)
    }
}
