//! `pilotlight simulate eviction`: who steps down the ladder of warmth, by policy.

use std::time::Duration;

use anyhow::{anyhow, bail};
use bytesize::ByteSize;
use pilotlight_coordinator::{
    eviction::Policy,
    simulate::warmth::{self, Load, Outcome, Scenario},
};
use serde_json::json;

use crate::{
    failure::Failure,
    output::{self, Format},
    table::Table,
};

/// Seeds at most.
const SEEDS_MOST: u64 = 100;

/// What to simulate.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Models.
    #[arg(long, default_value_t = 120)]
    models: usize,
    /// The k-th model has 1/k^EXPONENT of the first one's requests.
    #[arg(long, default_value_t = 0.9, value_name = "EXPONENT")]
    zipf: f64,
    /// Requests per second, all models together.
    #[arg(long, default_value_t = 0.2, value_name = "RPS")]
    rate: f64,
    /// Part of the requests that come in bursts, 0 to 1.
    #[arg(long, default_value_t = 0.7, value_name = "PART")]
    burst_share: f64,
    /// Length of the trace.
    #[arg(long, default_value = "24h", value_parser = humantime::parse_duration, value_name = "TIME")]
    length: Duration,
    /// Identical nodes.
    #[arg(long, default_value_t = 4)]
    nodes: usize,
    /// GPUs of a node, of 80 GiB each.
    #[arg(long, default_value_t = 8)]
    gpus: u32,
    /// Main memory of a node for what sleeps or is staged.
    #[arg(long, default_value = "256GiB", value_name = "BYTES")]
    host: ByteSize,
    /// Disk of a node for images and weights.
    #[arg(long, default_value = "1TiB", value_name = "BYTES")]
    disk: ByteSize,
    /// After this time without requests a model goes to sleep.
    #[arg(long, default_value = "60s", value_parser = humantime::parse_duration, value_name = "TIME")]
    idle: Duration,
    /// How far ahead the need is looked at.
    #[arg(long, default_value = "2m", value_parser = humantime::parse_duration, value_name = "TIME")]
    horizon: Duration,
    /// The first seed; the same seed gives the same models and requests.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Seeds, each with models and requests of its own.
    #[arg(long, default_value_t = 3, value_name = "COUNT")]
    seeds: u64,
    /// Format.
    #[arg(short, long, default_value = "table")]
    output: Format,
}

/// Runs each seed with each policy, and prints what came of it.
pub fn run(args: Args) -> Result<(), Failure> {
    if !(1..=SEEDS_MOST).contains(&args.seeds) {
        return Err(anyhow!("seeds: {}: expected 1 to {SEEDS_MOST}", args.seeds).into());
    }
    let mut runs = Vec::new();
    for seed in args.seed..args.seed.saturating_add(args.seeds) {
        for (policy, outcome) in compare(&args, seed)? {
            runs.push((seed, name(policy), outcome));
        }
    }
    if args.output.is_structured() {
        let runs: Vec<_> = runs
            .iter()
            .map(|(seed, policy, outcome)| json!({"seed": seed, "policy": policy, "outcome": outcome}))
            .collect();
        return output::print_value(&json!({ "runs": runs }), &args.output);
    }
    output::print(&table(&runs))
}

fn compare(args: &Args, seed: u64) -> anyhow::Result<Vec<(Policy, Outcome)>> {
    let load = Load {
        models: args.models,
        zipf: args.zipf,
        rate: args.rate,
        burst_share: args.burst_share,
        length: args.length,
        seed,
        ..Load::default()
    };
    let scenario = Scenario {
        load,
        nodes: args.nodes,
        gpus: args.gpus,
        host: args.host.as_u64(),
        disk: args.disk.as_u64(),
        idle: args.idle,
        horizon: args.horizon,
    };
    match warmth::compare(&scenario) {
        Ok(outcomes) => Ok(outcomes),
        Err(error) => bail!("{error}"),
    }
}

fn name(policy: Policy) -> &'static str {
    match policy {
        Policy::CostAware => "cost-aware",
        Policy::Lru => "lru",
        Policy::Lfu => "lfu",
    }
}

/// Starts are told by the rung that they began from.
fn table(runs: &[(u64, &str, Outcome)]) -> String {
    let mut table = Table::new(&[
        "SEED",
        "POLICY",
        "REQUESTS",
        "WAITED",
        "ASLEEP",
        "STAGED",
        "CACHED",
        "ABSENT",
        "WAIT-TOTAL",
        "WAIT-P99",
        "GPU-MIN",
        "STEPS-DOWN",
    ]);
    for (seed, policy, outcome) in runs {
        let [absent, cached, staged, asleep] = outcome.starts.map(|starts| starts.to_string());
        table.row([
            seed.to_string(),
            (*policy).to_owned(),
            outcome.requests.to_string(),
            outcome.waited.to_string(),
            asleep,
            staged,
            cached,
            absent,
            format!("{:.0}s", outcome.wait_seconds),
            format!("{:.1}s", outcome.wait_p99),
            format!("{:.0}", outcome.gpu_minutes),
            outcome.evictions.to_string(),
        ]);
    }
    table.text()
}
