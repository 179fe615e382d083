//! How long a revision takes from each rung until it serves.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{Footprint, Rung};

/// Weight of the newest measurement.
const NEWEST: f64 = 0.3;
/// A server's start, without reading weights.
const START: f64 = 20.0;
/// What a server's own wake takes, without moving weights.
const WAKE: f64 = 1.0;
/// Bytes per second, until measured: main memory to GPU, page cache to GPU through a server's loader, NVMe,
/// and a network of which others use a part.
const TO_GPU: f64 = 12e9;
const LOADER: f64 = 5e9;
const DISK: f64 = 1.5e9;
const NETWORK: f64 = 0.3e9;

/// Seconds until it serves, from each rung: measured, and until then estimated from its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Costs {
    /// From Absent, Cached, Staged, Asleep.
    prior: [f64; 4],
    measured: [Option<f64>; 4],
}

impl Costs {
    /// Estimates from bytes.
    pub fn estimated(footprint: &Footprint) -> Self {
        let (weights, disk) = (footprint.weights as f64, footprint.disk as f64);
        let cached = START + weights / DISK;
        let asleep = if footprint.asleep_keeps_gpu { WAKE } else { WAKE + weights / TO_GPU };
        Self { prior: [cached + disk / NETWORK, cached, START + weights / LOADER, asleep], measured: [None; 4] }
    }

    /// The same measurements, with estimates from these bytes for what was not measured yet.
    pub fn with_estimates(&self, footprint: &Footprint) -> Self {
        Self { prior: Self::estimated(footprint).prior, ..*self }
    }

    /// Takes in how long it took from this rung until it served; ignored for [`Rung::Serving`].
    pub fn measure(&mut self, from: Rung, took: Duration) {
        if let Some(measured) = self.measured.get_mut(from as usize) {
            let took = took.as_secs_f64();
            *measured = Some(measured.map_or(took, |mean| NEWEST * took + (1.0 - NEWEST) * mean));
        }
    }

    /// Seconds from this rung until it serves. Never less than from a warmer one.
    ///
    /// A rung that has not been measured yet is held for as much slower or faster than estimated as the
    /// measured ones are, on (geometric) average.
    pub fn seconds(&self, from: Rung) -> f64 {
        let scale = self.scale();
        (from as usize..self.prior.len())
            .map(|at| self.measured[at].unwrap_or(self.prior[at] * scale))
            .fold(0.0, f64::max)
    }

    /// Seconds that a later start loses by a step from one rung down to another.
    pub fn lost(&self, from: Rung, to: Rung) -> f64 {
        (self.seconds(to) - self.seconds(from)).max(0.0)
    }

    fn scale(&self) -> f64 {
        let ratios = self.measured.iter().zip(self.prior).filter_map(|(measured, prior)| Some((*measured)? / prior));
        let (sum, count) =
            ratios.filter(|ratio| *ratio > 0.0).fold((0.0, 0.0), |(sum, count), ratio| (sum + ratio.ln(), count + 1.0));
        if count == 0.0 { 1.0 } else { f64::exp(sum / count) }
    }
}
