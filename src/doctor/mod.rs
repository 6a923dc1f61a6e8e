//! What this machine is and has: [`serial`] ports, [`machine`] (CPU, memory, disk, groups). Read from sysfs and procfs; opens no device and
//! changes nothing. It knows nothing of models, pictures or the configuration; `cull doctor` puts it beside those.

pub mod machine;
pub mod serial;
