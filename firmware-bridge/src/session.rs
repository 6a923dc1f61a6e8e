//! What both ends of a link share: outgoing bytes, consecutive numbers, nonces.

use crate::Micros;
use crate::cobs;
use crate::wire::{self, Header, Key, MAX_BODY, Message, WireError};

/// A handshake that takes longer starts again with new nonces. A second is ten times what 9600 baud needs.
pub(crate) const HANDSHAKE_TIMEOUT_US: Micros = 1_000_000;

/// Bytes on their way to the port. Full means that the port is stuck: a frame that finds no room is not sent, and whoever needs it repeats it.
#[derive(Clone, Debug)]
pub(crate) struct Outbox<const N: usize> {
    buffer: [u8; N],
    start: usize,
    end: usize,
}

impl<const N: usize> Outbox<N> {
    pub(crate) const fn new() -> Self {
        Self { buffer: [0; N], start: 0, end: 0 }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        self.buffer.get(self.start..self.end).unwrap_or(&[])
    }

    pub(crate) fn consume(&mut self, n: usize) {
        self.start = self.start.saturating_add(n).min(self.end);
        if self.start == self.end {
            self.clear();
        }
    }

    pub(crate) fn clear(&mut self) {
        (self.start, self.end) = (0, 0);
    }

    /// All or nothing.
    fn push(&mut self, frame: &[u8]) -> bool {
        if N.saturating_sub(self.end) < frame.len() && self.start > 0 {
            // Move what is left to the front.
            let len = self.end.saturating_sub(self.start);
            for at in 0..len {
                let byte = self.buffer.get(self.start.wrapping_add(at)).copied().unwrap_or(0);
                if let Some(slot) = self.buffer.get_mut(at) {
                    *slot = byte;
                }
            }
            (self.start, self.end) = (0, len);
        }
        let end = self.end.saturating_add(frame.len());
        match self.buffer.get_mut(self.end..end) {
            Some(room) => {
                room.iter_mut().zip(frame).for_each(|(slot, byte)| *slot = *byte);
                self.end = end;
                true
            }
            None => false,
        }
    }

    /// Frame `message`; `false` when there is no room.
    fn send(&mut self, header: Header, message: &Message, key: Key) -> bool {
        let mut body = [0; MAX_BODY];
        let len = wire::seal(header, message, key, &mut body);
        let mut frame = [0; cobs::MAX_WIRE];
        body.get(..len)
            .and_then(|body| cobs::encode(body, &mut frame))
            .and_then(|len| frame.get(..len))
            .is_some_and(|frame| self.push(frame))
    }

    /// Send a handshake message.
    pub(crate) fn send_open(&mut self, source: u8, destination: u8, message: &Message) -> bool {
        let header = Header { version: wire::HANDSHAKE_VERSION, kind: message.kind(), source, destination, number: 0 };
        self.send(header, message, Key::OPEN)
    }
}

/// One session's key and consecutive numbers, both directions.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Channel {
    key: Key,
    version: u8,
    sent: u16,
    received: u16,
}

/// A number up to this much ahead of the last one is new (the ones between are lost); everything else is a repetition or came late.
const MAX_AHEAD: u16 = 0x7FFF;

/// Why a received frame is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// Not a frame of this session.
    Wire(WireError),
    /// Its number is not ahead of the last one.
    Number,
}

impl Channel {
    pub(crate) fn new(key: Key, version: u8) -> Self {
        Self { key, version, sent: 0, received: 0 }
    }

    /// Send under the session key; `false` when there is no room (the number is then not used up).
    pub(crate) fn send<const N: usize>(&mut self, outbox: &mut Outbox<N>, source: u8, destination: u8, message: &Message) -> bool {
        let number = self.sent.wrapping_add(1);
        let header = Header { version: self.version, kind: message.kind(), source, destination, number };
        let sent = outbox.send(header, message, self.key);
        if sent {
            self.sent = number;
        }
        sent
    }

