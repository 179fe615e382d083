//! Sleep with real processes and containers: over a restart of the agent, and how long a wake takes.
//!
//! Without a Docker Engine the container part is left out, as in `runtime_conformance`.

#![allow(clippy::print_stdout, reason = "it measures, too")]

use std::{collections::BTreeMap, net::SocketAddr, path::Path, sync::Arc, time::Duration};

use futures::future::BoxFuture;
use pilotlight_agent::{
    endpoint::{Egress, EgressListener},
    models::{Models, Shelf},
    reconcile::Reconciler,
    runtime::{DockerRuntime, DockerSettings, ProcessRuntime, Runtime},
    sidecar::Sidecar,
};
use pilotlight_proto::fleet::v1::{
    Assignment, ContainerSpec, HttpGet, Probe, ReplicaAssignment, ReplicaPhase, ReplicaStatus, Rung, SleepPaths,
    probe::Handler,
};
use pilotlight_tests::container::{IMAGE, image, server};

/// These replicas call nobody.
struct NoWayBack;

impl Egress for NoWayBack {
    fn open(&self, _: &str, _: SocketAddr) -> BoxFuture<'static, std::io::Result<EgressListener>> {
        Box::pin(async { Err(std::io::ErrorKind::Unsupported.into()) })
    }
}

/// An agent process' worth of reconciler.
async fn agent(docker: bool, data: &Path) -> Arc<Reconciler> {
    let runtime: Arc<dyn Runtime> = if docker {
        Arc::new(DockerRuntime::connect("node", data, DockerSettings::default()).await.unwrap())
    } else {
        Arc::new(ProcessRuntime::new(data, "/none".into()))
    };
    let models = Models::open(data.join("models"), BTreeMap::new(), Duration::from_secs(1), None).unwrap();
    let shelf = Shelf::new(models.clone(), 0);
    Reconciler::adopt(runtime, Sidecar::new(), Arc::new(NoWayBack), models, shelf).await.unwrap()
}

async fn phase(agent: &Reconciler, phase: ReplicaPhase) -> ReplicaStatus {
    let mut statuses = agent.statuses();
    let reached = statuses.wait_for(|all| all.replicas.first().is_some_and(|status| status.phase() == phase)).await;
    reached.unwrap().replicas[0].clone()
}

fn assignment(docker: bool, own: bool) -> ReplicaAssignment {
    let get = HttpGet { path: "/".into(), ..Default::default() };
    let container = ContainerSpec {
        image: if docker { IMAGE.into() } else { String::new() },
        command: vec![if docker { "/server".into() } else { server().to_string_lossy().into_owned() }],
        readiness_probe: Some(Probe { handler: Some(Handler::HttpGet(get)), ..Default::default() }),
        ..Default::default()
    };
    // The server takes every path and says nothing of sleep: its word is taken.
    let paths = SleepPaths { sleep: "/sleep".into(), wake: "/wake_up".into(), is_sleeping: String::new() };
    ReplicaAssignment {
        replica: format!("sleeper-{}", uuid::Uuid::new_v4().simple()),
        revision: "default/iris-00001".into(),
        container: Some(container),
        sleep_paths: own.then_some(paths),
        ..Default::default()
    }
}

#[tokio::test]
async fn a_sleeper_outlives_its_agent_and_wakes_with_the_next() {
    let kinds: &[bool] = if image().is_some() { &[false, true] } else { &[false] };
    for (docker, own) in kinds.iter().flat_map(|docker| [(*docker, false), (*docker, true)]) {
        let data = tempfile::tempdir().unwrap();
        let replica = assignment(docker, own);
        let tell = |agent: &Reconciler, version, asleep| {
            let replicas = vec![ReplicaAssignment { asleep, ..replica.clone() }];
            agent.assign(Assignment { version, replicas, ..Default::default() });
        };
        let first = agent(docker, data.path()).await;
        tell(&first, 1, false);
        let ready = phase(&first, ReplicaPhase::Ready).await;
        tell(&first, 2, true);
        let asleep = phase(&first, ReplicaPhase::Asleep).await;
        assert_eq!(asleep.holds_gpu_memory, !own);
        assert!(asleep.memory_bytes > 0, "{asleep:?}");
        // As a kill does: its tasks end where they are.
        first.shutdown(false).await;
        drop(first);

        let second = agent(docker, data.path()).await;
        let found = phase(&second, ReplicaPhase::Asleep).await;
        assert_eq!((found.pid, found.adopted, found.restarts), (ready.pid, true, 0));
        tell(&second, 1, true);
        for version in 1..=5 {
            tell(&second, 2 * version, false);
            let woken = phase(&second, ReplicaPhase::Ready).await.transition.unwrap();
            assert_eq!((woken.from(), woken.to()), (Rung::Asleep, Rung::Serving));
            tell(&second, 2 * version + 1, true);
            let slept = phase(&second, ReplicaPhase::Asleep).await.transition.unwrap();
            assert_eq!((slept.from(), slept.to()), (Rung::Serving, Rung::Asleep));
            let took = [woken, slept].map(|way| Duration::try_from(way.took.unwrap()).unwrap());
            println!("docker {docker}, own endpoints {own}: woke in {:?}, slept in {:?}", took[0], took[1]);
        }
        second.assign(Assignment { version: 100, replicas: Vec::new(), ..Default::default() });
        phase(&second, ReplicaPhase::Stopped).await;
    }
}
