//! An inference worker: tensor -> anomaly map -> score -> decision. Each has a session of its own and one frame at a time.

use super::{
    Detector, DetectorError, DetectorSession, Done, IDLE_TICK, MAX_FAILURES_IN_A_ROW, Prepared, Shared, StageTimes, report, stats,
    take_patiently, us_from_ns,
};
use crate::anomaly::{AnomalyMap, Scorer};
use crate::frame::now_ns;
use crate::kernels::alloc::{Class, count_this_thread, counted_as};
use crate::pool::Pool;
use crate::supervise::Beat;
use crate::verdict::{Policy, Reason, decide};
use crate::wake::Post;
use crossbeam_channel::{Receiver, RecvTimeoutError};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;

pub(super) struct Worker {
    pub detector: Arc<dyn Detector>,
    pub policy: Policy,
    pub prepared: Receiver<Prepared>,
    pub done: Post<Done>,
    pub maps: Pool<AnomalyMap>,
    pub shared: Arc<Shared>,
    pub beat: Beat,
}

impl Worker {
    pub fn run(self) {
        let spec = self.detector.preprocess();
        let input_px = [spec.height_px as usize, spec.width_px as usize];
        let mut scorer = Scorer::new(self.detector.score_rule(), self.detector.grid(), input_px);
        let mut session = self.detector.session();
        count_this_thread(Class::Pipeline);
        loop {
            self.beat.beat();
            let prepared = match self.prepared.recv_timeout(IDLE_TICK) {
                Ok(prepared) => prepared,
                Err(RecvTimeoutError::Timeout) => continue,
                Err(RecvTimeoutError::Disconnected) => break,
            };
            let done = self.inspect(prepared, &mut session, &mut scorer);
            if !report(&self.done, done, &self.beat) {
                break;
            }
        }
    }

    fn inspect(&self, prepared: Prepared, session: &mut Box<dyn DetectorSession>, scorer: &mut Scorer) -> Done {
        let Prepared { ticket, due_ns, frame, input, waited_ns, preprocess_ns, prepared_ns } = prepared;
        if now_ns() >= due_ns {
            return Done::failed(ticket, Some(frame), Reason::DeadlineMissed);
        }
        let mut map = take_patiently(&self.maps, &self.beat);
        let started_ns = now_ns();
        let outcome = catch_unwind(AssertUnwindSafe(|| counted_as(Class::Model, || session.infer(&input, &mut map))));
        let finished_ns = now_ns();
        let mut done = Done {
            ticket,
            frame: Some(frame),
            map: None,
            verdict: crate::verdict::without_score(Reason::ModelError),
            stages: StageTimes {
                queue_us: us_from_ns(waited_ns + started_ns.saturating_sub(prepared_ns)),
                preprocess_us: us_from_ns(preprocess_ns),
                inference_us: us_from_ns(finished_ns.saturating_sub(started_ns)),
                verdict_us: 0,
            },
            finished_ns,
        };
        match outcome {
            Ok(Ok(())) => {
                self.shared.failures_in_a_row.store(0, Ordering::Relaxed);
                let score = scorer.score(&map);
                done.verdict = decide(&self.policy, score, self.detector.calibration().p_value(score));
                done.map = Some(map);
            }
            Ok(Err(error)) => self.failed(Some(error)),
            Err(_) => {
                stats::count(&self.shared.counters.panics);
                self.failed(None);
                // The old session may be in any state: never use it again.
                *session = self.detector.session();
            }
        }
        done
    }

    /// Count a failed inference (`None`: it panicked, and the panic hook has printed where).
    fn failed(&self, error: Option<DetectorError>) {
        let why = error.map_or_else(|| "it panicked".to_string(), |e| e.to_string());
        log::error!("the model failed on a part, which is rejected: {why}");
        let in_a_row = self.shared.failures_in_a_row.fetch_add(1, Ordering::Relaxed) + 1;
        if in_a_row == MAX_FAILURES_IN_A_ROW {
            self.shared.fail(format!("the model failed {in_a_row} times in a row ({why}); check the model with `cull doctor`"));
        }
    }
}
