//! Annotations that say how replicas are placed, and who goes first.

use std::{collections::BTreeMap, fmt, ops::RangeInclusive, str::FromStr};

use super::{documents::join, report::Report};

/// An integer; an idle replica of lower priority may be evicted for one of higher.
pub const PRIORITY: &str = "pilotlight.dev/priority";
/// `binpack` or `spread`.
pub const PLACEMENT_POLICY: &str = "pilotlight.dev/placement-policy";
/// As a PriorityClass of Kubernetes may have it.
const PRIORITIES: RangeInclusive<i32> = -1_000_000_000..=1_000_000_000;

/// Which of the nodes that fit is taken.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum PlacementPolicy {
    /// The fullest, so that large requests find empty ones.
    #[default]
    BinPack,
    /// One without replicas of the same revision, and the emptiest.
    Spread,
}

impl FromStr for PlacementPolicy {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "binpack" => Ok(Self::BinPack),
            "spread" => Ok(Self::Spread),
            _ => Err("must be binpack or spread"),
        }
    }
}

impl fmt::Display for PlacementPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::BinPack => "binpack",
            Self::Spread => "spread",
        })
    }
}

/// Value of [`PRIORITY`]; 0 where there is none, or none that [`check`] would let pass.
pub fn priority(annotations: &BTreeMap<String, String>) -> i32 {
    annotations.get(PRIORITY).and_then(|given| read_priority(given)).unwrap_or(0)
}

/// Value of [`PLACEMENT_POLICY`]; `None` is the fleet's.
pub fn placement_policy(annotations: &BTreeMap<String, String>) -> Option<PlacementPolicy> {
    annotations.get(PLACEMENT_POLICY)?.parse().ok()
}

fn read_priority(text: &str) -> Option<i32> {
    text.parse().ok().filter(|priority| PRIORITIES.contains(priority))
}

/// Checks both.
pub(super) fn check(annotations: &BTreeMap<String, String>, report: &mut Report) {
    let at = |key| join("metadata.annotations", key);
    if let Some(given) = annotations.get(PRIORITY).filter(|given| read_priority(given).is_none()) {
        let message = format!("must be an integer, {} to {}", PRIORITIES.start(), PRIORITIES.end());
        report.error(at(PRIORITY), given, message);
    }
    if let Some((given, error)) =
        annotations.get(PLACEMENT_POLICY).and_then(|given| Some((given, given.parse::<PlacementPolicy>().err()?)))
    {
        report.error(at(PLACEMENT_POLICY), given, error);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn findings(key: &str, value: &str) -> Vec<String> {
        let mut report = Report::new(false);
        check(&BTreeMap::from([(key.to_owned(), value.to_owned())]), &mut report);
        report.into_findings().iter().map(ToString::to_string).collect()
    }

    #[test]
    fn values_are_read() {
        let annotations = |key: &str, value: &str| BTreeMap::from([(key.to_owned(), value.to_owned())]);
        assert_eq!(priority(&annotations(PRIORITY, "-7")), -7);
        assert_eq!(priority(&BTreeMap::new()), 0);
        assert_eq!(placement_policy(&annotations(PLACEMENT_POLICY, "spread")), Some(PlacementPolicy::Spread));
        assert_eq!(placement_policy(&BTreeMap::new()), None);
        for policy in [PlacementPolicy::BinPack, PlacementPolicy::Spread] {
            assert_eq!(policy.to_string().parse(), Ok(policy));
        }
    }

    #[test]
    fn mistakes_name_field_value_and_range() {
        assert!(findings(PRIORITY, "1000000000").is_empty() && findings(PLACEMENT_POLICY, "binpack").is_empty());
        for value in ["high", "1.5", "1000000001", "-1000000001", ""] {
            let found = findings(PRIORITY, value);
            assert!(
                found.len() == 1
                    && found[0].contains("metadata.annotations")
                    && found[0].contains("-1000000000 to 1000000000")
                    && found[0].contains(value),
                "{value}: {found:?}"
            );
        }
        let found = findings(PLACEMENT_POLICY, "Spread");
        assert!(found.len() == 1 && found[0].contains("must be binpack or spread (got Spread)"), "{found:?}");
    }
}
