//! The control API: operators' requests, answered from the loop.

use std::{pin::Pin, sync::Arc};

use async_stream::try_stream;
use futures::Stream;
use pilotlight_identity::Role;
use pilotlight_proto::control::v1::{self as control, control_server::Control};
use tokio::sync::broadcast::error::RecvError;
use tonic::{Request, Response, Status};

use super::{access::Access, audit::audited, cache, logs, nodes, objects::Objects, snapshot};
use crate::{
    authority::LiveAuthorities,
    autoscaler::Defaults,
    finding::Finding,
    fleet::{EvictHub, LiveSessions, LogHub},
    manifest::{self, Reading},
    reconcile::{CommandError, Handle, cached, commands::Change, view, world::World},
    spec,
    store::{Store, StoreError},
    threads::Parsing,
    values::Vault,
};

/// Largest manifest taken, bytes; etcd's own limit for a value is 1.5 MiB.
const MANIFEST_MOST: usize = 1 << 20;

type Answer<T> = Result<Response<T>, Status>;
pub(super) type Streamed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// The gRPC service.
pub struct ControlService {
    /// The loop.
    pub handle: Handle,
    /// For tokens and usage.
    pub store: Arc<dyn Store>,
    /// Sign certificates; `None` without TLS.
    pub(crate) authorities: Option<LiveAuthorities>,
    /// Seals the authorities' keys.
    pub vault: Arc<Vault>,
    /// Whom agents trust.
    pub sessions: Arc<LiveSessions>,
    /// Runtimes, secrets and config maps.
    pub objects: Objects,
    /// Who may call.
    pub access: Access,
    /// Fleet-wide defaults that applied services are checked against.
    pub scaling: Defaults,
    /// Cell name.
    pub cell: String,
    /// Open log requests.
    pub logs: Arc<LogHub>,
    /// Models that agents were asked to remove.
    pub evictions: Arc<EvictHub>,
    /// Where manifests are parsed.
    pub(crate) parsing: Parsing,
}

impl ControlService {
    async fn apply_document(&self, document: spec::Document, dry_run: bool) -> Result<control::ApplyResult, Status> {
        let mut result = control::ApplyResult {
            document: document.index as u32,
            kind: document.kind,
            namespace: document.namespace,
            name: document.name,
            outcome: control::ApplyOutcome::Refused.into(),
            findings: document.findings.iter().map(finding).collect(),
            ..Default::default()
        };
        let Some(object) = document.object else { return Ok(result) };
        let outcome = match object {
            spec::Resource::InferenceService(service) => {
                result.findings.extend(self.objects.missing(&service).iter().map(finding));
                if dry_run {
                    result.object_json = service.manifest.to_string();
                    result.stored_json = self.stored(&service.namespace, &service.name).await?;
                }
                match self.handle.apply(*service, dry_run).await {
                    Err(CommandError::Refused(findings)) => {
                        result.findings.extend(findings.iter().map(finding));
                        return Ok(result);
                    }
                    applied => applied.map_err(status)?.into(),
                }
            }
            spec::Resource::ServingRuntime(runtime) => {
                let applied = self.objects.apply_runtime(*runtime, dry_run).await?;
                applied.describe(&mut result, dry_run)
            }
            spec::Resource::Auxiliary(object) => {
                let applied = self.objects.apply_auxiliary(*object, dry_run).await?;
                applied.describe(&mut result, dry_run)
            }
        };
        result.outcome = outcome.into();
        Ok(result)
    }

    /// A service as it was applied, JSON; empty where there is none.
    async fn stored(&self, namespace: &str, name: &str) -> Result<String, Status> {
        let key = format!("{namespace}/{name}");
        let stored = self
            .handle
            .read(move |world, _| world.services.get(&key).map(|state| state.record.service.manifest.to_string()))
            .await
            .map_err(status)?;
        Ok(stored.unwrap_or_default())
    }

    /// Looks at one service.
    pub(super) async fn look<T: Send + 'static>(
        &self,
        namespace: &str,
        name: &str,
        look: impl FnOnce(&World, &crate::reconcile::world::ServiceState) -> T + Send + 'static,
    ) -> Result<T, Status> {
        let key = format!("{namespace}/{name}");
        let wanted = key.clone();
        self.handle
            .read(move |world, _| world.services.get(&wanted).map(|state| look(world, state)))
            .await
            .map_err(status)?
            .ok_or_else(|| status(CommandError::NotFound(key)))
    }
}

