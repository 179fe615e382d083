//! A file that is being fetched, range by range, and the journal of what of it is there: so that a fetch which was cut
//! off goes on where it was.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use super::{
    cache::{Cache, unless_missing, write_synced},
    content,
};

/// Ending of the name of a file with another node's word for a content.
const TOLD: &str = "told";
/// Ending of the name of the journal of a file's ranges.
const DONE: &str = "done";

/// A file that is being fetched.
#[derive(Debug)]
pub(super) struct Part {
    /// Where it is.
    pub(super) path: PathBuf,
    /// Of full length from the start, with holes.
    pub(super) data: File,
    journal: File,
    /// Starts of the ranges that are on disk, or written in this boot of the machine.
    pub(super) done: BTreeSet<u64>,
    /// The name that another node gave, as it was noted when the file was opened, where bytes may have come from there.
    pub(super) told: Option<String>,
    boot: Option<String>,
}

impl Part {
    /// Notes that a range is written: what the machine's memory has, this process's end does not take away.
    ///
    /// # Errors
    /// The disk refuses.
    pub(super) fn came(&self, start: u64) -> io::Result<()> {
        let Some(boot) = &self.boot else { return Ok(()) };
        (&self.journal).write_all(format!("{start} {boot}\n").as_bytes())
    }

    /// Notes that ranges are on disk. Their data is synced first, so that the journal never says too much.
    ///
    /// # Errors
    /// The disk refuses.
    pub(super) fn note(&self, starts: &[u64]) -> io::Result<()> {
        self.data.sync_data()?;
        // A line that a crash cuts short is without its end, and does not count.
        let lines: String = starts.iter().map(|start| format!("{start}\n")).collect();
        (&self.journal).write_all(lines.as_bytes())
    }

    /// Notes what [`Self::told`] will be when it is opened again, before any such byte counts as being there.
    ///
    /// # Errors
    /// The disk refuses.
    pub(super) fn tell(&self, name: &str) -> io::Result<()> {
        write_synced(&self.path.with_extension(TOLD), name)
    }

    /// Forgets all that came of a file.
    ///
    /// # Errors
    /// The disk refuses.
    pub(super) fn reset(&self) -> io::Result<()> {
        // In this order: the journal must not vouch for what no one told.
        fs::remove_file(self.path.with_extension(DONE))?;
        unless_missing(fs::remove_file(self.path.with_extension(TOLD)))
    }
}

impl Cache {
    /// Opens file `number` of a model that is being fetched, with the ranges that are there already.
    ///
    /// # Errors
    /// The disk refuses.
    pub(super) fn part(&self, key: &str, number: usize, size: u64) -> io::Result<Part> {
        let directory = self.partial(key);
        fs::create_dir_all(&directory)?;
        let path = directory.join(format!("{number}.data"));
        let journal = path.with_extension(DONE);
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
        Ok(Part {
            path,
            data,
            journal,
            done,
            told: told.filter(|_| !told_wrong),
            boot: self.boot().map(ToOwned::to_owned),
        })
    }
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
