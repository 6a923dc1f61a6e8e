//! Handing something to a real-time thread and waking it, with no lock held while it wakes.
//!
//! A channel of `crossbeam` wakes its receiver while the sender holds the channel's lock. A real-time receiver takes the processor from the
//! sender at that very moment, wants the lock, and waits until the sender, an ordinary thread, gets its turn again: milliseconds on a loaded
//! machine. Here a [`Waker`] is called when everything is in place, and the receiver of a [`Mailbox`] never waits for a sender that was
//! stopped half-way: it takes the box for empty, and that sender wakes it later.
//!
//! This module knows threads and values, and nothing of what they mean.

use crossbeam_channel::Sender;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, TryLockError};
use std::thread::Thread;

/// Wakes one thread out of [`std::thread::park_timeout`]. Clones wake the same thread. Cheap enough for every message: an atomic swap when
/// that thread is awake, a system call when it sleeps.
#[derive(Clone, Debug, Default)]
pub struct Waker {
    thread: Arc<OnceLock<Thread>>,
}

impl Waker {
    /// Wake the thread; the next `park` returns at once if it does not sleep yet. Nothing happens before a thread
    /// [listens](Waker::wakes_this_thread).
    pub fn wake(&self) {
        if let Some(thread) = self.thread.get() {
            thread.unpark();
        }
    }

    /// From now on the calling thread is woken; it must look at its queues once after this call, and again after each `park`. The first
    /// thread that calls this stays the one.
    pub fn wakes_this_thread(&self) {
        // Refused when it is set: a waker belongs to one thread for life.
        let _ = self.thread.set(std::thread::current());
    }
}

/// Places that a channel from a real-time thread to an ordinary one has beyond what it is filled with: see [`has_room`].
pub const SPARE: usize = 1;

/// Whether a real-time thread, the only sender, may put something into a channel of `capacity + `[`SPARE`] places. A full channel of `crossbeam` makes
/// its sender spin while the receiver is half-way through taking something out; an ordinary receiver that was stopped there by that very
/// sender goes on only when the kernel takes the processor from the real-time thread, after up to a second. With a place to spare, the sender
/// never needs the one that is being emptied.
pub fn has_room<T>(queue: &Sender<T>, capacity: usize) -> bool {
    queue.len() < capacity
}

/// Receiving end of a bounded queue: many senders, one receiver that never blocks. Made by [`mailbox`].
#[derive(Debug)]
pub struct Mailbox<T> {
    shared: Arc<Shared<T>>,
}

/// Sending end of a [`Mailbox`].
#[derive(Debug)]
pub struct Post<T> {
    /// `None` only within `drop`.
    shared: Option<Arc<Shared<T>>>,
    waker: Waker,
}

#[derive(Debug)]
struct Shared<T> {
    items: Mutex<VecDeque<T>>,
    capacity: usize,
    /// The receiver is gone.
    closed: AtomicBool,
}

/// Why [`Post::try_send`] gives a value back.
#[derive(Debug, PartialEq, Eq)]
pub enum NotSent<T> {
    /// The box is full.
    Full(T),
    /// The receiver is gone.
    Closed(T),
}

/// What [`Mailbox::take`] found.
#[derive(Debug, PartialEq, Eq)]
pub enum Taken<T> {
    /// The oldest value.
    Item(T),
    /// Nothing now; a sender that is under way wakes the receiver.
    Nothing,
    /// Nothing, and no sender is left.
    Ended,
}

/// A queue for `capacity` values, allocated now. `waker` is called after each send, and when a sender is dropped.
pub fn mailbox<T>(capacity: usize, waker: Waker) -> (Post<T>, Mailbox<T>) {
    let shared = Arc::new(Shared { items: Mutex::new(VecDeque::with_capacity(capacity)), capacity, closed: AtomicBool::new(false) });
    (Post { shared: Some(Arc::clone(&shared)), waker }, Mailbox { shared })
}

