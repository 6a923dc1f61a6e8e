//! The master role: we poll the PLC and write verdicts to it.
//!
//! One request is under way at a time. What comes next is chosen when the line is free: results first (they have a deadline), then the status
//! when it is due, else a poll for triggers.

use crate::config::ModbusConfig;
use crate::frame::PartId;
use crate::plc::driver::{Io, Machine};
use crate::plc::modbus::map::{self, Ledger, Outcome, Taken, holding, plc_coil};
use crate::plc::modbus::{Incoming, MAX_FRAME, crc_fits, silence_ns};
use crate::plc::stats::add;
use crate::plc::{HostState, LinkState, PlcCommand, PlcEvent};
use crate::source::Trigger;
use crate::verdict::Verdict;
use rmodbus::client::ModbusRequest;
use rmodbus::{ErrorKind, ModbusProto, guess_response_frame_len};
use std::collections::VecDeque;
use std::sync::atomic::Ordering;

/// Pause between two polls when there is nothing else to say. Ten polls within the shortest deadline anybody sets (100 ms); each takes 5-6 ms at
/// 115200 baud.
const POLL_NS: u64 = 10_000_000;
/// Time for the PLC's program to answer, besides the time on the wire. Slow PLCs answer at the end of their cycle.
const ANSWER_NS: u64 = 200_000_000;
/// Unanswered requests in a row after which the PLC counts as gone: about a second. Some PLCs and libraries lose the requests after a damaged
/// one too, until the line has been silent for a while.
const SILENT_REQUESTS: u32 = 5;
/// Pause between polls of a PLC that is gone, or that has no such registers.
const ABSENT_NS: u64 = 500_000_000;
/// The status is written at least this often, so that the PLC can watch its number go up.
const STATUS_NS: u64 = 500_000_000;
/// Registers that a poll reads, from 0.
const POLL_REGISTERS: u16 = holding::COUNT as u16;
/// Coils 0 and 1: OK and NG of the part in the result registers. On the wire both go in one request, so they never disagree.
const RESULT_COILS: usize = 2;

/// What a request is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ask {
    Poll,
    /// OK and NG off, before the registers name another part: an OK must never stand beside a part that it is not of.
    ClearCoils,
    ResultRegisters(PartId),
    ResultCoils(PartId),
    StatusRegisters,
    StatusCoils,
}

/// READY and FAULT.
fn status_coils(host: HostState) -> [bool; plc_coil::COUNT - RESULT_COILS] {
    [host == HostState::Running, matches!(host, HostState::CameraFault | HostState::InternalFault)]
}

/// The request under way.
struct Asked {
    ask: Ask,
    request: ModbusRequest,
    give_up_ns: u64,
}

/// The machine behind the port.
pub(super) struct Master {
    unit: u8,
    port: String,
    settings: crate::plc::port::PortSettings,
    deadline_ns: u64,
    gap_ns: u64,
    incoming: Incoming,
    ledger: Ledger,
    /// Parts whose result is to be written, oldest first. The front stays until the PLC has confirmed both writes.
    results: VecDeque<PartId>,
    /// The registers of the front result are written; its coils are next.
    registers_written: bool,
    /// The OK coil may be on in the PLC (it was written, or we have just come): it goes off before new registers are written.
    ok_may_be_on: bool,
    /// It goes off now, with no result waiting: what it says is older than this connection.
    clear_due: bool,
    asked: Option<Asked>,
    /// When the line is free for the next request.
    free_at_ns: u64,
    poll_at_ns: u64,
    /// When the last poll was answered: a trigger in the next one is at most this old.
    polled_ns: u64,
    status_at_ns: u64,
    coils_due: bool,
    result_number: u16,
    status_number: u16,
    /// Trigger register, recipe and mode as last read; `None` until the first poll of this connection.
    seen: Option<(u16, u16, u16)>,
    silent: u32,
    link: LinkState,
    bad_frames: u64,
    /// The exception last complained of, so that each is said once.
    complained: Option<(Ask, ErrorKind)>,
    frame: Vec<u8>,
    words: Vec<u16>,
}

