//! Notices that a running container has lost access to its GPUs.

use std::time::Duration;

use crate::runtime::GpuAccess;

/// Time between two questions. Each is a command in the container.
const INTERVAL: Duration = Duration::from_secs(60);
/// Time before the first question, and before one that confirms a denial.
const SHORT_INTERVAL: Duration = Duration::from_secs(5);
/// Longest wait for an answer. A command that hangs on a broken GPU cannot be ended, so there is no further one.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// Denials in a row after which access counts as lost.
const DENIALS: u32 = 2;

/// Resolves with the reason when access is lost; never if it cannot be found out. `ask` asks once.
///
/// A container that was denied from the start is left alone, since a restart would not help it: access must have been
/// there once. Of one that was started by a previous agent process (`adopted`) that is presumed.
pub(super) async fn lost<Answer>(adopted: bool, mut ask: impl FnMut() -> Answer) -> String
where
    Answer: Future<Output = GpuAccess>,
{
    let (mut was_usable, mut denials, mut unknown) = (adopted, 0, 0);
    let mut pause = SHORT_INTERVAL;
    loop {
        tokio::time::sleep(pause).await;
        pause = INTERVAL;
        match tokio::time::timeout(ANSWER_TIMEOUT, ask()).await {
            Ok(GpuAccess::Usable) => (was_usable, denials, unknown) = (true, 0, 0),
            Ok(GpuAccess::Denied(why)) if was_usable => {
                denials += 1;
                if denials >= DENIALS {
                    return why;
                }
                pause = SHORT_INTERVAL;
            }
            Ok(GpuAccess::Denied(_)) => {}
            // The image has no means to find out.
            Ok(GpuAccess::Unknown) if !was_usable && unknown >= 1 => std::future::pending().await,
            Ok(GpuAccess::Unknown) => unknown += 1,
            Err(_) => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::Cell, rc::Rc};

    use tokio::time::Instant;

    use super::*;

    const USABLE: GpuAccess = GpuAccess::Usable;
    const UNKNOWN: GpuAccess = GpuAccess::Unknown;

    fn denied() -> GpuAccess {
        GpuAccess::Denied("denied".to_owned())
    }

    /// When access is lost with these answers, of which the last repeats, seconds; and how often was asked.
    async fn lost_after(adopted: bool, answers: &[GpuAccess]) -> (Option<u64>, usize) {
        let (began, asked) = (Instant::now(), Rc::new(Cell::new(0)));
        let ask = || {
            let at = asked.replace(asked.get() + 1);
            let answer = answers[at.min(answers.len() - 1)].clone();
            async move { answer }
        };
        let lost = tokio::time::timeout(Duration::from_secs(601), lost(adopted, ask)).await;
        (lost.ok().map(|_| began.elapsed().as_secs()), asked.get())
    }

    #[tokio::test(start_paused = true)]
    async fn access_is_lost_when_two_denials_follow_access() {
        assert_eq!(lost_after(false, &[USABLE, denied()]).await, (Some(70), 3));
        assert_eq!(lost_after(false, &[USABLE, denied(), USABLE, denied()]).await.0, Some(135));
        assert_eq!(lost_after(false, &[USABLE]).await, (None, 10), "asked each minute");
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_never_had_access_is_left_alone_unless_it_was_adopted() {
        assert_eq!(lost_after(false, &[denied()]).await.0, None);
        assert_eq!(lost_after(true, &[denied()]).await, (Some(10), 2));
    }

    #[tokio::test(start_paused = true)]
    async fn an_image_without_the_means_is_not_asked_again_and_again() {
        assert_eq!(lost_after(false, &[UNKNOWN]).await, (None, 2));
        assert_eq!(lost_after(false, &[USABLE, UNKNOWN, denied()]).await.0, Some(130), "one that had them is");
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_asked_after_a_command_that_hangs() {
        let asked = Cell::new(0);
        let ask = || {
            asked.set(asked.get() + 1);
            std::future::pending()
        };
        assert!(tokio::time::timeout(Duration::from_secs(601), lost(true, ask)).await.is_err());
        assert_eq!(asked.get(), 1);
    }
}
