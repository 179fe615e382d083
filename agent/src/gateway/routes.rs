//! Which service and revision a request is for.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use arc_swap::ArcSwap;
use http::HeaderName;
use pilotlight_proto::fleet::v1 as fleet;
use tokio::sync::SetOnce;

use super::split::{Share, Split};
use crate::sidecar::{Limits, RevisionQueue, Sidecar};

/// Path prefix of services, as KServe's path template has it.
pub const PATH_PREFIX: &str = "/serving/";

/// KServe's verb for explanations, the end of such a request's path.
const EXPLAIN: &str = ":explain";

/// A service, and the revision where a host named its tag.
pub(super) type Found = (Arc<Service>, Option<Arc<RevisionQueue>>);

/// All routes. Reads take no lock; an update copies the maps of pointers.
#[derive(Debug)]
pub struct RouteTable {
    table: ArcSwap<Table>,
    /// Version of the last update of this session; `None` until the full one.
    version: Mutex<Option<u64>>,
    /// Set by the first full update of this process, and for good: what a later session has not said yet is
    /// as it was.
    loaded: SetOnce<()>,
    sidecar: Arc<Sidecar>,
}

#[derive(Debug, Default, Clone)]
struct Table {
    by_host: HashMap<String, Arc<Service>>,
    /// Hosts of tags. Apart from the others, since a service may be called as another one's tag is.
    by_tag: HashMap<String, (Arc<Service>, Arc<RevisionQueue>)>,
    /// Explainers, by the hosts of their services.
    by_explained: HashMap<String, Arc<Service>>,
    /// By [`Service::name`].
    by_name: BTreeMap<String, Arc<Service>>,
}

/// One component of a service.
#[derive(Debug)]
pub struct Service {
    /// `<namespace>/<name>` of a predictor, `<namespace>/<name>/<component>` of others.
    pub name: String,
    pub(super) split: Arc<Split>,
    pub(super) sticky_header: Option<HeaderName>,
    hosts: Vec<String>,
    /// Hosts whose `:explain` requests come here.
    explains: Vec<String>,
    /// Revisions that can be called alone.
    tags: Vec<(String, Arc<RevisionQueue>)>,
    keys: Vec<String>,
}

impl Service {
    /// The host names that lead to one revision alone: `<tag>-<host>`, as Knative has them.
    fn tag_hosts(&self) -> impl Iterator<Item = (String, &Arc<RevisionQueue>)> {
        self.tags.iter().flat_map(|(tag, queue)| self.hosts.iter().map(move |host| (format!("{tag}-{host}"), queue)))
    }

    #[cfg(test)]
    pub(super) fn for_tests(split: Arc<Split>, sticky_header: Option<HeaderName>) -> Self {
        let (hosts, explains, tags, keys) = Default::default();
        Self { name: "default/test".into(), split, sticky_header, hosts, explains, tags, keys }
    }
}

impl RouteTable {
    /// No routes yet.
    pub fn new(sidecar: Arc<Sidecar>) -> Self {
        Self { table: ArcSwap::default(), version: Mutex::new(None), loaded: SetOnce::new(), sidecar }
    }

    /// Whether all routes have come once, so that what is not among them does not exist.
    pub fn is_loaded(&self) -> bool {
        self.loaded.initialized()
    }

    /// Waits until [`RouteTable::is_loaded`].
    pub async fn loaded(&self) {
        self.loaded.wait().await;
    }

    /// A new session: its first update, which is full, is taken whatever its version.
    pub fn session_opened(&self) {
        *self.version.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// The service for a host, and the revision where the host names its tag.
    pub(super) fn by_host(&self, host: &str) -> Option<Found> {
        let host = without_port(host);
        let table = self.table.load();
        table.find(host).or_else(|| table.find(&host.to_ascii_lowercase()))
    }

    /// The explainer of the service that a host names, where the path asks for one and there is one.
    pub(super) fn explainer(&self, host: &str, path: &str) -> Option<Arc<Service>> {
        if !path.ends_with(EXPLAIN) {
            return None;
        }
        self.table.load().by_explained.get(&without_port(host).to_ascii_lowercase()).cloned()
    }

    /// The service for a path below [`PATH_PREFIX`], and the path at the model server.
    pub fn by_path<'a>(&self, path: &'a str) -> Option<(Arc<Service>, &'a str)> {
        let rest = path.strip_prefix(PATH_PREFIX)?;
        let end = rest.match_indices('/').nth(1).map_or(rest.len(), |(index, _)| index);
        let (name, table) = (&rest[..end], self.table.load());
        let component = |kind: &str| table.by_name.get(&format!("{name}/{kind}"));
        let explainer = if path.ends_with(EXPLAIN) { component("explainer") } else { None };
        let service = explainer.or_else(|| component("transformer")).or_else(|| table.by_name.get(name)).cloned()?;
        Some((service, &rest[end..]))
    }

    /// Some hosts that are known.
    pub fn known_hosts(&self, most: usize) -> Vec<String> {
        self.table.load().by_name.values().take(most).filter_map(|service| service.hosts.first().cloned()).collect()
    }

