//! `cull plc`: watch and exercise the PLC link. The port is exclusive: while a line runs on it, nothing is exercised, that is the point. Watching and
//! `clear` work then too: the line that runs is asked for them ([`control`]).

use anyhow::{Context, bail};
use clap::{Args as ClapArgs, Subcommand, ValueEnum};
use cull::config::{BridgeConfig, Config, ModbusConfig, ModbusRole, Parity, PlcConfig};
use cull::frame::now_ns;
use cull::plc::control::{self, Answer, Asked, Heard};
use cull::plc::monitor::{BridgeMonitor, Decoded, ModbusMonitor};
use cull::plc::port::{OpenPort, Port, PortError, SerialOpener};
use cull::plc::{BoardRequest, Direction, HostState, LinkHandle, LinkState, PlcEvent, RequestStatus, Tap, ToPlc};
use cull::verdict::{Decision, Reason, Verdict};
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Longest wait for the other side to agree before `send` gives up.
const CONNECT: Duration = Duration::from_secs(10);
/// Longest wait for an answer to a request: the session repeats it every 60 ms.
const ANSWER: Duration = Duration::from_secs(3);
/// Chunks of bytes that wait to be printed; a terminal that cannot keep up loses some, and is told.
const TAP_QUEUE: usize = 4096;

/// Arguments of `cull plc`.
#[derive(ClapArgs)]
pub struct Args {
    #[command(subcommand)]
    command: PlcCommand,
}

#[derive(Subcommand)]
enum PlcCommand {
    /// Show every frame that crosses the port, decoded, until Ctrl-C. While a line runs on the port, what that says and hears; otherwise it connects as an
    /// inspector that is stopped, so the board lets nothing through
    Monitor(MonitorArgs),
    /// Exercise outputs or answer parts by hand, for commissioning; refused while a line runs on the port, but for `clear`
    Send(SendArgs),
}

/// Which port, and what is spoken on it: from a configuration, or by hand.
#[derive(ClapArgs)]
struct LinkArgs {
    /// Take the link's settings from this configuration
    #[arg(long, conflicts_with = "port")]
    config: Option<PathBuf>,
    /// Serial device, best a stable path (/dev/serial/by-id/…)
    #[arg(long, required_unless_present = "config")]
    port: Option<PathBuf>,
    /// Baud rate
    #[arg(long, default_value_t = 115_200)]
    baud: u32,
    /// Native bridge: codename of the connection
    #[arg(long, default_value_t = 0x6375_6c6c)]
    codename: u32,
    /// Time from trigger to the other side's own decision, in ms; a board must have the same
    #[arg(long, default_value_t = 500)]
    deadline_ms: u32,
    /// Native bridge: the board's watchdog, in ms
    #[arg(long, default_value_t = 500)]
    watchdog_ms: u32,
    /// Speak Modbus RTU in this role instead of the native bridge
    #[arg(long, value_enum)]
    modbus: Option<Role>,
    /// Modbus unit address
    #[arg(long, default_value_t = 1)]
    unit: u8,
    /// Modbus parity
    #[arg(long, value_enum, default_value_t = ParityArg::Even)]
    parity: ParityArg,
    /// Modbus stop bits
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=2))]
    stop_bits: u8,
}

#[derive(Clone, Copy, ValueEnum)]
enum Role {
    /// We poll the PLC
    Master,
    /// The PLC polls us
    Slave,
}

#[derive(Clone, Copy, ValueEnum)]
enum ParityArg {
    Even,
    Odd,
    None,
}

#[derive(ClapArgs)]
struct MonitorArgs {
    #[command(flatten)]
    link: LinkArgs,
    /// One JSON object a line instead of columns
    #[arg(long)]
    json: bool,
    /// Only listen: send nothing at all (for a second adapter on the same wires)
    #[arg(long)]
    listen: bool,
    /// Stop after this many seconds
    #[arg(long)]
    seconds: Option<u64>,
}

#[derive(ClapArgs)]
struct SendArgs {
    #[command(flatten)]
    link: LinkArgs,
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Have the board leave its safe state, also while a line runs on the port (then it is asked to); look at the line first
    Clear,
    /// Switch the reject actuator on
    Reject {
        /// For how long, in ms
        #[arg(long, default_value_t = 200)]
        ms: u16,
    },
    /// Switch the line-stop output on
    LineStop {
        /// For how long, in ms
        #[arg(long, default_value_t = 1000)]
        ms: u16,
    },
    /// Switch the status LED on
    Led {
        /// For how long, in ms
        #[arg(long, default_value_t = 1000)]
        ms: u16,
    },
    /// Answer the next parts at the sensor with this verdict
    Verdict {
        /// The verdict
        #[arg(value_enum)]
        decision: DecisionArg,
        /// How many parts
        #[arg(long, default_value_t = 1)]
        count: u32,
        /// Longest wait for each part, in s
        #[arg(long, default_value_t = 60)]
        wait_s: u64,
    },
}

