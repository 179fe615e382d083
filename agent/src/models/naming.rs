//! Contents of a shown model get their own names, once these are computed.

use std::{collections::BTreeMap, fs, io, os::unix::fs::MetadataExt as _, path::PathBuf};

use super::{
    cache::{Cache, TreeRecord},
    content, hashing,
};

impl Cache {
    /// The names that contents of a model get which have none of their own yet, by what they are called. Reads them.
    pub(super) fn names(&self, key: &str) -> io::Result<BTreeMap<String, String>> {
        let Some(record) = self.record(key) else { return Ok(BTreeMap::new()) };
        let of = record.objects.iter().zip(record.blobs).filter(|(_, blob)| content::is_unnamed(blob));
        // By their files: of a blob a crash may have left no more than these.
        let (files, unnamed): (Vec<_>, Vec<_>) =
            of.map(|(object, blob)| (self.files(key).join(&object.path), blob)).unzip();
        match hashing::names(&files) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && self.record(key).is_none() => Ok(BTreeMap::new()),
            named => Ok(unnamed.into_iter().zip(named?).collect()),
        }
    }

    /// Gives contents of a whole model their own names, by those that they had until now, and gives its new record;
    /// `None` where the model is not here any more. One that is here already by its name serves this model, too.
    /// What a crash leaves is removed by [`Self::open`].
    ///
    /// # Errors
    /// The disk refuses: the names are as they were.
    pub(super) fn rename(&self, key: &str, names: &BTreeMap<String, String>) -> io::Result<Option<TreeRecord>> {
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
}

#[cfg(test)]
mod tests {
    use std::{
        collections::BTreeSet,
        time::{Duration, SystemTime},
    };

    use super::*;
    use crate::models::plan::Object;

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
        let blobs = fs::read_dir(cache.blob("")).unwrap();
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
