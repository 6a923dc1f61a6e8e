//! SIMD kernels: one generic version (the oracle), then x86_64 and aarch64 behind run-time detection. The only home of `unsafe`.
//!
//! A kernel is a value made once for a shape (weights packed, scratch memory allocated) and run without allocating. Each takes the instruction set
//! as an argument, so that tests run every set the machine has against [`isa::Isa::Generic`].
#![allow(unsafe_code)]

pub mod activation;
pub mod aligned;
pub mod alloc;
pub mod attention;
pub mod attention8;
pub mod bottleneck;
pub mod bottleneck8;
pub mod depthwise;
pub mod gemm;
pub mod idct;
pub mod isa;
pub mod linear;
pub mod linear8;
pub mod loops;
#[cfg(target_arch = "aarch64")]
mod neon8;
pub mod norm;
pub mod pixels;
pub mod resample;
mod simd;
pub mod source;
pub mod team;
#[cfg(test)]
mod testing;
pub mod vectorise;
#[cfg(target_arch = "x86_64")]
mod vnni;
#[cfg(target_arch = "x86_64")]
mod ymm;
