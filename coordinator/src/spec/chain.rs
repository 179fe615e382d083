//! What a transformer or explainer is told of its predictor.

use super::model::Component;

/// The variable in which an agent puts `<address>:<port>` of the service's predictor, as its replica
/// reaches it. It exists only in replicas of transformers and explainers.
const PREDICTOR_HOST: &str = "PILOTLIGHT_PREDICTOR_HOST";

/// Adds the arguments by which KServe's own servers learn what they are part of, where the manifest does
/// not give them: the same ones, in the same order, as KServe's controller.
pub(super) fn point_at_predictor(component: &mut Component, concurrency_given: bool, service: &str) {
    let concurrency = component.scaling.container_concurrency.to_string();
    let container = &mut component.template.container;
    for (name, value) in [
        ("--model_name", Some(service.to_owned())),
        ("--predictor_host", Some(format!("$({PREDICTOR_HOST})"))),
        ("--http_port", Some("$(PORT)".to_owned())),
        ("--workers", concurrency_given.then_some(concurrency)),
    ] {
        let given = |word: &String| word == name || word.strip_prefix(name).is_some_and(|rest| rest.starts_with('='));
        if let Some(value) = value
            && !container.command.iter().chain(&container.args).any(given)
        {
            container.args.extend([name.to_owned(), value]);
        }
    }
}
