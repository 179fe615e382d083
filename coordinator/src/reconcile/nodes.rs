//! Cordoning, draining and deleting nodes.

use jiff::Timestamp;
use tracing::info;

use super::{
    commands::CommandError,
    metering,
    plan::{Gone, Plan},
    run::{Reconciler, WRITES_AT_ONCE},
};
use crate::{
    model::{Availability, NodeRecord, keys},
    store::Transaction,
};

impl Reconciler {
    /// Stores what a node may do. The plan does the rest: replicas of a draining node are replaced
    /// elsewhere and then leave, and whoever waits for a place may find one on a node that is open again.
    pub(super) async fn set_availability(
        &mut self,
        name: &str,
        availability: Availability,
    ) -> Result<(), CommandError> {
        let node = self.world.nodes.get(name).ok_or_else(|| CommandError::NodeNotFound(name.to_owned()))?;
        if node.record.availability == availability {
            return Ok(());
        }
        let record = NodeRecord { availability, ..node.record.clone() };
        self.commit(Transaction::new().put_json(&keys::node(name), &record)).await?;
        let Some(node) = self.world.nodes.get_mut(name) else { return Ok(()) };
        node.record = record;
        let replicas = node.replicas.iter().filter_map(|name| self.world.replicas.get(name));
        self.dirty.revisions.extend(replicas.map(|replica| replica.record.revision.clone()));
        self.dirty.waiting_for_a_place(&self.world);
        info!(node = %name, ?availability, "availability set");
        Ok(())
    }

    /// Removes a node that is not connected, its replicas, and what operators asked for of models on it. Returns the
    /// names of those replicas; they are replaced elsewhere.
    pub(super) async fn delete_node(&mut self, name: &str, now: Timestamp) -> Result<Vec<String>, CommandError> {
        let node = self.world.nodes.get(name).ok_or_else(|| CommandError::NodeNotFound(name.to_owned()))?;
        if node.session.is_some() {
            return Err(CommandError::NodeConnected(name.to_owned()));
        }
        let replicas: Vec<String> = node.replicas.iter().cloned().collect();
        let records = replicas.iter().filter_map(|replica| self.world.replicas.get(replica));
        let revisions: Vec<_> = records.map(|replica| replica.record.revision.clone()).collect();
        let forget = replicas.iter().map(|replica| (replica.clone(), Gone::NodeDeleted)).collect();
        self.carry_out(Plan { forget, ..Plan::default() }, now).await?;
        let asked = self.world.asked.keys().filter(|(node, _)| node.as_deref() == Some(name));
        let asked: Vec<_> = asked.cloned().collect();
        for chunk in asked.chunks(WRITES_AT_ONCE) {
            let write = chunk
                .iter()
                .fold(Transaction::new(), |write, (node, uri)| write.delete(&keys::model(node.as_deref(), uri)));
            self.commit(write).await?;
            for key in chunk {
                self.world.asked.remove(key);
            }
        }
        self.commit(Transaction::new().delete(&keys::node(name))).await?;
        self.world.nodes.remove(name);
        self.meter.delete_node(name, metering::clock(now));
        for revision in self.world.revisions.values_mut() {
            revision.waiting.remove(name);
        }
        self.dirty.nodes.remove(name);
        self.dirty.revisions.extend(revisions);
        self.dirty.waiting_for_a_place(&self.world);
        self.dirty.peers = true;
        info!(node = %name, replicas = replicas.len(), "node deleted");
        Ok(replicas)
    }
}
