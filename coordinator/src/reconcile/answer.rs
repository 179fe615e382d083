//! When an apply is answered: once gateways route by it, so that a request right after it finds its service.

use jiff::Timestamp;
use tokio::sync::oneshot;

use super::{
    commands::{Applied, CommandError},
    run::Reconciler,
    world::{World, since},
};

/// An answer waits no longer than this for agents: what is applied holds whether they have heard of it or not.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(1);

/// An apply that is carried out and not yet answered.
pub(super) struct Unanswered {
    outcome: Applied,
    at: Timestamp,
    /// Version of the routes that it led to; `None` until they are pushed.
    routes: Option<u64>,
    reply: oneshot::Sender<Result<Applied, CommandError>>,
}

impl Reconciler {
    /// Answers at once what changes no route, and keeps the rest.
    pub(super) fn answer_later(
        &mut self,
        result: Result<Applied, CommandError>,
        changes_nothing: bool,
        at: Timestamp,
        reply: oneshot::Sender<Result<Applied, CommandError>>,
    ) {
        match result {
            Ok(outcome @ (Applied::Created | Applied::Configured)) if !changes_nothing => {
                self.unanswered.push(Unanswered { outcome, at, routes: None, reply });
            }
            // The asker may have hung up; the apply holds all the same.
            result => drop(reply.send(result)),
        }
    }

    /// Answers what all connected agents route by, or have had their time for.
    pub(super) fn answer(&mut self, now: Timestamp) {
        let pushed = self.routes.pushed();
        for unanswered in std::mem::take(&mut self.unanswered) {
            let version = unanswered.routes.or(pushed);
            let has_arrived = version.is_some_and(|version| arrived(&self.world, version));
            if has_arrived || since(unanswered.at, now) >= PATIENCE {
                let _ = unanswered.reply.send(Ok(unanswered.outcome));
            } else {
                self.unanswered.push(Unanswered { routes: version, ..unanswered });
            }
        }
    }
}

/// True where every connected agent routes by this version or a later one.
fn arrived(world: &World, version: u64) -> bool {
    let mut connected = world.nodes.values().filter(|node| node.session.is_some());
    connected.all(|node| node.routes_applied >= version)
}
