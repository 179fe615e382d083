//! What a model consists of, and which ranges of it are still to be fetched. Pure.

use std::{collections::BTreeSet, ops::Range};

use serde::{Deserialize, Serialize};

use super::ModelError;

/// Bytes of one range. Large enough that a request costs little, small enough that a crash loses little.
pub const RANGE_BYTES: u64 = 16 << 20;

/// One file of a model, as its source lists it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Object {
    /// Place in the model's folder: relative, `/` between parts, no `.` or `..`.
    pub path: String,
    /// How the source calls it: a key or a URL.
    pub location: String,
    /// Bytes.
    pub size: u64,
    /// Changes whenever the content does; `None` where the source has none.
    pub etag: Option<String>,
    /// SHA-256 of the content, lower-case hex, where the source knows it.
    pub sha256: Option<String>,
    /// MD5 of the content, lower-case hex, where the source knows it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub md5: Option<String>,
}

/// Name of a model's folder: the address and all that the listing says of the content, so that a changed
/// object makes another folder. Lower-case hex.
pub fn tree_key(uri: &str, objects: &[Object]) -> String {
    let mut context = ring::digest::Context::new(&ring::digest::SHA256);
    let mut add = |text: &str| {
        context.update(&(text.len() as u64).to_le_bytes());
        context.update(text.as_bytes());
    };
    add(uri);
    for object in objects {
        add(&object.path);
        add(&object.size.to_string());
        add(object.etag.as_deref().unwrap_or_default());
        add(object.sha256.as_deref().unwrap_or_default());
    }
    hex(context.finish().as_ref())
}

/// Lower-case hex.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Ranges of a file of `size` bytes that are not among those done, in order.
pub fn missing(size: u64, done: &BTreeSet<u64>) -> Vec<Range<u64>> {
    let starts = (0..size.div_ceil(RANGE_BYTES)).map(|number| number * RANGE_BYTES);
    starts.filter(|start| !done.contains(start)).map(|start| start..(start + RANGE_BYTES).min(size)).collect()
}

/// Refuses listings that a folder cannot hold: paths that leave it, and two files at one place.
///
/// # Errors
/// Names the path.
pub fn check(uri: &str, objects: &[Object]) -> Result<(), ModelError> {
    let bad = |reason: String| ModelError::Source { uri: uri.to_owned(), reason };
    if objects.is_empty() {
        return Err(ModelError::NotFound { uri: uri.to_owned(), reason: "nothing is there".to_owned() });
    }
    let mut seen = BTreeSet::new();
    for object in objects {
        let fits = |part: &str| !part.is_empty() && part != "." && part != ".." && !part.contains('\0');
        if !object.path.split('/').all(fits) {
            return Err(bad(format!(
                "file name {:?} cannot be stored: it must be relative and without ..",
                object.path
            )));
        }
        if !seen.insert(object.path.as_str()) {
            return Err(bad(format!("file {:?} is listed twice", object.path)));
        }
    }
    // "a" and "a/b" cannot both be there.
    for path in &seen {
        let parents = path.match_indices('/').map(|(at, _)| &path[..at]);
        if let Some(parent) = parents.into_iter().find(|parent| seen.contains(parent)) {
            return Err(bad(format!("{parent:?} is both a file and a folder")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(path: &str, etag: &str) -> Object {
        Object { path: path.into(), location: path.into(), size: 3, etag: Some(etag.into()), sha256: None, md5: None }
    }

    #[test]
    fn what_is_done_is_not_fetched_again() {
        let size = 2 * RANGE_BYTES + 5;
        let all = missing(size, &BTreeSet::new());
        assert_eq!(all, [0..RANGE_BYTES, RANGE_BYTES..2 * RANGE_BYTES, 2 * RANGE_BYTES..size]);
        let left = missing(size, &BTreeSet::from([0, 2 * RANGE_BYTES]));
        assert_eq!((left.len(), left[0].clone()), (1, RANGE_BYTES..2 * RANGE_BYTES));
        assert!(missing(0, &BTreeSet::new()).is_empty());
    }

    #[test]
    fn a_changed_object_makes_another_tree() {
        let key = |uri: &str, etag: &str| tree_key(uri, &[object("a", etag)]);
        assert_eq!(key("s3://b/m", "1"), key("s3://b/m", "1"));
        assert_ne!(key("s3://b/m", "1"), key("s3://b/m", "2"));
        assert_ne!(key("s3://b/m", "1"), key("s3://b/n", "1"));
    }

    #[test]
    fn no_path_leaves_the_folder() {
        for path in ["../a", "/a", "a/../../b", "a//b", "", ".", "a/."] {
            assert!(check("s3://b", &[object(path, "")]).is_err(), "{path}");
        }
        assert!(check("s3://b", &[object("a", ""), object("a/b", "")]).is_err(), "file and folder");
        assert!(check("s3://b", &[object("a", ""), object("a", "")]).is_err(), "twice");
        assert!(matches!(check("s3://b", &[]), Err(ModelError::NotFound { .. })));
        assert!(check("s3://b", &[object("a/b", ""), object("a/c", "")]).is_ok());
    }
}
