//! One replica over time: turns what is known of it into usage.
//!
//! A span is complete up to [`Span::until`]. It advances only by evidence: a report of the replica's agent, or the
//! agent's open session. What an agent reports after it was away closes the time in between, or leaves a [`Gap`].

use std::{collections::BTreeMap, sync::Arc};

use serde::{Deserialize, Serialize};

use super::{
    period::{Clock, MINUTE, Period},
    segment::{Gap, GapReason, Row, Totals},
    series::{Amounts, Series, UsageState, Workload},
};

/// Runtimes know in whole seconds when a container started.
const START_RESOLUTION: Clock = 1_000;
/// A difference between the clocks of two leaders up to this is the time that messages take.
const CLOCK_TOLERANCE: Clock = 2_000;

/// What a replica does, as its agent reports it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Activity {
    /// It has its place and its GPUs, and no container runs: it is not started yet, or failed.
    Waiting,
    /// Its container runs, as before.
    Running,
    /// Its container runs and takes no requests yet.
    Loading,
    /// It takes requests, or finishes those it has.
    Serving,
    /// It sleeps.
    Asleep {
        /// `true` if it still has its GPU memory.
        held: bool,
    },
    /// It has ended for good.
    Ended,
}

/// A change of activity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Change {
    /// Grows by one with each change of a replica in one agent process.
    pub sequence: u64,
    /// When, by the coordinator's clock.
    pub at: Clock,
    /// What it does from then on.
    pub activity: Activity,
}

/// What a replica holds for as long as it exists.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Claim {
    /// Whose.
    #[serde(flatten)]
    pub(super) workload: Workload,
    /// As in [`Series`].
    #[serde(default, rename = "class")]
    pub(super) gpu_class: String,
    /// Its node.
    pub(super) node: String,
    /// Thousandths of a GPU.
    pub(super) gpu_millis: u32,
    /// Thousandths of a CPU core.
    pub(super) cpu_millis: u64,
    /// Memory.
    pub(super) memory_mib: u64,
}

/// One replica over time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Span {
    #[serde(flatten)]
    pub(super) claim: Claim,
    /// Everything before this is counted.
    pub(super) until: Clock,
    activity: Activity,
    /// `true` if it is to be awake: while it still sleeps it has its GPUs.
    awake: bool,
    /// `true` if it sleeps only until somebody needs its memory.
    spare: bool,
    /// The last minute that was counted, and for which state.
    minute: Option<(Clock, UsageState)>,
    /// The agent process that reported last, and the last of its changes.
    source: Option<(String, u64)>,
    /// When its node was lost; the coordinator does not have the replica any more.
    pub(super) lost_at: Option<Clock>,
    /// `true` until the clock that `until` was taken from is known to be this leader's.
    #[serde(skip, default = "yes")]
    foreign: bool,
    #[serde(skip)]
    series: BTreeMap<UsageState, Arc<Series>>,
}

fn yes() -> bool {
    true
}

impl Span {
    /// A replica that was placed at `created`.
    pub(super) fn new(claim: Claim, created: Clock) -> Self {
        Self {
            claim,
            until: created,
            activity: Activity::Waiting,
            awake: true,
            spare: false,
            minute: None,
            source: None,
            lost_at: None,
            foreign: false,
            series: BTreeMap::new(),
        }
    }

    /// The state that its time counts for; `None` once it has ended.
    pub(super) fn state(&self) -> Option<UsageState> {
        Some(match self.activity {
            Activity::Ended => return None,
            Activity::Waiting | Activity::Running | Activity::Loading => UsageState::Loading,
            Activity::Serving => UsageState::Serving,
            Activity::Asleep { .. } if self.awake => UsageState::Loading,
            Activity::Asleep { held } => match (self.spare, held) {
                (true, true) => UsageState::SpareHeld,
                (true, false) => UsageState::Spare,
                (false, true) => UsageState::AsleepHeld,
                (false, false) => UsageState::Asleep,
            },
        })
    }

