//! The records that make up desired state, and where each is kept in the store.

use std::{collections::BTreeMap, time::Duration};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{
    quarantine::GpuRecord,
    rollout::{History, Share},
    spec::{
        Component, ComponentKind, ConditionStatus, InferenceService, RevisionTemplate, Scaling, ServingRuntime,
        TrafficShare,
    },
};

/// `<namespace>/<name>` of an InferenceService, or `<namespace>/<name>/<component>` of a component that is
/// not its predictor. Each component has revisions, shares and replicas of its own, as in KServe, where each
/// one is a Knative service.
pub type ServiceKey = String;
/// `<namespace>/<revision>`, as in the fleet protocol.
pub type RevisionKey = String;

/// The key of one component of a service.
pub fn service_key(namespace: &str, name: &str, component: ComponentKind) -> ServiceKey {
    match component {
        ComponentKind::Predictor => format!("{namespace}/{name}"),
        further => format!("{namespace}/{name}/{further}"),
    }
}

/// The key of the service that a component belongs to: its predictor's.
pub fn owner(key: &str) -> &str {
    key.match_indices('/').nth(1).map_or(key, |(end, _)| &key[..end])
}

/// One component of an applied InferenceService; its predictor's record stands for the service as a whole.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ServiceRecord {
    /// Which component.
    #[serde(default, skip_serializing_if = "ComponentKind::is_predictor")]
    pub component: ComponentKind,
    /// Unique over time: a service that is deleted and applied again gets another.
    pub uid: String,
    /// Grows by one with each change of the spec; from 1.
    pub generation: u64,
    /// When it was first applied.
    pub created_at: Timestamp,
    /// Number of the newest revision; revisions are named `<service>-<component>-<number>`.
    pub latest_revision: u32,
    /// Number of the newest revision that has ever been ready.
    pub latest_ready: Option<u32>,
    /// Number of the revision that last had all requests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latest_rolledout: Option<u32>,
    /// Number of the one that had them before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub previous_rolledout: Option<u32>,
    /// Names that a Knative `Service` gave its revisions, and their numbers.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub revision_names: BTreeMap<String, u32>,
    /// What was applied, whole, whichever component this is.
    pub service: InferenceService,
}

impl ServiceRecord {
    /// See [`ServiceKey`].
    pub fn key(&self) -> ServiceKey {
        service_key(&self.service.namespace, &self.service.name, self.component)
    }

    /// A revision of what is applied now.
    pub fn revision(&self, number: u32, been_ready: bool, now: Timestamp) -> RevisionRecord {
        let component = self.spec();
        RevisionRecord {
            namespace: self.service.namespace.clone(),
            name: self.revision_name(number),
            service: self.service.name.clone(),
            component: self.component,
            number,
            generation: self.generation,
            created_at: now,
            been_ready,
            failed: None,
            in_place: false,
            scaling: component.scaling.clone(),
            timeout: component.timeout,
            template: component.template.clone(),
        }
    }

    /// What was applied of this component.
    pub fn spec(&self) -> &Component {
        // A record goes in the same write as its part of the service.
        self.service.component(self.component).unwrap_or(&self.service.predictor)
    }

    /// Percent of the requests for the newest ready revision; all, where the manifest does not say.
    pub fn canary(&self) -> u8 {
        match self.shares() {
            Some(shares) => shares.iter().filter(|share| share.revision.is_none()).map(|share| share.percent).sum(),
            None => self.spec().canary_traffic_percent.unwrap_or(100),
        }
    }

    /// A Knative `Service`'s `traffic`; `None` where all goes by the rules of a canary. A revision that is
    /// not known stands for the newest: that was refused when it was applied.
    pub fn shares(&self) -> Option<Vec<Share>> {
        let traffic = &self.service.traffic;
        let share = |share: &TrafficShare| Share {
            revision: share.revision.as_ref().and_then(|name| self.revision_number(name)),
            percent: share.percent,
            tag: share.tag.clone(),
        };
        (self.component.is_predictor() && !traffic.is_empty()).then(|| traffic.iter().map(share).collect())
    }

    /// The number of the revision that `traffic` means by a name: one that was given, `<service>-00001` as
    /// Knative numbers them, or our own.
    pub fn revision_number(&self, name: &str) -> Option<u32> {
        if let Some(number) = self.revision_names.get(name) {
            return Some(*number);
        }
        let rest = name.strip_prefix(&self.service.name)?.strip_prefix('-')?;
        let number: u32 = rest.strip_prefix("predictor-").unwrap_or(rest).parse().ok()?;
        (1..=self.latest_revision).contains(&number).then_some(number)
    }

    /// True where a revision may yet be asked for: it must not be thrown away.
    pub fn needs(&self, number: u32) -> bool {
        let named = self.shares().is_some_and(|shares| shares.iter().any(|share| share.revision == Some(number)));
        named || self.history().needs(number)
    }

