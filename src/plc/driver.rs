//! One thread that owns a port: opens it, re-opens it with back-off, runs the protocol, writes what it has to say. A second thread only reads,
//! and hands over what arrived.
//!
//! The protocol behind [`Machine`] is pure: bytes, messages and the time come in, bytes and events go out. The owner sleeps in exactly one place,
//! and a verdict from the pipeline or bytes from the reader wake it at once ([`Waker`]). It never calls `read` or `poll` on the port: on a
//! terminal these wait for a kernel work queue, for milliseconds when the machine is loaded (see [`PortReader`]). Both threads are real-time,
//! at the priority of the pipeline's verdict thread ([`crate::priority`]).

use crate::frame::{PartId, now_ns};
use crate::plc::port::{OpenPort, Port, PortError, PortReader};
use crate::plc::stats::{LinkStats, add};
use crate::plc::{BoardRequest, EventSender, HostState, LinkHandle, LinkSender, LinkState, PlcEvent, QUEUE_PARTS, RequestStatus, ToPlc};
use crate::priority::raise_this_thread;
use crate::verdict::Verdict;
use crate::wake::Waker;
use crossbeam_channel::{Receiver, RecvTimeoutError, SendTimeoutError, Sender, TryRecvError, TrySendError};
use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// A protocol over a port. Called by the link's thread only; must not block.
pub(crate) trait Machine: Send {
    /// The port was (re-)opened: forget the old conversation and start a new one.
    fn opened(&mut self, now_ns: u64, io: &mut Io<'_>);
    /// The port is gone.
    fn closed(&mut self);
    /// A verdict to deliver. The port is open; `false` when it cannot be delivered (no session, no such part).
    fn verdict(&mut self, part: PartId, verdict: &Verdict, decided_ns: u64, now_ns: u64, io: &mut Io<'_>) -> bool;
    /// An operator's request; answered with [`PlcEvent::Answer`], now or later. The port is open.
    fn request(&mut self, request: BoardRequest, now_ns: u64, io: &mut Io<'_>) {
        let _ = now_ns;
        io.events.put(PlcEvent::Answer { request, status: RequestStatus::NotSent }, io.stats);
    }
    /// The inspector's state changed (or is told for the first time). Also called while the port is closed.
    fn host_state(&mut self, state: HostState, now_ns: u64);
    /// Bytes arrived at `now_ns`.
    fn received(&mut self, bytes: &[u8], now_ns: u64, io: &mut Io<'_>);
    /// Time passed. Returns when to be called next at the latest.
    fn tick(&mut self, now_ns: u64, io: &mut Io<'_>) -> u64;
    /// The link ends in good order: say so to the other side, if the protocol can.
    fn closing(&mut self, now_ns: u64, io: &mut Io<'_>);
}

/// What a [`Machine`] acts on.
pub(crate) struct Io<'a> {
    pub tx: &'a mut Tx,
    pub events: &'a mut EventSink,
    pub stats: &'a LinkStats,
}

/// Which way tapped bytes went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the other side to us.
    In,
    /// From us to the other side.
    Out,
}

/// Sees every byte that crosses the port, when it does; for monitors. Runs on the link's thread: must not block on anything slow.
pub type Tap = Box<dyn FnMut(Direction, u64, &[u8]) + Send>;

/// Bytes that wait for the port. 256 verdict frames of 30 bytes: what a full queue of verdicts comes to.
const TX_BYTES: usize = 8 * 1024;
/// An open port that takes no byte for this long is closed and opened again: a hung USB adapter behaves so, and nothing else helps it. At
/// 9600 baud the kernel's 4 KB buffer empties in 4.3 s, but it takes new bytes long before it is empty.
const WRITE_STALL_NS: u64 = 2_000_000_000;
/// At the end, what is queued may take this long to go out: half the shortest systemd stop time-out anyone sets.
const DRAIN_NS: u64 = 1_000_000_000;
/// First pause before an open is tried again; doubles to [`BACKOFF_MAX`]. A re-plugged adapter needs 0.1-0.5 s to enumerate.
const BACKOFF_MIN: Duration = Duration::from_millis(100);
/// Longest pause: a line must not stand for longer than this after the cable is back.
const BACKOFF_MAX: Duration = Duration::from_secs(2);
/// The thread wakes at least this often, whatever the protocol says.
const TICK_NS: u64 = 20_000_000;
/// A port that takes no bytes now is tried again after this: 12 characters at 115200 baud.
const WRITE_RETRY_NS: u64 = 1_000_000;
/// Retry interval for events that found the pipeline's queue full.
const EVENT_RETRY_NS: u64 = 2_000_000;
/// Bytes handed over in one go: what a 115200-baud line brings in 20 ms.
const CHUNK_BYTES: usize = 256;
/// Chunks between reader and owner. Full means that the owner is stuck; the reader then waits, and the kernel's buffer after it.
const CHUNKS: usize = 64;

/// Bytes as they arrived.
struct Chunk {
    bytes: [u8; CHUNK_BYTES],
    len: usize,
    arrived_ns: u64,
}

/// What the reader hands over: bytes, or how the port was lost.
type Arrival = Result<Chunk, String>;

/// Bytes on their way to the kernel, with the places where verdicts end.
pub(crate) struct Tx {
    bytes: VecDeque<u8>,
    /// Bytes handed to the kernel since the port was opened.
    written: u64,
    /// (position in the stream just after the verdict's last byte, when it was taken), in order.
    verdicts: VecDeque<(u64, u64)>,
}

impl Tx {
    fn new() -> Self {
        Self { bytes: VecDeque::with_capacity(TX_BYTES), written: 0, verdicts: VecDeque::with_capacity(QUEUE_PARTS) }
    }

    /// Bytes that [`push`](Self::push) would take.
    pub fn room(&self) -> usize {
        TX_BYTES.saturating_sub(self.bytes.len())
    }

    /// Whether everything was handed to the kernel.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Queue bytes, as many as fit; returns how many.
    pub fn push(&mut self, bytes: &[u8]) -> usize {
        let n = bytes.len().min(self.room());
        self.bytes.extend(bytes.iter().take(n));
        n
    }

    /// A verdict taken at `decided_ns` ends at the last byte queued so far; its latency is measured when that byte is written.
    pub fn mark_verdict(&mut self, decided_ns: u64) {
        if self.verdicts.len() < QUEUE_PARTS {
            self.verdicts.push_back((self.written + self.bytes.len() as u64, decided_ns));
        }
    }

    /// `n` bytes were written: count verdicts that went with them.
    fn wrote(&mut self, n: usize, stats: &LinkStats) {
        self.bytes.drain(..n.min(self.bytes.len()));
        self.written += n as u64;
        while let Some(&(end, decided_ns)) = self.verdicts.front() {
            if end > self.written {
                break;
            }
            self.verdicts.pop_front();
            stats.verdict_to_kernel(now_ns().saturating_sub(decided_ns));
        }
    }

    /// The port is gone and what was queued with it; returns how many verdicts were.
    fn reset(&mut self) -> usize {
        let lost = self.verdicts.len();
        self.bytes.clear();
        self.verdicts.clear();
        self.written = 0;
        lost
    }
}

/// Events on their way to the pipeline. Triggers and commands are held when its queue is full, others are dropped and counted.
pub(crate) struct EventSink {
    events: EventSender,
    held: VecDeque<PlcEvent>,
    /// Last state told to the machine's user, and whether the pipeline has heard it.
    link: LinkState,
    link_told: bool,
}

/// Triggers and commands held while the pipeline's queue is full: the 64 parts a board keeps in flight, and as many again for commands. More
/// means that the pipeline is dead; then they are dropped and counted, and the board rejects.
const HELD: usize = 128;

impl EventSink {
    fn new(events: EventSender) -> Self {
        Self { events, held: VecDeque::with_capacity(HELD), link: LinkState::Down, link_told: false }
    }

    /// Tell the pipeline.
    pub fn put(&mut self, event: PlcEvent, stats: &LinkStats) {
        let must_arrive = matches!(event, PlcEvent::Trigger(_) | PlcEvent::Command(_));
        if matches!(event, PlcEvent::Trigger(_)) {
            add(&stats.counts().triggers, 1);
        }
        // Not past those that wait already: the pipeline sees triggers in the order of the parts.
        if self.held.is_empty() {
            match self.events.try_send(event) {
                Ok(()) => return,
                Err(TrySendError::Full(_)) => {}
                Err(TrySendError::Disconnected(_)) => {
                    add(if must_arrive { &stats.counts().triggers_dropped } else { &stats.counts().events_dropped }, 1);
                    return;
                }
            }
        }
        if !must_arrive {
            add(&stats.counts().events_dropped, 1);
        } else if self.held.len() < HELD {
            self.held.push_back(event);
        } else {
            add(&stats.counts().triggers_dropped, 1);
        }
    }

    /// The link's state; told once per change, and again and again until the pipeline has room for it.
    pub fn link(&mut self, state: LinkState) {
        if state != self.link {
            self.link = state;
            self.link_told = false;
        }
        if !self.link_told {
            self.link_told = self.events.try_send(PlcEvent::Link(state)).is_ok();
        }
    }

    /// Try again to deliver what is held; `true` when nothing is left.
    fn flush(&mut self) -> bool {
        self.link(self.link);
        while let Some(event) = self.held.front() {
            if self.events.try_send(*event).is_err() {
                return false;
            }
            self.held.pop_front();
        }
        self.link_told
    }
}

/// Why the port is not served any more.
enum Ended {
    /// The pipeline dropped its end; all was written.
    Stopped,
    /// The port is gone.
    Lost(PortError),
}

/// Start the thread.
///
/// # Errors
/// When the system has no more threads or file descriptors.
pub(crate) fn spawn(opener: Box<dyn OpenPort>, machine: Box<dyn Machine>, tap: Option<Tap>) -> io::Result<LinkHandle> {
    let (to_plc, queue) = crossbeam_channel::bounded(QUEUE_PARTS);
    let (events_in, events) = crossbeam_channel::bounded(QUEUE_PARTS);
    let (waker, events_waker) = (Waker::default(), Waker::default());
    let stats = Arc::new(LinkStats::default());
    let driver = Driver {
        opener,
        machine,
        queue,
        tx: Tx::new(),
        events: EventSink::new(EventSender { queue: events_in, waker: events_waker.clone() }),
        stats: stats.clone(),
        tap,
        stopping: false,
        waker: waker.clone(),
    };
    let thread = std::thread::Builder::new().name("plc-link".into()).spawn(move || driver.run())?;
    Ok(LinkHandle { to_plc: LinkSender::new(to_plc, waker), events, events_waker, stats, thread: Some(thread) })
}

struct Driver {
    opener: Box<dyn OpenPort>,
    machine: Box<dyn Machine>,
    queue: Receiver<ToPlc>,
    tx: Tx,
    events: EventSink,
    stats: Arc<LinkStats>,
    tap: Option<Tap>,
    stopping: bool,
    /// Wakes the link's thread.
    waker: Waker,
}

impl Driver {
    fn run(mut self) {
        crate::kernels::alloc::count_this_thread(crate::kernels::alloc::Class::Pipeline);
        raise_this_thread("plc-link");
        self.waker.wakes_this_thread();
        let mut backoff = BACKOFF_MIN;
        let mut last_complaint = String::new();
        while !self.stopping {
            match self.opener.open() {
                Ok(port) => {
                    log::info!("PLC link: {} opened", self.opener.name());
                    last_complaint.clear();
                    add(&self.stats.counts().opens, 1);
                    let opened_ns = now_ns();
                    let ended = self.serve(port);
                    let undelivered = self.tx.reset();
                    add(&self.stats.counts().verdicts_undelivered, undelivered as u64);
                    self.machine.closed();
                    self.events.link(LinkState::Down);
                    match ended {
                        Ended::Stopped => break,
                        Ended::Lost(error) => {
                            add(&self.stats.counts().losses, 1);
                            log::warn!("PLC link: {error}; opening it again");
                        }
                    }
                    // A port that flaps within its back-off goes on backing off.
                    if now_ns().saturating_sub(opened_ns) > BACKOFF_MAX.as_nanos() as u64 {
                        backoff = BACKOFF_MIN;
                    }
                }
                Err(error) => {
                    self.events.link(LinkState::Down);
                    // Each complaint once: a cable that is out all night must not fill the journal.
                    let complaint = error.to_string();
                    if complaint != last_complaint {
                        log::warn!("PLC link: {complaint}; trying again every {} s", BACKOFF_MAX.as_secs());
                        last_complaint = complaint;
                    }
                }
            }
            self.pause(backoff);
            backoff = (backoff * 2).min(BACKOFF_MAX);
        }
        log::debug!("PLC link: {} closed", self.opener.name());
    }

    /// Wait with the port closed. Verdicts cannot be delivered meanwhile: the board's deadline rejects those parts.
    fn pause(&mut self, how_long: Duration) {
        let until = now_ns().saturating_add(u64::try_from(how_long.as_nanos()).unwrap_or(u64::MAX));
        loop {
            let told = self.events.flush();
            let left = until.saturating_sub(now_ns());
            if left == 0 {
                return;
            }
            let wait = if told { left } else { left.min(EVENT_RETRY_NS) };
            match self.queue.recv_timeout(Duration::from_nanos(wait)) {
                Ok(ToPlc::Verdict { .. }) => add(&self.stats.counts().verdicts_undelivered, 1),
                Ok(ToPlc::HostState(state)) => self.machine.host_state(state, now_ns()),
                Ok(ToPlc::Request(request)) => {
                    self.events.put(PlcEvent::Answer { request, status: RequestStatus::NotSent }, &self.stats);
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    self.stopping = true;
                    return;
                }
            }
        }
    }

    /// Serve an open port until it is lost or the pipeline is done.
    fn serve(&mut self, mut port: Box<dyn Port>) -> Ended {
        let (arrivals_in, arrivals) = crossbeam_channel::bounded(CHUNKS);
        let over = Arc::new(AtomicBool::new(false));
        let reader = port.reader().and_then(|reader| {
            let (over, waker) = (over.clone(), self.waker.clone());
            std::thread::Builder::new().name("plc-read".into()).spawn(move || {
                raise_this_thread("plc-read");
                crate::kernels::alloc::count_this_thread(crate::kernels::alloc::Class::Pipeline);
                read(reader, &arrivals_in, &waker, &over);
            })
        });
        let reader = match reader {
            Ok(reader) => reader,
            Err(error) => return Ended::Lost(self.lost(format!("cannot read from it ({error})"))),
        };
        let ended = self.converse(port.as_mut(), &arrivals);
        // The reader ends within its READ_WAIT. Only then is the port closed, and only then can it be opened again.
        over.store(true, Ordering::Relaxed);
        drop(arrivals);
        if matches!(ended, Ended::Lost(_))
            && let Err(error) = port.discard_output()
        {
            log::debug!("PLC link: {}: nothing to discard ({error})", self.opener.name());
        }
        drop(port);
        if reader.join().is_err() {
            log::error!("PLC link: the reader of {} panicked", self.opener.name());
        }
        ended
    }

    fn lost(&self, why: String) -> PortError {
        PortError::Lost { port: self.opener.name(), why }
    }

    fn converse(&mut self, port: &mut dyn Port, arrivals: &Receiver<Arrival>) -> Ended {
        let name = self.opener.name();
        let lost = |why: String| Ended::Lost(PortError::Lost { port: name.clone(), why });
        let mut last_progress_ns = now_ns();
        let mut drain_until_ns = u64::MAX;
        self.events.link(LinkState::Connecting);
        let Self { machine, queue, tx, events, stats, tap, stopping, .. } = self;
        machine.opened(now_ns(), &mut Io { tx, events, stats });
        loop {
            // Verdicts first, and out before anything else.
            while !*stopping {
                match queue.try_recv() {
                    Ok(ToPlc::Verdict { part, verdict, decided_ns }) => {
                        if !machine.verdict(part, &verdict, decided_ns, now_ns(), &mut Io { tx, events, stats }) {
                            add(&stats.counts().verdicts_undelivered, 1);
                        }
                    }
                    Ok(ToPlc::HostState(state)) => machine.host_state(state, now_ns()),
                    Ok(ToPlc::Request(request)) => machine.request(request, now_ns(), &mut Io { tx, events, stats }),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => {
                        *stopping = true;
                        let now = now_ns();
                        machine.closing(now, &mut Io { tx, events, stats });
                        drain_until_ns = now.saturating_add(DRAIN_NS);
                    }
                }
            }
            let mut progress = write(port, tx, stats, tap);
            let now = now_ns();
            let mut next_ns = machine.tick(now, &mut Io { tx, events, stats }).min(now + TICK_NS);
            if progress.is_ok() {
                progress = write(port, tx, stats, tap).map(|more| more || matches!(progress, Ok(true)));
            }
            match progress {
                Ok(true) => last_progress_ns = now,
                Ok(false) => {}
                Err(error) => return lost(describe(&error)),
            }
            if *stopping && (tx.is_empty() || now >= drain_until_ns) {
                return Ended::Stopped;
            }
            if tx.is_empty() {
                last_progress_ns = now;
            } else if now.saturating_sub(last_progress_ns) > WRITE_STALL_NS {
                let lines = port.modem_lines().map(|lines| format!(" ({lines})")).unwrap_or_default();
                return lost(format!("it took no byte for {} s{lines}; the adapter hangs", WRITE_STALL_NS / 1_000_000_000));
            } else {
                next_ns = next_ns.min(now + WRITE_RETRY_NS);
            }
            if !events.flush() {
                next_ns = next_ns.min(now + EVENT_RETRY_NS);
            }
            match arrivals.try_recv() {
                Ok(Ok(chunk)) => {
                    let bytes = chunk.bytes.get(..chunk.len).unwrap_or(&chunk.bytes);
                    add(&stats.counts().bytes_in, bytes.len() as u64);
                    if let Some(tap) = tap {
                        tap(Direction::In, chunk.arrived_ns, bytes);
                    }
                    machine.received(bytes, chunk.arrived_ns, &mut Io { tx, events, stats });
                }
                Ok(Err(why)) => return lost(why),
                // Pipeline and reader wake this thread after what they send, also when that is between the looks above and this line. Verdicts
                // are taken at the top of the loop, one place for all of them. A pipeline that goes away is noticed at the next tick.
                Err(TryRecvError::Empty) => std::thread::park_timeout(Duration::from_nanos(next_ns.saturating_sub(now_ns()))),
                Err(TryRecvError::Disconnected) => return lost("its reader ended".into()),
            }
        }
    }
}

/// The reader's thread: hand over what arrives, until told to end or the port is gone.
fn read(mut reader: Box<dyn PortReader>, arrivals: &Sender<Arrival>, waker: &Waker, over: &AtomicBool) {
    let mut finished = false;
    while !finished && !over.load(Ordering::Relaxed) {
        let mut chunk = Chunk { bytes: [0; CHUNK_BYTES], len: 0, arrived_ns: 0 };
        let mut arrival = match reader.read(&mut chunk.bytes) {
            Ok(0) => Err("hung up (unplugged, or the other end closed)".into()),
            Ok(n) => {
                (chunk.len, chunk.arrived_ns) = (n, now_ns());
                Ok(chunk)
            }
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted => continue,
                _ => Err(describe(&error)),
            },
        };
        finished = arrival.is_err();
        while !over.load(Ordering::Relaxed) {
            match arrivals.send_timeout(arrival, Duration::from_nanos(TICK_NS)) {
                Ok(()) => {
                    waker.wake();
                    break;
                }
                Err(SendTimeoutError::Timeout(back)) => arrival = back,
                Err(SendTimeoutError::Disconnected(_)) => return,
            }
        }
    }
}

/// Hand what is queued to the kernel; `true` when it took something.
fn write(port: &mut dyn Port, tx: &mut Tx, stats: &LinkStats, tap: &mut Option<Tap>) -> io::Result<bool> {
    let mut progress = false;
    while !tx.bytes.is_empty() {
        let (front, _) = tx.bytes.as_slices();
        match port.write(front) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => {
                if let Some(tap) = tap {
                    tap(Direction::Out, now_ns(), front.get(..n).unwrap_or(front));
                }
                add(&stats.counts().bytes_out, n as u64);
                tx.wrote(n, stats);
                progress = true;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) => return Err(error),
        }
    }
    Ok(progress)
}

/// What an I/O error on an open port means to somebody on the line.
fn describe(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::NotConnected => "unplugged, or the other end closed".into(),
        io::ErrorKind::WriteZero => "it takes no bytes".into(),
        _ => format!("unplugged, or the other end closed ({error})"),
    }
}

