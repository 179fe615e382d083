//! The plain HTTP listener for status and metrics.

use std::{sync::Arc, time::Duration};

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::RateLimit;

/// Longest wait for a request's head, from the connection's start or from the last response.
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest life of a connection. Ends clients that send or read a byte at a time.
const CONNECTION_LIFETIME: Duration = Duration::from_secs(300);
/// Connections served at the same time; others wait in the kernel's queue.
const MAX_CONNECTIONS: usize = 64;
/// Pause after a connection could not be accepted, such as when no file descriptor is left.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);

/// Serves `router` by HTTP/1 until `shutdown`. Connections without a complete request for 30 s are closed, and all
/// others after 5 minutes.
pub async fn serve_status(listener: TcpListener, router: Router, shutdown: CancellationToken) {
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let log = RateLimit::default();
    loop {
        let accepted = tokio::select! {
            () = shutdown.cancelled() => return,
            accepted = async {
                // The semaphore is never closed.
                let permit = Arc::clone(&permits).acquire_owned().await.ok();
                listener.accept().await.map(|(stream, _)| (stream, permit))
            } => accepted,
        };
        match accepted {
            Ok((stream, permit)) => {
                let (router, shutdown) = (router.clone(), shutdown.clone());
                tokio::spawn(async move {
                    serve_connection(stream, router, shutdown).await;
                    drop(permit);
                });
            }
            Err(error) => {
                if log.allow() {
                    warn!(%error, "cannot accept a connection for status");
                }
                tokio::time::sleep(ACCEPT_BACKOFF).await;
            }
        }
    }
}

async fn serve_connection(stream: TcpStream, router: Router, shutdown: CancellationToken) {
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    tokio::select! {
        ended = connection => if let Err(error) = ended {
            debug!(%error, "status connection ended");
        },
        () = tokio::time::sleep(CONNECTION_LIFETIME) => {}
        () = shutdown.cancelled() => {}
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    async fn connect() -> TcpStream {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = Router::new().route("/", axum::routing::get(|| async { "ok" }));
        tokio::spawn(serve_status(listener, router, CancellationToken::new()));
        TcpStream::connect(address).await.unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_without_a_request_is_closed() {
        let mut client = connect().await;
        client.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n").await.unwrap();
        let mut received = Vec::new();
        client.read_to_end(&mut received).await.unwrap();
        assert!(!String::from_utf8_lossy(&received).contains("200"), "{received:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn an_idle_connection_is_closed_after_its_response() {
        let mut client = connect().await;
        client.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        let mut received = Vec::new();
        client.read_to_end(&mut received).await.unwrap();
        assert!(received.starts_with(b"HTTP/1.1 200 OK"), "{received:?}");
    }
}
