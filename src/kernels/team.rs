//! A team of threads that share the work of one frame: the calling thread and helpers that live as long as the team.
//!
//! Work comes as numbered parts. Each thread owns a contiguous range of them, so that from step to step the same rows stay in the same core's
//! cache; who is done early takes parts from the end of another's range, so that a helper which the system gave no time holds nobody up.
//! Which thread computes a part never changes its result. Helpers spin for a short while after a job, since the next step of the same frame
//! comes within microseconds, then park; an idle team costs nothing. A job allocates nothing and takes no lock.

use super::alloc::{self, Class};
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a helper waits awake for the next job: longer than what one thread does alone between two shared steps, short beside a frame.
const SPIN: Duration = Duration::from_micros(100);
/// Looks at the gate between two looks at the clock, or before the core is offered to another thread.
const LOOKS: usize = 128;

/// A job is open: helpers may enter.
const OPEN: u64 = 1 << 16;
/// Helpers inside the job.
const INSIDE: u64 = OPEN - 1;
/// Jobs are counted from this bit on.
const JOB: u64 = 1 << 17;

/// Called with the number of the thread and of the part.
type Work<'a> = dyn Fn(usize, usize) + Sync + 'a;

/// One a thread, each on cache lines of its own.
#[repr(align(128))]
struct Seat {
    /// Parts that are left: the first in the low half, the end in the high half.
    range: AtomicU64,
    /// The helper has gone to sleep or is about to.
    parked: AtomicBool,
}

struct Shared {
    /// Number of the job, [`OPEN`] and how many helpers are [`INSIDE`].
    gate: AtomicU64,
    /// Set while the gate is open or a helper inside.
    work: UnsafeCell<Option<&'static Work<'static>>>,
    seats: Box<[Seat]>,
    panicked: AtomicBool,
    stop: AtomicBool,
}

// SAFETY: `work` is written only by the team's owner while the gate is closed and nobody inside, and read only by helpers that entered through
// the open gate (opening releases, entering acquires, leaving releases, closing acquires); `Work` is `Sync`, all else atomic.
unsafe impl Sync for Shared {}
// SAFETY: as above.
unsafe impl Send for Shared {}

/// A fixed number of threads that work together. Dropping it ends the helpers.
pub struct Team {
    shared: Arc<Shared>,
    helpers: Vec<JoinHandle<()>>,
}

impl std::fmt::Debug for Team {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Team").field("threads", &self.threads()).finish_non_exhaustive()
    }
}

impl Team {
    /// A team of `threads` threads, the caller's included: 1 has no helpers. Where the system refuses a thread, the team is smaller.
    pub fn new(threads: usize) -> Self {
        let threads = threads.clamp(1, 64);
        let shared = Arc::new(Shared {
            gate: AtomicU64::new(0),
            work: UnsafeCell::new(None),
            seats: (0..threads).map(|_| Seat { range: AtomicU64::new(0), parked: AtomicBool::new(false) }).collect(),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
        });
        let mut helpers = Vec::with_capacity(threads - 1);
        for thread in 1..threads {
            let shared = Arc::clone(&shared);
            match std::thread::Builder::new().name(format!("frame-{thread}")).spawn(move || shared.help(thread)) {
                Ok(helper) => helpers.push(helper),
                Err(error) => {
                    log::warn!("a frame gets {thread} threads instead of {threads}: {error}");
                    break;
                }
            }
        }
        Self { shared, helpers }
    }

    /// Threads, the caller's included.
    pub fn threads(&self) -> usize {
        1 + self.helpers.len()
    }

