//! What the reconciler tells the data path about this node's replicas.

use std::{io, net::SocketAddr, time::Duration};

use futures::future::BoxFuture;
use tokio_util::sync::DropGuard;

/// A replica on this node that can be sent requests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalReplica {
    /// Unique replica name.
    pub name: String,
    /// `<namespace>/<revision>`.
    pub revision: String,
    /// Where its server listens.
    pub address: SocketAddr,
    /// True where it speaks HTTP/2 with prior knowledge.
    pub h2c: bool,
    /// Requests it may run at the same time; 0 is no limit.
    pub container_concurrency: u32,
    /// Longest time a request may take.
    pub timeout: Duration,
}

/// The data path's side of a replica's life. Calls are idempotent.
pub trait Endpoints: Send + Sync + 'static {
    /// The replica is ready: give it requests, even if it was to drain.
    fn ready(&self, replica: LocalReplica);
    /// Its probe fails: it gives no new slots until it is ready again.
    fn not_ready(&self, replica: &str);
    /// The replica gives no new slots; those in use go on.
    fn drain(&self, replica: &str);
    /// Resolves when a draining (or unknown) replica runs no request any more.
    fn drained(&self, replica: &str) -> BoxFuture<'static, ()>;
    /// The replica is gone: requests on it fail, nothing more is sent there.
    fn remove(&self, replica: &str);
}

/// The way from a replica back to the gateway.
pub trait Egress: Send + Sync + 'static {
    /// Listens at `address`, port 0 for any, and takes every request there for one to `host`, until what it
    /// gives is dropped; requests that run then may end.
    fn open(&self, host: &str, address: SocketAddr) -> BoxFuture<'static, io::Result<EgressListener>>;
}

/// A listener of [`Egress`]; it closes when this is dropped.
#[derive(Debug)]
pub struct EgressListener {
    /// Where it listens.
    pub address: SocketAddr,
    pub(crate) _open: DropGuard,
}
