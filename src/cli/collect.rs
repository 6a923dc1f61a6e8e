//! `cull collect`: collect pictures of normal parts from a source, or a labelled set from the simulated line.

use anyhow::{Context, bail};
use cull::collect::{self, Collected, Export, Recording};
use cull::config::Config;
use cull::source;
use cull::source::simulated::DefectRange;
use indicatif::{ProgressBar, ProgressStyle};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// A camera may take this long to its first picture: exposure control settles. Nobody waits for a part here, so no shorter stall counts.
const SETTLE: Duration = Duration::from_secs(10);

/// Arguments of `cull collect`.
#[derive(clap::Args)]
#[command(group(clap::ArgGroup::new("from").required(true).args(["simulate", "config"])))]
pub struct Args {
    /// Write the simulated line out as a labelled data set (MVTec-AD layout, masks, truth.json)
    #[arg(long)]
    simulate: bool,
    /// Take pictures from the source of this configuration, cropped to its roi, into DIR/train/good
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Folder to write to; with --config, the product's folder
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// How many parts
    #[arg(long, value_name = "N", default_value_t = 600, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    parts: u32,
    /// Same seed, same parts (--simulate)
    #[arg(long, value_name = "S", default_value_t = 1, conflicts_with = "config")]
    seed: u64,
    /// Share of defective parts, 0 to 1 (--simulate)
    #[arg(long, value_name = "X", default_value_t = 0.2, value_parser = share, conflicts_with = "config")]
    defect_share: f32,
    /// Smallest and largest size of defects in px (--simulate)
    #[arg(long, value_name = "MIN..MAX", default_value = "8..60", value_parser = size, conflicts_with = "config")]
    defect_size_px: Range,
    /// Weakest and strongest contrast of defects, 1 = full (--simulate)
    #[arg(long, value_name = "MIN..MAX", default_value = "0.15..1", value_parser = contrast, conflicts_with = "config")]
    defect_contrast: Range,
    /// At most one picture in this time (--config)
    #[arg(long, value_name = "MS", default_value_t = 0, conflicts_with = "simulate")]
    interval_ms: u64,
    /// Replace existing files of the same name (--simulate; pictures from a source are always numbered on)
    #[arg(long)]
    force: bool,
}

/// A pair of numbers given as `MIN..MAX`.
#[derive(Clone, Copy)]
struct Range([f32; 2]);

fn range(text: &str, low: f32, high: f32) -> Result<Range, String> {
    let wrong = || format!("give MIN..MAX with {low} <= MIN <= MAX <= {high}, for example {low}..{high}");
    let (a, b) = text.split_once("..").ok_or_else(wrong)?;
    let parse = |text: &str| text.trim().parse::<f32>().map_err(|_| wrong());
    let (a, b) = (parse(a)?, parse(b)?);
    if low <= a && a <= b && b <= high { Ok(Range([a, b])) } else { Err(wrong()) }
}

fn size(text: &str) -> Result<Range, String> {
    range(text, 2.0, 200.0)
}

fn contrast(text: &str) -> Result<Range, String> {
    range(text, 0.01, 1.0)
}

fn share(text: &str) -> Result<f32, String> {
    text.parse().ok().filter(|share| (0.0..=1.0).contains(share)).ok_or_else(|| "give a share from 0 to 1".into())
}

/// Run the command.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    // Drawn on stderr, and only where that is a terminal.
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} pictures, {per_sec}, {eta} left").context("progress bar")?;
    let bar = ProgressBar::new(args.parts.into()).with_style(style);
    let collected = match &args.config {
        Some(file) => {
            let config = Config::load(file)?;
            let mut source = source::open(&config.source)?;
            let job = Recording {
                out: args.out.clone(),
                parts: args.parts,
                roi: config.roi,
                interval: Duration::from_millis(args.interval_ms),
                stall: Duration::from_millis(config.supervise.stall_ms.into()).max(SETTLE),
            };
            collect::record(source.as_mut(), &job, || bar.inc(1))?
        }
        None => {
            let job = Export {
                out: args.out.clone(),
                seed: args.seed,
                parts: args.parts,
                defect_share: args.defect_share,
                range: DefectRange { size_px: args.defect_size_px.0, contrast: args.defect_contrast.0 },
                force: args.force,
                threads: std::thread::available_parallelism().map_or(1, usize::from),
            };
            collect::export(&job, || bar.inc(1))?
        }
    };
    bar.finish_and_clear();
    report(&args, &collected)
}

fn report(args: &Args, collected: &Collected) -> anyhow::Result<ExitCode> {
    for (folder, count) in &collected.folders {
        println!("{count:6}  {}", args.out.join(folder).display());
    }
    println!("{:6}  pictures in {}", collected.total(), args.out.display());
    if collected.skipped > 0 {
        println!("{:6}  could not be read and were passed over (see the log above)", collected.skipped);
    }
    if collected.total() == 0 {
        bail!("the source ended without a single picture");
    }
    if collected.total() < args.parts {
        println!("The source ended before {} pictures were taken.", args.parts);
    }
    Ok(ExitCode::SUCCESS)
}
