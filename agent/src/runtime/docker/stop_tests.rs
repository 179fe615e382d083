//! Stopping a container, on an engine that refuses to send signals to paused containers, as some do.

use std::sync::{Arc, Mutex};

use axum::{
    Json, Router,
    extract::{Request, State},
    http::StatusCode,
    response::{IntoResponse as _, Response},
};
use serde_json::json;
use tokio::{net::UnixListener, sync::watch};

use super::*;

/// An engine with one container.
struct Engine {
    paused: Mutex<bool>,
    running: watch::Sender<bool>,
    /// What it was asked to do to the container, in order, and whether it did.
    calls: Mutex<Vec<(String, bool)>>,
}

impl Engine {
    fn kill(&self, query: &str) -> StatusCode {
        let paused = *self.paused.lock().unwrap();
        self.calls.lock().unwrap().push((query.to_owned(), !paused));
        if paused {
            return StatusCode::CONFLICT;
        }
        self.running.send_replace(false);
        StatusCode::NO_CONTENT
    }

    fn unpause(&self) -> StatusCode {
        let was_paused = std::mem::take(&mut *self.paused.lock().unwrap());
        self.calls.lock().unwrap().push(("unpause".to_owned(), was_paused));
        if was_paused { StatusCode::NO_CONTENT } else { StatusCode::CONFLICT }
    }
}

async fn answer(State(engine): State<Arc<Engine>>, request: Request) -> Response {
    let (path, query) = (request.uri().path().to_owned(), request.uri().query().unwrap_or_default().to_owned());
    let refused = |status: StatusCode| (status, Json(json!({ "message": "as the engine says" }))).into_response();
    match path.rsplit('/').next().unwrap_or_default() {
        "version" => Json(json!({ "ApiVersion": "1.41", "Version": "1" })).into_response(),
        "bridge" => Json(json!({ "IPAM": { "Config": [{ "Gateway": "172.17.0.1" }] } })).into_response(),
        "json" => {
            let (running, paused) = (*engine.running.borrow(), *engine.paused.lock().unwrap());
            Json(json!({ "State": { "Running": running, "Paused": paused, "ExitCode": 0 }, "Config": {} }))
                .into_response()
        }
        "wait" => {
            let mut running = engine.running.subscribe();
            running.wait_for(|running| !running).await.unwrap();
            Json(json!({ "StatusCode": 0 })).into_response()
        }
        "kill" => refused(engine.kill(&query)),
        "unpause" => refused(engine.unpause()),
        _ => refused(StatusCode::NOT_FOUND),
    }
}

#[tokio::test]
async fn a_paused_container_is_resumed_before_it_gets_the_stop_signal() {
    let data = tempfile::tempdir().unwrap();
    let socket = data.path().join("engine.sock");
    let engine =
        Arc::new(Engine { paused: Mutex::new(true), running: watch::Sender::new(true), calls: Mutex::default() });
    let router = Router::new().fallback(answer).with_state(Arc::clone(&engine));
    let listener = UnixListener::bind(&socket).unwrap();
    tokio::spawn(async move { axum::serve(listener, router).await });
    let settings = DockerSettings { socket: socket.display().to_string(), ..DockerSettings::default() };
    let runtime = DockerRuntime::connect("node", data.path(), settings).await.unwrap();
    let running = Running {
        replica: "a".to_owned(),
        pid: 0,
        address: (Ipv4Addr::LOCALHOST, 1).into(),
        started_at: 0,
        assignment: ReplicaAssignment::default(),
        container: Some("c".to_owned()),
        ports: Default::default(),
    };
    // Without the fix the whole grace period passes before a kill.
    runtime.stop(&running, Duration::from_secs(10)).await;
    let calls = engine.calls.lock().unwrap().clone();
    assert_eq!(calls, [("unpause".to_owned(), true), ("signal=SIGTERM".to_owned(), true)]);
}
