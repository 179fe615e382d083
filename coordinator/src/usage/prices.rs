//! From usage to money. Sums are exact decimals; only an invoice's total is rounded, by whoever prints it.

use std::{collections::BTreeMap, fmt};

use jiff::{Timestamp, civil::Date, tz::TimeZone};
use rust_decimal::Decimal;
use serde::Deserialize;

use super::{
    period::{Clock, Period},
    segment::Row,
    series::{Amounts, Series, UsageState},
};

const MIB_PER_GIB: i64 = 1024;
const MILLION: i64 = 1_000_000;

/// Why usage cannot be priced.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PriceError {
    /// The file is not one of prices.
    #[error("price file: {0}")]
    Unreadable(String),
    /// A value is out of range.
    #[error("{field}: {value:?}: {expected}")]
    Invalid {
        /// Path of the field.
        field: String,
        /// Its value.
        value: String,
        /// What is allowed.
        expected: String,
    },
    /// There was usage that the file has no price for.
    #[error("{field}: no price for {what} of {service} at {time}; {hint}")]
    Missing {
        /// Path of the field.
        field: String,
        /// What was used.
        what: String,
        /// `<namespace>/<service>`.
        service: String,
        /// When.
        time: String,
        /// What to do.
        hint: &'static str,
    },
}

/// Prices over time.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PriceFile {
    /// ISO 4217, such as `EUR`.
    pub currency: String,
    /// By `effectiveFrom`, the earliest first.
    pub prices: Vec<PriceList>,
}

/// Prices from one day on.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PriceList {
    /// First day, UTC.
    pub effective_from: Date,
    /// Of one GPU for one minute, by class: its name, a beginning of names that ends in `*`, or `*`. The longest match
    /// counts.
    #[serde(default)]
    pub gpu_minute: BTreeMap<String, Decimal>,
    /// What `gpuMinute` is multiplied by in a state. 1 by default, and 0 in `spare-held`.
    #[serde(default)]
    pub state_factors: BTreeMap<UsageState, Decimal>,
    /// Of a replica that sleeps without GPU memory, as its service asks for, for one minute.
    #[serde(default)]
    pub asleep_minute: Decimal,
    /// Of one CPU core for one minute, for replicas without GPU.
    #[serde(default)]
    pub cpu_core_minute: Decimal,
    /// Of one GiB of memory for one minute, for replicas without GPU.
    #[serde(default)]
    pub memory_gib_minute: Decimal,
    /// Of requests and tokens; the first that fits a service counts.
    #[serde(default)]
    pub requests: Vec<RequestPrice>,
    /// What each namespace has without charge in each calendar month.
    #[serde(default)]
    pub free_per_month: BTreeMap<Sku, Decimal>,
}

/// Prices of requests and tokens.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RequestPrice {
    /// `<namespace>/<service>`, `<namespace>/*`, or `*`.
    pub service: String,
    /// Of a million requests.
    #[serde(default)]
    pub per_million: Decimal,
    /// Of a million tokens of prompts.
    #[serde(default)]
    pub prompt_tokens_per_million: Decimal,
    /// Of a million generated tokens.
    #[serde(default)]
    pub generated_tokens_per_million: Decimal,
}

/// What can have a price.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Sku {
    /// One GPU for one minute.
    GpuMinutes,
    /// A replica asleep without GPU memory for one minute.
    AsleepMinutes,
    /// One CPU core for one minute.
    CpuCoreMinutes,
    /// One GiB of memory for one minute.
    MemoryGibMinutes,
    /// A request.
    Requests,
    /// A token of a prompt.
    PromptTokens,
    /// A generated token.
    GeneratedTokens,
}

impl Sku {
    /// As in FOCUS's `SkuId`, without the GPU class.
    pub fn id(self) -> &'static str {
        match self {
            Self::GpuMinutes => "gpu-minute",
            Self::AsleepMinutes => "asleep-minute",
            Self::CpuCoreMinutes => "cpu-core-minute",
            Self::MemoryGibMinutes => "memory-gib-minute",
            Self::Requests => "request",
            Self::PromptTokens => "prompt-token",
            Self::GeneratedTokens => "generated-token",
        }
    }

    /// As in FOCUS's `ConsumedUnit`.
    pub fn unit(self) -> &'static str {
        match self {
            Self::GpuMinutes => "GPU Minutes",
            Self::AsleepMinutes => "Minutes",
            Self::CpuCoreMinutes => "Core Minutes",
            Self::MemoryGibMinutes => "GiB Minutes",
            Self::Requests => "Requests",
            Self::PromptTokens | Self::GeneratedTokens => "Tokens",
        }
    }
}

impl fmt::Display for Sku {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(self.id())
    }
}

