//! Node labels, as Kubernetes and NVIDIA's GPU feature discovery would set them, and CoreWeave's class.

use std::collections::BTreeMap;

use super::Gpus;

/// CoreWeave's class, which its manifests select by.
pub(super) const CLASS: &str = "gpu.nvidia.com/class";

/// The labels of a node.
pub(super) fn of(gpus: &Gpus, node: &str) -> BTreeMap<String, String> {
    let arch = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let mut labels = BTreeMap::new();
    let mut set = |key: &str, value: String| labels.insert(key.to_owned(), value);
    set("kubernetes.io/hostname", node.to_owned());
    set("kubernetes.io/arch", arch.to_owned());
    set("kubernetes.io/os", std::env::consts::OS.to_owned());
    let Some(first) = gpus.gpus.first() else { return labels };
    set("nvidia.com/gpu.present", "true".to_owned());
    set("nvidia.com/gpu.count", gpus.gpus.len().to_string());
    set("nvidia.com/gpu.product", first.product.replace(' ', "-"));
    set("nvidia.com/gpu.memory", (first.memory_bytes >> 20).to_string());
    set("nvidia.com/gpu.replicas", "1".to_owned());
    set(CLASS, class(&first.product, first.memory_bytes));
    if let Some((major, minor)) = first.compute_capability.split_once('.') {
        set("nvidia.com/gpu.compute.major", major.to_owned());
        set("nvidia.com/gpu.compute.minor", minor.to_owned());
        set("nvidia.com/gpu.family", family(major, minor).to_owned());
    }
    if !gpus.machine.is_empty() {
        set("nvidia.com/gpu.machine", gpus.machine.replace(' ', "-"));
    }
    labels.extend(versions(gpus));
    labels.extend(mig(gpus));
    labels
}

/// Versions of driver and CUDA, under the names of now and of before, since manifests have both.
fn versions(gpus: &Gpus) -> BTreeMap<String, String> {
    let mut labels = BTreeMap::new();
    let mut set = |names: [&str; 2], value: &str| {
        labels.extend(names.map(|name| (format!("nvidia.com/cuda.{name}"), value.to_owned())));
    };
    if let Some((major, minor)) = gpus.cuda_version.split_once('.') {
        set(["runtime-version.major", "runtime.major"], major);
        set(["runtime-version.minor", "runtime.minor"], minor);
        set(["runtime-version.full"; 2], &gpus.cuda_version);
    }
    let mut parts = gpus.driver_version.splitn(3, '.');
    if let (Some(major), Some(minor)) = (parts.next(), parts.next()) {
        set(["driver-version.major", "driver.major"], major);
        set(["driver-version.minor", "driver.minor"], minor);
        set(["driver-version.revision", "driver.rev"], parts.next().unwrap_or_default());
        set(["driver-version.full"; 2], &gpus.driver_version);
    }
    labels
}

/// MIG, always by the strategy that GPU feature discovery calls `mixed`: each profile is a resource.
fn mig(gpus: &Gpus) -> BTreeMap<String, String> {
    let capable = gpus.gpus.iter().any(|gpu| gpu.mig_capable || gpu.mig_enabled);
    let mut labels = BTreeMap::from([("nvidia.com/mig.capable".to_owned(), capable.to_string())]);
    if capable {
        labels.insert("nvidia.com/mig.strategy".to_owned(), "mixed".to_owned());
    }
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for (gpu, device) in gpus.gpus.iter().flat_map(|gpu| gpu.mig_devices.iter().map(move |device| (gpu, device))) {
        let profile = device.profile.as_str();
        let count = counts.entry(profile).or_default();
        *count += 1;
        let mut set = |name: &str, value: String| labels.insert(format!("nvidia.com/mig-{profile}.{name}"), value);
        set("count", count.to_string());
        set("product", format!("{}-MIG-{profile}", gpu.product.replace(' ', "-")));
        set("memory", (device.memory_bytes >> 20).to_string());
        set("replicas", "1".to_owned());
        if let Some((slices, _)) = profile.split_once('g') {
            set("slices.gi", slices.to_owned());
        }
    }
    labels
}

/// Architecture by compute capability.
fn family(major: &str, minor: &str) -> &'static str {
    match (major, minor) {
        ("3", _) => "kepler",
        ("5", _) => "maxwell",
        ("6", _) => "pascal",
        ("7", "0" | "1" | "2" | "3" | "4") => "volta",
        ("7", _) => "turing",
        ("8", "9") => "ada-lovelace",
        ("8", _) => "ampere",
        ("9", _) => "hopper",
        ("10" | "11" | "12", _) => "blackwell",
        _ => "undefined",
    }
}

