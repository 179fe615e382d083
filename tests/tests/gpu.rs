//! One machine with two GPUs, whose driver is a stand-in: errors quarantine a GPU, and memory of others is not given.

use pilotlight_tests::{
    cell::{Dev, Operator},
    cluster::Cluster,
    eventually,
    manifest::Iris,
    nvml::NvmlStub,
};
use serde_json::Value;

const GIB: u64 = 1 << 30;

fn node(operator: &Operator) -> Value {
    operator.json(&["get", "nodes"])["items"][0].clone()
}

/// Waits until a GPU is shown like this.
async fn gpu_is(operator: &Operator, index: usize, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
    eventually(&format!("GPU {index} {what}"), || async {
        let gpu = node(operator)["gpus"][index].clone();
        wanted(&gpu).then_some(gpu)
    })
    .await
}

fn gpu_of(replica: &Value) -> usize {
    replica["gpuIndices"][0].as_u64().unwrap() as usize
}

fn one_gpu(name: &'static str) -> String {
    Iris { name, gpus: 1, min_replicas: 1, max_replicas: 1, ..Iris::default() }.yaml()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gpu_with_a_fatal_xid_is_quarantined_until_an_operator_clears_it() {
    let stub = NvmlStub::with_h100(2);
    let library = format!("--nvml-library={}", stub.library().display());
    let mut dev = Dev::start(&[&library], vec![]).await;
    let operator = dev.operator.clone();
    let found = node(&operator);
    assert_eq!((found["simulated"].as_bool(), found["gpus"][1]["uuid"].as_str()), (Some(false), Some("GPU-1")));
    gpu_is(&operator, 1, "is healthy", |gpu| gpu["health"]["temperatureCelsius"] == 35).await;

    assert_eq!(operator.apply(&one_gpu("iris"), &[]).code, 0);
    let before = operator.replicas_are("iris", 1, "Ready").await.swap_remove(0);
    let (broken, other) = (gpu_of(&before), 1 - gpu_of(&before));
    stub.set(&format!("gpu.{broken}.used"), 4 * GIB);
    stub.set(&format!("gpu.{broken}.processes"), format!("{}:{}", before["pid"], 4 * GIB));
    eventually("the replica's GPU memory is shown", || async {
        (operator.replicas("iris")[0]["gpuMemoryBytes"] == 4 * GIB).then_some(())
    })
    .await;
    let described = operator.must(&["describe", "isvc", "iris"]);
    assert!(described.contains("GPU memory:") && described.contains("4.0 GiB   79.6 GiB"), "{described}");
    let gpu =
        gpu_is(&operator, broken, "is used by a replica", |gpu| gpu["health"]["memoryUsedBytes"] == 4 * GIB).await;
    assert_eq!(gpu["health"]["foreignMemoryBytes"], 0, "{gpu}");

    stub.set(&format!("gpu.{broken}.xids"), "31");
    gpu_is(&operator, broken, "has an application's XID", |gpu| gpu["health"]["xids"][0]["xid"] == 31).await;
    assert!(node(&operator)["gpus"][broken]["quarantine"].is_null());
    stub.set(&format!("gpu.{broken}.xids"), "31,79");
    let gpu = gpu_is(&operator, broken, "is quarantined", |gpu| !gpu["quarantine"].is_null()).await;
    assert_eq!(gpu["quarantine"]["reason"], "XidError");
    eventually("the replica has moved to the other GPU", || async {
        let replicas = operator.replicas("iris");
        let moved = |replica: &Value| replica["phase"] == "Ready" && gpu_of(replica) == other;
        (replicas.len() == 1 && moved(&replicas[0])).then_some(())
    })
    .await;
    let why = format!("GPU {broken} quarantined: XID 79: the GPU has fallen off the bus");
    for shown in [["get", "nodes"].as_slice(), &["describe", "node", "dev"]] {
        let shown = operator.must(shown);
        assert!(shown.contains(&why), "{shown}");
    }
    assert!(operator.must(&["describe", "node", "dev"]).contains("GpuQuarantined"));
    let events = operator.must(&["events", "iris"]);
    assert!(events.contains(&format!("GPU {broken} is quarantined: XID 79")), "{events}");

    // The stand-in would report the same XIDs to a new agent, which the driver does not.
    stub.set(&format!("gpu.{broken}.xids"), "");
    stub.set(&format!("gpu.{broken}.processes"), "");
    stub.set(&format!("gpu.{broken}.used"), 0);
    dev.kill_9();
    dev.restart().await;
    let gpu = gpu_is(&operator, broken, "is reported", |gpu| !gpu["health"].is_null()).await;
    assert_eq!(gpu["quarantine"]["reason"], "XidError", "it survives the coordinator");
    operator.replicas_are("iris", 1, "Ready").await;
    assert_eq!(operator.apply(&one_gpu("second"), &[]).code, 0);
    eventually("there is no place on the quarantined GPU", || async {
        operator.must(&["describe", "isvc", "second"]).contains("with fewer than 1 free GPUs").then_some(())
    })
    .await;

    let refused = operator.run(&["gpu", "unquarantine", "dev", "7"]);
    assert!(refused.code == 1 && refused.err.contains("known are 0 (GPU-0), 1 (GPU-1)"), "{}", refused.err);
    let cleared = operator.must(&["gpu", "unquarantine", "dev", &broken.to_string()]);
    assert_eq!(cleared, format!("gpu {broken} of node/dev unquarantined\n"));
    let replicas = operator.replicas_are("second", 1, "Ready").await;
    assert_eq!(gpu_of(&replicas[0]), broken);
    let refused = operator.run(&["gpu", "unquarantine", "dev", &format!("GPU-{broken}")]);
    assert!(refused.code == 1 && refused.err.contains("is not quarantined"), "{}", refused.err);
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_that_others_hold_is_not_given() {
    let stub = NvmlStub::with_h100(1);
    stub.set("gpu.0.used", 20 * GIB);
    // This test is no replica.
    stub.set("gpu.0.processes", format!("{}:{}", std::process::id(), 20 * GIB));
    let library = format!("--nvml-library={}", stub.library().display());
    let dev = Dev::start(&[&library], vec![]).await;
    let operator = &dev.operator;
    let gpu = gpu_is(operator, 0, "is used by others", |gpu| gpu["health"]["foreignMemoryBytes"] == 20 * GIB).await;
    assert_eq!(gpu["health"]["foreignProcesses"][0]["pid"], std::process::id());
    assert_eq!(operator.apply(&one_gpu("iris"), &[]).code, 0);
    eventually("the service waits for a GPU", || async {
        operator.must(&["describe", "isvc", "iris"]).contains("with fewer than 1 free GPUs").then_some(())
    })
    .await;
    let part = Iris { name: "part", annotations: vec![("pilotlight.dev/gpu-memory", "59Gi")], ..Iris::default() };
    assert_eq!(operator.apply(&Iris { min_replicas: 1, ..part }.yaml(), &[]).code, 0);
    operator.replicas_are("part", 1, "Ready").await;
    let listed = operator.must(&["gpu", "ls"]);
    assert!(listed.contains("used by other processes"), "{listed}");
    operator.must(&["delete", "isvc", "part"]);
    stub.set("gpu.0.used", 0);
    stub.set("gpu.0.processes", "");
    operator.replicas_are("iris", 1, "Ready").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quarantine_survives_a_fail_over_and_is_cleared_while_its_node_is_away() {
    let stub = NvmlStub::with_h100(1);
    let mut cluster = Cluster::start(1, 2).await;
    let mut agent = cluster.agent_with_driver("gpu-1", stub.library()).await;
    let operator = cluster.operator.clone();
    let reported = |errors: u64| move |gpu: &Value| gpu["health"]["eccUncorrectableErrors"] == errors;
    gpu_is(&operator, 0, "is healthy", reported(0)).await;
    stub.set("gpu.0.ecc", 2);
    let gpu = gpu_is(&operator, 0, "is quarantined", |gpu| !gpu["quarantine"].is_null()).await;
    assert_eq!(gpu["quarantine"]["reason"], "UncorrectableEccError");

    let leader = cluster.leader().await;
    cluster.coordinators[leader].kill_9();
    let next = gpu_is(&operator, 0, "is reported to the next leader", reported(2)).await;
    assert_eq!(next["quarantine"], gpu["quarantine"]);

    agent.kill_9();
    operator.must(&["gpu", "unquarantine", "gpu-1", "0"]);
    agent.restart(&operator).await;
    let gpu = gpu_is(&operator, 0, "is reported again", reported(2)).await;
    assert!(gpu["quarantine"].is_null(), "these errors are acknowledged: {gpu}");
    stub.set("gpu.0.ecc", 3);
    gpu_is(&operator, 0, "is quarantined again", |gpu| !gpu["quarantine"].is_null()).await;
}

#[test]
fn the_proof_on_a_gpu_host_says_clearly_that_there_is_no_gpu() {
    let directory = tempfile::tempdir().unwrap();
    let tool = directory.path().join("nvidia-smi");
    let path = std::env::var("PATH").unwrap();
    let path = format!("{}:{path}", directory.path().display());
    let run = |script: &str| {
        std::fs::write(&tool, script).unwrap();
        std::fs::set_permissions(&tool, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let proof = concat!(env!("CARGO_MANIFEST_DIR"), "/../scripts/gpu-proof.sh");
        let output = std::process::Command::new(proof).env("PATH", &path).output().unwrap();
        assert!(output.stdout.is_empty(), "it claims nothing: {}", String::from_utf8_lossy(&output.stdout));
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let said = run("#!/bin/sh\necho 'NVIDIA-SMI has failed'; exit 9\n");
    assert_eq!(said, (Some(2), "gpu-proof: no GPU here: nvidia-smi says: NVIDIA-SMI has failed\n".to_owned()));
    let said = run("#!/bin/sh\necho 'No devices found.'\n");
    assert_eq!(said, (Some(2), "gpu-proof: no GPU here: nvidia-smi -L lists none: No devices found.\n".to_owned()));
}
