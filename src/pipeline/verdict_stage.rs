//! The verdict thread: the one place that knows which parts are in flight. It takes the board's triggers and the PLC's commands, asks the
//! source for pictures, takes results from the workers, and sends each part's verdict off in part order and before its deadline. It
//! sleeps until the next result, event or deadline, and never waits for anything else. Where there is a link it has the link's real-time
//! priority ([`crate::priority`]), and a verdict is with the link before anything else is done about its part.

use super::inflight::{InFlight, Release};
use super::stats::{Backlog, Timed, count};
use super::{
    Call, DRAIN_LIMIT, Done, FREE_RUNNING_LIMIT, IDLE_TICK, Inspection, LINK_FLUSH_LIMIT, MAX_IN_FLIGHT, Options, Shared, Sinks,
    StageTimes, TriggerJob, due_ns, ns_from, us_from_ns,
};
use crate::anomaly::AnomalyMap;
use crate::config::TriggerMode;
use crate::frame::{Origin, PartId, now_ns};
use crate::journal::{Entry, JournalCounters, JournalHandle};
use crate::kernels::alloc::{Class, count_this_thread};
use crate::plc::{BoardState, BoardStatus, HostState, LinkSender, LinkState, PlcCommand, PlcEvent, QUEUE_PARTS, RequestStatus, ToPlc};
use crate::pool::Pooled;
use crate::preprocess::Roi;
use crate::snapshot::{Record, RecorderCounters, RecorderHandle};
use crate::source::Trigger;
use crate::supervise::Beat;
use crate::verdict::{Decision, Reason, Verdict, without_score};
use crate::wake::{Mailbox, Taken, Waker};
use crossbeam_channel::{Receiver, Sender, TryRecvError, TrySendError, never};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Duration;

/// How often a run that waits for recorder or printer looks for room.
const SINK_LOOK: Duration = Duration::from_millis(1);

/// How often a shutdown looks whether the link is done.
const FLUSH_LOOK: Duration = Duration::from_millis(2);

pub(super) struct Ports {
    pub done: Mailbox<Done>,
    /// What operators ask of the board.
    pub calls: Mailbox<Call>,
    /// `None` when free-running.
    pub to_source: Option<Sender<TriggerJob>>,
    /// The link, and the beat that says that it takes what it is given.
    pub link: Option<(crate::plc::LinkHandle, Beat)>,
    pub sinks: Sinks,
}

/// What is left to be closed after the last verdict: see [`super::Running::wait`].
pub(super) struct Leftover {
    pub link: Option<JoinHandle<()>>,
    pub recorder: Option<RecorderHandle>,
    pub journal: Option<JournalHandle>,
}

impl Leftover {
    /// Let the link write out what is queued, then recorder and journal.
    pub fn close(self) -> (Option<RecorderCounters>, Option<JournalCounters>) {
        if let Some(thread) = self.link {
            let until_ns = now_ns().saturating_add(ns_from(LINK_FLUSH_LIMIT));
            while !thread.is_finished() && now_ns() < until_ns {
                std::thread::sleep(FLUSH_LOOK);
            }
            if !thread.is_finished() {
                log::error!("the PLC link could not write out its last messages within {} s", LINK_FLUSH_LIMIT.as_secs());
            } else if thread.join().is_err() {
                log::error!("the PLC link's thread panicked");
            }
        }
        (self.recorder.map(RecorderHandle::finish), self.journal.map(JournalHandle::finish))
    }
}

pub(super) struct VerdictStage {
    done: Mailbox<Done>,
    calls: Mailbox<Call>,
    /// The one that waits for the board's answer.
    called: Option<Call>,
    to_source: Option<Sender<TriggerJob>>,
    events: Receiver<PlcEvent>,
    /// Where the link wakes this thread for `events`.
    events_waker: Option<Waker>,
    link: Option<Link>,
    recorder: Option<RecorderHandle>,
    journal: Option<JournalHandle>,
    tap: Option<Sender<Inspection>>,
    shared: Arc<Shared>,
    beat: Beat,
    trigger: TriggerMode,
    roi: Option<Roi>,

