use std::{
    net::Ipv4Addr,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::SeqCst},
    },
};

use axum::{
    Json, Router,
    extract::State,
    http::StatusCode,
    routing::{get, post},
};
use pilotlight_proto::fleet::v1::{ContainerSpec, ReplicaAssignment};
use serde_json::{Value, json};

use super::*;
use crate::runtime::ProcessRuntime;

const LIMIT: Duration = Duration::from_secs(60);

/// A server that takes some questions' time to fall asleep and to wake.
#[derive(Default)]
struct Server {
    sleeps: AtomicU32,
    wakes: AtomicU32,
    /// Questions until it has turned.
    turning: AtomicU32,
}

async fn sleep_at(State(server): State<Arc<Server>>, uri: http::Uri) -> StatusCode {
    server.turning.store(3, SeqCst);
    server.sleeps.fetch_add(1, SeqCst);
    if uri.query() == Some("level=1") { StatusCode::OK } else { StatusCode::BAD_REQUEST }
}

async fn wake_at(State(server): State<Arc<Server>>) {
    server.turning.store(3, SeqCst);
    server.wakes.fetch_add(1, SeqCst);
}

async fn is_sleeping_at(State(server): State<Arc<Server>>) -> Json<Value> {
    let turning = server.turning.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1)).is_ok();
    let toward_sleep = server.sleeps.load(SeqCst) > server.wakes.load(SeqCst);
    Json(json!({ "is_sleeping": toward_sleep != turning }))
}

async fn started() -> (Arc<Server>, Running) {
    let server = Arc::new(Server::default());
    let routes = Router::new()
        .route("/sleep", post(sleep_at))
        .route("/wake_up", post(wake_at))
        .route("/is_sleeping", get(is_sleeping_at))
        .route("/never", get(async || Json(json!({ "is_sleeping": false }))))
        .with_state(Arc::clone(&server));
    let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, routes).await });
    let assignment = ReplicaAssignment::default();
    let running = Running {
        replica: "a".to_owned(),
        pid: 0,
        address,
        started_at: 0,
        assignment,
        container: None,
        ports: Default::default(),
    };
    (server, running)
}

fn vllm() -> SleepPaths {
    let [sleep, wake, is_sleeping] = ["/sleep?level=1", "/wake_up", "/is_sleeping"].map(str::to_owned);
    SleepPaths { sleep, wake, is_sleeping }
}

fn runtime(folder: &tempfile::TempDir) -> ProcessRuntime {
    ProcessRuntime::new(folder.path(), "/nowhere".into())
}

#[tokio::test]
async fn a_server_that_can_sleep_is_asked_and_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let (server, running) = started().await;
    let slept = fall_asleep(&runtime(&folder), &running, Some(&vllm()), LIMIT).await.unwrap();
    assert!(!slept.holds_gpu_memory);
    assert_eq!((server.sleeps.load(SeqCst), server.turning.load(SeqCst)), (1, 0), "until it said that it sleeps");
    let took = wake(&runtime(&folder), &running, Some(&vllm()), LIMIT).await.unwrap();
    assert_eq!((server.wakes.load(SeqCst), server.turning.load(SeqCst)), (1, 0));
    // Three questions, with a pause after each, of which each is twice as long.
    assert!(slept.took >= 7 * LOOK && took >= 7 * LOOK, "{slept:?} {took:?}");
}

#[tokio::test]
async fn refusals_and_servers_that_do_not_fall_asleep_are_told() {
    let folder = tempfile::tempdir().unwrap();
    let (_, running) = started().await;
    let error = async |paths: SleepPaths, limit| {
        fall_asleep(&runtime(&folder), &running, Some(&paths), limit).await.unwrap_err().to_string()
    };
    let refused = error(SleepPaths { sleep: "/sleep?level=2".to_owned(), ..vllm() }, LIMIT).await;
    assert_eq!(refused, "/sleep?level=2: HTTP status 400 Bad Request");
    let unknown = error(SleepPaths { is_sleeping: "/sleep".to_owned(), ..vllm() }, LIMIT).await;
    assert_eq!(unknown, "/sleep: HTTP status 405 Method Not Allowed");
    let late = error(SleepPaths { is_sleeping: "/never".to_owned(), ..vllm() }, Duration::from_millis(500)).await;
    assert_eq!(late, "/sleep?level=1: not done within 500ms");
}

/// A process that says "tick" again and again.
fn ticking() -> ReplicaAssignment {
    // Without children: a shell that waits in vfork does not show as stopped.
    let command = ["sh", "-c", "i=0; while :; do i=$((i+1)); [ $((i % 20000)) = 0 ] && echo tick; done"]
        .map(str::to_owned)
        .to_vec();
    let container = Some(ContainerSpec { command, ..Default::default() });
    ReplicaAssignment { replica: "ticking".to_owned(), container, ..Default::default() }
}

/// Waits for more output than there is.
async fn ticks_on(runtime: &ProcessRuntime) {
    let length = || std::fs::metadata(runtime.log_file("ticking")).map_or(0, |about| about.len());
    let before = length();
    while length() <= before {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn state_of(pid: u32) -> char {
    procfs::process::Process::new(pid as i32).unwrap().stat().unwrap().state
}

#[tokio::test]
async fn any_other_process_is_paused_and_resumed_and_can_be_stopped_while_paused() {
    let folder = tempfile::tempdir().unwrap();
    let runtime = runtime(&folder);
    let running = runtime.start(&ticking(), &[]).await.unwrap();
    ticks_on(&runtime).await;
    let slept = fall_asleep(&runtime, &running, None, LIMIT).await.unwrap();
    assert!(slept.holds_gpu_memory);
    assert_eq!(state_of(running.pid), 'T');
    wake(&runtime, &running, None, LIMIT).await.unwrap();
    ticks_on(&runtime).await;

    runtime.pause(&running).await.unwrap();
    runtime.stop(&running, LIMIT).await;
    let exit = runtime.exited(&running).await;
    assert_eq!(exit.signal, Some(nix::libc::SIGTERM), "it hears the polite signal, paused or not");
    let gone = runtime.pause(&running).await.unwrap_err().to_string();
    assert!(gone.starts_with("cannot pause ticking"), "{gone}");
}
