//! The autoscaler's settings: defaults of the fleet, and those of one revision.

use std::{collections::BTreeMap, time::Duration};

use serde::{Deserialize, Serialize};

use super::{annotations::Annotations, window::panic_window};
use crate::{finding::Finding, spec::Scaling};

/// No target is smaller.
const TARGET_LEAST: f64 = 0.01;

/// Which autoscaler a revision has, by `autoscaling.knative.dev/class`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Class {
    /// Knative's own, exactly.
    #[default]
    Kpa,
    /// For models that load for long on GPUs that are dear; see the module [`super::gpu`].
    Gpu,
}

/// What is averaged and held against the target.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Metric {
    /// Requests waiting or running.
    #[default]
    Concurrency,
    /// Requests that arrive per second.
    Rps,
    /// Requests waiting; running ones hold the replicas that they fill. The target is the number of
    /// waiting requests for which one more replica is worth its while.
    QueueDepth,
    /// Prompt and generated tokens of requests waiting or running, for LLM servers.
    TokensInFlight,
}

/// How buckets are averaged.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Aggregation {
    /// All alike.
    #[default]
    Linear,
    /// Newer ones count more.
    WeightedExponential,
}

/// Fleet-wide settings, named as in Knative's `config-autoscaler`. `Default` has CoreWeave's values, and
/// Knative's where CoreWeave names none.
#[derive(Debug, Clone, PartialEq)]
pub struct Defaults {
    /// Load above the target for this long counts in full.
    pub stable_window: Duration,
    /// Panic window as a percentage of the stable one, 1 to 100.
    pub panic_window_percentage: f64,
    /// Panic begins where this percentage of the ready replicas is wanted, 110 to 1000.
    pub panic_threshold_percentage: f64,
    /// Part of a replica's concurrency that is aimed at, percent, above 0 to 100.
    pub container_concurrency_target_percentage: f64,
    /// Concurrency of a replica without a limit.
    pub container_concurrency_target_default: f64,
    /// Requests per second of a replica.
    pub requests_per_second_target_default: f64,
    /// Part of the above that is aimed at, percent.
    pub requests_per_second_target_percentage: f64,
    /// Waiting requests per replica, for `queue-depth`.
    pub queue_depth_target_default: f64,
    /// Tokens per replica, for `tokens-in-flight`.
    pub tokens_in_flight_target_default: f64,
    /// Spare capacity below which Knative keeps its proxies in the path; -1 always, 0 never. Our
    /// gateways always are; it is reported in decisions.
    pub target_burst_capacity: f64,
    /// Ready replicas may grow by this factor per decision, above 1.
    pub max_scale_up_rate: f64,
    /// Ready replicas may shrink by this factor per decision, above 1.
    pub max_scale_down_rate: f64,
    /// A smaller wish counts only after this long.
    pub scale_down_delay: Duration,
    /// The last replica stays this long after the last request has aged out.
    pub scale_to_zero_pod_retention_period: Duration,
    /// Knative: upper bound for its proxies to take over before the last replica goes.
    pub scale_to_zero_grace_period: Duration,
    /// False: the last replica always stays.
    pub enable_scale_to_zero: bool,
    /// Replicas of a new revision.
    pub initial_scale: u32,
    /// Whether 0 is allowed for it.
    pub allow_zero_initial_scale: bool,
    /// A new revision that is not ready after this long, plus 30 s, goes to zero.
    pub progress_deadline: Duration,
}

impl Default for Defaults {
    fn default() -> Self {
        Self {
            stable_window: Duration::from_secs(180),
            panic_window_percentage: 13.0,
            panic_threshold_percentage: 200.0,
            container_concurrency_target_percentage: 85.0,
            container_concurrency_target_default: 100.0,
            requests_per_second_target_default: 200.0,
            requests_per_second_target_percentage: 70.0,
            queue_depth_target_default: 5.0,
            tokens_in_flight_target_default: 16_384.0,
            target_burst_capacity: 211.0,
            max_scale_up_rate: 20.0,
            max_scale_down_rate: 1.1,
            scale_down_delay: Duration::from_secs(60),
            scale_to_zero_pod_retention_period: Duration::from_secs(30 * 60),
            scale_to_zero_grace_period: Duration::from_secs(60),
            enable_scale_to_zero: true,
            initial_scale: 1,
            allow_zero_initial_scale: false,
            progress_deadline: Duration::from_secs(600),
        }
    }
}

