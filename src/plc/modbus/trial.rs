//! Both roles against a script of bytes: what the fuzz targets (`fuzz/plc`) and the property tests run. The script says what the other side does, what
//! becomes of it on the line, which verdicts come, and how time passes; each step is checked against the plainest model of what may be good.

use crate::config::{ModbusConfig, ModbusRole, Parity};
use crate::frame::PartId;
use crate::plc::driver::rig::Rig;
use crate::plc::modbus::map::{self, Outcome, holding, input, plc_coil};
use crate::plc::modbus::master::Master;
use crate::plc::modbus::slave::Slave;
use crate::plc::modbus::{MAX_FRAME, crc_fits, crc16};
use crate::plc::{HostState, PlcEvent};
use crate::verdict::{Policy, Reason, Verdict, decide, without_score};
use rmodbus::ModbusProto;
use rmodbus::server::ModbusFrame;
use rmodbus::server::storage::ModbusStorage;
use std::collections::{HashMap, HashSet, VecDeque};

/// Our unit (slave), or the PLC's (master).
const UNIT: u8 = 5;
/// Short, so that deadlines pass within a script.
const DEADLINE_MS: u32 = 100;
/// Longer than any answer takes on an undamaged line, and than the silence that ends a broken frame.
const ANSWER_NS: u64 = 20_000_000;
const MS: u64 = 1_000_000;
/// Steps of one script at most: longer ones show nothing new.
const MAX_STEPS: usize = 400;

fn config(role: ModbusRole) -> ModbusConfig {
    ModbusConfig { port: "trial".into(), baud: 115_200, role, unit: UNIT, parity: Parity::Even, stop_bits: 1, deadline_ms: DEADLINE_MS }
}

fn verdict(good: bool) -> Verdict {
    if good { decide(&Policy { false_reject_rate: 0.005 }, 1.0, 0.5) } else { without_score(Reason::ModelError) }
}

/// The bytes that decide what happens.
struct Script<'a> {
    bytes: &'a [u8],
}

impl Script<'_> {
    fn next(&mut self) -> Option<u8> {
        let (first, rest) = self.bytes.split_first()?;
        self.bytes = rest;
        Some(*first)
    }

    /// 0 at the end.
    fn byte(&mut self) -> u8 {
        self.next().unwrap_or(0)
    }

    fn word(&mut self) -> u16 {
        u16::from_be_bytes([self.byte(), self.byte()])
    }

    fn take(&mut self, n: usize) -> Vec<u8> {
        let (taken, rest) = self.bytes.split_at(n.min(self.bytes.len()));
        self.bytes = rest;
        taken.to_vec()
    }
}

fn with_crc(mut frame: Vec<u8>) -> Vec<u8> {
    frame.truncate(MAX_FRAME - 2);
    frame.extend(crc16(&frame).to_le_bytes());
    frame
}

/// Whether anything within `bytes` is a frame with a good CRC: noise may be one by chance, and a fuzzer makes it one on purpose.
fn holds_a_frame(bytes: &[u8]) -> bool {
    (0..bytes.len()).any(|start| (start + 1..=bytes.len().min(start + MAX_FRAME)).any(|end| crc_fits(&bytes[start..end])))
}

/// One announcement as the model has it.
#[derive(Clone, Copy)]
struct Announced {
    part: u32,
    deadline_ns: u64,
    /// What its verdict said, if one came in time.
    good: Option<bool>,
}

