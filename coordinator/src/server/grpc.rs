//! The gRPC listener, which all roles have, and the services of the leader.

use std::{sync::Arc, time::Duration};

use pilotlight_identity::{LiveIdentity, Revocations};
use pilotlight_proto::{
    FILE_DESCRIPTOR_SET,
    control::v1::control_server::ControlServer,
    fleet::v1::{enrollment_server::EnrollmentServer, fleet_server::FleetServer},
};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::{
    service::{Routes, interceptor::InterceptedService},
    transport::Server,
};
use tracing::error;

use super::{CoordinatorError, switch::Switch};
use crate::{
    api::{ControlService, Objects, access::Access},
    authority::LiveAuthorities,
    config::Config,
    fleet::{EvictHub, FleetService, Followed, LiveSessions, LogHub, SessionServer, enrollment::EnrollmentService},
    metrics::{CoordinatorMetrics, GrpcMetricsLayer},
    reconcile::Handle,
    store::Store,
    threads::Parsing,
    values::Vault,
};

/// Bytes of one request to each service, at most; larger ones are refused with `OUT_OF_RANGE`. Enrollment and health take
/// requests of callers without a certificate.
const MAX_HEALTH_REQUEST: usize = 4 << 10;
const MAX_ENROLLMENT_REQUEST: usize = 64 << 10;
/// A manifest has at most 1 MiB; etcd takes no larger value.
const MAX_CONTROL_REQUEST: usize = 2 << 20;
const MAX_REFLECTION_REQUEST: usize = 4 << 10;

/// Serves gRPC until `stopping`, with TLS where there is an identity.
pub(super) async fn serve(
    listener: TcpListener,
    identity: Option<Arc<LiveIdentity>>,
    switch: Switch,
    measures: CoordinatorMetrics,
    revocations: Arc<Revocations>,
    stopping: CancellationToken,
) -> Result<(), CoordinatorError> {
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<ControlServer<ControlService>>().await;
    health.set_serving::<FleetServer<FleetService>>().await;
    let health_service = health_service.max_decoding_message_size(MAX_HEALTH_REQUEST);
    let router = Routes::new(health_service).into_axum_router().fallback_service(switch);
    let server = Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(10)))
        .trace_fn(|request| tracing::debug_span!("grpc", path = request.uri().path()))
        .layer(GrpcMetricsLayer(measures.clone()))
        .add_routes(Routes::from(router));
    match identity {
        Some(identity) => {
            let tls = identity.server_config_optional_client(&[b"h2"])?;
            let incoming = pilotlight_identity::accept_tls(listener, tls, revocations, measures.accepts.clone());
            server.serve_with_incoming_shutdown(incoming, stopping.cancelled_owned()).await?;
        }
        None => {
            let incoming = TcpListenerStream::new(listener);
            server.serve_with_incoming_shutdown(incoming, stopping.cancelled_owned()).await?;
        }
    }
    Ok(())
}

/// The services of the leader.
#[expect(clippy::too_many_arguments, reason = "each is needed, and this is called once")]
pub(super) async fn services(
    config: &Config,
    store: &Arc<dyn Store>,
    vault: &Arc<Vault>,
    handle: Handle,
    access: Access,
    authorities: Option<LiveAuthorities>,
    revocations: &Arc<Revocations>,
    ending: &CancellationToken,
) -> Routes {
    let sessions: Arc<LiveSessions> = Arc::default();
    let (logs, evictions) = (Arc::new(LogHub::default()), Arc::new(EvictHub::default()));
    let control = ControlService {
        handle: handle.clone(),
        store: Arc::clone(store),
        objects: Objects::new(Arc::clone(store), Arc::clone(vault), handle.clone()),
        authorities: authorities.clone(),
        vault: Arc::clone(vault),
        sessions: Arc::clone(&sessions),
        access: access.clone(),
        scaling: config.scaling.clone(),
        cell: config.cell.clone(),
        logs: Arc::clone(&logs),
        evictions: Arc::clone(&evictions),
        parsing: Parsing::default(),
    };
    let fleet = FleetService::new(
        handle,
        logs,
        evictions,
        access.clone(),
        Arc::clone(&sessions),
        Followed::new(revocations, authorities.as_ref()),
        ending.clone(),
    );
    let control = ControlServer::new(control).max_decoding_message_size(MAX_CONTROL_REQUEST);
    let mut routes = Routes::new(control).add_service(SessionServer::new(fleet));
    if let Some(authorities) = authorities {
        let enrollment = EnrollmentService::new(authorities, Arc::clone(store), access.clone(), sessions);
        routes =
            routes.add_service(EnrollmentServer::new(enrollment).max_decoding_message_size(MAX_ENROLLMENT_REQUEST));
    }
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1();
    match reflection {
        Ok(reflection) => {
            let reflection = reflection.max_decoding_message_size(MAX_REFLECTION_REQUEST);
            routes.add_service(InterceptedService::new(reflection, access))
        }
        Err(error) => {
            error!(%error, "no gRPC reflection");
            routes
        }
    }
}
