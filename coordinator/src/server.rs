//! Puts a coordinator together and runs it.

mod grpc;
mod standing;
mod switch;

use std::{
    net::SocketAddr,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use jiff::Timestamp;
use pilotlight_identity::Revocations;
use standing::{Role, Standing};
use switch::Switch;
use tokio::net::TcpListener;
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::{info, warn};

use crate::{
    api::access::{Access, CellMembers},
    authority::{self, Authorities, LiveAuthorities, OwnIdentity},
    config::{Config, Security, StoreConfig},
    follow::follow,
    leader::{self, CampaignEvent, LeaderRecord},
    members,
    metrics::CoordinatorMetrics,
    model::keys,
    reconcile::{Handle, Reconciler, record::Recorder, run::Setup, world::Settings},
    store::{Measured, Store, StoreError, embedded::EmbeddedStore, etcd::EtcdStore, format},
    threads::{self, ApiThreads},
    usage_log,
    values::{Values, ValuesError, Vault},
};

/// How long a leader's claim outlives its process; a successor waits this long after a crash.
const LEADER_TTL: Duration = Duration::from_secs(5);
/// Pause before a store that does not answer is asked again.
const STORE_PAUSE: Duration = Duration::from_secs(1);
/// Time between two looks at whether the store can be used.
const STORE_CHECK_INTERVAL: Duration = Duration::from_secs(2);
/// Time for connections to end when the process stops.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);
/// Time to tell the store that this process leads no longer.
const RESIGN_TIMEOUT: Duration = Duration::from_secs(1);

/// Why a coordinator could not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum CoordinatorError {
    /// Plaintext is for this machine alone.
    #[error("listen: {0} is not a loopback address; without TLS only loopback is allowed")]
    PlaintextOffLoopback(SocketAddr),
    /// Autoscaler settings are out of range.
    #[error("{0}")]
    Scaling(String),
    /// An address cannot be listened on.
    #[error("{what}: cannot listen on {address}: {error}")]
    Listen {
        /// Which setting.
        what: &'static str,
        /// Its value.
        address: SocketAddr,
        /// Why.
        error: std::io::Error,
    },
    /// The recording cannot be made.
    #[error("record: {0}")]
    Record(std::io::Error),
    /// Certificates cannot be made or read.
    #[error(transparent)]
    Identity(#[from] pilotlight_identity::IdentityError),
    /// The store cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Secrets cannot be opened.
    #[error(transparent)]
    Values(#[from] ValuesError),
    /// The gRPC server failed.
    #[error("grpc: {0}")]
    Grpc(#[from] tonic::transport::Error),
    /// Nodes would be lost between two reports.
    #[error("node-lease: {lease:?}, expected at least three times report-interval ({interval:?})")]
    ShortLease {
        /// As configured.
        lease: Duration,
        /// As configured.
        interval: Duration,
    },
    /// The system gives no threads.
    #[error("cannot start threads: {0}")]
    Threads(std::io::Error),
    /// An error in the program.
    #[error("internal error: {0}")]
    Panicked(String),
}

/// Runs a coordinator until `stopping`: it leads the cell, or stands by while another coordinator does.
///
/// # Errors
/// A setting cannot be used, or the store holds what this version cannot read. A store that does not answer is no
/// error: the coordinator steps down, and comes back with the store.
pub async fn run(config: Config, stopping: CancellationToken) -> Result<(), CoordinatorError> {
    if matches!(config.security, Security::Token(_)) && !config.listen.ip().is_loopback() {
        return Err(CoordinatorError::PlaintextOffLoopback(config.listen));
    }
    config.scaling.validate().map_err(|wrong| CoordinatorError::Scaling(wrong.join("; ")))?;
    if config.node_lease < config.report_interval * 3 {
        return Err(CoordinatorError::ShortLease { lease: config.node_lease, interval: config.report_interval });
    }
    pilotlight_identity::private_dir(&config.data_dir)?;
    let _lock = pilotlight_identity::lock_dir(&config.data_dir)?;
    let listener = listen("listen", config.listen).await?;
    let http = listen("listen-http", config.listen_http).await?;
    let metrics = pilotlight_telemetry::Metrics::new("pilotlight-coordinator", env!("CARGO_PKG_VERSION"));
    let measures = CoordinatorMetrics::default();
    metrics.register(|registry| measures.register(registry));
    let standing = Standing::new();
    let readiness = standing.clone();
    let status = pilotlight_telemetry::http_router(&metrics, move || readiness.readiness());
    let readiness = standing.clone();
    pilotlight_telemetry::notify_service_manager(move || readiness.readiness(), stopping.clone());
    tokio::spawn(pilotlight_telemetry::serve_status(http, status, stopping.clone()));
    let api = ApiThreads::start().map_err(CoordinatorError::Threads)?;
    let switch = Switch::new(standing.clone(), api);
    let vault = Arc::new(Vault::open(config.secrets_key.as_deref(), &config.data_dir)?);
    let coordinator = Coordinator {
        switch,
        config,
        standing,
        measures,
        vault,
        revocations: Arc::default(),
        former: Former::default(),
        stopping,
    };
    let stopping = coordinator.stopping.clone();
    tokio::select! {
        outcome = coordinator.serve(listener) => outcome,
        // What `serve` does by itself once it leads; before that there is nothing to end.
        () = async { stopping.cancelled().await; tokio::time::sleep(STOP_TIMEOUT).await } => Ok(()),
    }
}

/// One process, in whichever role.
struct Coordinator {
    config: Config,
    standing: Standing,
    switch: Switch,
    measures: CoordinatorMetrics,
    vault: Arc<Vault>,
    revocations: Arc<Revocations>,
    former: Former,
    stopping: CancellationToken,
}

/// How a term as the leader ended.
#[derive(Debug, PartialEq, Eq)]
enum Ended {
    Stopping,
    LostLeadership,
    /// The store did not answer while this process took over, and why.
    StoreUnavailable(String),
}

impl Ended {
    /// What an error means for the term: leadership may be lost, and the store may stop answering, at any moment.
    ///
    /// # Errors
    /// It is one after which this process cannot go on.
    fn by(error: CoordinatorError) -> Result<Self, CoordinatorError> {
        match error {
            CoordinatorError::Store(StoreError::Fenced)
            | CoordinatorError::Values(ValuesError::Store(StoreError::Fenced)) => Ok(Self::LostLeadership),
            CoordinatorError::Store(StoreError::Unavailable(reason))
            | CoordinatorError::Values(ValuesError::Store(StoreError::Unavailable(reason))) => {
                Ok(Self::StoreUnavailable(reason))
            }
            error => Err(error),
        }
    }
}

/// What this process knew when it led last; it is kept for readers until somebody leads again.
#[derive(Default)]
struct Former(Mutex<Option<DropGuard>>);

impl Former {
    /// Keeps it until the token that is returned is cancelled.
    fn remember(&self) -> CancellationToken {
        let until = CancellationToken::new();
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(until.clone().drop_guard());
        until
    }

    fn forget(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}

impl Coordinator {
    async fn serve(&self, listener: TcpListener) -> Result<(), CoordinatorError> {
        let store = tokio::select! {
            store = self.open_store(&listener) => store?,
            () = self.stopping.cancelled() => return Ok(()),
        };
        let store: Arc<dyn Store> = Arc::new(Measured::new(store, self.measures.clone()));
        let own = tokio::select! {
            own = self.identity(&store) => own?,
            () = self.stopping.cancelled() => return Ok(()),
        };
        let mut grpc = tokio::spawn(grpc::serve(
            listener,
            own.as_ref().map(|(own, _)| own.identity()),
            self.switch.clone(),
            self.measures.clone(),
            Arc::clone(&self.revocations),
            self.stopping.clone(),
        ));
        let authorities = own.map(|(own, authorities)| {
            self.follow_members(&store, own, &authorities);
            authorities
        });
        self.standing.set_serves();
        let mut turns = std::pin::pin!(self.take_turns(&store, authorities));
        tokio::select! {
            served = &mut grpc => {
                served.map_err(|error| CoordinatorError::Panicked(error.to_string()))??;
                return turns.await;
            }
            outcome = &mut turns => outcome?,
        }
        // Connections end by themselves once the sessions have.
        let _ = tokio::time::timeout(STOP_TIMEOUT, grpc).await;
        Ok(())
    }

    /// Leads whenever this process is elected, until it stops.
    async fn take_turns(
        &self,
        store: &Arc<dyn Store>,
        authorities: Option<LiveAuthorities>,
    ) -> Result<(), CoordinatorError> {
        let candidate = LeaderRecord::of_this_process(self.config.advertised());
        loop {
            let report = |event| {
                let role = match event {
                    CampaignEvent::OtherLeads(leader) => {
                        self.switch.refuse_all();
                        self.former.forget();
                        Role::Standby(leader)
                    }
                    CampaignEvent::StoreUnavailable(reason) => {
                        warn!(reason, "the store does not answer; trying again");
                        Role::StoreUnavailable(reason)
                    }
                };
                self.standing.set_role(role);
            };
            let leadership = tokio::select! {
                leadership = leader::campaign(Arc::clone(store), &candidate, LEADER_TTL, report) => leadership?,
                () = self.stopping.cancelled() => return Ok(()),
            };
            self.standing.set_role(Role::TakingOver);
            info!(cell = %self.config.cell, store = store.kind(), "leading");
            let term = self.lead(&leadership, authorities.clone()).await.or_else(Ended::by);
            self.measures.set_leader(false);
            // A store that does not answer cannot be told; the lease then ends by itself.
            let _ = tokio::time::timeout(RESIGN_TIMEOUT, leadership.resign()).await;
            match term? {
                Ended::LostLeadership => {}
                Ended::Stopping => return Ok(()),
                Ended::StoreUnavailable(reason) => {
                    self.standing.set_role(Role::StoreUnavailable(reason));
                }
            }
        }
    }

    /// Leads until this process stops or leadership is lost. What it knew can still be read after that.
    async fn lead(
        &self,
        leadership: &leader::Leadership,
        authorities: Option<LiveAuthorities>,
    ) -> Result<Ended, CoordinatorError> {
        let (config, store) = (&self.config, leadership.fenced());
        let access = match &config.security {
            Security::Token(token) => Access::Token(token.as_str().into()),
            Security::Mtls { .. } => {
                members::load(&store, &self.revocations).await?;
                let members = CellMembers { cell: config.cell.clone(), revocations: Arc::clone(&self.revocations) };
                Access::Certified(Arc::new(members))
            }
        };
        // Whatever ends the loop ends the sessions, and the other way round.
        let ending = self.stopping.child_token();
        let (handle, inputs, changes) = Handle::new();
        let vault = &self.vault;
        let recorder = match &config.record {
            Some(path) => Recorder::append(path).map_err(CoordinatorError::Record)?,
            None => Recorder::default(),
        };
        let setup = Setup {
            store: Arc::clone(&store),
            settings: settings(config, vault.values()),
            tick: config.tick,
            report_interval: config.report_interval,
            recorder,
            inputs,
            changes,
        };
        format::claim(&store, &config.cell).await?;
        vault.load(&store).await?;
        let reconciler = Reconciler::load(setup).await?.with_metrics(self.measures.clone());
        let mut looping = threads::spawn_loop(reconciler.run(ending.clone())).map_err(CoordinatorError::Threads)?;
        tokio::spawn(usage_log::keep_merging(Arc::clone(&store), ending.clone()));
        tokio::spawn(self.measures.state.clone().follow(handle.clone(), ending.clone()));
        let services =
            grpc::services(config, &store, vault, handle, access, authorities, &self.revocations, &ending).await;
        self.switch.lead(services.into_axum_router());
        self.former.forget();
        self.standing.set_role(Role::Leading);
        self.measures.set_leader(true);

        let panicked = |_| CoordinatorError::Panicked("the control loop panicked".to_owned());
        let reason = tokio::select! {
            ended = &mut looping => {
                // It ends by itself only where this process stops.
                ended.map_err(panicked)?;
                return Ok(Ended::Stopping);
            }
            reason = leadership.lost() => reason,
            () = self.watch_store(&store) => unreachable!("the store is watched for ever"),
        };
        // Reads go on, as of now; the sessions end, so that agents look for another leader.
        warn!(reason, "stepping down");
        self.standing.set_role(Role::SteppedDown(reason));
        self.switch.suspend(Timestamp::now());
        ending.cancel();
        let reconciler = looping.await.map_err(panicked)?;
        tokio::spawn(reconciler.answer_reads(self.former.remember()));
        Ok(Ended::LostLeadership)
    }

    /// Notes whether the store can be used, for `/readyz`. Never returns.
    async fn watch_store(&self, store: &Arc<dyn Store>) {
        loop {
            self.standing.set_store_fault(store.ping().await.err().map(|error| error.to_string()));
            tokio::time::sleep(STORE_CHECK_INTERVAL).await;
        }
    }

    /// Opens the store; waits for an etcd that does not answer yet, since machines start in any order. Meanwhile
    /// connections are closed at once, so that callers try another coordinator.
    async fn open_store(&self, listener: &TcpListener) -> Result<Arc<dyn Store>, CoordinatorError> {
        let etcd = match &self.config.store {
            StoreConfig::Embedded => {
                return Ok(Arc::new(EmbeddedStore::open_in(&self.config.data_dir, authority::OPERATOR_DIR)?));
            }
            StoreConfig::Etcd(etcd) => etcd,
        };
        let store = Arc::new(EtcdStore::new(etcd, &format!("/pilotlight/{}/", self.config.cell))?);
        let closing = async {
            loop {
                drop(listener.accept().await);
            }
        };
        tokio::select! {
            () = self.answers(&*store) => Ok(store),
            () = closing => unreachable!("connections are closed for ever"),
        }
    }

    /// Waits until the store answers.
    async fn answers(&self, store: &dyn Store) {
        while let Err(error) = store.ping().await {
            let reason = error.to_string();
            if self.standing.set_role(Role::StoreUnavailable(reason.clone())) {
                warn!(reason, "the store does not answer; trying again");
            }
            tokio::time::sleep(STORE_PAUSE).await;
        }
    }

    /// Who this coordinator is, and the authorities of the cell; `None` without TLS.
    async fn identity(
        &self,
        store: &Arc<dyn Store>,
    ) -> Result<Option<(OwnIdentity, LiveAuthorities)>, CoordinatorError> {
        let Security::Mtls { ca, names } = &self.config.security else { return Ok(None) };
        let ca = ca.as_ref().map(|(certificate, key)| (certificate.as_path(), key.as_path()));
        let authorities = self.authorities(store, ca).await?;
        let own = OwnIdentity::issue(&self.config, &authorities, names)?;
        Ok(Some((own, LiveAuthorities::new(authorities))))
    }

    async fn authorities(
        &self,
        store: &Arc<dyn Store>,
        ca: Option<(&Path, &Path)>,
    ) -> Result<Authorities, CoordinatorError> {
        loop {
            match format::check(store, &self.config.cell).await {
                Ok(()) => {}
                Err(StoreError::Unavailable(_)) => {
                    self.answers(&**store).await;
                    continue;
                }
                Err(error) => return Err(error.into()),
            }
            match authority::open(store, &self.config.cell, ca, &self.vault).await {
                Ok(authorities) => return Ok(authorities),
                // Another coordinator has just made it; or the store is away again.
                Err(CoordinatorError::Store(StoreError::Conflict { .. })) => {}
                Err(CoordinatorError::Store(StoreError::Unavailable(_))) => self.answers(&**store).await,
                Err(error) => return Err(error),
            }
        }
    }

    /// Follows who may be trusted, in whichever role.
    fn follow_members(&self, store: &Arc<dyn Store>, own: OwnIdentity, authorities: &LiveAuthorities) {
        let revocations = Arc::clone(&self.revocations);
        tokio::spawn(own.follow(authorities.clone(), Arc::clone(&revocations), self.stopping.clone()));
        let reading = Arc::clone(store);
        let load = move || {
            let (store, revocations) = (Arc::clone(&reading), Arc::clone(&revocations));
            async move { members::load(&store, &revocations).await }
        };
        tokio::spawn(follow(Arc::clone(store), keys::REVOCATIONS, load, self.stopping.clone()));
        if authorities.current().is_external() {
            return;
        }
        let (reading, cell, vault) = (Arc::clone(store), self.config.cell.clone(), Arc::clone(&self.vault));
        let authorities = authorities.clone();
        let load = move || {
            let (store, cell, vault) = (Arc::clone(&reading), cell.clone(), Arc::clone(&vault));
            let authorities = authorities.clone();
            async move { authorities.reload(&store, &cell, &vault).await }
        };
        tokio::spawn(follow(Arc::clone(store), keys::AUTHORITY, load, self.stopping.clone()));
    }
}

fn settings(config: &Config, values: &Arc<Values>) -> Settings {
    Settings {
        cell: config.cell.clone(),
        domain: config.domain.clone(),
        ingress_port: config.ingress_port,
        queue_limit: config.queue_limit,
        scaling: config.scaling.clone(),
        node_lease: config.node_lease,
        placement_policy: config.placement_policy,
        idle_replicas: config.idle_replicas,
        values: Arc::clone(values),
    }
}

async fn listen(what: &'static str, address: SocketAddr) -> Result<TcpListener, CoordinatorError> {
    TcpListener::bind(address).await.map_err(|error| CoordinatorError::Listen { what, address, error })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Transaction;

    fn coordinator(data_dir: &Path) -> Coordinator {
        let config =
            Config { data_dir: data_dir.to_owned(), security: Security::Token("t".into()), ..Config::default() };
        let standing = Standing::new();
        Coordinator {
            switch: Switch::new(standing.clone(), ApiThreads::start().unwrap()),
            vault: Arc::new(Vault::open(None, data_dir).unwrap()),
            measures: CoordinatorMetrics::default(),
            revocations: Arc::default(),
            former: Former::default(),
            stopping: CancellationToken::new(),
            config,
            standing,
        }
    }

    #[tokio::test]
    async fn a_coordinator_that_loses_leadership_while_it_takes_over_stands_by() {
        let directory = tempfile::tempdir().unwrap();
        let store: Arc<dyn Store> = Arc::new(EmbeddedStore::open(&directory.path().join("state.redb")).unwrap());
        let coordinator = coordinator(directory.path());
        let this = LeaderRecord::of_this_process("http://127.0.0.1:1".into());
        let leadership = leader::campaign(Arc::clone(&store), &this, LEADER_TTL, |_| ()).await.unwrap();
        let other = LeaderRecord::of_this_process("http://127.0.0.1:2".into());
        store.commit(Transaction::new().put_json(leader::KEY, &other)).await.unwrap();
        store.commit(Transaction::new().delete(leader::KEY)).await.unwrap();
        let term = coordinator.lead(&leadership, None).await;
        assert!(matches!(term, Err(CoordinatorError::Store(StoreError::Fenced))), "its first commit is refused");
        assert_eq!(term.or_else(Ended::by).unwrap(), Ended::LostLeadership);
    }

    #[test]
    fn a_store_that_does_not_answer_is_waited_for_and_one_that_cannot_be_read_is_not() {
        let unavailable = || StoreError::Unavailable("etcd is unreachable".into());
        let waits = Ended::StoreUnavailable("etcd is unreachable".into());
        assert_eq!(Ended::by(unavailable().into()).unwrap(), waits);
        assert_eq!(Ended::by(ValuesError::Store(unavailable()).into()).unwrap(), waits);
        let unreadable = StoreError::Unreadable { key: "services/a".into(), reason: "not JSON".into() };
        assert!(Ended::by(unreadable.into()).is_err());
    }
}
