//! How deep a manifest is nested, told before it is parsed.
//!
//! The parser that reads manifests takes quadratic time for nested flow collections: 195 KB of `[` take half a minute,
//! before it refuses them. This check takes linear time: it reads events, stops at the first one that is too deep, and
//! the event parser itself refuses more than 255 levels of flow collections.

use saphyr_parser::{Event, Marker, Parser, ScanError};

use crate::finding::Finding;

/// Levels of lists and mappings in a manifest. An `InferenceService` has about 15.
pub(super) const DEPTH_MAX: usize = 100;

/// Checks that no document is nested deeper than [`DEPTH_MAX`].
///
/// # Errors
/// One is, or it cannot be told, with the place.
pub(super) fn check(manifest: &str) -> Result<(), Finding> {
    // What has fewer brackets is parsed quickly in any case; most manifests have.
    let brackets = manifest.bytes().filter(|byte| matches!(byte, b'[' | b'{')).count();
    if brackets <= DEPTH_MAX {
        return Ok(());
    }
    let mut depth = 0_usize;
    for event in Parser::new_from_str(manifest) {
        match event {
            Ok((Event::SequenceStart(..) | Event::MappingStart(..), span)) => {
                depth += 1;
                if depth > DEPTH_MAX {
                    return Err(at(&span.start, format!("is nested deeper than {DEPTH_MAX} levels")));
                }
            }
            Ok((Event::SequenceEnd | Event::MappingEnd, _)) => depth = depth.saturating_sub(1),
            Ok(_) => {}
            Err(error) => return Err(unreadable(&error)),
        }
    }
    Ok(())
}

fn unreadable(error: &ScanError) -> Finding {
    if error.info().contains("recursion limit") {
        return at(error.marker(), format!("is nested deeper than {DEPTH_MAX} levels"));
    }
    at(error.marker(), format!("not valid YAML: {}", error.info()))
}

fn at(place: &Marker, message: String) -> Finding {
    let mut finding = Finding::error("", "", format!("{message}; nothing after this place in the file was read"));
    finding.position = u32::try_from(place.line()).ok().zip(u32::try_from(place.col() + 1).ok());
    finding
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deep_nesting_is_refused_with_its_place_whatever_it_is_made_of() {
        for unit in ["[", "{", "{\"a\":", "{a: [", "[ #]\n", "['[', "] {
            let bomb = unit.repeat(100_000);
            let finding = check(&bomb).unwrap_err();
            assert!(finding.position.is_some(), "{unit:?}: {finding}");
            assert!(finding.message.contains("nested deeper than 100 levels"), "{unit:?}: {finding}");
        }
    }

    #[test]
    fn brackets_in_text_do_not_count() {
        let brackets = "[{".repeat(1000);
        let texts = [
            format!("a: \"{brackets}\""),
            format!("a: '{brackets}'"),
            format!("a: |\n  {brackets}\n  {brackets}"),
            format!("a: 1 # {brackets}"),
            format!("a: text {brackets}"),
        ];
        for text in texts {
            assert!(check(&text).is_ok(), "{}", &text[..20]);
        }
        let wide = format!("[{}]", "[1],".repeat(10_000));
        assert!(check(&wide).is_ok());
        let deep = format!("{}{}", "[".repeat(100), "]".repeat(100));
        assert!(check(&deep).is_ok());
        assert!(check(&format!("[{deep}]")).is_err());
    }
}
