//! One revision on one node: who waits, which slots are free, and who gets the next one.
//!
//! All of it lies under one lock per revision that is held for a few steps and never across a wait.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use pilotlight_proto::fleet::v1::{ReplicaLoad, RevisionLoad};
use tokio::{
    sync::{Notify, oneshot, watch},
    time::Instant,
};

use super::{load::Meter, registry::OfferSink};
use crate::endpoint::LocalReplica;

/// An offer to another node's gateway that is not used within this time is void.
pub const OFFER_LAPSE: Duration = Duration::from_secs(5);

/// What a revision allows, as routes say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Requests that may wait here.
    pub queue: usize,
    /// From arrival to the first byte of the answer.
    pub timeout: Duration,
    /// Requests per replica; 0 is no limit.
    pub concurrency: u32,
}

/// Where a granted request goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// A replica on this node.
    Local {
        /// Its name.
        replica: String,
        /// Where its server listens.
        address: SocketAddr,
        /// HTTP/2 with prior knowledge.
        h2c: bool,
    },
    /// A replica on another node.
    Peer {
        /// The node.
        node: String,
        /// The replica.
        replica: String,
        /// The offer taken; `None` where concurrency is not limited.
        offer: Option<u64>,
    },
}

/// A slot, taken until dropped.
#[derive(Debug)]
pub struct Grant {
    /// Where the request goes.
    pub target: Target,
    /// Gives the slot back.
    pub permit: Permit,
}

/// Gives back what a request held when it is dropped.
#[derive(Debug)]
pub struct Permit {
    queue: Weak<RevisionQueue>,
    held: Held,
}

#[derive(Debug)]
enum Held {
    Local(String),
    Peer(String),
}

impl Drop for Permit {
    fn drop(&mut self) {
        let Some(queue) = self.queue.upgrade() else { return };
        match &self.held {
            Held::Local(replica) => queue.release(replica),
            Held::Peer(node) => {
                if let Some(count) = queue.lock().peers.get_mut(node) {
                    count.in_flight = count.in_flight.saturating_sub(1);
                }
            }
        }
    }
}

/// Why a request may not wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// As many wait as may.
    Full {
        /// That many.
        limit: usize,
    },
}

/// One revision as seen from one node.
#[derive(Debug)]
pub struct RevisionQueue {
    key: String,
    state: Mutex<State>,
    /// Wakes those who tell other nodes how many wait here.
    wants: watch::Sender<u64>,
    own: Weak<Self>,
}

#[derive(Debug)]
struct State {
    limits: Limits,
    waiters: VecDeque<Waiter>,
    next_waiter: u64,
    replicas: BTreeMap<String, Local>,
    tickets: VecDeque<Ticket>,
    /// Tickets in the queue whose waiters have been served or have gone.
    stale: usize,
    gateways: HashMap<u64, Gateway>,
    peers: BTreeMap<String, Peer>,
    waiting: Meter,
    running: Meter,
    draining: Meter,
    arrivals: u64,
    reported: bool,
}

#[derive(Debug)]
struct Waiter {
    id: u64,
    grant: oneshot::Sender<Grant>,
}

#[derive(Debug)]
struct Local {
    replica: LocalReplica,
    /// False while its probe fails.
    ready: bool,
    draining: bool,
    running: u32,
    /// Slots promised to other gateways.
    offered: u32,
    idle: Arc<Notify>,
}

impl Local {
    fn free(&self, limit: u32) -> bool {
        self.ready && !self.draining && (limit == 0 || self.running + self.offered < limit)
    }
}

/// A place in the line for this node's slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ticket {
    Here,
    Gateway(u64),
}

/// Another node's gateway.
#[derive(Debug)]
struct Gateway {
    sink: OfferSink,
    tickets: usize,
    offers_sent: u64,
}

/// Another node's replicas.
#[derive(Debug, Default)]
struct Peer {
    ready: Vec<String>,
    in_flight: usize,
    offers_seen: u64,
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
            state: Mutex::new(State {
                limits,
                waiters: VecDeque::new(),
                next_waiter: 0,
                replicas: BTreeMap::new(),
                tickets: VecDeque::new(),
                stale: 0,
                gateways: HashMap::new(),
                peers: BTreeMap::new(),
                waiting: Meter::new(now),
                running: Meter::new(now),
                draining: Meter::new(now),
                arrivals: 0,
                reported: true,
            }),
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

