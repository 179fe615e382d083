//! At most one live session per node name, unless the same agent opens the next one; and whom the agents trust.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use pilotlight_proto::fleet::v1::TrustApplied;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::session::Heard;

/// A session that was heard within this time is live: agents report every second. One of an agent that was restarted is
/// closed already, unless its machine has lost power.
const LIVE: Duration = Duration::from_secs(3);

/// The open sessions, by node name.
#[derive(Debug, Default)]
pub struct LiveSessions {
    live: Mutex<HashMap<String, Live>>,
    /// What agents have said of whom they trust, kept when their sessions end: they have stored it.
    trust: Mutex<HashMap<String, TrustApplied>>,
}

#[derive(Debug)]
struct Live {
    /// Certificates that the node's agent holds: that of the session, and those that renewed it.
    fingerprints: Vec<String>,
    /// Known to the agent's process and the coordinator alone.
    boot_id: String,
    closed: CancellationToken,
    /// Tells whether the agent is still there.
    heard: Heard,
}

impl LiveSessions {
    /// Registers a session that ends with `closed`. It may take the place of a live one if it presents the same
    /// certificate, one that renewed it, or comes from the same process.
    ///
    /// # Errors
    /// `ALREADY_EXISTS` if another agent has a live session under this name.
    pub(crate) fn admit(
        &self,
        node: &str,
        fingerprint: Option<&str>,
        boot_id: &str,
        closed: CancellationToken,
        heard: Heard,
    ) -> Result<(), Status> {
        let mut live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        let fingerprint = fingerprint.unwrap_or_default().to_owned();
        let mut fingerprints = vec![fingerprint.clone()];
        if let Some(previous) = live.get(node).filter(|previous| !previous.closed.is_cancelled()) {
            let same_process = !boot_id.is_empty() && previous.boot_id == boot_id;
            if !previous.fingerprints.contains(&fingerprint) && !same_process {
                return Err(Status::already_exists(format!(
                    "node {node} has a live session with another certificate; stop that agent, or revoke it with \
                     `pilotlight node revoke {node}`"
                )));
            }
            let other_process = [boot_id, &previous.boot_id].iter().all(|id| !id.is_empty()) && !same_process;
            if other_process && previous.heard.silence() < LIVE {
                return Err(Status::already_exists(format!(
                    "node {node} has a live session of another agent process with the same certificate; a data directory \
                     is for one agent"
                )));
            }
            fingerprints.extend(previous.fingerprints.iter().filter(|known| **known != fingerprint).cloned());
        }
        live.retain(|_, session| !session.closed.is_cancelled());
        live.insert(node.to_owned(), Live { fingerprints, boot_id: boot_id.to_owned(), closed, heard });
        Ok(())
    }

    /// An agent has said whom it trusts.
    pub fn trusts(&self, node: &str, applied: TrustApplied) {
        self.trust.lock().unwrap_or_else(PoisonError::into_inner).insert(node.to_owned(), applied);
    }

    /// Whom a node's agent trusts; nobody if it has not said so since this coordinator leads.
    pub fn trust_of(&self, node: &str) -> TrustApplied {
        self.trust.lock().unwrap_or_else(PoisonError::into_inner).get(node).cloned().unwrap_or_default()
    }

    /// The agent that holds the certificate `old` has renewed it.
    pub fn renewed(&self, node: &str, old: &str, new: &str) {
        let mut live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(session) = live.get_mut(node)
            && session.fingerprints.iter().any(|known| known == old)
        {
            session.fingerprints.push(new.to_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_live_session_with_another_certificate_is_refused() {
        let sessions = LiveSessions::default();
        let first = CancellationToken::new();
        sessions.admit("a", Some("one"), "boot-1", first.clone(), Heard::now()).unwrap();
        let refused = sessions.admit("a", Some("two"), "boot-2", CancellationToken::new(), Heard::now()).unwrap_err();
        assert_eq!(refused.code(), tonic::Code::AlreadyExists);
        assert!(refused.message().contains("node revoke a"), "{refused}");
        sessions.admit("b", Some("two"), "boot-2", CancellationToken::new(), Heard::now()).unwrap();
        first.cancel();
        sessions.admit("a", Some("two"), "boot-2", CancellationToken::new(), Heard::now()).unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn an_agent_takes_the_place_of_its_own_live_session() {
        let sessions = LiveSessions::default();
        let admit =
            |fingerprint, boot| sessions.admit("a", Some(fingerprint), boot, CancellationToken::new(), Heard::now());
        admit("one", "boot-1").unwrap();
        let copy = admit("one", "boot-2").unwrap_err();
        assert!(copy.message().contains("same certificate"), "{copy}");
        tokio::time::advance(LIVE).await;
        admit("one", "boot-2").expect("restarted after its machine has lost power");
        sessions.renewed("a", "one", "two");
        tokio::time::advance(LIVE).await;
        admit("two", "boot-3").expect("with the renewed certificate");
        admit("one", "boot-3").expect("from the same process");
        sessions.renewed("a", "unknown", "three");
        assert!(admit("three", "boot-4").is_err(), "nobody who was live renewed it");
    }
}
