//! Waits for the errors that the driver reports by XID numbers.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::Sender,
    },
    time::{Duration, SystemTime},
};

use nvml_wrapper::{Nvml, bitmasks::event::EventTypes, enums::event::XidError, error::NvmlError};
use pilotlight_proto::fleet::v1::Gpu;
use tracing::{debug, error, warn};

/// Longest time that one wait takes, milliseconds. After it a thread sees that it is to end.
const WAIT_MS: u32 = 1000;
/// Pause after an error, such as that of a GPU that is lost.
const RETRY_INTERVAL: Duration = Duration::from_secs(5);

/// An error that the driver has reported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct XidOccurred {
    /// Index of the GPU.
    pub(super) index: u32,
    /// As in NVIDIA's catalog; 999 if the driver does not know it.
    pub(super) xid: u64,
    /// When it was delivered.
    pub(super) at: SystemTime,
}

/// Starts a thread per GPU. One set of events for several GPUs would have to ask a GPU that may be lost for its name.
pub(super) fn watch_all(nvml: &Arc<Nvml>, gpus: &[Gpu], events: &Sender<XidOccurred>, stopping: &Arc<AtomicBool>) {
    for index in gpus.iter().map(|gpu| gpu.index) {
        let (nvml, events, stopping) = (Arc::clone(nvml), events.clone(), Arc::clone(stopping));
        let watch = move || {
            while !stopping.load(Ordering::Relaxed) {
                if let Err(error) = watch_gpu(&nvml, index, &events, &stopping) {
                    if matches!(error, NvmlError::NotSupported) {
                        warn!(gpu = index, "the GPU does not report XIDs");
                        return;
                    }
                    debug!(gpu = index, %error, "cannot wait for XIDs; trying again");
                    std::thread::sleep(RETRY_INTERVAL);
                }
            }
        };
        if let Err(error) = std::thread::Builder::new().name(format!("gpu-xids-{index}")).spawn(watch) {
            error!(gpu = index, %error, "XIDs are not noticed: the thread cannot be started");
        }
    }
}

/// Sends the XIDs of one GPU until `stopping`.
fn watch_gpu(nvml: &Nvml, index: u32, events: &Sender<XidOccurred>, stopping: &AtomicBool) -> Result<(), NvmlError> {
    let device = nvml.device_by_index(index)?;
    if !device.supported_event_types()?.contains(EventTypes::CRITICAL_XID_ERROR) {
        return Err(NvmlError::NotSupported);
    }
    let set = nvml.create_event_set()?;
    let set = device.register_events(EventTypes::CRITICAL_XID_ERROR, set).map_err(|error| error.error)?;
    while !stopping.load(Ordering::Relaxed) {
        let xid = match set.wait(WAIT_MS) {
            Ok(event) => match event.event_data {
                Some(XidError::Value(xid)) => xid,
                Some(XidError::Unknown) => 999,
                None => continue,
            },
            Err(NvmlError::Timeout) => continue,
            Err(error) => return Err(error),
        };
        error!(gpu = index, xid, "the NVIDIA driver reports an XID");
        if events.send(XidOccurred { index, xid, at: SystemTime::now() }).is_err() {
            return Ok(());
        }
    }
    Ok(())
}
