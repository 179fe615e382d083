//! The meter against an independent count, over everything that may come between.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::{
    Activity, Amounts, Change, Clock, Counts, Gap, GapReason, Meter, Period, Placement, Row, ShardState, UsageState,
    Workload,
    period::MINUTE,
    report::{Query, Report, select},
    retention::merges,
    segment::{LOG, STATE, Segment, SegmentKey},
    shard_of,
};

const GPUS: i64 = 2;
/// 2023-11-14T22:13:20Z.
const START: Clock = 1_700_000_000_000;

/// A store of nothing but usage, and the leader that writes it.
#[derive(Default)]
struct Cell {
    store: BTreeMap<String, Vec<u8>>,
    meter: Meter,
    now: Clock,
    /// When the agent was last heard of, if it has not been heard of just now.
    heard: Option<Clock>,
}

impl Cell {
    fn new() -> Self {
        Self { now: START, ..Self::default() }
    }

    fn place(&mut self, replica: &str, node: &str) {
        let placement = Placement {
            replica: replica.into(),
            workload: Workload::new("default", "llm", "llm-predictor-00001", &BTreeMap::new()),
            gpu_class: "H100".into(),
            node: node.into(),
            gpu_millis: GPUS as u32 * 1000,
            cpu_millis: 4000,
            memory_mib: 1024,
            created: self.now,
        };
        self.meter.open(placement);
    }

    fn commit(&mut self, checkpoint: super::Checkpoint) {
        self.store.extend(checkpoint.values.iter().cloned());
        self.meter.committed(checkpoint);
    }

    fn write_due(&mut self) {
        let due = self.meter.due(self.now);
        let (now, heard) = (self.now, self.heard.unwrap_or(self.now));
        let checkpoint = self.meter.checkpoint(&due, |_| Some(heard), now);
        self.commit(checkpoint);
    }

    fn write_all(&mut self) {
        let (shards, now) = (self.meter.unwritten(), self.now);
        let checkpoint = self.meter.checkpoint(&shards, |_| Some(now), now);
        self.commit(checkpoint);
    }

    fn remove(&mut self, replica: &str) {
        let checkpoint = self.meter.closing(&[(replica, GapReason::ReplicaUnknown)], self.now);
        self.commit(checkpoint);
    }

    /// Another leader continues from what is stored, with a clock that is ahead by `step`.
    fn fail_over(&mut self, step: Clock) {
        let states = self
            .store
            .iter()
            .filter_map(|(key, value)| Some((shard_of(key)?, serde_json::from_slice::<ShardState>(value).unwrap())));
        self.meter = Meter::resume(states);
        self.now += step;
    }

    fn segments(&self) -> Vec<(SegmentKey, Segment)> {
        let stored = self.store.iter().filter(|(key, _)| key.starts_with(LOG));
        stored.map(|(key, value)| (SegmentKey::parse(key).unwrap(), serde_json::from_slice(value).unwrap())).collect()
    }

    fn merge(&mut self) {
        for merge in merges(self.segments(), self.now) {
            merge.inputs.iter().for_each(|input| drop(self.store.remove(&input.key())));
            assert!(self.store.insert(merge.key.key(), serde_json::to_vec(&merge.segment).unwrap()).is_none());
        }
    }

    fn report(&self, period: Period) -> Report {
        let query = Query { from: Clock::MIN, to: Clock::MAX, period, namespace: String::new() };
        select(&query, self.segments(), self.meter.live(self.now))
    }

    fn sum(&self) -> Amounts {
        self.report(Period::Minute).rows.iter().fold(Amounts::default(), |mut sum, row| {
            sum += row.amounts;
            sum
        })
    }

    fn observe(&mut self, process: &str, replica: &str, changes: &[Change]) {
        self.meter.observe("a", process, &BTreeMap::from([(replica.to_owned(), changes.to_vec())]), self.now);
    }
}

fn change(sequence: u64, at: Clock, activity: Activity) -> Change {
    Change { sequence, at, activity }
}

