//! Models on this node's disk: blobs by content, a folder of hard links per model, and what a fetch that
//! was cut off has left.
//!
//! ```text
//! blobs/<name>              each content once, by its SHA-256 or `blake3-` and its BLAKE3; `unnamed-<fetch>-<n>` while
//!                           that is not computed yet
//! trees/<key>/files/…       a whole model; appears by one rename
//! trees/<key>/tree.json     what it is; its time of change is when it was last used
//! trees/<key>/unsettled     until all of it is on the disk: the boot of the machine that has it in memory
//! trees/<key>/pinned        where an operator keeps it: it is not removed
//! partial/<key>/uri         which model is being fetched
//! partial/<key>/tree        what will be trees/<key>
//! partial/<key>/<n>.data    file n of a model that is being fetched
//! partial/<key>/<n>.done    starts of its ranges that are there, one a line; with the machine's boot: in its memory
//! partial/<key>/<n>.told    its name by another node's word, where bytes may have come from one
//! ```

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{self, Write as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::SystemTime,
};

use serde::{Deserialize, Serialize};

use super::{plan::Object, settle};

/// Name of the file with a model's address beside what came of it.
const ORIGIN: &str = "uri";
/// Name of the folder that becomes the model's.
const STAGED: &str = "tree";
/// Name of the file with what a model is, in its folder.
const RECORD: &str = "tree.json";

/// What lies in a model's folder.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TreeRecord {
    /// Where it came from.
    pub uri: String,
    /// As listed when it was fetched.
    pub objects: Vec<Object>,
    /// Name of each content, in the same order.
    pub blobs: Vec<String>,
}

impl TreeRecord {
    /// Bytes of all files.
    pub fn bytes(&self) -> u64 {
        self.objects.iter().map(|object| object.size).sum()
    }
}

/// The folders on disk.
#[derive(Debug, Clone)]
pub struct Cache {
    root: PathBuf,
    /// This boot of the machine, where the kernel says.
    boot: Option<String>,
}

impl Cache {
    /// Opens the cache below `root`, made where missing, and removes what a crash left between two steps.
    ///
    /// # Errors
    /// The folders cannot be made or read.
    pub fn open(root: PathBuf) -> io::Result<Self> {
        for name in ["blobs", "trees", "partial"] {
            fs::create_dir_all(root.join(name))?;
        }
        let cache = Self { root, boot: settle::boot_id() };
        cache.drop_unsettled(cache.boot())?;
        cache.sweep()?;
        Ok(cache)
    }

    /// Removes blobs that no model lists or links to, staged folders, and what is left of fetches whose model is
    /// published. Data of cut-off fetches stays, to be resumed.
    fn sweep(&self) -> io::Result<()> {
        for partial in fs::read_dir(self.root.join("partial"))? {
            let partial = partial?;
            let is_published = self.root.join("trees").join(partial.file_name()).exists();
            let left = if is_published { partial.path() } else { partial.path().join(STAGED) };
            unless_missing(fs::remove_dir_all(left))?;
        }
        let listed: BTreeSet<String> = self.trees().into_iter().flat_map(|(_, record)| record.blobs).collect();
        for blob in fs::read_dir(self.root.join("blobs"))? {
            let blob = blob?;
            let is_listed = blob.file_name().to_str().is_some_and(|name| listed.contains(name));
            if !is_listed || blob.metadata()?.nlink() == 1 {
                fs::remove_file(blob.path())?;
            }
        }
        Ok(())
    }

    /// This boot of the machine; `None` where there is no telling boots apart.
    pub(super) fn boot(&self) -> Option<&str> {
        self.boot.as_deref()
    }

    /// As on a machine that does not tell its boots apart.
    #[cfg(test)]
    pub(super) fn without_boot(self) -> Self {
        Self { boot: None, ..self }
    }

    /// Where a model's files are, once it is whole.
    pub fn files(&self, key: &str) -> PathBuf {
        self.root.join("trees").join(key).join("files")
    }

    /// What is known of a whole model; `None` where it is not here.
    pub fn record(&self, key: &str) -> Option<TreeRecord> {
        let text = fs::read(self.record_file(key)).ok()?;
        serde_json::from_slice(&text).ok()
    }

    /// All whole models, by key.
    pub fn trees(&self) -> Vec<(String, TreeRecord)> {
        self.keys().filter_map(|key| self.record(&key).map(|record| (key, record))).collect()
    }

