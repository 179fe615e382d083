//! `pilotlight user`.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use clap::ValueEnum;
use pilotlight_identity::Credentials;
use pilotlight_proto::control::v1::{CreateUserRequest, ListUsersRequest, RenewUserRequest, RevokeUserRequest, User};

use crate::{connect::ConnectionArgs, failure::Failure, output, table, table::Table};

/// What to do with users.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Create a user and write its credentials to a directory. The key is made here and is not sent.
    Create {
        /// Name of the user, a DNS label.
        name: String,
        /// What the user may do: a viewer reads; an operator applies and deletes, too; an admin also manages
        /// tokens, users and revocations.
        #[arg(long)]
        role: Role,
        /// The one namespace that the user may see and change. Default: all, and what belongs to none.
        #[arg(long, short)]
        namespace: Option<String>,
        /// Lifetime of the certificate, at most 365d.
        #[arg(long, default_value = "90d", value_parser = humantime::parse_duration)]
        ttl: Duration,
        /// Directory for the credentials [default: NAME in the current directory].
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
    },
    /// Renew your own certificate, the one of `--credentials`, and take over the authorities that are trusted now. It
    /// expires when the one before would have.
    Renew,
    /// List users.
    List,
    /// Refuse all certificates of a user, and end the user's open calls.
    Revoke {
        /// Name of the user.
        name: String,
    },
}

/// What a user may do.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Role {
    Viewer,
    Operator,
    Admin,
}

/// Executes a command.
pub async fn run(connection: ConnectionArgs, command: Command) -> Result<(), Failure> {
    let directory = connection.credentials().map(Path::to_owned);
    let mut client = connection.client()?;
    match command {
        Command::Create { name, role, namespace, ttl, out } => {
            let directory = out.unwrap_or_else(|| PathBuf::from(&name));
            if Credentials::exist(&directory) {
                return Err(anyhow::anyhow!("out: {} holds credentials already", directory.display()).into());
            }
            let (key_pem, csr_pem) = pilotlight_identity::new_csr().map_err(anyhow::Error::from)?;
            let request = CreateUserRequest {
                name: name.clone(),
                role: format!("{role:?}").to_lowercase(),
                namespace: namespace.unwrap_or_default(),
                ttl: Some(prost_types::Duration::try_from(ttl).map_err(anyhow::Error::from)?),
                csr_pem,
            };
            let answer = client.create_user(request).await?.into_inner();
            let credentials = Credentials { certificate_pem: answer.certificate_pem, key_pem, ca_pem: answer.ca_pem };
            credentials.save(&directory).map_err(anyhow::Error::from)?;
            output::print(&format!("user/{name} created; use --credentials {}\n", directory.display()))
        }
        Command::Renew => {
            let directory = directory.ok_or_else(|| anyhow::anyhow!("credentials: pass --credentials DIR"))?;
            let (key_pem, csr_pem) = pilotlight_identity::new_csr().map_err(anyhow::Error::from)?;
            let answer = client.renew_user(RenewUserRequest { csr_pem }).await?.into_inner();
            let credentials = Credentials { certificate_pem: answer.certificate_pem, key_pem, ca_pem: answer.ca_pem };
            credentials.save(&directory).map_err(anyhow::Error::from)?;
            output::print(&format!("certificate in {} renewed\n", directory.display()))
        }
        Command::List => {
            let users = client.list_users(ListUsersRequest {}).await?.into_inner().users;
            output::print(&list(users))
        }
        Command::Revoke { name } => {
            client.revoke_user(RevokeUserRequest { name: name.clone() }).await?;
            output::print(&format!("user/{name} revoked\n"))
        }
    }
}

fn list(users: Vec<User>) -> String {
    let mut table = Table::new(&["NAME", "ROLE", "NAMESPACE", "CREATED-BY", "EXPIRES", "REVOKED"]);
    for user in users {
        let namespace = if user.namespace.is_empty() { "*".to_owned() } else { user.namespace };
        let (expires, revoked) = (table::moment(user.expires_at), table::moment(user.revoked_at));
        table.row([user.name, user.role, namespace, user.created_by, expires, revoked]);
    }
    table.text()
}
