//! Conditions of a service and its components, in KServe's names. Pure.
//!
//! `Ready` depends on `PredictorReady` and `IngressReady` alone. The first asks whether what was applied
//! last can serve, the second whether requests find their way to something that can: with a newer
//! revision that fails, the first is false and the second stays true, since the last good one serves.

use std::collections::BTreeMap;

use jiff::Timestamp;
use pilotlight_proto::fleet::v1 as fleet;

use super::world::{ReplicaState, RevisionState, ServiceState, World};
use crate::{
    model::ConditionRecord,
    rollout::policy::MAX_UNAVAILABLE,
    spec::{ComponentKind, Condition, ConditionStatus},
};

/// `reason` of a revision that showed no progress for too long, as Knative and Kubernetes write it.
pub const DEADLINE_EXCEEDED: &str = "ProgressDeadlineExceeded";

/// Bytes of a failed replica's output that are part of a condition's message, at most.
const MAX_OUTPUT_BYTES: usize = 600;

/// Whether something holds, and if not, why.
#[derive(Debug, Clone, PartialEq, Eq)]
struct State {
    status: ConditionStatus,
    reason: String,
    message: String,
}

impl State {
    fn holds() -> Self {
        Self { status: ConditionStatus::True, reason: String::new(), message: String::new() }
    }

    fn fails(reason: &str, message: impl Into<String>) -> Self {
        Self { status: ConditionStatus::False, reason: reason.to_owned(), message: message.into() }
    }

    fn unknown(reason: &str, message: impl Into<String>) -> Self {
        Self { status: ConditionStatus::Unknown, reason: reason.to_owned(), message: message.into() }
    }

    /// Both: the first that fails, else the first that is not known, says why.
    fn and(&self, other: &Self) -> Self {
        let both = [self, other];
        let cause = |status| both.into_iter().find(|state| state.status == status).cloned();
        cause(ConditionStatus::False).or_else(|| cause(ConditionStatus::Unknown)).unwrap_or_else(Self::holds)
    }
}

/// All conditions, sorted by name; each with the time since when it is as it is.
pub fn of(world: &World, service: &ServiceState) -> Vec<Condition> {
    states(world, service)
        .into_iter()
        .map(|(name, state)| Condition {
            name,
            informative: !matches!(name, "Ready" | "PredictorReady" | "IngressReady"),
            last_transition: since(service, name, state.status),
            status: state.status,
            reason: state.reason,
            message: state.message,
        })
        .collect()
}

/// What is to be remembered, where a status is another than what was.
pub fn changed(world: &World, service: &ServiceState, now: Timestamp) -> Option<BTreeMap<String, ConditionRecord>> {
    let mut kept = service.conditions.clone();
    for (name, state) in states(world, service) {
        if kept.get(name).is_none_or(|record| record.status != state.status) {
            kept.insert(name.to_owned(), ConditionRecord { status: state.status, since: now });
        }
    }
    (kept != service.conditions).then_some(kept)
}

fn since(service: &ServiceState, name: &str, status: ConditionStatus) -> Timestamp {
    let kept = service.conditions.get(name).filter(|record| record.status == status);
    kept.map_or(service.record.created_at, |record| record.since)
}

/// What is known of one component.
struct Component {
    kind: ComponentKind,
    /// Whether its newest revision can serve.
    configuration: State,
    /// Whether requests find something that can.
    route: State,
}

impl Component {
    fn of(world: &World, component: &ServiceState) -> Self {
        let record = &component.record;
        let configuration = if record.service.stopped { stopped() } else { configuration(world, component) };
        // A newer revision that fails leaves the last good one serving: its route stays.
        let route = match () {
            () if record.service.stopped => stopped(),
            () if record.latest_ready.is_some() => State::holds(),
            () if configuration.status == ConditionStatus::False => {
                State::fails("RevisionMissing", &*configuration.message)
            }
            () => State::unknown("RevisionMissing", "no revision has been ready yet"),
        };
        Self { kind: record.component, configuration, route }
    }

    fn ready(&self) -> State {
        self.configuration.and(&self.route)
    }

