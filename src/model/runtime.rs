//! Runs a bundle through tract.
