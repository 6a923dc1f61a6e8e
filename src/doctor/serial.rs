//! Serial ports with what they are, from sysfs: no libudev, and no port is opened (opening one toggles DTR, which resets some boards).

use std::path::{Path, PathBuf};

/// A serial port.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct SerialPort {
    /// Device node, for example `/dev/ttyUSB0`.
    pub path: PathBuf,
    /// Stable name under `/dev/serial/by-id/`, if udev made one.
    pub by_id: Option<PathBuf>,
    /// Kernel driver, for example `ftdi_sio`, `cdc_acm`, `serial8250`.
    pub driver: Option<String>,
    /// The USB device behind it.
    pub usb: Option<UsbDevice>,
    /// How long an FTDI chip waits before it hands on a byte, in ms; 16 from power-up, 1 is what a line needs.
    pub latency_ms: Option<u32>,
}

/// What a USB device says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct UsbDevice {
    /// Vendor, hexadecimal.
    pub vid: String,
    /// Product, hexadecimal.
    pub pid: String,
    /// Maker's name.
    pub manufacturer: Option<String>,
    /// Product's name.
    pub product: Option<String>,
    /// Serial number.
    pub serial: Option<String>,
}

/// All serial ports that have hardware behind them, in name order. Empty where sysfs is missing.
pub fn list() -> Vec<SerialPort> {
    list_in(Path::new("/sys"), Path::new("/dev"))
}

/// As [`list`], with other roots, for tests.
pub fn list_in(sys: &Path, dev: &Path) -> Vec<SerialPort> {
    let Ok(entries) = std::fs::read_dir(sys.join("class/tty")) else { return Vec::new() };
    let by_id: Vec<(PathBuf, PathBuf)> = std::fs::read_dir(dev.join("serial/by-id"))
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|link| Some((std::fs::canonicalize(link.path()).ok()?, link.path())))
        .collect();
    let mut ports: Vec<SerialPort> = entries.flatten().filter_map(|entry| describe(&entry.path(), dev, &by_id)).collect();
    // ttyUSB2 before ttyUSB10.
    ports.sort_by_key(|port| {
        let name = port.path.to_string_lossy().into_owned();
        let digits = name.len() - name.trim_end_matches(|c: char| c.is_ascii_digit()).len();
        let (stem, number) = name.split_at(name.len() - digits);
        (stem.to_owned(), number.parse::<u64>().unwrap_or(0))
    });
    ports
}

fn describe(class: &Path, dev: &Path, by_id: &[(PathBuf, PathBuf)]) -> Option<SerialPort> {
    // Virtual consoles and pseudo-terminals have no device behind them.
    let device = std::fs::canonicalize(class.join("device")).ok()?;
    // The 8250 driver makes nodes for ports that the machine may have; type 0 means that none was found.
    if text(&class.join("type")).as_deref() == Some("0") {
        return None;
    }
    // Since Linux 6.6 the serial core's own layers ("port", "ctrl") stand between a port and its driver.
    let mut drivers = device.ancestors().filter_map(|folder| {
        let name = std::fs::read_link(folder.join("driver")).ok()?.file_name()?.to_string_lossy().into_owned();
        (!["port", "ctrl"].contains(&name.as_str())).then_some(name)
    });
    let driver = drivers.next();
    let path = dev.join(class.file_name()?);
    let usb = device.ancestors().find(|folder| folder.join("idVendor").is_file()).map(|folder| UsbDevice {
        vid: text(&folder.join("idVendor")).unwrap_or_default(),
        pid: text(&folder.join("idProduct")).unwrap_or_default(),
        manufacturer: text(&folder.join("manufacturer")),
        product: text(&folder.join("product")),
        serial: text(&folder.join("serial")),
    });
    let real = std::fs::canonicalize(&path).unwrap_or_else(|_| path.clone());
    let latency_ms = text(&device.join("latency_timer")).and_then(|ms| ms.parse().ok());
    let by_id = by_id.iter().find(|(target, _)| *target == real).map(|(_, link)| link.clone());
    Some(SerialPort { path, by_id, driver, usb, latency_ms })
}

