//! `CameraSource` over a fake camera that stalls, fails, goes away and changes its format at command.

use crossbeam_channel::{Receiver, Sender, unbounded};
use cull::config::{CameraConfig, CameraDevice, CameraFormat};
use cull::frame::{Frame, PartId, PixelFormat, now_ns};
use cull::pool::Pool;
use cull::source::camera::{CameraSource, Device, Driver, Negotiated, Opened};
use cull::source::{Grab, Source, SourceError, Trigger};
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

/// Longest wait for something that is certain to come.
const LONG: Duration = Duration::from_secs(20);
/// A wait for something that must not come.
const SHORT: Duration = Duration::from_millis(80);
const WIDTH_PX: u32 = 4;
const HEIGHT_PX: u32 = 2;
const FRAME_BYTES: usize = (WIDTH_PX * HEIGHT_PX * 2) as usize;

/// What the fake camera does next. `read` blocks until told, as a real one does.
enum Act {
    /// A frame filled with this byte, of this age at hand-over.
    Frame(u8, Option<Duration>),
    /// Bytes of any kind.
    Bytes(Vec<u8>),
    Fail(&'static str),
    Panic,
}

struct FakeDriver {
    acts: Receiver<Act>,
    negotiated: Mutex<Negotiated>,
    refuse: AtomicBool,
    opened: AtomicUsize,
    closed: Arc<AtomicUsize>,
}

struct FakeDevice {
    acts: Receiver<Act>,
    closed: Arc<AtomicUsize>,
}

impl Driver for FakeDriver {
    fn open(&self, _: &CameraConfig) -> Result<Opened, String> {
        if self.refuse.load(Ordering::SeqCst) {
            return Err("it is unplugged; plug it in".into());
        }
        self.opened.fetch_add(1, Ordering::SeqCst);
        let device = Box::new(FakeDevice { acts: self.acts.clone(), closed: self.closed.clone() });
        Ok(Opened { device, name: "fake".into(), negotiated: self.negotiated.lock().expect("lock").clone() })
    }
}

impl Device for FakeDevice {
    fn read(&mut self, pixels: &mut Vec<u8>) -> Result<Option<Duration>, String> {
        match self.acts.recv() {
            Ok(Act::Frame(value, age)) => {
                // Whole buffers, longer than the picture, as drivers hand them over.
                pixels.resize(FRAME_BYTES + 7, value);
                Ok(age)
            }
            Ok(Act::Bytes(bytes)) => {
                pixels.extend_from_slice(&bytes);
                Ok(None)
            }
            Ok(Act::Fail(why)) => Err(why.into()),
            Ok(Act::Panic) => panic!("a fake panic, as nokhwa's assertions"),
            Err(_) => Err("the test is over".into()),
        }
    }
}

impl Drop for FakeDevice {
    fn drop(&mut self) {
        self.closed.fetch_add(1, Ordering::SeqCst);
    }
}

struct Bench {
    source: CameraSource,
    driver: Arc<FakeDriver>,
    acts: Sender<Act>,
    pool: Pool<Vec<u8>>,
}

fn negotiated() -> Negotiated {
    Negotiated { fourcc: "YUYV".into(), width_px: WIDTH_PX, height_px: HEIGHT_PX, rate_hz: 30 }
}

fn bench(format: CameraFormat) -> Bench {
    let (acts, out) = unbounded();
    let fourcc = match format {
        CameraFormat::Yuyv => "YUYV",
        CameraFormat::Mjpg => "MJPG",
    };
    let driver = Arc::new(FakeDriver {
        acts: out,
        negotiated: Mutex::new(Negotiated { fourcc: fourcc.into(), ..negotiated() }),
        refuse: AtomicBool::new(false),
        opened: AtomicUsize::new(0),
        closed: Arc::default(),
    });
    let config = CameraConfig {
        device: CameraDevice::Index(0),
        width_px: WIDTH_PX,
        height_px: HEIGHT_PX,
        rate_hz: 30,
        format,
        controls: Vec::new(),
    };
    Bench { source: CameraSource::with_driver(&config, driver.clone()), driver, acts, pool: Pool::new(3, Vec::new) }
}

impl Bench {
    fn open() -> Self {
        let mut bench = bench(CameraFormat::Yuyv);
        bench.source.open().expect("opens");
        bench
    }

