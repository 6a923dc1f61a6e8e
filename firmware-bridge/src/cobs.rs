//! Consistent Overhead Byte Stuffing (Cheshire and Baker 1999): a frame holds no zero byte, so zero marks its ends.
//!
//! On the wire a frame is `00 COBS(body) 00`. The leading zero costs one byte and buys that noise between two frames, or the loss of one end
//! mark, never takes a second frame with it.

use crate::wire::MAX_BODY;

/// Longest encoded body: one code byte in front, since a body is shorter than 254 bytes.
pub const MAX_ENCODED: usize = MAX_BODY.saturating_add(1);
/// Longest frame on the wire, both end marks included.
pub const MAX_WIRE: usize = MAX_ENCODED.saturating_add(2);

const _: () = assert!(MAX_BODY < 254, "one code byte must do for any body");

/// Encode `body` (at most [`MAX_BODY`] bytes) between two zero bytes into `out`; returns the length, or `None` when the body or the frame is too
/// long.
pub fn encode(body: &[u8], out: &mut [u8]) -> Option<usize> {
    if body.len() > MAX_BODY {
        return None;
    }
    *out.get_mut(0)? = 0;
    // Where the code byte of the running group goes, and the code so far.
    let (mut code_at, mut code) = (1usize, 1u8);
    let mut at = 2usize;
    for &byte in body {
        if byte == 0 {
            *out.get_mut(code_at)? = code;
            (code_at, code) = (at, 1);
        } else {
            *out.get_mut(at)? = byte;
            code = code.wrapping_add(1);
        }
        at = at.wrapping_add(1);
    }
    *out.get_mut(code_at)? = code;
    *out.get_mut(at)? = 0;
    Some(at.wrapping_add(1))
}

/// Decode one group sequence (no zeros, no end marks) in place; returns the body's length, or `None` when the codes do not add up.
fn decode_in_place(buffer: &mut [u8]) -> Option<usize> {
    let (mut read, mut write) = (0usize, 0usize);
    while read < buffer.len() {
        let code = *buffer.get(read)?;
        // A body below 254 bytes never has a full group; 0xFF can only be damage.
        if code == 0 || code == 0xFF {
            return None;
        }
        read = read.wrapping_add(1);
        for _ in 1..code {
            let byte = *buffer.get(read)?;
            *buffer.get_mut(write)? = byte;
            read = read.wrapping_add(1);
            write = write.wrapping_add(1);
        }
        if read < buffer.len() {
            *buffer.get_mut(write)? = 0;
            write = write.wrapping_add(1);
        }
    }
    Some(write)
}

/// Cuts a byte stream into bodies. Damage never lasts beyond the next zero byte.
#[derive(Clone, Debug)]
pub struct Deframer {
    buffer: [u8; MAX_ENCODED],
    len: usize,
    /// Too many bytes without a zero: drop everything up to the next one.
    too_long: bool,
}

impl Default for Deframer {
    fn default() -> Self {
        Self::new()
    }
}

/// What [`Deframer::push`] found at the end of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut<'a> {
    /// The frame goes on.
    More,
    /// A body, not checked in any way.
    Body(&'a [u8]),
    /// Something that was no frame: too long, or not COBS.
    Garbage,
}

impl Deframer {
    /// At a frame boundary.
    pub const fn new() -> Self {
        Self { buffer: [0; MAX_ENCODED], len: 0, too_long: false }
    }

    /// Take one byte from the wire.
    pub fn push(&mut self, byte: u8) -> Cut<'_> {
        if byte != 0 {
            match self.buffer.get_mut(self.len) {
                Some(slot) => {
                    *slot = byte;
                    self.len = self.len.wrapping_add(1);
                }
                None => self.too_long = true,
            }
            return Cut::More;
        }
        let (len, too_long) = (self.len, self.too_long);
        (self.len, self.too_long) = (0, false);
        if len == 0 {
            return Cut::More; // two end marks in a row
        }
        if too_long {
            return Cut::Garbage;
        }
        match self.buffer.get_mut(..len).and_then(decode_in_place) {
            Some(body) => self.buffer.get(..body).map_or(Cut::Garbage, Cut::Body),
            None => Cut::Garbage,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::vec::Vec;

    fn bodies(deframer: &mut Deframer, bytes: &[u8]) -> Vec<Vec<u8>> {
        bytes.iter().filter_map(|&b| if let Cut::Body(body) = deframer.push(b) { Some(body.to_vec()) } else { None }).collect()
    }

    proptest! {
        #[test]
        fn agrees_with_the_cobs_crate(body in prop::collection::vec(prop_oneof![Just(0u8), any::<u8>()], 1..=MAX_BODY)) {
            let mut ours = [0; MAX_WIRE];
            let n = encode(&body, &mut ours).unwrap();
            let mut theirs = [0; MAX_WIRE];
            let m = cobs::encode(&body, &mut theirs);
            prop_assert_eq!(&ours[1..n - 1], &theirs[..m]);
            prop_assert_eq!(bodies(&mut Deframer::new(), &ours[..n]), [body]);
        }

        #[test]
        fn decoding_agrees_with_the_cobs_crate_on_anything(encoded in prop::collection::vec(1u8..=0xFE, 1..MAX_ENCODED)) {
            let mut ours = encoded.clone();
            let mut theirs = encoded.clone();
            let theirs = cobs::decode_in_place(&mut theirs).ok().map(|n| theirs[..n].to_vec());
            let ours = decode_in_place(&mut ours).map(|n| ours[..n].to_vec());
            // The crate takes a sequence that stops inside a group as an error too.
            prop_assert_eq!(ours, theirs);
        }

        #[test]
        fn damage_to_a_frame_costs_no_other_frame(
            noise in prop::collection::vec(any::<u8>(), 0..300),
            flip in 0usize..20, with in any::<u8>(),
            body in prop::collection::vec(any::<u8>(), 1..=MAX_BODY),
        ) {
            let mut frame = [0; MAX_WIRE];
            let n = encode(&body, &mut frame).unwrap();
            let mut deframer = Deframer::new();
            let mut damaged = frame[..n].to_vec();
            let at = flip % n;
            damaged[at] = with;
            for part in [&noise[..], &damaged] { bodies(&mut deframer, part); }
            let got = bodies(&mut deframer, &frame[..n]);
            prop_assert_eq!(got.last(), Some(&body));
        }
    }

    #[test]
    fn too_long_is_refused_and_forgotten() {
        assert_eq!(encode(&[1; MAX_BODY + 1], &mut [0; 200]), None);
        assert_eq!(encode(&[1; 10], &mut [0; 12]), None);
        let mut deframer = Deframer::new();
        for _ in 0..1000 {
            assert_eq!(deframer.push(7), Cut::More);
        }
        assert_eq!(deframer.push(0), Cut::Garbage);
        assert_eq!(bodies(&mut deframer, &[2, 9, 0]), [[9]]);
    }
}
