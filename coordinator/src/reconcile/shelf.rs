//! What is to become of models and images on nodes, beside what their replicas need.

use std::collections::{BTreeMap, BTreeSet};

use pilotlight_proto::fleet::v1::{self as fleet, ReplicaPhase};
use tracing::info;

use super::{
    cached,
    commands::CommandError,
    mounted,
    run::{Reconciler, WRITES_AT_ONCE},
    storage::{self, Credentials},
    world::{NodeState, World},
};
use crate::{
    model::{ModelRecord, ServiceKey, WarmRung, keys, owner},
    spec,
    store::Transaction,
};

/// Schemes of addresses that agents keep on their disks.
const KEPT: [&str; 5] = ["s3", "gs", "hf", "https", "http"];
/// Longest address, bytes.
const ADDRESS_MOST: usize = 2048;
/// Rank of what operators asked for: it goes after all that is kept by the coordinator's own choice.
const ASKED: u32 = u32::MAX;

/// What an operator asks for of a model, or takes back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelChange {
    /// Keep it, at least at this rung.
    Warm {
        /// Which.
        rung: WarmRung,
        /// Whose secrets it is fetched with.
        service: Option<ServiceKey>,
    },
    /// Keep it from being removed, or not any more.
    Pin(bool),
    /// Take back all that was asked for.
    Forget,
}

/// True for what can only be an image's name: addresses of models have a scheme.
pub fn is_image(uri: &str) -> bool {
    let sign = |sign: char| sign.is_ascii_alphanumeric() || "._-/:@".contains(sign);
    // "s3:/bucket" is an address with a slip.
    !uri.contains(":/") && uri.starts_with(|sign: char| sign.is_ascii_alphanumeric()) && uri.chars().all(sign)
}

/// Refuses addresses of which no node keeps a copy. Names of images are taken.
///
/// # Errors
/// Names the field, the value and what is allowed.
pub fn check_address(uri: &str) -> Result<(), String> {
    let allowed = || KEPT.map(|scheme| format!("{scheme}://")).join(", ");
    if uri.len() > ADDRESS_MOST || uri.chars().any(|c| c.is_whitespace() || c.is_control()) {
        return Err(format!("uri: {uri:?}: expected at most {ADDRESS_MOST} bytes without white space"));
    }
    match uri.split_once("://") {
        None if is_image(uri) => spec::check_image(uri).map_err(|wrong| format!("uri: {uri:?}: {wrong}")),
        Some((scheme, _)) if KEPT.contains(&scheme) => {
            spec::check_storage_uri(uri).map_err(|wrong| format!("uri: {uri:?}: {wrong}"))
        }
        Some((scheme @ ("pvc" | "file"), _)) => {
            Err(format!("uri: {uri:?}: {scheme}:// is served in place and not kept; expected one of {}", allowed()))
        }
        _ => Err(format!("uri: {uri:?}: expected an address that begins with one of {}, or an image", allowed())),
    }
}

/// What is to become of models on a node, in order of address.
pub fn models(world: &World, node: &NodeState) -> Vec<fleet::ModelAssignment> {
    let mut all = BTreeMap::new();
    for record in asked(world, &node.record.name).filter(|record| !is_image(&record.uri)) {
        let model = of_record(world, record);
        let peers = storage::peers(world, &node.record.name, &model.uri);
        raise(&mut all, fleet::ModelAssignment { peers, ..model });
    }
    chosen(node, &mut all);
    all.into_values().collect()
}

/// What is to become of images on a node, in order of name.
pub fn images(world: &World, node: &NodeState) -> Vec<fleet::ImageAssignment> {
    let mut all: BTreeMap<&str, fleet::ImageAssignment> = BTreeMap::new();
    for record in asked(world, &node.record.name).filter(|record| is_image(&record.uri)) {
        let image = all.entry(&record.uri).or_default();
        (image.pinned, image.keep) = (image.pinned | record.pinned, ASKED);
        image.warm |= record.rung.is_some();
        let service = record.service.as_ref().and_then(|service| world.newest(world.services.get(service)?));
        if let Some(revision) = service.filter(|_| image.registry_configs.is_empty()) {
            let (namespace, secrets) = (&revision.record.namespace, &revision.record.template.image_pull_secrets);
            image.registry_configs = mounted::registry_configs(&world.settings.values, namespace, secrets);
        }
    }
    for (name, keep) in &node.shelf.images {
        let image = all.entry(name).or_default();
        image.keep = image.keep.max(*keep);
    }
    all.into_iter().map(|(name, image)| fleet::ImageAssignment { image: name.to_owned(), ..image }).collect()
}

