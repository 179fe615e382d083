//! Behaviour over time, and properties that hold for any load.

use std::time::Duration;

use proptest::prelude::*;

use super::{Class, Defaults, Metric, Observation, Reason, Sample, Scaler, ScalerConfig, kpa, kpa::Input};

const SECOND: Duration = Duration::from_secs(1);

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// CoreWeave's defaults with `containerConcurrency: 10` and scale to zero.
fn config() -> ScalerConfig {
    let fields = crate::spec::Scaling { min_replicas: Some(0), container_concurrency: 10, ..Default::default() };
    ScalerConfig::resolve(&Defaults::default(), &Default::default(), &fields).unwrap().0
}

fn gpu() -> ScalerConfig {
    ScalerConfig { class: Class::Gpu, ..config() }
}

/// A scaler whose replicas are ready as soon as they are wanted.
struct Fleet {
    scaler: Scaler,
    replicas: u32,
    now: Duration,
    tick: Duration,
}

impl Fleet {
    fn new(config: ScalerConfig, replicas: u32, tick: Duration) -> Self {
        let now = seconds(10_000);
        Self { scaler: Scaler::new(config, now, Some(replicas)), replicas, now, tick }
    }

    fn seen(&self) -> Observation {
        Observation {
            ready: Some(self.replicas),
            current: self.replicas,
            reachable: true,
            initial_scale_reached: true,
            ..Default::default()
        }
    }

    /// One tick with this load in every second.
    fn tick(&mut self, load: f64) -> super::Decision {
        let sample =
            Sample { average_concurrency: load, completion_rate: load, request_rate: load, ..Default::default() };
        let until = self.now + self.tick;
        while self.now + SECOND <= until {
            self.now += SECOND;
            self.scaler.record(self.now, &sample);
        }
        self.now = until;
        let decision = self.scaler.decide(self.now, &self.seen());
        self.replicas = decision.applied;
        decision
    }

    /// Ticks with this load until as many replicas are left; how long that took.
    fn until(&mut self, replicas: u32, load: f64) -> Duration {
        let began = self.now;
        while self.replicas > replicas {
            self.tick(load);
            assert!(self.now - began < seconds(7200), "stuck at {}", self.replicas);
        }
        self.now - began
    }
}

/// From `replicas` to one when the load has gone at once: rates and delay alone, without window or panic.
fn way_down(config: ScalerConfig, replicas: u32, tick: Duration) -> Duration {
    let began = seconds(10_000);
    let mut state = kpa::State::new(&config, began, Some(0));
    let load = f64::from(replicas) * 8.4;
    let input = |ready, load| Input { ready: Some(ready), starting: 0, load: Some((load, load)), reachable: true };
    kpa::decide(&config, &mut state, began, &input(replicas, load));
    state.panic_since = None;
    let (mut now, mut ready) = (began, replicas);
    while ready > 1 {
        now += tick;
        ready = kpa::decide(&config, &mut state, now, &input(ready, 0.0)).unwrap().desired.max(1) as u32;
    }
    now - began
}

#[test]
fn rates_and_delay_take_as_long_as_the_reference_says() {
    // Measured on upstream's algorithm with CoreWeave's defaults (docs: "seconds from N to 1").
    let without_delay = [(10, 18), (20, 28), (50, 44), (100, 58)];
    for (replicas, expected) in without_delay {
        let config = ScalerConfig { scale_down_delay: Duration::ZERO, ..config() };
        assert_eq!(way_down(config, replicas, seconds(2)), seconds(expected), "{replicas} replicas");
    }
    let with_delay = [(2, 60), (5, 240), (10, 540), (20, 840), (50, 1320), (100, 1740)];
    for (replicas, expected) in with_delay {
        assert_eq!(way_down(config(), replicas, seconds(2)), seconds(expected), "{replicas} replicas, delay 60 s");
    }
}

