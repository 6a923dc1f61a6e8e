//! Live page and metrics: the last verdicts, counters, latencies and the newest heat map for people, `/metrics` for Prometheus, `/health` for
//! whoever watches boxes. Read-only: nothing that comes in over HTTP changes anything.
//!
//! Off unless configured, on loopback unless told otherwise, without authentication: whoever reaches the port reads it. It runs on a thread
//! of its own with a single-threaded runtime and only reads copies, so a slow browser costs the line nothing. This module may know the
//! pipeline's figures and inspections and the snapshot folder; nothing knows it but the command line.

use crate::config::WebConfig;
use crate::pipeline::{Control, Counts, Inspection, Latency, Stats};
use crate::plc::HostState;
use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderValue, Response, StatusCode, header};
use axum::routing::get;
use serde_json::json;
use std::collections::VecDeque;
use std::fmt::Write;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

/// Verdicts that the page shows.
const LAST_VERDICTS: usize = 50;
/// The snapshot folder is searched for its newest heat map no more often than this, however many browsers ask.
const OVERLAY_EVERY: Duration = Duration::from_secs(1);
/// Largest picture that is sent.
const MAX_OVERLAY_BYTES: u64 = 64 << 20;

/// Why the page cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum WebError {
    /// The address cannot be used.
    #[error("cannot serve the live page on {bind}: {source}; choose a free address in `web.bind`")]
    Bind {
        /// Address and port.
        bind: SocketAddr,
        /// Cause.
        source: io::Error,
    },
    /// The system gave no thread or runtime.
    #[error("cannot start the live page: {0}")]
    Start(io::Error),
}

/// What the page says of the line beside its figures.
#[derive(Clone, Debug)]
pub struct About {
    /// Name of the line.
    pub line: String,
    /// Name of the model.
    pub model: String,
    /// SHA-256 of the model bundle, hex.
    pub model_sha256: String,
    /// Where the recorder writes, if it does.
    pub snapshots: Option<PathBuf>,
}

/// The page that runs. Dropping it closes it.
pub struct PageHandle {
    address: SocketAddr,
    board: Arc<Board>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// Shows inspections on the page. Never waits for a browser; meant for the thread that empties the pipeline's tap.
#[derive(Clone)]
pub struct Feed {
    board: Arc<Board>,
}

/// What the handlers read.
struct Board {
    about: About,
    control: Control,
    last: Mutex<VecDeque<Inspection>>,
    overlay: Mutex<Overlay>,
}

/// The newest heat map, as of the last search.
#[derive(Default)]
struct Overlay {
    searched: Option<Instant>,
    file: Option<PathBuf>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is inside is whole at any time: a panicking reader leaves nothing half done.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Serve the page.
///
/// # Errors
/// When the address is taken or not this machine's, or there is no thread to be had.
pub fn spawn(config: &WebConfig, about: About, control: Control) -> Result<PageHandle, WebError> {
    let bind = config.bind;
    let failed = |source| WebError::Bind { bind, source };
    let listener = TcpListener::bind(bind).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    if !address.ip().is_loopback() {
        log::warn!("the live page on {address} can be read by everybody who reaches that address: it has no passwords");
    }
    let board = Arc::new(Board { about, control, last: Mutex::new(VecDeque::with_capacity(LAST_VERDICTS)), overlay: Mutex::default() });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build().map_err(WebError::Start)?;
    let (stop, stopped) = oneshot::channel();
    let app = router(Arc::clone(&board));
    let thread = std::thread::Builder::new()
        .name("web".into())
        .spawn(move || {
            runtime.spawn(async move {
                let served = match tokio::net::TcpListener::from_std(listener) {
                    Ok(listener) => axum::serve(listener, app).await,
                    Err(error) => Err(error),
                };
                if let Err(error) = served {
                    log::error!("the live page ended: {error}");
                }
            });
            // An error means that the handle is gone, which ends the page as well.
            let _ = runtime.block_on(stopped);
            // Browsers that keep their connection open are not waited for.
            runtime.shutdown_background();
        })
        .map_err(WebError::Start)?;
    log::info!("live page on http://{address}/");
    Ok(PageHandle { address, board, stop: Some(stop), thread: Some(thread) })
}

impl PageHandle {
    /// Where the page is (the real port, when 0 was configured).
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// A way to show inspections.
    pub fn feed(&self) -> Feed {
        Feed { board: Arc::clone(&self.board) }
    }
}

impl Drop for PageHandle {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the live page's thread panicked; please report this with the log");
        }
    }
}

