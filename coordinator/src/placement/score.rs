//! Which of the nodes that fit is best. The fields, in order, are the policy; less is better.

use std::cmp::Reverse;

use super::{PlacementRequest, grant::Grant, ledger::Ledger};
use crate::spec::PlacementPolicy;

/// A node's order for one request.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Score {
    /// What the manifest prefers goes before what is good for the fleet: the sum of matching weights.
    preference: Reverse<i64>,
    /// A replica that needs no GPU leaves GPU nodes to those that do.
    gpu_node_wasted: bool,
    /// Several GPUs of one replica talk to each other: NVLink before PCIe.
    gpus_apart: bool,
    /// Policy `spread` only: replicas of the revision that are there. Before gravity, which would pull
    /// them all to one node.
    crowding: u32,
    /// Data gravity: the weights are here already.
    model_absent: bool,
    /// A part of a GPU goes where parts are, so that whole ones stay whole; not with `spread`.
    opens_gpu: bool,
    /// `binpack` fills nodes up, so that large requests find empty ones; `spread` takes the emptiest.
    gpus_left: i64,
    /// The same within a GPU: memory or MIG devices left.
    room_left: i128,
    /// What is equal so far may as well survive the loss of a node.
    same_revision: u32,
    /// By name, so that the answer is always the same.
    order: usize,
}

/// What a score is made of beside the ledger.
pub(super) struct Candidate<'a> {
    pub(super) ledger: &'a Ledger<'a>,
    pub(super) grant: &'a Grant,
    /// See [`super::filters::admits`].
    pub(super) preference: i64,
    /// Place in the order of names.
    pub(super) order: usize,
}

impl Score {
    pub(super) fn of(candidate: &Candidate<'_>, request: &PlacementRequest, policy: PlacementPolicy) -> Self {
        let Candidate { ledger, grant, preference, order } = candidate;
        let spread = policy == PlacementPolicy::Spread;
        let same_revision = ledger.replicas_of(&request.revision);
        let given = || ledger.gpus.iter().filter(|state| grant.gpu_indices.contains(&state.gpu.index));
        let whole = request.mig.is_none() && request.gpu_memory_bytes.is_none();
        let opens = request.gpu_memory_bytes.is_some() && given().any(|state| state.untouched);
        let taken = if whole { grant.gpu_indices.len() } else { usize::from(opens) };
        let gpus_left = ledger.whole_free().count().saturating_sub(taken) as i64;
        let room_left = match (&request.mig, request.gpu_memory_bytes) {
            (Some(mig), _) => ledger.gpus.iter().map(|state| state.free_devices(&mig.profile).count() as i128).sum(),
            (None, Some(bytes)) => given().map(|state| i128::from(state.free) - i128::from(bytes)).sum(),
            (None, None) => 0,
        };
        Self {
            preference: Reverse(*preference),
            gpu_node_wasted: grant.gpu_indices.is_empty() && !ledger.node.gpus.is_empty(),
            gpus_apart: whole && apart(given().map(|state| state.gpu.nvlink_group)),
            crowding: if spread { same_revision } else { 0 },
            model_absent: request.model.as_ref().is_some_and(|model| !ledger.node.cached.contains(model)),
            opens_gpu: opens && !spread,
            gpus_left: if spread { -gpus_left } else { gpus_left },
            room_left: if spread { -room_left } else { room_left },
            same_revision,
            order: *order,
        }
    }
}

/// True where some of several GPUs do not reach each other over NVLink.
fn apart(mut groups: impl Iterator<Item = u32>) -> bool {
    let Some(first) = groups.next() else { return false };
    groups.any(|group| group != first || first == 0)
}
