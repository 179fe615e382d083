//! A replica that sleeps: how it gets there, and back.
//!
//! A mark on disk ([`SleepMark`]) tells a later agent process of it. It is written, not settled, before the
//! replica is put to sleep; settled when it sleeps; not settled again before it is woken; removed when it is
//! awake. So whatever the step at which this process is killed: a replica without a mark is awake, one with
//! a settled mark sleeps, and one in between is put to sleep once more, which does no harm to one that
//! sleeps already. From there on it is woken as any other.

use std::{sync::Arc, time::Duration};

use pilotlight_proto::fleet::v1::{ReplicaPhase, Rung, SleepPaths};
use tokio::time::Instant;
use tracing::{info, warn};

use super::{
    awake::Begin,
    failure::{Failure, SLEEP_FAILED, WAKE_FAILED},
    replica::{End, Life, Stage, TIMEOUT, duration, left, told},
    rung::{Cold, transition},
};
use crate::{
    runtime::{Running, SleepMark},
    warmth::{self, SleepError},
};

/// Longest that falling asleep may take, and waking. To move 80 GB of weights between a GPU and main memory
/// takes vLLM a few seconds.
const LIMIT: Duration = Duration::from_secs(60);

/// A replica that is loaded and is to sleep.
pub(super) struct Tired {
    /// True where the data path knows it.
    offered: bool,
    /// Its server's own endpoints; `None`: it is paused.
    paths: Option<SleepPaths>,
    /// The rung that it comes from; `None` where nobody knows.
    from: Option<Rung>,
    /// When it began to leave that, where that was before it was to sleep.
    began: Option<Instant>,
}

impl Tired {
    /// One that takes requests.
    pub(super) fn of_ready(paths: Option<SleepPaths>) -> Self {
        Self { offered: true, paths, from: Some(Rung::Serving), began: None }
    }

    /// One that has just become ready and that the data path has not heard of.
    pub(super) fn of_loaded(begin: Option<Begin>, paths: Option<SleepPaths>) -> Self {
        let (from, began) = match begin {
            Some(Begin::Started(Cold { look, began, .. })) => (look.rung(), Some(began)),
            _ => (Rung::Serving, None),
        };
        Self { offered: false, paths, from: Some(from), began }
    }

    /// One that a former agent process was about to put to sleep, or to wake.
    pub(super) fn of_former(paths: Option<SleepPaths>) -> Self {
        Self { offered: false, paths, from: None, began: None }
    }
}

impl Life {
    /// Lets a replica end what it has and puts it to sleep; back to awake, where it is told so in time.
    pub(super) async fn fall_asleep(&mut self, running: &Running, tired: Tired) -> Result<Stage, End> {
        if tired.offered && !self.drained(running).await? {
            return Ok(Stage::Awake(Begin::Kept, tracing::Span::none()));
        }
        if !tired.offered {
            self.update(|status| {
                status.set_phase(ReplicaPhase::Starting);
                status.message = "falling asleep".to_owned();
                status.reason.clear();
            });
        }
        let runtime = Arc::clone(&self.runtime);
        let mark = |settled| SleepMark { paths: tired.paths.clone(), settled };
        let falling = async {
            runtime.mark_sleep(&running.replica, Some(&mark(false)))?;
            let slept = warmth::fall_asleep(&*runtime, running, tired.paths.as_ref(), LIMIT).await?;
            runtime.mark_sleep(&running.replica, Some(&mark(true)))?;
            Ok::<_, SleepError>(slept)
        };
        let slept = tokio::select! {
            exit = runtime.exited(running) => return Err(self.ended(running, exit)),
            () = left(&mut self.desired) => return Err(End::Leave),
            slept = falling => slept,
        };
        self.endpoints.remove(&running.replica);
        let slept = match slept {
            Ok(slept) => slept,
            Err(error) => {
                let message = format!("did not fall asleep: {error}");
                let failure = Failure { reason: SLEEP_FAILED, message, ..Failure::default() };
                return Err(End::Failed(self.give_up(running, failure, None).await));
            }
        };
        info!(replica = %running.replica, took = ?slept.took, "sleeps");
        let took = tired.began.map_or(slept.took, |began| began.elapsed());
        let transition = tired.from.map(|from| transition(from, Rung::Asleep, took));
        self.sleeps(running, tired.paths, |status| {
            if transition.is_some() {
                status.transition = transition;
            }
        })
        .await
    }

