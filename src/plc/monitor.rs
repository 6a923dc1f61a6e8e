//! What crosses a link, in words: decodes the bytes that a [`crate::plc::Tap`] sees. Read-only: nothing here can change what the link does.

use crate::plc::driver::Direction;
use crate::plc::modbus::crc_fits;
use firmware_bridge::cobs::{Cut, Deframer};
use firmware_bridge::wire::{self, Header, Hello, Key, Message};
use serde_json::{Map, Value, json};

/// Modbus bytes further apart than this are two frames, in ns.
const MODBUS_GAP_NS: u64 = 5_000_000;

/// One frame, decoded.
#[derive(Clone, Debug, PartialEq)]
pub struct Decoded {
    /// When its last byte crossed the port, on the clock of [`crate::frame::now_ns`].
    pub at_ns: u64,
    /// Which way.
    pub direction: Direction,
    /// What kind of frame, in the protocol's words.
    pub kind: &'static str,
    /// Whether its checksum is right; `None` when the key is not known, since the monitor came after the handshake.
    pub intact: Option<bool>,
    /// Its fields, in the order of the wire.
    pub fields: Map<String, Value>,
}

impl Decoded {
    /// For people: `     1.234567 <- trigger      part=5 encoder=100`. `start_ns` is where the time counts from.
    pub fn line(&self, start_ns: u64) -> String {
        let fields: Vec<String> = self
            .fields
            .iter()
            .map(|(name, value)| match value {
                Value::String(text) => format!("{name}={text}"),
                other => format!("{name}={other}"),
            })
            .collect();
        let seconds = self.at_ns.saturating_sub(start_ns) as f64 / 1e9;
        let mark = match self.intact {
            Some(true) => "",
            Some(false) => "  [damaged]",
            None => "  [unchecked]",
        };
        format!("{seconds:>12.6} {} {:<14} {}{mark}", arrow(self.direction), self.kind, fields.join(" "))
    }

    /// For scripts: one object with `t_us`, `direction` (`in` is towards us), `kind`, `intact`, and the fields.
    pub fn json(&self, start_ns: u64) -> Value {
        json!({
            "t_us": self.at_ns.saturating_sub(start_ns) / 1000,
            "direction": match self.direction { Direction::In => "in", Direction::Out => "out" },
            "kind": self.kind,
            "intact": self.intact,
            "fields": self.fields,
        })
    }
}

fn arrow(direction: Direction) -> &'static str {
    match direction {
        Direction::In => "<-",
        Direction::Out => "->",
    }
}

/// Decodes the native protocol, both directions.
pub struct BridgeMonitor {
    towards_us: Deframer,
    from_us: Deframer,
    hellos: [Option<Hello>; 2],
    session: Option<(Key, u8)>,
}

impl Default for BridgeMonitor {
    fn default() -> Self {
        Self { towards_us: Deframer::new(), from_us: Deframer::new(), hellos: [None; 2], session: None }
    }
}

impl BridgeMonitor {
    /// Bytes crossed the port; each frame that is complete with them is shown to `sink`.
    pub fn bytes(&mut self, direction: Direction, at_ns: u64, bytes: &[u8], sink: &mut impl FnMut(Decoded)) {
        for &byte in bytes {
            let deframer = match direction {
                Direction::In => &mut self.towards_us,
                Direction::Out => &mut self.from_us,
            };
            let mut body = [0; wire::MAX_BODY + 1];
            let len = match deframer.push(byte) {
                Cut::More => continue,
                Cut::Garbage => {
                    sink(Decoded { at_ns, direction, kind: "noise", intact: Some(false), fields: Map::new() });
                    continue;
                }
                Cut::Body(cut) => {
                    let len = cut.len().min(body.len());
                    body.iter_mut().zip(cut).for_each(|(to, from)| *to = *from);
                    len
                }
            };
            sink(self.body(direction, at_ns, body.get(..len).unwrap_or(&[])));
        }
    }

