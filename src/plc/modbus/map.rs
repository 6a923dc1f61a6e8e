//! The register map, and the ledger of parts behind it. Pure: no port, no clock.

use crate::frame::PartId;
use crate::plc::HostState;
use crate::verdict::{Decision, Reason, Verdict};
use rmodbus::server::storage::ModbusStorage;

/// Version of this map, in input register [`input::VERSION`]. Goes up when an address changes its meaning.
pub const MAP_VERSION: u16 = 1;
/// Parts kept, by part number modulo this.
pub const SLOTS: usize = 64;

/// Coils (slave role: the PLC writes them; a rising edge acts).
pub mod coil {
    /// A part passed the sensor; its number is the previous one plus 1.
    pub const TRIGGER: usize = 0;
    /// Start or resume inspecting.
    pub const START: usize = 1;
    /// Stop inspecting.
    pub const STOP: usize = 2;
    /// Pause inspecting.
    pub const PAUSE: usize = 3;
    /// A golden sample comes next.
    pub const GOLDEN: usize = 4;
    /// Set the counters and times to 0.
    pub const RESET: usize = 5;
    /// Coils there are.
    pub const COUNT: usize = 8;
}

/// Coils that the master role writes in the PLC.
pub mod plc_coil {
    /// The part in registers 16 and 17 is good. Never on together with [`NG`].
    pub const OK: u16 = 0;
    /// That part is to be rejected.
    pub const NG: u16 = 1;
    /// The inspector is inspecting.
    pub const READY: u16 = 2;
    /// The inspector has a fault.
    pub const FAULT: u16 = 3;
    /// Coils there are.
    pub const COUNT: usize = 4;
}

/// Discrete inputs (slave role).
pub mod discrete {
    /// Inspecting.
    pub const READY: usize = 0;
    /// Starting.
    pub const STARTING: usize = 1;
    /// Stopped or paused.
    pub const STOPPED: usize = 2;
    /// Camera fault.
    pub const CAMERA_FAULT: usize = 3;
    /// Internal fault.
    pub const INTERNAL_FAULT: usize = 4;
    /// Changes every second while the inspector lives.
    pub const HEARTBEAT: usize = 5;
    /// A part has been decided since the start.
    pub const RESULT_VALID: usize = 6;
    /// The last part decided is good.
    pub const LAST_OK: usize = 7;
    /// The last part decided is to be rejected.
    pub const LAST_NG: usize = 8;
    /// First of 64: the part in this slot is good.
    pub const SLOTS: usize = 64;
    /// Discrete inputs there are.
    pub const COUNT: usize = 128;
}

/// Input registers (slave role). Two-register values have the high word first.
pub mod input {
    /// [`super::MAP_VERSION`].
    pub const VERSION: usize = 0;
    /// 0 starting, 1 running, 2 stopped, 3 camera fault, 4 internal fault.
    pub const HOST_STATE: usize = 1;
    /// Number of the last part decided, two registers.
    pub const LAST_PART: usize = 2;
    /// Its [`super::Outcome`].
    pub const LAST_RESULT: usize = 4;
    /// Its reason.
    pub const LAST_REASON: usize = 5;
    /// Its score times 1000, 65535 where there is none or it is larger.
    pub const LAST_SCORE: usize = 6;
    /// Its p-value times 10000, 65535 where there is none.
    pub const LAST_P: usize = 7;
    /// Parts triggered, two registers.
    pub const TRIGGERS: usize = 8;
    /// Parts OK, two registers.
    pub const OK: usize = 10;
    /// Parts not OK, two registers.
    pub const NG: usize = 12;
    /// Of the NG, those without a judgement, two registers.
    pub const ERRORS: usize = 14;
    /// Longest time from trigger to verdict, in 0.1 ms.
    pub const TIME_MAX: usize = 16;
    /// Shortest.
    pub const TIME_MIN: usize = 17;
    /// Average.
    pub const TIME_AVERAGE: usize = 18;
    /// Parts without a result yet.
    pub const PENDING: usize = 19;
    /// First of 64: low byte of the part number times 256, plus its [`super::Outcome`].
    pub const SLOTS: usize = 64;
    /// Input registers there are.
    pub const COUNT: usize = 128;
}

