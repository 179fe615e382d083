//! Weights that are loaded besides the classifier, to have a start as long as that of a large model.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use crate::ServerError;

/// What was read, one buffer per file.
#[derive(Debug)]
pub(crate) struct Weights(Vec<Vec<u8>>);

impl Weights {
    /// Reads a file, or all files of a folder and of those below it, into memory. Links to files are followed,
    /// those to folders are not. Blocks.
    pub(crate) fn read(path: &Path) -> Result<Self, ServerError> {
        let failed = |path: &Path, error| ServerError::Weights { path: path.to_owned(), error };
        let files = files(path).map_err(|error| failed(path, error))?;
        if files.is_empty() {
            return Err(failed(
                path,
                io::Error::new(io::ErrorKind::NotFound, "expected a file or a folder with files"),
            ));
        }
        let read = files.iter().map(|file| fs::read(file).map_err(|error| failed(file, error)));
        Ok(Self(read.collect::<Result<_, _>>()?))
    }

    /// All bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.0.iter().map(|file| file.len() as u64).sum()
    }
}

fn files(path: &Path) -> io::Result<Vec<PathBuf>> {
    if !fs::metadata(path)?.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let mut open = vec![path.to_owned()];
    let mut files = Vec::new();
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            let path = entry.path();
            if entry.file_type()?.is_dir() {
                open.push(path);
            } else if fs::metadata(&path)?.is_file() {
                files.push(path);
            }
        }
    }
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_read_whole_and_an_empty_one_is_refused() {
        let folder = std::env::temp_dir().join(format!("pilotlight-weights-{}", std::process::id()));
        fs::create_dir_all(folder.join("below")).unwrap();
        let message = Weights::read(&folder).unwrap_err().to_string();
        assert!(message.ends_with("expected a file or a folder with files"), "{message}");
        fs::write(folder.join("a"), [1; 1000]).unwrap();
        fs::write(folder.join("below/b"), [2; 24]).unwrap();
        std::os::unix::fs::symlink("a", folder.join("link")).unwrap();
        assert_eq!(Weights::read(&folder).unwrap().bytes(), 2024);
        assert_eq!(Weights::read(&folder.join("a")).unwrap().bytes(), 1000);
        assert!(Weights::read(&folder.join("c")).unwrap_err().to_string().contains("/c: "));
        fs::remove_dir_all(folder).unwrap();
    }
}
