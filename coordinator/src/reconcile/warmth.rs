//! How warm a node keeps what nobody needs now: who sleeps on, which weights are in the page cache, and
//! which models and images leave the disk first. Pure.
//!
//! [`crate::eviction`] chooses; here it is fed with what is seen. Looked at anew every [`INTERVAL`], and at
//! once where a model finds no room on a disk.

#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use jiff::Timestamp;
use pilotlight_proto::fleet::v1 as fleet;

use super::{
    clock::scaler_time,
    storage,
    world::{NodeState, ReplicaState, RevisionState, World},
};
use crate::eviction::{Bytes, Costs, Entry, Footprint, Policy, Rung, victims};

/// Between two looks.
pub const INTERVAL: Duration = Duration::from_secs(10);
/// What "soon" means for the probability of need.
const HORIZON: Duration = Duration::from_secs(120);
/// What is in the page cache counts for so much more than what would have to be read: two that are worth
/// about the same do not take turns.
const STAYS: f64 = 1.5;

/// What becomes of the models and images on one node's disk.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Shelf {
    /// Addresses of those that are kept in the page cache.
    pub staged: BTreeSet<String>,
    /// By address: which leave the disk first, as `ModelAssignment.keep`.
    pub keep: BTreeMap<String, u32>,
    /// The same of images, by name.
    pub images: BTreeMap<String, u32>,
}

/// What a look at one node says.
#[derive(Debug, Default, PartialEq)]
pub struct Look {
    /// What is on its disk.
    pub shelf: Shelf,
    /// Names of sleepers that leave, since the node's memory for idle models does not suffice.
    pub leave: Vec<String>,
    /// By name of replica: seconds of waiting to be expected where it makes room.
    pub worth: Vec<(String, f64)>,
}

/// Revisions that take requests, by what they need on the disk.
#[derive(Debug, Default)]
pub struct Users<'a> {
    /// By the address of the model that they load.
    models: BTreeMap<String, Vec<&'a RevisionState>>,
    /// By the name of their image.
    images: BTreeMap<&'a str, Vec<&'a RevisionState>>,
    /// Models that were looked up.
    #[cfg(test)]
    looked_up: std::cell::Cell<usize>,
}

impl<'a> Users<'a> {
    /// Those of one model, if there are any.
    fn of_model(&self, uri: &str) -> Option<(&str, &[&'a RevisionState])> {
        #[cfg(test)]
        self.looked_up.set(self.looked_up.get() + 1);
        self.models.get_key_value(uri).map(|(uri, users)| (uri.as_str(), users.as_slice()))
    }
}

/// See [`Users`].
pub fn users(world: &World) -> Users<'_> {
    let mut users = Users::default();
    for revision in world.revisions.values().filter(|revision| world.reachable(revision)) {
        if !revision.record.template.storage.is_empty()
            && let Some(uri) = storage::first_address(world, &revision.record)
        {
            users.models.entry(uri).or_default().push(revision);
        }
        users.images.entry(&revision.record.template.container.image).or_default().push(revision);
    }
    users
}

/// Takes in how long a replica took to change its rung.
pub fn measure(revision: &mut RevisionState, transition: &fleet::Transition) {
    let Some(took) = transition.took.and_then(|took| Duration::try_from(took).ok()) else { return };
    let from = match transition.from() {
        fleet::Rung::Absent => Rung::Absent,
        fleet::Rung::Cached => Rung::Cached,
        fleet::Rung::Staged => Rung::Staged,
        // One that was started only to sleep was loaded all the same; how long it takes to fall asleep
        // delays nobody.
        fleet::Rung::Asleep => Rung::Asleep,
        fleet::Rung::Serving | fleet::Rung::Unspecified => return,
    };
    revision.costs.measure(from, took);
}

/// Looks at one node.
pub fn look(world: &World, node: &NodeState, users: &Users<'_>, now: Timestamp) -> Look {
    let here: Vec<_> = node.replicas.iter().filter_map(|name| world.replicas.get(name)).collect();
    let models = Models::of(node);
    let sleepers = here.iter().filter(|replica| sleeps(replica));
    let mut entries: Vec<Entry> = sleepers.filter_map(|replica| sleeper(world, replica, &models, now)).collect();
    let by_revision: BTreeSet<&str> = here.iter().map(|replica| replica.record.revision.as_str()).collect();
    // Only what is on this node: the fleet has many times as many models.
    let on_disk = || models.by_uri.keys().filter_map(|uri| users.of_model(uri));
    let idle = on_disk().filter(|(_, users)| !users.iter().any(|user| by_revision.contains(&*user.record.key())));
    let staged: Vec<Entry> = idle.filter_map(|(uri, users)| stageable(uri, users, &models, now)).collect();
    let mut shelf = Shelf { staged: staged.iter().map(|entry| entry.name.clone()).collect(), ..Shelf::default() };
    entries.extend(staged);
    let memory = node.inventory.as_ref().map_or(0, |inventory| inventory.warm_memory_bytes);
    let budget = Bytes { host: memory, gpu: u64::MAX, disk: u64::MAX };
    let mut leave = Vec::new();
    for step in victims(&entries, budget, Policy::CostAware).steps {
        if !shelf.staged.remove(&step.name) {
            leave.push(step.name);
        }
    }
    if let Some(name) = makes_room_on_disk(world, node, &here, &entries, &leave) {
        leave.push(name);
    }
    let keep = on_disk().filter_map(|(uri, users)| Some((uri.to_owned(), keep(users, models.bytes(uri)?, now))));
    shelf.keep = keep.collect();
    shelf.images = keep_images(node, users, now);
    let worth = here.iter().filter_map(|replica| worth(world, replica, &models, now)).collect();
    Look { shelf, leave, worth }
}

