//! All replicas and request counters of a cell.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use serde::{Deserialize, Serialize};

use super::{
    counters::{Counter, Counts},
    period::{Clock, MINUTE, Period},
    segment::{Gap, GapReason, Row, STATE, Segment, SegmentKey, Totals},
    series::{Series, UsageState, Workload},
    span::{Activity, Change, Claim, Span},
};

/// Time between two writes of a shard.
const CHECKPOINT_INTERVAL: Clock = MINUTE;
/// A replica that waits in the first shard with fewer than this many. A shard's state has about 350 bytes per replica.
const MAX_SPANS: usize = 200;
/// The same for request counters, of about 250 bytes.
const MAX_COUNTERS: usize = 500;

/// A replica, and what it holds for as long as it exists.
#[derive(Debug, Clone, Default)]
pub struct Placement {
    /// Its name.
    pub replica: String,
    /// Whose.
    pub workload: Workload,
    /// As in [`Series`].
    pub gpu_class: String,
    /// Its node.
    pub node: String,
    /// Thousandths of a GPU.
    pub gpu_millis: u32,
    /// Thousandths of a CPU core.
    pub cpu_millis: u64,
    /// Memory.
    pub memory_mib: u64,
    /// When it was placed.
    pub created: Clock,
}

/// Replicas and counters that are written together.
#[derive(Debug, Default)]
struct Shard {
    /// Number of the segment that is being filled.
    sequence: u64,
    spans: BTreeMap<String, Span>,
    counters: BTreeMap<String, Counter>,
    /// What the segment has so far, whether written or not.
    totals: Totals,
    gaps: Vec<Gap>,
    /// Something has changed since the last write.
    dirty: bool,
    written: Clock,
}

/// What is stored of a shard in addition to its segments.
#[derive(Debug, Clone, Deserialize)]
pub struct ShardState {
    sequence: u64,
    spans: BTreeMap<String, Span>,
    counters: BTreeMap<String, Counter>,
}

/// The same, as it is written.
#[derive(Serialize)]
struct ShardStateRef<'a> {
    sequence: u64,
    spans: BTreeMap<&'a String, &'a Span>,
    counters: &'a BTreeMap<String, Counter>,
}

/// Values to write in one transaction. See [`Meter::checkpoint`].
#[derive(Debug, Default)]
pub struct Checkpoint {
    /// Key and JSON.
    pub values: Vec<(String, Vec<u8>)>,
    shards: Vec<usize>,
    closed: Vec<String>,
    gaps: Vec<(usize, Gap)>,
    ends_segments: bool,
    at: Clock,
}

impl Checkpoint {
    /// Bytes of all values.
    pub fn bytes(&self) -> usize {
        self.values.iter().map(|(_, value)| value.len()).sum()
    }
}

/// Usage that may not be in the store yet.
#[derive(Debug, Clone, Default)]
pub struct Live {
    /// By shard: its segments from this number on are replaced by `rows` and `gaps`.
    pub sequences: BTreeMap<u32, u64>,
    /// Usage.
    pub rows: Vec<Row>,
    /// Time that is not known, or not yet.
    pub gaps: Vec<Gap>,
    /// Usage is complete up to here.
    pub complete_until: Clock,
}

/// Turns what agents report into usage, each minute and each request once.
#[derive(Debug, Default)]
pub struct Meter {
    shards: Vec<Shard>,
    /// Shard of each replica.
    replicas: BTreeMap<String, usize>,
    /// Replicas of each node.
    nodes: BTreeMap<String, BTreeSet<String>>,
    /// Shard of each counter.
    counters: BTreeMap<String, usize>,
    /// Nodes whose agents have reported in their present session, so that their replicas are known to do as before;
    /// `true` if they keep histories.
    reporting: BTreeMap<String, bool>,
}