impl Master {
    pub(super) fn new(config: &ModbusConfig) -> Self {
        let settings = super::port_settings(config);
        Self {
            unit: config.unit,
            port: config.port.display().to_string(),
            deadline_ns: u64::from(config.deadline_ms) * 1_000_000,
            gap_ns: silence_ns(&settings),
            incoming: Incoming::new(&settings),
            settings,
            ledger: Ledger::default(),
            results: VecDeque::with_capacity(map::SLOTS),
            registers_written: false,
            ok_may_be_on: true,
            clear_due: true,
            asked: None,
            free_at_ns: 0,
            poll_at_ns: 0,
            polled_ns: 0,
            status_at_ns: 0,
            coils_due: false,
            result_number: 0,
            status_number: 0,
            seen: None,
            silent: 0,
            link: LinkState::Connecting,
            bad_frames: 0,
            complained: None,
            frame: Vec::with_capacity(MAX_FRAME),
            words: Vec::with_capacity(MAX_FRAME / 2),
        }
    }

    fn set_link(&mut self, link: LinkState, io: &mut Io<'_>) {
        if self.link != link {
            self.link = link;
            match link {
                LinkState::Up => log::info!("Modbus {}: PLC unit {} answers", self.port, self.unit),
                LinkState::Down => log::warn!("Modbus {}: PLC unit {} does not answer; asking on", self.port, self.unit),
                LinkState::Connecting | LinkState::Refused => {}
            }
        }
        io.events.link(link);
    }

    /// What to ask next; `None` while nothing is due.
    fn choose(&mut self, now_ns: u64) -> Option<Ask> {
        if self.link == LinkState::Up {
            if let Some(&part) = self.results.front() {
                return Some(if self.registers_written {
                    Ask::ResultCoils(part)
                } else if self.ok_may_be_on {
                    Ask::ClearCoils
                } else {
                    Ask::ResultRegisters(part)
                });
            }
            if self.clear_due {
                return Some(Ask::ClearCoils);
            }
            if self.coils_due {
                return Some(Ask::StatusCoils);
            }
            if now_ns >= self.status_at_ns {
                return Some(Ask::StatusRegisters);
            }
        }
        (now_ns >= self.poll_at_ns).then_some(Ask::Poll)
    }

    /// Put a request on the line.
    fn ask(&mut self, ask: Ask, now_ns: u64, io: &mut Io<'_>) {
        let mut request = ModbusRequest::new(self.unit, ModbusProto::Rtu);
        let frame = &mut self.frame;
        let host = self.ledger.host;
        let made = match ask {
            Ask::Poll => request.generate_get_holdings(0, POLL_REGISTERS, frame),
            Ask::ResultRegisters(part) | Ask::ResultCoils(part) => {
                let Some(part) = self.ledger.part(part) else {
                    // Its slot has a newer part: 64 parts ago, long decided by the PLC.
                    self.drop_front(io);
                    return;
                };
                if matches!(ask, Ask::ResultRegisters(_)) {
                    request.generate_set_holdings_bulk(
                        holding::RESULT,
                        &map::result_registers(part, self.result_number.wrapping_add(1)),
                        frame,
                    )
                } else {
                    let ok = part.outcome == Outcome::Ok;
                    let coils: [bool; RESULT_COILS] = [ok, !ok];
                    request.generate_set_coils_bulk(plc_coil::OK, &coils, frame)
                }
            }
            // With the status behind them: the PLC's answer names address and count, and one that comes late, to a result written before, must not
            // be taken for the answer to this.
            Ask::ClearCoils => {
                let [ready, fault] = status_coils(host);
                request.generate_set_coils_bulk(plc_coil::OK, &[false, false, ready, fault], frame)
            }
            Ask::StatusRegisters => {
                let number = self.status_number.wrapping_add(1);
                request.generate_set_holdings_bulk(holding::STATUS, &[map::host_state_code(host), number], frame)
            }
            Ask::StatusCoils => request.generate_set_coils_bulk(plc_coil::READY, &status_coils(host), frame),
        };
        if let Err(error) = made {
            log::error!("Modbus {}: cannot make the request {ask:?}: {error}", self.port);
            self.poll_at_ns = now_ns + ABSENT_NS;
            return;
        }
        if io.tx.room() < frame.len() {
            return; // the port is stuck; the driver opens it again
        }
        io.tx.push(frame);
        if matches!(ask, Ask::ResultCoils(_)) {
            self.ok_may_be_on = true; // from now on, confirmed or not
        }
        if let Ask::ResultRegisters(part) = ask
            && let Some(part) = self.ledger.part(part)
            && part.decided_ns > 0
        {
            io.tx.mark_verdict(part.decided_ns);
        }
        let wire_ns = self.settings.wire_ns(frame.len() + MAX_FRAME / 8);
        self.incoming.clear();
        self.asked = Some(Asked { ask, request, give_up_ns: now_ns.saturating_add(wire_ns).saturating_add(ANSWER_NS) });
    }

