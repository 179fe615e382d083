//! `v1` objects that services refer to: secrets, config maps, claims, service accounts.

use std::{collections::BTreeMap, fmt};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{documents::join, names, report::Report, typed};

/// Kubernetes' limit for all data of one secret or config map, bytes.
const DATA_MOST: usize = 1 << 20;

/// Kinds of such objects.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum AuxiliaryKind {
    /// Kept, encrypted.
    Secret,
    /// Kept, encrypted as well.
    ConfigMap,
    /// Not kept: nodes map claims to directories by their own configuration.
    PersistentVolumeClaim,
    /// Not kept: there are no service accounts.
    ServiceAccount,
}

impl AuxiliaryKind {
    /// From `kind` in a manifest.
    pub(super) fn parse(kind: &str) -> Option<Self> {
        let all = [Self::Secret, Self::ConfigMap, Self::PersistentVolumeClaim, Self::ServiceAccount];
        all.into_iter().find(|known| known.to_string() == kind)
    }
}

impl fmt::Display for AuxiliaryKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// Values by key. Never printed.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Data(pub BTreeMap<String, Vec<u8>>);

impl fmt::Debug for Data {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} values, not shown", self.0.len())
    }
}

/// A validated object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Auxiliary {
    /// Which kind.
    pub kind: AuxiliaryKind,
    /// A DNS label.
    pub namespace: String,
    /// A DNS name.
    pub name: String,
    /// Of secrets and config maps, decoded.
    pub data: Data,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Texts {
    data: Option<BTreeMap<String, Option<String>>>,
    string_data: Option<BTreeMap<String, Option<String>>>,
    binary_data: Option<BTreeMap<String, Option<String>>>,
}

/// Reads an object. What it gives is to be used only where the report has no error.
pub(super) fn read(
    kind: AuxiliaryKind,
    root: &Map<String, Value>,
    namespace: &str,
    metadata: ObjectMeta,
    report: &mut Report,
) -> Auxiliary {
    let data = match kind {
        AuxiliaryKind::Secret => read_data(root, "stringData", "data", report),
        AuxiliaryKind::ConfigMap => read_data(root, "data", "binaryData", report),
        AuxiliaryKind::PersistentVolumeClaim => {
            let instead = "the claim is not kept: each node's configuration says where pvc:// names lie";
            report.unsupported("spec", instead);
            Data::default()
        }
        AuxiliaryKind::ServiceAccount => {
            report.unsupported("kind", "the account is not kept: there are no service accounts");
            Data::default()
        }
    };
    Auxiliary { kind, namespace: namespace.to_owned(), name: metadata.name.unwrap_or_default(), data }
}

/// Values as text and, below them, values in base64.
fn read_data(root: &Map<String, Value>, plain: &str, encoded: &str, report: &mut Report) -> Data {
    let fields = root.iter().filter(|(key, _)| [plain, encoded].contains(&key.as_str()));
    let mut value = Value::Object(fields.map(|(key, value)| (key.clone(), value.clone())).collect());
    // A type error repeats what is given, which must not be shown here.
    let mark = report.mark();
    let mut texts: Texts = typed::read(&mut value, "", report);
    report.conceal(mark);
    let mut take = |name: &str| match name {
        "data" => texts.data.take(),
        "stringData" => texts.string_data.take(),
        _ => texts.binary_data.take(),
    };
    let (plain_texts, encoded_texts) = (take(plain).unwrap_or_default(), take(encoded).unwrap_or_default());
    let mut data = BTreeMap::new();
    for (key, text) in encoded_texts {
        let at = join(encoded, &key);
        check_key(&key, &at, report);
        // Encoders break lines.
        let compact: String = text.unwrap_or_default().split_ascii_whitespace().collect();
        match STANDARD.decode(compact) {
            Ok(bytes) => drop(data.insert(key, bytes)),
            Err(_) => report.error(at, "", "must be base64"),
        }
    }
    for (key, text) in plain_texts {
        check_key(&key, &join(plain, &key), report);
        data.insert(key, text.unwrap_or_default().into_bytes());
    }
    if data.values().map(Vec::len).sum::<usize>() > DATA_MOST {
        report.error(encoded, "", format!("must be at most {DATA_MOST} bytes in all"));
    }
    Data(data)
}

fn check_key(key: &str, at: &str, report: &mut Report) {
    let fits = |sign: char| sign.is_ascii_alphanumeric() || "-_.".contains(sign);
    if key.is_empty() || key.len() > 253 || !key.chars().all(fits) {
        report.error(at, "", "key must be 1 to 253 letters, digits, '-', '_' or '.'");
    }
}

/// Fields of these kinds beside `apiVersion`, `kind` and `metadata`.
pub(super) fn fields(kind: AuxiliaryKind) -> &'static [&'static str] {
    match kind {
        AuxiliaryKind::Secret => &["data", "stringData", "type", "immutable"],
        AuxiliaryKind::ConfigMap => &["data", "binaryData", "immutable"],
        AuxiliaryKind::PersistentVolumeClaim => &["spec"],
        AuxiliaryKind::ServiceAccount => &["secrets", "imagePullSecrets", "automountServiceAccountToken"],
    }
}

/// Names of these objects: DNS names, unlike services.
pub(super) fn check_name(name: &str, report: &mut Report) {
    names::check_dns_name(name, "metadata.name", report);
}
