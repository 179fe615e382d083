//! A cell with several etcd members and several coordinators, each of which can be killed, frozen and stopped.

use std::path::{Path, PathBuf};

use serde_json::Value;
use tempfile::TempDir;

use crate::{
    cell::{Agent, AgentSettings, Operator, end_replicas, etcd_binary},
    eventually, free_port,
    http::Gateway,
    process::{Process, pilotlight},
};

/// A process that can be started again with the same arguments.
#[derive(Debug)]
pub struct Member {
    name: String,
    program: &'static Path,
    args: Vec<String>,
    /// Port of its HTTP interface.
    http: u16,
    process: Option<Process>,
}

impl Member {
    fn start(&mut self, directory: &Path) {
        self.process = Some(Process::start(self.program, directory, &self.name, &self.args, &[]));
    }

    /// As a crash would.
    pub fn kill_9(&mut self) {
        if let Some(process) = self.process.take() {
            process.kill_9();
        }
    }

    /// As an operator would: SIGTERM. Returns `true` if it exits with status 0.
    pub fn terminate(&mut self) -> bool {
        self.process.take().is_some_and(|process| process.terminate().success())
    }

    /// It does nothing any more, and keeps its connections.
    pub fn freeze(&self) {
        self.process.iter().for_each(Process::freeze);
    }

    /// It goes on.
    pub fn thaw(&self) {
        self.process.iter().for_each(Process::thaw);
    }

    /// True while the process has not ended.
    pub fn is_running(&mut self) -> bool {
        self.process.as_mut().is_some_and(Process::running)
    }

    /// `GET path` of its HTTP interface: status code and body. Returns `None` if it does not answer.
    pub async fn get(&self, path: &str) -> Option<(u16, String)> {
        let asking = Gateway::at(self.http);
        let answer = tokio::time::timeout(std::time::Duration::from_secs(2), asking.get("localhost", path)).await;
        let answer = answer.ok()?.ok()?;
        Some((answer.status.as_u16(), answer.body))
    }
}

/// etcd members, coordinators, and agents that know all coordinators.
#[derive(Debug)]
pub struct Cluster {
    /// Knows all coordinators.
    pub operator: Operator,
    /// The members of etcd.
    pub etcd: Vec<Member>,
    /// The coordinators.
    pub coordinators: Vec<Member>,
    addresses: Vec<String>,
    directory: TempDir,
}

