//! Cameras through nokhwa (V4L2).
//!
//! nokhwa's read blocks without a time-out, so the device lives on a thread of its own that can be abandoned. [`CameraSource::open`] tells the
//! old thread to end, wakes it with a signal (which makes a blocked read return), waits a little, and starts a new one; a thread that even
//! then stays in the driver is left behind, counted, and their number is capped. Everything that makes a picture what it is (device path,
//! format, size, rate, every control) is set and verified again at each open: a format that differs is refused rather than misread.
//!
//! The capture thread sees a [`Driver`] and a [`Device`], so that tests can stall, fail, unplug and swap formats; `v4l` is the real one and
//! `find` knows where devices are. Knows nothing of models, verdicts or the PLC.

mod find;
mod v4l;

pub use find::{CameraInfo, ControlInfo, FormatInfo, SizeInfo, list};

use super::{Grab, Source, SourceError, Trigger};
use crate::config::{CameraConfig, CameraDevice, CameraFormat};
use crate::frame::{Frame, Origin, PixelFormat, now_ns};
use crate::pool::Pool;
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TrySendError, bounded};
use nix::sys::pthread::pthread_kill;
use nix::sys::signal::{SigSet, Signal};
use std::os::unix::thread::JoinHandleExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Frames that wait between the capture thread and [`CameraSource::grab`]; the newest win. Free-running lines take the newest and so never see
/// an old one; on a triggered line this is how many frame periods late a grab may come and still find the part's own picture.
const QUEUE_FRAMES: usize = 4;
/// Frame buffers: those that wait, one being filled, one on its way back.
const BUFFERS: usize = QUEUE_FRAMES + 2;
/// Longest time for opening a device and setting it up. UVC cameras need up to 2 s; more means that the driver hangs.
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a capture thread that was told to end may take before it is left behind. A read returns at the signal; stopping a UVC stream takes
/// up to 300 ms.
const END_TIMEOUT: Duration = Duration::from_millis(1_500);
/// Pause between two wake-up signals: one that arrives just before the read starts is lost.
const WAKE_EVERY: Duration = Duration::from_millis(10);
/// Threads left behind in the driver before the source refuses to add more. Each costs a stack and a file descriptor; by then only new hardware
/// state (a plug pulled, a driver reloaded) or a new process helps.
const MAX_ABANDONED: usize = 4;
/// Wakes a blocked read. Ignored by default everywhere, so a stray one does no harm.
const WAKE_SIGNAL: Signal = Signal::SIGURG;
/// Frames damaged in a row before the device counts as failed: a loose cable shows in every frame, a passing disturbance in a few.
const MAX_DAMAGED_IN_A_ROW: u32 = 30;

/// What the capture thread needs of a camera system. Called on the capture thread.
pub trait Driver: Send + Sync {
    /// Find the device, set it up as configured, start it.
    ///
    /// # Errors
    /// One sentence: cause, and what to do.
    fn open(&self, config: &CameraConfig) -> Result<Opened, String>;
}

/// A device that is set up and sends pictures.
pub struct Opened {
    /// The device.
    pub device: Box<dyn Device>,
    /// One line for logs: name and path.
    pub name: String,
    /// What was really agreed with the driver.
    pub negotiated: Negotiated,
}

/// What a driver says it will send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Negotiated {
    /// V4L2 four-character code, for example `YUYV`.
    pub fourcc: String,
    /// Width in pixels.
    pub width_px: u32,
    /// Height in pixels.
    pub height_px: u32,
    /// Frames per second.
    pub rate_hz: u32,
}

/// One open device.
pub trait Device {
    /// Wait for the next picture, however long that takes, and put its bytes into `pixels` (empty at the call). Returns how old the picture was
    /// when the driver handed it over, where that is known.
    ///
    /// # Errors
    /// When the device failed: one sentence with the cause.
    fn read(&mut self, pixels: &mut Vec<u8>) -> Result<Option<Duration>, String>;
}

