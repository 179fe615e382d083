//! Time-weighted means of a number that changes in steps, as Knative's queue-proxy computes them.

use tokio::time::Instant;

/// A number and its integral over time.
#[derive(Debug)]
pub struct Meter {
    value: u64,
    area: f64,
    changed: Instant,
    began: Instant,
}

impl Meter {
    /// Zero, from `now` on.
    pub fn new(now: Instant) -> Self {
        Self { value: 0, area: 0.0, changed: now, began: now }
    }

    /// The number now.
    pub fn value(&self) -> u64 {
        self.value
    }

    /// Sets the number.
    pub fn set(&mut self, value: u64, now: Instant) {
        self.area += self.value as f64 * now.duration_since(self.changed).as_secs_f64();
        self.changed = now;
        self.value = value;
    }

    /// The mean since the last call, and begins anew. The number itself where no time has passed.
    pub fn take(&mut self, now: Instant) -> f64 {
        self.set(self.value, now);
        let elapsed = now.duration_since(self.began).as_secs_f64();
        let mean = if elapsed > 0.0 { self.area / elapsed } else { self.value as f64 };
        self.area = 0.0;
        self.began = now;
        mean
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_mean_is_weighted_by_time() {
        let start = Instant::now();
        let at = |millis| start + Duration::from_millis(millis);
        let mut meter = Meter::new(start);
        meter.set(2, at(250));
        meter.set(1, at(500));
        assert!((meter.take(at(1000)) - 1.0).abs() < 1e-9, "0.25·0 + 0.25·2 + 0.5·1");
        assert!((meter.take(at(2000)) - 1.0).abs() < 1e-9, "goes on with what was there");
        meter.set(0, at(2000));
        assert!(meter.take(at(3000)).abs() < 1e-9);
    }
}
