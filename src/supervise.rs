//! Stage progress -> systemd watchdog and status. Every stage of the pipeline beats, busy or idle; while one does not, systemd gets no ping
//! (and restarts the line in the end), the log says which stage it is, and whoever asked is told.
//!
//! This module knows stages by name and time only: nothing of frames, models or the PLC.

use crate::frame::now_ns;
use crossbeam_channel::{RecvTimeoutError, Sender, bounded};
use sd_notify::NotifyState;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// A stage that neither finishes a step nor idles for this long is stuck. 30 s: twice the slowest inference anybody runs (EfficientNet-B4 on
/// an emulated box takes 13 s); parts in flight have long been rejected by then, so haste gains nothing.
pub const STUCK_AFTER: Duration = Duration::from_secs(30);

/// Stages are looked at this often, or four times per watchdog period if that is shorter.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// The status line that `systemctl status` shows is renewed this often.
const STATUS_EVERY: Duration = Duration::from_secs(5);

/// A stage that has not started yet.
const NOT_STARTED: u64 = 0;
/// A stage that ended on purpose.
const ENDED: u64 = u64::MAX;

/// When each stage last made progress. Fixed at the start of the line.
pub struct Progress {
    stages: Box<[Stage]>,
}

struct Stage {
    name: String,
    /// On the clock of [`now_ns`], or [`NOT_STARTED`] or [`ENDED`].
    last_ns: AtomicU64,
}

/// What [`Progress::state`] found.
#[derive(Debug, PartialEq, Eq)]
pub enum State<'a> {
    /// Some stage has not begun.
    Starting,
    /// All stages beat.
    Progressing,
    /// This one does not.
    Stuck(&'a str),
}

impl Progress {
    /// A record for these stages, and the handle with which each reports.
    pub fn new(names: impl IntoIterator<Item = String>) -> (Arc<Self>, Vec<Beat>) {
        let stages = names.into_iter().map(|name| Stage { name, last_ns: AtomicU64::new(NOT_STARTED) }).collect();
        let progress = Arc::new(Self { stages });
        let beats = (0..progress.stages.len()).map(|index| Beat { progress: Arc::clone(&progress), index }).collect();
        (progress, beats)
    }

    /// The worst of the stages at `now_ns`.
    pub fn state(&self, now_ns: u64, stuck_after: Duration) -> State<'_> {
        let limit = u64::try_from(stuck_after.as_nanos()).unwrap_or(u64::MAX);
        let mut starting = false;
        for stage in &self.stages {
            match stage.last_ns.load(Ordering::Relaxed) {
                NOT_STARTED => starting = true,
                last if now_ns.saturating_sub(last) > limit => return State::Stuck(&stage.name),
                _ => {}
            }
        }
        if starting { State::Starting } else { State::Progressing }
    }
}

/// One stage's way to say that it is alive. Dropped at the end of the stage; dropped by a panic, the stage counts as stuck from then on.
pub struct Beat {
    progress: Arc<Progress>,
    index: usize,
}

impl Beat {
    /// The stage made a step, or idles as it should. One relaxed store.
    pub fn beat(&self) {
        self.set(now_ns().max(NOT_STARTED + 1));
    }

    fn set(&self, value: u64) {
        if let Some(stage) = self.progress.stages.get(self.index) {
            stage.last_ns.store(value, Ordering::Relaxed);
        }
    }
}

impl Drop for Beat {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.set(ENDED);
        }
    }
}

