//! Reads `autoscaling.knative.dev/*`: every key with its alias, bounds and message.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::RangeInclusive,
    time::Duration,
};

use super::{Aggregation, Class, Defaults, Metric};
use crate::{finding::Finding, spec::Scaling};

const GROUP: &str = "autoscaling.knative.dev/";
const KPA: &str = "kpa.autoscaling.knative.dev";
const GPU: &str = "gpu.autoscaling.pilotlight.dev";
const SPARE_REPLICAS: &str = "pilotlight.dev/spare-replicas";
const PREWARM: &str = "pilotlight.dev/prewarm";
const METRICS: &str = "expected concurrency, rps, queue-depth or tokens-in-flight";
const SCALE_MOST: i64 = i32::MAX as i64;
const HOUR: Duration = Duration::from_secs(3600);
/// Keys that have a camel-case alias.
const ALIASED: [(&str, &str); 10] = [
    ("metric-aggregation-algorithm", "metricAggregationAlgorithm"),
    ("target-utilization-percentage", "targetUtilizationPercentage"),
    ("target-burst-capacity", "targetBurstCapacity"),
    ("panic-window-percentage", "panicWindowPercentage"),
    ("panic-threshold-percentage", "panicThresholdPercentage"),
    ("min-scale", "minScale"),
    ("max-scale", "maxScale"),
    ("initial-scale", "initialScale"),
    ("scale-down-delay", "scaleDownDelay"),
    ("scale-to-zero-pod-retention-period", "scaleToZeroPodRetentionPeriod"),
];

/// Annotations being read: remembers what was looked at and what is wrong.
pub(super) struct Annotations<'a> {
    given: &'a BTreeMap<String, String>,
    seen: BTreeSet<&'a str>,
    findings: Vec<Finding>,
}

impl<'a> Annotations<'a> {
    pub(super) fn new(given: &'a BTreeMap<String, String>) -> Self {
        Self { given, seen: BTreeSet::new(), findings: Vec::new() }
    }

    /// Warnings, or everything where one finding is an error.
    pub(super) fn finish(mut self) -> Result<Vec<Finding>, Vec<Finding>> {
        for (key, value) in self.given.iter().filter(|(key, _)| key.starts_with(GROUP)) {
            if !self.seen.contains(key.as_str()) {
                self.findings.push(Finding::warning(
                    path(key),
                    value,
                    "is not an annotation that the autoscaler knows",
                ));
            }
        }
        if self.findings.iter().any(Finding::is_error) { Err(self.findings) } else { Ok(self.findings) }
    }

    /// The annotation's full key and value; the dashed key wins over its alias.
    fn get(&mut self, name: &str) -> Option<(&'a str, &'a str)> {
        let alias = ALIASED.iter().find(|(dashed, _)| *dashed == name).map(|(_, camel)| *camel);
        let mut found = None;
        for name in [Some(name), alias].into_iter().flatten() {
            if let Some((key, value)) = self.given.get_key_value(&format!("{GROUP}{name}")) {
                self.seen.insert(key);
                found = found.or(Some((key.as_str(), value.as_str())));
            }
        }
        found
    }

    fn refuse(&mut self, key: &str, value: &str, message: impl Into<String>) {
        self.findings.push(Finding::error(path(key), value, message));
    }

    pub(super) fn class(&mut self) -> Class {
        match self.get("class") {
            None | Some((_, KPA)) => Class::Kpa,
            Some((_, GPU)) => Class::Gpu,
            Some((key, value)) => {
                self.refuse(key, value, format!("expected {KPA} or {GPU}, the classes that this fleet has"));
                Class::Kpa
            }
        }
    }

    /// 0 to 1000, for the GPU class alone: Knative's has no such thing, and must stay as it is.
    pub(super) fn spare_replicas(&mut self, class: Class) -> u32 {
        let Some(value) = self.given.get(SPARE_REPLICAS) else { return 0 };
        match value.parse() {
            Ok(spare @ 1..=1000) if class != Class::Gpu => {
                let message = format!("needs {GROUP}class: {GPU}; {spare} replicas would have no effect");
                self.refuse(SPARE_REPLICAS, value, message);
                0
            }
            Ok(spare @ 0..=1000) => spare,
            _ => {
                self.refuse(SPARE_REPLICAS, value, "expected a whole number, 0 <= value <= 1000");
                0
            }
        }
    }

