//! What a request holds: its place in line, then a slot.

use std::{
    net::SocketAddr,
    sync::{Arc, Weak},
};

use tokio::sync::oneshot;

use super::{line::Place, queue::RevisionQueue};

/// One of a replica's slots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slot {
    /// The replica.
    pub replica: String,
    /// Guards against releasing a slot of a previous instance: a replica that is restarted keeps its name.
    pub incarnation: u64,
}

/// Where a granted request goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// A replica on this node.
    Local {
        /// Its name.
        replica: String,
        /// Where its server listens.
        address: SocketAddr,
        /// HTTP/2 with prior knowledge.
        h2c: bool,
    },
    /// A replica on another node.
    Peer {
        /// The node.
        node: String,
        /// The replica.
        replica: String,
        /// The offer taken; `None` if concurrency is not limited.
        offer: Option<u64>,
    },
}

/// A slot, taken until dropped.
#[derive(Debug)]
pub struct Grant {
    /// Where the request goes.
    pub target: Target,
    /// Gives the slot back.
    pub permit: Permit,
}

/// Gives back what a request holds when it is dropped.
#[derive(Debug)]
pub struct Permit {
    queue: Weak<RevisionQueue>,
    held: SlotKind,
    answered: bool,
}

/// What a granted request holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum SlotKind {
    /// A slot of this node.
    Local(Slot),
    /// A request in flight to this other node.
    Peer(String),
}

impl Permit {
    pub(super) fn new(queue: Weak<RevisionQueue>, held: SlotKind) -> Self {
        Self { queue, held, answered: false }
    }

    /// The revision's queue, while it exists.
    pub fn queue(&self) -> Option<Arc<RevisionQueue>> {
        self.queue.upgrade()
    }

    /// The replica has begun to answer: when this is dropped, the request counts as completed.
    pub fn answered(mut self) -> Self {
        self.answered = true;
        self
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        if let Some(queue) = self.queue.upgrade() {
            queue.release(&self.held, self.answered);
        }
    }
}

/// Why a request may not wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// The queue is full.
    Full {
        /// Requests that may wait.
        limit: usize,
    },
}

/// A request in line. Dropped, it leaves the line, and gives back a slot that it was granted meanwhile.
#[derive(Debug)]
pub struct Waiting {
    pub(super) queue: Arc<RevisionQueue>,
    pub(super) place: Place,
    pub(super) granted: Option<oneshot::Receiver<Grant>>,
}

impl Waiting {
    /// Waits for the slot. `None` only if the queue itself is gone.
    pub async fn granted(mut self) -> Option<Grant> {
        let granted = self.granted.as_mut()?;
        let grant = granted.await.ok();
        self.granted = None;
        grant
    }

    /// The slot, if it was granted already.
    pub fn now(&mut self) -> Option<Grant> {
        let grant = self.granted.as_mut()?.try_recv().ok();
        if grant.is_some() {
            self.granted = None;
        }
        grant
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if self.granted.is_some() {
            // If it was granted meanwhile, the channel drops the grant, and that gives back the slot.
            self.queue.leave(self.place);
        }
    }
}
