//! Threads and bounded channels. Back-pressure policy lives here and nowhere else.
//!
//! ```text
//!  source ──> preprocess ──> N inference workers ──> verdict ──> PLC link
//!    ^                                                │  │  └──> recorder (pictures), journal, tap (page, printer)
//!    └──────────────── triggers ──────────────────────┘  └────── one table of the parts in flight
//! ```
//!
//! - **Triggered** ([`TriggerMode::Board`]): the board announces each part; the verdict stage enters it in its table and asks the source
//!   for its picture. Whatever happens after that, the part leaves the table with a verdict before its deadline: its own, or `Unknown`.
//!   Parts are never dropped. Verdicts go to the board in part order, but nothing waits beyond its own deadline.
//! - **Free-running** ([`TriggerMode::FreeRunning`]): each frame is a part. When inspection is slower than a live source, the newest frame
//!   replaces the waiting one and the drop is counted; a source that can wait (folder, simulated line) waits.
//! - **The hot path** (source to link) takes buffers from fixed pools and allocates nothing per frame after warm-up; it holds no lock over
//!   I/O. Recorder, journal and tap are offered work and never waited for: full queues are counted. (Only a free-running source that can wait,
//!   such as a folder, waits for recorder and tap too: there is no line behind it.)
//! - **Failure**: a panic or error in a stage is a fault verdict for that part; the stage goes on with a fresh session. Repeated failure, or
//!   a stage that stops making progress, is told to the PLC as an internal fault.
//!
//! This module knows the order of the stages and nothing of what they do inside: not the model, not the camera, not the wire protocol.

mod detector;
mod inflight;
mod preprocess_stage;
mod source_stage;
mod stats;
mod verdict_stage;
mod worker;

pub use detector::{Detector, DetectorError, DetectorSession};
pub use stats::{Counts, Latency, StageLatency, Stats};

use crate::anomaly::AnomalyMap;
use crate::config::{Config, PlcConfig, SourceConfig, TriggerMode};
use crate::frame::{Frame, Origin, PartId, now_ns};
use crate::journal::{JournalCounters, JournalHandle};
use crate::plc::{self, BoardRequest, HostState, LinkHandle, RequestStatus, ToPlc};
use crate::pool::{Pool, Pooled};
use crate::preprocess::Roi;
use crate::snapshot::{self, RecorderCounters, RecorderHandle};
use crate::source::{Source, Trigger};
use crate::supervise::{self, Beat, Progress};
use crate::verdict::{Policy, Reason, Verdict, without_score};
use crate::wake::{NotSent, Post, Waker, mailbox};
use crossbeam_channel::{SendTimeoutError, Sender, bounded, never};
use stats::{Counters, Timings};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// A verdict leaves for the link this long before its deadline at the latest: on a line of 115200 baud a verdict takes 3 ms to write, and
/// the scheduler of a loaded machine wakes a thread within a few more.
pub const DEADLINE_MARGIN: Duration = Duration::from_millis(10);

/// … but never more than this part of the time allowed, so that a short deadline still leaves time to inspect.
const MARGIN_DIVISOR: u64 = 4;

/// An idle stage wakes this often to beat and to see whether it should stop.
const IDLE_TICK: Duration = Duration::from_millis(200);

/// A stage whose result finds no room with the verdict stage tries again after this.
const REPORT_AGAIN: Duration = Duration::from_millis(1);

/// Longest time that a shutdown waits for parts in flight; those left are rejected. Longer than any sensible deadline.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);

/// Longest time that a shutdown waits for the link to write out what is queued.
const LINK_FLUSH_LIMIT: Duration = Duration::from_secs(2);

/// Parts in flight that the line keeps track of: what the link may queue.
const MAX_IN_FLIGHT: usize = plc::QUEUE_PARTS;

/// A free-running frame that has no verdict after this long is given up (`Unknown`), so that those behind it go on. It has no deadline of
/// its own; the watchdog sees to the stage that is stuck.
const FREE_RUNNING_LIMIT: Duration = Duration::from_secs(120);

