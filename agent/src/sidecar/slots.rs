//! The slots of one revision on one node, without I/O: which are free, who waits for one, and who gets the next.
//!
//! A slot of a replica on this node is free, reserved by an offer to another node's gateway, or in use. A request that
//! waits here gets a free slot of this node or, by an offer, one of another node. Operations change the state and
//! return nothing; [`Slots::dispatch`] then returns what follows from the change as [`Effect`]s.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use tokio::sync::Notify;

use super::{
    credit::{Credit, CreditAccount, Sequence},
    grant::{Slot, SlotKind, Target},
    line::{Line, Next, Place},
    peer_nodes::PeerNodes,
};
use crate::endpoint::LocalReplica;

/// Identifies a stream from another node's gateway.
pub type GatewayId = u64;

/// What a revision allows, according to routes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Requests that may wait here.
    pub queue: usize,
    /// From arrival to the first byte of the answer.
    pub timeout: Duration,
    /// Requests per replica; 0 is no limit.
    pub concurrency: u32,
}

/// What follows from a change.
#[derive(Debug)]
pub(super) enum Effect<W> {
    /// The request has a slot.
    Grant { waiter: W, held: SlotKind, target: Target },
    /// The slot is reserved for this gateway: send it an offer.
    Offer { gateway: GatewayId, epoch: u64, slot: Slot },
}

/// The slots of one revision on one node. `W` is a request that waits.
#[derive(Debug)]
pub(super) struct Slots<W> {
    pub(super) limits: Limits,
    line: Line<W>,
    replicas: BTreeMap<String, LocalSlots>,
    gateways: HashMap<GatewayId, CreditAccount>,
    peers: PeerNodes,
    incarnations: u64,
    epochs: Sequence,
}

/// A replica on this node.
#[derive(Debug)]
struct LocalSlots {
    replica: LocalReplica,
    incarnation: u64,
    /// `false` while its probe fails.
    ready: bool,
    draining: bool,
    /// Requests that run on it.
    running: u32,
    /// Slots reserved by offers to other gateways.
    reserved: u32,
    /// Notified when nothing runs on it and no slot is reserved.
    idle: Arc<Notify>,
}

impl LocalSlots {
    /// The limit comes from the replica's own assignment: routes may arrive later.
    fn is_free(&self) -> bool {
        let limit = self.replica.container_concurrency;
        self.ready && !self.draining && (limit == 0 || self.running + self.reserved < limit)
    }

    fn is_idle(&self) -> bool {
        self.running + self.reserved == 0
    }

    fn notify_if_idle(&self) {
        if self.is_idle() {
            self.idle.notify_waiters();
        }
    }

    fn slot(&self) -> Slot {
        Slot { replica: self.replica.name.clone(), incarnation: self.incarnation }
    }

    fn target(&self) -> Target {
        let LocalReplica { name, address, h2c, .. } = &self.replica;
        Target::Local { replica: name.clone(), address: *address, h2c: *h2c }
    }
}

impl<W> Slots<W> {
    /// No replicas, no requests. `epochs` must be common to all revisions of the node.
    pub(super) fn new(limits: Limits, epochs: Sequence) -> Self {
        Self {
            limits,
            line: Line::default(),
            replicas: BTreeMap::new(),
            gateways: HashMap::new(),
            peers: PeerNodes::default(),
            incarnations: 0,
            epochs,
        }
    }

    // ── Requests that wait here ──────────────────────────────────────────────────────────────────────────

    /// Requests that wait here.
    pub(super) fn waiting(&self) -> usize {
        self.line.waiting()
    }

    /// `true` if the queue has no place for one more request, and no slot is free for it either.
    pub(super) fn is_full(&self) -> bool {
        let direct = self.limits.concurrency == 0 && self.any_ready();
        self.line.waiting() >= self.limits.queue && !direct && !self.replicas.values().any(LocalSlots::is_free)
    }

    /// Adds a request to the line; at its head if it has waited before.
    pub(super) fn enter(&mut self, waiter: W, at_head: bool) -> Place {
        self.line.enter(waiter, at_head)
    }

    /// Removes a request that no longer waits; `false` if it was served already.
    pub(super) fn leave(&mut self, place: Place) -> bool {
        self.line.leave(place).is_some()
    }

    /// `true` if some replica, here or elsewhere, is ready.
    pub(super) fn any_ready(&self) -> bool {
        self.replicas.values().any(|local| local.ready && !local.draining) || self.peers.has_ready()
    }

    // ── Other nodes' replicas ────────────────────────────────────────────────────────────────────────────

    /// Replaces what routes say: limits, and other nodes' ready replicas.
    pub(super) fn route(&mut self, limits: Limits, mut ready: BTreeMap<String, Vec<String>>) {
        self.limits = limits;
        let known: Vec<String> = self.peers.nodes.keys().cloned().collect();
        for node in known {
            ready.entry(node).or_default();
        }
        for (node, replicas) in ready {
            self.peers.update(&node, |peer| peer.ready = replicas);
        }
    }

