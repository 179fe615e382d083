//! Cordoning and draining nodes.

use tracing::info;

use super::{commands::CommandError, run::Reconciler};
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
}