/// So many failed inferences in a row (panic or error, over all workers) stop the line with an internal fault: it will not mend itself.
const MAX_FAILURES_IN_A_ROW: u64 = 5;

/// What became of one part: the record that the recorder, the journal and the live page get. Cheap to clone (reference counts only).
#[derive(Clone, Debug)]
pub struct Inspection {
    /// The part, when a board announced it.
    pub part: Option<PartId>,
    /// The frame's sequence number as the source counts (a folder from 0); 0 also where no frame came, see `verdict.reason`.
    pub seq: u64,
    /// The verdict.
    pub verdict: Verdict,
    /// Capture time, on the clock of [`crate::frame::now_ns`]; the trigger's time where no frame came.
    pub captured_ns: u64,
    /// When the verdict was taken, same clock.
    pub decided_ns: u64,
    /// Time spent in each stage.
    pub stages: StageTimes,
    /// Where the picture came from.
    pub origin: Origin,
}

/// Time spent in each stage, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StageTimes {
    /// Waiting: from capture to preprocessing, and from there to a free worker.
    pub queue_us: u32,
    /// Decode, ROI, resize, normalise.
    pub preprocess_us: u32,
    /// The model.
    pub inference_us: u32,
    /// Score, calibration and decision.
    pub verdict_us: u32,
}

/// How the line runs; everything in it comes from the configuration but the tap.
#[derive(Clone, Debug)]
pub struct Options {
    /// How frames and parts meet.
    pub trigger: TriggerMode,
    /// The part of the picture that is inspected.
    pub roi: Option<Roi>,
    /// When to reject.
    pub policy: Policy,
    /// Inference workers, at least 1.
    pub workers: usize,
    /// The source runs by its own clock (a camera): silence is a stall, and it is re-opened for ever. Otherwise silence is its own affair,
    /// and failing to open ends the run.
    pub live: bool,
    /// A free-running source waits for inspection instead of having its frames replaced by newer ones.
    pub lossless: bool,
    /// Free-running frames get part numbers of their own towards the PLC (a Modbus PLC that only reads the last result).
    pub number_free_frames: bool,
    /// A live source that brings no frame for this long is closed and opened again.
    pub stall: Duration,
    /// First pause before re-opening; doubles at each failure.
    pub backoff_min: Duration,
    /// Longest pause before re-opening.
    pub backoff_max: Duration,
    /// A stage without progress for this long is stuck.
    pub stuck_after: Duration,
    /// Gets every inspection as it is decided; bounded. When full, inspections are skipped and counted (waited for with `lossless`, free-running).
    pub tap: Option<Sender<Inspection>>,
}

impl Options {
    /// As configured, without a tap.
    pub fn from_config(config: &Config) -> Self {
        let live = matches!(config.source, SourceConfig::Camera(_));
        let lossless = match &config.source {
            SourceConfig::Camera(_) => false,
            SourceConfig::Folder { rate_hz, .. } => rate_hz.is_none(),
            SourceConfig::Simulated { .. } => true,
        };
        let ms = |ms: u32| Duration::from_millis(ms.into());
        Self {
            trigger: config.trigger,
            roi: config.roi,
            policy: Policy { false_reject_rate: config.false_reject_rate },
            workers: config.inference.workers.max(1),
            live,
            lossless,
            number_free_frames: matches!(config.plc, PlcConfig::Modbus(_)),
            stall: ms(config.supervise.stall_ms),
            backoff_min: ms(config.supervise.backoff_min_ms),
            backoff_max: ms(config.supervise.backoff_max_ms),
            stuck_after: supervise::STUCK_AFTER,
            tap: None,
        }
    }
}

/// Why a line cannot start.
#[derive(Debug, thiserror::Error)]
pub enum PipelineError {
    /// Parts are to be announced by a board, but there is none.
    #[error("trigger: Board needs a PLC link: set `plc`, or use `trigger: FreeRunning`")]
    NoBoard,
    /// The operating system refused a thread.
    #[error("cannot start the thread of stage `{stage}`: {source}")]
    Thread {
        /// Which stage.
        stage: String,
        /// Why.
        source: std::io::Error,
    },
}

