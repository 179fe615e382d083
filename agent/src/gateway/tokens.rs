//! Counts the tokens of OpenAI answers as they pass. Bytes go on unbuffered and unchanged.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, header, request::Parts};
use http_body::{Body as HttpBody, Frame, SizeHint};
use http_body_util::BodyExt as _;
use serde::Deserialize;

use super::answer::{Body, BoxError};
use crate::sidecar::{TokenCount, TokenLoad};

/// Between nodes: bytes of a request's body per prompt token, as the replica's node has learned it.
pub const BYTES_PER_TOKEN: HeaderName = HeaderName::from_static("pilotlight-bytes-per-token");

/// Bytes of an answer, or of one event, that are kept to read `usage` from. Past that it is not read.
const KEPT_MOST: usize = 64 << 10;
const USAGE: &[u8] = br#""usage""#;

/// True for requests whose tokens are counted: completions by OpenAI's API.
pub fn counts(parts: &Parts) -> bool {
    let path = parts.uri.path();
    let path = path.strip_prefix("/openai").unwrap_or(path);
    matches!(path, "/v1/completions" | "/v1/chat/completions")
        && parts.method == Method::POST
        && media_type(&parts.headers).is_some_and(|media| media.eq_ignore_ascii_case("application/json"))
}

/// An answer's body that counts tokens until it ends, or its reader has gone.
pub fn counted(body: Body, headers: &HeaderMap, count: TokenCount) -> Body {
    Tap { body, count: Some(count), reader: Reader::of(headers) }.boxed_unsync()
}

/// Tells the gateway that sent the request what has been learned.
pub fn tell(headers: &mut HeaderMap, load: &TokenLoad) {
    // Digits and a point make a header value always.
    if let Ok(value) = HeaderValue::try_from(format!("{:.3}", load.bytes_per_token())) {
        headers.insert(BYTES_PER_TOKEN, value);
    }
}

/// Takes out what [`tell`] put in, and learns from it.
pub fn heard(headers: &mut HeaderMap, load: &TokenLoad) {
    let value = headers.remove(BYTES_PER_TOKEN);
    if let Some(ratio) = value.and_then(|value| value.to_str().ok()?.parse().ok()) {
        load.learn(ratio);
    }
}

fn media_type(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(header::CONTENT_TYPE)?.to_str().ok()?;
    value.split(';').next().map(str::trim)
}

struct Tap {
    body: Body,
    /// `None` once the body has ended.
    count: Option<TokenCount>,
    reader: Reader,
}

impl Tap {
    fn read(&mut self, data: &[u8]) {
        let Some(count) = &mut self.count else { return };
        match &mut self.reader {
            Reader::Events(events) => {
                let mut tokens = 0;
                let mut usage = None;
                events.read(data, |event| match event {
                    Event::Token => tokens += 1,
                    Event::Usage(said) => (tokens, usage) = (said.after(tokens), Some(said)),
                });
                if let Some(usage) = usage {
                    count.usage(usage.prompt_tokens, usage.completion_tokens);
                }
                if tokens > 0 {
                    count.generated(tokens);
                }
            }
            Reader::Json(kept) if kept.len() + data.len() <= KEPT_MOST => kept.extend_from_slice(data),
            Reader::Json(_) => self.reader = Reader::Nothing,
            Reader::Nothing => {}
        }
    }

    fn ended(&mut self) {
        if let Some(mut count) = self.count.take()
            && let Reader::Json(kept) = &self.reader
            && let Some(usage) = Usage::of(kept)
        {
            count.usage(usage.prompt_tokens, usage.completion_tokens);
        }
    }
}

