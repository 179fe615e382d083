//! Archives that web servers give: what is in them, and their files one by one. Nothing of an archive's
//! own names is used as a path on disk: files are written under numbers, and linked by checked names.

use std::{
    fs::File,
    io::{self, BufReader, Read, Write as _},
    path::{Path, PathBuf},
};

/// Files of one archive, at most.
const FILES_MOST: usize = 100_000;

/// Known by the end of the file's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Zip,
    Tar,
    TarGz,
}

/// Why an archive cannot be unpacked.
#[derive(Debug)]
pub(super) enum ArchiveError {
    /// What is in it.
    Bad(String),
    /// The node's disk.
    Disk(io::Error),
}

/// What kind of archive a web address names; `None` for any other file, and for other schemes.
pub(super) fn kind(uri: &str) -> Option<Kind> {
    if !uri.starts_with("http://") && !uri.starts_with("https://") {
        return None;
    }
    let path = uri.split(['?', '#']).next().unwrap_or_default().to_ascii_lowercase();
    let kinds = [(".zip", Kind::Zip), (".tar", Kind::Tar), (".tgz", Kind::TarGz), (".tar.gz", Kind::TarGz)];
    kinds.into_iter().find(|(end, _)| path.ends_with(end)).map(|(_, kind)| kind)
}

/// Names and sizes of the files, in order, folders left out.
pub(super) fn list(path: &Path, kind: Kind) -> Result<Vec<(String, u64)>, ArchiveError> {
    let mut files = Vec::new();
    walk(path, kind, &mut |name, size, _| {
        if files.len() == FILES_MOST {
            return Err(ArchiveError::Bad(format!("it has more than {FILES_MOST} files")));
        }
        files.push((name, size));
        Ok(())
    })?;
    Ok(files)
}

/// Writes each file to where `place` says, by its number in the list.
pub(super) fn unpack(path: &Path, kind: Kind, place: impl Fn(usize) -> PathBuf) -> Result<(), ArchiveError> {
    let mut number = 0;
    walk(path, kind, &mut |name, size, content| {
        let target = File::create(place(number)).map_err(ArchiveError::Disk)?;
        number += 1;
        copy(content, target, size).map_err(|error| match error {
            ArchiveError::Bad(reason) => ArchiveError::Bad(format!("{name}: {reason}")),
            disk => disk,
        })
    })
}

/// Copies what must be `size` bytes, and not a byte more, whatever it claims to be.
fn copy(content: &mut dyn Read, mut target: File, size: u64) -> Result<(), ArchiveError> {
    let mut buffer = vec![0; 1 << 16];
    let mut copied = 0;
    loop {
        let read = content.read(&mut buffer).map_err(|error| ArchiveError::Bad(error.to_string()))?;
        copied += read as u64;
        if copied > size || (read == 0 && copied < size) {
            return Err(ArchiveError::Bad(format!("it does not have the {size} bytes that the archive says")));
        }
        if read == 0 {
            return target.sync_data().map_err(ArchiveError::Disk);
        }
        target.write_all(&buffer[..read]).map_err(ArchiveError::Disk)?;
    }
}

type Each<'a> = &'a mut dyn FnMut(String, u64, &mut dyn Read) -> Result<(), ArchiveError>;

fn walk(path: &Path, kind: Kind, each: Each<'_>) -> Result<(), ArchiveError> {
    let file = BufReader::new(File::open(path).map_err(ArchiveError::Disk)?);
    match kind {
        Kind::Zip => walk_zip(file, each),
        Kind::Tar => walk_tar(file, each),
        Kind::TarGz => walk_tar(flate2::bufread::MultiGzDecoder::new(file), each),
    }
}

fn bad(error: impl std::fmt::Display) -> ArchiveError {
    ArchiveError::Bad(error.to_string())
}

fn walk_zip(file: BufReader<File>, each: Each<'_>) -> Result<(), ArchiveError> {
    let mut archive = zip::ZipArchive::new(file).map_err(bad)?;
    for index in 0..archive.len() {
        let mut entry = archive.by_index(index).map_err(bad)?;
        if entry.is_dir() {
            continue;
        }
        let name = entry.name().map_err(bad)?.into_owned();
        if entry.is_symlink() {
            return Err(ArchiveError::Bad(format!("{name}: links in archives are not unpacked")));
        }
        each(plain(&name), entry.size(), &mut entry)?;
    }
    Ok(())
}

fn walk_tar(file: impl Read, each: Each<'_>) -> Result<(), ArchiveError> {
    let mut archive = tar::Archive::new(file);
    for entry in archive.entries().map_err(bad)? {
        let mut entry = entry.map_err(bad)?;
        let name = String::from_utf8(entry.path_bytes().into_owned())
            .map_err(|_| ArchiveError::Bad("a file's name is not UTF-8".to_owned()))?;
        match entry.header().entry_type() {
            tar::EntryType::Regular | tar::EntryType::Continuous => {
                let size = entry.size();
                each(plain(&name), size, &mut entry)?;
            }
            tar::EntryType::Directory | tar::EntryType::XGlobalHeader => {}
            other => return Err(ArchiveError::Bad(format!("{name}: entries of type {other:?} are not unpacked"))),
        }
    }
    Ok(())
}

/// Without the `./` that tar puts before names. What else is wrong with a name is found when it is checked.
fn plain(name: &str) -> String {
    name.strip_prefix("./").unwrap_or(name).to_owned()
}
