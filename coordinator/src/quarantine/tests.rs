use std::collections::BTreeMap;

use super::{xid::FATAL_XIDS, *};

const UUID: &str = "GPU-1";

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

fn event(xid: u64, second: i64) -> XidEvent {
    let last_at = Some(prost_types::Timestamp { seconds: second, nanos: 0 });
    XidEvent { xid, count: 1, last_at }
}

fn healthy() -> GpuHealth {
    GpuHealth { index: 3, uuid: UUID.into(), ecc_uncorrectable_errors: Some(0), ..Default::default() }
}

fn with_xids(xids: &[(u64, i64)]) -> GpuHealth {
    GpuHealth { xids: xids.iter().map(|(xid, second)| event(*xid, *second)).collect(), ..healthy() }
}

/// The quarantine of the GPU after this report, if it is a new one.
fn decided(record: &GpuRecord, health: &GpuHealth) -> Option<Quarantine> {
    let node = NodeRecord { gpus: BTreeMap::from([(UUID.to_owned(), record.clone())]), ..NodeRecord::new("a", at(0)) };
    let report = GpuReport { gpus: vec![health.clone()], ..Default::default() };
    let mut decided = decide(&node, &report, at(100));
    assert!(decided.iter().all(|(index, uuid, _)| (*index, uuid.as_str()) == (3, UUID)));
    decided.pop().map(|(_, _, quarantine)| quarantine)
}

fn fresh(health: &GpuHealth) -> Option<(Reason, bool)> {
    decided(&GpuRecord::default(), health).map(|quarantine| (quarantine.reason, quarantine.stops_work))
}

fn quarantined(health: &GpuHealth) -> GpuRecord {
    GpuRecord { quarantine: decided(&GpuRecord::default(), health), ..Default::default() }
}

#[test]
fn each_fatal_xid_quarantines_and_those_of_applications_do_not() {
    for fatal in FATAL_XIDS {
        let found = fresh(&with_xids(&[(fatal.xid, 5)]));
        assert_eq!(found, Some((Reason::XidError, fatal.stops_work)), "{}", fatal.xid);
    }
    for xid in [13, 31, 43, 45, 68, 109, 121, 999] {
        assert_eq!(fresh(&with_xids(&[(xid, 5)])), None, "{xid}");
    }
    assert!(FATAL_XIDS.is_sorted_by_key(|fatal| fatal.xid));
    let quarantine = decided(&GpuRecord::default(), &with_xids(&[(13, 1), (79, 5)])).unwrap();
    assert_eq!(quarantine.message, "XID 79: the GPU has fallen off the bus; restart the node");
    assert_eq!(quarantine.since, at(100));
}

#[test]
fn errors_of_memory_and_lost_gpus_quarantine() {
    assert_eq!(fresh(&healthy()), None);
    let ecc = GpuHealth { ecc_uncorrectable_errors: Some(2), ..healthy() };
    assert_eq!(fresh(&ecc), Some((Reason::UncorrectableEccError, true)));
    assert_eq!(fresh(&GpuHealth { ecc_uncorrectable_errors: None, ..healthy() }), None, "no ECC");
    let pending = GpuHealth { row_remap_pending: true, ..healthy() };
    assert_eq!(fresh(&pending), Some((Reason::RowRemapPending, false)));
    assert_eq!(fresh(&GpuHealth { row_remap_failed: true, ..pending }), Some((Reason::RowRemapFailed, true)));
    assert_eq!(fresh(&GpuHealth { lost: true, ..ecc }), Some((Reason::GpuLost, true)));
}

#[test]
fn heat_load_links_and_others_memory_do_not_quarantine() {
    let health = GpuHealth {
        temperature_celsius: Some(95),
        utilization_percent: Some(100),
        throttle_reasons: vec!["HwThermalSlowdown".into()],
        nvlinks_active: 17,
        nvlinks_expected: 18,
        foreign_memory_bytes: 1 << 30,
        unreadable: vec!["temperature: unknown".into()],
        ..healthy()
    };
    assert_eq!(fresh(&health), None);
}

#[test]
fn the_error_that_stops_work_is_the_reason_whatever_else_there_is() {
    let health = GpuHealth { row_remap_pending: true, ..with_xids(&[(63, 5), (95, 4)]) };
    let quarantine = decided(&GpuRecord::default(), &health).unwrap();
    assert!(quarantine.message.starts_with("XID 95"), "{}", quarantine.message);
    let health = GpuHealth { ecc_uncorrectable_errors: Some(1), ..with_xids(&[(74, 5)]) };
    assert_eq!(fresh(&health), Some((Reason::UncorrectableEccError, true)));
}

#[test]
fn a_quarantined_gpu_is_decided_on_again_only_if_it_gets_worse() {
    let record = quarantined(&with_xids(&[(74, 5)]));
    assert_eq!(decided(&record, &with_xids(&[(74, 50)])), None);
    assert_eq!(decided(&record, &healthy()), None, "it stays quarantined");
    let worse = decided(&record, &with_xids(&[(74, 50), (79, 60)])).unwrap();
    assert!(worse.stops_work);
    let record = GpuRecord { quarantine: Some(worse), ..record };
    assert_eq!(decided(&record, &GpuHealth { lost: true, ..healthy() }), None);
}

#[test]
fn only_what_is_new_quarantines_a_cleared_gpu_again() {
    let health = GpuHealth {
        ecc_uncorrectable_errors: Some(3),
        row_remap_pending: true,
        row_remap_failed: true,
        ..with_xids(&[(48, 5), (63, 7)])
    };
    let cleared = clear(&quarantined(&health), Some(&health)).unwrap();
    assert_eq!(cleared.quarantine, None);
    assert_eq!(decided(&cleared, &health), None);

    let again = GpuHealth { xids: vec![event(48, 5), event(63, 8)], ..health.clone() };
    assert_eq!(decided(&cleared, &again).unwrap().message, "XID 63: a row of memory is to be remapped; reset the GPU");
    for errors in [4, 1] {
        let health = GpuHealth { ecc_uncorrectable_errors: Some(errors), ..health.clone() };
        let reason = decided(&cleared, &health).map(|quarantine| quarantine.reason);
        assert_eq!(reason, Some(Reason::UncorrectableEccError), "{errors}: one more, or counted after a reset");
    }
    let reset = GpuHealth { row_remap_pending: false, ecc_uncorrectable_errors: Some(0), ..health };
    assert_eq!(decided(&cleared, &reset), None);
}

#[test]
fn a_gpu_that_is_cleared_while_its_node_is_away_is_not_quarantined_again_by_the_same_report() {
    let health = with_xids(&[(79, 5)]);
    let cleared = clear(&quarantined(&health), None).unwrap();
    assert_eq!(decided(&cleared, &health), None);
    assert!(decided(&cleared, &with_xids(&[(79, 6)])).is_some());
    // An agent that was restarted meanwhile reports no XIDs; its next report must not undo what was acknowledged.
    let cleared = clear(&quarantined(&health), Some(&healthy())).unwrap();
    assert_eq!(decided(&cleared, &health), None);
}

#[test]
fn what_is_not_quarantined_or_still_lost_is_not_cleared() {
    assert_eq!(clear(&GpuRecord::default(), Some(&healthy())), Err(Refusal::NotQuarantined));
    let lost = GpuHealth { lost: true, ..healthy() };
    assert_eq!(clear(&quarantined(&lost), Some(&lost)), Err(Refusal::StillLost));
    let cleared = clear(&quarantined(&lost), Some(&healthy())).unwrap();
    assert!(decided(&cleared, &lost).is_some(), "lost again");
}
