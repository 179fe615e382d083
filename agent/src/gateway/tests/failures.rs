//! Requests for a revision that cannot serve, on a paused clock.

use std::time::SystemTime;

use pilotlight_proto::fleet::v1::{Demand, RevisionFailure};
use tokio::time::Instant;

use super::*;
use crate::gateway::coordinator::COORDINATOR_TIMEOUT;

const TIMEOUT: Duration = Duration::from_secs(300);

/// A gateway whose only revision has no ready replica.
struct Gateway {
    path: Arc<DataPath>,
    queue: Arc<RevisionQueue>,
    demands: mpsc::Receiver<Demand>,
    version: u64,
}

impl Gateway {
    fn start() -> Self {
        let metrics = GatewayMetrics::register(&mut Registry::default());
        let (sender, demands) = mpsc::channel(8);
        let connect = Arc::new(Plain);
        let path = DataPath::new(Setup {
            node: "edge".into(),
            max_request_body: 1 << 20,
            connect,
            demands: sender,
            metrics,
            clients: ClientSettings::default(),
        });
        path.set_connected(true);
        let queue = path.sidecar().revision(KEY);
        let mut gateway = Self { path, queue, demands, version: 0 };
        gateway.route(None);
        gateway
    }

    /// The coordinator sends routes with this failure.
    fn route(&mut self, failure: Option<RevisionFailure>) {
        self.version += 1;
        let mut update = routes("edge", TIMEOUT, &[], 1);
        update.version = self.version;
        let revision = &mut update.services[0].revisions[0];
        (revision.failure, revision.replicas) = (failure, Vec::new());
        self.path.apply_routes(update);
    }

    /// Sends a request.
    fn send(&self) -> tokio::task::JoinHandle<Answer> {
        let (path, queue) = (Arc::clone(&self.path), Arc::clone(&self.queue));
        tokio::spawn(async move { hold(&path, &queue, CHAT).await.err().unwrap() })
    }
}

/// A failure whose next attempt begins so many seconds from now; 0 if none is planned.
fn failure(attempt: u64, next: i64) -> RevisionFailure {
    let now = prost_types::Timestamp::from(SystemTime::now());
    RevisionFailure {
        reason: "Error".into(),
        message: "the process ended with exit code 3".into(),
        exit_code: Some(3),
        last_log_lines: vec!["loading".into(), "no such file: model.bin".into()],
        next_attempt_at: (next != 0).then(|| prost_types::Timestamp { seconds: now.seconds + next, nanos: now.nanos }),
        attempt,
        may_pass: false,
    }
}

fn retry_after(answer: &Answer) -> u64 {
    let Answer::ReplicaFailed { reason, message, retry_after } = answer else { panic!("{answer:?}") };
    let expected = "the process ended with exit code 3; last output: loading | no such file: model.bin";
    assert_eq!((reason.as_str(), message.as_str()), ("Error", expected));
    *retry_after
}

