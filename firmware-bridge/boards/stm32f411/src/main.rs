//! Reject board on an STM32F411 (WeAct Black Pill; the Nucleo has its LED elsewhere).
//!
//! | Pin | Function |
//! |---|---|
//! | PA9, PA10 | USART1 TX, RX, 115200 8N1 |
//! | PA0 | trigger sensor, pull-down, rising edge (EXTI0) |
//! | PB6, PB7 | encoder A, B (TIM4), pull-up |
//! | PB0 | pass: high lets parts through, low rejects (pull-down outside) |
//! | PB1 | run: high lets the line run, low stops it (pull-down outside) |
//! | PB2 | clear switch to ground, pull-up |
//! | PC13 | the Black Pill's LED (lit when low) |
#![no_std]
#![no_main]
#![forbid(unsafe_code)]

use bridge_board::{BAUD, CONFIG, Hardware, WATCHDOG_MS, run};
use core::cell::Cell;
use embassy_executor::Spawner;
use embassy_stm32::exti::{self, ExtiInput};
use embassy_stm32::gpio::{Input, Level, Output, Pull, Speed};
use embassy_stm32::interrupt::typelevel::EXTI0;
use embassy_stm32::peripherals::USART1;
use embassy_stm32::timer::qei::{self, Qei};
use embassy_stm32::usart::{self, BufferedUart};
use embassy_stm32::wdg::IndependentWatchdog;
use embassy_time::Instant;

embassy_stm32::bind_interrupts!(struct Irqs {
    USART1 => usart::BufferedInterruptHandler<USART1>;
    EXTI0 => exti::InterruptHandler<EXTI0>;
});

#[embassy_executor::main]
async fn main(_spawner: Spawner) {
    let p = embassy_stm32::init(Default::default());
    // Fail-safe outputs before anything else.
    let pass = Output::new(p.PB0, Level::Low, Speed::Low);
    let run_line = Output::new(p.PB1, Level::Low, Speed::Low);
    let led = Output::new(p.PC13, Level::High, Speed::Low);
    let mut watchdog = IndependentWatchdog::new(p.IWDG, WATCHDOG_MS * 1000);
    watchdog.unleash();

    let (mut tx_buffer, mut rx_buffer) = ([0; 256], [0; 256]);
    let mut config = usart::Config::default();
    config.baudrate = BAUD;
    let Ok(uart) = BufferedUart::new(p.USART1, p.PA10, p.PA9, &mut tx_buffer, &mut rx_buffer, Irqs, config) else {
        return; // the watchdog resets
    };
    let (tx, rx) = uart.split();

    // The timer counts in hardware, 16 bits; read at least every 250 ms, it is extended to 32.
    let qei_config = qei::Config { ch1_pull: Pull::Up, ch2_pull: Pull::Up, ..Default::default() };
    let qei = Qei::new::<qei::Ch1, qei::Ch2>(p.TIM4, p.PB6, p.PB7, qei_config);
    let (last, count) = (Cell::new(qei.count()), Cell::new(0u32));
    let encoder = || {
        let now = qei.count();
        let moved = now.wrapping_sub(last.replace(now)) as i16;
        count.set(count.get().wrapping_add_signed(moved.into()));
        count.get()
    };

    // No random number generator on this chip: its unique id, and the time the oscillators took to settle. The host's nonce is random.
    let uid = embassy_stm32::uid::uid();
    let seed = uid.iter().fold(Instant::now().as_ticks(), |seed, &byte| seed.rotate_left(7) ^ u64::from(byte));

    run(
        CONFIG,
        seed,
        Hardware {
            sensor: ExtiInput::new(p.PA0, p.EXTI0, Pull::Down, Irqs),
            rx,
            tx,
            pass,
            run: run_line,
            led,
            clear: Input::new(p.PB2, Pull::Up),
            encoder,
            feed: || watchdog.pet(),
        },
    )
    .await;
}
