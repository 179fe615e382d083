//! Where models come from: `storageUri`, `storageUris`, `storage`, and the variable `STORAGE_URI`.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::{
    documents::join,
    model::{Storage, StorageSource},
    names,
    report::Report,
};

/// Where a model lies in the container.
pub(super) const MOUNT_PATH: &str = "/mnt/models";
/// Where KFServing showed the whole claim of a `pvc://` URI.
const CLAIM_ROOT: &str = "/mnt/pvc";
/// By `"false"` the mount of the model can be written to.
const READ_ONLY: &str = "storage.kserve.io/readonly";
/// What a model that is not there means for the server.
const NOT_FETCHED: &str = "no model is fetched or mounted, so that the server does not find it";
/// What agents fetch or mount.
const FETCHED: [&str; 6] = ["s3", "gs", "hf", "http", "https", "pvc"];
const SCHEMES: &str = "s3, gs, hf, modelscope, pvc, oci, oci+native, oci+fetch, hdfs, webhdfs, http, https and file";

/// An entry of `storageUris`.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct StorageUri {
    uri: String,
    mount_path: Option<String>,
}

/// `storage`.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct StorageSpec {
    key: Option<String>,
    path: Option<String>,
    parameters: Option<BTreeMap<String, String>>,
    schema_path: Option<String>,
}

/// True unless the service's annotations make the mount writable.
pub(super) fn read_only(annotations: &BTreeMap<String, String>) -> bool {
    annotations.get(READ_ONLY).is_none_or(|value| !value.eq_ignore_ascii_case("false"))
}

/// A model by URI. `None` where it is in the image, or nowhere.
pub(super) fn by_uri(uri: &str, at: &str, read_only: bool, report: &mut Report) -> Option<Storage> {
    let claim = check_uri(uri, at, report)?;
    if !FETCHED.iter().any(|scheme| uri.split("://").next() == Some(scheme)) {
        report.unsupported(at, NOT_FETCHED);
    }
    Some(Storage {
        source: StorageSource::Uri(uri.to_owned()),
        mount_path: MOUNT_PATH.to_owned(),
        read_only,
        claim_root: claim.then(|| CLAIM_ROOT.to_owned()),
    })
}

/// Checks the address of a model by the rules for `storageUri`.
///
/// # Errors
/// What is wrong with it and what is allowed.
pub fn check_address(uri: &str) -> Result<(), String> {
    let mut report = Report::new(false);
    check_uri(uri, "uri", &mut report);
    report.into_findings().into_iter().find(|finding| finding.is_error()).map_or(Ok(()), |wrong| Err(wrong.message))
}

/// A model by an entry of the secret `storage-config`.
pub(super) fn by_entry(given: StorageSpec, read_only: bool) -> Storage {
    Storage {
        source: StorageSource::Entry {
            key: given.key.unwrap_or_default(),
            path: given.path.unwrap_or_default(),
            parameters: given.parameters.unwrap_or_default(),
            schema_path: given.schema_path.unwrap_or_default(),
        },
        mount_path: MOUNT_PATH.to_owned(),
        read_only,
        claim_root: None,
    }
}

/// Several models at paths of their own. What is downloaded goes to one volume, so that those paths need
/// a common parent.
pub(super) fn by_uris(given: &[StorageUri], at: &str, read_only: bool, report: &mut Report) -> Vec<Storage> {
    let mut storage = Vec::new();
    let mut downloaded: Vec<String> = Vec::new();
    for (index, entry) in given.iter().enumerate() {
        let at = format!("{at}[{index}]");
        let path = entry.mount_path.clone().unwrap_or_else(|| MOUNT_PATH.to_owned());
        check_mount_path(&path, &join(&at, "mountPath"), report);
        if storage.iter().any(|other: &Storage| other.mount_path == path) {
            report.error(join(&at, "mountPath"), &path, "must be used once only");
        }
        if !entry.uri.starts_with("pvc://") {
            downloaded.push(path.clone());
        }
        let made = by_uri(&entry.uri, &join(&at, "uri"), read_only, report);
        storage.extend(made.map(|made| Storage { mount_path: path, claim_root: None, ..made }));
    }
    let first = |path: &String| path.split('/').nth(1).map(ToOwned::to_owned);
    if downloaded.len() > 1 && downloaded.iter().any(|path| first(path) != first(&downloaded[0])) {
        report.error(at, downloaded.join(", "), "mount paths of downloads must have a common parent other than /");
    }
    storage
}

fn check_mount_path(path: &str, at: &str, report: &mut Report) {
    if !path.starts_with('/') || path.trim_end_matches('/').is_empty() || path.split('/').any(|part| part == "..") {
        report.error(at, path, "must be absolute, not /, and without ..");
    }
}

/// Checks a URI. Some(true): a claim, Some(false): to be downloaded, None: nothing is to be mounted.
fn check_uri(uri: &str, at: &str, report: &mut Report) -> Option<bool> {
    let Some((scheme, rest)) = uri.split_once("://") else {
        if uri.is_empty() {
            report.error(at, "", "must not be empty");
        }
        return None;
    };
    let (first, path) = rest.split_once('/').unwrap_or((rest, ""));
    if first.is_empty() && scheme != "file" {
        report.error(at, uri, format!("must name what {scheme}:// is to be read from"));
        return None;
    }
    match scheme {
        "file" => return None,
        "pvc" => {
            if !names::is_dns_name(first) {
                report.warning(at, first, "is not the name of a claim; is it a placeholder that must be filled?");
            }
            return Some(true);
        }
        "hf" | "modelscope" if path.is_empty() || path.contains('/') => {
            report.error(at, uri, format!("must be {scheme}://owner/model or {scheme}://owner/model:revision"));
        }
        "http" | "https" if !is_azure(first) && (path.is_empty() || path.ends_with('/')) => {
            report.error(at, uri, "must end in the name of a file");
        }
        "s3" | "gs" | "hf" | "modelscope" | "oci" | "oci+native" | "oci+fetch" | "hdfs" | "webhdfs" | "http"
        | "https" => {}
        _ => report.warning(
            at,
            uri,
            format!("nothing reads {scheme}://, so that replicas will fail; known are {SCHEMES}"),
        ),
    }
    Some(false)
}

fn is_azure(host: &str) -> bool {
    [".blob.core.windows.net", ".file.core.windows.net"].iter().any(|end| host.ends_with(end))
}
