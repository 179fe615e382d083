//! CSV with the columns of FOCUS 1.0, the FinOps Open Cost and Usage Specification (<https://focus.finops.org>).
//! Columns of our own begin with `x_`, as FOCUS asks for.

use std::collections::BTreeMap;

use jiff::Timestamp;
use rust_decimal::Decimal;

use super::{
    period::{Clock, Period},
    prices::{Charge, Sku},
    segment::Gap,
};

/// Columns, in order.
pub const COLUMNS: [&str; 38] = [
    "BilledCost",
    "BillingAccountId",
    "BillingAccountName",
    "BillingCurrency",
    "BillingPeriodStart",
    "BillingPeriodEnd",
    "ChargeCategory",
    "ChargeClass",
    "ChargeDescription",
    "ChargeFrequency",
    "ChargePeriodStart",
    "ChargePeriodEnd",
    "ConsumedQuantity",
    "ConsumedUnit",
    "ContractedCost",
    "ContractedUnitPrice",
    "EffectiveCost",
    "InvoiceIssuerName",
    "ListCost",
    "ListUnitPrice",
    "PricingCategory",
    "PricingQuantity",
    "PricingUnit",
    "ProviderName",
    "PublisherName",
    "ResourceId",
    "ResourceName",
    "ResourceType",
    "ServiceCategory",
    "ServiceName",
    "SkuId",
    "SkuPriceId",
    "SubAccountId",
    "SubAccountName",
    "Tags",
    "x_Revision",
    "x_State",
    "x_GapReason",
];

/// Who bills whom.
#[derive(Debug, Clone)]
pub struct Account {
    /// Name of the cell.
    pub cell: String,
    /// ISO 4217; empty without prices.
    pub currency: String,
}

/// One row, by column. Columns that are not there are empty.
type Fields = BTreeMap<&'static str, String>;

/// Writes charges and gaps. A gap has no quantity and costs nothing; `x_GapReason` tells it from other rows.
///
/// # Errors
/// The CSV cannot be written, which does not happen in memory.
pub fn csv(account: &Account, charges: &[Charge], gaps: &[Gap]) -> Result<String, csv::Error> {
    let mut writer = csv::Writer::from_writer(Vec::new());
    writer.write_record(COLUMNS)?;
    let rows = charges.iter().map(|charge| of_charge(account, charge));
    for fields in rows.chain(gaps.iter().map(|gap| of_gap(account, gap))) {
        writer.write_record(COLUMNS.map(|column| fields.get(column).map_or("", String::as_str)))?;
    }
    let bytes = writer.into_inner().map_err(|error| csv::Error::from(error.into_error()))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn common(account: &Account, start: Clock, end: Clock, labels: &BTreeMap<String, String>) -> Fields {
    let tags = serde_json::to_string(labels).unwrap_or_default();
    Fields::from([
        ("BillingAccountId", account.cell.clone()),
        ("BillingAccountName", account.cell.clone()),
        ("BillingCurrency", account.currency.clone()),
        ("BillingPeriodStart", moment(Period::Month.start(start))),
        ("BillingPeriodEnd", moment(Period::Month.end(start))),
        ("ChargeCategory", "Usage".to_owned()),
        ("ChargeFrequency", "Usage-Based".to_owned()),
        ("ChargePeriodStart", moment(start)),
        ("ChargePeriodEnd", moment(end)),
        ("InvoiceIssuerName", "Pilotlight".to_owned()),
        ("ProviderName", "Pilotlight".to_owned()),
        ("PublisherName", "Pilotlight".to_owned()),
        ("ResourceType", "InferenceService".to_owned()),
        ("ServiceCategory", "AI and Machine Learning".to_owned()),
        ("ServiceName", "Pilotlight Inference".to_owned()),
        ("Tags", tags),
    ])
}

fn of_charge(account: &Account, charge: &Charge) -> Fields {
    let (workload, state) = (&charge.series.workload, charge.series.state);
    let mut fields = common(account, charge.start, charge.period.end(charge.start), &workload.labels);
    let sku = sku_id(charge.sku, &charge.series.gpu_class);
    let unit = charge.sku.unit().to_owned();
    let price = charge.unit_price.map(decimal).unwrap_or_default();
    let cost = decimal(charge.cost);
    fields.extend([
        ("BilledCost", cost.clone()),
        ("EffectiveCost", cost.clone()),
        ("ContractedCost", cost),
        ("ContractedUnitPrice", price.clone()),
        ("ListCost", decimal(charge.list_cost())),
        ("ListUnitPrice", price),
        ("ConsumedQuantity", decimal(charge.quantity)),
        ("ConsumedUnit", unit.clone()),
        ("PricingCategory", "Standard".to_owned()),
        ("PricingQuantity", decimal(charge.quantity - charge.free)),
        ("PricingUnit", unit),
        ("ChargeDescription", description(charge)),
        ("SkuPriceId", format!("{sku}/{state}")),
        ("SkuId", sku),
        ("x_State", state.to_string()),
    ]);
    fields.extend(resource(&workload.namespace, &workload.service, &workload.revision));
    fields
}

fn of_gap(account: &Account, gap: &Gap) -> Fields {
    let workload = &gap.workload;
    let mut fields = common(account, gap.from, gap.to, &workload.labels);
    let zero = || "0".to_owned();
    let description = format!("not known whether replica {} ran on node {}", gap.replica, gap.node);
    fields.extend([
        ("BilledCost", zero()),
        ("EffectiveCost", zero()),
        ("ContractedCost", zero()),
        ("ListCost", zero()),
        ("ChargeDescription", description),
        ("x_State", gap.state.to_string()),
        ("x_GapReason", gap.reason.name().to_owned()),
    ]);
    fields.extend(resource(&workload.namespace, &workload.service, &workload.revision));
    fields
}

fn resource(namespace: &str, service: &str, revision: &str) -> Fields {
    let id = if service.is_empty() { String::new() } else { format!("{namespace}/{service}") };
    Fields::from([
        ("ResourceId", id),
        ("ResourceName", service.to_owned()),
        ("SubAccountId", namespace.to_owned()),
        ("SubAccountName", namespace.to_owned()),
        ("x_Revision", revision.to_owned()),
    ])
}

fn sku_id(sku: Sku, class: &str) -> String {
    if class.is_empty() { sku.id().to_owned() } else { format!("{}/{class}", sku.id()) }
}

fn description(charge: &Charge) -> String {
    let free = if charge.free.is_zero() { String::new() } else { format!(", {} free", decimal(charge.free)) };
    match charge.series.gpu_class.as_str() {
        "" => format!("{}{free}", charge.sku.unit()),
        class => format!("{} of {class}, {}{free}", charge.sku.unit(), charge.series.state),
    }
}

/// Without zeros at the end.
pub fn decimal(value: Decimal) -> String {
    value.normalize().to_string()
}

/// FOCUS wants whole seconds, UTC.
fn moment(time: Clock) -> String {
    let time = Timestamp::from_millisecond(time).unwrap_or_default();
    time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}