/// The slave role. Checks after every step: nothing is announced by damaged bytes; every answer is one whole frame of ours; a part reads OK if and
/// only if it got an accept of its own before its deadline; the counters add up; and the next good request is answered.
///
/// # Panics
/// When one of these does not hold.
pub fn slave(script: &[u8]) {
    let mut script = Script { bytes: script };
    let mut rig = Rig::new(Slave::new(&config(ModbusRole::Slave)));
    let mut slots: HashMap<usize, Announced> = HashMap::new();
    let mut trigger_register = 0u16;
    // Bytes since the line was last silent for long enough to forget them.
    let mut recent: Vec<u8> = Vec::new();
    for _ in 0..MAX_STEPS {
        let Some(step) = script.next() else { break };
        let mut wait_ns = ANSWER_NS;
        let mut bytes = Vec::new();
        match step % 10 {
            0 => {
                let n = usize::from(script.byte()) % 64;
                bytes = script.take(n);
                wait_ns = u64::from(script.byte()) * MS / 16;
            }
            1 | 2 => {
                // A part is announced; in step 2 with a damaged bit.
                trigger_register = trigger_register.wrapping_add(1).max(1);
                let part = script.byte();
                let mut frame = vec![UNIT, 16, 0, 0, 0, 3, 6, 0, 0, 0, part];
                frame.extend(trigger_register.to_be_bytes());
                bytes = with_crc(frame);
                if step % 10 == 2 {
                    let at = usize::from(script.byte()) % (bytes.len() * 8);
                    bytes[at / 8] ^= 1 << (at % 8);
                }
            }
            3 | 4 => {
                let (part, good) = (u32::from(script.byte()), step % 10 == 3);
                let known = slots.get(&(part as usize % map::SLOTS)).is_some_and(|announced| announced.part == part);
                assert_eq!(rig.verdict(PartId(part), &verdict(good)), known, "part {part}");
                if let Some(announced) = slots.get_mut(&(part as usize % map::SLOTS))
                    && announced.part == part
                    && announced.good.is_none()
                    && rig.now_ns < announced.deadline_ns
                {
                    announced.good = Some(good);
                }
                wait_ns = 0;
            }
            5 => wait_ns = u64::from(script.byte()) * MS,
            6 => bytes = with_crc(vec![UNIT, 5, 0, script.byte() % 10, if script.byte() & 1 == 0 { 0 } else { 0xff }, 0]),
            7 => {
                // Any frame with a good CRC: gets behind it, where random bytes would never come.
                let n = usize::from(script.byte()) % 48;
                let mut frame = vec![if script.byte() & 3 == 0 { 0 } else { UNIT }];
                frame.extend(script.take(n));
                bytes = with_crc(frame);
            }
            8 => {
                // In two portions, with a pause that may or may not break the frame.
                let frame = with_crc(vec![UNIT, 4, 0, script.byte(), 0, script.byte()]);
                let (front, back) = frame.split_at(1 + usize::from(script.byte()) % 7);
                rig.receive(front);
                recent.extend(front);
                check_answer(&rig.run(u64::from(script.byte()) * MS / 16));
                bytes = back.to_vec();
            }
            _ => check_registers(&mut rig, &slots),
        }
        if !bytes.is_empty() {
            rig.receive(&bytes);
            recent.extend(&bytes);
        }
        check_answer(&rig.run(wait_ns));
        for event in rig.events() {
            if let PlcEvent::Trigger(trigger) = event {
                assert!(holds_a_frame(&recent), "part {} announced by {recent:02x?}", trigger.part);
                let announced = Announced { part: trigger.part.0, deadline_ns: trigger.deadline_ns, good: None };
                slots.insert(trigger.part.0 as usize % map::SLOTS, announced);
            }
        }
        if wait_ns >= ANSWER_NS {
            recent.clear();
        }
    }
    check_registers(&mut rig, &slots);
}

/// Silence, or one frame of ours.
fn check_answer(answer: &[u8]) {
    assert!(answer.is_empty() || (answer.len() <= MAX_FRAME && answer.first() == Some(&UNIT) && crc_fits(answer)), "answer {answer:02x?}");
}

/// Read everything over the line and compare it with the model.
fn check_registers(rig: &mut Rig<Slave>, slots: &HashMap<usize, Announced>) {
    rig.run(ANSWER_NS);
    let mut read = |address: usize, count: usize| {
        rig.receive(&with_crc(vec![UNIT, 4, 0, address as u8, 0, count as u8]));
        let answer = rig.run(ANSWER_NS);
        assert_eq!(answer.len(), 5 + 2 * count, "a good request after a silence is answered: {answer:02x?}");
        answer[3..3 + 2 * count].chunks_exact(2).map(|word| u16::from_be_bytes([word[0], word[1]])).collect::<Vec<_>>()
    };
    for (slot, word) in read(input::SLOTS, map::SLOTS).into_iter().enumerate() {
        let announced = slots.get(&slot);
        let good = announced.is_some_and(|announced| announced.good == Some(true));
        assert_eq!(word & 0xff == Outcome::Ok as u16, good, "slot {slot} reads {word:04x}");
        assert_eq!(word >> 8, announced.map_or(0, |announced| announced.part as u16 & 0xff), "slot {slot} reads {word:04x}");
    }
    let words = read(0, input::PENDING + 1);
    let count = |address| map::u32_from(&words, address);
    let (ok, ng) = (count(input::OK), count(input::NG));
    assert_eq!(count(input::TRIGGERS), ok + ng + u32::from(words[input::PENDING]));
    assert!(count(input::ERRORS) <= ng);
}

/// What becomes of one request and its answer.
#[derive(Clone, Copy, PartialEq)]
enum Trouble {
    None,
    RequestLost,
    AnswerLost,
    Flipped(u16),
    Cut(u8),
    Longer(u8),
    /// Behind a byte of noise.
    Noise(u8),
    /// Later than it is waited for, by up to 2 s; answers stay in order.
    Late(u8),
    /// With this exception, and not carried out.
    Exception(u8),
    OtherUnit,
}

