//! What an operator may ask of a line that runs, and so holds the port: to have its board leave the safe state, and to see what crosses the port.
//! Nothing else.
//!
//! `cull plc send … clear` and `cull plc monitor` ask over a Unix socket in the line's runtime folder. There is no network in it. Who may ask is
//! who may write to the socket: its owner (the line's user), that user's group, and root. One line each way: `clear` or `monitor`, and an
//! [`Answer`]; behind [`Answer::Watching`] follow records: kind u8 (`i` towards us, `o` from us, `l` some were left out, `k` nothing new),
//! [`now_ns`](crate::frame::now_ns) of the line u64, length u16 (little-endian), bytes.
//!
//! This module knows sockets, words and bytes. What `clear` does is the caller's.

use crate::config::PlcConfig;
use crate::plc::{Direction, RequestStatus, Tap};
use crossbeam_channel::{Receiver, TryRecvError};
use sha2::{Digest, Sha256};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How long the line waits for the board's answer. Four heartbeats of the slowest watchdog that anybody sets (10 s) would be 5 s; on any usual
/// line the answer is there in milliseconds.
pub const CLEAR_WAIT: Duration = Duration::from_secs(5);
/// How long the asker waits for the line: longer than the line for the board.
const ASK_WAIT: Duration = Duration::from_secs(8);
/// How long the line waits for an asker that has connected to say what it wants.
const WORD_WAIT: Duration = Duration::from_secs(1);
/// Longest line either way, in bytes.
const WORD_BYTES: u64 = 32;
/// Clear the board.
const CLEAR: &str = "clear";
/// Show what crosses the port.
const MONITOR: &str = "monitor";
/// Bytes of one record: a frame of the native protocol, or a quarter of the longest Modbus frame.
const PIECE_BYTES: usize = 64;
/// Records that wait for a monitor: a second of a full 115200-baud line, both ways. A slower monitor is told that some were left out.
const PIECES: usize = 512;
/// How often the monitor's thread looks for new records. It sleeps in between and is not woken: the link's thread has better to do.
const WATCH_LOOK: Duration = Duration::from_millis(10);
/// With nothing to show, a record that says so goes out this often: each side then notices that the other is gone.
const KEEP_ALIVE: Duration = Duration::from_millis(200);
/// A monitor that hears nothing for this long takes the line for gone.
const WATCH_WAIT: Duration = Duration::from_secs(5);
/// Where services have their runtime folders; only root makes folders here.
const RUN: &str = "/run";
/// Our folder within a runtime folder, and how ours begin in [`RUN`] (a second line's service has a name of its own: `cull-line2`).
const FOLDER: &str = "cull";
/// Owner and group may ask.
const SOCKET_MODE: u32 = 0o660;
/// A folder that we make ourselves is ours alone; systemd makes the service's (deploy/cull.service).
const FOLDER_MODE: u32 = 0o700;

/// What a running line says to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The board has done it.
    Done,
    /// The board refuses.
    Refused,
    /// The link is not up, or another operator's request is under way.
    NotSent,
    /// The board did not answer in time; whether it heard is not known.
    NoAnswer,
    /// The line takes no such request.
    Unknown,
    /// What crosses the port follows.
    Watching,
    /// Another monitor watches.
    Busy,
}

impl Answer {
    const ALL: [Self; 7] = [Self::Done, Self::Refused, Self::NotSent, Self::NoAnswer, Self::Unknown, Self::Watching, Self::Busy];

    fn word(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Refused => "refused",
            Self::NotSent => "not-sent",
            Self::NoAnswer => "no-answer",
            Self::Unknown => "unknown",
            Self::Watching => "watching",
            Self::Busy => "busy",
        }
    }

    fn from_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|answer| answer.word() == word)
    }

    fn of(status: Option<RequestStatus>) -> Self {
        match status {
            Some(RequestStatus::Done) => Self::Done,
            Some(RequestStatus::Refused) => Self::Refused,
            Some(RequestStatus::NotSent) => Self::NotSent,
            None => Self::NoAnswer,
        }
    }
}

/// What came of asking.
#[derive(Debug, PartialEq, Eq)]
pub enum Asked<T> {
    /// The line's answer.
    Answer(T),
    /// No line that can be asked runs on this port.
    NoLine,
    /// The same as far as can be seen; but this is a place where a line could be asked, and this user may not look there.
    Forbidden(PathBuf),
}

/// A line took the connection and then did not answer.
#[derive(Debug, thiserror::Error)]
#[error("the line behind {socket} does not answer: {why}")]
pub struct Silent {
    socket: String,
    /// What the system said.
    why: io::Error,
}

