//! `pilotlight cache`.

use bytesize::ByteSize;
use pilotlight_proto::control::v1::{
    CachedImage, CachedModel, EvictModelRequest, EvictedModel, ListCacheRequest, ListCacheResponse, PinModelRequest,
    WarmModelRequest,
};
use serde_json::{Value, json};

use crate::{
    connect::{Client, ConnectionArgs},
    failure::Failure,
    json,
    output::{self, Format},
    table::{Table, age, moment},
};

/// What to do with the models and images on the nodes' disks.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// List models that are on the nodes' disks, and container images that agents have pulled.
    #[command(visible_alias = "list")]
    Ls {
        /// Of this node alone.
        #[arg(long, value_name = "NAME")]
        node: Option<String>,
        /// table, wide, json, yaml or jsonpath=TEMPLATE.
        #[arg(short, long, default_value = "table", value_name = "FORMAT")]
        output: Format,
    },
    /// Fetch a model, or pull an image, to nodes ahead of need, and keep it there until it is evicted.
    ///
    /// Replicas that need the room still take it: of models that nobody uses, those that were asked for go
    /// last. To rule that out, pin it, too.
    Warm {
        #[command(flatten)]
        place: Place,
        /// How warm: on the disk, or read into main memory, too (models only).
        #[arg(long, value_enum, default_value_t)]
        rung: Rung,
        /// Fetch it with this service's secrets: a name, or namespace/name.
        #[arg(long, value_name = "SERVICE")]
        service: Option<String>,
        /// Namespace of the service.
        #[arg(short, long, default_value = "default")]
        namespace: String,
    },
    /// Keep a model or an image from being removed, where it is and wherever it comes to be.
    Pin {
        #[command(flatten)]
        place: Place,
    },
    /// Take a pin back. Without --node those of single nodes, too.
    Unpin {
        #[command(flatten)]
        place: Place,
    },
    /// Remove a model or an image from nodes' disks, and take back that it was to be warm or pinned.
    ///
    /// Prints what each node has freed. Exit status 1: it stays on a node, such as where a replica has it.
    Evict {
        #[command(flatten)]
        place: Place,
    },
}

/// A model or an image, and where.
#[derive(Debug, clap::Args)]
pub struct Place {
    /// A model's address, such as s3://bucket/prefix; or an image as services name it.
    uri: String,
    /// On this node alone. Default: on all that there are, and those that join.
    #[arg(long, value_name = "NAME")]
    node: Option<String>,
}

/// How warm a model is kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Rung {
    /// On the disk.
    #[default]
    Cached,
    /// On the disk and in the page cache.
    Staged,
}

/// Carries out a command.
pub async fn run(connection: ConnectionArgs, command: Command) -> Result<(), Failure> {
    let mut client = connection.client()?;
    match command {
        Command::Ls { node, output } => list(client, node, output).await,
        Command::Warm { place, rung, service, namespace } => {
            let service = service.map(|service| qualified(&namespace, service)).unwrap_or_default();
            let (on, node) = (place.on(), place.node.unwrap_or_default());
            let rung = if rung == Rung::Staged { "Staged" } else { "Cached" }.to_owned();
            let done =
                format!("{} is to be kept {} on {on}; see pilotlight cache ls\n", place.uri, rung.to_lowercase());
            client.warm_model(WarmModelRequest { uri: place.uri, node, rung, service }).await?;
            output::print(&done)
        }
        Command::Pin { place } => pin(client, place, true).await,
        Command::Unpin { place } => pin(client, place, false).await,
        Command::Evict { place } => {
            let request = EvictModelRequest { uri: place.uri.clone(), node: place.node.unwrap_or_default() };
            evicted(&place.uri, client.evict_model(request).await?.into_inner().nodes)
        }
    }
}

impl Place {
    fn on(&self) -> String {
        self.node.as_ref().map_or_else(|| "all nodes".to_owned(), |node| format!("node {node}"))
    }
}

/// `namespace/name` of a service.
fn qualified(namespace: &str, service: String) -> String {
    if service.contains('/') { service } else { format!("{namespace}/{service}") }
}

async fn pin(mut client: Client, place: Place, pinned: bool) -> Result<(), Failure> {
    let done = format!("{} {} on {}\n", place.uri, if pinned { "pinned" } else { "unpinned" }, place.on());
    client.pin_model(PinModelRequest { uri: place.uri, node: place.node.unwrap_or_default(), pinned }).await?;
    output::print(&done)
}

/// Says what has become of a model on each node.
fn evicted(uri: &str, nodes: Vec<EvictedModel>) -> Result<(), Failure> {
    use std::io::Write as _;
    if nodes.is_empty() {
        writeln!(std::io::stderr(), "{uri} is on no node.")?;
    }
    let mut stays = false;
    for EvictedModel { node, freed_bytes, error } in nodes {
        if error.is_empty() {
            output::print(&format!("node/{node} evicted {uri}, {} freed\n", ByteSize(freed_bytes)))?;
        } else {
            stays = true;
            writeln!(std::io::stderr(), "error: node/{node} keeps {uri}: {error}")?;
        }
    }
    if stays { Err(Failure::Refused) } else { Ok(()) }
}