    table: InFlight<Finished>,
    next_ticket: u64,
    told: Option<HostState>,
    backlog: Backlog,
    golden: Golden,
    warned_of_triggers: bool,
    /// The source waits for inspection (a folder), so nothing is lost by waiting for recorder and printer as well. Never on a line: there,
    /// what they have no room for is skipped and counted.
    waits: bool,
}

struct Link {
    to_plc: LinkSender,
    thread: Option<JoinHandle<()>>,
    state: LinkState,
    /// When the verdict on a part was sent, by part number modulo the length: what its acknowledgement is timed against.
    sent: Box<[(PartId, u64)]>,
    /// The link did not take the last message: its queue is full. While that lasts it does not beat, and is stuck in the end.
    full: bool,
    beat: Beat,
}

/// A part's result, waiting for its turn.
struct Finished {
    inspection: Inspection,
    finished_ns: u64,
}

/// The PLC announces that a golden sample (a part known to be good) comes next.
#[derive(Clone, Copy, PartialEq)]
enum Golden {
    No,
    NextPart,
    Ticket(u64),
}

impl VerdictStage {
    pub fn new(options: &Options, ports: Ports, shared: Arc<Shared>, beat: Beat) -> Self {
        let (link, events, events_waker) = match ports.link {
            Some((handle, beat)) => {
                let sent = vec![(PartId(0), 0); QUEUE_PARTS].into_boxed_slice();
                let link = Link { to_plc: handle.to_plc, thread: handle.thread, state: LinkState::Down, sent, full: false, beat };
                (Some(link), handle.events, Some(handle.events_waker))
            }
            None => (None, never(), None),
        };
        Self {
            done: ports.done,
            calls: ports.calls,
            called: None,
            to_source: ports.to_source,
            events,
            events_waker,
            link,
            recorder: ports.sinks.recorder,
            journal: ports.sinks.journal,
            tap: options.tap.clone(),
            shared,
            beat,
            trigger: options.trigger,
            roi: options.roi,
            table: InFlight::new(MAX_IN_FLIGHT),
            next_ticket: 0,
            told: None,
            backlog: Backlog::new(),
            golden: Golden::No,
            warned_of_triggers: false,
            waits: options.lossless && options.trigger == TriggerMode::FreeRunning,
        }
    }

    pub fn run(mut self) -> Leftover {
        if self.link.is_some() {
            crate::priority::raise_this_thread("verdict");
        }
        self.shared.waker.wakes_this_thread();
        if let Some(waker) = self.events_waker.take() {
            waker.wakes_this_thread();
        }
        count_this_thread(Class::Pipeline);
        let mut give_up_ns = None;
        loop {
            self.beat.beat();
            // One of each a round, so that neither waits for a heap of the other.
            let (mut idle, mut ended) = (false, false);
            match self.done.take() {
                Taken::Item(done) => self.done(done),
                Taken::Nothing => idle = true,
                Taken::Ended => ended = true,
            }
            match self.events.try_recv() {
                Ok(event) => {
                    idle = false;
                    self.event(event);
                }
                Err(TryRecvError::Empty) => {}
                Err(TryRecvError::Disconnected) => self.link_ended(),
            }
            if let Taken::Item(call) = self.calls.take() {
                self.call(call);
            }
            self.release(Reason::DeadlineMissed);
            self.tell(false);
            if let Some(link) = &self.link
                && !link.full
            {
                link.beat.beat();
            }
            if self.shared.stopping() {
                // The source ends with the trigger queue, and one stage after the other behind it.
                self.to_source = None;
                let give_up_ns = *give_up_ns.get_or_insert_with(|| now_ns().saturating_add(ns_from(DRAIN_LIMIT)));
                if now_ns() >= give_up_ns {
                    log::error!(
                        "{} parts in flight are given up: a stage did not finish within {} s",
                        self.table.len(),
                        DRAIN_LIMIT.as_secs()
                    );
                    break;
                }
            }
            if ended {
                // All stages before this one have: everything is inspected.
                break;
            }
            if !self.backlog.is_empty() {
                self.shared.timings.record(&mut self.backlog, &[]);
            }
            if idle {
                let wait = match self.table.next_due_ns() {
                    Some(due) => IDLE_TICK.min(Duration::from_nanos(due.saturating_sub(now_ns()))),
                    None => IDLE_TICK,
                };
                // Whoever has something for this thread wakes it, also when it comes between the look above and this line.
                std::thread::park_timeout(wait);
            }
        }
        self.table.expire_all();
        self.release(Reason::Stopped);
        self.tell(true);
        self.answer(RequestStatus::NotSent);
        self.shared.timings.record(&mut self.backlog, &[]);
        Leftover { link: self.link.and_then(|l| l.thread), recorder: self.recorder, journal: self.journal }
    }

