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

/// Checks an image's name by the grammar of OCI distribution: lower-case parts between slashes, the first of which may
/// be a registry's host and port, then a tag or a digest.
///
/// # Errors
/// What is allowed.
pub fn check(image: &str) -> Result<(), String> {
    let (rest, digest) = image.split_once('@').map_or((image, None), |(rest, digest)| (rest, Some(digest)));
    let (name, tag) = split(rest);
    let (host, path) = match name.split_once('/') {
        Some((host, path)) if host.contains(['.', ':']) || host == "localhost" => (Some(host), path),
        _ => (None, name),
    };
    let alphanumeric = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let part = |part: &str| {
        part.starts_with(alphanumeric)
            && part.ends_with(alphanumeric)
            && part.chars().all(|c| alphanumeric(c) || "._-".contains(c))
    };
    let good_host = |host: &str| {
        let (host, port) = host.split_once(':').map_or((host, None), |(host, port)| (host, Some(port)));
        let label = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.';
        !host.is_empty() && host.chars().all(label) && port.is_none_or(|port| port.parse::<u16>().is_ok())
    };
    let good_tag = |tag: &str| {
        let sign = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        !tag.is_empty() && tag.len() <= 128 && !tag.starts_with(['.', '-']) && tag.chars().all(sign)
    };
    let good_digest = |digest: &str| {
        let hex = digest.strip_prefix("sha256:");
        hex.is_some_and(|hex| hex.len() == 64 && hex.chars().all(|c| c.is_ascii_hexdigit()))
    };
    let good = host.is_none_or(good_host)
        && path.split('/').all(part)
        && tag.is_none_or(good_tag)
        && digest.is_none_or(good_digest);
    let allowed = "expected the name of an image, such as registry.example.com/team/server:1.0, in lower case";
    if good { Ok(()) } else { Err(allowed.to_owned()) }
}

#[cfg(test)]
mod tests {
    use super::{check, choose};

    #[test]
    fn names_of_images_follow_the_grammar_of_registries() {
        let digest = format!("a/b@sha256:{}", "0".repeat(64));
        for good in ["a", "a/b:1", "host:5000/a/b", "ghcr.io/a/b-c_d:v1.0-rc", "localhost/a", &digest] {
            assert_eq!(check(good), Ok(()), "{good}");
        }
        for bad in ["", "A/b", "a//b", "a/b:", "a/b:-x", "a b", "a/b@sha256:00", "host:x/a", "-a"] {
            assert!(check(bad).is_err(), "{bad}");
        }
    }

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
