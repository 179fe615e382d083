//! Tables as kubectl prints them.

use jiff::Timestamp;
use tabled::{
    builder::Builder,
    settings::{Padding, Style},
};

/// Rows below a header, in columns.
#[derive(Debug)]
pub struct Table(Vec<Vec<String>>);

/// Widths of the columns of tables that are printed one below the other.
#[derive(Debug, Default)]
pub struct Widths(Vec<usize>);

impl Table {
    /// With these columns.
    pub fn new(columns: &[&str]) -> Self {
        Self(vec![columns.iter().map(|column| (*column).to_owned()).collect()])
    }

    /// Adds a row.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.0.push(cells.into_iter().collect());
    }

    /// The text, without spaces at the ends of lines.
    pub fn text(self) -> String {
        self.text_with(&mut Widths::default(), true)
    }

    /// The text, in columns at least as wide as those of the tables before, with or without the header.
    pub fn text_with(mut self, widths: &mut Widths, header: bool) -> String {
        for cells in &self.0 {
            widths.0.resize(widths.0.len().max(cells.len()), 0);
            for (width, cell) in widths.0.iter_mut().zip(cells) {
                *width = (*width).max(visible_width(cell));
            }
        }
        if !header {
            self.0.remove(0);
        }
        let mut builder = Builder::default();
        for mut cells in self.0 {
            for (width, cell) in widths.0.iter().zip(&mut cells) {
                let missing = width.saturating_sub(visible_width(cell));
                cell.push_str(&" ".repeat(missing));
            }
            builder.push_record(cells);
        }
        let mut table = builder.build();
        table.with(Style::empty()).with(Padding::new(0, 3, 0, 0));
        table.to_string().lines().map(|line| format!("{}\n", line.trim_end())).collect()
    }
}

/// Characters of a cell that take room on a terminal: all but the escapes that colour it.
fn visible_width(cell: &str) -> usize {
    let mut width = 0;
    let mut signs = cell.chars();
    while let Some(sign) = signs.next() {
        match sign {
            '\u{1b}' => drop(signs.by_ref().find(|sign| *sign == 'm')),
            _ => width += 1,
        }
    }
    width
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
    fn rows_that_are_printed_later_line_up_with_those_before() {
        let mut widths = Widths::default();
        let mut table = Table::new(&["NAME", "READY"]);
        table.row(["a-long-name".to_owned(), "True".to_owned()]);
        table.text_with(&mut widths, true);
        let mut later = Table::new(&["NAME", "READY"]);
        later.row(["iris".to_owned(), "\u{1b}[32mTrue\u{1b}[0m".to_owned()]);
        assert_eq!(later.text_with(&mut widths, false), "iris          \u{1b}[32mTrue\u{1b}[0m\n");
    }

    #[test]
    fn ages_are_short() {
        let ago = |seconds| Some(prost_types::Timestamp { seconds: Timestamp::now().as_second() - seconds, nanos: 0 });
        assert_eq!(age(ago(600)), "10m");
        assert_eq!(age(ago(200_000)), "2d");
        assert_eq!(age(None), "<unknown>");
    }
}
