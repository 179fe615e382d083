//! What a former leader still does: it answers reads from memory, as of when it stepped down.

use tokio_util::sync::CancellationToken;

use super::{
    commands::{CommandError, Input},
    run::Reconciler,
};

impl Reconciler {
    /// Answers reads from what is in memory, and refuses all else, until `until`.
    pub async fn answer_reads(mut self, until: CancellationToken) {
        let now = self.clock.now();
        loop {
            let input = tokio::select! {
                () = until.cancelled() => return,
                input = self.inputs.recv() => input,
            };
            // An asker may have hung up; then nobody needs the answer.
            match input {
                None => return,
                Some(Input::Read(look)) => look(&self.world, now),
                // Another leader may have written newer usage.
                Some(Input::Usage { reply }) => drop(reply),
                Some(Input::Connected { session, .. }) => session.close(),
                Some(Input::Apply { reply, .. }) => drop(reply.send(Err(CommandError::SteppedDown))),
                Some(
                    Input::Delete { reply, .. }
                    | Input::SetAvailability { reply, .. }
                    | Input::UnquarantineGpu { reply, .. }
                    | Input::LetGo { reply, .. },
                ) => {
                    drop(reply.send(Err(CommandError::SteppedDown)));
                }
                Some(Input::DeleteNode { reply, .. }) => drop(reply.send(Err(CommandError::SteppedDown))),
                Some(Input::ChangeModel { reply, .. }) => drop(reply.send(Err(CommandError::SteppedDown))),
                Some(Input::Disconnected { .. } | Input::Heard { .. } | Input::ValuesChanged { .. }) => {}
            }
        }
    }
}
