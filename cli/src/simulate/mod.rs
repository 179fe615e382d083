//! `pilotlight simulate`: what the autoscaler would do, or did.

mod chart;
mod eviction;
mod print;

use std::{
    fs::File,
    io::{BufReader, Write as _, stderr},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, anyhow, bail};
use pilotlight_coordinator::{
    autoscaler::Defaults,
    manifest::{self, Reading},
    simulate::{
        self, ModelProfile, Outcome, Scenario, Trace, VirtualNode,
        pattern::{Pattern, Shape},
        replay, trace,
    },
    spec::{InferenceService, Resource, Runtimes},
};

use crate::{failure::Failure, manifests::Files, output::Format, scaling::ScalingArgs};

/// What to simulate.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Args {
    #[command(subcommand)]
    mode: Option<Mode>,
    #[command(flatten)]
    input: Input,
    /// Manifest of the services; `-` is standard input.
    #[arg(long, value_name = "FILE", required_unless_present = "replay")]
    service: Option<PathBuf>,
    /// Machines: a YAML list of {name, count, gpus, product, gpuMemory, labels} [default: 16 with 8 GPUs each].
    #[arg(long, value_name = "FILE")]
    nodes: Option<PathBuf>,
    /// Run again with this annotation on every service and compare; may be given more than once.
    #[arg(long, value_name = "KEY=VALUE")]
    vary: Vec<String>,
    /// Write a chart of replicas and requests over time.
    #[arg(long, value_name = "FILE.svg")]
    chart: Option<PathBuf>,
    /// Format.
    #[arg(short, long, default_value = "table")]
    output: Format,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    pattern: PatternArgs,
    /// Time between decisions.
    #[arg(long, default_value = "2s", value_parser = humantime::parse_duration, value_name = "TIME")]
    tick: Duration,
    /// Time between reports of load.
    #[arg(long, default_value = "1s", value_parser = humantime::parse_duration, value_name = "TIME")]
    report_interval: Duration,
    /// Requests that may wait for one service; further ones are shed.
    #[arg(long, default_value_t = 1000, value_name = "REQUESTS")]
    queue_limit: usize,
    /// Time to go on after the last request.
    #[arg(long, default_value = "10m", value_parser = humantime::parse_duration, value_name = "TIME")]
    tail: Duration,
    #[command(flatten)]
    scaling: ScalingArgs,
}

/// Other things to simulate.
#[derive(Debug, clap::Subcommand)]
enum Mode {
    /// Compare policies of who leaves GPU, memory and disk: many made-up models that share few GPUs.
    Eviction(eviction::Args),
}

