//! What is kept how warm, and what steps down when room is needed. Pure.
//!
//! A revision has a place on each node's ladder: [`Rung`]. A step down frees some of the node's GPU
//! memory, main memory or disk, and makes the next start from there slower by a time that is measured
//! ([`Costs`]). [`Arrivals`] says how probable it is that it is needed soon. [`victims`] chooses the steps
//! that lose least for the bytes they free: cost to re-warm × probability of need ÷ bytes.

mod cost;
mod need;
mod policy;
#[cfg(test)]
mod tests;

use std::ops::{Add, Sub};

use serde::{Deserialize, Serialize};

pub use cost::Costs;
pub use need::Arrivals;
pub use policy::{Policy, StepDown, Victims, victims};

/// A place on the ladder; the greater, the warmer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Rung {
    /// Nothing of it is on the node.
    Absent,
    /// Image and weights are on the node's disk.
    Cached,
    /// The weights are in the page cache too.
    Staged,
    /// The process lives, and takes no requests.
    Asleep,
    /// The model is in GPU memory and takes requests.
    Serving,
}

impl Rung {
    /// Coldest first.
    pub const ALL: [Self; 5] = [Self::Absent, Self::Cached, Self::Staged, Self::Asleep, Self::Serving];

    /// Colder ones, the nearest first.
    pub fn colder(self) -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().rev().filter(move |rung| *rung < self)
    }
}

/// Bytes of each of a node's resources: held, or allowed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bytes {
    /// GPU memory.
    pub gpu: u64,
    /// Main memory, page cache included.
    pub host: u64,
    /// Disk.
    pub disk: u64,
}

impl Bytes {
    /// What is past the budget, of each resource.
    pub fn past(self, budget: Self) -> Self {
        self - budget
    }

    /// True where nothing is past the budget.
    pub fn within(self, budget: Self) -> bool {
        self.past(budget) == Self::default()
    }
}

impl Add for Bytes {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            gpu: self.gpu.saturating_add(other.gpu),
            host: self.host.saturating_add(other.host),
            disk: self.disk.saturating_add(other.disk),
        }
    }
}

/// Never below zero.
impl Sub for Bytes {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        Self {
            gpu: self.gpu.saturating_sub(other.gpu),
            host: self.host.saturating_sub(other.host),
            disk: self.disk.saturating_sub(other.disk),
        }
    }
}

/// What a revision holds on each rung, bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Footprint {
    /// GPU memory while it serves; whole GPUs count whole.
    pub gpu: u64,
    /// Main memory of the process while it serves.
    pub serving_host: u64,
    /// Main memory of the process while it sleeps: vLLM's level 1 moves the weights there.
    pub asleep_host: u64,
    /// True where a sleeping process keeps its GPU memory, since it is only paused.
    pub asleep_keeps_gpu: bool,
    /// The weights.
    pub weights: u64,
    /// Image and weights on disk.
    pub disk: u64,
}

impl Footprint {
    /// What it holds on this rung.
    pub fn held(&self, rung: Rung) -> Bytes {
        let disk = self.disk;
        match rung {
            Rung::Absent => Bytes::default(),
            Rung::Cached => Bytes { disk, ..Bytes::default() },
            Rung::Staged => Bytes { gpu: 0, host: self.weights, disk },
            Rung::Asleep => {
                Bytes { gpu: if self.asleep_keeps_gpu { self.gpu } else { 0 }, host: self.asleep_host, disk }
            }
            Rung::Serving => Bytes { gpu: self.gpu, host: self.serving_host, disk },
        }
    }
}

/// One revision on one node.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// Unique on the node; settles ties.
    pub name: String,
    /// Where it is.
    pub rung: Rung,
    /// What it holds on each rung.
    pub footprint: Footprint,
    /// How long it takes from each rung until it serves.
    pub costs: Costs,
    /// Probability that it is needed soon, 0 to 1: [`Arrivals::need`].
    pub need: f64,
    /// When it was last asked for; only the order matters.
    pub last_used: std::time::Duration,
    /// How often it was asked for.
    pub uses: u64,
    /// Never put below this rung.
    pub pinned: Option<Rung>,
    /// True while it has requests, or is on its way up: it stays as it is.
    pub in_use: bool,
}

impl Entry {
    /// True where it may step down to this rung.
    fn may_go_to(&self, rung: Rung) -> bool {
        !self.in_use && rung < self.rung && self.pinned.is_none_or(|pinned| rung >= pinned)
    }
}

/// What all of them hold.
pub fn held(entries: &[Entry]) -> Bytes {
    entries.iter().fold(Bytes::default(), |sum, entry| sum + entry.footprint.held(entry.rung))
}
