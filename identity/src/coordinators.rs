//! The coordinators of a cell, and which of them leads.
//!
//! Only the leader serves. A standby answers every call with `UNAVAILABLE` and the leader's address in
//! [`LEADER_HEADER`]. Callers have several addresses and follow that answer.

use std::{
    future::Future,
    sync::{Mutex, MutexGuard, PoisonError},
};

use tonic::{Code, Status};

use crate::{Channel, IdentityError, Trust, channel};

/// Metadata of a standby's answers: URL of the coordinator that leads.
pub const LEADER_HEADER: &str = "pilotlight-leader";
/// Metadata of answers of a former leader that cannot reach the store: the time (RFC 3339) of the state that it shows.
pub const STATE_TIME_HEADER: &str = "pilotlight-state-time";

/// Channels to all coordinators of a cell.
#[derive(Debug)]
pub struct Coordinators {
    trust: Trust,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// As configured first, then those that standbys have named.
    known: Vec<(String, Channel)>,
    /// Number of addresses that were configured.
    configured: usize,
    /// Index of the one that is asked next.
    current: usize,
}

/// Addresses that standbys may add to the configured ones.
const LEARNED_MAX: usize = 16;

impl Coordinators {
    /// Coordinators at these URLs, of which the first is asked first. Connects when they are used.
    ///
    /// # Errors
    /// There is none, or one is not a URL whose scheme fits `trust`.
    pub fn new(addresses: &[String], trust: Trust) -> Result<Self, IdentityError> {
        let known = addresses.iter().map(|address| Ok((address.clone(), channel(address, &trust)?)));
        let known = known.collect::<Result<Vec<_>, IdentityError>>()?;
        if known.is_empty() {
            let reason = "there is no address".to_owned();
            return Err(IdentityError::Address { address: String::new(), reason });
        }
        Ok(Self { trust, state: Mutex::new(State { configured: known.len(), known, current: 0 }) })
    }

    /// The coordinator that is asked next: its URL and a channel to it.
    pub fn current(&self) -> (String, Channel) {
        let state = self.lock();
        state.known[state.current].clone()
    }

    /// Number of configured addresses.
    pub fn configured(&self) -> usize {
        self.lock().configured
    }

    /// Takes in that the coordinator at `address` did not serve a call: the leader that it names is asked next, else the
    /// one after it. Returns `true` if a leader was named.
    pub fn failed(&self, address: &str, status: &Status) -> bool {
        let named = status.metadata().get(LEADER_HEADER).and_then(|leader| leader.to_str().ok());
        let mut state = self.lock();
        if state.known[state.current].0 != address {
            // Another call has moved on already.
            return named.is_some();
        }
        if let Some(index) = named.and_then(|leader| self.index_of(&mut state, leader)).filter(|i| *i != state.current)
        {
            state.current = index;
            return true;
        }
        state.current = (state.current + 1) % state.configured.max(1);
        false
    }

    /// Makes a call, at one coordinator after another, until one serves it: at most two rounds. Errors other than
    /// `UNAVAILABLE` are the answer.
    ///
    /// # Errors
    /// The last answer, where no coordinator served the call.
    pub async fn call<T, F>(&self, call: impl Fn(Channel) -> F) -> Result<T, Status>
    where
        F: Future<Output = Result<T, Status>>,
    {
        let mut left = 2 * self.configured() + 1;
        loop {
            let (address, channel) = self.current();
            left -= 1;
            match call(channel).await {
                Err(status) if status.code() == Code::Unavailable && left > 0 => {
                    self.failed(&address, &status);
                }
                answered => return answered,
            }
        }
    }

    /// The index of an address, which is learned where it is new.
    fn index_of(&self, state: &mut State, address: &str) -> Option<usize> {
        if let Some(index) = state.known.iter().position(|(known, _)| known == address) {
            return Some(index);
        }
        // Certificates are verified there as well: a wrong address cannot pretend to be a coordinator.
        let channel = channel(address, &self.trust).ok()?;
        if state.known.len() >= state.configured + LEARNED_MAX {
            state.known.truncate(state.configured);
        }
        state.known.push((address.to_owned(), channel));
        Some(state.known.len() - 1)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn coordinators(addresses: &[&str]) -> Coordinators {
        let addresses: Vec<_> = addresses.iter().map(ToString::to_string).collect();
        Coordinators::new(&addresses, Trust::Plaintext).unwrap()
    }

    fn standby(leader: &str) -> Status {
        let mut status = Status::unavailable("standby");
        status.metadata_mut().insert(LEADER_HEADER, leader.parse().unwrap());
        status
    }

    #[tokio::test]
    async fn a_standby_leads_to_the_leader_and_silence_to_the_next_address() {
        let coordinators = coordinators(&["http://a:1", "http://b:1"]);
        assert_eq!(coordinators.current().0, "http://a:1");
        assert!(!coordinators.failed("http://a:1", &Status::unavailable("connection refused")));
        assert_eq!(coordinators.current().0, "http://b:1");
        assert!(coordinators.failed("http://b:1", &standby("http://c:1")), "a leader that was not configured");
        assert_eq!(coordinators.current().0, "http://c:1");
        coordinators.failed("http://c:1", &Status::unavailable("gone"));
        assert!(["http://a:1", "http://b:1"].contains(&coordinators.current().0.as_str()));
    }

    #[tokio::test]
    async fn a_standby_that_names_itself_or_nonsense_is_passed_over() {
        let coordinators = coordinators(&["http://a:1", "http://b:1"]);
        assert!(!coordinators.failed("http://a:1", &standby("http://a:1")));
        assert_eq!(coordinators.current().0, "http://b:1");
        assert!(!coordinators.failed("http://b:1", &standby("nonsense")));
        assert_eq!(coordinators.current().0, "http://a:1");
    }

    #[tokio::test]
    async fn a_late_failure_of_a_former_address_changes_nothing() {
        let coordinators = coordinators(&["http://a:1", "http://b:1"]);
        coordinators.failed("http://a:1", &Status::unavailable("gone"));
        coordinators.failed("http://a:1", &Status::unavailable("gone"));
        assert_eq!(coordinators.current().0, "http://b:1");
    }

    #[tokio::test]
    async fn a_call_follows_standbys_and_gives_up_after_two_rounds() {
        let coordinators = coordinators(&["http://a:1", "http://b:1"]);
        let asked = Mutex::new(0);
        let outcome: Result<(), Status> = coordinators
            .call(|_| {
                *asked.lock().unwrap() += 1;
                std::future::ready(Err(Status::unavailable("nobody leads")))
            })
            .await;
        assert_eq!(outcome.unwrap_err().message(), "nobody leads");
        assert_eq!(*asked.lock().unwrap(), 5);
    }
}
