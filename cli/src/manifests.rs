//! Which files a command reads, and reading them.

use std::{
    io::Read as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};

/// Ends of names of the files that are read from a directory.
const ENDS: [&str; 3] = ["yaml", "yml", "json"];

/// What to read.
#[derive(Debug, clap::Args)]
pub struct Files {
    /// File, directory or - for standard input; may be given again.
    #[arg(short = 'f', long = "filename", required = true, value_name = "PATH", num_args = 1..)]
    pub paths: Vec<PathBuf>,
    /// Read the directories below a directory too.
    #[arg(short = 'R', long)]
    pub recursive: bool,
}

/// One file.
#[derive(Debug, Clone)]
pub struct Manifest {
    /// Its path, or "standard input".
    pub source: String,
    /// What it holds.
    pub text: String,
}

impl Files {
    /// Reads them all, those of a directory by name.
    pub fn read(&self) -> anyhow::Result<Vec<Manifest>> {
        let mut manifests = Vec::new();
        for path in &self.paths {
            if path == Path::new("-") {
                let mut text = String::new();
                std::io::stdin().read_to_string(&mut text).context("standard input")?;
                manifests.push(Manifest { source: "standard input".to_owned(), text });
            } else if path.is_dir() {
                let files = self.files_of(path)?;
                if files.is_empty() {
                    bail!("{}: no .yaml, .yml or .json file in it", path.display());
                }
                for file in files {
                    manifests.push(read(&file)?);
                }
            } else {
                manifests.push(read(path)?);
            }
        }
        Ok(manifests)
    }

    fn files_of(&self, directory: &Path) -> anyhow::Result<Vec<PathBuf>> {
        let shown = || directory.display().to_string();
        let mut files = Vec::new();
        let mut directories = Vec::new();
        for entry in std::fs::read_dir(directory).with_context(shown)? {
            let entry = entry.with_context(shown)?;
            let path = entry.path();
            // A link to a directory is not followed: it may lead back.
            if entry.file_type().with_context(shown)?.is_dir() {
                directories.push(path);
            } else if path.extension().is_some_and(|end| ENDS.iter().any(|known| end == *known)) {
                files.push(path);
            }
        }
        files.sort();
        directories.sort();
        if self.recursive {
            for below in directories {
                files.extend(self.files_of(&below)?);
            }
        }
        Ok(files)
    }
}

fn read(path: &Path) -> anyhow::Result<Manifest> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    Ok(Manifest { source: path.display().to_string(), text })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_are_read_by_name_and_below_only_if_asked() {
        let directory = tempfile::tempdir().unwrap();
        for name in ["b.yaml", "a.yml", "c.json", "no.txt"] {
            std::fs::write(directory.path().join(name), name).unwrap();
        }
        std::fs::create_dir(directory.path().join("below")).unwrap();
        std::fs::write(directory.path().join("below/d.yaml"), "d.yaml").unwrap();
        let read = |recursive| {
            let files = Files { paths: vec![directory.path().to_owned()], recursive };
            files.read().unwrap().into_iter().map(|manifest| manifest.text).collect::<Vec<_>>()
        };
        assert_eq!(read(false), ["a.yml", "b.yaml", "c.json"]);
        assert_eq!(read(true), ["a.yml", "b.yaml", "c.json", "d.yaml"]);
        let empty = Files { paths: vec![tempfile::tempdir().unwrap().path().to_owned()], recursive: false };
        assert!(empty.read().is_err());
    }
}
