//! Knative's own numbers: every vector of `data/knative-autoscaler-vectors.json`, or of the file of the same
//! schema that `PILOTLIGHT_VECTORS` names.

use std::{path::PathBuf, time::Duration};

use pilotlight_coordinator::autoscaler::{
    Aggregation, Defaults, Metric, ScalerConfig,
    kpa::{self, Input, State},
    metric_target,
    scale_to_zero::{self, Activity, Proxy, Situation},
    window::{MaxWindow, Window, panic_window},
};
use serde::Deserialize;
use serde_json::{Map, Value};

/// Time zero of a vector. Panic may have begun before it.
const EPOCH: Duration = Duration::from_secs(1_000_000);

#[derive(Deserialize)]
struct Vectors {
    #[serde(default)]
    vectors: Vec<Run>,
    #[serde(default)]
    metric_target: Vec<Value>,
    #[serde(default)]
    panic_window: Vec<Value>,
    #[serde(default)]
    max_window: Vec<Value>,
    #[serde(default)]
    window_average: Vec<Value>,
    #[serde(default)]
    apply_scale: Vec<Value>,
    #[serde(default)]
    initial_excess_burst: Vec<Value>,
    #[serde(default)]
    proxy_count: Vec<Value>,
}

#[derive(Deserialize)]
struct Run {
    id: String,
    config: Map<String, Value>,
    initial: Value,
    #[serde(default)]
    expect_initial: Option<Value>,
    steps: Vec<Value>,
}

