//! What was planned, carried out: written in steps that each hold on their own, and the world follows.

use jiff::Timestamp;
use tracing::{Instrument as _, info_span};

use super::{
    commands::CommandError,
    metering::{self, MAX_REMOVALS_PER_WRITE},
    plan::{Create, Gone, Leaving, Plan},
    run::{Reconciler, WRITES_AT_ONCE},
    warmth,
    world::Event,
};
use crate::{
    model::{ReplicaRecord, RevisionKey, keys},
    store::{StoreError, Transaction},
};

impl Reconciler {
    /// Writes the plan in steps that each hold on their own, and changes the world after each.
    pub(super) async fn carry_out(&mut self, plan: Plan, now: Timestamp) -> Result<(), StoreError> {
        for gone in plan.forget.chunks(MAX_REMOVALS_PER_WRITE) {
            self.commit_removal(gone, now).await?;
            for (name, why) in gone {
                self.forget(name, *why, now);
            }
        }
        let leaving: Vec<_> = plan.leaving().collect();
        for leaving in leaving.chunks(WRITES_AT_ONCE) {
            let mut write = Transaction::new();
            for record in leaving.iter().filter_map(|(name, _)| self.world.replicas.get(*name)).map(|r| &r.record) {
                let drained = ReplicaRecord { draining: true, ..record.clone() };
                write = write.put_json(&keys::replica(&record.name), &drained);
            }
            self.commit(write).await?;
            for (name, why) in leaving {
                self.drain(name, why, now);
            }
        }
        self.change_sleep(&plan, now).await?;
        for creates in plan.create.chunks(WRITES_AT_ONCE) {
            let records: Vec<_> = creates.iter().filter_map(|create| self.record_of(create, now)).collect();
            let write = records.iter().fold(Transaction::new(), |write, record| {
                let key = keys::replica(&record.name);
                write.expect_absent(&key).put_json(&key, record)
            });
            let span = info_span!("placement.assign", otel.kind = "internal", replicas = records.len());
            self.commit(write).instrument(span).await?;
            for record in records {
                self.place(record, now);
            }
        }
        Ok(())
    }

    /// Looks anew at how warm each node keeps what nobody needs now.
    pub(super) async fn keep_warm(&mut self, now: Timestamp) -> Result<(), StoreError> {
        let users = warmth::users(&self.world);
        let looks: Vec<_> =
            self.world.nodes.values().map(|node| warmth::look(&self.world, node, &users, now)).collect();
        let names: Vec<_> = self.world.nodes.keys().cloned().collect();
        let mut plan = Plan::default();
        for (name, look) in names.into_iter().zip(looks) {
            for (replica, worth) in look.worth {
                if let Some(replica) = self.world.replicas.get_mut(&replica) {
                    replica.worth = worth;
                }
            }
            plan.cool.extend(look.leave);
            if let Some(node) = self.world.nodes.get_mut(&name).filter(|node| node.shelf != look.shelf) {
                node.shelf = look.shelf;
                self.dirty.nodes.insert(name);
            }
        }
        self.carry_out(plan, now).await
    }

    /// Has sleepers leave.
    pub(super) async fn let_go(&mut self, replicas: Vec<String>, now: Timestamp) -> Result<(), CommandError> {
        let sleeps = |name: &String| {
            // One that leaves already is not told again.
            self.world.replicas.get(name).is_some_and(|replica| replica.record.asleep && !replica.record.draining)
        };
        let plan = Plan { cool: replicas.into_iter().filter(sleeps).collect(), ..Plan::default() };
        Ok(self.carry_out(plan, now).await?)
    }

    /// Writes who sleeps and who wakes.
    async fn change_sleep(&mut self, plan: &Plan, now: Timestamp) -> Result<(), StoreError> {
        let sleep = plan.sleep.iter().map(|name| (name, true, None));
        let yields = plan.yields.iter().map(|(name, by)| (name, true, Some(by)));
        let wake = plan.wake.iter().map(|name| (name, false, None));
        let changes: Vec<_> = sleep.chain(yields).chain(wake).collect();
        for changes in changes.chunks(WRITES_AT_ONCE) {
            let mut write = Transaction::new();
            for (name, asleep, _) in changes {
                let Some(replica) = self.world.replicas.get(*name) else { continue };
                let record = ReplicaRecord { asleep: *asleep, ..replica.record.clone() };
                write = write.put_json(&keys::replica(name), &record);
            }
            self.commit(write).await?;
            for (name, asleep, by) in changes {
                self.set_asleep(name, *asleep, *by, now);
            }
        }
        Ok(())
    }

    fn set_asleep(&mut self, name: &str, asleep: bool, by: Option<&RevisionKey>, now: Timestamp) {
        let Some(replica) = self.world.replicas.get_mut(name) else { return };
        replica.record.asleep = asleep;
        replica.yielded = asleep && by.is_some();
        let record = replica.record.clone();
        if !asleep && let Some(revision) = self.world.revisions.get(&record.revision) {
            replica.trace = revision.trace.clone();
        }
        let service = self.world.component_of(&record);
        let (reason, message) = match by {
            _ if !asleep => ("Waking", "is woken".to_owned()),
            Some(by) => ("MakingRoom", format!("idle, and {by} needs its GPUs: sleeps meanwhile")),
            None => ("FallingAsleep", "takes no new requests, then sleeps".to_owned()),
        };
        let object = format!("Replica/{name}");
        self.world.note(&service, Event { time: now, warning: false, reason, object, message });
        self.dirty.metered.insert(name.to_owned());
        self.dirty.nodes.insert(record.node);
        self.dirty.services.insert(service);
    }