    /// An answer from our unit with a good CRC and the length it claims.
    fn answered(&mut self, asked: Asked, now_ns: u64, io: &mut Io<'_>) {
        let frame = self.incoming.frame();
        let exception = frame.get(1).is_some_and(|function| function & 0x80 != 0);
        self.words.clear();
        let parsed = if exception {
            asked.request.parse_ok(frame) // an error, namely the exception
        } else if asked.ask == Ask::Poll {
            // The codec trusts the byte count; an answer of another length than asked for answers somebody else.
            if frame.len() == 5 + usize::from(POLL_REGISTERS) * 2 {
                asked.request.parse_u16(frame, &mut self.words)
            } else {
                Err(ErrorKind::FrameBroken)
            }
        } else if frame.get(2..6) == self.frame.get(2..6) {
            asked.request.parse_ok(frame) // address and count come back
        } else {
            Err(ErrorKind::FrameBroken)
        };
        match parsed {
            Ok(()) => {
                self.silent = 0;
                self.free_at_ns = now_ns.saturating_add(self.gap_ns);
                if self.complained.is_some_and(|(ask, _)| ask == asked.ask) {
                    self.complained = None;
                }
                self.confirmed(asked.ask, now_ns, io);
            }
            Err(error) if error.is_modbus_error() => {
                self.silent = 0;
                self.free_at_ns = now_ns.saturating_add(self.gap_ns);
                self.refused(asked.ask, error, now_ns, io);
            }
            Err(_) => self.damaged(now_ns, io),
        }
        self.incoming.clear();
    }

    fn confirmed(&mut self, ask: Ask, now_ns: u64, io: &mut Io<'_>) {
        match ask {
            Ask::Poll => {
                if self.link != LinkState::Up {
                    (self.seen, self.status_at_ns) = (None, now_ns);
                    (self.ok_may_be_on, self.clear_due) = (true, true);
                    self.set_link(LinkState::Up, io);
                }
                self.poll_at_ns = now_ns.saturating_add(POLL_NS);
                self.polled(now_ns, io);
            }
            Ask::ClearCoils => (self.ok_may_be_on, self.clear_due) = (false, false),
            Ask::ResultRegisters(_) => {
                self.result_number = self.result_number.wrapping_add(1);
                self.registers_written = true;
            }
            Ask::ResultCoils(part) => {
                self.results.pop_front();
                self.registers_written = false;
                if let Some(told) = self.ledger.part(part)
                    && told.outcome != Outcome::Missed
                {
                    io.stats.verdict_to_ack(now_ns.saturating_sub(told.decided_ns));
                    io.events.put(PlcEvent::Acknowledged { part, received_ns: now_ns }, io.stats);
                }
            }
            Ask::StatusRegisters => {
                self.status_number = self.status_number.wrapping_add(1);
                self.status_at_ns = now_ns.saturating_add(STATUS_NS);
                self.coils_due = true;
            }
            Ask::StatusCoils => self.coils_due = false,
        }
    }

