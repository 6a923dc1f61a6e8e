//! The model: [`bundle`] (load, verify, describe), [`runtime`] (tract), graph rewrites and custom ops.

pub mod bundle;
pub mod runtime;
