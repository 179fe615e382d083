//! A container's environment: what the agent says, what Knative and CUDA give, and the manifest's.

use std::collections::BTreeMap;

use pilotlight_proto::fleet::v1::{ContainerSpec, ReplicaAssignment};

use super::expand::expand;

/// All variables. `decided` is the agent's, and not the manifest's to change.
pub(super) fn variables(
    assignment: &ReplicaAssignment,
    container: &ContainerSpec,
    decided: &[(&str, String)],
) -> BTreeMap<String, String> {
    let revision = assignment.revision.split_once('/').map_or(assignment.revision.as_str(), |(_, name)| name);
    let given = [
        ("K_SERVICE", assignment.service.clone()),
        ("K_CONFIGURATION", assignment.service.clone()),
        ("K_REVISION", revision.to_owned()),
        ("CUDA_DEVICE_ORDER", "PCI_BUS_ID".to_owned()),
    ];
    let own = given.iter().chain(decided);
    let mut variables: BTreeMap<String, String> =
        own.map(|(name, value)| ((*name).to_owned(), value.clone())).collect();
    for var in &container.env {
        let value = expand(&var.value, &variables);
        if decided.iter().all(|(name, _)| *name != var.name) {
            variables.insert(var.name.clone(), value);
        }
    }
    variables
}

/// GPUs as CUDA takes them on the host: the index of a GPU or the UUID of a MIG device. Without GPUs of
/// its own a replica must see none; CUDA takes -1 for that.
pub(super) fn visible_devices(assignment: &ReplicaAssignment) -> String {
    let gpus: Vec<_> = match assignment.mig_devices.as_slice() {
        [] => assignment.gpu_indices.iter().map(ToString::to_string).collect(),
        devices => devices.to_vec(),
    };
    if gpus.is_empty() { "-1".to_owned() } else { gpus.join(",") }
}
