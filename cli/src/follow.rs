//! Commands that go on for long: they outlive the coordinator that they began with.

use std::{
    io::{Write as _, stderr},
    time::Duration,
};

use tokio::time::Instant;

use crate::{
    connect::{Client, ConnectionArgs},
    failure::Failure,
};

/// Pause before the next attempt.
const RETRY_PAUSE: Duration = Duration::from_millis(500);
/// How long a command that has no timeout of its own looks for the next leader.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Whether a session has reached the coordinator.
#[derive(Debug, Default)]
pub struct Reached(bool);

impl Reached {
    /// The coordinator has answered.
    pub fn set(&mut self) {
        self.0 = true;
    }
}

/// Runs a session with the coordinator that leads, and another one after it broke, until one ends by itself.
///
/// # Errors
/// The first session did not reach a coordinator, none was reached again within `patience`, or a session failed for
/// another reason.
pub async fn follow(
    connection: &ConnectionArgs,
    patience: Duration,
    mut session: impl AsyncFnMut(Client, &mut Reached) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let mut give_up_at: Option<Instant> = None;
    loop {
        let mut reached = Reached::default();
        let error = match session(connection.client()?, &mut reached).await {
            Err(Failure::Disconnected(error)) => error,
            ended => return ended,
        };
        if reached.0 {
            give_up_at = Some(Instant::now() + patience);
            // A warning that cannot be written is no reason to end.
            let _ = writeln!(stderr(), "warning: {error:#}; looking for the coordinator that leads");
        }
        if give_up_at.is_none_or(|give_up_at| Instant::now() >= give_up_at) {
            return Err(Failure::Disconnected(error));
        }
        tokio::time::sleep(RETRY_PAUSE).await;
    }
}

/// The stream of a session has ended, which it does only if the coordinator stops or leads no longer.
pub fn ended() -> Failure {
    Failure::Disconnected(anyhow::anyhow!("the coordinator has ended the session"))
}
