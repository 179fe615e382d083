//! Asks a replica whether it is ready, or alive.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use http::Request;
use http_body_util::Empty;
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use pilotlight_proto::fleet::v1::{Probe, probe::Handler};
use tokio::net::TcpStream;
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

use super::{Running, Runtime};

/// Between probes until ready, where the manifest does not say; Knative's pace.
const EAGER: Duration = Duration::from_millis(50);
/// Between probes after that, where the manifest does not say; Kubernetes' default.
const RELAXED: Duration = Duration::from_secs(10);

/// What the engine drops is dropped by then.
const DROPPED: Duration = Duration::from_millis(500);

/// One replica's probe.
#[derive(Clone)]
pub struct Prober {
    probe: Probe,
    running: Running,
    runtime: Arc<dyn Runtime>,
    client: Client<HttpConnector, Empty<Bytes>>,
}

impl Prober {
    /// Probes the replica, commands by its runtime; without a handler a connection is enough.
    pub fn new(probe: Probe, running: &Running, runtime: Arc<dyn Runtime>) -> Self {
        Self { probe, running: running.clone(), runtime, client: Client::builder(TokioExecutor::new()).build_http() }
    }

    /// From start to the first probe.
    pub fn initial_delay(&self) -> Duration {
        duration(&self.probe.initial_delay).unwrap_or_default()
    }

    /// Between probes. Until ready it never waits longer than asked for, and by default hardly at all.
    pub fn period(&self, ready: bool) -> Duration {
        let given = duration(&self.probe.period).filter(|period| !period.is_zero());
        given.unwrap_or(if ready { RELAXED } else { EAGER })
    }

    /// Successes in a row that make it ready.
    pub fn success_threshold(&self) -> u32 {
        self.probe.success_threshold.max(1)
    }

    /// Failures in a row that make it unready; 3 where not given.
    pub fn failure_threshold(&self) -> u32 {
        if self.probe.failure_threshold == 0 { 3 } else { self.probe.failure_threshold }
    }

    /// Between the polite signal and the kill, where this probe says so.
    pub fn termination_grace_period(&self) -> Option<Duration> {
        duration(&self.probe.termination_grace_period)
    }

    /// From now on the replica is probed at this address; the ports that its probe names stay.
    pub fn set_address(&mut self, address: SocketAddr) {
        self.running.address = address;
    }

    /// Returns `true` if a success means that the replica takes connections at its own address.
    pub fn connects_to_address(&self) -> bool {
        self.target().is_some_and(|target| target == self.running.address)
    }

    /// What is asked and where, such as `GET /healthz at 127.0.0.1:41234 (PORT)`.
    pub fn describe(&self) -> String {
        let at = self.target().map(|target| format!(" at {target}{}", self.port_name(target))).unwrap_or_default();
        match &self.probe.handler {
            None | Some(Handler::TcpSocket(_)) => format!("TCP connection{at}"),
            Some(Handler::HttpGet(get)) => format!("GET {}{at}", get.path),
            Some(Handler::Exec(exec)) => format!("command {:?}", exec.command.join(" ")),
            Some(Handler::Grpc(_)) => format!("gRPC health check{at}"),
        }
    }

    /// Where the probe connects; `None` if it runs a command.
    fn target(&self) -> Option<SocketAddr> {
        match &self.probe.handler {
            None => Some(self.running.address),
            Some(Handler::TcpSocket(tcp)) => Some(self.at(tcp.port)),
            Some(Handler::HttpGet(get)) => Some(self.at(get.port)),
            Some(Handler::Grpc(grpc)) => Some(self.at(grpc.port)),
            Some(Handler::Exec(_)) => None,
        }
    }

    /// What the manifest's author calls that port.
    fn port_name(&self, target: SocketAddr) -> String {
        let Running { address, ports, container, assignment, .. } = &self.running;
        let declared = assignment.container.as_ref().map_or(0, |container| container.port);
        if let Some((inside, _)) = ports.iter().find(|(_, outside)| **outside == target.port()) {
            return format!(" (port {inside} of the container)");
        }
        match container {
            None if u32::from(target.port()) == declared => " (containerPort)".to_owned(),
            None if target == *address => " (PORT)".to_owned(),
            _ => String::new(),
        }
    }

    /// Asks once.
    ///
    /// # Errors
    /// It is not ready, or did not say so in time; why.
    pub async fn ask(&self) -> Result<(), String> {
        let timeout =
            duration(&self.probe.timeout).filter(|timeout| !timeout.is_zero()).unwrap_or(Duration::from_secs(1));
        match tokio::time::timeout(timeout, self.ask_handler()).await {
            Ok(answer) => answer,
            Err(_) => Err(format!("no answer within {timeout:?}")),
        }
    }

    fn at(&self, port: u32) -> SocketAddr {
        let address = self.running.address;
        let port = u16::try_from(port).ok().filter(|port| *port != 0);
        let port = port.map_or(address.port(), |port| self.running.ports.get(&port).copied().unwrap_or(port));
        SocketAddr::new(address.ip(), port)
    }

