//! The source thread: opens the source, fetches frames (free-running, or one for each trigger), and closes and re-opens a source that fails
//! or falls silent, with back-off, while the PLC is told and its parts are rejected.

use super::{Captured, Done, IDLE_TICK, Options, Shared, TriggerJob, ns_from, report, send_patiently, stats};
use crate::config::TriggerMode;
use crate::frame::{Frame, PartId, now_ns};
use crate::kernels::alloc::{Class, count_this_thread, counted_as};
use crate::pool::Pool;
use crate::source::{Grab, Source, SourceError, Trigger};
use crate::supervise::Beat;
use crate::verdict::Reason;
use crate::wake::Post;
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TrySendError};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// One call to the source waits this long at most, so that the stage beats and sees a stop in time.
const GRAB_SLICE: Duration = Duration::from_millis(200);

/// With no trigger waiting, a live source is looked at this often, to notice that it is gone before the next part comes.
const IDLE_LOOK: Duration = Duration::from_millis(50);

/// A frame that comes in the last eighth of the time allowed could not be inspected any more: the part is given up as "no frame" before.
const LAST_CHANCE_DIVISOR: u64 = 8;

/// So many errors in a row from a source that cannot be re-opened usefully (a folder, the simulated line) end the run.
const MAX_ERRORS_IN_A_ROW: u32 = 10;

pub(super) struct Ports {
    /// Parts to be pictured; never ready when free-running.
    pub triggers: Receiver<TriggerJob>,
    pub out: Sender<Captured>,
    /// The other end of `out`: a waiting frame is taken back when a newer one replaces it.
    pub stale: Receiver<Captured>,
    pub done: Post<Done>,
    pub frames: Pool<Vec<u8>>,
}

pub(super) struct SourceStage {
    source: Box<dyn Source>,
    ports: Ports,
    shared: Arc<Shared>,
    beat: Beat,
    trigger: TriggerMode,
    live: bool,
    lossless: bool,
    number_free_frames: bool,
    stall: Duration,
    backoff_min: Duration,
    backoff_max: Duration,
    /// Since when a live source brings nothing.
    silent_since_ns: Option<u64>,
    errors_in_a_row: u32,
    /// The newest frame seen while no trigger waited; it is the part's picture if it turns out to be younger than the trigger.
    held: Option<Frame>,
}

/// Whether the stage goes on.
#[derive(PartialEq)]
enum Flow {
    GoOn,
    End,
}

impl SourceStage {
    pub fn new(source: Box<dyn Source>, options: &Options, ports: Ports, shared: Arc<Shared>, beat: Beat) -> Self {
        Self {
            source,
            ports,
            shared,
            beat,
            trigger: options.trigger,
            live: options.live,
            lossless: options.lossless,
            number_free_frames: options.number_free_frames,
            stall: options.stall,
            backoff_min: options.backoff_min,
            backoff_max: options.backoff_max,
            silent_since_ns: None,
            errors_in_a_row: 0,
            held: None,
        }
    }

    pub fn run(mut self) {
        count_this_thread(Class::Pipeline);
        self.beat.beat();
        let opened = self.open();
        self.shared.source_began.store(true, Ordering::SeqCst);
        let flow = match opened {
            Ok(()) => {
                log::info!("source: {}", self.source.describe());
                self.set_ok(true);
                Flow::GoOn
            }
            Err(error) => self.recover(&error.to_string()),
        };
        if flow == Flow::GoOn {
            match self.trigger {
                TriggerMode::FreeRunning => self.free_running(),
                TriggerMode::Board => self.triggered(),
            }
        }
        self.turn_away_triggers();
    }

    fn free_running(&mut self) {
        while !self.shared.stopping() {
            self.beat.beat();
            let paused = self.shared.paused.load(Ordering::Relaxed);
            if paused && !self.live {
                std::thread::sleep(IDLE_LOOK);
                continue;
            }
            let flow = match self.grab(None, GRAB_SLICE) {
                // A live source goes on running while the line is paused; what it sees is nobody's part.
                Ok(Grab::Frame(frame)) if paused => {
                    self.heard();
                    drop(frame);
                    Flow::GoOn
                }
                Ok(Grab::Frame(mut frame)) => {
                    self.heard();
                    stats::count(&self.shared.counters.frames);
                    if self.number_free_frames {
                        // Wraps like a board's own numbers.
                        frame.part = Some(PartId(frame.seq as u32));
                    }
                    self.send_on(Captured { ticket: None, due_ns: u64::MAX, frame })
                }
                Ok(Grab::Timeout) => self.silent(),
                Ok(Grab::End) => Flow::End,
                Err(error) => self.failed(&error),
            };
            if flow == Flow::End {
                break;
            }
        }
    }

