//! Brings log chunks from agents to whoever asked for them.

use std::{
    collections::HashMap,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use pilotlight_proto::fleet::v1::LogChunk;
use tokio::sync::mpsc;

/// Chunks a slow reader may fall behind before its request is ended: 16 MiB, more than an agent keeps of one run.
const CHUNKS_WAITING: usize = 512;

/// Open log requests by id.
#[derive(Debug, Default)]
pub struct LogHub {
    next: AtomicU64,
    readers: Mutex<HashMap<u64, mpsc::Sender<LogChunk>>>,
}

impl LogHub {
    /// Opens a request: its id, and where its chunks come.
    pub fn open(&self) -> (u64, mpsc::Receiver<LogChunk>) {
        let id = self.next.fetch_add(1, Ordering::Relaxed) + 1;
        let (sender, receiver) = mpsc::channel(CHUNKS_WAITING);
        self.readers().insert(id, sender);
        (id, receiver)
    }

    /// Closes a request; later chunks of it are dropped.
    pub fn close(&self, id: u64) {
        self.readers().remove(&id);
    }

    /// Hands a chunk to its reader. A reader that is gone or too far behind is closed.
    pub fn deliver(&self, chunk: LogChunk) {
        let id = chunk.request_id;
        let end = chunk.end;
        let mut readers = self.readers();
        let delivered = readers.get(&id).is_some_and(|reader| reader.try_send(chunk).is_ok());
        if end || !delivered {
            readers.remove(&id);
        }
    }

    fn readers(&self) -> std::sync::MutexGuard<'_, HashMap<u64, mpsc::Sender<LogChunk>>> {
        // The map is never left half changed, so a panic elsewhere does not spoil it.
        self.readers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
