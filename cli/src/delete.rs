//! `pilotlight delete`.

use std::path::PathBuf;

use anyhow::anyhow;
use pilotlight_proto::control::v1::{DeleteNodeRequest, DeleteObjectRequest, DeleteRequest};
use serde_norway::Value;

use crate::{
    apply,
    connect::ConnectionArgs,
    failure::Failure,
    get::Kind,
    manifests::{Files, Manifest},
    output, target,
};

const SERVICE: &str = "InferenceService";
const NODE: &str = "Node";

/// What to delete.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// KIND NAME…, KIND/NAME…, or NAME… of services. Kinds: isvc, runtimes, secrets, configmaps, and nodes that are not
    /// connected.
    #[arg(required_unless_present = "files", value_name = "KIND/NAME")]
    words: Vec<String>,
    /// Delete what these files hold.
    #[arg(short = 'f', long = "filename", value_name = "PATH", conflicts_with = "words")]
    files: Vec<PathBuf>,
    /// Read the directories below a directory too.
    #[arg(short = 'R', long)]
    recursive: bool,
    /// Namespace.
    #[arg(short, long, default_value = "default")]
    namespace: String,
}

/// Something to delete.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Target {
    /// As in manifests.
    kind: String,
    namespace: String,
    name: String,
}

/// Deletes services and objects beside them.
pub async fn run(connection: ConnectionArgs, args: Args) -> Result<(), Failure> {
    let target::Target { kind, names } = target::Target::parse(&args.words)?;
    if names.is_empty() && args.files.is_empty() {
        return Err(anyhow!("which one? pilotlight delete isvc NAME").into());
    }
    let kind = kind_name(kind)?;
    let of_name = |name| Target { kind: kind.to_owned(), namespace: args.namespace.clone(), name };
    let mut targets: Vec<Target> = names.into_iter().map(of_name).collect();
    let files = Files { paths: args.files, recursive: args.recursive };
    for Manifest { source, text } in files.read()? {
        targets.extend(named(&text, &args.namespace).map_err(|error| anyhow!("{source}: {error}"))?);
    }
    let mut client = connection.client()?;
    for Target { kind, namespace, name } in targets {
        if kind == NODE {
            let replicas = client.delete_node(DeleteNodeRequest { name: name.clone() }).await?.into_inner().replicas;
            output::print(&format!("node/{name} deleted, and the records of {} replicas there\n", replicas.len()))?;
            continue;
        }
        if kind == SERVICE {
            client.delete(DeleteRequest { namespace, name: name.clone() }).await?;
        } else {
            let request = DeleteObjectRequest { kind: kind.clone(), namespace, name: name.clone() };
            client.delete_object(request).await?;
        }
        output::print(&format!("{}/{name} deleted\n", apply::resource(&kind)))?;
    }
    Ok(())
}

fn kind_name(kind: Kind) -> Result<&'static str, Failure> {
    match kind {
        Kind::Services => Ok(SERVICE),
        Kind::Runtimes => Ok("ClusterServingRuntime"),
        Kind::Secrets => Ok("Secret"),
        Kind::Configmaps => Ok("ConfigMap"),
        Kind::Nodes => Ok(NODE),
        _ => Err(anyhow!(
            "services, runtimes, secrets, configmaps and nodes can be deleted: pilotlight delete isvc NAME"
        )
        .into()),
    }
}

/// What a manifest holds of the kinds that are kept.
fn named(manifest: &str, default: &str) -> anyhow::Result<Vec<Target>> {
    use serde::de::Deserialize as _;
    let mut named = Vec::new();
    for document in serde_norway::Deserializer::from_str(manifest) {
        let value = Value::deserialize(document)?;
        let text = |path: &[&str]| {
            let found = path.iter().try_fold(&value, |value, key| value.get(key))?;
            found.as_str().map(str::to_owned)
        };
        let mut kind = text(&["kind"]).unwrap_or_default();
        if kind == "Service" && text(&["apiVersion"]).is_some_and(|version| version.starts_with("serving.knative.dev/"))
        {
            SERVICE.clone_into(&mut kind);
        }
        if [SERVICE, "ServingRuntime", "ClusterServingRuntime", "Secret", "ConfigMap"].contains(&kind.as_str()) {
            let name = text(&["metadata", "name"]).ok_or_else(|| anyhow!("metadata.name is missing"))?;
            let namespace = text(&["metadata", "namespace"]).unwrap_or_else(|| default.to_owned());
            named.push(Target { kind, namespace, name });
        }
    }
    Ok(named)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_found_among_other_kinds() {
        let manifest = "kind: Secret\nmetadata: {name: s}\n---\nkind: Job\nmetadata: {name: j}\n---\n\
                        kind: Service\nmetadata: {name: k}\n---\napiVersion: serving.knative.dev/v1\nkind: Service\n\
                        metadata: {name: b, namespace: x}\n";
        let target = |kind: &str, namespace: &str, name: &str| Target {
            kind: kind.into(),
            namespace: namespace.into(),
            name: name.into(),
        };
        let expected = [target("Secret", "default", "s"), target("InferenceService", "x", "b")];
        assert_eq!(named(manifest, "default").unwrap(), expected);
    }
}
