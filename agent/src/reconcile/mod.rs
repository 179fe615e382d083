//! Desired assignment against what runs: the next steps.
//!
//! One task per replica ([`replica`]) brings it to where the last assignment wants it. Before the first
//! assignment nothing is stopped: replicas of a former agent process are adopted and go on serving.

mod asleep;
mod awake;
pub(crate) mod backoff;
mod failure;
mod gpu_access;
mod health;
#[cfg(test)]
mod health_tests;
mod history;
mod models;
mod orphan;
mod question;
mod replica;
mod rung;
#[cfg(test)]
mod sleep_tests;
#[cfg(test)]
mod tests;
mod waiting;
mod way_back;

use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use pilotlight_proto::fleet::v1::{Assignment, ReplicaAssignment, ReplicaPhase, ReplicaStatus, ReplicaStatuses};
use tokio::{sync::watch, task::JoinHandle};

pub use history::Histories;

use crate::{
    endpoint::{Egress, Endpoints},
    models::{Models, Shelf},
    runtime::{Runtime, RuntimeError},
};
use orphan::Orphan;
use replica::{Desired, Life};
use way_back::WayBack;

/// Brings this node's replicas to where they shall be.
pub struct Reconciler {
    runtime: Arc<dyn Runtime>,
    endpoints: Arc<dyn Endpoints>,
    egress: Arc<dyn Egress>,
    models: Models,
    shelf: Shelf,
    statuses: Statuses,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    /// Version of the last assignment of this session.
    version: Option<u64>,
    /// True once the first assignment has told what may be left of former replicas.
    swept: bool,
    tasks: HashMap<String, Task>,
}

struct Task {
    desired: watch::Sender<Desired>,
    handle: JoinHandle<()>,
}

/// What is known of each replica, published as a whole on each change. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Statuses(watch::Sender<ReplicaStatuses>, Histories);

impl Statuses {
    fn new() -> Self {
        Self(watch::Sender::new(ReplicaStatuses::default()), Histories::default())
    }

    /// Changes one replica's status, made where there is none.
    fn update(&self, replica: &str, change: impl FnOnce(&mut ReplicaStatus)) {
        self.0.send_modify(|all| {
            let at = match all.replicas.binary_search_by(|status| status.replica.as_str().cmp(replica)) {
                Ok(at) => at,
                Err(at) => {
                    all.replicas.insert(at, ReplicaStatus { replica: replica.to_owned(), ..Default::default() });
                    at
                }
            };
            change(&mut all.replicas[at]);
            // Before the statuses are published, so that who reads a status finds it in the history.
            self.1.record(&all.replicas[at]);
        });
    }

    fn remove(&self, replica: &str) {
        self.1.end(replica);
        self.0.send_modify(|all| all.replicas.retain(|status| status.replica != replica));
    }

    fn phase(&self, replica: &str) -> ReplicaPhase {
        let all = self.0.borrow();
        let status = all.replicas.iter().find(|status| status.replica == replica);
        status.map_or(ReplicaPhase::Unspecified, ReplicaStatus::phase)
    }
}

