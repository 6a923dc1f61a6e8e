//! One process per port: a lock file beside the kernel's own exclusive mode.
//!
//! The kernel's exclusive mode (TIOCEXCL and `flock` on the device, set by `serialport`) is what keeps a second `cull` out; root passes the
//! first, and neither says who holds the port. The lock file `/run/lock/LCK..ttyUSB0` (UUCP style: the process id in ten columns, as minicom,
//! picocom and getty read and write it) adds the name to the refusal and keeps those programs off the line's port.

use rustix::fs::FlockOperation;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Where serial lock files live on Debian (`/var/lock` points here).
const LOCK_FOLDER: &str = "/run/lock";

/// Rounds of "lock it, and look whether it is still the file in the folder": the holder removes the file when it closes the port, and each
/// round needs another process to open and close the port within microseconds.
const LOCK_ROUNDS: u32 = 8;

/// A held lock; removed and released on drop.
#[derive(Debug)]
pub struct PortLock {
    /// `None` where the folder is not ours to write: the kernel's exclusive mode stands alone.
    held: Option<(PathBuf, File)>,
}

/// Somebody else has the port.
#[derive(Debug, PartialEq, Eq)]
pub struct HeldBy {
    /// Process id, where the file tells.
    pub pid: Option<u32>,
    /// Its name, from /proc.
    pub name: Option<String>,
}

impl std::fmt::Display for HeldBy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.pid, &self.name) {
            (Some(pid), Some(name)) => write!(f, "process {pid} ({name})"),
            (Some(pid), None) => write!(f, "process {pid}"),
            (None, _) => write!(f, "another process"),
        }
    }
}

impl PortLock {
    /// Lock `device` (symbolic links are followed, so that two names of one port are one lock). No lock file can be written (no `/run/lock`, not
    /// allowed): succeeds without one, since the kernel still keeps the port exclusive.
    ///
    /// # Errors
    /// [`HeldBy`] when a living process holds it.
    pub fn acquire(device: &Path) -> Result<Self, HeldBy> {
        Self::acquire_in(Path::new(LOCK_FOLDER), device)
    }

    pub(crate) fn acquire_in(folder: &Path, device: &Path) -> Result<Self, HeldBy> {
        let path = folder.join(lock_name(device));
        for _ in 0..LOCK_ROUNDS {
            let opened = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o644).open(&path);
            let mut file = match opened {
                Ok(file) => file,
                Err(error) => {
                    // Another user's file: readable, not ours to write.
                    if let Some(pid) = File::open(&path).ok().and_then(|mut f| read_pid(&mut f)).filter(|pid| is_alive(*pid)) {
                        return Err(held_by(Some(pid)));
                    }
                    log::debug!("no lock file {} ({error}); the kernel's exclusive mode stands alone", path.display());
                    return Ok(Self { held: None });
                }
            };
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(rustix::io::Errno::WOULDBLOCK) => return Err(held_by(read_pid(&mut file))),
                Err(error) => {
                    log::debug!("cannot lock {} ({error}); the kernel's exclusive mode stands alone", path.display());
                    return Ok(Self { held: None });
                }
            }
            // The holder before us may have removed the file between our open and our lock: then we hold a file that nobody else will find.
            let same = matches!((file.metadata(), std::fs::metadata(&path)), (Ok(ours), Ok(there)) if ours.ino() == there.ino() && ours.dev() == there.dev());
            if !same {
                continue;
            }
            // Locked by us, but a program that knows nothing of `flock` may have written its number.
            if let Some(pid) = read_pid(&mut file).filter(|pid| *pid != std::process::id() && is_alive(*pid)) {
                return Err(held_by(Some(pid)));
            }
            let written = file.set_len(0).and_then(|()| file.rewind()).and_then(|()| writeln!(file, "{:>10}", std::process::id()));
            if let Err(error) = written {
                log::debug!("cannot write {} ({error}); others will see the port as held by nobody they know", path.display());
            }
            return Ok(Self { held: Some((path, file)) });
        }
        Err(held_by(None))
    }
}

