//! Wire protocol, reject scheduler and fail-safe state machine of the reject board; the host uses the same crate.
//!
//! `no_std`, no allocation, no `unsafe`, and nothing that can panic: no indexing, no `unwrap`, no unchecked arithmetic (clippy denies them,
//! and `boards/build.sh` links a program that cannot be linked if a panic is left). Pure: bytes, edges, encoder counts and the time come in as
//! values; bytes, outputs and events go out. It knows nothing of ports, clocks, threads or pins.
//!
//! * [`cobs`]: frame boundaries. [`wire`]: what is in a frame, and its CRC. [`parameters`]: what both sides must agree on.
//! * [`host::HostSession`]: the inspector's end of the link. [`board::Board`]: the board's end, with the scheduler and the safe state.
//! * [`schedule`]: when the reject actuator is on. `PROTOCOL.md` beside this crate describes every byte.
//!
//! **Time** is `u64` microseconds on any clock that never goes backwards ([`Micros`]); each side has its own. On the wire only the low 32 bits
//! travel (they wrap every 71.6 minutes) and only differences are used.
//!
//! The invariant behind everything here: *no part is let through without its own accept verdict*, received in the session in which the part was
//! announced, before its deadline. Loss, delay, repetition, noise, a dead host or a full table end in a reject or a stopped line.
//!
//! ```
//! use firmware_bridge::{board::{Board, BoardConfig}, host::{HostConfig, HostEvent, HostSession}, wire::Decision};
//!
//! let mut board = Board::new(BoardConfig::default(), 1, 0).unwrap();
//! let mut host = HostSession::new(HostConfig::default(), 2, 0);
//! let mut part_seen = None;
//! for now in (0..2_000_000).step_by(1_000) {
//!     // The wires: whatever one side has to say, the other side hears.
//!     let said = host.output().to_vec();
//!     host.consume(said.len());
//!     board.on_bytes(now, &said, &mut |_| {});
//!     let said = board.output().to_vec();
//!     board.consume(said.len());
//!     host.on_bytes(now, &said, &mut |event| if let HostEvent::Trigger(t) = event { part_seen = Some(t.part) });
//!     if now == 500_000 { board.on_trigger(now, 0); }
//!     if let Some(part) = part_seen.take() { host.verdict(now, part, Decision::Accept, 0, 0.1).unwrap(); }
//!     host.poll(now, &mut |_| {});
//!     board.poll(now, 0, &mut |_| {});
//! }
//! assert_eq!(board.counters().accepted, 1);
//! ```
#![no_std]
#![forbid(unsafe_code)]
#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::unreachable,
        clippy::todo,
        clippy::unimplemented,
        clippy::arithmetic_side_effects
    )
)]

#[cfg(any(test, feature = "std"))]
extern crate std;

pub mod board;
pub mod cobs;
pub mod host;
pub mod parameters;
pub mod schedule;
mod session;
pub mod wire;

/// Microseconds on a clock that never goes backwards; each side has its own, and only differences cross the wire.
pub type Micros = u64;
