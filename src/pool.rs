//! Fixed pools of reusable buffers, so that the hot path allocates nothing per frame after warm-up.
//!
//! A [`Pool`] is a bounded `crossbeam-channel` of idle items. Taking from an empty pool fails at once: the caller decides whether
//! that is back-pressure (triggered parts) or a dropped frame (free-running). The pool knows nothing about what it holds.

use crossbeam_channel::{Receiver, Sender, bounded};
use std::ops::{Deref, DerefMut};
use std::time::Duration;

/// A fixed set of `T`s handed out and taken back. Cloning a `Pool` shares the same set.
#[derive(Clone)]
pub struct Pool<T> {
    give_back: Sender<T>,
    idle: Receiver<T>,
}

/// An item on loan from a [`Pool`]; it goes back when dropped.
pub struct Pooled<T> {
    item: Option<T>,
    give_back: Sender<T>,
}

impl<T> Pool<T> {
    /// A pool of `count` items made by `make`, all allocated now.
    pub fn new(count: usize, mut make: impl FnMut() -> T) -> Self {
        let (give_back, idle) = bounded(count);
        for _ in 0..count {
            // The channel holds exactly `count` items, so this never blocks; a full channel would only mean a smaller pool.
            let _ = give_back.try_send(make());
        }
        Self { give_back, idle }
    }

    /// An idle item, or `None` when all are on loan.
    pub fn take(&self) -> Option<Pooled<T>> {
        self.idle.try_recv().ok().map(|item| self.lend(item))
    }

    /// An idle item, waiting up to `wait` for one to come back.
    pub fn take_timeout(&self, wait: Duration) -> Option<Pooled<T>> {
        self.idle.recv_timeout(wait).ok().map(|item| self.lend(item))
    }

    /// How many items are idle at the moment.
    pub fn idle(&self) -> usize {
        self.idle.len()
    }

    fn lend(&self, item: T) -> Pooled<T> {
        Pooled { item: Some(item), give_back: self.give_back.clone() }
    }
}

impl<T> Pooled<T> {
    /// An item that belongs to no pool and is dropped for good; for tools and tests off the hot path.
    pub fn detached(item: T) -> Self {
        let (give_back, _) = bounded(0);
        Self { item: Some(item), give_back }
    }
}

impl<T> Deref for Pooled<T> {
    type Target = T;
    fn deref(&self) -> &T {
        self.item.as_ref().expect("the item is only taken out in drop")
    }
}

impl<T> DerefMut for Pooled<T> {
    fn deref_mut(&mut self) -> &mut T {
        self.item.as_mut().expect("the item is only taken out in drop")
    }
}

impl<T> Drop for Pooled<T> {
    fn drop(&mut self) {
        if let Some(item) = self.item.take() {
            // A pool that is gone, or a detached item: the item is simply freed.
            let _ = self.give_back.try_send(item);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_come_back_when_dropped() {
        let pool = Pool::new(2, || vec![0u8; 4]);
        let first = pool.take().expect("one of two");
        let second = pool.take().expect("two of two");
        assert!(pool.take().is_none());
        drop(first);
        assert_eq!(pool.idle(), 1);
        drop(second);
        assert_eq!(pool.idle(), 2);
    }

    #[test]
    fn detached_items_are_freed() {
        let mut item = Pooled::detached(vec![1u8]);
        item.push(2);
        assert_eq!(item.as_slice(), &[1, 2]);
    }
}
