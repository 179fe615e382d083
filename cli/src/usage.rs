//! `pilotlight usage`: what services used, and what it costs.

use std::{collections::BTreeMap, path::PathBuf, str::FromStr, sync::Arc};

use anyhow::{Context as _, anyhow};
use jiff::{Timestamp, civil::Date, tz::TimeZone};
use pilotlight_coordinator::usage::{
    Amounts, Clock, Gap, GapReason, Period, Row, Series, UsageState, Workload,
    focus::{self, Account},
    prices::{self, Charge, PriceFile},
    statement::{self, Dimension, Line},
};
use pilotlight_proto::control::v1::{self as control, GetVersionRequest, ListUsageRequest, UsagePeriod};
use rust_decimal::{Decimal, RoundingStrategy};
use serde_json::{Value, json};

use crate::{
    connect::{Client, ConnectionArgs},
    failure::Failure,
    output,
    table::Table,
};

/// Digits of an invoice's total after the point, as most currencies have.
const MINOR_DIGITS: u32 = 2;

/// Which usage, and how to show it.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// First moment: a month (2026-11), a day (2026-11-05), or a time (2026-11-05T12:00:00Z); all are UTC [default: the
    /// first day of this month].
    #[arg(long, value_name = "TIME")]
    from: Option<Moment>,
    /// First moment that is not included, in the same forms [default: now].
    #[arg(long, value_name = "TIME")]
    to: Option<Moment>,
    /// Only this namespace.
    #[arg(short, long, default_value = "", value_name = "NAMESPACE", hide_default_value = true)]
    namespace: String,
    /// What to tell apart: namespace, service, revision, class, state, label:NAME.
    #[arg(long, value_delimiter = ',', default_value = "namespace,service,class", value_name = "WHAT,…")]
    by: Vec<Dimension>,
    /// Length of the periods: minute, hour, day or month. The last 6 hours are kept by minute, 35 days by hour, 400 days
    /// by day.
    #[arg(long, default_value = "day", value_parser = period)]
    period: Period,
    /// table, csv (columns of FOCUS 1.0; `--by` does not change them) or json.
    #[arg(short, long, default_value = "table", value_parser = ["table", "csv", "json"])]
    output: String,
    /// YAML file with prices.
    #[arg(long, value_name = "FILE")]
    prices: Option<PathBuf>,
}

/// A moment, in milliseconds since the Unix epoch.
#[derive(Debug, Clone, Copy)]
struct Moment(Clock);

impl FromStr for Moment {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let day =
            |text: &str| text.parse::<Date>().and_then(|day| day.to_zoned(TimeZone::UTC)).map(|day| day.timestamp());
        let month = || day(&format!("{text}-01"));
        let time = text.parse::<Timestamp>().or_else(|_| day(text)).or_else(|_| month());
        time.map(|time| Self(time.as_millisecond()))
            .map_err(|_| "expected 2026-11, 2026-11-05 or 2026-11-05T12:00:00Z".to_owned())
    }
}

fn period(text: &str) -> Result<Period, String> {
    match text {
        "minute" => Ok(Period::Minute),
        "hour" => Ok(Period::Hour),
        "day" => Ok(Period::Day),
        "month" => Ok(Period::Month),
        _ => Err("expected minute, hour, day or month".to_owned()),
    }
}

/// What is printed.
struct Statement {
    account: Account,
    rows: Vec<Row>,
    charges: Vec<Charge>,
    gaps: Vec<Gap>,
    complete_until: Option<prost_types::Timestamp>,
}

/// Prints usage.
pub async fn run(connection: ConnectionArgs, args: Args) -> Result<(), Failure> {
    let file = match &args.prices {
        Some(path) => {
            let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
            Some(PriceFile::parse(&text).with_context(|| path.display().to_string())?)
        }
        None => None,
    };
    let mut client = connection.client()?;
    let statement = statement(&mut client, &args, file.as_ref()).await?;
    let is_priced = file.is_some();
    match args.output.as_str() {
        "csv" => {
            let charges = statement::by_period(statement.charges, args.period);
            output::print(&focus::csv(&statement.account, &charges, &statement.gaps).map_err(anyhow::Error::from)?)
        }
        "json" => {
            let text = serde_json::to_string_pretty(&as_json(&statement, &args)).map_err(anyhow::Error::from)?;
            output::print(&format!("{text}\n"))
        }
        _ => output::print(&as_text(&statement, &args, is_priced)),
    }
}