/// Adds what the coordinator itself has chosen by [`super::warmth`]. It has nothing fetched: what is not there
/// any more is not asked for.
fn chosen(node: &NodeState, all: &mut BTreeMap<String, fleet::ModelAssignment>) {
    for (uri, keep) in &node.shelf.keep {
        let model = all.entry(uri.clone()).or_insert_with(|| fleet::ModelAssignment {
            uri: uri.clone(),
            keep: *keep,
            unresolved: "it is not fetched ahead of its replicas".to_owned(),
            ..Default::default()
        });
        if node.shelf.staged.contains(uri) {
            model.set_rung(fleet::Rung::Staged);
        }
    }
}

/// Adds what else is wanted of a model: the higher rung and rank hold, and the first credentials.
fn raise(all: &mut BTreeMap<String, fleet::ModelAssignment>, more: fleet::ModelAssignment) {
    let Some(model) = all.get_mut(&more.uri) else {
        all.insert(more.uri.clone(), more);
        return;
    };
    model.rung = model.rung.max(more.rung);
    model.pinned |= more.pinned;
    model.keep = model.keep.max(more.keep);
    if model.credentials.is_empty() && model.unresolved.is_empty() {
        (model.credentials, model.unresolved) = (more.credentials, more.unresolved);
    }
}

/// What operators asked for on a node: of it alone, and then of all.
fn asked<'a>(world: &'a World, node: &'a str) -> impl Iterator<Item = &'a ModelRecord> {
    let of = move |node: Option<&'a str>| world.asked.values().filter(move |record| record.node.as_deref() == node);
    of(Some(node)).chain(of(None))
}

/// What operators keep warm on a node. Something that is asked for on this node and on all is there twice.
pub(super) fn kept_warm<'a>(world: &'a World, node: &'a str) -> impl Iterator<Item = &'a str> {
    asked(world, node).filter(|record| record.rung.is_some()).map(|record| record.uri.as_str())
}

/// Returns `true` if an operator has pinned a model or an image on a node.
pub(super) fn pinned(world: &World, node: &str, uri: &str) -> bool {
    asked(world, node).any(|record| record.uri == uri && record.pinned)
}

/// Returns `true` if images can be pulled on a node, or on some node if none is given. A node that has not reported
/// its runtimes, and a fleet without nodes, may still be able to.
pub fn may_pull_images(world: &World, node: Option<&str>) -> bool {
    let mut nodes = world.nodes.values().filter(|state| node.is_none_or(|node| state.record.name == node)).peekable();
    let engine = |inventory: &fleet::Inventory| inventory.runtimes.iter().any(|runtime| runtime == "docker");
    nodes.peek().is_none() || nodes.any(|state| state.inventory.as_ref().is_none_or(engine))
}

fn of_record(world: &World, record: &ModelRecord) -> fleet::ModelAssignment {
    let credentials = record.service.as_ref().map_or_else(
        || Ok(Credentials::new()),
        |service| {
            let state = world.services.get(service).and_then(|state| world.newest(state));
            let state = state.ok_or_else(|| format!("service {service} is not there; its secrets were to be used"))?;
            storage::credentials(world, &state.record, &record.uri)
        },
    );
    let rung = match record.rung {
        None => fleet::Rung::Unspecified,
        Some(WarmRung::Cached) => fleet::Rung::Cached,
        Some(WarmRung::Staged) => fleet::Rung::Staged,
    };
    let unresolved = credentials.as_ref().err().cloned().unwrap_or_default();
    let credentials = credentials.unwrap_or_default().into_iter();
    fleet::ModelAssignment {
        uri: record.uri.clone(),
        rung: rung.into(),
        pinned: record.pinned,
        keep: ASKED,
        credentials: credentials.map(|(name, value)| fleet::EnvVar { name, value }).collect(),
        unresolved,
        peers: Vec::new(),
    }
}

/// Nodes that have a model, or an image, on their disks, as they said last; `None` for all nodes.
pub fn holders(world: &World, uri: &str, node: Option<&str>) -> BTreeSet<String> {
    let nodes = world.nodes.values().filter(|state| node.is_none_or(|node| state.record.name == node));
    let has_image = |state: &NodeState| state.cached.images.iter().any(|image| cached::is(image, uri));
    let has = |state: &&NodeState| state.cached.models.iter().any(|model| model.uri == uri) || has_image(state);
    nodes.filter(has).map(|state| state.record.name.clone()).collect()
}

/// Replicas that sleep only as long as nobody needs their room, and have a model or an image, on one node or on all.
pub fn evictable(world: &World, node: Option<&str>, uri: &str) -> Vec<String> {
    let nodes = world.nodes.keys().filter(|name| node.is_none_or(|node| node == name.as_str()));
    let promised = |name: &String| {
        let replica = &world.replicas[name];
        world.revisions.get(&replica.record.revision).is_some_and(|revision| world.keeps_promise(revision, replica))
    };
    nodes.flat_map(|node| sleepers(world, node, uri)).filter(|name| !promised(name)).collect()
}