    /// The PLC's registers have come.
    fn polled(&mut self, now_ns: u64, io: &mut Io<'_>) {
        let word = |at: usize| self.words.get(at).copied().unwrap_or(0);
        let (trigger, recipe, mode) = (word(holding::TRIGGER), word(holding::RECIPE), word(holding::MODE));
        let before = self.seen.replace((trigger, recipe, mode));
        // What the PLC wanted before we came is obeyed; a part it announced before we came is its own business.
        if before.is_none_or(|(_, _, old)| old != mode)
            && let Some(command) = super::mode_command(mode)
        {
            io.events.put(PlcEvent::Command(command), io.stats);
        }
        if before.map_or(recipe != 0, |(_, old, _)| old != recipe) {
            io.events.put(PlcEvent::Command(PlcCommand::Recipe(recipe)), io.stats);
        }
        if let Some((old, ..)) = before
            && trigger != old
            && trigger != 0
        {
            // A step of more than one: announced and overwritten between two polls. A larger step than parts fit: the PLC began anew.
            let missed = trigger.wrapping_sub(old).wrapping_sub(1);
            if usize::from(missed) < map::SLOTS {
                add(&io.stats.counts().triggers_missed, u64::from(missed));
            }
            let part = PartId(map::u32_from(&self.words, holding::PART));
            let age_ns = now_ns.saturating_sub(self.polled_ns);
            let deadline_ns = now_ns.saturating_add(self.deadline_ns.saturating_sub(age_ns));
            self.ledger.trigger(part, now_ns, deadline_ns);
            let encoder_ticks = map::u32_from(&self.words, holding::ENCODER);
            io.events.put(PlcEvent::Trigger(Trigger { part, received_ns: now_ns, deadline_ns, encoder_ticks }), io.stats);
        }
        self.polled_ns = now_ns;
    }

    /// The PLC answered with an exception.
    fn refused(&mut self, ask: Ask, error: ErrorKind, now_ns: u64, io: &mut Io<'_>) {
        let busy = matches!(error, ErrorKind::Acknowledge | ErrorKind::SlaveDeviceBusy);
        if !busy && self.complained != Some((ask, error)) {
            self.complained = Some((ask, error));
            log::error!(
                "Modbus {}: the PLC refuses {}: {error}; give it the registers of src/plc/MODBUS.md",
                self.port,
                match ask {
                    Ask::Poll => "reading holding registers 0 to 7",
                    Ask::ResultRegisters(_) => "writing holding registers 16 to 22",
                    Ask::ResultCoils(_) => "writing coils 0 and 1",
                    Ask::ClearCoils => "writing coils 0 to 3",
                    Ask::StatusRegisters => "writing holding registers 23 and 24",
                    Ask::StatusCoils => "writing coils 2 and 3",
                }
            );
        }
        let again_ns = now_ns.saturating_add(if busy { POLL_NS } else { ABSENT_NS });
        match ask {
            Ask::Poll => {
                self.poll_at_ns = again_ns;
                if !busy {
                    self.set_link(LinkState::Refused, io);
                }
            }
            Ask::ResultRegisters(_) | Ask::ResultCoils(_) | Ask::ClearCoils if busy => self.free_at_ns = again_ns,
            Ask::ClearCoils => {
                while !self.results.is_empty() {
                    self.drop_front(io);
                }
                self.set_link(LinkState::Refused, io);
                self.poll_at_ns = again_ns;
            }
            // The PLC takes no results: a line that runs on like this would reject everything and never say why.
            Ask::ResultRegisters(_) | Ask::ResultCoils(_) => {
                self.drop_front(io);
                self.set_link(LinkState::Refused, io);
                self.poll_at_ns = again_ns;
            }
            Ask::StatusRegisters | Ask::StatusCoils => {
                self.status_at_ns = now_ns.saturating_add(STATUS_NS);
                self.coils_due = false;
            }
        }
    }