/// The documents of a manifest, in the order in which they are applied.
fn documents(request: &control::ApplyRequest, scaling: &Defaults, runtimes: &spec::Runtimes) -> Vec<spec::Document> {
    let namespace = if request.namespace.is_empty() { "default" } else { &request.namespace };
    let reading = Reading { namespace, strict: request.strict, scaling, runtimes };
    let mut documents = manifest::read(&request.manifest, reading);
    if request.strict {
        all_or_nothing(&mut documents);
    }
    // Secrets first, so that a service finds those that stand after it.
    documents.sort_by_key(|document| !matches!(document.object, Some(spec::Resource::Auxiliary(_))));
    documents
}

#[tonic::async_trait]
impl Control for ControlService {
    async fn apply(&self, request: Request<control::ApplyRequest>) -> Answer<control::ApplyResponse> {
        let caller = self.access.any_scope(&request, Role::Operator)?;
        let request = request.into_inner();
        if request.manifest.len() > MANIFEST_MOST {
            return Err(Status::invalid_argument(format!(
                "manifest: {} bytes, at most {MANIFEST_MOST} are allowed",
                request.manifest.len()
            )));
        }
        let (runtimes, scaling) = (self.objects.runtimes().await?, self.scaling.clone());
        let dry_run = request.dry_run;
        let documents = self.parsing.parse(&caller.name, move || documents(&request, &scaling, &runtimes)).await?;
        for document in documents.iter().filter(|document| document.object.is_some()) {
            caller.check_namespace(namespace_of(document))?;
        }
        let mut results = Vec::new();
        for document in documents {
            let object = format!("{}/{}/{}", document.kind, document.namespace, document.name);
            let apply = self.apply_document(document, dry_run);
            let result = if dry_run { apply.await? } else { audited(&caller, "apply", &object, apply).await? };
            results.push(result);
        }
        results.sort_by_key(|result| result.document);
        Ok(Response::new(control::ApplyResponse { results }))
    }

    async fn get(&self, request: Request<control::GetRequest>) -> Answer<control::GetResponse> {
        self.access.in_namespace(&request, Role::Viewer, &request.get_ref().namespace)?;
        let request = request.into_inner();
        let service = self.look(&request.namespace, &request.name, view::service).await?;
        Ok(Response::new(control::GetResponse { service: Some(service) }))
    }

    async fn list(&self, request: Request<control::ListRequest>) -> Answer<control::ListResponse> {
        self.access.in_namespace(&request, Role::Viewer, &request.get_ref().namespace)?;
        let services = services(&self.handle, request.into_inner().namespace, String::new()).await?;
        Ok(Response::new(control::ListResponse { services }))
    }

    async fn list_objects(
        &self,
        request: Request<control::ListObjectsRequest>,
    ) -> Answer<control::ListObjectsResponse> {
        self.access.in_namespace(&request, Role::Viewer, &request.get_ref().namespace)?;
        let request = request.into_inner();
        let mut objects = self.objects.list().await?;
        objects.retain(|object| asked(&request.kind, &object.kind));
        objects.retain(|object| object.namespace.is_empty() || asked(&request.namespace, &object.namespace));
        Ok(Response::new(control::ListObjectsResponse { objects }))
    }

    async fn delete_object(
        &self,
        request: Request<control::DeleteObjectRequest>,
    ) -> Answer<control::DeleteObjectResponse> {
        let namespace = match request.get_ref().kind.as_str() {
            // It is the whole cell's, whatever namespace is named.
            "ClusterServingRuntime" => "",
            _ => &request.get_ref().namespace,
        };
        let caller = self.access.in_namespace(&request, Role::Operator, namespace)?;
        let control::DeleteObjectRequest { kind, namespace, name } = request.into_inner();
        let object = format!("{kind}/{namespace}/{name}");
        audited(&caller, "delete", &object, self.objects.delete(&kind, &namespace, &name)).await?;
        Ok(Response::new(control::DeleteObjectResponse {}))
    }

