//! `pilotlight cache`.

use bytesize::ByteSize;
use pilotlight_proto::control::v1::{
    CachedModel, EvictModelRequest, EvictedModel, ListCacheRequest, PinModelRequest, WarmModelRequest,
};
use serde_json::{Value, json};

use crate::{
    connect::{Client, ConnectionArgs},
    failure::Failure,
    json,
    output::{self, Format},
    table::{Table, age, moment},
};

/// What to do with the models on the nodes' disks.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// List models that are on the nodes' disks.
    #[command(visible_alias = "list")]
    Ls {
        /// Of this node alone.
        #[arg(long, value_name = "NAME")]
        node: Option<String>,
        /// How the list looks.
        #[arg(short, long, value_enum, default_value_t)]
        output: Format,
    },
    /// Fetch a model to nodes ahead of need, and keep it there until it is evicted.
    ///
    /// Replicas that need the room still take it: of models that nobody uses, those that were asked for go
    /// last. To rule that out, pin it, too.
    Warm {
        #[command(flatten)]
        place: Place,
        /// How warm: on the disk, or read into main memory, too.
        #[arg(long, value_enum, default_value_t)]
        rung: Rung,
        /// Fetch it with this service's secrets: a name, or namespace/name.
        #[arg(long, value_name = "SERVICE")]
        service: Option<String>,
        /// Namespace of the service.
        #[arg(short, long, default_value = "default")]
        namespace: String,
    },
    /// Keep a model from being removed, where it is and wherever it comes to be.
    Pin {
        #[command(flatten)]
        place: Place,
    },
    /// Take a pin back. Without --node those of single nodes, too.
    Unpin {
        #[command(flatten)]
        place: Place,
    },
    /// Remove a model from nodes' disks, and take back that it was to be warm or pinned.
    ///
    /// Prints what each node has freed. Exit status 1: it stays on a node, such as where a replica has it.
    Evict {
        #[command(flatten)]
        place: Place,
    },
}

/// A model, and where.
#[derive(Debug, clap::Args)]
pub struct Place {
    /// Its address, such as s3://bucket/prefix.
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
            let done = format!("{} is kept {} on {on}\n", place.uri, rung.to_lowercase());
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
    let models = client.list_cache(request).await?.into_inner().models;
    if matches!(output, Format::Json | Format::Yaml) {
        return output::print_value(&json::list(models.iter().map(value).collect()), output);
    }
    if models.is_empty() {
        use std::io::Write as _;
        writeln!(std::io::stderr(), "No models found.")?;
        return Ok(());
    }
    output::print(&table(models, output == Format::Wide))
}

fn value(model: &CachedModel) -> Value {
    json!({
        "node": model.node, "uri": model.uri, "key": model.key, "bytes": model.bytes, "inUse": model.in_use,
        "rung": model.rung, "residentBytes": model.resident_bytes, "pinned": model.pinned, "lastUsed": moment(model.last_used),
    })
}

fn table(models: Vec<CachedModel>, wide: bool) -> String {
    let columns = ["NODE", "MODEL", "RUNG", "SIZE", "IN USE", "PINNED", "LAST USED", "RESIDENT", "KEY"];
    let shown = if wide { columns.len() } else { columns.len() - 2 };
    let mut table = Table::new(&columns[..shown]);
    let flag = |flag: bool| if flag { "yes" } else { "no" }.to_owned();
    for model in models {
        let resident = resident(&model);
        let cells = [
            model.node,
            model.uri,
            model.rung,
            ByteSize(model.bytes).to_string(),
            flag(model.in_use),
            flag(model.pinned),
            age(model.last_used),
            resident,
            model.key,
        ];
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
        let text = table(vec![model.clone()], false);
        assert_eq!(text.lines().next().unwrap(), "NODE    MODEL      RUNG     SIZE      IN USE   PINNED   LAST USED");
        assert_eq!(text.lines().nth(1).unwrap(), "gpu-1   s3://b/m   Cached   3.0 MiB   yes      no       <unknown>");
        let wide = table(vec![model], true);
        assert!(wide.contains("c0ffee") && wide.contains("99%"), "{wide}");
    }
}
