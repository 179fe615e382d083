//! What operators and agents ask of the loop, as messages; [`Handle`] is how they send them.

use std::{collections::BTreeSet, sync::Arc};

use pilotlight_proto::fleet::v1 as fleet;
use tokio::sync::{Semaphore, broadcast, mpsc, oneshot};

use super::{shelf::ModelChange, world::World};
use crate::{
    finding::Finding,
    fleet::SessionHandle,
    model::{Availability, ServiceKey},
    spec::InferenceService,
    store::StoreError,
    usage::Live,
};

/// Inputs that may wait for the loop; senders wait beyond that.
const INPUTS_WAITING: usize = 4096;
/// Changes a slow watcher may fall behind; beyond that it starts over with a full list.
const CHANGES_KEPT: usize = 1024;

/// Reads that may be queued for the loop at the same time; callers of others wait outside its queue. So what agents send
/// waits for at most this many reads, however many callers list and watch.
const MAX_CONCURRENT_READS: usize = 8;

/// A look at the world, at a moment.
pub type Look = Box<dyn FnOnce(&World, jiff::Timestamp) + Send>;

/// A message to the loop.
pub enum Input {
    /// An agent opened a session. An older session of the same node ends.
    Connected {
        /// The session.
        session: SessionHandle,
        /// Its first message.
        hello: Box<fleet::Hello>,
    },
    /// A session ended.
    Disconnected {
        /// Node name.
        node: String,
        /// Session number.
        session: u64,
    },
    /// An agent said something.
    Heard {
        /// Node name.
        node: String,
        /// Session number.
        session: u64,
        /// What.
        message: fleet::agent_message::Message,
    },
    /// An operator applies a service.
    Apply {
        /// Validated.
        service: Box<InferenceService>,
        /// Only say what would happen.
        dry_run: bool,
        /// Where the answer goes.
        reply: oneshot::Sender<Result<Applied, CommandError>>,
    },
    /// An operator deletes a service.
    Delete {
        /// Which.
        key: ServiceKey,
        /// Where the answer goes.
        reply: oneshot::Sender<Result<(), CommandError>>,
    },
    /// An operator says what a node may do.
    SetAvailability {
        /// Node name.
        node: String,
        /// What.
        availability: Availability,
        /// Where the answer goes.
        reply: oneshot::Sender<Result<(), CommandError>>,
    },
    /// An operator lets a quarantined GPU take replicas again.
    UnquarantineGpu {
        /// Node name.
        node: String,
        /// Index or UUID.
        gpu: String,
        /// Where the answer goes.
        reply: oneshot::Sender<Result<(), CommandError>>,
    },
    /// An operator removes a node that is not connected.
    DeleteNode {
        /// Node name.
        node: String,
        /// Where the answer goes: the replicas that were removed with it.
        reply: oneshot::Sender<Result<Vec<String>, CommandError>>,
    },
    /// An operator asks for something of a model, or takes that back.
    ChangeModel {
        /// The model's address, checked.
        uri: String,
        /// `None`: all nodes.
        node: Option<String>,
        /// What.
        change: ModelChange,
        /// Where the answer goes: nodes that are concerned.
        reply: oneshot::Sender<Result<BTreeSet<String>, CommandError>>,
    },
    /// Sleepers are to leave, so that what they hold can be removed.
    LetGo {
        /// Names of replicas; those that do not sleep any more stay.
        replicas: Vec<String>,
        /// Where the answer goes.
        reply: oneshot::Sender<Result<(), CommandError>>,
    },
    /// Values of secrets or config maps of a namespace have changed.
    ValuesChanged {
        /// Which.
        namespace: String,
    },
    /// Someone wants usage that is not yet in the store.
    Usage {
        /// Where the answer goes.
        reply: oneshot::Sender<Live>,
    },
    /// Someone looks at the world.
    Read(Look),
}

/// What an apply did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Applied {
    /// There was no such service.
    Created,
    /// The service was changed.
    Configured,
    /// Nothing differed.
    Unchanged,
}

