//! The driver's side of a GPU's health, against a stand-in for its library.

use std::time::Duration;

use nvml_wrapper::Nvml;
use pilotlight_proto::fleet::v1::{GpuHealth, ReplicaStatus};
use pilotlight_tests::nvml::{NvmlStub, code};
use prometheus_client::registry::Registry;

use super::{
    sample::{Reading, read},
    *,
};

const GIB: u64 = 1 << 30;

fn gpu(index: u32) -> Gpu {
    Gpu { index, uuid: format!("GPU-{index}"), ..Default::default() }
}

fn open(stub: &NvmlStub) -> Nvml {
    crate::inventory::open_driver(Some(&stub.library())).unwrap()
}

#[test]
fn a_healthy_gpu_is_read() {
    let stub = NvmlStub::with_h100(1);
    for (name, value) in [("temperature", "64"), ("utilization", "87"), ("used", "4096"), ("throttle", "0x45")] {
        stub.set(&format!("gpu.0.{name}"), value);
    }
    stub.set("gpu.0.processes", "7:1024,8:-");
    stub.set("gpu.0.graphics", "7:2048,9:512");
    stub.set("gpu.0.link.0", "00000000:19:00.0");
    stub.set("gpu.0.link.1", "00000000:19:00.0");
    stub.set("gpu.0.link.1.down", 1);
    let reading = read(&open(&stub), &gpu(0));
    let processes = [(7, Some(2048)), (8, None), (9, Some(512))];
    let expected = Reading {
        uuid: "GPU-0".into(),
        ecc_uncorrectable_errors: Some(0),
        nvlinks_active: 1,
        throttle_reasons: vec!["HwThermalSlowdown".into(), "SwPowerCap".into()],
        temperature_celsius: Some(64),
        utilization_percent: Some(87),
        usage: sample::Usage { used_bytes: 4096, processes: Some(processes.into()) },
        ..Reading::default()
    };
    assert_eq!(reading, expected);
}

#[test]
fn errors_of_memory_are_read() {
    let stub = NvmlStub::with_h100(1);
    let nvml = open(&stub);
    stub.set("gpu.0.ecc", 3);
    stub.set("gpu.0.remap_pending", 1);
    let reading = read(&nvml, &gpu(0));
    assert_eq!((reading.ecc_uncorrectable_errors, reading.row_remap_pending), (Some(3), true));
    assert!(!reading.row_remap_failed && !reading.lost);
    stub.set("gpu.0.remap_failed", 1);
    assert!(read(&nvml, &gpu(0)).row_remap_failed);
}

#[test]
fn what_a_gpu_does_not_support_is_left_out_and_is_no_error() {
    let stub = NvmlStub::with_h100(1);
    for name in ["temperature", "utilization", "throttle", "ecc", "remap_pending", "remap_failed", "mig"] {
        stub.remove(&format!("gpu.0.{name}"));
    }
    let usage = sample::Usage { used_bytes: 0, processes: Some(Default::default()) };
    assert_eq!(read(&open(&stub), &gpu(0)), Reading { uuid: "GPU-0".into(), usage, ..Reading::default() });
}

#[test]
fn a_call_that_fails_hides_nothing_else() {
    let calls = [
        ("nvmlDeviceGetTemperature", "temperature"),
        ("nvmlDeviceGetUtilizationRates", "utilization"),
        ("nvmlDeviceGetCurrentClocksThrottleReasons", "throttle reasons"),
        ("nvmlDeviceGetTotalEccErrors", "ECC errors"),
        ("nvmlDeviceGetFieldValues", "row remapping"),
        ("nvmlDeviceGetNvLinkState", "NVLinks"),
        ("nvmlDeviceGetMemoryInfo_v2", "memory"),
        ("nvmlDeviceGetComputeRunningProcesses_v3", "processes"),
        ("nvmlDeviceGetGraphicsRunningProcesses_v3", "processes"),
        ("nvmlDeviceGetHandleByIndex_v2", "GPU"),
    ];
    let stub = NvmlStub::with_h100(2);
    let nvml = open(&stub);
    let well = read(&nvml, &gpu(0));
    for (call, what) in calls {
        let key = format!("gpu.0.fail.{call}");
        stub.set(&key, code::NO_PERMISSION);
        let reading = read(&nvml, &gpu(0));
        assert_eq!(reading.unreadable.len(), 1, "{call}: {:?}", reading.unreadable);
        assert!(reading.unreadable[0].starts_with(&format!("{what}: ")), "{call}: {:?}", reading.unreadable);
        assert!(!reading.lost, "{call}");
        for lost in [code::GPU_IS_LOST, code::RESET_REQUIRED] {
            stub.set(&key, lost);
            let reading = read(&nvml, &gpu(0));
            assert!(reading.lost && reading.unreadable.is_empty(), "{call}: {reading:?}");
        }
        stub.remove(&key);
        assert_eq!(read(&nvml, &gpu(0)), well, "{call}");
        assert_eq!(read(&nvml, &gpu(1)).temperature_celsius, Some(35), "the other one is well");
    }
}