    /// `work(thread, part)` once for each part below `parts`, on all threads; returns when all are done. One thread never runs two parts at a time.
    ///
    /// # Panics
    /// When `work` does, on whichever thread; by then no thread is inside it any more.
    pub fn run(&mut self, parts: usize, work: &Work<'_>) {
        let threads = self.threads().min(parts);
        if threads <= 1 {
            (0..parts).for_each(|part| work(0, part));
            return;
        }
        let shared = &*self.shared;
        shared.panicked.store(false, Ordering::Relaxed);
        // Cannot fail: nothing has that many parts, and fewer would still be right.
        let parts = u32::try_from(parts).unwrap_or(u32::MAX) as usize;
        for (thread, seat) in shared.seats.iter().enumerate() {
            let (first, end) = (thread.min(threads) * parts / threads, (thread + 1).min(threads) * parts / threads);
            seat.range.store(first as u64 | (end as u64) << 32, Ordering::Relaxed);
        }
        /// Closes the gate and waits until nobody is inside, also when the caller's own part panics.
        struct Close<'a>(&'a Shared);
        impl Drop for Close<'_> {
            fn drop(&mut self) {
                self.0.gate.fetch_and(!OPEN, Ordering::AcqRel);
                let mut looks = 0;
                while self.0.gate.load(Ordering::Acquire) & INSIDE != 0 {
                    looks += 1;
                    // A helper that lost its core needs ours, perhaps.
                    if looks % LOOKS == 0 { std::thread::yield_now() } else { std::hint::spin_loop() }
                }
                // SAFETY: the gate is closed, nobody is inside, and only the owner opens it.
                unsafe { *self.0.work.get() = None };
            }
        }
        // SAFETY: `Close` leaves no helper inside before `work`'s borrow ends, and takes the reference out.
        let work_while_open = unsafe { std::mem::transmute::<&Work<'_>, &'static Work<'static>>(work) };
        // SAFETY: the gate is closed and nobody inside (the last `Close` waited for that); `&mut self` makes this the only owner's call.
        unsafe { *shared.work.get() = Some(work_while_open) };
        let job = shared.gate.load(Ordering::Relaxed) / JOB + 1;
        let close = Close(shared);
        // Sequentially consistent, as is a helper's look at the gate after it said that it parks: one of the two sees the other.
        shared.gate.store((job * JOB) | OPEN, Ordering::SeqCst);
        for (helper, seat) in self.helpers.iter().zip(&shared.seats[1..]).take(threads - 1) {
            if seat.parked.load(Ordering::SeqCst) && seat.parked.swap(false, Ordering::SeqCst) {
                helper.thread().unpark();
            }
        }
        shared.take_part(0, work);
        drop(close);
        if shared.panicked.swap(false, Ordering::Relaxed) {
            panic!("a thread of the frame panicked");
        }
    }

    /// Cut `out` into chunks of `chunk` values (the last may be shorter) and call `work(index, chunk, scratch)` once for each, `scratch` being the
    /// calling thread's own.
    ///
    /// # Panics
    /// When there are fewer scratches than threads, or `work` panics.
    pub fn split<T: Send, S: Send>(
        &mut self,
        out: &mut [T],
        chunk: usize,
        scratches: &mut [S],
        work: impl Fn(usize, &mut [T], &mut S) + Sync,
    ) {
        assert!(scratches.len() >= self.threads(), "a scratch memory for each thread");
        let chunk = chunk.max(1);
        let (len, out, scratches) = (out.len(), Pointer(out.as_mut_ptr()), Pointer(scratches.as_mut_ptr()));
        self.run(len.div_ceil(chunk), &|thread, part| {
            let (start, end) = (part * chunk, len.min((part + 1) * chunk));
            // SAFETY: chunks do not overlap and each is handed out once; `T` may be sent to the thread that gets it.
            let chunk = unsafe { std::slice::from_raw_parts_mut(out.at(start), end - start) };
            // SAFETY: there is one for each thread (asserted), and a thread runs one part at a time.
            let scratch = unsafe { &mut *scratches.at(thread) };
            work(part, chunk, scratch);
        });
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for helper in self.helpers.drain(..) {
            helper.thread().unpark();
            // It catches what it runs, so it ends well.
            let _ = helper.join();
        }
    }
}

/// A pointer that threads may share because they use it for different places.
struct Pointer<T>(*mut T);

// SAFETY: only `Team` makes them, over values that may be sent, and hands each place to one thread at a time.
unsafe impl<T: Send> Sync for Pointer<T> {}

impl<T> Pointer<T> {
    fn at(&self, index: usize) -> *mut T {
        self.0.wrapping_add(index)
    }
}

