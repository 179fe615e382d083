//! Which node and which GPUs a replica gets.
//!
//! [`place`] is a pure function over a [`FleetView`]. Each request is tried against groups of nodes that
//! cannot differ for it ([`index`]): labels decide whether a group may have it ([`filters`], [`affinity`]),
//! free GPUs whether it can ([`grant`]), and the best of those by [`score`] gives its GPUs before the next
//! request is looked at. Later requests of one call so see what earlier ones took. [`make_room`] says
//! which idle replicas have to leave for requests of higher priority that found no place.

mod affinity;
mod filters;
mod grant;
mod index;
mod ledger;
mod preempt;
mod score;
#[cfg(test)]
mod tests;

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use k8s_openapi::api::core::v1::{NodeSelector, PreferredSchedulingTerm};

pub use filters::Misfit;
pub use preempt::{Preemption, Prospect, make_room, preempt};

use crate::spec::{self, MigRequest, PlacementPolicy, RevisionTemplate};

/// The nodes that replicas may be placed on.
#[derive(Debug, Clone, Default)]
pub struct FleetView {
    /// In any order; the result does not depend on it.
    pub nodes: Vec<Node>,
    /// For requests that name no policy.
    pub policy: PlacementPolicy,
}

/// One node as placement sees it.
#[derive(Debug, Clone, Default)]
pub struct Node {
    /// Unique name.
    pub name: String,
    /// False where it is cordoned or draining.
    pub schedulable: bool,
    /// For `nodeSelector` and `nodeAffinity`.
    pub labels: BTreeMap<String, String>,
    /// Its GPUs.
    pub gpus: Vec<Gpu>,
    /// CPU that replicas may request, thousandths of a core; `None` is no limit.
    pub cpu_millis: Option<u64>,
    /// Memory that replicas may request, bytes; `None` is no limit.
    pub memory_bytes: Option<u64>,
    /// Addresses of the models whose files are on its disk, as [`PlacementRequest::model`] names them.
    pub cached: BTreeSet<String>,
    /// What is there already.
    pub taken: Vec<Taken>,
}

/// One GPU.
#[derive(Debug, Clone, Default)]
pub struct Gpu {
    /// Index on its node.
    pub index: u32,
    /// Product name.
    pub product: String,
    /// Frame buffer, bytes.
    pub memory_bytes: u64,
    /// Part of it that is held by processes that are no replicas, bytes. Such a GPU is not given as a whole.
    pub foreign_memory_bytes: u64,
    /// GPUs with the same non-zero number are joined by NVLink.
    pub nvlink_group: u32,
    /// True where MIG mode is on: then only its MIG devices can be used.
    pub mig_enabled: bool,
    /// The parts it is divided into.
    pub mig_devices: Vec<MigDevice>,
}

/// One part of a GPU that is divided by MIG.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MigDevice {
    /// How CUDA names it.
    pub uuid: String,
    /// Such as `1g.10gb`.
    pub profile: String,
    /// `true` if processes that are no replicas hold memory of it. It is not given then.
    pub held_by_others: bool,
}

/// What a replica holds on its node.
#[derive(Debug, Clone, Default)]
pub struct Taken {
    /// Replica name.
    pub replica: String,
    /// Key of its revision.
    pub revision: String,
    /// The GPUs it holds, or holds a part of.
    pub gpu_indices: Vec<u32>,
    /// Part of each GPU's memory that it holds, bytes; `None` is the whole GPU, unless it holds MIG devices.
    pub gpu_memory_bytes: Option<u64>,
    /// UUIDs of the MIG devices that it holds, instead of GPUs.
    pub mig_devices: Vec<String>,
    /// Requested CPU, thousandths of a core.
    pub cpu_millis: u64,
    /// Requested memory, bytes.
    pub memory_bytes: u64,
    /// Who goes first: the higher one.
    pub priority: i32,
    /// Nobody would miss it now: no request runs on it or waits for its revision.
    pub idle: bool,
    /// It drains: what it holds will be free.
    pub leaving: bool,
    /// For whom it goes, where it is idle.
    pub yields: Yields,
    /// What is lost where it goes, seconds of later waiting: of several that would do, the least goes.
    pub worth: f64,
}