    /// Annotations that its roll-out goes by: the service's, and over them the component's.
    pub fn annotations(&self) -> [&BTreeMap<String, String>; 2] {
        [&self.service.annotations, &self.spec().template.annotations]
    }

    /// Which revisions were ready and which had all requests.
    pub fn history(&self) -> History {
        History {
            created: self.latest_revision,
            ready: self.latest_ready,
            rolledout: self.latest_rolledout,
            previous: self.previous_rolledout,
        }
    }

    /// A record from before there were canaries: the newest ready revision had all requests.
    pub fn upgraded(mut self) -> Self {
        self.latest_rolledout = self.latest_rolledout.or(self.latest_ready);
        self
    }

    /// Brings the history up to date with what the service asks for and which revision is ready.
    pub fn settle(&mut self) {
        let canary = match self.shares() {
            // Named revisions make no history: what they had before is in the manifest before.
            Some(_) if self.canary() < 100 => return,
            Some(_) => None,
            None => self.spec().canary_traffic_percent,
        };
        let history = self.history().settled(canary);
        self.latest_rolledout = history.rolledout;
        self.previous_rolledout = history.previous;
    }

    /// Name of this service's revision `number`, as Knative names them.
    pub fn revision_name(&self, number: u32) -> String {
        format!("{}-{}-{number:05}", self.service.name, self.component)
    }

    /// Key of this service's revision `number`.
    pub fn revision_key(&self, number: u32) -> RevisionKey {
        format!("{}/{}", self.service.namespace, self.revision_name(number))
    }
}

/// One immutable version of a service's component.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RevisionRecord {
    /// Namespace.
    pub namespace: String,
    /// `<service>-<component>-<number>`.
    pub name: String,
    /// The InferenceService it belongs to.
    pub service: String,
    /// And which part of it.
    #[serde(default, skip_serializing_if = "ComponentKind::is_predictor")]
    pub component: ComponentKind,
    /// From 1.
    pub number: u32,
    /// Generation of the service that made it.
    pub generation: u64,
    /// When it was made.
    pub created_at: Timestamp,
    /// True once it has reached its initial scale; never unset.
    pub been_ready: bool,
    /// Why it never became ready, once its progress deadline has passed; never unset.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failed: Option<RevisionFailure>,
    /// True where it replaces others one replica at a time, for lack of room.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub in_place: bool,
    /// Replica bounds, target and concurrency; may change without a new revision.
    pub scaling: Scaling,
    /// Longest time a request may take; may change without a new revision.
    pub timeout: Duration,
    /// What its replicas run.
    pub template: RevisionTemplate,
}

/// Why a revision never became ready.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RevisionFailure {
    /// When its deadline passed.
    pub at: Timestamp,
    /// For people: the deadline, and what its last replica said.
    pub message: String,
    /// That replica; empty where there was none.
    #[serde(default)]
    pub replica: String,
    /// Its exit code, where its process ended.
    #[serde(default)]
    pub exit_code: Option<i32>,
}

/// Conditions of one service, kept so that the time of their last change survives a restart.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConditionsRecord {
    /// `<namespace>/<name>`.
    pub service: ServiceKey,
    /// By type.
    pub conditions: BTreeMap<String, ConditionRecord>,
}

/// Whether one condition holds, and since when.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConditionRecord {
    /// Whether it holds.
    pub status: ConditionStatus,
    /// Since when.
    pub since: Timestamp,
}

impl RevisionRecord {
    /// `<namespace>/<revision>`.
    pub fn key(&self) -> RevisionKey {
        format!("{}/{}", self.namespace, self.name)
    }

    /// Key of the component's record.
    pub fn service_key(&self) -> ServiceKey {
        service_key(&self.namespace, &self.service, self.component)
    }
}

/// A replica that shall exist, and where.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaRecord {
    /// `<revision>-<suffix>`, unique for ever.
    pub name: String,
    /// Namespace.
    pub namespace: String,
    /// The InferenceService it belongs to.
    pub service: String,
    /// Key of its revision.
    pub revision: RevisionKey,
    /// The node that runs it.
    pub node: String,
    /// The GPUs it holds there.
    pub gpu_indices: Vec<u32>,
    /// UUIDs of the MIG devices it holds there; then the GPUs are those that these are parts of.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mig_devices: Vec<String>,
    /// Product of those GPUs, for metering; empty without GPUs.
    pub gpu_class: String,
    /// When it was placed.
    pub created_at: Timestamp,
    /// True: it takes no new request, finishes, and stops.
    pub draining: bool,
    /// True: it takes no new request, finishes, and sleeps.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub asleep: bool,
}

