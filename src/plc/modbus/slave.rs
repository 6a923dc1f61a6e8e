//! The slave role: the PLC polls us.

use crate::config::ModbusConfig;
use crate::frame::PartId;
use crate::plc::driver::{Io, Machine};
use crate::plc::modbus::map::{self, Ledger, Registers, Taken, coil, discrete, holding, input};
use crate::plc::modbus::{Incoming, MAX_FRAME, crc_fits, silence_ns};
use crate::plc::stats::add;
use crate::plc::{HostState, LinkState, PlcCommand, PlcEvent};
use crate::source::Trigger;
use crate::verdict::Verdict;
use rmodbus::consts::{ModbusErrorCode, ModbusFunction};
use rmodbus::server::{ModbusFrame, Write};
use rmodbus::{ModbusProto, guess_request_frame_len};
use std::sync::atomic::Ordering;

/// A PLC that asks for nothing for this long counts as gone. A PLC that inspects parts polls many times a second.
const SILENT_NS: u64 = 2_000_000_000;
/// Broadcasts are obeyed and not answered.
const BROADCAST: u8 = 0;

/// The machine behind the port.
pub(super) struct Slave {
    unit: u8,
    port: String,
    deadline_ns: u64,
    turnaround_ns: u64,
    incoming: Incoming,
    ledger: Ledger,
    registers: Registers,
    /// The answer, and when it may go out: the standard wants 3.5 characters of silence between two frames.
    response: Vec<u8>,
    due_ns: Option<u64>,
    /// Moments of the verdicts that the answer carries for the first time.
    carried: Vec<(PartId, u64)>,
    last_request_ns: u64,
    up: bool,
    bad_frames: u64,
}

impl Slave {
    pub(super) fn new(config: &ModbusConfig) -> Self {
        let settings = super::port_settings(config);
        Self {
            unit: config.unit,
            port: config.port.display().to_string(),
            deadline_ns: u64::from(config.deadline_ms) * 1_000_000,
            turnaround_ns: silence_ns(&settings),
            incoming: Incoming::new(&settings),
            ledger: Ledger::default(),
            registers: Registers::new(),
            response: Vec::with_capacity(MAX_FRAME),
            due_ns: None,
            carried: Vec::with_capacity(map::SLOTS),
            last_request_ns: 0,
            up: false,
            bad_frames: 0,
        }
    }

    /// Take complete frames off the front of what has come.
    fn take_frames(&mut self, now_ns: u64, io: &mut Io<'_>) {
        while !self.incoming.broken {
            let Ok(len) = guess_request_frame_len(self.incoming.frame(), ModbusProto::Rtu) else {
                // Too short to tell, or no length that a request can have; the silence after it decides.
                return;
            };
            let mut frame = [0u8; MAX_FRAME];
            let len = usize::from(len);
            let (Some(copy), Some(source)) = (frame.get_mut(..len), self.incoming.frame().get(..len)) else { return };
            copy.copy_from_slice(source);
            if !crc_fits(copy) {
                // Damaged, a slave's answer on a shared line, or a function of another length.
                self.incoming.broken = true;
                return;
            }
            self.incoming.take(len);
            self.request(frame.get(..len).unwrap_or(&[]), now_ns, io);
        }
    }

    /// The line has gone silent on something that is no request of a known length.
    fn end_of_silence(&mut self, now_ns: u64, io: &mut Io<'_>) {
        let mut frame = [0u8; MAX_FRAME];
        let len = self.incoming.len;
        if let (Some(copy), Some(source)) = (frame.get_mut(..len), self.incoming.frame().get(..len)) {
            copy.copy_from_slice(source);
        }
        self.incoming.clear();
        let frame = frame.get(..len).unwrap_or(&[]);
        if crc_fits(frame) {
            self.request(frame, now_ns, io); // a function we do not have, with a length of its own
        } else {
            self.bad_frames += 1;
            io.stats.counts().bad_frames.store(self.bad_frames, Ordering::Relaxed);
        }
    }