/// What the camera has done since the source was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CameraCounters {
    /// Frames the device brought.
    pub frames: u64,
    /// Frames that nobody took because newer ones came.
    pub dropped: u64,
    /// Frames that were not what the format promises; they are handed on, and end in a fault verdict.
    pub damaged: u64,
    /// Triggered parts whose own picture was gone, or had gone to another part; they end in a reject.
    pub lost_pictures: u64,
    /// Times the device was opened.
    pub opened: u64,
    /// Capture threads left behind in the driver so far.
    pub abandoned: u64,
}

/// Shared by the source and all its capture threads, past ones included.
#[derive(Default)]
struct Shared {
    frames: AtomicU64,
    dropped: AtomicU64,
    damaged: AtomicU64,
    lost_pictures: AtomicU64,
    opened: AtomicU64,
    abandoned: AtomicU64,
    /// Capture time of the newest frame that nobody took.
    newest_dropped_ns: AtomicU64,
}

/// A frame on its way from the capture thread.
struct Captured {
    pixels: Vec<u8>,
    captured_ns: u64,
    seq: u64,
}

/// The current capture thread.
struct Running {
    thread: JoinHandle<()>,
    stop: Arc<AtomicBool>,
    frames: Receiver<Result<Captured, String>>,
    idle: Sender<Vec<u8>>,
}

/// A camera as a [`Source`].
pub struct CameraSource {
    config: CameraConfig,
    driver: Arc<dyn Driver>,
    running: Option<Running>,
    left_behind: Vec<JoinHandle<()>>,
    shared: Arc<Shared>,
    /// Capture time of the frame given out last: a frame belongs to one part.
    given_ns: u64,
    /// A frame that was looked at and not given out.
    held: Option<Captured>,
    name: String,
}

impl CameraSource {
    /// The configured V4L2 camera. Nothing is opened yet.
    pub fn new(config: &CameraConfig) -> Self {
        Self::with_driver(config, Arc::new(v4l::V4lDriver))
    }

    /// A camera of another system; for tests.
    pub fn with_driver(config: &CameraConfig, driver: Arc<dyn Driver>) -> Self {
        let name = match &config.device {
            CameraDevice::Index(index) => format!("/dev/video{index}"),
            CameraDevice::Path(path) => path.display().to_string(),
            CameraDevice::Serial(serial) => format!("camera with serial number {serial}"),
        };
        Self {
            config: config.clone(),
            driver,
            running: None,
            left_behind: Vec::new(),
            shared: Arc::default(),
            given_ns: 0,
            held: None,
            name,
        }
    }

    /// What the camera has done so far.
    pub fn counters(&self) -> CameraCounters {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let shared = &self.shared;
        CameraCounters {
            frames: get(&shared.frames),
            dropped: get(&shared.dropped),
            damaged: get(&shared.damaged),
            lost_pictures: get(&shared.lost_pictures),
            opened: get(&shared.opened),
            abandoned: get(&shared.abandoned),
        }
    }

    /// Capture threads that are stuck in the driver at the moment.
    pub fn stuck_threads(&self) -> usize {
        self.left_behind.iter().filter(|thread| !thread.is_finished()).count()
    }

    /// End the current capture thread; leave it behind when it does not end in time.
    fn close(&mut self) {
        let Some(Running { thread, stop, .. }) = self.running.take() else { return };
        stop.store(true, Ordering::Release);
        let end = Instant::now() + END_TIMEOUT;
        while !thread.is_finished() && Instant::now() < end {
            // The handle is not joined yet, so the thread's id is still its own.
            if let Err(error) = pthread_kill(thread.as_pthread_t(), WAKE_SIGNAL) {
                log::debug!("camera: cannot wake the capture thread: {error}");
            }
            std::thread::sleep(WAKE_EVERY);
        }
        if thread.is_finished() {
            join(thread);
        } else {
            self.shared.abandoned.fetch_add(1, Ordering::Relaxed);
            log::warn!("camera: a read of {} is stuck in the driver; its thread is left behind", self.name);
            self.left_behind.push(thread);
        }
    }

    fn fail(&self, why: impl Into<String>) -> SourceError {
        SourceError::Failed { what: self.name.clone(), why: why.into() }
    }

