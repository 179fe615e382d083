//! The book's table of contents lists every page, and relative links in `docs/` lead to files.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

fn docs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs")
}

/// Returns the Markdown files below `directory`.
fn pages(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(pages(&path));
        } else if path.extension().is_some_and(|extension| extension == "md") {
            found.push(path);
        }
    }
    found
}

/// Returns `text` without what stands between backticks: code spans and fenced blocks.
fn without_code(text: &str) -> String {
    text.split('`').step_by(2).collect()
}

/// Returns the targets of inline links in `text` that are relative paths, without their fragments.
fn relative_links(text: &str) -> Vec<&str> {
    text.split("](")
        .skip(1)
        .filter_map(|rest| rest.split_once(')').map(|(target, _)| target))
        .filter(|target| !target.contains("://") && !target.starts_with('#') && !target.contains(' '))
        .map(|target| target.split('#').next().unwrap_or(target))
        .collect()
}

#[test]
fn relative_links_lead_to_files() {
    let mut checked = 0;
    for page in pages(&docs()) {
        let text = without_code(&std::fs::read_to_string(&page).unwrap());
        for link in relative_links(&text) {
            assert!(page.parent().unwrap().join(link).exists(), "{}: the link {link} leads nowhere", page.display());
            checked += 1;
        }
    }
    assert!(checked > 20, "only {checked} links were found");
}

#[test]
fn summary_lists_every_page() {
    let summary = std::fs::read_to_string(docs().join("SUMMARY.md")).unwrap();
    let listed: BTreeSet<_> = relative_links(&summary).into_iter().map(|link| docs().join(link)).collect();
    let written: BTreeSet<_> = pages(&docs()).into_iter().filter(|page| !page.ends_with("SUMMARY.md")).collect();
    assert_eq!(listed, written);
}