    /// A result came from a worker, or word from another stage that there will be none.
    fn done(&mut self, done: Done) {
        let Done { ticket, frame, map, verdict, mut stages, finished_ns } = done;
        if self.trigger == TriggerMode::FreeRunning {
            self.announce_free_running(ticket);
        }
        let decided_ns = now_ns();
        let inspected = map.is_some();
        if inspected {
            stages.verdict_us = us_from_ns(decided_ns.saturating_sub(finished_ns));
        }
        let mut inspection = Inspection {
            part: frame.as_ref().and_then(|f| f.part),
            seq: frame.as_ref().map_or(0, |f| f.seq),
            verdict,
            captured_ns: frame.as_ref().map_or(0, |f| f.captured_ns),
            decided_ns,
            stages,
            origin: frame.as_ref().map(|f| f.origin.clone()).unwrap_or_default(),
        };
        let in_time = self.table.waits_for(ticket);
        if !in_time {
            // The board has its `Unknown` already; the picture is kept under what was decided, with the evidence that came too late.
            count(&self.shared.counters.late_results);
            inspection.verdict = Verdict { score: verdict.score, p_value: verdict.p_value, ..without_score(Reason::DeadlineMissed) };
        }
        let kept = self.recorder.as_ref().is_some_and(|recorder| recorder.keeps(inspection.verdict.decision)).then(|| inspection.clone());
        if in_time {
            // `waits_for` has just said that there is a place for it.
            let _ = self.table.complete(ticket, Finished { inspection, finished_ns });
            // The verdict is on its way before anybody is told, or the picture is queued.
            self.release(Reason::DeadlineMissed);
        }
        if inspected {
            self.shared.timings.record(
                &mut self.backlog,
                &[
                    (Timed::Queue, stages.queue_us.into()),
                    (Timed::Preprocess, stages.preprocess_us.into()),
                    (Timed::Inference, stages.inference_us.into()),
                ],
            );
        }
        if let (Some(recorder), Some(frame), Some(inspection)) = (&self.recorder, frame, kept) {
            // A frame that could not be judged is kept with an empty map; that is no hot path, so its map need not come from the pool.
            let map = map.unwrap_or_else(|| Pooled::detached(AnomalyMap::default()));
            while self.waits && !recorder.has_room() && !self.shared.stopping() {
                self.beat.beat();
                std::thread::sleep(SINK_LOOK);
            }
            if !recorder.try_record(Record { frame, map, inspection, roi: self.roi }) {
                count(&self.shared.counters.snapshots_skipped);
            }
        }
    }

    /// Free-running frames enter the table when the first of them, or of those after them, comes out: tickets have no gaps.
    fn announce_free_running(&mut self, ticket: u64) {
        while self.next_ticket <= ticket {
            let now = now_ns();
            let due = now.saturating_add(ns_from(FREE_RUNNING_LIMIT));
            if self.table.announce(self.next_ticket, None, now, due).is_err() {
                // More frames wait behind a stuck one than the table holds: let the oldest go.
                self.table.expire_all();
                self.release(Reason::DeadlineMissed);
                if self.table.announce(self.next_ticket, None, now, due).is_err() {
                    return;
                }
            }
            self.take_golden(self.next_ticket);
            self.next_ticket += 1;
        }
    }