/// Holding registers: what the PLC tells (slave role: written by the PLC; master role: read from it), and results (master role only).
pub mod holding {
    /// Part number, two registers, high word first.
    pub const PART: usize = 0;
    /// A new value announces the part.
    pub const TRIGGER: usize = 2;
    /// Encoder position, two registers.
    pub const ENCODER: usize = 3;
    /// Recipe or product hint; a new value is reported.
    pub const RECIPE: usize = 5;
    /// 0 nothing, 1 start, 2 stop, 3 pause, 4 golden-sample check; a new value acts.
    pub const MODE: usize = 6;
    /// Holding registers read or offered.
    pub const COUNT: usize = 8;
    /// Master role: first of the results written to the PLC: part (2), result, reason, score, p-value, result number.
    pub const RESULT: u16 = 16;
    /// Registers of a result.
    pub const RESULT_COUNT: usize = 7;
    /// Master role: inspector's state, then a number that goes up with every write.
    pub const STATUS: u16 = 23;
}

/// What became of a part; the numbers are on the wire. Only 1 is good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Outcome {
    /// No verdict yet, and the deadline has not passed.
    Pending = 0,
    /// Good.
    Ok = 1,
    /// Reject: anomalous.
    Ng = 2,
    /// Reject: no judgement was possible.
    Unknown = 3,
    /// Reject: the inspector failed on it.
    Fault = 4,
    /// Reject: no verdict by the deadline.
    Missed = 5,
}

impl Outcome {
    fn of(decision: Decision) -> Self {
        match decision {
            Decision::Accept => Self::Ok,
            Decision::Reject => Self::Ng,
            Decision::Unknown => Self::Unknown,
            Decision::Fault => Self::Fault,
        }
    }
}

/// One part in the ledger.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Part {
    /// Its number.
    pub part: PartId,
    /// When it was announced.
    pub received_ns: u64,
    /// When it counts as rejected without a verdict.
    pub deadline_ns: u64,
    /// What became of it.
    pub outcome: Outcome,
    /// Why; [`reason_code`].
    pub reason: u8,
    /// Image score, NaN for none.
    pub score: f32,
    /// p-value, NaN for none.
    pub p_value: f32,
    /// When the verdict was taken; 0 for none.
    pub decided_ns: u64,
    /// The PLC has it.
    pub told: bool,
}

/// What a verdict came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// It is the part's result.
    Yes,
    /// The part had its result already: the deadline passed, or a verdict came before.
    Late,
    /// No such part.
    UnknownPart,
}

/// Parts, counters and times.
pub struct Ledger {
    slots: [Option<Part>; SLOTS],
    last: Option<PartId>,
    /// The inspector's state.
    pub host: HostState,
    triggers: u32,
    ok: u32,
    ng: u32,
    errors: u32,
    time_min_ns: u64,
    time_max_ns: u64,
    time_sum_ns: u128,
    timed: u64,
}

/// Registers and bits offered in the slave role.
pub type Registers = ModbusStorage<{ coil::COUNT }, { discrete::COUNT }, { input::COUNT }, { holding::COUNT }>;

fn slot_of(part: PartId) -> usize {
    part.0 as usize % SLOTS
}

impl Default for Ledger {
    fn default() -> Self {
        Self {
            slots: [None; SLOTS],
            last: None,
            host: HostState::Starting,
            triggers: 0,
            ok: 0,
            ng: 0,
            errors: 0,
            time_min_ns: u64::MAX,
            time_max_ns: 0,
            time_sum_ns: 0,
            timed: 0,
        }
    }
}

