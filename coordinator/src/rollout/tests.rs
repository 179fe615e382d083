//! KServe's rules one by one, and what must hold whatever happens.

use std::{collections::BTreeMap, time::Duration};

use pilotlight_proto::fleet::v1::{ReplicaPhase, ReplicaStatus};
use proptest::prelude::*;

use super::{
    History, Policy, Scene, Share, Side, Signs, Tag, Target, by_shares,
    policy::{self, Amount},
    progress::{needed_in_place, needs, share_in_place},
    room::room,
    shift, split,
};

const DEADLINE: Duration = Duration::from_secs(600);

/// A service as its owner sees it: what is applied and what becomes ready.
#[derive(Debug, Clone, Copy, Default)]
struct Service {
    history: History,
    canary: Option<u8>,
}

impl Service {
    fn settle(&mut self) {
        self.history = self.history.settled(self.canary);
    }

    /// Another template, with or without another percent.
    fn apply(&mut self, canary: Option<u8>) {
        self.history.created += 1;
        self.set(canary);
    }

    /// Another percent, the same template.
    fn set(&mut self, canary: Option<u8>) {
        self.canary = canary;
        self.settle();
    }

    /// The newest revision is ready.
    fn ready(&mut self) {
        self.history.ready = Some(self.history.created);
        self.settle();
    }

    fn shares(&self) -> Vec<(u32, u8)> {
        split(&self.history, self.canary, false).iter().map(|target| (target.revision, target.percent)).collect()
    }
}

/// One revision rolled out.
fn first() -> Service {
    let mut service = Service::default();
    service.apply(None);
    service.ready();
    service
}

#[test]
fn the_old_revision_serves_until_the_new_one_is_ready() {
    let mut service = Service::default();
    service.apply(None);
    assert_eq!(service.shares(), [], "nothing was ever ready");
    service.ready();
    assert_eq!(service.shares(), [(1, 100)]);
    service.apply(None);
    assert_eq!(service.shares(), [(1, 100)]);
    service.ready();
    assert_eq!(service.shares(), [(2, 100)]);
    assert_eq!((service.history.rolledout, service.history.previous), (Some(2), Some(1)));
}

#[test]
fn a_first_revision_has_everything_whatever_the_percent() {
    for percent in [0, 10, 100] {
        let mut service = Service::default();
        service.apply(Some(percent));
        service.ready();
        assert_eq!(service.shares(), [(1, 100)], "{percent}");
        assert_eq!(service.history.rolledout, Some(1));
        service.settle();
        assert_eq!(service.shares(), [(1, 100)], "settling again changes nothing");
    }
}

#[test]
fn a_canary_grows_and_is_promoted() {
    let mut service = first();
    service.apply(Some(10));
    assert_eq!(service.shares(), [(1, 100)], "not ready yet");
    service.ready();
    assert_eq!(service.shares(), [(2, 10), (1, 90)]);
    service.set(Some(50));
    assert_eq!(service.shares(), [(2, 50), (1, 50)]);
    assert_eq!(service.history.rolledout, Some(1));
    service.set(None);
    assert_eq!(service.shares(), [(2, 100)]);
    assert_eq!((service.history.rolledout, service.history.previous), (Some(2), Some(1)));
}

#[test]
fn a_hundred_promotes_as_leaving_the_field_out_does() {
    let mut service = first();
    service.apply(Some(10));
    service.ready();
    service.set(Some(100));
    assert_eq!(service.shares(), [(2, 100)]);
    assert_eq!((service.history.rolledout, service.history.previous), (Some(2), Some(1)));
}

#[test]
fn zero_pins_the_last_good_one_and_is_not_unset() {
    let mut service = first();
    service.apply(Some(20));
    service.ready();
    service.set(Some(0));
    assert_eq!(service.shares(), [(2, 0), (1, 100)]);
    assert_eq!(service.history.rolledout, Some(1));
}

#[test]
fn after_a_full_promotion_a_lower_percent_goes_one_step_back() {
    let mut service = first();
    service.apply(None);
    service.ready();
    service.set(Some(0));
    assert_eq!(service.shares(), [(2, 0), (1, 100)]);
    service.set(Some(30));
    assert_eq!(service.shares(), [(2, 30), (1, 70)], "still a canary on the former base");
    service.set(None);
    assert_eq!(service.shares(), [(2, 100)], "and promoted again");
    assert_eq!((service.history.rolledout, service.history.previous), (Some(2), Some(1)));
}