impl Feed {
    /// Show an inspection as the newest.
    pub fn show(&self, inspection: Inspection) {
        let mut last = lock(&self.board.last);
        if last.len() >= LAST_VERDICTS {
            last.pop_front();
        }
        last.push_back(inspection);
    }
}

fn router(board: Arc<Board>) -> Router {
    Router::new()
        .route("/", get(|| async { answer(StatusCode::OK, "text/html; charset=utf-8", include_str!("page.html")) }))
        .route("/api/state", get(state))
        .route("/overlay.png", get(overlay))
        .route("/metrics", get(metrics))
        .route("/health", get(health))
        .with_state(board)
}

fn answer(status: StatusCode, kind: &'static str, body: impl Into<Body>) -> Response<Body> {
    let mut response = Response::new(body.into());
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    // Names of files and products are shown as text only; this is the second lock on that door.
    headers.insert(
        header::CONTENT_SECURITY_POLICY,
        HeaderValue::from_static(
            "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src 'self'; connect-src 'self'",
        ),
    );
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

async fn state(State(board): State<Arc<Board>>) -> Response<Body> {
    let stats = board.control.stats();
    let last: Vec<_> = lock(&board.last).iter().rev().map(verdict_json).collect();
    let about = &board.about;
    let body = json!({ "line": about.line, "model": about.model, "model_sha256": about.model_sha256, "stats": stats, "last": last });
    answer(StatusCode::OK, "application/json", body.to_string())
}

fn verdict_json(i: &Inspection) -> serde_json::Value {
    json!({
        "part": i.part.map(|p| p.0),
        "seq": i.seq,
        "product": i.origin.product.as_deref(),
        "file": i.origin.path.as_ref().and_then(|p| p.file_name()).map(|n| n.to_string_lossy().into_owned()),
        "decision": i.verdict.decision,
        "reason": i.verdict.reason,
        "score": i.verdict.score,
        "p_value": i.verdict.p_value,
        "total_ms": i.decided_ns.saturating_sub(i.captured_ns) as f64 / 1e6,
    })
}

async fn health(State(board): State<Arc<Board>>) -> Response<Body> {
    let state = board.control.stats().host_state;
    let status = match state {
        HostState::Running | HostState::Stopped => StatusCode::OK,
        HostState::Starting | HostState::CameraFault | HostState::InternalFault => StatusCode::SERVICE_UNAVAILABLE,
    };
    answer(status, "text/plain; charset=utf-8", format!("{state:?}\n"))
}

async fn metrics(State(board): State<Arc<Board>>) -> Response<Body> {
    let text = prometheus_text(&board.about, &board.control.stats());
    answer(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", text)
}

async fn overlay(State(board): State<Arc<Board>>) -> Response<Body> {
    let missing = || answer(StatusCode::NOT_FOUND, "text/plain; charset=utf-8", "no heat map yet\n");
    // Disk on another thread: the page's own answers the next request meanwhile.
    match tokio::task::spawn_blocking(move || newest_overlay(&board)).await {
        Ok(Some(png)) => answer(StatusCode::OK, "image/png", png),
        Ok(None) => missing(),
        Err(error) => {
            log::warn!("live page: the newest heat map could not be read: {error}");
            missing()
        }
    }
}

/// The bytes of the newest heat map.
fn newest_overlay(board: &Board) -> Option<Vec<u8>> {
    let folder = board.about.snapshots.as_deref()?;
    let file = {
        let mut overlay = lock(&board.overlay);
        if overlay.searched.is_none_or(|at| at.elapsed() >= OVERLAY_EVERY) {
            overlay.file = newest_heat_map(folder);
            overlay.searched = Some(Instant::now());
        }
        overlay.file.clone()?
    };
    // It may have been removed to make room since; then the next request finds a newer one.
    let size = std::fs::metadata(&file).ok()?.len();
    if size > MAX_OVERLAY_BYTES { None } else { std::fs::read(&file).ok() }
}

/// Snapshots are named by time, so the newest is the last by name.
fn newest_heat_map(folder: &Path) -> Option<PathBuf> {
    let names = std::fs::read_dir(folder).ok()?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    names.filter(|name| name.ends_with(".heat.png")).max().map(|name| folder.join(name))
}

/// The figures in Prometheus' text format.
fn prometheus_text(about: &About, stats: &Stats) -> String {
    let mut out = String::new();
    let line = escaped(&about.line);
    // Writing to a `String` cannot fail.
    let head = |out: &mut String, name: &str, kind: &str, help: &str| {
        let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
    };
    head(&mut out, "cull_build_info", "gauge", "Version and model.");
    let _ = writeln!(
        out,
        "cull_build_info{{line=\"{line}\",version=\"{}\",model=\"{}\",model_sha256=\"{}\"}} 1",
        env!("CARGO_PKG_VERSION"),
        escaped(&about.model),
        escaped(&about.model_sha256)
    );
    let Counts { accepted, rejected, unknown, faults, .. } = stats.counts;
    head(&mut out, "cull_parts_total", "counter", "Parts that got a verdict.");
    for (decision, n) in [("accept", accepted), ("reject", rejected), ("unknown", unknown), ("fault", faults)] {
        let _ = writeln!(out, "cull_parts_total{{line=\"{line}\",decision=\"{decision}\"}} {n}");
    }
    let c = &stats.counts;
    let counters = [
        ("cull_frames_total", c.frames, "Frames from the source."),
        ("cull_dropped_frames_total", c.dropped_frames, "Free-running frames replaced by newer ones."),
        ("cull_missed_deadline_total", c.missed_deadline, "Parts whose deadline came before their verdict; rejected."),
        ("cull_no_frame_total", c.no_frame, "Parts without a picture; rejected."),
        ("cull_late_results_total", c.late_results, "Results that came after the deadline."),
        ("cull_undelivered_total", c.undelivered, "Verdicts that could not be handed to the PLC link."),
        ("cull_snapshots_skipped_total", c.snapshots_skipped, "Pictures that the recorder had no room for."),
        ("cull_journal_skipped_total", c.journal_skipped, "Verdicts that the journal had no room for."),
        ("cull_panics_total", c.panics, "Panics caught in a stage."),
        ("cull_source_errors_total", c.source_errors, "Errors that the source reported."),
        ("cull_source_restarts_total", c.source_restarts, "Times the source was opened again."),
        ("cull_golden_failed_total", c.golden_failed, "Golden samples that were not accepted."),
    ];
    for (name, n, help) in counters {
        head(&mut out, name, "counter", help);
        let _ = writeln!(out, "{name}{{line=\"{line}\"}} {n}");
    }
    head(&mut out, "cull_running", "gauge", "1 while the line inspects.");
    let _ = writeln!(out, "cull_running{{line=\"{line}\"}} {}", u8::from(stats.host_state == HostState::Running));
    head(&mut out, "cull_link_up", "gauge", "1 while the PLC link is up.");
    let _ = writeln!(out, "cull_link_up{{line=\"{line}\"}} {}", u8::from(stats.link == Some(crate::plc::LinkState::Up)));
    head(&mut out, "cull_stage_seconds", "summary", "Time a part spends in each stage.");
    let l = &stats.latency_ms;
    let stages: [(&str, &Latency); 7] = [
        ("queue", &l.queue),
        ("preprocess", &l.preprocess),
        ("inference", &l.inference),
        ("verdict", &l.verdict),
        ("link", &l.link),
        ("total", &l.total),
        ("response", &l.response),
    ];
    for (stage, latency) in stages {
        for (quantile, ms) in [("0.5", latency.p50), ("0.99", latency.p99), ("1", latency.max)] {
            let _ = writeln!(out, "cull_stage_seconds{{line=\"{line}\",stage=\"{stage}\",quantile=\"{quantile}\"}} {}", ms / 1e3);
        }
        let _ = writeln!(out, "cull_stage_seconds_count{{line=\"{line}\",stage=\"{stage}\"}} {}", latency.count);
    }
    out
}

/// A label value.
fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn label_values_are_escaped() {
        assert_eq!(escaped("a\"b\\c\nd"), "a\\\"b\\\\c\\nd");
    }

    #[test]
    fn the_newest_heat_map_is_the_last_by_name() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(newest_heat_map(folder.path()), None);
        for name in ["20260101T000000.000Z-1_part1_reject.heat.png", "20260201T000000.000Z-1_part2_reject.heat.png", "zzz.png"] {
            std::fs::write(folder.path().join(name), b"x").unwrap();
        }
        let newest = newest_heat_map(folder.path()).unwrap();
        assert!(newest.to_string_lossy().contains("part2"), "{newest:?}");
    }
}
