//! Writes down what the autoscaler was told and what it decided, so that a run can be replayed.

use std::{
    fs::File,
    io::{BufWriter, Write as _},
    path::Path,
};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tracing::error;

use crate::autoscaler::{Decision, Observation, Sample, ScalerConfig};

/// One line of a recording.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Line {
    /// When.
    pub at: Timestamp,
    /// `<namespace>/<revision>`.
    pub revision: String,
    /// What.
    #[serde(flatten)]
    pub entry: Entry,
}

/// What the autoscaler of one revision was told or decided.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "camelCase")]
pub enum Entry {
    /// A scaler was made.
    New {
        /// Its settings.
        config: ScalerConfig,
        /// Ready replicas at that time.
        ready: Option<u32>,
    },
    /// Its settings changed.
    Reconfigure {
        /// From now on.
        config: ScalerConfig,
    },
    /// One agent's report.
    Sample {
        /// As given to `Scaler::record`.
        sample: Sample,
    },
    /// Replicas run, and what is not reported is no load.
    Silence,
    /// A first request waited.
    Poke,
    /// A decision.
    Decide {
        /// What was seen.
        observation: Observation,
        /// What followed.
        decision: Decision,
    },
}

/// Writes lines, or nothing where nobody asked for them.
#[derive(Debug, Default)]
pub struct Recorder(Target);

#[derive(Debug, Default)]
enum Target {
    #[default]
    Nowhere,
    File(BufWriter<File>),
    Memory(Vec<Line>),
}

impl Recorder {
    /// Records into a file, after what it holds already: a coordinator may lead several times.
    ///
    /// # Errors
    /// The file cannot be opened.
    pub fn append(path: &Path) -> std::io::Result<Self> {
        let file = File::options().create(true).append(true).open(path)?;
        Ok(Self(Target::File(BufWriter::new(file))))
    }

    /// Keeps all lines.
    pub fn in_memory() -> Self {
        Self(Target::Memory(Vec::new()))
    }

    /// The lines kept in memory.
    pub fn lines(self) -> Vec<Line> {
        match self.0 {
            Target::Memory(lines) => lines,
            Target::Nowhere | Target::File(_) => Vec::new(),
        }
    }

    /// Writes one entry; `entry` is only made where somebody records.
    pub fn write(&mut self, at: Timestamp, revision: &str, entry: impl FnOnce() -> Entry) {
        let line = |entry| Line { at, revision: revision.to_owned(), entry };
        match &mut self.0 {
            Target::Nowhere => {}
            Target::Memory(lines) => lines.push(line(entry())),
            Target::File(file) => {
                let written = serde_json::to_writer(&mut *file, &line(entry())).map_err(std::io::Error::from);
                let written = written.and_then(|()| file.write_all(b"\n"));
                self.check(written);
            }
        }
    }

    /// Brings buffered lines to the file.
    pub fn flush(&mut self) {
        let flushed = if let Target::File(file) = &mut self.0 { file.flush() } else { Ok(()) };
        self.check(flushed);
    }

    /// A recording with a hole would mislead: it ends at the first error.
    fn check(&mut self, result: std::io::Result<()>) {
        if let Err(error) = result {
            error!(%error, "the recording ends here");
            self.0 = Target::Nowhere;
        }
    }
}
