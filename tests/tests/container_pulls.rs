//! Images from a real registry. Left out, with a message, where there is no Docker Engine or no registry.

use std::{
    collections::BTreeSet,
    sync::atomic::{AtomicU64, Ordering},
};

use pilotlight_tests::{
    cell::{Dev, Operator},
    container::{build, docker, labelled, left_out, noise},
    eventually,
    registry::{PASSWORD, Pushed, Registry},
};
use serde_json::Value;

const MIB: usize = 1 << 20;

/// A service of an image, with further fields of its container and of its predictor.
fn service(name: &str, image: &str, container: &str, predictor: &str) -> String {
    format!(
        "apiVersion: serving.kserve.io/v1beta1\nkind: InferenceService\nmetadata: {{name: {name}}}\nspec:\n  predictor:\n    \
         minReplicas: 1\n    maxReplicas: 1\n{predictor}    containers:\n    - name: kserve-container\n      \
         image: \"{image}\"\n{container}"
    )
}

fn policy(policy: &str) -> String {
    format!("      imagePullPolicy: {policy}\n")
}

/// Another name for each run: containers and images are the whole machine's.
fn unique(name: &str) -> String {
    format!("{name}-{}", std::process::id())
}

/// An image with a layer of its own of so many bytes, in the registry and not on this machine.
fn pushed(registry: &Registry, name: &str, bytes: usize) -> Pushed {
    let local = unique(&name.replace(':', "-"));
    build(&local, &noise(bytes));
    let pushed = registry.push(&local, name);
    let (removed, said) = docker(&["rmi", &local]);
    assert!(removed, "{said}");
    pushed
}

fn containers(service: &str) -> Vec<String> {
    labelled(&format!("pilotlight.dev/service={service}"))
}

/// The image that the service's one container runs.
fn runs(service: &str) -> String {
    let [container] = containers(service).try_into().unwrap_or_else(|all| panic!("{service} has {all:?}"));
    docker(&["inspect", "--format", "{{.Image}}", &container]).1
}

fn apply(operator: &Operator, manifest: &str) {
    let applied = operator.apply(manifest, &["--strict"]);
    assert_eq!(applied.code, 0, "{}", applied.err);
}

fn replica(operator: &Operator, service: &str) -> Value {
    operator.replicas(service).into_iter().next().unwrap_or_default()
}

/// Waits until the service's replica has failed with this message, and its service says why. The replica.
async fn fails(operator: &Operator, service: &str, reason: &str, said: &str) -> Value {
    eventually(&format!("{service} fails: {reason}, {said}"), || async {
        let replica = replica(operator, service);
        let ready = condition(operator, service)?;
        let failed = replica["phase"] == "Failed" && ready["status"] == "False" && ready["reason"] == reason;
        let says = |message: &Value| message.as_str().is_some_and(|message| message.contains(said));
        (failed && says(&replica["message"]) && says(&ready["message"])).then_some(replica)
    })
    .await
}

/// Whether its predictor is ready, and if not, why.
fn condition(operator: &Operator, service: &str) -> Option<Value> {
    let service = operator.json(&["get", "isvc", service]);
    let conditions = service["status"]["conditions"].as_array()?;
    conditions.iter().find(|condition| condition["type"] == "PredictorReady").cloned()
}

