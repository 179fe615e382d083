//! Where a gRPC call goes: to the services of the leader, to what a former leader still knows, or back to the caller.

use std::{
    convert::Infallible,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use arc_swap::ArcSwap;
use axum::{Router, body::Body};
use http::{HeaderValue, Request, Response};
use jiff::Timestamp;
use pilotlight_identity::{LEADER_HEADER, STATE_TIME_HEADER};
use tonic::Status;
use tower::{Service, ServiceExt as _};

use super::standing::{Role, Standing};
use crate::threads::ApiThreads;

/// Path prefix of the calls that a former leader answers from memory.
const CONTROL: &str = "/pilotlight.control.";

/// The services of all roles. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Switch {
    target: Arc<ArcSwap<Target>>,
    standing: Standing,
    /// Where calls of the control API are handled.
    api: ApiThreads,
}

enum Target {
    /// Nobody has led here yet, or another coordinator leads.
    Nowhere,
    /// The services of the leader.
    Leader(Router),
    /// The services of a leader that lost the store: reads only, as of this time.
    FormerLeader(Router, Timestamp),
}

impl Switch {
    pub(crate) fn new(standing: Standing, api: ApiThreads) -> Self {
        Self { target: Arc::new(ArcSwap::from_pointee(Target::Nowhere)), standing, api }
    }

    /// Calls go to these services.
    pub(crate) fn lead(&self, services: Router) {
        self.target.store(Arc::new(Target::Leader(services)));
    }

    /// Calls of the control API still go to the leader's services, and are answered as of `time`.
    pub(crate) fn suspend(&self, time: Timestamp) {
        if let Target::Leader(services) = &**self.target.load() {
            self.target.store(Arc::new(Target::FormerLeader(services.clone(), time)));
        }
    }

    /// Calls are refused.
    pub(crate) fn refuse_all(&self) {
        self.target.store(Arc::new(Target::Nowhere));
    }

    fn refusal(&self) -> Status {
        match self.standing.role() {
            Role::Standby(leader) => {
                let mut status =
                    Status::unavailable(format!("this coordinator is a standby; {} leads", leader.address));
                if let Ok(address) = leader.address.parse() {
                    status.metadata_mut().insert(LEADER_HEADER, address);
                }
                status
            }
            Role::StoreUnavailable(reason) => Status::unavailable(reason),
            Role::SteppedDown(reason) => Status::unavailable(format!("the coordinator has stepped down: {reason}")),
            Role::Starting | Role::TakingOver | Role::Leading => {
                Status::unavailable("the coordinator is starting; try again")
            }
        }
    }
}

impl Service<Request<Body>> for Switch {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let (services, time) = match &**self.target.load() {
            Target::Leader(services) => (services.clone(), None),
            Target::FormerLeader(services, time) if request.uri().path().starts_with(CONTROL) => {
                (services.clone(), Some(*time))
            }
            Target::Nowhere | Target::FormerLeader(..) => {
                let refusal = self.refusal().into_http::<Body>();
                return Box::pin(std::future::ready(Ok(refusal)));
            }
        };
        let api = self.api.clone();
        Box::pin(async move {
            let is_control = request.uri().path().starts_with(CONTROL);
            let answering = services.oneshot(request);
            let mut response = if is_control {
                let answered = api.run(answering).await;
                answered.unwrap_or_else(|| Ok(Status::internal("the call failed; see the log").into_http()))?
            } else {
                answering.await?
            };
            if let Some(time) = time.and_then(|time| HeaderValue::from_str(&time.to_string()).ok()) {
                response.headers_mut().insert(STATE_TIME_HEADER, time);
            }
            Ok(response)
        })
    }
}