    type WatchStream = Streamed<control::WatchResponse>;

    async fn watch(&self, request: Request<control::WatchRequest>) -> Answer<Self::WatchStream> {
        self.access.in_namespace(&request, Role::Viewer, &request.get_ref().namespace)?;
        let control::WatchRequest { namespace, name } = request.into_inner();
        Ok(Response::new(Box::pin(watch(self.handle.clone(), namespace, name))))
    }

    async fn delete(&self, request: Request<control::DeleteRequest>) -> Answer<control::DeleteResponse> {
        let caller = self.access.in_namespace(&request, Role::Operator, &request.get_ref().namespace)?;
        let request = request.into_inner();
        let key = format!("{}/{}", request.namespace, request.name);
        let object = format!("InferenceService/{key}");
        audited(&caller, "delete", &object, async { self.handle.delete(key).await.map_err(status) }).await?;
        Ok(Response::new(control::DeleteResponse {}))
    }

    async fn describe(&self, request: Request<control::DescribeRequest>) -> Answer<control::DescribeResponse> {
        self.access.in_namespace(&request, Role::Viewer, &request.get_ref().namespace)?;
        let request = request.into_inner();
        Ok(Response::new(self.look(&request.namespace, &request.name, view::describe).await?))
    }

    async fn list_nodes(&self, request: Request<control::ListNodesRequest>) -> Answer<control::ListNodesResponse> {
        self.access.operator(&request, Role::Viewer)?;
        nodes::list(&self.handle).await.map(Response::new)
    }

    async fn list_cache(&self, request: Request<control::ListCacheRequest>) -> Answer<control::ListCacheResponse> {
        self.access.operator(&request, Role::Viewer)?;
        let node = request.into_inner().node;
        let list = self.handle.read(move |world, _| cached::list(world, &node)).await.map_err(status)?;
        list.map(Response::new).ok_or_else(|| Status::not_found("no such node has joined"))
    }

    async fn warm_model(&self, request: Request<control::WarmModelRequest>) -> Answer<control::WarmModelResponse> {
        let caller = self.access.operator(&request, Role::Operator)?;
        let object = request.get_ref().uri.clone();
        audited(&caller, "warm", &object, cache::warm(&self.handle, request.into_inner())).await.map(Response::new)
    }

    async fn pin_model(&self, request: Request<control::PinModelRequest>) -> Answer<control::PinModelResponse> {
        let caller = self.access.operator(&request, Role::Operator)?;
        let object = request.get_ref().uri.clone();
        audited(&caller, "pin", &object, cache::pin(&self.handle, request.into_inner())).await.map(Response::new)
    }

    async fn evict_model(&self, request: Request<control::EvictModelRequest>) -> Answer<control::EvictModelResponse> {
        let caller = self.access.operator(&request, Role::Operator)?;
        let object = request.get_ref().uri.clone();
        let evict = cache::evict(&self.handle, &self.evictions, request.into_inner());
        audited(&caller, "evict", &object, evict).await.map(Response::new)
    }

    async fn set_node_availability(
        &self,
        request: Request<control::SetNodeAvailabilityRequest>,
    ) -> Answer<control::SetNodeAvailabilityResponse> {
        let caller = self.access.operator(&request, Role::Operator)?;
        nodes::set_availability(&self.handle, &caller, request.into_inner()).await.map(Response::new)
    }

    async fn unquarantine_gpu(
        &self,
        request: Request<control::UnquarantineGpuRequest>,
    ) -> Answer<control::UnquarantineGpuResponse> {
        let caller = self.access.operator(&request, Role::Operator)?;
        nodes::unquarantine(&self.handle, &caller, request.into_inner()).await.map(Response::new)
    }

    async fn list_revisions(
        &self,
        request: Request<control::ListRevisionsRequest>,
    ) -> Answer<control::ListRevisionsResponse> {
        self.access.in_namespace(&request, Role::Viewer, &request.get_ref().namespace)?;
        let request = request.into_inner();
        let revisions = self
            .handle
            .read(move |world, _| {
                let shown = world.revisions.values().filter(|state| {
                    let record = &state.record;
                    asked(&request.namespace, &record.namespace) && asked(&request.service, &record.service)
                });
                shown.map(|state| view::revision(world, state)).collect()
            })
            .await
            .map_err(status)?;
        Ok(Response::new(control::ListRevisionsResponse { revisions }))
    }

