//! A replica whose task has panicked: it fails, and can still be deleted.

use std::{
    any::Any,
    panic::AssertUnwindSafe,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures::FutureExt as _;
use pilotlight_proto::fleet::v1::ReplicaPhase;
use tokio::sync::watch;
use tracing::error;

use super::{
    Statuses,
    replica::{Desired, left},
};
use crate::{
    endpoint::Endpoints,
    runtime::{Running, Runtime},
};

/// Reason of a replica whose task has panicked.
const INTERNAL_ERROR: &str = "InternalError";
/// Between the polite signal and the kill.
const GRACE: Duration = Duration::from_secs(30);

/// What is needed to end a replica without its task.
pub(super) struct Orphan {
    pub(super) name: String,
    pub(super) runtime: Arc<dyn Runtime>,
    pub(super) endpoints: Arc<dyn Endpoints>,
    pub(super) statuses: Statuses,
    pub(super) desired: watch::Receiver<Desired>,
    /// What the task has started last.
    pub(super) running: Arc<Mutex<Option<Running>>>,
}

impl Orphan {
    /// Runs the replica's task to its end. If it panics, ends what it has started and reports that the replica has
    /// failed; without this, the replica would stay as it was last reported, even after its deletion.
    pub(super) async fn supervise(mut self, task: impl Future<Output = ()>) {
        let Err(panic) = AssertUnwindSafe(task).catch_unwind().await else { return };
        let message = format!("internal error of the agent, whose log says more: {}", text(&*panic));
        error!(replica = %self.name, message, "the task of a replica has panicked");
        self.endpoints.remove(&self.name);
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(running) = running {
            self.runtime.stop(&running, GRACE).await;
        }
        self.statuses.update(&self.name, |status| {
            status.set_phase(ReplicaPhase::Failed);
            status.reason = INTERNAL_ERROR.to_owned();
            status.message = message;
            status.pid = 0;
            status.holds_gpu_memory = false;
            status.restarts += 1;
        });
        left(&mut self.desired).await;
        self.runtime.remove(&self.name).await;
        self.statuses.update(&self.name, |status| status.set_phase(ReplicaPhase::Stopped));
    }
}

/// What a panic says.
fn text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a panic without a message")
}