/// CoreWeave's name of a product: the model, for data-centre GPUs with the link and memory, since those
/// come in several kinds. `NVIDIA A100-SXM4-80GB` is `A100_NVLINK_80GB`, `Quadro RTX 5000` stays
/// `Quadro_RTX_5000`, `NVIDIA RTX A5000` is `RTX_A5000`.
fn class(product: &str, memory_bytes: u64) -> String {
    let name = product.strip_prefix("NVIDIA ").or(product.strip_prefix("Tesla ")).unwrap_or(product);
    let several = ["A100", "H100", "H200", "V100", "B200"];
    let Some(model) = several.into_iter().find(|model| name.starts_with(model)) else {
        return name.replace([' ', '-'], "_");
    };
    let link = if name.contains("PCI") { "PCIE" } else { "NVLINK" };
    // The size is in most names; frame buffers are a little smaller than what they are sold as.
    let named = name.split(['-', ' ']).find_map(|word| word.strip_suffix("GB")?.parse::<u64>().ok());
    let gigabytes = named.unwrap_or_else(|| ((memory_bytes >> 20) as f64 / 1000.0 / 10.0).round() as u64 * 10);
    format!("{model}_{link}_{gigabytes}GB")
}

#[cfg(test)]
mod tests {
    use pilotlight_proto::fleet::v1::{Gpu, MigDevice};

    use super::*;

    #[test]
    fn classes_are_named_as_coreweave_names_them() {
        let cases = [
            ("NVIDIA A40", "A40"),
            ("NVIDIA RTX A5000", "RTX_A5000"),
            ("Quadro RTX 5000", "Quadro_RTX_5000"),
            ("NVIDIA A100-SXM4-80GB", "A100_NVLINK_80GB"),
            ("NVIDIA A100-PCIE-40GB", "A100_PCIE_40GB"),
            ("NVIDIA A100 80GB PCIe", "A100_PCIE_80GB"),
            ("NVIDIA H100 80GB HBM3", "H100_NVLINK_80GB"),
            ("NVIDIA H100 PCIe", "H100_PCIE_80GB"),
        ];
        for (product, expected) in cases {
            assert_eq!(class(product, 79 << 30), expected, "{product}");
        }
    }

    #[test]
    fn labels_follow_gpu_feature_discovery() {
        let gpu = Gpu {
            product: "NVIDIA H100 80GB HBM3".into(),
            memory_bytes: 81_559 << 20,
            compute_capability: "9.0".into(),
            ..Default::default()
        };
        let gpus = Gpus {
            gpus: vec![gpu.clone(), gpu],
            cuda_version: "12.4".into(),
            driver_version: "550.54.15".into(),
            machine: "DGX H100".into(),
            ..Default::default()
        };
        let labels = of(&gpus, "gpu-1");
        let expected = [
            ("kubernetes.io/hostname", "gpu-1"),
            ("nvidia.com/gpu.count", "2"),
            ("nvidia.com/gpu.product", "NVIDIA-H100-80GB-HBM3"),
            ("nvidia.com/gpu.memory", "81559"),
            ("nvidia.com/gpu.family", "hopper"),
            ("nvidia.com/gpu.compute.major", "9"),
            ("nvidia.com/gpu.compute.minor", "0"),
            ("nvidia.com/gpu.machine", "DGX-H100"),
            ("nvidia.com/cuda.runtime-version.major", "12"),
            ("nvidia.com/cuda.runtime-version.full", "12.4"),
            ("nvidia.com/cuda.runtime.minor", "4"),
            ("nvidia.com/cuda.driver-version.full", "550.54.15"),
            ("nvidia.com/cuda.driver-version.major", "550"),
            ("nvidia.com/cuda.driver-version.revision", "15"),
            ("nvidia.com/cuda.driver.minor", "54"),
            ("nvidia.com/mig.capable", "false"),
            (CLASS, "H100_NVLINK_80GB"),
        ];
        for (key, value) in expected {
            assert_eq!(labels[key], value, "{key}");
        }
        assert!(!of(&Gpus::default(), "cpu-1").contains_key(CLASS));
    }

    #[test]
    fn mig_devices_are_counted_by_profile() {
        let device =
            |profile: &str| MigDevice { profile: profile.into(), memory_bytes: 9728 << 20, ..Default::default() };
        let gpu = Gpu {
            product: "NVIDIA A100-SXM4-80GB".into(),
            mig_enabled: true,
            mig_devices: vec![device("1g.10gb"), device("1g.10gb"), device("3g.40gb")],
            ..Default::default()
        };
        let gpus = Gpus { gpus: vec![gpu.clone(), gpu], ..Default::default() };
        let labels = of(&gpus, "gpu-1");
        let expected = [
            ("nvidia.com/mig.capable", "true"),
            ("nvidia.com/mig.strategy", "mixed"),
            ("nvidia.com/mig-1g.10gb.count", "4"),
            ("nvidia.com/mig-1g.10gb.memory", "9728"),
            ("nvidia.com/mig-3g.40gb.count", "2"),
            ("nvidia.com/mig-3g.40gb.slices.gi", "3"),
            ("nvidia.com/mig-3g.40gb.product", "NVIDIA-A100-SXM4-80GB-MIG-3g.40gb"),
        ];
        for (key, value) in expected {
            assert_eq!(labels[key], value, "{key}");
        }
    }
}
