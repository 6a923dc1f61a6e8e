//! Where cameras are and what they can do: `/dev`, sysfs and V4L2 queries that disturb no running camera.

use crate::config::CameraDevice;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use v4l::frameinterval::FrameIntervalEnum;
use v4l::framesize::FrameSizeEnum;
use v4l::video::Capture;

/// Where the kernel describes video devices.
const SYSFS: &str = "/sys/class/video4linux";
/// Stable names made by udev.
const BY_ID: &str = "/dev/v4l/by-id";
/// How many parents of a video device are asked for a serial number: interface, USB device, and one hub for composite devices.
const MAX_PARENTS: usize = 3;
/// Most sizes asked of a device for each format: hostile or broken firmware must not keep the doctor busy.
const MAX_SIZES: usize = 200;

/// One camera, for people to choose from.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CameraInfo {
    /// What the driver calls it.
    pub name: String,
    /// Device node, `/dev/videoN`.
    pub path: PathBuf,
    /// Number N.
    pub index: u32,
    /// Stable path, best for the configuration.
    pub by_id: Option<PathBuf>,
    /// USB serial number.
    pub serial: Option<String>,
    /// Kernel driver.
    pub driver: String,
    /// What it can send.
    pub formats: Vec<FormatInfo>,
    /// What can be set.
    pub controls: Vec<ControlInfo>,
    /// Why it cannot be used or asked, with what to do; `None` when all is well.
    pub problem: Option<String>,
}

/// One pixel format of a camera.
#[derive(Clone, Debug, PartialEq)]
pub struct FormatInfo {
    /// V4L2 four-character code.
    pub fourcc: String,
    /// The driver's words.
    pub description: String,
    /// Whether `cull` reads it (`MJPG`, `YUYV`).
    pub supported: bool,
    /// Sizes, each with its rates.
    pub sizes: Vec<SizeInfo>,
}

/// One picture size.
#[derive(Clone, Debug, PartialEq)]
pub struct SizeInfo {
    /// Width in pixels.
    pub width_px: u32,
    /// Height in pixels.
    pub height_px: u32,
    /// Frames per second, highest first; empty when the driver does not say.
    pub rates_hz: Vec<f32>,
}

/// One control of a camera.
#[derive(Clone, Debug, PartialEq)]
pub struct ControlInfo {
    /// Name for the configuration, as `v4l2-ctl` writes it.
    pub name: String,
    /// Smallest value.
    pub min: i64,
    /// Largest value.
    pub max: i64,
    /// Distance between values.
    pub step: u64,
    /// Value after power-up.
    pub default: i64,
    /// Value now, where it can be read.
    pub value: Option<i64>,
    /// For menus: each value with its meaning.
    pub menu: Vec<(i64, String)>,
}

/// Every camera of this machine, by device number. A device that cannot be asked is listed with its problem; a machine without cameras gives an
/// empty list. Opens each device briefly and changes nothing.
pub fn list() -> Vec<CameraInfo> {
    let mut cameras: Vec<CameraInfo> = nodes(Path::new(SYSFS)).into_iter().filter_map(describe).collect();
    cameras.sort_by_key(|camera| camera.index);
    cameras
}

/// Device numbers in sysfs.
fn nodes(sysfs: &Path) -> Vec<u32> {
    let Ok(entries) = std::fs::read_dir(sysfs) else { return Vec::new() };
    entries.flatten().filter_map(|entry| entry.file_name().to_str()?.strip_prefix("video")?.parse().ok()).collect()
}

