use std::time::Duration;

use proptest::prelude::*;

use super::*;

const GIB: u64 = 1 << 30;

fn footprint(weights: u64) -> Footprint {
    Footprint { gpu: 80 * GIB, asleep_host: weights + GIB, weights, disk: weights + GIB, ..Default::default() }
}

fn entry(name: &str, rung: Rung, weights: u64, need: f64) -> Entry {
    let footprint = footprint(weights);
    let costs = Costs::estimated(&footprint);
    let name = name.to_owned();
    let last_used = Duration::ZERO;
    Entry { name, rung, footprint, costs, need, last_used, uses: 0, pinned: None, in_use: false }
}

fn steps(victims: &Victims) -> Vec<(&str, Rung)> {
    victims.steps.iter().map(|step| (step.name.as_str(), step.to)).collect()
}

/// Room for everything but this much less main memory.
fn less_host(entries: &[Entry], bytes: u64) -> Bytes {
    let held = held(entries);
    Bytes { host: held.host - bytes, ..held }
}

#[test]
fn the_least_needed_for_its_bytes_steps_down() {
    let mut entries = vec![entry("a", Rung::Staged, 10 * GIB, 0.9), entry("b", Rung::Staged, 10 * GIB, 0.1)];
    let budget = less_host(&entries, GIB);
    assert_eq!(steps(&victims(&entries, budget, Policy::CostAware)), [("b", Rung::Cached)]);
    // As seldom needed as the other, but very slow to come back.
    entries[0].need = 0.1;
    entries[1].costs.measure(Rung::Cached, Duration::from_secs(600));
    assert_eq!(steps(&victims(&entries, budget, Policy::CostAware)), [("a", Rung::Cached)]);
    entries[0].in_use = true;
    assert_eq!(steps(&victims(&entries, budget, Policy::CostAware)), [("b", Rung::Cached)]);
    entries[1].pinned = Some(Rung::Staged);
    let stuck = victims(&entries, budget, Policy::CostAware);
    assert_eq!((stuck.steps.len(), stuck.past), (0, Bytes { host: GIB, ..Default::default() }));
}

#[test]
fn lru_and_lfu_are_what_they_are_called() {
    let mut entries = vec![entry("a", Rung::Staged, GIB, 0.0), entry("b", Rung::Staged, 50 * GIB, 1.0)];
    (entries[0].last_used, entries[0].uses) = (Duration::from_secs(9), 1);
    (entries[1].last_used, entries[1].uses) = (Duration::from_secs(3), 5);
    let budget = less_host(&entries, GIB);
    assert_eq!(steps(&victims(&entries, budget, Policy::Lru)), [("b", Rung::Cached)]);
    assert_eq!(steps(&victims(&entries, budget, Policy::Lfu)), [("a", Rung::Cached)]);
    assert_eq!(steps(&victims(&entries, budget, Policy::CostAware)), [("a", Rung::Cached)]);
}

#[test]
fn a_gpu_is_freed_by_sleep_and_a_paused_process_has_to_go() {
    let mut entries = vec![entry("a", Rung::Serving, 10 * GIB, 0.1), entry("b", Rung::Serving, 10 * GIB, 0.9)];
    entries[0].in_use = true;
    let budget = Bytes { gpu: 80 * GIB, host: 100 * GIB, disk: 100 * GIB };
    assert_eq!(steps(&victims(&entries, budget, Policy::CostAware)), [("b", Rung::Asleep)]);
    entries[1].footprint.asleep_keeps_gpu = true;
    assert_eq!(steps(&victims(&entries, budget, Policy::CostAware)), [("b", Rung::Staged)]);
    // What sleeps needs main memory; where there is none it goes on.
    entries[1].footprint.asleep_keeps_gpu = false;
    let budget = Bytes { host: 0, ..budget };
    assert_eq!(steps(&victims(&entries, budget, Policy::CostAware)), [("b", Rung::Cached)]);
}

#[test]
fn a_step_that_frees_next_to_nothing_is_not_taken_for_its_own_sake() {
    // Asleep to Staged frees 1 GiB and loses a whole start; to Cached, 41 GiB for little more.
    let entries = [entry("a", Rung::Asleep, 40 * GIB, 0.5)];
    let budget = less_host(&entries, GIB);
    assert_eq!(steps(&victims(&entries, budget, Policy::CostAware)), [("a", Rung::Cached)]);
}

