//! Tables as kubectl prints them.

use jiff::Timestamp;
use tabled::{
    builder::Builder,
    settings::{Padding, Style},
};

/// Rows below a header, in columns.
#[derive(Debug)]
pub struct Table(Builder);

impl Table {
    /// With these columns.
    pub fn new(columns: &[&str]) -> Self {
        let mut builder = Builder::default();
        builder.push_record(columns.iter().copied());
        Self(builder)
    }

    /// Adds a row.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.0.push_record(cells);
    }

    /// The text, without spaces at the ends of lines.
    pub fn text(self) -> String {
        let mut table = self.0.build();
        table.with(Style::empty()).with(Padding::new(0, 3, 0, 0));
        table.to_string().lines().map(|line| format!("{}\n", line.trim_end())).collect()
    }
}

/// Time since then, as kubectl shows ages.
pub fn age(since: Option<prost_types::Timestamp>) -> String {
    let Some(since) = since else { return "<unknown>".to_owned() };
    let seconds = (Timestamp::now().as_second() - since.seconds).max(0);
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7200 => format!("{}m", seconds / 60),
        7200..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// A moment in RFC 3339, empty where there is none.
pub fn moment(time: Option<prost_types::Timestamp>) -> String {
    let time = time.and_then(|time| Timestamp::new(time.seconds, time.nanos).ok());
    time.map(|time| format!("{time:.3}")).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_without_borders() {
        let mut table = Table::new(&["NAME", "READY"]);
        table.row(["iris".to_owned(), "True".to_owned()]);
        table.row(["a-long-name".to_owned(), "False".to_owned()]);
        assert_eq!(table.text(), "NAME          READY\niris          True\na-long-name   False\n");
    }

    #[test]
    fn ages_are_short() {
        let ago = |seconds| Some(prost_types::Timestamp { seconds: Timestamp::now().as_second() - seconds, nanos: 0 });
        assert_eq!(age(ago(600)), "10m");
        assert_eq!(age(ago(200_000)), "2d");
        assert_eq!(age(None), "<unknown>");
    }
}
