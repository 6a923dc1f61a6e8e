//! What host and board do, case by case, over a wire that the test holds in its hands.

use firmware_bridge::board::{Board, BoardConfig, BoardEvent, Outputs};
use firmware_bridge::host::{HostConfig, HostError, HostEvent, HostSession, Link};
use firmware_bridge::parameters::{Expected, Field, Gate, Parameters, SafeState, Unit};
use firmware_bridge::schedule::{Fate, Outcome};
use firmware_bridge::wire::{BoardState, Command, Decision, FaultCode, HostState, Output, Request, Status};

/// 1 ms, the step of the tests' time.
const MS: u64 = 1_000;

struct Pair {
    now: u64,
    encoder: u32,
    board: Board,
    host: HostSession,
    out: Outputs,
    board_events: Vec<BoardEvent>,
    host_events: Vec<HostEvent>,
    /// Cut the wire in one direction.
    to_board_cut: bool,
    to_host_cut: bool,
    /// What the host said last.
    last_to_board: Vec<u8>,
}

impl Pair {
    fn with(board: BoardConfig, host: HostConfig) -> Self {
        let now = 5_000_000;
        let mut board = Board::new(board, 11, now).unwrap();
        let out = board.poll(now, 0, &mut |_| {});
        Self {
            now,
            encoder: 0,
            board,
            host: HostSession::new(host, 22, now),
            out,
            board_events: Vec::new(),
            host_events: Vec::new(),
            to_board_cut: false,
            to_host_cut: false,
            last_to_board: Vec::new(),
        }
    }

    fn new(parameters: Parameters) -> Self {
        let expected = Expected { deadline_ms: parameters.deadline_ms, watchdog_ms: parameters.watchdog_ms, ..Expected::default() };
        Self::with(BoardConfig { parameters, ..BoardConfig::default() }, HostConfig { expected, ..HostConfig::default() })
    }

    /// Connected, running, and what may have lain on the belt is past the gate.
    fn running(parameters: Parameters) -> Self {
        let mut pair = Self::new(parameters);
        pair.host.set_state(pair.now, HostState::Running);
        pair.steps(20);
        pair.encoder = pair.encoder.wrapping_add(parameters.gate.distance + parameters.gate.duration);
        pair.steps(1_000);
        assert_eq!(pair.board.state(), BoardState::Running);
        assert!(!pair.out.reject && !pair.out.line_stop);
        pair
    }

    fn steps(&mut self, n: u64) {
        for _ in 0..n {
            self.now += MS;
            self.exchange();
        }
    }

    fn exchange(&mut self) {
        let said = self.host.output().to_vec();
        self.host.consume(said.len());
        if !self.to_board_cut {
            self.board.on_bytes(self.now, &said, &mut |e| self.board_events.push(e));
        }
        if !said.is_empty() {
            self.last_to_board = said;
        }
        self.out = self.board.poll(self.now, self.encoder, &mut |e| self.board_events.push(e));
        let said = self.board.output().to_vec();
        self.board.consume(said.len());
        if !self.to_host_cut {
            self.host.on_bytes(self.now, &said, &mut |e| self.host_events.push(e));
        }
        self.host.poll(self.now, &mut |e| self.host_events.push(e));
    }

    fn trigger(&mut self) -> u32 {
        let part = self.board.on_trigger(self.now, self.encoder);
        self.exchange();
        part
    }

    fn verdict(&mut self, part: u32, decision: Decision) {
        self.host.verdict(self.now, part, decision, 0, 0.5).unwrap();
        self.exchange();
        self.exchange();
    }

    fn gate_of(&self, part: u32) -> Option<(Outcome, Fate)> {
        self.board_events.iter().find_map(|event| match event {
            BoardEvent::AtGate(gate) if gate.part == part => Some((gate.outcome, gate.fate)),
            _ => None,
        })
    }