/// `None` for nodes that are no cameras (metadata, codecs, outputs).
fn describe(index: u32) -> Option<CameraInfo> {
    let path = PathBuf::from(format!("/dev/video{index}"));
    let mut camera = CameraInfo {
        name: attribute(&Path::new(SYSFS).join(format!("video{index}/name"))).unwrap_or_else(|| path.display().to_string()),
        by_id: by_id(Path::new(BY_ID), &path),
        serial: serial_of(Path::new(SYSFS), index),
        path,
        index,
        ..CameraInfo::default()
    };
    let device = match v4l::Device::with_path(&camera.path) {
        Ok(device) => device,
        Err(error) => {
            camera.problem = Some(open_problem(&camera.path, &error));
            return Some(camera);
        }
    };
    // The v4l crate unwraps what drivers send; a strange device must not end the doctor.
    let asked = catch_unwind(AssertUnwindSafe(|| {
        let caps = device.query_caps().map_err(|error| error.to_string())?;
        if !caps.capabilities.contains(v4l::capability::Flags::VIDEO_CAPTURE) {
            return Ok(None);
        }
        Ok::<_, String>(Some((caps.driver, caps.card, formats(&device).map_err(|error| error.to_string())?)))
    }));
    match asked {
        Ok(Ok(None)) => return None,
        Ok(Ok(Some((driver, card, formats)))) => {
            camera.driver = driver;
            camera.name = card;
            if formats.is_empty() {
                // A sensor behind a media pipeline that is not set up, or a node of another kind.
                camera.problem =
                    Some("it offers no picture formats; a sensor behind a media pipeline must be set up with media-ctl first".into());
            } else if !formats.iter().any(|format| format.supported) {
                camera.problem = Some("it sends neither MJPG nor YUYV, the formats cull reads".into());
            }
            camera.formats = formats;
        }
        Ok(Err(why)) => camera.problem = Some(format!("it does not answer V4L2 queries: {why}")),
        Err(_) => camera.problem = Some("its answers cannot be read by the V4L2 library".into()),
    }
    camera.controls = catch_unwind(AssertUnwindSafe(|| controls(&device))).unwrap_or_default();
    Some(camera)
}

/// What the device can send.
pub(super) fn formats(device: &v4l::Device) -> std::io::Result<Vec<FormatInfo>> {
    let mut formats: Vec<FormatInfo> = Vec::new();
    for description in device.enum_formats()? {
        let fourcc = description.fourcc.to_string();
        if formats.iter().any(|format| format.fourcc == fourcc) {
            continue;
        }
        let mut sizes = Vec::new();
        for size in device.enum_framesizes(description.fourcc).unwrap_or_default().into_iter().take(MAX_SIZES) {
            let ends = match size.size {
                FrameSizeEnum::Discrete(size) => vec![(size.width, size.height)],
                // A range: its ends tell enough.
                FrameSizeEnum::Stepwise(size) => vec![(size.min_width, size.min_height), (size.max_width, size.max_height)],
            };
            for (width_px, height_px) in ends {
                let intervals = device.enum_frameintervals(description.fourcc, width_px, height_px).unwrap_or_default();
                let mut rates_hz: Vec<f32> = intervals.into_iter().flat_map(|interval| rates(&interval.interval)).collect();
                rates_hz.sort_by(|a, b| b.total_cmp(a));
                rates_hz.dedup();
                sizes.push(SizeInfo { width_px, height_px, rates_hz });
            }
        }
        let supported = matches!(fourcc.as_str(), "MJPG" | "YUYV");
        formats.push(FormatInfo { fourcc, description: description.description, supported, sizes });
    }
    Ok(formats)
}

fn rates(interval: &FrameIntervalEnum) -> Vec<f32> {
    let rate = |interval: &v4l::Fraction| (interval.numerator > 0).then(|| interval.denominator as f32 / interval.numerator as f32);
    match interval {
        FrameIntervalEnum::Discrete(interval) => rate(interval).into_iter().collect(),
        FrameIntervalEnum::Stepwise(range) => [&range.min, &range.max].into_iter().filter_map(rate).collect(),
    }
}

