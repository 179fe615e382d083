//! A steady load on a warm service, of which every request must be answered.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::{http::Gateway, manifest::TWO_FLOWERS};

/// What became of the requests.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Requests sent.
    pub sent: usize,
    /// Those that were answered with status 200.
    pub answered: usize,
    /// What the others got, and how often.
    pub failures: BTreeMap<String, usize>,
}

impl Outcome {
    /// Checks that all requests were answered, and that there were some.
    ///
    /// # Panics
    /// One was not.
    pub fn assert_all_answered(&self, during: &str) {
        assert!(self.failures.is_empty() && self.sent == self.answered, "{during}: {self:?}");
        assert!(self.sent > 100, "{during}: only {} requests were sent", self.sent);
    }
}

/// Requests for iris predictions, 100 per second, through several gateways in turn.
#[derive(Debug)]
pub struct SteadyLoad {
    stopping: CancellationToken,
    sending: tokio::task::JoinHandle<Outcome>,
}

/// Time between two requests.
const INTERVAL: Duration = Duration::from_millis(10);

impl SteadyLoad {
    /// Sends requests for `host` until [`SteadyLoad::stop`].
    pub fn start(gateways: Vec<Gateway>, host: &str, path: &str) -> Self {
        let stopping = CancellationToken::new();
        let sending = tokio::spawn(send(gateways, host.to_owned(), path.to_owned(), stopping.clone()));
        Self { stopping, sending }
    }

    /// Stops sending, and waits for the answers.
    ///
    /// # Panics
    /// The sender panicked.
    pub async fn stop(self) -> Outcome {
        self.stopping.cancel();
        self.sending.await.expect("the load does not panic")
    }
}

async fn send(gateways: Vec<Gateway>, host: String, path: String, stopping: CancellationToken) -> Outcome {
    let outcome = Arc::new(Mutex::new(Outcome::default()));
    let mut requests = JoinSet::new();
    let mut ticks = tokio::time::interval(INTERVAL);
    for gateway in gateways.iter().cycle() {
        tokio::select! {
            () = stopping.cancelled() => break,
            _ = ticks.tick() => {}
        }
        let (gateway, host, path, outcome) = (gateway.clone(), host.clone(), path.clone(), Arc::clone(&outcome));
        requests.spawn(async move {
            let answer = gateway.post(&host, &path, TWO_FLOWERS).await;
            let mut outcome = outcome.lock().unwrap_or_else(PoisonError::into_inner);
            outcome.sent += 1;
            match answer {
                Ok(answer) if answer.status == 200 => outcome.answered += 1,
                Ok(answer) => *outcome.failures.entry(format!("{} {}", answer.status, answer.body)).or_default() += 1,
                Err(error) => *outcome.failures.entry(format!("{error:#}")).or_default() += 1,
            }
        });
        while requests.try_join_next().is_some() {}
    }
    requests.join_all().await;
    std::mem::take(&mut *outcome.lock().unwrap_or_else(PoisonError::into_inner))
}