    fn event(&mut self, event: PlcEvent) {
        match event {
            PlcEvent::Trigger(trigger) => self.triggered(&trigger),
            PlcEvent::Acknowledged { part, received_ns } => self.acknowledged(part, received_ns),
            PlcEvent::Link(state) => self.link_changed(state),
            PlcEvent::Counters(counters) => self.shared.status().board = Some(counters),
            PlcEvent::Command(command) => self.command(command),
            PlcEvent::Board(board) => self.board_changed(board),
            PlcEvent::Answer { request, status } => {
                log::info!("the board answers {request:?}: {status:?}");
                self.answer(status);
            }
        }
    }

    /// The board announced a part.
    fn triggered(&mut self, trigger: &Trigger) {
        if let Some(link) = &mut self.link
            && link.state != LinkState::Up
        {
            // The word that the link is up was lost in a full queue; a trigger proves it.
            link.state = LinkState::Up;
        }
        if self.table.holds(trigger.part) {
            count(&self.shared.counters.duplicate_triggers);
            return;
        }
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        let due = due_ns(trigger);
        if self.table.announce(ticket, Some(trigger.part), trigger.received_ns, due).is_err() {
            count(&self.shared.counters.overflow);
            self.deliver(
                Release { ticket, part: Some(trigger.part), announced_ns: trigger.received_ns, result: None },
                Reason::DeadlineMissed,
            );
            return;
        }
        self.take_golden(ticket);
        if self.shared.stopping() || self.shared.paused.load(Ordering::SeqCst) || !self.shared.source_began.load(Ordering::SeqCst) {
            self.turn_away(ticket, trigger, Reason::Stopped);
        } else if !self.shared.source_ok.load(Ordering::SeqCst) {
            self.turn_away(ticket, trigger, Reason::NoFrame);
        } else if let Some(to_source) = &self.to_source {
            if to_source.try_send(TriggerJob { ticket, trigger: *trigger, due_ns: due }).is_err() {
                count(&self.shared.counters.overflow);
                self.turn_away(ticket, trigger, Reason::NoFrame);
            }
        } else {
            if !std::mem::replace(&mut self.warned_of_triggers, true) {
                log::warn!(
                    "the board announces parts but the line is free-running: they are rejected; set `trigger: Board` in the configuration"
                );
            }
            self.turn_away(ticket, trigger, Reason::NoFrame);
        }
    }

    /// A part that will not be inspected gets its verdict in its turn.
    fn turn_away(&mut self, ticket: u64, trigger: &Trigger, reason: Reason) {
        let now = now_ns();
        let inspection = Inspection {
            part: Some(trigger.part),
            seq: 0,
            verdict: without_score(reason),
            captured_ns: trigger.received_ns,
            decided_ns: now,
            stages: StageTimes::default(),
            origin: Origin::default(),
        };
        // It was announced a moment ago, so there is a place for it.
        let _ = self.table.complete(ticket, Finished { inspection, finished_ns: now });
    }

    fn acknowledged(&mut self, part: PartId, received_ns: u64) {
        let Some(link) = &mut self.link else { return };
        if let Some(entry) = link.sent_entry(part)
            && entry.0 == part
            && entry.1 != 0
        {
            let us = received_ns.saturating_sub(entry.1) / 1000;
            entry.1 = 0;
            self.shared.timings.record(&mut self.backlog, &[(Timed::Link, us)]);
        }
    }

