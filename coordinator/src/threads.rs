//! Which threads do what, so that no request can hold up the control loop or the agents' sessions.
//!
//! - The control loop has a thread of its own ([`spawn_loop`]).
//! - Sessions, connections and the store's client run on the process's runtime.
//! - Calls of the control API are handled on a small runtime of their own ([`ApiThreads`]), and manifests are parsed on
//!   its blocking threads, a few at a time ([`Parsing`]).

use std::{
    collections::HashMap,
    future::Future,
    io,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::{
    runtime::{Builder, Runtime},
    sync::{OwnedSemaphorePermit, Semaphore, oneshot},
};
use tokio_util::task::AbortOnDropHandle;
use tonic::Status;

/// Threads for calls of the control API.
const API_THREADS: usize = 2;
/// Manifests that are parsed at the same time.
const PARSING_MAX: usize = 2;
/// Manifests that may wait to be parsed; each has at most 1 MiB.
const PARSING_WAITING_MAX: usize = 30;
/// Those of them that may be one caller's, so that no caller keeps all others out.
const PARSING_PER_CALLER_MAX: usize = 8;

/// A runtime for calls of the control API. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct ApiThreads(Arc<OwnedRuntime>);

/// A runtime that may be dropped by asynchronous code: its threads end in the background.
#[derive(Debug)]
struct OwnedRuntime(Option<Runtime>);

impl Drop for OwnedRuntime {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

impl ApiThreads {
    /// Starts the threads.
    ///
    /// # Errors
    /// The system gives no threads.
    pub(crate) fn start() -> io::Result<Self> {
        let runtime =
            Builder::new_multi_thread().worker_threads(API_THREADS).thread_name("api").enable_all().build()?;
        Ok(Self(Arc::new(OwnedRuntime(Some(runtime)))))
    }

    /// Runs a call there. It ends when the result is dropped. Returns `None` if it panicked.
    pub(crate) async fn run<T: Send + 'static>(&self, call: impl Future<Output = T> + Send + 'static) -> Option<T> {
        let runtime = self.0.0.as_ref()?;
        AbortOnDropHandle::new(runtime.spawn(call)).await.ok()
    }
}

/// Runs the control loop on a thread of its own. What it returns comes by the receiver, which fails where the loop
/// panicked.
///
/// # Errors
/// The system gives no thread.
pub(crate) fn spawn_loop<T, F>(control_loop: F) -> io::Result<oneshot::Receiver<T>>
where
    T: Send + 'static,
    F: Future<Output = T> + Send + 'static,
{
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let (sender, receiver) = oneshot::channel();
    std::thread::Builder::new().name("control-loop".to_owned()).spawn(move || {
        // Nobody may wait for it any more, when the process ends.
        let _ = sender.send(runtime.block_on(control_loop));
    })?;
    Ok(receiver)
}

/// Parses manifests on blocking threads, a few at a time. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Parsing {
    admitted: Arc<Semaphore>,
    running: Arc<Semaphore>,
    /// Manifests that are parsed or wait, by caller.
    callers: Arc<Mutex<HashMap<String, usize>>>,
}

/// One manifest of a caller, counted until it is dropped.
struct Counted {
    callers: Arc<Mutex<HashMap<String, usize>>>,
    caller: String,
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut callers = self.callers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = callers.get_mut(&self.caller) {
            *count -= 1;
            if *count == 0 {
                callers.remove(&self.caller);
            }
        }
    }
}

impl Default for Parsing {
    fn default() -> Self {
        Self {
            admitted: Arc::new(Semaphore::new(PARSING_MAX + PARSING_WAITING_MAX)),
            running: Arc::new(Semaphore::new(PARSING_MAX)),
            callers: Arc::default(),
        }
    }
}

