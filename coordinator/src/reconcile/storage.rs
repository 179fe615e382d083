//! A revision's models as agents get them: addresses, and credentials from the namespace's secrets. Pure.

use std::{
    collections::BTreeMap,
    hash::{DefaultHasher, Hash as _, Hasher as _},
};

use pilotlight_proto::fleet::v1 as fleet;
use serde_json::{Map, Value};

use super::world::{ReplicaState, World};
use crate::{
    model::RevisionRecord,
    spec::{AuxiliaryKind, Storage, StorageSource},
    values::Values,
};

/// Names the secret whose keys are credentials, by the names of the tools' environment variables.
const SECRET_NAME: &str = "serving.kserve.io/storageSecretName";
/// The secret that `storage.key` picks an entry of.
const STORAGE_CONFIG: &str = "storage-config";
/// Entry that is taken where no key is given.
const DEFAULT_ENTRY: &str = "default";
/// Fields of an entry and the variables that they become.
const FIELDS: [(&str, &str); 7] = [
    ("access_key_id", "AWS_ACCESS_KEY_ID"),
    ("secret_access_key", "AWS_SECRET_ACCESS_KEY"),
    ("session_token", "AWS_SESSION_TOKEN"),
    ("endpoint_url", "AWS_ENDPOINT_URL"),
    ("default_region", "AWS_REGION"),
    ("region", "AWS_REGION"),
    ("anonymous", "AWS_ANONYMOUS_CREDENTIAL"),
];

/// Nodes that an agent is told to take a model from, at most.
const PEERS: usize = 4;

/// By the names of the tools' environment variables.
pub(super) type Credentials = BTreeMap<String, String>;

/// The models of one revision. A secret that is missing is said in the model, and keeps it from being
/// fetched.
pub(super) fn models(world: &World, revision: &RevisionRecord) -> Vec<fleet::ModelMount> {
    let named = named(world, revision);
    let values = &world.settings.values;
    let model = |storage: &Storage| {
        let (uri, credentials) = match &storage.source {
            StorageSource::Uri(uri) => (uri.clone(), of_secret(world, revision, named)),
            StorageSource::Entry { key, path, parameters, .. } => {
                let key = if key.is_empty() { DEFAULT_ENTRY } else { key };
                let found = entry(values, &revision.namespace, key);
                match found.and_then(|entry| address(&entry, key, path, parameters)) {
                    Ok((uri, credentials)) => (uri, Ok(credentials)),
                    Err(missing) => (path.clone(), Err(missing)),
                }
            }
        };
        let unresolved = credentials.as_ref().err().cloned().unwrap_or_default();
        let credentials = credentials.unwrap_or_default().into_iter();
        fleet::ModelMount {
            uri,
            mount_path: storage.mount_path.clone(),
            read_only: storage.read_only,
            claim_root: storage.claim_root.clone().unwrap_or_default(),
            credentials: credentials.map(|(name, value)| fleet::EnvVar { name, value }).collect(),
            unresolved,
            peers: Vec::new(),
        }
    };
    revision.template.storage.iter().map(model).collect()
}

/// What a revision fetches a model of this address with, one of its own or another.
pub(super) fn credentials(world: &World, revision: &RevisionRecord, uri: &str) -> Result<Credentials, String> {
    match models(world, revision).into_iter().find(|model| model.uri == uri) {
        Some(model) if !model.unresolved.is_empty() => Err(model.unresolved),
        Some(model) => Ok(model.credentials.into_iter().map(|given| (given.name, given.value)).collect()),
        None => of_secret(world, revision, named(world, revision)),
    }
}

/// Name of the secret that its annotations, or its service's, name.
fn named<'a>(world: &'a World, revision: &'a RevisionRecord) -> Option<&'a String> {
    let service = world.services.get(&revision.service_key()).map(|state| &state.record.service);
    let named = revision.template.annotations.get(SECRET_NAME);
    named.or_else(|| service.and_then(|service| service.annotations.get(SECRET_NAME)))
}

fn of_secret(world: &World, revision: &RevisionRecord, name: Option<&String>) -> Result<Credentials, String> {
    name.map_or_else(|| Ok(Credentials::new()), |name| secret(&world.settings.values, &revision.namespace, name))
}

/// As [`models`], with the nodes that a replica there may take them from.
pub(super) fn models_for(world: &World, revision: &RevisionRecord, node: &str) -> Vec<fleet::ModelMount> {
    let with_peers = |model: fleet::ModelMount| fleet::ModelMount { peers: peers(world, node, &model.uri), ..model };
    models(world, revision).into_iter().map(with_peers).collect()
}

