//! Putting a replica to sleep and waking it: by its server's own endpoints, else by pausing its process.
//!
//! vLLM's are `POST /sleep?level=1` (weights go to main memory, the cache of keys and values is dropped),
//! `POST /wake_up` and `GET /is_sleeping`. A replica that is only paused keeps its GPU memory.

use std::{net::SocketAddr, time::Duration};

use bytes::Bytes;
use http::{Method, Request};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use pilotlight_proto::fleet::v1::SleepPaths;
use serde::Deserialize;
use tokio::time::Instant;

use crate::runtime::{Running, Runtime, RuntimeError};

/// Between the first questions whether it sleeps; then twice as long each time, to [`LOOK_MOST`].
const LOOK: Duration = Duration::from_millis(2);
/// Between questions at most.
const LOOK_MOST: Duration = Duration::from_millis(50);
/// The longest answer that is read, bytes.
const ANSWER_MOST: usize = 4096;

/// How a replica fell asleep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slept {
    /// How long it took.
    pub took: Duration,
    /// True where its GPU memory is still held: nobody else can have it.
    pub holds_gpu_memory: bool,
}

/// Why a replica did not fall asleep or wake.
#[derive(Debug, thiserror::Error)]
pub enum SleepError {
    /// Its server did not do it.
    #[error("{path}: {reason}")]
    Server {
        /// Which path was asked.
        path: String,
        /// Why.
        reason: String,
    },
    /// It took too long.
    #[error("{path}: not done within {limit:?}")]
    Timeout {
        /// Which path was asked, or what the runtime was asked for.
        path: String,
        /// How long it may take.
        limit: Duration,
    },
    /// The runtime cannot pause it.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
}

/// Puts a replica, which has no request any more, to sleep. Where this fails, it may sleep or not; the
/// caller should then stop it. Doing it again does no harm, as long as the server bears being asked twice.
///
/// # Errors
/// The server refuses or takes longer than `limit`, or the runtime cannot pause.
pub async fn fall_asleep(
    runtime: &dyn Runtime,
    running: &Running,
    paths: Option<&SleepPaths>,
    limit: Duration,
) -> Result<Slept, SleepError> {
    let began = Instant::now();
    match paths {
        Some(paths) => turn(running.address, &paths.sleep, &paths.is_sleeping, true, limit).await?,
        None => within(limit, "pause", runtime.pause(running)).await?,
    }
    Ok(Slept { took: began.elapsed(), holds_gpu_memory: paths.is_none() })
}

/// Wakes a replica; how long that took. Whether it is ready is for its probe to say. One that is awake
/// stays so.
///
/// # Errors
/// As [`fall_asleep`].
pub async fn wake(
    runtime: &dyn Runtime,
    running: &Running,
    paths: Option<&SleepPaths>,
    limit: Duration,
) -> Result<Duration, SleepError> {
    let began = Instant::now();
    match paths {
        Some(paths) => turn(running.address, &paths.wake, &paths.is_sleeping, false, limit).await?,
        None => within(limit, "resume", runtime.resume(running)).await?,
    }
    Ok(began.elapsed())
}

async fn within(
    limit: Duration,
    what: &str,
    work: impl Future<Output = Result<(), RuntimeError>>,
) -> Result<(), SleepError> {
    match tokio::time::timeout(limit, work).await {
        Ok(done) => Ok(done?),
        Err(_) => Err(SleepError::Timeout { path: what.to_owned(), limit }),
    }
}

/// Asks a server to sleep or to wake, and waits until it says that it does.
async fn turn(
    address: SocketAddr,
    path: &str,
    is_sleeping: &str,
    asleep: bool,
    limit: Duration,
) -> Result<(), SleepError> {
    let client = Client::builder(TokioExecutor::new()).build_http();
    let work = async {
        ask(&client, Method::POST, address, path).await?;
        let mut pause = LOOK;
        // Without a way to ask, its word is taken.
        while !is_sleeping.is_empty()
            && says(&ask(&client, Method::GET, address, is_sleeping).await?, is_sleeping)? != asleep
        {
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LOOK_MOST);
        }
        Ok(())
    };
    let timeout = |_| SleepError::Timeout { path: path.to_owned(), limit };
    tokio::time::timeout(limit, work).await.map_err(timeout)?
}

/// A server's answer to whether it sleeps.
#[derive(Deserialize)]
struct Answer {
    is_sleeping: bool,
}

fn says(body: &[u8], path: &str) -> Result<bool, SleepError> {
    let answer: Result<Answer, _> = serde_json::from_slice(body);
    answer.map(|answer| answer.is_sleeping).map_err(|error| SleepError::Server {
        path: path.to_owned(),
        reason: format!("expected {{\"is_sleeping\": true or false}}: {error}"),
    })
}

async fn ask(
    client: &Client<HttpConnector, Empty<Bytes>>,
    method: Method,
    address: SocketAddr,
    path: &str,
) -> Result<Bytes, SleepError> {
    let failed = |reason: String| SleepError::Server { path: path.to_owned(), reason };
    let request = Request::builder().method(method).uri(format!("http://{address}{path}")).body(Empty::new());
    let request = request.map_err(|error| failed(error.to_string()))?;
    let response = client.request(request).await.map_err(|error| failed(error.to_string()))?;
    let status = response.status();
    let body = Limited::new(response.into_body(), ANSWER_MOST).collect().await;
    let body = body.map_err(|error| failed(error.to_string()))?.to_bytes();
    if status.is_success() { Ok(body) } else { Err(failed(format!("HTTP status {status}"))) }
}

#[cfg(test)]
mod tests;
