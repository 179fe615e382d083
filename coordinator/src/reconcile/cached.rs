//! Models and images on the nodes' disks, as their agents report them. Pure.

use std::collections::BTreeSet;

use pilotlight_proto::{control::v1 as control, fleet::v1 as fleet};

use super::{
    shelf,
    world::{NodeState, World},
};

/// Addresses of the models of a report. Which version of an address is there does not count: most of a
/// changed model's files are the same, and only the node can tell.
pub fn addresses(report: &fleet::CacheReport) -> BTreeSet<String> {
    report.models.iter().map(|model| model.uri.clone()).collect()
}

/// True where an image goes by this name, digest or id.
pub fn is(image: &fleet::CachedImage, name: &str) -> bool {
    image.names.iter().any(|own| own == name) || image.digest == name || image.id == name
}

/// All models and images of one node, or of all where `node` is empty, in order. `None`: no such node has
/// joined.
pub fn list(world: &World, node: &str) -> Option<control::ListCacheResponse> {
    if !node.is_empty() && !world.nodes.contains_key(node) {
        return None;
    }
    let nodes = || world.nodes.values().filter(|state| node.is_empty() || state.record.name == node);
    let (mut models, mut images) = (Vec::new(), Vec::new());
    for state in nodes() {
        models.extend(state.cached.models.iter().map(|model| of(state, model)));
        images.extend(state.cached.images.iter().map(|image| pulled(state, image)));
        for uri in missing(world, state) {
            let failure = state.cached.failures.iter().find(|failure| failure.uri == uri);
            let (node, pinned) = (state.record.name.clone(), shelf::pinned(world, &state.record.name, uri));
            let rung = if failure.is_some() { "Failed" } else { "Pending" }.to_owned();
            let message = failure.map(|failure| failure.message.clone()).unwrap_or_default();
            if shelf::is_image(uri) {
                let image = uri.to_owned();
                images.push(control::CachedImage { node, image, pinned, rung, message, ..Default::default() });
            } else {
                let uri = uri.to_owned();
                models.push(control::CachedModel { node, uri, pinned, rung, message, ..Default::default() });
            }
        }
    }
    models.sort_by(|a, b| (&a.node, &a.uri, &a.key).cmp(&(&b.node, &b.uri, &b.key)));
    images.sort_by(|a, b| (&a.node, &a.image, &a.id).cmp(&(&b.node, &b.image, &b.id)));
    Some(control::ListCacheResponse { models, images })
}

/// Models and images that operators keep warm on a node and that are not there.
fn missing<'a>(world: &'a World, node: &'a NodeState) -> BTreeSet<&'a str> {
    let there = |uri: &str| {
        node.cached.models.iter().any(|model| model.uri == uri) || node.cached.images.iter().any(|image| is(image, uri))
    };
    shelf::kept_warm(world, &node.record.name).filter(|uri| !there(uri)).collect()
}

fn pulled(node: &NodeState, image: &fleet::CachedImage) -> control::CachedImage {
    let unnamed = || if image.digest.is_empty() { &image.id } else { &image.digest };
    control::CachedImage {
        node: node.record.name.clone(),
        image: image.names.first().unwrap_or_else(unnamed).clone(),
        id: image.id.clone(),
        digest: image.digest.clone(),
        bytes: image.bytes,
        in_use: image.in_use,
        pinned: image.pinned,
        last_used: image.last_used,
        pull_took: image.pull_took,
        rung: "Cached".to_owned(),
        message: failure(node, image.names.first().map_or("", String::as_str)),
    }
}

fn of(node: &NodeState, model: &fleet::CachedModel) -> control::CachedModel {
    control::CachedModel {
        node: node.record.name.clone(),
        uri: model.uri.clone(),
        key: model.key.clone(),
        bytes: model.bytes,
        in_use: model.in_use,
        pinned: model.pinned,
        last_used: model.last_used,
        resident_bytes: model.resident_bytes,
        fetch_took: model.fetch_took,
        rung: if model.staged { "Staged" } else { "Cached" }.to_owned(),
        message: failure(node, &model.uri),
    }
}

/// Why a model or an image is not kept as asked for; empty if it is.
fn failure(node: &NodeState, uri: &str) -> String {
    let found = node.cached.failures.iter().find(|failure| failure.uri == uri);
    found.map(|failure| failure.message.clone()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;
    use crate::{
        model::{ModelRecord, NodeRecord, WarmRung},
        reconcile::world::Settings,
    };

    fn world(failures: &[(&str, &str)]) -> World {
        let mut world = World::new(Settings::for_tests());
        let record = NodeRecord::new("gpu-1", Timestamp::UNIX_EPOCH);
        let mut node = NodeState::unheard(record, Timestamp::UNIX_EPOCH);
        node.cached.failures = failures
            .iter()
            .map(|(uri, message)| fleet::CacheFailure { uri: (*uri).to_owned(), message: (*message).to_owned() })
            .collect();
        world.nodes.insert("gpu-1".into(), node);
        for uri in ["s3://b/m", "registry/image:1"] {
            let (node, rung) = (None, Some(WarmRung::Cached));
            let record = ModelRecord { uri: uri.into(), node, rung, pinned: false, service: None };
            world.asked.insert((None, uri.into()), record);
        }
        world
    }

    #[test]
    fn a_model_that_is_asked_for_and_not_there_is_pending() {
        let list = list(&world(&[]), "").unwrap();
        assert_eq!((list.models[0].uri.as_str(), list.models[0].rung.as_str()), ("s3://b/m", "Pending"));
        assert_eq!((list.images[0].image.as_str(), list.images[0].rung.as_str()), ("registry/image:1", "Pending"));
    }

    #[test]
    fn a_model_that_cannot_be_fetched_is_failed_and_says_why() {
        let list = list(&world(&[("s3://b/m", "connection refused")]), "gpu-1").unwrap();
        assert_eq!((list.models[0].rung.as_str(), list.models[0].message.as_str()), ("Failed", "connection refused"));
        assert_eq!(list.images[0].rung, "Pending");
    }

    #[test]
    fn a_model_that_is_there_is_listed_once() {
        let mut world = world(&[]);
        let model = fleet::CachedModel { uri: "s3://b/m".into(), ..Default::default() };
        world.nodes.get_mut("gpu-1").unwrap().cached.models = vec![model];
        let list = list(&world, "").unwrap();
        assert_eq!(list.models.iter().map(|model| model.rung.as_str()).collect::<Vec<_>>(), ["Cached"]);
    }
}
