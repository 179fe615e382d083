//! Tells systemd how the process is, if systemd asks for it (`Type=notify`, `WatchdogSec=`).

use std::time::Duration;

use sd_notify::NotifyState;
use tokio::time::{Instant, interval_at};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

/// Time between two looks at the readiness, unless the watchdog needs to be told more often.
const STATUS_INTERVAL: Duration = Duration::from_secs(1);

/// Tells systemd that the process has started, and from then on its readiness in words, that the runtime is alive, and
/// that the process is stopping. Returns at once; without systemd there is nothing to do.
///
/// A process that waits for something else, such as a coordinator for its store, has started: its status says for what it
/// waits.
pub fn notify_service_manager(
    readiness: impl Fn() -> Result<String, String> + Send + 'static,
    stopping: CancellationToken,
) {
    if std::env::var_os("NOTIFY_SOCKET").is_none() {
        return;
    }
    // systemd recommends half of the time after which it ends the process.
    let watchdog = sd_notify::watchdog_enabled().map(|timeout| timeout / 2);
    tokio::spawn(async move {
        tell(&[NotifyState::Ready]);
        let period = watchdog.map_or(STATUS_INTERVAL, |watchdog| watchdog.min(STATUS_INTERVAL));
        let mut ticks = interval_at(Instant::now(), period.max(Duration::from_millis(1)));
        let (mut told, mut is_stopping) = (String::new(), false);
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                () = stopping.cancelled(), if !is_stopping => {
                    is_stopping = true;
                    tell(&[NotifyState::Stopping]);
                }
            }
            if watchdog.is_some() {
                tell(&[NotifyState::Watchdog]);
            }
            let status = if is_stopping { "stopping".to_owned() } else { readiness().unwrap_or_else(|reason| reason) };
            if status != told {
                tell(&[NotifyState::Status(&status)]);
                told = status;
            }
        }
    });
}

fn tell(states: &[NotifyState<'_>]) {
    match sd_notify::notify(states) {
        Ok(()) => debug!(?states, "told systemd"),
        Err(error) => warn!(%error, "cannot tell systemd how this process is"),
    }
}
