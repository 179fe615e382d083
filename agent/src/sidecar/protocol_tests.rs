//! The protocol of `peer.proto` as a state machine: three nodes, each a gateway and the owner of a replica, under random
//! schedules of arrivals, cancellations, messages, streams that break, and replicas that come and go. Everything but the
//! network is the code that runs.

use std::{
    collections::{BTreeMap, VecDeque},
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use pilotlight_proto::peer::v1::{self as peer, bind_response};
use proptest::prelude::*;
use tokio::{
    sync::{mpsc, oneshot::error::TryRecvError},
    time::Instant,
};

use super::*;
use crate::endpoint::{Endpoints as _, LocalReplica};

const KEY: &str = "default/iris-00001";
const NODES: usize = 3;
const LIMIT: u32 = 2;

/// One step. Numbers are taken modulo what there is.
#[derive(Debug, Clone)]
enum Step {
    Arrive(usize),
    /// The client of a request disconnects, whatever the request does.
    Cancel(usize),
    /// A request that runs is answered.
    Finish(usize),
    /// A request that holds an offer reaches the node that made it.
    Reach(usize),
    OpenStream(usize, usize),
    BreakStream(usize, usize),
    /// The gateway's task announces what was marked.
    Announce(usize, usize),
    /// One message of the gateway arrives at the node.
    DeliverToNode(usize, usize),
    /// One offer of the node arrives at the gateway.
    DeliverToGateway(usize, usize),
    Ready(usize),
    NotReady(usize),
    Drain(usize),
    Die(usize),
    /// All offers of a node that are open lapse.
    Lapse(usize),
    /// A gateway learns which replicas are ready now.
    Route(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let node = || 0..NODES;
    let pair = || (node(), node());
    prop_oneof![
        6 => node().prop_map(Step::Arrive),
        1 => (0..100usize).prop_map(Step::Cancel),
        4 => (0..100usize).prop_map(Step::Finish),
        4 => (0..100usize).prop_map(Step::Reach),
        2 => pair().prop_map(|(a, b)| Step::OpenStream(a, b)),
        1 => pair().prop_map(|(a, b)| Step::BreakStream(a, b)),
        6 => pair().prop_map(|(a, b)| Step::Announce(a, b)),
        6 => pair().prop_map(|(a, b)| Step::DeliverToNode(a, b)),
        6 => pair().prop_map(|(a, b)| Step::DeliverToGateway(a, b)),
        3 => node().prop_map(Step::Ready),
        1 => node().prop_map(Step::NotReady),
        1 => node().prop_map(Step::Drain),
        1 => node().prop_map(Step::Die),
        1 => node().prop_map(Step::Lapse),
        3 => node().prop_map(Step::Route),
    ]
}

/// A stream from a gateway to a node, with the messages on their way.
struct Stream {
    id: u64,
    at_node: GatewayStream,
    to_node: VecDeque<Message>,
    to_gateway: mpsc::UnboundedReceiver<peer::BindResponse>,
}

enum Message {
    Credit(String, Credit),
    Decline(u64),
}

/// Where a request is.
enum Progress {
    /// In line at its gateway.
    Waiting(Waiting),
    /// On its way to another node with an offer.
    Sent(Grant),
    /// On a replica: the node, its incarnation there, and what the request holds until it ends.
    Running(usize, u32, #[expect(dead_code, reason = "dropped with the request")] Vec<Grant>),
}

struct Request {
    gateway: usize,
    progress: Progress,
}

/// A node's replica as it really is.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
enum Replica {
    #[default]
    Absent,
    Ready,
    NotReady,
    Draining,
}

struct Fleet {
    nodes: Vec<Arc<Sidecar>>,
    replicas: [Replica; NODES],
    incarnations: [u32; NODES],
    announcers: BTreeMap<(usize, usize), Announcer>,
    streams: BTreeMap<(usize, usize), Stream>,
    requests: Vec<Request>,
}

#[derive(Debug)]
struct NoStreams;

impl OpenStream for NoStreams {
    fn open(&self, _: Arc<Link>) {}
}

fn name(node: usize) -> String {
    format!("node-{node}")
}

fn replica(node: usize) -> LocalReplica {
    LocalReplica {
        name: format!("replica-{node}"),
        revision: KEY.to_owned(),
        address: SocketAddr::from((Ipv4Addr::LOCALHOST, 1)),
        h2c: false,
        container_concurrency: LIMIT,
        timeout: Duration::from_secs(1),
    }
}

impl Fleet {
    fn new() -> Self {
        let nodes: Vec<_> = (0..NODES).map(|_| Sidecar::new()).collect();
        let mut announcers = BTreeMap::new();
        for (gateway, sidecar) in nodes.iter().enumerate() {
            sidecar.links().set_opener(Arc::new(NoStreams));
            for node in (0..NODES).filter(|node| *node != gateway) {
                let link = sidecar.links().link(&name(node));
                announcers.insert((gateway, node), Announcer::new(link, Arc::clone(sidecar)));
            }
        }
        Self {
            nodes,
            replicas: Default::default(),
            incarnations: [0; NODES],
            announcers,
            streams: BTreeMap::new(),
            requests: Vec::new(),
        }
    }

    fn queue(&self, node: usize) -> Arc<RevisionQueue> {
        self.nodes[node].revision(KEY)
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Arrive(gateway) => self.enter(gateway, false),
            Step::Cancel(index) if !self.requests.is_empty() => {
                self.requests.swap_remove(index % self.requests.len());
            }
            Step::Finish(index) => self.finish(index),
            Step::Reach(index) => self.reach(index),
            Step::OpenStream(gateway, node) if gateway != node => self.open(gateway, node),
            Step::BreakStream(gateway, node) => drop(self.streams.remove(&(gateway, node))),
            Step::Announce(gateway, node) => self.announce(gateway, node),
            Step::DeliverToNode(gateway, node) => drop(self.deliver_to_node(gateway, node)),
            Step::DeliverToGateway(gateway, node) => drop(self.deliver_to_gateway(gateway, node)),
            Step::Ready(node) => self.ready(node),
            Step::NotReady(node) if self.replicas[node] == Replica::Ready => {
                self.replicas[node] = Replica::NotReady;
                self.nodes[node].not_ready(&replica(node).name);
            }
            Step::Drain(node) if self.replicas[node] != Replica::Absent => {
                self.replicas[node] = Replica::Draining;
                self.nodes[node].drain(&replica(node).name);
            }
            Step::Die(node) => {
                self.replicas[node] = Replica::Absent;
                self.nodes[node].remove(&replica(node).name);
            }
            Step::Lapse(node) => self.nodes[node].cancel_lapsed_offers(Instant::now() + OFFER_LAPSE),
            Step::Route(gateway) => self.route(gateway),
            Step::Cancel(_) | Step::OpenStream(..) | Step::NotReady(_) | Step::Drain(_) => {}
        }
        self.collect_grants();
    }

    fn enter(&mut self, gateway: usize, again: bool) {
        let waiting = self.queue(gateway).enter(again).unwrap();
        self.requests.push(Request { gateway, progress: Progress::Waiting(waiting) });
    }

    /// Requests that have been granted a slot are sent at once.
    fn collect_grants(&mut self) {
        for request in &mut self.requests {
            let Progress::Waiting(waiting) = &mut request.progress else { continue };
            let Some(grant) = waiting.now() else {
                let ended = waiting.granted.as_mut().map(|granted| granted.try_recv().err());
                assert_ne!(ended, Some(Some(TryRecvError::Closed)), "a request in line was forgotten");
                continue;
            };
            request.progress = match grant.target {
                Target::Local { .. } => {
                    Progress::Running(request.gateway, self.incarnations[request.gateway], vec![grant])
                }
                Target::Peer { .. } => Progress::Sent(grant),
            };
        }
    }

    fn finish(&mut self, index: usize) {
        let running = |request: &&mut Request| matches!(request.progress, Progress::Running(..));
        let count = self.requests.iter_mut().filter(running).count();
        if count > 0 {
            let running = self.requests.iter().enumerate().filter(|(_, r)| matches!(r.progress, Progress::Running(..)));
            let index = running.map(|(index, _)| index).nth(index % count);
            self.requests.swap_remove(index.unwrap());
        }
    }

    fn reach(&mut self, index: usize) {
        let sent = self.requests.iter().enumerate().filter(|(_, r)| matches!(r.progress, Progress::Sent(_)));
        let sent: Vec<_> = sent.map(|(index, _)| index).collect();
        if sent.is_empty() {
            return;
        }
        let Request { gateway, progress } = self.requests.swap_remove(sent[index % sent.len()]);
        let Progress::Sent(grant) = progress else { unreachable!() };
        let Target::Peer { node, offer, .. } = &grant.target else { unreachable!() };
        let node = (0..NODES).find(|index| name(*index) == *node).unwrap();
        match self.nodes[node].use_offer(offer.unwrap()) {
            Some(slot) => {
                let progress = Progress::Running(node, self.incarnations[node], vec![slot, grant]);
                self.requests.push(Request { gateway, progress });
            }
            // No replica has seen it: it waits again.
            None => {
                drop(grant);
                self.enter(gateway, true);
            }
        }
    }

    fn open(&mut self, gateway: usize, node: usize) {
        if self.streams.contains_key(&(gateway, node)) {
            return;
        }
        let (sender, to_gateway) = mpsc::unbounded_channel();
        let at_node = self.nodes[node].open_gateway(sender);
        let id = self.nodes[gateway].next_number();
        let credits = self.announcers.get_mut(&(gateway, node)).unwrap().announce_all(id);
        let to_node = credits.into_iter().map(|(key, credit)| Message::Credit(key.to_string(), credit)).collect();
        self.streams.insert((gateway, node), Stream { id, at_node, to_node, to_gateway });
    }

    fn announce(&mut self, gateway: usize, node: usize) {
        let Some(stream) = self.streams.get_mut(&(gateway, node)) else { return };
        let credits = self.announcers.get_mut(&(gateway, node)).unwrap().announce_marked(stream.id);
        stream.to_node.extend(credits.into_iter().map(|(key, credit)| Message::Credit(key.to_string(), credit)));
    }

    fn deliver_to_node(&mut self, gateway: usize, node: usize) -> Option<()> {
        let stream = self.streams.get_mut(&(gateway, node))?;
        match stream.to_node.pop_front()? {
            Message::Credit(revision, credit) => stream.at_node.receive_credit(revision, credit),
            Message::Decline(offer) => stream.at_node.decline(offer),
        }
        Some(())
    }

    fn deliver_to_gateway(&mut self, gateway: usize, node: usize) -> Option<()> {
        let queue = self.queue(gateway);
        let stream = self.streams.get_mut(&(gateway, node))?;
        let bind_response::Message::Offer(offer) = stream.to_gateway.try_recv().ok()?.message?;
        if !queue.accept_offer(&name(node), offer.replica, offer.offer, offer.epoch) {
            stream.to_node.push_back(Message::Decline(offer.offer));
        }
        Some(())
    }

    fn ready(&mut self, node: usize) {
        if self.replicas[node] == Replica::Absent {
            self.incarnations[node] += 1;
        }
        self.replicas[node] = Replica::Ready;
        self.nodes[node].ready(replica(node));
    }

    fn route(&self, gateway: usize) {
        let ready = (0..NODES).filter(|node| *node != gateway && self.replicas[*node] == Replica::Ready);
        let peers = ready.map(|node| (name(node), vec![replica(node).name])).collect();
        let limits = Limits { queue: 1000, timeout: Duration::from_secs(1), concurrency: LIMIT };
        self.queue(gateway).route(limits, peers);
    }

    /// No slot is granted twice: each incarnation of a replica runs at most as many requests as it may.
    fn check_limits(&self) {
        for node in 0..NODES {
            let runs_now = |request: &&Request| {
                let Progress::Running(on, incarnation, _) = request.progress else { return false };
                (on, incarnation) == (node, self.incarnations[node]) && self.replicas[node] != Replica::Absent
            };
            let running = self.requests.iter().filter(runs_now).count();
            assert!(running <= LIMIT as usize, "{running} requests run on the replica of node {node}");
        }
    }

    /// Lets everything that is on its way arrive, with one replica that is ready, until nothing happens any more.
    fn settle(&mut self) {
        self.ready((0..NODES).find(|node| self.replicas[*node] == Replica::Ready).unwrap_or(0));
        for gateway in 0..NODES {
            self.route(gateway);
        }
        // Each round serves at least one request; the last ones decline offers that came too late.
        for _ in 0..self.requests.len() + 3 {
            let pairs: Vec<_> = self.announcers.keys().copied().collect();
            for &(gateway, node) in &pairs {
                self.open(gateway, node);
                self.announce(gateway, node);
                while self.deliver_to_node(gateway, node).is_some() {}
            }
            for &(gateway, node) in &pairs {
                while self.deliver_to_gateway(gateway, node).is_some() {}
                while self.deliver_to_node(gateway, node).is_some() {}
            }
            self.collect_grants();
            for _ in 0..self.requests.len() {
                self.take(Step::Reach(0));
            }
            self.check_limits();
            self.requests.retain(|request| !matches!(request.progress, Progress::Running(..)));
            self.collect_grants();
            // Offers of requests whose clients left on the way lapse.
            for node in 0..NODES {
                self.take(Step::Lapse(node));
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, max_shrink_iters: 20_000, ..ProptestConfig::default() })]

    #[test]
    fn every_waiting_request_is_served_no_slot_is_granted_twice_and_none_leaks(
        steps in proptest::collection::vec(step(), 1..150)
    ) {
        let mut fleet = Fleet::new();
        for step in steps {
            fleet.take(step);
            fleet.check_limits();
        }
        fleet.settle();
        prop_assert_eq!(fleet.requests.len(), 0, "requests wait although a replica has free slots");
        for node in 0..NODES {
            prop_assert!(fleet.queue(node).idle_notifier(&replica(node).name).is_none(), "a slot of node {node} leaked");
        }
    }
}
