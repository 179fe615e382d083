//! Inventories read from a stand-in for the driver's library.

use pilotlight_tests::nvml::{NvmlStub, code};

use super::*;

fn config(stub: &NvmlStub) -> Config {
    Config { node_name: "gpu-1".into(), nvml_library: Some(stub.library()), ..Config::default() }
}

#[test]
fn an_h100_is_found_with_all_that_placement_and_labels_need() {
    let stub = NvmlStub::with_h100(2);
    stub.set("gpu.1.used", 4096);
    let inventory = discover(&config(&stub)).unwrap();
    assert!(!inventory.simulated);
    assert_eq!((inventory.driver_version.as_str(), inventory.cuda_version.as_str()), ("550.54.15", "12.4"));
    let expected = fleet::Gpu {
        index: 1,
        uuid: "GPU-1".into(),
        product: "NVIDIA H100 80GB HBM3".into(),
        memory_bytes: 81_559 << 20,
        memory_used_bytes: 4096,
        compute_capability: "9.0".into(),
        pci_bus_id: "00000000:19:00.0".into(),
        mig_capable: true,
        ..Default::default()
    };
    assert_eq!((inventory.gpus.len(), &inventory.gpus[1]), (2, &expected));
    assert_eq!(inventory.labels["gpu.nvidia.com/class"], "H100_NVLINK_80GB");
    assert_eq!(inventory.labels["nvidia.com/gpu.count"], "2");
}

#[test]
fn mig_devices_are_found_and_empty_slots_are_not() {
    let stub = NvmlStub::with_h100(1);
    for (key, value) in [
        ("mig", "1"),
        ("migs", "2"),
        ("mig.0.uuid", "MIG-a"),
        ("mig.0.name", "NVIDIA H100 80GB HBM3 MIG 1g.10gb+me"),
        ("mig.0.memory", "10468982784"),
        ("mig.1.uuid", "MIG-b"),
        ("mig.1.name", "NVIDIA H100 80GB HBM3 MIG 3g.40gb"),
        ("mig.1.memory", "42412802048"),
    ] {
        stub.set(&format!("gpu.0.{key}"), value);
    }
    let inventory = discover(&config(&stub)).unwrap();
    let gpu = &inventory.gpus[0];
    assert!(gpu.mig_enabled && gpu.mig_capable);
    let device = |uuid: &str, profile: &str, memory_bytes| fleet::MigDevice {
        uuid: uuid.into(),
        profile: profile.into(),
        memory_bytes,
    };
    assert_eq!(
        gpu.mig_devices,
        [device("MIG-a", "1g.10gb.me", 10_468_982_784), device("MIG-b", "3g.40gb", 42_412_802_048)]
    );
    assert_eq!(inventory.labels["nvidia.com/mig-3g.40gb.count"], "1");
    stub.set("gpu.0.mig.0.fail.nvmlDeviceGetUUID", code::UNKNOWN);
    let left: Vec<_> = discover(&config(&stub)).unwrap().gpus.swap_remove(0).mig_devices;
    assert_eq!(left.iter().map(|device| device.uuid.as_str()).collect::<Vec<_>>(), ["MIG-b"]);
    stub.set("gpu.0.mig", 0);
    let whole = discover(&config(&stub)).unwrap().gpus.swap_remove(0);
    assert!(!whole.mig_enabled && whole.mig_devices.is_empty());
}

#[test]
fn gpus_that_nvlink_joins_are_of_one_group() {
    let stub = NvmlStub::with_h100(5);
    let bus = |gpu: u32| format!("00000000:{:02X}:00.0", 0x18 + gpu);
    for (gpu, peer) in [(0, bus(1)), (1, bus(0)), (2, "00000000:F0:00.0".into()), (3, "00000000:F0:00.0".into())] {
        stub.set(&format!("gpu.{gpu}.link.0"), peer);
    }
    let groups = |stub| discover(&config(stub)).unwrap().gpus.iter().map(|gpu| gpu.nvlink_group).collect::<Vec<_>>();
    assert_eq!(groups(&stub), [1, 1, 2, 2, 0], "a pair, two behind a switch, and one alone");
    stub.set("gpu.2.link.0.down", 1);
    assert_eq!(groups(&stub), [1, 1, 0, 0, 0]);
}

#[test]
fn without_a_driver_there_are_no_gpus() {
    let missing = Config { nvml_library: Some("/nowhere/libnvidia-ml.so".into()), ..Config::default() };
    let stub = NvmlStub::with_h100(1);
    stub.set("fail.nvmlInit_v2", code::DRIVER_NOT_LOADED);
    for config in [missing, config(&stub)] {
        let inventory = discover(&config).unwrap();
        assert!(inventory.gpus.is_empty() && !inventory.simulated && inventory.driver_version.is_empty());
        assert!(!inventory.labels.contains_key("nvidia.com/gpu.present"));
        let dev = Config { inventory: InventorySource::NvmlOrSimulated, ..config };
        assert!(discover(&dev).unwrap().simulated);
    }
}

#[test]
fn a_gpu_that_cannot_be_read_is_left_out_and_hides_no_other() {
    let calls = [
        "nvmlDeviceGetHandleByIndex_v2",
        "nvmlDeviceGetUUID",
        "nvmlDeviceGetName",
        "nvmlDeviceGetMemoryInfo_v2",
        "nvmlDeviceGetCudaComputeCapability",
        "nvmlDeviceGetPciInfo_v3",
    ];
    for call in calls {
        let stub = NvmlStub::with_h100(2);
        stub.set(&format!("gpu.0.fail.{call}"), code::GPU_IS_LOST);
        let found: Vec<_> = discover(&config(&stub)).unwrap().gpus.into_iter().map(|gpu| gpu.index).collect();
        assert_eq!(found, [1], "{call}");
    }
    let stub = NvmlStub::with_h100(2);
    for call in ["nvmlSystemGetDriverVersion", "nvmlSystemGetCudaDriverVersion_v2"] {
        stub.set(&format!("fail.{call}"), code::UNKNOWN);
    }
    stub.set("gpu.0.fail.nvmlDeviceGetNvLinkRemotePciInfo_v2", code::UNKNOWN);
    stub.set("gpu.0.fail.nvmlDeviceGetMigMode", code::UNKNOWN);
    stub.set("gpu.0.link.0", "00000000:19:00.0");
    let inventory = discover(&config(&stub)).unwrap();
    assert_eq!((inventory.gpus.len(), inventory.driver_version.as_str()), (2, ""));
    assert_eq!((inventory.gpus[0].nvlink_group, inventory.gpus[0].mig_capable), (0, false));
    stub.set("fail.nvmlDeviceGetCount_v2", code::UNKNOWN);
    assert!(discover(&config(&stub)).unwrap().gpus.is_empty());
}
