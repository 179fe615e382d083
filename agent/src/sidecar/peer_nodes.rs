//! Other nodes' replicas of one revision, as one gateway sees them: which are ready, how many requests it has there, and
//! which node takes the next request if concurrency is not limited.

use std::collections::{BTreeMap, BTreeSet};

use super::credit::CreditWindow;

/// Requests to other nodes after which a node that could not be reached is tried again, if it still is the least loaded.
const UNREACHABLE_PENALTY: u64 = 100;

/// Other nodes that have ready replicas or requests of this gateway.
#[derive(Debug, Default)]
pub(super) struct PeerNodes {
    pub(super) nodes: BTreeMap<String, PeerNode>,
    /// Nodes with ready replicas, by requests per replica: the least loaded is first.
    pub(super) by_load: BTreeSet<(u64, String)>,
    /// Nodes that have a penalty.
    penalized: BTreeSet<String>,
}

#[derive(Debug, Default)]
pub(super) struct PeerNode {
    /// Names of ready replicas.
    pub(super) ready: Vec<String>,
    /// Requests of this gateway on the node.
    pub(super) in_flight: u64,
    /// Counts as so many additional requests. A node that cannot be reached would otherwise be the least loaded until
    /// the coordinator declares it lost.
    penalty: u64,
    pub(super) credit: CreditWindow,
}

impl PeerNode {
    /// Requests per ready replica, in thousandths; `None` if none is ready.
    fn load(&self) -> Option<u64> {
        ((self.in_flight + self.penalty) * 1000).checked_div(self.ready.len() as u64)
    }
}

impl PeerNodes {
    /// Changes one node's entry and keeps the order by load.
    pub(super) fn update(&mut self, node: &str, change: impl FnOnce(&mut PeerNode)) {
        let peer = self.nodes.entry(node.to_owned()).or_default();
        let before = peer.load();
        change(peer);
        let after = peer.load();
        if peer.ready.is_empty() && peer.in_flight == 0 {
            self.nodes.remove(node);
        }
        if before != after {
            if let Some(load) = before {
                self.by_load.remove(&(load, node.to_owned()));
            }
            if let Some(load) = after {
                self.by_load.insert((load, node.to_owned()));
            }
        }
    }

    pub(super) fn has_ready(&self) -> bool {
        !self.by_load.is_empty()
    }

    pub(super) fn penalize(&mut self, node: &str) {
        if self.nodes.contains_key(node) {
            self.update(node, |peer| peer.penalty = UNREACHABLE_PENALTY);
            self.penalized.insert(node.to_owned());
        }
    }

    /// A request was sent: penalties are one request less.
    pub(super) fn relax_penalties(&mut self) {
        for node in std::mem::take(&mut self.penalized) {
            let mut remaining = 0;
            if self.nodes.contains_key(&node) {
                self.update(&node, |peer| {
                    peer.penalty = peer.penalty.saturating_sub(1);
                    remaining = peer.penalty;
                });
            }
            if remaining > 0 {
                self.penalized.insert(node);
            }
        }
    }

    /// A replica of the node with the fewest requests per replica; a node's replicas take turns.
    pub(super) fn least_loaded(&self) -> Option<(&str, &str)> {
        let (_, node) = self.by_load.first()?;
        let peer = self.nodes.get(node)?;
        let turn = usize::try_from(peer.in_flight).unwrap_or_default() % peer.ready.len();
        Some((node, &peer.ready[turn]))
    }
}