    fn status_of(&self, part: u32) -> Option<Status> {
        self.host_events.iter().rev().find_map(|event| match event {
            HostEvent::Acknowledged { part: p, status, .. } if *p == part => Some(*status),
            _ => None,
        })
    }

    fn refused(&self) -> Option<(Field, u32, u32)> {
        self.host_events.iter().find_map(|event| match event {
            HostEvent::Link(Link::Refused(m)) => Some((m.field, m.ours, m.theirs)),
            _ => None,
        })
    }
}

fn time_line() -> Parameters {
    Parameters {
        deadline_ms: 100,
        watchdog_ms: 200,
        safe_state: SafeState::RejectAll,
        gate: Gate { unit: Unit::Time, distance: 200_000, lead: 10_000, duration: 20_000, merge_gap: 0 },
    }
}

fn ticks_line() -> Parameters {
    Parameters { gate: Gate { unit: Unit::Ticks, distance: 1_000, lead: 50, duration: 100, merge_gap: 0 }, ..time_line() }
}

#[test]
fn a_part_goes_where_its_verdict_says() {
    for (decision, wanted) in [
        (Decision::Accept, (Outcome::Accepted, Fate::Accept)),
        (Decision::Reject, (Outcome::Rejected, Fate::Reject(Decision::Reject))),
        (Decision::Unknown, (Outcome::Rejected, Fate::Reject(Decision::Unknown))),
        (Decision::Fault, (Outcome::Rejected, Fate::Reject(Decision::Fault))),
    ] {
        let mut pair = Pair::running(time_line());
        let part = pair.trigger();
        pair.verdict(part, decision);
        assert_eq!(pair.status_of(part), Some(Status::Taken));
        pair.steps(300);
        assert_eq!(pair.gate_of(part), Some(wanted));
    }
}

#[test]
fn no_verdict_by_the_deadline_is_a_counted_reject_and_a_later_accept_is_too_late() {
    let mut pair = Pair::running(time_line());
    let part = pair.trigger();
    pair.steps(101);
    assert_eq!(pair.board.counters().missed, 1);
    pair.verdict(part, Decision::Accept);
    assert_eq!(pair.status_of(part), Some(Status::TooLate));
    pair.steps(300);
    assert_eq!(pair.gate_of(part), Some((Outcome::Rejected, Fate::Missed)));
}

#[test]
fn a_belt_faster_than_the_deadline_decides_at_the_point_of_no_return() {
    let mut pair = Pair::running(ticks_line());
    let part = pair.trigger();
    pair.encoder += 950;
    pair.steps(1);
    assert_eq!(pair.board.counters().missed, 1);
    assert!(pair.out.reject);
    pair.verdict(part, Decision::Accept);
    assert_eq!(pair.status_of(part), Some(Status::TooLate));
}

#[test]
fn a_later_reject_overrides_an_accept_and_never_the_reverse() {
    let mut pair = Pair::running(time_line());
    let (first, second) = (pair.trigger(), {
        pair.steps(40);
        pair.trigger()
    });
    pair.verdict(first, Decision::Accept);
    pair.verdict(first, Decision::Reject);
    pair.verdict(second, Decision::Reject);
    pair.verdict(second, Decision::Accept);
    pair.steps(300);
    assert_eq!(pair.gate_of(first), Some((Outcome::Rejected, Fate::Reject(Decision::Reject))));
    assert_eq!(pair.gate_of(second), Some((Outcome::Rejected, Fate::Reject(Decision::Reject))));
}

#[test]
fn near_rejects_are_merged_and_far_ones_are_not() {
    for (gap_us, merged) in [(15_000, true), (4_000, false)] {
        let mut parameters = time_line();
        parameters.gate.merge_gap = gap_us;
        let mut pair = Pair::running(parameters);
        // Windows of 20 ms, 30 ms apart: 10 ms between them.
        let first = pair.trigger();
        pair.verdict(first, Decision::Reject);
        pair.steps(30);
        let second = pair.trigger();
        pair.verdict(second, Decision::Reject);
        let mut seen = Vec::new();
        for _ in 0..260 {
            pair.steps(1);
            if seen.last() != Some(&pair.out.reject) {
                seen.push(pair.out.reject);
            }
        }
        let wanted: &[bool] = if merged { &[false, true, false] } else { &[false, true, false, true, false] };
        assert_eq!(seen, wanted, "gap {gap_us}");
    }
}