#[test]
fn there_is_no_way_back_from_the_first_revision() {
    let mut service = first();
    service.set(Some(0));
    assert_eq!(service.shares(), [(1, 100)]);
}

#[test]
fn another_template_during_a_canary_replaces_the_canary_and_keeps_the_base() {
    let mut service = first();
    service.apply(Some(10));
    service.ready();
    service.apply(Some(10));
    assert_eq!(service.shares(), [(2, 10), (1, 90)], "until the third is ready");
    service.ready();
    assert_eq!(service.shares(), [(3, 10), (1, 90)]);
    assert_eq!(service.history.rolledout, Some(1));
}

#[test]
fn a_canary_on_its_way_does_not_send_the_base_back() {
    // kserve/kserve#1968: the base must not fall back to something older.
    let mut service = first();
    service.apply(None);
    service.ready();
    service.apply(Some(10));
    assert_eq!(service.shares(), [(2, 100)], "the second serves while the third starts");
    assert_eq!(service.history.rolledout, Some(2));
    service.ready();
    assert_eq!(service.shares(), [(3, 10), (2, 90)]);
    assert_eq!((service.history.rolledout, service.history.previous), (Some(2), Some(1)));
}

#[test]
fn consecutive_canaries_leave_nothing_behind() {
    let mut service = first();
    for next in 2..6 {
        service.apply(Some(10));
        service.ready();
        assert_eq!(service.shares(), [(next, 10), (next - 1, 90)]);
        service.set(None);
        assert_eq!(service.shares(), [(next, 100)]);
    }
}

#[test]
fn tags() {
    let mut service = first();
    service.apply(Some(10));
    service.ready();
    let tags =
        |tagged| split(&service.history, service.canary, tagged).iter().map(|t| t.tag.clone()).collect::<Vec<_>>();
    assert_eq!(tags(false), [None, Some(Tag::Prev)]);
    assert_eq!(tags(true), [Some(Tag::Latest), Some(Tag::Prev)]);
    assert_eq!(split(&first().history, None, true)[0].tag, Some(Tag::Latest));
}

#[test]
fn a_shift_takes_from_the_newest_ready_one() {
    let mut targets = vec![Target { revision: 1, percent: 100, latest: true, tag: None }];
    shift(&mut targets, 2, 25);
    assert_eq!(
        targets,
        [
            Target { revision: 2, percent: 25, latest: true, tag: None },
            Target { revision: 1, percent: 75, latest: false, tag: Some(Tag::Prev) },
        ]
    );
    let mut none = Vec::new();
    shift(&mut none, 2, 25);
    assert_eq!(none, []);
}

#[test]
fn policies_are_read_and_checked() {
    let given = |pairs: &[(&str, &str)]| {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect::<BTreeMap<_, _>>()
    };
    let annotations = given(&[
        (policy::PROGRESS_DEADLINE, "1h5m"),
        (policy::TAG_ROUTING, "true"),
        (policy::STICKY_HEADER, "X-User"),
        (policy::MAX_SURGE, "25%"),
        (policy::MAX_UNAVAILABLE, "2"),
    ]);
    assert_eq!(policy::check(&annotations, "a"), []);
    assert_eq!(
        Policy::resolve([&annotations], DEADLINE),
        Policy {
            progress_deadline: Duration::from_secs(3900),
            sticky_header: Some("x-user".into()),
            max_surge: Some(Amount::Percent(25)),
            max_unavailable: Some(2),
        }
    );
    assert!(policy::tag_latest([&annotations]));
    assert_eq!(Policy::resolve([&BTreeMap::new()], DEADLINE), Policy::new(DEADLINE));
    assert!(!policy::tag_latest([&BTreeMap::new()]));
    let later = given(&[(policy::MAX_SURGE, "1")]);
    assert_eq!(Policy::resolve([&annotations, &later], DEADLINE).max_surge, Some(Amount::Replicas(1)));
    for (key, value) in [
        (policy::PROGRESS_DEADLINE, "soon"),
        (policy::PROGRESS_DEADLINE, "10ms"),
        (policy::TAG_ROUTING, "yes"),
        (policy::STICKY_HEADER, "x user"),
        (policy::MAX_SURGE, "-1"),
        (policy::MAX_SURGE, "a%"),
        (policy::MAX_UNAVAILABLE, "10%"),
    ] {
        let found = policy::check(&given(&[(key, value)]), "metadata.annotations");
        assert_eq!(found.len(), 1, "{key}: {value}");
        assert_eq!(found[0].field, format!("metadata.annotations[{key}]"));
    }
    assert_eq!((Amount::Percent(25).of(4), Amount::Percent(25).of(5), Amount::Replicas(3).of(5)), (1, 2, 3));
}

