//! Real-time priority for the threads that a verdict goes through: verdict stage, link, its reader.
//!
//! They work microseconds per part, and a fair scheduler makes a waking thread wait for the slices of inference threads (measured at a load of 18
//! on two cores: p99 4 ms at nice -15, 0.1 ms real-time). All of them have the *same* priority: SCHED_FIFO never takes the processor from one
//! of them for another, so none is stopped half-way through handing a message to the next. A sender of ordinary priority is: the receiver
//! that it wakes takes the processor while the sender still holds the queue's lock, and then waits for it (measured in `cull demo`: 1.5 to
//! 3.7 ms at p99). What ordinary threads hand to a real-time one goes through [`crate::wake`] for that reason.
//!
//! This module knows threads and nothing of what they do.

use std::process::{Command, Stdio};

/// Priority of all of them. Low among real-time priorities, so that the kernel's interrupt threads (50) stay above it.
const FIFO_PRIORITY: &str = "10";
/// Sets it. A system call that neither `rustix` nor `nix` has; util-linux is on every Debian, and `unsafe` stays where it belongs.
const CHRT: &str = "/usr/bin/chrt";
/// Nice value where real-time priority is not allowed (it takes CAP_SYS_NICE or the systemd unit's `LimitRTPRIO`); its `LimitNICE` is the same.
const NICE: i32 = -10;

/// Let the calling thread go before ordinary ones: SCHED_FIFO, or a better nice value where that is not allowed, or else nothing. Returns at
/// once; the real-time priority comes some milliseconds later. Threads and processes started by this thread do not inherit it: each that
/// needs it asks for itself, so that none depends on when its parent got it. `name` is for the log.
pub fn raise_this_thread(name: &'static str) {
    // On Linux the nice value is the thread's own, and `None` is the calling thread.
    let nice = rustix::process::setpriority_process(None, NICE);
    let thread = rustix::thread::gettid().as_raw_nonzero().to_string();
    let raise = move || {
        let set = Command::new(CHRT)
            .args(["--reset-on-fork", "--fifo", "--pid", FIFO_PRIORITY, &thread])
            .stdin(Stdio::null())
            .output()
            .map_err(|error| error.to_string())
            .and_then(|output| match output.status.success() {
                true => Ok(()),
                false => Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
            });
        match (set, nice) {
            (Ok(()), _) => log::debug!("thread {name} ({thread}): real-time priority {FIFO_PRIORITY}"),
            (Err(why), Ok(())) => {
                log::debug!(
                    "thread {name} ({thread}): nice {NICE}, no real-time priority ({why}; LimitRTPRIO=10 in the systemd unit allows it)"
                )
            }
            (Err(why), Err(_)) => log::debug!(
                "thread {name} ({thread}): ordinary priority ({why}; LimitRTPRIO=10 in the systemd unit allows real-time); \
                 on a loaded machine verdicts may wait some ms"
            ),
        }
    };
    // A thread of its own does the waiting for `chrt`; this one has better to do.
    if let Err(error) = std::thread::Builder::new().name("priority".into()).spawn(raise) {
        log::debug!("thread {name}: no thread to set its priority: {error}");
    }
}

#[cfg(test)]
mod tests {
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
        std::thread::spawn(|| {
            super::raise_this_thread("test");
            let start = Instant::now();
            while policy() != FIFO {
                assert!(start.elapsed() < Duration::from_secs(60), "still policy {}", policy());
                std::thread::sleep(Duration::from_millis(5));
            }
            assert_ne!(std::thread::spawn(policy).join().unwrap(), FIFO);
        })
        .join()
        .unwrap();
    }
}