/// Longest sysfs attribute taken, in bytes: USB strings end at 126 characters.
const MAX_ATTRIBUTE_BYTES: usize = 512;

/// A sysfs attribute without its line end and without control characters (names come from devices); `None` when it is missing or empty.
fn text(path: &Path) -> Option<String> {
    let bytes = std::fs::read(path).ok()?;
    let text: String =
        String::from_utf8_lossy(bytes.get(..MAX_ATTRIBUTE_BYTES.min(bytes.len()))?).chars().filter(|c| !c.is_control()).collect();
    let text = text.trim();
    (!text.is_empty()).then(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn write(path: &Path, text: &str) {
        std::fs::create_dir_all(path.parent().expect("a folder")).expect("writable");
        std::fs::write(path, text).expect("writable");
    }

    /// A port `name` whose device is `devices/<device>`.
    fn port(root: &Path, name: &str, device: &str, driver: &str) -> PathBuf {
        let device = root.join("sys/devices").join(device);
        std::fs::create_dir_all(&device).expect("writable");
        std::fs::create_dir_all(root.join("sys/bus/drivers").join(driver)).expect("writable");
        symlink(root.join("sys/bus/drivers").join(driver), device.join("driver")).expect("writable");
        let class = root.join("sys/class/tty").join(name);
        std::fs::create_dir_all(&class).expect("writable");
        symlink(&device, class.join("device")).expect("writable");
        write(&root.join("dev").join(name), "");
        device
    }

    #[test]
    fn ports_are_told_apart_by_what_is_behind_them() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let root = std::fs::canonicalize(folder.path()).expect("exists");
        for name in ["ttyUSB10", "ttyUSB2"] {
            let device = port(&root, name, &format!("pci0/usb1/1-1-{name}/1-1:1.0/{name}"), "ftdi_sio");
            write(&device.join("latency_timer"), "16\n");
            let usb = device.parent().and_then(Path::parent).expect("two above");
            write(&usb.join("idVendor"), "0403\n");
            write(&usb.join("idProduct"), "6001\n");
            write(&usb.join("product"), "FT232R\u{1b}[31m USB UART\n");
            write(&usb.join("serial"), "\n");
        }
        std::fs::create_dir_all(root.join("dev/serial/by-id")).expect("writable");
        symlink("../../ttyUSB2", root.join("dev/serial/by-id/usb-FTDI-port0")).expect("writable");
        let device = port(&root, "ttyS0", "pnp0/00:00/00:00:0/00:00:0.0", "port");
        symlink(root.join("sys/bus/drivers/serial"), device.parent().and_then(Path::parent).expect("two above").join("driver"))
            .expect("writable");
        write(&root.join("sys/class/tty/ttyS0/type"), "4\n");
        port(&root, "ttyS1", "pnp0/00:01", "serial8250");
        write(&root.join("sys/class/tty/ttyS1/type"), "0\n");
        std::fs::create_dir_all(root.join("sys/class/tty/tty1")).expect("writable");

        let ports = list_in(&root.join("sys"), &root.join("dev"));
        let names: Vec<_> = ports.iter().map(|p| p.path.file_name().expect("named").to_string_lossy().into_owned()).collect();
        assert_eq!(names, ["ttyS0", "ttyUSB2", "ttyUSB10"]);
        assert_eq!(ports[0].driver.as_deref(), Some("serial"));
        assert_eq!((&ports[0].usb, &ports[0].by_id, ports[0].latency_ms), (&None, &None, None));
        let usb = ports[1].usb.as_ref().expect("a USB port");
        assert_eq!((usb.vid.as_str(), usb.pid.as_str()), ("0403", "6001"));
        assert_eq!(usb.product.as_deref(), Some("FT232R[31m USB UART"), "no control characters reach the terminal");
        assert_eq!(usb.serial, None);
        assert_eq!(ports[1].by_id, Some(root.join("dev/serial/by-id/usb-FTDI-port0")));
        assert_eq!((ports[2].by_id.as_ref(), ports[2].latency_ms), (None, Some(16)));
    }

    #[test]
    fn a_machine_without_sysfs_has_no_ports() {
        assert_eq!(list_in(Path::new("/nonexistent"), Path::new("/nonexistent")), []);
    }
}
