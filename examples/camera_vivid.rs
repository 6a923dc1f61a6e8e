//! What `tests/camera/vivid.sh` runs inside an emulated machine: `CameraSource` against the kernel's virtual camera `vivid`, through nokhwa and
//! the real V4L2 calls: colours, rates, controls, stalls, streaming errors, unplugging, and a format that somebody else changed in between.
//!
//! `camera_vivid set CONTROL VALUE` only sets a control, to disturb a `cull run` that uses the camera.
//!
//! Prints one line for each check and `VIVID-OK` at the end; any failure ends it with exit status 1. It needs `vivid` with error injection as
//! /dev/video0, and changes its settings: not for a camera in use.

use anyhow::{Context, bail, ensure};
use cull::config::{CameraConfig, CameraDevice, CameraFormat};
use cull::frame::{Frame, PartId, now_ns};
use cull::pool::Pool;
use cull::snapshot::picture::rgb_from_frame;
use cull::source::camera::{CameraSource, list};
use cull::source::{Grab, Source, Trigger};
use std::time::{Duration, Instant};
use v4l::control::{Control, Type, Value};
use v4l::video::Capture;

const NODE: &str = "/dev/video0";
/// An emulated machine is slow; nothing here waits that long when all is well.
const PATIENCE: Duration = Duration::from_secs(30);
/// Long enough for several frames even there, so that silence means a stall.
const SILENCE: Duration = Duration::from_secs(2);

fn config() -> CameraConfig {
    let controls = [
        ("test_pattern", 1),  // 100 % colour bars
        ("osd_text_mode", 2), // none
        ("brightness", 128),
        ("contrast", 128),
        ("saturation", 128),
        ("hue", 0),
        ("gain", 100),
    ];
    CameraConfig {
        device: CameraDevice::Index(0),
        width_px: 640,
        height_px: 480,
        rate_hz: 25,
        format: CameraFormat::Yuyv,
        controls: controls.map(|(name, value)| (name.to_owned(), value)).to_vec(),
    }
}

fn main() -> anyhow::Result<()> {
    env_logger::Builder::new().filter_level(log::LevelFilter::Info).init();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        [] => {}
        ["set", name, value] => return set(name, value.parse().context("the value is no whole number")?),
        _ => bail!("usage: camera_vivid [set CONTROL VALUE]"),
    }
    let mut source = CameraSource::new(&config());
    let pool = Pool::new(4, Vec::new);

    listed()?;
    refused_settings()?;

    source.open().context("first open")?;
    let frame = grab(&mut source, &pool)?;
    colours(&frame).context("first open")?;
    println!("ok: colour bars after the first open");
    rate(&mut source, &pool)?;
    triggered(&mut source, &pool)?;

    stall(&mut source, &pool)?;
    stall_before_the_first_frame(&mut source, &pool)?;
    streaming_error(&mut source, &pool)?;
    foreign_format(&mut source, &pool)?;
    refused_buffers(&mut source, &pool)?;
    unplugged(&mut source, &pool)?;

    let counters = source.counters();
    println!("counters: {counters:?}");
    ensure!(counters.abandoned == 0, "a capture thread was left behind: the wake-up signal does not work");
    ensure!(counters.damaged == 0, "damaged frames");
    println!("VIVID-OK");
    Ok(())
}

fn listed() -> anyhow::Result<()> {
    let cameras = list();
    let camera = cameras.iter().find(|camera| camera.path.to_str() == Some(NODE)).context("the camera is not listed")?;
    ensure!(camera.problem.is_none(), "problem: {:?}", camera.problem);
    ensure!(camera.driver == "vivid", "driver {}", camera.driver);
    let yuyv = camera.formats.iter().find(|format| format.fourcc == "YUYV").context("no YUYV")?;
    let size = yuyv.sizes.iter().find(|size| (size.width_px, size.height_px) == (640, 480)).context("no 640x480")?;
    ensure!(size.rates_hz.contains(&25.0), "rates {:?}", size.rates_hz);
    ensure!(camera.controls.iter().any(|control| control.name == "brightness" && control.max == 255), "no brightness");
    println!("\nok: listed, {} formats, {} controls, YUYV 640x480 at {:?}", camera.formats.len(), camera.controls.len(), size.rates_hz);
    Ok(())
}

