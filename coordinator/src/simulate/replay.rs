//! A recorded run again: what the autoscaler was told then, told to it now.

use std::{collections::BTreeMap, io};

use jiff::Timestamp;
use serde::Serialize;

use crate::{
    autoscaler::{Decision, Scaler},
    reconcile::{
        clock::scaler_time,
        record::{Entry, Line},
    },
};

/// What came of it.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Replay {
    /// Decisions made again.
    pub decisions: usize,
    /// Reports taken in.
    pub samples: usize,
    /// Revisions seen.
    pub revisions: usize,
    /// Decisions in panic.
    pub in_panic: usize,
    /// Most replicas decided on.
    pub most: u32,
    /// Decisions that differ.
    pub differences: Vec<Difference>,
}

/// A decision that is not the one recorded.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Difference {
    /// Line of the recording, from 1.
    pub line: usize,
    /// When it was made.
    pub at: Timestamp,
    /// `<namespace>/<revision>`.
    pub revision: String,
    /// As recorded.
    pub recorded: Decision,
    /// As made now.
    pub replayed: Decision,
}

/// Why a recording cannot be replayed.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// It cannot be read.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// A line is not one of a recording.
    #[error("line {line}: {error}")]
    Line {
        /// From 1.
        line: usize,
        /// What is wrong with it.
        error: serde_json::Error,
    },
    /// A revision is spoken of before its scaler was made: the beginning is missing.
    #[error("line {line}: {revision} has no beginning in this recording")]
    NoBeginning {
        /// From 1.
        line: usize,
        /// Which.
        revision: String,
    },
}

/// Makes every decision of a recording again and compares the two.
///
/// # Errors
/// The recording cannot be read or has no beginning.
pub fn replay(recording: impl io::BufRead) -> Result<Replay, ReplayError> {
    let mut scalers: BTreeMap<String, Scaler> = BTreeMap::new();
    let mut replay = Replay::default();
    for (index, text) in recording.lines().enumerate() {
        let (text, number) = (text?, index + 1);
        if text.is_empty() {
            continue;
        }
        let line: Line = serde_json::from_str(&text).map_err(|error| ReplayError::Line { line: number, error })?;
        let now = scaler_time(line.at);
        if let Entry::New { config, ready } = line.entry {
            scalers.insert(line.revision, Scaler::new(config, now, ready));
            continue;
        }
        let Some(scaler) = scalers.get_mut(&line.revision) else {
            return Err(ReplayError::NoBeginning { line: number, revision: line.revision });
        };
        match line.entry {
            Entry::New { .. } => {}
            Entry::Reconfigure { config } => scaler.reconfigure(config),
            Entry::Sample { sample } => {
                replay.samples += 1;
                scaler.record(now, &sample);
            }
            Entry::Silence => scaler.silence(now),
            Entry::Poke => scaler.poke(now),
            Entry::Decide { observation, decision: recorded } => {
                let replayed = scaler.decide(now, &observation);
                replay.decisions += 1;
                replay.in_panic += usize::from(replayed.panic);
                replay.most = replay.most.max(replayed.applied);
                if replayed != recorded {
                    let (at, revision) = (line.at, line.revision);
                    replay.differences.push(Difference { line: number, at, revision, recorded, replayed });
                }
            }
        }
    }
    replay.revisions = scalers.len();
    Ok(replay)
}