#[test]
fn a_mismatch_is_refused_by_name_with_both_values() {
    let board = BoardConfig { parameters: time_line(), ..BoardConfig::default() };
    let good = Expected { deadline_ms: 100, watchdog_ms: 200, ..Expected::default() };
    let host = HostConfig { expected: good, ..HostConfig::default() };
    for (config, wanted) in [
        (HostConfig { expected: Expected { deadline_ms: 90, ..good }, ..host }, (Field::DeadlineMs, 90, 100)),
        (HostConfig { expected: Expected { watchdog_ms: 300, ..good }, ..host }, (Field::WatchdogMs, 300, 200)),
        (HostConfig { expected: Expected { safe_state: Some(SafeState::StopLine), ..good }, ..host }, (Field::SafeState, 2, 1)),
        (
            HostConfig { expected: Expected { gate: Some(Gate { lead: 9, ..time_line().gate }), ..good }, ..host },
            (Field::GateLead, 9, 10_000),
        ),
        (HostConfig { codename: 5, ..host }, (Field::Codename, 5, 0x6375_6c6c)),
        (HostConfig { versions: (2, 3), ..host }, (Field::Version, 3, 1)),
    ] {
        let mut pair = Pair::with(board, config);
        pair.steps(3_000);
        assert_eq!(pair.refused(), Some(wanted));
        assert_eq!(pair.board.state(), BoardState::NotReady);
        assert!(pair.out.reject);
        // Said once, though it is tried again every second.
        let times = pair.host_events.iter().filter(|e| matches!(e, HostEvent::Link(_))).count();
        assert_eq!(times, 1, "{:?}", pair.host_events);
        assert!(pair.board_events.iter().any(|e| matches!(e, BoardEvent::Refused(_))));
    }
}

#[test]
fn versions_are_negotiated_downwards() {
    let mut pair =
        Pair::with(BoardConfig { versions: (1, 4), ..BoardConfig::default() }, HostConfig { versions: (1, 3), ..HostConfig::default() });
    pair.steps(50);
    assert_eq!(pair.board.state(), BoardState::Running);
}

#[test]
fn a_dead_host_latches_the_safe_state_until_an_explicit_clear() {
    let mut pair = Pair::running(time_line());
    let accepted = pair.trigger();
    pair.verdict(accepted, Decision::Accept);
    pair.to_board_cut = true;
    pair.steps(220);
    assert_eq!((pair.board.state(), pair.board.faults()), (BoardState::Safe, FaultCode::HostDead.bit()));
    assert!(pair.out.reject, "everything is rejected");
    assert!(!pair.board.clear(pair.now), "no clear without a host");
    pair.to_board_cut = false;
    pair.steps(2_000);
    assert_eq!(pair.board.state(), BoardState::Safe, "a new session alone does not clear");
    assert!(pair.out.reject);
    pair.host.request(pair.now, Request::Clear).unwrap();
    assert_eq!(pair.host.request(pair.now, Request::Clear), Err(HostError::Busy));
    pair.steps(3);
    assert!(pair.host_events.contains(&HostEvent::Answer { request: Request::Clear, status: Status::Taken }));
    assert_eq!(pair.board.state(), BoardState::Running);
    assert!(!pair.out.reject);
}

