//! What the stories in `tests/` share: real processes of the `pilotlight` binary, their ports and
//! directories, and a client for each of their doors.
#![allow(clippy::print_stderr, reason = "a failing story shows the logs of its processes")]

pub mod cell;
pub mod http;
pub mod load;
pub mod manifest;
pub mod otlp;
pub mod process;

use std::{future::Future, net::TcpListener, time::Duration};

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

/// A loopback port that was free a moment ago.
///
/// # Panics
/// There is none.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free loopback port");
    listener.local_addr().expect("a bound listener has an address").port()
}
