//! `cull-trainer import-backbone`: published EfficientNet weights in, ONNX backbone out.

use super::three;
use anyhow::{Context, bail};
use cull::model::runtime::FeatureModel;
use cull_trainer::checkpoint::write_whole;
use cull_trainer::import::efficientnet::{self, Arch, IMAGENET_PIXELS, Padding, Source};
use cull_trainer::import::weights::WeightFile;
use cull_trainer::onnx::PixelScale;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Largest `config.json` looked into, in bytes; timm's have 600.
const MAX_CONFIG_BYTES: u64 = 1 << 16;

/// Arguments of `cull-trainer import-backbone`.
#[derive(clap::Args)]
pub struct Args {
    /// Network [default: what the weights fit]
    #[arg(long, value_enum)]
    arch: Option<Arch>,
    /// Weights as published: .pth (old and new format) or .safetensors; read, never executed
    #[arg(long, value_name = "FILE")]
    weights: PathBuf,
    /// ONNX file to write
    #[arg(long, value_name = "FILE.onnx")]
    out: PathBuf,
    /// Who published them [default: what the names in the file say; for timm, what the file or the config.json beside it is called]
    #[arg(long, value_enum)]
    source: Option<Source>,
    /// Padding of the strided convolutions: `symmetric`, or the picture side in pixels for which TensorFlow's SAME is computed [default: as the source does it]
    #[arg(long, value_name = "symmetric|PX", value_parser = padding)]
    padding: Option<Padding>,
    /// Side of the model's input, in pixels: what tf_ networks are padded for
    #[arg(long, default_value_t = 224, value_parser = clap::value_parser!(u16).range(32..=1024))]
    input_px: u16,
    /// Pixel mean that the network was trained with, in 8-bit units (one or three values) [default: config.json's, else ImageNet's]
    #[arg(long, value_delimiter = ',')]
    pixel_mean: Vec<f32>,
    /// Pixel scale that the network was trained with [default: config.json's, else ImageNet's]
    #[arg(long, value_delimiter = ',')]
    pixel_std: Vec<f32>,
}

fn padding(text: &str) -> Result<Padding, String> {
    match text {
        "symmetric" => Ok(Padding::Symmetric),
        side => match side.parse() {
            Ok(side_px) if (32..=1024).contains(&side_px) => Ok(Padding::Same { side_px }),
            _ => Err("give `symmetric` or a side from 32 to 1024 pixels".into()),
        },
    }
}

/// Run the command.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let file = WeightFile::open(&args.weights)?;
    let config = TimmConfig::beside(&args.weights)?;
    let source = match args.source {
        Some(source) => source,
        None => source_of(&file, &args.weights, config.as_ref())?,
    };
    let arch = match args.arch.or_else(|| efficientnet::detect(&file, source)) {
        Some(arch) => arch,
        None => bail!("{} fits none of efficientnet-b0 to b4: give --arch to see where it differs", args.weights.display()),
    };
    let said = config.as_ref().and_then(|c| c.pixels).unwrap_or(IMAGENET_PIXELS);
    let pixels =
        PixelScale { mean: three(&args.pixel_mean, said.mean, "pixel-mean")?, std: three(&args.pixel_std, said.std, "pixel-std")? };
    let padding = args.padding.unwrap_or(source.padding(arch, args.input_px.into()));
    let backbone = efficientnet::backbone(&file, source, arch, padding, &pixels)?;
    // The inspector itself has to run it before it gets its name.
    let mut part = args.out.as_os_str().to_owned();
    part.push(".unchecked");
    let part = PathBuf::from(part);
    write_whole(&part, &backbone.onnx).with_context(|| format!("cannot write {}; choose another --out", part.display()))?;
    let checked = check(&part, args.input_px.into(), &backbone.outputs).and_then(|()| {
        std::fs::rename(&part, &args.out).with_context(|| format!("cannot write {}; choose another --out", args.out.display()))
    });
    if checked.is_err() {
        // What is reported is why it is no good; that a leftover could not be removed would hide that.
        let _ = std::fs::remove_file(&part);
    }
    checked?;
    let outputs: Vec<String> = backbone.outputs.iter().map(|(name, channels)| format!("{name} {channels}")).collect();
    let total: usize = backbone.outputs.iter().map(|(_, channels)| channels).sum();
    println!("weights   {}: {} from {source:?}, {}", args.weights.display(), arch.name(), describe(padding));
    println!("outputs   {}: {total} channels; {:.1} M weights up to stride 16", outputs.join(", "), backbone.weights as f64 / 1e6);
    println!("pixels    (pixel - {:?}) / {:?}, kept in the file", pixels.mean, pixels.std);
    let (megabytes, side) = (backbone.onnx.len() as f64 / 1e6, args.input_px);
    println!("backbone  {} ({megabytes:.1} MB), runs in the inspector at {side} x {side}", args.out.display());
    println!("next      cull-trainer train --backbone {} --data DIR --out line.onnx", args.out.display());
    Ok(ExitCode::SUCCESS)
}

