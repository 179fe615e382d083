//! One version follows another: by a canary, back again, and without a second set of GPUs.

use std::collections::BTreeSet;

use pilotlight_tests::{
    cell::{Dev, Operator},
    eventually,
    load::{Answers, Client},
    manifest::{Iris, TWO_FLOWERS},
};
use serde_json::Value;

const HOST: &str = "iris.default.localhost";
const PREDICT: &str = "/v1/models/iris:predict";
const V1: &str = "iris-predictor-00001";
const V2: &str = "iris-predictor-00002";

/// A version that says its name in each answer and is ready with one replica.
fn version(name: &'static str) -> Iris {
    Iris {
        min_replicas: 1,
        max_replicas: 2,
        container_concurrency: 0,
        flags: vec!["--served-by", name],
        annotations: vec![("autoscaling.knative.dev/initial-scale", "1")],
        ..Iris::default()
    }
}

/// A version whose process ends at once.
fn broken() -> Iris {
    let mut broken = Iris { flags: vec!["--port", "none"], ..version("broken") };
    broken.annotations.push(("serving.knative.dev/progress-deadline", "4s"));
    broken
}

fn apply(operator: &Operator, iris: &Iris) {
    let printed = operator.apply(&iris.yaml(), &[]);
    assert_eq!(printed.code, 0, "{}{}", printed.out, printed.err);
    assert!(!printed.err.contains("not honoured"), "{}", printed.err);
}

fn condition(service: &Value, name: &str) -> Value {
    let conditions = service["status"]["conditions"].as_array().cloned().unwrap_or_default();
    conditions.into_iter().find(|condition| condition["type"] == name).unwrap_or_default()
}

/// Revisions and percents, as status has them.
fn traffic(service: &Value) -> Vec<(String, u64)> {
    let targets = service["status"]["components"]["predictor"]["traffic"].as_array().cloned().unwrap_or_default();
    let share = |target: &Value| Some((target["revisionName"].as_str()?.to_owned(), target["percent"].as_u64()?));
    targets.iter().filter_map(share).collect()
}

async fn traffic_is(dev: &Dev, expected: &[(&str, u64)]) -> Value {
    eventually(&format!("traffic is {expected:?}"), || async {
        let service = dev.operator.json(&["get", "isvc", "iris"]);
        let traffic = traffic(&service);
        let same = traffic.iter().map(|(name, percent)| (name.as_str(), *percent)).eq(expected.iter().copied());
        same.then_some(service)
    })
    .await
}

/// Waits until a version answers all requests, or as many as it should.
async fn answered_by(client: &Client, version: &str) {
    eventually(&format!("{version} answers"), || async {
        client.take();
        client.burst(20).await;
        (client.take().of(version) > 0).then_some(())
    })
    .await;
}

