//! `cull demo`: a simulated line, the real pipeline and model, and a simulated reject board in a process of its own that speaks the real wire
//! protocol over a pseudo-terminal. Three phases: the bare model call, a paced line (latencies), a closed loop (throughput).

mod board;
mod tally;

use super::summary::{find_default_model, latency_table, load_model, rss_mb, shown, snapshot_context, stages};
use anyhow::{Context, bail};
use board::{Board, Counters, Gate, Line};
use crossbeam_channel::{Receiver, bounded, select};
use cull::anomaly::AnomalyMap;
use cull::config::{BridgeConfig, Config, InferenceConfig, JournalConfig, PlcConfig, SnapshotConfig, SourceConfig, TriggerMode};
use cull::frame::PartId;
use cull::kernels::alloc;
use cull::model::runtime::Model;
use cull::pipeline::{Counts, Ended, Inspection, Latency, Options, Pipeline, Running, Sinks, StageLatency};
use cull::plc::{BoardState, HostState, LinkState, LinkSummary};
use cull::pool::Pool;
use cull::preprocess::Preprocessor;
use cull::source::simulated::SimulatedLine;
use cull::source::{Grab, Source, Trigger};
use cull::{journal, plc, snapshot, source};
use firmware_bridge::schedule::MAX_PARTS;
use serde_json::json;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tally::{Ledger, Story, Tally};

/// The paced line runs at this share of what the bare model can do: busy, as a line is laid out, and not queueing.
const PACE_SHARE: f64 = 0.6;
/// But at no more than this share of the parts that the board can follow between sensor and gate: one more than those, and it latches.
const BELT_SHARE: f64 = 0.8;
/// Share of the time for the bare model, measured before and after the line (so twice).
const BARE_SHARE: f64 = 0.08;
/// Of the rest, the share for the paced line; the closed loop has what remains.
const PACED_SHARE: f64 = 0.55;
/// The bare model is measured for no longer than this at a time.
const BARE_MAX_S: f64 = 2.0;
/// Of each phase, this share is warm-up and not measured.
const WARM_UP_SHARE: f64 = 0.15;
/// Parts in flight in the closed loop beyond one per worker, so that no worker ever waits: one with the board, one being rendered, one
/// being preprocessed, one ready.
const EXTRA_IN_FLIGHT: usize = 4;
/// The board decides by itself after this many inference times, within [`DEADLINE_MIN_MS`] and [`DEADLINE_MAX_MS`].
const DEADLINE_INFERENCES: f64 = 12.0;
/// Room for a scheduler that serves other work as well.
const DEADLINE_MIN_MS: u32 = 300;
const DEADLINE_MAX_MS: u32 = 20_000;
/// The board takes a silent host for dead after this. Longer than a line would have it: a build machine that is busy with other work may not
/// run a process for a second, and the safe state would be latched.
const WATCHDOG_MS: u32 = 3_000;
/// From the deadline to the gate.
const GATE_AFTER_DEADLINE_MS: u32 = 50;
/// The ejector is on for so long around a part: parts of the closed loop come every few ms and must not be taken for their neighbours.
const LEAD_MS: u32 = 1;
const PULSE_MS: u32 = 2;
/// Host and board greet each other within this, or something is wrong.
const LINK_LIMIT: Duration = Duration::from_secs(10);
/// Inspections that may wait to be printed.
const TAP_QUEUE: usize = 4096;
/// At most so many workers: one core stays free for the simulated line and the board, whose rendering is the limit beyond that.
const MAX_WORKERS: usize = 4;

/// Arguments of `cull demo`.
#[derive(clap::Args)]
pub struct Args {
    /// How long to inspect, in seconds, 1 to 86400
    #[arg(long, default_value_t = 10.0, value_parser = seconds)]
    seconds: f64,
    /// Same seed, same parts
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Share of defective parts, 0 to 1
    #[arg(long, default_value_t = 0.2, value_parser = share)]
    defect_share: f32,
    /// Print one JSON object and nothing else on stdout
    #[arg(long)]
    json: bool,
    /// Folder for snapshots and journal
    #[arg(long, default_value = "demo-out", value_name = "DIR")]
    out: PathBuf,
    /// Model bundle instead of the shipped one
    #[arg(long, value_name = "FILE")]
    model: Option<PathBuf>,
    /// Inference workers; by default one core is left to the simulated line
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=64))]
    workers: Option<u16>,
}

