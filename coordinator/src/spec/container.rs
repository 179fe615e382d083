//! One container of a pod.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1 as k8s;
use serde_json::Value;

use super::{
    documents::join,
    env,
    expand::{Budget, EXPANDED_MAX},
    model::{Container, Probe, Security, Storage},
    probe::{self, Purpose},
    report::Report,
    security, storage, volumes,
};

/// The main container's name; a single container of any name is renamed to it.
pub(super) const MAIN: &str = "kserve-container";
/// Name of a container that pre- and post-processes in the same pod.
pub(super) const TRANSFORMER: &str = "transformer-container";

/// Container fields that have no effect here, and what happens instead.
const UNSUPPORTED: [(&str, &str); 10] = [
    ("lifecycle", "no hook is called"),
    ("resizePolicy", "a change of resources makes a new revision"),
    ("restartPolicy", "a replica that ends is always started again"),
    ("restartPolicyRules", "a replica that ends is always started again"),
    ("stdin", "standard input is closed"),
    ("stdinOnce", "standard input is closed"),
    ("terminationMessagePath", "the log is kept instead"),
    ("terminationMessagePolicy", "the log is kept instead"),
    ("tty", "there is no terminal"),
    ("volumeDevices", "nothing is mounted"),
];

/// What a container is read as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    /// The main container, as the manifest gives it in full.
    Main,
    /// Another container, as the manifest gives it in full.
    Beside,
    /// Fields that will be laid over a runtime's container, or that container itself.
    Fragment,
    /// The main container made of both.
    Merged,
}

/// Where a container stands and what its pod offers.
#[derive(Clone, Copy)]
pub(super) struct Place<'a> {
    pub(super) part: Part,
    /// Such as `spec.predictor.containers[0]`.
    pub(super) at: &'a str,
    pub(super) volumes: &'a [k8s::Volume],
    /// Whether a model's mount is read-only.
    pub(super) read_only: bool,
    /// The pod's, below the container's own.
    pub(super) security: Option<&'a k8s::PodSecurityContext>,
}

/// What stands for a container that could not be found.
pub(super) fn absent() -> Container {
    Container {
        image: String::new(),
        command: Vec::new(),
        args: Vec::new(),
        env: Vec::new(),
        working_dir: String::new(),
        port: None,
        h2c: false,
        readiness: probe::default(),
        liveness: None,
        startup: None,
        volume_mounts: Vec::new(),
        security: Security::default(),
        image_pull_policy: None,
    }
}

/// Reads a container, and the model that its `STORAGE_URI` asks for. `raw` is the container as given.
pub(super) fn read(
    given: &k8s::Container,
    raw: &Value,
    place: Place<'_>,
    report: &mut Report,
) -> (Container, Option<Storage>) {
    let at = place.at;
    check_fields(raw, at, report);
    let image = given.image.clone().unwrap_or_default();
    let command = given.command.clone().unwrap_or_default();
    if place.part != Part::Fragment && image.trim().is_empty() && command.is_empty() {
        report.error(join(at, "image"), &image, "must be given, unless command says what to run without a container");
    }
    let mut env = env::read(given, at, report);
    let storage = take_storage_uri(given, &mut env, place, report);
    let variables: BTreeMap<String, String> = env
        .iter()
        .filter(|variable| variable.from.is_none())
        .map(|variable| (variable.name.clone(), variable.value.clone()))
        .collect();
    let mut budget = Budget::default();
    let mut expand_all = |texts: &[String], key: &str, report: &mut Report| -> Vec<String> {
        let expanded: Option<Vec<_>> = texts.iter().map(|text| budget.expand(text, &variables)).collect();
        expanded.unwrap_or_else(|| {
            let message = format!("command and args expand to more than {EXPANDED_MAX} bytes together");
            report.error(join(at, key), "", message);
            Vec::new()
        })
    };
    let (port, h2c) = read_port(given.ports.as_deref().unwrap_or_default(), place.part, &join(at, "ports"), report);
    let port_name = given.ports.iter().flatten().next().and_then(|port| port.name.as_deref());
    let mut read_probe = |given: &Option<k8s::Probe>, purpose: Purpose, key: &str| -> Option<Probe> {
        given.as_ref().map(|given| probe::read(given, port, port_name, purpose, &join(at, key), report))
    };
    let readiness = read_probe(&given.readiness_probe, Purpose::Readiness, "readinessProbe");
    let readiness = readiness.unwrap_or_else(probe::default);
    let liveness = read_probe(&given.liveness_probe, Purpose::Restart, "livenessProbe");
    let startup = read_probe(&given.startup_probe, Purpose::Restart, "startupProbe");
    let container = Container {
        image,
        command: expand_all(&command, "command", report),
        args: expand_all(given.args.as_deref().unwrap_or_default(), "args", report),
        env,
        working_dir: given.working_dir.clone().unwrap_or_default(),
        port,
        h2c,
        readiness,
        liveness,
        startup,
        volume_mounts: read_mounts(given, place, report),
        security: security::read(given.security_context.as_ref(), place.security, &join(at, "securityContext"), report),
        image_pull_policy: security::pull_policy(
            given.image_pull_policy.as_deref(),
            &join(at, "imagePullPolicy"),
            report,
        ),
    };
    (container, storage)
}

