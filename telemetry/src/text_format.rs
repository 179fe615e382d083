//! Prometheus' plain text format 0.0.4, made of OpenMetrics text. Pure.

/// Rewrites OpenMetrics text as Prometheus' text format 0.0.4, in which a counter's name ends in `_total` in its
/// metadata too, and types that it does not have become ones that it has.
pub(crate) fn from_openmetrics(openmetrics: &str) -> String {
    let mut text = String::with_capacity(openmetrics.len());
    let mut help = None;
    for line in openmetrics.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            // The type that follows decides about the name.
            help = rest.split_once(' ');
        } else if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' ')) {
            let (suffix, kind) = match kind {
                "counter" => ("_total", "counter"),
                "info" => ("_info", "gauge"),
                "unknown" => ("", "untyped"),
                kind => ("", kind),
            };
            if let Some((_, help)) = help.take().filter(|(described, _)| *described == name) {
                text.push_str(&format!("# HELP {name}{suffix} {help}\n"));
            }
            text.push_str(&format!("# TYPE {name}{suffix} {kind}\n"));
        } else if !line.starts_with('#') {
            text.push_str(line);
            text.push('\n');
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_described_by_the_name_of_their_samples() {
        let openmetrics = "# HELP things Things seen.\n# TYPE things counter\nthings_total 3\n# EOF\n";
        let text = "# HELP things_total Things seen.\n# TYPE things_total counter\nthings_total 3\n";
        assert_eq!(from_openmetrics(openmetrics), text);
    }

    #[test]
    fn units_are_left_out_and_histograms_keep_their_name() {
        let openmetrics =
            "# HELP d_seconds Time.\n# TYPE d_seconds histogram\n# UNIT d_seconds seconds\nd_seconds_sum 1.0\n";
        let text = "# HELP d_seconds Time.\n# TYPE d_seconds histogram\nd_seconds_sum 1.0\n";
        assert_eq!(from_openmetrics(openmetrics), text);
    }

    #[test]
    fn information_is_a_gauge() {
        let openmetrics = "# HELP target Target.\n# TYPE target info\ntarget_info{a=\"b\"} 1\n";
        let text = "# HELP target_info Target.\n# TYPE target_info gauge\ntarget_info{a=\"b\"} 1\n";
        assert_eq!(from_openmetrics(openmetrics), text);
    }
}