impl Meter {
    /// Continues from what a previous leader has written, by number of the shard.
    pub fn resume(states: impl IntoIterator<Item = (u32, ShardState)>) -> Self {
        let mut meter = Self::default();
        for (number, state) in states {
            let number = number as usize;
            while meter.shards.len() <= number {
                meter.shards.push(Shard::default());
            }
            for (name, span) in &state.spans {
                meter.replicas.insert(name.clone(), number);
                meter.nodes.entry(span.claim.node.clone()).or_default().insert(name.clone());
            }
            meter.counters.extend(state.counters.keys().map(|key| (key.clone(), number)));
            let shard = &mut meter.shards[number];
            // The previous leader's last segment is left as it is.
            shard.sequence = state.sequence + 1;
            (shard.spans, shard.counters) = (state.spans, state.counters);
        }
        meter
    }

    /// Returns `true` if the replica is metered.
    pub fn knows(&self, replica: &str) -> bool {
        self.replicas.contains_key(replica)
    }

    /// Replicas that are metered.
    pub fn replicas(&self) -> impl Iterator<Item = &str> {
        self.replicas.keys().map(String::as_str)
    }

    /// Nodes that have replicas or counters.
    pub fn nodes(&self) -> BTreeSet<String> {
        let counters = self.shards.iter().flat_map(|shard| shard.counters.values());
        self.nodes.keys().cloned().chain(counters.map(|counter| counter.node.clone())).collect()
    }

    /// Meters a replica from its placement on. One that is metered already belongs to the coordinator again.
    pub fn open(&mut self, placement: Placement) {
        let Placement { replica, workload, gpu_class, node, gpu_millis, cpu_millis, memory_mib, created } = placement;
        if let Some(span) = self.span(&replica) {
            span.lost_at = None;
            return;
        }
        let shard = self.place(|shard| shard.spans.len() < MAX_SPANS);
        self.replicas.insert(replica.clone(), shard);
        self.nodes.entry(node.clone()).or_default().insert(replica.clone());
        let claim = Claim { workload, gpu_class, node, gpu_millis, cpu_millis, memory_mib };
        let shard = &mut self.shards[shard];
        shard.spans.insert(replica, Span::new(claim, created));
        shard.dirty = true;
        // A new leader that knew the replica only from its record would know less.
        shard.written = Clock::MIN;
    }

    /// The first shard that has room.
    fn place(&mut self, has_room: impl Fn(&Shard) -> bool) -> usize {
        self.shards.iter().position(has_room).unwrap_or_else(|| {
            self.shards.push(Shard::default());
            self.shards.len() - 1
        })
    }

    fn span(&mut self, replica: &str) -> Option<&mut Span> {
        let shard = &mut self.shards[*self.replicas.get(replica)?];
        shard.dirty = true;
        shard.spans.get_mut(replica)
    }

    /// Changes one span; its totals and gaps go to its shard.
    fn change(&mut self, replica: &str, change: impl FnOnce(&mut Span, &mut Totals) -> Option<Gap>) {
        let Some(number) = self.replicas.get(replica) else { return };
        let shard = &mut self.shards[*number];
        let Some(span) = shard.spans.get_mut(replica) else { return };
        let gap = change(span, &mut shard.totals);
        shard.gaps.extend(gap.map(|gap| Gap { replica: replica.to_owned(), ..gap }));
        shard.dirty = true;
    }

    /// What the coordinator wants of a replica from now on: to be awake, or to sleep, and then whether it is `spare`: it
    /// sleeps only until somebody needs its memory.
    pub fn intend(&mut self, replica: &str, awake: bool, spare: bool, now: Clock) {
        let Some(span) = self.span(replica).filter(|span| !span.intends(awake, spare)) else { return };
        let node = span.claim.node.clone();
        let is_reporting = self.reporting.contains_key(&node);
        self.change(replica, |span, totals| {
            if is_reporting {
                span.advance(now, now, totals);
            }
            span.intend(awake, spare);
            None
        });
    }

