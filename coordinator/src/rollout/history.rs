//! Which revisions were ready, and which had all requests.

use serde::{Deserialize, Serialize};

/// Numbers of a service's revisions.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct History {
    /// The newest.
    pub created: u32,
    /// The newest that was ever ready.
    pub ready: Option<u32>,
    /// The one that last had all requests.
    pub rolledout: Option<u32>,
    /// The one that had them before; one step of history, as KServe keeps.
    pub previous: Option<u32>,
}

impl History {
    /// What is true once `canary` (percent for the newest; `None` is all) holds.
    ///
    /// KServe's rule: the newest ready revision is rolled out when it has all requests. If it was rolled
    /// out and now gets less although nothing newer is on its way, that is a roll-back, to the one
    /// before. While something newer *is* on its way, less than 100 means the newer one, and the base
    /// stays where it is.
    pub fn settled(self, canary: Option<u8>) -> Self {
        let Some(ready) = self.ready else { return self };
        let everything = canary.is_none_or(|percent| percent >= 100) || self.rolledout.is_none();
        if everything {
            if self.rolledout == Some(ready) {
                return self;
            }
            return Self { previous: self.rolledout, rolledout: Some(ready), ..self };
        }
        let goes_back = self.rolledout == Some(ready) && ready == self.created;
        match self.previous.filter(|previous| goes_back && *previous != ready) {
            Some(previous) => Self { rolledout: Some(previous), ..self },
            None => self,
        }
    }

    /// True where the revision may yet be asked for: it must not be thrown away.
    pub fn needs(&self, number: u32) -> bool {
        number == self.created || [self.ready, self.rolledout, self.previous].contains(&Some(number))
    }
}
