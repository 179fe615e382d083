//! One revision on one node: its [`Slots`] under a lock, and the effects of each change.
//!
//! The lock is held for a few steps and never across a wait. Grants and offers are delivered after it is released.

use std::{
    collections::BTreeMap,
    sync::{Arc, Weak},
    time::Duration,
};

use pilotlight_proto::fleet::v1::{ReplicaLoad, RevisionFailure, RevisionLoad};
use tokio::{
    sync::{Notify, oneshot, watch},
    time::Instant,
};

use super::{
    credit::{Credit, Sequence},
    grant::{Grant, Permit, Refusal, Slot, SlotKind, Target, Waiting},
    line::Place,
    links::Links,
    load::Load,
    registry::Offers,
    served::{Served, ServedRevisions},
    slots::{Effect, GatewayId, Limits, Slots},
    sync::{Mutex, MutexGuard, lock},
    tokens::TokenLoad,
};
use crate::endpoint::LocalReplica;

/// Limits of a revision before its first route.
const DEFAULT_LIMITS: Limits = Limits { queue: 1000, timeout: Duration::from_secs(300), concurrency: 0 };

/// What all revisions of a node share.
#[derive(Debug, Clone, Default)]
pub(super) struct Shared {
    /// Numbers epochs, streams and gateways.
    pub(super) sequence: Sequence,
    /// Offers to other gateways.
    pub(super) offers: Arc<Offers>,
    /// Streams to nodes that offer slots.
    pub(super) links: Arc<Links>,
    /// What replicas have answered; outlives the queues.
    pub(super) served: ServedRevisions,
}

/// One revision as seen from one node.
#[derive(Debug)]
pub struct RevisionQueue {
    key: Arc<str>,
    state: Mutex<State>,
    /// Has its own lock: streams change it with every event.
    tokens: Arc<TokenLoad>,
    served: Arc<Served>,
    shared: Shared,
    /// Why the revision cannot serve, as routes say; `None` if it can, or may soon.
    failure: watch::Sender<Option<Arc<RevisionFailure>>>,
    own: Weak<Self>,
}

/// State of the queue; protected by [`RevisionQueue::state`].
#[derive(Debug)]
struct State {
    slots: Slots<oneshot::Sender<Grant>>,
    load: Load,
}

