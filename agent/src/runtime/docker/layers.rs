//! How many bytes an image's layers have. Pure.

use std::collections::BTreeMap;

/// A layer without any file: several tools make it, and it has no bytes.
const EMPTY: &str = "sha256:5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef";
/// Instructions that make no layer.
const NO_LAYER: [&str; 13] = [
    "ARG",
    "CMD",
    "ENTRYPOINT",
    "ENV",
    "EXPOSE",
    "HEALTHCHECK",
    "LABEL",
    "MAINTAINER",
    "ONBUILD",
    "SHELL",
    "STOPSIGNAL",
    "USER",
    "VOLUME",
];

/// A step of an image's history: what made it, and its bytes.
pub(super) type Step<'a> = (&'a str, u64);

/// Bytes by layer, whose sum is `size`. `layers` are from the lowest to the highest, `history` the other way
/// round, as engines give them. What layers do not account for is the image's own, and so is all of it where
/// the engine does not say which step made which layer.
pub(super) fn bytes(id: &str, size: u64, layers: &[String], history: &[Step<'_>]) -> BTreeMap<String, u64> {
    let layers: Vec<_> = layers.iter().filter(|layer| *layer != EMPTY).collect();
    let fits = |keep: &dyn Fn(&Step<'_>) -> bool| {
        let steps: Vec<u64> = history.iter().rev().filter(|step| keep(step)).map(|(_, bytes)| *bytes).collect();
        (steps.len() == layers.len()).then_some(steps)
    };
    let steps = fits(&|(_, bytes)| *bytes > 0).or_else(|| fits(&|(by, bytes)| *bytes > 0 || makes_layer(by)));
    let named = steps.into_iter().flatten().zip(layers).map(|(bytes, layer)| (layer.clone(), bytes));
    let mut found: BTreeMap<String, u64> = named.collect();
    let rest = size.saturating_sub(found.values().sum());
    if rest > 0 || found.is_empty() {
        found.insert(id.to_owned(), rest);
    }
    found
}

/// False for a step that only changes the image's configuration.
fn makes_layer(created_by: &str) -> bool {
    let step = created_by.strip_prefix("/bin/sh -c #(nop)").unwrap_or(created_by).trim_start();
    let word = step.split_whitespace().next().unwrap_or_default();
    !word.is_empty() && !NO_LAYER.contains(&word)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "sha256:1d";

    fn of(size: u64, layers: &[&str], history: &[Step<'_>]) -> Vec<(String, u64)> {
        let layers: Vec<String> = layers.iter().map(|layer| (*layer).to_owned()).collect();
        bytes(ID, size, &layers, history).into_iter().collect()
    }

    fn named(expected: &[(&str, u64)]) -> Vec<(String, u64)> {
        expected.iter().map(|(layer, bytes)| ((*layer).to_owned(), *bytes)).collect()
    }

    #[test]
    fn steps_with_bytes_are_layers_from_the_lowest() {
        let history = [("CMD [\"/x\"]", 0), ("COPY own", 2), ("ENV A=b", 0), ("COPY base", 10)];
        assert_eq!(of(12, &["a", "b"], &history), named(&[("a", 10), ("b", 2)]));
        assert_eq!(of(12, &["a", EMPTY, "b"], &history), named(&[("a", 10), ("b", 2)]));
    }

    #[test]
    fn layers_without_bytes_are_told_by_what_made_them() {
        // As Docker 20.10 and BuildKit have it.
        let history = [
            ("/bin/sh -c #(nop)  CMD [\"/own\"]", 0),
            ("/bin/sh -c #(nop) COPY file:0b in /own ", 2),
            ("WORKDIR /x", 0),
            ("/bin/sh -c #(nop)  ENV A=b", 0),
            ("/bin/sh -c #(nop) COPY file:4d in /base ", 10),
        ];
        assert_eq!(of(12, &["a", "b", "c"], &history), named(&[("a", 10), ("b", 0), ("c", 2)]));
    }

    #[test]
    fn what_cannot_be_told_is_the_images_own() {
        assert_eq!(of(12, &["a", "b"], &[("", 12)]), named(&[(ID, 12)]));
        assert_eq!(of(12, &["a"], &[]), named(&[(ID, 12)]));
        assert_eq!(of(0, &[], &[]), named(&[(ID, 0)]));
        // An engine that keeps what it has downloaded, too.
        assert_eq!(of(15, &["a"], &[("COPY", 10)]), named(&[("a", 10), (ID, 5)]));
    }
}