    fn body(&mut self, direction: Direction, at_ns: u64, body: &[u8]) -> Decoded {
        let opened = wire::open(body, Key::OPEN, wire::HANDSHAKE_VERSION).ok().filter(|(header, _)| Message::is_handshake(header.kind));
        let in_session = || self.session.and_then(|(key, version)| wire::open(body, key, version).ok());
        let (intact, read) = match opened.or_else(in_session) {
            Some(read) => (Some(true), Some(read)),
            None => (self.session.map(|_| false), wire::read_unchecked(body).ok()),
        };
        let Some((header, message)) = read else {
            let hex: String = body.iter().map(|byte| format!("{byte:02x}")).collect();
            let fields = Map::from_iter([("bytes".to_owned(), Value::String(hex))]);
            return Decoded { at_ns, direction, kind: "unreadable", intact: Some(false), fields };
        };
        if intact == Some(true) {
            self.follow(direction, &message);
        }
        let (kind, fields) = words(&header, &message);
        Decoded { at_ns, direction, kind, intact, fields }
    }

    /// Learn the session's key from the handshake.
    fn follow(&mut self, direction: Direction, message: &Message) {
        match message {
            Message::Hello(hello) => {
                let slot = match direction {
                    Direction::Out => self.hellos.first_mut(),
                    Direction::In => self.hellos.last_mut(),
                };
                if let Some(slot) = slot {
                    *slot = Some(*hello);
                }
            }
            Message::Parameters { host_nonce, board_nonce, parameters } => {
                if let [Some(ours), Some(theirs)] = self.hellos {
                    let version = ours.version_max.min(theirs.version_max);
                    self.session = Some((Key::session(version, ours.codename, *host_nonce, *board_nonce, parameters), version));
                }
            }
            _ => {}
        }
    }
}

/// A message's kind and fields.
fn words(header: &Header, message: &Message) -> (&'static str, Map<String, Value>) {
    let mut fields = Map::new();
    let mut put = |name: &str, value: Value| {
        fields.insert(name.to_owned(), value);
    };
    let debug = |value: &dyn std::fmt::Debug| Value::String(format!("{value:?}").to_lowercase());
    if header.number != 0 {
        put("number", header.number.into());
    }
    let kind = match *message {
        Message::Hello(h) => {
            put("nonce", h.nonce.into());
            put("answers", h.answers.into());
            put("versions", format!("{}..{}", h.version_min, h.version_max).into());
            put("codename", format!("{:#010x}", h.codename).into());
            put("build", format!("{}.{}.{}", h.build >> 16, h.build >> 8 & 0xff, h.build & 0xff).into());
            "hello"
        }
        Message::Parameters { parameters: p, .. } => {
            put("deadline_ms", p.deadline_ms.into());
            put("watchdog_ms", p.watchdog_ms.into());
            put("safe_state", debug(&p.safe_state));
            put("unit", debug(&p.gate.unit));
            put("distance", p.gate.distance.into());
            put("lead", p.gate.lead.into());
            put("duration", p.gate.duration.into());
            put("merge_gap", p.gate.merge_gap.into());
            "parameters"
        }
        Message::Refuse { field, ours, theirs, .. } => {
            put("field", field.name().into());
            put("ours", ours.into());
            put("theirs", theirs.into());
            "refuse"
        }
        Message::Agree => "agree",
        Message::Goodbye => "goodbye",
        Message::Trigger { part, encoder, time_us } => {
            put("part", part.into());
            put("encoder", encoder.into());
            put("time_us", time_us.into());
            "trigger"
        }
        Message::Verdict { part, decision, reason, score } => {
            put("part", part.into());
            put("decision", debug(&decision));
            put("reason", reason.into());
            put("score", if score.is_finite() { score.into() } else { Value::Null });
            "verdict"
        }
        Message::Acknowledge { of, reference, status } => {
            put("of", kind_name(of).into());
            put("reference", reference.into());
            put("status", debug(&status));
            "acknowledge"
        }
        Message::Heartbeat(h) => {
            let state = if header.source == wire::BOARD {
                wire::BoardState::from_wire(h.state).map(|state| debug(&state))
            } else {
                wire::HostState::from_wire(h.state).map(|state| debug(&state))
            };
            put("state", state.unwrap_or_else(|| h.state.into()));
            if h.faults != 0 {
                put("faults", crate::plc::bridge::fault_names(h.faults).into());
            }
            put("in_flight", h.in_flight.into());
            if let Some(c) = h.counters {
                for (name, value) in [
                    ("parts", c.parts),
                    ("accepted", c.accepted),
                    ("rejected", c.rejected),
                    ("missed", c.missed),
                    ("leaked", c.leaked),
                    ("bad_frames", c.bad_frames),
                    ("lost_frames", c.lost_frames),
                    ("safe_entries", c.safe_entries),
                ] {
                    put(name, value.into());
                }
            }
            "heartbeat"
        }
        Message::Fault { code, detail } => {
            put("code", debug(&code));
            put("detail", detail.into());
            "fault"
        }
        Message::Command { id, command } => {
            put("id", id.into());
            put("command", debug(&command));
            "command"
        }
        Message::Request { id, request } => {
            put("id", id.into());
            put("request", debug(&request));
            "request"
        }
    };
    (kind, fields)
}