    /// Nodes whose offers this gateway depends on.
    pub(super) fn offering_nodes(&self) -> impl Iterator<Item = &str> {
        let limited = self.limits.concurrency > 0;
        self.peers.by_load.iter().filter(move |_| limited).map(|(_, node)| node.as_str())
    }

    /// `true` if requests wait for an offer of this node.
    pub(super) fn has_demand_for(&self, node: &str) -> bool {
        self.demand_for(node) > 0
    }

    fn demand_for(&self, node: &str) -> u64 {
        let ready = self.peers.nodes.get(node).is_some_and(|peer| !peer.ready.is_empty());
        if ready && self.limits.concurrency > 0 { self.line.waiting() as u64 } else { 0 }
    }

    /// The credit to announce to a node on this stream; `None` if it knows it already. A node without ready replicas
    /// is asked to forget this gateway.
    pub(super) fn update_credit(&mut self, node: &str, stream: u64) -> Option<Credit> {
        let demand = self.demand_for(node);
        match self.peers.nodes.get_mut(node) {
            Some(peer) if !peer.ready.is_empty() => peer.credit.update(stream, demand, &self.epochs),
            peer => {
                if let Some(peer) = peer {
                    peer.credit = Default::default();
                }
                Some(Credit { epoch: self.epochs.next(), limit: 0 })
            }
        }
    }

    /// Takes another node's offer: returns the request that is to be sent with it; `None` if none waits.
    pub(super) fn accept_offer(&mut self, node: &str, epoch: u64) -> Option<(W, SlotKind)> {
        if let Some(peer) = self.peers.nodes.get_mut(node) {
            peer.credit.receive_offer(epoch);
        }
        let waiter = self.line.pop_waiter()?;
        let held = SlotKind::Peer(node.to_owned());
        self.acquire(&held);
        Some((waiter, held))
    }

    /// A request could not be sent to this node: others come first for a while.
    pub(super) fn penalize(&mut self, node: &str) {
        self.peers.penalize(node);
    }

    // ── Other nodes' gateways ────────────────────────────────────────────────────────────────────────────

    /// Takes in a gateway's credit. Returns `false` if the gateway has no account any more.
    pub(super) fn receive_credit(&mut self, gateway: GatewayId, credit: Credit) -> bool {
        let account = self.gateways.entry(gateway).or_default();
        account.update(credit);
        let (available, is_empty) = (account.available(), account.is_empty());
        self.line.claim(gateway, available);
        if is_empty {
            self.remove_gateway(gateway);
        }
        !is_empty
    }

    /// Removes a gateway that wants nothing any more, or whose stream has ended.
    pub(super) fn remove_gateway(&mut self, gateway: GatewayId) {
        self.gateways.remove(&gateway);
        self.line.remove_gateway(gateway);
    }

    /// `true` if gateways want slots here.
    #[cfg(test)]
    pub(super) fn has_gateways(&self) -> bool {
        !self.gateways.is_empty()
    }

    /// Turns a reservation into a running request; `None` if the replica has ended since.
    pub(super) fn use_reservation(&mut self, slot: &Slot) -> Option<(SlotKind, Target)> {
        self.cancel_reservation(slot);
        let target = self.living(slot)?.target();
        let held = SlotKind::Local(slot.clone());
        self.acquire(&held);
        Some((held, target))
    }

    /// Frees a reserved slot.
    pub(super) fn cancel_reservation(&mut self, slot: &Slot) {
        if let Some(local) = self.living(slot) {
            local.reserved = local.reserved.saturating_sub(1);
            local.notify_if_idle();
        }
    }

    /// Takes a slot of a replica without a concurrency limit for a request of another node's gateway.
    pub(super) fn admit(&mut self, replica: &str) -> Option<(SlotKind, Target)> {
        let local = self.replicas.get(replica)?;
        if !local.is_free() {
            return None;
        }
        let (held, target) = (SlotKind::Local(local.slot()), local.target());
        self.acquire(&held);
        Some((held, target))
    }

    // ── This node's replicas ─────────────────────────────────────────────────────────────────────────────

    /// Adds a replica that is ready, or makes a known one ready again, even if it was draining.
    pub(super) fn add_ready(&mut self, replica: LocalReplica) {
        if let Some(local) = self.replicas.get_mut(&replica.name) {
            local.replica = replica;
            local.ready = true;
            local.draining = false;
            return;
        }
        self.incarnations += 1;
        let name = replica.name.clone();
        let local = LocalSlots {
            replica,
            incarnation: self.incarnations,
            ready: true,
            draining: false,
            running: 0,
            reserved: 0,
            idle: Arc::new(Notify::new()),
        };
        self.replicas.insert(name, local);
    }

    /// Its probe fails: it gives no slots until it is ready again.
    pub(super) fn set_not_ready(&mut self, replica: &str) {
        if let Some(local) = self.replicas.get_mut(replica) {
            local.ready = false;
        }
    }

    /// It gives no slots until it is ready again; running requests continue.
    pub(super) fn drain(&mut self, replica: &str) {
        if let Some(local) = self.replicas.get_mut(replica) {
            local.draining = true;
        }
    }

