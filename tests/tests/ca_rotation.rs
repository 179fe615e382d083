//! The certificate authority is rotated under a steady load: nodes, users and coordinators pass to the next one, and
//! nobody who holds on to the previous one is let in afterwards.

use std::{path::Path, process::Command, time::Duration};

use pilotlight_identity::{Credentials, JoinToken, LiveIdentity, Trust, channel, new_csr};
use pilotlight_proto::{
    control::v1::{GetVersionRequest, control_client::ControlClient},
    fleet::v1::{JoinRequest, enrollment_client::EnrollmentClient},
};
use pilotlight_tests::{
    cell::{Agent, Cell, Operator, Printed},
    cluster::Cluster,
    eventually,
    manifest::{Iris, TWO_FLOWERS},
    steady::SteadyLoad,
};
use tonic::Code;

const HOST: &str = "warm.default.localhost";
const PREDICT: &str = "/v1/models/iris:predict";

/// Fingerprints of the authorities, as `ca show` prints them; the one that signs comes first.
fn authorities(operator: &Operator) -> Vec<String> {
    let shown = operator.must(&["ca", "show"]);
    let rows = shown.lines().skip(1).take_while(|line| !line.is_empty());
    rows.filter_map(|line| Some(line.split_whitespace().next()?.to_owned())).collect()
}

/// Waits until a member has a certificate of this authority and trusts all of these.
async fn passes_to(operator: &Operator, member: &str, issuer: &str, trusted: &[String]) {
    eventually(&format!("{member} has a certificate of {issuer} and trusts {trusted:?}"), || async {
        let shown = operator.must(&["ca", "show"]);
        let row = shown.lines().find(|line| line.split_whitespace().next() == Some(member))?;
        let [_, its_issuer, trusts] = row.split_whitespace().collect::<Vec<_>>()[..] else { return None };
        let mut trusts: Vec<_> = trusts.split(',').collect();
        let mut wanted: Vec<_> = trusted.iter().map(String::as_str).collect();
        trusts.sort_unstable();
        wanted.sort_unstable();
        (its_issuer == issuer && trusts == wanted).then_some(())
    })
    .await;
}

fn refused(printed: &Printed, words: &[&str]) {
    assert_eq!(printed.code, 1, "{printed:?}");
    for word in words {
        assert!(printed.err.contains(word), "{word:?} is missing: {printed:?}");
    }
}

/// Credentials as somebody keeps them who has copied them.
fn copied(directory: &Path, to: &Path) -> Credentials {
    let credentials = Credentials::load(directory).unwrap();
    credentials.save(to).unwrap();
    credentials
}