    /// Check a body; on success also says how many frames were lost before it.
    pub(crate) fn receive(&mut self, body: &[u8]) -> Result<(Message, u32), Refusal> {
        let (header, message) = wire::open(body, self.key, self.version).map_err(Refusal::Wire)?;
        let ahead = header.number.wrapping_sub(self.received);
        if ahead == 0 || ahead > MAX_AHEAD {
            return Err(Refusal::Number);
        }
        self.received = header.number;
        Ok((message, u32::from(ahead.wrapping_sub(1))))
    }
}

/// Highest version that both ranges hold.
pub(crate) fn common_version(ours: (u8, u8), theirs: (u8, u8)) -> Option<u8> {
    let version = ours.1.min(theirs.1);
    (version >= ours.0.max(theirs.0)).then_some(version)
}

/// Successive nonces from a seed (SplitMix64). They need not be secret, only new: a session of another run must not have the same two.
#[derive(Clone, Debug)]
pub(crate) struct Nonces(u64);

impl Nonces {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Never 0, which means "answers nothing".
    pub(crate) fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) as u32).max(1)
    }
}

/// How long ago a stamp of our own clock was made, by its low 32 bits.
pub(crate) fn age_of(now: Micros, stamp: u32) -> Micros {
    Micros::from((now as u32).wrapping_sub(stamp))
}

/// `now - then`, 0 if the clock was handed in backwards.
pub(crate) fn since(now: Micros, then: Micros) -> Micros {
    now.saturating_sub(then)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parameters::Parameters;

    #[test]
    fn outbox_is_all_or_nothing_and_keeps_order() {
        let mut outbox = Outbox::<8>::new();
        assert!(outbox.push(&[1, 2, 3, 4, 5]));
        assert!(!outbox.push(&[6, 7, 8, 9]));
        outbox.consume(2);
        assert!(outbox.push(&[6, 7, 8, 9]));
        assert_eq!(outbox.bytes(), [3, 4, 5, 6, 7, 8, 9]);
        outbox.consume(100);
        assert_eq!(outbox.bytes(), []);
        assert!(outbox.push(&[1; 8]));
    }

    #[test]
    fn numbers_count_losses_and_refuse_repetition() {
        let key = Key::session(1, 2, 3, 4, &Parameters::default());
        let (mut tx, mut rx) = (Channel::new(key, 1), Channel::new(key, 1));
        let mut bodies = std::vec::Vec::new();
        for _ in 0..70_000 {
            let mut outbox = Outbox::<100>::new();
            assert!(tx.send(&mut outbox, 1, 2, &Message::Agree));
            let mut deframer = cobs::Deframer::new();
            for &byte in outbox.bytes() {
                if let cobs::Cut::Body(body) = deframer.push(byte) {
                    bodies.push(body.to_vec());
                }
            }
        }
        assert_eq!(rx.receive(&bodies[0]), Ok((Message::Agree, 0)));
        assert_eq!(rx.receive(&bodies[0]), Err(Refusal::Number));
        assert_eq!(rx.receive(&bodies[3]), Ok((Message::Agree, 2)));
        assert_eq!(rx.receive(&bodies[1]), Err(Refusal::Number));
        // Through the wrap of the 16 bits.
        for body in &bodies[4..] {
            assert_eq!(rx.receive(body), Ok((Message::Agree, 0)));
        }
        let mut other = Channel::new(Key::session(1, 2, 3, 5, &Parameters::default()), 1);
        assert_eq!(other.receive(&bodies[0]), Err(Refusal::Wire(WireError::Crc)));
    }

    #[test]
    fn versions_meet_or_do_not() {
        assert_eq!(common_version((1, 3), (2, 5)), Some(3));
        assert_eq!(common_version((1, 1), (1, 9)), Some(1));
        assert_eq!(common_version((1, 1), (2, 2)), None);
    }
}