fn describe(padding: Padding) -> String {
    match padding {
        Padding::Symmetric => "symmetric padding".into(),
        Padding::Same { side_px } => format!("TensorFlow's padding for {side_px} pixels"),
    }
}

fn source_of(file: &WeightFile, path: &Path, config: Option<&TimmConfig>) -> anyhow::Result<Source> {
    let Some(source) = Source::of(file) else {
        let first = file.names().next().unwrap_or("nothing").to_owned();
        return Err(efficientnet::ImportError::Unknown { first }.into());
    };
    if source != Source::Timm {
        return Ok(source);
    }
    // timm's two families differ in padding and epsilon, which no weight shows; guessing wrong would only cost accuracy, silently.
    let file_name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let named = config.map(|c| c.architecture.as_str()).into_iter().chain([file_name.as_str()]).find(|name| name.contains("efficientnet"));
    match named {
        Some(name) if name.starts_with("tf_") => Ok(Source::TimmTf),
        Some(_) => Ok(Source::Timm),
        None => bail!(
            "{} may be efficientnet_b* or tf_efficientnet_b* of timm, which look alike and compute differently: say --source timm or --source timm-tf, or keep \
             the config.json that came with it beside it",
            path.display()
        ),
    }
}

/// What timm's `config.json` says about the weights beside it.
struct TimmConfig {
    architecture: String,
    pixels: Option<PixelScale>,
}

impl TimmConfig {
    /// `None` when there is none, or when it is of some other network.
    fn beside(weights: &Path) -> anyhow::Result<Option<Self>> {
        let path = weights.with_file_name("config.json");
        match std::fs::metadata(&path) {
            Ok(meta) if meta.is_file() && meta.len() <= MAX_CONFIG_BYTES => {}
            _ => return Ok(None),
        }
        let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let json: serde_json::Value =
            serde_json::from_str(&text).with_context(|| format!("{} is damaged: download it again or move it away", path.display()))?;
        let Some(architecture) = json.get("architecture").and_then(|a| a.as_str()).filter(|a| a.contains("efficientnet")) else {
            return Ok(None);
        };
        let three = |key: &str| -> Option<[f32; 3]> {
            let list = json.get("pretrained_cfg")?.get(key)?.as_array()?;
            // timm counts in units of full scale.
            let list: Vec<f32> = list.iter().filter_map(|v| v.as_f64()).map(|v| (v * 255.0) as f32).collect();
            list.try_into().ok()
        };
        let pixels = three("mean").zip(three("std")).map(|(mean, std)| PixelScale { mean, std });
        Ok(Some(Self { architecture: architecture.to_owned(), pixels }))
    }
}

/// Load the file with the inspector's runtime and run it once.
fn check(path: &Path, side_px: usize, outputs: &[(&str, usize)]) -> anyhow::Result<()> {
    let mut model = FeatureModel::load(path, [3, side_px, side_px]).context("the finished backbone does not load")?;
    // A ramp: no constant picture, so that a padding or an order gone wrong cannot hide, and nothing that depends on a file.
    let input: Vec<f32> = (0..3 * side_px * side_px).map(|i| (i % 251) as f32 / 125.0 - 1.0).collect();
    let found = model.run(&input).context("the finished backbone does not run")?;
    if found.len() != outputs.len() {
        bail!("the finished backbone has {} outputs, expected {}", found.len(), outputs.len());
    }
    for ((name, channels), features) in outputs.iter().zip(&found) {
        if features.shape.get(1) != Some(channels) {
            bail!("output {name} has shape {:?}, expected {channels} channels", features.shape);
        }
        if let Some(value) = features.values.iter().find(|v| !v.is_finite()) {
            bail!("output {name} holds {value}: these weights do not work");
        }
    }
    Ok(())
}