fn trouble(script: &mut Script<'_>) -> Trouble {
    match script.byte() % 16 {
        0 => Trouble::RequestLost,
        1 => Trouble::AnswerLost,
        2 => Trouble::Flipped(script.word()),
        3 => Trouble::Cut(script.byte()),
        4 => Trouble::Longer(script.byte()),
        5 => Trouble::Noise(script.byte()),
        6 => Trouble::Late(script.byte()),
        7 => Trouble::Exception(script.byte()),
        8 => Trouble::OtherUnit,
        _ => Trouble::None,
    }
}

/// A PLC on a bad line.
struct FarPlc {
    rig: Rig<Master>,
    memory: ModbusStorage<8, 1, 1, 32>,
    /// Answers under way, and when they arrive; in order.
    answers: VecDeque<(u64, Vec<u8>)>,
    /// What becomes of the next exchanges.
    troubles: VecDeque<Trouble>,
    /// Parts that were accepted before their deadline.
    accepted: HashSet<u32>,
    /// Parts announced to us, without a verdict yet, and their deadlines.
    open: HashMap<u32, u64>,
    announced: HashSet<u32>,
}

/// The master role. Checks at every moment: OK stands in the PLC only beside the registers of a part that got its accept in time, and never together
/// with NG; no part is announced that the PLC did not announce; every request is one whole frame; and once the line is good again, a part
/// gets its result.
///
/// # Panics
/// When one of these does not hold.
pub fn master(script: &[u8]) {
    let mut script = Script { bytes: script };
    let mut plc = FarPlc {
        rig: Rig::new(Master::new(&config(ModbusRole::Master))),
        memory: ModbusStorage::new(),
        answers: VecDeque::new(),
        troubles: VecDeque::new(),
        accepted: HashSet::new(),
        open: HashMap::new(),
        announced: HashSet::new(),
    };
    let mut part = 0u32;
    for _ in 0..MAX_STEPS {
        let Some(step) = script.next() else { break };
        match step % 8 {
            0 => {
                part += 1 + u32::from(script.byte() & 3 == 0);
                plc.announce(part);
                plc.run(u64::from(step / 8));
            }
            1 | 2 => {
                // On one of the last parts.
                let of = part.saturating_sub(u32::from(script.byte() % 4));
                plc.judge(of, step % 8 == 1);
            }
            3 => plc.run(u64::from(script.byte())),
            4 => {
                let n = usize::from(step / 8) % 8 + 1;
                let more: Vec<_> = (0..n).map(|_| trouble(&mut script)).collect();
                plc.troubles.extend(more);
            }
            5 => plc.memory.holdings[holding::MODE] = u16::from(script.byte() % 6),
            6 => {
                // Noise while nothing, or something, is expected.
                let n = usize::from(script.byte()) % 16;
                let noise = script.take(n);
                if !holds_a_frame(&noise) {
                    plc.rig.receive(&noise);
                }
            }
            _ => {
                let state = if script.byte() & 1 == 0 { HostState::Running } else { HostState::CameraFault };
                plc.set_state(state);
            }
        }
        plc.run(1);
    }
    // The line is good again: within the time-outs of both sides the next part gets its result.
    plc.troubles.clear();
    plc.run(4_000);
    plc.announce(part + 2);
    plc.run(40);
    assert!(plc.open.contains_key(&(part + 2)), "a part on a good line was not seen");
    plc.judge(part + 2, true);
    plc.run(60);
    assert_eq!((map::u32_from(&plc.memory.holdings, holding::RESULT.into()), plc.memory.holdings[18]), (part + 2, Outcome::Ok as u16));
    assert!(plc.memory.coils[usize::from(plc_coil::OK)]);
}

impl FarPlc {
    fn announce(&mut self, part: u32) {
        self.announced.insert(part);
        let holdings = &mut self.memory.holdings;
        (holdings[holding::PART], holdings[holding::PART + 1]) = ((part >> 16) as u16, part as u16);
        holdings[holding::TRIGGER] = holdings[holding::TRIGGER].wrapping_add(1).max(1);
    }

    fn judge(&mut self, part: u32, good: bool) {
        if let Some(deadline_ns) = self.open.remove(&part)
            && good
            && self.rig.now_ns < deadline_ns
        {
            self.accepted.insert(part);
        }
        self.rig.verdict(PartId(part), &verdict(good));
    }

    fn set_state(&mut self, state: HostState) {
        let now_ns = self.rig.now_ns;
        self.rig.set_host_state(state, now_ns);
    }