    /// A frame with a good CRC.
    fn request(&mut self, frame: &[u8], now_ns: u64, io: &mut Io<'_>) {
        let to = frame.first().copied();
        if to != Some(self.unit) && to != Some(BROADCAST) {
            return; // another slave's
        }
        if !has_shape_of_a_request(frame) {
            self.bad_frames += 1;
            io.stats.counts().bad_frames.store(self.bad_frames, Ordering::Relaxed);
            return;
        }
        self.ledger.expire(now_ns, |_| {});
        self.ledger.fill(now_ns, &mut self.registers);
        self.due_ns = None; // the PLC gave up on the last one
        self.carried.clear();
        let Self { unit, registers, response, ledger, carried, deadline_ns, .. } = self;
        let mut request = ModbusFrame::new(*unit, frame, ModbusProto::Rtu, response);
        if let Err(error) = request.parse() {
            log::debug!("Modbus {}: request not understood: {error}", self.port);
            return;
        }
        if request.processing_required {
            let done = if request.count == 0 {
                request.error = Some(ModbusErrorCode::IllegalDataValue);
                Ok(())
            } else if request.readonly {
                let read = request.process_read(registers);
                if read.is_ok() && request.error.is_none() {
                    note_told(ledger, &request.func, request.reg, request.count, carried);
                }
                read
            } else {
                let lengths = bulk_length_fits(frame);
                match request.get_external_write() {
                    Ok(write) if lengths => {
                        let result = apply(&write, registers, ledger, *deadline_ns, now_ns, io);
                        request.process_external_write(result.map_err(|()| rmodbus::ErrorKind::IllegalDataAddress))
                    }
                    Ok(_) => {
                        request.error = Some(ModbusErrorCode::IllegalDataValue);
                        Ok(())
                    }
                    Err(error) if error.is_modbus_error() => Ok(()), // the codec has noted which
                    Err(error) => Err(error),
                }
            };
            if let Err(error) = done {
                log::debug!("Modbus {}: request not processed: {error}", self.port);
                return;
            }
        }
        if request.response_required {
            match request.finalize_response() {
                Ok(()) => self.due_ns = Some(now_ns.saturating_add(self.turnaround_ns)),
                Err(error) => log::debug!("Modbus {}: no answer possible: {error}", self.port),
            }
        }
        self.last_request_ns = now_ns;
        if !self.up {
            self.up = true;
            log::info!("Modbus {}: the PLC polls us as unit {}", self.port, self.unit);
            io.events.link(LinkState::Up);
        }
    }
}

/// Whether a frame with a good CRC is as long as its function says, and no answer: the codec relies on both (of a function from 0x80 it makes an
/// exception by adding 0x80, and it reads as many bytes as a bulk write claims to have).
fn has_shape_of_a_request(frame: &[u8]) -> bool {
    match frame.get(1) {
        None | Some(0 | 0x80..) => false,
        Some(1..=6) => frame.len() == 8,
        Some(15 | 16) => frame.get(6).is_some_and(|bytes| frame.len() == 9 + usize::from(*bytes)),
        // A function we do not have: it gets its exception.
        Some(_) => true,
    }
}

/// Whether a bulk write carries as many bytes as its count needs; other frames always fit.
fn bulk_length_fits(frame: &[u8]) -> bool {
    let byte = |at: usize| frame.get(at).copied().map_or(0, usize::from);
    let count = byte(4) << 8 | byte(5);
    match byte(1) {
        15 => byte(6) == count.div_ceil(8),
        16 => byte(6) == count * 2,
        _ => true,
    }
}

/// The PLC reads results: note which verdicts it learns.
fn note_told(ledger: &mut Ledger, function: &ModbusFunction, address: u16, count: u16, carried: &mut Vec<(PartId, u64)>) {
    let range = usize::from(address)..usize::from(address) + usize::from(count);
    let (slots, last) = match function {
        ModbusFunction::GetInputs => (input::SLOTS, [input::LAST_PART + 1, input::LAST_RESULT]),
        ModbusFunction::GetDiscretes => (discrete::SLOTS, [discrete::LAST_OK, discrete::LAST_OK]),
        ModbusFunction::GetCoils
        | ModbusFunction::GetHoldings
        | ModbusFunction::SetCoil
        | ModbusFunction::SetHolding
        | ModbusFunction::SetCoilsBulk
        | ModbusFunction::SetHoldingsBulk => return,
    };
    let last_slot = ledger.last_slot().filter(|_| last.iter().all(|address| range.contains(address)));
    let read = (0..map::SLOTS).filter(|slot| range.contains(&(slots + slot)));
    for slot in read.chain(last_slot) {
        if let Some(part) = ledger.tell(slot) {
            carried.push((part.part, part.decided_ns));
        }
    }
}

