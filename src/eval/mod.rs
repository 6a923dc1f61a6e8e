//! Detection quality: [`metrics`] (pure numbers), [`regions`] (connected defects in a mask), the runner over a data set and its report.
//!
//! [`metrics`] knows scores and labels only: no files, no model, no threads. What touches files and the model is the runner alone.

pub mod metrics;
pub mod regions;