#[derive(Clone, Copy, ValueEnum)]
enum DecisionArg {
    Accept,
    Reject,
    Unknown,
    Fault,
}

/// Run the command.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    match args.command {
        PlcCommand::Monitor(args) => monitor(args),
        PlcCommand::Send(args) => send(args),
    }
}

impl LinkArgs {
    fn settings(self) -> anyhow::Result<PlcConfig> {
        if let Some(path) = self.config {
            return match Config::load(&path)?.plc {
                PlcConfig::None => bail!("{} has no PLC link (`plc: None`): give --port", path.display()),
                plc => Ok(plc),
            };
        }
        let port = self.port.context("give --port or --config")?;
        Ok(match self.modbus {
            None => PlcConfig::Bridge(BridgeConfig {
                port,
                baud: self.baud,
                codename: self.codename,
                deadline_ms: self.deadline_ms,
                watchdog_ms: self.watchdog_ms,
            }),
            Some(role) => PlcConfig::Modbus(ModbusConfig {
                port,
                baud: self.baud,
                role: match role {
                    Role::Master => ModbusRole::Master,
                    Role::Slave => ModbusRole::Slave,
                },
                unit: self.unit,
                parity: match self.parity {
                    ParityArg::Even => Parity::Even,
                    ParityArg::Odd => Parity::Odd,
                    ParityArg::None => Parity::None,
                },
                stop_bits: self.stop_bits,
                deadline_ms: self.deadline_ms,
            }),
        })
    }
}

/// Hands out a port that is open already, then opens anew: so that a port in use ends the command instead of being tried for ever.
struct OpenedOnce {
    first: Option<Box<dyn Port>>,
    then: SerialOpener,
}

impl OpenPort for OpenedOnce {
    fn open(&mut self) -> Result<Box<dyn Port>, PortError> {
        self.first.take().map_or_else(|| self.then.open(), Ok)
    }

    fn name(&self) -> String {
        self.then.name()
    }
}

fn open(config: &PlcConfig) -> anyhow::Result<OpenedOnce> {
    let settings = cull::plc::port_settings(config).context("no PLC link")?;
    let mut then = SerialOpener::new(settings);
    let first = Some(then.open()?);
    Ok(OpenedOnce { first, then })
}

fn spawn(config: &PlcConfig, tap: Option<Tap>) -> anyhow::Result<LinkHandle> {
    let opener = Box::new(open(config)?);
    cull::plc::spawn_with(config, opener, tap)?.context("no PLC link")
}

fn stop_flag() -> anyhow::Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, stop.clone()).context("cannot catch Ctrl-C")?;
    }
    Ok(stop)
}

enum Monitor {
    Bridge(BridgeMonitor),
    Modbus(ModbusMonitor),
}

impl Monitor {
    fn bytes(&mut self, direction: Direction, at_ns: u64, bytes: &[u8], sink: &mut impl FnMut(Decoded)) {
        match self {
            Self::Bridge(monitor) => monitor.bytes(direction, at_ns, bytes, sink),
            Self::Modbus(monitor) => monitor.bytes(direction, at_ns, bytes, sink),
        }
    }
}

