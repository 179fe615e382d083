//! What operators bring besides one InferenceService: secrets, runtimes, several kinds in a file; and what
//! an apply would do.

use std::path::Path;

use pilotlight_tests::{
    cell::{Dev, Operator},
    eventually,
    manifest::Iris,
};

const SECRET: &str = "apiVersion: v1\nkind: Secret\nmetadata: {name: s}\nstringData: {token: hunter2}\n";
/// Prints what it was given and stays.
const SERVICE: &str = r#"
apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata: {name: talker}
spec:
  predictor:
    minReplicas: 1
    containers:
      - name: kserve-container
        command: [sh, -c, "echo token=$TOKEN; exec sleep 1000"]
        env:
          - {name: TOKEN, valueFrom: {secretKeyRef: {name: s, key: token}}}
"#;

/// All bytes of the files below a directory.
fn contents(directory: &Path) -> Vec<u8> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        all.extend(if path.is_dir() { contents(&path) } else { std::fs::read(&path).unwrap_or_default() });
    }
    all
}

fn holds(bytes: &[u8], text: &str) -> bool {
    bytes.windows(text.len()).any(|window| window == text.as_bytes())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secret_reaches_its_replica_and_is_shown_to_nobody() {
    let mut dev = Dev::start(&[], vec![]).await;
    let applied = dev.operator.apply(SERVICE, &[]);
    assert_eq!(applied.code, 0, "{}", applied.err);
    assert!(applied.err.contains("warning: spec.predictor: Secret default/s is not there"), "{}", applied.err);
    eventually("the replica says what it lacks", || async {
        let service = dev.operator.json(&["get", "isvc", "talker"]);
        service["status"].to_string().contains("Secret default/s is not there").then_some(())
    })
    .await;

    let applied = dev.operator.apply(SECRET, &[]);
    assert_eq!((applied.code, applied.out.as_str()), (0, "secret/s created\n"), "{}", applied.err);
    assert!(dev.operator.apply(SECRET, &[]).out.contains("unchanged"));
    eventually("the replica has the secret", || async {
        dev.operator.run(&["logs", "talker"]).out.contains("token=hunter2").then_some(())
    })
    .await;
    let shown = [
        dev.operator.must(&["get", "secrets", "-o", "yaml"]),
        dev.operator.must(&["get", "isvc", "talker", "-o", "yaml"]),
        dev.operator.must(&["describe", "isvc", "talker"]),
    ];
    for text in shown {
        assert!(text.contains("token") || text.contains("TOKEN") || text.contains("talker"), "{text}");
        assert!(!text.contains("hunter2") && !text.contains("aHVudGVyMg"), "{text}");
    }
    // The store holds it sealed.
    dev.terminate();
    let stored = std::fs::read(dev.data().join("state.redb"))
        .or_else(|_| std::fs::read(dev.data().join("coordinator/state.redb")));
    let stored = stored.expect("the embedded store's file");
    assert!(holds(&stored, "values/Secret/default/s"), "the entry is there");
    assert!(!holds(&stored, "hunter2") && !holds(&stored, "aHVudGVyMg"), "its value is not");
    // It is opened again with the key that lies beside the store.
    dev.restart().await;
    assert!(dev.operator.apply(SECRET, &[]).out.contains("unchanged"));
    assert_eq!(dev.operator.must(&["delete", "secrets", "s"]), "secret/s deleted\n");
    assert_eq!(dev.operator.run(&["delete", "secrets", "s"]).code, 1);
    assert!(!contents(&dev.data()).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn diff_says_what_an_apply_would_change() {
    let dev = Dev::start(&[], vec![]).await;
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("iris.yaml");
    let path = file.to_str().unwrap();
    let diff = || dev.operator.run(&["diff", "-f", path]);
    std::fs::write(&file, Iris::default().yaml()).unwrap();
    let new = diff();
    assert_eq!(new.code, 1, "{}", new.err);
    assert!(new.out.contains("+++ applied/InferenceService/default/iris"), "{}", new.out);
    dev.operator.must(&["apply", "-f", path]);
    let same = diff();
    assert_eq!((same.code, same.out.as_str()), (0, ""), "{}", same.err);
    std::fs::write(&file, Iris { max_replicas: 7, ..Iris::default() }.yaml()).unwrap();
    let changed = diff();
    assert_eq!(changed.code, 1);
    assert!(changed.out.contains("-    maxReplicas: 4\n+    maxReplicas: 7\n"), "{}", changed.out);
    std::fs::write(&file, SECRET).unwrap();
    assert!(!diff().out.contains("hunter2"));
    std::fs::write(&file, "kind: Job").unwrap();
    assert_eq!(diff().code, 2);
    let nobody = Operator { server: "http://127.0.0.1:1".into(), credentials: None };
    assert_eq!(nobody.run(&["diff", "-f", path]).code, 2);
}

#[test]
fn a_client_side_dry_run_needs_no_server() {
    let nobody = Operator { server: "http://127.0.0.1:1".into(), credentials: None };
    let directory = tempfile::tempdir().unwrap();
    std::fs::create_dir(directory.path().join("below")).unwrap();
    let good = Iris::default().yaml();
    std::fs::write(directory.path().join("a.yaml"), format!("{good}---\nkind: Job\nmetadata: {{name: j}}\n")).unwrap();
    std::fs::write(directory.path().join("below/b.yml"), good.replace("minReplicas: 0", "minReplicas: [")).unwrap();
    let path = directory.path().to_str().unwrap();

    let flat = nobody.run(&["apply", "--dry-run=client", "-f", path]);
    assert_eq!(flat.code, 1, "{}", flat.err);
    let lines: Vec<_> = flat.out.lines().collect();
    assert_eq!(lines.len(), 2, "{}", flat.out);
    assert_eq!(lines[0], format!("{path}/a.yaml: InferenceService/iris: accepted"));
    assert!(lines[1].starts_with(&format!("{path}/a.yaml: Job/j: refused: kind: Job is not a kind")), "{}", lines[1]);

    let deep = nobody.run(&["apply", "--dry-run=client", "-R", "-f", path]);
    assert!(deep.out.contains(&format!("{path}/below/b.yml:")), "{}", deep.out);
    let only = directory.path().join("only.yaml");
    std::fs::write(&only, good).unwrap();
    assert_eq!(nobody.run(&["apply", "--dry-run=client", "-f", only.to_str().unwrap()]).code, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn foreign_kinds_keep_only_themselves_out_unless_strict() {
    let dev = Dev::start(&[], vec![]).await;
    let file = format!("kind: Job\nmetadata: {{name: j}}\n---\n{}", Iris::default().yaml());
    let strict = dev.operator.apply(&file, &["--strict"]);
    assert_eq!(strict.code, 1);
    assert!(strict.err.contains("another document of this file is refused"), "{}", strict.err);
    assert_eq!(dev.operator.json(&["get"])["items"].as_array().unwrap().len(), 0);
    let lenient = dev.operator.apply(&file, &[]);
    assert_eq!(lenient.code, 1, "one document is refused");
    assert!(lenient.err.contains("Job is not a kind this fleet serves"), "{}", lenient.err);
    assert_eq!(dev.operator.json(&["get"])["items"].as_array().unwrap().len(), 1);
    let both = dev.operator.apply(&format!("{SERVICE}---\n{SECRET}"), &[]);
    assert_eq!(both.code, 0, "{}", both.err);
    assert!(!both.err.contains("is not there"), "the secret stands in the same file: {}", both.err);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_runtime_of_ones_own_runs_a_model() {
    let dev = Dev::start(&[], vec![]).await;
    let runtime = r#"
apiVersion: serving.kserve.io/v1alpha1
kind: ClusterServingRuntime
metadata: {name: sklearn}
spec:
  protocolVersions: [v1]
  supportedModelFormats: [{name: sklearn, autoSelect: true}]
  containers:
    - name: kserve-container
      command: [pilotlight, example-server, iris]
"#;
    let service = r#"
apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata: {name: iris}
spec: {predictor: {model: {modelFormat: {name: sklearn}}}}
"#;
    let printed = dev.operator.apply(runtime, &[]);
    assert_eq!(printed.out, "clusterservingruntime.serving.kserve.io/sklearn created\n", "{}", printed.err);
    assert_eq!(dev.operator.apply(service, &[]).code, 0);
    dev.operator.replicas_are("iris", 1, "Ready").await;
    let runtimes = dev.operator.must(&["get", "runtimes"]);
    assert_eq!(runtimes.matches("sklearn").count(), 1, "the built-in one is replaced: {runtimes}");
    assert!(runtimes.contains("triton"), "{runtimes}");
    dev.operator.must(&["delete", "runtimes", "sklearn"]);
    let printed = dev.operator.run(&["delete", "runtimes", "triton"]);
    assert!(printed.err.contains("built in cannot be deleted"), "{}", printed.err);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_without_a_command_is_taken_and_its_replica_says_why_it_fails() {
    let dev = Dev::start(&[], vec![]).await;
    let service = "apiVersion: serving.kserve.io/v1beta1\nkind: InferenceService\nmetadata: {name: image}\n\
                   spec: {predictor: {containers: [{name: c, image: 'some/image:1'}]}}\n";
    let applied = dev.operator.apply(service, &["--strict"]);
    assert_eq!((applied.code, applied.err.as_str()), (0, ""));
    eventually("the failure is in the status", || async {
        let service = dev.operator.json(&["get", "isvc", "image"]);
        let status = service["status"].to_string();
        (status.contains("some/image:1") && status.contains("cannot be run")).then_some(())
    })
    .await;
}
