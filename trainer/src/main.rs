//! Trains UniAD and writes the bundle that `cull` runs.
fn main() {}
