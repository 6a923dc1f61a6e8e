//! Any sequence of edges, bytes, verdicts, polls and cuts on a board and a host session.
#![no_main]
#![allow(missing_docs)]
libfuzzer_sys::fuzz_target!(|data: &[u8]| firmware_bridge_fuzz::line(data));
