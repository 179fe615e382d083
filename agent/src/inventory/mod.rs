//! What the node has: GPUs by NVML, or a simulated set.

mod labels;
mod nvml;
mod simulated;
#[cfg(test)]
mod tests;

use std::path::PathBuf;

use pilotlight_proto::fleet::v1 as fleet;
use tracing::{info, warn};

use crate::config::{Config, InventorySource};
pub use nvml::{MAX_NVLINKS, open_driver};

/// GPUs of a node, and the driver that runs them.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Gpus {
    /// In order of index.
    pub gpus: Vec<fleet::Gpu>,
    /// True where they are made up.
    pub simulated: bool,
    /// NVIDIA driver version, empty where there is none.
    pub driver_version: String,
    /// CUDA version the driver supports, major.minor, empty where there is none.
    pub cuda_version: String,
    /// Name of the machine's type, empty where unknown.
    pub machine: String,
}

/// Why the inventory cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum InventoryError {
    /// The file cannot be read.
    #[error("simulate-gpus-file: {path}: {error}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// The file is not what it should be.
    #[error("simulate-gpus-file: {path}: {error}")]
    Format {
        /// Which.
        path: PathBuf,
        /// Why, with the place.
        error: serde_norway::Error,
    },
    /// A value is out of range.
    #[error("{field}: {value}: expected {expected}")]
    Value {
        /// Which.
        field: &'static str,
        /// Its value.
        value: String,
        /// What is allowed.
        expected: &'static str,
    },
}

/// What the node has, by its configuration.
///
/// # Errors
/// A simulated set is asked for that cannot be.
pub fn discover(config: &Config) -> Result<fleet::Inventory, InventoryError> {
    let gpus = match &config.inventory {
        InventorySource::Nvml => nvml::discover(config.nvml_library.as_deref()).unwrap_or_default(),
        InventorySource::NvmlOrSimulated => match nvml::discover(config.nvml_library.as_deref()) {
            Some(gpus) => gpus,
            None => simulated::of(2, "NVIDIA A40", 48 << 30, &[])?,
        },
        InventorySource::Simulated { count, product, memory_bytes, mig_profiles } => {
            simulated::of(*count, product, *memory_bytes, mig_profiles)?
        }
        InventorySource::SimulatedFile(path) => simulated::read(path)?,
    };
    if gpus.simulated {
        warn!(gpus = gpus.gpus.len(), "GPUs are SIMULATED: placement is real, the GPUs are not");
    } else {
        info!(gpus = gpus.gpus.len(), driver = %gpus.driver_version, "GPUs found");
    }
    let mut labels = labels::of(&gpus, &config.node_name);
    labels.extend(config.labels.clone());
    Ok(fleet::Inventory {
        labels: labels.into_iter().collect(),
        cpu_cores: std::thread::available_parallelism().map_or(1, |cores| cores.get() as u32),
        memory_bytes: memory_bytes(),
        simulated: gpus.simulated,
        driver_version: gpus.driver_version,
        cuda_version: gpus.cuda_version,
        runtimes: vec!["process".to_owned()],
        gpus: gpus.gpus,
        warm_memory_bytes: config.warm_memory.unwrap_or_else(|| memory_bytes() / 2),
        cache_budget_bytes: config.cache_budget.unwrap_or(0),
    })
}

/// Main memory, 0 where it cannot be read.
fn memory_bytes() -> u64 {
    use procfs::Current as _;
    procfs::Meminfo::current().map_or(0, |memory| memory.mem_total)
}
