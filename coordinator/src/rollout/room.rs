//! Room for a new revision where there is no second set of GPUs.

use super::{Policy, progress::needs};

/// One revision beside the one that needs room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Side {
    /// Its number.
    pub number: u32,
    /// Replicas that its load and its bounds ask for.
    pub wanted: u32,
    /// Replicas that it has, without those that drain.
    pub live: u32,
    /// Percent of the requests now.
    pub share: u8,
    /// Percent of the requests that `wanted` is meant for.
    pub full_share: u8,
    /// Its least number of replicas.
    pub min: u32,
}

/// What is seen.
#[derive(Debug, Clone, Copy)]
pub struct Scene<'a> {
    /// Replicas that the revision in need asks for.
    pub wanted: u32,
    /// Of those, as many as others should give way for.
    pub enough: u32,
    /// Replicas that it has.
    pub live: u32,
    /// Those of them that are not ready.
    pub starting: u32,
    /// True where the last attempt to place what is missing found no place.
    pub unplaced: bool,
    /// True where it has already begun to take the others' places.
    pub in_place: bool,
    /// True once it has been ready.
    pub proven: bool,
    /// The service's other revisions.
    pub others: &'a [Side],
    /// Replicas of the service that drain, whatever their revision.
    pub draining: u32,
    /// The service's policy.
    pub policy: &'a Policy,
}

/// What follows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Room {
    /// Replicas that the revision in need may have now; `None` is no limit.
    pub most: Option<u32>,
    /// Replicas that the others may have now.
    pub others_most: Vec<(u32, u32)>,
    /// Those that may give up one replica now, best first.
    pub give: Vec<u32>,
    /// True where it has enough and gets no more: it need not wait for its full number to be ready.
    pub partial: bool,
    /// True where only the promise of a warm replica stands in the way.
    pub kept_warm: bool,
}

/// Decides. One replica at a time: the next goes only when none drains and none is starting.
pub fn room(scene: &Scene<'_>) -> Room {
    let others_live: u32 = scene.others.iter().map(|side| side.live).sum();
    let most = surge_limit(scene, others_live);
    // Below its limit it is placed first, before anybody gives up more.
    let blocked = scene.unplaced || most.is_some_and(|most| most <= scene.live);
    let short = scene.live < scene.enough;
    let partial = !short && blocked && scene.live < scene.wanted && others_live > 0;
    if others_live == 0 || !(short || scene.in_place) {
        return Room { most, partial, ..Room::default() };
    }
    let floors: Vec<_> = scene.others.iter().map(|side| (side, floor(scene, side))).collect();
    // What was given up does not come back while it is needed elsewhere.
    let others_most = floors.iter().map(|(side, floor)| (side.number, side.live.max(*floor))).collect();
    let at_rest = short && blocked && scene.draining == 0 && scene.starting == 0;
    let mut givers: Vec<_> = floors.iter().filter(|(side, floor)| at_rest && side.live > *floor).collect();
    givers.sort_by_key(|(side, floor)| (std::cmp::Reverse(side.live - floor), side.number));
    let kept_warm = givers.is_empty() && at_rest && floors.iter().any(|(side, _)| side.live > least(scene, side));
    let give = givers.into_iter().map(|(side, _)| side.number).collect();
    Room { most, others_most, give, partial, kept_warm }
}

/// Replicas that the revision in need may have so that the service stays within its surge.
fn surge_limit(scene: &Scene<'_>, others_live: u32) -> Option<u32> {
    let surge = scene.policy.max_surge?;
    if others_live == 0 {
        return None;
    }
    let serving: u32 = scene.others.iter().filter(|side| side.share > 0).map(|side| side.wanted).sum();
    let usual = serving.max(scene.enough);
    let most = (usual + surge.of(usual)).saturating_sub(others_live + scene.draining);
    Some(most.max(scene.live))
}

/// What a revision's share needs, less what may be missing.
fn least(scene: &Scene<'_>, side: &Side) -> u32 {
    let missing = scene.policy.max_unavailable.unwrap_or(1);
    needs(side.wanted, side.share, side.full_share.max(side.share)).saturating_sub(missing)
}

/// As [`least`], and the last warm replica stays where one was promised.
fn floor(scene: &Scene<'_>, side: &Side) -> u32 {
    let promised = side.share > 0 && side.min > 0 && scene.policy.max_unavailable.is_none();
    // Once the other one is ready, a share without a replica would still have nobody to serve it.
    let last = u32::from(promised || (scene.proven && side.share > 0));
    least(scene, side).max(last)
}