/// Why a command was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// No such service.
    #[error("inferenceservice {0} not found")]
    NotFound(ServiceKey),
    /// No such node.
    #[error("node {0} not found: no node of this name has joined")]
    NodeNotFound(String),
    /// The node is connected, and would join again at once.
    #[error("node {0} is connected: drain it, stop its agent and try again")]
    NodeConnected(String),
    /// The node has no such GPU.
    #[error("gpu: {gpu:?} of node {node} is not known; known are {known}")]
    GpuNotFound {
        /// Node name.
        node: String,
        /// As given.
        gpu: String,
        /// Indices and UUIDs of its GPUs.
        known: String,
    },
    /// The GPU takes replicas already.
    #[error("gpu {gpu} of node {node} is not quarantined")]
    GpuNotQuarantined {
        /// Node name.
        node: String,
        /// As given.
        gpu: String,
    },
    /// The driver does not see the GPU.
    #[error("gpu {gpu} of node {node} is still lost: reset it or restart the node first")]
    GpuLost {
        /// Node name.
        node: String,
        /// As given.
        gpu: String,
    },
    /// What was asked for on all nodes is not taken back on one.
    #[error("node: {0} is asked for on all nodes, and cannot be taken back on one; leave the node out")]
    OnAllNodes(String),
    /// The service may not become what was applied; nothing was changed.
    #[error("refused: {}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Refused(Vec<Finding>),
    /// The store refused or could not be reached; nothing was changed.
    #[error("nothing was changed: {0}")]
    Store(#[from] StoreError),
    /// The coordinator has lost its leadership.
    #[error(
        "nothing was changed: this coordinator has stepped down, since it cannot reach the store or another one leads"
    )]
    SteppedDown,
    /// The coordinator is stopping.
    #[error("the coordinator is stopping")]
    Stopping,
}

/// A change that watchers are told of.
#[derive(Debug, Clone)]
pub enum Change {
    /// The service is new or looks different now.
    Updated(ServiceKey),
    /// The service is gone; what it was.
    Deleted(Box<pilotlight_proto::control::v1::Service>),
}

/// The loop's address. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Handle {
    inputs: mpsc::Sender<Input>,
    changes: broadcast::Sender<Change>,
    reads: Arc<Semaphore>,
}

impl Handle {
    /// A handle, and the loop's ends of it.
    pub fn new() -> (Self, mpsc::Receiver<Input>, broadcast::Sender<Change>) {
        let (inputs, receiver) = mpsc::channel(INPUTS_WAITING);
        let (changes, _) = broadcast::channel(CHANGES_KEPT);
        let reads = Arc::new(Semaphore::new(MAX_CONCURRENT_READS));
        (Self { inputs, changes: changes.clone(), reads }, receiver, changes)
    }

    /// Sends an input, waiting while the loop is behind.
    ///
    /// # Errors
    /// The loop has ended.
    pub async fn send(&self, input: Input) -> Result<(), CommandError> {
        self.inputs.send(input).await.map_err(|_| CommandError::Stopping)
    }

    /// Stores a validated service and makes a revision if its template changed.
    ///
    /// # Errors
    /// The store refused or could not be reached, or the loop has ended.
    pub async fn apply(&self, service: InferenceService, dry_run: bool) -> Result<Applied, CommandError> {
        let (reply, answer) = oneshot::channel();
        self.send(Input::Apply { service: Box::new(service), dry_run, reply }).await?;
        answer.await.map_err(|_| CommandError::Stopping)?
    }

    /// Deletes a service; its replicas drain.
    ///
    /// # Errors
    /// There is no such service, the store could not be reached, or the loop has ended.
    pub async fn delete(&self, key: ServiceKey) -> Result<(), CommandError> {
        let (reply, answer) = oneshot::channel();
        self.send(Input::Delete { key, reply }).await?;
        answer.await.map_err(|_| CommandError::Stopping)?
    }

    /// Stores what a node may do.
    ///
    /// # Errors
    /// There is no such node, the store could not be reached, or the loop has ended.
    pub async fn set_availability(&self, node: String, availability: Availability) -> Result<(), CommandError> {
        let (reply, answer) = oneshot::channel();
        self.send(Input::SetAvailability { node, availability, reply }).await?;
        answer.await.map_err(|_| CommandError::Stopping)?
    }

    /// Lets a quarantined GPU, given by index or UUID, take replicas again.
    ///
    /// # Errors
    /// There is no such node or GPU, the GPU is not quarantined or is still lost, the store could not be reached, or the
    /// loop has ended.
    pub async fn unquarantine_gpu(&self, node: String, gpu: String) -> Result<(), CommandError> {
        let (reply, answer) = oneshot::channel();
        self.send(Input::UnquarantineGpu { node, gpu, reply }).await?;
        answer.await.map_err(|_| CommandError::Stopping)?
    }

