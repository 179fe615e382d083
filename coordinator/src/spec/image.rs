//! Which image of a runtime a service gets.

/// Servers whose GPU build has the same name and `-gpu` after the tag.
const GPU_TAG: [&str; 3] = ["tensorflow-serving", "torchserve", "huggingfaceserver"];
/// The server whose CPU build has `-cpu` after the name.
const VLLM: &str = "vllmserver";

/// KServe's rules: `runtimeVersion` replaces the tag unless the image is pinned by digest; without it
/// the build follows from whether GPUs are asked for.
pub(super) fn choose(image: &str, runtime_version: Option<&str>, server_type: &str, gpu: bool) -> String {
    if image.contains("@sha256:") {
        return image.to_owned();
    }
    let (name, tag) = split(image);
    match (runtime_version, tag) {
        (Some(version), _) => format!("{name}:{version}"),
        (None, Some(tag)) if gpu && GPU_TAG.contains(&server_type) && !tag.ends_with("-gpu") => {
            format!("{name}:{tag}-gpu")
        }
        (None, Some(tag)) if !gpu && server_type == VLLM && !name.ends_with("-cpu") => format!("{name}-cpu:{tag}"),
        _ => image.to_owned(),
    }
}

/// Name and tag; a colon before the last `/` is a registry's port.
fn split(image: &str) -> (&str, Option<&str>) {
    match image.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
        _ => (image, None),
    }
}

#[cfg(test)]
mod tests {
    use super::choose;

    #[test]
    fn tags_follow_version_and_gpus() {
        for (image, version, server, gpu, expected) in [
            ("a/b:1", Some("2"), "triton", false, "a/b:2"),
            ("a/b", Some("2"), "triton", false, "a/b:2"),
            ("host:5000/a/b", Some("2"), "triton", false, "host:5000/a/b:2"),
            ("a/b@sha256:00", Some("2"), "triton", false, "a/b@sha256:00"),
            ("a/b:1", None, "tensorflow-serving", true, "a/b:1-gpu"),
            ("a/b:1-gpu", None, "torchserve", true, "a/b:1-gpu"),
            ("a/b:1", None, "huggingfaceserver", false, "a/b:1"),
            ("a/b:1", None, "tritonserver", true, "a/b:1"),
            ("a/b:1", None, "vllmserver", false, "a/b-cpu:1"),
            ("a/b:1", None, "vllmserver", true, "a/b:1"),
            ("a/b:1", Some("2"), "tensorflow-serving", true, "a/b:2"),
        ] {
            assert_eq!(choose(image, version, server, gpu), expected, "{image} {version:?} {server} {gpu}");
        }
    }
}
