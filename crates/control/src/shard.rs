//! Shuffle sharding: which cells a project's instances go to.
//!
//! A cell is a blast radius: whatever goes wrong in one (a poisoned object, a fault that needs its load to show) may take
//! the whole cell down. So that one tenant's trouble does not become every tenant's, a project uses only a few of the
//! cells of each zone, its *shard*, and two projects rarely have the same few.
//!
//! The assignment is by rendezvous hashing: in each zone, cells are ordered by the first eight bytes (big endian) of
//! SHA-256 over `shard-1`, the seed (the region's name), the project and the cell, each followed by a zero byte; the
//! highest come first, and the first [`size`] of them are the shard. Anybody can compute it, nothing is stored, and a cell
//! that comes or goes changes only the shards in which it ranks. With 8 cells in a zone a shard has 2 of them: there are
//! 28 such pairs, so a project shares its whole shard with one other in 28.
//!
//! A shard that is full does not refuse its project: the next cell in the project's order takes the instance.

use nexus_model::{Digest, Name};

/// How many of a zone's cells a project uses: a quarter, but two at least, so that one cell's loss is not the zone's.
pub fn size(cells: usize) -> usize {
    cells.min(cells.div_ceil(4).max(2))
}

/// Orders one zone's cells for a project.
pub fn order<'a>(seed: &Name, project: &Name, cells: impl Iterator<Item = &'a Name>) -> Vec<&'a Name> {
    let weight = |cell: &Name| {
        let text = format!("shard-1\0{seed}\0{project}\0{cell}\0");
        let digest = Digest::of(text.as_bytes()).hex();
        // The hexadecimal form orders as the bytes do.
        digest[..16].to_owned()
    };
    let mut weighed: Vec<(String, &Name)> = cells.map(|cell| (weight(cell), cell)).collect();
    weighed.sort_by(|a, b| b.cmp(a));
    weighed.into_iter().map(|(_, cell)| cell).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;

    fn name(text: &str) -> Name {
        text.parse().unwrap()
    }

    fn cells(n: usize) -> Vec<Name> {
        (1..=n).map(|i| name(&format!("zone-a-cell-{i}"))).collect()
    }

    fn shard(project: usize, cells: &[Name]) -> BTreeSet<Name> {
        let project = name(&format!("project-{project}"));
        order(&name("local"), &project, cells.iter()).into_iter().take(size(cells.len())).cloned().collect()
    }

    #[test]
    fn shards_are_small_and_never_a_single_cell_if_there_are_two() {
        assert_eq!([0, 1, 2, 3, 8, 9, 40].map(size), [0, 1, 2, 2, 2, 3, 10]);
    }

    #[test]
    fn tenants_are_spread_evenly_and_seldom_share_a_whole_shard() {
        let cells = cells(8);
        let mut load: BTreeMap<Name, usize> = BTreeMap::new();
        let mut pairs: BTreeMap<BTreeSet<Name>, usize> = BTreeMap::new();
        for project in 0..2_800 {
            let shard = shard(project, &cells);
            shard.iter().for_each(|cell| *load.entry(cell.clone()).or_default() += 1);
            *pairs.entry(shard).or_default() += 1;
        }
        assert_eq!(pairs.len(), 28);
        assert!(load.values().all(|n| (600..=800).contains(n)), "about 700 each: {load:?}");
        assert!(pairs.values().all(|n| (60..=145).contains(n)), "about 100 each: {pairs:?}");
    }

    #[test]
    fn a_new_cell_moves_only_those_who_get_it() {
        let (before, after) = (cells(8), cells(9));
        let new = after.last().unwrap();
        for project in 0..200 {
            let (old, now) = (shard(project, &before), shard(project, &after));
            // A ninth cell makes shards of three: everybody keeps what they had, or swaps it for the new cell.
            assert!(old.is_subset(&now) || now.contains(new), "{old:?} became {now:?}");
        }
    }
}
