//! The model: [`bundle`] (load, verify, describe), [`runtime`] (tract), graph rewrites and custom ops.

pub mod bundle;
mod graph;
mod plan;
pub mod quantize;
pub mod runtime;
#[doc(hidden)]
pub mod testing;
