//! What usage is told apart by, and what is counted.

use std::{collections::BTreeMap, fmt, ops::AddAssign, str::FromStr};

use serde::{Deserialize, Serialize};

/// Labels of a service that usage is told apart by; those that are last in the alphabet are left out.
pub(super) const MAX_LABELS: usize = 16;

/// What a replica does, the cheapest state first. A minute in which a replica is in several states counts for the last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum UsageState {
    /// No replica: requests and tokens.
    Requests,
    /// Sleeps without GPU memory, and only until another service needs its main memory.
    Spare,
    /// Sleeps with GPU memory, and only until another service needs it.
    SpareHeld,
    /// Sleeps without GPU memory, as the service asks for.
    Asleep,
    /// Sleeps with GPU memory, as the service asks for.
    AsleepHeld,
    /// Has its GPUs, and does not take requests yet: its image or model is fetched, or it starts or wakes.
    Loading,
    /// Takes requests, or finishes those it has.
    Serving,
}

impl UsageState {
    /// All, in order.
    pub const ALL: [Self; 7] =
        [Self::Requests, Self::Spare, Self::SpareHeld, Self::Asleep, Self::AsleepHeld, Self::Loading, Self::Serving];

    /// Returns `true` if a replica in this state has its GPUs.
    pub fn holds_gpus(self) -> bool {
        matches!(self, Self::SpareHeld | Self::AsleepHeld | Self::Loading | Self::Serving)
    }

    /// As in files and on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::Requests => "requests",
            Self::Spare => "spare",
            Self::SpareHeld => "spare-held",
            Self::Asleep => "asleep",
            Self::AsleepHeld => "asleep-held",
            Self::Loading => "loading",
            Self::Serving => "serving",
        }
    }
}

impl fmt::Display for UsageState {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(self.name())
    }
}

impl FromStr for UsageState {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let all = Self::ALL.map(Self::name).join(", ");
        Self::ALL
            .into_iter()
            .find(|state| state.name() == text)
            .ok_or_else(|| format!("state: {text:?}: expected one of {all}"))
    }
}

/// Whose usage it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Workload {
    /// Namespace.
    pub namespace: String,
    /// InferenceService.
    pub service: String,
    /// Name of the revision.
    pub revision: String,
    /// `metadata.labels` of the service, for cost centres.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
}

impl Workload {
    /// With the first 16 labels in alphabetical order.
    pub fn new(namespace: &str, service: &str, revision: &str, labels: &BTreeMap<String, String>) -> Self {
        let labels = labels.iter().take(MAX_LABELS).map(|(name, value)| (name.clone(), value.clone()));
        Self {
            namespace: namespace.to_owned(),
            service: service.to_owned(),
            revision: revision.to_owned(),
            labels: labels.collect(),
        }
    }
}

/// What usage is told apart by, time aside.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Series {
    /// Whose.
    #[serde(flatten)]
    pub workload: Workload,
    /// GPU product, with the profile of a MIG device; empty for replicas without GPU.
    #[serde(default, rename = "class", skip_serializing_if = "String::is_empty")]
    pub gpu_class: String,
    /// What the replicas did.
    pub state: UsageState,
}

/// What is counted. Sums of many are exact. Rows that correct others may hold negative values.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Amounts {
    /// Time that replicas existed, milliseconds.
    #[serde(default, rename = "rm", skip_serializing_if = "is_zero")]
    pub replica_ms: i64,
    /// The same times the thousandths of a GPU that each held: microseconds of one GPU.
    #[serde(default, rename = "gu", skip_serializing_if = "is_zero")]
    pub gpu_us: i64,
    /// Minutes of UTC in which containers ran, each once per replica.
    #[serde(default, rename = "m", skip_serializing_if = "is_zero")]
    pub minutes: i64,
    /// The same times thousandths of a GPU.
    #[serde(default, rename = "gm", skip_serializing_if = "is_zero")]
    pub gpu_millis_minutes: i64,
    /// The same times thousandths of a CPU core requested.
    #[serde(default, rename = "cm", skip_serializing_if = "is_zero")]
    pub cpu_millis_minutes: i64,
    /// The same times MiB of memory requested.
    #[serde(default, rename = "mm", skip_serializing_if = "is_zero")]
    pub memory_mib_minutes: i64,
    /// Requests answered.
    #[serde(default, rename = "r", skip_serializing_if = "is_zero")]
    pub requests: i64,
    /// Tokens of prompts.
    #[serde(default, rename = "pt", skip_serializing_if = "is_zero")]
    pub prompt_tokens: i64,
    /// Tokens generated.
    #[serde(default, rename = "gt", skip_serializing_if = "is_zero")]
    pub generated_tokens: i64,
    /// Completion requests whose tokens are not known.
    #[serde(default, rename = "rw", skip_serializing_if = "is_zero")]
    pub requests_without_usage: i64,
}

fn is_zero(value: &i64) -> bool {
    *value == 0
}

impl AddAssign for Amounts {
    fn add_assign(&mut self, other: Self) {
        self.replica_ms += other.replica_ms;
        self.gpu_us += other.gpu_us;
        self.minutes += other.minutes;
        self.gpu_millis_minutes += other.gpu_millis_minutes;
        self.cpu_millis_minutes += other.cpu_millis_minutes;
        self.memory_mib_minutes += other.memory_mib_minutes;
        self.requests += other.requests;
        self.prompt_tokens += other.prompt_tokens;
        self.generated_tokens += other.generated_tokens;
        self.requests_without_usage += other.requests_without_usage;
    }
}

impl Amounts {
    /// Returns `true` if nothing is counted.
    pub fn is_zero(&self) -> bool {
        *self == Self::default()
    }
}
