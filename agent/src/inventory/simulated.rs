//! GPUs that are not there, for trying things out; always reported as simulated.

use std::path::Path;

use pilotlight_proto::fleet::v1 as fleet;
use serde::Deserialize;

use super::{Gpus, InventoryError};

const GPUS_MOST: u32 = 64;

/// `count` GPUs of one product.
pub(super) fn of(count: u32, product: &str, memory_bytes: u64) -> Result<Gpus, InventoryError> {
    if count > GPUS_MOST {
        let (field, value) = ("simulate-gpus", count.to_string());
        return Err(InventoryError::Value { field, value, expected: "0 to 64" });
    }
    let gpus = (0..count).map(|index| gpu(index, product.to_owned(), memory_bytes, String::from("8.6"), 0));
    Ok(Gpus { gpus: gpus.collect(), simulated: true, ..Default::default() })
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
    let listed = (0..).zip(file.gpus).map(|(index, listed)| {
        gpu(index, listed.product, listed.memory_bytes, listed.compute_capability, listed.nvlink_group)
    });
    Ok(Gpus {
        gpus: listed.collect(),
        simulated: true,
        driver_version: file.driver_version,
        cuda_version: file.cuda_version,
    })
}

fn gpu(index: u32, product: String, memory_bytes: u64, compute_capability: String, nvlink_group: u32) -> fleet::Gpu {
    fleet::Gpu {
        index,
        uuid: format!("SIM-{index:08x}"),
        product,
        memory_bytes,
        compute_capability,
        nvlink_group,
        ..Default::default()
    }
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
    fn mistakes_are_named_with_their_place() {
        let error = written("gpus:\n- {product: A, memory: 1}\n").unwrap_err();
        assert!(error.contains("memory") && error.contains("line 2"), "{error}");
        assert!(of(65, "A40", 1).unwrap_err().to_string().contains("0 to 64"));
    }
}
