//! Scores of good parts, for a new calibration: the line's own inspection on all cores, results in the order of the parts.

use super::inspector::ModelInspector;
use super::runner::{EvalError, InspectError};
use crate::anomaly::AnomalyMap;
use crate::frame::Frame;
use crate::model::runtime::Model;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Scores of good parts.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GoodScores {
    /// Image scores, in the order of the parts, without those passed over.
    pub scores: Vec<f32>,
    /// Parts that have no score: their number, and what is wrong with the picture.
    pub skipped: Vec<(usize, String)>,
}

/// A part's number, and its score or what is wrong with its picture.
type Scored = (usize, Result<f32, String>);

/// Score parts 0 to `count` - 1 on `threads` threads. `make` gives each thread a function from a part's number to its picture, or to what is wrong with it;
/// `scored` is called once a part, on any thread. The result does not depend on the number of threads.
///
/// # Errors
/// When the model fails on a picture, or no picture can be used.
pub fn score_good_parts<F: FnMut(usize) -> Result<Frame, String>>(
    model: &Model,
    count: usize,
    threads: usize,
    make: impl Fn() -> F + Sync,
    scored: impl Fn() + Sync,
) -> Result<GoodScores, EvalError> {
    let next = AtomicUsize::new(0);
    let failed = AtomicBool::new(false);
    let work = || -> Result<Vec<Scored>, (usize, String)> {
        let (mut frame_of, mut inspector) = (make(), ModelInspector::new(model));
        let (mut map, mut own) = (AnomalyMap::default(), Vec::new());
        while !failed.load(Ordering::Relaxed) {
            let part = next.fetch_add(1, Ordering::Relaxed);
            if part >= count {
                break;
            }
            let result = match frame_of(part) {
                Err(why) => Err(why),
                Ok(frame) => match inspector.inspect_frame(&frame, &mut map) {
                    Ok(score) => Ok(score),
                    Err(InspectError::Picture(why)) => Err(why),
                    Err(InspectError::Model(why)) => {
                        failed.store(true, Ordering::Relaxed);
                        return Err((part, why));
                    }
                },
            };
            own.push((part, result));
            scored();
        }
        Ok(own)
    };
    let ended: Vec<_> = std::thread::scope(|scope| {
        let running: Vec<_> = (0..threads.max(1)).map(|_| scope.spawn(work)).collect();
        running.into_iter().map(|thread| thread.join()).collect()
    });
    let mut all = Vec::with_capacity(count);
    for thread in ended {
        // The runtime has printed the panic already.
        let own = thread.map_err(|_| EvalError::Thread("its scores are lost".into()))?;
        all.extend(own.map_err(|(part, why)| EvalError::Model { path: PathBuf::from(format!("part {part}")), why })?);
    }
    all.sort_unstable_by_key(|(part, _)| *part);
    let mut out = GoodScores::default();
    for (part, result) in all {
        match result {
            Ok(score) => out.scores.push(score),
            Err(why) => out.skipped.push((part, why)),
        }
    }
    match out.skipped.first() {
        Some((_, first)) if out.scores.is_empty() => Err(EvalError::NoPictures { count, first: first.clone() }),
        _ => Ok(out),
    }
}
