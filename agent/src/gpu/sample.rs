//! Reads one GPU.

use std::collections::BTreeMap;

use nvml_wrapper::{
    Device, Nvml,
    bitmasks::device::ThrottleReasons,
    enum_wrappers::device::{EccCounter, MemoryError, TemperatureSensor},
    enums::device::{SampleValue, UsedGpuMemory},
    error::NvmlError,
    struct_wrappers::device::ProcessInfo,
    structs::device::FieldId,
    sys_exports::field_id::{NVML_FI_DEV_REMAPPED_FAILURE, NVML_FI_DEV_REMAPPED_PENDING},
};
use pilotlight_proto::fleet::v1::Gpu;

use crate::inventory::MAX_NVLINKS;

/// What the driver says of one GPU at one moment. What the GPU does not support is `None`, 0 or `false`.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Reading {
    /// As in the inventory.
    pub(super) index: u32,
    /// As in the inventory.
    pub(super) uuid: String,
    /// The driver does not find it, or says that it is lost or must be reset.
    pub(super) lost: bool,
    /// Uncorrectable errors since the driver was loaded or the GPU was reset.
    pub(super) ecc_uncorrectable_errors: Option<u64>,
    pub(super) row_remap_pending: bool,
    pub(super) row_remap_failed: bool,
    pub(super) nvlinks_active: u32,
    /// Sorted.
    pub(super) throttle_reasons: Vec<String>,
    pub(super) temperature_celsius: Option<u32>,
    pub(super) utilization_percent: Option<u32>,
    pub(super) usage: Usage,
    /// Of its MIG devices, by UUID.
    pub(super) mig: BTreeMap<String, Usage>,
    /// What could not be read, and why.
    pub(super) unreadable: Vec<String>,
}

/// Who uses the memory of a GPU or of a MIG device.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Usage {
    /// Bytes in use, without the driver's own reserve.
    pub(super) used_bytes: u64,
    /// Bytes by process id, `None` if they are unknown; `None` if processes cannot be listed.
    pub(super) processes: Option<BTreeMap<u32, Option<u64>>>,
}

/// Throttle reasons that are reported, as NVIDIA's documentation names them. An idle GPU, and clocks that were set by
/// the operator, are no reasons for concern.
const REASONS: [(ThrottleReasons, &str); 5] = [
    (ThrottleReasons::SW_POWER_CAP, "SwPowerCap"),
    (ThrottleReasons::HW_SLOWDOWN, "HwSlowdown"),
    (ThrottleReasons::SW_THERMAL_SLOWDOWN, "SwThermalSlowdown"),
    (ThrottleReasons::HW_THERMAL_SLOWDOWN, "HwThermalSlowdown"),
    (ThrottleReasons::HW_POWER_BRAKE_SLOWDOWN, "HwPowerBrakeSlowdown"),
];

/// All throttle reasons that a report may name.
pub(super) fn reason_names() -> impl Iterator<Item = &'static str> {
    REASONS.into_iter().map(|(_, name)| name)
}

/// Reads all there is to know of a GPU of the inventory.
pub(super) fn read(nvml: &Nvml, gpu: &Gpu) -> Reading {
    let mut reader = Reader(Reading { index: gpu.index, uuid: gpu.uuid.clone(), ..Reading::default() });
    match nvml.device_by_index(gpu.index) {
        Ok(device) => reader.read(&device),
        Err(NvmlError::InvalidArg | NvmlError::NotFound) => reader.0.lost = true,
        Err(error) => reader.failed("GPU", &error),
    }
    let mut reading = reader.0;
    reading.throttle_reasons.sort_unstable();
    reading
}

struct Reader(Reading);

impl Reader {
    fn failed(&mut self, what: &str, error: &NvmlError) {
        match error {
            NvmlError::NotSupported | NvmlError::FunctionNotFound | NvmlError::FailedToLoadSymbol(_) => {}
            NvmlError::GpuLost | NvmlError::ResetRequired => self.0.lost = true,
            error => self.0.unreadable.push(format!("{what}: {error}")),
        }
    }

