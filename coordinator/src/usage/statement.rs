//! Usage and its cost, added up by what somebody asks for.

use std::{collections::BTreeMap, str::FromStr};

use rust_decimal::Decimal;

use super::{
    period::{Clock, Period},
    prices::{Charge, Sku},
    segment::Row,
    series::{Amounts, Series},
};

/// What usage is told apart by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Dimension {
    /// Namespace.
    Namespace,
    /// InferenceService.
    Service,
    /// Revision.
    Revision,
    /// GPU class.
    Class,
    /// State of the replicas, or `requests`.
    State,
    /// A label of the service.
    Label(String),
}

impl Dimension {
    /// Its value; empty if there is none.
    pub fn value(&self, series: &Series) -> String {
        let workload = &series.workload;
        match self {
            Self::Namespace => workload.namespace.clone(),
            Self::Service => workload.service.clone(),
            Self::Revision => workload.revision.clone(),
            Self::Class => series.gpu_class.clone(),
            Self::State => series.state.to_string(),
            Self::Label(name) => workload.labels.get(name).cloned().unwrap_or_default(),
        }
    }

    /// As on the command line.
    pub fn name(&self) -> String {
        match self {
            Self::Namespace => "namespace".to_owned(),
            Self::Service => "service".to_owned(),
            Self::Revision => "revision".to_owned(),
            Self::Class => "class".to_owned(),
            Self::State => "state".to_owned(),
            Self::Label(name) => format!("label:{name}"),
        }
    }
}

impl FromStr for Dimension {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.strip_prefix("label:")) {
            ("namespace", _) => Ok(Self::Namespace),
            ("service", _) => Ok(Self::Service),
            ("revision", _) => Ok(Self::Revision),
            ("class", _) => Ok(Self::Class),
            ("state", _) => Ok(Self::State),
            (_, Some(name)) if !name.is_empty() => Ok(Self::Label(name.to_owned())),
            _ => Err("expected namespace, service, revision, class, state or label:<name>".to_owned()),
        }
    }
}

/// Usage with the same values of all dimensions in one period.
#[derive(Debug, Clone, PartialEq)]
pub struct Line {
    /// Start of the period.
    pub start: Clock,
    /// Its length.
    pub period: Period,
    /// By dimension.
    pub values: Vec<String>,
    /// How much.
    pub amounts: Amounts,
    /// What it costs.
    pub cost: Decimal,
}

/// Adds up rows, and the charges that were made of them, by period and dimensions. Sorted by start, then by values.
pub fn lines(rows: &[Row], charges: &[Charge], by: &[Dimension], period: Period) -> Vec<Line> {
    let mut lines: BTreeMap<(Clock, Period, Vec<String>), (Amounts, Decimal)> = BTreeMap::new();
    let key = |start: Clock, length: Period, series: &Series| {
        let period = period.max(length);
        (period.start(start), period, by.iter().map(|dimension| dimension.value(series)).collect())
    };
    for row in rows {
        lines.entry(key(row.start, row.period, &row.series)).or_default().0 += row.amounts;
    }
    for charge in charges {
        lines.entry(key(charge.start, charge.period, &charge.series)).or_default().1 += charge.cost;
    }
    let line = |((start, period, values), (amounts, cost))| Line { start, period, values, amounts, cost };
    lines.into_iter().map(line).collect()
}

/// Adds up charges by period, for one line of an invoice per period, series, what was used, and its price.
pub fn by_period(charges: Vec<Charge>, period: Period) -> Vec<Charge> {
    let mut sums: BTreeMap<(Clock, Period, Series, Sku, Option<Decimal>), Charge> = BTreeMap::new();
    for charge in charges {
        let period = period.max(charge.period);
        let start = period.start(charge.start);
        let key = (start, period, charge.series.clone(), charge.sku, charge.unit_price);
        let charge = Charge { start, period, ..charge };
        sums.entry(key)
            .and_modify(|sum| {
                sum.quantity += charge.quantity;
                sum.free += charge.free;
                sum.cost += charge.cost;
            })
            .or_insert(charge);
    }
    sums.into_values().collect()
}
