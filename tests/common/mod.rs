//! A scripted source, a scripted model and a scripted board around the real pipeline. What the model does with a part is written in the
//! part's picture: every pixel has the value that [`Script`] maps to a behaviour.
#![allow(dead_code)]

use crossbeam_channel::Receiver;
use cull::anomaly::{AnomalyMap, ScoreRule};
use cull::calibration::Calibration;
use cull::config::TriggerMode;
use cull::frame::{Frame, Origin, PartId, PixelFormat, now_ns};
use cull::pipeline::{Detector, DetectorError, DetectorSession, Options, Pipeline, Running, Sinks, Stats};
use cull::plc::{EventSender, HostState, LinkHandle, LinkState, PlcEvent, ToPlc};
use cull::pool::Pool;
use cull::preprocess::PreprocessSpec;
use cull::source::{Grab, Source, SourceError, Trigger};
use cull::verdict::{Policy, Verdict};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

/// Side of the scripted pictures and of the model's input, in pixels.
pub const SIDE_PX: u32 = 16;

/// Generous: other work runs beside the tests.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Pixel values with a meaning to the scripted model; any other below 100 is a good part.
pub mod pixel {
    pub const GOOD: u8 = 10;
    pub const DEFECT: u8 = 150;
    pub const PANIC: u8 = 200;
    pub const ERROR: u8 = 201;
    pub const HANG: u8 = 202;
    pub const NOT_FINITE: u8 = 203;
}

/// Holds workers that meet [`pixel::HANG`] until opened.
#[derive(Default)]
pub struct Gate {
    open: Mutex<bool>,
    changed: Condvar,
}

impl Gate {
    pub fn open(&self) {
        *self.open.lock().unwrap() = true;
        self.changed.notify_all();
    }

    fn pass(&self) {
        let mut open = self.open.lock().unwrap();
        while !*open {
            open = self.changed.wait(open).unwrap();
        }
    }
}

pub struct FakeModel {
    spec: PreprocessSpec,
    calibration: Calibration,
    pub gate: Arc<Gate>,
    /// Every inference takes this long.
    pub work: Duration,
    /// Inferences started.
    pub started: Arc<AtomicU32>,
}

impl FakeModel {
    pub fn new(work: Duration) -> Self {
        let normal: Vec<f32> = (0..200).map(|i| i as f32 * 0.5).collect();
        Self {
            spec: PreprocessSpec { width_px: SIDE_PX, height_px: SIDE_PX, mean: [0.0; 3], std: [1.0; 3] },
            calibration: Calibration::from_scores(&normal).unwrap(),
            gate: Arc::default(),
            work,
            started: Arc::default(),
        }
    }
}

impl Detector for FakeModel {
    fn preprocess(&self) -> &PreprocessSpec {
        &self.spec
    }
    fn grid(&self) -> [usize; 2] {
        [4, 4]
    }
    fn score_rule(&self) -> ScoreRule {
        ScoreRule::TopMean { share: 1.0 }
    }
    fn calibration(&self) -> &Calibration {
        &self.calibration
    }
    fn session(&self) -> Box<dyn DetectorSession> {
        Box::new(FakeSession { gate: Arc::clone(&self.gate), work: self.work, started: Arc::clone(&self.started) })
    }
}

struct FakeSession {
    gate: Arc<Gate>,
    work: Duration,
    started: Arc<AtomicU32>,
}

impl DetectorSession for FakeSession {
    fn infer(&mut self, input: &[f32], map: &mut AnomalyMap) -> Result<(), DetectorError> {
        self.started.fetch_add(1, Ordering::SeqCst);
        let value = input[0].round() as u8;
        if !self.work.is_zero() {
            std::thread::sleep(self.work);
        }
        match value {
            pixel::PANIC => panic!("scripted panic"),
            pixel::ERROR => return Err("scripted error".into()),
            pixel::HANG => self.gate.pass(),
            _ => {}
        }
        map.values.fill(if value == pixel::NOT_FINITE { f32::NAN } else { f32::from(value) });
        Ok(())
    }
}

/// What a [`FakeSource`] can be told to do, from the test's thread.
#[derive(Default)]
pub struct SourceScript {
    /// Bring no frames.
    pub silent: AtomicBool,
    /// Fail every call, and to open.
    pub broken: AtomicBool,
    pub opens: AtomicU32,
    /// Free-running: end after this many frames (0: never).
    pub end_after: AtomicU32,
    /// Free-running: pause between frames, in us.
    pub every_us: AtomicU32,
}

pub struct FakeSource {
    pub script: Arc<SourceScript>,
    /// Pixel value of a part's picture.
    pub value_of: Box<dyn Fn(u32) -> u8 + Send>,
    seq: u64,
}

