//! Damages what goes over the line, reproducibly.

use crate::config::FaultConfig;
use rand::{Rng, SeedableRng};
use rand_pcg::Pcg64Mcg;
use std::collections::VecDeque;

/// What was done to the bytes.
#[derive(Clone, Copy, Debug, Default, serde::Serialize)]
pub struct Injected {
    /// Bytes lost.
    pub dropped: u64,
    /// Bytes doubled.
    pub duplicated: u64,
    /// Bytes changed.
    pub corrupted: u64,
    /// Writes held back.
    pub delayed: u64,
}

/// One direction of the line.
pub struct Injector {
    config: FaultConfig,
    random: Pcg64Mcg,
    /// Bytes under way and when they arrive; the times never fall.
    queue: VecDeque<(u64, Vec<u8>)>,
    /// What was done.
    pub injected: Injected,
}

impl Injector {
    /// `direction` makes the two directions differ.
    pub fn new(config: &FaultConfig, direction: u64) -> Self {
        Self {
            random: Pcg64Mcg::seed_from_u64(config.seed ^ direction.wrapping_mul(0x9E37_79B9_7F4A_7C15)),
            config: config.clone(),
            queue: VecDeque::new(),
            injected: Injected::default(),
        }
    }

    /// Put bytes on the line.
    pub fn push(&mut self, now_us: u64, bytes: &[u8]) {
        let mut out = Vec::with_capacity(bytes.len() + 4);
        for &byte in bytes {
            if self.config.drop > 0.0 && self.random.random_bool(self.config.drop) {
                self.injected.dropped += 1;
                continue;
            }
            let mut byte = byte;
            if self.config.corrupt > 0.0 && self.random.random_bool(self.config.corrupt) {
                self.injected.corrupted += 1;
                byte ^= self.random.random_range(1..=255u8);
            }
            out.push(byte);
            if self.config.duplicate > 0.0 && self.random.random_bool(self.config.duplicate) {
                self.injected.duplicated += 1;
                out.push(byte);
            }
        }
        let mut due = now_us;
        if self.config.delay > 0.0 && self.random.random_bool(self.config.delay) {
            self.injected.delayed += 1;
            due += self.random.random_range(0..=u64::from(self.config.delay_max_ms) * 1000);
        }
        if let Some((last, _)) = self.queue.back() {
            due = due.max(*last);
        }
        self.queue.push_back((due, out));
    }

    /// Bytes that have arrived.
    pub fn pop(&mut self, now_us: u64) -> Option<Vec<u8>> {
        if self.next_us()? <= now_us { self.queue.pop_front().map(|(_, bytes)| bytes) } else { None }
    }

    /// When the next bytes arrive.
    pub fn next_us(&self) -> Option<u64> {
        self.queue.front().map(|(due, _)| *due)
    }
}
