//! What this coordinator is at the moment: for `/readyz`, and for callers that need the leader.

use tokio::sync::watch;

use crate::leader::LeaderRecord;

/// What a coordinator is at the moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Role {
    /// It has not reached the store yet.
    Starting,
    /// The store does not answer, and why; nobody can lead.
    StoreUnavailable(String),
    /// Another coordinator leads.
    Standby(LeaderRecord),
    /// It takes over: it reads what is stored.
    TakingOver,
    /// It leads.
    Leading,
    /// It led until now, and why it leads no longer.
    SteppedDown(String),
}

/// The role, and what else must hold before `/readyz` says that the process can do its work.
#[derive(Debug, Clone, PartialEq, Eq)]
struct State {
    role: Role,
    /// True once gRPC serves; the operator's certificate is written before that.
    serves: bool,
    /// Why the store cannot be used, while this coordinator leads.
    store_fault: Option<String>,
}

/// Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Standing(watch::Sender<State>);

impl Standing {
    pub(crate) fn new() -> Self {
        Self(watch::Sender::new(State { role: Role::Starting, serves: false, store_fault: None }))
    }

    /// Sets the role. Returns `true` if it was another one.
    pub(crate) fn set_role(&self, role: Role) -> bool {
        self.0.send_if_modified(|state| {
            let changes = state.role != role;
            state.role = role;
            changes
        })
    }

    pub(crate) fn set_serves(&self) {
        self.0.send_modify(|state| state.serves = true);
    }

    /// Notes whether the store can be used.
    pub(crate) fn set_store_fault(&self, fault: Option<String>) {
        self.0.send_if_modified(|state| {
            let changes = state.store_fault != fault;
            state.store_fault = fault;
            changes
        });
    }

    pub(crate) fn role(&self) -> Role {
        self.0.borrow().role.clone()
    }

    /// Whether the process can do its work, in words.
    ///
    /// # Errors
    /// It cannot, and why.
    pub(crate) fn readiness(&self) -> Result<String, String> {
        let state = self.0.borrow();
        if let Role::StoreUnavailable(reason) = &state.role {
            return Err(reason.clone());
        }
        if !state.serves {
            return Err("starting: gRPC does not serve yet".to_owned());
        }
        match (&state.role, &state.store_fault) {
            (Role::Leading, Some(fault)) => Err(fault.clone()),
            (Role::Leading, None) => Ok("ok: leading".to_owned()),
            (Role::Standby(leader), _) => Ok(format!("ok: standby, {} leads", leader.address)),
            (Role::Starting | Role::TakingOver, _) => Err("starting: the state is not loaded yet".to_owned()),
            (Role::StoreUnavailable(reason), _) => Err(reason.clone()),
            (Role::SteppedDown(reason), _) => Err(format!("stepped down: {reason}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_coordinator_is_ready_only_once_it_serves_and_leads_or_stands_by() {
        let standing = Standing::new();
        assert!(standing.readiness().is_err());
        standing.set_role(Role::Leading);
        assert!(standing.readiness().unwrap_err().contains("gRPC"), "it does not serve yet");
        standing.set_serves();
        assert_eq!(standing.readiness().unwrap(), "ok: leading");
        standing.set_store_fault(Some("state.redb: no space left on device".into()));
        assert!(standing.readiness().unwrap_err().contains("no space left"));
        standing.set_store_fault(None);
        standing.set_role(Role::StoreUnavailable("etcd is unreachable: refused".into()));
        assert!(standing.readiness().unwrap_err().starts_with("etcd is unreachable"));
        standing.set_role(Role::Standby(LeaderRecord::of_this_process("https://b:7443".into())));
        assert_eq!(standing.readiness().unwrap(), "ok: standby, https://b:7443 leads");
    }
}