    fn act(&self, act: Act) {
        self.acts.send(act).expect("the driver lives");
    }

    fn frame(&mut self) -> Frame {
        match self.source.grab(None, LONG, &self.pool).expect("no error") {
            Grab::Frame(frame) => frame,
            Grab::Timeout => panic!("no frame"),
            Grab::End => panic!("a camera has no end"),
        }
    }

    /// Wait until the capture thread has taken `count` frames in all.
    fn captured(&self, count: u64) {
        let end = std::time::Instant::now() + LONG;
        while self.source.counters().frames < count {
            assert!(std::time::Instant::now() < end, "{:?}", self.source.counters());
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn trigger(part: u32, received_ns: u64) -> Trigger {
    Trigger { part: PartId(part), received_ns, deadline_ns: received_ns + 1_000_000_000, encoder_ticks: 0 }
}

#[test]
fn frames_come_with_size_number_and_time() {
    let mut bench = Bench::open();
    let before = now_ns();
    bench.act(Act::Frame(7, None));
    let frame = bench.frame();
    assert_eq!((frame.format, frame.width_px, frame.height_px, frame.seq), (PixelFormat::Yuyv, WIDTH_PX, HEIGHT_PX, 0));
    assert_eq!(frame.pixels.as_slice(), [7; FRAME_BYTES], "cut to the picture");
    assert!(frame.captured_ns >= before && frame.captured_ns <= now_ns());
    assert!(frame.part.is_none());
    bench.act(Act::Frame(8, None));
    assert_eq!(bench.frame().seq, 1);
}

#[test]
fn the_newest_frame_wins_and_the_gap_shows() {
    let mut bench = Bench::open();
    for value in 0..10 {
        bench.act(Act::Frame(value, None));
    }
    bench.captured(10);
    // The counter runs just ahead of the channel.
    std::thread::sleep(SHORT);
    let frame = bench.frame();
    assert_eq!((frame.pixels[0], frame.seq), (9, 9));
    assert_eq!(bench.source.counters().dropped, 9);
}

#[test]
fn no_frame_is_a_time_out_and_not_an_error() {
    let mut bench = Bench::open();
    assert!(matches!(bench.source.grab(None, SHORT, &bench.pool), Ok(Grab::Timeout)));
    bench.act(Act::Frame(1, None));
    assert_eq!(bench.frame().pixels[0], 1);
}

#[test]
fn an_empty_pool_is_a_time_out_and_loses_nothing() {
    let mut bench = Bench::open();
    let held: Vec<_> = (0..3).map(|_| bench.pool.take().expect("idle")).collect();
    bench.act(Act::Frame(1, None));
    assert!(matches!(bench.source.grab(None, SHORT, &bench.pool), Ok(Grab::Timeout)));
    drop(held);
    assert_eq!(bench.frame().pixels[0], 1);
}

#[test]
fn a_device_error_is_reported_and_the_device_opens_again() {
    let mut bench = Bench::open();
    bench.act(Act::Frame(1, None));
    bench.frame();
    bench.act(Act::Fail("No such device"));
    match bench.source.grab(None, LONG, &bench.pool).map(|_| ()) {
        Err(SourceError::Failed { what, why }) => assert_eq!((what.as_str(), why.as_str()), ("fake", "No such device")),
        other => panic!("{other:?}"),
    }
    bench.driver.refuse.store(true, Ordering::SeqCst);
    let error = bench.source.open().expect_err("unplugged");
    assert!(error.to_string().contains("plug it in"), "{error}");
    assert!(bench.source.grab(None, SHORT, &bench.pool).is_err(), "a closed camera is an error, not a time-out");
    bench.driver.refuse.store(false, Ordering::SeqCst);
    bench.source.open().expect("plugged in again");
    bench.act(Act::Frame(2, None));
    let frame = bench.frame();
    assert_eq!((frame.pixels[0], frame.seq), (2, 1), "numbers go on");
    assert_eq!(bench.source.counters().opened, 2);
}

#[test]
fn a_panic_in_the_library_is_an_error() {
    let mut bench = Bench::open();
    bench.act(Act::Panic);
    assert!(bench.source.grab(None, LONG, &bench.pool).is_err());
    bench.source.open().expect("opens again");
    bench.act(Act::Frame(3, None));
    assert_eq!(bench.frame().pixels[0], 3);
}

#[test]
fn a_stalled_read_is_left_behind_counted_and_capped() {
    let mut bench = Bench::open();
    for round in 1..=4 {
        assert!(matches!(bench.source.grab(None, SHORT, &bench.pool), Ok(Grab::Timeout)));
        let reopened = bench.source.open();
        assert_eq!(bench.source.counters().abandoned, round);
        if round < 4 {
            reopened.expect("a new thread");
        } else {
            let error = reopened.expect_err("enough threads are stuck").to_string();
            assert!(error.contains("restart cull"), "{error}");
        }
    }
    assert_eq!(bench.source.stuck_threads(), 4);
    // The driver comes back to life: every left-behind read returns, and its frame belongs to nobody.
    for _ in 0..4 {
        bench.act(Act::Frame(66, None));
    }
    let end = std::time::Instant::now() + LONG;
    while bench.source.stuck_threads() > 0 {
        assert!(std::time::Instant::now() < end, "threads never ended");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(bench.driver.closed.load(Ordering::SeqCst), 4, "each closed its device");
    bench.source.open().expect("there is room again");
    bench.act(Act::Frame(5, None));
    assert_eq!(bench.frame().pixels[0], 5, "not a left-behind frame");
}

#[test]
fn another_format_than_agreed_is_refused() {
    let wrong = [
        Negotiated { fourcc: "MJPG".into(), ..negotiated() },
        Negotiated { fourcc: "UYVY".into(), ..negotiated() },
        Negotiated { width_px: WIDTH_PX * 2, ..negotiated() },
        Negotiated { rate_hz: 15, ..negotiated() },
    ];
    let mut bench = Bench::open();
    for negotiated in wrong {
        let say = negotiated.fourcc.clone();
        *bench.driver.negotiated.lock().expect("lock") = negotiated;
        // Without a frame, the old thread would be left behind.
        bench.act(Act::Fail("closed"));
        let error = bench.source.open().expect_err("refused").to_string();
        assert!(error.contains(&say) && error.contains("YUYV 4x2 at 30/s"), "{error}");
        assert!(bench.source.grab(None, SHORT, &bench.pool).is_err());
        let _ = bench.driver.acts.try_recv();
    }
    *bench.driver.negotiated.lock().expect("lock") = negotiated();
    bench.source.open().expect("as agreed again");
    bench.act(Act::Frame(1, None));
    assert_eq!(bench.frame().pixels[0], 1);
}

#[test]
fn damaged_frames_are_handed_on_until_there_are_too_many() {
    let mut bench = Bench::open();
    bench.act(Act::Bytes(vec![9; 3]));
    let frame = bench.frame();
    assert_eq!(frame.pixels.as_slice(), [9; 3], "the verdict on it is a fault, not silence");
    assert_eq!(bench.source.counters().damaged, 1);
    for _ in 0..40 {
        bench.act(Act::Bytes(vec![9; 3]));
    }
    let end = std::time::Instant::now() + LONG;
    let error = loop {
        match bench.source.grab(None, LONG, &bench.pool) {
            Ok(_) => assert!(std::time::Instant::now() < end, "never an error"),
            Err(error) => break error.to_string(),
        }
    };
    assert!(error.contains("cable"), "{error}");
}

#[test]
fn mjpg_is_cut_at_its_end_marker() {
    let mut bench = bench(CameraFormat::Mjpg);
    bench.source.open().expect("opens");
    let picture = image::RgbImage::from_pixel(WIDTH_PX, HEIGHT_PX, image::Rgb([200, 30, 30]));
    let mut jpeg = Vec::new();
    image::codecs::jpeg::JpegEncoder::new(&mut jpeg).encode_image(&picture).expect("jpeg");
    let mut buffer = jpeg.clone();
    buffer.extend_from_slice(&jpeg[20..]);
    bench.act(Act::Bytes(buffer));
    let frame = bench.frame();
    assert_eq!((frame.format, frame.pixels.as_slice()), (PixelFormat::Mjpg, jpeg.as_slice()));
    assert_eq!(bench.source.counters().damaged, 0);
}

#[test]
fn a_triggered_part_gets_the_first_frame_after_its_trigger() {
    let mut bench = Bench::open();
    bench.act(Act::Frame(1, None));
    bench.act(Act::Frame(2, None));
    bench.captured(2);
    let trigger = trigger(41, now_ns());
    assert!(matches!(bench.source.grab(Some(&trigger), SHORT, &bench.pool), Ok(Grab::Timeout)), "both frames are from before");
    bench.act(Act::Frame(3, None));
    bench.act(Act::Frame(4, None));
    match bench.source.grab(Some(&trigger), LONG, &bench.pool) {
        Ok(Grab::Frame(frame)) => {
            assert_eq!((frame.pixels[0], frame.part), (3, Some(PartId(41))));
            assert!(frame.captured_ns >= trigger.received_ns);
        }
        _ => panic!("no frame"),
    }
    assert_eq!(bench.source.counters().lost_pictures, 0);
}

#[test]
fn an_old_frame_that_arrives_late_is_not_the_parts_picture() {
    let mut bench = Bench::open();
    // The transfer takes 5 s here; the driver says so for the first frames, and it holds for the later ones.
    bench.act(Act::Frame(1, Some(Duration::from_secs(5))));
    bench.frame();
    let trigger = trigger(1, now_ns());
    bench.act(Act::Frame(2, None));
    assert!(matches!(bench.source.grab(Some(&trigger), SHORT, &bench.pool), Ok(Grab::Timeout)), "exposed before the trigger");
    bench.act(Act::Frame(3, Some(Duration::ZERO)));
    match bench.source.grab(Some(&trigger), LONG, &bench.pool) {
        Ok(Grab::Frame(frame)) => assert_eq!(frame.pixels[0], 3),
        _ => panic!("no frame"),
    }
}

#[test]
fn a_part_whose_picture_is_gone_gets_none_rather_than_a_later_one() {
    let mut bench = Bench::open();
    let late = trigger(1, now_ns());
    for value in 0..20 {
        bench.act(Act::Frame(value, None));
    }
    bench.captured(20);
    std::thread::sleep(SHORT);
    assert!(matches!(bench.source.grab(Some(&late), LONG, &bench.pool), Ok(Grab::Timeout)));
    assert_eq!(bench.source.counters().lost_pictures, 1);
    // The next part is not affected.
    let next = trigger(2, now_ns());
    bench.act(Act::Frame(99, None));
    match bench.source.grab(Some(&next), LONG, &bench.pool) {
        Ok(Grab::Frame(frame)) => assert_eq!((frame.pixels[0], frame.part), (99, Some(PartId(2)))),
        _ => panic!("no frame"),
    }
}

#[test]
fn two_parts_never_share_a_picture() {
    let mut bench = Bench::open();
    let (first, second) = (trigger(1, now_ns()), trigger(2, now_ns()));
    bench.act(Act::Frame(1, None));
    let Ok(Grab::Frame(frame_1)) = bench.source.grab(Some(&first), LONG, &bench.pool) else { panic!("no frame") };
    bench.act(Act::Frame(2, None));
    assert!(matches!(bench.source.grab(Some(&second), LONG, &bench.pool), Ok(Grab::Timeout)), "its picture went to part 1");
    assert_eq!(bench.source.counters().lost_pictures, 1);
    // Frame 2 was only looked at: a third part, triggered after frame 1, still gets it.
    let third = trigger(3, frame_1.captured_ns + 1);
    match bench.source.grab(Some(&third), LONG, &bench.pool) {
        Ok(Grab::Frame(frame)) => assert_eq!((frame.pixels[0], frame.part), (2, Some(PartId(3)))),
        _ => panic!("no frame"),
    }
}

#[test]
fn buffers_are_reused() {
    let mut bench = Bench::open();
    let mut seen = std::collections::HashSet::new();
    for round in 0..200u32 {
        bench.act(Act::Frame(round as u8, None));
        let frame = bench.frame();
        if round >= 50 {
            seen.insert(frame.pixels.as_ptr());
        }
    }
    assert!(seen.len() <= 12, "{} different buffers: frames allocate", seen.len());
}