impl Reconciler {
    /// Takes over what a former agent process has left running.
    ///
    /// # Errors
    /// The runtime cannot say what runs.
    pub async fn adopt(
        runtime: Arc<dyn Runtime>,
        endpoints: Arc<dyn Endpoints>,
        egress: Arc<dyn Egress>,
        models: Models,
        shelf: Shelf,
    ) -> Result<Arc<Self>, RuntimeError> {
        let (statuses, inner) = (Statuses::new(), Mutex::default());
        let reconciler = Arc::new(Self { runtime, endpoints, egress, models, shelf, statuses, inner });
        for running in reconciler.runtime.adopt().await? {
            // It goes on as it is, whatever it was started for, until the coordinator is heard.
            let asleep = reconciler.runtime.sleep_mark(&running.replica).is_some();
            let assignment = ReplicaAssignment { asleep, ..running.assignment.clone() };
            let desired = Desired { assignment, leave: false };
            reconciler.spawn(&mut reconciler.lock(), desired, Some(running));
        }
        Ok(reconciler)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All statuses, whole, now and on each change.
    pub fn statuses(&self) -> watch::Receiver<ReplicaStatuses> {
        self.statuses.0.subscribe()
    }

    /// What all replicas have done, for metering.
    pub fn histories(&self) -> Histories {
        self.statuses.1.clone()
    }

    /// A new session: its first assignment is taken whatever its version.
    pub fn session_opened(&self) {
        self.lock().version = None;
    }

    /// The file with the output of a replica's current run.
    pub fn log_file(&self, replica: &str) -> PathBuf {
        self.runtime.log_file(replica)
    }

    /// The files with the output of the runs before the last restart, of a service's replicas that have not ended.
    pub fn previous_log_files(&self, namespace: &str, service: &str) -> Vec<(String, PathBuf)> {
        let inner = self.lock();
        let of_service = |(name, task): (&String, &Task)| {
            let desired = task.desired.borrow();
            let assignment = &desired.assignment;
            let matches = assignment.namespace == namespace && assignment.service == service;
            matches.then(|| (name.clone(), self.runtime.previous_log_file(name)))
        };
        let mut files: Vec<_> = inner.tasks.iter().filter_map(of_service).filter(|(_, path)| path.exists()).collect();
        files.sort_unstable();
        files
    }

    /// Output files of all replicas that have not ended.
    pub fn log_files(&self) -> Vec<PathBuf> {
        let inner = self.lock();
        let files = |replica: &String| [self.runtime.log_file(replica), self.runtime.previous_log_file(replica)];
        inner.tasks.keys().flat_map(files).collect()
    }

    /// Takes in the whole desired state; one that is older than the last is ignored.
    pub fn assign(&self, assignment: Assignment) {
        let mut inner = self.lock();
        if inner.version.is_some_and(|version| assignment.version < version) {
            return;
        }
        inner.version = Some(assignment.version);
        let wanted: BTreeMap<String, ReplicaAssignment> =
            assignment.replicas.into_iter().map(|replica| (replica.replica.clone(), replica)).collect();
        if !std::mem::replace(&mut inner.swept, true) {
            // What ended while no agent looked, and nobody asks for any more.
            self.runtime.remove_others(&|name| wanted.contains_key(name) || inner.tasks.contains_key(name));
        }
        inner.tasks.retain(|name, task| {
            if wanted.contains_key(name) {
                return true;
            }
            // Gone for good once it has stopped and nobody asks for it any more.
            let over = task.handle.is_finished() || self.statuses.phase(name) == ReplicaPhase::Stopped;
            if over {
                self.statuses.remove(name);
            } else {
                task.desired.send_modify(|desired| desired.leave = true);
            }
            !over
        });
        for (name, replica) in wanted {
            let leave = replica.draining;
            let desired = Desired { assignment: replica, leave };
            match inner.tasks.get(&name) {
                Some(task) => {
                    task.desired.send_if_modified(|current| {
                        let changed = *current != desired;
                        *current = desired;
                        changed
                    });
                }
                None => self.spawn(&mut inner, desired, None),
            }
        }
        // After the replicas: what they have now is not let go of.
        self.shelf.assign(assignment.models, assignment.images);
    }

    fn spawn(&self, inner: &mut Inner, desired: Desired, adopted: Option<crate::runtime::Running>) {
        let name = desired.assignment.replica.clone();
        let image = desired.assignment.container.iter().map(|container| &container.image);
        let image = image.filter(|image| !image.is_empty()).cloned();
        let models = desired.assignment.models.iter().map(|model| model.uri.clone());
        let held = self.models.hold(&name, models.chain(image));
        let (sender, receiver) = watch::channel(desired);
        let orphan = Orphan {
            name: name.clone(),
            runtime: Arc::clone(&self.runtime),
            endpoints: Arc::clone(&self.endpoints),
            statuses: self.statuses.clone(),
            desired: receiver.clone(),
            running: Arc::default(),
        };
        let life = Life {
            runtime: Arc::clone(&self.runtime),
            endpoints: Arc::clone(&self.endpoints),
            way_back: WayBack::new(Arc::clone(&self.egress)),
            models: self.models.clone(),
            _held: held,
            statuses: self.statuses.clone(),
            desired: receiver,
            room: self.models.room_made(),
            ready_since: None,
            running: Arc::clone(&orphan.running),
        };
        life.begin_status(adopted.as_ref());
        let handle = tokio::spawn(orphan.supervise(life.run(adopted)));
        inner.tasks.insert(name, Task { desired: sender, handle });
    }

    /// Ends this node's work: stops all replicas, or leaves them to the next agent process.
    pub async fn shutdown(&self, stop_replicas: bool) {
        self.models.close();
        let tasks: Vec<Task> = self.lock().tasks.drain().map(|(_, task)| task).collect();
        for task in &tasks {
            if stop_replicas {
                task.desired.send_modify(|desired| desired.leave = true);
            } else {
                task.handle.abort();
            }
        }
        for task in tasks {
            // An aborted task ends with an error, as it should.
            let _ = task.handle.await;
        }
    }
}
