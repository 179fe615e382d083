//! `pilotlight ca`.

use pilotlight_proto::control::v1::{
    ActivateAuthorityRequest, Authority, AuthorityState, GetAuthoritiesRequest, GetAuthoritiesResponse,
    RetireAuthorityRequest, RotateAuthorityRequest,
};

use crate::{connect::ConnectionArgs, failure::Failure, output, table, table::Table};

/// Characters of a fingerprint that are printed.
const SHORT: usize = 16;

/// What to do with the cell's certificate authority.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Show the authorities that are trusted, and whom each node and user trusts.
    Show {
        /// Print the certificates, PEM, and nothing else.
        #[arg(long)]
        pem: bool,
    },
    /// Make the next authority, which is trusted in addition to the one that signs. Once all trust it, run this with
    /// --activate.
    Rotate {
        /// Let the next authority sign. Nodes renew their certificates at once.
        #[arg(long)]
        activate: bool,
        /// Activate it although not everybody trusts it. Who does not can connect no more.
        #[arg(long, requires = "activate")]
        force: bool,
    },
    /// End the trust in the authority that does not sign: the previous one, or a next one that was not activated.
    Retire {
        /// Retire it although somebody holds a certificate of it. Who does can connect no more.
        #[arg(long)]
        force: bool,
    },
}

/// Executes a command.
pub async fn run(connection: ConnectionArgs, command: Command) -> Result<(), Failure> {
    let mut client = connection.client()?;
    match command {
        Command::Show { pem } => {
            let answer = client.get_authorities(GetAuthoritiesRequest {}).await?.into_inner();
            output::print(&if pem { answer.ca_pem } else { show(answer) })
        }
        Command::Rotate { activate: false, .. } => {
            let answer = client.rotate_authority(RotateAuthorityRequest {}).await?.into_inner();
            output::print(&format!(
                "authority/{} made. `pilotlight ca show` says who trusts it; once all do, run `pilotlight ca rotate \
                 --activate`\n",
                short_of(answer.authority)
            ))
        }
        Command::Rotate { activate: true, force } => {
            let answer = client.activate_authority(ActivateAuthorityRequest { force }).await?.into_inner();
            output::print(&format!(
                "authority/{} signs now. `pilotlight ca show` says who has a certificate of it; once all do, run \
                 `pilotlight ca retire`\n",
                short_of(answer.authority)
            ))
        }
        Command::Retire { force } => {
            let answer = client.retire_authority(RetireAuthorityRequest { force }).await?.into_inner();
            let authority = answer.authority.unwrap_or_default();
            let what = match authority.state() {
                AuthorityState::Next => "was not activated and is dropped; the rotation is undone",
                _ => "is trusted no longer",
            };
            output::print(&format!("authority/{} {what}\n", short(&authority.sha256)))
        }
    }
}

fn show(answer: GetAuthoritiesResponse) -> String {
    let mut authorities = Table::new(&["AUTHORITY", "STATE", "VALID-FROM", "VALID-UNTIL"]);
    for authority in answer.authorities {
        let state = match authority.state() {
            AuthorityState::Signing if answer.external => "Signing (from files)",
            AuthorityState::Signing => "Signing",
            AuthorityState::Next => "Next",
            AuthorityState::Previous => "Previous",
            AuthorityState::Unspecified => "Unknown",
        };
        let (from, until) = (table::moment(authority.not_before), table::moment(authority.not_after));
        authorities.row([short(&authority.sha256), state.to_owned(), from, until]);
    }
    let mut members = Table::new(&["MEMBER", "CERTIFICATE-OF", "TRUSTS"]);
    for member in answer.members {
        let trusts: Vec<_> = member.trusted_sha256.iter().map(|sha256| short(sha256)).collect();
        members.row([member.subject, or_unknown(short(&member.issuer_sha256)), or_unknown(trusts.join(","))]);
    }
    format!("{}\n{}", authorities.text(), members.text())
}

fn or_unknown(text: String) -> String {
    if text.is_empty() { "<unknown>".to_owned() } else { text }
}

fn short_of(authority: Option<Authority>) -> String {
    short(&authority.unwrap_or_default().sha256)
}

fn short(sha256: &str) -> String {
    sha256.chars().take(SHORT).collect()
}