/// By minute and state: milliseconds, GPU time and started minutes, from one replica's life alone.
fn count(life: &[(Clock, Activity)], end: Clock) -> BTreeMap<(Clock, UsageState), (i64, i64, i64)> {
    let mut counts: BTreeMap<(Clock, UsageState), (i64, i64, i64)> = BTreeMap::new();
    let mut minutes: BTreeMap<Clock, UsageState> = BTreeMap::new();
    for (index, (from, activity)) in life.iter().enumerate() {
        let to = life.get(index + 1).map_or(end, |(at, _)| *at);
        let (state, runs) = match activity {
            Activity::Waiting => (UsageState::Loading, false),
            Activity::Running | Activity::Loading => (UsageState::Loading, true),
            Activity::Serving => (UsageState::Serving, true),
            Activity::Asleep { held: true } => (UsageState::AsleepHeld, true),
            Activity::Asleep { held: false } => (UsageState::Asleep, true),
            Activity::Ended => continue,
        };
        let mut at = *from;
        while at < to {
            let step = (MINUTE - at % MINUTE).min(to - at);
            let entry = counts.entry((at - at % MINUTE, state)).or_default();
            entry.0 += step;
            entry.1 += if state == UsageState::Asleep { 0 } else { step * GPUS };
            if runs {
                let dearest = minutes.entry(at - at % MINUTE).or_insert(state);
                *dearest = (*dearest).max(state);
            }
            at += step;
        }
    }
    for (minute, state) in minutes {
        counts.entry((minute, state)).or_default().2 += 1;
    }
    counts.retain(|_, (time, ..)| *time > 0);
    counts
}

fn counted(report: &Report) -> BTreeMap<(Clock, UsageState), (i64, i64, i64)> {
    let of = |row: &Row| {
        let gpus = if row.series.state.holds_gpus() { row.amounts.minutes * GPUS * 1000 } else { 0 };
        assert_eq!(row.amounts.gpu_millis_minutes, gpus, "{row:?}");
        assert_eq!(row.amounts.cpu_millis_minutes, row.amounts.minutes * 4000);
        ((row.start, row.series.state), (row.amounts.replica_ms, row.amounts.gpu_us / 1000, row.amounts.minutes))
    };
    report.rows.iter().map(of).collect()
}

/// What happens to the coordinator and the agent while a replica lives.
#[derive(Debug, Clone)]
enum Trouble {
    /// The agent sends what it knows.
    Report,
    /// The leader writes.
    Write,
    /// The leader dies with what it has not written; the next one's clock differs by so much.
    FailOver(Clock),
    /// The session breaks, and the agent does not see the coordinator for a while.
    Away,
    /// The agent's process ends and begins again; the container runs on.
    AgentRestart,
    /// Old segments are merged.
    Merge,
}

fn trouble() -> impl Strategy<Value = Trouble> {
    prop_oneof![
        4 => Just(Trouble::Report),
        4 => Just(Trouble::Write),
        2 => Just(Trouble::FailOver(0)),
        2 => Just(Trouble::Away),
        1 => Just(Trouble::AgentRestart),
        1 => Just(Trouble::Merge),
    ]
}

fn activity() -> impl Strategy<Value = Activity> {
    prop_oneof![
        Just(Activity::Waiting),
        Just(Activity::Loading),
        Just(Activity::Serving),
        any::<bool>().prop_map(|held| Activity::Asleep { held }),
    ]
}

/// One replica, its agent and its coordinator, of which each may fail.
struct Story {
    cell: Cell,
    /// All that the replica did.
    life: Vec<(Clock, Activity)>,
    /// What the present agent process has seen of it.
    seen: Vec<Change>,
    process: u32,
    connected: bool,
}

impl Story {
    fn new() -> Self {
        let mut cell = Cell::new();
        cell.place("r", "a");
        cell.meter.intend("r", false, false, START);
        cell.write_due();
        Self { cell, life: vec![(START, Activity::Waiting)], seen: Vec::new(), process: 1, connected: false }
    }

    fn does(&mut self, activity: Activity) {
        self.life.push((self.cell.now, activity));
        let sequence = self.seen.last().map_or(1, |change| change.sequence + 1);
        self.seen.push(change(sequence, self.cell.now, activity));
    }

    fn report(&mut self) {
        if !std::mem::replace(&mut self.connected, true) {
            self.cell.meter.connect("a", &self.process.to_string(), Some(0), self.cell.now);
        }
        self.cell.heard = Some(self.cell.now);
        let (process, seen) = (self.process.to_string(), self.seen.clone());
        self.cell.observe(&process, "r", &seen);
    }