    /// The labels of a replica's service are these.
    pub fn relabel(&mut self, replica: &str, labels: &BTreeMap<String, String>) {
        let Some(span) = self.replicas.get(replica).and_then(|shard| self.shards[*shard].spans.get(replica)) else {
            return;
        };
        let before = &span.claim.workload;
        let after = Workload::new(&before.namespace, &before.service, &before.revision, labels);
        if *before != after {
            self.change(replica, |span, _| {
                span.relabel(after);
                None
            });
        }
    }

    /// A node has opened a session. `offset` is how far this leader's clock is ahead of the previous leader's, if the
    /// agent can tell.
    pub fn connect(&mut self, node: &str, process: &str, offset: Option<Clock>, now: Clock) {
        self.reporting.remove(node);
        for replica in self.nodes.get(node).cloned().unwrap_or_default() {
            self.change(&replica, |span, _| span.adjust_clock(offset, now));
        }
        // Those of an earlier process do not grow any more.
        self.remove_counters(|counter| counter.node == node && counter.process != process);
    }

    /// A node's session has ended: its replicas do what they do unseen.
    pub fn disconnect(&mut self, node: &str) {
        self.reporting.remove(node);
    }

    /// Takes in what a node's agent process knows of all its replicas.
    pub fn observe(&mut self, node: &str, process: &str, histories: &BTreeMap<String, Vec<Change>>, now: Clock) {
        self.reporting.insert(node.to_owned(), true);
        for replica in self.nodes.get(node).cloned().unwrap_or_default() {
            match histories.get(&replica) {
                Some(changes) => self.change(&replica, |span, totals| span.observe(process, changes, now, totals)),
                None => self.observe_absence(&replica, now),
            }
            self.remove_if_over(&replica);
        }
    }

    /// Takes in the phases that an agent reports; of use only if it keeps no histories.
    pub fn observe_statuses(&mut self, node: &str, activities: &BTreeMap<String, Activity>, now: Clock) {
        if *self.reporting.entry(node.to_owned()).or_default() {
            return;
        }
        for (replica, activity) in activities {
            self.change(replica, |span, totals| {
                span.observe_status(*activity, now, totals);
                None
            });
            self.remove_if_over(replica);
        }
    }

    fn observe_absence(&mut self, replica: &str, now: Clock) {
        let lost = self.span(replica).is_some_and(|span| span.lost_at.is_some());
        if lost {
            let gap = self.unknown(replica, GapReason::NodeLost, now);
            self.forget(replica, gap);
        } else {
            self.change(replica, |span, _| span.observe_absence(now));
        }
    }

    /// A replica that the coordinator gave up has now ended, too.
    fn remove_if_over(&mut self, replica: &str) {
        if self.span(replica).is_some_and(|span| span.lost_at.is_some() && span.has_ended()) {
            self.forget(replica, None);
        }
    }

    /// A replica's node was lost, and the coordinator does not have the replica any more. It stays metered until the
    /// node returns or is deleted.
    pub fn lose(&mut self, replica: &str, now: Clock) {
        if let Some(span) = self.span(replica) {
            span.lost_at.get_or_insert(now);
        }
    }

    /// Adds what a revision's requests on one node have counted since the agent's process started.
    pub fn count(&mut self, node: &str, process: &str, workload: Workload, counts: Counts, now: Clock) {
        let key = format!("{node}/{}/{}", workload.namespace, workload.revision);
        let number = match self.counters.get(&key) {
            Some(number) => *number,
            None => {
                let number = self.place(|shard| shard.counters.len() < MAX_COUNTERS);
                self.counters.insert(key.clone(), number);
                number
            }
        };
        let shard = &mut self.shards[number];
        let counter = shard.counters.entry(key).or_insert_with(|| Counter::new(workload.clone(), node, process));
        if !workload.service.is_empty() {
            counter.workload = workload;
        }
        let amounts = counter.add(process, counts);
        if amounts.is_zero() {
            return;
        }
        let workload = counter.workload.clone();
        let series = Series { workload, gpu_class: String::new(), state: UsageState::Requests };
        let start = Period::Minute.start(now);
        shard.totals.add(Row { period: Period::Minute, start, series: Arc::new(series), amounts });
        shard.dirty = true;
    }

