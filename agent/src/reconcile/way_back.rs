//! How a replica that calls its service's predictor gets there.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use pilotlight_proto::fleet::v1::{EnvVar, ReplicaAssignment};

use crate::{
    endpoint::{Egress, EgressListener},
    runtime::RuntimeError,
};

/// The variable that says where the predictor is; the coordinator's default arguments name it.
const PREDICTOR_HOST: &str = "PILOTLIGHT_PREDICTOR_HOST";

/// The listener of one replica; it lives as long as the replica is tended, over restarts of its process.
pub(super) struct WayBack {
    egress: Arc<dyn Egress>,
    listener: Option<EgressListener>,
}

impl WayBack {
    pub(super) fn new(egress: Arc<dyn Egress>) -> Self {
        Self { egress, listener: None }
    }

    /// The assignment with the listener's address in it, as replicas reach it at `ip`; unchanged where the
    /// replica calls nobody.
    pub(super) async fn prepare(
        &mut self,
        mut assignment: ReplicaAssignment,
        ip: IpAddr,
    ) -> Result<ReplicaAssignment, RuntimeError> {
        if assignment.predictor_host.is_empty() {
            return Ok(assignment);
        }
        let address = match &self.listener {
            Some(listener) => listener.address,
            None => self.open(&assignment.predictor_host, SocketAddr::new(ip, 0)).await?,
        };
        let env = &mut assignment.container.get_or_insert_default().env;
        env.retain(|var| var.name != PREDICTOR_HOST);
        // First, so that the manifest's own variables can refer to it.
        env.insert(0, EnvVar { name: PREDICTOR_HOST.to_owned(), value: address.to_string() });
        Ok(assignment)
    }

    /// Opens the listener of a replica that runs already, where that replica looks for it.
    pub(super) async fn reopen(&mut self, assignment: &ReplicaAssignment) -> Result<(), RuntimeError> {
        let env = assignment.container.iter().flat_map(|container| &container.env);
        let address = env.filter(|var| var.name == PREDICTOR_HOST).find_map(|var| var.value.parse().ok());
        match address {
            Some(address) if !assignment.predictor_host.is_empty() => {
                self.open(&assignment.predictor_host, address).await.map(drop)
            }
            _ => Ok(()),
        }
    }

    async fn open(&mut self, host: &str, address: SocketAddr) -> Result<SocketAddr, RuntimeError> {
        let opened = self.egress.open(host, address).await;
        let listener =
            opened.map_err(|error| RuntimeError::Start { program: format!("a listener for {host}"), error })?;
        Ok(self.listener.insert(listener).address)
    }
}