    /// Removes a node that is not connected, with its replicas; returns their names.
    ///
    /// # Errors
    /// There is no such node, it is connected, the store could not be reached, or the loop has ended.
    pub async fn delete_node(&self, node: String) -> Result<Vec<String>, CommandError> {
        let (reply, answer) = oneshot::channel();
        self.send(Input::DeleteNode { node, reply }).await?;
        answer.await.map_err(|_| CommandError::Stopping)?
    }

    /// Stores what is asked for of a model on a node, or on all; nodes that are concerned. Once this returns,
    /// what agents are told of it later comes after their assignment.
    ///
    /// # Errors
    /// There is no such node or service, it is asked for on all nodes, the store could not be reached, or the
    /// loop has ended.
    pub async fn change_model(
        &self,
        uri: String,
        node: Option<String>,
        change: ModelChange,
    ) -> Result<BTreeSet<String>, CommandError> {
        let (reply, answer) = oneshot::channel();
        self.send(Input::ChangeModel { uri, node, change, reply }).await?;
        answer.await.map_err(|_| CommandError::Stopping)?
    }

    /// Has replicas that sleep leave; they are gone some time later.
    ///
    /// # Errors
    /// The store could not be reached, or the loop has ended.
    pub async fn let_go(&self, replicas: Vec<String>) -> Result<(), CommandError> {
        let (reply, answer) = oneshot::channel();
        self.send(Input::LetGo { replicas, reply }).await?;
        answer.await.map_err(|_| CommandError::Stopping)?
    }

    /// Looks at the world between two steps of the loop.
    ///
    /// # Errors
    /// The loop has ended.
    pub async fn read<T: Send + 'static>(
        &self,
        look: impl FnOnce(&World, jiff::Timestamp) -> T + Send + 'static,
    ) -> Result<T, CommandError> {
        let permit = Arc::clone(&self.reads).acquire_owned().await.map_err(|_| CommandError::Stopping)?;
        let (reply, answer) = oneshot::channel();
        self.send(Input::Read(Box::new(move |world, now| {
            // Held until the loop gets here, so that a caller that hangs up and asks again gains nothing.
            let _permit = permit;
            // The asker may have hung up; then nobody needs the answer.
            let _ = reply.send(look(world, now));
        })))
        .await?;
        answer.await.map_err(|_| CommandError::Stopping)
    }

    /// Usage up to now, as far as it may not be in the store yet.
    ///
    /// # Errors
    /// The loop has ended.
    pub async fn usage(&self) -> Result<Live, CommandError> {
        let (reply, answer) = oneshot::channel();
        self.send(Input::Usage { reply }).await?;
        answer.await.map_err(|_| CommandError::Stopping)
    }

    /// Changes from now on.
    pub fn changes(&self) -> broadcast::Receiver<Change> {
        self.changes.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reconcile::world::Settings;

    #[tokio::test]
    async fn agents_wait_for_a_few_reads_however_many_are_asked_for() {
        let (handle, mut inputs, _changes) = Handle::new();
        let read = |handle: &Handle| {
            let handle = handle.clone();
            tokio::spawn(async move { handle.read(|world, _| world.nodes.len()).await })
        };
        let mut waiting: Vec<_> = (0..100).map(|_| read(&handle)).collect();
        // Callers that hang up and ask again do not get more in.
        for _ in 0..3 {
            while inputs.len() < MAX_CONCURRENT_READS {
                tokio::task::yield_now().await;
            }
            waiting.drain(..20).for_each(|read| read.abort());
            waiting.extend((0..20).map(|_| read(&handle)));
            for _ in 0..1000 {
                tokio::task::yield_now().await;
            }
        }
        assert_eq!(inputs.len(), MAX_CONCURRENT_READS);
        handle.send(Input::Disconnected { node: "a".to_owned(), session: 1 }).await.unwrap();
        assert_eq!(inputs.len(), MAX_CONCURRENT_READS + 1, "an agent's message is queued at once");

        drop(handle);
        let world = World::new(Settings::for_tests());
        while let Some(input) = inputs.recv().await {
            if let Input::Read(look) = input {
                look(&world, jiff::Timestamp::UNIX_EPOCH);
            }
        }
        for read in waiting {
            assert_eq!(read.await.unwrap().unwrap(), 0);
        }
    }
}
