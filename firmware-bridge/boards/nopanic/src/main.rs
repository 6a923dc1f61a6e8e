//! Every entry of the core, fed with values that the compiler cannot know. `build.sh` looks for panics in the linked program: there are none,
//! so no input can lead to one.
#![no_std]
#![no_main]
#![forbid(unsafe_code)]

use core::hint::black_box;
use firmware_bridge::board::{Board, BoardConfig};
use firmware_bridge::host::{HostConfig, HostSession};
use firmware_bridge::wire::{Command, Decision, HostState, Output, Request};

#[cortex_m_rt::entry]
fn main() -> ! {
    let mut now = black_box(0u64);
    let Ok(mut board) = Board::new(black_box(BoardConfig::default()), black_box(1), now) else { halt() };
    let mut host = HostSession::new(black_box(HostConfig::default()), black_box(2), now);
    loop {
        now = black_box(now);
        let bytes = black_box([0u8; 64]);
        board.on_bytes(now, black_box(&bytes), &mut |event| _ = black_box(event));
        board.on_bytes(now, black_box(host.output()), &mut |event| _ = black_box(event));
        host.on_bytes(now, black_box(&bytes), &mut |event| _ = black_box(event));
        host.on_bytes(now, black_box(board.output()), &mut |event| _ = black_box(event));
        board.consume(black_box(7));
        host.consume(black_box(7));
        black_box(board.on_trigger(now, black_box(3)));
        black_box(board.command(now, black_box(Command::Recipe(1))));
        black_box(board.clear(now));
        board.untracked_part();
        black_box(board.poll(now, black_box(4), &mut |event| _ = black_box(event)));
        black_box(host.verdict(now, black_box(1), black_box(Decision::Accept), 0, 0.0).is_ok());
        black_box(host.request(now, black_box(Request::Exercise { output: Output::Led, duration_ms: 1 })).is_ok());
        host.set_state(now, black_box(HostState::Running));
        black_box(host.poll(now, &mut |event| _ = black_box(event)));
        black_box((board.state(), board.faults(), board.in_flight(), *board.counters(), host.counters(), host.waiting()));
        if black_box(false) {
            host.restart(now);
        }
        if black_box(false) {
            host.goodbye(now);
        }
    }
}

fn halt() -> ! {
    loop {
        cortex_m::asm::wfi();
    }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    halt()
}
