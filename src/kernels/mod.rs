//! SIMD kernels: one generic version (the oracle), then x86_64 and aarch64 behind run-time detection. The only home of `unsafe`.
#![allow(unsafe_code)]

pub mod alloc;
