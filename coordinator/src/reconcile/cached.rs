//! Models and images on the nodes' disks, as their agents report them. Pure.

use std::collections::BTreeSet;

use pilotlight_proto::{control::v1 as control, fleet::v1 as fleet};

use super::world::{NodeState, World};

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
    let mut models: Vec<_> =
        nodes().flat_map(|state| state.cached.models.iter().map(|model| of(state, model))).collect();
    models.sort_by(|a, b| (&a.node, &a.uri, &a.key).cmp(&(&b.node, &b.uri, &b.key)));
    let mut images: Vec<_> =
        nodes().flat_map(|state| state.cached.images.iter().map(|image| pulled(state, image))).collect();
    images.sort_by(|a, b| (&a.node, &a.image, &a.id).cmp(&(&b.node, &b.image, &b.id)));
    Some(control::ListCacheResponse { models, images })
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
    }
}
