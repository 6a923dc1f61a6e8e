//! Modbus RTU against pymodbus and libmodbus over pseudo-terminals, both roles, clean and damaged lines. The line between the two is a thread
//! that keeps the timing of 115200 baud 8E1 and can flip bits, cut frames and swallow them. `tests/interop/modbus.sh` installs what is needed;
//! what is missing is skipped, and said so.

use cull::config::{ModbusConfig, ModbusRole, Parity, PlcConfig};
use cull::frame::{PartId, now_ns};
use cull::plc::{HostState, LinkHandle, LinkState, PlcCommand, PlcEvent, ToPlc};
use cull::verdict::{Decision, Reason, Verdict};
use serialport::{SerialPort, TTYPort};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Longest a foreign program may take, in all.
const PATIENCE: Duration = Duration::from_secs(120);
/// One character at 115200 baud 8E1: 11 bits.
const CHARACTER: Duration = Duration::from_nanos(95_486);
/// On a damaged line every this many portions one is harmed, each way.
const HARM_EVERY: u32 = 9;

/// Two pseudo-terminals joined by threads.
struct Line {
    ours: String,
    theirs: String,
    over: Arc<AtomicBool>,
    harmed: Arc<AtomicU32>,
    threads: Vec<std::thread::JoinHandle<()>>,
    /// Held open, so that a port that is closed for a moment is no hang-up.
    _slaves: [TTYPort; 2],
}

impl Line {
    fn new(noisy: bool) -> Self {
        let (mut a, slave_a) = TTYPort::pair().unwrap();
        let (mut b, slave_b) = TTYPort::pair().unwrap();
        let (over, harmed) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU32::new(0)));
        for master in [&mut a, &mut b] {
            master.set_timeout(Duration::from_millis(20)).unwrap();
        }
        let (a2, b2) = (a.try_clone_native().unwrap(), b.try_clone_native().unwrap());
        let threads = [(a, b2), (b, a2)]
            .into_iter()
            .map(|(from, to)| {
                let (over, harmed) = (over.clone(), harmed.clone());
                std::thread::spawn(move || carry(from, to, noisy, &over, &harmed))
            })
            .collect();
        Self { ours: slave_a.name().unwrap(), theirs: slave_b.name().unwrap(), over, harmed, threads, _slaves: [slave_a, slave_b] }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn carry(mut from: TTYPort, mut to: TTYPort, noisy: bool, over: &AtomicBool, harmed: &AtomicU32) {
    let mut buffer = [0; 512];
    let mut portion = 0u32;
    while !over.load(Ordering::Relaxed) {
        let Ok(mut n) = from.read(&mut buffer) else { continue };
        std::thread::sleep(CHARACTER * n as u32);
        portion += 1;
        if noisy && portion.is_multiple_of(HARM_EVERY) {
            harmed.fetch_add(1, Ordering::Relaxed);
            match portion / HARM_EVERY % 3 {
                0 => buffer[n / 2] ^= 0x10,
                1 => n /= 2,
                _ => n = 0,
            }
        }
        let _ = to.write_all(&buffer[..n]);
    }
}

/// The rule that the foreign programs check: every seventh part gets no verdict, every third is bad.
fn verdict_on(part: PartId) -> Option<Verdict> {
    let (decision, reason) = match part.0 {
        n if n % 7 == 0 => return None,
        n if n % 3 == 0 => (Decision::Reject, Reason::Anomalous),
        _ => (Decision::Accept, Reason::Normal),
    };
    Some(Verdict { decision, reason, score: 1.0, p_value: 0.5 })
}

/// Run `program PORT clean|noisy` against a link in `role`, judging parts meanwhile; returns the commands that came.
fn run(role: ModbusRole, mut program: Command, noisy: bool) -> Vec<PlcCommand> {
    let line = Line::new(noisy);
    let config = ModbusConfig {
        port: PathBuf::from(&line.ours),
        baud: 115_200,
        role,
        unit: 5,
        parity: Parity::Even,
        stop_bits: 1,
        // A verdict is instant here, and a noisy line takes some repeats of 0.3 s; missed parts should not take long.
        deadline_ms: if noisy { 1_500 } else { 400 },
    };
    let link: LinkHandle = cull::plc::spawn(&PlcConfig::Modbus(config)).unwrap().unwrap();
    link.to_plc.try_send(ToPlc::HostState(HostState::Running)).unwrap();
    let mut child =
        program.arg(&line.theirs).arg(if noisy { "noisy" } else { "clean" }).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let start = Instant::now();
    let mut commands = Vec::new();
    let mut up = false;
    let status = loop {
        match link.events.recv_timeout(Duration::from_millis(20)) {
            Ok(PlcEvent::Trigger(trigger)) => {
                if let Some(verdict) = verdict_on(trigger.part) {
                    link.to_plc.try_send(ToPlc::Verdict { part: trigger.part, verdict, decided_ns: now_ns() }).unwrap();
                }
            }
            Ok(PlcEvent::Command(command)) => commands.push(command),
            Ok(PlcEvent::Link(LinkState::Up)) => up = true,
            _ => {}
        }
        if let Some(status) = child.try_wait().unwrap() {
            break Some(status);
        }
        if start.elapsed() > PATIENCE {
            child.kill().unwrap();
            break None;
        }
    };
    let output = child.wait_with_output().unwrap();
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    for line in text.lines() {
        println!("    {line}");
    }
    let summary = link.stats.summary();
    println!("    ours: {} portions harmed, {summary:?}", line.harmed.load(Ordering::Relaxed));
    assert!(status.is_some_and(|status| status.success()), "{role:?} {}: {text}", if noisy { "noisy" } else { "clean" });
    assert!(text.contains("PASS"), "{text}");
    assert!(up, "the link never came up");
    commands.extend(link.events.try_iter().filter_map(|e| if let PlcEvent::Command(c) = e { Some(c) } else { None }));
    if noisy {
        assert!(line.harmed.load(Ordering::Relaxed) > 0, "the line did no harm");
    } else {
        assert_eq!(summary.late, 0);
        assert!(summary.acknowledged > 0);
    }
    commands
}

