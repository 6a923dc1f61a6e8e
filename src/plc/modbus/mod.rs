//! Modbus RTU, master or slave, for PLCs that speak no native bridge. `rmodbus` is the codec; framing, time and the register map are here.
//!
//! The registers are described for the PLC's programmer in `MODBUS.md` beside this module; [`map`] is the same in code. The rule behind all of
//! it: **a part is good only where it reads 1 (OK)**. Pending, unknown, fault, and a deadline that passed without a verdict never read as OK.
#![doc = include_str!("../MODBUS.md")]

pub mod map;
mod master;
mod slave;
#[cfg(any(test, fuzzing))]
pub mod trial;

use crate::config::{ModbusConfig, ModbusRole};
use crate::plc::driver::{self, Machine, Tap};
use crate::plc::port::{OpenPort, PortSettings, SerialOpener};
use crate::plc::{LinkHandle, PlcCommand, PlcError};

/// Longest RTU frame, in bytes.
const MAX_FRAME: usize = 256;
/// Shortest RTU frame: unit, function, CRC.
const MIN_FRAME: usize = 4;
/// Above 19200 baud the standard fixes the silence between frames at this, in ns.
const FAST_SILENCE_NS: u64 = 1_750_000;
/// Fragments further apart than this are not one frame, in ns. More than the standard's 1.5 characters, since USB adapters deliver in portions
/// a millisecond apart and a loaded host reads them later still; complete frames are recognised by length and CRC, without waiting for it.
const BROKEN_FRAME_NS: u64 = 5_000_000;

/// Start the link in the configured role. A port that is not there yet is no error: it is tried again with back-off.
///
/// # Errors
/// When the configuration cannot work, or the system has no thread or file descriptor left.
pub fn spawn(config: &ModbusConfig) -> Result<LinkHandle, PlcError> {
    spawn_with(config, Box::new(SerialOpener::new(port_settings(config))), None)
}

/// [`spawn`] on a port made by `opener`, with everything that crosses it shown to `tap`.
///
/// # Errors
/// As [`spawn`].
pub fn spawn_with(config: &ModbusConfig, opener: Box<dyn OpenPort>, tap: Option<Tap>) -> Result<LinkHandle, PlcError> {
    let port = config.port.display().to_string();
    let bad = |why: String| PlcError::Config { port: port.clone(), why };
    if !(1..=247).contains(&config.unit) {
        return Err(bad(format!("unit is {}, must be 1 to 247", config.unit)));
    }
    if !(10..=60_000).contains(&config.deadline_ms) {
        return Err(bad(format!("deadline_ms is {}, must be 10 to 60000", config.deadline_ms)));
    }
    if config.baud == 0 {
        return Err(bad("baud is 0; PLCs use 9600 to 115200".into()));
    }
    let machine: Box<dyn Machine> = match config.role {
        ModbusRole::Master => Box::new(master::Master::new(config)),
        ModbusRole::Slave => Box::new(slave::Slave::new(config)),
    };
    driver::spawn(opener, machine, tap).map_err(|error| bad(format!("cannot start its thread: {error}")))
}

/// How the port of a Modbus line is set up.
pub fn port_settings(config: &ModbusConfig) -> PortSettings {
    PortSettings { device: config.port.clone(), baud: config.baud, parity: config.parity, stop_bits: config.stop_bits }
}

/// Silence that separates two frames: 3.5 characters, or 1.75 ms above 19200 baud, in ns.
fn silence_ns(settings: &PortSettings) -> u64 {
    if settings.baud > 19_200 { FAST_SILENCE_NS } else { settings.wire_ns(7) / 2 }
}

/// CRC-16/MODBUS. `rmodbus` keeps its own private, and parses some frames (unknown functions) without checking it.
fn crc16(bytes: &[u8]) -> u16 {
    bytes
        .iter()
        .fold(0xffff, |crc, &byte| (0..8).fold(crc ^ u16::from(byte), |crc, _| if crc & 1 != 0 { crc >> 1 ^ 0xa001 } else { crc >> 1 }))
}

