//! Of `src/kernels`, the allocation counter: the links' threads ask to be counted.

#[path = "../../../src/kernels/alloc.rs"]
pub mod alloc;