impl Ledger {
    /// A part was announced. One that still waits in its slot is 64 or more parts old, or was announced twice: it counts as missed.
    pub fn trigger(&mut self, part: PartId, received_ns: u64, deadline_ns: u64) {
        self.triggers = self.triggers.wrapping_add(1);
        let new = Part {
            part,
            received_ns,
            deadline_ns,
            outcome: Outcome::Pending,
            reason: 0,
            score: f32::NAN,
            p_value: f32::NAN,
            decided_ns: 0,
            told: false,
        };
        let displaced = self.slots.get_mut(slot_of(part)).and_then(|slot| slot.replace(new));
        if displaced.is_some_and(|old| old.outcome == Outcome::Pending) {
            self.ng = self.ng.wrapping_add(1);
            self.errors = self.errors.wrapping_add(1);
        }
    }

    /// A verdict came at `now_ns`. One past the deadline changes nothing: the PLC may have acted on the missing one already.
    pub fn verdict(&mut self, part: PartId, verdict: &Verdict, decided_ns: u64, now_ns: u64) -> Taken {
        self.expire(now_ns, |_| {});
        let Some(entry) = self.slots.get_mut(slot_of(part)).and_then(Option::as_mut).filter(|entry| entry.part == part) else {
            return Taken::UnknownPart;
        };
        if entry.outcome != Outcome::Pending {
            return Taken::Late;
        }
        entry.outcome = Outcome::of(verdict.decision);
        entry.reason = reason_code(verdict.reason);
        (entry.score, entry.p_value, entry.decided_ns) = (verdict.score, verdict.p_value, decided_ns);
        let took_ns = decided_ns.saturating_sub(entry.received_ns);
        match entry.outcome {
            Outcome::Ok => self.ok = self.ok.wrapping_add(1),
            Outcome::Ng => self.ng = self.ng.wrapping_add(1),
            Outcome::Pending | Outcome::Unknown | Outcome::Fault | Outcome::Missed => {
                self.ng = self.ng.wrapping_add(1);
                self.errors = self.errors.wrapping_add(1);
            }
        }
        self.last = Some(part);
        self.time_min_ns = self.time_min_ns.min(took_ns);
        self.time_max_ns = self.time_max_ns.max(took_ns);
        self.time_sum_ns += u128::from(took_ns);
        self.timed += 1;
        Taken::Yes
    }

    /// Parts whose deadline passed without a verdict become rejects; each is shown to `missed`.
    pub fn expire(&mut self, now_ns: u64, mut missed: impl FnMut(&Part)) {
        for entry in self.slots.iter_mut().flatten() {
            if entry.outcome == Outcome::Pending && now_ns >= entry.deadline_ns {
                entry.outcome = Outcome::Missed;
                entry.reason = reason_code(Reason::DeadlineMissed);
                self.ng = self.ng.wrapping_add(1);
                self.errors = self.errors.wrapping_add(1);
                self.last = Some(entry.part);
                missed(entry);
            }
        }
    }

    /// The next moment at which [`expire`](Self::expire) has something to do.
    pub fn next_deadline_ns(&self) -> Option<u64> {
        self.slots.iter().flatten().filter(|entry| entry.outcome == Outcome::Pending).map(|entry| entry.deadline_ns).min()
    }

    /// A part, if it is still known.
    pub fn part(&self, part: PartId) -> Option<&Part> {
        self.slots.get(slot_of(part)).and_then(Option::as_ref).filter(|entry| entry.part == part)
    }

    /// The part in a slot.
    pub fn slot(&self, slot: usize) -> Option<&Part> {
        self.slots.get(slot).and_then(Option::as_ref)
    }

    /// The last part decided, if it is still known.
    pub fn last(&self) -> Option<&Part> {
        self.last.and_then(|part| self.part(part))
    }

