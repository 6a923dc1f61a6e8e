//! The model: [`bundle`] (load, verify, describe), [`runtime`] (tract), graph rewrites and custom ops.

pub mod bundle;
mod rewrite;
pub mod runtime;
#[doc(hidden)]
pub mod testing;
