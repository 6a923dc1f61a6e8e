//! What every board's main shares: four futures around [`Board`], written over the `embedded-hal` traits, so that a main only names its pins.
//!
//! * *sensor*: waits for a rising edge, notes time and encoder, waits out the bounce.
//! * *receive*, *transmit*: move bytes between the serial port and two pipes.
//! * *control*: the only one that knows the board's state; sleeps until an edge, bytes or the board's own wake time.
//!
//! **Outputs fail safe.** `pass` and `run` are high only while a part may pass and the line may run. Reset, watchdog, power loss and a broken
//! wire make them low: reject, stop. The actuator must be wired so that an unpowered input rejects.
#![no_std]
#![forbid(unsafe_code)]

use embassy_futures::join::join4;
use embassy_futures::select::select;
use embassy_sync::blocking_mutex::raw::NoopRawMutex;
use embassy_sync::channel::Channel;
use embassy_sync::pipe::Pipe;
use embassy_sync::signal::Signal;
use embassy_time::{Duration, Instant, Timer};
use embedded_hal::digital::{InputPin, OutputPin};
use embedded_hal_async::digital::Wait;
use embedded_io_async::{Read, Write};
use firmware_bridge::board::{Board, BoardConfig};
use firmware_bridge::parameters::{Gate, Parameters, SafeState, Unit};

/// The line this firmware is for: the values are agreed with the host, which refuses on a difference.
/// 20 encoder ticks a millimetre; gate 600 mm behind the sensor.
pub const CONFIG: BoardConfig = BoardConfig {
    codename: 0x6375_6c6c,
    parameters: Parameters {
        deadline_ms: 500,
        watchdog_ms: 500,
        safe_state: SafeState::RejectAll,
        gate: Gate { unit: Unit::Ticks, distance: 12_000, lead: 200, duration: 600, merge_gap: 0 },
    },
    build: 0x0000_0100,
    versions: firmware_bridge::wire::VERSIONS,
    first_part: 1,
};

/// Baud rate of the serial port.
pub const BAUD: u32 = 115_200;
/// The chip's watchdog resets after this long without a turn of *control*. A turn takes well under a millisecond and comes at least twice a second.
pub const WATCHDOG_MS: u32 = 1_000;
/// Longest sleep of *control*, to feed the watchdog.
const LONGEST_SLEEP: Duration = Duration::from_millis(250);
/// Edges nearer than this are the bounce of one.
const BOUNCE: Duration = Duration::from_micros(500);
/// Edges that may wait for *control*. It takes them within a millisecond; more than 16 in that time is no conveyor.
const EDGES: usize = 16;
/// Bytes that may wait either way: 90 ms at 115200 baud.
const PIPE: usize = 1024;
/// Bytes moved at a time.
const CHUNK: usize = 64;

/// Everything a board has to bring.
pub struct Hardware<Sensor, Rx, Tx, Pass, Run, Led, Clear, Encoder, Feed> {
    /// Trigger sensor, rising edge when a part arrives.
    pub sensor: Sensor,
    /// From the host.
    pub rx: Rx,
    /// To the host.
    pub tx: Tx,
    /// High lets parts through, low rejects.
    pub pass: Pass,
    /// High lets the line run, low stops it.
    pub run: Run,
    /// Status LED.
    pub led: Led,
    /// The operator's clear switch, low when pressed.
    pub clear: Clear,
    /// Encoder count now; wraps.
    pub encoder: Encoder,
    /// Feed the chip's watchdog.
    pub feed: Feed,
}

/// Run the board for ever. `nonce_seed` should differ from start to start.
pub async fn run<S: Wait, R: Read, T: Write, P: OutputPin, Q: OutputPin, L: OutputPin, C: InputPin, E: Fn() -> u32, F: FnMut()>(
    config: BoardConfig,
    nonce_seed: u64,
    hardware: Hardware<S, R, T, P, Q, L, C, E, F>,
) {
    let Hardware { mut sensor, mut rx, mut tx, mut pass, mut run, mut led, mut clear, encoder, mut feed } = hardware;
    let now = || Instant::now().as_micros();
    // A configuration out of range: stay in the fail-safe outputs of the reset. The watchdog, not fed, starts again and again, and the LED is dark.
    let Ok(mut board) = Board::new(config, nonce_seed, now()) else { return };
    let edges = Channel::<NoopRawMutex, (u64, u32), EDGES>::new();
    let overrun = core::cell::Cell::new(false);
    // Something for *control* to look at.
    let news = Signal::<NoopRawMutex, ()>::new();
    let from_host = Pipe::<NoopRawMutex, PIPE>::new();
    let to_host = Pipe::<NoopRawMutex, PIPE>::new();

    let watch = async {
        loop {
            if sensor.wait_for_rising_edge().await.is_err() || edges.try_send((now(), encoder())).is_err() {
                overrun.set(true);
            }
            news.signal(());
            Timer::after(BOUNCE).await;
        }
    };
    let receive = async {
        let mut chunk = [0; CHUNK];
        loop {
            match rx.read(&mut chunk).await {
                Ok(n) => {
                    from_host.write_all(chunk.get(..n).unwrap_or(&[])).await;
                    news.signal(());
                }
                // Noise or overrun on the line: the CRC finds what it did.
                Err(_) => Timer::after_millis(1).await,
            }
        }
    };
    let transmit = async {
        let mut chunk = [0; CHUNK];
        loop {
            let n = to_host.read(&mut chunk).await;
            if tx.write_all(chunk.get(..n).unwrap_or(&[])).await.is_err() {
                Timer::after_millis(1).await;
            }
        }
    };
    let control = async {
        let mut chunk = [0; CHUNK];
        loop {
            if overrun.take() {
                board.untracked_part();
            }
            while let Ok((at, count)) = edges.try_receive() {
                board.on_trigger(at, count);
            }
            while let Ok(n) = from_host.try_read(&mut chunk) {
                board.on_bytes(now(), chunk.get(..n).unwrap_or(&[]), &mut |_| {});
            }
            if clear.is_low().unwrap_or(false) && board.faults() != 0 {
                board.clear(now());
            }
            let outputs = board.poll(now(), encoder(), &mut |_| {});
            // An output that cannot be written is as good as stuck: let the watchdog reset, which makes all of them low.
            let written = [
                pass.set_state((!outputs.reject).into()).is_ok(),
                run.set_state((!outputs.line_stop).into()).is_ok(),
                led.set_state(outputs.led.into()).is_ok(),
            ];
            if written.into_iter().all(|ok| ok) {
                feed();
            }
            if let Ok(n) = to_host.try_write(board.output()) {
                board.consume(n);
            }
            let wake = Instant::from_micros(outputs.wake_us).min(Instant::now() + LONGEST_SLEEP);
            select(news.wait(), Timer::at(wake)).await;
        }
    };
    join4(watch, receive, transmit, control).await;
}

/// A panic resets the chip, which makes the outputs low. The core has none; this is for what the HALs may hold.
#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    cortex_m::peripheral::SCB::sys_reset()
}