fn kind_name(kind: u8) -> &'static str {
    match kind {
        wire::kind::TRIGGER => "trigger",
        wire::kind::VERDICT => "verdict",
        wire::kind::COMMAND => "command",
        wire::kind::REQUEST => "request",
        _ => "other",
    }
}

/// Decodes Modbus RTU, both directions.
#[derive(Default)]
pub struct ModbusMonitor {
    lines: [(Vec<u8>, u64); 2],
}

impl ModbusMonitor {
    /// Bytes crossed the port; each frame that is complete with them is shown to `sink`. What is left before a pause is shown as damaged.
    pub fn bytes(&mut self, direction: Direction, at_ns: u64, bytes: &[u8], sink: &mut impl FnMut(Decoded)) {
        let [inward, outward] = &mut self.lines;
        let (buffer, last_ns) = match direction {
            Direction::In => inward,
            Direction::Out => outward,
        };
        if !buffer.is_empty() && (at_ns.saturating_sub(*last_ns) > MODBUS_GAP_NS || buffer.len() > 256) {
            sink(modbus_words(direction, *last_ns, buffer, false));
            buffer.clear();
        }
        *last_ns = at_ns;
        buffer.extend_from_slice(bytes);
        if crc_fits(buffer) {
            sink(modbus_words(direction, at_ns, buffer, true));
            buffer.clear();
        }
    }
}

fn modbus_words(direction: Direction, at_ns: u64, frame: &[u8], intact: bool) -> Decoded {
    let byte = |at: usize| frame.get(at).copied().unwrap_or(0);
    let mut fields = Map::new();
    fields.insert("unit".into(), byte(0).into());
    let kind = match byte(1) {
        1 => "read coils",
        2 => "read inputs",
        3 => "read holding",
        4 => "read registers",
        5 => "write coil",
        6 => "write holding",
        15 => "write coils",
        16 => "write holdings",
        code if code & 0x80 != 0 => "exception",
        _ => "function",
    };
    fields.insert("function".into(), (byte(1) & 0x7f).into());
    let data = frame.get(2..frame.len().saturating_sub(2)).unwrap_or(&[]);
    if kind == "exception" {
        fields.insert("code".into(), byte(2).into());
    } else {
        let hex: Vec<String> = data.iter().map(|byte| format!("{byte:02x}")).collect();
        fields.insert("data".into(), hex.join(" ").into());
    }
    Decoded { at_ns, direction, kind, intact: Some(intact), fields }
}

#[cfg(test)]
mod tests {
    use super::*;
    use firmware_bridge::board::{Board, BoardConfig};
    use firmware_bridge::host::{HostConfig, HostEvent, HostSession};
    use firmware_bridge::parameters::Expected;
    use proptest::prelude::*;

