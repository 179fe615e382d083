//! Eviction by cost to re-warm × probability of need ÷ bytes, against LRU and LFU in the same run: cold
//! starts by rung, waiting and GPU-minutes, over several loads and seeds; and what one choice costs.
#![allow(clippy::print_stdout, reason = "a benchmark prints")]

use std::{
    hint::black_box,
    time::{Duration, Instant},
};

use pilotlight_coordinator::{
    eviction::{Bytes, Costs, Entry, Footprint, Policy, Rung, held, victims},
    simulate::warmth::{Load, Outcome, Scenario, compare},
};

const GIB: u64 = 1 << 30;
const SEEDS: u64 = 5;

/// Loads and fleets that differ in what should matter.
fn scenarios() -> Vec<(&'static str, Scenario)> {
    let base = Scenario::default;
    let with = |load: Load| Scenario { load, ..base() };
    vec![
        ("as by default", base()),
        ("steady (no bursts)", with(Load { burst_share: 0.0, ..Load::default() })),
        ("bursts only", with(Load { burst_share: 1.0, ..Load::default() })),
        ("flat popularity (Zipf 0.3)", with(Load { zipf: 0.3, ..Load::default() })),
        ("steep popularity (Zipf 1.3)", with(Load { zipf: 1.3, ..Load::default() })),
        ("few GPUs (16)", Scenario { nodes: 2, host: 512 * GIB, disk: 2048 * GIB, ..base() }),
        ("little memory (160 GiB a node)", Scenario { host: 160 * GIB, ..base() }),
        ("little disk (400 GiB a node)", Scenario { disk: 400 * GIB, ..base() }),
        ("three times the requests", with(Load { rate: 0.6, ..Load::default() })),
    ]
}

fn row(name: &str, outcomes: &[Outcome]) {
    let mean = |value: &dyn Fn(&Outcome) -> f64| outcomes.iter().map(value).sum::<f64>() / outcomes.len() as f64;
    let starts = |at: usize| mean(&|outcome| outcome.starts[at] as f64);
    println!(
        "    {name:<11} {:>8.0} {:>8.0} {:>8.0} {:>8.0} {:>10.0} {:>8.1} {:>10.0}",
        starts(3),
        starts(2),
        starts(1),
        starts(0),
        mean(&|outcome| outcome.wait_seconds),
        mean(&|outcome| outcome.wait_p99),
        mean(&|outcome| outcome.gpu_minutes),
    );
}

/// A value of the first policy as a part of another's: mean over seeds, the worst seed, seeds where it is worse.
fn ratio(what: &str, ours: &[Outcome], peer: &[Outcome], value: impl Fn(&Outcome) -> f64) -> String {
    let ratios: Vec<f64> = ours.iter().zip(peer).map(|(ours, peer)| value(ours) / value(peer)).collect();
    let mean = ratios.iter().sum::<f64>() / ratios.len() as f64;
    let worst = ratios.iter().copied().fold(0.0, f64::max);
    let worse = ratios.iter().filter(|ratio| **ratio > 1.0).count();
    format!("{what} {mean:.3} (worst seed {worst:.3}, worse in {worse} of {})", ratios.len())
}

fn policies() -> Result<(), String> {
    println!("means of {SEEDS} seeds, 24 h each; starts by the rung they began from");
    for (name, scenario) in scenarios() {
        let mut outcomes: [Vec<Outcome>; 3] = Default::default();
        for seed in 1..=SEEDS {
            let load = Load { seed, ..scenario.load.clone() };
            let compared = compare(&Scenario { load, ..scenario.clone() })?;
            for (all, (_, outcome)) in outcomes.iter_mut().zip(compared) {
                all.push(outcome);
            }
        }
        println!("  {name}");
        println!(
            "    {:<11} {:>8} {:>8} {:>8} {:>8} {:>10} {:>8} {:>10}",
            "POLICY", "ASLEEP", "STAGED", "CACHED", "ABSENT", "WAIT-S", "P99-S", "GPU-MIN"
        );
        for (policy, outcomes) in ["cost-aware", "LRU", "LFU"].into_iter().zip(&outcomes) {
            row(policy, outcomes);
        }
        for (peer, theirs) in [("LRU", &outcomes[1]), ("LFU", &outcomes[2])] {
            let wait = ratio("wait", &outcomes[0], theirs, |outcome| outcome.wait_seconds);
            let cold = ratio("cold starts", &outcomes[0], theirs, |outcome| outcome.cold_starts() as f64);
            let gpu = ratio("GPU-minutes", &outcomes[0], theirs, |outcome| outcome.gpu_minutes);
            println!("    as a part of {peer}: {wait}\n      {cold}\n      {gpu}");
        }
    }
    Ok(())
}

/// One choice on a node that holds this many revisions, a tenth of which has to step down.
fn choice(count: u64) {
    let entry = |at: u64| {
        let weights = (1 + at * 7919 % 64) * GIB;
        let footprint = Footprint { weights, disk: weights, asleep_host: weights, ..Footprint::default() };
        Entry {
            name: format!("default/m{at:05}"),
            rung: if at.is_multiple_of(3) { Rung::Asleep } else { Rung::Staged },
            footprint,
            costs: Costs::estimated(&footprint),
            need: (at * 104_729 % 1000) as f64 / 1000.0,
            last_used: Duration::from_secs(at),
            uses: at,
            pinned: None,
            in_use: at.is_multiple_of(50),
        }
    };
    let entries: Vec<Entry> = (0..count).map(entry).collect();
    let now = held(&entries);
    let budget = Bytes { host: now.host / 10 * 9, disk: now.disk / 10 * 9, ..now };
    let (mut fastest, mut steps) = (f64::INFINITY, 0);
    for _ in 0..5 {
        let start = Instant::now();
        steps = black_box(victims(black_box(&entries), budget, Policy::CostAware)).steps.len();
        fastest = fastest.min(start.elapsed().as_secs_f64());
    }
    println!("  {count:>6} revisions on a node: {:>8.3} ms, {steps} step down", fastest * 1e3);
}

fn main() -> Result<(), String> {
    policies()?;
    println!("one choice, best of 5");
    [100, 1_000, 10_000].into_iter().for_each(choice);
    Ok(())
}
