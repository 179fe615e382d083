//! What the ways to scale are worth, in the simulator: Knative's class, the class for GPU fleets, and
//! pre-warming, on a model that loads for a minute. Same trace, same fleet, same run.
//!
//! `PILOTLIGHT_TRACE` names a CSV trace; without it the Azure LLM trace beside the checkout is used if it is
//! there (`../shared/data`), and made-up patterns in any case.
#![allow(clippy::print_stdout, missing_docs, reason = "a benchmark prints its result")]

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use pilotlight_coordinator::{
    autoscaler::Defaults,
    simulate::{
        ModelProfile, Scenario, Trace, VirtualNode,
        pattern::{Pattern, Shape},
        run, trace,
    },
    spec::{self, ParseOptions, Resource},
};

const MANIFEST: &str = include_str!("../../deploy/examples/llm.yaml");
const CLASS: (&str, &str) = ("autoscaling.knative.dev/class", "gpu.autoscaling.pilotlight.dev");
const PREWARM: (&str, &str) = ("pilotlight.dev/prewarm", "auto");
const SPARE: (&str, &str) = ("pilotlight.dev/spare-replicas", "1");
const WAYS: [(&str, &[(&str, &str)]); 5] = [
    ("kpa", &[]),
    ("kpa, prewarm", &[PREWARM]),
    ("gpu", &[CLASS]),
    ("gpu, spare 1", &[CLASS, SPARE]),
    ("gpu, prewarm", &[CLASS, PREWARM]),
];

fn azure() -> Option<Trace> {
    let beside = concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared/data/azure-llm-2023-code.csv");
    let path = std::env::var_os("PILOTLIGHT_TRACE").map_or_else(|| PathBuf::from(beside), PathBuf::from);
    let file = std::fs::File::open(&path).ok()?;
    Some(trace::read(std::io::BufReader::new(file)).unwrap_or_else(|error| panic!("{}: {error}", path.display())))
}

/// A burst of two minutes every 40 minutes, for a day: what goes to zero in between.
fn recurring() -> Trace {
    let burst = Pattern { shape: Shape::Step, peak: 5.0, length: Duration::from_secs(120), seed: 3 }.trace();
    let mut all = burst.clone();
    all.requests = (0..36)
        .flat_map(|round| {
            let later = Duration::from_secs(round * 2400);
            burst.requests.iter().map(move |request| trace::Request { at: request.at + later, ..*request })
        })
        .collect();
    all
}

fn scenario(trace: &Trace, annotations: &[(&str, &str)]) -> Scenario {
    let options = ParseOptions {
        default_namespace: "",
        strict: false,
        validate_scaling: &|_, _| Vec::new(),
        runtimes: &spec::Runtimes::built_in(),
    };
    let Some(Resource::InferenceService(mut service)) = spec::parse(MANIFEST, options).remove(0).object else {
        panic!("the example must parse")
    };
    for (key, value) in annotations {
        service.predictor.template.annotations.insert((*key).to_owned(), (*value).to_owned());
    }
    Scenario {
        services: vec![*service],
        scaling: Defaults { scale_to_zero_pod_retention_period: Duration::from_secs(300), ..Defaults::default() },
        nodes: vec![VirtualNode::default()],
        trace: trace.clone(),
        model: ModelProfile { load_time: Duration::from_secs(60), ..Default::default() },
        tick: Duration::from_secs(2),
        report_interval: Duration::from_secs(1),
        queue_limit: 10_000,
        tail: Duration::from_secs(600),
    }
}

fn main() {
    let made = |shape| Pattern { shape, peak: 30.0, length: Duration::from_secs(1800), seed: 1 }.trace();
    let mut traces = vec![
        ("step, 3 → 30 → 3 requests/s", made(Shape::Step)),
        ("spike of a minute, 3 → 30 requests/s", made(Shape::Spike)),
        ("sine, 0 to 30 requests/s", made(Shape::Sine)),
        ("2 minutes of load every 40 minutes, a day", recurring()),
    ];
    traces.extend(azure().map(|trace| ("recorded trace", trace)));
    println!("the model loads for 60 s; retention 5 min, else the fleet's defaults; ratios are to kpa");
    for (name, trace) in &traces {
        println!("{name}: {} requests", trace.requests.len());
        let mut kpa = None;
        for (way, annotations) in WAYS {
            let began = Instant::now();
            let outcome = run(&scenario(trace, annotations)).unwrap();
            let took = began.elapsed().as_secs_f64();
            let service = &outcome.services[0];
            let (wait, minutes) = (service.wait.p99, service.gpu_minutes);
            let (kpa_wait, kpa_minutes) = *kpa.get_or_insert((wait, minutes));
            println!(
                "  {way:<13} p99 wait {wait:6.2} s ({:4.2})  GPU-minutes {minutes:6.1} ({:4.2})  replicas past the need {:>2}  \
                 cold {:>4}  shed {:>4}  [{:.0} ms per simulated hour]",
                wait / kpa_wait.max(0.01),
                minutes / kpa_minutes,
                service.ordered_past_need,
                service.cold_requests,
                service.shed,
                took * 1e3 / (outcome.seconds / 3600.0),
            );
        }
    }
}
