//! Requests over time, read from CSV.

use std::{io, time::Duration};

use jiff::{Timestamp, civil, tz::TimeZone};

/// What a request asks of its server.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Work {
    /// It runs this long.
    Duration(Duration),
    /// Prompt and generated tokens.
    Tokens {
        /// Tokens of the prompt.
        prompt: u32,
        /// Tokens of the answer.
        generated: u32,
    },
    /// The trace does not say.
    Unknown,
}

/// One request.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Request {
    /// Since the trace began.
    pub at: Duration,
    /// Index into [`Trace::services`].
    pub service: usize,
    /// What it asks.
    pub work: Work,
}

/// Requests in order of arrival.
#[derive(Debug, Clone, PartialEq)]
pub struct Trace {
    /// When the first request came; matters to what depends on the time of day.
    pub epoch: Timestamp,
    /// Names as the trace has them; one empty name where it has none: the manifest's first service.
    pub services: Vec<String>,
    /// The requests.
    pub requests: Vec<Request>,
}

/// Why a trace cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The file is no CSV.
    #[error(transparent)]
    Csv(#[from] csv::Error),
    /// A column is missing.
    #[error("no column for the arrival time: expected one of {TIME:?}, got {got}")]
    NoTime {
        /// The header.
        got: String,
    },
    /// A value cannot be read.
    #[error("line {line}, column {column}: {value:?}: expected {expected}")]
    Value {
        /// From 1.
        line: u64,
        /// Its name.
        column: String,
        /// As given.
        value: String,
        /// What it should be.
        expected: &'static str,
    },
    /// No request.
    #[error("the trace has no request")]
    Empty,
}

const TIME: [&str; 4] = ["arrival", "timestamp", "time", "at"];
const SERVICE: [&str; 2] = ["service", "name"];
const DURATION: [&str; 2] = ["duration", "request_time"];
const PROMPT: [&str; 3] = ["prompt_tokens", "contexttokens", "prompt"];
const GENERATED: [&str; 4] = ["generated_tokens", "generatedtokens", "completion_tokens", "generated"];

/// Where each column is.
struct Columns {
    header: csv::StringRecord,
    time: usize,
    service: Option<usize>,
    duration: Option<usize>,
    tokens: Option<(usize, usize)>,
}

impl Columns {
    fn of(header: &csv::StringRecord) -> Result<Self, TraceError> {
        let find = |names: &[&str]| {
            header.iter().position(|column| names.iter().any(|name| column.trim().eq_ignore_ascii_case(name)))
        };
        let got = || header.iter().collect::<Vec<_>>().join(", ");
        Ok(Self {
            time: find(&TIME).ok_or_else(|| TraceError::NoTime { got: got() })?,
            service: find(&SERVICE),
            duration: find(&DURATION),
            tokens: find(&PROMPT).zip(find(&GENERATED)),
            header: header.clone(),
        })
    }

    fn value<T>(
        &self,
        record: &csv::StringRecord,
        column: usize,
        expected: &'static str,
        read: impl Fn(&str) -> Option<T>,
    ) -> Result<T, TraceError> {
        let text = record.get(column).unwrap_or_default().trim();
        read(text).ok_or_else(|| TraceError::Value {
            line: record.position().map_or(0, csv::Position::line),
            column: self.header.get(column).unwrap_or_default().to_owned(),
            value: text.to_owned(),
            expected,
        })
    }

    fn work(&self, record: &csv::StringRecord) -> Result<Work, TraceError> {
        let count = |text: &str| text.parse().ok();
        if let Some(column) = self.duration {
            return self.value(record, column, "seconds, or a duration such as 250ms", duration).map(Work::Duration);
        }
        let Some((prompt, generated)) = self.tokens else { return Ok(Work::Unknown) };
        Ok(Work::Tokens {
            prompt: self.value(record, prompt, "a number of tokens", count)?,
            generated: self.value(record, generated, "a number of tokens", count)?,
        })
    }
}

