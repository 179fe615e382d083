//! `pilotlight node`.

use std::time::Duration;

use pilotlight_proto::control::v1::{
    Join, ListJoinsRequest, ListNodesRequest, Node, NodeAvailability, RevokeNodeRequest, SetNodeAvailabilityRequest,
};

use crate::{
    connect::{Client, ConnectionArgs},
    failure::Failure,
    output, table,
    table::Table,
};

/// Between looks at a node that drains.
const PAUSE: Duration = Duration::from_millis(500);

/// What a node may do.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Place no more replicas on a node; those it has stay.
    Cordon {
        /// Node name.
        name: String,
    },
    /// Move a node's replicas elsewhere, and place none there; waits until it is empty.
    ///
    /// A replica leaves when another one is ready in its stead; at once where the fleet has no room for
    /// another one. The node keeps forwarding requests, and stays drained until `uncordon`.
    Drain {
        /// Node name.
        name: String,
        /// Do not wait.
        #[arg(long)]
        no_wait: bool,
    },
    /// Place replicas on a node again.
    Uncordon {
        /// Node name.
        name: String,
    },
    /// Show when nodes joined, by which token and from where.
    Joins {
        /// Node name [default: all nodes].
        name: Option<String>,
    },
    /// Refuse all certificates that a node holds now; its session and its peer connections end. To let it join again,
    /// make a token with `token create --node NAME --replace`.
    Revoke {
        /// Node name.
        name: String,
    },
}

/// Carries out a command.
pub async fn run(connection: ConnectionArgs, command: Command) -> Result<(), Failure> {
    let mut client = connection.client()?;
    let (name, availability, done) = match &command {
        Command::Cordon { name } => (name, NodeAvailability::Cordoned, "cordoned"),
        Command::Drain { name, .. } => (name, NodeAvailability::Draining, "draining"),
        Command::Uncordon { name } => (name, NodeAvailability::Open, "uncordoned"),
        Command::Joins { name } => {
            let request = ListJoinsRequest { node: name.clone().unwrap_or_default() };
            return output::print(&joins(client.list_joins(request).await?.into_inner().joins));
        }
        Command::Revoke { name } => {
            client.revoke_node(RevokeNodeRequest { name: name.clone() }).await?;
            return output::print(&format!("node/{name} revoked\n"));
        }
    };
    let request = SetNodeAvailabilityRequest { name: name.clone(), availability: availability.into() };
    client.set_node_availability(request).await?;
    output::print(&format!("node/{name} {done}\n"))?;
    match &command {
        Command::Drain { name, no_wait: false } => wait_until_empty(client, name).await,
        _ => Ok(()),
    }
}

fn joins(joins: Vec<Join>) -> String {
    let mut table =
        Table::new(&["NODE", "TIME", "TOKEN", "TOKEN-CREATED-BY", "FROM", "REPLACED", "CERTIFICATE-SHA256"]);
    for join in joins {
        let (time, replaced) = (table::moment(join.time), join.replaced.to_string());
        let by = join.token_created_by;
        table.row([join.node, time, join.token_id, by, join.remote_address, replaced, join.certificate_sha256]);
    }
    table.text()
}

/// Says how many replicas are left whenever that changes.
async fn wait_until_empty(mut client: Client, name: &str) -> Result<(), Failure> {
    let mut left = None;
    loop {
        let nodes = client.list_nodes(ListNodesRequest {}).await?.into_inner().nodes;
        let Some(node) = nodes.into_iter().find(|node| node.name == name) else {
            return Err(anyhow::anyhow!("node {name} not found").into());
        };
        if node.availability() != NodeAvailability::Draining {
            return Err(anyhow::anyhow!("node {name} does not drain any more; somebody has set it otherwise").into());
        }
        if node.replicas == 0 {
            return output::print(&format!("node/{name} drained\n"));
        }
        if left != Some(node.replicas) {
            left = Some(node.replicas);
            output::print(&format!("node/{name} has {} replicas left\n", node.replicas))?;
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Its state and what it may do, as kubectl joins them: `Ready,Cordoned`.
pub fn state(node: &Node) -> String {
    let may = match node.availability() {
        NodeAvailability::Unspecified | NodeAvailability::Open => return node.state.clone(),
        NodeAvailability::Cordoned => "Cordoned",
        NodeAvailability::Draining if node.replicas == 0 => "Drained",
        NodeAvailability::Draining => "Draining",
    };
    format!("{},{may}", node.state)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_says_what_the_node_may_do() {
        let node = |availability: NodeAvailability, replicas| {
            state(&Node { state: "Ready".into(), availability: availability.into(), replicas, ..Default::default() })
        };
        assert_eq!(node(NodeAvailability::Open, 1), "Ready");
        assert_eq!(node(NodeAvailability::Cordoned, 1), "Ready,Cordoned");
        assert_eq!(node(NodeAvailability::Draining, 1), "Ready,Draining");
        assert_eq!(node(NodeAvailability::Draining, 0), "Ready,Drained");
    }
}
