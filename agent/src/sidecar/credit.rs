//! Credit-based flow control of slot offers between two nodes, for one revision. The protocol is written down in
//! `peer.proto`; this file holds both of its counters, without I/O.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

/// Numbers that this process has never used before.
#[derive(Debug, Clone)]
pub struct Sequence(Arc<AtomicU64>);

impl Default for Sequence {
    fn default() -> Self {
        // 0 means "none yet" at both ends.
        Self(Arc::new(AtomicU64::new(1)))
    }
}

impl Sequence {
    /// The next number, from 1.
    pub fn next(&self) -> u64 {
        self.0.fetch_add(1, Ordering::Relaxed)
    }
}

/// What a gateway announces to a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Credit {
    /// Resets the node's count of offers when it changes.
    pub epoch: u64,
    /// Offers of this epoch that the gateway takes in all.
    pub limit: u64,
}

/// The gateway's end: counts the offers that it has received.
#[derive(Debug, Default)]
pub(super) struct CreditWindow {
    /// The stream that the counts below belong to; 0 is none.
    stream: u64,
    epoch: u64,
    received: u64,
    announced: u64,
}

impl CreditWindow {
    /// The credit to announce on this stream while `waiting` requests wait; `None` if the node knows it already.
    pub(super) fn update(&mut self, stream: u64, waiting: u64, epochs: &Sequence) -> Option<Credit> {
        if self.stream != stream {
            *self = Self { stream, epoch: epochs.next(), received: 0, announced: 0 };
        }
        let limit = self.received + waiting;
        if limit == self.announced {
            return None;
        }
        self.announced = limit;
        Some(Credit { epoch: self.epoch, limit })
    }

    /// Counts an offer, unless it belongs to an earlier epoch.
    pub(super) fn receive_offer(&mut self, epoch: u64) {
        if epoch == self.epoch {
            self.received += 1;
        }
    }
}

/// The node's end: counts the offers that it has sent to one gateway.
#[derive(Debug, Default)]
pub(super) struct CreditAccount {
    epoch: u64,
    sent: u64,
    limit: u64,
}

impl CreditAccount {
    /// Takes in the gateway's announcement.
    pub(super) fn update(&mut self, credit: Credit) {
        if self.epoch != credit.epoch {
            self.epoch = credit.epoch;
            self.sent = 0;
        }
        self.limit = credit.limit;
    }

    /// `true` if nothing would be lost with the account: neither credit nor the count of offers sent.
    pub(super) fn is_empty(&self) -> bool {
        self.limit == 0 && self.sent == 0
    }

    /// Offers that the gateway still takes.
    pub(super) fn available(&self) -> u64 {
        self.limit.saturating_sub(self.sent)
    }

    /// Counts an offer; returns the epoch to send with it.
    pub(super) fn send_offer(&mut self) -> u64 {
        self.sent += 1;
        self.epoch
    }
}