/// The PLC writes coils or holding registers.
fn apply(
    write: &Write<'_>,
    registers: &mut Registers,
    ledger: &mut Ledger,
    deadline_ns: u64,
    now_ns: u64,
    io: &mut Io<'_>,
) -> Result<(), ()> {
    match write {
        Write::Bits(bits) => {
            let (start, count) = (usize::from(bits.address), usize::from(bits.count));
            let cells = registers.coils.get_mut(start..start + count).ok_or(())?;
            let mut risen = [false; coil::COUNT];
            for (at, cell) in cells.iter_mut().enumerate() {
                let on = bits.data.get(at / 8).is_some_and(|byte| byte >> (at % 8) & 1 != 0);
                if let Some(rise) = risen.get_mut(start + at) {
                    *rise = on && !*cell;
                }
                *cell = on;
            }
            let rose = |coil: usize| risen.get(coil).copied().unwrap_or(false);
            for (coil, command) in [
                (coil::START, PlcCommand::Start),
                (coil::STOP, PlcCommand::Stop),
                (coil::PAUSE, PlcCommand::Pause),
                (coil::GOLDEN, PlcCommand::GoldenCheck),
            ] {
                if rose(coil) {
                    io.events.put(PlcEvent::Command(command), io.stats);
                }
            }
            if rose(coil::RESET) {
                ledger.reset_counters();
            }
            if rose(coil::TRIGGER) {
                let part = map::u32_from(&registers.holdings, holding::PART).wrapping_add(1);
                registers.holdings[holding::PART] = (part >> 16) as u16;
                registers.holdings[holding::PART + 1] = part as u16;
                announce(registers, ledger, deadline_ns, now_ns, io);
            }
        }
        Write::Words(words) => {
            let (start, count) = (usize::from(words.address), usize::from(words.count));
            let old = registers.holdings;
            let cells = registers.holdings.get_mut(start..start + count).ok_or(())?;
            for (cell, bytes) in cells.iter_mut().zip(words.data.chunks_exact(2)) {
                *cell = bytes.iter().fold(0, |word, &byte| word << 8 | u16::from(byte));
            }
            let new = registers.holdings;
            if new[holding::MODE] != old[holding::MODE]
                && let Some(command) = super::mode_command(new[holding::MODE])
            {
                io.events.put(PlcEvent::Command(command), io.stats);
            }
            if new[holding::RECIPE] != old[holding::RECIPE] {
                io.events.put(PlcEvent::Command(PlcCommand::Recipe(new[holding::RECIPE])), io.stats);
            }
            // 0 announces nothing: a PLC that starts anew writes it.
            if new[holding::TRIGGER] != old[holding::TRIGGER] && new[holding::TRIGGER] != 0 {
                announce(registers, ledger, deadline_ns, now_ns, io);
            }
        }
    }
    Ok(())
}

/// The part whose number is in the holding registers passed the sensor.
fn announce(registers: &Registers, ledger: &mut Ledger, deadline_ns: u64, now_ns: u64, io: &mut Io<'_>) {
    let part = PartId(map::u32_from(&registers.holdings, holding::PART));
    let deadline_ns = now_ns.saturating_add(deadline_ns);
    ledger.trigger(part, now_ns, deadline_ns);
    let encoder_ticks = map::u32_from(&registers.holdings, holding::ENCODER);
    io.events.put(PlcEvent::Trigger(Trigger { part, received_ns: now_ns, deadline_ns, encoder_ticks }), io.stats);
}

impl Machine for Slave {
    fn opened(&mut self, _now_ns: u64, io: &mut Io<'_>) {
        self.incoming.clear();
        self.due_ns = None;
        self.up = false;
        io.events.link(LinkState::Connecting);
    }

    fn closed(&mut self) {
        self.up = false;
        self.due_ns = None;
    }

