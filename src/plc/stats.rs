//! What a link measured since it was spawned. Written by the link's thread, read by anyone; a reader holds the writer up for the copy of two
//! small histograms (about 10 us), never for I/O.

use hdrhistogram::Histogram;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Longest latency that the histograms tell apart, in ns: longer ones count as this. A verdict this late has long been a reject.
const LONGEST_NS: u64 = 60_000_000_000;
/// Shortest latency told apart, in ns: below a microsecond the clock and the histogram itself are what one measures.
const SHORTEST_NS: u64 = 1_000;
/// Two digits: the figure printed is within 1 % of the true one, and a histogram is 16 KB.
const DIGITS: u8 = 2;

/// Counters and latencies of one link. Shared by `Arc`; every count is since [`crate::plc::spawn`] and survives reconnects.
#[derive(Debug)]
pub struct LinkStats {
    verdict_to_kernel: Mutex<Histogram<u32>>,
    verdict_to_ack: Mutex<Histogram<u32>>,
    counts: Counts,
}

/// Monotonic counters, one atomic each.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub triggers: AtomicU64,
    pub verdicts_sent: AtomicU64,
    pub verdicts_undelivered: AtomicU64,
    pub acknowledged: AtomicU64,
    pub events_dropped: AtomicU64,
    pub triggers_dropped: AtomicU64,
    pub triggers_missed: AtomicU64,
    pub bad_frames: AtomicU64,
    pub repeats: AtomicU64,
    pub late: AtomicU64,
    pub board_safe: AtomicU64,
    pub opens: AtomicU64,
    pub losses: AtomicU64,
    pub bytes_in: AtomicU64,
    pub bytes_out: AtomicU64,
}

/// A copy of [`LinkStats`] at one moment.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct LinkSummary {
    /// Parts announced by the other side.
    pub triggers: u64,
    /// Verdicts whose last byte the kernel took.
    pub verdicts_sent: u64,
    /// Verdicts that found the link down or the port stuck; the board rejected those parts at their deadline.
    pub verdicts_undelivered: u64,
    /// Verdicts that the other side acknowledged.
    pub acknowledged: u64,
    /// Events other than triggers and commands dropped because nobody read [`crate::plc::LinkHandle::events`].
    pub events_dropped: u64,
    /// Triggers and commands dropped for the same reason: those parts get no verdict, and the board rejects them.
    pub triggers_dropped: u64,
    /// Triggers that came and went between two polls (Modbus master): those parts get no verdict, and the PLC rejects them.
    pub triggers_missed: u64,
    /// Verdicts that came too late for their part, or were never acknowledged: the board rejected those parts.
    pub late: u64,
    /// Verdicts sent again, since no acknowledgement came.
    pub repeats: u64,
    /// Frames received with a bad checksum, length, number, address or codename.
    pub bad_frames: u64,
    /// The board is in its safe state now: whatever the verdicts say, it rejects or stops the line.
    pub board_safe: bool,
    /// Times the port was opened.
    pub opens: u64,
    /// Times an open port was lost (unplugged, hung up, stuck).
    pub losses: u64,
    /// Bytes received.
    pub bytes_in: u64,
    /// Bytes handed to the kernel.
    pub bytes_out: u64,
    /// From the verdict being taken to its last byte handed to the kernel.
    pub verdict_to_kernel_us: LatencySummary,
    /// From the verdict being taken to the other side's acknowledgement.
    pub verdict_to_ack_us: LatencySummary,
}

/// Percentiles of one latency, in us, each within 1 %. All zero where nothing was measured (`count` is 0).
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize)]
pub struct LatencySummary {
    /// Measurements.
    pub count: u64,
    /// Median, in us.
    pub p50: f64,
    /// 99th percentile, in us.
    pub p99: f64,
    /// 99.9th percentile, in us.
    pub p999: f64,
    /// Largest, in us.
    pub max: f64,
}