/// The socket's name for a port: the same for the same configured path. Hashed, since a stable path may be longer than a socket's may be.
fn socket_name(port: &Path) -> String {
    let digest = Sha256::digest(port.as_os_str().as_encoded_bytes());
    let hex: String = digest.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    format!("plc-{hex}.sock")
}

fn variable(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}

/// systemd names the service's own runtime folders, with colons between them.
fn service_folder() -> Option<PathBuf> {
    let folders = std::env::var("RUNTIME_DIRECTORY").ok()?;
    folders.split(':').find(|folder| !folder.is_empty()).map(PathBuf::from)
}

/// Where this process offers its socket: the service's runtime folder, root's, or the user's. Never a folder in which others may write.
fn own_folder() -> Option<PathBuf> {
    if let Some(folder) = service_folder() {
        return Some(folder);
    }
    if rustix::process::geteuid().is_root() {
        return Some(Path::new(RUN).join(FOLDER));
    }
    variable("XDG_RUNTIME_DIR").map(|folder| folder.join(FOLDER))
}

/// Where the line that holds a port may offer its socket.
fn all_folders() -> Vec<PathBuf> {
    let mut folders: Vec<_> = service_folder().into_iter().collect();
    let services = std::fs::read_dir(RUN).into_iter().flatten().flatten().map(|entry| entry.path());
    folders.extend(services.filter(|path| path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(FOLDER.as_bytes()))));
    folders.extend(variable("XDG_RUNTIME_DIR").map(|folder| folder.join(FOLDER)));
    folders
}

/// A few bytes that crossed the port.
struct Piece {
    direction: Direction,
    at_ns: u64,
    bytes: [u8; PIECE_BYTES],
    len: usize,
}

/// The monitor's end of a [`tee`].
#[derive(Clone)]
pub struct Watch {
    pieces: Receiver<Piece>,
    watched: Arc<AtomicBool>,
    left_out: Arc<AtomicBool>,
}

/// A tap for the link of a running line, and the end at which a monitor may watch. Unwatched, it costs the link one atomic load per read or write;
/// watched, it never waits and never allocates.
pub fn tee() -> (Tap, Watch) {
    let (pieces_in, pieces) = crossbeam_channel::bounded(PIECES);
    let watch = Watch { pieces, watched: Arc::default(), left_out: Arc::default() };
    let (watched, left_out) = (watch.watched.clone(), watch.left_out.clone());
    let tap: Tap = Box::new(move |direction, at_ns, bytes| {
        if !watched.load(Ordering::Relaxed) {
            return;
        }
        for part in bytes.chunks(PIECE_BYTES) {
            let mut piece = Piece { direction, at_ns, bytes: [0; PIECE_BYTES], len: part.len() };
            piece.bytes.iter_mut().zip(part).for_each(|(to, from)| *to = *from);
            if pieces_in.try_send(piece).is_err() {
                left_out.store(true, Ordering::Relaxed);
            }
        }
    });
    (tap, watch)
}