    fn meets(&mut self, trouble: &Trouble) {
        match trouble {
            Trouble::Report => self.report(),
            Trouble::Write => self.cell.write_due(),
            Trouble::FailOver(step) => {
                self.cell.fail_over(*step);
                self.connected = false;
            }
            Trouble::Away => {
                self.cell.meter.disconnect("a");
                self.connected = false;
            }
            Trouble::AgentRestart => {
                // What only an agent and a leader knew is not known to anybody once both have ended.
                self.report();
                self.cell.write_all();
                self.process += 1;
                self.connected = false;
                self.seen.clear();
                let (_, activity) = self.life[self.life.len() - 1];
                if activity == Activity::Waiting {
                    self.seen.push(change(1, self.cell.now, activity));
                } else {
                    let started = self.life.iter().rev().take_while(|(_, activity)| *activity != Activity::Waiting);
                    let started = started.last().map_or(self.cell.now, |(at, _)| *at);
                    self.seen.push(change(1, started, Activity::Running));
                    self.seen.push(change(2, self.cell.now, activity));
                }
            }
            Trouble::Merge => self.cell.merge(),
        }
    }
}

proptest! {
    #[test]
    fn every_moment_and_every_minute_counts_once_whatever_fails(
        steps in prop::collection::vec((1_i64..200_000, prop::option::of(activity()), trouble()), 1..60),
    ) {
        let mut story = Story::new();
        for (time, activity, trouble) in steps {
            story.cell.now += time;
            if let Some(activity) = activity {
                story.does(activity);
            }
            story.meets(&trouble);
        }
        story.cell.now += 1;
        story.does(Activity::Ended);
        story.report();
        story.cell.remove("r");
        let report = story.cell.report(Period::Minute);
        prop_assert_eq!(&report.gaps, &[]);
        // After six hours, minutes are merged into hours.
        if report.rows.iter().all(|row| row.period == Period::Minute) {
            prop_assert_eq!(counted(&report), count(&story.life, story.cell.now));
        }
        let sum = count(&story.life, story.cell.now).into_values().fold((0, 0, 0), |sum, one| {
            (sum.0 + one.0, sum.1 + one.1, sum.2 + one.2)
        });
        let all = story.cell.sum();
        prop_assert_eq!((all.replica_ms, all.gpu_us / 1000, all.minutes), sum);
        story.cell.fail_over(0);
        prop_assert_eq!(story.cell.sum(), all, "another leader reports the same");
    }

    #[test]
    fn requests_count_once_over_restarts_of_both_sides(
        steps in prop::collection::vec((0_u64..100, 0..5_u8), 1..60),
    ) {
        let mut cell = Cell::new();
        let workload = Workload::new("default", "llm", "llm-predictor-00001", &BTreeMap::new());
        let (mut process, mut counter, mut all) = (1, 0, 0);
        for (requests, event) in steps {
            cell.now += 10_000;
            counter += requests;
            all += requests;
            let counts = Counts { requests: counter, prompt_tokens: 3 * counter, ..Counts::default() };
            let send = |cell: &mut Cell| {
                let now = cell.now;
                cell.meter.count("a", &process.to_string(), workload.clone(), counts, now);
            };
            send(&mut cell);
            match event {
                0 => send(&mut cell),
                1 => {
                    cell.write_all();
                    cell.fail_over(0);
                }
                2 => {
                    // What the dead leader had not written is sent to the next one again.
                    cell.fail_over(0);
                    send(&mut cell);
                }
                3 => {
                    (process, counter) = (process + 1, 0);
                    let now = cell.now;
                    cell.meter.connect("a", &process.to_string(), None, now);
                    cell.write_all();
                }
                _ => {}
            }
        }
        let sum = cell.sum();
        prop_assert_eq!((sum.requests as u64, sum.prompt_tokens as u64), (all, 3 * all));
    }
}

fn serving(cell: &mut Cell) {
    cell.place("r", "a");
    cell.meter.connect("a", "1", None, cell.now);
    let changes = [change(1, cell.now, Activity::Serving)];
    cell.observe("1", "r", &changes);
    cell.write_due();
}

fn gaps(cell: &Cell) -> Vec<(Clock, Clock, GapReason, bool)> {
    let of = |gap: &Gap| (gap.from - START, gap.to - START, gap.reason, gap.open);
    cell.report(Period::Minute).gaps.iter().map(of).collect()
}