#[test]
fn a_dead_board_is_noticed_by_the_host() {
    let mut pair = Pair::running(time_line());
    let part = pair.trigger();
    pair.to_host_cut = true;
    pair.host.verdict(pair.now, part, Decision::Accept, 0, 0.0).unwrap();
    pair.steps(201);
    assert!(pair.host_events.contains(&HostEvent::Link(Link::Lost)));
    assert!(pair.host_events.contains(&HostEvent::Unacknowledged { part }));
    assert_eq!(pair.host.verdict(pair.now, part, Decision::Accept, 0, 0.0), Err(HostError::LinkDown));
}

/// A buffer full of heartbeats that arrives bit by bit after the host died must not keep it alive.
#[test]
fn heartbeats_held_back_do_not_feed_the_watchdog() {
    let mut pair = Pair::running(time_line());
    let mut held = Vec::new();
    // The board's words still reach the host; the host's are held back.
    for _ in 0..150 {
        pair.now += MS;
        let said = pair.host.output().to_vec();
        pair.host.consume(said.len());
        if !said.is_empty() {
            held.push(said);
        }
        pair.board.poll(pair.now, 0, &mut |_| {});
        let said = pair.board.output().to_vec();
        pair.board.consume(said.len());
        pair.host.on_bytes(pair.now, &said, &mut |_| {});
        pair.host.poll(pair.now, &mut |_| {});
    }
    assert!(held.len() >= 5);
    // The host is dead from here on; its heartbeats come out one every 40 ms, each a valid frame in the right order.
    let died = pair.now;
    for heartbeat in held {
        pair.board.on_bytes(pair.now, &heartbeat, &mut |e| pair.board_events.push(e));
        for _ in 0..40 {
            pair.now += MS;
            pair.board.poll(pair.now, 0, &mut |e| pair.board_events.push(e));
        }
        if pair.board.state() == BoardState::Safe {
            break;
        }
    }
    assert_eq!(pair.board.state(), BoardState::Safe);
    assert!(pair.now - died <= 201 * MS, "{} ms", (pair.now - died) / MS);
    assert_eq!(pair.board.counters().bad_frames, 0, "the frames were good, only old");
}

#[test]
fn goodbye_makes_the_board_not_ready_without_a_latch() {
    let mut pair = Pair::running(time_line());
    pair.host.goodbye(pair.now);
    pair.steps(500);
    assert_eq!((pair.board.state(), pair.board.faults()), (BoardState::NotReady, 0));
    assert!(pair.out.reject);
    pair.host.restart(pair.now);
    pair.steps(500);
    assert_eq!(pair.board.state(), BoardState::Running);
    assert!(!pair.out.reject);
}

/// A hello held back by a buffer, from before the session or from a dead host's, must not end a running session.
#[test]
fn an_old_hello_does_not_end_a_session() {
    let mut fresh = Pair::new(time_line());
    fresh.exchange();
    let mut old = HostSession::new(HostConfig::default(), 99, 0);
    old.poll(0, &mut |_| {});
    let stale = [old.output().to_vec(), fresh.last_to_board.clone()];
    fresh.host.set_state(fresh.now, HostState::Running);
    fresh.steps(1_000);
    let part = fresh.trigger();
    for hello in stale {
        assert!(!hello.is_empty());
        fresh.board.on_bytes(fresh.now, &hello, &mut |_| {});
    }
    fresh.verdict(part, Decision::Accept);
    assert_eq!(fresh.status_of(part), Some(Status::Taken));
    fresh.steps(1_500);
    assert_eq!(fresh.board.state(), BoardState::Running);
    assert_eq!(fresh.gate_of(part).map(|(outcome, _)| outcome), Some(Outcome::Accepted));
}

#[test]
fn a_part_of_an_earlier_session_takes_no_verdict() {
    let mut pair = Pair::running(time_line());
    let part = pair.trigger();
    pair.host.restart(pair.now);
    pair.steps(10);
    assert_eq!(pair.board.state(), BoardState::Running);
    assert_eq!(pair.host.verdict(pair.now, part, Decision::Accept, 0, 0.0), Err(HostError::UnknownPart));
    pair.steps(300);
    assert_eq!(pair.gate_of(part), Some((Outcome::Rejected, Fate::Missed)));
}

