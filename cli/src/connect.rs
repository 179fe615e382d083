//! The connection to the coordinator.

use std::path::PathBuf;

use pilotlight_identity::{Channel, Credentials, LiveIdentity, Trust};
use pilotlight_proto::control::v1::control_client::ControlClient;

use crate::{dev_token, failure::Failure};

/// Where the coordinator is, and who is asking.
#[derive(Debug, clap::Args)]
pub struct ConnectionArgs {
    /// Address of the coordinator.
    #[arg(long, global = true, env = "PILOTLIGHT_SERVER", default_value = "http://127.0.0.1:7443", value_name = "URL")]
    server: String,
    /// Directory with cert.pem, key.pem and ca.pem, for https.
    #[arg(long, global = true, env = "PILOTLIGHT_CREDENTIALS", value_name = "DIR")]
    credentials: Option<PathBuf>,
    /// File with the token of `pilotlight dev` [default: that of the dev that runs at the server's address].
    #[arg(long, global = true, env = "PILOTLIGHT_TOKEN_FILE", value_name = "FILE")]
    token_file: Option<PathBuf>,
}

/// A client of the control API.
pub type Client = ControlClient<Channel>;

/// Largest answer that is taken, bytes.
const ANSWER_MOST: usize = 256 << 20;

impl ConnectionArgs {
    /// Connects when it is first used.
    pub fn client(&self) -> Result<Client, Failure> {
        let trust = match &self.credentials {
            Some(directory) => {
                let credentials = Credentials::load(directory).map_err(anyhow::Error::from)?;
                Trust::Cell(LiveIdentity::new(&credentials).map_err(anyhow::Error::from)?)
            }
            None => dev_token::trust(&self.server, self.token_file.as_deref())?,
        };
        let channel = pilotlight_identity::channel(&self.server, &trust).map_err(anyhow::Error::from)?;
        Ok(ControlClient::new(channel).max_decoding_message_size(ANSWER_MOST))
    }
}
