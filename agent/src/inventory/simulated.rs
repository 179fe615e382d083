//! GPUs that are not there, for trying things out; always reported as simulated.

use std::path::Path;

use pilotlight_proto::fleet::v1 as fleet;
use serde::Deserialize;

use super::{Gpus, InventoryError};

const GPUS_MOST: u32 = 64;
/// Products that MIG can divide.
const MIG_CAPABLE: [&str; 6] = ["A100", "A30", "H100", "H200", "GH200", "B200"];

/// `count` GPUs of one product, each divided into these MIG profiles.
pub(super) fn of(count: u32, product: &str, memory_bytes: u64, mig: &[String]) -> Result<Gpus, InventoryError> {
    if count > GPUS_MOST {
        let (field, value) = ("simulate-gpus", count.to_string());
        return Err(InventoryError::Value { field, value, expected: "0 to 64" });
    }
    let gpu = |index| {
        let listed = Listed {
            product: product.to_owned(),
            memory_bytes,
            compute_capability: capability(product).to_owned(),
            nvlink_group: 0,
            mig_devices: mig.to_vec(),
        };
        listed.gpu(index, "simulate-gpu-mig")
    };
    let gpus = (0..count).map(gpu).collect::<Result<_, _>>()?;
    Ok(Gpus { gpus, simulated: true, ..Default::default() })
}

/// The GPUs that a YAML file lists.
pub(super) fn read(path: &Path) -> Result<Gpus, InventoryError> {
    let text = std::fs::read_to_string(path).map_err(|error| InventoryError::File { path: path.to_owned(), error })?;
    let file: File =
        serde_norway::from_str(&text).map_err(|error| InventoryError::Format { path: path.to_owned(), error })?;
    if file.gpus.len() > GPUS_MOST as usize {
        let value = file.gpus.len().to_string();
        return Err(InventoryError::Value { field: "gpus", value, expected: "at most 64 entries" });
    }
    let gpus = (0..).zip(file.gpus).map(|(index, listed)| listed.gpu(index, "gpus[].migDevices"));
    Ok(Gpus {
        gpus: gpus.collect::<Result<_, _>>()?,
        simulated: true,
        driver_version: file.driver_version,
        cuda_version: file.cuda_version,
        machine: String::new(),
    })
}

impl Listed {
    fn gpu(self, index: u32, field: &'static str) -> Result<fleet::Gpu, InventoryError> {
        let devices = (0..).zip(&self.mig_devices).map(|(at, profile)| mig_device(index, at, profile, field));
        let mig_devices = devices.collect::<Result<Vec<_>, _>>()?;
        Ok(fleet::Gpu {
            index,
            uuid: format!("SIM-{index:08x}"),
            mig_enabled: !mig_devices.is_empty(),
            mig_capable: MIG_CAPABLE.iter().any(|model| self.product.contains(model)) || !mig_devices.is_empty(),
            mig_devices,
            product: self.product,
            memory_bytes: self.memory_bytes,
            compute_capability: self.compute_capability,
            nvlink_group: self.nvlink_group,
            ..Default::default()
        })
    }
}

/// A part of a GPU; its memory is what its profile's name says.
fn mig_device(gpu: u32, at: u32, profile: &str, field: &'static str) -> Result<fleet::MigDevice, InventoryError> {
    let mut words = profile.split('.');
    let (slices, memory) = (words.next(), words.next());
    let number = |word: Option<&str>, unit| word?.strip_suffix(unit)?.parse::<u64>().ok();
    let (Some(_), Some(gigabytes)) = (number(slices, "g"), number(memory, "gb").filter(|n| *n < 10_000)) else {
        let value = profile.to_owned();
        return Err(InventoryError::Value { field, value, expected: "MIG profiles such as 1g.10gb" });
    };
    let uuid = format!("MIG-SIM-{gpu:08x}-{at}");
    Ok(fleet::MigDevice { uuid, profile: profile.to_owned(), memory_bytes: gigabytes << 30 })
}

/// Compute capability of the products that are pretended most; empty where unknown.
fn capability(product: &str) -> &'static str {
    const KNOWN: [(&str, &str); 15] = [
        ("B200", "10.0"),
        ("H200", "9.0"),
        ("H100", "9.0"),
        ("L40", "8.9"),
        ("L4", "8.9"),
        ("Ada", "8.9"),
        ("A100", "8.0"),
        ("A30", "8.0"),
        ("A40", "8.6"),
        ("A10", "8.6"),
        ("RTX A", "8.6"),
        ("Quadro RTX", "7.5"),
        ("T4", "7.5"),
        ("V100", "7.0"),
        ("P100", "6.0"),
    ];
    KNOWN.iter().find(|(model, _)| product.contains(model)).map_or("", |(_, capability)| capability)
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct File {
    gpus: Vec<Listed>,
    #[serde(default)]
    driver_version: String,
    #[serde(default)]
    cuda_version: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Listed {
    product: String,
    memory_bytes: u64,
    #[serde(default)]
    compute_capability: String,
    #[serde(default)]
    nvlink_group: u32,
    /// Profiles that it is divided into.
    #[serde(default)]
    mig_devices: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(text: &str) -> Result<Gpus, String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        read(file.path()).map_err(|error| error.to_string())
    }

    #[test]
    fn a_file_lists_gpus() {
        let gpus = written(
            "gpus:\n- {product: NVIDIA A40, memoryBytes: 1024, nvlinkGroup: 1}\n- {product: T4, memoryBytes: 2}\n",
        );
        let gpus = gpus.unwrap();
        assert!(gpus.simulated);
        assert_eq!(gpus.gpus[0].product, "NVIDIA A40");
        assert_eq!((gpus.gpus[1].index, gpus.gpus[1].memory_bytes), (1, 2));
    }

    #[test]
    fn pretended_gpus_are_divided_and_known() {
        let gpus = of(2, "NVIDIA H100 80GB HBM3", 80 << 30, &["1g.10gb".into(), "3g.40gb".into()]).unwrap().gpus;
        assert!(gpus[1].mig_enabled && gpus[1].mig_capable);
        assert_eq!(gpus[1].compute_capability, "9.0");
        assert_eq!(
            (gpus[1].mig_devices[1].profile.as_str(), gpus[1].mig_devices[1].memory_bytes),
            ("3g.40gb", 40 << 30)
        );
        assert_ne!(gpus[0].mig_devices[0].uuid, gpus[1].mig_devices[0].uuid);
        let whole = of(1, "NVIDIA A40", 48 << 30, &[]).unwrap().gpus;
        assert!(!whole[0].mig_enabled && !whole[0].mig_capable);
    }

    #[test]
    fn mistakes_are_named_with_their_place() {
        let error = written("gpus:\n- {product: A, memory: 1}\n").unwrap_err();
        assert!(error.contains("memory") && error.contains("line 2"), "{error}");
        let error = written("gpus:\n- {product: A100, memoryBytes: 1, migDevices: [half]}\n").unwrap_err();
        assert_eq!(error, "gpus[].migDevices: half: expected MIG profiles such as 1g.10gb");
        assert!(of(65, "A40", 1, &[]).unwrap_err().to_string().contains("0 to 64"));
    }
}
