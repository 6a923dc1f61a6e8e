//! The serial port under a link: opened by its stable path, exclusive, raw, low-latency, non-blocking. It knows bytes, not protocols.
//!
//! [`Port`] is a trait so that what no pseudo-terminal can do (modem lines, line errors, a port that takes no bytes) can be tested with a
//! fake. [`SerialOpener`] makes the real ones through the `serialport` crate; everything that a re-plugged adapter forgets (raw mode, speed,
//! parity, exclusive mode, low latency) is set at every open.

use crate::config::Parity;
use crate::plc::lock::{HeldBy, PortLock};
use mio_serial::{SerialPort, SerialStream};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// An open serial port; all calls return at once. What arrives comes through its [`PortReader`].
pub trait Port: Send {
    /// Hand bytes to the kernel; returns how many it took.
    ///
    /// # Errors
    /// `WouldBlock` when it takes none now; anything else means the port is gone.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize>;

    /// The receiving side, for a thread of its own. The port counts as open (and stays exclusive) until both are dropped.
    ///
    /// # Errors
    /// When the system has no file descriptor left.
    fn reader(&self) -> io::Result<Box<dyn PortReader>>;

    /// The inputs that the other side drives; `None` where the port has none (pseudo-terminals, most USB-CDC boards).
    fn modem_lines(&mut self) -> Option<ModemLines>;

    /// Forget what arrived and was not read.
    ///
    /// # Errors
    /// When the port is gone.
    fn discard_input(&mut self) -> io::Result<()>;

    /// Forget what the kernel has not sent yet. Closing a port waits for it otherwise, up to 30 s on an adapter that hangs.
    ///
    /// # Errors
    /// When the port is gone, which is as good.
    fn discard_output(&mut self) -> io::Result<()>;
}

/// The receiving side of a [`Port`].
///
/// It is apart from the sending side because the kernel makes a reader wait: `read` and `poll` on a terminal wait for the work queue that
/// carries its bytes, an ordinary task that gets its turn some milliseconds later on a loaded machine. A verdict must not wait with it.
pub trait PortReader: Send {
    /// Read what has arrived, waiting up to [`READ_WAIT`] for something.
    ///
    /// # Errors
    /// `WouldBlock` or `TimedOut` when nothing has; anything else means the port is gone. `Ok(0)` is a hang-up.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize>;
}

/// Longest that [`PortReader::read`] waits: how long closing a silent port takes.
pub const READ_WAIT: Duration = Duration::from_millis(50);

/// Modem inputs, true = asserted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct ModemLines {
    /// Clear to send.
    pub cts: bool,
    /// Data set ready: with a full cable, the other side has power.
    pub dsr: bool,
    /// Data carrier detect.
    pub dcd: bool,
    /// Ring indicator.
    pub ri: bool,
}

impl std::fmt::Display for ModemLines {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let on = |asserted| if asserted { "on" } else { "off" };
        write!(f, "CTS {} DSR {} DCD {} RI {}", on(self.cts), on(self.dsr), on(self.dcd), on(self.ri))
    }
}

/// Makes open ports: once at start, and again after each loss.
pub trait OpenPort: Send {
    /// Open the port, with every setting.
    ///
    /// # Errors
    /// See [`PortError`]; the link retries with back-off.
    fn open(&mut self) -> Result<Box<dyn Port>, PortError>;

    /// The port's name, for messages.
    fn name(&self) -> String;
}

/// Why a port cannot be opened, or was lost.
#[derive(Debug, thiserror::Error)]
pub enum PortError {
    /// It is not there.
    #[error("serial port {port} is not there: plug the adapter in, or choose another port (`cull doctor` lists them)")]
    Missing {
        /// Device.
        port: String,
    },
    /// Another process has it.
    #[error("serial port {port} is in use by {holder}: stop that first, or choose another port")]
    InUse {
        /// Device.
        port: String,
        /// Who, as far as known.
        holder: HeldBy,
    },
    /// Not allowed.
    #[error("no permission to open serial port {port}: add this user to the group `dialout`, or install deploy/70-cull-serial.rules")]
    Permission {
        /// Device.
        port: String,
    },
    /// It is there but cannot be set up.
    #[error("serial port {port} cannot be opened: {why}")]
    Open {
        /// Device.
        port: String,
        /// What the system said.
        why: String,
    },
    /// It was open and is gone.
    #[error("serial port {port} lost: {why}")]
    Lost {
        /// Device.
        port: String,
        /// What the system said.
        why: String,
    },
}

