//! All revisions of this node, and the offers that are open.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc, Mutex, PoisonError, RwLock, Weak,
        atomic::{AtomicU64, Ordering},
    },
};

use futures::future::BoxFuture;
use pilotlight_proto::{fleet::v1 as fleet, peer::v1 as peer};
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};

use super::{
    grant::{Grant, Slot},
    queue::{OFFER_LAPSE, RevisionQueue},
};
use crate::endpoint::{Endpoints, LocalReplica};

/// Where demands go. One that finds it full is dropped: the next report says the same.
pub type Demands = mpsc::Sender<fleet::Demand>;

/// This node's side of the data path.
#[derive(Debug)]
pub struct Sidecar {
    revisions: RwLock<HashMap<String, Arc<RevisionQueue>>>,
    /// Replica → revision, for this node's replicas.
    replicas: Mutex<BTreeMap<String, String>>,
    offers: Mutex<HashMap<u64, Offered>>,
    next: AtomicU64,
    wants: watch::Sender<u64>,
    own: Weak<Self>,
}

#[derive(Debug)]
struct Offered {
    gateway: u64,
    revision: Arc<RevisionQueue>,
    slot: Slot,
}

/// Sends offers to one gateway elsewhere.
#[derive(Debug, Clone)]
pub struct OfferSink {
    gateway: u64,
    revision: Weak<RevisionQueue>,
    sidecar: Weak<Sidecar>,
    sender: mpsc::UnboundedSender<peer::BindResponse>,
}

impl OfferSink {
    /// Offers a slot. False where the gateway is gone.
    pub(super) fn offer(&self, slot: &Slot) -> bool {
        let (Some(sidecar), Some(revision)) = (self.sidecar.upgrade(), self.revision.upgrade()) else { return false };
        let offer = sidecar.next.fetch_add(1, Ordering::Relaxed);
        let message = peer::Offer {
            offer,
            revision: revision.key().to_owned(),
            replica: slot.replica.clone(),
            lapse_ms: OFFER_LAPSE.as_millis() as u32,
        };
        let response = peer::BindResponse { message: Some(peer::bind_response::Message::Offer(message)) };
        let offered = Offered { gateway: self.gateway, revision, slot: slot.clone() };
        sidecar.offers().insert(offer, offered);
        if self.sender.send(response).is_err() {
            sidecar.offers().remove(&offer);
            return false;
        }
        let sidecar = Weak::clone(&self.sidecar);
        tokio::spawn(async move {
            tokio::time::sleep(OFFER_LAPSE).await;
            if let Some(sidecar) = sidecar.upgrade() {
                sidecar.decline(offer);
            }
        });
        true
    }
}

impl Sidecar {
    /// An empty one.
    pub fn new() -> Arc<Self> {
        Arc::new_cyclic(|own| Self {
            revisions: RwLock::default(),
            replicas: Mutex::default(),
            offers: Mutex::default(),
            next: AtomicU64::new(1),
            wants: watch::Sender::new(0),
            own: own.clone(),
        })
    }

    fn offers(&self) -> std::sync::MutexGuard<'_, HashMap<u64, Offered>> {
        self.offers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The queue of a revision, made where there is none.
    pub fn revision(&self, key: &str) -> Arc<RevisionQueue> {
        if let Some(queue) = self.existing(key) {
            return queue;
        }
        let mut revisions = self.revisions.write().unwrap_or_else(PoisonError::into_inner);
        let queue = revisions.entry(key.to_owned()).or_insert_with(|| RevisionQueue::new(key, self.wants.clone()));
        Arc::clone(queue)
    }

    fn existing(&self, key: &str) -> Option<Arc<RevisionQueue>> {
        self.revisions.read().unwrap_or_else(PoisonError::into_inner).get(key).cloned()
    }

