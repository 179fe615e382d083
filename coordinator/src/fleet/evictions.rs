//! Brings agents' answers to whoever asked them to remove a model.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use pilotlight_proto::fleet::v1::ModelEvicted;
use tokio::sync::oneshot;

/// Open requests by id.
#[derive(Debug, Default)]
pub struct EvictHub {
    next: AtomicU64,
    open: Mutex<HashMap<u64, oneshot::Sender<ModelEvicted>>>,
}

/// One request; closed when dropped.
#[derive(Debug)]
pub struct Asked {
    /// Which the answer carries.
    pub id: u64,
    hub: Arc<EvictHub>,
    answer: oneshot::Receiver<ModelEvicted>,
}

impl EvictHub {
    /// Opens a request.
    pub fn open(self: &Arc<Self>) -> Asked {
        let id = self.next.fetch_add(1, Ordering::Relaxed) + 1;
        let (sender, answer) = oneshot::channel();
        self.requests().insert(id, sender);
        Asked { id, hub: Arc::clone(self), answer }
    }

    /// Hands an answer to whoever asked. One that nobody waits for any more is dropped.
    pub fn deliver(&self, answer: ModelEvicted) {
        if let Some(asked) = self.requests().remove(&answer.request_id) {
            let _ = asked.send(answer);
        }
    }

    fn requests(&self) -> std::sync::MutexGuard<'_, HashMap<u64, oneshot::Sender<ModelEvicted>>> {
        // The map is never left half changed, so a panic elsewhere does not spoil it.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Asked {
    /// The answer, whenever it comes.
    pub async fn answer(&mut self) -> Option<ModelEvicted> {
        (&mut self.answer).await.ok()
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        self.hub.requests().remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn answers_come_to_those_who_asked() {
        let hub = Arc::new(EvictHub::default());
        let (mut first, second) = (hub.open(), hub.open());
        assert_ne!(first.id, second.id);
        let late = ModelEvicted { request_id: second.id, freed_bytes: 1, error: String::new() };
        drop(second);
        hub.deliver(late);
        hub.deliver(ModelEvicted { request_id: first.id, freed_bytes: 2, error: String::new() });
        assert_eq!(first.answer().await.unwrap().freed_bytes, 2);
        assert!(hub.requests().is_empty());
    }
}