/// What can be set on the device.
fn controls(device: &v4l::Device) -> Vec<ControlInfo> {
    use v4l::control::{MenuItem, Type, Value};
    let wanted =
        |typ: Type| matches!(typ, Type::Integer | Type::Boolean | Type::Menu | Type::IntegerMenu | Type::Integer64 | Type::Bitmask);
    let descriptions = device.query_controls().unwrap_or_default();
    descriptions
        .into_iter()
        .filter(|control| wanted(control.typ) && !control.flags.contains(v4l::control::Flags::DISABLED))
        .map(|control| ControlInfo {
            value: match device.control(control.id).map(|control| control.value) {
                Ok(Value::Integer(value)) => Some(value),
                Ok(Value::Boolean(value)) => Some(i64::from(value)),
                _ => None,
            },
            name: control_name(&control.name),
            min: control.minimum,
            max: control.maximum,
            step: control.step,
            default: control.default,
            menu: control
                .items
                .unwrap_or_default()
                .into_iter()
                .map(|(value, item)| match item {
                    MenuItem::Name(name) => (i64::from(value), name),
                    MenuItem::Value(meaning) => (i64::from(value), meaning.to_string()),
                })
                .collect(),
        })
        .collect()
}

/// A control's name as `v4l2-ctl` writes it: "Exposure Time, Absolute" -> `exposure_time_absolute`.
pub(super) fn control_name(name: &str) -> String {
    let mut out = String::with_capacity(name.len());
    let mut gap = false;
    for character in name.chars() {
        if character.is_ascii_alphanumeric() {
            if std::mem::take(&mut gap) && !out.is_empty() {
                out.push('_');
            }
            out.push(character.to_ascii_lowercase());
        } else {
            gap = true;
        }
    }
    out
}

/// Why a device node cannot be opened, with what to do.
pub(super) fn open_problem(path: &Path, error: &std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::NotFound => {
            format!("{} does not exist; is the camera plugged in? `cull doctor` lists what is there", path.display())
        }
        std::io::ErrorKind::PermissionDenied => {
            format!("no permission for {}; add the user that runs cull to the group `video`", path.display())
        }
        _ => format!("{}: {error}", path.display()),
    }
}

/// The device number that the configuration means, at this moment: numbers change when a camera is plugged in again.
///
/// # Errors
/// One sentence: what was not found, and what to do.
pub(super) fn resolve(device: &CameraDevice) -> Result<u32, String> {
    resolve_in(device, Path::new(SYSFS))
}

fn resolve_in(device: &CameraDevice, sysfs: &Path) -> Result<u32, String> {
    match device {
        CameraDevice::Index(index) => Ok(*index),
        CameraDevice::Path(path) => {
            let node = path.canonicalize().map_err(|error| open_problem(path, &error))?;
            let number = node.file_name().and_then(|name| name.to_str()?.strip_prefix("video")?.parse().ok());
            number.ok_or_else(|| format!("{} leads to {}, which is no /dev/videoN", path.display(), node.display()))
        }
        CameraDevice::Serial(serial) => {
            let mut found: Vec<(u32, u32)> = nodes(sysfs)
                .into_iter()
                .filter(|&index| serial_of(sysfs, index).as_deref() == Some(serial))
                .map(|index| (function_of(sysfs, index), index))
                .collect();
            found.sort_unstable();
            // A UVC camera has several nodes: the pictures are on its first, metadata on the next.
            match found.as_slice() {
                [] => Err(format!("no camera with serial number {serial}; is it plugged in? `cull doctor` lists serial numbers")),
                [(first, _), (second, _), ..] if first == second => {
                    Err(format!("several cameras have the serial number {serial}; choose one by Path(\"/dev/v4l/by-path/…\")"))
                }
                [(_, index), ..] => Ok(*index),
            }
        }
    }
}

/// Which function of its device a node is: 0 for the first, the pictures.
fn function_of(sysfs: &Path, index: u32) -> u32 {
    attribute(&sysfs.join(format!("video{index}/index"))).and_then(|text| text.parse().ok()).unwrap_or(0)
}

