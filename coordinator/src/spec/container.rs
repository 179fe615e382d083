//! The main container, and what is said about the others.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1 as k8s;
use serde_json::Value;

use super::{documents::join, env, expand::expand, model::Container, probe, report::Report};

/// The main container's name; a single container of any name is renamed to it.
pub(super) const MAIN: &str = "kserve-container";
/// Name of a container that pre- and post-processes in the same pod.
pub(super) const TRANSFORMER: &str = "transformer-container";

/// Container fields that have no effect here, and what happens instead.
pub(super) const UNSUPPORTED: [(&str, &str); 15] = [
    ("imagePullPolicy", "the runtime decides when to pull"),
    ("lifecycle", "no hook is called"),
    ("livenessProbe", "a replica is started again only when it ends"),
    ("resizePolicy", "a change of resources makes a new revision"),
    ("restartPolicy", "a replica that ends is always started again"),
    ("restartPolicyRules", "a replica that ends is always started again"),
    ("securityContext", "the node's runtime settings apply"),
    ("startupProbe", "readinessProbe is asked from the start"),
    ("stdin", "standard input is closed"),
    ("stdinOnce", "standard input is closed"),
    ("terminationMessagePath", "the log is kept instead"),
    ("terminationMessagePolicy", "the log is kept instead"),
    ("tty", "there is no terminal"),
    ("volumeDevices", "nothing is mounted"),
    ("volumeMounts", "nothing is mounted"),
];

/// The pod's main container.
pub(super) struct MainContainer<'a> {
    /// As given; `None` where there is none to be found.
    pub(super) given: Option<&'a k8s::Container>,
    /// Where it stands, such as `spec.predictor.containers[0]`.
    pub(super) at: String,
    /// What became of it.
    pub(super) container: Container,
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
    }
}

/// Finds and reads the main container. `optional`: another implementation is there, so that a pod without
/// a main container is no error by itself.
pub(super) fn read<'a>(
    pod: &'a k8s::PodSpec,
    raw_pod: &Value,
    at: &str,
    optional: bool,
    report: &mut Report,
) -> MainContainer<'a> {
    let at_list = join(at, "containers");
    for (list, containers) in [("containers", Some(&pod.containers)), ("initContainers", pod.init_containers.as_ref())]
    {
        for (index, container) in containers.into_iter().flatten().enumerate() {
            check_blocked_env(container, &format!("{}[{index}]", join(at, list)), report);
        }
    }
    check_names(&pod.containers, &at_list, report);
    let Some(index) = main_index(&pod.containers) else {
        if !optional && !pod.containers.is_empty() {
            report.error(&at_list, "", format!("of several containers one must be named {MAIN}"));
        }
        return MainContainer { given: None, at: at_list, container: absent() };
    };
    let given = &pod.containers[index];
    let at = format!("{at_list}[{index}]");
    check_fields(&raw_pod["containers"][index], &at, report);
    MainContainer { given: Some(given), container: read_main(given, &at, report), at }
}

fn main_index(containers: &[k8s::Container]) -> Option<usize> {
    match containers {
        [only] if only.name != TRANSFORMER => Some(0),
        several => several.iter().position(|container| container.name == MAIN),
    }
}

fn check_names(containers: &[k8s::Container], at: &str, report: &mut Report) {
    let mut seen = BTreeSet::new();
    for (index, container) in containers.iter().enumerate() {
        let at = format!("{at}[{index}]");
        if containers.len() > 1 && container.name.is_empty() {
            report.error(join(&at, "name"), "", "must be given where there are several containers");
        } else if !seen.insert(&container.name) {
            report.error(join(&at, "name"), &container.name, "must be unique among containers");
        }
        if container.name == TRANSFORMER {
            report.error(&at, TRANSFORMER, "a transformer is not supported by this version, requests would skip it");
        } else if containers.len() > 1 && container.name != MAIN {
            report.unsupported(&at, &format!("only {MAIN} is run"));
        }
    }
}

fn check_fields(raw: &Value, at: &str, report: &mut Report) {
    for (key, _) in raw.as_object().into_iter().flatten().filter(|(_, value)| !value.is_null()) {
        if let Some((_, consequence)) = UNSUPPORTED.iter().find(|(name, _)| name == key) {
            report.unsupported(join(at, key), consequence);
        }
    }
}

/// KServe blocks `PYTHONPATH`, by which one could put code before the server's own.
pub(super) fn check_blocked_env(container: &k8s::Container, at: &str, report: &mut Report) {
    for (index, variable) in container.env.iter().flatten().enumerate() {
        if variable.name == "PYTHONPATH" {
            report.error(format!("{at}.env[{index}].name"), &variable.name, "must not be set");
        }
    }
}

fn read_main(given: &k8s::Container, at: &str, report: &mut Report) -> Container {
    let image = given.image.clone().unwrap_or_default();
    let command = given.command.clone().unwrap_or_default();
    if image.trim().is_empty() && command.is_empty() {
        report.error(join(at, "image"), &image, "must be given, unless command says what to run without a container");
    }
    let env = env::read(given, at, report);
    let variables: BTreeMap<String, String> =
        env.iter().map(|variable| (variable.name.clone(), variable.value.clone())).collect();
    let expand_all = |texts: &[String]| texts.iter().map(|text| expand(text, &variables)).collect();
    let (port, h2c) = read_port(given.ports.as_deref().unwrap_or_default(), &join(at, "ports"), report);
    let port_name = given.ports.iter().flatten().next().and_then(|port| port.name.as_deref());
    Container {
        image,
        command: expand_all(&command),
        args: expand_all(given.args.as_deref().unwrap_or_default()),
        env,
        working_dir: given.working_dir.clone().unwrap_or_default(),
        port,
        h2c,
        readiness: match &given.readiness_probe {
            Some(given) => probe::read(given, port, port_name, &join(at, "readinessProbe"), report),
            None => probe::default(),
        },
    }
}

/// The serving port, and whether it speaks HTTP/2 with prior knowledge. Knative's rules: one at most,
/// its name says the protocol.
fn read_port(ports: &[k8s::ContainerPort], at: &str, report: &mut Report) -> (Option<u16>, bool) {
    let [port] = ports else {
        if !ports.is_empty() {
            report.error(at, format!("{} ports", ports.len()), "must be at most one, the serving port");
        }
        return (None, false);
    };
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
