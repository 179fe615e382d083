//! Routes as agents receive them: encoded once, whoever receives them.
//!
//! The control loop publishes what has changed as a new version. Sessions read: each remembers the version that its
//! agent has, and asks for what is newer when the agent has read everything before. A slow agent therefore has no
//! queue: the next thing that it reads is the newest state.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;
use pilotlight_proto::fleet::v1 as fleet;
use prost::Message as _;

use crate::model::ServiceKey;

/// Bytes of one part of an update, unless a single service has more. gRPC refuses messages of more than 4 MiB, and an
/// assignment waits for the part that is being sent.
const PART_BYTES: usize = 256 << 10;
/// Changes that are remembered. An agent that is further behind receives everything.
const MAX_CHANGES: usize = 4096;
/// Updates to the newest version that are kept encoded, by the version that they lead from.
const MAX_ENCODED: usize = 16;

/// One update, in parts that are sent in order.
pub type Parts = Arc<[Bytes]>;

/// All routes, and how to bring an agent from any version to the newest. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct RouteFeed(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    version: u64,
    /// Encoded `ServiceRoute`s.
    services: BTreeMap<ServiceKey, Bytes>,
    /// Encoded `PeerNode`s, by node name.
    nodes: BTreeMap<String, Bytes>,
    /// What changed at which version, the oldest first.
    changes: VecDeque<(u64, Key)>,
    /// Newest version whose changes are no longer remembered.
    forgotten: u64,
    /// Everything, of the newest version.
    full: Option<Parts>,
    /// Updates to the newest version, by the version that they lead from.
    encoded: BTreeMap<u64, Parts>,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Key {
    Service(ServiceKey),
    Node(String),
}

/// `CoordinatorMessage` with routes, whose entries are encoded already. A message and its bytes look the same on the
/// wire.
#[derive(Clone, PartialEq, prost::Message)]
struct EncodedMessage {
    #[prost(message, optional, tag = "3")]
    routes: Option<EncodedRoutes>,
}

/// `Routes`, see [`EncodedMessage`].
#[derive(Clone, PartialEq, prost::Message)]
struct EncodedRoutes {
    #[prost(uint64, tag = "1")]
    version: u64,
    #[prost(bool, tag = "2")]
    full: bool,
    #[prost(bytes = "bytes", repeated, tag = "3")]
    services: Vec<Bytes>,
    #[prost(string, repeated, tag = "4")]
    removed: Vec<String>,
    #[prost(bytes = "bytes", repeated, tag = "5")]
    nodes: Vec<Bytes>,
    #[prost(string, repeated, tag = "6")]
    removed_nodes: Vec<String>,
    #[prost(bool, tag = "7")]
    more: bool,
}

impl RouteFeed {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The newest version.
    pub fn version(&self) -> u64 {
        self.state().version
    }

    /// Bytes of the update to the newest version from the one before.
    pub fn newest_update_bytes(&self) -> u64 {
        let update = self.update_from(self.version().checked_sub(1));
        update.map_or(0, |(_, parts)| parts.iter().map(|part| part.len() as u64).sum())
    }

    /// Takes in the routes of services, `None` if one is gone, and where all nodes are, unless none has moved. What is as
    /// it was is no change.
    /// Returns `true` if there is a new version.
    pub fn publish(
        &self,
        services: impl IntoIterator<Item = (ServiceKey, Option<fleet::ServiceRoute>)>,
        nodes: Option<&[fleet::PeerNode]>,
    ) -> bool {
        let mut state = self.state();
        let mut changed = BTreeSet::new();
        for (key, route) in services {
            if replace(&mut state.services, &key, route.map(|route| route.encode_to_vec().into())) {
                changed.insert(Key::Service(key));
            }
        }
        if let Some(nodes) = nodes {
            changed.extend(state.replace_nodes(nodes));
        }
        state.record(changed)
    }

    /// What an agent with this version lacks, and the version that it has then; `None` if it lacks nothing. An agent
    /// without a version receives everything.
    pub fn update_from(&self, version: Option<u64>) -> Option<(u64, Parts)> {
        let mut state = self.state();
        if version == Some(state.version) {
            return None;
        }
        let parts = match version {
            Some(version) if version >= state.forgotten => state.delta(version),
            _ => state.full(),
        };
        Some((state.version, parts))
    }
}

