//! `pilotlight delete`.

use std::path::PathBuf;

use anyhow::anyhow;
use pilotlight_proto::control::v1::DeleteRequest;
use serde_norway::Value;

use crate::{
    connect::ConnectionArgs,
    failure::Failure,
    get::Kind,
    manifests::{Files, Manifest},
    output,
};

/// What to delete.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Kind: isvc.
    #[arg(required_unless_present = "files", requires = "names")]
    kind: Option<Kind>,
    /// Names.
    names: Vec<String>,
    /// Delete what these files hold.
    #[arg(short = 'f', long = "filename", value_name = "PATH", conflicts_with = "kind")]
    files: Vec<PathBuf>,
    /// Read the directories below a directory too.
    #[arg(short = 'R', long)]
    recursive: bool,
    /// Namespace.
    #[arg(short, long, default_value = "default")]
    namespace: String,
}

/// Deletes services.
pub async fn run(connection: ConnectionArgs, args: Args) -> Result<(), Failure> {
    if args.kind.is_some_and(|kind| kind != Kind::Services) {
        return Err(anyhow!("only services can be deleted: pilotlight delete isvc NAME").into());
    }
    let mut targets: Vec<(String, String)> =
        args.names.into_iter().map(|name| (args.namespace.clone(), name)).collect();
    let files = Files { paths: args.files, recursive: args.recursive };
    for Manifest { source, text } in files.read()? {
        targets.extend(named(&text, &args.namespace).map_err(|error| anyhow!("{source}: {error}"))?);
    }
    let mut client = connection.client()?;
    for (namespace, name) in targets {
        client.delete(DeleteRequest { namespace, name: name.clone() }).await?;
        output::print(&format!("inferenceservice.serving.kserve.io/{name} deleted\n"))?;
    }
    Ok(())
}

/// Namespaces and names of the services in a manifest.
fn named(manifest: &str, default: &str) -> anyhow::Result<Vec<(String, String)>> {
    use serde::de::Deserialize as _;
    let mut named = Vec::new();
    for document in serde_norway::Deserializer::from_str(manifest) {
        let value = Value::deserialize(document)?;
        let text = |path: &[&str]| {
            let found = path.iter().try_fold(&value, |value, key| value.get(key))?;
            found.as_str().map(str::to_owned)
        };
        let kind = text(&["kind"]).unwrap_or_default();
        let knative = text(&["apiVersion"]).is_some_and(|version| version.starts_with("serving.knative.dev/"));
        if kind == "InferenceService" || (kind == "Service" && knative) {
            let name = text(&["metadata", "name"]).ok_or_else(|| anyhow!("metadata.name is missing"))?;
            named.push((text(&["metadata", "namespace"]).unwrap_or_else(|| default.to_owned()), name));
        }
    }
    Ok(named)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn services_are_found_among_other_kinds() {
        let manifest = "kind: Secret\nmetadata: {name: s}\n---\nkind: InferenceService\nmetadata: {name: a}\n---\n\
                        kind: InferenceService\nmetadata: {name: b, namespace: x}\n";
        let expected = [("default", "a"), ("x", "b")].map(|(of, name)| (of.to_owned(), name.to_owned()));
        assert_eq!(named(manifest, "default").unwrap(), expected);
    }
}
