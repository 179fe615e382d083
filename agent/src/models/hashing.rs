//! Checksums of files that are fetched. Those that are to be compared with what is said of the file are computed while
//! others still come, and those that are only names once all has come: bytes are read back in order, most of them from
//! memory.

use std::{
    collections::BTreeSet,
    fs, io,
    os::unix::fs::FileExt as _,
    path::PathBuf,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

use md5::{Digest as _, Md5};

use super::{
    checksum::Checksums,
    content::{self, Named},
    landing::File,
    plan::{self, RANGE_BYTES},
};

/// Bytes read back at once.
const CHUNK: usize = 256 << 10;
/// Threads that compute names, at most.
const NAMERS: usize = 4;
/// Added to the niceness of those threads: they have what others leave.
const NICE: i32 = 19;

/// The checksums of a file as far as it is there.
pub(super) struct Hashing<'f> {
    file: &'f File,
    /// All bytes before it are hashed.
    at: u64,
    /// Starts of ranges that are written, and come later.
    ready: BTreeSet<u64>,
    sha256: Option<Box<ring::digest::Context>>,
    blake3: Option<Box<blake3::Hasher>>,
    md5: Option<Md5>,
}

impl<'f> Hashing<'f> {
    /// Begins with what is there of a file already.
    ///
    /// # Errors
    /// The disk refuses.
    pub(super) fn begin(file: &'f File, buffer: &mut Buffer) -> io::Result<Self> {
        let (sha256, blake3) = match file.named() {
            Named::Sha256 => (Some(Box::new(ring::digest::Context::new(&ring::digest::SHA256))), None),
            Named::Blake3 => (None, Some(Box::default())),
        };
        let md5 = file.object.md5.as_ref().map(|_| Md5::new());
        let mut hashing = Self { file, at: 0, ready: file.part.done.clone(), sha256, blake3, md5 };
        hashing.go_on(buffer)?;
        Ok(hashing)
    }

    /// A range is written: all that may follow by now is hashed.
    ///
    /// # Errors
    /// The disk refuses.
    pub(super) fn written(&mut self, start: u64, buffer: &mut Buffer) -> io::Result<()> {
        self.ready.insert(start);
        self.go_on(buffer)
    }

    fn go_on(&mut self, buffer: &mut Buffer) -> io::Result<()> {
        while self.ready.remove(&self.at) {
            let end = (self.at + RANGE_BYTES).min(self.file.object.size);
            while self.at < end {
                let size = usize::try_from(end - self.at).unwrap_or(usize::MAX).min(CHUNK);
                let piece = &mut buffer.0[..size];
                self.file.part.data.read_exact_at(piece, self.at)?;
                self.take(piece);
            }
        }
        Ok(())
    }

    fn take(&mut self, piece: &[u8]) {
        if let Some(sha256) = &mut self.sha256 {
            sha256.update(piece);
        }
        if let Some(blake3) = &mut self.blake3 {
            blake3.update(piece);
        }
        if let Some(md5) = &mut self.md5 {
            md5.update(piece);
        }
        self.at += piece.len() as u64;
    }

    /// Of a file that is whole; of any other they say nothing.
    pub(super) fn checksums(self) -> Checksums {
        Checksums {
            sha256: self.sha256.map(|context| plan::hex(context.finish().as_ref())),
            md5: self.md5.map(|md5| plan::hex(&md5.finalize())),
            blake3: self.blake3.map(|blake3| blake3.finalize().to_hex().to_string()),
        }
    }
}

/// Somewhere to read back to; one for all files of a thread.
pub(super) struct Buffer(Vec<u8>);

impl Buffer {
    pub(super) fn new() -> Self {
        Self(vec![0; CHUNK])
    }
}

/// Names of contents by their BLAKE3, in the order of their files. Takes as long as others leave no processor to it.
/// Blocks.
///
/// # Errors
/// The disk refuses.
pub(super) fn names(files: &[PathBuf]) -> io::Result<Vec<String>> {
    let next = AtomicUsize::new(0);
    let some = || {
        // Without it the thread only takes more.
        let _ = rustix::process::nice(NICE);
        let files = std::iter::from_fn(|| {
            let number = next.fetch_add(1, Ordering::Relaxed);
            files.get(number).map(|file| (number, file))
        });
        files.map(|(number, file)| Ok((number, name(file)?))).collect::<io::Result<Vec<_>>>()
    };
    let threads = thread::available_parallelism().map_or(1, usize::from).min(NAMERS).min(files.len());
    let mut all = thread::scope(|scope| {
        let named = || thread::Builder::new().name("naming".to_owned());
        // Those that there can be; the files are shared out among them.
        let started: Vec<_> = (0..threads).map(|_| named().spawn_scoped(scope, some)).collect();
        if !started.is_empty() && started.iter().all(io::Result::is_err) {
            return Err(io::Error::other("no thread to hash contents"));
        }
        let ended = started
            .into_iter()
            .flatten()
            .map(|thread| thread.join().unwrap_or_else(|_| Err(io::ErrorKind::Other.into())));
        ended.collect::<io::Result<Vec<_>>>().map(|all| all.concat())
    })?;
    all.sort_unstable();
    Ok(all.into_iter().map(|(_, name)| name).collect())
}

fn name(file: &PathBuf) -> io::Result<String> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(fs::File::open(file)?)?;
    Ok(content::by_blake3(&hasher.finalize().to_hex()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_in_the_order_of_their_files() {
        let folder = tempfile::tempdir().unwrap();
        // Larger ones first, so that later ones are done before.
        let texts: Vec<String> = (0..20).map(|number| "0123456789".repeat((20 - number) * 10_000)).collect();
        let files: Vec<_> = (0..texts.len()).map(|number| folder.path().join(number.to_string())).collect();
        files.iter().zip(&texts).for_each(|(file, text)| fs::write(file, text).unwrap());
        let expected: Vec<_> =
            texts.iter().map(|text| content::by_blake3(&blake3::hash(text.as_bytes()).to_hex())).collect();
        assert_eq!(names(&files).unwrap(), expected);
        assert!(names(&[]).unwrap().is_empty());
        let gone = [files[0].clone(), folder.path().join("gone")];
        assert_eq!(names(&gone).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
