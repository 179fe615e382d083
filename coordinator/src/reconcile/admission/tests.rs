use jiff::Timestamp;

use super::*;
use crate::{
    reconcile::{
        load::insert_revision,
        world::{ServiceState, Settings},
    },
    spec,
};

fn service(image: &str, metadata: &str, traffic: &str) -> InferenceService {
    spec::tests::service(
        &format!(
            "apiVersion: serving.knative.dev/v1\nkind: Service\nmetadata: {{name: hello}}\nspec:\n  template:\n    \
             metadata: {{{metadata}}}\n    spec: {{containers: [{{image: {image}, command: [serve]}}]}}\n  \
             traffic: [{traffic}]\n"
        ),
        true,
    )
}

/// The service with two revisions, of which only the first has been ready; it is called `hello-one`.
fn world() -> World {
    let mut world = World::new(Settings::for_tests());
    let latest = service("b:1", "", "");
    let record = ServiceRecord {
        component: Default::default(),
        uid: "1".into(),
        generation: 2,
        created_at: Timestamp::UNIX_EPOCH,
        latest_revision: 2,
        latest_ready: Some(1),
        latest_rolledout: Some(1),
        previous_rolledout: None,
        revision_names: [("hello-one".to_owned(), 1)].into(),
        service: latest.clone(),
    };
    for number in [1, 2] {
        let revision = record.revision(number, number == 1, Timestamp::UNIX_EPOCH);
        insert_revision(&mut world, revision, Timestamp::UNIX_EPOCH);
    }
    world.services.insert(record.key(), ServiceState::new(record));
    world
}

fn refusals(service: &InferenceService) -> Vec<String> {
    check(&world(), service).iter().map(ToString::to_string).collect()
}

fn half(name: &str) -> String {
    format!("{{latestRevision: true, percent: 50}}, {{revisionName: {name}, percent: 50}}")
}

#[test]
fn traffic_may_name_what_has_been_ready_and_what_is_made_now() {
    for name in ["hello-one", "hello-00001", "hello-predictor-00001"] {
        assert_eq!(refusals(&service("c:1", "", &half(name))), Vec::<String>::new(), "{name}");
    }
    assert_eq!(refusals(&service("c:1", "name: hello-new", &half("hello-new"))), Vec::<String>::new());
    // The second is on its way, and goes on.
    assert_eq!(refusals(&service("b:1", "", &half("hello-00002"))), Vec::<String>::new());
}

#[test]
fn traffic_may_name_nothing_else() {
    let [said] = &refusals(&service("c:1", "", &half("hello-00007")))[..] else { panic!("one refusal") };
    assert!(said.contains("spec.traffic[1].revisionName"), "{said}");
    assert!(said.contains("hello-predictor-00001, hello-predictor-00002"), "the known ones are named: {said}");
    let said = refusals(&service("c:1", "", &half("hello-00002"))).join("");
    assert!(said.contains("has never been ready, and is replaced"), "{said}");
    let said = refusals(&service("c:1", "", &half("other-00001"))).join("");
    assert!(said.contains("must be a revision of this service"), "{said}");
}

#[test]
fn a_revisions_name_is_given_once() {
    let said = refusals(&service("c:1", "name: hello-one", "")).join("");
    assert!(said.contains("spec.template.metadata.name") && said.contains("hello-predictor-00001"), "{said}");
}

#[test]
fn the_deployment_mode_stays() {
    let mut other = service("c:1", "", "");
    other.annotations.insert(MODE.into(), "Serverless".into());
    assert_eq!(refusals(&other), Vec::<String>::new(), "another name of the same mode");
    other.annotations.insert(MODE.into(), "RawDeployment".into());
    let said = refusals(&other).join("");
    assert!(said.contains("must stay Knative"), "{said}");
}

#[test]
fn named_shares_become_targets_and_keep_their_revisions() {
    let mut world = world();
    let state = world.services.get_mut("default/hello").unwrap();
    state.record.service =
        service("b:1", "", "{revisionName: hello-one, percent: 100, tag: old}, {latestRevision: true, tag: new}");
    let state = &world.services["default/hello"];
    let told: Vec<_> = world
        .destinations(state)
        .iter()
        .map(|target| {
            (target.revision, target.percent, target.tag.as_ref().map(ToString::to_string).unwrap_or_default())
        })
        .collect();
    assert_eq!(told, [(1, 0, "new".to_owned()), (1, 100, "old".to_owned())], "nothing newer has been ready");
    assert!(state.record.needs(1) && state.record.needs(2) && !state.record.needs(3));
    assert_eq!(state.record.canary(), 0);
}
