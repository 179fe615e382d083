//! What a replica that is not ready yet waits for: the message of its status, and the address at which it is reached.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use pilotlight_proto::fleet::v1::ReplicaPhase;
use tokio::{net::TcpStream, time::Instant};

use super::Statuses;
use crate::runtime::{Running, Runtime};

/// Shortest time between two messages about the same wait: each one is sent to the coordinator.
const MESSAGE_INTERVAL: Duration = Duration::from_secs(3);
/// Pause before a replica that does not become ready is checked for the ports on which it listens: at first, and at
/// most. It doubles, since most replicas are ready soon and a check reads much of `/proc`.
const INITIAL_CHECK_INTERVAL: Duration = Duration::from_millis(250);
const MAX_CHECK_INTERVAL: Duration = Duration::from_secs(5);
/// Longest wait for a connection to the replica's own address.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// The status message of one replica while it starts.
pub(super) struct Waiting {
    statuses: Statuses,
    replica: String,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Which probe failed last, and why.
    probe: String,
    /// Where the process listens, as far as that explains why nobody reaches it.
    listeners: String,
    sent_at: Option<Instant>,
}

impl Waiting {
    pub(super) fn new(statuses: Statuses, replica: String) -> Self {
        Self { statuses, replica, state: Mutex::default() }
    }

    /// A probe has failed; `why` says which, where and why.
    pub(super) fn probe_failed(&self, why: &str) {
        self.publish(|state| state.probe = format!("waiting for the {why}"));
    }

    /// The replica has been found where it listens.
    pub(super) fn found(&self) {
        self.listens(String::new());
    }

    fn listens(&self, listeners: String) {
        self.publish(|state| state.listeners = listeners);
    }

    /// Updates the status if that changes the message, but not too often: probes fail many times a second.
    fn publish(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut state);
        if state.probe.is_empty() || state.sent_at.is_some_and(|at| at.elapsed() < MESSAGE_INTERVAL) {
            return;
        }
        let message = format!("{}{}", state.probe, state.listeners);
        let is_known = self.statuses.0.borrow().replicas.iter().any(|status| {
            status.replica == self.replica && status.message == message && status.phase() == ReplicaPhase::Starting
        });
        if !is_known {
            state.sent_at = Some(Instant::now());
            self.statuses.update(&self.replica, |status| {
                status.set_phase(ReplicaPhase::Starting);
                status.message = message;
                status.reason = "ProbeFailed".to_owned();
            });
        }
    }
}

/// Resolves with the address of a process that listens on its declared containerPort instead of the port that it was
/// given; never for other replicas. Meanwhile the status says on which ports the replica listens.
pub(super) async fn listens_elsewhere(
    runtime: Arc<dyn Runtime>,
    running: Running,
    waiting: Arc<Waiting>,
) -> SocketAddr {
    let mut pause = INITIAL_CHECK_INTERVAL;
    loop {
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(MAX_CHECK_INTERVAL);
        if let Some(address) = find_address(&*runtime, &running, &waiting).await {
            return address;
        }
    }
}

/// The same, checked once.
pub(super) async fn find_address(runtime: &dyn Runtime, running: &Running, waiting: &Waiting) -> Option<SocketAddr> {
    let connected = tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect(running.address)).await;
    // The engine's proxy takes connections for a container whether or not something listens there.
    if running.container.is_none() && matches!(connected, Ok(Ok(_))) {
        waiting.found();
        return None;
    }
    let listeners = runtime.listeners(running).await?;
    let taken = taken_port(running, &listeners).await;
    waiting.listens(describe(running, &listeners, taken));
    declared_address(running, &listeners)
}

/// The declared containerPort of a process, if another process of this node listens there.
async fn taken_port(running: &Running, listeners: &[SocketAddr]) -> Option<u16> {
    let declared = declared_port(running).filter(|_| running.container.is_none())?;
    if listeners.iter().any(|listener| listener.port() == declared) {
        return None;
    }
    let connecting = TcpStream::connect((std::net::Ipv4Addr::LOCALHOST, declared));
    matches!(tokio::time::timeout(CONNECT_TIMEOUT, connecting).await, Ok(Ok(_))).then_some(declared)
}

/// The declared containerPort; `None` if the manifest declares none.
fn declared_port(running: &Running) -> Option<u16> {
    let container = running.assignment.container.as_ref()?;
    u16::try_from(container.port).ok().filter(|port| *port != 0)
}

fn declared_address(running: &Running, listeners: &[SocketAddr]) -> Option<SocketAddr> {
    let declared = declared_port(running).filter(|_| running.container.is_none())?;
    if listeners.iter().any(|listener| listener.port() == running.address.port()) {
        return None;
    }
    let local = |listener: &&SocketAddr| {
        listener.port() == declared && (listener.ip().is_loopback() || listener.ip().is_unspecified())
    };
    // IPv4 comes first.
    let mut address = *listeners.iter().find(local)?;
    if address.ip().is_unspecified() {
        address.set_ip(match address {
            SocketAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
            SocketAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
        });
    }
    Some(address)
}