impl<T> Post<T> {
    /// Put a value into the box and wake the receiver. Waits at most for the moment that another thread needs for the same; never allocates.
    ///
    /// # Errors
    /// [`NotSent`], with the value.
    pub fn try_send(&self, item: T) -> Result<(), NotSent<T>> {
        let Some(shared) = &self.shared else { return Err(NotSent::Closed(item)) };
        if shared.closed.load(Ordering::Acquire) {
            return Err(NotSent::Closed(item));
        }
        let sent = {
            // A queue that a panicking thread left behind is still a queue: pushing and popping are whole or not at all.
            let mut items = shared.items.lock().unwrap_or_else(PoisonError::into_inner);
            if items.len() >= shared.capacity {
                Err(NotSent::Full(item))
            } else {
                items.push_back(item);
                Ok(())
            }
        };
        // Only now, with the lock released. After a full box, too: the receiver may have found the lock taken by this very look at it, and
        // gone to sleep.
        self.waker.wake();
        sent
    }
}

impl<T> Clone for Post<T> {
    fn clone(&self) -> Self {
        Self { shared: self.shared.clone(), waker: self.waker.clone() }
    }
}

impl<T> Drop for Post<T> {
    fn drop(&mut self) {
        // First gone, then told.
        self.shared = None;
        self.waker.wake();
    }
}

impl<T> Mailbox<T> {
    /// The oldest value, if there is one. Never waits.
    pub fn take(&self) -> Taken<T> {
        // Asked before looking into the box: what the last sender put there before it went is then found below.
        let ended = Arc::strong_count(&self.shared) == 1;
        let mut items = match self.shared.items.try_lock() {
            Ok(items) => items,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            // A sender is in there, perhaps stopped half-way; it wakes us when it is out.
            Err(TryLockError::WouldBlock) => return Taken::Nothing,
        };
        match items.pop_front() {
            Some(item) => Taken::Item(item),
            None if ended => Taken::Ended,
            None => Taken::Nothing,
        }
    }
}

impl<T> Drop for Mailbox<T> {
    fn drop(&mut self) {
        self.shared.closed.store(true, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn values_come_in_order_up_to_the_capacity_and_the_end_is_told() {
        let (post, mailbox) = mailbox(2, Waker::default());
        assert_eq!(mailbox.take(), Taken::Nothing);
        let other = post.clone();
        post.try_send(1).unwrap();
        other.try_send(2).unwrap();
        assert_eq!(post.try_send(3), Err(NotSent::Full(3)));
        drop((post, other));
        assert_eq!([mailbox.take(), mailbox.take(), mailbox.take()], [Taken::Item(1), Taken::Item(2), Taken::Ended]);
    }

    #[test]
    fn a_receiver_that_is_gone_is_told_to_the_sender() {
        let (post, mailbox) = mailbox(2, Waker::default());
        drop(mailbox);
        assert_eq!(post.try_send(1), Err(NotSent::Closed(1)));
    }

    #[test]
    fn a_sender_that_was_stopped_half_way_never_holds_the_receiver_up() {
        let (post, mailbox) = mailbox(2, Waker::default());
        post.try_send(1).unwrap();
        let shared = post.shared.clone().unwrap();
        let half_way = shared.items.lock().unwrap();
        assert_eq!(mailbox.take(), Taken::Nothing);
        drop(half_way);
        assert_eq!(mailbox.take(), Taken::Item(1));
    }

    /// Every value arrives exactly once and in its sender's order, with a receiver that sleeps whenever it finds nothing: a lost wake-up would
    /// leave it asleep until the time-out, which the test takes for a failure.
    #[test]
    fn no_wake_up_is_lost() {
        const SENDERS: u64 = 4;
        const EACH: u64 = 20_000;
        let waker = Waker::default();
        let (post, mailbox) = mailbox(16, waker.clone());
        waker.wakes_this_thread();
        let threads: Vec<_> = (0..SENDERS)
            .map(|sender| {
                let post = post.clone();
                std::thread::spawn(move || {
                    for n in 0..EACH {
                        while post.try_send((sender, n)).is_err() {
                            std::thread::yield_now();
                        }
                    }
                })
            })
            .collect();
        drop(post);
        let mut next = [0; SENDERS as usize];
        loop {
            match mailbox.take() {
                Taken::Item((sender, n)) => {
                    assert_eq!(n, next[sender as usize]);
                    next[sender as usize] += 1;
                }
                Taken::Nothing => {
                    let asleep = std::time::Instant::now();
                    std::thread::park_timeout(Duration::from_secs(60));
                    assert!(asleep.elapsed() < Duration::from_secs(50), "nobody woke the receiver");
                }
                Taken::Ended => break,
            }
        }
        assert_eq!(next, [EACH; SENDERS as usize]);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    }
}