#[test]
fn rates_hold_per_decision_whatever_the_tick() {
    let config = ScalerConfig { scale_down_delay: Duration::ZERO, ..config() };
    // 29 decisions from 100 to 1; with a tick of 15 s they are CoreWeave's "per 15 s".
    assert_eq!(way_down(config.clone(), 100, seconds(2)), seconds(29 * 2));
    assert_eq!(way_down(config, 100, seconds(15)), seconds(29 * 15));
    // The GPU class takes 15 s for each step down, whatever the tick.
    let ramp = |tick| {
        let mut fleet = Fleet::new(ScalerConfig { scale_down_delay: Duration::ZERO, ..gpu() }, 100, tick);
        // Load is gone, and panic from the start with it, once a window has passed.
        while fleet.tick(0.0).panic {}
        let at_90 = fleet.until(90, 0.0);
        (at_90, fleet.until(50, 0.0))
    };
    for tick in [2, 5] {
        let (_, to_50) = ramp(seconds(tick));
        // 90 → 81 → 73 → 66 → 60 → 54 → 49: six steps.
        let steps = to_50.as_secs_f64() / 15.0;
        assert!((5.5..7.5).contains(&steps), "{steps} steps with a tick of {tick} s");
    }
}

#[test]
fn up_by_the_rate_or_one_whichever_is_larger() {
    for (ready, expected) in [(0, 20), (1, 20), (3, 60)] {
        let mut state = kpa::State::new(&config(), Duration::ZERO, Some(0));
        let input = Input { ready: Some(ready), starting: 0, load: Some((1e6, 1e6)), reachable: true };
        assert_eq!(kpa::decide(&config(), &mut state, SECOND, &input).unwrap().desired, expected);
    }
    let slow = ScalerConfig { max_scale_up_rate: 1.01, ..config() };
    let mut state = kpa::State::new(&slow, Duration::ZERO, Some(0));
    let input = Input { ready: Some(5), starting: 0, load: Some((1e6, 1e6)), reachable: true };
    assert_eq!(kpa::decide(&slow, &mut state, SECOND, &input).unwrap().desired, 6);
}

#[test]
fn an_idle_service_keeps_its_last_replica_for_the_retention_period() {
    let mut fleet = Fleet::new(config(), 1, seconds(2));
    for _ in 0..200 {
        fleet.tick(5.0);
    }
    // Reference, section 9: about 180 s (window) + 60 s (delay) + 30 min (retention).
    let idle = fleet.until(0, 0.0);
    assert!((seconds(2030)..=seconds(2050)).contains(&idle), "{idle:?}");
}

