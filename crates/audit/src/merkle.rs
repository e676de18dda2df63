//! Merkle trees as in RFC 9162, section 2.1: the right edge that is all an append needs, which subtrees a proof consists of,
//! and the verification of proofs.
//!
//! No tree is held here. A tree of `n` leaves is cut, at every step, at the largest power of two below its size; so a proof is a
//! list of [`Span`]s of leaves, each one or a few whole subtrees, and [`crate::tiles`] knows where the hashes of those stand.

use crate::hash::Hash;

/// The roots of the whole subtrees at a tree's right edge, the largest first: one for each bit that is set in its size.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Frontier {
    size: u64,
    peaks: Vec<Hash>,
}

impl Frontier {
    /// The edge of a tree of that size, if that is how many peaks it has.
    pub fn from_parts(size: u64, peaks: Vec<Hash>) -> Option<Self> {
        (usize::try_from(size.count_ones()) == Ok(peaks.len())).then_some(Self { size, peaks })
    }

    /// How many leaves the tree has.
    pub fn size(&self) -> u64 {
        self.size
    }

    pub fn peaks(&self) -> &[Hash] {
        &self.peaks
    }

    /// Appends the hash of a leaf.
    pub fn append(&mut self, leaf: Hash) {
        let mut node = leaf;
        // Each low bit that is set is a subtree which this leaf, and what it has become, completes to one twice as large.
        for _ in 0..self.size.trailing_ones() {
            let left = self.peaks.pop().expect("a bit of the size is a peak");
            node = Hash::node(left, node);
        }
        self.peaks.push(node);
        self.size += 1;
    }

    /// The tree's root.
    pub fn root(&self) -> Hash {
        fold(self.peaks.iter().copied())
    }
}

/// The root over subtrees that stand side by side, the largest first.
pub(crate) fn fold(subtrees: impl DoubleEndedIterator<Item = Hash>) -> Hash {
    subtrees.rev().reduce(|right, left| Hash::node(left, right)).unwrap_or_else(Hash::of_nothing)
}

/// The root of a whole tree over a power of two of hashes.
pub(crate) fn whole(hashes: &[Hash]) -> Hash {
    let mut edge = Frontier::default();
    hashes.iter().for_each(|h| edge.append(*h));
    edge.root()
}

/// The leaves from `start` until before `end`, which stand together below one node of a tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    pub start: u64,
    pub end: u64,
}

/// The node over the leaves from `number << height` until before `(number + 1) << height`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Subtree {
    pub height: u32,
    pub number: u64,
}

impl Span {
    /// The whole subtrees that the span consists of, the largest first.
    pub fn subtrees(self) -> Vec<Subtree> {
        let (mut start, mut left) = (self.start, self.end.saturating_sub(self.start));
        let mut subtrees = Vec::new();
        while left > 0 {
            let height = left.ilog2();
            subtrees.push(Subtree { height, number: start >> height });
            start += 1 << height;
            left -= 1 << height;
        }
        subtrees
    }
}

/// Where a tree of `size` leaves, two at least, is cut: the largest power of two below it.
fn cut(size: u64) -> u64 {
    1 << (size - 1).ilog2()
}

/// What the proof that leaf `index` is in the tree of `size` leaves consists of (`PATH`, section 2.1.3.1). `None` if it isn't.
pub fn inclusion_spans(index: u64, size: u64) -> Option<Vec<Span>> {
    if index >= size {
        return None;
    }
    let mut spans = Vec::new();
    let (mut start, mut end) = (0, size);
    while end - start > 1 {
        let middle = start + cut(end - start);
        if index < middle {
            spans.push(Span { start: middle, end });
            end = middle;
        } else {
            spans.push(Span { start, end: middle });
            start = middle;
        }
    }
    // Proofs go from the leaf up.
    spans.reverse();
    Some(spans)
}

/// What the proof that the tree of `first` leaves is how that of `second` leaves began consists of (`PROOF`, section 2.1.4.1).
/// `None` unless `first` is at most `second`. Trees without leaves, and equal ones, need no proof.
pub fn consistency_spans(first: u64, second: u64) -> Option<Vec<Span>> {
    if first > second {
        return None;
    }
    if first == 0 || first == second {
        return Some(Vec::new());
    }
    let mut spans = Vec::new();
    let (mut start, mut end) = (0, second);
    while first != end {
        let middle = start + cut(end - start);
        if first <= middle {
            spans.push(Span { start: middle, end });
            end = middle;
        } else {
            spans.push(Span { start, end: middle });
            start = middle;
        }
    }
    // A subtree that begins with the tree is the old tree itself, whose root the verifier has.
    if start > 0 {
        spans.push(Span { start, end });
    }
    spans.reverse();
    Some(spans)
}

/// Whether the proof shows that the leaf with this hash is number `index` of the tree (section 2.1.3.2).
pub fn verify_inclusion(leaf: Hash, index: u64, size: u64, root: Hash, path: &[Hash]) -> bool {
    if index >= size {
        return false;
    }
    let (mut at, mut last) = (index, size - 1);
    let mut hash = leaf;
    for sibling in path {
        if last == 0 {
            return false;
        }
        if at & 1 == 1 || at == last {
            hash = Hash::node(*sibling, hash);
            if at & 1 == 0 {
                let shift = at.trailing_zeros();
                at >>= shift;
                last >>= shift;
            }
        } else {
            hash = Hash::node(hash, *sibling);
        }
        at >>= 1;
        last >>= 1;
    }
    last == 0 && hash == root
}

/// Whether the proof shows that the tree of `first` leaves is how that of `second` leaves began (section 2.1.4.2).
pub fn verify_consistency(first: u64, first_root: Hash, second: u64, second_root: Hash, path: &[Hash]) -> bool {
    if first > second {
        return false;
    }
    if first == second {
        return path.is_empty() && first_root == second_root;
    }
    if first == 0 {
        return path.is_empty() && first_root == Hash::of_nothing();
    }
    let (mut at, mut last) = (first - 1, second - 1);
    let shift = at.trailing_ones();
    at >>= shift;
    last >>= shift;
    let (seed, rest) = if first.is_power_of_two() {
        (first_root, path)
    } else {
        let Some((seed, rest)) = path.split_first() else { return false };
        (*seed, rest)
    };
    if rest.is_empty() {
        return false;
    }
    let (mut old, mut new) = (seed, seed);
    for sibling in rest {
        if last == 0 {
            return false;
        }
        if at & 1 == 1 || at == last {
            old = Hash::node(*sibling, old);
            new = Hash::node(*sibling, new);
            if at & 1 == 0 {
                let shift = at.trailing_zeros();
                at >>= shift;
                last >>= shift;
            }
        } else {
            new = Hash::node(new, *sibling);
        }
        at >>= 1;
        last >>= 1;
    }
    last == 0 && old == first_root && new == second_root
}