fn python() -> Option<PathBuf> {
    let python = std::env::var_os("CULL_PYTHON").map_or_else(|| "python3".into(), PathBuf::from);
    let there = Command::new(&python).args(["-c", "import pymodbus, serial"]).output().is_ok_and(|output| output.status.success());
    if !there {
        eprintln!("SKIPPED: {} has no pymodbus and pyserial; tests/interop/modbus.sh installs them", python.display());
    }
    there.then_some(python)
}

fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/interop").join(name)
}

fn compiled(name: &str, folder: &Path) -> Option<PathBuf> {
    let flags = Command::new("pkg-config").args(["--cflags", "--libs", "libmodbus"]).output().ok().filter(|output| output.status.success());
    let Some(flags) = flags else {
        eprintln!("SKIPPED: no libmodbus; apt-get install gcc pkg-config libmodbus-dev");
        return None;
    };
    let out = folder.join(name);
    let built = Command::new("gcc")
        .args(["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O1", "-o"])
        .arg(&out)
        .arg(source(&format!("{name}.c")))
        .args(String::from_utf8_lossy(&flags.stdout).split_whitespace())
        .output();
    match built {
        Ok(output) if output.status.success() => Some(out),
        Ok(output) => panic!("{}", String::from_utf8_lossy(&output.stderr)),
        Err(error) => {
            eprintln!("SKIPPED: no gcc ({error})");
            None
        }
    }
}

fn with_script(python: &Path, name: &str) -> Command {
    let mut command = Command::new(python);
    command.arg(source(name));
    command
}

fn recipe_and_stop_came(commands: &[PlcCommand]) {
    assert!(commands.contains(&PlcCommand::Recipe(17)), "{commands:?}");
    assert!(commands.contains(&PlcCommand::Stop), "{commands:?}");
}

#[test]
fn pymodbus_polls_us() {
    let Some(python) = python() else { return };
    let commands = run(ModbusRole::Slave, with_script(&python, "pymodbus_client.py"), false);
    assert_eq!(commands, [PlcCommand::Stop, PlcCommand::Recipe(17), PlcCommand::GoldenCheck]);
}

#[test]
fn pymodbus_polls_us_over_a_bad_line() {
    let Some(python) = python() else { return };
    recipe_and_stop_came(&run(ModbusRole::Slave, with_script(&python, "pymodbus_client.py"), true));
}

#[test]
fn we_poll_pymodbus() {
    let Some(python) = python() else { return };
    recipe_and_stop_came(&run(ModbusRole::Master, with_script(&python, "pymodbus_server.py"), false));
}

#[test]
fn we_poll_pymodbus_over_a_bad_line() {
    let Some(python) = python() else { return };
    recipe_and_stop_came(&run(ModbusRole::Master, with_script(&python, "pymodbus_server.py"), true));
}

#[test]
fn libmodbus_polls_us() {
    let folder = tempfile::tempdir().unwrap();
    let Some(program) = compiled("libmodbus_client", folder.path()) else { return };
    let commands = run(ModbusRole::Slave, Command::new(&program), false);
    assert_eq!(commands, [PlcCommand::Stop, PlcCommand::Recipe(17), PlcCommand::GoldenCheck]);
    recipe_and_stop_came(&run(ModbusRole::Slave, Command::new(&program), true));
}

#[test]
fn we_poll_libmodbus() {
    let folder = tempfile::tempdir().unwrap();
    let Some(program) = compiled("libmodbus_server", folder.path()) else { return };
    for noisy in [false, true] {
        recipe_and_stop_came(&run(ModbusRole::Master, Command::new(&program), noisy));
    }
}