async fn version(server: &str, credentials: &Credentials) -> Result<(), tonic::Status> {
    let channel = channel(server, &Trust::Cell(LiveIdentity::new(credentials).unwrap())).unwrap();
    ControlClient::new(channel).get_version(GetVersionRequest {}).await.map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_authority_is_rotated_without_a_failed_request_and_the_previous_one_opens_nothing() {
    let mut cluster = Cluster::start(1, 2).await;
    let mut agents: [Agent; 2] = [cluster.agent("a", 1).await, cluster.agent("b", 1).await];
    let operator = cluster.operator.clone();
    assert_eq!(operator.apply(&Iris { name: "warm", min_replicas: 1, ..Iris::default() }.yaml(), &[]).code, 0);
    let warm = operator.replicas_are("warm", 1, "Ready").await[0].clone();
    for agent in &agents {
        eventually("the gateway serves", || async {
            (agent.gateway.post(HOST, PREDICT, TWO_FLOWERS).await.ok()?.status == 200).then_some(())
        })
        .await;
    }
    let load = SteadyLoad::start(agents.iter().map(|agent| agent.gateway.clone()).collect(), HOST, PREDICT);
    let ada_dir = cluster.directory().join("ada");
    operator.must(&["user", "create", "ada", "--role=viewer", "--out", &ada_dir.display().to_string()]);
    let ada = Operator { credentials: Some(ada_dir.clone()), ..operator.clone() };
    let old_ada = copied(&ada_dir, &cluster.directory().join("old-ada"));
    let old_node = copied(&cluster.directory().join("a/identity"), &cluster.directory().join("old-node"));
    let [old] = &authorities(&operator)[..] else { panic!("one authority") };
    refused(&operator.run(&["ca", "rotate", "--activate"]), &["no next authority", "ca rotate"]);
    refused(&operator.run(&["ca", "retire"]), &["no authority beside"]);
    refused(&ada.run(&["ca", "rotate"]), &["needs the role admin"]);

    // Everybody learns of the next one.
    let token = operator.must(&["token", "create"]).trim().to_owned();
    operator.must(&["ca", "rotate"]);
    let both = authorities(&operator);
    let [signer, new] = &both[..] else { panic!("two authorities: {both:?}") };
    assert_eq!(signer, old);
    refused(&operator.run(&["ca", "rotate"]), &["under way"]);
    for node in ["node/a", "node/b"] {
        passes_to(&operator, node, old, &both).await;
    }
    let too_early = operator.run(&["ca", "rotate", "--activate"]);
    refused(&too_early, &["operator/ada", "user renew"]);
    assert!(!too_early.err.contains("node/"), "nodes have learned of it: {too_early:?}");
    ada.must(&["user", "renew"]);
    refused(&operator.run(&["ca", "rotate", "--activate"]), &["token/", "token revoke"]);
    operator.must(&["token", "revoke", token.split('.').nth(1).unwrap()]);

    // It signs.
    operator.must(&["ca", "rotate", "--activate"]);
    for node in ["node/a", "node/b"] {
        passes_to(&operator, node, new, &both).await;
    }
    let leader = cluster.leader().await;
    cluster.coordinators[leader].kill_9();
    assert_eq!(cluster.leader().await, 1 - leader, "the standby has followed the rotation");
    cluster.start_coordinator(leader);
    cluster.ready(leader).await;
    // Requests to a gateway that is away fail, whoever signs.
    load.stop().await.assert_all_answered("while the next authority becomes the one that signs");
    agents[0].kill_9();
    agents[0].restart(&operator).await;
    let load = SteadyLoad::start(agents.iter().map(|agent| agent.gateway.clone()).collect(), HOST, PREDICT);
    let _c = cluster.agent("c", 1).await;
    passes_to(&operator, "node/c", new, &both).await;
    for node in ["node/a", "node/b"] {
        passes_to(&operator, node, new, &both).await;
    }

    // The previous one is not trusted any longer.
    refused(&operator.run(&["ca", "retire"]), &["operator/ada", "user renew"]);
    ada.must(&["user", "renew"]);
    let server = format!("{}/", operator.server.split(',').nth(cluster.leader().await).unwrap());
    let with_new_roots = |credentials: &Credentials| Credentials {
        ca_pem: Credentials::load(&ada_dir).unwrap().ca_pem,
        ..credentials.clone()
    };
    version(&server, &with_new_roots(&old_ada)).await.expect("certificates of the previous one are still good");
    operator.must(&["ca", "retire"]);
    assert_eq!(authorities(&operator), std::slice::from_ref(new));
    for (whose, credentials) in [("a user's", &old_ada), ("a node's", &old_node)] {
        let refused = version(&server, &with_new_roots(credentials)).await.unwrap_err();
        // The handshake ends before there is an answer.
        let is_handshake = matches!(refused.code(), Code::Unavailable | Code::Cancelled | Code::Unknown);
        assert!(is_handshake, "{whose} certificate of the previous authority: {refused}");
    }
    assert!(ada.must(&["get", "isvc"]).contains("warm"));
    for node in ["node/a", "node/b", "node/c"] {
        passes_to(&operator, node, new, std::slice::from_ref(new)).await;
    }
    let identity = std::fs::read_to_string(cluster.directory().join("a/identity/ca.pem")).unwrap();
    assert_eq!(identity.matches("BEGIN CERTIFICATE").count(), 1);
    let now = operator.replicas_are("warm", 1, "Ready").await;
    assert_eq!((&now[0]["name"], &now[0]["pid"]), (&warm["name"], &warm["pid"]));
    // The coordinator's connections of the previous authority are closed meanwhile.
    tokio::time::sleep(Duration::from_secs(3)).await;
    load.stop().await.assert_all_answered("while the previous authority is retired");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_of_the_previous_authority_lets_nobody_join_and_a_forced_rotation_locks_out_who_missed_it() {
    let cell = Cell::start(vec![]).await;
    let operator = &cell.operator;
    let mut agent = cell.agent("a", 1).await;
    let token = cell.token();
    agent.kill_9();
    operator.must(&["ca", "rotate"]);
    refused(&operator.run(&["ca", "rotate", "--activate"]), &["node/a", "delete node"]);
    operator.must(&["ca", "rotate", "--activate", "--force"]);

    let pin = token.parse::<JoinToken>().unwrap().pin();
    let pinned = channel(&format!("https://127.0.0.1:{}", cell.port()), &Trust::Pinned(pin)).unwrap();
    let csr_pem = new_csr().unwrap().1;
    let request = JoinRequest { token, node_name: "b".to_owned(), csr_pem };
    assert!(EnrollmentClient::new(pinned).join(request).await.is_err());
    // An agent that was away joins again under the new authority.
    let identity = cell.directory().join("a/identity");
    assert!(Command::new("rm").arg("-r").arg(&identity).status().unwrap().success());
    let again = operator.must(&["token", "create", "--node=a", "--replace"]);
    agent.set_token(again.trim());
    agent.restart(operator).await;
    refused(&operator.run(&["ca", "rotate"]), &["under way"]);
}