    /// Keys of all that is shown.
    pub(super) fn keys(&self) -> impl Iterator<Item = String> {
        let entries = fs::read_dir(self.root.join("trees")).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().into_string().ok())
    }

    /// Bytes that are free on the disk for this process.
    ///
    /// # Errors
    /// The disk does not say.
    pub fn free(&self) -> io::Result<u64> {
        let disk = nix::sys::statvfs::statvfs(&self.root)?;
        Ok(disk.blocks_available().saturating_mul(disk.fragment_size()))
    }

    /// Where a blob is, or would be.
    pub fn blob(&self, name: &str) -> PathBuf {
        self.root.join("blobs").join(name)
    }

    pub(super) fn tree(&self, key: &str) -> PathBuf {
        self.root.join("trees").join(key)
    }

    fn record_file(&self, key: &str) -> PathBuf {
        self.tree(key).join(RECORD)
    }

    pub(super) fn partial(&self, key: &str) -> PathBuf {
        self.root.join("partial").join(key)
    }

    /// Where file `number` of an archive is unpacked to, before it is taken in.
    pub fn unpacked(&self, key: &str, number: usize) -> PathBuf {
        self.partial(key).join(format!("{number}.unpacked"))
    }

    /// Takes in a finished file under its content's name, or what that is called until it has one. A blob that is there
    /// already is kept, and the new copy goes.
    ///
    /// # Errors
    /// The disk refuses.
    pub fn adopt(&self, path: &Path, name: &str) -> io::Result<()> {
        let blob = self.blob(name);
        if blob.exists() { fs::remove_file(path) } else { fs::rename(path, blob) }
    }

    /// Removes a blob that no model links to; bytes that the disk has back.
    ///
    /// # Errors
    /// The disk refuses.
    pub fn drop_unused(&self, name: &str) -> io::Result<u64> {
        let blob = self.blob(name);
        let about = match fs::metadata(&blob) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
            about => about?,
        };
        if about.nlink() > 1 {
            return Ok(0);
        }
        fs::remove_file(blob)?;
        Ok(about.len())
    }

    /// The folder that becomes a model's.
    pub(super) fn staged(&self, key: &str) -> PathBuf {
        self.partial(key).join(STAGED)
    }

    /// Makes a model visible, whole: a folder of links is staged, synced, and renamed into place. With `boot`
    /// nothing is synced: neither what the links lead to nor they are on the disk yet ([`super::settle`]).
    ///
    /// # Errors
    /// The disk refuses, or a blob is not there.
    pub fn publish(&self, key: &str, record: &TreeRecord, boot: Option<&str>) -> io::Result<PathBuf> {
        let staged = self.staged(key);
        let files = staged.join("files");
        unless_missing(fs::remove_dir_all(if boot.is_some() { &files } else { &staged }))?;
        if let Some(boot) = boot {
            settle::mark(&staged, boot)?;
        }
        fs::create_dir_all(&files)?;
        for (object, blob) in record.objects.iter().zip(&record.blobs) {
            let link = files.join(&object.path);
            if let Some(parent) = link.parent() {
                fs::create_dir_all(parent)?;
            }
            fs::hard_link(self.blob(blob), link)?;
        }
        fs::write(staged.join(RECORD), serde_json::to_vec(record)?)?;
        if boot.is_none() {
            sync_below(&staged)?;
        }
        let tree = self.tree(key);
        if !tree.exists() {
            fs::rename(&staged, &tree)?;
            if boot.is_none() {
                File::open(self.root.join("trees"))?.sync_all()?;
            }
        }
        fs::remove_dir_all(self.partial(key))?;
        Ok(self.files(key))
    }

    /// Writes a whole model's record anew; when the model was last used stays.
    pub(super) fn replace_record(&self, key: &str, record: &TreeRecord) -> io::Result<()> {
        let place = self.record_file(key);
        let new = place.with_extension("json.new");
        fs::write(&new, serde_json::to_vec(record)?)?;
        File::options().append(true).open(&new)?.set_modified(self.last_used(key))?;
        fs::rename(new, place)
    }

    /// Has a model's folder, its place among all, and its contents' names on the disk.
    pub(super) fn sync_tree(&self, key: &str) -> io::Result<()> {
        sync_below(&self.tree(key))?;
        ["trees", "blobs"].iter().try_for_each(|name| File::open(self.root.join(name))?.sync_all())
    }

    /// When a whole model was last used, as noted by [`Self::touch`].
    pub fn last_used(&self, key: &str) -> SystemTime {
        let noted = fs::metadata(self.record_file(key)).and_then(|file| file.modified());
        noted.unwrap_or(SystemTime::UNIX_EPOCH)
    }

    /// Notes when a whole model was used: as the time of its `tree.json`.
    ///
    /// # Errors
    /// The disk refuses.
    pub fn touch(&self, key: &str, now: SystemTime) -> io::Result<()> {
        File::options().append(true).open(self.record_file(key))?.set_modified(now)
    }

    /// True where an operator keeps the model: by a file `pinned` beside its `tree.json`.
    pub fn pinned(&self, key: &str) -> bool {
        self.tree(key).join("pinned").exists()
    }

    /// Makes or removes that file.
    ///
    /// # Errors
    /// The disk refuses.
    pub fn pin(&self, key: &str, pinned: bool) -> io::Result<()> {
        let mark = self.tree(key).join("pinned");
        match (pinned, mark.exists()) {
            (true, false) => File::create(mark)?.sync_all(),
            (false, true) => fs::remove_file(mark),
            _ => Ok(()),
        }
    }

    /// Notes which model it is that is about to be fetched.
    ///
    /// # Errors
    /// The disk refuses.
    pub fn begin(&self, key: &str, uri: &str) -> io::Result<()> {
        let directory = self.partial(key);
        fs::create_dir_all(&directory)?;
        fs::write(directory.join(ORIGIN), uri)
    }

    /// True where there is something of a model that is not whole.
    pub fn begun(&self, key: &str) -> bool {
        self.partial(key).exists()
    }

    /// Forgets a fetch of which nothing has come.
    pub fn tidy(&self, key: &str) {
        let directory = self.partial(key);
        let Ok(entries) = fs::read_dir(&directory) else { return };
        if !entries.flatten().any(|entry| has_come(&entry)) {
            // What cannot be removed now is when the next fetch of it ends.
            let _ = fs::remove_dir_all(directory);
        }
    }

    /// Removes a whole model; its blobs stay, see [`Self::drop_unused`]. Processes that have its files
    /// open keep them.
    ///
    /// # Errors
    /// The disk refuses.
    pub fn remove_tree(&self, key: &str) -> io::Result<()> {
        // Out of sight by one step first: a crash must not leave half a model.
        let aside = self.partial(key);
        fs::create_dir_all(&aside)?;
        fs::rename(self.tree(key), aside.join("tree"))?;
        fs::remove_dir_all(aside)
    }

    /// What fetches have left that did not end, or have not ended yet.
    pub fn partials(&self) -> Vec<Partial> {
        let Ok(entries) = fs::read_dir(self.root.join("partial")) else { return Vec::new() };
        let of = |entry: fs::DirEntry| {
            let files = fs::read_dir(entry.path()).ok()?.flatten();
            let files = files.filter(has_come).filter_map(|file| file.metadata().ok());
            let (mut bytes, mut changed) = (0, SystemTime::UNIX_EPOCH);
            for file in files {
                // Files have holes: what counts is what the disk has given.
                bytes += file.blocks() * 512;
                changed = changed.max(file.modified().unwrap_or(SystemTime::UNIX_EPOCH));
            }
            let uri = fs::read_to_string(entry.path().join(ORIGIN)).ok();
            Some(Partial { key: entry.file_name().into_string().ok()?, uri, bytes, changed })
        };
        entries.flatten().filter_map(of).collect()
    }

    /// Forgets what was fetched of a model that turned out wrong.
    pub fn discard(&self, key: &str) {
        // What cannot be removed now is checked again before it is used.
        let _ = fs::remove_dir_all(self.partial(key));
    }
}

