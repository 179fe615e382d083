//! Fewer replicas are wanted, or none at all, while answers are being streamed: none is cut.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering::Relaxed},
};

use http_body_util::BodyExt as _;
use hyper::Request;
use pilotlight_tests::{cell::Dev, eventually, http::Gateway, manifest::Iris};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

const HOST: &str = "iris.default.localhost";
/// Words of a long answer, a tenth of a second each: longer than it takes to scale down.
const LONG: usize = 400;

/// A stream that is being read.
struct Stream {
    read: Arc<AtomicUsize>,
    reading: JoinHandle<String>,
}

impl Stream {
    /// Asks the example server's echo for so many words.
    async fn open(gateway: &Gateway, words: usize) -> Self {
        let request = json!({
            "model": "iris",
            "messages": [{ "role": "user", "content": "word ".repeat(words) }],
            "stream": true,
            "stream_options": { "include_usage": true },
        });
        let head = Request::post("/v1/chat/completions?interval=100ms").header("content-type", "application/json");
        let response = gateway.open(HOST, head, &request.to_string()).await.unwrap();
        assert_eq!(response.status(), 200);
        let read = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&read);
        let mut body = response.into_body();
        let reading = tokio::spawn(async move {
            let mut text = String::new();
            while let Some(frame) = body.frame().await {
                let data = frame.expect("the stream is not cut").into_data().unwrap_or_default();
                text.push_str(std::str::from_utf8(&data).unwrap());
                count.store(text.matches("\n\n").count(), Relaxed);
            }
            text
        });
        let stream = Self { read, reading };
        // Some reports have told the coordinator by then which replicas are busy.
        eventually("the stream has run for a while", || async { (stream.read() > 30).then_some(()) }).await;
        stream
    }

    /// Events so far.
    fn read(&self) -> usize {
        self.read.load(Relaxed)
    }

    fn running(&self) -> bool {
        !self.reading.is_finished()
    }

    /// Waits for its end, which must be the proper one.
    async fn ends_whole(self, words: usize) {
        let text = self.reading.await.unwrap();
        let events: Vec<&str> =
            text.split_terminator("\n\n").map(|event| event.strip_prefix("data: ").unwrap()).collect();
        let parsed = |event: &&str| serde_json::from_str::<Value>(event).unwrap();
        let (last, events) = events.split_last().unwrap();
        assert_eq!(*last, "[DONE]");
        let said = events.iter().map(parsed).filter(|event| event["choices"][0]["delta"]["content"].is_string());
        assert_eq!(said.count(), words);
        assert_eq!(parsed(events.last().unwrap())["usage"]["completion_tokens"], words);
    }
}

/// Process id of the replica that answers a new request.
async fn answering(dev: &Dev) -> Value {
    dev.gateway.get(HOST, "/stats").await.unwrap().json()["pid"].clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn idle_replicas_leave_first_and_busy_ones_end_their_streams() {
    let dev = Dev::start(&[], vec![]).await;
    let three = Iris { min_replicas: 3, ..Iris::default() };
    assert_eq!(dev.operator.apply(&three.yaml(), &[]).code, 0);
    let before = dev.operator.replicas_are("iris", 3, "Ready").await;
    // Each goes to the emptiest replica, so two replicas are busy and one is idle.
    let streams = [Stream::open(&dev.gateway, LONG).await, Stream::open(&dev.gateway, LONG).await];

    let one = Iris { min_replicas: 1, ..three };
    assert_eq!(dev.operator.apply(&one.yaml(), &[]).code, 0);
    let (stays, leaves) = eventually("the idle replica is gone and one drains", || async {
        let replicas = dev.operator.replicas("iris");
        let find = |phase: &str| replicas.iter().find(|replica| replica["phase"] == phase).cloned();
        (replicas.len() == 2).then_some((find("Ready")?, find("Draining")?))
    })
    .await;
    assert!(before.iter().any(|replica| replica["pid"] == stays["pid"]), "nothing was started anew");
    assert!(streams.iter().all(Stream::running), "the one that is gone had none of them");

    eventually("the agent, too, knows that it drains", || async {
        (answering(&dev).await == stays["pid"]).then_some(())
    })
    .await;
    let progress = streams[0].read().max(streams[1].read());
    while streams.iter().all(|stream| stream.read() < progress + 20) {
        assert_eq!(answering(&dev).await, stays["pid"], "a new request goes elsewhere");
    }
    let draining = dev.operator.replicas("iris").into_iter().find(|replica| replica["pid"] == leaves["pid"]).unwrap();
    assert_eq!(draining["phase"], "Draining", "it lives as long as its stream");

    for stream in streams {
        stream.ends_whole(LONG).await;
    }
    let after = dev.operator.replicas_are("iris", 1, "Ready").await;
    assert_eq!(after[0]["pid"], stays["pid"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_service_ends_its_stream_first() {
    let dev = Dev::start(&[], vec![]).await;
    assert_eq!(dev.operator.apply(&Iris { min_replicas: 1, ..Iris::default() }.yaml(), &[]).code, 0);
    dev.operator.replicas_are("iris", 1, "Ready").await;
    let stream = Stream::open(&dev.gateway, 150).await;
    dev.operator.must(&["delete", "isvc", "iris"]);
    eventually("the service has no route any more", || async {
        (dev.gateway.get(HOST, "/stats").await.ok()?.status == 404).then_some(())
    })
    .await;
    assert!(stream.running());
    stream.ends_whole(150).await;
    dev.operator.replicas_are("iris", 0, "").await;
}
