//! Cells of real processes: `pilotlight dev`, or etcd, a coordinator and agents with mutual TLS.

use std::path::{Path, PathBuf};

use serde_json::Value;
use tempfile::TempDir;

use crate::{
    container::{docker, labelled},
    eventually, free_port,
    http::Gateway,
    process::{Process, output, pilotlight},
};

/// What the CLI printed.
#[derive(Debug)]
pub struct Printed {
    /// Exit status.
    pub code: i32,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

/// How an operator reaches a cell.
#[derive(Debug, Clone)]
pub struct Operator {
    /// `--server`.
    pub server: String,
    /// `--credentials`, where there is TLS.
    pub credentials: Option<PathBuf>,
}

impl Operator {
    /// Runs a command of the CLI.
    pub fn run(&self, args: &[&str]) -> Printed {
        let mut all = args.iter().map(ToString::to_string).collect::<Vec<_>>();
        all.extend(["--server".to_owned(), self.server.clone()]);
        if let Some(credentials) = &self.credentials {
            all.extend(["--credentials".to_owned(), credentials.display().to_string()]);
        }
        let output = output(pilotlight(), all);
        Printed {
            code: output.status.code().unwrap_or(-1),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// Runs a command that must succeed.
    ///
    /// # Panics
    /// It failed.
    pub fn must(&self, args: &[&str]) -> String {
        let printed = self.run(args);
        assert_eq!(printed.code, 0, "{args:?}: {}{}", printed.out, printed.err);
        printed.out
    }

    /// A new join token.
    pub fn token(&self) -> String {
        self.must(&["token", "create"]).lines().next().unwrap_or_default().trim().to_owned()
    }

    /// Applies a manifest given as text.
    ///
    /// # Panics
    /// The manifest cannot be written to a file.
    pub fn apply(&self, manifest: &str, flags: &[&str]) -> Printed {
        let file = tempfile::NamedTempFile::with_suffix(".yaml").expect("a temporary file");
        std::fs::write(file.path(), manifest).expect("can be written");
        let path = file.path().display().to_string();
        self.run(&[&["apply", "-f", &path], flags].concat())
    }

    /// `get <what> <name> -o json`; null where there is none.
    pub fn json(&self, args: &[&str]) -> Value {
        let printed = self.run(&[args, &["-o", "json"]].concat());
        if printed.code == 0 { serde_json::from_str(&printed.out).unwrap_or_default() } else { Value::Null }
    }

    /// The replicas of a service.
    pub fn replicas(&self, service: &str) -> Vec<Value> {
        let list = self.json(&["get", "replicas"]);
        let items = list["items"].as_array().cloned().unwrap_or_default();
        items.into_iter().filter(|replica| replica["service"] == service).collect()
    }

    /// Waits until exactly `count` replicas of the service are in this phase and there are no others.
    pub async fn replicas_are(&self, service: &str, count: usize, phase: &str) -> Vec<Value> {
        eventually(&format!("{service} has {count} replicas {phase}"), || async {
            let replicas = self.replicas(service);
            (replicas.len() == count && replicas.iter().all(|replica| replica["phase"] == phase)).then_some(replicas)
        })
        .await
    }
}

/// `pilotlight dev`.
#[derive(Debug)]
pub struct Dev {
    /// Its operator.
    pub operator: Operator,
    /// Its gateway.
    pub gateway: Gateway,
    /// Port of the gateway.
    pub ingress: u16,
    /// Port of `/metrics` and `/readyz`.
    pub http: u16,
    /// Arguments it was started with.
    args: Vec<String>,
    process: Option<Process>,
    env: Vec<(&'static str, String)>,
    directory: TempDir,
}

impl Dev {
    /// Starts it and waits until it answers.
    pub async fn start(extra: &[&str], env: Vec<(&'static str, String)>) -> Self {
        Self::start_in(tempfile::tempdir().expect("a temporary directory"), extra, env).await
    }

    /// Starts it in a directory of the caller's.
    pub async fn start_in(directory: TempDir, extra: &[&str], env: Vec<(&'static str, String)>) -> Self {
        let (grpc, http, ingress) = (free_port(), free_port(), free_port());
        let mut args = vec![
            "dev".to_owned(),
            format!("--data-dir={}", directory.path().join("data").display()),
            format!("--listen=127.0.0.1:{grpc}"),
            format!("--listen-http=127.0.0.1:{http}"),
            format!("--listen-ingress=127.0.0.1:{ingress}"),
            // Stories have their stores on loopback.
            "--allow-local-storage".to_owned(),
        ];
        args.extend(extra.iter().map(ToString::to_string));
        let operator = Operator { server: format!("http://127.0.0.1:{grpc}"), credentials: None };
        let gateway = Gateway::at(ingress);
        let mut dev = Self { operator, gateway, ingress, http, args, process: None, env, directory };
        dev.restart().await;
        dev
    }

    /// Where it keeps its data.
    pub fn data(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    /// Starts it again, with all it had.
    pub async fn restart(&mut self) {
        self.process = Some(Process::start(pilotlight(), self.directory.path(), "dev", &self.args, &self.env));
        eventually("dev has a connected node", || async {
            let nodes = self.operator.json(&["get", "nodes"]);
            (nodes["items"][0]["state"] == "Ready").then_some(())
        })
        .await;
    }

    /// As a crash would.
    pub fn kill_9(&mut self) {
        if let Some(process) = self.process.take() {
            process.kill_9();
        }
    }

    /// As Ctrl-C would.
    pub fn terminate(&mut self) {
        if let Some(process) = self.process.take() {
            process.terminate();
        }
    }
}

/// etcd, a coordinator and agents as separate processes, with mutual TLS.
#[derive(Debug)]
pub struct Cell {
    /// The operator whose certificate the coordinator wrote.
    pub operator: Operator,
    directory: TempDir,
    env: Vec<(&'static str, String)>,
    /// Further flags of the coordinator.
    flags: Vec<String>,
    etcd: Option<Process>,
    etcd_port: u16,
    grpc: u16,
    http: u16,
    coordinator: Option<Process>,
}

/// One agent of a [`Cell`].
#[derive(Debug)]
pub struct Agent {
    /// Its gateway.
    pub gateway: Gateway,
    name: String,
    args: Vec<String>,
    env: Vec<(&'static str, String)>,
    directory: PathBuf,
    process: Option<Process>,
}

/// The `etcd` binary.
///
/// # Panics
/// It is not installed.
pub fn etcd_binary() -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|directory| directory.join("etcd"))
        .find(|file| file.is_file())
        .expect("this story needs etcd; scripts/test.sh installs it (Debian: etcd-server)")
}

impl Cell {
    /// Starts etcd and a coordinator.
    pub async fn start(env: Vec<(&'static str, String)>) -> Self {
        Self::start_with(env, &[]).await
    }

    /// Starts a coordinator, and etcd only once the coordinator has said that it misses it.
    ///
    /// # Panics
    /// The coordinator never says so.
    pub async fn start_without_store() -> Self {
        let mut cell = Self::prepare(vec![], &[]);
        cell.spawn_coordinator();
        let log = cell.directory.path().join("coordinator.log");
        eventually("the coordinator misses etcd", || async {
            std::fs::read_to_string(&log).ok()?.contains("the store does not answer").then_some(())
        })
        .await;
        cell.start_etcd();
        cell.answers().await;
        cell
    }

    /// Starts etcd and a coordinator with further flags, in which `{}` stands for the cell's directory.
    pub async fn start_with(env: Vec<(&'static str, String)>, flags: &[&str]) -> Self {
        let mut cell = Self::prepare(env, flags);
        cell.start_etcd();
        cell.start_coordinator().await;
        cell
    }

    fn prepare(env: Vec<(&'static str, String)>, flags: &[&str]) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let (grpc, http, etcd_port) = (free_port(), free_port(), free_port());
        let operator = Operator {
            server: format!("https://127.0.0.1:{grpc}"),
            credentials: Some(directory.path().join("coordinator/operator")),
        };
        let path = directory.path().display().to_string();
        let flags = flags.iter().map(|flag| flag.replace("{}", &path)).collect();
        Self { operator, directory, env, flags, etcd: None, etcd_port, grpc, http, coordinator: None }
    }

    /// Ends etcd as a crash would.
    pub fn kill_9_etcd(&mut self) {
        if let Some(process) = self.etcd.take() {
            process.kill_9();
        }
    }

    fn start_etcd(&mut self) {
        let peer = free_port();
        let client = format!("http://127.0.0.1:{}", self.etcd_port);
        let peer = format!("http://127.0.0.1:{peer}");
        let args = [
            "--data-dir".to_owned(),
            self.directory.path().join("etcd").display().to_string(),
            format!("--listen-client-urls={client}"),
            format!("--advertise-client-urls={client}"),
            format!("--listen-peer-urls={peer}"),
            format!("--initial-advertise-peer-urls={peer}"),
            format!("--initial-cluster=default={peer}"),
        ];
        self.etcd = Some(Process::start(&etcd_binary(), self.directory.path(), "etcd", args, &[]));
    }

    /// Starts the coordinator, again or for the first time, and waits until it leads.
    pub async fn start_coordinator(&mut self) {
        self.spawn_coordinator();
        self.answers().await;
    }

    fn spawn_coordinator(&mut self) {
        let mut args = vec![
            "coordinator".to_owned(),
            format!("--listen=127.0.0.1:{}", self.grpc),
            format!("--listen-http=127.0.0.1:{}", self.http),
            format!("--data-dir={}", self.directory.path().join("coordinator").display()),
            format!("--etcd-endpoints=http://127.0.0.1:{}", self.etcd_port),
        ];
        args.extend(self.flags.iter().cloned());
        self.coordinator = Some(Process::start(pilotlight(), self.directory.path(), "coordinator", args, &self.env));
    }

    async fn answers(&self) {
        eventually("the coordinator answers", || async {
            (self.operator.run(&["get", "nodes"]).code == 0).then_some(())
        })
        .await;
    }

    /// As a crash would.
    pub fn kill_9_coordinator(&mut self) {
        if let Some(process) = self.coordinator.take() {
            process.kill_9();
        }
    }

    /// A new join token.
    pub fn token(&self) -> String {
        self.operator.token()
    }

    /// Starts an agent with simulated GPUs and waits until it is connected.
    pub async fn agent(&self, name: &str, gpus: u32) -> Agent {
        let settings = AgentSettings {
            name,
            gpus,
            driver: None,
            directory: self.directory.path().join(name),
            coordinators: format!("https://127.0.0.1:{}", self.grpc),
            env: self.env.clone(),
        };
        Agent::start(settings, &self.operator).await
    }

    /// The cell's directory.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// The coordinator's gRPC port.
    pub fn port(&self) -> u16 {
        self.grpc
    }
}

/// How an agent of a story is started.
#[derive(Debug)]
pub struct AgentSettings<'a> {
    /// Node name.
    pub name: &'a str,
    /// Simulated GPUs.
    pub gpus: u32,
    /// The driver's library; then no GPUs are simulated.
    pub driver: Option<PathBuf>,
    /// Its data directory.
    pub directory: PathBuf,
    /// URLs of all coordinators, separated by commas.
    pub coordinators: String,
    /// Further variables.
    pub env: Vec<(&'static str, String)>,
}

impl Agent {
    /// Starts an agent with a new token and waits until it is connected.
    ///
    /// # Panics
    /// Its directory cannot be made.
    pub async fn start(settings: AgentSettings<'_>, operator: &Operator) -> Self {
        let ingress = free_port();
        let AgentSettings { name, gpus, driver, directory, coordinators, env } = settings;
        std::fs::create_dir_all(&directory).expect("a directory for the agent");
        let args = vec![
            "agent".to_owned(),
            // Stories are about processes, wherever they run; containers have a suite of their own.
            "--runtime=process".to_owned(),
            // Stories have their stores on loopback.
            "--allow-local-storage".to_owned(),
            format!("--node-name={name}"),
            format!("--coordinator={coordinators}"),
            format!("--token={}", operator.token()),
            format!("--data-dir={}", directory.display()),
            format!("--listen-ingress=127.0.0.1:{ingress}"),
            format!("--listen-peer=127.0.0.1:{}", free_port()),
            format!("--listen-http=127.0.0.1:{}", free_port()),
            match driver {
                Some(library) => format!("--nvml-library={}", library.display()),
                None => format!("--simulate-gpus={gpus}"),
            },
        ];
        let gateway = Gateway::at(ingress);
        let mut agent = Self { gateway, name: name.to_owned(), args, env, directory, process: None };
        agent.restart(operator).await;
        agent
    }

    /// A variable that it has from its next start on.
    pub fn set_env(&mut self, name: &'static str, value: &str) {
        self.env.push((name, value.to_owned()));
    }

    /// The token that it joins with at its next start, if it has no certificate.
    pub fn set_token(&mut self, token: &str) {
        self.args.retain(|arg| !arg.starts_with("--token="));
        self.args.push(format!("--token={token}"));
    }

    /// Starts it again, with all it had, and waits until it is connected.
    pub async fn restart(&mut self, operator: &Operator) {
        self.process = Some(Process::start(pilotlight(), &self.directory, &self.name, &self.args, &self.env));
        eventually(&format!("agent {} is connected", self.name), || async {
            let nodes = operator.json(&["get", "nodes"]);
            let ready =
                nodes["items"].as_array()?.iter().any(|n| n["name"] == self.name.as_str() && n["state"] == "Ready");
            ready.then_some(())
        })
        .await;
    }

    /// As a crash would.
    pub fn kill_9(&mut self) {
        if let Some(process) = self.process.take() {
            process.kill_9();
        }
    }

    /// It does nothing any more, and keeps its connections.
    pub fn freeze(&self) {
        self.process.iter().for_each(Process::freeze);
    }

    /// It goes on.
    pub fn thaw(&self) {
        self.process.iter().for_each(Process::thaw);
    }

    /// Bytes that it has in main memory; 0 if it does not run.
    pub fn resident_bytes(&self) -> u64 {
        self.process.as_ref().map_or(0, Process::resident_bytes)
    }
}

/// Replicas outlive their agent by design; a story ends those that it started, by the records in the
/// agents' directories.
pub(crate) fn end_replicas(directory: &Path) {
    let Ok(agents) = std::fs::read_dir(directory) else { return };
    for agent in agents.flatten() {
        let Ok(replicas) = std::fs::read_dir(agent.path().join("replicas")) else { continue };
        for replica in replicas.flatten() {
            let state = std::fs::read(replica.path().join("state.json")).unwrap_or_default();
            let state: Value = serde_json::from_slice(&state).unwrap_or_default();
            if let Some(pid) = state["pid"].as_i64().filter(|pid| *pid > 1) {
                // It may have ended; its group bears its number.
                let group = nix::unistd::Pid::from_raw(-(pid as i32));
                let _ = nix::sys::signal::kill(group, nix::sys::signal::Signal::SIGKILL);
            }
            if state["contained"] == true {
                let label = format!("pilotlight.dev/replica={}", replica.file_name().display());
                for container in labelled(&label) {
                    docker(&["rm", "-f", &container]);
                }
            }
        }
    }
}

impl Drop for Cell {
    fn drop(&mut self) {
        // Their logs are shown where a story fails, and lie in the directory that goes next.
        self.coordinator.take();
        self.etcd.take();
        end_replicas(self.directory.path());
    }
}

impl Drop for Dev {
    fn drop(&mut self) {
        self.process.take();
        end_replicas(self.directory.path());
        end_replicas(&self.directory.path().join("data"));
    }
}