/// For whom an idle replica gives up its place.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Yields {
    /// Requests of higher priority.
    #[default]
    ToHigher,
    /// Those of its own priority too, where somebody waits for an answer: it can sleep meanwhile.
    ToAwaited,
    /// All: it sleeps anyhow.
    ToAll,
}

/// What a replica asks for.
#[derive(Debug, Clone, Default)]
pub struct PlacementRequest {
    /// For messages.
    pub replica: String,
    /// Key of its revision.
    pub revision: String,
    /// Number of GPUs, all on one node.
    pub gpus: u32,
    /// Part of one GPU's memory, bytes, instead of whole GPUs.
    pub gpu_memory_bytes: Option<u64>,
    /// MIG devices, instead of whole GPUs.
    pub mig: Option<MigRequest>,
    /// Requested CPU, thousandths of a core.
    pub cpu_millis: u64,
    /// Requested memory, bytes.
    pub memory_bytes: u64,
    /// All of these labels must be there.
    pub node_selector: BTreeMap<String, String>,
    /// `requiredDuringSchedulingIgnoredDuringExecution`.
    pub required_affinity: Option<NodeSelector>,
    /// `preferredDuringSchedulingIgnoredDuringExecution`: weights of terms that match are added up.
    pub preferred_affinity: Vec<PreferredSchedulingTerm>,
    /// `None` is the fleet's.
    pub policy: Option<PlacementPolicy>,
    /// Who goes first: the higher one.
    pub priority: i32,
    /// Address of the model it loads, where it names one: nodes that have it cached are better.
    pub model: Option<String>,
    /// Somebody waits for an answer of it.
    pub awaited: bool,
    /// Names of nodes that it gets only if no other one fits, such as those on which it has failed.
    pub avoid: BTreeSet<String>,
}

impl PlacementRequest {
    /// What the `index`-th new replica of a revision asks for.
    pub fn of(template: &RevisionTemplate, revision: &str, index: u32) -> Self {
        let resources = &template.resources;
        Self {
            replica: format!("{revision}#{index}"),
            revision: revision.to_owned(),
            gpus: resources.gpus,
            gpu_memory_bytes: resources.gpu_memory_bytes,
            mig: resources.mig.clone(),
            cpu_millis: resources.cpu_millis,
            memory_bytes: resources.memory_bytes,
            node_selector: template.node_selector.clone(),
            required_affinity: template.node_affinity.clone(),
            preferred_affinity: template.preferred_node_affinity.clone(),
            policy: spec::placement_policy(&template.annotations),
            priority: spec::priority(&template.annotations),
            model: model_of(template),
            awaited: false,
            avoid: BTreeSet::new(),
        }
    }

    /// What it would hold with this grant.
    pub fn taking(&self, gpu_indices: Vec<u32>, mig_devices: Vec<String>) -> Taken {
        Taken {
            replica: self.replica.clone(),
            revision: self.revision.clone(),
            gpu_indices,
            gpu_memory_bytes: self.gpu_memory_bytes,
            mig_devices,
            cpu_millis: self.cpu_millis,
            memory_bytes: self.memory_bytes,
            priority: self.priority,
            ..Taken::default()
        }
    }

    /// What counts as large: whole GPUs, then MIG devices, then the part of one GPU.
    fn size(&self) -> (u32, u32, u64) {
        let part = self.gpu_memory_bytes;
        let whole = if part.is_some() { 0 } else { self.gpus };
        (whole, self.mig.as_ref().map_or(0, |mig| mig.count), part.unwrap_or(0))
    }
}

/// The address of the first model that a revision loads; `None` where it takes a secret to know it, or
/// the model is in the image.
fn model_of(template: &RevisionTemplate) -> Option<String> {
    match &template.storage.first()?.source {
        spec::StorageSource::Uri(uri) => Some(uri.clone()),
        spec::StorageSource::Entry { .. } => None,
    }
}

impl Taken {
    /// True where anybody may have its place.
    fn makes_way(&self) -> bool {
        self.idle && !self.leaving && self.yields == Yields::ToAll
    }