    fn verdict(&mut self, part: PartId, verdict: &Verdict, decided_ns: u64, now_ns: u64, io: &mut Io<'_>) -> bool {
        match self.ledger.verdict(part, verdict, decided_ns, now_ns) {
            Taken::Yes => true,
            Taken::Late => {
                add(&io.stats.counts().late, 1);
                true
            }
            Taken::UnknownPart => false,
        }
    }

    fn host_state(&mut self, state: HostState, _now_ns: u64) {
        self.ledger.host = state;
    }

    fn received(&mut self, bytes: &[u8], now_ns: u64, io: &mut Io<'_>) {
        if self.incoming.quiet_at_ns().is_some_and(|at| now_ns >= at) {
            self.end_of_silence(now_ns, io);
        }
        self.incoming.push(bytes, now_ns);
        self.take_frames(now_ns, io);
    }

    fn tick(&mut self, now_ns: u64, io: &mut Io<'_>) -> u64 {
        if self.incoming.quiet_at_ns().is_some_and(|at| now_ns >= at) {
            self.end_of_silence(now_ns, io);
        }
        if self.due_ns.is_some_and(|due| now_ns >= due) && io.tx.room() >= self.response.len() {
            self.due_ns = None;
            io.tx.push(&self.response);
            for (part, decided_ns) in self.carried.drain(..) {
                io.tx.mark_verdict(decided_ns);
                io.stats.verdict_to_ack(now_ns.saturating_sub(decided_ns));
                io.events.put(PlcEvent::Acknowledged { part, received_ns: now_ns }, io.stats);
            }
        }
        self.ledger.expire(now_ns, |_| {});
        if self.up && now_ns.saturating_sub(self.last_request_ns) > SILENT_NS {
            self.up = false;
            log::warn!("Modbus {}: the PLC has asked for nothing for {} s", self.port, SILENT_NS / 1_000_000_000);
            io.events.link(LinkState::Down);
        }
        let soon = [self.due_ns, self.incoming.quiet_at_ns(), self.ledger.next_deadline_ns()];
        soon.into_iter().flatten().min().unwrap_or(u64::MAX)
    }