    /// Returns `true` if its container runs.
    fn runs(&self) -> bool {
        !matches!(self.activity, Activity::Waiting | Activity::Ended)
    }

    /// Counts all time up to `to`, in which nothing has changed.
    pub(super) fn advance(&mut self, to: Clock, now: Clock, totals: &mut Totals) {
        let Some(state) = self.state() else {
            self.until = self.until.max(to);
            return;
        };
        while self.until < to {
            let period = Period::kept(self.until, now);
            let end = period.end(self.until).min(to);
            let time = end - self.until;
            let mut amounts = Amounts { replica_ms: time, ..Amounts::default() };
            if state.holds_gpus() {
                amounts.gpu_us = time * i64::from(self.claim.gpu_millis);
            }
            if self.runs() {
                self.start_minutes(state, period, end, &mut amounts, totals);
            }
            let series = self.series(state);
            totals.add(Row { period, start: period.start(self.until), series, amounts });
            self.until = end;
        }
    }

    /// Adds the minutes of UTC that begin, for this replica, between `until` and `end`.
    fn start_minutes(
        &mut self,
        state: UsageState,
        period: Period,
        end: Clock,
        amounts: &mut Amounts,
        totals: &mut Totals,
    ) {
        let (first, last) = (Period::Minute.start(self.until), Period::Minute.start(end - 1));
        let mut count = (last - first) / MINUTE + 1;
        let mut dearest = state;
        if let Some((_, counted)) = self.minute.filter(|(minute, _)| *minute == first) {
            if counted >= state {
                count -= 1;
                dearest = if last == first { counted } else { state };
            } else {
                // The minute counts for the more expensive state instead.
                let (series, amounts) = (self.series(counted), self.minutes(counted, -1));
                totals.add(Row { period, start: period.start(first), series, amounts });
            }
        }
        *amounts += self.minutes(state, count);
        self.minute = Some((last, dearest));
    }

    /// What so many minutes in this state count.
    fn minutes(&self, state: UsageState, count: i64) -> Amounts {
        let gpu_millis = if state.holds_gpus() { i64::from(self.claim.gpu_millis) } else { 0 };
        Amounts {
            minutes: count,
            gpu_millis_minutes: count * gpu_millis,
            cpu_millis_minutes: count * self.claim.cpu_millis as i64,
            memory_mib_minutes: count * self.claim.memory_mib as i64,
            ..Amounts::default()
        }
    }

    fn series(&mut self, state: UsageState) -> Arc<Series> {
        let claim = &self.claim;
        let series = self.series.entry(state).or_insert_with(|| {
            Arc::new(Series { workload: claim.workload.clone(), gpu_class: claim.gpu_class.clone(), state })
        });
        Arc::clone(series)
    }

    /// Counts for another workload from here on: the labels of its service have changed. The minute that has begun stays
    /// where it is counted.
    pub(super) fn relabel(&mut self, workload: Workload) {
        self.claim.workload = workload;
        self.series.clear();
        if let Some((_, state)) = &mut self.minute {
            *state = UsageState::Serving;
        }
    }

    /// Whether it is to be awake, and if not, whether it sleeps only until somebody needs its memory.
    pub(super) fn intend(&mut self, awake: bool, spare: bool) {
        (self.awake, self.spare) = (awake, spare);
    }

    /// Returns `true` if [`Span::intend`] would change nothing.
    pub(super) fn intends(&self, awake: bool, spare: bool) -> bool {
        (self.awake, self.spare) == (awake, spare)
    }

