//! What the autoscaler costs: per report, per decision, and a pass over many services.
#![allow(missing_docs, reason = "Criterion's macros make undocumented functions")]

use std::{collections::BTreeMap, hint::black_box, time::Duration};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use pilotlight_coordinator::{
    autoscaler::{Defaults, Observation, Sample, Scaler, ScalerConfig},
    spec::Scaling,
};

fn busy() -> Scaler {
    let fields = Scaling { min_replicas: Some(0), container_concurrency: 10, ..Default::default() };
    let (config, _) = ScalerConfig::resolve(&Defaults::default(), &BTreeMap::new(), &fields).unwrap();
    let mut scaler = Scaler::new(config, Duration::ZERO, Some(4));
    for second in 0..200_u32 {
        let load = f64::from(second % 40);
        scaler.record(Duration::from_secs(second.into()), &Sample { average_concurrency: load, request_rate: load });
    }
    scaler
}

const SEEN: Observation = Observation { ready: Some(4), current: 4, reachable: true, initial_scale_reached: true };

fn one(criterion: &mut Criterion) {
    let sample = Sample { average_concurrency: 7.5, request_rate: 3.0 };
    let mut scaler = busy();
    let mut millis = 200_000;
    criterion.bench_function("report", |bencher| {
        bencher.iter(|| {
            millis += 1;
            scaler.record(Duration::from_millis(millis), black_box(&sample));
        });
    });
    criterion.bench_function("decision", |bencher| {
        bencher.iter(|| {
            millis += 1;
            black_box(scaler.decide(Duration::from_millis(millis), &SEEN))
        });
    });
}

fn pass(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("pass");
    group.sample_size(10);
    for services in [1_000, 10_000, 20_000, 100_000] {
        let mut scalers: Vec<_> = (0..services).map(|_| busy()).collect();
        let mut tick = 200;
        group.throughput(Throughput::Elements(services));
        group.bench_function(BenchmarkId::from_parameter(services), |bencher| {
            bencher.iter(|| {
                tick += 2;
                for scaler in &mut scalers {
                    black_box(scaler.decide(Duration::from_secs(tick), &SEEN));
                }
            });
        });
    }
}

criterion_group!(benches, one, pass);
criterion_main!(benches);
