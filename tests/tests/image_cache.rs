//! Images on a node's disk: those that an agent has pulled share its budget with models. Left out, with a
//! message, where no Docker Engine answers or there is no registry.

use pilotlight_tests::{
    cell::Dev,
    container::{build, docker},
    eventually,
    manifest::to_zero,
    registry::{Pushed, Registry},
    s3::S3,
};
use serde_json::Value;

const MIB: usize = 1 << 20;

/// A service at zero until it is asked for; idle, it sleeps.
fn service(name: &str, image: &str, min_replicas: u32) -> String {
    let containers = format!("    containers: [{{name: kserve-container, image: \"{image}\"}}]\n");
    to_zero(name, &[], &format!("    minReplicas: {min_replicas}\n{containers}"))
}

fn must(args: &[&str]) -> String {
    let (done, said) = docker(args);
    assert!(done, "{args:?}: {said}");
    said
}

/// Pushes images of one base layer and a layer of their own, and leaves none of them here.
fn push(registry: &Registry, names: &[&str]) -> Vec<Pushed> {
    let base = format!("pilotlight-layers:{}-{}", std::process::id(), names[0]);
    build(&base, &vec![7; 20 * MIB]);
    let directory = tempfile::tempdir().unwrap();
    let pushed = names.iter().map(|name| {
        let (file, local) = (directory.path().join(name), format!("{base}-{name}"));
        std::fs::write(&file, name.repeat(10 * MIB / name.len())).unwrap();
        let container = must(&["create", &base]).trim().to_owned();
        must(&["cp", &file.display().to_string(), &format!("{container}:/own")]);
        must(&["commit", &container, &local]);
        must(&["rm", &container]);
        let pushed = registry.push(&local, &format!("{name}:1"));
        must(&["rmi", &local]);
        pushed
    });
    let pushed = pushed.collect();
    must(&["rmi", &base]);
    pushed
}

fn here(image: &str) -> bool {
    docker(&["image", "inspect", image]).0
}

fn listed(dev: &Dev) -> Vec<Value> {
    let items = dev.operator.json(&["cache", "ls"])["items"].as_array().cloned().unwrap_or_default();
    items.into_iter().filter(|item| item["kind"] == "Image").collect()
}

fn image(dev: &Dev, name: &str) -> Option<Value> {
    listed(dev).into_iter().find(|image| image["uri"] == name)
}

async fn image_is(dev: &Dev, name: &str, is: impl Fn(&Value) -> bool) -> Value {
    eventually(&format!("{name} is listed as wanted"), || async { image(dev, name).filter(&is) }).await
}

async fn runs(dev: &Dev, name: &str, image: &str) {
    let applied = dev.operator.apply(&service(name, image, 1), &[]);
    assert_eq!(applied.code, 0, "{}", applied.err);
    dev.operator.replicas_are(name, 1, "Ready").await;
}

