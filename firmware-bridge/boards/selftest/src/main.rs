//! The core on a Cortex-M under qemu: every vector of `PROTOCOL.md`, then a board and a host session through scripted scenarios.
//! Prints a line per check and ends qemu with exit code 0, or 1 after the first failure.
#![no_std]
#![no_main]
#![forbid(unsafe_code)]

use cortex_m_semihosting::{debug, hprintln};
use firmware_bridge::board::{Board, BoardConfig, BoardEvent, Outputs};
use firmware_bridge::cobs::{self, Cut, Deframer};
use firmware_bridge::host::{HostConfig, HostEvent, HostSession};
use firmware_bridge::parameters::Parameters;
use firmware_bridge::schedule::Outcome;
use firmware_bridge::wire::{self, BoardState, Decision, HostState, Key, MAX_BODY, Message, Request, Status};

#[cortex_m_rt::entry]
fn main() -> ! {
    let vectors = vectors();
    hprintln!("{} vectors read and written again", vectors);
    check(vectors == 16, "all vectors");
    line();
    hprintln!("self-test passed");
    debug::exit(debug::EXIT_SUCCESS);
    halt()
}

fn halt() -> ! {
    loop {
        cortex_m::asm::bkpt();
    }
}

fn check(holds: bool, what: &str) {
    if holds {
        hprintln!("ok: {}", what);
    } else {
        hprintln!("FAILED: {}", what);
        debug::exit(debug::EXIT_FAILURE);
        halt();
    }
}

fn nibble(digit: u8) -> u8 {
    match digit {
        b'0'..=b'9' => digit - b'0',
        b'a'..=b'f' => digit - b'a' + 10,
        _ => 0,
    }
}

/// Read every vector, write it again from what was read, compare; returns how many.
#[inline(never)]
fn vectors() -> u32 {
    let text = include_str!("../../../PROTOCOL.md");
    let block = text.split("```vectors\n").nth(1).and_then(|rest| rest.split("```").next()).unwrap_or("");
    let session = Key::session(1, 0x6375_6c6c, 0x1122_3344, 0x5566_7788, &Parameters::default());
    let mut count = 0;
    for text_line in block.lines() {
        let Some((name, hex)) = text_line.split_once(" | ") else { continue };
        if name == "session-key" {
            let key = hex.bytes().fold(0u32, |key, digit| key << 4 | u32::from(nibble(digit)));
            check(key == session.0, name);
            continue;
        }
        let mut wire_bytes = [0u8; cobs::MAX_WIRE];
        let mut len = 0;
        for (slot, pair) in wire_bytes.iter_mut().zip(hex.as_bytes().chunks(2)) {
            *slot = pair.iter().fold(0, |byte, &digit| byte << 4 | nibble(digit));
            len += 1;
        }
        let mut deframer = Deframer::new();
        let mut same = false;
        for &byte in wire_bytes.get(..len).unwrap_or(&[]) {
            if let Cut::Body(body) = deframer.push(byte) {
                let Some(header) = wire::peek(body) else { continue };
                let key = if Message::is_handshake(header.kind) { Key::OPEN } else { session };
                let Ok((header, message)) = wire::open(body, key, 1) else { continue };
                let (mut again, mut framed) = ([0; MAX_BODY], [0; cobs::MAX_WIRE]);
                let n = wire::seal(header, &message, key, &mut again);
                let n = again.get(..n).and_then(|again| cobs::encode(again, &mut framed));
                same = n == Some(len) && framed == wire_bytes;
            }
        }
        check(same, name);
        count += 1;
    }
    count
}

/// One line, both ends, a wire without faults but when cut.
struct Line<'a> {
    now: u64,
    // Borrowed: the small machine's 16 kB hold each of them once, and no copy on the way.
    board: &'a mut Board,
    host: &'a mut HostSession,
    out: Outputs,
    cut: bool,
    announced: Option<u32>,
    gate: Option<(u32, Outcome)>,
    answer: Option<Status>,
}