fn vectors() -> Vectors {
    let own = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/knative-autoscaler-vectors.json");
    let path = std::env::var_os("PILOTLIGHT_VECTORS").map_or_else(|| PathBuf::from(own), PathBuf::from);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn number(object: &Value, key: &str) -> f64 {
    object[key].as_f64().unwrap_or_else(|| panic!("{key} in {object}"))
}

fn seconds(value: f64) -> Duration {
    Duration::from_secs_f64(value)
}

fn defaults() -> ScalerConfig {
    ScalerConfig::of_defaults(&Defaults::default())
}

/// A time of the vector, which may lie before its zero.
fn at(value: &Value) -> Option<Duration> {
    value.as_f64().map(|t| if t < 0.0 { EPOCH - seconds(-t) } else { EPOCH + seconds(t) })
}

fn count(value: &Value) -> Option<u32> {
    value.as_u64().map(|count| count as u32)
}

fn config(given: &Map<String, Value>) -> (ScalerConfig, bool) {
    let given = Value::Object(given.clone());
    let config = ScalerConfig {
        metric: if given["metric"] == "rps" { Metric::Rps } else { Metric::Concurrency },
        target: number(&given, "target_value"),
        total: number(&given, "total_value"),
        target_burst_capacity: number(&given, "target_burst_capacity"),
        panic_threshold: number(&given, "panic_threshold"),
        max_scale_up_rate: number(&given, "max_scale_up_rate"),
        max_scale_down_rate: number(&given, "max_scale_down_rate"),
        stable_window: seconds(number(&given, "stable_window_s")),
        scale_down_delay: seconds(number(&given, "scale_down_delay_s")),
        activation_scale: given["activation_scale"].as_u64().unwrap_or(0) as u32,
        ..defaults()
    };
    (config, given["reachable"].as_bool().unwrap_or(true))
}

fn check_state(id: &str, expected: &Value, state: &State) {
    if let Some(panic_mode) = expected["panic_mode"].as_bool() {
        assert_eq!(state.panic_since.is_some(), panic_mode, "{id}: panic_mode in {expected}");
    }
    if expected.get("panic_since_s").is_some() {
        assert_eq!(state.panic_since, at(&expected["panic_since_s"]), "{id}: panic_since_s in {expected}");
    }
    if let Some(most) = expected["max_panic_pods"].as_i64() {
        assert_eq!(i64::from(state.max_panic_pods), most, "{id}: max_panic_pods in {expected}");
    }
}

fn run(vector: &Run) {
    let id = &vector.id;
    let mut given = vector.config.clone();
    let mut state = State::new(&config(&given).0, EPOCH, count(&vector.initial["ready_at_start"]));
    let overridden = &vector.initial["override"];
    if let Some(most) = overridden["max_panic_pods"].as_i64() {
        state.max_panic_pods = most as i32;
    }
    if overridden.get("panic_since_s").is_some() {
        state.panic_since = at(&overridden["panic_since_s"]);
    }
    if let Some(expected) = &vector.expect_initial {
        check_state(id, expected, &state);
    }
    for step in &vector.steps {
        if let Some(changes) = step["config_change"].as_object() {
            given.extend(changes.clone());
        }
        let (config, reachable) = config(&given);
        let failed = |key: &str| step[key].as_bool().unwrap_or(false);
        let input = Input {
            ready: if failed("ready_error") { None } else { count(&step["ready_pods"]) },
            starting: 0,
            load: step["stable"].as_f64().zip(step["panic"].as_f64()).filter(|_| !failed("metric_error")),
            reachable,
        };
        let before = state.clone();
        let wish = kpa::decide(&config, &mut state, at(&step["t_s"]).unwrap(), &input);
        let expected = &step["expect"];
        assert_eq!(wish.is_some(), expected["valid"].as_bool().unwrap(), "{id}: valid at {step}");
        match wish {
            Some(wish) => {
                assert_eq!(i64::from(wish.desired), expected["desired"].as_i64().unwrap(), "{id}: desired at {step}");
                let burst = number(expected, "excess_burst_capacity");
                let differs = (wish.excess_burst_capacity - burst).abs();
                assert!(differs <= 1.0, "{id}: burst {} at {step}", wish.excess_burst_capacity);
            }
            None => assert_eq!(state, before, "{id}: untouched at {step}"),
        }
        check_state(id, expected, &state);
    }
}

#[test]
fn decisions() {
    vectors().vectors.iter().for_each(run);
}

#[test]
fn targets() {
    for vector in vectors().metric_target {
        let given = &vector["config"];
        let rps = vector["metric"] == "rps";
        let (fraction, default, metric) = match rps {
            true => (number(given, "target_utilization"), number(given, "rps_default"), Metric::Rps),
            false => (number(given, "cc_fraction"), number(given, "cc_default"), Metric::Concurrency),
        };
        let percent = vector["target_utilization_annotation_percent"].as_f64().unwrap_or(fraction * 100.0);
        let concurrency = vector["container_concurrency"].as_i64().unwrap_or(0);
        let (target, total) =
            metric_target(metric, concurrency, vector["target_annotation"].as_f64(), percent, default);
        let expected = &vector["expect"];
        assert!((target - number(expected, "target")).abs() < 1e-9, "target {target} for {vector}");
        assert!((total - number(expected, "total")).abs() < 1e-9, "total {total} for {vector}");
    }
}

#[test]
fn panic_windows() {
    for vector in vectors().panic_window {
        let stable = seconds(number(&vector, "stable_window_s"));
        let window = panic_window(stable, number(&vector, "panic_window_percentage"));
        assert_eq!(window, seconds(number(&vector["expect"], "panic_window_s")), "{vector}");
    }
}

#[test]
fn maxima() {
    for vector in vectors().max_window {
        let whole = |key: &str| -> Vec<i64> {
            vector[key].as_array().unwrap().iter().map(|value| value.as_i64().unwrap()).collect()
        };
        let mut window = MaxWindow::new(vector["buckets"].as_u64().unwrap() as usize);
        for ((slot, value), expected) in whole("index").into_iter().zip(whole("values")).zip(whole("expect_current")) {
            window.record(slot, value as i32);
            assert_eq!(i64::from(window.current()), expected, "after slot {slot} in {vector}");
        }
    }
}

#[test]
fn averages() {
    for vector in vectors().window_average {
        assert_eq!(vector["bucket_s"], 1, "buckets are one second: {vector}");
        let aggregation = match vector["algorithm"].as_str().unwrap() {
            "linear" => Aggregation::Linear,
            _ => Aggregation::WeightedExponential,
        };
        let mut window = Window::new(seconds(number(&vector, "window_s")));
        for op in vector["ops"].as_array().unwrap() {
            let time = at(&op["t_s"]).unwrap();
            match op["op"].as_str().unwrap() {
                "record" => window.record(time, number(op, "value")),
                "resize" => window.resize(seconds(number(op, "window_s"))),
                "average" => {
                    let average = window.average(time, aggregation);
                    assert!((average - number(op, "expect")).abs() <= 1e-6, "{average} at {op} in {vector}");
                }
                other => panic!("unknown op {other} in {vector}"),
            }
        }
    }
}

#[test]
fn applied_scales() {
    for vector in vectors().apply_scale {
        let given = &vector["config_and_state"];
        let probe = given["proxy_probe"].as_str().unwrap();
        let whole = |key: &str| given[key].as_u64().unwrap() as u32;
        let config = ScalerConfig {
            stable_window: seconds(number(given, "stable_window_s")),
            grace: seconds(number(given, "scale_to_zero_grace_period_s")),
            pod_retention: seconds(number(given, "pod_retention_s")),
            activation_timeout: seconds(number(given, "activation_timeout_s")),
            enable_scale_to_zero: given["enable_scale_to_zero"].as_bool().unwrap(),
            target_burst_capacity: number(given, "target_burst_capacity"),
            min_scale: whole("min_scale"),
            max_scale: whole("max_scale"),
            initial_scale: whole("initial_scale"),
            ..defaults()
        };
        let situation = Situation {
            activity: serde_json::from_value::<Activity>(vector["status"].clone()).unwrap(),
            for_time: seconds(number(&vector, "in_status_for_s")),
            current: count(&vector["current_replicas"]).unwrap(),
            desired: vector["desired_from_autoscaler"].as_i64().unwrap() as i32,
            reachable: given["reachability"] != "unreachable",
            initial_scale_reached: given["initial_scale_reached"].as_bool().unwrap(),
            proxy: Proxy {
                in_path: given["proxy_in_path"].as_bool().unwrap(),
                for_time: seconds(number(given, "proxy_in_path_for_s")),
                // Where the probe must not run, its answer must not matter.
                confirmed: probe == "ok",
            },
        };
        let applied = scale_to_zero::apply(&config, &situation);
        let expected = &vector["expect"];
        assert_eq!(i64::from(applied.result), expected["result"].as_i64().unwrap(), "result of {vector}");
        assert_eq!(applied.write.is_some(), expected["write_replicas"].as_bool().unwrap(), "write of {vector}");
        assert_eq!(u64::from(applied.recheck_after.is_some()), expected["requeues"].as_u64().unwrap(), "{vector}");
        assert_eq!(u64::from(applied.probe), expected["async_probe_started"].as_u64().unwrap(), "{vector}");
    }
}

#[test]
fn bursts_and_proxies() {
    let all = vectors();
    for vector in all.initial_excess_burst {
        let initial = count(&vector["initial_scale"]).unwrap();
        let (wanted, total) = (number(&vector, "target_burst_capacity"), number(&vector, "total_value"));
        let burst = kpa::initial_excess_burst_capacity(wanted, initial, total);
        assert_eq!(burst, number(&vector["expect"], "excess_burst_capacity"), "{vector}");
    }
    for vector in all.proxy_count {
        let ready = count(&vector["ready_pods"]).unwrap();
        let (total, wanted) = (number(&vector, "total_value"), number(&vector, "target_burst_capacity"));
        let proxies = kpa::proxies(ready, total, wanted, number(&vector, "proxy_capacity"));
        assert_eq!(u64::from(proxies), vector["expect"]["proxies"].as_u64().unwrap(), "{vector}");
    }
}
