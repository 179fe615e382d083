//! Hands this node's models out to other nodes: what a whole model consists of, and parts of its contents.

use std::{
    io::{self, Seek as _, SeekFrom},
    ops::Range,
    os::unix::fs::MetadataExt as _,
};

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _};
use http::StatusCode;
use tokio::io::AsyncReadExt as _;
use tokio_util::io::ReaderStream;

use super::{Models, content, source::Content};

/// Paths of requests for models between nodes begin with it.
pub const PREFIX: &str = "/pilotlight.models.v1/";
/// Contents handed out at once; who asks for more is sent to the store.
pub const AT_ONCE: usize = 8;
/// Bytes read from the disk at once.
const CHUNK: usize = 256 << 10;

/// Where a node asks for the record of a whole model.
pub(super) fn tree_path(key: &str) -> String {
    format!("{PREFIX}trees/{key}")
}

/// Where a node asks for content, by its name.
pub(super) fn blob_path(name: &str) -> String {
    format!("{PREFIX}blobs/{name}")
}

impl Models {
    /// Answers another node's GET: the record of a whole model by its key, or the part of a content that
    /// `range`, the header of that name, names. 404: it is not here, whole; 503: as many as may have their
    /// content now, or the model's contents have no names yet by which they could be checked.
    pub async fn lend(&self, path: &str, range: Option<&str>) -> (StatusCode, Content) {
        let asked = path.strip_prefix(PREFIX).and_then(|path| path.split_once('/'));
        match asked {
            Some(("trees", key)) if content::is_hex(key) => self.lend_record(key.to_owned()).await,
            Some(("blobs", name)) if content::parse(name).is_some() => match range.and_then(parse) {
                Some(range) => self.lend_content(name.to_owned(), range).await,
                None => nothing(StatusCode::RANGE_NOT_SATISFIABLE),
            },
            _ => nothing(StatusCode::NOT_FOUND),
        }
    }

    async fn lend_record(&self, key: String) -> (StatusCode, Content) {
        let cache = self.cache.clone();
        let record = tokio::task::spawn_blocking(move || cache.record(&key)).await;
        let Some(record) = record.ok().flatten() else { return nothing(StatusCode::NOT_FOUND) };
        if record.blobs.iter().any(|blob| content::is_unnamed(blob)) {
            return nothing(StatusCode::SERVICE_UNAVAILABLE);
        }
        match serde_json::to_vec(&record) {
            Ok(text) => (StatusCode::OK, futures::stream::iter([Ok(Bytes::from(text))]).boxed()),
            Err(_) => nothing(StatusCode::INTERNAL_SERVER_ERROR),
        }
    }

    async fn lend_content(&self, name: String, range: Range<u64>) -> (StatusCode, Content) {
        let Ok(turn) = std::sync::Arc::clone(&self.lent).try_acquire_owned() else {
            return nothing(StatusCode::SERVICE_UNAVAILABLE);
        };
        let (path, from) = (self.cache.blob(&name), range.start);
        let opened = tokio::task::spawn_blocking(move || -> io::Result<_> {
            let mut file = std::fs::File::open(path)?;
            let known = file.metadata()?;
            file.seek(SeekFrom::Start(from))?;
            Ok((file, known))
        })
        .await;
        // What no whole model links to is on its way in or out.
        let Some((file, known)) = opened.ok().and_then(Result::ok).filter(|(_, known)| known.nlink() > 1) else {
            return nothing(StatusCode::NOT_FOUND);
        };
        if range.end > known.len() {
            return nothing(StatusCode::RANGE_NOT_SATISFIABLE);
        }
        let part = tokio::fs::File::from_std(file).take(range.end - range.start);
        let chunks = ReaderStream::with_capacity(part, CHUNK).map_err(|error| error.to_string());
        // The turn ends with the content, or with whoever asked.
        let chunks = chunks.inspect(move |_| {
            let _ = &turn;
        });
        (StatusCode::PARTIAL_CONTENT, chunks.boxed())
    }
}

fn nothing(status: StatusCode) -> (StatusCode, Content) {
    (status, futures::stream::empty().boxed())
}

/// `bytes=FIRST-LAST`; other forms are not asked for by nodes.
fn parse(range: &str) -> Option<Range<u64>> {
    let (first, last) = range.strip_prefix("bytes=")?.split_once('-')?;
    let range = first.parse().ok()?..last.parse::<u64>().ok()?.checked_add(1)?;
    (range.start < range.end).then_some(range)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_has_both_ends_in_order() {
        assert_eq!(parse("bytes=0-0"), Some(0..1));
        assert_eq!(parse("bytes=5-9"), Some(5..10));
        let bad = ["bytes=9-5", "bytes=5-", "bytes=-5", "bytes=0-1,3-4", "0-1", "bytes=0-18446744073709551615"];
        assert!(bad.iter().all(|range| parse(range).is_none()));
    }
}
