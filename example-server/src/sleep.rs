//! Sleep as vLLM has it: `POST /sleep?level=1`, `POST /wake_up`, `GET /is_sleeping`.
//!
//! At level 1 what was loaded stays in main memory, so that waking reads nothing. Both may be asked again.

use std::sync::Arc;

use axum::{
    Json, Router,
    extract::{Query, State},
    routing::{get, post},
};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::{Server, error::Refusal};

pub(crate) fn routes() -> Router<Arc<Server>> {
    Router::new().route("/sleep", post(sleep)).route("/wake_up", post(wake)).route("/is_sleeping", get(is_sleeping))
}

#[derive(Debug, Deserialize)]
struct Depth {
    level: Option<String>,
}

async fn sleep(State(server): State<Arc<Server>>, Query(depth): Query<Depth>) -> Result<(), Refusal> {
    let level = depth.level.as_deref().unwrap_or("1");
    if level != "1" {
        return Err(Refusal::field("level", format!("expected 1, the only level of this server, got {level:?}")));
    }
    if !server.loading_done() {
        return Err(Refusal::loading(&server.model_name));
    }
    server.set_asleep(true);
    tracing::info!(model = server.model_name, "sleeps");
    Ok(())
}

async fn wake(State(server): State<Arc<Server>>) {
    server.set_asleep(false);
    tracing::info!(model = server.model_name, "awake");
}

async fn is_sleeping(State(server): State<Arc<Server>>) -> Json<Value> {
    Json(json!({ "is_sleeping": server.asleep() }))
}
