//! `securityContext` of pods and containers, and when images are pulled.

use k8s_openapi::api::core::v1 as k8s;
use serde::{Deserialize, Serialize};

use super::{documents::join, report::Report};

/// Capabilities that a container may ask for: Kubernetes' baseline, and what servers with GPUs lock
/// memory and bind to cores with.
const CAPABILITIES: [&str; 15] = [
    "AUDIT_WRITE",
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "IPC_LOCK",
    "KILL",
    "MKNOD",
    "NET_BIND_SERVICE",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYS_CHROOT",
    "SYS_NICE",
];
const POLICIES: [&str; 3] = ["Always", "IfNotPresent", "Never"];

/// What a container may do. Containers start without any capability and never gain privileges.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Security {
    /// `None`: the image's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub run_as_user: Option<u32>,
    /// `None`: the image's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub run_as_group: Option<u32>,
    /// True: an image that would run as root is refused.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub run_as_non_root: bool,
    /// True: only volumes can be written to.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub read_only_root_filesystem: bool,
    /// Without `CAP_`, sorted.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub add_capabilities: Vec<String>,
    /// The pod's `supplementalGroups` and `fsGroup`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub supplemental_groups: Vec<u32>,
}

impl Security {
    /// True where the manifest asks for nothing.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// A container's own context at `at`, over its pod's at `pod_at`.
pub(super) fn read(
    container: Option<&k8s::SecurityContext>,
    pod: Option<&k8s::PodSecurityContext>,
    at: &str,
    report: &mut Report,
) -> Security {
    let own = container.cloned().unwrap_or_default();
    let pod = pod.cloned().unwrap_or_default();
    for (key, given, why) in [
        ("privileged", own.privileged == Some(true), "must be false: privileged containers are not run"),
        ("procMount", own.proc_mount.as_deref().unwrap_or("Default") != "Default", "must be Default"),
    ] {
        if given {
            report.error(join(at, key), "", why);
        }
    }
    for (key, given, consequence) in [
        ("allowPrivilegeEscalation", own.allow_privilege_escalation == Some(true), "privileges are never gained"),
        ("seccompProfile", own.seccomp_profile.is_some(), "the engine's default profile applies"),
        ("seLinuxOptions", own.se_linux_options.is_some(), "the engine decides"),
        ("appArmorProfile", own.app_armor_profile.is_some(), "the engine's default profile applies"),
        ("windowsOptions", own.windows_options.is_some(), "every node runs Linux"),
    ] {
        if given {
            report.unsupported(join(at, key), consequence);
        }
    }
    let mut number = |key: &str, given: Option<i64>| {
        let given = given?;
        let number = u32::try_from(given).ok().filter(|number| i32::try_from(*number).is_ok());
        if number.is_none() {
            report.error(join(at, key), given, format!("must be 0 to {}", i32::MAX));
        }
        number
    };
    let run_as_user = number("runAsUser", own.run_as_user.or(pod.run_as_user));
    let run_as_group = number("runAsGroup", own.run_as_group.or(pod.run_as_group));
    let groups = pod.supplemental_groups.unwrap_or_default().into_iter().chain(pod.fs_group);
    let supplemental_groups = groups.filter_map(|group| number("supplementalGroups", Some(group))).collect();
    let asked = own.capabilities.and_then(|capabilities| capabilities.add).unwrap_or_default();
    let mut add_capabilities = Vec::new();
    for (index, given) in asked.iter().enumerate() {
        let name = given.strip_prefix("CAP_").unwrap_or(given);
        if !CAPABILITIES.contains(&name) {
            let at = format!("{at}.capabilities.add[{index}]");
            report.error(at, given, format!("is not allowed; allowed are: {}", CAPABILITIES.join(", ")));
        }
        add_capabilities.push(name.to_owned());
    }
    add_capabilities.sort();
    add_capabilities.dedup();
    Security {
        run_as_user,
        run_as_group,
        run_as_non_root: own.run_as_non_root.or(pod.run_as_non_root) == Some(true),
        read_only_root_filesystem: own.read_only_root_filesystem == Some(true),
        add_capabilities,
        supplemental_groups,
    }
}

/// `imagePullPolicy`, where given.
pub(super) fn pull_policy(given: Option<&str>, at: &str, report: &mut Report) -> Option<String> {
    let given = given.filter(|given| !given.is_empty())?;
    if !POLICIES.contains(&given) {
        report.error(at, given, format!("must be one of: {}", POLICIES.join(", ")));
    }
    Some(given.to_owned())
}

/// Kubernetes' default: what is called latest may change, what has a tag or digest does not.
pub fn default_pull_policy(image: &str) -> &'static str {
    let name = image.rsplit('/').next().unwrap_or_default();
    let latest = match name.split_once(':') {
        _ if image.contains('@') => false,
        Some((_, tag)) => tag == "latest",
        None => true,
    };
    if latest { "Always" } else { "IfNotPresent" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_called_latest_is_always_pulled() {
        for (image, policy) in [
            ("a", "Always"),
            ("localhost:5000/a", "Always"),
            ("a:latest", "Always"),
            ("a:1", "IfNotPresent"),
            ("localhost:5000/a:1", "IfNotPresent"),
            ("a@sha256:00", "IfNotPresent"),
        ] {
            assert_eq!(default_pull_policy(image), policy, "{image}");
        }
    }
}
