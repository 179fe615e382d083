//! What a command is about: a kind and names, as kubectl takes them: `KIND NAME…`, `KIND/NAME…`, or `NAME` of a service.

use anyhow::anyhow;
use clap::ValueEnum as _;

use crate::{failure::Failure, get::Kind};

/// A kind and the names that were given of it.
#[derive(Debug, PartialEq, Eq)]
pub struct Target {
    /// What the names are of.
    pub kind: Kind,
    /// May be empty.
    pub names: Vec<String>,
}

impl Target {
    /// Reads words of the command line. A first word that is no kind is the name of a service, as all words after it
    /// are.
    ///
    /// # Errors
    /// `KIND/NAME` words of several kinds, or of an unknown kind.
    pub fn parse(words: &[String]) -> Result<Self, Failure> {
        let Some((first, rest)) = words.split_first() else {
            return Ok(Self { kind: Kind::Services, names: Vec::new() });
        };
        if first.contains('/') {
            return Self::qualified(words);
        }
        match Kind::from_str(first, true) {
            Ok(kind) => Ok(Self { kind, names: rest.to_vec() }),
            Err(_) => Ok(Self { kind: Kind::Services, names: words.to_vec() }),
        }
    }

    fn qualified(words: &[String]) -> Result<Self, Failure> {
        let mut kinds = None;
        let mut names = Vec::new();
        for word in words {
            let (kind, name) = word.split_once('/').ok_or_else(|| anyhow!("{word:?}: expected KIND/NAME"))?;
            // "inferenceservice.serving.kserve.io/iris", as this program prints it.
            let kind = kind.split('.').next().unwrap_or(kind);
            let kind = Kind::from_str(kind, true).map_err(|_| anyhow!("{word:?}: {kind:?} is no kind"))?;
            if kinds.is_some_and(|other| other != kind) {
                return Err(anyhow!("{word:?}: one command takes names of one kind").into());
            }
            kinds = Some(kind);
            names.push(name.to_owned());
        }
        Ok(Self { kind: kinds.unwrap_or(Kind::Services), names })
    }

    /// The one name that was given, if any.
    ///
    /// # Errors
    /// There are several.
    pub fn name(&self) -> Result<Option<&str>, Failure> {
        match self.names.as_slice() {
            [] => Ok(None),
            [name] => Ok(Some(name)),
            [_, second, ..] => Err(anyhow!("{second:?}: expected one name").into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &[&str]) -> Result<Target, Failure> {
        Target::parse(&words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>())
    }

    fn target(kind: Kind, names: &[&str]) -> Target {
        Target { kind, names: names.iter().map(|name| (*name).to_owned()).collect() }
    }

    #[test]
    fn a_word_that_is_no_kind_is_the_name_of_a_service() {
        assert_eq!(parse(&["iris"]).unwrap(), target(Kind::Services, &["iris"]));
        assert_eq!(parse(&["isvc", "iris"]).unwrap(), target(Kind::Services, &["iris"]));
        assert_eq!(parse(&["nodes"]).unwrap(), target(Kind::Nodes, &[]));
        assert_eq!(parse(&[]).unwrap(), target(Kind::Services, &[]));
    }

    #[test]
    fn kind_and_name_may_be_joined_by_a_slash() {
        assert_eq!(parse(&["isvc/a", "isvc/b"]).unwrap(), target(Kind::Services, &["a", "b"]));
        let printed = parse(&["inferenceservice.serving.kserve.io/iris"]).unwrap();
        assert_eq!(printed, target(Kind::Services, &["iris"]));
        assert!(parse(&["isvc/a", "node/b"]).is_err());
        assert!(parse(&["nothing/a"]).is_err());
    }
}