async fn gone(dev: &Dev, name: &str) {
    dev.operator.must(&["delete", "isvc", name]);
    dev.operator.replicas_are(name, 0, "").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn images_that_were_pulled_share_the_budget_and_no_other_image_is_touched() {
    let Some(registry) = Registry::start().await else { return };
    let [slept, unused, last, others] = &push(&registry, &["slept", "unused", "last", "others"])[..] else { panic!() };
    // Somebody else's.
    must(&["pull", &others.tag]);
    // Of two such images: 20 MiB and the program in common, and 10 MiB each.
    let mut dev = Dev::start(&["--runtime=docker", "--cache-budget=50MiB"], vec![]).await;

    assert_eq!(dev.operator.apply(&service("slept", &slept.tag, 0), &[]).code, 0);
    assert_eq!(dev.gateway.get("slept.default.localhost", "/").await.unwrap().status, 200);
    dev.operator.replicas_are("slept", 1, "Asleep").await;
    runs(&dev, "unused", &unused.tag).await;
    let there = image_is(&dev, &unused.tag, |image| image["inUse"] == true).await;
    assert!(there["bytes"].as_u64().unwrap() > 30 * MIB as u64, "{there}");
    assert!(unused.digest.ends_with(there["key"].as_str().unwrap()), "{there}");
    assert!(there["fetchSeconds"].as_f64().unwrap() > 0.0, "{there}");
    gone(&dev, "unused").await;
    image_is(&dev, &unused.tag, |image| image["inUse"] == false).await;
    assert!(here(&unused.tag), "both fit");

    dev.kill_9();
    dev.restart().await;
    image_is(&dev, &slept.tag, |image| image["inUse"] == true).await;
    image_is(&dev, &unused.tag, |image| image["inUse"] == false).await;
    let table = dev.operator.must(&["cache", "ls"]);
    assert!(table.lines().any(|line| line.contains("Image") && line.contains(&slept.tag)), "{table}");

    // Pulled again by the agent, and still not its own.
    let always = service("others", &others.tag, 1).replace("image:", "imagePullPolicy: Always, image:");
    assert_eq!(dev.operator.apply(&always, &[]).code, 0);
    dev.operator.replicas_are("others", 1, "Ready").await;
    gone(&dev, "others").await;
    runs(&dev, "last", &last.tag).await;
    eventually("the unused one is gone", || async { (!here(&unused.tag)).then_some(()) }).await;
    eventually("the list says so", || async { image(&dev, &unused.tag).is_none().then_some(()) }).await;
    assert!(here(&slept.tag) && here(&last.tag) && here(&others.tag));
    assert_eq!(listed(&dev).len(), 2, "others' are not listed: {:?}", listed(&dev));
    dev.operator.replicas_are("slept", 1, "Asleep").await;
    assert_eq!(dev.gateway.get("slept.default.localhost", "/").await.unwrap().status, 200);

    let refused = dev.operator.run(&["cache", "evict", &last.tag]);
    let replica = dev.operator.replicas("last")[0]["name"].as_str().unwrap().to_owned();
    assert_eq!(refused.code, 1);
    assert!(refused.err.contains(&format!("keeps {}: in use by {replica}\n", last.tag)), "{refused:?}");
    dev.operator.must(&["cache", "pin", &last.tag]);
    gone(&dev, "last").await;
    image_is(&dev, &last.tag, |image| image["pinned"] == true && image["inUse"] == false).await;
    let freed = dev.operator.must(&["cache", "evict", &last.tag]);
    assert!(freed.contains("10.0 MiB freed"), "what it shares with the other one stays: {freed}");
    assert!(!here(&last.tag));
    // Pulled ahead of need, before any service has it.
    dev.operator.must(&["cache", "warm", &last.tag]);
    image_is(&dev, &last.tag, |image| image["inUse"] == false && image["pinned"] == false).await;
    dev.operator.must(&["cache", "evict", &last.tag]);
    assert!(!here(&last.tag));
    let foreign = dev.operator.run(&["cache", "evict", &others.tag]);
    assert_eq!((foreign.code, foreign.err), (0, format!("{} is on no node.\n", others.tag)));
    gone(&dev, "slept").await;
    dev.operator.must(&["cache", "evict", &slept.tag]);
    assert!(!here(&slept.tag) && here(&others.tag));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_that_the_agent_did_not_outlive_is_known_to_the_next_one() {
    let Some(registry) = Registry::start().await else { return };
    let [came, before] = &push(&registry, &["came", "before"])[..] else { panic!() };
    let mut dev = Dev::start(&["--runtime=docker", "--cache-budget=30MiB"], vec![]).await;
    dev.kill_9();
    // As where both were being pulled, and the agent was killed before it could note what came; the second
    // was here before.
    must(&["pull", &before.tag]);
    let id = must(&["image", "inspect", "--format", "{{.Id}}", &before.tag]).trim().to_owned();
    must(&["pull", &came.tag]);
    let notes = serde_json::json!({"pulling": {came.tag.clone(): [id], before.tag.clone(): [id]}});
    std::fs::write(dev.data().join("agent/images.json"), notes.to_string()).unwrap();
    dev.restart().await;
    image_is(&dev, &came.tag, |image| image["inUse"] == false).await;
    assert_eq!(listed(&dev).len(), 1);

    let theirs = format!("pilotlight-theirs-{}:1", std::process::id());
    // A name that somebody else has given it keeps it.
    must(&["tag", &came.tag, &theirs]);
    let refused = dev.operator.run(&["cache", "evict", &came.tag]);
    assert!(refused.code == 1 && refused.err.contains(&format!("it is also named {theirs}")), "{refused:?}");
    assert!(here(&came.tag));
    must(&["rmi", &theirs]);
    dev.operator.must(&["cache", "evict", &came.tag]);
    assert!(!here(&came.tag) && here(&before.tag));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_finds_no_room_gets_it_from_the_image_of_a_sleeper() {
    let Some(registry) = Registry::start().await else { return };
    let [first, second] = &push(&registry, &["first", "second"])[..] else { panic!() };
    let s3 = S3::start().await;
    for (name, mib) in [("small", 10), ("large", 30)] {
        s3.put("models", &format!("{name}/model.bin"), &vec![9; mib * MIB]);
    }
    let dev = Dev::start(&["--runtime=auto", "--cache-budget=50MiB"], s3.env()).await;
    runs(&dev, "first", &first.tag).await;
    gone(&dev, "first").await;
    assert_eq!(dev.operator.apply(&service("second", &second.tag, 0), &[]).code, 0);
    assert_eq!(dev.gateway.get("second.default.localhost", "/").await.unwrap().status, 200);
    dev.operator.replicas_are("second", 1, "Asleep").await;
    assert!(here(&first.tag), "both fit");

    // The image that nobody uses goes at once.
    let files = |name: &str| {
        service(name, "none", 1).replace(
            "image: \"none\"",
            &format!(
                "command: [python3, -m, http.server, $(PORT), --bind, 127.0.0.1, --directory, /mnt/models], \
                 env: [{{name: STORAGE_URI, value: \"s3://models/{name}\"}}]"
            ),
        )
    };
    assert_eq!(dev.operator.apply(&files("small"), &[]).code, 0);
    dev.operator.replicas_are("small", 1, "Ready").await;
    assert!(!here(&first.tag) && here(&second.tag));
    dev.operator.replicas_are("second", 1, "Asleep").await;

    // The other one's sleeper has to leave first.
    assert_eq!(dev.operator.apply(&files("large"), &[]).code, 0);
    dev.operator.replicas_are("large", 1, "Ready").await;
    dev.operator.replicas_are("second", 0, "").await;
    assert!(!here(&second.tag));
    assert!(listed(&dev).is_empty());
    gone(&dev, "small").await;
    gone(&dev, "large").await;
}