    /// What a placed replica of a revision holds.
    pub fn of(template: &RevisionTemplate, replica: &str, revision: &str, gpu_indices: Vec<u32>) -> Self {
        let resources = &template.resources;
        Self {
            replica: replica.to_owned(),
            revision: revision.to_owned(),
            gpu_indices,
            gpu_memory_bytes: resources.gpu_memory_bytes,
            cpu_millis: resources.cpu_millis,
            memory_bytes: resources.memory_bytes,
            priority: spec::priority(&template.annotations),
            ..Self::default()
        }
    }
}

/// The answer to one request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    /// The request's replica.
    pub replica: String,
    /// Where it goes, or why nowhere.
    pub outcome: Outcome,
}

/// Where a replica goes, or why nowhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It has a place.
    Placed {
        /// Node name.
        node: String,
        /// The GPUs it gets there, ascending; with MIG, those that its devices are on.
        gpu_indices: Vec<u32>,
        /// UUIDs of the MIG devices it gets, where it asked for such.
        mig_devices: Vec<String>,
    },
    /// No node fits.
    Unplaced(Unplaced),
}

/// How many nodes failed which test.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Unplaced {
    /// Nodes looked at.
    pub nodes: usize,
    /// For each reason, how many nodes failed by it; a node counts for the first test it failed.
    pub misfits: BTreeMap<Misfit, usize>,
}

impl fmt::Display for Unplaced {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.nodes == 0 {
            return f.write_str("no node is connected");
        }
        write!(f, "0/{} nodes fit", self.nodes)?;
        for (index, (misfit, count)) in self.misfits.iter().enumerate() {
            write!(f, "{} {count} {misfit}", if index == 0 { ":" } else { "," })?;
        }
        Ok(())
    }
}

/// Places the requests: those of higher priority first, and among equals the large ones, since small
/// ones fill the gaps. The answers are in the order of the requests. Deterministic; neither the order of
/// nodes matters nor, but for equal requests, that of requests.
pub fn place(fleet: &FleetView, requests: &[PlacementRequest]) -> Vec<Placement> {
    let mut order: Vec<usize> = (0..requests.len()).collect();
    order.sort_by_key(|index| (Reverse(requests[*index].priority), Reverse(requests[*index].size())));
    let mut index = index::Index::of(fleet);
    let mut placements = vec![None; requests.len()];
    for at in order {
        placements[at] = Some(place_one(&mut index, &requests[at]));
    }
    placements.into_iter().flatten().collect()
}

fn place_one<'a>(index: &mut index::Index<'a>, request: &'a PlacementRequest) -> Placement {
    let outcome = match index.choose(request) {
        Ok((node, grant)) => {
            index.take(node, request, &grant);
            let grant::Grant { gpu_indices, mig_devices } = grant;
            Outcome::Placed { node: index.name(node).to_owned(), gpu_indices, mig_devices }
        }
        Err(unplaced) => Outcome::Unplaced(unplaced),
    };
    Placement { replica: request.replica.clone(), outcome }
}

/// True where the devices that a replica has or had are there, and held by nobody else.
pub fn can_have(node: &Node, taken: &Taken) -> bool {
    ledger::Ledger::but(node, |other| other.replica != taken.replica).is_free(taken)
}

/// How many replicas like this one the fleet could hold beside what is taken and does not yield to all.
pub fn capacity(fleet: &FleetView, request: &PlacementRequest) -> u32 {
    /// Beyond this the answer bounds nothing: a replica that asks for no GPU fits without end.
    const MOST: u32 = 100_000;
    let on = |node: &Node| {
        if filters::admits(node, request).is_err() {
            return 0;
        }
        let mut ledger = ledger::Ledger::but(node, |taken| !taken.makes_way());
        let mut count = 0;
        while count < MOST
            && let Ok(grant) = grant::of(&ledger, request)
        {
            if grant.gpu_indices.is_empty() && node.cpu_millis.is_none() && node.memory_bytes.is_none() {
                return MOST;
            }
            ledger.take(request, &grant);
            count += 1;
        }
        count
    };
    fleet.nodes.iter().map(on).fold(0, u32::saturating_add)
}