/// The USB serial number of a video device.
fn serial_of(sysfs: &Path, index: u32) -> Option<String> {
    let mut device = sysfs.join(format!("video{index}/device")).canonicalize().ok()?;
    for _ in 0..MAX_PARENTS {
        if let Some(serial) = attribute(&device.join("serial")) {
            return Some(serial);
        }
        device = device.parent()?.to_owned();
    }
    None
}

fn attribute(path: &Path) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?;
    let text = text.trim();
    (!text.is_empty()).then(|| text.to_owned())
}

/// The stable name that leads to `node`.
fn by_id(folder: &Path, node: &Path) -> Option<PathBuf> {
    let mut names: Vec<PathBuf> = std::fs::read_dir(folder).ok()?.flatten().map(|entry| entry.path()).collect();
    names.sort();
    names.into_iter().find(|name| name.canonicalize().is_ok_and(|target| target == node))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn control_names_are_those_of_v4l2_ctl() {
        for (name, want) in [
            ("Brightness", "brightness"),
            ("Exposure Time, Absolute", "exposure_time_absolute"),
            ("White Balance, Automatic", "white_balance_automatic"),
            ("Pan/Tilt (Reset)", "pan_tilt_reset"),
            ("  64 Bits ", "64_bits"),
            ("", ""),
        ] {
            assert_eq!(control_name(name), want);
        }
    }

    /// Two cameras as sysfs shows them, each with a picture and a metadata node.
    fn sysfs(serials: [&str; 2]) -> tempfile::TempDir {
        let root = tempfile::tempdir().expect("temp folder");
        let class = root.path().join("class");
        for (number, serial) in serials.iter().enumerate() {
            let interface = root.path().join(format!("usb/1-{number}/1-{number}:1.0"));
            std::fs::create_dir_all(&interface).expect("folder");
            std::fs::write(root.path().join(format!("usb/1-{number}/serial")), format!("{serial}\n")).expect("serial");
            for (function, node) in [2 * number + 1, 2 * number].into_iter().enumerate() {
                // The picture node has the higher number, so that order by number would choose wrongly.
                let node = class.join(format!("video{node}"));
                std::fs::create_dir_all(&node).expect("folder");
                std::fs::write(node.join("index"), format!("{function}\n")).expect("index");
                symlink(&interface, node.join("device")).expect("link");
            }
        }
        root
    }

    #[test]
    fn a_serial_number_finds_the_picture_node() {
        let root = sysfs(["CAM-A", "CAM-B"]);
        let class = root.path().join("class");
        let find = |serial: &str| resolve_in(&CameraDevice::Serial(serial.into()), &class);
        assert_eq!(find("CAM-A"), Ok(1));
        assert_eq!(find("CAM-B"), Ok(3));
        assert!(find("CAM-C").expect_err("not there").contains("CAM-C"));
        let twins = sysfs(["SAME", "SAME"]);
        let error = resolve_in(&CameraDevice::Serial("SAME".into()), &twins.path().join("class")).expect_err("ambiguous");
        assert!(error.contains("by-path"), "{error}");
    }

    #[test]
    fn a_stable_path_leads_to_its_node() {
        let root = tempfile::tempdir().expect("temp folder");
        let link = root.path().join("usb-Cam_1234-video-index0");
        for name in ["video7", "ttyUSB0"] {
            std::fs::write(root.path().join(name), "").expect("node");
        }
        symlink(root.path().join("video7"), &link).expect("link");
        assert_eq!(resolve(&CameraDevice::Path(link.clone())), Ok(7));
        assert_eq!(by_id(root.path(), &root.path().join("video7").canonicalize().expect("path")), Some(link));
        assert!(resolve(&CameraDevice::Path(root.path().join("ttyUSB0"))).is_err());
        let gone = resolve(&CameraDevice::Path(root.path().join("gone"))).expect_err("not there");
        assert!(gone.contains("does not exist"), "{gone}");
    }

    #[test]
    fn a_machine_without_cameras_has_none() {
        assert!(nodes(Path::new("/no/such/folder")).is_empty());
        // On a machine with cameras this lists them; on any machine it returns.
        let _ = list();
    }
}