#[test]
fn what_need_not_have_gone_stays() {
    // The small ones are worth less by the byte, but once the large one has to go too, they can stay.
    let mut entries = vec![entry("large", Rung::Staged, 30 * GIB, 0.5)];
    for name in ["s1", "s2"] {
        entries.push(entry(name, Rung::Staged, 2 * GIB, 0.01));
    }
    let budget = less_host(&entries, 20 * GIB);
    assert_eq!(steps(&victims(&entries, budget, Policy::CostAware)), [("large", Rung::Cached)]);
}

#[test]
fn costs_are_measured_and_colder_is_never_faster() {
    let mut costs = Costs::estimated(&footprint(15 * GIB));
    let estimated = Rung::ALL.map(|rung| costs.seconds(rung));
    assert!(estimated.is_sorted_by(|a, b| a > b), "{estimated:?}");
    assert_eq!(costs.seconds(Rung::Serving), 0.0);
    costs.measure(Rung::Cached, Duration::from_secs_f64(2.0 * estimated[1]));
    let ratio = costs.seconds(Rung::Absent) / estimated[0];
    assert!((ratio - 2.0).abs() < 1e-9, "unmeasured ones follow: {ratio}");
    costs.measure(Rung::Asleep, Duration::from_secs(1000));
    assert_eq!(costs.seconds(Rung::Staged), 1000.0);
    for _ in 0..40 {
        costs.measure(Rung::Asleep, Duration::from_secs(3));
    }
    assert!((costs.seconds(Rung::Asleep) - 3.0).abs() < 0.1);
}

#[test]
fn need_is_that_of_a_poisson_process_where_arrivals_are_steady() {
    let mut arrivals = Arrivals::since(Duration::ZERO);
    // Every 100 s for 14 hours.
    for at in 1..=500 {
        arrivals.observe(Duration::from_secs(at * 100));
    }
    let now = Duration::from_secs(50_050);
    assert!((arrivals.long_run(now) * 100.0 - 1.0).abs() < 0.1, "{}", arrivals.long_run(now));
    let (need, poisson) = (arrivals.need(now, Duration::from_secs(100)), 1.0 - f64::exp(-1.0));
    assert!((need - poisson).abs() < 0.1, "{need} {poisson}");
}

#[test]
fn in_bursts_need_is_high_soon_after_a_request_and_low_later() {
    let mut bursts = Arrivals::since(Duration::ZERO);
    let mut steady = Arrivals::since(Duration::ZERO);
    // As many requests: ten within 100 s each two hours, or one each twelve minutes.
    for round in 0..10u64 {
        for request in 0..10 {
            bursts.observe(Duration::from_secs(7_200 * round + 10 * request));
            steady.observe(Duration::from_secs(7_200 * round + 720 * request));
        }
    }
    let minute = Duration::from_secs(60);
    let after = |arrivals: &Arrivals, pause: u64| {
        let last = arrivals.last().unwrap();
        arrivals.need(last + Duration::from_secs(pause), minute)
    };
    assert!(after(&bursts, 5) > 0.5, "{}", after(&bursts, 5));
    assert!(after(&bursts, 3_000) < after(&steady, 5), "{} {}", after(&bursts, 3_000), after(&steady, 5));
    assert!(after(&bursts, 5) > 4.0 * after(&steady, 5), "{} {}", after(&bursts, 5), after(&steady, 5));
}

fn any_rung() -> impl Strategy<Value = Rung> {
    (0usize..5).prop_map(|at| Rung::ALL[at])
}

prop_compose! {
    fn any_entry()(
        rung in any_rung(), pinned in prop::option::weighted(0.2, any_rung()), in_use in prop::bool::weighted(0.2),
        weights in 0u64..40, gpu in 0u64..4, asleep_host in 0u64..40, asleep_keeps_gpu: bool, need in 0.0f64..1.0,
        uses in 0u64..9, last in 0u64..9, took in prop::option::of(0u64..500),
    ) -> Entry {
        let footprint = Footprint { gpu, serving_host: 1, asleep_host, asleep_keeps_gpu, weights, disk: weights + 1 };
        let mut costs = Costs::estimated(&footprint);
        took.into_iter().for_each(|took| costs.measure(Rung::Cached, Duration::from_secs(took)));
        let last_used = Duration::from_secs(last);
        Entry { name: String::new(), rung, footprint, costs, need, last_used, uses, pinned, in_use }
    }
}

