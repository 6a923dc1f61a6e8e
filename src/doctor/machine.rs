//! CPU, memory, disk and permissions of this machine.

use std::path::{Path, PathBuf};

/// CPU model as the kernel names it; the architecture where it does not (many ARM boards).
pub fn cpu_name() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    cpu_name_in(&info).unwrap_or_else(|| std::env::consts::ARCH.to_owned())
}

fn cpu_name_in(info: &str) -> Option<String> {
    let value =
        |key: &str| info.lines().filter_map(|line| line.split_once(':')).find(|(name, _)| name.trim() == key).map(|(_, v)| v.trim());
    value("model name").or_else(|| value("Model")).filter(|name| !name.is_empty()).map(str::to_owned)
}

/// The instruction sets that inspection profits from, each with whether this CPU has it; fastest last.
pub fn cpu_features() -> Vec<(&'static str, bool)> {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::is_x86_feature_detected as has;
        vec![
            ("AVX2", has!("avx2")),
            ("FMA", has!("fma")),
            ("AVX-VNNI", has!("avxvnni")),
            ("AVX-512", has!("avx512f") && has!("avx512bw") && has!("avx512vl")),
            ("AVX-512 VNNI", has!("avx512vnni")),
        ]
    }
    #[cfg(target_arch = "aarch64")]
    {
        use std::arch::is_aarch64_feature_detected as has;
        vec![("NEON", has!("neon")), ("dot product", has!("dotprod")), ("i8mm", has!("i8mm"))]
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    {
        Vec::new()
    }
}

/// Memory in MB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Memory {
    /// Installed.
    pub total_mb: u64,
    /// What programs can still get without swapping.
    pub available_mb: u64,
}

/// Memory of the machine; `None` where the kernel does not say.
pub fn memory() -> Option<Memory> {
    memory_in(&std::fs::read_to_string("/proc/meminfo").ok()?)
}

fn memory_in(info: &str) -> Option<Memory> {
    let mb = |key: &str| {
        let line = info.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
        line.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib / 1024)
    };
    Some(Memory { total_mb: mb("MemTotal")?, available_mb: mb("MemAvailable")? })
}

/// Free disk space for programs without privileges where `path` is or would be made, in MB, with the existing folder that was asked.
///
/// # Errors
/// When the file system does not answer.
pub fn disk_free_mb(path: &Path) -> std::io::Result<(u64, PathBuf)> {
    let absolute = std::path::absolute(path)?;
    let folder = absolute.ancestors().find(|folder| folder.is_dir()).unwrap_or(Path::new("/"));
    let stat = rustix::fs::statvfs(folder)?;
    Ok((stat.f_bavail.saturating_mul(stat.f_frsize) >> 20, folder.to_owned()))
}

/// Whether this process may read and write `path`.
pub fn may_use(path: &Path) -> bool {
    rustix::fs::access(path, rustix::fs::Access::READ_OK | rustix::fs::Access::WRITE_OK).is_ok()
}

/// Whether this process has all rights.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Membership of this process in the group `name`; `None` when the machine has no such group.
pub fn in_group(name: &str) -> Option<bool> {
    let id = group_id(&std::fs::read_to_string("/etc/group").ok()?, name)?;
    let mine = rustix::process::getgroups().unwrap_or_default();
    Some(rustix::process::getegid().as_raw() == id || mine.iter().any(|group| group.as_raw() == id))
}

fn group_id(groups: &str, name: &str) -> Option<u32> {
    groups.lines().map(|line| line.split(':').collect::<Vec<_>>()).find(|fields| fields.first() == Some(&name))?.get(2)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_files_are_read() {
        let info = "processor\t: 0\nmodel name\t: AMD EPYC 9B14\n\nprocessor\t: 1\nmodel name\t: other\n";
        assert_eq!(cpu_name_in(info).as_deref(), Some("AMD EPYC 9B14"));
        assert_eq!(cpu_name_in("processor : 0\nModel : Raspberry Pi 5\n").as_deref(), Some("Raspberry Pi 5"));
        assert_eq!(cpu_name_in("processor : 0\n"), None);
        let meminfo = "MemTotal:       24576000 kB\nMemFree:  1 kB\nMemAvailable:   10240000 kB\n";
        assert_eq!(memory_in(meminfo), Some(Memory { total_mb: 24_000, available_mb: 10_000 }));
        assert_eq!(memory_in("MemTotal: x kB"), None);
        assert_eq!(group_id("root:x:0:\ndialout:x:20:me\n", "dialout"), Some(20));
        assert_eq!(group_id("root:x:0:\n", "dialout"), None);
    }

    #[test]
    fn free_space_is_found_for_folders_that_do_not_exist_yet() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let (_, asked) = disk_free_mb(&folder.path().join("not/yet/made")).expect("the file system answers");
        assert_eq!(asked, folder.path());
    }
}