/// One revision's settings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ScalerConfig {
    /// Which autoscaler.
    #[serde(default)]
    pub class: Class,
    /// What is measured.
    pub metric: Metric,
    /// How it is averaged.
    pub aggregation: Aggregation,
    /// Load that one replica should carry, in the metric's unit.
    pub target: f64,
    /// Load that one replica can carry.
    pub total: f64,
    /// Requests that one replica can run, whatever the metric.
    #[serde(default = "one")]
    pub slots: f64,
    /// Spare capacity asked for; -1 without end.
    pub target_burst_capacity: f64,
    /// Stable window.
    pub stable_window: Duration,
    /// Panic window.
    pub panic_window: Duration,
    /// Wanted over ready replicas at which panic begins; 2.0 is 200 %.
    pub panic_threshold: f64,
    /// See [`Defaults::max_scale_up_rate`].
    pub max_scale_up_rate: f64,
    /// See [`Defaults::max_scale_down_rate`].
    pub max_scale_down_rate: f64,
    /// See [`Defaults::scale_down_delay`].
    pub scale_down_delay: Duration,
    /// Least number of replicas when there is any load; 0 is unset.
    pub activation_scale: u32,
    /// Replicas at least.
    pub min_scale: u32,
    /// Replicas at most; 0 is no limit.
    pub max_scale: u32,
    /// Replicas of a new revision.
    pub initial_scale: u32,
    /// See [`Defaults::scale_to_zero_pod_retention_period`].
    pub pod_retention: Duration,
    /// See [`Defaults::scale_to_zero_grace_period`].
    pub grace: Duration,
    /// See [`Defaults::enable_scale_to_zero`].
    pub enable_scale_to_zero: bool,
    /// Time in which a new revision must become ready, Knative's 30 s of tolerance included.
    pub activation_timeout: Duration,
    /// GPU class: replicas beyond what any load needs.
    #[serde(default)]
    pub spare_replicas: u32,
    /// True: replicas are made ready ahead of load that the past makes likely.
    #[serde(default)]
    pub prewarm: bool,
}

fn one() -> f64 {
    1.0
}

impl ScalerConfig {
    /// The settings of a revision, and warnings.
    ///
    /// # Errors
    /// All annotations and fields that are out of range, each with value and range.
    pub fn resolve(
        defaults: &Defaults,
        annotations: &BTreeMap<String, String>,
        fields: &Scaling,
    ) -> Result<(Self, Vec<Finding>), Vec<Finding>> {
        let mut read = Annotations::new(annotations);
        let config = read.config(defaults, fields);
        read.finish().map(|warnings| (config, warnings))
    }

    /// The defaults alone, with at least one replica: what holds where nothing else can be read.
    pub fn of_defaults(defaults: &Defaults) -> Self {
        Annotations::new(&BTreeMap::new()).config(defaults, &Scaling::default())
    }

    /// Replicas of a new revision.
    pub fn initial_scale(&self) -> u32 {
        self.initial_scale
    }
    /// Replicas at least.
    pub fn min_scale(&self) -> u32 {
        self.min_scale
    }
    /// Replicas at most; 0 is no limit.
    pub fn max_scale(&self) -> u32 {
        self.max_scale
    }
}

/// Load that one replica should and can carry.
///
/// `container_concurrency` is a hard limit, 0 none; `target` the annotation; `utilization` percent;
/// `default` the fleet's total for this metric.
pub fn metric_target(
    metric: Metric,
    container_concurrency: i64,
    target: Option<f64>,
    utilization: f64,
    default: f64,
) -> (f64, f64) {
    let limit = container_concurrency as f64;
    let total = match metric {
        Metric::Concurrency if container_concurrency > 0 => target.map_or(limit, |target| target.min(limit)),
        _ => target.unwrap_or(default),
    };
    ((total * (utilization / 100.0)).max(TARGET_LEAST), total)
}

impl Defaults {
    /// The total of a replica where nothing is annotated, and the percentage of it that is aimed at.
    fn target(&self, metric: Metric) -> (f64, f64) {
        match metric {
            Metric::Concurrency => {
                (self.container_concurrency_target_default, self.container_concurrency_target_percentage)
            }
            Metric::Rps => (self.requests_per_second_target_default, self.requests_per_second_target_percentage),
            Metric::QueueDepth => (self.queue_depth_target_default, 100.0),
            Metric::TokensInFlight => (self.tokens_in_flight_target_default, 100.0),
        }
    }