#[test]
fn each_rule_on_the_way_to_zero_is_a_decision_of_its_own() {
    let mut fleet = Fleet::new(ScalerConfig { pod_retention: seconds(10), ..config() }, 1, seconds(2));
    for _ in 0..100 {
        fleet.tick(1.0);
    }
    let (mut told, mut last): (Vec<String>, Option<super::Decision>) = (Vec::new(), None);
    while fleet.replicas > 0 {
        let decision = fleet.tick(0.0);
        // As `describe` keeps them.
        if last.as_ref().is_none_or(|last| !last.same_but_for_time(&decision)) {
            told.push(decision.reasons.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "));
            last = Some(decision);
        }
    }
    let has = |text: &str| told.iter().any(|reasons| reasons.contains(text));
    assert!(has("inactive from now on") && has("retained for another"), "{told:?}");
}

#[test]
fn replicas_that_load_are_not_ordered_again() {
    // One replica is ready, 19 load, and the queue grows.
    let seen = |starting| Observation {
        ready: Some(1),
        starting,
        current: 1 + starting,
        reachable: true,
        initial_scale_reached: true,
        ..Default::default()
    };
    let wishes = |config: ScalerConfig| {
        let mut scaler = Scaler::new(config, seconds(1000), Some(1));
        let (mut starting, mut waiting) = (0, 0.0);
        for second in 1001..1060 {
            waiting += 4.0;
            let sample = Sample {
                average_concurrency: 10.0 + waiting,
                average_waiting: waiting,
                request_rate: 14.0,
                completion_rate: 10.0,
                ..Default::default()
            };
            scaler.record(seconds(second), &sample);
            if second % 2 == 0 {
                starting = scaler.decide(seconds(second), &seen(starting)).applied - 1;
            }
        }
        starting + 1
    };
    let (kpa, gpu) = (wishes(config()), wishes(gpu()));
    // 14 per second, each for one second, at 8.5 per replica: two are needed.
    assert!(kpa >= 20, "Knative orders for the queue: {kpa}");
    assert!((2..=4).contains(&gpu), "the GPU class for the load: {gpu}");
}

#[test]
fn the_fleets_gpus_cap_the_wish_and_the_rest_is_reported() {
    let observed = Observation {
        ready: Some(2),
        current: 2,
        fits: Some(4),
        reachable: true,
        initial_scale_reached: true,
        ..Default::default()
    };
    let decide = |config: ScalerConfig| {
        let mut scaler = Scaler::new(config, seconds(1000), Some(2));
        for second in 1000..1020 {
            let sample =
                Sample { average_concurrency: 85.0, request_rate: 85.0, completion_rate: 85.0, ..Default::default() };
            scaler.record(seconds(second), &sample);
        }
        scaler.decide(seconds(1020), &observed)
    };
    let capped = decide(gpu());
    assert_eq!((capped.desired, capped.applied), (10, 4));
    assert!(capped.reasons.contains(&Reason::Capacity(10)), "{:?}", capped.reasons);
    assert_eq!(decide(config()).applied, 10, "Knative's class knows no GPUs");
}

#[test]
fn spare_replicas_are_added_once_and_only_to_load() {
    let mut fleet = Fleet::new(ScalerConfig { spare_replicas: 3, ..gpu() }, 0, seconds(2));
    assert_eq!(fleet.tick(0.0).applied, 0, "none without load");
    for _ in 0..500 {
        fleet.tick(40.0);
    }
    // 40 at 8.5 are 5; spares do not count as a need for further spares.
    assert_eq!(fleet.replicas, 8);
}

#[test]
fn panic_of_the_gpu_class_ends_in_a_ramp() {
    // Knative's default of 2 would halve the fleet at each decision.
    let fast = |config| ScalerConfig { max_scale_down_rate: 2.0, scale_down_delay: Duration::ZERO, ..config };
    let largest_drop = |config: ScalerConfig| {
        let mut fleet =
            Fleet::new(ScalerConfig { max_scale_down_rate: config.max_scale_down_rate, ..config }, 1, seconds(2));
        for _ in 0..30 {
            fleet.tick(400.0);
        }
        let (mut drop, mut before) = (0, fleet.replicas);
        for _ in 0..300 {
            fleet.tick(20.0);
            drop = drop.max(before.saturating_sub(fleet.replicas));
            before = fleet.replicas;
        }
        (drop, fleet.replicas)
    };
    let (kpa, gpu) =
        (largest_drop(fast(config())), largest_drop(ScalerConfig { max_scale_down_rate: 1.1, ..fast(gpu()) }));
    assert!(kpa.0 >= 20, "{kpa:?}");
    assert!(gpu.0 <= 5, "{gpu:?}");
    assert!(gpu.1 <= 12, "and it does get down: {gpu:?}");
}

#[test]
fn a_queue_counts_beside_the_replicas_that_run() {
    let queue = ScalerConfig { metric: Metric::QueueDepth, target: 5.0, slots: 10.0, ..config() };
    let mut fleet = Fleet::new(queue, 2, seconds(2));
    let sample = Sample { average_concurrency: 32.0, average_waiting: 12.0, ..Default::default() };
    for second in 1..300 {
        fleet.scaler.record(fleet.now + seconds(second), &sample);
    }
    let now = fleet.now + seconds(300);
    let decision = fleet.scaler.decide(now, &fleet.seen());
    // 20 running fill two replicas; 12 waiting at 5 each are worth 2.4 more.
    assert_eq!(decision.desired, 5);
}

#[test]
fn tokens_are_held_against_their_target() {
    let tokens = ScalerConfig { metric: Metric::TokensInFlight, target: 16_384.0, ..config() };
    let mut fleet = Fleet::new(tokens, 1, seconds(2));
    for second in 1..300 {
        let sample = Sample { average_concurrency: 3.0, tokens_in_flight: 40_000.0, ..Default::default() };
        fleet.scaler.record(fleet.now + seconds(second), &sample);
    }
    let now = fleet.now + seconds(300);
    assert_eq!(fleet.scaler.decide(now, &fleet.seen()).desired, 3);
}

#[test]
fn reports_of_any_length_average_to_the_same_load() {
    let average = |every_ms: u64| {
        let mut scaler = Scaler::new(config(), seconds(1000), Some(1));
        let sample = Sample { average_concurrency: 6.0, seconds: every_ms as f64 / 1000.0, ..Default::default() };
        for millis in (1_000_000..1_120_000).step_by(every_ms as usize) {
            scaler.record(Duration::from_millis(millis + every_ms - 1), &sample);
        }
        let seen = Observation { ready: Some(1), current: 1, reachable: true, ..Default::default() };
        scaler.decide(Duration::from_millis(1_119_999), &seen)
    };
    for every_ms in [100, 250, 1000, 2000, 5000] {
        let decision = average(every_ms);
        assert!((decision.stable_value - 6.0).abs() < 0.01, "{every_ms} ms: {}", decision.stable_value);
        assert!((decision.panic_value - 6.0).abs() < 0.01, "{every_ms} ms: {}", decision.panic_value);
    }
}

#[test]
fn silence_is_no_load_but_not_before_a_report_could_have_come() {
    let mut scaler = Scaler::new(config(), seconds(1000), Some(1));
    let seen = Observation { ready: Some(1), current: 1, reachable: true, ..Default::default() };
    for second in 1000..1100 {
        scaler.record(seconds(second), &Sample { average_concurrency: 5.0, ..Default::default() });
        scaler.silence(seconds(second + 1));
        assert_eq!(scaler.decide(seconds(second + 1), &seen).panic_value, 5.0);
    }
    for second in 1101..1130 {
        scaler.silence(seconds(second));
    }
    assert_eq!(scaler.decide(seconds(1129), &seen).panic_value, 0.0);
}

#[test]
fn a_poke_is_not_counted_twice() {
    let mut scaler = Scaler::new(config(), seconds(1000), Some(0));
    scaler.poke(seconds(1000));
    let report = Sample { average_concurrency: 1.0, average_waiting: 1.0, request_rate: 1.0, ..Default::default() };
    scaler.record(seconds(1000), &report);
    let seen = Observation { ready: Some(0), reachable: true, initial_scale_reached: true, ..Default::default() };
    assert_eq!(scaler.decide(seconds(1000), &seen).stable_value, 1.0);
}

/// Loads by second, and how many replicas are ready: arbitrary, for either class.
#[derive(Debug, Clone)]
struct Story {
    config: ScalerConfig,
    loads: Vec<f64>,
    lag: usize,
}

fn stories() -> impl Strategy<Value = Story> {
    let bounds = (0u32..4, 0u32..6, 0u32..3);
    let settings = (any::<bool>(), 6u64..40, 0u64..20, 0u32..3, 11u32..40, 11u32..400);
    let loads = prop::collection::vec(prop_oneof![Just(0.0), 0.0..20.0, 0.0..2_000.0], 1..120);
    (bounds, settings, loads, 0usize..15).prop_map(|((min, more, initial), settings, loads, lag)| {
        let (is_gpu, window, delay, spare, down, up) = settings;
        let config = ScalerConfig {
            class: if is_gpu { Class::Gpu } else { Class::Kpa },
            min_scale: min,
            max_scale: if more == 0 { 0 } else { min + more },
            initial_scale: initial,
            stable_window: seconds(window),
            panic_window: seconds(window.div_ceil(8)),
            scale_down_delay: seconds(delay),
            spare_replicas: if is_gpu { spare } else { 0 },
            max_scale_down_rate: f64::from(down) / 10.0,
            max_scale_up_rate: f64::from(up) / 10.0,
            pod_retention: seconds(4),
            grace: seconds(2),
            ..super::tests::config()
        };
        Story { config, loads, lag }
    })
}

/// Plays a story: replicas are ready `lag` ticks after they were wanted. Calls `check` at each decision with
/// the scaler as it was before.
fn play(
    story: &Story,
    mut check: impl FnMut(&Scaler, &Observation, Duration, &super::Decision),
) -> Vec<super::Decision> {
    let mut scaler = Scaler::new(story.config.clone(), Duration::ZERO, Some(0));
    let (mut wanted, mut decisions) = (vec![0u32], Vec::new());
    for (second, load) in story.loads.iter().enumerate() {
        let now = seconds(second as u64);
        let sample =
            Sample { average_concurrency: *load, request_rate: *load, completion_rate: *load, ..Default::default() };
        scaler.record(now, &sample);
        let current = *wanted.last().unwrap();
        let ready = wanted[wanted.len().saturating_sub(story.lag + 1)].min(current);
        let seen = Observation {
            ready: Some(ready),
            starting: current - ready,
            current,
            reachable: true,
            initial_scale_reached: second > 20,
            ..Default::default()
        };
        let before = scaler.clone();
        let decision = scaler.decide(now, &seen);
        check(&before, &seen, now, &decision);
        wanted.push(decision.applied);
        decisions.push(decision);
    }
    decisions
}

/// The wish alone, at the state of `scaler`.
fn wish(scaler: &Scaler, seen: &Observation, now: Duration, load: (f64, f64)) -> (kpa::Wish, kpa::State) {
    let mut state = scaler.state.clone();
    let input = Input { ready: seen.ready, starting: seen.starting, load: Some(load), reachable: seen.reachable };
    (kpa::decide(&scaler.config, &mut state, now, &input).unwrap(), state)
}

proptest! {
    #[test]
    fn bounds_are_never_left(story in stories()) {
        let config = &story.config;
        let max = if config.max_scale == 0 { u32::MAX } else { config.max_scale };
        play(&story, |_, seen, _, decision| {
            let nothing_known = decision.desired < 0;
            assert!(nothing_known || decision.applied >= config.min_scale, "{decision:?}");
            let initial = if seen.initial_scale_reached { 0 } else { config.initial_scale };
            assert!(decision.applied <= max.max(initial).max(1), "{decision:?}");
        });
    }

    #[test]
    fn rates_are_never_exceeded(story in stories()) {
        play(&story, |before, seen, now, _| {
            let load = (1e9, 1e9);
            let (up, _) = wish(before, seen, now, load);
            let config = &before.config;
            let ready = f64::from(seen.ready.unwrap()).max(1.0);
            let most = (config.max_scale_up_rate * ready).ceil();
            let ordered = f64::from(seen.ready.unwrap() + seen.starting);
            let most = if config.class == Class::Gpu { most.max(ordered) } else { most };
            let kept = f64::from(before.state.max_panic_pods);
            assert!(f64::from(up.undelayed) <= most.max(kept), "{up:?}");
            let (down, _) = wish(before, seen, now, (0.0, 0.0));
            if config.class == Class::Kpa {
                assert!(f64::from(down.undelayed) >= (ready / config.max_scale_down_rate).floor(), "{down:?}");
            }
        });
    }

    #[test]
    fn panic_never_scales_down(story in stories()) {
        // What panic has asked for holds until it ends; a larger wish from before may still run out of the
        // scale-down delay meanwhile, as it does in Knative.
        let mut last: Option<(i32, super::Decision)> = None;
        let max = if story.config.max_scale == 0 { i32::MAX } else { story.config.max_scale as i32 };
        play(&story, |before, _, _, decision| {
            if before.state.panic_since.is_some() {
                let held = before.state.max_panic_pods;
                if let Some((earlier, _)) = last.as_ref().filter(|(_, decision)| decision.panic) {
                    assert!(held >= *earlier, "{held} after {earlier}");
                }
                if decision.panic {
                    assert!(decision.desired >= held && decision.applied as i32 >= held.min(max), "{decision:?}");
                }
            }
            last = Some((before.state.max_panic_pods, decision.clone()));
        });
    }

    #[test]
    fn more_load_never_means_fewer_replicas(story in stories(), less in (0.0..500.0, 0.0..500.0), more in (0.0..500.0, 0.0..500.0)) {
        play(&story, |before, seen, now, _| {
            let (small, _) = wish(before, seen, now, less);
            let (large, _) = wish(before, seen, now, (less.0 + more.0, less.1 + more.1));
            assert!(large.desired >= small.desired, "{small:?} {large:?}");
        });
    }

    #[test]
    fn the_same_input_has_the_same_output(story in stories()) {
        prop_assert_eq!(play(&story, |_, _, _, _| {}), play(&story, |_, _, _, _| {}));
    }

    #[test]
    fn state_survives_being_written_down(story in stories()) {
        let mut last = None;
        play(&story, |before, _, _, _| last = Some(before.clone()));
        let text = serde_json::to_string(&last).unwrap();
        prop_assert_eq!(serde_json::from_str::<Option<Scaler>>(&text).unwrap(), last);
    }

    #[test]
    fn windows_average_like_a_plain_list(
        writes in prop::collection::vec((0u64..4, 0.0..100.0f64), 1..200), length in 1u64..60
    ) {
        let mut window = super::window::Window::new(seconds(length));
        let (mut now, mut all) = (1_000u64, Vec::new());
        for (gap, value) in writes {
            now += gap;
            window.record(seconds(now), value);
            // A gap as long as the window begins anew.
            if all.last().is_some_and(|(last, _)| now - last >= length) {
                all.clear();
            }
            all.push((now, value));
            let first = all[0].0;
            let valid = (now - first + 1).min(length);
            let sum: f64 = all.iter().filter(|(at, _)| now - at < length).map(|(_, value)| value).sum();
            let average = window.average(seconds(now), super::Aggregation::Linear);
            prop_assert!((average - sum / valid as f64).abs() < 1e-5);
        }
    }
}
