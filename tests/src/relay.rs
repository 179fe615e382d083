//! A relay before a server, which can hold back what the server says: so a story has a middle to act in,
//! however fast the machine is.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, tcp},
    sync::watch,
    task::{JoinHandle, JoinSet},
};

use crate::{eventually, free_port};

/// Bytes passed on at once.
const CHUNK: usize = 64 << 10;

/// A relay. Ends with the value, and its connections with it.
#[derive(Debug)]
pub struct Relay {
    port: u16,
    counted: Counted,
    accepting: JoinHandle<()>,
}

/// What has passed, and what may.
#[derive(Debug, Clone)]
struct Counted {
    passed: Arc<AtomicU64>,
    limit: Arc<watch::Sender<u64>>,
}

impl Relay {
    /// Passes on all that comes to a loopback port of its own to the server at another one.
    ///
    /// # Panics
    /// It cannot listen.
    pub async fn before(server: u16) -> Self {
        let port = free_port();
        let listener = TcpListener::bind(("127.0.0.1", port)).await.expect("the port is free");
        let counted = Counted { passed: Arc::default(), limit: Arc::new(watch::Sender::new(u64::MAX)) };
        let of_connections = counted.clone();
        let accepting = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                tokio::select! {
                    accepted = listener.accept() => if let Ok((client, _)) = accepted {
                        connections.spawn(relay(client, server, of_connections.clone()));
                    },
                    Some(_) = connections.join_next() => {}
                }
            }
        });
        Self { port, counted, accepting }
    }

    /// Where it listens.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Bytes that the server has said so far, and that were passed on.
    pub fn passed(&self) -> u64 {
        self.counted.passed.load(Ordering::SeqCst)
    }

    /// From now on lets only so many bytes through, a chunk more or less.
    pub fn hold_after(&self, bytes: u64) {
        self.counted.limit.send_replace(self.passed().saturating_add(bytes));
    }

    /// Waits until something is held back.
    pub async fn holds(&self) {
        eventually("the relay holds something back", || async {
            (self.passed() >= *self.counted.limit.borrow()).then_some(())
        })
        .await;
    }

    /// Lets everything through.
    pub fn release(&self) {
        self.counted.limit.send_replace(u64::MAX);
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn relay(client: TcpStream, server: u16, counted: Counted) {
    let Ok(server) = TcpStream::connect(("127.0.0.1", server)).await else { return };
    let (mut from_client, to_client) = client.into_split();
    let (from_server, mut to_server) = server.into_split();
    // Whichever side closes first ends both: neither HTTP client nor server closes half of a connection.
    tokio::select! {
        _ = tokio::io::copy(&mut from_client, &mut to_server) => {}
        () = answers(from_server, to_client, counted) => {}
    }
}

async fn answers(mut from: tcp::OwnedReadHalf, mut to: tcp::OwnedWriteHalf, counted: Counted) {
    let mut limit = counted.limit.subscribe();
    let mut chunk = vec![0; CHUNK];
    loop {
        let Ok(read @ 1..) = from.read(&mut chunk).await else { return };
        let below = |limit: &u64| counted.passed.load(Ordering::SeqCst) < *limit;
        if limit.wait_for(below).await.is_err() {
            return;
        }
        counted.passed.fetch_add(read as u64, Ordering::SeqCst);
        if to.write_all(&chunk[..read]).await.is_err() {
            return;
        }
    }
}