impl HttpBody for Tap {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        match &frame {
            Some(Ok(frame)) => {
                if let Some(data) = frame.data_ref() {
                    self.read(data);
                }
                // A reader that knows the length does not ask again after the last byte.
                if self.body.is_end_stream() {
                    self.ended();
                }
            }
            Some(Err(_)) => self.count = None,
            None => self.ended(),
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// What an answer is read as.
enum Reader {
    Events(Events),
    Json(Vec<u8>),
    /// Something else, compressed, or too long.
    Nothing,
}

impl Reader {
    fn of(headers: &HeaderMap) -> Self {
        match media_type(headers).map(str::to_ascii_lowercase).as_deref() {
            _ if headers.contains_key(header::CONTENT_ENCODING) => Self::Nothing,
            Some("text/event-stream") => Self::Events(Events::default()),
            Some("application/json") => Self::Json(Vec::new()),
            _ => Self::Nothing,
        }
    }
}

/// OpenAI's `usage`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
struct Usage {
    prompt_tokens: u64,
    completion_tokens: Option<u64>,
}

impl Usage {
    /// Of an answer or an event, where it has one.
    fn of(json: &[u8]) -> Option<Self> {
        #[derive(Deserialize)]
        struct WithUsage {
            usage: Option<Usage>,
        }
        // Most events have none; those are not parsed.
        let named = json.windows(USAGE.len()).any(|bytes| bytes == USAGE);
        if named { serde_json::from_slice::<WithUsage>(json).ok()?.usage } else { None }
    }

    /// Tokens to count beside it, of those seen before it.
    fn after(self, seen: u64) -> u64 {
        if self.completion_tokens.is_some() { 0 } else { seen }
    }
}

/// What an event says.
enum Event {
    Token,
    Usage(Usage),
}

/// Reads server-sent events (WHATWG HTML, 9.2.6), however frames cut them.
#[derive(Default)]
struct Events {
    line: Vec<u8>,
    data: Vec<u8>,
    has_data: bool,
    /// Something was too long to keep: the event counts, but is not read.
    too_long: bool,
    after_return: bool,
}

impl Events {
    fn read(&mut self, mut bytes: &[u8], mut take: impl FnMut(Event)) {
        while let Some(first) = bytes.first() {
            if std::mem::take(&mut self.after_return) && *first == b'\n' {
                bytes = &bytes[1..];
                continue;
            }
            let end = bytes.iter().position(|byte| matches!(byte, b'\n' | b'\r'));
            self.keep(&bytes[..end.unwrap_or(bytes.len())]);
            let Some(end) = end else { return };
            self.after_return = bytes[end] == b'\r';
            bytes = &bytes[end + 1..];
            if let Some(event) = self.line_ended() {
                take(event);
            }
        }
    }

    fn keep(&mut self, bytes: &[u8]) {
        let room = KEPT_MOST - self.line.len().min(KEPT_MOST);
        self.too_long |= bytes.len() > room;
        self.line.extend_from_slice(&bytes[..bytes.len().min(room)]);
    }

    fn line_ended(&mut self) -> Option<Event> {
        if self.line.is_empty() {
            return self.event_ended();
        }
        let value = self.line.strip_prefix(b"data").and_then(|rest| match rest {
            [] => Some(rest),
            [b':', b' ', value @ ..] | [b':', value @ ..] => Some(value),
            _ => None,
        });
        if let Some(value) = value {
            if std::mem::replace(&mut self.has_data, true) {
                self.data.push(b'\n');
            }
            if self.data.len() + value.len() <= KEPT_MOST {
                self.data.extend_from_slice(value);
            } else {
                self.too_long = true;
            }
        }
        self.line.clear();
        None
    }

