//! Weights in the page cache: read ahead of need, within a budget, and measured, since the kernel may drop
//! any page at any time.

use std::{
    collections::{BTreeMap, HashSet},
    fs::{self, File},
    io::{self, Read as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use procfs::Current as _;
use tokio_util::sync::CancellationToken;

/// How much is read at once.
const CHUNK: usize = 1 << 20;
/// Bytes of one piece that is read ahead.
const PIECE: i64 = 8 << 20;
/// Pieces that are asked for at once: disks give more to several.
const AT_ONCE: usize = 4;

/// How much of a folder is in the page cache.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Residency {
    /// Bytes in the page cache.
    pub resident: u64,
    /// Bytes of all files.
    pub total: u64,
}

impl Residency {
    /// True where every page is there.
    pub fn whole(&self) -> bool {
        self.resident == self.total
    }
}

/// What staging came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Staged {
    /// Measured afterwards: less than whole where memory was short.
    pub residency: Residency,
    /// How long it took.
    pub took: Duration,
}

/// Why a folder is not staged.
#[derive(Debug, thiserror::Error)]
pub enum StageError {
    /// It would be past the budget.
    #[error("{}: {total} bytes are more than the {free} bytes left of the page cache's budget of {budget}", folder.display())]
    PastBudget {
        /// The folder.
        folder: PathBuf,
        /// Its bytes.
        total: u64,
        /// What is left.
        free: u64,
        /// The budget.
        budget: u64,
    },
    /// A file cannot be read.
    #[error("{}: {error}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// The reading task ended without a result.
    #[error("staging was cut off")]
    CutOff,
}

impl StageError {
    fn file(path: &Path, error: impl Into<io::Error>) -> Self {
        Self::File { path: path.to_owned(), error: error.into() }
    }
}

/// The part of main memory in which model folders are kept.
#[derive(Debug)]
pub struct PageCache {
    budget: u64,
    /// Bytes of each folder that is staged, or being staged.
    staged: Mutex<BTreeMap<PathBuf, u64>>,
}

