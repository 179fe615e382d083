//! Whether the models that a replica starts with are still what their stores have: asked while it starts, since
//! it cannot become ready at once anyway. It does not become ready before the answer.

use tokio::sync::watch;

use super::failure::Failure;
use crate::models::Version;

/// What is to be asked; the default is nothing.
#[derive(Default)]
pub(super) struct Question(pub(super) Vec<Version>);

/// Why a replica may not go on as it has started.
pub(super) enum Refusal {
    /// A store has another version now.
    Changed {
        /// Of which model.
        uri: String,
    },
    /// A store cannot be asked, or not with these credentials.
    Failed(Failure),
}

impl Question {
    /// Resolves when the replica may not go on; never, where all is as it was. `confirmed` becomes true then.
    pub(super) async fn refused(self, confirmed: watch::Sender<bool>) -> Refusal {
        for version in &self.0 {
            match version.is_current().await {
                Ok(true) => {}
                Ok(false) => return Refusal::Changed { uri: version.uri().to_owned() },
                Err(error) => return Refusal::Failed(Failure::of_model(&error)),
            }
        }
        confirmed.send_replace(true);
        std::future::pending().await
    }
}

#[cfg(test)]
mod tests {
    use std::{
        net::Ipv4Addr,
        sync::{Arc, Mutex},
    };

    use axum::{
        Router,
        extract::State,
        http::{StatusCode, header},
        response::{IntoResponse as _, Response},
    };
    use pilotlight_proto::fleet::v1::{EnvVar, ModelMount, ReplicaAssignment, ReplicaPhase};
    use tokio::{net::TcpListener, sync::watch};

    use super::super::tests::{KEY, Node, node_models};

    /// A web server of one model: its ETag and content, and whether it is there.
    struct Store {
        file: Mutex<Option<(&'static str, &'static str)>>,
        /// False: it takes questions, and does not answer them.
        answers: watch::Sender<bool>,
    }

    async fn answer(State(store): State<Arc<Store>>) -> Response {
        store.answers.subscribe().wait_for(|answers| *answers).await.unwrap();
        match *store.file.lock().unwrap() {
            Some((etag, content)) => ([(header::ETAG, etag)], content).into_response(),
            None => StatusCode::NOT_FOUND.into_response(),
        }
    }

    /// A node that has the first version of the store's model, and no replica any more.
    struct Case {
        store: Arc<Store>,
        node: Node,
        uri: String,
        _cache: tempfile::TempDir,
    }

    impl Case {
        async fn start() -> Self {
            let file = Mutex::new(Some(("\"1\"", "one")));
            let store = Arc::new(Store { file, answers: watch::Sender::new(true) });
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
            let uri = format!("http://{}/model.bin", listener.local_addr().unwrap());
            let router = Router::new().route("/model.bin", axum::routing::any(answer)).with_state(Arc::clone(&store));
            tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
            let cache = tempfile::tempdir().unwrap();
            let node = Node::with(node_models(cache.path()), Vec::new()).await;
            let case = Self { store, node, uri, _cache: cache };
            case.assign("me");
            case.node.phases(&[ReplicaPhase::Ready]).await;
            case.node.tell([]);
            case.node.phases(&[ReplicaPhase::Stopped]).await;
            case.node.tell([]);
            case.node.phases(&[]).await;
            case
        }

        /// A replica of the model, fetched as this user.
        fn assign(&self, user: &str) {
            let credentials = vec![EnvVar { name: "USER".to_owned(), value: user.to_owned() }];
            let model = ModelMount { uri: self.uri.clone(), credentials, ..Default::default() };
            let (replica, revision) = ("a".to_owned(), KEY.to_owned());
            self.node.tell([ReplicaAssignment { replica, revision, models: vec![model], ..Default::default() }]);
        }

        /// What each start has found in its folder.
        fn started_with(&self) -> Vec<String> {
            let folders = self.node.fake.folders.lock().unwrap().clone();
            folders.iter().map(|of| std::fs::read_to_string(of[0].join("model.bin")).unwrap()).collect()
        }

        async fn started(&self, times: usize) {
            while self.started_with().len() < times {
                tokio::task::yield_now().await;
            }
        }
    }

    #[tokio::test]
    async fn a_start_does_not_wait_for_the_store_and_being_ready_does() {
        let case = Case::start().await;
        case.store.answers.send_replace(false);
        case.assign("me");
        case.started(2).await;
        // It would be ready at once.
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        case.node.phases(&[ReplicaPhase::Starting]).await;
        case.store.answers.send_replace(true);
        case.node.phases(&[ReplicaPhase::Ready]).await;
        assert_eq!(case.started_with(), ["one", "one"]);
    }

    #[tokio::test]
    async fn what_another_may_have_is_asked_for_first() {
        let case = Case::start().await;
        case.store.answers.send_replace(false);
        case.assign("somebody else");
        case.node.phases(&[ReplicaPhase::Pending]).await;
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        assert_eq!(case.started_with(), ["one"], "not before the store has let it");
        case.store.answers.send_replace(true);
        case.node.phases(&[ReplicaPhase::Ready]).await;
    }

    #[tokio::test]
    async fn one_that_has_started_with_what_is_not_there_any_more_starts_anew() {
        let case = Case::start().await;
        *case.store.file.lock().unwrap() = Some(("\"2\"", "two"));
        case.assign("me");
        case.node.phases(&[ReplicaPhase::Ready]).await;
        assert_eq!(case.started_with(), ["one", "one", "two"]);
        assert_eq!(case.node.reconciler.statuses().borrow().replicas[0].restarts, 0);
    }

    #[tokio::test]
    async fn one_whose_store_has_nothing_any_more_fails_and_asks_first_the_next_time() {
        let case = Case::start().await;
        *case.store.file.lock().unwrap() = None;
        case.assign("me");
        let failed = case.node.restarted(1).await;
        assert_eq!((failed.phase(), failed.reason.as_str()), (ReplicaPhase::Failed, "ModelNotFound"));
        case.node.restarted(2).await;
        assert_eq!(case.started_with(), ["one", "one"]);
    }

    #[tokio::test]
    async fn a_store_that_says_nothing_is_not_waited_for_for_ever() {
        let case = Case::start().await;
        case.store.answers.send_replace(false);
        case.assign("me");
        let failed = case.node.restarted(1).await;
        assert_eq!(failed.reason, "ModelFetchFailed");
        assert!(failed.message.contains("has not said within 1s what is there"), "{}", failed.message);
    }
}
