//! GPUs as the NVIDIA driver sees them.

use std::{collections::BTreeMap, path::Path};

use nvml_wrapper::{Device, Nvml, cuda_driver_version_major, cuda_driver_version_minor, error::NvmlError};
use pilotlight_proto::fleet::v1 as fleet;
use tracing::{debug, warn};

use super::Gpus;

/// Most NVLinks that one GPU has.
pub const MAX_NVLINKS: u32 = 18;

/// Where GPU feature discovery reads the type of the machine, too.
const MACHINE: &str = "/sys/class/dmi/id/product_name";

/// Loads the driver's library; `library` is its path, `None` the system's.
///
/// # Errors
/// There is no such library, or the driver does not answer.
pub fn open_driver(library: Option<&Path>) -> Result<Nvml, NvmlError> {
    match library {
        Some(path) => Nvml::builder().lib_path(path.as_os_str()).init(),
        None => Nvml::init(),
    }
}

/// The driver's GPUs; `None` if there is no driver.
pub(super) fn discover(library: Option<&Path>) -> Option<Gpus> {
    let nvml = match open_driver(library) {
        Ok(nvml) => nvml,
        Err(error) => {
            debug!(%error, "no NVIDIA driver");
            return None;
        }
    };
    let cuda = nvml.sys_cuda_driver_version().unwrap_or(0);
    let mut found = Gpus {
        gpus: Vec::new(),
        simulated: false,
        driver_version: nvml.sys_driver_version().unwrap_or_default(),
        cuda_version: format!("{}.{}", cuda_driver_version_major(cuda), cuda_driver_version_minor(cuda)),
        machine: std::fs::read_to_string(MACHINE).map(|name| name.trim().to_owned()).unwrap_or_default(),
    };
    let mut links = BTreeMap::new();
    for index in 0..nvml.device_count().unwrap_or(0) {
        match nvml.device_by_index(index).and_then(|device| Ok((gpu(&device, index)?, neighbours(&device)))) {
            Ok((gpu, neighbours)) => {
                links.insert(gpu.pci_bus_id.clone(), neighbours);
                found.gpus.push(gpu);
            }
            // One broken GPU must not hide the others.
            Err(error) => warn!(index, %error, "GPU left out"),
        }
    }
    join(&mut found.gpus, &links);
    Some(found)
}

fn gpu(device: &Device<'_>, index: u32) -> Result<fleet::Gpu, NvmlError> {
    let memory = device.memory_info()?;
    let capability = device.cuda_compute_capability()?;
    // GPUs that cannot be divided say so by an error.
    let mig = device.mig_mode().ok();
    let mig_enabled = mig.as_ref().is_some_and(|mode| mode.current != 0);
    Ok(fleet::Gpu {
        index,
        uuid: device.uuid()?,
        product: device.name()?,
        memory_bytes: memory.total,
        memory_used_bytes: memory.used,
        compute_capability: format!("{}.{}", capability.major, capability.minor),
        nvlink_group: 0,
        pci_bus_id: device.pci_info()?.bus_id,
        mig_enabled,
        mig_devices: if mig_enabled { mig_devices(device) } else { Vec::new() },
        mig_capable: mig.is_some(),
    })
}

/// The parts of a GPU in MIG mode. Slots that hold none answer with an error.
fn mig_devices(device: &Device<'_>) -> Vec<fleet::MigDevice> {
    let slots = 0..device.mig_device_count().unwrap_or(0);
    let parts = slots.filter_map(|slot| device.mig_device_by_index(slot).ok());
    parts
        .filter_map(|part| {
            let (uuid, name) = (part.uuid().ok()?, part.name().ok()?);
            let memory_bytes = part.memory_info().map_or(0, |memory| memory.total);
            Some(fleet::MigDevice { uuid, profile: profile(&name)?, memory_bytes })
        })
        .collect()
}

/// The profile in a MIG device's name: `NVIDIA A100-SXM4-80GB MIG 1g.10gb` has `1g.10gb`. A resource may
/// not have a plus in its name, so that the device plugin calls `1g.10gb+me` `1g.10gb.me`, and so do we.
fn profile(name: &str) -> Option<String> {
    let (_, profile) = name.rsplit_once("MIG ")?;
    (!profile.is_empty()).then(|| profile.trim().replace('+', "."))
}

/// Bus ids at the other ends of a GPU's active NVLinks: GPUs or NVSwitches.
fn neighbours(device: &Device<'_>) -> Vec<String> {
    (0..MAX_NVLINKS)
        .map(|link| device.link_wrapper_for(link))
        .filter(|link| link.is_active().unwrap_or(false))
        .filter_map(|link| link.remote_pci_info().ok())
        .map(|pci| pci.bus_id)
        .collect()
}

/// Numbers the groups of GPUs that reach each other, over NVSwitches too; single GPUs have none.
fn join(gpus: &mut [fleet::Gpu], links: &BTreeMap<String, Vec<String>>) {
    let mut next = 1;
    for start in 0..gpus.len() {
        if gpus[start].nvlink_group != 0 {
            continue;
        }
        let mut reached = vec![gpus[start].pci_bus_id.clone()];
        let mut at = 0;
        while at < reached.len() {
            let here = reached[at].clone();
            let there = links.get(&here).cloned().unwrap_or_default();
            // A switch has no list of its own: whoever points to it is behind it.
            let behind = links.iter().filter(|(_, ends)| ends.contains(&here)).map(|(gpu, _)| gpu.clone());
            for end in there.into_iter().chain(behind) {
                if !reached.contains(&end) {
                    reached.push(end);
                }
            }
            at += 1;
        }
        let group: Vec<&mut fleet::Gpu> = gpus.iter_mut().filter(|gpu| reached.contains(&gpu.pci_bus_id)).collect();
        if group.len() > 1 {
            for gpu in group {
                gpu.nvlink_group = next;
            }
            next += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gpus_behind_one_switch_or_bridge_form_a_group() {
        let gpu = |bus: &str| fleet::Gpu { pci_bus_id: bus.into(), ..Default::default() };
        let mut gpus = ["a", "b", "c", "d", "e"].map(gpu);
        let links = [("a", vec!["switch"]), ("b", vec!["switch"]), ("c", vec!["d"]), ("d", vec!["c"]), ("e", vec![])];
        let links = links.map(|(bus, ends)| (bus.to_owned(), ends.into_iter().map(str::to_owned).collect())).into();
        join(&mut gpus, &links);
        assert_eq!(gpus.map(|gpu| gpu.nvlink_group), [1, 1, 2, 2, 0]);
    }

    #[test]
    fn a_mig_devices_name_ends_in_its_profile() {
        assert_eq!(profile("NVIDIA A100-SXM4-80GB MIG 1g.10gb"), Some("1g.10gb".to_owned()));
        assert_eq!(profile("NVIDIA H100 80GB HBM3 MIG 1g.10gb+me"), Some("1g.10gb.me".to_owned()));
        assert_eq!(profile("NVIDIA A40"), None);
    }

    #[test]
    fn a_machine_without_a_driver_has_no_gpus_and_does_not_fail() {
        // On a GPU host this finds some; it must not panic anywhere.
        assert!(discover(None).is_none_or(|gpus| !gpus.simulated));
    }
}