impl RevisionQueue {
    /// A queue without replicas or requests.
    pub(super) fn new(key: &str, shared: Shared) -> Arc<Self> {
        let (now, served) = (Instant::now(), shared.served.of(key));
        Arc::new_cyclic(|own| Self {
            key: key.into(),
            own: own.clone(),
            state: Mutex::new(State {
                slots: Slots::new(DEFAULT_LIMITS, shared.sequence.clone()),
                load: Load::new(now),
            }),
            tokens: TokenLoad::new(now, Arc::clone(&served)),
            served,
            shared,
            failure: watch::Sender::new(None),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Makes a change, updates the load, and delivers its effects.
    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.lock();
        let before = state.slots.waiting();
        let result = change(&mut state);
        let effects = state.slots.dispatch();
        let now = Instant::now();
        let waiting = state.slots.waiting();
        if waiting != before {
            state.load.waiting(waiting as u64, now);
            self.announce(&state);
        }
        let (running, draining) = state.slots.running_and_draining();
        state.load.running(running, draining, now);
        drop(state);
        for effect in effects {
            self.deliver(effect);
        }
        result
    }

    /// Marks this revision on the links to nodes that offer slots, so that their streams announce the demand.
    fn announce(&self, state: &State) {
        let waiting = state.slots.waiting() > 0;
        for node in state.slots.offering_nodes() {
            self.shared.links.mark(node, &self.key, waiting);
        }
    }

    fn deliver(&self, effect: Effect<oneshot::Sender<Grant>>) {
        match effect {
            // If the request has gone this very moment, the grant is dropped here, and its slot goes to the next.
            Effect::Grant { waiter, held, target } => drop(waiter.send(self.grant(held, target))),
            Effect::Offer { gateway, epoch, slot } => {
                let Some(queue) = self.own.upgrade() else { return };
                self.shared.offers.send(gateway, epoch, &queue, slot);
            }
        }
    }

    fn grant(&self, held: SlotKind, target: Target) -> Grant {
        Grant { target, permit: Permit::new(self.own.clone(), held) }
    }

    /// `<namespace>/<revision>`.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// Replaces what routes say: limits, and the ready replicas of other nodes by node.
    pub fn route(&self, limits: Limits, peers: BTreeMap<String, Vec<String>>) {
        self.change(|state| {
            // Nodes that lose their ready replicas learn that nothing is wanted of them.
            self.announce(state);
            state.slots.route(limits, peers);
            self.announce(state);
        });
    }

    /// Replaces what routes say of the revision's failure.
    pub fn set_failure(&self, failure: Option<RevisionFailure>) {
        let failure = failure.map(Arc::new);
        self.failure.send_if_modified(|current| {
            let changed = *current != failure;
            *current = failure;
            changed
        });
    }

    /// Why the revision cannot serve, now and on each change.
    pub fn failure(&self) -> watch::Receiver<Option<Arc<RevisionFailure>>> {
        self.failure.subscribe()
    }

    /// Limits that apply now.
    pub fn limits(&self) -> Limits {
        self.lock().slots.limits
    }

    /// Tokens of its requests.
    pub fn tokens(&self) -> &Arc<TokenLoad> {
        &self.tokens
    }

    /// Counts a request that has entered by this gateway.
    pub fn arrived(&self) {
        self.lock().load.arrived();
    }

    /// Asks for a slot. `again` puts the request at the head of the line: it has waited before.
    ///
    /// # Errors
    /// The queue is full.
    pub fn enter(self: &Arc<Self>, again: bool) -> Result<Waiting, Refusal> {
        let (grant, granted) = oneshot::channel();
        let place = self.change(|state| {
            if !again && state.slots.is_full() {
                return Err(Refusal::Full { limit: state.slots.limits.queue });
            }
            Ok(state.slots.enter(grant, again))
        })?;
        Ok(Waiting { queue: Arc::clone(self), place, granted: Some(granted) })
    }

    /// Removes a request that no longer waits. One that has been granted a slot is not in line any more.
    pub(super) fn leave(&self, place: Place) {
        self.change(|state| state.slots.leave(place));
    }

    /// `true` if some replica, here or elsewhere, is ready.
    pub fn any_ready(&self) -> bool {
        self.lock().slots.any_ready()
    }

    /// Requests that wait here now.
    #[cfg(test)]
    pub(crate) fn waiting(&self) -> usize {
        self.lock().slots.waiting()
    }

    // ── Offers of other nodes ────────────────────────────────────────────────────────────────────────────

    /// The credit to announce to `node` on this stream; `None` if the node knows it already.
    pub fn update_credit(&self, node: &str, stream: u64) -> Option<Credit> {
        self.lock().slots.update_credit(node, stream)
    }

    /// `true` if requests wait here for an offer of this node.
    pub fn has_demand_for(&self, node: &str) -> bool {
        self.lock().slots.has_demand_for(node)
    }

    /// Takes an offer of another node. Returns `false` if no request waits: the offer is to be declined.
    pub fn accept_offer(&self, node: &str, replica: String, offer: u64, epoch: u64) -> bool {
        let accepted = self.change(|state| state.slots.accept_offer(node, epoch));
        let Some((waiter, held)) = accepted else { return false };
        let target = Target::Peer { node: node.to_owned(), replica, offer: Some(offer) };
        match waiter.send(self.grant(held, target)) {
            Ok(()) => true,
            // It has gone this very moment; the offer is for the next.
            Err(Grant { target: Target::Peer { replica, .. }, .. }) => self.accept_offer(node, replica, offer, 0),
            Err(_) => false,
        }
    }

    /// A request could not be sent to this node: others come first for a while.
    pub fn penalize(&self, node: &str) {
        self.change(|state| state.slots.penalize(node));
    }

    // ── Gateways of other nodes ──────────────────────────────────────────────────────────────────────────

    /// Takes in the credit of another node's gateway. Returns `false` if the gateway has no account any more.
    pub fn receive_credit(&self, gateway: GatewayId, credit: Credit) -> bool {
        self.change(|state| state.slots.receive_credit(gateway, credit))
    }

    /// Removes another node's gateway.
    pub fn remove_gateway(&self, gateway: GatewayId) {
        self.change(|state| state.slots.remove_gateway(gateway));
    }

    /// A request comes with an offer: its slot is in use from now on. `None` if its replica has ended since.
    pub fn use_offer(&self, slot: &Slot) -> Option<Grant> {
        let (held, target) = self.change(|state| state.slots.use_reservation(slot))?;
        Some(self.grant(held, target))
    }

    /// An offer was declined, or has lapsed.
    pub fn cancel_offer(&self, slot: &Slot) {
        self.change(|state| state.slots.cancel_reservation(slot));
    }

    /// A request of another node's gateway for a replica without a concurrency limit.
    pub fn admit(&self, replica: &str) -> Option<Grant> {
        let (held, target) = self.change(|state| state.slots.admit(replica))?;
        Some(self.grant(held, target))
    }

    /// `true` if gateways of other nodes want slots here.
    #[cfg(test)]
    pub(crate) fn has_gateways(&self) -> bool {
        self.lock().slots.has_gateways()
    }

    // ── Replicas of this node ────────────────────────────────────────────────────────────────────────────

    /// A replica on this node is ready, for the first time or again; one that was draining is taken back.
    pub fn ready(&self, replica: LocalReplica) {
        self.change(|state| {
            state.load.changed();
            state.slots.add_ready(replica);
        });
    }

    /// Its probe fails: no new requests.
    pub fn not_ready(&self, replica: &str) {
        self.change(|state| state.slots.set_not_ready(replica));
    }

    /// No new requests until it is ready again; running ones continue.
    pub fn drain(&self, replica: &str) {
        self.change(|state| state.slots.drain(replica));
    }

    /// What to wait for until the replica runs no request and no slot of it is reserved; `None` if that is so.
    pub fn idle_notifier(&self, replica: &str) -> Option<Arc<Notify>> {
        self.lock().slots.idle_notifier(replica)
    }

    /// The replica is gone.
    pub fn remove(&self, replica: &str) {
        self.change(|state| {
            state.load.changed();
            state.slots.remove(replica);
        });
    }

    /// The load since the last report; `None` if there is nothing to report.
    pub fn report(&self, now: Instant) -> Option<RevisionLoad> {
        let mut state = self.lock();
        let tokens_in_flight = self.tokens.take(now);
        let has_replicas = state.slots.has_replicas();
        let load = state.load.take(now, has_replicas)?;
        let replicas = state.slots.running();
        let replicas =
            replicas.map(|(replica, running)| ReplicaLoad { replica: replica.to_owned(), running: running.into() });
        Some(RevisionLoad { revision: self.key.to_string(), tokens_in_flight, replicas: replicas.collect(), ..load })
    }

    /// `true` if nothing is kept here that could not be created again.
    pub fn is_disposable(&self) -> bool {
        let state = self.lock();
        state.slots.is_empty() && state.load.told_quiet()
    }

    /// A request has ended, or was never sent.
    pub(super) fn release(&self, held: &SlotKind, answered: bool) {
        let answered = answered && matches!(held, SlotKind::Local(_));
        if answered {
            self.served.add_request();
        }
        self.change(|state| {
            if answered {
                state.load.completed();
            }
            state.slots.release(held);
        });
    }
}