fn any_entries() -> impl Strategy<Value = Vec<Entry>> {
    prop::collection::vec(any_entry(), 0..12).prop_map(|mut entries| {
        entries.iter_mut().enumerate().for_each(|(at, entry)| entry.name = format!("e{at:02}"));
        entries
    })
}

fn any_policy() -> impl Strategy<Value = Policy> {
    prop_oneof![Just(Policy::CostAware), Just(Policy::Lru), Just(Policy::Lfu)]
}

fn after(entries: &[Entry], victims: &Victims) -> Vec<Entry> {
    let mut entries = entries.to_vec();
    for step in &victims.steps {
        let entry = entries.iter_mut().find(|entry| entry.name == step.name).unwrap();
        assert_eq!(entry.rung, step.from);
        entry.rung = step.to;
    }
    entries
}

proptest! {
    #[test]
    fn budgets_hold_wherever_they_can(
        entries in any_entries(), policy in any_policy(), gpu in 0u64..20, host in 0u64..200, disk in 0u64..200,
    ) {
        let budget = Bytes { gpu, host, disk };
        let chosen = victims(&entries, budget, policy);
        let left = after(&entries, &chosen);
        prop_assert_eq!(held(&left).past(budget), chosen.past);
        for step in &chosen.steps {
            let entry = entries.iter().find(|entry| entry.name == step.name).unwrap();
            prop_assert!(!entry.in_use && step.to < step.from, "{:?}", step);
            prop_assert!(entry.pinned.is_none_or(|pinned| step.to >= pinned), "{:?}", step);
        }
        // What is still too much of a resource is held by entries of which none can free any of it.
        let resources: [fn(Bytes) -> u64; 3] = [|it| it.gpu, |it| it.host, |it| it.disk];
        for resource in resources {
            let frees = |entry: &Entry| {
                entry.rung.colder().any(|to| {
                    entry.may_go_to(to) && resource(entry.footprint.held(to)) < resource(entry.footprint.held(entry.rung))
                })
            };
            prop_assert!(resource(chosen.past) == 0 || !left.iter().any(frees), "{:?}", chosen);
        }
        if held(&entries).within(budget) {
            prop_assert!(chosen.steps.is_empty());
        }
    }

    #[test]
    fn order_does_not_matter(entries in any_entries(), policy in any_policy(), host in 0u64..200, seed: u64) {
        use rand::{SeedableRng as _, seq::SliceRandom as _};
        let budget = Bytes { gpu: 4, host, disk: 150 };
        let mut shuffled = entries.clone();
        shuffled.shuffle(&mut rand::rngs::StdRng::seed_from_u64(seed));
        prop_assert_eq!(victims(&entries, budget, policy), victims(&shuffled, budget, policy));
    }

    #[test]
    fn nothing_that_was_taken_could_have_stayed(entries in any_entries(), host in 0u64..200) {
        let budget = Bytes { gpu: 4, host, disk: 150 };
        let chosen = victims(&entries, budget, Policy::CostAware);
        for step in &chosen.steps {
            let mut back = after(&entries, &chosen);
            back.iter_mut().filter(|entry| entry.name == step.name).for_each(|entry| entry.rung = step.from);
            let past = held(&back).past(budget);
            prop_assert!(!past.within(chosen.past), "{:?} need not have gone", step);
        }
    }

    #[test]
    fn need_is_a_probability_that_grows_with_the_horizon(
        gaps in prop::collection::vec(0.0f64..20_000.0, 0..60), pause in 0.0f64..1e6, horizon in 1u64..100_000,
    ) {
        let mut arrivals = Arrivals::since(Duration::ZERO);
        let mut now = Duration::ZERO;
        for gap in gaps {
            now += Duration::from_secs_f64(gap);
            arrivals.observe(now);
        }
        now += Duration::from_secs_f64(pause);
        let need = arrivals.need(now, Duration::from_secs(horizon));
        let later = arrivals.need(now, Duration::from_secs(2 * horizon));
        prop_assert!((0.0..=1.0).contains(&need) && need <= later, "{} {}", need, later);
    }
}
