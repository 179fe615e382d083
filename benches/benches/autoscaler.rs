//! What the autoscaler costs: per report, per decision, and a tick of many services; and that the cost of a
//! tick grows with their number and no faster.
#![allow(clippy::print_stdout, missing_docs, reason = "a benchmark prints its result")]

use std::{
    collections::BTreeMap,
    hint::black_box,
    time::{Duration, Instant},
};

use pilotlight_benches::median;
use pilotlight_coordinator::{
    autoscaler::{Class, Defaults, Observation, Sample, Scaler, ScalerConfig},
    spec::Scaling,
};

const ROUNDS: usize = 7;
const SERVICES: [usize; 4] = [1_000, 10_000, 20_000, 100_000];
const SEEN: Observation = Observation {
    ready: Some(4),
    starting: 1,
    current: 5,
    fits: None,
    reachable: true,
    initial_scale_reached: true,
    load_time: Duration::from_secs(60),
};

fn config(class: Class, prewarm: bool) -> ScalerConfig {
    let fields = Scaling { min_replicas: Some(0), container_concurrency: 10, ..Default::default() };
    let (config, _) = ScalerConfig::resolve(&Defaults::default(), &BTreeMap::new(), &fields).unwrap();
    ScalerConfig { class, prewarm, ..config }
}

fn sample(second: u64) -> Sample {
    let load = (second % 40) as f64;
    Sample { average_concurrency: load, request_rate: load, completion_rate: load, seconds: 1.0, ..Default::default() }
}

/// With full windows, at second 200.
fn busy(config: &ScalerConfig) -> Scaler {
    let mut scaler = Scaler::new(config.clone(), Duration::ZERO, Some(4));
    for second in 0..200 {
        scaler.record(Duration::from_secs(second), &sample(second));
    }
    scaler
}

/// Nanoseconds per report and per decision of one service, windows full.
fn one(config: &ScalerConfig) -> (f64, f64) {
    const TIMES: u64 = 20_000;
    let (mut reports, mut decisions) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let mut scaler = busy(config);
        let began = Instant::now();
        for second in 200..200 + TIMES {
            scaler.record(Duration::from_secs(second), black_box(&sample(second)));
        }
        reports.push(began.elapsed().as_nanos() as f64 / TIMES as f64);
        let now = Duration::from_secs(200 + TIMES - 1);
        let began = Instant::now();
        for nanos in 0..TIMES {
            black_box(scaler.decide(now + Duration::from_nanos(nanos), &SEEN));
        }
        decisions.push(began.elapsed().as_nanos() as f64 / TIMES as f64);
    }
    (median(reports), median(decisions))
}

/// Nanoseconds per service of a tick: two reports and a decision each.
fn tick(config: &ScalerConfig, services: usize) -> f64 {
    let mut scalers: Vec<Scaler> = (0..services).map(|_| busy(config)).collect();
    let mut second = 200;
    let rounds = (0..ROUNDS).map(|_| {
        let began = Instant::now();
        for scaler in &mut scalers {
            for second in [second, second + 1] {
                scaler.record(Duration::from_secs(second), &sample(second));
            }
            black_box(scaler.decide(Duration::from_secs(second + 1), &SEEN));
        }
        second += 2;
        began.elapsed().as_nanos() as f64 / services as f64
    });
    median(rounds)
}

fn main() {
    println!("autoscaler, windows of 180 s and 23 s full, medians of {ROUNDS} rounds");
    for (name, class, prewarm) in
        [("kpa", Class::Kpa, false), ("gpu", Class::Gpu, false), ("gpu with prewarm", Class::Gpu, true)]
    {
        let config = config(class, prewarm);
        let (report, decision) = one(&config);
        println!("  {name}: {report:.0} ns per report, {decision:.0} ns per decision");
    }
    let config = config(Class::Kpa, false);
    let mut first = None;
    for services in SERVICES {
        let each = tick(&config, services);
        let first = *first.get_or_insert(each);
        println!(
            "  tick of {services:>6} services (2 reports, 1 decision each): {:8.2} ms, {each:.0} ns per service, {:.2} of the cost at {}",
            each * services as f64 / 1e6,
            each / first,
            SERVICES[0],
        );
    }
}
