//! A constant load on a gateway, and who answered.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures::{StreamExt as _, stream};
use tokio::{task::JoinHandle, time::MissedTickBehavior};

use crate::{http::Gateway, manifest::TWO_FLOWERS};

/// Good answers, by the header `x-served-by`.
#[derive(Debug, Default)]
pub struct Answers(BTreeMap<String, u32>);

impl Answers {
    /// Answers by this version.
    pub fn of(&self, version: &str) -> u32 {
        self.0.get(version).copied().unwrap_or_default()
    }

    /// All answers.
    pub fn total(&self) -> u32 {
        self.0.values().sum()
    }
}

/// Sends requests and counts who answers.
#[derive(Debug, Clone)]
pub struct Client {
    gateway: Gateway,
    host: &'static str,
    path: &'static str,
    answers: Arc<Mutex<Answers>>,
    failures: Arc<Mutex<Vec<String>>>,
}

/// A load that does not wait for answers; it ends when dropped.
#[derive(Debug)]
pub struct Load(JoinHandle<()>);

impl Drop for Load {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Client {
    /// Sends to this gateway.
    pub fn new(gateway: &Gateway, host: &'static str, path: &'static str) -> Self {
        Self { gateway: gateway.clone(), host, path, answers: Arc::default(), failures: Arc::default() }
    }

    async fn ask(&self) {
        let failure = match self.gateway.post(self.host, self.path, TWO_FLOWERS).await {
            Ok(answer) if answer.status == 200 => {
                let version = answer.headers.get("x-served-by").and_then(|version| version.to_str().ok());
                let version = version.unwrap_or_default().to_owned();
                *lock(&self.answers).0.entry(version).or_default() += 1;
                return;
            }
            Ok(answer) => format!("{}: {}", answer.status, answer.body),
            Err(error) => format!("{error:#}"),
        };
        lock(&self.failures).push(failure);
    }

    /// Sends as many requests in each second from now on, whether they are answered or not.
    pub fn constantly(&self, per_second: u32) -> Load {
        let client = self.clone();
        Load(tokio::spawn(async move {
            let mut ticks = tokio::time::interval(Duration::from_secs(1) / per_second);
            // What was late is still sent: an open loop does not slow down with the server.
            ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
            loop {
                ticks.tick().await;
                let client = client.clone();
                tokio::spawn(async move { client.ask().await });
            }
        }))
    }

    /// Sends that many, 16 at a time, and waits for all answers.
    pub async fn burst(&self, requests: u32) {
        stream::iter(0..requests).for_each_concurrent(16, |_| self.ask()).await;
    }

    /// Good answers since the last time.
    pub fn take(&self) -> Answers {
        std::mem::take(&mut *lock(&self.answers))
    }

    /// All requests, from the beginning, that were not answered with 200, in words.
    pub fn failures(&self) -> Vec<String> {
        lock(&self.failures).clone()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