/// Where finished parts go. Each is optional and none is ever waited for.
#[derive(Default)]
pub struct Sinks {
    /// Defect pictures.
    pub recorder: Option<RecorderHandle>,
    /// The verdict database.
    pub journal: Option<JournalHandle>,
}

/// Builds a line; see [`Pipeline::start`].
pub struct Pipeline;

/// What all stages share. Nothing in here is locked on the hot path but [`Timings`], for the time of a few additions.
struct Shared {
    counters: Counters,
    timings: Timings,
    started_ns: u64,
    /// The line was asked to stop, or stops by itself: no more parts are taken.
    stopping: AtomicBool,
    /// Inspection is stopped or paused by the PLC.
    paused: AtomicBool,
    /// The source is open and brings frames.
    source_ok: AtomicBool,
    /// The source has been opened once.
    source_began: AtomicBool,
    /// A stage is stuck.
    stuck: AtomicBool,
    /// Tell the PLC our state again though it did not change.
    tell_again: AtomicBool,
    /// Inferences that failed since the last that succeeded.
    failures_in_a_row: AtomicU64,
    /// Changes rarely; never locked per part.
    status: Mutex<Status>,
    /// [`Status::fault`] is set. Apart, since it is asked at every step.
    failed: AtomicBool,
    /// To the verdict stage, which talks to the board.
    calls: Post<Call>,
    /// Wakes the verdict stage to look at all of the above, and at its queues.
    waker: Waker,
}

struct Status {
    host_state: HostState,
    link: Option<plc::LinkState>,
    board: Option<plc::BoardCounters>,
    board_state: Option<plc::BoardState>,
    recipe: Option<u16>,
    fault: Option<String>,
}

impl Shared {
    fn status(&self) -> MutexGuard<'_, Status> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Let the verdict stage look at the flags now instead of at its next tick.
    fn wake(&self) {
        self.waker.wake();
    }

    fn stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        self.wake();
    }

    fn stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    /// Stop the line for a reason that it cannot mend by itself. The first reason is kept.
    fn fail(&self, why: String) {
        log::error!("the line stops: {why}");
        self.status().fault.get_or_insert(why);
        self.failed.store(true, Ordering::SeqCst);
        self.stop();
    }

    fn failed(&self) -> bool {
        self.failed.load(Ordering::SeqCst)
    }

    fn stats(&self) -> Stats {
        let counts = self.counters.copy();
        let latency_ms = self.timings.summary();
        let status = self.status();
        Stats {
            uptime_s: now_ns().saturating_sub(self.started_ns) as f64 / 1e9,
            counts,
            latency_ms,
            host_state: status.host_state,
            link: status.link,
            board: status.board,
            board_state: status.board_state,
            recipe: status.recipe,
            fault: status.fault.clone(),
        }
    }
}

/// An operator asks something of the board.
struct Call {
    request: BoardRequest,
    /// Room for one.
    answer: Sender<RequestStatus>,
}

/// The verdict stage asks the source for a part's picture.
struct TriggerJob {
    ticket: u64,
    trigger: Trigger,
    due_ns: u64,
}

/// Source -> preprocess. Free-running frames have no ticket yet: those that a newer one replaces never get one.
struct Captured {
    ticket: Option<u64>,
    due_ns: u64,
    frame: Frame,
}

/// Preprocess -> worker.
struct Prepared {
    ticket: u64,
    due_ns: u64,
    frame: Frame,
    input: Pooled<Vec<f32>>,
    waited_ns: u64,
    preprocess_ns: u64,
    prepared_ns: u64,
}

/// Any stage -> verdict: what became of a part. A part that failed early has no map, or not even a frame.
struct Done {
    ticket: u64,
    frame: Option<Frame>,
    map: Option<Pooled<AnomalyMap>>,
    verdict: Verdict,
    stages: StageTimes,
    /// When the model was done with it (or whatever failed did), for the verdict stage's own time.
    finished_ns: u64,
}

