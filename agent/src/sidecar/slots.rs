//! The books of one revision on one node: who waits, which slots are free, whose turn it is.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::{Notify, oneshot},
    time::Instant,
};

use super::{
    grant::{Grant, Held, Slot, Target},
    load::Load,
    registry::OfferSink,
};
use crate::endpoint::LocalReplica;

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

/// All of it. Lies under its queue's lock.
#[derive(Debug)]
pub(super) struct State {
    pub(super) limits: Limits,
    pub(super) waiters: VecDeque<Waiter>,
    pub(super) next_waiter: u64,
    pub(super) replicas: BTreeMap<String, Local>,
    next_life: u64,
    pub(super) tickets: VecDeque<Ticket>,
    /// Tickets in the queue whose waiters have been served or have gone.
    pub(super) stale: usize,
    pub(super) gateways: HashMap<u64, Gateway>,
    pub(super) peers: BTreeMap<String, Peer>,
    pub(super) load: Load,
}

#[derive(Debug)]
pub(super) struct Waiter {
    pub(super) id: u64,
    pub(super) grant: oneshot::Sender<Grant>,
}

/// A replica on this node.
#[derive(Debug)]
pub(super) struct Local {
    pub(super) replica: LocalReplica,
    life: u64,
    /// False while its probe fails.
    pub(super) ready: bool,
    pub(super) draining: bool,
    pub(super) running: u32,
    /// Slots promised to other gateways.
    pub(super) offered: u32,
    pub(super) idle: Arc<Notify>,
}

impl Local {
    pub(super) fn free(&self, limit: u32) -> bool {
        self.ready && !self.draining && (limit == 0 || self.running + self.offered < limit)
    }

    pub(super) fn slot(&self) -> Slot {
        Slot { replica: self.replica.name.clone(), life: self.life }
    }

    fn target(&self) -> Target {
        let LocalReplica { name, address, h2c, .. } = &self.replica;
        Target::Local { replica: name.clone(), address: *address, h2c: *h2c }
    }
}

/// A place in the line for this node's slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ticket {
    Here,
    Gateway(u64),
}

/// Another node's gateway.
#[derive(Debug)]
pub(super) struct Gateway {
    pub(super) sink: OfferSink,
    pub(super) tickets: usize,
    pub(super) offers_sent: u64,
}

/// Another node's replicas.
#[derive(Debug, Default)]
pub(super) struct Peer {
    pub(super) ready: Vec<String>,
    pub(super) in_flight: usize,
    pub(super) offers_seen: u64,
}

impl State {
    /// Nothing yet.
    pub(super) fn new(limits: Limits, now: Instant) -> Self {
        Self {
            limits,
            waiters: VecDeque::new(),
            next_waiter: 0,
            replicas: BTreeMap::new(),
            next_life: 0,
            tickets: VecDeque::new(),
            stale: 0,
            gateways: HashMap::new(),
            peers: BTreeMap::new(),
            load: Load::new(now),
        }
    }

    pub(super) fn any_ready(&self) -> bool {
        let local = self.replicas.values().any(|local| local.ready && !local.draining);
        local || self.peers.values().any(|peer| !peer.ready.is_empty())
    }

    pub(super) fn any_local_slot(&self) -> bool {
        self.replicas.values().any(|local| local.free(self.limits.concurrency))
    }

    pub(super) fn any_slot(&self) -> bool {
        self.any_local_slot() || (self.limits.concurrency == 0 && self.any_ready())
    }

    /// The free replica on this node with the fewest requests.
    fn emptiest(&self) -> Option<&Local> {
        let free = self.replicas.values().filter(|local| local.free(self.limits.concurrency));
        free.min_by_key(|local| local.running + local.offered)
    }

    /// A slot of the free replica on this node with the fewest requests.
    pub(super) fn local_slot(&self) -> Option<(Held, Target)> {
        self.emptiest().map(|local| (Held::Local(local.slot()), local.target()))
    }

    /// The node with the fewest requests of ours, and its replicas in turn.
    pub(super) fn peer_slot(&self) -> Option<(Held, Target)> {
        let ready = self.peers.iter().filter(|(_, peer)| !peer.ready.is_empty());
        let (node, peer) = ready.min_by_key(|(_, peer)| peer.in_flight * 1000 / peer.ready.len())?;
        let replica = peer.ready[peer.in_flight % peer.ready.len()].clone();
        Some((Held::Peer(node.clone()), Target::Peer { node: node.clone(), replica, offer: None }))
    }

    /// The replica in that life; `None` where it is over.
    pub(super) fn living(&mut self, slot: &Slot) -> Option<&mut Local> {
        self.replicas.get_mut(&slot.replica).filter(|local| local.life == slot.life)
    }

    /// Takes a slot for a request that has come from another node.
    pub(super) fn occupy_local(&mut self, slot: Slot) -> Option<(Held, Target)> {
        let target = self.living(&slot)?.target();
        let held = Held::Local(slot);
        self.occupy(&held);
        Some((held, target))
    }

    /// Promises a slot to another node's gateway.
    pub(super) fn offer(&mut self, gateway: u64) {
        let Some(slot) = self.emptiest().map(Local::slot) else { return };
        let Some(entry) = self.gateways.get_mut(&gateway) else { return };
        entry.tickets = entry.tickets.saturating_sub(1);
        if entry.sink.offer(&slot) {
            entry.offers_sent += 1;
            if let Some(local) = self.living(&slot) {
                local.offered += 1;
            }
        }
    }

    /// An offer is used or void.
    pub(super) fn offer_over(&mut self, slot: &Slot) {
        if let Some(local) = self.living(slot) {
            local.offered = local.offered.saturating_sub(1);
        }
    }

    /// A replica is ready, for the first time in this life or again; one that was to drain is taken back.
    pub(super) fn ready(&mut self, replica: LocalReplica) {
        self.load.changed();
        if let Some(local) = self.replicas.get_mut(&replica.name) {
            local.replica = replica;
            local.ready = true;
            local.draining = false;
            // What runs there counts as draining no more.
            self.count_running();
            return;
        }
        let name = replica.name.clone();
        let idle = Arc::new(Notify::new());
        let life = self.next_life;
        self.next_life += 1;
        let local = Local { replica, life, ready: true, draining: false, running: 0, offered: 0, idle };
        self.replicas.insert(name, local);
    }

    pub(super) fn occupy(&mut self, held: &Held) {
        match held {
            Held::Local(slot) => {
                if let Some(local) = self.living(slot) {
                    local.running += 1;
                }
            }
            Held::Peer(node) => self.peers.entry(node.clone()).or_default().in_flight += 1,
        }
        self.count_running();
    }

    pub(super) fn vacate(&mut self, held: &Held) {
        match held {
            Held::Local(slot) => {
                if let Some(local) = self.living(slot) {
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

    pub(super) fn count_waiting(&mut self) {
        self.load.waiting(self.waiters.len() as u64, Instant::now());
    }

    pub(super) fn count_running(&mut self) {
        let sum = |draining: bool| {
            let counted = self.replicas.values().filter(|local| !draining || local.draining);
            counted.map(|local| u64::from(local.running)).sum()
        };
        let (running, draining) = (sum(false), sum(true));
        self.load.running(running, draining, Instant::now());
    }
}
