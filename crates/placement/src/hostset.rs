//! A set of host indexes that is cheap both when it holds three hosts and when it holds most of a cell.
//!
//! Small sets are a sorted list; from [`DENSE_ABOVE`] members on, one bit per host, so that a look-up while walking
//! thousands of hosts is one load from a few kilobytes. Iteration is by ascending index in both forms.

/// A list of this many is still searched about as fast as a bit is found; beyond it the bit set costs under 100 bytes
/// a member in a cell of 50,000 hosts.
const DENSE_ABOVE: usize = 64;
/// Well below [`DENSE_ABOVE`], so that a set at the edge doesn't change form at every step.
const SPARSE_BELOW: usize = 24;

#[derive(Clone, Debug, Default)]
pub(crate) struct HostSet {
    few: Vec<u32>,
    bits: Vec<u64>,
    len: usize,
}

impl HostSet {
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(crate) fn contains(&self, host: u32) -> bool {
        if self.bits.is_empty() {
            self.few.binary_search(&host).is_ok()
        } else {
            self.bits.get(host as usize / 64).is_some_and(|word| word >> (host % 64) & 1 == 1)
        }
    }

    /// Adds a host; false when it was there.
    pub(crate) fn insert(&mut self, host: u32) -> bool {
        if self.contains(host) {
            return false;
        }
        self.len += 1;
        if self.bits.is_empty() {
            let at = self.few.partition_point(|&h| h < host);
            self.few.insert(at, host);
            if self.len > DENSE_ABOVE {
                for host in std::mem::take(&mut self.few) {
                    self.set_bit(host);
                }
            }
        } else {
            self.set_bit(host);
        }
        true
    }

    /// Takes a host out; false when it was not there.
    pub(crate) fn remove(&mut self, host: u32) -> bool {
        if !self.contains(host) {
            return false;
        }
        self.len -= 1;
        if self.bits.is_empty() {
            self.few.retain(|&h| h != host);
        } else {
            self.bits[host as usize / 64] &= !(1 << (host % 64));
            if self.len < SPARSE_BELOW {
                self.few = self.iter().collect();
                self.bits = Vec::new();
            }
        }
        true
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        let dense =
            self.bits.iter().enumerate().flat_map(|(at, &word)| Ones(word).map(move |bit| at as u32 * 64 + bit));
        self.few.iter().copied().chain(dense)
    }

    fn set_bit(&mut self, host: u32) {
        let at = host as usize / 64;
        if at >= self.bits.len() {
            self.bits.resize(at + 1, 0);
        }
        self.bits[at] |= 1 << (host % 64);
    }
}

/// The positions of a word's set bits, ascending.
pub(crate) struct Ones(pub(crate) u64);

impl Iterator for Ones {
    type Item = u32;

    fn next(&mut self) -> Option<u32> {
        if self.0 == 0 {
            return None;
        }
        let bit = self.0.trailing_zeros();
        self.0 &= self.0 - 1;
        Some(bit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn behaves_as_an_ordered_set_in_both_forms(steps in prop::collection::vec((any::<bool>(), 0u32..300), 0..800)) {
            let mut set = HostSet::default();
            let mut model = BTreeSet::new();
            for (add, host) in steps {
                if add {
                    prop_assert_eq!(set.insert(host), model.insert(host));
                } else {
                    prop_assert_eq!(set.remove(host), model.remove(&host));
                }
                prop_assert_eq!(set.len(), model.len());
                prop_assert!((0..300).all(|h| set.contains(h) == model.contains(&h)));
            }
            prop_assert!(set.iter().eq(model.iter().copied()));
        }
    }
}