    /// The frame for `trigger` (the first captured at or after it), or the newest one.
    fn next_frame(&mut self, trigger: Option<&Trigger>, end: Instant) -> Result<Option<Captured>, SourceError> {
        let Some(running) = &self.running else { return Err(self.fail("it is not open")) };
        loop {
            let received = match self.held.take() {
                Some(held) => Ok(Ok(held)),
                None => running.frames.recv_deadline(end),
            };
            let mut frame = match received {
                Ok(Ok(frame)) => frame,
                Ok(Err(why)) => return Err(self.fail(why)),
                Err(RecvTimeoutError::Timeout) => return Ok(None),
                Err(RecvTimeoutError::Disconnected) => return Err(self.fail("its capture thread ended; it will be opened again")),
            };
            let Some(trigger) = trigger else {
                // What else waits is newer. An error is the last thing a capture thread says: taken from the queue it must be told now, or its
                // reason is lost.
                while let Ok(newer) = running.frames.try_recv() {
                    self.shared.drop_frame(frame, &running.idle);
                    frame = newer.map_err(|why| self.fail(why))?;
                }
                return Ok(Some(frame));
            };
            if frame.captured_ns < trigger.received_ns {
                self.shared.drop_frame(frame, &running.idle);
                continue;
            }
            // Was there a frame between the trigger and this one? Then this one shows the part somewhere else, or another part.
            let dropped_ns = self.shared.newest_dropped_ns.load(Ordering::Acquire);
            if dropped_ns >= trigger.received_ns || self.given_ns >= trigger.received_ns {
                self.shared.lost_pictures.fetch_add(1, Ordering::Relaxed);
                log::warn!(
                    "camera: the picture of part {} is gone or belongs to another part (two parts within one frame, or inspection lags by more \
                     than {QUEUE_FRAMES} frames); the part is rejected. Raise rate_hz or slow the line",
                    trigger.part
                );
                // It may well be the next part's.
                self.held = Some(frame);
                return Ok(None);
            }
            return Ok(Some(frame));
        }
    }
}

impl Source for CameraSource {
    fn describe(&self) -> String {
        let CameraConfig { format, width_px, height_px, rate_hz, .. } = &self.config;
        format!("camera {}, {format:?} {width_px}x{height_px} at {rate_hz}/s", self.name)
    }

    fn open(&mut self) -> Result<(), SourceError> {
        let cannot = |what: &str, why: String| SourceError::Open { what: what.to_owned(), why };
        self.close();
        let (ended, stuck): (Vec<_>, Vec<_>) = std::mem::take(&mut self.left_behind).into_iter().partition(JoinHandle::is_finished);
        ended.into_iter().for_each(join);
        self.left_behind = stuck;
        if self.left_behind.len() >= MAX_ABANDONED {
            let why = format!(
                "{} reads are stuck in its driver; unplug the camera and plug it in again, or restart cull",
                self.left_behind.len()
            );
            return Err(cannot(&self.name, why));
        }
        // A frame from before a re-open is no reason to reject a part after it.
        self.shared.newest_dropped_ns.store(0, Ordering::Release);
        self.held = None;

        let (frames_in, frames) = bounded(QUEUE_FRAMES);
        let (idle, idle_out) = bounded(BUFFERS);
        for _ in 0..BUFFERS - 1 {
            // Holds BUFFERS, so this never fails.
            let _ = idle.try_send(Vec::new());
        }
        let (opened_in, opened) = bounded(1);
        let stop = Arc::new(AtomicBool::new(false));
        let capture = Capture {
            config: self.config.clone(),
            stop: stop.clone(),
            frames: frames_in,
            oldest: frames.clone(),
            idle: idle_out,
            idle_in: idle.clone(),
            shared: self.shared.clone(),
        };
        let driver = self.driver.clone();
        let thread = std::thread::Builder::new()
            .name("camera".into())
            .spawn(move || capture.run(&*driver, &opened_in))
            .map_err(|error| cannot(&self.name, format!("the system gave no thread: {error}")))?;
        self.running = Some(Running { thread, stop, frames, idle });
        match opened.recv_timeout(OPEN_TIMEOUT) {
            Ok(Ok(name)) => {
                self.name = name;
                self.shared.opened.fetch_add(1, Ordering::Relaxed);
                log::info!("camera: opened {}", self.describe());
                Ok(())
            }
            Ok(Err(why)) => {
                self.close();
                Err(cannot(&self.name, why))
            }
            Err(RecvTimeoutError::Timeout) => {
                self.close();
                Err(cannot(
                    &self.name,
                    format!("the driver did not answer within {} s; unplug the camera and plug it in again", OPEN_TIMEOUT.as_secs()),
                ))
            }
            Err(RecvTimeoutError::Disconnected) => {
                self.close();
                Err(cannot(&self.name, "the camera library panicked; please report this with the log".into()))
            }
        }
    }

