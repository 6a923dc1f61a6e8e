//! The kernels alone, for `run.sh`: their tests build in a minute or two, without tract.
#![allow(dead_code)]

#[path = "../../src/kernels/mod.rs"]
pub mod kernels;
