//! Prices, and a month's invoice from CSV.

use std::{collections::BTreeMap, sync::Arc};

use jiff::Timestamp;
use rust_decimal::{Decimal, dec};

use super::{
    Amounts, Clock, Gap, GapReason, Period, Row, Series, UsageState, Workload,
    focus::{self, Account},
    prices::{PriceFile, Sku, priced, unpriced},
    statement::{self, Dimension},
};

const PRICES: &str = "
currency: EUR
prices:
  - effectiveFrom: 2026-01-01
    gpuMinute: {'NVIDIA H100*': 0.0525, 'NVIDIA H100 80GB HBM3 MIG 1g.10gb': 0.01}
    asleepMinute: 0.001
    cpuCoreMinute: 0.0007
    memoryGibMinute: 0.0001
    requests:
      - {service: free/*, perMillion: 0}
      - {service: '*', perMillion: 2, promptTokensPerMillion: 0.15, generatedTokensPerMillion: 0.6}
    freePerMonth: {gpuMinutes: 100, requests: 1000}
  - effectiveFrom: 2026-02-15
    gpuMinute: {'*': 0.05}
    stateFactors: {loading: 0.5}
    freePerMonth: {gpuMinutes: 100}
";

fn at(text: &str) -> Clock {
    text.parse::<Timestamp>().unwrap().as_millisecond()
}

fn row(time: &str, namespace: &str, class: &str, state: UsageState, amounts: Amounts) -> Row {
    let labels = BTreeMap::from([("team".to_owned(), format!("{namespace}-team"))]);
    let workload = Workload::new(namespace, "llm", "llm-predictor-00001", &labels);
    let series = Arc::new(Series { workload, gpu_class: class.into(), state });
    Row { period: Period::Day, start: at(time), series, amounts }
}

fn minutes(minutes: i64, gpus: i64) -> Amounts {
    Amounts {
        minutes,
        gpu_millis_minutes: minutes * gpus * 1000,
        cpu_millis_minutes: minutes * 2500,
        memory_mib_minutes: minutes * 512,
        ..Amounts::default()
    }
}

const H100: &str = "NVIDIA H100 80GB HBM3";

fn costs(rows: &[Row]) -> Vec<(Sku, Decimal, Decimal)> {
    let charges = priced(rows, &PriceFile::parse(PRICES).unwrap()).unwrap();
    charges.into_iter().map(|charge| (charge.sku, charge.free, charge.cost.normalize())).collect()
}

#[test]
fn each_kind_of_use_has_its_price() {
    let day = "2026-01-05T00:00:00Z";
    let rows = [
        row(day, "a", H100, UsageState::Serving, minutes(150, 2)),
        row(day, "a", &format!("{H100} MIG 1g.10gb"), UsageState::Loading, minutes(100, 1)),
        row(day, "a", H100, UsageState::Asleep, minutes(60, 0)),
        row(day, "a", H100, UsageState::Spare, minutes(60, 0)),
        row(day, "a", H100, UsageState::SpareHeld, minutes(60, 2)),
        row(day, "a", "", UsageState::Serving, minutes(100, 0)),
        row(
            day,
            "a",
            "",
            UsageState::Requests,
            Amounts { requests: 3000, prompt_tokens: 4_000_000, ..Amounts::default() },
        ),
        row(day, "free", "", UsageState::Requests, Amounts { requests: 5000, ..Amounts::default() }),
    ];
    assert_eq!(
        costs(&rows),
        [
            (Sku::GpuMinutes, dec!(100), dec!(10.5)),
            (Sku::GpuMinutes, dec!(0), dec!(1)),
            (Sku::AsleepMinutes, dec!(0), dec!(0.06)),
            (Sku::AsleepMinutes, dec!(0), dec!(0)),
            (Sku::GpuMinutes, dec!(0), dec!(0)),
            (Sku::CpuCoreMinutes, dec!(0), dec!(0.175)),
            (Sku::MemoryGibMinutes, dec!(0), dec!(0.005)),
            (Sku::Requests, dec!(1000), dec!(0.004)),
            (Sku::PromptTokens, dec!(0), dec!(0.6)),
            (Sku::Requests, dec!(0), dec!(0)),
        ]
    );
}

#[test]
fn prices_change_over_time_and_allowances_begin_again_with_each_month_and_namespace() {
    let serving = |time, namespace| row(time, namespace, H100, UsageState::Serving, minutes(80, 1));
    let rows = [
        serving("2026-01-30T00:00:00Z", "a"),
        serving("2026-01-31T00:00:00Z", "a"),
        serving("2026-01-31T00:00:00Z", "b"),
        serving("2026-02-14T00:00:00Z", "a"),
        serving("2026-02-15T00:00:00Z", "a"),
        row("2026-02-15T00:00:00Z", "a", "NVIDIA A40", UsageState::Loading, minutes(10, 1)),
    ];
    let cost: Vec<_> = costs(&rows).into_iter().map(|(_, free, cost)| (free, cost)).collect();
    let expected = [
        (dec!(80), dec!(0)),
        (dec!(20), dec!(3.15)),
        (dec!(80), dec!(0)),
        (dec!(80), dec!(0)),
        (dec!(20), dec!(3)),
        (dec!(0), dec!(0.25)),
    ];
    assert_eq!(cost, expected);
}

#[test]
fn what_has_no_price_is_an_error_and_mistakes_name_their_field() {
    let file = PriceFile::parse(PRICES).unwrap();
    let error = |time, class| {
        priced(&[row(time, "a", class, UsageState::Serving, minutes(1, 1))], &file).unwrap_err().to_string()
    };
    let unknown = error("2026-01-05T00:00:00Z", "NVIDIA A40");
    assert!(unknown.contains("prices[0].gpuMinute") && unknown.contains("NVIDIA A40"), "{unknown}");
    assert!(error("2025-12-31T00:00:00Z", H100).contains("effectiveFrom"));
    let wrong = |from: &str, to: &str| PriceFile::parse(&PRICES.replace(from, to)).unwrap_err().to_string();
    assert!(wrong("EUR", "euro").contains("currency: \"euro\""));
    assert!(wrong("2026-02-15", "2026-01-01").contains("prices[1].effectiveFrom"));
    assert!(wrong("0.0525", "-1").contains("prices[0].gpuMinute[\"NVIDIA H100*\"]: \"-1\": expected 0 or more"));
    assert!(wrong("asleepMinute", "sleepMinute").contains("sleepMinute"));
    assert!(wrong("loading: 0.5", "dozing: 0.5").contains("dozing"));
}

/// Sum of a column of CSV, by a small reader of its own.
fn sum(csv: &str, column: &str, keep: impl Fn(&BTreeMap<String, String>) -> bool) -> Decimal {
    let mut reader = csv::Reader::from_reader(csv.as_bytes());
    let rows = reader.deserialize::<BTreeMap<String, String>>().map(Result::unwrap);
    rows.filter(keep).map(|row| row[column].parse::<Decimal>().unwrap_or_default()).sum()
}

#[test]
fn a_months_invoice_from_csv_adds_up() {
    // 31 days of two namespaces with two classes, one of them by the CPU.
    let days = (1..=31).map(|day| format!("2026-01-{day:02}T00:00:00Z"));
    let rows: Vec<_> = days
        .flat_map(|day| {
            let requests =
                Amounts { requests: 123_457, prompt_tokens: 1_234_567, generated_tokens: 7, ..Amounts::default() };
            [
                row(&day, "a", H100, UsageState::Serving, minutes(1000, 2)),
                row(&day, "a", H100, UsageState::Loading, minutes(17, 2)),
                row(&day, "a", "", UsageState::Requests, requests),
                row(&day, "b, the \"other\"", "", UsageState::Serving, minutes(333, 0)),
            ]
        })
        .collect();
    let charges = priced(&rows, &PriceFile::parse(PRICES).unwrap()).unwrap();
    let total: Decimal = charges.iter().map(|charge| charge.cost).sum();
    // By hand: GPU-minutes less 100, requests less 1000, prompt and generated tokens, cores, GiB.
    let expected = dec!(0.0525) * (dec!(31) * dec!(2034) - dec!(100))
        + dec!(0.000002) * (dec!(31) * dec!(123457) - dec!(1000))
        + dec!(0.00000015) * dec!(31) * dec!(1234567)
        + dec!(0.0000006) * dec!(31) * dec!(7)
        + dec!(0.0007) * dec!(31) * dec!(333) * dec!(2.5)
        + dec!(0.0001) * dec!(31) * dec!(333) * dec!(0.5);
    assert_eq!(total, expected);
    let account = Account { cell: "main".into(), currency: "EUR".into() };
    let gap = Gap {
        workload: Workload::new("a", "llm", "llm-predictor-00001", &BTreeMap::new()),
        gpu_class: H100.into(),
        replica: "llm-predictor-00001-1".into(),
        node: "n".into(),
        from: at("2026-01-05T10:00:00Z"),
        to: at("2026-01-05T10:05:00Z"),
        reason: GapReason::NodeLost,
        state: UsageState::Serving,
        gpu_millis: 2000,
        open: false,
    };
    for period in [Period::Day, Period::Month] {
        let charges = statement::by_period(charges.clone(), period);
        let csv = focus::csv(&account, &charges, std::slice::from_ref(&gap)).unwrap();
        assert_eq!(sum(&csv, "BilledCost", |_| true), total, "{period:?}");
        assert_eq!(sum(&csv, "ConsumedQuantity", |row| row["ConsumedUnit"] == "GPU Minutes"), dec!(63054));
        let listed = sum(&csv, "ListCost", |_| true);
        assert_eq!(listed - total, dec!(0.0525) * dec!(100) + dec!(0.000002) * dec!(1000), "what was free");
        assert_eq!(sum(&csv, "BilledCost", |row| row["SubAccountId"] == "b, the \"other\""), dec!(18.5814));
        let january = |row: &BTreeMap<String, String>| {
            row["BillingPeriodStart"] == "2026-01-01T00:00:00Z" && row["BillingPeriodEnd"] == "2026-02-01T00:00:00Z"
        };
        assert_eq!(sum(&csv, "BilledCost", january), total);
        let gaps: Vec<_> = csv.lines().filter(|line| line.contains("NodeLost")).collect();
        assert!(gaps.len() == 1 && gaps[0].contains("2026-01-05T10:05:00Z"), "{gaps:?}");
    }
    let lines =
        statement::lines(&rows, &charges, &[Dimension::Namespace, Dimension::Label("team".into())], Period::Month);
    let by_namespace: Vec<_> =
        lines.iter().map(|line| (line.values.clone(), line.amounts.minutes, line.cost)).collect();
    assert_eq!(by_namespace.len(), 2);
    assert_eq!(by_namespace[0].0, ["a", "a-team"]);
    assert_eq!((by_namespace[0].1, by_namespace[1].1), (31 * 1017, 31 * 333));
    assert_eq!(by_namespace[0].2 + by_namespace[1].2, total);
}

#[test]
fn without_prices_quantities_are_the_same_and_nothing_costs_anything() {
    let rows = [row("2026-01-05T00:00:00Z", "a", H100, UsageState::Serving, minutes(150, 2))];
    let charges = unpriced(&rows);
    let csv = focus::csv(&Account { cell: "main".into(), currency: String::new() }, &charges, &[]).unwrap();
    assert_eq!((sum(&csv, "ConsumedQuantity", |_| true), sum(&csv, "BilledCost", |_| true)), (dec!(300), dec!(0)));
}