    fn closing(&mut self, now_ns: u64, _io: &mut Io<'_>) {
        // A slave does not speak unasked; the PLC sees it go silent. What it still reads must not say that we inspect.
        let _ = now_ns;
        self.ledger.host = HostState::Stopped;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{ModbusRole, Parity};
    use crate::plc::driver::rig::Rig;
    use crate::verdict::{Policy, Reason, decide, without_score};
    use proptest::prelude::*;
    use rmodbus::client::ModbusRequest;

    fn config() -> ModbusConfig {
        ModbusConfig {
            port: "fake".into(),
            baud: 115_200,
            role: ModbusRole::Slave,
            unit: 5,
            parity: Parity::Even,
            stop_bits: 1,
            deadline_ms: 100,
        }
    }

    fn rig() -> Rig<Slave> {
        Rig::new(Slave::new(&config()))
    }

    fn made(make: impl FnOnce(&mut ModbusRequest, &mut Vec<u8>) -> Result<(), rmodbus::ErrorKind>) -> (ModbusRequest, Vec<u8>) {
        let mut request = ModbusRequest::new(5, ModbusProto::Rtu);
        let mut frame = Vec::new();
        make(&mut request, &mut frame).unwrap();
        (request, frame)
    }

    const ANSWER_NS: u64 = 20_000_000;

    fn write(rig: &mut Rig<Slave>, address: u16, words: &[u16]) {
        let (request, frame) = made(|r, f| r.generate_set_holdings_bulk(address, words, f));
        rig.receive(&frame);
        let answer = rig.run(ANSWER_NS);
        request.parse_ok(&answer).unwrap();
    }

    fn read(rig: &mut Rig<Slave>, address: u16, count: u16) -> Vec<u16> {
        let (request, frame) = made(|r, f| r.generate_get_inputs(address, count, f));
        rig.receive(&frame);
        let answer = rig.run(ANSWER_NS);
        let mut words = Vec::new();
        request.parse_u16(&answer, &mut words).unwrap();
        assert_eq!(words.len(), usize::from(count));
        words
    }

    fn accept() -> Verdict {
        decide(&Policy { false_reject_rate: 0.005 }, 1.0, 0.5)
    }

    #[test]
    fn a_part_is_announced_judged_read_and_acknowledged() {
        let mut rig = rig();
        write(&mut rig, 0, &[0, 9, 1, 0, 77]);
        let events = rig.events();
        assert!(events.contains(&PlcEvent::Link(LinkState::Up)), "{events:?}");
        let trigger = events.iter().find_map(|e| if let PlcEvent::Trigger(t) = e { Some(*t) } else { None }).unwrap();
        assert_eq!((trigger.part, trigger.encoder_ticks, trigger.deadline_ns - trigger.received_ns), (PartId(9), 77, 100_000_000));
        assert_eq!(read(&mut rig, 64 + 9, 1), [9 << 8]);
        assert!(rig.verdict(PartId(9), &accept()));
        assert_eq!(read(&mut rig, 64 + 9, 1), [9 << 8 | 1]);
        let acks = rig.events().iter().filter(|e| matches!(e, PlcEvent::Acknowledged { part: PartId(9), .. })).count();
        assert_eq!(acks, 1);
        assert_eq!(read(&mut rig, 2, 3), [0, 9, 1]);
        assert!(rig.events().is_empty(), "acknowledged once");
        let summary = rig.stats.summary();
        assert_eq!((summary.verdicts_sent, summary.acknowledged), (1, 1));
        assert!(!rig.verdict(PartId(10), &accept()), "a part that nobody announced");
    }

    #[test]
    fn a_trigger_without_a_verdict_reads_as_ng_and_stays_so() {
        let mut rig = rig();
        write(&mut rig, 0, &[1, 2, 1]);
        let part = 1 << 16 | 2;
        rig.run(100_000_000);
        assert_eq!(read(&mut rig, 64 + 2, 1), [2 << 8 | 5]);
        assert!(rig.verdict(PartId(part), &accept()));
        assert_eq!(read(&mut rig, 64 + 2, 1), [2 << 8 | 5], "an accept after the deadline changes nothing");
        assert_eq!(rig.stats.summary().late, 1);
        assert_eq!(read(&mut rig, 8, 8), [0, 1, 0, 0, 0, 1, 0, 1]);
    }

    #[test]
    fn cyclic_writes_of_the_same_values_act_once_and_zero_announces_nothing() {
        let mut rig = rig();
        for _ in 0..5 {
            write(&mut rig, 0, &[0, 1, 7, 0, 0, 3, 2]);
        }
        write(&mut rig, 0, &[0, 1, 0, 0, 0, 3, 2]);
        let events = rig.events();
        assert_eq!(events.iter().filter(|e| matches!(e, PlcEvent::Trigger(_))).count(), 1);
        let commands: Vec<_> = events.iter().filter_map(|e| if let PlcEvent::Command(c) = e { Some(*c) } else { None }).collect();
        assert_eq!(commands, [PlcCommand::Stop, PlcCommand::Recipe(3)]);
    }

    #[test]
    fn coils_act_on_their_rising_edge() {
        let mut rig = rig();
        for on in [true, true, false, true] {
            let (request, frame) = made(|r, f| r.generate_set_coil(0, on, f));
            rig.receive(&frame);
            request.parse_ok(&rig.run(ANSWER_NS)).unwrap();
        }
        let parts: Vec<_> = rig.events().iter().filter_map(|e| if let PlcEvent::Trigger(t) = e { Some(t.part.0) } else { None }).collect();
        assert_eq!(parts, [1, 2]);
        let (_, frame) = made(|r, f| r.generate_set_coils_bulk(1, &[true, true, true, true], f));
        rig.receive(&frame);
        rig.run(ANSWER_NS);
        let commands: Vec<_> = rig.events().iter().filter_map(|e| if let PlcEvent::Command(c) = e { Some(*c) } else { None }).collect();
        assert_eq!(commands, [PlcCommand::Start, PlcCommand::Stop, PlcCommand::Pause, PlcCommand::GoldenCheck]);
    }

    #[test]
    fn what_is_not_there_is_an_exception_and_another_unit_is_silence() {
        let mut rig = rig();
        for (address, count, code) in [(128u16, 1u16, 2u8), (127, 2, 2), (0, 0, 3), (0, 126, 3)] {
            let (_, frame) = made(|r, f| r.generate_get_inputs(address, count, f));
            rig.receive(&frame);
            let answer = rig.run(ANSWER_NS);
            assert_eq!(answer.get(..3), Some(&[5, 0x84, code][..]), "{address} {count}");
        }
        // A function with a length of its own is answered after the silence: 17, report slave id.
        let mut odd = vec![5, 17];
        odd.extend(crate::plc::modbus::crc16(&odd).to_le_bytes());
        rig.receive(&odd);
        assert_eq!(rig.run(ANSWER_NS).get(..3), Some(&[5, 0x91, 1][..]));
        let mut other = ModbusRequest::new(6, ModbusProto::Rtu);
        let mut frame = Vec::new();
        other.generate_get_inputs(0, 4, &mut frame).unwrap();
        rig.receive(&frame);
        assert!(rig.run(ANSWER_NS).is_empty());
        // What is no request, CRC or not: an exception from a shared line, a bulk write longer than the frame.
        for mut frame in [vec![5, 0x83, 2], vec![5, 0xff], vec![5, 0], vec![5, 16, 0, 0, 0, 100, 200, 1, 2]] {
            frame.extend(crate::plc::modbus::crc16(&frame).to_le_bytes());
            rig.receive(&frame);
            assert!(rig.run(ANSWER_NS).is_empty(), "{frame:?}");
        }
        // A bulk write that carries fewer bytes than it counts.
        let mut short = vec![5, 16, 0, 0, 0, 3, 4, 0, 1, 0, 2];
        short.extend(crate::plc::modbus::crc16(&short).to_le_bytes());
        rig.receive(&short);
        assert_eq!(rig.run(ANSWER_NS).get(..3), Some(&[5, 0x90, 3][..]));
        assert!(rig.events().iter().all(|e| !matches!(e, PlcEvent::Trigger(_))));
    }

    #[test]
    fn a_silent_plc_takes_the_link_down() {
        let mut rig = rig();
        read(&mut rig, 0, 1);
        rig.events();
        rig.run(SILENT_NS + 1_000_000_000);
        assert_eq!(rig.events(), [PlcEvent::Link(LinkState::Down)]);
        read(&mut rig, 0, 1);
        assert_eq!(rig.events(), [PlcEvent::Link(LinkState::Up)]);
    }

    proptest! {
        /// Whatever comes, in whatever portions: no panic, nothing announced by noise, and the next good request after a silence is answered.
        #[test]
        fn noise_is_survived(noise in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..300), 0..8), pause in 0u64..10_000_000) {
            let mut rig = rig();
            for bytes in noise {
                rig.receive(&bytes);
                rig.run(pause);
            }
            rig.run(ANSWER_NS);
            prop_assert_eq!(read(&mut rig, 0, 1), [map::MAP_VERSION]);
        }

