//! Trains UniAD (NeurIPS 2022): with burn on wgpu where there is a GPU, with a hand-written step ([`engine`]) on the CPU where there is none; and writes the
//! bundle that `cull` runs. Depends on `cull` (preprocessing, features, metrics), never the reverse.
#![forbid(unsafe_code)]

pub mod bundle;
pub mod checkpoint;
pub(crate) mod conv;
pub mod data;
pub mod detector;
pub mod device;
pub mod distill;
pub mod engine;
pub mod evaluate;
pub mod features;
pub mod import;
pub mod modes;
pub mod onnx;
pub mod optimiser;
pub mod presets;
pub mod report;
pub mod train;
pub mod uniad;
