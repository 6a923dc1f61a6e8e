//! `cull`: a headless visual inspector. Camera frames come in, a UniAD model ("A Unified Model for Multi-class Anomaly Detection",
//! NeurIPS 2022) runs through tract, anomaly maps and verdicts come out, and a PLC on a serial line rejects the part in time.
//!
//! Arrows point one way: the binary -> [`pipeline`] -> stages -> [`frame`]. [`verdict`], [`calibration`] and [`anomaly`] are pure:
//! no I/O, no clock, no threads; time comes in as a value. `unsafe` lives in [`kernels`] only.
#![deny(unsafe_code)]

pub mod anomaly;
pub mod calibration;
pub mod collect;
pub mod config;
pub mod dataset;
pub mod doctor;
pub mod eval;
pub mod frame;
pub mod journal;
pub mod kernels;
pub mod model;
pub mod pipeline;
pub mod plc;
pub mod pool;
pub mod preprocess;
pub mod priority;
pub mod snapshot;
pub mod source;
pub mod supervise;
pub mod verdict;
pub mod wake;
pub mod web;
