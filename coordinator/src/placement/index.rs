//! Nodes in groups that cannot differ for a request, so that a pass looks at groups, not at nodes.
//!
//! A request looks at some labels of a node ([`affinity::keys`]). For each such set of labels the nodes
//! are divided once into classes of equal values, and each class into buckets of equal free GPUs
//! ([`Signature`]). What a bucket's nodes give is the same, and so is their score, except where a replica
//! of the same revision or the model is there already, and where the request avoids the node: those few nodes are
//! looked at one by one.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    FleetView, PlacementRequest, Unplaced,
    affinity::{self, Key},
    filters,
    grant::{self, Grant},
    ledger::{Ledger, Signature},
    score::{Candidate, Score},
};
use crate::spec::PlacementPolicy;

/// By how much less a node is preferred that a request avoids: more than all weights of preferred terms together, of
/// which each is at most 100.
const AVOIDED: i64 = 1 << 32;

/// The fleet while requests are placed. Nodes are called by their place in the order of names.
#[derive(Debug)]
pub(super) struct Index<'a> {
    policy: PlacementPolicy,
    ledgers: Vec<Ledger<'a>>,
    /// Numbers of the signatures seen so far.
    signatures: BTreeMap<Signature<'a>, usize>,
    /// For each node, its signature's number.
    signature_of: Vec<usize>,
    partitions: BTreeMap<Vec<Key<'a>>, Partition>,
    /// For each revision, the nodes that have replicas of it.
    hosts: BTreeMap<&'a str, BTreeSet<usize>>,
    /// For each model, the nodes that have it cached.
    caches: BTreeMap<&'a str, BTreeSet<usize>>,
}

/// All nodes, by the labels of one set of keys.
#[derive(Debug)]
struct Partition {
    classes: Vec<Class>,
    /// For each node, its class.
    class_of: Vec<usize>,
}

/// Nodes that are equal to [`filters::admits`].
#[derive(Debug, Default)]
struct Class {
    size: usize,
    /// By signature; none is empty.
    buckets: BTreeMap<usize, BTreeSet<usize>>,
}

impl<'a> Index<'a> {
    pub(super) fn of(fleet: &'a FleetView) -> Self {
        let mut ledgers: Vec<_> = fleet.nodes.iter().map(Ledger::of).collect();
        ledgers.sort_by(|a, b| a.node.name.cmp(&b.node.name));
        let mut index = Self {
            policy: fleet.policy,
            ledgers: Vec::new(),
            signatures: BTreeMap::new(),
            signature_of: Vec::new(),
            partitions: BTreeMap::new(),
            hosts: BTreeMap::new(),
            caches: BTreeMap::new(),
        };
        for (at, ledger) in ledgers.iter().enumerate() {
            let signature = index.number(ledger.signature());
            index.signature_of.push(signature);
            for revision in ledger.revisions() {
                index.hosts.entry(revision).or_default().insert(at);
            }
            for model in &ledger.node.cached {
                index.caches.entry(model).or_default().insert(at);
            }
        }
        index.ledgers = ledgers;
        index
    }

    fn number(&mut self, signature: Signature<'a>) -> usize {
        let next = self.signatures.len();
        *self.signatures.entry(signature).or_insert(next)
    }

    pub(super) fn name(&self, node: usize) -> &str {
        &self.ledgers[node].node.name
    }

