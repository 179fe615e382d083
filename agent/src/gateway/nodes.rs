//! Connections to other nodes: one each, opened where it is needed.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};

use super::{answer::Body, forward::Connect};

const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// A connection to each node whose address is known.
pub struct Nodes {
    connect: Arc<dyn Connect>,
    known: Mutex<HashMap<String, Arc<Connection>>>,
}

struct Connection {
    address: String,
    sender: tokio::sync::Mutex<Option<http2::SendRequest<Body>>>,
}

impl Nodes {
    /// None is known yet.
    pub fn new(connect: Arc<dyn Connect>) -> Self {
        Self { connect, known: Mutex::default() }
    }

    /// Where nodes are now; connections to others are dropped.
    pub fn addresses(&self, nodes: &BTreeMap<String, String>) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|node, connection| nodes.get(node).is_some_and(|address| *address == connection.address));
        for (node, address) in nodes {
            known
                .entry(node.clone())
                .or_insert_with(|| Arc::new(Connection { address: address.clone(), sender: Default::default() }));
        }
    }

    /// The connection to a node, opened where there is none.
    ///
    /// # Errors
    /// The node is not known, or does not answer.
    pub async fn sender(&self, node: &str) -> io::Result<http2::SendRequest<Body>> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner).get(node).cloned();
        let connection = known.ok_or_else(|| io::Error::other(format!("node {node} is not known")))?;
        let mut slot = connection.sender.lock().await;
        if let Some(sender) = slot.as_ref().filter(|sender| !sender.is_closed()) {
            return Ok(sender.clone());
        }
        let stream = self.connect.connect(node, &connection.address).await?;
        let (sender, serving) = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE)
            .adaptive_window(true)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(io::Error::other)?;
        let name = node.to_owned();
        tokio::spawn(async move {
            if let Err(error) = serving.await {
                tracing::debug!(node = %name, %error, "connection to node ended");
            }
        });
        *slot = Some(sender.clone());
        Ok(sender)
    }
}
