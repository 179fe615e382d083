//! A service's requests, split over its revisions.

use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicBool, Ordering},
};

use http::{HeaderMap, HeaderName};
use tokio::sync::watch;
use xxhash_rust::xxh3::xxh3_64;

use super::routes::Service;
use crate::sidecar::RevisionQueue;

/// One revision and its share.
#[derive(Debug, Clone)]
pub struct Share {
    percent: u32,
    queue: Arc<RevisionQueue>,
}

impl Share {
    /// A share of `percent`, 0 to 100.
    pub fn new(percent: u32, queue: Arc<RevisionQueue>) -> Self {
        Self { percent, queue }
    }
}

/// Splits requests by smooth weighted round robin: exact over every hundred requests, and spread evenly
/// within them. It outlives updates of routes, which come many times a second; were it to begin anew with
/// each, small shares would hardly ever have their turn.
#[derive(Debug)]
pub struct Split {
    wheel: Mutex<Vec<Spoke>>,
    changes: watch::Sender<()>,
    is_closed: AtomicBool,
}

#[derive(Debug)]
struct Spoke {
    share: Share,
    credit: i64,
}

impl Default for Split {
    fn default() -> Self {
        Self { wheel: Mutex::default(), changes: watch::Sender::new(()), is_closed: AtomicBool::new(false) }
    }
}

impl Split {
    fn wheel(&self) -> MutexGuard<'_, Vec<Spoke>> {
        self.wheel.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Other shares; who is owed a turn stays owed.
    pub fn update(&self, shares: Vec<Share>) {
        let mut wheel = self.wheel();
        let credit = |share: &Share| {
            let former = wheel.iter().find(|spoke| spoke.share.queue.key() == share.queue.key());
            former.filter(|_| share.percent > 0).map_or(0, |spoke| spoke.credit)
        };
        let mut next: Vec<_> = shares.into_iter().map(|share| Spoke { credit: credit(&share), share }).collect();
        // What a revision that has left was owed, or owes, must not tip the balance for ever.
        let surplus: i64 = next.iter().map(|spoke| spoke.credit).sum();
        if let Some(first) = next.iter_mut().find(|spoke| spoke.share.percent > 0) {
            first.credit -= surplus;
        }
        *wheel = next;
        drop(wheel);
        self.changes.send_replace(());
    }

    /// The service is gone: requests that wait for any of its revisions are answered.
    pub fn close(&self) {
        self.is_closed.store(true, Ordering::Relaxed);
        self.update(Vec::new());
    }

    /// The revision that takes the next request.
    pub fn next(&self) -> Option<Arc<RevisionQueue>> {
        let mut wheel = self.wheel();
        let total: i64 = wheel.iter().map(|spoke| i64::from(spoke.share.percent)).sum();
        for spoke in wheel.iter_mut() {
            spoke.credit += i64::from(spoke.share.percent);
        }
        let chosen = wheel.iter_mut().filter(|spoke| spoke.share.percent > 0).max_by_key(|spoke| spoke.credit)?;
        chosen.credit -= total;
        Some(Arc::clone(&chosen.share.queue))
    }

    /// The revision for a client that sticks to one. The newest comes first on the scale, so that it
    /// keeps its clients when its share grows; and since the newest is part of the hash, another canary
    /// meets other clients.
    fn sticky(&self, value: &[u8]) -> Option<Arc<RevisionQueue>> {
        let wheel = self.wheel();
        let total: u64 = wheel.iter().map(|spoke| u64::from(spoke.share.percent)).sum();
        let newest = wheel.first()?;
        let salted = [newest.share.queue.key().as_bytes(), b"\0", value].concat();
        // 128-bit arithmetic maps the whole range of the hash onto the scale without a bias.
        let point = (u128::from(xxh3_64(&salted)) * u128::from(total)) >> 64;
        let mut end = 0;
        let shares = wheel.iter().map(|spoke| &spoke.share);
        let found = shares.into_iter().find(|share| {
            end += u128::from(share.percent);
            point < end
        })?;
        Some(Arc::clone(&found.queue))
    }

    /// True where the revision has a share.
    fn has(&self, queue: &RevisionQueue) -> bool {
        self.wheel().iter().any(|spoke| spoke.share.percent > 0 && spoke.share.queue.key() == queue.key())
    }
}

