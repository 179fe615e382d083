//! From readings to reports. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::SystemTime,
};

use pilotlight_proto::fleet::v1::{Gpu, GpuHealth, GpuProcess, GpuReport, ReplicaGpuMemory, XidEvent};

use super::{
    sample::{Reading, Usage},
    xids::XidOccurred,
};

/// Foreign processes that are listed per GPU.
const MAX_PROCESSES: usize = 16;
/// Memory is compared in steps of this size, bytes: smaller changes alone are not reported at once.
const MEMORY_STEP: u64 = 256 << 20;

/// What is remembered between readings.
#[derive(Debug, Default)]
pub(super) struct Tracker {
    gpus: BTreeMap<u32, GpuMemory>,
    /// Processes that belonged to replicas, by id, for as long as the driver lists them: the memory of a replica that has
    /// just ended is not someone else's.
    owners: BTreeMap<u32, String>,
}

/// What is remembered of one GPU.
#[derive(Debug, Default)]
struct GpuMemory {
    xids: BTreeMap<u64, (u64, SystemTime)>,
    nvlinks_expected: u32,
    /// Foreign bytes as last read, of the GPU and of its MIG devices.
    foreign: Option<u64>,
    mig_foreign: BTreeMap<String, u64>,
}

impl Tracker {
    /// For these GPUs, of which nothing is known yet.
    pub(super) fn new(gpus: &[Gpu]) -> Self {
        let known = gpus.iter().map(|gpu| (gpu.index, GpuMemory::default()));
        Self { gpus: known.collect(), owners: BTreeMap::new() }
    }

    /// Takes in an XID.
    pub(super) fn record_xid(&mut self, event: &XidOccurred) {
        let gpu = self.gpus.entry(event.index).or_default();
        let (count, at) = gpu.xids.entry(event.xid).or_insert((0, event.at));
        (*count, *at) = (*count + 1, event.at);
    }

    /// Takes in readings of all GPUs, and gives what is to be reported. `find_owner` finds the replica that a process
    /// belongs to, `name_of` the name of a process.
    ///
    /// Foreign memory is the smaller one of what two readings in a row show, so that processes that start or end while
    /// they are read are not reported.
    pub(super) fn update(
        &mut self,
        readings: Vec<Reading>,
        find_owner: &impl Fn(u32) -> Option<String>,
        name_of: &impl Fn(u32) -> String,
    ) -> GpuReport {
        let all = readings.iter().flat_map(|reading| std::iter::once(&reading.usage).chain(reading.mig.values()));
        let pids: BTreeSet<u32> =
            all.flat_map(|usage| usage.processes.iter().flat_map(BTreeMap::keys).copied()).collect();
        self.owners.retain(|pid, _| pids.contains(pid));
        for pid in pids {
            if let Some(replica) = find_owner(pid) {
                self.owners.insert(pid, replica);
            }
        }
        let mut replicas: BTreeMap<String, u64> = BTreeMap::new();
        for (pid, bytes) in readings.iter().flat_map(|reading| reading.usage.processes.iter().flatten()) {
            if let Some(replica) = self.owners.get(pid) {
                *replicas.entry(replica.clone()).or_default() += bytes.unwrap_or(0);
            }
        }
        let gpus = readings.into_iter().map(|reading| self.update_gpu(reading, name_of)).collect();
        let replicas = replicas.into_iter().map(|(replica, bytes)| ReplicaGpuMemory { replica, bytes }).collect();
        GpuReport { gpus, replicas, error: String::new() }
    }

    fn update_gpu(&mut self, reading: Reading, name_of: &impl Fn(u32) -> String) -> GpuHealth {
        let owners = &self.owners;
        let foreign = foreign_bytes(&reading.usage, owners);
        let mig_foreign: BTreeMap<String, u64> =
            reading.mig.iter().map(|(uuid, usage)| (uuid.clone(), foreign_bytes(usage, owners))).collect();
        let listed = reading.usage.processes.iter().flatten().filter(|(pid, _)| !owners.contains_key(pid));
        let foreign_processes = listed.take(MAX_PROCESSES).map(|(pid, bytes)| GpuProcess {
            pid: *pid,
            name: name_of(*pid),
            memory_bytes: bytes.unwrap_or(0),
        });
        let foreign_processes = foreign_processes.collect();
        let memory = self.gpus.entry(reading.index).or_default();
        memory.nvlinks_expected = memory.nvlinks_expected.max(reading.nvlinks_active);
        let confirmed = foreign.min(memory.foreign.unwrap_or(foreign));
        let of_mig = |(uuid, bytes): (&String, &u64)| {
            let before = memory.mig_foreign.get(uuid).unwrap_or(bytes);
            (uuid.clone(), *bytes.min(before))
        };
        let mig_confirmed = mig_foreign.iter().map(of_mig).filter(|(_, bytes)| *bytes > 0).collect();
        (memory.foreign, memory.mig_foreign) = (Some(foreign), mig_foreign);
        let xid = |(xid, (count, at)): (&u64, &(u64, SystemTime))| XidEvent {
            xid: *xid,
            count: *count,
            last_at: Some((*at).into()),
        };
        GpuHealth {
            index: reading.index,
            uuid: reading.uuid,
            lost: reading.lost,
            xids: memory.xids.iter().map(xid).collect(),
            ecc_uncorrectable_errors: reading.ecc_uncorrectable_errors,
            row_remap_pending: reading.row_remap_pending,
            row_remap_failed: reading.row_remap_failed,
            nvlinks_active: reading.nvlinks_active,
            nvlinks_expected: memory.nvlinks_expected,
            throttle_reasons: reading.throttle_reasons,
            temperature_celsius: reading.temperature_celsius,
            utilization_percent: reading.utilization_percent,
            memory_used_bytes: reading.usage.used_bytes,
            foreign_memory_bytes: confirmed,
            foreign_processes,
            mig_foreign_memory_bytes: mig_confirmed,
            unreadable: reading.unreadable,
        }
    }
}

