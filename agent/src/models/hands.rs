//! Threads of their own for what is fetched. Writing to files blocks, for a moment mostly and for long where the disk is
//! behind with what it has been given: requests that pass this node must not wait for that.

use std::{future::Future, io, sync::Arc, thread};

use tokio::runtime::{Builder, Runtime};
use tokio_util::task::AbortOnDropHandle;

/// Threads, at most.
const MOST: usize = 8;

/// Runs tasks that write. Cheap to clone; with the last one its tasks end.
#[derive(Debug, Clone)]
pub(super) struct Hands(Arc<Ending>);

/// A runtime that may be dropped within another one.
#[derive(Debug)]
struct Ending(Option<Runtime>);

impl Hands {
    /// Starts the threads.
    ///
    /// # Errors
    /// There can be none.
    pub(super) fn new() -> io::Result<Self> {
        let threads = thread::available_parallelism().map_or(1, usize::from).min(MOST);
        let runtime =
            Builder::new_multi_thread().worker_threads(threads).thread_name("fetching").enable_all().build()?;
        Ok(Self(Arc::new(Ending(Some(runtime)))))
    }

    /// Runs a task, until it ends or the answer is dropped.
    pub(super) fn spawn<T: Send + 'static>(
        &self,
        task: impl Future<Output = T> + Send + 'static,
    ) -> AbortOnDropHandle<T> {
        let runtime = self.0.0.as_ref().expect("it is there until the end");
        AbortOnDropHandle::new(runtime.spawn(task))
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, time::Duration};

    use super::*;

    #[tokio::test]
    async fn what_blocks_there_holds_up_nobody_here() {
        let hands = Hands::new().unwrap();
        let (release, released) = mpsc::channel();
        let task = hands.spawn(async move {
            released.recv().unwrap();
            thread::current().name().map(ToOwned::to_owned)
        });
        // Of this runtime's only thread.
        tokio::time::sleep(Duration::from_millis(1)).await;
        release.send(()).unwrap();
        assert_eq!(task.await.unwrap().as_deref(), Some("fetching"));

        // With the answer the task ends, and with the last of the hands the threads, within a runtime, too.
        let (held, dropped) = tokio::sync::oneshot::channel::<()>();
        let task = hands.spawn(async move {
            let _held = held;
            std::future::pending::<()>().await;
        });
        drop(task);
        dropped.await.unwrap_err();
        drop(hands);
    }
}
