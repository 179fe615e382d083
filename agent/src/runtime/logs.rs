//! A replica's output: the end of it, and what follows.

use std::{
    io::{self, SeekFrom},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use futures::Stream;
use tokio::{
    fs::File,
    io::{AsyncReadExt as _, AsyncSeekExt as _},
};

/// Bytes read at once.
const CHUNK: usize = 32 << 10;
/// How often a followed log is looked at.
const LOOK: Duration = Duration::from_millis(200);
/// A log larger than this is cut down.
pub const LOG_MOST: u64 = 10 << 20;
/// Lines of output in the status of a replica that has failed.
pub const MAX_LAST_LINES: usize = 10;
/// Bytes of each of these lines.
pub const MAX_LAST_LINE_BYTES: usize = 500;
/// Bytes at the end of a log in which they are looked for.
const LAST_BYTES: u64 = 64 << 10;

/// The last `tail_lines` lines (0: all), and with `follow` what is written from then on. A followed log ends when its
/// file is gone, and continues with the next run's output after a restart.
pub fn read(path: PathBuf, tail_lines: u32, follow: bool) -> impl Stream<Item = io::Result<Bytes>> + Send {
    async_stream::try_stream! {
        let mut file = File::open(&path).await?;
        let mut at = start(&mut file, tail_lines).await?;
        file.seek(SeekFrom::Start(at)).await?;
        let mut buffer = vec![0; CHUNK];
        let mut next = Next::Same;
        loop {
            let read = file.read(&mut buffer).await?;
            if read > 0 {
                at += read as u64;
                yield Bytes::copy_from_slice(&buffer[..read]);
                continue;
            }
            // Only now is the file that was replaced at its end.
            match std::mem::replace(&mut next, Next::Same) {
                Next::Same if !follow => break,
                Next::Same => {}
                Next::Gone => break,
                Next::Replaced(replacement) => {
                    (file, at) = (replacement, 0);
                    continue;
                }
            }
            tokio::time::sleep(LOOK).await;
            next = following(&file, &path).await?;
            // A file that has become shorter was cut down: read it again from its beginning.
            if file.metadata().await?.len() < at {
                at = 0;
                file.seek(SeekFrom::Start(0)).await?;
            }
        }
    }
}

/// What follows the file that is being read.
enum Next {
    /// More of the same file.
    Same,
    /// The file of the next run.
    Replaced(File),
    /// Nothing: the replica has been removed.
    Gone,
}

async fn following(file: &File, path: &Path) -> io::Result<Next> {
    let replacement = match File::open(path).await {
        Ok(replacement) => replacement,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Next::Gone),
        Err(error) => return Err(error),
    };
    let (old, new) = (file.metadata().await?, replacement.metadata().await?);
    let same = (old.dev(), old.ino()) == (new.dev(), new.ino());
    Ok(if same { Next::Same } else { Next::Replaced(replacement) })
}

/// The last lines of a log that hold something, oldest first: at most [`MAX_LAST_LINES`] of
/// [`MAX_LAST_LINE_BYTES`] bytes each, without control characters. Empty if the log cannot be read.
pub fn last_lines(path: &Path) -> Vec<String> {
    let tail = tail(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&tail);
    let mut lines: Vec<_> = text.lines().rev().filter_map(printable).take(MAX_LAST_LINES).collect();
    lines.reverse();
    lines
}