    /// The PLC has the result in `slot`; `Some` with the part when that is news and a verdict (not a missed deadline) was told.
    pub fn tell(&mut self, slot: usize) -> Option<Part> {
        let entry = self.slots.get_mut(slot).and_then(Option::as_mut)?;
        if entry.told || entry.outcome == Outcome::Pending {
            return None;
        }
        entry.told = true;
        (entry.outcome != Outcome::Missed).then_some(*entry)
    }

    /// Slot of the last part decided.
    pub fn last_slot(&self) -> Option<usize> {
        self.last().map(|entry| slot_of(entry.part))
    }

    /// Set counters and times to 0; parts keep their results, and those that still wait for one are counted from here on.
    pub fn reset_counters(&mut self) {
        (self.triggers, self.ok, self.ng, self.errors) = (self.pending() as u32, 0, 0, 0);
        (self.time_min_ns, self.time_max_ns, self.time_sum_ns, self.timed) = (u64::MAX, 0, 0, 0);
    }

    /// Parts that wait for a verdict.
    pub fn pending(&self) -> usize {
        self.slots.iter().flatten().filter(|entry| entry.outcome == Outcome::Pending).count()
    }

    /// Write the discrete inputs and input registers as they are at `now_ns`.
    pub fn fill(&self, now_ns: u64, registers: &mut Registers) {
        let mut bits = Cells(&mut registers.discretes);
        bits.put(discrete::READY, self.host == HostState::Running);
        bits.put(discrete::STARTING, self.host == HostState::Starting);
        bits.put(discrete::STOPPED, self.host == HostState::Stopped);
        bits.put(discrete::CAMERA_FAULT, self.host == HostState::CameraFault);
        bits.put(discrete::INTERNAL_FAULT, self.host == HostState::InternalFault);
        bits.put(discrete::HEARTBEAT, now_ns / 1_000_000_000 % 2 == 1);
        let last = self.last();
        bits.put(discrete::RESULT_VALID, last.is_some());
        bits.put(discrete::LAST_OK, last.is_some_and(|part| part.outcome == Outcome::Ok));
        bits.put(discrete::LAST_NG, last.is_some_and(|part| part.outcome != Outcome::Ok));
        for (slot, entry) in self.slots.iter().enumerate() {
            bits.put(discrete::SLOTS + slot, entry.is_some_and(|part| part.outcome == Outcome::Ok));
        }
        let mut words = Cells(&mut registers.inputs);
        words.put(input::VERSION, MAP_VERSION);
        words.put(input::HOST_STATE, host_state_code(self.host));
        words.put2(input::LAST_PART, last.map_or(0, |part| part.part.0));
        words.put(input::LAST_RESULT, last.map_or(0, |part| part.outcome as u16));
        words.put(input::LAST_REASON, last.map_or(0, |part| u16::from(part.reason)));
        words.put(input::LAST_SCORE, scaled(last.map_or(f32::NAN, |part| part.score), 1e3));
        words.put(input::LAST_P, scaled(last.map_or(f32::NAN, |part| part.p_value), 1e4));
        words.put2(input::TRIGGERS, self.triggers);
        words.put2(input::OK, self.ok);
        words.put2(input::NG, self.ng);
        words.put2(input::ERRORS, self.errors);
        let average_ns = self.time_sum_ns.checked_div(u128::from(self.timed)).unwrap_or(0);
        words.put(input::TIME_MAX, tenths_ms(u128::from(self.time_max_ns)));
        words.put(input::TIME_MIN, if self.timed == 0 { 0 } else { tenths_ms(u128::from(self.time_min_ns)) });
        words.put(input::TIME_AVERAGE, tenths_ms(average_ns));
        words.put(input::PENDING, self.pending() as u16);
        for (slot, entry) in self.slots.iter().enumerate() {
            let value = entry.map_or(0, |part| (part.part.0 as u16 & 0xff) << 8 | part.outcome as u16);
            words.put(input::SLOTS + slot, value);
        }
    }
}

/// Bits or registers, written where they exist.
struct Cells<'a, T>(&'a mut [T]);