fn monitor(args: MonitorArgs) -> anyhow::Result<ExitCode> {
    let config = args.link.settings()?;
    let mut monitor = match config {
        PlcConfig::Modbus(_) => Monitor::Modbus(ModbusMonitor::default()),
        PlcConfig::Bridge(_) | PlcConfig::None => Monitor::Bridge(BridgeMonitor::default()),
    };
    let stop = stop_flag()?;
    let start_ns = now_ns();
    let end = args.seconds.map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let over = || stop.load(Ordering::Relaxed) || end.is_some_and(|end| Instant::now() >= end);
    let mut out = std::io::stdout().lock();
    let mut print = |decoded: &Decoded, start_ns: u64| -> std::io::Result<()> {
        if args.json {
            writeln!(out, "{}", decoded.json(start_ns))?
        } else {
            writeln!(out, "{}", decoded.line(start_ns))?
        }
        out.flush()
    };
    let mut failed = Ok(());
    if args.listen {
        let mut opener = open(&config)?;
        let port = opener.open()?;
        let mut reader = port.reader()?;
        let mut buffer = [0; 1024];
        while !over() && failed.is_ok() {
            match reader.read(&mut buffer) {
                Ok(0) => bail!("{} hung up", opener.name()),
                Ok(n) => monitor.bytes(Direction::In, now_ns(), buffer.get(..n).unwrap_or(&[]), &mut |d| {
                    failed = std::mem::replace(&mut failed, Ok(())).and_then(|()| print(&d, start_ns));
                }),
                Err(error) if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {}
                Err(error) => bail!("{} lost: {error}", opener.name()),
            }
        }
        return ended(failed);
    }
    let device = cull::plc::port_settings(&config).context("no PLC link")?.device;
    match control::ask_monitor(&device)? {
        Asked::Answer(Ok(mut line)) => {
            log::info!("watching the line that runs on {}; frames of a session that began before cannot be checked", device.display());
            let mut first_ns = None;
            while !over() && failed.is_ok() {
                match line.listen() {
                    Ok(Heard::Bytes { direction, at_ns, bytes }) => {
                        let start_ns = *first_ns.get_or_insert(at_ns);
                        monitor.bytes(direction, at_ns, &bytes, &mut |d| {
                            failed = std::mem::replace(&mut failed, Ok(())).and_then(|()| print(&d, start_ns));
                        });
                    }
                    Ok(Heard::LeftOut) => log::warn!("this terminal is too slow: frames were left out"),
                    Ok(Heard::Nothing) => {}
                    Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => bail!("the line on {} has ended", device.display()),
                    Err(error) => bail!("the line on {} shows nothing more: {error}", device.display()),
                }
            }
            return ended(failed);
        }
        Asked::Answer(Err(Answer::Busy)) => bail!("another monitor watches the line on {} already", device.display()),
        Asked::Answer(Err(_)) => bail!("the line on {} cannot be watched: it is another version of cull", device.display()),
        Asked::NoLine | Asked::Forbidden(_) => {}
    }
    let (chunks_in, chunks) = crossbeam_channel::bounded::<(Direction, u64, Vec<u8>)>(TAP_QUEUE);
    let lost = Arc::new(AtomicBool::new(false));
    let lost_in_tap = lost.clone();
    let tap: Tap = Box::new(move |direction, at_ns, bytes| {
        if chunks_in.try_send((direction, at_ns, bytes.to_vec())).is_err() {
            lost_in_tap.store(true, Ordering::Relaxed);
        }
    });
    let link = spawn(&config, Some(tap))?;
    tell_state(&link, HostState::Stopped)?;
    while !over() && failed.is_ok() {
        if let Ok((direction, at_ns, bytes)) = chunks.recv_timeout(Duration::from_millis(50)) {
            monitor.bytes(direction, at_ns, &bytes, &mut |d| {
                failed = std::mem::replace(&mut failed, Ok(())).and_then(|()| print(&d, start_ns));
            });
        }
        if lost.swap(false, Ordering::Relaxed) {
            log::warn!("this terminal is too slow: frames were left out");
        }
        for event in link.events.try_iter() {
            if let PlcEvent::Link(state) = event {
                log::info!("link {state:?}");
            }
        }
    }
    close(link);
    ended(failed)
}

/// A reader that closes the pipe (`| head`) ends the command in good order.
fn ended(result: std::io::Result<()>) -> anyhow::Result<ExitCode> {
    match result {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(ExitCode::SUCCESS),
        other => other.context("cannot print").map(|()| ExitCode::SUCCESS),
    }
}

fn tell_state(link: &LinkHandle, state: HostState) -> anyhow::Result<()> {
    link.to_plc.try_send(ToPlc::HostState(state)).context("the link's thread is gone")
}

/// End in good order, so that the board latches nothing.
fn close(mut link: LinkHandle) {
    let thread = link.thread.take();
    drop(link);
    if let Some(thread) = thread
        && thread.join().is_err()
    {
        log::error!("the link's thread panicked");
    }
}

fn send(args: SendArgs) -> anyhow::Result<ExitCode> {
    let config = args.link.settings()?;
    let mut refusal = "outputs are exercised, and parts answered by hand, only while no line runs on the port".to_owned();
    if let (What::Clear, PlcConfig::Bridge(bridge)) = (&args.what, &config) {
        match control::ask_clear(&bridge.port)? {
            Asked::Answer(answer) => return cleared_by_line(answer),
            Asked::NoLine => refusal = "no running line can be asked to clear the board on this port, and the port cannot be opened".into(),
            Asked::Forbidden(socket) => {
                refusal = format!(
                    "if a line runs on this port, ask as root or as a member of the line's group (this user may not look at {})",
                    socket.display()
                );
            }
        }
    }
    // A line that runs holds the port: this is where everything else is refused.
    let link = spawn(&config, None).context(refusal)?;
    let result = send_on(&link, &config, &args.what);
    close(link);
    result.map(|()| ExitCode::SUCCESS)
}