fn seconds(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|s| (1.0..=86_400.0).contains(s)).ok_or_else(|| "must be 1 to 86400".into())
}

fn share(text: &str) -> Result<f32, String> {
    text.parse().ok().filter(|s| (0.0..=1.0).contains(s)).ok_or_else(|| "must be 0 to 1".into())
}

/// Run the command.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let began = Instant::now();
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register_conditional_shutdown(signal, 128 + signal, Arc::clone(&stop)).context("signals")?;
        signal_hook::flag::register(signal, Arc::clone(&stop)).context("signals")?;
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let workers = args.workers.map_or((cores.saturating_sub(1)).clamp(1, MAX_WORKERS), usize::from);
    let model_path = match &args.model {
        Some(path) => path.clone(),
        None => find_default_model()?,
    };
    std::fs::create_dir_all(&args.out).with_context(|| format!("cannot create the folder {}", args.out.display()))?;
    let mut config = Config {
        line: "demo".into(),
        model: model_path,
        source: SourceConfig::Simulated { seed: args.seed, defect_share: args.defect_share },
        trigger: TriggerMode::Board,
        inference: InferenceConfig { workers, threads_per_frame: 1 },
        snapshots: SnapshotConfig { folder: Some(args.out.join("snapshots")), ..SnapshotConfig::default() },
        journal: JournalConfig { path: Some(args.out.join("verdicts.db")), ..JournalConfig::default() },
        ..Config::default()
    };
    let model = load_model(&config)?;
    let load_ms = began.elapsed().as_millis();
    let mut screen = Screen { quiet: args.json, out: std::io::stdout() };
    screen.line(format_args!("model     {} ({}), loaded in {load_ms} ms", model.meta().name, shown(&config.model)));

    let bare_time = Duration::from_secs_f64((args.seconds * BARE_SHARE).min(BARE_MAX_S));
    let bare_fps = bare_model_fps(&model, &config, bare_time)?;
    screen.line(format_args!("bare      {bare_fps:.1} inferences/s ({workers} worker{})", if workers == 1 { "" } else { "s" }));

    let inference_ms = 1e3 * workers as f64 / bare_fps;
    let deadline_ms = ((inference_ms * DEADLINE_INFERENCES) as u32).clamp(DEADLINE_MIN_MS, DEADLINE_MAX_MS);
    let gate_ms = deadline_ms + GATE_AFTER_DEADLINE_MS;
    let mut board = Board::start(
        &[
            ("--deadline-ms", deadline_ms),
            ("--watchdog-ms", WATCHDOG_MS),
            ("--gate-ms", gate_ms),
            ("--lead-ms", LEAD_MS),
            ("--pulse-ms", PULSE_MS),
        ]
        .iter()
        .flat_map(|(name, value)| [name.to_string(), value.to_string()])
        .collect::<Vec<_>>(),
    )?;
    config.plc = PlcConfig::Bridge(BridgeConfig { deadline_ms, watchdog_ms: WATCHDOG_MS, ..bridge_defaults(board.port.clone()) });
    screen.line(format_args!("board     own process on {}, deadline {deadline_ms} ms", board.port.display()));

    let sinks = Sinks {
        recorder: Some(snapshot::spawn(&config.snapshots, snapshot_context(&config, &model))?),
        journal: Some(journal::spawn(&config.journal, &config.line)?),
    };
    let link = plc::spawn(&config.plc)?;
    let link_stats = link.as_ref().map(|l| Arc::clone(&l.stats));
    let (tap, inspections) = bounded(TAP_QUEUE);
    let options = Options { tap: Some(tap), ..Options::from_config(&config) };
    let running = Pipeline::start(options, Arc::new(model.clone()), source::open(&config.source)?, link, sinks)?;
    wait_until_running(&running)?;

    let mut floor = Floor {
        ledger: Ledger::default(),
        line: SimulatedLine::new(args.seed, args.defect_share),
        pixels: Vec::new(),
        screen,
        every_part: true,
        stop: Arc::clone(&stop),
        began,
        first_verdict_ms: None,
        rss_1_min_mb: None,
    };
    let left_s = args.seconds - 2.0 * bare_time.as_secs_f64();
    let paced = Duration::from_secs_f64(left_s * PACED_SHARE);
    let looped = Duration::from_secs_f64(left_s).saturating_sub(paced);

    // Phase 2: the paced line.
    let followed_hz = 1e3 * MAX_PARTS as f64 / f64::from(gate_ms);
    let pace_hz = (PACE_SHARE * bare_fps).min(BELT_SHARE * followed_hz);
    floor.screen.line(format_args!("paced     {pace_hz:.1} parts/s for {:.1} s\n", paced.as_secs_f64()));
    board.order(&format!("pace {pace_hz:.3}"))?;
    floor.watch(&board, &inspections, paced.mul_f64(WARM_UP_SHARE))?;
    running.reset_timings();
    floor.watch(&board, &inspections, paced.mul_f64(1.0 - WARM_UP_SHARE))?;
    let latency = running.stats().latency_ms;

    // Phase 3: the closed loop.
    board.order(&format!("flat {}", (workers + EXTRA_IN_FLIGHT).min(64)))?;
    floor.screen.line(format_args!("\nclosed loop for {:.1} s; from here on only what is not accepted\n", looped.as_secs_f64()));
    floor.every_part = false;
    floor.watch(&board, &inspections, looped.mul_f64(WARM_UP_SHARE))?;
    // By now every buffer of the pools has been used, so what is allocated from here on is allocated per part.
    running.reset_timings();
    let (from, from_counts, from_allocations) = (Instant::now(), running.stats().counts, alloc::counts());
    floor.watch(&board, &inspections, looped.mul_f64(1.0 - WARM_UP_SHARE))?;
    let (elapsed_s, stats) = (from.elapsed().as_secs_f64(), running.stats());
    let throughput_fps = (inspected(&stats.counts) - inspected(&from_counts)) as f64 / elapsed_s;
    let allocations = Allocations::since(from_allocations, stats.counts.parts - from_counts.parts);
    let inference = stats.latency_ms.inference;
    let worker_busy_share = inference.mean * inference.count as f64 / 1e3 / (elapsed_s * workers as f64);

    // The parts on the belt still pass the gate; then all stop in order.
    board.order("stop")?;
    floor.watch_to_the_end(&board, &inspections, Duration::from_millis(u64::from(gate_ms)))?;
    let board_is_safe = running.stats().board_state == Some(BoardState::Safe);
    running.stop();
    let ended = running.wait();
    let (late, board_counters) = board.quit()?;
    // The bare model again: on a machine that does other work as well, one measurement at the start says little about the time between.
    let bare_fps = (bare_fps + bare_model_fps(&model, &config, bare_time)?) / 2.0;
    for inspection in inspections.try_iter() {
        floor.inspected(inspection);
    }
    for at_gate in late {
        floor.at_gate(at_gate);
    }

    let report = Report {
        tally: floor.ledger.tally,
        board: board_counters,
        board_is_safe,
        counts: ended.stats.counts,
        latency,
        throughput_fps,
        bare_fps,
        worker_busy_share,
        allocations,
        rss_mb: rss_mb(),
        rss_1_min_mb: floor.rss_1_min_mb,
        load_ms,
        first_verdict_ms: floor.first_verdict_ms,
        link: link_stats.map(|s| s.summary()),
        workers,
        folder: config.snapshots.folder.clone().unwrap_or_default(),
        ended,
    };
    if args.json {
        println!("{}", report.json());
    } else {
        floor.screen.line(format_args!("{}", report.text()));
    }
    match report.failure() {
        Some(failure) => bail!(failure),
        None => Ok(ExitCode::SUCCESS),
    }
}

