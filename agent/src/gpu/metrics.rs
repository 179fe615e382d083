//! What Prometheus sees of this node's GPUs.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, PoisonError, atomic::AtomicU64},
};

use pilotlight_proto::fleet::v1::{GpuHealth, GpuReport};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::{Registry, Unit},
};

/// Labels of a GPU.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct GpuLabels {
    gpu: u32,
    uuid: String,
}

/// Labels of the XIDs of a GPU.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct XidLabels {
    gpu: u32,
    uuid: String,
    xid: u64,
}

/// Labels of a reason for lower clocks.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabels {
    gpu: u32,
    uuid: String,
    reason: String,
}

/// Labels of a replica.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, EncodeLabelSet)]
struct ReplicaLabels {
    replica: String,
}

type PerGpu<G> = Family<GpuLabels, G>;

/// Gauges and counters of GPUs. Values that a GPU does not support have no series. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct GpuMetrics {
    temperature: PerGpu<Gauge>,
    utilization: PerGpu<Gauge<f64, AtomicU64>>,
    memory_used: PerGpu<Gauge>,
    memory_foreign: PerGpu<Gauge>,
    lost: PerGpu<Gauge>,
    ecc_errors: PerGpu<Gauge>,
    remap_pending: PerGpu<Gauge>,
    remap_failed: PerGpu<Gauge>,
    nvlinks_active: PerGpu<Gauge>,
    nvlinks_expected: PerGpu<Gauge>,
    throttled: Family<ReasonLabels, Gauge>,
    xids: Family<XidLabels, Counter>,
    replica_memory: Family<ReplicaLabels, Gauge>,
    shown: Arc<Mutex<Shown>>,
}

/// Series that there are and that may have to be removed or raised.
#[derive(Debug, Default)]
struct Shown {
    replicas: BTreeSet<ReplicaLabels>,
    xids: BTreeMap<(u32, u64), u64>,
}

