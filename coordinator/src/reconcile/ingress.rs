//! The port by which clients reach the gateways, for the URLs of services.

use std::{collections::BTreeMap, net::SocketAddr};

use super::world::World;

/// Port of URLs as long as no agent has reported its own.
const DEFAULT_PORT: u16 = 8080;

impl World {
    /// Takes the port of URLs from what agents report, unless it is set: the port that most of the connected agents
    /// listen on, the lowest of several. Without a connected agent it stays as it is.
    pub fn update_ingress_port(&mut self) {
        if self.settings.ingress_port != 0 {
            self.ingress_port = self.settings.ingress_port;
            return;
        }
        let connected = self.nodes.values().filter(|node| node.session.is_some());
        let ports = connected.filter_map(|node| port(&node.hello.ingress_address));
        let mut counts: BTreeMap<u16, usize> = BTreeMap::new();
        for port in ports {
            *counts.entry(port).or_default() += 1;
        }
        let most = counts.into_iter().max_by_key(|(port, count)| (*count, std::cmp::Reverse(*port)));
        self.ingress_port = match (most, self.ingress_port) {
            (Some((port, _)), _) => port,
            (None, 0) => DEFAULT_PORT,
            (None, last) => last,
        };
    }
}

fn port(address: &str) -> Option<u16> {
    address.parse::<SocketAddr>().ok().map(|address| address.port())
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;
    use crate::{
        fleet::SessionHandle,
        model::NodeRecord,
        reconcile::world::{NodeState, Settings},
    };

    fn world(set: u16, agents: &[(&str, bool)]) -> World {
        let mut world = World::new(Settings { ingress_port: set, ..Settings::for_tests() });
        for (index, (address, connected)) in agents.iter().enumerate() {
            let name = format!("gpu-{index}");
            let record = NodeRecord::new(&name, Timestamp::UNIX_EPOCH);
            let mut node = NodeState::unheard(record, Timestamp::UNIX_EPOCH);
            node.hello.ingress_address = (*address).to_owned();
            node.session = connected.then(|| SessionHandle::to_nobody(&name));
            world.nodes.insert(name, node);
        }
        world.update_ingress_port();
        world
    }

    #[test]
    fn urls_name_the_port_that_agents_listen_on() {
        assert_eq!(world(0, &[("0.0.0.0:8081", true)]).ingress_port, 8081);
        assert_eq!(world(0, &[("0.0.0.0:8082", true), ("[::]:8081", true)]).ingress_port, 8081);
        let most = [("0.0.0.0:80", true), ("0.0.0.0:8082", true), ("0.0.0.0:8082", true)];
        assert_eq!(world(0, &most).ingress_port, 8082);
    }

    #[test]
    fn a_port_that_is_set_wins_over_what_agents_report() {
        assert_eq!(world(443, &[("0.0.0.0:8081", true)]).ingress_port, 443);
    }

    #[test]
    fn agents_that_are_not_connected_do_not_count() {
        assert_eq!(world(0, &[("0.0.0.0:8081", false)]).ingress_port, 8080);
        let mut world = world(0, &[("0.0.0.0:8081", true)]);
        world.nodes.values_mut().for_each(|node| node.session = None);
        world.update_ingress_port();
        assert_eq!(world.ingress_port, 8081);
    }
}