#[test]
fn the_sixty_fifth_part_is_held_at_the_gate_and_latches_a_fault() {
    let mut pair = Pair::running(time_line());
    let mut last = 0;
    for _ in 0..65 {
        last = pair.trigger();
        if pair.board.faults() == 0 {
            pair.host.verdict(pair.now, last, Decision::Accept, 0, 0.0).unwrap();
        }
        pair.steps(1);
    }
    let at = pair.now;
    assert_eq!(pair.board.faults(), FaultCode::TooManyParts.bit());
    pair.host.request(pair.now, Request::Clear).unwrap();
    pair.steps(4);
    assert_eq!(pair.board.state(), BoardState::Running);
    // Cleared, but the untracked part is still on the belt: held until it is past the gate, 200 ms behind the sensor.
    while pair.now < at + 205 * MS {
        assert!(pair.out.reject, "released {} ms after part {last} was at the sensor", (pair.now - at) / MS);
        pair.steps(1);
    }
    pair.steps(20);
    assert!(!pair.out.reject);
}

#[test]
fn a_firmware_that_polls_too_late_is_caught() {
    let mut pair = Pair::running(time_line());
    let part = pair.trigger();
    pair.verdict(part, Decision::Reject);
    pair.now += 250 * MS;
    pair.exchange();
    assert_eq!(pair.gate_of(part).map(|(outcome, _)| outcome), Some(Outcome::Leaked));
    assert!(pair.board.faults() & FaultCode::PolledTooLate.bit() != 0);
    assert!(pair.out.reject, "the safe state is at the actuator at once");
    assert_eq!(pair.board.counters().leaked, 1);
}

#[test]
fn a_dead_encoder_is_caught_at_the_next_edge() {
    let mut pair = Pair::running(ticks_line());
    let part = pair.trigger();
    pair.verdict(part, Decision::Accept);
    pair.steps(50);
    pair.trigger();
    assert_eq!(pair.board.faults(), FaultCode::EncoderDead.bit());
    assert!(pair.out.reject, "positions cannot be trusted: held, whatever the safe state is configured to");
    pair.host.request(pair.now, Request::Clear).unwrap();
    pair.steps(5);
    assert!(pair.out.reject, "cleared, but what lies on the belt is untracked");
    pair.encoder += 1_100;
    pair.steps(2);
    assert!(!pair.out.reject);
}

#[test]
fn the_bounce_of_one_edge_is_a_part_too_many_and_no_fault() {
    let mut pair = Pair::running(ticks_line());
    pair.trigger();
    pair.steps(2);
    pair.trigger();
    assert_eq!(pair.board.faults(), 0);
}

/// Found by `random_line`: the hold was measured from the position of the last poll, up to a heartbeat ago, and ended before the last part on the
/// belt had passed.
#[test]
fn a_stopped_line_without_encoder_is_held_for_the_whole_way_after_it_starts_again() {
    let mut parameters = time_line();
    parameters.safe_state = SafeState::StopLine;
    let mut pair = Pair::running(parameters);
    pair.to_board_cut = true;
    pair.steps(300);
    assert!(pair.out.line_stop);
    pair.to_board_cut = false;
    pair.steps(400);
    // The board's clock runs on between two polls; the clear comes just before the second.
    pair.host.request(pair.now, Request::Clear).unwrap();
    pair.now += 60 * MS;
    pair.exchange();
    assert!(!pair.out.line_stop, "the belt starts now");
    let started = pair.now;
    while pair.now < started + 205 * MS {
        assert!(pair.out.reject, "released {} ms after the belt started", (pair.now - started) / MS);
        pair.steps(1);
    }
    pair.steps(20);
    assert!(!pair.out.reject);
}