impl Drop for PortLock {
    fn drop(&mut self) {
        if let Some((path, file)) = self.held.take() {
            // Removed while still locked, so that nobody can lock the file that is about to vanish and believe to hold the port.
            if let Err(error) = std::fs::remove_file(&path) {
                log::debug!("cannot remove {}: {error}; it counts as stale once this process ends", path.display());
            }
            drop(file);
        }
    }
}

/// `/dev/serial/by-id/usb-…` -> `/dev/ttyUSB0` -> `LCK..ttyUSB0`; `/dev/pts/3` -> `LCK..pts_3`.
fn lock_name(device: &Path) -> String {
    let real = device.canonicalize().unwrap_or_else(|_| device.to_path_buf());
    let name = real.strip_prefix("/dev").unwrap_or(&real).to_string_lossy().trim_start_matches('/').replace('/', "_");
    format!("LCK..{name}")
}

fn read_pid(file: &mut File) -> Option<u32> {
    let mut text = String::new();
    file.rewind().ok()?;
    file.take(64).read_to_string(&mut text).ok()?;
    text.split_whitespace().next()?.parse().ok().filter(|pid| *pid > 0)
}

/// Whether there is such a process. Not by looking into /proc: a service may see only its own user's processes there.
fn is_alive(pid: u32) -> bool {
    let Some(pid) = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw) else { return false };
    rustix::process::test_kill_process(pid) != Err(rustix::io::Errno::SRCH)
}

fn held_by(pid: Option<u32>) -> HeldBy {
    let name = pid.and_then(|pid| std::fs::read_to_string(format!("/proc/{pid}/comm")).ok()).map(|s| s.trim().to_owned());
    HeldBy { pid, name }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_lock_names_the_holder_and_a_dropped_lock_is_free() {
        let folder = tempfile::tempdir().unwrap();
        let device = Path::new("/dev/ttyCULL0");
        let first = PortLock::acquire_in(folder.path(), device).unwrap();
        let refused = PortLock::acquire_in(folder.path(), device).unwrap_err();
        assert_eq!(refused.pid, Some(std::process::id()));
        assert!(refused.to_string().contains(&std::process::id().to_string()), "{refused}");
        drop(first);
        assert!(!folder.path().join("LCK..ttyCULL0").exists());
        PortLock::acquire_in(folder.path(), device).unwrap();
    }

    #[test]
    fn a_living_program_without_flock_holds_and_a_dead_one_does_not() {
        let folder = tempfile::tempdir().unwrap();
        let device = Path::new("/dev/ttyCULL1");
        let path = folder.path().join("LCK..ttyCULL1");
        std::fs::write(&path, "         1\n").unwrap(); // init lives
        assert_eq!(PortLock::acquire_in(folder.path(), device).unwrap_err().pid, Some(1));
        std::fs::write(&path, format!("{:>10}\n", u32::MAX)).unwrap(); // no such process
        let lock = PortLock::acquire_in(folder.path(), device).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), format!("{:>10}\n", std::process::id()));
        drop(lock);
        std::fs::write(&path, "rubbish").unwrap();
        PortLock::acquire_in(folder.path(), device).unwrap();
    }

    #[test]
    fn a_folder_that_is_not_there_leaves_the_kernel_to_it() {
        let lock = PortLock::acquire_in(Path::new("/nonexistent/lock"), Path::new("/dev/ttyCULL2")).unwrap();
        assert!(lock.held.is_none());
    }

    #[test]
    fn two_names_of_one_port_share_a_lock() {
        let folder = tempfile::tempdir().unwrap();
        let real = folder.path().join("ttyX");
        std::fs::write(&real, "").unwrap();
        let link = folder.path().join("by-id");
        std::os::unix::fs::symlink(&real, &link).unwrap();
        assert_eq!(lock_name(&real), lock_name(&link));
        assert_eq!(lock_name(Path::new("/dev/pts/no-such-3")), "LCK..pts_no-such-3");
    }
}
