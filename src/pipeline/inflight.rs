//! The table of parts in flight: what keeps verdicts in part order and sends each off before its deadline. Pure: no I/O, no clock, no
//! threads; time comes in as a value. Its capacity is fixed, so it never allocates after construction.

use crate::frame::PartId;
use std::collections::VecDeque;

/// Parts under inspection, in the order in which they were announced.
///
/// Rules, in this order at every [`InFlight::release`]:
/// 1. the oldest part goes as soon as it is completed (part order);
/// 2. a part whose time has come goes whatever stands before it: with its result if that is there, else expired.
///
/// So a stuck part holds up those behind it until its own deadline or theirs, whichever comes first.
pub(crate) struct InFlight<T> {
    entries: VecDeque<Entry<T>>,
    capacity: usize,
}

struct Entry<T> {
    ticket: u64,
    part: Option<PartId>,
    announced_ns: u64,
    due_ns: u64,
    state: State<T>,
}

enum State<T> {
    Waiting,
    Completed(T),
    Gone,
}

/// A part that leaves the table.
#[derive(Debug, PartialEq)]
pub(crate) struct Release<T> {
    /// The pipeline's own number of the part; never used twice, unlike the board's.
    pub ticket: u64,
    /// The board's number.
    pub part: Option<PartId>,
    /// When it was announced.
    pub announced_ns: u64,
    /// Its result, or `None`: the time came before a result did.
    pub result: Option<T>,
}

/// The table holds as many parts as it can.
#[derive(Debug, PartialEq)]
pub(crate) struct Full;

impl<T> InFlight<T> {
    /// A table for `capacity` parts, allocated now.
    pub fn new(capacity: usize) -> Self {
        Self { entries: VecDeque::with_capacity(capacity), capacity }
    }

    /// Parts in the table, those included that went out of order and wait for the ones before them.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Take a part in. Tickets must grow from call to call; `due_ns` is when it must leave at the latest.
    pub fn announce(&mut self, ticket: u64, part: Option<PartId>, announced_ns: u64, due_ns: u64) -> Result<(), Full> {
        if self.entries.len() >= self.capacity {
            return Err(Full);
        }
        self.entries.push_back(Entry { ticket, part, announced_ns, due_ns, state: State::Waiting });
        Ok(())
    }

    /// A part's result has come. Gives the result back when the part has left already or was never announced: it came too late.
    pub fn complete(&mut self, ticket: u64, result: T) -> Result<(), T> {
        match self.entries.iter_mut().find(|e| e.ticket == ticket) {
            Some(entry) if matches!(entry.state, State::Waiting) => {
                entry.state = State::Completed(result);
                Ok(())
            }
            _ => Err(result),
        }
    }

    /// True when `ticket` is in the table and waits for its result.
    pub fn waits_for(&self, ticket: u64) -> bool {
        self.entries.iter().any(|e| e.ticket == ticket && matches!(e.state, State::Waiting))
    }

    /// Whether the board's part `part` is in the table and has not left.
    pub fn holds(&self, part: PartId) -> bool {
        self.entries.iter().any(|e| e.part == Some(part) && !matches!(e.state, State::Gone))
    }

    /// Let every part that still waits be due at once (the link broke, or the line is shut down).
    pub fn expire_all(&mut self) {
        for entry in &mut self.entries {
            if matches!(entry.state, State::Waiting) {
                entry.due_ns = 0;
            }
        }
    }

    /// When [`InFlight::release`] has to be asked next, if nothing is completed before.
    pub fn next_due_ns(&self) -> Option<u64> {
        self.entries.iter().filter(|e| !matches!(e.state, State::Gone)).map(|e| e.due_ns).min()
    }

    /// The next part that may leave at `now_ns`, or `None`. Ask until it says `None`.
    pub fn release(&mut self, now_ns: u64) -> Option<Release<T>> {
        while let Some(Entry { state: State::Gone, .. }) = self.entries.front() {
            self.entries.pop_front();
        }
        if matches!(self.entries.front(), Some(Entry { state: State::Completed(_), .. })) {
            return self.entries.pop_front().map(Entry::into_release);
        }
        let due = self.entries.iter_mut().find(|e| e.due_ns <= now_ns && !matches!(e.state, State::Gone))?;
        let state = std::mem::replace(&mut due.state, State::Gone);
        Some(Entry { state, ..*due }.into_release())
    }
}