    fn grab(&mut self, trigger: Option<&Trigger>, timeout: Duration, pool: &Pool<Vec<u8>>) -> Result<Grab, SourceError> {
        let end = Instant::now() + timeout;
        let Some(mut pixels) = pool.take_timeout(timeout) else { return Ok(Grab::Timeout) };
        let Some(Captured { pixels: captured, captured_ns, seq }) = self.next_frame(trigger, end)? else { return Ok(Grab::Timeout) };
        // Swapped, not copied; the pool's buffer is the capture thread's next one.
        let spare = std::mem::replace(&mut *pixels, captured);
        if let Some(running) = &self.running {
            let _ = running.idle.try_send(spare);
        }
        self.given_ns = captured_ns;
        Ok(Grab::Frame(Frame {
            pixels,
            format: pixel_format(self.config.format),
            width_px: self.config.width_px,
            height_px: self.config.height_px,
            captured_ns,
            seq,
            part: trigger.map(|trigger| trigger.part),
            origin: Origin::default(),
        }))
    }
}

impl Drop for CameraSource {
    fn drop(&mut self) {
        self.close();
    }
}

impl Shared {
    /// A frame nobody takes.
    fn drop_frame(&self, frame: Captured, idle: &Sender<Vec<u8>>) {
        self.dropped.fetch_add(1, Ordering::Relaxed);
        self.newest_dropped_ns.fetch_max(frame.captured_ns, Ordering::AcqRel);
        // The channel holds every buffer there is; were it full, the buffer would simply be freed.
        let _ = idle.try_send(frame.pixels);
    }
}

/// The capture thread.
struct Capture {
    config: CameraConfig,
    stop: Arc<AtomicBool>,
    frames: Sender<Result<Captured, String>>,
    /// The other end of `frames`, to take out the oldest when it is full.
    oldest: Receiver<Result<Captured, String>>,
    idle: Receiver<Vec<u8>>,
    idle_in: Sender<Vec<u8>>,
    shared: Arc<Shared>,
}

