//! Which runtime a replica gets.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use pilotlight_proto::fleet::v1::ReplicaAssignment;

use super::{DockerRuntime, Exit, GpuAccess, Mount, ProcessRuntime, Running, Runtime, RuntimeError, Say, SleepMark};
use crate::models::Images;

/// Processes and containers side by side: an image is run as a container. A command without an image,
/// and the command `pilotlight`, which is this very program, are run as processes.
pub struct AnyRuntime {
    process: ProcessRuntime,
    docker: DockerRuntime,
}

impl AnyRuntime {
    /// Of both, which share their directory.
    pub fn new(process: ProcessRuntime, docker: DockerRuntime) -> Self {
        Self { process, docker }
    }

    fn of(&self, assignment: &ReplicaAssignment) -> &dyn Runtime {
        if contained(assignment) { &self.docker } else { &self.process }
    }

    fn tending(&self, running: &Running) -> &dyn Runtime {
        if running.container.is_some() { &self.docker } else { &self.process }
    }
}

fn contained(assignment: &ReplicaAssignment) -> bool {
    assignment.container.as_ref().is_some_and(|container| {
        !container.image.is_empty() && container.command.first().is_none_or(|program| program != "pilotlight")
    })
}

#[async_trait]
impl Runtime for AnyRuntime {
    async fn prepare(&self, assignment: &ReplicaAssignment, say: Say<'_>) -> Result<bool, RuntimeError> {
        self.of(assignment).prepare(assignment, say).await
    }

    fn images(&self) -> Option<Arc<dyn Images>> {
        self.docker.images()
    }

    async fn start(&self, assignment: &ReplicaAssignment, mounts: &[Mount]) -> Result<Running, RuntimeError> {
        self.of(assignment).start(assignment, mounts).await
    }

    async fn adopt(&self) -> Result<Vec<Running>, RuntimeError> {
        let mut running = self.process.adopt().await?;
        running.extend(self.docker.adopt().await?);
        Ok(running)
    }

    async fn exited(&self, running: &Running) -> Exit {
        self.tending(running).exited(running).await
    }

    async fn stop(&self, running: &Running, grace: Duration) {
        self.tending(running).stop(running, grace).await;
    }

    async fn pause(&self, running: &Running) -> Result<(), RuntimeError> {
        self.tending(running).pause(running).await
    }

    async fn resume(&self, running: &Running) -> Result<(), RuntimeError> {
        self.tending(running).resume(running).await
    }

    async fn memory(&self, running: &Running) -> u64 {
        self.tending(running).memory(running).await
    }

    // Both keep it in the directory that they share.
    fn mark_sleep(&self, replica: &str, mark: Option<&SleepMark>) -> Result<(), RuntimeError> {
        self.process.mark_sleep(replica, mark)
    }

    fn sleep_mark(&self, replica: &str) -> Option<SleepMark> {
        self.process.sleep_mark(replica)
    }

    async fn remove(&self, replica: &str) {
        self.docker.remove(replica).await;
        self.process.remove(replica).await;
    }

    fn log_file(&self, replica: &str) -> PathBuf {
        self.process.log_file(replica)
    }

    async fn listeners(&self, running: &Running) -> Option<Vec<SocketAddr>> {
        self.tending(running).listeners(running).await
    }

    fn record_address(&self, running: &Running) -> Result<(), RuntimeError> {
        self.tending(running).record_address(running)
    }

    async fn flush_output(&self, replica: &str) {
        self.docker.flush_output(replica).await;
    }

    fn remove_others(&self, keep: &dyn Fn(&str) -> bool) {
        self.docker.remove_others(keep);
    }

    async fn exec(&self, running: &Running, command: &[String]) -> Result<(), String> {
        self.tending(running).exec(running, command).await
    }

    async fn gpu_access(&self, running: &Running) -> GpuAccess {
        self.tending(running).gpu_access(running).await
    }

    // This machine's own processes reach it by that address, too.
    fn host_address(&self, assignment: &ReplicaAssignment) -> IpAddr {
        self.of(assignment).host_address(assignment)
    }
}

#[cfg(test)]
mod tests {
    use pilotlight_proto::fleet::v1::ContainerSpec;

    use super::*;

    #[test]
    fn images_are_containers_and_bare_commands_are_processes() {
        let of = |image: &str, command: &[&str]| {
            let command = command.iter().map(|word| (*word).to_owned()).collect();
            let container = ContainerSpec { image: image.into(), command, ..Default::default() };
            contained(&ReplicaAssignment { container: Some(container), ..Default::default() })
        };
        assert!(of("a/b:1", &[]) && of("a/b:1", &["/server"]));
        assert!(!of("", &["/server"]) && !of("pilotlight:dev", &["pilotlight", "example-server"]));
    }
}
