//! `cull bench`: time the model.

use anyhow::{Context, ensure};
use cull::anomaly::AnomalyMap;
use cull::frame::{Frame, Origin, PixelFormat};
use cull::model::runtime::{Model, ModelFacts};
use cull::pool::Pooled;
use cull::preprocess::{PreprocessSpec, Preprocessor};
use cull::source::simulated::{HEIGHT_PX, SimulatedLine, WIDTH_PX};
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Arguments of `cull bench`.
#[derive(clap::Args)]
pub struct Args {
    /// The model bundle
    #[arg(long, default_value = "models/default.onnx")]
    model: PathBuf,
    /// Threads that share one inference (`threads_per_frame` of the configuration)
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    threads: u16,
    /// Inferences at the same time (`workers` of the configuration), each on its own threads
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    workers: u16,
    /// How long to measure
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// One JSON object on stdout
    #[arg(long)]
    json: bool,
    /// Print the optimised graph with the time spent in each node
    #[arg(long)]
    explain: bool,
}

/// Longest measurement in seconds; more says nothing new.
const MAX_SECONDS: f64 = 3600.0;
/// Inferences before the clock starts: caches, page faults, clock frequency.
const WARM_UP: usize = 3;
/// Quality of the JPEG that is decoded, about what UVC cameras use.
const JPEG_QUALITY: u8 = 80;
/// Inferences that `--explain` times; on a busy machine the best of them counts.
const EXPLAINED: usize = 20;

#[derive(Serialize)]
struct Latency {
    p50: f64,
    p99: f64,
    mean: f64,
    min: f64,
    /// Processor time an inference, where the kernel says it (Linux) and one thread does it: what remains comparable on a busy machine.
    cpu: Option<f64>,
}

#[derive(Serialize)]
struct Report<'a> {
    latency_ms: Latency,
    fps: f64,
    /// That share one inference.
    threads: usize,
    /// Inferences at the same time.
    workers: usize,
    inferences: usize,
    /// Best time to turn a frame into the model's input, by format and size.
    preprocess_ms: BTreeMap<&'static str, f64>,
    /// The same as a share of an inference: its best time, or its processor time where that is less.
    preprocess_share: BTreeMap<&'static str, f64>,
    model: &'a ModelFacts,
}

/// Run the command.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    ensure!(args.seconds > 0.0 && args.seconds <= MAX_SECONDS, "--seconds is {}, must be above 0 and at most {MAX_SECONDS}", args.seconds);
    let (threads, workers) = (usize::from(args.threads), usize::from(args.workers));
    let model = Model::load(&args.model, threads)?;
    let input = noise(model.meta().preprocess.input_len());
    if args.explain {
        explain(&model, &input)?;
    }
    let started = Instant::now();
    let mut times: Vec<f64> = Vec::new();
    let mut cpu_ms = Some(0.0);
    std::thread::scope(|scope| -> anyhow::Result<()> {
        let running: Vec<_> =
            (0..workers).map(|_| scope.spawn(|| measure(&model, &input, Duration::from_secs_f64(args.seconds)))).collect();
        for worker in running {
            let (own, cpu) = worker.join().map_err(|_| anyhow::anyhow!("a worker panicked"))??;
            cpu_ms = cpu_ms.zip(cpu).map(|(sum, cpu)| sum + cpu);
            times.extend(own);
        }
        Ok(())
    })?;
    // Warm-up included: a share of a percent at the default duration, and honest for short ones.
    let elapsed = started.elapsed().as_secs_f64();
    times.sort_unstable_by(f64::total_cmp);
    let at = |share: f64| times.get(((times.len() - 1) as f64 * share).round() as usize).copied().unwrap_or(f64::NAN);
    let inferences = times.len();
    let latency_ms = Latency {
        p50: at(0.5),
        p99: at(0.99),
        mean: times.iter().sum::<f64>() / inferences as f64,
        min: at(0.0),
        cpu: cpu_ms.filter(|_| threads == 1).map(|cpu| cpu / inferences as f64),
    };
    let fps = inferences as f64 / elapsed;
    let preprocess_ms = preprocess_times(&model.meta().preprocess)?;
    // On a busy machine no inference may run without a pause; its processor time is nearer to what it takes then.
    let inference_ms = latency_ms.cpu.map_or(latency_ms.min, |cpu| cpu.min(latency_ms.min));
    let preprocess_share: BTreeMap<_, _> = preprocess_ms.iter().map(|(&frame, ms)| (frame, ms / inference_ms)).collect();
    if args.json {
        let report = Report { latency_ms, fps, threads, workers, inferences, preprocess_ms, preprocess_share, model: model.facts() };
        println!("{}", serde_json::to_string(&report)?);
    } else {
        super::model::print_facts(model.facts());
        println!("threads          {workers} inferences at a time, {threads} threads each");
        let Latency { p50, p99, mean, min, cpu } = latency_ms;
        let cpu = cpu.map_or(String::new(), |cpu| format!(", processor time {cpu:.2} ms"));
        println!("latency          p50 {p50:.2} ms, p99 {p99:.2} ms, mean {mean:.2} ms, min {min:.2} ms{cpu} over {inferences} inferences");
        println!("throughput       {fps:.1} frames/s");
        let frames = preprocess_ms.iter().zip(preprocess_share.values());
        let frames =
            frames.map(|((frame, ms), share)| format!("{frame} {ms:.2} ms ({:.1} %)", 100.0 * share)).collect::<Vec<_>>().join(", ");
        println!("preprocess       {frames}; best, and as a share of an inference");
    }
    Ok(ExitCode::SUCCESS)
}

