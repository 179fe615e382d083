//! The BLAKE3 of a file from hashes of its ranges, each computed on its own and in any order, while its bytes are in
//! the processor's cache.
//!
//! BLAKE3 is the root of a binary tree over chunks of 1 KiB, whose left side is as large as a power of two can be
//! (section 2.1 of its paper). Ranges are a power of two long and begin at multiples of that, so that each is a
//! subtree, the last one, which may be shorter, too.

use std::ops::Range;

use blake3::{
    Hash, Hasher,
    hazmat::{ChainingValue, HasherExt as _, Mode, merge_subtrees_non_root, merge_subtrees_root},
};

use super::plan::RANGE_BYTES;

const _: () = assert!(RANGE_BYTES.is_power_of_two() && RANGE_BYTES >= blake3::CHUNK_LEN as u64);

/// Of one range: a chaining value; of the only range of a file, its BLAKE3.
pub(super) type Value = ChainingValue;

/// The hash of one range, as its bytes come.
pub(super) struct Subtree {
    hasher: Box<Hasher>,
    /// True for the only range of its file.
    whole: bool,
}

impl Subtree {
    /// Of a range of a file of so many bytes, as [`super::plan::missing`] gives them.
    pub(super) fn new(range: &Range<u64>, size: u64) -> Self {
        let mut hasher = Box::<Hasher>::default();
        hasher.set_input_offset(range.start);
        Self { hasher, whole: range.start == 0 && range.end == size }
    }

    /// The bytes that follow.
    pub(super) fn update(&mut self, content: &[u8]) {
        self.hasher.update(content);
    }

    /// Once all of the range's bytes have come.
    pub(super) fn value(&self) -> Value {
        if self.whole { self.hasher.finalize().into() } else { self.hasher.finalize_non_root() }
    }
}

/// The BLAKE3 of a file from the values of all its ranges, in order.
pub(super) fn root(values: &[Value]) -> Hash {
    match values {
        [] => blake3::hash(&[]),
        [only] => Hash::from_bytes(*only),
        several => {
            let (left, right) = halves(several);
            merge_subtrees_root(&merged(left), &merged(right), Mode::Hash)
        }
    }
}

fn merged(values: &[Value]) -> Value {
    if let [only] = values {
        return *only;
    }
    let (left, right) = halves(values);
    merge_subtrees_non_root(&merged(left), &merged(right), Mode::Hash)
}

/// At least two values as the tree has them: the left half is the largest power of two that leaves something.
fn halves(values: &[Value]) -> (&[Value], &[Value]) {
    values.split_at(values.len().next_power_of_two() / 2)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::models::plan::missing;

    #[test]
    fn ranges_make_the_files_own_hash() {
        let content: Vec<u8> = (0..6 * RANGE_BYTES + 1).map(|n| (n % 251) as u8).collect();
        let range = RANGE_BYTES;
        let sizes = [0, 1, 1024, 1025, range - 1, range, range + 1, 2 * range, 3 * range + 5, 4 * range, 6 * range + 1];
        for size in sizes {
            let value = |range: Range<u64>| {
                let mut subtree = Subtree::new(&range, size);
                // As it comes: in pieces of no size in particular.
                content[range.start as usize..range.end as usize]
                    .chunks(99_991)
                    .for_each(|piece| subtree.update(piece));
                subtree.value()
            };
            let mut ranges = missing(size, &BTreeSet::new());
            ranges.reverse();
            let mut values: Vec<_> = ranges.into_iter().map(value).collect();
            values.reverse();
            assert_eq!(root(&values), blake3::hash(&content[..size as usize]), "{size}");
        }
    }
}