/// A running line's ear. Dropping it closes the socket and takes it away.
#[derive(Debug)]
pub struct Control {
    path: PathBuf,
    over: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

/// Take operators' requests for the line on the port of `plc`; `clear` carries one out and is called on a thread of its own. `None` where there is
/// no port or no folder for the socket: the log says so, and the line runs without.
pub fn serve(plc: &PlcConfig, clear: impl FnMut() -> Option<RequestStatus> + Send + 'static, watch: Watch) -> Option<Control> {
    let port = match plc {
        PlcConfig::None => return None,
        PlcConfig::Bridge(config) => &config.port,
        PlcConfig::Modbus(config) => &config.port,
    };
    let Some(folder) = own_folder() else {
        log::info!(
            "no runtime folder (XDG_RUNTIME_DIR is not set): a board in its safe state is cleared by stopping the line or at the board"
        );
        return None;
    };
    match serve_in(&folder, port, clear, watch) {
        Ok(control) => Some(control),
        Err(error) => {
            log::warn!(
                "cannot take operators' requests in {} ({error}): clear the board by stopping the line or at the board",
                folder.display()
            );
            None
        }
    }
}

fn serve_in(
    folder: &Path,
    port: &Path,
    mut clear: impl FnMut() -> Option<RequestStatus> + Send + 'static,
    watch: Watch,
) -> io::Result<Control> {
    if !folder.is_dir() {
        std::fs::DirBuilder::new().mode(FOLDER_MODE).create(folder)?;
    }
    let path = folder.join(socket_name(port));
    let listener = match UnixListener::bind(&path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            if UnixStream::connect(&path).is_ok() {
                return Err(io::Error::new(io::ErrorKind::AddrInUse, "another process takes them for this port"));
            }
            // Left behind by a line that was killed.
            std::fs::remove_file(&path)?;
            UnixListener::bind(&path)?
        }
        bound => bound?,
    };
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(SOCKET_MODE))?;
    let over = Arc::new(AtomicBool::new(false));
    let ends = over.clone();
    let thread = std::thread::Builder::new().name("control".into()).spawn(move || {
        for connection in listener.incoming() {
            if ends.load(Ordering::Relaxed) {
                break;
            }
            match connection.and_then(|stream| answer(stream, &mut clear, &watch, &ends)) {
                Ok(()) => {}
                Err(error) => {
                    log::warn!("an operator's request was not understood or not answered: {error}");
                    // Out of file descriptors, for example: not in a tight loop.
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
        }
    })?;
    Ok(Control { path, over, thread: Some(thread) })
}

/// One connection: a word, an answer.
fn answer(
    mut stream: UnixStream,
    clear: &mut impl FnMut() -> Option<RequestStatus>,
    watch: &Watch,
    over: &Arc<AtomicBool>,
) -> io::Result<()> {
    stream.set_read_timeout(Some(WORD_WAIT))?;
    stream.set_write_timeout(Some(WORD_WAIT))?;
    let answer = match read_word(&mut BufReader::new(&stream))?.as_str() {
        CLEAR => Answer::of(clear()),
        MONITOR if watch.watched.swap(true, Ordering::Relaxed) => Answer::Busy,
        MONITOR => Answer::Watching,
        _ => Answer::Unknown,
    };
    let told = writeln!(stream, "{}", answer.word());
    if answer != Answer::Watching {
        return told;
    }
    // On a thread of its own: somebody who watches must keep nobody from clearing the board.
    let (shown, over) = (watch.clone(), over.clone());
    let thread = told.and_then(|()| {
        std::thread::Builder::new().name("monitor".into()).spawn(move || {
            let ended = show(stream, &shown, &over);
            // What this monitor did not see any more is nothing to the next.
            while shown.pieces.try_recv().is_ok() {}
            shown.watched.store(false, Ordering::Relaxed);
            log::debug!("the monitor has gone: {ended:?}");
        })
    });
    if thread.is_err() {
        watch.watched.store(false, Ordering::Relaxed);
    }
    thread.map(drop)
}

/// Show what crosses the port until the monitor goes away or the line ends.
fn show(mut stream: UnixStream, watch: &Watch, over: &AtomicBool) -> io::Result<()> {
    let mut records = Vec::new();
    let mut told_at = Instant::now();
    while !over.load(Ordering::Relaxed) {
        loop {
            match watch.pieces.try_recv() {
                Ok(piece) => {
                    let kind = match piece.direction {
                        Direction::In => b'i',
                        Direction::Out => b'o',
                    };
                    record(&mut records, kind, piece.at_ns, piece.bytes.get(..piece.len).unwrap_or(&piece.bytes));
                }
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => return stream.write_all(&records),
            }
        }
        if watch.left_out.swap(false, Ordering::Relaxed) {
            record(&mut records, b'l', 0, &[]);
        }
        if records.is_empty() && told_at.elapsed() >= KEEP_ALIVE {
            record(&mut records, b'k', 0, &[]);
        }
        if !records.is_empty() {
            stream.write_all(&records)?;
            records.clear();
            told_at = Instant::now();
        }
        std::thread::sleep(WATCH_LOOK);
    }
    Ok(())
}

fn record(records: &mut Vec<u8>, kind: u8, at_ns: u64, bytes: &[u8]) {
    records.push(kind);
    records.extend(at_ns.to_le_bytes());
    records.extend((bytes.len() as u16).to_le_bytes());
    records.extend(bytes);
}

fn read_word(reader: &mut impl BufRead) -> io::Result<String> {
    let mut line = String::new();
    reader.take(WORD_BYTES).read_line(&mut line)?;
    Ok(line.trim().to_owned())
}

impl Drop for Control {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        let woken = UnixStream::connect(&self.path).is_ok();
        if let Err(error) = std::fs::remove_file(&self.path) {
            log::debug!("cannot remove {}: {error}", self.path.display());
        }
        // Not woken (somebody removed the socket): the thread ends with the process.
        if let Some(thread) = self.thread.take()
            && woken
            && thread.join().is_err()
        {
            log::error!("the thread for operators' requests panicked");
        }
    }
}

