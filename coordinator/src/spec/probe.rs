//! Readiness, liveness and startup probes.

use std::{collections::BTreeMap, time::Duration};

use k8s_openapi::{api::core::v1 as k8s, apimachinery::pkg::util::intstr::IntOrString};

use super::{
    documents::join,
    model::{Probe, ProbeHandler},
    pod,
    report::Report,
};

/// Serving port of a container that declares none, as in KServe and Knative.
const DEFAULT_PORT: u16 = 8080;

/// The probe of a container that declares none: a connection to the serving port, as KServe. A custom
/// container's protocol is not known, so there is no model-ready endpoint to ask.
pub(super) fn default() -> Probe {
    Probe {
        handler: ProbeHandler::TcpSocket { port: None },
        initial_delay: Duration::ZERO,
        period: Duration::ZERO,
        timeout: Duration::from_secs(1),
        success_threshold: 1,
        failure_threshold: 3,
        termination_grace_period: None,
    }
}

/// What follows from a probe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// Whether the container takes requests.
    Readiness,
    /// Whether it is to be restarted: liveness and startup.
    Restart,
}

/// Reads the probe at `at` of a container with this serving port.
pub(super) fn read(
    given: &k8s::Probe,
    port: Option<u16>,
    port_name: Option<&str>,
    purpose: Purpose,
    at: &str,
    report: &mut Report,
) -> Probe {
    let default = default();
    // Kubernetes' own rules.
    if purpose == Purpose::Readiness && given.termination_grace_period_seconds.is_some() {
        report.error(join(at, "terminationGracePeriodSeconds"), "", "must not be set for readiness probes");
    }
    if purpose == Purpose::Restart
        && let Some(successes) = given.success_threshold.filter(|successes| *successes != 1)
    {
        report.error(join(at, "successThreshold"), successes, "must be 1 for liveness and startup probes");
    }
    let grace = given.termination_grace_period_seconds.filter(|_| purpose == Purpose::Restart);
    let grace = grace.map(|grace| pod::seconds(Some(grace), 0, 1, &join(at, "terminationGracePeriodSeconds"), report));
    let mut number = |name: &str, value: Option<i32>, min: i32, default: u32| match value {
        None => default,
        Some(value) if value < min => {
            report.error(join(at, name), value, format!("must be {min} to {}", i32::MAX));
            default
        }
        Some(value) => value.unsigned_abs(),
    };
    let seconds = |value: u32| Duration::from_secs(value.into());
    Probe {
        initial_delay: seconds(number("initialDelaySeconds", given.initial_delay_seconds, 0, 0)),
        period: seconds(number("periodSeconds", given.period_seconds, 0, 0)),
        timeout: seconds(number("timeoutSeconds", given.timeout_seconds, 1, 1)),
        success_threshold: number("successThreshold", given.success_threshold, 1, default.success_threshold),
        failure_threshold: number("failureThreshold", given.failure_threshold, 1, default.failure_threshold),
        termination_grace_period: grace,
        handler: Ports { port, port_name }.handler(given, at, report),
    }
}

/// The container's serving port, to which probes may refer.
struct Ports<'a> {
    port: Option<u16>,
    port_name: Option<&'a str>,
}

impl Ports<'_> {
    fn handler(&self, given: &k8s::Probe, at: &str, report: &mut Report) -> ProbeHandler {
        let kinds = [
            ("httpGet", given.http_get.is_some()),
            ("tcpSocket", given.tcp_socket.is_some()),
            ("exec", given.exec.is_some()),
            ("grpc", given.grpc.is_some()),
        ];
        let kinds: Vec<&str> = kinds.into_iter().filter_map(|(name, is_given)| is_given.then_some(name)).collect();
        if kinds.len() > 1 {
            report.error(at, kinds.join(", "), "must have one of httpGet, tcpSocket, exec, grpc");
        }
        if let Some(http) = &given.http_get {
            self.http_get(http, &join(at, "httpGet"), report)
        } else if let Some(exec) = &given.exec {
            let command = exec.command.clone().unwrap_or_default();
            if command.is_empty() {
                report.error(join(at, "exec.command"), "", "must not be empty");
            }
            ProbeHandler::Exec { command }
        } else if let Some(grpc) = &given.grpc {
            let port = self.resolve(&IntOrString::Int(grpc.port), &format!("{at}.grpc.port"), report);
            ProbeHandler::Grpc { port, service: grpc.service.clone().unwrap_or_default() }
        } else if let Some(tcp) = &given.tcp_socket {
            let at = join(at, "tcpSocket");
            check_host(tcp.host.as_deref(), &at, report);
            ProbeHandler::TcpSocket { port: self.resolve(&tcp.port, &join(&at, "port"), report) }
        } else {
            // Thresholds and times alone: Knative fills in a connection to the serving port.
            default().handler
        }
    }

    fn http_get(&self, given: &k8s::HTTPGetAction, at: &str, report: &mut Report) -> ProbeHandler {
        let path = given.path.clone().filter(|path| !path.is_empty()).unwrap_or_else(|| "/".into());
        if !path.starts_with('/') || path.contains(|c: char| c.is_ascii_control() || c == ' ') {
            report.error(join(at, "path"), &path, "must begin with '/' and hold neither spaces nor control characters");
        }
        let scheme = given.scheme.as_deref().unwrap_or_default();
        if !["", "HTTP"].contains(&scheme) {
            report.error(join(at, "scheme"), scheme, "must be HTTP: replicas are probed without TLS");
        }
        check_host(given.host.as_deref(), at, report);
        let mut headers = BTreeMap::new();
        for (index, header) in given.http_headers.iter().flatten().enumerate() {
            let at = format!("{at}.httpHeaders[{index}]");
            let is_token = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
            if header.name.is_empty() || !header.name.bytes().all(is_token) {
                report.error(join(&at, "name"), &header.name, "must be an HTTP header name");
            }
            if header.value.chars().any(|c| c.is_control() && c != '\t') {
                report.error(join(&at, "value"), &header.value, "must not hold control characters");
            }
            if headers.insert(header.name.to_ascii_lowercase(), header.value.clone()).is_some() {
                report.error(join(&at, "name"), &header.name, "must be given once only");
            }
        }
        ProbeHandler::HttpGet { path, port: self.resolve(&given.port, &join(at, "port"), report), headers }
    }

    /// The port to probe; `None` is the serving port, wherever the runtime puts it.
    fn resolve(&self, given: &IntOrString, at: &str, report: &mut Report) -> Option<u16> {
        let number = match given {
            IntOrString::Int(number) => *number,
            IntOrString::String(name) => match name.parse() {
                Ok(number) => number,
                Err(_) => {
                    if self.port_name != Some(name.as_str()) {
                        report.error(at, name, "must be 1 to 65535, or the name of the container's port");
                    }
                    return None;
                }
            },
        };
        match u16::try_from(number) {
            Ok(0) => None,
            Ok(number) if number == self.port.unwrap_or(DEFAULT_PORT) => None,
            Ok(number) => Some(number),
            Err(_) => {
                report.error(at, number, "must be 0 to 65535; 0 is the serving port");
                None
            }
        }
    }
}

fn check_host(host: Option<&str>, at: &str, report: &mut Report) {
    if host.is_some_and(|host| !host.is_empty()) {
        report.unsupported(join(at, "host"), "the replica itself is probed");
    }
}