impl<T> Entry<T> {
    fn into_release(self) -> Release<T> {
        let result = match self.state {
            State::Completed(result) => Some(result),
            State::Waiting | State::Gone => None,
        };
        Release { ticket: self.ticket, part: self.part, announced_ns: self.announced_ns, result }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn drain(table: &mut InFlight<u32>, now: u64) -> Vec<(u64, Option<u32>)> {
        std::iter::from_fn(|| table.release(now)).map(|r| (r.ticket, r.result)).collect()
    }

    #[test]
    fn results_leave_in_part_order() {
        let mut table = InFlight::new(4);
        for ticket in 0..3 {
            table.announce(ticket, Some(PartId(ticket as u32)), 0, 100).unwrap();
        }
        table.complete(2, 22).unwrap();
        table.complete(1, 11).unwrap();
        assert_eq!(drain(&mut table, 1), []);
        table.complete(0, 0).unwrap();
        assert_eq!(drain(&mut table, 1), [(0, Some(0)), (1, Some(11)), (2, Some(22))]);
        assert_eq!(table.len(), 0);
    }

    #[test]
    fn a_stuck_part_expires_at_its_own_deadline_and_lets_the_others_go() {
        let mut table = InFlight::new(4);
        table.announce(0, None, 0, 100).unwrap();
        table.announce(1, None, 0, 200).unwrap();
        table.complete(1, 11).unwrap();
        assert_eq!(table.next_due_ns(), Some(100));
        assert_eq!(drain(&mut table, 99), []);
        assert_eq!(drain(&mut table, 100), [(0, None), (1, Some(11))]);
        assert_eq!(table.complete(0, 1), Err(1), "a result after the deadline is handed back");
    }

    #[test]
    fn a_part_behind_a_stuck_one_goes_at_its_own_deadline_with_its_result() {
        let mut table = InFlight::new(4);
        table.announce(0, None, 0, 500).unwrap();
        table.announce(1, None, 0, 200).unwrap();
        table.complete(1, 11).unwrap();
        assert_eq!(drain(&mut table, 200), [(1, Some(11))]);
        assert_eq!(table.complete(0, 5), Ok(()));
        assert_eq!(drain(&mut table, 201), [(0, Some(5))]);
        assert_eq!(table.len(), 0);
    }

    #[test]
    fn a_full_table_says_so() {
        let mut table = InFlight::<u32>::new(1);
        table.announce(0, None, 0, 10).unwrap();
        assert_eq!(table.announce(1, None, 0, 10), Err(Full));
    }

    proptest! {
        /// Under any order of announcements, results and clock steps, every part leaves exactly once; with its result only if that came
        /// in time; never after its deadline; and in order unless a deadline forced it out.
        #[test]
        fn every_part_leaves_exactly_once(steps in proptest::collection::vec((0u8..4, 0u64..40, 0usize..16), 1..300)) {
            const CAPACITY: usize = 8;
            let mut table = InFlight::<u64>::new(CAPACITY);
            let (mut now, mut next) = (0u64, 0u64);
            let mut due = std::collections::HashMap::new();
            let mut completed = std::collections::HashSet::new();
            let mut left = Vec::new();
            let mut collect = |table: &mut InFlight<u64>, now: u64, due: &std::collections::HashMap<u64, u64>,
                               completed: &std::collections::HashSet<u64>| {
                while let Some(r) = table.release(now) {
                    prop_assert_eq!(r.result, completed.contains(&r.ticket).then_some(r.ticket * 3));
                    prop_assert!(r.result.is_some() || due[&r.ticket] <= now, "expired early");
                    prop_assert!(!left.contains(&r.ticket), "left twice");
                    left.push(r.ticket);
                }
                for (ticket, due) in due {
                    prop_assert!(*due > now || left.contains(ticket), "part {} overdue", ticket);
                }
                Ok(())
            };
            for (what, amount, pick) in steps {
                match what {
                    0 | 1 => {
                        if table.announce(next, None, now, now + amount).is_ok() {
                            due.insert(next, now + amount);
                        } else {
                            prop_assert!(table.len() >= CAPACITY);
                        }
                        next += 1;
                    }
                    2 => {
                        let ticket = next.saturating_sub(1 + pick as u64);
                        if table.complete(ticket, ticket * 3).is_ok() {
                            completed.insert(ticket);
                        }
                    }
                    _ => now += amount,
                }
                collect(&mut table, now, &due, &completed)?;
            }
            now += 1000;
            collect(&mut table, now, &due, &completed)?;
            prop_assert_eq!(table.len(), 0);
        }
    }
}