async fn statement(client: &mut Client, args: &Args, file: Option<&PriceFile>) -> Result<Statement, Failure> {
    let now = Timestamp::now().as_millisecond();
    let from = args.from.map_or(Period::Month.start(now), |from| from.0);
    let to = args.to.map(|to| to.0);
    if to.is_some_and(|to| to <= from) {
        return Err(
            anyhow!("--to: {}: expected a time after --from, {}", moment(to.unwrap_or(from)), moment(from)).into()
        );
    }
    // Prices change at midnight, and free allowances are used up from the first day of a month on.
    let asked = if file.is_some() { Period::Month.start(from) } else { from };
    let request = ListUsageRequest {
        from: Some(timestamp(asked)),
        to: to.map(timestamp),
        namespace: args.namespace.clone(),
        period: wire_period(if file.is_some() { args.period.min(Period::Day) } else { args.period }).into(),
    };
    let response = client.list_usage(request).await?.into_inner();
    let cell = client.get_version(GetVersionRequest {}).await?.into_inner().cell;
    let all = response.usage.into_iter().map(row).collect::<Result<Vec<_>, _>>()?;
    let gaps = response.gaps.into_iter().map(gap).collect::<Result<Vec<_>, _>>()?;
    let charges = match file {
        Some(file) => prices::priced(&all, file).map_err(anyhow::Error::from)?,
        None => prices::unpriced(&all),
    };
    let is_asked = |start: Clock, period: Period| period.end(start) > from;
    Ok(Statement {
        account: Account { cell, currency: file.map(|file| file.currency.clone()).unwrap_or_default() },
        rows: all.into_iter().filter(|row| is_asked(row.start, row.period)).collect(),
        charges: charges.into_iter().filter(|charge| is_asked(charge.start, charge.period)).collect(),
        gaps: gaps.into_iter().filter(|gap| gap.to >= from).collect(),
        complete_until: response.complete_until,
    })
}

fn timestamp(time: Clock) -> prost_types::Timestamp {
    prost_types::Timestamp { seconds: time.div_euclid(1000), nanos: (time.rem_euclid(1000) * 1_000_000) as i32 }
}

fn clock(time: Option<prost_types::Timestamp>) -> Clock {
    time.map_or(0, |time| time.seconds * 1000 + i64::from(time.nanos) / 1_000_000)
}

fn micros(time: Option<prost_types::Duration>) -> i64 {
    time.map_or(0, |time| time.seconds * 1_000_000 + i64::from(time.nanos) / 1000)
}

fn wire_period(period: Period) -> UsagePeriod {
    match period {
        Period::Minute => UsagePeriod::Minute,
        Period::Hour => UsagePeriod::Hour,
        Period::Day => UsagePeriod::Day,
        Period::Month => UsagePeriod::Month,
    }
}

fn row(usage: control::Usage) -> anyhow::Result<Row> {
    let period = match usage.period() {
        UsagePeriod::Minute => Period::Minute,
        UsagePeriod::Unspecified | UsagePeriod::Hour => Period::Hour,
        UsagePeriod::Day => Period::Day,
        UsagePeriod::Month => Period::Month,
    };
    let labels: BTreeMap<_, _> = usage.labels.into_iter().collect();
    let workload = Workload::new(&usage.namespace, &usage.service, &usage.revision, &labels);
    let state = usage.state.parse().map_err(|error: String| anyhow!("the coordinator's answer: {error}"))?;
    Ok(Row {
        period,
        start: clock(usage.hour),
        series: Arc::new(Series { workload, gpu_class: usage.gpu_class, state }),
        amounts: Amounts {
            replica_ms: micros(usage.replica_time) / 1000,
            gpu_us: micros(usage.gpu_time),
            minutes: usage.started_minutes,
            gpu_millis_minutes: usage.gpu_millis_minutes,
            cpu_millis_minutes: usage.cpu_millis_minutes,
            memory_mib_minutes: usage.memory_mib_minutes,
            requests: usage.requests,
            prompt_tokens: usage.prompt_tokens,
            generated_tokens: usage.generated_tokens,
            requests_without_usage: usage.requests_without_usage,
        },
    })
}

fn gap(gap: control::UsageGap) -> anyhow::Result<Gap> {
    let labels: BTreeMap<_, _> = gap.labels.into_iter().collect();
    Ok(Gap {
        workload: Workload::new(&gap.namespace, &gap.service, &gap.revision, &labels),
        gpu_class: gap.gpu_class,
        replica: gap.replica,
        node: gap.node,
        from: clock(gap.from),
        to: clock(gap.to),
        reason: GapReason::from_name(&gap.reason)
            .ok_or_else(|| anyhow!("the coordinator's answer: reason: {:?}: not known to this program", gap.reason))?,
        state: gap.state.parse::<UsageState>().map_err(|error| anyhow!("the coordinator's answer: {error}"))?,
        gpu_millis: gap.gpu_millis,
        open: gap.open,
    })
}

fn moment(time: Clock) -> String {
    Timestamp::from_millisecond(time).map(|time| time.to_string()).unwrap_or_default()
}

/// Thousandths as a decimal.
fn milli(value: i64) -> Decimal {
    Decimal::new(value, 3).normalize()
}

fn total(charges: &[Charge]) -> Decimal {
    let sum: Decimal = charges.iter().map(|charge| charge.cost).sum();
    sum.round_dp_with_strategy(MINOR_DIGITS, RoundingStrategy::MidpointAwayFromZero)
}