    async fn ask_handler(&self) -> Result<(), String> {
        match &self.probe.handler {
            None => self.connect(self.running.address).await,
            Some(Handler::TcpSocket(tcp)) => self.connect(self.at(tcp.port)).await,
            Some(Handler::HttpGet(get)) => {
                let mut request = Request::get(format!("http://{}{}", self.at(get.port), get.path));
                for (name, value) in &get.headers {
                    request = request.header(name, value);
                }
                let request = request.body(Empty::new()).map_err(|error| error.to_string())?;
                let response = self.client.request(request).await.map_err(|error| cause(&error))?;
                let status = response.status();
                if (200..400).contains(&status.as_u16()) { Ok(()) } else { Err(format!("HTTP status {status}")) }
            }
            Some(Handler::Exec(exec)) => self.runtime.exec(&self.running, &exec.command).await,
            Some(Handler::Grpc(grpc)) => {
                let channel = tonic::transport::Endpoint::from_shared(format!("http://{}", self.at(grpc.port)));
                let channel = channel.map_err(|error| cause(&error))?.connect().await.map_err(|error| cause(&error))?;
                let request = HealthCheckRequest { service: grpc.service.clone() };
                let answer = HealthClient::new(channel).check(request).await.map_err(|status| status.to_string())?;
                match answer.into_inner().status() {
                    ServingStatus::Serving => Ok(()),
                    other => Err(format!("health is {}", other.as_str_name())),
                }
            }
        }
    }

    async fn connect(&self, address: SocketAddr) -> Result<(), String> {
        let stream = TcpStream::connect(address).await.map_err(|error| cause(&error))?;
        let Running { pid, ports, container, .. } = &self.running;
        let inside = ports.iter().find(|(_, outside)| **outside == address.port()).map(|(inside, _)| *inside);
        let Some(port) = inside.filter(|_| container.is_some()) else { return Ok(()) };
        if listens(*pid, port) {
            return Ok(());
        }
        // The engine's own proxy takes connections whether or not something listens in the container, and
        // drops them where nothing does.
        match tokio::time::timeout(DROPPED, stream.peek(&mut [0])).await {
            Ok(Ok(0) | Err(_)) => Err(format!("nothing listens at port {port} of the container")),
            Ok(Ok(_)) | Err(_) => Ok(()),
        }
    }
}

/// True where a socket of the process's network listens at the port for others than itself. False where that
/// cannot be seen, too: a container may have a kernel of its own.
fn listens(pid: u32, port: u16) -> bool {
    let process = i32::try_from(pid).ok().and_then(|pid| procfs::process::Process::new(pid).ok());
    let tables = process.map(|process| [process.tcp(), process.tcp6()]);
    let mut sockets = tables.into_iter().flatten().flatten().flatten();
    sockets.any(|socket| {
        let at = socket.local_address;
        socket.state == procfs::net::TcpState::Listen && at.port() == port && !at.ip().is_loopback()
    })
}

/// What a connection failed of, in a few words: the error that caused all others.
fn cause(error: &(dyn std::error::Error + 'static)) -> String {
    let mut root = error;
    while let Some(source) = root.source() {
        root = source;
    }
    match root.downcast_ref::<std::io::Error>().map(std::io::Error::kind) {
        Some(kind) if kind != std::io::ErrorKind::Other => kind.to_string(),
        _ => root.to_string(),
    }
}

fn duration(given: &Option<prost_types::Duration>) -> Option<Duration> {
    Duration::try_from(given.as_ref().copied()?).ok()
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use pilotlight_proto::fleet::v1::{ContainerSpec, HttpGet, ReplicaAssignment, TcpSocket};

    use super::*;
    use crate::runtime::ProcessRuntime;

    fn prober(handler: Option<Handler>, container: Option<&str>) -> Prober {
        let container_spec = Some(ContainerSpec { port: 8000, ..Default::default() });
        let running = Running {
            replica: "a".into(),
            pid: 0,
            // Privileged, and nobody listens there.
            address: (Ipv4Addr::LOCALHOST, 1).into(),
            started_at: 0,
            assignment: ReplicaAssignment { container: container_spec, ..Default::default() },
            container: container.map(str::to_owned),
            ports: container.map(|_| (8000, 1)).into_iter().collect(),
        };
        let runtime = Arc::new(ProcessRuntime::new("/nowhere".as_ref(), "/nowhere".into()));
        Prober::new(Probe { handler, ..Default::default() }, &running, runtime)
    }

    #[tokio::test]
    async fn a_probe_says_what_it_asks_where_and_why_that_fails() {
        let get = |port| Some(Handler::HttpGet(HttpGet { path: "/ready".into(), port, ..Default::default() }));
        let mut asked = prober(get(0), None);
        assert_eq!(asked.describe(), "GET /ready at 127.0.0.1:1 (PORT)");
        assert_eq!(asked.ask().await.unwrap_err(), "connection refused");
        assert!(asked.connects_to_address());
        asked.set_address((Ipv4Addr::LOCALHOST, 8000).into());
        assert_eq!(asked.describe(), "GET /ready at 127.0.0.1:8000 (containerPort)");
        let other = prober(get(9000), None);
        assert_eq!((other.describe(), other.connects_to_address()), ("GET /ready at 127.0.0.1:9000".into(), false));
        assert_eq!(prober(None, None).ask().await.unwrap_err(), "connection refused");
        let tcp = Some(Handler::TcpSocket(TcpSocket { port: 0 }));
        let contained = prober(tcp, Some("c")).describe();
        assert_eq!(contained, "TCP connection at 127.0.0.1:1 (port 8000 of the container)");
    }
}
