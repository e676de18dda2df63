//! Trees and proofs, against the public vectors of Certificate Transparency and against a tree as the RFC defines it.

use std::collections::BTreeMap;

use nexus_audit::tiles::{TILE, consistency_tiles, decode_tile, encode_tile, inclusion_tiles, peaks_at, peaks_tiles};
use nexus_audit::{
    Frontier, Hash, Log, ProofError, TileId, consistency_proof, inclusion_proof, verify_consistency, verify_inclusion,
};
use proptest::prelude::*;

use crate::world::draft;

/// The leaves and roots of the reference implementation's tests.
const LEAVES: [&str; 8] =
    ["", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"];
const ROOTS: [&str; 9] = [
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
];
const N01: &str = "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125";
const N23: &str = "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e";
const N45: &str = "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a";
const N67: &str = "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0";
const N03: &str = "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7";
const N47: &str = "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4";
const L0: &str = "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d";
const L1: &str = "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7";
const L4: &str = "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b";

fn hash(text: &str) -> Hash {
    text.parse().unwrap()
}

fn leaves() -> Vec<Hash> {
    LEAVES
        .iter()
        .map(|l| {
            Hash::leaf(
                &(0..l.len()).step_by(2).map(|i| u8::from_str_radix(&l[i..i + 2], 16).unwrap()).collect::<Vec<_>>(),
            )
        })
        .collect()
}

/// `MTH`, `PATH` and `PROOF` as sections 2.1.1, 2.1.3.1 and 2.1.4.1 define them, over hashes of leaves.
mod defined {
    use super::Hash;

    fn k(n: usize) -> usize {
        (0..).map(|i| 1 << i).take_while(|k| *k < n).last().unwrap()
    }

    pub fn mth(d: &[Hash]) -> Hash {
        match d {
            [] => Hash::of(b""),
            [one] => *one,
            _ => Hash::node(mth(&d[..k(d.len())]), mth(&d[k(d.len())..])),
        }
    }

    pub fn path(m: usize, d: &[Hash]) -> Vec<Hash> {
        if d.len() == 1 {
            return Vec::new();
        }
        let (left, right) = d.split_at(k(d.len()));
        let (mut path, last) =
            if m < left.len() { (path(m, left), mth(right)) } else { (path(m - left.len(), right), mth(left)) };
        path.push(last);
        path
    }

    pub fn subproof(m: usize, d: &[Hash], b: bool) -> Vec<Hash> {
        if m == d.len() {
            return if b { Vec::new() } else { vec![mth(d)] };
        }
        let (left, right) = d.split_at(k(d.len()));
        let (mut proof, last) = if m <= left.len() {
            (subproof(m, left, b), mth(right))
        } else {
            (subproof(m - left.len(), right, false), mth(left))
        };
        proof.push(last);
        proof
    }
}

/// Every tile of a tree, from its leaves.
fn tiles(leaves: &[Hash]) -> BTreeMap<TileId, Vec<Hash>> {
    let (mut tiles, mut level, mut hashes) = (BTreeMap::new(), 0, leaves.to_vec());
    while !hashes.is_empty() {
        for (number, tile) in (0..).zip(hashes.chunks(TILE)) {
            assert_eq!(decode_tile(&encode_tile(tile)).as_deref(), Some(tile));
            tiles.insert(TileId { level, number }, tile.to_vec());
        }
        hashes = hashes.chunks_exact(TILE).map(defined::mth).collect();
        level += 1;
    }
    tiles
}

fn some_leaves(count: usize) -> Vec<Hash> {
    (0..count).map(|i| Hash::leaf(&i.to_le_bytes())).collect()
}

fn frontier(leaves: &[Hash]) -> Frontier {
    let mut frontier = Frontier::default();
    leaves.iter().for_each(|l| frontier.append(*l));
    frontier
}

#[test]
fn the_public_vectors_hold() {
    let leaves = leaves();
    for (size, root) in ROOTS.iter().enumerate() {
        assert_eq!(frontier(&leaves[..size]).root(), hash(root), "size {size}");
    }
    let tiles = tiles(&leaves);
    for (index, size, path) in
        [(0, 1, &[][..]), (0, 8, &[L1, N23, N47]), (5, 8, &[L4, N67, N03]), (2, 3, &[N01]), (1, 5, &[L0, N23, L4])]
    {
        let path: Vec<Hash> = path.iter().map(|p| hash(p)).collect();
        assert_eq!(inclusion_proof(&tiles, index, size).unwrap(), path, "{index} in {size}");
        let root = hash(ROOTS[size as usize]);
        assert!(verify_inclusion(leaves[index as usize], index, size, root, &path), "{index} in {size}");
    }
    for (first, second, path) in
        [(1, 1, &[][..]), (1, 8, &[L1, N23, N47]), (6, 8, &[N45, N67, N03]), (2, 5, &[N23, L4])]
    {
        let path: Vec<Hash> = path.iter().map(|p| hash(p)).collect();
        assert_eq!(consistency_proof(&tiles, first, second).unwrap(), path, "{first} to {second}");
        let root = |size: u64| hash(ROOTS[size as usize]);
        assert!(verify_consistency(first, root(first), second, root(second), &path), "{first} to {second}");
    }
}

/// Whatever is changed about a proof that holds, it holds no more.
fn broken_paths(path: &[Hash]) -> Vec<Vec<Hash>> {
    let mut broken = vec![[path, &[Hash::ZERO]].concat(), [&[Hash::ZERO], path].concat()];
    for at in 0..path.len() {
        let mut changed = path.to_vec();
        changed[at].0[7] ^= 4;
        broken.push(changed);
        let mut shorter = path.to_vec();
        shorter.remove(at);
        broken.push(shorter);
    }
    broken
}

fn check_inclusion(leaves: &[Hash], index: usize) {
    let (at, size, root) = (index as u64, leaves.len() as u64, defined::mth(leaves));
    let tiles = tiles(leaves);
    let path = inclusion_proof(&tiles, at, size).unwrap();
    assert_eq!(path, defined::path(index, leaves));
    let fetched: BTreeMap<_, _> = inclusion_tiles(at, size).into_iter().map(|t| (t, tiles[&t].clone())).collect();
    assert_eq!(inclusion_proof(&fetched, at, size).as_ref(), Ok(&path), "no other tile is read than those named");
    assert!(verify_inclusion(leaves[index], at, size, root, &path));
    for broken in broken_paths(&path) {
        assert!(!verify_inclusion(leaves[index], at, size, root, &broken));
    }
    assert!(!verify_inclusion(Hash::ZERO, at, size, root, &path));
    assert!(!verify_inclusion(leaves[index], size, size, root, &path));
    assert!(!verify_inclusion(leaves[index], at ^ 1, size, root, &path) || size == 1);
}

fn check_consistency(leaves: &[Hash], first: usize) {
    let (old, new) = (defined::mth(&leaves[..first]), defined::mth(leaves));
    let (m, n) = (first as u64, leaves.len() as u64);
    let tiles = tiles(leaves);
    let path = consistency_proof(&tiles, m, n).unwrap();
    let defined = if m == 0 { Vec::new() } else { defined::subproof(first, leaves, true) };
    assert_eq!(path, defined);
    let fetched: BTreeMap<_, _> = consistency_tiles(m, n).into_iter().map(|t| (t, tiles[&t].clone())).collect();
    assert_eq!(consistency_proof(&fetched, m, n).as_ref(), Ok(&path), "no other tile is read than those named");
    assert!(verify_consistency(m, old, n, new, &path));
    for broken in broken_paths(&path) {
        assert!(!verify_consistency(m, old, n, new, &broken));
    }
    assert!(!verify_consistency(m, Hash::ZERO, n, new, &path));
    // The empty tree is how every tree began.
    assert!(m == 0 || !verify_consistency(m, old, n, Hash::ZERO, &path));
    assert!(m == n || !verify_consistency(n, new, m, old, &path));
}

#[test]
fn every_small_tree_has_the_proofs_of_the_rfc() {
    for size in 0..20 {
        let leaves = some_leaves(size);
        (0..size).for_each(|index| check_inclusion(&leaves, index));
        (0..=size).for_each(|first| check_consistency(&leaves, first));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn trees_have_the_proofs_of_the_rfc(size in 0_usize..300, at in any::<prop::sample::Index>()) {
        let leaves = some_leaves(size);
        let edge = frontier(&leaves);
        prop_assert_eq!(edge.root(), defined::mth(&leaves));
        prop_assert_eq!(Frontier::from_parts(edge.size(), edge.peaks().to_vec()), Some(edge));
        if size > 0 {
            check_inclusion(&leaves, at.index(size));
        }
        let first = at.index(size + 1);
        check_consistency(&leaves, first);
        let edge = frontier(&leaves[..first]);
        let fetched: BTreeMap<_, _> = peaks_tiles(first as u64).into_iter().map(|t| (t, tiles(&leaves)[&t].clone())).collect();
        prop_assert_eq!(peaks_at(&fetched, first as u64).unwrap(), edge.peaks());
    }
}

#[test]
fn a_proof_that_cannot_be_made_says_why() {
    let mut tiles = tiles(&some_leaves(300));
    assert_eq!(inclusion_proof(&tiles, 300, 300), Err(ProofError::NoRecord { index: 300, size: 300 }));
    assert_eq!(consistency_proof(&tiles, 2, 1), Err(ProofError::Backwards { first: 2, second: 1 }));
    let id = TileId { level: 0, number: 1 };
    tiles.get_mut(&id).unwrap().truncate(10);
    assert!(matches!(inclusion_proof(&tiles, 0, 300), Err(ProofError::Incomplete { id: found, .. }) if found == id));
    assert_eq!(TileId { level: 1, number: 3 }.first_record(), 3 * 65_536);
}

#[test]
fn an_append_that_is_taken_back_never_was() {
    let (mut log, mut plain) = (Log::new("eu"), Log::new("eu"));
    for number in 0..600 {
        let mark = log.mark();
        log.append(draft(9_999)).unwrap();
        log.take_back(mark);
        assert_eq!(log.state(), plain.state(), "{number}");
        let (kept, same) = (log.append(draft(number)).unwrap(), plain.append(draft(number)).unwrap());
        assert_eq!(kept, same, "{number}");
    }
    // A mark that nothing followed takes nothing back.
    let mark = log.mark();
    log.take_back(mark);
    assert_eq!(log.state(), plain.state());
}