/// Asserts a share within 1 % of what it should be.
fn share_is(answers: &Answers, version: &str, percent: f64) {
    let expected = f64::from(answers.total()) * percent / 100.0;
    let off = (f64::from(answers.of(version)) - expected).abs();
    assert!(off <= expected * 0.01, "{version} should have {percent}%: {answers:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_canary_grows_and_is_rolled_back_and_no_request_fails() {
    let dev = Dev::start(&[], vec![]).await;
    apply(&dev.operator, &version("v1"));
    dev.operator.replicas_are("iris", 1, "Ready").await;
    let client = Client::new(&dev.gateway, HOST, PREDICT);
    let load = client.constantly(50);

    apply(&dev.operator, &Iris { canary: Some(10), ..version("v2") });
    let service = traffic_is(&dev, &[(V2, 10), (V1, 90)]).await;
    assert_eq!(condition(&service, "Ready")["status"], "True");
    let predictor = &service["status"]["components"]["predictor"];
    assert_eq!(predictor["latestRolledoutRevision"], V1);
    assert_eq!(
        (&predictor["traffic"][1]["tag"], &predictor["traffic"][0]["latestRevision"]),
        (&"prev".into(), &true.into())
    );
    answered_by(&client, "v2").await;
    client.take();
    client.burst(20_000).await;
    let answers = client.take();
    assert!(answers.total() >= 20_000);
    share_is(&answers, "v2", 10.0);

    apply(&dev.operator, &Iris { canary: Some(50), ..version("v2") });
    traffic_is(&dev, &[(V2, 50), (V1, 50)]).await;
    let table = dev.operator.must(&["get", "isvc"]);
    let columns: Vec<_> = table.lines().next().unwrap().split_whitespace().collect();
    let kubectl = ["NAME", "URL", "READY", "PREV", "LATEST", "PREVROLLEDOUTREVISION", "LATESTREADYREVISION"];
    assert_eq!(columns, [&kubectl[..], &["REPLICAS", "AGE"]].concat());
    let row: Vec<_> = table.lines().nth(1).unwrap().split_whitespace().skip(2).take(5).collect();
    assert_eq!(row, ["True", "50", "50", V1, V2]);
    client.take();
    client.burst(2_000).await;
    share_is(&client.take(), "v2", 50.0);

    assert!(dev.operator.must(&["rollout", "promote", "iris"]).contains(&format!("promoted: 100% to {V2}")));
    let service = traffic_is(&dev, &[(V2, 100)]).await;
    let predictor = &service["status"]["components"]["predictor"];
    assert_eq!(predictor["latestRolledoutRevision"], V2);
    assert_eq!(predictor["previousRolledoutRevision"], V1);
    // The former revision goes to zero, so that the way back is the longest one.
    eventually("only the new revision has replicas", || async {
        let replicas = dev.operator.replicas("iris");
        (!replicas.is_empty() && replicas.iter().all(|replica| replica["revision"] == V2)).then_some(())
    })
    .await;
    client.take();
    client.burst(500).await;
    share_is(&client.take(), "v2", 100.0);

    assert!(dev.operator.must(&["rollout", "undo", "iris"]).contains(&format!("100% to {V1}")));
    traffic_is(&dev, &[(V2, 0), (V1, 100)]).await;
    answered_by(&client, "v1").await;
    client.take();
    client.burst(500).await;
    share_is(&client.take(), "v1", 100.0);
    drop(load);
    assert_eq!(client.failures(), Vec::<String>::new(), "no request fails");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_revision_leaves_the_last_good_one_serving_and_says_why() {
    let dev = Dev::start(&[], vec![]).await;
    apply(&dev.operator, &version("v1"));
    dev.operator.replicas_are("iris", 1, "Ready").await;
    let before = eventually("the service is ready", || async {
        let service = dev.operator.json(&["get", "isvc", "iris"]);
        (condition(&service, "Ready")["status"] == "True").then_some(service)
    })
    .await;
    let client = Client::new(&dev.gateway, HOST, PREDICT);
    let load = client.constantly(50);

    apply(&dev.operator, &broken());
    let service = eventually("the revision is given up", || async {
        let service = dev.operator.json(&["get", "isvc", "iris"]);
        (condition(&service, "PredictorReady")["reason"] == "ProgressDeadlineExceeded").then_some(service)
    })
    .await;
    let predictor = condition(&service, "PredictorReady");
    assert_eq!(predictor["status"], "False");
    assert!(predictor["message"].as_str().unwrap().contains("exit code 2"), "{predictor}");
    assert_eq!(condition(&service, "Ready")["status"], "False");
    assert_eq!(condition(&service, "IngressReady")["status"], "True", "requests still find their way");
    let since = |service: &Value| condition(service, "IngressReady")["lastTransitionTime"].clone();
    assert_eq!(since(&service), since(&before), "and have done so since before");
    assert_eq!(service["status"]["modelStatus"]["transitionStatus"], "BlockedByFailedLoad");
    let failure = &service["status"]["modelStatus"]["lastFailureInfo"];
    assert_eq!((&failure["reason"], &failure["exitCode"]), (&"ModelLoadFailed".into(), &2.into()), "{failure}");
    assert_eq!(traffic(&service), [(V1.to_owned(), 100)]);

    let replicas = dev.operator.replicas_are("iris", 1, "Ready").await;
    assert_eq!(replicas[0]["revision"], V1, "the broken one has none");
    let described = dev.operator.must(&["describe", "isvc", "iris"]);
    assert!(described.contains("Warning   ProgressDeadlineExceeded"), "{described}");
    let status = dev.operator.run(&["rollout", "status", "iris"]);
    assert_eq!(status.code, 1, "{}", status.out);
    assert!(status.err.contains("exit code 2"), "{}", status.err);

    // Another template is another try.
    apply(&dev.operator, &version("v3"));
    let done = dev.operator.must(&["rollout", "status", "iris"]);
    assert_eq!(done, "rolled out: iris-predictor-00003: 100% to iris-predictor-00003\n");
    answered_by(&client, "v3").await;
    drop(load);
    assert_eq!(client.failures(), Vec::<String>::new(), "no request fails");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_roll_out_needs_no_second_set_of_gpus() {
    let dev = Dev::start(&["--simulate-gpus=2"], vec![]).await;
    let of = |name| Iris { min_replicas: 2, gpus: 1, ..version(name) };
    apply(&dev.operator, &of("v1"));
    dev.operator.replicas_are("iris", 2, "Ready").await;
    let client = Client::new(&dev.gateway, HOST, PREDICT);
    let load = client.constantly(50);
    apply(&dev.operator, &of("v2"));
    let mut fewest = usize::MAX;
    loop {
        let replicas = dev.operator.replicas("iris");
        let ready: Vec<_> = replicas.iter().filter(|replica| replica["phase"] == "Ready").collect();
        fewest = fewest.min(ready.len());
        if ready.len() == 2 && ready.iter().all(|replica| replica["revision"] == V2) {
            break;
        }
    }
    assert!(fewest >= 1, "somebody always serves");
    assert!(dev.operator.must(&["describe", "isvc", "iris"]).contains("MakingRoom"));
    traffic_is(&dev, &[(V2, 100)]).await;
    client.burst(100).await;
    drop(load);
    assert_eq!(client.failures(), Vec::<String>::new(), "no request fails");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_only_gpu_changes_hands_where_a_gap_is_allowed() {
    let dev = Dev::start(&["--simulate-gpus=1"], vec![]).await;
    let of = |name| Iris { gpus: 1, ..version(name) };
    apply(&dev.operator, &of("v1"));
    dev.operator.replicas_are("iris", 1, "Ready").await;
    let client = Client::new(&dev.gateway, HOST, PREDICT);
    let load = client.constantly(50);
    apply(&dev.operator, &of("v2"));
    eventually("the condition says what to do", || async {
        let service = dev.operator.json(&["get", "isvc", "iris"]);
        let predictor = condition(&service, "PredictorReady");
        let message = predictor["message"].as_str()?.to_owned();
        (predictor["reason"] == "Unschedulable" && message.contains("pilotlight.dev/max-unavailable")).then_some(())
    })
    .await;
    assert_eq!(traffic(&dev.operator.json(&["get", "isvc", "iris"])), [(V1.to_owned(), 100)]);

    let mut allowed = of("v2");
    allowed.annotations.push(("pilotlight.dev/max-unavailable", "1"));
    apply(&dev.operator, &allowed);
    traffic_is(&dev, &[(V2, 100)]).await;
    answered_by(&client, "v2").await;
    drop(load);
    assert_eq!(client.failures(), Vec::<String>::new(), "requests of the gap wait and are answered");
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_stick_and_tags_lead_to_one_revision() {
    let dev = Dev::start(&[], vec![]).await;
    let of = |name, canary| {
        let mut of = Iris { canary, ..version(name) };
        of.annotations
            .extend([("serving.kserve.io/enable-tag-routing", "true"), ("pilotlight.dev/sticky-header", "X-User")]);
        of
    };
    apply(&dev.operator, &of("v1", None));
    dev.operator.replicas_are("iris", 1, "Ready").await;
    apply(&dev.operator, &of("v2", Some(50)));
    let service = traffic_is(&dev, &[(V2, 50), (V1, 50)]).await;
    let url = service["status"]["components"]["predictor"]["traffic"][0]["url"].as_str().unwrap().to_owned();
    assert!(url.starts_with("http://latest-iris.default.localhost"), "{url}");
    answered_by(&Client::new(&dev.gateway, HOST, PREDICT), "v2").await;

    for (tag, version) in [("latest", "v2"), ("prev", "v1")] {
        for name in ["iris", "iris-predictor"] {
            for _ in 0..4 {
                let host = format!("{tag}-{name}.default.localhost");
                let answer = dev.gateway.post(&host, PREDICT, TWO_FLOWERS).await.unwrap();
                assert_eq!(answer.headers["x-served-by"], version, "{host}");
            }
        }
    }
    let mut seen = BTreeSet::new();
    for user in 0..20 {
        let mut versions = BTreeSet::new();
        for _ in 0..4 {
            let request = hyper::Request::post(PREDICT).header("x-user", format!("user-{user}"));
            let answer = dev.gateway.send(HOST, request, TWO_FLOWERS).await.unwrap();
            versions.insert(answer.headers["x-served-by"].to_str().unwrap().to_owned());
        }
        assert_eq!(versions.len(), 1, "user {user} stays where they are: {versions:?}");
        seen.extend(versions);
    }
    assert_eq!(seen.len(), 2, "of twenty users some are here, some there");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_service_has_no_replicas_until_it_is_started_again() {
    let dev = Dev::start(&[], vec![]).await;
    apply(&dev.operator, &version("v1"));
    dev.operator.replicas_are("iris", 1, "Ready").await;
    let mut stopped = version("v1");
    stopped.annotations.push(("serving.kserve.io/stop", "true"));
    apply(&dev.operator, &stopped);
    dev.operator.replicas_are("iris", 0, "").await;
    let service = dev.operator.json(&["get", "isvc", "iris"]);
    assert_eq!(condition(&service, "Stopped")["status"], "True");
    assert_eq!(condition(&service, "Ready")["status"], "False");
    let refused = dev.gateway.post(HOST, PREDICT, TWO_FLOWERS).await.unwrap();
    assert_eq!(refused.status, 503);

    apply(&dev.operator, &version("v1"));
    dev.operator.replicas_are("iris", 1, "Ready").await;
    let service = dev.operator.json(&["get", "isvc", "iris"]);
    assert_eq!(condition(&service, "Stopped")["status"], "False");
    assert_eq!(service["status"]["components"]["predictor"]["latestReadyRevision"], V1, "the same revision");
    assert_eq!(dev.gateway.post(HOST, PREDICT, TWO_FLOWERS).await.unwrap().status, 200);
}
