//! Which GPUs take no replicas because of an error. Pure.
//!
//! A GPU is quarantined by what its agent reports: a fatal XID ([`xid`]), uncorrectable ECC errors, a row of memory that
//! waits for its remapping or could not be remapped, or a driver that has lost it. It stays quarantined, whatever is
//! reported later, until an operator clears it. What had been reported by then is acknowledged ([`Acknowledged`]): only
//! something new quarantines the GPU again.

pub mod xid;

use jiff::Timestamp;
use pilotlight_proto::fleet::v1::{GpuHealth, GpuReport, XidEvent};
use serde::{Deserialize, Serialize};

use crate::model::NodeRecord;

/// What is stored of one GPU of a node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuRecord {
    /// Set while it takes no replicas.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quarantine: Option<Quarantine>,
    /// What does not quarantine it again.
    #[serde(default)]
    pub acknowledged: Acknowledged,
}

/// Why a GPU takes no replicas.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quarantine {
    /// When it was decided.
    pub since: Timestamp,
    /// Which error.
    pub reason: Reason,
    /// Human-readable: what was found, and what cures it.
    pub message: String,
    /// `true` if replicas that use it cannot go on. Otherwise they serve until others are ready elsewhere.
    pub stops_work: bool,
    /// What was reported when it was decided, in case the operator clears it while the node is away.
    pub reported: Acknowledged,
}

/// The kinds of errors that quarantine a GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reason {
    /// The driver has lost it.
    GpuLost,
    /// A fatal XID.
    XidError,
    /// Uncorrectable ECC errors.
    UncorrectableEccError,
    /// A row of memory could not be remapped.
    RowRemapFailed,
    /// A row of memory is remapped at the next reset.
    RowRemapPending,
}

impl Reason {
    /// CamelCase, for operators.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::GpuLost => "GpuLost",
            Self::XidError => "XidError",
            Self::UncorrectableEccError => "UncorrectableEccError",
            Self::RowRemapFailed => "RowRemapFailed",
            Self::RowRemapPending => "RowRemapPending",
        }
    }
}

/// Errors that are known, and do not quarantine a GPU once they are acknowledged.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Acknowledged {
    /// XIDs up to this time, by the node's clock.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub xids_until: Option<Timestamp>,
    /// This number of uncorrectable ECC errors. A lower one was counted after a reset, and is not acknowledged.
    #[serde(default)]
    pub ecc_uncorrectable_errors: u64,
    /// A row that waits for its remapping.
    #[serde(default)]
    pub row_remap_pending: bool,
    /// A row that could not be remapped.
    #[serde(default)]
    pub row_remap_failed: bool,
}

impl Acknowledged {
    /// All that is reported now.
    fn of(health: &GpuHealth) -> Self {
        Self {
            xids_until: health.xids.iter().filter_map(time_of).max(),
            ecc_uncorrectable_errors: health.ecc_uncorrectable_errors(),
            row_remap_pending: health.row_remap_pending,
            row_remap_failed: health.row_remap_failed,
        }
    }

    /// What is acknowledged if the previous acknowledgement was `self` and the GPU is cleared now. Without a report, it
    /// is what was reported when the GPU was quarantined.
    fn after_clearing(&self, reported: Self) -> Self {
        Self { xids_until: self.xids_until.max(reported.xids_until), ..reported }
    }
}

/// The GPUs of a node that are to be quarantined because of a report, each with its index and UUID. A GPU that is
/// quarantined already is listed again only if replicas on it could go on so far, and cannot any more.
pub fn decide(record: &NodeRecord, report: &GpuReport, now: Timestamp) -> Vec<(u32, String, Quarantine)> {
    let decided = report.gpus.iter().filter_map(|health| {
        let known = record.gpus.get(&health.uuid).cloned().unwrap_or_default();
        let quarantine = decide_gpu(&known, health, now)?;
        Some((health.index, health.uuid.clone(), quarantine))
    });
    decided.collect()
}

fn decide_gpu(known: &GpuRecord, health: &GpuHealth, now: Timestamp) -> Option<Quarantine> {
    let (reason, message, stops_work) = worst_error(&known.acknowledged, health)?;
    match &known.quarantine {
        Some(quarantine) if quarantine.stops_work || !stops_work => None,
        _ => Some(Quarantine { since: now, reason, message, stops_work, reported: Acknowledged::of(health) }),
    }
}

/// The first of the errors that are not acknowledged; those that stop work come first.
fn worst_error(known: &Acknowledged, health: &GpuHealth) -> Option<(Reason, String, bool)> {
    if health.lost {
        return Some((Reason::GpuLost, "the driver has lost the GPU; reset it or restart the node".to_owned(), true));
    }
    let new = |event: &&XidEvent| known.xids_until.is_none_or(|until| time_of(event).is_none_or(|at| at > until));
    let mut fatal: Vec<_> = health.xids.iter().filter(new).filter_map(|event| xid::fatal(event.xid)).collect();
    fatal.sort_by_key(|fatal| (!fatal.stops_work, fatal.xid));
    let of_xid =
        |fatal: &xid::FatalXid| (Reason::XidError, format!("XID {}: {}", fatal.xid, fatal.meaning), fatal.stops_work);
    let errors = health.ecc_uncorrectable_errors();
    let ecc = (errors > 0 && errors != known.ecc_uncorrectable_errors).then(|| {
        let message = format!("{errors} uncorrectable ECC errors since the last reset; reset the GPU");
        (Reason::UncorrectableEccError, message, true)
    });
    let failed = (health.row_remap_failed && !known.row_remap_failed).then(|| {
        let message = "a row of memory could not be remapped; replace the GPU".to_owned();
        (Reason::RowRemapFailed, message, true)
    });
    let pending = (health.row_remap_pending && !known.row_remap_pending).then(|| {
        let message = "a row of memory waits for its remapping; reset the GPU".to_owned();
        (Reason::RowRemapPending, message, false)
    });
    let fatal = fatal.first().map(of_xid);
    let stopping = fatal.clone().filter(|(_, _, stops_work)| *stops_work);
    stopping.or(ecc).or(failed).or(fatal).or(pending)
}

/// Why a GPU cannot be cleared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// It is not quarantined.
    NotQuarantined,
    /// The driver still says that it is lost.
    StillLost,
}

/// What is stored of a GPU once an operator has cleared it; `health` is the last report, if there is one.
///
/// # Errors
/// It is not quarantined, or still lost.
pub fn clear(record: &GpuRecord, health: Option<&GpuHealth>) -> Result<GpuRecord, Refusal> {
    let quarantine = record.quarantine.as_ref().ok_or(Refusal::NotQuarantined)?;
    if health.is_some_and(|health| health.lost) {
        return Err(Refusal::StillLost);
    }
    let reported = health.map_or_else(|| quarantine.reported.clone(), Acknowledged::of);
    let since = quarantine.reported.xids_until.max(record.acknowledged.xids_until);
    let before = Acknowledged { xids_until: since, ..record.acknowledged.clone() };
    Ok(GpuRecord { quarantine: None, acknowledged: before.after_clearing(reported) })
}

fn time_of(event: &XidEvent) -> Option<Timestamp> {
    let at = event.last_at?;
    Timestamp::new(at.seconds, at.nanos).ok()
}

#[cfg(test)]
mod tests;