fn read_mounts(given: &k8s::Container, place: Place<'_>, report: &mut Report) -> Vec<k8s::VolumeMount> {
    let at = join(place.at, "volumeMounts");
    // A fragment may mount the runtime's volumes, which are known only when both are merged.
    if place.part == Part::Fragment {
        return given.volume_mounts.clone().unwrap_or_default();
    }
    volumes::read_mounts(given, place.volumes, &at, report)
}

/// The variable by which a custom container asks for a model; the container sees where it lies.
fn take_storage_uri(
    given: &k8s::Container,
    env: &mut [super::model::EnvVar],
    place: Place<'_>,
    report: &mut Report,
) -> Option<Storage> {
    let named = |name: &str| name == "STORAGE_URI";
    let index = given.env.iter().flatten().position(|variable| named(&variable.name))?;
    let at = format!("{}.env[{index}]", place.at);
    match place.part {
        Part::Main => {
            let variable = env.iter_mut().find(|variable| named(&variable.name) && variable.from.is_none())?;
            if variable.value.starts_with("file://") {
                let message = "nothing is mounted for file://: the container gets this value as it is, and has to find \
                               the files by itself";
                report.warning(&at, &variable.value, message);
            }
            let storage = storage::by_uri(&variable.value, &at, place.read_only, report)?;
            storage::MOUNT_PATH.clone_into(&mut variable.value);
            Some(storage)
        }
        Part::Beside if given.name == TRANSFORMER => {
            report.error(&at, "", format!("must not be set in {TRANSFORMER}; set it in the predictor's container"));
            None
        }
        Part::Beside | Part::Fragment => {
            report.warning(
                &at,
                "",
                format!("has no effect here: it is read in {MAIN} only, and a model has storageUri"),
            );
            None
        }
        Part::Merged => None,
    }
}

fn check_fields(raw: &Value, at: &str, report: &mut Report) {
    for (key, _) in raw.as_object().into_iter().flatten().filter(|(_, value)| !value.is_null()) {
        if let Some((_, consequence)) = UNSUPPORTED.iter().find(|(name, _)| name == key) {
            report.unsupported(join(at, key), consequence);
        }
    }
}

/// The serving port, and whether it speaks HTTP/2 with prior knowledge. Knative's rules: one at most,
/// its name says the protocol.
fn read_port(ports: &[k8s::ContainerPort], part: Part, at: &str, report: &mut Report) -> (Option<u16>, bool) {
    let Some(port) = ports.first() else { return (None, false) };
    // A runtime may list more; a container with several is not what Knative would take.
    if ports.len() > 1 && part == Part::Main {
        report.error(at, format!("{} ports", ports.len()), "must be at most one, the serving port");
    }
    let at = format!("{at}[0]");
    let number = u16::try_from(port.container_port).ok().filter(|number| *number > 0);
    if number.is_none() {
        report.error(join(&at, "containerPort"), port.container_port, "must be 1 to 65535");
    }
    let name = port.name.as_deref().unwrap_or_default();
    if !["", "h2c", "http1"].contains(&name) {
        report.error(join(&at, "name"), name, "must be h2c (HTTP/2 and gRPC) or http1, or be left out");
    }
    let protocol = port.protocol.as_deref().unwrap_or_default();
    if !["", "TCP"].contains(&protocol) {
        report.error(join(&at, "protocol"), protocol, "must be TCP");
    }
    for (key, given) in [("hostPort", port.host_port.is_some()), ("hostIP", port.host_ip.is_some())] {
        if given {
            report.unsupported(join(&at, key), "clients reach the server through the gateway only");
        }
    }
    (number, name == "h2c")
}