/// How a port is set up: always 8 data bits and no flow control.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortSettings {
    /// Device, best a stable path (`/dev/serial/by-id/…`); symbolic links are resolved again at every open.
    pub device: PathBuf,
    /// Bits per second.
    pub baud: u32,
    /// Parity bit.
    pub parity: Parity,
    /// Stop bits, 1 or 2.
    pub stop_bits: u8,
}

impl PortSettings {
    /// Bits on the wire per byte: start, 8 data, parity if any, stop.
    pub fn bits_per_byte(&self) -> u32 {
        let parity = match self.parity {
            Parity::None => 0,
            Parity::Even | Parity::Odd => 1,
        };
        9 + parity + u32::from(self.stop_bits)
    }

    /// Time that `bytes` take on the wire, in ns.
    pub fn wire_ns(&self, bytes: usize) -> u64 {
        let bits = (bytes as u64).saturating_mul(u64::from(self.bits_per_byte()));
        bits.saturating_mul(1_000_000_000) / u64::from(self.baud.max(1))
    }
}

/// Opens the real port.
#[derive(Clone, Debug)]
pub struct SerialOpener {
    settings: PortSettings,
}

impl SerialOpener {
    /// An opener for `settings`; opens nothing yet.
    pub fn new(settings: PortSettings) -> Self {
        Self { settings }
    }
}

impl OpenPort for SerialOpener {
    fn open(&mut self) -> Result<Box<dyn Port>, PortError> {
        Ok(Box::new(SerialLine::open(&self.settings)?))
    }

    fn name(&self) -> String {
        self.settings.device.display().to_string()
    }
}

/// A real serial port.
struct SerialLine {
    /// Non-blocking, and written to without asking first whether it takes bytes: asking is a `poll`, see [`PortReader`].
    stream: SerialStream,
    reader: serialport::TTYPort,
    /// Held as long as either side is open. Declared last: dropped, and so released, after the port is closed.
    lock: Arc<PortLock>,
}

struct SerialReader {
    tty: serialport::TTYPort,
    _lock: Arc<PortLock>,
}

impl PortReader for SerialReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        Read::read(&mut self.tty, buffer)
    }
}

impl SerialLine {
    fn open(settings: &PortSettings) -> Result<Self, PortError> {
        let port = || settings.device.display().to_string();
        // Before the lock: a device that is not there must not leave a lock file under a name that nobody else would use.
        match std::fs::metadata(&settings.device) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(PortError::Missing { port: port() }),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return Err(PortError::Permission { port: port() }),
            Err(error) => return Err(PortError::Open { port: port(), why: error.to_string() }),
        }
        let lock = PortLock::acquire(&settings.device).map_err(|holder| PortError::InUse { port: port(), holder })?;
        let Some(path) = settings.device.to_str() else {
            return Err(PortError::Open { port: port(), why: "the path is not UTF-8; use a stable path under /dev/serial/by-id".into() });
        };
        let builder = serialport::new(path, settings.baud)
            .data_bits(serialport::DataBits::Eight)
            .stop_bits(if settings.stop_bits == 2 { serialport::StopBits::Two } else { serialport::StopBits::One })
            .flow_control(serialport::FlowControl::None)
            .parity(match settings.parity {
                Parity::None => serialport::Parity::None,
                Parity::Even => serialport::Parity::Even,
                Parity::Odd => serialport::Parity::Odd,
            });
        let mut tty = serialport::TTYPort::open(&builder).map_err(|error| match error.kind {
            // serialport says `NoDevice` for EBUSY and for a failed flock, and only for these on Linux.
            serialport::ErrorKind::NoDevice => PortError::InUse { port: port(), holder: HeldBy { pid: None, name: None } },
            serialport::ErrorKind::Io(io::ErrorKind::PermissionDenied) => PortError::Permission { port: port() },
            serialport::ErrorKind::Io(io::ErrorKind::NotFound) => PortError::Missing { port: port() },
            _ => PortError::Open { port: port(), why: error.description },
        })?;
        set_low_latency(&mut tty, &settings.device);
        let mut reader = tty.try_clone_native().map_err(|error| PortError::Open { port: port(), why: error.description })?;
        reader.set_timeout(READ_WAIT).map_err(|error| PortError::Open { port: port(), why: error.description })?;
        let stream = SerialStream::try_from(tty).map_err(|error| PortError::Open { port: port(), why: error.description })?;
        // What arrived before the speed was right is noise.
        let mut line = Self { stream, reader, lock: Arc::new(lock) };
        line.discard_input().map_err(|error| PortError::Open { port: port(), why: error.to_string() })?;
        Ok(line)
    }
}

