//! The real [`Driver`]: set up through V4L2 calls, then opened and read through nokhwa.
//!
//! nokhwa alone is not enough for a line. It refuses a device whose *current* format it does not know (left by another program) or whose rate is no
//! whole number, so the device is set up before nokhwa sees it. Opened twice, it shares one file descriptor with the first (abandoned) handle.
//! It hands over whole buffers without their used length. It gives the driver's time stamp only with a copying read, so the first frames are read that
//! way, to learn how old a frame is at hand-over, and the others without a copy. Its control setter fails on every value that the device rounds.
//! It does not show a buffer's error flag; UVC drops such frames by itself unless told otherwise (`nodrop`), and what is torn fails to decode.

use super::find::{self, control_name};
use super::{Device, Driver, Negotiated, Opened, fourcc};
use crate::config::{CameraConfig, CameraFormat};
use nokhwa::Camera;
use nokhwa::utils::{CameraFormat as NokhwaFormat, CameraIndex, FrameFormat, RequestedFormat, RequestedFormatType, Resolution};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use v4l::control::{Control, Description, Flags, Type, Value};
use v4l::video::Capture;
use v4l::video::capture::Parameters;
use v4l::{Format, FourCC};

/// Frames read with their time stamp after each open. At 30/s this takes half a second.
const STAMPED_FRAMES: u32 = 16;
/// A frame that claims to be older than this has a time stamp of another clock.
const MAX_AGE: Duration = Duration::from_secs(1);

/// V4L2 through nokhwa.
pub(super) struct V4lDriver;

impl Driver for V4lDriver {
    fn open(&self, config: &CameraConfig) -> Result<Opened, String> {
        let index = find::resolve(&config.device)?;
        let path = format!("/dev/video{index}");
        let device = v4l::Device::with_path(&path).map_err(|error| find::open_problem(path.as_ref(), &error))?;
        set_format(&device, config)?;

        let frame_format = match config.format {
            CameraFormat::Mjpg => FrameFormat::MJPEG,
            CameraFormat::Yuyv => FrameFormat::YUYV,
        };
        let wanted = NokhwaFormat::new(Resolution::new(config.width_px, config.height_px), frame_format, config.rate_hz);
        let mut camera =
            Camera::new(CameraIndex::Index(index), RequestedFormat::with_formats(RequestedFormatType::Exact(wanted), &[frame_format]))
                .map_err(|error| format!("nokhwa cannot open it: {error}"))?;
        let agreed = camera.refresh_camera_format().map_err(|error| format!("its format cannot be read back: {error}"))?;
        camera.open_stream().map_err(|error| format!("it gives no stream ({error}); does another program use it?"))?;
        // After the format: some drivers reset their controls with it.
        set_controls(&device, &config.controls)?;

        let negotiated = Negotiated {
            fourcc: nokhwa_fourcc(agreed.format()).into(),
            width_px: agreed.resolution().width(),
            height_px: agreed.resolution().height(),
            rate_hz: agreed.frame_rate(),
        };
        let name = format!("{} ({path})", camera.info().human_name());
        Ok(Opened { device: Box::new(NokhwaDevice { camera, format: config.format, frames: 0 }), name, negotiated })
    }
}

fn nokhwa_fourcc(format: FrameFormat) -> &'static str {
    match format {
        FrameFormat::MJPEG => "MJPG",
        FrameFormat::YUYV => "YUYV",
        FrameFormat::NV12 => "NV12",
        FrameFormat::GRAY => "GRAY",
        FrameFormat::RAWRGB => "RGB3",
        FrameFormat::RAWBGR => "BGR3",
    }
}

/// Format, size and rate, each read back: a V4L2 driver silently takes the nearest it can.
fn set_format(device: &v4l::Device, config: &CameraConfig) -> Result<(), String> {
    if !config.width_px.is_multiple_of(2) {
        return Err(format!("width_px is {}, and must be even", config.width_px));
    }
    let code = FourCC::new(match config.format {
        CameraFormat::Mjpg => b"MJPG",
        CameraFormat::Yuyv => b"YUYV",
    });
    let asked = Format::new(config.width_px, config.height_px, code);
    let got = device.set_format(&asked).map_err(|error| match error.raw_os_error() {
        // EBUSY
        Some(16) => "it is busy: another program uses it, or an earlier read is stuck in its driver; close the other program, or unplug the camera and plug it in again".to_owned(),
        _ => format!("its format cannot be set: {error}"),
    })?;
    if (got.fourcc, got.width, got.height) != (code, config.width_px, config.height_px) {
        return Err(format!(
            "it cannot send {} {}x{} (it would send {} {}x{}); it can send {}",
            fourcc(config.format),
            config.width_px,
            config.height_px,
            got.fourcc,
            got.width,
            got.height,
            offers(device, None)
        ));
    }
    let packed = config.width_px * 2;
    if config.format == CameraFormat::Yuyv && got.stride != 0 && got.stride != packed {
        return Err(format!("its rows are {} bytes long and not {packed}; choose a width that is a multiple of 32", got.stride));
    }
    let rate = device.set_params(&Parameters::with_fps(config.rate_hz)).map_err(|error| format!("its rate cannot be set: {error}"))?;
    let interval = rate.interval;
    if interval.numerator == 0 || interval.denominator != config.rate_hz.saturating_mul(interval.numerator) {
        let got = f64::from(interval.denominator) / f64::from(interval.numerator.max(1));
        let at = offers(device, Some((config.width_px, config.height_px)));
        return Err(format!("it cannot send {} frames a second at this size (it would send {got:.2}); it can send {at}", config.rate_hz));
    }
    Ok(())
}