    /// Takes in an update; one that is older than what is known is ignored.
    pub fn apply(&self, own_node: &str, update: fleet::Routes) {
        let mut version = self.version.lock().unwrap_or_else(PoisonError::into_inner);
        let newer = version.is_none_or(|version| update.version > version);
        if !newer || (version.is_none() && !update.full) {
            return;
        }
        *version = Some(update.version);
        let former = self.table.load();
        let mut table = if update.full { Table::default() } else { Table::clone(&former) };
        let named = update.services.iter().map(name_of);
        for name in update.removed.iter().cloned().chain(named) {
            table.remove(&name);
        }
        for route in update.services {
            table.insert(self.service(own_node, &former, route));
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
        for (name, service) in &former.by_name {
            if !table.by_name.contains_key(name) {
                service.split.close();
            }
        }
        self.table.store(Arc::new(table));
        // Fails where it is set already.
        let _ = self.loaded.set(());
        for key in gone {
            let queue = self.sidecar.revision(&key);
            queue.route(LIMITS_WITHOUT_ROUTE, BTreeMap::new());
            queue.set_failure(None);
            self.sidecar.forget(&key);
        }
    }

    fn service(&self, own_node: &str, former: &Table, route: fleet::ServiceRoute) -> Arc<Service> {
        let name = name_of(&route);
        let (mut shares, mut tags) = (Vec::new(), Vec::new());
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
            queue.set_failure(revision.failure);
            keys.push(revision.revision);
            if !revision.tag.is_empty() {
                tags.push((revision.tag, Arc::clone(&queue)));
            }
            shares.push(Share::new(revision.traffic_percent, queue));
        }
        // Turns go on where they were.
        let split = former.by_name.get(&name).map(|service| Arc::clone(&service.split)).unwrap_or_default();
        split.update(shares);
        // An empty name, which is no header's, means none.
        let sticky_header = HeaderName::from_bytes(route.sticky_header.as_bytes()).ok();
        Arc::new(Service { name, split, sticky_header, hosts: route.hosts, explains: route.explains, tags, keys })
    }
}

/// See [`Service::name`].
fn name_of(route: &fleet::ServiceRoute) -> String {
    match route.component.as_str() {
        "" => format!("{}/{}", route.namespace, route.name),
        component => format!("{}/{}/{component}", route.namespace, route.name),
    }
}

fn without_port(host: &str) -> &str {
    let (name, port) = host.rsplit_once(':').unwrap_or((host, ""));
    if port.bytes().all(|byte| byte.is_ascii_digit()) { name } else { host }
}

/// What holds for a revision between its last route and its end.
const LIMITS_WITHOUT_ROUTE: Limits = Limits { queue: 0, timeout: Duration::from_secs(300), concurrency: 0 };

impl Table {
    fn find(&self, host: &str) -> Option<Found> {
        if let Some(service) = self.by_host.get(host) {
            return Some((Arc::clone(service), None));
        }
        let (service, queue) = self.by_tag.get(host)?;
        Some((Arc::clone(service), Some(Arc::clone(queue))))
    }

    fn insert(&mut self, service: Arc<Service>) {
        for host in &service.hosts {
            self.by_host.insert(host.clone(), Arc::clone(&service));
        }
        for host in &service.explains {
            self.by_explained.insert(host.clone(), Arc::clone(&service));
        }
        for (host, queue) in service.tag_hosts() {
            self.by_tag.insert(host, (Arc::clone(&service), Arc::clone(queue)));
        }
        self.by_name.insert(service.name.clone(), service);
    }

