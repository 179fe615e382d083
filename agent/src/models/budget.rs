//! Which models and images go when another one needs their room. Pure.

use std::collections::{BTreeMap, BTreeSet};

/// One model on disk, or what is there of it; or an image.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Entry {
    /// Its name; unique.
    pub key: String,
    /// Its contents, or layers, and their bytes. One that several have takes its bytes once.
    pub blobs: BTreeMap<String, u64>,
    /// Of those that may go, the one of the least goes first.
    pub keep: u32,
    /// When it was last used; any unit that grows.
    pub last_used: u64,
    /// A replica has it, it is being fetched, or it goes before the one that needs room: it stays.
    pub in_use: bool,
    /// An operator keeps it: it stays.
    pub pinned: bool,
}

impl Entry {
    fn stays(&self) -> bool {
        self.in_use || self.pinned
    }
}

/// There is no room, whatever goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Full {
    /// Bytes of what stays.
    pub kept: u64,
}

/// Keys of those that go so that `need` bytes more fit into `budget` bytes: the one of the least
/// `keep` first, then the one that was used longest ago (by key where that is equal). None that stays, none
/// in vain: each of them is needed.
///
/// # Errors
/// What stays and `need` are together more than `budget`.
pub fn victims(entries: &[Entry], need: u64, budget: u64) -> Result<Vec<String>, Full> {
    let mut holders: BTreeMap<&str, (u64, usize)> = BTreeMap::new();
    for (blob, bytes) in entries.iter().flat_map(|entry| &entry.blobs) {
        holders.entry(blob).or_insert((*bytes, 0)).1 += 1;
    }
    let mut taken: u64 = holders.values().map(|(bytes, _)| bytes).sum();
    let fits = |taken: u64| taken.saturating_add(need) <= budget;
    let mut going: Vec<&Entry> = entries.iter().filter(|entry| !entry.stays()).collect();
    going.sort_by_key(|entry| (entry.keep, entry.last_used, &entry.key));
    let mut gone = Vec::new();
    for entry in going {
        if fits(taken) {
            break;
        }
        for (blob, bytes) in &entry.blobs {
            if let Some((_, count)) = holders.get_mut(blob.as_str()) {
                *count -= 1;
                taken -= if *count == 0 { *bytes } else { 0 };
            }
        }
        gone.push(entry);
    }
    if !fits(taken) {
        return Err(Full { kept: taken });
    }
    // Small ones that went before a large one may not have been needed; those that went last stay first.
    let mut needed = BTreeSet::new();
    for entry in gone.iter().rev() {
        let back =
            entry.blobs.iter().filter(|(blob, _)| holders.get(blob.as_str()).is_some_and(|(_, count)| *count == 0));
        let back: u64 = back.map(|(_, bytes)| bytes).sum();
        if fits(taken + back) {
            taken += back;
            for blob in entry.blobs.keys() {
                if let Some((_, count)) = holders.get_mut(blob.as_str()) {
                    *count += 1;
                }
            }
        } else {
            needed.insert(entry.key.as_str());
        }
    }
    Ok(gone.iter().filter(|entry| needed.contains(entry.key.as_str())).map(|entry| entry.key.clone()).collect())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn entry(key: &str, last_used: u64, blobs: &[(&str, u64)]) -> Entry {
        let blobs = blobs.iter().map(|(name, bytes)| ((*name).to_owned(), *bytes)).collect();
        Entry { key: key.to_owned(), blobs, last_used, ..Entry::default() }
    }

    /// Bytes of those that are not gone, each content once.
    fn taken(entries: &[Entry], gone: &[String]) -> u64 {
        let left = entries.iter().filter(|entry| !gone.contains(&entry.key));
        left.flat_map(|entry| &entry.blobs).collect::<BTreeMap<_, _>>().values().copied().sum()
    }

    #[test]
    fn the_one_used_longest_ago_goes_first() {
        let all = [entry("new", 3, &[("a", 10)]), entry("old", 1, &[("b", 10)]), entry("mid", 2, &[("c", 10)])];
        assert_eq!(victims(&all, 10, 40).unwrap(), [""; 0]);
        assert_eq!(victims(&all, 10, 30).unwrap(), ["old"]);
        assert_eq!(victims(&all, 20, 30).unwrap(), ["old", "mid"]);
        assert_eq!(victims(&all, 31, 30), Err(Full { kept: 0 }));
        let all = all.map(|entry| Entry { in_use: entry.key == "old", pinned: entry.key == "mid", ..entry });
        assert_eq!(victims(&all, 10, 30).unwrap(), ["new"]);
        assert_eq!(victims(&all, 11, 30), Err(Full { kept: 20 }));
    }

    #[test]
    fn what_is_kept_least_goes_before_what_was_used_longest_ago() {
        let mut all = [entry("old", 1, &[("a", 10)]), entry("mid", 2, &[("b", 10)]), entry("new", 3, &[("c", 10)])];
        all[0].keep = 2;
        all[1].keep = 1;
        assert_eq!(victims(&all, 10, 30).unwrap(), ["new"]);
        assert_eq!(victims(&all, 30, 30).unwrap(), ["new", "mid", "old"]);
    }

    #[test]
    fn a_small_one_does_not_go_in_vain() {
        let all = [entry("small", 1, &[("a", 1)]), entry("large", 2, &[("b", 100)])];
        assert_eq!(victims(&all, 50, 101).unwrap(), ["large"]);
    }

    #[test]
    fn what_another_model_has_too_frees_nothing() {
        let mut all = [entry("old", 1, &[("a", 10)]), entry("mid", 2, &[("b", 10)]), entry("new", 3, &[("a", 10)])];
        assert_eq!(victims(&all, 10, 20).unwrap(), ["mid"]);
        all[1].in_use = true;
        assert_eq!(victims(&all, 10, 20).unwrap(), ["old", "new"]);
    }

    fn entries() -> impl Strategy<Value = Vec<Entry>> {
        let blobs = prop::collection::btree_set(0_u64..12, 1..4);
        let one = (blobs, 0_u32..3, 0_u64..6, prop::bool::weighted(0.2), prop::bool::weighted(0.2));
        prop::collection::vec(one, 0..9).prop_map(|all| {
            let named = all.into_iter().enumerate();
            named
                .map(|(number, (blobs, keep, last_used, in_use, pinned))| Entry {
                    key: format!("k{number}"),
                    blobs: blobs.into_iter().map(|n| (format!("b{n}"), n * n + 1)).collect(),
                    keep,
                    last_used,
                    in_use,
                    pinned,
                })
                .collect()
        })
    }

    proptest! {
        #[test]
        fn what_goes_is_free_to_go_enough_and_no_more(all in entries(), need in 0_u64..200, budget in 0_u64..400) {
            let answer = victims(&all, need, budget);
            let stays: Vec<_> = all.iter().filter(|entry| !entry.stays()).map(|entry| entry.key.clone()).collect();
            let least = taken(&all, &stays);
            match &answer {
                Err(Full { kept }) => {
                    prop_assert_eq!(*kept, least);
                    prop_assert!(least + need > budget, "it would have fitted");
                }
                Ok(gone) => {
                    prop_assert!(gone.iter().all(|key| stays.contains(key)), "in use or pinned");
                    prop_assert!(taken(&all, gone) + need <= budget);
                    for (at, _) in gone.iter().enumerate() {
                        let mut fewer = gone.clone();
                        fewer.remove(at);
                        prop_assert!(taken(&all, &fewer) + need > budget, "one goes in vain");
                    }
                    let entry = |key: &String| all.iter().find(|entry| entry.key == *key);
                    let turn = |key: &String| entry(key).map(|entry| (entry.keep, entry.last_used));
                    prop_assert!(gone.is_sorted_by_key(turn));
                }
            }
            // The order in which they are given makes no difference.
            let mut turned = all.clone();
            turned.reverse();
            prop_assert_eq!(victims(&turned, need, budget), answer);
        }
    }
}
