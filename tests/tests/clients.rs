//! Other people's clients, from PyPI, get predictions from services at zero.
//!
//! Needs Python 3.11 or later with `venv` (`scripts/test.sh` installs it) and, for the first run, PyPI.

use std::{
    fs,
    path::{Path, PathBuf},
};

use pilotlight_tests::{cell::Dev, process::output};

const REPOSITORY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
const CLIENTS: [&str; 6] =
    ["tritonclient.http", "tritonclient.http-json", "tritonclient.grpc", "kserve-v1", "kserve-v2", "kserve-grpc"];

/// Runs a program that must succeed; returns what it printed.
fn must(program: &Path, args: &[&str]) -> String {
    let output = output(program, args);
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{} {args:?}: {}\n{out}{err}", program.display(), output.status);
    out.into_owned()
}

/// The Python of a virtual environment with the clients, made under `target/` unless it is there.
fn python() -> PathBuf {
    let requirements = format!("{REPOSITORY}/tests/clients/requirements.txt");
    let wanted = fs::read_to_string(&requirements).unwrap();
    // target/<profile>/deps/<test>
    let test = std::env::current_exe().unwrap();
    let environment = test.ancestors().nth(3).unwrap().join("clients-venv");
    let python = environment.join("bin/python");
    // Written last: one that was cut off is made again.
    let installed = environment.join("installed.txt");
    // One at a time: the tests run beside each other, in threads or, under other runners, in processes.
    let lock = fs::File::create(environment.with_extension("lock")).unwrap();
    lock.lock().unwrap();
    if fs::read_to_string(&installed).is_ok_and(|installed| installed == wanted) {
        return python;
    }
    must(Path::new("python3"), &["-m", "venv", "--clear", &environment.display().to_string()]);
    // Most of it is never imported, and need not be compiled.
    let install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"];
    must(&python, &[&install[..], &["--only-binary=:all:", "--requirement", &requirements]].concat());
    fs::write(installed, wanted).unwrap();
    python
}

#[tokio::test(flavor = "multi_thread")]
async fn tritonclient_and_kserves_clients_get_the_right_classes() {
    let python = python();
    let script = format!("{REPOSITORY}/tests/clients/iris.py");
    // The server speaks HTTP/1.1 and HTTP/2; the name of the port says what the gateway speaks to it.
    for (service, manifest) in [("iris", "iris.yaml"), ("iris-grpc", "iris-grpc.yaml")] {
        // gRPC is not spoken over HTTP/1.1.
        for client in CLIENTS.iter().filter(|client| service == "iris-grpc" || !client.ends_with("grpc")) {
            // A fleet for each, so that each finds the service at zero.
            let dev = Dev::start(&[], vec![]).await;
            dev.operator.must(&["apply", "-f", &format!("{REPOSITORY}/deploy/examples/{manifest}")]);
            assert!(dev.operator.replicas(service).is_empty(), "born at zero");
            let printed = must(&python, &[&script, client, &dev.ingress.to_string(), service]);
            assert_eq!(printed, "[0, 1, 2]\n", "{client} from {service}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transformer_by_kserves_sdk_finds_its_predictor() {
    let python = python().display().to_string();
    let dev = Dev::start(&[], vec![]).await;
    let manifest = fs::read_to_string(format!("{REPOSITORY}/deploy/examples/iris-chain.yaml")).unwrap();
    let own = format!("[{python}, {REPOSITORY}/tests/clients/transformer.py, --enable_grpc=false]");
    let manifest = manifest.replace("[pilotlight, example-server, iris-transformer]", &own);
    assert!(manifest.contains(&own));
    let applied = dev.operator.apply(&manifest, &["--strict"]);
    assert_eq!(applied.code, 0, "{}", applied.err);
    let flower =
        r#"{"instances": [{"sepal length": 6.3, "sepal width": 3.3, "petal length": 6.0, "petal width": 2.5}]}"#;
    let answer =
        dev.gateway.post("iris-chain.default.localhost", "/v1/models/iris-chain:predict", flower).await.unwrap();
    assert_eq!(answer.body, r#"{"predictions":["virginica"]}"#);
}
