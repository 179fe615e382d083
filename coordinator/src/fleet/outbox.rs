//! What waits to be sent to one agent: a little of everything, however slowly the agent reads.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;
use futures::Stream;
use pilotlight_proto::fleet::v1::{self as fleet, CoordinatorMessage, coordinator_message::Message as ToAgent};
use prost::Message as _;
use tokio::sync::Notify;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::feed::{Parts, RouteFeed};

/// Requests to an agent that may wait. One that is further behind has to connect again.
const CONTROL_QUEUE_CAPACITY: usize = 256;

/// Messages for one agent. Of assignments and routes only the newest are kept, and routes delay nothing else.
/// Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Outbox(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    lanes: Mutex<Lanes>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct Lanes {
    /// The welcome, and requests. They are sent first.
    control: VecDeque<ToAgent>,
    /// The newest assignment, unless it has been sent. It is sent before routes.
    assignment: Option<fleet::Assignment>,
    routes: Option<RouteLane>,
}

#[derive(Debug)]
struct RouteLane {
    feed: RouteFeed,
    /// Version that the agent has once all `parts` are sent; `None` before the first.
    version: Option<u64>,
    /// An update that is being sent, and the number of its parts that have been.
    parts: Option<(Parts, usize)>,
}

impl RouteLane {
    fn next(&mut self) -> Option<Bytes> {
        if self.parts.is_none() {
            let (version, parts) = self.feed.update_from(self.version)?;
            self.version = Some(version);
            self.parts = Some((parts, 0));
        }
        let (parts, sent) = self.parts.as_mut()?;
        let part = parts.get(*sent).cloned();
        *sent += 1;
        if *sent >= parts.len() {
            self.parts = None;
        }
        part
    }
}

impl Outbox {
    pub(super) fn new() -> Self {
        Self(Arc::new(Shared { lanes: Mutex::default(), changed: Notify::new() }))
    }

    fn lanes(&self) -> MutexGuard<'_, Lanes> {
        self.0.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns `false` if too many requests wait already.
    pub(super) fn push(&self, message: ToAgent) -> bool {
        let mut lanes = self.lanes();
        match message {
            ToAgent::Assignment(assignment) => lanes.assignment = Some(assignment),
            message if lanes.control.len() < CONTROL_QUEUE_CAPACITY => lanes.control.push_back(message),
            _ => return false,
        }
        drop(lanes);
        self.0.changed.notify_one();
        true
    }

    /// Sends all routes, and their changes from now on.
    pub(super) fn follow(&self, feed: RouteFeed) {
        self.lanes().routes = Some(RouteLane { feed, version: None, parts: None });
        self.0.changed.notify_one();
    }

    /// There are newer routes.
    pub(super) fn notify_routes(&self) {
        self.0.changed.notify_one();
    }

    /// The next message, if one waits.
    pub(super) fn take(&self) -> Option<Bytes> {
        let mut lanes = self.lanes();
        let assignment = |lanes: &mut Lanes| lanes.assignment.take().map(ToAgent::Assignment);
        match lanes.control.pop_front().or_else(|| assignment(&mut lanes)) {
            Some(message) => {
                drop(lanes);
                Some(CoordinatorMessage { message: Some(message) }.encode_to_vec().into())
            }
            None => lanes.routes.as_mut()?.next(),
        }
    }

    /// Messages in the order in which they are to be sent. Ends when `closed` is cancelled, which happens when it is
    /// dropped, too.
    pub(super) fn stream(self, closed: CancellationToken) -> impl Stream<Item = Bytes> + Send + 'static {
        let reader = Reader { outbox: self, closed: closed.clone(), _guard: closed.drop_guard() };
        futures::stream::unfold(reader, async |reader: Reader| Some((reader.next().await?, reader)))
    }
}

struct Reader {
    outbox: Outbox,
    closed: CancellationToken,
    _guard: DropGuard,
}

impl Reader {
    async fn next(&self) -> Option<Bytes> {
        loop {
            if self.closed.is_cancelled() {
                return None;
            }
            if let Some(message) = self.outbox.take() {
                return Some(message);
            }
            tokio::select! {
                () = self.closed.cancelled() => return None,
                () = self.outbox.0.changed.notified() => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(bytes: Bytes) -> ToAgent {
        CoordinatorMessage::decode(bytes).unwrap().message.unwrap()
    }

    fn assignment(version: u64) -> ToAgent {
        ToAgent::Assignment(fleet::Assignment { version, ..Default::default() })
    }

    fn publish(feed: &RouteFeed, services: u64, host: &str) {
        let route = |number| {
            let (name, hosts) = (format!("s-{number}"), vec![host.to_owned()]);
            let route = fleet::ServiceRoute { namespace: "default".into(), name, hosts, ..Default::default() };
            (format!("default/s-{number}"), Some(route))
        };
        feed.publish((0..services).map(route), None);
    }

    /// Versions of the messages that are sent, by their lane.
    fn sent(outbox: &Outbox) -> Vec<(&'static str, u64)> {
        let version = |message| match decode(message) {
            ToAgent::Assignment(assignment) => ("assignment", assignment.version),
            ToAgent::Routes(routes) => ("routes", routes.version),
            _ => ("control", 0),
        };
        std::iter::from_fn(|| outbox.take()).map(version).collect()
    }

    #[test]
    fn an_assignment_overtakes_routes_that_are_being_sent() {
        let (outbox, feed) = (Outbox::new(), RouteFeed::default());
        publish(&feed, 100, &"h".repeat(10_000));
        outbox.follow(feed);
        assert!(matches!(decode(outbox.take().unwrap()), ToAgent::Routes(routes) if routes.more));
        assert!(outbox.push(assignment(7)));
        assert_eq!(decode(outbox.take().unwrap()), assignment(7));
        assert!(sent(&outbox).iter().all(|sent| *sent == ("routes", 1)));
    }

    #[test]
    fn a_slow_agent_receives_the_newest_state_once() {
        let (outbox, feed) = (Outbox::new(), RouteFeed::default());
        outbox.follow(feed.clone());
        assert_eq!(sent(&outbox), [("routes", 0)]);
        for turn in 1..=1_000 {
            publish(&feed, 2, &turn.to_string());
            assert!(outbox.push(assignment(turn)), "the session goes on");
        }
        assert_eq!(sent(&outbox), [("assignment", 1_000), ("routes", 1_000)]);
    }

    #[test]
    fn an_agent_that_answers_no_requests_is_told_apart() {
        let outbox = Outbox::new();
        let request = || ToAgent::LogRequest(fleet::LogRequest::default());
        assert!((0..CONTROL_QUEUE_CAPACITY).all(|_| outbox.push(request())));
        assert!(!outbox.push(request()));
    }

    #[tokio::test]
    async fn a_reader_that_goes_away_closes_the_session() {
        let closed = CancellationToken::new();
        drop(Outbox::new().stream(closed.clone()));
        assert!(closed.is_cancelled());
    }
}
