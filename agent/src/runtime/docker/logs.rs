//! A container's output, copied into the replica's log file, and gone on with where it was left.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    path::{Path, PathBuf},
    time::Duration,
};

use bollard::{Docker, query_parameters::LogsOptionsBuilder};
use futures::StreamExt as _;
use serde::{Deserialize, Serialize};

use super::super::state::LOG;

const CURSOR: &str = "log-cursor.json";
/// Between attempts to reach an engine that does not answer.
const PAUSE: Duration = Duration::from_secs(1);

/// How far a container's output has been copied.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Cursor {
    container: String,
    /// Time of the last entry, as the engine wrote it (RFC 3339).
    last: String,
    /// Entries with that time.
    count: u64,
    /// Bytes of the log file after it.
    length: u64,
}

impl Cursor {
    /// The entry without its time, where it was not copied before. `again` counts entries of the last time
    /// that the engine tells once more.
    fn take<'a>(&mut self, entry: &'a [u8], again: &mut u64) -> Option<&'a [u8]> {
        let Some(at) = entry.iter().position(|byte| *byte == b' ') else { return Some(entry) };
        let time = String::from_utf8_lossy(&entry[..at]).into_owned();
        // Times are of one length and zone, so that their text is in their order.
        match time.cmp(&self.last) {
            std::cmp::Ordering::Less => return None,
            std::cmp::Ordering::Equal if *again < self.count => {
                *again += 1;
                return None;
            }
            std::cmp::Ordering::Equal => {}
            std::cmp::Ordering::Greater => (self.last, self.count) = (time, 0),
        }
        self.count += 1;
        *again = self.count;
        Some(&entry[at + 1..])
    }

    /// Seconds since the Unix epoch, rounded down; 0 where nothing was copied.
    fn since(&self) -> i32 {
        let parsed = self.last.parse::<prost_types::Timestamp>();
        parsed.ok().and_then(|time| i32::try_from(time.seconds).ok()).unwrap_or(0)
    }
}

/// Copies until the container has ended, or is gone.
pub(super) async fn follow(docker: Docker, container: String, directory: PathBuf) {
    while let Err(error) = copy(&docker, &container, &directory).await {
        tracing::debug!(%container, %error, "output cannot be copied; again soon");
        if !directory.exists() {
            return;
        }
        tokio::time::sleep(PAUSE).await;
        match docker.inspect_container(&container, None).await {
            Err(error) if super::is_missing(&error) => return,
            _ => {}
        }
    }
}

async fn copy(docker: &Docker, container: &str, directory: &Path) -> io::Result<()> {
    let cursor_path = directory.join(CURSOR);
    let mut cursor = read(&cursor_path).filter(|cursor| cursor.container == container).unwrap_or_default();
    container.clone_into(&mut cursor.container);
    let mut log = File::options().create(true).append(true).open(directory.join(LOG))?;
    // What was written after the cursor will be told again.
    if cursor.length > 0 && log.metadata()?.len() > cursor.length {
        log.set_len(cursor.length)?;
    }
    let options = LogsOptionsBuilder::default().follow(true).stdout(true).stderr(true).timestamps(true);
    let mut entries = std::pin::pin!(docker.logs(container, Some(options.since(cursor.since()).build())));
    let mut again = 0;
    while let Some(entry) = entries.next().await {
        let entry = entry.map_err(io::Error::other)?.into_bytes();
        let Some(text) = cursor.take(&entry, &mut again) else { continue };
        log.write_all(text)?;
        cursor.length = log.metadata()?.len();
        fs::write(&cursor_path, serde_json::to_vec(&cursor)?)?;
    }
    Ok(())
}

fn read(path: &Path) -> Option<Cursor> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_that_were_copied_are_left_out_once() {
        let mut cursor = Cursor::default();
        let mut again = 0;
        let entries: [&[u8]; 3] = [
            b"2026-01-01T00:00:00.000000001Z a\n",
            b"2026-01-01T00:00:00.000000002Z b\n",
            b"2026-01-01T00:00:00.000000002Z c\n",
        ];
        assert_eq!(cursor.take(entries[0], &mut again), Some(b"a\n".as_slice()));
        assert_eq!(cursor.take(entries[1], &mut again), Some(b"b\n".as_slice()));
        // A later agent process: the engine tells all of that second again.
        let mut again = 0;
        let told: Vec<_> = entries.iter().filter_map(|entry| cursor.take(entry, &mut again)).collect();
        assert_eq!(told, [b"c\n"]);
        assert_eq!(cursor.since(), 1_767_225_600);
    }
}