/// Parts that the model judged: a part rejected for want of time is no throughput.
fn inspected(counts: &Counts) -> u64 {
    counts.accepted + counts.rejected
}

/// The bridge as configured by default, on `port`.
fn bridge_defaults(port: PathBuf) -> BridgeConfig {
    let sim = firmware_bridge_sim::SimConfig::default();
    // A pseudo-terminal has no baud rate; the port is set up for the usual one all the same.
    BridgeConfig { port, baud: 115_200, codename: sim.codename, deadline_ms: sim.deadline_ms, watchdog_ms: sim.watchdog_ms }
}

/// How many inferences per second the model does on `workers` threads with nothing around it.
fn bare_model_fps(model: &Model, config: &Config, time: Duration) -> anyhow::Result<f64> {
    let input = typical_input(model, config)?;
    let inferences = AtomicU64::new(0);
    let workers = config.inference.workers;
    let barrier = std::sync::Barrier::new(workers);
    let elapsed: Result<Vec<Duration>, _> = std::thread::scope(|scope| {
        let worker = || {
            let mut session = model.session();
            let mut map = AnomalyMap::zeros(model.meta().grid);
            // One unmeasured call: the first allocates and touches its memory.
            let warm = session.infer(&input, &mut map);
            barrier.wait();
            warm?;
            let began = Instant::now();
            while began.elapsed() < time {
                session.infer(&input, &mut map)?;
                inferences.fetch_add(1, Ordering::Relaxed);
            }
            Ok::<_, cull::model::runtime::ModelError>(began.elapsed())
        };
        let threads: Vec<_> = (0..workers).map(|_| scope.spawn(worker)).collect();
        threads.into_iter().map(|t| t.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    });
    let longest = elapsed.context("the model fails on a simulated part")?.into_iter().max().unwrap_or(time);
    Ok(inferences.load(Ordering::Relaxed) as f64 / longest.as_secs_f64())
}

/// A part of the simulated line as the model sees it.
fn typical_input(model: &Model, config: &Config) -> anyhow::Result<Vec<f32>> {
    let SourceConfig::Simulated { seed, defect_share } = config.source else { bail!("the demo runs on the simulated line") };
    let mut line = SimulatedLine::new(seed, defect_share);
    let trigger = Trigger { part: PartId(1), received_ns: 0, deadline_ns: u64::MAX, encoder_ticks: 0 };
    let Grab::Frame(frame) = line.grab(Some(&trigger), Duration::from_secs(1), &Pool::new(1, Vec::new))? else {
        bail!("the simulated line brings no frame")
    };
    let spec = &model.meta().preprocess;
    let mut input = vec![0.0; spec.input_len()];
    Preprocessor::new(spec, config.roi).run(&frame, &mut input)?;
    Ok(input)
}

fn wait_until_running(running: &Running) -> anyhow::Result<()> {
    let until = Instant::now() + LINK_LIMIT;
    loop {
        let stats = running.stats();
        if stats.link == Some(LinkState::Up) && stats.host_state == HostState::Running {
            return Ok(());
        }
        if Instant::now() >= until {
            bail!("inspector and board did not come together: link {:?}, inspector {:?}", stats.link, stats.host_state);
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Prints, unless stdout is for the JSON object or nobody reads it any more.
struct Screen {
    quiet: bool,
    out: std::io::Stdout,
}

impl Screen {
    fn line(&mut self, text: std::fmt::Arguments<'_>) {
        if !self.quiet && writeln!(self.out, "{text}").is_err() {
            self.quiet = true;
        }
    }
}

/// Watches the line: pairs what the inspector decided with what the gate did, and shows it.
struct Floor {
    ledger: Ledger,
    /// Knows the truth about parts whose picture never came.
    line: SimulatedLine,
    pixels: Vec<u8>,
    screen: Screen,
    every_part: bool,
    stop: Arc<AtomicBool>,
    began: Instant,
    first_verdict_ms: Option<u128>,
    rss_1_min_mb: Option<f64>,
}

impl Floor {
    /// Watch for `time`, or until a signal asks to stop.
    fn watch(&mut self, board: &Board, inspections: &Receiver<Inspection>, time: Duration) -> anyhow::Result<()> {
        const LOOK: Duration = Duration::from_millis(100);
        const MINUTE: Duration = Duration::from_secs(60);
        let until = Instant::now() + time;
        while !self.stop.load(Ordering::Relaxed) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            if self.rss_1_min_mb.is_none() && self.began.elapsed() >= MINUTE {
                self.rss_1_min_mb = rss_mb();
            }
            self.step(board.lines(), inspections, left.min(LOOK))?;
        }
        Ok(())
    }

    /// Watch until the board has been silent for `silence`: every part has passed the gate.
    fn watch_to_the_end(&mut self, board: &Board, inspections: &Receiver<Inspection>, silence: Duration) -> anyhow::Result<()> {
        let mut quiet_since = Instant::now();
        while quiet_since.elapsed() < silence {
            if self.step(board.lines(), inspections, silence)? {
                quiet_since = Instant::now();
            }
        }
        Ok(())
    }

    /// Take one message; false when none came.
    fn step(&mut self, lines: &Receiver<Line>, inspections: &Receiver<Inspection>, wait: Duration) -> anyhow::Result<bool> {
        select! {
            recv(inspections) -> inspection => match inspection {
                Ok(inspection) => self.inspected(inspection),
                Err(_) => bail!("the line stopped by itself; the log says why"),
            },
            recv(lines) -> line => match line {
                Ok(Line::AtGate(at_gate)) => {
                    // The verdict was sent before the part came to the gate, but the two come here by different ways.
                    for inspection in inspections.try_iter() {
                        self.inspected(inspection);
                    }
                    self.at_gate(at_gate);
                }
                Ok(other) => log::warn!("the simulated board said {other:?} in the middle of the run"),
                Err(_) => bail!("the simulated board ended by itself"),
            },
            default(wait) => return Ok(false),
        }
        Ok(true)
    }

    fn inspected(&mut self, inspection: Inspection) {
        self.first_verdict_ms.get_or_insert_with(|| self.began.elapsed().as_millis());
        self.ledger.inspected(inspection);
    }

    fn at_gate(&mut self, at_gate: board::AtGate) {
        let (line, pixels) = (&mut self.line, &mut self.pixels);
        let story = self.ledger.at_gate(at_gate, |part| line.render(part, pixels).defect.map(|d| d.name.to_string()));
        if self.every_part || story.at_gate.gate == Gate::Reject || story.is_false_accept() {
            self.screen.line(format_args!("{}", line_from(&story)));
        }
    }
}

/// One part's story on one line.
fn line_from(story: &Story) -> String {
    let part = story.at_gate.part;
    let gate = match story.at_gate.gate {
        Gate::Accept => "passed",
        Gate::Reject => "REJECTED",
    };
    let truth = story.defect.as_deref().unwrap_or("good");
    let mistake = match (story.is_false_reject(), story.is_false_accept()) {
        (true, _) => "  <- false reject",
        (_, true) => "  <- false accept",
        _ => "",
    };
    let because = if story.at_gate.reason == "verdict" { String::new() } else { format!(" ({})", story.at_gate.reason) };
    let Some(i) = &story.inspection else {
        return format!("{part:>6}  {:<14}{:<8} {:<24} {:>6}     {gate:<8}{because}  is {truth}{mistake}", "-", "-", "no word of it", "-");
    };
    let product = i.origin.product.as_deref().unwrap_or("-");
    let decision = format!("{:?}", i.verdict.decision).to_lowercase();
    let ms = i.decided_ns.saturating_sub(i.captured_ns) as f64 / 1e6;
    let evidence = if i.verdict.score.is_finite() {
        format!("score {:>8.3}  p {:<7.4}", i.verdict.score, i.verdict.p_value)
    } else {
        format!("{:?}", i.verdict.reason)
    };
    format!("{part:>6}  {product:<14}{decision:<8} {evidence:<24} {ms:>6.1} ms  {gate:<8}{because}  is {truth}{mistake}")
}

/// Allocations per part, measured.
#[derive(Clone, Copy)]
struct Allocations {
    pipeline: f64,
    model: f64,
}

impl Allocations {
    fn since(before: alloc::Counts, parts: u64) -> Option<Self> {
        let now = alloc::counts();
        let per_part = |now: u64, before: u64| now.saturating_sub(before) as f64 / parts as f64;
        (parts > 0).then(|| Self { pipeline: per_part(now.pipeline, before.pipeline), model: per_part(now.model, before.model) })
    }
}

/// Everything that the demo found out.
struct Report {
    tally: Tally,
    board: Counters,
    board_is_safe: bool,
    counts: Counts,
    latency: StageLatency,
    throughput_fps: f64,
    bare_fps: f64,
    worker_busy_share: f64,
    allocations: Option<Allocations>,
    rss_mb: Option<f64>,
    rss_1_min_mb: Option<f64>,
    load_ms: u128,
    first_verdict_ms: Option<u128>,
    link: Option<LinkSummary>,
    workers: usize,
    folder: PathBuf,
    ended: Ended,
}

impl Report {
    /// What went wrong with the line itself, in a sentence; wrong verdicts are the model's business and no failure of the demo.
    fn failure(&self) -> Option<String> {
        if let Some(fault) = &self.ended.stats.fault {
            Some(format!("the line stopped: {fault}"))
        } else if self.tally.missed_but_accepted > 0 || self.board.leaks > 0 {
            Some("a part got through without an accept verdict".into())
        } else if self.board_is_safe {
            Some(format!(
                "the board latched its safe state and rejected every part from then on: it heard nothing from the inspector for {WATCHDOG_MS} ms; \
                 run the demo again while the machine is less busy"
            ))
        } else {
            None
        }
    }

    /// Time that a part takes besides the model, by the medians of the paced phase.
    fn added_ms(&self) -> f64 {
        self.latency.total.p50 - self.latency.inference.p50
    }

    fn pictures(&self) -> u64 {
        self.ended.recorder.map_or(0, |r| r.written)
    }

    /// The contract for scripts. Names are only ever added.
    fn json(&self) -> serde_json::Value {
        let t = &self.tally;
        let stage = |l: &Latency| json!({ "p50": l.p50, "p99": l.p99, "mean": l.mean, "max": l.max, "count": l.count });
        // All stages, measured or not: a script need not ask which are there.
        let latency: serde_json::Map<_, _> = stages(&self.latency).into_iter().map(|(name, l, _)| (name.to_string(), stage(l))).collect();
        json!({
            "parts": t.parts,
            "accepted": t.accepted,
            "rejected": t.rejected,
            "missed_deadline": t.missed_deadline,
            "false_rejects": t.false_rejects,
            "false_accepts": t.false_accepts,
            "dropped_frames": self.counts.dropped_frames,
            "throughput_fps": self.throughput_fps,
            "bare_model_fps": self.bare_fps,
            "latency_ms": latency,
            "allocations_per_frame": self.allocations.map(|a| a.pipeline + a.model),
            "rss_mb": self.rss_mb,
            "snapshots": { "count": self.pictures(), "folder": self.folder.display().to_string() },
            "defective": t.defective,
            "missed_but_accepted": t.missed_but_accepted,
            "board": { "parts": self.board.parts, "accepted": self.board.accepted, "rejected": self.board.rejected,
                       "missed": self.board.missed, "leaks": self.board.leaks },
            "board_safe_state": self.board_is_safe,
            "failure": self.failure(),
            "allocations": self.allocations.map(|a| json!({ "pipeline_per_frame": a.pipeline, "model_per_frame": a.model })),
            "added_latency_ms": self.added_ms(),
            "throughput_share": self.throughput_fps / self.bare_fps,
            "worker_busy_share": self.worker_busy_share,
            "rss_mb_after_1_min": self.rss_1_min_mb,
            "model_load_ms": self.load_ms as u64,
            "first_verdict_ms": self.first_verdict_ms.map(|ms| ms as u64),
            "workers": self.workers,
            "link": self.link,
        })
    }

    fn text(&self) -> String {
        let t = &self.tally;
        let good = t.parts - t.defective;
        let mut text = String::from("\nsummary\n");
        let mut row = |name: &str, value: String| text += &format!("  {name:<16}{value}\n");
        row("parts", format!("{:>8}   {good} good, {} defective", t.parts, t.defective));
        row("accepted", format!("{:>8}", t.accepted));
        row("rejected", format!("{:>8}", t.rejected));
        row("missed", format!("{:>8}   without a verdict in time; of these let through: {}", t.missed_deadline, t.missed_but_accepted));
        row("false rejects", format!("{:>8}   of {good} good", t.false_rejects));
        row("false accepts", format!("{:>8}   of {} defective", t.false_accepts, t.defective));
        if self.board_is_safe {
            row("board", "    SAFE   the board took the inspector for dead and rejects everything until it is cleared".to_string());
        }
        row("dropped frames", format!("{:>8}", self.counts.dropped_frames));
        row(
            "throughput",
            format!(
                "{:>8.1}   parts/s in the closed loop; bare model {:.1}/s: {:.1} % of it; workers busy {:.1} % of the time",
                self.throughput_fps,
                self.bare_fps,
                100.0 * self.throughput_fps / self.bare_fps,
                100.0 * self.worker_busy_share
            ),
        );
        row("added latency", format!("{:>8.2}   ms at the median, besides the model", self.added_ms()));
        if let Some(a) = self.allocations {
            row("allocations", format!("{:>8.2}   per part by the pipeline, {:.2} inside the model runtime", a.pipeline, a.model));
        }
        if let Some(rss) = self.rss_mb {
            row("memory", format!("{rss:>8.1}   MB resident"));
        }
        if let Some(link) = &self.link {
            row(
                "link",
                format!(
                    "{:>8.3}   ms p99 from verdict to the kernel; {:.3} ms to the board's acknowledgement",
                    link.verdict_to_kernel_us.p99 / 1e3,
                    link.verdict_to_ack_us.p99 / 1e3
                ),
            );
        }
        row("snapshots", format!("{:>8}   in {}", self.pictures(), shown(&self.folder)));
        text += "\nlatency on the paced line\n";
        text + &latency_table(&self.latency)
    }
}
