//! The journal against a real file: rows, limits, migration, corruption, `kill -9`.

use cull::config::JournalConfig;
use cull::frame::{Origin, PartId, Truth, now_ns};
use cull::journal::{self, BATCH_ROWS, Entry, JournalError};
use cull::pipeline::{Inspection, StageTimes};
use cull::verdict::{Decision, Reason, Verdict, without_score};
use rusqlite::Connection;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

fn config(path: &Path) -> JournalConfig {
    JournalConfig { path: Some(path.to_owned()), max_rows: 1_000_000 }
}

fn inspection(seq: u64) -> Inspection {
    let verdict = if seq.is_multiple_of(5) {
        without_score(Reason::DeadlineMissed)
    } else {
        Verdict { decision: Decision::Reject, reason: Reason::Anomalous, score: 3.5, p_value: 0.001 }
    };
    Inspection {
        part: Some(PartId(seq as u32)),
        seq,
        verdict,
        captured_ns: now_ns(),
        decided_ns: now_ns() + 2_000_000,
        stages: StageTimes { queue_us: 1, preprocess_us: 2, inference_us: 3, verdict_us: 4 },
        origin: Origin { path: None, product: Some("metal".into()), truth: Some(Truth { defect: None }) },
    }
}

fn count(path: &Path) -> i64 {
    Connection::open(path).expect("open").query_row("SELECT count(*) FROM inspections", [], |row| row.get(0)).expect("count")
}

#[test]
fn what_goes_in_can_be_queried() {
    let folder = tempfile::tempdir().expect("temp folder");
    let path = folder.path().join("journal.db");
    let journal = journal::spawn(&config(&path), "line 7").expect("spawn");
    for seq in 1..=10 {
        assert!(journal.try_write(Entry::from(&inspection(seq))));
    }
    let counters = journal.finish();
    assert_eq!((counters.written, counters.lost, counters.retries), (10, 0, 0));

    let database = Connection::open(&path).expect("open");
    let row = database
        .query_row(
            "SELECT line, part, decision, reason, score, p_value, latency_us, inference_us, product, truth, \
             abs(time_ms - unixepoch() * 1000) < 3600000 FROM inspections JOIN runs ON run = runs.id WHERE seq = 4",
            [],
            |row| {
                Ok((
                    row.get::<_, String>(0)?,
                    row.get::<_, u32>(1)?,
                    row.get::<_, String>(2)?,
                    row.get::<_, String>(3)?,
                    row.get::<_, f32>(4)?,
                    row.get::<_, f32>(5)?,
                    row.get::<_, i64>(6)?,
                    row.get::<_, u32>(7)?,
                    row.get::<_, String>(8)?,
                    row.get::<_, String>(9)?,
                    row.get::<_, bool>(10)?,
                ))
            },
        )
        .expect("row 4");
    assert_eq!((row.0.as_str(), row.1, row.2.as_str(), row.3.as_str()), ("line 7", 4, "reject", "anomalous"));
    assert_eq!((row.4, row.5, row.7), (3.5, 0.001, 3));
    assert!((2_000..60_000_000).contains(&row.6), "latency {} us", row.6);
    assert_eq!((row.8.as_str(), row.9.as_str(), row.10), ("metal", "good", true));
    let missed: (String, Option<f32>) = database
        .query_row("SELECT decision, score FROM inspections WHERE seq = 5", [], |row| Ok((row.get(0)?, row.get(1)?)))
        .expect("row 5");
    assert_eq!(missed, ("unknown".into(), None), "a score that does not exist is NULL");
}

#[test]
fn the_oldest_rows_go_and_runs_add_up() {
    let folder = tempfile::tempdir().expect("temp folder");
    let path = folder.path().join("journal.db");
    for run in 0..2u64 {
        let journal = journal::spawn(&JournalConfig { path: Some(path.clone()), max_rows: 1_000 }, "line").expect("spawn");
        for seq in 0..800 {
            assert!(journal.try_write(inspection(run * 800 + seq).into()));
        }
        assert_eq!(journal.finish().written, 800);
    }
    assert_eq!(count(&path), 1_000);
    let oldest: i64 =
        Connection::open(&path).expect("open").query_row("SELECT min(seq) FROM inspections", [], |row| row.get(0)).expect("oldest");
    assert_eq!(oldest, 600);
}

#[test]
fn a_corrupt_database_is_moved_aside() {
    let folder = tempfile::tempdir().expect("temp folder");
    let path = folder.path().join("journal.db");
    let journal = journal::spawn(&config(&path), "line").expect("spawn");
    for seq in 0..2_000 {
        assert!(journal.try_write(inspection(seq).into()));
    }
    journal.finish();
    let sound = std::fs::read(&path).expect("read");
    let mut torn = sound.clone();
    for page in torn.chunks_mut(4096).skip(1) {
        page.fill(0xa5);
    }
    for (name, bytes) in [("not a database", vec![b'x'; 8192]), ("torn pages", torn), ("cut off", sound[..sound.len() / 3].to_vec())] {
        for entry in std::fs::read_dir(folder.path()).expect("folder") {
            std::fs::remove_file(entry.expect("entry").path()).expect("removed");
        }
        std::fs::write(&path, &bytes).expect("write");
        let journal = journal::spawn(&config(&path), "line").unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(journal.try_write(inspection(1).into()));
        let counters = journal.finish();
        assert_eq!((counters.written, counters.replaced), (1, 1), "{name}");
        assert_eq!(count(&path), 1, "{name}");
        let aside = std::fs::read_dir(folder.path()).expect("folder").map(|entry| entry.expect("entry").path());
        let aside: Vec<_> = aside.filter(|path| path.to_string_lossy().contains(".corrupt-")).collect();
        assert_eq!(aside.len(), 1, "{name}: {aside:?}");
        assert_eq!(std::fs::read(&aside[0]).expect("read"), bytes, "{name}: nothing is thrown away");
    }
}