/// Memory that no replica uses: what other processes use, or what is in use and is no replica's, whichever is more. The
/// latter includes processes that the driver does not list. 0 if processes cannot be listed.
fn foreign_bytes(usage: &Usage, owners: &BTreeMap<u32, String>) -> u64 {
    let Some(processes) = &usage.processes else { return 0 };
    let (own, foreign): (Vec<_>, Vec<_>) = processes.iter().partition(|(pid, _)| owners.contains_key(pid));
    let foreign: u64 = foreign.into_iter().filter_map(|(_, bytes)| *bytes).sum();
    let own: Option<u64> = own.into_iter().map(|(_, bytes)| *bytes).sum();
    let unaccounted = own.map_or(0, |own| usage.used_bytes.saturating_sub(own));
    foreign.max(unaccounted)
}

/// Returns `true` if two reports differ in nothing but measured values, or little in memory.
pub(super) fn is_alike(one: &GpuReport, other: &GpuReport) -> bool {
    comparable(one) == comparable(other)
}

fn comparable(report: &GpuReport) -> GpuReport {
    let step = |bytes: &mut u64| *bytes /= MEMORY_STEP;
    let mut report = report.clone();
    for gpu in &mut report.gpus {
        (gpu.temperature_celsius, gpu.utilization_percent, gpu.memory_used_bytes) = (None, None, 0);
        step(&mut gpu.foreign_memory_bytes);
        gpu.mig_foreign_memory_bytes.values_mut().for_each(step);
        gpu.foreign_processes.iter_mut().for_each(|process| step(&mut process.memory_bytes));
    }
    report.replicas.iter_mut().for_each(|replica| step(&mut replica.bytes));
    report
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const GIB: u64 = 1 << 30;

    fn reading(used: u64, processes: &[(u32, Option<u64>)]) -> Reading {
        let processes = Some(processes.iter().copied().collect());
        Reading { usage: Usage { used_bytes: used, processes }, ..Reading::default() }
    }

    /// Process 1 is replica `a`'s, 2 is `b`'s.
    fn owner(pid: u32) -> Option<String> {
        match pid {
            1 => Some("a".to_owned()),
            2 => Some("b".to_owned()),
            _ => None,
        }
    }

    fn update(tracker: &mut Tracker, reading: Reading) -> GpuReport {
        tracker.update(vec![reading], &owner, &|pid| format!("p{pid}"))
    }

    fn foreign(readings: &[Reading]) -> u64 {
        let mut tracker = Tracker::default();
        let reports = readings.iter().map(|reading| update(&mut tracker, reading.clone()));
        reports.last().unwrap().gpus[0].foreign_memory_bytes
    }

    #[test]
    fn memory_is_told_apart_by_the_processes_that_use_it() {
        let mut tracker = Tracker::default();
        let processes = [(1, Some(10 * GIB)), (2, Some(5 * GIB)), (7, Some(3 * GIB))];
        let report = update(&mut tracker, reading(18 * GIB, &processes));
        let replicas: Vec<_> = report.replicas.iter().map(|it| (it.replica.as_str(), it.bytes)).collect();
        assert_eq!(replicas, [("a", 10 * GIB), ("b", 5 * GIB)]);
        let gpu = &report.gpus[0];
        assert_eq!((gpu.memory_used_bytes, gpu.foreign_memory_bytes), (18 * GIB, 3 * GIB));
        let process = GpuProcess { pid: 7, name: "p7".into(), memory_bytes: 3 * GIB };
        assert_eq!(gpu.foreign_processes, [process]);
    }

    #[test]
    fn memory_of_processes_that_the_driver_does_not_list_is_foreign() {
        assert_eq!(foreign(&[reading(12 * GIB, &[(1, Some(10 * GIB))])]), 2 * GIB);
        assert_eq!(foreign(&[reading(10 * GIB, &[(1, Some(10 * GIB))])]), 0);
        // A replica's memory is not known: what is left over may be its own.
        assert_eq!(foreign(&[reading(12 * GIB, &[(1, None), (7, Some(GIB))])]), GIB);
        let unknown = Reading { usage: Usage { used_bytes: GIB, processes: None }, ..Reading::default() };
        assert_eq!(foreign(&[unknown]), 0);
    }

    #[test]
    fn foreign_memory_counts_once_two_readings_show_it() {
        let (idle, held) = (reading(0, &[]), reading(4 * GIB, &[(7, Some(4 * GIB))]));
        assert_eq!(foreign(std::slice::from_ref(&held)), 4 * GIB, "an agent that starts knows it at once");
        assert_eq!(foreign(&[idle.clone(), held.clone()]), 0);
        assert_eq!(foreign(&[idle.clone(), held.clone(), held.clone()]), 4 * GIB);
        assert_eq!(foreign(&[held.clone(), held, idle]), 0);
    }

    #[test]
    fn a_replica_that_has_ended_keeps_its_memory_until_the_driver_has_freed_it() {
        let mut tracker = Tracker::default();
        let running = reading(4 * GIB, &[(1, Some(4 * GIB))]);
        let none = |_| None;
        update(&mut tracker, running.clone());
        let mut after = || tracker.update(vec![running.clone()], &none, &|_| String::new());
        let reports = [after(), after()];
        assert!(reports.iter().all(|report| report.gpus[0].foreign_memory_bytes == 0), "{reports:?}");
        assert_eq!(reports[1].replicas[0].replica, "a");
        tracker.update(vec![reading(0, &[])], &none, &|_| String::new());
        let mut reused = || tracker.update(vec![running.clone()], &none, &|_| String::new());
        reused();
        assert_eq!(reused().gpus[0].foreign_memory_bytes, 4 * GIB, "the process id is another process's now");
    }

    #[test]
    fn foreign_memory_of_mig_devices_is_theirs() {
        let usage = |bytes, pid| Usage { used_bytes: bytes, processes: Some([(pid, Some(bytes))].into()) };
        let mig = [("MIG-1".to_owned(), usage(2 * GIB, 1)), ("MIG-2".to_owned(), usage(3 * GIB, 7))];
        let reading = Reading { mig: mig.into(), ..reading(5 * GIB, &[(1, Some(2 * GIB)), (7, Some(3 * GIB))]) };
        let report = update(&mut Tracker::default(), reading);
        assert_eq!(report.gpus[0].mig_foreign_memory_bytes, [("MIG-2".to_owned(), 3 * GIB)].into());
        assert_eq!(report.replicas[0].bytes, 2 * GIB, "counted once");
    }

    #[test]
    fn xids_are_counted_and_links_that_were_up_are_expected() {
        let mut tracker = Tracker::default();
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        for (xid, seconds) in [(79, 5), (31, 6), (79, 7)] {
            tracker.record_xid(&XidOccurred { index: 0, xid, at: at(seconds) });
        }
        update(&mut tracker, Reading { nvlinks_active: 18, ..reading(0, &[]) });
        let report = update(&mut tracker, Reading { nvlinks_active: 17, ..reading(0, &[]) });
        let gpu = &report.gpus[0];
        assert_eq!((gpu.nvlinks_active, gpu.nvlinks_expected), (17, 18));
        let xids: Vec<_> = gpu.xids.iter().map(|it| (it.xid, it.count, it.last_at.unwrap().seconds)).collect();
        assert_eq!(xids, [(31, 1, 6), (79, 2, 7)]);
    }

    #[test]
    fn measured_values_alone_make_no_new_report() {
        let report = |change: &dyn Fn(&mut GpuHealth)| {
            let mut gpu = GpuHealth { temperature_celsius: Some(40), ..Default::default() };
            change(&mut gpu);
            GpuReport { gpus: vec![gpu], ..Default::default() }
        };
        let before = report(&|_| {});
        let alike = |change: &dyn Fn(&mut GpuHealth)| is_alike(&before, &report(change));
        assert!(alike(&|gpu| gpu.temperature_celsius = Some(60)));
        assert!(alike(&|gpu| gpu.utilization_percent = Some(60)));
        assert!(alike(&|gpu| gpu.foreign_memory_bytes = 1 << 20));
        assert!(!alike(&|gpu| gpu.foreign_memory_bytes = 1 << 30));
        assert!(!alike(&|gpu| gpu.lost = true));
        assert!(!alike(&|gpu| gpu.ecc_uncorrectable_errors = Some(1)));
        assert!(!alike(&|gpu| gpu.throttle_reasons = vec!["HwSlowdown".into()]));
    }
}