/// The last bytes of a file, from the beginning of a line on.
fn tail(path: &Path) -> io::Result<Vec<u8>> {
    let mut file = std::fs::File::open(path)?;
    let from = file.metadata()?.len().saturating_sub(LAST_BYTES);
    io::Seek::seek(&mut file, SeekFrom::Start(from))?;
    let mut tail = Vec::new();
    io::Read::read_to_end(&mut io::Read::take(file, LAST_BYTES), &mut tail)?;
    if from > 0 {
        let line = tail.iter().position(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        tail.drain(..line);
    }
    Ok(tail)
}

/// A line as it can be shown in a status; `None` if nothing is left of it.
fn printable(line: &str) -> Option<String> {
    // Progress bars return to the beginning of the line: what was printed last is what a terminal shows.
    let shown = line.trim_end().rsplit('\r').next().unwrap_or_default();
    let mut characters = shown.chars();
    let mut text = String::with_capacity(shown.len());
    while let Some(character) = characters.next() {
        match character {
            // A terminal's control sequence, such as a colour, ends with a letter or one of `@^_\`{|}~`.
            '\u{1b}' if characters.as_str().starts_with('[') => {
                characters.by_ref().skip(1).find(|end| ('@'..='~').contains(end));
            }
            '\t' => text.push(' '),
            character if character.is_control() => {}
            character => text.push(character),
        }
    }
    text.truncate(text.floor_char_boundary(MAX_LAST_LINE_BYTES));
    (!text.trim().is_empty()).then_some(text)
}

/// Where the last `lines` lines begin.
async fn start(file: &mut File, lines: u32) -> io::Result<u64> {
    if lines == 0 {
        return Ok(0);
    }
    let end = file.metadata().await?.len();
    let mut at = end;
    let mut newlines = 0;
    while at > 0 {
        let from = at.saturating_sub(CHUNK as u64);
        let mut block = vec![0; (at - from) as usize];
        file.seek(SeekFrom::Start(from)).await?;
        file.read_exact(&mut block).await?;
        for (index, byte) in block.iter().enumerate().rev() {
            let position = from + index as u64;
            // The newline that ends the last line begins none.
            if *byte == b'\n' && position + 1 != end {
                newlines += 1;
                if newlines == lines {
                    return Ok(position + 1);
                }
            }
        }
        at = from;
    }
    Ok(0)
}

/// Cuts a log down to its last half once it is too large. The writer appends, so it goes on at the end.
///
/// # Errors
/// The file cannot be read or written.
pub fn cut_down(path: &Path) -> io::Result<()> {
    let length = std::fs::metadata(path)?.len();
    if length <= LOG_MOST {
        return Ok(());
    }
    let text = std::fs::read(path)?;
    let half = text.len() / 2;
    let line = text[half..].iter().position(|byte| *byte == b'\n').map_or(half, |at| half + at + 1);
    let file = std::fs::OpenOptions::new().write(true).open(path)?;
    file.set_len(0)?;
    io::Write::write_all(&mut &file, &text[line..])
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use futures::StreamExt as _;

    use super::*;

    async fn all(path: &Path, tail: u32) -> String {
        let chunks: Vec<_> = read(path.to_owned(), tail, false).map(|chunk| chunk.unwrap()).collect().await;
        String::from_utf8(chunks.concat()).unwrap()
    }

    #[tokio::test]
    async fn the_last_lines_are_found() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        write!(file, "one\ntwo\nthree\n").unwrap();
        for (tail, expected) in
            [(0, "one\ntwo\nthree\n"), (1, "three\n"), (2, "two\nthree\n"), (9, "one\ntwo\nthree\n")]
        {
            assert_eq!(all(file.path(), tail).await, expected, "{tail}");
        }
        write!(file, "open").unwrap();
        assert_eq!(all(file.path(), 1).await, "open");
    }

    #[tokio::test]
    async fn a_followed_log_goes_on() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        writeln!(file, "before").unwrap();
        let mut log = std::pin::pin!(read(file.path().to_owned(), 1, true));
        assert_eq!(log.next().await.unwrap().unwrap(), "before\n");
        writeln!(file, "after").unwrap();
        assert_eq!(log.next().await.unwrap().unwrap(), "after\n");
    }

    #[tokio::test]
    async fn a_followed_log_continues_with_the_next_run_and_ends_with_the_replica() {
        let directory = tempfile::tempdir().unwrap();
        let [path, previous] = ["output.log", "previous.log"].map(|name| directory.path().join(name));
        std::fs::write(&path, "first\n").unwrap();
        let mut log = std::pin::pin!(read(path.clone(), 0, true));
        assert_eq!(log.next().await.unwrap().unwrap(), "first\n");
        // Shorter than what was read already.
        std::fs::rename(&path, &previous).unwrap();
        std::fs::write(&path, "two\n").unwrap();
        std::fs::write(&previous, "first\nlast words\n").unwrap();
        assert_eq!(log.next().await.unwrap().unwrap(), "last words\n");
        assert_eq!(log.next().await.unwrap().unwrap(), "two\n");
        std::fs::remove_file(&path).unwrap();
        assert!(log.next().await.is_none());
    }

    #[test]
    fn the_last_lines_are_few_short_and_printable() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let lines = |content: &[u8]| {
            std::fs::write(file.path(), content).unwrap();
            last_lines(file.path())
        };
        assert_eq!(lines(b"one\n\n  \ntwo\r\nopen"), ["one", "two", "open"]);
        assert_eq!(lines(b"\x1b[1;31mred\x1b[0m\tbell\x07\n 10%\r 99%\n\xff"), ["red bell", " 99%", "\u{fffd}"]);
        let many: String = (0..30).map(|line| format!("{line}\n")).collect();
        assert_eq!(lines(many.as_bytes()), (20..30).map(|line| line.to_string()).collect::<Vec<_>>());
        let long = "ä".repeat(400);
        assert_eq!(lines(long.as_bytes()), ["ä".repeat(250)]);
        // Only the end of a large log is read, from the beginning of a line on.
        let large = format!("{}\nlast\n", "x".repeat(100 << 10));
        assert_eq!(lines(large.as_bytes()), ["last"]);
        assert_eq!(last_lines("/nowhere".as_ref()), [""; 0]);
    }

    #[test]
    fn a_large_log_loses_its_first_half() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        for line in 0..=LOG_MOST / 8 {
            writeln!(file, "{line:07}").unwrap();
        }
        cut_down(file.path()).unwrap();
        let text = std::fs::read_to_string(file.path()).unwrap();
        assert!((text.len() as u64) < LOG_MOST * 6 / 10);
        assert!(text.ends_with(&format!("{:07}\n", LOG_MOST / 8)) && text.starts_with('0'));
        assert_eq!(text.lines().next().unwrap().len(), 7, "begins with a whole line");
    }
}