#[test]
fn a_database_from_the_future_is_refused_and_left_alone() {
    let folder = tempfile::tempdir().expect("temp folder");
    let path = folder.path().join("journal.db");
    Connection::open(&path).expect("open").pragma_update(None, "user_version", 99).expect("version");
    match journal::spawn(&config(&path), "line").map(drop) {
        Err(JournalError::Newer { found: 99, .. }) => {}
        other => panic!("{other:?}"),
    }
    assert!(path.exists());
}

#[test]
fn a_folder_that_is_missing_is_one_clear_error() {
    let folder = tempfile::tempdir().expect("temp folder");
    let error = journal::spawn(&config(&folder.path().join("no/such/journal.db")), "line").map(drop).expect_err("no folder");
    assert!(error.to_string().contains("no/such/journal.db"), "{error}");
}

#[test]
fn a_locked_database_costs_time_and_no_verdicts() {
    let folder = tempfile::tempdir().expect("temp folder");
    let path = folder.path().join("journal.db");
    let journal = journal::spawn(&config(&path), "line").expect("spawn");
    let other = Connection::open(&path).expect("open");
    other.execute_batch("BEGIN IMMEDIATE").expect("lock");
    for seq in 0..50 {
        assert!(journal.try_write(inspection(seq).into()));
    }
    let end = Instant::now() + Duration::from_secs(60);
    while journal.counters().retries == 0 {
        assert!(Instant::now() < end, "the lock was never met");
        std::thread::sleep(Duration::from_millis(50));
    }
    other.execute_batch("ROLLBACK").expect("unlock");
    let end = Instant::now() + Duration::from_secs(60);
    while journal.counters().written < 50 {
        assert!(Instant::now() < end, "never written: {:?}", journal.counters());
        std::thread::sleep(Duration::from_millis(50));
    }
    drop(journal);
    assert_eq!(count(&path), 50);
}

/// Not a test of its own: the process that `kill_minus_nine_loses_nothing_committed` kills.
#[test]
fn child_that_writes_until_killed() {
    let Some(path) = std::env::var_os("CULL_TEST_JOURNAL_CHILD") else { return };
    let journal = journal::spawn(&config(Path::new(&path)), "line").expect("spawn");
    for seq in 0.. {
        while !journal.try_write(inspection(seq).into()) {
            std::thread::sleep(Duration::from_millis(1));
        }
        if seq % 100 == 0 {
            println!("written {}", journal.counters().written);
        }
    }
}

#[test]
fn kill_minus_nine_loses_nothing_committed() {
    let folder = tempfile::tempdir().expect("temp folder");
    let path = folder.path().join("journal.db");
    let mut rows = 0;
    for round in 0..3 {
        let start = Instant::now();
        let mut child = Command::new(std::env::current_exe().expect("this test"))
            .args(["--exact", "child_that_writes_until_killed", "--nocapture"])
            .env("CULL_TEST_JOURNAL_CHILD", &path)
            .stdout(Stdio::piped())
            .spawn()
            .expect("child");
        let mut committed = 0;
        for line in BufReader::new(child.stdout.take().expect("stdout")).lines() {
            let line = line.expect("line");
            if let Some(number) = line.strip_prefix("written ") {
                committed = number.parse().expect("number");
            }
            if committed >= 5 * BATCH_ROWS as i64 {
                break;
            }
        }
        child.kill().expect("SIGKILL");
        child.wait().expect("gone");
        assert!(committed > 0, "the child wrote nothing in round {round}");

        eprintln!("round {round}: {committed} rows committed {:.2} s after the process started", start.elapsed().as_secs_f64());

        // The next start takes the database as it is: nothing moved aside, all committed rows there, none torn.
        let journal = journal::spawn(&config(&path), "line").expect("re-open");
        assert_eq!(journal.finish().replaced, 0);
        let database = Connection::open(&path).expect("open");
        let verdict: String = database.query_row("PRAGMA integrity_check", [], |row| row.get(0)).expect("check");
        assert_eq!(verdict, "ok");
        let (total, newest): (i64, i64) =
            database.query_row("SELECT count(*), max(id) FROM inspections", [], |row| Ok((row.get(0)?, row.get(1)?))).expect("count");
        assert_eq!(total, newest, "no gaps");
        assert!(total - rows >= committed, "round {round}: {committed} rows were committed, {} are there", total - rows);
        rows = total;
    }
}
