//! What the bookkeeping of slots costs per request: a gateway without replicas asks the node that has one, which offers
//! a slot; the request uses the offer and ends. Messages are passed by hand, so that only the bookkeeping of both ends
//! is measured. The claim: per request, the largest fleet costs at most 1.5 times as much as the smallest, when the same
//! number of services is busy. If requests go to all of 1,000 services in turn, the processor's caches hold none of their
//! state, which is printed, too.
#![allow(clippy::print_stdout, missing_docs, reason = "a benchmark prints its result")]

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use nix::sys::resource::UsageWho;
use pilotlight_agent::{
    endpoint::{Endpoints as _, LocalReplica},
    sidecar::{Announcer, GatewayStream, Limits, Link, OFFER_LAPSE, OpenStream, RevisionQueue, Sidecar, Target},
};
use pilotlight_benches::{cpu_time, median};
use pilotlight_proto::peer::v1::{BindResponse, bind_response};
use tokio::sync::mpsc;

const ROUNDS: usize = 9;
const REQUESTS: usize = 20_000;
const NODES: [usize; 3] = [1, 100, 300];
const SERVICES: [usize; 2] = [10, 1_000];
/// Services that requests are sent to.
const BUSY: usize = 10;
const HOLDERS: [usize; 3] = [1, 2, 8];
const TIMEOUT: Duration = Duration::from_secs(1);

/// The streams are driven by hand.
#[derive(Debug)]
struct ByHand;

impl OpenStream for ByHand {
    fn open(&self, _: Arc<Link>) {}
}

/// One node, and the stream to it.
struct Node {
    name: String,
    sidecar: Arc<Sidecar>,
    announcer: Announcer,
    stream: GatewayStream,
    offers: mpsc::UnboundedReceiver<BindResponse>,
}

impl Node {
    fn new(name: String, gateway: &Arc<Sidecar>) -> Self {
        let sidecar = Sidecar::new();
        let (sender, offers) = mpsc::unbounded_channel();
        let announcer = Announcer::new(gateway.links().link(&name), Arc::clone(gateway));
        Self { stream: sidecar.open_gateway(sender), name, sidecar, announcer, offers }
    }

    /// The gateway's announcement arrives.
    fn announce(&mut self) {
        for (revision, credit) in self.announcer.announce_marked(1) {
            self.stream.receive_credit(revision.to_string(), credit);
        }
    }

    /// The node's offers arrive.
    fn offer(&mut self, queue: &RevisionQueue) {
        while let Ok(BindResponse { message: Some(bind_response::Message::Offer(offer)) }) = self.offers.try_recv() {
            if !queue.accept_offer(&self.name, offer.replica, offer.offer, offer.epoch) {
                self.stream.decline(offer.offer);
            }
        }
    }
}

struct Fleet {
    gateway: Arc<Sidecar>,
    nodes: Vec<Node>,
    /// Revision of each service, and the nodes that hold its replicas.
    services: Vec<(String, Vec<usize>)>,
}

fn replica(service: usize, node: usize) -> LocalReplica {
    LocalReplica {
        name: format!("service-{service}-{node}"),
        revision: format!("default/service-{service}-00001"),
        address: SocketAddr::from((Ipv4Addr::LOCALHOST, 1)),
        h2c: false,
        container_concurrency: 1,
        timeout: TIMEOUT,
    }
}

impl Fleet {
    fn new(Size { nodes, services, holders, .. }: Size) -> Self {
        let gateway = Sidecar::new();
        gateway.links().set_opener(Arc::new(ByHand));
        let nodes: Vec<_> = (0..nodes).map(|index| Node::new(format!("node-{index}"), &gateway)).collect();
        let service = |service: usize| {
            let at: Vec<_> = (0..holders).map(|turn| (service * holders + turn) % nodes.len()).collect();
            at.iter().for_each(|node| nodes[*node].sidecar.ready(replica(service, *node)));
            let peers: BTreeMap<_, _> =
                at.iter().map(|node| (nodes[*node].name.clone(), vec![replica(service, *node).name])).collect();
            let revision = replica(service, 0).revision;
            gateway.revision(&revision).route(Limits { queue: 1000, timeout: TIMEOUT, concurrency: 1 }, peers);
            (revision, at)
        };
        let services = (0..services).map(service).collect();
        Self { gateway, nodes, services }
    }