impl PageCache {
    /// A page cache of which staged folders may fill this many bytes.
    pub fn new(budget: u64) -> Self {
        Self { budget, staged: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<PathBuf, u64>> {
        self.staged.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Folders that are staged or being staged, with their bytes.
    pub fn staged(&self) -> BTreeMap<PathBuf, u64> {
        self.lock().clone()
    }

    /// Reads a model's files into the page cache, and measures what is there then. Dropping the future
    /// stops the reading and gives the budget back.
    ///
    /// # Errors
    /// The budget does not suffice (nothing is read then), or a file cannot be read.
    pub async fn stage(self: &Arc<Self>, folder: &Path) -> Result<Staged, StageError> {
        let began = Instant::now();
        let path = folder.to_owned();
        let files = blocking(move || model_files(&path)).await?;
        let mut reservation = self.reserve(folder, files.iter().map(|file| file.bytes).sum())?;
        let stop = CancellationToken::new();
        let _stop_when_dropped = stop.clone().drop_guard();
        let residency = blocking(move || {
            for file in &files {
                read(&file.path, &stop)?;
            }
            measure(&files)
        })
        .await?;
        reservation.keep = true;
        Ok(Staged { residency, took: began.elapsed() })
    }

    /// Lets go of a folder's pages. Those that another process has mapped stay until it ends.
    ///
    /// # Errors
    /// A file cannot be opened. The budget is given back all the same.
    pub async fn unstage(&self, folder: &Path) -> Result<Residency, StageError> {
        self.lock().remove(folder);
        let folder = folder.to_owned();
        blocking(move || {
            let files = model_files(&folder)?;
            for file in &files {
                let opened = File::open(&file.path).map_err(|error| StageError::file(&file.path, error))?;
                // Pages that are not yet on disk cannot be let go of.
                opened.sync_data().map_err(|error| StageError::file(&file.path, error))?;
                posix_fadvise(&opened, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)
                    .map_err(|error| StageError::file(&file.path, error))?;
            }
            measure(&files)
        })
        .await
    }

    fn reserve(self: &Arc<Self>, folder: &Path, total: u64) -> Result<Reservation, StageError> {
        let mut staged = self.lock();
        let others = staged.iter().filter(|(path, _)| path.as_path() != folder).map(|(_, bytes)| bytes).sum();
        let free = self.budget.saturating_sub(others);
        if total > free {
            return Err(StageError::PastBudget { folder: folder.to_owned(), total, free, budget: self.budget });
        }
        // One that is staged already stays so, whatever becomes of staging it again.
        let keep = staged.insert(folder.to_owned(), total).is_some();
        Ok(Reservation { cache: Arc::clone(self), folder: folder.to_owned(), keep })
    }
}

/// A folder's part of the budget; given back when dropped, unless it is to be kept.
struct Reservation {
    cache: Arc<PageCache>,
    folder: PathBuf,
    keep: bool,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if !self.keep {
            self.cache.lock().remove(&self.folder);
        }
    }
}

/// How much of a folder is in the page cache now.
///
/// # Errors
/// A file cannot be read.
pub async fn residency(folder: &Path) -> Result<Residency, StageError> {
    let folder = folder.to_owned();
    blocking(move || measure(&model_files(&folder)?)).await
}

/// True where every page of a folder is in the page cache now. Looks no further than the first file of which
/// that is not true.
///
/// # Errors
/// A file cannot be read.
pub async fn is_resident(folder: &Path) -> Result<bool, StageError> {
    let folder = folder.to_owned();
    blocking(move || {
        for file in model_files(&folder)? {
            if !measure(&[file])?.whole() {
                return Ok(false);
            }
        }
        Ok(true)
    })
    .await
}

/// Asks the kernel to read a folder's files into the page cache, in order, several pieces at a time; whoever
/// reads them soon finds them there. Ends once all is asked for, or with `stop`. Nothing is read of a folder that
/// would take more than half of the memory that is available.
///
/// # Errors
/// A file cannot be opened, or memory not be looked at.
pub async fn read_ahead(folder: &Path, stop: CancellationToken) -> Result<(), StageError> {
    let folder = folder.to_owned();
    blocking(move || {
        let files = model_files(&folder)?;
        let memory = procfs::Meminfo::current().map_err(|error| StageError::file(&folder, io::Error::other(error)))?;
        if files.iter().map(|file| file.bytes).sum::<u64>() > memory.mem_available.unwrap_or(0) / 2 {
            return Ok(());
        }
        let open = |file: &ModelFile| File::open(&file.path).map_err(|error| StageError::file(&file.path, error));
        let opened = files.iter().map(open).collect::<Result<Vec<_>, _>>()?;
        let pieces = files.iter().zip(&opened).flat_map(|(about, file)| {
            let starts = (0..about.bytes).step_by(PIECE as usize);
            starts.map(move |start| (file, start))
        });
        let pieces = Mutex::new(pieces);
        let next = || pieces.lock().unwrap_or_else(PoisonError::into_inner).next();
        thread::scope(|scope| {
            for _ in 0..AT_ONCE {
                scope.spawn(|| {
                    while let Some((file, start)) = next().filter(|_| !stop.is_cancelled()) {
                        // Advice: what the kernel does not take is read when it is needed.
                        let _ = posix_fadvise(file, start as i64, PIECE, PosixFadviseAdvice::POSIX_FADV_WILLNEED);
                    }
                });
            }
        });
        Ok(())
    })
    .await
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StageError> + Send + 'static,
) -> Result<T, StageError> {
    tokio::task::spawn_blocking(work).await.unwrap_or(Err(StageError::CutOff))
}

struct ModelFile {
    path: PathBuf,
    bytes: u64,
}

/// All regular files of a folder that are not empty, in order of name. Links to files are followed, as hubs
/// keep a model's files elsewhere under their hashes; a file that is linked twice counts once. Links to
/// folders are not: they may lead in circles.
fn model_files(folder: &Path) -> Result<Vec<ModelFile>, StageError> {
    let mut open = vec![folder.to_owned()];
    let mut seen = HashSet::new();
    let mut files = Vec::new();
    while let Some(folder) = open.pop() {
        let entries = fs::read_dir(&folder).map_err(|error| StageError::file(&folder, error))?;
        for entry in entries {
            let entry = entry.map_err(|error| StageError::file(&folder, error))?;
            let path = entry.path();
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                open.push(path);
                continue;
            }
            let about = fs::metadata(&path).map_err(|error| StageError::file(&path, error))?;
            if about.is_file() && about.len() > 0 && seen.insert((about.dev(), about.ino())) {
                files.push(ModelFile { path, bytes: about.len() });
            }
        }
    }
    files.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(files)
}

/// Reads a file through, so that its pages are there afterwards.
fn read(path: &Path, stop: &CancellationToken) -> Result<(), StageError> {
    let failed = |error: io::Error| StageError::file(path, error);
    let mut file = File::open(path).map_err(failed)?;
    // The kernel reads ahead of us, as far as it likes.
    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_WILLNEED).map_err(|error| failed(error.into()))?;
    let mut buffer = vec![0; CHUNK];
    while !stop.is_cancelled() {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(failed(error)),
        }
    }
    Err(StageError::CutOff)
}

