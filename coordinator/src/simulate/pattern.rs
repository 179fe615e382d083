//! Traces that are made: arrivals as a Poisson process whose rate follows a shape.

use std::{f64::consts::TAU, time::Duration};

use jiff::Timestamp;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use rand_distr::{Distribution as _, Exp};

use super::trace::{Request, Trace, Work};

/// How the rate goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// Low, high, low again: a third of the time each.
    Step,
    /// Low, with one minute of the peak rate in the middle.
    Spike,
    /// Two full waves between nothing and the peak.
    Sine,
}

/// A shape with numbers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pattern {
    /// The shape.
    pub shape: Shape,
    /// Requests per second at the peak.
    pub peak: f64,
    /// Length of the whole.
    pub length: Duration,
    /// Chooses the arrivals; the same seed gives the same trace.
    pub seed: u64,
}

/// The low rate, as a part of the peak.
const LOW: f64 = 0.1;
/// Length of a spike.
const SPIKE: f64 = 60.0;

impl Pattern {
    /// Requests per second, `seconds` after the beginning.
    fn rate(&self, seconds: f64) -> f64 {
        let length = self.length.as_secs_f64();
        let high = match self.shape {
            Shape::Step => seconds >= length / 3.0 && seconds < 2.0 * length / 3.0,
            Shape::Spike => (seconds - length / 2.0).abs() < SPIKE / 2.0,
            Shape::Sine => return self.peak * (1.0 - (TAU * 2.0 * seconds / length).cos()) / 2.0,
        };
        if high { self.peak } else { LOW * self.peak }
    }

    /// The requests. Each runs for the profile's request time.
    pub fn trace(&self) -> Trace {
        let mut random = StdRng::seed_from_u64(self.seed);
        let length = self.length.as_secs_f64();
        let mut requests = Vec::new();
        // Thinning (Lewis and Shedler, 1979): arrivals at the peak rate, each kept by the rate of its time.
        let Ok(gaps) = Exp::new(self.peak) else {
            return Trace { epoch: Timestamp::UNIX_EPOCH, services: vec![String::new()], requests };
        };
        let mut seconds = 0.0;
        loop {
            seconds += gaps.sample(&mut random);
            if seconds >= length {
                break;
            }
            if random.random::<f64>() < self.rate(seconds) / self.peak {
                requests.push(Request { at: Duration::from_secs_f64(seconds), service: 0, work: Work::Unknown });
            }
        }
        Trace { epoch: Timestamp::UNIX_EPOCH, services: vec![String::new()], requests }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_follow_the_shape_and_seeds_repeat() {
        let pattern = Pattern { shape: Shape::Step, peak: 30.0, length: Duration::from_secs(900), seed: 7 };
        let trace = pattern.trace();
        let count = |from: u64, to: u64| {
            let within = |request: &&Request| (from..to).contains(&request.at.as_secs());
            trace.requests.iter().filter(within).count() as f64
        };
        assert!((count(300, 600) / 300.0 - 30.0).abs() < 2.0, "high: {}", count(300, 600));
        assert!((count(0, 300) / 300.0 - 3.0).abs() < 0.7, "low: {}", count(0, 300));
        assert_eq!(trace, pattern.trace());
        assert_ne!(trace, Pattern { seed: 8, ..pattern }.trace());
    }
}
