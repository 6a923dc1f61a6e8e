//! Every verdict in an embedded SQLite database: what a quality manager asks for a year later.
//!
//! [`spawn`] starts a thread of its own; the verdict path hands over an [`Entry`] with [`JournalHandle::try_write`], which never blocks. The thread
//! writes transactions of up to [`BATCH_ROWS`] rows or [`BATCH_TIME`], whichever comes first, in WAL mode: what was committed survives `kill -9`
//! without loss; a power cut may cost the last moments before it (`synchronous = NORMAL`), never the database. May know inspections and SQLite;
//! nothing of the pipeline's threads, the link or pictures.
//!
//! ```sql
//! -- the last hour's rejects
//! SELECT datetime(time_ms / 1000, 'unixepoch'), part, reason, score, p_value FROM inspections
//! WHERE decision = 'reject' AND time_ms > (unixepoch() - 3600) * 1000;
//! ```

use crate::config::JournalConfig;
use crate::pipeline::Inspection;
use crate::snapshot::{decision_name, utc};
use crate::verdict::Reason;
use crate::wake::{SPARE, has_room};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use rusqlite::{Connection, ErrorCode, OpenFlags, params};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Verdicts that wait at most: 40 s at 100 parts a second, for disks that pause. When full, verdicts are not journalled (counted); the line goes on.
pub const QUEUE_ENTRIES: usize = 4_096;
/// Most rows in one transaction.
pub const BATCH_ROWS: usize = 200;
/// Longest time a verdict waits for its transaction: what a power cut may cost at most, and five fsyncs a second are easy on flash.
pub const BATCH_TIME: Duration = Duration::from_millis(200);
/// Pause before a failed transaction is tried again (disk full, database locked); the queue holds what comes meanwhile.
const RETRY_PAUSE: Duration = Duration::from_secs(1);
/// How long another program's lock on the database (a backup, a report) is waited for before that counts as a failed transaction.
const BUSY_TIMEOUT: Duration = Duration::from_secs(2);
/// Tries for what is still queued at shutdown: a full disk must not keep the process from ending.
const TRIES_AT_SHUTDOWN: u32 = 3;
/// Databases up to this size are checked in full at start (about 0.1 s); larger ones as far as opening and reading the ends of the table go.
const CHECK_BELOW_BYTES: u64 = 64 << 20;
/// The database is not opened more often than this after it was found corrupt while running: a broken disk is not written full of remains.
const REPLACE_AT_MOST_EVERY: Duration = Duration::from_secs(60);

/// Each script brings the schema from version index to index + 1 (`PRAGMA user_version`). Scripts are only ever added.
const MIGRATIONS: [&str; 1] = ["
    CREATE TABLE runs (
        id INTEGER PRIMARY KEY,
        started_ms INTEGER NOT NULL,        -- Unix time
        line TEXT NOT NULL,
        version TEXT NOT NULL               -- of cull
    ) STRICT;
    CREATE TABLE inspections (
        id INTEGER PRIMARY KEY,
        run INTEGER NOT NULL REFERENCES runs (id),
        time_ms INTEGER NOT NULL,           -- of the verdict, Unix time
        part INTEGER,                       -- NULL when no board numbered it
        seq INTEGER NOT NULL,               -- of the frame
        decision TEXT NOT NULL,             -- accept, reject, unknown, fault
        reason TEXT NOT NULL,
        score REAL,                         -- NULL when there is none
        p_value REAL,                       -- likewise
        latency_us INTEGER NOT NULL,        -- capture to verdict
        queue_us INTEGER NOT NULL,
        preprocess_us INTEGER NOT NULL,
        inference_us INTEGER NOT NULL,
        verdict_us INTEGER NOT NULL,
        product TEXT,
        path TEXT,                          -- source file of a folder source
        truth TEXT                          -- 'good' or the defect's name, where the source knows
    ) STRICT;
    CREATE INDEX inspections_time ON inspections (time_ms);
"];

/// Why the journal cannot start, or a transaction failed.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The database cannot be opened or written, and is not corrupt.
    #[error("cannot use the journal {}: {source}; check that its folder exists and is writable for the user that runs cull", path.display())]
    Database {
        /// The database file.
        path: PathBuf,
        /// SQLite's cause.
        source: rusqlite::Error,
    },
    /// A newer version of cull made it.
    #[error("the journal {} has schema version {found}, this cull knows {known}: update cull, or give it another journal path", path.display())]
    Newer {
        /// The database file.
        path: PathBuf,
        /// Version in the file.
        found: i64,
        /// Newest version known.
        known: usize,
    },
    /// A corrupt database could not be moved aside.
    #[error("the journal {} is corrupt and cannot be moved aside: {source}; move it by hand", path.display())]
    Replace {
        /// The database file.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// The system gave no thread.
    #[error("cannot start the journal thread: {0}")]
    Thread(io::Error),
}

/// One row: an inspection, with the wall clock read at once so that a slow disk does not shift times.
#[derive(Clone, Debug)]
pub struct Entry {
    inspection: Inspection,
    time_ms: i64,
}

impl From<Inspection> for Entry {
    fn from(inspection: Inspection) -> Self {
        let time_ms = utc::unix_ms_of(inspection.decided_ns);
        Self { inspection, time_ms }
    }
}

impl From<&Inspection> for Entry {
    fn from(inspection: &Inspection) -> Self {
        Self::from(inspection.clone())
    }
}

/// What the journal has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct JournalCounters {
    /// Rows committed.
    pub written: u64,
    /// Verdicts not journalled because the queue was full, or given up at shutdown.
    pub lost: u64,
    /// Transactions that failed and were tried again.
    pub retries: u64,
    /// Corrupt databases moved aside.
    pub replaced: u64,
}