    fn event_ended(&mut self) -> Option<Event> {
        let too_long = std::mem::take(&mut self.too_long);
        let event = match std::mem::take(&mut self.has_data) {
            false => None,
            true if too_long => Some(Event::Token),
            true if self.data == b"[DONE]" => None,
            true => Some(Usage::of(&self.data).map_or(Event::Token, Event::Usage)),
        };
        self.data.clear();
        event
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use futures::stream;
    use http::Request;
    use http_body_util::{Full, StreamBody};
    use tokio::time::Instant;

    use super::*;

    /// Six events of which one is `[DONE]`, one has an empty `usage` and one tells it; with all line ends that
    /// the standard allows, a comment, a field that is none of ours, and data in two lines.
    const STREAM: &str = "data: {\"choices\":[{\"delta\":{\"content\":\"a\"}}],\"usage\":null}\n\n\
        : keep-alive\n\nevent: x\r\ndata:{\"choices\":[]}\r\n\r\ndatabase: no\n\ndata: {\"a\":\rdata: 1}\r\r\
        data: {\"choices\":[],\"usage\":{\"prompt_tokens\":50,\"completion_tokens\":7,\"total_tokens\":57}}\n\n\
        data: more\n\ndata: [DONE]\n\n";

    fn load() -> Arc<TokenLoad> {
        TokenLoad::new(Instant::now(), Arc::default())
    }

    fn tap(load: &Arc<TokenLoad>, media: &'static str, frames: Vec<Result<&'static [u8], BoxError>>) -> Body {
        let frames = frames.into_iter().map(|frame| frame.map(|data| Frame::data(Bytes::from_static(data))));
        let headers = HeaderMap::from_iter([(header::CONTENT_TYPE, HeaderValue::from_static(media))]);
        counted(StreamBody::new(stream::iter(frames)).boxed_unsync(), &headers, load.begin(400))
    }

    /// Reads one frame; what it has, and the tokens that are in flight then.
    async fn next(load: &TokenLoad, body: &mut Body) -> (Option<Bytes>, u64) {
        let frame = body.frame().await.and_then(Result::ok).and_then(|frame| frame.into_data().ok());
        (frame, load.in_flight())
    }

    #[tokio::test]
    async fn events_count_however_frames_cut_them_and_pass_unchanged() {
        for size in 1..=STREAM.len() {
            let load = load();
            let chunks: Vec<_> = STREAM.as_bytes().chunks(size).collect();
            let mut body = tap(&load, "text/event-stream; charset=utf-8", chunks.iter().copied().map(Ok).collect());
            let mut last = 0;
            for chunk in chunks {
                let (frame, tokens) = next(&load, &mut body).await;
                assert_eq!(frame.unwrap().as_ptr(), chunk.as_ptr(), "the very same bytes");
                last = tokens;
            }
            assert_eq!(last, 50 + 7 + 1, "exact up to the usage, one more after it; frames of {size} bytes");
            assert_eq!(next(&load, &mut body).await, (None, 0));
            assert!((load.bytes_per_token() - 4.8).abs() < 1e-9, "4 + 0.2 · (8 - 4)");
        }
    }

    #[tokio::test]
    async fn tokens_are_counted_while_the_stream_runs() {
        let load = load();
        let frames: [&[u8]; 4] = [b"data: a\n", b"\ndata: b\n\ndata: c\n", b"\n", b"data: [DONE]\n\n"];
        let mut body = tap(&load, "text/event-stream", frames.map(Ok).into_iter().collect());
        let mut seen = vec![load.in_flight()];
        for _ in frames {
            seen.push(next(&load, &mut body).await.1);
        }
        assert_eq!(seen, [100, 100, 102, 103, 103], "an estimated prompt of 100, then one an event");
        assert_eq!(next(&load, &mut body).await, (None, 0));
    }

    #[tokio::test]
    async fn a_stream_that_breaks_off_or_is_left_counts_no_more() {
        let load = load();
        let frames = vec![Ok(&b"data: a\n\n"[..]), Err("reset".into()), Ok(b"data: b\n\n")];
        let mut broken = tap(&load, "text/event-stream", frames);
        assert_eq!(next(&load, &mut broken).await.1, 101);
        assert_eq!(broken.frame().await.unwrap().unwrap_err().to_string(), "reset", "passed on, not hidden");
        assert_eq!(load.in_flight(), 0);

        let mut left = tap(&load, "text/event-stream", vec![Ok(b"data: a\n\ndata: {\"usa")]);
        assert_eq!(next(&load, &mut left).await.1, 101);
        drop(left);
        assert_eq!(load.in_flight(), 0);
    }

    #[tokio::test]
    async fn an_answer_in_one_piece_teaches_the_ratio_at_its_end() {
        const ANSWER: &[u8] = br#"{"choices": [], "usage": {"prompt_tokens": 50, "completion_tokens": 9}}"#;
        let load = load();
        let mut body = tap(&load, "application/json", vec![Ok(&ANSWER[..30]), Ok(&ANSWER[30..])]);
        while body.frame().await.is_some() {}
        assert!((load.bytes_per_token() - 4.8).abs() < 1e-9);

        // Of known length: its reader asks for the bytes, and never for the end.
        let headers = HeaderMap::from_iter([(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))]);
        let known = Full::new(Bytes::from_static(ANSWER)).map_err(|never| match never {}).boxed_unsync();
        let mut body = counted(known, &headers, load.begin(480));
        assert_eq!(next(&load, &mut body).await, (Some(Bytes::from_static(ANSWER)), 0));
        assert!(load.bytes_per_token() > 4.9, "learned again");
    }

