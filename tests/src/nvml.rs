//! A stand-in for NVIDIA's `libnvidia-ml.so`, built from `gpu/nvml_stub.c`, whose head says what it can be told.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    process::Command,
    sync::{Mutex, PoisonError},
};

use tempfile::TempDir;

/// Error codes of NVML (`nvmlReturn_t`).
pub mod code {
    /// The caller may not do that.
    pub const NO_PERMISSION: u32 = 4;
    /// The driver is not loaded.
    pub const DRIVER_NOT_LOADED: u32 = 9;
    /// The GPU has fallen off the bus.
    pub const GPU_IS_LOST: u32 = 15;
    /// The GPU must be reset.
    pub const RESET_REQUIRED: u32 = 16;
    /// Something else.
    pub const UNKNOWN: u32 = 999;
}

/// A library of its own, with values that can be changed while it is in use.
#[derive(Debug)]
pub struct NvmlStub {
    directory: TempDir,
    values: Mutex<BTreeMap<String, String>>,
}

impl NvmlStub {
    /// Builds a library that sees no GPUs.
    ///
    /// # Panics
    /// There is no C compiler, or the library cannot be built or written.
    pub fn new() -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/gpu/nvml_stub.c");
        let library = directory.path().join("libnvidia-ml.so");
        let mut compile = Command::new("cc");
        compile.args(["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O1", "-shared", "-fPIC", "-o"]);
        let built = compile.arg(&library).args([source, "-ldl", "-lpthread"]).output().expect("a C compiler");
        assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
        let values = [("driver", "550.54.15"), ("cuda", "12040"), ("gpus", "0")];
        let values = values.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
        let stub = Self { directory, values: Mutex::new(values) };
        stub.write(&stub.lock());
        stub
    }

    /// Builds a library that sees this many idle, healthy H100.
    pub fn with_h100(count: u32) -> Self {
        let stub = Self::new();
        for gpu in 0..count {
            let values = [
                ("uuid", format!("GPU-{gpu}")),
                ("name", "NVIDIA H100 80GB HBM3".to_owned()),
                ("bus", format!("00000000:{:02X}:00.0", 0x18 + gpu)),
                ("capability", "9.0".to_owned()),
                ("memory", (81_559_u64 << 20).to_string()),
                ("used", "0".to_owned()),
                ("temperature", "35".to_owned()),
                ("utilization", "0".to_owned()),
                ("throttle", "1".to_owned()),
                ("ecc", "0".to_owned()),
                ("remap_pending", "0".to_owned()),
                ("remap_failed", "0".to_owned()),
                ("mig", "0".to_owned()),
            ];
            values.iter().for_each(|(name, value)| stub.set(&format!("gpu.{gpu}.{name}"), value));
        }
        stub.set("gpus", count);
        stub
    }

    /// Path of the library.
    pub fn library(&self) -> PathBuf {
        self.directory.path().join("libnvidia-ml.so")
    }

    /// Sets a value; the next call of the library sees it.
    pub fn set(&self, key: &str, value: impl ToString) {
        let mut values = self.lock();
        values.insert(key.to_owned(), value.to_string());
        self.write(&values);
    }

    /// Removes a value: it is not supported from now on, or does not fail any more.
    pub fn remove(&self, key: &str) {
        let mut values = self.lock();
        values.remove(key);
        self.write(&values);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, String>> {
        self.values.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Replaces the file as a whole, so that the library never reads half of it.
    fn write(&self, values: &BTreeMap<String, String>) {
        let text: String = values.iter().map(|(key, value)| format!("{key}={value}\n")).collect();
        let path = self.directory.path().join("libnvidia-ml.so.conf");
        let next = path.with_extension("next");
        std::fs::write(&next, text).and_then(|()| std::fs::rename(&next, &path)).expect("can be written");
    }
}

impl Default for NvmlStub {
    fn default() -> Self {
        Self::new()
    }
}