impl<T> Cells<'_, T> {
    fn put(&mut self, address: usize, value: T) {
        if let Some(cell) = self.0.get_mut(address) {
            *cell = value;
        }
    }
}

impl Cells<'_, u16> {
    /// High word first.
    fn put2(&mut self, address: usize, value: u32) {
        self.put(address, (value >> 16) as u16);
        self.put(address + 1, value as u16);
    }
}

/// The result registers that the master role writes, from [`holding::RESULT`] on.
pub fn result_registers(part: &Part, number: u16) -> [u16; holding::RESULT_COUNT] {
    [
        (part.part.0 >> 16) as u16,
        part.part.0 as u16,
        part.outcome as u16,
        u16::from(part.reason),
        scaled(part.score, 1e3),
        scaled(part.p_value, 1e4),
        number,
    ]
}

/// Two registers, high word first.
pub fn u32_from(registers: &[u16], address: usize) -> u32 {
    let word = |address: usize| registers.get(address).copied().map_or(0, u32::from);
    word(address) << 16 | word(address + 1)
}

/// Number of a state on the wire.
pub fn host_state_code(state: HostState) -> u16 {
    match state {
        HostState::Starting => 0,
        HostState::Running => 1,
        HostState::Stopped => 2,
        HostState::CameraFault => 3,
        HostState::InternalFault => 4,
    }
}

/// Number of a reason on the wire: the native bridge's plus 1, since 0 is a part without a verdict here.
pub fn reason_code(reason: Reason) -> u8 {
    crate::plc::bridge::reason_code(reason).saturating_add(1)
}

/// `value * scale`, rounded, at most 65534; 65535 for NaN and for anything larger or below 0.
fn scaled(value: f32, scale: f32) -> u16 {
    let scaled = (value * scale).round();
    if (0.0..65535.0).contains(&scaled) { scaled as u16 } else { u16::MAX }
}

