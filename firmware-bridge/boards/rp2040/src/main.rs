//! Reject board on a Raspberry Pi Pico.
//!
//! | Pin | Function |
//! |---|---|
//! | GP0, GP1 | UART0 TX, RX, 115200 8N1 |
//! | GP2 | trigger sensor, pull-down, rising edge |
//! | GP3, GP4 | encoder A, B, pull-up |
//! | GP5 | pass: high lets parts through, low rejects (pull-down outside) |
//! | GP6 | run: high lets the line run, low stops it (pull-down outside) |
//! | GP7 | clear switch to ground, pull-up |
//! | GP25 | the Pico's LED |
#![no_std]
#![no_main]
#![forbid(unsafe_code)]

use bridge_board::{BAUD, CONFIG, Hardware, WATCHDOG_MS, run};
use core::cell::Cell;
use embassy_executor::Spawner;
use embassy_futures::join::join;
use embassy_rp::clocks::RoscRng;
use embassy_rp::gpio::{Input, Level, Output, Pull};
use embassy_rp::peripherals::{PIO0, UART0};
use embassy_rp::pio::{self, Pio};
use embassy_rp::pio_programs::rotary_encoder::{Direction, PioEncoder, PioEncoderProgram};
use embassy_rp::uart::{self, BufferedInterruptHandler, BufferedUart};
use embassy_rp::watchdog::Watchdog;
use embassy_time::Duration;

embassy_rp::bind_interrupts!(struct Irqs {
    UART0_IRQ => BufferedInterruptHandler<UART0>;
    PIO0_IRQ_0 => pio::InterruptHandler<PIO0>;
});

#[embassy_executor::main]
async fn main(_spawner: Spawner) {
    let p = embassy_rp::init(Default::default());
    // Fail-safe outputs before anything else.
    let pass = Output::new(p.PIN_5, Level::Low);
    let run_line = Output::new(p.PIN_6, Level::Low);
    let led = Output::new(p.PIN_25, Level::Low);
    let watchdog_time = Duration::from_millis(WATCHDOG_MS.into());
    let mut watchdog = Watchdog::new(p.WATCHDOG);
    watchdog.start(watchdog_time);

    let (mut tx_buffer, mut rx_buffer) = ([0; 256], [0; 256]);
    let mut config = uart::Config::default();
    config.baudrate = BAUD;
    let uart = BufferedUart::new(p.UART0, p.PIN_0, p.PIN_1, Irqs, &mut tx_buffer, &mut rx_buffer, config);
    let (tx, rx) = uart.split();

    let Pio { mut common, sm0, .. } = Pio::new(p.PIO0, Irqs);
    let program = PioEncoderProgram::new(&mut common);
    let mut encoder = PioEncoder::new(&mut common, sm0, p.PIN_3, p.PIN_4, &program);
    let count = Cell::new(0u32);
    let follow = async {
        loop {
            count.set(match encoder.read().await {
                Direction::Clockwise => count.get().wrapping_add(1),
                Direction::CounterClockwise => count.get().wrapping_sub(1),
            });
        }
    };

    let board = run(
        CONFIG,
        RoscRng.next_u64(),
        Hardware {
            sensor: Input::new(p.PIN_2, Pull::Down),
            rx,
            tx,
            pass,
            run: run_line,
            led,
            clear: Input::new(p.PIN_7, Pull::Up),
            encoder: || count.get(),
            feed: || watchdog.feed(watchdog_time),
        },
    );
    join(board, follow).await;
}
