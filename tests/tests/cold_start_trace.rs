//! One trace runs from the request that found zero replicas to the answer.

use std::collections::{BTreeMap, BTreeSet};

use hyper::Request;
use pilotlight_tests::{
    cell::Cell,
    eventually,
    manifest::{Iris, TWO_FLOWERS},
    otlp::{Receiver, hex},
};

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const CLIENT: &str = "b7ad6b7169203331";
/// What a cold start consists of, outermost first.
const SPANS: [&str; 6] =
    ["gateway.request", "gateway.wait", "autoscaler.decide", "replica.start", "replica.load", "gateway.proxy"];

#[tokio::test(flavor = "multi_thread")]
async fn a_cold_start_is_one_connected_trace() {
    let (receiver, url) = Receiver::start().await;
    let env = vec![
        ("OTEL_EXPORTER_OTLP_ENDPOINT", url),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc".to_owned()),
        ("OTEL_BSP_SCHEDULE_DELAY", "200".to_owned()),
    ];
    let cell = Cell::start(env).await;
    let agent = cell.agent("gpu-1", 1).await;
    assert_eq!(cell.operator.apply(&Iris::default().yaml(), &[]).code, 0);
    let answer = eventually("the route has arrived", || async {
        let request = Request::post("/v1/models/iris:predict").header("traceparent", format!("00-{TRACE}-{CLIENT}-01"));
        let answer = agent.gateway.send("iris.default.localhost", request, TWO_FLOWERS).await.ok()?;
        (answer.status != 404).then_some(answer)
    })
    .await;
    assert_eq!(answer.status, 200);

    let spans = eventually("all spans of the cold start have come", || async {
        let spans = receiver.trace(TRACE);
        SPANS.iter().all(|name| spans.iter().any(|received| received.span.name == *name)).then_some(spans)
    })
    .await;
    let ids: BTreeMap<String, &str> =
        spans.iter().map(|received| (hex(&received.span.span_id), received.span.name.as_str())).collect();
    let parents: BTreeMap<&str, String> =
        spans.iter().map(|received| (received.span.name.as_str(), hex(&received.span.parent_span_id))).collect();
    let parent = |name: &str| ids.get(&parents[name]).copied().unwrap_or("");
    // Every span has a parent in the trace; the outermost one's is the client's.
    for received in spans.iter().filter(|received| received.span.name != "gateway.request") {
        assert!(ids.contains_key(&hex(&received.span.parent_span_id)), "{} is loose", received.span.name);
    }
    assert_eq!(parent("gateway.wait"), "gateway.request");
    assert_eq!(parent("autoscaler.decide"), "gateway.wait");
    assert_eq!(parent("replica.start"), "autoscaler.decide");
    assert_eq!(parent("replica.load"), "replica.start");
    assert_eq!(parent("gateway.proxy"), "gateway.request");
    let services: BTreeSet<_> = spans.iter().map(|received| received.service.clone()).collect();
    assert_eq!(services.len(), 2, "agent and coordinator: {services:?}");
    // The model server was given the proxy's span as its parent.
    let received = answer.headers["x-received-traceparent"].to_str().unwrap();
    assert!(received.starts_with(&format!("00-{TRACE}-")), "{received}");
    assert_eq!(ids.get(received.split('-').nth(2).unwrap()), Some(&"gateway.proxy"));
}
