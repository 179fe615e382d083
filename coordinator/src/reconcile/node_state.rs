//! One node, as the control loop knows it.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::Duration,
};

use jiff::Timestamp;
use pilotlight_proto::fleet::v1 as fleet;

use super::{
    warmth::Shelf,
    world::{Event, since},
};
use crate::{
    fleet::SessionHandle,
    model::{Availability, NodeRecord, ReplicaRecord},
    quarantine::Quarantine,
};

/// One node.
#[derive(Debug)]
pub struct NodeState {
    /// As stored.
    pub record: NodeRecord,
    /// The open session, if there is one.
    pub session: Option<SessionHandle>,
    /// What it said of itself when it connected.
    pub hello: fleet::Hello,
    /// What it has; `None` until it said so.
    pub inventory: Option<fleet::Inventory>,
    /// What it last reported of its GPUs; `None` until then, and if it reports nothing.
    pub gpu_report: Option<fleet::GpuReport>,
    /// When that report came; meaningless without one.
    pub gpu_reported_at: Timestamp,
    /// What has happened to it lately, oldest first. In memory only.
    pub events: VecDeque<Event>,
    /// Models on its disk, as it said last.
    pub cached: fleet::CacheReport,
    /// And what is to be done with them.
    pub shelf: Shelf,
    /// True once its agent has told, in this coordinator's life, what runs there.
    pub heard: bool,
    /// When a message last came. For one that has not been heard from in this coordinator's life: when that life began.
    pub last_seen: Timestamp,
    /// Replicas placed there.
    pub replicas: BTreeSet<String>,
    /// Replicas that were placed there when it was lost: they may still run when it returns.
    pub left_behind: BTreeMap<String, ReplicaRecord>,
    /// Version of the last assignment sent.
    pub assignment_version: u64,
    /// Version of the last routes that it said it routes by, in this session.
    pub routes_applied: u64,
}

impl NodeState {
    /// A node that is known but has not been heard from.
    pub fn unheard(record: NodeRecord, now: Timestamp) -> Self {
        Self {
            record,
            session: None,
            hello: fleet::Hello::default(),
            inventory: None,
            gpu_report: None,
            gpu_reported_at: now,
            events: VecDeque::new(),
            cached: fleet::CacheReport::default(),
            shelf: Shelf::default(),
            heard: false,
            last_seen: now,
            replicas: BTreeSet::new(),
            left_behind: BTreeMap::new(),
            assignment_version: 0,
            routes_applied: 0,
        }
    }

    /// Returns `true` if it has been silent for longer than its lease, with or without an open session: a frozen agent keeps
    /// its connections.
    pub fn lost(&self, lease: Duration, now: Timestamp) -> bool {
        since(self.last_seen, now) > lease
    }

    /// Takes in how long the open session has been silent.
    pub fn observe_silence(&mut self, now: Timestamp) {
        if let Some(session) = &self.session {
            self.last_seen = self.last_seen.max(now - session.silence());
        }
    }

    /// Why one of its GPUs takes no replicas; `None` if it does.
    pub fn quarantine(&self, index: u32) -> Option<&Quarantine> {
        if self.record.gpus.is_empty() {
            return None;
        }
        let gpu = self.inventory.as_ref()?.gpus.iter().find(|gpu| gpu.index == index)?;
        self.record.gpus.get(&gpu.uuid)?.quarantine.as_ref()
    }

    /// Why a replica that is placed here has to move elsewhere because of its GPUs: the GPU, and what is wrong with it. If
    /// several are quarantined, one on which it cannot go on comes first.
    pub fn quarantine_of(&self, replica: &ReplicaRecord) -> Option<(u32, &Quarantine)> {
        let quarantined = replica.gpu_indices.iter().filter_map(|index| Some((*index, self.quarantine(*index)?)));
        quarantined.min_by_key(|(index, quarantine)| (!quarantine.stops_work, *index))
    }

    /// Returns `true` if replicas may have to move away from here.
    pub fn moves_replicas(&self) -> bool {
        self.record.availability == Availability::Draining
            || self.record.gpus.values().any(|gpu| gpu.quarantine.is_some())
    }

    /// What was last reported of the health of one of its GPUs.
    pub fn gpu_health(&self, index: u32) -> Option<&fleet::GpuHealth> {
        self.gpu_report.as_ref()?.gpus.iter().find(|gpu| gpu.index == index)
    }
}
