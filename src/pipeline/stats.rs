//! What the line counted and measured: counters (one atomic each) and stage timings (histograms of fixed size). Recording neither allocates
//! nor does I/O, nor waits for a reader.

use crate::plc::{BoardCounters, BoardState, HostState, LinkState};
use hdrhistogram::Histogram;
use serde::Serialize;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};

/// Shortest time the histograms tell apart, in us.
const SHORTEST_US: u64 = 1;
/// Longest time the histograms tell apart, in us: longer ones count as a minute, long past any deadline.
const LONGEST_US: u64 = 60_000_000;
/// Three digits: a printed percentile is within 0.1 % of the true one.
const DIGITS: u8 = 3;

/// Stages that are timed, in the order in which a part meets them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Timed {
    Queue,
    Preprocess,
    Inference,
    Verdict,
    Link,
    Total,
    Response,
}

/// Number of [`Timed`] stages.
const TIMED: usize = 7;

/// Times kept while a reader has the histograms: ten parts' worth. A reader that takes longer is waited for, since no time is dropped.
const BACKLOG: usize = 64;

/// Times that could not be recorded yet; belongs to the one thread that records.
pub(crate) struct Backlog(Vec<(Timed, u64)>);

impl Backlog {
    pub fn new() -> Self {
        Self(Vec::with_capacity(BACKLOG))
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// One histogram a stage.
pub(crate) struct Timings {
    histograms: Mutex<[Histogram<u32>; TIMED]>,
}

impl Timings {
    pub fn new() -> Self {
        Self { histograms: Mutex::new(std::array::from_fn(|_| histogram())) }
    }

    fn lock(&self) -> MutexGuard<'_, [Histogram<u32>; TIMED]> {
        // Histograms hold numbers only, so they stay usable after a panic elsewhere.
        self.histograms.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Record several stages at one go, in us. Does not wait for a reader: it is an ordinary thread that a loaded machine may stop in the middle
    /// of its copy, and parts wait for the caller. What finds one there is kept in `backlog` for the next call (an empty one will do).
    pub fn record(&self, backlog: &mut Backlog, times_us: &[(Timed, u64)]) {
        let mut histograms = match self.histograms.try_lock() {
            Ok(histograms) => histograms,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) if backlog.0.len() + times_us.len() <= BACKLOG => {
                backlog.0.extend_from_slice(times_us);
                return;
            }
            Err(TryLockError::WouldBlock) => self.lock(),
        };
        for (stage, us) in backlog.0.drain(..).chain(times_us.iter().copied()) {
            if let Some(h) = histograms.get_mut(stage as usize) {
                h.saturating_record(us);
            }
        }
    }

    /// Forget everything recorded, for the start of a new phase.
    pub fn reset(&self) {
        self.lock().iter_mut().for_each(Histogram::reset);
    }

    pub fn summary(&self) -> StageLatency {
        let copy = self.lock().clone();
        let of = |stage: Timed| copy.get(stage as usize).map(Latency::of).unwrap_or_default();
        StageLatency {
            queue: of(Timed::Queue),
            preprocess: of(Timed::Preprocess),
            inference: of(Timed::Inference),
            verdict: of(Timed::Verdict),
            link: of(Timed::Link),
            total: of(Timed::Total),
            response: of(Timed::Response),
        }
    }
}

fn histogram() -> Histogram<u32> {
    // The constants satisfy the constructor's rules (low >= 1, high >= 2 * low, digits <= 5); the fallback is never taken.
    Histogram::new_with_bounds(SHORTEST_US, LONGEST_US, DIGITS)
        .or_else(|_| Histogram::new(1))
        .unwrap_or_else(|_| unreachable!("one significant digit is always valid"))
}

/// Latency of each stage, in ms.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct StageLatency {
    /// Waiting: from capture to preprocessing, and from there to a free worker.
    pub queue: Latency,
    /// Decode, ROI, resize, normalise.
    pub preprocess: Latency,
    /// The model.
    pub inference: Latency,
    /// Score, calibration and decision, then waiting for the parts before it.
    pub verdict: Latency,
    /// From the verdict to the board's acknowledgement of it. Empty without a board.
    pub link: Latency,
    /// From capture to the verdict being handed to the link.
    pub total: Latency,
    /// From the board's trigger to the verdict being handed to the link, exposure (or rendering) included. Empty when free-running.
    pub response: Latency,
}

/// Percentiles of one stage, in ms. All zero where nothing was measured (`count` is 0).
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Latency {
    /// Measurements.
    pub count: u64,
    /// Mean, in ms.
    pub mean: f64,
    /// Median, in ms.
    pub p50: f64,
    /// 99th percentile, in ms.
    pub p99: f64,
    /// Largest, in ms.
    pub max: f64,
}

