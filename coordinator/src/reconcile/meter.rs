//! Usage: how long replicas existed, by hour and GPU class. Billing reads it, so it survives restarts.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::world::since;
use crate::model::{ReplicaRecord, keys};

/// Length of a metering period.
const HOUR: Duration = Duration::from_secs(3600);

/// What one service used in one hour on one class of GPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UsageRecord {
    /// Namespace.
    pub namespace: String,
    /// InferenceService.
    pub service: String,
    /// Start of the hour.
    pub hour: Timestamp,
    /// GPU product, with the profile of a MIG device; empty for replicas without GPU.
    pub gpu_class: String,
    /// Time that replicas existed, summed, milliseconds.
    pub replica_ms: u64,
    /// The same times the number of GPUs or MIG devices held, milliseconds.
    pub gpu_ms: u64,
}

impl UsageRecord {
    /// Where the record is stored. The class is last, since a product name may hold any character.
    pub fn key(&self) -> String {
        format!("{}{}/{}/{}/{}", keys::USAGE, self.hour.as_second(), self.namespace, self.service, self.gpu_class)
    }
}

/// What a replica is charged for while it exists.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Charge {
    /// Itself: 1, or 0 where it costs nothing.
    pub replicas: u64,
    /// GPUs or MIG devices that it holds.
    pub devices: u64,
}

/// Adds up usage. Each replica is accounted up to a moment of its own, kept here.
#[derive(Debug, Default)]
pub struct Meter {
    /// Up to when usage had been written when this process started.
    cursor: Timestamp,
    /// By replica: up to when it was accounted, and what it is charged for since.
    accounted: BTreeMap<String, (Timestamp, Charge)>,
    totals: BTreeMap<String, UsageRecord>,
    unwritten: BTreeSet<String>,
}

impl Meter {
    /// Goes on from what was written: `cursor` is the time of the last write.
    pub fn resume(cursor: Timestamp, written: impl IntoIterator<Item = UsageRecord>) -> Self {
        let totals = written.into_iter().map(|record| (record.key(), record)).collect();
        Self { cursor, accounted: BTreeMap::new(), totals, unwritten: BTreeSet::new() }
    }

    /// Accounts one replica up to `now`, by what it was charged for until now; `charge` holds from now on,
    /// and for all the time before where the replica was not known.
    pub fn account(&mut self, replica: &ReplicaRecord, charge: Charge, now: Timestamp) {
        let unknown = (replica.created_at.max(self.cursor), charge);
        let (from, charged) = self.accounted.get(&replica.name).copied().unwrap_or(unknown);
        let mut at = from;
        while at < now {
            let hour = hour_of(at);
            let end = (hour + HOUR).min(now);
            self.add(replica, charged, hour, since(at, end));
            at = end;
        }
        self.accounted.insert(replica.name.clone(), (now.max(from), charge));
    }

    /// Accounts a replica that is gone, for the last time.
    pub fn close(&mut self, replica: &ReplicaRecord, charge: Charge, now: Timestamp) {
        self.account(replica, charge, now);
        self.accounted.remove(&replica.name);
    }

    fn add(&mut self, replica: &ReplicaRecord, charge: Charge, hour: Timestamp, time: Duration) {
        if charge == Charge::default() {
            return;
        }
        let record = UsageRecord {
            namespace: replica.namespace.clone(),
            service: replica.service.clone(),
            hour,
            gpu_class: replica.gpu_class.clone(),
            replica_ms: 0,
            gpu_ms: 0,
        };
        let key = record.key();
        let total = self.totals.entry(key.clone()).or_insert(record);
        let millis = time.as_millis() as u64;
        total.replica_ms += millis * charge.replicas;
        total.gpu_ms += millis * charge.devices;
        self.unwritten.insert(key);
    }

    /// Records that have changed since the last [`Meter::written`].
    pub fn unwritten(&self) -> impl Iterator<Item = &UsageRecord> {
        self.unwritten.iter().filter_map(|key| self.totals.get(key))
    }

    /// All records still in memory; those of past hours are only in the store once written.
    pub fn totals(&self) -> impl Iterator<Item = &UsageRecord> {
        self.totals.values()
    }

    /// The unwritten records are in the store now; past hours leave memory.
    pub fn written(&mut self, now: Timestamp) {
        self.unwritten.clear();
        let hour = hour_of(now);
        self.totals.retain(|_, record| record.hour >= hour);
    }
}

/// Start of the hour (UTC) that `time` is in.
fn hour_of(time: Timestamp) -> Timestamp {
    let seconds = time.as_second();
    Timestamp::from_second(seconds - seconds.rem_euclid(HOUR.as_secs() as i64)).unwrap_or(Timestamp::MIN)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: Charge = Charge { replicas: 1, devices: 1 };

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(seconds).unwrap()
    }

    fn replica(created: i64, gpus: Vec<u32>) -> ReplicaRecord {
        ReplicaRecord {
            name: "r".into(),
            namespace: "default".into(),
            service: "iris".into(),
            revision: "default/iris-predictor-00001".into(),
            node: "n".into(),
            gpu_indices: gpus,
            mig_devices: Vec::new(),
            gpu_class: "A40".into(),
            created_at: at(created),
            draining: false,
            asleep: false,
        }
    }

    #[test]
    fn time_is_split_at_the_hour_and_multiplied_by_gpus() {
        let mut meter = Meter::resume(at(0), []);
        meter.close(&replica(3_000, vec![0, 1]), Charge { replicas: 1, devices: 2 }, at(4_000));
        let totals: Vec<_> = meter.totals().map(|t| (t.hour.as_second(), t.replica_ms, t.gpu_ms)).collect();
        assert_eq!(totals, [(0, 600_000, 1_200_000), (3_600, 400_000, 800_000)]);
    }

    #[test]
    fn what_is_charged_holds_from_then_on() {
        let mut meter = Meter::resume(at(0), []);
        let replica = replica(0, vec![0]);
        meter.account(&replica, ONE, at(60));
        meter.account(&replica, Charge::default(), at(90));
        meter.account(&replica, Charge { replicas: 1, devices: 0 }, at(1_000));
        meter.close(&replica, ONE, at(1_010));
        let totals: Vec<_> = meter.totals().map(|t| (t.replica_ms, t.gpu_ms)).collect();
        assert_eq!(totals, [(100_000, 90_000)]);
    }

    #[test]
    fn accounting_twice_counts_once() {
        let mut meter = Meter::resume(at(0), []);
        let replica = replica(0, vec![0]);
        meter.account(&replica, ONE, at(60));
        meter.account(&replica, ONE, at(60));
        meter.account(&replica, ONE, at(90));
        assert_eq!(meter.totals().next().unwrap().replica_ms, 90_000);
    }

    #[test]
    fn a_restart_goes_on_from_the_last_write() {
        let mut before = Meter::resume(at(0), []);
        let replica = replica(0, vec![0]);
        before.account(&replica, ONE, at(60));
        let written: Vec<_> = before.unwritten().cloned().collect();
        let mut after = Meter::resume(at(60), written);
        after.account(&replica, ONE, at(100));
        assert_eq!(after.totals().next().unwrap().replica_ms, 100_000);
    }

    #[test]
    fn past_hours_leave_memory_once_written() {
        let mut meter = Meter::resume(at(0), []);
        meter.account(&replica(0, vec![]), Charge { replicas: 1, devices: 0 }, at(4_000));
        assert_eq!(meter.unwritten().count(), 2);
        meter.written(at(4_000));
        assert_eq!((meter.unwritten().count(), meter.totals().count()), (0, 1));
    }
}
