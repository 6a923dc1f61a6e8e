//! A counting global allocator, so that "the hot path allocates nothing" is measured and not claimed.
//!
//! Threads are counted only when they ask for it ([`count_this_thread`]): the recorder, the journal and the printing of verdicts may
//! allocate, the stages from source to link may not. What the model runtime allocates inside one inference is kept apart
//! ([`Class::Model`]), since it is not ours to pool. A thread that did not ask costs one thread-local read per allocation.
//!
//! The binary and the allocation tests install it with `#[global_allocator] static A: CountingAllocator = CountingAllocator;`.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};

/// What a thread's allocations are counted as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Class {
    /// Not counted (how every thread starts).
    Untracked = 0,
    /// A stage of the pipeline.
    Pipeline = 1,
    /// Inside a call to the model runtime.
    Model = 2,
}

/// Allocations (fresh, zeroed or resized) counted since the start of the process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// By the stages themselves.
    pub pipeline: u64,
    /// By the model runtime.
    pub model: u64,
}

/// The system allocator, counting.
pub struct CountingAllocator;

static PIPELINE: AtomicU64 = AtomicU64::new(0);
static MODEL: AtomicU64 = AtomicU64::new(0);

thread_local! {
    // Constant-initialised and without a destructor: reading it inside the allocator neither allocates nor registers anything.
    static CLASS: Cell<Class> = const { Cell::new(Class::Untracked) };
}

/// What has been counted so far. Always zero where [`CountingAllocator`] is not the global allocator.
pub fn counts() -> Counts {
    Counts { pipeline: PIPELINE.load(Ordering::Relaxed), model: MODEL.load(Ordering::Relaxed) }
}

/// Count the calling thread's allocations from here on as `class`.
pub fn count_this_thread(class: Class) {
    CLASS.with(|c| c.set(class));
}

/// Run `work` with the calling thread counted as `class`, and put the thread's former class back (also when `work` panics).
pub fn counted_as<R>(class: Class, work: impl FnOnce() -> R) -> R {
    struct PutBack(Class);
    impl Drop for PutBack {
        fn drop(&mut self) {
            CLASS.with(|c| c.set(self.0));
        }
    }
    let _put_back = PutBack(CLASS.with(|c| c.replace(class)));
    work()
}

fn count() {
    // Fails only while the thread is being torn down, when nothing is counted any more.
    match CLASS.try_with(Cell::get).unwrap_or(Class::Untracked) {
        Class::Untracked => {}
        Class::Pipeline => {
            PIPELINE.fetch_add(1, Ordering::Relaxed);
        }
        Class::Model => {
            MODEL.fetch_add(1, Ordering::Relaxed);
        }
    }
}

// SAFETY: every method hands its arguments unchanged to `System`, which upholds the contract of `GlobalAlloc`; counting touches only
// atomics and a constant-initialised thread-local, so it neither allocates nor unwinds.
unsafe impl GlobalAlloc for CountingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promise about `layout` (size not zero) is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: as for `alloc`.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        count();
        // SAFETY: `block` came from `System` through this allocator with this `layout`, as the caller promises.
        unsafe { System.realloc(block, layout, new_size) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: as for `realloc`.
        unsafe { System.dealloc(block, layout) }
    }
}
