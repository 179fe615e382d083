use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use pilotlight_proto::{fleet::v1::RevisionLoad, peer::v1 as peer};
use tokio::{
    sync::mpsc,
    time::{Instant, advance},
};

use super::*;
use crate::endpoint::{Endpoints as _, LocalReplica};

const KEY: &str = "default/iris-00001";
const SECOND: Duration = Duration::from_secs(1);

fn replica(name: &str) -> LocalReplica {
    LocalReplica {
        name: name.to_owned(),
        revision: KEY.to_owned(),
        address: SocketAddr::from((Ipv4Addr::LOCALHOST, 1)),
        h2c: false,
        container_concurrency: 1,
        timeout: SECOND,
    }
}

/// A node whose revision has a limit of one request a replica; `peers` have ready replicas, too.
fn node(peers: &[(&str, &str)]) -> (Arc<Sidecar>, Arc<RevisionQueue>) {
    let sidecar = Sidecar::new();
    let queue = sidecar.revision(KEY);
    let peers: BTreeMap<_, _> =
        peers.iter().map(|(node, replica)| ((*node).to_owned(), vec![(*replica).to_owned()])).collect();
    queue.route(Limits { queue: 10, timeout: SECOND, concurrency: 1 }, peers);
    (sidecar, queue)
}

