//! The tests that a node must pass, and which GPUs it would give.

use std::{collections::BTreeMap, fmt};

use k8s_openapi::api::core::v1::{NodeSelector, NodeSelectorRequirement, NodeSelectorTerm};

use super::{Gpu, Node, PlacementRequest, gpus::Ledger};

/// Why a node does not fit.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Misfit {
    /// It is cordoned.
    Unschedulable,
    /// A label of `nodeSelector` is missing or other.
    NodeSelector(String),
    /// No term of the required node affinity matches.
    NodeAffinity,
    /// Too few free GPUs.
    Gpus {
        /// Asked for.
        wanted: u32,
    },
    /// No GPU with enough free memory.
    GpuMemory {
        /// Asked for, bytes.
        wanted: u64,
    },
    /// Too little CPU.
    Cpu,
    /// Too little memory.
    Memory,
}

impl fmt::Display for Misfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unschedulable => f.write_str("cordoned"),
            Self::NodeSelector(label) => write!(f, "did not match nodeSelector {label}"),
            Self::NodeAffinity => f.write_str("did not match the required node affinity"),
            Self::Gpus { wanted } => write!(f, "with fewer than {wanted} free GPUs"),
            Self::GpuMemory { wanted } => write!(f, "without a GPU that has {wanted} bytes of free memory"),
            Self::Cpu => f.write_str("with too little free CPU"),
            Self::Memory => f.write_str("with too little free memory"),
        }
    }
}

/// The GPUs that the node would give, or the first test that it fails.
pub(super) fn fit(ledger: &Ledger<'_>, request: &PlacementRequest) -> Result<Vec<u32>, Misfit> {
    let node = ledger.node;
    if !node.schedulable {
        return Err(Misfit::Unschedulable);
    }
    if let Some((key, value)) = request.node_selector.iter().find(|(key, value)| node.labels.get(*key) != Some(value)) {
        return Err(Misfit::NodeSelector(format!("{key}={value}")));
    }
    if let Some(required) = &request.required_affinity
        && !selects(required, node)
    {
        return Err(Misfit::NodeAffinity);
    }
    if !ledger.cpu_fits(request.cpu_millis) {
        return Err(Misfit::Cpu);
    }
    if !ledger.memory_fits(request.memory_bytes) {
        return Err(Misfit::Memory);
    }
    match request.gpu_memory_bytes {
        Some(bytes) => shared_gpu(ledger, bytes),
        None => whole_gpus(ledger, request.gpus),
    }
}

/// The fullest GPU that still has room, so that whole ones stay whole.
fn shared_gpu(ledger: &Ledger<'_>, bytes: u64) -> Result<Vec<u32>, Misfit> {
    let tightest = ledger.with_free(bytes).min_by_key(|(gpu, free)| (*free, gpu.index));
    tightest.map(|(gpu, _)| vec![gpu.index]).ok_or(Misfit::GpuMemory { wanted: bytes })
}

/// Whole GPUs, of one NVLink group where one is large enough, and of the smallest such group.
fn whole_gpus(ledger: &Ledger<'_>, wanted: u32) -> Result<Vec<u32>, Misfit> {
    let count = wanted as usize;
    if count == 0 {
        return Ok(Vec::new());
    }
    let mut free: Vec<&Gpu> = ledger.whole_free().collect();
    if free.len() < count {
        return Err(Misfit::Gpus { wanted });
    }
    free.sort_by_key(|gpu| gpu.index);
    let mut groups: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    for gpu in free.iter().filter(|gpu| gpu.nvlink_group != 0) {
        groups.entry(gpu.nvlink_group).or_default().push(gpu.index);
    }
    let group = groups.into_values().filter(|group| group.len() >= count).min_by_key(Vec::len);
    let mut chosen = match group {
        Some(group) if count > 1 => group,
        _ => free.iter().map(|gpu| gpu.index).collect(),
    };
    chosen.truncate(count);
    Ok(chosen)
}

/// Kubernetes: terms are OR, a term without expressions and fields matches nothing.
fn selects(selector: &NodeSelector, node: &Node) -> bool {
    selector.node_selector_terms.iter().any(|term| matches_term(term, node))
}

/// Within a term, expressions and fields are AND.
fn matches_term(term: &NodeSelectorTerm, node: &Node) -> bool {
    let expressions = term.match_expressions.as_deref().unwrap_or_default();
    let fields = term.match_fields.as_deref().unwrap_or_default();
    if expressions.is_empty() && fields.is_empty() {
        return false;
    }
    let by_label = |requirement: &NodeSelectorRequirement| matches(requirement, node.labels.get(&requirement.key));
    let by_field = |requirement: &NodeSelectorRequirement| {
        // The only field that Kubernetes knows.
        requirement.key == "metadata.name" && matches(requirement, Some(&node.name))
    };
    expressions.iter().all(by_label) && fields.iter().all(by_field)
}

fn matches(requirement: &NodeSelectorRequirement, actual: Option<&String>) -> bool {
    let values = requirement.values.as_deref().unwrap_or_default();
    let compare = |holds: fn(i64, i64) -> bool| {
        let bound = values.first().and_then(|value| value.parse().ok());
        let actual = actual.and_then(|value| value.parse().ok());
        actual.zip(bound).is_some_and(|(actual, bound)| holds(actual, bound))
    };
    match requirement.operator.as_str() {
        "In" => actual.is_some_and(|actual| values.contains(actual)),
        "NotIn" => actual.is_none_or(|actual| !values.contains(actual)),
        "Exists" => actual.is_some(),
        "DoesNotExist" => actual.is_none(),
        "Gt" => compare(|actual, bound| actual > bound),
        "Lt" => compare(|actual, bound| actual < bound),
        _ => false,
    }
}