    /// Counts a request that has entered by this gateway.
    pub fn arrived(&self) {
        let mut state = self.lock();
        state.arrivals += 1;
        state.reported = false;
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
        let taken = self.give(&mut state, target);
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

    /// An offer is used: its slot is taken now.
    pub fn use_offer(&self, replica: &str) -> Option<Grant> {
        let mut state = self.lock();
        let local = state.replicas.get_mut(replica)?;
        local.offered = local.offered.saturating_sub(1);
        Some(self.occupy(&mut state, replica))
    }

    /// An offer was given back, or has lapsed.
    pub fn withdraw_offer(&self, replica: &str) {
        let mut state = self.lock();
        if let Some(local) = state.replicas.get_mut(replica) {
            local.offered = local.offered.saturating_sub(1);
        }
        self.pump(&mut state);
    }

    /// A request of another node's gateway for a replica without a limit.
    pub fn admit(&self, replica: &str) -> Option<Grant> {
        let mut state = self.lock();
        let limit = state.limits.concurrency;
        let free = state.replicas.get(replica).is_some_and(|local| local.free(limit));
        free.then(|| self.occupy(&mut state, replica))
    }

    /// A replica on this node is ready.
    pub fn ready(&self, replica: LocalReplica) {
        let mut state = self.lock();
        state.reported = false;
        match state.replicas.get_mut(&replica.name) {
            Some(local) => {
                local.replica = replica;
                local.ready = true;
            }
            None => {
                let idle = Arc::new(Notify::new());
                let name = replica.name.clone();
                let local = Local { replica, ready: true, draining: false, running: 0, offered: 0, idle };
                state.replicas.insert(name, local);
            }
        }
        self.pump(&mut state);
    }

    /// Its probe fails: no new requests.
    pub fn not_ready(&self, replica: &str) {
        if let Some(local) = self.lock().replicas.get_mut(replica) {
            local.ready = false;
        }
    }

    /// No new requests, for good. Returns what is notified when requests end.
    pub fn drain(&self, replica: &str) {
        let mut state = self.lock();
        if let Some(local) = state.replicas.get_mut(replica) {
            local.draining = true;
        }
        state.count_running();
    }

    /// True where it runs nothing and nothing is promised; else what to wait for.
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
        state.reported = false;
    }

    /// The load since the last report; `None` where there is nothing to say.
    pub fn report(&self, now: Instant) -> Option<RevisionLoad> {
        let mut state = self.lock();
        let waiting = state.waiting.take(now);
        let running = state.running.take(now);
        let draining_concurrency = state.draining.take(now);
        let load = RevisionLoad {
            revision: self.key.clone(),
            average_concurrency: waiting + running,
            request_count: std::mem::take(&mut state.arrivals),
            queue_depth: state.waiters.len() as u64,
            running: state.running.value(),
            draining_concurrency,
            tokens_in_flight: 0.0,
            replicas: state
                .replicas
                .values()
                .map(|local| ReplicaLoad { replica: local.replica.name.clone(), running: u64::from(local.running) })
                .collect(),
        };
        let quiet = load.average_concurrency == 0.0 && load.request_count == 0 && load.queue_depth == 0;
        // A revision that has become quiet says so once.
        let silent = quiet && state.replicas.is_empty() && state.reported;
        state.reported = quiet;
        (!silent).then_some(load)
    }

    /// True where nothing is kept here that could not be made anew.
    pub fn disposable(&self) -> bool {
        let state = self.lock();
        state.waiters.is_empty() && state.replicas.is_empty() && state.gateways.is_empty() && state.reported
    }

    /// Gives free slots to those next in line.
    fn pump(&self, state: &mut State) {
        while state.any_local_slot() {
            match state.tickets.pop_front() {
                // Its waiter, the oldest then, has been served elsewhere.
                Some(Ticket::Here) if state.stale > 0 => state.stale -= 1,
                Some(Ticket::Here) => {
                    let Some(target) = state.local_target() else { break };
                    self.give(state, target);
                }
                Some(Ticket::Gateway(gateway)) => state.offer(gateway),
                None => break,
            }
        }
        // Without a limit no offers are needed: the request can be sent at once.
        while state.limits.concurrency == 0 && !state.waiters.is_empty() {
            let Some(target) = state.peer_target() else { break };
            if self.give(state, target) {
                state.stale += 1;
            }
        }
    }

    /// Grants the target to the first waiter who is still there.
    fn give(&self, state: &mut State, target: Target) -> bool {
        while let Some(waiter) = state.waiters.pop_front() {
            if waiter.grant.is_closed() {
                state.stale += 1;
                continue;
            }
            let held = match &target {
                Target::Local { replica, .. } => Held::Local(replica.clone()),
                Target::Peer { node, .. } => Held::Peer(node.clone()),
            };
            state.occupy(&held);
            let permit = Permit { queue: self.own.clone(), held };
            state.count_waiting();
            // It may have gone this very moment; then its slot goes to the next.
            let Err(mut grant) = waiter.grant.send(Grant { target, permit }) else { return true };
            state.stale += 1;
            state.vacate(&grant.permit.held);
            // The permit must not ask for the lock that is held here.
            grant.permit.queue = Weak::new();
            return self.give(state, grant.target);
        }
        state.count_waiting();
        false
    }