fn load(queue: &RevisionQueue) -> RevisionLoad {
    queue.report(Instant::now()).unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_request_that_waits_is_load_from_its_first_moment() {
    let (sidecar, queue) = node(&[]);
    queue.arrived();
    let waiting = queue.enter(false).unwrap();
    advance(SECOND).await;
    let before = load(&queue);
    assert_eq!((before.average_waiting, before.average_concurrency, before.queue_depth), (1.0, 1.0, 1));

    sidecar.ready(replica("a"));
    let grant = waiting.granted().await.unwrap();
    advance(SECOND).await;
    let during = load(&queue);
    assert_eq!((during.average_waiting, during.average_concurrency, during.running), (0.0, 1.0, 1));
    assert_eq!(during.completed_count, 0, "it still runs");

    drop(grant.permit.answered());
    advance(SECOND).await;
    let after = load(&queue);
    assert_eq!((after.average_concurrency, after.completed_count, after.request_count), (0.0, 1, 0));
}

#[tokio::test(start_paused = true)]
async fn a_request_that_gives_up_is_load_no_more() {
    let (_, queue) = node(&[]);
    let waiting = queue.enter(false).unwrap();
    advance(SECOND).await;
    drop(waiting);
    advance(SECOND).await;
    let given_up = load(&queue);
    assert_eq!((given_up.average_waiting, given_up.queue_depth, given_up.completed_count), (0.5, 0, 0));
}

#[tokio::test]
async fn only_what_was_answered_counts_as_completed() {
    let (sidecar, queue) = node(&[]);
    sidecar.ready(replica("a"));
    drop(queue.enter(false).unwrap().granted().await.unwrap());
    assert_eq!(load(&queue).completed_count, 0, "it was never sent, or nothing came back");
}

#[tokio::test(start_paused = true)]
async fn what_runs_on_a_leaving_replica_is_told_apart() {
    let (sidecar, queue) = node(&[]);
    sidecar.ready(replica("a"));
    sidecar.ready(replica("b"));
    let on_a = queue.enter(false).unwrap().granted().await.unwrap();
    let on_b = queue.enter(false).unwrap().granted().await.unwrap();
    sidecar.drain("a");
    advance(SECOND).await;
    let draining = load(&queue);
    assert_eq!((draining.average_concurrency, draining.draining_concurrency), (2.0, 1.0));

    // Its slot comes back to nobody.
    drop(on_a.permit.answered());
    let mut next = queue.enter(false).unwrap();
    assert!(next.now().is_none());
    advance(SECOND).await;
    let drained = load(&queue);
    assert_eq!((drained.average_concurrency, drained.draining_concurrency, drained.average_waiting), (2.0, 0.0, 1.0));
    assert_eq!(drained.completed_count, 1);
    drop(on_b);
    assert!(matches!(next.now().unwrap().target, Target::Local { replica, .. } if replica == "b"));
}

#[tokio::test(start_paused = true)]
async fn drained_resolves_with_the_last_request_and_not_before() {
    let (sidecar, queue) = node(&[]);
    sidecar.ready(replica("a"));
    let grant = queue.enter(false).unwrap().granted().await.unwrap();
    sidecar.drain("a");
    let mut drained = sidecar.drained("a");
    assert!(tokio::time::timeout(3600 * SECOND, &mut drained).await.is_err(), "it waits as long as the request runs");
    drop(grant);
    drained.await;
}

#[tokio::test]
async fn a_replica_that_is_started_again_owes_nothing_from_before() {
    let (sidecar, queue) = node(&[]);
    sidecar.ready(replica("a"));
    let before = queue.enter(false).unwrap().granted().await.unwrap();
    // Its process dies, and the client has not yet noticed.
    sidecar.remove("a");
    assert_eq!(load(&queue).running, 0);
    sidecar.ready(replica("a"));
    let _after = queue.enter(false).unwrap().granted().await.unwrap();
    drop(before);
    assert_eq!(load(&queue).running, 1, "the old request's end is not the new one's");
    assert!(queue.enter(false).unwrap().now().is_none(), "one at a time is a hard limit");
}

#[tokio::test(start_paused = true)]
async fn across_nodes_a_request_is_counted_on_one_at_a_time() {
    let (_, here) = node(&[("there", "b")]);
    let (there_sidecar, there) = node(&[]);
    let waiting = here.enter(false).unwrap();
    let (sender, mut offers) = mpsc::unbounded_channel();
    let mut gateway = there_sidecar.open_gateway(sender);
    gateway.receive_credit(KEY.to_owned(), here.update_credit("there", 1).unwrap());
    advance(SECOND).await;
    assert_eq!(load(&here).average_waiting, 1.0);
    assert!(there.report(Instant::now()).is_none(), "a wish is no load");

    there_sidecar.ready(replica("b"));
    let offer = next_offer(&mut offers).await;
    assert!(here.accept_offer("there", offer.replica, offer.offer, offer.epoch));
    let under_way = waiting.granted().await.unwrap();
    let running = there_sidecar.use_offer(offer.offer).unwrap();
    let (_, _) = (load(&here), load(&there));
    advance(SECOND).await;
    assert!(here.report(Instant::now()).is_none(), "nothing waits or runs where it entered");
    let runs = load(&there);
    assert_eq!((runs.average_concurrency, runs.running), (1.0, 1));

    drop(running.permit.answered());
    drop(under_way.permit.answered());
    assert_eq!(load(&there).completed_count, 1);
    assert!(here.report(Instant::now()).is_none(), "counted where it ran");
}

async fn next_offer(offers: &mut mpsc::UnboundedReceiver<peer::BindResponse>) -> peer::Offer {
    let Some(peer::bind_response::Message::Offer(offer)) = offers.recv().await.unwrap().message else { panic!() };
    offer
}

fn credit(limit: u64) -> Credit {
    Credit { epoch: 1, limit }
}

#[tokio::test(start_paused = true)]
async fn an_offer_of_a_replica_that_was_restarted_is_void() {
    let (sidecar, _) = node(&[]);
    let (sender, mut offers) = mpsc::unbounded_channel();
    sidecar.ready(replica("a"));
    let mut gateway = sidecar.open_gateway(sender);
    gateway.receive_credit(KEY.to_owned(), credit(1));
    let offer = next_offer(&mut offers).await;
    sidecar.remove("a");
    sidecar.ready(replica("a"));
    assert!(sidecar.use_offer(offer.offer).is_none());
}

#[tokio::test(start_paused = true)]
async fn an_offer_that_is_declined_lapses_or_loses_its_gateway_frees_its_slot() {
    let (sidecar, queue) = node(&[]);
    sidecar.ready(replica("a"));
    let offered = async |gateway: &mut GatewayStream, offers: &mut mpsc::UnboundedReceiver<_>, limit| {
        gateway.receive_credit(KEY.to_owned(), credit(limit));
        let offer = next_offer(offers).await;
        assert!(queue.enter(false).unwrap().now().is_none(), "the slot is reserved");
        offer.offer
    };
    let is_free = || queue.enter(false).unwrap().now().is_some();
    let (sender, mut offers) = mpsc::unbounded_channel();
    let mut gateway = sidecar.open_gateway(sender);

    let declined = offered(&mut gateway, &mut offers, 1).await;
    gateway.decline(declined);
    gateway.decline(declined);
    assert!(is_free() && sidecar.use_offer(declined).is_none());

    let lapsed = offered(&mut gateway, &mut offers, 2).await;
    sidecar.cancel_lapsed_offers(Instant::now());
    assert!(!is_free());
    sidecar.cancel_lapsed_offers(Instant::now() + OFFER_LAPSE);
    assert!(is_free() && sidecar.use_offer(lapsed).is_none());

    let orphaned = offered(&mut gateway, &mut offers, 3).await;
    drop(gateway);
    assert!(is_free() && sidecar.use_offer(orphaned).is_none());
}

#[tokio::test(start_paused = true)]
async fn a_draining_replica_waits_for_offers_that_are_open() {
    let (sidecar, _) = node(&[]);
    sidecar.ready(replica("a"));
    let (sender, mut offers) = mpsc::unbounded_channel();
    let mut gateway = sidecar.open_gateway(sender);
    gateway.receive_credit(KEY.to_owned(), credit(1));
    let offer = next_offer(&mut offers).await;
    sidecar.drain("a");
    let mut drained = sidecar.drained("a");
    assert!(tokio::time::timeout(3600 * SECOND, &mut drained).await.is_err());
    gateway.decline(offer.offer);
    drained.await;
}

#[tokio::test]
async fn a_gateway_that_wants_nothing_more_keeps_no_queue_alive() {
    let sidecar = Sidecar::new();
    let (sender, _offers) = mpsc::unbounded_channel();
    let mut gateway = sidecar.open_gateway(sender);
    gateway.receive_credit(KEY.to_owned(), credit(1));
    assert!(!sidecar.existing(KEY).unwrap().is_disposable());
    gateway.receive_credit(KEY.to_owned(), Credit { epoch: 2, limit: 0 });
    sidecar.forget(KEY);
    assert!(sidecar.existing(KEY).is_none());
}

#[derive(Debug, Default)]
struct Opened(std::sync::Mutex<Vec<Arc<Link>>>);

impl OpenStream for Opened {
    fn open(&self, link: Arc<Link>) {
        self.0.lock().unwrap().push(link);
    }
}

#[tokio::test]
async fn only_nodes_that_hold_replicas_of_the_revision_are_woken_for_a_request() {
    let (sidecar, queue) = node(&[("near", "a"), ("far", "b")]);
    let opened = Arc::new(Opened::default());
    sidecar.links().set_opener(Arc::clone(&opened) as _);
    let others: BTreeMap<_, _> = [("other".to_owned(), vec!["c".to_owned()])].into();
    sidecar.revision("default/other").route(Limits { queue: 10, timeout: SECOND, concurrency: 1 }, others);
    assert_eq!(opened.0.lock().unwrap().len(), 0, "no request waits");

    let _waiting = queue.enter(false).unwrap();
    let _second = queue.enter(false).unwrap();
    let links = opened.0.lock().unwrap().clone();
    let mut nodes: Vec<_> = links.iter().map(|link| link.node()).collect();
    nodes.sort_unstable();
    assert_eq!(nodes, ["far", "near"], "each once");
    let link = &links[0];
    assert_eq!(link.take_marked().len(), 1);
    assert!(link.try_close());
    let _third = queue.enter(false).unwrap();
    assert_eq!(opened.0.lock().unwrap().len(), 3, "opened again");
}

#[tokio::test]
async fn a_node_that_cannot_be_reached_is_not_the_first_choice_for_the_next_hundred_requests() {
    let sidecar = Sidecar::new();
    let queue = sidecar.revision(KEY);
    let peers = ["dead", "live"].map(|node| (node.to_owned(), vec![format!("replica-{node}")]));
    queue.route(Limits { queue: 10, timeout: SECOND, concurrency: 0 }, peers.into());
    let next = || {
        let Target::Peer { node, .. } = queue.enter(false).unwrap().now().unwrap().target else { panic!() };
        node
    };
    assert_eq!(next(), "dead", "none has requests: the order of names decides");
    queue.penalize("dead");
    assert!((0..100).all(|_| next() == "live"));
    assert_eq!(next(), "dead", "it is tried again");
}

#[tokio::test]
async fn a_gateway_whose_requests_still_run_there_has_no_account_at_a_node_without_ready_replicas() {
    let (_, here) = node(&[("there", "b")]);
    let there = Sidecar::new();
    there.ready(replica("b"));
    let (sender, mut offers) = mpsc::unbounded_channel();
    let mut gateway = there.open_gateway(sender);
    let waiting = here.enter(false).unwrap();
    gateway.receive_credit(KEY.to_owned(), here.update_credit("there", 1).unwrap());
    let offer = next_offer(&mut offers).await;
    assert!(here.accept_offer("there", offer.replica, offer.offer, offer.epoch));
    let _running = (waiting.granted().await.unwrap(), there.use_offer(offer.offer).unwrap());
    assert!(there.revision(KEY).has_gateways());

    // The revision is retired while the request runs.
    here.route(here.limits(), BTreeMap::new());
    gateway.receive_credit(KEY.to_owned(), here.update_credit("there", 1).unwrap());
    assert!(!there.revision(KEY).has_gateways());
}
