//! `cull model`: describe, verify and pack model bundles.

use anyhow::Context;
use cull::anomaly::AnomalyMap;
use cull::frame::now_ns;
use cull::model::bundle::{Bundle, BundleMeta};
use cull::model::runtime::{EngineChoice, Model, ModelFacts};
use cull::snapshot::utc;
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Arguments of `cull model`.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Say what a bundle is and whether it runs here
    Describe {
        /// The bundle
        file: PathBuf,
        /// One JSON object on stdout
        #[arg(long)]
        json: bool,
    },
    /// Check structure, metadata, digest and graph, and run it once; the exit code says whether it is good
    Verify {
        /// The bundle
        file: PathBuf,
    },
    /// Make a bundle with 8-bit weights from a float one: smaller, and faster where the CPU has integer dot products
    Quantize {
        /// The float bundle
        file: PathBuf,
        /// Where the 8-bit bundle goes (written completely or not at all)
        #[arg(long)]
        out: PathBuf,
    },
    /// Join an ONNX graph and metadata (JSON) to a bundle
    Pack {
        /// The graph: input `input` float32 [1, 3, H, W], output `anomaly_map` float32 [1, 1, rows, columns]
        #[arg(long)]
        onnx: PathBuf,
        /// The metadata; `format`, `sha256`, `created` may be left out
        #[arg(long)]
        meta: PathBuf,
        /// Where the bundle goes (written completely or not at all)
        #[arg(long)]
        out: PathBuf,
    },
}

/// Run the command.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    match args.command {
        Command::Describe { file, json } => describe(&file, json)?,
        Command::Verify { file } => verify(&file)?,
        Command::Quantize { file, out } => {
            let (bytes, done) = Bundle::load(&file)?.quantized()?;
            write_bundle(&bytes, &out)?;
            let share = done.worst_rounding * 100.0;
            println!(
                "{} weight tensors, {} weights to 8 bit, rounded by at most {share:.2} % of their output's largest",
                done.tensors, done.elements
            );
            println!(
                "Scores move a little and the calibration stays the float model's: calibrate anew on good parts before use (`cull calibrate`)."
            );
        }
        Command::Pack { onnx, meta, out } => pack(&onnx, &meta, &out)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Largest difference between the engines, as a share of the map's largest value. float32 in another order of summing gives about 1e-6.
const AGREEMENT: f32 = 1e-3;
/// Likewise where our executor computes in int8: tract does not quantize the inputs of an operator, only its weights are of 8 bit.
const AGREEMENT_INT8: f32 = 0.05;

fn verify(file: &Path) -> anyhow::Result<()> {
    let bundle = Bundle::load(file)?;
    let model = Model::from_bundle(bundle.clone(), 1)?;
    println!("{}: good, SHA-256 {}, runs as {}", file.display(), model.facts().sha256, model.facts().engine);
    let reference = Model::with_engine(bundle, EngineChoice::Tract)?;
    let input = super::bench::noise(model.meta().preprocess.input_len());
    let (mut ours, mut theirs) = (AnomalyMap::default(), AnomalyMap::default());
    model.session().infer(&input, &mut ours)?;
    reference.session().infer(&input, &mut theirs)?;
    let largest = theirs.values.iter().fold(f32::MIN_POSITIVE, |a, b| a.max(b.abs()));
    let worst = ours.values.iter().zip(&theirs.values).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / largest;
    println!("against tract: largest difference {worst:.1e} of the largest value");
    let limit = if model.facts().engine.contains("int8") { AGREEMENT_INT8 } else { AGREEMENT };
    anyhow::ensure!(
        worst <= limit,
        "the engines disagree by {worst:.1e} on {}: set CULL_PLAN=tract and report it with the file",
        file.display()
    );
    Ok(())
}

fn describe(file: &Path, json: bool) -> anyhow::Result<()> {
    #[derive(Serialize)]
    struct Description<'a> {
        facts: &'a ModelFacts,
        meta: &'a BundleMeta,
    }
    let model = Model::load(file, 1)?;
    let (facts, meta) = (model.facts(), model.meta());
    if json {
        println!("{}", serde_json::to_string(&Description { facts, meta })?);
        return Ok(());
    }
    print_facts(facts);
    let spec = &meta.preprocess;
    println!("created          {}", meta.created);
    println!("trained on       {}", if meta.trained_on.is_empty() { "(not said)".into() } else { meta.trained_on.join(", ") });
    println!("normalisation    (pixel - {:?}) / {:?}", spec.mean, spec.std);
    println!("score            {:?}", meta.score);
    let scores = &meta.calibration.normal_scores;
    println!("calibration      {} normal scores, {:?} to {:?}", scores.len(), scores.first(), scores.last());
    for rate in [0.01f32, 0.005, 0.001] {
        println!("                 false-reject rate {:.1} % at score {:.5}", rate * 100.0, meta.calibration.score_at(rate));
    }
    if !meta.notes.is_empty() {
        println!("notes            {}", meta.notes);
    }
    Ok(())
}

/// The facts for people, a line each.
pub(super) fn print_facts(facts: &ModelFacts) {
    let [_, channels, height, width] = facts.input;
    println!("model            {}", facts.name);
    println!("input            {width}x{height}, {channels} channels");
    println!("anomaly map      {} rows x {} columns", facts.grid[0], facts.grid[1]);
    println!("parameters       {:.3} M", facts.parameters as f64 / 1e6);
    println!("multiply-adds    {:.3} G", facts.multiply_adds as f64 / 1e9);
    println!("file             {:.2} MB, opset {}, SHA-256 {}", facts.file_bytes as f64 / 1e6, facts.opset, facts.sha256);
    println!("runs as          {}, {} nodes, loaded in {} ms", facts.engine, facts.nodes, facts.load_ms);
}

fn pack(onnx: &Path, meta: &Path, out: &Path) -> anyhow::Result<()> {
    let graph = std::fs::read(onnx).with_context(|| format!("cannot read {}", onnx.display()))?;
    let text = std::fs::read_to_string(meta).with_context(|| format!("cannot read {}", meta.display()))?;
    let mut value: serde_json::Value = serde_json::from_str(&text).with_context(|| format!("{} is no JSON", meta.display()))?;
    if let Some(fields) = value.as_object_mut() {
        fields.entry("format").or_insert(cull::model::bundle::FORMAT.into());
        fields.entry("created").or_insert(now().into());
    }
    let meta: BundleMeta = serde_json::from_value(value).with_context(|| format!("{} is no bundle metadata", meta.display()))?;
    write_bundle(&Bundle::pack(&graph, meta)?, out)
}

/// Put a bundle in its place, once it is known to load, and say what it is.
pub(super) fn write_bundle(bytes: &[u8], out: &Path) -> anyhow::Result<()> {
    // Through a file beside it: a reader never sees half a bundle, and a full disk leaves the old one.
    let partial = out.with_extension("partial");
    std::fs::write(&partial, bytes).with_context(|| format!("cannot write {}", partial.display()))?;
    let model = Model::load(&partial, 1).inspect_err(|_| {
        // The error is reported; a left-over file is only untidy.
        let _ = std::fs::remove_file(&partial);
    })?;
    std::fs::rename(&partial, out).with_context(|| format!("cannot write {}", out.display()))?;
    print_facts(model.facts());
    Ok(())
}

/// The time of day as it stands in bundles: RFC 3339, UTC.
pub(super) fn now() -> String {
    utc::extended(utc::unix_ms_of(now_ns()))
}
