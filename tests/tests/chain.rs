//! A transformer, a predictor and an explainer: each with replicas of its own, each waking by itself.

use pilotlight_tests::cell::Dev;
use serde_json::{Value, json};

const CHAIN: &str = include_str!("../../deploy/examples/iris-chain.yaml");
const HOST: &str = "iris-chain.default.localhost";
const PREDICT: &str = "/v1/models/iris-chain:predict";
const EXPLAIN: &str = "/v1/models/iris-chain:explain";
const NAMED: &str =
    r#"{"instances": [{"sepal length": 6.8, "sepal width": 2.8, "petal length": 4.8, "petal width": 1.4}]}"#;
const ROWS: &str = r#"{"instances": [[5.1, 3.5, 1.4, 0.2]]}"#;

/// How many replicas of a component are ready.
fn ready(dev: &Dev, component: &str) -> usize {
    let name = format!("iris-chain-{component}-");
    let replicas = dev.operator.replicas("iris-chain");
    let of = replicas.iter().filter(|replica| replica["name"].as_str().is_some_and(|own| own.starts_with(&name)));
    of.filter(|replica| replica["phase"] == "Ready").count()
}

fn condition(service: &Value, name: &str) -> String {
    let conditions = service["status"]["conditions"].as_array().cloned().unwrap_or_default();
    let found = conditions.iter().find(|condition| condition["type"] == name).map(|found| found["status"].clone());
    found.unwrap_or_default().as_str().unwrap_or("absent").to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_pass_the_transformer_and_explanations_come_from_the_explainer() {
    let dev = Dev::start(&[], vec![]).await;
    let applied = dev.operator.apply(CHAIN, &["--strict"]);
    assert_eq!(applied.code, 0, "{}", applied.err);
    assert!(dev.operator.replicas("iris-chain").is_empty(), "born at zero");

    // Through the transformer: names in, names out. Both wake.
    let answer = dev.gateway.post(HOST, PREDICT, NAMED).await.unwrap();
    assert_eq!(answer.json(), json!({"predictions": ["versicolor"]}));
    let awake = ["transformer", "predictor", "explainer"].map(|component| ready(&dev, component));
    assert_eq!(awake, [1, 1, 0], "only what was needed");
    let by_path = dev.gateway.post("elsewhere", &format!("/serving/default/iris-chain{PREDICT}"), NAMED).await.unwrap();
    assert_eq!(by_path.json(), json!({"predictions": ["versicolor"]}));

    // Each component has a host of its own.
    let direct = dev.gateway.post("iris-chain-predictor.default.localhost", PREDICT, ROWS).await.unwrap();
    assert_eq!(direct.json(), json!({"predictions": [0]}));

    let explained = dev.gateway.post(HOST, EXPLAIN, ROWS).await.unwrap();
    assert_eq!(explained.json()["explanations"][0]["prediction"], "setosa", "{}", explained.body);
    assert_eq!(ready(&dev, "explainer"), 1);

    let service = dev.operator.json(&["get", "isvc", "iris-chain"]);
    for name in ["Ready", "PredictorReady", "TransformerReady", "ExplainerReady", "ExplainerRoutesReady"] {
        assert_eq!(condition(&service, name), "True", "{name}: {}", service["status"]);
    }
    let components = service["status"]["components"].as_object().unwrap();
    assert_eq!(components.keys().collect::<Vec<_>>(), ["explainer", "predictor", "transformer"]);
    assert_eq!(components["transformer"]["latestReadyRevision"], "iris-chain-transformer-00001");

    dev.operator.replicas_are("iris-chain", 3, "Asleep").await;
    let again = dev.gateway.post(HOST, PREDICT, NAMED).await.unwrap();
    assert_eq!(again.json(), json!({"predictions": ["versicolor"]}), "the whole chain wakes");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_transformer_makes_a_revision_of_its_own_and_can_be_taken_out() {
    let mut dev = Dev::start(&[], vec![]).await;
    let bare = CHAIN.split("  explainer:").next().unwrap();
    assert_eq!(dev.operator.apply(bare, &[]).code, 0);
    assert_eq!(dev.gateway.post(HOST, PREDICT, NAMED).await.unwrap().status, 200);

    // Replicas outlive the agent, and a transformer still finds its predictor. What asks before the agent has
    // its routes again is held.
    dev.kill_9();
    dev.restart().await;
    let answer = dev.gateway.post(HOST, PREDICT, NAMED).await.unwrap();
    assert_eq!(answer.json(), json!({"predictions": ["versicolor"]}));

    let changed = bare.replace("iris-transformer]", "iris-transformer, --workers, '2']");
    assert_eq!(dev.operator.apply(&changed, &[]).code, 0);
    let service = dev.operator.json(&["get", "isvc", "iris-chain"]);
    let newest = |component: &str| service["status"]["components"][component]["latestCreatedRevision"].clone();
    assert_eq!(newest("transformer"), "iris-chain-transformer-00002");
    assert_eq!(newest("predictor"), "iris-chain-predictor-00001");
    assert_eq!(dev.gateway.post(HOST, PREDICT, NAMED).await.unwrap().status, 200);

    // Without it, requests go to the predictor as they are.
    let alone = bare.split("  transformer:").next().unwrap();
    assert_eq!(dev.operator.apply(alone, &[]).code, 0);
    let answer = pilotlight_tests::eventually("the predictor answers alone", || async {
        dev.gateway.post(HOST, PREDICT, ROWS).await.ok().filter(|answer| answer.status == 200)
    })
    .await;
    assert_eq!(answer.json(), json!({"predictions": [0]}));
    let service = dev.operator.json(&["get", "isvc", "iris-chain"]);
    assert_eq!(condition(&service, "TransformerReady"), "absent");
    assert_eq!(dev.operator.must(&["delete", "isvc", "iris-chain"]).lines().count(), 1);
    dev.operator.replicas_are("iris-chain", 0, "").await;
}
