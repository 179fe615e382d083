//! Routes as they arrive: large updates in parts, addresses of nodes as changes.

use std::collections::BTreeMap;

use pilotlight_proto::fleet::v1 as fleet;

/// Puts updates together, and knows where all nodes are.
#[derive(Debug, Default)]
pub(super) struct RouteUpdates {
    /// Parts of an update whose last part has not come yet.
    incomplete: Option<fleet::Routes>,
    /// `host:port` of peer listeners, by node name.
    addresses: BTreeMap<String, String>,
}

impl RouteUpdates {
    /// Forgets parts of a previous session.
    pub(super) fn session_opened(&mut self) {
        self.incomplete = None;
    }

    /// Where all nodes are.
    pub(super) fn addresses(&self) -> &BTreeMap<String, String> {
        &self.addresses
    }

    /// Takes in a part. Returns the whole update once its last part has come.
    pub(super) fn add(&mut self, part: fleet::Routes) -> Option<fleet::Routes> {
        let more = part.more;
        let update = match self.incomplete.take().filter(|update| update.version == part.version) {
            Some(mut update) => {
                update.services.extend(part.services);
                update.removed.extend(part.removed);
                update.nodes.extend(part.nodes);
                update.removed_nodes.extend(part.removed_nodes);
                update
            }
            None => part,
        };
        if more {
            self.incomplete = Some(update);
            return None;
        }
        Some(update)
    }

    /// Takes in where nodes are. Returns `true` if an address has changed.
    pub(super) fn move_nodes(&mut self, update: &fleet::Routes) -> bool {
        let moved = update.nodes.iter().map(|node| (node.name.clone(), node.peer_address.clone()));
        if update.full {
            let addresses = moved.collect();
            let changed = self.addresses != addresses;
            self.addresses = addresses;
            return changed;
        }
        self.addresses.extend(moved);
        update.removed_nodes.iter().for_each(|name| drop(self.addresses.remove(name)));
        !update.nodes.is_empty() || !update.removed_nodes.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(version: u64, service: &str, more: bool) -> fleet::Routes {
        let service = fleet::ServiceRoute { name: service.into(), ..Default::default() };
        fleet::Routes { version, full: true, services: vec![service], more, ..Default::default() }
    }

    fn names(update: &fleet::Routes) -> Vec<&str> {
        update.services.iter().map(|service| service.name.as_str()).collect()
    }

    #[test]
    fn an_update_is_complete_with_its_last_part() {
        let mut updates = RouteUpdates::default();
        assert_eq!(updates.add(part(3, "a", true)), None);
        assert_eq!(updates.add(part(3, "b", true)), None);
        assert_eq!(names(&updates.add(part(3, "c", false)).unwrap()), ["a", "b", "c"]);
        assert_eq!(names(&updates.add(part(4, "d", false)).unwrap()), ["d"]);
    }

    #[test]
    fn parts_of_a_session_that_broke_are_forgotten() {
        let mut updates = RouteUpdates::default();
        assert_eq!(updates.add(part(3, "a", true)), None);
        updates.session_opened();
        assert_eq!(names(&updates.add(part(3, "b", false)).unwrap()), ["b"]);
    }

    #[test]
    fn addresses_change_one_by_one() {
        let node = |name: &str, address: &str| fleet::PeerNode { name: name.into(), peer_address: address.into() };
        let mut updates = RouteUpdates::default();
        let full = fleet::Routes { full: true, nodes: vec![node("a", "1"), node("b", "2")], ..Default::default() };
        assert!(updates.move_nodes(&full));
        assert!(!updates.move_nodes(&full), "nothing has changed in the new session");
        assert!(!updates.move_nodes(&fleet::Routes::default()));
        let change =
            fleet::Routes { nodes: vec![node("b", "3")], removed_nodes: vec!["a".into()], ..Default::default() };
        assert!(updates.move_nodes(&change));
        assert_eq!(*updates.addresses(), [("b".to_owned(), "3".to_owned())].into());
    }
}