fn as_text(statement: &Statement, args: &Args, is_priced: bool) -> String {
    let by = args.by.iter().map(|dimension| dimension.name().to_uppercase());
    let mut columns: Vec<String> = std::iter::once("PERIOD".to_owned()).chain(by).collect();
    let counted = ["MINUTES", "GPU-MINUTES", "GPU-SECONDS", "REQUESTS", "PROMPT-TOKENS", "GENERATED-TOKENS"];
    columns.extend(counted.map(str::to_owned));
    if is_priced {
        columns.push(statement.account.currency.clone());
    }
    let columns: Vec<&str> = columns.iter().map(String::as_str).collect();
    let mut table = Table::new(&columns);
    for line in statement::lines(&statement.rows, &statement.charges, &args.by, args.period) {
        let Line { start, values, amounts, cost, .. } = line;
        let mut cells: Vec<String> = std::iter::once(moment(start)).chain(values).collect();
        cells.extend([
            amounts.minutes.to_string(),
            milli(amounts.gpu_millis_minutes).to_string(),
            (amounts.gpu_us / 1_000_000).to_string(),
            amounts.requests.to_string(),
            amounts.prompt_tokens.to_string(),
            amounts.generated_tokens.to_string(),
        ]);
        if is_priced {
            cells.push(focus::decimal(cost));
        }
        table.row(cells);
    }
    let mut text = table.text();
    if is_priced {
        text += &format!("\ntotal: {} {}\n", total(&statement.charges), statement.account.currency);
    }
    let without: i64 = statement.rows.iter().map(|row| row.amounts.requests_without_usage).sum();
    if without > 0 {
        text += &format!(
            "\n{without} completion requests had answers without a usage object; their tokens are not counted\n"
        );
    }
    if !statement.gaps.is_empty() {
        text += "\nnot known, and not counted:\n";
        text += &gaps_as_text(&statement.gaps);
    }
    text
}

fn gaps_as_text(gaps: &[Gap]) -> String {
    let mut table = Table::new(&["FROM", "TO", "NAMESPACE", "REPLICA", "NODE", "STATE", "REASON"]);
    for gap in gaps {
        let reason =
            if gap.open { format!("{} (may be settled)", gap.reason.name()) } else { gap.reason.name().to_owned() };
        let (replica, node) = (gap.replica.clone(), gap.node.clone());
        let namespace = gap.workload.namespace.clone();
        table.row([moment(gap.from), moment(gap.to), namespace, replica, node, gap.state.to_string(), reason]);
    }
    table.text()
}

fn as_json(statement: &Statement, args: &Args) -> Value {
    let lines = statement::lines(&statement.rows, &statement.charges, &args.by, args.period);
    let usage: Vec<_> = lines.into_iter().map(|line| line_as_json(&line, &args.by)).collect();
    let gaps: Vec<_> = statement.gaps.iter().map(gap_as_json).collect();
    let mut value = json!({ "usage": usage, "gaps": gaps, "completeUntil": moment(clock(statement.complete_until)) });
    if !statement.account.currency.is_empty() {
        value["currency"] = json!(statement.account.currency);
        value["total"] = json!(total(&statement.charges).to_string());
    }
    value
}

fn line_as_json(line: &Line, by: &[Dimension]) -> Value {
    let amounts = &line.amounts;
    let mut value = json!({
        "start": moment(line.start), "end": moment(line.period.end(line.start)),
        "startedMinutes": amounts.minutes, "gpuMinutes": milli(amounts.gpu_millis_minutes).to_string(),
        "replicaSeconds": amounts.replica_ms as f64 / 1000.0, "gpuSeconds": amounts.gpu_us as f64 / 1e6,
        "cpuCoreMinutes": milli(amounts.cpu_millis_minutes).to_string(), "memoryMibMinutes": amounts.memory_mib_minutes,
        "requests": amounts.requests, "promptTokens": amounts.prompt_tokens,
        "generatedTokens": amounts.generated_tokens, "requestsWithoutUsage": amounts.requests_without_usage,
        "cost": focus::decimal(line.cost),
    });
    for (dimension, of) in by.iter().zip(&line.values) {
        value[dimension.name()] = json!(of);
    }
    value
}

fn gap_as_json(gap: &Gap) -> Value {
    json!({
        "namespace": gap.workload.namespace, "service": gap.workload.service, "revision": gap.workload.revision,
        "replica": gap.replica, "node": gap.node, "from": moment(gap.from), "to": moment(gap.to),
        "reason": gap.reason.name(), "state": gap.state.to_string(), "gpuClass": gap.gpu_class,
        "gpus": milli(i64::from(gap.gpu_millis)).to_string(), "open": gap.open,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_months_days_and_times_of_utc() {
        let of = |text: &str| text.parse::<Moment>().map(|moment| super::moment(moment.0));
        assert_eq!(of("2026-11"), Ok("2026-11-01T00:00:00Z".to_owned()));
        assert_eq!(of("2026-11-05"), Ok("2026-11-05T00:00:00Z".to_owned()));
        assert_eq!(of("2026-11-05T12:00:00+02:00"), Ok("2026-11-05T10:00:00Z".to_owned()));
        assert!(of("yesterday").unwrap_err().contains("expected 2026-11"));
    }
}