    /// Its conditions in KServe's names, one of which is spelled otherwise for explainers.
    fn named(&self) -> [(&'static str, State); 3] {
        let [configuration, ready, route] = match self.kind {
            ComponentKind::Predictor => ["PredictorConfigurationReady", "PredictorReady", "PredictorRouteReady"],
            ComponentKind::Transformer => {
                ["TransformerConfigurationReady", "TransformerReady", "TransformerRouteReady"]
            }
            ComponentKind::Explainer => ["ExplainerConfigurationReady", "ExplainerReady", "ExplainerRoutesReady"],
        };
        [(configuration, self.configuration.clone()), (ready, self.ready()), (route, self.route.clone())]
    }
}

const STOPPED_BY: &str = "annotation serving.kserve.io/stop is true";

fn stopped() -> State {
    State::fails("Stopped", STOPPED_BY)
}

fn states(world: &World, service: &ServiceState) -> BTreeMap<&'static str, State> {
    let components: Vec<_> = world.components(service).map(|component| Component::of(world, component)).collect();
    let all = |state: &dyn Fn(&Component) -> State| {
        components.iter().fold(State::holds(), |all, component| all.and(&state(component)))
    };
    // Requests pass the transformer, so one that is not ready holds back the way in; so does an explainer.
    let ingress = all(&|component| match component.kind {
        ComponentKind::Predictor => component.route.clone(),
        ComponentKind::Transformer | ComponentKind::Explainer => component.ready(),
    });
    let predictor = components.first().map_or_else(State::holds, Component::ready);
    let is_stopped = service.record.service.stopped;
    let mut states = BTreeMap::from([
        ("IngressReady", ingress.clone()),
        ("LatestDeploymentReady", all(&|component| component.configuration.clone())),
        ("Ready", predictor.and(&ingress)),
        ("RoutesReady", all(&|component| component.route.clone())),
        (
            "Stopped",
            State {
                status: if is_stopped { ConditionStatus::True } else { ConditionStatus::False },
                reason: if is_stopped { "Stopped" } else { "" }.to_owned(),
                message: if is_stopped { STOPPED_BY } else { "" }.to_owned(),
            },
        ),
    ]);
    states.extend(components.iter().flat_map(Component::named));
    states
}

/// Whether the newest revision can serve, and if not, why.
fn configuration(world: &World, service: &ServiceState) -> State {
    let Some(revision) = world.newest(service) else {
        return State::unknown("RevisionMissing", "no revision yet");
    };
    if let Some(failed) = &revision.record.failed {
        return State::fails(DEADLINE_EXCEEDED, &*failed.message);
    }
    let counts = world.counts(revision);
    if counts.ready == 0 {
        if let Some((_, status)) = failure(world, revision) {
            return State::fails(&status.reason, failure_message(status));
        }
        if let Some(why) = unschedulable(revision) {
            return State::fails("Unschedulable", why);
        }
    }
    if revision.record.been_ready {
        return State::holds();
    }
    match unschedulable(revision) {
        _ if revision.record.in_place => {
            let message = format!(
                "replaces the former revision one replica at a time: {} of {} ready",
                counts.ready, revision.wanted
            );
            State::unknown("ReplacingInPlace", message)
        }
        Some(why) => State::unknown("Unschedulable", why),
        None => {
            let message = match revision.needed() {
                1 => "waiting for the first replica to be ready".to_owned(),
                needed => format!("waiting for {needed} replicas to be ready; {} are", counts.ready),
            };
            State::unknown("Deploying", message)
        }
    }
}

/// Why some replicas of a revision have no place, and what an operator could do.
fn unschedulable(revision: &RevisionState) -> Option<String> {
    let why = revision.unplaced.as_ref()?;
    if !revision.kept_out {
        return Some(why.clone());
    }
    Some(format!(
        "{why}; the former revision keeps its last replica, since minReplicas promises one: free a place, or \
         allow a gap with annotation {MAX_UNAVAILABLE}: \"1\""
    ))
}

/// The newest replica of a revision that has failed and was not ready since, and what its agent said.
pub fn failure<'a>(
    world: &'a World,
    revision: &'a RevisionState,
) -> Option<(&'a ReplicaState, &'a fleet::ReplicaStatus)> {
    let replicas = revision.replicas.iter().filter_map(|name| world.replicas.get(name));
    let failed = replicas.filter(|replica| replica.failure.is_some() && !replica.record.draining);
    let newest = failed.max_by_key(|replica| replica.record.created_at)?;
    newest.failure.as_ref().map(|status| (newest, status))
}

/// Why a replica has failed, with the last lines that it printed, in one line.
pub fn failure_message(status: &fleet::ReplicaStatus) -> String {
    let mut bytes = 0;
    let fits = |line: &&String| {
        bytes += line.len() + " | ".len();
        bytes <= MAX_OUTPUT_BYTES
    };
    let mut lines: Vec<_> = status.last_log_lines.iter().rev().take_while(fits).map(String::as_str).collect();
    if lines.is_empty() {
        return status.message.clone();
    }
    lines.reverse();
    format!("{}; last output: {}", status.message, lines.join(" | "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_message_quotes_the_last_lines_of_output_that_fit() {
        let message = |lines: Vec<String>| {
            failure_message(&fleet::ReplicaStatus {
                message: "the process ended with exit code 1".into(),
                last_log_lines: lines,
                ..Default::default()
            })
        };
        assert_eq!(message(vec![]), "the process ended with exit code 1");
        let few = message(vec!["loading".into(), "out of memory".into()]);
        assert_eq!(few, "the process ended with exit code 1; last output: loading | out of memory");
        let many = message((0..10).map(|line| format!("{line}{}", "x".repeat(280))).collect());
        assert!(many.contains("output: 8xxx") && many.contains(" | 9xxx"), "{many}");
        assert!(many.len() < 700);
    }
}