    async fn list_replicas(
        &self,
        request: Request<control::ListReplicasRequest>,
    ) -> Answer<control::ListReplicasResponse> {
        self.access.in_namespace(&request, Role::Viewer, &request.get_ref().namespace)?;
        let request = request.into_inner();
        let replicas = self
            .handle
            .read(move |world, _| {
                let shown = world.replicas.values().filter(|state| {
                    let record = &state.record;
                    asked(&request.namespace, &record.namespace) && asked(&request.service, &record.service)
                });
                shown.map(|state| view::replica(world, state)).collect()
            })
            .await
            .map_err(status)?;
        Ok(Response::new(control::ListReplicasResponse { replicas }))
    }

    async fn list_decisions(
        &self,
        request: Request<control::ListDecisionsRequest>,
    ) -> Answer<control::ListDecisionsResponse> {
        self.access.in_namespace(&request, Role::Viewer, &request.get_ref().namespace)?;
        let request = request.into_inner();
        let limit = request.limit as usize;
        let decisions = self
            .look(&request.namespace, &request.name, move |world, state| view::decisions(world, state, limit))
            .await?;
        Ok(Response::new(control::ListDecisionsResponse { decisions }))
    }

    async fn list_events(&self, request: Request<control::ListEventsRequest>) -> Answer<control::ListEventsResponse> {
        self.access.in_namespace(&request, Role::Viewer, &request.get_ref().namespace)?;
        let control::ListEventsRequest { namespace, service } = request.into_inner();
        let list = move |world: &World, _| view::events(world, &namespace, &service);
        let events = self.handle.read(list).await.map_err(status)?;
        Ok(Response::new(control::ListEventsResponse { events }))
    }

    async fn delete_node(&self, request: Request<control::DeleteNodeRequest>) -> Answer<control::DeleteNodeResponse> {
        let caller = self.access.operator(&request, Role::Operator)?;
        let name = request.into_inner().name;
        let deletion = async { self.handle.delete_node(name.clone()).await.map_err(status) };
        let replicas = audited(&caller, "delete", &format!("Node/{name}"), deletion).await?;
        Ok(Response::new(control::DeleteNodeResponse { replicas }))
    }

    async fn list_usage(&self, request: Request<control::ListUsageRequest>) -> Answer<control::ListUsageResponse> {
        self.access.in_namespace(&request, Role::Viewer, &request.get_ref().namespace)?;
        Ok(Response::new(self.usage(request.into_inner()).await?))
    }

    type LogsStream = Streamed<control::LogsResponse>;

    async fn logs(&self, request: Request<control::LogsRequest>) -> Answer<Self::LogsStream> {
        self.access.in_namespace(&request, Role::Viewer, &request.get_ref().namespace)?;
        Ok(Response::new(logs::open(self, request.into_inner()).await?))
    }

    async fn list_joins(&self, request: Request<control::ListJoinsRequest>) -> Answer<control::ListJoinsResponse> {
        self.access.operator(&request, Role::Viewer)?;
        let joins = self.joins(&request.into_inner().node).await?;
        Ok(Response::new(control::ListJoinsResponse { joins }))
    }

    async fn revoke_node(&self, request: Request<control::RevokeNodeRequest>) -> Answer<control::RevokeNodeResponse> {
        let caller = self.access.operator(&request, Role::Admin)?;
        let name = request.into_inner().name;
        audited(&caller, "revoke", &format!("Node/{name}"), self.refuse_node(&caller, &name)).await?;
        Ok(Response::new(control::RevokeNodeResponse {}))
    }

    async fn create_user(&self, request: Request<control::CreateUserRequest>) -> Answer<control::CreateUserResponse> {
        let caller = self.access.operator(&request, Role::Admin)?;
        let request = request.into_inner();
        let object = format!("User/{}={},{:?}", request.name, request.role, request.namespace);
        audited(&caller, "create", &object, self.make_user(&caller, request)).await.map(Response::new)
    }