/// Returns `true` if it was something else.
fn replace(entries: &mut BTreeMap<String, Bytes>, key: &str, new: Option<Bytes>) -> bool {
    if entries.get(key) == new.as_ref() {
        return false;
    }
    match new {
        Some(new) => entries.insert(key.to_owned(), new),
        None => entries.remove(key),
    };
    true
}

impl State {
    /// Returns what has changed.
    fn replace_nodes(&mut self, nodes: &[fleet::PeerNode]) -> Vec<Key> {
        let mut changed = Vec::new();
        for node in nodes {
            if replace(&mut self.nodes, &node.name, Some(node.encode_to_vec().into())) {
                changed.push(Key::Node(node.name.clone()));
            }
        }
        if self.nodes.len() > nodes.len() {
            let known: BTreeSet<&str> = nodes.iter().map(|node| node.name.as_str()).collect();
            let gone = self.nodes.extract_if(.., |name, _| !known.contains(name.as_str()));
            changed.extend(gone.map(|(name, _)| Key::Node(name)));
        }
        changed
    }

    fn record(&mut self, changed: BTreeSet<Key>) -> bool {
        if changed.is_empty() {
            return false;
        }
        self.version += 1;
        self.full = None;
        self.encoded.clear();
        self.changes.extend(changed.into_iter().map(|key| (self.version, key)));
        while self.changes.len() > MAX_CHANGES {
            if let Some((version, _)) = self.changes.pop_front() {
                self.forgotten = version;
            }
        }
        true
    }

    fn full(&mut self) -> Parts {
        if let Some(full) = &self.full {
            return Arc::clone(full);
        }
        let services = self.services.keys().cloned().map(Key::Service);
        let keys: Vec<_> = services.chain(self.nodes.keys().cloned().map(Key::Node)).collect();
        let full = self.encode(true, keys);
        self.full = Some(Arc::clone(&full));
        full
    }

    fn delta(&mut self, from: u64) -> Parts {
        if let Some(parts) = self.encoded.get(&from) {
            return Arc::clone(parts);
        }
        let newer = self.changes.iter().rev().take_while(|(version, _)| *version > from);
        let keys: BTreeSet<Key> = newer.map(|(_, key)| key.clone()).collect();
        let parts = self.encode(false, keys);
        if self.encoded.len() < MAX_ENCODED {
            self.encoded.insert(from, Arc::clone(&parts));
        }
        parts
    }

