//! Checksums of files that are fetched: their bytes are read back in order, most of them from memory, on threads of
//! their own, while others still come.

use std::{collections::BTreeSet, io, os::unix::fs::FileExt as _};

use md5::{Digest as _, Md5};

use super::{
    checksum::Checksums,
    content::Named,
    landing::File,
    plan::{self, RANGE_BYTES},
};

/// Bytes read back at once.
const CHUNK: usize = 256 << 10;

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
    /// Begins where nothing is hashed yet. What is there of the file already counts as written.
    pub(super) fn new(file: &'f File) -> Self {
        let (sha256, blake3) = match file.named() {
            Named::Sha256 => (Some(Box::new(ring::digest::Context::new(&ring::digest::SHA256))), None),
            Named::Blake3 => (None, Some(Box::default())),
        };
        let md5 = file.object.md5.as_ref().map(|_| Md5::new());
        Self { file, at: 0, ready: file.part.done.clone(), sha256, blake3, md5 }
    }

    /// A range is written.
    pub(super) fn written(&mut self, start: u64) {
        self.ready.insert(start);
    }

    /// Hashes the next range; false where that is not written yet, or was the last one.
    ///
    /// # Errors
    /// The disk refuses.
    pub(super) fn step(&mut self, buffer: &mut Buffer) -> io::Result<bool> {
        if !self.ready.remove(&self.at) {
            return Ok(false);
        }
        let end = (self.at + RANGE_BYTES).min(self.file.object.size);
        while self.at < end {
            let size = usize::try_from(end - self.at).unwrap_or(usize::MAX).min(CHUNK);
            let piece = &mut buffer.0[..size];
            self.file.part.data.read_exact_at(piece, self.at)?;
            if let Some(sha256) = &mut self.sha256 {
                sha256.update(piece);
            }
            if let Some(blake3) = &mut self.blake3 {
                blake3.update(piece);
            }
            if let Some(md5) = &mut self.md5 {
                md5.update(&*piece);
            }
            self.at += size as u64;
        }
        Ok(true)
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
