//! Models are shown as soon as all of their bytes are in files and have been checked: a replica reads them from
//! memory, and need not wait for the disk, nor for hashes that are only names. Only a machine that ends before the disk
//! has them all could lose some. So until both is done a mark beside the model names the machine's boot; what another
//! boot has marked is taken for not whole.
//!
//! The mark is on the disk before the first byte comes. Nothing is synced when the model is shown: a file system
//! that keeps the order of what is written would first write all that has come.

use std::{
    fs::{self, File},
    io,
    path::Path,
};

use tracing::{info, warn};

use super::{
    cache::{Cache, unless_missing, write_synced},
    landing::{self, Syncing},
    room::Room,
};

/// Name of the mark in a model's folder.
const MARK: &str = "unsettled";

/// This boot of the machine; `None` where the kernel does not say, so that everything is synced first.
pub(super) fn boot_id() -> Option<String> {
    let read = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(read.trim().to_owned()).filter(|id| !id.is_empty())
}

/// Writes the mark into the folder that will be shown, where it is not there yet.
pub(super) fn mark(folder: &Path, boot: &str) -> io::Result<()> {
    if fs::read_to_string(folder.join(MARK)).is_ok_and(|marked| marked == boot) {
        return Ok(());
    }
    fs::create_dir_all(folder)?;
    write_synced(&folder.join(MARK), boot)
}

impl Cache {
    /// Marks a model that is about to be fetched.
    ///
    /// # Errors
    /// The disk refuses.
    pub(super) fn expect(&self, key: &str, boot: &str) -> io::Result<()> {
        mark(&self.staged(key), boot)
    }

    /// Has all of a model on the disk, contents that it shares with others too, and takes its mark away. False where it
    /// was removed meanwhile, and has nothing to lose any more.
    ///
    /// # Errors
    /// The disk refuses: what is there of the model cannot be trusted.
    pub(super) fn settle(&self, key: &str) -> io::Result<bool> {
        let Some(record) = self.record(key) else { return Ok(false) };
        let mut files = record.objects.iter().map(|object| self.files(key).join(&object.path));
        let synced = files.try_for_each(|file| File::open(file)?.sync_data()).and_then(|()| self.sync_tree(key));
        match synced {
            Err(error) if error.kind() == io::ErrorKind::NotFound && self.record(key).is_none() => return Ok(false),
            synced => synced?,
        }
        unless_missing(fs::remove_file(self.tree(key).join(MARK)))?;
        Ok(true)
    }

    /// Keys of models that bear a mark, whatever else is there of them.
    pub(super) fn unsettled(&self) -> Vec<String> {
        self.keys().filter(|key| self.tree(key).join(MARK).exists()).collect()
    }

    /// Removes models that an earlier boot of the machine did not get to the disk as a whole.
    pub(super) fn drop_unsettled(&self, boot: Option<&str>) -> io::Result<()> {
        for key in self.unsettled() {
            let marked = fs::read_to_string(self.tree(&key).join(MARK))?;
            if boot != Some(marked.trim()) {
                warn!(%key, "a model was not wholly on the disk when the machine ended; it is fetched again");
                self.remove_tree(&key)?;
            }
        }
        Ok(())
    }
}

/// Settles what a former process of this boot has left to do, on a thread of its own.
pub(super) fn settle_rest(cache: Cache, room: Room) {
    let keys = cache.unsettled();
    if keys.is_empty() {
        return;
    }
    let settle = move || {
        for key in &keys {
            let named = name(&cache, &room, key);
            end(&cache, &room, key, named, Ok(()));
        }
    };
    if let Err(error) = std::thread::Builder::new().name("settling".to_owned()).spawn(settle) {
        warn!(%error, "no thread to sync models; their marks stay");
    }
}

/// Sees to it that a model that is shown already comes to the disk, and its contents to their names. Those come as soon
/// as they can, on a thread that does not hold up the process's end.
pub(super) async fn settle(cache: Cache, room: Room, key: String, syncing: Syncing) {
    let (reads, at, of) = (cache.clone(), room.clone(), key.clone());
    let naming = landing::apart(move || name(&reads, &at, &of));
    let synced = syncing.ended().await;
    // What the disk has refused must not be shown until it has a name.
    let named = if synced.is_ok() { naming.await.map_err(io::Error::other).flatten() } else { Ok(()) };
    if let Err(error) = tokio::task::spawn_blocking(move || end(&cache, &room, &key, named, synced)).await {
        warn!(%error, "settling a model was cut off; its mark stays");
    }
}

