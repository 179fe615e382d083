//! The autoscaler's fleet-wide settings as flags, named as in Knative's `config-autoscaler`.

use std::time::Duration;

use pilotlight_coordinator::autoscaler::Defaults;

/// Fleet-wide autoscaler settings; annotations of a service win over them. The defaults are CoreWeave's.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Autoscaler")]
pub struct ScalingArgs {
    /// Load is averaged over this time, 6s to 1h.
    #[arg(long, env = "PILOTLIGHT_STABLE_WINDOW", default_value = "180s", value_parser = humantime::parse_duration, value_name = "TIME")]
    stable_window: Duration,
    /// Panic window as a percentage of the stable one, 1 to 100.
    #[arg(long, env = "PILOTLIGHT_PANIC_WINDOW_PERCENTAGE", default_value_t = 13.0, value_name = "PERCENT")]
    panic_window_percentage: f64,
    /// Panic begins where this percentage of the ready replicas is wanted, 110 to 1000.
    #[arg(long, env = "PILOTLIGHT_PANIC_THRESHOLD_PERCENTAGE", default_value_t = 200.0, value_name = "PERCENT")]
    panic_threshold_percentage: f64,
    /// Part of a replica's concurrency that is aimed at, above 0 to 100.
    #[arg(
        long,
        env = "PILOTLIGHT_CONTAINER_CONCURRENCY_TARGET_PERCENTAGE",
        default_value_t = 85.0,
        value_name = "PERCENT"
    )]
    container_concurrency_target_percentage: f64,
    /// Requests per replica where containerConcurrency is 0.
    #[arg(
        long,
        env = "PILOTLIGHT_CONTAINER_CONCURRENCY_TARGET_DEFAULT",
        default_value_t = 100.0,
        value_name = "REQUESTS"
    )]
    container_concurrency_target_default: f64,
    /// Requests per second and replica, for the metric rps.
    #[arg(long, env = "PILOTLIGHT_REQUESTS_PER_SECOND_TARGET_DEFAULT", default_value_t = 200.0, value_name = "RPS")]
    requests_per_second_target_default: f64,
    /// Waiting requests per replica, for the metric queue-depth.
    #[arg(long, env = "PILOTLIGHT_QUEUE_DEPTH_TARGET_DEFAULT", default_value_t = 5.0, value_name = "REQUESTS")]
    queue_depth_target_default: f64,
    /// Tokens per replica, for the metric tokens-in-flight.
    #[arg(long, env = "PILOTLIGHT_TOKENS_IN_FLIGHT_TARGET_DEFAULT", default_value_t = 16_384.0, value_name = "TOKENS")]
    tokens_in_flight_target_default: f64,
    /// Spare capacity that decisions report against; 0 for none, -1 without end.
    #[arg(
        long,
        env = "PILOTLIGHT_TARGET_BURST_CAPACITY",
        default_value_t = 211.0,
        value_name = "REQUESTS",
        allow_negative_numbers = true
    )]
    target_burst_capacity: f64,
    /// Ready replicas may grow by this factor per decision, above 1.
    #[arg(long, env = "PILOTLIGHT_MAX_SCALE_UP_RATE", default_value_t = 20.0, value_name = "FACTOR")]
    max_scale_up_rate: f64,
    /// Ready replicas may shrink by this factor per decision, above 1.
    #[arg(long, env = "PILOTLIGHT_MAX_SCALE_DOWN_RATE", default_value_t = 1.1, value_name = "FACTOR")]
    max_scale_down_rate: f64,
    /// A smaller wish counts only after this long.
    #[arg(long, env = "PILOTLIGHT_SCALE_DOWN_DELAY", default_value = "60s", value_parser = humantime::parse_duration, value_name = "TIME")]
    scale_down_delay: Duration,
    /// The last replica stays this long after the load has aged out.
    #[arg(long, env = "PILOTLIGHT_SCALE_TO_ZERO_POD_RETENTION_PERIOD", default_value = "30m", value_parser = humantime::parse_duration, value_name = "TIME")]
    scale_to_zero_pod_retention_period: Duration,
    /// Bounds how long a replaced revision's last replica stays.
    #[arg(long, env = "PILOTLIGHT_SCALE_TO_ZERO_GRACE_PERIOD", default_value = "60s", value_parser = humantime::parse_duration, value_name = "TIME")]
    scale_to_zero_grace_period: Duration,
    /// Whether services may go to zero replicas.
    #[arg(long, env = "PILOTLIGHT_ENABLE_SCALE_TO_ZERO", default_value_t = true, action = clap::ArgAction::Set, value_name = "BOOL")]
    enable_scale_to_zero: bool,
    /// Replicas of a new revision.
    #[arg(long, env = "PILOTLIGHT_INITIAL_SCALE", default_value_t = 1, value_name = "REPLICAS")]
    initial_scale: u32,
    /// Whether a service may be born at zero replicas.
    #[arg(long, env = "PILOTLIGHT_ALLOW_ZERO_INITIAL_SCALE", default_value_t = true, action = clap::ArgAction::Set, value_name = "BOOL")]
    allow_zero_initial_scale: bool,
    /// A new revision that is not ready after this long, plus 30 s, goes to zero.
    #[arg(long, env = "PILOTLIGHT_PROGRESS_DEADLINE", default_value = "10m", value_parser = humantime::parse_duration, value_name = "TIME")]
    progress_deadline: Duration,
}

impl ScalingArgs {
    /// As the autoscaler takes them; it checks their ranges.
    pub fn defaults(self) -> Defaults {
        Defaults {
            stable_window: self.stable_window,
            panic_window_percentage: self.panic_window_percentage,
            panic_threshold_percentage: self.panic_threshold_percentage,
            container_concurrency_target_percentage: self.container_concurrency_target_percentage,
            container_concurrency_target_default: self.container_concurrency_target_default,
            requests_per_second_target_default: self.requests_per_second_target_default,
            queue_depth_target_default: self.queue_depth_target_default,
            tokens_in_flight_target_default: self.tokens_in_flight_target_default,
            target_burst_capacity: self.target_burst_capacity,
            max_scale_up_rate: self.max_scale_up_rate,
            max_scale_down_rate: self.max_scale_down_rate,
            scale_down_delay: self.scale_down_delay,
            scale_to_zero_pod_retention_period: self.scale_to_zero_pod_retention_period,
            scale_to_zero_grace_period: self.scale_to_zero_grace_period,
            enable_scale_to_zero: self.enable_scale_to_zero,
            initial_scale: self.initial_scale,
            allow_zero_initial_scale: self.allow_zero_initial_scale,
            progress_deadline: self.progress_deadline,
            ..Defaults::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        scaling: ScalingArgs,
    }

    #[test]
    fn without_flags_the_defaults_are_the_autoscalers_own() {
        let expected = Defaults { allow_zero_initial_scale: true, ..Defaults::default() };
        assert_eq!(Command::parse_from(["t"]).scaling.defaults(), expected);
    }

    #[test]
    fn what_is_out_of_range_is_named() {
        let scaling = Command::parse_from(["t", "--max-scale-down-rate", "1", "--stable-window", "5s"]).scaling;
        let wrong = scaling.defaults().validate().unwrap_err().join("\n");
        assert!(wrong.contains("max-scale-down-rate: 1: expected more than 1"), "{wrong}");
        assert!(wrong.contains("stable-window: 5s: expected whole seconds, 6s to 1h"), "{wrong}");
    }
}