    fn remove_counters(&mut self, is_over: impl Fn(&Counter) -> bool) {
        let shards = &mut self.shards;
        self.counters.retain(|key, number| {
            let shard = &mut shards[*number];
            let over = shard.counters.get(key).is_none_or(&is_over);
            if over {
                shard.counters.remove(key);
                shard.dirty = true;
            }
            !over
        });
    }

    /// Counts all time for which there is evidence. `heard` says up to when an agent with an open session was heard of.
    pub fn advance(&mut self, heard: impl Fn(&str) -> Option<Clock>, now: Clock) {
        for number in 0..self.shards.len() {
            self.advance_shard(number, &heard, now);
        }
    }

    fn advance_shard(&mut self, number: usize, heard: &impl Fn(&str) -> Option<Clock>, now: Clock) {
        let shard = &mut self.shards[number];
        for span in shard.spans.values_mut().filter(|span| self.reporting.contains_key(&span.claim.node)) {
            if let Some(heard) = heard(&span.claim.node).filter(|heard| *heard > span.until) {
                span.advance(heard.min(now), now, &mut shard.totals);
                shard.dirty = true;
            }
        }
    }

    /// Shards that were not written for a minute and have something to write.
    pub fn due(&self, now: Clock) -> Vec<usize> {
        let is_due = |shard: &Shard| {
            let mut spans = shard.spans.values();
            let has_news = shard.dirty || spans.any(|span| self.reporting.contains_key(&span.claim.node));
            has_news && now - CHECKPOINT_INTERVAL >= shard.written
        };
        (0..self.shards.len()).filter(|number| is_due(&self.shards[*number])).collect()
    }

    /// All shards that have something to write.
    pub fn unwritten(&self) -> Vec<usize> {
        (0..self.shards.len()).filter(|number| self.shards[*number].dirty).collect()
    }

    /// What to write of these shards. Commit it in one transaction, then call [`Meter::committed`]; nothing has to be done
    /// if the commit fails.
    pub fn checkpoint(&mut self, shards: &[usize], heard: impl Fn(&str) -> Option<Clock>, now: Clock) -> Checkpoint {
        for number in shards {
            self.advance_shard(*number, &heard, now);
        }
        let values = shards.iter().flat_map(|number| self.values(*number, &[], &BTreeSet::new(), now)).collect();
        Checkpoint { values, shards: shards.to_vec(), ends_segments: true, at: now, ..Checkpoint::default() }
    }

    /// What to write along with the removal of replicas, after which they are not metered any more. See
    /// [`Meter::checkpoint`].
    pub fn closing(&self, replicas: &[(&str, GapReason)], now: Clock) -> Checkpoint {
        let known: Vec<_> =
            replicas.iter().filter_map(|(name, why)| Some((*self.replicas.get(*name)?, *name, *why))).collect();
        let gone = known.iter().map(|(_, name, _)| *name).collect();
        let shards: BTreeSet<_> = known.iter().map(|(shard, ..)| *shard).collect();
        let mut checkpoint = Checkpoint { at: now, ..Checkpoint::default() };
        for number in shards {
            let of_shard = known.iter().filter(|(shard, ..)| *shard == number);
            let gaps: Vec<_> = of_shard.filter_map(|(_, name, why)| self.unknown(name, *why, now)).collect();
            checkpoint.values.extend(self.values(number, &gaps, &gone, now));
            checkpoint.gaps.extend(gaps.into_iter().map(|gap| (number, gap)));
            checkpoint.shards.push(number);
        }
        checkpoint.closed = known.into_iter().map(|(_, name, _)| name.to_owned()).collect();
        checkpoint
    }