#[derive(Default)]
struct Counters {
    written: AtomicU64,
    lost: AtomicU64,
    retries: AtomicU64,
    replaced: AtomicU64,
}

/// The way to the journal thread. Dropping it commits what is queued and waits for the thread.
pub struct JournalHandle {
    /// `None` when no journal is configured.
    queue: Option<Sender<Entry>>,
    counters: Arc<Counters>,
    /// Tells the thread that nothing more will come, so that it does not try for ever.
    closing: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl JournalHandle {
    /// Hand over a verdict. Never blocks. `true` when it was taken or no journal is kept; `false` when the queue is full (counted).
    pub fn try_write(&self, entry: Entry) -> bool {
        let Some(queue) = &self.queue else { return true };
        let taken = has_room(queue, QUEUE_ENTRIES) && queue.try_send(entry).is_ok();
        if !taken {
            self.counters.lost.fetch_add(1, Ordering::Relaxed);
        }
        taken
    }

    /// What has been done so far.
    pub fn counters(&self) -> JournalCounters {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        JournalCounters {
            written: get(&self.counters.written),
            lost: get(&self.counters.lost),
            retries: get(&self.counters.retries),
            replaced: get(&self.counters.replaced),
        }
    }

    /// Commit what is queued, end the thread, and say what was done.
    pub fn finish(mut self) -> JournalCounters {
        self.join();
        self.counters()
    }

    fn join(&mut self) {
        self.closing.store(true, Ordering::Relaxed);
        self.queue = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("journal: its thread panicked; please report this with the log");
        }
    }
}

impl Drop for JournalHandle {
    fn drop(&mut self) {
        self.join();
    }
}

/// Open (or make, or migrate) the database and start the journal. Without a path in `config`, the handle takes entries and keeps none.
/// A corrupt database is moved aside and a new one started: yesterday's damage never stops today's line.
///
/// # Errors
/// When the database cannot be opened or written for another reason, or is from a newer version.
pub fn spawn(config: &JournalConfig, line: &str) -> Result<JournalHandle, JournalError> {
    let counters = Arc::new(Counters::default());
    let mut handle = JournalHandle { queue: None, counters: counters.clone(), closing: Arc::default(), thread: None };
    let Some(path) = &config.path else { return Ok(handle) };
    let database = Database::open(path, line, config.max_rows, &counters)?;
    let (queue, entries) = bounded(QUEUE_ENTRIES + SPARE);
    let writer = Writer { database, counters, closing: handle.closing.clone(), failing: false, opened: Instant::now() };
    handle.thread =
        Some(std::thread::Builder::new().name("journal".into()).spawn(move || writer.run(&entries)).map_err(JournalError::Thread)?);
    handle.queue = Some(queue);
    Ok(handle)
}

/// An open database of the newest schema.
struct Database {
    connection: Connection,
    path: PathBuf,
    line: String,
    max_rows: i64,
    run: i64,
}

impl Database {
    fn open(path: &Path, line: &str, max_rows: u64, counters: &Counters) -> Result<Self, JournalError> {
        match Self::open_sound(path, line, max_rows) {
            Err(JournalError::Database { source, .. }) if is_corruption(&source) => {
                move_aside(path, &source)?;
                counters.replaced.fetch_add(1, Ordering::Relaxed);
                Self::open_sound(path, line, max_rows)
            }
            other => other,
        }
    }

