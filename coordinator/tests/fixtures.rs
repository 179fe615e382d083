//! Real manifests of KServe's and CoreWeave's repositories. They are other people's files and not part of
//! this repository: they lie in `../shared`, and where that folder is absent this test says so and passes.

#![allow(clippy::print_stdout)]

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use pilotlight_coordinator::{
    manifest::{self, Reading},
    spec::{Document, Resource, Runtimes},
};

/// Files that hold placeholders which make them no YAML.
const NOT_YAML: [&str; 2] = [
    "coreweave-argo-sd-finetuner-workflow-inferenceservice.yaml",
    "kserve-v1beta1-custom-torchserve-torchserve-custom.yaml",
];
/// Percent of the files that are to be accepted at least.
const ACCEPTED_LEAST: usize = 85;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/fixtures/inferenceservices")
}

/// Name and documents of each fixture; `None` where there are none.
fn read_all() -> Option<BTreeMap<String, Vec<Document>>> {
    let Ok(entries) = std::fs::read_dir(folder()) else {
        println!("skipped: {} is not there", folder().display());
        return None;
    };
    let scaling = manifest::scaling_defaults();
    let runtimes = Runtimes::built_in();
    let reading = Reading { namespace: "default", strict: false, scaling: &scaling, runtimes: &runtimes };
    let yaml =
        entries.map(|entry| entry.unwrap().path()).filter(|path| path.extension().is_some_and(|end| end == "yaml"));
    let read = yaml.map(|path| {
        let text = std::fs::read_to_string(&path).unwrap();
        (path.file_name().unwrap().to_string_lossy().into_owned(), manifest::read(&text, reading))
    });
    Some(read.collect())
}

/// True for a kind that is not the fleet's: the rest of its file is applied all the same.
fn is_foreign(document: &Document) -> bool {
    document.object.is_none() && document.findings.iter().any(|finding| finding.field == "kind")
}

#[test]
fn every_fixture_is_accepted_or_refused_with_a_reason() {
    let Some(fixtures) = read_all() else { return };
    assert!(fixtures.len() >= 59, "{} files", fixtures.len());
    let mut refused = Vec::new();
    for (name, documents) in &fixtures {
        assert!(!documents.is_empty(), "{name}");
        for document in documents.iter().filter(|document| document.object.is_none()) {
            let errors: Vec<_> = document.findings.iter().filter(|finding| finding.is_error()).collect();
            assert!(!errors.is_empty(), "{name} is refused without a reason");
            for error in errors {
                let placed = !error.field.is_empty() || error.position.is_some();
                assert!(placed && !error.message.is_empty(), "{name}: {error}");
            }
        }
        let own: Vec<_> = documents.iter().filter(|document| !is_foreign(document)).collect();
        if own.is_empty() || own.iter().any(|document| document.object.is_none()) {
            let why = own.iter().flat_map(|document| &document.findings).find(|finding| finding.is_error());
            refused.push(format!("{name}: {}", why.map(ToString::to_string).unwrap_or_default()));
        }
    }
    let accepted = fixtures.len() - refused.len();
    let percent = 100.0 * accepted as f64 / fixtures.len() as f64;
    println!("{accepted} of {} files accepted, {percent:.1} %; refused:", fixtures.len());
    refused.iter().for_each(|line| println!("  {line}"));
    assert!(accepted * 100 >= ACCEPTED_LEAST * fixtures.len(), "{percent:.1} % accepted");
}

#[test]
fn what_is_not_yaml_is_refused_with_line_and_column() {
    let Some(fixtures) = read_all() else { return };
    for name in NOT_YAML {
        let [document] = &fixtures[name][..] else { panic!("{name} has several documents") };
        assert!(document.object.is_none(), "{name}");
        assert!(document.findings[0].position.is_some(), "{name}: {}", document.findings[0]);
    }
}

#[test]
fn what_is_accepted_can_be_stored_and_read_back() {
    let Some(fixtures) = read_all() else { return };
    let mut services = 0;
    for (name, documents) in fixtures {
        for document in documents {
            let Some(Resource::InferenceService(service)) = document.object else { continue };
            let stored = serde_json::to_vec(&service).unwrap();
            let read = serde_json::from_slice(&stored).unwrap();
            assert_eq!(*service, read, "{name}");
            services += 1;
        }
    }
    assert!(services >= 50, "{services}");
}