    /// Checks every setting against Knative's bounds for `config-autoscaler`.
    ///
    /// # Errors
    /// Each setting that is out of range, by the name of its flag, with value and range.
    pub fn validate(&self) -> Result<(), Vec<String>> {
        let mut wrong = Vec::new();
        let mut check = |ok: bool, name: &str, value: String, range: &str| {
            if !ok {
                wrong.push(format!("{name}: {value}: expected {range}"));
            }
        };
        let between = |value: f64, least: f64, most: f64| value >= least && value <= most;
        let duration = |value: Duration| humantime::format_duration(value).to_string();
        let window = self.stable_window;
        let whole = window.subsec_nanos() == 0;
        let (least, most) = (Duration::from_secs(6), Duration::from_secs(3600));
        check(whole && window >= least && window <= most, "stable-window", duration(window), "whole seconds, 6s to 1h");
        let percentages = [
            ("panic-window-percentage", self.panic_window_percentage, 1.0, 100.0),
            ("panic-threshold-percentage", self.panic_threshold_percentage, 110.0, 1000.0),
            ("container-concurrency-target-percentage", self.container_concurrency_target_percentage, 0.01, 100.0),
        ];
        for (name, value, least, most) in percentages {
            check(between(value, least, most), name, value.to_string(), &format!("{least} to {most}"));
        }
        let targets = [
            ("container-concurrency-target-default", self.container_concurrency_target_default),
            ("requests-per-second-target-default", self.requests_per_second_target_default),
            ("queue-depth-target-default", self.queue_depth_target_default),
            ("tokens-in-flight-target-default", self.tokens_in_flight_target_default),
        ];
        for (name, value) in targets {
            check(between(value, TARGET_LEAST, f64::MAX), name, value.to_string(), "at least 0.01");
        }
        let rates = [("max-scale-up-rate", self.max_scale_up_rate), ("max-scale-down-rate", self.max_scale_down_rate)];
        for (name, value) in rates {
            check(value > 1.0 && value.is_finite(), name, value.to_string(), "more than 1");
        }
        let burst = self.target_burst_capacity;
        check(
            burst == -1.0 || between(burst, 0.0, f64::MAX),
            "target-burst-capacity",
            burst.to_string(),
            "at least 0, or -1",
        );
        let delay = self.scale_down_delay;
        check(delay.subsec_nanos() == 0, "scale-down-delay", duration(delay), "whole seconds");
        let grace = self.scale_to_zero_grace_period;
        check(!grace.is_zero(), "scale-to-zero-grace-period", duration(grace), "more than 0s");
        let initial = self.initial_scale;
        check(initial > 0 || self.allow_zero_initial_scale, "initial-scale", initial.to_string(), "at least 1");
        if wrong.is_empty() { Ok(()) } else { Err(wrong) }
    }
}

impl Annotations<'_> {
    fn config(&mut self, defaults: &Defaults, fields: &Scaling) -> ScalerConfig {
        let class = self.class();
        let metric = self.metric(fields);
        let aggregation = self.aggregation();
        let (default_total, default_utilization) = defaults.target(metric);
        let utilization = self.percentage("target-utilization-percentage", 1.0..=100.0).unwrap_or(default_utilization);
        let annotated = self.target();
        let (target, total) = metric_target(
            metric,
            fields.container_concurrency,
            fields.scale_target.map(|target| target as f64).or(annotated),
            utilization,
            default_total,
        );
        let slots = match fields.container_concurrency {
            limit if limit > 0 => limit as f64,
            _ => defaults.container_concurrency_target_default,
        };
        let stable_window = self.window().unwrap_or(defaults.stable_window);
        let panic_percentage = self.percentage("panic-window-percentage", 1.0..=100.0);
        let panic_threshold = self.percentage("panic-threshold-percentage", 110.0..=1000.0);
        let (min_scale, max_scale) = self.bounds(fields);
        ScalerConfig {
            class,
            metric,
            aggregation,
            target,
            total,
            slots,
            target_burst_capacity: self.burst_capacity().unwrap_or(defaults.target_burst_capacity),
            stable_window,
            panic_window: panic_window(stable_window, panic_percentage.unwrap_or(defaults.panic_window_percentage)),
            panic_threshold: panic_threshold.unwrap_or(defaults.panic_threshold_percentage) / 100.0,
            max_scale_up_rate: defaults.max_scale_up_rate,
            max_scale_down_rate: defaults.max_scale_down_rate,
            scale_down_delay: self.scale_down_delay().unwrap_or(defaults.scale_down_delay),
            activation_scale: self.activation_scale(min_scale, max_scale),
            min_scale,
            max_scale,
            initial_scale: self.initial_scale(defaults),
            pod_retention: self.retention().unwrap_or(defaults.scale_to_zero_pod_retention_period),
            grace: defaults.scale_to_zero_grace_period,
            enable_scale_to_zero: defaults.enable_scale_to_zero,
            activation_timeout: defaults.progress_deadline + Duration::from_secs(30),
            spare_replicas: self.spare_replicas(class),
            prewarm: self.prewarm(),
        }
    }
}