    fn triggered(&mut self) {
        loop {
            self.beat.beat();
            let idle = if self.live { IDLE_LOOK } else { IDLE_TICK };
            let flow = match self.ports.triggers.recv_timeout(idle) {
                Ok(job) => self.picture(&job),
                Err(RecvTimeoutError::Timeout) if self.live => self.look(),
                Err(RecvTimeoutError::Timeout) => Flow::GoOn,
                // The verdict stage takes no more parts.
                Err(RecvTimeoutError::Disconnected) => Flow::End,
            };
            if flow == Flow::End {
                break;
            }
        }
    }

    /// Fetch the picture of one part and send it on; whatever goes wrong, the verdict stage is told.
    fn picture(&mut self, job: &TriggerJob) -> Flow {
        let held = self.held.take();
        if let Some(frame) = held.filter(|f| f.captured_ns >= job.trigger.received_ns) {
            return self.send_part(job, frame);
        }
        let allowed = job.due_ns.saturating_sub(job.trigger.received_ns);
        let give_up_ns = job.due_ns.saturating_sub(allowed / LAST_CHANCE_DIVISOR);
        loop {
            self.beat.beat();
            let left = Duration::from_nanos(give_up_ns.saturating_sub(now_ns()));
            if left.is_zero() {
                return self.no_frame(job.ticket);
            }
            match self.grab(Some(&job.trigger), left.min(GRAB_SLICE)) {
                Ok(Grab::Frame(frame)) => return self.send_part(job, frame),
                Ok(Grab::Timeout) => {
                    if self.is_stalled() {
                        let told = self.no_frame(job.ticket);
                        let recovered = self.silent();
                        return if told == Flow::End { told } else { recovered };
                    }
                }
                Ok(Grab::End) => {
                    log::info!("the source is at its end");
                    let told = self.no_frame(job.ticket);
                    self.set_ok(false);
                    self.shared.stop();
                    return told;
                }
                Err(error) => {
                    let told = self.no_frame(job.ticket);
                    let recovered = self.failed(&error);
                    return if told == Flow::End { told } else { recovered };
                }
            }
        }
    }

    fn send_part(&mut self, job: &TriggerJob, mut frame: Frame) -> Flow {
        self.heard();
        stats::count(&self.shared.counters.frames);
        frame.part = Some(job.trigger.part);
        let captured = Captured { ticket: Some(job.ticket), due_ns: job.due_ns, frame };
        if send_patiently(&self.ports.out, captured, &self.beat) { Flow::GoOn } else { Flow::End }
    }

    fn no_frame(&mut self, ticket: u64) -> Flow {
        if report(&self.ports.done, Done::failed(ticket, None, Reason::NoFrame), &self.beat) { Flow::GoOn } else { Flow::End }
    }

    /// Between triggers: is a live source still there?
    fn look(&mut self) -> Flow {
        match self.grab(None, Duration::ZERO) {
            Ok(Grab::Frame(frame)) => {
                self.heard();
                self.held = Some(frame);
                Flow::GoOn
            }
            Ok(Grab::Timeout) => self.silent(),
            Ok(Grab::End) => Flow::End,
            Err(error) => self.failed(&error),
        }
    }

    /// Send a free-running frame on: wait for room, or replace the frame that waits.
    fn send_on(&mut self, captured: Captured) -> Flow {
        if self.lossless {
            return if send_patiently(&self.ports.out, captured, &self.beat) { Flow::GoOn } else { Flow::End };
        }
        let mut captured = captured;
        loop {
            match self.ports.out.try_send(captured) {
                Ok(()) => return Flow::GoOn,
                Err(TrySendError::Disconnected(_)) => return Flow::End,
                Err(TrySendError::Full(newer)) => {
                    // Preprocess may have taken the waiting frame in this very moment; then there is room now.
                    if self.ports.stale.try_recv().is_ok() {
                        stats::count(&self.shared.counters.dropped_frames);
                    }
                    captured = newer;
                }
            }
        }
    }

    fn grab(&mut self, trigger: Option<&Trigger>, timeout: Duration) -> Result<Grab, SourceError> {
        let Self { source, ports, .. } = self;
        match catch_unwind(AssertUnwindSafe(|| source.grab(trigger, timeout, &ports.frames))) {
            Ok(grabbed) => grabbed,
            Err(_) => {
                stats::count(&self.shared.counters.panics);
                Err(SourceError::Failed { what: "the source".into(), why: "it panicked; please report this with the log".into() })
            }
        }
    }