impl Port for SerialLine {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Write::write(&mut self.stream, bytes)
    }

    fn reader(&self) -> io::Result<Box<dyn PortReader>> {
        let mut tty = self.reader.try_clone_native()?;
        tty.set_timeout(READ_WAIT)?;
        Ok(Box::new(SerialReader { tty, _lock: self.lock.clone() }))
    }

    fn modem_lines(&mut self) -> Option<ModemLines> {
        Some(ModemLines {
            cts: self.stream.read_clear_to_send().ok()?,
            dsr: self.stream.read_data_set_ready().ok()?,
            dcd: self.stream.read_carrier_detect().ok()?,
            ri: self.stream.read_ring_indicator().ok()?,
        })
    }

    fn discard_input(&mut self) -> io::Result<()> {
        self.stream.clear(serialport::ClearBuffer::Input).map_err(io::Error::from)
    }

    fn discard_output(&mut self) -> io::Result<()> {
        self.stream.clear(serialport::ClearBuffer::Output).map_err(io::Error::from)
    }
}

/// FTDI's factory setting, in ms: bytes wait this long in the adapter before the host sees them.
const FTDI_FACTORY_TIMER_MS: u32 = 16;

/// Have the driver deliver at once (ASYNC_LOW_LATENCY). On FTDI adapters this takes the latency timer from 16 ms to 1 ms; needs no
/// privilege. Drivers without the flag (pseudo-terminals, USB-CDC) refuse it, and have no timer to lower.
fn set_low_latency(tty: &mut serialport::TTYPort, device: &Path) {
    let set = serialport_low_latency::enable_low_latency(tty);
    match (set, ftdi_latency_ms(device)) {
        (_, Some(ms)) if ms > 1 => log::warn!(
            "{}: the adapter's latency timer stands at {ms} ms{}, so verdicts' acknowledgements come that late; install deploy/70-cull-serial.rules",
            device.display(),
            if ms == FTDI_FACTORY_TIMER_MS { " (factory setting)" } else { "" },
        ),
        (Ok(()), timer) => log::debug!("{}: low-latency mode set, latency timer {timer:?} ms", device.display()),
        (Err(error), _) => log::debug!("{}: no low-latency mode ({error}); this kind of port needs none", device.display()),
    }
}

/// The latency timer of an FTDI-like adapter, in ms, from sysfs; `None` for ports without one.
pub fn ftdi_latency_ms(device: &Path) -> Option<u32> {
    let real = device.canonicalize().ok()?;
    let timer = Path::new("/sys/class/tty").join(real.file_name()?).join("device/latency_timer");
    std::fs::read_to_string(timer).ok()?.trim().parse().ok()
}

#[cfg(test)]
pub(crate) mod fake {
    //! A port that does what a test says, line errors and modem lines included.

    use super::*;
    use std::collections::VecDeque;
    use std::sync::{Condvar, Mutex, MutexGuard};

    /// What the test sees and sets; shared with the [`FakePort`] that the link holds.
    #[derive(Default)]
    pub struct FakeLine {
        /// What reads bring, in order: bytes or an error. Empty: `WouldBlock`.
        pub incoming: VecDeque<Result<Vec<u8>, io::ErrorKind>>,
        /// What was written.
        pub outgoing: Vec<u8>,
        /// Bytes that writes will still take; `None` for any number.
        pub room: Option<usize>,
        /// Modem inputs.
        pub lines: Option<ModemLines>,
        /// Errors that opens bring, in order; empty: opens succeed.
        pub refusals: VecDeque<io::ErrorKind>,
        /// Opens that succeeded.
        pub opens: usize,
        /// Times unsent bytes were given up.
        pub discarded: usize,
    }

    /// Both the opener and the test's handle, and either side of the port.
    #[derive(Clone, Default)]
    pub struct Fake(Arc<(Mutex<FakeLine>, Condvar)>);

    impl Fake {
        pub fn line(&self) -> MutexGuard<'_, FakeLine> {
            self.0.0.lock().unwrap()
        }