    pub(super) fn prewarm(&mut self) -> bool {
        match self.given.get(PREWARM).map(String::as_str) {
            None | Some("off") => false,
            Some("auto") => true,
            Some(value) => {
                self.refuse(PREWARM, value, "expected auto or off");
                false
            }
        }
    }

    pub(super) fn metric(&mut self, fields: &Scaling) -> Metric {
        let annotated = self.get("metric").map(|(key, value)| (path(key), value));
        let field = fields.scale_metric.as_deref().map(|value| ("spec.predictor.scaleMetric".to_owned(), value));
        match field.or(annotated) {
            None | Some((_, "concurrency")) => Metric::Concurrency,
            Some((_, "rps")) => Metric::Rps,
            Some((_, "queue-depth")) => Metric::QueueDepth,
            Some((_, "tokens-in-flight")) => Metric::TokensInFlight,
            Some((at, value)) => {
                self.findings.push(Finding::error(at, value, METRICS));
                Metric::default()
            }
        }
    }

    pub(super) fn aggregation(&mut self) -> Aggregation {
        match self.get("metric-aggregation-algorithm") {
            None | Some((_, "linear")) => Aggregation::Linear,
            Some((_, "weighted-exponential" | "weightedExponential")) => Aggregation::WeightedExponential,
            Some((key, value)) => {
                self.refuse(key, value, "expected linear or weighted-exponential");
                Aggregation::default()
            }
        }
    }

    pub(super) fn target(&mut self) -> Option<f64> {
        self.float("target", "expected a number of at least 0.01", |value| value >= 0.01)
    }

    pub(super) fn burst_capacity(&mut self) -> Option<f64> {
        self.float("target-burst-capacity", "expected a number of at least 0, or -1", |value| {
            value >= 0.0 || value == -1.0
        })
    }

    pub(super) fn percentage(&mut self, name: &str, range: RangeInclusive<f64>) -> Option<f64> {
        let expected = format!("expected a number, {} <= value <= {}", range.start(), range.end());
        self.float(name, &expected, |value| range.contains(&value))
    }

    fn float(&mut self, name: &str, expected: &str, allowed: impl Fn(f64) -> bool) -> Option<f64> {
        let (key, value) = self.get(name)?;
        // NaN slips through Knative's comparisons; here it fails them all.
        match value.parse::<f64>() {
            Ok(number) if number.is_finite() && allowed(number) => Some(number),
            _ => {
                self.refuse(key, value, expected);
                None
            }
        }
    }

    fn whole(&mut self, name: &str, range: RangeInclusive<i64>) -> Option<i64> {
        let (key, value) = self.get(name)?;
        match value.parse::<i64>() {
            Ok(number) if range.contains(&number) => Some(number),
            _ => {
                self.refuse(
                    key,
                    value,
                    format!("expected a whole number, {} <= value <= {}", range.start(), range.end()),
                );
                None
            }
        }
    }

    fn duration(&mut self, name: &str, range: RangeInclusive<Duration>, whole_seconds: bool) -> Option<Duration> {
        let (key, value) = self.get(name)?;
        let Some(duration) = go_duration(value) else {
            self.refuse(key, value, "expected a duration such as 90s, 1m30s or 0");
            return None;
        };
        if !range.contains(&duration) {
            let (from, to) = (humantime::format_duration(*range.start()), humantime::format_duration(*range.end()));
            self.refuse(key, value, format!("expected {from} <= value <= {to}"));
            return None;
        }
        if whole_seconds && duration.subsec_nanos() != 0 {
            self.refuse(key, value, "must be specified with at most second precision");
            return None;
        }
        Some(duration)
    }

