//! How long usage is kept by which period: old segments are merged into fewer ones of longer periods.

use std::{collections::BTreeMap, sync::Arc};

use super::{
    period::{Clock, DAYS_KEPT, HOURS_KEPT, MINUTES_KEPT, Period},
    segment::{Row, Segment, SegmentKey, Totals},
};

/// Segments that one merge replaces: as many as one transaction may delete, and the one that it writes.
const MAX_INPUTS: usize = 100;

/// Segments that one segment replaces, in one transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Merge {
    /// What goes.
    pub inputs: Vec<SegmentKey>,
    /// Where the new segment goes.
    pub key: SegmentKey,
    /// The new one.
    pub segment: Segment,
}

/// Merges segments whose usage is old enough to be kept by the next longer period. The sum of all rows stays the same.
pub fn merges(segments: Vec<(SegmentKey, Segment)>, now: Clock) -> Vec<Merge> {
    let mut groups: BTreeMap<(Period, u32, Clock), Vec<(SegmentKey, Segment)>> = BTreeMap::new();
    for (key, segment) in segments {
        let Some((period, kept)) = next(key.period) else { continue };
        // Whole periods only, so that a period of the past is in one segment.
        if segment.written < period.start(now - kept) {
            groups.entry((period, key.shard, period.start(segment.written))).or_default().push((key, segment));
        }
    }
    let chunks = groups.into_iter().flat_map(|((period, shard, _), group)| {
        let chunks: Vec<_> = group.chunks(MAX_INPUTS).map(|chunk| merge(period, shard, chunk)).collect();
        chunks
    });
    chunks.flatten().collect()
}

/// The next longer period, and the age from which usage is kept by it.
fn next(period: Period) -> Option<(Period, Clock)> {
    match period {
        Period::Minute => Some((Period::Hour, MINUTES_KEPT)),
        Period::Hour => Some((Period::Day, HOURS_KEPT)),
        Period::Day => Some((Period::Month, DAYS_KEPT)),
        Period::Month => None,
    }
}

fn merge(period: Period, shard: u32, group: &[(SegmentKey, Segment)]) -> Option<Merge> {
    let sequence = group.iter().map(|(key, _)| key.sequence).max()?;
    let written = group.iter().map(|(_, segment)| segment.written).max()?;
    let mut totals = Totals::default();
    for row in group.iter().flat_map(|(_, segment)| segment.rows()) {
        totals.add(lengthen(row, period));
    }
    let gaps = group.iter().flat_map(|(_, segment)| segment.gaps.iter().cloned()).collect();
    Some(Merge {
        inputs: group.iter().map(|(key, _)| *key).collect(),
        key: SegmentKey { period, shard, sequence },
        segment: Segment::new(written, &totals, gaps),
    })
}

/// The same row by a period that is at least this long.
pub(super) fn lengthen(row: Row, period: Period) -> Row {
    let period = period.max(row.period);
    Row { period, start: period.start(row.start), series: Arc::clone(&row.series), amounts: row.amounts }
}
