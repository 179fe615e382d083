//! A replica's output: the end of it, and what follows.

use std::{
    io::{self, SeekFrom},
    path::PathBuf,
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

/// The last `tail_lines` lines (0: all), and with `follow` what is written from then on.
pub fn read(path: PathBuf, tail_lines: u32, follow: bool) -> impl Stream<Item = io::Result<Bytes>> + Send {
    async_stream::try_stream! {
        let mut file = File::open(&path).await?;
        let mut at = start(&mut file, tail_lines).await?;
        file.seek(SeekFrom::Start(at)).await?;
        let mut buffer = vec![0; CHUNK];
        loop {
            let read = file.read(&mut buffer).await?;
            if read > 0 {
                at += read as u64;
                yield Bytes::copy_from_slice(&buffer[..read]);
                continue;
            }
            if !follow {
                break;
            }
            tokio::time::sleep(LOOK).await;
            // A file that has become shorter was cut down: go on from its beginning.
            if tokio::fs::metadata(&path).await?.len() < at {
                at = 0;
                file.seek(SeekFrom::Start(0)).await?;
            }
        }
    }
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
pub fn cut_down(path: &std::path::Path) -> io::Result<()> {
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

    async fn all(path: &std::path::Path, tail: u32) -> String {
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
