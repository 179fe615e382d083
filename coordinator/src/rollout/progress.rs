//! When a revision is ready, and when it has had its chance.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    time::Duration,
};

use pilotlight_proto::fleet::v1::{ReplicaPhase, ReplicaStatus};

/// Signs remembered of one replica. More than any server says while it loads; past it nothing counts as
/// new, so that a replica that fails and starts over cannot put off its deadline for ever.
const SIGNS_MOST: usize = 1024;

/// What one replica has said and done so far, to tell progress from repetition: a process that crashes,
/// starts and crashes again changes its phase all the time, and gets nowhere.
#[derive(Debug, Clone, Default)]
pub struct Signs {
    said: BTreeSet<(i32, String)>,
    /// The most bytes fetched so far, by the size of the whole model.
    fetched: BTreeMap<u64, u64>,
}

impl Signs {
    /// True where the status shows something for the first time.
    pub fn progress(&mut self, status: &ReplicaStatus) -> bool {
        // Failing is no progress, however many words it finds for it.
        if matches!(status.phase(), ReplicaPhase::Failed | ReplicaPhase::Unspecified) || self.said.len() >= SIGNS_MOST {
            return false;
        }
        let fetched = status.phase() == ReplicaPhase::Fetching && self.fetched_more(status);
        self.said.insert((status.phase, without_addresses(&status.message))) || fetched
    }

    /// True where more of a model is on the node than ever before: one percent of a large one may take
    /// longer than a deadline. A fetch that starts over has to come past where it was.
    fn fetched_more(&mut self, status: &ReplicaStatus) -> bool {
        if self.fetched.len() >= SIGNS_MOST && !self.fetched.contains_key(&status.fetch_total_bytes) {
            return false;
        }
        let most = self.fetched.entry(status.fetch_total_bytes).or_default();
        let more = status.fetched_bytes > *most;
        *most = status.fetched_bytes.max(*most);
        more
    }
}

/// A message without the ports in it: a process that is started again gets another one, which is no progress.
fn without_addresses(message: &str) -> String {
    let is_address = |word: &&str| word.trim_end_matches(':').parse::<SocketAddr>().is_ok();
    let words = message.split(|character: char| character.is_whitespace() || "(),;".contains(character));
    words.filter(|word| !is_address(word)).collect::<Vec<_>>().join(" ")
}

/// Replicas that make a new revision ready: its initial scale, at least its minimum, and at least one.
pub fn needed(initial: u32, min: u32) -> u32 {
    initial.max(min).max(1)
}

/// The same for a revision that replaces another in place and is to have `canary` percent of the
/// requests: what that share needs, less the one replica that a replacement may be short of.
pub fn needed_in_place(needed: u32, canary: u8) -> u32 {
    needs(needed, canary, 100).saturating_sub(1).max(1)
}

/// Replicas for `share` percent where `wanted` were meant for `of` percent; rounded up.
pub fn needs(wanted: u32, share: u8, of: u8) -> u32 {
    let of = u64::from(of.max(1));
    u32::try_from((u64::from(wanted) * u64::from(share)).div_ceil(of)).unwrap_or(u32::MAX)
}

/// Percent of the requests that a revision takes while it replaces another in place: as many as `ready`
/// of its `needed` replicas can carry, at most its `canary` share. Rounded up, so that what is left for
/// the others never needs one replica more than the numbers say.
pub fn share_in_place(needed: u32, ready: u32, canary: u8) -> u8 {
    let share = (100 * u64::from(ready)).div_ceil(u64::from(needed.max(1)));
    u8::try_from(share).unwrap_or(100).min(canary)
}

/// True where nothing has moved for longer than the deadline.
pub fn overdue(silent_for: Duration, deadline: Duration) -> bool {
    silent_for > deadline
}