/// Nanoseconds in 0.1 ms, at most 65535.
fn tenths_ms(ns: u128) -> u16 {
    u16::try_from(ns / 100_000).unwrap_or(u16::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::verdict::{Policy, decide, without_score};
    use proptest::prelude::*;

    fn accept() -> Verdict {
        decide(&Policy { false_reject_rate: 0.005 }, 1.5, 0.25)
    }

    fn registers(ledger: &Ledger, now_ns: u64) -> Registers {
        let mut registers = Registers::new();
        ledger.fill(now_ns, &mut registers);
        registers
    }

    #[test]
    fn a_part_reads_ok_only_with_its_own_accept_before_its_deadline() {
        let mut ledger = Ledger::default();
        ledger.trigger(PartId(70), 1_000, 2_000);
        let slot = 70 % SLOTS;
        assert_eq!(registers(&ledger, 0).inputs[input::SLOTS + slot], 70 << 8);
        assert!(!registers(&ledger, 0).discretes[discrete::SLOTS + slot]);
        assert_eq!(ledger.verdict(PartId(6), &accept(), 1_500, 1_500), Taken::UnknownPart, "same slot, other part");
        assert_eq!(ledger.verdict(PartId(70), &accept(), 1_500, 1_500), Taken::Yes);
        let r = registers(&ledger, 0);
        assert_eq!(r.inputs[input::SLOTS + slot], 70 << 8 | 1);
        assert!(r.discretes[discrete::SLOTS + slot] && r.discretes[discrete::LAST_OK] && !r.discretes[discrete::LAST_NG]);
        assert_eq!((r.inputs[input::LAST_SCORE], r.inputs[input::LAST_P]), (1500, 2500));

        ledger.trigger(PartId(71), 1_000, 2_000);
        assert_eq!(ledger.verdict(PartId(71), &accept(), 1_999, 2_000), Taken::Late, "decided in time, arrived too late");
        let r = registers(&ledger, 0);
        assert_eq!(r.inputs[input::LAST_RESULT], Outcome::Missed as u16);
        assert!(r.discretes[discrete::LAST_NG] && !r.discretes[discrete::LAST_OK]);
        assert_eq!(r.inputs[input::LAST_SCORE], u16::MAX);
    }

    #[test]
    fn times_are_in_tenths_of_a_millisecond() {
        let mut ledger = Ledger::default();
        for (part, ms) in [(1, 10u64), (2, 30), (3, 20)] {
            ledger.trigger(PartId(part), 0, u64::MAX);
            ledger.verdict(PartId(part), &accept(), ms * 1_000_000, ms * 1_000_000);
        }
        let r = registers(&ledger, 0);
        assert_eq!((r.inputs[input::TIME_MAX], r.inputs[input::TIME_MIN], r.inputs[input::TIME_AVERAGE]), (300, 100, 200));
        ledger.reset_counters();
        let r = registers(&ledger, 0);
        assert_eq!((r.inputs[input::TIME_MAX], r.inputs[input::TIME_MIN], r.inputs[input::TIME_AVERAGE]), (0, 0, 0));
        assert_eq!(r.inputs[input::TRIGGERS + 1], 0);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Trigger(u32),
        Accept(u32),
        Fault(u32),
        Wait(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0u32..200).prop_map(Step::Trigger),
            (0u32..200).prop_map(Step::Accept),
            (0u32..200).prop_map(Step::Fault),
            (0u64..300).prop_map(Step::Wait),
        ]
    }

    proptest! {
        /// Against the plainest model: a list of all announcements. No slot ever reads OK without an accept for the newest announcement of
        /// that very part, given before its deadline; and the counters add up.
        #[test]
        fn no_ok_without_an_accept_in_time(steps in proptest::collection::vec(step(), 0..300)) {
            const DEADLINE: u64 = 500;
            let mut ledger = Ledger::default();
            let mut announced: Vec<(u32, u64, Option<bool>)> = Vec::new(); // part, when, Some(accepted) once decided in time
            let mut now = 0u64;
            for step in steps {
                match step {
                    Step::Wait(ns) => now += ns,
                    Step::Trigger(part) => {
                        ledger.expire(now, |_| {});
                        ledger.trigger(PartId(part), now, now + DEADLINE);
                        announced.push((part, now, None));
                    }
                    Step::Accept(part) | Step::Fault(part) => {
                        let good = matches!(step, Step::Accept(_));
                        let verdict = if good { accept() } else { without_score(Reason::ModelError) };
                        ledger.verdict(PartId(part), &verdict, now, now);
                        let newest_in_slot = announced.iter_mut().rev().find(|(p, ..)| *p as usize % SLOTS == part as usize % SLOTS);
                        if let Some((p, when, decided)) = newest_in_slot
                            && *p == part && decided.is_none() && now < *when + DEADLINE
                        {
                            *decided = Some(good);
                        }
                    }
                }
                ledger.expire(now, |_| {});
                let r = registers(&ledger, now);
                for slot in 0..SLOTS {
                    let newest = announced.iter().rev().find(|(p, ..)| *p as usize % SLOTS == slot);
                    let good = newest.is_some_and(|(.., decided)| *decided == Some(true));
                    prop_assert_eq!(r.discretes[discrete::SLOTS + slot], good);
                    prop_assert_eq!(r.inputs[input::SLOTS + slot] & 0xff == Outcome::Ok as u16, good);
                }
                let count = |address| u32_from(&r.inputs, address);
                prop_assert_eq!(count(input::TRIGGERS), announced.len() as u32);
                prop_assert_eq!(count(input::OK) + count(input::NG) + u32::from(r.inputs[input::PENDING]), announced.len() as u32);
                prop_assert!(count(input::ERRORS) <= count(input::NG));
                prop_assert!(!(r.discretes[discrete::LAST_OK] && r.discretes[discrete::LAST_NG]));
            }
        }
    }
}
