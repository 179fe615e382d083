//! Requests and tokens: absolute counters of agent processes, counted once.

use serde::{Deserialize, Serialize};

use super::series::{Amounts, Workload};

/// More than any agent counts between two reports; sums stay far from overflow.
const MAX_AT_ONCE: u64 = 1 << 40;

/// Counters of one revision on one node since the agent's process started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Requests answered.
    pub requests: u64,
    /// Tokens of prompts.
    pub prompt_tokens: u64,
    /// Tokens generated.
    pub generated_tokens: u64,
    /// Completion requests whose tokens are not known.
    pub requests_without_usage: u64,
}

/// What was last counted of one revision on one node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Counter {
    /// Whose.
    #[serde(flatten)]
    pub(super) workload: Workload,
    pub(super) node: String,
    /// The agent process.
    pub(super) process: String,
    counts: Counts,
}

impl Counter {
    pub(super) fn new(workload: Workload, node: &str, process: &str) -> Self {
        Self { workload, node: node.to_owned(), process: process.to_owned(), counts: Counts::default() }
    }

    /// What has come since the last call. Counters of another process begin at zero; a counter that is lower than before
    /// was sent earlier, and adds nothing.
    pub(super) fn add(&mut self, process: &str, counts: Counts) -> Amounts {
        if self.process != process {
            process.clone_into(&mut self.process);
            self.counts = Counts::default();
        }
        let since = |new: u64, last: &mut u64| {
            let more = new.saturating_sub(*last);
            *last = new.max(*last);
            more.min(MAX_AT_ONCE) as i64
        };
        let last = &mut self.counts;
        Amounts {
            requests: since(counts.requests, &mut last.requests),
            prompt_tokens: since(counts.prompt_tokens, &mut last.prompt_tokens),
            generated_tokens: since(counts.generated_tokens, &mut last.generated_tokens),
            requests_without_usage: since(counts.requests_without_usage, &mut last.requests_without_usage),
            ..Amounts::default()
        }
    }
}
