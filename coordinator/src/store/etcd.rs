//! The etcd store.

use std::{fs, future::Future, path::Path, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use etcd_client::{
    Certificate, Client, Compare as EtcdCompare, CompareOp, ConnectOptions, EventType, GetOptions, Identity, KeyValue,
    PutOptions, SortOrder, SortTarget, TlsOptions, Txn, TxnOp, TxnOpResponse, WatchOptions,
};
use futures::{StreamExt as _, future::BoxFuture};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::{
    Compare, Entry, Event, Events, Lease, Listing, OPERATIONS_MOST, Store, StoreError, Transaction, Write, by_revision,
};
use crate::config::EtcdConfig;

/// A call that takes longer has failed.
const CALL_WITHIN: Duration = Duration::from_secs(5);
/// Keys in one page of a list.
const PAGE: i64 = 1000;
/// Pause before a broken watch is opened again.
const WATCH_PAUSE: Duration = Duration::from_millis(250);

/// An etcd cluster. All keys lie below one prefix.
#[derive(Clone)]
pub struct EtcdStore {
    client: Client,
    prefix: String,
}

impl std::fmt::Debug for EtcdStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EtcdStore").field("prefix", &self.prefix).finish_non_exhaustive()
    }
}

impl EtcdStore {
    /// Connects; `prefix` ends in `/`.
    ///
    /// # Errors
    /// A file cannot be read, or no endpoint answers within 5 s.
    pub async fn connect(config: &EtcdConfig, prefix: &str) -> Result<Self, StoreError> {
        let mut options = ConnectOptions::new()
            .with_connect_timeout(CALL_WITHIN)
            .with_keep_alive(CALL_WITHIN, CALL_WITHIN)
            .with_keep_alive_while_idle(true)
            .with_require_leader(true);
        if let Some((user, password)) = &config.user {
            options = options.with_user(user, password);
        }
        if config.ca.is_some() || config.identity.is_some() {
            options = options.with_tls(tls(config)?);
        }
        let client = within(Client::connect(&config.endpoints, Some(options))).await?;
        let store = Self { client, prefix: prefix.to_owned() };
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

fn tls(config: &EtcdConfig) -> Result<TlsOptions, StoreError> {
    let read =
        |path: &Path| fs::read(path).map_err(|error| StoreError::Open(format!("etcd: {}: {error}", path.display())));
    let mut tls = TlsOptions::new();
    if let Some(ca) = &config.ca {
        tls = tls.ca_certificate(Certificate::from_pem(read(ca)?));
    }
    if let Some((certificate, key)) = &config.identity {
        tls = tls.identity(Identity::from_pem(read(certificate)?, read(key)?));
    }
    Ok(tls)
}

/// Bounds a call's time, so that nothing waits for an etcd that is away.
async fn within<T>(call: impl Future<Output = Result<T, etcd_client::Error>>) -> Result<T, StoreError> {
    match tokio::time::timeout(CALL_WITHIN, call).await {
        Ok(outcome) => outcome.map_err(|error| StoreError::Unavailable(format!("etcd: {error}"))),
        Err(_) => Err(StoreError::Unavailable("etcd: no answer within 5 s".to_owned())),
    }
}

#[async_trait]
impl Store for EtcdStore {
    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        let mut client = self.client.clone();
        let response = within(client.get(self.key(key), None)).await?;
        Ok(response.kvs().first().map(|kv| self.entry(kv)))
    }

    async fn list(&self, prefix: &str) -> Result<Listing, StoreError> {
        let mut client = self.client.clone();
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
            let response = within(client.get(start, Some(options))).await?;
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
        let mut client = self.client.clone();
        let response = within(client.txn(Txn::new().when(compares).and_then(writes).or_else(look))).await?;
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
        let mut first = Some(open_watch(&store.client, &prefix, from_revision).await?);
        Ok(async_stream::try_stream! {
            let mut next = from_revision;
            loop {
                let opened = match first.take() {
                    Some(stream) => Ok(stream),
                    None => open_watch(&store.client, &prefix, next).await,
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
        let seconds = ttl.as_secs().max(1);
        let mut client = self.client.clone();
        let id = within(client.lease_grant(seconds as i64, None)).await?.id();
        let (lost, keep_alive) = (CancellationToken::new(), CancellationToken::new());
        tokio::spawn(keep(client.clone(), id, Duration::from_secs(seconds), lost.clone(), keep_alive.clone()));
        let revoked = lost.clone();
        let revoke = Box::new(move || {
            // Made only when it is called: the call itself cannot be shared between threads.
            let revoking = async move {
                revoked.cancel();
                if let Err(error) = within(client.lease_revoke(id)).await {
                    warn!(%error, lease = id, "cannot revoke; it ends with its time to live");
                }
            };
            Box::pin(revoking) as BoxFuture<'static, ()>
        });
        Ok(Lease::new(id as u64, lost, keep_alive, revoke))
    }

    async fn ping(&self) -> Result<(), StoreError> {
        let mut client = self.client.clone();
        within(client.get(self.key("ping"), Some(GetOptions::new().with_count_only()))).await.map(drop)
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
}

async fn open_watch(client: &Client, prefix: &str, from: u64) -> Result<etcd_client::WatchStream, StoreError> {
    let options = WatchOptions::new().with_prefix().with_start_revision(from as i64);
    within(client.clone().watch(prefix, Some(options))).await
}

/// Keeps a lease alive until its handle is dropped. It counts as lost once nothing was heard of it for
/// its whole time to live: etcd may have ended it by then.
async fn keep(mut client: Client, id: i64, ttl: Duration, lost: CancellationToken, dropped: CancellationToken) {
    let mut heard = tokio::time::Instant::now();
    while heard.elapsed() < ttl && !lost.is_cancelled() {
        let renewed = tokio::select! {
            () = dropped.cancelled() => return,
            renewed = renew(&mut client, id, ttl) => renewed,
        };
        match renewed {
            Ok(true) => heard = tokio::time::Instant::now(),
            Ok(false) => break,
            Err(error) => debug!(%error, lease = id, "cannot keep the lease alive; trying again"),
        }
        tokio::select! {
            () = dropped.cancelled() => return,
            () = tokio::time::sleep(ttl / 4) => {}
        }
    }
    lost.cancel();
}

/// True where the lease goes on, false where etcd has ended it.
async fn renew(client: &mut Client, id: i64, ttl: Duration) -> Result<bool, StoreError> {
    let asking = async {
        let (mut keeper, mut answers) = client.lease_keep_alive(id).await?;
        keeper.keep_alive().await?;
        answers.message().await
    };
    let bounded = tokio::time::timeout(ttl / 2, asking).await;
    let answer = bounded.map_err(|_| StoreError::Unavailable("etcd: no answer".to_owned()))?;
    let answer = answer.map_err(|error| StoreError::Unavailable(format!("etcd: {error}")))?;
    Ok(answer.is_some_and(|answer| answer.ttl() > 0))
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