#[tokio::test(start_paused = true)]
async fn held_requests_are_answered_at_once_when_the_replica_fails_for_good() {
    let mut gateway = Gateway::start();
    let (begun, held) = (Instant::now(), gateway.send());
    assert_eq!(gateway.demands.recv().await.unwrap().revision, KEY);
    tokio::time::sleep(SECOND).await;
    gateway.route(Some(failure(1, 3600)));
    let answer = held.await.unwrap();
    assert_eq!(begun.elapsed(), SECOND);
    let retry_after = retry_after(&answer);
    assert!((3590..=3600).contains(&retry_after), "{retry_after}");
    let response = answer.response();
    assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(response.headers()[header::RETRY_AFTER], retry_after.to_string());
    assert_eq!(gateway.queue.waiting(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_request_does_not_wait_while_the_replica_is_in_back_off() {
    let mut gateway = Gateway::start();
    gateway.route(Some(failure(1, 3600)));
    let begun = Instant::now();
    assert!(retry_after(&gateway.send().await.unwrap()) >= 3590);
    assert_eq!((begun.elapsed(), gateway.queue.waiting()), (Duration::ZERO, 0));
    assert!(gateway.demands.try_recv().is_err(), "the attempt is planned already");
}

#[tokio::test(start_paused = true)]
async fn a_request_causes_an_attempt_that_is_due_and_is_answered_with_its_failure_only() {
    for next in [0, -3600] {
        let mut gateway = Gateway::start();
        gateway.route(Some(failure(1, next)));
        let held = gateway.send();
        assert_eq!(gateway.demands.recv().await.unwrap().revision, KEY);
        // Other services change meanwhile.
        gateway.route(Some(failure(1, next)));
        gateway.route(None);
        tokio::time::sleep(60 * SECOND).await;
        assert!(!held.is_finished(), "the failure from before is no answer to this request");
        gateway.route(Some(failure(2, 10)));
        assert!((1..=10).contains(&retry_after(&held.await.unwrap())));
    }
}

#[tokio::test(start_paused = true)]
async fn a_request_waits_for_the_attempt_that_clears_the_failure() {
    let mut gateway = Gateway::start();
    let failed = Some(failure(1, 10));
    gateway.route(failed);
    gateway.send().await.unwrap();
    gateway.route(None);
    let begun = Instant::now();
    let answer = gateway.send().await.unwrap();
    assert_eq!((answer, begun.elapsed()), (Answer::Timeout { seconds: 300, waiting: true }, TIMEOUT));
}

#[tokio::test(start_paused = true)]
async fn a_request_that_needs_a_coordinator_which_is_away_is_answered_before_its_deadline() {
    let gateway = Gateway::start();
    gateway.path.set_connected(false);
    let begun = Instant::now();
    let held = gateway.send();
    let away = COORDINATOR_TIMEOUT.as_secs();
    assert_eq!(held.await.unwrap(), Answer::CoordinatorUnavailable { seconds: away });
    assert_eq!(begun.elapsed(), COORDINATOR_TIMEOUT);
    let later = gateway.send();
    assert_eq!(later.await.unwrap(), Answer::CoordinatorUnavailable { seconds: away });
    assert_eq!(begun.elapsed(), COORDINATOR_TIMEOUT, "later ones do not wait");

    gateway.path.set_connected(true);
    assert_eq!(gateway.send().await.unwrap(), Answer::Timeout { seconds: 300, waiting: true });
}

#[tokio::test(start_paused = true)]
async fn requests_that_wait_are_answered_when_their_service_is_deleted() {
    let gateway = Gateway::start();
    let (begun, held) = (Instant::now(), gateway.send());
    tokio::time::sleep(SECOND).await;
    let name = "default/echo".to_owned();
    gateway.path.apply_routes(fleet::Routes { version: 2, removed: vec![name.clone()], ..Default::default() });
    assert_eq!(held.await.unwrap(), Answer::NoRevision { service: name });
    assert_eq!((begun.elapsed(), gateway.queue.waiting()), (SECOND, 0));
}

#[tokio::test(start_paused = true)]
async fn a_slot_of_a_replica_that_broke_off_is_given_out_once_its_exit_would_be_noticed() {
    let gateway = Gateway::start();
    gateway.path.sidecar().ready(LocalReplica {
        name: "replica".to_owned(),
        revision: KEY.to_owned(),
        address: SocketAddr::from(([127, 0, 0, 1], 1)),
        h2c: false,
        container_concurrency: 1,
        timeout: TIMEOUT,
    });
    let broken = gateway.queue.enter(false).unwrap().now().unwrap();
    let begun = Instant::now();
    crate::gateway::hold::release_after_exit(broken);
    assert!(gateway.queue.enter(false).unwrap().granted().await.is_some());
    assert_eq!(begun.elapsed(), crate::gateway::hold::EXIT_NOTICE_TIME);
}

#[tokio::test(start_paused = true)]
async fn a_request_waits_for_what_may_pass_and_its_timeout_names_the_cause() {
    let mut gateway = Gateway::start();
    let message = "0/2 nodes fit: 2 with fewer than 5 free GPUs".to_owned();
    let unschedulable =
        RevisionFailure { reason: "Unschedulable".into(), message, may_pass: true, ..Default::default() };
    let (begun, held) = (Instant::now(), gateway.send());
    tokio::time::sleep(SECOND).await;
    gateway.route(Some(unschedulable));
    let answer = held.await.unwrap();
    let cause = "Unschedulable: 0/2 nodes fit: 2 with fewer than 5 free GPUs".to_owned();
    assert_eq!((answer, begun.elapsed()), (Answer::NotReady { seconds: 300, cause }, TIMEOUT));
}