impl Done {
    fn failed(ticket: u64, frame: Option<Frame>, reason: Reason) -> Self {
        Self { ticket, frame, map: None, verdict: without_score(reason), stages: StageTimes::default(), finished_ns: now_ns() }
    }
}

fn us_from_ns(ns: u64) -> u32 {
    u32::try_from(ns / 1000).unwrap_or(u32::MAX)
}

fn ns_from(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// When a triggered part's verdict must leave for the link.
fn due_ns(trigger: &Trigger) -> u64 {
    let allowed = trigger.deadline_ns.saturating_sub(trigger.received_ns);
    trigger.deadline_ns.saturating_sub(ns_from(DEADLINE_MARGIN).min(allowed / MARGIN_DIVISOR))
}

/// Send and wait for room, beating all the while: waiting for the next stage is not being stuck. False when the next stage is gone.
fn send_patiently<T>(to: &Sender<T>, mut item: T, beat: &Beat) -> bool {
    loop {
        match to.send_timeout(item, IDLE_TICK) {
            Ok(()) => return true,
            Err(SendTimeoutError::Timeout(back)) => {
                beat.beat();
                item = back;
            }
            Err(SendTimeoutError::Disconnected(_)) => return false,
        }
    }
}

/// Hand a part's end to the verdict stage, beating all the while. False when that is gone. The box holds all parts in flight, so it is full only
/// when the verdict stage is stuck.
fn report(to: &Post<Done>, mut done: Done, beat: &Beat) -> bool {
    loop {
        match to.try_send(done) {
            Ok(()) => return true,
            Err(NotSent::Closed(_)) => return false,
            Err(NotSent::Full(back)) => {
                beat.beat();
                std::thread::sleep(REPORT_AGAIN);
                done = back;
            }
        }
    }
}

/// Take from a pool and wait until something is there, beating all the while.
fn take_patiently<T>(pool: &Pool<T>, beat: &Beat) -> Pooled<T> {
    loop {
        if let Some(item) = pool.take_timeout(IDLE_TICK) {
            return item;
        }
        beat.beat();
    }
}

impl Pipeline {
    /// Start a line: `detector` judges what `source` sees, verdicts go over `link`, and finished parts to `sinks`. Returns at once; the
    /// source is opened on its own thread.
    ///
    /// # Errors
    /// When the options contradict each other or a thread cannot be started.
    pub fn start(
        options: Options,
        detector: Arc<dyn Detector>,
        source: Box<dyn Source>,
        link: Option<LinkHandle>,
        sinks: Sinks,
    ) -> Result<Running, PipelineError> {
        if options.trigger == TriggerMode::Board && link.is_none() {
            return Err(PipelineError::NoBoard);
        }
        let workers = options.workers.max(1);

        // One frame waits before preprocessing and one tensor per worker before inference: enough that no stage starves, and no more, since
        // every waiting frame is latency. A triggered part that finds no room waits for it; its deadline looks after it.
        const CAPTURED_QUEUE: usize = 1;
        let (captured_in, captured) = bounded::<Captured>(CAPTURED_QUEUE);
        let (prepared_in, prepared) = bounded::<Prepared>(workers);
        let waker = Waker::default();
        let (done_in, done) = mailbox::<Done>(MAX_IN_FLIGHT, waker.clone());
        let (calls_in, calls) = mailbox::<Call>(1, waker.clone());

        // On loan at the same time: one frame with the source, preprocess and verdict each, one per worker and queue place, and what the
        // recorder holds. With one spare of each, the hot path never waits for the recorder's disk.
        let held_by_recorder = if sinks.recorder.as_ref().is_some_and(|r| r.folder().is_some()) { snapshot::QUEUE_RECORDS + 1 } else { 0 };
        let frames = Pool::new(CAPTURED_QUEUE + 2 * workers + 4 + held_by_recorder, Vec::new);
        let inputs = Pool::new(2 * workers + 1, || vec![0.0f32; detector.preprocess().input_len()]);
        let grid = detector.grid();
        let maps = Pool::new(workers + 2 + held_by_recorder, || AnomalyMap::zeros(grid));

        let names = ["source".into(), "preprocess".into(), "verdict".into()].into_iter();
        let names = names.chain((0..workers).map(|n| format!("inference {n}"))).chain(link.as_ref().map(|_| "PLC link".into()));
        let (progress, beats) = Progress::new(names);
        let mut beats = beats.into_iter();
        // `Progress::new` gives one handle per name.
        let mut next_beat = move || beats.next().unwrap_or_else(|| unreachable!("one handle per stage"));

        let shared = Arc::new(Shared {
            counters: Counters::default(),
            timings: Timings::new(),
            started_ns: now_ns(),
            stopping: AtomicBool::new(false),
            paused: AtomicBool::new(false),
            source_ok: AtomicBool::new(false),
            source_began: AtomicBool::new(false),
            stuck: AtomicBool::new(false),
            tell_again: AtomicBool::new(false),
            failures_in_a_row: AtomicU64::new(0),
            status: Mutex::new(Status {
                host_state: HostState::Starting,
                link: link.as_ref().map(|_| plc::LinkState::Down),
                board: None,
                board_state: None,
                recipe: None,
                fault: None,
            }),
            failed: AtomicBool::new(false),
            calls: calls_in,
            waker,
        });

        let (to_source, triggers) = match options.trigger {
            TriggerMode::Board => {
                let (to_source, triggers) = bounded::<TriggerJob>(MAX_IN_FLIGHT);
                (Some(to_source), triggers)
            }
            TriggerMode::FreeRunning => (None, never()),
        };
        let link_sender = link.as_ref().map(|l| l.to_plc.clone());
        let mut threads = Vec::with_capacity(workers + 2);

        let source_stage = source_stage::SourceStage::new(
            source,
            &options,
            source_stage::Ports { triggers, out: captured_in, stale: captured.clone(), done: done_in.clone(), frames },
            Arc::clone(&shared),
            next_beat(),
        );
        threads.push(thread("source", move || source_stage.run())?);

        let preprocess_stage = preprocess_stage::PreprocessStage {
            spec: detector.preprocess().clone(),
            roi: options.roi,
            captured,
            out: prepared_in,
            done: done_in.clone(),
            inputs,
            shared: Arc::clone(&shared),
            beat: next_beat(),
        };
        threads.push(thread("preprocess", move || preprocess_stage.run())?);

        let verdict_beat = next_beat();
        for n in 0..workers {
            let worker = worker::Worker {
                detector: Arc::clone(&detector),
                policy: options.policy,
                prepared: prepared.clone(),
                done: done_in.clone(),
                maps: maps.clone(),
                shared: Arc::clone(&shared),
                beat: next_beat(),
            };
            threads.push(thread(&format!("inference {n}"), move || worker.run())?);
        }
        drop((prepared, done_in));
        let link = link.map(|handle| (handle, next_beat()));

        let verdict_stage = verdict_stage::VerdictStage::new(
            &options,
            verdict_stage::Ports { done, calls, to_source, link, sinks },
            Arc::clone(&shared),
            verdict_beat,
        );
        let verdict = thread("verdict", move || verdict_stage.run())?;

        let for_status = Arc::clone(&shared);
        let for_change = Arc::clone(&shared);
        let supervisor = supervise::spawn(
            progress,
            options.stuck_after,
            move || {
                let stats = for_status.stats();
                let c = stats.counts;
                format!(
                    "{:?}: {} parts, {} accepted, {} rejected, {} unknown, {} faults",
                    stats.host_state, c.parts, c.accepted, c.rejected, c.unknown, c.faults
                )
            },
            move |stuck| {
                for_change.stuck.store(stuck.is_some(), Ordering::SeqCst);
                for_change.tell_again.store(true, Ordering::SeqCst);
                for_change.wake();
                // The verdict stage tells the PLC; but it may be the one that is stuck.
                if stuck.is_some()
                    && let Some(link) = &link_sender
                    && let Err(error) = link.try_send(ToPlc::HostState(HostState::InternalFault))
                {
                    log::error!("the PLC cannot be told of the fault: {error}");
                }
            },
        )
        .map_err(|source| PipelineError::Thread { stage: "supervise".into(), source })?;

        Ok(Running { shared, verdict: Some(verdict), threads, supervisor: Some(supervisor) })
    }
}

fn thread<T: Send + 'static>(stage: &str, work: impl FnOnce() -> T + Send + 'static) -> Result<JoinHandle<T>, PipelineError> {
    std::thread::Builder::new()
        .name(stage.to_string())
        .spawn(work)
        .map_err(|source| PipelineError::Thread { stage: stage.to_string(), source })
}