    /// The front result will not reach the PLC, which decides (reject) by itself.
    fn drop_front(&mut self, io: &mut Io<'_>) {
        self.results.pop_front();
        self.registers_written = false;
        add(&io.stats.counts().late, 1);
    }

    /// No answer, or a damaged one: ask again, a few times.
    fn unanswered(&mut self, now_ns: u64, io: &mut Io<'_>) {
        self.asked = None;
        self.silent = self.silent.saturating_add(1);
        if self.silent >= SILENT_REQUESTS {
            self.set_link(LinkState::Down, io);
            while !self.results.is_empty() {
                self.drop_front(io);
            }
            self.poll_at_ns = now_ns.saturating_add(ABSENT_NS);
        }
    }

    fn damaged(&mut self, now_ns: u64, io: &mut Io<'_>) {
        self.bad_frames += 1;
        io.stats.counts().bad_frames.store(self.bad_frames, Ordering::Relaxed);
        // Whatever belongs to it is over after this much silence.
        self.free_at_ns = now_ns.saturating_add(self.incoming.quiet_ns);
        self.incoming.clear();
        self.unanswered(now_ns, io);
    }

    fn queue_result(results: &mut VecDeque<PartId>, part: PartId) -> bool {
        let room = results.len() < map::SLOTS;
        if room {
            results.push_back(part);
        }
        room
    }
}

impl Machine for Master {
    fn opened(&mut self, now_ns: u64, io: &mut Io<'_>) {
        self.incoming.clear();
        (self.asked, self.seen, self.silent) = (None, None, 0);
        (self.ok_may_be_on, self.clear_due, self.registers_written) = (true, true, false);
        (self.free_at_ns, self.poll_at_ns, self.status_at_ns) = (now_ns, now_ns, now_ns);
        self.link = LinkState::Connecting;
        io.events.link(LinkState::Connecting);
    }

    fn closed(&mut self) {
        self.asked = None;
        self.results.clear();
        self.registers_written = false;
        self.link = LinkState::Down;
    }

    fn verdict(&mut self, part: PartId, verdict: &Verdict, decided_ns: u64, now_ns: u64, io: &mut Io<'_>) -> bool {
        match self.ledger.verdict(part, verdict, decided_ns, now_ns) {
            Taken::Yes => self.link == LinkState::Up && Self::queue_result(&mut self.results, part),
            Taken::Late => {
                add(&io.stats.counts().late, 1);
                true
            }
            Taken::UnknownPart => false,
        }
    }

    fn host_state(&mut self, state: HostState, now_ns: u64) {
        if self.ledger.host != state {
            self.ledger.host = state;
            self.status_at_ns = now_ns;
        }
    }

    fn received(&mut self, bytes: &[u8], now_ns: u64, io: &mut Io<'_>) {
        self.incoming.push(bytes, now_ns);
        let Some(asked) = self.asked.take() else {
            // Nothing was asked: the rest of a damaged frame, noise, or a second master.
            self.incoming.clear();
            self.free_at_ns = self.free_at_ns.max(now_ns.saturating_add(self.incoming.quiet_ns));
            return;
        };
        let frame = self.incoming.frame();
        match guess_response_frame_len(frame, ModbusProto::Rtu) {
            Ok(len) if frame.len() < usize::from(len) => self.asked = Some(asked),
            Ok(len) if frame.len() == usize::from(len) && crc_fits(frame) && frame.first() == Some(&self.unit) => {
                if frame.get(1).map(|function| function & 0x7f) == Some(asked.request.func.byte()) {
                    self.answered(asked, now_ns, io);
                } else {
                    self.damaged(now_ns, io);
                }
            }
            // Too short to tell yet.
            Err(ErrorKind::OOB) => self.asked = Some(asked),
            Ok(_) | Err(_) => self.damaged(now_ns, io),
        }
    }

