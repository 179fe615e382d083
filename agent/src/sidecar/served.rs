//! Counts what this node's replicas have answered since the process started, for billing.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use pilotlight_proto::fleet::v1::{RequestCounters, RevisionCounters};

use super::sync::{Mutex, lock};

/// One revision on this node. Only grows.
#[derive(Debug, Default)]
pub struct Served {
    requests: AtomicU64,
    prompt_tokens: AtomicU64,
    generated_tokens: AtomicU64,
    requests_without_usage: AtomicU64,
}

impl Served {
    /// A replica's answer has ended.
    pub(super) fn add_request(&self) {
        self.requests.fetch_add(1, Ordering::Relaxed);
    }

    /// The answer to a completion request has ended, with these tokens by its `usage` object; `None` if there was none.
    pub(super) fn add_tokens(&self, usage: Option<(u64, u64)>) {
        let Some((prompt, generated)) = usage else {
            self.requests_without_usage.fetch_add(1, Ordering::Relaxed);
            return;
        };
        self.prompt_tokens.fetch_add(prompt, Ordering::Relaxed);
        self.generated_tokens.fetch_add(generated, Ordering::Relaxed);
    }

    fn counters(&self, revision: &str) -> RevisionCounters {
        RevisionCounters {
            revision: revision.to_owned(),
            requests: self.requests.load(Ordering::Relaxed),
            prompt_tokens: self.prompt_tokens.load(Ordering::Relaxed),
            generated_tokens: self.generated_tokens.load(Ordering::Relaxed),
            requests_without_usage: self.requests_without_usage.load(Ordering::Relaxed),
        }
    }
}

/// All revisions that this process has had requests for, including those that are gone. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct ServedRevisions(Arc<Mutex<BTreeMap<String, Entry>>>);

#[derive(Debug, Default)]
struct Entry {
    served: Arc<Served>,
    /// What the coordinator was last sent in this session.
    sent: RevisionCounters,
}

impl ServedRevisions {
    /// The counters of a revision.
    pub(super) fn of(&self, revision: &str) -> Arc<Served> {
        Arc::clone(&lock(&self.0).entry(revision.to_owned()).or_default().served)
    }

    /// Counters that have changed since the last call; `None` if there are none.
    pub fn take_changed(&self) -> Option<RequestCounters> {
        let mut all = lock(&self.0);
        let changed = all.iter_mut().filter_map(|(revision, entry)| {
            let counters = entry.served.counters(revision);
            let is_zero = counters == RevisionCounters { revision: revision.clone(), ..RevisionCounters::default() };
            let is_sent = entry.sent == counters;
            entry.sent.clone_from(&counters);
            (!is_sent && !is_zero).then_some(counters)
        });
        let revisions: Vec<_> = changed.collect();
        (!revisions.is_empty()).then_some(RequestCounters { revisions })
    }

    /// The coordinator may not have received what was sent: all counters have changed.
    pub fn resend(&self) {
        lock(&self.0).values_mut().for_each(|entry| entry.sent = RevisionCounters::default());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_sent_when_they_change_and_all_of_them_again_when_asked_for() {
        let all = ServedRevisions::default();
        let (one, other) = (all.of("default/one"), all.of("default/other"));
        assert_eq!(all.take_changed(), None);
        one.add_request();
        one.add_tokens(Some((5, 7)));
        other.add_tokens(None);
        let revisions = |changed: Option<RequestCounters>| {
            let of = |one: &RevisionCounters| {
                (one.requests, one.prompt_tokens, one.generated_tokens, one.requests_without_usage)
            };
            changed.map_or_else(Vec::new, |changed| changed.revisions.iter().map(of).collect())
        };
        assert_eq!(revisions(all.take_changed()), [(1, 5, 7, 0), (0, 0, 0, 1)]);
        assert_eq!(all.take_changed(), None);
        other.add_request();
        drop(other);
        assert_eq!(revisions(all.take_changed()), [(1, 0, 0, 1)]);
        all.resend();
        assert_eq!(revisions(all.take_changed()), [(1, 5, 7, 0), (1, 0, 0, 1)], "whether its queue is there or not");
    }
}
