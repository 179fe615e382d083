//! What the past says of the next minutes: replicas to have ready before anybody asks.
//!
//! Two rules, each of which can only raise the wish:
//! - *Return after idleness*: idle times go into a histogram, and a replica is ready for the time in which
//!   most of them ended (the hybrid histogram policy of Shahrad et al., "Serverless in the Wild", USENIX
//!   ATC 2020, section 4.2: pre-warm at the 5th percentile, keep until the 99th, 10 % margin each).
//! - *Time of day*: the load of each five minutes of the day is remembered, averaged over days with the
//!   newest counting most, and looked up as far ahead as a replica takes to load.
//! - *Recent peaks*: while a service is busy, replicas for the load that most of the last hour's five
//!   minutes have reached stay ready, since a burst of that size is to be expected before a replica
//!   that is ordered for it has loaded.

use std::{collections::VecDeque, time::Duration};

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

/// Slots whose peaks are remembered: an hour.
const PEAKS: usize = 12;
/// Slots needed before they say anything.
const PEAKS_LEAST: usize = 3;
/// Part of the slots whose peak is met.
const PEAKS_MET: f64 = 0.75;

/// One revision's past. Constant memory, about 4 KiB.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct History {
    idle: Vec<u32>,
    idle_longer: u32,
    last_busy: Option<Time>,
    /// Mean load by slot of the day; negative where that slot has not been seen yet.
    day: Vec<f64>,
    /// Largest load of each of the last slots, oldest first.
    peaks: VecDeque<f64>,
    filling: Option<Filling>,
}

/// The slot that is being seen.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
struct Filling {
    /// Number since the epoch.
    slot: u64,
    sum: f64,
    count: u32,
    peak: f64,
}

impl Default for History {
    fn default() -> Self {
        Self {
            idle: vec![0; BINS],
            idle_longer: 0,
            last_busy: None,
            day: vec![-1.0; SLOTS],
            peaks: VecDeque::with_capacity(PEAKS),
            filling: None,
        }
    }
}

impl History {
    /// Takes in the load at a decision, averaged over a panic window.
    pub fn observe(&mut self, now: Time, load: f64) {
        let slot = now.as_secs() / SLOT.as_secs();
        match &mut self.filling {
            Some(filling) if filling.slot >= slot => {
                filling.sum += load;
                filling.count += 1;
                filling.peak = filling.peak.max(load);
            }
            filling => {
                let full = filling.replace(Filling { slot, sum: load, count: 1, peak: load });
                if let Some(full) = full {
                    self.remember(full, slot);
                }
            }
        }
    }

    fn remember(&mut self, full: Filling, next: u64) {
        let mean = full.sum / f64::from(full.count);
        let day = &mut self.day[(full.slot % SLOTS as u64) as usize];
        *day = if *day < 0.0 { mean } else { NEWEST * mean + (1.0 - NEWEST) * *day };
        // Slots in which nothing was decided had no load.
        let silent = (next - full.slot - 1).min(PEAKS as u64) as usize;
        self.peaks.extend(std::iter::once(full.peak).chain(std::iter::repeat_n(0.0, silent)));
        self.peaks.drain(..self.peaks.len().saturating_sub(PEAKS));
    }

    /// Somebody asks.
    pub fn busy(&mut self, now: Time) {
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
        let Some(idle) = self.last_busy.map(|last| now.saturating_sub(last)) else { return 0 };
        let returns = self.return_window().is_some_and(|(head, tail)| idle + load_time >= head && idle <= tail);
        let load = self.by_time_of_day(config, now, load_time).max(self.recent_peak(config, idle));
        ((load / config.target).ceil() as u32).max(u32::from(returns))
    }

    fn by_time_of_day(&self, config: &ScalerConfig, now: Time, load_time: Duration) -> f64 {
        let at = |time: Time| self.day[(time.as_secs() / SLOT.as_secs() % SLOTS as u64) as usize];
        let load = at(now).max(at(now + load_time));
        if load / config.target >= SLOT_LEAST { load } else { 0.0 }
    }

    fn recent_peak(&self, config: &ScalerConfig, idle: Duration) -> f64 {
        if self.peaks.len() < PEAKS_LEAST || idle > config.stable_window {
            return 0.0;
        }
        let mut peaks: Vec<f64> = self.peaks.iter().copied().collect();
        peaks.sort_by(f64::total_cmp);
        peaks[(PEAKS_MET * peaks.len() as f64).ceil() as usize - 1]
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
            history.busy(at(round * 40));
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
            history.busy(at(round * 40));
        }
        assert_eq!(history.wish(&config(), at(3 * 40 + 38), LOAD), 0);
        let mut history = History::default();
        for round in 0..20 {
            history.busy(at(round * 600));
        }
        assert_eq!(history.wish(&config(), at(19 * 600 + 600), LOAD), 0, "ten hours are past the histogram");
    }

    #[test]
    fn yesterdays_load_is_met_ahead() {
        let mut history = History::default();
        let nine = 9 * 3600;
        history.busy(Duration::from_secs(nine));
        for second in nine..nine + 600 {
            history.observe(Duration::from_secs(second), 300.0);
        }
        history.observe(Duration::from_secs(nine + 3600), 0.0);
        let tomorrow = |seconds: u64| Duration::from_secs(86_400 + seconds);
        assert_eq!(history.wish(&config(), tomorrow(nine - 120), LOAD), 0);
        // 300 requests at 85 each (100 · 85 %).
        assert_eq!(history.wish(&config(), tomorrow(nine - 30), LOAD), 4);
        assert_eq!(history.wish(&config(), tomorrow(nine + 300), LOAD), 4);
        assert_eq!(history.wish(&config(), tomorrow(nine + 1200), LOAD), 0);
    }

    #[test]
    fn what_most_of_the_last_hour_reached_stays_ready_while_somebody_asks() {
        let mut history = History::default();
        for minute in 0..60u64 {
            // Every five minutes a burst; one of them is far larger than the others.
            let burst = if minute == 25 { 5_000.0 } else { 150.0 };
            history.busy(at(minute));
            history.observe(at(minute), if minute % 5 == 0 { burst } else { 10.0 });
        }
        // 150 requests at 85 each.
        assert_eq!(history.wish(&config(), at(60), LOAD), 2);
        assert_eq!(history.wish(&config(), at(64), LOAD), 0, "idle for longer than a stable window");
    }
}