/// Ask the line that runs on `port` (the path as in its configuration) to clear its board.
///
/// # Errors
/// When a line runs there and does not answer.
pub fn ask_clear(port: &Path) -> Result<Asked<Answer>, Silent> {
    ask_in(&all_folders(), port, |stream| ask(&mut BufReader::new(stream), CLEAR, ASK_WAIT))
}

/// Ask the line that runs on `port` to show what crosses it; `Err` within the answer is why it does not.
///
/// # Errors
/// When a line runs there and does not answer.
pub fn ask_monitor(port: &Path) -> Result<Asked<Result<Watched, Answer>>, Silent> {
    ask_in(&all_folders(), port, watched)
}

fn watched(stream: UnixStream) -> io::Result<Result<Watched, Answer>> {
    let mut records = BufReader::new(stream);
    match ask(&mut records, MONITOR, WATCH_WAIT)? {
        Answer::Watching => Ok(Ok(Watched { records })),
        other => Ok(Err(other)),
    }
}

/// What crosses the port of a running line, as it does.
#[derive(Debug)]
pub struct Watched {
    records: BufReader<UnixStream>,
}

/// What a [`Watched`] line says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Heard {
    /// Bytes crossed the port.
    Bytes {
        /// Which way.
        direction: Direction,
        /// When, on the line's own clock.
        at_ns: u64,
        /// What.
        bytes: Vec<u8>,
    },
    /// More crossed it than could be shown.
    LeftOut,
    /// Nothing new; comes several times a second.
    Nothing,
}

impl Watched {
    /// The next that the line says.
    ///
    /// # Errors
    /// The line has ended (`UnexpectedEof`) or hangs.
    pub fn listen(&mut self) -> io::Result<Heard> {
        let mut head = [0u8; 11];
        self.records.read_exact(&mut head)?;
        let [kind, a, b, c, d, e, f, g, h, low, high] = head;
        let mut bytes = vec![0; u16::from_le_bytes([low, high]).into()];
        self.records.read_exact(&mut bytes)?;
        let at_ns = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
        match kind {
            b'i' => Ok(Heard::Bytes { direction: Direction::In, at_ns, bytes }),
            b'o' => Ok(Heard::Bytes { direction: Direction::Out, at_ns, bytes }),
            b'l' => Ok(Heard::LeftOut),
            b'k' => Ok(Heard::Nothing),
            other => Err(io::Error::new(io::ErrorKind::InvalidData, format!("record of kind {other}: another version of cull"))),
        }
    }
}

fn ask_in<T>(folders: &[PathBuf], port: &Path, ask: impl Fn(UnixStream) -> io::Result<T>) -> Result<Asked<T>, Silent> {
    let name = socket_name(port);
    let mut asked = Asked::NoLine;
    for socket in folders.iter().map(|folder| folder.join(&name)) {
        match UnixStream::connect(&socket) {
            Ok(stream) => {
                return ask(stream).map(Asked::Answer).map_err(|why| Silent { socket: socket.display().to_string(), why });
            }
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => asked = Asked::Forbidden(socket),
            // Not there, or left behind by a line that was killed.
            Err(_) => {}
        }
    }
    Ok(asked)
}