/// Each must be one clear error, and leave the device usable.
fn refused_settings() -> anyhow::Result<()> {
    let wrong: [(&str, CameraConfig); 6] = [
        ("641x480", CameraConfig { width_px: 642, height_px: 482, ..config() }),
        ("rate", CameraConfig { rate_hz: 17, ..config() }),
        ("MJPG", CameraConfig { format: CameraFormat::Mjpg, ..config() }),
        ("unknown control", CameraConfig { controls: vec![("exposure_tine".into(), 1)], ..config() }),
        ("control range", CameraConfig { controls: vec![("brightness".into(), 9_000)], ..config() }),
        ("no device", CameraConfig { device: CameraDevice::Index(9), ..config() }),
    ];
    for (what, config) in wrong {
        match CameraSource::new(&config).open() {
            Ok(()) => bail!("{what} was accepted"),
            Err(error) => println!("ok: {what} refused: {error}"),
        }
    }
    Ok(())
}

fn rate(source: &mut CameraSource, pool: &Pool<Vec<u8>>) -> anyhow::Result<()> {
    let first = grab(source, pool)?;
    let mut last = grab(source, pool)?;
    for _ in 0..48 {
        last = grab(source, pool)?;
    }
    let seconds = (last.captured_ns - first.captured_ns) as f64 / 1e9;
    let rate = (last.seq - first.seq) as f64 / seconds;
    println!("ok: {rate:.2} frames/s over {seconds:.2} s, frame age at hand-over {:.1} ms", (now_ns() - last.captured_ns) as f64 / 1e6);
    // What was agreed is checked at open; here only that frames really come at about that pace, on a machine that may be very slow.
    ensure!(rate > 5.0 && rate < 27.5, "the rate is not 25/s");
    Ok(())
}

fn triggered(source: &mut CameraSource, pool: &Pool<Vec<u8>>) -> anyhow::Result<()> {
    for part in 1..=5 {
        let trigger = Trigger { part: PartId(part), received_ns: now_ns(), deadline_ns: u64::MAX, encoder_ticks: 0 };
        let Grab::Frame(frame) = source.grab(Some(&trigger), PATIENCE, pool)? else { bail!("no frame for part {part}") };
        let late = frame.captured_ns.checked_sub(trigger.received_ns).context("a frame from before the trigger")?;
        ensure!(frame.part == Some(PartId(part)));
        println!("ok: part {part}: captured {:.1} ms after its trigger", late as f64 / 1e6);
    }
    Ok(())
}

fn stall(source: &mut CameraSource, pool: &Pool<Vec<u8>>) -> anyhow::Result<()> {
    set("percentage_of_dropped_buffers", 100)?;
    silence(source, pool)?;
    let start = Instant::now();
    set("percentage_of_dropped_buffers", 0)?;
    source.open().context("re-open after a stall")?;
    println!("ok: re-opened {:.0} ms after a stall", start.elapsed().as_secs_f64() * 1e3);
    colours(&grab(source, pool)?).context("after a stall")
}

/// The worst case for nokhwa: its very first read never returns, and a second handle would share the first one's file descriptor.
fn stall_before_the_first_frame(source: &mut CameraSource, pool: &Pool<Vec<u8>>) -> anyhow::Result<()> {
    set("percentage_of_dropped_buffers", 100)?;
    for round in 1..=6 {
        source.open().with_context(|| format!("re-open {round} into silence"))?;
        ensure!(matches!(source.grab(None, Duration::from_millis(300), pool)?, Grab::Timeout), "frames from a silent camera");
    }
    set("percentage_of_dropped_buffers", 0)?;
    source.open().context("re-open after silence")?;
    colours(&grab(source, pool)?).context("after silence")?;
    println!("ok: six re-opens into a silent camera, then frames again");
    Ok(())
}

fn streaming_error(source: &mut CameraSource, pool: &Pool<Vec<u8>>) -> anyhow::Result<()> {
    set("inject_fatal_streaming_error", 1)?;
    let error = until_error(source, pool)?;
    source.open().context("re-open after a streaming error")?;
    colours(&grab(source, pool)?).context("after a streaming error")?;
    println!("ok: streaming error seen ({error}) and recovered from");
    Ok(())
}

/// Another program sets another format while the camera is closed; one that nokhwa does not even know.
fn foreign_format(source: &mut CameraSource, pool: &Pool<Vec<u8>>) -> anyhow::Result<()> {
    set("inject_fatal_streaming_error", 1)?;
    until_error(source, pool)?;
    for code in [b"UYVY", b"RGB3", b"NV12"] {
        let device = v4l::Device::with_path(NODE)?;
        let end = Instant::now() + PATIENCE;
        // The capture thread closes the device just after its error.
        while let Err(error) = device.set_format(&v4l::Format::new(320, 180, v4l::FourCC::new(code))) {
            ensure!(Instant::now() < end, "cannot set a foreign format: {error}");
            std::thread::sleep(Duration::from_millis(20));
        }
        for (name, value) in [("brightness", 7), ("hue", 100), ("test_pattern", 0)] {
            set(name, value)?;
        }
        drop(device);
        source.open().context("re-open after a foreign format")?;
        colours(&grab(source, pool)?).with_context(|| format!("after {}", String::from_utf8_lossy(code)))?;
        println!("ok: format, size and controls are ours again after {}", String::from_utf8_lossy(code));
        set("inject_fatal_streaming_error", 1)?;
        until_error(source, pool)?;
    }
    source.open().context("re-open")?;
    Ok(())
}

