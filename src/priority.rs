//! Real-time priority, and one processor, for the threads that a verdict goes through: verdict stage, link, its reader.
//!
//! They work microseconds per part, and a fair scheduler makes a waking thread wait for the slices of inference threads (measured at a load of 18
//! on two cores: p99 4 ms at nice -15, 0.1 ms real-time). All of them have the *same* priority: SCHED_FIFO never takes the processor from one
//! of them for another, so none is stopped half-way through handing a message to the next. A sender of ordinary priority is: the receiver
//! that it wakes takes the processor while the sender still holds the queue's lock, and then waits for it (measured in `cull demo`: 1.5 to
//! 3.7 ms at p99). What ordinary threads hand to a real-time one goes through [`crate::wake`] for that reason.
//!
//! And they share one processor. A thread that is woken on another one waits until that gets to it: a kernel without preemption finishes what
//! it is at there, and a virtual processor may not even be running (both seen in `sched_switch` traces: 1 to 50 ms while the sender's own processor
//! was free to go on). On the sender's processor it runs as soon as the sender sleeps, some 50 us later. In six pairs of `cull demo` on
//! a loaded virtual machine 33 of 2629 verdicts took longer than 1 ms to the kernel without this, and 1 of 2376 with it. Their home is the last
//! processor that the process may use: interrupts usually go to the first, fast cores usually have the high numbers, and one that is isolated
//! for somebody else's real-time program (`isolcpus`, or `CPUAffinity=` in the unit) is not among them.
//!
//! This module knows threads and nothing of what they do.

use rustix::thread::{CpuSet, Pid, sched_getaffinity, sched_setaffinity};
use std::io;
use std::process::{Command, Stdio};

/// Priority of all of them. Low among real-time priorities, so that the kernel's interrupt threads (50) stay above it.
const FIFO_PRIORITY: &str = "10";
/// Sets it. A system call that neither `rustix` nor `nix` has; util-linux is on every Debian, and `unsafe` stays where it belongs.
const CHRT: &str = "/usr/bin/chrt";
/// Nice value where real-time priority is not allowed (it takes CAP_SYS_NICE or the systemd unit's `LimitRTPRIO`); its `LimitNICE` is the same.
const NICE: i32 = -10;

/// Let the calling thread go before ordinary ones: SCHED_FIFO on the common processor, or a better nice value on any where that is not allowed,
/// or else nothing. Returns at once; the real-time priority comes some milliseconds later. Threads and processes started by this thread do not
/// inherit it: each that needs it asks for itself, so that none depends on when its parent got it. The processor they do inherit: a
/// thread of this kind starts no others but its like. `name` is for the log.
pub fn raise_this_thread(name: &'static str) {
    // On Linux the nice value is the thread's own, and `None` is the calling thread.
    let nice = rustix::process::setpriority_process(None, NICE);
    let thread = rustix::thread::gettid();
    let raise = move || {
        let set = Command::new(CHRT)
            .args(["--reset-on-fork", "--fifo", "--pid", FIFO_PRIORITY, &thread.as_raw_nonzero().to_string()])
            .stdin(Stdio::null())
            .output()
            .map_err(|error| error.to_string())
            .and_then(|output| match output.status.success() {
                true => Ok(()),
                false => Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
            });
        let thread_id = thread.as_raw_nonzero();
        match (set, nice) {
            (Ok(()), _) => match move_home(thread) {
                Ok(processor) => log::debug!("thread {name} ({thread_id}): real-time priority {FIFO_PRIORITY} on processor {processor}"),
                Err(error) => log::debug!("thread {name} ({thread_id}): real-time priority {FIFO_PRIORITY}; on any processor: {error}"),
            },
            (Err(why), Ok(())) => {
                log::debug!(
                    "thread {name} ({thread_id}): nice {NICE}, no real-time priority ({why}; LimitRTPRIO=10 in the systemd unit allows it)"
                )
            }
            (Err(why), Err(_)) => log::debug!(
                "thread {name} ({thread_id}): ordinary priority ({why}; LimitRTPRIO=10 in the systemd unit allows real-time); \
                 on a loaded machine verdicts may wait some ms"
            ),
        }
    };
    // A thread of its own does the waiting for `chrt`; this one has better to do.
    if let Err(error) = std::thread::Builder::new().name("priority".into()).spawn(raise) {
        log::debug!("thread {name}: no thread to set its priority: {error}");
    }
}

/// Keep a real-time thread on the last processor that it may use; returns which. Only for real-time ones: an ordinary thread would wait there
/// for all others.
fn move_home(thread: Pid) -> io::Result<usize> {
    let allowed = sched_getaffinity(Some(thread))?;
    let Some(home) = (0..CpuSet::MAX_CPU).rev().find(|processor| allowed.is_set(*processor)) else {
        return Err(io::Error::other("the kernel names no processor for it"));
    };
    let mut only = CpuSet::new();
    only.set(home);
    sched_setaffinity(Some(thread), &only)?;
    Ok(home)
}

#[cfg(test)]
mod tests {
    use rustix::thread::{CpuSet, sched_getaffinity};
    use std::time::{Duration, Instant};

    /// SCHED_FIFO in field 41 of `/proc/…/stat`, counted after the name in brackets, which is field 2.
    const FIFO: &str = "1";

    fn policy() -> String {
        let stat = std::fs::read_to_string("/proc/thread-self/stat").unwrap();
        let (_, after_name) = stat.rsplit_once(") ").unwrap();
        after_name.split(' ').nth(41 - 3).unwrap().to_owned()
    }

    #[test]
    fn a_thread_becomes_real_time_and_what_it_starts_does_not() {
        // Whether it is allowed here, asked of a process of our own so that nobody else's priority changes.
        let mut sleeper = std::process::Command::new("/bin/sleep").arg("60").spawn().unwrap();
        let allowed = std::process::Command::new(super::CHRT)
            .args(["--fifo", "--pid", super::FIFO_PRIORITY, &sleeper.id().to_string()])
            .output()
            .is_ok_and(|output| output.status.success());
        sleeper.kill().unwrap();
        sleeper.wait().unwrap();
        if !allowed {
            eprintln!("SKIPPED: real-time priority is not allowed here (ulimit -r, or no {})", super::CHRT);
            return;
        }
        let before = sched_getaffinity(None).unwrap();
        std::thread::spawn(move || {
            super::raise_this_thread("test");
            let start = Instant::now();
            while policy() != FIFO {
                assert!(start.elapsed() < Duration::from_secs(60), "still policy {}", policy());
                std::thread::sleep(Duration::from_millis(5));
            }
            assert_ne!(std::thread::spawn(policy).join().unwrap(), FIFO);
            let processors = || sched_getaffinity(None).unwrap();
            while processors().count() != 1 {
                assert!(start.elapsed() < Duration::from_secs(60), "still on {} processors", processors().count());
                std::thread::sleep(Duration::from_millis(5));
            }
            let last = (0..CpuSet::MAX_CPU).rfind(|processor| before.is_set(*processor));
            assert!(last.is_some_and(|last| processors().is_set(last)));
        })
        .join()
        .unwrap();
    }
}
