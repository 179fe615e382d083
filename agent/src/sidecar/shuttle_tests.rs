//! The locks of the queue and the offers under many interleavings: `cargo test -p pilotlight-agent --features shuttle
//! --lib shuttle`.

use std::{
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use pilotlight_proto::peer::v1::bind_response;
use shuttle::{
    future::block_on,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    thread,
};
use tokio::sync::mpsc;

use super::*;
use crate::endpoint::{Endpoints as _, LocalReplica};

const KEY: &str = "default/iris-00001";
const INTERLEAVINGS: usize = 3000;

fn replica() -> LocalReplica {
    LocalReplica {
        name: "replica".to_owned(),
        revision: KEY.to_owned(),
        address: SocketAddr::from((Ipv4Addr::LOCALHOST, 1)),
        h2c: false,
        container_concurrency: 1,
        timeout: Duration::from_secs(1),
    }
}

/// Runs a request on the replica, which must be alone there.
fn run(grant: Grant, running: &AtomicU32) {
    assert_eq!(running.fetch_add(1, Ordering::SeqCst), 0, "one at a time is a hard limit");
    thread::yield_now();
    running.fetch_sub(1, Ordering::SeqCst);
    drop(grant.permit.answered());
}

fn requests_cancellations_offers_and_probes() {
    let sidecar = Sidecar::new();
    sidecar.ready(replica());
    let running = Arc::new(AtomicU32::new(0));
    let mut threads = Vec::new();
    for _ in 0..2 {
        let (queue, running) = (sidecar.revision(KEY), Arc::clone(&running));
        threads.push(thread::spawn(move || {
            let waiting = queue.enter(false).unwrap();
            run(block_on(waiting.granted()).unwrap(), &running);
        }));
    }
    let queue = sidecar.revision(KEY);
    threads.push(thread::spawn(move || drop(queue.enter(false).unwrap())));
    let (node, at_node) = (Arc::clone(&sidecar), Arc::clone(&running));
    threads.push(thread::spawn(move || {
        let (sender, mut offers) = mpsc::unbounded_channel();
        let mut gateway = node.open_gateway(sender);
        gateway.receive_credit(KEY.to_owned(), Credit { epoch: 1, limit: 2 });
        let mut next = || {
            let Some(bind_response::Message::Offer(offer)) = block_on(offers.recv()).unwrap().message else { panic!() };
            offer.offer
        };
        run(node.use_offer(next()).unwrap(), &at_node);
        gateway.decline(next());
    }));
    let node = Arc::clone(&sidecar);
    threads.push(thread::spawn(move || {
        node.not_ready("replica");
        node.ready(replica());
    }));
    for thread in threads {
        thread.join().unwrap();
    }
    assert!(sidecar.revision(KEY).idle_notifier("replica").is_none(), "no slot leaks");
}

#[test]
fn no_slot_is_lost_or_granted_twice_whatever_the_interleaving() {
    shuttle::check_random(requests_cancellations_offers_and_probes, INTERLEAVINGS);
    shuttle::check_pct(requests_cancellations_offers_and_probes, INTERLEAVINGS, 3);
}