/// Reason of a replica whose model has no room on the disk, as agents say it.
pub const CACHE_FULL: &str = "CacheFull";

/// True for a replica whose model finds no room on its node's disk.
pub fn lacks_room(status: &fleet::ReplicaStatus) -> bool {
    status.phase() == fleet::ReplicaPhase::Failed && status.reason == CACHE_FULL
}

/// Where a model finds no room on the disk beside those that replicas have: the sleeper that is worth least
/// for its bytes. One at a time: the agent then frees what it can, and tries again. None where all of them
/// together would not do.
fn makes_room_on_disk(
    world: &World,
    node: &NodeState,
    here: &[&ReplicaState],
    entries: &[Entry],
    leave: &[String],
) -> Option<String> {
    let leaving = !leave.is_empty() || here.iter().any(|replica| replica.record.asleep && replica.record.draining);
    let lacking = here.iter().filter_map(|replica| replica.status.as_ref().filter(|status| lacks_room(status)));
    let lacking = lacking.map(|status| status.lacking_bytes).min()?;
    if leaving {
        return None;
    }
    let free = |entry: &&Entry| entry.rung == Rung::Asleep && entry.pinned.is_none();
    let free: BTreeMap<&str, &Entry> = entries.iter().filter(free).map(|entry| (entry.name.as_str(), entry)).collect();
    let left = left_with(world, node, here, &|name| free.contains_key(name));
    if left.values().sum::<u64>() < lacking {
        return None;
    }
    let frees = |name: &str| {
        let replica = here.iter().find(|replica| replica.record.name == name);
        replica.is_some_and(|replica| {
            storage::on_disk(world, replica).any(|what| left.get(&what).is_some_and(|bytes| *bytes > 0))
        })
    };
    let score =
        |entry: &Entry| entry.costs.lost(entry.rung, Rung::Absent) * entry.need / entry.footprint.disk.max(1) as f64;
    let least = free.into_iter().filter(|(name, _)| frees(name));
    least.min_by(|(_, a), (_, b)| score(a).total_cmp(&score(b))).map(|(name, _)| name.to_owned())
}

/// Bytes that the disk may have back once these replicas have left, by the model's address or the image's name:
/// of what nobody else has, and what is not pinned.
fn left_with(
    world: &World,
    node: &NodeState,
    here: &[&ReplicaState],
    leave: &dyn Fn(&str) -> bool,
) -> BTreeMap<String, u64> {
    let (leaving, staying): (Vec<_>, Vec<_>) = here.iter().copied().partition(|replica| leave(&replica.record.name));
    let stays: BTreeSet<String> = staying.into_iter().flat_map(|replica| storage::on_disk(world, replica)).collect();
    let bytes = |what: &String| -> u64 {
        let models = node.cached.models.iter().filter(|model| model.uri == *what && !model.pinned);
        let images = node.cached.images.iter().filter(|image| {
            // It goes as a whole, with all of its names.
            image.names.contains(what) && !image.pinned && !image.names.iter().any(|name| stays.contains(name))
        });
        models.map(|model| model.bytes).chain(images.map(|image| image.bytes)).sum()
    };
    let leaves =
        leaving.into_iter().flat_map(|replica| storage::on_disk(world, replica)).filter(|what| !stays.contains(what));
    leaves.map(|what| (what.clone(), bytes(&what))).collect()
}

/// Models on a node's disk, by address, and images.
struct Models<'a> {
    /// Bytes of all versions, and whether they are in the page cache.
    by_uri: BTreeMap<&'a str, (u64, bool)>,
    /// Bytes of images, by name.
    images: BTreeMap<&'a str, u64>,
}

impl<'a> Models<'a> {
    fn of(node: &'a NodeState) -> Self {
        let mut by_uri: BTreeMap<&str, (u64, bool)> = BTreeMap::new();
        for model in &node.cached.models {
            let (bytes, staged) = by_uri.entry(&model.uri).or_default();
            *bytes += model.bytes;
            *staged |= model.staged;
        }
        let images = node.cached.images.iter();
        let images = images.flat_map(|image| image.names.iter().map(|name| (name.as_str(), image.bytes)));
        Self { by_uri, images: images.collect() }
    }

    fn bytes(&self, uri: &str) -> Option<u64> {
        self.by_uri.get(uri).map(|(bytes, _)| *bytes)
    }
}

fn sleeps(replica: &ReplicaState) -> bool {
    replica.sleeps() && !replica.record.draining
}