fn refused_buffers(source: &mut CameraSource, pool: &Pool<Vec<u8>>) -> anyhow::Result<()> {
    for button in ["inject_vidioc_reqbufs_error", "inject_vidioc_streamon_error"] {
        set(button, 1)?;
        // REQBUFS fails in open, STREAMON at the first read.
        let error = match source.open() {
            Err(error) => error.to_string(),
            Ok(()) => until_error(source, pool)?,
        };
        source.open().with_context(|| format!("open after {button}"))?;
        colours(&grab(source, pool)?).with_context(|| format!("after {button}"))?;
        println!("ok: {button}: {error}");
    }
    Ok(())
}

fn unplugged(source: &mut CameraSource, pool: &Pool<Vec<u8>>) -> anyhow::Result<()> {
    // vivid unregisters its node, and registers it again when the last user has gone: unplugged and plugged in.
    set("disconnect", 1)?;
    let error = until_error(source, pool)?;
    let end = Instant::now() + PATIENCE;
    while let Err(error) = source.open() {
        ensure!(Instant::now() < end, "never came back: {error}");
        std::thread::sleep(Duration::from_millis(100));
    }
    colours(&grab(source, pool)?).context("after unplugging")?;
    println!("ok: unplugged ({error}), plugged in, colours right");
    Ok(())
}

fn grab(source: &mut CameraSource, pool: &Pool<Vec<u8>>) -> anyhow::Result<Frame> {
    match source.grab(None, PATIENCE, pool)? {
        Grab::Frame(frame) => Ok(frame),
        Grab::Timeout => bail!("no frame within {PATIENCE:?}"),
        Grab::End => bail!("a camera has no end"),
    }
}

fn silence(source: &mut CameraSource, pool: &Pool<Vec<u8>>) -> anyhow::Result<()> {
    let end = Instant::now() + PATIENCE;
    while !matches!(source.grab(None, SILENCE, pool)?, Grab::Timeout) {
        ensure!(Instant::now() < end, "the camera does not stall");
    }
    Ok(())
}

fn until_error(source: &mut CameraSource, pool: &Pool<Vec<u8>>) -> anyhow::Result<String> {
    let end = Instant::now() + PATIENCE;
    loop {
        match source.grab(None, SILENCE, pool) {
            Err(error) => return Ok(error.to_string()),
            Ok(_) => ensure!(Instant::now() < end, "no error came"),
        }
    }
}

/// The eight bars, in the middle of each: white, yellow, cyan, green, magenta, red, blue, black.
fn colours(frame: &Frame) -> anyhow::Result<()> {
    const BARS: [[u8; 3]; 8] =
        [[255, 255, 255], [255, 255, 0], [0, 255, 255], [0, 255, 0], [255, 0, 255], [255, 0, 0], [0, 0, 255], [0, 0, 0]];
    let picture = rgb_from_frame(frame)?;
    for (bar, want) in (0u32..).zip(BARS) {
        let x = (2 * bar + 1) * frame.width_px / 16;
        for y in [frame.height_px / 4, frame.height_px * 3 / 4] {
            let got = picture.get_pixel(x, y).0;
            ensure!(
                got.iter().zip(want).all(|(got, want)| got.abs_diff(want) <= 16),
                "bar {bar} at ({x}, {y}) is {got:?} and not {want:?}"
            );
        }
    }
    Ok(())
}

/// Set a control by name, as another program would, past the source.
fn set(name: &str, value: i64) -> anyhow::Result<()> {
    let device = v4l::Device::with_path(NODE).context("second handle")?;
    let controls = device.query_controls()?;
    let plain = |text: &str| text.chars().filter(char::is_ascii_alphanumeric).collect::<String>().to_ascii_lowercase();
    let control = controls.iter().find(|control| plain(&control.name) == plain(name)).with_context(|| {
        format!("no control {name}; there are {:?}", controls.iter().map(|control| control.name.as_str()).collect::<Vec<_>>())
    })?;
    let value = if control.typ == Type::Boolean { Value::Boolean(value != 0) } else { Value::Integer(value) };
    device.set_control(Control { id: control.id, value }).with_context(|| format!("set {name}"))?;
    Ok(())
}