#[test]
fn a_lost_node_leaves_an_open_gap_that_its_return_closes() {
    let mut cell = Cell::new();
    serving(&mut cell);
    cell.now = START + 10_000;
    cell.meter.disconnect("a");
    cell.now = START + 40_000;
    cell.meter.lose("r", cell.now);
    cell.write_all();
    cell.now = START + 300_000;
    assert_eq!(gaps(&cell), [(0, 40_000, GapReason::NodeLost, true)], "up to when it was given up");
    cell.fail_over(0);
    assert_eq!(cell.sum().replica_ms, 0);

    cell.meter.connect("a", "1", None, cell.now);
    let changes = [change(1, START, Activity::Serving)];
    cell.observe("1", "r", &changes);
    assert_eq!((cell.sum().replica_ms, gaps(&cell)), (300_000, vec![]), "it ran all the time");
    cell.now += 5_000;
    let changes = [change(1, START, Activity::Serving), change(2, cell.now - 1_000, Activity::Ended)];
    cell.observe("1", "r", &changes);
    assert!(!cell.meter.knows("r"), "the coordinator gave it up before");
    assert_eq!(cell.sum().replica_ms, 304_000);
}

#[test]
fn what_nobody_can_know_is_a_gap_and_no_usage() {
    let mut cell = Cell::new();
    serving(&mut cell);
    cell.now = START + 60_000;
    // The agent was started again, and had to start the container again.
    cell.meter.connect("a", "2", None, cell.now);
    let changes = [change(1, START + 50_000, Activity::Waiting), change(2, START + 55_000, Activity::Loading)];
    cell.observe("2", "r", &changes);
    assert_eq!(gaps(&cell), [(0, 50_000, GapReason::AgentRestarted, false)]);
    assert_eq!((cell.sum().replica_ms, cell.sum().minutes), (10_000, 1));
    // It returns once more, and does not know the replica at all.
    cell.now = START + 100_000;
    cell.meter.connect("a", "3", None, cell.now);
    cell.meter.observe("a", "3", &BTreeMap::new(), cell.now);
    assert_eq!(gaps(&cell)[1], (60_000, 100_000, GapReason::ReplicaUnknown, false));
    // Its node is deleted.
    cell.now = START + 160_000;
    cell.meter.delete_node("a", cell.now);
    assert_eq!(gaps(&cell)[2], (100_000, 160_000, GapReason::NodeDeleted, false));
    assert_eq!(cell.sum().replica_ms, 10_000);
}

#[test]
fn a_step_between_the_clocks_of_two_leaders_counts_nothing_twice_and_loses_nothing() {
    for step in [-3_600_000, -40_000, 40_000, 3_600_000] {
        let mut cell = Cell::new();
        serving(&mut cell);
        cell.now += 30_000;
        let now = cell.now;
        cell.meter.advance(|_| Some(now), now);
        cell.write_all();
        cell.fail_over(step);
        cell.now += 7_000;
        // The agent was told the old leader's time; by its own clock, 37 s have passed since the start.
        cell.meter.connect("a", "1", Some(cell.now - START - 37_000), cell.now);
        let changes = [change(1, cell.now - 37_000, Activity::Serving)];
        cell.observe("1", "r", &changes);
        assert_eq!((cell.sum().replica_ms, gaps(&cell)), (37_000, vec![]), "{step}");
    }
    let mut cell = Cell::new();
    serving(&mut cell);
    cell.fail_over(-3_600_000);
    cell.meter.connect("a", "1", None, cell.now);
    let changes = [change(1, cell.now - 10_000, Activity::Serving)];
    cell.observe("1", "r", &changes);
    assert_eq!(gaps(&cell), [(-3_600_000, -3_600_000, GapReason::ClockStepped, false)], "nobody knows how long it was");
}

#[test]
fn a_sleeper_that_nobody_asked_for_is_spare_and_one_that_wakes_has_its_gpus() {
    let mut cell = Cell::new();
    serving(&mut cell);
    cell.meter.intend("r", false, true, cell.now);
    let mut changes = vec![change(1, START, Activity::Serving)];
    for (sequence, held) in [(2, true), (3, false)] {
        cell.now += 100_000;
        changes.push(change(sequence, cell.now, Activity::Asleep { held }));
        let (process, changes) = ("1", changes.clone());
        cell.observe(process, "r", &changes);
    }
    cell.now += 100_000;
    cell.meter.intend("r", true, false, cell.now);
    cell.now += 5_000;
    changes.push(change(4, cell.now, Activity::Serving));
    cell.observe("1", "r", &changes);
    let report = cell.report(Period::Month);
    let states: Vec<_> = report
        .rows
        .iter()
        .map(|row| (row.series.state.name(), row.amounts.replica_ms, row.amounts.gpu_us / 1000))
        .collect();
    assert_eq!(
        states,
        [
            ("spare", 100_000, 0),
            ("spare-held", 100_000, 200_000),
            ("loading", 5_000, 10_000),
            ("serving", 100_000, 200_000)
        ]
    );
}