/// Where one request may go.
#[derive(Debug, Clone)]
pub struct Destination {
    service: Arc<Service>,
    way: Way,
}

#[derive(Debug, Clone)]
enum Way {
    /// Whoever is next.
    Turn,
    /// By the value of the service's sticky header.
    Sticky(Vec<u8>),
    /// One revision, by its tag.
    Tagged(Arc<RevisionQueue>),
}

impl Destination {
    /// For a request to a service, or to one of its tags.
    pub fn new(service: Arc<Service>, tagged: Option<Arc<RevisionQueue>>, headers: &HeaderMap) -> Self {
        let value = |name: &HeaderName| headers.get(name).map(|value| value.as_bytes().to_vec());
        let way = match (tagged, service.sticky_header.as_ref().and_then(value)) {
            (Some(queue), _) => Way::Tagged(queue),
            (None, Some(value)) => Way::Sticky(value),
            (None, None) => Way::Turn,
        };
        Self { service, way }
    }

    /// The service, as `<namespace>/<name>`.
    pub fn service(&self) -> &str {
        &self.service.name
    }

    /// The revision that takes the request; `None` where none takes any.
    pub fn pick(&self) -> Option<Arc<RevisionQueue>> {
        match &self.way {
            Way::Turn => self.service.split.next(),
            Way::Sticky(value) => self.service.split.sticky(value),
            Way::Tagged(queue) => Some(Arc::clone(queue)),
        }
    }

    /// True where a request that waits for this revision should pick again: it has no share any more,
    /// and nobody there who could take it, or the service is gone.
    pub fn left_behind(&self, queue: &RevisionQueue) -> bool {
        let split = &self.service.split;
        let has_no_share = !matches!(self.way, Way::Tagged(_)) && !split.has(queue) && !queue.any_ready();
        has_no_share || split.is_closed.load(Ordering::Relaxed)
    }