    /// A shard's open segment with additional gaps, and its state without the replicas that are `gone`.
    fn values(&self, number: usize, gaps: &[Gap], gone: &BTreeSet<&str>, now: Clock) -> Vec<(String, Vec<u8>)> {
        let shard = &self.shards[number];
        let gaps = shard.gaps.iter().chain(gaps).cloned().collect();
        let segment = Segment::new(now, &shard.totals, gaps);
        let mut values = vec![(format!("{STATE}{number:06}"), shard.state(gone))];
        if !segment.is_empty() {
            let key = SegmentKey { period: Period::Minute, shard: number as u32, sequence: shard.sequence };
            values.push((key.key(), json(&segment)));
        }
        values
    }

    /// The values of a checkpoint are stored.
    pub fn committed(&mut self, checkpoint: Checkpoint) {
        for (number, gap) in checkpoint.gaps {
            self.shards[number].gaps.push(gap);
        }
        for replica in &checkpoint.closed {
            self.forget(replica, None);
        }
        for number in checkpoint.shards {
            let shard = &mut self.shards[number];
            // An open segment with something in it is ended soon, so that nobody merges it before.
            let is_empty = shard.totals.is_empty() && shard.gaps.is_empty();
            shard.dirty = !(checkpoint.ends_segments || is_empty);
            if checkpoint.ends_segments {
                shard.written = checkpoint.at;
                shard.sequence += 1;
                shard.totals = Totals::default();
                shard.gaps.clear();
            }
        }
    }

    /// The time up to `now`, or up to the loss of its node, of which nothing is known.
    fn unknown(&self, replica: &str, reason: GapReason, now: Clock) -> Option<Gap> {
        let span = self.shards[*self.replicas.get(replica)?].spans.get(replica)?;
        let gap = span.unknown(span.lost_at.unwrap_or(now), reason)?;
        Some(Gap { replica: replica.to_owned(), ..gap })
    }

    fn forget(&mut self, replica: &str, gap: Option<Gap>) {
        let Some(number) = self.replicas.remove(replica) else { return };
        let shard = &mut self.shards[number];
        shard.gaps.extend(gap);
        shard.dirty = true;
        let Some(span) = shard.spans.remove(replica) else { return };
        if let Some(replicas) = self.nodes.get_mut(&span.claim.node) {
            replicas.remove(replica);
            if replicas.is_empty() {
                self.nodes.remove(&span.claim.node);
            }
        }
    }

    /// A node was deleted: what was not known of its replicas stays unknown.
    pub fn delete_node(&mut self, node: &str, now: Clock) {
        for replica in self.nodes.get(node).cloned().unwrap_or_default() {
            let gap = self.unknown(&replica, GapReason::NodeDeleted, now);
            self.forget(&replica, gap);
        }
        self.remove_counters(|counter| counter.node == node);
        self.reporting.remove(node);
    }

    /// What may not be stored yet.
    pub fn live(&self, now: Clock) -> Live {
        let mut live = Live { complete_until: now, ..Live::default() };
        for (number, shard) in self.shards.iter().enumerate() {
            live.sequences.insert(number as u32, shard.sequence);
            live.rows.extend(shard.totals.rows());
            live.gaps.extend(shard.gaps.iter().cloned());
            for (replica, span) in &shard.spans {
                if span.lost_at.is_some() {
                    let gap = self.unknown(replica, GapReason::NodeLost, now);
                    live.gaps.extend(gap.map(|gap| Gap { open: true, ..gap }));
                } else if !span.has_ended() {
                    live.complete_until = live.complete_until.min(span.until);
                }
            }
        }
        live
    }
}

impl Shard {
    /// As JSON, without some replicas.
    fn state(&self, gone: &BTreeSet<&str>) -> Vec<u8> {
        let spans = self.spans.iter().filter(|(name, _)| !gone.contains(name.as_str())).collect();
        json(&ShardStateRef { sequence: self.sequence, spans, counters: &self.counters })
    }
}

/// Numbers, strings, lists and maps by string, which JSON can always hold.
fn json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).unwrap_or_default()
}

/// The number of the shard whose state is stored by this key.
pub fn shard_of(key: &str) -> Option<u32> {
    key.strip_prefix(STATE)?.parse().ok()
}