#[test]
fn adjacent_ranges_add_up_wherever_they_meet() {
    let mut cell = Cell::new();
    serving(&mut cell);
    cell.now += 10 * MINUTE;
    cell.observe("1", "r", &[change(1, START, Activity::Serving)]);
    let time = |from: Clock, to: Clock| -> i64 {
        let query = Query { from, to, period: Period::Minute, namespace: String::new() };
        let report = select(&query, cell.segments(), cell.meter.live(cell.now));
        report.rows.iter().map(|row| row.amounts.replica_ms).sum()
    };
    let all = time(Clock::MIN, Clock::MAX);
    assert!(all > 0);
    for meet in [START, START + MINUTE, START + 2 * MINUTE + 30_000, START + 2 * MINUTE + 45_000] {
        assert_eq!(time(Clock::MIN, meet) + time(meet, Clock::MAX), all, "at {meet}");
    }
}

#[test]
fn old_usage_is_kept_by_hour_then_day_then_month_and_its_sum_stays() {
    let mut cell = Cell::new();
    serving(&mut cell);
    let before = START;
    let mut periods = BTreeSet::new();
    while cell.now < START + 500 * 86_400_000 {
        cell.now += 6 * 3_600_000;
        cell.write_due();
        if cell.now % (5 * 86_400_000) < 21_600_000 {
            cell.merge();
            periods.extend(cell.segments().iter().map(|(key, _)| key.period));
        }
    }
    assert_eq!(periods.into_iter().collect::<Vec<_>>(), Period::ALL);
    let sum = cell.sum();
    assert_eq!(sum.replica_ms, cell.now - before);
    assert_eq!(sum.minutes, (cell.now - 1) / MINUTE - START / MINUTE + 1);
    assert!(cell.segments().len() < 600, "{} of 2000", cell.segments().len());
    assert_eq!(cell.store.keys().filter(|key| key.starts_with(STATE)).count(), 1);
}

#[test]
fn large_cells_are_written_in_parts_that_a_store_takes() {
    let mut cell = Cell::new();
    (0..1000).for_each(|number| cell.place(&format!("llm-predictor-00001-{number:08}"), "a"));
    let due = cell.meter.due(cell.now);
    assert_eq!(due.len(), 5);
    let now = cell.now;
    for shard in due {
        let checkpoint = cell.meter.checkpoint(&[shard], |_| Some(now), now);
        assert!(checkpoint.bytes() < 100 << 10, "{}", checkpoint.bytes());
        cell.commit(checkpoint);
    }
    assert_eq!(cell.meter.due(cell.now + 60_000), Vec::<usize>::new(), "nobody says what they do");
    cell.meter.observe_statuses("a", &BTreeMap::new(), cell.now);
    assert_eq!(cell.meter.due(cell.now + 59_999), Vec::<usize>::new());
    assert_eq!(cell.meter.due(cell.now + 60_000).len(), 5);
}

#[test]
fn an_idle_shard_writes_nothing_and_what_it_wrote_last_is_merged_once() {
    let mut cell = Cell::new();
    serving(&mut cell);
    cell.now += 90_000;
    let changes = [change(1, START, Activity::Serving), change(2, cell.now, Activity::Ended)];
    cell.observe("1", "r", &changes);
    cell.remove("r");
    for _ in 0..8 {
        cell.now += 3_600_000;
        cell.write_due();
        cell.merge();
    }
    assert_eq!(cell.meter.due(cell.now), Vec::<usize>::new());
    assert!(cell.segments().iter().all(|(key, _)| key.period == Period::Hour), "{:?}", cell.segments());
    cell.place("r-2", "a");
    cell.write_due();
    assert_eq!((cell.sum().replica_ms, cell.sum().minutes), (90_000, 2));
}

#[test]
fn the_prices_of_the_documentation_can_be_read() {
    let text = include_str!("../../../docs/billing.md");
    let (_, yaml) = text.split_once("```yaml\n").unwrap();
    let (yaml, _) = yaml.split_once("```").unwrap();
    let file = super::prices::PriceFile::parse(yaml).unwrap();
    assert_eq!((file.currency.as_str(), file.prices.len()), ("EUR", 2));
}