impl Capture {
    fn run(self, driver: &dyn Driver, opened: &Sender<Result<String, String>>) {
        let_wake_signal_through();
        // nokhwa and v4l assert and unwrap on odd devices; closing a device that went away can panic, too.
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            let Opened { device, name, negotiated } = match driver.open(&self.config) {
                Ok(opened) => opened,
                Err(why) => {
                    let _ = opened.send(Err(why));
                    return;
                }
            };
            if let Err(why) = agree(&self.config, &negotiated) {
                drop(device);
                let _ = opened.send(Err(why));
                return;
            }
            if opened.send(Ok(name)).is_ok() {
                self.capture(device);
            }
        }));
        if outcome.is_err() && !self.stop.load(Ordering::Acquire) {
            self.push(Err("the camera library panicked; please report this with the log".into()));
        }
    }

    fn capture(&self, mut device: Box<dyn Device>) {
        // The age at hand-over is mostly the transfer's time and nearly constant; waiting for the CPU only ever adds to it. So the smallest age
        // seen stands for the frames whose own age is not known.
        let mut smallest_age: Option<Duration> = None;
        let mut damaged_in_a_row = 0;
        let mut previous_ns = 0;
        while !self.stop.load(Ordering::Acquire) {
            let mut pixels = self.buffer();
            let age = match device.read(&mut pixels) {
                Ok(age) => age,
                Err(_) if self.stop.load(Ordering::Acquire) => return,
                Err(why) => return self.push(Err(why)),
            };
            let now = now_ns();
            if self.stop.load(Ordering::Acquire) {
                return;
            }
            smallest_age = match (age, smallest_age) {
                (Some(age), Some(smallest)) => Some(age.min(smallest)),
                (age, smallest) => age.or(smallest),
            };
            let age = age.or(smallest_age).unwrap_or_default();
            let captured_ns = now.saturating_sub(u64::try_from(age.as_nanos()).unwrap_or(0)).max(previous_ns + 1);
            previous_ns = captured_ns;
            match check(&self.config, &mut pixels) {
                Ok(()) => damaged_in_a_row = 0,
                Err(why) => {
                    self.shared.damaged.fetch_add(1, Ordering::Relaxed);
                    damaged_in_a_row += 1;
                    if damaged_in_a_row == 1 {
                        log::warn!("camera: a damaged frame: {why}");
                    }
                    if damaged_in_a_row >= MAX_DAMAGED_IN_A_ROW {
                        return self.push(Err(format!("{damaged_in_a_row} damaged frames in a row ({why}); check cable and power")));
                    }
                }
            }
            let seq = self.shared.frames.fetch_add(1, Ordering::Relaxed);
            self.push(Ok(Captured { pixels, captured_ns, seq }));
        }
    }

    /// An empty buffer: an idle one, or the one of the oldest frame that waits.
    fn buffer(&self) -> Vec<u8> {
        loop {
            if let Ok(mut pixels) = self.idle.try_recv() {
                pixels.clear();
                return pixels;
            }
            match self.oldest.try_recv() {
                Ok(Ok(frame)) => self.shared.drop_frame(frame, &self.idle_in),
                // Only reached when a caller keeps buffers back: correct, at the price of an allocation.
                _ => return Vec::new(),
            }
        }
    }

    /// Newest wins: what does not fit pushes out the oldest.
    fn push(&self, mut item: Result<Captured, String>) {
        loop {
            match self.frames.try_send(item) {
                Ok(()) | Err(TrySendError::Disconnected(_)) => return,
                Err(TrySendError::Full(back)) => item = back,
            }
            if let Ok(Ok(frame)) = self.oldest.try_recv() {
                self.shared.drop_frame(frame, &self.idle_in);
            }
        }
    }
}

fn join(thread: JoinHandle<()>) {
    if thread.join().is_err() {
        log::error!("camera: a capture thread panicked; please report this with the log");
    }
}

/// On this thread only the wake-up signal is delivered, and it does nothing but make blocked calls return: a SIGTERM meant for the process must not
/// look like a camera error.
fn let_wake_signal_through() {
    static HANDLER: OnceLock<()> = OnceLock::new();
    HANDLER.get_or_init(|| {
        // A handler must exist, or the signal would be ignored without waking anybody.
        if let Err(error) = signal_hook::flag::register(WAKE_SIGNAL as i32, Arc::default()) {
            log::warn!("camera: no wake-up signal ({error}); stalled reads will be left behind");
        }
    });
    let mut others = SigSet::all();
    others.remove(WAKE_SIGNAL);
    if let Err(error) = others.thread_block() {
        log::debug!("camera: cannot block signals on the capture thread: {error}");
    }
}

fn pixel_format(format: CameraFormat) -> PixelFormat {
    match format {
        CameraFormat::Mjpg => PixelFormat::Mjpg,
        CameraFormat::Yuyv => PixelFormat::Yuyv,
    }
}

/// The V4L2 four-character code of a configured format.
pub(crate) fn fourcc(format: CameraFormat) -> &'static str {
    match format {
        CameraFormat::Mjpg => "MJPG",
        CameraFormat::Yuyv => "YUYV",
    }
}