/// Whether a frame's last two bytes are the CRC of the rest. The CRC over data and CRC (low byte first) is 0.
pub(crate) fn crc_fits(frame: &[u8]) -> bool {
    frame.len() >= MIN_FRAME && crc16(frame) == 0
}

/// What a new value of the mode register commands.
fn mode_command(mode: u16) -> Option<PlcCommand> {
    match mode {
        1 => Some(PlcCommand::Start),
        2 => Some(PlcCommand::Stop),
        3 => Some(PlcCommand::Pause),
        4 => Some(PlcCommand::GoldenCheck),
        _ => None,
    }
}

/// Bytes of one frame as they come.
struct Incoming {
    bytes: [u8; MAX_FRAME],
    len: usize,
    last_ns: u64,
    /// Damaged: everything up to the next silence belongs to it.
    broken: bool,
    quiet_ns: u64,
}

impl Incoming {
    fn new(settings: &PortSettings) -> Self {
        Self { bytes: [0; MAX_FRAME], len: 0, last_ns: 0, broken: false, quiet_ns: silence_ns(settings).max(BROKEN_FRAME_NS) }
    }

    /// What has come of the current frame.
    fn frame(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or(&[])
    }

    fn push(&mut self, bytes: &[u8], now_ns: u64) {
        self.last_ns = now_ns;
        for &byte in bytes {
            match self.bytes.get_mut(self.len) {
                Some(slot) => {
                    *slot = byte;
                    self.len += 1;
                }
                None => {
                    self.broken = true; // longer than any frame
                    return;
                }
            }
        }
    }

    /// Drop the first `n` bytes.
    fn take(&mut self, n: usize) {
        let n = n.min(self.len);
        self.bytes.copy_within(n..self.len, 0);
        self.len -= n;
    }

    fn clear(&mut self) {
        self.len = 0;
        self.broken = false;
    }

    /// When the line counts as silent, if something has come since it last was.
    fn quiet_at_ns(&self) -> Option<u64> {
        (self.len > 0 || self.broken).then(|| self.last_ns.saturating_add(self.quiet_ns))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Parity;
    use proptest::prelude::*;
    use rmodbus::{ModbusProto, client::ModbusRequest};

    #[test]
    fn the_crc_is_the_codecs() {
        let mut frame = Vec::new();
        ModbusRequest::new(17, ModbusProto::Rtu).generate_get_holdings(107, 3, &mut frame).unwrap();
        assert_eq!(frame, [0x11, 0x03, 0x00, 0x6b, 0x00, 0x03, 0x76, 0x87]); // the standard's example
        assert!(crc_fits(&frame));
        for bit in 0..frame.len() * 8 {
            let mut damaged = frame.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(!crc_fits(&damaged), "bit {bit}");
        }
    }

    #[test]
    fn the_silence_is_three_and_a_half_characters() {
        let at = |baud| silence_ns(&PortSettings { device: "x".into(), baud, parity: Parity::Even, stop_bits: 1 });
        assert_eq!(at(9_600), 4_010_416);
        assert_eq!(at(115_200), 1_750_000);
    }

    proptest! {
        #[test]
        fn incoming_keeps_order_and_never_overruns(chunks in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..80), 0..12), take in 0usize..300) {
            let mut incoming = Incoming::new(&PortSettings { device: "x".into(), baud: 115_200, parity: Parity::Even, stop_bits: 1 });
            chunks.iter().for_each(|chunk| incoming.push(chunk, 0));
            let all: Vec<u8> = chunks.concat();
            prop_assert_eq!(incoming.broken, all.len() > MAX_FRAME);
            prop_assert_eq!(incoming.frame(), &all[..all.len().min(MAX_FRAME)]);
            incoming.take(take);
            prop_assert_eq!(incoming.frame(), &all[take.min(all.len()).min(MAX_FRAME)..all.len().min(MAX_FRAME)]);
        }
    }
}