impl Latency {
    fn of(histogram: &Histogram<u32>) -> Self {
        if histogram.is_empty() {
            return Self::default();
        }
        let ms = |quantile| histogram.value_at_quantile(quantile) as f64 / 1e3;
        Self { count: histogram.len(), mean: histogram.mean() / 1e3, p50: ms(0.5), p99: ms(0.99), max: histogram.max() as f64 / 1e3 }
    }
}

macro_rules! counters {
    ($($(#[doc = $doc:literal])* $name:ident),* $(,)?) => {
        /// Counts since the start of the line, one atomic each.
        #[derive(Debug, Default)]
        pub(crate) struct Counters { $(pub $name: AtomicU64),* }

        /// Counts since the start of the line.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
        pub struct Counts { $($(#[doc = $doc])* pub $name: u64),* }

        impl Counters {
            pub fn copy(&self) -> Counts {
                Counts { $($name: self.$name.load(Ordering::Relaxed)),* }
            }
        }
    };
}

counters! {
    /// Frames that the source brought.
    frames,
    /// Free-running frames that a newer one replaced before they were inspected.
    dropped_frames,
    /// Parts that got a verdict, of any kind.
    parts,
    /// Verdicts: accept.
    accepted,
    /// Verdicts: reject, the part is anomalous.
    rejected,
    /// Verdicts: unknown (fail-safe reject).
    unknown,
    /// Verdicts: fault (fail-safe reject).
    faults,
    /// Of the unknown: the deadline came first.
    missed_deadline,
    /// Of the unknown: no frame came.
    no_frame,
    /// Of the unknown: inspection was stopped or paused.
    while_stopped,
    /// Of the unknown: the link broke meanwhile.
    link_lost,
    /// Results that came after their part's deadline.
    late_results,
    /// Triggers for a part that is under inspection already; ignored.
    duplicate_triggers,
    /// Triggers that found more parts in flight than the line can hold; rejected at once.
    overflow,
    /// Verdicts that could not be handed to the link (down, or its queue full); the board rejects those parts by itself.
    undelivered,
    /// Pictures that the recorder had no room for.
    snapshots_skipped,
    /// Verdicts that the journal had no room for.
    journal_skipped,
    /// Inspections that the live page or printer had no room for.
    tap_skipped,
    /// Panics caught in a stage.
    panics,
    /// Errors that the source reported: pictures that cannot be read, a device that failed.
    source_errors,
    /// Times the source was opened again.
    source_restarts,
    /// Golden samples checked at the PLC's command.
    golden_checks,
    /// Of those, the ones that were not accepted.
    golden_failed,
}

/// Add one.
pub(crate) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// A copy of everything the line knows of itself at one moment.
#[derive(Clone, Debug, Serialize)]
pub struct Stats {
    /// Since the start of the line, in s.
    pub uptime_s: f64,
    /// Counts since the start.
    pub counts: Counts,
    /// Latencies since the start or the last [`super::Running::reset_timings`].
    pub latency_ms: StageLatency,
    /// What the line tells the PLC of itself.
    #[serde(serialize_with = "debug_name")]
    pub host_state: HostState,
    /// State of the link, `None` without one.
    #[serde(serialize_with = "debug_name")]
    pub link: Option<LinkState>,
    /// The board's last report.
    pub board: Option<BoardCounters>,
    /// The board's own state.
    #[serde(serialize_with = "debug_name")]
    pub board_state: Option<BoardState>,
    /// The PLC's last recipe or product hint. The model serves all products at once, so it is only shown and recorded.
    pub recipe: Option<u16>,
    /// Why the line stopped by itself, if it did.
    pub fault: Option<String>,
}

/// States are shown under their Rust name (`Running`, `CameraFault`, …), and as null where there is none.
fn debug_name<T: std::fmt::Debug + Named, S: serde::Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
    match value.name() {
        Some(name) => serializer.collect_str(&name),
        None => serializer.serialize_none(),
    }
}

trait Named {
    fn name(&self) -> Option<String>;
}

impl Named for HostState {
    fn name(&self) -> Option<String> {
        Some(format!("{self:?}"))
    }
}

impl Named for Option<LinkState> {
    fn name(&self) -> Option<String> {
        self.map(|s| format!("{s:?}"))
    }
}

impl Named for Option<BoardState> {
    fn name(&self) -> Option<String> {
        self.map(|s| format!("{s:?}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_come_out_per_stage() {
        let (timings, mut backlog) = (Timings::new(), Backlog::new());
        for us in 1..=1000 {
            timings.record(&mut backlog, &[(Timed::Inference, us * 10), (Timed::Total, us * 20)]);
        }
        let summary = timings.summary();
        assert!((summary.inference.p50 - 5.0).abs() < 0.02, "{summary:?}");
        assert!((summary.total.p99 - 19.8).abs() < 0.05, "{summary:?}");
        assert_eq!(summary.link, Latency::default());
        timings.reset();
        assert_eq!(timings.summary().inference.count, 0);
    }
}
