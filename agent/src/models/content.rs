//! Names of contents: what a blob is called on this disk, and between nodes.
//!
//! SHA-256 where the source gives one: what is here already is then known before a byte comes. BLAKE3
//! otherwise, which takes a processor about a fifth of the time. A model is shown before that is computed, where there
//! is nothing to compare it with; until then the content is called by its fetch, which no other node is told.

/// Of both hashes, in hex.
const HEX_CHARS: usize = 64;
/// Before a BLAKE3; a SHA-256 stands alone.
const BLAKE3: &str = "blake3-";
/// Before the name of a content that is not hashed yet.
const UNNAMED: &str = "unnamed-";

/// By which hash a content is named.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Named {
    Sha256,
    Blake3,
}

/// The name by a BLAKE3 in lower-case hex.
pub(super) fn by_blake3(hex: &str) -> String {
    format!("{BLAKE3}{hex}")
}

/// What a content is called until it is hashed: by the fetch that it came with, which no other one is called like, and
/// its place in the listing.
pub(super) fn unnamed(fetch: &str, number: usize) -> String {
    format!("{UNNAMED}{fetch}-{number}")
}

/// True for what [`unnamed`] gives.
pub(super) fn is_unnamed(name: &str) -> bool {
    name.starts_with(UNNAMED)
}

/// The hash of a name and its value in hex; `None` for what is no name. No path of a file looks like one.
pub(super) fn parse(name: &str) -> Option<(Named, &str)> {
    let (named, hex) = match name.strip_prefix(BLAKE3) {
        Some(hex) => (Named::Blake3, hex),
        None => (Named::Sha256, name),
    };
    is_hex(hex).then_some((named, hex))
}

/// True for lower-case hex of 256 bits, as keys of models have.
pub(super) fn is_hex(text: &str) -> bool {
    text.len() == HEX_CHARS && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_contents_become_paths() {
        let hex = "0a".repeat(32);
        assert_eq!(parse(&hex), Some((Named::Sha256, hex.as_str())));
        assert_eq!(parse(&by_blake3(&hex)), Some((Named::Blake3, hex.as_str())));
        let bad = ["", "..", "../../etc/passwd", "blake3-", "blake3-../x", "md5-0a"].map(str::to_owned);
        assert!(is_unnamed(&unnamed(&hex, 3)) && !is_unnamed(&hex) && !is_unnamed(&by_blake3(&hex)));
        let longer = [hex.to_uppercase(), format!("{hex}0a"), format!("{}/a", "0".repeat(62)), format!("blake2-{hex}")];
        for bad in bad.iter().chain(&longer).chain([&unnamed(&hex, 3)]) {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }
}