    /// All revisions.
    pub fn revisions(&self) -> Vec<Arc<RevisionQueue>> {
        self.revisions.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// Forgets a revision that has no route any more, unless something of it is left here.
    pub fn forget(&self, key: &str) {
        let mut revisions = self.revisions.write().unwrap_or_else(PoisonError::into_inner);
        if revisions.get(key).is_some_and(|queue| queue.disposable()) {
            revisions.remove(key);
        }
    }

    /// Changes when another number of requests waits for some revision.
    pub fn wants(&self) -> watch::Receiver<u64> {
        self.wants.subscribe()
    }

    /// A number for a stream from another node's gateway.
    pub fn new_gateway(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    /// A gateway elsewhere says how many requests wait there.
    pub fn wanted(&self, gateway: u64, want: &peer::Want, sender: &mpsc::UnboundedSender<peer::BindResponse>) {
        let queue = self.revision(&want.revision);
        let sink =
            OfferSink { gateway, revision: Arc::downgrade(&queue), sidecar: self.own.clone(), sender: sender.clone() };
        queue.wanted(gateway, &sink, want.waiting, want.offers_seen);
    }

    /// A gateway elsewhere is gone, with its wants and unused offers.
    pub fn gateway_gone(&self, gateway: u64) {
        for queue in self.revisions() {
            queue.gateway_gone(gateway);
        }
        let open: Vec<u64> =
            self.offers().iter().filter(|(_, offered)| offered.gateway == gateway).map(|(offer, _)| *offer).collect();
        for offer in open {
            self.decline(offer);
        }
    }

    /// An offer was given back, or has lapsed. Nothing happens where it was used.
    pub fn decline(&self, offer: u64) {
        let offered = self.offers().remove(&offer);
        if let Some(offered) = offered {
            offered.revision.withdraw_offer(&offered.slot);
        }
    }

    /// A request that comes with an offer: its slot, once.
    pub fn use_offer(&self, offer: u64) -> Option<Grant> {
        let offered = self.offers().remove(&offer)?;
        offered.revision.use_offer(offered.slot)
    }

    /// A request from another node without an offer: a slot where concurrency is not limited.
    pub fn admit(&self, replica: &str) -> Option<Grant> {
        self.of(replica)?.admit(replica)
    }

    fn of(&self, replica: &str) -> Option<Arc<RevisionQueue>> {
        let key = self.replicas.lock().unwrap_or_else(PoisonError::into_inner).get(replica).cloned();
        self.existing(&key?)
    }

    /// The load since the last report.
    pub fn report(&self, interval: std::time::Duration) -> fleet::QueueReport {
        let now = Instant::now();
        fleet::QueueReport {
            interval: prost_types::Duration::try_from(interval).ok(),
            revisions: self.revisions().iter().filter_map(|queue| queue.report(now)).collect(),
        }
    }
}

impl Endpoints for Sidecar {
    fn ready(&self, replica: LocalReplica) {
        let mut replicas = self.replicas.lock().unwrap_or_else(PoisonError::into_inner);
        replicas.insert(replica.name.clone(), replica.revision.clone());
        drop(replicas);
        self.revision(&replica.revision).ready(replica);
    }

    fn not_ready(&self, replica: &str) {
        if let Some(queue) = self.of(replica) {
            queue.not_ready(replica);
        }
    }

    fn drain(&self, replica: &str) {
        if let Some(queue) = self.of(replica) {
            queue.drain(replica);
        }
    }

    fn drained(&self, replica: &str) -> BoxFuture<'static, ()> {
        let queue = self.of(replica);
        let replica = replica.to_owned();
        Box::pin(async move {
            let Some(queue) = queue else { return };
            while let Some(busy) = queue.idle(&replica) {
                let changed = busy.notified();
                tokio::pin!(changed);
                changed.as_mut().enable();
                if queue.idle(&replica).is_none() {
                    break;
                }
                // Offers lapse without a notice.
                let _ = tokio::time::timeout(OFFER_LAPSE, changed).await;
            }
        })
    }

    fn remove(&self, replica: &str) {
        let queue = self.of(replica);
        self.replicas.lock().unwrap_or_else(PoisonError::into_inner).remove(replica);
        if let Some(queue) = queue {
            queue.remove(replica);
        }
    }
}
