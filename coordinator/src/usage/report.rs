//! Selects usage and adds it up.

use super::{
    meter::Live,
    period::{Clock, Period},
    retention::lengthen,
    segment::{Gap, Row, Segment, SegmentKey, Totals},
};

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Query {
    /// First moment.
    pub from: Clock,
    /// First moment that is not asked for.
    pub to: Clock,
    /// Periods to add up by; usage that is kept by longer ones is returned by those.
    pub period: Period,
    /// Only this namespace; empty is all.
    pub namespace: String,
}

/// Usage that was asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// By start, then by series.
    pub rows: Vec<Row>,
    /// By start.
    pub gaps: Vec<Gap>,
}

/// Puts together what is stored and what is not yet. `live` must have been taken before `stored` was read.
pub fn select(query: &Query, stored: impl IntoIterator<Item = (SegmentKey, Segment)>, live: Live) -> Report {
    let mut totals = Totals::default();
    let mut gaps = Vec::new();
    let asked = |namespace: &str| query.namespace.is_empty() || namespace == query.namespace;
    let mut add = |row: Row| {
        // A row belongs to the range in which it begins, so that adjacent ranges add up.
        let begins_within = query.from <= row.start && row.start < query.to;
        if begins_within && asked(&row.series.workload.namespace) {
            totals.add(lengthen(row, query.period));
        }
    };
    for (key, segment) in stored {
        let replaced = live.sequences.get(&key.shard).is_some_and(|sequence| key.sequence >= *sequence);
        if (key.period == Period::Minute && replaced) || segment.written < query.from {
            continue;
        }
        segment.rows().for_each(&mut add);
        gaps.extend(segment.gaps);
    }
    live.rows.into_iter().for_each(&mut add);
    gaps.extend(live.gaps);
    gaps.retain(|gap| asked(&gap.workload.namespace) && gap.from < query.to && gap.to.max(gap.from + 1) > query.from);
    gaps.sort_by(|a, b| (a.from, &a.replica).cmp(&(b.from, &b.replica)));
    Report { rows: totals.rows().collect(), gaps }
}
