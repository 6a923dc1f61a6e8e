//! The links of `cull` (`src/plc`) and what they stand on, compiled by path, without models, cameras and pages: for the fuzz targets, and for a
//! quick `cargo test --release` of the links alone.
#![allow(missing_docs, dead_code)]

/// The fields of `src/config.rs` that the links read.
pub mod config {
    use std::path::PathBuf;

    #[derive(Clone, Debug, PartialEq)]
    pub enum PlcConfig {
        None,
        Bridge(BridgeConfig),
        Modbus(ModbusConfig),
    }

    #[derive(Clone, Debug, PartialEq)]
    pub struct BridgeConfig {
        pub port: PathBuf,
        pub baud: u32,
        pub codename: u32,
        pub deadline_ms: u32,
        pub watchdog_ms: u32,
    }

    #[derive(Clone, Debug, PartialEq)]
    pub struct ModbusConfig {
        pub port: PathBuf,
        pub baud: u32,
        pub role: ModbusRole,
        pub unit: u8,
        pub parity: Parity,
        pub stop_bits: u8,
        pub deadline_ms: u32,
    }

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum ModbusRole {
        Master,
        Slave,
    }

    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub enum Parity {
        #[default]
        Even,
        Odd,
        None,
    }
}

/// As in `src/source/mod.rs`.
pub mod source {
    use crate::frame::PartId;

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Trigger {
        pub part: PartId,
        pub received_ns: u64,
        pub deadline_ns: u64,
        pub encoder_ticks: u32,
    }
}

#[path = "../../../src/frame.rs"]
pub mod frame;
pub mod kernels;
#[path = "../../../src/plc/mod.rs"]
pub mod plc;
#[path = "../../../src/pool.rs"]
pub mod pool;
#[path = "../../../src/priority.rs"]
pub mod priority;
#[path = "../../../src/verdict.rs"]
pub mod verdict;
#[path = "../../../src/wake.rs"]
pub mod wake;