    pub(super) fn window(&mut self) -> Option<Duration> {
        self.duration("window", Duration::from_secs(6)..=HOUR, true)
    }

    pub(super) fn scale_down_delay(&mut self) -> Option<Duration> {
        self.duration("scale-down-delay", Duration::ZERO..=HOUR, true)
    }

    pub(super) fn retention(&mut self) -> Option<Duration> {
        self.duration("scale-to-zero-pod-retention-period", Duration::ZERO..=HOUR, false)
    }

    /// KServe's fields win over the annotations; unset, they are 1 and no limit.
    pub(super) fn bounds(&mut self, fields: &Scaling) -> (u32, u32) {
        let annotated_min = self.whole("min-scale", 0..=SCALE_MOST);
        let annotated_max = self.whole("max-scale", 0..=SCALE_MOST);
        let max = match fields.max_replicas {
            0 => annotated_max.unwrap_or(0),
            max => max,
        };
        let min = fields.min_replicas.or(annotated_min).unwrap_or(1);
        if max != 0 && min > max {
            let (at, value) = ("spec.predictor.maxReplicas", max.to_string());
            self.findings.push(Finding::error(at, value, format!("max-scale={max} is less than min-scale={min}")));
        }
        (min.clamp(0, SCALE_MOST) as u32, max.clamp(0, SCALE_MOST) as u32)
    }

    pub(super) fn initial_scale(&mut self, defaults: &Defaults) -> u32 {
        let least = i64::from(!defaults.allow_zero_initial_scale);
        self.whole("initial-scale", least..=SCALE_MOST).map_or(defaults.initial_scale, |scale| scale as u32)
    }

    pub(super) fn activation_scale(&mut self, min: u32, max: u32) -> u32 {
        let Some(scale) = self.whole("activation-scale", 2..=SCALE_MOST) else { return 0 };
        let scale = scale as u32;
        let Some((key, value)) = self.get("activation-scale") else { return 0 };
        if min > scale {
            self.refuse(key, value, format!("min-scale={min} is greater than activation-scale={scale}"));
        }
        if max != 0 && max < scale {
            self.refuse(key, value, format!("max-scale={max} is less than activation-scale={scale}"));
        }
        scale
    }
}

fn path(key: &str) -> String {
    format!("metadata.annotations[{key}]")
}