fn status(phase: ReplicaPhase, message: &str, restarts: u32) -> ReplicaStatus {
    ReplicaStatus { phase: phase.into(), message: message.into(), restarts, ..Default::default() }
}

#[test]
fn loading_is_progress_and_crashing_in_a_loop_is_not() {
    let mut signs = Signs::default();
    assert!(signs.progress(&status(ReplicaPhase::Pending, "", 0)));
    assert!(signs.progress(&status(ReplicaPhase::Starting, "", 0)));
    assert!(signs.progress(&status(ReplicaPhase::Starting, "loaded 10 of 80 layers", 0)));
    assert!(signs.progress(&status(ReplicaPhase::Starting, "loaded 20 of 80 layers", 0)));
    for restarts in 1..5 {
        assert!(!signs.progress(&status(ReplicaPhase::Failed, &format!("again in {restarts}s"), restarts)));
        assert!(!signs.progress(&status(ReplicaPhase::Starting, "", restarts)));
        assert!(!signs.progress(&status(ReplicaPhase::Starting, "loaded 10 of 80 layers", restarts)));
    }
    assert!(signs.progress(&status(ReplicaPhase::Starting, "loaded 30 of 80 layers", 5)), "further than before");
    assert!(signs.progress(&status(ReplicaPhase::Ready, "", 5)));
}

#[test]
fn signs_do_not_grow_without_end() {
    let mut signs = Signs::default();
    let progress = (0..5000).filter(|n| signs.progress(&status(ReplicaPhase::Starting, &n.to_string(), 0))).count();
    assert_eq!(progress, 1024);
}

#[test]
fn bytes_that_come_are_a_sign_and_bytes_that_come_again_are_none() {
    let mut signs = Signs::default();
    let fetching = |fetched_bytes, fetch_total_bytes| ReplicaStatus {
        fetched_bytes,
        fetch_total_bytes,
        ..status(ReplicaPhase::Fetching, "fetching model: 3% of 99999999 MiB", 0)
    };
    assert!(signs.progress(&fetching(100, 1000)));
    assert!(signs.progress(&fetching(101, 1000)), "though the percent is the same");
    assert!(!signs.progress(&fetching(101, 1000)), "it stands still");
    assert!(!signs.progress(&fetching(50, 1000)), "it starts over");
    assert!(!signs.progress(&status(ReplicaPhase::Failed, "ModelChecksumMismatch", 1)));
    assert!(!signs.progress(&fetching(101, 1000)));
    assert!(signs.progress(&fetching(102, 1000)), "further than before");
    assert!(signs.progress(&fetching(10, 2000)), "the next model");
}

/// A service on a fleet of `gpus`, one per replica: `old` replicas serve, `new` are asked for.
#[derive(Debug, Clone)]
struct Fleet {
    gpus: u32,
    wanted: (u32, u32),
    min: u32,
    canary: u8,
    old: u32,
    new: u32,
    new_ready: u32,
    in_place: bool,
    proven: bool,
    policy: Policy,
}

impl Fleet {
    fn of(gpus: u32, replicas: u32, min: u32) -> Self {
        Self {
            gpus,
            wanted: (replicas, replicas),
            min,
            canary: 100,
            old: replicas,
            new: 0,
            new_ready: 0,
            in_place: false,
            proven: false,
            policy: Policy::new(DEADLINE),
        }
    }

    /// Percent that the new one gets.
    fn share(&self) -> u8 {
        match () {
            () if self.proven => self.canary,
            () if self.in_place => share_in_place(self.wanted.1, self.new_ready, self.canary),
            () => 0,
        }
    }

