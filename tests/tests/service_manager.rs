//! What processes tell systemd, which the tests stand in for.

use std::{os::unix::net::UnixDatagram, path::Path};

use pilotlight_tests::{eventually, free_port, process::Process, process::pilotlight};

/// Takes what a process tells, as systemd would.
struct ServiceManager {
    socket: UnixDatagram,
    told: Vec<String>,
}

impl ServiceManager {
    fn listen(at: &Path) -> Self {
        let socket = UnixDatagram::bind(at).unwrap();
        socket.set_nonblocking(true).unwrap();
        Self { socket, told: Vec::new() }
    }

    /// How often it was told this so far.
    fn count(&mut self, state: &str) -> usize {
        let mut bytes = [0; 4096];
        while let Ok(length) = self.socket.recv(&mut bytes) {
            let text = String::from_utf8(bytes[..length].to_vec()).unwrap();
            self.told.extend(text.lines().map(str::to_owned));
        }
        self.told.iter().filter(|told| told.starts_with(state)).count()
    }

    async fn is_told(&mut self, state: &str, times: usize) {
        let this = std::cell::RefCell::new(self);
        let waiting = async || (this.borrow_mut().count(state) >= times).then_some(());
        eventually(&format!("{state} is told {times} times"), waiting).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_tells_systemd_when_it_has_started_that_it_lives_and_that_it_stops() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().display();
    let socket = directory.path().join("notify");
    let mut systemd = ServiceManager::listen(&socket);
    let (grpc, http) = (free_port(), free_port());
    let args = [
        "coordinator".to_owned(),
        format!("--listen=127.0.0.1:{grpc}"),
        format!("--listen-http=127.0.0.1:{http}"),
        format!("--data-dir={path}/coordinator"),
    ];
    let env = [("NOTIFY_SOCKET", socket.display().to_string()), ("WATCHDOG_USEC", "200000".to_owned())];
    let coordinator = Process::start(pilotlight(), directory.path(), "coordinator", args, &env);
    systemd.is_told("READY=1", 1).await;
    systemd.is_told("STATUS=ok: leading", 1).await;
    systemd.is_told("WATCHDOG=1", 5).await;
    assert!(coordinator.terminate().success());
    assert_eq!(systemd.count("STOPPING=1"), 1);
    assert_eq!(systemd.count("READY=1"), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_without_a_coordinator_has_started_and_says_for_what_it_waits() {
    let cell = pilotlight_tests::cell::Cell::start(vec![]).await;
    let mut agent = cell.agent("gpu-1", 1).await;
    agent.kill_9();
    let socket = cell.directory().join("notify");
    let mut systemd = ServiceManager::listen(&socket);
    agent.set_env("NOTIFY_SOCKET", &socket.display().to_string());
    agent.restart(&cell.operator).await;
    systemd.is_told("STATUS=no session with the coordinator", 1).await;
    systemd.is_told("READY=1", 1).await;
    systemd.is_told("STATUS=ok", 1).await;
}
