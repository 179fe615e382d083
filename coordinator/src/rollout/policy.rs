//! What annotations say about roll-outs.

use std::{collections::BTreeMap, time::Duration};

use crate::{autoscaler::go_duration, finding::Finding};

/// Time without a sign of progress after which a new revision has failed; Go duration.
pub const PROGRESS_DEADLINE: &str = "serving.knative.dev/progress-deadline";
/// `"true"`: the newest revision has a host name of its own.
pub const TAG_ROUTING: &str = "serving.kserve.io/enable-tag-routing";
/// Requests with the same value of this header go to the same revision.
pub const STICKY_HEADER: &str = "pilotlight.dev/sticky-header";
/// Replicas beyond the usual number during a roll-out, as a number or a percentage.
pub const MAX_SURGE: &str = "pilotlight.dev/max-surge";
/// Replicas that may be missing during a roll-out.
pub const MAX_UNAVAILABLE: &str = "pilotlight.dev/max-unavailable";

/// Those of the above that concern a service rather than a revision: changing them makes no revision.
pub const OF_SERVICE: [&str; 3] = [STICKY_HEADER, MAX_SURGE, MAX_UNAVAILABLE];

/// A number of replicas, or a part of the usual number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Amount {
    /// As many.
    Replicas(u32),
    /// Percent, rounded up, as Kubernetes' surge.
    Percent(u32),
}

impl Amount {
    /// The number, where `usual` is 100 %.
    pub fn of(self, usual: u32) -> u32 {
        match self {
            Self::Replicas(count) => count,
            Self::Percent(percent) => {
                u32::try_from((u64::from(usual) * u64::from(percent)).div_ceil(100)).unwrap_or(u32::MAX)
            }
        }
    }

    fn parse(text: &str) -> Option<Self> {
        match text.strip_suffix('%') {
            Some(percent) => percent.parse().ok().map(Self::Percent),
            None => text.parse().ok().map(Self::Replicas),
        }
    }
}

/// How a service is rolled out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// See [`PROGRESS_DEADLINE`].
    pub progress_deadline: Duration,
    /// See [`STICKY_HEADER`]; lower case.
    pub sticky_header: Option<String>,
    /// See [`MAX_SURGE`]; `None` is as many as fit.
    pub max_surge: Option<Amount>,
    /// See [`MAX_UNAVAILABLE`]; `None` is 1, and never the last warm replica that was promised.
    pub max_unavailable: Option<u32>,
}

impl Policy {
    /// Without annotations.
    pub fn new(progress_deadline: Duration) -> Self {
        Self { progress_deadline, sticky_header: None, max_surge: None, max_unavailable: None }
    }

    /// From annotations, those that come later winning. What cannot be read was refused when it was
    /// applied ([`check`]); should it have come in otherwise, the default holds.
    pub fn resolve<'a>(
        annotations: impl IntoIterator<Item = &'a BTreeMap<String, String>>,
        progress_deadline: Duration,
    ) -> Self {
        let mut policy = Self::new(progress_deadline);
        for annotations in annotations {
            let value = |key: &str| annotations.get(key).map(|value| value.trim());
            if let Some(deadline) = value(PROGRESS_DEADLINE).and_then(deadline) {
                policy.progress_deadline = deadline;
            }
            if let Some(header) = value(STICKY_HEADER).and_then(header) {
                policy.sticky_header = Some(header);
            }
            if let Some(surge) = value(MAX_SURGE).and_then(Amount::parse) {
                policy.max_surge = Some(surge);
            }
            if let Some(missing) = value(MAX_UNAVAILABLE).and_then(|value| value.parse().ok()) {
                policy.max_unavailable = Some(missing);
            }
        }
        policy
    }
}

/// See [`TAG_ROUTING`]; of several annotations the last holds. Apart from [`Policy`], since it is asked for with
/// every decision.
pub fn tag_latest<'a>(annotations: impl IntoIterator<Item = &'a BTreeMap<String, String>>) -> bool {
    let last = annotations.into_iter().filter_map(|annotations| annotations.get(TAG_ROUTING)).last();
    last.is_some_and(|enabled| enabled.trim().eq_ignore_ascii_case("true"))
}

/// Says what is wrong with annotations at `at`.
pub fn check(annotations: &BTreeMap<String, String>, at: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut check = |key: &str, valid: &dyn Fn(&str) -> bool, expected: &str| {
        if let Some(value) = annotations.get(key).filter(|value| !valid(value.trim())) {
            findings.push(Finding::error(format!("{at}[{key}]"), value, expected));
        }
    };
    check(PROGRESS_DEADLINE, &|value| deadline(value).is_some(), "must be a Go duration of 1s or more, such as 20m");
    check(TAG_ROUTING, &|value| ["true", "false"].contains(&value), "must be \"true\" or \"false\"");
    check(STICKY_HEADER, &|value| header(value).is_some(), "must be the name of a header, such as x-user");
    check(MAX_SURGE, &|value| Amount::parse(value).is_some(), "must be a whole number or a percentage, such as 25%");
    check(MAX_UNAVAILABLE, &|value| value.parse::<u32>().is_ok(), "must be a whole number");
    findings
}

fn deadline(text: &str) -> Option<Duration> {
    go_duration(text).filter(|deadline| *deadline >= Duration::from_secs(1))
}

fn header(text: &str) -> Option<String> {
    axum::http::HeaderName::from_bytes(text.as_bytes()).ok().map(|name| name.as_str().to_owned())
}