    fn link_changed(&mut self, state: LinkState) {
        let Some(link) = &mut self.link else { return };
        let was_up = link.state == LinkState::Up;
        link.state = state;
        self.shared.status().link = Some(state);
        match state {
            LinkState::Up => {
                log::info!("PLC link up");
                self.told = None;
            }
            LinkState::Down | LinkState::Connecting | LinkState::Refused => {
                if was_up {
                    log::warn!("PLC link lost ({state:?}); {} parts in flight are rejected by the board", self.table.len());
                }
                // A board that comes back may number its parts afresh: nothing decided for the old ones may reach it.
                self.table.expire_all();
                self.release(Reason::LinkDown);
                // A request is forgotten with the session it was made in.
                self.answer(RequestStatus::NotSent);
            }
        }
    }

    fn board_changed(&mut self, board: BoardStatus) {
        self.shared.status().board_state = Some(board.state);
        match board.state {
            BoardState::Safe => log::error!("the board is in its safe state and lets nothing through until it is cleared"),
            BoardState::Running | BoardState::NotReady => log::info!("the board is {:?}", board.state),
        }
    }

    /// An operator asks something of the board.
    fn call(&mut self, call: Call) {
        log::info!("an operator asks the board: {:?}", call.request);
        let taken = self.called.is_none() && self.link.as_mut().is_some_and(|link| link.send(ToPlc::Request(call.request)));
        if taken {
            self.called = Some(call);
        } else {
            // A full place means that the asker has gone away.
            let _ = call.answer.try_send(RequestStatus::NotSent);
        }
    }

    /// Tell the operator who waits, if any, what became of the request.
    fn answer(&mut self, status: RequestStatus) {
        if let Some(call) = self.called.take() {
            let _ = call.answer.try_send(status);
        }
    }

    fn link_ended(&mut self) {
        log::error!("the PLC link's thread has ended; the board rejects all parts by itself");
        self.events = never();
        self.link_changed(LinkState::Down);
    }

    fn command(&mut self, command: PlcCommand) {
        log::info!("PLC command: {command:?}");
        match command {
            PlcCommand::Start => self.shared.paused.store(false, Ordering::SeqCst),
            PlcCommand::Stop | PlcCommand::Pause => self.shared.paused.store(true, Ordering::SeqCst),
            PlcCommand::Recipe(recipe) => self.shared.status().recipe = Some(recipe),
            PlcCommand::GoldenCheck => self.golden = Golden::NextPart,
        }
    }

    fn take_golden(&mut self, ticket: u64) {
        if self.golden == Golden::NextPart {
            self.golden = Golden::Ticket(ticket);
        }
    }

    /// Send off every part whose turn or time has come; `expired` is the reason for those whose time came first.
    fn release(&mut self, expired: Reason) {
        while let Some(release) = self.table.release(now_ns()) {
            self.deliver(release, expired);
        }
    }

    fn deliver(&mut self, release: Release<Finished>, expired: Reason) {
        let now = now_ns();
        let Release { ticket, part, announced_ns, result } = release;
        let inspected_since = result.as_ref().map(|f| f.finished_ns);
        let mut inspection = match result {
            Some(finished) => finished.inspection,
            None => Inspection {
                part,
                seq: 0,
                verdict: without_score(expired),
                captured_ns: announced_ns,
                decided_ns: now,
                stages: StageTimes::default(),
                origin: Origin::default(),
            },
        };
        inspection.part = part.or(inspection.part);
        if inspection.captured_ns == 0 {
            inspection.captured_ns = announced_ns;
        }
        self.send(&inspection, now);
        self.account(&inspection);
        if inspection.stages.inference_us > 0
            && let Some(finished_ns) = inspected_since
        {
            self.shared.timings.record(
                &mut self.backlog,
                &[
                    (Timed::Verdict, now.saturating_sub(finished_ns) / 1000),
                    (Timed::Total, now.saturating_sub(inspection.captured_ns) / 1000),
                ],
            );
        }
        if part.is_some() {
            self.shared.timings.record(&mut self.backlog, &[(Timed::Response, now.saturating_sub(announced_ns) / 1000)]);
        }
        if self.golden == Golden::Ticket(ticket) {
            self.golden = Golden::No;
            self.check_golden(&inspection);
        }
        if let Some(journal) = &self.journal
            && !journal.try_write(Entry::from(&inspection))
        {
            count(&self.shared.counters.journal_skipped);
        }
        let Some(tap) = &self.tap else { return };
        loop {
            match tap.try_send(inspection) {
                Ok(()) => return,
                Err(TrySendError::Full(back)) if self.waits && !self.shared.stopping() => {
                    self.beat.beat();
                    std::thread::sleep(SINK_LOOK);
                    inspection = back;
                }
                Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => break,
            }
        }
        count(&self.shared.counters.tap_skipped);
    }

