//! The gRPC service of sessions. It is as generated but for the messages to agents, which are encoded already: many
//! agents receive the same bytes.

use std::{convert::Infallible, future::Future, pin::Pin, sync::Arc, task};

use bytes::{BufMut as _, Bytes};
use futures::Stream;
use pilotlight_proto::fleet::v1::{AgentMessage, CoordinatorMessage, fleet_server};
use tonic::{
    Request, Response, Status, Streaming,
    codec::{BufferSettings, Codec, EncodeBuf, Encoder},
    server::{Grpc, NamedService, StreamingService},
};
use tonic_prost::ProstCodec;
use tower::Service;

use super::session::FleetService;

const SESSION_PATH: &str = "/pilotlight.fleet.v1.Fleet/Session";
/// Bytes of a session's buffers while little is said.
const BUFFER_BYTES: usize = 1 << 10;
/// Messages are sent together up to this many bytes.
const YIELD_BYTES: usize = 32 << 10;

/// Bytes of one message of an agent, at most. The largest name all models on its disk, or all its replicas.
const MAX_MESSAGE_BYTES: usize = 4 << 20;

/// Messages to one agent, encoded.
pub(super) type ToAgentStream = Pin<Box<dyn Stream<Item = Result<Bytes, Status>> + Send>>;

type BoxFuture<T, E> = Pin<Box<dyn Future<Output = Result<T, E>> + Send>>;

/// Serves sessions. Cheap to clone.
#[derive(Clone)]
pub struct SessionServer(Arc<FleetService>);

impl SessionServer {
    /// Serves the sessions of this service.
    pub fn new(service: FleetService) -> Self {
        Self(Arc::new(service))
    }
}

impl NamedService for SessionServer {
    const NAME: &'static str = fleet_server::SERVICE_NAME;
}

impl Service<http::Request<tonic::body::Body>> for SessionServer {
    type Response = http::Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Self::Error>;

    fn poll_ready(&mut self, _: &mut task::Context<'_>) -> task::Poll<Result<(), Self::Error>> {
        task::Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<tonic::body::Body>) -> Self::Future {
        let method = Session(Arc::clone(&self.0));
        Box::pin(async move {
            if request.uri().path() != SESSION_PATH {
                return Ok(Status::unimplemented("").into_http());
            }
            let mut grpc = Grpc::new(SessionCodec).apply_max_message_size_config(Some(MAX_MESSAGE_BYTES), None);
            Ok(grpc.streaming(method, request).await)
        })
    }
}

struct Session(Arc<FleetService>);

impl StreamingService<AgentMessage> for Session {
    type Response = Bytes;
    type ResponseStream = ToAgentStream;
    type Future = BoxFuture<Response<ToAgentStream>, Status>;

    fn call(&mut self, request: Request<Streaming<AgentMessage>>) -> Self::Future {
        let service = Arc::clone(&self.0);
        Box::pin(async move { service.session(request).await })
    }
}

/// Decodes messages of agents, and copies bytes to them.
struct SessionCodec;

impl Codec for SessionCodec {
    type Encode = Bytes;
    type Decode = AgentMessage;
    type Encoder = Self;
    type Decoder = <ProstCodec<CoordinatorMessage, AgentMessage> as Codec>::Decoder;

    fn encoder(&mut self) -> Self::Encoder {
        Self
    }

    fn decoder(&mut self) -> Self::Decoder {
        ProstCodec::<CoordinatorMessage, AgentMessage>::raw_decoder(BufferSettings::new(BUFFER_BYTES, YIELD_BYTES))
    }
}

impl Encoder for SessionCodec {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, message: Bytes, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put(message);
        Ok(())
    }

    fn buffer_settings(&self) -> BufferSettings {
        BufferSettings::new(BUFFER_BYTES, YIELD_BYTES)
    }
}

#[cfg(test)]
mod tests {
    use pilotlight_identity::Revocations;
    use pilotlight_proto::fleet::v1::{
        self as fleet, agent_message::Message as FromAgent, coordinator_message::Message as ToAgent,
        fleet_client::FleetClient,
    };
    use tokio_stream::wrappers::TcpListenerStream;
    use tokio_util::sync::CancellationToken;
    use tonic::transport::{Channel, Server};

    use super::super::Followed;
    use super::*;
    use crate::{
        api::access::Access,
        fleet::{EvictHub, LogHub, RouteFeed},
        reconcile::{Handle, commands::Input},
    };

    const SERVICES: usize = 1000;

    /// Full routes of 10 MB.
    fn feed() -> RouteFeed {
        let route = |number| {
            let (name, hosts) = (format!("s-{number}"), vec!["h".repeat(10_000)]);
            let route = fleet::ServiceRoute { namespace: "default".into(), name, hosts, ..Default::default() };
            (format!("default/s-{number}"), Some(route))
        };
        let feed = RouteFeed::default();
        feed.publish((0..SERVICES).map(route), None);
        feed
    }

    /// Serves sessions that follow these routes.
    async fn serve(feed: RouteFeed) -> Channel {
        let (handle, mut inputs, _) = Handle::new();
        tokio::spawn(async move {
            while let Some(input) = inputs.recv().await {
                if let Input::Connected { session, .. } = input {
                    assert!(session.tell(ToAgent::Welcome(fleet::Welcome::default())));
                    session.follow_routes(feed.clone());
                }
            }
        });
        let (logs, evictions) = (Arc::new(LogHub::default()), Arc::new(EvictHub::default()));
        let service = FleetService::new(
            handle,
            logs,
            evictions,
            Access::Token("secret".into()),
            Arc::default(),
            Followed::new(&Revocations::default(), None),
            CancellationToken::new(),
        );
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = Server::builder().add_service(SessionServer::new(service));
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        Channel::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap()
    }

    /// Number of services in the full routes that a new session receives.
    async fn connect(channel: Channel) -> usize {
        let hello = fleet::Hello { node_name: "a".into(), ..Default::default() };
        let hello = AgentMessage { message: Some(FromAgent::Hello(hello)) };
        let outbound = futures::StreamExt::chain(tokio_stream::once(hello), tokio_stream::pending());
        let mut request = Request::new(outbound);
        request.metadata_mut().insert("authorization", "Bearer secret".parse().unwrap());
        let mut inbound = FleetClient::new(channel).session(request).await.unwrap().into_inner();
        let mut services = 0;
        loop {
            match inbound.message().await.expect("no message exceeds the limit").unwrap().message {
                Some(ToAgent::Welcome(_) | ToAgent::Revocations(_)) => {}
                Some(ToAgent::Routes(routes)) => {
                    services += routes.services.len();
                    if !routes.more {
                        return services;
                    }
                }
                other => panic!("{other:?}"),
            }
        }
    }

    #[tokio::test]
    async fn an_agent_whose_routes_exceed_the_limit_of_grpc_connects_and_reconnects() {
        let channel = serve(feed()).await;
        assert_eq!(connect(channel.clone()).await, SERVICES);
        assert_eq!(connect(channel).await, SERVICES);
    }
}
