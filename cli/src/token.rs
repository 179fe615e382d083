//! `pilotlight token`.

use std::time::Duration;

use pilotlight_proto::control::v1::CreateTokenRequest;

use crate::{connect::ConnectionArgs, failure::Failure, output};

/// What to do with tokens.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Make a token by which one node may join, once.
    Create {
        /// How long it may be used, at most 24h.
        #[arg(long, default_value = "1h", value_parser = humantime::parse_duration)]
        ttl: Duration,
    },
}

/// Prints the token alone, so that scripts can take it.
pub async fn run(connection: ConnectionArgs, command: Command) -> Result<(), Failure> {
    let Command::Create { ttl } = command;
    let ttl = prost_types::Duration::try_from(ttl).map_err(anyhow::Error::from)?;
    let answer = connection.client()?.create_token(CreateTokenRequest { ttl: Some(ttl) }).await?.into_inner();
    output::print(&format!("{}\n", answer.token))
}
