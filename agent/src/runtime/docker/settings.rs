//! What an operator says of the engine.

use std::{collections::BTreeMap, path::PathBuf};

/// How GPUs are asked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum GpuMode {
    /// A device request for the driver `nvidia`, as `docker run --gpus` makes it.
    #[default]
    DeviceRequest,
    /// Names of the Container Device Interface, `nvidia.com/gpu=<uuid>`.
    Cdi,
}

/// Settings of the Docker runtime.
#[derive(Debug, Clone)]
pub struct DockerSettings {
    /// Unix socket of the engine, `unix://` before it or not.
    pub socket: String,
    /// Network of the engine that containers are in.
    pub network: String,
    /// How GPUs are asked for.
    pub gpu_mode: GpuMode,
    /// `hostPath` volumes must be below one of these.
    pub host_path_roots: Vec<PathBuf>,
    /// Directory by name of a claim, or by `<namespace>/<name>`.
    pub claims: BTreeMap<String, PathBuf>,
    /// File with the node's own credentials for registries, as `docker login` writes it.
    pub registry_config: Option<PathBuf>,
    /// UUIDs of the node's GPUs by index; empty where they are made up, and then none is asked for.
    pub gpus: BTreeMap<u32, String>,
}

impl Default for DockerSettings {
    fn default() -> Self {
        Self {
            socket: "/var/run/docker.sock".into(),
            network: "bridge".into(),
            gpu_mode: GpuMode::default(),
            host_path_roots: Vec::new(),
            claims: BTreeMap::new(),
            registry_config: None,
            gpus: BTreeMap::new(),
        }
    }
}
