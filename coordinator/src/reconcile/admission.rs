//! What can only be judged beside what is there already: whether a service may become what is applied. Pure.

#[cfg(test)]
mod tests;

use super::world::World;
use crate::{
    finding::Finding,
    model::{ServiceRecord, service_key},
    spec::{InferenceService, TrafficShare},
};

const MODE: &str = "serving.kserve.io/deploymentMode";

/// Everything for which the service is refused; empty where it may be stored.
pub fn check(world: &World, service: &InferenceService) -> Vec<Finding> {
    let key = service_key(&service.namespace, &service.name, Default::default());
    let former = world.services.get(&key).map(|state| &state.record);
    let mut findings = Vec::new();
    findings.extend(former.and_then(|former| mode_changed(former, service)));
    findings.extend(former.and_then(|former| name_taken(former, service)));
    for (index, share) in service.traffic.iter().enumerate() {
        findings.extend(share_refused(world, former, service, share, index));
    }
    findings
}

/// KServe: the deployment mode of a service is what it was created with.
fn mode_changed(former: &ServiceRecord, service: &InferenceService) -> Option<Finding> {
    let mode = |service: &InferenceService| match service.annotations.get(MODE).map(String::as_str) {
        Some("Standard" | "RawDeployment") => "Standard",
        _ => "Knative",
    };
    let (was, is) = (mode(&former.service), mode(service));
    (was != is).then(|| {
        let message = format!("must stay {was}, with which the service was created; delete it to change that");
        Finding::error(format!("metadata.annotations[{MODE}]"), is, message)
    })
}

/// Knative: a name that was given to a revision is never given to another one.
fn name_taken(former: &ServiceRecord, service: &InferenceService) -> Option<Finding> {
    let name = service.revision_name.as_ref()?;
    let number = former.revision_names.get(name)?;
    let same = *number == former.latest_revision && former.service.predictor.template == service.predictor.template;
    (!same).then(|| {
        let message = format!("is the name of revision {}, whose template is another", former.revision_name(*number));
        Finding::error("spec.template.metadata.name", name, message)
    })
}

/// A revision that traffic names must be there, and have been ready or be the one that is made now.
fn share_refused(
    world: &World,
    former: Option<&ServiceRecord>,
    service: &InferenceService,
    share: &TrafficShare,
    index: usize,
) -> Option<Finding> {
    let name = share.revision.as_ref()?;
    if service.revision_name.as_ref() == Some(name) {
        return None;
    }
    let field = format!("spec.traffic[{index}].revisionName");
    let found = former.and_then(|former| {
        let number = former.revision_number(name)?;
        world.revisions.get(&former.revision_key(number))
    });
    match found {
        Some(revision) if revision.record.been_ready => None,
        // It may become ready yet, unless this very manifest replaces it.
        Some(revision) if former.is_some_and(|former| former.latest_revision == revision.record.number) => {
            let replaced = revision.record.template != service.predictor.template;
            replaced.then(|| Finding::error(field, name, "has never been ready, and is replaced by this manifest"))
        }
        Some(_) => Some(Finding::error(field, name, "has never been ready")),
        None => {
            let known = world.revisions.values().map(|revision| &revision.record);
            let known = known.filter(|record| record.namespace == service.namespace && record.service == service.name);
            let known: Vec<_> = known.map(|record| record.name.as_str()).collect();
            let known = if known.is_empty() { "none yet".to_owned() } else { known.join(", ") };
            Some(Finding::error(
                field,
                name,
                format!("must be a revision of this service, of which there are: {known}"),
            ))
        }
    }
}