impl Cluster {
    /// Starts so many etcd members and coordinators, and waits until one of them leads and the others stand by.
    ///
    /// # Panics
    /// They do not start.
    pub async fn start(etcd: usize, coordinators: usize) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().display().to_string();
        std::fs::write(directory.path().join("secrets.key"), "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=\n")
            .expect("the key can be written");
        let etcd = etcd_members(etcd, &path);
        let endpoints: Vec<_> = etcd.iter().map(|member| format!("http://127.0.0.1:{}", member.http)).collect();
        let ports: Vec<_> = (0..coordinators).map(|_| free_port()).collect();
        let addresses: Vec<_> = ports.iter().map(|port| format!("https://127.0.0.1:{port}")).collect();
        let coordinators = ports.iter().enumerate().map(|(index, port)| {
            let (name, http) = (format!("coordinator-{index}"), free_port());
            let args = vec![
                "coordinator".to_owned(),
                format!("--listen=127.0.0.1:{port}"),
                format!("--listen-http=127.0.0.1:{http}"),
                format!("--advertise=https://127.0.0.1:{port}"),
                format!("--data-dir={path}/{name}"),
                format!("--secrets-key={path}/secrets.key"),
                format!("--etcd-endpoints={}", endpoints.join(",")),
            ];
            Member { name, program: pilotlight(), args, http, process: None }
        });
        let coordinators: Vec<_> = coordinators.collect();
        let operator = Operator {
            server: addresses.join(","),
            credentials: Some(directory.path().join("coordinator-0/operator")),
        };
        let mut cluster = Self { operator, etcd, coordinators, addresses, directory };
        for index in 0..cluster.etcd.len() {
            cluster.start_etcd(index);
        }
        for index in 0..cluster.coordinators.len() {
            cluster.start_coordinator(index);
        }
        for index in 0..cluster.coordinators.len() {
            cluster.ready(index).await;
        }
        cluster
    }

    /// Starts an etcd member, again or for the first time.
    pub fn start_etcd(&mut self, index: usize) {
        let directory = self.directory.path().to_owned();
        self.etcd[index].start(&directory);
    }

    /// Starts a coordinator, again or for the first time.
    pub fn start_coordinator(&mut self, index: usize) {
        let directory = self.directory.path().to_owned();
        self.coordinators[index].start(&directory);
    }

    /// Waits until `/readyz` of a coordinator is 200; what it says.
    pub async fn ready(&self, index: usize) -> String {
        self.readiness(index, 200).await
    }

    /// Waits until `/readyz` of a coordinator has this status; what it says.
    pub async fn readiness(&self, index: usize, status: u16) -> String {
        eventually(&format!("/readyz of coordinator {index} is {status}"), || async {
            let (code, body) = self.coordinators[index].get("/readyz").await?;
            (code == status).then_some(body)
        })
        .await
    }

    /// URL of an etcd member.
    pub fn etcd_url(&self, index: usize) -> String {
        format!("http://127.0.0.1:{}", self.etcd[index].http)
    }

    /// Index of the coordinator that leads.
    pub async fn leader(&self) -> usize {
        eventually("a coordinator leads", || async {
            for (index, coordinator) in self.coordinators.iter().enumerate() {
                if let Some((200, body)) = coordinator.get("/readyz").await
                    && body.contains("leading")
                {
                    return Some(index);
                }
            }
            None
        })
        .await
    }

    /// Index of etcd's leader.
    pub async fn etcd_leader(&self) -> usize {
        eventually("etcd has a leader", || async {
            for (index, member) in self.etcd.iter().enumerate() {
                let request = hyper::Request::post("/v3/maintenance/status");
                let asking = Gateway::at(member.http);
                let Ok(answer) = asking.send("localhost", request, "{}").await else { continue };
                let status: Value = serde_json::from_str(&answer.body).unwrap_or_default();
                if status["leader"].is_string() && status["leader"] == status["header"]["member_id"] {
                    return Some(index);
                }
            }
            None
        })
        .await
    }

    /// Starts an agent that knows all coordinators, and waits until it is connected.
    pub async fn agent(&self, name: &str, gpus: u32) -> Agent {
        self.start_agent(name, gpus, None).await
    }

    /// The same with the GPUs that a driver's library sees.
    pub async fn agent_with_driver(&self, name: &str, library: PathBuf) -> Agent {
        self.start_agent(name, 0, Some(library)).await
    }

    async fn start_agent(&self, name: &str, gpus: u32, driver: Option<PathBuf>) -> Agent {
        let settings = AgentSettings {
            name,
            gpus,
            driver,
            directory: self.directory.path().join(name),
            coordinators: self.addresses.join(","),
            env: Vec::new(),
        };
        Agent::start(settings, &self.operator).await
    }

    /// Output of all its processes, for a story that fails.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }
}

fn etcd_members(count: usize, path: &str) -> Vec<Member> {
    let ports: Vec<_> = (0..count).map(|_| (free_port(), free_port())).collect();
    let peers: Vec<_> =
        ports.iter().enumerate().map(|(index, (_, peer))| format!("etcd-{index}=http://127.0.0.1:{peer}")).collect();
    let program: &'static Path = Box::leak(etcd_binary().into_boxed_path());
    let member = |(index, (client, peer)): (usize, &(u16, u16))| {
        let name = format!("etcd-{index}");
        let (client_url, peer_url) = (format!("http://127.0.0.1:{client}"), format!("http://127.0.0.1:{peer}"));
        let args = vec![
            format!("--name={name}"),
            format!("--data-dir={path}/{name}"),
            format!("--listen-client-urls={client_url}"),
            format!("--advertise-client-urls={client_url}"),
            format!("--listen-peer-urls={peer_url}"),
            format!("--initial-advertise-peer-urls={peer_url}"),
            format!("--initial-cluster={}", peers.join(",")),
        ];
        Member { name, program, args, http: *client, process: None }
    };
    ports.iter().enumerate().map(member).collect()
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for member in self.coordinators.iter_mut().chain(&mut self.etcd) {
            // A frozen process cannot end.
            member.thaw();
            member.process.take();
        }
        end_replicas(self.directory.path());
    }
}