/// Connected nodes that have a model of this address whole, but for `node` itself. Which version of it they
/// have only they can tell.
pub(super) fn peers(world: &World, node: &str, uri: &str) -> Vec<String> {
    if uri.starts_with("pvc://") {
        return Vec::new();
    }
    let reachable = world
        .nodes
        .values()
        .filter(|state| state.session.is_some() && !state.hello.peer_address.is_empty() && state.record.name != node);
    let have = reachable.filter(|state| state.cached.models.iter().any(|model| model.uri == uri));
    spread(node, have.map(|state| state.record.name.as_str()))
}

/// At most [`PEERS`] of those that have a model, for one node: always the same ones of the same, and others
/// for other nodes, so that not all ask one.
fn spread<'a>(node: &str, have: impl Iterator<Item = &'a str>) -> Vec<String> {
    let mut ranked: Vec<(u64, &str)> = have
        .map(|peer| {
            let mut hasher = DefaultHasher::new();
            (node, peer).hash(&mut hasher);
            (hasher.finish(), peer)
        })
        .collect();
    ranked.sort_unstable();
    ranked.into_iter().take(PEERS).map(|(_, peer)| peer.to_owned()).collect()
}

/// Address of the first model; `None` where there is none, or it is not known.
pub(super) fn first_address(world: &World, revision: &RevisionRecord) -> Option<String> {
    if revision.template.storage.is_empty() {
        return None;
    }
    models(world, revision).into_iter().next().filter(|model| model.unresolved.is_empty()).map(|model| model.uri)
}

/// All keys of a secret that hold text.
fn secret(values: &Values, namespace: &str, name: &str) -> Result<Credentials, String> {
    let secret = values.get(AuxiliaryKind::Secret, namespace, name);
    let secret = secret.ok_or_else(|| format!("Secret {namespace}/{name} is not there; {SECRET_NAME} names it"))?;
    let text = |(key, value): (&String, &Vec<u8>)| Some((key.clone(), String::from_utf8(value.clone()).ok()?));
    Ok(secret.data.0.iter().filter_map(text).collect())
}

fn entry(values: &Values, namespace: &str, key: &str) -> Result<Map<String, Value>, String> {
    let what = format!("Secret {namespace}/{STORAGE_CONFIG}");
    let secret = values.get(AuxiliaryKind::Secret, namespace, STORAGE_CONFIG);
    let secret = secret.ok_or_else(|| format!("{what} is not there"))?;
    let text = secret.data.0.get(key).ok_or_else(|| format!("{what} has no key {key}"))?;
    // The parser's own words may repeat what it holds.
    serde_json::from_slice(text).map_err(|_| format!("{what}: the value of {key} must be a JSON object"))
}

/// An entry's address and credentials; `parameters` go before the entry's own fields.
fn address(
    entry: &Map<String, Value>,
    key: &str,
    path: &str,
    parameters: &BTreeMap<String, String>,
) -> Result<(String, Credentials), String> {
    let text = |name: &str| match entry.get(name) {
        Some(Value::String(text)) => Some(text.clone()),
        Some(Value::Bool(flag)) => Some(flag.to_string()),
        _ => None,
    };
    let field = |name: &str| parameters.get(name).cloned().or_else(|| text(name));
    let what = format!("Secret {STORAGE_CONFIG}, key {key}");
    let kind = field("type").unwrap_or_else(|| "s3".to_owned());
    if kind != "s3" {
        return Err(format!("{what}: type {kind:?} cannot be read; known is s3"));
    }
    // Where to go and as whom belong together: a service must not have the secret's keys sent elsewhere.
    if parameters.contains_key("endpoint_url") && text("access_key_id").is_some() {
        return Err(format!("storage.parameters.endpoint_url: must not change where the keys of {what} are sent"));
    }
    let bucket = field("bucket").ok_or_else(|| format!("{what}: bucket is missing"))?;
    let credentials = FIELDS.iter().filter_map(|(from, name)| Some(((*name).to_owned(), field(from)?)));
    Ok((format!("s3://{bucket}/{}", path.trim_start_matches('/')), credentials.collect()))
}

