//! `pilotlight token`.

use std::time::Duration;

use pilotlight_proto::control::v1::{CreateTokenRequest, ListTokensRequest, RevokeTokenRequest, Token};

use crate::{connect::ConnectionArgs, failure::Failure, output, table, table::Table};

/// What to do with tokens.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Make a token by which one node may join, once.
    Create {
        /// How long it may be used, at most 24h.
        #[arg(long, default_value = "1h", value_parser = humantime::parse_duration)]
        ttl: Duration,
        /// Name of the node that may join, or a pattern such as 'gpu-*' [default: any name].
        #[arg(long, value_name = "NAME")]
        node: Option<String>,
        /// Let the node join under a name that has joined before, such as after its disk was replaced.
        #[arg(long, requires = "node")]
        replace: bool,
    },
    /// List tokens that can still be used.
    List,
    /// Delete a token.
    Revoke {
        /// Its id, as `list` shows it: the second part of the token.
        id: String,
    },
}

/// Executes a command. `create` prints the token alone, so that scripts can take it.
pub async fn run(connection: ConnectionArgs, command: Command) -> Result<(), Failure> {
    let mut client = connection.client()?;
    match command {
        Command::Create { ttl, node, replace } => {
            let ttl = prost_types::Duration::try_from(ttl).map_err(anyhow::Error::from)?;
            let request = CreateTokenRequest { ttl: Some(ttl), node: node.unwrap_or_default(), replace };
            let answer = client.create_token(request).await?.into_inner();
            output::print(&format!("{}\n", answer.token))
        }
        Command::List => output::print(&list(client.list_tokens(ListTokensRequest {}).await?.into_inner().tokens)),
        Command::Revoke { id } => {
            client.revoke_token(RevokeTokenRequest { id: id.clone() }).await?;
            output::print(&format!("token/{id} revoked\n"))
        }
    }
}

fn list(tokens: Vec<Token>) -> String {
    let mut table = Table::new(&["ID", "NODE", "REPLACE", "CREATED-BY", "EXPIRES"]);
    for token in tokens {
        let node = if token.node.is_empty() { "*".to_owned() } else { token.node };
        let expires = table::moment(token.expires_at);
        table.row([token.id, node, token.replace.to_string(), token.created_by, expires]);
    }
    table.text()
}