        /// Bytes arrive (or an error happens).
        pub fn arrive(&self, what: Result<Vec<u8>, io::ErrorKind>) {
            self.line().incoming.push_back(what);
            self.0.1.notify_all();
        }
    }

    impl OpenPort for Fake {
        fn open(&mut self) -> Result<Box<dyn Port>, PortError> {
            let mut line = self.line();
            if let Some(kind) = line.refusals.pop_front() {
                return Err(PortError::Open { port: "fake".into(), why: kind.to_string() });
            }
            line.opens += 1;
            Ok(Box::new(self.clone()))
        }

        fn name(&self) -> String {
            "fake".into()
        }
    }

    impl PortReader for Fake {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let empty = |line: &mut FakeLine| line.incoming.is_empty();
            let (mut line, _) = self.0.1.wait_timeout_while(self.line(), READ_WAIT, empty).unwrap();
            match line.incoming.pop_front() {
                None => Err(io::ErrorKind::TimedOut.into()),
                Some(Err(kind)) => Err(kind.into()),
                Some(Ok(mut bytes)) => {
                    let n = bytes.len().min(buffer.len());
                    buffer[..n].copy_from_slice(&bytes[..n]);
                    if n < bytes.len() {
                        line.incoming.push_front(Ok(bytes.split_off(n)));
                    }
                    Ok(n)
                }
            }
        }
    }

    impl Port for Fake {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let mut line = self.line();
            let n = line.room.unwrap_or(usize::MAX).min(bytes.len());
            if n == 0 {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            line.room = line.room.map(|room| room - n);
            line.outgoing.extend_from_slice(&bytes[..n]);
            Ok(n)
        }

        fn reader(&self) -> io::Result<Box<dyn PortReader>> {
            Ok(Box::new(self.clone()))
        }

        fn modem_lines(&mut self) -> Option<ModemLines> {
            self.line().lines
        }

        fn discard_input(&mut self) -> io::Result<()> {
            self.line().incoming.clear();
            Ok(())
        }

        fn discard_output(&mut self) -> io::Result<()> {
            self.line().discarded += 1;
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(device: &str, parity: Parity) -> PortSettings {
        PortSettings { device: device.into(), baud: 115_200, parity, stop_bits: 1 }
    }

    #[test]
    fn the_time_on_the_wire_is_bits_over_speed() {
        assert_eq!(settings("/dev/x", Parity::None).wire_ns(1152), 100_000_000);
        assert_eq!(settings("/dev/x", Parity::Even).wire_ns(1152), 110_000_000);
    }

    #[test]
    fn a_port_that_is_not_there_says_so() {
        let error = SerialOpener::new(settings("/dev/serial/by-id/no-such-port", Parity::None)).open().err().unwrap();
        assert!(matches!(error, PortError::Missing { .. }), "{error}");
        assert!(error.to_string().contains("/dev/serial/by-id/no-such-port"), "{error}");
    }

    #[test]
    fn a_file_is_not_a_port() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = SerialOpener::new(settings(file.path().to_str().unwrap(), Parity::None)).open().err().unwrap();
        assert!(matches!(error, PortError::Open { .. }), "{error}");
    }

    #[test]
    fn a_port_is_exclusive_and_free_again_after_a_drop() {
        let (_master, slave) = serialport::TTYPort::pair().unwrap();
        let name = slave.name().unwrap();
        drop(slave); // the pair's own slave end carries no lock
        let mut opener = SerialOpener::new(settings(&name, Parity::Even));
        let first = opener.open().unwrap();
        let error = opener.open().err().unwrap();
        assert!(matches!(error, PortError::InUse { .. }), "{error}");
        let reader = first.reader().unwrap();
        drop(first);
        assert!(matches!(opener.open(), Err(PortError::InUse { .. })), "its reader still has it");
        drop(reader);
        opener.open().unwrap();
    }

    #[test]
    fn a_pty_carries_eight_bits_without_blocking_and_has_no_modem_lines() {
        let (mut master, slave) = serialport::TTYPort::pair().unwrap();
        let name = slave.name().unwrap();
        drop(slave);
        let mut port = SerialOpener::new(settings(&name, Parity::None)).open().unwrap();
        let mut reader = port.reader().unwrap();
        assert_eq!(reader.read(&mut [0; 8]).unwrap_err().kind(), io::ErrorKind::TimedOut);
        let all: Vec<u8> = (0..=255).collect();
        assert_eq!(port.write(&all).unwrap(), 256);
        let mut seen = [0; 256];
        master.read_exact(&mut seen).unwrap();
        assert_eq!(seen.as_slice(), all.as_slice());
        assert_eq!(port.modem_lines(), None);
        drop(master);
        let mut buffer = [0; 8];
        let gone = reader.read(&mut buffer);
        let only_silent = matches!(&gone, Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut));
        assert!(!only_silent && !matches!(gone, Ok(n) if n > 0), "{gone:?}");
    }
}