async fn list(mut client: Client, node: Option<String>, output: Format) -> Result<(), Failure> {
    let request = ListCacheRequest { node: node.unwrap_or_default() };
    let found = client.list_cache(request).await?.into_inner();
    if output.is_structured() {
        let items = found.models.iter().map(value).chain(found.images.iter().map(image_value));
        return output::print_value(&json::list(items.collect()), &output);
    }
    if found.models.is_empty() && found.images.is_empty() {
        use std::io::Write as _;
        writeln!(std::io::stderr(), "No models and no images found.")?;
        return Ok(());
    }
    output::print(&table(found, output.is_wide()))
}

/// What an image has of a model's fields means the same.
fn image_value(image: &CachedImage) -> Value {
    json!({
        "kind": "Image", "node": image.node, "uri": image.image, "key": key(image), "id": image.id, "bytes": image.bytes,
        "inUse": image.in_use, "fetchSeconds": image.pull_took.map(|took| json::seconds(&Some(took))), "rung": image.rung,
        "message": image.message,
        "pinned": image.pinned, "lastUsed": moment(image.last_used),
    })
}

/// Tells versions of one name apart.
fn key(image: &CachedImage) -> &str {
    if image.digest.is_empty() { &image.id } else { &image.digest }
}

fn value(model: &CachedModel) -> Value {
    json!({
        "kind": "Model", "node": model.node, "uri": model.uri, "key": model.key, "bytes": model.bytes, "inUse": model.in_use,
        "fetchSeconds": model.fetch_took.map(|took| json::seconds(&Some(took))),
        "rung": model.rung, "residentBytes": model.resident_bytes, "pinned": model.pinned, "lastUsed": moment(model.last_used),
        "message": model.message,
    })
}

fn table(found: ListCacheResponse, wide: bool) -> String {
    let columns =
        ["NODE", "KIND", "URI", "RUNG", "SIZE", "IN USE", "PINNED", "LAST USED", "MESSAGE", "RESIDENT", "KEY"];
    let shown = if wide { columns.len() } else { columns.len() - 2 };
    let mut table = Table::new(&columns[..shown]);
    // What is not there yet was never used.
    let used = |time: Option<_>| if time.is_some() { age(time) } else { "-".to_owned() };
    let flag = |flag: bool| if flag { "yes" } else { "no" }.to_owned();
    let models = found.models.into_iter().map(|model| {
        let resident = resident(&model);
        [
            model.node,
            "Model".to_owned(),
            model.uri,
            model.rung,
            ByteSize(model.bytes).to_string(),
            flag(model.in_use),
            flag(model.pinned),
            used(model.last_used),
            model.message,
            resident,
            model.key,
        ]
    });
    let images = found.images.into_iter().map(|image| {
        let key = key(&image).to_owned();
        [
            image.node,
            "Image".to_owned(),
            image.image,
            image.rung,
            ByteSize(image.bytes).to_string(),
            flag(image.in_use),
            flag(image.pinned),
            used(image.last_used),
            image.message,
            "-".to_owned(),
            key,
        ]
    });
    for cells in models.chain(images) {
        table.row(cells.into_iter().take(shown));
    }
    table.text()
}

/// Part of a model that is in the page cache, whole percent; 100% is all of it.
fn resident(model: &CachedModel) -> String {
    let percent = u128::from(model.resident_bytes) * 100 / u128::from(model.bytes.max(1));
    format!("{percent}%")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_says_what_is_where() {
        let model = CachedModel {
            node: "gpu-1".into(),
            uri: "s3://b/m".into(),
            key: "c0ffee".into(),
            rung: "Cached".into(),
            bytes: 3 << 20,
            resident_bytes: (3 << 20) - 1,
            in_use: true,
            ..CachedModel::default()
        };
        let image = CachedImage {
            node: "gpu-1".into(),
            image: "registry/server:1".into(),
            digest: "sha256:d16e57".into(),
            bytes: 20 << 20,
            pinned: true,
            rung: "Failed".into(),
            message: "not found".into(),
            ..CachedImage::default()
        };
        let found = ListCacheResponse { models: vec![model], images: vec![image] };
        let text = table(found.clone(), false);
        let lines = [
            "NODE    KIND    URI                 RUNG     SIZE       IN USE   PINNED   LAST USED   MESSAGE",
            "gpu-1   Model   s3://b/m            Cached   3.0 MiB    yes      no       -",
            "gpu-1   Image   registry/server:1   Failed   20.0 MiB   no       yes      -           not found",
        ];
        assert_eq!(text.lines().collect::<Vec<_>>(), lines);
        let wide = table(found, true);
        assert!(wide.contains("c0ffee") && wide.contains("99%") && wide.contains("sha256:d16e57"), "{wide}");
    }
}