    fn tick(&mut self, now_ns: u64, io: &mut Io<'_>) -> u64 {
        let Self { ledger, results, .. } = self;
        ledger.expire(now_ns, |missed| {
            if !Self::queue_result(results, missed.part) {
                add(&io.stats.counts().late, 1);
            }
        });
        if self.link != LinkState::Up {
            self.results.clear(); // parts that expired while nobody listens
        }
        if self.asked.as_ref().is_some_and(|asked| now_ns >= asked.give_up_ns) {
            self.unanswered(now_ns, io);
        }
        if self.asked.is_none()
            && now_ns >= self.free_at_ns
            && let Some(ask) = self.choose(now_ns)
        {
            self.ask(ask, now_ns, io);
        }
        let line = match &self.asked {
            Some(asked) => asked.give_up_ns,
            None if self.link == LinkState::Up && (!self.results.is_empty() || self.coils_due || self.clear_due) => self.free_at_ns,
            None if self.link == LinkState::Up => self.free_at_ns.max(self.poll_at_ns.min(self.status_at_ns)),
            None => self.free_at_ns.max(self.poll_at_ns),
        };
        line.min(self.ledger.next_deadline_ns().unwrap_or(u64::MAX)).max(now_ns.saturating_add(500_000))
    }

    fn closing(&mut self, now_ns: u64, io: &mut Io<'_>) {
        // Best effort: READY off. A PLC that misses it sees the status number stand still.
        self.ledger.host = HostState::Stopped;
        if self.asked.is_none() && self.link == LinkState::Up {
            self.ask(Ask::StatusCoils, now_ns, io);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{ModbusRole, Parity};
    use crate::plc::driver::rig::Rig;
    use crate::verdict::{Policy, Reason, decide, without_score};
    use proptest::prelude::*;
    use rmodbus::server::ModbusFrame;
    use rmodbus::server::storage::ModbusStorage;

    type PlcMemory = ModbusStorage<8, 1, 1, 32>;

    /// A PLC that answers at once, and can be told to damage or swallow answers.
    struct FarPlc {
        rig: Rig<Master>,
        memory: PlcMemory,
        /// Applied to each answer; an empty one is silence.
        wire: Box<dyn FnMut(Vec<u8>) -> Vec<u8>>,
        requests: usize,
    }

    impl FarPlc {
        fn new() -> Self {
            let config = ModbusConfig {
                port: "fake".into(),
                baud: 115_200,
                role: ModbusRole::Master,
                unit: 3,
                parity: Parity::Even,
                stop_bits: 1,
                deadline_ms: 300,
            };
            Self { rig: Rig::new(Master::new(&config)), memory: PlcMemory::new(), wire: Box::new(|answer| answer), requests: 0 }
        }

        fn run(&mut self, ms: u64) {
            for _ in 0..ms * 2 {
                let sent = self.rig.run(500_000);
                if sent.is_empty() {
                    continue;
                }
                self.requests += 1;
                let mut answer = Vec::new();
                let mut frame = ModbusFrame::new(3, &sent, ModbusProto::Rtu, &mut answer);
                frame.parse().unwrap();
                assert!(frame.processing_required, "{sent:?}");
                if frame.readonly {
                    frame.process_read(&self.memory).unwrap()
                } else {
                    frame.process_write(&mut self.memory).unwrap()
                }
                frame.finalize_response().unwrap();
                // At every moment, not only in the end: OK stands only beside the registers of a part that is OK.
                assert!(!self.memory.coils[0] || self.memory.holdings[18] == 1, "OK beside another part's registers");
                assert!(!(self.memory.coils[0] && self.memory.coils[1]));
                let answer = (self.wire)(answer);
                if !answer.is_empty() {
                    self.rig.receive(&answer);
                }
            }
        }

        fn announce(&mut self, part: u32) {
            self.memory.holdings[0] = (part >> 16) as u16;
            self.memory.holdings[1] = part as u16;
            self.memory.holdings[2] = self.memory.holdings[2].wrapping_add(1).max(1);
        }

        fn triggers(&self) -> Vec<u32> {
            self.rig.events().iter().filter_map(|e| if let PlcEvent::Trigger(t) = e { Some(t.part.0) } else { None }).collect()
        }
    }

    fn accept() -> Verdict {
        decide(&Policy { false_reject_rate: 0.005 }, 2.0, 0.5)
    }

    #[test]
    fn a_part_is_seen_judged_written_and_acknowledged() {
        let mut plc = FarPlc::new();
        plc.memory.holdings[2] = 41; // announced before we came
        plc.memory.holdings[holding::MODE] = 1;
        plc.run(100);
        let events = plc.rig.events();
        assert!(events.contains(&PlcEvent::Link(LinkState::Up)), "{events:?}");
        assert!(events.contains(&PlcEvent::Command(PlcCommand::Start)), "{events:?}");
        assert!(events.iter().all(|e| !matches!(e, PlcEvent::Trigger(_))), "{events:?}");
        plc.announce(0x0002_0001);
        plc.run(50);
        assert_eq!(plc.triggers(), [0x0002_0001]);
        assert!(plc.rig.verdict(PartId(0x0002_0001), &accept()));
        plc.run(50);
        assert_eq!(plc.memory.holdings[16..23], [2, 1, 1, 1, 2000, 5000, 1]);
        assert_eq!(plc.memory.coils[..2], [true, false]);
        assert!(plc.rig.events().iter().any(|e| matches!(e, PlcEvent::Acknowledged { part: PartId(0x0002_0001), .. })));
        let summary = plc.rig.stats.summary();
        assert_eq!((summary.verdicts_sent, summary.acknowledged), (1, 1));
        let number = plc.memory.holdings[24];
        plc.run(1_100);
        assert!(plc.memory.holdings[24] >= number + 2, "the status number stands still");
    }

    #[test]
    fn no_verdict_by_the_deadline_is_written_as_ng() {
        let mut plc = FarPlc::new();
        plc.run(50);
        plc.announce(8);
        plc.run(400);
        assert_eq!(plc.triggers(), [8]);
        assert_eq!(plc.memory.holdings[17..19], [8, 5]);
        assert_eq!(plc.memory.coils[..2], [false, true]);
        assert!(plc.rig.verdict(PartId(8), &accept()));
        plc.run(50);
        assert_eq!(plc.memory.holdings[17..19], [8, 5], "an accept after the deadline changes nothing");
        assert_eq!(plc.rig.stats.summary().late, 1);
    }

    #[test]
    fn the_inspectors_state_is_written_at_once() {
        let mut plc = FarPlc::new();
        plc.run(50);
        plc.rig.machine.host_state(HostState::Running, plc.rig.now_ns);
        plc.run(50);
        assert_eq!((plc.memory.holdings[23], &plc.memory.coils[2..4]), (1, &[true, false][..]));
        plc.rig.machine.host_state(HostState::CameraFault, plc.rig.now_ns);
        plc.run(50);
        assert_eq!((plc.memory.holdings[23], &plc.memory.coils[2..4]), (3, &[false, true][..]));
    }

    #[test]
    fn a_plc_that_goes_away_takes_the_link_down_and_comes_back_with_no_part_of_before() {
        let mut plc = FarPlc::new();
        plc.run(50);
        plc.rig.events();
        plc.wire = Box::new(|_| Vec::new());
        plc.run(2_500);
        assert_eq!(plc.rig.events(), [PlcEvent::Link(LinkState::Down)]);
        plc.announce(5);
        plc.wire = Box::new(|answer| answer);
        plc.run(1_000);
        assert_eq!(plc.rig.events(), [PlcEvent::Link(LinkState::Up)]);
        plc.announce(6);
        plc.run(50);
        assert_eq!(plc.triggers(), [6]);
    }

    #[test]
    fn parts_between_two_polls_are_counted() {
        let mut plc = FarPlc::new();
        plc.run(50);
        for part in 1..=4 {
            plc.announce(part);
        }
        plc.run(50);
        assert_eq!(plc.triggers(), [4]);
        assert_eq!(plc.rig.stats.summary().triggers_missed, 3);
    }

    #[test]
    fn missing_registers_refuse_the_link() {
        let mut plc = FarPlc::new();
        plc.wire = Box::new(|answer| {
            let mut exception = vec![answer[0], answer[1] | 0x80, 2];
            exception.extend(crate::plc::modbus::crc16(&exception).to_le_bytes());
            exception
        });
        plc.run(50);
        assert!(plc.rig.events().contains(&PlcEvent::Link(LinkState::Refused)));
        plc.wire = Box::new(|answer| answer);
        plc.run(1_000);
        assert!(plc.rig.events().contains(&PlcEvent::Link(LinkState::Up)));
    }

    #[test]
    fn a_damaged_answer_is_asked_for_again() {
        let mut plc = FarPlc::new();
        plc.run(50);
        plc.rig.events();
        let mut n = 0;
        plc.wire = Box::new(move |mut answer| {
            n += 1;
            match n % 4 {
                1 => answer[2] ^= 0x10,
                2 => answer.truncate(3),
                _ => {}
            }
            answer
        });
        plc.announce(1);
        plc.run(1_000);
        assert_eq!(plc.triggers(), [1]);
        plc.announce(2);
        plc.run(1_000);
        assert_eq!(plc.triggers(), [2]);
        assert!(plc.rig.verdict(PartId(2), &without_score(Reason::NoFrame)) || plc.rig.stats.summary().late > 0);
        assert!(plc.rig.stats.summary().bad_frames > 0);
    }

    proptest! {
        /// Answers damaged, cut, delayed by an extra chunk or swallowed at random: no panic, no part announced that the PLC did not announce,
        /// and OK stands in the PLC only for a part that was accepted.
        #[test]
        fn a_bad_line_never_makes_an_ok(
            damage in proptest::collection::vec((0u8..8, any::<u8>(), any::<u8>()), 40),
            accepted in proptest::collection::vec(any::<bool>(), 20),
        ) {
            let mut plc = FarPlc::new();
            let mut turn = 0;
            plc.wire = Box::new(move |mut answer| {
                let (kind, at, with) = damage[turn % damage.len()];
                turn += 1;
                let at = at as usize % answer.len();
                match kind {
                    0 => answer[at] ^= with | 1,
                    1 => answer.truncate(at),
                    2 => answer.push(with),
                    3 => answer.clear(),
                    _ => {}
                }
                answer
            });
            plc.run(100);
            plc.rig.events();
            for n in 0..accepted.len() {
                let part = n as u32 + 1;
                plc.announce(part);
                plc.run(60);
                let seen = plc.triggers();
                prop_assert!(seen.iter().all(|p| *p <= part));
                for p in seen {
                    let verdict = if accepted[p as usize - 1] { accept() } else { without_score(Reason::BadFrame) };
                    plc.rig.verdict(PartId(p), &verdict);
                }
                plc.run(60);
                let of = map::u32_from(&plc.memory.holdings, 16);
                if plc.memory.holdings[18] == 1 {
                    prop_assert!(accepted[of as usize - 1], "part {of} reads OK");
                }
            }
        }
    }
}