fn measure(files: &[ModelFile]) -> Result<Residency, StageError> {
    let page = mincore::page_size() as u64;
    let mut sum = Residency::default();
    for ModelFile { path, bytes } in files {
        let file = File::open(path).map_err(|error| StageError::file(path, error))?;
        let pages = mincore::mincore_wrapper(&file)
            .map_err(|error| StageError::file(path, io::Error::from_raw_os_error(error.raw_os_error())))?;
        let resident = pages.iter().filter(|there| **there).count() as u64 * page;
        sum.total += bytes;
        // The last page is rarely full.
        sum.resident += resident.min(*bytes);
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// A model on a disk: what is in memory only, as many a /tmp, cannot be let go of.
    fn model(files: &[(&str, u64)]) -> tempfile::TempDir {
        let beside = std::env::current_exe().unwrap();
        let folder = tempfile::tempdir_in(beside.parent().unwrap()).unwrap();
        for (name, bytes) in files {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, vec![7; *bytes as usize]).unwrap();
        }
        folder
    }

    #[tokio::test]
    async fn a_model_is_staged_and_let_go_of_as_measured() {
        let model = model(&[("a.safetensors", 12 * MIB), ("sub/b.safetensors", 4 * MIB + 5), ("empty", 0)]);
        let total = 16 * MIB + 5;
        let cache = Arc::new(PageCache::new(total));
        let gone = cache.unstage(model.path()).await.unwrap();
        assert_eq!(gone.total, total);
        assert!(gone.resident < total / 2, "{gone:?}");
        assert_eq!(residency(model.path()).await.unwrap().total, total);

        let staged = cache.stage(model.path()).await.unwrap();
        assert_eq!(staged.residency, Residency { resident: total, total });
        assert!(residency(model.path()).await.unwrap().whole());
        assert_eq!(cache.staged(), BTreeMap::from([(model.path().to_owned(), total)]));

        let gone = cache.unstage(model.path()).await.unwrap();
        assert!(gone.resident < total / 2, "{gone:?}");
        assert!(cache.staged().is_empty());
    }

    #[tokio::test]
    async fn what_is_read_ahead_is_soon_there() {
        let model = model(&[("a.safetensors", 12 * MIB), ("sub/b.safetensors", 20 * MIB + 5), ("empty", 0)]);
        let cache = Arc::new(PageCache::new(0));
        assert!(!cache.unstage(model.path()).await.unwrap().whole());
        let stopped = CancellationToken::new();
        stopped.cancel();
        read_ahead(model.path(), stopped).await.unwrap();
        assert!(!is_resident(model.path()).await.unwrap(), "it was told to stop");
        read_ahead(model.path(), CancellationToken::new()).await.unwrap();
        while !is_resident(model.path()).await.unwrap() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert!(read_ahead(Path::new("/nowhere"), CancellationToken::new()).await.is_err());
    }

    #[tokio::test]
    async fn the_budget_holds_over_all_folders() {
        let (one, other) = (model(&[("a", 3 * MIB)]), model(&[("a", 2 * MIB)]));
        let cache = Arc::new(PageCache::new(4 * MIB));
        cache.stage(one.path()).await.unwrap();
        let error = cache.stage(other.path()).await.unwrap_err().to_string();
        assert!(
            error.ends_with("2097152 bytes are more than the 1048576 bytes left of the page cache's budget of 4194304")
        );
        // Again is no more than once.
        cache.stage(one.path()).await.unwrap();
        cache.unstage(one.path()).await.unwrap();
        cache.stage(other.path()).await.unwrap();
    }

    #[tokio::test]
    async fn links_to_files_count_once_and_a_dropped_staging_gives_its_budget_back() {
        let model = model(&[("blobs/hash", 2 * MIB)]);
        std::os::unix::fs::symlink("blobs/hash", model.path().join("model.safetensors")).unwrap();
        std::os::unix::fs::symlink(".", model.path().join("circle")).unwrap();
        assert_eq!(residency(model.path()).await.unwrap().total, 2 * MIB);

        let cache = Arc::new(PageCache::new(2 * MIB));
        let dropped = cache.reserve(model.path(), MIB).unwrap();
        assert_eq!(cache.staged().len(), 1);
        drop(dropped);
        assert!(cache.staged().is_empty());
        let stop = CancellationToken::new();
        stop.cancel();
        assert!(matches!(read(&model.path().join("blobs/hash"), &stop), Err(StageError::CutOff)));

        let nowhere = cache.stage(&model.path().join("nowhere")).await.unwrap_err();
        assert!(matches!(nowhere, StageError::File { .. }), "{nowhere}");
    }
}
