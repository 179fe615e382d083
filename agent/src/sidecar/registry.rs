//! All revisions of this node, and the offers to other gateways that are open.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use futures::future::BoxFuture;
use pilotlight_proto::{fleet::v1 as fleet, peer::v1 as peer};
use tokio::{sync::mpsc, time::Instant};

use super::{
    credit::{Credit, Sequence},
    grant::{Grant, Slot},
    links::Links,
    queue::{RevisionQueue, Shared},
    served::ServedRevisions,
    slots::GatewayId,
    sync::{Mutex, lock},
};
use crate::endpoint::{Endpoints, LocalReplica};

/// An offer to another node's gateway that is not used within this time is void.
pub const OFFER_LAPSE: Duration = Duration::from_secs(5);

/// Where demands go. One that finds it full is dropped: the next report says the same.
pub type Demands = mpsc::Sender<fleet::Demand>;

/// Where the offers to one gateway go.
pub type OfferSender = mpsc::UnboundedSender<peer::BindResponse>;

/// This node's side of the data path.
#[derive(Debug)]
pub struct Sidecar {
    revisions: RwLock<HashMap<String, Arc<RevisionQueue>>>,
    /// Replica → revision, for this node's replicas.
    replicas: Mutex<BTreeMap<String, String>>,
    shared: Shared,
}

/// Offers that are neither used, declined nor lapsed.
#[derive(Debug, Default)]
pub(super) struct Offers {
    sequence: Sequence,
    state: Mutex<OfferTable>,
}

#[derive(Debug, Default)]
struct OfferTable {
    open: HashMap<u64, Offered>,
    /// In the order in which they lapse; may name offers that are not open any more.
    by_age: VecDeque<(Instant, u64)>,
    gateways: HashMap<GatewayId, OfferSender>,
}

#[derive(Debug)]
struct Offered {
    gateway: GatewayId,
    revision: Arc<RevisionQueue>,
    slot: Slot,
}

impl Offers {
    /// Sends an offer of a reserved slot. If the gateway is gone, the slot is free again.
    pub(super) fn send(&self, gateway: GatewayId, epoch: u64, revision: &Arc<RevisionQueue>, slot: Slot) {
        let offer = self.sequence.next();
        let message = peer::Offer {
            offer,
            revision: revision.key().to_owned(),
            replica: slot.replica.clone(),
            lapse_ms: OFFER_LAPSE.as_millis() as u32,
            epoch,
        };
        let response = peer::BindResponse { message: Some(peer::bind_response::Message::Offer(message)) };
        let mut table = lock(&self.state);
        // The offer is in the table before the gateway can use it.
        if table.gateways.get(&gateway).is_some_and(|sender| sender.send(response).is_ok()) {
            table.open.insert(offer, Offered { gateway, revision: Arc::clone(revision), slot });
            table.by_age.push_back((Instant::now() + OFFER_LAPSE, offer));
            return;
        }
        drop(table);
        revision.cancel_offer(&slot);
    }

    fn take(&self, offer: u64) -> Option<Offered> {
        lock(&self.state).open.remove(&offer)
    }

    /// Removes offers that have lapsed by `now`.
    fn take_lapsed(&self, now: Instant) -> Vec<Offered> {
        let mut table = lock(&self.state);
        let mut lapsed = Vec::new();
        while table.by_age.front().is_some_and(|(lapses_at, _)| *lapses_at <= now) {
            let offered = table.by_age.pop_front().and_then(|(_, offer)| table.open.remove(&offer));
            lapsed.extend(offered);
        }
        lapsed
    }

    fn remove_gateway(&self, gateway: GatewayId) -> Vec<Offered> {
        let mut table = lock(&self.state);
        table.gateways.remove(&gateway);
        let of_gateway = table.open.extract_if(|_, offered| offered.gateway == gateway);
        of_gateway.map(|(_, offered)| offered).collect()
    }
}

/// A stream from another node's gateway. When dropped, the gateway's claims and unused offers are gone.
#[derive(Debug)]
pub struct GatewayStream {
    sidecar: Arc<Sidecar>,
    gateway: GatewayId,
    /// Revisions for which it has an account.
    claimed: HashMap<String, Arc<RevisionQueue>>,
}

impl GatewayStream {
    /// Takes in how many slots the gateway wants.
    pub fn receive_credit(&mut self, revision: String, credit: Credit) {
        let known = self.claimed.remove(&revision);
        if credit.limit == 0 && known.is_none() {
            return;
        }
        let queue = known.unwrap_or_else(|| self.sidecar.revision(&revision));
        if queue.receive_credit(self.gateway, credit) {
            self.claimed.insert(revision, queue);
        }
    }

