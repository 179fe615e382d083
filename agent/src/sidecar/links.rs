//! Which revisions have something to announce to which node. A stream to a node is opened when the first request
//! needs it; only the streams of nodes that hold replicas of a revision are woken for it.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, OnceLock},
};

use tokio::sync::Notify;

use super::{
    credit::Credit,
    registry::Sidecar,
    sync::{Mutex, lock},
};

/// Starts the task that keeps a stream to a node open as long as [`Link`] needs it.
pub trait OpenStream: Send + Sync + std::fmt::Debug {
    /// Must not block.
    fn open(&self, link: Arc<Link>);
}

/// One link per node that requests have needed.
#[derive(Debug, Default)]
pub struct Links {
    links: Mutex<HashMap<String, Arc<Link>>>,
    opener: OnceLock<Arc<dyn OpenStream>>,
}

/// What waits to be announced to one node.
#[derive(Debug)]
pub struct Link {
    node: String,
    state: Mutex<LinkState>,
    marked: Notify,
}

#[derive(Debug, Default)]
struct LinkState {
    /// Revisions whose credit may have changed.
    marked: HashSet<Arc<str>>,
    /// `true` while a task serves the link.
    is_served: bool,
}

impl Links {
    /// Sets what opens streams. Without it nothing is announced. Only the first call counts.
    pub fn set_opener(&self, opener: Arc<dyn OpenStream>) {
        // Fails if it is set already.
        let _ = self.opener.set(opener);
    }

    /// The credit of this revision for this node may have changed. A stream is opened for it only if requests are
    /// `waiting`: what is not announced on a stream does not count after it.
    pub(super) fn mark(&self, node: &str, revision: &Arc<str>, waiting: bool) {
        let Some(opener) = self.opener.get() else { return };
        let link = self.link(node);
        let mut state = lock(&link.state);
        if !waiting && !state.is_served {
            return;
        }
        state.marked.insert(Arc::clone(revision));
        let opens = !std::mem::replace(&mut state.is_served, true);
        drop(state);
        link.marked.notify_one();
        if opens {
            opener.open(link);
        }
    }

    /// The link to a node, created if there is none.
    pub fn link(&self, node: &str) -> Arc<Link> {
        let mut links = lock(&self.links);
        if let Some(link) = links.get(node) {
            return Arc::clone(link);
        }
        let link = Arc::new(Link { node: node.to_owned(), state: Mutex::default(), marked: Notify::new() });
        links.insert(node.to_owned(), Arc::clone(&link));
        link
    }

    /// Removes the links to nodes that are gone, unless they are in use.
    pub fn retain(&self, exists: impl Fn(&str) -> bool) {
        lock(&self.links).retain(|node, link| exists(node) || Arc::strong_count(link) > 1);
    }
}

impl Link {
    /// The node.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// Takes the revisions that were marked since the last call.
    pub fn take_marked(&self) -> HashSet<Arc<str>> {
        std::mem::take(&mut lock(&self.state).marked)
    }

    /// Resolves when a revision has been marked since the last call of this.
    pub async fn wait_for_mark(&self) {
        self.marked.notified().await;
    }

    /// Ends the task's service. Returns `false` if a revision was marked meanwhile: then the task must continue.
    pub fn try_close(&self) -> bool {
        let mut state = lock(&self.state);
        if state.marked.is_empty() {
            state.is_served = false;
        }
        !state.is_served
    }
}

/// What the task of a link announces on its streams.
#[derive(Debug)]
pub struct Announcer {
    link: Arc<Link>,
    sidecar: Arc<Sidecar>,
    /// Revisions whose requests may wait for offers of this node. A new stream announces all of them.
    demanding: HashSet<Arc<str>>,
    is_closed: bool,
}

impl Announcer {
    /// For a link that is to be served.
    pub fn new(link: Arc<Link>, sidecar: Arc<Sidecar>) -> Self {
        Self { link, sidecar, demanding: HashSet::new(), is_closed: false }
    }

    /// Returns `true` if requests wait for an offer of this node.
    pub fn has_demand(&mut self) -> bool {
        let (sidecar, node) = (&self.sidecar, self.link.node());
        self.demanding.retain(|key| sidecar.existing(key).is_some_and(|queue| queue.has_demand_for(node)));
        !self.demanding.is_empty()
    }

    /// Ends the service of the link. Returns `false` if requests wait for an offer: then it must continue.
    pub fn try_close(&mut self) -> bool {
        self.take_marked();
        self.is_closed = !self.has_demand() && self.link.try_close();
        self.is_closed
    }

    fn take_marked(&mut self) -> HashSet<Arc<str>> {
        let marked = self.link.take_marked();
        self.demanding.extend(marked.iter().cloned());
        marked
    }

    /// What to announce first on a new stream, by revision.
    pub fn announce_all(&mut self, stream: u64) -> Vec<(Arc<str>, Credit)> {
        self.take_marked();
        self.announce(self.demanding.clone(), stream)
    }

    /// What to announce of the revisions that were marked since the last call.
    pub fn announce_marked(&mut self, stream: u64) -> Vec<(Arc<str>, Credit)> {
        let marked = self.take_marked();
        self.announce(marked, stream)
    }

    fn announce(&mut self, keys: HashSet<Arc<str>>, stream: u64) -> Vec<(Arc<str>, Credit)> {
        let mut credits = Vec::new();
        for key in keys {
            let queue = self.sidecar.existing(&key);
            let credit = match &queue {
                Some(queue) => queue.update_credit(self.link.node(), stream),
                None => Some(Credit { epoch: self.sidecar.next_number(), limit: 0 }),
            };
            if !queue.is_some_and(|queue| queue.has_demand_for(self.link.node())) {
                self.demanding.remove(&key);
            }
            credits.extend(credit.map(|credit| (key, credit)));
        }
        credits
    }
}

impl Drop for Announcer {
    fn drop(&mut self) {
        // Its task has panicked or was cancelled: the next request opens another one.
        if !self.is_closed {
            lock(&self.link.state).is_served = false;
        }
    }
}