/// Hashes contents of a model that have no names yet, and gives them these. Blocks.
fn name(cache: &Cache, room: &Room, key: &str) -> io::Result<()> {
    let names = cache.names(key)?;
    if names.is_empty() { Ok(()) } else { room.rename(key, &names) }
}

/// Settles a model whose ranges are synced. One that does not come to the disk is shown no more: what the disk has
/// refused, memory forgets. One whose contents could not be named keeps its mark, by which the next process tries again.
/// Blocks.
fn end(cache: &Cache, room: &Room, key: &str, named: io::Result<()>, synced: io::Result<()>) {
    if let (Err(error), Ok(())) = (&named, &synced) {
        warn!(%key, %error, "a model's contents cannot be named now; other nodes cannot have it from here");
        return;
    }
    match synced.and_then(|()| cache.settle(key)) {
        Ok(true) => info!(%key, "model settled on the disk"),
        Ok(false) => {}
        Err(error) => room.lost(key, &error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::{cache::TreeRecord, content};

    /// A cache with a model of one content that has no name yet, marked by this boot or settled.
    fn cache(root: &Path, boot: Option<&str>) -> Cache {
        let cache = Cache::open(root.to_owned()).unwrap();
        let blob = content::unnamed("k", 0);
        fs::write(cache.blob(&blob), "content").unwrap();
        let object = super::super::plan::Object {
            path: "m".into(),
            location: "m".into(),
            size: 7,
            etag: None,
            sha256: None,
            md5: None,
        };
        let record = TreeRecord { uri: "u".into(), objects: vec![object], blobs: vec![blob] };
        cache.begin("k", "u").unwrap();
        cache.publish("k", &record, boot).unwrap();
        cache
    }

    #[test]
    fn what_another_boot_left_unsettled_is_not_shown() {
        let root = tempfile::tempdir().unwrap();
        let there = cache(root.path(), Some("another boot"));
        assert!(there.record("k").is_some());
        let again = Cache::open(root.path().to_owned()).unwrap();
        assert!(again.record("k").is_none() && !again.blob(&content::unnamed("k", 0)).exists());
    }

    #[test]
    fn notes_of_a_fetch_that_a_crash_left_beside_its_published_model_are_removed() {
        let root = tempfile::tempdir().unwrap();
        let there = cache(root.path(), boot_id().as_deref());
        there.begin("k", "u").unwrap();
        fs::write(root.path().join("partial/k/0.done"), "0\n").unwrap();
        there.begin("other", "v").unwrap();
        fs::write(root.path().join("partial/other/0.done"), "0\n").unwrap();
        let again = Cache::open(root.path().to_owned()).unwrap();
        assert!(again.record("k").is_some() && !again.begun("k"));
        assert!(again.begun("other"), "a fetch that was cut off is resumed");
    }

    #[tokio::test]
    async fn what_this_boot_left_unsettled_is_shown_and_settled() {
        let root = tempfile::tempdir().unwrap();
        let boot = boot_id().unwrap();
        cache(root.path(), Some(&boot));
        let again = Cache::open(root.path().to_owned()).unwrap();
        assert_eq!(again.unsettled(), ["k"]);
        settle_rest(again.clone(), Room::open(again.clone(), None));
        while !again.unsettled().is_empty() {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
        let name = content::by_blake3(&blake3::hash(b"content").to_hex());
        assert_eq!(again.record("k").unwrap().blobs, [name.as_str()]);
        assert!(again.blob(&name).exists() && !again.blob(&content::unnamed("k", 0)).exists());
        assert_eq!(fs::read_to_string(again.files("k").join("m")).unwrap(), "content");
        again.remove_tree("k").unwrap();
        again.settle("k").unwrap();
    }

    #[tokio::test]
    async fn what_the_disk_refuses_is_shown_no_more() {
        let root = tempfile::tempdir().unwrap();
        let cache = cache(root.path(), boot_id().as_deref());
        let room = Room::open(cache.clone(), None);
        assert_eq!(room.report().borrow().models.len(), 1);
        settle(cache.clone(), room.clone(), "k".to_owned(), Syncing::refused()).await;
        assert!(room.report().borrow().models.is_empty() && cache.record("k").is_none());
    }

    #[test]
    fn what_is_settled_outlives_every_boot() {
        let root = tempfile::tempdir().unwrap();
        assert!(cache(root.path(), None).unsettled().is_empty());
        assert!(Cache::open(root.path().to_owned()).unwrap().record("k").is_some());
    }
}