/// Reads a trace: a header and a line per request. Columns are found by name, in any order and case:
/// arrival time (RFC 3339, `2023-11-16 18:17:03.97`, or seconds), `service`, and either `duration`
/// (seconds, or as `250ms`) or prompt and generated tokens. Lines need not be sorted.
///
/// # Errors
/// The first line and column that cannot be read.
pub fn read(input: impl io::Read) -> Result<Trace, TraceError> {
    let mut reader = csv::ReaderBuilder::new().comment(Some(b'#')).from_reader(input);
    let columns = Columns::of(reader.headers()?)?;
    let mut services: Vec<String> = Vec::new();
    let mut rows: Vec<(Timestamp, usize, Work)> = Vec::new();
    for record in reader.records() {
        let record = record?;
        let time = columns.value(&record, columns.time, "a time, or seconds", moment)?;
        let name = columns.service.and_then(|column| record.get(column)).unwrap_or_default().trim();
        let service = services.iter().position(|known| known == name).unwrap_or_else(|| {
            services.push(name.to_owned());
            services.len() - 1
        });
        rows.push((time, service, columns.work(&record)?));
    }
    rows.sort_by_key(|(time, ..)| *time);
    let epoch = rows.first().ok_or(TraceError::Empty)?.0;
    let requests = rows
        .into_iter()
        .map(|(time, service, work)| Request { at: crate::reconcile::world::since(epoch, time), service, work })
        .collect();
    Ok(Trace { epoch, services, requests })
}

/// A time with or without zone (then UTC), or seconds since the Unix epoch.
fn moment(text: &str) -> Option<Timestamp> {
    if let Ok(seconds) = text.parse::<f64>() {
        let nanos = (seconds * 1e9).round();
        return nanos.is_finite().then(|| Timestamp::from_nanosecond(nanos as i128).ok())?;
    }
    let zoned = text.parse::<Timestamp>().ok();
    zoned.or_else(|| text.parse::<civil::DateTime>().ok()?.to_zoned(TimeZone::UTC).ok().map(|zoned| zoned.timestamp()))
}

fn duration(text: &str) -> Option<Duration> {
    match text.parse::<f64>() {
        Ok(seconds) => Duration::try_from_secs_f64(seconds).ok(),
        Err(_) => humantime::parse_duration(text).ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_azure_format_is_read_as_it_is() {
        let text = "TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 18:17:03.9799600,4808,10\r\n2023-11-16 18:17:04.0319600,3180,8\r\n";
        let trace = read(text.as_bytes()).unwrap();
        assert_eq!(trace.epoch.to_string(), "2023-11-16T18:17:03.97996Z");
        assert_eq!(trace.services, [""]);
        assert_eq!(trace.requests[1].at, Duration::from_millis(52));
        assert_eq!(trace.requests[1].work, Work::Tokens { prompt: 3180, generated: 8 });
    }

    #[test]
    fn services_and_durations_are_read_in_any_order() {
        let text = "service,duration,arrival\n# a comment\nb,250ms,1.5\na,2,0.5\n";
        let trace = read(text.as_bytes()).unwrap();
        assert_eq!(trace.services, ["b", "a"]);
        let [first, second] = trace.requests[..] else { panic!("{trace:?}") };
        assert_eq!((first.service, first.work), (1, Work::Duration(Duration::from_secs(2))));
        assert_eq!((second.at, second.work), (Duration::from_secs(1), Work::Duration(Duration::from_millis(250))));
    }

    #[test]
    fn mistakes_are_named() {
        let error = |text: &str| read(text.as_bytes()).unwrap_err().to_string();
        assert!(error("when,what\n1,2\n").contains("no column for the arrival time"));
        assert!(error("arrival,duration\n1,soon\n").starts_with("line 2, column duration: \"soon\""));
        assert!(error("arrival,duration\n1,-2\n").contains("expected seconds"));
        assert!(error("arrival\nyesterday\n").contains("expected a time"));
        assert_eq!(error("arrival\n"), "the trace has no request");
    }
}