    fn open_sound(path: &Path, line: &str, max_rows: u64) -> Result<Self, JournalError> {
        let at = |source| JournalError::Database { path: path.to_owned(), source };
        let mut connection = Connection::open_with_flags(
            path,
            OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE | OpenFlags::SQLITE_OPEN_NO_MUTEX,
        )
        .map_err(at)?;
        connection.busy_timeout(BUSY_TIMEOUT).map_err(at)?;
        connection.pragma_update(None, "journal_mode", "WAL").map_err(at)?;
        connection.pragma_update(None, "synchronous", "NORMAL").map_err(at)?;
        if std::fs::metadata(path).is_ok_and(|data| data.len() < CHECK_BELOW_BYTES) {
            let verdict: String = connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0)).map_err(at)?;
            if verdict != "ok" {
                let code = rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_CORRUPT);
                return Err(at(rusqlite::Error::SqliteFailure(code, Some(verdict))));
            }
        }
        migrate(&mut connection, path)?;
        connection
            .execute(
                "INSERT INTO runs (started_ms, line, version) VALUES (?1, ?2, ?3)",
                params![utc::unix_ms_of(crate::frame::now_ns()), line, env!("CARGO_PKG_VERSION")],
            )
            .map_err(at)?;
        let run = connection.last_insert_rowid();
        let max_rows = i64::try_from(max_rows).unwrap_or(i64::MAX);
        Ok(Self { connection, path: path.to_owned(), line: line.to_owned(), max_rows, run })
    }

    /// All of `batch` in one transaction, and the oldest rows beyond the limit out in the same one.
    fn write(&mut self, batch: &[Entry]) -> rusqlite::Result<()> {
        let transaction = self.connection.transaction()?;
        {
            let mut insert = transaction.prepare_cached(
                "INSERT INTO inspections (run, time_ms, part, seq, decision, reason, score, p_value, latency_us, queue_us, preprocess_us, \
                 inference_us, verdict_us, product, path, truth) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16)",
            )?;
            for Entry { inspection, time_ms } in batch {
                let finite = |value: f32| value.is_finite().then_some(f64::from(value));
                let origin = &inspection.origin;
                let latency_us = inspection.decided_ns.saturating_sub(inspection.captured_ns) / 1_000;
                let stages = &inspection.stages;
                insert.execute(params![
                    self.run,
                    time_ms,
                    inspection.part.map(|part| part.0),
                    i64::try_from(inspection.seq).unwrap_or(i64::MAX),
                    decision_name(inspection.verdict.decision),
                    reason_name(inspection.verdict.reason),
                    finite(inspection.verdict.score),
                    finite(inspection.verdict.p_value),
                    i64::try_from(latency_us).unwrap_or(i64::MAX),
                    stages.queue_us,
                    stages.preprocess_us,
                    stages.inference_us,
                    stages.verdict_us,
                    origin.product.as_deref(),
                    origin.path.as_deref().map(|path| path.display().to_string()),
                    origin.truth.as_ref().map(|truth| truth.defect.as_deref().unwrap_or("good")),
                ])?;
            }
            // Rows are only ever removed at the old end, so the row number bounds the count without counting.
            let newest = transaction.last_insert_rowid();
            transaction.prepare_cached("DELETE FROM inspections WHERE id <= ?1")?.execute([newest.saturating_sub(self.max_rows)])?;
        }
        transaction.commit()
    }
}

/// Bring the schema to the newest version, in one transaction.
fn migrate(connection: &mut Connection, path: &Path) -> Result<(), JournalError> {
    let at = |source| JournalError::Database { path: path.to_owned(), source };
    let transaction = connection.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate).map_err(at)?;
    let found: i64 = transaction.query_row("PRAGMA user_version", [], |row| row.get(0)).map_err(at)?;
    let newer = || JournalError::Newer { path: path.to_owned(), found, known: MIGRATIONS.len() };
    let missing = usize::try_from(found).ok().and_then(|version| MIGRATIONS.get(version..)).ok_or_else(newer)?;
    if missing.is_empty() {
        return Ok(());
    }
    for script in missing {
        transaction.execute_batch(script).map_err(at)?;
    }
    transaction.pragma_update(None, "user_version", MIGRATIONS.len() as i64).map_err(at)?;
    transaction.commit().map_err(at)
}

fn is_corruption(error: &rusqlite::Error) -> bool {
    matches!(error.sqlite_error_code(), Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase))
}