/// A line that runs. Dropping it stops it in order, like [`Running::stop`] and [`Running::wait`].
pub struct Running {
    shared: Arc<Shared>,
    verdict: Option<JoinHandle<verdict_stage::Leftover>>,
    threads: Vec<JoinHandle<()>>,
    supervisor: Option<supervise::Supervisor>,
}

/// A line that has ended.
#[derive(Clone, Debug)]
pub struct Ended {
    /// The last figures.
    pub stats: Stats,
    /// What the recorder did, where there was one.
    pub recorder: Option<RecorderCounters>,
    /// What the journal did, where there was one.
    pub journal: Option<JournalCounters>,
}

/// Asks a line to stop or how it does, from any thread.
#[derive(Clone)]
pub struct Control {
    shared: Arc<Shared>,
}

impl Control {
    /// Stop taking parts; see [`Running::stop`].
    pub fn stop(&self) {
        self.shared.stop();
    }

    /// A copy of all figures.
    pub fn stats(&self) -> Stats {
        self.shared.stats()
    }

    /// Have the board leave its safe state, because an operator says so; the only request to a board that makes sense while its line runs.
    /// Waits up to `wait` for the answer, `None` when none came. [`RequestStatus::NotSent`] without a board, while the link is down, or while
    /// another operator's request is under way. Not for threads that parts wait for.
    pub fn clear_board(&self, wait: Duration) -> Option<RequestStatus> {
        let (answer, answered) = bounded(1);
        if self.shared.calls.try_send(Call { request: BoardRequest::Clear, answer }).is_err() {
            return Some(RequestStatus::NotSent);
        }
        answered.recv_timeout(wait).ok()
    }
}