    async fn list_users(&self, request: Request<control::ListUsersRequest>) -> Answer<control::ListUsersResponse> {
        self.access.operator(&request, Role::Admin)?;
        Ok(Response::new(control::ListUsersResponse { users: self.users().await? }))
    }

    async fn revoke_user(&self, request: Request<control::RevokeUserRequest>) -> Answer<control::RevokeUserResponse> {
        let caller = self.access.operator(&request, Role::Admin)?;
        let name = request.into_inner().name;
        audited(&caller, "revoke", &format!("User/{name}"), self.refuse_user(&caller, &name)).await?;
        Ok(Response::new(control::RevokeUserResponse {}))
    }

    async fn renew_user(&self, request: Request<control::RenewUserRequest>) -> Answer<control::RenewUserResponse> {
        let caller = self.access.any_scope(&request, Role::Viewer)?;
        let certificate = self.access.caller(&request)?;
        let csr_pem = request.into_inner().csr_pem;
        let object = format!("User/{}", caller.name);
        audited(&caller, "renew", &object, self.renew_own(certificate, &csr_pem)).await.map(Response::new)
    }

    async fn get_authorities(
        &self,
        request: Request<control::GetAuthoritiesRequest>,
    ) -> Answer<control::GetAuthoritiesResponse> {
        self.access.operator(&request, Role::Admin)?;
        self.show_authorities().await.map(Response::new)
    }

    async fn rotate_authority(
        &self,
        request: Request<control::RotateAuthorityRequest>,
    ) -> Answer<control::RotateAuthorityResponse> {
        let caller = self.access.operator(&request, Role::Admin)?;
        let authority = Some(audited(&caller, "rotate", "Authority", self.make_next_authority()).await?);
        Ok(Response::new(control::RotateAuthorityResponse { authority }))
    }

    async fn activate_authority(
        &self,
        request: Request<control::ActivateAuthorityRequest>,
    ) -> Answer<control::ActivateAuthorityResponse> {
        let caller = self.access.operator(&request, Role::Admin)?;
        let force = request.into_inner().force;
        let authority = Some(audited(&caller, "activate", "Authority", self.activate_next_authority(force)).await?);
        Ok(Response::new(control::ActivateAuthorityResponse { authority }))
    }

    async fn retire_authority(
        &self,
        request: Request<control::RetireAuthorityRequest>,
    ) -> Answer<control::RetireAuthorityResponse> {
        let caller = self.access.operator(&request, Role::Admin)?;
        let force = request.into_inner().force;
        let authority = Some(audited(&caller, "retire", "Authority", self.retire_authority_beside(force)).await?);
        Ok(Response::new(control::RetireAuthorityResponse { authority }))
    }

    async fn list_tokens(&self, request: Request<control::ListTokensRequest>) -> Answer<control::ListTokensResponse> {
        self.access.operator(&request, Role::Admin)?;
        Ok(Response::new(control::ListTokensResponse { tokens: self.usable_tokens().await? }))
    }

    async fn revoke_token(
        &self,
        request: Request<control::RevokeTokenRequest>,
    ) -> Answer<control::RevokeTokenResponse> {
        let caller = self.access.operator(&request, Role::Admin)?;
        let id = request.into_inner().id;
        audited(&caller, "revoke", &format!("Token/{id}"), self.delete_token(&id)).await?;
        Ok(Response::new(control::RevokeTokenResponse {}))
    }

    async fn create_token(
        &self,
        request: Request<control::CreateTokenRequest>,
    ) -> Answer<control::CreateTokenResponse> {
        let caller = self.access.operator(&request, Role::Admin)?;
        let request = request.into_inner();
        let object = format!("Token for {:?}, replace={}", request.node, request.replace);
        audited(&caller, "create", &object, self.make_token(&caller, request)).await.map(Response::new)
    }

    async fn get_version(&self, request: Request<control::GetVersionRequest>) -> Answer<control::GetVersionResponse> {
        self.access.any_scope(&request, Role::Viewer)?;
        Ok(Response::new(control::GetVersionResponse {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            cell: self.cell.clone(),
            store: self.store.kind().to_owned(),
        }))
    }

    type SaveSnapshotStream = Streamed<control::SaveSnapshotResponse>;