    #[tokio::test]
    async fn what_is_too_long_or_compressed_passes_and_teaches_nothing() {
        const TAIL: &[u8] = br#"", "usage": {"prompt_tokens": 1, "completion_tokens": 1}}"#;
        let long: &'static [u8] = Box::leak(vec![b'x'; KEPT_MOST].into_boxed_slice());
        let load = load();
        let mut json = tap(&load, "application/json", vec![Ok(b"{\"x\": \""), Ok(long), Ok(TAIL)]);
        let mut passed = 0;
        while let (Some(data), 100) = next(&load, &mut json).await {
            passed += data.len();
        }
        assert_eq!(passed, 7 + KEPT_MOST + TAIL.len());

        let frames = vec![Ok(&b"data: {\"x\": \""[..]), Ok(long), Ok(TAIL), Ok(b"\n\n"), Ok(b"data: y\n\n")];
        let mut events = tap(&load, "text/event-stream", frames);
        let mut seen = Vec::new();
        while let (Some(_), tokens) = next(&load, &mut events).await {
            seen.push(tokens);
        }
        assert_eq!(seen, [100, 100, 100, 101, 102], "an event all the same");

        let mut headers = HeaderMap::from_iter([(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))]);
        headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
        let whole = Full::new(Bytes::from_static(br#"{"usage": {"prompt_tokens": 1}}"#));
        let mut gzip = counted(whole.map_err(|never| match never {}).boxed_unsync(), &headers, load.begin(400));
        while gzip.frame().await.is_some() {}
        assert_eq!((load.in_flight(), load.bytes_per_token()), (0, 4.0));
    }

    #[test]
    fn only_completions_count() {
        let parts = |method: Method, path: &str, media: &str| {
            let request = Request::builder().method(method).uri(path).header(header::CONTENT_TYPE, media);
            request.body(()).unwrap().into_parts().0
        };
        for path in ["/v1/completions", "/openai/v1/completions", "/v1/chat/completions?x=1"] {
            assert!(counts(&parts(Method::POST, path, "application/JSON; charset=utf-8")), "{path}");
            assert!(!counts(&parts(Method::GET, path, "application/json")), "{path}");
            assert!(!counts(&parts(Method::POST, path, "multipart/form-data")), "{path}");
        }
        for path in ["/v1/models/iris:predict", "/openai/v1/completions/x", "/x/v1/completions", "/v1/embeddings"] {
            assert!(!counts(&parts(Method::POST, path, "application/json")), "{path}");
        }
    }

    #[test]
    fn a_ratio_travels_between_nodes_and_no_further() {
        let (here, there) = (load(), load());
        there.begin(900).usage(100, None);
        let mut headers = HeaderMap::new();
        tell(&mut headers, &there);
        heard(&mut headers, &here);
        assert!(headers.is_empty());
        assert!((here.bytes_per_token() - 4.2).abs() < 1e-9, "4 + 0.2 · (5 - 4)");
    }
}
