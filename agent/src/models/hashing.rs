//! Checksums of files that are fetched.
//!
//! A BLAKE3 needs only what each range's bytes came to on their way ([`super::subtree`]). SHA-256 and MD5 need all
//! bytes in order: they are read back, most of them from memory, on threads of their own, while others still come.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    ops::Range,
    os::unix::fs::FileExt as _,
};

use md5::{Digest as _, Md5};

use super::{
    checksum::Checksums,
    content::Named,
    landing::File,
    plan::{self, RANGE_BYTES},
    subtree::{self, Subtree, Value},
};

/// Bytes read back at once.
const CHUNK: usize = 256 << 10;

/// Somewhere to read back to; one for all files of a thread.
pub(super) struct Buffer(Vec<u8>);

impl Buffer {
    pub(super) fn new() -> Self {
        Self(vec![0; CHUNK])
    }

    /// Reads a range of a file, piece by piece.
    fn read(&mut self, file: &File, range: Range<u64>, mut each: impl FnMut(&[u8])) -> io::Result<()> {
        let mut at = range.start;
        while at < range.end {
            let size = usize::try_from(range.end - at).unwrap_or(usize::MAX).min(CHUNK);
            let piece = &mut self.0[..size];
            file.part.data.read_exact_at(piece, at)?;
            each(piece);
            at += size as u64;
        }
        Ok(())
    }
}

/// The checksums of a file as far as it is there.
pub(super) struct Hashing<'f> {
    file: &'f File,
    /// Values of ranges, by their starts, where its BLAKE3 is wanted.
    values: Option<BTreeMap<u64, Value>>,
    in_order: Option<InOrder>,
}

/// Checksums that need all bytes from the start on.
struct InOrder {
    at: u64,
    /// Starts of ranges that are written, and come later.
    ready: BTreeSet<u64>,
    sha256: Option<Box<ring::digest::Context>>,
    md5: Option<Md5>,
}

impl<'f> Hashing<'f> {
    /// Begins with what is on the disk of a file already.
    ///
    /// # Errors
    /// The disk refuses.
    pub(super) fn begin(file: &'f File, buffer: &mut Buffer) -> io::Result<Self> {
        let sha256 = file.named() == Named::Sha256;
        let in_order = (sha256 || file.object.md5.is_some()).then(|| InOrder {
            at: 0,
            ready: BTreeSet::new(),
            sha256: sha256.then(|| Box::new(ring::digest::Context::new(&ring::digest::SHA256))),
            md5: file.object.md5.as_ref().map(|_| Md5::new()),
        });
        let mut hashing = Self { file, values: (!sha256).then(BTreeMap::new), in_order };
        for range in plan::there(file.object.size, &file.part.done) {
            let value = match &hashing.values {
                Some(_) => {
                    let mut subtree = Subtree::new(&range, file.object.size);
                    buffer.read(file, range.clone(), |piece| subtree.update(piece))?;
                    Some(subtree.value())
                }
                None => None,
            };
            hashing.written(range.start, value, buffer)?;
        }
        Ok(hashing)
    }

    /// A range is written, and what its bytes came to on their way, where a BLAKE3 is wanted.
    ///
    /// # Errors
    /// The disk refuses.
    pub(super) fn written(&mut self, start: u64, value: Option<Value>, buffer: &mut Buffer) -> io::Result<()> {
        if let (Some(values), Some(value)) = (&mut self.values, value) {
            values.insert(start, value);
        }
        let Some(in_order) = &mut self.in_order else { return Ok(()) };
        in_order.ready.insert(start);
        in_order.go_on(self.file, buffer)
    }

    /// Of a file that is whole; of any other they say nothing.
    pub(super) fn checksums(self) -> Checksums {
        let values = self.values.map(|values| values.into_values().collect::<Vec<_>>());
        let (sha256, md5) = self.in_order.map(|in_order| (in_order.sha256, in_order.md5)).unwrap_or_default();
        Checksums {
            sha256: sha256.map(|context| plan::hex(context.finish().as_ref())),
            md5: md5.map(|md5| plan::hex(&md5.finalize())),
            blake3: values.map(|values| subtree::root(&values).to_hex().to_string()),
        }
    }
}

impl InOrder {
    fn go_on(&mut self, file: &File, buffer: &mut Buffer) -> io::Result<()> {
        while self.ready.remove(&self.at) {
            let end = (self.at + RANGE_BYTES).min(file.object.size);
            buffer.read(file, self.at..end, |piece| {
                if let Some(sha256) = &mut self.sha256 {
                    sha256.update(piece);
                }
                if let Some(md5) = &mut self.md5 {
                    md5.update(piece);
                }
            })?;
            self.at = end;
        }
        Ok(())
    }
}
