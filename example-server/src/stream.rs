//! A stream of server-sent events, as a language model would send tokens; for trying streams out.

use std::{convert::Infallible, sync::Arc, time::Duration};

use axum::{
    Router,
    extract::{Query, State},
    response::{Sse, sse::Event},
    routing::get,
};
use futures::{Stream, stream};
use jiff::SignedDuration;
use serde::Deserialize;

use crate::{Server, error::Refusal, state::InFlight};

const MAX_EVENTS: u32 = 1_000_000;

pub(crate) fn routes() -> Router<Arc<Server>> {
    Router::new().route("/v1/stream", get(events).post(events))
}

#[derive(Debug, Deserialize)]
struct StreamQuery {
    /// Events before `[DONE]`.
    #[serde(default = "default_events")]
    n: u32,
    /// Time before each event, such as `100ms`.
    #[serde(default = "default_interval")]
    interval: SignedDuration,
}

fn default_events() -> u32 {
    10
}

fn default_interval() -> SignedDuration {
    SignedDuration::from_millis(100)
}

async fn events(
    State(server): State<Arc<Server>>,
    Query(query): Query<StreamQuery>,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, Refusal> {
    let in_flight = server.begin();
    let checked = check(&server, &query);
    match checked {
        Ok(interval) => Ok(Sse::new(tokens(query.n, interval, in_flight))),
        Err(refusal) => {
            in_flight.answered();
            Err(refusal)
        }
    }
}

fn check(server: &Server, query: &StreamQuery) -> Result<Duration, Refusal> {
    server.classifier()?;
    if query.n > MAX_EVENTS {
        return Err(Refusal::field("n", format!("expected 0 to {MAX_EVENTS}, got {}", query.n)));
    }
    pause("interval", query.interval)
}

/// A time to wait, as `field` gives it.
pub(crate) fn pause(field: &str, given: SignedDuration) -> Result<Duration, Refusal> {
    Duration::try_from(given).map_err(|_| Refusal::field(field, format!("expected 0s or more, got {given}")))
}

/// `data: {"token": i}`, one an interval, and `data: [DONE]`. The request counts as in flight for as long.
fn tokens(n: u32, interval: Duration, in_flight: InFlight) -> impl Stream<Item = Result<Event, Infallible>> {
    stream::unfold((0, Some(in_flight)), move |(sent, in_flight)| async move {
        let in_flight = in_flight?;
        if sent == n {
            in_flight.answered();
            return Some((Ok(Event::default().data("[DONE]")), (sent, None)));
        }
        tokio::time::sleep(interval).await;
        Some((Ok(Event::default().data(format!("{{\"token\":{sent}}}"))), (sent + 1, Some(in_flight))))
    })
}