/// What the device offers, for an error message: all supported formats, or one size with its rates.
fn offers(device: &v4l::Device, size: Option<(u32, u32)>) -> String {
    let mut words = Vec::new();
    for format in find::formats(device).unwrap_or_default().iter().filter(|format| format.supported) {
        for offered in &format.sizes {
            if size.is_none_or(|size| size == (offered.width_px, offered.height_px)) {
                let rates: Vec<String> = offered.rates_hz.iter().map(|rate| format!("{rate}")).collect();
                words.push(format!("{} {}x{} at {}", format.fourcc, offered.width_px, offered.height_px, rates.join(" or ")));
            }
        }
    }
    if words.is_empty() { "neither MJPG nor YUYV".into() } else { words.join(", ") }
}

/// Every control in the configuration, in its order (automatic modes first, what they lock after), each read back.
fn set_controls(device: &v4l::Device, wanted: &[(String, i64)]) -> Result<(), String> {
    if wanted.is_empty() {
        return Ok(());
    }
    let known = device.query_controls().map_err(|error| format!("its controls cannot be listed: {error}"))?;
    for (name, value) in wanted {
        let Some(control) = known.iter().find(|control| control_name(&control.name) == *name) else {
            let names: Vec<String> =
                known.iter().filter(|control| control.typ != Type::CtrlClass).map(|control| control_name(&control.name)).collect();
            return Err(format!("it has no control `{name}`; it has {}", names.join(", ")));
        };
        set_control(device, control, name, *value)?;
    }
    Ok(())
}

fn set_control(device: &v4l::Device, control: &Description, name: &str, value: i64) -> Result<(), String> {
    let (min, max) = if control.typ == Type::Boolean { (0, 1) } else { (control.minimum, control.maximum) };
    if control.typ != Type::Button && !(min..=max).contains(&value) {
        return Err(format!("its control `{name}` accepts {min} to {max} (step {}), not {value}", control.step));
    }
    let setting = if control.typ == Type::Boolean { Value::Boolean(value != 0) } else { Value::Integer(value) };
    device.set_control(Control { id: control.id, value: setting }).map_err(|error| {
        format!(
            "its control `{name}` cannot be set to {value} ({error}); if an automatic mode locks it, switch that off before it in the list"
        )
    })?;
    // What cannot be read back, or changes by itself, is taken on trust.
    if control.typ == Type::Button || control.flags.intersects(Flags::WRITE_ONLY | Flags::VOLATILE) {
        return Ok(());
    }
    let got = match device.control(control.id).map(|control| control.value) {
        Ok(Value::Integer(got)) => got,
        Ok(Value::Boolean(got)) => i64::from(got),
        _ => return Ok(()),
    };
    if got.abs_diff(value) >= control.step.max(1) {
        return Err(format!(
            "its control `{name}` stays at {got} instead of {value}; if an automatic mode locks it, switch that off before it in the list"
        ));
    }
    Ok(())
}

struct NokhwaDevice {
    camera: Camera,
    format: CameraFormat,
    frames: u32,
}

/// Of a JPEG only the picture: the rest of the buffer is megabytes of older ones. A damaged one is taken whole, and found out by the caller.
fn picture(format: CameraFormat, buffer: &[u8]) -> &[u8] {
    match format {
        CameraFormat::Mjpg => super::jpeg_len(buffer).and_then(|len| buffer.get(..len)).unwrap_or(buffer),
        CameraFormat::Yuyv => buffer,
    }
}

impl Device for NokhwaDevice {
    fn read(&mut self, pixels: &mut Vec<u8>) -> Result<Option<Duration>, String> {
        if self.frames < STAMPED_FRAMES {
            self.frames += 1;
            let frame = self.camera.frame().map_err(|error| error.to_string())?;
            pixels.extend_from_slice(picture(self.format, frame.buffer()));
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            return Ok(frame.capture_timestamp().and_then(|stamp| now.checked_sub(stamp)).filter(|age| *age <= MAX_AGE));
        }
        let buffer = self.camera.frame_raw().map_err(|error| error.to_string())?;
        pixels.extend_from_slice(picture(self.format, &buffer));
        Ok(None)
    }
}
