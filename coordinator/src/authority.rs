//! The certificate authority of the cell in its store, and the certificates that a coordinator issues to itself.

use std::{path::Path, sync::Arc, time::Duration};

use pilotlight_identity::{Authority, Credentials, LiveIdentity, Member, Role};
use tracing::info;

use crate::{
    config::Config,
    model::keys,
    server::CoordinatorError,
    store::{Store, StoreExt as _, Transaction},
};

/// Certificates of the coordinator and its first operator; renewed at each start.
const COORDINATOR_LIFETIME: Duration = Duration::from_secs(365 * 24 * 3600);
/// Directory below the data directory for the first operator's certificate.
pub(crate) const OPERATOR_DIR: &str = "operator";

/// The operator's own authority, else the cell's, which the first coordinator makes.
pub(crate) async fn open(
    store: &Arc<dyn Store>,
    cell: &str,
    own: Option<(&Path, &Path)>,
) -> Result<Authority, CoordinatorError> {
    if let Some((certificate, key)) = own {
        return Ok(Authority::load(cell, certificate, key)?);
    }
    if let Some(pem) = store.get_json::<AuthorityRecord>(keys::AUTHORITY).await? {
        return Ok(Authority::from_pem(cell, &pem.certificate_pem, &pem.key_pem)?);
    }
    let authority = Authority::generate(cell)?;
    let record =
        AuthorityRecord { certificate_pem: authority.certificate_pem().to_owned(), key_pem: authority.key_pem() };
    let write = Transaction::new().expect_absent(keys::AUTHORITY).put_json(keys::AUTHORITY, &record);
    store.commit(write).await?;
    info!(cell, "made the cell's certificate authority");
    Ok(authority)
}

/// The authority as stored. Whoever can read the store can sign: protect it.
#[derive(serde::Serialize, serde::Deserialize)]
struct AuthorityRecord {
    certificate_pem: String,
    key_pem: String,
}

/// The coordinator's own certificate, and one for its first operator, written where the CLI finds it.
pub(crate) fn own_identity(
    config: &Config,
    authority: &Authority,
    names: &[String],
) -> Result<Arc<LiveIdentity>, CoordinatorError> {
    let operator = Member::operator("admin", Role::Admin)?;
    let issued = authority.issue(&operator, &[], COORDINATOR_LIFETIME)?;
    let directory = config.data_dir.join(OPERATOR_DIR);
    issued.save(&directory)?;
    info!(directory = %directory.display(), "operator's certificate written; use it by --credentials");
    let own: Credentials = authority.issue(&Member::Coordinator, names, COORDINATOR_LIFETIME)?;
    Ok(LiveIdentity::new(&own)?)
}
