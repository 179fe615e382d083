//! Tokens of one revision's requests on this node, and how many bytes of a request make one.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::time::Instant;

use super::{load::Meter, served::Served};

/// Bytes of a request's body per prompt token, before any answer has told better.
pub const BYTES_PER_TOKEN: f64 = 4.0;
/// How much one answer moves the ratio.
const STEP: f64 = 0.2;
/// Ratios beyond these, from images in a prompt or a server that miscounts, move it no further.
const RATIOS: (f64, f64) = (0.5, 64.0);
/// More tokens than any request has; what a server says beyond that is not believed.
const MOST_TOKENS: u64 = 1 << 32;

/// One revision's tokens on one node.
#[derive(Debug)]
pub struct TokenLoad(Mutex<Inner>, Arc<Served>);

#[derive(Debug)]
struct Inner {
    in_flight: Meter,
    bytes_per_token: f64,
}

impl TokenLoad {
    /// None in flight, from `now` on. Tokens of answers are added to `served`.
    pub fn new(now: Instant, served: Arc<Served>) -> Arc<Self> {
        let inner = Inner { in_flight: Meter::new(now), bytes_per_token: BYTES_PER_TOKEN };
        Arc::new(Self(Mutex::new(inner), served))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a request whose body has so many bytes: its prompt, until it is known, by estimate.
    pub fn begin(self: &Arc<Self>, body_bytes: u64) -> TokenCount {
        let mut count = TokenCount {
            load: Arc::clone(self),
            body_bytes,
            prompt: 0,
            generated: 0,
            counted: 0,
            exact: false,
            answered: false,
        };
        count.estimate();
        count
    }

    /// Tokens in flight now.
    pub fn in_flight(&self) -> u64 {
        self.lock().in_flight.value()
    }

    /// Bytes of a request's body per prompt token, as learned so far.
    pub fn bytes_per_token(&self) -> f64 {
        self.lock().bytes_per_token
    }

    /// One answer's ratio moves the estimate: an exponentially weighted mean.
    pub fn learn(&self, bytes_per_token: f64) {
        if bytes_per_token.is_finite() {
            let mut inner = self.lock();
            inner.bytes_per_token += STEP * (bytes_per_token.clamp(RATIOS.0, RATIOS.1) - inner.bytes_per_token);
        }
    }

    /// Mean of the tokens in flight since the last call.
    pub(super) fn take(&self, now: Instant) -> f64 {
        self.lock().in_flight.take(now)
    }
}

/// One request's tokens, counted until dropped.
#[derive(Debug)]
pub struct TokenCount {
    load: Arc<TokenLoad>,
    body_bytes: u64,
    prompt: u64,
    generated: u64,
    /// What of it the revision's count has.
    counted: u64,
    /// True once the server has said how long the prompt is.
    exact: bool,
    /// `true` if a replica of this node has begun to answer the request, and well.
    answered: bool,
}

impl TokenCount {
    /// The body turned out to have so many bytes.
    pub fn body(&mut self, bytes: u64) {
        if bytes != self.body_bytes && !self.exact {
            self.body_bytes = bytes;
            self.estimate();
        }
    }

    /// A replica of this node has begun to answer with success: its tokens are billed.
    pub fn answered(&mut self) {
        self.answered = true;
    }

    /// So many more tokens were generated.
    pub fn generated(&mut self, tokens: u64) {
        self.generated = (self.generated + tokens).min(MOST_TOKENS);
        self.count();
    }

    /// What the server says: exact from here on. The first time it teaches the ratio.
    pub fn usage(&mut self, prompt: u64, generated: Option<u64>) {
        if !self.exact && prompt > 0 && self.body_bytes > 0 {
            self.load.learn(self.body_bytes as f64 / prompt as f64);
        }
        self.exact = true;
        self.prompt = prompt.min(MOST_TOKENS);
        self.generated = generated.unwrap_or(self.generated).min(MOST_TOKENS);
        self.count();
    }

    fn estimate(&mut self) {
        self.prompt = (self.body_bytes as f64 / self.load.bytes_per_token()).ceil() as u64;
        self.count();
    }

    fn count(&mut self) {
        let tokens = self.prompt + self.generated;
        let mut inner = self.load.lock();
        let others = inner.in_flight.value() - self.counted;
        inner.in_flight.set(others + tokens, Instant::now());
        self.counted = tokens;
    }
}

impl Drop for TokenCount {
    fn drop(&mut self) {
        if self.answered {
            self.load.1.add_tokens(self.exact.then_some((self.prompt, self.generated)));
        }
        (self.prompt, self.generated) = (0, 0);
        self.count();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_mean_follows_estimate_stream_and_usage() {
        let load = TokenLoad::new(Instant::now(), Arc::default());
        let mut count = load.begin(400);
        assert_eq!(load.in_flight(), 100, "4 bytes a token");
        tokio::time::advance(Duration::from_secs(1)).await;
        count.generated(20);
        tokio::time::advance(Duration::from_secs(1)).await;
        assert!((load.take(Instant::now()) - 110.0).abs() < 1e-9, "100 for a second, 120 for another");
        count.usage(80, Some(25));
        count.generated(1);
        assert_eq!(load.in_flight(), 106);
        let other = load.begin(0);
        drop(count);
        assert_eq!(load.in_flight(), 0);
        drop(other);
        tokio::time::advance(Duration::from_secs(1)).await;
        load.take(Instant::now());
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(load.take(Instant::now()), 0.0, "exactly");
    }

    #[tokio::test]
    async fn the_ratio_is_learned_once_per_request_and_only_from_what_makes_sense() {
        let load = TokenLoad::new(Instant::now(), Arc::default());
        let mut count = load.begin(900);
        count.usage(100, Some(1));
        count.usage(100, Some(2));
        assert!((load.bytes_per_token() - 5.0).abs() < 1e-9, "4 + 0.2 · (9 - 4)");
        drop(count);
        assert_eq!(load.begin(1000).prompt, 200);
        load.begin(900).usage(0, Some(2));
        load.begin(0).usage(7, None);
        load.learn(f64::NAN);
        assert!((load.bytes_per_token() - 5.0).abs() < 1e-9, "nothing to learn from these");
        load.begin(1 << 40).usage(1, None);
        assert!((load.bytes_per_token() - 16.8).abs() < 1e-9, "5 + 0.2 · (64 - 5)");
        load.begin(1).usage(u64::MAX, Some(u64::MAX));
        assert_eq!(load.in_flight(), 0, "a server that says nonsense breaks nothing");
    }
}