impl ReplicaRecord {
    /// Devices that it holds: MIG devices, else GPUs.
    pub fn devices(&self) -> usize {
        if self.mig_devices.is_empty() { self.gpu_indices.len() } else { self.mig_devices.len() }
    }
}

/// A node that has joined.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NodeRecord {
    /// Node name.
    pub name: String,
    /// When it was first seen.
    pub joined_at: Timestamp,
    /// What the operator lets it do.
    #[serde(default)]
    pub availability: Availability,
    /// GPUs that are or were quarantined, by UUID.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub gpus: BTreeMap<String, GpuRecord>,
}

impl NodeRecord {
    /// A node that has just joined, and takes replicas.
    pub fn new(name: &str, joined_at: Timestamp) -> Self {
        Self { name: name.to_owned(), joined_at, availability: Availability::Open, gpus: BTreeMap::new() }
    }
}

/// What an operator lets a node do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Availability {
    /// It takes replicas.
    #[default]
    Open,
    /// It keeps the replicas it has and takes no more.
    Cordoned,
    /// It takes none, and those it has move elsewhere.
    Draining,
}

/// What operators asked for of one model, on one node or on all.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelRecord {
    /// Such as `s3://bucket/prefix`.
    pub uri: String,
    /// `None`: all nodes that there are, and those that join.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// Where it is to be at least; `None`: that was not asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rung: Option<WarmRung>,
    /// True: it is not removed from the disk.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub pinned: bool,
    /// Whose secrets it is fetched with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<ServiceKey>,
}

/// A rung that a model without replicas can be kept at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum WarmRung {
    /// On the disk.
    Cached,
    /// In the page cache, too.
    Staged,
}

/// An applied ServingRuntime or ClusterServingRuntime.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RuntimeRecord {
    /// When it was first applied; the newer of two that fit equally well is taken.
    pub created_at: Timestamp,
    /// What was applied.
    pub runtime: ServingRuntime,
}

/// Keys in the store. Prefixes end in `/`, so that no name is a prefix of another's.
pub mod keys {
    /// All services.
    pub const SERVICES: &str = "services/";
    /// All revisions.
    pub const REVISIONS: &str = "revisions/";
    /// All replicas.
    pub const REPLICAS: &str = "replicas/";
    /// Conditions of all services.
    pub const CONDITIONS: &str = "conditions/";
    /// All nodes.
    pub const NODES: &str = "nodes/";
    /// All join tokens.
    pub const TOKENS: &str = "tokens/";
    /// Applied serving runtimes.
    pub const RUNTIMES: &str = "runtimes/";
    /// Sealed values of secrets and config maps.
    pub const VALUES: &str = "values/";
    /// What operators asked for of models.
    pub const MODELS: &str = "models/";
    /// The cell's certificate authority.
    pub const AUTHORITY: &str = "authority";
    /// How nodes joined.
    pub const JOINS: &str = "joins/";
    /// Operators who were given certificates.
    pub const USERS: &str = "users/";
    /// Certificates that are refused before they expire.
    pub const REVOCATIONS: &str = "revocations/";

    /// One runtime; `None` is the cluster's, and no namespace can be called so.
    pub fn runtime(namespace: Option<&str>, name: &str) -> String {
        format!("{RUNTIMES}{}/{name}", namespace.unwrap_or("_cluster"))
    }
    /// Values of one secret or config map.
    pub fn value(kind: crate::spec::AuxiliaryKind, namespace: &str, name: &str) -> String {
        format!("{VALUES}{kind}/{namespace}/{name}")
    }
    /// One service.
    pub fn service(key: &str) -> String {
        format!("{SERVICES}{key}")
    }
    /// One revision.
    pub fn revision(key: &str) -> String {
        format!("{REVISIONS}{key}")
    }
    /// Conditions of one service.
    pub fn conditions(key: &str) -> String {
        format!("{CONDITIONS}{key}")
    }
    /// One replica.
    pub fn replica(name: &str) -> String {
        format!("{REPLICAS}{name}")
    }
    /// One node.
    pub fn node(name: &str) -> String {
        format!("{NODES}{name}")
    }
    /// What was asked for of one model; `None` is on all nodes, and no node can be called so.
    pub fn model(node: Option<&str>, uri: &str) -> String {
        format!("{MODELS}{}/{uri}", node.unwrap_or("_all"))
    }
    /// One join token.
    pub fn token(id: &str) -> String {
        format!("{TOKENS}{id}")
    }
    /// How nodes joined under one name.
    pub fn joins(node: &str) -> String {
        format!("{JOINS}{node}")
    }
    /// One user.
    pub fn user(name: &str) -> String {
        format!("{USERS}{name}")
    }
    /// Revoked certificates of one member.
    pub fn revocation(subject: &str) -> String {
        format!("{REVOCATIONS}{subject}")
    }
}
