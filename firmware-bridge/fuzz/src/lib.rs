//! The fuzz targets' bodies; `firmware-bridge/tests/corpus.rs` includes this file and replays the corpus as a normal test.

use firmware_bridge::board::{Board, BoardConfig, BoardEvent};
use firmware_bridge::cobs::{self, Cut, Deframer, MAX_WIRE};
use firmware_bridge::host::{HostConfig, HostEvent, HostSession};
use firmware_bridge::parameters::{Gate, Parameters, SafeState, Unit};
use firmware_bridge::schedule::Outcome;
use firmware_bridge::wire::{self, Command, Decision, Header, HostState, Key, MAX_BODY, Message, Output, Request};

/// Any bytes as a stream, and the same bytes as one body under every key that needs none.
pub fn decoder(data: &[u8]) {
    let mut deframer = Deframer::new();
    for &byte in data {
        if let Cut::Body(body) = deframer.push(byte) {
            body_round_trip(body);
        }
    }
    // As the body of a frame with a good CRC: gets behind the CRC, where random bytes would never come.
    if data.len() >= wire::HEADER && data.len() <= MAX_BODY - 4 {
        let mut body = [0; MAX_BODY];
        body[..data.len()].copy_from_slice(data);
        body_round_trip(&body[..data.len() + 4]);
    }
    // Whatever came before, the frame after next is read.
    let header = Header { version: 1, kind: 0, source: wire::HOST, destination: wire::BOARD, number: 1 };
    let (mut body, mut frame) = ([0; MAX_BODY], [0; MAX_WIRE]);
    let n = wire::seal(header, &Message::Goodbye, Key(7), &mut body);
    let n = cobs::encode(&body[..n], &mut frame).expect("a goodbye fits");
    let found = frame[..n].iter().fold(false, |found, &byte| match deframer.push(byte) {
        Cut::Body(body) => found | wire::open(body, Key(7), 1).is_ok(),
        _ => found,
    });
    assert!(found, "a good frame was lost after damage before it");
}

fn body_round_trip(body: &[u8]) {
    let _ = wire::open(body, Key::OPEN, 1);
    if let Ok((header, message)) = wire::read_unchecked(body) {
        let mut again = [0; MAX_BODY];
        let n = wire::seal(header, &message, Key(9), &mut again);
        assert_eq!(&again[..n - 4], &body[..body.len() - 4], "{message:?}");
        assert!(wire::open(&again[..n], Key(9), header.version).is_ok());
    }
}

struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn number(&mut self) -> u32 {
        (0..4).fold(0, |n, _| n << 8 | u32::from(self.byte().unwrap_or(0)))
    }

    fn some(&mut self) -> &[u8] {
        let n = usize::from(self.byte().unwrap_or(0)).min(self.0.len());
        let (taken, rest) = self.0.split_at(n);
        self.0 = rest;
        taken
    }
}

/// A board and a host session; the input is a list of what happens. Whatever does: no panic, no accepted part without the host's accept, and the
/// counters add up.
pub fn line(data: &[u8]) {
    let mut input = Input(data);
    let flags = input.byte().unwrap_or(0);
    let mut now = if flags & 1 == 0 { 0 } else { u64::from(u32::MAX) - 500_000 };
    let gate = if flags & 2 == 0 {
        Gate { unit: Unit::Time, distance: 60_000, lead: 5_000, duration: 9_000, merge_gap: 2_000 }
    } else {
        Gate { unit: Unit::Ticks, distance: 600, lead: 50, duration: 90, merge_gap: 20 }
    };
    let parameters = Parameters {
        deadline_ms: 50,
        watchdog_ms: 60,
        safe_state: if flags & 4 == 0 { SafeState::RejectAll } else { SafeState::StopLine },
        gate,
    };
    let mut host_config = HostConfig::default();
    host_config.expected.deadline_ms = 50;
    host_config.expected.watchdog_ms = 60;
    let board_config = BoardConfig { parameters, first_part: if flags & 8 == 0 { 1 } else { u32::MAX - 3 }, ..BoardConfig::default() };
    let mut board = Board::new(board_config, 1, now).expect("in range");
    let mut host = HostSession::new(host_config, 2, now);
    host.set_state(now, HostState::Running);
    let mut encoder = 0u32;
    let mut accepted_by_host: Vec<u32> = Vec::new();
    let mut announced: Vec<u32> = Vec::new();
    let (mut to_board_cut, mut to_host_cut) = (false, false);
    let on_board = |event: BoardEvent, accepted: &[u32]| {
        if let BoardEvent::AtGate(at_gate) = event {
            assert!(at_gate.outcome != Outcome::Accepted || accepted.contains(&at_gate.part), "part {} passed", at_gate.part);
        }
    };
    while let Some(what) = input.byte() {
        let mut on_host = |event: HostEvent| {
            if let HostEvent::Trigger(trigger) = event {
                announced.push(trigger.part);
            }
        };
        match what {
            0..=63 => now += u64::from(what) * 250,
            64..=127 => encoder = encoder.wrapping_add_signed(i32::from(what) - 70),
            128..=159 => _ = board.on_trigger(now, encoder),
            160 => now += u64::from(input.number() % 3_000_000),
            161 => encoder = encoder.wrapping_add(input.number()),
            162 => board.on_bytes(now, input.some(), &mut |event| on_board(event, &accepted_by_host)),
            163 => host.on_bytes(now, input.some(), &mut on_host),
            164 => to_board_cut = !to_board_cut,
            165 => to_host_cut = !to_host_cut,
            166 => host.restart(now),
            167 => host.goodbye(now),
            168 => _ = host.request(now, Request::Clear),
            169 => _ = host.request(now, Request::Exercise { output: Output::Reject, duration_ms: input.byte().unwrap_or(0).into() }),
            170 => _ = board.command(now, Command::Recipe(u16::from(input.byte().unwrap_or(0)))),
            171 => _ = board.clear(now),
            172 => board.untracked_part(),
            173 => host.set_state(now, HostState::from_wire(input.byte().unwrap_or(0) % 5).expect("a state")),
            174..=215 => {
                if let Some(part) = announced.pop() {
                    let decision = [Decision::Accept, Decision::Reject, Decision::Unknown, Decision::Fault][usize::from(what % 4)];
                    if host.verdict(now, part, decision, what, 0.0).is_ok() && decision == Decision::Accept {
                        accepted_by_host.push(part);
                    }
                }
            }
            216..=223 => _ = host.verdict(now, input.number(), Decision::Reject, 0, f32::NAN),
            _ => {
                // A turn of both ends.
                if !to_board_cut {
                    board.on_bytes(now, host.output(), &mut |event| on_board(event, &accepted_by_host));
                }
                host.consume(usize::from(what));
                if !to_host_cut {
                    host.on_bytes(now, board.output(), &mut on_host);
                }
                board.consume(usize::MAX);
                host.poll(now, &mut on_host);
            }
        }
        board.poll(now, encoder, &mut |event| on_board(event, &accepted_by_host));
        let c = board.counters();
        let done = u64::from(c.accepted) + u64::from(c.rejected) + u64::from(c.leaked);
        assert_eq!(u64::from(c.parts), done + board.in_flight() as u64, "{c:?}");
    }
}