/// Found by `random_line`: the part's gate time, as the clock has it, fell between the last poll before the belt started and the first after it.
#[test]
fn a_part_accepted_before_the_line_stopped_is_rejected_and_not_called_leaked() {
    let mut parameters = time_line();
    parameters.safe_state = SafeState::StopLine;
    parameters.watchdog_ms = 100;
    parameters.gate.distance = 400_000;
    let mut pair = Pair::running(parameters);
    let seen = pair.now;
    let part = pair.trigger();
    pair.verdict(part, Decision::Accept);
    pair.to_board_cut = true;
    pair.steps(110);
    assert!(pair.out.line_stop);
    pair.to_board_cut = false;
    while pair.now < seen + 380 * MS {
        pair.steps(1);
    }
    assert!(pair.gate_of(part).is_none());
    pair.host.request(pair.now, Request::Clear).unwrap();
    pair.now += 40 * MS;
    pair.exchange();
    assert!(!pair.out.line_stop);
    assert_eq!(pair.gate_of(part).map(|(outcome, _)| outcome), Some(Outcome::Rejected));
    assert_eq!((pair.board.counters().leaked, pair.board.faults()), (0, 0));
}

#[test]
fn outputs_are_exercised_only_while_nothing_runs() {
    let mut pair = Pair::running(time_line());
    let ask = Request::Exercise { output: Output::Reject, duration_ms: 50 };
    pair.host.request(pair.now, ask).unwrap();
    pair.steps(3);
    assert!(pair.host_events.contains(&HostEvent::Answer { request: ask, status: Status::Refused }));
    assert!(!pair.out.reject);
    pair.host.set_state(pair.now, HostState::Stopped);
    pair.steps(3);
    pair.host.request(pair.now, ask).unwrap();
    pair.steps(3);
    assert!(pair.host_events.contains(&HostEvent::Answer { request: ask, status: Status::Taken }));
    assert!(pair.out.reject);
    pair.steps(60);
    assert!(!pair.out.reject);
}

#[test]
fn commands_of_the_plc_arrive_once_and_in_order_over_a_bad_wire() {
    let mut pair = Pair::running(time_line());
    pair.host_events.clear();
    pair.to_host_cut = true;
    let commands = [Command::Stop, Command::Recipe(7), Command::GoldenCheck, Command::Start];
    for command in commands {
        assert!(pair.board.command(pair.now, command));
    }
    assert!(!pair.board.command(pair.now, Command::Pause), "a full queue says so");
    pair.steps(60);
    pair.to_host_cut = false;
    pair.steps(100);
    let got: Vec<Command> = pair.host_events.iter().filter_map(|e| if let HostEvent::Command(c) = e { Some(*c) } else { None }).collect();
    assert_eq!(got, commands);
}

#[test]
fn a_stuck_port_loses_nothing_that_matters() {
    let mut pair = Pair::running(time_line());
    // The board's bytes are not taken for a while, with more to say than its outbox holds.
    let parts: Vec<u32> = (0..40)
        .map(|_| {
            pair.now += MS;
            let part = pair.board.on_trigger(pair.now, 0);
            pair.board.poll(pair.now, 0, &mut |_| {});
            part
        })
        .collect();
    pair.host_events.clear();
    pair.steps(40);
    let announced: Vec<u32> =
        pair.host_events.iter().filter_map(|e| if let HostEvent::Trigger(t) = e { Some(t.part) } else { None }).collect();
    assert_eq!(announced, parts);
}

#[test]
fn the_deadline_given_to_the_host_is_the_boards() {
    let mut pair = Pair::running(time_line());
    let at = pair.now;
    pair.trigger();
    let deadline = pair.host_events.iter().find_map(|e| if let HostEvent::Trigger(t) = e { Some(t.deadline_us) } else { None });
    // Same clock on both sides of this wire, which takes no time.
    assert!(deadline.is_some_and(|d| d <= at + 100 * MS && d >= at + 97 * MS), "{deadline:?}, trigger at {at}");
}
