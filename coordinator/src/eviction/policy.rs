//! Which entries step down, and how far, until a node is within its budget.

use std::{cmp::Reverse, collections::BinaryHeap};

use super::{Bytes, Entry, Rung, held};

/// How the entry to step down next is chosen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Policy {
    /// The least cost to re-warm × probability of need ÷ bytes that the step frees.
    #[default]
    CostAware,
    /// The one that nobody has asked for the longest time. For comparison.
    Lru,
    /// The one that was asked for the fewest times. For comparison.
    Lfu,
}

/// One entry's way down.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StepDown {
    /// The entry's name.
    pub name: String,
    /// Where it was.
    pub from: Rung,
    /// Where it goes.
    pub to: Rung,
}

/// What is to be done to a node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Victims {
    /// Who steps down, by name.
    pub steps: Vec<StepDown>,
    /// What is past the budget even then, since the rest is in use or pinned.
    pub past: Bytes,
}

/// A resource, for one at a time.
type Resource = fn(Bytes) -> u64;

/// GPU memory first: what steps down from there may go to main memory, and so on, never back.
const RESOURCES: [Resource; 3] = [|bytes| bytes.gpu, |bytes| bytes.host, |bytes| bytes.disk];

/// Steps taken so far.
struct Node<'a> {
    entries: Vec<&'a Entry>,
    rungs: Vec<Rung>,
    held: Bytes,
    /// Score, entry, and where it was before.
    taken: Vec<(u64, usize, Rung)>,
}

/// Chooses who steps down until the node holds no more than its budget. Deterministic, and independent of the entries' order; entries in use stay,
/// and none goes below its pin. Where the rest does not suffice, all that can go down has gone, and
/// [`Victims::past`] says what is still too much.
pub fn victims(entries: &[Entry], budget: Bytes, policy: Policy) -> Victims {
    let mut sorted: Vec<&Entry> = entries.iter().collect();
    sorted.sort_by(|a, b| a.name.cmp(&b.name));
    let rungs = sorted.iter().map(|entry| entry.rung).collect();
    let mut node = Node { entries: sorted, rungs, held: held(entries), taken: Vec::new() };
    for resource in RESOURCES {
        node.free(resource, budget, policy);
    }
    if policy == Policy::CostAware {
        node.take_back(budget);
    }
    let stepped = node.entries.iter().zip(&node.rungs).filter(|(entry, rung)| entry.rung != **rung);
    let steps = stepped.map(|(entry, rung)| StepDown { name: entry.name.clone(), from: entry.rung, to: *rung });
    Victims { steps: steps.collect(), past: node.held.past(budget) }
}

impl Node<'_> {
    fn free(&mut self, resource: Resource, budget: Bytes, policy: Policy) {
        if resource(self.held) <= resource(budget) {
            return;
        }
        let mut heap: BinaryHeap<_> =
            (0..self.entries.len()).filter_map(|at| self.candidate(at, resource, policy)).map(Reverse).collect();
        while resource(self.held) > resource(budget) {
            let Some(Reverse((score, at, to))) = heap.pop() else { return };
            self.taken.push((score, at, self.rungs[at]));
            self.move_to(at, to);
            heap.extend(self.candidate(at, resource, policy).map(Reverse));
        }
    }

    fn move_to(&mut self, at: usize, to: Rung) {
        let footprint = &self.entries[at].footprint;
        self.held = self.held - footprint.held(self.rungs[at]) + footprint.held(to);
        self.rungs[at] = to;
    }

    /// The entry's next step that frees some of the resource, if it may take one: score, entry, rung.
    fn candidate(&self, at: usize, resource: Resource, policy: Policy) -> Option<(u64, usize, Rung)> {
        let (entry, from) = (self.entries[at], self.rungs[at]);
        let bytes = |rung| resource(entry.footprint.held(rung));
        let mut open = from.colder().filter(|to| entry.may_go_to(*to) && bytes(*to) < bytes(from));
        match policy {
            // A small step may free next to nothing for what it costs: the rung that loses least per byte
            // is taken, as in the upper hull of a multiple-choice knapsack.
            Policy::CostAware => {
                let score = |to: Rung| {
                    let lost = entry.costs.lost(from, to) * entry.need.clamp(0.0, 1.0);
                    // The bits of positive numbers are in the numbers' order.
                    (lost / (bytes(from) - bytes(to)) as f64).max(0.0).to_bits()
                };
                open.map(|to| (score(to), Reverse(to))).min().map(|(score, Reverse(to))| (score, at, to))
            }
            Policy::Lru => {
                let used = u64::try_from(entry.last_used.as_nanos()).unwrap_or(u64::MAX);
                open.next().map(|to| (used, at, to))
            }
            Policy::Lfu => open.next().map(|to| (entry.uses, at, to)),
        }
    }

    /// The last step may free more than is needed: those worth most are not taken where there is room
    /// without them. Each round but the last makes one entry warmer, so there are few.
    fn take_back(&mut self, budget: Bytes) {
        let mut taken = std::mem::take(&mut self.taken);
        taken.sort_by_key(|(score, at, from)| (Reverse(*score), *at, Reverse(*from)));
        let mut changed = true;
        while std::mem::take(&mut changed) {
            for (_, at, from) in &taken {
                let (footprint, rung) = (&self.entries[*at].footprint, self.rungs[*at]);
                let back = self.held - footprint.held(rung) + footprint.held(*from);
                if rung < *from && back.past(budget).within(self.held.past(budget)) {
                    self.move_to(*at, *from);
                    changed = true;
                }
            }
        }
    }
}