    fn record_of(&self, create: &Create, now: Timestamp) -> Option<ReplicaRecord> {
        let revision = &self.world.revisions.get(&create.revision)?.record;
        let inventory = self.world.nodes.get(&create.node)?.inventory.as_ref()?;
        let first = create.gpu_indices.first();
        let gpu = first.and_then(|index| inventory.gpus.iter().find(|gpu| gpu.index == *index));
        let profile = revision.template.resources.mig.as_ref().map(|mig| format!(" MIG {}", mig.profile));
        let class = gpu.map(|gpu| gpu.product.clone() + &profile.unwrap_or_default());
        let suffix = uuid::Uuid::new_v4().simple().to_string();
        Some(ReplicaRecord {
            name: format!("{}-{}", revision.name, &suffix[..8]),
            namespace: revision.namespace.clone(),
            service: revision.service.clone(),
            revision: create.revision.clone(),
            node: create.node.clone(),
            gpu_indices: create.gpu_indices.clone(),
            mig_devices: create.mig_devices.clone(),
            gpu_class: class.unwrap_or_default(),
            created_at: now,
            draining: false,
            asleep: create.asleep,
        })
    }

    fn place(&mut self, record: ReplicaRecord, now: Timestamp) {
        let trace = self.world.revisions.get(&record.revision).map(|r| r.trace.clone()).unwrap_or_default();
        let service = self.world.component_of(&record);
        let parts = match record.mig_devices.as_slice() {
            [] => String::new(),
            devices => format!(", of them only {}", devices.join(", ")),
        };
        let purpose = if record.asleep { ", to sleep there once it is loaded" } else { "" };
        let indices: Vec<_> = record.gpu_indices.iter().map(ToString::to_string).collect();
        let gpus = match indices.as_slice() {
            [] => String::new(),
            [one] => format!(" with GPU {one}"),
            several => format!(" with GPUs {}", several.join(", ")),
        };
        let message = format!("placed on node {}{gpus}{parts}{purpose}", record.node);
        let object = format!("Replica/{}", record.name);
        self.world.note(&service, Event { time: now, warning: false, reason: "Scheduled", object, message });
        if let Some(revision) = self.world.revisions.get_mut(&record.revision) {
            revision.failures.clear();
        }
        self.dirty.nodes.insert(record.node.clone());
        self.dirty.services.insert(service);
        self.world.insert_replica(record.clone(), trace);
        metering::open(&mut self.meter, &self.world, &record, now);
    }

    fn drain(&mut self, name: &str, why: &Leaving, now: Timestamp) {
        let Some(replica) = self.world.replicas.get_mut(name) else { return };
        replica.record.draining = true;
        let record = replica.record.clone();
        let service = self.world.component_of(&record);
        let (warning, reason, why) = match why {
            Leaving::ScaledDown => (false, "Draining", String::new()),
            Leaving::Failing => {
                let message = format!("fails again and again on node {}, another one replaces it: ", record.node);
                (true, "BackOff", message)
            }
            Leaving::MovedOff => {
                let node = self.world.nodes.get(&record.node);
                match node.and_then(|node| node.quarantine_of(&record)) {
                    Some((gpu, quarantine)) => {
                        let why = format!("GPU {gpu} of node {} is quarantined: {}; ", record.node, quarantine.message);
                        (true, "GpuQuarantined", why)
                    }
                    None => (false, "NodeDrained", format!("node {} drains: ", record.node)),
                }
            }
            Leaving::Cooled => {
                (false, "Cooled", format!("asleep, and node {} needs its room for other models: ", record.node))
            }
            Leaving::Evicted(by) if record.asleep => {
                (false, "Preempted", format!("asleep, and {by} needs its place: "))
            }
            Leaving::Evicted(by) => (true, "Preempted", format!("idle, and {by} of higher priority needs its place: ")),
        };
        let message = format!("{why}takes no new requests, then stops");
        self.dirty.nodes.insert(record.node.clone());
        self.world.note(&service, Event { time: now, warning, reason, object: format!("Replica/{name}"), message });
        self.dirty.services.insert(service);
    }

    fn forget(&mut self, name: &str, why: Gone, now: Timestamp) {
        let Some(record) = self.world.remove_replica(name) else { return };
        let service = self.world.component_of(&record);
        if why == Gone::NodeLost
            && let Some(node) = self.world.nodes.get_mut(&record.node).filter(|_| !record.draining)
        {
            node.left_behind.insert(record.name.clone(), record.clone());
        }
        if why != Gone::Stopped {
            if let Some(revision) = self.world.revisions.get_mut(&record.revision) {
                // Its last attempt ended with the node.
                revision.failures.clear();
            }
            let (reason, message) = match why {
                Gone::NodeDeleted => ("NodeDeleted", format!("node {} was deleted", record.node)),
                _ => ("NodeLost", format!("node {} is silent for longer than its lease", record.node)),
            };
            let object = format!("Replica/{name}");
            self.world.note(&service, Event { time: now, warning: true, reason, object, message });
        }
        self.dirty.nodes.insert(record.node);
        self.dirty.services.insert(service);
        // Its place is free now.
        self.dirty.waiting_for_a_place(&self.world);
        self.tidy_up(&record.revision);
    }

    /// A deleted service's revision leaves memory with its last replica.
    fn tidy_up(&mut self, key: &str) {
        let Some(revision) = self.world.revisions.get(key) else { return };
        let orphaned = !self.world.services.contains_key(&revision.record.service_key());
        if orphaned && revision.replicas.is_empty() {
            self.world.revisions.remove(key);
        }
    }
}
