//! Any bytes through the deframer and the reader: nothing panics, what is read is written back to the same bytes, and after any bytes a
//! good frame is found.
#![no_main]
#![allow(missing_docs)]
libfuzzer_sys::fuzz_target!(|data: &[u8]| firmware_bridge_fuzz::decoder(data));