    /// One step of the loop: place, decide, drain, become ready. False where nothing changed.
    fn step(&mut self) -> bool {
        let before = format!("{self:?}");
        let enough = needs(self.wanted.1, self.canary, 100).max(1);
        let side = Side {
            number: 1,
            wanted: self.wanted.0,
            live: self.old,
            share: 100 - self.share(),
            full_share: if self.proven { 100 - self.canary } else { 100 },
            min: self.min,
        };
        let most = |fleet: &Self, unplaced| {
            let others = [side];
            room(&Scene {
                wanted: fleet.wanted.1,
                enough,
                live: fleet.new,
                starting: fleet.new - fleet.new_ready,
                unplaced,
                in_place: fleet.in_place && !fleet.proven,
                proven: fleet.proven,
                others: if fleet.old > 0 { &others } else { &[] },
                draining: 0,
                policy: &fleet.policy,
            })
        };
        let allowed = most(self, false).most.map_or(self.wanted.1, |most| most.min(self.wanted.1));
        let placed = allowed.saturating_sub(self.new).min(self.gpus - self.old - self.new);
        self.new += placed;
        let unplaced = self.new < allowed;
        let decided = most(self, unplaced);
        self.in_place |= !self.proven && decided.partial;
        if placed == 0 && decided.give.contains(&1) {
            self.in_place = true;
            self.old -= 1;
        }
        self.new_ready = self.new;
        let needed = if self.in_place { needed_in_place(self.wanted.1, self.canary) } else { self.wanted.1 };
        self.proven |= self.new_ready >= needed;
        before != format!("{self:?}")
    }

    fn run(mut self) -> Vec<Self> {
        let mut states = vec![self.clone()];
        while self.step() {
            states.push(self.clone());
            assert!(states.len() < 1000, "does not come to rest");
        }
        states
    }
}

#[test]
fn a_roll_out_needs_no_second_set_of_gpus() {
    let states = Fleet::of(4, 4, 4).run();
    let end = states.last().unwrap();
    assert_eq!((end.old, end.new, end.proven), (0, 4, true), "{end:?}");
    assert!(states.iter().all(|state| state.old + state.new_ready >= 3), "never more than one short");
    assert!(states.iter().all(|state| state.share() == 0 || state.new_ready > 0), "only what is ready serves");
}

#[test]
fn with_spare_gpus_nobody_gives_way_before_the_new_one_is_ready() {
    let states = Fleet::of(8, 4, 4).run();
    assert!(states.iter().all(|state| state.old == 4 && !state.in_place), "{states:?}");
    assert!(states.last().unwrap().proven);
}

#[test]
fn the_only_replica_stays_where_one_was_promised() {
    let end = Fleet::of(1, 1, 1).run().pop().unwrap();
    assert_eq!((end.old, end.new), (1, 0));
    let scene = Scene {
        wanted: 1,
        enough: 1,
        live: 0,
        starting: 0,
        unplaced: true,
        in_place: false,
        proven: false,
        others: &[Side { number: 1, wanted: 1, live: 1, share: 100, full_share: 100, min: 1 }],
        draining: 0,
        policy: &Policy::new(DEADLINE),
    };
    assert!(room(&scene).kept_warm, "and it is said why");
}

#[test]
fn the_only_replica_goes_where_none_was_promised_or_a_gap_is_allowed() {
    let end = Fleet::of(1, 1, 0).run().pop().unwrap();
    assert_eq!((end.old, end.new, end.proven), (0, 1, true));
    let mut allowed = Fleet::of(1, 1, 1);
    allowed.policy.max_unavailable = Some(1);
    let end = allowed.run().pop().unwrap();
    assert_eq!((end.old, end.new, end.proven), (0, 1, true));
}

#[test]
fn no_surge_means_one_for_one_although_there_is_room() {
    let mut fleet = Fleet::of(8, 3, 3);
    fleet.policy.max_surge = Some(Amount::Replicas(0));
    let states = fleet.run();
    assert!(states.iter().all(|state| state.old + state.new <= 3), "{states:?}");
    let end = states.last().unwrap();
    assert_eq!((end.old, end.new, end.proven), (0, 3, true));
}

#[test]
fn a_canary_takes_no_more_places_than_its_share_needs() {
    let mut fleet = Fleet::of(4, 4, 4);
    fleet.canary = 10;
    let end = fleet.run().pop().unwrap();
    assert_eq!((end.old, end.new, end.proven), (3, 1, true), "{end:?}");
}