/// Replicas of a node that sleep and have a model or an image: they have to leave before it can be removed.
pub fn sleepers(world: &World, node: &str, uri: &str) -> Vec<String> {
    let Some(node) = world.nodes.get(node) else { return Vec::new() };
    let asleep = node.replicas.iter().filter_map(|name| world.replicas.get(name));
    let asleep = asleep.filter(|replica| replica.phase() == ReplicaPhase::Asleep);
    asleep
        .filter(|replica| storage::on_disk(world, replica).any(|what| what == uri))
        .map(|replica| replica.record.name.clone())
        .collect()
}

/// The records that a change makes of those that there are. One that asks for nothing is to be deleted.
pub(super) fn changed(
    world: &World,
    uri: &str,
    node: Option<&str>,
    change: &ModelChange,
) -> Result<Vec<ModelRecord>, CommandError> {
    let (node, uri) = (node.map(str::to_owned), uri.to_owned());
    let nothing = |node, uri| ModelRecord { uri, node, rung: None, pinned: false, service: None };
    let there = || {
        let found = world.asked.get(&(node.clone(), uri.clone()));
        found.cloned().unwrap_or_else(|| nothing(node.clone(), uri.clone()))
    };
    let of_all = world.asked.get(&(None, uri.clone())).filter(|_| node.is_some());
    // Without a node what was asked for on single ones is taken back, too.
    let mine = world.asked.values().filter(|record| record.uri == uri && (node.is_none() || record.node == node));
    match change {
        ModelChange::Warm { rung, service } => {
            Ok(vec![ModelRecord { rung: Some(*rung), service: service.clone(), ..there() }])
        }
        ModelChange::Pin(true) => Ok(vec![ModelRecord { pinned: true, ..there() }]),
        ModelChange::Pin(false) if of_all.is_some_and(|record| record.pinned) => Err(CommandError::OnAllNodes(uri)),
        ModelChange::Forget if of_all.is_some() => Err(CommandError::OnAllNodes(uri)),
        ModelChange::Pin(false) => Ok(mine.map(|record| ModelRecord { pinned: false, ..record.clone() }).collect()),
        ModelChange::Forget => Ok(mine.map(|record| nothing(record.node.clone(), uri.clone())).collect()),
    }
}

impl Reconciler {
    /// Stores what is asked for of a model, and tells the nodes concerned at once: an agent that is asked to
    /// remove it must know before that it is not wanted any more.
    pub(super) async fn change_model(
        &mut self,
        uri: String,
        node: Option<String>,
        change: ModelChange,
    ) -> Result<BTreeSet<String>, CommandError> {
        if let Some(node) = node.as_ref().filter(|node| !self.world.nodes.contains_key(*node)) {
            return Err(CommandError::NodeNotFound(node.clone()));
        }
        if let ModelChange::Warm { service: Some(service), .. } = &change
            && (owner(service) != service || !self.world.services.contains_key(service))
        {
            return Err(CommandError::NotFound(service.clone()));
        }
        let records = changed(&self.world, &uri, node.as_deref(), &change)?;
        let gone = |record: &ModelRecord| record.rung.is_none() && !record.pinned;
        let mut nodes = BTreeSet::new();
        for records in records.chunks(WRITES_AT_ONCE) {
            let write = records.iter().fold(Transaction::new(), |write, record| {
                let key = keys::model(record.node.as_deref(), &uri);
                if gone(record) { write.delete(&key) } else { write.put_json(&key, record) }
            });
            self.commit(write).await?;
            for record in records {
                let key = (record.node.clone(), uri.clone());
                nodes.extend(self.concerned(record.node.as_deref()));
                match gone(record) {
                    true => drop(self.world.asked.remove(&key)),
                    false => drop(self.world.asked.insert(key, record.clone())),
                }
            }
        }
        info!(%uri, ?node, ?change, "what is asked for of the model is set");
        self.dirty.nodes.extend(nodes.iter().cloned());
        self.push();
        Ok(nodes)
    }

    /// Secrets or annotations of some services have changed: models may be fetched with them.
    pub(super) fn credentials_changed(&mut self, of: impl Fn(&str) -> bool) {
        let records = self.world.asked.values().filter(|record| record.service.as_deref().is_some_and(&of));
        let nodes: Vec<_> = records.flat_map(|record| self.concerned(record.node.as_deref())).collect();
        self.dirty.nodes.extend(nodes);
    }

    /// One node, or all that there are.
    fn concerned(&self, node: Option<&str>) -> Vec<String> {
        node.map_or_else(|| self.world.nodes.keys().cloned().collect(), |node| vec![node.to_owned()])
    }
}
