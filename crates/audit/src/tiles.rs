//! Where a tree's hashes stand, so that a proof over millions of records reads a few rows.
//!
//! A tile is up to 256 hashes side by side. Tile `number` of level 0 holds the hashes of the leaves from `256 × number` on; one of
//! level `l` holds the roots of whole tiles of the level below, that is of subtrees with 256ˡ leaves. The heights between are
//! computed from a tile when they are needed. This is the layout of C2SP's tlog-tiles.
//!
//! What is stored: every full tile, and the last, unfinished tile of each level from 1 up. The unfinished tile of level 0 is not
//! stored: its hashes are those of the last records, at most 255, which whoever needs it reads and hashes. So an append
//! writes no tile, save every 256th, which writes a full one of level 0 and rewrites the last of level 1; every 65,536th writes
//! one of level 2 besides, and so on: 64 bytes a record in the mean.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::fmt;

use crate::hash::Hash;
use crate::merkle::{Span, Subtree, consistency_spans, fold, inclusion_spans, whole};

/// How many hashes a full tile has.
pub const TILE: usize = 1 << TILE_HEIGHT;
const TILE_HEIGHT: u32 = 8;

/// Names a tile. Its text, `{level}/{number as 14 digits}`, sorts as it does and is meant for a key in a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TileId {
    pub level: u8,
    pub number: u64,
}

impl TileId {
    /// The first record whose leaf is below the tile.
    pub fn first_record(self) -> u64 {
        self.number << (TILE_HEIGHT * (u32::from(self.level) + 1))
    }
}

impl fmt::Display for TileId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{:014}", self.level, self.number)
    }
}

/// Access to tiles. A tile that isn't there is an empty one.
pub trait Tiles {
    type Error;

    /// The tile's hashes, at least those that its tree had when it was asked for.
    fn tile(&self, id: TileId) -> Result<Cow<'_, [Hash]>, Self::Error>;
}

/// Tiles that were fetched before: those that [`inclusion_tiles`], [`consistency_tiles`] or [`open_tiles`] name.
impl Tiles for BTreeMap<TileId, Vec<Hash>> {
    type Error = Infallible;

    fn tile(&self, id: TileId) -> Result<Cow<'_, [Hash]>, Infallible> {
        Ok(Cow::Borrowed(self.get(&id).map_or(&[], Vec::as_slice)))
    }
}

/// Why no proof could be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProofError<E> {
    #[error("the tree of {size} records has no record {index}: ask for a later tree head")]
    NoRecord { index: u64, size: u64 },
    #[error("a tree of {first} records can't be the beginning of one of {second}: swap them")]
    Backwards { first: u64, second: u64 },
    #[error("tile {id} has {has} hashes, {needs} are needed: restore it from the records or a backup")]
    Incomplete { id: TileId, has: usize, needs: usize },
    #[error("reading a tile failed: {0}")]
    Tiles(E),
}

/// The tiles that [`inclusion_proof`] will read.
pub fn inclusion_tiles(index: u64, size: u64) -> Vec<TileId> {
    needed(&inclusion_spans(index, size).unwrap_or_default())
}

/// The tiles that [`consistency_proof`] will read.
pub fn consistency_tiles(first: u64, second: u64) -> Vec<TileId> {
    needed(&consistency_spans(first, second).unwrap_or_default())
}

/// The tiles at the right edge of a tree that aren't full, and how many hashes each has.
pub fn open_tiles(size: u64) -> Vec<(TileId, usize)> {
    let mut tiles = Vec::new();
    let (mut level, mut hashes) = (0, size);
    while hashes > 0 {
        let (number, count) = (hashes >> TILE_HEIGHT, (hashes % TILE as u64) as usize);
        if count > 0 {
            tiles.push((TileId { level, number }, count));
        }
        level += 1;
        hashes = number;
    }
    tiles
}

/// The proof that record `index` is in the tree of the first `size` records.
pub fn inclusion_proof<T: Tiles>(tiles: &T, index: u64, size: u64) -> Result<Vec<Hash>, ProofError<T::Error>> {
    let spans = inclusion_spans(index, size).ok_or(ProofError::NoRecord { index, size })?;
    spans.into_iter().map(|s| root_of(tiles, s)).collect()
}

/// The proof that the tree of the first `first` records is how that of the first `second` began.
pub fn consistency_proof<T: Tiles>(tiles: &T, first: u64, second: u64) -> Result<Vec<Hash>, ProofError<T::Error>> {
    let spans = consistency_spans(first, second).ok_or(ProofError::Backwards { first, second })?;
    spans.into_iter().map(|s| root_of(tiles, s)).collect()
}

/// The right edge of the tree of the first `size` records, as an export that begins there needs it.
pub fn peaks_at<T: Tiles>(tiles: &T, size: u64) -> Result<Vec<Hash>, ProofError<T::Error>> {
    Span { start: 0, end: size }.subtrees().into_iter().map(|s| node(tiles, s)).collect()
}

/// The tiles that [`peaks_at`] will read.
pub fn peaks_tiles(size: u64) -> Vec<TileId> {
    needed(&[Span { start: 0, end: size }])
}

/// A tile as it is stored: its hashes, one after the other.
pub fn encode_tile(hashes: &[Hash]) -> Vec<u8> {
    hashes.iter().flat_map(|h| h.0).collect()
}

/// `None` if the bytes aren't up to 256 hashes.
pub fn decode_tile(bytes: &[u8]) -> Option<Vec<Hash>> {
    let (hashes, rest) = bytes.as_chunks::<{ Hash::LENGTH }>();
    (rest.is_empty() && hashes.len() <= TILE).then(|| hashes.iter().map(|h| Hash(*h)).collect())
}

fn needed(spans: &[Span]) -> Vec<TileId> {
    let tiles: BTreeSet<_> = spans.iter().flat_map(|s| s.subtrees()).map(|s| place(s).0).collect();
    tiles.into_iter().collect()
}

/// The tile from which a subtree's root is computed, and the first and the number of its hashes that it is computed from.
fn place(subtree: Subtree) -> (TileId, usize, usize) {
    let below = subtree.height % TILE_HEIGHT;
    let first = subtree.number << below;
    let level = u8::try_from(subtree.height / TILE_HEIGHT).expect("a height is below 64");
    let id = TileId { level, number: first >> TILE_HEIGHT };
    (id, (first % TILE as u64) as usize, 1 << below)
}

fn node<T: Tiles>(tiles: &T, subtree: Subtree) -> Result<Hash, ProofError<T::Error>> {
    let (id, first, count) = place(subtree);
    let tile = tiles.tile(id).map_err(ProofError::Tiles)?;
    let needs = first + count;
    let hashes = tile.get(first..needs).ok_or(ProofError::Incomplete { id, has: tile.len(), needs })?;
    Ok(whole(hashes))
}

fn root_of<T: Tiles>(tiles: &T, span: Span) -> Result<Hash, ProofError<T::Error>> {
    let nodes: Vec<Hash> = span.subtrees().into_iter().map(|s| node(tiles, s)).collect::<Result<_, _>>()?;
    Ok(fold(nodes.into_iter()))
}
