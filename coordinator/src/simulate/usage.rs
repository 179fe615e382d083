//! The coordinator's meter over a virtual clock, with a store of its own.

use std::{collections::BTreeMap, time::Duration};

use jiff::Timestamp;
use pilotlight_proto::fleet::v1::{
    PhaseChange, ReplicaHistories, ReplicaHistory, ReplicaPhase, agent_message::Message,
};

use crate::{
    model::ReplicaRecord,
    reconcile::{metering, world::World},
    usage::{
        Checkpoint, Clock, GapReason, Meter, Period,
        report::{Query, Report, select},
        segment::SegmentKey,
        shard_of,
    },
};

/// What one replica did, and from when on, since the beginning.
pub type Life = Vec<(Duration, ReplicaPhase)>;

/// What was metered, and what replicas did.
#[derive(Debug)]
pub struct Metered {
    /// By minute, up to the end.
    pub report: Report,
    /// By replica.
    pub lives: Vec<Life>,
    /// The end.
    pub end: Duration,
    /// Writes of usage in all.
    pub writes: usize,
}

/// The meter, and what is stored of it.
#[derive(Debug, Default)]
pub(super) struct Metering {
    meter: Meter,
    store: BTreeMap<String, Vec<u8>>,
    writes: usize,
}

impl Metering {
    /// A replica is placed.
    pub fn open(&mut self, world: &World, record: &ReplicaRecord, now: Timestamp) {
        metering::open(&mut self.meter, world, record, now);
    }

    /// A replica is removed.
    pub fn close(&mut self, replica: &str, now: Timestamp) {
        let checkpoint = self.meter.closing(&[(replica, GapReason::ReplicaUnknown)], metering::clock(now));
        self.commit(checkpoint);
    }

    /// A node has sent a message.
    pub fn observe(&mut self, world: &World, node: &str, message: &Message, now: Timestamp) {
        metering::observe(&mut self.meter, world, node, message, now);
    }

    /// As the coordinator's loop does at each tick.
    pub fn write_due(&mut self, world: &World, now: Timestamp) {
        let due = self.meter.due(metering::clock(now));
        if !due.is_empty() {
            let checkpoint = self.meter.checkpoint(&due, metering::heard(world, now), metering::clock(now));
            self.commit(checkpoint);
        }
    }

    fn commit(&mut self, checkpoint: Checkpoint) {
        self.writes += checkpoint.values.len();
        self.store.extend(checkpoint.values.iter().cloned());
        self.meter.committed(checkpoint);
    }

    /// What is not written is lost, and another leader continues.
    pub fn fail_over(&mut self, world: &World, now: Timestamp) {
        let states = self.store.iter().filter_map(|(key, value)| {
            Some((shard_of(key)?, serde_json::from_slice(value).unwrap_or_else(|error| panic!("{key}: {error}"))))
        });
        self.meter = metering::resume_from(states.collect(), world, now);
        for node in world.nodes.keys() {
            self.meter.connect(node, "", Some(0), metering::clock(now));
        }
    }

    /// What an agent sends of its replicas.
    pub fn histories<'a>(replicas: impl Iterator<Item = (&'a str, &'a Life)>, now: Duration) -> ReplicaHistories {
        let histories =
            replicas.map(|(replica, life)| ReplicaHistory { replica: replica.to_owned(), changes: changes(life, now) });
        ReplicaHistories { replicas: histories.collect() }
    }

    /// What was metered by the end.
    pub fn finish(mut self, now: Timestamp, end: Duration, lives: Vec<Life>) -> Metered {
        self.meter.advance(|_| Some(metering::clock(now)), metering::clock(now));
        let segments = self.store.iter().filter_map(|(key, value)| {
            Some((
                SegmentKey::parse(key)?,
                serde_json::from_slice(value).unwrap_or_else(|error| panic!("{key}: {error}")),
            ))
        });
        let query = Query { from: Clock::MIN, to: Clock::MAX, period: Period::Minute, namespace: String::new() };
        let report = select(&query, segments, self.meter.live(metering::clock(now)));
        Metered { report, lives, end, writes: self.writes }
    }
}

fn changes(life: &Life, now: Duration) -> Vec<PhaseChange> {
    let changes = life.iter().zip(1..).map(|((at, phase), sequence)| PhaseChange {
        sequence,
        age: prost_types::Duration::try_from(now - *at).ok(),
        phase: (*phase).into(),
        holds_gpu_memory: false,
    });
    changes.collect()
}