    fn open(&mut self) -> Result<(), SourceError> {
        let source = &mut self.source;
        // Opening may allocate as it likes: it is not the hot path.
        match catch_unwind(AssertUnwindSafe(|| counted_as(Class::Untracked, || source.open()))) {
            Ok(opened) => opened,
            Err(_) => {
                stats::count(&self.shared.counters.panics);
                Err(SourceError::Open { what: "the source".into(), why: "it panicked; please report this with the log".into() })
            }
        }
    }

    /// A frame came.
    fn heard(&mut self) {
        self.silent_since_ns = None;
        self.errors_in_a_row = 0;
        if !self.shared.source_ok.load(Ordering::Relaxed) {
            self.set_ok(true);
        }
    }

    /// True when a live source has been silent for too long. With all frames on loan the silence is ours and not the source's.
    fn is_stalled(&mut self) -> bool {
        if !self.live || self.ports.frames.idle() == 0 {
            self.silent_since_ns = None;
            return false;
        }
        let now = now_ns();
        let since = *self.silent_since_ns.get_or_insert(now);
        now.saturating_sub(since) >= ns_from(self.stall)
    }

    /// No frame came; re-open the source if that has lasted for too long.
    fn silent(&mut self) -> Flow {
        if !self.is_stalled() {
            return Flow::GoOn;
        }
        let why = format!("no frame for {} ms", self.stall.as_millis());
        self.recover(&why)
    }

    /// The source reported an error.
    fn failed(&mut self, error: &SourceError) -> Flow {
        stats::count(&self.shared.counters.source_errors);
        if self.live {
            return self.recover(&error.to_string());
        }
        // Opening a folder again would start it from the beginning: go on with the next picture instead.
        log::warn!("{error}");
        self.errors_in_a_row += 1;
        if self.errors_in_a_row >= MAX_ERRORS_IN_A_ROW {
            self.set_ok(false);
            self.shared.fail(format!("{error} ({MAX_ERRORS_IN_A_ROW} errors in a row)"));
            return Flow::End;
        }
        Flow::GoOn
    }

    /// Close and open the source again, with back-off, until it brings frames or the line stops. Meanwhile the PLC is told.
    fn recover(&mut self, why: &str) -> Flow {
        self.set_ok(false);
        self.held = None;
        if !self.live {
            self.shared.fail(why.to_string());
            return Flow::End;
        }
        log::error!("camera fault: {why}; parts are rejected until it brings frames again");
        let mut pause = self.backoff_min;
        while !self.shared.stopping() {
            self.rest(pause);
            if self.shared.stopping() {
                break;
            }
            stats::count(&self.shared.counters.source_restarts);
            match self.open() {
                Ok(()) if self.brings_frames() => {
                    log::warn!("camera is back: {}", self.source.describe());
                    self.heard();
                    return Flow::GoOn;
                }
                Ok(()) => log::warn!("camera opened but brings no frame within {} ms", self.stall.as_millis()),
                Err(error) => log::warn!("{error}; next try in {} ms", (pause * 2).min(self.backoff_max).as_millis()),
            }
            pause = (pause * 2).min(self.backoff_max);
        }
        Flow::End
    }

    /// Whether a freshly opened source brings a frame before it would count as stalled.
    fn brings_frames(&mut self) -> bool {
        let until_ns = now_ns().saturating_add(ns_from(self.stall));
        while now_ns() < until_ns && !self.shared.stopping() {
            self.beat.beat();
            self.turn_away_triggers();
            match self.grab(None, GRAB_SLICE) {
                Ok(Grab::Frame(_)) => return true,
                Ok(Grab::Timeout) => {}
                Ok(Grab::End) => return false,
                Err(error) => {
                    log::warn!("{error}");
                    return false;
                }
            }
        }
        false
    }

    fn rest(&mut self, pause: Duration) {
        let until_ns = now_ns().saturating_add(ns_from(pause));
        while !self.shared.stopping() {
            self.beat.beat();
            self.turn_away_triggers();
            let left = Duration::from_nanos(until_ns.saturating_sub(now_ns()));
            if left.is_zero() {
                break;
            }
            std::thread::sleep(left.min(IDLE_LOOK));
        }
    }

    /// Parts that were announced before the fault was known get their verdict now. Later ones are turned away by the verdict stage itself.
    fn turn_away_triggers(&mut self) {
        while let Ok(job) = self.ports.triggers.try_recv() {
            if self.no_frame(job.ticket) == Flow::End {
                break;
            }
        }
    }

    fn set_ok(&self, ok: bool) {
        self.shared.source_ok.store(ok, Ordering::SeqCst);
        self.shared.wake();
    }
}
