//! Other nodes that have a model whole: its bytes may come from there. What it consists of is always the
//! store's word, and what came is checked by the hash that is its name.

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use futures::TryStreamExt as _;
use http::StatusCode;
use tokio::sync::{Semaphore, SemaphorePermit};
use tracing::{debug, info};

use super::{
    cache::TreeRecord,
    content,
    lend::{blob_path, tree_path},
    plan::Object,
    source::Content,
};

/// Nodes asked for one model.
const MOST: usize = 4;
/// Ranges asked of one node at once: less than a node hands out, so that it has some for others, too.
const AT_ONCE: usize = 4;
/// A node that does not say within this what it has is not waited for.
const SAY_WITHIN: Duration = Duration::from_secs(3);
/// Longest record of a model, bytes: that of as many files as an archive may have.
const LONGEST_RECORD: usize = 64 << 20;
/// A range that is not here within this is fetched from the store; 2 MiB/s.
pub(super) const PATIENCE: Duration = Duration::from_secs(8);

/// Asks other nodes.
#[async_trait]
pub trait Ask: Send + Sync {
    /// The status and the content of a node's answer to a GET.
    ///
    /// # Errors
    /// There is no answer, and why.
    async fn get(&self, node: &str, path: &str, range: Option<Range<u64>>) -> Result<(StatusCode, Content), String>;
}

/// The nodes that have a model, and what they call its files' contents.
pub(super) struct Peers {
    ask: Arc<dyn Ask>,
    nodes: Vec<Peer>,
    /// Name of each file's content, in the listing's order.
    blobs: Vec<String>,
}

/// One node that has the model.
pub(super) struct Peer {
    pub(super) name: String,
    turns: Semaphore,
    fit: AtomicBool,
}

/// Why a node did not answer with content.
pub(super) enum Refusal {
    /// It has enough to do.
    Busy,
    /// It does not have it, or does not answer.
    Unfit(String),
}

impl Peers {
    /// Those of the named nodes that have exactly this version of the model; `None` where none has it.
    pub(super) async fn find(ask: &Arc<dyn Ask>, names: &[String], key: &str, objects: &[Object]) -> Option<Self> {
        let asked = names.iter().take(MOST).map(|name| async move {
            let said = tokio::time::timeout(SAY_WITHIN, record(ask.as_ref(), name, key)).await;
            let found = said.unwrap_or_else(|_| Err(format!("no answer within {SAY_WITHIN:?}")));
            let found = found.and_then(|record| same(&record, objects).then_some(record.blobs).ok_or_else(differs));
            (name, found)
        });
        let mut blobs: Option<Vec<String>> = None;
        let mut nodes = Vec::new();
        for (name, found) in futures::future::join_all(asked).await {
            match found {
                Ok(found) if *blobs.get_or_insert_with(|| found.clone()) == found => {
                    nodes.push(Peer { name: name.clone(), turns: Semaphore::new(AT_ONCE), fit: AtomicBool::new(true) })
                }
                Ok(_) => debug!(node = %name, "the node has other contents than another one; not taken from there"),
                Err(reason) => debug!(node = %name, %reason, "the model is not taken from the node"),
            }
        }
        let blobs = blobs?;
        info!(nodes = ?nodes.iter().map(|peer| &peer.name).collect::<Vec<_>>(), "other nodes have the model");
        Some(Self { ask: Arc::clone(ask), nodes, blobs })
    }

    /// Name of a file's content, by its place in the listing.
    pub(super) fn blob(&self, number: usize) -> Option<&str> {
        self.blobs.get(number).map(String::as_str)
    }

    /// The nodes in the order in which to ask them; each range begins with another one.
    pub(super) fn order(&self, range: usize) -> impl Iterator<Item = &Peer> {
        let first = range % self.nodes.len().max(1);
        self.nodes[first..].iter().chain(&self.nodes[..first])
    }

    /// A part of a content from one node.
    pub(super) async fn read(&self, peer: &Peer, blob: &str, range: Range<u64>) -> Result<Content, Refusal> {
        match self.ask.get(&peer.name, &blob_path(blob), Some(range)).await {
            Ok((StatusCode::PARTIAL_CONTENT, content)) => Ok(content),
            Ok((StatusCode::SERVICE_UNAVAILABLE, _)) => Err(Refusal::Busy),
            Ok((status, _)) => Err(Refusal::Unfit(format!("the node answers {status}"))),
            Err(reason) => Err(Refusal::Unfit(reason)),
        }
    }
}

impl Peer {
    /// Waits until it may be asked; `None` where it is not fit any more.
    pub(super) async fn turn(&self) -> Option<SemaphorePermit<'_>> {
        let turn = self.turns.acquire().await.ok()?;
        self.fit.load(Ordering::Relaxed).then_some(turn)
    }

    /// It is not asked any more.
    pub(super) fn unfit(&self) {
        self.fit.store(false, Ordering::Relaxed);
    }
}

fn differs() -> String {
    "its model is not what the store lists".to_owned()
}

async fn record(ask: &dyn Ask, node: &str, key: &str) -> Result<TreeRecord, String> {
    let (status, mut content) = ask.get(node, &tree_path(key), None).await?;
    if status != StatusCode::OK {
        return Err(format!("the node answers {status}"));
    }
    let mut text = Vec::new();
    while let Some(chunk) = content.try_next().await? {
        text.extend_from_slice(&chunk);
        if text.len() > LONGEST_RECORD {
            return Err(format!("its record has more than {LONGEST_RECORD} bytes"));
        }
    }
    serde_json::from_slice(&text).map_err(|error| error.to_string())
}

/// True where a node's model is exactly what the store lists now, and each content is the one that the store
/// names, where it does. Unpacked archives are not: what is listed is the archive.
fn same(record: &TreeRecord, objects: &[Object]) -> bool {
    let alike = |(theirs, ours): (&Object, &Object)| {
        (&theirs.path, theirs.size, &theirs.etag) == (&ours.path, ours.size, &ours.etag)
    };
    let named = |(blob, ours): (&String, &Object)| {
        content::parse(blob).is_some() && ours.sha256.as_ref().is_none_or(|sha256| sha256 == blob)
    };
    record.objects.len() == objects.len()
        && record.blobs.len() == objects.len()
        && record.objects.iter().zip(objects).all(alike)
        && record.blobs.iter().zip(objects).all(named)
}