    /// One request from its arrival to its end, to one of the first `busy` services in turn.
    fn request(&mut self, number: usize, busy: usize) {
        let (revision, holders) = &self.services[number % busy];
        let queue = self.gateway.revision(revision);
        queue.arrived();
        let mut waiting = queue.enter(false).unwrap();
        holders.iter().for_each(|node| self.nodes[*node].announce());
        holders.iter().for_each(|node| self.nodes[*node].offer(&queue));
        let grant = waiting.now().expect("a replica is free");
        let Target::Peer { node, offer: Some(offer), .. } = &grant.target else { panic!("{:?}", grant.target) };
        let there = holders.iter().map(|index| &self.nodes[*index]).find(|there| there.name == *node).unwrap();
        let running = there.sidecar.use_offer(*offer).expect("the offer is open");
        drop(running.permit.answered());
        drop(grant.permit.answered());
        holders.iter().for_each(|node| self.nodes[*node].announce());
    }

    /// Forgets offers that were used, as a timer does in each node.
    fn sweep(&self) {
        for node in &self.nodes {
            node.sidecar.cancel_lapsed_offers(tokio::time::Instant::now() + 2 * OFFER_LAPSE);
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct Size {
    nodes: usize,
    services: usize,
    /// Services that requests are sent to.
    busy: usize,
    /// Nodes that hold a replica of one service.
    holders: usize,
}

/// CPU time per request in microseconds, the median of all rounds. Fleets take turns.
fn measure(sizes: &[Size]) -> Vec<f64> {
    let mut fleets: Vec<_> = sizes.iter().map(|size| Fleet::new(*size)).collect();
    let mut costs = vec![Vec::new(); sizes.len()];
    // The first round fills caches and grows maps.
    for round in 0..=ROUNDS {
        for ((fleet, size), costs) in fleets.iter_mut().zip(sizes).zip(&mut costs) {
            let before = cpu_time(UsageWho::RUSAGE_SELF);
            (0..REQUESTS).for_each(|number| fleet.request(number, size.busy));
            if round > 0 {
                costs.push((cpu_time(UsageWho::RUSAGE_SELF) - before).as_secs_f64() / REQUESTS as f64 * 1e6);
            }
            fleet.sweep();
        }
    }
    costs.into_iter().map(median).collect()
}

fn print(sizes: &[Size], costs: &[f64]) {
    println!("nodes  services  busy  nodes with replicas of one  CPU per request, µs  ratio to the first");
    for (Size { nodes, services, busy, holders }, cost) in sizes.iter().zip(costs) {
        println!("{nodes:5}  {services:8}  {busy:4}  {holders:26}  {cost:19.2}  {:18.2}", cost / costs[0]);
    }
}

fn main() {
    let with_services = |nodes| SERVICES.map(|services| Size { nodes, services, busy: BUSY, holders: 1 });
    let sizes: Vec<_> = NODES.into_iter().flat_map(with_services).collect();
    let costs = measure(&sizes);
    println!("Medians of {ROUNDS} rounds of {REQUESTS} requests; both ends of the protocol counted.");
    print(&sizes, &costs);
    let least = costs.iter().copied().fold(f64::INFINITY, f64::min);
    let most = costs.iter().copied().fold(0.0, f64::max);
    println!("largest / smallest: {:.2}; claimed: at most 1.5\n", most / least);

    println!("All services are busy:");
    let sizes: Vec<_> = sizes.into_iter().map(|size| Size { busy: size.services, ..size }).collect();
    print(&sizes, &measure(&sizes));

    println!("\nA request asks each node that holds a replica of its revision:");
    let sizes = HOLDERS.map(|holders| Size { nodes: 100, services: 10, busy: BUSY, holders });
    print(&sizes, &measure(&sizes));
}
