//! The steps of a rotation: `rotate` makes the next authority, `activate` lets it sign, `retire` ends the trust in the
//! one that does not sign.

use std::sync::Arc;

use pilotlight_identity::{Authority, CaCertificate};

use super::{Authorities, AuthorityRecord, LiveAuthorities};
use crate::{
    model::keys,
    server::CoordinatorError,
    store::{Store, StoreError, Transaction},
    values::Vault,
};

/// Why a step of a rotation cannot be taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RotationError {
    /// The authority is not the store's.
    #[error("the certificate authority comes from files (`--ca-cert`, `--ca-key`), and is not rotated here")]
    External,
    /// A rotation is under way.
    #[error("a rotation is under way; finish it by `pilotlight ca rotate --activate` and `pilotlight ca retire`")]
    UnderWay,
    /// There is no next authority.
    #[error("there is no next authority; make one by `pilotlight ca rotate`")]
    NoNext,
    /// Only one authority is trusted.
    #[error("there is no authority beside the one that signs")]
    NothingToRetire,
    /// Another coordinator or call has changed the authorities.
    #[error("the authorities have just been changed by another call; look at them by `pilotlight ca show`")]
    Changed,
    /// The new authorities cannot be stored.
    #[error(transparent)]
    Failed(CoordinatorError),
}

impl Authorities {
    /// With a next authority.
    pub(crate) fn rotate(&self, next: Authority) -> Result<Self, RotationError> {
        match self {
            _ if self.is_external() => Err(RotationError::External),
            Self { next: None, previous: None, .. } => Ok(Self { next: Some(Arc::new(next)), ..self.clone() }),
            _ => Err(RotationError::UnderWay),
        }
    }

    /// With the next authority as the one that signs. The key of the previous one is forgotten.
    pub(crate) fn activate(&self) -> Result<Self, RotationError> {
        let next = self.next.as_ref().ok_or(RotationError::NoNext)?;
        let previous = Some(self.signer.certificate_pem().to_owned());
        Ok(Self { signer: Arc::clone(next), next: None, previous, revision: self.revision })
    }

    /// Without the authority that does not sign.
    pub(crate) fn retire(&self) -> Result<Self, RotationError> {
        self.beside_signer().ok_or(RotationError::NothingToRetire)?;
        Ok(Self { next: None, previous: None, ..self.clone() })
    }

    /// The authority that is trusted and does not sign.
    pub(crate) fn beside_signer(&self) -> Option<CaCertificate> {
        self.trusted().into_iter().nth(1)
    }
}

impl LiveAuthorities {
    /// Stores and applies the authorities that follow `current`.
    pub(crate) async fn change(
        &self,
        store: &Arc<dyn Store>,
        vault: &Vault,
        current: &Authorities,
        following: Authorities,
    ) -> Result<(), RotationError> {
        let revision = current.revision.ok_or(RotationError::External)?;
        let record = AuthorityRecord::seal(&following, vault).map_err(RotationError::Failed)?;
        let write = Transaction::new().expect_revision(keys::AUTHORITY, revision).put_json(keys::AUTHORITY, &record);
        match store.commit(write).await {
            Ok(revision) => {
                self.set(Authorities { revision: Some(revision), ..following });
                Ok(())
            }
            Err(StoreError::Conflict { .. }) => Err(RotationError::Changed),
            Err(error) => Err(RotationError::Failed(error.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{authority::open, store::embedded::EmbeddedStore};

    fn next() -> Authority {
        Authority::generate("main").unwrap()
    }

    #[tokio::test]
    async fn a_rotation_goes_step_by_step_and_every_coordinator_reads_it() {
        let directory = tempfile::tempdir().unwrap();
        let store: Arc<dyn Store> = Arc::new(EmbeddedStore::open(&directory.path().join("state.redb")).unwrap());
        let vault = Vault::open(None, directory.path()).unwrap();
        let leader = LiveAuthorities::new(open(&store, "main", None, &vault).await.unwrap());
        let standby = LiveAuthorities::new(open(&store, "main", None, &vault).await.unwrap());
        let first = leader.current();
        let pins = |live: &LiveAuthorities| -> Vec<String> {
            live.current().trusted().into_iter().map(|authority| authority.sha256).collect()
        };
        let [old] = &pins(&leader)[..] else { panic!() };

        assert!(matches!(first.activate(), Err(RotationError::NoNext)));
        assert!(matches!(first.retire(), Err(RotationError::NothingToRetire)));
        leader.change(&store, &vault, &first, first.rotate(next()).unwrap()).await.unwrap();
        let [signer, new] = &pins(&leader)[..] else { panic!() };
        assert_eq!(signer, old, "the next one does not sign yet");
        assert!(matches!(leader.current().rotate(next()), Err(RotationError::UnderWay)));
        let late = leader.change(&store, &vault, &first, first.rotate(next()).unwrap()).await;
        assert!(matches!(late, Err(RotationError::Changed)));

        let rotated = leader.current();
        leader.change(&store, &vault, &rotated, rotated.activate().unwrap()).await.unwrap();
        assert_eq!(pins(&leader), [new.clone(), old.clone()]);
        assert!(matches!(leader.current().rotate(next()), Err(RotationError::UnderWay)));
        standby.reload(&store, "main", &vault).await.unwrap();
        assert_eq!(pins(&standby), [new.clone(), old.clone()]);
        assert_eq!(standby.current().signer.key_pem(), rotated.next.as_ref().unwrap().key_pem());
        let text = String::from_utf8(store.get(keys::AUTHORITY).await.unwrap().unwrap().value.to_vec()).unwrap();
        assert!(!text.contains("PRIVATE KEY"));

        let activated = leader.current();
        leader.change(&store, &vault, &activated, activated.retire().unwrap()).await.unwrap();
        standby.reload(&store, "main", &vault).await.unwrap();
        assert_eq!((pins(&leader), pins(&standby)), (vec![new.clone()], vec![new.clone()]));
    }

    #[tokio::test]
    async fn a_next_authority_that_was_not_activated_can_be_dropped() {
        let signer = Arc::new(next());
        let authorities = Authorities { signer: Arc::clone(&signer), next: None, previous: None, revision: Some(1) };
        let retired = authorities.rotate(next()).unwrap().retire().unwrap();
        assert_eq!((retired.signer.pin(), retired.trusted().len()), (signer.pin(), 1));
        let external = Authorities { revision: None, ..authorities };
        assert!(matches!(external.rotate(next()), Err(RotationError::External)));
    }
}
