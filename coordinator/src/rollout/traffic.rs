//! Which revision gets which share of a service's requests.

use std::fmt;

use super::History;

/// One share. All shares of a service add up to 100.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// The revision's number.
    pub revision: u32,
    /// 0 to 100.
    pub percent: u8,
    /// True for the share that follows the newest ready revision.
    pub latest: bool,
    /// By which it can be called alone.
    pub tag: Option<Tag>,
}

/// A name by which one share can be called alone: `<tag>-<service>.<namespace>.<domain>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tag {
    /// The newest ready revision.
    Latest,
    /// The one that had everything before.
    Prev,
    /// As a Knative `Service`'s `traffic` names it.
    Named(String),
}

impl Tag {
    /// As it is written.
    pub fn as_str(&self) -> &str {
        match self {
            Self::Latest => "latest",
            Self::Prev => "prev",
            Self::Named(name) => name,
        }
    }
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Splits requests; `history` is settled. Empty as long as nothing was ever ready.
///
/// The newest comes first, which gateways rely on: a client that sticks to its revision stays on the
/// canary when the canary grows.
pub fn split(history: &History, canary: Option<u8>, tag_latest: bool) -> Vec<Target> {
    let Some(ready) = history.ready else { return Vec::new() };
    let tag = tag_latest.then_some(Tag::Latest);
    let latest = |percent| Target { revision: ready, percent, latest: true, tag: tag.clone() };
    match (canary.map(|percent| percent.min(100)), history.rolledout) {
        (Some(percent @ 0..100), Some(base)) if base != ready => {
            vec![
                latest(percent),
                Target { revision: base, percent: 100 - percent, latest: false, tag: Some(Tag::Prev) },
            ]
        }
        _ => vec![latest(100)],
    }
}

/// One entry of a Knative `Service`'s `traffic`, its revision found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Share {
    /// `None`: the newest ready revision.
    pub revision: Option<u32>,
    /// 0 to 100; the shares of a service add up to 100.
    pub percent: u8,
    /// Empty for none.
    pub tag: String,
}

/// Splits requests as a Knative `Service`'s `traffic` says, in its order but for the share of the newest
/// revision, which comes first. `ready` tells whether a revision has ever been ready: one that was not
/// takes nothing yet, and its requests stay with the newest that was. Empty as long as nothing was.
pub fn by_shares(newest_ready: Option<u32>, shares: &[Share], ready: impl Fn(u32) -> bool) -> Vec<Target> {
    let Some(newest) = newest_ready else { return Vec::new() };
    let mut targets: Vec<Target> = shares
        .iter()
        .map(|share| Target {
            revision: share.revision.filter(|revision| ready(*revision)).unwrap_or(newest),
            percent: share.percent,
            latest: share.revision.is_none(),
            tag: Some(Tag::Named(share.tag.clone())).filter(|tag| !tag.as_str().is_empty()),
        })
        .collect();
    targets.sort_by_key(|target| !target.latest);
    targets
}

/// Moves `percent` from the newest ready revision to `newer`, which replaces it one replica at a time.
pub fn shift(targets: &mut Vec<Target>, newer: u32, percent: u8) {
    let has_prev = targets.iter().any(|target| target.tag == Some(Tag::Prev));
    let Some(former) = targets.iter_mut().find(|target| target.latest) else { return };
    if former.revision == newer || former.percent == 0 || percent == 0 {
        return;
    }
    let moved = percent.min(former.percent);
    let target = Target { revision: newer, percent: moved, latest: true, tag: former.tag.take() };
    former.percent -= moved;
    former.latest = false;
    former.tag = (!has_prev).then_some(Tag::Prev);
    targets.retain(|target| target.percent > 0 || target.tag.is_some());
    targets.insert(0, target);
}
