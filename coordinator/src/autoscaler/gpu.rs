//! What the class for GPU fleets knows beyond Knative's: offered load.
//!
//! Knative's autoscaler counts every request in the system. While a model loads for a minute the queue
//! grows for a minute, and with it the wish, although the replicas that load were ordered for that very
//! load. Here a request that waits counts for no longer than it would run: the load is bounded by what is
//! *offered*, arrivals per second times seconds of service (Little's law, L = λ·W), plus what it takes to
//! work off the queue in the time that a replica takes to load: what is ordered for it comes no earlier.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{Aggregation, Sample, ScalerConfig, Time, window::Window};

/// Arrivals, completions, and what they say of the load. Constant memory.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Offered {
    arrivals: (Window, Window),
    running: (Window, Window),
    waiting: Window,
    completions: Window,
    /// Seconds that a request runs: running over completed per second, from the stable window. What was
    /// seen last holds where nothing has completed since; `None` where nothing ever has.
    service_time: Option<f64>,
}

impl Offered {
    /// Nothing seen yet.
    pub fn new(config: &ScalerConfig) -> Self {
        let pair = || (Window::new(config.stable_window), Window::new(config.panic_window));
        Self {
            arrivals: pair(),
            running: pair(),
            waiting: Window::new(config.panic_window),
            completions: Window::new(config.stable_window),
            service_time: None,
        }
    }

    /// Takes other windows; what was recorded stays as far as it fits.
    pub fn resize(&mut self, config: &ScalerConfig) {
        for (stable, panic) in [&mut self.arrivals, &mut self.running] {
            stable.resize(config.stable_window);
            panic.resize(config.panic_window);
        }
        self.waiting.resize(config.panic_window);
        self.completions.resize(config.stable_window);
    }

    /// Takes in a report.
    pub fn record(&mut self, now: Time, sample: &Sample) {
        let running = (sample.average_concurrency - sample.average_waiting - sample.draining_concurrency).max(0.0);
        self.arrivals.0.record(now, sample.request_rate);
        self.arrivals.1.record(now, sample.request_rate);
        self.running.0.record(now, running);
        self.running.1.record(now, running);
        self.waiting.record(now, sample.average_waiting);
        self.completions.record(now, sample.completion_rate);
    }

    /// Seconds up to `now` without a report had neither arrivals nor load.
    pub fn pass(&mut self, now: Time) {
        let pairs = [&mut self.arrivals, &mut self.running].into_iter().flat_map(|(stable, panic)| [stable, panic]);
        for window in pairs.chain([&mut self.waiting, &mut self.completions]) {
            window.pass(now);
        }
    }

    /// The load over the stable and the panic window, bounded by what is offered. `load_time` is how long a
    /// replica takes to load, zero where unknown.
    pub fn bound(
        &mut self,
        config: &ScalerConfig,
        now: Time,
        (stable, panic): (f64, f64),
        load_time: Duration,
    ) -> (f64, f64) {
        let average = |window: &Window| window.average(now, Aggregation::Linear);
        let completed = average(&self.completions);
        if completed > 0.0 {
            self.service_time = Some(average(&self.running.0) / completed);
        }
        // Before anything has completed: what has come within a panic window counts in full.
        let service_time = self.service_time.unwrap_or(config.panic_window.as_secs_f64());
        let known = self.service_time.is_some() && !load_time.is_zero();
        let work_off = if known { load_time.max(config.panic_window) } else { config.stable_window };
        let backlog = average(&self.waiting) * service_time / seconds(work_off);
        let offered =
            |arrivals: &Window, running: &Window| (average(arrivals) * service_time).max(average(running)) + backlog;
        let (stable_offered, panic_offered) =
            (offered(&self.arrivals.0, &self.running.0), offered(&self.arrivals.1, &self.running.1));
        (stable.min(stable_offered), panic.min(panic_offered))
    }
}

fn seconds(window: Duration) -> f64 {
    window.as_secs_f64().max(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::autoscaler::Defaults;

    fn config() -> ScalerConfig {
        ScalerConfig::of_defaults(&Defaults::default())
    }

    /// `rate` requests per second that would run for one second, while nothing is ready.
    fn queue_up(offered: &mut Offered, from: u64, seconds: u64, rate: f64) -> f64 {
        let mut waiting = 0.0;
        for second in from..from + seconds {
            let sample = Sample {
                average_concurrency: waiting + rate / 2.0,
                average_waiting: waiting + rate / 2.0,
                request_rate: rate,
                ..Default::default()
            };
            offered.record(Duration::from_secs(second), &sample);
            waiting += rate;
        }
        waiting
    }

    #[test]
    fn a_queue_that_only_waits_for_a_load_counts_once() {
        let config = config();
        let mut offered = Offered::new(&config);
        // It has run before: two requests per second, each for one second.
        for second in 0..200 {
            let sample =
                Sample { average_concurrency: 2.0, request_rate: 2.0, completion_rate: 2.0, ..Default::default() };
            offered.record(Duration::from_secs(second), &sample);
        }
        let (stable, panic) = offered.bound(&config, Duration::from_secs(199), (2.0, 2.0), Duration::ZERO);
        assert!((stable - 2.0).abs() < 1e-9 && (panic - 2.0).abs() < 1e-9, "no bound where all runs");
        assert_eq!(offered.service_time, Some(1.0));
        let waiting = queue_up(&mut offered, 1000, 60, 2.0);
        let (_, panic) = offered.bound(&config, Duration::from_secs(1059), (60.0, 97.0), Duration::ZERO);
        assert!(waiting == 120.0 && panic < 3.0, "two at a time, and a share of the backlog: {panic}");
    }

    #[test]
    fn before_anything_has_completed_a_panic_window_of_arrivals_counts() {
        let config = config();
        let mut offered = Offered::new(&config);
        queue_up(&mut offered, 0, 60, 2.0);
        let (_, panic) = offered.bound(&config, Duration::from_secs(59), (60.0, 97.0), Duration::ZERO);
        // 2 per second · 23 s, and 97 waiting · 23 s / 180 s.
        assert!((panic - (46.0 + 97.0 * 23.0 / 180.0)).abs() < 0.2, "{panic}");
    }

    #[test]
    fn long_requests_that_run_count_in_full() {
        let config = config();
        let mut offered = Offered::new(&config);
        for second in 0..100 {
            offered.record(Duration::from_secs(second), &Sample { average_concurrency: 30.0, ..Default::default() });
        }
        assert_eq!(offered.bound(&config, Duration::from_secs(99), (30.0, 30.0), Duration::ZERO), (30.0, 30.0));
    }
}