    /// The best node and what it gives, or why there is none.
    pub(super) fn choose(&mut self, request: &'a PlacementRequest) -> Result<(usize, Grant), Unplaced> {
        let keys = affinity::keys(request);
        if !self.partitions.contains_key(&keys) {
            let partition = self.divide(&keys);
            self.partitions.insert(keys.clone(), partition);
        }
        let partition = &self.partitions[&keys];
        let avoided = self.numbers(&request.avoid);
        let own: Vec<&BTreeSet<usize>> = self.own(request).chain([&avoided]).collect();
        let policy = request.policy.unwrap_or(self.policy);
        let mut unplaced = Unplaced { nodes: self.ledgers.len(), ..Unplaced::default() };
        let mut best: Option<(Score, usize)> = None;
        let mut consider = |node: usize, grant: &Grant, preference: i64| {
            let candidate = Candidate { ledger: &self.ledgers[node], grant, preference, order: node };
            let score = Score::of(&candidate, request, policy);
            if best.as_ref().is_none_or(|(best, _)| score < *best) {
                best = Some((score, node));
            }
        };
        let mut preferences = vec![None; partition.classes.len()];
        for (class, preference) in partition.classes.iter().zip(&mut preferences) {
            let Some(first) = class.buckets.values().find_map(BTreeSet::first) else { continue };
            match filters::admits(self.ledgers[*first].node, request) {
                Ok(sum) => *preference = Some(sum),
                Err(misfit) => {
                    *unplaced.misfits.entry(misfit).or_default() += class.size;
                    continue;
                }
            }
            for bucket in class.buckets.values() {
                let Some(first) = bucket.first() else { continue };
                match grant::of(&self.ledgers[*first], request) {
                    Err(misfit) => *unplaced.misfits.entry(misfit).or_default() += bucket.len(),
                    Ok(grant) => {
                        let plain = bucket.iter().find(|node| !own.iter().any(|nodes| nodes.contains(node)));
                        if let Some((node, sum)) = plain.zip(*preference) {
                            consider(*node, &grant, sum);
                        }
                    }
                }
            }
        }
        for node in own.into_iter().flatten() {
            if let Some(sum) = preferences[partition.class_of[*node]]
                && let Ok(grant) = grant::of(&self.ledgers[*node], request)
            {
                consider(*node, &grant, if avoided.contains(node) { sum - AVOIDED } else { sum });
            }
        }
        let Some((_, node)) = best else { return Err(unplaced) };
        // The bucket's grant may have been another node's, with its UUIDs.
        grant::of(&self.ledgers[node], request).map(|grant| (node, grant)).map_err(|_| unplaced)
    }

    /// Nodes by their names.
    fn numbers(&self, names: &BTreeSet<String>) -> BTreeSet<usize> {
        let number = |name: &String| self.ledgers.binary_search_by(|ledger| ledger.node.name.cmp(name)).ok();
        names.iter().filter_map(number).collect()
    }

    /// Nodes whose score is their own: they have the revision or the model.
    fn own(&self, request: &PlacementRequest) -> impl Iterator<Item = &BTreeSet<usize>> {
        let caching = request.model.as_ref().and_then(|model| self.caches.get(model.as_str()));
        self.hosts.get(request.revision.as_str()).into_iter().chain(caching)
    }

    /// Takes what [`Index::choose`] found.
    pub(super) fn take(&mut self, node: usize, request: &'a PlacementRequest, grant: &Grant) {
        self.ledgers[node].take(request, grant);
        self.hosts.entry(&request.revision).or_default().insert(node);
        let former = self.signature_of[node];
        let signature = self.ledgers[node].signature();
        let signature = self.number(signature);
        self.signature_of[node] = signature;
        for partition in self.partitions.values_mut() {
            let buckets = &mut partition.classes[partition.class_of[node]].buckets;
            if let Some(bucket) = buckets.get_mut(&former) {
                bucket.remove(&node);
                if bucket.is_empty() {
                    buckets.remove(&former);
                }
            }
            buckets.entry(signature).or_default().insert(node);
        }
    }

    fn divide(&self, keys: &[Key<'_>]) -> Partition {
        let mut numbers: BTreeMap<(bool, Vec<Option<&str>>), usize> = BTreeMap::new();
        let mut partition = Partition { classes: Vec::new(), class_of: Vec::with_capacity(self.ledgers.len()) };
        for (at, ledger) in self.ledgers.iter().enumerate() {
            let node = ledger.node;
            let values = (node.schedulable, keys.iter().map(|key| key.of(node)).collect());
            let next = numbers.len();
            let class = *numbers.entry(values).or_insert(next);
            if class == partition.classes.len() {
                partition.classes.push(Class::default());
            }
            partition.class_of.push(class);
            let class = &mut partition.classes[class];
            class.size += 1;
            class.buckets.entry(self.signature_of[at]).or_default().insert(at);
        }
        partition
    }
}
