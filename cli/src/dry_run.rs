//! `pilotlight apply --dry-run=client`: what a coordinator would say, without one.

use std::fmt::Write as _;

use pilotlight_coordinator::{
    finding::Finding,
    manifest::{self, Reading},
    spec::{Document, Runtimes},
};

use crate::{failure::Failure, manifests::Manifest, output};

/// Prints a line for each document, and below it what else there is to say.
///
/// # Errors
/// A document is refused.
pub fn run(manifests: &[Manifest], namespace: &str, strict: bool) -> Result<(), Failure> {
    let scaling = manifest::scaling_defaults();
    let mut runtimes = Runtimes::built_in();
    for manifest in manifests {
        let known = runtimes.clone();
        let reading = Reading { namespace, strict, scaling: &scaling, runtimes: &known };
        manifest::add_runtimes(&manifest.text, reading, &mut runtimes);
    }
    let reading = Reading { namespace, strict, scaling: &scaling, runtimes: &runtimes };
    let mut refused = false;
    let mut text = String::new();
    for manifest in manifests {
        for document in manifest::read(&manifest.text, reading) {
            refused |= document.object.is_none();
            text.push_str(&describe(&manifest.source, &document));
        }
    }
    output::print(&text)?;
    if refused { Err(Failure::Refused) } else { Ok(()) }
}

/// `file: kind/name: accepted | warned | refused`, with the first finding; errors come first.
fn describe(source: &str, document: &Document) -> String {
    let (errors, warnings): (Vec<_>, Vec<_>) = document.findings.iter().partition(|finding| finding.is_error());
    let verdict = match () {
        () if document.object.is_none() => "refused",
        () if warnings.is_empty() => "accepted",
        () => "warned",
    };
    let mut findings = errors.into_iter().chain(warnings);
    let first = findings.next();
    let place = match first.and_then(|finding| finding.position) {
        Some((line, column)) => format!("{source}:{line}:{column}"),
        None => source.to_owned(),
    };
    let object = match (document.kind.as_str(), document.name.as_str()) {
        ("", "") => format!("document {}", document.index + 1),
        (kind, name) => format!("{}/{}", or_unknown(kind), or_unknown(name)),
    };
    let mut text = format!("{place}: {object}: {verdict}");
    if let Some(first) = first {
        text.push_str(": ");
        text.push_str(&say(first));
    }
    text.push('\n');
    for finding in findings {
        let level = if finding.is_error() { "refused" } else { "warned" };
        // Writing to a string does not fail.
        let _ = writeln!(text, "    {level}: {}", say(finding));
    }
    text
}

fn or_unknown(text: &str) -> &str {
    if text.is_empty() { "?" } else { text }
}

/// Without the position, which stands before.
fn say(finding: &Finding) -> String {
    // One line for each, whatever a manifest's own text holds.
    Finding { position: None, ..finding.clone() }.to_string().replace(['\n', '\r'], " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_for_each_document_first() {
        let scaling = manifest::scaling_defaults();
        let runtimes = Runtimes::built_in();
        let reading = Reading { namespace: "", strict: false, scaling: &scaling, runtimes: &runtimes };
        let text =
            "kind: Job\nmetadata: {name: j}\n---\napiVersion: v1\nkind: Secret\nmetadata: {name: s}\n---\na: {{b}}\n";
        let said: Vec<_> = manifest::read(text, reading).iter().map(|document| describe("x.yaml", document)).collect();
        assert!(said[0].starts_with("x.yaml: Job/j: refused: kind: Job is not a kind this fleet serves"), "{said:?}");
        assert_eq!(said[1], "x.yaml: Secret/s: accepted\n");
        assert!(said[2].starts_with("x.yaml:8:4: document 3: refused: not valid YAML"), "{said:?}");
    }
}
