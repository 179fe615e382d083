//! What the stories in `tests/` share: real processes of the `pilotlight` binary, their ports and
//! directories, and a client for each of their doors.
#![allow(clippy::print_stderr, reason = "a failing story shows the logs of its processes")]

pub mod cell;
pub mod cluster;
pub mod container;
pub mod disk;
pub mod http;
pub mod load;
pub mod manifest;
pub mod nvml;
pub mod otlp;
pub mod process;
pub mod registry;
pub mod relay;
pub mod s3;
pub mod steady;
pub mod store;

use std::{
    future::Future,
    net::TcpListener,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

/// Asks again until there is an answer. The bound is no expectation: it only ends a story that hangs.
///
/// # Panics
/// There was no answer for two minutes.
pub async fn eventually<T, F, Fut>(what: &str, mut ask: F) -> T
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Option<T>>,
{
    let asking = async {
        loop {
            if let Some(answer) = ask().await {
                return answer;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    match tokio::time::timeout(Duration::from_secs(120), asking).await {
        Ok(answer) => answer,
        Err(_) => panic!("gave up waiting until {what}"),
    }
}

/// A loopback port that was free a moment ago, and that no other test of this process is given.
///
/// Below the range from which the system takes ports for connections: one that is given out here would
/// else be taken by a connection before its server listens.
///
/// # Panics
/// There is none.
pub fn free_port() -> u16 {
    const FIRST: u32 = 10_000;
    const COUNT: u32 = 22_000;
    static NEXT: AtomicU32 = AtomicU32::new(0);
    // Test binaries may run beside each other: each begins elsewhere.
    let begin = std::process::id().wrapping_mul(617);
    for _ in 0..COUNT {
        let offset = begin.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) % COUNT;
        let port = (FIRST + offset) as u16;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
    panic!("no free port from {FIRST} to {}", FIRST + COUNT);
}
