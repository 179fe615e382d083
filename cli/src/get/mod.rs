//! `pilotlight get`.

mod listing;
mod watch;

use std::io::Write as _;

use anyhow::anyhow;
use clap::ValueEnum;

use self::listing::{Listing, list};
pub use self::listing::{decision_table, replica_table};
use crate::{
    connect::ConnectionArgs,
    failure::Failure,
    json,
    output::{self, Format},
    selector::Selector,
    table::Table,
    target::Target,
};

/// What to list.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// KIND, KIND NAME…, KIND/NAME…, or NAME of a service. Kinds: services (isvc), nodes, revisions, replicas, runtimes,
    /// secrets, configmaps and usage; decisions NAME are those of a service. Without any: services.
    #[arg(value_name = "KIND/NAME")]
    words: Vec<String>,
    /// Namespace.
    #[arg(short, long, default_value = "default")]
    namespace: String,
    /// All namespaces.
    #[arg(short = 'A', long)]
    all_namespaces: bool,
    /// Only what has these labels, such as team=vision,tier!=gold. Services, runtimes, secrets and config maps have
    /// those of their manifests, nodes their own; revisions and replicas have serving.kserve.io/inferenceservice.
    #[arg(short = 'l', long, value_name = "SELECTOR")]
    selector: Option<Selector>,
    /// table, wide, json, yaml, name, or jsonpath=TEMPLATE, such as jsonpath='{.status.url}'.
    #[arg(short, long, default_value = "table", value_name = "FORMAT")]
    output: Format,
    /// Print each change from now on.
    #[arg(short, long)]
    watch: bool,
}

/// What can be listed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// InferenceServices.
    #[value(alias = "service", alias = "isvc", alias = "inferenceservice", alias = "inferenceservices", alias = "svc")]
    Services,
    /// Nodes.
    #[value(alias = "node", alias = "no")]
    Nodes,
    /// Revisions.
    #[value(alias = "revision", alias = "rev")]
    Revisions,
    /// Replicas.
    #[value(alias = "replica", alias = "pods", alias = "pod", alias = "po")]
    Replicas,
    /// Scaling decisions of one service.
    #[value(alias = "decision")]
    Decisions,
    /// Serving runtimes, built-in ones too.
    #[value(alias = "runtime", alias = "servingruntimes", alias = "clusterservingruntimes")]
    Runtimes,
    /// Secrets, without their values.
    #[value(alias = "secret")]
    Secrets,
    /// Config maps, without their values.
    #[value(alias = "configmap", alias = "cm")]
    Configmaps,
    /// What services used, by hour and GPU class.
    Usage,
}

impl Kind {
    /// As `-o name` prints it before the slash.
    fn resource(self) -> &'static str {
        match self {
            Self::Services => "inferenceservice.serving.kserve.io",
            Self::Nodes => "node",
            Self::Revisions => "revision",
            Self::Replicas => "replica",
            Self::Decisions => "decision",
            Self::Runtimes => "servingruntime.serving.kserve.io",
            Self::Secrets => "secret",
            Self::Configmaps => "configmap",
            Self::Usage => "usage",
        }
    }

    /// One of these, in messages.
    fn singular(self) -> &'static str {
        match self {
            Self::Services => "service",
            Self::Runtimes => "runtime",
            Self::Configmaps => "config map",
            Self::Usage => "usage record",
            other => other.resource(),
        }
    }
}

/// What is asked for, read from the arguments.
struct Query {
    kind: Kind,
    names: Vec<String>,
    /// Empty: all namespaces.
    namespace: String,
    selector: Selector,
    output: Format,
}

impl Query {
    fn all_namespaces(&self) -> bool {
        self.namespace.is_empty()
    }

    fn is_wide(&self) -> bool {
        self.output.is_wide()
    }

    /// Keeps what was asked for by name and label.
    fn select(&self, listing: &mut Listing) {
        // Decisions and usage are named by their service, which the listing has applied already.
        listing.rows.retain(|row| {
            (self.names.is_empty() || self.names.contains(&row.name)) && self.selector.matches(&row.labels)
        });
    }
}

/// Lists.
pub async fn run(connection: ConnectionArgs, args: Args) -> Result<(), Failure> {
    let Target { kind, names } = Target::parse(&args.words)?;
    let query = Query {
        kind,
        names,
        namespace: if args.all_namespaces { String::new() } else { args.namespace },
        selector: args.selector.unwrap_or_default(),
        output: args.output,
    };
    if args.watch {
        return watch::run(&connection, &query).await;
    }
    let mut client = connection.client()?;
    let mut listing = list(&mut client, &query).await?;
    query.select(&mut listing);
    let missing: Vec<_> =
        query.names.iter().filter(|name| !listing.rows.iter().any(|row| row.name == **name)).cloned().collect();
    print(&query, listing)?;
    match missing.as_slice() {
        [] => Ok(()),
        missing => Err(not_found(&query, missing)),
    }
}

fn print(query: &Query, listing: Listing) -> Result<(), Failure> {
    if query.output.is_structured() {
        let mut items: Vec<_> = listing.rows.into_iter().map(|row| row.value).collect();
        return match (query.names.len(), items.len()) {
            (1, 0) => Ok(()),
            (1, 1) => output::print_value(&items.remove(0), &query.output),
            _ => output::print_value(&json::list(items), &query.output),
        };
    }
    if listing.rows.is_empty() {
        if query.names.is_empty() {
            writeln!(std::io::stderr(), "No {}s found.", query.kind.singular())?;
        }
        return Ok(());
    }
    if matches!(query.output, Format::Name) {
        let resource = query.kind.resource();
        let lines = listing.rows.iter().map(|row| format!("{resource}/{}\n", row.name));
        return output::print(&lines.collect::<String>());
    }
    let mut table = Table::new(&listing.columns);
    listing.rows.into_iter().for_each(|row| table.row(row.cells));
    output::print(&table.text())
}

fn not_found(query: &Query, missing: &[String]) -> Failure {
    let named = missing.iter().map(|name| match query.namespace.as_str() {
        "" => name.clone(),
        _ if query.kind == Kind::Nodes => name.clone(),
        namespace => format!("{namespace}/{name}"),
    });
    anyhow!("{} {} not found", query.kind.singular(), named.collect::<Vec<_>>().join(", ")).into()
}