async fn delete(operator: &Operator, service: &str) {
    operator.must(&["delete", "isvc", service]);
    operator.replicas_are(service, 0, "").await;
    assert!(containers(service).is_empty(), "nothing is left of {service}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_comes_by_digest_and_how_far_it_is_is_said() {
    let Some(registry) = Registry::start().await else { return };
    let image = pushed(&registry, "model-server:1", 32 * MIB);
    let dev = Dev::start(&["--runtime=docker"], vec![]).await;
    let (operator, name) = (&dev.operator, unique("digest"));
    let how_far = async || {
        eventually("it says how far the pull is", || async {
            let replica = replica(operator, &name);
            let how_far = replica["message"].as_str()?.strip_prefix(&format!("pulling image {}: ", image.digest))?;
            assert_eq!(replica["phase"], "Pending", "{replica}");
            let (here, all) = how_far.split_once(" of ")?;
            let all: f64 = all.strip_suffix(" MiB")?.parse().ok()?;
            // The server itself is part of it.
            assert!((32.0..40.0).contains(&all), "{how_far}");
            Some(here.to_owned())
        })
        .await
    };
    registry.relay().hold_after(10 << 20);
    apply(operator, &service(&name, &image.digest, "", ""));
    registry.relay().holds().await;
    how_far().await;
    // The engine tells something ten times per second at most: not what comes at once before it is held.
    registry.relay().hold_after(10 << 20);
    eventually("it says more", || async {
        let here: f64 = how_far().await.strip_suffix(" MiB")?.parse().ok()?;
        (9.0..=20.0).contains(&here).then_some(())
    })
    .await;
    assert!(operator.must(&["describe", "isvc", &name]).contains("pulling image"));
    assert!(containers(&name).is_empty());
    registry.relay().release();
    let ready = operator.replicas_are(&name, 1, "Ready").await.remove(0);
    assert_eq!(ready["rungBefore"], "Absent", "{ready}");
    let answer = dev.gateway.get(&format!("{name}.default.localhost"), "/").await.unwrap();
    assert_eq!(answer.status, 200, "{}", answer.body);
    assert_eq!(runs(&name), docker(&["inspect", "--format", "{{.Id}}", &image.digest]).1);
    delete(operator, &name).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_pull_policy_decides_whether_the_registry_is_asked() {
    let Some(mut registry) = Registry::start().await else { return };
    let first = pushed(&registry, "moves:1", 1);
    let dev = Dev::start(&["--runtime=docker"], vec![]).await;
    let operator = &dev.operator;
    let [never, there, always, gone, asks] = ["never", "there", "always", "gone", "asks"].map(unique);
    apply(operator, &service(&never, &first.tag, &policy("Never"), ""));
    fails(operator, &never, "ErrImageNeverPull", &format!("image {} is not on this node", first.tag)).await;
    apply(operator, &service(&there, &first.tag, &policy("IfNotPresent"), ""));
    operator.replicas_are(&there, 1, "Ready").await;
    let old = runs(&there);
    // It is there now, whoever had it pulled.
    operator.replicas_are(&never, 1, "Ready").await;
    assert_eq!(runs(&never), old);
    delete(operator, &there).await;

    // The tag moves. (By a push from this machine, which moves it here, too: back to what it was.)
    let second = pushed(&registry, "moves:1", 1);
    assert_ne!(first.digest, second.digest);
    assert!(docker(&["tag", old.trim(), &first.tag]).0);
    apply(operator, &service(&there, &first.tag, &policy("IfNotPresent"), ""));
    operator.replicas_are(&there, 1, "Ready").await;
    assert_eq!(runs(&there), old, "what is here is good enough");
    apply(operator, &service(&always, &first.tag, &policy("Always"), ""));
    operator.replicas_are(&always, 1, "Ready").await;
    assert_eq!(runs(&always), docker(&["inspect", "--format", "{{.Id}}", &second.digest]).1);
    assert_ne!(runs(&always), old);

    registry.stop();
    apply(operator, &service(&gone, &first.tag, &policy("IfNotPresent"), ""));
    operator.replicas_are(&gone, 1, "Ready").await;
    apply(operator, &service(&asks, &first.tag, &policy("Always"), ""));
    fails(operator, &asks, "ImagePullBackOff", "connection refused").await;
    for name in [never, there, always, gone, asks] {
        delete(operator, &name).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_gives_nothing_without_credentials() {
    let Some(registry) = Registry::start_with_login().await else { return };
    let image = pushed(&registry, "closed:1", 1);
    let dev = Dev::start(&["--runtime=docker"], vec![]).await;
    let (operator, name) = (&dev.operator, unique("closed"));
    let secret = |config: &str| {
        let config = serde_json::to_string(config).unwrap();
        format!(
            "apiVersion: v1\nkind: Secret\nmetadata: {{name: registry}}\ntype: kubernetes.io/dockerconfigjson\n\
             stringData: {{.dockerconfigjson: {config}}}\n"
        )
    };
    let manifest = service(&name, &image.digest, "", "    imagePullSecrets: [{name: registry}]\n");
    apply(operator, &manifest);
    fails(operator, &name, "ImagePullBackOff", "no basic auth credentials").await;
    let wrong = registry.docker_config().replace(PASSWORD, "another-password");
    apply(operator, &secret(&wrong));
    let said = eventually("the registry refuses them", || async {
        let message = replica(operator, &name)["message"].as_str()?.to_owned();
        message.contains("unauthorized").then_some(message)
    })
    .await;
    assert!(!said.contains("another-password"), "{said}");
    apply(operator, &secret(&registry.docker_config()));
    let ready = operator.replicas_are(&name, 1, "Ready").await.remove(0);

    // What the next agent process reads of the replica is no place for credentials.
    let records = dev.data().join("agent/replicas").join(ready["name"].as_str().unwrap());
    let record = std::fs::read_to_string(records.join("state.json")).unwrap();
    let hex = PASSWORD.bytes().map(|byte| format!("{byte:02x}")).collect::<String>();
    assert!(record.contains("assignment") && !record.contains(&hex), "{record}");
    delete(operator, &name).await;
    registry.remove_local();

    // The node's own.
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), registry.docker_config()).unwrap();
    let own = format!("--registry-config={}", file.path().display());
    let dev = Dev::start(&["--runtime=docker", &own], vec![]).await;
    apply(&dev.operator, &service(&name, &image.tag, "", ""));
    dev.operator.replicas_are(&name, 1, "Ready").await;
    delete(&dev.operator, &name).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tag_that_is_missing_is_said_and_asked_for_with_growing_pauses() {
    let Some(registry) = Registry::start().await else { return };
    let dev = Dev::start(&["--runtime=docker", "--simulate-gpus=1"], vec![]).await;
    let (operator, name) = (&dev.operator, unique("missing"));
    let image = format!("{}/missing:1", registry.host());
    let limits = "      resources: {limits: {nvidia.com/gpu: 1}}\n";
    apply(operator, &service(&name, &image, limits, ""));
    for (restarts, pause) in [(2, "10s"), (3, "20s")] {
        let again = format!("started again in {pause}");
        let replica = fails(operator, &name, "ImagePullBackOff", &again).await;
        assert_eq!(replica["restarts"], restarts, "{replica}");
        let said = replica["message"].as_str().unwrap();
        assert!(said.contains(&format!("cannot pull image {image}: ")) && said.contains("manifest unknown"), "{said}");
    }
    pushed(&registry, "missing:1", 1);
    operator.replicas_are(&name, 1, "Ready").await;
    delete(operator, &name).await;
    let nodes = operator.json(&["get", "nodes"]);
    assert_eq!(nodes["items"][0]["gpus"][0]["replicas"], serde_json::json!([]), "{nodes}");
}

/// Files in which the engine has what it is pulling. `None` where they cannot be looked at, which is said.
fn pulling() -> Option<BTreeSet<String>> {
    let (_, root) = docker(&["info", "--format", "{{.DockerRootDir}}"]);
    let Ok(entries) = std::fs::read_dir(std::path::Path::new(root.trim()).join("tmp")) else {
        left_out("the engine's directory cannot be read", "its files");
        return None;
    };
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    Some(names.filter(|name| name.starts_with("GetImageBlob")).collect())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_killed_in_the_middle_of_a_pull_leaves_nothing_and_pulls_anew() {
    const SIZE: usize = 128 * MIB;
    let Some(registry) = Registry::start().await else { return };
    let image = pushed(&registry, "large:1", SIZE);
    let mut dev = Dev::start(&["--runtime=docker", "--simulate-gpus=1"], vec![]).await;
    let name = unique("pulled");
    let manifest = service(&name, &image.digest, "      resources: {limits: {nvidia.com/gpu: 1}}\n", "");
    // While it is asked for, early, late, and while the last of it is unpacked.
    for bytes in [0, MIB, SIZE / 2, SIZE] {
        let before = pulling();
        registry.relay().hold_after(bytes as u64);
        apply(&dev.operator, &manifest);
        registry.relay().holds().await;
        let files = || Some(&pulling()? - before.as_ref()?);
        let during = files();
        if bytes == SIZE {
            registry.relay().release();
            let passed = AtomicU64::new(0);
            eventually("all of it has come", || async {
                let now = registry.relay().passed();
                (passed.swap(now, Ordering::Relaxed) == now).then_some(())
            })
            .await;
        }
        dev.kill_9();
        if bytes < SIZE {
            assert!(during.as_ref().is_none_or(|files| files.is_empty() == (bytes == 0)), "{bytes}: {during:?}");
            assert!(!docker(&["inspect", &image.digest]).0, "{bytes}: it is not here yet");
        }
        eventually("the engine gives up what it was pulling", || async {
            files().is_none_or(|now| during.as_ref().is_none_or(|during| now.is_disjoint(during))).then_some(())
        })
        .await;
        assert!(containers(&name).is_empty());
        registry.relay().release();
        dev.restart().await;
        dev.operator.replicas_are(&name, 1, "Ready").await;
        assert_eq!(runs(&name), docker(&["inspect", "--format", "{{.Id}}", &image.digest]).1, "{bytes}");
        let answer = dev.gateway.get(&format!("{name}.default.localhost"), "/").await.unwrap();
        assert_eq!(answer.status, 200, "{bytes}: {}", answer.body);
        delete(&dev.operator, &name).await;
        let nodes = dev.operator.json(&["get", "nodes"]);
        assert_eq!(nodes["items"][0]["gpus"][0]["replicas"], serde_json::json!([]), "{nodes}");
        registry.remove_local();
        assert!(!docker(&["inspect", &image.digest]).0, "{bytes}: nothing keeps it here");
    }
}
