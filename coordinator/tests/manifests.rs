//! One manifest for each rule of KServe's reference, beside this file in `manifests/`. Each says in its
//! first lines what is to come of it:
//!
//! - `# rule:` the rule, with its section in the reference
//! - `# expect:` for each document accepted, warned or refused
//! - `# finding:` text of a finding
//! - `# value:` a place in the last service, as a JSON pointer, and its value; null is absent
//! - `# silent:` text that no finding holds

use std::path::Path;

use pilotlight_coordinator::{
    manifest::{self, Reading},
    spec::{Document, Resource, Runtimes},
};
use serde_json::Value;

fn lines<'a>(text: &'a str, what: &str) -> Vec<&'a str> {
    let prefix = format!("# {what}: ");
    text.lines().filter_map(|line| line.strip_prefix(prefix.as_str())).collect()
}

fn verdict(document: &Document) -> &'static str {
    match (&document.object, document.findings.is_empty()) {
        (None, _) => "refused",
        (Some(_), true) => "accepted",
        (Some(_), false) => "warned",
    }
}

/// The last service as it would be stored, whatever was said of it.
fn service(documents: &[Document]) -> Value {
    let mut services = documents.iter().filter_map(|document| match &document.object {
        Some(Resource::InferenceService(service)) => Some(serde_json::to_value(service).unwrap()),
        _ => None,
    });
    services.next_back().unwrap_or_default()
}

/// What is wrong with one manifest's outcome.
fn check(text: &str) -> Vec<String> {
    let scaling = manifest::scaling_defaults();
    let runtimes = Runtimes::built_in();
    let reading = Reading { namespace: "default", strict: false, scaling: &scaling, runtimes: &runtimes };
    let documents = manifest::read(text, reading);
    let said: Vec<String> = documents.iter().flat_map(|document| &document.findings).map(ToString::to_string).collect();
    let mut wrong = Vec::new();

    let verdicts = documents.iter().map(verdict).collect::<Vec<_>>().join(", ");
    let expected = lines(text, "expect").concat();
    if verdicts != expected {
        wrong.push(format!("expected {expected}, came {verdicts}"));
    }
    for finding in lines(text, "finding") {
        if !said.iter().any(|said| said.contains(finding)) {
            wrong.push(format!("not said: {finding}"));
        }
    }
    for silent in lines(text, "silent") {
        if said.iter().any(|said| said.contains(silent)) {
            wrong.push(format!("said: {silent}"));
        }
    }
    let service = service(&documents);
    for line in lines(text, "value") {
        let (pointer, value) = line.split_once(" = ").expect("# value: POINTER = JSON");
        let value: Value = serde_json::from_str(value).expect("JSON");
        let found = service.pointer(pointer).cloned().unwrap_or_default();
        if found != value {
            wrong.push(format!("{pointer} is {found}, not {value}"));
        }
    }
    if !wrong.is_empty() {
        wrong.extend(said.iter().map(|said| format!("  said: {said}")));
    }
    wrong
}

#[test]
fn each_rule_holds() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/manifests");
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(files.len() > 100, "{} manifests", files.len());
    let mut wrong = Vec::new();
    for file in files {
        let text = std::fs::read_to_string(&file).unwrap();
        assert_eq!(lines(&text, "rule").len(), 1, "{} states one rule", file.display());
        let name = file.file_name().unwrap().to_string_lossy().into_owned();
        wrong.extend(check(&text).into_iter().map(|what| format!("{name}: {what}")));
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn built_in_runtimes_are_as_documented() {
    let runtimes = Runtimes::built_in();
    let names: Vec<_> = runtimes.iter().map(|runtime| runtime.name.as_str()).collect();
    let expected = [
        "huggingface",
        "lightgbm",
        "openvino",
        "paddle",
        "pmml",
        "sklearn",
        "tensorflow",
        "torchserve",
        "triton",
        "vllm",
        "vllm-sleep",
        "xgboost",
    ];
    assert_eq!(names, expected);
    let readme = include_str!("../../deploy/runtimes/README.md");
    for runtime in runtimes.iter() {
        assert!(readme.contains(&format!("`{}`", runtime.name)), "{} is in the list", runtime.name);
        for alias in &runtime.aliases {
            assert!(readme.contains(&format!("`{alias}`")), "{alias} is in the list");
        }
    }
}