impl Line<'_> {
    fn step(&mut self) {
        self.now += 1_000;
        let Self { now, board, host, out, cut, announced, gate, answer } = self;
        let mut on_host = |event: HostEvent| match event {
            HostEvent::Trigger(trigger) => *announced = Some(trigger.part),
            HostEvent::Answer { status, .. } => *answer = Some(status),
            _ => {}
        };
        if !*cut {
            board.on_bytes(*now, host.output(), &mut |_| {});
        }
        host.consume(usize::MAX);
        *out = board.poll(*now, 0, &mut |event| {
            if let BoardEvent::AtGate(at_gate) = event {
                *gate = Some((at_gate.part, at_gate.outcome));
            }
        });
        host.on_bytes(*now, board.output(), &mut on_host);
        board.consume(usize::MAX);
        host.poll(*now, &mut on_host);
    }

    fn steps(&mut self, n: u32) {
        for _ in 0..n {
            self.step();
        }
    }

    /// A part through the whole line; what happened to it at the gate.
    fn part(&mut self, decision: Option<Decision>) -> Option<Outcome> {
        let part = self.board.on_trigger(self.now, 0);
        self.step();
        if let (Some(decision), Some(announced)) = (decision, self.announced.take()) {
            if announced != part || self.host.verdict(self.now, part, decision, 0, 0.5).is_err() {
                return None;
            }
        }
        self.steps(700);
        self.gate.take().filter(|(at_gate, _)| *at_gate == part).map(|(_, outcome)| outcome)
    }
}

#[inline(never)]
fn line() {
    // Shortly before the low 32 bits of the clock wrap.
    let now = u64::from(u32::MAX) - 1_500_000;
    let mut made = Board::new(BoardConfig::default(), 1, now);
    let Ok(board) = made.as_mut() else {
        check(false, "default parameters are in range");
        return;
    };
    let mut host = HostSession::new(HostConfig::default(), 2, now);
    let mut line = Line {
        now,
        board,
        host: &mut host,
        out: Outputs { reject: true, line_stop: false, led: false, wake_us: now },
        cut: false,
        announced: None,
        gate: None,
        answer: None,
    };
    line.host.set_state(now, HostState::Running);
    line.step();
    check(line.out.reject, "without a host the actuator rejects");
    line.steps(1_000);
    check(line.board.state() == BoardState::Running && !line.out.reject, "handshake, parameters agreed, running");
    check(line.part(Some(Decision::Accept)) == Some(Outcome::Accepted), "accept lets a part through");
    check(line.part(Some(Decision::Reject)) == Some(Outcome::Rejected), "reject rejects");
    check(line.part(Some(Decision::Fault)) == Some(Outcome::Rejected), "fault rejects");
    check(line.part(None) == Some(Outcome::Rejected) && line.board.counters().missed == 1, "no verdict is a counted reject");
    line.cut = true;
    line.steps(600);
    check(line.board.state() == BoardState::Safe && line.out.reject, "a dead host latches the safe state");
    line.cut = false;
    line.steps(1_500);
    check(line.board.state() == BoardState::Safe && line.out.reject, "a new session alone does not clear it");
    check(line.part(Some(Decision::Accept)) == Some(Outcome::Rejected), "in the safe state an accept is not enough");
    check(line.host.request(line.now, Request::Clear).is_ok(), "clear asked");
    line.steps(5);
    check(line.answer == Some(Status::Taken) && line.board.state() == BoardState::Running, "clear taken, running again");
    check(line.part(Some(Decision::Accept)) == Some(Outcome::Accepted), "and parts pass again, after the clock's wrap");
    check(line.board.counters().leaked == 0 && line.board.counters().bad_frames == 0, "nothing leaked, no bad frame");
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    hprintln!("FAILED: panic");
    debug::exit(debug::EXIT_FAILURE);
    halt()
}