#[test]
fn a_gpu_that_is_not_found_any_more_is_lost() {
    let stub = NvmlStub::with_h100(2);
    let nvml = open(&stub);
    stub.set("gpus", 1);
    assert!(read(&nvml, &gpu(1)).lost);
}

#[test]
fn memory_of_mig_devices_is_read() {
    let stub = NvmlStub::with_h100(1);
    stub.set("gpu.0.mig", 1);
    stub.set("gpu.0.migs", 2);
    stub.set("gpu.0.processes", "7:2048");
    stub.remove("gpu.0.utilization");
    for (device, processes) in [(0, "7:2048"), (1, "")] {
        stub.set(&format!("gpu.0.mig.{device}.uuid"), format!("MIG-{device}"));
        stub.set(&format!("gpu.0.mig.{device}.memory"), 10 * GIB);
        stub.set(&format!("gpu.0.mig.{device}.processes"), processes);
    }
    stub.set("gpu.0.mig.0.used", 2048);
    let reading = read(&open(&stub), &gpu(0));
    let usage = |used_bytes, processes: &[(u32, Option<u64>)]| sample::Usage {
        used_bytes,
        processes: Some(processes.iter().copied().collect()),
    };
    let expected = [("MIG-0".to_owned(), usage(2048, &[(7, Some(2048))])), ("MIG-1".to_owned(), usage(0, &[]))];
    assert_eq!(reading.mig, expected.into());
    stub.set("gpu.0.mig.1.fail.nvmlDeviceGetMemoryInfo_v2", code::UNKNOWN);
    let unreadable = read(&open(&stub), &gpu(0)).unreadable;
    assert!(unreadable.len() == 1 && unreadable[0].starts_with("MIG-1: memory: "), "{unreadable:?}");
}

struct Watched {
    reports: watch::Receiver<Option<GpuReport>>,
    replicas: watch::Sender<ReplicaStatuses>,
    _monitor: GpuMonitor,
}

impl Watched {
    fn start(stub: &NvmlStub, gpus: u32) -> Self {
        let (sender, reports) = watch::channel(None);
        let (replicas, statuses) = watch::channel(ReplicaStatuses::default());
        let settings = MonitorSettings {
            library: Some(stub.library()),
            gpus: (0..gpus).map(gpu).collect(),
            interval: Duration::from_millis(20),
        };
        let metrics = GpuMetrics::register(&mut Registry::default());
        let monitor = GpuMonitor::start(settings, statuses, metrics, sender).unwrap();
        Self { reports, replicas, _monitor: monitor }
    }

    /// Waits for a report like this.
    async fn report(&mut self, wanted: impl Fn(&GpuReport) -> bool) -> GpuReport {
        let report = self.reports.wait_for(|report| report.as_ref().is_some_and(&wanted)).await.unwrap();
        report.clone().unwrap()
    }

    async fn gpu(&mut self, index: usize, wanted: impl Fn(&GpuHealth) -> bool) -> GpuHealth {
        self.report(|report| report.gpus.get(index).is_some_and(&wanted)).await.gpus.swap_remove(index)
    }
}

#[tokio::test]
async fn xids_are_reported_for_their_gpu_alone() {
    let stub = NvmlStub::with_h100(2);
    let mut watched = Watched::start(&stub, 2);
    let first = watched.report(|report| report.gpus.len() == 2).await;
    assert!(first.gpus.iter().all(|gpu| gpu.xids.is_empty() && !gpu.lost) && first.error.is_empty());
    stub.set("gpu.1.xids", "31");
    watched.gpu(1, |gpu| gpu.xids.len() == 1).await;
    stub.set("gpu.1.xids", "31,79,79");
    let gpu = watched.gpu(1, |gpu| gpu.xids.iter().any(|xid| xid.count == 2)).await;
    assert_eq!(gpu.xids.iter().map(|xid| (xid.xid, xid.count)).collect::<Vec<_>>(), [(31, 1), (79, 2)]);
    assert!(gpu.xids.iter().all(|xid| xid.last_at.is_some()));
    let other = watched.reports.borrow().as_ref().unwrap().gpus[0].clone();
    assert!(other.xids.is_empty());
}

