//! Outcomes as tables, JSON or YAML.

use pilotlight_coordinator::simulate::{Outcome, ServiceOutcome, replay::Replay};
use serde_json::json;

use crate::{
    failure::Failure,
    output::{self, Format},
    table::Table,
};

/// Rows of the table over time at most.
const ROWS_MOST: usize = 40;

/// Prints what came of each variation.
pub fn outcomes(outcomes: &[(String, Outcome)], format: &Format) -> Result<(), Failure> {
    if format.is_structured() {
        let runs: Vec<_> =
            outcomes.iter().map(|(variation, outcome)| json!({"variation": variation, "outcome": outcome})).collect();
        return output::print_value(&json!({ "runs": runs }), format);
    }
    for index in 0..outcomes.first().map_or(0, |(_, outcome)| outcome.services.len()) {
        let services: Vec<_> =
            outcomes.iter().map(|(variation, outcome)| (variation.as_str(), &outcome.services[index])).collect();
        let name = &services[0].1.service;
        output::print(&format!("Service {name}\n\n"))?;
        output::print(&summary(&services))?;
        for (variation, service) in &services {
            output::print(&format!("\n{name}, {variation}, over time:\n\n{}", over_time(service)))?;
        }
    }
    Ok(())
}

/// A row per variation.
fn summary(services: &[(&str, &ServiceOutcome)]) -> String {
    let mut table = Table::new(&[
        "VARIATION",
        "REQUESTS",
        "SERVED",
        "SHED",
        "TIMEOUT",
        "COLD",
        "WAIT-P50",
        "WAIT-P99",
        "WAIT-MAX",
        "LATENCY-P99",
        "REPLICAS",
        "PEAK",
        "NEED",
        "PAST-NEED",
        "COLDSTARTS",
        "PANIC-S",
        "GPU-MIN",
        "REPLICA-MIN",
    ]);
    for (variation, service) in services {
        let panic: f64 = service.panic.iter().map(|period| period.until - period.from).sum();
        table.row([
            (*variation).to_owned(),
            service.requests.to_string(),
            service.served.to_string(),
            service.shed.to_string(),
            service.timed_out.to_string(),
            service.cold_requests.to_string(),
            seconds(service.wait.p50),
            seconds(service.wait.p99),
            seconds(service.wait.max),
            seconds(service.latency.p99),
            service.replicas_ordered.to_string(),
            service.peak_replicas.to_string(),
            service.peak_need.to_string(),
            service.ordered_past_need.to_string(),
            service.cold_starts.to_string(),
            format!("{panic:.0}"),
            format!("{:.1}", service.gpu_minutes),
            format!("{:.1}", service.replica_minutes),
        ]);
    }
    table.text()
}

fn seconds(value: f64) -> String {
    format!("{value:.2}s")
}

/// Rows at even distances.
fn over_time(service: &ServiceOutcome) -> String {
    let mut table = Table::new(&[
        "TIME", "WANTED", "READY", "STARTING", "DRAINING", "WAITING", "RUNNING", "STABLE", "PANIC", "MODE",
    ]);
    let step = service.timeline.len().div_ceil(ROWS_MOST).max(1);
    for point in service.timeline.iter().step_by(step) {
        let whole = point.seconds as u64;
        table.row([
            format!("{}:{:02}:{:02}", whole / 3600, whole / 60 % 60, whole % 60),
            point.wanted.to_string(),
            point.ready.to_string(),
            point.starting.to_string(),
            point.draining.to_string(),
            point.waiting.to_string(),
            point.running.to_string(),
            format!("{:.1}", point.stable_value),
            format!("{:.1}", point.panic_value),
            if point.panic { "panic" } else { "stable" }.to_owned(),
        ]);
    }
    table.text()
}

/// Prints what came of a replay.
pub fn replay(replay: &Replay, format: &Format) -> Result<(), Failure> {
    if format.is_structured() {
        let value = serde_json::to_value(replay).map_err(anyhow::Error::from)?;
        return output::print_value(&value, format);
    }
    output::print(&format!(
        "{} revisions, {} reports, {} decisions made again ({} in panic, {} replicas at most): {} differ\n",
        replay.revisions,
        replay.samples,
        replay.decisions,
        replay.in_panic,
        replay.most,
        replay.differences.len()
    ))?;
    for difference in replay.differences.iter().take(ROWS_MOST) {
        output::print(&format!(
            "line {}, {}, {}:\n  recorded {:?}\n  replayed {:?}\n",
            difference.line, difference.at, difference.revision, difference.recorded, difference.replayed
        ))?;
    }
    Ok(())
}
