//! Detection quality over a labelled data set.
//!
//! [`metrics`] and [`regions`] are pure: scores and labels in, figures out. [`runner`] inspects pictures on all cores and hands the results
//! on in data-set order, whatever the threads did; [`summary`] turns them into figures; [`report`] into a page to look at. [`calibrate`] scores good parts for a new calibration. What decides on
//! a part is the line's own code ([`crate::preprocess`], [`crate::model`], [`crate::anomaly`], [`crate::calibration`],
//! [`crate::verdict`]): nothing is computed a second way here.

pub mod calibrate;
pub mod inspector;
pub mod metrics;
pub mod regions;
pub mod report;
pub mod runner;
pub mod summary;