    /// Takes in the changes that an agent process knows of, oldest first: everything up to `now` is known then, except
    /// for the gap that is returned.
    pub(super) fn observe(
        &mut self,
        process: &str,
        changes: &[Change],
        now: Clock,
        totals: &mut Totals,
    ) -> Option<Gap> {
        let known = self.source.as_ref().filter(|(source, _)| source == process).map(|(_, sequence)| *sequence);
        let next = known.map_or(0, |sequence| sequence + 1);
        let mut new = changes.iter().filter(|change| change.sequence >= next).peekable();
        let mut gap = None;
        if let Some(first) = new.peek() {
            let is_next = known.is_some() && first.sequence == next;
            let is_first_report = self.source.is_none();
            if !is_next && !is_first_report && first.at > self.until + START_RESOLUTION {
                gap = self.gap(first.at.min(now), GapReason::AgentRestarted);
            }
        } else if known.is_none() {
            // Nothing is said about it.
            return None;
        }
        for change in new {
            self.advance(change.at.min(now), now, totals);
            self.change(change.activity);
            self.source = Some((process.to_owned(), change.sequence));
        }
        self.advance(now, now, totals);
        self.foreign = false;
        gap
    }

    /// Takes in what an agent reports that keeps no history: it has done the same since it was last heard of.
    pub(super) fn observe_status(&mut self, activity: Activity, now: Clock, totals: &mut Totals) {
        if self.source.as_ref().is_some_and(|(process, _)| !process.is_empty()) {
            return;
        }
        self.advance(now, now, totals);
        self.change(activity);
        self.source = Some((String::new(), 0));
        self.foreign = false;
    }

    fn change(&mut self, activity: Activity) {
        self.activity = match (activity, self.activity) {
            (Activity::Running, Activity::Waiting | Activity::Ended) => Activity::Loading,
            (Activity::Running, before) => before,
            (after, _) => after,
        };
    }

    /// The agent has returned and does not know it: it waits to be started again. Returns the time that is not known.
    pub(super) fn observe_absence(&mut self, now: Clock) -> Option<Gap> {
        let gap = if self.source.is_some() { self.gap(now, GapReason::ReplicaUnknown) } else { None };
        self.activity = Activity::Waiting;
        gap
    }

    /// Skips the time up to `to`, of which nothing is known.
    fn gap(&mut self, to: Clock, reason: GapReason) -> Option<Gap> {
        let gap = self.unknown(to, reason);
        self.until = self.until.max(to);
        gap
    }

    /// The time from the end of what is counted to `to`, of which nothing is known; `None` if there is none.
    pub(super) fn unknown(&self, to: Clock, reason: GapReason) -> Option<Gap> {
        if self.until < to { self.gap_of(to, reason) } else { None }
    }

    fn gap_of(&self, to: Clock, reason: GapReason) -> Option<Gap> {
        let state = self.state()?;
        Some(Gap {
            workload: self.claim.workload.clone(),
            gpu_class: self.claim.gpu_class.clone(),
            replica: String::new(),
            node: self.claim.node.clone(),
            from: self.until,
            to,
            reason,
            state,
            gpu_millis: if state.holds_gpus() { self.claim.gpu_millis } else { 0 },
            open: false,
        })
    }

    /// Returns `true` if it has ended for good.
    pub(super) fn has_ended(&self) -> bool {
        self.activity == Activity::Ended
    }

    /// Moves it from the clock of a previous leader to this one's, which is ahead by `offset`; `None` if nobody knows by
    /// how much. Returns a gap without length if time was lost that way.
    pub(super) fn adjust_clock(&mut self, offset: Option<Clock>, now: Clock) -> Option<Gap> {
        if !std::mem::replace(&mut self.foreign, false) {
            return None;
        }
        let before = self.until;
        match offset {
            Some(offset) if offset.abs() > CLOCK_TOLERANCE => self.until = (self.until + offset).min(now),
            _ if self.until > now => self.until = now,
            _ => return None,
        }
        // The minute that had begun goes on.
        if let Some((minute, _)) = &mut self.minute {
            *minute = Period::Minute.start(self.until - 1);
        }
        self.lost_at = self.lost_at.map(|lost_at| lost_at + self.until - before);
        if offset.is_none() { self.gap_of(self.until, GapReason::ClockStepped) } else { None }
    }
}
