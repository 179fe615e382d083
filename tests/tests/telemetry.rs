//! Traces that processes export, and metrics that they serve.

use std::{io::Write as _, net::SocketAddr, path::Path, process::Stdio};

use axum::{Router, body::Bytes, http::HeaderMap, http::StatusCode, routing::post};
use pilotlight_tests::{
    cell::Operator,
    eventually, free_port,
    http::Gateway,
    process::{Process, pilotlight},
};
use tempfile::TempDir;
use tokio::{net::TcpListener, sync::mpsc};

/// `pilotlight dev` of which the address for metrics is known.
struct Dev {
    operator: Operator,
    gateway: Gateway,
    metrics: Gateway,
    process: Process,
    _directory: TempDir,
}

impl Dev {
    /// Starts it and waits until its node is connected.
    async fn start(env: &[(&str, String)]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (grpc, http, ingress) = (free_port(), free_port(), free_port());
        let args = [
            "dev".to_owned(),
            format!("--data-dir={}", directory.path().join("data").display()),
            format!("--listen=127.0.0.1:{grpc}"),
            format!("--listen-http=127.0.0.1:{http}"),
            format!("--listen-ingress=127.0.0.1:{ingress}"),
        ];
        let process = Process::start(pilotlight(), directory.path(), "dev", args, env);
        let operator = Operator { server: format!("http://127.0.0.1:{grpc}"), credentials: None };
        let (gateway, metrics) = (Gateway::at(ingress), Gateway::at(http));
        let dev = Self { operator, gateway, metrics, process, _directory: directory };
        eventually("dev has a connected node", || async {
            (dev.operator.json(&["get", "nodes"])["items"][0]["state"] == "Ready").then_some(())
        })
        .await;
        dev
    }
}

/// What a collector was sent.
struct Export {
    headers: HeaderMap,
    body: String,
}

/// A collector that takes OTLP by HTTP, at the address that it returns.
async fn collector() -> (SocketAddr, mpsc::UnboundedReceiver<Export>) {
    let (sender, exports) = mpsc::unbounded_channel();
    let receive = move |headers: HeaderMap, body: Bytes| async move {
        // Names are text in both encodings.
        let body = String::from_utf8_lossy(&body).into_owned();
        let _ = sender.send(Export { headers, body });
        StatusCode::OK
    };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let router = Router::new().route("/v1/traces", post(receive));
    tokio::spawn(async move { axum::serve(listener, router).await });
    (address, exports)
}

async fn exports_by(protocol: Option<&str>, content_type: &str) {
    let (address, mut exports) = collector().await;
    let mut env = vec![
        ("OTEL_EXPORTER_OTLP_ENDPOINT", format!("http://{address}")),
        ("OTEL_EXPORTER_OTLP_HEADERS", "x-tenant=cell".to_owned()),
        ("OTEL_BSP_SCHEDULE_DELAY", "100".to_owned()),
    ];
    env.extend(protocol.map(|protocol| ("OTEL_EXPORTER_OTLP_PROTOCOL", protocol.to_owned())));
    let dev = Dev::start(&env).await;
    assert_eq!(dev.gateway.get("nothing.default.localhost", "/").await.unwrap().status, 404);
    let export = loop {
        let export = exports.recv().await.expect("dev exports");
        if export.body.contains("gateway.request") {
            break export;
        }
    };
    assert_eq!(export.headers["content-type"], content_type);
    assert_eq!(export.headers["x-tenant"], "cell");
    assert!(export.body.contains("pilotlight-dev"), "the service's name: {}", export.body);
    assert!(dev.process.terminate().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn traces_are_exported_by_http_with_protobuf_by_default() {
    exports_by(None, "application/x-protobuf").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn traces_are_exported_by_http_with_json() {
    exports_by(Some("http/json"), "application/json").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn faults_of_telemetry_are_logged_and_end_no_process() {
    // One that accepts connections and never answers.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let silent = format!("http://{}", silent.local_addr().unwrap());
    for (endpoint, protocol, logged) in [
        ("http://127.0.0.1:1".to_owned(), "http/protobuf", ""),
        ("http://127.0.0.1:1".to_owned(), "grpc", ""),
        (silent.clone(), "http/protobuf", ""),
        (silent, "grpc", ""),
        ("http://[".to_owned(), "http/protobuf", "traces are not exported"),
        ("http://[".to_owned(), "grpc", "traces are not exported"),
        ("http://127.0.0.1:1".to_owned(), "smtp", "expected grpc, http/protobuf or http/json"),
    ] {
        let env = [
            ("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.clone()),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", protocol.to_owned()),
            ("OTEL_BSP_SCHEDULE_DELAY", "50".to_owned()),
        ];
        let dev = Dev::start(&env).await;
        assert_eq!(dev.gateway.get("nothing.default.localhost", "/").await.unwrap().status, 404);
        let log = dev.process.log();
        assert!(log.contains(logged) && !log.contains("panicked"), "{endpoint} {protocol}: {log}");
        assert!(dev.process.terminate().success(), "{endpoint} {protocol}");
    }
}

/// What promtool says of metrics.
fn promtool(text: &str) -> String {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let installed = std::env::split_paths(&path).any(|directory| Path::new(&directory).join("promtool").is_file());
    assert!(installed, "this story needs promtool; scripts/test.sh installs it (Debian: prometheus)");
    let mut promtool = std::process::Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    promtool.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let output = promtool.wait_with_output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    format!("{}{}", if output.status.success() { "" } else { "failed: " }, String::from_utf8_lossy(&said))
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_of_the_coordinator_pass_promtool_and_count_what_happens() {
    let dev = Dev::start(&[]).await;
    assert_eq!(dev.operator.run(&["get", "isvc", "nothing"]).code, 1);
    let expected = [
        "coordinator_leader 1",
        "coordinator_leader_transitions_total 1",
        "coordinator_agent_sessions 1",
        "coordinator_nodes{state=\"Ready\"} 1",
        "coordinator_store_operation_duration_seconds_count{operation=\"commit\"} ",
        "coordinator_control_loop_duration_seconds_count ",
        "coordinator_route_push_bytes_total ",
        "rpc_method=\"pilotlight.control.v1.Control/Get\",rpc_response_status_code=\"NOT_FOUND\"",
    ];
    let answer = eventually("all metrics are there", || async {
        let answer = dev.metrics.get("localhost", "/metrics").await.ok()?;
        expected.iter().all(|metric| answer.body.contains(metric)).then_some(answer)
    })
    .await;
    assert_eq!(answer.headers["content-type"], "text/plain; version=0.0.4; charset=utf-8");
    assert_eq!(promtool(&answer.body), "");
}
