//! Logging to stderr that never holds the line up: a terminal that is paused, or a journald that is stuck, would block a plain write, and the
//! hot path with it. Messages go through a bounded queue to a thread that writes; a full queue loses messages, and says how many.

use crossbeam_channel::{Receiver, Sender, bounded};
use log::{Level, Log, Metadata, Record};
use std::io::Write;
use std::panic::PanicHookInfo;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Messages that wait at most. A line logs a few per minute; a debug run a few hundred per second.
const QUEUE: usize = 1024;
/// How long the end of the program waits for the last messages to be written.
const FLUSH_LIMIT: Duration = Duration::from_secs(1);

/// A message on its way to the writer.
enum Item {
    Message { level: Level, target: String, text: String },
    Flush(Sender<()>),
}

/// Hands messages to the writer.
struct Queued {
    /// Decides what is logged.
    filter: Arc<env_logger::Logger>,
    queue: Sender<Item>,
    lost: Arc<AtomicU64>,
}

/// Log to stderr: `CULL_LOG` (or `RUST_LOG`) sets the level, info by default. Under journald (`JOURNAL_STREAM` set) lines carry a syslog
/// priority prefix and no time or colour, since journald adds its own. Panics are logged like any other message.
pub fn init() {
    let filter =
        std::env::var("CULL_LOG").or_else(|_| std::env::var("RUST_LOG")).unwrap_or_else(|_| "info,tract_core=warn,tract_onnx=warn".into());
    let mut builder = env_logger::Builder::new();
    builder.parse_filters(&filter);
    if std::env::var_os("JOURNAL_STREAM").is_some() {
        builder.write_style(env_logger::WriteStyle::Never).format(|out, record| {
            let priority = match record.level() {
                Level::Error => 3,
                Level::Warn => 4,
                Level::Info => 6,
                Level::Debug | Level::Trace => 7,
            };
            writeln!(out, "<{priority}>{}: {}", record.target(), record.args())
        });
    }
    let writer = Arc::new(builder.build());
    let (queue, items) = bounded(QUEUE);
    let lost = Arc::new(AtomicU64::new(0));
    let (filter, losses) = (Arc::clone(&writer), Arc::clone(&lost));
    let level = filter.filter();
    if let Err(error) = std::thread::Builder::new().name("log".into()).spawn(move || write(&writer, &items, &losses)) {
        eprintln!("cull: no thread for the log, which stays empty: {error}");
        return;
    }
    // Fails only if a logger was set before; there is none.
    if log::set_boxed_logger(Box::new(Queued { filter, queue, lost })).is_ok() {
        log::set_max_level(level);
        std::panic::set_hook(Box::new(log_panic));
    }
}

/// Write out what waits. For the end of the program.
pub fn flush() {
    log::logger().flush();
}

fn write(writer: &env_logger::Logger, items: &Receiver<Item>, lost: &AtomicU64) {
    let log = |level, target: &str, text: &str| {
        writer.log(&Record::builder().level(level).target(target).args(format_args!("{text}")).build());
    };
    for item in items {
        match item {
            Item::Message { level, target, text } => log(level, &target, &text),
            Item::Flush(done) => {
                // Whoever asked may have given up waiting.
                let _ = done.try_send(());
            }
        }
        let lost = lost.swap(0, Ordering::Relaxed);
        if lost > 0 {
            log(Level::Warn, module_path!(), &format!("{lost} messages were lost because the log could not be written fast enough"));
        }
    }
}

/// What the standard hook prints, through the queue.
fn log_panic(panic: &PanicHookInfo<'_>) {
    let thread = std::thread::current();
    let place = panic.location().map(|l| format!("{}:{}", l.file(), l.line())).unwrap_or_default();
    let what = panic.payload_as_str().unwrap_or("no message");
    log::error!(target: "panic", "thread `{}` panicked at {place}: {what}", thread.name().unwrap_or("unnamed"));
}

impl Log for Queued {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.filter.enabled(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        if !self.filter.matches(record) {
            return;
        }
        let item = Item::Message { level: record.level(), target: record.target().into(), text: record.args().to_string() };
        if self.queue.try_send(item).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn flush(&self) {
        let (done, written) = bounded(1);
        // Either wait running out means that stderr is stuck; the program ends all the same.
        if self.queue.send_timeout(Item::Flush(done), FLUSH_LIMIT).is_ok() {
            let _ = written.recv_timeout(FLUSH_LIMIT);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_queue_loses_messages_and_never_waits() {
        let (queue, items) = bounded(2);
        let filter = Arc::new(env_logger::Builder::new().filter_level(log::LevelFilter::Info).build());
        let logger = Queued { filter, queue, lost: Arc::default() };
        for n in 0..5 {
            logger.log(&Record::builder().level(Level::Info).target("t").args(format_args!("message {n}")).build());
            logger.log(&Record::builder().level(Level::Debug).target("t").args(format_args!("below the level")).build());
        }
        assert_eq!(items.len(), 2);
        assert_eq!(logger.lost.load(Ordering::Relaxed), 3);
    }
}