    /// Takes a slot for a request that has come from another node.
    fn occupy(&self, state: &mut State, replica: &str) -> Grant {
        let held = Held::Local(replica.to_owned());
        state.occupy(&held);
        let local = &state.replicas[replica];
        let target =
            Target::Local { replica: replica.to_owned(), address: local.replica.address, h2c: local.replica.h2c };
        Grant { target, permit: Permit { queue: self.own.clone(), held } }
    }

    fn release(&self, replica: &str) {
        let mut state = self.lock();
        state.vacate(&Held::Local(replica.to_owned()));
        self.pump(&mut state);
    }

    /// A waiter has gone.
    fn left(&self, id: u64) {
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

impl State {
    fn any_ready(&self) -> bool {
        let local = self.replicas.values().any(|local| local.ready && !local.draining);
        local || self.peers.values().any(|peer| !peer.ready.is_empty())
    }

    fn any_local_slot(&self) -> bool {
        self.replicas.values().any(|local| local.free(self.limits.concurrency))
    }

    fn any_slot(&self) -> bool {
        self.any_local_slot() || (self.limits.concurrency == 0 && self.any_ready())
    }

    /// The free replica on this node with the fewest requests.
    fn local_target(&self) -> Option<Target> {
        let free = self.replicas.values().filter(|local| local.free(self.limits.concurrency));
        let local = free.min_by_key(|local| local.running + local.offered)?;
        Some(Target::Local {
            replica: local.replica.name.clone(),
            address: local.replica.address,
            h2c: local.replica.h2c,
        })
    }

    /// The node with the fewest requests of ours, and its replicas in turn.
    fn peer_target(&self) -> Option<Target> {
        let ready = self.peers.iter().filter(|(_, peer)| !peer.ready.is_empty());
        let (node, peer) = ready.min_by_key(|(_, peer)| peer.in_flight * 1000 / peer.ready.len())?;
        let replica = peer.ready[peer.in_flight % peer.ready.len()].clone();
        Some(Target::Peer { node: node.clone(), replica, offer: None })
    }

    /// Promises a slot to another node's gateway.
    fn offer(&mut self, gateway: u64) {
        let Some(Target::Local { replica, .. }) = self.local_target() else { return };
        let Some(entry) = self.gateways.get_mut(&gateway) else { return };
        entry.tickets = entry.tickets.saturating_sub(1);
        if entry.sink.offer(&replica) {
            entry.offers_sent += 1;
            if let Some(local) = self.replicas.get_mut(&replica) {
                local.offered += 1;
            }
        }
    }

    fn occupy(&mut self, held: &Held) {
        match held {
            Held::Local(replica) => {
                if let Some(local) = self.replicas.get_mut(replica) {
                    local.running += 1;
                }
            }
            Held::Peer(node) => self.peers.entry(node.clone()).or_default().in_flight += 1,
        }
        self.count_running();
    }

    fn vacate(&mut self, held: &Held) {
        match held {
            Held::Local(replica) => {
                if let Some(local) = self.replicas.get_mut(replica) {
                    local.running = local.running.saturating_sub(1);
                    if local.running == 0 {
                        local.idle.notify_waiters();
                    }
                }
            }
            Held::Peer(node) => {
                if let Some(peer) = self.peers.get_mut(node) {
                    peer.in_flight = peer.in_flight.saturating_sub(1);
                }
            }
        }
        self.count_running();
    }

    fn count_waiting(&mut self) {
        self.waiting.set(self.waiters.len() as u64, Instant::now());
    }

    fn count_running(&mut self) {
        let now = Instant::now();
        let sum = |draining: bool| {
            let counted = self.replicas.values().filter(|local| !draining || local.draining);
            counted.map(|local| u64::from(local.running)).sum()
        };
        let (running, draining) = (sum(false), sum(true));
        self.running.set(running, now);
        self.draining.set(draining, now);
    }
}

/// A request in line. Dropped, it leaves.
#[derive(Debug)]
pub struct Waiting {
    queue: Arc<RevisionQueue>,
    id: u64,
    granted: Option<oneshot::Receiver<Grant>>,
}

impl Waiting {
    /// The slot, as soon as there is one. `None` only where the queue itself is gone.
    pub async fn granted(mut self) -> Option<Grant> {
        let granted = self.granted.as_mut()?;
        let grant = granted.await.ok();
        self.granted = None;
        grant
    }

    /// The slot, where there is one already.
    pub fn now(&mut self) -> Option<Grant> {
        let grant = self.granted.as_mut()?.try_recv().ok();
        if grant.is_some() {
            self.granted = None;
        }
        grant
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if let Some(mut granted) = self.granted.take() {
            granted.close();
            // Dropping a grant that came meanwhile gives its slot to the next.
            drop(granted.try_recv());
            self.queue.left(self.id);
        }
    }
}
