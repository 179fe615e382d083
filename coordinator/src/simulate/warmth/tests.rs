use super::*;
use crate::eviction::Rung;

fn short() -> Scenario {
    let length = Duration::from_secs(6 * 3600);
    Scenario { load: Load { length, ..Load::default() }, ..Scenario::default() }
}

#[test]
fn loads_repeat_by_seed_and_follow_zipf() {
    let load = Load { length: Duration::from_secs(5 * 86_400), zipf: 1.0, ..Load::default() };
    let (models, arrivals) = load.trace();
    assert_eq!((models.clone(), arrivals.clone()), load.trace());
    assert_ne!(arrivals, Load { seed: 2, ..load.clone() }.trace().1);
    let expected = load.rate * load.length.as_secs_f64();
    assert!((arrivals.len() as f64 / expected - 1.0).abs() < 0.05, "{} of {expected}", arrivals.len());
    let count = |model: usize| arrivals.iter().filter(|arrival| arrival.model == model).count() as f64;
    assert!((count(0) / count(3) / 4.0 - 1.0).abs() < 0.15, "{} {}", count(0), count(3));
    for model in models {
        let takes: Vec<_> = Rung::ALL.iter().map(|rung| model.takes(*rung)).collect();
        assert!(takes.is_sorted_by(|a, b| a > b), "{takes:?}");
    }
}

#[test]
fn every_request_is_served_and_outcomes_repeat() {
    let scenario = short();
    let outcomes = compare(&scenario).unwrap();
    let requests = scenario.load.trace().1.len() as u64;
    for (policy, outcome) in &outcomes {
        assert_eq!(outcome.requests, requests, "{policy:?}");
        assert!(outcome.waited <= requests && outcome.all_starts() <= outcome.waited, "{outcome:?}");
        assert!(outcome.evictions > 0 && outcome.gpu_minutes > 0.0, "the budgets have to matter: {outcome:?}");
    }
    assert_eq!(outcomes, compare(&scenario).unwrap());
}

#[test]
fn with_room_for_all_every_policy_does_the_same_and_only_the_first_start_is_cold() {
    let scenario = Scenario { nodes: 1, gpus: 64, host: 1 << 50, disk: 1 << 50, ..short() };
    let load = Load { models: 10, ..scenario.load.clone() };
    let outcomes = compare(&Scenario { load, ..scenario }).unwrap();
    assert_eq!(outcomes[0].1, outcomes[1].1);
    assert_eq!(outcomes[0].1, outcomes[2].1);
    let Outcome { starts, evictions, .. } = outcomes[0].1;
    assert_eq!((starts[0], starts[1], starts[2], evictions), (10, 0, 0, 0));
    assert!(starts[3] > 0);
}

#[test]
fn what_cannot_be_simulated_is_named() {
    let error = |scenario: Scenario| compare(&scenario).unwrap_err();
    assert!(error(Scenario { nodes: 0, ..short() }).starts_with("nodes: 0: expected 1 to 1000"));
    assert!(error(Scenario { host: GIB, ..short() }).starts_with("host: 1073741824: expected at least"));
    let load = Load { zipf: f64::NAN, ..Load::default() };
    assert!(error(Scenario { load, ..short() }).starts_with("zipf: NaN"));
}
