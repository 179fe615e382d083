//! What operators ask of nodes and their GPUs.

use pilotlight_proto::control::v1 as control;
use tonic::Status;

use super::{access::Caller, audit::audited, control::status};
use crate::{
    model::Availability,
    reconcile::{Handle, view, world::World},
};

/// All nodes that have joined.
pub(super) async fn list(handle: &Handle) -> Result<control::ListNodesResponse, Status> {
    let nodes = handle
        .read(|world, now| world.nodes.values().map(|node| view::node(world, node, now)).collect())
        .await
        .map_err(status)?;
    Ok(control::ListNodesResponse { nodes })
}

/// Stores what a node may do.
pub(super) async fn set_availability(
    handle: &Handle,
    caller: &Caller,
    request: control::SetNodeAvailabilityRequest,
) -> Result<control::SetNodeAvailabilityResponse, Status> {
    let availability = match request.availability() {
        control::NodeAvailability::Open => Availability::Open,
        control::NodeAvailability::Cordoned => Availability::Cordoned,
        control::NodeAvailability::Draining => Availability::Draining,
        control::NodeAvailability::Unspecified => {
            return Err(Status::invalid_argument(format!(
                "availability: {}, expected OPEN, CORDONED or DRAINING",
                request.availability
            )));
        }
    };
    let name = request.name;
    let object = format!("Node/{name}={availability:?}");
    let set = async { handle.set_availability(name.clone(), availability).await.map_err(status) };
    audited(caller, "set-availability", &object, set).await?;
    let look = move |world: &World, now| world.nodes.get(&name).map(|node| view::node(world, node, now));
    let node = handle.read(look).await.map_err(status)?;
    Ok(control::SetNodeAvailabilityResponse { node })
}

/// Lets a quarantined GPU take replicas again.
pub(super) async fn unquarantine(
    handle: &Handle,
    caller: &Caller,
    request: control::UnquarantineGpuRequest,
) -> Result<control::UnquarantineGpuResponse, Status> {
    let control::UnquarantineGpuRequest { node, gpu } = request;
    let object = format!("Node/{node}/gpu/{gpu}");
    let clear = async { handle.unquarantine_gpu(node, gpu).await.map_err(status) };
    audited(caller, "unquarantine", &object, clear).await?;
    Ok(control::UnquarantineGpuResponse {})
}