/// One line of an invoice.
#[derive(Debug, Clone, PartialEq)]
pub struct Charge {
    /// Length of the period.
    pub period: Period,
    /// Its start.
    pub start: Clock,
    /// Whose, and in which state.
    pub series: Series,
    /// What.
    pub sku: Sku,
    /// How much.
    pub quantity: Decimal,
    /// Part of it that is free.
    pub free: Decimal,
    /// Price of one; `None` without a price file.
    pub unit_price: Option<Decimal>,
    /// Price of what is not free.
    pub cost: Decimal,
}

impl Charge {
    /// Price of everything, free or not.
    pub fn list_cost(&self) -> Decimal {
        self.unit_price.map_or(Decimal::ZERO, |price| price * self.quantity)
    }
}

impl PriceFile {
    /// Reads YAML.
    ///
    /// # Errors
    /// What is wrong, and where.
    pub fn parse(text: &str) -> Result<Self, PriceError> {
        let file: Self = serde_norway::from_str(text).map_err(|error| PriceError::Unreadable(error.to_string()))?;
        file.check()?;
        Ok(file)
    }

    fn check(&self) -> Result<(), PriceError> {
        let invalid = |field: String, value: String, expected: &str| {
            Err(PriceError::Invalid { field, value, expected: expected.to_owned() })
        };
        if self.currency.len() != 3 || !self.currency.bytes().all(|byte| byte.is_ascii_uppercase()) {
            return invalid("currency".into(), self.currency.clone(), "expected three capital letters, such as EUR");
        }
        if self.prices.is_empty() {
            return invalid("prices".into(), "[]".into(), "expected at least one list of prices");
        }
        for (index, pair) in self.prices.windows(2).enumerate() {
            if pair[0].effective_from >= pair[1].effective_from {
                let field = format!("prices[{}].effectiveFrom", index + 1);
                return invalid(field, pair[1].effective_from.to_string(), "expected a later day than the one before");
            }
        }
        for (index, list) in self.prices.iter().enumerate() {
            if let Some((field, value)) = list.values().into_iter().find(|(_, value)| value.is_sign_negative()) {
                return invalid(format!("prices[{index}].{field}"), value.to_string(), "expected 0 or more");
            }
        }
        Ok(())
    }

    /// The prices of one moment.
    fn at(&self, time: Clock) -> Option<(usize, &PriceList)> {
        self.prices.iter().enumerate().rev().find(|(_, list)| midnight(list.effective_from) <= time)
    }
}

fn midnight(day: Date) -> Clock {
    day.to_zoned(TimeZone::UTC).map_or(Clock::MAX, |day| day.timestamp().as_millisecond())
}

impl PriceList {
    /// All prices, with the paths of their fields.
    fn values(&self) -> Vec<(String, Decimal)> {
        let mut values = vec![
            ("asleepMinute".to_owned(), self.asleep_minute),
            ("cpuCoreMinute".to_owned(), self.cpu_core_minute),
            ("memoryGibMinute".to_owned(), self.memory_gib_minute),
        ];
        values.extend(self.gpu_minute.iter().map(|(class, price)| (format!("gpuMinute[{class:?}]"), *price)));
        values.extend(self.state_factors.iter().map(|(state, factor)| (format!("stateFactors.{state}"), *factor)));
        values.extend(self.free_per_month.iter().map(|(sku, free)| (format!("freePerMonth.{sku}"), *free)));
        for (index, price) in self.requests.iter().enumerate() {
            values.push((format!("requests[{index}].perMillion"), price.per_million));
            values.push((format!("requests[{index}].promptTokensPerMillion"), price.prompt_tokens_per_million));
            values.push((format!("requests[{index}].generatedTokensPerMillion"), price.generated_tokens_per_million));
        }
        values
    }

    /// Price of one minute of one GPU of this class; `None` if there is none.
    fn gpu(&self, class: &str, state: UsageState) -> Option<Decimal> {
        let fits = |name: &str| name.strip_suffix('*').map_or(name == class, |start| class.starts_with(start));
        let (_, price) = self.gpu_minute.iter().filter(|(name, _)| fits(name)).max_by_key(|(name, _)| name.len())?;
        let by_default = if state == UsageState::SpareHeld { Decimal::ZERO } else { Decimal::ONE };
        Some(*price * self.state_factors.get(&state).copied().unwrap_or(by_default))
    }

    /// Prices of the requests of a service. Services without one cost nothing by the request.
    fn request(&self, series: &Series) -> Option<&RequestPrice> {
        let (namespace, service) = (&series.workload.namespace, &series.workload.service);
        self.requests.iter().find(|price| {
            price.service == "*"
                || price
                    .service
                    .split_once('/')
                    .is_some_and(|(of, name)| of == namespace && (name == "*" || name == service))
        })
    }

