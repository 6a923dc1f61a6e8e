//! Wire protocol, reject scheduler and fail-safe state machine.
#![no_std]
#![forbid(unsafe_code)]
