//! The simulator against what must hold, and the two classes against each other.

use std::time::Duration;

use super::{
    ModelProfile, Outcome, Scenario, ScenarioError, ServiceOutcome, Trace, VirtualNode,
    pattern::{Pattern, Shape},
    run, run_metered,
};
use crate::{
    autoscaler::Defaults,
    spec::{self, InferenceService},
};

fn service(annotations: &[(&str, &str)], gpus: u32) -> InferenceService {
    let annotations: String = annotations.iter().map(|(key, value)| format!("    {key}: {value:?}\n")).collect();
    let manifest = format!(
        "apiVersion: serving.kserve.io/v1beta1\nkind: InferenceService\nmetadata:\n  name: llm\n  annotations:\n    \
         a: b\n{annotations}spec:\n  predictor:\n    minReplicas: 0\n    containerConcurrency: 10\n    containers:\n    \
         - {{name: kserve-container, image: x, command: [x], resources: {{limits: {{nvidia.com/gpu: {gpus}}}}}}}\n"
    );
    spec::tests::service(&manifest, false)
}

fn scenario(trace: Trace, annotations: &[(&str, &str)]) -> Scenario {
    Scenario {
        services: vec![service(annotations, 1)],
        scaling: Defaults::default(),
        nodes: vec![VirtualNode::default()],
        trace,
        model: ModelProfile { load_time: Duration::from_secs(60), ..Default::default() },
        tick: Duration::from_secs(2),
        report_interval: Duration::from_secs(1),
        queue_limit: 100_000,
        tail: Duration::from_secs(900),
    }
}

fn only(outcome: &Outcome) -> &ServiceOutcome {
    let [service] = &outcome.services[..] else { panic!("{} services", outcome.services.len()) };
    service
}

fn pattern(shape: Shape, peak: f64) -> Trace {
    Pattern { shape, peak, length: Duration::from_secs(1800), seed: 1 }.trace()
}

const GPU: (&str, &str) = ("autoscaling.knative.dev/class", "gpu.autoscaling.pilotlight.dev");

#[test]
fn every_request_is_accounted_for_and_the_same_scenario_ends_the_same() {
    for shape in [Shape::Step, Shape::Spike, Shape::Sine] {
        let scenario = scenario(pattern(shape, 30.0), &[]);
        let outcome = run(&scenario).unwrap();
        let service = only(&outcome);
        assert_eq!(service.requests, scenario.trace.requests.len() as u64);
        assert_eq!(service.served + service.shed + service.timed_out, service.requests);
        assert!(service.peak_need > 0 && service.peak_replicas >= service.peak_need, "{service:?}");
        assert!((service.gpu_minutes - service.replica_minutes).abs() < 1e-9, "one GPU each");
        assert_eq!(run(&scenario).unwrap(), outcome);
    }
}

#[test]
fn a_service_wakes_and_goes_back_to_zero() {
    let mut scenario =
        scenario(pattern(Shape::Spike, 5.0), &[("autoscaling.knative.dev/scale-to-zero-pod-retention-period", "0s")]);
    scenario.trace.requests.truncate(3);
    let outcome = run(&scenario).unwrap();
    let service = only(&outcome);
    assert_eq!((service.replicas_ordered, service.cold_starts, service.peak_replicas), (1, 1, 1));
    assert_eq!(service.cold_requests, 3);
    assert!((service.wait.max - 60.0).abs() < 3.0, "the first waits for the load: {:?}", service.wait);
    let last = service.timeline.last().unwrap();
    assert_eq!((last.ready, last.wanted), (0, 0));
}

#[test]
fn the_gpu_class_orders_less_past_the_need_and_waits_no_longer() {
    for (shape, peak) in [(Shape::Step, 30.0), (Shape::Spike, 60.0)] {
        let outcome = |annotations: &[(&str, &str)]| run(&scenario(pattern(shape, peak), annotations)).unwrap();
        let (kpa, gpu) = (outcome(&[]), outcome(&[GPU]));
        let (kpa, gpu) = (only(&kpa), only(&gpu));
        assert!(gpu.ordered_past_need < kpa.ordered_past_need, "{} < {}", gpu.ordered_past_need, kpa.ordered_past_need);
        assert!(gpu.gpu_minutes < kpa.gpu_minutes, "{} < {}", gpu.gpu_minutes, kpa.gpu_minutes);
        assert_eq!(gpu.served, kpa.served);
    }
}

