//! `cull run`: inspect a line as configured until SIGTERM or the source ends.

use super::summary::{latency_table, load_model, snapshot_context};
use anyhow::Context;
use crossbeam_channel::{Receiver, bounded};
use cull::config::{Config, SourceConfig};
use cull::pipeline::{Control, Ended, Inspection, Options, Pipeline, Sinks};
use cull::{journal, plc, snapshot, source, web};
use serde_json::json;
use signal_hook::consts::{SIGINT, SIGTERM};
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

/// Exit status when the line stopped by a fault of its own (model, source, a stage); configuration errors exit with 1.
const EXIT_FAULT: u8 = 2;

/// Inspections that may wait for the printer. Beyond that they are skipped and counted: the line never waits for a terminal or a pipe.
const TAP_QUEUE: usize = 4096;

/// Arguments of `cull run`.
#[derive(clap::Args)]
pub struct Args {
    /// The line's configuration (RON); every field is explained in deploy/cull.ron
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Print one JSON object per verdict on stdout; the summary goes to stderr
    #[arg(long)]
    json: bool,
}

/// Run the command.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let began = Instant::now();
    let config = Config::load(&args.config)?;
    let model = load_model(&config)?;
    log::info!("{}: model {} loaded in {} ms", config.line, model.meta().name, began.elapsed().as_millis());
    let source = source::open(&config.source)?;
    let sinks = Sinks {
        recorder: Some(snapshot::spawn(&config.snapshots, snapshot_context(&config, &model))?),
        journal: Some(journal::spawn(&config.journal, &config.line)?),
    };
    let (tap, watch) = plc::control::tee();
    let link = plc::spawn_tapped(&config.plc, tap)?;
    let link_stats = link.as_ref().map(|l| Arc::clone(&l.stats));

    let about = web::About {
        line: config.line.clone(),
        model: model.meta().name.clone(),
        model_sha256: model.meta().sha256.clone(),
        snapshots: config.snapshots.folder.clone(),
    };
    let (tap, inspections) = bounded(TAP_QUEUE);
    let options = Options { tap: Some(tap), ..Options::from_config(&config) };
    let running = Pipeline::start(options, Arc::new(model), source, link, sinks)?;
    stop_on_signal(running.control())?;
    let for_clear = running.control();
    let operators = plc::control::serve(&config.plc, move || for_clear.clear_board(plc::control::CLEAR_WAIT), watch);
    let page = match &config.web {
        Some(web) => Some(web::spawn(web, about, running.control())?),
        None => None,
    };
    let printer = Printer {
        json: args.json,
        each: matches!(config.source, SourceConfig::Folder { .. }),
        began,
        first_ms: None,
        page: page.as_ref().map(web::PageHandle::feed),
    };
    let printer = std::thread::Builder::new().name("printer".into()).spawn(move || printer.run(&inspections))?;

    let ended = running.wait();
    let first_ms = printer.join().ok().flatten();
    drop((page, operators));
    let mut summary = summary(&ended, first_ms);
    if let Some(link) = link_stats {
        let s = link.summary();
        summary += &format!(
            "  PLC link: {} verdicts sent, {} acknowledged, {} undelivered; verdict to kernel p99 {:.3} ms, to acknowledgement p99 {:.3} ms\n",
            s.verdicts_sent,
            s.acknowledged,
            s.verdicts_undelivered,
            s.verdict_to_kernel_us.p99 / 1e3,
            s.verdict_to_ack_us.p99 / 1e3
        );
    }
    if args.json {
        eprint!("{summary}")
    } else {
        print!("{summary}")
    }
    match ended.stats.fault {
        None => Ok(ExitCode::SUCCESS),
        Some(fault) => {
            eprintln!("cull: the line stopped: {fault}");
            Ok(ExitCode::from(EXIT_FAULT))
        }
    }
}

/// SIGTERM and SIGINT stop the line in order; a second one ends the process at once.
pub fn stop_on_signal(control: Control) -> anyhow::Result<()> {
    let asked = Arc::new(AtomicBool::new(false));
    for signal in [SIGTERM, SIGINT] {
        // In this order: at the first signal the flag is still false when the conditional shutdown looks at it.
        signal_hook::flag::register_conditional_shutdown(signal, 128 + signal, Arc::clone(&asked)).context("signals")?;
        signal_hook::flag::register(signal, Arc::clone(&asked)).context("signals")?;
    }
    let mut signals = signal_hook::iterator::Signals::new([SIGTERM, SIGINT]).context("signals")?;
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        if signals.forever().next().is_some() {
            log::info!("stopping: finishing the parts in flight");
            control.stop();
        }
    })?;
    Ok(())
}

/// Prints verdicts and feeds the live page, off the hot path.
struct Printer {
    json: bool,
    /// A line for each verdict (folders); otherwise only what was not accepted.
    each: bool,
    began: Instant,
    first_ms: Option<u128>,
    page: Option<web::Feed>,
}

