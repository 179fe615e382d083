//! How commands fail: a message and an exit status.

use std::{io::Write as _, process::ExitCode};

use tonic::{Code, Status};

/// Why a command did not do as asked.
#[derive(Debug)]
pub enum Failure {
    /// Wrong usage: exit status 2, or 0 where help was asked for.
    Usage(clap::Error),
    /// Anything else: exit status 1.
    Error(anyhow::Error),
    /// As [`Failure::Error`]: the coordinator does not answer, or answers no more. Another attempt may succeed.
    Disconnected(anyhow::Error),
    /// As [`Failure::Error`], where all has been said already.
    Refused,
    /// `diff` found a difference: exit status 1, and nothing more to say.
    Differs,
    /// `diff` could not compare: exit status 2.
    NotCompared(Option<anyhow::Error>),
    /// The reader of our output has gone: a normal end.
    ReaderGone,
}

impl Failure {
    /// Tells the user; returns the exit status.
    pub fn report(self) -> ExitCode {
        match self {
            Self::Usage(error) => {
                // The terminal may be gone; there is nobody to tell then.
                let _ = error.print();
                ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2))
            }
            Self::Error(error) | Self::Disconnected(error) => {
                let _ = writeln!(std::io::stderr(), "error: {error:#}");
                ExitCode::FAILURE
            }
            Self::Refused | Self::Differs => ExitCode::FAILURE,
            Self::NotCompared(error) => {
                if let Some(error) = error {
                    let _ = writeln!(std::io::stderr(), "error: {error:#}");
                }
                ExitCode::from(2)
            }
            Self::ReaderGone => ExitCode::SUCCESS,
        }
    }
}

impl From<clap::Error> for Failure {
    fn from(error: clap::Error) -> Self {
        Self::Usage(error)
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::Error(error)
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        if error.kind() == std::io::ErrorKind::BrokenPipe { Self::ReaderGone } else { Self::Error(error.into()) }
    }
}

/// What to look at if no coordinator can be reached.
pub const UNREACHABLE_HINT: &str = "; is the coordinator running, and is --server right?";

/// Returns `true` if the call did not reach a coordinator.
pub fn is_transport_error(status: &Status) -> bool {
    std::error::Error::source(status).is_some()
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        let hint = match status.code() {
            // The coordinator itself says what is wrong in its own words.
            Code::Unavailable if is_transport_error(&status) => UNREACHABLE_HINT,
            // Without one the token of `dev` is what is wrong.
            Code::Unauthenticated if status.message().contains("certificate") => {
                "; give --credentials, the directory `operator` below the coordinator's data-dir"
            }
            _ => "",
        };
        let error = anyhow::anyhow!("{}{hint}", status.message());
        let disconnected = status.code() == Code::Unavailable || is_transport_error(&status);
        if disconnected { Self::Disconnected(error) } else { Self::Error(error) }
    }
}
