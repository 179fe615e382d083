//! OpenAI's chat completions, spoken by an echo: for trying streams and token counts out, not for answers.
//!
//! There is no language model here. It says the last message again, one word at a time, and counts words
//! where a model would count tokens.

use std::{
    convert::Infallible,
    sync::Arc,
    time::{Duration, SystemTime},
};

use axum::{
    Json, Router,
    body::Bytes,
    extract::{Query, State},
    response::{IntoResponse as _, Response, Sse, sse::Event},
    routing::post,
};
use futures::{Stream, stream};
use jiff::SignedDuration;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::{Server, error::Refusal, state::InFlight, stream::pause};

pub(crate) fn routes() -> Router<Arc<Server>> {
    Router::new().route("/v1/chat/completions", post(chat))
}

#[derive(Debug, Deserialize)]
struct Pace {
    /// Time before each word of a stream, such as `100ms`.
    #[serde(default)]
    interval: SignedDuration,
}

#[derive(Debug, Deserialize)]
struct Chat {
    model: String,
    messages: Vec<Message>,
    /// Words to answer with at most.
    max_tokens: Option<usize>,
    #[serde(default)]
    stream: bool,
    #[serde(default)]
    stream_options: StreamOptions,
}

#[derive(Debug, Deserialize)]
struct Message {
    content: String,
}

#[derive(Debug, Default, Deserialize)]
struct StreamOptions {
    #[serde(default)]
    include_usage: bool,
}

async fn chat(State(server): State<Arc<Server>>, Query(pace): Query<Pace>, body: Bytes) -> Response {
    let in_flight = server.begin();
    match check(&server, &pace, &body) {
        Ok((echo, pause)) if echo.stream => Sse::new(events(echo, pause, in_flight)).into_response(),
        Ok((echo, pause)) => {
            tokio::time::sleep(server.request_time.max(pause)).await;
            in_flight.answered();
            Json(echo.whole()).into_response()
        }
        Err(refusal) => {
            in_flight.answered();
            refusal.into_response()
        }
    }
}

fn check(server: &Server, pace: &Pace, body: &[u8]) -> Result<(Echo, Duration), Refusal> {
    server.classifier()?;
    let chat: Chat = serde_json::from_slice(body).map_err(|error| Refusal::field("body", error.to_string()))?;
    server.check_name(&chat.model)?;
    let last = chat.messages.last().ok_or_else(|| Refusal::field("messages", "expected one at least, got none"))?;
    let mut words: Vec<String> = last.content.split_whitespace().map(str::to_owned).collect();
    let limit = chat.max_tokens.unwrap_or(words.len());
    let echo = Echo {
        model: chat.model,
        created: SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |now| now.as_secs()),
        prompt_tokens: chat.messages.iter().map(|message| message.content.split_whitespace().count()).sum(),
        finish_reason: if words.len() > limit { "length" } else { "stop" },
        words: {
            words.truncate(limit);
            words
        },
        stream: chat.stream,
        include_usage: chat.stream_options.include_usage,
    };
    Ok((echo, pause("interval", pace.interval)?))
}

/// What will be said.
struct Echo {
    model: String,
    created: u64,
    prompt_tokens: usize,
    finish_reason: &'static str,
    words: Vec<String>,
    stream: bool,
    include_usage: bool,
}

impl Echo {
    fn object(&self, kind: &str, choices: Value) -> Value {
        json!({
            "id": format!("chatcmpl-echo-{}", self.created),
            "object": kind,
            "created": self.created,
            "model": self.model,
            // Nobody shall take this for a model's words.
            "system_fingerprint": "echo-of-the-last-message",
            "choices": choices,
        })
    }

    fn usage(&self) -> Value {
        let (prompt, completion) = (self.prompt_tokens, self.words.len());
        json!({ "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion })
    }

    fn whole(&self) -> Value {
        let message = json!({ "role": "assistant", "content": self.words.join(" ") });
        let choice = json!({ "index": 0, "message": message, "finish_reason": self.finish_reason });
        let mut answer = self.object("chat.completion", json!([choice]));
        answer["usage"] = self.usage();
        answer
    }

    /// The stream's event at `index`, and whether it is a word; `None` after `[DONE]`.
    fn event(&self, index: usize) -> Option<(bool, String)> {
        let chunk = |choices| self.object("chat.completion.chunk", choices);
        if let Some(word) = self.words.get(index) {
            let delta = match index {
                0 => json!({ "role": "assistant", "content": word }),
                _ => json!({ "content": format!(" {word}") }),
            };
            let choice = json!({ "index": 0, "delta": delta, "finish_reason": null });
            return Some((true, chunk(json!([choice])).to_string()));
        }
        let closing = match (index - self.words.len(), self.include_usage) {
            (0, _) => chunk(json!([{ "index": 0, "delta": {}, "finish_reason": self.finish_reason }])).to_string(),
            (1, true) => {
                let mut last = chunk(json!([]));
                last["usage"] = self.usage();
                last.to_string()
            }
            (1, false) | (2, true) => "[DONE]".to_owned(),
            _ => return None,
        };
        Some((false, closing))
    }
}

/// One event a word, `pause` before each, and OpenAI's closing ones. It counts as in flight for as long.
fn events(echo: Echo, pause: Duration, in_flight: InFlight) -> impl Stream<Item = Result<Event, Infallible>> {
    stream::unfold((echo, 0, in_flight), move |(echo, index, in_flight)| async move {
        let Some((word, data)) = echo.event(index) else {
            in_flight.answered();
            return None;
        };
        if word {
            tokio::time::sleep(pause).await;
        }
        Some((Ok(Event::default().data(data)), (echo, index + 1, in_flight)))
    })
}
