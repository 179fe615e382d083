//! The user that replicas which are processes run as.

use std::{path::PathBuf, str::FromStr};

use nix::unistd::{Gid, Group, Uid, User, geteuid};
use tokio::process::Command;

/// A user and a group of this machine, given as `USER[:GROUP]` by name or number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunAs {
    uid: Uid,
    gid: Gid,
    home: PathBuf,
}

impl RunAs {
    /// Has the command run as this user and group, with no other groups and with the user's home directory.
    pub(super) fn apply(&self, command: &mut Command) {
        command.uid(self.uid.as_raw()).gid(self.gid.as_raw()).env("HOME", &self.home);
    }

    /// Returns `true` if this process may start others as this user.
    pub fn is_permitted(&self) -> bool {
        geteuid().is_root() || geteuid() == self.uid
    }

    /// Returns `true` if the user is root.
    pub fn is_root(&self) -> bool {
        self.uid.is_root()
    }
}

impl FromStr for RunAs {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (user, group) = text.split_once(':').map_or((text, None), |(user, group)| (user, Some(group)));
        let found = match user.parse() {
            Ok(uid) => User::from_uid(Uid::from_raw(uid)),
            Err(_) => User::from_name(user),
        };
        let found = found.map_err(|error| error.to_string())?.ok_or_else(|| format!("there is no user {user:?}"))?;
        let gid = group.map_or(Ok(found.gid), find_group)?;
        Ok(Self { uid: found.uid, gid, home: found.dir })
    }
}

fn find_group(group: &str) -> Result<Gid, String> {
    if let Ok(gid) = group.parse() {
        return Ok(Gid::from_raw(gid));
    }
    let found = Group::from_name(group).map_err(|error| error.to_string())?;
    found.map(|group| group.gid).ok_or_else(|| format!("there is no group {group:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_and_groups_are_found_by_name_and_number() {
        let root: RunAs = "root".parse().unwrap();
        assert!(root.is_root() && root.gid == Gid::from_raw(0) && root.is_permitted() == geteuid().is_root());
        assert_eq!("0".parse::<RunAs>().unwrap(), root);
        assert_eq!("root:7".parse::<RunAs>().unwrap().gid, Gid::from_raw(7));
        assert!("nobody-of-this-name".parse::<RunAs>().unwrap_err().contains("no user"));
        assert!("root:no-such-group".parse::<RunAs>().unwrap_err().contains("no group"));
    }
}