#[tokio::test]
async fn a_gpu_that_is_lost_and_returns_is_reported() {
    let stub = NvmlStub::with_h100(1);
    let mut watched = Watched::start(&stub, 1);
    watched.gpu(0, |gpu| !gpu.lost).await;
    stub.set("gpu.0.fail.nvmlDeviceGetTemperature", code::GPU_IS_LOST);
    watched.gpu(0, |gpu| gpu.lost).await;
    stub.remove("gpu.0.fail.nvmlDeviceGetTemperature");
    watched.gpu(0, |gpu| !gpu.lost && gpu.temperature_celsius.is_some()).await;
}

#[tokio::test]
async fn a_driver_that_goes_away_is_reported_and_used_again_when_it_returns() {
    let stub = NvmlStub::with_h100(1);
    let mut watched = Watched::start(&stub, 1);
    watched.gpu(0, |gpu| !gpu.lost).await;
    stub.set("fail.nvmlDeviceGetCount_v2", code::UNKNOWN);
    stub.set("fail.nvmlInit_v2", code::DRIVER_NOT_LOADED);
    let report = watched.report(|report| !report.error.is_empty()).await;
    assert_eq!(report.gpus.len(), 1, "what was read last stays");
    assert!(!report.gpus[0].lost);
    stub.remove("fail.nvmlDeviceGetCount_v2");
    stub.remove("fail.nvmlInit_v2");
    watched.report(|report| report.error.is_empty()).await;
    stub.set("gpu.0.xids", "48");
    watched.gpu(0, |gpu| !gpu.xids.is_empty()).await;
}

#[tokio::test]
async fn memory_of_replicas_is_told_apart_from_that_of_others() {
    let stub = NvmlStub::with_h100(1);
    // A process that lives, so that the replica has one; and another one.
    let spawn = || std::process::Command::new("sleep").arg("600").spawn().unwrap();
    let (mut own, mut other) = (spawn(), spawn());
    let processes = format!("{}:{},{}:{}", own.id(), 3 * GIB, other.id(), 2 * GIB);
    let mut watched = Watched::start(&stub, 1);
    watched.gpu(0, |gpu| gpu.foreign_memory_bytes == 0).await;
    let status = ReplicaStatus { replica: "m-1".into(), pid: own.id(), ..Default::default() };
    watched.replicas.send_replace(ReplicaStatuses { replicas: vec![status] });
    stub.set("gpu.0.used", 5 * GIB);
    stub.set("gpu.0.processes", processes);
    let report = watched.report(|report| report.gpus[0].foreign_memory_bytes > 0 && !report.replicas.is_empty()).await;
    own.kill().and_then(|()| own.wait()).unwrap();
    other.kill().and_then(|()| other.wait()).unwrap();
    assert_eq!((report.replicas[0].replica.as_str(), report.replicas[0].bytes), ("m-1", 3 * GIB));
    let gpu = &report.gpus[0];
    assert_eq!((gpu.memory_used_bytes, gpu.foreign_memory_bytes), (5 * GIB, 2 * GIB));
    assert_eq!(gpu.foreign_processes.iter().map(|process| process.pid).collect::<Vec<_>>(), [other.id()]);
    assert_eq!(gpu.foreign_processes[0].name, "sleep");
    stub.set("gpu.0.used", 0);
    stub.set("gpu.0.processes", "");
    let report = watched.report(|report| report.gpus[0].foreign_memory_bytes == 0).await;
    assert!(report.replicas.is_empty());
}

#[tokio::test]
async fn gpus_that_could_not_be_read_at_the_start_are_missed() {
    let stub = NvmlStub::with_h100(2);
    let mut watched = Watched::start(&stub, 1);
    let report = watched.report(|report| !report.error.is_empty()).await;
    assert!(report.error.starts_with("only 1 of 2 GPUs could be read"), "{}", report.error);
    assert_eq!(report.gpus.len(), 1);
    let mut none = Watched::start(&stub, 0);
    assert!(none.report(|report| !report.error.is_empty()).await.error.starts_with("only 0 of 2"));
}
