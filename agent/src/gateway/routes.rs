//! Which service and revision a request is for.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use arc_swap::ArcSwap;
use pilotlight_proto::fleet::v1 as fleet;

use crate::sidecar::{Limits, RevisionQueue, Sidecar};

/// Path prefix of services, as KServe's path template has it.
pub const PATH_PREFIX: &str = "/serving/";

/// All routes. Reads take no lock; an update copies the maps of pointers.
#[derive(Debug)]
pub struct RouteTable {
    table: ArcSwap<Table>,
    /// Version of the last update of this session; `None` until the full one.
    version: Mutex<Option<u64>>,
    sidecar: Arc<Sidecar>,
}

#[derive(Debug, Default, Clone)]
struct Table {
    by_host: HashMap<String, Arc<Service>>,
    /// By `<namespace>/<name>`.
    by_name: BTreeMap<String, Arc<Service>>,
}

/// One service.
#[derive(Debug)]
pub struct Service {
    /// `<namespace>/<name>`.
    pub name: String,
    hosts: Vec<String>,
    targets: Mutex<Vec<Share>>,
    keys: Vec<String>,
}

#[derive(Debug)]
struct Share {
    percent: i64,
    credit: i64,
    queue: Arc<RevisionQueue>,
}

impl Service {
    /// The revision that takes the next request: by smooth weighted round robin, so that shares are
    /// exact over every hundred requests and spread evenly within them.
    pub fn next(&self) -> Option<Arc<RevisionQueue>> {
        let mut targets = self.targets.lock().unwrap_or_else(PoisonError::into_inner);
        if let [only] = targets.as_slice() {
            return (only.percent > 0).then(|| Arc::clone(&only.queue));
        }
        let total: i64 = targets.iter().map(|share| share.percent).sum();
        for share in targets.iter_mut() {
            share.credit += share.percent;
        }
        let chosen = targets.iter_mut().filter(|share| share.percent > 0).max_by_key(|share| share.credit)?;
        chosen.credit -= total;
        Some(Arc::clone(&chosen.queue))
    }
}

impl RouteTable {
    /// No routes yet.
    pub fn new(sidecar: Arc<Sidecar>) -> Self {
        Self { table: ArcSwap::default(), version: Mutex::new(None), sidecar }
    }

    /// A new session: its first update, which is full, is taken whatever its version.
    pub fn session_opened(&self) {
        *self.version.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// The service for a host, and whether it was found by it.
    pub fn by_host(&self, host: &str) -> Option<Arc<Service>> {
        let host = host
            .rsplit_once(':')
            .map_or(host, |(name, port)| if port.bytes().all(|byte| byte.is_ascii_digit()) { name } else { host });
        let table = self.table.load();
        match table.by_host.get(host) {
            Some(service) => Some(Arc::clone(service)),
            None => table.by_host.get(&host.to_ascii_lowercase()).cloned(),
        }
    }

    /// The service for a path below [`PATH_PREFIX`], and the path at the model server.
    pub fn by_path<'a>(&self, path: &'a str) -> Option<(Arc<Service>, &'a str)> {
        let rest = path.strip_prefix(PATH_PREFIX)?;
        let end = rest.match_indices('/').nth(1).map_or(rest.len(), |(index, _)| index);
        let service = self.table.load().by_name.get(&rest[..end]).cloned()?;
        Some((service, &rest[end..]))
    }

    /// Some hosts that are known.
    pub fn known_hosts(&self, most: usize) -> Vec<String> {
        self.table.load().by_name.values().take(most).filter_map(|service| service.hosts.first().cloned()).collect()
    }

    /// Takes in an update; one that is older than what is known is ignored. Returns all nodes' addresses.
    pub fn apply(&self, own_node: &str, update: fleet::Routes) -> BTreeMap<String, String> {
        let nodes = update.nodes.iter().map(|node| (node.name.clone(), node.peer_address.clone())).collect();
        let mut version = self.version.lock().unwrap_or_else(PoisonError::into_inner);
        let newer = version.is_none_or(|version| update.version > version);
        if !newer || (version.is_none() && !update.full) {
            return nodes;
        }
        *version = Some(update.version);
        let former = self.table.load();
        let mut table = if update.full { Table::default() } else { Table::clone(&former) };
        let named = update.services.iter().map(|route| format!("{}/{}", route.namespace, route.name));
        for name in update.removed.iter().cloned().chain(named) {
            table.remove(&name);
        }
        for route in update.services {
            table.insert(self.service(own_node, route));
        }
        // Queues of revisions that have no route any more go, once nothing waits in them.
        let kept: std::collections::HashSet<&str> =
            table.by_name.values().flat_map(|service| service.keys.iter().map(String::as_str)).collect();
        let gone: Vec<String> = self
            .sidecar
            .revisions()
            .iter()
            .map(|queue| queue.key().to_owned())
            .filter(|key| !kept.contains(key.as_str()))
            .collect();
        self.table.store(Arc::new(table));
        for key in gone {
            self.sidecar.revision(&key).route(LIMITS_WITHOUT_ROUTE, BTreeMap::new());
            self.sidecar.forget(&key);
        }
        nodes
    }

    fn service(&self, own_node: &str, route: fleet::ServiceRoute) -> Arc<Service> {
        let mut targets = Vec::new();
        let mut keys = Vec::new();
        for revision in route.revisions {
            let mut peers: BTreeMap<String, Vec<String>> = BTreeMap::new();
            for replica in revision.replicas.into_iter().filter(|replica| replica.ready && replica.node != own_node) {
                peers.entry(replica.node).or_default().push(replica.replica);
            }
            let timeout = revision.timeout.and_then(|timeout| Duration::try_from(timeout).ok());
            let queue = self.sidecar.revision(&revision.revision);
            queue.route(
                Limits {
                    queue: revision.queue_limit as usize,
                    timeout: timeout.unwrap_or(LIMITS_WITHOUT_ROUTE.timeout),
                    concurrency: revision.container_concurrency,
                },
                peers,
            );
            keys.push(revision.revision);
            targets.push(Share { percent: i64::from(revision.traffic_percent), credit: 0, queue });
        }
        Arc::new(Service {
            name: format!("{}/{}", route.namespace, route.name),
            hosts: route.hosts,
            targets: Mutex::new(targets),
            keys,
        })
    }
}

/// What holds for a revision between its last route and its end.
const LIMITS_WITHOUT_ROUTE: Limits = Limits { queue: 0, timeout: Duration::from_secs(300), concurrency: 0 };

impl Table {
    fn insert(&mut self, service: Arc<Service>) {
        for host in &service.hosts {
            self.by_host.insert(host.clone(), Arc::clone(&service));
        }
        self.by_name.insert(service.name.clone(), service);
    }

    fn remove(&mut self, name: &str) {
        if let Some(service) = self.by_name.remove(name) {
            for host in &service.hosts {
                self.by_host.remove(host);
            }
        }
    }
}
