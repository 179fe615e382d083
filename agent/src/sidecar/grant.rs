//! What a request holds: its place in line, then a slot.

use std::{
    net::SocketAddr,
    sync::{Arc, Weak},
};

use tokio::sync::oneshot;

use super::queue::RevisionQueue;

/// One of a replica's slots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slot {
    /// The replica.
    pub replica: String,
    /// Which of its lives: one that is started again keeps its name, and owes nothing from before.
    pub life: u64,
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
        /// The offer taken; `None` where concurrency is not limited.
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

/// Gives back what a request held when it is dropped.
#[derive(Debug)]
pub struct Permit {
    queue: Weak<RevisionQueue>,
    held: Held,
    answered: bool,
}

/// What a granted request holds.
#[derive(Debug, Clone)]
pub(super) enum Held {
    /// A slot of this node.
    Local(Slot),
    /// A request under way to another node.
    Peer(String),
}

impl Permit {
    pub(super) fn new(queue: Weak<RevisionQueue>, held: Held) -> Self {
        Self { queue, held, answered: false }
    }

    /// The revision's queue, while it is there.
    pub fn queue(&self) -> Option<Arc<RevisionQueue>> {
        self.queue.upgrade()
    }

    /// The replica has begun to answer: when this is dropped, the request counts as completed.
    pub fn answered(mut self) -> Self {
        self.answered = true;
        self
    }

    /// Drops it without giving anything back.
    pub(super) fn forget(mut self) {
        self.queue = Weak::new();
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
    /// As many wait as may.
    Full {
        /// That many.
        limit: usize,
    },
}

/// A request in line. Dropped, it leaves.
#[derive(Debug)]
pub struct Waiting {
    pub(super) queue: Arc<RevisionQueue>,
    pub(super) id: u64,
    pub(super) granted: Option<oneshot::Receiver<Grant>>,
}

impl Waiting {
    /// The slot, as soon as there is one. `None` only where the queue itself is gone.
    pub async fn granted(mut self) -> Option<Grant> {
        let granted = self.granted.as_mut()?;
        let grant = granted.await.ok();
        self.granted = None;
        grant
    }

    /// The slot, where there is one already.
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
        if let Some(mut granted) = self.granted.take() {
            granted.close();
            // Dropping a grant that came meanwhile gives its slot to the next.
            drop(granted.try_recv());
            self.queue.left(self.id);
        }
    }
}
