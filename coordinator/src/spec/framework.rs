//! `model`, and the older keys named for a framework, which mean the same.

use serde::Deserialize;
use serde_json::{Map, Value};

use super::{
    documents::join,
    report::{Report, show},
    serving_runtime::Protocol,
    storage::StorageSpec,
    typed,
};

/// The newer key.
pub(super) const MODEL: &str = "model";
/// Older keys, each the name of its format, and the protocol they mean where none is given.
const LEGACY: [(&str, Option<Protocol>); 10] = [
    ("sklearn", None),
    ("xgboost", None),
    ("tensorflow", None),
    ("pytorch", None),
    ("triton", Some(Protocol::V2)),
    ("onnx", Some(Protocol::V2)),
    ("huggingface", Some(Protocol::V2)),
    ("pmml", None),
    ("lightgbm", None),
    ("paddle", None),
];
/// Formats of `model` that mean V2 where no protocol is given. `onnx` and `huggingface` are not among
/// them, unlike with the older keys: so it is in KServe.
const V2_FORMATS: [&str; 3] = ["triton", "vllm", "vLLM"];
/// Fields of `model` that are not the container's.
const FIELDS: [&str; 7] =
    ["modelFormat", "runtime", "runtimeVersion", "storageUri", "storage", "protocolVersion", "confidential"];

/// A model to be served by a runtime.
#[derive(Debug)]
pub(super) struct Model {
    pub(super) format: String,
    pub(super) version: Option<String>,
    pub(super) runtime: Option<String>,
    pub(super) runtime_version: Option<String>,
    pub(super) protocol: Option<Protocol>,
    pub(super) storage_uri: Option<String>,
    pub(super) storage: Option<StorageSpec>,
    /// The container's fields.
    pub(super) container: Map<String, Value>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Fields {
    model_format: Option<Format>,
    runtime: Option<String>,
    runtime_version: Option<String>,
    storage_uri: Option<String>,
    storage: Option<StorageSpec>,
    protocol_version: Option<String>,
    confidential: Option<Value>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Format {
    name: String,
    version: Option<String>,
}

/// True for the keys that hold a model.
pub(super) fn is_key(key: &str) -> bool {
    key == MODEL || LEGACY.iter().any(|(legacy, _)| *legacy == key)
}

/// The keys, for messages.
pub(super) fn keys() -> String {
    LEGACY.iter().fold(MODEL.to_owned(), |list, (key, _)| list + ", " + key)
}

/// Reads the model under `key`, which stands at `at`. `None` where that is no mapping.
pub(super) fn read(key: &str, value: &Value, at: &str, report: &mut Report) -> Option<Model> {
    let Value::Object(given) = value else {
        report.error(at, show(value), "must be a mapping");
        return None;
    };
    let (mut own, mut container) = (Map::new(), Map::new());
    for (key, value) in given.iter().filter(|(_, value)| !value.is_null()) {
        let part = if FIELDS.contains(&key.as_str()) { &mut own } else { &mut container };
        part.insert(key.clone(), value.clone());
    }
    if container.remove("name").is_some() {
        report.error(join(at, "name"), "", "must not be given: the container is named by the runtime");
    }
    let fields: Fields = typed::read(&mut Value::Object(own), at, report);
    if fields.confidential.is_some() {
        report.error(join(at, "confidential"), "", "confidential models are not supported by this version");
    }
    let legacy = LEGACY.iter().find(|(legacy, _)| *legacy == key);
    if legacy.is_some() && fields.model_format.is_some() {
        report.unknown(join(at, "modelFormat"), None);
    }
    let format = match legacy {
        Some((name, _)) => Format { name: (*name).to_owned(), version: None },
        None => fields.model_format.unwrap_or_default(),
    };
    if format.name.is_empty() {
        report.error(join(at, "modelFormat.name"), "", "must be given");
    }
    let by_format = V2_FORMATS.contains(&format.name.as_str()).then_some(Protocol::V2);
    Some(Model {
        protocol: protocol(fields.protocol_version.as_deref(), at, report)
            .or(legacy.and_then(|(_, protocol)| *protocol))
            .or(by_format),
        format: format.name,
        version: format.version,
        runtime: fields.runtime,
        runtime_version: fields.runtime_version,
        storage_uri: fields.storage_uri,
        storage: fields.storage,
        container,
    })
}

fn protocol(given: Option<&str>, at: &str, report: &mut Report) -> Option<Protocol> {
    let given = given?;
    let protocol = Protocol::parse(given);
    if protocol.is_none() {
        report.error(join(at, "protocolVersion"), given, format!("must be {}", Protocol::NAMES));
    }
    protocol
}
