//! Replicas as plain processes of this machine, each in a process group of its own.

use std::{
    collections::{BTreeMap, HashMap},
    ffi::OsString,
    fs::File,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    os::unix::process::ExitStatusExt as _,
    path::{Path, PathBuf},
    process::Stdio,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use pilotlight_proto::fleet::v1::ReplicaAssignment;
use process_wrap::tokio::{ChildWrapper, CommandWrap, ProcessSession};
use tokio::{process::Command, sync::watch};
use tracing::{info, warn};

use super::{
    Exit, Mount, Running, Runtime, RuntimeError, SleepMark,
    expand::expand,
    mounts::rewrite,
    resolved,
    run_as::RunAs,
    sockets,
    state::{Directories, LOG, ReplicaState},
    unix_now,
    variables::{variables, visible_devices},
};

/// Marks a replica's process, so that one whose record was not written is found all the same.
const MARK: &str = "PILOTLIGHT_REPLICA";
/// What replicas get of the agent's own environment.
const PASSED_ON: [&str; 6] = ["PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "TMPDIR", "NVIDIA_DRIVER_CAPABILITIES"];
/// Shared memory, which a process has of the host.
const SHM: &str = "/dev/shm";
/// How often the end of another process's child is looked for.
const LOOK: Duration = Duration::from_millis(100);
/// How often a process that is being paused is looked at.
const LOOK_PAUSED: Duration = Duration::from_millis(2);
/// How many times at most.
const LOOKS_PAUSED: u32 = 500;

/// Runs replicas as processes.
pub struct ProcessRuntime {
    directories: Directories,
    /// What `pilotlight` means as a command.
    own_binary: PathBuf,
    /// The user that replicas run as; `None` is the agent's own.
    run_as: Option<RunAs>,
    /// Ends of this process's children.
    exits: Mutex<HashMap<u32, watch::Receiver<Option<Exit>>>>,
}

impl ProcessRuntime {
    /// Keeps records and output below `data_dir`; `own_binary` is run where a command is `pilotlight`.
    pub fn new(data_dir: &Path, own_binary: PathBuf) -> Self {
        Self { directories: Directories::new(data_dir), own_binary, run_as: None, exits: Mutex::default() }
    }

    /// Runs replicas as another user.
    #[must_use]
    pub fn with_run_as(self, run_as: Option<RunAs>) -> Self {
        Self { run_as, ..self }
    }

    fn command(&self, assignment: &ReplicaAssignment, mounts: &[Mount], port: u16) -> Result<Command, RuntimeError> {
        let container = resolved(assignment)?;
        // A process sees the host's files as they are; of what a manifest mounts it has shared memory alone.
        if let Some(mount) = container.mounts.iter().find(|mount| mount.path != SHM) {
            let reason = format!("{}: the process runtime mounts nothing; this needs a container engine", mount.path);
            return Err(RuntimeError::Specification { field: "spec.predictor.containers[0].volumeMounts", reason });
        }
        let decided = [
            ("PORT", port.to_string()),
            ("CUDA_VISIBLE_DEVICES", visible_devices(assignment)),
            (MARK, assignment.replica.clone()),
        ];
        let variables = in_folders(variables(assignment, &container, &decided), mounts);
        let words = container.command.iter().chain(&container.args).map(|word| expand(word, &variables));
        let mut words = words.map(|word| rewrite(&word, mounts));
        let program = words.next().filter(|_| !container.command.is_empty()).ok_or_else(|| {
            let image = &container.image;
            RuntimeError::Specification {
                field: "spec.predictor.containers[0].command",
                reason: format!(
                    "the process runtime runs commands of the host and needs one: image {image:?} cannot be run without a container engine"
                ),
            }
        })?;
        let program = if program == "pilotlight" { self.own_binary.clone() } else { PathBuf::from(program) };
        let mut command = Command::new(program);
        command.args(words).env_clear().envs(passed_on()).envs(variables).stdin(Stdio::null());
        if let Some(run_as) = &self.run_as {
            run_as.apply(&mut command);
        }
        if !container.working_dir.is_empty() {
            command.current_dir(&container.working_dir);
        }
        Ok(command)
    }

    fn spawn(
        &self,
        assignment: &ReplicaAssignment,
        mounts: &[Mount],
        port: u16,
    ) -> Result<Box<dyn ChildWrapper>, RuntimeError> {
        let mut command = self.command(assignment, mounts, port)?;
        let path = self.directories.rotate_log(&assignment.replica)?;
        // Straight to a file: a pipe would end, and the replica with it, when the agent does.
        let log = File::options().create(true).append(true).open(&path);
        let log = log.map_err(|error| RuntimeError::File { path: path.clone(), error })?;
        let second = log.try_clone().map_err(|error| RuntimeError::File { path, error })?;
        let program = command.as_std().get_program().to_string_lossy().into_owned();
        command.stdout(log).stderr(second);
        // A session of its own, not only a group: of a group that is halted while its agent ends the kernel
        // would make an end (SIGHUP to stopped processes of an orphaned group of the agent's session).
        let spawned = CommandWrap::from(command).wrap(ProcessSession).spawn();
        // The process is waited for, not what else is in its group.
        spawned.map(ChildWrapper::into_inner).map_err(|error| RuntimeError::Start { program, error })
    }

    /// Waits for a child in a task, so that it is reaped whoever asks, or nobody.
    fn watch(&self, pid: u32, mut child: Box<dyn ChildWrapper>) {
        let (sender, receiver) = watch::channel(None);
        self.exits.lock().unwrap_or_else(PoisonError::into_inner).insert(pid, receiver);
        tokio::spawn(async move {
            let exit = match child.wait().await {
                Ok(status) => Exit { code: status.code(), signal: status.signal(), oom_killed: false },
                Err(_) => Exit::default(),
            };
            sender.send_replace(Some(exit));
        });
    }
}

/// The environment of a process, which has no file system of its own.
fn in_folders(mut variables: BTreeMap<String, String>, mounts: &[Mount]) -> BTreeMap<String, String> {
    variables.values_mut().for_each(|value| *value = rewrite(value, mounts));
    if let Some(model) = mounts.first() {
        variables.insert("PILOTLIGHT_MODEL_DIR".to_owned(), model.source.display().to_string());
    }
    variables
}

fn passed_on() -> impl Iterator<Item = (&'static str, OsString)> {
    PASSED_ON.into_iter().filter_map(|name| Some((name, std::env::var_os(name)?)))
}

/// A port that is free now. Two starts at once get different ones: the kernel hands them out in turn.
fn free_port() -> Result<u16, RuntimeError> {
    let bound = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|listener| listener.local_addr());
    bound.map(|address| address.port()).map_err(|error| RuntimeError::Start { program: "a listener".to_owned(), error })
}

/// Start time of a process that runs; `None` where it does not, or is a zombie.
fn start_ticks(pid: u32) -> Option<u64> {
    let stat = procfs::process::Process::new(i32::try_from(pid).ok()?).ok()?.stat().ok()?;
    (stat.state != 'Z').then_some(stat.starttime)
}

/// Processes that bear a replica's mark, with their replica.
fn marked() -> Vec<(u32, String)> {
    let Ok(all) = procfs::process::all_processes() else { return Vec::new() };
    let marked = |process: procfs::process::Process| {
        let value = process.environ().ok()?.remove(&OsString::from(MARK))?;
        let leads = process.stat().ok()?.pgrp == process.pid();
        leads.then_some((u32::try_from(process.pid()).ok()?, value.into_string().ok()?))
    };
    all.flatten().filter_map(marked).collect()
}

fn signal(pid: u32, signal: Signal) {
    if let Ok(group) = i32::try_from(pid)
        && group > 1
    {
        // It may have ended by itself.
        let _ = killpg(Pid::from_raw(group), signal);
    }
}

/// State of a process as in `/proc`: T is stopped by a signal, Z ended and not yet reaped.
fn state(pid: u32) -> Option<char> {
    Some(procfs::process::Process::new(i32::try_from(pid).ok()?).ok()?.stat().ok()?.state)
}

/// Resident set of all processes of a group, bytes.
fn resident(group: u32) -> u64 {
    let Ok(all) = procfs::process::all_processes() else { return 0 };
    let stats = all.flatten().filter_map(|process| process.stat().ok());
    let of_group = stats.filter(|stat| u32::try_from(stat.pgrp) == Ok(group));
    of_group.map(|stat| stat.rss).sum::<u64>() * procfs::page_size()
}

/// Sends a replica's group a signal that it cannot miss.
fn halt(running: &Running, what: &'static str, signal: Signal) -> Result<(), RuntimeError> {
    let failed = |reason: String| RuntimeError::Pause { what, replica: running.replica.clone(), reason };
    let group = i32::try_from(running.pid).ok().filter(|group| *group > 1);
    let group = group.ok_or_else(|| failed("it has no process".to_owned()))?;
    killpg(Pid::from_raw(group), signal).map_err(|error| failed(error.to_string()))
}

#[async_trait]
impl Runtime for ProcessRuntime {
    async fn start(&self, assignment: &ReplicaAssignment, mounts: &[Mount]) -> Result<Running, RuntimeError> {
        let port = free_port()?;
        let started_at = unix_now();
        let encoded = ReplicaState::encode(assignment);
        // First the intent: should this process die now, the next one finds the replica by its mark.
        let mut state = ReplicaState {
            pid: 0,
            start_ticks: 0,
            port,
            address: None,
            started_at,
            assignment: encoded,
            contained: false,
        };
        self.directories.write(&assignment.replica, &state)?;
        let child = self.spawn(assignment, mounts, port)?;
        let pid = child.id().unwrap_or(0);
        state.pid = pid;
        state.start_ticks = start_ticks(pid).unwrap_or(0);
        self.watch(pid, child);
        if let Err(error) = self.directories.write(&assignment.replica, &state) {
            signal(pid, Signal::SIGKILL);
            return Err(error);
        }
        info!(replica = %assignment.replica, pid, port, "process started");
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        Ok(Running {
            replica: assignment.replica.clone(),
            pid,
            address,
            started_at,
            assignment: assignment.clone(),
            container: None,
            ports: BTreeMap::new(),
        })
    }

    async fn adopt(&self) -> Result<Vec<Running>, RuntimeError> {
        let marked: HashMap<String, u32> = marked().into_iter().map(|(pid, replica)| (replica, pid)).collect();
        let mut adopted = Vec::new();
        for (replica, mut state) in self.directories.read_all() {
            if state.contained {
                continue;
            }
            let Some(assignment) = state.assignment() else { continue };
            if state.pid == 0
                && let Some(pid) = marked.get(&replica)
            {
                state.pid = *pid;
                state.start_ticks = start_ticks(*pid).unwrap_or(0);
                self.directories.write(&replica, &state)?;
            }
            if state.pid == 0 || start_ticks(state.pid) != Some(state.start_ticks) {
                // It ended while no agent looked. Its output stays until the coordinator decides.
                continue;
            }
            let address = state.process_address();
            info!(%replica, pid = state.pid, "replica adopted");
            adopted.push(Running {
                replica,
                pid: state.pid,
                address,
                started_at: state.started_at,
                assignment,
                container: None,
                ports: BTreeMap::new(),
            });
        }
        Ok(adopted)
    }

    async fn exited(&self, running: &Running) -> Exit {
        let child = self.exits.lock().unwrap_or_else(PoisonError::into_inner).get(&running.pid).cloned();
        if let Some(mut child) = child {
            let exit = child.wait_for(Option::is_some).await.ok().and_then(|exit| exit.clone());
            return exit.unwrap_or_default();
        }
        // Another process's child: the kernel tells only its parent, so it is looked for.
        let born = start_ticks(running.pid);
        while born.is_some() && start_ticks(running.pid) == born {
            tokio::time::sleep(LOOK).await;
        }
        Exit::default()
    }

    async fn stop(&self, running: &Running, grace: Duration) {
        signal(running.pid, Signal::SIGTERM);
        // One that is paused hears it only now.
        signal(running.pid, Signal::SIGCONT);
        if tokio::time::timeout(grace, self.exited(running)).await.is_err() {
            warn!(replica = %running.replica, ?grace, "did not end in time; killed");
        }
        // Whatever of its group is left goes too.
        signal(running.pid, Signal::SIGKILL);
        self.exited(running).await;
    }

    async fn pause(&self, running: &Running) -> Result<(), RuntimeError> {
        halt(running, "pause", Signal::SIGSTOP)?;
        // The signal is under way. A parent whose child was halted between vfork and exec never shows as
        // stopped, yet does nothing either, so this does not wait for ever.
        for _ in 0..LOOKS_PAUSED {
            if state(running.pid).is_none_or(|state| matches!(state, 'T' | 'Z')) {
                break;
            }
            tokio::time::sleep(LOOK_PAUSED).await;
        }
        Ok(())
    }

    async fn resume(&self, running: &Running) -> Result<(), RuntimeError> {
        halt(running, "resume", Signal::SIGCONT)
    }

    async fn memory(&self, running: &Running) -> u64 {
        let group = running.pid;
        tokio::task::spawn_blocking(move || resident(group)).await.unwrap_or(0)
    }

    fn mark_sleep(&self, replica: &str, mark: Option<&SleepMark>) -> Result<(), RuntimeError> {
        self.directories.mark_sleep(replica, mark)
    }

    fn sleep_mark(&self, replica: &str) -> Option<SleepMark> {
        self.directories.sleep_mark(replica)
    }

    async fn listeners(&self, running: &Running) -> Option<Vec<SocketAddr>> {
        let group = running.pid;
        tokio::task::spawn_blocking(move || sockets::of_group(group)).await.ok()
    }

    fn record_address(&self, running: &Running) -> Result<(), RuntimeError> {
        self.directories.record_address(&running.replica, running.address)
    }

    async fn remove(&self, replica: &str) {
        self.directories.remove(replica);
    }

    fn log_file(&self, replica: &str) -> PathBuf {
        self.directories.of(replica).join(LOG)
    }

    fn remove_others(&self, keep: &dyn Fn(&str) -> bool) {
        self.directories.remove_others(keep);
    }
}

impl ProcessRuntime {
    /// Forgets how a process ended; called once its replica is gone.
    pub fn forget(&self, pid: u32) {
        self.exits.lock().unwrap_or_else(PoisonError::into_inner).remove(&pid);
    }
}
