//! What the past says of the next minutes: replicas to have ready before anybody asks.
//!
//! Two rules, each of which can only raise the wish:
//! - *Return after idleness*: idle times go into a histogram, and a replica is ready for the time in which
//!   most of them ended (the hybrid histogram policy of Shahrad et al., "Serverless in the Wild", USENIX
//!   ATC 2020, section 4.2: pre-warm at the 5th percentile, keep until the 99th, 10 % margin each).
//! - *Time of day*: the load of each five minutes of the day is remembered, averaged over days with the
//!   newest counting most, and looked up as far ahead as a replica takes to load.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{ScalerConfig, Time};

/// Width of a bin of idle times.
const BIN: Duration = Duration::from_secs(60);
/// Bins; longer idle times are only counted.
const BINS: usize = 240;
/// Idle times needed before they say anything.
const IDLE_TIMES_LEAST: u32 = 5;
/// Part of the idle times that have to fall within the histogram.
const WITHIN_LEAST: f64 = 0.5;
const HEAD: f64 = 0.05;
const TAIL: f64 = 0.99;
const MARGIN: f64 = 0.1;

/// Length of a slot of the day.
const SLOT: Duration = Duration::from_secs(300);
const SLOTS: usize = 288;
/// Weight of the newest day.
const NEWEST: f64 = 0.5;
/// Load by time of day that is worth a replica, as a part of its target; less is left to the histogram.
const SLOT_LEAST: f64 = 0.05;

/// One revision's past. Constant memory, about 4 KiB.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct History {
    idle: Vec<u32>,
    idle_longer: u32,
    last_busy: Option<Time>,
    /// Mean load by slot of the day; negative where that slot has not been seen yet.
    day: Vec<f64>,
    /// The slot being filled: its number since the epoch, and the sum of one-second loads.
    filling: Option<(u64, f64)>,
}

impl Default for History {
    fn default() -> Self {
        Self { idle: vec![0; BINS], idle_longer: 0, last_busy: None, day: vec![-1.0; SLOTS], filling: None }
    }
}

impl History {
    /// Takes in a report: `load` in the metric's unit, from one agent, over about a second.
    pub fn record(&mut self, now: Time, load: f64) {
        if load > 0.0 {
            self.busy(now);
        }
        let slot = now.as_secs() / SLOT.as_secs();
        match &mut self.filling {
            Some((current, sum)) if *current == slot => *sum += load,
            Some((current, sum)) if *current < slot => {
                let mean = *sum / SLOT.as_secs_f64();
                let remembered = &mut self.day[(*current % SLOTS as u64) as usize];
                *remembered = if *remembered < 0.0 { mean } else { NEWEST * mean + (1.0 - NEWEST) * *remembered };
                self.filling = Some((slot, load));
            }
            // A report that is late by a slot changes nothing.
            Some(_) => {}
            None => self.filling = Some((slot, load)),
        }
    }

    fn busy(&mut self, now: Time) {
        let idle = self.last_busy.map(|last| now.saturating_sub(last));
        // Shorter pauses are what windows are for.
        if let Some(idle) = idle.filter(|idle| *idle >= BIN) {
            match self.idle.get_mut((idle.as_secs() / BIN.as_secs()) as usize) {
                Some(count) => *count += 1,
                None => self.idle_longer += 1,
            }
        }
        self.last_busy = Some(now.max(self.last_busy.unwrap_or_default()));
    }

    /// From when until when, after the last request, the next one is likely.
    fn return_window(&self) -> Option<(Duration, Duration)> {
        let within: u32 = self.idle.iter().sum();
        let all = within + self.idle_longer;
        if all < IDLE_TIMES_LEAST || f64::from(within) < WITHIN_LEAST * f64::from(all) {
            return None;
        }
        let percentile = |share: f64| {
            let rank = (f64::from(within) * share).ceil().max(1.0);
            let mut seen = 0.0;
            self.idle.iter().position(|count| {
                seen += f64::from(*count);
                seen >= rank
            })
        };
        let (head, tail) = (percentile(HEAD)?, percentile(TAIL)?);
        let head = (BIN * head as u32).mul_f64(1.0 - MARGIN);
        let tail = (BIN * (tail as u32 + 1)).mul_f64(1.0 + MARGIN);
        Some((head, tail))
    }

    /// Replicas to have at `now`, given that one takes `load_time` to be ready.
    pub fn wish(&self, config: &ScalerConfig, now: Time, load_time: Duration) -> u32 {
        let idle = self.last_busy.map(|last| now.saturating_sub(last));
        let returns =
            idle.zip(self.return_window()).is_some_and(|(idle, (head, tail))| idle + load_time >= head && idle <= tail);
        let day = [now, now + load_time]
            .map(|time| self.day[(time.as_secs() / SLOT.as_secs() % SLOTS as u64) as usize])
            .into_iter()
            .fold(0.0, f64::max);
        let by_day = Some(day / config.target).filter(|replicas| *replicas >= SLOT_LEAST);
        by_day.map_or(0, |replicas| replicas.ceil() as u32).max(u32::from(returns))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::autoscaler::Defaults;

    const LOAD: Duration = Duration::from_secs(60);

    fn at(minutes: u64) -> Time {
        Duration::from_secs(minutes * 60)
    }

    fn config() -> ScalerConfig {
        ScalerConfig::of_defaults(&Defaults::default())
    }

    #[test]
    fn a_service_that_returns_every_forty_minutes_is_met() {
        let mut history = History::default();
        for round in 0..10 {
            history.record(at(round * 40), 1.0);
        }
        let last = 9 * 40;
        assert_eq!(history.wish(&config(), at(last + 20), LOAD), 0, "too early");
        assert_eq!(history.wish(&config(), at(last + 36), LOAD), 1, "40 min less 10 %, and a minute to load");
        assert_eq!(history.wish(&config(), at(last + 44), LOAD), 1);
        assert_eq!(history.wish(&config(), at(last + 50), LOAD), 0, "it did not come");
    }

    #[test]
    fn too_little_or_too_wild_a_past_says_nothing() {
        let mut history = History::default();
        for round in 0..4 {
            history.record(at(round * 40), 1.0);
        }
        assert_eq!(history.wish(&config(), at(3 * 40 + 38), LOAD), 0);
        let mut history = History::default();
        for round in 0..20 {
            history.record(at(round * 600), 1.0);
        }
        assert_eq!(history.wish(&config(), at(19 * 600 + 600), LOAD), 0, "ten hours are past the histogram");
    }

    #[test]
    fn yesterdays_load_is_met_ahead() {
        let mut history = History::default();
        let nine = 9 * 3600;
        for second in nine..nine + 600 {
            history.record(Duration::from_secs(second), 300.0);
        }
        history.record(Duration::from_secs(nine + 3600), 0.0);
        let tomorrow = |seconds: u64| Duration::from_secs(86_400 + seconds);
        assert_eq!(history.wish(&config(), tomorrow(nine - 120), LOAD), 0);
        // 300 requests at 85 each (100 · 85 %).
        assert_eq!(history.wish(&config(), tomorrow(nine - 30), LOAD), 4);
        assert_eq!(history.wish(&config(), tomorrow(nine + 300), LOAD), 4);
        assert_eq!(history.wish(&config(), tomorrow(nine + 1200), LOAD), 0);
    }
}