    /// Tells the data path to give the replica nothing new, and waits until it has ended what it has. False
    /// where it is not to sleep any more.
    async fn drained(&mut self, running: &Running) -> Result<bool, End> {
        self.endpoints.drain(&running.replica);
        self.drains("finishes its requests before it sleeps".to_owned());
        let runtime = Arc::clone(&self.runtime);
        let timeout = duration(self.assignment().timeout).unwrap_or(TIMEOUT);
        tokio::select! {
            biased;
            exit = runtime.exited(running) => Err(self.ended(running, exit)),
            desired = told(&mut self.desired, |desired| desired.leave || !desired.assignment.asleep) => {
                if desired.leave { Err(End::Leave) } else { Ok(false) }
            }
            () = self.endpoints.drained(&running.replica) => Ok(true),
            () = tokio::time::sleep(timeout) => {
                warn!(replica = %running.replica, "not drained in time; put to sleep all the same");
                Ok(true)
            }
        }
    }

    /// Tells that a replica sleeps, and what it still has.
    pub(super) async fn sleeps(
        &self,
        running: &Running,
        paths: Option<SleepPaths>,
        change: impl FnOnce(&mut pilotlight_proto::fleet::v1::ReplicaStatus),
    ) -> Result<Stage, End> {
        let memory = self.runtime.memory(running).await;
        self.update(|status| {
            status.set_phase(ReplicaPhase::Asleep);
            status.ready_at = None;
            status.message = "asleep until a request needs it".to_owned();
            status.reason.clear();
            // Paused, it keeps what it has.
            status.holds_gpu_memory = paths.is_none();
            status.memory_bytes = memory;
            change(status);
        });
        Ok(Stage::Asleep(paths))
    }

    /// Leaves a sleeping replica alone until it is to wake, and wakes it. Whether it is ready is then asked
    /// as ever.
    pub(super) async fn sleep(&mut self, running: &Running, paths: Option<SleepPaths>) -> Result<Stage, End> {
        let runtime = Arc::clone(&self.runtime);
        let exited = runtime.exited(running);
        tokio::pin!(exited);
        let leave = tokio::select! {
            exit = &mut exited => return Err(self.ended(running, exit)),
            desired = told(&mut self.desired, |desired| desired.leave || !desired.assignment.asleep) => desired.leave,
        };
        if leave {
            return Err(End::Leave);
        }
        let begun = Instant::now();
        let span = self.wake_span();
        self.update(|status| {
            status.set_phase(ReplicaPhase::Starting);
            status.message = "waking up".to_owned();
            status.holds_gpu_memory = false;
        });
        let waking = async {
            self.mark(running, Some(SleepMark { paths: paths.clone(), settled: false }));
            warmth::wake(&*runtime, running, paths.as_ref(), LIMIT).await?;
            self.mark(running, None);
            Ok::<_, SleepError>(())
        };
        let mut desired = self.desired.clone();
        let woken = tokio::select! {
            exit = &mut exited => return Err(self.ended(running, exit)),
            () = left(&mut desired) => return Err(End::Leave),
            woken = waking => woken,
        };
        match woken {
            Ok(()) => Ok(Stage::Awake(Begin::Woken(begun), span)),
            Err(error) => {
                let message = format!("did not wake: {error}");
                let failure = Failure { reason: WAKE_FAILED, message, ..Failure::default() };
                Err(End::Failed(self.give_up(running, failure, None).await))
            }
        }
    }

    /// Notes how far waking is. A disk that refuses keeps nothing asleep: a later agent process would take
    /// this one for asleep, and wake it again.
    fn mark(&self, running: &Running, mark: Option<SleepMark>) {
        if let Err(error) = self.runtime.mark_sleep(&running.replica, mark.as_ref()) {
            warn!(replica = %running.replica, %error, "cannot note that it wakes");
        }
    }
}
