//! One revision on one node: who waits, which slots are free, and who gets the next one.
//!
//! All of it lies under one lock per revision that is held for a few steps and never across a wait.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use pilotlight_proto::fleet::v1::{ReplicaLoad, RevisionLoad};
use tokio::{
    sync::{Notify, oneshot, watch},
    time::Instant,
};

use super::{
    grant::{Grant, Held, Permit, Refusal, Slot, Target, Waiting},
    registry::OfferSink,
    slots::{Gateway, Limits, State, Ticket, Waiter},
    tokens::TokenLoad,
};
use crate::endpoint::LocalReplica;

/// An offer to another node's gateway that is not used within this time is void.
pub const OFFER_LAPSE: Duration = Duration::from_secs(5);

/// One revision as seen from one node.
#[derive(Debug)]
pub struct RevisionQueue {
    key: String,
    state: Mutex<State>,
    /// Under a lock of its own: streams change it with every event.
    tokens: Arc<TokenLoad>,
    /// Wakes those who tell other nodes how many wait here.
    wants: watch::Sender<u64>,
    own: Weak<Self>,
}

impl RevisionQueue {
    /// An empty one; `wants` is woken when another number waits.
    pub fn new(key: &str, wants: watch::Sender<u64>) -> Arc<Self> {
        let now = Instant::now();
        let limits = Limits { queue: 1000, timeout: Duration::from_secs(300), concurrency: 0 };
        Arc::new_cyclic(|own| Self {
            key: key.to_owned(),
            wants,
            own: own.clone(),
            state: Mutex::new(State::new(limits, now)),
            tokens: TokenLoad::new(now),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere leaves at worst a miscounted slot; going on serves everybody else.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `<namespace>/<revision>`.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// What routes say: limits, and which other nodes have ready replicas.
    pub fn route(&self, limits: Limits, peers: BTreeMap<String, Vec<String>>) {
        let mut state = self.lock();
        state.limits = limits;
        state.peers.retain(|node, peer| {
            peer.ready = peers.get(node).cloned().unwrap_or_default();
            !peer.ready.is_empty() || peer.in_flight > 0
        });
        for (node, ready) in peers {
            state.peers.entry(node).or_default().ready = ready;
        }
        self.pump(&mut state);
        drop(state);
        self.wants.send_modify(|changes| *changes += 1);
    }

    /// Limits that hold now.
    pub fn limits(&self) -> Limits {
        self.lock().limits
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
    /// As many requests wait as may.
    pub fn enter(self: &Arc<Self>, again: bool) -> Result<Waiting, Refusal> {
        let (grant, granted) = oneshot::channel();
        let mut state = self.lock();
        let limit = state.limits.queue;
        if state.waiters.len() >= limit && !again {
            // A slot may be free all the same.
            if !state.any_slot() {
                return Err(Refusal::Full { limit });
            }
        }
        let id = state.next_waiter;
        state.next_waiter += 1;
        let waiter = Waiter { id, grant };
        if again {
            state.waiters.push_front(waiter);
            state.tickets.push_front(Ticket::Here);
        } else {
            state.waiters.push_back(waiter);
            state.tickets.push_back(Ticket::Here);
        }
        state.count_waiting();
        self.pump(&mut state);
        drop(state);
        self.wants.send_modify(|changes| *changes += 1);
        Ok(Waiting { queue: Arc::clone(self), id, granted: Some(granted) })
    }

    /// True where some replica, here or elsewhere, is ready.
    pub fn any_ready(&self) -> bool {
        self.lock().any_ready()
    }

    /// Requests that wait here, and offers seen from `node`, for telling that node.
    pub fn want(&self, node: &str) -> Option<(u64, u64)> {
        let state = self.lock();
        let peer = state.peers.get(node)?;
        let wanted =
            if peer.ready.is_empty() || state.limits.concurrency == 0 { 0 } else { state.waiters.len() as u64 };
        Some((wanted, peer.offers_seen))
    }

    /// A new stream to `node`: its counts begin anew.
    pub fn bound_anew(&self, node: &str) {
        if let Some(peer) = self.lock().peers.get_mut(node) {
            peer.offers_seen = 0;
        }
    }

    /// Another node offers a slot. False where nobody waits any more.
    pub fn offered(&self, node: &str, replica: String, offer: u64) -> bool {
        let mut state = self.lock();
        state.peers.entry(node.to_owned()).or_default().offers_seen += 1;
        let target = Target::Peer { node: node.to_owned(), replica, offer: Some(offer) };
        let taken = self.give(&mut state, Held::Peer(node.to_owned()), target);
        if taken {
            state.stale += 1;
        }
        drop(state);
        self.wants.send_modify(|changes| *changes += 1);
        taken
    }

    /// Another node's gateway says how many wait there.
    pub fn wanted(&self, gateway: u64, sink: &OfferSink, waiting: u64, offers_seen: u64) {
        let mut state = self.lock();
        let entry =
            state.gateways.entry(gateway).or_insert_with(|| Gateway { sink: sink.clone(), tickets: 0, offers_sent: 0 });
        // Offers on their way will each serve one of those who wait.
        let on_their_way = entry.offers_sent.saturating_sub(offers_seen);
        let wanted = waiting.saturating_sub(on_their_way) as usize;
        let have = entry.tickets;
        entry.tickets = wanted;
        if wanted >= have {
            state.tickets.extend(std::iter::repeat_n(Ticket::Gateway(gateway), wanted - have));
        } else {
            let mut surplus = have - wanted;
            // The newest places go; the older ones were waited for.
            for index in (0..state.tickets.len()).rev() {
                if surplus == 0 {
                    break;
                }
                if state.tickets[index] == Ticket::Gateway(gateway) {
                    state.tickets.remove(index);
                    surplus -= 1;
                }
            }
        }
        self.pump(&mut state);
    }

    /// Another node's gateway is gone.
    pub fn gateway_gone(&self, gateway: u64) {
        let mut state = self.lock();
        if state.gateways.remove(&gateway).is_some() {
            state.tickets.retain(|ticket| *ticket != Ticket::Gateway(gateway));
        }
    }

    /// An offer is used: its slot is taken now. `None` where its replica has ended meanwhile.
    pub fn use_offer(&self, slot: Slot) -> Option<Grant> {
        let mut state = self.lock();
        state.offer_over(&slot);
        self.occupy(&mut state, slot)
    }

    /// An offer was given back, or has lapsed.
    pub fn withdraw_offer(&self, slot: &Slot) {
        let mut state = self.lock();
        state.offer_over(slot);
        self.pump(&mut state);
    }

    /// A request of another node's gateway for a replica without a limit.
    pub fn admit(&self, replica: &str) -> Option<Grant> {
        let mut state = self.lock();
        let limit = state.limits.concurrency;
        let slot = state.replicas.get(replica).filter(|local| local.free(limit))?.slot();
        self.occupy(&mut state, slot)
    }

    /// A replica on this node is ready.
    pub fn ready(&self, replica: LocalReplica) {
        let mut state = self.lock();
        state.ready(replica);
        self.pump(&mut state);
    }

    /// Its probe fails: no new requests.
    pub fn not_ready(&self, replica: &str) {
        if let Some(local) = self.lock().replicas.get_mut(replica) {
            local.ready = false;
        }
    }

    /// No new requests, until it is ready anew; those that run go on.
    pub fn drain(&self, replica: &str) {
        let mut state = self.lock();
        if let Some(local) = state.replicas.get_mut(replica) {
            local.draining = true;
        }
        state.count_running();
    }

    /// `None` where it runs nothing and nothing is promised; else what to wait for.
    pub fn idle(&self, replica: &str) -> Option<Arc<Notify>> {
        let state = self.lock();
        let local = state.replicas.get(replica)?;
        (local.running + local.offered > 0).then(|| Arc::clone(&local.idle))
    }

    /// The replica is gone.
    pub fn remove(&self, replica: &str) {
        let mut state = self.lock();
        if let Some(local) = state.replicas.remove(replica) {
            local.idle.notify_waiters();
        }
        state.count_running();
        state.load.changed();
    }

    /// The load since the last report; `None` where there is nothing to say.
    pub fn report(&self, now: Instant) -> Option<RevisionLoad> {
        let mut state = self.lock();
        let tokens_in_flight = self.tokens.take(now);
        let replicas = !state.replicas.is_empty();
        let load = state.load.take(now, replicas)?;
        let replicas = state.replicas.values();
        Some(RevisionLoad {
            revision: self.key.clone(),
            tokens_in_flight,
            replicas: replicas
                .map(|local| ReplicaLoad { replica: local.replica.name.clone(), running: u64::from(local.running) })
                .collect(),
            ..load
        })
    }

    /// True where nothing is kept here that could not be made anew.
    pub fn disposable(&self) -> bool {
        let state = self.lock();
        state.waiters.is_empty() && state.replicas.is_empty() && state.gateways.is_empty() && state.load.told_quiet()
    }

    /// Gives free slots to those next in line.
    fn pump(&self, state: &mut State) {
        while state.any_local_slot() {
            match state.tickets.pop_front() {
                // Its waiter, the oldest then, has been served elsewhere.
                Some(Ticket::Here) if state.stale > 0 => state.stale -= 1,
                Some(Ticket::Here) => {
                    let Some((held, target)) = state.local_slot() else { break };
                    self.give(state, held, target);
                }
                Some(Ticket::Gateway(gateway)) => state.offer(gateway),
                None => break,
            }
        }
        // Without a limit no offers are needed: the request can be sent at once.
        while state.limits.concurrency == 0 && !state.waiters.is_empty() {
            let Some((held, target)) = state.peer_slot() else { break };
            if self.give(state, held, target) {
                state.stale += 1;
            }
        }
    }

    /// Grants the target to the first waiter who is still there.
    fn give(&self, state: &mut State, held: Held, mut target: Target) -> bool {
        while let Some(waiter) = state.waiters.pop_front() {
            if waiter.grant.is_closed() {
                state.stale += 1;
                continue;
            }
            state.occupy(&held);
            state.count_waiting();
            let permit = Permit::new(self.own.clone(), held.clone());
            // It may have gone this very moment; then its slot goes to the next.
            let Err(back) = waiter.grant.send(Grant { target, permit }) else { return true };
            state.stale += 1;
            state.vacate(&held);
            // The permit must not ask for the lock that is held here.
            back.permit.forget();
            target = back.target;
        }
        state.count_waiting();
        false
    }

    /// Takes a slot for a request that has come from another node.
    fn occupy(&self, state: &mut State, slot: Slot) -> Option<Grant> {
        let (held, target) = state.occupy_local(slot)?;
        Some(Grant { target, permit: Permit::new(self.own.clone(), held) })
    }

    /// A request has ended, or was never sent.
    pub(super) fn release(&self, held: &Held, answered: bool) {
        let mut state = self.lock();
        if answered && matches!(held, Held::Local(_)) {
            state.load.completed();
        }
        state.vacate(held);
        self.pump(&mut state);
    }

    /// A waiter has gone.
    pub(super) fn left(&self, id: u64) {
        let mut state = self.lock();
        let before = state.waiters.len();
        state.waiters.retain(|waiter| waiter.id != id);
        if state.waiters.len() < before {
            state.stale += 1;
        }
        state.count_waiting();
        drop(state);
        self.wants.send_modify(|changes| *changes += 1);
    }
}