impl Printer {
    /// Returns when the first verdict came, in ms from the start.
    fn run(mut self, inspections: &Receiver<Inspection>) -> Option<u128> {
        let mut out = std::io::stdout();
        for inspection in inspections {
            if self.first_ms.is_none() {
                self.first_ms = Some(self.began.elapsed().as_millis());
            }
            if self.json {
                if let Err(error) = writeln!(out, "{}", json_from(&inspection)) {
                    log::warn!("verdicts are no longer printed: {error}");
                    self.json = false;
                }
            } else if self.each || inspection.verdict.decision != cull::verdict::Decision::Accept {
                log::info!("{}", line_from(&inspection));
            } else {
                log::debug!("{}", line_from(&inspection));
            }
            if let Some(page) = &self.page {
                page.show(inspection);
            }
        }
        self.first_ms
    }
}

fn total_ms(inspection: &Inspection) -> f64 {
    inspection.decided_ns.saturating_sub(inspection.captured_ns) as f64 / 1e6
}

/// One verdict for the log.
fn line_from(i: &Inspection) -> String {
    let what = match (&i.origin.path, i.part) {
        (Some(path), _) => path.display().to_string(),
        (None, Some(part)) => format!("part {part}"),
        (None, None) => format!("frame {}", i.seq),
    };
    let v = &i.verdict;
    let decision = format!("{:?}", v.decision).to_lowercase();
    if v.score.is_finite() {
        format!("{decision:<7} score {:>8.3}  p {:<8.4} {:>6.1} ms  {what}", v.score, v.p_value, total_ms(i))
    } else {
        format!("{decision:<7} {:?}  {what}", v.reason)
    }
}

/// One verdict for programs; numbers that do not exist are null.
fn json_from(i: &Inspection) -> serde_json::Value {
    json!({
        "part": i.part.map(|p| p.0),
        "seq": i.seq,
        "path": i.origin.path.as_ref().map(|p| p.display().to_string()),
        "product": i.origin.product.as_deref(),
        "defect": i.origin.truth.as_ref().and_then(|t| t.defect.as_deref()),
        "labelled": i.origin.truth.is_some(),
        "decision": i.verdict.decision,
        "reason": i.verdict.reason,
        "score": i.verdict.score,
        "p_value": i.verdict.p_value,
        "total_ms": total_ms(i),
        "stages_us": {
            "queue": i.stages.queue_us,
            "preprocess": i.stages.preprocess_us,
            "inference": i.stages.inference_us,
            "verdict": i.stages.verdict_us,
        },
    })
}

/// The closing table.
fn summary(ended: &Ended, first_ms: Option<u128>) -> String {
    let c = ended.stats.counts;
    let mut lines =
        vec![("parts", c.parts), ("accepted", c.accepted), ("rejected", c.rejected), ("unknown", c.unknown), ("faults", c.faults)];
    // The rest matters only when it happened.
    let rare = [
        ("missed deadline", c.missed_deadline),
        ("no frame", c.no_frame),
        ("while stopped", c.while_stopped),
        ("link lost", c.link_lost),
        ("late results", c.late_results),
        ("dropped frames", c.dropped_frames),
        ("undelivered", c.undelivered),
        ("overflow", c.overflow),
        ("snapshots skipped", c.snapshots_skipped),
        ("journal skipped", c.journal_skipped),
        ("not printed", c.tap_skipped),
        ("panics", c.panics),
        ("unreadable", c.source_errors),
        ("source restarts", c.source_restarts),
    ];
    lines.extend(rare.into_iter().filter(|(_, n)| *n > 0));
    if let Some(recorder) = ended.recorder {
        lines.push(("snapshots", recorder.written));
    }
    let mut text: String = lines.iter().map(|(name, n)| format!("  {name:<20}{n:>10}\n")).collect();
    text += &format!("  {:<20}{:>10.1}\n", "seconds", ended.stats.uptime_s);
    if let Some(ms) = first_ms {
        text += &format!("  {:<20}{ms:>10}\n", "first verdict, ms");
    }
    text + &latency_table(&ended.stats.latency_ms)
}

#[cfg(test)]
mod tests {
    use super::*;
    use cull::frame::Origin;
    use cull::pipeline::StageTimes;
    use cull::verdict::{Reason, without_score};

    #[test]
    fn a_verdict_without_score_has_null_and_not_nan() {
        let inspection = Inspection {
            part: Some(cull::frame::PartId(7)),
            seq: 0,
            verdict: without_score(Reason::NoFrame),
            captured_ns: 1_000_000,
            decided_ns: 3_000_000,
            stages: StageTimes::default(),
            origin: Origin::default(),
        };
        let json = json_from(&inspection);
        assert_eq!(json["score"], serde_json::Value::Null);
        assert_eq!((json["decision"].as_str(), json["reason"].as_str()), (Some("unknown"), Some("no_frame")));
        assert_eq!(json["total_ms"], 2.0);
        assert!(line_from(&inspection).contains("part 7"));
    }
}
