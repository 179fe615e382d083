//! Made-up models and requests: popularity after Zipf, sizes after what is deployed, arrivals in bursts.

use std::time::Duration;

use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use rand_distr::{Distribution as _, Exp, LogNormal};

use super::{GIB, GPU};
use crate::{
    autoscaler::Time,
    eviction::{Footprint, Rung},
};

/// Sizes of models, GiB of weights, and how many of 100 are of that size: from small classifiers over
/// 8 and 14 billion parameters in 16 bits to 70 billion.
const SIZES: [(u64, u32); 6] = [(2, 25), (6, 20), (16, 30), (28, 13), (65, 7), (140, 5)];
/// An image and what else lies on disk beside the weights.
const IMAGE: u64 = 8 * GIB;

/// How the requests come.
#[derive(Debug, Clone, PartialEq)]
pub struct Load {
    /// Models.
    pub models: usize,
    /// The exponent: the k-th model has 1/k^zipf of the first one's requests.
    pub zipf: f64,
    /// Requests per second, all models together.
    pub rate: f64,
    /// Part of a model's requests that come in bursts, the others come as a Poisson process.
    pub burst_share: f64,
    /// Mean number of requests of a burst.
    pub burst_size: f64,
    /// Mean pause between requests of a burst.
    pub burst_gap: Duration,
    /// Mean time that a request runs.
    pub request_time: Duration,
    /// Length of the whole.
    pub length: Duration,
    /// Chooses all that is random; the same seed gives the same load.
    pub seed: u64,
}

impl Default for Load {
    fn default() -> Self {
        Self {
            models: 120,
            zipf: 0.9,
            rate: 0.2,
            burst_share: 0.7,
            burst_size: 8.0,
            burst_gap: Duration::from_secs(90),
            request_time: Duration::from_secs(8),
            length: Duration::from_secs(24 * 3600),
            seed: 1,
        }
    }
}

/// One model.
#[derive(Debug, Clone, PartialEq)]
pub struct Model {
    /// Its name.
    pub name: String,
    /// What it holds on each rung.
    pub footprint: Footprint,
    /// What a start from each rung takes: from Absent, Cached, Staged, Asleep; the deciders learn it only
    /// by measuring.
    pub takes: [Duration; 4],
}

impl Model {
    /// What a start from this rung takes.
    pub fn takes(&self, from: Rung) -> Duration {
        self.takes.get(from as usize).copied().unwrap_or_default()
    }
}

/// One request.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Arrival {
    /// When.
    pub at: Time,
    /// Index of its model.
    pub model: usize,
    /// How long it runs.
    pub runs: Duration,
}

impl Load {
    /// Bytes of the largest model on disk.
    pub(super) fn largest(&self) -> u64 {
        SIZES.iter().map(|(gib, _)| gib * GIB + IMAGE).max().unwrap_or(0)
    }

    /// The models, and the requests in order of arrival.
    pub fn trace(&self) -> (Vec<Model>, Vec<Arrival>) {
        let mut random = StdRng::seed_from_u64(self.seed);
        let models: Vec<_> = (0..self.models).map(|at| model(at, &mut random)).collect();
        let weight = |at: usize| 1.0 / ((at + 1) as f64).powf(self.zipf);
        let sum: f64 = (0..self.models).map(weight).sum();
        let mut arrivals = Vec::new();
        for at in 0..self.models {
            self.arrive(at, self.rate * weight(at) / sum, &mut random, &mut arrivals);
        }
        arrivals.sort_by_key(|arrival| (arrival.at, arrival.model));
        (models, arrivals)
    }

    /// One model's requests: a steady part, and bursts whose starts are a Poisson process.
    fn arrive(&self, model: usize, rate: f64, random: &mut StdRng, arrivals: &mut Vec<Arrival>) {
        let runs = |random: &mut StdRng| exponential(self.request_time.as_secs_f64(), random);
        let length = self.length.as_secs_f64();
        let mut push = |at: f64, random: &mut StdRng| {
            if at < length {
                let runs = Duration::from_secs_f64(runs(random).clamp(0.1, 600.0));
                arrivals.push(Arrival { at: Duration::from_secs_f64(at), model, runs });
            }
        };
        let steady = rate * (1.0 - self.burst_share);
        let mut at = 0.0;
        while steady > 0.0 && at < length {
            at += exponential(1.0 / steady, random);
            push(at, random);
        }
        let bursts = rate * self.burst_share / self.burst_size.max(1.0);
        let mut start = 0.0;
        while bursts > 0.0 && start < length {
            start += exponential(1.0 / bursts, random);
            let mut at = start;
            push(at, random);
            // Geometric, so that the mean is as asked for.
            while random.random::<f64>() > 1.0 / self.burst_size.max(1.0) {
                at += exponential(self.burst_gap.as_secs_f64(), random);
                push(at, random);
            }
        }
    }
}

fn exponential(mean: f64, random: &mut StdRng) -> f64 {
    Exp::new(1.0 / mean).map_or(mean, |exponential| exponential.sample(random))
}

/// Size and popularity are independent of each other, as are size and the speed of the server's start.
fn model(at: usize, random: &mut StdRng) -> Model {
    let mut left = random.random_range(0..SIZES.iter().map(|(_, share)| share).sum());
    let mut gib = SIZES[0].0;
    for (size, share) in SIZES {
        gib = size;
        if left < share {
            break;
        }
        left -= share;
    }
    let weights = gib * GIB;
    // A GPU's memory is for the cache of keys and values too.
    let gpus = [1, 2, 4].into_iter().find(|gpus| weights * 5 / 4 <= gpus * GPU).unwrap_or(4);
    let footprint = Footprint {
        gpu: gpus * GPU,
        serving_host: 0,
        asleep_host: weights + 2 * GIB,
        asleep_keeps_gpu: false,
        weights,
        disk: weights + IMAGE,
    };
    let spread = LogNormal::new(0.0, 0.6);
    let mut varied = |seconds: f64| spread.map_or(seconds, |spread| seconds * spread.sample(random));
    let (bytes, disk) = (weights as f64, footprint.disk as f64);
    // Engine start and compilation differ much from model to model.
    let start = varied(25.0);
    let asleep = varied(0.8) + bytes / 15e9;
    let staged = asleep + start + bytes / 6e9;
    let cached = staged + bytes / varied(1.8e9);
    let absent = cached + disk / varied(0.4e9);
    let takes = [absent, cached, staged, asleep].map(Duration::from_secs_f64);
    Model { name: format!("m{at:04}"), footprint, takes }
}
