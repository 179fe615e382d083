//! `get -w`: prints what there is, and then each change.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use pilotlight_proto::control::v1::WatchRequest;

use super::{
    Kind, Query,
    listing::{Listing, Row, list, service_listing},
};
use crate::{
    connect::{Client, ConnectionArgs},
    failure::Failure,
    follow::{self, Reached, follow},
    output::{self, Format},
    table::{Table, Widths},
};

/// Between looks at what the coordinator has no stream of changes for.
const POLL_INTERVAL: Duration = Duration::from_secs(1);

/// Prints until the caller is interrupted.
pub(super) async fn run(connection: &ConnectionArgs, query: &Query) -> Result<(), Failure> {
    let mut printer = Printer::default();
    let session = async |client: Client, reached: &mut Reached| match query.kind {
        Kind::Services => services(client, query, &mut printer, reached).await,
        _ => polled(client, query, &mut printer, reached).await,
    };
    follow(connection, follow::PATIENCE, session).await
}

async fn polled(
    mut client: Client,
    query: &Query,
    printer: &mut Printer,
    reached: &mut Reached,
) -> Result<(), Failure> {
    loop {
        let mut listing = list(&mut client, query).await?;
        reached.set();
        query.select(&mut listing);
        printer.print_all(query, listing)?;
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

async fn services(
    mut client: Client,
    query: &Query,
    printer: &mut Printer,
    reached: &mut Reached,
) -> Result<(), Failure> {
    let name = if let [name] = query.names.as_slice() { name.clone() } else { String::new() };
    let request = WatchRequest { namespace: query.namespace.clone(), name };
    let mut changes = client.watch(request).await?.into_inner();
    if !query.output.is_structured() {
        // All that there is in columns of one width; the stream repeats it.
        let mut listing = list(&mut client, query).await?;
        query.select(&mut listing);
        printer.print_all(query, listing)?;
    }
    reached.set();
    while let Some(change) = changes.message().await? {
        let Some(service) = change.service else { continue };
        let mut listing = service_listing(vec![service], query);
        query.select(&mut listing);
        printer.print(query, listing, change.deleted)?;
    }
    Err(follow::ended())
}

/// What has been printed so far.
#[derive(Debug, Default)]
struct Printer {
    widths: Widths,
    columns: Vec<&'static str>,
    /// Cells of each row as last printed, by key; without its age, which always changes.
    shown: BTreeMap<String, Vec<String>>,
    printed_header: bool,
}

impl Printer {
    /// Prints the rows that look different, and those that are gone since.
    fn print_all(&mut self, query: &Query, listing: Listing) -> Result<(), Failure> {
        let there: BTreeSet<_> = listing.rows.iter().map(|row| row.key.clone()).collect();
        self.print(query, listing, false)?;
        let gone: Vec<_> = self.shown.keys().filter(|key| !there.contains(*key)).cloned().collect();
        self.print_deleted(query, gone)
    }

    /// Prints the rows that look different from when they were last printed; of structured output, every one.
    fn print(&mut self, query: &Query, listing: Listing, deleted: bool) -> Result<(), Failure> {
        self.columns = listing.columns;
        let age = self.columns.iter().position(|column| *column == "AGE");
        let mut rows = Vec::new();
        for Row { key, mut cells, value, name, .. } in listing.rows {
            let mut face = cells.clone();
            if let Some(age) = age {
                face.remove(age);
            }
            // For services, JSON has each change, whether the table shows it or not.
            let each = query.output.is_structured() && query.kind == Kind::Services;
            if !each && !deleted && self.shown.get(&key) == Some(&face) {
                continue;
            }
            match &query.output {
                Format::Json => output::print(&format!("{value}\n"))?,
                Format::Yaml => output::print("---\n").and_then(|()| output::print_value(&value, &query.output))?,
                Format::JsonPath(template) => output::print(&format!("{}\n", template.render(&value)))?,
                Format::Name => output::print(&format!("{}/{name}\n", query.kind.resource()))?,
                Format::Table | Format::Wide => {}
            }
            if deleted {
                self.shown.remove(&key);
                cells.push("(deleted)".to_owned());
            } else {
                self.shown.insert(key, face);
            }
            rows.push(cells);
        }
        if !matches!(query.output, Format::Table | Format::Wide) || rows.is_empty() {
            return Ok(());
        }
        let mut table = Table::new(&self.columns);
        rows.into_iter().for_each(|cells| table.row(cells));
        let header = !std::mem::replace(&mut self.printed_header, true);
        output::print(&table.text_with(&mut self.widths, header))
    }

    /// Prints rows that are gone as they last were.
    fn print_deleted(&mut self, query: &Query, keys: Vec<String>) -> Result<(), Failure> {
        let mut table = Table::new(&self.columns);
        let mut any = false;
        for key in keys {
            let Some(mut cells) = self.shown.remove(&key) else { continue };
            if let Some(age) = self.columns.iter().position(|column| *column == "AGE") {
                cells.insert(age, "-".to_owned());
            }
            cells.push("(deleted)".to_owned());
            table.row(cells);
            any = true;
        }
        if !any || !matches!(query.output, Format::Table | Format::Wide) {
            return Ok(());
        }
        output::print(&table.text_with(&mut self.widths, false))
    }
}
