//! What the gateway costs: latency it adds to a request, and throughput against calling the server
//! directly. Both ways are measured in turn in the same run, by the same client, so that the ratio holds
//! on a noisy machine. Client, gateway and server share this process's cores.
#![allow(clippy::print_stdout, missing_docs, reason = "a benchmark prints its result")]

use std::{
    convert::Infallible,
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use futures::future::join_all;
use http_body_util::{BodyExt as _, Full};
use hyper::{Request, Response, body::Bytes, body::Incoming, service::service_fn};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use pilotlight_agent::{
    endpoint::{Endpoints as _, LocalReplica},
    gateway::{ClientSettings, Connect, DataPath, GatewayMetrics, PeerStream, Setup},
};
use pilotlight_benches::median;
use pilotlight_proto::fleet::v1::{PeerNode, ReplicaRoute, RevisionRoute, Routes, ServiceRoute};
use prometheus_client::registry::Registry;
use tokio::{net::TcpListener, sync::mpsc};
use tokio_util::sync::CancellationToken;

const ROUNDS: usize = 15;
const SEQUENTIAL: usize = 400;
const WORKERS: usize = 32;
const EACH: usize = 100;
const BODY: &str = r#"{"instances": [[6.8, 2.8, 4.8, 1.4], [6.0, 3.4, 4.5, 1.6]]}"#;

type Caller = Client<HttpConnector, Full<Bytes>>;

struct NoPeers;

#[async_trait]
impl Connect for NoPeers {
    async fn connect(&self, node: &str, _: &str) -> std::io::Result<Box<dyn PeerStream>> {
        Err(std::io::Error::other(format!("no node {node} in this benchmark")))
    }
}

async fn model_server() -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            stream.set_nodelay(true).unwrap();
            tokio::spawn(async move {
                let answer = service_fn(|request: Request<Incoming>| async move {
                    request.into_body().collect().await.unwrap();
                    Ok::<_, Infallible>(Response::new(Full::new(Bytes::from_static(b"{\"predictions\":[1,1]}"))))
                });
                let _ = auto::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), answer).await;
            });
        }
    });
    address
}

async fn gateway(server: SocketAddr) -> SocketAddr {
    let (demands, _) = mpsc::channel(1);
    let data_path = DataPath::new(Setup {
        node: "bench".into(),
        max_request_body: 1 << 20,
        connect: Arc::new(NoPeers),
        demands,
        metrics: GatewayMetrics::register(&mut Registry::default()),
        clients: ClientSettings::default(),
    });
    let revision = "default/m-predictor-00001".to_owned();
    let timeout = Duration::from_secs(300);
    data_path.apply_routes(Routes {
        full: true,
        services: vec![ServiceRoute {
            namespace: "default".into(),
            name: "m".into(),
            hosts: vec!["m.default.localhost".into()],
            revisions: vec![RevisionRoute {
                revision: revision.clone(),
                traffic_percent: 100,
                container_concurrency: 64,
                timeout: prost_types::Duration::try_from(timeout).ok(),
                queue_limit: 1000,
                replicas: vec![ReplicaRoute { replica: "r".into(), node: "bench".into(), ready: true }],
                ..Default::default()
            }],
            ..Default::default()
        }],
        nodes: vec![PeerNode { name: "bench".into(), peer_address: "127.0.0.1:1".into() }],
        ..Default::default()
    });
    data_path.sidecar().ready(LocalReplica {
        name: "r".into(),
        revision,
        address: server,
        h2c: false,
        container_concurrency: 64,
        timeout,
    });
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(data_path.serve_ingress(listener, CancellationToken::new()));
    address
}

async fn call(caller: &Caller, address: SocketAddr) {
    let request = Request::post(format!("http://{address}/v1/models/m:predict"))
        .header("host", "m.default.localhost")
        .body(Full::new(Bytes::from_static(BODY.as_bytes())))
        .unwrap();
    let response = caller.request(request).await.unwrap();
    assert_eq!(response.status(), 200);
    response.into_body().collect().await.unwrap();
}

/// Mean time of one request, microseconds.
async fn latency(caller: &Caller, address: SocketAddr) -> f64 {
    let begun = Instant::now();
    for _ in 0..SEQUENTIAL {
        call(caller, address).await;
    }
    begun.elapsed().as_secs_f64() * 1e6 / SEQUENTIAL as f64
}

/// Requests per second.
async fn throughput(caller: &Caller, address: SocketAddr) -> f64 {
    let begun = Instant::now();
    join_all((0..WORKERS).map(|_| tokio::spawn(worker(caller.clone(), address)))).await;
    (WORKERS * EACH) as f64 / begun.elapsed().as_secs_f64()
}

async fn worker(caller: Caller, address: SocketAddr) {
    for _ in 0..EACH {
        call(&caller, address).await;
    }
}

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let server = model_server().await;
        let gateway = gateway(server).await;
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        let caller: Caller = Client::builder(TokioExecutor::new()).set_host(false).build(connector);
        // Warm-up: connections, routes, caches.
        for address in [server, gateway] {
            latency(&caller, address).await;
            throughput(&caller, address).await;
        }
        let (mut added, mut ratio, mut direct_us, mut direct_rps) = (vec![], vec![], vec![], vec![]);
        for _ in 0..ROUNDS {
            let (direct, through) = (latency(&caller, server).await, latency(&caller, gateway).await);
            added.push(through - direct);
            direct_us.push(direct);
            let (direct, through) = (throughput(&caller, server).await, throughput(&caller, gateway).await);
            ratio.push(through / direct);
            direct_rps.push(direct);
        }
        println!("gateway, one local replica, HTTP/1.1, 59-byte body, medians of {ROUNDS} paired rounds");
        println!("  direct latency          {:8.1} µs", median(direct_us));
        println!("  gateway's added latency {:8.1} µs", median(added));
        println!("  direct throughput       {:8.0} requests/s with {WORKERS} workers", median(direct_rps));
        println!("  throughput through the gateway : direct = {:.2}", median(ratio));
    });
}
