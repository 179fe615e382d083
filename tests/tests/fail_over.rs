//! etcd members and coordinators are killed, frozen and stopped. Warm services answer every request of a steady load,
//! and the control plane comes back.

use std::time::Duration;

use pilotlight_tests::{
    cell::Agent,
    cluster::Cluster,
    eventually,
    manifest::{Iris, TWO_FLOWERS},
    process::pilotlight,
    steady::SteadyLoad,
};
use serde_json::Value;

const HOST: &str = "warm.default.localhost";
const PREDICT: &str = "/v1/models/iris:predict";

/// A cluster with two agents, a service that is always warm, and one at zero.
struct Story {
    /// They end before the cluster ends their replicas, which they would start again.
    agents: [Agent; 2],
    cluster: Cluster,
    warm: Value,
}

impl Story {
    async fn start(etcd: usize, coordinators: usize) -> Self {
        let cluster = Cluster::start(etcd, coordinators).await;
        let agents = [cluster.agent("a", 1).await, cluster.agent("b", 1).await];
        let warm = Iris { name: "warm", min_replicas: 1, ..Iris::default() };
        let cold = Iris { name: "cold", ..Iris::default() };
        for service in [warm, cold] {
            let applied = cluster.operator.apply(&service.yaml(), &[]);
            assert_eq!(applied.code, 0, "{}{}", applied.out, applied.err);
        }
        let warm = cluster.operator.replicas_are("warm", 1, "Ready").await[0].clone();
        let story = Self { cluster, agents, warm };
        for agent in &story.agents {
            eventually("the gateway serves", || async {
                (agent.gateway.post(HOST, PREDICT, TWO_FLOWERS).await.ok()?.status == 200).then_some(())
            })
            .await;
        }
        story
    }

    fn load(&self) -> SteadyLoad {
        SteadyLoad::start(self.agents.iter().map(|agent| agent.gateway.clone()).collect(), HOST, PREDICT)
    }

    /// A control call that changes something succeeds.
    async fn control_works(&self, during: &str) {
        let operator = self.cluster.operator.clone();
        let printed = tokio::task::spawn_blocking(move || operator.run(&["node", "uncordon", "a"])).await.unwrap();
        assert_eq!(printed.code, 0, "{during}: {}{}", printed.out, printed.err);
    }

    /// A request for the service at zero is answered: a replica is started or woken for it.
    async fn wake_works(&self, during: &str) {
        for agent in &self.agents {
            let answer = agent.gateway.post("cold.default.localhost", PREDICT, TWO_FLOWERS).await.unwrap();
            assert_eq!(answer.status, 200, "{during}: {}", answer.body);
        }
    }

    /// Both nodes are connected.
    async fn nodes_are_ready(&self) {
        eventually("both nodes are ready", || async {
            let nodes = self.cluster.operator.json(&["get", "nodes"]);
            let nodes = nodes["items"].as_array()?;
            (nodes.len() == 2 && nodes.iter().all(|node| node["state"] == "Ready")).then_some(())
        })
        .await;
    }

    /// The warm service still has the replica that it had, in the same process.
    async fn kept_its_replica(&self, after: &str) {
        let replicas = self.cluster.operator.replicas_are("warm", 1, "Ready").await;
        assert_eq!((&replicas[0]["name"], &replicas[0]["pid"]), (&self.warm["name"], &self.warm["pid"]), "{after}");
    }

