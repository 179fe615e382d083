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
    set(CLASS, class(&first.product, first.memory_bytes));
    if let Some((major, minor)) = first.compute_capability.split_once('.') {
        set("nvidia.com/gpu.compute.major", major.to_owned());
        set("nvidia.com/gpu.compute.minor", minor.to_owned());
        if let Some(family) = family(major, minor) {
            set("nvidia.com/gpu.family", family.to_owned());
            set("nvidia.com/mig.capable", matches!(family, "ampere" | "hopper" | "blackwell").to_string());
        }
    }
    if let Some((major, minor)) = gpus.cuda_version.split_once('.') {
        set("nvidia.com/cuda.runtime-version.major", major.to_owned());
        set("nvidia.com/cuda.runtime-version.minor", minor.to_owned());
    }
    if !gpus.driver_version.is_empty() {
        set("nvidia.com/cuda.driver-version.full", gpus.driver_version.clone());
    }
    labels
}

/// Architecture by compute capability.
fn family(major: &str, minor: &str) -> Option<&'static str> {
    Some(match (major, minor) {
        ("6", _) => "pascal",
        ("7", "5") => "turing",
        ("7", _) => "volta",
        ("8", "9") => "ada-lovelace",
        ("8", _) => "ampere",
        ("9", _) => "hopper",
        ("10" | "12", _) => "blackwell",
        _ => return None,
    })
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
    use pilotlight_proto::fleet::v1::Gpu;

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
        let gpus = Gpus { gpus: vec![gpu.clone(), gpu], cuda_version: "12.4".into(), ..Default::default() };
        let labels = of(&gpus, "gpu-1");
        let expected = [
            ("kubernetes.io/hostname", "gpu-1"),
            ("nvidia.com/gpu.count", "2"),
            ("nvidia.com/gpu.product", "NVIDIA-H100-80GB-HBM3"),
            ("nvidia.com/gpu.memory", "81559"),
            ("nvidia.com/gpu.family", "hopper"),
            ("nvidia.com/cuda.runtime-version.major", "12"),
        ];
        for (key, value) in expected {
            assert_eq!(labels[key], value, "{key}");
        }
        assert!(!of(&Gpus::default(), "cpu-1").contains_key(CLASS));
    }
}