    fn run(&mut self, ms: u64) {
        for _ in 0..ms * 2 {
            let sent = self.rig.run(MS / 2);
            if !sent.is_empty() {
                self.request(&sent);
            }
            while self.answers.front().is_some_and(|(at_ns, _)| *at_ns <= self.rig.now_ns)
                && let Some((_, answer)) = self.answers.pop_front()
            {
                self.rig.receive(&answer);
            }
            for event in self.rig.events() {
                if let PlcEvent::Trigger(trigger) = event {
                    assert!(self.announced.contains(&trigger.part.0), "nobody announced part {}", trigger.part);
                    self.open.insert(trigger.part.0, trigger.deadline_ns);
                }
            }
            let (coils, holdings) = (&self.memory.coils, &self.memory.holdings);
            if coils[usize::from(plc_coil::OK)] {
                let of = map::u32_from(holdings, holding::RESULT.into());
                assert!(
                    self.accepted.contains(&of) && holdings[18] == Outcome::Ok as u16,
                    "OK stands beside part {of}, result {}",
                    holdings[18]
                );
                assert!(!coils[usize::from(plc_coil::NG)]);
            }
        }
    }

    fn request(&mut self, sent: &[u8]) {
        assert!(crc_fits(sent) && sent.first() == Some(&UNIT) && sent.len() <= MAX_FRAME, "request {sent:02x?}");
        let trouble = self.troubles.pop_front().unwrap_or(Trouble::None);
        if trouble == Trouble::RequestLost {
            return;
        }
        let mut answer = Vec::new();
        if let Trouble::Exception(code) = trouble {
            answer = with_crc(vec![UNIT, sent[1] | 0x80, code % 12]);
        } else {
            let mut frame = ModbusFrame::new(UNIT, sent, ModbusProto::Rtu, &mut answer);
            frame.parse().expect("a request of ours is understood");
            assert!(frame.processing_required, "{sent:02x?}");
            let done = if frame.readonly { frame.process_read(&self.memory) } else { frame.process_write(&mut self.memory) };
            done.expect("the registers are there");
            frame.finalize_response().expect("an answer is possible");
        }
        let mut delay_ns = MS;
        match trouble {
            Trouble::AnswerLost => return,
            Trouble::Flipped(bit) => {
                let bit = usize::from(bit) % (answer.len() * 8);
                answer[bit / 8] ^= 1 << (bit % 8);
            }
            Trouble::Cut(at) => answer.truncate(usize::from(at) % answer.len()),
            Trouble::Longer(with) => answer.push(with),
            Trouble::Noise(with) => answer.insert(0, with),
            Trouble::Late(by) => delay_ns += u64::from(by) * 8 * MS,
            Trouble::OtherUnit => {
                answer.truncate(answer.len() - 2);
                answer[0] = UNIT + 1;
                answer = with_crc(answer);
            }
            Trouble::None | Trouble::Exception(_) | Trouble::RequestLost => {}
        }
        // A PLC answers in order, and nothing overtakes on a wire.
        let at_ns = (self.rig.now_ns + delay_ns).max(self.answers.back().map_or(0, |(at_ns, _)| *at_ns));
        self.answers.push_back((at_ns, answer));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    /// Scripts whose first byte of a step is likely to be one: uniform bytes would do, but reach less.
    fn script() -> impl Strategy<Value = Vec<u8>> {
        proptest::collection::vec(prop_oneof![3 => 0u8..10, 1 => any::<u8>()], 0..400)
    }

    proptest! {
        // `PROPTEST_CASES=50000 cargo test …` runs more.
        #[test]
        fn a_slave_says_ok_only_of_what_was_accepted(script in script()) {
            super::slave(&script);
        }

        #[test]
        fn a_master_writes_ok_only_of_what_was_accepted(script in script()) {
            super::master(&script);
        }
    }

    /// Scripted seeds of the fuzz targets (`fuzz/plc/seeds`), as a normal test.
    #[test]
    fn the_fuzzers_seeds_still_pass() {
        for (name, trial) in [("modbus_slave", super::slave as fn(&[u8])), ("modbus_master", super::master)] {
            // This file is compiled by the fuzz crate, too.
            let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
            let folder =
                [root.join("fuzz/plc/seeds"), root.join("seeds")].map(|seeds| seeds.join(name)).into_iter().find(|seeds| seeds.is_dir());
            let seeds: Vec<_> = std::fs::read_dir(folder.expect("the seeds are in the repository")).unwrap().collect();
            assert!(seeds.len() >= 10, "{name}: {} seeds", seeds.len());
            for seed in seeds {
                trial(&std::fs::read(seed.unwrap().path()).unwrap());
            }
        }
    }
}