    fn coordinators_run(&mut self, during: &str) {
        for coordinator in &mut self.cluster.coordinators {
            assert!(coordinator.is_running(), "{during}: a coordinator has ended");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_of_three_etcd_members_is_killed_or_frozen_and_control_calls_succeed() {
    let mut story = Story::start(3, 1).await;
    let load = story.load();
    let leader = story.cluster.etcd_leader().await;
    for (role, index) in [("a follower", (leader + 1) % 3), ("the leader", leader)] {
        let during = format!("{role} of etcd is frozen");
        story.cluster.etcd[index].freeze();
        for _ in 0..10 {
            story.control_works(&during).await;
        }
        story.cluster.etcd[index].thaw();
        story.coordinators_run(&during);
        story.control_works("after it thawed").await;
    }
    let leader = story.cluster.etcd_leader().await;
    for (role, offset) in [("a follower", 1), ("the leader", 0)] {
        let during = format!("{role} of etcd is killed");
        let index = (leader + offset) % 3;
        story.cluster.etcd[index].kill_9();
        for _ in 0..10 {
            story.control_works(&during).await;
        }
        story.wake_works(&during).await;
        story.coordinators_run(&during);
        story.cluster.start_etcd(index);
        eventually("the member is healthy again", || async {
            let (_, body) = story.cluster.etcd[index].get("/health").await?;
            body.contains("true").then_some(())
        })
        .await;
    }
    story.kept_its_replica("after each member was away").await;
    load.stop().await.assert_all_answered("while etcd members are frozen and killed");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_coordinator_outlives_an_etcd_that_is_away_and_answers_reads_with_their_age() {
    let mut story = Story::start(1, 1).await;
    let load = story.load();
    story.cluster.etcd[0].kill_9();
    let reason = story.cluster.readiness(0, 503).await;
    assert!(reason.contains("etcd is unreachable"), "{reason}");
    let read = story.cluster.operator.run(&["get", "isvc", "warm"]);
    assert_eq!(read.code, 0, "{}{}", read.out, read.err);
    assert!(read.out.contains("warm") && read.err.contains("this is the state of"), "{}{}", read.out, read.err);
    let write = story.cluster.operator.run(&["node", "cordon", "a"]);
    assert_ne!(write.code, 0);
    assert!(write.err.contains("store") && !write.err.contains("another coordinator leads now"), "{}", write.err);
    story.coordinators_run("etcd is away");

    story.cluster.start_etcd(0);
    assert!(story.cluster.ready(0).await.contains("leading"));
    story.nodes_are_ready().await;
    story.control_works("after etcd came back").await;
    story.wake_works("after etcd came back").await;
    story.kept_its_replica("after etcd came back").await;
    load.stop().await.assert_all_answered("while etcd is away");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_answers_with_the_leaders_address_and_takes_over_when_the_leader_is_killed() {
    let mut story = Story::start(1, 2).await;
    let leader = story.cluster.leader().await;
    let standby = 1 - leader;
    assert!(story.cluster.ready(standby).await.contains("standby"), "a standby is ready to take over");
    let (status, metrics) = story.cluster.coordinators[standby].get("/metrics").await.unwrap();
    assert!(status == 200 && metrics.contains("service_version"), "{metrics}");
    // Only the standby is configured: its answer says who leads.
    let mut through_standby = story.cluster.operator.clone();
    let addresses: Vec<_> = through_standby.server.split(',').map(str::to_owned).collect();
    through_standby.server = addresses[standby].clone();
    assert!(through_standby.must(&["get", "nodes"]).contains("Ready"));

    let load = story.load();
    story.cluster.coordinators[leader].kill_9();
    assert_eq!(story.cluster.leader().await, standby);
    story.control_works("after the leader was killed").await;
    story.wake_works("after the leader was killed").await;
    story.nodes_are_ready().await;
    // Longer than a node's lease after the takeover: nothing may be taken away.
    tokio::time::sleep(Duration::from_secs(25)).await;
    story.nodes_are_ready().await;
    story.kept_its_replica("after the leader was killed").await;

    // The one that was killed stands by; a clean stop gives leadership back to it.
    story.cluster.start_coordinator(leader);
    assert!(story.cluster.ready(leader).await.contains("standby"));
    assert!(story.cluster.coordinators[standby].terminate(), "a clean stop exits with status 0");
    assert_eq!(story.cluster.leader().await, leader);
    story.control_works("after the leader was stopped").await;
    story.wake_works("after the leader was stopped").await;
    story.kept_its_replica("after the leader was stopped").await;
    load.stop().await.assert_all_answered("while leaders are killed and stopped");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_leader_is_replaced_and_stands_by_when_it_thaws() {
    let mut story = Story::start(1, 2).await;
    let leader = story.cluster.leader().await;
    let load = story.load();
    story.cluster.coordinators[leader].freeze();
    assert_eq!(story.cluster.leader().await, 1 - leader);
    story.nodes_are_ready().await;
    story.control_works("while the former leader is frozen").await;
    story.wake_works("while the former leader is frozen").await;
    story.cluster.coordinators[leader].thaw();
    eventually("the former leader stands by", || async {
        let (status, body) = story.cluster.coordinators[leader].get("/readyz").await?;
        (status == 200 && body.contains("standby")).then_some(())
    })
    .await;
    story.control_works("after the former leader thawed").await;
    story.kept_its_replica("after the former leader thawed").await;
    story.coordinators_run("after the former leader thawed");
    load.stop().await.assert_all_answered("while the leader is frozen");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_agent_is_lost_after_its_lease_and_serves_again_when_it_thaws() {
    let story = Story::start(1, 1).await;
    let on = usize::from(story.warm["node"] == "b");
    story.agents[on].freeze();
    let name = ["a", "b"][on];
    let state = |wanted: &'static str| {
        let operator = &story.cluster.operator;
        async move {
            eventually(&format!("node {name} is {wanted}"), || async {
                let nodes = operator.json(&["get", "nodes"]);
                nodes["items"].as_array()?.iter().any(|n| n["name"] == name && n["state"] == wanted).then_some(())
            })
            .await;
        }
    };
    let frozen = std::time::Instant::now();
    state("Lost").await;
    // 20 s of lease; the session itself would have broken only after twice as long.
    assert!(frozen.elapsed() >= Duration::from_secs(15), "{:?}", frozen.elapsed());
    story.agents[on].thaw();
    state("Ready").await;
    story.wake_works("after the agent thawed").await;
}

/// A command of the CLI that goes on for long, and what it has printed.
struct Following {
    process: std::process::Child,
    out: std::path::PathBuf,
}

impl Following {
    fn start(cluster: &Cluster, name: &str, args: &[&str]) -> Self {
        let out = cluster.directory().join(name);
        let file = std::fs::File::create(&out).unwrap();
        let credentials = cluster.operator.credentials.clone().unwrap();
        let process = std::process::Command::new(pilotlight())
            .args(args)
            .args(["--server", &cluster.operator.server, "--credentials", &credentials.display().to_string()])
            .stdout(file.try_clone().unwrap())
            .stderr(file)
            .spawn()
            .unwrap();
        Self { process, out }
    }

    /// Waits until it has printed this.
    async fn prints(&self, text: &str) {
        eventually(&format!("{} has {text:?}", self.out.display()), || async {
            std::fs::read_to_string(&self.out).ok()?.contains(text).then_some(())
        })
        .await;
    }

    fn end(mut self) {
        // It may have ended already.
        let _ = self.process.kill();
        self.process.wait().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_that_go_on_for_long_follow_the_next_leader() {
    let mut story = Story::start(1, 2).await;
    let later = Iris { name: "later", ..Iris::default() };
    let watched = Following::start(&story.cluster, "watched", &["get", "isvc", "-w"]);
    let nodes = Following::start(&story.cluster, "nodes", &["get", "nodes", "-w"]);
    let mut logs = Following::start(&story.cluster, "logs", &["logs", "warm", "-f"]);
    let goal = ["wait", "--for=delete", "isvc/cold", "--timeout=60s"];
    let mut waited = Following::start(&story.cluster, "waited", &goal);
    watched.prints("warm").await;
    nodes.prints("Ready").await;
    logs.prints("listening").await;
    let leader = story.cluster.leader().await;
    story.cluster.coordinators[leader].kill_9();
    assert_eq!(story.cluster.leader().await, 1 - leader);
    story.nodes_are_ready().await;
    for follower in [&watched, &nodes, &logs, &waited] {
        follower.prints("looking for the coordinator that leads").await;
    }
    assert_eq!(story.cluster.operator.apply(&later.yaml(), &[]).code, 0);
    watched.prints("later").await;
    story.cluster.operator.must(&["node", "cordon", "b"]);
    nodes.prints("Cordoned").await;
    story.cluster.operator.must(&["delete", "isvc", "warm"]);
    assert!(logs.process.wait().unwrap().success(), "it ends with the service");
    story.cluster.operator.must(&["delete", "isvc", "cold"]);
    waited.prints("deleted").await;
    assert!(waited.process.wait().unwrap().success());
    for follower in [watched, nodes] {
        follower.end();
    }
}