impl FakeSource {
    pub fn new(script: &Arc<SourceScript>, value_of: impl Fn(u32) -> u8 + Send + 'static) -> Box<Self> {
        Box::new(Self { script: Arc::clone(script), value_of: Box::new(value_of), seq: 0 })
    }
}

impl Source for FakeSource {
    fn describe(&self) -> String {
        "scripted".into()
    }

    fn open(&mut self) -> Result<(), SourceError> {
        self.script.opens.fetch_add(1, Ordering::SeqCst);
        if self.script.broken.load(Ordering::SeqCst) {
            return Err(SourceError::Open { what: "scripted source".into(), why: "scripted".into() });
        }
        Ok(())
    }

    fn grab(&mut self, trigger: Option<&Trigger>, timeout: Duration, pool: &Pool<Vec<u8>>) -> Result<Grab, SourceError> {
        if self.script.broken.load(Ordering::SeqCst) {
            return Err(SourceError::Failed { what: "scripted source".into(), why: "scripted".into() });
        }
        let end_after = u64::from(self.script.end_after.load(Ordering::SeqCst));
        if trigger.is_none() && end_after > 0 && self.seq >= end_after {
            return Ok(Grab::End);
        }
        if self.script.silent.load(Ordering::SeqCst) {
            std::thread::sleep(timeout);
            return Ok(Grab::Timeout);
        }
        if trigger.is_none() {
            std::thread::sleep(Duration::from_micros(self.script.every_us.load(Ordering::SeqCst).into()));
        }
        let Some(mut pixels) = pool.take_timeout(timeout) else { return Ok(Grab::Timeout) };
        self.seq += 1;
        let number = trigger.map_or(self.seq as u32, |t| t.part.0);
        pixels.clear();
        pixels.resize((SIDE_PX * SIDE_PX * 3) as usize, (self.value_of)(number));
        Ok(Grab::Frame(Frame {
            pixels,
            format: PixelFormat::Rgb8,
            width_px: SIDE_PX,
            height_px: SIDE_PX,
            captured_ns: now_ns(),
            seq: self.seq,
            part: None,
            origin: Origin::default(),
        }))
    }
}

pub fn options(trigger: TriggerMode, workers: usize) -> Options {
    Options {
        trigger,
        roi: None,
        policy: Policy { false_reject_rate: 0.005 },
        workers,
        live: false,
        lossless: true,
        number_free_frames: false,
        stall: Duration::from_millis(300),
        backoff_min: Duration::from_millis(20),
        backoff_max: Duration::from_millis(100),
        stuck_after: Duration::from_secs(120),
        tap: None,
    }
}

/// The pipeline with a scripted board in front.
pub struct Rig {
    pub running: Option<Running>,
    pub from_line: Receiver<ToPlc>,
    pub to_line: EventSender,
}

impl Rig {
    pub fn start(options: Options, model: FakeModel, source: Box<FakeSource>) -> Self {
        let (link, from_line, to_line) = LinkHandle::detached();
        let running = Pipeline::start(options, Arc::new(model), source, Some(link), Sinks::default()).unwrap();
        to_line.try_send(PlcEvent::Link(LinkState::Up)).unwrap();
        Self { running: Some(running), from_line, to_line }
    }

    /// Announce a part whose verdict is due in `allowed`.
    pub fn trigger(&self, part: u32, allowed: Duration) -> u64 {
        let received_ns = now_ns();
        let deadline_ns = received_ns + allowed.as_nanos() as u64;
        let trigger = PlcEvent::Trigger(Trigger { part: PartId(part), received_ns, deadline_ns, encoder_ticks: 0 });
        // A test may announce faster than a busy machine takes.
        while self.to_line.try_send(trigger).is_err() {
            std::thread::sleep(Duration::from_millis(1));
        }
        deadline_ns
    }

    /// The next verdict, passing over states.
    pub fn verdict(&self) -> (u32, Verdict) {
        loop {
            match self.from_line.recv_timeout(PATIENCE).expect("a verdict") {
                ToPlc::Verdict { part, verdict, .. } => return (part.0, verdict),
                _ => continue,
            }
        }
    }

    /// Wait for the line to say that it is in `state`, passing over verdicts.
    pub fn wait_for_state(&self, state: HostState) {
        loop {
            match self.from_line.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("the line never said {state:?}")) {
                ToPlc::HostState(s) if s == state => return,
                _ => continue,
            }
        }
    }

    pub fn running(&self) -> &Running {
        self.running.as_ref().unwrap()
    }

    /// Stop the line: what it counted. (While it runs, a verdict is sent before it is counted, so a test that has just received one may look too soon.)
    pub fn end(&mut self) -> Stats {
        self.running().stop();
        self.running.take().unwrap().wait().stats
    }
}
