//! The health of this node's GPUs: read from the driver, reported to the coordinator, and shown as metrics.
//!
//! NVML's calls block, and some block for long on a GPU that is broken. So one thread reads all GPUs every few seconds
//! ([`sample`]), and one thread per GPU waits for its XIDs ([`xids`]). What is made of the readings is pure ([`tracker`]).
//! Which processes belong to replicas is found in `/proc` ([`owners`]). Whether a GPU is to be quarantined is the
//! coordinator's decision.

mod metrics;
mod owners;
mod sample;
#[cfg(test)]
mod tests;
mod tracker;
mod xids;

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{self, RecvTimeoutError},
    },
    time::{Duration, Instant},
};

use nvml_wrapper::Nvml;
use pilotlight_proto::fleet::v1::{Gpu, GpuReport, ReplicaStatuses};
use tokio::sync::watch;
use tracing::error;

pub use metrics::GpuMetrics;
use tracker::Tracker;

/// Time between two readings of all GPUs.
pub const SAMPLE_INTERVAL: Duration = Duration::from_secs(5);
/// Time after which measured values, such as temperatures, are reported although nothing else has changed.
const REFRESH_INTERVAL: Duration = Duration::from_secs(30);

/// What a [`GpuMonitor`] is started with.
#[derive(Debug)]
pub struct MonitorSettings {
    /// The driver's library; `None` is the system's.
    pub library: Option<PathBuf>,
    /// The GPUs to read, as in the inventory.
    pub gpus: Vec<Gpu>,
    /// Time between two readings.
    pub interval: Duration,
}

/// Reads the GPUs until it is dropped. Its threads end within the time of one reading.
#[derive(Debug)]
pub struct GpuMonitor {
    stopping: Arc<AtomicBool>,
}

impl GpuMonitor {
    /// Starts the threads. Reports go to `reports`; replicas are told apart from other processes by `replicas`.
    ///
    /// # Errors
    /// A thread cannot be started.
    pub fn start(
        settings: MonitorSettings,
        replicas: watch::Receiver<ReplicaStatuses>,
        metrics: GpuMetrics,
        reports: watch::Sender<Option<GpuReport>>,
    ) -> std::io::Result<Self> {
        let stopping: Arc<AtomicBool> = Arc::default();
        let stops = Arc::clone(&stopping);
        let run = move || {
            let mut monitor = Sampler {
                tracker: Tracker::new(&settings.gpus),
                settings,
                replicas,
                metrics,
                reports,
                stopping: stops,
                published_at: None,
            };
            monitor.run();
        };
        std::thread::Builder::new().name("gpu-health".to_owned()).spawn(run)?;
        Ok(Self { stopping })
    }
}

impl Drop for GpuMonitor {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::Relaxed);
    }
}

/// The thread that reads all GPUs.
struct Sampler {
    settings: MonitorSettings,
    tracker: Tracker,
    replicas: watch::Receiver<ReplicaStatuses>,
    metrics: GpuMetrics,
    reports: watch::Sender<Option<GpuReport>>,
    stopping: Arc<AtomicBool>,
    published_at: Option<Instant>,
}

impl Sampler {
    fn run(&mut self) {
        let (events, occurred) = mpsc::channel();
        let mut driver: Option<Arc<Nvml>> = None;
        let mut waits_for_xids = false;
        while !self.stopping.load(Ordering::Relaxed) {
            if driver.is_none() {
                driver = self.open();
            }
            if let Some(nvml) = &driver {
                if !std::mem::replace(&mut waits_for_xids, true) {
                    xids::watch_all(nvml, &self.settings.gpus, &events, &self.stopping);
                }
                if let Err(error) = self.sample(nvml) {
                    self.publish_error(error);
                    driver = None;
                }
            }
            match occurred.recv_timeout(self.settings.interval) {
                Ok(event) => {
                    self.tracker.record_xid(&event);
                    occurred.try_iter().for_each(|event| self.tracker.record_xid(&event));
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn open(&mut self) -> Option<Arc<Nvml>> {
        match crate::inventory::open_driver(self.settings.library.as_deref()) {
            Ok(nvml) => Some(Arc::new(nvml)),
            Err(error) => {
                self.publish_error(format!("the NVIDIA driver does not answer: {error}"));
                None
            }
        }
    }

    /// Reads all GPUs once.
    fn sample(&mut self, nvml: &Nvml) -> Result<(), String> {
        // First, so that a driver that is gone is noticed before each GPU counts as lost.
        let count = nvml.device_count().map_err(|error| format!("the NVIDIA driver does not answer: {error}"))?;
        let known = self.settings.gpus.len();
        let error = match usize::try_from(count) {
            Ok(count) if count > known => {
                format!("only {known} of {count} GPUs could be read when the agent started; its log says why")
            }
            _ => String::new(),
        };
        let readings: Vec<_> = self.settings.gpus.iter().map(|gpu| sample::read(nvml, gpu)).collect();
        // After the readings, so that a replica that starts meanwhile is known.
        let replicas: BTreeMap<u32, String> = {
            let statuses = self.replicas.borrow();
            let running = statuses.replicas.iter().filter(|status| status.pid != 0);
            running.map(|status| (status.pid, status.replica.clone())).collect()
        };
        let own_cgroup = owners::facts(std::process::id()).map(|facts| facts.cgroup).unwrap_or_default();
        let find_owner = |pid| owners::owner(pid, &replicas, &own_cgroup, &owners::facts);
        let name_of = |pid| owners::facts(pid).map(|facts| facts.name).unwrap_or_default();
        let report = self.tracker.update(readings, &find_owner, &name_of);
        self.metrics.set(&report);
        self.publish(GpuReport { error, ..report });
        Ok(())
    }

    fn publish_error(&mut self, error: String) {
        let last = self.reports.borrow().clone().unwrap_or_default();
        if last.error != error {
            error!(%error, "the health of GPUs cannot be read");
        }
        self.publish(GpuReport { error, ..last });
    }

    /// Sends the report unless only measured values have changed, and not long ago.
    fn publish(&mut self, report: GpuReport) {
        let fresh = self.published_at.is_some_and(|at| at.elapsed() < REFRESH_INTERVAL);
        let same = self.reports.borrow().as_ref().is_some_and(|last| tracker::is_alike(last, &report));
        if fresh && same {
            return;
        }
        self.published_at = Some(Instant::now());
        self.reports.send_replace(Some(report));
    }
}
