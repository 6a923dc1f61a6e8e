//! The reject board as a process on a pseudo-terminal.
#![forbid(unsafe_code)]
