//! `pilotlight events`.

use std::{collections::HashSet, time::Duration};

use pilotlight_proto::control::v1::{ListEventsRequest, ServiceEvent};

use crate::{
    connect::ConnectionArgs,
    failure::Failure,
    output,
    table::{Table, Widths, moment},
};

/// Between looks for new events.
const POLL_INTERVAL: Duration = Duration::from_secs(1);

/// Whose events.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Service; without one, those of all services.
    name: Option<String>,
    /// Namespace.
    #[arg(short, long, default_value = "default")]
    namespace: String,
    /// All namespaces.
    #[arg(short = 'A', long)]
    all_namespaces: bool,
    /// Print events as they happen.
    #[arg(short, long)]
    watch: bool,
}

/// Prints the last events of services, oldest first. The coordinator keeps 50 per service, in memory.
pub async fn run(connection: ConnectionArgs, args: Args) -> Result<(), Failure> {
    use std::io::Write as _;
    let mut client = connection.client()?;
    // As `logs` does, `kind/name` is taken for the name.
    let name = args.name.unwrap_or_default();
    let name = name.split_once('/').map_or(name.as_str(), |(_, name)| name).to_owned();
    let namespace = if args.all_namespaces { String::new() } else { args.namespace };
    let (mut seen, mut widths, mut first) = (HashSet::new(), Widths::default(), true);
    loop {
        let request = ListEventsRequest { namespace: namespace.clone(), service: name.clone() };
        let events = client.list_events(request).await?.into_inner().events;
        let shown: HashSet<String> = events.iter().map(key).collect();
        let new: Vec<_> = events.into_iter().filter(|event| !seen.contains(&key(event))).collect();
        if new.is_empty() && first && !args.watch {
            writeln!(std::io::stderr(), "No events found.")?;
            return Ok(());
        }
        if !new.is_empty() {
            let mut table = Table::new(&["TIME", "TYPE", "REASON", "SERVICE", "OBJECT", "MESSAGE"]);
            new.into_iter().for_each(|event| table.row(cells(event, args.all_namespaces)));
            output::print(&table.text_with(&mut widths, first))?;
            first = false;
        }
        if !args.watch {
            return Ok(());
        }
        seen = shown;
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

/// Tells events apart. One that is repeated has a new time.
fn key(event: &ServiceEvent) -> String {
    format!("{}/{} {:?}", event.namespace, event.service, event.event)
}

fn cells(event: ServiceEvent, qualified: bool) -> [String; 6] {
    let service = if qualified { format!("{}/{}", event.namespace, event.service) } else { event.service };
    let event = event.event.unwrap_or_default();
    [moment(event.time), event.r#type, event.reason, service, event.object, event.message]
}