    /// What to wait for until nothing runs on the replica and no slot of it is reserved; `None` if that is so already.
    pub(super) fn idle_notifier(&self, replica: &str) -> Option<Arc<Notify>> {
        let local = self.replicas.get(replica)?;
        (!local.is_idle()).then(|| Arc::clone(&local.idle))
    }

    /// Removes a replica that has ended. Its reservations and running requests end with it.
    pub(super) fn remove(&mut self, replica: &str) {
        if let Some(local) = self.replicas.remove(replica) {
            local.idle.notify_waiters();
        }
    }

    /// Names of this node's replicas, and requests that run on each.
    pub(super) fn running(&self) -> impl Iterator<Item = (&str, u32)> {
        self.replicas.iter().map(|(name, local)| (name.as_str(), local.running))
    }

    /// Requests that run on this node's replicas, and those of them on replicas that drain.
    pub(super) fn running_and_draining(&self) -> (u64, u64) {
        let count = |(running, draining), local: &LocalSlots| {
            let requests = u64::from(local.running);
            (running + requests, draining + if local.draining { requests } else { 0 })
        };
        self.replicas.values().fold((0, 0), count)
    }

    /// `true` if this node has replicas of the revision.
    pub(super) fn has_replicas(&self) -> bool {
        !self.replicas.is_empty()
    }

    /// `true` if it holds nothing that would be missed.
    pub(super) fn is_empty(&self) -> bool {
        self.line.waiting() == 0 && self.replicas.is_empty() && self.gateways.is_empty()
    }

    // ── Slots ────────────────────────────────────────────────────────────────────────────────────────────

    /// Gives free slots to those who are next in line. Must be called after every change.
    pub(super) fn dispatch(&mut self) -> Vec<Effect<W>> {
        let mut effects = Vec::new();
        while let Some(next) = self.line.next() {
            let effect = match next {
                Next::Waiter => self.grant(),
                // A request that waits behind the gateway may still go to another node at once.
                Next::Gateway(gateway) => self.offer(gateway).or_else(|| self.grant_direct()),
            };
            let Some(effect) = effect else { break };
            effects.push(effect);
        }
        effects
    }

    fn grant(&mut self) -> Option<Effect<W>> {
        let Some((held, target)) = self.local_slot() else { return self.grant_direct() };
        let waiter = self.line.pop_waiter()?;
        self.acquire(&held);
        Some(Effect::Grant { waiter, held, target })
    }

    /// Sends a request to another node's replica without a concurrency limit.
    fn grant_direct(&mut self) -> Option<Effect<W>> {
        let (held, target) = self.direct_slot()?;
        let waiter = self.line.pop_waiter()?;
        self.acquire(&held);
        self.peers.relax_penalties();
        Some(Effect::Grant { waiter, held, target })
    }

    fn offer(&mut self, gateway: GatewayId) -> Option<Effect<W>> {
        let slot = self.least_loaded()?.slot();
        let epoch = self.gateways.get_mut(&gateway)?.send_offer();
        self.line.pop_claim(gateway);
        if let Some(local) = self.living(&slot) {
            local.reserved += 1;
        }
        Some(Effect::Offer { gateway, epoch, slot })
    }

    /// The free replica on this node with the fewest requests.
    fn least_loaded(&self) -> Option<&LocalSlots> {
        let free = self.replicas.values().filter(|local| local.is_free());
        free.min_by_key(|local| local.running + local.reserved)
    }

    fn local_slot(&self) -> Option<(SlotKind, Target)> {
        self.least_loaded().map(|local| (SlotKind::Local(local.slot()), local.target()))
    }

    /// Another node's replica without a concurrency limit.
    fn direct_slot(&self) -> Option<(SlotKind, Target)> {
        if self.limits.concurrency > 0 {
            return None;
        }
        let (node, replica) = self.peers.least_loaded()?;
        let target = Target::Peer { node: node.to_owned(), replica: replica.to_owned(), offer: None };
        Some((SlotKind::Peer(node.to_owned()), target))
    }

    /// The replica, if it still is the same incarnation.
    fn living(&mut self, slot: &Slot) -> Option<&mut LocalSlots> {
        self.replicas.get_mut(&slot.replica).filter(|local| local.incarnation == slot.incarnation)
    }

    fn acquire(&mut self, held: &SlotKind) {
        match held {
            SlotKind::Local(slot) => {
                if let Some(local) = self.living(slot) {
                    local.running += 1;
                }
            }
            SlotKind::Peer(node) => self.peers.update(node, |peer| peer.in_flight += 1),
        }
    }

    /// Frees a slot that was in use.
    pub(super) fn release(&mut self, held: &SlotKind) {
        match held {
            SlotKind::Local(slot) => {
                if let Some(local) = self.living(slot) {
                    local.running = local.running.saturating_sub(1);
                    local.notify_if_idle();
                }
            }
            SlotKind::Peer(node) => self.peers.update(node, |peer| peer.in_flight = peer.in_flight.saturating_sub(1)),
        }
    }
}
