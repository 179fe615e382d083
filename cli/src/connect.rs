//! The connection to the coordinator that leads.

use std::{
    future::Future,
    io::{Write as _, stderr},
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use pilotlight_identity::{Channel, Coordinators, Credentials, LiveIdentity, STATE_TIME_HEADER, Trust};
use pilotlight_proto::control::v1::{GetVersionRequest, control_client::ControlClient};
use tokio::{sync::OnceCell, time::Instant};
use tonic::{Code, Status, body::Body, service::interceptor::ResponseBody};
use tower::{BoxError, Service, ServiceExt as _};

use crate::{
    dev_token,
    failure::{Failure, UNREACHABLE_HINT, is_transport_error},
};

/// Where the coordinator is, and who is asking.
#[derive(Debug, clap::Args)]
pub struct ConnectionArgs {
    /// Address of a coordinator; give all of them, separated by commas or with further flags. The one that leads is
    /// asked.
    #[arg(
        long,
        global = true,
        env = "PILOTLIGHT_SERVER",
        default_value = "http://127.0.0.1:7443",
        value_delimiter = ',',
        value_name = "URL"
    )]
    server: Vec<String>,
    /// Directory with cert.pem, key.pem and ca.pem, for https.
    #[arg(long, global = true, env = "PILOTLIGHT_CREDENTIALS", value_name = "DIR")]
    credentials: Option<PathBuf>,
    /// File with the token of `pilotlight dev` [default: that of the dev that runs at the server's address].
    #[arg(long, global = true, env = "PILOTLIGHT_TOKEN_FILE", value_name = "FILE")]
    token_file: Option<PathBuf>,
}

/// A client of the control API.
pub type Client = ControlClient<ToLeader>;

/// Largest answer that is taken, bytes.
const ANSWER_MOST: usize = 256 << 20;
/// Time in which one coordinator has to say whether it leads.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// Time in which one of several coordinators must have taken over.
const LEADER_TIMEOUT: Duration = Duration::from_secs(15);
/// Pause before all coordinators are asked again.
const ROUND_PAUSE: Duration = Duration::from_millis(500);

impl ConnectionArgs {
    /// The directory of `--credentials`.
    pub fn credentials(&self) -> Option<&Path> {
        self.credentials.as_deref()
    }

    /// Connects when it is first used.
    pub fn client(&self) -> Result<Client, Failure> {
        let trust = match &self.credentials {
            Some(directory) => {
                let credentials = Credentials::load(directory).map_err(anyhow::Error::from)?;
                Trust::Cell(LiveIdentity::new(&credentials).map_err(anyhow::Error::from)?)
            }
            // `dev` has one coordinator.
            None => dev_token::trust(&self.server[0], self.token_file.as_deref())?,
        };
        let coordinators = Coordinators::new(&self.server, trust).map_err(anyhow::Error::from)?;
        let channel = ToLeader { coordinators: Arc::new(coordinators), leader: Arc::default() };
        Ok(ControlClient::new(channel).max_decoding_message_size(ANSWER_MOST))
    }
}

/// A channel to the coordinator that leads, which is looked for at the first call.
#[derive(Debug, Clone)]
pub struct ToLeader {
    coordinators: Arc<Coordinators>,
    leader: Arc<OnceCell<Channel>>,
}

impl ToLeader {
    /// Asks one coordinator after another. Where there are several, one of them may be about to take over.
    async fn find(&self) -> Result<Channel, Status> {
        let deadline = Instant::now() + LEADER_TIMEOUT;
        let mut standby_seen = false;
        loop {
            let mut former = None;
            let mut failure = Status::unavailable("no coordinator answers");
            // Each of them once, and the leader that a standby names.
            for _ in 0..=self.coordinators.configured() {
                let (address, channel) = self.coordinators.current();
                let asking = async { ControlClient::new(channel.clone()).get_version(GetVersionRequest {}).await };
                let answer = tokio::time::timeout(ANSWER_TIMEOUT, asking).await;
                match answer.unwrap_or_else(|_| Err(Status::unavailable("no answer within 5 s"))) {
                    Ok(answer) => match answer.metadata().get(STATE_TIME_HEADER).and_then(|time| time.to_str().ok()) {
                        None => return Ok(channel),
                        Some(time) => {
                            former = Some((channel, time.to_owned()));
                            self.coordinators.failed(&address, &Status::unavailable("it leads no longer"));
                        }
                    },
                    Err(status) if status.code() == Code::Unavailable => {
                        standby_seen |= self.coordinators.failed(&address, &status);
                        let hint = if is_transport_error(&status) { UNREACHABLE_HINT } else { "" };
                        failure = Status::unavailable(format!("{address}: {}{hint}", status.message()));
                    }
                    // The call itself is answered in the same way.
                    Err(_) => return Ok(channel),
                }
            }
            if let Some((channel, time)) = former {
                // A warning that cannot be written is no reason not to answer.
                let _ = writeln!(stderr(), "warning: no coordinator can reach its store; this is the state of {time}");
                return Ok(channel);
            }
            let takes_over = standby_seen || self.coordinators.configured() > 1;
            if !takes_over || Instant::now() > deadline {
                return Err(failure);
            }
            tokio::time::sleep(ROUND_PAUSE).await;
        }
    }
}

impl Service<http::Request<Body>> for ToLeader {
    type Response = http::Response<ResponseBody<Body>>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let this = self.clone();
        Box::pin(async move {
            let channel = this.leader.get_or_try_init(|| this.find()).await?.clone();
            Ok(channel.oneshot(request).await?)
        })
    }
}
