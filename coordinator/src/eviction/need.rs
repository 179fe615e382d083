//! How probable it is that a revision is asked for soon.
//!
//! Arrivals are seen as a self-exciting point process (A. G. Hawkes, "Spectra of some self-exciting and
//! mutually exciting point processes", Biometrika 58, 1971): a steady rate μ, and after each arrival at tᵢ
//! for some time τ a raised one, since where one request came, others of the same user or job follow:
//!
//! λ(t) = μ + n/τ · Σ exp(−(t − tᵢ)/τ)
//!
//! The probability of at least one arrival within a horizon h, offspring of offspring left out, is
//! 1 − exp(−Λ) with Λ = μ·h + n·S·(1 − exp(−h/τ)) and S = Σ exp(−(t − tᵢ)/τ).
//! With n = 0 this is the Poisson process' 1 − exp(−λ·h). μ is (1 − n) times the long-run rate, an
//! exponentially decayed count over the decayed time seen. Which n and τ fit is found from the arrivals
//! themselves: a few candidates, each weighted by its likelihood (Y. Ogata, "The asymptotic behaviour of
//! maximum likelihood estimators for stationary point processes", 1978: ℓ = Σ ln λ(tᵢ) − ∫λ), old
//! evidence counting less and less. All sums are recursive: constant memory, constant time per arrival.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::autoscaler::Time;

/// Memory of the long-run rate, seconds.
const LONG: f64 = 24.0 * 3600.0;
/// What is believed before anything was seen: this many arrivals, in this time (seconds).
const PRIOR: (f64, f64) = (0.5, 3600.0);
/// How long one arrival makes others more likely, seconds.
const TAUS: [f64; 2] = [60.0, 600.0];
/// Candidates: which τ, and how many others one arrival brings on average.
const CANDIDATES: [(usize, f64); 7] = [(0, 0.0), (0, 0.3), (0, 0.6), (0, 0.9), (1, 0.3), (1, 0.6), (1, 0.9)];
/// What remains of older evidence at each arrival.
const EVIDENCE: f64 = 0.99;

/// A revision's arrivals, as far as they say something of the next one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Arrivals {
    since: Time,
    last: Option<Time>,
    count: u64,
    /// Decayed count at the last arrival, with [`LONG`].
    long: f64,
    /// Decayed counts at the last arrival, with each of [`TAUS`].
    recent: [f64; 2],
    /// Log-likelihood of each candidate, decayed.
    likelihood: [f64; 7],
}

impl Arrivals {
    /// Of a revision that is known since this moment.
    pub fn since(now: Time) -> Self {
        Self { since: now, last: None, count: 0, long: 0.0, recent: [0.0; 2], likelihood: [0.0; 7] }
    }

    /// When it was last asked for.
    pub fn last(&self) -> Option<Time> {
        self.last
    }

    /// How often it was asked for.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Somebody asks. Moments before the last one count as that one.
    pub fn observe(&mut self, now: Time) {
        let now = self.last.map_or(now, |last| now.max(last)).max(self.since);
        let gap = self.last.map_or_else(|| (now - self.since).as_secs_f64(), |last| (now - last).as_secs_f64());
        let rate = self.long_run(now);
        for ((tau, brings), likelihood) in CANDIDATES.iter().zip(&mut self.likelihood) {
            let (recent, tau) = (self.recent[*tau], TAUS[*tau]);
            let decay = (-gap / tau).exp();
            let steady = (1.0 - brings) * rate;
            let intensity = steady + brings / tau * recent * decay;
            let expected = steady * gap + brings * recent * (1.0 - decay);
            *likelihood = EVIDENCE * *likelihood + intensity.max(f64::MIN_POSITIVE).ln() - expected;
        }
        self.long = self.long * (-gap / LONG).exp() + 1.0;
        for (recent, tau) in self.recent.iter_mut().zip(TAUS) {
            *recent = *recent * (-gap / tau).exp() + 1.0;
        }
        self.count += 1;
        self.last = Some(now);
    }

    /// Arrivals per second in the long run.
    pub fn long_run(&self, now: Time) -> f64 {
        let gap = self.last.map_or(0.0, |last| now.saturating_sub(last).as_secs_f64());
        let seen = now.saturating_sub(self.since).as_secs_f64();
        let (count, time) = PRIOR;
        (count + self.long * (-gap / LONG).exp()) / (time + LONG * (1.0 - (-seen / LONG).exp()))
    }

    /// Arrivals to expect within the horizon, first generation.
    pub fn expected(&self, now: Time, horizon: Duration) -> f64 {
        self.weighted(now, horizon, |expected| expected)
    }

    /// Probability of at least one arrival within the horizon, 0 to 1.
    pub fn need(&self, now: Time, horizon: Duration) -> f64 {
        self.weighted(now, horizon, |expected| -(-expected).exp_m1())
    }

    /// Over the candidates, each by its likelihood.
    fn weighted(&self, now: Time, horizon: Duration, value: impl Fn(f64) -> f64) -> f64 {
        let gap = self.last.map_or(0.0, |last| now.saturating_sub(last).as_secs_f64());
        let (rate, horizon) = (self.long_run(now), horizon.as_secs_f64());
        let silence = |(tau, brings): (usize, f64)| {
            let tau_seconds = TAUS[tau];
            (1.0 - brings) * rate * gap + brings * self.recent[tau] * (1.0 - (-gap / tau_seconds).exp())
        };
        // That nobody came since the last arrival is evidence too.
        let evidence = |at: usize| self.likelihood[at] - silence(CANDIDATES[at]);
        let best = (0..CANDIDATES.len()).map(evidence).fold(f64::NEG_INFINITY, f64::max);
        let (mut sum, mut weights) = (0.0, 0.0);
        for (at, (tau, brings)) in CANDIDATES.into_iter().enumerate() {
            let weight = (evidence(at) - best).exp();
            let recent = self.recent[tau] * (-gap / TAUS[tau]).exp();
            let expected = (1.0 - brings) * rate * horizon + brings * recent * (1.0 - (-horizon / TAUS[tau]).exp());
            sum += weight * value(expected);
            weights += weight;
        }
        sum / weights
    }
}
