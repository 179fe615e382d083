//! Directories and files that only their owner may read, whatever the umask.

use std::{
    fs::{DirBuilder, File, Metadata, Permissions, TryLockError, set_permissions},
    io::{self, ErrorKind},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::Path,
};

use tracing::warn;

use crate::IdentityError;

/// Mode of a directory with secrets below it.
const DIRECTORY_MODE: u32 = 0o700;
/// Mode of a directory that others may pass through.
const PASSABLE_MODE: u32 = 0o711;
/// Mode of a file with secrets.
const FILE_MODE: u32 = 0o600;

/// Creates a directory with mode 0700. One that exists and allows more is tightened, which is logged.
///
/// # Errors
/// The directory cannot be created or its mode cannot be changed.
pub fn private_dir(path: &Path) -> Result<(), IdentityError> {
    let create = || {
        DirBuilder::new().recursive(true).mode(DIRECTORY_MODE).create(path)?;
        tighten(path, DIRECTORY_MODE)
    };
    create().map_err(|error| IdentityError::File { path: path.to_owned(), error })
}

/// Creates a directory with mode 0711: others reach what they know the name of, and list nothing.
///
/// # Errors
/// As [`private_dir`].
pub fn passable_dir(path: &Path) -> Result<(), IdentityError> {
    let create = || {
        DirBuilder::new().recursive(true).mode(PASSABLE_MODE).create(path)?;
        // Whatever the umask is, and whatever the mode was before.
        set_permissions(path, Permissions::from_mode(PASSABLE_MODE))
    };
    create().map_err(|error| IdentityError::File { path: path.to_owned(), error })
}

/// Keeps other processes out of a data directory until it is dropped.
#[derive(Debug)]
pub struct DirLock(#[expect(dead_code, reason = "the lock is held as long as the file is open")] File);

/// Locks a data directory, which exists, for this process. The lock ends with the process, however that ends.
///
/// # Errors
/// Another process has it, or the file `lock` in it cannot be opened.
pub fn lock_dir(path: &Path) -> Result<DirLock, IdentityError> {
    let failed = |error| IdentityError::File { path: path.to_owned(), error };
    let options = &mut File::options();
    let file =
        options.create(true).truncate(false).write(true).mode(FILE_MODE).open(path.join("lock")).map_err(failed)?;
    match file.try_lock() {
        Ok(()) => Ok(DirLock(file)),
        Err(TryLockError::WouldBlock) => {
            Err(failed(io::Error::new(ErrorKind::ResourceBusy, "another process uses this data directory")))
        }
        Err(TryLockError::Error(error)) => Err(failed(error)),
    }
}

/// Sets the mode of a file to 0600 if it allows more, which is logged. A missing file is no error.
///
/// # Errors
/// The mode cannot be read or changed.
pub fn private_file(path: &Path) -> Result<(), IdentityError> {
    match tighten(path, FILE_MODE) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(IdentityError::File { path: path.to_owned(), error }),
        _ => Ok(()),
    }
}

fn tighten(path: &Path, allowed: u32) -> io::Result<()> {
    let mode = mode(&path.metadata()?);
    if mode & !allowed == 0 {
        return Ok(());
    }
    set_permissions(path, Permissions::from_mode(mode & allowed))?;
    warn!(path = %path.display(), from = format!("{mode:04o}"), to = format!("{:04o}", mode & allowed), "tightened the mode");
    Ok(())
}

fn mode(metadata: &Metadata) -> u32 {
    metadata.permissions().mode() & 0o7777
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode_of(path: &Path) -> u32 {
        mode(&path.metadata().unwrap())
    }

    #[test]
    fn a_private_directory_is_made_and_an_open_one_is_tightened() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a/b");
        private_dir(&path).unwrap();
        assert_eq!(mode_of(&path), 0o700);
        set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
        private_dir(&path).unwrap();
        assert_eq!(mode_of(&path), 0o700);
    }

    #[test]
    fn an_open_file_is_tightened_and_a_missing_one_is_no_error() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state.redb");
        private_file(&path).unwrap();
        std::fs::write(&path, "secret").unwrap();
        set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        private_file(&path).unwrap();
        assert_eq!(mode_of(&path), 0o600);
    }

    #[test]
    fn a_data_directory_is_used_by_one_process_at_a_time() {
        let directory = tempfile::tempdir().unwrap();
        let lock = lock_dir(directory.path()).unwrap();
        let refused = lock_dir(directory.path()).unwrap_err().to_string();
        assert!(refused.contains("another process uses this data directory"), "{refused}");
        drop(lock);
        lock_dir(directory.path()).unwrap();
    }
}