/// Rename the database and its companions, so that nothing is lost that a specialist might still read.
fn move_aside(path: &Path, cause: &rusqlite::Error) -> Result<(), JournalError> {
    let stamp = utc::compact(utc::unix_ms_of(crate::frame::now_ns()));
    let named = |path: &Path, end: &str| {
        let mut name = path.as_os_str().to_owned();
        name.push(end);
        PathBuf::from(name)
    };
    let aside = named(path, &format!(".corrupt-{stamp}"));
    for end in ["", "-wal", "-shm"] {
        match std::fs::rename(named(path, end), named(&aside, end)) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(JournalError::Replace { path: path.to_owned(), source });
            }
            _ => {}
        }
    }
    log::error!("journal: {} is corrupt ({cause}); it was moved to {} and a new journal started", path.display(), aside.display());
    Ok(())
}

/// The same names as in records and JSON output (`snake_case`); a test holds the two together.
fn reason_name(reason: Reason) -> &'static str {
    match reason {
        Reason::Normal => "normal",
        Reason::Anomalous => "anomalous",
        Reason::NotFinite => "not_finite",
        Reason::DeadlineMissed => "deadline_missed",
        Reason::NoFrame => "no_frame",
        Reason::BadFrame => "bad_frame",
        Reason::ModelError => "model_error",
        Reason::Stopped => "stopped",
        Reason::LinkDown => "link_down",
    }
}

struct Writer {
    database: Database,
    counters: Arc<Counters>,
    closing: Arc<AtomicBool>,
    /// A failure is logged when it begins and when it ends.
    failing: bool,
    opened: Instant,
}

impl Writer {
    fn run(mut self, entries: &Receiver<Entry>) {
        let mut batch = Vec::with_capacity(BATCH_ROWS);
        let mut open = true;
        while open {
            // The first entry starts the clock of its transaction.
            match entries.recv() {
                Ok(entry) => batch.push(entry),
                Err(_) => break,
            }
            let end = Instant::now() + BATCH_TIME;
            while batch.len() < BATCH_ROWS {
                match entries.recv_deadline(end) {
                    Ok(entry) => batch.push(entry),
                    Err(RecvTimeoutError::Timeout) => break,
                    Err(RecvTimeoutError::Disconnected) => {
                        open = false;
                        break;
                    }
                }
            }
            self.commit(&batch);
            batch.clear();
        }
        // Leaves one file instead of three, for whoever copies it. Failure costs nothing: the next start recovers the WAL.
        if let Err(error) = self.database.connection.pragma_query(None, "wal_checkpoint", |_| Ok(())) {
            log::debug!("journal: no checkpoint at the end: {error}");
        }
    }

    /// Write `batch`, trying again until it is in or, at shutdown, a few times.
    fn commit(&mut self, batch: &[Entry]) {
        let mut tries = 0;
        loop {
            let error = match self.database.write(batch) {
                Ok(()) => {
                    if std::mem::take(&mut self.failing) {
                        log::info!("journal: verdicts are written again");
                    }
                    self.counters.written.fetch_add(batch.len() as u64, Ordering::Relaxed);
                    return;
                }
                Err(error) => error,
            };
            self.counters.retries.fetch_add(1, Ordering::Relaxed);
            if !std::mem::replace(&mut self.failing, true) {
                log::error!(
                    "journal: cannot write to {}: {error}; check the disk; verdicts wait in memory ({QUEUE_ENTRIES} at most), the line goes on",
                    self.database.path.display()
                );
            }
            if is_corruption(&error) && self.opened.elapsed() >= REPLACE_AT_MOST_EVERY && self.replace(&error) {
                continue;
            }
            tries += 1;
            if self.closing.load(Ordering::Relaxed) && tries >= TRIES_AT_SHUTDOWN {
                log::error!("journal: {} verdicts given up at shutdown", batch.len());
                self.counters.lost.fetch_add(batch.len() as u64, Ordering::Relaxed);
                return;
            }
            std::thread::sleep(RETRY_PAUSE);
        }
    }

    /// The database turned out corrupt while running: move it aside and go on with a new one.
    fn replace(&mut self, cause: &rusqlite::Error) -> bool {
        self.opened = Instant::now();
        let max_rows = u64::try_from(self.database.max_rows).unwrap_or(u64::MAX);
        let renewed = move_aside(&self.database.path, cause)
            .and_then(|()| Database::open(&self.database.path, &self.database.line, max_rows, &self.counters));
        match renewed {
            Ok(database) => {
                self.database = database;
                self.counters.replaced.fetch_add(1, Ordering::Relaxed);
                true
            }
            Err(error) => {
                log::error!("journal: {error}");
                false
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_json_output() {
        use Reason::*;
        for reason in [Normal, Anomalous, NotFinite, DeadlineMissed, NoFrame, BadFrame, ModelError, Stopped, LinkDown] {
            assert_eq!(serde_json::to_value(reason).expect("a name"), reason_name(reason));
        }
    }
}