    /// Frees the slot of an offer that is declined. Nothing happens if it was used or has lapsed.
    pub fn decline(&self, offer: u64) {
        self.sidecar.cancel(self.sidecar.shared.offers.take(offer));
    }
}

impl Drop for GatewayStream {
    fn drop(&mut self) {
        for queue in self.claimed.values() {
            queue.remove_gateway(self.gateway);
        }
        self.sidecar.cancel(self.sidecar.shared.offers.remove_gateway(self.gateway));
    }
}

impl Sidecar {
    /// No revisions yet.
    pub fn new() -> Arc<Self> {
        Arc::new(Self { revisions: RwLock::default(), replicas: Mutex::default(), shared: Shared::default() })
    }

    /// The queue of a revision, created if there is none.
    pub fn revision(&self, key: &str) -> Arc<RevisionQueue> {
        if let Some(queue) = self.existing(key) {
            return queue;
        }
        let mut revisions = self.revisions.write().unwrap_or_else(PoisonError::into_inner);
        let queue = revisions.entry(key.to_owned()).or_insert_with(|| RevisionQueue::new(key, self.shared.clone()));
        Arc::clone(queue)
    }

    /// The queue of a revision, if there is one.
    pub fn existing(&self, key: &str) -> Option<Arc<RevisionQueue>> {
        self.revisions.read().unwrap_or_else(PoisonError::into_inner).get(key).cloned()
    }

    /// All revisions.
    pub fn revisions(&self) -> Vec<Arc<RevisionQueue>> {
        self.revisions.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// Removes a revision that has no route any more, unless something of it is left here.
    pub fn forget(&self, key: &str) {
        let mut revisions = self.revisions.write().unwrap_or_else(PoisonError::into_inner);
        if revisions.get(key).is_some_and(|queue| queue.is_disposable()) {
            revisions.remove(key);
        }
    }

    /// What this node's replicas have answered.
    pub fn served(&self) -> &ServedRevisions {
        &self.shared.served
    }

    /// Links to nodes that offer slots to this one.
    pub fn links(&self) -> &Links {
        &self.shared.links
    }

    /// A number that this process has not used before, for a stream to another node or an epoch.
    pub fn next_number(&self) -> u64 {
        self.shared.sequence.next()
    }

    /// A new stream from another node's gateway, whose offers go to `sender`.
    pub fn open_gateway(self: &Arc<Self>, sender: OfferSender) -> GatewayStream {
        let gateway = self.shared.sequence.next();
        lock(&self.shared.offers.state).gateways.insert(gateway, sender);
        GatewayStream { sidecar: Arc::clone(self), gateway, claimed: HashMap::new() }
    }

    /// Frees the slots of offers that have lapsed by `now`.
    pub fn cancel_lapsed_offers(&self, now: Instant) {
        self.cancel(self.shared.offers.take_lapsed(now));
    }

    fn cancel(&self, offers: impl IntoIterator<Item = Offered>) {
        for offered in offers {
            offered.revision.cancel_offer(&offered.slot);
        }
    }

    /// A request that comes with an offer: its slot, once.
    pub fn use_offer(&self, offer: u64) -> Option<Grant> {
        let offered = self.shared.offers.take(offer)?;
        offered.revision.use_offer(&offered.slot)
    }

    /// A request from another node without an offer: a slot of a replica whose concurrency is not limited.
    pub fn admit(&self, replica: &str) -> Option<Grant> {
        self.of(replica)?.admit(replica)
    }

    fn of(&self, replica: &str) -> Option<Arc<RevisionQueue>> {
        let key = lock(&self.replicas).get(replica).cloned();
        self.existing(&key?)
    }

    /// The load since the last report.
    pub fn report(&self, interval: Duration) -> fleet::QueueReport {
        let now = Instant::now();
        fleet::QueueReport {
            interval: prost_types::Duration::try_from(interval).ok(),
            revisions: self.revisions().iter().filter_map(|queue| queue.report(now)).collect(),
        }
    }
}

impl Endpoints for Sidecar {
    fn ready(&self, replica: LocalReplica) {
        lock(&self.replicas).insert(replica.name.clone(), replica.revision.clone());
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
            while let Some(busy) = queue.idle_notifier(&replica) {
                let changed = busy.notified();
                tokio::pin!(changed);
                changed.as_mut().enable();
                if queue.idle_notifier(&replica).is_none() {
                    break;
                }
                changed.await;
            }
        })
    }

    fn remove(&self, replica: &str) {
        let queue = self.of(replica);
        lock(&self.replicas).remove(replica);
        if let Some(queue) = queue {
            queue.remove(replica);
        }
    }
}