proptest! {
    #[test]
    fn shares_add_up_and_only_ready_revisions_have_one(
        steps in proptest::collection::vec((0u8..3, proptest::option::of(0u8..=100)), 1..40),
        tagged: bool,
    ) {
        let mut service = Service::default();
        let mut ever_ready = std::collections::BTreeSet::new();
        service.apply(None);
        for (what, canary) in steps {
            let before = service.history;
            match what {
                0 => service.apply(canary),
                1 => service.set(canary),
                _ => {
                    service.ready();
                    ever_ready.insert(service.history.created);
                }
            }
            let targets = split(&service.history, service.canary, tagged);
            prop_assert_eq!(&targets, &split(&service.history, service.canary, tagged), "the same again");
            let total: u32 = targets.iter().map(|target| u32::from(target.percent)).sum();
            prop_assert_eq!(total, if ever_ready.is_empty() { 0 } else { 100 });
            prop_assert!(targets.iter().all(|target| ever_ready.contains(&target.revision)), "{:?}", targets);
            prop_assert!(targets.iter().filter(|target| target.latest).count() <= 1);
            prop_assert!(targets.iter().all(|target| service.history.needs(target.revision)), "kept from removal");
            prop_assert_eq!(service.history.settled(service.canary), service.history, "settled is settled");
            if what == 0 {
                prop_assert!(service.history.rolledout.is_none_or(|number| number <= before.created));
            }
        }
    }

    #[test]
    fn a_shift_keeps_the_sum(base in 0u8..=100, percent in 0u8..=100, canary in any::<bool>()) {
        let mut targets = vec![Target { revision: 2, percent: base, latest: true, tag: None }];
        if canary || base < 100 {
            targets.push(Target { revision: 1, percent: 100 - base, latest: false, tag: Some(Tag::Prev) });
        }
        shift(&mut targets, 3, percent);
        let total: u32 = targets.iter().map(|target| u32::from(target.percent)).sum();
        prop_assert_eq!(total, 100);
        prop_assert!(targets.iter().filter(|target| target.latest).count() == 1);
    }

    #[test]
    fn a_roll_out_always_comes_to_rest_within_its_limits(
        replicas in 1u32..12,
        spare in 0u32..12,
        min in 0u32..2,
        canary in 1u8..=100,
        surge in proptest::option::of(0u32..4),
        missing in proptest::option::of(1u32..3),
    ) {
        let mut fleet = Fleet::of(replicas + spare, replicas, min * replicas);
        fleet.canary = canary;
        fleet.policy.max_surge = surge.map(Amount::Replicas);
        fleet.policy.max_unavailable = missing;
        let states = fleet.run();
        for state in &states {
            prop_assert!(state.old + state.new <= state.gpus, "over capacity: {:?}", state);
            if let Some(surge) = surge {
                prop_assert!(state.old + state.new <= replicas + surge, "over the surge: {:?}", state);
            }
            let least = needs(replicas, 100 - state.share(), 100).saturating_sub(missing.unwrap_or(1));
            prop_assert!(state.share() == 100 || state.old >= least, "too few for their share: {:?}", state);
            if min > 0 && missing.is_none() && !state.proven {
                prop_assert!(state.old > 0, "the last warm one went too early: {:?}", state);
            }
        }
        let end = states.last().unwrap();
        let stuck = replicas == 1 && min > 0 && missing.is_none() && (spare == 0 || surge == Some(0));
        prop_assert!(end.proven || stuck, "waits for ever: {:?}", end);
    }
}

#[test]
fn a_knative_services_traffic_is_as_it_says() {
    let share = |revision, percent, tag: &str| Share { revision, percent, tag: tag.into() };
    let shares = [share(Some(1), 70, "old"), share(None, 30, ""), share(Some(3), 0, "candidate")];
    let told = |ready: &[u32]| {
        let targets = by_shares(ready.last().copied(), &shares, |revision| ready.contains(&revision));
        targets.iter().map(|t| (t.revision, t.percent, t.tag.as_ref().map(ToString::to_string))).collect::<Vec<_>>()
    };
    let [old, candidate] = ["old", "candidate"].map(|tag| Some(tag.to_owned()));
    assert_eq!(told(&[]), []);
    assert_eq!(told(&[1, 2, 3]), [(3, 30, None), (1, 70, old.clone()), (3, 0, candidate.clone())]);
    // The third has never been ready: the second stands in for it.
    assert_eq!(told(&[1, 2]), [(2, 30, None), (1, 70, old), (2, 0, candidate)]);
}
