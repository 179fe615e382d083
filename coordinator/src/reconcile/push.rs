//! Sends what has changed: assignments to the nodes concerned at once, routes to all, many changes together.

use std::{collections::BTreeSet, time::Duration};

use pilotlight_proto::fleet::v1::coordinator_message::Message as ToAgent;
use tokio::time::Instant;
use tracing::warn;

use super::{routes, run::Reconciler, world::World};
use crate::{
    fleet::RouteFeed,
    model::{ServiceKey, owner},
};

/// Addresses of nodes are sent this long after the first change, unless routes take them along. After an outage, many
/// nodes come back within this time.
const NODES_DELAY: Duration = Duration::from_millis(100);
/// Time between two pushes, per agent: about what a push costs.
const INTERVAL_PER_AGENT: Duration = Duration::from_micros(100);
/// Longest time between two pushes, which a request may wait for its route.
const MAX_INTERVAL: Duration = Duration::from_millis(100);
/// Shorter intervals are none: the push is cheap.
const MIN_INTERVAL: Duration = Duration::from_millis(10);

/// Routes that agents have, and changes that they do not have yet.
#[derive(Debug, Default)]
pub(super) struct RoutePush {
    feed: RouteFeed,
    services: BTreeSet<ServiceKey>,
    nodes: bool,
    /// When the changes are due; `None` if there are none.
    due: Option<Instant>,
    pushed_at: Option<Instant>,
}

impl RoutePush {
    /// What sessions follow.
    pub(super) fn feed(&self) -> RouteFeed {
        self.feed.clone()
    }

    /// The newest version, if it has all changes.
    pub(super) fn pushed(&self) -> Option<u64> {
        self.services.is_empty().then(|| self.feed.version())
    }

    /// Resolves when changes are due; never if there are none.
    pub(super) async fn due(&self) {
        match self.due {
            Some(due) => tokio::time::sleep_until(due).await,
            None => std::future::pending().await,
        }
    }

    /// Publishes the routes of all services, before there is any session.
    pub(super) fn publish_all(&mut self, world: &World) {
        self.services.extend(world.services.keys().cloned());
        self.publish(world);
    }

    /// Takes in changes. The first one is due at once, those that follow it are pushed together.
    fn add(&mut self, services: &BTreeSet<ServiceKey>, nodes: bool, agents: usize, now: Instant) {
        if !services.is_empty() {
            let interval = (INTERVAL_PER_AGENT * agents as u32).min(MAX_INTERVAL);
            let next = self.pushed_at.filter(|_| interval >= MIN_INTERVAL).map(|pushed| pushed + interval);
            let due = next.unwrap_or(now).max(now);
            self.due = Some(self.due.map_or(due, |before| before.min(due)));
        } else if nodes && self.due.is_none() {
            self.due = Some(now + NODES_DELAY);
        }
        self.services.extend(services.iter().cloned());
        self.nodes |= nodes;
    }

    /// Publishes changes that are due. Returns `true` if agents have to be sent something.
    fn publish_due(&mut self, world: &World, now: Instant) -> bool {
        if self.due.is_none_or(|due| due > now) {
            return false;
        }
        let changed = self.publish(world);
        if changed {
            self.pushed_at = Some(now);
        }
        changed
    }

    fn publish(&mut self, world: &World) -> bool {
        self.due = None;
        let nodes = std::mem::take(&mut self.nodes).then(|| routes::peer_nodes(world));
        let route = |key: ServiceKey| {
            let route = world.services.get(&key).map(|service| routes::service_route(world, service));
            (key, route)
        };
        self.feed.publish(std::mem::take(&mut self.services).into_iter().map(route), nodes.as_deref())
    }
}

impl Reconciler {
    /// Sends what has changed, as far as it is due.
    pub(super) fn push(&mut self) {
        self.push_assignments();
        // What changes a component changes what is shown of its service.
        let owners: Vec<_> = self.dirty.services.iter().map(|key| owner(key).to_owned()).collect();
        self.dirty.services.extend(owners);
        let now = Instant::now();
        let agents = self.world.nodes.values().filter(|node| node.session.is_some()).count();
        self.routes.add(&self.dirty.services, std::mem::take(&mut self.dirty.peers), agents, now);
        if self.routes.publish_due(&self.world, now) {
            self.metrics.record_route_push(self.routes.feed.newest_update_bytes(), agents as u64);
            let sessions = self.world.nodes.values().filter_map(|node| node.session.as_ref());
            sessions.for_each(|session| session.notify_routes());
        }
    }

    fn push_assignments(&mut self) {
        for name in std::mem::take(&mut self.dirty.nodes) {
            let Some(node) = self.world.nodes.get_mut(&name) else { continue };
            node.assignment_version += 1;
            let node = &self.world.nodes[&name];
            // An agent that has not reported what it runs is not sent what to run yet: its replicas may
            // be from before, and the store may know better only after the next message.
            let (Some(session), true) = (&node.session, node.heard) else { continue };
            if session.tell(ToAgent::Assignment(routes::assignment(&self.world, node))) {
                continue;
            }
            warn!(node = %name, "the agent is gone or answers no requests; it has to connect again");
            if let Some(node) = self.world.nodes.get_mut(&name) {
                node.session = None;
            }
        }
    }
}
