//! The tests that a node must pass.

use std::fmt;

use super::{Node, PlacementRequest, affinity};

/// Why a node does not fit.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Misfit {
    /// It is cordoned or draining.
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
    /// Too few free MIG devices of the profile.
    Mig {
        /// Such as `1g.10gb`.
        profile: String,
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
            Self::Mig { profile, wanted } => write!(f, "with fewer than {wanted} free nvidia.com/mig-{profile}"),
            Self::GpuMemory { wanted } => write!(f, "without a GPU that has {wanted} bytes of free memory"),
            Self::Cpu => f.write_str("with too little free CPU"),
            Self::Memory => f.write_str("with too little free memory"),
        }
    }
}

/// Whether a node may have the replica by what it is, whatever is free there; and how much its labels
/// are preferred. Looks at nothing but [`Node::schedulable`] and [`affinity::keys`].
pub(super) fn admits(node: &Node, request: &PlacementRequest) -> Result<i64, Misfit> {
    if !node.schedulable {
        return Err(Misfit::Unschedulable);
    }
    if let Some((key, value)) = request.node_selector.iter().find(|(key, value)| node.labels.get(*key) != Some(value)) {
        return Err(Misfit::NodeSelector(format!("{key}={value}")));
    }
    if request.required_affinity.as_ref().is_some_and(|required| !affinity::selects(required, node)) {
        return Err(Misfit::NodeAffinity);
    }
    Ok(affinity::preference(request, node))
}