/// Go's durations: `1h5m`, `90s`, `1.5h`, `300ms`, `0`. Negative ones are out of every range here.
fn go_duration(text: &str) -> Option<Duration> {
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let mut rest = text.strip_prefix('+').unwrap_or(text);
    let mut seconds = 0.0;
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let number: f64 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let unit = rest.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(rest.len());
        seconds += number
            * match &rest[..unit] {
                "h" => 3600.0,
                "m" => 60.0,
                "s" => 1.0,
                "ms" => 1e-3,
                "us" | "µs" | "μs" => 1e-6,
                "ns" => 1e-9,
                _ => return None,
            };
        rest = &rest[unit..];
    }
    Duration::try_from_secs_f64(seconds).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(annotations: &[(&str, &str)], fields: &Scaling) -> Result<super::super::ScalerConfig, String> {
        let given = annotations.iter().map(|(key, value)| (format!("{GROUP}{key}"), (*value).to_owned())).collect();
        super::super::ScalerConfig::resolve(&Defaults::default(), &given, fields)
            .map(|(config, _)| config)
            .map_err(|findings| findings.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))
    }

    #[test]
    fn bad_values_are_refused_by_key_value_and_range() {
        let cases = [
            ("class", "hpa.autoscaling.knative.dev", "kpa.autoscaling.knative.dev"),
            ("metric", "cpu", "concurrency, rps, queue-depth or tokens-in-flight"),
            ("metric-aggregation-algorithm", "median", "linear"),
            ("target", "0.009", "at least 0.01"),
            ("target", "NaN", "at least 0.01"),
            ("target-utilization-percentage", "0.5", "1 <= value <= 100"),
            ("targetUtilizationPercentage", "101", "1 <= value <= 100"),
            ("target-burst-capacity", "-2", "-1"),
            ("window", "5s", "6s <= value <= 1h"),
            ("window", "6500ms", "second precision"),
            ("window", "soon", "duration"),
            ("panic-window-percentage", "0", "1 <= value <= 100"),
            ("panic-threshold-percentage", "109", "110 <= value <= 1000"),
            ("min-scale", "-1", "0 <= value <= 2147483647"),
            ("maxScale", "x", "whole number"),
            ("initial-scale", "0", "1 <= value"),
            ("activation-scale", "1", "2 <= value"),
            ("scale-down-delay", "61m", "0s <= value <= 1h"),
            ("scale-to-zero-pod-retention-period", "2h", "0s <= value <= 1h"),
        ];
        for (key, value, expected) in cases {
            let error = resolve(&[(key, value)], &Scaling::default()).expect_err(key);
            assert!(error.contains(key) && error.contains(value) && error.contains(expected), "{error}");
        }
    }

    #[test]
    fn own_annotations_are_checked() {
        let own = |pairs: &[(&str, &str)]| {
            let given = pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
            super::super::ScalerConfig::resolve(&Defaults::default(), &given, &Scaling::default())
                .map(|(config, _)| (config.class, config.spare_replicas, config.prewarm))
                .map_err(|findings| findings.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))
        };
        let gpu = ("autoscaling.knative.dev/class", GPU);
        assert_eq!(own(&[]), Ok((Class::Kpa, 0, false)));
        assert_eq!(own(&[gpu, (SPARE_REPLICAS, "2"), (PREWARM, "auto")]), Ok((Class::Gpu, 2, true)));
        assert!(own(&[(SPARE_REPLICAS, "2")]).unwrap_err().contains("needs autoscaling.knative.dev/class"));
        assert!(own(&[gpu, (SPARE_REPLICAS, "-1")]).unwrap_err().contains("0 <= value <= 1000"));
        assert!(own(&[(PREWARM, "yes")]).unwrap_err().contains("auto or off"));
    }

    #[test]
    fn errors_add_up_and_unknown_keys_are_warnings() {
        let error = resolve(&[("window", "1s"), ("target", "0")], &Scaling::default()).unwrap_err();
        assert_eq!(error.lines().count(), 2, "{error}");
        let given = BTreeMap::from([(format!("{GROUP}windwo"), "6s".to_owned())]);
        let (_, warnings) =
            super::super::ScalerConfig::resolve(&Defaults::default(), &given, &Scaling::default()).unwrap();
        assert!(warnings[0].to_string().contains("windwo"));
    }

    #[test]
    fn bounds_must_agree() {
        let both = Scaling { min_replicas: Some(3), max_replicas: 2, ..Default::default() };
        assert!(resolve(&[], &both).unwrap_err().contains("max-scale=2 is less than min-scale=3"));
        let fields = Scaling { min_replicas: Some(0), max_replicas: 4, ..Default::default() };
        let config = resolve(&[("min-scale", "2"), ("activation-scale", "3")], &fields).unwrap();
        assert_eq!((config.min_scale, config.max_scale, config.activation_scale), (0, 4, 3));
        assert!(resolve(&[("activation-scale", "5")], &fields).unwrap_err().contains("less than activation-scale=5"));
        let unset = resolve(&[], &Scaling::default()).unwrap();
        assert_eq!((unset.min_scale, unset.max_scale), (1, 0));
    }

    #[test]
    fn go_durations() {
        let cases = [
            ("0", Some(0.0)),
            ("90s", Some(90.0)),
            ("1h5m", Some(3900.0)),
            ("1.5h", Some(5400.0)),
            ("300ms", Some(0.3)),
        ];
        for (text, seconds) in cases {
            assert_eq!(go_duration(text).map(|d| d.as_secs_f64()), seconds, "{text}");
        }
        for bad in ["", "1", "-1s", "s", "1x", "1s2"] {
            assert_eq!(go_duration(bad), None, "{bad}");
        }
    }
}