#[cfg(any(test, fuzzing))]
pub(crate) mod rig {
    //! A machine without port or thread: bytes in, bytes and events out, time by hand. For tests and fuzz targets.

    use super::*;

    pub struct Rig<M> {
        pub machine: M,
        pub now_ns: u64,
        pub stats: LinkStats,
        tx: Tx,
        sink: EventSink,
        events: Receiver<PlcEvent>,
    }

    impl<M: Machine> Rig<M> {
        pub fn new(machine: M) -> Self {
            let (queue, events) = crossbeam_channel::unbounded();
            let events_in = EventSender { queue, waker: Waker::default() };
            let mut rig = Self {
                machine,
                now_ns: 1_000_000_000,
                stats: LinkStats::default(),
                tx: Tx::new(),
                sink: EventSink::new(events_in),
                events,
            };
            rig.with(|machine, now, io| machine.opened(now, io));
            rig
        }

        fn with<T>(&mut self, act: impl FnOnce(&mut M, u64, &mut Io<'_>) -> T) -> T {
            let Self { machine, now_ns, stats, tx, sink, .. } = self;
            act(machine, *now_ns, &mut Io { tx, events: sink, stats })
        }

        /// Let time pass in steps of 0.5 ms, and collect what is sent.
        pub fn run(&mut self, ns: u64) -> Vec<u8> {
            let until = self.now_ns + ns;
            let mut sent = Vec::new();
            while self.now_ns < until {
                self.now_ns = until.min(self.now_ns + 500_000);
                self.with(|machine, now, io| machine.tick(now, io));
                sent.extend(self.sent());
            }
            sent
        }

        pub fn receive(&mut self, bytes: &[u8]) {
            self.with(|machine, now, io| machine.received(bytes, now, io));
        }

        pub fn verdict(&mut self, part: PartId, verdict: &Verdict) -> bool {
            self.with(|machine, now, io| machine.verdict(part, verdict, now, now, io))
        }

        pub fn set_host_state(&mut self, state: HostState, now_ns: u64) {
            self.machine.host_state(state, now_ns);
        }

        pub fn events(&self) -> Vec<PlcEvent> {
            self.events.try_iter().collect()
        }

        fn sent(&mut self) -> Vec<u8> {
            let bytes: Vec<u8> = self.tx.bytes.iter().copied().collect();
            self.tx.wrote(bytes.len(), &self.stats);
            bytes
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plc::port::fake::Fake;
    use crate::source::Trigger;
    use crate::verdict;
    use std::time::Instant;

    /// Speaks in lines: `T<n>` announces part n, `A<n>` acknowledges; a verdict goes out as `V<n>;`.
    struct Lines {
        decided: Vec<(u32, u64)>,
    }

    impl Machine for Lines {
        fn opened(&mut self, _: u64, io: &mut Io<'_>) {
            io.events.link(LinkState::Up);
        }
        fn closed(&mut self) {}
        fn verdict(&mut self, part: PartId, _: &Verdict, decided_ns: u64, _: u64, io: &mut Io<'_>) -> bool {
            self.decided.push((part.0, decided_ns));
            io.tx.push(format!("V{part};").as_bytes());
            io.tx.mark_verdict(decided_ns);
            true
        }
        fn host_state(&mut self, _: HostState, _: u64) {}
        fn received(&mut self, bytes: &[u8], now_ns: u64, io: &mut Io<'_>) {
            for &part in bytes {
                let part = PartId(u32::from(part));
                io.events.put(PlcEvent::Trigger(Trigger { part, received_ns: now_ns, deadline_ns: now_ns, encoder_ticks: 0 }), io.stats);
                io.events.put(PlcEvent::Acknowledged { part, received_ns: now_ns }, io.stats);
            }
        }
        fn tick(&mut self, now_ns: u64, _: &mut Io<'_>) -> u64 {
            now_ns + 1_000_000_000
        }
        fn closing(&mut self, _: u64, io: &mut Io<'_>) {
            io.tx.push(b"bye");
        }
    }

    fn start(fake: &Fake) -> LinkHandle {
        spawn(Box::new(fake.clone()), Box::new(Lines { decided: Vec::new() }), None).unwrap()
    }

    fn verdict(part: u32) -> ToPlc {
        ToPlc::Verdict { part: PartId(part), verdict: verdict::without_score(verdict::Reason::NoFrame), decided_ns: now_ns() }
    }

    fn until(what: &str, mut done: impl FnMut() -> bool) {
        let start = Instant::now();
        while !done() {
            assert!(start.elapsed() < Duration::from_secs(20), "timed out: {what}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn next_link(handle: &LinkHandle) -> LinkState {
        loop {
            if let PlcEvent::Link(state) = handle.events.recv_timeout(Duration::from_secs(20)).unwrap() {
                return state;
            }
        }
    }

    #[test]
    fn dropping_the_handle_writes_what_is_queued_and_says_goodbye() {
        let fake = Fake::default();
        let mut handle = start(&fake);
        for part in 0..10 {
            handle.to_plc.try_send(verdict(part)).unwrap();
        }
        let thread = handle.thread.take().unwrap();
        let stats = handle.stats.clone();
        drop(handle);
        thread.join().unwrap();
        let line = fake.line();
        assert_eq!(String::from_utf8_lossy(&line.outgoing), "V0;V1;V2;V3;V4;V5;V6;V7;V8;V9;bye");
        assert_eq!(stats.summary().verdicts_sent, 10);
        assert_eq!(stats.summary().verdict_to_kernel_us.count, 10);
    }

    #[test]
    fn a_lost_port_is_opened_again_and_the_pipeline_hears_of_it() {
        let fake = Fake::default();
        fake.line().refusals.push_back(io::ErrorKind::PermissionDenied);
        let handle = start(&fake);
        assert_eq!(next_link(&handle), LinkState::Down); // the open that failed
        assert_eq!(next_link(&handle), LinkState::Connecting);
        assert_eq!(next_link(&handle), LinkState::Up);
        fake.arrive(Err(io::ErrorKind::Other)); // what a USB adapter gives when it is unplugged
        assert_eq!(next_link(&handle), LinkState::Down);
        assert_eq!(next_link(&handle), LinkState::Connecting);
        assert_eq!(next_link(&handle), LinkState::Up);
        handle.to_plc.try_send(verdict(7)).unwrap();
        until("the verdict after the re-open", || fake.line().outgoing.ends_with(b"V7;"));
        let summary = handle.stats.summary();
        assert_eq!((summary.opens, summary.losses), (2, 1));
    }

    #[test]
    fn a_stuck_port_loses_no_trigger_and_holds_the_verdict() {
        let fake = Fake::default();
        fake.line().room = Some(1);
        let handle = start(&fake);
        handle.to_plc.try_send(verdict(1)).unwrap();
        until("the first byte", || fake.line().outgoing == b"V");
        fake.arrive(Ok(vec![5]));
        until("the trigger past the stuck verdict", || {
            handle.events.try_iter().any(|e| matches!(e, PlcEvent::Trigger(t) if t.part == PartId(5)))
        });
        assert_eq!(handle.stats.summary().verdicts_sent, 0, "not sent before its last byte");
        fake.line().room = None;
        until("the rest", || fake.line().outgoing == b"V1;");
        until("the count", || handle.stats.summary().verdicts_sent == 1);
    }

    #[test]
    fn a_port_that_takes_nothing_is_reopened() {
        let fake = Fake::default();
        fake.line().room = Some(0);
        let handle = start(&fake);
        handle.to_plc.try_send(verdict(1)).unwrap();
        until("the second open", || fake.line().opens == 2);
        assert_eq!(handle.stats.summary().verdicts_undelivered, 1);
        assert_eq!(fake.line().discarded, 1, "closing would wait for what a hung adapter never sends");
    }

    #[test]
    fn triggers_outlive_a_full_queue_and_other_events_do_not() {
        let fake = Fake::default();
        let handle = start(&fake);
        let parts = 100u32; // two events each and the link's: more than half the queue's room is missing
        for chunk in (0..parts + 80).collect::<Vec<_>>().chunks(10) {
            fake.arrive(Ok(chunk.iter().map(|&p| p as u8).collect()));
        }
        until("all triggers counted", || handle.stats.summary().triggers == u64::from(parts + 80));
        until("drops counted", || handle.stats.summary().events_dropped > 0);
        let mut seen = Vec::new();
        until("all triggers delivered", || {
            seen.extend(handle.events.try_iter().filter_map(|e| if let PlcEvent::Trigger(t) = e { Some(t.part.0) } else { None }));
            seen.len() == (parts + 80) as usize
        });
        assert!(seen.windows(2).all(|w| w[0] < w[1]), "in order: {seen:?}");
        assert_eq!(handle.stats.summary().triggers_dropped, 0);
    }

    #[test]
    fn verdicts_while_the_port_is_away_are_counted_not_kept() {
        let fake = Fake::default();
        fake.line().refusals.extend([io::ErrorKind::NotFound; 4]);
        let handle = start(&fake);
        handle.to_plc.try_send(verdict(1)).unwrap();
        until("counted", || handle.stats.summary().verdicts_undelivered == 1);
        until("opened at last", || fake.line().opens == 1);
        assert!(fake.line().outgoing.is_empty(), "an old verdict must not go to a new session");
    }
}
