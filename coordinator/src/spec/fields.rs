//! Which fields of a component are read, which have no effect, and which are refused.

use super::field_names;

/// KServe's fields of a component that this version reads.
pub(super) const EXTENSION: [&str; 14] = [
    "minReplicas",
    "maxReplicas",
    "scaleTarget",
    "scaleMetric",
    "containerConcurrency",
    "timeout",
    "canaryTrafficPercent",
    "labels",
    "annotations",
    "storageUris",
    "logger",
    "batcher",
    "deploymentStrategy",
    "scaleMetricType",
];

/// KServe's fields of a component that have no effect here, and what happens instead.
pub(super) const EXTENSION_UNSUPPORTED: [(&str, &str); 3] = [
    ("autoScaling", "use scaleMetric, scaleTarget and autoscaling.knative.dev annotations"),
    ("storageContainerName", "nothing is downloaded"),
    ("name", "there is one predictor"),
];

/// KServe's fields of a component without which the model could not work.
pub(super) const EXTENSION_REFUSED: [(&str, &str); 1] =
    [("workerSpec", "a replica on several nodes is not supported by this version")];

/// Pod fields that have no effect here, and what happens instead.
pub(super) const POD_UNSUPPORTED: [(&str, &str); 33] = [
    ("activeDeadlineSeconds", "a replica may live for any time"),
    ("automountServiceAccountToken", "there are no service accounts"),
    ("dnsConfig", "the node's resolver is used"),
    ("dnsPolicy", "the node's resolver is used"),
    ("enableServiceLinks", "no variables are set for other services"),
    ("ephemeralContainers", "only the main container is run"),
    ("hostAliases", "the node's hosts file is used"),
    ("hostIPC", "the runtime decides"),
    ("hostNetwork", "the runtime decides"),
    ("hostPID", "the runtime decides"),
    ("hostUsers", "the runtime decides"),
    ("hostname", "the runtime decides"),
    ("hostnameOverride", "the runtime decides"),
    ("nodeName", "use nodeSelector or nodeAffinity by metadata.name"),
    ("os", "every node runs Linux"),
    ("overhead", "only the container's own requests count"),
    ("preemptionPolicy", "idle replicas of lower priority may be evicted"),
    ("priority", "use annotation pilotlight.dev/priority, an integer"),
    ("priorityClassName", "there are no priority classes; use annotation pilotlight.dev/priority, an integer"),
    ("readinessGates", "the readiness probe decides alone"),
    ("resourceClaims", "use nvidia.com/gpu"),
    ("resources", "use the container's resources"),
    ("restartPolicy", "a replica that ends is always started again"),
    ("runtimeClassName", "the node's runtime is used"),
    ("schedulerName", "there is one scheduler"),
    ("schedulingGates", "a replica is placed at once"),
    ("serviceAccount", "there are no service accounts"),
    ("serviceAccountName", "there are no service accounts"),
    ("setHostnameAsFQDN", "the runtime decides"),
    ("shareProcessNamespace", "only the main container is run"),
    ("subdomain", "replicas have no names of their own"),
    ("tolerations", "the only taints are cordon's and drain's, which nothing tolerates"),
    ("topologySpreadConstraints", "use annotation pilotlight.dev/placement-policy: spread"),
];

/// Pod fields without which the model could not work.
pub(super) const POD_REFUSED: [(&str, &str); 1] =
    [("initContainers", "init containers are not supported by this version, and what they prepare would be missing")];

/// Other fields of a service's `spec` and of its components that a misspelt one may stand for.
const COMMON: [&str; 5] = ["predictor", "transformer", "explainer", "model", "containers"];

/// The field of a service or a component that `name` is probably a misspelling of.
pub(super) fn suggest(name: &str) -> Option<&'static str> {
    field_names::closest(EXTENSION.into_iter().chain(COMMON), name)
}