    /// Hand the verdict to the link, if the part has a number and the link is up.
    fn send(&mut self, inspection: &Inspection, now: u64) {
        let (Some(link), Some(part)) = (&mut self.link, inspection.part) else { return };
        let message = ToPlc::Verdict { part, verdict: inspection.verdict, decided_ns: now };
        if link.state != LinkState::Up || !link.send(message) {
            count(&self.shared.counters.undelivered);
        } else if let Some(entry) = link.sent_entry(part) {
            *entry = (part, now);
        }
    }

    fn account(&self, inspection: &Inspection) {
        let c = &self.shared.counters;
        count(&c.parts);
        count(match inspection.verdict.decision {
            Decision::Accept => &c.accepted,
            Decision::Reject => &c.rejected,
            Decision::Unknown => &c.unknown,
            Decision::Fault => &c.faults,
        });
        match inspection.verdict.reason {
            Reason::DeadlineMissed => count(&c.missed_deadline),
            Reason::NoFrame => count(&c.no_frame),
            Reason::Stopped => count(&c.while_stopped),
            Reason::LinkDown => count(&c.link_lost),
            Reason::Normal | Reason::Anomalous | Reason::NotFinite | Reason::BadFrame | Reason::ModelError => {}
        }
    }

    fn check_golden(&self, inspection: &Inspection) {
        count(&self.shared.counters.golden_checks);
        let Verdict { decision, reason, score, p_value } = inspection.verdict;
        if decision == Decision::Accept {
            log::info!("golden sample accepted: score {score:.3}, p {p_value:.4}");
        } else {
            count(&self.shared.counters.golden_failed);
            log::error!(
                "golden sample not accepted ({decision:?}, {reason:?}, score {score:.3}, p {p_value:.4}): check light, focus, position and model"
            );
        }
    }

    /// What the line is in, for the PLC.
    fn host_state(&self, drained: bool) -> HostState {
        let s = &self.shared;
        if s.failed() || s.stuck.load(Ordering::SeqCst) {
            HostState::InternalFault
        } else if drained || s.paused.load(Ordering::SeqCst) {
            HostState::Stopped
        } else if !s.source_began.load(Ordering::SeqCst) {
            HostState::Starting
        } else if !s.source_ok.load(Ordering::SeqCst) {
            HostState::CameraFault
        } else {
            HostState::Running
        }
    }

    /// Tell the PLC what the line is in, if that changed (or it has to be told again).
    fn tell(&mut self, drained: bool) {
        let state = self.host_state(drained);
        if self.shared.tell_again.swap(false, Ordering::SeqCst) {
            self.told = None;
        }
        let told = self.told == Some(state);
        match &mut self.link {
            // A link that was full is asked again at every step until it takes something.
            Some(link) if !told || link.full => {
                self.told = link.send(ToPlc::HostState(state)).then_some(state);
            }
            Some(_) => {}
            None => self.told = Some(state),
        }
        if !told {
            self.shared.status().host_state = state;
        }
    }
}

impl Link {
    /// False when the link takes nothing: its queue is full or its thread is gone.
    fn send(&mut self, message: ToPlc) -> bool {
        let taken = self.to_plc.try_send(message).is_ok();
        self.full = !taken;
        taken
    }

    fn sent_entry(&mut self, part: PartId) -> Option<&mut (PartId, u64)> {
        let length = self.sent.len().max(1);
        self.sent.get_mut(part.0 as usize % length)
    }
}
