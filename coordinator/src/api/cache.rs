//! Models and images on nodes' disks: what operators ask for.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use pilotlight_proto::{
    control::v1 as control,
    fleet::v1::{self as fleet, coordinator_message::Message as ToAgent},
};
use tonic::Status;

use super::control::status;
use crate::{
    fleet::{EvictHub, SessionHandle},
    model::WarmRung,
    reconcile::{
        Handle, World,
        shelf::{self, ModelChange},
    },
};

/// How long agents have to remove a model.
const PATIENCE: Duration = Duration::from_secs(30);
/// Between looks whether those that were to leave have left.
const LOOK: Duration = Duration::from_millis(50);

/// Keeps a model or an image on nodes.
pub(super) async fn warm(
    handle: &Handle,
    request: control::WarmModelRequest,
) -> Result<control::WarmModelResponse, Status> {
    let control::WarmModelRequest { uri, node, rung, service } = request;
    let rung = match rung.as_str() {
        "Cached" => WarmRung::Cached,
        "Staged" => WarmRung::Staged,
        _ => return Err(Status::invalid_argument(format!("rung: {rung:?}, expected Cached or Staged"))),
    };
    if shelf::is_image(&uri) && rung != WarmRung::Cached {
        return Err(Status::invalid_argument(format!("rung: images are {:?} only", WarmRung::Cached)));
    }
    let service = given(service);
    if service.as_ref().is_some_and(|service| service.split('/').filter(|part| !part.is_empty()).count() != 2) {
        let message = format!("service: {:?}, expected <namespace>/<name>", service.unwrap_or_default());
        return Err(Status::invalid_argument(message));
    }
    if shelf::is_image(&uri) {
        shelf::check_address(&uri).map_err(Status::invalid_argument)?;
        let on = given(node.clone());
        let may = handle.read(move |world, _| shelf::may_pull_images(world, on.as_deref())).await.map_err(status)?;
        if !may {
            let message = "is the name of an image, since it has no scheme, and no node there has a container engine";
            return Err(Status::failed_precondition(format!("uri: {uri:?} {message}")));
        }
    }
    change(handle, uri, node, ModelChange::Warm { rung, service }).await?;
    Ok(control::WarmModelResponse {})
}

/// Keeps a model from being removed, or not any more.
pub(super) async fn pin(
    handle: &Handle,
    request: control::PinModelRequest,
) -> Result<control::PinModelResponse, Status> {
    change(handle, request.uri, request.node, ModelChange::Pin(request.pinned)).await?;
    Ok(control::PinModelResponse {})
}

/// Takes back what was asked for, and has agents remove a model.
pub(super) async fn evict(
    handle: &Handle,
    hub: &Arc<EvictHub>,
    request: control::EvictModelRequest,
) -> Result<control::EvictModelResponse, Status> {
    let control::EvictModelRequest { uri, node } = request;
    let asked = change(handle, uri.clone(), node.clone(), ModelChange::Forget).await?;
    let_sleepers_go(handle, &uri, &given(node.clone())).await?;
    let address = uri.clone();
    let places = handle
        .read(move |world, _| {
            let holders = shelf::holders(world, &address, given(node).as_deref());
            // Those that were to fetch it may have a part of it.
            let nodes = holders.union(&asked).filter_map(|name| world.nodes.get(name));
            let place = |node: &crate::reconcile::world::NodeState| Place {
                sleepers: shelf::sleepers(world, &node.record.name, &address),
                has_it: holders.contains(&node.record.name),
                session: node.session.clone(),
                node: node.record.name.clone(),
            };
            nodes.map(place).collect::<Vec<_>>()
        })
        .await
        .map_err(status)?;
    let removing = places.into_iter().map(|place| remove(place, &uri, hub));
    let nodes = futures::future::join_all(removing).await;
    Ok(control::EvictModelResponse { nodes: nodes.into_iter().flatten().collect() })
}

/// Replicas that sleep and have the model leave first; those that are promised stay, and so does the model.
async fn let_sleepers_go(handle: &Handle, uri: &str, node: &Option<String>) -> Result<(), Status> {
    let began = tokio::time::Instant::now();
    let mut told: BTreeSet<String> = BTreeSet::new();
    loop {
        let (address, node, before) = (uri.to_owned(), node.clone(), told.clone());
        let look = move |world: &World, _| {
            // One that stops does not sleep any more, and still has the model.
            let leaves = |name: &String| world.replicas.get(name).is_some_and(|replica| replica.record.draining);
            (shelf::evictable(world, node.as_deref(), &address), before.iter().any(leaves))
        };
        let (sleepers, some_leave) = handle.read(look).await.map_err(status)?;
        // What has not left by then is named in the answer.
        if (sleepers.is_empty() && !some_leave) || began.elapsed() > PATIENCE {
            return Ok(());
        }
        if !sleepers.is_empty() {
            told.extend(sleepers.iter().cloned());
            handle.let_go(sleepers).await.map_err(status)?;
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// A node that may have a model.
struct Place {
    node: String,
    /// True where it said that it has the whole of it.
    has_it: bool,
    sleepers: Vec<String>,
    session: Option<SessionHandle>,
}

/// Has one node remove a model. `None` where there was nothing of it.
async fn remove(place: Place, uri: &str, hub: &Arc<EvictHub>) -> Option<control::EvictedModel> {
    let stays = |error: String| control::EvictedModel { node: place.node.clone(), freed_bytes: 0, error };
    if !place.sleepers.is_empty() {
        return Some(stays(format!("in use by replicas that sleep: {}", place.sleepers.join(", "))));
    }
    let away = || place.has_it.then(|| stays("the node is not connected".to_owned()));
    let Some(session) = &place.session else { return away() };
    let mut asked = hub.open();
    if !session.tell(ToAgent::EvictModel(fleet::EvictModel { request_id: asked.id, uri: uri.to_owned() })) {
        return away();
    }
    match tokio::time::timeout(PATIENCE, asked.answer()).await {
        Ok(Some(answer)) if answer.error.is_empty() => {
            let freed = control::EvictedModel { freed_bytes: answer.freed_bytes, ..stays(String::new()) };
            (place.has_it || answer.freed_bytes > 0).then_some(freed)
        }
        Ok(Some(answer)) => Some(stays(answer.error)),
        Ok(None) | Err(_) => Some(stays(format!("the node did not answer within {PATIENCE:?}"))),
    }
}

async fn change(handle: &Handle, uri: String, node: String, change: ModelChange) -> Result<BTreeSet<String>, Status> {
    // What was asked for under looser rules can still be taken back.
    if matches!(change, ModelChange::Warm { .. } | ModelChange::Pin(true)) {
        shelf::check_address(&uri).map_err(Status::invalid_argument)?;
    }
    handle.change_model(uri, given(node), change).await.map_err(status)
}

/// Empty is not given.
fn given(text: String) -> Option<String> {
    Some(text).filter(|text| !text.is_empty())
}
