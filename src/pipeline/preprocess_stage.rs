//! The preprocess thread: frame -> normalised tensor.

use super::{Captured, Done, IDLE_TICK, Prepared, Shared, report, send_patiently, stats, take_patiently};
use crate::frame::{Frame, now_ns};
use crate::kernels::alloc::{Class, count_this_thread};
use crate::pool::{Pool, Pooled};
use crate::preprocess::{PreprocessSpec, Preprocessor, Roi};
use crate::supervise::Beat;
use crate::verdict::Reason;
use crate::wake::Post;
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

pub(super) struct PreprocessStage {
    pub spec: PreprocessSpec,
    pub roi: Option<Roi>,
    pub captured: Receiver<Captured>,
    pub out: Sender<Prepared>,
    pub done: Post<Done>,
    pub inputs: Pool<Vec<f32>>,
    pub shared: Arc<Shared>,
    pub beat: Beat,
}

impl PreprocessStage {
    pub fn run(self) {
        count_this_thread(Class::Pipeline);
        let mut preprocessor = Preprocessor::new(&self.spec, self.roi);
        let mut next_ticket = 0;
        loop {
            self.beat.beat();
            let captured = match self.captured.recv_timeout(IDLE_TICK) {
                Ok(captured) => captured,
                Err(RecvTimeoutError::Timeout) => continue,
                Err(RecvTimeoutError::Disconnected) => break,
            };
            let ticket = captured.ticket.unwrap_or(next_ticket);
            next_ticket = ticket + 1;
            let frame = captured.frame;
            let started_ns = now_ns();
            if started_ns >= captured.due_ns {
                // The verdict stage has rejected it by now; working on it would only make the next one late too.
                if !report(&self.done, Done::failed(ticket, Some(frame), Reason::DeadlineMissed), &self.beat) {
                    break;
                }
                continue;
            }
            let mut input = take_patiently(&self.inputs, &self.beat);
            let started_ns = now_ns();
            let waited_ns = started_ns.saturating_sub(frame.captured_ns);
            let sent = if self.preprocess(&mut preprocessor, &frame, &mut input) {
                let prepared_ns = now_ns();
                let prepared = Prepared {
                    ticket,
                    due_ns: captured.due_ns,
                    frame,
                    input,
                    waited_ns,
                    preprocess_ns: prepared_ns.saturating_sub(started_ns),
                    prepared_ns,
                };
                send_patiently(&self.out, prepared, &self.beat)
            } else {
                report(&self.done, Done::failed(ticket, Some(frame), Reason::BadFrame), &self.beat)
            };
            if !sent {
                break;
            }
        }
    }

    /// False when the frame is unusable; the log says why.
    fn preprocess(&self, preprocessor: &mut Preprocessor, frame: &Frame, input: &mut Pooled<Vec<f32>>) -> bool {
        match catch_unwind(AssertUnwindSafe(|| preprocessor.run(frame, input))) {
            Ok(Ok(())) => true,
            Ok(Err(error)) => {
                log::warn!("frame {}{}: {error}", frame.seq, file_of(frame));
                false
            }
            Err(_) => {
                stats::count(&self.shared.counters.panics);
                log::error!("preprocessing panicked on frame {}{}; the part is rejected", frame.seq, file_of(frame));
                *preprocessor = Preprocessor::new(&self.spec, self.roi);
                false
            }
        }
    }
}

/// ` (file)` for frames from a file, for the log.
fn file_of(frame: &Frame) -> String {
    frame.origin.path.as_ref().map(|p| format!(" ({})", p.display())).unwrap_or_default()
}