/// Best of some runs of the preprocessor on frames as cameras send them.
fn preprocess_times(spec: &PreprocessSpec) -> anyhow::Result<BTreeMap<&'static str, f64>> {
    const RUNS: usize = 50;
    let mut input = vec![0.0; spec.input_len()];
    let mut times = BTreeMap::new();
    let mut part = Vec::new();
    SimulatedLine::new(1, 0.0).render(1, &mut part);
    for (name, format, width_px, height_px) in [
        ("rgb8_640x480", PixelFormat::Rgb8, 640u32, 480u32),
        ("yuyv_1280x720", PixelFormat::Yuyv, 1280, 720),
        ("mjpg_1280x720", PixelFormat::Mjpg, 1280, 720),
    ] {
        // A part of the simulated line, noise included, repeated to fill the frame: coded data has to look like a picture's.
        let rgb: Vec<u8> = (0..height_px as usize * width_px as usize)
            .flat_map(|i| {
                let (y, x) = (i / width_px as usize % HEIGHT_PX as usize, i % width_px as usize % WIDTH_PX as usize);
                part.iter().skip(3 * (y * WIDTH_PX as usize + x)).take(3).copied()
            })
            .collect();
        let pixels = match format {
            // Colours do not matter here, only how many bytes there are.
            PixelFormat::Yuyv => rgb.into_iter().take(2 * width_px as usize * height_px as usize).collect(),
            PixelFormat::Mjpg => {
                // The encoder does not subsample (4:4:4): more work to decode than the 4:2:2 that cameras send.
                let mut jpeg = Vec::new();
                let encoder = image::codecs::jpeg::JpegEncoder::new_with_quality(&mut jpeg, JPEG_QUALITY);
                image::ImageEncoder::write_image(encoder, &rgb, width_px, height_px, image::ExtendedColorType::Rgb8)?;
                jpeg
            }
            _ => rgb,
        };
        let frame = Frame {
            pixels: Pooled::detached(pixels),
            format,
            width_px,
            height_px,
            captured_ns: 0,
            seq: 0,
            part: None,
            origin: Origin::default(),
        };
        let mut preprocessor = Preprocessor::new(spec, None);
        let mut best = f64::INFINITY;
        for _ in 0..RUNS {
            let begin = Instant::now();
            preprocessor.run(&frame, &mut input)?;
            best = best.min(begin.elapsed().as_secs_f64() * 1e3);
        }
        times.insert(name, best);
    }
    Ok(times)
}

/// Milliseconds of each inference for `duration`, at least one, and the processor time of all of them.
fn measure(model: &Model, input: &[f32], duration: Duration) -> anyhow::Result<(Vec<f64>, Option<f64>)> {
    let mut session = model.session();
    let mut map = AnomalyMap::default();
    for _ in 0..WARM_UP {
        session.infer(input, &mut map)?;
    }
    let mut times = Vec::new();
    let cpu_before = thread_cpu_ms();
    let started = Instant::now();
    while times.is_empty() || started.elapsed() < duration {
        let begin = Instant::now();
        session.infer(input, &mut map)?;
        times.push(begin.elapsed().as_secs_f64() * 1e3);
    }
    let cpu = thread_cpu_ms().zip(cpu_before).map(|(after, before)| after - before);
    Ok((times, cpu))
}

/// Processor time of this thread so far: the first figure of `schedstat`, in nanoseconds.
fn thread_cpu_ms() -> Option<f64> {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    Some(text.split_whitespace().next()?.parse::<u64>().ok()? as f64 / 1e6)
}

fn explain(model: &Model, input: &[f32]) -> anyhow::Result<()> {
    let nodes = model.profile(input, EXPLAINED).context("profiling")?;
    if let Some(reason) = &model.facts().fallback {
        eprintln!("The whole model runs through tract, because our executor lacks: {reason}");
    }
    let total: f64 = nodes.iter().map(|node| node.best_us).sum();
    // Multiply-adds in a microsecond are millions a second.
    let speed = |count: u64, us: f64| if count == 0 { String::new() } else { format!("{:.1}", count as f64 / us / 1e3) };
    eprintln!("{:>9} {:>9} {:>6} {:>8}  {:<22} node: types and shapes", "best us", "mean us", "%", "G mul/s", "operator");
    for node in &nodes {
        let share = node.best_us / total * 100.0;
        let speed = speed(node.multiply_adds, node.best_us);
        eprintln!("{:9.1} {:9.1} {share:6.2} {speed:>8}  {:<22} {}: {}", node.best_us, node.mean_us, node.op, node.name, node.facts);
    }
    eprintln!("{total:9.1} {:9} {:6.2} {:8}  all {} nodes", "", 100.0, "", nodes.len());
    let mut by_op: Vec<(&str, f64, u64, usize)> = Vec::new();
    for node in &nodes {
        match by_op.iter_mut().find(|(op, ..)| *op == node.op) {
            Some((_, time, multiply_adds, count)) => {
                *time += node.best_us;
                *multiply_adds += node.multiply_adds;
                *count += 1;
            }
            None => by_op.push((&node.op, node.best_us, node.multiply_adds, 1)),
        }
    }
    by_op.sort_by(|a, b| b.1.total_cmp(&a.1));
    for (op, time, multiply_adds, count) in by_op {
        eprintln!("{time:9.1} {:9} {:6.2} {:>8}  {op} x {count}", "", time / total * 100.0, speed(multiply_adds, time));
    }
    Ok(())
}

/// Values like a normalised picture's (uniform in -2 to 2), the same on every run. A constant picture would be unfair: denormals and caches.
pub(super) fn noise(len: usize) -> Vec<f32> {
    let mut state = 0x9E37_79B9_7F4A_7C15u64;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 22) as f32 - 2.0
        })
        .collect()
}
