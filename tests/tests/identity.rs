//! Who may join, call and read what; and how that is taken back.

use std::{os::unix::fs::PermissionsExt as _, path::Path, time::Duration};

use futures::FutureExt as _;
use pilotlight_identity::{Credentials, JoinToken, LiveIdentity, Trust, channel, new_csr};
use pilotlight_proto::{
    control::v1::{GetVersionRequest, ListNodesRequest, control_client::ControlClient},
    fleet::v1::{
        AgentMessage, CoordinatorMessage, Hello, JoinRequest, RenewRequest, agent_message::Message,
        enrollment_client::EnrollmentClient, fleet_client::FleetClient,
    },
};
use pilotlight_tests::{
    cell::{Cell, Dev, Operator},
    eventually,
    process::{output, pilotlight},
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tonic::{Code, Status, Streaming};

/// What an HTTP/2 client sends first, with empty settings.
const HTTP2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

/// An agent as an attacker would write one: it joins and opens a session, and nothing else.
struct Intruder {
    url: String,
}

impl Intruder {
    fn of(cell: &Cell) -> Self {
        Self { url: format!("https://127.0.0.1:{}", cell.port()) }
    }

    async fn join(&self, token: &str, node: &str) -> Result<Credentials, Status> {
        let pin = token.parse::<JoinToken>().unwrap().pin();
        let (key_pem, csr_pem) = new_csr().unwrap();
        let request = JoinRequest { token: token.to_owned(), node_name: node.to_owned(), csr_pem };
        let channel = channel(&self.url, &Trust::Pinned(pin)).unwrap();
        let answer = EnrollmentClient::new(channel).join(request).await?.into_inner();
        Ok(Credentials { certificate_pem: answer.certificate_pem, key_pem, ca_pem: answer.ca_pem })
    }

    async fn session(&self, credentials: &Credentials, node: &str) -> Result<Streaming<CoordinatorMessage>, Status> {
        let hello = Hello { node_name: node.to_owned(), ..Default::default() };
        let first = AgentMessage { message: Some(Message::Hello(hello)) };
        let stream = futures::StreamExt::chain(tokio_stream::once(first), tokio_stream::pending());
        let channel = channel(&self.url, &Trust::Cell(LiveIdentity::new(credentials).unwrap())).unwrap();
        Ok(FleetClient::new(channel).session(stream).await?.into_inner())
    }
}

fn token(cell: &Cell, flags: &[&str]) -> String {
    cell.operator.must(&[&["token", "create"], flags].concat()).trim().to_owned()
}

/// The operator with these credentials.
fn with_credentials(cell: &Cell, directory: &Path) -> Operator {
    Operator { credentials: Some(directory.to_owned()), ..cell.operator.clone() }
}

fn create_user(cell: &Cell, name: &str, flags: &[&str]) -> Operator {
    let directory = cell.directory().join(name);
    let out = directory.display().to_string();
    cell.operator.must(&[&["user", "create", name, "--out", &out], flags].concat());
    with_credentials(cell, &directory)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_join_token_takes_no_name_that_it_is_not_for_and_none_that_is_known() {
    let cell = Cell::start(vec![]).await;
    let intruder = Intruder::of(&cell);
    let bound = token(&cell, &["--node", "gpu-*"]);
    let refused = intruder.join(&bound, "cpu-1").await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    assert!(refused.message().contains("token create --node cpu-1"), "{refused}");
    intruder.join(&bound, "gpu-1").await.expect("the refusal has not used up the token");

    let refused = intruder.join(&token(&cell, &[]), "gpu-1").await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    assert!(refused.message().contains("token create --node gpu-1 --replace"), "{refused}");
    intruder.join(&token(&cell, &["--node", "gpu-1", "--replace"]), "gpu-1").await.expect("replacement is allowed");

    let joins = cell.operator.must(&["node", "joins", "gpu-1"]);
    assert_eq!(joins.lines().count(), 3, "{joins}");
    assert!(joins.contains("127.0.0.1:") && joins.contains("admin") && joins.contains("true"), "{joins}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_token_lets_nobody_join() {
    let cell = Cell::start(vec![]).await;
    let unused = token(&cell, &["--node", "gpu-1"]);
    let id = unused.split('.').nth(1).unwrap().to_owned();
    assert!(cell.operator.must(&["token", "list"]).contains(&id));
    cell.operator.must(&["token", "revoke", &id]);
    assert!(!cell.operator.must(&["token", "list"]).contains(&id));
    assert_eq!(cell.operator.run(&["token", "revoke", &id]).code, 1, "it is gone");
    let refused = Intruder::of(&cell).join(&unused, "gpu-1").await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_is_larger_than_its_service_needs_is_refused_before_it_is_read() {
    let cell = Cell::start(vec![]).await;
    let intruder = Intruder::of(&cell);
    let token = token(&cell, &["--node", "gpu-1"]);
    let (_, csr_pem) = new_csr().unwrap();
    let request = JoinRequest { token: token.clone(), node_name: "n".repeat(100 << 10), csr_pem };
    let pin = token.parse::<JoinToken>().unwrap().pin();
    let stranger = channel(&intruder.url, &Trust::Pinned(pin)).unwrap();
    let refused = EnrollmentClient::new(stranger).join(request).await.unwrap_err();
    assert_eq!(refused.code(), Code::OutOfRange, "{refused}");
    assert!(refused.message().contains("limit is: 65536 bytes"), "{refused}");
    intruder.join(&token, "gpu-1").await.expect("the refusal has not used up the token");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_agent_with_the_name_of_a_live_one_is_refused() {
    let cell = Cell::start(vec![]).await;
    let intruder = Intruder::of(&cell);
    let mut agent = cell.agent("gpu-1", 1).await;
    let stolen = intruder.join(&token(&cell, &["--node", "gpu-1", "--replace"]), "gpu-1").await.unwrap();
    for _ in 0..3 {
        let refused = intruder.session(&stolen, "gpu-1").await.unwrap_err();
        assert_eq!(refused.code(), Code::AlreadyExists);
        assert!(refused.message().contains("gpu-1"), "{refused}");
    }
    let log = std::fs::read_to_string(cell.directory().join("gpu-1/gpu-1.log")).unwrap();
    assert!(!log.contains("no session") && !log.contains("connecting again"), "the live agent was disturbed: {log}");
    // The same agent after a crash is welcome at once.
    agent.kill_9();
    agent.restart(&cell.operator).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_node_loses_its_session_its_renewal_and_its_peers() {
    let cell = Cell::start(vec![]).await;
    let intruder = Intruder::of(&cell);
    let _witness = cell.agent("gpu-2", 1).await;
    let credentials = intruder.join(&token(&cell, &["--node", "gpu-1"]), "gpu-1").await.unwrap();
    let mut session = intruder.session(&credentials, "gpu-1").await.unwrap();
    assert!(session.message().await.unwrap().is_some());
    let operator = Credentials::load(cell.operator.credentials.as_deref().unwrap()).unwrap();
    let operator = channel(&intruder.url, &Trust::Cell(LiveIdentity::new(&operator).unwrap())).unwrap();
    let nodes = ControlClient::new(operator).list_nodes(ListNodesRequest {}).await.unwrap().into_inner().nodes;
    let peer = nodes.into_iter().find(|node| node.name == "gpu-2").unwrap().peer_address;
    let client = std::sync::Arc::new(LiveIdentity::new(&credentials).unwrap().client_config(&[b"h2"]).unwrap());
    let member = pilotlight_identity::Member::node("gpu-2").unwrap();
    let mut open =
        pilotlight_identity::connect_tls(&peer, &member, std::sync::Arc::clone(&client)).await.expect("a good peer");
    open.write_all(HTTP2_PREFACE).await.unwrap();
    let bystander = intruder.join(&token(&cell, &["--node", "gpu-3"]), "gpu-3").await.unwrap();
    let bystander = LiveIdentity::new(&bystander).unwrap().client_config(&[b"h2"]).unwrap();
    let mut other = pilotlight_identity::connect_tls(&peer, &member, bystander.into()).await.expect("a good peer");
    other.write_all(HTTP2_PREFACE).await.unwrap();

    cell.operator.must(&["node", "revoke", "gpu-1"]);
    let ended = async { while let Ok(Some(_)) = session.message().await {} };
    tokio::time::timeout(Duration::from_secs(60), ended).await.expect("the session ends");
    // The peer may have sent its settings before.
    let closed = async { while open.read(&mut [0; 1024]).await.is_ok_and(|n| n > 0) {} };
    tokio::time::timeout(Duration::from_secs(60), closed).await.expect("the peer's connection ends");
    let mut buffer = [0; 1024];
    while let Some(read) = other.read(&mut buffer).now_or_never() {
        assert!(read.unwrap() > 0, "another node's connection was closed, too");
    }
    let refused = intruder.session(&credentials, "gpu-1").await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    assert!(refused.message().contains("was revoked"), "{refused}");
    let renewal = channel(&intruder.url, &Trust::Cell(LiveIdentity::new(&credentials).unwrap())).unwrap();
    let request = RenewRequest { csr_pem: new_csr().unwrap().1 };
    let refused = EnrollmentClient::new(renewal).renew(request).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);

    // A new certificate under the same name is good at once.
    let again = intruder.join(&token(&cell, &["--node", "gpu-1", "--replace"]), "gpu-1").await.unwrap();
    intruder.session(&again, "gpu-1").await.expect("joined again");
}

#[tokio::test(flavor = "multi_thread")]
async fn users_may_do_what_their_role_and_namespace_allow() {
    let cell = Cell::start(vec![]).await;
    let manifest = |namespace: &str| {
        format!("apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: c, namespace: {namespace}}}\ndata: {{a: b}}\n")
    };
    let viewer = create_user(&cell, "vera", &["--role", "viewer"]);
    viewer.must(&["get", "nodes"]);
    let refused = viewer.apply(&manifest("a"), &[]);
    assert!(refused.code == 1 && refused.err.contains("needs the role operator"), "{refused:?}");

    let scoped = create_user(&cell, "olaf", &["--role", "operator", "--namespace", "a"]);
    let applied = scoped.apply(&manifest("a"), &[]);
    assert_eq!(applied.code, 0, "{applied:?}");
    let refused = scoped.apply(&manifest("b"), &[]);
    assert!(refused.code == 1 && refused.err.contains("may only use \"a\""), "{refused:?}");
    scoped.must(&["get", "configmaps", "-n", "a"]);
    assert_eq!(scoped.run(&["get", "configmaps", "-n", "b"]).code, 1);
    let refused = scoped.run(&["get", "nodes"]);
    assert!(refused.code == 1 && refused.err.contains("for the whole cell"), "{refused:?}");
    assert_eq!(scoped.run(&["token", "create"]).code, 1);

    let admin = create_user(&cell, "ann", &["--role", "admin"]);
    admin.must(&["token", "create"]);
    let again = admin.run(&["user", "create", "vera", "--role", "admin", "--out", "/tmp/unused-vera"]);
    assert!(again.code == 1 && again.err.contains("user revoke vera"), "{again:?}");
    let users = admin.must(&["user", "list"]);
    assert!(users.contains("vera") && users.contains("olaf") && users.contains("ann"), "{users}");
    let log = std::fs::read_to_string(cell.directory().join("coordinator.log")).unwrap();
    let recorded = |parts: &[&str]| log.lines().any(|line| parts.iter().all(|part| line.contains(part)));
    assert!(recorded(&["audit", "olaf", "apply", "ConfigMap/a/c", "done"]), "{log}");
    assert!(recorded(&["audit", "ann", "create", "Token"]), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_user_is_refused_and_its_open_watch_ends() {
    let cell = Cell::start(vec![]).await;
    let user = create_user(&cell, "vera", &["--role", "viewer"]);
    let credentials = Credentials::load(user.credentials.as_deref().unwrap()).unwrap();
    let channel = channel(&user.server, &Trust::Cell(LiveIdentity::new(&credentials).unwrap())).unwrap();
    let request = pilotlight_proto::control::v1::WatchRequest::default();
    let mut watch = ControlClient::new(channel).watch(request).await.unwrap().into_inner();
    cell.operator.must(&["user", "revoke", "vera"]);
    let ended = async { while let Ok(Some(_)) = watch.message().await {} };
    tokio::time::timeout(Duration::from_secs(60), ended).await.expect("the watch ends");
    let refused = user.run(&["get", "nodes"]);
    assert!(refused.code == 1 && refused.err.contains("was revoked"), "{refused:?}");
    // A new certificate for the same name is good at once.
    std::fs::remove_dir_all(user.credentials.as_deref().unwrap()).unwrap();
    create_user(&cell, "vera", &["--role", "viewer"]).must(&["get", "nodes"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_certificate_health_answers_and_version_and_reflection_do_not() {
    let cell = Cell::start(vec![]).await;
    let pin = cell.token().parse::<JoinToken>().unwrap().pin();
    let stranger = channel(&cell.operator.server, &Trust::Pinned(pin)).unwrap();
    let refused = ControlClient::new(stranger).get_version(GetVersionRequest {}).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
    assert!(cell.operator.must(&["version"]).contains("main"));
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap_or_else(|error| panic!("{}: {error}", path.display())).permissions().mode() & 0o777
}

/// Files below a directory whose content only their owner may know.
fn assert_private(directory: &Path, files: &[&str]) {
    assert_eq!(mode(directory), 0o700, "{}", directory.display());
    for file in files {
        assert_eq!(mode(&directory.join(file)), 0o600, "{file}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn only_their_owner_may_read_keys_state_and_tokens() {
    let cell = Cell::start(vec![]).await;
    let _agent = cell.agent("gpu-1", 1).await;
    assert_private(&cell.directory().join("coordinator"), &["secrets.key"]);
    assert_private(&cell.directory().join("coordinator/operator"), &["key.pem", "cert.pem"]);
    assert_private(&cell.directory().join("gpu-1"), &[]);
    assert_private(&cell.directory().join("gpu-1/identity"), &["key.pem"]);
    let dev = Dev::start(&[], vec![]).await;
    assert_private(&dev.data(), &["token"]);
    assert_private(&dev.data().join("coordinator"), &["state.redb", "secrets.key"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn dev_answers_only_those_who_can_read_its_token() {
    let dev = Dev::start(&[], vec![]).await;
    let stranger = channel(&dev.operator.server, &Trust::Plaintext).unwrap();
    let refused = ControlClient::new(stranger).get_version(GetVersionRequest {}).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
    // As another user would call it: without this user's state directory.
    let elsewhere = tempfile::tempdir().unwrap();
    let run = |arguments: &[&str]| {
        let home = format!("HOME={}", elsewhere.path().display());
        let runtime = format!("XDG_RUNTIME_DIR={}", elsewhere.path().display());
        let program = pilotlight().display().to_string();
        let fixed = [home.as_str(), &runtime, &program, "get", "nodes", "--server", &dev.operator.server];
        output(Path::new("/usr/bin/env"), [&fixed[..], arguments].concat())
    };
    let refused = run(&[]);
    let message = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && message.contains("--token-file"), "{message}");
    let file = dev.data().join("token").display().to_string();
    assert!(run(&["--token-file", &file]).status.success());
    // The same user finds it from any directory.
    eventually("the user's own commands are answered", || async {
        (dev.operator.run(&["get", "nodes"]).code == 0).then_some(())
    })
    .await;
}

/// A service that shows as whom it runs, and starts only if it can read its model.
fn reader(store: u16) -> String {
    let program = pilotlight().display();
    format!(
        r#"
apiVersion: serving.kserve.io/v1alpha1
kind: ClusterServingRuntime
metadata: {{name: reader}}
spec:
  supportedModelFormats: [{{name: sklearn, version: "1", autoSelect: true}}]
  containers:
    - name: kserve-container
      command: [sh, -c, 'echo "uid $(id -u) groups $(id -G)"; cat "$PILOTLIGHT_MODEL_DIR"/* && exec {program} example-server iris']
---
apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata: {{name: reader}}
spec:
  predictor:
    minReplicas: 1
    model: {{modelFormat: {{name: sklearn}}, runtime: reader, storageUri: "http://127.0.0.1:{store}/weights"}}
"#
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_run_as_the_user_that_the_agent_names_and_read_their_models() {
    let nobody = nix::unistd::User::from_name("nobody").unwrap().expect("every system has this user");
    if !nix::unistd::geteuid().is_root() {
        let directory = tempfile::tempdir().unwrap();
        let data = format!("--data-dir={}", directory.path().display());
        let ended = output(pilotlight(), ["dev", &data, "--run-as=nobody", "--listen=127.0.0.1:0"]);
        assert!(String::from_utf8_lossy(&ended.stderr).contains("run-as"), "only root may");
        return;
    }
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let router = axum::Router::new().route("/weights", axum::routing::get(|| async { "weights" }));
    tokio::spawn(async move { axum::serve(listener, router).await });
    let directory = tempfile::tempdir().unwrap();
    // The story's own directory, which other users would not have in their way.
    std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o711)).unwrap();
    let dev = Dev::start_in(directory, &["--run-as", "nobody"], vec![]).await;
    let applied = dev.operator.apply(&reader(port), &[]);
    assert_eq!(applied.code, 0, "{}", applied.err);
    dev.operator.replicas_are("reader", 1, "Ready").await;
    let logs = dev.operator.must(&["logs", "reader"]);
    assert!(logs.contains(&format!("uid {} groups {}", nobody.uid, nobody.gid)), "{logs}");
    assert_private(&dev.data().join("agent/replicas"), &[]);
}