fn need(revision: &RevisionState, now: Timestamp) -> f64 {
    revision.arrivals.need(scaler_time(now), HORIZON)
}

/// Bytes of the model that a replica loads, as far as they are known.
fn weights(world: &World, revision: &RevisionState, models: &Models<'_>) -> u64 {
    let uri = storage::first_address(world, &revision.record);
    uri.and_then(|uri| models.bytes(&uri)).unwrap_or(0)
}

fn entry(name: &str, rung: Rung, footprint: Footprint, costs: &Costs, need: f64) -> Entry {
    Entry {
        name: name.to_owned(),
        rung,
        footprint,
        costs: costs.with_estimates(&footprint),
        need,
        last_used: Duration::ZERO,
        uses: 0,
        pinned: None,
        in_use: false,
    }
}

fn sleeper(world: &World, replica: &ReplicaState, models: &Models<'_>, now: Timestamp) -> Option<Entry> {
    let revision = world.revisions.get(&replica.record.revision)?;
    let asleep_host = replica.status.as_ref().map_or(0, |status| status.memory_bytes);
    let weights = weights(world, revision, models);
    let image = models.images.get(revision.record.template.container.image.as_str()).copied().unwrap_or(0);
    let footprint = Footprint { asleep_host, weights, disk: weights + image, ..Footprint::default() };
    let pinned = world.keeps_promise(revision, replica).then_some(Rung::Asleep);
    Some(Entry { pinned, ..entry(&replica.record.name, Rung::Asleep, footprint, &revision.costs, need(revision, now)) })
}

/// A model that could be in the page cache: it is on the disk, and no process has it now.
fn stageable(uri: &str, users: &[&RevisionState], models: &Models<'_>, now: Timestamp) -> Option<Entry> {
    let (bytes, staged) = *models.by_uri.get(uri)?;
    let footprint = Footprint { weights: bytes, disk: bytes, ..Footprint::default() };
    let (need, costs) = joint(users, now)?;
    let need = if staged { (need * STAYS).min(1.0) } else { need };
    Some(entry(uri, Rung::Staged, footprint, costs, need))
}

/// How probable it is that any of them is needed soon, and what the one that is most so takes to serve.
fn joint<'a>(users: &[&'a RevisionState], now: Timestamp) -> Option<(f64, &'a Costs)> {
    let needs: Vec<_> = users.iter().map(|user| (need(user, now), &user.costs)).collect();
    let nobody: f64 = needs.iter().map(|(need, _)| 1.0 - need).product();
    let (_, costs) = needs.into_iter().max_by(|(a, _), (b, _)| a.total_cmp(b))?;
    Some((1.0 - nobody, costs))
}

/// See `ModelAssignment.keep`: the logarithm of what is lost per byte, so that it changes only where it
/// matters; at least 1, since 0 is for what nobody has asked for.
fn keep(users: &[&RevisionState], bytes: u64, now: Timestamp) -> u32 {
    let footprint = Footprint { weights: bytes, disk: bytes, ..Footprint::default() };
    let Some((need, costs)) = joint(users, now) else { return 0 };
    rank(costs.with_estimates(&footprint).lost(Rung::Cached, Rung::Absent) * need, bytes)
}

/// The same of images, by name: what is lost is the pull, as long as it took the last time.
fn keep_images(node: &NodeState, users: &Users<'_>, now: Timestamp) -> BTreeMap<String, u32> {
    let names = node.cached.images.iter().flat_map(|image| image.names.iter().map(move |name| (name, image)));
    let keep = names.filter_map(|(name, image)| {
        let (need, _) = joint(users.images.get(name.as_str())?, now)?;
        let took = image.pull_took.and_then(|took| Duration::try_from(took).ok());
        let footprint = Footprint { disk: image.bytes, ..Footprint::default() };
        let estimated = || Costs::estimated(&footprint).lost(Rung::Cached, Rung::Absent);
        let lost = took.map_or_else(estimated, |took| took.as_secs_f64());
        Some((name.clone(), rank(lost * need, image.bytes)))
    });
    keep.collect()
}

fn rank(lost: f64, bytes: u64) -> u32 {
    /// 2^-64 seconds per byte count as nothing.
    const LEAST: f64 = 64.0;
    ((lost / bytes.max(1) as f64).log2() + LEAST).round().clamp(1.0, 2.0 * LEAST) as u32
}

/// What is lost where a replica that has nothing to do makes room.
fn worth(world: &World, replica: &ReplicaState, models: &Models<'_>, now: Timestamp) -> Option<(String, f64)> {
    let revision = world.revisions.get(&replica.record.revision)?;
    let from = if sleeps(replica) { Rung::Asleep } else { Rung::Serving };
    if replica.running > 0 || (from == Rung::Serving && !replica.ready()) {
        return None;
    }
    let bytes = weights(world, revision, models);
    let footprint = Footprint { weights: bytes, disk: bytes, ..Footprint::default() };
    let lost = revision.costs.with_estimates(&footprint).lost(from, Rung::Cached);
    Some((replica.record.name.clone(), lost * need(revision, now)))
}