#[test]
fn a_fleet_without_room_says_so_and_serves_with_what_there_is() {
    let mut full = scenario(pattern(Shape::Step, 60.0), &[GPU]);
    full.nodes = vec![VirtualNode { name: "only".into(), count: 1, gpus: 4, ..Default::default() }];
    let outcome = run(&full).unwrap();
    let service = only(&outcome);
    assert_eq!(service.peak_replicas, 4);
    assert!(service.timeline.iter().all(|point| point.ready + point.starting + point.draining <= 4));
}

#[test]
fn mistakes_are_named() {
    let mut unknown = scenario(pattern(Shape::Step, 1.0), &[]);
    unknown.trace.services = vec!["other".into()];
    assert!(matches!(run(&unknown), Err(ScenarioError::UnknownService { asked, .. }) if asked == "other"));
    let mut tick = scenario(pattern(Shape::Step, 1.0), &[]);
    tick.tick = Duration::ZERO;
    assert_eq!(run(&tick), Err(ScenarioError::Interval("tick")));
    let settings = scenario(pattern(Shape::Step, 1.0), &[("autoscaling.knative.dev/window", "1s")]);
    assert!(run(&settings).unwrap_err().to_string().contains("autoscaling.knative.dev/window"));
}

/// Usage of a scripted day, with a leader that dies each 50 minutes, equals what the virtual machines did.
#[test]
fn a_day_is_metered_to_the_minute_over_fail_overs() {
    use std::collections::BTreeMap;

    use pilotlight_proto::fleet::v1::ReplicaPhase;

    use crate::usage::UsageState;

    const MINUTE: u64 = 60_000;
    let day = Duration::from_secs(86_400);
    let trace = Pattern { shape: Shape::Sine, peak: 1.0, length: day, seed: 3 }.trace();
    let mut scenario = scenario(trace, &[]);
    scenario.model.request_time = day / 1440;
    let metered = run_metered(&scenario, Duration::from_secs(3_000)).unwrap();
    assert!(metered.lives.len() > 20, "{} replicas are little to meter", metered.lives.len());
    assert_eq!(metered.report.gaps, []);

    let end = metered.end.as_millis() as u64;
    let mut expected: BTreeMap<(u64, UsageState), (u64, u64)> = BTreeMap::new();
    for life in &metered.lives {
        let ready = |phase| matches!(phase, ReplicaPhase::Ready | ReplicaPhase::Draining);
        let state = |phase| if ready(phase) { UsageState::Serving } else { UsageState::Loading };
        let mut minutes: BTreeMap<u64, UsageState> = BTreeMap::new();
        for (index, (from, phase)) in life.iter().enumerate().filter(|(_, (_, phase))| *phase != ReplicaPhase::Stopped)
        {
            let until = life.get(index + 1).map_or(end, |(at, _)| at.as_millis() as u64);
            for minute in from.as_millis() as u64 / MINUTE..until.div_ceil(MINUTE) {
                let (first, last) = ((from.as_millis() as u64).max(minute * MINUTE), until.min((minute + 1) * MINUTE));
                if first == last {
                    continue;
                }
                expected.entry((minute, state(*phase))).or_default().0 += last - first;
                let dearest = minutes.entry(minute).or_insert(state(*phase));
                *dearest = (*dearest).max(state(*phase));
            }
        }
        for (minute, state) in minutes {
            expected.entry((minute, state)).or_default().1 += 1;
        }
    }
    let counted: BTreeMap<_, _> = metered
        .report
        .rows
        .iter()
        .map(|row| {
            assert_eq!(row.amounts.gpu_us, row.amounts.replica_ms * 1000, "one GPU each");
            assert_eq!(row.series.workload.service, "llm");
            let key = (row.start as u64 / MINUTE, row.series.state);
            (key, (row.amounts.replica_ms as u64, row.amounts.minutes as u64))
        })
        .collect();
    let minutes = |all: &BTreeMap<_, (u64, u64)>| all.values().map(|(_, minutes)| minutes).sum::<u64>();
    assert_eq!(minutes(&counted), minutes(&expected));
    assert_eq!(counted, expected);
    // One shard, twice a minute at most, and with each replica that is placed or removed.
    let most = 2 * (86_400 / 60 + 30) + 4 * metered.lives.len();
    assert!(metered.writes <= most, "{} writes, at most {most}", metered.writes);
}