impl Shared {
    /// A helper's life.
    fn help(&self, thread: usize) {
        alloc::count_this_thread(Class::Model);
        let seat = &self.seats[thread];
        let mut last = 0;
        let mut awake = Instant::now();
        let mut looks = 0;
        while !self.stop.load(Ordering::Relaxed) {
            let gate = self.gate.load(Ordering::Acquire);
            if gate & OPEN != 0 && gate / JOB != last {
                if self.gate.compare_exchange(gate, gate + 1, Ordering::AcqRel, Ordering::Relaxed).is_err() {
                    continue;
                }
                last = gate / JOB;
                // SAFETY: entered through the open gate: the owner wrote it before and waits until we leave.
                if let Some(work) = unsafe { *self.work.get() }
                    && catch_unwind(AssertUnwindSafe(|| self.take_part(thread, work))).is_err()
                {
                    self.panicked.store(true, Ordering::Relaxed);
                }
                self.gate.fetch_sub(1, Ordering::AcqRel);
                awake = Instant::now();
                continue;
            }
            looks += 1;
            if looks % LOOKS != 0 || awake.elapsed() < SPIN {
                std::hint::spin_loop();
                continue;
            }
            seat.parked.store(true, Ordering::SeqCst);
            let gate = self.gate.load(Ordering::SeqCst);
            if (gate & OPEN == 0 || gate / JOB == last) && !self.stop.load(Ordering::SeqCst) {
                std::thread::park();
            }
            seat.parked.store(false, Ordering::SeqCst);
            awake = Instant::now();
        }
    }

    /// Own parts from the first on, then others' from the last on, until none is left.
    fn take_part(&self, thread: usize, work: &Work<'_>) {
        let halves = |range: u64| (range & u64::from(u32::MAX), range >> 32);
        let own = &self.seats[thread].range;
        let take = |range: &AtomicU64, front: bool| {
            let rest = |range: u64| {
                let (first, end) = halves(range);
                (first < end).then(|| if front { range + 1 } else { range - (1 << 32) })
            };
            let (first, end) = halves(range.fetch_update(Ordering::Relaxed, Ordering::Relaxed, rest).ok()?);
            Some(if front { first } else { end - 1 } as usize)
        };
        while let Some(part) = take(own, true) {
            work(thread, part);
        }
        for other in 1..self.seats.len() {
            let range = &self.seats[(thread + other) % self.seats.len()].range;
            while let Some(part) = take(range, false) {
                work(thread, part);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    #[test]
    fn every_part_is_done_once_whatever_the_sizes() {
        for threads in 1..5 {
            let mut team = Team::new(threads);
            assert_eq!(team.threads(), threads);
            for parts in [0, 1, 2, 3, 7, 64, 1000] {
                let done: Vec<AtomicUsize> = (0..parts).map(|_| AtomicUsize::new(0)).collect();
                team.run(parts, &|thread, part| {
                    assert!(thread < threads);
                    done[part].fetch_add(1, Ordering::Relaxed);
                });
                assert!(done.iter().all(|count| count.load(Ordering::Relaxed) == 1), "{threads} threads, {parts} parts");
            }
        }
    }

    #[test]
    fn chunks_are_disjoint_and_scratch_is_the_threads_own() {
        let mut team = Team::new(3);
        // Often, and with pauses, so that helpers are met awake, parked and on the way between.
        for round in 0..3000u64 {
            let mut out = vec![0u64; 101];
            let mut scratches = vec![0u64; 3];
            team.split(&mut out, 7, &mut scratches, |index, chunk, scratch| {
                for (i, value) in chunk.iter_mut().enumerate() {
                    *value += (index * 7 + i) as u64 + round;
                    *scratch += 1;
                }
            });
            assert!(out.iter().enumerate().all(|(i, &value)| value == i as u64 + round));
            assert_eq!(scratches.iter().sum::<u64>(), 101);
            if round % 500 == 0 {
                std::thread::sleep(3 * SPIN);
            }
        }
    }

    #[test]
    fn a_panic_on_any_thread_reaches_the_caller_and_the_team_stays_usable() {
        let mut team = Team::new(3);
        for bad in 0..40 {
            let panicked = catch_unwind(AssertUnwindSafe(|| team.run(40, &|_, part| assert_ne!(part, bad, "meant")))).is_err();
            assert!(panicked, "part {bad}");
            let count = AtomicUsize::new(0);
            team.run(40, &|_, _| {
                count.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(count.into_inner(), 40);
        }
    }

    #[test]
    fn an_idle_team_ends() {
        for _ in 0..20 {
            drop(Team::new(4));
        }
        let team = Team::new(2);
        std::thread::sleep(3 * SPIN);
        drop(team);
    }
}
