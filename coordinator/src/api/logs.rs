//! Output of replicas, requested from the agents of their nodes.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use async_stream::try_stream;
use futures::{Stream, StreamExt as _};
use pilotlight_proto::{
    control::v1 as control,
    fleet::v1::{self as fleet, coordinator_message::Message as ToAgent},
};
use tokio_stream::StreamMap;
use tonic::Status;

use super::control::{ControlService, Streamed, asked, status};
use crate::{
    fleet::{LogHub, SessionHandle},
    reconcile::{Handle, World},
};

/// Longest wait for the next part of output that an agent has on its disk.
const CHUNK_TIMEOUT: Duration = Duration::from_secs(10);
/// How often new replicas of a service are looked for while its output is followed.
const FOLLOW_POLL_INTERVAL: Duration = Duration::from_millis(500);

/// Opens the stream that answers a request for logs.
///
/// # Errors
/// There is no such service, it has no replica now, or a node is not connected.
pub(super) async fn open(
    service: &ControlService,
    request: control::LogsRequest,
) -> Result<Streamed<control::LogsResponse>, Status> {
    if request.previous {
        if request.follow {
            return Err(Status::invalid_argument("follow: previous output has ended and cannot be followed"));
        }
        return previous(service, request).await;
    }
    if request.follow && request.replica.is_empty() {
        // A service that is not there cannot be followed; one without replicas can.
        service.look(&request.namespace, &request.name, |_, _| ()).await?;
        return Ok(Box::pin(follow(service.handle.clone(), Arc::clone(&service.logs), request)));
    }
    let streams = current(service, &request).await?;
    Ok(Box::pin(futures::stream::select_all(streams)))
}

/// The output of the replicas that there are now; one stream per replica.
async fn current(
    service: &ControlService,
    request: &control::LogsRequest,
) -> Result<Vec<Streamed<control::LogsResponse>>, Status> {
    let wanted = request.replica.clone();
    let sources = service
        .look(&request.namespace, &request.name, move |world, state| {
            let names =
                world.revisions_of(state).flat_map(|revision| &revision.replicas).filter(|name| asked(&wanted, name));
            let session = |name: &String| {
                let replica = world.replicas.get(name)?;
                world.nodes.get(&replica.record.node)?.session.clone()
            };
            names.map(|name| (name.clone(), session(name))).collect::<Vec<_>>()
        })
        .await?;
    if sources.is_empty() {
        let which = if request.replica.is_empty() { &request.name } else { &request.replica };
        let previous = format!("`pilotlight logs {} -n {} --previous`", request.name, request.namespace);
        return Err(Status::not_found(format!(
            "{which} has no replica now; {previous} shows the output of replicas that ended"
        )));
    }
    let mut streams: Vec<Streamed<control::LogsResponse>> = Vec::new();
    for (replica, session) in sources {
        let unavailable = || Status::unavailable(format!("the node of {replica} is not connected"));
        let session = session.ok_or_else(unavailable)?;
        let ask = fleet::LogRequest {
            replica: replica.clone(),
            tail_lines: request.tail_lines,
            follow: request.follow,
            ..Default::default()
        };
        let open = OpenLog::send(&service.logs, session, ask).ok_or_else(unavailable)?;
        streams.push(Box::pin(responses(open, replica, !request.follow)));
    }
    Ok(streams)
}

/// The output of a service's replicas from now on, those that are placed later included. Ends once the service is
/// deleted and its last replica has ended.
fn follow(
    handle: Handle,
    logs: Arc<LogHub>,
    request: control::LogsRequest,
) -> impl Stream<Item = Result<control::LogsResponse, Status>> + Send {
    try_stream! {
        let key = format!("{}/{}", request.namespace, request.name);
        let mut open: StreamMap<String, Streamed<control::LogsResponse>> = StreamMap::new();
        // The session by which each replica's output was requested.
        let mut requested: BTreeMap<String, u64> = BTreeMap::new();
        let mut began = false;
        let mut polls = tokio::time::interval(FOLLOW_POLL_INTERVAL);
        loop {
            let received = tokio::select! {
                _ = polls.tick() => None,
                Some((_, received)) = open.next(), if !open.is_empty() => Some(received),
            };
            if let Some(received) = received {
                yield received?;
                continue;
            }
            let key = key.clone();
            let replicas = handle.read(move |world, _| replicas_of(world, &key)).await.map_err(status)?;
            let Some(replicas) = replicas else {
                if open.is_empty() {
                    break;
                }
                continue;
            };
            requested.retain(|name, _| replicas.iter().any(|(replica, _)| replica == name));
            for (replica, session) in replicas {
                let Some(session) = session else { continue };
                let before = requested.insert(replica.clone(), session.id);
                if before == Some(session.id) {
                    continue;
                }
                // All output of a replica that is new, and as good as none of what has been sent already.
                let tail_lines = match before {
                    Some(_) => 1,
                    None if began => 0,
                    None => request.tail_lines,
                };
                let ask = fleet::LogRequest { replica: replica.clone(), tail_lines, follow: true, ..Default::default() };
                if let Some(log) = OpenLog::send(&logs, session, ask) {
                    open.insert(replica.clone(), Box::pin(responses(log, replica, false)));
                }
            }
            began = true;
        }
    }
}