impl Running {
    /// A handle for other threads (signals, the live page).
    pub fn control(&self) -> Control {
        Control { shared: Arc::clone(&self.shared) }
    }

    /// A copy of all figures.
    pub fn stats(&self) -> Stats {
        self.shared.stats()
    }

    /// Start the latency histograms afresh.
    pub fn reset_timings(&self) {
        self.shared.timings.reset();
    }

    /// Stop in order: take no more parts, finish those in flight, tell the board `Stopped`, write out link, recorder and journal. Returns at
    /// once; [`Running::wait`] waits.
    pub fn stop(&self) {
        self.shared.stop();
    }

    /// True when the line has ended (asked to, source at its end, or by a fault).
    pub fn ended(&self) -> bool {
        self.verdict.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Wait until the line has ended and everything is written, and return its last figures; [`Stats::fault`] says whether it ended by a
    /// fault.
    pub fn wait(mut self) -> Ended {
        let (recorder, journal) = self.join();
        Ended { stats: self.shared.stats(), recorder, journal }
    }

    fn join(&mut self) -> (Option<RecorderCounters>, Option<JournalCounters>) {
        let Some(verdict) = self.verdict.take() else { return (None, None) };
        let leftover = verdict.join();
        // The supervisor holds the last sender to the link, which ends without one.
        self.supervisor = None;
        let written = match leftover {
            Ok(leftover) => leftover.close(),
            Err(_) => {
                self.shared.fail("the verdict stage panicked; please report this with the log".into());
                (None, None)
            }
        };
        // The verdict stage ends after all others, or has given a stuck one up: such a thread cannot be joined and ends with the process.
        for thread in self.threads.drain(..) {
            if thread.is_finished() && thread.join().is_err() {
                self.shared.fail("a stage panicked outside its guard; please report this with the log".into());
            }
        }
        written
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.verdict.is_some() {
            self.shared.stop();
            self.join();
        }
    }
}