    fn ask<T>(&mut self, what: &str, answer: Result<T, NvmlError>) -> Option<T> {
        answer.map_err(|error| self.failed(what, &error)).ok()
    }

    fn read(&mut self, device: &Device<'_>) {
        let temperature = device.temperature(TemperatureSensor::Gpu);
        self.0.temperature_celsius = self.ask("temperature", temperature);
        let utilization = device.utilization_rates();
        self.0.utilization_percent = self.ask("utilization", utilization).map(|rates| rates.gpu);
        if let Some(reasons) = self.ask("throttle reasons", device.current_throttle_reasons()) {
            let named = REASONS.into_iter().filter(|(reason, _)| reasons.contains(*reason));
            self.0.throttle_reasons = named.map(|(_, name)| name.to_owned()).collect();
        }
        let errors = device.total_ecc_errors(MemoryError::Uncorrected, EccCounter::Volatile);
        self.0.ecc_uncorrectable_errors = self.ask("ECC errors", errors);
        self.read_row_remapping(device);
        self.0.nvlinks_active = self.count_nvlinks(device);
        self.0.usage = self.read_usage(device, "");
        self.read_mig(device);
    }

    fn read_row_remapping(&mut self, device: &Device<'_>) {
        let fields = [FieldId(NVML_FI_DEV_REMAPPED_PENDING), FieldId(NVML_FI_DEV_REMAPPED_FAILURE)];
        let Some(values) = self.ask("row remapping", device.field_values_for(&fields)) else { return };
        let mut is_set = values.into_iter().map(|value| {
            let value = value.and_then(|sample| sample.value);
            self.ask("row remapping", value).is_some_and(|value| match value {
                SampleValue::U32(value) => value != 0,
                SampleValue::U64(value) => value != 0,
                SampleValue::I64(value) => value != 0,
                SampleValue::F64(value) => value != 0.0,
            })
        });
        let (pending, failed) = (is_set.next().unwrap_or_default(), is_set.next().unwrap_or_default());
        (self.0.row_remap_pending, self.0.row_remap_failed) = (pending, failed);
    }

    /// NVLinks that are active now. A GPU has fewer links than are asked for; those that it lacks answer with an error.
    fn count_nvlinks(&mut self, device: &Device<'_>) -> u32 {
        let mut active = 0;
        for link in 0..MAX_NVLINKS {
            match device.link_wrapper_for(link).is_active() {
                Ok(is_active) => active += u32::from(is_active),
                Err(NvmlError::InvalidArg) => break,
                Err(error) => {
                    self.failed("NVLinks", &error);
                    break;
                }
            }
        }
        active
    }

    fn read_usage(&mut self, device: &Device<'_>, of: &str) -> Usage {
        let memory = device.memory_info();
        let used_bytes = self.ask(&format!("{of}memory"), memory).map_or(0, |memory| memory.used);
        let lists = [device.running_compute_processes(), device.running_graphics_processes()];
        let mut processes: Option<BTreeMap<u32, Option<u64>>> = None;
        for list in lists {
            let Some(list) = self.ask(&format!("{of}processes"), list) else { continue };
            let known = processes.get_or_insert_default();
            for ProcessInfo { pid, used_gpu_memory, .. } in list {
                let bytes = match used_gpu_memory {
                    UsedGpuMemory::Used(bytes) => Some(bytes),
                    UsedGpuMemory::Unavailable => None,
                };
                // One that computes and draws is in both lists with the same memory.
                let entry = known.entry(pid).or_default();
                *entry = bytes.max(*entry);
            }
        }
        Usage { used_bytes, processes }
    }

    fn read_mig(&mut self, device: &Device<'_>) {
        if !device.mig_mode().is_ok_and(|mode| mode.current != 0) {
            return;
        }
        let slots = 0..device.mig_device_count().unwrap_or(0);
        for part in slots.filter_map(|slot| device.mig_device_by_index(slot).ok()) {
            let Ok(uuid) = part.uuid() else { continue };
            let usage = self.read_usage(&part, &format!("{uuid}: "));
            self.0.mig.insert(uuid, usage);
        }
    }
}