    /// Resolves when [`Destination::left_behind`] has become true.
    pub async fn lost(&self, queue: &RevisionQueue) {
        let mut changes = self.service.split.changes.subscribe();
        while !self.left_behind(queue) {
            if changes.changed().await.is_err() {
                // The service is gone; the request waits for its deadline.
                std::future::pending::<()>().await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use http::HeaderValue;

    use super::*;
    use crate::sidecar::Sidecar;

    /// Shares of the revisions `r1`, `r2`, …
    fn shares(sidecar: &Sidecar, percents: &[(&str, u32)]) -> Vec<Share> {
        percents.iter().map(|(key, percent)| Share::new(*percent, sidecar.revision(key))).collect()
    }

    fn service(sidecar: &Sidecar, percents: &[(&str, u32)], sticky: Option<&'static str>) -> Arc<Service> {
        let split = Arc::new(Split::default());
        split.update(shares(sidecar, percents));
        Arc::new(Service::for_tests(split, sticky.map(HeaderName::from_static)))
    }

    fn count(split: &Split, requests: u32, mut between: impl FnMut(u32)) -> BTreeMap<String, u32> {
        let mut counts = BTreeMap::new();
        for request in 0..requests {
            let queue = split.next().unwrap();
            *counts.entry(queue.key().to_owned()).or_default() += 1;
            between(request);
        }
        counts
    }

    #[test]
    fn twenty_thousand_requests_are_split_exactly() {
        let sidecar = Sidecar::new();
        for percent in [1, 10, 50, 99] {
            let split = Split::default();
            split.update(shares(&sidecar, &[("r2", percent), ("r1", 100 - percent)]));
            let counts = count(&split, 20_000, |_| {});
            assert_eq!(counts["r2"], 200 * percent);
            assert_eq!(counts["r1"], 200 * (100 - percent));
        }
    }

    #[test]
    fn updates_of_routes_do_not_tip_the_balance() {
        let sidecar = Sidecar::new();
        let split = Split::default();
        let update = || split.update(shares(&sidecar, &[("r2", 10), ("r1", 90), ("r0", 0)]));
        update();
        // As often as replicas report, in whatever rhythm.
        let counts = count(&split, 20_000, |request| {
            if request % 3 == 0 || request % 7 == 0 {
                update();
            }
        });
        assert_eq!((counts["r2"], counts["r1"], counts.get("r0")), (2_000, 18_000, None));
    }

    #[test]
    fn a_canary_that_grows_gets_its_new_share_at_once() {
        let sidecar = Sidecar::new();
        let split = Split::default();
        for (percent, expected) in [(10, 2_000_i64), (50, 10_000), (100, 20_000), (0, 0)] {
            split.update(shares(&sidecar, &[("r2", percent), ("r1", 100 - percent)]));
            let counts = count(&split, 20_000, |_| {});
            let canary = i64::from(counts.get("r2").copied().unwrap_or_default());
            assert!((canary - expected).abs() <= 2, "{percent}%: {canary}");
        }
    }

    #[test]
    fn clients_stick_and_stay_on_a_canary_that_grows() {
        let sidecar = Sidecar::new();
        let service = service(&sidecar, &[("r2", 0), ("r1", 100)], Some("x-user"));
        let users: Vec<_> = (0..20_000).map(|user| format!("user-{user}")).collect();
        let on_canary = || {
            users.iter().map(|user| {
                let headers =
                    HeaderMap::from_iter([(HeaderName::from_static("x-user"), HeaderValue::from_str(user).unwrap())]);
                let destination = Destination::new(Arc::clone(&service), None, &headers);
                let (once, again) = (destination.pick().unwrap(), destination.pick().unwrap());
                assert_eq!(once.key(), again.key(), "the same client, the same revision");
                once.key() == "r2"
            })
        };
        let mut before: Vec<bool> = on_canary().collect();
        for percent in [1_u32, 10, 50, 100] {
            service.split.update(shares(&sidecar, &[("r2", percent), ("r1", 100 - percent)]));
            let after: Vec<bool> = on_canary().collect();
            assert!(before.iter().zip(&after).all(|(before, after)| !before || *after), "nobody leaves the canary");
            let share = after.iter().filter(|on| **on).count() as f64 / 200.0;
            assert!((share - f64::from(percent)).abs() < 1.0, "{percent}%: {share}");
            before = after;
        }
    }

    #[test]
    fn requests_without_the_header_take_turns() {
        let sidecar = Sidecar::new();
        let service = service(&sidecar, &[("r2", 50), ("r1", 50)], Some("x-user"));
        let destination = Destination::new(service, None, &HeaderMap::new());
        let picked: std::collections::BTreeSet<_> =
            (0..2).map(|_| destination.pick().unwrap().key().to_owned()).collect();
        assert_eq!(picked.len(), 2);
    }

    #[test]
    fn nobody_takes_requests_without_a_share() {
        let sidecar = Sidecar::new();
        for percents in [&[][..], &[("r1", 0)]] {
            for sticky in [None, Some("x-user")] {
                let service = service(&sidecar, percents, sticky);
                let headers =
                    HeaderMap::from_iter([(HeaderName::from_static("x-user"), HeaderValue::from_static("a"))]);
                assert!(Destination::new(service, None, &headers).pick().is_none());
            }
        }
    }

    #[tokio::test]
    async fn a_request_that_waits_for_a_revision_that_left_picks_again() {
        let sidecar = Sidecar::new();
        let service = service(&sidecar, &[("r1", 100)], None);
        let destination = Destination::new(Arc::clone(&service), None, &HeaderMap::new());
        let former = destination.pick().unwrap();
        let moved = {
            let (destination, former) = (destination.clone(), Arc::clone(&former));
            tokio::spawn(async move { destination.lost(&former).await })
        };
        tokio::task::yield_now().await;
        service.split.update(shares(&sidecar, &[("r2", 10), ("r1", 90)]));
        tokio::task::yield_now().await;
        assert!(!moved.is_finished(), "it still has a share");
        service.split.update(shares(&sidecar, &[("r2", 100), ("r1", 0)]));
        moved.await.unwrap();
        assert_eq!(destination.pick().unwrap().key(), "r2");
        let tagged = Destination::new(service, Some(Arc::clone(&former)), &HeaderMap::new());
        assert!(!tagged.left_behind(&former), "a tag means this revision and no other");
    }
}