#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
struct Input {
    /// Requests as CSV: arrival, service, and duration or prompt and generated tokens; columns by name.
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Made-up requests of this shape instead.
    #[arg(long, value_name = "SHAPE")]
    pattern: Option<PatternShape>,
    /// Make every decision of a recording (`--record` of coordinator and dev) again and compare.
    #[arg(long, value_name = "FILE")]
    replay: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum PatternShape {
    Step,
    Spike,
    Sine,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Made-up requests")]
struct PatternArgs {
    /// Requests per second at the peak, above 0.
    #[arg(long, default_value_t = 30.0, value_name = "RPS")]
    peak: f64,
    /// Length of the pattern.
    #[arg(long, default_value = "30m", value_parser = humantime::parse_duration, value_name = "TIME")]
    length: Duration,
    /// Chooses the arrivals; the same seed gives the same ones.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Model servers")]
struct ModelArgs {
    /// From being placed to being ready.
    #[arg(long, default_value = "30s", value_parser = humantime::parse_duration, value_name = "TIME")]
    load_time: Duration,
    /// How long a request runs where the trace says nothing of it.
    #[arg(long, default_value = "1s", value_parser = humantime::parse_duration, value_name = "TIME")]
    request_time: Duration,
    /// Prompt tokens read per second and request.
    #[arg(long, default_value_t = 8000.0, value_name = "TOKENS")]
    prefill_tokens_per_second: f64,
    /// Tokens generated per second and request.
    #[arg(long, default_value_t = 50.0, value_name = "TOKENS")]
    decode_tokens_per_second: f64,
}

/// Simulates or replays, and prints what came of it.
pub fn run(args: Args) -> Result<(), Failure> {
    if let Some(Mode::Eviction(args)) = args.mode {
        return eviction::run(args);
    }
    if let Some(recording) = &args.input.replay {
        return replayed(recording, &args.output);
    }
    let scaling = args.scaling.clone().defaults();
    let manifest = args.service.as_deref().unwrap_or(Path::new("-"));
    let services = services(manifest, &scaling)?;
    let nodes = match &args.nodes {
        Some(path) => simulate::nodes(&text(path)?).with_context(|| path.display().to_string())?,
        None => vec![VirtualNode::default()],
    };
    let scenario = Scenario {
        services,
        scaling,
        nodes,
        trace: requests(&args)?,
        model: profile(&args.model)?,
        tick: args.tick,
        report_interval: args.report_interval,
        queue_limit: args.queue_limit,
        tail: args.tail,
    };
    let began = Instant::now();
    let mut outcomes = vec![("as given".to_owned(), outcome(&scenario)?)];
    for variation in &args.vary {
        outcomes.push((variation.clone(), outcome(&varied(&scenario, variation)?)?));
    }
    let took = began.elapsed();
    if let Some(path) = &args.chart {
        let svg = chart::svg(&outcomes).map_err(|error| anyhow!("chart: {error}"))?;
        std::fs::write(path, svg).with_context(|| path.display().to_string())?;
    }
    print::outcomes(&outcomes, &args.output)?;
    if !args.output.is_structured() {
        let simulated: f64 = outcomes.iter().map(|(_, outcome)| outcome.seconds).sum();
        writeln!(stderr(), "{:.1} h simulated in {:.2} s", simulated / 3600.0, took.as_secs_f64())?;
    }
    Ok(())
}

fn outcome(scenario: &Scenario) -> anyhow::Result<Outcome> {
    Ok(simulate::run(scenario)?)
}

fn text(path: &Path) -> anyhow::Result<String> {
    let manifests = Files { paths: vec![path.to_owned()], recursive: false }.read()?;
    Ok(manifests.into_iter().map(|manifest| manifest.text).collect::<Vec<_>>().join("\n---\n"))
}

fn requests(args: &Args) -> anyhow::Result<Trace> {
    if let Some(path) = &args.input.trace {
        let file = File::open(path).with_context(|| path.display().to_string())?;
        return trace::read(BufReader::new(file)).with_context(|| path.display().to_string());
    }
    let shape = match args.input.pattern {
        Some(PatternShape::Spike) => Shape::Spike,
        Some(PatternShape::Sine) => Shape::Sine,
        Some(PatternShape::Step) | None => Shape::Step,
    };
    let PatternArgs { peak, length, seed } = args.pattern;
    if !(peak > 0.0 && peak <= 100_000.0) {
        bail!("peak: {peak}: expected more than 0, at most 100000");
    }
    Ok(Pattern { shape, peak, length, seed }.trace())
}

fn profile(args: &ModelArgs) -> anyhow::Result<ModelProfile> {
    let rates = [
        ("prefill-tokens-per-second", args.prefill_tokens_per_second),
        ("decode-tokens-per-second", args.decode_tokens_per_second),
    ];
    for (name, rate) in rates {
        if !(rate > 0.0 && rate.is_finite()) {
            bail!("{name}: {rate}: expected more than 0");
        }
    }
    Ok(ModelProfile {
        load_time: args.load_time,
        request_time: args.request_time,
        prefill_tokens_per_second: args.prefill_tokens_per_second,
        decode_tokens_per_second: args.decode_tokens_per_second,
    })
}

/// The manifest's services; what is wrong with it is said by field.
fn services(path: &Path, scaling: &Defaults) -> Result<Vec<InferenceService>, Failure> {
    let text = text(path)?;
    let mut runtimes = Runtimes::built_in();
    let known = runtimes.clone();
    let reading = Reading { namespace: "", strict: false, scaling, runtimes: &known };
    manifest::add_runtimes(&text, reading, &mut runtimes);
    let (mut services, mut refused) = (Vec::new(), false);
    for document in manifest::read(&text, Reading { runtimes: &runtimes, ..reading }) {
        for finding in &document.findings {
            let level = if finding.is_error() { "error" } else { "warning" };
            writeln!(stderr(), "{}: {level}: {finding}", path.display())?;
        }
        match document.object {
            Some(Resource::InferenceService(service)) => services.push(*service),
            // What a service refers to is no load.
            Some(_) => {}
            None => refused = true,
        }
    }
    if refused { Err(Failure::Refused) } else { Ok(services) }
}

/// The scenario with one more annotation on each service.
fn varied(scenario: &Scenario, variation: &str) -> anyhow::Result<Scenario> {
    let (key, value) = variation.split_once('=').ok_or_else(|| anyhow!("vary: {variation:?}: expected KEY=VALUE"))?;
    let mut varied = scenario.clone();
    for service in &mut varied.services {
        service.predictor.template.annotations.insert(key.to_owned(), value.to_owned());
    }
    Ok(varied)
}

fn replayed(recording: &Path, format: &Format) -> Result<(), Failure> {
    let name = recording.display().to_string();
    let file = File::open(recording).with_context(|| name.clone())?;
    let replay = replay::replay(BufReader::new(file)).with_context(|| name)?;
    print::replay(&replay, format)?;
    if replay.differences.is_empty() { Ok(()) } else { Err(Failure::Refused) }
}