impl GpuMetrics {
    /// Registers them. Nothing is shown before the first report.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        let celsius = Unit::Celsius;
        registry.register_with_unit("gpu_temperature", "Temperature of the GPU", celsius, metrics.temperature.clone());
        let utilization = metrics.utilization.clone();
        registry.register_with_unit(
            "gpu_utilization",
            "Share of time in which a kernel ran",
            Unit::Other("ratio".to_owned()),
            utilization,
        );
        let used = metrics.memory_used.clone();
        registry.register_with_unit("gpu_memory_used", "GPU memory in use by anyone", Unit::Bytes, used);
        let foreign = metrics.memory_foreign.clone();
        let help = "GPU memory in use by processes that belong to no replica";
        registry.register_with_unit("gpu_memory_foreign", help, Unit::Bytes, foreign);
        registry.register("gpu_lost", "1 if the driver has lost the GPU, otherwise 0", metrics.lost.clone());
        let help = "Uncorrectable ECC errors since the driver was loaded or the GPU was reset";
        registry.register("gpu_ecc_uncorrectable_errors", help, metrics.ecc_errors.clone());
        let help = "1 if a row of memory is remapped at the next reset, otherwise 0";
        registry.register("gpu_row_remap_pending", help, metrics.remap_pending.clone());
        let help = "1 if a row of memory could not be remapped, otherwise 0";
        registry.register("gpu_row_remap_failed", help, metrics.remap_failed.clone());
        registry.register("gpu_nvlinks_active", "NVLinks that are active", metrics.nvlinks_active.clone());
        let help = "Most NVLinks that were active since the agent's start";
        registry.register("gpu_nvlinks_expected", help, metrics.nvlinks_expected.clone());
        let help = "1 while the GPU's clocks are lowered for this reason, otherwise 0";
        registry.register("gpu_throttled", help, metrics.throttled.clone());
        registry.register("gpu_xid_errors", "XIDs that the driver has reported", metrics.xids.clone());
        let help = "GPU memory that the processes of a replica use, on all GPUs together";
        registry.register_with_unit("replica_gpu_memory", help, Unit::Bytes, metrics.replica_memory.clone());
        metrics
    }

    /// Shows a report.
    pub(super) fn set(&self, report: &GpuReport) {
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        report.gpus.iter().for_each(|gpu| self.set_gpu(gpu, &mut shown));
        let replicas: BTreeMap<_, _> = report
            .replicas
            .iter()
            .map(|replica| (ReplicaLabels { replica: replica.replica.clone() }, replica.bytes))
            .collect();
        for gone in shown.replicas.iter().filter(|labels| !replicas.contains_key(labels)) {
            self.replica_memory.remove(gone);
        }
        for (labels, bytes) in &replicas {
            self.replica_memory.get_or_create(labels).set(signed(*bytes));
        }
        shown.replicas = replicas.into_keys().collect();
    }

    fn set_gpu(&self, gpu: &GpuHealth, shown: &mut Shown) {
        let (index, uuid) = (gpu.index, gpu.uuid.clone());
        let labels = GpuLabels { gpu: index, uuid: uuid.clone() };
        let set = |family: &PerGpu<Gauge>, value: i64| {
            family.get_or_create(&labels).set(value);
        };
        let show = |family: &PerGpu<Gauge>, value: Option<i64>| match value {
            Some(value) => set(family, value),
            None => drop(family.remove(&labels)),
        };
        show(&self.temperature, gpu.temperature_celsius.map(i64::from));
        show(&self.ecc_errors, gpu.ecc_uncorrectable_errors.map(signed));
        match gpu.utilization_percent {
            Some(percent) => {
                self.utilization.get_or_create(&labels).set(f64::from(percent) / 100.0);
            }
            None => drop(self.utilization.remove(&labels)),
        }
        set(&self.memory_used, signed(gpu.memory_used_bytes));
        set(&self.memory_foreign, signed(gpu.foreign_memory_bytes));
        set(&self.lost, i64::from(gpu.lost));
        set(&self.remap_pending, i64::from(gpu.row_remap_pending));
        set(&self.remap_failed, i64::from(gpu.row_remap_failed));
        set(&self.nvlinks_active, gpu.nvlinks_active.into());
        set(&self.nvlinks_expected, gpu.nvlinks_expected.into());
        for reason in super::sample::reason_names() {
            let is_throttled = gpu.throttle_reasons.iter().any(|throttled| throttled == reason);
            let labels = ReasonLabels { gpu: index, uuid: uuid.clone(), reason: reason.to_owned() };
            self.throttled.get_or_create(&labels).set(i64::from(is_throttled));
        }
        for event in &gpu.xids {
            let labels = XidLabels { gpu: index, uuid: uuid.clone(), xid: event.xid };
            let before = shown.xids.insert((index, event.xid), event.count).unwrap_or(0);
            self.xids.get_or_create(&labels).inc_by(event.count.saturating_sub(before));
        }
    }
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use pilotlight_proto::fleet::v1::{ReplicaGpuMemory, XidEvent};
    use prometheus_client::encoding::text::encode;

    use super::*;

    fn text(registry: &Registry) -> String {
        let mut text = String::new();
        encode(&mut text, registry).unwrap();
        text
    }

    #[test]
    fn a_report_is_shown_and_what_is_gone_is_not() {
        let mut registry = Registry::default();
        let metrics = GpuMetrics::register(&mut registry);
        let xid = |count| XidEvent { xid: 79, count, last_at: None };
        let gpu = GpuHealth {
            index: 1,
            uuid: "GPU-1".into(),
            temperature_celsius: Some(64),
            utilization_percent: Some(50),
            memory_used_bytes: 5 << 30,
            throttle_reasons: vec!["HwSlowdown".into()],
            xids: vec![xid(2)],
            ..Default::default()
        };
        let replica = ReplicaGpuMemory { replica: "a".into(), bytes: 7 };
        metrics.set(&GpuReport { gpus: vec![gpu.clone()], replicas: vec![replica], error: String::new() });
        let shown = text(&registry);
        for line in [
            r#"gpu_temperature_celsius{gpu="1",uuid="GPU-1"} 64"#,
            r#"gpu_utilization_ratio{gpu="1",uuid="GPU-1"} 0.5"#,
            r#"gpu_memory_used_bytes{gpu="1",uuid="GPU-1"} 5368709120"#,
            r#"gpu_throttled{gpu="1",uuid="GPU-1",reason="HwSlowdown"} 1"#,
            r#"gpu_throttled{gpu="1",uuid="GPU-1",reason="SwPowerCap"} 0"#,
            r#"gpu_xid_errors_total{gpu="1",uuid="GPU-1",xid="79"} 2"#,
            r#"replica_gpu_memory_bytes{replica="a"} 7"#,
        ] {
            assert!(shown.lines().any(|shown| shown == line), "{line}\n{shown}");
        }
        assert!(!shown.contains("gpu_ecc_uncorrectable_errors{"), "it has no ECC");
        let gpu = GpuHealth { temperature_celsius: None, throttle_reasons: vec![], xids: vec![xid(3)], ..gpu };
        metrics.set(&GpuReport { gpus: vec![gpu], ..Default::default() });
        let shown = text(&registry);
        assert!(!shown.contains("gpu_temperature_celsius{") && !shown.contains("replica_gpu_memory_bytes{"), "{shown}");
        assert!(shown.contains(r#"reason="HwSlowdown"} 0"#) && shown.contains(r#"xid="79"} 3"#), "{shown}");
    }
}