fn ask(stream: &mut BufReader<UnixStream>, word: &str, wait: Duration) -> io::Result<Answer> {
    stream.get_ref().set_read_timeout(Some(wait))?;
    stream.get_ref().set_write_timeout(Some(WORD_WAIT))?;
    writeln!(stream.get_mut(), "{word}")?;
    let word = read_word(stream)?;
    Answer::from_word(&word).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("it said {word:?}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;

    const PORT: &str = "/dev/serial/by-id/usb-board";

    fn ask_clear_in(folder: &Path, port: &str) -> Asked<Answer> {
        let folders = [folder.join("not-there"), folder.to_path_buf()];
        ask_in(&folders, Path::new(port), |stream| ask(&mut BufReader::new(stream), CLEAR, ASK_WAIT)).unwrap()
    }

    fn serve_done(folder: &Path) -> io::Result<Control> {
        serve_in(folder, Path::new(PORT), || Some(RequestStatus::Done), tee().1)
    }

    #[test]
    fn a_running_line_is_asked_and_what_it_says_comes_back() {
        let folder = tempfile::tempdir().unwrap();
        let asked = Arc::new(AtomicU32::new(0));
        let counter = asked.clone();
        let statuses = [Some(RequestStatus::Done), Some(RequestStatus::Refused), Some(RequestStatus::NotSent), None];
        let control =
            serve_in(folder.path(), Path::new(PORT), move || statuses[counter.fetch_add(1, Ordering::Relaxed) as usize % 4], tee().1)
                .unwrap();
        for expected in [Answer::Done, Answer::Refused, Answer::NotSent, Answer::NoAnswer] {
            assert_eq!(ask_clear_in(folder.path(), PORT), Asked::Answer(expected));
        }
        assert_eq!(ask_clear_in(folder.path(), "/dev/other"), Asked::NoLine);
        let socket = folder.path().join(socket_name(Path::new(PORT)));
        assert_eq!(std::fs::metadata(&socket).unwrap().permissions().mode() & 0o777, SOCKET_MODE);
        // Anything but the one word does nothing.
        for words in ["reject\n", "clear all\n", "\n", "clearclearclearclearclearclearclearclear\n"] {
            let mut stream = UnixStream::connect(&socket).unwrap();
            stream.write_all(words.as_bytes()).unwrap();
            assert_eq!(read_word(&mut BufReader::new(&stream)).unwrap(), "unknown", "{words:?}");
        }
        // Somebody who connects and says nothing is not waited for long, and harms nobody.
        drop(UnixStream::connect(&socket).unwrap());
        assert_eq!(ask_clear_in(folder.path(), PORT), Asked::Answer(Answer::Done));
        assert_eq!(asked.load(Ordering::Relaxed), 5);
        drop(control);
        assert!(!socket.exists());
        assert_eq!(ask_clear_in(folder.path(), PORT), Asked::NoLine);
    }

    #[test]
    fn a_socket_left_behind_is_replaced_and_a_living_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join(socket_name(Path::new(PORT)));
        drop(UnixListener::bind(&socket).unwrap()); // the file stays, as after a kill
        assert_eq!(ask_clear_in(folder.path(), PORT), Asked::NoLine);
        let control = serve_done(folder.path()).unwrap();
        assert_eq!(ask_clear_in(folder.path(), PORT), Asked::Answer(Answer::Done));
        let second = serve_done(folder.path()).unwrap_err();
        assert!(second.to_string().contains("another process"), "{second}");
        drop(control);
    }

    #[test]
    fn a_monitor_sees_what_crosses_the_port_and_keeps_nobody_from_clearing() {
        let folder = tempfile::tempdir().unwrap();
        let (mut tap, watch) = tee();
        let control = serve_in(folder.path(), Path::new(PORT), || Some(RequestStatus::Done), watch).unwrap();
        tap(Direction::In, 1, b"before anybody watches");
        let folders = [folder.path().to_path_buf()];
        let monitor = || match ask_in(&folders, Path::new(PORT), watched).unwrap() {
            Asked::Answer(answer) => answer,
            other => panic!("{other:?}"),
        };
        let mut first = monitor().unwrap();
        assert_eq!(monitor().unwrap_err(), Answer::Busy);
        let long: Vec<u8> = (0..=255).collect();
        tap(Direction::Out, 2, &long);
        tap(Direction::In, 3, b"answer");
        let (mut out, mut seen_in) = (Vec::new(), Vec::new());
        while seen_in.is_empty() {
            match first.listen().unwrap() {
                Heard::Bytes { direction: Direction::Out, at_ns: 2, bytes } => out.extend(bytes),
                Heard::Bytes { direction: Direction::In, at_ns: 3, bytes } => seen_in = bytes,
                Heard::Nothing => {}
                other => panic!("{other:?}"),
            }
        }
        assert_eq!((out, seen_in.as_slice()), (long, &b"answer"[..]));
        assert_eq!(ask_clear_in(folder.path(), PORT), Asked::Answer(Answer::Done));
        // More than is kept: told, and not waited for.
        (0..PIECES * 2).for_each(|_| tap(Direction::In, 4, b"much"));
        while first.listen().unwrap() != Heard::LeftOut {}
        drop(first);
        // The next may watch once the line has noticed that nobody hears it.
        let start = Instant::now();
        let mut second = loop {
            match monitor() {
                Ok(second) => break second,
                Err(answer) => assert_eq!(answer, Answer::Busy),
            }
            assert!(start.elapsed() < Duration::from_secs(60));
            std::thread::sleep(Duration::from_millis(20));
        };
        drop(control);
        while second.listen().is_ok() {}
    }

    #[test]
    fn a_long_stable_path_still_fits_a_socket() {
        let long = format!("/dev/serial/by-id/usb-{}", "x".repeat(200));
        assert!(socket_name(Path::new(&long)).len() < 40);
        assert_ne!(socket_name(Path::new(&long)), socket_name(Path::new(PORT)));
    }
}