impl Parsing {
    /// Parses a manifest of `caller` once it is its turn.
    ///
    /// # Errors
    /// `RESOURCE_EXHAUSTED` where too many manifests wait, `INTERNAL` where the parser panicked.
    pub(crate) async fn parse<T: Send + 'static>(
        &self,
        caller: &str,
        parse: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Status> {
        let full = || {
            Status::resource_exhausted(format!(
                "{PARSING_WAITING_MAX} manifests wait to be read already; try again later"
            ))
        };
        let counted = self.count(caller)?;
        let admitted = Arc::clone(&self.admitted).try_acquire_owned().map_err(|_| full())?;
        let running = Arc::clone(&self.running).acquire_owned().await.map_err(|_| full())?;
        let work = move || {
            // A caller that hangs up does not stop the parser: its turn lasts as long as the work.
            let _turn: (OwnedSemaphorePermit, OwnedSemaphorePermit, Counted) = (admitted, running, counted);
            parse()
        };
        tokio::task::spawn_blocking(work).await.map_err(|error| Status::internal(format!("manifest: {error}")))
    }

    fn count(&self, caller: &str) -> Result<Counted, Status> {
        let mut callers = self.callers.lock().unwrap_or_else(PoisonError::into_inner);
        let count = callers.entry(caller.to_owned()).or_default();
        if *count >= PARSING_PER_CALLER_MAX {
            return Err(Status::resource_exhausted(format!(
                "{PARSING_PER_CALLER_MAX} manifests of {caller} are being read already; try again later"
            )));
        }
        *count += 1;
        Ok(Counted { callers: Arc::clone(&self.callers), caller: caller.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[tokio::test]
    async fn manifests_are_parsed_a_few_at_a_time_and_too_many_are_refused() {
        let parsing = Parsing::default();
        let (release, blocked) = mpsc::channel::<()>();
        let blocked = Arc::new(std::sync::Mutex::new(blocked));
        let started = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let callers = std::cell::Cell::new(0);
        let parse = || {
            callers.set(callers.get() + 1);
            let caller = format!("user-{}", callers.get() / PARSING_PER_CALLER_MAX);
            let (parsing, blocked, started) = (parsing.clone(), Arc::clone(&blocked), Arc::clone(&started));
            tokio::spawn(async move {
                let work = move || {
                    started.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                    blocked.lock().unwrap().recv().unwrap();
                };
                parsing.parse(&caller, work).await
            })
        };
        let waiting: Vec<_> = (0..PARSING_MAX + PARSING_WAITING_MAX).map(|_| parse()).collect();
        let refused = loop {
            tokio::task::yield_now().await;
            if parsing.admitted.available_permits() == 0 {
                break parse().await.unwrap().unwrap_err();
            }
        };
        assert_eq!(refused.code(), tonic::Code::ResourceExhausted);
        assert!(started.load(std::sync::atomic::Ordering::SeqCst) <= PARSING_MAX);
        for _ in &waiting {
            release.send(()).unwrap();
        }
        for parsed in waiting {
            parsed.await.unwrap().unwrap();
        }
        assert_eq!(parsing.admitted.available_permits(), PARSING_MAX + PARSING_WAITING_MAX);
    }

    #[tokio::test]
    async fn one_caller_does_not_keep_all_others_out() {
        let parsing = Parsing::default();
        let mine: Vec<_> = (0..PARSING_PER_CALLER_MAX).map(|_| parsing.count("flood").unwrap()).collect();
        let refused = parsing.parse("flood", || ()).await.unwrap_err();
        assert!(
            refused.code() == tonic::Code::ResourceExhausted && refused.message().contains("of flood"),
            "{refused}"
        );
        parsing.parse("other", || ()).await.unwrap();
        drop(mine);
        parsing.parse("flood", || ()).await.unwrap();
        assert!(parsing.callers.lock().unwrap().is_empty());
    }

    #[tokio::test]
    async fn calls_and_the_loop_have_threads_of_their_own_and_panics_are_seen() {
        let name = || std::thread::current().name().map(str::to_owned);
        let api = ApiThreads::start().unwrap();
        assert_eq!(api.run(async move { name() }).await.flatten().as_deref(), Some("api"));
        assert!(api.run(async { panic!("a call panics") }).await.is_none_or(|()| false));
        let looping = spawn_loop(async move { name() }).unwrap();
        assert_eq!(looping.await.unwrap().as_deref(), Some("control-loop"));
        let panics = spawn_loop::<(), _>(async { panic!("the loop panics") }).unwrap();
        assert!(panics.await.is_err());
    }
}
