//! What is stored: segments of usage that are written once, and the state from which a new leader continues.

use std::{collections::BTreeMap, sync::Arc};

use serde::{Deserialize, Serialize};

use super::{
    period::{Clock, Period},
    series::{Amounts, Series, UsageState, Workload},
};

/// All segments.
pub const LOG: &str = "metering/log/";
/// States of all shards.
pub const STATE: &str = "metering/state/";

/// Usage of one series in one period.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Length of the period.
    pub period: Period,
    /// Its start.
    pub start: Clock,
    /// Whose usage, and in which state.
    pub series: Arc<Series>,
    /// How much.
    pub amounts: Amounts,
}

/// Time in which a replica may have run, and nobody knows whether it did. It is in no [`Row`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gap {
    /// Whose.
    #[serde(flatten)]
    pub workload: Workload,
    /// As in [`Series`].
    #[serde(default, rename = "class")]
    pub gpu_class: String,
    /// Replica.
    pub replica: String,
    /// Its node.
    pub node: String,
    /// First moment that is not known.
    pub from: Clock,
    /// First moment after it that is.
    pub to: Clock,
    /// Why.
    pub reason: GapReason,
    /// What it did before.
    pub state: UsageState,
    /// Thousandths of a GPU that it held before.
    #[serde(default)]
    pub gpu_millis: u32,
    /// `true` if the node may still return and report what happened. Never stored.
    #[serde(skip)]
    pub open: bool,
}

/// Why time is not known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum GapReason {
    /// The node was silent for longer than its lease.
    NodeLost,
    /// Somebody deleted the node, which had not returned.
    NodeDeleted,
    /// The replica's container started while no agent watched it: the previous one ended at a time that is not known.
    AgentRestarted,
    /// The agent that returned does not know the replica any more.
    ReplicaUnknown,
    /// A leader's clock was behind that of the previous one, and no agent could tell by how much.
    ClockStepped,
}

impl GapReason {
    const ALL: [Self; 5] =
        [Self::NodeLost, Self::NodeDeleted, Self::AgentRestarted, Self::ReplicaUnknown, Self::ClockStepped];

    /// `None` if the name is not known.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|reason| reason.name() == name)
    }

    /// As on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::NodeLost => "NodeLost",
            Self::NodeDeleted => "NodeDeleted",
            Self::AgentRestarted => "AgentRestarted",
            Self::ReplicaUnknown => "ReplicaUnknown",
            Self::ClockStepped => "ClockStepped",
        }
    }
}

/// Usage that was written together.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// When. No row is of a later time.
    pub written: Clock,
    /// Series that rows refer to by index.
    series: Vec<Series>,
    rows: Vec<(u32, Period, Clock, Amounts)>,
    /// Time that is not known.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gaps: Vec<Gap>,
}

/// Usage by period and series.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Totals(BTreeMap<(Clock, Period, Arc<Series>), Amounts>);

impl Totals {
    /// Adds one row.
    pub fn add(&mut self, row: Row) {
        *self.0.entry((row.start, row.period, row.series)).or_default() += row.amounts;
    }

    /// All rows that are not zero, by start.
    pub fn rows(&self) -> impl Iterator<Item = Row> {
        let rows = self.0.iter().filter(|(_, amounts)| !amounts.is_zero());
        rows.map(|((start, period, series), amounts)| Row {
            period: *period,
            start: *start,
            series: Arc::clone(series),
            amounts: *amounts,
        })
    }

    /// Returns `true` if nothing was added.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl Segment {
    /// Of these totals.
    pub fn new(written: Clock, totals: &Totals, gaps: Vec<Gap>) -> Self {
        let mut segment = Self { written, gaps, ..Self::default() };
        let mut numbers = BTreeMap::new();
        for row in totals.rows() {
            let number = *numbers.entry(Arc::clone(&row.series)).or_insert_with(|| {
                segment.series.push((*row.series).clone());
                segment.series.len() as u32 - 1
            });
            segment.rows.push((number, row.period, row.start, row.amounts));
        }
        segment
    }

    /// Its rows. One that refers to no series is left out: the file was changed by hand.
    pub fn rows(&self) -> impl Iterator<Item = Row> {
        let series: Vec<_> = self.series.iter().cloned().map(Arc::new).collect();
        self.rows.iter().filter_map(move |(number, period, start, amounts)| {
            let series = Arc::clone(series.get(*number as usize)?);
            Some(Row { period: *period, start: *start, series, amounts: *amounts })
        })
    }

    /// Returns `true` if there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty() && self.gaps.is_empty()
    }
}

/// Where a segment is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct SegmentKey {
    /// Its longest period.
    pub period: Period,
    /// The shard that wrote it.
    pub shard: u32,
    /// Grows with each segment of a shard.
    pub sequence: u64,
}

impl SegmentKey {
    /// In the store.
    pub fn key(&self) -> String {
        let period = match self.period {
            Period::Minute => "minute",
            Period::Hour => "hour",
            Period::Day => "day",
            Period::Month => "month",
        };
        format!("{LOG}{period}/{:06}/{:012}", self.shard, self.sequence)
    }

    /// `None` if the key is not that of a segment.
    pub fn parse(key: &str) -> Option<Self> {
        let mut parts = key.strip_prefix(LOG)?.split('/');
        let period = match parts.next()? {
            "minute" => Period::Minute,
            "hour" => Period::Hour,
            "day" => Period::Day,
            "month" => Period::Month,
            _ => return None,
        };
        Some(Self { period, shard: parts.next()?.parse().ok()?, sequence: parts.next()?.parse().ok()? })
    }
}
