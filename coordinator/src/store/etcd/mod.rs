//! The etcd store.

mod lease;
mod members;

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use etcd_client::{
    Client, Compare as EtcdCompare, CompareOp, EventType, GetOptions, KeyValue, PutOptions, SortOrder, SortTarget, Txn,
    TxnOp, TxnOpResponse, WatchOptions,
};
use futures::StreamExt as _;
use tracing::{debug, warn};

use super::{
    Compare, Entry, Event, Events, Lease, Listing, OPERATIONS_MOST, Store, StoreError, Transaction, Write, by_revision,
};
use crate::config::EtcdConfig;
use members::Members;

/// Keys in one page of a list.
const PAGE: i64 = 1000;
/// Pause before a broken watch is opened again.
const WATCH_PAUSE: Duration = Duration::from_millis(250);

/// An etcd cluster. All keys lie below one prefix.
#[derive(Clone)]
pub struct EtcdStore {
    members: Arc<Members>,
    prefix: String,
}

impl std::fmt::Debug for EtcdStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EtcdStore").field("prefix", &self.prefix).finish_non_exhaustive()
    }
}

impl EtcdStore {
    /// A cluster with `prefix`, which ends in `/`. Connects when it is first used.
    ///
    /// # Errors
    /// A setting cannot be used, or a file cannot be read.
    pub fn new(config: &EtcdConfig, prefix: &str) -> Result<Self, StoreError> {
        Ok(Self { members: Arc::new(Members::new(config)?), prefix: prefix.to_owned() })
    }

    /// The same, once a member has answered.
    ///
    /// # Errors
    /// As [`EtcdStore::new`], or no member answers within 5 s.
    pub async fn connect(config: &EtcdConfig, prefix: &str) -> Result<Self, StoreError> {
        let store = Self::new(config, prefix)?;
        store.ping().await?;
        Ok(store)
    }

    fn key(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    fn entry(&self, kv: &KeyValue) -> Entry {
        Entry {
            key: self.short(kv),
            value: Bytes::copy_from_slice(kv.value()),
            create_revision: kv.create_revision() as u64,
            mod_revision: kv.mod_revision() as u64,
            version: kv.version() as u64,
        }
    }

    fn short(&self, kv: &KeyValue) -> String {
        let key = String::from_utf8_lossy(kv.key());
        key.strip_prefix(&self.prefix).unwrap_or(&key).to_owned()
    }

    fn compare(&self, compare: &Compare) -> EtcdCompare {
        match compare {
            Compare::ModRevision(key, revision) => {
                EtcdCompare::mod_revision(self.key(key), CompareOp::Equal, *revision as i64)
            }
            Compare::CreateRevision(key, revision) => {
                EtcdCompare::create_revision(self.key(key), CompareOp::Equal, *revision as i64)
            }
        }
    }

    fn operation(&self, write: &Write) -> TxnOp {
        match write {
            Write::Put { key, value, lease } => {
                let options = lease.map(|lease| PutOptions::new().with_lease(lease as i64));
                TxnOp::put(self.key(key), value.to_vec(), options)
            }
            Write::Delete { key } => TxnOp::delete(self.key(key), None),
        }
    }

    /// The first compare that did not hold, from the keys as etcd found them.
    fn conflict(transaction: &Transaction, found: &[TxnOpResponse]) -> StoreError {
        let failed = transaction.compares.iter().zip(found).find(|(compare, found)| {
            let TxnOpResponse::Get(found) = found else { return false };
            let kv = found.kvs().first();
            match compare {
                Compare::ModRevision(_, expected) => kv.map_or(0, KeyValue::mod_revision) as u64 != *expected,
                Compare::CreateRevision(_, expected) => kv.map_or(0, KeyValue::create_revision) as u64 != *expected,
            }
        });
        let key = failed.map(|(compare, _)| compare.key().to_owned()).unwrap_or_default();
        StoreError::Conflict { key }
    }
}

#[async_trait]
impl Store for EtcdStore {
    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        let response = self.members.ask(|client| get(client, self.key(key).into_bytes(), None)).await?;
        Ok(response.kvs().first().map(|kv| self.entry(kv)))
    }

    async fn list(&self, prefix: &str) -> Result<Listing, StoreError> {
        let mut listing = Listing::default();
        let prefix = self.key(prefix);
        let end = after_all_with(&prefix);
        let mut start = prefix.into_bytes();
        loop {
            let options = GetOptions::new()
                .with_range(end.clone())
                .with_limit(PAGE)
                .with_revision(listing.revision as i64)
                .with_sort(SortTarget::Key, SortOrder::Ascend);
            let response = self.members.ask(|client| get(client, start.clone(), Some(options.clone()))).await?;
            if listing.revision == 0 {
                // All further pages are read at the first one's revision.
                listing.revision = response.header().map_or(0, |header| header.revision() as u64);
            }
            listing.entries.extend(response.kvs().iter().map(|kv| self.entry(kv)));
            match response.kvs().last() {
                Some(last) if response.more() => {
                    start = last.key().to_vec();
                    start.push(0);
                }
                _ => return Ok(listing),
            }
        }
    }