/// The replicas of a service and the sessions of their nodes; `None` if there is no such service.
fn replicas_of(world: &World, service: &str) -> Option<Vec<(String, Option<SessionHandle>)>> {
    let state = world.services.get(service)?;
    let names = world.revisions_of(state).flat_map(|revision| &revision.replicas);
    let replicas = names.filter_map(|name| world.replicas.get(name));
    let session = |node: &str| world.nodes.get(node)?.session.clone();
    Some(replicas.map(|replica| (replica.record.name.clone(), session(&replica.record.node))).collect())
}

/// The output of previous runs, node after node: each node is asked, since only its agent knows what it has kept.
/// This works for a service that has been deleted, too.
async fn previous(
    service: &ControlService,
    request: control::LogsRequest,
) -> Result<Streamed<control::LogsResponse>, Status> {
    let sessions: Vec<_> = service
        .handle
        .read(|world, _| world.nodes.values().filter_map(|node| node.session.clone()).collect())
        .await
        .map_err(status)?;
    let logs = Arc::clone(&service.logs);
    Ok(Box::pin(try_stream! {
        let mut found = false;
        for session in sessions {
            let ask = fleet::LogRequest {
                namespace: request.namespace.clone(),
                service: request.name.clone(),
                replica: request.replica.clone(),
                tail_lines: request.tail_lines,
                previous: true,
                ..Default::default()
            };
            let node = session.node.clone();
            // A node that has just gone is like one that was not connected.
            let Some(open) = OpenLog::send(&logs, session, ask) else { continue };
            let mut answers = std::pin::pin!(responses(open, node, true));
            while let Some(answer) = answers.next().await {
                let answer = answer?;
                if !answer.data.is_empty() || !answer.error.is_empty() {
                    found = true;
                    yield answer;
                }
            }
        }
        if !found {
            let which = if request.replica.is_empty() { request.name } else { request.replica };
            let message =
                format!("no connected node keeps previous output of {which} in namespace {}", request.namespace);
            Err(Status::not_found(message))?;
        }
    }))
}

/// What an agent answers to one request. `source` names answers that name no replica. `limited` ends with an error if
/// the agent does not send the next part in time.
fn responses(
    mut open: OpenLog,
    source: String,
    limited: bool,
) -> impl Stream<Item = Result<control::LogsResponse, Status>> + Send {
    async_stream::stream! {
        let failed = |error: String| control::LogsResponse { replica: source.clone(), error, ..Default::default() };
        loop {
            let chunk = tokio::select! {
                chunk = open.chunks.recv() => chunk,
                () = open.session.closed() => {
                    yield Ok(failed("its node has disconnected".to_owned()));
                    break;
                }
                () = tokio::time::sleep(CHUNK_TIMEOUT), if limited => {
                    yield Ok(failed(format!("its node has sent nothing for {CHUNK_TIMEOUT:?}")));
                    break;
                }
            };
            let Some(chunk) = chunk else {
                yield Ok(failed("more output came than was read; --tail asks for less".to_owned()));
                break;
            };
            let replica = if chunk.replica.is_empty() { source.clone() } else { chunk.replica };
            yield Ok(control::LogsResponse { replica, data: chunk.data, error: chunk.error });
            if chunk.end {
                break;
            }
        }
    }
}

/// A log request that an agent is answering. When dropped, it asks the agent to stop.
struct OpenLog {
    logs: Arc<LogHub>,
    session: SessionHandle,
    id: u64,
    chunks: tokio::sync::mpsc::Receiver<fleet::LogChunk>,
}

impl OpenLog {
    /// Sends the request; `None` if the agent is not connected.
    fn send(logs: &Arc<LogHub>, session: SessionHandle, request: fleet::LogRequest) -> Option<Self> {
        let (id, chunks) = logs.open();
        let open = Self { logs: Arc::clone(logs), session, id, chunks };
        let request = fleet::LogRequest { request_id: id, ..request };
        open.session.tell(ToAgent::LogRequest(request)).then_some(open)
    }
}

impl Drop for OpenLog {
    fn drop(&mut self) {
        self.logs.close(self.id);
        let cancel = fleet::LogRequest { request_id: self.id, cancel: true, ..Default::default() };
        // A session that is gone has stopped sending anyway.
        let _ = self.session.tell(ToAgent::LogRequest(cancel));
    }
}