    fn encode(&self, full: bool, keys: impl IntoIterator<Item = Key>) -> Parts {
        let empty = || EncodedRoutes { version: self.version, full, ..Default::default() };
        let (mut parts, mut part, mut bytes) = (Vec::new(), empty(), 0);
        for key in keys {
            let entry = match &key {
                Key::Service(key) => self.services.get(key),
                Key::Node(name) => self.nodes.get(name),
            };
            let size = entry.map_or(0, Bytes::len);
            if bytes > 0 && bytes + size > PART_BYTES {
                part.more = true;
                parts.push(std::mem::replace(&mut part, empty()));
                bytes = 0;
            }
            bytes += size;
            match (key, entry) {
                (Key::Service(_), Some(route)) => part.services.push(route.clone()),
                (Key::Service(key), None) => part.removed.push(key),
                (Key::Node(_), Some(node)) => part.nodes.push(node.clone()),
                (Key::Node(name), None) => part.removed_nodes.push(name),
            }
        }
        parts.push(part);
        parts.into_iter().map(|routes| EncodedMessage { routes: Some(routes) }.encode_to_vec().into()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(name: &str, bytes: usize) -> (ServiceKey, Option<fleet::ServiceRoute>) {
        let route = fleet::ServiceRoute {
            namespace: "default".into(),
            name: name.into(),
            hosts: vec!["h".repeat(bytes)],
            ..Default::default()
        };
        (format!("default/{name}"), Some(route))
    }

    fn node(name: &str, peer_address: &str) -> fleet::PeerNode {
        fleet::PeerNode { name: name.into(), peer_address: peer_address.into() }
    }

    fn decode(parts: &Parts) -> Vec<fleet::Routes> {
        let message = |bytes: &Bytes| fleet::CoordinatorMessage::decode(bytes.clone()).unwrap().message.unwrap();
        let routes = parts.iter().map(|bytes| match message(bytes) {
            fleet::coordinator_message::Message::Routes(routes) => routes,
            other => panic!("{other:?}"),
        });
        routes.collect()
    }

    fn update(feed: &RouteFeed, from: u64) -> fleet::Routes {
        decode(&feed.update_from(Some(from)).unwrap().1).pop().unwrap()
    }

    #[test]
    fn an_unchanged_address_or_route_is_no_change() {
        let feed = RouteFeed::default();
        assert!(feed.publish([service("iris", 1)], Some(&[node("a", "10.0.0.1:1")])));
        assert!(!feed.publish([service("iris", 1)], Some(&[node("a", "10.0.0.1:1")])));
        assert_eq!(feed.update_from(Some(1)), None);
    }

    #[test]
    fn addresses_travel_alone_when_they_change() {
        let feed = RouteFeed::default();
        feed.publish([service("iris", 1)], Some(&[node("a", "10.0.0.1:1"), node("b", "10.0.0.2:1")]));
        feed.publish([service("iris", 2)], Some(&[node("a", "10.0.0.1:1"), node("b", "10.0.0.2:1")]));
        assert_eq!(update(&feed, 1).nodes, []);
        feed.publish([], Some(&[node("b", "10.0.0.3:1"), node("c", "10.0.0.4:1")]));
        let routes = update(&feed, 2);
        assert_eq!(routes.nodes, [node("b", "10.0.0.3:1"), node("c", "10.0.0.4:1")]);
        assert_eq!(routes.removed_nodes, ["a"]);
        assert!(routes.services.is_empty() && !routes.full);
    }

    #[test]
    fn a_reader_that_is_behind_receives_each_thing_once_and_as_it_is_now() {
        let feed = RouteFeed::default();
        feed.publish([service("iris", 1), service("rose", 1)], None);
        for length in 2..100 {
            feed.publish([service("iris", length)], None);
        }
        feed.publish([("default/rose".into(), None)], None);
        let routes = update(&feed, 1);
        assert_eq!(routes.version, 100);
        assert_eq!(routes.services.len(), 1);
        assert_eq!(routes.services[0].hosts[0].len(), 99);
        assert_eq!(routes.removed, ["default/rose"]);
    }

    #[test]
    fn a_reader_that_is_too_far_behind_receives_everything() {
        let feed = RouteFeed::default();
        feed.publish([service("iris", 1)], Some(&[node("a", "10.0.0.1:1")]));
        for turn in 0..=MAX_CHANGES {
            feed.publish([service("rose", turn % 2)], Some(&[node("a", "10.0.0.1:1")]));
        }
        let routes = update(&feed, 1);
        assert!(routes.full);
        assert_eq!((routes.services.len(), routes.nodes.len()), (2, 1));
        assert!(!update(&feed, feed.version() - 1).full);
        assert_eq!(feed.state().changes.len(), MAX_CHANGES);
    }

    #[test]
    fn readers_of_one_version_share_the_bytes() {
        let feed = RouteFeed::default();
        feed.publish([service("iris", 1)], None);
        feed.publish([service("iris", 2)], None);
        for version in [None, Some(1)] {
            let (one, other) = (feed.update_from(version).unwrap().1, feed.update_from(version).unwrap().1);
            assert!(Arc::ptr_eq(&one, &other));
        }
    }

    #[test]
    fn full_routes_are_sent_in_parts_below_the_limit_of_grpc() {
        let feed = RouteFeed::default();
        feed.publish((0..1000).map(|number| service(&format!("s-{number}"), 10_000)), Some(&[node("a", "10.0.0.1:1")]));
        let (version, parts) = feed.update_from(None).unwrap();
        assert!(parts.iter().all(|part| part.len() < 4 << 20));
        assert!(parts.iter().map(Bytes::len).sum::<usize>() > 8 << 20);
        let routes = decode(&parts);
        let (last, others) = routes.split_last().unwrap();
        assert!(others.iter().all(|part| part.more) && !last.more);
        assert!(routes.iter().all(|part| part.full && part.version == version));
        assert_eq!(routes.iter().map(|part| part.services.len()).sum::<usize>(), 1000);
        assert_eq!(last.nodes, [node("a", "10.0.0.1:1")]);
    }
}
