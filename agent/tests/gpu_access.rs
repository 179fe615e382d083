//! Whether a container can use its GPUs is found out in the container. Without a Docker Engine this is left out, with a
//! message, unless `PILOTLIGHT_REQUIRE_DOCKER` is set.

use std::{fs, path::Path, process::Command, time::Duration};

use pilotlight_agent::runtime::{DockerRuntime, DockerSettings, GpuAccess, Running, Runtime as _};
use pilotlight_proto::fleet::v1::{ContainerSpec, ReplicaAssignment};
use pilotlight_tests::container::{IMAGE, docker, image};

/// A stand-in for the driver's tool, which is denied its devices once a file `/denied` is there.
const TOOL: &str = r#"
#include <stdio.h>
#include <unistd.h>
int main(int count, char **words) {
    if (count != 2 || words[1][1] != 'L') return 2;
    if (access("/denied", F_OK) != 0) { puts("GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-0)"); return 0; }
    puts("Failed to initialize NVML: Unknown Error");
    return 255;
}
"#;

fn build_tool(directory: &Path) {
    let (source, binaries) = (directory.join("tool.c"), directory.join("root/usr/bin"));
    fs::create_dir_all(&binaries).unwrap();
    fs::write(&source, TOOL).unwrap();
    let built = Command::new("cc").arg("-static").arg(&source).arg("-o").arg(binaries.join("nvidia-smi")).status();
    assert!(built.unwrap().success());
}

/// A runtime on a node with one GPU, and a container that runs there without it.
async fn start(directory: &Path) -> (DockerRuntime, Running) {
    let settings = DockerSettings { gpus: [(0, "GPU-0".to_owned())].into(), ..DockerSettings::default() };
    let runtime = DockerRuntime::connect("node", directory, settings).await.unwrap();
    let command = vec!["/server".to_owned()];
    let container = ContainerSpec { image: IMAGE.to_owned(), command, ..Default::default() };
    let replica = format!("gpu-access-{}", uuid::Uuid::new_v4().simple());
    let assignment = ReplicaAssignment { replica, container: Some(container), ..Default::default() };
    runtime.prepare(&assignment, &|_| {}).await.unwrap();
    let running = runtime.start(&assignment, &[]).await.unwrap();
    (runtime, running)
}

async fn end(runtime: &DockerRuntime, running: &Running) {
    runtime.stop(running, Duration::from_millis(300)).await;
    runtime.remove(&running.replica).await;
}

#[tokio::test]
async fn a_container_that_is_denied_its_gpus_is_told_apart_from_one_that_cannot_say() {
    if image().is_none() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    build_tool(directory.path());
    let (runtime, mut running) = start(directory.path()).await;
    let id = running.container.clone().unwrap();
    let copy = |from: &Path, to: &str| {
        let (copied, said) = docker(&["cp", &from.display().to_string(), &format!("{id}:{to}")]);
        assert!(copied, "{said}");
    };
    let root = directory.path().join("root/.");

    copy(&root, "/");
    let without = runtime.gpu_access(&running).await;
    // This machine has no GPU that the engine could give; only the question is meant.
    running.assignment.gpu_indices = vec![0];
    let usable = runtime.gpu_access(&running).await;
    fs::write(directory.path().join("denied"), "").unwrap();
    copy(&directory.path().join("denied"), "/denied");
    let denied = runtime.gpu_access(&running).await;
    runtime.stop(&running, Duration::from_millis(300)).await;
    let stopped = runtime.gpu_access(&running).await;
    end(&runtime, &running).await;

    assert_eq!((without, usable, stopped), (GpuAccess::Unknown, GpuAccess::Usable, GpuAccess::Unknown));
    let GpuAccess::Denied(why) = denied else { panic!("{denied:?}") };
    assert_eq!(why, "nvidia-smi: exit code 255: Failed to initialize NVML: Unknown Error");
}

#[tokio::test]
async fn an_image_without_the_drivers_tool_and_a_shell_cannot_say() {
    if image().is_none() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (runtime, mut running) = start(directory.path()).await;
    running.assignment.gpu_indices = vec![0];
    let access = runtime.gpu_access(&running).await;
    end(&runtime, &running).await;
    assert_eq!(access, GpuAccess::Unknown);
}