impl Default for LinkStats {
    fn default() -> Self {
        Self { verdict_to_kernel: Mutex::new(histogram()), verdict_to_ack: Mutex::new(histogram()), counts: Counts::default() }
    }
}

/// An empty latency histogram over [`SHORTEST_NS`]..[`LONGEST_NS`]. It does not resize: that would allocate on the link's thread.
fn histogram() -> Histogram<u32> {
    match Histogram::new_with_bounds(SHORTEST_NS, LONGEST_NS, DIGITS) {
        Ok(histogram) => histogram,
        Err(error) => unreachable!("three constants of this file, checked by its test: {error}"),
    }
}

/// A histogram stays usable when a reader panicked while holding it: it holds numbers only.
fn lock(histogram: &Mutex<Histogram<u32>>) -> MutexGuard<'_, Histogram<u32>> {
    histogram.lock().unwrap_or_else(PoisonError::into_inner)
}

impl LinkStats {
    /// The counters.
    pub(crate) fn counts(&self) -> &Counts {
        &self.counts
    }

    /// One verdict's last byte went to the kernel `ns` after it was taken.
    pub(crate) fn verdict_to_kernel(&self, ns: u64) {
        lock(&self.verdict_to_kernel).saturating_record(ns);
        self.counts.verdicts_sent.fetch_add(1, Ordering::Relaxed);
    }

    /// One verdict's acknowledgement arrived `ns` after it was taken.
    pub(crate) fn verdict_to_ack(&self, ns: u64) {
        lock(&self.verdict_to_ack).saturating_record(ns);
        self.counts.acknowledged.fetch_add(1, Ordering::Relaxed);
    }

    /// A copy of everything.
    pub fn summary(&self) -> LinkSummary {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let c = &self.counts;
        LinkSummary {
            triggers: get(&c.triggers),
            verdicts_sent: get(&c.verdicts_sent),
            verdicts_undelivered: get(&c.verdicts_undelivered),
            acknowledged: get(&c.acknowledged),
            events_dropped: get(&c.events_dropped),
            triggers_dropped: get(&c.triggers_dropped),
            triggers_missed: get(&c.triggers_missed),
            late: get(&c.late),
            repeats: get(&c.repeats),
            bad_frames: get(&c.bad_frames),
            board_safe: get(&c.board_safe) != 0,
            opens: get(&c.opens),
            losses: get(&c.losses),
            bytes_in: get(&c.bytes_in),
            bytes_out: get(&c.bytes_out),
            verdict_to_kernel_us: percentiles(&lock(&self.verdict_to_kernel).clone()),
            verdict_to_ack_us: percentiles(&lock(&self.verdict_to_ack).clone()),
        }
    }
}

fn percentiles(histogram: &Histogram<u32>) -> LatencySummary {
    if histogram.is_empty() {
        return LatencySummary::default();
    }
    let us = |quantile: f64| histogram.value_at_quantile(quantile) as f64 / 1e3;
    LatencySummary { count: histogram.len(), p50: us(0.5), p99: us(0.99), p999: us(0.999), max: histogram.max() as f64 / 1e3 }
}

/// Add to one of the [`Counts`].
pub(crate) fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_within_one_percent_and_empty_is_zero() {
        let stats = LinkStats::default();
        assert_eq!(stats.summary().verdict_to_kernel_us, LatencySummary::default());
        for us in 1..=1000u64 {
            stats.verdict_to_kernel(us * 1000);
        }
        stats.verdict_to_kernel(u64::MAX); // longer than the histogram: counted as the longest, not lost
        let s = stats.summary().verdict_to_kernel_us;
        assert_eq!(s.count, 1001);
        assert!((s.p50 - 501.0).abs() < 6.0, "{s:?}");
        assert!((s.p99 - 991.0).abs() < 11.0, "{s:?}");
        assert!(s.max >= 60e6 * 0.99, "{s:?}");
    }
}
