//! Room for what is being fetched: who goes for it, and what is kept of the disk meanwhile.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    io,
    time::Instant,
};

use super::{
    super::{
        ModelError,
        budget::{Entry, Full, victims},
        plan::Object,
    },
    Inner, Room,
    images::{self, Step},
    micros,
};

#[derive(Debug, Default)]
pub(super) struct Fetching {
    pub(super) uri: String,
    /// When it began; `None` where some of it was here before.
    pub(super) began: Option<Instant>,
    /// Contents that are here already and that it counts on.
    pub(super) known: BTreeMap<String, u64>,
    /// Bytes still to come.
    pub(super) missing: u64,
}

impl Room {
    /// Makes room for a model by having others go, unless images are to go first. Images that `stays` names
    /// do not. Blocks.
    pub(super) fn try_to_reserve(
        &self,
        uri: &str,
        key: &str,
        objects: &[Object],
        began: Instant,
        stays: &BTreeSet<String>,
    ) -> Result<Step, ModelError> {
        let mut inner = self.lock();
        let fetching = self.coming(&inner, uri, key, objects, began);
        let (known, missing): (u64, u64) = (fetching.known.values().sum(), fetching.missing);
        let former = inner.fetching.insert(key.to_owned(), fetching);
        let entries = self.budget.map(|_| self.entries(&inner, Some((uri, key)), stays)).unwrap_or_default();
        let gone = self.budget.map_or(Ok(Vec::new()), |budget| {
            // What it has already is part of it.
            victims(&entries, missing, budget).map_err(|Full { kept }| ModelError::CacheFull {
                uri: uri.to_owned(),
                bytes: known + missing,
                budget,
                kept: kept.saturating_sub(known),
            })
        });
        let images = gone.as_ref().map(|gone| images::leaving(&mut inner, gone)).unwrap_or_default();
        let gone = match gone {
            Ok(gone) if images.is_empty() => gone,
            other => {
                match former {
                    Some(former) => drop(inner.fetching.insert(key.to_owned(), former)),
                    None => drop(inner.fetching.remove(key)),
                }
                return other.map(|_| Step::Images(images));
            }
        };
        // Gives it back where the disk refuses, once the lock is free.
        let reserved = Reserved { room: self.clone(), key: key.to_owned() };
        let why = "another one needs its room";
        let going =
            entries.iter().filter(|entry| gone.contains(&entry.key)).flat_map(|entry| entry.blobs.values()).sum();
        let removed = self
            .fits_on_disk(&inner, going)
            .and_then(|()| gone.iter().try_for_each(|name| self.remove(&mut inner, name, why).map(drop)));
        self.tell(&inner);
        drop(inner);
        let begun = removed.and_then(|()| self.cache.begin(key, uri));
        begun.map_err(|error| ModelError::Disk { uri: uri.to_owned(), error })?;
        Ok(Step::Done(reserved))
    }

    /// What comes with a fetch, beside what is here.
    fn coming(&self, inner: &Inner, uri: &str, key: &str, objects: &[Object], began: Instant) -> Fetching {
        let mut fetching = Fetching { uri: uri.to_owned(), ..Fetching::default() };
        for object in objects {
            match object.sha256.as_ref().filter(|sha256| self.cache.blob(sha256).exists()) {
                Some(sha256) => drop(fetching.known.insert(sha256.clone(), object.size)),
                None => fetching.missing += object.size,
            }
        }
        let fresh = fetching.known.is_empty() && !self.cache.begun(key);
        // One that is unpacked has been fetched before.
        let before = inner.fetching.get(key).map(|fetching| fetching.began);
        fetching.began = before.unwrap_or_else(|| fresh.then_some(began));
        fetching
    }

    /// Whether the disk has room for what is still to come of all fetches once so many bytes have gone: one
    /// that is filled to its end would be a trouble of all that share it. What cut-off fetches have left, and
    /// nobody wants any more, goes before it is full.
    fn fits_on_disk(&self, inner: &Inner, going: u64) -> io::Result<()> {
        let parts: HashMap<_, _> = self.cache.partials().into_iter().map(|part| (part.key.clone(), part)).collect();
        let left = inner.fetching.iter().map(|(key, fetching)| {
            let here = parts.get(key).map(|part| part.bytes).unwrap_or_default();
            fetching.missing.saturating_sub(here)
        });
        let left = left.sum::<u64>().saturating_sub(going);
        if left > self.cache.free()? {
            let wanted = |uri: &Option<String>| uri.as_ref().is_some_and(|uri| inner.held.contains_key(uri));
            let unwanted = parts.values().filter(|part| !inner.fetching.contains_key(&part.key) && !wanted(&part.uri));
            unwanted.for_each(|part| self.cache.discard(&part.key));
        }
        let free = self.cache.free()?;
        if left <= free {
            return Ok(());
        }
        let why = format!("{left} bytes more are needed, and {free} are free");
        Err(io::Error::new(io::ErrorKind::StorageFull, why))
    }

    /// All that takes room. Where it is for a model, by address and key, its own bytes to come are what is
    /// asked for. Images that `stays` names do not go.
    ///
    /// A model that no replica waits for displaces only what is to be kept less: two that are both asked
    /// for, and do not fit together, would displace each other for ever.
    pub(super) fn entries(&self, inner: &Inner, comes: Option<(&str, &str)>, stays: &BTreeSet<String>) -> Vec<Entry> {
        let keep = |uri: &str| Some(inner.wishes.as_ref()?.get(uri)?.keep);
        let own = comes.and_then(|(uri, _)| keep(uri).filter(|_| inner.replicas(uri).is_empty()));
        let before = move |other: u32| own.is_some_and(|own| other >= own);
        let whole = inner.trees.iter().map(|(key, tree)| Entry {
            key: key.clone(),
            blobs: tree.blobs.clone(),
            keep: keep(&tree.uri).unwrap_or_default(),
            last_used: micros(tree.last_used),
            in_use: inner.held.contains_key(&tree.uri) || before(keep(&tree.uri).unwrap_or_default()),
            pinned: self.cache.pinned(key),
        });
        let coming = inner.fetching.iter().map(|(name, fetching)| {
            let mut blobs = fetching.known.clone();
            if comes.is_none_or(|(_, key)| name != key) {
                blobs.insert(partial(name), fetching.missing);
            }
            Entry { key: partial(name), blobs, in_use: true, ..Entry::default() }
        });
        let left = self.cache.partials().into_iter().filter(|left| !inner.fetching.contains_key(&left.key));
        let left = left.map(|left| Entry {
            key: partial(&left.key),
            blobs: BTreeMap::from([(partial(&left.key), left.bytes)]),
            last_used: micros(left.changed),
            ..Entry::default()
        });
        whole.chain(coming).chain(left).chain(Self::image_entries(inner, before, stays)).collect()
    }
}

/// Keys of what is not whole begin with it; no key of a whole model does.
pub(super) const PARTIAL: &str = "partial/";

fn partial(key: &str) -> String {
    format!("{PARTIAL}{key}")
}

/// Room for a model that is being fetched, until this is dropped.
#[derive(Debug)]
pub(in super::super) struct Reserved {
    room: Room,
    key: String,
}

impl Drop for Reserved {
    fn drop(&mut self) {
        let mut inner = self.room.lock();
        inner.fetching.remove(&self.key);
        self.room.cache.tidy(&self.key);
    }
}
