//! Averages and maxima over the last seconds, in constant memory.

use std::{collections::VecDeque, time::Duration};

use serde::{Deserialize, Serialize};

use super::{Aggregation, Time};

/// Length of a bucket.
pub const BUCKET: Duration = Duration::from_secs(1);
/// Share of the whole weight that falls out of the window with exponential weights.
const UNCOVERED: f64 = 0.0001;
/// Smallest weight of the newest bucket with exponential weights.
const NEWEST_LEAST: f64 = 0.2;

/// Sums of one-second buckets over a window. Recording and the linear average are O(1), the weighted one
/// is O(window).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Window {
    /// Sum of bucket `i` at `i % len`.
    buckets: Vec<f64>,
    /// First and last bucket ever written since the last clearing.
    written: Option<(i64, i64)>,
    /// Of all buckets. Summed anew once per turn, so that rounding errors do not add up.
    sum: f64,
}

fn bucket(now: Time) -> i64 {
    now.as_secs() as i64
}

impl Window {
    /// A window of `ceil(length / 1 s)` buckets, at least one.
    pub fn new(length: Duration) -> Self {
        Self { buckets: vec![0.0; buckets_of(length)], written: None, sum: 0.0 }
    }

    fn len(&self) -> i64 {
        self.buckets.len() as i64
    }

    fn at(&mut self, bucket: i64) -> &mut f64 {
        let index = bucket.rem_euclid(self.len()) as usize;
        &mut self.buckets[index]
    }

    fn value(&self, bucket: i64) -> f64 {
        self.buckets[bucket.rem_euclid(self.len()) as usize]
    }

    /// Adds `value` to the bucket of `now`. A write that is a whole window late is dropped; a gap as
    /// long as the window clears it, a shorter one is zeros.
    pub fn record(&mut self, now: Time, value: f64) {
        let bucket = bucket(now);
        match self.written {
            Some((first, last)) if bucket <= last => {
                if last - bucket >= self.len() {
                    return;
                }
                self.written = Some((first.min(bucket), last));
                *self.at(bucket) += value;
                self.sum += value;
            }
            Some((first, last)) if bucket - last < self.len() => {
                for next in last + 1..=bucket {
                    self.turn_to(next);
                }
                *self.at(bucket) = value;
                self.sum += value;
                self.written = Some((first, bucket));
            }
            _ => {
                self.buckets.fill(0.0);
                *self.at(bucket) = value;
                self.sum = value;
                self.written = Some((bucket, bucket));
            }
        }
    }

    /// Empties the place of a new bucket.
    fn turn_to(&mut self, bucket: i64) {
        self.sum -= std::mem::take(self.at(bucket));
        if bucket.rem_euclid(self.len()) == 0 {
            self.sum = self.buckets.iter().sum();
        }
    }

    /// Seconds up to `now` in which nothing was written are zeros. What was written stays.
    pub fn pass(&mut self, now: Time) {
        if self.written.is_none_or(|(_, last)| bucket(now) > last) {
            self.record(now, 0.0);
        }
    }

    /// True where nothing was written within the last window.
    pub fn is_empty(&self, now: Time) -> bool {
        self.written.is_none_or(|(_, last)| bucket(now) - last >= self.len())
    }

    /// The average at `now`; 0 where the window is empty. A linear one is rounded to six decimals.
    pub fn average(&self, now: Time, aggregation: Aggregation) -> f64 {
        let Some((first, last)) = self.written.filter(|_| !self.is_empty(now)) else { return 0.0 };
        // Seconds without writes at the end are not zeros: they make the window shorter.
        let missing = (bucket(now) - last).max(0);
        let kept = self.len() - missing;
        match aggregation {
            Aggregation::Linear => {
                let valid = kept.min(last - first + 1);
                // Places of the ring that have aged out since the last write.
                let aged: f64 = (kept..self.len()).map(|age| self.value(last - age)).sum();
                let sum = self.sum - aged;
                (sum / valid as f64 * 1e6).round() / 1e6
            }
            Aggregation::WeightedExponential => {
                let newest = newest_weight(self.buckets.len());
                let weight = |age: i64| newest * (1.0 - newest).powi((age + missing) as i32);
                (0..kept).map(|age| self.value(last - age) * weight(age)).sum()
            }
        }
    }

    /// Keeps the newest buckets that fit into the new length.
    pub fn resize(&mut self, length: Duration) {
        let count = buckets_of(length);
        if count == self.buckets.len() {
            return;
        }
        let mut resized = Self { buckets: vec![0.0; count], written: None, sum: 0.0 };
        if let Some((first, last)) = self.written {
            let kept = self.len().min(count as i64);
            for bucket in last - kept + 1..=last {
                *resized.at(bucket) = self.value(bucket);
            }
            resized.written = Some((first.max(last - kept + 1), last));
            resized.sum = resized.buckets.iter().sum();
        }
        *self = resized;
    }
}

fn buckets_of(length: Duration) -> usize {
    (length.as_millis().div_ceil(BUCKET.as_millis()) as usize).max(1)
}

/// Weight of the newest bucket such that a full window covers 99.99 % of all weights.
fn newest_weight(buckets: usize) -> f64 {
    (1.0 - UNCOVERED.powf(1.0 / buckets as f64)).max(NEWEST_LEAST)
}

/// Length of the panic window: a percentage of the stable one, rounded half up to whole seconds, at
/// least one.
pub fn panic_window(stable: Duration, percentage: f64) -> Duration {
    let seconds = (stable.as_secs_f64() * percentage / 100.0).round();
    Duration::from_secs_f64(seconds.max(1.0))
}

/// The largest of the values recorded in the last `slots` slots. Constant memory: at most one per slot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MaxWindow {
    slots: i64,
    /// Slots and values, values falling.
    values: VecDeque<(i64, i32)>,
}

impl MaxWindow {
    /// A window of `slots` slots.
    pub fn new(slots: usize) -> Self {
        Self { slots: slots.max(1) as i64, values: VecDeque::new() }
    }

    /// The last value still held until `slot`; slots never go back.
    pub fn hold(&mut self, slot: i64) {
        if let Some((_, value)) = self.values.back().copied() {
            self.record(slot, value);
        }
    }

    /// Records a value.
    pub fn record(&mut self, slot: i64, value: i32) {
        while self.values.front().is_some_and(|(oldest, _)| slot - oldest >= self.slots) {
            self.values.pop_front();
        }
        while self.values.back().is_some_and(|(_, smaller)| *smaller <= value) {
            self.values.pop_back();
        }
        self.values.push_back((slot, value));
    }

    /// The largest value, 0 where there is none.
    pub fn current(&self) -> i32 {
        self.values.front().map_or(0, |(_, value)| *value)
    }
}