    fn remove(&mut self, name: &str) {
        if let Some(service) = self.by_name.remove(name) {
            for host in &service.hosts {
                self.by_host.remove(host);
            }
            for host in &service.explains {
                self.by_explained.remove(host);
            }
            for (host, _) in service.tag_hosts() {
                self.by_tag.remove(&host);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn revision(name: &str, percent: u32, tag: &str) -> fleet::RevisionRoute {
        fleet::RevisionRoute {
            revision: format!("default/{name}"),
            traffic_percent: percent,
            tag: tag.to_owned(),
            ..Default::default()
        }
    }

    fn service(name: &str, revisions: Vec<fleet::RevisionRoute>) -> fleet::ServiceRoute {
        let hosts = vec![format!("{name}.default.test"), format!("{name}-predictor.default.test")];
        fleet::ServiceRoute { namespace: "default".into(), name: name.into(), hosts, revisions, ..Default::default() }
    }

    fn update(version: u64, services: Vec<fleet::ServiceRoute>, removed: &[&str]) -> fleet::Routes {
        let removed = removed.iter().map(ToString::to_string).collect();
        fleet::Routes { version, full: version == 1, services, removed, ..Default::default() }
    }

    /// `<service> <revision of the tag>`.
    fn found(routes: &RouteTable, host: &str) -> Option<String> {
        let (service, tagged) = routes.by_host(host)?;
        Some(format!("{} {}", service.name, tagged.map(|queue| queue.key().to_owned()).unwrap_or_default()))
    }

    #[test]
    fn hosts_of_tags_lead_to_one_revision_until_the_tag_goes() {
        let routes = RouteTable::new(Sidecar::new());
        let canary = || service("iris", vec![revision("iris-2", 0, "latest"), revision("iris-1", 100, "prev")]);
        routes.apply("node", update(1, vec![canary()], &[]));
        assert_eq!(found(&routes, "iris.default.test:8080").unwrap(), "default/iris ");
        for host in ["latest-iris.default.test", "Latest-Iris-Predictor.default.test:80"] {
            assert_eq!(found(&routes, host).unwrap(), "default/iris default/iris-2", "{host}");
        }
        assert_eq!(found(&routes, "prev-iris.default.test").unwrap(), "default/iris default/iris-1");

        // A service of that very name is what it says, not the other one's tag.
        routes.apply("node", update(2, vec![service("prev-iris", vec![revision("own", 100, "")])], &[]));
        assert_eq!(found(&routes, "prev-iris.default.test").unwrap(), "default/prev-iris ");
        routes.apply("node", update(3, vec![], &["default/prev-iris"]));
        assert_eq!(found(&routes, "prev-iris.default.test").unwrap(), "default/iris default/iris-1");

        routes.apply("node", update(4, vec![service("iris", vec![revision("iris-2", 100, "")])], &[]));
        assert_eq!(found(&routes, "prev-iris.default.test"), None);
        assert_eq!(found(&routes, "latest-iris.default.test"), None);
    }

    #[test]
    fn a_service_is_entered_by_its_transformer_and_explained_by_its_explainer() {
        let routes = RouteTable::new(Sidecar::new());
        let component = |component: &str, hosts: &[&str], explains: &[&str]| fleet::ServiceRoute {
            component: component.to_owned(),
            hosts: hosts.iter().map(ToString::to_string).collect(),
            explains: explains.iter().map(ToString::to_string).collect(),
            ..service("iris", vec![revision(&format!("iris-{component}-1"), 100, "")])
        };
        let outer = "iris.default.test";
        let all = vec![
            component("", &["iris-predictor.default.test"], &[]),
            component("transformer", &[outer, "iris-transformer.default.test"], &[]),
            component("explainer", &["iris-explainer.default.test"], &[outer]),
        ];
        routes.apply("node", update(1, all, &[]));
        let by_host = |host: &str| routes.by_host(host).map(|(service, _)| service.name.clone());
        assert_eq!(by_host(outer).unwrap(), "default/iris/transformer");
        assert_eq!(by_host("iris-predictor.default.test:80").unwrap(), "default/iris");
        let explainer = |host: &str, path: &str| routes.explainer(host, path).map(|service| service.name.clone());
        assert_eq!(explainer("Iris.default.test:8080", "/v1/models/iris:explain").unwrap(), "default/iris/explainer");
        assert_eq!(explainer(outer, "/v1/models/iris:predict"), None);
        assert_eq!(explainer("iris-predictor.default.test", "/v1/models/iris:explain"), None);
        let by_path = |path: &str| routes.by_path(path).map(|(service, rest)| format!("{} {rest}", service.name));
        assert_eq!(by_path("/serving/default/iris/v1/x:predict").unwrap(), "default/iris/transformer /v1/x:predict");
        assert_eq!(by_path("/serving/default/iris/v1/x:explain").unwrap(), "default/iris/explainer /v1/x:explain");

        // Without them it is the predictor that is entered.
        let alone = component("", &[outer, "iris-predictor.default.test"], &[]);
        routes.apply("node", update(2, vec![alone], &["default/iris/transformer", "default/iris/explainer"]));
        assert_eq!(by_host(outer).unwrap(), "default/iris");
        assert_eq!(by_host("iris-transformer.default.test"), None);
        assert_eq!(explainer(outer, "/v1/models/iris:explain"), None);
        assert_eq!(by_path("/serving/default/iris/v1/x:explain").unwrap(), "default/iris /v1/x:explain");
    }

    #[test]
    fn twenty_thousand_requests_are_split_exactly_while_routes_change() {
        let routes = RouteTable::new(Sidecar::new());
        let canary = |replica: u64| {
            let mut newest = revision("iris-2", 10, "");
            newest.replicas.push(fleet::ReplicaRoute {
                replica: format!("iris-2-{replica}"),
                node: "far".into(),
                ready: true,
            });
            service("iris", vec![newest, revision("iris-1", 90, "prev")])
        };
        let mut newest = 0;
        for request in 0..20_000 {
            // Each update makes the service anew, as each change of a replica does.
            if request % 7 == 0 {
                routes.apply("node", update(request + 1, vec![canary(request)], &[]));
            }
            let (service, _) = routes.by_host("iris.default.test").unwrap();
            newest += u32::from(service.split.next().unwrap().key() == "default/iris-2");
        }
        assert_eq!(newest, 2_000);
    }
}
