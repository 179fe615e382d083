//! Startup and liveness: whether a running container is to be restarted, as Kubernetes' kubelet decides it.

use std::{sync::Arc, time::Duration};

use pilotlight_proto::fleet::v1::ContainerSpec;
use tokio::sync::watch;

use super::{
    failure::{GPU_ACCESS_LOST, UNHEALTHY},
    gpu_access,
    waiting::Waiting,
};
use crate::runtime::{Running, Runtime, probe::Prober};

/// Why a container is to be restarted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Unhealthy {
    /// [`UNHEALTHY`] or [`GPU_ACCESS_LOST`].
    pub(super) reason: &'static str,
    /// What was found, such as which probe failed, and what was said.
    pub(super) message: String,
    /// Between the polite signal and the kill, where the probe says so.
    pub(super) grace: Option<Duration>,
}

/// The probes by which a container is restarted.
pub(super) struct Health {
    startup: Option<Prober>,
    liveness: Option<Prober>,
}

impl Health {
    pub(super) fn new(container: &ContainerSpec, running: &Running, runtime: &Arc<dyn Runtime>) -> Self {
        let prober = |probe: &Option<_>| Some(Prober::new(Option::clone(probe)?, running, Arc::clone(runtime)));
        Self { startup: prober(&container.startup_probe), liveness: prober(&container.liveness_probe) }
    }

    /// Of one that has started before, and need not show that again.
    pub(super) fn of_started(self) -> Self {
        Self { startup: None, ..self }
    }

    /// As [`Health::fails`], and also resolves when the container has lost access to its GPUs; `adopted` is as in
    /// [`gpu_access::lost`].
    pub(super) async fn fails_or_loses_gpus(
        self,
        started: watch::Sender<bool>,
        waiting: Arc<Waiting>,
        (runtime, running): (Arc<dyn Runtime>, Running),
        adopted: bool,
    ) -> Unhealthy {
        let lost = async {
            if running.container.is_none() {
                return std::future::pending().await;
            }
            let why = gpu_access::lost(adopted, || runtime.gpu_access(&running)).await;
            let message = format!("the container has lost access to its GPUs: {why}");
            Unhealthy { reason: GPU_ACCESS_LOST, message, grace: None }
        };
        tokio::select! {
            unhealthy = self.fails(started, waiting) => unhealthy,
            unhealthy = lost => unhealthy,
        }
    }

    /// Resolves when the container must be restarted; never if no probe asks for that. `started` becomes
    /// true once the startup probe has passed: no other probe runs before. Until then `waiting` reports its failures.
    async fn fails(self, started: watch::Sender<bool>, waiting: Arc<Waiting>) -> Unhealthy {
        let mut begun = Duration::ZERO;
        if let Some(startup) = self.startup {
            let clock = tokio::time::Instant::now();
            tokio::time::sleep(startup.initial_delay()).await;
            let report = |why: &str| waiting.probe_failed(&format!("startup probe {}: {why}", startup.describe()));
            if let Err(unhealthy) = passes(&startup, "startup", Until::Passed, &report).await {
                return unhealthy;
            }
            begun = clock.elapsed();
        }
        started.send_replace(true);
        let Some(liveness) = self.liveness else { return std::future::pending().await };
        // The delay counts from the container's start.
        tokio::time::sleep(liveness.initial_delay().saturating_sub(begun)).await;
        match passes(&liveness, "liveness", Until::Failed, &|_| {}).await {
            Err(unhealthy) => unhealthy,
            Ok(()) => std::future::pending().await,
        }
    }
}

/// How long a probe is asked.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Until {
    /// It has passed once, or failed too often.
    Passed,
    /// It has failed too often.
    Failed,
}

async fn passes(prober: &Prober, what: &str, until: Until, report: &(dyn Fn(&str) + Sync)) -> Result<(), Unhealthy> {
    let mut failures = 0;
    loop {
        match prober.ask().await {
            Ok(()) if until == Until::Passed => return Ok(()),
            Ok(()) => failures = 0,
            Err(why) => {
                failures += 1;
                report(&why);
                if failures >= prober.failure_threshold() {
                    let message = format!("{what} probe failed {failures} times in a row: {why}");
                    let grace = prober.termination_grace_period();
                    return Err(Unhealthy { reason: UNHEALTHY, message, grace });
                }
            }
        }
        // Kubernetes' pace: the eager one is for readiness alone.
        tokio::time::sleep(prober.period(true)).await;
    }
}