    /// Price of one of these; `None` if the list has none and needs one.
    fn unit(&self, sku: Sku, series: &Series) -> Option<Decimal> {
        let of_requests = |price: fn(&RequestPrice) -> Decimal| {
            Some(self.request(series).map_or(Decimal::ZERO, price) / Decimal::from(MILLION))
        };
        let is_spare = matches!(series.state, UsageState::Spare | UsageState::SpareHeld);
        match sku {
            Sku::GpuMinutes => self.gpu(&series.gpu_class, series.state),
            _ if is_spare => Some(Decimal::ZERO),
            Sku::AsleepMinutes => Some(self.asleep_minute),
            Sku::CpuCoreMinutes => Some(self.cpu_core_minute),
            Sku::MemoryGibMinutes => Some(self.memory_gib_minute),
            Sku::Requests => of_requests(|price| price.per_million),
            Sku::PromptTokens => of_requests(|price| price.prompt_tokens_per_million),
            Sku::GeneratedTokens => of_requests(|price| price.generated_tokens_per_million),
        }
    }
}

/// What of a row can have a price. A replica is charged for its GPUs, or for CPU and memory if it has none.
fn quantities(series: &Series, amounts: &Amounts) -> Vec<(Sku, Decimal)> {
    let of = |value: i64, per: i64| Decimal::from(value) / Decimal::from(per);
    let all = if series.state == UsageState::Requests {
        vec![
            (Sku::Requests, of(amounts.requests, 1)),
            (Sku::PromptTokens, of(amounts.prompt_tokens, 1)),
            (Sku::GeneratedTokens, of(amounts.generated_tokens, 1)),
        ]
    } else if series.gpu_class.is_empty() {
        vec![
            (Sku::CpuCoreMinutes, of(amounts.cpu_millis_minutes, 1000)),
            (Sku::MemoryGibMinutes, of(amounts.memory_mib_minutes, MIB_PER_GIB)),
        ]
    } else if series.state.holds_gpus() {
        vec![(Sku::GpuMinutes, of(amounts.gpu_millis_minutes, 1000))]
    } else {
        vec![(Sku::AsleepMinutes, of(amounts.minutes, 1))]
    };
    all.into_iter().filter(|(_, quantity)| !quantity.is_zero()).collect()
}

/// Lines of an invoice, without prices.
pub fn unpriced(rows: &[Row]) -> Vec<Charge> {
    let charges = rows.iter().flat_map(|row| {
        quantities(&row.series, &row.amounts).into_iter().map(|(sku, quantity)| Charge {
            period: row.period,
            start: row.start,
            series: (*row.series).clone(),
            sku,
            quantity,
            free: Decimal::ZERO,
            unit_price: None,
            cost: Decimal::ZERO,
        })
    });
    charges.collect()
}

/// Lines of an invoice. Rows must be in order of time, and begin with the month in which the first charge is of interest:
/// free allowances are used up in order of time.
///
/// # Errors
/// The file has no price for something.
pub fn priced(rows: &[Row], file: &PriceFile) -> Result<Vec<Charge>, PriceError> {
    let mut used: BTreeMap<(Clock, String, Sku), Decimal> = BTreeMap::new();
    let mut charges = unpriced(rows);
    for charge in &mut charges {
        let missing = |field: String, what: &str, hint| {
            let workload = &charge.series.workload;
            Err(PriceError::Missing {
                field,
                what: what.to_owned(),
                service: format!("{}/{}", workload.namespace, workload.service),
                time: Timestamp::from_millisecond(charge.start).map(|time| time.to_string()).unwrap_or_default(),
                hint,
            })
        };
        let Some((index, list)) = file.at(charge.start) else {
            return missing("prices[0].effectiveFrom".into(), "usage", "add prices that hold from then on");
        };
        let Some(price) = list.unit(charge.sku, &charge.series) else {
            let (field, class) = (format!("prices[{index}].gpuMinute"), format!("GPU {:?}", charge.series.gpu_class));
            return missing(field, &class, "add the class, or \"*\" for all others");
        };
        if !price.is_zero()
            && let Some(allowance) = list.free_per_month.get(&charge.sku)
        {
            let month = Period::Month.start(charge.start);
            let used = used.entry((month, charge.series.workload.namespace.clone(), charge.sku)).or_default();
            // A row that corrects another one gives back what that one used.
            charge.free = charge.quantity.min((*allowance - *used).max(Decimal::ZERO)).max(-*used);
            *used += charge.free;
        }
        charge.unit_price = Some(price);
        charge.cost = price * (charge.quantity - charge.free);
    }
    Ok(charges)
}
