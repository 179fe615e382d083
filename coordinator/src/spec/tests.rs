//! Whatever it is given, the parser answers: arbitrary text, and manifests that were good before.

use std::path::Path;

use proptest::{prelude::*, sample::Index};
use serde_json::{Value, json};

use super::{InferenceService, ParseOptions, Resource, Runtimes, parse};

/// The one service of a manifest that must be good.
pub(crate) fn service(manifest: &str, strict: bool) -> InferenceService {
    let runtimes = Runtimes::built_in();
    let options =
        ParseOptions { default_namespace: "", strict, validate_scaling: &|_, _| Vec::new(), runtimes: &runtimes };
    let document = parse(manifest, options).swap_remove(0);
    let Some(Resource::InferenceService(service)) = document.object else { panic!("{:?}", document.findings) };
    *service
}

/// Manifests to begin with: those that state the rules.
fn good() -> Vec<String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/manifests");
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files.iter().map(|file| std::fs::read_to_string(file).unwrap()).collect()
}

/// Parses, and checks what holds for every answer.
fn answer(text: &str, strict: bool) {
    let runtimes = Runtimes::built_in();
    let options =
        ParseOptions { default_namespace: "", strict, validate_scaling: &|_, _| Vec::new(), runtimes: &runtimes };
    let documents = parse(text, options);
    assert!(!documents.is_empty(), "there is always an answer");
    for document in &documents {
        let refused = document.findings.iter().any(|finding| finding.is_error());
        assert_eq!(document.object.is_none(), refused, "refused if and only if there is an error: {document:?}");
        assert!(document.findings.iter().all(|finding| !finding.message.is_empty()));
        if let Some(Resource::InferenceService(service)) = &document.object {
            let stored = serde_json::to_string(service).unwrap();
            assert_eq!(**service, serde_json::from_str(&stored).unwrap(), "what is stored is what is read");
        }
    }
    assert_eq!(documents, parse(text, options), "the same text gives the same answer");
}

/// Values that a field might hold by mistake.
fn odd() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::Bool),
        any::<i64>().prop_map(|number| json!(number)),
        any::<f64>().prop_map(|number| json!(number)),
        "\\PC{0,12}".prop_map(Value::String),
        Just(json!("{{.Labels.x}}")),
        Just(json!("{{")),
        Just(json!([])),
        Just(json!({})),
        Just(json!([{}, null, [[]], {"name": "kserve-container"}])),
        Just(json!({"name": {"name": []}})),
    ]
}

/// Puts `odd` somewhere into `value`, down the way that `turns` take.
fn mutate(value: &mut Value, turns: &[Index], odd: Value) {
    let Some((turn, rest)) = turns.split_first() else {
        *value = odd;
        return;
    };
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            let place = turn.index(fields.len());
            if let Some(next) = fields.values_mut().nth(place) {
                mutate(next, rest, odd);
            }
        }
        Value::Array(values) if !values.is_empty() => {
            let place = turn.index(values.len());
            mutate(&mut values[place], rest, odd);
        }
        other => *other = odd,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(192) })]

    #[test]
    fn arbitrary_text_is_answered(text in "(?s).{0,200}", yaml in "[-a-z:{}\\[\\]&*!|>'\"%@`#,? \n\t0-9]{0,200}") {
        answer(&text, false);
        answer(&yaml, true);
    }

    #[test]
    fn a_cut_and_spoilt_manifest_is_answered(
        which in any::<Index>(), from in any::<Index>(), to in any::<Index>(), put in "\\PC{0,6}", strict in any::<bool>()
    ) {
        let all = good();
        let mut signs: Vec<char> = all[which.index(all.len())].chars().collect();
        let (from, to) = (from.index(signs.len()), to.index(signs.len()));
        // A short piece is replaced, so that most of the manifest still makes sense.
        let (from, to) = (from.min(to), from.max(to).min(from.min(to) + 12));
        signs.splice(from..to, put.chars());
        answer(&signs.into_iter().collect::<String>(), strict);
    }

    #[test]
    fn a_manifest_with_odd_values_is_answered(
        which in any::<Index>(), turns in prop::collection::vec(any::<Index>(), 1..9), odd in odd(), strict in any::<bool>()
    ) {
        let all = good();
        let text = &all[which.index(all.len())];
        let mut documents: Vec<Value> =
            super::documents::read(text).into_iter().filter_map(|source| source.content.ok()).collect();
        prop_assume!(!documents.is_empty());
        let place = turns[0].index(documents.len());
        mutate(&mut documents[place], &turns, odd);
        let spoilt: Vec<String> = documents.iter().map(ToString::to_string).collect();
        answer(&spoilt.join("\n---\n"), strict);
    }
}

#[test]
fn deep_and_wide_text_ends() {
    for text in [
        "[".repeat(100_000),
        "{a: ".repeat(10_000),
        "a: &a [x, x]\n".to_owned() + &(0..40).map(|n| format!("b{n}: &b{n} [*a, *a]\n")).collect::<String>(),
        "- ".repeat(50_000),
        "a: 1\n---\n".repeat(2_000),
    ] {
        answer(&text, false);
    }
    // References that double with each line.
    let bomb =
        (0..40).fold("a0: &a0 [x]\n".to_owned(), |text, n| text + &format!("a{}: &a{} [*a{n}, *a{n}]\n", n + 1, n + 1));
    answer(&bomb, false);
}