/// What the running line said to `clear`.
fn cleared_by_line(answer: Answer) -> anyhow::Result<ExitCode> {
    match answer {
        Answer::Done => {
            println!("done: the line that runs has cleared its board");
            Ok(ExitCode::SUCCESS)
        }
        Answer::Refused => bail!("the board refuses: look at the line, its log says what the board complains of"),
        Answer::NotSent => {
            bail!("the line that runs has no board on its link now (or another clear is under way): see its log, then try again")
        }
        Answer::NoAnswer => bail!("the board did not answer the line that runs; see its log, then try again"),
        Answer::Unknown | Answer::Watching | Answer::Busy => {
            bail!("the line that runs knows no such request: it is another version of cull")
        }
    }
}

fn send_on(link: &LinkHandle, config: &PlcConfig, what: &What) -> anyhow::Result<()> {
    let port = cull::plc::port_settings(config).map(|settings| settings.device.display().to_string()).unwrap_or_default();
    let state = if matches!(what, What::Verdict { .. }) { HostState::Running } else { HostState::Stopped };
    tell_state(link, state)?;
    next(link, CONNECT, &format!("nobody answers on {port}: check power, cable and baud rate"), |event| match event {
        PlcEvent::Link(LinkState::Up) => Some(Ok(())),
        PlcEvent::Link(LinkState::Refused) => Some(Err(anyhow::anyhow!("{port}: the two sides do not agree; the line above says on what"))),
        _ => None,
    })??;
    let request = match *what {
        What::Clear => BoardRequest::Clear,
        What::Reject { ms } => BoardRequest::Reject { duration_ms: ms },
        What::LineStop { ms } => BoardRequest::LineStop { duration_ms: ms },
        What::Led { ms } => BoardRequest::Led { duration_ms: ms },
        What::Verdict { decision, count, wait_s } => return answer_parts(link, decision, count, Duration::from_secs(wait_s)),
    };
    if matches!(config, PlcConfig::Modbus(_)) {
        bail!("Modbus has no such request: `cull plc send … verdict` is what a PLC on Modbus can be sent");
    }
    let start = Instant::now();
    loop {
        link.to_plc.try_send(ToPlc::Request(request)).context("the link's thread is gone")?;
        let status = next(link, ANSWER, "the board does not answer", |event| {
            if let PlcEvent::Answer { status, .. } = event { Some(*status) } else { None }
        })?;
        match status {
            RequestStatus::Done => {
                println!("done: {request:?}");
                // The board switches the output off when we leave: stay for as long as it is to be on.
                let on = match request {
                    BoardRequest::Clear => 0,
                    BoardRequest::Reject { duration_ms } | BoardRequest::LineStop { duration_ms } | BoardRequest::Led { duration_ms } => {
                        duration_ms
                    }
                };
                std::thread::sleep(Duration::from_millis(on.into()));
                return Ok(());
            }
            // It may not have heard yet that we are stopped, or a part is on its way to the gate.
            RequestStatus::Refused | RequestStatus::NotSent if start.elapsed() < ANSWER => std::thread::sleep(Duration::from_millis(100)),
            RequestStatus::Refused => bail!("the board refuses: parts are under way between sensor and gate, or there is nothing to clear"),
            RequestStatus::NotSent => bail!("the link went down"),
        }
    }
}

fn answer_parts(link: &LinkHandle, decision: DecisionArg, count: u32, wait: Duration) -> anyhow::Result<()> {
    let (decision, reason) = match decision {
        DecisionArg::Accept => (Decision::Accept, Reason::Normal),
        DecisionArg::Reject => (Decision::Reject, Reason::Anomalous),
        DecisionArg::Unknown => (Decision::Unknown, Reason::NoFrame),
        DecisionArg::Fault => (Decision::Fault, Reason::ModelError),
    };
    let verdict = Verdict { decision, reason, score: f32::NAN, p_value: f32::NAN };
    for _ in 0..count {
        let part = next(link, wait, "no part came past the sensor", |event| match event {
            PlcEvent::Trigger(trigger) => Some(trigger.part),
            _ => None,
        })?;
        link.to_plc.try_send(ToPlc::Verdict { part, verdict, decided_ns: now_ns() }).context("the link's thread is gone")?;
        next(link, ANSWER, "the verdict was not acknowledged in time: the part is rejected", |event| match event {
            PlcEvent::Acknowledged { part: of, .. } if *of == part => Some(()),
            _ => None,
        })?;
        println!("part {part}: {decision:?}, acknowledged");
    }
    Ok(())
}

/// The next event that `wanted` takes, within `limit`.
fn next<T>(link: &LinkHandle, limit: Duration, otherwise: &str, mut wanted: impl FnMut(&PlcEvent) -> Option<T>) -> anyhow::Result<T> {
    let end = Instant::now() + limit;
    loop {
        let event = link.events.recv_deadline(end).map_err(|_| anyhow::anyhow!("{otherwise}"))?;
        if let Some(found) = wanted(&event) {
            return Ok(found);
        }
    }
}
