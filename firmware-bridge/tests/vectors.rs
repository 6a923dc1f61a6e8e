//! The vectors of `PROTOCOL.md`, made by an independent program: every frame is produced and read back exactly.

use firmware_bridge::cobs::{self, Cut, Deframer};
use firmware_bridge::parameters::{Field, Parameters};
use firmware_bridge::wire::{
    self, BOARD, Command, Counters, Decision, FaultCode, HOST, Header, Heartbeat, Hello, Key, MAX_BODY, Message, Output, Request, Status,
    kind,
};
use std::collections::BTreeMap;

fn vectors() -> BTreeMap<&'static str, Vec<u8>> {
    let text = include_str!("../PROTOCOL.md");
    let block = text.split("```vectors\n").nth(1).expect("a block of vectors").split("```").next().expect("its end");
    block
        .lines()
        .map(|line| {
            let (name, hex) = line.split_once(" | ").expect("name | hex");
            let bytes = (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).expect("hex")).collect();
            (name, bytes)
        })
        .collect()
}

const HOST_NONCE: u32 = 0x1122_3344;
const BOARD_NONCE: u32 = 0x5566_7788;
const CODENAME: u32 = 0x6375_6c6c;

/// Name, number and message of every vector.
fn messages() -> Vec<(&'static str, u8, u16, Message)> {
    let hello = |nonce, answers| Hello { nonce, answers, version_min: 1, version_max: 1, codename: CODENAME, build: 0x100 };
    let counters = Counters { parts: 10, accepted: 7, rejected: 2, missed: 1, leaked: 0, bad_frames: 4, lost_frames: 5, safe_entries: 1 };
    let host_heartbeat = Heartbeat { time_us: 1000, echo_us: 2000, state: 1, faults: 0, in_flight: 3, counters: None };
    let board_heartbeat =
        Heartbeat { time_us: 2000, echo_us: 1000, state: 2, faults: FaultCode::HostDead.bit(), in_flight: 64, counters: Some(counters) };
    vec![
        ("hello-host", HOST, 0, Message::Hello(hello(HOST_NONCE, 0))),
        ("hello-board", BOARD, 0, Message::Hello(hello(BOARD_NONCE, HOST_NONCE))),
        (
            "parameters",
            BOARD,
            0,
            Message::Parameters { host_nonce: HOST_NONCE, board_nonce: BOARD_NONCE, parameters: Parameters::default() },
        ),
        ("refuse", HOST, 0, Message::Refuse { answers: BOARD_NONCE, field: Field::DeadlineMs, ours: 400, theirs: 500 }),
        ("agree", HOST, 1, Message::Agree),
        ("goodbye", HOST, 2, Message::Goodbye),
        ("trigger", BOARD, 2, Message::Trigger { part: 7, encoder: 0x1_0000, time_us: 0xFFFF_FFF0 }),
        ("verdict-accept", HOST, 3, Message::Verdict { part: 7, decision: Decision::Accept, reason: 0, score: 1.5 }),
        (
            "verdict-unknown",
            HOST,
            4,
            Message::Verdict { part: 8, decision: Decision::Unknown, reason: 3, score: f32::from_bits(0x7FC0_0000) },
        ),
        ("acknowledge-late", BOARD, 3, Message::Acknowledge { of: kind::VERDICT, reference: 8, status: Status::TooLate }),
        ("heartbeat-host", HOST, 5, Message::Heartbeat(host_heartbeat)),
        ("heartbeat-board", BOARD, 4, Message::Heartbeat(board_heartbeat)),
        ("fault-host-dead", BOARD, 5, Message::Fault { code: FaultCode::HostDead, detail: 512 }),
        ("command-recipe", BOARD, 6, Message::Command { id: 9, command: Command::Recipe(12) }),
        ("request-clear", HOST, 6, Message::Request { id: 1, request: Request::Clear }),
        (
            "request-exercise",
            HOST,
            65535,
            Message::Request { id: 2, request: Request::Exercise { output: Output::Reject, duration_ms: 250 } },
        ),
    ]
}

fn session_key() -> Key {
    Key::session(1, CODENAME, HOST_NONCE, BOARD_NONCE, &Parameters::default())
}

fn key_of(message: &Message) -> Key {
    if Message::is_handshake(message.kind()) { Key::OPEN } else { session_key() }
}

fn frame(source: u8, number: u16, message: &Message) -> Vec<u8> {
    let header = Header { version: 1, kind: message.kind(), source, destination: HOST + BOARD - source, number };
    let mut body = [0; MAX_BODY];
    let len = wire::seal(header, message, key_of(message), &mut body);
    let mut out = [0; cobs::MAX_WIRE];
    let n = cobs::encode(&body[..len], &mut out).expect("fits");
    out[..n].to_vec()
}

#[test]
fn every_vector_is_written_and_read() {
    let vectors = vectors();
    let messages = messages();
    assert_eq!(vectors["session-key"], session_key().0.to_be_bytes());
    assert_eq!(vectors.len(), messages.len() + 1, "a vector without its message, or the reverse");
    for (name, source, number, message) in messages {
        let wanted = &vectors[name];
        assert_eq!(&frame(source, number, &message), wanted, "{name}");
        let mut deframer = Deframer::new();
        let mut read = None;
        for &byte in wanted {
            if let Cut::Body(body) = deframer.push(byte) {
                read = Some(wire::open(body, key_of(&message), 1).expect(name));
            }
        }
        let (header, got) = read.expect(name);
        assert_eq!((header.source, header.number), (source, number), "{name}");
        // NaN is not equal to itself; its bits are.
        assert_eq!(format!("{got:?}"), format!("{message:?}"), "{name}");
    }
}

#[test]
fn up_to_five_flipped_bits_never_pass() {
    // Every single and double flip, and a deterministic sample of triple to quintuple ones, in the body of each vector.
    let mut state = 1u64;
    let mut random = move || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as usize
    };
    for (name, source, number, message) in messages() {
        let header = Header { version: 1, kind: message.kind(), source, destination: HOST + BOARD - source, number };
        let mut body = [0; MAX_BODY];
        let len = wire::seal(header, &message, key_of(&message), &mut body);
        let body = &body[..len];
        let bits = len * 8;
        let refused = |flips: &[usize]| {
            let mut damaged = body.to_vec();
            flips.iter().for_each(|bit| damaged[bit / 8] ^= 1 << (bit % 8));
            damaged == body || wire::open(&damaged, key_of(&message), 1).is_err()
        };
        for a in 0..bits {
            for b in a..bits {
                assert!(refused(&[a, b][usize::from(a == b)..]), "{name}: bits {a}, {b}");
            }
        }
        for n in 0..20_000 {
            let flips: Vec<usize> = (0..3 + n % 3).map(|_| random() % bits).collect();
            assert!(refused(&flips), "{name}: bits {flips:?}");
        }
    }
}
