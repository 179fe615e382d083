//! The edge: takes requests, finds their service, holds and forwards them.
//!
//! In the order a request meets them: [`ingress`] (listener, limits), [`routes`] (which service),
//! [`split`] (which revision), [`hold`] (waits for a slot, tries again), [`forward`] (to a replica here
//! or to the node that has it); [`tokens`] counts what answers have. [`peer`] is the other end: requests
//! that come from other nodes' gateways; [`egress`] is where replicas of this node begin: a transformer's
//! requests to its predictor. `peer_connections` are the connections to other nodes, `slot_stream` announces demand and
//! takes offers on them, `weights` is models between nodes.

pub mod answer;
pub mod body;
mod clients;
mod connection;
mod coordinator;
mod egress;
pub mod error_format;
mod failure;
pub mod forward;
mod forwarded;
pub mod hold;
pub mod ingress;
mod listener;
pub mod metrics;
pub mod peer;
mod peer_connections;
pub mod progress;
pub mod route_updates;
mod routes;
mod slot_stream;
pub mod split;
#[cfg(test)]
mod tests;
pub mod tokens;
mod weights;

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{sync::Semaphore, time::Instant};
use tokio_util::sync::CancellationToken;

pub use clients::{ClientSettings, max_connections};
pub use egress::Gateway;
pub use forward::{Connect, PeerStream};
pub use metrics::GatewayMetrics;
use route_updates::RouteUpdates;
pub use routes::RouteTable;

use crate::sidecar::{Demands, Sidecar};
use coordinator::Coordinator;
use forward::Forwarder;
use peer_connections::PeerConnectionPool;
use slot_stream::SlotStreams;

/// What the data path is made with.
pub struct Setup {
    /// This node.
    pub node: String,
    /// Largest request body, bytes.
    pub max_request_body: u64,
    /// Connects to other nodes.
    pub connect: Arc<dyn Connect>,
    /// Where demands go.
    pub demands: Demands,
    /// Counters and times.
    pub metrics: GatewayMetrics,
    /// What clients may do, and for how long.
    pub clients: ClientSettings,
}

/// The whole data path of one node.
pub struct DataPath {
    pub(crate) node: String,
    pub(crate) max_request_body: u64,
    pub(crate) demands: Demands,
    pub(crate) sidecar: Arc<Sidecar>,
    pub(crate) routes: RouteTable,
    updates: Mutex<RouteUpdates>,
    /// Places for requests that come before all routes have.
    early: Semaphore,
    pub(crate) forwarder: Forwarder,
    pub(crate) metrics: GatewayMetrics,
    peers: Arc<PeerConnectionPool>,
    /// Apart from the others: requests must not wait behind weights.
    weights: PeerConnectionPool,
    clients: ClientSettings,
    reported: Mutex<Instant>,
    coordinator: Coordinator,
    /// Cancelled when requests that still wait for a replica are answered because the agent stops.
    pub(crate) wait_ended: CancellationToken,
}

impl DataPath {
    /// Puts it together; it serves once listeners are given to it.
    pub fn new(setup: Setup) -> Arc<Self> {
        let sidecar = Sidecar::new();
        let peers = Arc::new(PeerConnectionPool::new(Arc::clone(&setup.connect)));
        SlotStreams::attach(&sidecar, Arc::clone(&peers));
        Arc::new(Self {
            routes: RouteTable::new(Arc::clone(&sidecar)),
            updates: Mutex::default(),
            early: Semaphore::new(ingress::EARLY),
            forwarder: Forwarder::new(Arc::clone(&peers)),
            peers,
            node: setup.node,
            max_request_body: setup.max_request_body,
            demands: setup.demands,
            metrics: setup.metrics,
            clients: setup.clients,
            weights: PeerConnectionPool::new(setup.connect),
            reported: Mutex::new(Instant::now()),
            coordinator: Coordinator::new(),
            wait_ended: CancellationToken::new(),
            sidecar,
        })
    }

    /// This node's replicas.
    pub fn sidecar(&self) -> &Arc<Sidecar> {
        &self.sidecar
    }

    /// Takes in routes, or a part of them. Connections to nodes are opened when requests need them.
    pub fn apply_routes(&self, part: pilotlight_proto::fleet::v1::Routes) {
        let mut updates = self.updates.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(update) = updates.add(part) else { return };
        let nodes_moved = updates.move_nodes(&update);
        if nodes_moved {
            // First, because requests that wait may need these nodes at once.
            self.peers.set_addresses(updates.addresses());
            self.weights.set_addresses(updates.addresses());
        }
        self.routes.apply(&self.node, update);
        if nodes_moved {
            self.sidecar.links().retain(|node| updates.addresses().contains_key(node));
        }
    }

    /// Opens new connections to other nodes for new requests, because certificates have changed.
    pub fn refresh_peer_connections(&self) {
        self.peers.refresh();
        self.weights.refresh();
    }

    /// Notes whether there is a session with the coordinator.
    pub fn set_connected(&self, connected: bool) {
        self.coordinator.set_connected(connected);
    }

    /// A new session has begun: routes of any version are taken next.
    pub fn session_opened(&self) {
        self.updates.lock().unwrap_or_else(PoisonError::into_inner).session_opened();
        self.sidecar.served().resend();
        self.routes.session_opened();
    }

    /// The load since the last report.
    pub fn report(&self) -> pilotlight_proto::fleet::v1::QueueReport {
        let now = Instant::now();
        let mut reported = self.reported.lock().unwrap_or_else(PoisonError::into_inner);
        let interval: Duration = now.duration_since(std::mem::replace(&mut *reported, now));
        self.sidecar.report(interval)
    }
}
