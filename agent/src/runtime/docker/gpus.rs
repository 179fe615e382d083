//! Whether a container can still use its GPUs.
//!
//! A container loses its GPUs while it runs if its device control group is written again without them. That is known of
//! engines with systemd's cgroup driver: after `systemctl daemon-reload`, the driver's tools in the container print
//! "Failed to initialize NVML: Unknown Error". Processes that have the devices open continue until they open them again.

use std::collections::BTreeMap;

use bollard::Docker;

use super::{super::GpuAccess, Running, exec::exec};

/// What the driver's tool prints if the devices cannot be opened.
const DENIED: [&str; 2] =
    ["Failed to initialize NVML: Unknown Error", "Failed to initialize NVML: Insufficient Permissions"];

/// Asks the driver's tool in the container or, if the image has none, opens the driver's control device. `gpus` are the
/// node's; it has none, or they are simulated, if this is empty.
pub(super) async fn access(docker: &Docker, gpus: &BTreeMap<u32, String>, running: &Running) -> GpuAccess {
    let assignment = &running.assignment;
    if gpus.is_empty() || (assignment.gpu_indices.is_empty() && assignment.mig_devices.is_empty()) {
        return GpuAccess::Unknown;
    }
    let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
    match of_tool(exec(docker, running, &words(&["nvidia-smi", "-L"])).await) {
        GpuAccess::Unknown => of_device(exec(docker, running, &words(&["sh", "-c", ": < /dev/nvidiactl"])).await),
        known => known,
    }
}

/// What the answer of `nvidia-smi -L` says.
fn of_tool(answer: Result<(), String>) -> GpuAccess {
    match answer {
        Ok(()) => GpuAccess::Usable,
        Err(why) if DENIED.iter().any(|denied| why.contains(denied)) => GpuAccess::Denied(why),
        // It is not in the image, or its library is not, or something else is wrong.
        Err(_) => GpuAccess::Unknown,
    }
}

/// What the answer of a shell says that opens a device.
fn of_device(answer: Result<(), String>) -> GpuAccess {
    match answer {
        Ok(()) => GpuAccess::Usable,
        // A control group answers so (EPERM); a file's own permissions answer "Permission denied".
        Err(why) if why.contains("/dev/nvidiactl") && why.contains("Operation not permitted") => GpuAccess::Denied(why),
        Err(_) => GpuAccess::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_device_that_may_not_be_opened_any_more_is_denied() {
        let tool = |why: &str| of_tool(Err(why.to_owned()));
        assert_eq!(of_tool(Ok(())), GpuAccess::Usable);
        let denied = "nvidia-smi: exit code 255: Failed to initialize NVML: Unknown Error";
        assert_eq!(tool(denied), GpuAccess::Denied(denied.to_owned()));
        for other in [
            "nvidia-smi: exit code 127: OCI runtime exec failed: exec: \"nvidia-smi\": executable file not found in $PATH",
            "nvidia-smi: exit code 12: NVIDIA-SMI couldn't find libnvidia-ml.so library in your system",
            "nvidia-smi: exit code 15: Unable to determine the device handle for GPU0: GPU is lost",
            "nvidia-smi: container is not running",
        ] {
            assert_eq!(tool(other), GpuAccess::Unknown, "{other}");
        }
        let device = |why: &str| of_device(Err(why.to_owned()));
        assert_eq!(of_device(Ok(())), GpuAccess::Usable);
        let denied = "sh: exit code 1: sh: 1: cannot open /dev/nvidiactl: Operation not permitted";
        assert_eq!(device(denied), GpuAccess::Denied(denied.to_owned()));
        for other in [
            "sh: exit code 2: sh: 1: cannot open /dev/nvidiactl: No such file",
            "sh: exit code 1: sh: /dev/nvidiactl: Permission denied",
            "sh: exit code 127: executable file not found",
        ] {
            assert_eq!(device(other), GpuAccess::Unknown, "{other}");
        }
    }
}