/// What a replica has on its node's disk: addresses of its models, and the name of its image.
pub fn on_disk(world: &World, replica: &ReplicaState) -> impl Iterator<Item = String> {
    let revision = world.revisions.get(&replica.record.revision).map(|revision| &revision.record);
    let addresses = revision.map(|revision| models(world, revision)).unwrap_or_default();
    let image = revision.map(|revision| revision.template.container.image.clone());
    addresses.into_iter().map(|model| model.uri).chain(image)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        fleet::SessionHandle,
        model::NodeRecord,
        reconcile::world::{NodeState, Settings},
        spec::{Auxiliary, Data},
    };

    fn values(key: &str, json: &str) -> Values {
        let values = Values::default();
        let data = Data(BTreeMap::from([(key.to_owned(), json.as_bytes().to_vec())]));
        let (kind, namespace, name) = (AuxiliaryKind::Secret, "default".to_owned(), STORAGE_CONFIG.to_owned());
        values.remember(Auxiliary { kind, namespace, name, data });
        values
    }

    #[test]
    fn an_entry_becomes_an_address_with_credentials() {
        let json = r#"{"type": "s3", "bucket": "b", "endpoint_url": "http://s3", "access_key_id": "i"}"#;
        let found = entry(&values("minio", json), "default", "minio").unwrap();
        let (uri, credentials) = address(&found, "minio", "/models/m", &BTreeMap::new()).unwrap();
        assert_eq!(uri, "s3://b/models/m");
        assert_eq!(credentials["AWS_ENDPOINT_URL"], "http://s3");
        assert_eq!(credentials["AWS_ACCESS_KEY_ID"], "i");
        let other = BTreeMap::from([("bucket".to_owned(), "c".to_owned())]);
        assert_eq!(address(&found, "minio", "m", &other).unwrap().0, "s3://c/m");
        let elsewhere = BTreeMap::from([("endpoint_url".to_owned(), "http://thief".to_owned())]);
        assert!(address(&found, "minio", "m", &elsewhere).is_err());
    }

    fn node(world: &mut World, name: &str, connected: bool, uris: &[&str]) {
        let now = jiff::Timestamp::UNIX_EPOCH;
        let record = NodeRecord::new(name, now);
        let mut state = NodeState::unheard(record, now);
        state.session = connected.then(|| SessionHandle::to_nobody(name));
        state.hello.peer_address = format!("{name}:7443");
        let model = |uri: &&str| fleet::CachedModel { uri: (*uri).to_owned(), ..Default::default() };
        state.cached.models = uris.iter().map(model).collect();
        world.nodes.insert(name.to_owned(), state);
    }

    #[test]
    fn peers_are_others_that_are_connected_and_have_the_model() {
        let mut world = World::new(Settings::for_tests());
        node(&mut world, "own", true, &["s3://b/m"]);
        node(&mut world, "has-it", true, &["s3://b/other", "s3://b/m"]);
        node(&mut world, "has-another", true, &["s3://b/m2"]);
        node(&mut world, "gone", false, &["s3://b/m"]);
        node(&mut world, "unreachable", true, &["s3://b/m", "pvc://claim/m"]);
        assert_eq!(peers(&world, "unreachable", "pvc://claim/m"), Vec::<String>::new());
        world.nodes.get_mut("unreachable").unwrap().hello.peer_address.clear();
        assert_eq!(peers(&world, "own", "s3://b/m"), ["has-it"]);
        assert_eq!(peers(&world, "has-it", "s3://b/m"), ["own"]);
        assert_eq!(peers(&world, "own", "s3://b/none"), Vec::<String>::new());
    }

    #[test]
    fn many_nodes_do_not_all_ask_the_same_ones() {
        let have: Vec<String> = (0..10).map(|n| format!("gpu-{n}")).collect();
        let of = |node: &str| spread(node, have.iter().map(String::as_str));
        let mut asked: BTreeMap<String, usize> = BTreeMap::new();
        for node in (10..110).map(|n| format!("gpu-{n}")) {
            assert_eq!(of(&node).len(), PEERS);
            assert_eq!(of(&node), spread(&node, have.iter().rev().map(String::as_str)), "the same at each push");
            of(&node).into_iter().for_each(|peer| *asked.entry(peer).or_default() += 1);
        }
        // 40 each on average.
        assert!(asked.len() == 10 && asked.values().all(|times| (20..=60).contains(times)), "{asked:?}");
        assert_eq!(spread("a", ["b", "c"].into_iter()).len(), 2);
    }

    #[test]
    fn what_is_missing_is_named_and_nothing_secret_is_shown() {
        let none = Values::default();
        assert_eq!(entry(&none, "default", "x").unwrap_err(), "Secret default/storage-config is not there");
        assert!(entry(&values("a", "{}"), "default", "b").unwrap_err().ends_with("has no key b"));
        assert!(!entry(&values("a", "hunter2"), "default", "a").unwrap_err().contains("hunter2"));
        let error = address(&Map::new(), "a", "m", &BTreeMap::new()).unwrap_err();
        assert_eq!(error, "Secret storage-config, key a: bucket is missing");
        assert!(secret(&none, "default", "s").unwrap_err().contains("Secret default/s is not there"));
    }
}