    async fn commit(&self, transaction: Transaction) -> Result<u64, StoreError> {
        if transaction.operations() > OPERATIONS_MOST {
            return Err(StoreError::TooLarge(transaction.operations()));
        }
        let compares: Vec<_> = transaction.compares.iter().map(|compare| self.compare(compare)).collect();
        let writes: Vec<_> = transaction.writes.iter().map(|write| self.operation(write)).collect();
        let keys_only = || Some(GetOptions::new().with_keys_only());
        let look: Vec<_> = transaction.compares.iter().map(|c| TxnOp::get(self.key(c.key()), keys_only())).collect();
        let txn = Txn::new().when(compares).and_then(writes).or_else(look);
        let attempt = |mut client: Client| {
            let txn = txn.clone();
            async move { client.txn(txn).await }
        };
        let response = self.members.once(attempt, self.members.member_timeout()).await?;
        if response.succeeded() {
            Ok(response.header().map_or(0, |header| header.revision() as u64))
        } else {
            Err(Self::conflict(&transaction, &response.op_responses()))
        }
    }

    async fn watch(&self, prefix: &str, from_revision: u64) -> Result<Events, StoreError> {
        let store = self.clone();
        let prefix = self.key(prefix);
        // etcd reports lost history only on the stream; the first answer tells.
        let mut first = Some(store.open_watch(&prefix, from_revision).await?);
        Ok(async_stream::try_stream! {
            let mut next = from_revision;
            loop {
                let opened = match first.take() {
                    Some(stream) => Ok(stream),
                    None => store.open_watch(&prefix, next).await,
                };
                let mut stream = match opened {
                    Ok(stream) => stream,
                    Err(error) => {
                        debug!(%error, "watch cannot be opened; trying again");
                        tokio::time::sleep(WATCH_PAUSE).await;
                        continue;
                    }
                };
                loop {
                    let response = match stream.message().await {
                        Ok(Some(response)) => response,
                        Ok(None) => break,
                        Err(error) => {
                            debug!(%error, "watch broke; opening it again");
                            break;
                        }
                    };
                    if response.compact_revision() > 0 {
                        Err(StoreError::Compacted { oldest: response.compact_revision() as u64 })?;
                    }
                    if response.canceled() {
                        warn!(reason = response.cancel_reason(), "etcd ended a watch; opening it again");
                        break;
                    }
                    let events = response.events().iter().filter_map(|event| store.event(event));
                    let events: Vec<_> = events.filter(|event| event.revision() >= next).collect();
                    for events in by_revision(events) {
                        next = events.last().map_or(next, |event| event.revision() + 1);
                        yield events;
                    }
                }
                tokio::time::sleep(WATCH_PAUSE).await;
            }
        }
        .boxed())
    }

    async fn lease(&self, ttl: Duration) -> Result<Lease, StoreError> {
        lease::grant(&self.members, ttl).await
    }

    async fn ping(&self) -> Result<(), StoreError> {
        let options = GetOptions::new().with_count_only();
        self.members.ask(|client| get(client, self.key("ping").into_bytes(), Some(options.clone()))).await.map(drop)
    }

    fn kind(&self) -> &'static str {
        "etcd"
    }
}

impl EtcdStore {
    fn event(&self, event: &etcd_client::Event) -> Option<Event> {
        let kv = event.kv()?;
        Some(match event.event_type() {
            EventType::Put => Event::Put(self.entry(kv)),
            EventType::Delete => Event::Delete { key: self.short(kv), revision: kv.mod_revision() as u64 },
        })
    }

    async fn open_watch(&self, prefix: &str, from: u64) -> Result<etcd_client::WatchStream, StoreError> {
        let open = |mut client: Client| {
            let options = WatchOptions::new().with_prefix().with_start_revision(from as i64);
            async move { client.watch(prefix, Some(options)).await }
        };
        self.members.ask(open).await
    }
}

/// A read of one key or range.
async fn get(
    mut client: Client,
    key: Vec<u8>,
    options: Option<GetOptions>,
) -> Result<etcd_client::GetResponse, etcd_client::Error> {
    client.get(key, options).await
}

/// The first key after all that begin with `prefix`.
fn after_all_with(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    // UTF-8 has no byte 0xff, so the last one can always be raised.
    if let Some(last) = end.last_mut() {
        *last += 1;
    }
    end
}
