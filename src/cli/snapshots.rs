//! `cull snapshots`: list and export defect pictures.

use anyhow::{Context, bail};
use clap::{Subcommand, ValueEnum};
use cull::snapshot::{self, PartRecord};
use cull::verdict::Decision;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Arguments of `cull snapshots`.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// List what is in a snapshot folder, newest first
    List {
        #[command(flatten)]
        choice: Choice,
        /// One JSON array on stdout instead of a table
        #[arg(long)]
        json: bool,
    },
    /// Copy sets out of a snapshot folder, for a report or for training
    Export {
        #[command(flatten)]
        choice: Choice,
        /// Folder to copy to; made where it is missing
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
        /// Copy only the pictures, as a training folder: OUT/PRODUCT/train/good/… (for parts that were rejected by mistake)
        #[arg(long)]
        as_good: bool,
        /// One JSON object on stdout instead of a sentence
        #[arg(long)]
        json: bool,
    },
}

/// Which records are meant.
#[derive(clap::Args)]
struct Choice {
    /// The snapshot folder (`snapshots.folder` in the configuration)
    #[arg(value_name = "DIR")]
    folder: PathBuf,
    /// Only these decisions
    #[arg(long, value_enum, value_name = "DECISION")]
    decision: Vec<DecisionArg>,
    /// Only this product
    #[arg(long)]
    product: Option<String>,
    /// Only this part number
    #[arg(long)]
    part: Option<u32>,
    /// Only records from this time on, UTC: 2026-11-24 or 2026-11-24T20:30:00
    #[arg(long, value_name = "TIME")]
    since: Option<String>,
    /// Only records before this time, UTC
    #[arg(long, value_name = "TIME")]
    until: Option<String>,
    /// At most this many, the newest
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum DecisionArg {
    Accept,
    Reject,
    Unknown,
    Fault,
}

impl From<DecisionArg> for Decision {
    fn from(decision: DecisionArg) -> Self {
        match decision {
            DecisionArg::Accept => Decision::Accept,
            DecisionArg::Reject => Decision::Reject,
            DecisionArg::Unknown => Decision::Unknown,
            DecisionArg::Fault => Decision::Fault,
        }
    }
}

impl Choice {
    /// The chosen records, newest first.
    fn records(&self) -> anyhow::Result<Vec<PartRecord>> {
        for time in [&self.since, &self.until].into_iter().flatten() {
            check_time(time)?;
        }
        let (mut records, unreadable) = snapshot::list(&self.folder)?;
        for problem in unreadable {
            eprintln!("cull: passed over a record that cannot be read: {problem}");
        }
        records.retain(|record| {
            (self.decision.is_empty() || self.decision.iter().any(|&decision| Decision::from(decision) == record.decision))
                && self.product.as_ref().is_none_or(|product| record.product.as_ref() == Some(product))
                && self.part.is_none_or(|part| record.part == Some(part))
                // RFC 3339 in UTC sorts as text, and a date alone sorts before every time of its day.
                && self.since.as_ref().is_none_or(|since| record.time.as_str() >= since.as_str())
                && self.until.as_ref().is_none_or(|until| record.time.as_str() < until.as_str())
        });
        records.reverse();
        records.truncate(self.limit.unwrap_or(usize::MAX));
        Ok(records)
    }
}

fn check_time(time: &str) -> anyhow::Result<()> {
    let shape = "dddd-dd-ddTdd:dd:dd";
    let fits = (10..=shape.len()).contains(&time.len())
        && time.chars().zip(shape.chars()).all(|(have, want)| if want == 'd' { have.is_ascii_digit() } else { have == want });
    if !fits {
        bail!("`{time}` is no time; write 2026-11-24 or 2026-11-24T20:30:00 (UTC)");
    }
    Ok(())
}

/// Run the command.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    match args.command {
        Command::List { choice, json } => {
            let records = choice.records()?;
            let mut out = std::io::stdout().lock();
            if json { print_json(&mut out, &records) } else { print_table(&mut out, &records) }
        }
        Command::Export { choice, out, as_good, json } => {
            let records = choice.records()?;
            let copied = export(&records, &choice.folder, &out, as_good)?;
            if json {
                println!("{}", serde_json::json!({ "parts": copied, "folder": out }));
            } else {
                println!("{copied} parts copied to {}", out.display());
            }
            Ok(())
        }
    }?;
    Ok(ExitCode::SUCCESS)
}

fn print_json(out: &mut impl Write, records: &[PartRecord]) -> anyhow::Result<()> {
    serde_json::to_writer_pretty(&mut *out, records)?;
    writeln!(out)?;
    Ok(())
}

fn print_table(out: &mut impl Write, records: &[PartRecord]) -> anyhow::Result<()> {
    if records.is_empty() {
        writeln!(out, "no snapshots")?;
        return Ok(());
    }
    writeln!(
        out,
        "{:<24}  {:>10}  {:<8}  {:<16}  {:>9}  {:>9}  {:<14}  picture",
        "time (UTC)", "part", "decision", "reason", "score", "p", "product"
    )?;
    for record in records {
        let word = |value: serde_json::Value| value.as_str().unwrap_or("-").to_owned();
        writeln!(
            out,
            "{:<24}  {:>10}  {:<8}  {:<16}  {:>9}  {:>9}  {:<14}  {}",
            record.time,
            record.part.map_or_else(|| "-".into(), |part| part.to_string()),
            word(serde_json::to_value(record.decision)?),
            word(serde_json::to_value(record.reason)?),
            record.score.map_or_else(|| "-".into(), |score| format!("{score:.3}")),
            record.p_value.map_or_else(|| "-".into(), |p| format!("{p:.2e}")),
            record.product.as_deref().unwrap_or("-"),
            record.picture
        )?;
    }
    Ok(())
}

/// Copy the sets, or the pictures alone in a training layout.
fn export(records: &[PartRecord], folder: &Path, out: &Path, as_good: bool) -> anyhow::Result<usize> {
    for record in records {
        let target = if as_good { out.join(product_folder(record)).join("train/good") } else { out.to_owned() };
        std::fs::create_dir_all(&target).with_context(|| format!("cannot make {}", target.display()))?;
        let json = Path::new(&record.picture).with_extension("json");
        let mut names = vec![PathBuf::from(&record.picture)];
        if !as_good {
            names.extend(record.heat.as_ref().map(PathBuf::from));
            names.push(json);
        }
        for name in names {
            // A record is a file that anybody may have edited: only names inside the folder are followed.
            let Some(name) = name.file_name() else { bail!("a record names no file: {}", record.picture) };
            std::fs::copy(folder.join(name), target.join(name))
                .with_context(|| format!("cannot copy {} to {}", folder.join(name).display(), target.display()))?;
        }
    }
    Ok(records.len())
}

/// A product name as a folder name.
fn product_folder(record: &PartRecord) -> String {
    let name = record.product.as_deref().unwrap_or("mixed");
    let safe: String = name.chars().map(|c| if c.is_ascii_alphanumeric() || matches!(c, '-' | '_') { c } else { '_' }).collect();
    if safe.is_empty() { "mixed".into() } else { safe }
}
