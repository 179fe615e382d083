//! `pilotlight cache`.

use bytesize::ByteSize;
use pilotlight_proto::control::v1::{CachedModel, ListCacheRequest};
use serde_json::{Value, json};

use crate::{
    connect::ConnectionArgs,
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
}

/// Carries out a command.
pub async fn run(connection: ConnectionArgs, command: Command) -> Result<(), Failure> {
    let Command::Ls { node, output } = command;
    let mut client = connection.client()?;
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
        "pinned": model.pinned, "lastUsed": moment(model.last_used),
    })
}

fn table(models: Vec<CachedModel>, wide: bool) -> String {
    let columns = ["NODE", "MODEL", "SIZE", "IN USE", "PINNED", "LAST USED", "KEY"];
    let shown = if wide { columns.len() } else { columns.len() - 1 };
    let mut table = Table::new(&columns[..shown]);
    let flag = |flag: bool| if flag { "yes" } else { "no" }.to_owned();
    for model in models {
        let cells = [
            model.node,
            model.uri,
            ByteSize(model.bytes).to_string(),
            flag(model.in_use),
            flag(model.pinned),
            age(model.last_used),
            model.key,
        ];
        table.row(cells.into_iter().take(shown));
    }
    table.text()
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
            bytes: 3 << 20,
            in_use: true,
            ..CachedModel::default()
        };
        let text = table(vec![model.clone()], false);
        assert_eq!(text.lines().next().unwrap(), "NODE    MODEL      SIZE      IN USE   PINNED   LAST USED");
        assert_eq!(text.lines().nth(1).unwrap(), "gpu-1   s3://b/m   3.0 MiB   yes      no       <unknown>");
        assert!(table(vec![model], true).contains("c0ffee"));
    }
}