/// A device that will send something else than configured is refused: misread pictures have wrong colours or none.
fn agree(config: &CameraConfig, negotiated: &Negotiated) -> Result<(), String> {
    let wanted = Negotiated {
        fourcc: fourcc(config.format).into(),
        width_px: config.width_px,
        height_px: config.height_px,
        rate_hz: config.rate_hz,
    };
    if *negotiated == wanted {
        return Ok(());
    }
    let say = |format: &Negotiated| format!("{} {}x{} at {}/s", format.fourcc, format.width_px, format.height_px, format.rate_hz);
    Err(format!("it would send {} and not {} as configured; `cull doctor` lists what it can send", say(negotiated), say(&wanted)))
}

/// Cut `pixels` to the picture: drivers hand over whole buffers.
fn check(config: &CameraConfig, pixels: &mut Vec<u8>) -> Result<(), String> {
    match config.format {
        CameraFormat::Yuyv => {
            let need = config.width_px as usize * config.height_px as usize * 2;
            if pixels.len() < need {
                return Err(format!("{} bytes where {need} are needed", pixels.len()));
            }
            pixels.truncate(need);
        }
        CameraFormat::Mjpg => match jpeg_len(pixels) {
            Some(len) => pixels.truncate(len),
            None => return Err("it is no complete JPEG picture".into()),
        },
    }
    Ok(())
}

/// Length of the JPEG picture at the start of `bytes`, from its first marker to its end marker; `None` when there is no whole picture. Needed because
/// nokhwa hands over the whole buffer, in which an older, longer picture's end may follow. (ITU-T T.81, annex B.)
pub(crate) fn jpeg_len(bytes: &[u8]) -> Option<usize> {
    const START: u8 = 0xd8;
    const END: u8 = 0xd9;
    const SCAN: u8 = 0xda;
    if bytes.get(..2)? != [0xff, START] {
        return None;
    }
    let mut at = 2;
    loop {
        // A marker, possibly after fill bytes.
        if *bytes.get(at)? != 0xff {
            return None;
        }
        let marker = *bytes.get(at + 1)?;
        match marker {
            0xff => {
                at += 1;
                continue;
            }
            END => return Some(at + 2),
            // Markers without a segment.
            0x01 | 0xd0..=0xd7 => {
                at += 2;
                continue;
            }
            _ => {}
        }
        let length = usize::from(u16::from_be_bytes([*bytes.get(at + 2)?, *bytes.get(at + 3)?]));
        if length < 2 {
            return None;
        }
        at += 2 + length;
        if marker == SCAN {
            // Entropy-coded data: 0xff is followed by 0 (a stuffed byte) or a restart marker until the scan ends.
            loop {
                at += bytes.get(at..)?.iter().position(|&byte| byte == 0xff)?;
                match bytes.get(at + 1)? {
                    0 | 0xd0..=0xd7 => at += 2,
                    _ => break,
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn jpeg() -> Vec<u8> {
        let picture = image::RgbImage::from_fn(64, 48, |x, y| image::Rgb([x as u8 * 3, y as u8 * 5, (x * y) as u8]));
        let mut bytes = Vec::new();
        image::codecs::jpeg::JpegEncoder::new_with_quality(&mut bytes, 95).encode_image(&picture).expect("jpeg");
        bytes
    }

    #[test]
    fn the_end_of_a_jpeg_is_found_before_an_older_pictures_rest() {
        let picture = jpeg();
        assert_eq!(jpeg_len(&picture), Some(picture.len()));
        let mut buffer = picture.clone();
        buffer.extend_from_slice(&picture[picture.len() / 2..]);
        buffer.resize(100_000, 0);
        assert_eq!(jpeg_len(&buffer), Some(picture.len()));
        for cut in 0..picture.len() {
            assert_eq!(jpeg_len(&picture[..cut]), None, "cut at {cut}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_measured_without_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..600), start in any::<bool>()) {
            if start && bytes.len() >= 2 {
                bytes[0] = 0xff;
                bytes[1] = 0xd8;
            }
            if let Some(len) = jpeg_len(&bytes) {
                prop_assert!(len <= bytes.len());
                prop_assert_eq!(&bytes[len - 2..len], &[0xff, 0xd9]);
            }
        }
    }
}
