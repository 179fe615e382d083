//! Annotations that say how warm replicas are kept while nobody needs them.

use std::{collections::BTreeMap, fmt, ops::RangeInclusive, str::FromStr};

use axum::http::uri::PathAndQuery;

use super::{documents::join, report::Report};

/// A whole number: replicas that are at least asleep at all times, past what serves. 0: idle ones stop.
pub const WARM_REPLICAS: &str = "pilotlight.dev/warm-replicas";
/// Path that puts the server to sleep, by POST.
pub const SLEEP_PATH: &str = "pilotlight.dev/sleep-path";
/// Path that wakes it, by POST.
pub const WAKE_PATH: &str = "pilotlight.dev/wake-path";
/// Path that says `{"is_sleeping": true}` or false, by GET; optional.
pub const IS_SLEEPING_PATH: &str = "pilotlight.dev/is-sleeping-path";

const REPLICAS: RangeInclusive<u32> = 0..=1000;

/// What becomes of a service's last replica once nobody needs it, unless [`WARM_REPLICAS`] says.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum IdleReplicas {
    /// It sleeps until somebody needs it, or its room.
    #[default]
    Sleep,
    /// It stops.
    Stop,
}

impl FromStr for IdleReplicas {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "sleep" => Ok(Self::Sleep),
            "stop" => Ok(Self::Stop),
            _ => Err("must be sleep or stop"),
        }
    }
}

impl fmt::Display for IdleReplicas {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Sleep => "sleep",
            Self::Stop => "stop",
        })
    }
}

/// A server's own endpoints for sleep, which free GPU memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SleepPaths {
    /// See [`SLEEP_PATH`].
    pub sleep: String,
    /// See [`WAKE_PATH`].
    pub wake: String,
    /// See [`IS_SLEEPING_PATH`].
    pub is_sleeping: Option<String>,
}

/// Value of [`WARM_REPLICAS`], of several annotations the last; `None` where none says.
pub fn warm_replicas<'a>(annotations: impl IntoIterator<Item = &'a BTreeMap<String, String>>) -> Option<u32> {
    annotations.into_iter().filter_map(|annotations| read_replicas(annotations.get(WARM_REPLICAS)?)).last()
}

fn read_replicas(text: &str) -> Option<u32> {
    text.trim().parse().ok().filter(|replicas| REPLICAS.contains(replicas))
}

/// The endpoints that annotations declare; `None` where they declare none, or not both that it takes,
/// which [`check`] refuses.
pub fn sleep_paths(annotations: &BTreeMap<String, String>) -> Option<SleepPaths> {
    let path = |key: &str| annotations.get(key).filter(|path| is_path(path)).cloned();
    Some(SleepPaths { sleep: path(SLEEP_PATH)?, wake: path(WAKE_PATH)?, is_sleeping: path(IS_SLEEPING_PATH) })
}

fn is_path(text: &str) -> bool {
    text.starts_with('/') && text.parse::<PathAndQuery>().is_ok()
}

/// Checks all of them; [`WARM_REPLICAS`] where it was given, on the service or a component.
pub(super) fn check_replicas(annotations: &BTreeMap<String, String>, at: &str, report: &mut Report) {
    if let Some(given) = annotations.get(WARM_REPLICAS).filter(|given| read_replicas(given).is_none()) {
        let message = format!("must be a whole number, {} to {}", REPLICAS.start(), REPLICAS.end());
        report.error(join(at, WARM_REPLICAS), given, message);
    }
}

/// Checks the endpoints of a revision, its runtime's annotations among them.
pub(super) fn check_paths(annotations: &BTreeMap<String, String>, report: &mut Report) {
    let at = |key| join("metadata.annotations", key);
    for key in [SLEEP_PATH, WAKE_PATH, IS_SLEEPING_PATH] {
        if let Some(given) = annotations.get(key).filter(|given| !is_path(given)) {
            report.error(at(key), given, "must be a path that begins with /");
        }
    }
    let given = [SLEEP_PATH, WAKE_PATH].map(|key| annotations.contains_key(key));
    if given != [true, true] && (given.contains(&true) || annotations.contains_key(IS_SLEEPING_PATH)) {
        let missing = if given[0] { WAKE_PATH } else { SLEEP_PATH };
        report.error(at(missing), "", "must be given with the other paths of sleep");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn annotations(given: &[(&str, &str)]) -> BTreeMap<String, String> {
        given.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    fn findings(given: &[(&str, &str)]) -> Vec<String> {
        let mut report = Report::new(false);
        check_replicas(&annotations(given), "metadata.annotations", &mut report);
        check_paths(&annotations(given), &mut report);
        report.into_findings().iter().map(ToString::to_string).collect()
    }

    #[test]
    fn values_are_read() {
        let (none, two, zero) =
            (annotations(&[]), annotations(&[(WARM_REPLICAS, "2")]), annotations(&[(WARM_REPLICAS, "0")]));
        assert_eq!(warm_replicas([&none]), None);
        assert_eq!(warm_replicas([&none, &two]), Some(2));
        assert_eq!(warm_replicas([&two, &none]), Some(2));
        assert_eq!(warm_replicas([&two, &zero]), Some(0));
        let paths = annotations(&[(SLEEP_PATH, "/sleep?level=1"), (WAKE_PATH, "/wake_up")]);
        let expected = SleepPaths { sleep: "/sleep?level=1".into(), wake: "/wake_up".into(), is_sleeping: None };
        assert_eq!(sleep_paths(&paths), Some(expected));
        assert_eq!(sleep_paths(&annotations(&[(SLEEP_PATH, "/sleep")])), None);
    }

    #[test]
    fn mistakes_name_field_value_and_range() {
        assert!(findings(&[(WARM_REPLICAS, "1000")]).is_empty());
        for value in ["-1", "1001", "all", ""] {
            let found = findings(&[(WARM_REPLICAS, value)]);
            assert!(found.len() == 1 && found[0].contains("0 to 1000") && found[0].contains(value), "{found:?}");
        }
        let found = findings(&[(SLEEP_PATH, "sleep"), (WAKE_PATH, "/wake")]);
        assert!(found.len() == 1 && found[0].contains("must be a path that begins with / (got sleep)"), "{found:?}");
        for (given, missing) in [(SLEEP_PATH, WAKE_PATH), (WAKE_PATH, SLEEP_PATH), (IS_SLEEPING_PATH, SLEEP_PATH)] {
            let found = findings(&[(given, "/p")]);
            assert!(found.len() == 1 && found[0].contains(&format!("[{missing}]")), "{found:?}");
        }
    }
}