/// True for what a fetch has brought, beside its own notes.
fn has_come(entry: &fs::DirEntry) -> bool {
    entry.file_name() != ORIGIN && entry.file_name() != STAGED
}

/// What is there of a model that is not whole.
#[derive(Debug)]
pub struct Partial {
    /// Of the model.
    pub key: String,
    /// Its address, where it was noted.
    pub uri: Option<String>,
    /// Bytes on disk.
    pub bytes: u64,
    /// When something of it last came.
    pub changed: SystemTime,
}

/// What removing came to, where what is not there need not be removed.
pub(super) fn unless_missing(removed: io::Result<()>) -> io::Result<()> {
    removed.or_else(|error| if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) })
}

/// Writes a file, and has it and its place in its folder on the disk.
pub(super) fn write_synced(path: &Path, text: &str) -> io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    path.parent().map_or(Ok(()), |directory| File::open(directory)?.sync_all())
}

/// Syncs a model's folder, the folders in it, and its record.
fn sync_below(folder: &Path) -> io::Result<()> {
    File::open(folder.join(RECORD))?.sync_all()?;
    let mut open = vec![folder.to_owned()];
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(&folder)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                open.push(entry.path());
            }
        }
        File::open(folder)?.sync_all()?;
    }
    Ok(())
}