/// On which ports a replica listens, if that explains why it is not reached. `taken` is its containerPort if another
/// process listens there.
fn describe(running: &Running, listeners: &[SocketAddr], taken: Option<u16>) -> String {
    let expected = match &running.container {
        None => Some(running.address.port()),
        Some(_) => running.ports.iter().find(|(_, outside)| **outside == running.address.port()).map(|(port, _)| *port),
    };
    if listeners.iter().any(|listener| Some(listener.port()) == expected) {
        return String::new();
    }
    let what = if running.container.is_some() { "container" } else { "process" };
    let addresses: Vec<_> = listeners.iter().map(ToString::to_string).collect();
    let must = if running.container.is_some() { "its containerPort" } else { "$PORT" };
    let open =
        if addresses.is_empty() { "no port".to_owned() } else { format!("{}, not on {must}", addresses.join(", ")) };
    let taken = taken.map(|port| format!("; its containerPort {port} is in use by another process of this node"));
    format!("; the {what} listens on {open}{}", taken.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use pilotlight_proto::fleet::v1::{ContainerSpec, ReplicaAssignment};

    use super::*;

    fn running(port: u32, container: Option<&str>) -> Running {
        Running {
            replica: "a".into(),
            pid: 1,
            address: (Ipv4Addr::LOCALHOST, 41234).into(),
            started_at: 0,
            assignment: ReplicaAssignment {
                container: Some(ContainerSpec { port, ..Default::default() }),
                ..Default::default()
            },
            container: container.map(str::to_owned),
            ports: container.map(|_| (8080, 41234)).into_iter().collect(),
        }
    }

    fn addresses(listeners: &[&str]) -> Vec<SocketAddr> {
        listeners.iter().map(|listener| listener.parse().unwrap()).collect()
    }

    #[test]
    fn a_process_is_reached_at_its_container_port_if_it_listens_there_and_not_on_its_port() {
        let cases: [(u32, &[&str], Option<&str>); 9] = [
            (8000, &["0.0.0.0:8000"], Some("127.0.0.1:8000")),
            (8000, &["127.0.0.1:8000", "[::1]:8000"], Some("127.0.0.1:8000")),
            (8000, &["[::]:8000", "127.0.0.1:9000"], Some("[::1]:8000")),
            // It is reached at its port.
            (8000, &["127.0.0.1:8000", "127.0.0.1:41234"], None),
            // Another port may be anything, such as metrics.
            (8000, &["127.0.0.1:8001"], None),
            // An address of one network is not the loopback's.
            (8000, &["10.0.0.1:8000"], None),
            (8000, &[], None),
            (0, &["127.0.0.1:8080"], None),
            (41234, &["127.0.0.1:41234"], None),
        ];
        for (port, listeners, expected) in cases {
            let found = declared_address(&running(port, None), &addresses(listeners));
            assert_eq!(found, expected.map(|address| address.parse().unwrap()), "{port} {listeners:?}");
        }
        assert_eq!(declared_address(&running(8000, Some("c")), &addresses(&["0.0.0.0:8000"])), None);
    }

    #[test]
    fn the_message_names_the_ports_that_are_open_if_none_of_them_is_the_right_one() {
        let message = |container, listeners: &[&str]| describe(&running(0, container), &addresses(listeners), None);
        assert_eq!(message(None, &["127.0.0.1:41234", "0.0.0.0:9000"]), "");
        assert_eq!(
            message(None, &["0.0.0.0:8000", "[::]:9000"]),
            "; the process listens on 0.0.0.0:8000, [::]:9000, not on $PORT"
        );
        assert_eq!(message(None, &[]), "; the process listens on no port");
        assert_eq!(
            describe(&running(8000, None), &[], Some(8000)),
            "; the process listens on no port; its containerPort 8000 is in use by another process of this node"
        );
        assert_eq!(message(Some("c"), &["0.0.0.0:8080"]), "");
        assert_eq!(
            message(Some("c"), &["0.0.0.0:9000"]),
            "; the container listens on 0.0.0.0:9000, not on its containerPort"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_wait_is_reported_when_its_meaning_changes_and_not_more_often_than_each_few_seconds() {
        let statuses = Statuses::new();
        let waiting = Waiting::new(statuses.clone(), "a".into());
        let mut seen = statuses.0.subscribe();
        let mut sent = || {
            let changed = seen.has_changed().unwrap();
            let message = seen.borrow_and_update().replicas.first().map(|status| status.message.clone());
            changed.then_some(message).flatten()
        };
        waiting.listens("; nowhere".into());
        assert_eq!(sent(), None, "no probe has failed yet");
        waiting.probe_failed("probe: refused");
        assert_eq!(sent().as_deref(), Some("waiting for the probe: refused; nowhere"));
        for _ in 0..10 {
            tokio::time::advance(MESSAGE_INTERVAL).await;
            waiting.probe_failed("probe: refused");
            assert_eq!(sent(), None, "nothing new");
        }
        waiting.probe_failed("probe: 503");
        assert!(sent().is_some());
        waiting.probe_failed("probe: 404");
        assert_eq!(sent(), None, "too soon");
        tokio::time::advance(MESSAGE_INTERVAL).await;
        waiting.probe_failed("probe: 404");
        assert_eq!(sent().as_deref(), Some("waiting for the probe: 404; nowhere"));
    }
}
