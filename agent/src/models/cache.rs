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
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{self, Write as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::SystemTime,
};

use serde::{Deserialize, Serialize};

use super::{content, plan::Object, settle};

/// Name of the file with a model's address beside what came of it.
const ORIGIN: &str = "uri";
/// Ending of the name of a file with another node's word for a content.
const TOLD: &str = "told";
/// Name of the folder that becomes the model's.
const STAGED: &str = "tree";

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

    /// Blobs that no model lists or links to, and staged folders; data of cut-off fetches stays, to be resumed.
    fn sweep(&self) -> io::Result<()> {
        for partial in fs::read_dir(self.root.join("partial"))? {
            match fs::remove_dir_all(partial?.path().join(STAGED)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
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
        let text = fs::read(self.root.join("trees").join(key).join("tree.json")).ok()?;
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

    fn partial(&self, key: &str) -> PathBuf {
        self.root.join("partial").join(key)
    }

    /// Opens file `number` of a model that is being fetched, with the ranges that are there already.
    ///
    /// # Errors
    /// The disk refuses.
    pub fn part(&self, key: &str, number: usize, size: u64) -> io::Result<Part> {
        let directory = self.partial(key);
        fs::create_dir_all(&directory)?;
        let path = directory.join(format!("{number}.data"));
        let journal = directory.join(format!("{number}.done"));
        let data = File::options().create(true).truncate(false).read(true).write(true).open(&path)?;
        let told = fs::read_to_string(path.with_extension(TOLD)).ok();
        // What may have come from another node cannot be compared without a name.
        let told_wrong = told.as_deref().is_some_and(|name| content::parse(name).is_none());
        let vouched = !told_wrong && data.metadata()?.len() == size;
        let done = if vouched { read_journal(&journal, self.boot())? } else { BTreeSet::new() };
        if done.is_empty() {
            // What the journal does not vouch for is not there.
            File::create(&journal)?;
            data.set_len(size)?;
        }
        if told_wrong {
            fs::remove_file(path.with_extension(TOLD))?;
        }
        let journal = File::options().append(true).open(&journal)?;
        Ok(Part { path, data, journal, done, told: told.filter(|_| !told_wrong), boot: self.boot.clone() })
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
        match fs::remove_dir_all(if boot.is_some() { &files } else { &staged }) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
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
        fs::write(staged.join("tree.json"), serde_json::to_vec(record)?)?;
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

    /// Gives contents of a whole model their own names, by those that they had until now, and gives its new record;
    /// `None` where the model is not here any more. One that is here already by its name serves this model, too.
    /// What a crash leaves is removed by [`Self::open`].
    ///
    /// # Errors
    /// The disk refuses: the names are as they were.
    pub fn rename(&self, key: &str, names: &BTreeMap<String, String>) -> io::Result<Option<TreeRecord>> {
        let Some(mut record) = self.record(key) else { return Ok(None) };
        let mut made = Vec::new();
        let renamed = self.link(key, &mut record, names, &mut made).and_then(|()| self.replace_record(key, &record));
        let stale = if renamed.is_ok() { names.keys().map(|name| self.blob(name)).collect() } else { made };
        for blob in stale {
            // One that stays costs room until the cache is opened again.
            let _ = fs::remove_file(blob);
        }
        renamed.map(|()| Some(record))
    }

    /// Makes what [`Self::rename`] needs beside what is there, and notes which links are new.
    fn link(
        &self,
        key: &str,
        record: &mut TreeRecord,
        names: &BTreeMap<String, String>,
        made: &mut Vec<PathBuf>,
    ) -> io::Result<()> {
        for (object, blob) in record.objects.iter().zip(&mut record.blobs) {
            let Some(name) = names.get(blob) else { continue };
            let shared = self.blob(name);
            let file = self.files(key).join(&object.path);
            match fs::hard_link(&file, &shared) {
                Ok(()) => made.push(shared),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    // Of two links of one file a rename would leave both.
                    if fs::metadata(&file)?.ino() != fs::metadata(&shared)?.ino() {
                        let link = self.tree(key).join("link");
                        // A crash may have left it.
                        let _ = fs::remove_file(&link);
                        fs::hard_link(&shared, &link)?;
                        fs::rename(link, file)?;
                    }
                }
                Err(error) => return Err(error),
            }
            blob.clone_from(name);
        }
        Ok(())
    }

    /// Writes a model's record anew; when the model was last used stays.
    fn replace_record(&self, key: &str, record: &TreeRecord) -> io::Result<()> {
        let (place, new) = (self.tree(key).join("tree.json"), self.tree(key).join("tree.json.new"));
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
        let noted = fs::metadata(self.tree(key).join("tree.json")).and_then(|file| file.modified());
        noted.unwrap_or(SystemTime::UNIX_EPOCH)
    }

    /// Notes when a whole model was used: as the time of its `tree.json`.
    ///
    /// # Errors
    /// The disk refuses.
    pub fn touch(&self, key: &str, now: SystemTime) -> io::Result<()> {
        File::options().append(true).open(self.tree(key).join("tree.json"))?.set_modified(now)
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

/// A file that is being fetched.
#[derive(Debug)]
pub struct Part {
    /// Where it is.
    pub path: PathBuf,
    /// Of full length from the start, with holes.
    pub data: File,
    journal: File,
    /// Starts of the ranges that are on disk, or written in this boot of the machine.
    pub done: BTreeSet<u64>,
    /// The name that another node gave, as it was noted when the file was opened, where bytes may have come from there.
    pub told: Option<String>,
    boot: Option<String>,
}

impl Part {
    /// Notes that a range is written: what the machine's memory has, this process's end does not take away.
    ///
    /// # Errors
    /// The disk refuses.
    pub fn came(&self, start: u64) -> io::Result<()> {
        let Some(boot) = &self.boot else { return Ok(()) };
        (&self.journal).write_all(format!("{start} {boot}\n").as_bytes())
    }

    /// Notes that ranges are on disk. Their data is synced first, so that the journal never says too much.
    ///
    /// # Errors
    /// The disk refuses.
    pub fn note(&self, starts: &[u64]) -> io::Result<()> {
        self.data.sync_data()?;
        // A line that a crash cuts short is without its end, and does not count.
        let lines: String = starts.iter().map(|start| format!("{start}\n")).collect();
        (&self.journal).write_all(lines.as_bytes())
    }

    /// Notes what [`Self::told`] will be when it is opened again, before any such byte counts as being there.
    ///
    /// # Errors
    /// The disk refuses.
    pub fn tell(&self, name: &str) -> io::Result<()> {
        write_synced(&self.path.with_extension(TOLD), name)
    }

    /// Forgets all that came of a file.
    ///
    /// # Errors
    /// The disk refuses.
    pub fn reset(&self) -> io::Result<()> {
        // In this order: the journal must not vouch for what no one told.
        fs::remove_file(self.path.with_extension("done"))?;
        match fs::remove_file(self.path.with_extension(TOLD)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
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
    File::open(folder.join("tree.json"))?.sync_all()?;
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

/// Starts of ranges that are on disk, and of those that this boot has in memory.
fn read_journal(path: &Path, boot: Option<&str>) -> io::Result<BTreeSet<u64>> {
    let text = match fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeSet::new()),
        read => read?,
    };
    // A line without its end may be cut short.
    let lines = text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n'));
    let starts = lines.filter_map(|line| match line.split_once(' ') {
        Some((start, of)) => boot.filter(|boot| *boot == of).and(start.parse().ok()),
        None => line.parse().ok(),
    });
    Ok(starts.collect())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const OLD: SystemTime = SystemTime::UNIX_EPOCH;

    fn object(path: &str) -> Object {
        Object { path: path.into(), location: path.into(), size: 4, etag: None, sha256: None, md5: None }
    }

    /// A model whose files have these contents, all without names yet, and the names that they get.
    fn unnamed(cache: &Cache, key: &str, files: &[(&str, &str, &str)]) -> BTreeMap<String, String> {
        let blobs: Vec<_> = (0..files.len()).map(|number| content::unnamed(key, number)).collect();
        for (blob, (_, text, _)) in blobs.iter().zip(files) {
            fs::write(cache.blob(blob), text).unwrap();
        }
        let objects = files.iter().map(|(path, ..)| object(path)).collect();
        let record = TreeRecord { uri: "u".into(), objects, blobs: blobs.clone() };
        cache.begin(key, "u").unwrap();
        cache.publish(key, &record, None).unwrap();
        cache.touch(key, OLD + Duration::from_secs(7)).unwrap();
        blobs.into_iter().zip(files.iter().map(|(_, _, name)| (*name).to_owned())).collect()
    }

    fn names(cache: &Cache) -> BTreeSet<String> {
        let blobs = fs::read_dir(cache.root.join("blobs")).unwrap();
        blobs.map(|blob| blob.unwrap().file_name().into_string().unwrap()).collect()
    }

    fn inode(path: PathBuf) -> u64 {
        fs::metadata(path).unwrap().ino()
    }

    fn set(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn contents_get_their_names_and_are_there_once() {
        let root = tempfile::tempdir().unwrap();
        let cache = Cache::open(root.path().to_owned()).unwrap();
        let same = unnamed(&cache, "k", &[("a", "same", "S"), ("b/c", "same", "S"), ("d", "else", "E")]);
        let record = cache.rename("k", &same).unwrap().unwrap();
        assert_eq!((record.blobs, names(&cache)), (["S", "S", "E"].map(String::from).to_vec(), set(&["S", "E"])));
        assert_eq!(cache.last_used("k"), OLD + Duration::from_secs(7), "it was not used");

        let other = unnamed(&cache, "other", &[("m", "same", "S")]);
        cache.rename("other", &other).unwrap().unwrap();
        let shared = inode(cache.blob("S"));
        let files = [("k", "a"), ("k", "b/c"), ("other", "m")].map(|(key, path)| cache.files(key).join(path));
        assert_eq!(files.map(inode), [shared; 3]);
        assert_eq!(fs::read_to_string(cache.files("k").join("d")).unwrap(), "else");
        cache.remove_tree("other").unwrap();
        assert!(cache.rename("other", &other).unwrap().is_none());
        let again = Cache::open(root.path().to_owned()).unwrap();
        assert_eq!((names(&again), again.trees().len()), (set(&["S", "E"]), 1));
    }

    #[test]
    fn a_name_that_cannot_be_given_changes_nothing() {
        let root = tempfile::tempdir().unwrap();
        let cache = Cache::open(root.path().to_owned()).unwrap();
        let mut to = unnamed(&cache, "k", &[("a", "text", "A"), ("b", "more", "B")]);
        *to.get_mut(&content::unnamed("k", 1)).unwrap() = "no folder/B".to_owned();
        let before = (names(&cache), cache.record("k").unwrap().blobs);
        cache.rename("k", &to).unwrap_err();
        assert_eq!((names(&cache), cache.record("k").unwrap().blobs), before);
    }

    #[test]
    fn a_crash_in_the_middle_of_it_leaves_nothing() {
        let root = tempfile::tempdir().unwrap();
        let cache = Cache::open(root.path().to_owned()).unwrap();
        let to = unnamed(&cache, "k", &[("a", "text", "A")]);
        let called = content::unnamed("k", 0);
        // Linked, and not noted yet.
        fs::hard_link(cache.blob(&called), cache.blob("A")).unwrap();
        let again = Cache::open(root.path().to_owned()).unwrap();
        assert_eq!(names(&again), set(&[&called]), "what nobody lists would stay when the model goes");
        again.rename("k", &to).unwrap();
        assert_eq!((names(&again), again.record("k").unwrap().blobs), (set(&["A"]), vec!["A".to_owned()]));
        // Noted, and still there by its former name.
        fs::hard_link(again.blob("A"), again.blob(&called)).unwrap();
        let again = Cache::open(root.path().to_owned()).unwrap();
        assert_eq!(names(&again), set(&["A"]));
        // The same, and its model is gone.
        fs::hard_link(again.blob("A"), again.blob(&called)).unwrap();
        again.remove_tree("k").unwrap();
        assert_eq!(names(&Cache::open(root.path().to_owned()).unwrap()), set(&[]));
    }

    #[test]
    fn a_crash_while_two_become_one_is_made_good() {
        let root = tempfile::tempdir().unwrap();
        let cache = Cache::open(root.path().to_owned()).unwrap();
        let named = unnamed(&cache, "first", &[("m", "same", "S")]);
        cache.rename("first", &named).unwrap();
        let to = unnamed(&cache, "k", &[("a", "same", "S"), ("b", "more", "B")]);
        // One file is the other model's already, and nothing is noted; a link for the next one is there.
        fs::remove_file(cache.files("k").join("a")).unwrap();
        fs::hard_link(cache.blob("S"), cache.files("k").join("a")).unwrap();
        fs::write(cache.tree("k").join("link"), "left").unwrap();
        let again = Cache::open(root.path().to_owned()).unwrap();
        // As it is, the model can go: what is not there takes no room.
        assert_eq!(again.drop_unused(&content::unnamed("k", 0)).unwrap(), 0);
        let record = again.rename("k", &to).unwrap().unwrap();
        assert_eq!((record.blobs, names(&again)), (vec!["S".to_owned(), "B".to_owned()], set(&["S", "B"])));
        assert_eq!(inode(again.files("k").join("a")), inode(again.blob("S")));
        assert_eq!(fs::read_to_string(again.files("k").join("b")).unwrap(), "more");
    }
}