    #[test]
    fn a_whole_session_is_followed_and_checked() {
        let config = BoardConfig::default();
        let expected =
            Expected { deadline_ms: config.parameters.deadline_ms, watchdog_ms: config.parameters.watchdog_ms, ..Expected::default() };
        let mut board = Board::new(config, 1, 0).unwrap();
        let mut host = HostSession::new(HostConfig { codename: config.codename, expected, ..HostConfig::default() }, 2, 0);
        let mut monitor = BridgeMonitor::default();
        let mut seen: Vec<Decoded> = Vec::new();
        let mut part = None;
        for now in (0..2_000_000u64).step_by(1_000) {
            let said = host.output().to_vec();
            host.consume(said.len());
            monitor.bytes(Direction::Out, now * 1000, &said, &mut |d| seen.push(d));
            board.on_bytes(now, &said, &mut |_| {});
            let said = board.output().to_vec();
            board.consume(said.len());
            monitor.bytes(Direction::In, now * 1000, &said, &mut |d| seen.push(d));
            host.on_bytes(now, &said, &mut |event| {
                if let HostEvent::Trigger(t) = event {
                    part = Some(t.part);
                }
            });
            if now == 500_000 {
                board.on_trigger(now, 42);
            }
            if let Some(part) = part.take() {
                host.verdict(now, part, wire::Decision::Reject, 1, 0.5).unwrap();
            }
            host.poll(now, &mut |_| {});
            board.poll(now, 0, &mut |_| {});
        }
        assert!(seen.iter().all(|d| d.intact == Some(true)), "{:?}", seen.iter().find(|d| d.intact != Some(true)));
        for kind in ["hello", "parameters", "agree", "heartbeat", "trigger", "verdict", "acknowledge"] {
            assert!(seen.iter().any(|d| d.kind == kind), "{kind}");
        }
        let verdict = seen.iter().find(|d| d.kind == "verdict").unwrap();
        assert_eq!(verdict.direction, Direction::Out);
        assert_eq!(verdict.fields["decision"], "reject");
        assert!(verdict.line(0).contains("-> verdict"), "{}", verdict.line(0));
        assert_eq!(verdict.json(0)["fields"]["part"], verdict.fields["part"]);
        // A monitor that came late reads on, and says that it cannot check.
        let mut late = BridgeMonitor::default();
        host.set_state(2_000_000, wire::HostState::Running);
        host.poll(2_000_000, &mut |_| {});
        let mut frames = Vec::new();
        late.bytes(Direction::Out, 0, host.output(), &mut |d| frames.push(d));
        assert_eq!(frames.first().map(|d| (d.kind, d.intact)), Some(("heartbeat", None)));
    }

    #[test]
    fn modbus_frames_are_cut_by_their_checksum() {
        let mut monitor = ModbusMonitor::default();
        let mut seen = Vec::new();
        let frame = [0x11, 0x03, 0x00, 0x6b, 0x00, 0x03, 0x76, 0x87];
        monitor.bytes(Direction::Out, 0, &frame[..3], &mut |d| seen.push(d));
        monitor.bytes(Direction::Out, 1_000_000, &frame[3..], &mut |d| seen.push(d));
        monitor.bytes(Direction::In, 2_000_000, &[0x11, 0x83], &mut |d| seen.push(d));
        monitor.bytes(Direction::In, 90_000_000, &frame, &mut |d| seen.push(d));
        let kinds: Vec<_> = seen.iter().map(|d| (d.kind, d.intact)).collect();
        assert_eq!(kinds, [("read holding", Some(true)), ("exception", Some(false)), ("read holding", Some(true))]);
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(chunks in proptest::collection::vec((any::<bool>(), proptest::collection::vec(any::<u8>(), 0..200)), 0..10)) {
            let (mut bridge, mut modbus) = (BridgeMonitor::default(), ModbusMonitor::default());
            for (at, (inward, bytes)) in chunks.iter().enumerate() {
                let direction = if *inward { Direction::In } else { Direction::Out };
                bridge.bytes(direction, at as u64 * 1_000_000, bytes, &mut |d| { d.line(0); d.json(0); });
                modbus.bytes(direction, at as u64 * 1_000_000, bytes, &mut |d| { d.line(0); d.json(0); });
            }
        }
    }
}