    async fn save_snapshot(&self, request: Request<control::SaveSnapshotRequest>) -> Answer<Self::SaveSnapshotStream> {
        let caller = self.access.operator(&request, Role::Admin)?;
        audited(&caller, "save-snapshot", &self.cell, snapshot::save(&self.store, &self.cell)).await.map(Response::new)
    }
}

/// The services of a namespace and name; empty means any.
async fn services(handle: &Handle, namespace: String, name: String) -> Result<Vec<control::Service>, Status> {
    handle
        .read(move |world, _| {
            let shown = world.services.values().filter(|state| {
                let service = &state.record.service;
                let whole = state.record.component.is_predictor();
                whole && asked(&namespace, &service.namespace) && asked(&name, &service.name)
            });
            shown.map(|state| view::service(world, state)).collect()
        })
        .await
        .map_err(status)
}

/// First what there is, then each change; a watcher that falls behind gets the whole list again.
fn watch(
    handle: Handle,
    namespace: String,
    name: String,
) -> impl Stream<Item = Result<control::WatchResponse, Status>> + Send {
    try_stream! {
        let mut changes = handle.changes();
        'list: loop {
            for service in services(&handle, namespace.clone(), name.clone()).await? {
                yield control::WatchResponse { deleted: false, service: Some(service) };
            }
            loop {
                match changes.recv().await {
                    Ok(Change::Updated(key)) => {
                        let (of, called) = key.split_once('/').unwrap_or_default();
                        if !asked(&namespace, of) || !asked(&name, called) {
                            continue;
                        }
                        let look = move |world: &World, _| {
                            world.services.get(&key).map(|state| view::service(world, state))
                        };
                        // It may have been deleted since; that is a change of its own.
                        if let Some(service) = handle.read(look).await.map_err(status)? {
                            yield control::WatchResponse { deleted: false, service: Some(service) };
                        }
                    }
                    Ok(Change::Deleted(service)) => {
                        if asked(&namespace, &service.namespace) && asked(&name, &service.name) {
                            yield control::WatchResponse { deleted: true, service: Some(*service) };
                        }
                    }
                    Err(RecvError::Lagged(_)) => continue 'list,
                    Err(RecvError::Closed) => break 'list,
                }
            }
        }
    }
}

/// The namespace that a document changes; empty if it changes the whole cell.
fn namespace_of(document: &spec::Document) -> &str {
    match &document.object {
        Some(spec::Resource::ServingRuntime(runtime)) => runtime.namespace.as_deref().unwrap_or_default(),
        _ => &document.namespace,
    }
}

/// With `strict`, a document that is refused keeps its whole file from being applied.
fn all_or_nothing(documents: &mut [spec::Document]) {
    if documents.iter().all(|document| document.object.is_some()) {
        return;
    }
    for document in documents.iter_mut().filter(|document| document.object.is_some()) {
        document.object = None;
        let message = "not applied: another document of this file is refused, and strict is set";
        document.findings.push(Finding::error("", "", message));
    }
}

/// Empty asks for all.
pub(super) fn asked(wanted: &str, is: &str) -> bool {
    wanted.is_empty() || wanted == is
}

fn finding(finding: &Finding) -> control::Finding {
    let (line, column) = finding.position.unwrap_or_default();
    control::Finding {
        error: finding.is_error(),
        field: finding.field.clone(),
        value: finding.value.clone(),
        message: finding.message.clone(),
        line,
        column,
    }
}

pub(super) fn status(error: CommandError) -> Status {
    match &error {
        CommandError::NotFound(_) | CommandError::NodeNotFound(_) | CommandError::GpuNotFound { .. } => {
            Status::not_found(error.to_string())
        }
        CommandError::Refused(_)
        | CommandError::OnAllNodes(_)
        | CommandError::NodeConnected(_)
        | CommandError::GpuNotQuarantined { .. }
        | CommandError::GpuLost { .. } => Status::failed_precondition(error.to_string()),
        CommandError::Store(_) | CommandError::SteppedDown | CommandError::Stopping => {
            Status::unavailable(error.to_string())
        }
    }
}

pub(super) fn unavailable(error: StoreError) -> Status {
    Status::unavailable(error.to_string())
}