/// The running supervisor; dropping it says STOPPING to systemd and ends its thread.
pub struct Supervisor {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// Watch `progress`. `on_change` is called with the name of a stage that got stuck, and with `None` when all progress again; `status` makes
/// the line for `systemctl status`. Neither is called on a hot thread. Without systemd (`NOTIFY_SOCKET` unset) only the watching remains.
///
/// # Errors
/// When the operating system refuses a thread.
pub fn spawn(
    progress: Arc<Progress>,
    stuck_after: Duration,
    mut status: impl FnMut() -> String + Send + 'static,
    mut on_change: impl FnMut(Option<&str>) + Send + 'static,
) -> std::io::Result<Supervisor> {
    let (stop, stopped) = bounded::<()>(1);
    let watchdog = sd_notify::watchdog_enabled();
    let every = watchdog.map_or(LOOK_EVERY, |period| LOOK_EVERY.min(period / 4)).min(stuck_after / 4);
    let thread = std::thread::Builder::new().name("supervise".into()).spawn(move || {
        let mut ready = false;
        let mut stuck = false;
        let mut status_at = 0;
        loop {
            let now = now_ns();
            match progress.state(now, stuck_after) {
                State::Starting => {}
                State::Progressing => {
                    if !ready {
                        ready = true;
                        notify(&[NotifyState::Ready]);
                    }
                    if stuck {
                        stuck = false;
                        log::warn!("all stages progress again");
                        on_change(None);
                    }
                    notify(&[NotifyState::Watchdog]);
                }
                State::Stuck(stage) => {
                    if !stuck {
                        stuck = true;
                        log::error!(
                            "stage `{stage}` has made no progress for {} s; parts are rejected, and systemd's watchdog gets no ping until it does",
                            stuck_after.as_secs_f32()
                        );
                        on_change(Some(stage));
                    }
                }
            }
            if now >= status_at {
                status_at = now.saturating_add(u64::try_from(STATUS_EVERY.as_nanos()).unwrap_or(u64::MAX));
                if std::env::var_os("NOTIFY_SOCKET").is_some() {
                    notify(&[NotifyState::Status(&status())]);
                }
            }
            match stopped.recv_timeout(every) {
                Err(RecvTimeoutError::Timeout) => {}
                Ok(()) | Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        notify(&[NotifyState::Stopping]);
    })?;
    Ok(Supervisor { stop: Some(stop), thread: Some(thread) })
}

fn notify(state: &[NotifyState<'_>]) {
    // Without systemd this does nothing and succeeds. Otherwise a lost ping is systemd's to notice.
    if let Err(error) = sd_notify::notify(state) {
        log::debug!("systemd could not be notified: {error}");
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            // A panic in there has been printed by the panic hook already.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stage_is_starting_progressing_stuck_or_ended() {
        let (progress, mut beats) = Progress::new(["a".to_string(), "b".to_string()]);
        let limit = Duration::from_millis(10);
        assert_eq!(progress.state(now_ns(), limit), State::Starting);
        beats.iter().for_each(Beat::beat);
        let now = now_ns();
        assert_eq!(progress.state(now, Duration::from_secs(100)), State::Progressing);
        assert_eq!(progress.state(now + 1_000_000_000, limit), State::Stuck("a"));
        drop(beats.remove(0));
        assert_eq!(progress.state(now + 1_000_000_000, limit), State::Stuck("b"));
        drop(beats);
        assert_eq!(progress.state(now + 1_000_000_000, limit), State::Progressing);
    }

    #[test]
    fn a_stage_that_panicked_is_stuck_and_not_ended() {
        let (progress, beats) = Progress::new(["a".to_string()]);
        let thread = std::thread::spawn(move || {
            beats[0].beat();
            panic!("on purpose");
        });
        assert!(thread.join().is_err());
        assert_eq!(progress.state(now_ns() + 1_000_000_000, Duration::from_millis(10)), State::Stuck("a"));
    }

    #[test]
    fn changes_are_told_once() {
        let (progress, beats) = Progress::new(["slow".to_string()]);
        let (told, hears) = crossbeam_channel::unbounded();
        beats[0].beat();
        let supervisor = spawn(progress, Duration::from_millis(200), String::new, move |stage| {
            let _ = told.send(stage.map(str::to_string));
        })
        .unwrap();
        let wait = Duration::from_secs(20);
        assert_eq!(hears.recv_timeout(wait).unwrap().as_deref(), Some("slow"));
        beats[0].beat();
        assert_eq!(hears.recv_timeout(wait).unwrap(), None);
        drop(supervisor);
    }
}
