//! Any script of bytes, verdicts and times on the Modbus master.
#![no_main]
#![allow(missing_docs)]
libfuzzer_sys::fuzz_target!(|data: &[u8]| cull_plc_fuzz::plc::modbus::trial::master(data));