        /// One flipped bit anywhere in a write: nothing is announced.
        #[test]
        fn a_damaged_write_does_nothing(bit in 0usize..(15 * 8)) {
            let mut rig = rig();
            let (_, mut frame) = made(|r, f| r.generate_set_holdings_bulk(0, &[0, 4, 1], f));
            prop_assert_eq!(frame.len(), 15);
            frame[bit / 8] ^= 1 << (bit % 8);
            rig.receive(&frame);
            rig.run(ANSWER_NS);
            prop_assert!(rig.events().iter().all(|e| !matches!(e, PlcEvent::Trigger(_))));
            write(&mut rig, 0, &[0, 4, 1]);
            prop_assert_eq!(rig.events().iter().filter(|e| matches!(e, PlcEvent::Trigger(_))).count(), 1);
        }
    }

    #[test]
    fn a_fault_is_told_apart_from_a_reject() {
        let mut rig = rig();
        write(&mut rig, 0, &[0, 3, 1]);
        rig.verdict(PartId(3), &without_score(Reason::ModelError));
        assert_eq!(read(&mut rig, 64 + 3, 1), [3 << 8 | 4]);
        let (request, frame) = made(|r, f| r.generate_get_discretes(0, 9, f));
        rig.receive(&frame);
        let mut bits: Vec<bool> = Vec::new();
        request.parse_bool(&rig.run(ANSWER_NS), &mut bits).unwrap();
        assert_eq!((bits[discrete::LAST_OK], bits[discrete::LAST_NG]), (false, true));
    }
}
